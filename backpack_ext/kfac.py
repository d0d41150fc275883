r"""Kronecker factors of affine layers with weight sharing: KFAC-expand and KFAC-reduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from math import inf

import torch
from torch import Tensor, nn

from backpack_ext.elementwise_block import ElementwiseLayer
from backpack_ext.errors import UnsupportedError
from backpack_ext.extension import Extension, Vectors, check_samples
from backpack_ext.factor_rows import APPROX, FactorRows, append_row
from backpack_ext.groups import Groups
from backpack_ext.normal import by_datum_pays, gram, gram_by_datum
from backpack_ext.rules.base import InputMoment
from backpack_ext.share import Part, Share
from backpack_ext.site import Site
from backpack_ext.unit import Unit, stack_vectors
from curvature import BIAS, MATRIX, Axes, Block, Kronecker, KroneckerSum, Root
from curvature.root import added, dense, scaled

FISHER = ("exact", "mc", "empirical", "forward")
BIASES = ("joint", "separate")
OVERSIZE = ("raise", "diagonal")
NORM = ("dense", "diagonal")
KEEP = ("root", "factor")


class KFAC(Extension):
    r"""Kronecker-factored approximation :math:`B \otimes A` of the (generalised) Gauss-Newton.

    With inputs ``a[n,s,i]``, vectors ``b[v,n,s,o]`` at the layer's outputs, N data and S shared
    positions (tokens, pixels, several calls of the layer):

    ======== ============================================ ==================================
    approx   A                                            B
    ======== ============================================ ==================================
    expand   ``1/(N S) sum_ns a a^T``                     ``sum_nsv b b^T``
    reduce   ``1/N sum_n abar abar^T``, abar = mean_s a   ``sum_nv bhat bhat^T``, bhat = sum_s b
    ======== ============================================ ==================================

    The block of the loss *as written*, reduction included: for a mean loss B carries its factor. S
    is 1 for plain layers, where the two agree. Each result is a `curvature.Kronecker`, which
    unpacks as ``B, A``; a parameter used in two roles (an embedding tied to an output head), or with
    two biases, gets a `curvature.KroneckerSum`, without cross terms. An embedding's A is diagonal,
    also in reduce and for bags of tokens, where that drops the off-diagonal entries of ``a a^T``.

    Weights that no rule covers but that enter matrix products with the data (of attention, recurrent
    modules, functional calls) are layers too. A weight whose rows several products share is
    block-diagonal over these: attention's ``in_proj_weight`` has three groups, ``B[3,o,o]`` and
    ``A[3,i,i]``.

    Objects share memory: a bias's B is its weight's, and factors of small layers are parts of one
    tensor. Change them out of place, or `clone` them.

    Where data differ in their numbers of positions, see `sharing`.

    Scale and shift of a norm have no Kronecker structure. Each has its own exact block
    ``sum_vn G G^T`` of per-sample vectors, a `curvature.DenseBlock`, or its diagonal, a
    `curvature.DiagonalBlock`; whatever ``approx`` and ``bias`` say.

    Args:
        approx: ``"expand"`` or ``"reduce"``.
        fisher: Vectors that are backpropagated: ``"exact"`` (all columns of the loss-Hessian
            root), ``"mc"`` (samples of the model's predictive distribution), ``"empirical"`` (the
            gradient itself; no extra pass), ``"forward"`` (none: B is the identity, a diagonal).
        mc_samples: Number of samples for ``"mc"``.
        bias: ``"joint"``: A has a last row and column for the bias (in reduce appended after the
            mean), and the weight's object, to which the bias refers too, acts on ``[W | bias]``.
            ``"separate"``: the bias has the block B of its own, ``A = [[1]]``.
        generator: Random generator for ``"mc"``; a private one by default.
        dtype: Data type of the factors; float32 or the network's own if that is wider by default.
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
        max_columns: ``fisher="exact"`` refuses beyond that many columns per datum.
        max_dim: Largest dense factor dimension.
        oversize: Beyond ``max_dim``: ``"raise"``, or keep only the ``"diagonal"`` of the factor.
        norm: Blocks of norms: ``"dense"`` or ``"diagonal"``.
        keep: ``"root"``: a factor that is the second moment of fewer rows than its dimension (data in
            reduce, data times positions in expand; for B times vectors) is kept as these rows, a
            `curvature.Root`, and formed when it is first asked for: by ``block.A``, ``block.B`` or
            unpacking. Batches of a data set add rows, until the factor is no larger; over processes
            (``process_group``) factors are formed. ``"factor"``: all factors are formed at once.

    Raises:
        ValueError: If an option is none of those listed.

    References:
        Martens & Grosse (2015), Optimizing neural networks with Kronecker-factored approximate
        curvature. Eschenhagen et al. (2023), Kronecker-factored approximate curvature for modern
        neural network architectures (expand and reduce; their eq. 15 and 22).

    Example:
        >>> import torch
        >>> from backpack_ext import KFAC, backpack, extend
        >>> model, loss_fn = extend(nn.Linear(2, 1)), extend(nn.MSELoss(reduction="sum"))
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> with backpack(KFAC(fisher="exact")):
        ...     loss_fn(model(X), torch.zeros(2, 1)).backward()
        >>> B, A = model.weight.kfac
        >>> torch.allclose(torch.kron(B, A), 2 * X.T @ X)  # the Hessian of least squares
        True
    """

    gathers = False

    def __init__(
        self,
        approx: str = "expand",
        fisher: str = "mc",
        mc_samples: int = 1,
        bias: str = "separate",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        savefield: str = "kfac",
        unsupported: str = "raise",
        max_columns: int = 1000,
        max_dim: int = 16384,
        oversize: str = "raise",
        norm: str = "dense",
        keep: str = "root",
    ):
        for name, value, allowed in (
            ("approx", approx, APPROX),
            ("fisher", fisher, FISHER),
            ("bias", bias, BIASES),
            ("oversize", oversize, OVERSIZE),
            ("norm", norm, NORM),
            ("keep", keep, KEEP),
        ):
            if value not in allowed:
                raise ValueError(f"KFAC: {name}={value!r}; expected one of {allowed}.")
        check_samples("KFAC", mc_samples)
        super().__init__(savefield, unsupported, generator)
        self.approx, self.fisher, self.bias = approx, fisher, bias
        self.dtype, self.max_columns = dtype, max_columns
        self.rows = FactorRows(approx, dtype)
        self.max_dim, self.oversize, self.norm, self.keep = max_dim, oversize, norm, keep
        kinds = {"empirical": "gradient", "forward": "none"}
        self.vectors = Vectors(kinds.get(fisher, fisher), mc_samples)
        # one column for all data mixes them where a layer couples them; independent samples do not
        self.needs_independent_samples = fisher == "exact"

    @property
    def needs_scale(self) -> bool:
        """The gradient of a loss carries r c; outer products of it are to carry it once."""
        return self.fisher == "empirical"

    def absorb(self, store: dict, unit: Unit) -> None:
        """Add ``sum b b^T`` of one layer, and form A unless an earlier chunk has."""
        if unit.rule.elementwise:
            self._absorb_elementwise(store, unit)
            return
        layer = store.get(unit.key)
        if layer is None:
            layer = store[unit.key] = _Layer(unit)
            self._check_joint(unit)
        if self.fisher != "forward":
            divisors = self._divisors(layer, unit)
            layer.add_B(*self._B([unit], divisors))
            if divisors is not None and "bias" in unit.parameters and not self.joins(unit.parameters):
                # the exact block of a bias alone, whose inputs are known to be ones
                layer.add_bias_B(*self._B([unit]))
        if layer.is_new(unit) and "weight" in layer.parameters:
            if unit.sites[0].shared and not unit.only_rows:
                # calls may arrive from several losses: the inputs are joined at the end
                layer.later, layer.known = True, unit.inputs_known
            else:
                self._add_inputs(layer, unit)

    def _check_joint(self, unit: Unit) -> None:
        """Raise if weight and bias are to be joined but do not belong to each other alone."""
        if not self.joins(unit.parameters):
            return
        site = unit.sites[0]
        weight, bias = (site.uses_of(role, p) for role, p in unit.parameters.items())
        if weight > bias:
            raise UnsupportedError(
                f'KFAC: bias="joint" for {site.label}, whose weight another layer uses without '
                'this bias. Use bias="separate" for tied weights.'
            )
        if unit.part("weight") != unit.part("bias"):
            raise UnsupportedError(
                f'KFAC: bias="joint" for {site.label}, whose bias is one parameter for several '
                'weights (attention with kdim or vdim?). Use bias="separate".'
            )

    def _absorb_elementwise(self, store: dict, unit: Unit) -> None:
        layer = store.get(unit.key)
        if layer is None:
            layer = store[unit.key] = ElementwiseLayer(unit)
            dim = max(p.numel() for p in unit.parameters.values())
            layer.dense = self.norm == "dense" and self._fits(dim, "block", unit)
        for role, p in unit.parameters.items():
            if self.fisher != "forward":
                layer.add(role, self.rows.cast(unit.grads(role)), self.b_factor(unit))
            elif role not in layer.means:
                a = self.rows.inputs(unit.a, unit)[0]
                a = a if role == "weight" else self.rows.constants(a, unit)[:, None].expand_as(a)
                layer.add_inputs(role, a.reshape(len(a), *p.shape))

    def bring_to_rows(self, unit: Unit) -> bool:
        """Reduce a layer to the rows that KFAC-reduce forms its factors of."""
        # a subclass may form something else
        if type(self) is not KFAC or unit.rule.elementwise or self.fisher == "forward":
            return False
        return self.rows.keep(unit)

    def absorb_all(self, store: dict, units: list[Unit]) -> None:
        """Form the factors of layers of equal shape in single products."""
        unit = units[0]
        alone = len(units) == 1 or unit.sites[0].shared or unit.rule.elementwise
        alone = alone or "weight" not in unit.parameters or self.fisher == "forward"
        if alone or self.rows.is_one_hot(unit):
            super().absorb_all(store, units)
            return
        layers = [store.get(u.key) or store.setdefault(u.key, _Layer(u)) for u in units]
        for layer, part in zip(layers, self._B(units), strict=True):
            layer.add_B(part)
        new = [(layer, u) for layer, u in zip(layers, units, strict=True) if layer.is_new(u)]
        if new:
            for (layer, _), found in zip(new, self._A([u for _, u in new]), strict=True):
                layer.add_A(*found[:3])
                layer.normalize = found[3]

    def _add_inputs(self, layer: _Layer, unit: Unit) -> None:
        """Form A of one layer, and the mean input if the bias is joined."""
        ((A, last, rows, layer.normalize),) = self._A([unit])
        layer.add_A(A, last, rows)

    def _A(self, units: list[Unit]) -> list[tuple[Tensor, Tensor | None, int, str | None]]:
        """Return A of layers of equal shape, its last row, how many rows it averages, and which way.

        Vectors play no part in it: what another extension of the pass has formed serves this one.
        """
        known = units[0].inputs_known
        if known is None or type(self) is not KFAC:  # a subclass may form something else
            return self._new_A(units)
        dtype = units[0].dtype if units[0].cotangents else None
        keys = [(frozenset(u.sites), u.rule, dtype, *self._kind(u)) for u in units]
        return known.each(keys, lambda new: self._new_A([units[k] for k in new]))

    def _new_A(self, units: list[Unit]) -> list[tuple[Tensor | Root, Tensor | None, int, str | None]]:
        unit = units[0]
        if len(units) == 1 and self.rows.is_one_hot(unit):
            A, rows = self.rows.one_hot_moment(unit, self.rows.dtype_of(unit.module.weight))
            return [(A, None, rows, self.rows.normalize(unit))]
        sums = self._sums(units)
        if sums is not None:
            means = [tuple(t if t is None else self.rows.cast(t) for t in part.means()) for part in sums]
            return [(*m, part.rows, None) for m, part in zip(means, sums, strict=True)]
        a = self.rows.inputs_of(units)
        rows, normalize = a.shape[1], self.rows.normalize(unit)
        if self._keeps_root(a, unit, "A"):
            return [(*self._root(part, unit), rows, normalize) for part in a.split(unit.groups)]
        A = self._second_moment(a, unit, "A", 1 / max(1, rows)).split(unit.groups)
        last = self._last_row(a, unit)
        last = [None] * len(A) if last is None else last.split(unit.groups)
        return [(part, row, rows, normalize) for part, row in zip(A, last, strict=True)]

    def _B(self, units: list[Unit], divisors: Tensor | None = None) -> tuple[Tensor | Root, ...]:
        """Return B of layers of equal shape; ``divisors[n]`` turn sums over positions into means."""
        unit = units[0]

        def form() -> tuple[Tensor | Root, ...]:
            b, factor = unit.b if len(units) == 1 else stack_vectors(units), self.b_factor(unit)
            if self.approx == "expand" and by_datum_pays(b) and self._fits(b.shape[4], "factor B", unit):
                return gram_by_datum(self.rows.cast(b), factor).split(unit.groups)
            b = self.rows.vectors(b, divisors)
            if self._keeps_root(b, unit, "B") and 0 < factor < inf:
                return tuple(map(Root, (b * factor**0.5).split(unit.groups)))
            return self._second_moment(b, unit, "B", factor).split(unit.groups)

        if unit.vectors_known is None or divisors is not None or type(self) is not KFAC:
            return form()
        calls = tuple(frozenset(u.sites) for u in units)
        return unit.vectors_known(("B", calls, self.b_factor(unit), *self._kind(unit)), form)

    def _kind(self, unit: Unit) -> tuple:
        """Return what tells factors of the same rows apart."""
        joint = self.joins(unit.parameters)
        return self.rows, self.max_dim, self.oversize, self.keep, joint

    def _keeps_root(self, x: Tensor, unit: Unit, factor: str) -> bool:
        """Whether a factor is kept as its rows ``x[g,r,d]``."""
        few = self.keep == "root" and 0 < x.shape[1] < x.shape[2]
        return few and self._fits(x.shape[2], f"factor {factor}", unit)

    def _root(self, a: Tensor, unit: Unit) -> tuple[Root, Tensor | None]:
        """Return A of rows ``a[g,r,i]`` as a root, and the mean row of a joined bias, ``[g,i+1]``."""
        root = a.shape[1] ** -0.5
        last = self._last_row(a, unit)
        if last is not None:  # its column is part of the rows
            ones = self.rows.constants(a, unit)[:, None].expand(len(a), -1, 1)
            a = torch.cat([a, ones], dim=2)
        return Root(a * root), last

    def _sums(self, units: list[Unit]) -> list[InputMoment] | None:
        """Return sums of which A is the mean, layer by layer, where that needs no rows; else None."""
        unit = units[0]
        rows, size = (unit.moment_shape if self.approx == "expand" else None) or (0, None)
        if size is None or not self._fits(size, "factor A", unit):
            return None
        if self.keep == "root" and rows < size:
            return None  # rows are what is kept
        return self.rows.moments_of(units, self.joins(unit.parameters))

    def _divisors(self, layer: _Layer, unit: Unit) -> Tensor | None:
        """Return the number of positions per datum if B takes the mean over them; None otherwise.

        Raises:
            UnsupportedError: If B was begun without knowing all calls, whose positions count.
        """
        if not self.rows.averages_vectors(unit):
            return None
        joined = layer.all_calls(unit)
        divisors = self.rows.divisors(joined)
        if divisors is not None and layer.B is not None and len(joined.sites) > len(layer.sites):
            raise UnsupportedError(
                f'KFAC: sharing(normalize="sum") for {unit.sites[0].label}, whose calls reach different '
                'losses of one backward pass. Use normalize="mean", or one backward pass per loss.'
            )
        return divisors

    def b_factor(self, unit: Unit) -> float:
        """What outer products of vectors are multiplied with."""
        return unit.inverse_scale if self.fisher == "empirical" else 1.0

    def _last_row(self, a: Tensor, unit: Unit) -> Tensor | None:
        """Return the row of A that belongs to a joined bias, ``[g,i+1]``."""
        if not self.joins(unit.parameters):
            return None
        if unit.existing is None:
            return torch.cat([a.mean(1), a.new_ones(len(a), 1)], dim=1)
        c, rows = self.rows.constants(a, unit), max(1, a.shape[1])
        corner = c.square().sum().expand(len(a), 1)
        return torch.cat([c @ a, corner], dim=1) / rows

    def _second_moment(self, x: Tensor, unit: Unit, factor: str, scale: float) -> Tensor:
        """Return ``scale sum_r x x^T`` of ``x[g,r,d]``, ``[g,d,d]``; its diagonal if too large."""
        if self._fits(x.shape[-1], f"factor {factor}", unit):
            return gram(x, scale)
        return scale * x.square().sum(1)

    def _fits(self, dim: int, what: str, unit: Unit) -> bool:
        """Whether a dense matrix may be formed; raise unless its diagonal is wanted instead."""
        if dim <= self.max_dim:
            return True
        if self.oversize == "diagonal":
            return False
        size = self.rows.dtype_of(next(iter(unit.parameters.values()))).itemsize
        raise UnsupportedError(
            f"KFAC: {what} of {unit.sites[0].label} would be {dim} x {dim} "
            f"({dim * dim * size / 2**30:.1f} GiB), above max_dim={self.max_dim}. Pass "
            'oversize="diagonal" to keep its diagonal, or raise max_dim.'
        )

    def joins(self, parameters: dict[str, nn.Parameter]) -> bool:
        """Whether a layer's bias is part of its weight's block."""
        return self.bias == "joint" and len(parameters) == 2

    def finish(self, store: dict) -> list[tuple[nn.Parameter, Block]]:
        """Build one object per parameter."""
        found: dict[int, tuple[nn.Parameter, Block]] = {}
        ones: dict[tuple, Tensor] = {}
        groups = Groups()
        for layer in store.values():
            if isinstance(layer, ElementwiseLayer):
                blocks = layer.blocks()
            else:
                self.join_later(layer)
                blocks = self._blocks(layer, ones)
                if layer.parts:
                    blocks = groups.take(blocks, layer.parameters, layer.parts, layer.axes_of)
            for parameter, block in blocks:
                other = found.get(id(parameter))
                if other is not None:
                    block = _sum(other[1], block, parameter)
                found[id(parameter)] = (parameter, block)
        return list(found.values())

    def join_later(self, layer: _Layer) -> None:
        """Form A of a layer with several calls, whose inputs had to wait for all of them."""
        if layer.later:
            layer.later = False
            unit = Unit(list(layer.sites), (), layer.rule)
            unit.inputs_known, layer.known = layer.known, None
            self._add_inputs(layer, unit)

    def _blocks(self, layer: _Layer, ones: dict[tuple, Tensor]) -> list[tuple[nn.Parameter, Kronecker]]:
        """Return the blocks of one layer's parameters; ``ones`` are shared between layers."""
        parameters, groups = layer.parameters, layer.groups
        weight, bias = parameters.get("weight"), parameters.get("bias")
        B, A = self._identity(layer) if self.fisher == "forward" else layer.B, layer.A
        B = B if groups > 1 else B[0]
        blocks = []
        if weight is not None:
            joint = self.joins(parameters)
            if joint and not isinstance(A, Root):
                A = append_row(A, layer.last)
            A = A if groups > 1 else A[0]
            axes = MATRIX if "weight" in layer.parts else layer.axes
            block = Kronecker(B, A, axes, groups, joint, layer.rows)
            blocks.append((weight, block))
            if joint:
                return [*blocks, (bias, block)]
        if bias is not None:
            kind = (groups, B.dtype, B.device)
            one = ones.get(kind)
            if one is None:
                shape = (groups, 1, 1) if groups > 1 else (1, 1)
                one = ones[kind] = torch.ones(shape, dtype=B.dtype, device=B.device)
            axes = BIAS if "bias" in layer.parts else layer.bias_axes
            if layer.bias_B is not None:
                B = layer.bias_B if groups > 1 else layer.bias_B[0]
            blocks.append((bias, Kronecker(B, one, axes, groups)))
        return blocks

    def _identity(self, layer: _Layer) -> Tensor:
        """Return the identity of ``fisher="forward"`` as diagonals ``[g,o]``."""
        role, p = next(iter(layer.parameters.items()))
        whole = torch.empty(p.shape, device="meta")  # where p is one shard
        shape = layer.axes_of(role).to_matrix(whole).shape[:2]
        if role in layer.parts:
            shape = (1, shape[1])
        return torch.ones(shape, dtype=self.rows.dtype_of(p), device=p.device)

    def shares(self, store: dict, names: Callable[[nn.Parameter], str]) -> list[Share]:
        """Add up B, which is linear in the loss, and sums over rows, of which A is the mean."""
        found, seen = [], {}
        for layer in store.values():
            if not isinstance(layer, ElementwiseLayer):
                self.join_later(layer)
            share = layer.share(names)
            again = seen[share.key] = seen.get(share.key, -1) + 1
            share.key = (*share.key, again)
            found.append(share)
        return found

    def of_shares(self, sums: list[Share], parameters: Mapping[str, nn.Parameter]) -> dict:
        """Return a store of sums."""
        store = {}
        for share in sums:
            kind = ElementwiseLayer if share.frame[0] == "elementwise" else _Layer
            own = {role: parameters[name] for role, name in share.parameters.items()}
            store[share.key] = kind.of_share(share, own)
        return store

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Add a batch: B is linear in the loss, A a mean over rows."""
        for key, layer in store.items():
            if not isinstance(layer, ElementwiseLayer):
                self.join_later(layer)
            layer.merge_into(total, key, weight)


class _Layer:
    """Factors of one layer: B (a sum), A and its last row if joint (means over a number of rows).

    Ragged positions may be averaged in B instead of A (``normalize="sum"``): then the bias, if it is
    separate, has a B of its own.
    """

    __slots__ = (
        "A", "B", "axes", "bias_B", "bias_axes", "groups", "known", "last", "later", "normalize",
        "parameters", "parts", "rows", "rule", "sites",
    )  # fmt: skip

    def __init__(self, unit: Unit):
        self.rule, self.groups, self.parameters = unit.rule, unit.groups, unit.parameters
        self.axes, self.bias_axes = unit.axes("weight"), unit.axes("bias")
        self.parts = unit.sites[0].parts
        self.sites: dict[Site, None] = {}
        self.A = self.B = self.bias_B = self.last = None
        self.normalize: str | None = None  # None: no shared positions
        self.rows = 0
        self.later, self.known = False, None

    def axes_of(self, role: str) -> Axes:
        """Return how the axes of a (whole) parameter form its matrix."""
        return self.axes if role == "weight" else self.bias_axes

    def is_new(self, unit: Unit) -> bool:
        """Note a unit's calls; whether some were not known."""
        known = len(self.sites)
        for site in unit.sites:
            self.sites[site] = None
        return len(self.sites) > known

    def add_B(self, B: Tensor | Root) -> None:
        """Add to B."""
        self.B = B if self.B is None else added(self.B, B)

    def add_bias_B(self, B: Tensor | Root) -> None:
        """Add to the B of the bias alone."""
        self.bias_B = B if self.bias_B is None else added(self.bias_B, B)

    def all_calls(self, unit: Unit) -> Unit:
        """Return the unit of all calls of the layer that are known, those of ``unit`` included."""
        calls = {**self.sites, **dict.fromkeys(unit.sites)}
        return unit if len(calls) == len(unit.sites) else Unit(list(calls), (), self.rule)

    def add_A(self, A: Tensor, last: Tensor | None, rows: int) -> None:
        """Average A and its last row with those of further rows."""
        if self.A is not None and rows + self.rows:
            part = rows / (rows + self.rows)
            joined = None
            if isinstance(self.A, Root) and isinstance(A, Root):
                joined = self.A.mixed(A, part)
            if isinstance(joined, Root):
                A = joined
            else:
                mine = _without_row(self.A, self.last)
                A = mine + part * (_without_row(A, last) - mine)
            last = None if last is None else self.last + part * (last - self.last)
        self.A, self.last, self.rows = A, last, self.rows + rows

    def share(self, names: Callable[[nn.Parameter], str]) -> Share:
        """Return what adds up over processes."""
        named = {role: names(p) for role, p in self.parameters.items()}
        # with sums over positions that exist, a bias has a B of its own where some do not exist
        summed = any(s.sharing is not None and s.sharing.normalize == "sum" for s in self.sites)
        family = self.rule.family or type(self.rule).__qualname__
        parts = tuple(self.parts.items())
        share = Share(("layer", family, *named.items(), *parts), named)
        share.frame = ("layer", self.groups, self.axes, self.bias_axes, parts, summed)
        bias_B = self.B if summed and self.bias_B is None else self.bias_B
        A = None if self.A is None else _without_row(self.A, self.last)
        for name, t, power, times in (
            ("A", A, 0, self.rows),
            ("last", self.last, 0, self.rows),
            ("B", self.B, 1, 1),
            ("bias_B", bias_B, 1, 1),
        ):
            if t is not None:
                share.parts[name] = Part(dense(t), power, times)
        share.counts["rows"] = self.rows
        return share

    @classmethod
    def of_share(cls, share: Share, parameters: dict[str, nn.Parameter]) -> _Layer:
        """Return the layer that has some sums."""
        layer = object.__new__(cls)
        _, layer.groups, layer.axes, layer.bias_axes, parts, summed = share.frame
        layer.parts, layer.parameters = dict(parts), parameters
        layer.sites, layer.rule, layer.later, layer.known = {}, None, False, None
        layer.normalize = "sum" if summed else None
        sums = {name: part.tensor for name, part in share.parts.items()}
        layer.rows = int(share.counts["rows"])
        layer.A, layer.last = (
            None if sums.get(name) is None else sums[name].div_(max(1, layer.rows))
            for name in ("A", "last")
        )
        layer.B, layer.bias_B = sums.get("B"), sums.get("bias_B")
        return layer

    def merge_into(self, total: dict, key: tuple, weight: float) -> None:
        """Add a batch's factors, B put on the total's scale."""
        other = total.get(key)
        if other is None:
            other = total[key] = copy(self)
            other.sites, other.A, other.B, other.last, other.rows = {}, None, None, None, 0
            other.bias_B = None
        if None not in (self.normalize, other.normalize) and self.normalize != other.normalize:
            raise ValueError(
                'KFAC: some batches were computed with sharing(normalize="sum"), others without; '
                "their factors are no parts of one sum. Use it for all batches, or for none."
            )
        other.normalize = other.normalize or self.normalize
        if self.bias_B is not None or other.bias_B is not None:
            old = other.B if other.bias_B is None else other.bias_B
            other.bias_B, new = old, self.B if self.bias_B is None else self.bias_B
            other.add_bias_B(scaled(new, weight))
        if self.B is not None:
            other.add_B(scaled(self.B, weight))
        if self.A is not None:
            other.add_A(self.A, self.last, self.rows)


def _sum(one: Block, other: Block, parameter: nn.Parameter) -> Block:
    """Return the block of a parameter in two roles, without cross terms."""
    kinds = (Kronecker, KroneckerSum)
    if isinstance(one, kinds) and isinstance(other, kinds):
        return KroneckerSum((*_terms(one), *_terms(other)))
    if type(one) is type(other):
        return one + other
    raise UnsupportedError(
        f"KFAC: a parameter of shape {tuple(parameter.shape)} is used both by a layer whose block has "
        "Kronecker factors and by a norm, or in a way without a rule, whose block has none; their sum "
        "has no common form."
    )


def _terms(block: Kronecker | KroneckerSum) -> tuple[Kronecker, ...]:
    return block.terms if isinstance(block, KroneckerSum) else (block,)


def _without_row(A: Tensor | Root, last: Tensor | None) -> Tensor:
    """Return A itself, ``[g,i,i]``, of a root that may have the column of a joined bias."""
    if not isinstance(A, Root):
        return A
    formed = A.dense()
    return formed if last is None else formed[:, :-1, :-1]
