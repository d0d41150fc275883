"""Vectors travel: nested vector-Jacobian products from a loss's input to the layers' outputs."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backpack_ext.context import SuspendBackpack
from backpack_ext.errors import RecordingError
from backpack_ext.graph import Capture, Reach
from backpack_ext.site import Site

if TYPE_CHECKING:
    from backpack_ext.layer_pass import LayerPass

# Called with a Site and its vectors [v, *output.shape].
Deliver = Callable[[Site, Tensor], None]

# Memory for the cotangents of one chunk of columns, in bytes.
MAX_BYTES = 2**27

# Entries of all cotangents of one column up to which columns are vectorised: overhead dominates.
# Larger ones are looped over, which measured no slower (batching rules copy).
SMALL = 2**18


class Receiver:
    """Where the hooks on the graph send what arrives at the Sites' outputs in one pass.

    Vectors of a Site that are taken at several places (see `Capture`) are added up; `deliver` is
    called once per Site.

    Args:
        sites: The Sites of the pass, each with the places where its vectors are taken.

    Attributes:
        active: The receiver of the sweep that is running, if any: hooks look here first, and send
            to the main backward pass's own receiver only when no sweep is running.
    """

    active: Receiver | None = None
    # Whether absolute values go from where vectors are taken to a parameter outside of layers.
    absolute = False
    # Whether layers' inputs are read as their vectors arrive; see `backpack_ext.saved_input`.
    reads_inputs = False

    def __init__(self, sites: dict[Site, list[Capture]]):
        self.sites = sites
        self.partial: dict[Site, list] = {}
        self.done: set[Site] = set()

    def receive(self, site: Site, factor: float, g: Tensor) -> None:
        """Take what arrived at one place, ``[v, *shape]``."""
        if factor != 1:
            g = factor * g
        if g.shape[1:] != site.out_shape and not site.broadcast and site.error is None:
            g = g.reshape(len(g), *site.out_shape)  # from the base of which the output is a view
        places = len(self.sites[site])
        if places > 1:
            entry = self.partial.setdefault(site, [0, 0])
            entry[0] += 1
            entry[1] = entry[1] + g
            if entry[0] < places:
                return
            g = self.partial.pop(site)[1]
        self.done.add(site)
        if self.reads_inputs and site.x is None:
            site.bring_back(True)
        self.deliver(site, g)

    def deliver(self, site: Site, g: Tensor) -> None:
        """Take all of a Site's vectors, ``[v, *output.shape]``."""
        raise NotImplementedError


class _SweepReceiver(Receiver):
    def __init__(self, sites: dict[Site, list[Capture]], consumer: Deliver, reads_inputs: bool = False):
        super().__init__(sites)
        self.consumer, self.reads_inputs = consumer, reads_inputs

    def deliver(self, site: Site, g: Tensor) -> None:
        """Pass them on."""
        self.consumer(site, g)


@contextmanager
def silent():
    """Have taps pass over what a nested backward pass brings."""
    outer, Receiver.active = Receiver.active, Receiver({})
    try:
        yield
    finally:
        Receiver.active = outer


