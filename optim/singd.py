"""Inverse-free natural gradient: SINGD, INGD and IKFAC."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from curvature import DiagonalMatrix, StructuredMatrix
from curvature.outer import DiagonalPlus, Outer, outer, outer_for_few
from optim.bucket import SMALL, Bucket, Slot
from optim.directions import Direction, Part, Sides, TwoSided
from optim.layers import Layer
from optim.natural import NaturalGradient
from optim.schedules import Interval, check_number
from optim.sharded import is_sharded
from optim.shared import shows_options
from optim.structure import Structure
from optim.updates import ikfac, projected_matrix, projected_moment, singd

LrCov = float | Callable[[int], float]


class InverseFree(NaturalGradient):
    """Base class of optimizers that keep K and C, and precondition with both times their transposes."""

    coordinates: ClassVar[Mapping[str, str]] = {"A": "K", "B": "C"}
    copied = (*NaturalGradient.copied, "lr_cov")

    def __init__(self, params: Any, defaults: dict[str, Any], lr_cov: LrCov, **options: Any):
        if lr_cov is None:
            raise ValueError(f"{type(self).__name__}: lr_cov=None; expected a number, or a function.")
        self.lr_cov = lr_cov if callable(lr_cov) else None
        super().__init__(params, {**defaults, "lr_cov": None if callable(lr_cov) else lr_cov}, **options)

    def slots(self, group: dict, structures: tuple[Structure, Structure]) -> dict[str, Slot]:
        """Return K and C."""
        first, second = structures
        return {"K": Slot("A", first, True), "C": Slot("B", second, True)}

    def _project(
        self, M: StructuredMatrix | None, x: Tensor, scale: float, structure: Structure
    ) -> StructuredMatrix:
        return projected_moment(M, x, scale, structure)

    def _project_formed(
        self, M: StructuredMatrix | None, A: Tensor, structure: Structure
    ) -> StructuredMatrix:
        return projected_matrix(M, A, structure)

    def _lr_cov_of(self, group: dict) -> float:
        """Return the step size of K and C at this refresh.

        Raises:
            ValueError: If a function returned no number >= 0.
        """
        if group["lr_cov"] is not None:
            return group["lr_cov"]
        count = self._clock["refreshes"]
        value = self.lr_cov(count)
        check_number(type(self).__name__, f"lr_cov({count})", value)
        return float(value)

    def _precondition(self, bucket: Bucket, group: dict, G: Tensor) -> Tensor:
        left, right = self._cached(bucket, *self._makes(bucket))
        return right.rmatmul(left.matmul(G))

    def _makes(self, bucket: Bucket) -> tuple[Callable[[StructuredMatrix], Outer], ...]:
        """Return what to hold of C and of K to multiply gradients with."""
        o, i = bucket.form.rows, bucket.form.columns
        # a large side that meets few vectors, such as the inputs of a layer with ten outputs
        return (outer_for_few if i < o / 2 else outer), (outer_for_few if o < i / 2 else outer)

    def _cached(self, bucket: Bucket, *makes: Callable[[StructuredMatrix], Any]) -> tuple[Any, Any]:
        """Return what two functions make of C and of K, once for as long as these stay."""
        if bucket.cache.get("makes") != makes:
            first, second = makes
            sides = first(bucket.matrices["C"]), second(bucket.matrices["K"])
            bucket.cache = {"makes": makes, "sides": sides}
        return bucket.cache["sides"]

    def _precondition_rows(
        self, bucket: Bucket, group: dict, b: Tensor, a: Tensor
    ) -> tuple[Tensor, Tensor]:
        left, right = self._cached(bucket, outer_for_few, outer_for_few)
        return left.rmatmul(b), right.rmatmul(a)

    def _layerwise(self, bucket: Bucket) -> Iterator[tuple[Tensor | Direction, ...]] | None:
        K, C = bucket.matrices["K"], bucket.matrices["C"]
        if isinstance(K, DiagonalMatrix) and isinstance(C, DiagonalMatrix):
            squares = self._cached(bucket, _squares, _squares)
            return self._scaled(bucket, *squares)
        if bucket.form.rows * bucket.form.columns < SMALL:
            return None  # to join gradient and bias is nothing there
        sides = self._cached(bucket, *self._makes(bucket))
        if all(isinstance(side, DiagonalPlus) for side in sides):
            return self._two_sided(bucket, *sides)
        return None

    def _scaled(self, bucket: Bucket, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield gradients whose rows and columns are multiplied with vectors."""
        if bucket.single:
            left, right = left.unsqueeze(0), right.unsqueeze(0)
        g = bucket.form.groups
        for k, layer in enumerate(bucket.layers):
            rows, columns = (v[k * g : (k + 1) * g] for v in (left, right))
            yield layer.scaled([self._grad(p) for p in layer.parameters], rows, columns)

    def _two_sided(
        self, bucket: Bucket, C: DiagonalPlus, K: DiagonalPlus
    ) -> Iterator[tuple[Tensor | Direction, ...]]:
        """Yield gradients as sums of what can be added to momenta at once."""
        form, count = bucket.form, len(bucket.layers) * bucket.form.groups
        if "pairs" not in bucket.cache:
            n = form.columns - (form.bias_axes is not None)
            pairs = [(C, K)] if bucket.single else [(C.at(j), K.at(j)) for j in range(count)]
            bucket.cache["pairs"] = [Sides(*pair, n) for pair in pairs]
        pairs = iter(bucket.cache["pairs"])
        for layer in bucket.layers:
            grads = [self._grad(p).to(bucket.dtype) for p in layer.parameters]
            G = form.axes.matrices(grads[0])
            bias = [None] * form.groups
            if layer.bias is not None:
                bias = form.bias_axes.matrices(grads[1])
            parts = [Part(next(pairs), *pair) for pair in zip(G, bias, strict=True)]
            found: Tensor | Direction = TwoSided(parts, form.axes)
            if any(map(is_sharded, layer.parameters)):
                found = found.tensor()
            if layer.bias is None:
                yield (found,)
            else:
                columns = [part.bias for part in parts]
                N = columns[0].unsqueeze(0) if len(columns) == 1 else torch.stack(columns)
                yield found, form.bias_axes.to_parameter(N)

    def _check_group(self, group: dict) -> None:
        name = type(self).__name__
        for key in ("lr", "damping", "weight_decay"):
            check_number(name, key, group[key])
        check_number(name, "momentum", group["momentum"], 0.0, 1.0, open_=True)
        if group["lr_cov"] is not None:
            check_number(name, "lr_cov", group["lr_cov"])

    def _put(self, bucket: Bucket, rows: Tensor | None, new: dict[str, StructuredMatrix]) -> None:
        """Write new matrices, unless K and C have diverged: then the old ones stay.

        What they are bounds what preconditioning makes of a gradient.
        """
        size = new["K"].square_norm() * new["C"].square_norm()
        if not isfinite(size.max().item()):
            warnings.warn(
                f"{type(self).__name__}: a refresh of {len(bucket.layers)} layer(s) diverged and is "
                "left out. lr_cov is too large for the curvature (of inputs that are not normalised?)"
                + self.remedy,
                stacklevel=2,
            )
            return
        for name, M in new.items():
            if name in bucket.slots:
                bucket.put(name, M, rows, self._write)

    remedy: ClassVar[str] = "; take a smaller one, or normalize=True."

    def _wide(self, bucket: Bucket, rows: Tensor | None, *names: str) -> list[StructuredMatrix]:
        """Return matrices in float32 or above, where small changes are not lost."""
        dtype = torch.promote_types(bucket.dtype, torch.float32)
        matrices = [bucket.get(name, rows) for name in names]
        return matrices if bucket.dtype == dtype else [M.to(dtype) for M in matrices]


