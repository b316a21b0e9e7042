"""A neuron on an edge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import difference, obey, some, zoo

import irgrow as ig
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.morphism import Changes, SameFunction
from irgrow.ir.network import Network
from irgrow.passes.insert_edge import InsertOnEdge
from irgrow.testing import assert_promise, gradients, inputs_for, networks, rewrites

F64 = torch.float64


def edge(network: Network, bundle: str, source: int, target: int) -> tuple[int, int]:
    b = network.bundle(bundle)
    return int(network.ids(b.source)[source]), int(network.ids(b.target)[target])


@pytest.mark.parametrize("name", zoo())
def test_at_every_place(name: str) -> None:
    network = zoo()[name]
    for place in some(InsertOnEdge.places(network)):
        obey(place, network)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    assert_promise(data.draw(rewrites(network, [InsertOnEdge])), network)


def test_which_activations_are_exact() -> None:
    network = zoo()["dense"]  # inputs of any sign, relu inside
    inner, first = edge(network, "hidden1_hidden2", 1, 2), edge(network, "input_hidden1", 1, 2)
    for ends, activation, exact in (
        (inner, "identity", True), (inner, "relu", True), (inner, "abs", True), (inner, "elu", True),
        (inner, "tanh", False), (inner, "selu", False), (inner, "softplus", False),
        (first, "identity", True), (first, "relu", False), (first, "abs", False),
    ):  # fmt: skip
        morphism = InsertOnEdge(*ends, activation)(network)
        assert isinstance(morphism.promise, SameFunction if exact else Changes), activation
        assert (difference(network, morphism.verify().after) <= 1e-12) == exact, activation
    assert isinstance(InsertOnEdge(*inner, weight=2.0).promise(network), Changes)
    tanh = zoo()["tanh"]
    assert isinstance(InsertOnEdge(*edge(tanh, "hidden_output", 0, 0), "tanh").promise(tanh), Changes)


def test_the_weight_and_its_history_move_along() -> None:
    network = zoo()["dense"]
    u, v = edge(network, "hidden1_hidden2", 1, 2)
    morphism = InsertOnEdge(u, v, "relu")(network)
    after = morphism.after
    (new,) = after.ids("hidden1_hidden2_inserted").tolist()
    assert new == network.next_serial
    edges = {(a, b): w for a, b, w in after.edges()}
    assert edges[u, new] == 1.0 and edges[new, v] == network.bundle("hidden1_hidden2").weight[2, 1].item()
    assert (u, v) not in edges and len(edges) == network.counts.edges + 1
    (carried,), known = morphism.lineage.carry(
        [{"weight.hidden1_hidden2": gradients(network, inputs_for(network))["weight.hidden1_hidden2"]}],
        "weight.hidden1_hidden2_inserted_hidden2",
        [1],
    )
    now = gradients(after, inputs_for(network))["weight.hidden1_hidden2_inserted_hidden2"]
    assert known is None and torch.allclose(carried, now)


def test_neurons_on_edges_of_one_pair_of_groups_share_a_group() -> None:
    network = zoo()["dense"]
    one = InsertOnEdge(*edge(network, "input_hidden1", 0, 0))(network).after
    two = InsertOnEdge(*edge(network, "input_hidden1", 2, 1))(one).verify().after
    assert two.group("input_hidden1_inserted").units == 2
    other = InsertOnEdge(*edge(network, "input_hidden1", 3, 1), "relu")(two).verify().after
    assert other.group("input_hidden1_inserted_2").activation == "relu"
    assert difference(network, two) <= 1e-12
    u, new = edge(two, "input_input_hidden1_inserted", 0, 0)
    again = InsertOnEdge(u, new)(two).verify().after
    assert again.group("input_input_hidden1_inserted_inserted").units == 1


def test_a_shared_weight_becomes_the_edges_own() -> None:
    network = zoo()["cnn"]
    u, v = edge(network, "input_conv1", 0, 0)
    morphism = obey(InsertOnEdge(u, v), network)
    left = morphism.after.bundle("input_conv1")
    conv = network.bundle("input_conv1")
    assert left.pattern.count(*morphism.after.shapes(left)) == conv.pattern.count(*network.shapes(conv)) - 1
    assert left.pattern.weights == conv.weight.numel()  # the other ties are kept
    (gather,) = morphism.lineage.gathers["weight.input_conv1_inserted_conv1"]
    assert bool(gather.factor().isnan().all())


def test_into_a_max_and_out_of_a_fixed_bundle() -> None:
    network = zoo()["cnn"]
    u, v = edge(network, "conv1_pool1", 0, 0)
    after = obey(InsertOnEdge(u, v, "relu"), network).after
    assert not after.bundle("conv1_pool1_inserted_pool1").trainable
    assert after.bundle("conv1_conv1_pool1_inserted").trainable


def test_tags_move_along() -> None:
    network = zoo()["irregular"]
    tagged = [b for b in network.bundles.values() if "primary" in b.pattern.tags]
    bundle = next(b for b in tagged if (b.pattern.tags["primary"] == 0).any())
    e = int((bundle.pattern.tags["primary"] == 0).nonzero()[0][0])
    ends = edge(network, bundle.name, int(bundle.pattern.source[e]), int(bundle.pattern.target[e]))
    after = InsertOnEdge(*ends)(network).after
    home = f"{bundle.source}_{bundle.target}_inserted"
    assert [b.pattern.tags["primary"].tolist() for b in after.entering(home) + after.leaving(home)] == [[0], [0]]


def test_refusals() -> None:
    network = zoo()["dense"]
    u, v = edge(network, "input_hidden1", 0, 0)
    w = int(network.ids("hidden2")[0])
    with pytest.raises(Refused, match=f"InsertOnEdge: edge {u} -> {w}: found no such edge, expected an edge"):
        InsertOnEdge(u, w)(network)
    with pytest.raises(Refused, match="found no such edge in bundle 'hidden1_hidden2'"):
        InsertOnEdge(u, v, bundle="hidden1_hidden2")(network)
    with pytest.raises(UnknownName, match="bundle 'nowhere'"):
        InsertOnEdge(u, v, bundle="nowhere")(network)
    with pytest.raises(UnknownName, match="neuron 999"):
        InsertOnEdge(u, 999)(network)
    with pytest.raises(UnknownName, match="activation 'rel'"):
        InsertOnEdge(u, v, "rel")(network)
    with pytest.raises(Refused, match="found weight nan, expected a finite number"):
        InsertOnEdge(u, v, weight=float("nan"))(network)
    with pytest.raises(Refused, match="group 'hidden1': found a group of another kind.*give another `group`"):
        InsertOnEdge(u, v, "relu", group="hidden1")(network)
    both = zoo()["concatenated"]
    double = both.bundles | {"again": ig.Bundle("again", "x", "y", ig.Dense(), torch.ones(2, 4, dtype=F64))}
    parallel = Network(both.groups, double, both.inputs, both.outputs, both.next_serial).verify()
    ends = edge(parallel, "x_y", 0, 0)
    with pytest.raises(Refused, match="found it in x_y, again, expected one bundle; give `bundle`"):
        InsertOnEdge(*ends)(parallel)
    obey(InsertOnEdge(*ends, bundle="again"), parallel)


def test_a_home_that_would_close_a_loop_around_a_norm() -> None:
    network = zoo()["tanh"]
    u, v = edge(network, "input_hidden", 0, 0)
    one = InsertOnEdge(u, v, group="home")(network).after
    w = int(network.ids("output")[0])
    with pytest.raises(Refused, match="found a loop of groups through 'hidden', which is normalised"):
        InsertOnEdge(v, w, group="home")(one)
