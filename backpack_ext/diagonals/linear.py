"""Operations without a second derivative in any one input: moves, sums, scalings, matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack_ext.diagonals.rule import TURNED, Diagonals, Step, call, signed
from backpack_ext.errors import UnsupportedError

# Operations whose Jacobian consists of zeros and ones: J o J = J, so that h moves as gradients do.
SELECTIONS = (
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AsStridedBackward0"),
    *("TransposeBackward0", "TransposeBackward1", "PermuteBackward0", "MovedimBackward0"),
    *("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2"),
    *("SqueezeBackward3", "SqueezeBackward4"),
    *(
        "SliceBackward0",
        "SelectBackward0",
        "NarrowBackward0",
        "DiagonalBackward0",
        "UnfoldBackward0",
        "FlipBackward0",
    ),
    *("RollBackward0", "Rot90Backward0", "RepeatBackward0", "ExpandBackward0", "StackBackward0"),
    *(
        "CatBackward0",
        "IndexBackward0",
        "IndexSelectBackward0",
        "TakeBackward0",
        "MaskedSelectBackward0",
    ),
    *("IndexPutBackward0", "IndexCopyBackward0", "IndexFillBackward0", "DiagonalBackward0_copy"),
    *("ScatterBackward0", "ScatterAddBackward0", "SelectScatterBackward0", "SliceScatterBackward0"),
    *(
        "MaskedFillBackward0",
        "MaskedScatterBackward0",
        "WhereBackward0",
        "TrilBackward0",
        "TriuBackward0",
    ),
    *("ConstantPadNdBackward0", "Im2ColBackward0", "Col2ImBackward0", "SumBackward0", "SumBackward1"),
    *("CumsumBackward0", "TraceBackward0", "DiagEmbedBackward0"),
    *("PixelShuffleBackward0", "PixelUnshuffleBackward0", "ChannelShuffleBackward0"),
    *("ReflectionPad1DBackward0", "ReflectionPad2DBackward0", "ReflectionPad3DBackward0"),
    *("ReplicationPad1DBackward0", "ReplicationPad2DBackward0", "ReplicationPad3DBackward0"),
    *("UpsampleNearest1DBackward0", "UpsampleNearest2DBackward0", "UpsampleNearest3DBackward0"),
    *("UpsampleNearestExact1DBackward0", "UpsampleNearestExact2DBackward0"),
    *("UpsampleNearestExact3DBackward0", "CummaxBackward0", "CumminBackward0", "ModeBackward0"),
    *("ClampBackward0", "ClampBackward1", "ClampMinBackward0", "ClampMinBackward1"),
    *("ClampMaxBackward0", "ClampMaxBackward1", "MedianBackward0"),
    *("RepeatInterleaveBackward0", "SignBackward0", "FloorBackward0", "CeilBackward0"),
    *("RoundBackward0", "TruncBackward0", "ZerosLikeBackward0", "FillBackward0", "FillBackward1"),
)

# Those of several outputs.
SPLITS = (
    *("SplitBackward0", "SplitWithSizesBackward0", "UnsafeSplitBackward0", "UnbindBackward0"),
    *("UnsafeSplitWithSizesBackward0", "ChunkBackward0", "BroadcastTensorsBackward0", "SortBackward0"),
    *("SortBackward1", "TopkBackward0", "MaxBackward0", "MinBackward0", "MedianBackward1"),
    *("KthvalueBackward0",),
)

# Operations that leave every entry where it is, up to its sign.
IDENTITIES = (
    *(
        "CloneBackward0",
        "AliasBackward0",
        "ToCopyBackward0",
        "ContiguousBackward0",
        "LiftFreshBackward0",
    ),
    *("NegBackward0", "ViewAsBackward0", "BackwardHookFunctionBackward", "AddBackward1", "SubBackward1"),
    *("torch::autograd::CopyBackwards", "DetachBackward0", "AddBackward2", "FracBackward0"),
)

# Operations of which every input entry feeds one output entry at most, with a factor that does not
# depend on it.
MANY_TO_ONE = (
    *("MaximumBackward0", "MinimumBackward0", "FmaxBackward0", "FminBackward0", "AmaxBackward0"),
    *("AminBackward0", "MaxBackward1", "MinBackward1", "NanmeanBackward0", "NansumBackward0"),
    *("RsubBackward1", "SumToSizeBackward0", "ScatterReduceBackward0", "IndexReduceBackward0"),
    *("ProdBackward0", "ProdBackward1", "LinalgDetBackward0"),
)


def identity(step: Step) -> Diagonals:
    """Return h itself."""
    return step.h


def selection(step: Step) -> Diagonals:
    """Cross an operation whose Jacobian has zeros and ones: ``J^T h``."""
    return call(step.node, step.h)


def many_to_one(step: Step) -> Diagonals:
    """Cross an operation whose input entries feed one output entry each: ``(J^T h) (J^T 1)``."""
    moved = call(step.node, step.h)
    ones = call(step.node, [None if h is None else torch.ones_like(h) for h in step.h])
    return [None if a is None else a * b for a, b in zip(moved, ones, strict=True)]


def mean(step: Step) -> Diagonals:
    """Cross a mean over k entries: ``h / k^2``, spread."""
    (moved,), (h,) = call(step.node, step.h), step.h
    return (moved * (h.numel() / moved.numel()),)


def add(step: Step) -> Diagonals:
    """Cross ``a + alpha b``: h and ``alpha^2 h``."""
    (h,), alpha = step.h, step.node._saved_alpha
    return h, h if alpha in (1, -1) else h * alpha**2


def rsub(step: Step) -> Diagonals:
    """Cross ``b - alpha a``: ``alpha^2 h`` and h."""
    (h,), alpha = step.h, step.node._saved_alpha
    return (h if alpha in (1, -1) else h * alpha**2), h


def gather(step: Step) -> Diagonals:
    """Cross a gather: h goes where the entries came from."""
    n, (h,) = step.node, step.h
    return (h.new_zeros(n._saved_self.shape).scatter_add_(signed(n._saved_dim), n._saved_index, h),)


def index_add(step: Step) -> Diagonals:
    """Cross ``a`` to which ``alpha b`` is added in some places."""
    moved, alpha = call(step.node, step.h), step.node._saved_alpha
    return moved[0], None if moved[1] is None else moved[1] * alpha


def product(step: Step) -> Diagonals:
    """Cross ``a b``: ``b^2 h`` and ``a^2 h``."""
    (h,), b = step.h, step.saved("other")
    out: list[Tensor | None] = [b.square() * h if step.need[0] else None, None]
    if step.need[1]:
        out[1] = step.saved("self").square() * h
    return out


def scaling(step: Step) -> Diagonals:
    """Cross ``a b`` with a number b."""
    return (step.h[0] * step.node._saved_other**2,)


def quotient(step: Step) -> Diagonals:
    """Cross ``a / b``: ``h / b^2``, and ``(a / b^2)^2 h + 2 a / b^3 g``."""
    (h,), b = step.h, step.saved("other")
    out: list[Tensor | None] = [h / b.square() if step.need[0] else None, None]
    if step.need[1]:
        a, g = step.saved("self"), step.gradient
        out[1] = (a / b.square()).square() * h
        if g is not None:
            out[1] += 2 * a / b**3 * g
    return out


def unscaling(step: Step) -> Diagonals:
    """Cross ``a / b`` with a number b."""
    return (step.h[0] / step.node._saved_other**2,)


def transpose(step: Step) -> Diagonals:
    """Cross a transpose."""
    return (step.h[0].mT,)


def mm(step: Step) -> Diagonals:
    """Cross ``A B``: ``h (B o B)^T`` and ``(A o A)^T h``; one matrix or a batch of them."""
    n = step.node
    return _factors(step, step.h[0], step.need, n._saved_self, n._saved_mat2)


def addmm(step: Step) -> Diagonals:
    """Cross ``beta C + alpha A B``."""
    n, (to_C, h) = step.node, _summands(step)
    return to_C, *_factors(step, h, step.need[1:], n._saved_mat1, n._saved_mat2)


def baddbmm(step: Step) -> Diagonals:
    """Cross ``beta C + alpha A B`` of batches of matrices."""
    n, (to_C, h) = step.node, _summands(step)
    return to_C, *_factors(step, h, step.need[1:], n._saved_batch1, n._saved_batch2)


def mv(step: Step) -> Diagonals:
    """Cross ``A x``."""
    n = step.node
    return _matrix_and_vector(step, step.h[0], step.need, n._saved_self, n._saved_vec)


def addmv(step: Step) -> Diagonals:
    """Cross ``beta c + alpha A x``."""
    n, (to_c, h) = step.node, _summands(step)
    return to_c, *_matrix_and_vector(step, h, step.need[1:], n._saved_mat, n._saved_vec)


def _summands(step: Step) -> tuple[Tensor, Tensor]:
    """Return h at both summands of ``beta C + alpha P``, in the shape of the sum."""
    (h,), a, b = step.h, step.node._saved_alpha, step.node._saved_beta
    return h if b == 1 else h * b**2, h if a == 1 else h * a**2


def _factors(
    step: Step, h: Tensor, need: Sequence[bool], A: Tensor | None, B: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``h (B o B)^T`` and ``(A o A)^T h``, transposed for a transposed parameter."""
    to_A = to_B = None
    if need[0]:
        B = step.lifted(B)
        to_A = h @ (B * B).mT
        if need[0] == TURNED:
            to_A = to_A.mT
    if need[1]:
        A = step.lifted(A)
        to_B = h.mT @ (A * A)
        if need[1] != TURNED:
            to_B = to_B.mT
    return to_A, to_B


