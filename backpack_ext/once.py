"""What several extensions of one backward pass ask for is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

from curvature import Root


class Once:
    """Tensors by what they are; each asker has memory of its own.

    Who asks first has the tensor itself, later ones a copy, which costs little beside a product: what
    a user does to one extension's results leaves the other's alone.

    Example:
        >>> import torch
        >>> known = Once()
        >>> x = torch.ones(5, 2)
        >>> first, again = (known("x^T x", lambda: (x.T @ x,))[0] for _ in range(2))
        >>> torch.equal(first, again) and first.data_ptr() != again.data_ptr()
        True
    """

    __slots__ = ("_found",)

    def __init__(self):
        self._found: dict[Hashable, tuple] = {}

    def __call__(self, key: Hashable, form: Callable[[], tuple]) -> tuple:
        """Return what is known by a key, formed by the first who asks.

        Args:
            key: What it is: equal keys stand for equal tensors.
            form: Returns a tuple of tensors and of what else belongs to them.
        """
        return self.each([key], lambda _: [form()])[0]

    def each(
        self, keys: Sequence[Hashable], form: Callable[[list[int]], Sequence[tuple]]
    ) -> list[tuple]:
        """Return what is known by several keys.

        Args:
            keys: What they are.
            form: Given the places of those keys that nothing is known by, returns a tuple for each.
        """
        new = [k for k, key in enumerate(keys) if key not in self._found]
        if new:
            self._found.update(zip((keys[k] for k in new), form(new), strict=True))
        entries = [self._found[key] for key in keys]
        return [entry if k in new else _copy(entry) for k, entry in enumerate(entries)]


def _copy(entry: tuple) -> tuple:
    return tuple(t.clone() if isinstance(t, (Tensor, Root)) else t for t in entry)
