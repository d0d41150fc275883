"""``extend``: forward hooks that record each call of a layer and of a loss."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpack_ext.context import recording
from backpack_ext.engine import on_loss, on_model_output
from backpack_ext.errors import RecordingError
from backpack_ext.graph import anchor_of, tag
from backpack_ext.losses import LossCall, is_loss
from backpack_ext.rules.base import look_up
from backpack_ext.sharing import sharing
from backpack_ext.site import Site, roots


class _Running(NamedTuple):
    """A forward pass of an outermost extended module: its batch size, and whether it is recorded."""

    module: nn.Module
    batch: int | None
    recording: bool


class _Forward(threading.local):
    """The forward passes that are running, outermost first; nearly always one or none."""

    def __init__(self):
        self.stack: list[_Running] = []


_forward = _Forward()


def extend(
    module: nn.Module, batch_axis: int | Mapping[str, int] = 0, check_layers: bool = True
) -> nn.Module:
    """Have a model or loss record what our extensions need, recursively.

    Only forward hooks are added; parameters, buffers and attributes stay as they are. Extending
    again changes nothing but these options. Models that BackPACK has extended can be extended, and
    the other way round. The number of data N of a batch is the size of the first tensor that the
    outermost extended module is called with, so extend the whole model and call the whole model.

    Args:
        module: A model, a layer, or a loss module.
        batch_axis: Axis that counts the data, in the model's input and in its layers' inputs. A
            mapping gives it per module path (``""`` is the model itself); a path also holds for
            the modules below it. For a loss, 1 says that its rows are ordered sequence-first.
        check_layers: Whether to check, the first time that a layer's rows are read in a certain
            way, that vectors of a datum arrive only at its rows, and that the layer's gradient is
            what its rule says. It costs some more passes then, ``2 log2 N + 1``.

    Returns:
        The module itself.

    Raises:
        TypeError: If ``module`` is no module instance.
        ValueError: If ``batch_axis`` is no axis, or names a path that does not exist.

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
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    unknown = sorted(set(axes) - paths)
    if unknown:
        raise ValueError(f"batch_axis names {unknown}, but the model has no such modules.")
    for path, sub in module.named_modules():
        axis = _axis_of(path, axes)
        _remove(sub)
        if is_loss(sub):
            LossHook(axis).attach(sub)
            continue
        if sub is module or any(True for _ in sub.children()):
            RootHook(axis, sub is module).attach(sub)
        if look_up(type(sub))[0] is not None or any(True for _ in sub.parameters(recurse=False)):
            SiteHook(path, axis, check_layers).attach(sub)
    return module


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
    """

    def __init__(self, batch_axis: int, top: bool):
        self.batch_axis, self.top = batch_axis, top

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
            if sharing.current is not None:
                sharing.current.see(module)
            batch = _batch_size((args, kwargs), self.batch_axis)
            stack.append(_Running(module, batch, recording()))
            roots.add(module)

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        """End it."""
        stack = _forward.stack
        if not stack or stack[-1].module is not module:
            return
        if stack.pop().recording and torch.is_grad_enabled():
            for t in _tensors(output):
                if t.grad_fn is not None:
                    (t._base if _has_graph_base(t) else t).register_hook(on_model_output)


class SiteHook(Hook):
    """Records a Site for each call of a layer."""

    records_sites = True

    def __init__(self, name: str, batch_axis: int, check_layers: bool):
        self.name, self.batch_axis = name, batch_axis
        self.checks = {} if check_layers else _NoChecks()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Record the call, if its parameters are trained and something may ask for it."""
        rule, recorded = look_up(type(module))
        running = _forward.stack[-1] if _forward.stack else None
        wanted = recording() if running is None else running.recording
        if not (recorded and wanted and isinstance(output, Tensor)) or output.grad_fn is None:
            return
        parameters = (
            rule.parameters(module)
            if rule is not None
            else {k: p for k, p in module._parameters.items() if p is not None and p.requires_grad}
        )
        if not parameters or not torch.is_grad_enabled():
            return
        x = args[0] if args else next(iter(kwargs.values()))
        batch = None if running is None else running.batch
        if batch is None:
            batch = x.shape[self.batch_axis] if x.dim() > self.batch_axis else 0
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
        )
        if sharing.current is not None:
            sharing.current.record(site)
        site.error = error
        site.output_nr = anchor.output_nr
        tag(anchor.grad_fn, site)
        if running is None:  # a layer that was called on its own is a model
            anchor.register_hook(on_model_output)


