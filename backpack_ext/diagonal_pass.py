"""Hessian diagonals in a backward pass: one recursion per extension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.diagonals.recursion import Recursion
from backpack_ext.diagonals.unknown import complex_numbers
from backpack_ext.errors import RecordingError
from backpack_ext.hesscale import DiagonalHessian
from backpack_ext.loss_call import KnownDiagonal, LossCall
from backpack_ext.per_datum import PerDatum
from backpack_ext.products import RESHAPES
from backpack_ext.quiet import Quiet


class DiagonalPass:
    """The recursion of one extension in one backward pass.

    Args:
        ext: The extension.
        keep: Whether the graph outlives the pass.
        quiet: Makes contexts without gradients and autocast.
        per_datum: Takes h at the outputs of layers; None if sums over the batch are wanted.
    """

    def __init__(
        self, ext: DiagonalHessian, keep: bool, quiet: Quiet, per_datum: PerDatum | None = None
    ):
        self.ext, self.per_datum = ext, per_datum
        observe = None if per_datum is None else per_datum.observe
        self.recursion = Recursion(ext, observe, keep, quiet)

    def start(self, call: LossCall | KnownDiagonal, factor: float | Tensor) -> None:
        """Begin at a loss that enters the total with a factor, its reduction included."""
        ext, seeds = self.ext, call.diagonals(self.ext.layerwise)
        if not (isinstance(factor, float) and factor == 1):
            seeds = [(edge, h * factor) for edge, h in seeds]
        if ext.exact_penultimate:
            seeds += self._penultimate(call, factor)
        if self.per_datum is not None:
            self.per_datum.prepare(self.recursion)
        self.recursion.start(seeds)

    def _penultimate(
        self, call: LossCall | KnownDiagonal, factor: float | Tensor
    ) -> list[tuple[GradientEdge, Tensor]]:
        """Return what the recursion misses at the input of the last layer, in addition to the seeds."""
        if isinstance(call, KnownDiagonal) or call.other_edges:
            raise _no_last_layer(call.label, "its Hessian is known on the diagonal only")
        if call.rule.is_diagonal:
            return []  # the rule of the layer is exact then
        found = _last_layer(call.start)
        if found is None:
            raise _no_last_layer(call.label, "its input is not the output of a linear layer")
        node, entry, W = found
        if call.z.dim() != 2:
            raise _no_last_layer(call.label, f"its input has shape {tuple(call.z.shape)}, not [N, C]")
        before, output = node.next_functions[entry]
        if before is None:
            return []
        ((_, h),), W = call.diagonals(), W.mT
        missing = call.penultimate(W) - h @ W.to(h.dtype).square()
        return [(GradientEdge(before, output), missing * factor)]

    def finish(self, multiplier: float) -> dict:
        """Return the parameters' diagonals, or what the extension made of those of each datum."""
        self.recursion.end()
        if self.per_datum is not None:
            return self.per_datum.finish(self.ext, multiplier)
        results = self.recursion.results
        if not results:
            return results
        parameters, hs = zip(*results.values(), strict=True)
        if any(dtype.is_complex for dtype in {t.dtype for t in (*parameters, *hs)}):
            p = next(p for p, h in results.values() if p.is_complex() or h.is_complex())
            raise complex_numbers(f"what a parameter of shape {tuple(p.shape)} is used for")
        # two parameters that are added up share what arrives at the sum
        if len(set(map(Tensor.data_ptr, hs))) < len(hs) or not all(map(Tensor.is_contiguous, hs)):
            hs = _apart(hs)
        if multiplier != 1:
            hs = [h / multiplier for h in hs]
        return dict(zip(results, zip(parameters, hs, strict=True), strict=True))


def _apart(hs: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous tensors, each with memory of its own."""
    seen: set[int] = set()
    out = []
    for h in hs:
        if h.data_ptr() in seen or not h.is_contiguous():
            h = h.clone(memory_format=torch.contiguous_format)
        seen.add(h.data_ptr())
        out.append(h)
    return out


def _last_layer(edge: GradientEdge) -> tuple[Node, int, Tensor] | None:
    """Return the product that ends at an edge, which input of it is the data, and its right factor."""
    node = edge.node
    while node.name() in (*RESHAPES, "BackwardHookFunctionBackward"):
        node = node.next_functions[0][0]
    if node.name() == "AddmmBackward0" and node._saved_alpha == 1:
        found = node, 1, node._saved_mat2
    elif node.name() == "MmBackward0":
        found = node, 0, node._saved_mat2
    else:
        return None
    return None if found[2] is None else found


def _no_last_layer(label: str, why: str) -> RecordingError:
    return RecordingError(
        f"{label}: exact_penultimate=True wants a cross-entropy on the output of a last linear layer, "
        f"but {why}. Leave it out."
    )
