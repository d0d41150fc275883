"""Hessian diagonals cross operations of the graph; this is the whole table of their rules."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from backpack_ext.diagonals import attention, linear, norms, pooling, softmax, upsampling
from backpack_ext.diagonals.composite import ENDS
from backpack_ext.diagonals.pointwise import (
    ACTIVATIONS,
    BY_AUTOGRAD,
    KINKS,
    PIECEWISE_LINEAR,
    glu,
    kink,
    pointwise,
    prelu,
    register_activation,
    tanh,
)
from backpack_ext.diagonals.rule import (
    RULES,
    DiagonalRule,
    Diagonals,
    Step,
    register_diagonal_rule,
)
from backpack_ext.diagonals.unknown import twice

__all__ = [
    "ACTIVATIONS",
    "RULES",
    "DiagonalRule",
    "Step",
    "register_activation",
    "register_diagonal_rule",
]


def _all(names: Iterable[str], cross: Callable[[Step], Diagonals], **options: bool) -> None:
    rule = DiagonalRule(cross, **options)
    RULES.update((name, rule) for name in names)


RULES.update((name, pointwise(f, True)) for name, f in ACTIVATIONS.items())
RULES.update((name, pointwise(f, False)) for name, f in PIECEWISE_LINEAR.items())
RULES.update((name, kink(PIECEWISE_LINEAR[name])) for name in KINKS)
_all(linear.SELECTIONS, linear.selection)
_all(linear.SPLITS, linear.selection, several=True)
_all(("NativeDropoutBackward0",), linear.many_to_one, several=True)
_all(linear.IDENTITIES, linear.identity)
# what DistributedDataParallel puts behind a model
_all(("_DDPSinkBackward",), linear.identity, several=True)
_all(linear.MANY_TO_ONE, linear.many_to_one)
_all(("AminmaxBackward0",), linear.many_to_one, several=True)
_all(upsampling.INTERPOLATIONS, upsampling.interpolation, shaped=True)
# in-place operations on views: autograd's own derivatives, exact where they are elementwise
_all((*BY_AUTOGRAD, "torch::autograd::CopySlices"), twice, curved=True)
RULES.update(
    {
        "TanhBackward0": DiagonalRule(tanh, True, shaped=True),
        "PreluKernelBackward0": DiagonalRule(prelu),
        "GluBackward0": DiagonalRule(glu, True),
        "MeanBackward0": DiagonalRule(linear.mean),
        "MeanBackward1": DiagonalRule(linear.mean),
        "AddBackward0": DiagonalRule(linear.add, adds=True),
        "SubBackward0": DiagonalRule(linear.add, adds=True),
        "RsubBackward0": DiagonalRule(linear.rsub),
        "MulBackward0": DiagonalRule(linear.product),
        "MulBackward1": DiagonalRule(linear.scaling),
        "DivBackward0": DiagonalRule(linear.quotient, lambda need: need[1]),
        "DivBackward1": DiagonalRule(linear.unscaling),
        "MmBackward0": DiagonalRule(linear.mm, turns=True, shaped=True),
        "BmmBackward0": DiagonalRule(linear.mm, shaped=True),
        "AddmmBackward0": DiagonalRule(linear.addmm, turns=True, shaped=True),
        "BaddbmmBackward0": DiagonalRule(linear.baddbmm),
        "TBackward0": DiagonalRule(linear.transpose),
        "MvBackward0": DiagonalRule(linear.mv),
        "AddmvBackward0": DiagonalRule(linear.addmv),
        "DotBackward0": DiagonalRule(linear.dot),
        "VdotBackward0": DiagonalRule(linear.dot),
        "ConvolutionBackward0": DiagonalRule(linear.convolution, shaped=True),
        "TrilinearBackward0": DiagonalRule(linear.trilinear),
        "EmbeddingBackward0": DiagonalRule(linear.embedding),
        "EmbeddingBagBackward0": DiagonalRule(linear.embedding_bag),
        "GatherBackward0": DiagonalRule(linear.gather),
        "IndexAddBackward0": DiagonalRule(linear.index_add),
        "AvgPool2DBackward0": DiagonalRule(pooling.average),
        "AvgPool3DBackward0": DiagonalRule(pooling.average),
        "AdaptiveAvgPool2DBackward0": DiagonalRule(pooling.average),
        "AdaptiveAvgPool3DBackward0": DiagonalRule(pooling.average),
        "MaxPool2DWithIndicesBackward0": DiagonalRule(pooling.maximum),
        "MaxPool3DWithIndicesBackward0": DiagonalRule(pooling.maximum),
        "AdaptiveMaxPool2DBackward0": DiagonalRule(pooling.maximum),
        "AdaptiveMaxPool3DBackward0": DiagonalRule(pooling.maximum),
        "FractionalMaxPool2DBackward0": DiagonalRule(pooling.maximum),
        "FractionalMaxPool3DBackward0": DiagonalRule(pooling.maximum),
        "NativeLayerNormBackward0": DiagonalRule(norms.layer_norm, True),
        "NativeGroupNormBackward0": DiagonalRule(norms.group_norm, True),
        "FusedRmsNormBackward0": DiagonalRule(norms.rms_norm, True),
        "NativeBatchNormBackward0": DiagonalRule(norms.batch_norm, True),
        "CudnnBatchNormBackward0": DiagonalRule(norms.batch_norm, True),
        "LinalgVectorNormBackward0": DiagonalRule(norms.vector_norm, True),
        "NormBackward0": DiagonalRule(norms.vector_norm, True),
        "NormBackward1": DiagonalRule(norms.vector_norm, True),
        "WeightNormInterfaceBackward0": DiagonalRule(norms.weight_norm, True),
        "VarBackward0": DiagonalRule(norms.variance, True),
        "StdBackward0": DiagonalRule(norms.deviation, True),
        "VarMeanBackward0": DiagonalRule(norms.variance, True, several=True),
        "StdMeanBackward0": DiagonalRule(norms.deviation, True, several=True),
        "SoftmaxBackward0": DiagonalRule(softmax.softmax, True),
        "SafeSoftmaxBackward0": DiagonalRule(softmax.softmax, True),
        "LogSoftmaxBackward0": DiagonalRule(softmax.log_softmax, True),
        "LogsumexpBackward0": DiagonalRule(softmax.logsumexp, True),
        "ScaledDotProductFlashAttentionForCpuBackward0": DiagonalRule(attention.fused, True),
        "ScaledDotProductFlashAttentionBackward0": DiagonalRule(attention.fused, True),
        "ScaledDotProductEfficientAttentionBackward0": DiagonalRule(attention.fused, True),
        "ScaledDotProductCudnnAttentionBackward0": DiagonalRule(attention.fused, True),
    }
)

# Where compositions may end: see `backpack_ext.diagonals.composite`.
RULES.update((name, replace(RULES[name], joins=2)) for name in ENDS)
RULES.update((name, replace(RULES[name], joins=1)) for name in attention.PRODUCTS)
