"""Rules bring each layer family to one normal form; this is the whole table."""

from torch import nn

from backpack_ext.rules.affine import (
    BilinearRule,
    ConvRule,
    ConvTransposeRule,
    EmbeddingRule,
    LinearRule,
)
from backpack_ext.rules.base import RULES, Rule, find_rule, register_rule
from backpack_ext.rules.elementwise import (
    BatchNormRule,
    ElementwiseRule,
    GroupNormRule,
    InstanceNormRule,
    LayerNormRule,
    RMSNormRule,
)

__all__ = [
    "RULES",
    "BatchNormRule",
    "BilinearRule",
    "ConvRule",
    "ConvTransposeRule",
    "ElementwiseRule",
    "EmbeddingRule",
    "GroupNormRule",
    "InstanceNormRule",
    "LayerNormRule",
    "LinearRule",
    "RMSNormRule",
    "Rule",
    "find_rule",
    "register_rule",
]

_embedding = EmbeddingRule()
RULES.update(
    {
        nn.Linear: LinearRule(),
        nn.Bilinear: BilinearRule(),
        nn.Conv1d: ConvRule(1),
        nn.Conv2d: ConvRule(2),
        nn.Conv3d: ConvRule(3),
        nn.ConvTranspose1d: ConvTransposeRule(1),
        nn.ConvTranspose2d: ConvTransposeRule(2),
        nn.ConvTranspose3d: ConvTransposeRule(3),
        nn.Embedding: _embedding,
        nn.EmbeddingBag: _embedding,
        nn.LayerNorm: LayerNormRule(),
        nn.RMSNorm: RMSNormRule(),
        nn.GroupNorm: GroupNormRule(),
        nn.BatchNorm1d: BatchNormRule(),
        nn.BatchNorm2d: BatchNormRule(),
        nn.BatchNorm3d: BatchNormRule(),
        nn.InstanceNorm1d: InstanceNormRule(),
        nn.InstanceNorm2d: InstanceNormRule(),
        nn.InstanceNorm3d: InstanceNormRule(),
    }
)
