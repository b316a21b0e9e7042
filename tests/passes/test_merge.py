"""Merging twins: the inverse of splitting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import difference, obey, some, zoo

import irgrow as ig
from irgrow.ir.errors import IrgrowError, PromiseBroken, Refused
from irgrow.ir.morphism import Changes, Morphism, SameFunction
from irgrow.ir.network import Network
from irgrow.passes import SplitUnit, SplitUnits
from irgrow.passes.merge import MergeUnits
from irgrow.testing import assert_promise, networks, rewrites

F64 = torch.float64


def twins(split: Network, unit: ig.Unit) -> tuple[ig.Unit, ig.Unit]:
    return unit, split.unit(unit.group, split.index(unit) + 1)


def assert_same(back: Network, network: Network) -> None:
    """The same up to the order of sparse edges, rounding, and the serials that were used."""
    assert back.describe() | {"next_serial": 0} == network.describe() | {"next_serial": 0}
    for name, group in network.groups.items():
        assert np.array_equal(back.groups[name].serials, group.serials)
    ours, theirs = ({(u, v): w for u, v, w in n.edges()} for n in (back, network))
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[e] - theirs[e]) for e in ours) <= 1e-14
    tensors = network.tensors()
    for name, tensor in back.tensors().items():
        if not name.startswith("weight."):
            assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize("name", zoo())
def test_merging_undoes_splitting(name: str) -> None:
    network = zoo()[name]
    for place in some(SplitUnit.places(network), 4):
        split = SplitUnit(place.unit, 0.3)(network)
        merge = MergeUnits((twins(split.after, place.unit),))
        back = obey(merge, split.after, chain=False)
        assert isinstance(back.promise, SameFunction)
        assert_same(back.after, network)
        whole = split >> back
        assert difference(network, whole.after) <= 1e-12
        rebuilt = whole.tensors(network.tensors())
        for tensor, value in whole.after.tensors().items():
            assert torch.allclose(rebuilt[tensor], value, rtol=1e-13, atol=1e-14)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    split = data.draw(rewrites(network, [SplitUnit]))
    grown = split(network).after
    merge = MergeUnits((twins(grown, split.unit),))
    try:
        merge.requires(grown)
    except IrgrowError as error:
        assert "shared weights" in str(error)
        return
    assert isinstance(assert_promise(merge, grown).promise, SameFunction)


def test_places_are_the_twins() -> None:
    network = zoo()["dense"]
    assert list(MergeUnits.places(network)) == []
    split = SplitUnit(network.unit("hidden1", 2))(network).after
    assert list(MergeUnits.places(split)) == [MergeUnits((twins(split, network.unit("hidden1", 2)),))]


def test_several_pairs_as_a_grouped_convolution_needs() -> None:
    network = zoo()["separable"]
    pair = (network.unit("grouped", 0), network.unit("grouped", 3))
    split = SplitUnits(pair)(network).after
    one = (twins(split, pair[0]),)
    with pytest.raises(Refused, match="multiples of its 2 channel groups"):
        MergeUnits(one)(split)
    back = obey(MergeUnits((*one, twins(split, pair[1]))), split, chain=False)
    assert_same(back.after, network)


def test_twins_apart_from_each_other_and_in_either_order() -> None:
    network = zoo()["dense"]
    w, v = network.bundle("input_hidden1").weight.clone(), network.bundle("hidden1_hidden2").weight
    bias = network.group("hidden1").bias.clone()
    w[4], bias[4] = w[0], bias[0]
    network = network.with_tensors({"weight.input_hidden1": w, "bias.hidden1": bias})
    a, b = network.unit("hidden1", 0), network.unit("hidden1", 4)
    after = obey(MergeUnits(((b, a),)), network, chain=False).after
    assert after.group("hidden1").serials[-1] == b.serial and after.group("hidden1").units == 4
    assert torch.equal(after.bundle("hidden1_hidden2").weight[:, 3], v[:, 4] + v[:, 0])


def test_sparse_twins_with_different_children() -> None:
    """Edges that only the twin had go to the unit."""
    b = ig.Builder(dtype=F64)
    x, (u, t) = b.neuron(role="input"), (b.neuron("relu"), b.neuron("relu"))
    y, z = (b.neuron("identity", role="output") for _ in range(2))
    for p, c, w in ((x, u, 0.5), (x, t, 0.5), (u, y, 2.0), (t, y, 3.0), (t, z, 7.0)):
        b.connect(p, c, w)
    network = b.build()
    merge = MergeUnits(((network.unit("hidden_relu", 0), network.unit("hidden_relu", 1)),))
    after = obey(merge, network, chain=False).after
    assert set(after.edges()) == {(x, u, 0.5), (u, y, 5.0), (u, z, 7.0)}


def test_gradients_of_what_enters_start_without_history() -> None:
    network = zoo()["tanh"]
    split = SplitUnit(network.unit("hidden", 1))(network).after
    lineage = MergeUnits((twins(split, network.unit("hidden", 1)),))(split).lineage
    for name in ("weight.input_hidden", "bias.hidden", "scale.hidden", "shift.hidden"):
        (gather,) = lineage.gathers[name]
        undefined = gather.factor().isnan().reshape(4, -1)
        assert undefined[1].all() and not undefined[[0, 2, 3]].any()
    assert lineage.gathers["variance.hidden"][0].factor() is None
    both = lineage.gathers["weight.hidden_output"]
    assert len(both) == 2 and both[0].factor() is None
    assert (~both[1].factor().isnan()).sum(0).tolist() == [0, 2, 0, 0]


def test_units_that_differ() -> None:
    network = zoo()["dense"]
    pair = (network.unit("hidden1", 0), network.unit("hidden1", 1))
    with pytest.raises(Refused, match="units that differ in bias.hidden1, expected twins; use approximate=True"):
        MergeUnits((pair,))(network)
    merge = MergeUnits((pair,), approximate=True)
    morphism = obey(merge, network)
    assert morphism.promise == Changes("the merged units differed in bias.hidden1")
    assert difference(network, morphism.after) > 1e-4
    weight = morphism.after.bundle("hidden1_hidden2").weight
    old = network.bundle("hidden1_hidden2").weight
    assert torch.equal(weight[:, 0], old[:, 0] + old[:, 1])
    broken = Morphism(network, morphism.after, morphism.lineage, SameFunction(), morphism.by)
    with pytest.raises(PromiseBroken, match="MergeUnits"):
        broken.verify()


def test_refusals() -> None:
    network = zoo()["dense"]
    a, b, c = (network.unit("hidden1", i) for i in range(3))
    other = network.unit("hidden2", 0)
    layer = ig.mlp([2, 3, 2], norm="layer", dtype=F64)
    cases = [
        (network, ((a, other),), "found units of 2 groups, expected units of one group"),
        (network, (), "pairs none: found units of 0 groups"),
        (network, ((a, b), (b, c)), "found one unit twice"),
        (network, ((a, a),), "found one unit twice"),
        (network, ((network.unit("output", 0), network.unit("output", 1)),), "'output'"),
        (layer, ((layer.unit("hidden", 0), layer.unit("hidden", 1)),), "group 'hidden' has a layer norm"),
    ]
    for there, pairs, text in cases:
        with pytest.raises(Refused, match=text):
            MergeUnits(pairs, approximate=True)(there)
