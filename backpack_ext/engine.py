"""What happens in a backward pass: hooks on losses and layers, sweeps, publishing.

The order of events in one ``backward()``:

1. the hook on an extended loss's value fires first; it walks the graph and runs the sweeps;
2. the hooks on the layers' outputs fire as the gradient passes;
3. a callback at the end of the backward pass joins, checks and publishes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from math import sqrt

import torch
from backpack.context import CTX
from torch import Tensor, nn
from torch.autograd import Variable

from backpack_ext.context import (
    active_extensions,
    check_savefields,
    loss_multiplier,
    note_computed,
)
from backpack_ext.coverage import check_coverage
from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.graph import Reach, walk
from backpack_ext.losses import LossCall
from backpack_ext.site import Site
from backpack_ext.sweep import Receiver, Sweep, missing_cotangents, sweep
from backpack_ext.unit import Unit

# The running backward passes by graph task. Each is held by its own final callback, so that one
# that raises is forgotten together with its task.
_passes: weakref.WeakValueDictionary[int, BackwardPass] = weakref.WeakValueDictionary()

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


def on_loss(call: LossCall, grad: Tensor) -> None:
    """React to the gradient that arrives at an extended loss's value (a tensor hook)."""
    if Sweep.active is not None:
        return
    extensions = active_extensions()
    if extensions:
        current_pass(extensions).loss(call, grad)
    if not keeps_graph():
        call.release()


def on_output(site: Site, grad: Tensor) -> None:
    """React to the cotangent that arrives at a layer's output (a tensor hook)."""
    if Sweep.active is not None:
        if isinstance(Sweep.active, Receiver):
            Sweep.active.at_output(site, grad)
        return
    extensions = active_extensions()
    if extensions:
        current_pass(extensions).gradient(site, grad)
    elif not keeps_graph():
        site.release()


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


