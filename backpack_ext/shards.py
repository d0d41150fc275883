"""Parameters that `torch.distributed.fsdp.fully_shard` has cut into pieces.

During forward and backward a module has whole parameters, made for the moment: calls are recorded with
those, and results belong to the sharded ones that the user holds. Nested passes through the graph would
gather and free parameters, and reduce gradients, at the wrong time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from backpack_ext.errors import UnsupportedError

_held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def in_use() -> bool:
    """Whether some model of the process may be sharded."""
    # torch's own optimizers import all of torch.distributed.fsdp: that alone says nothing
    module = sys.modules.get("torch.distributed._composable_state")
    return module is not None and len(module._module_state_mapping) > 0


def held(parameter: nn.Parameter) -> nn.Parameter:
    """Return the parameter that the user holds: the sharded one of a whole one."""
    if not in_use():
        return parameter
    if parameter not in _held:
        _look_up()
    return _held.get(parameter, parameter)


def refuse(what: str, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse nested passes if parameters are sharded.

    Raises:
        UnsupportedError: If so.
    """
    if is_sharded(parameters):
        raise UnsupportedError(
            f"{what} sends vectors through the graph once more, but the parameters are sharded by "
            "fully_shard: they are whole at their turn in the main backward pass only. With sharded "
            'parameters use what needs no other vectors than the gradient: KFAC(fisher="empirical"), '
            'KFAC(fisher="forward"), BatchGrad, BatchL2Grad, SumGradSquared, Variance. Or use '
            "DistributedDataParallel."
        )


def is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether some parameters are whole ones of sharded ones."""
    return in_use() and any(held(p) is not p for p in parameters)


def _look_up() -> None:
    # there is no public way from a whole parameter to the sharded one
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state = reference()
        for group in getattr(state, "_fsdp_param_groups", ()):
            for shard in group.fsdp_params:
                whole = getattr(shard, "_unsharded_param", None)
                if whole is not None:
                    _held[whole] = _held[shard.sharded_param] = shard.sharded_param
