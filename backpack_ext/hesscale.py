"""Diagonal of the Hessian: HesScale and BL89."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from backpack_ext.extension import Extension, Vectors
from backpack_ext.normal import per_sample
from backpack_ext.rules.base import Rule
from backpack_ext.share import Part, Share
from backpack_ext.unit import Unit

ON_CURVED_GLUE = ("estimate", "raise")


class DiagonalHessian(Extension):
    r"""An extension of the recursion of Hessian diagonals, see `backpack_ext.diagonals.recursion`.

    Args:
        name: What results are called.
        gauss_newton: Whether second derivatives of the network's operations are left out.
        batch: Whether results are those of each datum.
        on_curved_glue: What to do about operations with a second derivative and without a rule.
        cross_terms: Whether additions get their cross terms.
        generator: Random generator for signs.
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters whose data cannot be told apart, with ``batch``.
    """

    vectors = Vectors("diagonal")
    # Whether the loss's elementwise parts count as layers, as in BL89.
    layerwise = False
    # Whether the last linear layer is crossed exactly.
    exact_penultimate = False

    def __init__(
        self,
        name: str,
        gauss_newton: bool,
        batch: bool,
        on_curved_glue: str,
        cross_terms: bool,
        generator: torch.Generator | None,
        savefield: str | None,
        unsupported: str,
    ):
        if on_curved_glue not in ON_CURVED_GLUE:
            raise ValueError(
                f"{type(self).__name__}: on_curved_glue={on_curved_glue!r}; expected one of "
                f"{ON_CURVED_GLUE}."
            )
        name += ("_gn" if gauss_newton else "") + ("_batch" if batch else "")
        super().__init__(savefield or name, unsupported, generator)
        self.gauss_newton, self.batch, self.cross_terms = gauss_newton, batch, cross_terms
        self.refuses_curved_glue = on_curved_glue == "raise"
        self.needs_layers = self.needs_independent_samples = batch
        self._warned: set[str] = set()

    def set_module_extension(
        self, module: type[nn.Module], extension: Rule, overwrite: bool = False
    ) -> None:
        """Refuse: diagonals cross operations of the graph, not modules.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} has rules for operations, not for modules. Register one with "
            "backpack_ext.register_diagonal_rule or backpack_ext.register_activation."
        )

    def signs(self, like: Tensor) -> Tensor:
        """Return random signs shaped like a tensor."""
        options = {"generator": self.generator(like.device), "device": like.device}
        return torch.randint(0, 2, like.shape, **options).to(like.dtype).mul_(2).sub_(1)

    def warn(self, operation: str) -> None:
        """Say once that an operation has no rule."""
        if operation not in self._warned:
            self._warned.add(operation)
            warnings.warn(
                f"{type(self).__name__}: {operation} has no rule. The diagonal crosses it by random "
                "signs: exact where each input entry feeds one output entry, unbiased but noisy "
                "elsewhere. Register a rule with backpack_ext.register_diagonal_rule.",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ results

    def absorb(self, store: dict, unit: Unit) -> None:
        """Add the per-datum diagonals of one layer: ``unit.cotangents`` hold h."""
        for role, p in unit.parameters.items():
            h = _per_datum(unit, role)
            store[id(p)] = p, h if id(p) not in store else store[id(p)][1] + h

    def finish(self, store: dict) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the diagonals."""
        return list(store.values())

    @property
    def per_datum(self) -> bool:
        """With ``batch``."""
        return self.batch

    def shares(self, store: dict, names: Callable[[nn.Parameter], str]) -> list[Share]:
        """Add up the diagonals."""
        named = [(names(p), h) for p, h in store.values()]
        return [Share((name,), {"weight": name}, None, {"h": Part(h, 1)}) for name, h in named]

    def of_shares(self, sums: list[Share], parameters: Mapping[str, nn.Parameter]) -> dict:
        """Return a store of sums."""
        found = [(parameters[share.key[-1]], share.parts["h"].tensor) for share in sums]
        return {id(p): (p, h) for p, h in found}

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Add the diagonals of a batch, or put its data beside the others."""
        for key, (p, h) in store.items():
            h = h * weight
            if key in total:
                h = torch.cat((total[key][1], h)) if self.batch else total[key][1] + h
            total[key] = p, h


def _per_datum(unit: Unit, role: str) -> Tensor:
    """Return ``sum_s h a^2`` for each datum, shaped ``[n, *parameter.shape]``."""
    h = unit.b  # [g,1,n,s,o]
    if unit.rule.elementwise:
        found = h[0] if role == "bias" else h[0] * unit.a.square()
        return found.sum(2)[0].reshape(-1, *unit.parameters[role].shape)
    if role == "bias":
        return unit.grads(role)[0]
    return unit.placed(role, per_sample(unit.a.square(), h))[0]


class HesScale(DiagonalHessian):
    r"""Diagonal of the Hessian by HesScale, shaped like the parameter; in ``hesscale``.

    Per datum, the gradient g and an approximation h of the Hessian's diagonal travel back together.
    Across an operation F with Jacobian J

    .. math::
        h^{in}_j = \sum_i J_{ij}^2 h_i + \sum_i g_i \frac{\partial^2 F_i}{\partial x_j^2},

    starting from the exact diagonal of the loss's Hessian at the network's output. What is dropped is
    every off-diagonal entry on the way: the last layer's diagonal is exact, and so is that of a
    network with one hidden layer if the loss's Hessian is diagonal. Entries may be negative. The
    parameters' diagonals are those of the loss as written, reduction included, summed over the batch.

    Every operation of the autograd graph is one F, with a rule from `backpack_ext.diagonals`;
    elementwise compositions (``x * sigmoid(x)``), root-mean-square norms and attention count as one.
    So any graph is covered, and all parameters.

    Args:
        gauss_newton: Leave the second term out: HesScale-GN, in ``hesscale_gn``.
        exact_penultimate: Behind a last linear layer with weight W, start from the exact diagonal
            ``r (q (W o W) - (q W)^2)`` of the cross-entropy with probabilities q, instead of crossing
            it.
        batch: Results for each datum, ``[N, *shape]``, in ``hesscale_batch``. They add up to those of
            the batch.
        on_curved_glue: What to do about operations without a rule that have a second derivative:
            ``"estimate"`` it by random signs, or ``"raise"``. Operations without a rule are warned
            about once.
        cross_terms: At an addition ``x + f(x)``, add ``2 h diag(J_f)``, which the recursion drops: exact
            for elementwise f, by random signs (unbiased) otherwise. It costs a backward pass through
            each residual branch.
        generator: Random generator for signs; a private one by default.
        savefield: Attribute of the parameters that receives the result.
        unsupported: With ``batch``, what to do about parameters whose data cannot be told apart:
            ``"raise"``, ``"warn"`` or ``"skip"``. Sums over the batch cover all parameters.

    Raises:
        ValueError: If ``on_curved_glue`` is neither of the two.

    References:
        Elsayed, Farrahi, Dangel, Mahmood (2024), Revisiting scalable Hessian diagonal approximations for
        applications in reinforcement learning. ICML.

    Example:
        >>> from backpack_ext import backpack, extend
        >>> layer, loss_fn = extend(nn.Linear(2, 1)), extend(nn.MSELoss(reduction="sum"))
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> with backpack(HesScale()):
        ...     loss_fn(layer(x), torch.zeros(2, 1)).backward()
        >>> layer.weight.hesscale  # 2 sum x^2
        tensor([[20., 40.]])
    """

    def __init__(
        self,
        gauss_newton: bool = False,
        exact_penultimate: bool = False,
        batch: bool = False,
        on_curved_glue: str = "estimate",
        cross_terms: bool = False,
        generator: torch.Generator | None = None,
        savefield: str | None = None,
        unsupported: str = "raise",
    ):
        options = (on_curved_glue, cross_terms, generator, savefield, unsupported)
        super().__init__("hesscale", gauss_newton, batch, *options)
        self.exact_penultimate = exact_penultimate


class BL89(DiagonalHessian):
    r"""Diagonal of the Hessian by Becker and Le Cun (1989), shaped like the parameter; in ``bl89``.

    The recursion of `HesScale`, from a cruder start: each elementwise part of the loss counts as a
    layer, so that the cross-entropy with targets t and probabilities q gives ``r t (q - q^2)``. Other
    losses have the same start as in `HesScale`.

    Args:
        gauss_newton: Leave second derivatives out, in ``bl89_gn``.
        batch: Results for each datum, ``[N, *shape]``, in ``bl89_batch``.
        on_curved_glue: As in `HesScale`.
        generator: Random generator for signs; a private one by default.
        savefield: Attribute of the parameters that receives the result.
        unsupported: With ``batch``, what to do about parameters whose data cannot be told apart:
            ``"raise"``, ``"warn"`` or ``"skip"``. Sums over the batch cover all parameters.

    Raises:
        ValueError: If ``on_curved_glue`` is neither ``"estimate"`` nor ``"raise"``.

    References:
        Becker, Le Cun (1989), Improving the convergence of back-propagation learning with second order
        methods.
    """

    layerwise = True

    def __init__(
        self,
        gauss_newton: bool = False,
        batch: bool = False,
        on_curved_glue: str = "estimate",
        generator: torch.Generator | None = None,
        savefield: str | None = None,
        unsupported: str = "raise",
    ):
        options = (on_curved_glue, False, generator, savefield, unsupported)
        super().__init__("bl89", gauss_newton, batch, *options)
