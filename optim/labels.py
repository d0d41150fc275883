"""What to call parameters in messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor


def called(k: int, group: Mapping, i: int) -> str:
    """Return what to call parameter i of group k: its name, or its place and shape."""
    names = group.get("param_names")
    return repr(names[i]) if names else f"{i} of group {k}, of shape {tuple(group['params'][i].shape)},"


def labels(groups: Iterable[Mapping]) -> dict[Tensor, str]:
    """Return what to call each parameter of an optimizer's groups."""
    return {
        p: called(k, group, i) for k, group in enumerate(groups) for i, p in enumerate(group["params"])
    }
