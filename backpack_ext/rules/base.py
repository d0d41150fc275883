"""The interface of a rule: how one layer family reaches the normal form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvature import BIAS, MATRIX, Axes

if TYPE_CHECKING:
    from backpack_ext.images import Images
    from backpack_ext.normal import OneHot
    from backpack_ext.site import Site


def by_shape(method: Callable) -> Callable:
    """Mark a ``cotangents`` that depends on shapes only: layers of equal shape share one call."""
    method.by_shape = True
    return method


def bias_axes(groups: int) -> Axes:
    """Return how a bias forms matrices ``[g, o, 1]``."""
    return BIAS if groups == 1 else Axes("(g o) -> g o 1", (("g", groups),))


@dataclass(frozen=True)
class InputMoment:
    """Sums over the rows (n, s) of a layer's inputs.

    Args:
        second: ``sum_ns a a^T``, ``[g,i,i]``.
        first: ``sum_ns a``, ``[g,i]``; None if not asked for.
        rows: Number of rows.
    """

    second: Tensor
    first: Tensor | None
    rows: int

    def __add__(self, other: InputMoment) -> InputMoment:
        """Return the sums over the rows of both."""
        first = None if self.first is None else self.first + other.first
        return InputMoment(self.second + other.second, first, self.rows + other.rows)

    def means(self) -> tuple[Tensor, Tensor | None]:
        """Return A, and its last row ``[g,i+1]`` if a bias, whose inputs are ones, is joined."""
        rows = max(1, self.rows)
        A = self.second / rows
        if self.first is None:
            return A, None
        return A, torch.cat([self.first / rows, A.new_ones(len(A), 1)], dim=1)


class Rule(ABC):
    r"""Brings a layer that is affine in its parameters to the normal form.

    .. math::  z_{nso} = \\sum_i W_{oi} a_{nsi} + \\beta_o

    with n the datum, s the position that shares the weight, o and i the features. A rule says what
    ``a`` is (`inputs`), how vectors at the output are laid out (`cotangents`), and how the
    parameter's axes form the matrix W (`axes`). Every quantity follows from these three.

    Attributes:
        weight: Name of the module's attribute that holds W.
        bias: Name of the attribute that holds beta, or None.
        arguments: Names of the forward's arguments that `inputs` reads, in the forward's order;
            ``site.input(k)`` is the k-th. Without names the first argument is kept.
    """

    weight: str = "weight"
    bias: str | None = "bias"
    arguments: tuple[str, ...] = ()
    # Whether W is diagonal, one weight per feature: see `ElementwiseRule`.
    elementwise: bool = False
    # Whether its calls are found in the graph instead of recorded by a module's hook.
    in_graph: bool = False
    # Rules of one family read the weight as the same matrix: calls under them are calls of one layer.
    family: str | None = None

    def note(self, module: nn.Module) -> Any:
        """Return what else the forward pass depends on and may change until the backward."""
        return None

    def misfit(self, module: nn.Module, x: Tensor, output: Tensor) -> str | None:
        """Return why a call cannot be that of the layer, if its first argument's shape says so.

        A subclass may have a forward of its own. Where it shows, the call's parameters are treated
        as those of a module without a rule.
        """
        return None

    def lists(self, module: nn.Module, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """Return those inputs (given in the order of `arguments`) that list entries of all data.

        Their size is not the number of data, also where it is the first tensor that a model is
        called with: flat tokens and offsets of bags.
        """
        return ()

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the module's trainable parameters by role, ``"weight"`` and ``"bias"``.

        An attribute that is no Parameter (a parametrised weight) is left out: the parameters
        behind it are then reported as uncovered.
        """
        found, stored = {}, module._parameters
        p = stored.get(self.weight)
        if p is not None and p.requires_grad:
            found["weight"] = p
        p = stored.get(self.bias)
        if p is not None and p.requires_grad:
            found["bias"] = p
        return found

    def groups(self, module: nn.Module) -> int:
        """Return the number of groups g."""
        return 1

    @abstractmethod
    def inputs(self, site: Site) -> Tensor | OneHot:
        """Return the layer's input in normal form, ``[n, s, i]`` or ``[g, n, s, i]``."""

    def mean_inputs(self, site: Site) -> Tensor | None:
        """Return inputs ``[n, s', i]`` or ``[g, n, s', i]`` with the same mean over positions.

        For rules whose `inputs` are costly to form; None by default, which stands for those.
        """
        return None

    def inputs_of(self, site: Site, data: slice) -> Tensor | None:
        """Return the inputs of some of the data.

        For rules whose `inputs` are much larger than the layer's own; None by default, which stands
        for those.
        """
        return None

    def images(self, site: Site) -> Images | None:
        """Return the inputs as images that they can be formed of at any time.

        For convolutions, of which each datum is one image; None by default, which stands for others.
        """
        return None

    def moment_shape(self, site: Site) -> tuple[int, int] | None:
        """Return the numbers of rows and of features i that `input_moment` sums; None by default.

        For rules with that method. A call whose output all data share may have more rows.
        """
        return None

    def input_moment(
        self, site: Site, dtype: torch.dtype, with_sum: bool = False, formed: bool = False
    ) -> InputMoment | None:
        """Return sums over all data and positions, for rules that need not form `inputs` for that.

        Args:
            site: The layer's call.
            dtype: Data type of the sums, at least float32.
            with_sum: Whether the sum of the inputs is needed too.
            formed: Whether the inputs have been formed anyway.

        Returns:
            The sums; None, the default, if they are to be taken of the inputs.
        """
        return None

    @abstractmethod
    def cotangents(self, site: Site, g: Tensor) -> Tensor:
        """Bring vectors at the output to the normal form.

        Args:
            site: The layer's call.
            g: ``[v, *output.shape]``.

        Returns:
            ``[v, n, s, o]`` or ``[g, v, n, s, o]``.
        """

    def axes(self, module: nn.Module, role: str) -> Axes:
        """Return how the axes of a parameter form the matrix ``[g, o, i]``."""
        if role == "bias":
            return bias_axes(self.groups(module))
        return self.weight_axes(module)

    def weight_axes(self, module: nn.Module) -> Axes:
        """Return the axes of the weight; a plain ``[o, i]`` matrix by default."""
        return MATRIX


