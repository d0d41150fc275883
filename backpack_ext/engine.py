"""What happens in a backward pass: events, sweeps, publishing.

The order of events in one ``backward()``:

1. the hook on an extended loss's value fires; it walks the graph, taps the layers' outputs and runs
   the sweeps;
2. the hook on the model's output fires; if no extended loss lies behind it, it taps the layers;
3. the taps fire as the gradient passes the layers;
4. a callback at the end of the backward pass joins, checks and publishes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from math import sqrt

import torch
from backpack.context import CTX
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.bare import add_bare
from backpack_ext.check import check_layers
from backpack_ext.context import (
    CollectingHook,
    active_extensions,
    check_savefields,
    loss_multiplier,
    note_computed,
)
from backpack_ext.coverage import check_coverage
from backpack_ext.diagonal_pass import DiagonalPass
from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.graph import Reach, new_sites, parameter_behind, walk
from backpack_ext.layout import Layout
from backpack_ext.loss_call import KnownDiagonal, LossCall
from backpack_ext.pending import Pending
from backpack_ext.per_datum import PerDatum
from backpack_ext.rules.base import Rule
from backpack_ext.sharing import sharing, sharing_of
from backpack_ext.site import Site
from backpack_ext.sweep import Receiver, Tap, missing_cotangents, sweep
from backpack_ext.unit import Unit
from curvature.decomposition import widen

# The running backward passes by graph task. Each is held by its own final callback, so that one
# that raises is forgotten together with its task.
_passes: weakref.WeakValueDictionary[int, BackwardPass] = weakref.WeakValueDictionary()

# The same without extensions, where several outputs (of parts called on their own, say) have been met.
_plain_passes: weakref.WeakValueDictionary[int, _PlainPass] = weakref.WeakValueDictionary()

# Where stores go instead of the parameters, while a quantity is collected over a data set.
_sink: Callable[[Extension, dict, float], None] | None = None


@contextmanager
def redirect(sink: Callable[[Extension, dict, float], None]):
    """Send each extension's store (and ``r c``) to ``sink`` instead of publishing results."""
    global _sink
    outer, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = outer


def on_loss(call: LossCall | KnownDiagonal, grad: Tensor) -> None:
    """React to the gradient that arrives at an extended loss's value, or at another tied scalar."""
    if Receiver.active is not None:
        return
    extensions = active_extensions()
    if extensions:
        if call.released:
            raise RecordingError(
                f"{call.label}: this graph was already differentiated without retain_graph=True."
            )
        running = current_pass(extensions)
        if isinstance(call, LossCall):
            running.loss(call, grad)
        else:
            running.diagonal(call, grad)
    if not keeps_graph():
        call.release()


def on_unrecorded_output(grads: tuple[Tensor | None, ...]) -> None:
    """React to gradients at the output of a model whose layers were not recorded (a node's hook)."""
    if Receiver.active is None:
        extensions = active_extensions()
        if extensions:
            grad = next((g for g in grads if g is not None), None)
            if grad is not None:
                current_pass(extensions).output(torch._C._current_autograd_node(), grad)


def on_model_output(grad: Tensor) -> None:
    """React to the gradient that arrives at the output of an extended model (a tensor hook)."""
    if Receiver.active is not None:
        return
    node = torch._C._current_autograd_node()
    extensions = active_extensions()
    if extensions:
        current_pass(extensions).output(node, grad)
    elif not keeps_graph():
        task = torch._C._current_graph_task_id()
        plain = _plain_passes.get(task)
        if plain is None:
            plain = _plain_passes[task] = _PlainPass()
            Variable._execution_engine.queue_callback(plain.end)
        plain.release(node)


class _PlainPass:
    """A backward pass without extensions: we free what autograd frees, and visit each node once."""

    def __init__(self):
        self.seen: set[Node] = set()

    def release(self, start: Node) -> None:
        """Let go of the inputs of the calls that this pass differentiates behind a node."""
        for node, site in new_sites(start, self.seen):
            if torch._C._will_engine_execute_node(node):
                site.release()

    def end(self) -> None:
        """Let go of the nodes."""
        self.seen.clear()