def _matrix_and_vector(
    step: Step, h: Tensor, need: Sequence[bool], A: Tensor | None, x: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``h (x o x)^T`` and ``(A o A)^T h``."""
    return (
        h[:, None] * step.lifted(x).square() if need[0] else None,
        step.lifted(A).square().T @ h if need[1] else None,
    )


def dot(step: Step) -> Diagonals:
    """Cross ``a . b``."""
    (h,), need = step.h, step.need
    b = "other" if step.node.name() == "VdotBackward0" else "tensor"
    return (
        h * step.saved(b).square() if need[0] else None,
        h * step.saved("self").square() if need[1] else None,
    )


def convolution(step: Step) -> Diagonals:
    """Cross a convolution or its transpose: its own products with ``W o W`` and ``x o x``."""
    (h,), n, need = step.h, step.node, list(step.need)
    x, w = step.saved("input"), step.saved("weight")
    sizes = n._saved_bias_sym_sizes_opt
    if need[2]:
        # summing is faster than the kernel's own bias gradient
        bias, need[2] = h.sum((0, *range(2, h.dim()))), False
    else:
        bias = None
    found = torch.ops.aten.convolution_backward(
        h,
        # the kernel reads only the shape of what it does not need
        x.square() if need[1] else x,
        w.square() if need[0] else w,
        sizes,
        *(n._saved_stride, n._saved_padding, n._saved_dilation, n._saved_transposed),
        *(n._saved_output_padding, n._saved_groups, need),
    )
    return found[0], found[1], bias


def trilinear(step: Step) -> Diagonals:
    """Cross ``sum_ij x_i W_oij y_j`` of ``nn.Bilinear``."""
    (h,), need = step.h, step.need
    x, w, y = (step.saved(f"i{k}") for k in (1, 2, 3))
    return (
        torch.einsum("no,noi->ni", h, torch.einsum("oij,nj->noi", w, y).square()) if need[0] else None,
        torch.einsum("no,ni,nj->oij", h, x.square(), y.square()) if need[1] else None,
        torch.einsum("no,noj->nj", h, torch.einsum("oij,ni->noj", w, x).square()) if need[2] else None,
    )


# `mode` of ``nn.EmbeddingBag``
_MEAN, _MAX = 1, 2


def embedding(step: Step) -> Diagonals:
    """Cross a lookup: h summed per token."""
    (h,), n = step.h, step.node
    index = n._saved_indices.flatten()
    h = h.reshape(len(index), h.shape[-1])
    padding = signed(n._saved_padding_idx)
    _check_frequencies(n)
    if padding >= 0:
        h = h.masked_fill((index == padding)[:, None], 0)
    return (h.new_zeros(n._saved_weight_sym_argsize_0, h.shape[1]).index_add_(0, index, h),)


def embedding_bag(step: Step) -> Diagonals:
    """Cross sums, means or maxima of bags of rows: h times the squared weights, summed per token."""
    n, h, need = step.node, step.h[0], step.need
    _check_frequencies(n)
    index, rows, given = n._saved_indices.flatten(), n._saved_weight_sym_argsize_0, None
    if n._saved_mode == _MAX:  # each feature picks a token
        return (h.new_zeros(rows, h.shape[1]).scatter_add_(0, n._saved_result3, h),)
    bag, kept = _bag_of_entries(n, len(index)), index != signed(n._saved_padding_idx)
    weight = kept.to(h.dtype)
    if n._saved_mode == _MEAN:
        weight = weight / h.new_zeros(len(h)).index_add_(0, bag, weight).clamp_(min=1)[bag]
    if n._saved_per_sample_weights is not None:
        given = n._saved_per_sample_weights
        weight = weight * given.flatten().to(h.dtype)
    out: list[Tensor | None] = [None] * len(need)
    if need[0]:
        # a bag may have a token several times: weights add up before they are squared
        keys, place = torch.unique(bag * rows + index, return_inverse=True)
        size = h.new_zeros(len(keys)).index_add_(0, place, weight).square_()
        spread = h[keys // rows] * size[:, None]
        out[0] = h.new_zeros(rows, h.shape[1]).index_add_(0, keys % rows, spread)
    if len(need) > 1 and need[-1]:
        table = n._saved_weight.to(h.dtype)[index]
        out[-1] = ((h[bag] * table.square()).sum(1) * kept).reshape(given.shape)
    return out


def _bag_of_entries(n, entries: int) -> Tensor:
    """Return which bag each entry belongs to."""
    offsets = n._saved_offsets
    bags = n._input_metadata[0].shape[0]
    position = torch.arange(entries, device=offsets.device, dtype=offsets.dtype)
    return (torch.searchsorted(offsets, position, right=True) - 1).clamp_(max=bags - 1)


def _check_frequencies(n) -> None:
    if n._saved_scale_grad_by_freq:
        raise UnsupportedError(
            f"{n.name()}: scale_grad_by_freq=True makes the gradient differ from the loss's "
            "derivative, so no curvature belongs to it. Set it to False."
        )
