"""The ``with backpack(...)`` block, and what the hooks need to know about it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import backpack as _backpack
from backpack.context import CTX
from backpack.utils.hooks import no_op
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.graph import GradientEdge

from backpack_ext.compiled import keep_out_of_compilation
from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.retained import restore, retained

if TYPE_CHECKING:
    from backpack_ext.processes import Processes


class backpack(_backpack.backpack):
    r"""Activate extensions, ours and BackPACK's, for the backward passes inside the block.

    BackPACK's own ``backpack`` takes our extensions as well; this subclass adds three things: an
    empty context records nothing in the forward pass (an optimizer's steps without statistics cost
    a plain step), ``grad_scaler``, and a warning when the block ends and nothing was computed.

    Args:
        exts: Extension instances; what is given twice counts once.
        extension_hook: Called with each extended module of the graph once its quantities are on
            its parameters, as in BackPACK. When one of our extensions is active this is at the
            end of the backward pass.
        debug: BackPACK's debug output.
        retain_graph: For BackPACK's extensions. Ours follow the ``retain_graph`` of ``backward``.
        grad_scaler: The ``torch.amp.GradScaler`` whose factor the loss was multiplied with; results
            are free of it.
        process_group: Processes that train one model on different data, such as
            ``torch.distributed.group.WORLD``. At the end of each backward pass their results are put
            together: each process has what one process would have that sees the data of all, see
            below. None: each process has results of its own data.
        timeout: Seconds after which to give up on the other processes of the group.

    Raises:
        ValueError: If an argument is no instance of an extension, or if two extensions save to
            the same field.
        TypeError: If ``process_group`` is no group of this process's.
        UnsupportedError: If an extension's results cannot be put together.
        RecordingError: On entering, if the object's block is open already.
        ProcessGroupError: In the backward pass, if another process of the group fails.

    With processes k whose losses are means over :math:`T_k` terms (data, positions, class weights;
    ignored targets do not count), the total is the mean over all :math:`\sum_k T_k` terms, and not
    the mean of means: with :math:`w_k = T_k / \sum_j T_j` the curvature is
    :math:`\sum_k w_k C_k`, that of squares of gradients :math:`\sum_k w_k^2 C_k`. With
    ``reduction="sum"`` all :math:`w_k = 1`. Factors A are means over the rows of all. Quantities per
    datum are not gathered: each process has those of its own data, as parts of the total loss
    (``grad_batch`` times :math:`w_k`). Gradients are left to the wrapper, `DistributedDataParallel`
    for instance, which takes the mean of means.
    """

    # The innermost context of this class, or None; BackPACK's context is a process-wide global too.
    current: backpack | None = None

    def __init__(
        self,
        *exts,
        extension_hook: Callable[[nn.Module], None] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
        grad_scaler=None,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 300.0,
    ):
        exts = [ext for k, ext in enumerate(exts) if all(ext is not other for other in exts[:k])]
        super().__init__(*exts, extension_hook=extension_hook, debug=debug, retain_graph=retain_graph)
        check_savefields(exts)
        self._open = False
        self.grad_scaler = grad_scaler
        self.processes: Processes | None = None
        if process_group is not None:
            self._join(process_group, timeout)
        self.computed = False

    def _join(self, group: dist.ProcessGroup, timeout: float) -> None:
        """Have results summed over a group."""
        # an import at the top would be circular
        from backpack_ext.processes import Processes

        self.processes = Processes(group, timeout)
        for ext in self.exts:
            if not _ours(ext):
                raise UnsupportedError(
                    f"backpack(process_group=...): {type(ext).__name__} is an extension of BackPACK's, "
                    "which knows nothing of other processes. Use ours, or no process_group."
                )
            ext.check_processes()

    def __enter__(self) -> backpack:
        keep_out_of_compilation()
        check_thread("A with-block begins")
        if self._open:  # what was active before is kept on the object itself
            raise RecordingError(
                "The block of this backpack(...) object is open already, and cannot begin again "
                "inside of itself. Make another one."
            )
        if self.processes is not None:
            self.processes.enter()
            for ext in self.exts:
                ext.rank = self.processes.rank
        self.thread, self._open = threading.get_ident(), True
        super().__enter__()
        self._outer, backpack.current = backpack.current, self
        self.computed = False
        return self

    def __exit__(self, kind, value, traceback) -> None:
        super().__exit__(kind, value, traceback)
        backpack.current, self._open = self._outer, False
        if self.processes is not None:
            for ext in self.exts:
                ext.rank = 0
        if self.computed or kind is not None:
            return
        ours = list(filter(_ours, self.exts))
        if ours:
            warnings.warn(
                f"backpack({', '.join(type(e).__name__ for e in ours)}): the block ended and nothing "
                "was computed, because no backward pass through an extended model ran inside it. "
                "Extend the model and the loss with backpack_ext.extend and call backward() inside "
                "the block.",
                stacklevel=2,
            )


def check_savefields(exts) -> None:
    """Raise if two extensions of one pass would overwrite each other's results."""
    if len(exts) < 2:
        return
    seen = {}
    for ext in exts:
        other = seen.setdefault(ext.savefield, ext)
        if other is not ext:
            raise ValueError(
                f"Two extensions save to the field {ext.savefield!r}: {type(other).__name__} and "
                f"{type(ext).__name__}. Give one of them another `savefield`."
            )


