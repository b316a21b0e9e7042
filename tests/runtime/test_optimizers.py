"""S11: every optimizer, with any parameter groups and scheduler, goes on after every kind of growth."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import irgrow as ig
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network
from irgrow.testing import inputs_for

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "none": lambda o: None,
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=40, cycle_momentum=False),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
}
GROUPS: dict[str, Callable[[str], int]] = {
    "one": lambda name: 0,
    "kinds": lambda name: int(not name.startswith("weight")),
    "layers": lambda name: int("output" in name),
}


def start() -> Network:
    return ig.mlp([4, 5, 3], activation="tanh", norm="batch", dtype=torch.float64)


def growths(network: Network, n: int) -> Morphism:
    """The n-th growth: wider, split, deeper, a skip, fewer edges, a frozen entry, a merged or pruned unit."""
    hidden = "hidden"
    place = next(p for p in ig.AddUnits.places(network) if p.proposal.site == hidden)
    kinds: list[Callable[[], ig.Pass]] = [
        lambda: place,
        lambda: ig.SplitUnit(network.unit(hidden, 1), 0.3),
        lambda: ig.AddLayer(hidden, "identity"),
        lambda: ig.AddSkip("input", "output"),
        lambda: ig.RemoveEdges(((network.ids("input")[0].item(), network.ids("output")[0].item()),)),
        lambda: (ig.UnfreezeEntries if n // 7 % 2 else ig.FreezeEntries)("bias.output", (0,)),
        lambda: ig.PruneUnits((network.unit(hidden, 0),)),
    ]
    return kinds[n % len(kinds)]()(network)


def step(model: ig.CompiledNetwork, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    optimizer.zero_grad()
    loss = (model(*inputs_for(model.structure, 8, seed=2)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    elif scheduler is not None:
        scheduler.step()


def moments(model: ig.CompiledNetwork, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {n: copy.deepcopy(dict(optimizer.state[p])) for n, p in model.named_parameters() if p in optimizer.state}


def assert_carried(morphism: Morphism, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> int:
    """Where an entry comes from an old one with gradient factor 1, its moments have the old bits."""
    equal = 0
    for name, state in after.items():
        for g in morphism.lineage.gathers[name]:
            factor = g.factor()
            same = g.covers() if factor is None else factor == 1
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() and g.source in before:
                    assert torch.equal(value[same], g.pick(before[g.source][key])[same]), f"{morphism.by}: {name}.{key}"
                    equal += int(same.sum())
    return equal


def check(kind: str, groups: str, scheduler: str, steps: int = 8) -> None:
    """Against the same optimizer and scheduler on a network that does not grow."""
    runs = []
    for _ in range(2):
        model = ig.compile(start())
        found: dict[int, list[Tensor]] = {}
        for name, p in model.named_parameters():
            found.setdefault(GROUPS[groups](name), []).append(p)
        options = [{"params": ps, "lr": 0.01 / (n + 1)} for n, ps in sorted(found.items())]
        optimizer = OPTIMIZERS[kind](options)
        runs.append((model, optimizer, SCHEDULERS[scheduler](optimizer)))
    (model, optimizer, schedule), plain = runs
    equal = 0
    for n in range(steps):
        step(model, optimizer, schedule)
        step(*plain)
        morphism = growths(model.network(), n)
        before = moments(model, optimizer)
        model.grow(morphism, optimizer)
        equal += assert_carried(morphism, before, moments(model, optimizer))
        named = dict(model.named_parameters())
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(map(id, named.values())), f"{morphism.by}: not every tensor is tracked once"
        assert {id(p) for p in optimizer.state} <= set(held)
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in plain[1].param_groups], morphism.by
        if groups == "kinds":  # a new tensor joins the group of its kind
            assert all(
                GROUPS[groups](name) == int(id(p) not in held[: len(optimizer.param_groups[0]["params"])])
                for name, p in named.items()
            )
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer, schedule)
    still = [name for name, p in model.named_parameters() if torch.equal(p, values[name])]
    still = [name for name in still if name != "bias.hidden"]  # in front of a batch norm: no gradient
    assert not still, f"{still} do not move"
    assert equal > 0 or kind == "sgd"


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("groups", GROUPS)
def test_every_optimizer_goes_on(kind: str, groups: str) -> None:
    n = list(OPTIMIZERS).index(kind) + 2 * list(GROUPS).index(groups)
    check(kind, groups, list(SCHEDULERS)[n % len(SCHEDULERS)])


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_with_every_scheduler(kind: str, groups: str, scheduler: str) -> None:
    check(kind, groups, scheduler, steps=21)