def _squares(M: DiagonalMatrix) -> Tensor:
    """Return the diagonal of ``M M^T``."""
    return M.tensors[0].square()


class Adaptive(InverseFree):
    """Base class of `SINGD` and `INGD`: the trace of each side scales the other, momenta of K and C."""

    def slots(self, group: dict, structures: tuple[Structure, Structure]) -> dict[str, Slot]:
        """Return K and C, and their momenta unless these are forgotten at once."""
        first, second = structures
        slots = super().slots(group, structures)
        if group["alpha1"]:
            slots |= {"m_K": Slot("A", first), "m_C": Slot("B", second)}
        return slots

    def _refresh(
        self,
        bucket: Bucket,
        group: dict,
        plans: dict[Layer, None],
        A: StructuredMatrix,
        B: StructuredMatrix,
    ) -> None:
        rows = bucket.rows_of(list(plans))
        K, C = self._wide(bucket, rows, "K", "C")
        m_K = m_C = None
        if "m_K" in bucket.slots:
            m_K, m_C = self._wide(bucket, rows, "m_K", "m_C")
        new = singd(
            *(K, C, m_K, m_C, A, B),
            damping=group["damping"],
            alpha1=group["alpha1"],
            lr_cov=self._lr_cov_of(group),
            normalize=group["normalize"],
        )
        self._put(bucket, rows, dict(zip(("K", "C", "m_K", "m_C"), new, strict=True)))

    def choice(self, group: dict) -> bool:
        """Return whether K and C have momenta."""
        return bool(group["alpha1"])

    def _check_group(self, group: dict) -> None:
        super()._check_group(group)
        check_number(type(self).__name__, "alpha1", group["alpha1"], 0.0, 1.0, open_=True)


