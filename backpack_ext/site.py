"""What one call of a layer leaves behind for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.saved_input import SavedInput

if TYPE_CHECKING:
    from backpack_ext.rules.base import Rule
    from backpack_ext.sharing import Segments, sharing

# How many live Sites use a parameter, by id, or by id and part. A Site holds its module, hence its
# parameters, so an id cannot be reused while it is counted. A count of one means: this call is all
# there is.
_calls: dict[int | tuple[int, int], int] = {}

_WHOLE: Mapping[str, tuple[int, int]] = MappingProxyType({})

# The outermost extended modules that were called, in order: where parameters have their names and order.
roots: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()


class NoChecks(dict):
    """Says of every reading that it needs no check."""

    def get(self, key, default=None) -> int:
        """Return 0."""
        return 0


class Site:
    """One call of a layer: its detached input, and where its output sits in the graph.

    The graph owns its Sites: they are held by a node's ``metadata`` and hold no node themselves (a
    cycle through a node's metadata is never freed).

    Attributes:
        module: The layer.
        name: Its path in the extended model.
        rule: The package-wide rule of its class; None if only single extensions have one.
        parameters: The trainable parameters by role, e.g. ``{"weight": p, "bias": q}``; without those
            that were frozen since the forward pass (see `leave_out_frozen`).
        x: The detached input. None once released, where nothing needs it (`keeps_input`), and, where
            it is saved by the hooks that autograd's own saved tensors go through, until it is read.
        keeps_input: Whether something may need the input: the layer trains more than its bias.
        in_shape: Shape of the input.
        in_dtype: Data type of the input.
        batch: Number of data N in the mini-batch, known from the outermost module's input.
        batch_axis: Axis that counts the data in this layer's input and output.
        out_shape: Shape of the output.
        output_nr: Which output of the tagged node is the layer's (that of its base, if a view).
        error: Why this call cannot be treated, raised if an extension needs it.
        broadcast: Whether the output is shared by all data (set when the graph is walked).
        mode: Whether a module that is not torch's own was in training mode; None for torch's.
        computed: Whether the network computed the input by operations that autograd recorded.
        depends_on_parameters: Whether an input requires a gradient.
        note: What the rule noted in the forward, besides the input (running statistics, say).
        checks: How many checks each reading of this layer's rows still needs, see `reading`; and
            what was found wrong, as ``"error"``.
        parts: By role, which part of a parameter this call uses, as ``(k, G)``: rows k of G equal
            groups of rows (attention's ``in_proj_weight`` is three layers). Empty: the whole.
        sharing: The `sharing` block of the call, if in one.
        segments: What its rows were read by in that block; None if plainly, or not yet.
    """

    __slots__ = (
        "__weakref__",
        "_live",
        "_others",
        "_recorded",
        "_saved",
        "_version",
        "batch",
        "batch_axis",
        "broadcast",
        "checks",
        "computed",
        "depends_on_parameters",
        "error",
        "in_dtype",
        "in_shape",
        "keeps_input",
        "mode",
        "module",
        "name",
        "note",
        "out_shape",
        "output_nr",
        "parameters",
        "parts",
        "rule",
        "segments",
        "sharing",
        "x",
    )

    def __init__(
        self,
        module: nn.Module,
        name: str,
        rule: Rule | None,
        parameters: dict[str, nn.Parameter],
        x: Tensor,
        batch: int,
        batch_axis: int,
        output: Tensor,
        checks: dict,
        others: Sequence[Tensor | None] = (),
        parts: Mapping[str, tuple[int, int]] = _WHOLE,
        saved: SavedInput | None = None,
        keeps_input: bool = True,
        as_read: Tensor | None = None,
    ):
        self.module, self.name, self.rule, self.parameters = module, name, rule, parameters
        self._recorded = parameters
        self.depends_on_parameters, self.computed = x.requires_grad, x.grad_fn is not None
        x = x if as_read is None else as_read
        self.x = x.detach() if keeps_input and saved is None else None
        self._saved, self._version = saved, x._version
        self.keeps_input, self.in_shape, self.in_dtype = keeps_input, x.shape, x.dtype
        self._others: tuple[tuple[Tensor, int] | None, ...] = ()
        if others:
            self._others = tuple(None if t is None else (t.detach(), t._version) for t in others)
            self.depends_on_parameters |= any(t is not None and t.requires_grad for t in others)
        self.batch, self.batch_axis = batch, batch_axis
        self.out_shape, self.output_nr = output.shape, 0
        self.error: str | None = None
        self.broadcast = False
        # a subclass may do something else when it is trained
        own = type(module).__module__.startswith("torch.nn.modules")
        self.mode = None if own else module.training
        self.checks = checks
        self.parts = parts
        self.sharing: sharing | None = None
        self.segments: Segments | None = None
        self.note = None if rule is None else rule.note(module)
        self._live = True
        for key in self._keys():
            _calls[key] = _calls.get(key, 0) + 1

    def __repr__(self) -> str:
        return f"Site({self.label})"

    @property
    def label(self) -> str:
        """Module path and class, for messages."""
        return f"{self.name or '(root)'} ({type(self.module).__name__})"

    @property
    def reading(self) -> tuple[int, bool, str | None, bool | None]:
        """How rows are read: the output's dimensions, whether it leads with the data, by what; mode."""
        kind = None if self.sharing is None else self.sharing.kind
        return len(self.out_shape), self.out_shape[:1] == (self.batch,), kind, self.mode

    @property
    def looked_up(self) -> bool:
        """Whether the input consists of indices."""
        return not self.in_dtype.is_floating_point

    @property
    def shared(self) -> bool:
        """Whether another live call uses one of the parameters."""
        for key in self._keys():  # noqa: SIM110 (a generator costs three times as much)
            if _calls.get(key, 0) > 1:
                return True
        return False

    def uses_of(self, role: str, parameter: nn.Parameter) -> int:
        """Return how many live calls use a parameter, or the same part of it as this call."""
        return _calls.get(self._key(role, parameter), 0)

    def _key(self, role: str, parameter: nn.Parameter) -> int | tuple[int, int]:
        part = self.parts.get(role)
        return id(parameter) if part is None else (id(parameter), part[0])

    def _keys(self) -> list[int | tuple[int, int]]:
        if not self.parts:
            return [id(p) for p in self._recorded.values()]
        return [self._key(role, p) for role, p in self._recorded.items()]

    def leave_out_frozen(self) -> bool:
        """Leave out parameters that were frozen since the forward pass, as the backward pass does.

        Returns:
            Whether others are left.
        """
        self.parameters = self._recorded
        for p in self._recorded.values():
            if not p.requires_grad:
                self.parameters = {r: q for r, q in self._recorded.items() if q.requires_grad}
                break
        return bool(self.parameters)

    def input(self, k: int = 0) -> Tensor | None:
        """Return the recorded input, or the k-th of those that the rule names in ``arguments``.

        Returns:
            The detached input; None if the layer was called without it.

        Raises:
            RecordingError: If it was released, or overwritten after the layer had read it.
        """
        self.check_live()
        if not self.keeps_input:
            raise RecordingError(
                f"{self.label}: the layer's input is not kept, because of its parameters only the bias "
                "is trained, whose inputs are ones."
            )
        if self.x is None:
            self.bring_back(False)
        x, version = (self.x, self._version) if k == 0 else self._others[k - 1] or (None, 0)
        if x is not None and x._version > version:
            raise RecordingError(
                f"{self.label}: the layer's input was modified in place after the layer had read "
                "it. Use an out-of-place operation there."
            )
        return x

    def check_live(self) -> None:
        """Raise if the Site was released.

        Raises:
            RecordingError: If so.
        """
        if not self._live:
            raise RecordingError(
                f"{self.label}: the layer's input is gone. It is kept until the first backward "
                "pass without retain_graph=True."
            )

    def bring_back(self, at_once: bool) -> None:
        """Have the hooks that saved the input bring it back; see `SavedInput.read`.

        Raises:
            RecordingError: If they cannot.
        """
        if self.x is None and self._saved is not None:
            self.x = self._saved.read(at_once)
            if self.x is None:
                raise RecordingError(
                    f"{self.label}: the hooks that act on saved tensors did not bring the layer's input "
                    "back. Was the model extended, or a parameter frozen, since the forward pass?"
                )

    def let_go(self) -> None:
        """Forget an input that was brought back and can be brought back again."""
        if self._saved is not None:
            self.x = None

    def leads_with_data(self, rows: int) -> bool:
        """Whether a first axis of so many rows is the data, once each, all positions behind it."""
        if self.broadcast or self.sharing is not None or self.batch_axis:
            return False
        return rows == self.batch

    def rows(self, t: Tensor, features: int) -> Tensor:
        """Bring an input to ``[N, S, *features]``: data first, all shared positions second.

        Args:
            t: ``[..., *features]`` with the batch axis among its leading axes, or with one leading
                axis of size ``k N``, which is read as ``[N, k]`` (``[k, N]`` if `batch_axis` is 1).
                An input that all data share is repeated for each of them.
            features: Number of trailing feature axes.

        Raises:
            UnsupportedError: If no reading fits.
        """
        if self.broadcast:
            lead = t.shape[: t.dim() - features]
            t = t.reshape(1, lead.numel(), *t.shape[len(lead) :])
            return t.expand(self.batch, *t.shape[1:])
        if self.sharing is not None:
            return self._split(t.unsqueeze(0), features)[0]
        N = self.batch
        if self.batch_axis == 0 and t.dim() > features and N and t.shape[0] % N == 0:
            return t.reshape(N, -1, *t.shape[t.dim() - features :])
        return self._split(t.unsqueeze(0), features)[0]

    def vector_rows(self, t: Tensor, features: int) -> Tensor:
        """Bring vectors ``[v, ..., *features]`` at the output to ``[v, N, S, *features]``."""
        if self.broadcast:  # captured behind the broadcast: [v, N, ..., *features]
            return t.reshape(*t.shape[:2], -1, *t.shape[t.dim() - features :])
        return self._split(t, features)

    def _split(self, t: Tensor, features: int) -> Tensor:
        lead = t.dim() - 1 - features
        v, shape, feature_shape = t.shape[0], t.shape[1 : 1 + lead], t.shape[1 + lead :]
        N, axis = self.batch, self.batch_axis
        if lead < 1:
            raise UnsupportedError(
                f"{self.label}: the input has no batch axis (shape {tuple(t.shape[1:])}). Add one: "
                "per-datum quantities need it even for a single datum."
            )
        if self.sharing is not None:
            rows = axis if axis < lead else 0
            self.segments = self.sharing.segments_of(self, shape[rows])
            if self.segments is not None:
                padded = self.segments.pad(t.movedim(1 + rows, 1), 1)
                return padded.flatten(2, 1 + lead)
        if axis == 0 and shape[0] % N == 0:
            return t.reshape(v, N, -1, *feature_shape)
        if axis < lead and shape[axis] == N:
            return t.movedim(1 + axis, 1).reshape(v, N, -1, *feature_shape)
        if axis == 1 and lead == 1 and shape[0] % N == 0:
            return t.reshape(v, -1, N, *feature_shape).transpose(1, 2)
        raise UnsupportedError(
            f"{self.label}: cannot find the {N} data of the batch in a tensor of shape "
            f"{tuple(t.shape[1:])} along axis {axis}. N is the leading size of the first tensor that "
            "the outermost extended module is called with. If that is not the number of data, give "
            "the model a tensor that leads with it as first argument, or name another argument: "
            "extend(model, batch_argument=NAME). If this layer counts its data elsewhere, say so: "
            f"extend(model, batch_axis={{{self.name!r}: AXIS}})."
        )

    def release(self) -> None:
        """Let go of the input; the Site no longer counts as a use of its parameters."""
        self.x, self._saved, self._others = None, None, ()
        if getattr(self, "_live", False):  # torch.compile makes Sites without running __init__
            self._live = False
            for key in self._keys():
                count = _calls[key] - 1
                if count:
                    _calls[key] = count
                else:
                    del _calls[key]

    __del__ = release


def is_no_parameter(value: Tensor | None) -> bool:
    """Whether what stands for a module's parameter is another tensor, given by ``functional_call``."""
    return type(value) is Tensor


def has_site_hook(module: nn.Module) -> bool:
    """Whether `extend` has put a recording hook on a module."""
    return any(getattr(h, "records_sites", False) for h in module._forward_hooks.values())
