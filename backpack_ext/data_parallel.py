"""What torch's wrappers for several devices and processes need to be told, or kept from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.nn.parallel import distributed

from backpack_ext.errors import UnsupportedError

# The type of the node that `DistributedDataParallel` puts behind a model, with some of its options.
SINK: type | None = getattr(getattr(distributed, "_DDPSink", None), "_backward_cls", None)


def begin_static_graph(sinks: Iterable[Node]) -> None:
    """Have `DistributedDataParallel(static_graph=True)` note that its first backward pass begins.

    It waits for the end of the first pass that runs through its node, and averages gradients then.
    That has to be the pass that computes them: not a nested one of ours, which passes there earlier.
    """
    for node in sinks:
        wrapper = node.ddp_weakref()
        begun = getattr(wrapper, "_static_graph_delay_allreduce_enqueued", True)
        if wrapper.static_graph and not begun:
            wrapper._static_graph_delay_allreduce_enqueued = True
            Variable._execution_engine.queue_callback(wrapper.reducer._delay_all_reduce)


def check_replica(module: nn.Module) -> None:
    """Refuse a copy of a model that `DataParallel` made for one of several devices.

    Raises:
        UnsupportedError: If the module is one.
    """
    if "_is_replica" in module.__dict__:
        raise UnsupportedError(
            f"{type(module).__name__} is called by torch.nn.DataParallel, which copies it to each "
            "device at every step: results would belong to the copies. Use DistributedDataParallel, one "
            "process per device, and backpack(process_group=...)."
        )
