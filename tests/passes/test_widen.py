"""Net2WiderNet: more units by copies of those there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import difference, obey, some, zoo

import irgrow as ig
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.morphism import FirstOrder, SameFunction
from irgrow.ir.network import Network
from irgrow.passes.widen import WidenUnits
from irgrow.testing import assert_promise, gradients, inputs_for, networks, rewrites

F64 = torch.float64


@pytest.mark.parametrize("name", zoo())
def test_at_every_place(name: str) -> None:
    network = zoo()[name]
    found = some(WidenUnits.places(network), 4)
    assert found
    for place in found:
        obey(place, network)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    assert_promise(data.draw(rewrites(network, [WidenUnits])), network)


def test_given_copies_share_what_leaves_them() -> None:
    network = zoo()["dense"]
    copies = tuple(network.unit("hidden1", i) for i in (2, 0, 2))
    after = obey(WidenUnits("hidden1", 3, copies=copies), network).after
    w, v = network.bundle("input_hidden1").weight, network.bundle("hidden1_hidden2").weight
    assert torch.equal(after.bundle("input_hidden1").weight, w[[0, 1, 2, 3, 4, 2, 0, 2]])
    share = torch.tensor([1 / 2, 1, 1 / 3, 1, 1, 1 / 3, 1 / 2, 1 / 3], dtype=F64)
    assert torch.allclose(after.bundle("hidden1_hidden2").weight, v[:, [0, 1, 2, 3, 4, 2, 0, 2]] * share, rtol=1e-15)
    assert after.group("hidden1").serials[:5].tolist() == network.group("hidden1").serials.tolist()


def test_gradients_of_copies_are_shares() -> None:
    network = zoo()["dense"]
    copies = tuple(network.unit("hidden1", i) for i in (2, 2))
    morphism = WidenUnits("hidden1", 2, copies=copies)(network)
    (gather,) = morphism.lineage.gathers["bias.hidden1"]
    assert torch.allclose(gather.factor(), torch.tensor([1, 1, 1 / 3, 1, 1, 1 / 3, 1 / 3], dtype=F64))
    x = inputs_for(network)
    old, new = gradients(network, x)["bias.hidden1"], gradients(morphism.after, x)["bias.hidden1"]
    assert torch.allclose(new[[2, 5, 6]], old[[2, 2, 2]] / 3, rtol=1e-12)


def test_drawn_copies_depend_on_the_seed_and_reach_every_unit() -> None:
    network = zoo()["dense"]
    seen = set()
    for seed in range(12):
        morphism = WidenUnits("hidden1", 2, seed)(network)
        (gather,) = morphism.lineage.gathers["bias.hidden1"]
        seen.update(gather.flat().index[5:].tolist())
    assert seen == {0, 1, 2, 3, 4}


def test_channel_groups_widen_by_copies_of_their_own() -> None:
    network = zoo()["separable"]
    for seed in range(4):
        after = obey(WidenUnits("grouped", 4, seed), network).after
        assert after.group("grouped").units == 8
    with pytest.raises(Refused, match="a multiple of 2"):
        WidenUnits("grouped", 3)(network)
    wrong = (network.unit("grouped", 3), network.unit("grouped", 0))
    with pytest.raises(Refused, match="units that would change their channel group"):
        WidenUnits("grouped", 2, copies=wrong)(network)


def test_noise_breaks_the_tie() -> None:
    network = zoo()["cnn"]
    exact, noisy = WidenUnits("conv1", 2), WidenUnits("conv1", 2, noise=0.1)
    assert isinstance(exact.promise(network), SameFunction)
    morphism = obey(noisy, network)
    assert isinstance(morphism.promise, FirstOrder)
    quiet, loud = (p(network).after.bundle("input_conv1").weight for p in (exact, noisy))
    assert torch.equal(loud[:4], quiet[:4]) and bool((loud[4:] != quiet[4:]).all())
    assert difference(network, morphism.after) > 1e-6
    flat = zoo()["irregular"]
    for bundle in flat.entering("inserted"):
        loud = WidenUnits("inserted", 2, noise=0.5)(flat).after.bundle(bundle.name)
        quiet = WidenUnits("inserted", 2)(flat).after.bundle(bundle.name)
        new = np.isin(loud.pattern.target, [6, 7])
        assert torch.equal(loud.weight != quiet.weight, torch.from_numpy(new))


def test_refusals() -> None:
    network = zoo()["dense"]
    layer = ig.mlp([2, 3, 2], norm="layer", dtype=F64)
    cases = [
        (network, WidenUnits("hidden9"), UnknownName, "'hidden9'"),
        (network, WidenUnits("output"), Refused, "'output'"),
        (network, WidenUnits("hidden1", 0), Refused, "WidenUnits: group 'hidden1': found 0 units, expected at least 1"),
        (network, WidenUnits("hidden1", noise=-1.0), Refused, "found noise -1.0"),
        (
            network,
            WidenUnits("hidden1", 2, copies=(network.unit("hidden1", 0),)),
            Refused,
            "found 1 copies, expected 2",
        ),
        (
            network,
            WidenUnits("hidden1", copies=(network.unit("hidden2", 0),)),
            Refused,
            "expected copies of its own units",
        ),
        (network, WidenUnits("hidden1", copies=(ig.Unit("hidden1", 99),)), UnknownName, "unit hidden1#99"),
        (layer, WidenUnits("hidden"), Refused, "group 'hidden' has a layer norm"),
    ]
    for there, candidate, error, text in cases:
        with pytest.raises(error, match=text):
            candidate(there)
