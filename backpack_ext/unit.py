"""A layer, all of its calls joined, with the vectors that arrived at its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from backpack_ext.normal import OneHot, cat_inputs
from backpack_ext.rules.base import Rule
from backpack_ext.site import Site
from curvature import Axes


@dataclass(eq=False)
class Unit:
    """The normal form of one layer: ``a[g,n,s,i]`` and ``b[g,v,n,s,o]``.

    Several calls of one layer are one unit whose shared axis concatenates the calls' axes. Indices:
    g group, n datum, s shared position, i input feature, o output feature, v vector.

    Args:
        sites: The calls, all of the same parameters in the same roles.
        cotangents: The vectors per call, each ``[v, *output.shape]``.
        rule: The layer's rule.
        first: Whether no earlier chunk of columns of this pass has visited these calls.
    """

    sites: Sequence[Site]
    cotangents: Sequence[Tensor]
    rule: Rule
    first: bool = True

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by role."""
        return self.sites[0].parameters

    @property
    def module(self) -> nn.Module:
        """The module of the first call."""
        return self.sites[0].module

    @property
    def batch(self) -> int:
        """Number of data N."""
        return self.sites[0].batch

    @property
    def groups(self) -> int:
        """Number of groups g."""
        return self.rule.groups(self.module)

    @cached_property
    def a(self) -> Tensor | OneHot:
        """Inputs ``[g,n,s,i]`` (or one-hot inputs)."""
        return join_inputs(self.sites, self.rule)

    @cached_property
    def b(self) -> Tensor:
        """Vectors ``[g,v,n,s,o]``."""
        parts = [
            _with_group(self.rule.cotangents(s, g), 4)
            for s, g in zip(self.sites, self.cotangents, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    def axes(self, role: str) -> Axes:
        """Return how a parameter's axes form the matrix of the normal form."""
        return self.rule.axes(self.module, role)


def join_inputs(sites: Sequence[Site], rule: Rule) -> Tensor | OneHot:
    """Return the inputs of all calls, ``[g,n,s,i]``, the calls concatenated along s."""
    parts = [_with_group(rule.inputs(site), 3) for site in sites]
    return parts[0] if len(parts) == 1 else cat_inputs(parts)


def _with_group(t, dims: int):
    if isinstance(t, OneHot) or t.dim() == dims + 1:
        return t
    return t.unsqueeze(0)
