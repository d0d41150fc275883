"""Index patterns: the 0/1 tensors of a tensor network that say which entries meet, cached."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from backpack_ext.conv_factors.geometry import Dimension

# Patterns with more entries are made anew each time: the cache counts patterns, not their bytes.
LARGEST_KEPT = 2**18


@dataclass(frozen=True)
class Pattern:
    r"""The connectivity of one spatial dimension as an operand ``P[i, o, k]`` of an expression.

    It is 1 where input entry i meets kernel entry k at output pixel o, else 0. Input entries that
    padding repeats meet kernel entries in more places; zeros around the input are no entries.

    Args:
        dimension: The dimension; behind what is padded, unless with zeros.
        mode: How `before` and `after` are filled in, as in ``torch.nn.functional.pad``; None if with
            zeros, which are part of `dimension`.
        before: Entries added before the input by `mode`.
        after: Entries added after the input by `mode`.
    """

    dimension: Dimension
    mode: str | None = None
    before: int = 0
    after: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The sizes ``(I, O, K)``."""
        d = self.dimension
        return d.size - self.before - self.after, d.out, d.kernel

    def tensor(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``P[i, o, k]``, a tensor of the caller's own."""
        return _made(self, dtype, device)

    def shared(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``P[i, o, k]``, one object per pattern, data type and device unless it is large.

        For reading only: it is never handed out.
        """
        small = prod(self.shape) <= LARGEST_KEPT
        return (_kept if small and _plain() else _made)(self, dtype, device)


def _plain() -> bool:
    # what is made within torch.func's transforms or a fake mode is theirs, and may not outlive them
    probe = torch.empty(0)
    return type(probe) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(probe)


def _made(pattern: Pattern, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        mask = pattern.dimension.pattern()
        if pattern.mode is not None:
            entries = torch.eye(pattern.shape[0])[None]
            copies = F.pad(entries, (pattern.before, pattern.after), mode=pattern.mode)[0]
            mask = torch.einsum("ij,jok->iok", copies, mask.to(copies.dtype))
        return mask.to(device, dtype)


_kept = lru_cache(maxsize=256)(_made)
