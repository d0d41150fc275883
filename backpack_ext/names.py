"""Names of parameters that all processes agree on."""

from __future__ import annotations

from weakref import WeakSet

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from backpack_ext.errors import UnsupportedError
from backpack_ext.shards import held
from backpack_ext.site import roots

# Path components that wrappers add; they may be there on one process and not on another.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# The models that names were looked up in, and what was found.
_known: tuple[WeakSet, WeakTensorKeyDictionary] = (WeakSet(), WeakTensorKeyDictionary())


class Names:
    """Parameters by name, and names by parameter: paths in the model that was extended or called.

    Attributes:
        parameters: All parameters of the models by name.
    """

    def __init__(self):
        self._given: dict[str, nn.Parameter] = {}
        self._read(_look_up())

    def _read(self, names: WeakTensorKeyDictionary) -> None:
        self._names, self.parameters = names, {}
        for p, name in names.items():
            self.parameters.setdefault(name, p)

    def __call__(self, parameter: nn.Parameter) -> str:
        """Return a parameter's name.

        Raises:
            UnsupportedError: If it has none, or another parameter of the pass has the same.
        """
        parameter = held(parameter)
        if parameter not in self._names:  # maybe new in a model that is known
            self._read(_look_up(again=True))
        name = self._names.get(parameter)
        if name is None:
            raise UnsupportedError(
                f"backpack(process_group=...): a parameter of shape {tuple(parameter.shape)} belongs to "
                "no extended module, so it has no name that the processes could agree on. Register it "
                "in the model, and extend the model."
            )
        if self._given.setdefault(name, parameter) is not parameter:
            raise UnsupportedError(
                f"backpack(process_group=...): two parameters of one backward pass have the name "
                f"{name!r}, because two models were called. Make them parts of one module, and extend "
                "and call that."
            )
        self.parameters[name] = parameter
        return name


def _look_up(again: bool = False) -> WeakTensorKeyDictionary:
    """Return the names of all parameters of models that were called; known ones cost nothing."""
    global _known
    if again or WeakSet(roots) != _known[0]:
        inner = {id(sub) for model in roots for sub in model.modules() if sub is not model}
        found = WeakTensorKeyDictionary()
        for model in roots:
            if id(model) in inner:
                continue  # a part that was called on its own, or a wrapped model
            paths = [path for path, _ in model.named_parameters()]
            # a module of the user's own may be called like a wrapper's: then nothing is left out
            clash = len({_unwrapped(path) for path in paths}) < len(paths)
            for path, p in model.named_parameters():
                name = path if clash else _unwrapped(path)
                p = held(p)
                found[p] = min(name, found.get(p, name))
        _known = WeakSet(roots), found
    return _known[1]


def _unwrapped(path: str) -> str:
    """Return a path without what `DistributedDataParallel` and other wrappers put into it."""
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    while len(parts) > 2 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)
