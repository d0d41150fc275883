"""Checking once per layer that each datum's vectors arrive at that datum's rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack_ext.errors import UnsupportedError
from backpack_ext.graph import Reach
from backpack_ext.losses import Layout
from backpack_ext.site import Site
from backpack_ext.sweep import stream


def check_layout(start: GradientEdge, reach: Reach, layout: Layout, like: Tensor) -> None:
    """Send a vector that belongs to one datum through the graph, and see where it arrives.

    Layers are read by the size of their leading axis, which says nothing about the order of the
    rows: ``[T, N, d]`` looks like ``[N, k, d]`` where T is a multiple of N. A layer that is read
    wrongly, or that mixes data, has this datum's vector in other data's rows. The check runs for
    layers that have not been read this way before, so a training loop pays for it once.

    Args:
        start: Edge of the loss's input (or of the model's output).
        reach: The graph behind it; its Sites have taps.
        layout: How the data are laid out there.
        like: A tensor of that shape, dtype and device.

    Raises:
        UnsupportedError: If vectors arrive at other data's rows.
    """
    if layout.batch == 1 or reach.coupled:
        return
    unseen = {site for site in reach.sites if site.reading not in site.verified and _checkable(site)}
    if not unseen:
        return
    parts = torch.zeros_like(layout.split(like.detach().unsqueeze(0)))
    pattern = torch.arange(parts[0, 0].numel(), device=like.device) % 7 + 1
    parts[0, 0] = pattern.reshape(parts.shape[2:]).to(like.dtype)
    seed = layout.join(parts)[0]

    def look(site: Site, g: Tensor) -> None:
        if site not in unseen:
            return
        b = site.rule.cotangents(site, g)
        per_datum = b.movedim(-3, 0).flatten(1).abs().amax(1)
        if per_datum.isnan().any():
            return  # the results will show it
        if per_datum[1:].any():
            raise UnsupportedError(
                f"{site.label}: a vector that belongs to the first of {site.batch} data arrives at "
                f"the rows of others. Its output of shape {tuple(site.out_shape)} is read with the "
                f"data along axis {site.batch_axis}. If they are elsewhere, say so: extend(model, "
                f"batch_axis={{{site.name!r}: AXIS}}). If the model mixes data on purpose, "
                "quantities per datum are undefined; extend(model, check_layout=False) switches "
                "this check off."
            )
        if per_datum[0] > 0:
            site.verified.add(site.reading)

    stream(start, reach, seed, look)


def _checkable(site: Site) -> bool:
    return site.rule is not None and site.error is None
