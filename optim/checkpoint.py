"""Checkpoints of optimizers with Kronecker factors: what fits, and in which precision it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optim.buckets import FALLBACK, REFUSED, WEIGHT
from optim.state import loaded, state_dtype
from optim.structure import structures_of

if TYPE_CHECKING:
    from optim.natural import NaturalGradient

# Entries of every group that say how far the training is. They are there because checkpoints of all
# kinds keep a group's entries.
# ``rows`` counts the layers whose gradients the last step took as rows.
CLOCK = {"step": 0, "refreshed": 0, "refreshes": 0, "skipped": 0, "rows": 0, "rejected": 0}
# Those that states of earlier versions do not have; they begin at zero.
_LATER = ("rows", "rejected")


def with_clock(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the entries of groups that those of earlier versions do not have."""
    later = dict.fromkeys(_LATER, 0)
    return {**state_dict, "param_groups": [{**later, **group} for group in state_dict["param_groups"]]}


def check_saved(optimizer: NaturalGradient, state_dict: dict[str, Any]) -> None:
    """Refuse the state of another optimizer.

    Raises:
        ValueError: If it is one.
    """
    name, expected = type(optimizer).__name__, {*optimizer.defaults, *CLOCK}.difference(_LATER)
    for k, saved in enumerate(state_dict["param_groups"]):
        missing = sorted(expected - saved.keys())
        if missing:
            raise ValueError(
                f"{name}: the state's group {k} has no {missing[0]!r}; expected what state_dict() "
                f"of {name} returned."
            )
        if k < len(optimizer.param_groups) and "lr_cov" in optimizer.defaults:
            own = optimizer.param_groups[k]["lr_cov"]
            if (saved["lr_cov"] is None) != (own is None):
                what = "a function" if own is None else repr(own)
                raise ValueError(
                    f"{name}: the state's group {k} has lr_cov={saved['lr_cov']!r} (None stands for a "
                    f"function, which is not saved), this optimizer {what}. Make the optimizer with "
                    "what the state was saved with."
                )
        if k < len(optimizer.param_groups):
            own = optimizer.param_groups[k]["structure"]
            parsed = [structures_of(name, s, optimizer.structures) for s in (saved["structure"], own)]
            if parsed[0] != parsed[1]:
                raise ValueError(
                    f"{name}: the state's group {k} has structure={saved['structure']!r}, this "
                    f"optimizer's {own!r}. Make the optimizer with that structure."
                )
    for index, state in state_dict["state"].items():
        names = {key.partition(".")[0] for key in state if "." in key}
        kind, owner = state.get("kind"), state.get("owner", optimizer.placement.rank)
        fits = bool(names) == (kind == WEIGHT) or not optimizer.placement.keeps(owner)
        if not fits and kind == WEIGHT and "owner" in state:
            raise ValueError(
                f"{name}: the state of parameter {index} has no factors. Was it saved by another "
                'process, with placement="memory"? Each process saves, and loads, a state of its '
                "own then."
            )
        if kind is None or not fits:
            raise ValueError(
                f"{name}: the state of parameter {index} has entries {sorted(state)}, which do not "
                f"fit together. Are they those of {name}? If they come from "
                "torch.distributed.checkpoint, which asks a new optimizer what there is: run one "
                "backward pass inside `with backpack(*opt.extensions())`, and a step with lr=0, "
                "before."
            )


def loaded_entry(
    factor_dtype: torch.dtype | None, value: Any, p: Tensor, key: str, entries: Mapping[str, Any]
) -> Any:
    """Return a copy of one entry of a checkpoint, in the data type that it is needed in.

    Args:
        factor_dtype: That of matrices; the parameter's, but at least float32, if None.
        value: The entry.
        p: Its parameter.
        key: Its key.
        entries: All of that parameter.

    Returns:
        The copy; None for what is to be as torch makes it.
    """
    if not isinstance(value, Tensor):
        return value
    if entries["kind"] in (FALLBACK, REFUSED):
        return None  # as torch does it
    if "." in key:
        dtype = factor_dtype or state_dtype(p)
        return value.to(p.device, dtype, copy=True)
    return loaded(value, p, key)
