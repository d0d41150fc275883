"""Several processes that train one model: who refreshes which layer, and what they send each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

PLACEMENTS = ("communication", "memory")

# Bytes of a message; several are under way at a time.
MESSAGE = 2**25


class Alone:
    """One process: nothing to be sent."""

    rank, size = 0, 1

    def assign(self, costs: Mapping[Any, float], owners: Mapping[Any, int]) -> dict[Any, int]:
        """Return the owner of each layer: this process."""
        return dict.fromkeys(costs, 0)

    def keeps(self, owner: int | None) -> bool:
        """Whether this process keeps all of a layer's matrices."""
        return True


class Group:
    """The processes of a group.

    Args:
        owner: Name of the optimizer, for messages.
        group: The process group.
        placement: ``"communication"`` or ``"memory"``.

    Raises:
        ValueError: If ``placement`` is neither.
        TypeError: If ``group`` is no process group, or this process is not in it.
    """

    def __init__(self, owner: str, group: dist.ProcessGroup, placement: str):
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{owner}: process_group={group!r}; expected a torch.distributed.ProcessGroup that this "
                "process is in, such as torch.distributed.group.WORLD."
            )
        self.group, self.placement = group, placement
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict) -> Group:
        """Return the same: a copied optimizer has the same processes."""
        return self

    def __reduce__(self) -> None:
        raise TypeError(
            "An optimizer with a process_group cannot be pickled. Save its state_dict(), and make a new "
            "one."
        )

    def assign(self, costs: Mapping[Any, float], owners: Mapping[Any, int]) -> dict[Any, int]:
        """Return the owner of each layer: the dearest first, to the process with the least to do.

        Args:
            costs: What a refresh of each layer costs.
            owners: Those of layers that have one already; they stay.
        """
        loads = [0.0] * self.size
        for layer, owner in owners.items():
            loads[owner] += costs.get(layer, 0.0)
        found = dict(owners)
        new = [layer for layer in costs if layer not in owners]
        for layer in sorted(new, key=lambda layer: -costs[layer]):
            found[layer] = loads.index(min(loads))
            loads[found[layer]] += costs[layer]
        return found

    def keeps(self, owner: int | None) -> bool:
        """Whether this process keeps all matrices of a layer, or of all layers for None."""
        return self.placement == "communication" or owner == self.rank

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        found = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def all(self, flag: bool, device: torch.device) -> bool:
        """Return whether a flag is set on all processes."""
        found = torch.tensor(float(flag), device=device)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return bool(found)

    def reduce(self, tensors: Mapping[int, Sequence[Tensor]]) -> None:
        """Sum tensors over the processes, in place on the owner alone.

        Args:
            tensors: By the rank of the owner, contiguous; the same shapes on each process.
        """
        self._exchange(
            tensors,
            lambda message, owner: dist.reduce(
                message, group=self.group, group_dst=owner, async_op=True
            ),
            lambda owner: owner == self.rank,
        )

    def broadcast(self, tensors: Mapping[int, Sequence[Tensor]]) -> None:
        """Overwrite tensors by those of their owners.

        Args:
            tensors: By the rank of the owner, contiguous; the same shapes on each process.
        """
        self._exchange(
            tensors,
            lambda message, owner: dist.broadcast(
                message, group=self.group, group_src=owner, async_op=True
            ),
            lambda owner: owner != self.rank,
        )

    def _exchange(self, tensors: Mapping[int, Sequence[Tensor]], send, takes) -> None:
        """Send tensors in few large messages, all of them under way at once, and take the results."""
        running = []
        for owner in sorted(tensors):
            for members in _messages(tensors[owner]):
                message = torch.cat([t.reshape(-1) for t in members])
                running.append((owner, members, message, send(message, owner)))
        for owner, members, message, work in running:
            work.wait()
            if takes(owner):
                for t, part in zip(members, message.split([t.numel() for t in members]), strict=True):
                    t.copy_(part.view(t.shape))


def _messages(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Cut a list of tensors into such of one data type and device and of bounded size."""
    found: list[list[Tensor]] = []
    filling: dict[tuple, list[Tensor]] = {}
    sizes: dict[tuple, int] = {}
    for t in tensors:
        kind = (t.dtype, t.device)
        if kind not in filling or sizes[kind] + t.nbytes > MESSAGE:
            filling[kind], sizes[kind] = [], 0
            found.append(filling[kind])
        filling[kind].append(t)
        sizes[kind] += t.nbytes
    return found


def placement_of(owner: str, group: dist.ProcessGroup | None, placement: str) -> Alone | Group:
    """Return what the arguments ``process_group`` and ``placement`` say.

    Raises:
        ValueError: If ``placement`` is unknown.
        TypeError: If ``group`` is no process group of this process's.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"{owner}: placement={placement!r}; expected one of {PLACEMENTS}.")
    return Alone() if group is None else Group(owner, group, placement)
