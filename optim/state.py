"""In which precision optimizers keep their state, also through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def state_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of averages that belong to a parameter: its own, but at least float32.

    A moving average with beta = 0.999 grows by a thousandth of what is missing. In bfloat16, whose
    neighbours are 1/128 apart, it would stand still.
    """
    return torch.promote_types(p.dtype, torch.float32)


def loaded(value: Any, p: Tensor, key: str) -> Any:
    """Return a copy of one entry of a checkpoint, where and in the dtype in which ``p`` needs it."""
    if not isinstance(value, Tensor):
        return value
    if key == "step":  # a number, on the CPU, as in torch.optim
        return value.to("cpu", copy=True)
    return value.to(p.device, state_dtype(p), copy=True)


@contextmanager
def exact_loading(
    optimizer: Optimizer, load: Callable[[Any, Tensor, str, Mapping[str, Any]], Any] | None = None
) -> Iterator[None]:
    """Make ``Optimizer.load_state_dict``, called inside the block, keep the state's precision.

    Torch casts the state to the dtype of the parameter and shares the step counter with the
    dictionary that it reads. Here the state is `loaded` once more from what all of the user's hooks
    have made of that dictionary, and before any of them sees the result.

    Args:
        optimizer: The optimizer.
        load: Returns an entry as it shall be, from the saved value, its parameter, its key, and all
            entries of that parameter; None for what torch made of it. By default `loaded`.
    """
    dictionaries: list[dict] = []

    def read(_, dictionary: dict) -> None:
        dictionaries.append(dictionary)

    def restore(_) -> None:
        (dictionary,) = dictionaries
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        indices = chain.from_iterable(group["params"] for group in dictionary["param_groups"])
        for index, p in zip(indices, params, strict=True):
            entries = dictionary["state"].get(index, {})
            for key, value in entries.items():
                new = loaded(value, p, key) if load is None else load(value, p, key, entries)
                if new is None:
                    new = optimizer.state[p][key]
                    new = new.clone() if isinstance(new, Tensor) else new
                optimizer.state[p][key] = new

    handles = [
        optimizer.register_load_state_dict_pre_hook(read),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_device_and_dtype(params: list[Tensor], *others: list) -> list[tuple[list, ...]]:
    """Sort parameters, and lists that run along with them, by the parameters' devices and dtypes.

    Args:
        params: The parameters.
        others: Lists of the same length.

    Returns:
        For each device and dtype a tuple like ``(params, *others)``.
    """
    groups: dict[tuple, tuple[list, ...]] = {}
    for entry in zip(params, *others, strict=True):
        key = (entry[0].device, entry[0].dtype)
        for column, value in zip(groups.setdefault(key, tuple([] for _ in entry)), entry, strict=True):
            column.append(value)
    return list(groups.values())
