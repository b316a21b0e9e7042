"""Integer structure, against networkx and plain Python."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from irgrow.kernels import graph

Edges = tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]


@st.composite
def edges(draw: st.DrawFn, acyclic: bool = False, most: int = 12) -> Edges:
    """(neurons, source, target), with repetitions, in any order; int32 or int64."""
    neurons = draw(st.integers(1, most))
    pairs = draw(st.lists(st.tuples(st.integers(0, neurons - 1), st.integers(0, neurons - 1)), max_size=3 * most))
    if acyclic:
        label = draw(st.permutations(range(neurons)))
        pairs = [(label[min(p)], label[max(p)]) for p in pairs if p[0] != p[1]]
    if draw(st.booleans()):
        pairs.sort(key=lambda p: (p[1], p[0]))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    source, target = np.array(pairs, dtype).reshape(-1, 2).T
    return neurons, source, target


def as_digraph(neurons: int, source: Any, target: Any) -> nx.DiGraph:
    digraph = nx.DiGraph()
    digraph.add_nodes_from(range(neurons))
    digraph.add_edges_from(zip(source.tolist(), target.tolist(), strict=True))
    return digraph


def longest_paths(digraph: nx.DiGraph, base: Any) -> list[int]:
    depth: dict[int, int] = {}
    for v in nx.topological_sort(digraph):
        depth[v] = max([int(base[v]), *(depth[u] + 1 for u in digraph.predecessors(v))])
    return [depth[v] for v in range(len(digraph))]


@given(edges())
def test_compressed_rows_is_a_stable_sort_by_key(e: Edges) -> None:
    neurons, keys, _ = e
    pointer, order = graph.compressed_rows(keys, neurons)
    np.testing.assert_array_equal(order, np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(np.diff(pointer), np.bincount(keys, minlength=neurons))
    assert pointer.dtype == np.int64 and order.dtype == np.int32 and pointer[0] == 0


@given(edges())
def test_children_stand_together_in_edge_order(e: Edges) -> None:
    neurons, source, target = e
    pointer, child = graph.children(source, target, neurons)
    for u in range(neurons):
        np.testing.assert_array_equal(child[pointer[u] : pointer[u + 1]], target[source == u])


@given(edges(acyclic=True), st.data())
def test_levels_are_longest_paths(e: Edges, data: st.DataObject) -> None:
    neurons, source, target = e
    base = np.array(data.draw(st.lists(st.integers(0, 5), min_size=neurons, max_size=neurons)), np.int32)
    digraph = as_digraph(*e)
    assert graph.levels(*e[1:], neurons).tolist() == longest_paths(digraph, 0 * base)
    assert graph.levels(*e[1:], neurons, base).tolist() == longest_paths(digraph, base)
    rows = graph.children(source, target, neurons)
    assert graph.levels_of_children(*rows, base).tolist() == longest_paths(digraph, base)


def test_levels_leave_the_given_base_alone() -> None:
    base = np.array([3, 0], np.int32)
    assert graph.levels(np.array([0]), np.array([1]), 2, base).tolist() == [3, 4]
    assert base.tolist() == [3, 0]


@given(edges())
@example((2, np.array([0, 1, 0]), np.array([1, 0, 0])))
def test_on_or_behind_a_cycle_there_is_no_level(e: Edges) -> None:
    neurons, source, target = e
    digraph = as_digraph(*e)
    on_cycle = {v for part in nx.strongly_connected_components(digraph) if len(part) > 1 for v in part}
    on_cycle |= {v for v in digraph if digraph.has_edge(v, v)}
    behind = on_cycle.union(*(nx.descendants(digraph, v) for v in on_cycle))
    level = graph.levels(source, target, neurons)
    assert {v for v in range(neurons) if level[v] < 0} == behind
    rest = as_digraph(*e).subgraph(set(range(neurons)) - behind)
    assert [level[v] for v in sorted(rest)] == [
        longest_paths(nx.convert_node_labels_to_integers(rest, ordering="sorted"), np.zeros(neurons))[k]
        for k in range(len(rest))
    ]


@given(edges())
@example((3, np.array([0, 0]), np.array([1, 0])))
@example((4, np.array([3, 2, 1, 1]), np.array([2, 1, 3, 0])))
def test_a_cycle_found_is_one(e: Edges) -> None:
    neurons, source, target = e
    cycle = graph.find_cycle(source, target, neurons).tolist()
    digraph = as_digraph(*e)
    assert bool(cycle) == (not nx.is_directed_acyclic_graph(digraph))
    assert len(set(cycle)) == len(cycle)
    assert all(digraph.has_edge(u, v) for u, v in zip(cycle, cycle[1:] + cycle[:1], strict=True))
    assert not cycle or cycle[0] == min(cycle)


@given(edges())
@example((3, np.array([1, 0, 1, 1]), np.array([2, 2, 2, 2])))
@example((3, np.array([2, 1, 2, 1]), np.array([2, 0, 2, 0])))
def test_the_first_duplicate_is_the_first(e: Edges) -> None:
    neurons, source, target = e
    seen: set[tuple[int, int]] = set()
    expected = -1
    for k, pair in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        if pair in seen:
            expected = k
            break
        seen.add(pair)
    assert graph.first_duplicate(source, target, neurons) == expected
    assert graph.first_duplicate(source, target, neurons, neurons + 3) == expected
    assert graph.repeats(*graph.children(source, target, neurons), neurons) == (expected >= 0)


def test_sources_and_targets_may_be_of_different_groups() -> None:
    source, target = np.array([9, 0, 9]), np.array([0, 1, 1], np.int32)
    assert graph.first_duplicate(source, target, 2) == -1
    assert graph.first_duplicate(np.append(source, 9), np.append(target, 0), 2, 10) == 3


def test_nothing_at_all() -> None:
    none = np.array([], np.int64)
    assert graph.levels(none, none, 3).tolist() == [0, 0, 0]
    assert graph.levels([], [], 0).tolist() == []
    assert graph.find_cycle(none, none, 2).tolist() == []
    assert graph.first_duplicate(none, none, 2) == -1
    pointer, order = graph.compressed_rows(none, 2)
    assert pointer.tolist() == [0, 0, 0] and order.tolist() == []


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: graph.compressed_rows(np.array([0, 5]), 5), ValueError, "edge 1 has key 5, expected 0..4"),
        (lambda: graph.compressed_rows(np.array([-1]), 5), ValueError, "edge 0 has key -1"),
        (lambda: graph.compressed_rows(np.array([0.5]), 5), TypeError, "keys must be a 1-d int32 or int64 array"),
        (lambda: graph.levels(np.array([0, 1]), np.array([1]), 2), ValueError, "equally long, found 2 and 1"),
        (
            lambda: graph.levels(np.array([0, 1]), np.array([1, 2]), 2),
            ValueError,
            r"edge 1 goes from 1 to 2, expected a source in 0..1 and a target in 0..1",
        ),
        (
            lambda: graph.levels(np.array([0]), np.array([1]), 2, np.zeros(3, np.int32)),
            ValueError,
            r"one entry per neuron, found shape \(3,\) for 2 neurons",
        ),
        (lambda: graph.first_duplicate(np.array([4]), np.array([0]), 1, 4), ValueError, "from 4 to 0"),
    ],
)
def test_what_a_caller_gets_wrong_is_said(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_long_chain_and_a_wide_fan() -> None:
    """Sizes at which a recursive or quadratic form would be noticed, shuffled and in order."""
    n = 200_000
    shuffled = np.random.default_rng(0).permutation(n - 1)
    chain, following = np.arange(n - 1, dtype=np.int32), np.arange(1, n, dtype=np.int32)
    np.testing.assert_array_equal(graph.levels(chain, following, n), np.arange(n))
    np.testing.assert_array_equal(graph.levels(chain[shuffled], following[shuffled], n), np.arange(n))
    closed = graph.find_cycle(np.append(chain, n - 1), np.append(following, 0), n)
    np.testing.assert_array_equal(closed, np.arange(n))
    fan = graph.levels(np.zeros(n - 1, np.int64), np.arange(1, n), n)
    assert fan[0] == 0 and (fan[1:] == 1).all()
    assert graph.first_duplicate(chain[shuffled], following[shuffled], n) == -1
