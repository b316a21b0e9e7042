"""Applying a growth to a training model and lowering again, in training steps of the same model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import irgrow as ig
from bench import nets
from bench.suite import OURS, Case, Made, op
from irgrow.kernels.compiled import compiled_variants, recompiled

STEPS = 5.0  # a growth costs at most this many training steps
GROWTHS, WARM_UP = 20, 2
Trained = tuple[ig.CompiledNetwork, torch.optim.Optimizer]


@op(
    "growth_cost",
    cases=[
        {"model": "digits MLP", "batch": 64, "neurons": 0},
        {"model": "grown network", "batch": 32, "neurons": 1000},
    ],
    tiny={"neurons": 120},
)
def growth_cost(*, model: str, batch: int, neurons: int, device: str) -> Made:
    """The pass, the model and its optimizer carried over, lowering: in training steps. No statistics, no verify.

    digits MLP: 64-16-10, AddUnits of 4, AdamW; grown network: 1,000 neurons, InsertNeuron with 16 parents, Adam.
    Both optimizers hold their moments. The gate: the grown model computes what the interpreter says. Before the
    clock runs the network grows 20 times; the note says how many kernels that compiled again.
    """
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (batch,), generator=draw)
    x = torch.rand(batch, 64, generator=draw)
    if model == "digits MLP":
        start = ig.compile(ig.mlp([64, 16, 10], activation="relu", seed=0))
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(start.parameters(), lr=1e-3)
        statistics = ig.probe(start, (x, labels), F.cross_entropy, want=("M_prev", "S"))
        [site] = statistics
        change: Any = ig.AddUnits(ig.Tiny(units=4, projection=False).propose(statistics[site]))
        label = f"digits MLP 64-16-10, +4 units, AdamW, B={batch}"
    else:
        start = ig.compile(nets.grown(neurons))
        optimizer = torch.optim.Adam(start.parameters(), lr=1e-3)
        change = ig.InsertNeuron(parents=16, seed=0)
        label = f"grown {neurons:,} neurons, +1, Adam, B={batch}"
    step = training_step(start, optimizer, x, labels)
    step()

    def prepare() -> Trained:
        _ = start.structure.structure  # a model that has grown before knows its hash
        both: Trained = copy.deepcopy((start, optimizer))
        return both

    def grow(trained: Trained) -> ig.CompiledNetwork:
        mine, its_optimizer = trained
        mine.grow(change(mine.structure), its_optimizer)
        return mine

    def view(name: str, result: Any) -> Any:
        with torch.no_grad():
            return result(x) if name == OURS else result

    again = _recompiled_by_growths(start, x, labels)
    expected = ig.interpret(change(start.network()).after.to(torch.float64), x.double())
    yield Case(
        label,
        ours=grow,
        prepare={OURS: prepare},
        opponents={"a training step": step},
        tolerance=1e-4,
        reference=lambda: expected,
        view=view,
        same=False,
        goal=1 / STEPS,
        note=f"goal: at most {STEPS:g} steps; {GROWTHS} growths recompiled {again} kernels",
    )


def _recompiled_by_growths(start: ig.CompiledNetwork, x: torch.Tensor, labels: torch.Tensor) -> int:
    """How many kernels 20 growths, each followed by a training step, compile again after two to warm up."""
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before: dict[str, int] = {}
    for seed in range(GROWTHS + WARM_UP):
        if seed == WARM_UP:
            before = compiled_variants()
        model.grow(ig.InsertNeuron(parents=16, seed=seed)(model.structure), optimizer)
        training_step(model, optimizer, x, labels)()
    return len(recompiled(before))


def training_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, labels: torch.Tensor
) -> Callable[[], None]:
    """Forward, backward and an update, on one batch."""

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step
