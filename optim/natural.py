"""The shell of optimizers whose preconditioners are Kronecker products of small matrices per layer."""

from __future__ import annotations

import copy
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from backpack_ext import Extension, extend
from backpack_ext.extend import is_extended
from curvature import DiagonalMatrix, StructuredMatrix
from curvature.precision import without_autocast
from optim.base import CurvatureOptimizer
from optim.bucket import Bucket, Slot
from optim.buckets import FALLBACK, JOINED, REFUSED, WEIGHT, Buckets
from optim.checkpoint import CLOCK, check_saved, loaded_entry, with_clock
from optim.directions import Direction
from optim.exchange import Exchange
from optim.fallback import Fallback
from optim.labels import labels
from optim.layers import Layer, Layers
from optim.momentum import momentum_step
from optim.placement import placement_of
from optim.rounding import copy_rounded_, seeded_generator
from optim.row_steps import PRECONDITION, Factors, RowSteps
from optim.rows import RowKeeper
from optim.schedules import Interval, check_interval, check_number, interval_at
from optim.sharded import is_sharded, like_parameter, local, whole
from optim.state import exact_loading, state_dtype
from optim.statistics import Moments, Statistics
from optim.structure import Structure, structures_of


class NaturalGradient(RowSteps, CurvatureOptimizer):
    """Base class: which layers there are, when to refresh, statistics, state, the step.

    Subclasses say which matrices a layer has (`slots`), what to keep of a moment (`_project`), how a
    refresh changes the matrices (`_refresh`), and how they act on a gradient (`_precondition`), or on
    what it is a product of (`RowSteps`).

    Args:
        params: A module, its parameters, or parameter groups.
        defaults: Options of groups.
        interval: Steps between refreshes.
        approx: ``"expand"`` or ``"reduce"``.
        fisher: ``"empirical"``, ``"mc"`` or ``"exact"``.
        mc_samples: Number of samples for ``"mc"``.
        joint_bias: Whether biases are columns of their weights; else the fallback trains them.
        factor_dtype: Data type of the matrices; that of the parameter, but at least float32, if None.
        fallback: What trains parameters without factors.
        fallback_lr: Its learning rate; the group's if None.
        fallback_options: Its other options.
        loss_terms: Number of terms of a mean loss; read from the loss if None.
        process_group: Processes over which statistics are averaged.
        placement: Where refreshes happen, and factors stay.
        stochastic_rounding: Whether half types are rounded at random.
        generator: Random generator for ``fisher="mc"``.
        maximize: Whether to follow the gradient upwards.
        precondition: ``"gradient"``, ``"rows"`` or ``"auto"``: what K and C are multiplied with.
    """

    # Names of structures that can be used; None for all.
    structures: ClassVar[tuple[str, ...] | None] = None

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        *,
        interval: Interval = 10,
        approx: str = "reduce",
        fisher: str = "empirical",
        mc_samples: int = 1,
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
        name = type(self).__name__
        self.interval = check_interval(name, "interval", interval)
        known = factor_dtype is None or isinstance(factor_dtype, torch.dtype)
        if not known or (factor_dtype is not None and not factor_dtype.is_floating_point):
            raise ValueError(f"{name}: factor_dtype={factor_dtype!r}; expected a floating-point type.")
        if fallback_lr is not None:
            check_number(name, "fallback_lr", fallback_lr)
        self.factor_dtype, self.fallback_lr = factor_dtype, fallback_lr
        self.stochastic_rounding, self.maximize = bool(stochastic_rounding), bool(maximize)
        self.fallback = Fallback(name, fallback, fallback_options, self.maximize)
        self.placement = placement_of(name, process_group, placement)
        if precondition not in PRECONDITION:
            raise ValueError(f"{name}: precondition={precondition!r}; expected one of {PRECONDITION}.")
        if precondition == "rows" and self.placement.size > 1:
            raise ValueError(
                f'{name}: precondition="rows" with {self.placement.size} processes, whose gradients are '
                'averages of what all have; expected "gradient" or "auto".'
            )
        self.precondition = precondition
        self._layers = Layers(bool(joint_bias))
        wide = None if factor_dtype is None else torch.promote_types(factor_dtype, torch.float32)
        self.statistics = Statistics(
            *(name, self, self._layers, approx, fisher, mc_samples, loss_terms, wide, generator)
        )
        self.statistics.rank = self.placement.rank  # processes are to draw different samples
        self._start()
        model = params if isinstance(params, nn.Module) else None
        super().__init__(model.named_parameters() if model is not None else params, defaults)
        self._check_alone(model)
        if model is not None:
            wrapped = _layers_of_wrapping(model)
            if not any(map(is_extended, wrapped)):
                warnings.warn(
                    f"{name}: the model was not extended; it is now, by backpack_ext.extend(model). "
                    "Extend the loss as well.",
                    stacklevel=_depth_of_caller(),
                )
                extend(model)
            self._layers.look_through(model)

    def _check_alone(self, model: nn.Module | None) -> None:
        """Refuse to train for one process what is seen to belong to several.

        Raises:
            ValueError: If so.
        """
        sizes = [p.device_mesh.size() for g in self.param_groups for p in g["params"] if is_sharded(p)]
        if isinstance(model, DistributedDataParallel):
            sizes.append(dist.get_world_size(model.process_group))
        if self.placement.size == 1 and max(sizes, default=1) > 1:
            raise ValueError(
                f"{type(self).__name__}: {max(sizes)} processes train the model, and each would have a "
                "preconditioner of its own. Pass process_group=torch.distributed.group.WORLD, or the "
                "group that they form."
            )

    def _start(self) -> None:
        """Set up what is not part of the state."""
        self._buckets = Buckets(self, self._layers, self.placement)
        # weights with loaded factors whose layers have not been seen yet: the next pass shows them
        self._lost: set[Tensor] = set()
        self._rounding: dict[tuple[str, torch.device], tuple] = {}  # generators of this step
        self.rows = RowKeeper(self)
        self._products: dict[Layer, Factors] = {}  # of this step
        # structures of groups, by their id, and how they were written
        self._sides: dict[int, tuple[Any, tuple[Structure, Structure] | None]] = {}

    # ------------------------------------------------------------------ what subclasses say

    @abstractmethod
    def slots(self, group: dict, structures: tuple[Structure, Structure]) -> dict[str, Slot]:
        """Return the matrices of a layer, by name, for the structures of its two sides."""

    @abstractmethod
    def _refresh(
        self,
        bucket: Bucket,
        group: dict,
        plans: dict[Layer, Any],
        A: StructuredMatrix,
        B: StructuredMatrix,
    ) -> None:
        """Change the matrices of some of a bucket's layers by new moments, in the bucket's form.

        Args:
            bucket: The bucket.
            group: The layers' parameter group.
            plans: The layers, in the bucket's order, with what `_plan` said.
            A: Moments of the inputs.
            B: Moments of the vectors.
        """

    def choice(self, group: dict) -> Any:
        """Return what `slots` depends on in a group, beside the structures."""

    def _plan(self, layer: Layer) -> Any:
        """Note that a layer is refreshed, by whichever process; return what `_refresh` needs of that."""

    @abstractmethod
    def _precondition(self, bucket: Bucket, group: dict, G: Tensor) -> Tensor:
        """Return preconditioned gradients ``[(L g), o, i]``, without the axis for a single one.

        In new memory, which the caller may overwrite.
        """

    @abstractmethod
    def _project_formed(
        self, M: StructuredMatrix | None, A: Tensor, structure: Structure
    ) -> StructuredMatrix:
        """Return what to keep of a moment ``A[g,d,d]``, or of some layers' of one shape."""

    @abstractmethod
    def _project(
        self, M: StructuredMatrix | None, x: Tensor, scale: float, structure: Structure
    ) -> StructuredMatrix:
        """Return what to keep of ``scale sum_r x_r x_r^T``; M is the matrix of that side, if any."""

    @abstractmethod
    def _check_group(self, group: dict) -> None:
        """Raise ValueError if an option of a group is out of its range."""

    # Attributes that a copy has as well.
    copied: ClassVar[tuple[str, ...]] = (
        *("interval", "factor_dtype", "fallback_lr", "stochastic_rounding", "maximize", "fallback"),
        *("precondition", "statistics", "_layers", "placement", "_lost"),
    )

    # Numbers that a weight's state has beside its matrices, as they are at first.
    numbers: ClassVar[Mapping[str, int]] = {}

    # names of the slots that moments are projected with, by side; none if the coordinates are plain
    coordinates: ClassVar[Mapping[str, str]] = {}

    # ------------------------------------------------------------------ the training loop

    def extensions(self) -> tuple[Extension, ...]:
        """Return what the next backward pass has to run with.

        Nothing between refreshes, unless layers' gradients are preconditioned as rows.

        Raises:
            ValueError: If a group's structure has been changed.
        """
        self._check_structures()
        due, found = self._due(), ()
        if due or self._lost:
            found = (self.statistics,)
        if (due or self._clock["rows"]) and self._may_have_rows():
            found = (*found, self.rows)
        if found and all(p.grad is None for group in self.param_groups for p in group["params"]):
            self.statistics.forget()  # of gradients that were thrown away
            self.rows.forget()
        return found

    def accumulate(self) -> None:
        """Do nothing: what backward passes bring adds up on its own, as gradients do."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and what was gathered with them."""
        super().zero_grad(set_to_none)
        self.statistics.forget()
        self.rows.forget()

    @property
    def _exchange(self) -> Exchange:
        return Exchange(self, self._buckets, self.placement)

    @property
    def skipped(self) -> int:
        """Number of steps that were skipped because a gradient or a statistic was not finite."""
        return self._clock["skipped"]

    @property
    def rejected(self) -> int:
        """How often rows of a layer were kept in vain: its gradient was not their product any more.

        Or squares of rows under- or overflow, so that nothing tells whether it was.
        """
        return self._clock["rejected"]

    @torch.no_grad()
    @without_autocast
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: Clears the gradients, runs forward and backward pass inside of ``with
                backpack(*opt.extensions())``, and returns the loss; with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: If a refresh is due and no backward pass has gathered statistics, or if a
                gradient is sparse.
            ValueError: If a group's structure has been changed.
        """
        self._check_structures()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        passes, rows = self.rows.passes, self.rows.take()
        present = self._with_gradient()
        if not present:
            return loss
        for p in present:
            if p.grad.is_sparse or p.grad.is_complex():
                kind = "sparse" if p.grad.is_sparse else "complex"
                raise RuntimeError(
                    f"{type(self).__name__}: parameter {labels(self.param_groups)[p]} has a {kind} "
                    "gradient; expected a dense, real one."
                )
        still = self._stands_still(present)
        due, ran = self._due(), self.statistics.ran
        if due and ran and not self.statistics.reached:
            raise RuntimeError(
                f"{type(self).__name__}.step: the backward pass has met no layer of an extended model. "
                "Pass the model to the optimizer, or extend it by backpack_ext.extend(model)."
            )
        if (due or self._lost) and not ran and not still:
            raise RuntimeError(
                f"{type(self).__name__}.step: new statistics are due, but no backward pass has gathered "
                "them. Run forward and backward pass of the extended model, with an extended loss, "
                "inside `with backpack(*opt.extensions()):`."
            )
        moments = self.statistics.take()
        found = {m.layer: m for m in moments}
        self._products, failed = self._checked(rows)
        used = len(self._products)
        # the check of rows has seen their layers' gradients
        rest = present
        if self._products:
            rest = [p for p in present if self._layers.owner(p) not in self._products]
        finite = self._finite(rest, moments)
        if self.placement.size > 1 and not still:
            finite = self._exchange.agree(found, finite, due or bool(self._lost))
        if not finite:
            self._products = {}
            self._tick(skipped=self.skipped + 1)
            return loss
        if self._lost and not still:
            self._find_lost(present)
        if due and ran:
            self._give_up_missing(found)
        if not due:
            found = {}
        owners = [self._layers.owner(p) for p in present]
        self._buckets.activate([*found, *filter(None, owners)])
        if due and ran:  # maybe for no layer: all may be the fallback's
            self._refresh_all(found)
        del rows
        self._update(present, owners)
        if not still:
            if passes:
                self._tick(rows=used, rejected=self.rejected + failed)
            self._tick(step=self._clock["step"] + 1)
        return loss

    def _give_up_missing(self, found: Mapping[Layer, Moments]) -> None:
        """Leave weights to the fallback that have a gradient, but never had statistics.

        They belong to modules that look like layers, but act in other ways.
        """
        for layer in list(self._layers):
            if layer in found or layer in self._buckets.active or layer.weight.grad is None:
                continue
            if bool(whole(layer.weight.grad).any()):
                self._layers.refuse(layer.weight)
                warnings.warn(
                    f"{type(self).__name__}: no statistics reached parameter "
                    f"{labels(self.param_groups)[layer.weight]} although it has a gradient. It is left "
                    "to the fallback.",
                    stacklevel=2,
                )

    def _refresh_all(self, moments: dict[Layer, Moments]) -> None:
        """Refresh the matrices of layers, each in one of the processes."""
        if self.placement.size > 1:
            moments = self._exchange.reduced(moments)
        plans = {layer: self._plan(layer) for layer in moments}
        for bucket, found in self._buckets.sort(moments):
            if bucket.owner == self.placement.rank:
                own = [found[layer] for layer in found]
                A, B = (bucket.stacked([getattr(m, side) for m in own]) for side in "AB")
                group = self._buckets.group(bucket)
                self._refresh(bucket, group, {layer: plans[layer] for layer in found}, A, B)
        if self.placement.size > 1:
            self._exchange.send_matrices(moments)
        clock = self._clock
        self._tick(refreshed=clock["step"], refreshes=clock["refreshes"] + 1)

    # ------------------------------------------------------------------ the parameters

    def _update(self, present: list[Tensor], owners: list[Layer | None]) -> None:
        """Change parameters, given the layers that they belong to."""
        for directions in self._directions(filter(None, owners)):
            for p, n in directions:
                group, state = self._buckets.group_of[p], self.state[p]
                momentum_step(
                    p,
                    n,
                    state,
                    lr=float(group["lr"]),
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    write=self._write_parameter,
                )
                state.setdefault("kind", JOINED)
        others = [p for p, layer in zip(present, owners, strict=True) if layer is None]
        if others:
            self._fall_back(others)

    def _directions(self, layers: Iterable[Layer]) -> Iterator[list[tuple[Tensor, Tensor | Direction]]]:
        """Yield parameters with preconditioned gradients, bucket by bucket, so that few are held."""
        buckets = self._buckets.sort(dict.fromkeys(layers))
        received: dict[int, list[Tensor]] = {}
        if not self.placement.keeps(None):
            for bucket, _ in buckets:
                if bucket.owner == self.placement.rank:
                    N = self._preconditioned(bucket)
                else:
                    N = bucket.empty()
                    for p in (p for layer in bucket.layers for p in layer.parameters):
                        if is_sharded(p):
                            self._grad(p)  # the owner needs our part
                received.setdefault(bucket.owner, []).append(N.contiguous())
            self.placement.broadcast(received)
        for bucket, found in buckets:
            products = [self._products.pop(layer, None) for layer in bucket.layers]
            whole = None not in products and len({b.shape for b, _, _ in products}) == 1
            parts = None
            if whole:
                parts = self._multiplied(bucket, products)
            elif not (received or bucket.is_small):
                parts = self._layerwise(bucket)
            if parts is None:
                N = received[bucket.owner].pop(0) if received else self._preconditioned(bucket)
                N = [N.unsqueeze(0)] if bucket.single else N.split(bucket.form.groups)
                parts = [layer.split(part) for layer, part in zip(bucket.layers, N, strict=True)]
            directions = [
                (p, n if isinstance(n, Direction) else like_parameter(n, p))
                for layer, part in zip(bucket.layers, parts, strict=True)
                if layer in found
                for p, n in zip(layer.parameters, part, strict=True)
                if p.grad is not None
            ]
            if self.maximize:
                for _, n in directions:
                    n.neg_()
            yield directions

    def _layerwise(self, bucket: Bucket) -> Iterator[tuple[Tensor | Direction, ...]] | None:
        """Yield preconditioned gradients layer by layer, weight and bias apart.

        None if they are better stacked, and joined, first.
        """
        return None

    def _grad(self, p: Tensor) -> Tensor:
        """Return a parameter's whole gradient; what a pass has not reached counts as zero."""
        return whole(torch.zeros_like(p) if p.grad is None else p.grad)

    def _preconditioned(self, bucket: Bucket) -> Tensor:
        """Return the preconditioned gradients of a bucket's layers."""
        grads = ([self._grad(p) for p in layer.parameters] for layer in bucket.layers)
        pairs = zip(bucket.layers, grads, strict=True)
        matrices = [layer.matrix(*found).to(bucket.dtype) for layer, found in pairs]
        if bucket.single:
            G = matrices[0].squeeze(0)
        else:
            G = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        del matrices
        return self._precondition(bucket, self._buckets.group(bucket), G)

    # ------------------------------------------------------------------ what has no factors

    def _fall_back(self, params: list[Tensor]) -> None:
        """Let the fallback train parameters."""
        for p in params:
            if self.state[p].get("kind", FALLBACK) in (WEIGHT, JOINED):  # it had factors before
                self.state[p].clear()
        chosen = set(params)
        groups = []
        for group in self.param_groups:
            lr = float(group["lr"])
            if self.fallback_lr is not None:
                lr = self.fallback_lr * (lr / group["base_lr"] if group["base_lr"] else 1.0)
            members = [p for p in group["params"] if p in chosen]
            groups.append((members, lr, group["weight_decay"]))
        self.fallback.step(self.state, groups)
        for p in params:
            self.state[p]["kind"] = REFUSED if p in self._layers.refused else FALLBACK

    def _write(self, target: Tensor, source: Tensor) -> None:
        """Overwrite a matrix's tensor, rounding to its data type."""
        self._copy_rounded(target, source, "matrices")

    def _write_parameter(self, target: Tensor, source: Tensor) -> None:
        """Overwrite a parameter, rounding to its data type."""
        self._copy_rounded(target, source, "parameters")

    def _copy_rounded(self, target: Tensor, source: Tensor, use: str) -> None:
        if self.stochastic_rounding:
            copy_rounded_(target, source, self._generator(use, target.device))
        else:  # the same, in a fraction of the time
            target.copy_(source)

    def _generator(self, use: str, device: torch.device) -> torch.Generator:
        """Return what this step's rounding draws from.

        It depends on the step alone, so that nothing has to be saved and copies in several processes
        stay equal. Matrices, which not all processes write, have one of their own.
        """
        numbers = ("matrices", "parameters").index(use), self._clock["step"]
        if self._rounding.get((use, device), (None,))[0] != numbers:
            self._rounding[use, device] = numbers, seeded_generator(device, *numbers)
        return self._rounding[use, device][1]

    # ------------------------------------------------------------------ moments

    def moment(
        self, layer: Layer, factor: str, x: Tensor, scale: float, part: int | None
    ) -> StructuredMatrix:
        """Return what to keep of a moment; see `Statistics`."""
        M, structure, dtype = self._coordinate_of_part(layer, factor, part)
        x = x.to(dtype)
        if x.dim() == 2:  # the diagonal of a one-hot input's
            diagonal = x * scale if M is None else M.tensors[0].square().mul_(x).mul_(scale)
            return DiagonalMatrix([diagonal], x.shape[1])
        if len(x) > 1:
            return self._project(M, x, scale, structure)
        M = None if M is None else M.like(t.squeeze(0) for t in M.tensors)
        found = self._project(M, x[0], scale, structure)
        return found.like(t.unsqueeze(0) for t in found.tensors)

    def formed_moment(self, layer: Layer, factor: str, A: Tensor, part: int | None) -> StructuredMatrix:
        """Return what to keep of a moment ``A[g,d,d]`` that has been formed; see `Statistics`."""
        M, structure, dtype = self._coordinate_of_part(layer, factor, part)
        return self._project_formed(M, A.to(dtype), structure)

    def forms_moment(self, layer: Layer, factor: str, rows: int) -> bool:
        """Whether forming a moment of so many rows, and projecting it, is less work than theirs.

        That is if they can be summed faster than listed, as patches of convolutions can.
        """
        _, structure, _ = self._coordinate(layer, factor)
        return structure.cls is not DiagonalMatrix and rows >= 2 * layer.form.columns

    def moments(
        self, layers: Sequence[Layer], factor: str, x: Tensor, scale: float
    ) -> list[StructuredMatrix]:
        """Return what to keep of the moments of layers of one shape, whose rows are ``x[(L g),r,d]``."""
        found = [self._coordinate(layer, factor) for layer in layers]
        M, structure, dtype = found[0]
        if M is not None:
            stacks = zip(*(m.tensors for m, _, _ in found), strict=True)
            M = M.like(torch.cat(ts).to(dtype) for ts in stacks)
        whole, g = self._project(M, x.to(dtype), scale, structure), layers[0].form.groups
        starts = range(0, g * len(layers), g)
        return [whole.like(t[k : k + g] for t in whole.tensors) for k in starts]

    def stackable(self, layers: Sequence[Layer]) -> bool:
        """Whether `moments` can treat layers together."""
        self._buckets.make()
        first = layers[0]
        return all(
            layer.form == first.form
            and self._buckets.sides_of(layer) == self._buckets.sides_of(first)
            and self._buckets.dtype_of(layer) == self._buckets.dtype_of(first)
            and (layer in self._buckets.of) == (first in self._buckets.of)
            for layer in layers
        )

    def _coordinate_of_part(
        self, layer: Layer, factor: str, part: int | None
    ) -> tuple[StructuredMatrix | None, Structure, torch.dtype]:
        """Return `_coordinate` in its data type; of one of a layer's matrices, unless part is None."""
        M, structure, dtype = self._coordinate(layer, factor)
        if M is not None and part is not None:
            M = M.like(t[part : part + 1] for t in M.tensors)
        if M is not None and M.dtype != dtype:
            M = M.to(dtype)
        return M, structure, dtype

    def _coordinate(
        self, layer: Layer, factor: str
    ) -> tuple[StructuredMatrix | None, Structure, torch.dtype]:
        """Return what a layer's moments are projected with, ``[g,d,d]``, their structure and data type.

        None stands for the identity, which matrices are before the first step.
        """
        self._buckets.make()
        bucket, name = self._buckets.of.get(layer), self.coordinates.get(factor)
        structure = self._buckets.sides_of(layer)["AB".index(factor)]
        dtype = torch.promote_types(self._buckets.dtype_of(layer), torch.float32)
        M = None if bucket is None or name is None else bucket.of_layer(name, layer)
        return M, structure, dtype

    def factors(self, weight: Tensor) -> dict[str, StructuredMatrix]:
        """Return the matrices of a weight's layer, ``[g,d,d]`` each, by name; views of the state.

        Raises:
            KeyError: If the weight has none: the fallback trains it, or no step has reached it.
        """
        self._buckets.make()
        layer = self._layers.of_weight(weight)
        if layer is None or layer not in self._buckets.of:
            raise KeyError(f"{type(self).__name__}: the parameter has no factors.")
        bucket = self._buckets.of[layer]
        return {name: bucket.of_layer(name, layer) for name in bucket.slots}

    # ------------------------------------------------------------------ when

    @property
    def _clock(self) -> dict:
        return self.param_groups[0]

    def _tick(self, **entries: int) -> None:
        for group in self.param_groups:
            group.update(entries)

    def _due(self) -> bool:
        """Whether this step is to refresh."""
        clock = self._clock
        if clock["refreshes"] == 0:
            return True
        passed = clock["step"] - clock["refreshed"]
        return passed >= interval_at(type(self).__name__, "interval", self.interval, clock["step"])

    def _with_gradient(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _stands_still(self, present: list[Tensor]) -> bool:
        """Whether a step changes nothing: how torch.distributed.checkpoint makes empty states."""
        if any(float(group["lr"]) != 0 for group in self.param_groups) or self.statistics.ran:
            return False
        return not any(p.grad.any() for p in present)

    def _finite(self, present: list[Tensor], moments: list[Moments]) -> bool:
        """Whether all gradients and moments are finite."""
        grads = [g for p in present if (g := local(p.grad)).numel()]
        if not grads:  # all parts of sharded ones are elsewhere
            values = []
        elif all(g.is_cuda for g in grads):
            values = list(torch._foreach_norm(grads, float("inf")))
        else:  # that is slow on the CPU; a sum can only overflow where a step would be hopeless
            values = [g.sum(dtype=state_dtype(g)) for g in grads]
        traces = [M.trace() for m in moments for M in (m.A, m.B)]
        values += [t if t.numel() == 1 else t.sum() for t in traces]
        if all(v.is_cpu for v in values):  # numbers take a fraction of the time of small tensors
            return all(isfinite(v.item()) for v in values)
        device = values[0].device
        return bool(torch.cat([v.to(device, torch.float32).view(1) for v in values]).isfinite().all())

    # ------------------------------------------------------------------ groups and checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own.

        Raises:
            ValueError: If an option is out of its range.
        """
        shared = _SHARED & param_group.keys()
        if shared:
            raise ValueError(
                f"{type(self).__name__}: {min(shared)!r} in a parameter group; it belongs to the whole "
                f"optimizer. A group may have {', '.join(self.defaults)}."
            )
        clock = {name: self.param_groups[0][name] if self.param_groups else 0 for name in CLOCK}
        param_group = {**param_group, **clock}
        group = {**self.defaults, **param_group}
        self._check_group(group)
        structures_of(type(self).__name__, group["structure"], self.structures)
        param_group.setdefault("base_lr", float(group["lr"]))
        super().add_param_group(param_group)
        self.param_groups[-1].update(self._generator_state())
        self._sides.pop(id(self.param_groups[-1]), None)  # of one that was removed
        if self.sides_of_group(self.param_groups[-1]) is not None:
            self._layers.wanted.update(self.param_groups[-1]["params"])
        self._buckets.outdate()

    def sides_of_group(self, group: dict) -> tuple[Structure, Structure] | None:
        """Return the structures of a group's layers, as they were when it was first asked for them."""
        if id(group) not in self._sides:
            value = copy.deepcopy(group["structure"])
            self._sides[id(group)] = value, structures_of(type(self).__name__, value, self.structures)
        return self._sides[id(group)][1]

    def _check_structures(self) -> None:
        """Refuse a group whose structure is not what its layers' matrices have.

        Raises:
            ValueError: If there is one.
        """
        for k, group in enumerate(self.param_groups):
            sides, before = self.sides_of_group(group), self._sides[id(group)][0]
            now = group["structure"]
            if now != before and structures_of(type(self).__name__, now, self.structures) != sides:
                raise ValueError(
                    f"{type(self).__name__}: the structure of parameter group {k} was changed from "
                    f"{before!r} to {now!r}; its layers' matrices are of the former. "
                    "Make a new optimizer for another one."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the state: see `torch.optim.Optimizer.state_dict`.

        Where samples are drawn, the groups have the state of the random generator.
        """
        self._tick(**self._generator_state())
        return super().state_dict()

    def _generator_state(self) -> dict[str, Any]:
        """Return the state of the generator that samples are drawn from, if there is one, and whose."""
        if self.statistics.vectors.kind != "mc":
            return {}
        return {**self.statistics.state_dict(self.device), "generator_rank": self.placement.rank}

    @property
    def device(self) -> torch.device:
        """That of the first parameter."""
        return self.param_groups[0]["params"][0].device

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; see `torch.optim.Optimizer.load_state_dict`.

        Raises:
            ValueError: If it is that of another optimizer, or of other parameters or structures.
        """
        check_saved(self, state_dict)
        before = dict(self.__dict__)
        self._layers = self._layers.copy()
        self._buckets = Buckets(self, self._layers, self.placement)
        try:
            with exact_loading(self, partial(loaded_entry, self.factor_dtype)):
                super().load_state_dict(with_clock(state_dict))
            self._sides = {}
            for p, state in self.state.items():
                if state.get("kind") == REFUSED:  # as the saved optimizer has found
                    self._layers.refuse(p)
            self._buckets.make()
        except Exception:
            self.__dict__.update(before)  # nothing in there has been changed in place
            raise
        self.statistics.layers = self._layers
        if "generator" in self.param_groups[0]:
            self.statistics.load_state_dict(self.param_groups[0], self.device)
            if self.param_groups[0].get("generator_rank", 0) != self.placement.rank:
                # all processes have loaded one state, and are to draw different samples
                generator = self.statistics.generator(self.device)
                seed = int(torch.randint(2**62, (), generator=generator, device=self.device))
                generator.manual_seed(seed + self.placement.rank)
        self.statistics.forget()
        kinds = {p: state.get("kind", FALLBACK) for p, state in self.state.items()}
        self._lost = {p for p, k in kinds.items() if k == WEIGHT and self._layers.of_weight(p) is None}

    def _find_lost(self, present: list[Tensor]) -> None:
        """Look whether a pass has shown the layers of loaded factors.

        Raises:
            ValueError: If it has reached a weight, but found no layer.
        """
        self._lost = {p for p in self._lost if self._layers.of_weight(p) is None}
        gone = next((p for p in present if p in self._lost), None)
        if gone is not None:
            raise ValueError(
                f"{type(self).__name__}: the loaded state has factors of parameter "
                f"{labels(self.param_groups)[gone]} but the backward pass found no layer that has some. "
                "Was it saved with another model?"
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in self.copied}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_buckets" not in self.__dict__:  # a copy; torch comes here as well when it loads
            lost = self._lost
            self._start()
            self._lost = lost


# Options of the constructor that are no options of groups.
_SHARED = {"inverse_interval", "kl_clip", *signature(NaturalGradient.__init__).parameters}
_SHARED -= {"self", "params", "defaults"}


def _layers_of_wrapping(model: nn.Module) -> list[nn.Module]:
    """Return a model, and what `DistributedDataParallel` and `torch.compile` have wrapped."""
    found = [model]
    while True:
        if isinstance(found[-1], DistributedDataParallel):
            found.append(found[-1].module)
        elif "_orig_mod" in found[-1]._modules:
            found.append(found[-1]._modules["_orig_mod"])
        else:
            return found


def _depth_of_caller() -> int:
    """Return the ``stacklevel`` of whoever makes an optimizer, outside of all constructors."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_name == "__init__":
        frame, depth = frame.f_back, depth + 1
    return depth
