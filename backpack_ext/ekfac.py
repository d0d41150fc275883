r"""Eigenvalue-corrected Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from backpack_ext.errors import UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.groups import Groups
from backpack_ext.kfac import KFAC
from backpack_ext.normal import OneHot, square_sum
from backpack_ext.shards import held
from backpack_ext.share import Part, Share
from backpack_ext.unit import Unit
from curvature import Block, DenseBlock, DiagonalBlock, Kronecker, KroneckerEigen, KroneckerSum


class EKFAC(Extension):
    r"""Eigenvalue-corrected KFAC: the best matrix that is diagonal in KFAC's eigenbasis.

    With the eigenbases of KFAC's factors, :math:`B = Q_B \Lambda_B Q_B^T` and
    :math:`A = Q_A \Lambda_A Q_A^T`, and the per-sample vectors ``G[v,n,o,i] = sum_s b a``, the block is

    .. math:: (Q_B \otimes Q_A) \operatorname{diag}(s) (Q_B \otimes Q_A)^T, \qquad
              s = \sum_{vn} (Q_B^T G_{vn} Q_A)^2,

    of the loss as written, reduction included. Among all matrices with these eigenvectors it is the
    closest to the block of the (generalised) Gauss-Newton in Frobenius norm, so never farther than
    KFAC, for layers with a shared axis too: s takes the per-sample sums over positions, in expand
    and in reduce, which differ in their bases. Each result is a `curvature.KroneckerEigen`; blocks of
    norms are those of `KFAC`.

    Without ``basis``, the bases are those of the same pass, and the layers' inputs and vectors are
    kept until its end. With ``basis``, only the eigenvalues are computed, layer by layer: decompose
    the factors now and then, correct the eigenvalues often.

    Args:
        approx: Which factors give the bases: ``"expand"`` or ``"reduce"``.
        fisher: ``"exact"``, ``"mc"`` or ``"empirical"``, as in `KFAC`.
        mc_samples: Number of samples for ``"mc"``.
        bias: ``"joint"`` or ``"separate"``, as in `KFAC`.
        generator: Random generator for ``"mc"``; a private one by default.
        dtype: Data type of the factors; float32 or the network's own if that is wider by default.
        basis: For each parameter the block whose eigenbasis to use, a `curvature.Kronecker` (decomposed
            here, once) or `curvature.KroneckerEigen`; ``approx`` and ``bias`` are then those of the
            given blocks. Dense and diagonal blocks (of norms) are left aside.
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
        max_columns: ``fisher="exact"`` refuses beyond that many columns per datum.
        max_dim: Largest dense factor dimension.
        oversize: Beyond ``max_dim``: ``"raise"``, or keep only the ``"diagonal"`` of the factor.
        norm: Blocks of norms: ``"dense"`` or ``"diagonal"``.

    Raises:
        ValueError: If an option is none of those listed.
        TypeError: If ``basis`` maps to something else.

    References:
        George et al. (2018), Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis.

    Example:
        >>> import torch
        >>> from backpack_ext import EKFAC, backpack, extend
        >>> model, loss_fn = extend(nn.Linear(2, 1)), extend(nn.MSELoss(reduction="sum"))
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> with backpack(EKFAC(fisher="exact")):
        ...     loss_fn(model(X), torch.zeros(2, 1)).backward()
        >>> torch.allclose(model.weight.ekfac.to_dense(), 2 * X.T @ X, atol=1e-5)
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
        basis: Mapping[nn.Parameter, Kronecker | KroneckerEigen] | None = None,
        savefield: str = "ekfac",
        unsupported: str = "raise",
        max_columns: int = 1000,
        max_dim: int = 16384,
        oversize: str = "raise",
        norm: str = "dense",
    ):
        if fisher == "forward":
            raise ValueError('EKFAC: fisher="forward" has no per-sample vectors to project.')
        super().__init__(savefield, unsupported, generator)
        self.kfac = KFAC(
            approx,
            fisher,
            mc_samples,
            bias,
            dtype=dtype,
            savefield=savefield,
            max_dim=max_dim,
            oversize=oversize,
            norm=norm,
        )
        self.vectors, self.max_columns = self.kfac.vectors, max_columns
        self.basis = None if basis is None else _bases(basis)

    @property
    def needs_scale(self) -> bool:
        """As in KFAC."""
        return self.kfac.needs_scale

    def absorb(self, store: dict, unit: Unit) -> None:
        """Project at once if the bases are given; otherwise keep the layer for the end."""
        self.absorb_all(store, [unit])

    def absorb_all(self, store: dict, units: list[Unit]) -> None:
        """Take layers of equal shape."""
        layers = store.setdefault("layers", {})
        if self.basis is None:
            self.kfac.absorb_all(store.setdefault("kfac", {}), units)
        if units[0].rule.elementwise:  # KFAC's blocks are exact
            if self.basis is not None:
                self.kfac.absorb_all(store.setdefault("kfac", {}), units)
            return
        for unit in units:
            layer = layers.get(unit.key)
            if layer is None:
                layer = layers[unit.key] = _Layer(unit)
            call = (unit.a if "weight" in unit.parameters else None, unit.b, self.kfac.b_factor(unit))
            if self.basis is None:
                layer.calls.append(call)
            else:
                if not layer.bases:
                    layer.bases = self._given(unit)
                layer.add(*(self._cast(t) for t in call[:2]), call[2])

    def _cast(self, t: Tensor | OneHot | None) -> Tensor | OneHot | None:
        return self.kfac.rows.cast(t) if isinstance(t, Tensor) else t

    def _given(self, unit: Unit) -> dict[str, KroneckerEigen]:
        """Return the given bases of a layer's parameters, by role."""
        bases = {}
        for role, p in unit.parameters.items():
            p = held(p)
            if id(p) not in self.basis:
                raise UnsupportedError(
                    f"EKFAC: `basis` has no block for the {role} of {unit.sites[0].label}. Pass one "
                    "for each trainable parameter, or freeze the parameter."
                )
            eigen, part = self.basis[id(p)][1], unit.part(role)
            if part is not None and eigen.groups != part[1]:
                raise ValueError(
                    f"EKFAC: `basis` has a block with {eigen.groups} groups for the {role} of "
                    f"{unit.sites[0].label}; expected {part[1]}."
                )
            bases[role] = eigen if part is None else eigen.group(part[0])
        g, o = unit.groups, unit.b.shape[-1]
        i = 1
        if "weight" in bases:
            i = (unit.a.size if isinstance(unit.a, OneHot) else unit.a.shape[-1]) + bases["weight"].joint
        wanted = {"weight": (g, o, i), "bias": (g, o, 1)}
        if "weight" in bases and bases["weight"].joint:
            bases.pop("bias", None)
        for role, eigen in bases.items():
            if eigen.sizes != wanted[role]:
                raise ValueError(
                    f"EKFAC: `basis` has a block of sizes {eigen.sizes} for the {role} of "
                    f"{unit.sites[0].label}; expected {wanted[role]} (groups, outputs, inputs)."
                )
        return bases

    def finish(self, store: dict) -> list[tuple[nn.Parameter, Block]]:
        """Build one object per parameter."""
        layers, kfac = store.get("layers", {}), self.kfac.finish(store.get("kfac", {}))
        if self.basis is None:
            found = {id(p): block for p, block in kfac}
            eigen: dict[int, KroneckerEigen] = {}
            for layer in layers.values():
                layer.bases = _decompose(layer, found, eigen)
                for a, b, factor in layer.calls:
                    layer.add(self._cast(a), self._cast(b), factor)
                layer.calls.clear()
        norms = [(p, block) for p, block in kfac if isinstance(block, (DenseBlock, DiagonalBlock))]
        groups, results = Groups(), []
        for layer in layers.values():
            blocks = layer.results()
            if layer.parts:
                blocks = groups.take(blocks, layer.parameters, layer.parts, layer.axes.__getitem__)
            results.extend(blocks)
        return [*norms, *results]

    def check_processes(self) -> None:
        """Refuse without ``basis``.

        Raises:
            UnsupportedError: If the bases are not given: second moments are taken in the bases of the
                factors of all processes, which are known only when the pass is over.
        """
        if self.basis is None:
            raise UnsupportedError(
                "EKFAC over processes needs its bases first: run KFAC with process_group, then "
                "EKFAC(basis={parameter: its Kronecker}) in another pass."
            )

    def shares(self, store: dict, names: Callable[[nn.Parameter], str]) -> list[Share]:
        """Add up eigenvalues, and what tells whether the bases are the same; and blocks of norms."""
        found = self.kfac.shares(store.get("kfac", {}), names)
        for share in found:
            share.key = ("kfac", *share.key)
        for layer in store.get("layers", {}).values():
            named = {role: names(p) for role, p in layer.parameters.items()}
            frame = ("eigen", layer.label, tuple(layer.parts.items()), tuple(layer.axes.items()))
            share = Share(("layer", *named.items(), *frame[2]), named, frame)
            for role, values in layer.values.items():
                marks = layer.bases[role].numerators()[1:]
                share.parts[role] = Part(values, 1)
                share.parts[f"{role}.marks"], share.parts[f"{role}.squares"] = map(Part, marks)
            found.append(share)
        return found

    def of_shares(self, sums: list[Share], parameters: Mapping[str, nn.Parameter]) -> dict:
        """Return a store of sums.

        Raises:
            ValueError: If the processes were given different bases.
        """
        layers = {}
        for share in (share for share in sums if share.frame[0] == "eigen"):
            own = {role: parameters[name] for role, name in share.parameters.items()}
            layer = layers[share.key] = object.__new__(_Layer)
            _, layer.label, parts, axes = share.frame
            layer.parameters, layer.parts, layer.axes = own, dict(parts), dict(axes)
            layer.calls, layer.bases, layer.values = [], {}, {}
            for role in (name for name in share.parts if "." not in name):
                eigen, part = self.basis[id(own[role])][1], layer.parts.get(role)
                layer.bases[role] = eigen = eigen if part is None else eigen.group(part[0])
                parts = (share.parts[role + end].tensor for end in ("", ".marks", ".squares"))
                layer.values[role] = eigen.from_numerators(list(parts), 1.0).values
        norms = [share for share in sums if share.frame[0] != "eigen"]
        return {"layers": layers, "kfac": self.kfac.of_shares(norms, parameters)}

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Add a batch's eigenvalues.

        Raises:
            UnsupportedError: If the bases are not given: those of batches differ.
        """
        if self.basis is None:
            raise UnsupportedError(
                "EKFAC over a data set needs its bases first: collect KFAC, then collect "
                "EKFAC(basis={parameter: its Kronecker}), a second pass over the data."
            )
        layers = total.setdefault("layers", {})
        for key, layer in store.get("layers", {}).items():
            other = layers.setdefault(key, layer.emptied())
            for role, values in layer.values.items():
                other.values[role] = other.values.get(role, 0) + weight * values
        self.kfac.merge(total.setdefault("kfac", {}), store.get("kfac", {}), weight)


class _Layer:
    """The eigenvalues of one layer's blocks, by role; until they can be had, its calls."""

    def __init__(self, unit: Unit):
        self.label, self.parameters = unit.sites[0].label, unit.parameters
        self.parts, self.axes = unit.sites[0].parts, {r: unit.axes(r) for r in unit.parameters}
        self.calls: list[tuple[Tensor | OneHot | None, Tensor, float]] = []
        self.bases: dict[str, KroneckerEigen] = {}
        self.values: dict[str, Tensor] = {}

    def emptied(self) -> _Layer:
        """Return a layer with the same bases and no eigenvalues."""
        other = object.__new__(_Layer)
        other.label, other.parameters, other.bases = self.label, self.parameters, self.bases
        other.parts, other.axes = self.parts, self.axes
        other.calls, other.values = [], {}
        return other

    def add(self, a: Tensor | OneHot | None, b: Tensor, factor: float) -> None:
        """Add the second moments of projected per-sample vectors."""
        for role, eigen in self.bases.items():
            rows = b if eigen.Q_B is None else b @ _spread(eigen.Q_B.to(b.dtype), eigen.groups, 2)
            if role == "weight":
                values = square_sum(_project_inputs(a, eigen, self.label), rows)
            else:  # a constant input
                values = rows.sum(3).square().sum((1, 2)).unsqueeze(-1)
            values = values * factor
            old = self.values.get(role)
            self.values[role] = values if old is None else old + values

    def results(self) -> list[tuple[nn.Parameter, KroneckerEigen]]:
        """Return one object per parameter; a joint one serves both."""
        blocks = {role: eigen.corrected(self.values[role]) for role, eigen in self.bases.items()}
        return [(p, blocks.get(role) or blocks["weight"]) for role, p in self.parameters.items()]


