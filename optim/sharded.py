"""Parameters that are distributed tensors, each process holding a part: those of `fully_shard`."""

from __future__ import annotations

import sys

from torch import Tensor
from torch.nn import Parameter


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a distributed one."""
    if type(t) in (Tensor, Parameter):  # by far the most frequent
        return False
    # without the module there is none, and importing it takes a while
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def whole(t: Tensor) -> Tensor:
    """Return a whole tensor; all processes have to ask."""
    return t.full_tensor() if is_sharded(t) else t


def local(t: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds; it shares memory with the tensor."""
    return t.to_local() if is_sharded(t) else t


def like_parameter(n: Tensor, p: Tensor) -> Tensor:
    """Return a whole tensor, which all processes have, distributed as a parameter is."""
    if not is_sharded(p):
        return n
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(n.contiguous(), p.device_mesh, p.placements, src_data_rank=None)
