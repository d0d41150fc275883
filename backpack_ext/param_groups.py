"""Groups of parameters: the blocks of a block-diagonal matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from backpack_ext.site import roots

GROUPS = ("layers", "parameters")

# A name and its parameters, or None, "layers" or "parameters".
Groups = str | dict[str, list[nn.Parameter]] | None


class Places:
    """Where parameters are in the models that were called: their order, and their paths."""

    def __init__(self):
        self.order: dict[int, int] = {}
        self.paths: dict[int, str] = {}
        self.owners: dict[int, int] = {}  # the module that holds a parameter, by id
        # a part may have been called on its own as well, when checkpointing recomputes it, for instance
        for model in sorted(roots, key=lambda model: -sum(1 for _ in model.parameters())):
            for path, module in model.named_modules():
                for name, p in module._parameters.items():
                    if p is not None and id(p) not in self.order:
                        self.order[id(p)] = len(self.order)
                        self.paths[id(p)] = f"{path}.{name}" if path else name
                        self.owners[id(p)] = id(module)

    def sorted(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return parameters in the order of the models; those of none at the end, as they come."""
        return sorted(parameters, key=lambda p: self.order.get(id(p), len(self.order)))


def checked_groups(owner: str, param_groups) -> Groups:
    """Return groups of parameters in one form.

    Args:
        owner: Who asks, for messages.
        param_groups: None (one group), ``"layers"``, ``"parameters"``, parameters (one group), or a
            sequence of groups: sequences of parameters, or dictionaries with ``"params"`` (and maybe
            ``"name"``; else they are called ``"0"``, ``"1"`` etc.).

    Raises:
        ValueError: If it is something else, a group is empty, a parameter is frozen or in two groups, or
            two groups have one name.
    """
    if param_groups is None:
        return None
    wanted = "expected None, 'layers', 'parameters', or groups of parameters as for an optimizer"
    if isinstance(param_groups, str):
        if param_groups not in GROUPS:
            raise ValueError(f"{owner}: param_groups={param_groups!r}; {wanted}.")
        return param_groups
    if not isinstance(param_groups, Iterable) or isinstance(param_groups, Tensor):
        raise ValueError(f"{owner}: param_groups={param_groups!s:.60}; {wanted}.")
    groups = list(param_groups)
    if groups and all(isinstance(group, Tensor) for group in groups):
        groups = [groups]
    found: dict[str, list[nn.Parameter]] = {}
    for k, group in enumerate(groups):
        given = isinstance(group, dict)
        members = group.get("params") if given else group
        members = [members] if isinstance(members, Tensor) else members
        name = str(group.get("name", k)) if given else str(k)
        if name in found:
            raise ValueError(f"{owner}: two groups of parameters have the name {name!r}.")
        if given and "params" not in group:
            raise ValueError(f'{owner}: group {name} is a dictionary without "params".')
        if not isinstance(members, Iterable) or isinstance(members, str):
            raise ValueError(f"{owner}: group {name} is {members!s:.60}; {wanted}.")
        found[name] = list(members)
    if not found or not all(found.values()):
        raise ValueError(f"{owner}: param_groups has no group, or an empty one; {wanted}.")
    seen: dict[int, str] = {}
    for name, members in found.items():
        for p in members:
            if not isinstance(p, nn.Parameter) or not p.requires_grad:
                raise ValueError(
                    f"{owner}: group {name} holds a {type(p).__name__} that is no trainable parameter."
                )
            if id(p) in seen:
                raise ValueError(
                    f"{owner}: a parameter of shape {tuple(p.shape)} is in the groups {seen[id(p)]} and "
                    f"{name}; blocks cannot overlap."
                )
            seen[id(p)] = name
    return found


def groups_of(
    owner: str, groups: Groups, reached: Sequence[nn.Parameter], places: Places
) -> dict[str, tuple[nn.Parameter, ...]]:
    """Sort parameters into groups.

    Args:
        owner: Who asks, for messages.
        groups: What `checked_groups` returned.
        reached: The parameters that there are, in the models' order.
        places: Where parameters are.

    Returns:
        The groups by name, each in the models' order; without parameters that are not reached.

    Raises:
        ValueError: If a group has a parameter of no model that was called.
    """
    if groups is None:
        return {"all": tuple(reached)}
    if isinstance(groups, dict):
        known = {id(p) for p in reached} | places.order.keys()
        for name, members in groups.items():
            for p in members:
                if id(p) not in known:
                    raise ValueError(
                        f"{owner}: group {name} has a parameter of shape {tuple(p.shape)} that is no "
                        "parameter of the model."
                    )
        chosen = {name: {id(p) for p in members} for name, members in groups.items()}
        found = {name: tuple(p for p in reached if id(p) in ids) for name, ids in chosen.items()}
        return {name: members for name, members in found.items() if members}
    # models may have equal paths: parameters belong together if one module holds them
    of_module: dict[int, list[nn.Parameter]] = {}
    for p in reached:
        key = id(p) if groups == "parameters" else places.owners.get(id(p), id(p))
        of_module.setdefault(key, []).append(p)
    named: dict[str, tuple[nn.Parameter, ...]] = {}
    for members in of_module.values():
        path = places.paths.get(id(members[0]), "(of no module)")
        name = path if groups == "parameters" else path.rpartition(".")[0] or "(root)"
        if id(members[0]) not in places.paths:
            name = path
        number, unique = 1, name
        while unique in named:
            number += 1
            unique = f"{name} ({number})"
        named[unique] = tuple(members)
    return named
