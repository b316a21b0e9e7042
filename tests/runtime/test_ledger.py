"""The ledger as text, replayed; snapshots, and the way back to them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import irgrow as ig
from irgrow.growth.replay import replay
from irgrow.ir.errors import BadFile, GrowthFailed, StaleMorphism
from irgrow.ir.network import Unit
from irgrow.runtime.ledger import Ledger

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(model: ig.CompiledNetwork, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def grown(start: ig.Network) -> ig.CompiledNetwork:
    """A split, proposed units, a layer, an insertion; with training in between."""
    model = ig.compile(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    serial = int(start.groups["hidden"].serials[0])
    steps = [
        lambda net: ig.SplitUnit(Unit("hidden", serial), 0.25),
        lambda net: next(iter(ig.AddUnits.places(net))),
        lambda net: ig.AddLayer("hidden") >> ig.InsertNeuron(3, seed=5),
    ]
    for step in steps:
        train(model, optimizer)
        network = model.network()
        model.grow(step(network)(network), optimizer)
    return model


def test_a_ledger_prints_parses_and_replays() -> None:
    start = ig.mlp([6, 4, 3], dtype=torch.float64)
    model = grown(start)
    text = str(model.ledger)
    assert [line.split("  ")[1].split("(")[0] for line in text.splitlines()] == ["SplitUnit", "AddUnits", "AddLayer"]
    assert len(model.ledger.proposals) == 1
    read = Ledger.parse(text, model.ledger.proposals)
    assert read == model.ledger
    again = replay(read, start)
    assert again.after.structure == model.structure.structure
    again.after.verify()
    assert again.before is start


def test_a_ledger_of_another_network_is_refused() -> None:
    model = grown(ig.mlp([6, 4, 3], dtype=torch.float64))
    with pytest.raises(StaleMorphism, match="replay, before growth 1 .SplitUnit"):
        replay(model.ledger, ig.mlp([6, 5, 3], dtype=torch.float64))
    with pytest.raises(BadFile, match="ledger, line 2: found 'nonsense'"):
        Ledger.parse(str(model.ledger.first(1)) + "\nnonsense")


def test_restore_goes_back_and_training_goes_on_as_if_nothing_had_happened() -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer)
    point = model.snapshot(optimizer)
    untouched = copy.deepcopy(model)
    reference = torch.optim.AdamW(untouched.parameters(), lr=0.02)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(3):
        network = model.network()
        model.grow((ig.AddLayer("hidden") if seed == 1 else ig.InsertNeuron(3, seed=seed))(network), optimizer)
        train(model, optimizer)
    assert len(model.ledger) == 3
    objects = {n: id(p) for n, p in model.named_parameters() if n in dict(untouched.named_parameters())}
    model.restore(point, optimizer)
    assert model.network() == point.network and model.ledger == Ledger()
    assert {n: id(p) for n, p in model.named_parameters() if n in objects} == objects
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    assert train(model, optimizer, 5) == train(untouched, reference, 5)
    scheduler.step()
    model.restore(point)  # without the optimizer: values only
    assert model.network() == point.network


def test_a_snapshot_of_another_optimizer_is_refused() -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    point = model.snapshot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GrowthFailed, match="1 parameter groups, expected 0"):
        model.restore(point, optimizer)


@pytest.mark.slow
def test_two_hundred_cycles_of_growing_and_undoing_keep_the_memory() -> None:
    """S18: memory grows by less than 2 %."""
    import resource

    model = ig.compile(ig.mlp([64, 32, 10], dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.randn(32, 64, dtype=torch.float64)

    def cycle(seed: int) -> None:
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
        point = model.snapshot(optimizer)
        model.grow(ig.InsertNeuron(8, seed=seed)(model.network()), optimizer)
        model(x).pow(2).mean().backward()
        optimizer.step()
        model.restore(point, optimizer)

    for seed in range(50):
        cycle(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(200):
        cycle(seed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= 1.02 * before
