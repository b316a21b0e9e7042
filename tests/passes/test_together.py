"""Several sites in one step, from one measurement; many growths in a row at one place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import difference, zoo

import irgrow as ig
from irgrow.ir.errors import StaleMorphism
from irgrow.ir.morphism import Morphism, SameFunction
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.passes import AddUnits
from irgrow.testing import assert_promise, inputs_for

F64 = torch.float64


def proposals(network: Network) -> list[Proposal]:
    """One for every site, all for the same network."""
    return [p.proposal for p in AddUnits.places(network) if all(bool(w.any()) for w in p.proposal.fan_out.values())]


def together(network: Network, given: list[Proposal]) -> Morphism:
    total = AddUnits(given[0])(network)
    for proposal in given[1:]:
        moved = proposal.after(total) if proposal.structure != total.after.structure else proposal
        total = total >> assert_promise(AddUnits(moved), total.after)
    return total


@pytest.mark.parametrize("name", ["dense", "cnn", "residual", "separable", "concatenated", "mean"])
def test_adjacent_sites_grow_in_one_step(name: str) -> None:
    network = zoo()[name]
    given = proposals(network)
    assert len(given) > 1
    total = together(network, given).verify()
    for p in given:
        group = network.groups[p.site]
        assert total.after.groups[p.site].units > group.units
    quiet = together(network, [p.scaled(1.0, 0.0) for p in given])
    assert isinstance(quiet.promise, SameFunction) and difference(network, quiet.after) <= 1e-12
    backwards = together(network, given[::-1])
    assert difference(total.after, backwards.after) <= 1e-12  # in any order: new units do not feed new ones


def test_the_slices_follow_the_units() -> None:
    network = zoo()["dense"]
    first, second = proposals(network)
    assert (first.site, second.site) == ("hidden1", "hidden2")
    step = AddUnits(first)(network)
    moved = second.after(step)
    assert torch.equal(moved.fan_in["hidden1_hidden2"][:, :5], second.fan_in["hidden1_hidden2"])
    assert not moved.fan_in["hidden1_hidden2"][:, 5:].any()
    assert torch.equal(moved.fan_out["hidden2_output"], second.fan_out["hidden2_output"])
    split = ig.SplitUnit(network.unit("hidden1", 0), 0.3)(network)
    twin = second.after(split).fan_in["hidden1_hidden2"]
    assert torch.equal(twin[:, [0, 2, 3, 4, 5]], second.fan_in["hidden1_hidden2"]) and not twin[:, 1].any()
    pruned = second.after(ig.PruneUnits((network.unit("hidden1", 1),))(network)).fan_in["hidden1_hidden2"]
    assert torch.equal(pruned, second.fan_in["hidden1_hidden2"][:, [0, 2, 3, 4]])
    delta = {"weight.hidden1_hidden2": torch.ones(6, 5, dtype=F64)}
    changed = replace(second, delta=delta).after(step).delta["weight.hidden1_hidden2"]
    assert torch.equal(changed[:, :5], delta["weight.hidden1_hidden2"]) and not changed[:, 5:].any()


def test_a_model_grows_at_all_of_its_sites_at_once() -> None:
    network = zoo()["cnn"]
    model = ig.compile(network)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = inputs_for(network, 8)
    before = model.eval()(*x).detach()
    held = dict(model.named_parameters())
    model(*x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for name, p in held.items():
            p.copy_(network.tensors()[name])
    model.grow(together(network, [p.scaled(1.0, 0.0) for p in proposals(network)]), optimizer)
    assert float((model(*x) - before).detach().abs().max()) <= 1e-12 * float(before.abs().max())
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_morphisms_that_a_proposal_cannot_follow() -> None:
    network = zoo()["cnn"]
    given = proposals(network)
    step = AddUnits(given[0])(network)
    with pytest.raises(StaleMorphism, match="Proposal for site 'conv1' after .*: found a morphism of another network"):
        given[0].after(AddUnits(given[0].after(step))(step.after))
    with pytest.raises(StaleMorphism, match="bundle 'input_conv1': found another one, expected the same; probe again"):
        given[0].after(ig.EmbedConv()(network))


@pytest.mark.parametrize("name", ["dense", "cnn", "separable", "irregular"])
def test_twenty_growths_in_a_row_at_one_place(name: str) -> None:
    """Composed, the lineage carries other weights, and moments, as the steps do one by one."""
    first = network = zoo()[name]
    site = proposals(network)[0].site
    total: Morphism | None = None
    other = {n: t + 0.1 * torch.ones_like(t) for n, t in first.tensors().items()}
    carried = dict(other)
    for _ in range(20):
        proposal = next(p for p in proposals(network) if p.site == site)
        step = AddUnits(proposal.scaled(1.0, 0.0))(network)
        carried = step.tensors(carried)
        total = step if total is None else total >> step
        network = step.after
    assert total is not None and len(total.made_by) == 20
    total.verify()
    assert difference(first, network) <= 1e-12
    assert network.groups[site].units >= first.groups[site].units + 40
    for n, t in total.tensors(other).items():
        assert float((t - carried[n]).abs().max()) <= 1e-12 * max(1.0, float(carried[n].abs().max())), n
