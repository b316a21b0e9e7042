"""Taking units away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import difference, obey, some, zoo

import irgrow as ig
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.interpreter import interpret
from irgrow.ir.morphism import Changes, SameFunction
from irgrow.ir.network import Network
from irgrow.passes import AddUnits
from irgrow.passes.prune import PruneUnits
from irgrow.testing import assert_promise, inputs_for, networks, rewrites

F64 = torch.float64


def units(network: Network, group: str, *at: int) -> tuple:
    return tuple(network.unit(group, i) for i in at)


def silenced(network: Network, bundle: str, *columns: int) -> Network:
    weight = network.bundle(bundle).weight.clone()
    weight[:, list(columns)] = 0.0
    return network.with_tensors({f"weight.{bundle}": weight})


@pytest.mark.parametrize("name", zoo())
def test_at_every_place(name: str) -> None:
    network = zoo()[name]
    for place in some(PruneUnits.places(network)):
        obey(place, network, chain=False)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    assert_promise(data.draw(rewrites(network, [PruneUnits])), network)


@pytest.mark.parametrize("name", zoo())
def test_pruning_undoes_adding(name: str) -> None:
    """Added with zero fan-out, then pruned: the same network, up to the serials that were used."""
    network = zoo()[name]
    for place in AddUnits.places(network):
        quiet = replace(place.proposal, fan_out={n: torch.zeros_like(w) for n, w in place.proposal.fan_out.items()})
        grown = AddUnits(quiet)(network).after
        site = quiet.site
        new = np.setdiff1d(grown.group(site).serials, network.group(site).serials)
        back = obey(PruneUnits(tuple(ig.Unit(site, int(s)) for s in new)), grown, chain=False)
        assert isinstance(back.promise, SameFunction), (name, site)
        assert replace_serial(back.after, network.next_serial) == network


def replace_serial(network: Network, serial: int) -> Network:
    return Network(network.groups, network.bundles, network.inputs, network.outputs, serial)


def test_rows_columns_and_biases_go() -> None:
    network = zoo()["dense"]
    after = obey(PruneUnits(units(network, "hidden1", 1, 4)), network).after
    keep = [0, 2, 3]
    assert torch.equal(after.bundle("input_hidden1").weight, network.bundle("input_hidden1").weight[keep])
    assert torch.equal(after.bundle("hidden1_hidden2").weight, network.bundle("hidden1_hidden2").weight[:, keep])
    assert torch.equal(after.group("hidden1").bias, network.group("hidden1").bias[keep])
    assert after.group("hidden1").serials.tolist() == network.group("hidden1").serials[keep].tolist()


def test_the_promise_reads_what_leaves() -> None:
    network = silenced(zoo()["dense"], "hidden1_hidden2", 1, 4)
    assert isinstance(PruneUnits(units(network, "hidden1", 1, 4)).promise(network), SameFunction)
    obey(PruneUnits(units(network, "hidden1", 1, 4)), network, chain=False)
    loud = PruneUnits(units(network, "hidden1", 1, 2))
    assert loud.promise(network) == Changes("pruned units have outgoing weights, or feed a max")
    assert difference(network, loud(network).after) > 1e-3
    first = next(iter(PruneUnits.places(network)))
    assert first.units == units(network, "hidden1", 1, 4)  # places begins with the units that nothing leaves


def test_tied_units_go_along() -> None:
    network = zoo()["cnn"]
    network = silenced(network, "pool1_conv2", 2)
    morphism = obey(PruneUnits(units(network, "conv1", 2)), network, chain=False)
    assert isinstance(morphism.promise, SameFunction)
    assert morphism.after.group("pool1").units == 3
    residual = zoo()["residual"]
    pruned = obey(PruneUnits(units(residual, "sum", 0)), residual).after
    assert pruned.group("stem").units == pruned.group("sum").units == 3


def test_a_norm_over_the_pruned_units_changes_the_rest() -> None:
    network = silenced(ig.mlp([3, 4, 2], norm="layer", dtype=F64, seed=3), "hidden_output", 0)
    candidate = PruneUnits(units(network, "hidden", 0))
    assert candidate.promise(network) == Changes("the layer norm of group 'hidden' was taken over the pruned units too")
    obey(candidate, network)


# ---- means ----------------------------------------------------------------------------------------------------


def test_a_constant_unit_moves_into_the_biases() -> None:
    network = zoo()["dense"]
    weight = network.bundle("input_hidden1").weight.clone()
    weight[2] = 0.0
    bias = network.group("hidden1").bias.clone()
    bias[2] = 0.7
    network = network.with_tensors({"weight.input_hidden1": weight, "bias.hidden1": bias})
    with_means = obey(PruneUnits(units(network, "hidden1", 2), (0.7,)), network)
    assert isinstance(with_means.promise, Changes)
    assert difference(network, with_means.after) <= 1e-12
    assert difference(network, PruneUnits(units(network, "hidden1", 2))(network).after) > 1e-3


def test_mean_of_a_channel_moves_where_no_padding_makes_it_uneven() -> None:
    def network(padding: int) -> Network:
        b = ig.Builder(seed=0, dtype=F64)
        b.input("x", (1, 4, 4))
        b.group("h", (2, 4, 4), bias=torch.tensor([0.5, 0.1]))
        b.connect("x", "h", ig.Conv2d((1, 1)), torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
        conv = ig.Conv2d((3, 3), padding=(padding, padding))
        b.group("k", (2, *conv.output((2, 4, 4))), bias=True, activation="tanh")
        b.connect("h", "k", conv)
        b.output("y", 2)
        b.connect("k", "y")
        return b.build()

    even = network(0)
    after = obey(PruneUnits(units(even, "h", 0), (0.5,)), even).after
    assert difference(even, after) <= 1e-12
    padded = network(1)
    with pytest.raises(Refused, match="target 'k', whose positions would need different biases"):
        PruneUnits(units(padded, "h", 0), (0.5,))(padded)


# ---- refusals -------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    network, separable, concat = zoo()["dense"], zoo()["separable"], zoo()["concatenated"]
    h = units(network, "hidden1", 0, 1, 2, 3, 4)
    cases = [
        (network, PruneUnits(()), Refused, "units none: found units of 0 groups"),
        (network, PruneUnits((h[0], *units(network, "hidden2", 0))), Refused, "found units of 2 groups"),
        (network, PruneUnits((h[0], h[0])), Refused, "found one of them twice"),
        (network, PruneUnits(h), Refused, "found all units of their group, expected at least one that stays"),
        (network, PruneUnits((ig.Unit("hidden1", 77),)), UnknownName, "unit hidden1#77"),
        (network, PruneUnits(units(network, "output", 0)), Refused, "'output' would change with it, and is an output"),
        (network, PruneUnits(h[:2], (1.0,)), Refused, r"means: found \(1.0,\), expected 2 finite numbers"),
        (concat, PruneUnits(units(concat, "both", 0, 1, 2)), Refused, "none of them would be left"),
        (separable, PruneUnits(units(separable, "depth", 0)), Refused, "whole blocks of 2 units"),
        (separable, PruneUnits(units(separable, "grouped", 0)), Refused, "multiples of its 2 channel groups"),
        (concat, PruneUnits(units(concat, "left", 0), (1.0,)), Refused, "group 'both', whose units go too"),
    ]
    for there, candidate, error, text in cases:
        with pytest.raises(error, match=text):
            candidate(there)
    no_bias = ig.mlp([2, 3, 2], bias=False, dtype=F64)
    with pytest.raises(Refused, match="target 'output' without a bias"):
        PruneUnits(units(no_bias, "hidden", 0), (1.0,))(no_bias)
    groups = ig.mlp([2, 4, 2], dtype=F64, norm=None)
    norm = ig.Norm("group", torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64), groups=2)
    hidden = replace(groups.group("hidden"), norm=norm)
    groups = Network(
        groups.groups | {"hidden": hidden}, groups.bundles, groups.inputs, groups.outputs, groups.next_serial
    ).verify()
    with pytest.raises(Refused, match="group 'hidden': group norm: found 2 groups of 3 units"):
        PruneUnits(units(groups, "hidden", 0))(groups)
    obey(PruneUnits(units(groups, "hidden", 0, 3)), groups)


def test_an_output_that_would_be_out_of_reach() -> None:
    b = ig.Builder(seed=0, dtype=F64)
    b.input("x", 2)
    b.group("h", 2, activation="relu")
    b.connect("x", "h")
    b.output("y", 2)
    b.connect("h", "y", ig.Sparse(np.array([0, 1]), np.array([0, 1])))
    network = b.build()
    with pytest.raises(Refused, match="of output 'y', expected every output within reach of an input"):
        PruneUnits(units(network, "h", 1))(network)


def test_pruning_is_masking() -> None:
    network = zoo()["mean"]
    after = PruneUnits(units(network, "conv1", 1))(network).after
    masked = silenced(network, "pool1_conv2", 1)
    x = inputs_for(network)
    assert torch.allclose(interpret(masked, *x), interpret(after, *x), rtol=0, atol=1e-14)