def _decompose(
    layer: _Layer, found: dict[int, Kronecker | KroneckerSum], eigen: dict[int, KroneckerEigen]
) -> dict[str, KroneckerEigen]:
    """Return the eigenbases of a layer's blocks, by role; ``eigen`` keeps those of groups' blocks."""
    blocks = {role: found[id(p)] for role, p in layer.parameters.items()}
    for block in blocks.values():
        if isinstance(block, KroneckerSum):
            raise UnsupportedError(
                f"EKFAC: {layer.label} shares a parameter with a layer that uses it in another role "
                "(an embedding tied to a head?) or with another bias, and a sum of Kronecker products "
                "has no factored eigenbasis. Use KFAC there."
            )
    if layer.parts:
        bases = {}
        for role, block in blocks.items():
            if id(block) not in eigen:
                eigen[id(block)] = block.eigh()
            whole, part = eigen[id(block)], layer.parts.get(role)
            bases[role] = whole if part is None else whole.group(part[0])
        if bases["weight"].joint:
            bases.pop("bias", None)
        return bases
    weight, bias = blocks.get("weight"), blocks.get("bias")
    if weight is None:
        return {"bias": bias.eigh()}
    own = bias is not None and bias is not weight
    shared = own and bias.B is weight.B  # forms B, if it is kept as rows, which `eigh` then takes
    bases = {"weight": weight.eigh()}
    if own and not shared:
        bases["bias"] = bias.eigh()
    elif shared:
        # B is the weight's, which is decomposed already
        Q_B, shape = bases["weight"].Q_B, (*bases["weight"].sizes[:2], 1)
        values = bases["weight"].values.new_ones(shape)
        bases["bias"] = KroneckerEigen(Q_B, None, values, bias.axes, bias.groups)
    return bases


