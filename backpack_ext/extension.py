"""The base class of all our extensions."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from backpack.extensions.backprop_extension import FAIL_SILENT, BackpropExtension
from torch import Tensor, nn

from backpack_ext.errors import RecordingError, UnsupportedError
from backpack_ext.rules.base import Rule, register_class
from backpack_ext.share import Share
from backpack_ext.site import has_site_hook
from backpack_ext.unit import Unit

UNSUPPORTED = ("raise", "warn", "skip")
_counter = itertools.count()


@dataclass(frozen=True)
class Vectors:
    """Which vectors an extension wants at the layers' outputs.

    Args:
        kind: ``"gradient"`` (those of the main backward pass, no sweep), ``"exact"`` (all columns
            of the loss-Hessian root), ``"mc"`` (samples), ``"none"`` (inputs only), ``"diagonal"``
            (Hessian diagonals, which travel by a recursion of their own).
        samples: Number of Monte-Carlo samples.
        gradient: Whether to have those of the main backward pass too, in `Extension.absorb_gradient`.
    """

    kind: str
    samples: int = 1
    gradient: bool = False


class Extension(BackpropExtension):
    """An extension of one backward pass, written once over the layers' normal form.

    Subclasses say which vectors they want (`vectors`), take them layer by layer (`absorb`), and
    turn what they accumulated into results (`finish`). They hold no state of a pass themselves:
    it lives in the ``store`` that they are handed.

    Args:
        savefield: Attribute of the parameters that receives the result.
        unsupported: What to do about trainable parameters that the loss reaches and that no rule
            covers: ``"raise"``, ``"warn"`` or ``"skip"``.
        generator: Random generator for sampled vectors. By default a private one, seeded from
            ``torch.initial_seed()`` and the number of extensions made before, so that sampling
            does not disturb the global generator.

    Raises:
        ValueError: If ``unsupported`` is none of the three, or ``savefield`` names an attribute that
            parameters have.
    """

    vectors: Vectors
    # Per-sample rows must depend on their own datum alone; False where coupling is harmless.
    needs_independent_samples = True
    # Whether it takes the vectors of layers; False where it finds all it needs in the graph.
    needs_layers = True
    # Whether it forms the per-sample vectors of a weight with shared positions, which others may use.
    forms_grads = False
    # Whether several columns at a time cost it less than one by one.
    gathers = True
    # What else to do where a loss is needed and none was found, for the message.
    without_loss = ""
    # Results scale with loss ** power: how batches of a data set are put on one scale.
    power = 1

    def __init__(
        self,
        savefield: str,
        unsupported: str = "raise",
        generator: torch.Generator | None = None,
    ):
        if unsupported not in UNSUPPORTED:
            raise ValueError(f"unsupported={unsupported!r}: expected one of {UNSUPPORTED}.")
        if hasattr(nn.Parameter, savefield):
            raise ValueError(f"savefield={savefield!r} would hide an attribute of every Parameter.")
        super().__init__(savefield, module_exts={}, fail_mode=FAIL_SILENT)
        self.unsupported = unsupported
        self._rules: dict[type[nn.Module], Rule] = {}
        self._generator = generator
        self._order = next(_counter)
        self.rank = 0  # among processes that sum their results

    def expects_backpropagation_quantities(self) -> bool:
        """Nothing for BackPACK to propagate: our vectors travel on their own."""
        return False

    def set_module_extension(
        self, module: type[nn.Module], extension: Rule, overwrite: bool = False
    ) -> None:
        """Use a rule for a module class (and its subclasses) in this extension only.

        Args:
            module: The layer's class.
            extension: An instance of `backpack_ext.rules.Rule`.
            overwrite: Whether to replace a rule set before.

        Raises:
            TypeError: If ``extension`` is no rule (a BackPACK ``ModuleExtension``, for instance).
            ValueError: If the class has a rule here and ``overwrite`` is False.
        """
        if not isinstance(extension, Rule):
            raise TypeError(
                f"{type(self).__name__}.set_module_extension: expected an instance of "
                f"backpack_ext.rules.Rule, got {extension!r}. BackPACK's module extensions describe "
                "one quantity of one layer; a rule describes the layer once for all quantities."
            )
        if not overwrite and module in self._rules:
            raise ValueError(
                f"{module} already has the rule {self._rules[module]!r}; use overwrite=True."
            )
        self._rules[module] = extension
        register_class(module)

    def rule_for(self, module: nn.Module, default: Rule | None) -> Rule | None:
        """Return this extension's own rule for a module, or the package-wide one."""
        if self._rules and not (default is not None and default.in_graph):
            for cls in type(module).__mro__:
                if cls in self._rules:
                    return self._rules[cls]
        return default

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator that samples are drawn from, on ``device``."""
        if self._generator is None:
            self._generator = self._new_generator(device)
        if self._generator.device.type != device.type:
            raise ValueError(
                f"{type(self).__name__}: the generator lives on {self._generator.device}, the "
                f"network's output on {device}. Pass a torch.Generator({str(device)!r})."
            )
        return self._generator

    def _new_generator(self, device: torch.device | str) -> torch.Generator:
        # processes are often seeded alike, but must not draw alike
        seed = (torch.initial_seed() + 7919 * self._order + 104_729_000_003 * self.rank) % 2**63
        return torch.Generator(device).manual_seed(seed)

    def options(self) -> tuple[tuple[str, str], ...]:
        """Return what it was told, by name: processes whose results are summed compare it."""
        simple = (str, int, float, bool, type(None), torch.dtype, Vectors)
        given = {name: value for name, value in vars(self).items() if isinstance(value, simple)}
        left_out = ("rank", "unsupported", "max_columns")  # no matter to the results
        return tuple(
            (name, repr(value))
            for name, value in sorted(given.items())
            if not name.startswith("_") and name not in left_out
        )

    def sweep_key(self) -> tuple:
        """Extensions with equal keys share one sweep."""
        if self.vectors.kind == "mc":
            shared = id(self) if self._generator is None else id(self._generator)
            return ("mc", self.vectors.samples, shared)
        return (self.vectors.kind,)

    def state_dict(self, device: str = "cpu") -> dict[str, Tensor]:
        """Return the state of the random generator, if the extension draws samples.

        Args:
            device: Where the generator will live, if it has not been used yet.
        """
        if self._generator is None and self.vectors.kind not in ("mc", "diagonal"):
            return {}
        generator = self._generator or self._new_generator(device)
        return {"generator": generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor], device: str = "cpu") -> None:
        """Restore what `state_dict` returned; ``device`` is where the generator shall live."""
        if "generator" in state:
            if self._generator is None:
                self._generator = torch.Generator(device)
            self._generator.set_state(state["generator"])

    def __call__(self, module: nn.Module, g_inp, g_out) -> None:
        """Be called by BackPACK's own backward hooks, where our results need none of their work.

        Raises:
            RecordingError: If the module was extended by BackPACK only.
        """
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        if trainable and not has_site_hook(module):
            raise RecordingError(
                f"{type(self).__name__} found a {type(module).__name__} that was extended by "
                "BackPACK only, which records nothing for it. Extend the model and the loss with "
                "backpack_ext.extend (both kinds of hooks can live on one model)."
            )

    @abstractmethod
    def absorb(self, store: dict, unit: Unit) -> None:
        """Take the vectors of one layer; called once per layer and chunk of columns."""

    def bring_to_rows(self, unit: Unit) -> bool:
        """Reduce a layer to a row per datum of inputs and of vectors, if no more is needed of it.

        Called as the vectors arrive, for an extension that is alone in a pass; `absorb_all` is called
        later then, with the other layers that have been brought to such rows.

        Returns:
            Whether it was; a unit that was not is as before.
        """
        return False

    def absorb_all(self, store: dict, units: list[Unit]) -> None:
        """Take layers whose inputs and outputs have equal shapes, one call each."""
        for unit in units:
            self.absorb(store, unit)

    def absorb_gradient(self, store: dict, units: list[Unit]) -> None:
        """Take the gradient at layers of equal shape, if `Vectors.gradient` asked for it."""

    def settle(self, store: dict) -> None:
        """React to the end of a chunk of columns: every layer has brought its vectors."""

    @abstractmethod
    def finish(self, store: dict) -> list[tuple[nn.Parameter, Any]]:
        """Turn a store into results.

        Args:
            store: What `absorb` filled in.

        Returns:
            Pairs of a parameter and its result.
        """

    @abstractmethod
    def merge(self, total: dict, store: dict, weight: float) -> None:
        """Add a store to the store of a larger data set.

        Args:
            total: The store that grows.
            store: The store of one batch.
            weight: What the batch's loss must be multiplied with to be on the total's scale.
        """

    def over_batches(self) -> tuple[Extension, Callable[[Any], Any]]:
        """Return what to collect over the batches of a data set, and what to make of it.

        Returns:
            An extension that runs in this one's place, and a map from its results to this one's.
        """
        return self, lambda result: result

    def check_processes(self) -> None:
        """Say why results of several processes cannot be summed, if so.

        Raises:
            UnsupportedError: For extensions without `shares`.
        """
        if not self.per_datum and type(self).shares is Extension.shares:
            raise UnsupportedError(
                f"{type(self).__name__} does not say how its results add up over processes (methods "
                "`shares` and `of_shares`). Use it without process_group."
            )

    @property
    def per_datum(self) -> bool:
        """Whether results list the data: then each process keeps those of its own."""
        return False

    def shares(self, store: dict, names: Callable[[nn.Parameter], str]) -> list[Share]:
        """Return what a store adds to that of all processes of a group.

        Args:
            store: What `absorb` filled in here.
            names: Returns a parameter's name, which is the same on all processes.
        """
        raise NotImplementedError

    def of_shares(self, sums: list[Share], parameters: Mapping[str, nn.Parameter]) -> dict:
        """Return the store that belongs to sums of shares; also if there was no share here.

        Args:
            sums: The sums over all processes.
            parameters: The parameters by name.
        """
        raise NotImplementedError

    @property
    def needs_scale(self) -> bool:
        """Whether units need their ``scale`` although no sweep was asked for."""
        return False


def check_indices(owner: str, name: str, values: Iterable[int]) -> list[int]:
    """Return indices as a list.

    Args:
        owner: Who asks, for messages.
        name: The argument's name.
        values: Integers, negative ones too; a sequence or tensor.

    Raises:
        ValueError: If there are none, or some are no integers (a mask, say).
    """
    message = f"{owner}: {name}={values!s:.80}; expected a sequence of indices, not empty."
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(message)
    found = values.tolist() if isinstance(values, Tensor) else list(values)
    if not isinstance(found, list) or not found or any(isinstance(k, (bool, float)) for k in found):
        raise ValueError(message)
    try:
        return [index(k) for k in found]
    except TypeError:
        raise ValueError(message) from None


def check_samples(owner: str, mc_samples: int) -> None:
    """Raise if a number of Monte-Carlo samples is no positive integer."""
    if not isinstance(mc_samples, int) or mc_samples < 1:
        raise ValueError(f"{owner}: mc_samples={mc_samples!r}; expected a positive integer.")
