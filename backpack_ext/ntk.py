r"""The empirical neural tangent kernel, from factored Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backpack_ext.attach import tie
from backpack_ext.context import backpack
from backpack_ext.errors import RecordingError
from backpack_ext.extend import extend_once
from backpack_ext.extension import Vectors, check_indices
from backpack_ext.factor_extension import FactorExtension
from backpack_ext.layer_factor import LayerFactor
from backpack_ext.loss_call import LossCall
from backpack_ext.losses import OutputsRule
from curvature.factor import DenseFactor, Factor, Stacked


class NTKPass(FactorExtension):
    """Keeps the factor of unit vectors at the model's output."""

    vectors = Vectors("exact")

    def __init__(self, unsupported: str, max_columns: int):
        super().__init__("_ntk", unsupported)
        self.max_columns, self.store = max_columns, None

    def finish(self, store: dict) -> list:
        """Keep the store; nothing lands on parameters."""
        self.store = store.get("columns")
        return []


@dataclass(eq=False)
class Features:
    """The Jacobian of a model's outputs at some inputs, as a factor.

    Args:
        factor: :math:`J^T`, ``[P, (C N)]``; columns are ordered by output, data fastest.
        data: Number of data N.
        outputs: Number of outputs C of a datum.
        parameters: The parameters that the Jacobian is by, in the order of the factor.
    """

    factor: Factor
    data: int
    outputs: int
    parameters: tuple[nn.Parameter, ...]