# Filled by rules/__init__.py, where the whole table is in sight, and by `register_rule`.
RULES: dict[type[nn.Module], Rule] = {}

# Classes that only single extensions have a rule for; their calls are recorded as well.
_extra_classes: set[type[nn.Module]] = set()


def register_rule(
    *classes: type[nn.Module], overwrite: bool = False
) -> Callable[[type[Rule]], type[Rule]]:
    """Decorate a rule class to use it package-wide for module classes and their subclasses.

    Args:
        classes: The layers' classes.
        overwrite: Whether to replace an existing rule.

    Raises:
        TypeError: If something decorated is no rule class.
        ValueError: If a class has a rule and ``overwrite`` is False.

    Example:
        >>> class Scaled(nn.Linear):
        ...     pass
        >>> @register_rule(Scaled)
        ... class ScaledRule(type(RULES[nn.Linear])):
        ...     pass
        >>> type(find_rule(Scaled(2, 3))).__name__
        'ScaledRule'
    """

    def decorate(rule: type[Rule]) -> type[Rule]:
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise TypeError(f"register_rule decorates a subclass of Rule, got {rule!r}.")
        for cls in classes:
            if cls in RULES and not overwrite:
                raise ValueError(f"{cls} already has the rule {RULES[cls]!r}; use overwrite=True.")
            RULES[cls] = rule()
        _lookup.clear()
        return rule

    return decorate


def register_class(cls: type[nn.Module]) -> None:
    """Have calls of a class recorded that no package-wide rule covers."""
    _extra_classes.add(cls)
    _lookup.clear()


def is_known_to_extensions(cls: type[nn.Module]) -> bool:
    """Whether a single extension has a rule of its own for a class."""
    return any(c in _extra_classes for c in cls.__mro__)


# By class: its rule along the MRO, and whether its calls are recorded. None: not looked up yet.
_lookup: dict[type[nn.Module], tuple[Rule | None, bool]] = {}


def look_up(cls: type[nn.Module]) -> tuple[Rule | None, bool]:
    """Return a class's package-wide rule, and whether some rule, maybe an extension's, treats it."""
    entry = _lookup.get(cls)
    if entry is None:
        rule = next((RULES[c] for c in cls.__mro__ if c in RULES), None)
        entry = _lookup[cls] = (rule, rule is not None or is_known_to_extensions(cls))
    return entry


def find_rule(module: nn.Module) -> Rule | None:
    """Return the package-wide rule of a module, looked up along its class's MRO."""
    return look_up(type(module))[0]
