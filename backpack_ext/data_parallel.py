"""What torch's wrappers for several devices and processes need to be told, or kept from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.autograd import Variable
from torch.autograd.graph import Node
from torch.nn.modules import _functions
from torch.nn.parallel import distributed

from backpack_ext.errors import UnsupportedError

# Types of nodes: of what `DistributedDataParallel` puts behind a model, with some of its options, and
# of batch norms over processes.
SINK: type | None = getattr(getattr(distributed, "_DDPSink", None), "_backward_cls", None)
SYNC: type | None = getattr(_functions.SyncBatchNorm, "_backward_cls", None)


def prepare_wrappers(nodes: Iterable[Node]) -> None:
    """Have `DistributedDataParallel(static_graph=True)` note that its first backward pass begins.

    It waits for the end of the first pass that runs through its node, and averages gradients then.
    That has to be the pass that computes them: not a nested one of ours, which passes there earlier.

    Raises:
        UnsupportedError: If one of the nodes is a batch norm over processes.
    """
    for node in nodes:
        if type(node) is SYNC:
            raise UnsupportedError(
                "SyncBatchNorm in training mode couples the data of all processes, which exchange "
                "messages whenever vectors pass it. Call eval() on it, or use BatchNorm or another norm."
            )
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
