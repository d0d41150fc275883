"""Vectors travel: nested vector-Jacobian products from a loss's input to the layers' outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack_ext.context import SuspendBackpack
from backpack_ext.errors import RecordingError
from backpack_ext.graph import Capture, Reach
from backpack_ext.site import Site

# Called with a Site and its vectors [v, *output.shape].
Deliver = Callable[[Site, Tensor], None]

# Memory for the cotangents of one chunk of columns, in bytes.
MAX_BYTES = 2**28


class Receiver:
    """Where the Sites' tensor hooks send what arrives during one backward pass.

    Vectors of a Site that are taken at several places (see `Capture`) are added up; `deliver` is
    called once per Site.
    """

    def __init__(self, reach: Reach, deliver: Deliver):
        self.reach, self.deliver = reach, deliver
        self.partial: dict[Site, list] = {}
        self.done: set[Site] = set()

    def at_output(self, site: Site, g: Tensor) -> None:
        """Receive what arrives at the layer's own output."""
        if not site.broadcast and site in self.reach.sites:
            self.done.add(site)
            self.deliver(site, g.unsqueeze(0))

    def at_capture(self, site: Site, g: Tensor) -> None:
        """Receive what arrives at one of several places, as ``[v, *shape]``."""
        entry = self.partial.setdefault(site, [0, None])
        entry[0] += 1
        entry[1] = g if entry[1] is None else entry[1] + g
        if entry[0] == len(self.reach.sites[site]):
            del self.partial[site]
            self.done.add(site)
            self.deliver(site, entry[1])

    def hook_captures(self, site: Site) -> list:
        """Hook the nodes behind a broadcast; returns handles to remove."""
        return [c.edge.node.register_prehook(_PreHook(self, site, c)) for c in self.reach.sites[site]]


class _PreHook:
    """Hands the gradient at a node's output to a receiver, in that receiver's own pass only.

    The main backward's receiver is at work when no sweep is.
    """

    def __init__(self, receiver: Receiver, site: Site, capture: Capture):
        self.receiver, self.site, self.capture = receiver, site, capture

    def __call__(self, grads):
        ours = Sweep.active is None or Sweep.active is self.receiver
        if ours and grads[0] is not None:
            self.receiver.at_capture(self.site, (self.capture.factor * grads[0]).unsqueeze(0))


class Sweep:
    """The sweep that is running, if any: hooks look here first.

    ``active`` is a `Receiver` while one column streams through the hooks, ``IGNORE`` while columns
    are taken from what ``autograd.grad`` returns.
    """

    IGNORE = object()
    active: Receiver | object | None = None


def sweep(
    start: GradientEdge,
    reach: Reach,
    columns: Callable[[int, int], Tensor],
    count: int,
    deliver: Deliver,
    chunk_done: Callable[[], None],
) -> None:
    """Send columns from the loss's input to all Sites behind it.

    One column streams: each Site's hook consumes its vector and lets it go. Several columns are
    vectorised in chunks that fit into `MAX_BYTES`.

    Args:
        start: Edge of the loss's input.
        reach: The graph behind it.
        columns: ``columns(a, b)`` returns columns a to b, ``[b - a, *shape]``.
        count: Number of columns.
        deliver: Takes each Site's vectors.
        chunk_done: Called after each chunk.

    Raises:
        RecordingError: If a Site is reached without its vectors arriving.
    """
    with SuspendBackpack():
        if count == 1:
            _stream(start, reach, columns(0, 1)[0], deliver)
            chunk_done()
            return
        per_column = sum(site.out_shape.numel() for site in reach.sites) * 8
        chunk = max(1, min(count, MAX_BYTES // max(per_column, 1)))
        for a in range(0, count, chunk):
            _vectorised(start, reach, columns(a, min(a + chunk, count)), deliver)
            chunk_done()


def _stream(start: GradientEdge, reach: Reach, seed: Tensor, deliver: Deliver) -> None:
    receiver = Receiver(reach, deliver)
    handles = [h for s in reach.sites if s.broadcast for h in receiver.hook_captures(s)]
    outer, Sweep.active = Sweep.active, receiver
    try:
        torch.autograd.grad([start], reach.sources, [seed], retain_graph=True)
    finally:
        Sweep.active = outer
        for handle in handles:
            handle.remove()
    missing = [site.label for site in reach.sites if site not in receiver.done]
    if missing:
        raise missing_cotangents(missing)


def _vectorised(start: GradientEdge, reach: Reach, seeds: Tensor, deliver: Deliver) -> None:
    places = [(site, capture) for site, cs in reach.sites.items() for capture in cs]
    outer, Sweep.active = Sweep.active, Sweep.IGNORE
    try:
        vectors = torch.autograd.grad(
            [start],
            [capture.edge for _, capture in places],
            [seeds],
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
        )
    finally:
        Sweep.active = outer
    receiver = Receiver(reach, deliver)
    missing = [site.label for (site, _), g in zip(places, vectors, strict=True) if g is None]
    if missing:
        raise missing_cotangents(missing)
    for (site, capture), g in zip(places, vectors, strict=True):
        if site.broadcast:
            receiver.at_capture(site, capture.factor * g)
        else:  # the edge may be that of the base of which the output is a view
            receiver.at_capture(site, g.reshape(len(g), *site.out_shape))


def missing_cotangents(labels: list[str]) -> RecordingError:
    """Return the error for Sites that a backward pass should have reached."""
    return RecordingError(
        f"No vector arrived at the output of {', '.join(labels)}, although the loss depends on it. "
        "An operation between the layer and the loss returned no gradient for it (a custom "
        "autograd.Function that returns None?)."
    )
