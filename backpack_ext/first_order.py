r"""Per-sample gradients and their moments, with BackPACK's names, savefields and scaling.

All of them are functions of the per-sample gradients :math:`G_n = \partial (r \sum_t \ell_{nt})`,
the share of datum n in the gradient of the loss as written (for a mean loss they carry its 1/N).
None materialises them unless it has to: see `backpack_ext.normal`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from backpack_ext import normal
from backpack_ext.errors import UnsupportedError
from backpack_ext.extension import Extension, Vectors
from backpack_ext.share import Part, Share
from backpack_ext.unit import Unit, stack_inputs, stack_vectors


class PerSample(Extension):
    """A function of per-sample vectors that adds up over columns v.

    A parameter of one layer is treated in factored form (`of_weight`). A parameter that several
    layers use in different roles (an embedding tied to a head) gets the sum of its per-sample
    vectors over the roles, and the function of that (`of_grads`).
    """

    vectors = Vectors("gradient")

    @abstractmethod
    def of_weight(self, a, b: Tensor) -> Tensor:
        """Return the quantity of a weight from ``a[g,n,s,i]`` and ``b[g,v,n,s,o]``.

        Returns:
            ``[..., g, o, i]`` if `per_entry`, else ``[g, ...]``: the groups' shares.
        """

    @abstractmethod
    def of_grads(self, G: Tensor) -> Tensor:
        """Return the quantity from per-sample vectors ``G[v,n,g,o,i]``, laid out likewise."""

    def of_bias(self, b: Tensor) -> Tensor:
        """Return the quantity of a bias from ``b[g,v,n,s,o]``, laid out likewise, in its own memory."""
        return self.of_grads(normal.bias_per_sample(b, copy=False))

    # Whether the result is laid out like the parameter (per entry) or by datum only.
    per_entry = True
    # Whether the results of some data at a time, joined, are the result of all, at no extra cost.
    in_parts = True

    def absorb(self, store: dict, unit: Unit) -> None:
        """Add one layer's quantity, or its per-sample vectors if other roles are to come."""
        for role, p in unit.parameters.items():
            entry = store.get(id(p))
            if entry is None:
                entry = store[id(p)] = _Entry(p, unit.batch)
            if self._other_roles(unit, role, p):
                entry.add_grads(unit.grads(role))
            elif unit.rule.elementwise:
                self._add_whole(entry, unit.grads(role))
            elif role == "bias":
                entry.add(self._placed(self.of_bias(unit.b), unit, role))
            else:
                G = unit.weight_grads
                if G is not None and self.takes_grads(unit.a, unit.b):
                    entry.add(self._placed(self.of_grads(G), unit, role))
                    continue
                parts = unit.input_parts() if self.in_parts else [(slice(None), unit.a)]
                values = (self.of_weight(a, unit.b[:, :, data]) for data, a in parts)
                sums = type(self).join is PerSample.join  # of parts, in the memory of the first one
                join = Tensor.add_ if sums else self.join
                entry.add(reduce(join, (self._placed(value, unit, role) for value in values)))

    def takes_grads(self, a: Tensor, b: Tensor) -> bool:
        """Whether per-sample vectors that others have formed are of use."""
        return True

    def absorb_all(self, store: dict, units: list[Unit]) -> None:
        """Treat layers of equal shape as the groups of one layer."""
        unit = units[0]
        alone = len(units) == 1 or unit.sites[0].shared or unit.rule.elementwise
        if alone or ("weight" in unit.parameters and isinstance(unit.a, normal.OneHot)):
            super().absorb_all(store, units)
            return
        b = stack_vectors(units)
        for role in unit.parameters:
            if role == "bias":
                value = self.of_bias(b)
            else:
                value = self.of_weight(stack_inputs(units), b)
            axis = value.dim() - 3 if self.per_entry else 0
            for u, part in zip(units, value.split(unit.groups, dim=axis), strict=True):
                p = u.parameters[role]
                entry = store.get(id(p))
                if entry is None:
                    entry = store[id(p)] = _Entry(p, u.batch)
                entry.add(self._placed(part, u, role))

    def _placed(self, value: Tensor, unit: Unit, role: str) -> Tensor:
        """Bring a quantity to the parameter's shape, or add up the groups' shares."""
        if self.per_entry:
            return unit.placed(role, value)
        return value[0] if len(value) == 1 else value.sum(0)

    @staticmethod
    def _other_roles(unit: Unit, role: str, p: nn.Parameter) -> bool:
        """Whether live calls of other layers use the parameter."""
        return unit.sites[0].uses_of(role, p) > len(unit.sites)

    def settle(self, store: dict) -> None:
        """Evaluate what waited for other roles: all of them have brought their vectors."""
        for entry in store.values():
            if entry.grads is not None:
                self._add_whole(entry, entry.grads)
                entry.grads = None

    def _add_whole(self, entry: _Entry, G: Tensor) -> None:
        """Add the quantity of per-sample vectors ``G[v,n,*parameter.shape]``."""
        v, n = G.shape[:2]
        value = self.of_grads(G.reshape(v, n, 1, 1, -1))
        if self.per_entry:
            entry.add(value.reshape((*value.shape[:-3], *entry.parameter.shape)))
        else:
            entry.add(value[0])

    def finish(self, store: dict) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the sums."""
        return [(entry.parameter, entry.value) for entry in store.values()]

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Add (or concatenate along n) the results of a batch, put on the total's scale."""
        for entry in store.values():
            other = total.setdefault(id(entry.parameter), _Entry(entry.parameter, 0))
            value = self.rescaled(entry.value, weight)
            other.value = value if other.value is None else self.join(other.value, value)
            other.batch += entry.batch

    def shares(self, store: dict, names: Callable[[nn.Parameter], str]) -> list[Share]:
        """Add up values; and the number of data."""
        found = []
        for entry in store.values():
            name, parts = names(entry.parameter), self.parts(entry.value)
            found.append(Share((name,), {"weight": name}, None, parts, {"batch": entry.batch}))
        return found

    def of_shares(self, sums: list[Share], parameters: Mapping[str, nn.Parameter]) -> dict:
        """Return a store of sums."""
        store = {}
        for share in sums:
            p = parameters[share.key[-1]]
            entry = store[id(p)] = _Entry(p, int(share.counts["batch"]))
            entry.value = self.of_parts({name: part.tensor for name, part in share.parts.items()})
        return store

    def parts(self, value: Tensor) -> dict[str, Part]:
        """Return what of a value adds up over processes."""
        return {"value": Part(value, self.power)}

    def of_parts(self, sums: dict[str, Tensor]) -> Tensor:
        """Return the value that has some parts."""
        return sums["value"]

    def rescaled(self, value: Tensor, weight: float) -> Tensor:
        """Return the quantity of ``weight`` times the loss."""
        return value * weight**self.power

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """Join the results of two batches."""
        return one + other


