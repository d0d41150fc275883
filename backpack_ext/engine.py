"""What happens in a backward pass: events, sweeps, publishing.

The order of events in one ``backward()``:

1. the hook on an extended loss's value fires; it walks the graph, taps the layers' outputs and runs
   the sweeps; recursions of Hessian diagonals start;
2. the hook on the model's output fires; if no extended loss lies behind it, it taps the layers;
3. the taps fire as the gradient passes the layers;
4. a callback at the end of the backward pass joins, checks and publishes.

What is about layers is in `backpack_ext.layer_pass`, and happens only if someone asks for layers.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection
from contextlib import contextmanager

import torch
from backpack.context import CTX
from backpack.utils.hooks import no_op
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import Node

from backpack_ext.context import (
    CollectingHook,
    active_extensions,
    check_savefields,
    check_thread,
    loss_multiplier,
    note_computed,
    processes,
)
from backpack_ext.diagonal_pass import DiagonalPass
from backpack_ext.errors import RecordingError
from backpack_ext.extension import Extension
from backpack_ext.graph import executes, new_sites, parameter_behind, walk
from backpack_ext.layer_pass import LayerPass, empty_batch
from backpack_ext.loss_call import KnownDiagonal, LossCall
from backpack_ext.loss_scale import LossScale
from backpack_ext.per_datum import PerDatum
from backpack_ext.quiet import Quiet
from backpack_ext.shards import held, in_use, refuse
from backpack_ext.sweep import Receiver
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
        if grad.is_cpu:  # elsewhere backward passes run in threads of their own
            check_thread("A backward pass runs")
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
        for site, children in new_sites(start, self.seen):
            if executes(children):
                site.release()

    def end(self) -> None:
        """Let go of the nodes."""
        self.seen.clear()


def keeps_graph() -> bool:
    """Whether the running backward pass was called with ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def brings_inputs_back() -> bool:
    """Whether inputs that a checkpoint computes again now will be read in the pass that runs."""
    if Receiver.active is not None:
        return Receiver.active.reads_inputs
    running = _passes.get(torch._C._current_graph_task_id())
    return running is not None and running.layers is not None and running.layers.reads_inputs


def current_pass(extensions: tuple[Extension, ...]) -> BackwardPass:
    """Return the running backward pass, begun by its first event."""
    task = torch._C._current_graph_task_id()
    running = _passes.get(task)
    if running is None:
        running = _passes[task] = BackwardPass(extensions)
        Variable._execution_engine.queue_callback(running.end)
    return running


