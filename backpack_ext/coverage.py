"""Which trainable parameters behind a loss an extension does not treat, and their names."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from torch import nn

from backpack_ext.errors import UnsupportedError
from backpack_ext.extension import Extension
from backpack_ext.shards import held, is_sharded
from backpack_ext.site import Site, roots


def check_coverage(
    ext: Extension, sites: Collection[Site], parameters: Mapping[int, nn.Parameter]
) -> None:
    """Report parameters that the loss reaches and that no rule of the extension covers.

    Args:
        ext: The extension.
        sites: The recorded calls that the loss reaches.
        parameters: The parameters that it reaches, by id.

    Raises:
        UnsupportedError: If there are some and ``ext.unsupported`` is ``"raise"``.
    """
    if ext.unsupported == "skip":
        return
    covered = set()
    for site in sites:
        if site.error is None and ext.rule_for(site.module, site.rule) is not None:
            covered.update(id(p) for p in site.parameters.values())
    uncovered = [p for key, p in parameters.items() if key not in covered]
    if not uncovered:
        return
    sharded = ""
    if is_sharded(uncovered):
        sharded = (
            "\nThey are sharded by fully_shard, which leaves only layers with a rule: other parameters "
            "take nested passes through the graph."
        )
    message = (
        f"{type(ext).__name__} does not cover these parameters of the loss:\n  "
        + "\n  ".join(sorted(_describe(p, sites) for p in uncovered))
        + sharded
        + "\nTheir modules have no rule, or were used in a way that was not recorded. Register a "
        'rule (backpack_ext.rules.register_rule), freeze them, or pass unsupported="warn" or '
        '"skip" to leave them out.'
    )
    if ext.unsupported == "raise":
        raise UnsupportedError(message)
    warnings.warn(message, stacklevel=2)


def _describe(parameter: nn.Parameter, sites: Collection[Site]) -> str:
    """Name a parameter: its path, its owner's class, and why it is not covered where known."""
    for model in roots:
        for path, module in model.named_modules():
            for name, p in module._parameters.items():
                if p is not None and held(p) is held(parameter):
                    return f"{path + '.' if path else ''}{name} of {_owner(module, name)}" + next(
                        (
                            f": {site.error}"
                            for site in sites
                            if site.error and any(q is p for q in site.parameters.values())
                        ),
                        "",
                    )
    return f"a parameter of shape {tuple(parameter.shape)} that belongs to no extended module"


def _owner(module: nn.Module, name: str) -> str:
    kind = type(module).__name__
    if kind == "ParametrizationList" or name.endswith(("_g", "_v", "_orig")):
        return f"{kind} (a parametrised weight: its layer's rule needs the weight itself)"
    return kind