class _Entry:
    """What one parameter has accumulated."""

    def __init__(self, parameter: nn.Parameter, batch: int):
        self.parameter, self.batch = parameter, batch
        self.value: Tensor | None = None
        self.grads: Tensor | None = None  # [v, n, *parameter.shape]

    def add(self, value: Tensor) -> None:
        self.value = value if self.value is None else self.value + value

    def add_grads(self, G: Tensor) -> None:
        self.grads = G if self.grads is None else self.grads + G


class BatchGrad(PerSample):
    """Per-sample gradients, ``[N, *parameter.shape]`` in ``grad_batch``.

    ``grad_batch[n]`` is the share of datum n in the gradient of the loss as written: for a mean
    loss it carries the 1/N, and ``grad_batch.sum(0)`` is the gradient.

    Args:
        subsampling: Indices of the data to compute; all by default.
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".

    Raises:
        ValueError: If an index lies outside of the batch (in the backward pass).

    Example:
        >>> from backpack_ext import backpack, extend
        >>> model, loss_fn = extend(nn.Linear(1, 1, bias=False)), extend(nn.MSELoss(reduction="sum"))
        >>> _ = nn.init.ones_(model.weight)
        >>> X = torch.tensor([[1.0], [2.0]])
        >>> with backpack(BatchGrad()):
        ...     loss_fn(model(X), torch.zeros(2, 1)).backward()
        >>> model.weight.grad_batch.flatten()  # 2 x^2
        tensor([2., 8.])
    """

    forms_grads = True
    per_datum = True
    in_parts = False  # joining would copy what is as large as the inputs

    def __init__(
        self,
        subsampling: Sequence[int] | None = None,
        savefield: str = "grad_batch",
        unsupported: str = "raise",
    ):
        super().__init__(savefield, unsupported)
        self.subsampling = None if subsampling is None else list(subsampling)

    def absorb(self, store: dict, unit: Unit) -> None:
        """Add one layer's per-sample gradients."""
        index = self.subsampling
        if index == [] or (index is not None and any(not -unit.batch <= k < unit.batch for k in index)):
            raise ValueError(f"BatchGrad: subsampling={index} for a batch of {unit.batch}.")
        super().absorb(store, unit)

    def of_weight(self, a, b):
        """``sum_s b a`` for the chosen data, ``[n,g,o,i]``."""
        if self.subsampling is not None:
            index = torch.tensor(self.subsampling, device=b.device)
            a = a.select(index) if isinstance(a, normal.OneHot) else a[:, index]
            b = b[:, :, index]
        return normal.per_sample(a, b)[0]

    def of_bias(self, b):
        """``sum_s b`` for the chosen data."""
        return self.of_grads(normal.bias_per_sample(b))

    def of_grads(self, G):
        """``G[0]``, the chosen data."""
        return G[0] if self.subsampling is None else G[0, self.subsampling]

    def join(self, one, other):
        """Concatenate along n."""
        return torch.cat([one, other])

    def over_batches(self):
        """Refuse sub-sampling: indices of one batch mean nothing for another."""
        if self.subsampling is not None:
            raise ValueError("BatchGrad: subsampling is for one batch, not for a data set.")
        return super().over_batches()


