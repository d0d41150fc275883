"""Joining the blocks of a parameter's groups, which came as layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from curvature import Axes, Kronecker, KroneckerEigen

GroupBlock = Kronecker | KroneckerEigen


class Groups:
    """Collects the blocks of parts of parameters until a parameter's are complete.

    Attention's ``in_proj_weight`` is three layers, on inputs that may differ in their number of
    positions; each brings its own factors.
    """

    def __init__(self):
        self._parts: dict[int, dict[int, GroupBlock]] = {}

    def take(
        self,
        blocks: list[tuple[nn.Parameter, GroupBlock]],
        parameters: Mapping[str, nn.Parameter],
        parts: Mapping[str, tuple[int, int]],
        axes_of: Callable[[str], Axes],
    ) -> list[tuple[nn.Parameter, GroupBlock]]:
        """Take one layer's blocks; return those of parameters that are complete now.

        Args:
            blocks: The layer's parameters and their blocks; joint ones are one object.
            parameters: The layer's parameters by role.
            parts: Which part of a parameter the layer is, by role.
            axes_of: Returns the axes of a role's whole parameter.
        """
        roles = {id(p): role for role, p in parameters.items()}
        complete: list[tuple[nn.Parameter, GroupBlock]] = []
        joined: dict[int, GroupBlock] = {}
        for p, block in blocks:
            role = roles[id(p)]
            if role not in parts:
                complete.append((p, block))
                continue
            k, groups = parts[role]
            found = self._parts.setdefault(id(p), {})
            found[k] = block
            if len(found) < groups:
                continue
            whole = joined.get(id(block))  # a joint block serves weight and bias
            if whole is None:
                axes = axes_of("weight" if block.joint else role)
                whole = joined[id(block)] = type(block).of_groups(
                    [found[j] for j in range(groups)], axes
                )
            complete.append((p, whole))
        return complete
