"""Going back: a snapshot of a model and its optimizer, and the way back to it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from irgrow.ir.errors import GrowthFailed
from irgrow.ir.lineage import Lineage
from irgrow.ir.morphism import Changes, Morphism
from irgrow.ir.network import Network
from irgrow.runtime.grow import grow
from irgrow.runtime.ledger import Ledger

if TYPE_CHECKING:
    from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A network with its values, the optimizer's state by parameter name, and the ledger so far."""

    network: Network
    ledger: Ledger
    states: dict[str, dict[str, Any]]
    groups: tuple[tuple[str, ...], ...]  # parameter names per parameter group

    def __repr__(self) -> str:
        return f"<Snapshot of {self.network!r} after {len(self.ledger)} growths>"


def snapshot(model: CompiledNetwork, optimizer: torch.optim.Optimizer | None = None) -> Snapshot:
    """The model (and optimizer) as they are now, copied."""
    names = {id(tensor): name for name, tensor in model.tensors().items()}
    states: dict[str, dict[str, Any]] = {}
    groups: tuple[tuple[str, ...], ...] = ()
    if optimizer is not None:
        states = {names[id(p)]: copy.deepcopy(state) for p, state in optimizer.state.items() if id(p) in names}
        groups = tuple(tuple(names[id(p)] for p in g["params"] if id(p) in names) for g in optimizer.param_groups)
    return Snapshot(model.network(), model.ledger, states, groups)


def restore(model: CompiledNetwork, to: Snapshot, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Structure, values, optimizer state and ledger are those of the snapshot; module and optimizer stay the same
    objects. All or nothing, as growing is.
    """
    if optimizer is not None and len(to.groups) != len(optimizer.param_groups):
        raise GrowthFailed(
            "restore",
            f"an optimizer with {len(optimizer.param_groups)} parameter groups",
            f"{len(to.groups)}, as when the snapshot was taken",
            do="take the snapshot with this optimizer: model.snapshot(optimizer)",
        )
    now, target = model.structure, to.network.clone()
    fresh = Lineage({name: () for name in target.tensors()})
    back = Morphism(now, target, fresh, Changes("goes back to a snapshot"), "restore")
    grow([model], back, optimizer)
    model.ledger = to.ledger
    if optimizer is not None:
        _restore_state(model.tensors(), to, optimizer)


def _restore_state(held: dict[str, Tensor], to: Snapshot, optimizer: torch.optim.Optimizer) -> None:
    ours = {id(tensor) for tensor in held.values()}
    for group, names in zip(optimizer.param_groups, to.groups, strict=True):
        others = [p for p in group["params"] if id(p) not in ours]
        group["params"] = [*(held[name] for name in names), *others]
    for name, parameter in held.items():
        if isinstance(parameter, nn.Parameter):
            optimizer.state.pop(parameter, None)
            if name in to.states:
                optimizer.state[parameter] = copy.deepcopy(to.states[name])