class _NoChecks(dict):
    """Says of every reading that it needs no check."""

    def get(self, key, default=None) -> int:
        return 0


class LossHook(Hook):
    """Records each call of a loss module."""

    def __init__(self, batch_axis: int):
        if batch_axis not in (0, 1):
            raise ValueError(f"batch_axis of a loss is 0 or 1, got {batch_axis}.")
        self.batch_axis = batch_axis

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Tie the loss's value to its input."""
        if not torch.is_grad_enabled() or not recording():
            return
        names = dict(zip(("input", "target"), args, strict=False)) | kwargs
        z, y = names.get("input"), names.get("target")
        if isinstance(z, Tensor) and isinstance(y, Tensor) and z.requires_grad:
            _tie(output, LossCall(module, z, y, self.batch_axis))


def attach_loss(
    loss_module: nn.Module,
    logits: Tensor,
    targets: Tensor,
    value: Tensor,
    check: bool = True,
    batch_axis: int = 0,
) -> Tensor:
    """Tie a scalar that no loss module computed to a loss definition.

    For models that compute their loss inside, and for losses written by hand. From then on
    ``value`` acts like the output of ``loss_module(logits, targets)`` in an extended model.

    Args:
        loss_module: Defines the Hessian with respect to the logits, and the reduction.
        logits: What the loss is a function of; any tensor of the graph that ``value`` comes from.
        targets: The targets.
        value: The scalar that ``backward()`` will start from, or a part of it.
        check: Whether to compare ``value`` with ``loss_module(logits, targets)``. Switch it off
            where the loss module stands for another loss on purpose (a policy loss, say).
        batch_axis: 0, or 1 if the rows of the logits are ordered sequence-first.

    Returns:
        ``value``.

    Raises:
        RecordingError: If ``logits`` or ``value`` require no gradient, or ``value`` is a leaf.
        ValueError: If ``value`` differs from what the loss module gives.

    Example:
        >>> from torch.nn import functional as F
        >>> model = extend(nn.Linear(3, 2))
        >>> out, y = model(torch.ones(4, 3)), torch.tensor([0, 1, 1, 0])
        >>> value = attach_loss(nn.CrossEntropyLoss(), out, y, F.cross_entropy(out, y))
    """
    if not (logits.requires_grad and value.requires_grad) or value.grad_fn is None:
        raise RecordingError(
            "attach_loss: `logits` and `value` must require a gradient and `value` must have been "
            "computed from parameters; was it detached, or computed under no_grad?"
        )
    if check:
        with torch.no_grad():
            expected = loss_module(logits.detach(), targets)
        tolerance = 1e-2 if min(value.element_size(), logits.element_size()) < 4 else 1e-4
        if expected.shape != value.shape or not torch.allclose(
            expected.to(value.dtype), value.detach(), rtol=tolerance, atol=tolerance
        ):
            raise ValueError(
                f"attach_loss: the value is {value.detach()}, but {loss_module} of these logits and "
                f"targets gives {expected}. Pass the loss that was computed, or check=False if it "
                "stands for another one on purpose."
            )
    _tie(value, LossCall(loss_module, logits, targets, batch_axis))
    return value


def _tie(value: Tensor, call: LossCall) -> None:
    value.register_hook(partial(on_loss, call))


def _batch_size(tree, axis: int) -> int | None:
    """Return the size along ``axis`` of the first tensor in nested arguments."""
    return next((t.shape[axis] for t in _tensors(tree) if t.dim() > axis), None)


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
