"""Networks to networkx and back, for every pattern; levels against networkx."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import irgrow as ig
from irgrow.ir.errors import BadProperty, CyclicNetwork, IrgrowError
from irgrow.ir.interpreter import interpret
from irgrow.ir.network import Network
from irgrow.testing import inputs_for, networks, random_network, seeded_networks

ANY = st.one_of(seeded_networks(steps=4, widest=4), networks(steps=3, widest=4))
PATTERNS = {"Dense", "Sparse", "Identity", "Conv2d", "Local2d", "Pool2d"}


@given(ANY)
def test_round_trip(network: Network) -> None:
    graph = ig.to_networkx(network)
    assert graph.number_of_nodes() == network.counts.neurons
    assert graph.number_of_edges() == network.counts.edges
    back = ig.from_networkx(graph)
    assert back == network
    assert torch.equal(*(torch.cat([o.flatten() for o in outputs(n)]) for n in (network, back)))


def outputs(network: Network) -> tuple[torch.Tensor, ...]:
    out = interpret(network, *inputs_for(network))
    return out if isinstance(out, tuple) else (out,)


def test_round_trip_covers_every_pattern() -> None:
    seen = set()
    for seed in range(40):
        network = random_network(seed)
        seen |= {type(b.pattern).__name__ for b in network.bundles.values()}
        assert ig.from_networkx(ig.to_networkx(network)) == network
    assert seen == PATTERNS


@given(seeded_networks(steps=4, norms=()))
def test_levels_are_the_topological_generations(network: Network) -> None:
    graph = nx.DiGraph(ig.to_networkx(network))
    wanted = {number: n for n, generation in enumerate(nx.topological_generations(graph)) for number in generation}
    found = {
        number: int(level)
        for name in network.groups
        for number, level in zip(network.ids(name).tolist(), network.levels[name].tolist(), strict=True)
    }
    assert found == wanted
    assert network.depth == max(wanted.values())


@given(seeded_networks(steps=4))
def test_normalised_groups_share_a_level_behind_all_their_parents(network: Network) -> None:
    for name, group in network.groups.items():
        if group.norm is not None:
            assert len(set(network.levels[name].tolist())) == 1
    level = {i: int(v) for n in network.groups for i, v in zip(network.ids(n), network.levels[n], strict=True)}
    assert all(level[a] < level[b] for a, b, _ in network.edges())


@given(seeded_networks(steps=3, widest=4))
def test_parents_and_children_are_those_of_the_graph(network: Network) -> None:
    graph = ig.to_networkx(network)
    for neuron in network.neurons():
        assert sorted(network.parents(neuron.id)) == sorted(u for u, _ in graph.in_edges(neuron.id))
        assert sorted(network.children(neuron.id)) == sorted(v for _, v in graph.out_edges(neuron.id))
        assert network.neuron(neuron.id) == neuron


def test_components_order_groups_that_feed_each_other() -> None:
    b = ig.Builder()
    b.input("x", 1)
    for name in ("a", "b", "alone"):
        b.group(name, 2)
    b.output("y", 1)

    def edge(s: int, t: int) -> ig.Sparse:
        return ig.Sparse(np.array([s]), np.array([t]))

    b.connect("x", "a"), b.connect("a", "b", edge(0, 0)), b.connect("b", "a", edge(0, 1))
    b.connect("alone", "alone", edge(1, 0)), b.connect("a", "y")
    net = b.build()
    parts = dict(net.components)
    assert parts == {("x",): False, ("a", "b"): True, ("alone",): True, ("y",): False}
    assert net.levels["a"].tolist() == [1, 3] and net.levels["b"].tolist() == [2, 0]
    assert net.levels["alone"].tolist() == [1, 0] and net.levels["y"].tolist() == [4]


def test_a_changed_weight_comes_back() -> None:
    net = ig.mlp([2, 3, 1])
    graph = ig.to_networkx(net)
    (u, v, key) = next(iter(graph.edges(keys=True)))
    graph.edges[u, v, key]["weight"] = 5.0
    assert ig.from_networkx(graph).bundle(key).weight.flatten()[0] == 5


def test_a_plain_graph() -> None:
    graph = nx.DiGraph()
    graph.add_edge("a", "h", weight=2.0)
    graph.add_edge("b", "h")
    graph.add_edge("h", "y", weight=-1.0)
    graph.add_node("y", bias=0.5, activation="tanh")
    net = ig.from_networkx(graph)
    assert (net.inputs, net.outputs) == (("input",), ("output_tanh",))
    out = interpret(net, torch.tensor([[3.0, 1.0]], dtype=torch.float64))
    assert out.item() == pytest.approx(np.tanh(-1 * max(0, 2 * 3 + 1) + 0.5))


def test_a_plain_graph_with_a_cycle() -> None:
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 1), (2, 3)])
    with pytest.raises(CyclicNetwork, match=r"neurons that feed themselves: found hidden_relu neuron 1 -> .* 1"):
        ig.from_networkx(graph)


@pytest.mark.parametrize(
    ("graph", "text"),
    [
        (nx.Graph([(0, 1)]), "from_networkx: found Graph, expected a directed graph"),
        (nx.DiGraph(), "from_networkx: found a graph without nodes"),
    ],
)
def test_what_is_no_network(graph: nx.Graph, text: str) -> None:
    with pytest.raises(BadProperty, match=text):
        ig.from_networkx(graph)


def test_a_role_that_does_not_exist() -> None:
    graph = nx.DiGraph([(0, 1)])
    graph.nodes[0]["role"] = "sensor"
    with pytest.raises(BadProperty, match="node 0: role: found 'sensor', expected input, hidden or output"):
        ig.from_networkx(graph)


def test_a_graph_of_ours_that_lost_a_neuron_or_gained_an_edge() -> None:
    graph = ig.to_networkx(ig.mlp([2, 3, 1]))
    graph.remove_node(2)
    with pytest.raises(IrgrowError, match=r"group 'hidden': found no node for unit 0, position 0"):
        ig.from_networkx(graph)
    graph = ig.to_networkx(ig.mlp([2, 3, 1]))
    graph.remove_edge(0, 3)
    with pytest.raises(
        IrgrowError, match=r"bundle 'input_hidden': found 5 edges, expected the 6 of its pattern; clear"
    ):
        ig.from_networkx(graph)
    graph = ig.to_networkx(ig.cnn((1, 3, 3), [1], 1, pool=None))
    next(iter(graph.edges(data=True)))[2]["weight"] = 9.0
    with pytest.raises(IrgrowError, match=r"bundle 'input_conv1': found two values for its shared weight \d"):
        ig.from_networkx(graph)
    graph = ig.to_networkx(ig.mlp([2, 3, 1]))
    graph.add_edge(0, 5, weight=1.0)
    with pytest.raises(IrgrowError, match=r"edge 0 -> 5: found .*, expected .* bundle"):
        ig.from_networkx(graph)
