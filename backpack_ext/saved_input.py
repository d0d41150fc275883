"""Layers' inputs that are saved the way autograd saves tensors: in a checkpoint nothing is held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from backpack_ext.own_pass import in_a_pass_of_its_own

if TYPE_CHECKING:
    from torch._C._autograd import SavedTensor


def saves_by_hooks() -> bool:
    """Whether hooks act on the tensors that autograd saves now, those of a checkpoint for instance."""
    return _hooks() is not None


def recomputes() -> bool:
    """Whether the forward pass that runs now is that of a checkpoint, in the backward pass."""
    hooks = _hooks()
    return hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def _hooks() -> tuple | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


# Operations under layers that read another tensor than their input (autocast casts inputs, and products
# bring transposed ones in order), with the name that it is saved by and the place of the weight.
_READERS = {
    "AddmmBackward0": ("_saved_mat1", 2),
    "MmBackward0": ("_saved_self", 1),
    "ConvolutionBackward0": ("_saved_input", 1),
}


# Layers whose input is so found: torch's own, whose forward does nothing else to it. What a subclass
# multiplies may be something else than its input, which the check of layers is to see.
_READING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def input_as_read(module: nn.Module, x: Tensor, output: Tensor, weight: Tensor) -> Tensor | None:
    """Return what a layer's input was cast or copied to, if autograd keeps it; None if it is not found.

    It is what the weight was multiplied with. Autograd does not keep the input itself then.

    Args:
        module: The layer.
        x: Its input, of another data type than its output, or not contiguous.
        output: Its output.
        weight: Its weight, a leaf.
    """
    if type(module) not in _READING or "forward" in module.__dict__:
        return None
    node = output.grad_fn
    for _ in range(3):  # reshapes, and the addition of a bias
        if node is None or node.name() in _READERS:
            break
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None or node.name() not in _READERS:
        return None
    name, place = _READERS[node.name()]
    leaf = node.next_functions[place][0]
    while leaf is not None and leaf.next_functions:  # transposed, cast
        leaf = leaf.next_functions[0][0]
    saved = getattr(node, name)
    if getattr(leaf, "variable", None) is not weight or saved is None or not saved.is_contiguous():
        return None  # another layer's
    same = saved.shape == x.shape or (saved.dim() == 2 and saved.shape[-1:] == x.shape[-1:])
    fits = same and saved.numel() == x.numel() and saved.dtype == output.dtype
    return saved.detach().reshape(x.shape) if fits else None


class SavedInput:
    """An input that went through the hooks that act on saved tensors, and comes back through them.

    A checkpoint counts what is saved, when it computes again too, so that each call of a layer that is
    trained saves something, whether it is recorded or not.

    Args:
        x: The input.
        wanted: Whether it will be read. If not, a tensor that takes no memory stands for it.
    """

    __slots__ = ("_read_in", "_saved")

    # Whether the pass of its own runs that reads an input: what it computes again is wanted.
    reading = False

    def __init__(self, x: Tensor, wanted: bool):
        x = x.detach() if wanted or SavedInput.reading else _stand_in(x.dtype, x.device).expand(x.shape)
        self._saved: SavedTensor = torch._C._autograd._make_saved_tensor(x, False)
        self._read_in: int | None = None

    def read(self, at_once: bool) -> Tensor | None:
        """Return the input; None if the hooks have only what stands for it.

        Args:
            at_once: Whether the running backward pass has inputs computed again. If not, or if it has
                brought this one already (a checkpoint hands each tensor out once per pass), a pass of
                its own does.
        """
        task = torch._C._current_graph_task_id()
        x = None
        if at_once and task != self._read_in:
            self._read_in, x = task, self._saved.unpack()
        if x is None or _stands_in(x):
            outer, SavedInput.reading = SavedInput.reading, True
            try:
                x = in_a_pass_of_its_own(self._saved.unpack)
            finally:
                SavedInput.reading = outer
        return None if _stands_in(x) else x


# What stands for inputs that nobody will read, by data type and device.
_STAND_INS: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _stand_in(dtype: torch.dtype, device: torch.device) -> Tensor:
    found = _STAND_INS.get((dtype, device))
    if found is None:
        found = _STAND_INS[dtype, device] = torch.zeros(1, dtype=dtype, device=device)
    return found


def _stands_in(x: Tensor) -> bool:
    known = _STAND_INS.get((x.dtype, x.device))
    return known is not None and known.data_ptr() == x.data_ptr()