class BatchL2Grad(PerSample):
    """Squared Euclidean norms of the per-sample gradients, ``[N]`` in ``batch_l2``.

    Scaling as in `BatchGrad`: for a mean loss the norms are those of the gradients times 1/N.

    Args:
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
    """

    per_entry = False
    power = 2
    per_datum = True

    def __init__(self, savefield: str = "batch_l2", unsupported: str = "raise"):
        super().__init__(savefield, unsupported)

    def of_weight(self, a, b):
        """``sum_oi G**2``, through a Gram product where that is cheaper."""
        return normal.square_norms(a, b)[:, 0]

    def of_grads(self, G):
        """``sum_oi G**2``."""
        return G[0].square().sum((2, 3)).T

    def join(self, one, other):
        """Concatenate along n."""
        return torch.cat([one, other])


class BatchDotGrad(PerSample):
    """Pairwise dot products of the per-sample gradients, ``[N, N]`` in ``batch_dot``.

    Scaling as in `BatchGrad`: for a mean loss each factor carries 1/N.

    Args:
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
    """

    per_entry = False
    power = 2
    forms_grads = True
    in_parts = False  # a datum's dot products are with all others

    def __init__(self, savefield: str = "batch_dot", unsupported: str = "raise"):
        super().__init__(savefield, unsupported)

    def of_weight(self, a, b):
        """``sum_oi G_n G_m``, through a Gram product where that is cheaper."""
        return normal.dots(a, b)[:, 0]

    def takes_grads(self, a, b):
        """Unless the Gram route is cheaper even so."""
        s, i, o = a.shape[2], a.shape[3], b.shape[4]
        return s * s * (i + o) >= i * o

    def of_grads(self, G):
        """``sum_oi G_n G_m``."""
        return normal.dots_of(G)[:, 0]

    def check_processes(self):
        """Refuse: pairs come from different processes."""
        raise UnsupportedError(
            "BatchDotGrad: dot products between data of different processes need the gradients of both. "
            "Use it without process_group for the pairs within each process; or BatchGrad, gather the "
            "gradients, and multiply."
        )

    def over_batches(self):
        """Collect the gradients themselves: pairs may come from different batches."""
        return BatchGrad(savefield=self.savefield, unsupported=self.unsupported), _pairwise


def _pairwise(G: Tensor) -> Tensor:
    """Return all dot products of the rows of ``G[n,...]``."""
    G = G.flatten(1)
    return G @ G.mT


class SumGradSquared(PerSample):
    """Sum over the batch of squared per-sample gradients, shaped like the parameter.

    In ``sum_grad_squared``. Scaling as in `BatchGrad`: for a mean loss each square carries 1/N^2.

    Args:
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
    """

    power = 2
    forms_grads = True

    def __init__(self, savefield: str = "sum_grad_squared", unsupported: str = "raise"):
        super().__init__(savefield, unsupported)

    def of_weight(self, a, b):
        """``sum_vn G**2``."""
        return normal.square_sum(a, b)

    def of_grads(self, G):
        """``sum_vn G**2``."""
        return G.square().sum((0, 1))


class Variance(PerSample):
    r"""Variance of the per-sample gradients over the batch, shaped like the parameter.

    .. math::  \frac1N \sum_n G_n^2 - \Big(\frac1N \sum_n G_n\Big)^2

    In ``variance``. Scaling as in `BatchGrad`: for a mean loss G carries 1/N, so the variance of
    the data's own gradients is ``N**2`` times this.

    Args:
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
    """

    forms_grads = True

    def __init__(self, savefield: str = "variance", unsupported: str = "raise"):
        super().__init__(savefield, unsupported)

    def of_weight(self, a, b):
        """``sum_n G`` and ``sum_n G**2``, stacked."""
        first = normal.per_sample_sum(a, b)
        return torch.stack([first, normal.square_sum(a, b)])

    def of_grads(self, G):
        """``sum_n G`` and ``sum_n G**2``, stacked."""
        return torch.stack([G.sum((0, 1)), G.square().sum((0, 1))])

    def finish(self, store: dict) -> list[tuple[nn.Parameter, Tensor]]:
        """Subtract the squared mean from the mean square."""
        results = []
        for entry in store.values():
            mean, square = entry.value.div_(entry.batch)
            results.append((entry.parameter, torch.addcmul(square, mean, mean, value=-1)))
        return results

    def parts(self, value):
        """The first moment is linear in the loss, the second quadratic."""
        return {"first": Part(value[0], 1), "second": Part(value[1], 2)}

    def of_parts(self, sums):
        """Stack them."""
        return torch.stack([sums["first"], sums["second"]])

    def rescaled(self, value, weight):
        """The first moment is linear in the loss, the second quadratic."""
        return torch.stack([value[0] * weight, value[1] * weight**2])
