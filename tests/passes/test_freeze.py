"""What training leaves alone: whole bundles, and single entries of any tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import obey, zoo

import irgrow as ig
from irgrow.ir.errors import BadShape, Refused, StaleMorphism, UnknownName
from irgrow.ir.lineage import Axes
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network
from irgrow.passes import AddUnits, Freeze, FreezeEntries, Pass, SplitUnit, Unfreeze, UnfreezeEntries
from irgrow.testing import assert_promise, inputs_for, places, seeded_networks

F64 = torch.float64


# ---- whole bundles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo())
def test_at_every_place(name: str) -> None:
    network = zoo()[name]
    for kind in (Freeze, Unfreeze):
        for place in kind.places(network):
            obey(place, network, chain=False)  # what is not trained has no gradient to sum


def test_there_and_back() -> None:
    network = zoo()["dense"]
    frozen = Freeze("input_hidden1")(network)
    assert "weight.input_hidden1" not in frozen.after.trainable()
    assert frozen.after.counts.parameters == network.counts.parameters - 20
    assert frozen.after.structure != network.structure
    assert Unfreeze("input_hidden1")(frozen.after).after == network
    grown = ig.SplitUnit(network.unit("hidden1", 0))(frozen.after).after
    assert not grown.bundle("input_hidden1").trainable


def test_refusals() -> None:
    network = zoo()["cnn"]
    with pytest.raises(Refused, match="Freeze: bundle 'conv1_pool1': found fixed weights, expected trained ones"):
        Freeze("conv1_pool1")(network)
    with pytest.raises(Refused, match="Unfreeze: bundle 'input_conv1': found trained weights, expected fixed ones"):
        Unfreeze("input_conv1")(network)
    with pytest.raises(UnknownName, match="bundle 'none': expected one of input_conv1"):
        Freeze("none")(network)


# ---- single entries ---------------------------------------------------------------------------------------------


def frozen(network: Network, seed: int = 0, share: float = 0.4) -> Network:
    """The network with a share of the entries of every trained tensor frozen."""
    draw = torch.Generator().manual_seed(seed)
    for name in network.trainable():
        mask = torch.rand(network.tensors()[name].shape, generator=draw) < share
        if bool(mask.any()):
            network = FreezeEntries.where(network, name, mask)(network).after
    return network


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=3),
}


def train(model: ig.CompiledNetwork, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    inputs = inputs_for(model.structure, 8, seed=1)

    def loss() -> float:
        optimizer.zero_grad()
        value = (model(*inputs) - 1).square().mean()
        value.backward()
        return float(value.detach())

    for _ in range(steps):
        optimizer.step(loss)


def still(model: ig.CompiledNetwork) -> dict[str, torch.Tensor]:
    return {n: model.tensors()[n].detach()[mask].clone() for n, mask in model.structure.frozen.items()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["tanh", "cnn", "irregular"])
def test_frozen_entries_keep_their_bits_under_any_optimizer(name: str, kind: str) -> None:
    """Frozen in the middle of training, so that momentum from before would move them too."""
    model = ig.compile(zoo()[name])
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer)
    held = {n: id(p) for n, p in model.named_parameters()}
    before = model.network()
    for tensor in before.trainable():
        mask = torch.arange(before.tensors()[tensor].numel()) % 3 == 0
        model.grow(FreezeEntries.where(before, tensor, mask.reshape(before.tensors()[tensor].shape))(model.network()))
    assert {n: id(p) for n, p in model.named_parameters()} == held
    kept = still(model)
    train(model, optimizer)
    moved = 0
    for tensor, values in kept.items():
        mask, now = model.structure.frozen[tensor], model.tensors()[tensor].detach()
        assert torch.equal(now[mask], values), tensor
        gradient = model.tensors()[tensor].grad
        assert gradient is not None and not bool(gradient[mask].any())
        moved += int((now != before.tensors()[tensor])[~mask].sum())
    assert moved > 0.6 * sum(int((~mask).sum()) for mask in model.structure.frozen.values())


def test_control_a_masked_gradient_alone_does_not_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ig.compile(frozen(zoo()["tanh"]))
    monkeypatch.setattr("irgrow.runtime.frozen._models", set())
    kept = still(model)
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    assert not any(torch.equal(now, kept[name]) for name, now in still(model).items())


def test_they_stay_through_growth_and_undo() -> None:
    model = ig.compile(frozen(zoo()["dense"]))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer)
    kept, point = still(model), model.snapshot(optimizer)
    added = next(p for p in AddUnits.places(model.structure) if p.proposal.site == "hidden1")
    model.grow(added(model.network()), optimizer)
    train(model, optimizer)
    for name, values in still(model).items():
        assert torch.equal(values, kept[name]), name  # new entries are not frozen
    model.grow(SplitUnit(model.structure.unit("hidden2", 1), 0.25)(model.network()), optimizer)
    grown = still(model)
    assert sum(map(torch.numel, grown.values())) > sum(map(torch.numel, kept.values()))  # those of the twin
    train(model, optimizer)
    assert all(torch.equal(values, grown[name]) for name, values in still(model).items())
    model.restore(point, optimizer)
    train(model, optimizer)
    assert all(torch.equal(values, kept[name]) for name, values in still(model).items())
    twin = copy.deepcopy(model)
    train(twin, OPTIMIZERS["adamw"](twin.parameters()))
    assert all(torch.equal(values, kept[name]) for name, values in still(twin).items())


def assert_follows(morphism: Morphism) -> None:
    """An entry is frozen if and only if one that it comes from is; one that comes unscaled has the same bits."""
    before, after = morphism.before, morphism.after
    for name, tensor in after.tensors().items():
        wanted = torch.zeros(tensor.shape, dtype=torch.bool)
        gathers = morphism.lineage.gathers[name]
        for g in gathers:
            if g.source in before.frozen:
                wanted |= g.pick(before.frozen[g.source].double()) > 0
        assert torch.equal(after.frozen.get(name, torch.zeros_like(wanted)), wanted), f"{morphism.by}: {name}"
        if len(gathers) == 1 and isinstance(g := gathers[0], Axes) and all(v is None for v in g.value):
            old = g.pick(before.tensors()[g.source])
            moved = (tensor != old) & wanted
            assert not bool(moved.any()), f"{morphism.by}: {name}"


KINDS = [kind for kind in ig.passes.list().values() if kind not in (FreezeEntries, UnfreezeEntries)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(network=seeded_networks(steps=3, widest=4, frozen=True, dtypes=(F64,)), data=st.data())
def test_masks_follow_the_lineage_of_every_pass(kind: type[Pass], network: Network, data: st.DataObject) -> None:
    found = places(network, [kind], most=8)
    if found:
        pass_ = data.draw(st.sampled_from(found))
        assert_follows(assert_promise(pass_, network))


def test_a_frozen_tap_is_frozen_at_every_edge_when_embedded() -> None:
    network = zoo()["cnn"]
    after = (FreezeEntries("weight.input_conv1", (4,)) >> ig.EmbedConv())(network).after
    pattern = network.bundle("input_conv1").pattern
    edges = [w for _, _, w in pattern.edges(*network.shapes(network.bundle("input_conv1")))]
    assert int(after.frozen["weight.input_conv1"].sum()) == sum(int((w == 4).sum()) for w in edges) > 1


def test_they_are_in_files_graphs_ledgers_and_hashes(tmp_path: Path) -> None:
    from irgrow.growth.replay import replay

    network = zoo()["irregular"]
    model = ig.compile(network)
    for tensor in network.trainable():
        model.grow(FreezeEntries(tensor, (0,))(model.network()))
    model.grow(ig.InsertNeuron(2, seed=9, activation="tanh")(model.network()))
    after = model.network()
    assert after.frozen and after.structure != replace(after, frozen={}).structure
    assert after.counts.parameters == replace(after, frozen={}).counts.parameters - len(after.frozen)
    ig.save(tmp_path / "net.irgrow", model)
    assert ig.load(tmp_path / "net.irgrow") == after
    assert ig.from_networkx(ig.to_networkx(after)) == after
    assert replay(model.ledger, network).after == after
    assert "(1 of" in str(after) and copy.deepcopy(after) == after
    with pytest.raises(StaleMorphism):
        ig.compile(network).grow(SplitUnit(network.unit("inserted", 0))(FreezeEntries(tensor, (0,))(network).after))


def test_a_change_of_existing_weights_leaves_them_alone() -> None:
    network = frozen(zoo()["dense"])
    place = next(iter(AddUnits.places(network)))
    name = "weight.hidden1_hidden2"
    delta = {name: torch.ones_like(network.tensors()[name])}
    after = AddUnits(replace(place.proposal, delta=delta))(network).after
    moved = after.tensors()[name][:, : delta[name].shape[1]] - network.tensors()[name]
    assert torch.equal(moved == 0, network.frozen[name])


def test_freezing_and_thawing_entries() -> None:
    network = zoo()["dense"]
    some = FreezeEntries("bias.hidden1", (0, 3))(network).after
    assert some.frozen["bias.hidden1"].tolist() == [True, False, False, True, False]
    assert UnfreezeEntries("bias.hidden1", (3,))(some).after.frozen["bias.hidden1"].tolist() == [True] + [False] * 4
    assert UnfreezeEntries("bias.hidden1", (3, 0))(some).after == network


def test_refusals_of_entries() -> None:
    network = FreezeEntries("bias.conv1", (1,))(zoo()["cnn"]).after
    for pass_, text in (
        (FreezeEntries("bias.conv1", ()), "FreezeEntries: tensor 'bias.conv1': found no entries"),
        (FreezeEntries("bias.conv1", (4,)), "entry 4, expected 0 to 3, of the flattened tensor"),
        (FreezeEntries("bias.conv1", (-1,)), "entry -1, expected 0 to 3"),
        (FreezeEntries("bias.conv1", (0, 0)), "an entry twice"),
        (FreezeEntries("bias.conv1", (0, 1)), "found entry 1, which is frozen, expected trained entries"),
        (UnfreezeEntries("bias.conv1", (0,)), "UnfreezeEntries: .* entry 0, which is trained, expected frozen entries"),
        (FreezeEntries("mean.conv1", (0,)), "tensor 'mean.conv1': found a tensor that is not trained"),
        (FreezeEntries("weight.conv1_pool1", (0,)), "a tensor that is not trained"),
    ):
        with pytest.raises(Refused, match=text):
            pass_(network)
    with pytest.raises(UnknownName, match="tensor 'weight.none': expected one of weight.input_conv1"):
        FreezeEntries("weight.none", (0,))(network)
    with pytest.raises(BadShape, match=r"FreezeEntries: mask of 'bias.conv1': found \(2,\), expected \(4,\)"):
        FreezeEntries.where(network, "bias.conv1", torch.ones(2, dtype=torch.bool))