class BackwardPass:
    """The state of one backward pass: what each extension has accumulated so far.

    Args:
        extensions: Our active extensions.
    """

    def __init__(self, extensions: tuple[Extension, ...]):
        check_savefields(CTX.active_exts)
        self.extensions = extensions
        self.stores: dict[Extension, dict] = {ext: {} for ext in extensions}
        self.main = [e for e in extensions if e.vectors.kind in ("gradient", "none")]
        self.multiplier = loss_multiplier()
        self.losses = 0
        self.scale: float | None = None
        self.keep = keeps_graph()
        self.expected: dict[Site, bool] = {}  # Sites of the losses -> has the gradient passed?
        self.deferred: list[tuple[Site, Tensor]] = []
        self.visited: dict[Site, None] = {}
        self.reached: dict[int, nn.Parameter] | None = None  # where no loss says what it reaches
        self.receiver = Receiver(Reach(), self._take_gradient)
        self.handles: list = []
        self.hook = _CollectingHook()

    # ------------------------------------------------------------------ events

    def loss(self, call: LossCall, grad: Tensor) -> None:
        """Check a loss, walk the graph behind it, run the sweeps that were asked for."""
        if call.released:
            raise RecordingError(
                f"{call.label}: this graph was already differentiated without retain_graph=True."
            )
        seeds = [e for e in self.extensions if e.vectors.kind in ("exact", "mc")]
        scaled = [e for e in self.extensions if e.needs_scale]
        if grad.numel() != 1:
            raise ValueError(
                f"{call.label}: the loss's value has shape {tuple(grad.shape)}; curvature is that "
                'of a scalar total. Use reduction "mean" or "sum", or tie your total to a loss with '
                "backpack_ext.attach_loss."
            )
        reach = walk(call.start)
        batch = self._check_reach(call, reach)
        if seeds or scaled or _sink is not None:
            call.check()
            self._note_scale(call, grad, scaled)
        self.losses += 1
        self._expect(reach)
        for group in _by_sweep(seeds):
            self._sweep(call, reach, batch, group)

    def gradient(self, site: Site, grad: Tensor) -> None:
        """Take the main backward's own gradient at a layer's output."""
        if not self.losses and self.reached is None:
            self._without_loss(site)
        if site in self.expected:
            self.expected[site] = True
        self.visited[site] = None
        if not site.broadcast:
            self._take_gradient(site, grad.unsqueeze(0))
        if not self.keep and not site.shared:
            site.release()

    def end(self) -> None:
        """Join, check and publish: the engine's callback at the end of the backward pass."""
        for handle in self.handles:
            handle.remove()
        try:
            self._flush(self.main)
            if self.reached:
                for ext in self.extensions:
                    check_coverage(ext, self.visited, self.reached)
            missing = [site.label for site, seen in self.expected.items() if not seen]
            if missing:
                raise missing_cotangents(missing)
            for ext, store in self.stores.items():
                scale = self.scale if ext.needs_scale and self.scale is not None else 1.0
                if _sink is not None:
                    _sink(ext, store, self.scale if self.scale is not None else 1.0)
                else:
                    for parameter, result in ext.finish(store, scale):
                        setattr(parameter, ext.savefield, result)
            note_computed()
        finally:
            modules = self.hook.remove()
        for site in self.visited:
            modules.setdefault(site.module)
            if not self.keep:
                site.release()
        for module in modules:
            self.hook.users(module)

    # ------------------------------------------------------------------ checks

    def _check_reach(self, call: LossCall, reach: Reach) -> int:
        """Check what the loss depends on; return the batch size."""
        batches = {site.batch: site.label for site in reach.sites}
        if len(batches) > 1:
            found = ", ".join(f"{label}: {N}" for N, label in batches.items())
            raise RecordingError(
                f"The layers behind {call.label} disagree about the batch size ({found}). It is the "
                "leading size of the outermost extended module's input: extend the whole model, not "
                "its parts, and call the whole model."
            )
        batch = next(iter(batches), 1)
        if batch == 0 or call.z.numel() == 0:
            raise ValueError(f"{call.label}: the batch is empty; there is nothing to compute.")
        for ext in self.extensions:
            check_coverage(ext, reach.sites, reach.parameters)
            if reach.coupled and ext.needs_independent_samples:
                raise UnsupportedError(
                    f"{type(ext).__name__} needs vectors that depend on one datum each, but the "
                    "model contains a batch norm in training mode, which couples the data of a "
                    "batch. Call eval() on the batch norm modules, or use another norm."
                )
        return batch

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
        if scaled and not same:
            raise UnsupportedError(
                f"{type(scaled[0]).__name__} with empirical vectors divides by the scale of the "
                f"loss, but this backward pass has losses of scale {self.scale:g} and {scale:g}. "
                "Use one backward pass per loss, equal scales, or sampled vectors."
            )
        self.scale = scale

    def _without_loss(self, site: Site) -> None:
        """Allow extensions that need no loss; name the missing loss for the others."""
        for ext in self.extensions:
            if ext.vectors.kind in ("exact", "mc") or ext.needs_scale:
                raise RecordingError(
                    f"{type(ext).__name__} needs the loss, but the gradient reached {site.label} "
                    "without passing an extended loss. Extend the loss module with "
                    "backpack_ext.extend, or tie a scalar that no module computes to a loss with "
                    "backpack_ext.attach_loss."
                )
        if site.batch == 0:
            raise ValueError("The batch is empty; there is nothing to compute.")
        model = site.root() if site.root is not None else site.module
        self.reached = {
            id(p): p
            for p in model.parameters()
            if p.requires_grad
            and torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(p).node)
        }

    def _expect(self, reach: Reach) -> None:
        for site, captures in reach.sites.items():
            if torch._C._will_engine_execute_node(captures[0].edge.node):
                self.expected.setdefault(site, False)
        if not self.main:
            return
        known = self.receiver.reach.sites
        for site in [site for site in reach.sites if site.broadcast]:
            if site in known:
                raise UnsupportedError(
                    f"{site.label}: its output is shared by all data and reaches two losses of one "
                    "backward pass. Use one backward pass per loss."
                )
            known[site] = reach.sites[site]
            self.handles.extend(self.receiver.hook_captures(site))

    # ------------------------------------------------------------------ vectors

    def _sweep(self, call: LossCall, reach: Reach, batch: int, group: list[Extension]) -> None:
        """Run one sweep for all extensions that share its vectors."""
        first = group[0]
        with _quiet(call.z.device.type):
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

            pending: list[tuple[Site, Tensor]] = []
            sweep(
                call.start,
                reach,
                columns,
                count,
                partial(self._deliver, group, pending),
                partial(self._join, group, pending),
            )

    def _take_gradient(self, site: Site, g: Tensor) -> None:
        if self.main:
            if self.multiplier != 1:
                g = g / self.multiplier
            with _quiet(site.device_type):
                self._deliver(self.main, self.deferred, site, g)

    def _flush(self, extensions: list[Extension]) -> None:
        if self.deferred:
            with _quiet(self.deferred[0][0].device_type):
                self._join(extensions, self.deferred)

    def _deliver(self, extensions, pending: list, site: Site, g: Tensor) -> None:
        """Hand a Site's vectors over at once, or keep them if other calls share its parameters."""
        if site.error is not None:
            for ext in extensions:
                if ext.unsupported == "raise":
                    raise UnsupportedError(f"{site.label}: {site.error}.")
            return
        if site.shared:
            pending.append((site, g))
        else:
            self._absorb(extensions, [(site, g)])

    def _join(self, extensions, pending: list) -> None:
        """Absorb the calls that share parameters, the calls of one layer together."""
        layers: dict[tuple, list] = {}
        for site, g in pending:
            layers.setdefault(_layer_key(site), []).append((site, g))
        pending.clear()
        for calls in layers.values():
            self._absorb(extensions, calls)

    def _absorb(self, extensions, calls: list[tuple[Site, Tensor]]) -> None:
        sites, gs = zip(*calls, strict=True)
        units: dict[int, Unit] = {}
        for ext in extensions:
            rule = ext.rule_for(sites[0].module, sites[0].rule)
            if rule is None:
                continue  # reported by check_coverage
            unit = units.get(id(rule))
            if unit is None:
                unit = units[id(rule)] = Unit(sites, gs, rule)
            ext.absorb(self.stores[ext], unit)


def _layer_key(site: Site) -> tuple:
    """Calls with equal keys are calls of one layer: same parameters in the same roles."""
    roles = tuple((role, id(p)) for role, p in site.parameters.items())
    return (id(site.rule), roles)


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


@contextmanager
def _quiet(device_type: str):
    """Compute without gradients and without autocast, whatever the caller has switched on."""
    with ExitStack() as stack:
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


class _CollectingHook:
    """Stands in for the user's ``extension_hook`` until all quantities are published.

    BackPACK calls the hook for each module as its own extensions pass by; ours are there only at
    the end of the backward pass, and the user's hook is to run once per module.
    """

    def __init__(self):
        users = CTX.extension_hook
        while isinstance(users, _CollectingHook):  # left behind by a pass that raised
            users = users.users
        self.users = users
        self.modules: dict[nn.Module, None] = {}
        CTX.extension_hook = self

    def __call__(self, module: nn.Module) -> None:
        self.modules.setdefault(module)

    def remove(self) -> dict[nn.Module, None]:
        """Put the user's hook back; return the modules it is owed to."""
        CTX.extension_hook = self.users
        return self.modules
