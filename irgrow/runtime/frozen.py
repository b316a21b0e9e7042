"""Frozen entries keep their bits through any optimizer's step.

No gradient reaches them (`CompiledNetwork._live`), but weight decay and momentum from before would still move
them. So one pair of hooks on all torch optimizers keeps their values over the step; the first model with
frozen entries sets it up.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from irgrow.runtime.model import CompiledNetwork

_models: WeakSet[CompiledNetwork] = WeakSet()
_kept: WeakKeyDictionary[torch.optim.Optimizer, list[tuple[Tensor, Tensor, Tensor]]] = WeakKeyDictionary()


def hold_still(model: CompiledNetwork) -> None:
    """From now on no optimizer's step changes the model's frozen entries, as long as it has some."""
    _models.add(model)
    _hook()


@cache
def _hook() -> None:
    register_optimizer_step_pre_hook(_before)
    register_optimizer_step_post_hook(_after)


def _before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    still = [(model._tensors[name], mask) for model in _models for name, mask in model._frozen.items()]
    _kept[optimizer] = [(p, mask, p.detach().clone()) for p, mask in still if id(p) in held]


def _after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, mask, values in _kept.pop(optimizer, ()):
        parameter.data.copy_(torch.where(mask, values, parameter.data))
