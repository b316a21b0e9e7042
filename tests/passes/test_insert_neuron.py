"""Algorithm 1: the worked example to the last digit, and the paper's remarks on random networks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

import irgrow as ig
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.passes import InsertNeuron
from irgrow.testing import assert_promise, random_network

F64 = torch.float64


def start(inputs: int, outputs: int, *, seed: int = 0) -> Network:
    """Every input feeds every output; no biases."""
    return ig.mlp([inputs, outputs], bias=False, seed=seed, dtype=F64)


def edges(network: Network) -> dict[tuple[int, int], float]:
    return {(a, b): w for a, b, w in network.edges()}


def primary(network: Network) -> set[tuple[int, int]]:
    """pi0: the edges tagged primary; all edges of a bundle without the tag."""
    found = set()
    for bundle in network.bundles.values():
        s, t, _ = bundle.pattern.all_edges(*network.shapes(bundle))
        tag = getattr(bundle.pattern, "tags", {}).get("primary", np.ones(s.size))
        source, target = network.ids(bundle.source)[s], network.ids(bundle.target)[t]
        found |= {(int(a), int(b)) for a, b, p in zip(source, target, tag, strict=True) if p}
    return found


def depths(network: Network) -> dict[int, int]:
    return {i: int(d) for n in network.groups for i, d in zip(network.ids(n), network.levels[n], strict=True)}


# ---- the worked example (numbers here are 0-based: the example's minus one) -------------------------------------


def example() -> list[Network]:
    first = start(2, 2).with_tensors({"weight.input_output": torch.tensor([[0.1, 0.3], [0.2, 0.4]], dtype=F64)})
    second = InsertNeuron(2, after=0, others=(1,), weights=(0.25, -0.35))(first).after.verify()
    third = InsertNeuron(2, after=1, others=(0,), weights=(-0.15, 0.45))(second).after.verify()
    return [first, second, third]


def test_the_worked_example() -> None:
    first, second, third = example()
    assert edges(first) == {(0, 2): 0.1, (0, 3): 0.2, (1, 2): 0.3, (1, 3): 0.4}
    assert edges(second) == {(0, 4): 0.25, (1, 4): -0.35, (4, 2): 0.1, (4, 3): 0.2, (1, 2): 0.3, (1, 3): 0.4}
    assert primary(second) == {(0, 4), (4, 2), (4, 3), (1, 2), (1, 3)}
    assert edges(third) == {
        (0, 4): 0.25, (0, 5): 0.45, (1, 4): -0.35, (1, 5): -0.15, (4, 2): 0.1, (4, 3): 0.2, (5, 2): 0.3, (5, 3): 0.4
    }  # fmt: skip
    assert primary(third) == {(0, 4), (1, 5), (4, 2), (4, 3), (5, 2), (5, 3)}
    x = torch.tensor([[1.0, 2.0]], dtype=F64)
    for network, wanted in zip((first, second, third), ((0.7, 1.0), (0.6, 0.8), (0.045, 0.06)), strict=True):
        assert ig.interpret(network, x)[0].tolist() == pytest.approx(wanted, abs=1e-15)


def test_moved_weights_come_from_where_they_were() -> None:
    first, _, _ = example()
    morphism = InsertNeuron(2, after=0, others=(1,), weights=(0.25, -0.35))(first)
    trained = {"weight.input_output": torch.tensor([[1.0, 3.0], [2.0, 4.0]], dtype=F64)}
    after = morphism.after.with_tensors(morphism.tensors(trained))
    assert edges(after) == {(0, 4): 0.25, (1, 4): -0.35, (4, 2): 1, (4, 3): 2, (1, 2): 3, (1, 3): 4}


# ---- the paper's remarks ------------------------------------------------------------------------------------------


def grown(
    inputs: int, outputs: int, parents: int, insertions: int, seed: int
) -> Iterable[tuple[InsertNeuron, Network]]:
    network = start(inputs, outputs, seed=seed)
    for n in range(insertions):
        pass_ = InsertNeuron(parents, seed=1000 * seed + n)
        network = pass_(network).after
        yield pass_, network


@pytest.mark.parametrize("block", range(4))
def test_the_remarks_hold_on_two_hundred_networks(block: int) -> None:
    for seed in range(50 * block, 50 * (block + 1)):
        draw = np.random.default_rng(seed)
        inputs, outputs, insertions = draw.integers(1, 6), draw.integers(1, 5), draw.integers(1, 13)
        parents = int(draw.integers(1, inputs + 1))
        before = start(int(inputs), int(outputs), seed=seed)
        for _, after in grown(int(inputs), int(outputs), parents, int(insertions), seed):
            assert_remarks(before, after, parents, f"seed {seed}")
            before = after
        before.verify()


def assert_remarks(before: Network, after: Network, parents: int, where: str) -> None:
    depth = depths(after)
    outputs = set(after.ids("output").tolist())
    deepest = max(depth.values())
    assert {i for i, d in depth.items() if d == deepest} == outputs, where  # all outputs and only outputs
    assert after.counts.parameters == before.counts.parameters + parents, where  # exactly I new parameters
    (new,) = set(depth) - set(depths(before))
    came = [a for a, b in edges(after) if b == new]
    assert len(came) == parents, where
    (j,) = [a for a, b in primary(after) if b == new]
    assert depth[new] == depth[j] + 1, where
    for i in set(depth) - outputs - set(after.ids("input").tolist()):  # only outputs have several primary parents
        assert sum(b == i for _, b in primary(after)) == 1, where
    if depth[new] == max(depths(before).values()):  # inserted at the old maximal depth: primary parent of every output
        assert {(new, i) for i in outputs} <= primary(after), where
    assert all(depth[k] <= depth[j] for k in came), where
    assert {a for a, _ in edges(after)} == set(depth) - outputs, where  # every other neuron has children
    assert all(depth[a] < depth[b] for a, b in edges(after)), where  # no cycle
    moved = set(edges(before)) - set(edges(after))
    assert all(a == j for a, _ in moved), where
    assert sorted(edges(before).values()) == sorted(w for (a, b), w in edges(after).items() if b != new), where
    assert all(abs(w) <= 0.5 for (a, b), w in edges(after).items() if b == new), where


def test_the_reading_of_equal_depths() -> None:
    """A child as deep as the new neuron moves only if its edge is in pi0."""
    for seed in range(60):
        before = start(4, 2, seed=seed)
        for pass_, after in grown(4, 2, 3, 6, seed):
            (new,) = set(depths(after)) - set(depths(before))
            (j,) = [a for a, b in primary(after) if b == new]
            old, was = depths(before), primary(before)
            for a, i in edges(before):
                if a == j:
                    moves = old[i] > old[j] + 1 or (old[i] == old[j] + 1 and (j, i) in was)
                    assert ((new, i) in edges(after)) == moves == ((j, i) not in edges(after)), str(pass_)
                    if moves:
                        assert ((new, i) in primary(after)) == ((j, i) in was)
            before = after


def test_the_same_seed_gives_the_same_network() -> None:
    one, two, other = ([n for _, n in grown(3, 2, 2, 8, seed)][-1] for seed in (5, 5, 6))
    assert one == two != other


def test_primary_parents_are_uniform() -> None:
    network = [n for _, n in grown(3, 2, 2, 5, 1)][-1]
    candidates = set(depths(network)) - set(network.ids("output").tolist())
    count = dict.fromkeys(candidates, 0)
    for seed in range(800):
        after = InsertNeuron(1, seed=seed)(network).after
        (j,) = [a for a, b, _ in after.edges() if b == network.next_serial]
        count[j] += 1
    expected = 800 / len(candidates)
    assert sum((n - expected) ** 2 / expected for n in count.values()) < 30  # chi-square, 7 degrees of freedom


# ---- other networks, and refusals -----------------------------------------------------------------------------


def test_it_keeps_its_promise_on_any_network_of_single_edges() -> None:
    done = 0
    for seed in range(40):
        net = random_network(seed, kinds=("dense", "sparse", "loop", "two_loops", "skip"), norms=(), ties=False)
        for pass_ in InsertNeuron.places(net):
            assert_promise(pass_, net)
            done += 1
            break
    assert done > 10


def test_parallel_edges_stay_apart() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 2), b.output("y", 1)
    b.connect("x", "y", weight=torch.tensor([[1.0, 2.0]])), b.connect("x", "y", weight=torch.tensor([[10.0, 20.0]]))
    net = b.build()
    after = InsertNeuron(1, after=0, weights=(0.5,))(net).after.verify()
    assert sorted(after.edges()) == [(0, 3, 0.5), (1, 2, 2.0), (1, 2, 20.0), (3, 2, 1.0), (3, 2, 10.0)]


NET = [n for _, n in grown(2, 2, 2, 3, 0)][-1]
REFUSED = {
    "no parents": (NET, InsertNeuron(0), Refused, r"InsertNeuron: found parents=0, expected at least 1"),
    "too many parents": (
        start(2, 1),
        InsertNeuron(3),
        Refused,
        r"parents=3: found 2 neurons that are not deeper than the primary parent, expected at least 3; use fewer",
    ),
    "an unknown activation": (NET, InsertNeuron(activation="rleu"), UnknownName, r"activation .rleu.: expected one of"),
    "after an output": (NET, InsertNeuron(after=2), Refused, r"InsertNeuron: after neuron 2: found an output neuron"),
    "after nothing": (NET, InsertNeuron(after=99), UnknownName, r"neuron 99: expected the number of a neuron"),
    "others that are outputs": (NET, InsertNeuron(after=0, others=(2,)), Refused, r"others=\(2,\): expected 1"),
    "the wrong number of weights": (
        NET,
        InsertNeuron(2, weights=(0.5,)),
        Refused,
        r"InsertNeuron: weights: found \(0.5,\), expected 2 finite numbers, the primary parent's first",
    ),
    "weights that are not finite": (NET, InsertNeuron(1, weights=(float("nan"),)), Refused, r"weights: found \(nan,\)"),
    "another activation of the group": (
        NET,
        InsertNeuron(activation="tanh"),
        Refused,
        r"group 'inserted': found shape \(3,\), relu, expected a flat tanh group without bias; give another `group`",
    ),
    "an output group": (NET, InsertNeuron(activation="identity", group="output"), Refused, r"found an input or output"),
    "shared weights": (ig.cnn((1, 4, 4), [1], 1), InsertNeuron(), Refused, r"expected trained weights of their own"),
    "a norm": (ig.mlp([2, 2, 1], norm="batch"), InsertNeuron(), Refused, r"group 'hidden': found a batch norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    network, pass_, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        pass_(network)
    with pytest.raises(error):
        pass_.requires(network)
