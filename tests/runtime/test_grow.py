"""`model.grow`: same module, same optimizer, state carried; or nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import irgrow as ig
from irgrow.ir.errors import GrowthFailed, StaleMorphism
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network, Unit

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(32, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(X), Y).backward()
        optimizer.step()


def wider(network: Network, units: int = 2) -> Morphism:
    """Units with zero fan-out: the function stays."""
    proposal = next(iter(ig.AddUnits.places(network))).proposal
    quiet = {n: torch.zeros_like(w) for n, w in proposal.fan_out.items()}
    return ig.AddUnits(replace(proposal, fan_out=quiet))(network)


def irregular() -> Network:
    network = ig.mlp([6, 4, 3], dtype=torch.float64)
    for seed in range(4):
        network = ig.InsertNeuron(3, seed=seed)(network).after
    return network


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_parameter_stays_tracked_and_moves(kind: str) -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    objects = {n: id(p) for n, p in model.named_parameters()}
    before = {n: {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    y = model(X).detach()
    model.grow(wider(model.network()), optimizer)
    assert float((model(X) - y).abs().max()) <= 1e-12
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    tracked = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert tracked == set(objects.values())
    for name, p in model.named_parameters():
        for key, old in before[name].items():
            new = optimizer.state[p][key]
            if isinstance(old, Tensor) and old.dim():
                assert new.shape == p.shape
                assert torch.equal(new[tuple(slice(0, n) for n in old.shape)], old)
            else:
                assert new == old
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, 2)
    for name, p in model.named_parameters():
        assert bool((p != values[name]).any()), f"{name} does not move"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_twenty_steps_after_a_split_equal_those_of_a_network_built_split(kind: str) -> None:
    """The reference is built in the split form with its state written by hand (ALGORITHMS, section 7)."""
    share = 0.3
    model = ig.compile(ig.mlp([6, 4, 3], activation="tanh", dtype=torch.float64))
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 5)
    old = {n: t.detach().clone() for n, t in model.tensors().items()}
    state = {n: copy.deepcopy(dict(optimizer.state[p])) for n, p in model.tensors().items() if p in optimizer.state}
    serial = int(model.structure.groups["hidden"].serials[1])
    model.grow(ig.SplitUnit(Unit("hidden", serial), share)(model.network()), optimizer)

    def rows(t: Tensor, factor: float = 1.0) -> Tensor:  # unit 1 becomes units 1 and 2
        first, second = t[1:2], t[1:2]
        if factor != 1.0:
            first, second = first * factor, second * (1 - factor)
        return torch.cat([t[:1], first, second, t[2:]])

    def by_hand(name: str, t: Tensor, power: int) -> Tensor:
        """power 0: the values; 1 and 2: first and second moments."""
        if name == "bias.output":
            return t
        if name == "weight.hidden_output":
            return rows(t.t(), share if power == 0 else 1.0).t().contiguous()
        if power == 0:
            return rows(t)
        first, second = t[1:2] * share**power, t[1:2] * (1 - share) ** power
        return torch.cat([t[:1], first, second, t[2:]])

    reference = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    names = {"0.weight": "weight.input_hidden", "0.bias": "bias.hidden"}
    names |= {"2.weight": "weight.hidden_output", "2.bias": "bias.output"}
    again = OPTIMIZERS[kind](reference.parameters())
    second = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
    for theirs, ours in names.items():
        p = reference.get_parameter(theirs)
        p.data = by_hand(ours, old[ours], 0)
        again.state[p] = {
            key: by_hand(ours, v, 2 if key in second else 1) if isinstance(v, Tensor) and v.dim() else v
            for key, v in state.get(ours, {}).items()
        }
        if not again.state[p]:
            del again.state[p]
    train(model, optimizer, 20)
    train(reference, again, 20)
    for theirs, ours in names.items():
        wanted = reference.get_parameter(theirs).detach()
        assert float((model.tensors()[ours] - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


def test_schedulers_and_parameter_groups_go_on() -> None:
    model = ig.compile(irregular())
    weights = [p for n, p in model.named_parameters() if n.startswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.startswith("bias")]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.05}], lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for seed in range(10, 20):
        train(model, optimizer, 1)
        scheduler.step()
        model.grow(ig.InsertNeuron(3, seed=seed)(model.network()), optimizer)
        groups, named = optimizer.param_groups, dict(model.named_parameters())
        assert len(groups) == 2
        for group, kind in zip(groups, ("weight", "bias"), strict=True):
            assert {id(p) for p in group["params"]} == {id(p) for n, p in named.items() if n.startswith(kind)}
        assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.5**5)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05 * 0.5**5)


def test_new_bundles_join_the_group_they_grow_from() -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    tensors = model.tensors()
    first = [tensors["weight.input_hidden"], tensors["bias.hidden"]]
    second = [tensors["weight.hidden_output"], tensors["bias.output"]]
    optimizer = torch.optim.SGD([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.2}], momentum=0.9)
    train(model, optimizer)
    model.grow(ig.AddLayer("hidden")(model.network()), optimizer)
    new = model.tensors()["weight.hidden_hidden_deeper"]
    assert sum(new is p for group in optimizer.param_groups for p in group["params"]) == 1
    assert len(optimizer.param_groups) == 2
    train(model, optimizer)


def test_a_fresh_entry_does_not_leap() -> None:
    """Adam's first update of a fresh entry is at most the learning rate, though the step counter is old."""
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 200)
    network = model.network()
    proposal = next(iter(ig.AddUnits.places(network))).proposal
    model.grow(ig.AddUnits(proposal)(network), optimizer)
    old = {n: t.detach().clone() for n, t in model.tensors().items()}
    train(model, optimizer, 1)
    moved = (model.tensors()["weight.input_hidden"] - old["weight.input_hidden"])[4:].abs()
    assert 0 < float(moved.max()) <= 0.01 * 3.17 / 3  # 3.17 lr with zero moments and an old counter


