r"""The generalised Gauss-Newton matrix in low-rank form: its spectrum, eigenvectors, noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.extension import Vectors, check_indices, check_samples
from backpack_ext.factor_extension import FactorExtension, Selection
from backpack_ext.param_groups import Places, checked_groups, groups_of
from backpack_ext.recomputed import Recomputation, RecomputedFactor
from backpack_ext.unit import Unit
from curvature import Eigenpairs, Eigenvectors, LowRank
from curvature.factor import Centered
from curvature.lowrank import CUTS

FISHER = ("exact", "mc", "empirical")

# One tensor per parameter.
Step = dict[nn.Parameter, Tensor]

# The parameters of a group, and its block.
Group = tuple[tuple[nn.Parameter, ...], LowRank]


class LowRankGGN(FactorExtension):
    r"""The GGN (Fisher) of the loss as written as :math:`V V^T`, known through its Gram matrix.

    .. math::  G = \sum_n J_n^T H_n J_n = V V^T, \quad V = (J_n^T S_{vn})_{vn},
        \quad (V^T V)_{vn,wm} = \sum_{\mathrm{layers}} \sum_{st}
        (a_{ns} \cdot a_{mt} + 1) (b_{vns} \cdot b_{wmt})

    with the columns :math:`S_{vn}` of a root of the loss's Hessian :math:`H_n` (reduction included)
    propagated to ``b[v,n,s,o]`` at the outputs of layers with inputs ``a[n,s,i]``. Columns are ordered
    ``(v n)``, data fastest. V is never formed; what is asked for after the backward pass is computed
    from the layers' a and b, which the object keeps. Of a convolution it keeps the input, not the
    patches a, where these are larger: each product forms them anew, one layer's at a time. Of the
    mini-batch it keeps a copy there. Other layers' inputs are not copied: once they are overwritten
    in place, what is asked for raises (through ``.data`` or NumPy that goes unnoticed).

    After the backward pass, `block` (or `blocks`, by group) is the `curvature.LowRank`, and each
    parameter's ``low_rank_ggn`` is that of its group. The methods below ask it; where there are several
    groups they return one result per group, by name, unless they say otherwise. The same field serves
    `curvature.BlockDiagonalOperator.of_parameters`.

    Args:
        fisher: ``"exact"`` (all columns of the root), ``"mc"`` (samples; unbiased), or ``"empirical"``:
            columns are per-sample gradients, :math:`V V^T = r c \sum_n g_n g_n^T` with the gradients
            :math:`g_n` of the data's unscaled losses.
        mc_samples: Number of samples for ``"mc"``.
        subsample: Indices of the data whose columns are kept, scaled by :math:`\sqrt{N / |S|}`; all
            by default. Slopes (`directional_gradients`) are those of all data.
        param_groups: Blocks of a block-diagonal approximation: None (one block for all parameters),
            ``"layers"`` (one per module), ``"parameters"``, or a sequence of groups, each a sequence of
            parameters or a dictionary with ``"params"`` (and maybe ``"name"``), as for an optimizer.
        center: Whether to subtract from each column the mean over the data. With
            ``fisher="empirical"`` that is N times the covariance of the gradients (times r c). With
            ``"exact"`` the result depends on which root of the Hessian is taken, for the cross-entropy.
        gradients: Whether to keep the data's gradients, for `directional_gradients` and Newton steps.
        dtype: Data type in which Gram matrices are decomposed.
        rtol: Eigenvalues below ``rtol`` times the largest count as zero; see `curvature.LowRank`.
        generator: Random generator for ``"mc"``; a private one by default.
        savefield: Attribute of the parameters that receives the block.
        unsupported: What to do about parameters without a rule: "raise", "warn" or "skip".
        max_columns: ``fisher="exact"`` refuses beyond that many columns per datum.
        max_memory: How many bytes of a and b may be kept (of convolutions' inputs, not of patches,
            which a product holds of one layer at a time).
        closure: Returns the loss of the same mini-batch, without calling backward. Beyond
            ``max_memory``, each product recomputes the backward pass with it, some data at a time (and
            a warning says so). Where it computes something else than the first pass (dropout, other
            data, parameters changed in between), products raise.

    Raises:
        ValueError: If an option is none of those listed, a parameter is in two groups or frozen, or (in
            the backward pass) an index lies outside of the batch.
        UnsupportedError: In the backward pass, beyond ``max_memory`` without a closure; or if a layer
            couples the data (batch norm in training mode).

    References:
        Dangel, Tatzel & Hennig (2022), ViViT: Curvature access through the generalized Gauss-Newton's
        low-rank structure.

    Example:
        >>> from backpack_ext import LowRankGGN, backpack, extend
        >>> model, loss_fn = extend(nn.Linear(2, 1, bias=False)), extend(nn.MSELoss(reduction="sum"))
        >>> X = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        >>> with backpack(LowRankGGN()) as context:
        ...     loss_fn(model(X), torch.zeros(2, 1)).backward()
        >>> context.exts[0].eigvalsh().round(decimals=3)  # of 2 X^T X
        tensor([18.,  8.], dtype=torch.float64)
    """

    def __init__(
        self,
        fisher: str = "exact",
        mc_samples: int = 1,
        subsample: Sequence[int] | None = None,
        param_groups: str | Iterable | None = None,
        center: bool = False,
        gradients: bool = True,
        dtype: torch.dtype = torch.float64,
        rtol: float | None = None,
        generator: torch.Generator | None = None,
        savefield: str = "low_rank_ggn",
        unsupported: str = "raise",
        max_columns: int = 1000,
        max_memory: int = 2**31,
        closure: Callable[[], Tensor] | None = None,
    ):
        if fisher not in FISHER:
            raise ValueError(f"LowRankGGN: fisher={fisher!r}; expected one of {FISHER}.")
        check_samples("LowRankGGN", mc_samples)
        super().__init__(savefield, unsupported, generator)
        self.fisher, self.center, self.gradients = fisher, center, gradients
        self.dtype, self.rtol = dtype, rtol
        self.subsample = None
        if subsample is not None:
            self.subsample = check_indices("LowRankGGN", "subsample", subsample)
        self.param_groups = checked_groups("LowRankGGN", param_groups)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"LowRankGGN: dtype={dtype}; expected torch.float32 or torch.float64.")
        if not isinstance(max_memory, (int, float)) or not max_memory > 0:
            raise ValueError(f"LowRankGGN: max_memory={max_memory!r}; expected a number of bytes.")
        if rtol is not None and not 0 <= rtol < 1:
            raise ValueError(f"LowRankGGN: rtol={rtol!r}; expected a number in [0, 1), or None.")
        self.max_columns, self.max_memory, self.closure = max_columns, max_memory, closure
        if closure is not None and not callable(closure):
            raise ValueError(
                f"LowRankGGN: closure={closure!r}; expected a function that returns the loss."
            )
        kind = "gradient" if fisher == "empirical" else fisher
        self.vectors = Vectors(kind, mc_samples, gradient=gradients and fisher != "empirical")
        self._blocks: dict[str, LowRank] | None = None
        self._parameters: dict[str, tuple[nn.Parameter, ...]] = {}
        self._warned = False
        # the pass that drew samples last, and the generator's state before
        self._random: tuple[int, Tensor] | None = None

    @property
    def needs_scale(self) -> bool:
        """The gradient of a loss carries r c; outer products of it are to carry it once."""
        return self.fisher == "empirical"

    @property
    def marked(self) -> bool:
        """A closure is to compute the same again."""
        return self.closure is not None

    # ------------------------------------------------------------------ the backward pass

    def selection(self, batch: int) -> Selection:
        """Return the data of the sub-sample, which stand for all."""
        if self.subsample is None:
            return None, 1.0
        if any(not -batch <= k < batch for k in self.subsample):
            raise ValueError(f"LowRankGGN: subsample={self.subsample} for a batch of {batch}.")
        data = torch.tensor(self.subsample) % batch
        return data, sqrt(batch / len(data))

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator that samples are drawn from; note its state."""
        generator = super().generator(device)
        task = torch._C._current_graph_task_id()
        if self.closure is not None and (self._random is None or self._random[0] != task):
            self._random = task, generator.get_state()
        return generator

    def absorb(self, store: dict, unit: Unit) -> None:
        """Keep one layer's inputs and vectors."""
        self._blocks = None  # a pass that fails leaves nothing
        super().absorb(store, unit)
        if self.fisher == "empirical" and self.gradients:
            self.absorb_gradient(store, [unit])

    def finish(self, store: dict) -> list[tuple[nn.Parameter, LowRank]]:
        """Make the blocks."""
        blocks = store["blocks"] if "blocks" in store else self._make(store)
        self._blocks = {name: block for name, (_, block) in blocks.items()}
        self._parameters = {name: parameters for name, (parameters, _) in blocks.items()}
        self._random = None
        return [(p, block) for parameters, block in blocks.values() for p in parameters]

    def _make(self, store: dict) -> dict[str, Group]:
        """Return each group's parameters and block."""
        if "columns" not in store:
            return {}
        self.settle(store)
        columns, slopes = store["columns"], store.get("slopes")
        if slopes is not None:
            slopes.close_chunk()
        places = Places()
        reached = places.sorted(columns.parameters)
        groups = groups_of("LowRankGGN", self.param_groups, reached, places)
        data, scale = self.selection(columns.batch)
        data = torch.arange(columns.batch) if data is None else data
        slots = sum(columns.widths)
        if store["bytes"] > self.max_memory:
            of_columns = self._again(store, "columns", data, scale, slots, reached)
            of_slopes = None
            if slopes is not None:
                everything, N = torch.arange(columns.batch), columns.batch
                of_slopes = self._again(store, "slopes", everything, float(N), 1, reached)
        else:
            of_columns, of_slopes = columns.factor, None if slopes is None else slopes.factor
        rtol = max(map(CUTS.get, (self.dtype, *columns.dtypes))) if self.rtol is None else self.rtol
        found = {}
        for name, parameters in groups.items():
            factor = of_columns(parameters)
            if self.center:
                factor = Centered(factor, slots)
            # a pass that was asked for some gradients only brings no others
            known = slopes is not None and slopes.covers(parameters)
            block = LowRank(
                factor,
                owner=torch.arange(len(data), device=factor.device).repeat(slots),
                data=len(data),
                slopes=of_slopes(parameters) if known else None,
                dtype=self.dtype,
                rtol=rtol,
                keys=tuple(map(id, parameters)),
            )
            found[name] = parameters, block
        return found

    def _again(
        self,
        store: dict,
        what: str,
        data: Tensor,
        scale: float,
        slots: int,
        parameters: Sequence[nn.Parameter],
    ) -> Callable[[Sequence[nn.Parameter]], RecomputedFactor]:
        """Return what makes factors that are recomputed for each product.

        Raises:
            UnsupportedError: If there is no closure.
        """
        size, batch = store["bytes"], store["columns"].batch
        text = f"LowRankGGN: inputs and vectors of the layers take {_text(size)}, more than max_memory="
        text += _text(self.max_memory)
        if self.closure is None:
            raise UnsupportedError(
                f"{text}. Raise max_memory; or pass closure=, which returns the loss of this mini-batch "
                "again, to have products recompute the backward pass in parts; or use a sub-sample, or "
                'fisher="mc".'
            )
        columns = what == "columns"
        vectors = Vectors(self.vectors.kind, self.vectors.samples) if columns else Vectors("gradient")
        random = None
        if vectors.kind == "mc":
            if self._random is None:
                raise UnsupportedError(
                    f"{text}, and its samples are those of another extension with the same generator, "
                    "which cannot be drawn again. Give LowRankGGN a generator of its own."
                )
            random = self._random[1]
        # two parts are there at a time, and as much again while one is put together
        chunk = max(1, int(batch * self.max_memory / (4 * size)))
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{text}. Each product runs the closure's backward pass again, for {chunk} of {batch} "
                "data at a time.",
                stacklevel=2,
            )
        again = Recomputation(
            closure=self.closure,
            vectors=vectors,
            scaled=columns and self.needs_scale,
            data=data,
            scale=scale,
            slots=slots,
            chunk=chunk,
            parameters=list(parameters),
            random=random,
            max_columns=self.max_columns,
            like=torch.zeros(0, dtype=store["columns"].dtype, device=parameters[0].device),
            mark=store["marks"][what],
            versions=[p._version for p in parameters],
        )
        return partial(RecomputedFactor, again)

    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Add the columns of a batch, put on the total's scale.

        Raises:
            UnsupportedError: If the batch's factors are recomputed: the batch will be gone.
        """
        if self.closure is not None:
            raise UnsupportedError(
                "LowRankGGN: a closure computes the loss of one mini-batch, not of a data set. Raise "
                "max_memory instead."
            )
        blocks = store["blocks"] if "blocks" in store else self._make(store)
        merged = total.setdefault("blocks", {})
        for name, (parameters, block) in blocks.items():
            scaled = block.scaled(weight)
            merged[name] = parameters, merged[name][1] + scaled if name in merged else scaled

    def check_processes(self):
        """Refuse: the columns of other processes' data are theirs."""
        raise UnsupportedError(
            "LowRankGGN: its columns are those of each process's own data, and the Gram matrix of all "
            "needs the layers' inputs and vectors of all. Use it without process_group, on one process "
            "with all the data or on each for its own; or KFAC or DiagGGN over processes."
        )

    def over_batches(self):
        """Refuse sub-sampling and centring: both belong to one batch."""
        if self.subsample is not None or self.center:
            raise ValueError("LowRankGGN: subsample and center are for one batch, not for a data set.")
        return super().over_batches()

    # ------------------------------------------------------------------ results

    @property
    def blocks(self) -> dict[str, LowRank]:
        """The blocks of the last backward pass, by group.

        Raises:
            RecordingError: If there was none.
        """
        if self._blocks is None:
            raise RecordingError(
                "LowRankGGN: no backward pass has run with this extension yet, or the last one failed. "
                "Call backward() on an extended loss inside `with backpack(...)` first."
            )
        if not self._blocks:
            raise RecordingError(
                "LowRankGGN: the loss of the last backward pass reached no trainable parameter (are all "
                "frozen, or uncovered?), so that there is no curvature."
            )
        return self._blocks

    @property
    def block(self) -> LowRank:
        """The block of the only group.

        Raises:
            ValueError: If there are several.
        """
        blocks = self.blocks
        if len(blocks) != 1:
            raise ValueError(
                f"LowRankGGN: there are {len(blocks)} groups ({', '.join(blocks)}); take one of "
                "`blocks`."
            )
        return next(iter(blocks.values()))

    @property
    def parameters(self) -> dict[str, tuple[nn.Parameter, ...]]:
        """The parameters of each group, in the order of its block's ``shapes``."""
        return self._parameters if self.blocks else {}

    def _each(self, function: Callable[[LowRank], Any]) -> Any:
        """Return one result; a dictionary by group if there are several groups."""
        blocks = self.blocks
        if self.param_groups is None:
            return function(self.block)
        return {name: function(block) for name, block in blocks.items()}

    def eigvalsh(self) -> Tensor | dict[str, Tensor]:
        """Return the non-zero eigenvalues ``[K]``, descending."""
        return self._each(lambda block: block.eigvalsh())

    def eigh(
        self, k: int | None = None, criterion: Callable[[Tensor], Tensor] | None = None
    ) -> Eigenpairs | dict[str, Eigenpairs]:
        """Return eigenpairs: all, the k largest, or those that a criterion picks; see `LowRank.eigh`."""
        return self._each(lambda block: block.eigh(k, criterion))

    def eigenvectors(self, k: int | None = None) -> Eigenvectors | dict[str, Eigenvectors]:
        """Return the (k leading) eigenvectors as implicit operators; see `LowRank.eigenvectors`."""
        return self._each(lambda block: block.eigenvectors(k))

    def directional_gradients(self, k: int | None = None) -> Tensor | dict[str, Tensor]:
        r"""Return :math:`\gamma_{nk} = e_k \cdot \nabla \ell_n`, ``[N, K]``.

        Of the data's own losses :math:`\ell_n = N r \sum_t \ell_{nt}`, whose mean is the loss. What
        else enters the total counts if it depends on the data's outputs, not if it is a penalty on
        parameters.
        """
        return self._each(lambda block: _sloped(block).eigh(k).directional_gradients())

    def directional_curvatures(self, k: int | None = None) -> Tensor | dict[str, Tensor]:
        r"""Return :math:`\lambda_{nk} = e_k^T G_n e_k`, ``[N, K]``, with the GGN of the same losses.

        The mean over n is the eigenvalue. N is the size of the sub-sample, if there is one.
        """
        return self._each(lambda block: block.eigh(k).directional_curvatures())

    def newton_step(
        self,
        damping: float | Tensor | Callable[[Tensor, Tensor], Tensor] = 0.0,
        k: int | None = None,
        criterion: Callable[[Tensor], Tensor] | None = None,
    ) -> Step:
        r"""Return :math:`-\sum_k \bar\gamma_k / (\lambda_k + \delta_k) e_k`, by parameter.

        Args:
            damping: :math:`\delta`: a number, a tensor ``[K]``, or a function of the directional
                gradients and curvatures such as `curvature.noise_damping`; see
                `curvature.Eigenpairs.newton_step`.
            k: Number of directions; all by default.
            criterion: See `eigh`.
        """
        return self._joined(lambda block: _sloped(block).eigh(k, criterion).newton_step(damping))

    def matvec(self, vector: Mapping[nn.Parameter, Tensor]) -> Step:
        """Return ``G v``, by parameter, of tensors by parameter ``[..., *shape]``."""
        return self._joined(lambda block, *parts: block.matvec(*parts), vector)

    def solve(self, vector: Mapping[nn.Parameter, Tensor], damping: float) -> Step:
        r"""Return :math:`(G + \delta I)^{-1} v`, by parameter."""
        return self._joined(lambda block, *parts: block.solve(*parts, damping=damping), vector)

    def logdet(self, damping: float) -> Tensor:
        r"""Return :math:`\log\det(G + \delta I)` over all groups."""
        return sum(block.logdet(damping) for block in self.blocks.values())

    def trace(self) -> Tensor:
        """Return the trace over all groups."""
        return sum(block.trace() for block in self.blocks.values())

    def _joined(self, function: Callable, vector: Mapping[nn.Parameter, Tensor] | None = None) -> Step:
        """Apply a function to each block and its parts of a vector; sort the results by parameter."""
        found: Step = {}
        for name, block in self.blocks.items():
            parameters = self._parameters[name]
            if vector is not None and not isinstance(vector, Mapping):
                raise TypeError(
                    "LowRankGGN: expected tensors by parameter, such as {p: p.grad for p in "
                    f"model.parameters()}}, got {type(vector).__name__}."
                )
            if vector is not None:
                missing = [tuple(p.shape) for p in parameters if p not in vector]
                if missing:
                    raise ValueError(
                        "LowRankGGN: expected one tensor for each parameter of the groups; there is "
                        f"none for parameters of shape {', '.join(map(str, missing))}."
                    )
            result = function(block, *(vector[p] for p in parameters) if vector is not None else ())
            result = (result,) if isinstance(result, Tensor) else result
            found.update(zip(parameters, result, strict=True))
        return found


def _sloped(block: LowRank) -> LowRank:
    """Return a block, or raise if the data's gradients are missing.

    Raises:
        RecordingError: If so.
    """
    if block.slopes is None:
        raise RecordingError(
            "LowRankGGN: the data's gradients were not kept. That takes gradients=True, and a backward "
            "pass that reaches all layers (not backward(inputs=...))."
        )
    return block


def _text(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