def _project_inputs(a: Tensor | OneHot, eigen: KroneckerEigen, label: str) -> Tensor | OneHot:
    """Return ``a Q_A``, the constant input appended before for a joint block."""
    if isinstance(a, OneHot):
        if eigen.Q_A is not None:
            raise UnsupportedError(
                f"EKFAC: the basis for {label} has a dense Q_A, but its inputs are one-hot: A is "
                "diagonal there."
            )
        return a
    if eigen.joint:
        a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
    return a if eigen.Q_A is None else a @ _spread(eigen.Q_A.to(a.dtype), eigen.groups, 1)


def _spread(basis: Tensor, groups: int, axes: int) -> Tensor:
    """Add axes between a basis's groups and its matrices."""
    if groups == 1:
        return basis
    return basis.reshape(groups, *[1] * axes, *basis.shape[1:])


def _bases(basis: Mapping[nn.Parameter, Block]) -> dict[int, tuple[nn.Parameter, KroneckerEigen]]:
    """Return the eigenbases by the parameter's id; each block is decomposed once."""
    known: dict[int, KroneckerEigen] = {}
    found = {}
    for p, block in basis.items():
        if isinstance(block, (DenseBlock, DiagonalBlock)):
            continue  # of a norm, say: has no Kronecker basis, and needs none
        if isinstance(block, Kronecker):
            if id(block) not in known:
                known[id(block)] = block.eigh()
            block = known[id(block)]
        if not isinstance(block, KroneckerEigen):
            raise TypeError(
                f"EKFAC: `basis` maps to {type(block).__name__}; expected Kronecker or KroneckerEigen."
            )
        found[id(p)] = (p, block)
    return found
