r"""Kronecker factors of affine layers with weight sharing: KFAC-expand and KFAC-reduce."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from backpack_ext.errors import UnsupportedError
from backpack_ext.extension import Extension, Vectors
from backpack_ext.normal import OneHot, gram
from backpack_ext.rules.base import Rule
from backpack_ext.site import Site
from backpack_ext.unit import Unit, join_inputs
from curvature import Kronecker, KroneckerSum

APPROX = ("expand", "reduce")
FISHER = ("exact", "mc", "empirical", "forward")
BIAS = ("joint", "separate")
OVERSIZE = ("raise", "diagonal")


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
    unpacks as ``B, A``; a parameter used in two roles (an embedding tied to an output head) gets a
    `curvature.KroneckerSum`, without cross terms. An embedding's A is diagonal, also in reduce,
    where that drops the off-diagonal entries of ``abar abar^T``.

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
    ):
        for name, value, allowed in (
            ("approx", approx, APPROX),
            ("fisher", fisher, FISHER),
            ("bias", bias, BIAS),
            ("oversize", oversize, OVERSIZE),
        ):
            if value not in allowed:
                raise ValueError(f"KFAC: {name}={value!r}; expected one of {allowed}.")
        check_samples("KFAC", mc_samples)
        super().__init__(savefield, unsupported, generator)
        self.approx, self.fisher, self.bias = approx, fisher, bias
        self.dtype, self.max_columns = dtype, max_columns
        self.max_dim, self.oversize = max_dim, oversize
        kinds = {"empirical": "gradient", "forward": "none"}
        self.vectors = Vectors(kinds.get(fisher, fisher), mc_samples)
        # one column for all data mixes them where a layer couples them; independent samples do not
        self.needs_independent_samples = fisher == "exact"

    @property
    def needs_scale(self) -> bool:
        """The gradient of a loss carries r c; outer products of it are to carry it once."""
        return self.fisher == "empirical"

    def absorb(self, store: dict, unit: Unit) -> None:
        """Add ``sum b b^T`` of one layer, and note its calls for A."""
        key = tuple((role, id(p)) for role, p in unit.parameters.items())
        layer = store.get((key, unit.axes("weight")))
        if layer is None:
            layer = store[key, unit.axes("weight")] = _Layer(unit)
        new = [site for site in unit.sites if site not in layer.sites]
        layer.sites.update(dict.fromkeys(unit.sites))
        if self.fisher != "forward":
            b = unit.b.to(self._dtype(unit.b))
            b = b.sum(3) if self.approx == "reduce" else b
            layer.add("B", self._second_moment(b.flatten(1, -2), unit, "B"))
        if not new or "weight" not in unit.parameters:
            layer.count = layer.count or unit.batch
        elif unit.sites[0].shared:
            # calls may arrive from several losses: the inputs are joined at the end
            layer.later = True
        else:
            self._add_inputs(layer, unit.a, unit)

    def _add_inputs(self, layer: _Layer, a: Tensor | OneHot, unit: Unit) -> None:
        """Add the numerator of A, the constant feature's column, and the number of rows."""
        if isinstance(a, OneHot):
            layer.add("A", self._one_hot_moment(a, self._dtype(unit.module.weight)))
            layer.count += a.index.shape[0] * (a.index.shape[1] if self.approx == "expand" else 1)
            return
        a = a.to(self._dtype(a))
        if self.approx == "reduce":
            a = a.mean(2) if a.shape[2] > 1 else a.squeeze(2)
        else:
            a = a.flatten(1, 2)
        layer.add("A", self._second_moment(a, unit, "A"))
        if self._joint(unit.parameters):
            layer.add("mean", a.sum(1))
        layer.count += a.shape[1]

    def _one_hot_moment(self, a: OneHot, dtype: torch.dtype) -> Tensor:
        """Return the diagonal of ``sum a a^T`` (expand: token counts) as ``[1, i]``."""
        ones = torch.ones(a.index.shape, dtype=dtype, device=a.index.device)
        if a.mask is not None:
            ones = ones * a.mask
        if self.approx == "expand":
            counts = ones.new_zeros(a.size).index_add_(0, a.index.flatten(), ones.flatten())
            return counts[None]
        n, s = a.index.shape
        keys, inverse = torch.unique(
            torch.arange(n, device=a.index.device)[:, None] * a.size + a.index, return_inverse=True
        )
        means = ones.new_zeros(len(keys)).index_add_(0, inverse.flatten(), ones.flatten() / s)
        return ones.new_zeros(a.size).index_add_(0, keys % a.size, means.square())[None]

    def _second_moment(self, x: Tensor, unit: Unit, factor: str) -> Tensor:
        """Return ``sum_r x x^T`` of ``x[g,r,d]`` as ``[g,d,d]``, or its diagonal if too large."""
        dim = x.shape[-1]
        if dim <= self.max_dim:
            return gram(x)
        if self.oversize == "diagonal":
            return x.square().sum(1)
        raise UnsupportedError(
            f"KFAC: factor {factor} of {unit.sites[0].label} would be {dim} x {dim} "
            f"({dim * dim * x.element_size() / 2**30:.1f} GiB), above max_dim={self.max_dim}. Pass "
            'oversize="diagonal" to keep its diagonal, or raise max_dim.'
        )

    def _dtype(self, t: Tensor) -> torch.dtype:
        return self.dtype or torch.promote_types(t.dtype, torch.float32)

    def _joint(self, parameters: dict[str, nn.Parameter]) -> bool:
        return self.bias == "joint" and len(parameters) == 2

    def finish(self, store: dict, scale: float) -> list[tuple[nn.Parameter, Kronecker]]:
        """Divide by the counts and build one object per parameter."""
        found: dict[int, tuple[nn.Parameter, list[Kronecker]]] = {}
        for layer in store.values():
            self.join_later(layer)
            for parameter, block in self._blocks(layer, scale):
                found.setdefault(id(parameter), (parameter, []))[1].append(block)
        return [
            (parameter, blocks[0] if len(blocks) == 1 else KroneckerSum(tuple(blocks)))
            for parameter, blocks in found.values()
        ]

    def join_later(self, layer: _Layer) -> None:
        """Form A of a layer with several calls, whose inputs had to wait for all of them."""
        if layer.later:
            layer.later = False
            sites = list(layer.sites)
            unit = Unit(sites, (), layer.rule)
            self._add_inputs(layer, join_inputs(sites, layer.rule), unit)

    def _blocks(self, layer: _Layer, scale: float):
        parameters, sums = layer.parameters, layer.sums
        groups, weight = layer.groups, parameters.get("weight")
        if self.fisher == "forward":
            p = next(iter(parameters.values()))
            B = torch.ones(groups, layer.out_features, dtype=self._dtype(p), device=p.device)
        else:
            B = sums["B"] if scale == 1 else sums["B"] / scale if scale else 0 * sums["B"]
        B = B if groups > 1 else B[0]
        if weight is not None:
            A = sums["A"] / layer.count
            joint = self._joint(parameters)
            if joint:
                A = _append_constant(A, sums["mean"] / layer.count)
            A = A if groups > 1 else A[0]
            block = Kronecker(B, A, layer.weight_axes, groups, joint)
            yield weight, block
            if joint:
                yield parameters["bias"], block
                return
        if "bias" in parameters:
            one = B.new_ones((groups, 1, 1) if groups > 1 else (1, 1))
            yield parameters["bias"], Kronecker(B, one, layer.bias_axes, groups)

    def merge(self, total: dict, store: dict, weight: float, scale: float) -> None:
        """Add the numerators and counts of a batch; B is linear in the loss."""
        factor = weight / scale if self.needs_scale else weight
        for key, layer in store.items():
            self.join_later(layer)
            other = total.setdefault(key, layer.emptied())
            for name, value in layer.sums.items():
                other.add(name, value * factor if name == "B" else value)
            other.count += layer.count


