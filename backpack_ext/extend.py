"""``extend``: forward hooks that record each call of a layer and of a loss."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpack_ext.attach import tie
from backpack_ext.compiled import keep_out_of_compilation
from backpack_ext.context import check_thread, recording, tying
from backpack_ext.data_parallel import check_replica
from backpack_ext.engine import brings_inputs_back, on_model_output, on_unrecorded_output
from backpack_ext.errors import RecordingError
from backpack_ext.graph import Whole, anchor_of, tag, tag_whole
from backpack_ext.loss_call import LossCall
from backpack_ext.losses import is_loss, loss_rule
from backpack_ext.rules.base import Rule, is_known_to_extensions, look_up
from backpack_ext.saved_input import SavedInput, input_as_read, recomputes, saves_by_hooks
from backpack_ext.sharing import sharing
from backpack_ext.site import NoChecks, Site, is_no_parameter, roots


class _Running(NamedTuple):
    """A forward pass of an outermost extended module: its batch size, and what of it is recorded.

    ``recording`` stands for its layers, ``tying`` for what it returns. ``listed`` says that the batch
    size is that of a list of integers: maybe the tokens of all data.
    """

    module: nn.Module
    batch: int | None
    recording: bool
    tying: bool
    listed: bool


class _Forward(threading.local):
    """The forward passes that are running, outermost first; nearly always one or none."""

    def __init__(self):
        self.stack: list[_Running] = []


_forward = _Forward()


def extend(
    module: nn.Module,
    batch_axis: int | Mapping[str, int] = 0,
    check_layers: bool = True,
    batch_argument: str | None = None,
) -> nn.Module:
    """Have a model or loss record what our extensions need, recursively.

    Only forward hooks are added; parameters, buffers and attributes stay as they are. Extending
    again changes nothing but these options. Models that BackPACK has extended can be extended, and
    the other way round. The number of data N of a batch is the size of the first tensor that the
    outermost extended module is called with, so extend the whole model and call the whole model.
    Where that tensor lists the tokens of an ``nn.EmbeddingBag`` (or its offsets), N is the number of
    bags.

    Args:
        module: A model, a layer, or a loss module.
        batch_axis: Axis that counts the data, in the model's input and in its layers' inputs. A
            mapping gives it per module path (``""`` is the model itself); a path also holds for
            the modules below it. For a loss, 1 says that its rows are ordered sequence-first.
        check_layers: Whether to check, the first time that a layer's rows are read in a certain
            way, that vectors of a datum arrive only at its rows, and that the layer's gradient is
            what its rule says. It costs some more passes then, ``2 log2 N + 1``.
        batch_argument: Name of the argument of the module's forward whose (first) tensor is of size
            N, where that is not the first argument.

    Returns:
        The module itself.

    Raises:
        TypeError: If ``module`` is no module instance.
        ValueError: If ``batch_axis`` is no axis, or names a path that does not exist, or
            ``batch_argument`` is no argument.

    Example:
        >>> model = extend(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        >>> extend(model) is model
        True
    """
    if not isinstance(module, nn.Module):
        hint = " Instantiate it first." if isinstance(module, type) else ""
        raise TypeError(f"extend expects an instance of torch.nn.Module, got {module!r}.{hint}")
    axes = {"": 0, **batch_axis} if isinstance(batch_axis, Mapping) else {"": batch_axis}
    for axis in axes.values():
        if not isinstance(axis, int) or axis < 0:
            raise ValueError(f"batch_axis={batch_axis!r}: expected axes 0, 1, ... or a mapping to them.")
    keep_out_of_compilation()
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    unknown = sorted(set(axes) - paths)
    if unknown:
        raise ValueError(f"batch_axis names {unknown}, but the model has no such modules.")
    if batch_argument is not None:
        _check_argument(module, batch_argument)
    for path, sub in module.named_modules():
        axis = _axis_of(path, axes)
        _remove(sub)
        if is_loss(sub):
            LossHook(axis).attach(sub)
            continue
        if sub is module or any(True for _ in sub.children()):
            argument = batch_argument if sub is module else None
            RootHook(axis, sub is module, argument, check_layers).attach(sub)
        if look_up(type(sub))[0] is not None or any(True for _ in sub.parameters(recurse=False)):
            SiteHook(path, axis, check_layers).attach(sub)
        if isinstance(sub, nn.RNNBase):
            UnfusedHook().attach(sub)
    return module


def extend_once(module: nn.Module) -> nn.Module:
    """Extend a module unless it is: what `extend` was told stays."""
    if not isinstance(module, nn.Module):
        return extend(module)  # which says what it expects
    return module if is_extended(module) else extend(module)


def is_extended(module: nn.Module) -> bool:
    """Whether a module itself has been extended."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return any(isinstance(_owner(hook), Hook) for hook in hooks)


def _owner(hook: object) -> object:
    """Return what a bound method belongs to."""
    return getattr(hook, "__self__", hook)


def unextend(module: nn.Module) -> nn.Module:
    """Remove what `extend` added, recursively.

    Args:
        module: A module, extended or not.

    Returns:
        The module itself.
    """
    for sub in module.modules():
        _remove(sub)
    return module


def _check_argument(module: nn.Module, name: str) -> None:
    found = inspect.signature(module.forward).parameters
    if name not in found and all(p.kind is not p.VAR_KEYWORD for p in found.values()):
        raise ValueError(
            f"batch_argument={name!r}, but the forward of {type(module).__name__} has the arguments "
            f"{list(found)}."
        )


def _axis_of(path: str, axes: Mapping[str, int]) -> int:
    """Return the axis of the longest given prefix of a path."""
    while path not in axes:
        path = path.rpartition(".")[0]
    return axes[path]


def _remove(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for hook in [h for h in hooks.values() if isinstance(h, Hook)]:
            hook.detach()


class Hook:
    """A forward hook that knows how to take itself away, and survives copying and pickling."""

    records_sites = False

    def attach(self, module: nn.Module) -> None:
        """Register the hook on a module."""
        # before the user's own hooks, which may change the output
        self.handles = [module.register_forward_hook(self, with_kwargs=True, prepend=True)]

    def detach(self) -> None:
        """Remove the hook from its module."""
        for handle in self.handles:
            handle.remove()


class RootHook(Hook):
    """Notes the batch size when a forward pass enters its outermost extended module.

    Args:
        batch_axis: Axis that counts the data in the module's input.
        top: Whether `extend` was called on this module itself; it begins a pass of its own wherever
            it is called. Other containers do so only when they are called on their own.
        argument: Name of the argument that counts the data; the first that has a tensor by default.
        checked: Whether readings are to be checked.
    """

    def __init__(self, batch_axis: int, top: bool, argument: str | None, checked: bool):
        self.batch_axis, self.top, self.argument = batch_axis, top, argument
        self.checked = checked

    def attach(self, module: nn.Module) -> None:
        """Register before and after the module's forward; after also when it raises."""
        self.handles = [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Begin a forward pass, unless the module is a part of one that is running."""
        stack = _forward.stack
        for k, running in enumerate(stack):
            if running.module is module:  # left behind by a pass that was interrupted
                del stack[k:]
                break
        if self.top or not stack:
            tied = tying()
            if tied and torch.is_grad_enabled():
                check_thread("An extended model is called")
                check_replica(module)
            if sharing.current is not None:
                sharing.current.see(module)
            given = (args, kwargs)
            if self.argument is not None:
                given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
                given = given[self.argument] if self.argument in given else kwargs[self.argument]
            first = next((t for t in _tensors(given) if t.dim() > self.batch_axis), None)
            batch = None if first is None else first.shape[self.batch_axis]
            listed = first is not None and first.dim() == 1 and not first.is_floating_point()
            listed = listed and self.argument is None
            stack.append(_Running(module, batch, recording(), tied, listed))
            roots.setdefault(module)

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        """End it."""
        stack = _forward.stack
        if not stack or stack[-1].module is not module:
            return
        running = stack.pop()
        if running.tying and torch.is_grad_enabled():
            for t in _tensors(output):
                if t.grad_fn is not None:
                    t = t._base if _has_graph_base(t) else t
                    if not running.recording:
                        t.grad_fn.register_prehook(on_unrecorded_output)
                        continue
                    t.register_hook(on_model_output)
                    batch, context = running.batch, sharing.current
                    if context is not None and context.num_data is not None:
                        batch = context.num_data
                    if batch is not None:
                        tag_whole(t.grad_fn, Whole(batch, self.batch_axis, self.checked, context))


class SiteHook(Hook):
    """Records a Site for each call of a layer."""

    records_sites = True

    def __init__(self, name: str, batch_axis: int, check_layers: bool):
        self.name, self.batch_axis = name, batch_axis
        self.checks = {} if check_layers else NoChecks()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Record the call, if its parameters are trained and something may ask for it."""
        rule, recorded = look_up(type(module))
        running = _forward.stack[-1] if _forward.stack else None
        wanted = recording() if running is None else running.recording
        if running is None and not wanted and tying() and torch.is_grad_enabled():
            for t in _tensors(output):  # a layer that was called on its own is a model
                if t.grad_fn is not None:
                    t.grad_fn.register_prehook(on_unrecorded_output)
        inputs = lists = ()
        if rule is not None and rule.arguments:
            inputs = _named(rule.arguments, args, kwargs)
            lists = rule.lists(module, inputs)
            if lists and running is not None and running.listed and wanted:
                running = self._count(module, lists, output, running)
        hooked = recorded and saves_by_hooks()
        if rule is None and not recorded:  # a pass that reaches it shall raise
            recorded = wanted and any(map(is_no_parameter, module._parameters.values()))
        if not (recorded and (wanted or hooked) and isinstance(output, Tensor)):
            return
        if output.grad_fn is None:
            return
        parameters = (
            rule.parameters(module)
            if rule is not None
            else {k: p for k, p in module._parameters.items() if p is not None and p.requires_grad}
        )
        if not parameters or not torch.is_grad_enabled():
            return
        x = inputs[0] if inputs else args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            return  # a subclass with a forward of its own: its parameters are left to autograd
        alone = _is_bias_alone(module, rule, parameters)
        saved = None
        if hooked and not alone:
            saved = SavedInput(x, brings_inputs_back() if recomputes() else wanted)
        if not wanted:
            return
        read = None
        other = x.dtype != output.dtype or not x.is_contiguous()
        if other and rule is not None and not hooked and "weight" in parameters:
            read = input_as_read(module, x, output, parameters["weight"])
        batch = None if running is None else running.batch
        if batch is None:
            rows = output if lists else x
            batch = rows.shape[self.batch_axis] if rows.dim() > self.batch_axis else 0
        anchor, error = anchor_of(output) if output._is_view() else (output, None)
        site = Site(
            module,
            self.name,
            rule,
            parameters,
            x,
            batch,
            self.batch_axis,
            output,
            self.checks,
            inputs[1:],
            saved=saved,
            keeps_input=not alone or sharing.current is not None,
            as_read=read,
        )
        if sharing.current is not None:
            sharing.current.record(site)
        error = error or self.checks.get("error")
        site.error = error or (None if rule is None else rule.misfit(module, x, output))
        if not output.numel():
            # without positions there are no means over them; autograd's products are zero
            site.error = f"its output of shape {tuple(output.shape)} is empty"
        site.output_nr = anchor.output_nr
        tag(anchor.grad_fn, site)
        if running is None:  # a layer that was called on its own is a model
            anchor.register_hook(on_model_output)

    def _count(self, module: nn.Module, lists: tuple, output: Tensor, running: _Running) -> _Running:
        """Correct the number of data if it was taken from a list of the entries of all data."""
        N, bags = running.batch, len(output)
        if any(t.shape == (N,) for t in lists):
            running = running._replace(batch=bags, listed=False)
            _forward.stack[-1] = running
        elif bags != N and bags % N == 0 and torch.is_grad_enabled():
            raise RecordingError(
                f"{self.name or '(root)'} ({type(module).__name__}) returns {bags} bags, while the "
                f"first tensor that the model was called with lists {N} integers. Are these {N} data "
                f"of {bags // N} bags each? Say which argument of the model counts the data: "
                "extend(model, batch_argument=NAME)."
            )
        return running


class UnfusedHook(Hook):
    """Has a recurrent module compute step by step while it is recorded.

    The fused kernels (oneDNN's LSTM, cuDNN's of all kinds) are one node of the graph, inside of
    which no vectors arrive at the gates.
    """

    def __init__(self):
        self.saved: list[tuple[bool, bool]] = []

    def attach(self, module: nn.Module) -> None:
        """Register before and after the module's forward; after also when it raises."""
        self.handles = [
            module.register_forward_pre_hook(self.enter),
            module.register_forward_hook(self, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Switch the fused kernels off."""
        running = _forward.stack[-1] if _forward.stack else None
        wanted = tying() if running is None else running.tying
        trained = any(p.requires_grad for p in module.parameters())
        if not (wanted and torch.is_grad_enabled() and trained):
            return
        mkldnn = torch.backends.mkldnn.set_flags(_enabled=False)[0]
        self.saved.append((mkldnn, torch.backends.cudnn.enabled))
        torch.backends.cudnn.enabled = False

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        """Switch them on again."""
        if self.saved:
            mkldnn, cudnn = self.saved.pop()
            torch.backends.mkldnn.set_flags(_enabled=mkldnn)
            torch.backends.cudnn.enabled = cudnn


class LossHook(Hook):
    """Records each call of a loss module."""

    def __init__(self, batch_axis: int):
        if batch_axis not in (0, 1):
            raise ValueError(f"batch_axis of a loss is 0 or 1, got {batch_axis}.")
        self.batch_axis = batch_axis

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Tie the loss's value to its input."""
        if not torch.is_grad_enabled() or not tying():
            return
        rule = loss_rule(type(module))
        arguments = ("input", "target") if rule is None else rule.arguments
        z, y, *others = _named(arguments, args, kwargs)
        if z is not None and y is not None and z.requires_grad:
            tie(output, LossCall(module, z, y, self.batch_axis, others, output))


def _is_bias_alone(module: nn.Module, rule: Rule | None, parameters: dict) -> bool:
    """Whether only the bias of an affine layer is trained: nothing needs the layer's input then."""
    return (
        "weight" not in parameters
        and rule is not None
        and not rule.elementwise
        and list(parameters) == ["bias"]
        and not is_known_to_extensions(type(module))
    )


def _named(names: tuple[str, ...], args: tuple, kwargs: dict) -> tuple[Tensor | None, ...]:
    """Return a call's tensors by the names of its arguments; None where there is none."""
    found = [args[k] if k < len(args) else kwargs.get(name) for k, name in enumerate(names)]
    return tuple([t if isinstance(t, Tensor) else None for t in found])


def _tensors(tree) -> Iterator[Tensor]:
    """Iterate over the tensors in nested containers and dataclasses."""
    if isinstance(tree, Tensor):
        yield tree
        return
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif is_dataclass(tree) and not isinstance(tree, type):
        tree = vars(tree).values()
    elif not isinstance(tree, (tuple, list)):
        return
    for branch in tree:
        yield from _tensors(branch)


def _has_graph_base(t: Tensor) -> bool:
    """Whether a tensor is a view whose base keeps its history under in-place operations."""
    return t._is_view() and t._base is not None and t._base.grad_fn is not None