def active_extensions() -> tuple[Extension, ...]:
    """Return our extensions among the active ones."""
    exts = CTX.active_exts
    return tuple(filter(_ours, exts)) if exts else ()


def recording() -> bool:
    """Whether the layers of a forward pass that runs now have to be recorded.

    Outside of any context they have, because the backward may run inside one. Inside, they have when
    one of our extensions that needs them is active, or a user's hook that is called with modules.
    """
    return _wanted(_ours if CTX.extension_hook is not no_op else _needs_layers)


def tying() -> bool:
    """Whether the losses of a forward pass that runs now have to be recorded: for any extension."""
    return _wanted(_ours)


def _wanted(by: Callable[[object], bool]) -> bool:
    if not _backpack.disable.store_io:
        return False
    if CTX.active_exts:
        return any(map(by, CTX.active_exts))
    return backpack.current is None or bool(backpack.current.exts)


def _ours(ext: object) -> bool:
    return Extension in type(ext).__mro__  # asking for instances of an abstract class is slow


def _needs_layers(ext: object) -> bool:
    return _ours(ext) and ext.needs_layers


def loss_multiplier() -> float:
    """Return the factor of the active ``grad_scaler`` (1 without one)."""
    scaler = backpack.current.grad_scaler if backpack.current is not None else None
    return 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())


def check_thread(what: str) -> None:
    """Raise if another thread has a block open: what is active is global to the process.

    Raises:
        RecordingError: If so.
    """
    current = backpack.current
    if current is not None and current.exts and current.thread != threading.get_ident():
        raise RecordingError(
            f"{what} while another thread is inside `with backpack(...)`. Extensions are active in the "
            "whole process: results would mix. Use one thread, or processes."
        )


def processes() -> Processes | None:
    """Return the processes that results are summed over; None for this one alone."""
    return backpack.current.processes if backpack.current is not None else None


def note_computed() -> None:
    """Tell the innermost context of ours that a backward pass delivered something."""
    if backpack.current is not None:
        backpack.current.computed = True


class SuspendBackpack:
    """Have a nested sweep leave no trace: BackPACK's hooks do not act, retained gradients stay.

    Nor do hooks on parameters (a clipping of gradients, say) change what the sweep is asked for.

    Args:
        ends: What it is asked for, of which some may be parameters.
    """

    def __init__(self, ends: Iterable[GradientEdge | Tensor] = ()):
        leaves = (t if isinstance(t, Tensor) else getattr(t.node, "variable", None) for t in ends)
        # the dictionaries that autograd looks into
        self._hooks = [t._backward_hooks for t in leaves if t is not None and t._backward_hooks]

    def __enter__(self) -> None:
        self._grads, self._held = retained(), [dict(hooks) for hooks in self._hooks]
        for hooks in self._hooks:
            hooks.clear()
        self._saved = (CTX.active_exts, CTX.extension_hook, CTX.retain_graph)
        CTX.active_exts, CTX.extension_hook, CTX.retain_graph = (), no_op, True

    def __exit__(self, *exc) -> None:
        CTX.active_exts, CTX.extension_hook, CTX.retain_graph = self._saved
        restore(self._grads)
        for hooks, held in zip(self._hooks, self._held, strict=True):
            hooks.update(held)


class CollectingHook:
    """Stands in for the user's ``extension_hook`` until all quantities are published.

    BackPACK calls the hook for each module as its own extensions pass by; ours are there only at
    the end of the backward pass, and the user's hook is to run once per module.
    """

    def __init__(self):
        users = CTX.extension_hook
        while isinstance(users, CollectingHook):  # left behind by a pass that raised
            users = users.users
        self.users = users
        self.wanted = users is not no_op
        self.modules: dict[nn.Module, None] = {}
        CTX.extension_hook = self

    def __call__(self, module: nn.Module) -> None:
        """Note a module that the user's hook is owed to."""
        self.modules.setdefault(module)

    def remove(self) -> dict[nn.Module, None]:
        """Put the user's hook back; return the modules it is owed to."""
        CTX.extension_hook = self.users
        return self.modules