@dataclass(eq=False)
class _Layer:
    """Numerators of one layer: ``sum b b^T``, ``sum a a^T``, ``sum a``, and the rows' number."""

    unit: Unit | None
    sites: dict[Site, None] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    later: bool = False

    def __post_init__(self):
        unit, self.unit = self.unit, None
        if unit is None:
            return
        self.rule: Rule = unit.rule
        self.parameters, self.groups = unit.parameters, unit.groups
        self.weight_axes, self.bias_axes = unit.axes("weight"), unit.axes("bias")
        if "weight" in self.parameters:
            self.out_features = self.weight_axes.to_matrix(self.parameters["weight"]).shape[1]
        else:
            self.out_features = self.parameters["bias"].numel() // self.groups

    def add(self, name: str, value: Tensor) -> None:
        """Add to a numerator."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def emptied(self) -> _Layer:
        """Return a layer of the same parameters with nothing in it."""
        other = _Layer(None)
        for name in ("rule", "parameters", "groups", "weight_axes", "bias_axes", "out_features"):
            setattr(other, name, getattr(self, name))
        return other


def _append_constant(A: Tensor, mean: Tensor) -> Tensor:
    """Append the row and column of the constant feature 1 to ``A[g,i,i]``."""
    if A.dim() == 2:
        return torch.cat([A, A.new_ones(len(A), 1)], dim=1)
    top = torch.cat([A, mean.unsqueeze(2)], dim=2)
    last = torch.cat([mean, mean.new_ones(len(mean), 1)], dim=1)
    return torch.cat([top, last.unsqueeze(1)], dim=1)


def check_samples(owner: str, mc_samples: int) -> None:
    """Raise if a number of Monte-Carlo samples is no positive integer."""
    if not isinstance(mc_samples, int) or mc_samples < 1:
        raise ValueError(f"{owner}: mc_samples={mc_samples!r}; expected a positive integer.")
