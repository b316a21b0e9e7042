"""Applying a morphism to live models: build everything, then swap; or change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from irgrow.compiler.lower import lower
from irgrow.ir.errors import GrowthFailed, StaleMorphism
from irgrow.ir.morphism import Morphism
from irgrow.runtime.carry import carried_state

if TYPE_CHECKING:
    from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class Carried:
    """What a growth did to the parameters: which changed, were added or removed, and whose optimizer state
    starts fresh because it has no exact gradient factor (ALGORITHMS, section 7)."""

    changed: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    fresh_state: tuple[str, ...]

    def __str__(self) -> str:
        parts = [
            (word, getattr(self, word.replace(" ", "_"))) for word in ("changed", "added", "removed", "fresh state")
        ]
        return "; ".join(f"{word}: {', '.join(names)}" for word, names in parts if names) or "nothing changed"


def grow(models: Sequence[CompiledNetwork], morphism: Morphism, optimizer: torch.optim.Optimizer | None) -> Carried:
    """Every model computes `morphism.after`; the optimizer (of the first) follows. All or nothing."""
    for model in models:
        if model.structure.structure != morphism.before.structure:
            raise StaleMorphism(
                f"grow by {morphism.by}",
                "a morphism of another structure",
                "one made from model.network()",
                do="make it again",
            )
    plans = [_Plan(model, morphism) for model in models]
    if optimizer is not None:
        plans[0].prepare_optimizer(optimizer)
    held = [name for plan in plans for name in plan.held()]
    if held:
        raise _held(morphism, ", ".join(held))
    done: list[_Plan] = []
    try:
        for plan in plans:
            done.append(plan)
            plan.swap()
    except RuntimeError as error:
        for plan in reversed(done):
            plan.undo()
        raise _held(morphism, str(error)) from error
    for plan in plans:
        plan.finish()
    first = plans[0]
    return Carried(tuple(first.replaced), tuple(first.added), tuple(first.removed), tuple(first.fresh))


def _held(morphism: Morphism, what: str) -> GrowthFailed:
    return GrowthFailed(
        f"grow by {morphism.by}",
        f"tensors that something still holds: {what}",
        "parameters that nothing else refers to",
        do="delete losses, outputs and views of the parameters first, and unwrap DistributedDataParallel",
    )


class _Plan:
    """Everything that one model will need, made before anything is touched."""

    def __init__(self, model: CompiledNetwork, morphism: Morphism) -> None:
        self.model, self.morphism = model, morphism
        current = {name: tensor.data for name, tensor in model.tensors().items()}
        self.old = model.tensors()
        after = morphism.after
        new = morphism.tensors(current)
        trainable = set(after.trainable())
        self.trainable = trainable
        self.swapped: list[tuple[Tensor, Tensor]] = []
        self.replaced: dict[str, Tensor] = {}  # parameters that keep their identity
        self.added: dict[str, Tensor] = {}
        self.removed = [name for name in self.old if name not in new]
        for name, tensor in new.items():
            same = name in self.old and (name in trainable) == isinstance(self.old[name], nn.Parameter)
            if same and tensor is current[name]:
                continue
            tensor = tensor.to(device=model._device, dtype=model._dtype)
            if tensor.is_set_to(current[name]) if name in current else False:
                tensor = tensor.clone()
            fresh: Tensor = nn.Parameter(tensor) if name in trainable else tensor
            (self.replaced if same else self.added)[name] = fresh
        self.network = after
        self.program = lower(after, device=model._device, backend=model.backend)
        self.optimizer: torch.optim.Optimizer | None = None
        self.states: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, int] = {}
        self.fresh: list[str] = []

    # ---- the optimizer ------------------------------------------------------------------------------------

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """The state of every changed parameter, and the parameter group of every new one."""
        owner = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        known = {name: owner.get(id(tensor)) for name, tensor in self.old.items() if isinstance(tensor, nn.Parameter)}
        if known and all(group is None for group in known.values()):
            raise GrowthFailed(
                "grow", "an optimizer that holds none of the model's parameters", "the optimizer that trains this model"
            )
        states = {name: optimizer.state[tensor] for name, tensor in self.old.items() if tensor in optimizer.state}
        changed = {**self.replaced, **self.added}
        for name, tensor in changed.items():
            if name not in self.trainable:
                continue
            group = known.get(name)
            if group is None and name in self.added:
                group = self._home(name, known)
            if group is None:
                continue  # a parameter that this optimizer does not train
            self.groups[name] = group
            options = optimizer.param_groups[group]
            self.states[name] = carried_state(self.morphism.lineage, name, tensor, states, options)
            if any(g.undefined and states.get(g.source) for g in self.morphism.lineage.gathers.get(name, ())):
                self.fresh.append(name)
        self.optimizer = optimizer

    def _home(self, name: str, known: dict[str, int | None]) -> int:
        """The parameter group of what a new tensor grows from: its old entries, else its neighbours'.

        A bias or norm joins those of the groups that it feeds or reads, or else any other one: whoever trains
        them apart from the weights (without decay, say) still does.
        """
        candidates = [g.source for g in self.morphism.lineage.gathers.get(name, ())]
        kind, owner = name.split(".")
        network = self.network
        groups = [network.bundles[owner].target, network.bundles[owner].source] if kind == "weight" else [owner]
        if kind != "weight":
            near = [*(b.target for b in network.leaving(owner)), *(b.source for b in network.entering(owner))]
            per_unit = (kind, "bias", "shift", "scale")
            candidates += [f"{k}.{g}" for k in per_unit for g in near]
            candidates += [n for k in per_unit for n in known if n.startswith(f"{k}.")]
        for group in groups:
            candidates += [b.tensor for b in network.entering(group) + network.leaving(group)]
        for candidate in candidates:
            found = known.get(candidate)
            if found is not None:
                return found
        return next((group for group in known.values() if group is not None), 0)

    # ---- swapping -----------------------------------------------------------------------------------------

    def held(self) -> list[str]:
        """Parameters that a graph still needs, or a view: swapping them would break whoever holds them.

        One reference beside ours may be the gradient accumulator of a graph that is done: no obstacle.
        """
        parameters = {n: self.old[n] for n in self.replaced if isinstance(self.old[n], nn.Parameter)}
        return [name for name, tensor in parameters.items() if tensor._use_count() > 2]  # type: ignore[attr-defined]

    def swap(self) -> None:
        for name, fresh in self.replaced.items():
            old = self.old[name]
            if isinstance(old, nn.Parameter):
                old.grad = None
                torch.utils.swap_tensors(old, fresh)
                self.swapped.append((old, fresh))

    def undo(self) -> None:
        for old, fresh in reversed(self.swapped):
            torch.utils.swap_tensors(old, fresh)
        self.swapped.clear()

    def finish(self) -> None:
        """Nothing here can fail half-way: tables are updated."""
        model = self.model
        for name in self.removed:
            model._drop(name)
        for name, fresh in self.replaced.items():
            if not isinstance(self.old[name], nn.Parameter):
                model._put(name, fresh, False)
        for name, fresh in self.added.items():
            model._put(name, fresh, name in self.trainable)
        model._adopt(self.network, self.program)
        if self.optimizer is not None:
            self._update_optimizer(self.optimizer)

    def _update_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        gone = {id(self.old[name]) for name in self.removed}
        gone |= {id(self.old[name]) for name in self.added if name in self.old}
        if gone:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in gone]
            for parameter in [p for p in optimizer.state if id(p) in gone]:
                del optimizer.state[parameter]
        held = self.model.tensors()
        for name, home in self.groups.items():
            parameter = held[name]
            if name in self.added:
                optimizer.param_groups[home]["params"].append(parameter)
            if self.states[name]:
                optimizer.state[parameter] = self.states[name]
            else:
                optimizer.state.pop(parameter, None)
