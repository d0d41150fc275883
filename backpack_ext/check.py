"""Checking once per layer that it is read rightly: each datum's rows, and the rule itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from backpack_ext import normal
from backpack_ext.errors import UnsupportedError
from backpack_ext.graph import Reach
from backpack_ext.layout import Layout, probing_vector
from backpack_ext.site import Site
from backpack_ext.sweep import stream
from backpack_ext.unit import Unit

# How often a layer is checked at whose output only zeros arrive.
TRIES = 3


def check_layers(
    start: GradientEdge,
    reach: Reach,
    layout: Layout | None,
    like: Tensor,
    counted: Callable[[], Tensor] | None = None,
) -> bool:
    """Check layers that have not been read this way before; a training loop pays for it once.

    *Rows.* Layers are read by the size of their leading axis, which says nothing about the order
    of the rows: ``[T, N, d]`` looks like ``[N, k, d]`` where T is a multiple of N. Vectors that
    belong to some of the data are sent through the graph, ``2 log2 N`` times, so that each pair of
    data is told apart once; they must arrive at the rows of these data alone.

    *Rules.* The gradient of each parameter, put together from the layers' normal form, must be
    autograd's. It is not if a layer's forward was overridden, or its weight is used elsewhere too.

    Args:
        start: Edge of the loss's input (or of the model's output).
        reach: The graph behind it; its Sites have taps.
        layout: How the data are laid out there; None if that is not known.
        like: A tensor of that shape, dtype and device.
        counted: Returns a tensor of that shape that is zero where the loss does not look, at the
            positions that a mask leaves out, say: nothing is sent from there.

    Returns:
        Whether some embeddings turned out to be looked up for all data together (relative positions
        ``[T, T]``, say): no rule covers their calls, from now on.

    Raises:
        UnsupportedError: If another layer is not what it is read as.
    """
    unseen = [site for site in reach.sites if site.checks.get(site.reading, TRIES) and _checkable(site)]
    if not unseen:
        return False
    pattern = probing_vector(like)
    if counted is not None:
        pattern = pattern * (counted() != 0)
    if layout is not None and not reach.coupled:
        for chosen, seed in layout.halves(pattern):
            _check_rows(start, reach, seed, chosen, set(unseen))
    moved = _check_gradients(start, reach, pattern, {id(p) for s in unseen for p in _parameters(s)})
    for site in reach.sites:
        site.let_go()
    for site in unseen:  # where only zeros arrived, nothing was seen; but some layers stay dead
        left = site.checks.get(site.reading, TRIES) - 1
        site.checks[site.reading] = 0 if site in moved else left
    return any(site.error is not None for site in unseen)


def _check_rows(start, reach, seed: Tensor, chosen: Tensor, unseen) -> None:
    """Send a vector of the chosen data; nothing may arrive elsewhere."""

    def look(site: Site, g: Tensor) -> None:
        if site not in unseen or site.error is not None:
            return
        per_datum = site.rule.cotangents(site, g).movedim(-3, 0).flatten(1).abs().amax(1)
        if per_datum.isnan().any() or not per_datum[~chosen].any():
            return  # not-a-numbers will show in the results
        if site.looked_up:
            site.error = site.checks["error"] = (
                f"the {site.batch} data are not apart along axis {site.batch_axis} of its output of "
                f"shape {tuple(site.out_shape)}"
            )
            return
        raise UnsupportedError(
            f"{site.label}: a vector that belongs to one datum arrives at the rows of another. Its "
            f"output of shape {tuple(site.out_shape)} is read as {site.batch} data along axis "
            f"{site.batch_axis}{_by(site)}. If they are elsewhere, say so: extend(model, "
            f"batch_axis={{{site.name!r}: AXIS}}). If the loss's rows are in another order, or the "
            "model mixes data on purpose, quantities per datum are undefined; extend(model, "
            "check_layers=False) switches this check off."
        )

    stream(start, reach, seed, look)


def _check_gradients(start, reach: Reach, seed: Tensor, wanted: set[int]) -> set[Site]:
    """Compare parameters' gradients with autograd's; return the Sites that vectors arrived at."""
    parameters: dict[int, nn.Parameter] = {}
    owners: dict[int, Site] = {}
    sums: dict[int, Tensor | float] = {}
    sizes: dict[int, Tensor | float] = {}  # of the summands: what rounding errors scale with
    rows: dict[int, int] = {}
    unknown: set[int] = set()
    moved: set[Site] = set()

    def add(site: Site, g: Tensor) -> None:
        keys = {id(p) for p in _parameters(site)}
        if not keys & wanted:
            return
        if not _checkable(site):
            unknown.update(keys)
            return
        if g.any():
            moved.add(site)
        unit = Unit([site], [g], site.rule)
        for role, p in site.parameters.items():
            G, size = _gradient(unit, role)
            sums[id(p)] = sums.get(id(p), 0) + G
            sizes[id(p)] = sizes.get(id(p), 0) + size.norm()
            owners[id(p)] = site
            rows[id(p)] = rows.get(id(p), 0) + unit.batch * unit.b.shape[3]
        site.let_go()

    for site in reach.sites:
        parameters.update((id(p), p) for p in _parameters(site) if id(p) in wanted)
    gradients = stream(start, reach, seed, add, list(parameters.values()), reads_inputs=True)
    for (key, p), actual in zip(parameters.items(), gradients, strict=True):
        if key in unknown or key not in sums:
            continue
        actual = torch.zeros_like(p) if actual is None else actual.to_dense()
        error = (sums[key] - actual).norm()
        low = min((actual.dtype, seed.dtype), key=lambda dtype: dtype.itemsize)
        relative, rounding = _TOLERANCES[low.itemsize]
        eps = torch.finfo(low).eps
        if owners[key].rule.elementwise and rows[key] * eps > 1:
            continue  # torch sums a norm's rows in half precision on CPU, and may lose most of them
        allowed = relative * actual.norm() + rounding * sizes[key]
        if error > allowed and _is_bare(owners[key]):
            size = _size_before_sums(start, reach, seed, owners[key])
            allowed += rounding * size + 8 * eps * max(sizes.values())
        if error > allowed:
            site = owners[key]
            role = next(r for r, q in site.parameters.items() if q is p)
            raise UnsupportedError(
                f"{site.label}: the gradient of its {role}, put together from the recorded calls, is "
                f"not autograd's (relative error {float(error / actual.norm().clamp_min(1e-30)):.2g})."
                " Either the parameter is also used outside of recorded calls of its layer, or the "
                "layer computes something else than its rule says (an overridden forward?)"
                f"{_hint(site)}. Register a rule for its class, or freeze the parameter. extend(model, "
                "check_layers=False) switches this check off."
            )
    return moved


# By bytes per number: tolerated error relative to a gradient, and relative to its summands' size
# (gradients may cancel: that of a key's bias in attention is zero).
_TOLERANCES = {8: (1e-6, 1e-10), 4: (0.01, 1e-3), 2: (0.1, 0.03)}


def _is_bare(site: Site) -> bool:
    """Whether it is a parameter outside of layers, whose vectors come summed up."""
    return site.rule.in_graph and site.rule.elementwise


def _size_before_sums(start, reach: Reach, seed: Tensor, wanted: Site) -> Tensor:
    """Return the size of the summands of a gradient outside of layers.

    Such a parameter brings its per-sample vectors summed up already, and these may cancel: a learned
    scale in front of a norm has gradient zero, for each datum. (Where it cancels in a single
    operation, like that of a weight norm of one input, nothing tells but the sizes of the others.)
    """
    found = []

    def look(site: Site, g: Tensor) -> None:
        if site is wanted:
            found.append(g.norm())

    stream(start, reach, seed, look, absolute=True)
    return torch.stack(found).sum()


def _gradient(unit: Unit, role: str) -> tuple[Tensor, Tensor]:
    """Return the sum of a parameter's per-sample vectors, and that of their summands' sizes."""
    if unit.rule.elementwise:
        b = unit.b[0]
        G = (b * unit.a if role == "weight" else b).sum((0, 1, 2))
        # normalised inputs are of size 1, and so are their rounding errors, even where they vanish
        size = (b.abs() * (1 + unit.a.abs())).sum((0, 1, 2))
        return G.reshape(unit.parameters[role].shape), size
    if role == "bias":
        G, size = (normal.bias_per_sample(b).sum((0, 1)) for b in (unit.b, unit.b.abs()))
    else:
        G = normal.per_sample_sum(unit.a, unit.b)
        size = normal.per_sample_sum(unit.a.abs(), unit.b.abs())
    return unit.placed(role, G), size


def _by(site: Site) -> str:
    """Say which rows of a `sharing` block a layer is read by."""
    if site.sharing is None or site.sharing.kind == "mask":
        return ""
    if site.segments is None:
        return ", one row per datum, in the `sharing` block"
    return f", by segments of {site.segments.length} rows"


def _hint(site: Site) -> str:
    """Say what else may be wrong in a `sharing` block."""
    if site.sharing is None or site.sharing.kind != "mask":
        return ""
    return ", or positions that the mask of `sharing` leaves out reach the loss"


def _parameters(site: Site) -> list[nn.Parameter]:
    return list(site.parameters.values())


def _checkable(site: Site) -> bool:
    return site.rule is not None and site.error is None
