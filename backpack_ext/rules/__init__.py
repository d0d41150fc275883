"""Rules bring each layer family to one normal form; this is the whole table."""

from torch import nn

from backpack_ext.rules.affine import ConvRule, ConvTransposeRule, EmbeddingRule, LinearRule
from backpack_ext.rules.base import RULES, Rule, find_rule, register_rule

__all__ = [
    "RULES",
    "ConvRule",
    "ConvTransposeRule",
    "EmbeddingRule",
    "LinearRule",
    "Rule",
    "find_rule",
    "register_rule",
]

RULES.update(
    {
        nn.Linear: LinearRule(),
        nn.Conv1d: ConvRule(1),
        nn.Conv2d: ConvRule(2),
        nn.Conv3d: ConvRule(3),
        nn.ConvTranspose1d: ConvTransposeRule(1),
        nn.ConvTranspose2d: ConvTransposeRule(2),
        nn.ConvTranspose3d: ConvTransposeRule(3),
        nn.Embedding: EmbeddingRule(),
    }
)