def keeps_graph() -> bool:
    """Whether the running backward pass was called with ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def current_pass(extensions: tuple[Extension, ...]) -> BackwardPass:
    """Return the running backward pass, begun by its first event."""
    task = torch._C._current_graph_task_id()
    running = _passes.get(task)
    if running is None:
        running = _passes[task] = BackwardPass(extensions)
        Variable._execution_engine.queue_callback(running.end)
    return running


class BackwardPass(Receiver):
    """The state of one backward pass: what each extension has accumulated so far.

    It receives what the main backward pass itself brings to the layers' outputs.

    Args:
        extensions: Our active extensions.
    """

    def __init__(self, extensions: tuple[Extension, ...]):
        check_savefields(CTX.active_exts)
        super().__init__({})
        self.extensions = extensions
        self.stores: dict[Extension, dict] = {ext: {} for ext in extensions}
        self.main = [e for e in extensions if e.vectors.kind in ("gradient", "none")]
        self.diagonals = [e for e in extensions if e.vectors.kind == "diagonal"]
        self.passes: dict[Extension, DiagonalPass] = {}
        self.outputs: list[Node] = []  # of models
        self.multiplier = loss_multiplier()
        self.keep = keeps_graph()
        # whether inputs are needed until the end
        self.holds = self.keep or any(e.batch for e in self.diagonals)
        self._quiet = Quiet()
        self.scale: float | None = None
        self.nodes: list[Collection[Node]] = []  # visited by walks
        self.unscaled: dict[Site, None] = {}  # reached from a model's output, not (yet) from a loss
        self.expected: dict[Site, bool] = {}  # has the gradient passed?
        self.bare: dict[tuple, Site] = {}  # Sites of parameters outside of layers
        self.pending = Pending()
        self.handles: list = []
        self.hook = CollectingHook()
        # whether anyone asks for layers
        self.layers = self.hook.wanted or any(e.needs_layers for e in extensions)

    # ------------------------------------------------------------------ events

    def loss(self, call: LossCall, grad: Tensor) -> None:
        """Check a loss, walk the graph behind it, run the sweeps that were asked for."""
        seeds = [e for e in self.extensions if e.vectors.kind in ("exact", "mc")]
        scaled = [e for e in self.extensions if e.needs_scale]
        if grad.numel() != 1:
            raise ValueError(
                f"{call.label}: the loss's value has shape {tuple(grad.shape)}; curvature is that "
                'of a scalar total. Use reduction "mean" or "sum", or tie your total to a loss with '
                "backpack_ext.attach_loss."
            )
        if call.z.numel() == 0:
            raise empty_batch(call.label)
        if not self.layers:
            if _sink is not None:
                self._note_scale(call, grad, [])
            self._start_diagonals(call, grad)
            return
        reach = walk(call.start.node)
        batch = self._batch(call.label, reach)
        call.sharing, layout = self._sharing(reach, call.label), None
        if call.sharing is not None:
            with suppress(UnsupportedError):  # `fisher="exact"` will say why
                layout = call.layout(batch)
        elif (reach.sites or reach.whole) and call.z.shape[:1].numel() % batch == 0:
            layout = call.layout(batch)
        with self._quiet(call.z.device.type):
            add_bare(reach, call.start, layout, call.z, self.bare)
        self._check_reach(reach)
        if seeds or scaled or _sink is not None:
            call.check()
            self._note_scale(call, grad, scaled)
        for site in reach.sites:
            self.unscaled.pop(site, None)
        self._tap(reach)
        self._check_layers(call.start, reach, layout, call.z, call.sharing, call.gradient)
        for group in _by_sweep(seeds):
            self._sweep(call, reach, batch, group)
        self._start_diagonals(call, grad)

    def diagonal(self, call: KnownDiagonal, grad: Tensor) -> None:
        """Start the recursions of Hessian diagonals at a scalar whose diagonal was given."""
        for ext in self.extensions:
            if ext.vectors.kind in ("exact", "mc") or ext.needs_scale or _sink is not None:
                what = type(ext).__name__ if _sink is None else "dataset.collect"
                raise RecordingError(
                    f"{what} needs more of a loss than attach_diagonal says. Tie the value to a "
                    "loss module with backpack_ext.attach_loss."
                )
        if self.layers:
            self.output(torch._C._current_autograd_node(), grad)
        self._start_diagonals(call, grad)

    def _start_diagonals(self, call: LossCall | KnownDiagonal, grad: Tensor) -> None:
        """Start or go on with the recursions of Hessian diagonals."""
        if not self.diagonals:
            return
        with self._quiet(grad.device.type):
            # a number, unless one would have to wait for it; or widened, because one over the number of
            # terms needs the digits
            factor = grad.item() if grad.device.type == "cpu" else widen(grad.reshape(()))
            if isinstance(call, LossCall):
                call.check()
                factor = factor * call.scale()
            for ext in self.diagonals:
                if ext not in self.passes:
                    per_datum = PerDatum(self.sites) if ext.batch else None
                    self.passes[ext] = DiagonalPass(ext, self.keep, self._quiet, per_datum)
                self.passes[ext].start(call, factor)

    def output(self, node: Node, grad: Tensor) -> None:
        """Tap the layers behind a model's output, unless a loss has done so.

        The loss may still come: a model that computes its loss inside has both among its outputs.
        """
        self.outputs.append(node)
        if not self.layers or any(node in nodes for nodes in self.nodes):
            return
        reach = walk(node)
        # hooks on tensors know the node but not which of its outputs; only the first is checked
        layout, first = None, tuple(node._input_metadata[0].shape) == tuple(grad.shape)
        batch = self._batch("the model's output", reach)
        known = next(iter(reach.sites), reach.whole)
        context = self._sharing(reach, "the model's output")
        if known is not None and first and grad.dim():
            axis, segments = min(known.batch_axis, 1), None
            with suppress(UnsupportedError):  # rows that cannot be told apart by datum
                if context is not None:
                    segments = context.of_loss(grad.shape[0], batch, axis)
                layout = Layout(grad.shape, batch, axis, None, segments)
        with self._quiet(grad.device.type):
            add_bare(reach, GradientEdge(node, 0), layout, grad, self.bare)
        self._check_reach(reach)
        self.unscaled.update((site, None) for site in reach.sites if site not in self.expected)
        self._tap(reach)
        if first:
            self._check_layers(GradientEdge(node, 0), reach, layout, grad, context, lambda: grad)

    def end(self) -> None:
        """Join, check and publish: the engine's callback at the end of the backward pass."""
        for handle in self.handles:
            handle.remove()
        try:
            self._check_losses()
            self._flush(self.main, self.pending)
            missing = [site.label for site, passed in self.expected.items() if not passed]
            if missing and self.main:
                raise missing_cotangents(missing)
            for ext, running in self.passes.items():
                self.stores[ext] = running.finish(self.multiplier)
            for ext, store in self.stores.items():
                if _sink is not None:
                    _sink(ext, store, 1.0 if self.scale is None else self.scale)
                else:
                    field = ext.savefield
                    with torch.no_grad():
                        results = ext.finish(store)
                    for parameter, result in results:
                        setattr(parameter, field, result)
            note_computed()
        finally:
            modules = self.hook.remove()
        for site in self.bare.values():  # another pass makes its own
            site.release()
        if not self.keep:
            for site in self.expected:
                site.release()
        if self.hook.wanted:
            for module in modules | dict.fromkeys(site.module for site in self.expected):
                self.hook.users(module)

    # ------------------------------------------------------------------ checks

    def _batch(self, start: str, reach: Reach) -> int:
        """Return the batch size that all layers agree on."""
        self.nodes.append(reach.nodes)
        batches = {site.batch: site for sites in (self.sites, reach.sites) for site in sites}
        if len(batches) > 1:
            found = ", ".join(f"{site.label}: {N}" for N, site in batches.items())
            raise RecordingError(
                f"The layers behind {start} disagree about the batch size ({found}). It is the "
                "leading size of the first tensor that the outermost extended module is called with: "
                "extend the whole model, not its parts, and call the whole model, with a tensor. If "
                "another argument counts the data, name it: extend(model, batch_argument=NAME)."
            )
        batch = next(iter(batches), 1 if reach.whole is None else reach.whole.batch)
        if batch == 0:
            raise empty_batch(start)
        return batch

    def _sharing(self, reach: Reach, start: str) -> sharing | None:
        """Return the `sharing` block of the forward pass, if in one."""
        if reach.sites or reach.whole is None:
            return sharing_of(reach.sites, start)
        return reach.whole.block

    def _check_layers(
        self,
        start: GradientEdge,
        reach: Reach,
        layout: Layout | None,
        like: Tensor,
        context: sharing | None,
        gradient: Callable[[], Tensor],
    ) -> None:
        """Check layers that are new; what turns out to be no layer is left to autograd."""
        if not reach.sites:
            return
        masked = context is not None and context.kind == "mask"
        with self._quiet(like.device.type):
            again = check_layers(start, reach, layout, like, gradient if masked else None)
            if again:
                add_bare(reach, start, layout, like, self.bare)
        if again:
            self._check_reach(reach)
            self._tap(reach)

    def _check_reach(self, reach: Reach) -> None:
        """Check what a loss or output depends on."""
        for ext in self.extensions:
            if not ext.needs_layers:
                continue
            check_coverage(ext, reach.sites, reach.parameters)
            if reach.coupled and ext.needs_independent_samples:
                raise UnsupportedError(
                    f"{type(ext).__name__} needs vectors that depend on one datum each, but the "
                    "model contains a batch norm in training mode, which couples the data of a "
                    "batch. Call eval() on the batch norm modules, or use another norm."
                )

    def _check_losses(self) -> None:
        """Name the missing loss for extensions that need one."""
        for ext in self.extensions:
            if self.unscaled and (ext.vectors.kind in ("exact", "mc") or ext.needs_scale):
                raise RecordingError(
                    f"{type(ext).__name__} needs the loss, but the gradient reached "
                    f"{next(iter(self.unscaled)).label} without passing an extended loss. Extend the "
                    "loss module with backpack_ext.extend, or tie a scalar that no module computes "
                    "to a loss with backpack_ext.attach_loss."
                )
        for ext in self.diagonals:
            known: Collection[Node] = ()
            if ext in self.passes:
                recursion = self.passes[ext].recursion
                known = recursion.operations.keys() | recursion.chain.passed
            for node in self.outputs:
                if node not in known and (p := parameter_behind(node, known)) is not None:
                    raise RecordingError(
                        f"{type(ext).__name__} needs the loss, but the gradient reached a parameter of "
                        f"shape {tuple(p.shape)} without passing an extended loss. Extend the loss "
                        "module with backpack_ext.extend, or tie a scalar that no module computes to a "
                        "loss with backpack_ext.attach_loss, or to a Hessian diagonal with "
                        "backpack_ext.attach_diagonal."
                    )

    def _note_scale(self, call: LossCall, grad: Tensor, scaled: list[Extension]) -> None:
        """Record r c of a loss.

        Raises:
            ValueError: If c is negative, or if losses of different scale meet in an extension that
                has to divide by it.
        """
        c = float(grad) / self.multiplier
        if c < 0:
            raise ValueError(
                f"{call.label} enters the total with the negative factor {c:g}: its curvature would "
                "be negative and has no real root. Give it a positive factor."
            )
        scale = call.scale() * c
        same = self.scale is None or abs(scale - self.scale) <= 1e-6 * max(scale, self.scale)
        if (scaled or _sink is not None) and not same:
            what = f"{type(scaled[0]).__name__} with empirical vectors" if scaled else "dataset.collect"
            raise UnsupportedError(
                f"{what} divides by the scale of the loss, but this backward pass has losses of "
                f"scale {self.scale:g} and {scale:g}. Use one pass per loss, or equal scales."
            )
        self.scale = scale

    def _tap(self, reach: Reach) -> None:
        """Place taps on the Sites' outputs, and note which of them the gradient will pass."""
        tapped, ref = self.sites, weakref.ref(self)
        for site, captures in reach.sites.items():
            if site in tapped:
                if site.broadcast and len(captures) != len(tapped[site]):
                    raise UnsupportedError(
                        f"{site.label}: its output is shared by all data and reaches two losses of "
                        "one backward pass in different ways. Use one backward pass per loss."
                    )
                continue
            tapped[site] = captures
            for capture in captures:
                node = capture.edge.node
                handle = node.register_prehook(Tap(site, capture, ref))
                if self.keep:
                    self.handles.append(handle)
            if torch._C._will_engine_execute_node(captures[0].edge.node):
                self.expected[site] = False

    # ------------------------------------------------------------------ vectors

    def _sweep(self, call: LossCall, reach: Reach, batch: int, group: list[Extension]) -> None:
        """Run one sweep for all extensions that share its vectors."""
        first = group[0]
        with self._quiet(call.z.device.type):
            if first.vectors.kind == "mc":
                count, generator = first.vectors.samples, first.generator(call.z.device)
                size = sqrt(self.scale / count)

                def columns(a: int, b: int) -> Tensor:
                    return torch.stack([size * call.sample(generator) for _ in range(a, b)])

            else:
                count = call.columns(batch)
                for ext in group:
                    _check_columns(ext, count)
                size = sqrt(self.scale)

                def columns(a: int, b: int) -> Tensor:
                    return size * call.exact(batch, a, b)

            pending = Pending()
            sweep(
                call.start,
                reach,
                columns,
                count,
                partial(self._deliver, group, pending),
                partial(self._flush, group, pending),
            )

    def deliver(self, site: Site, g: Tensor) -> None:
        """Take the main backward's own gradient at a layer's output."""
        self.expected[site] = True
        if self.main:
            if self.multiplier != 1:
                g = g / self.multiplier
            self._deliver(self.main, self.pending, site, g)
        elif not self.holds and not site.shared:
            site.release()

    def _deliver(self, extensions, pending: Pending, site: Site, g: Tensor) -> None:
        """Hand a Site's vectors over at once, or keep them to be joined with others."""
        if site.error is not None:
            return  # reported by check_coverage
        if site.shared:
            pending.shared.append((site, g))
        elif pending.add_small(site, g):
            if pending.full:
                self._flush_small(extensions, pending)
        else:
            layers = [([site], [g])]
            self._absorb(extensions, layers)
            self._release(extensions, layers)

    def _flush(self, extensions, pending: Pending) -> None:
        """Absorb what is pending: the calls of one layer together, then layers of equal shape."""
        self._flush_small(extensions, pending)
        for sites, gs in pending.take_shared():
            self._absorb(extensions, [(sites, gs)])
        for ext in extensions:
            ext.settle(self.stores[ext])

    def _flush_small(self, extensions, pending: Pending) -> None:
        for layers in pending.take_small():
            self._absorb(extensions, layers)
            self._release(extensions, layers)

    def _absorb(self, extensions, layers: list[tuple[list[Site], list[Tensor]]]) -> None:
        """Hand layers of equal shape, each with its calls and their vectors, to the extensions."""
        site = layers[0][0][0]
        scale = 1.0 if self.scale is None else self.scale
        units: dict[Rule, list[Unit]] = {}
        with self._quiet(layers[0][1][0].device.type):
            for ext in extensions:
                rule = ext.rule_for(site.module, site.rule)
                if rule is None:
                    continue  # reported by check_coverage
                if rule not in units:
                    units[rule] = [Unit(sites, gs, rule, scale) for sites, gs in layers]
                    if len(extensions) > 1 and sum(other.forms_grads for other in extensions) > 1:
                        for unit in units[rule]:
                            unit.keeps_grads = True
                if _sink is None:
                    # an old result makes room for the new one: less memory, and none of it fresh
                    for unit in units[rule]:
                        for p in unit.parameters.values():
                            p.__dict__.pop(ext.savefield, None)
                ext.absorb_all(self.stores[ext], units[rule])

    def _release(self, extensions, layers) -> None:
        """Let go of the inputs of calls that nothing will ask for any more."""
        if extensions is self.main and not self.holds:
            for sites, _ in layers:
                sites[0].release()


class Quiet:
    """Makes contexts without gradients and without autocast, whatever the caller has switched on."""

    def __init__(self):
        self.grad = torch.is_grad_enabled()
        self.autocast = {kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}

    def __call__(self, device_type: str) -> AbstractContextManager:
        """Return a context for computations on a type of device."""
        if not self.grad and not self.autocast:
            return _NOTHING
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        if device_type in self.autocast:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        return stack


_NOTHING = nullcontext()


def empty_batch(start: str) -> ValueError:
    """Return the error for a batch without data."""
    return ValueError(f"The batch behind {start} is empty; there is nothing to compute.")


def _by_sweep(extensions: list[Extension]) -> list[list[Extension]]:
    groups: dict[tuple, list[Extension]] = {}
    for ext in extensions:
        groups.setdefault(ext.sweep_key(), []).append(ext)
    return list(groups.values())


def _check_columns(ext: Extension, count: int) -> None:
    if count > ext.max_columns:
        raise ValueError(
            f'{type(ext).__name__}: fisher="exact" needs {count} columns per datum (classes times '
            f'positions), more than max_columns={ext.max_columns}. Use fisher="mc", or raise '
            "max_columns if you can wait."
        )
