"""Adding and removing single edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import difference, obey, some, zoo

import irgrow as ig
from irgrow.ir.errors import BadData, Refused, UnknownName
from irgrow.ir.morphism import Changes, FirstOrder, SameFunction
from irgrow.ir.network import Network
from irgrow.passes.edges import AddEdges, RemoveEdges
from irgrow.testing import assert_promise, inputs_for, networks, rewrites

F64 = torch.float64


def ids(network: Network, group: str) -> list[int]:
    return network.ids(group).tolist()


@pytest.mark.parametrize("name", zoo())
@pytest.mark.parametrize("kind", [AddEdges, RemoveEdges])
def test_at_every_place(kind: type, name: str) -> None:
    network = zoo()[name]
    for place in some(kind.places(network)):
        obey(place, network, chain=kind is AddEdges)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    assert_promise(data.draw(rewrites(network, [AddEdges, RemoveEdges])), network)


def test_new_edges_by_pair_of_groups() -> None:
    network = zoo()["dense"]
    x, h2, y = ids(network, "input"), ids(network, "hidden2"), ids(network, "output")
    wanted = ((x[0], h2[1]), (x[3], y[0]), (x[1], h2[1]))
    zero = obey(AddEdges(wanted), network)
    assert isinstance(zero.promise, SameFunction) and zero.after.bundle("input_hidden2").pattern.source.tolist() == [
        0,
        1,
    ]
    morphism = obey(AddEdges(wanted, (0.5, -1.0, 0.25)), network)
    assert isinstance(morphism.promise, FirstOrder)
    added = set(morphism.after.edges()) - set(network.edges())
    assert added == {(x[0], h2[1], 0.5), (x[3], y[0], -1.0), (x[1], h2[1], 0.25)}
    more = AddEdges(((x[2], h2[0]),))(morphism.after).after
    assert more.bundle("input_hidden2").weight.tolist() == [0.5, 0.25, 0.0]
    assert len(more.bundles) == len(morphism.after.bundles)


def test_an_edge_in_either_direction_but_no_cycle() -> None:
    """To a deeper neuron without a check; sideways or up only where no path leads back."""
    network = zoo()["irregular"]
    level = {
        i: int(l) for g in network.groups for i, l in zip(ids(network, g), network.levels[g].tolist(), strict=True)
    }
    inner = ids(network, "inserted")
    below: dict[int, set[int]] = {}
    for i in sorted(level, key=level.__getitem__, reverse=True):
        below[i] = {i}.union(*(below[c] for c in network.children(i)))
    seen = {"down": 0, "up": 0, "cycle": 0}
    for u in inner:
        for v in inner:
            if v in network.children(u):
                continue
            if u in below[v]:
                with pytest.raises(Refused, match="AddEdges: found .*expected edges that close no cycle of neurons"):
                    AddEdges(((u, v),))(network)
                seen["cycle"] += 1
            else:
                obey(AddEdges(((u, v),)), network)
                seen["down" if level[u] < level[v] else "up"] += 1
    assert seen["cycle"] and seen["down"] + seen["up"], seen


def test_two_new_edges_that_only_together_close_a_cycle() -> None:
    b = ig.Builder(dtype=F64)
    x, y = b.neuron(role="input"), b.neuron("identity", role="output")
    u, v = b.neuron(), b.neuron()
    for a, c in ((x, u), (x, v), (u, y), (v, y)):
        b.connect(a, c, 0.5)
    network = b.build()
    obey(AddEdges(((u, v),)), network)
    obey(AddEdges(((v, u),)), network)
    with pytest.raises(Refused, match="close no cycle"):
        AddEdges(((u, v), (v, u)))(network)
    with pytest.raises(Refused, match="close no cycle"):
        AddEdges(((u, u),))(network)


def test_new_edges_are_not_primary() -> None:
    network = zoo()["irregular"]
    x, y = ids(network, network.inputs[0]), ids(network, network.outputs[0])
    free = next((u, v) for u in x for v in y if v not in network.children(u))
    after = AddEdges((free,))(network).after
    tagged = [b for b in after.bundles.values() if b.pattern.tags]
    tags = {edge: tag for b in tagged for edge, tag in _tagged(after, b)}
    assert tags[free] == 0
    assert ig.InsertNeuron(seed=3, activation="tanh")(after).verify()


def _tagged(network: Network, b: ig.Bundle) -> list:
    s, t = network.ids(b.source)[b.pattern.source], network.ids(b.target)[b.pattern.target]
    return list(zip(zip(s.tolist(), t.tolist(), strict=True), b.pattern.tags["primary"].tolist(), strict=True))


def test_add_refusals() -> None:
    network = zoo()["cnn"]
    x, h, p, y = (ids(network, n) for n in ("input", "conv1", "pool1", "output"))
    cases = [
        (AddEdges(()), Refused, "AddEdges: found no edges, expected at least one"),
        (AddEdges(((x[0], y[0]), (x[0], y[0]))), Refused, f"edge {x[0]} -> {y[0]}: found it twice"),
        (AddEdges(((x[0], y[0]),), (1.0, 2.0)), Refused, "weights: found 2 numbers, expected 1 finite ones"),
        (AddEdges(((x[0], y[0]),), (float("inf"),)), Refused, "expected 1 finite ones"),
        (AddEdges(((h[0], x[0]),)), Refused, "found a child in the input 'input'"),
        (AddEdges(((x[0], p[0]),)), Refused, "found a child in 'pool1', which aggregates by max"),
        (AddEdges(((x[0], h[0]),)), Refused, f"edge {x[0]} -> {h[0]}: found it in bundle 'input_conv1'"),
        (AddEdges(((x[0], 9999),)), UnknownName, "neuron 9999"),
        (AddEdges(((y[0], h[0]),)), Refused, "a loop of groups through 'conv1', which is normalised"),
    ]
    for candidate, error, text in cases:
        with pytest.raises(error, match=text):
            candidate(network)


# ---- removing -------------------------------------------------------------------------------------------------


def test_removing_undoes_adding() -> None:
    network = zoo()["dense"]
    x, y = ids(network, "input"), ids(network, "output")
    edges = ((x[0], y[1]), (x[2], y[0]))
    added = AddEdges(edges)(network).after
    removed = obey(RemoveEdges(edges), added, chain=False)
    assert isinstance(removed.promise, SameFunction)
    assert removed.after == network


def test_weights_below_a_threshold() -> None:
    network = zoo()["dense"]
    small = RemoveEdges.below(network, 0.2, "hidden1_hidden2")
    morphism = obey(small, network)
    assert isinstance(morphism.promise, Changes) and "have weights" in morphism.promise.why
    weight = network.bundle("hidden1_hidden2").weight
    left = morphism.after.bundle("hidden1_hidden2")
    assert 0 < left.weight.numel() < 30 and torch.equal(left.weight, weight[weight.abs() > 0.2])
    zeroed = network.with_tensors({"weight.hidden1_hidden2": weight * (weight.abs() > 0.2)})
    assert difference(zeroed, morphism.after) <= 1e-12
    assert isinstance(
        obey(RemoveEdges.below(zeroed, 0.0, "hidden1_hidden2"), zeroed, chain=False).promise, SameFunction
    )


def test_ties_stay_and_lose_their_history_only_where_they_lose_an_edge() -> None:
    network = zoo()["cnn"]
    weight = network.bundle("input_conv1").weight.clone()
    weight[1, 0, 2, 2] = 0.0
    network = network.with_tensors({"weight.input_conv1": weight})
    every = RemoveEdges.below(network, 0.0, "input_conv1")
    some = RemoveEdges(every.edges[:2], "input_conv1")
    for candidate, weights, lost in ((every, weight.numel() - 1, 0), (some, weight.numel(), 1)):
        morphism = obey(candidate, network, chain=False)
        assert isinstance(morphism.promise, SameFunction)
        assert morphism.after.bundle("input_conv1").weight.numel() == weights
        (gather,) = morphism.lineage.gathers["weight.input_conv1"]
        factor = gather.factor()
        assert (0 if factor is None else int(factor.isnan().sum())) == lost


def test_zero_edges_count_in_a_max() -> None:
    network = zoo()["cnn"]
    network = network.with_tensors({"weight.conv1_pool1": torch.zeros((), dtype=F64)})
    place = next(p for p in RemoveEdges.places(network) if p.bundle == "conv1_pool1")
    assert place.promise(network) == Changes("edges of weight 0 count in 'pool1', which aggregates by max")


def test_parallel_edges_go_together_or_by_bundle() -> None:
    both = zoo()["concatenated"]
    double = both.bundles | {"again": ig.Bundle("again", "x", "y", ig.Dense(), torch.zeros(2, 4, dtype=F64))}
    network = Network(both.groups, double, both.inputs, both.outputs, both.next_serial).verify()
    ends = ((ids(network, "x")[0], ids(network, "y")[0]),)
    assert RemoveEdges(ends)(network).after.counts.edges == network.counts.edges - 2
    assert isinstance(obey(RemoveEdges(ends, "again"), network, chain=False).promise, SameFunction)


def test_remove_refusals() -> None:
    network = zoo()["dense"]
    x, h, y = (ids(network, n) for n in ("input", "hidden1", "output"))
    with pytest.raises(Refused, match="RemoveEdges: found no edges"):
        RemoveEdges(())(network)
    with pytest.raises(Refused, match=f"edge {x[0]} -> {y[0]}: found no such edge, expected an edge"):
        RemoveEdges(((x[0], y[0]),))(network)
    with pytest.raises(Refused, match="no such edge in bundle 'hidden1_hidden2'"):
        RemoveEdges(((x[0], h[0]),), "hidden1_hidden2")(network)
    with pytest.raises(UnknownName, match="bundle 'none'"):
        RemoveEdges(((x[0], h[0]),), "none")(network)
    into = tuple((u, y[1]) for u in ids(network, "hidden2"))
    with pytest.raises(Refused, match="of output 'output', expected every output within reach of an input"):
        RemoveEdges(into)(network)


# ---- the edges of the largest gradient (NeST) ---------------------------------------------------------------------


def measured(network: Network, groups: list[tuple[str, str]]) -> dict[tuple[str, str], torch.Tensor]:
    """dL/dw of every possible edge, by a model: what parents put out times the gradients at their children."""
    model = ig.compile(network)
    x = inputs_for(network, 16, seed=4)
    shifts = {t: torch.zeros(16, *network.groups[t].shape, dtype=F64, requires_grad=True) for _, t in groups}
    y, values = model.record(*x, values=[s for s, _ in groups], shifts=shifts)
    y.square().sum().backward()
    return {(s, t): shifts[t].grad.flatten(1).T @ values[s].detach().flatten(1) for s, t in groups}


@pytest.mark.parametrize("name", ["dense", "irregular", "concatenated"])
def test_the_edges_of_the_largest_gradient(name: str) -> None:
    """Once they exist, the new edges have the gradients that were measured, and no other edge has a larger one."""
    network = zoo()[name]
    groups = [(s, t) for s in network.groups for t in network.groups if t not in network.inputs]
    given = measured(network, groups)
    found = AddEdges.largest(network, given, 3)
    morphism = obey(found, network)
    assert isinstance(morphism.promise, SameFunction)
    wanted = {
        (u, v): float(given[s, t][j, i])
        for s, t in groups
        for i, u in enumerate(ids(network, s))
        for j, v in enumerate(ids(network, t))
    }
    model, after = ig.compile(morphism.after), morphism.after
    model(*inputs_for(network, 16, seed=4)).square().sum().backward()
    seen: dict[tuple[int, int], float] = {}
    for b in after.bundles.values():
        if b.trainable:
            s, t, w = b.pattern.all_edges(*after.shapes(b))
            ends = zip(after.ids(b.source)[s].tolist(), after.ids(b.target)[t].tolist(), strict=True)
            seen |= dict(zip(ends, model.tensors()[b.tensor].grad.flatten()[w].tolist(), strict=True))
    for edge in found.edges:
        assert seen[edge] == pytest.approx(wanted[edge], rel=1e-10)
    level = {n: d for g in network.groups for n, d in zip(ids(network, g), network.levels[g].tolist(), strict=True)}
    taken = {(u, v) for u, v, _ in network.edges()} | set(found.edges)
    others = [abs(wanted[u, v]) for u, v in wanted if (u, v) not in taken and level[u] < level[v]]
    assert others and max(others) <= min(abs(wanted[edge]) for edge in found.edges)
    down = AddEdges.largest(network, given, 3, step=1e-3)
    assert down.edges == found.edges and down.weights is not None
    assert down.weights == pytest.approx([-1e-3 * wanted[e] for e in down.edges])
    obey(down, network)


def test_largest_gradients_that_cannot_be() -> None:
    network = zoo()["dense"]
    with pytest.raises(BadData, match=r"gradient of input -> hidden2: found shape \(2, 2\), expected \(6, 4\)"):
        AddEdges.largest(network, {("input", "hidden2"): torch.zeros(2, 2)}, 1)
    with pytest.raises(BadData, match="gradient of input -> hidden2: found NaN or infinity"):
        AddEdges.largest(network, {("input", "hidden2"): torch.full((6, 4), torch.nan)}, 1)
    with pytest.raises(Refused, match=r"AddEdges.largest: found 25 edges, expected 1 to 24"):
        AddEdges.largest(network, {("input", "hidden2"): torch.zeros(6, 4)}, 25)
    with pytest.raises(Refused, match="found 1 edges, expected 1 to 0"):  # all of them exist, or lead up
        AddEdges.largest(network, {("input", "hidden1"): torch.zeros(5, 4), ("output", "hidden1"): torch.ones(5, 3)}, 1)
