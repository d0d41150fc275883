"""A layer, all of its calls joined, with the vectors that arrived at its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, nan

import torch
from torch import Tensor, nn

from backpack_ext.errors import UnsupportedError
from backpack_ext.images import Images
from backpack_ext.normal import CHUNK, OneHot, bias_per_sample, cat_inputs, per_sample
from backpack_ext.once import Once
from backpack_ext.rules.base import InputMoment, Rule
from backpack_ext.site import Site
from curvature import Axes

# Entries of inputs that are formed at once where they are formed in parts.
PART = 2**21


class Unit:
    """The normal form of one layer: ``a[g,n,s,i]`` and ``b[g,v,n,s,o]``.

    Several calls of one layer are one unit whose shared axis concatenates the calls' axes. Indices:
    g group, n datum, s shared position, i input feature, o output feature, v vector. An elementwise
    layer has one group, and i = o counts its features.

    Args:
        sites: The calls, all of the same parameters in the same roles.
        cotangents: The vectors per call, each ``[v, *output.shape]``.
        rule: The layer's rule.
        scale: ``r c``, the factor between the loss's terms and the total (1 where unknown).
    """

    __slots__ = (
        "_G", "_a", "_b", "_existing", "_mean_a", "_positions", "_sums", "cotangents", "inputs_known",
        "keeps_grads", "parameters", "rule", "scale", "sites", "vectors_known",
    )  # fmt: skip

    def __init__(
        self, sites: Sequence[Site], cotangents: Sequence[Tensor], rule: Rule, scale: float = 1.0
    ):
        self.sites, self.cotangents, self.rule, self.scale = sites, cotangents, rule, scale
        site = sites[0]
        # trainable parameters by role
        self.parameters = site.parameters if rule is site.rule else rule.parameters(site.module)
        self._a = self._b = self._existing = self._G = self._mean_a = self._positions = None
        self._sums: tuple[Tensor, Tensor] | tuple[()] | None = None  # empty: not known
        # whether several extensions will ask for `weight_grads`
        self.keeps_grads = False
        # what other extensions have formed of the same inputs, and of the same vectors too; None if
        # there are no others
        self.inputs_known: Once | None = None
        self.vectors_known: Once | None = None

    @property
    def inverse_scale(self) -> float:
        """``1 / (r c)``: the gradient carries r c, and outer products of it are to carry it once."""
        if not isfinite(self.scale):  # a scaler's overflow: the inverse, 0, would hide that
            return nan
        return 1 / self.scale if self.scale else 0.0

    @property
    def key(self) -> tuple:
        """What tells layers apart: their rule, and their parameters' roles."""
        site = self.sites[0]
        parts = tuple(site.parts.items()) if site.parts else ()
        return (
            self.rule.family or id(self.rule),
            *map(id, self.parameters.values()),
            *self.parameters,
            *parts,
        )

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

    @property
    def dtype(self) -> torch.dtype:
        """The wider data type of inputs and vectors (autocast makes them differ), at least float32.

        Squares and sums over the batch need the digits, and squares the range, of float32.
        """
        self.sites[0].check_live()
        x, g = self.sites[0].in_dtype, self.cotangents[0].dtype
        if self.rule.in_graph:  # under autocast its input was found cast already
            g = torch.promote_types(g, next(iter(self.parameters.values())).dtype)
        wide = torch.promote_types(x, g) if x.is_floating_point else g
        return torch.float32 if wide.itemsize < 4 else wide

    @property
    def a(self) -> Tensor | OneHot:
        """Inputs ``[g,n,s,i]`` (or one-hot inputs)."""
        if self._a is None:
            parts = [_with_group(_rule(site, self.rule).inputs(site), 3) for site in self.sites]
            if self._in_sharing:
                parts, self._existing = existing_inputs(self.sites, parts)
            self._a = parts[0] if len(parts) == 1 else cat_inputs(parts)
            if self.cotangents and not isinstance(self._a, OneHot):
                self._a = self._a.to(torch.promote_types(self._a.dtype, self.dtype))
        return self._a

    @property
    def kept_a(self) -> Tensor | OneHot | Images:
        """The inputs `a` to be kept; of a convolution its images where these are smaller.

        Images that the network did not compute may be the user's mini-batch, which the next one may
        overwrite: they are copied, which takes less memory than patches.
        """
        site = self.sites[0]
        if len(self.sites) == 1:
            images = _rule(site, self.rule).images(site)
            if images is not None and images.smaller:
                dtype, own = torch.promote_types(images.x.dtype, self.dtype), site.computed
                return images.mapped(lambda x: x.to(dtype, copy=not own))
        return self.a

    def input_parts(self) -> Iterator[tuple[slice, Tensor | OneHot]]:
        """Yield the inputs, of some data at a time where they are large and nobody has formed them.

        Patches of convolutions are many times as large as the input; parts of them take turns in memory.
        """
        site, rule = self.sites[0], _rule(self.sites[0], self.rule)
        if type(rule).inputs_of is Rule.inputs_of or self._a is not None or len(self.sites) > 1:
            yield slice(None), self.a
            return
        step = self._data_at_once()
        first = rule.inputs_of(site, slice(0, step)) if step < self.batch else None
        if first is not None:
            for k in range(0, self.batch, step):
                data = slice(k, k + step)
                a = _with_group(rule.inputs_of(site, data) if k else first, 3)
                yield data, a.to(torch.promote_types(a.dtype, self.dtype))
            return
        yield slice(None), self.a

    def _data_at_once(self) -> int:
        """Return for how many data inputs are formed at once; all of them in a `sharing` block."""
        if self._in_sharing:
            return self.batch
        g, _, _, s, o = self.b.shape
        features = self.parameters["weight"].numel() // max(1, g * o)
        return max(1, PART // max(1, g * s * features))

    @property
    def mean_a(self) -> Tensor | None:
        """Inputs averaged over positions, ``[g,n,i]``, where that is known without `a`; else None."""
        known = self._mean_a is not None or self._a is not None or self.only_rows
        if not known and len(self.sites) == 1 and not self._in_sharing:
            site = self.sites[0]
            means = _rule(site, self.rule).mean_inputs(site)
            if means is not None:
                dtype = self.dtype if self.cotangents else means.dtype
                means = _with_group(means, 3).to(torch.promote_types(means.dtype, dtype))
                self._mean_a = means.squeeze(2) if means.shape[2] == 1 else means.mean(2)
        return self._mean_a

    @property
    def moment_shape(self) -> tuple[int, int] | None:
        """Numbers of rows and of input features where `input_moment` may be known; else None."""
        if self._in_sharing:
            return None
        shapes = [self.rule.moment_shape(site) for site in self.sites]
        return None if None in shapes else (sum(rows for rows, _ in shapes), shapes[0][1])

    def input_moment(self, dtype: torch.dtype | None, with_sum: bool = False) -> InputMoment | None:
        """Return sums over all rows of `a`, and over all calls, where `a` is not needed; else None.

        Args:
            dtype: Data type of the sums; that of `a` if None, and never a half type.
            with_sum: Whether the sum of the rows is needed too.
        """
        if self._in_sharing:
            return None
        total, formed = None, self._a is not None
        own = self.dtype if self.cotangents else self.sites[0].input().dtype
        dtype = torch.promote_types(torch.promote_types(own, torch.float32), dtype or own)
        for site in self.sites:
            found = _rule(site, self.rule).input_moment(site, dtype, with_sum, formed)
            if found is None:
                return None
            total = found if total is None else total + found
        return total

    @property
    def _in_sharing(self) -> bool:
        """Whether a call ran in a `sharing` block."""
        for site in self.sites:  # noqa: SIM110 (a generator costs three times as much)
            if site.sharing is not None:
                return True
        return False

    @property
    def existing(self) -> Tensor | None:
        """Which positions exist, ``[n,s]``; None if all do. Where they do not, a and b are zero."""
        # found with the inputs
        return self._existing if self._in_sharing and self.a is not None else None

    def keep_rows(self, means: Tensor | None, sums: Tensor) -> None:
        """Let go of inputs and vectors; what is known from here on is a row of both per datum.

        Args:
            means: Inputs averaged over positions, ``[g,n,i]``; None if the weight is not trained.
            sums: Vectors summed over positions, ``[g,v,n,1,o]``.
        """
        self._positions = self.b.shape[3]
        self._a, self._mean_a, self._b, self.cotangents = None, means, sums, ()

    @property
    def only_rows(self) -> bool:
        """Whether `keep_rows` was called."""
        return self._positions is not None

    @property
    def positions(self) -> int:
        """Number of shared positions S."""
        if self.only_rows:
            return self._positions
        if self._a is None and self._mean_a is not None and self.cotangents:
            return self.b.shape[3]
        return self.a.shape[1] if isinstance(self.a, OneHot) else self.a.shape[2]

    @property
    def normalize(self) -> str:
        """How KFAC-reduce treats positions if some do not exist, see `backpack_ext.sharing`."""
        return next((s.sharing.normalize for s in self.sites if s.sharing is not None), "mean")

    @property
    def b(self) -> Tensor:
        """Vectors ``[g,v,n,s,o]``."""
        if self._b is None:
            calls = zip(self.sites, self.cotangents, strict=True)
            parts = [_vectors(_rule(site, self.rule), site, g) for site, g in calls]
            self._b = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)).to(self.dtype)
        return self._b

    @property
    def weight_grads(self) -> Tensor | None:
        """The per-sample vectors ``G[v,n,g,o,i]`` of the weight, formed once for all extensions.

        None where several extensions do not need them, where a layer's few positions make other ways
        cheaper, or where they are too large to be kept.
        """
        if not self.keeps_grads or self.rule.elementwise or isinstance(self.a, OneHot):
            return None
        if self._G is None:
            (g, v, n, s, o), i = self.b.shape, self.a.shape[-1]
            if s == 1 or g * v * n * o * i > CHUNK:
                return None
            self._G = per_sample(self.a, self.b)
        return self._G

    def grads(self, role: str) -> Tensor:
        """Return the per-sample vectors ``sum_s b a`` of a parameter, ``[v,n,*parameter.shape]``."""
        if self.rule.elementwise:
            sums = self._elementwise_sums()
            if sums:
                G = sums[role == "bias"]
            else:
                b = self.b[0]
                G = (b * self.a if role == "weight" else b).sum(2)
            return G.reshape(*G.shape[:2], *self.parameters[role].shape)
        G = bias_per_sample(self.b) if role == "bias" else per_sample(self.a, self.b)
        return self.placed(role, G)

    def _elementwise_sums(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """Return ``sum_s b a`` and ``sum_s b`` if the rule knows them without `a`, else nothing."""
        if self._sums is None:
            site, alone = self.sites[0], len(self.sites) == 1 and self._a is None
            known = alone and "weight" in self.parameters
            self._sums = (known and _rule(site, self.rule).sums(site, self.cotangents[0])) or ()
        return self._sums

    def placed(self, role: str, m: Tensor) -> Tensor:
        """Bring ``[...,g,o,i]`` to a parameter's shape, with zeros outside of the part used."""
        part = self.part(role)
        if part is not None:
            k, groups = part
            whole = m.new_zeros(*m.shape[:-3], groups, *m.shape[-2:])
            whole[..., k : k + 1, :, :] = m
            m = whole
        return self.axes(role).to_parameter(m)

    def part(self, role: str) -> tuple[int, int] | None:
        """Return which part of a parameter the layer is, ``(k, G)``: k of G; None for the whole."""
        return self.sites[0].parts.get(role)

    def axes(self, role: str) -> Axes:
        """Return how the axes of the (whole) parameter form the matrix of the normal form."""
        return self.rule.axes(self.module, role)


def _vectors(rule: Rule, site: Site, g: Tensor) -> Tensor:
    """Return the vectors of one call, ``[g,v,n,s,o]``, zero where no position exists."""
    b = _with_group(rule.cotangents(site, g), 4)
    existing = None if site.sharing is None else site.sharing.existing(site, b.shape[3])
    return b if existing is None else b.masked_fill(~existing.to(b.device)[:, :, None], 0)


def existing_inputs(
    sites: Sequence[Site], parts: Sequence[Tensor | OneHot]
) -> tuple[list[Tensor | OneHot], Tensor | None]:
    """Zero the inputs at positions that do not exist.

    Args:
        sites: The calls of a layer.
        parts: Their inputs ``[g,n,s,i]``, or one-hot inputs.

    Returns:
        The inputs, and which positions exist, ``[n,s]``, the calls concatenated along s; None if all.
    """
    found, masks, known = [], [], False
    for site, a in zip(sites, parts, strict=True):
        n, s = a.shape if isinstance(a, OneHot) else a.shape[1:3]
        device = a.index.device if isinstance(a, OneHot) else a.device
        existing = None if site.sharing is None else site.sharing.existing(site, s)
        mask = torch.ones(n, s, dtype=torch.bool) if existing is None else existing
        masks.append(mask.to(device))
        found.append(a if existing is None else _existing(a, masks[-1]))
        known = known or existing is not None
    return found, torch.cat(masks, dim=1) if known else None


def _existing(a: Tensor | OneHot, existing: Tensor) -> Tensor | OneHot:
    if isinstance(a, OneHot):
        if a.bags is not None:
            raise UnsupportedError(
                "sharing: an EmbeddingBag's rows are bags, of which each datum must have one in a "
                "`sharing` block. Use an Embedding and a sum, or give its path None: "
                "{'': ..., PATH: None}."
            )
        return OneHot(a.index, a.size, existing if a.mask is None else a.mask & existing)
    return a.masked_fill(~existing[:, :, None], 0)  # also what is not a number


def _rule(site: Site, rule: Rule) -> Rule:
    """Return the rule that reads a call in a layer under a rule of the same family."""
    return site.rule if rule.in_graph or (site.rule is not None and site.rule.in_graph) else rule


def _with_group(t, dims: int):
    if isinstance(t, OneHot) or t.dim() == dims + 1:
        return t
    return t.unsqueeze(0)


def stack_inputs(units: Sequence[Unit]) -> Tensor:
    """Return the dense inputs of layers of equal shape as ``[(L g),n,s,i]``."""
    return torch.cat([unit.a for unit in units])


def stack_vectors(units: Sequence[Unit]) -> Tensor:
    """Return the vectors of layers of equal shape, one call each, as ``[(L g),v,n,s,o]``."""
    L, unit = len(units), units[0]
    if not unit.cotangents or not getattr(unit.rule.cotangents, "by_shape", False):
        return torch.cat([u.b for u in units])
    g = torch.cat([u.cotangents[0] for u in units]).to(unit.dtype)
    b = _with_group(unit.rule.cotangents(unit.sites[0], g), 4)
    return b.unflatten(1, (L, len(g) // L)).transpose(0, 1).flatten(0, 1)
