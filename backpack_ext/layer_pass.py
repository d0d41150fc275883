"""The layers' part in a backward pass: taps at their outputs, sweeps, what extensions make of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from backpack_ext.bare import add_bare
from backpack_ext.check import check_layers
from backpack_ext.coverage import check_coverage
from backpack_ext.data_parallel import prepare_wrappers
from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.graph import Reach, executes, walk
from backpack_ext.layout import Layout
from backpack_ext.loss_call import LossCall
from backpack_ext.loss_scale import LossScale
from backpack_ext.once import Once
from backpack_ext.pending import Pending
from backpack_ext.quiet import Quiet
from backpack_ext.rules.base import Rule
from backpack_ext.shards import is_sharded, refuse
from backpack_ext.sharing import sharing, sharing_of
from backpack_ext.site import Site, is_no_parameter
from backpack_ext.sweep import Receiver, Tap, missing_cotangents, sweep
from backpack_ext.unit import Unit
from curvature.decomposition import widen


class LayerPass(Receiver):
    """What the extensions that ask for layers have accumulated so far in one backward pass.

    It receives what the main backward pass itself brings to the layers' outputs.

    Args:
        extensions: Our active extensions.
        stores: What each of them accumulates.
        scale: That of the losses.
        keep: Whether the graph outlives the pass.
        quiet: Makes contexts without gradients and autocast.
        publish: Whether the results go to the parameters, instead of to a sink.
    """

    def __init__(
        self,
        extensions: tuple[Extension, ...],
        stores: dict[Extension, dict],
        scale: LossScale,
        keep: bool,
        quiet: Quiet,
        publish: bool,
    ):
        super().__init__({})
        self.task = torch._C._current_graph_task_id()
        self.extensions, self.stores, self.scale = extensions, stores, scale
        self.keep, self._quiet, self.publish = keep, quiet, publish
        self.main = [
            e for e in extensions if e.vectors.kind in ("gradient", "none") or e.vectors.gradient
        ]
        # whether inputs are needed until the end
        self.holds = keep or any(e.vectors.kind == "diagonal" and e.batch for e in extensions)
        self.nodes: list[Collection[Node]] = []  # visited by walks
        self.unscaled: dict[Site, None] = {}  # reached from a model's output, not (yet) from a loss
        self.expected: dict[Site, bool] = {}  # has the gradient passed?
        self.bare: dict[tuple, Site] = {}  # Sites of parameters outside of layers
        self.frozen: set[Site] = set()  # since the forward pass
        # several extensions share what they form of inputs and vectors
        self.pending = Pending(len(extensions) == 1)
        self.handles: list = []
        self.sweeping = False
        self.inputs_known = Once() if len(extensions) > 1 else None

    # ------------------------------------------------------------------ events

    @property
    def reads_inputs(self) -> bool:
        """Whether the main backward pass itself, not a sweep, brings vectors for extensions."""
        return bool(self.main) and not self.sweeping

    def loss(self, call: LossCall, grad: Tensor) -> None:
        """Walk the graph behind a loss, tap the layers, run the sweeps that were asked for."""
        seeds = [e for e in self.extensions if e.vectors.kind in ("exact", "mc")]
        scaled = [e for e in self.extensions if e.needs_scale]
        reach = walk(call.start.node)
        prepare_wrappers(reach.wrappers)
        batch = self._batch(call.label, reach)
        call.sharing, layout = self._sharing(reach, call.label), None
        if call.sharing is not None:
            with suppress(UnsupportedError):  # `fisher="exact"` will say why
                layout = call.layout(batch)
        elif (reach.sites or reach.whole) and call.z.shape[:1].numel() % batch == 0:
            layout = call.layout(batch)
        with self._quiet(call.z):
            self._add_bare(reach, call.start, layout, call.z)
        self._check_reach(reach)
        if seeds or scaled or self.scale.collected:
            call.check()
            self.scale.note(call, grad, scaled)
        for site in reach.sites:
            self.unscaled.pop(site, None)
        self._tap(reach)
        self._check_layers(call.start, reach, layout, call.z, call.sharing, call.gradient)
        self.sweeping = True
        for group in _by_sweep(seeds):
            self._sweep(call, reach, batch, group)
        self.sweeping = False

    def output(self, node: Node, grad: Tensor) -> None:
        """Tap the layers behind a model's output, unless a loss has done so.

        The loss may still come: a model that computes its loss inside has both among its outputs.
        """
        if any(node in nodes for nodes in self.nodes):
            return
        reach = walk(node)
        prepare_wrappers(reach.wrappers)
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
        with self._quiet(grad):
            self._add_bare(reach, GradientEdge(node, 0), layout, grad)
        self._check_reach(reach)
        self.unscaled.update((site, None) for site in reach.sites if site not in self.expected)
        self._tap(reach)
        if first:
            self._check_layers(GradientEdge(node, 0), reach, layout, grad, context, lambda: grad)

    def remove(self) -> None:
        """Let go of hooks that would outlive the pass."""
        for handle in self.handles:
            handle.remove()

    def finish(self) -> None:
        """Hand over what waits, and check that nothing is missing."""
        self._leave_out_captured()
        for ext in self.extensions:
            if not self.unscaled:
                break
            if ext.vectors.kind in ("exact", "mc") or ext.needs_scale or self.scale.collected:
                raise RecordingError(
                    f"{type(ext).__name__} needs the loss, but the gradient reached "
                    f"{next(iter(self.unscaled)).label} without passing an extended loss. Extend the "
                    "loss module with backpack_ext.extend, or tie a scalar that no module computes "
                    "to a loss with backpack_ext.attach_loss. If it is checkpointed, pass "
                    f"use_reentrant=False.{ext.without_loss}"
                )
        self._flush(self.main, self.pending)
        missing = [site.label for site, passed in self.expected.items() if not passed]
        if missing and self.main:
            raise missing_cotangents(missing)

    def _leave_out_captured(self) -> None:
        """Leave out layers that the pass, which was asked for some gradients, did not go through.

        Nor does it bring all vectors of parameters that other calls use as well.
        """
        for site in [site for site, passed in self.expected.items() if not passed]:
            if not executes(self.sites[site][0].edge.node.next_functions):
                del self.expected[site]
        if len(self.expected) < len(self.sites):
            self.unscaled = {site: None for site in self.unscaled if site in self.expected}
            left_out = [site for site in self.sites if site not in self.expected]
            partial = {id(p) for site in left_out for p in site.parameters.values()}
            self.pending.shared = [
                (site, g)
                for site, g in self.pending.shared
                if not any(id(p) in partial for p in site.parameters.values())
            ]

    def release(self) -> None:
        """Let go of inputs that nothing will ask for any more."""
        for site in self.bare.values():  # another pass makes its own
            site.release()
        for site in (*self.expected, *self.frozen):
            if self.keep:
                site.let_go()
            else:
                site.release()

    @property
    def modules(self) -> dict[nn.Module, None]:
        """The modules that were reached."""
        return dict.fromkeys(site.module for site in self.expected)

    # ------------------------------------------------------------------ checks

    def _batch(self, start: str, reach: Reach) -> int:
        """Return the batch size that all layers agree on."""
        self.nodes.append(reach.nodes)
        self.frozen.update(reach.frozen)
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
        if not reach.sites or is_sharded(reach.parameters.values()):  # its passes are nested ones
            return
        masked = context is not None and context.kind == "mask"
        with self._quiet(like):
            again = check_layers(start, reach, layout, like, gradient if masked else None)
            if again:
                self._add_bare(reach, start, layout, like)
        if again:
            self._check_reach(reach)
            self._tap(reach)

    def _add_bare(self, reach: Reach, start: GradientEdge, layout: Layout | None, like: Tensor) -> None:
        """Find layers for parameters that no recorded call covers, unless they are sharded."""
        if not is_sharded(reach.parameters.values()):  # it may take nested passes
            add_bare(reach, start, layout, like, self.bare)

    def _check_reach(self, reach: Reach) -> None:
        """Check what a loss or output depends on."""
        for site in reach.sites:
            for role, p in site.parameters.items():
                if is_no_parameter(p):
                    raise RecordingError(
                        f"{site.label}: its {role} is a plain tensor (torch.func.functional_call?), but "
                        "quantities are those of Parameters, and land on them. Pass nn.Parameter("
                        "tensor.detach()) in its place, or copy the values into the model."
                    )
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

    def _tap(self, reach: Reach) -> None:
        """Place taps on the Sites' outputs, and note which of them the gradient will pass."""
        tapped, ref = self.sites, weakref.ref(self)
        Tap.current = ref
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
            # or captures, which is told apart at the end, if nothing has passed
            if torch._C._will_engine_execute_node(captures[0].edge.node):
                self.expected[site] = False

    # ------------------------------------------------------------------ vectors

    def _sweep(self, call: LossCall, reach: Reach, batch: int, group: list[Extension]) -> None:
        """Run one sweep for all extensions that share its vectors."""
        asked = f'{type(group[0]).__name__} with fisher="{group[0].vectors.kind}"'
        refuse(asked, reach.parameters.values())
        first, pending = group[0], Pending()
        deliver = partial(self._deliver, group, pending)
        # in float16, where a scaler is needed, vectors travel in size one and are made smaller behind
        seeded = self.scale.multiplier == 1
        with self._quiet(call.z):
            if first.vectors.kind == "mc":
                count, generator = first.vectors.samples, first.generator(call.z.device)
                size = sqrt(self.scale.value / count)
                start = size if seeded else 1.0

                def columns(a: int, b: int) -> Tensor:
                    drawn = [start * call.sample(generator) for _ in range(a, b)]
                    return torch.stack(drawn) if len(drawn) > 1 else drawn[0].unsqueeze(0)

            else:
                count = call.columns(batch)
                for ext in group:
                    _check_columns(ext, count)
                size = sqrt(self.scale.value)
                start = size if seeded else 1.0

                def columns(a: int, b: int) -> Tensor:
                    return start * call.exact(batch, a, b)

            if not seeded:

                def deliver(site: Site, g: Tensor) -> None:
                    self._deliver(group, pending, site, size * widen(g))

            # further columns would form the rows of the inputs again
            pending.rows = self.pending.rows and count == 1
            flush, gather = partial(self._flush, group, pending), any(e.gathers for e in group)
            sweep(call.start, reach, columns, count, deliver, flush, gather)
        for site in reach.sites:
            site.let_go()

    def deliver(self, site: Site, g: Tensor) -> None:
        """Take the main backward's own gradient at a layer's output."""
        self.expected[site] = True
        if self.main:
            if self.scale.multiplier != 1:
                g = widen(g) / self.scale.multiplier  # which may be too small for float16
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
            if pending.rows and self._bring_to_rows(extensions[0], pending, site, g):
                if pending.full:
                    self._flush_small(extensions, pending)
            else:
                self._absorb(extensions, layers)
            self._release(extensions, layers)

    def _bring_to_rows(self, ext: Extension, pending: Pending, site: Site, g: Tensor) -> bool:
        """Have the only extension reduce a layer to rows, which wait for others."""
        rule = ext.rule_for(site.module, site.rule)
        if rule is None:
            return False
        unit = Unit([site], [g], rule, self.scale.value)
        with self._quiet(g):
            if not ext.bring_to_rows(unit):
                return False
        self._make_room(ext, unit)
        pending.add_rows(unit)
        return True

    def _make_room(self, ext: Extension, unit: Unit) -> None:
        """Forget old results: less memory, and none of it fresh; a pass that fails leaves none."""
        if self.publish:
            for p in unit.parameters.values():
                p.__dict__.pop(ext.savefield, None)

    def _flush(self, extensions, pending: Pending) -> None:
        """Absorb what is pending: the calls of one layer together, then layers of equal shape."""
        self._flush_small(extensions, pending)
        for sites, gs in pending.take_shared():
            self._absorb(extensions, [(sites, gs)])
        for ext in extensions:
            ext.settle(self.stores[ext])

    def _flush_small(self, extensions, pending: Pending) -> None:
        small, rows = pending.take_small()
        for layers in small:
            self._absorb(extensions, layers)
            self._release(extensions, layers)
        for units in rows:
            with self._quiet(units[0].b):
                extensions[0].absorb_all(self.stores[extensions[0]], units)

    def _absorb(self, extensions, layers: list[tuple[list[Site], list[Tensor]]]) -> None:
        """Hand layers of equal shape, each with its calls and their vectors, to the extensions."""
        site = layers[0][0][0]
        scale = self.scale.value
        units: dict[Rule, list[Unit]] = {}
        with self._quiet(layers[0][1][0]):
            for ext in extensions:
                rule = ext.rule_for(site.module, site.rule)
                if rule is None:
                    continue  # reported by check_coverage
                if rule not in units:
                    units[rule] = [Unit(sites, gs, rule, scale) for sites, gs in layers]
                    if self.inputs_known is not None:
                        vectors_known = Once() if len(extensions) > 1 else None
                        for unit in units[rule]:
                            unit.inputs_known, unit.vectors_known = self.inputs_known, vectors_known
                    if len(extensions) > 1 and sum(other.forms_grads for other in extensions) > 1:
                        for unit in units[rule]:
                            unit.keeps_grads = True
                for unit in units[rule]:
                    self._make_room(ext, unit)
                if extensions is self.main and ext.vectors.gradient:
                    ext.absorb_gradient(self.stores[ext], units[rule])
                else:
                    ext.absorb_all(self.stores[ext], units[rule])

    def _release(self, extensions, layers) -> None:
        """Let go of the inputs of calls that nothing will ask for any more, or that can be had again."""
        streams = Receiver.active is not None  # several columns come in chunks, which share the inputs
        for sites, _ in layers:
            if extensions is self.main and not self.holds:
                sites[0].release()
            elif streams or extensions is self.main:
                sites[0].let_go()


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
            f'{type(ext).__name__}: fisher="exact" needs {count} columns per datum (those of a '
            f"position times positions), more than max_columns={ext.max_columns}. Use "
            'fisher="mc", or raise max_columns if you can wait.'
        )