class SINGD(Adaptive):
    r"""Structured inverse-free natural gradient descent.

    Each affine layer (its weight W and bias, joined as the last column) has two small matrices K
    and C of a chosen structure, which start at the identity. Every ``interval`` steps they follow the
    curvature :math:`B \otimes A` of the layer, as `backpack_ext.KFAC` defines A and B, without ever
    forming or inverting these: with :math:`H_K = P(K^T A K)`, :math:`H_C = P(C^T B C)`, P the
    projection of `StructuredMatrix.project`, and tr the trace divided by the dimension,

    .. math::
        m_K &\leftarrow \alpha_1 m_K + \tfrac{1}{2} [\operatorname{tr}(H_C) H_K
            + \lambda \operatorname{tr}(C^T C) P(K^T K) - I], & K &\leftarrow K - \beta_1 K m_K \\
        m_C &\leftarrow \alpha_1 m_C + \tfrac{1}{2} [\operatorname{tr}(H_K) H_C
            + \lambda \operatorname{tr}(K^T K) P(C^T C) - I], & C &\leftarrow C - \beta_1 C m_C

    and each step is

    .. math::
        V \leftarrow \mu V + C C^T \nabla_W \ell \; K K^T + w W, \qquad W \leftarrow W - \eta V.

    .. code-block:: python

        model, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
        opt = SINGD(model, lr=1e-3, structure="diagonal")
        for x, y in loader:
            opt.zero_grad()
            with backpack(*opt.extensions()):  # () between refreshes: those steps cost a plain backward
                loss_fn(model(x), y).backward()
            opt.step()

    **What it trains.** All parameters. Layers with Kronecker factors are those of `backpack_ext.KFAC`:
    linear layers, convolutions, embeddings (K diagonal), the projections of attention, weights in
    functional calls. All others (norms, class tokens, a weight that is read in two ways such as an
    embedding tied to the output) have ``fallback``. A layer that a pass does not reach keeps its K, C.

    **Gradient accumulation**: what backward passes gather adds up, as gradients do, until ``step`` or
    ``zero_grad`` (of the optimizer, or of the model if it sets gradients to None).

    **Mixed precision**: K, C and V are at least float32 by default. With a ``GradScaler`` activate
    ``backpack(..., grad_scaler=scaler)``: without it the statistics are those of the scaled loss, some
    10,000 times too large. A step in which a gradient or a
    statistic is not finite is skipped, changes nothing, and is counted in ``skipped``.

    **Data parallelism**: see ``process_group``. A model wrapped by ``DistributedDataParallel`` averages
    gradients over processes; the statistics are those of the same objective, the mean over the processes
    of their losses: B is averaged, A is averaged by rows. Where shards are unequal and the loss of the
    whole batch is meant, multiply each process's mean loss by its number of terms times the number of
    processes over the number of all terms; that corrects gradient and statistics alike.

    **State**, per weight: ``K.0``, ``K.1``, ..., ``C.0``, ..., ``m_K.0``, ... (the tensors of the
    structured matrices, ``[g, ...]`` for g groups, views of stacks of layers of equal shape) and
    ``momentum_buffer``; see `factors`. It loads with ``torch.load``'s defaults. A number in each group
    says how many steps were taken.

    Args:
        model_or_params: The model (extended by `backpack_ext.extend`, or to be), its parameters, or
            parameter groups. With a model its layers are known before the first backward pass.
        lr: Step size eta.
        momentum: Decay mu of V.
        damping: :math:`\lambda`, in the units of the curvature.
        alpha1: Decay :math:`\alpha_1` of K's and C's momenta (Lin et al., Riemannian momentum).
        weight_decay: Coefficient w, which multiplies W and enters the momentum.
        interval: Steps between refreshes, or a function of the step (`optim.schedules.early_frequent`).
        lr_cov: Step size :math:`\beta_1` of K and C, or a function of the number of refreshes so far.
        structure: A name in `curvature.STRUCTURES`, ``(name, {option: value})``, or a pair of these, for
            K and for C. None: the fallback trains the group.
        approx: ``"reduce"`` or ``"expand"``: how positions that share a weight are treated, see
            `backpack_ext.KFAC`.
        fisher: ``"empirical"`` (vectors of the backward pass itself), ``"mc"`` (samples) or ``"exact"``.
        mc_samples: Number of samples for ``"mc"``.
        normalize: Whether :math:`\beta_1` is divided by :math:`\max(1, \|m\|_F)`, and the brackets have
            :math:`\tfrac{1}{2} (1 - \alpha_1)` in front. It makes large ``lr_cov`` safe.
        joint_bias: Whether biases are columns of their weights. If not, the fallback trains them.
        factor_dtype: Data type of the factors, K, C and their momenta; the parameter's, but at least
            float32, if None. A refresh is computed in float32 or above.
        fallback: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"rmsprop"``, or a class of optimizers.
        fallback_lr: Its step size, scaled as a schedule scales ``lr``, relative to the ``lr`` given
            here; the group's ``lr`` if None.
        fallback_options: Its other options; the weight decay is the group's unless given here.
        loss_terms: Number of terms that the loss is a mean over (1 for a sum), for
            ``fisher="empirical"`` with a loss that is not extended; over all backward passes of a step
            together. If None, each loss says it.
        process_group: Processes that train one model on different data.
        placement: With several processes, each layer is refreshed by one of them. ``"communication"``:
            which broadcasts its matrices after each refresh; all processes keep them. ``"memory"``:
            which alone keeps them, but for the K and C that statistics are projected with, and
            broadcasts the layer's preconditioned gradient in each step.
        stochastic_rounding: Whether parameters and matrices in half precision are rounded at random,
            so that small changes add up.
        generator: Random generator for ``fisher="mc"``; a private one by default.
        maximize: Whether to follow the gradient upwards.
        precondition: What the step multiplies with K and C. ``"gradient"``: each layer's gradient.
            ``"rows"``: its factors. A gradient is :math:`G = g^T a`, of the gradients g at the outputs
            and the inputs a, one row for each position of each datum, so that
            :math:`C C^T G K K^T = (g C C^T)^T (a K K^T)`: less work where rows are fewer than the
            layer's inputs and outputs. ``"auto"``: for each layer what is less, by a count of
            multiply-adds (`optim.costs`). See "Rows" in `SINGD`.

    **Rows.** They are kept from the backward pass to the step, so ``extensions()`` is not empty between
    refreshes where a layer has them. Whatever is done to gradients in between is respected: each step
    multiplies gradient and rows with two random vectors, and a gradient that is not a multiple of their
    product, up to rounding, is taken as it is. So are those of several backward passes, of weights that
    are used several times, of embeddings, of sharded parameters, of several processes, and those
    computed in less precision than float32 (autocast, TF32, half types), where rounding could hide a
    change. Clipping by the norm and gradient scalers multiply gradients, which rows allow.

    As the extension of rows is active in these passes, they have to be ones that extensions can read:
    an empty batch with ``reduction="sum"``, or `torch.func.functional_call` with plain tensors, raises
    there too, not only when a refresh is due. ``precondition="gradient"`` needs nothing in between.

    Attributes:
        skipped: Number of steps that were skipped.
        rejected: How often rows of a layer were kept in vain, as something had changed its gradient, or
            as squares of rows under- or overflow.
            Where no layer's are of use they are not tried before the next refresh.

    Raises:
        ValueError: If an option is out of its range, or a structure unknown.

    References:
        Lin et al. (2024), Structured inverse-free natural gradient: memory-efficient and numerically
        stable KFAC; Lin et al. (2023), Simplifying momentum-based positive-definite submanifold
        optimization with applications to deep learning (INGD); Eschenhagen et al. (2023),
        Kronecker-factored approximate curvature for modern neural network architectures.

    Example:
        Two steps on least squares. K and C have moved from the identity:

        >>> from backpack_ext import backpack, extend
        >>> model, loss_fn = extend(nn.Linear(2, 1)), extend(nn.MSELoss())
        >>> opt = SINGD(model, lr=0.1, interval=1, structure="diagonal")
        >>> X, y = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.ones(2, 1)
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     with backpack(*opt.extensions()):
        ...         loss_fn(model(X), y).backward()
        ...     opt.step()
        >>> sorted(opt.state[model.weight])
        ['C.0', 'K.0', 'kind', 'm_C.0', 'm_K.0', 'momentum_buffer']
        >>> opt.factors(model.weight)["K"]
        DiagonalMatrix(shape=(1, 3, 3), dtype=torch.float32)
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        *,
        interval: Interval = 10,
        lr_cov: LrCov = 1e-2,
        structure: Any = "dense",
        approx: str = "reduce",
        fisher: str = "empirical",
        mc_samples: int = 1,
        normalize: bool = False,
        joint_bias: bool = True,
        factor_dtype: torch.dtype | None = None,
        fallback: str | type[Optimizer] = "adamw",
        fallback_lr: float | None = None,
        fallback_options: Mapping[str, Any] | None = None,
        loss_terms: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        placement: str = "communication",
        stochastic_rounding: bool = False,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        precondition: str = "auto",
    ):
        super().__init__(
            model_or_params,
            {
                "lr": lr,
                "momentum": momentum,
                "damping": damping,
                "alpha1": alpha1,
                "weight_decay": weight_decay,
                "structure": structure,
                "normalize": normalize,
            },
            lr_cov,
            interval=interval,
            approx=approx,
            fisher=fisher,
            mc_samples=mc_samples,
            joint_bias=joint_bias,
            factor_dtype=factor_dtype,
            fallback=fallback,
            fallback_lr=fallback_lr,
            fallback_options=fallback_options,
            loss_terms=loss_terms,
            process_group=process_group,
            placement=placement,
            stochastic_rounding=stochastic_rounding,
            generator=generator,
            maximize=maximize,
            precondition=precondition,
        )


@shows_options(NaturalGradient, SINGD)
class INGD(Adaptive):
    r"""Inverse-free natural gradient descent: `SINGD` with dense K and C.

    At its fixed point without damping, :math:`K K^T \otimes C C^T` is the inverse of
    :math:`A \otimes B`.

    Args:
        model_or_params: As for `SINGD`, and so are all other arguments.
        lr: Step size.
        momentum: Decay of V.
        damping: :math:`\lambda`.
        alpha1: Decay of K's and C's momenta.
        weight_decay: Coefficient w.
        interval: Steps between refreshes.
        lr_cov: Step size :math:`\beta_1` of K and C.
        normalize: Whether to limit the steps of K and C.
        **shared: The others: ``approx`` to ``precondition``.

    References:
        Lin et al. (2023), Simplifying momentum-based positive-definite submanifold optimization with
        applications to deep learning.

    Example:
        >>> from backpack_ext import extend
        >>> INGD(extend(nn.Linear(2, 1)), lr=0.1).param_groups[0]["structure"]
        'dense'
    """

    structures = ("dense",)

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        alpha1: float = 0.5,
        weight_decay: float = 0.0,
        *,
        interval: Interval = 10,
        lr_cov: LrCov = 1e-2,
        normalize: bool = False,
        **shared: Any,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "alpha1": alpha1,
            "weight_decay": weight_decay,
            "structure": "dense",
            "normalize": normalize,
        }
        super().__init__(model_or_params, defaults, lr_cov, interval=interval, **shared)


@shows_options(NaturalGradient, SINGD)
class IKFAC(InverseFree):
    r"""Inverse-free KFAC: K and C follow their own side of the curvature alone.

    .. math::
        K \leftarrow K - \tfrac{\beta_1}{2} K [H_K + \lambda P(K^T K) - I], \qquad
        C \leftarrow C - \tfrac{\beta_1}{2} C [H_C + \lambda P(C^T C) - I],

    with :math:`H_K = P(K^T A K)`, :math:`H_C = P(C^T B C)`. For dense structures
    :math:`(K K^T)^{-1}` is KFAC's moving average of :math:`A + \lambda I` with weight :math:`\beta_1`,
    up to :math:`O(\beta_1)`, and alike for B. All else is as in `SINGD`.

    Args:
        model_or_params: As for `SINGD`, and so are all other arguments.
        lr: Step size.
        momentum: Decay of V.
        damping: :math:`\lambda`, added to A and to B.
        weight_decay: Coefficient w.
        interval: Steps between refreshes.
        lr_cov: Step size :math:`\beta_1` of K and C.
        structure: Of K and C.
        **shared: The others: ``approx`` to ``precondition``.

    References:
        Lin et al. (2024), Structured inverse-free natural gradient: memory-efficient and numerically
        stable KFAC.

    Example:
        >>> from backpack_ext import extend
        >>> opt = IKFAC(extend(nn.Linear(2, 1)), lr=0.1, structure=("diagonal", "dense"))
        >>> [group["structure"] for group in opt.param_groups]
        [('diagonal', 'dense')]
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        interval: Interval = 10,
        lr_cov: LrCov = 1e-2,
        structure: Any = "dense",
        **shared: Any,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "damping": damping,
            "weight_decay": weight_decay,
            "structure": structure,
        }
        super().__init__(model_or_params, defaults, lr_cov, interval=interval, **shared)

    def _refresh(
        self,
        bucket: Bucket,
        group: dict,
        plans: dict[Layer, None],
        A: StructuredMatrix,
        B: StructuredMatrix,
    ) -> None:
        rows = bucket.rows_of(list(plans))
        K, C = self._wide(bucket, rows, "K", "C")
        new = ikfac(K, C, A, B, damping=group["damping"], lr_cov=self._lr_cov_of(group))
        self._put(bucket, rows, dict(zip(("K", "C"), new, strict=True)))