class Tap:
    """A hook on a graph node that sends a Site's vectors to the pass that is running.

    The node owns it, so it holds neither the node nor, strongly, the pass that placed it. It serves that
    pass alone: on operations that the pass did not execute, or where it failed, it stays.

    Attributes:
        current: The pass that runs sweeps.
    """

    __slots__ = ("factor", "main", "output_nr", "site", "vectors")

    current: weakref.ref[LayerPass] | None = None

    def __init__(self, site: Site, capture: Capture, main: weakref.ref[LayerPass]):
        self.site, self.main = site, main
        self.output_nr, self.factor = capture.edge.output_nr, capture.factor
        self.vectors = capture.vectors

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Take the gradient at the Site's output among those at the node's outputs."""
        g, receiver = grads[self.output_nr], Receiver.active
        if receiver is None:
            receiver = self.main()
            if receiver is None or receiver.task != torch._C._current_graph_task_id():
                return
        elif self.main is not Tap.current:
            return
        if g is not None and self.site in receiver.sites:
            g = g.unsqueeze(0)
            if self.vectors is not None:
                g = g.abs() if receiver.absolute else g
                with silent():
                    g = self.vectors(torch._C._current_autograd_node(), self.output_nr, g)
            receiver.receive(self.site, self.factor, g)


def sweep(
    start: GradientEdge,
    reach: Reach,
    columns: Callable[[int, int], Tensor],
    count: int,
    deliver: Deliver,
    chunk_done: Callable[[], None],
    gather: bool = True,
) -> None:
    """Send columns from the loss's input to all Sites behind it.

    One column streams: each Site's tap consumes its vector and lets it go. Several columns are
    gathered in chunks that fit into `MAX_BYTES`, vectorised where they are small; large ones stream one
    by one if nobody gains by chunks. ``python -m benchmarks.columns`` measures these choices.

    Args:
        start: Edge of the loss's input.
        reach: The graph behind it; its Sites have taps.
        columns: ``columns(a, b)`` returns columns a to b, ``[b - a, *shape]``.
        count: Number of columns.
        deliver: Takes each Site's vectors.
        chunk_done: Called after each chunk.
        gather: Whether a chunk of columns costs those who take it less than the columns one by one.
            If not, large columns stream too: nothing is copied, and no cotangents wait.

    Raises:
        RecordingError: If a Site is reached without its vectors arriving.
    """
    if not reach.sites:
        return
    per_column = sum(site.out_shape.numel() for site in reach.sites)
    if count == 1 or (per_column > SMALL and not gather):
        for k in range(count):
            stream(start, reach, columns(k, k + 1)[0], deliver, reads_inputs=True)
            chunk_done()
        return
    chunk = max(1, min(count, MAX_BYTES // (8 * per_column)))
    chunk = ceil(count / ceil(count / chunk))  # of equal size, without a small last one
    for a in range(0, count, chunk):
        with SuspendBackpack():
            seeds = columns(a, min(a + chunk, count))
            _chunk(start, reach, seeds, deliver, per_column <= SMALL)
        chunk_done()


def stream(
    start: GradientEdge,
    reach: Reach,
    seed: Tensor,
    deliver: Deliver,
    parameters: Sequence[Tensor] = (),
    absolute: bool = False,
    reads_inputs: bool = False,
) -> Sequence[Tensor | None]:
    """Send one column; each Site's vector is consumed as it arrives.

    With ``absolute``, parameters outside of layers get what absolute values send them. With
    ``reads_inputs``, inputs that a checkpoint computes again are there when vectors arrive.

    Returns:
        The column's gradients of ``parameters``.

    Raises:
        RecordingError: If a Site is reached without its vector arriving.
    """
    receiver = _SweepReceiver(reach.sites, deliver, reads_inputs)
    receiver.absolute = absolute
    outer, Receiver.active = Receiver.active, receiver
    ends, options = [*reach.sources.values(), *parameters], {"retain_graph": True, "allow_unused": True}
    try:
        with SuspendBackpack(ends):
            found = torch.autograd.grad([start], ends, [seed], **options)
    finally:
        Receiver.active = outer
    # the nodes where the sweep ends are mostly not executed, so their taps were silent
    for site, g in zip(reach.sources, found, strict=False):
        if site not in receiver.done and not site.broadcast and g is not None:
            receiver.receive(site, 1.0, g.unsqueeze(0))
    _check_all(reach, receiver)
    return found[len(reach.sources) :]


def _chunk(start: GradientEdge, reach: Reach, seeds: Tensor, deliver: Deliver, small: bool) -> None:
    """Send several columns, and hand each Site all of its vectors at once."""
    places = [(site, capture) for site, captures in reach.sites.items() for capture in captures]
    edges = [capture.edge for _, capture in places]
    with silent():
        vectors = _vectorised(start, edges, seeds) if small else _looped(start, edges, seeds)
        for k, (_, capture) in enumerate(places):
            if capture.vectors is not None and vectors[k] is not None:
                vectors[k] = capture.vectors(capture.edge.node, capture.edge.output_nr, vectors[k])
    receiver = _SweepReceiver(reach.sites, deliver)
    for (site, capture), g in zip(places, vectors, strict=True):
        if g is not None:
            receiver.receive(site, capture.factor, g)
    _check_all(reach, receiver)


def _vectorised(start: GradientEdge, edges: list[GradientEdge], seeds: Tensor) -> list:
    try:
        with warnings.catch_warnings():
            # torch loops over the columns by itself where an operation has no batching rule
            warnings.filterwarnings("ignore", message="There is a performance drop")
            options = {"retain_graph": True, "is_grads_batched": True, "allow_unused": True}
            return list(torch.autograd.grad([start], edges, [seeds], **options))
    except RuntimeError:  # a custom autograd.Function that cannot be vectorised, for instance
        return _looped(start, edges, seeds)


def _looped(start: GradientEdge, edges: list[GradientEdge], seeds: Tensor) -> list:
    columns = [
        torch.autograd.grad([start], edges, [seed], retain_graph=True, allow_unused=True)
        for seed in seeds
    ]
    return [None if gs[0] is None else torch.stack(gs) for gs in zip(*columns, strict=True)]


def _check_all(reach: Reach, receiver: Receiver) -> None:
    missing = [site.label for site in reach.sites if site not in receiver.done]
    if missing:
        raise missing_cotangents(missing)


def missing_cotangents(labels: list[str]) -> RecordingError:
    """Return the error for Sites that a backward pass should have reached."""
    return RecordingError(
        f"No vector arrived at the output of {', '.join(labels)}, although the loss depends on it. "
        "An operation between the layer and the loss returned no gradient for it (a custom "
        "autograd.Function that returns None?)."
    )