def test_growing_without_an_optimizer_and_with_extra_models() -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(0.5)
    kept = average(X).detach()
    model.grow(wider(model.network()), extra=[average])
    assert average.structure.structure == model.structure.structure
    assert float((average(X) - kept).abs().max()) <= 1e-12


def test_the_lineage_is_applied_to_the_current_weights() -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    morphism = wider(model.network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, optimizer, 5)
    y = model(X).detach()
    model.grow(morphism, optimizer)
    assert float((model(X) - y).abs().max()) <= 1e-12


Snapshot = tuple[Network, dict, list[int]]


def snapshot(model: ig.CompiledNetwork, optimizer: torch.optim.Optimizer) -> Snapshot:
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return model.network(), copy.deepcopy(optimizer.state_dict()), ids


def unchanged(
    model: ig.CompiledNetwork, optimizer: torch.optim.Optimizer, was: tuple[Network, dict, list[int]]
) -> bool:
    now = snapshot(model, optimizer)
    return now[0] == was[0] and str(now[1]) == str(was[1]) and now[2] == was[2]


def test_a_held_tensor_refuses_the_growth_and_nothing_changes() -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    was, morphism = snapshot(model, optimizer), wider(model.network())
    loss = F.mse_loss(model(X), Y)  # its graph holds the parameters
    with pytest.raises(GrowthFailed, match="still holds: weight.hidden_output.*delete losses"):
        model.grow(morphism, optimizer)
    assert unchanged(model, optimizer, was)
    loss.backward()
    del loss
    model.grow(morphism, optimizer)
    train(model, optimizer)


def test_a_morphism_of_another_structure_is_refused() -> None:
    model = ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer)
    was, morphism = snapshot(model, optimizer), wider(model.network())
    model.grow(morphism, optimizer)
    grown = snapshot(model, optimizer)
    with pytest.raises(StaleMorphism, match="morphism of another structure"):
        model.grow(morphism, optimizer)
    assert unchanged(model, optimizer, grown) and not unchanged(model, optimizer, was)


def test_an_optimizer_of_another_model_is_refused() -> None:
    model, other = (ig.compile(ig.mlp([6, 4, 3], dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    kept = model.network()
    with pytest.raises(GrowthFailed, match="none of the model's parameters"):
        model.grow(wider(kept), optimizer)
    assert model.network() == kept


def test_two_hundred_growths_and_shrinks_do_not_leak() -> None:
    """Growth after growth on one model keeps one program and one set of tensors."""
    import gc

    model = ig.compile(irregular())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 1)
    start = copy.deepcopy(model)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # type(): some are weak proxies

    counts = []
    for cycle in range(6):
        for seed in range(5):
            model.grow(ig.InsertNeuron(3, seed=seed)(model.network()), optimizer)
            train(model, optimizer, 1)
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if cycle:
            counts.append(tensors())
    assert max(counts) <= min(counts) * 1.02 + 5


def test_grow_says_whose_state_starts_fresh() -> None:
    model = ig.compile(ig.cnn((1, 6, 6), [2], 3, pool=None, dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    model(x).pow(2).sum().backward()
    optimizer.step()
    carried = model.grow(wider(model.network()), optimizer)
    assert carried.fresh_state == () and set(carried.changed) >= {"weight.input_conv1", "weight.conv1_output"}
    carried = model.grow(ig.EmbedConv()(model.network()), optimizer)
    assert carried.fresh_state == ("weight.input_conv1", "bias.conv1")
    assert str(carried).endswith("fresh state: weight.input_conv1, bias.conv1")