class NTK:
    r"""The empirical neural tangent kernel :math:`K_{nm,cd} = \nabla f_c(x_n) \cdot \nabla f_d(x'_m)`.

    Neither Jacobians nor per-sample gradients are formed as a whole: one sweep with unit vectors at
    the output brings ``b[v,n,s,o]`` to each layer, and with the layer's inputs a the kernel is that of
    `LowRankGGN`, with another seed. Only the factors of the two sets of inputs are held; those of
    convolutions hold the layer's input, whose patches are formed for one layer at a time.

    Args:
        model: The model; it is extended if it is not yet. All its trainable parameters that its output
            depends on count. Call ``eval()`` on it if it has dropout: else the kernel is that of the
            network with one draw of masks.
        outputs: Which outputs: ``"full"``, all pairs of outputs; ``"trace"``, the sum over equal outputs
            :math:`\sum_c K_{nm,cc}`, with fewer products than all pairs, but as many vectors; or indices
            of outputs, all pairs of these. A datum's outputs are flattened.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
        max_columns: It refuses beyond that many outputs per datum.

    Raises:
        ValueError: If ``outputs`` is none of these.

    References:
        Jacot, Gabriel & Hongler (2018), Neural tangent kernel: convergence and generalization in neural
        networks.

    Example:
        >>> from torch import nn
        >>> from backpack_ext import NTK
        >>> X = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> NTK(nn.Linear(2, 3), outputs="trace").gram(X)  # 3 (X X^T + 1)
        tensor([[ 6.,  6.],
                [ 6., 18.]])
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: str | Sequence[int] = "full",
        unsupported: str = "raise",
        max_columns: int = 1000,
    ):
        if isinstance(outputs, str):
            if outputs not in ("full", "trace"):
                raise ValueError(
                    f"NTK: outputs={outputs!r}; expected 'full', 'trace' or indices of outputs."
                )
            self.indices = None
        else:
            self.indices = check_indices("NTK", "outputs ('full', 'trace', or indices)", outputs)
        self.model, self.outputs = extend_once(model), outputs
        self.unsupported, self.max_columns = unsupported, max_columns

    def features(self, x: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Features:
        """Return the model's Jacobian at some inputs, as a factor over its parameters.

        Args:
            x: The inputs ``[N, ...]``.
            parameters: Values of parameters (and buffers), by name as in ``state_dict``, in place of the
                model's own; the model is as before afterwards.

        Raises:
            KeyError: If a name is none of the model's.
            ValueError: If a value has another shape, or an index is none of a datum's outputs.
            RecordingError: If the output depends on no trainable parameter.
            UnsupportedError: If a layer couples the data (batch norm in training mode).
        """
        ext = NTKPass(self.unsupported, self.max_columns)
        with _parameters(self.model, parameters), torch.enable_grad(), backpack(ext):
            z = self.model(x)
            if not isinstance(z, Tensor) or not z.requires_grad:
                raise RecordingError(
                    "NTK: the model must return one tensor that depends on trainable parameters; it "
                    f"returned a {type(z).__name__}. Wrap it in a module that returns its logits."
                )
            value = z.sum()
            # only the rule is asked for anything: there is no loss
            call = LossCall(nn.MSELoss(reduction="sum"), z, z.detach())
            call.rule = OutputsRule(self.indices)
            tie(value, call)
            torch.autograd.grad(value, z)
        store = ext.store
        if store is None:
            raise RecordingError("NTK: the model's output depends on no parameter that a rule covers.")
        order = {id(p): k for k, p in enumerate(self.model.parameters())}
        reached = tuple(sorted(store.parameters, key=lambda p: order.get(id(p), len(order))))
        return Features(store.factor(reached), store.batch, sum(store.widths), reached)

    def gram(self, x1: Tensor | Features, x2: Tensor | Features | None = None) -> Tensor:
        """Return the kernel of two sets of inputs.

        Args:
            x1: Inputs ``[N, ...]``, or `features`.
            x2: Other inputs ``[M, ...]``, or features, of other values of the parameters maybe; x1 by
                default.

        Returns:
            ``[N, M, C, C]``, or ``[N, M]`` for ``outputs="trace"``.

        Raises:
            ValueError: If the two depend on different parameters, or in ``"trace"`` have different
                numbers of outputs.
        """
        one = x1 if isinstance(x1, Features) else self.features(x1)
        two = one if x2 is None else x2 if isinstance(x2, Features) else self.features(x2)
        if list(map(id, one.parameters)) != list(map(id, two.parameters)):
            raise ValueError(
                f"NTK: the two sets of inputs reach different parameters ({len(one.parameters)} and "
                f"{len(two.parameters)} of them): part of the model was frozen in between, or it "
                "chooses its layers by the input. Their kernel cannot be put together by layers."
            )
        if self.outputs == "trace" and one.outputs != two.outputs:
            raise ValueError(
                f"NTK: outputs='trace' of inputs with {one.outputs} and {two.outputs} outputs per datum "
                "is not defined. Use 'full', or inputs of one length."
            )
        if self.outputs == "trace":
            return _trace(one.factor, two.factor, one.data, two.data)
        K = one.factor.gram(two.factor)
        K = K.reshape(one.outputs, one.data, two.outputs, two.data)
        return K.permute(1, 3, 0, 2)


def _trace(one: Factor, two: Factor, N: int, M: int) -> Tensor:
    """Return the sum over equal outputs of ``J J'^T``, ``[N, M]``."""
    if isinstance(one, Stacked) and isinstance(two, Stacked):
        pairs = zip(one.parts, two.parts, strict=True)
        return sum(_trace(a, b, N, M) for a, b in pairs)
    if isinstance(one, LayerFactor) and isinstance(two, LayerFactor):
        return one.folded().gram(None if two is one else two.folded())
    if isinstance(one, DenseFactor) and isinstance(two, DenseFactor):
        rows, others = (
            f.rows.unflatten(0, (-1, k)).transpose(0, 1).flatten(1) for f, k in ((one, N), (two, M))
        )
        return rows @ others.mT
    # a parameter in several roles: their cross terms need all outputs
    K = one.gram(two).reshape(-1, N, one.columns // N, M)
    return K.diagonal(dim1=0, dim2=2).sum(-1)


@contextmanager
def _parameters(model: nn.Module, values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Have a model's parameters and buffers take other values; leave all as they were."""
    own = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    own |= buffers
    # a forward may change buffers: it gets copies
    new = {id(t): t.detach().clone() for t in buffers.values()}
    given: dict[int, tuple[str, Tensor]] = {}
    for name, value in ({} if values is None else values).items():
        t = own.get(name)
        if t is None:
            raise KeyError(f"NTK: the model has no parameter or buffer {name!r}.")
        if value.shape != t.shape:
            raise ValueError(
                f"NTK: {name} has shape {tuple(t.shape)}, the value given {tuple(value.shape)}."
            )
        first, other = given.setdefault(id(t), (name, value))
        if other is not value and not torch.equal(other, value):
            raise ValueError(f"NTK: {first} and {name} are one tensor, but their values given differ.")
        new[id(t)] = value.detach().to(t, copy=id(t) in new)
    before = {id(t): (t, t.data) for t in own.values() if id(t) in new}
    try:
        for key, (t, _) in before.items():
            t.data = new[key]
        yield
    finally:
        for t, data in before.values():
            t.data = data