class BackwardPass:
    """One backward pass: what each extension has accumulated so far.

    Args:
        extensions: Our active extensions.
    """

    def __init__(self, extensions: tuple[Extension, ...]):
        check_savefields(CTX.active_exts)
        self.extensions = extensions
        self.stores: dict[Extension, dict] = {ext: {} for ext in extensions}
        self.diagonals = [ext for ext in extensions if ext.vectors.kind == "diagonal"]
        self.passes: dict[Extension, DiagonalPass] = {}
        self.outputs: list[Node] = []  # of models
        self.keep, self.quiet = keeps_graph(), Quiet()
        self.processes = processes() if _sink is None else None
        collected = "dataset.collect" if _sink is not None else None
        if self.processes is not None:
            collected = "backpack(process_group=...)"
        self.scale = LossScale(loss_multiplier(), collected)
        # if there is none, nobody has to be kept from calling it
        self.hook = None if CTX.extension_hook is no_op else CollectingHook()
        self.layers: LayerPass | None = None
        wanted = self.hook is not None and self.hook.wanted
        if wanted or any(ext.needs_layers for ext in extensions):
            publish = _sink is None
            self.layers = LayerPass(extensions, self.stores, self.scale, self.keep, self.quiet, publish)

    # ------------------------------------------------------------------ events

    def loss(self, call: LossCall, grad: Tensor) -> None:
        """Have layers tapped and sweeps run, and recursions of Hessian diagonals started."""
        if grad.numel() != 1:
            raise ValueError(
                f"{call.label}: the loss's value has shape {tuple(grad.shape)}; curvature is that "
                'of a scalar total. Use reduction "mean" or "sum", or tie your total to a loss with '
                "backpack_ext.attach_loss."
            )
        if call.z.numel() == 0:
            raise empty_batch(call.label)
        if self.layers is not None:
            self.layers.loss(call, grad)
        elif self.scale.collected:
            call.check()
            self.scale.note(call, grad, [])
        self._start_diagonals(call, grad)

    def diagonal(self, call: KnownDiagonal, grad: Tensor) -> None:
        """Start the recursions of Hessian diagonals at a scalar whose diagonal was given."""
        for ext in self.extensions:
            if ext.vectors.kind in ("exact", "mc") or ext.needs_scale or self.scale.collected:
                what = self.scale.collected or type(ext).__name__
                raise RecordingError(
                    f"{what} needs more of a loss than attach_diagonal says. Tie the value to a "
                    "loss module with backpack_ext.attach_loss."
                )
        if self.layers is not None:
            self.output(torch._C._current_autograd_node(), grad)
        self._start_diagonals(call, grad)

    def _start_diagonals(self, call: LossCall | KnownDiagonal, grad: Tensor) -> None:
        """Start or go on with the recursions of Hessian diagonals."""
        if not self.diagonals:
            return
        if in_use() and isinstance(call, LossCall):
            refuse(type(self.diagonals[0]).__name__, walk(call.start.node).parameters.values())
        with self.quiet(grad):
            # a number, unless one would have to wait for it; or widened, because one over the number of
            # terms needs the digits
            factor = grad.item() if grad.is_cpu else widen(grad.reshape(()))
            if isinstance(call, LossCall):
                call.check()
                factor = factor * call.scale()
            for ext in self.diagonals:
                if ext not in self.passes:
                    per_datum = PerDatum(self.layers.sites) if ext.batch else None
                    self.passes[ext] = DiagonalPass(ext, self.keep, self.quiet, per_datum)
                self.passes[ext].start(call, factor)

    def output(self, node: Node, grad: Tensor) -> None:
        """Note a model's output, and have the layers behind it tapped."""
        self.outputs.append(node)
        if self.layers is not None:
            self.layers.output(node, grad)

    def end(self) -> None:
        """Join, check and publish: the engine's callback at the end of the backward pass."""
        layers, hook, modules = self.layers, self.hook, {}
        if layers is not None:
            layers.remove()
        try:
            if self.outputs:
                self._check_losses()
            if layers is not None:
                layers.finish()
            for ext, running in self.passes.items():
                self.stores[ext] = running.finish(self.scale.multiplier)
                if not self.stores[ext] and not running.recursion.incomplete:
                    _warn_of_nothing(ext)
            if self.processes is not None:
                with self.quiet(None):
                    self.stores = self.processes.combine(self.stores, self.scale)
            for ext, store in self.stores.items():
                if _sink is not None:
                    _sink(ext, store, self.scale.value)
                else:
                    self._publish(ext, store)
            note_computed()
        finally:
            if hook is not None:
                modules = hook.remove()
        if layers is not None:
            layers.release()
            if hook is not None and hook.wanted:
                for module in modules | layers.modules:
                    hook.users(module)

    def _publish(self, ext: Extension, store: dict) -> None:
        field = ext.savefield
        with self.quiet(None):
            results = ext.finish(store)
        for parameter, result in results:
            setattr(held(parameter), field, result)

    def _check_losses(self) -> None:
        """Name the missing loss for Hessian diagonals of parameters behind a model's output."""
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


def _warn_of_nothing(ext: Extension) -> None:
    """Warn that a recursion has found no parameter."""
    warnings.warn(
        f"{type(ext).__name__} found no parameter behind the loss, and computed nothing. Tensors that "
        "require a gradient but are no torch.nn.Parameter count as inputs; where "
        "torch.func.functional_call gives them to a model, pass nn.Parameter(tensor.detach()).",
        stacklevel=2,
    )
