"""Vectors with any batch axes, as the rows that factors take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.block import Block, Parts, check_vectors, result_dtype

# Batch axes, and the data type of the result.
Layout = tuple[torch.Size, torch.dtype]


def as_rows(block: Block, name: str, vectors: Sequence[Tensor]) -> tuple[list[Tensor], Layout]:
    """Return vectors ``[..., *shape]`` as ``[k, *shape]``, in the wider of the two data types.

    Args:
        block: What they are multiplied with.
        name: Of the product, for messages.
        vectors: One per parameter.

    Raises:
        ValueError: If they are not shaped like the parameters.
        TypeError: If one is no tensor.
    """
    check_vectors(name, vectors, block.shapes)
    dtype = block.dtype
    for t in vectors:
        dtype = torch.promote_types(dtype, t.dtype)
    lead = vectors[0].shape[: vectors[0].dim() - len(block.shapes[0])]
    # the number of vectors is spelt out: -1 is ambiguous for a parameter without entries
    rows = [t.to(dtype).reshape(lead.numel(), *s) for t, s in zip(vectors, block.shapes, strict=True)]
    return rows, (lead, result_dtype(vectors[0], dtype))


def from_rows(rows: Sequence[Tensor], layout: Layout) -> Parts:
    """Return rows ``[k, *shape]`` with the batch axes and data type that `as_rows` found."""
    lead, dtype = layout
    found = tuple(t.reshape((*lead, *t.shape[1:])).to(dtype) for t in rows)
    return found[0] if len(found) == 1 else found
