"""Networks as values: names, numbers, counts, equality, hashes, and their text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import irgrow as ig
from irgrow.ir.errors import BadName, BadShape, UnknownName
from irgrow.ir.network import Group, Network, Unit
from irgrow.testing import random_network, seeded_networks

F64 = torch.float64


def small() -> Network:
    b = ig.Builder(seed=1, dtype=F64)
    b.input("x", (2, 3, 4))
    b.group("h", 3, activation="tanh", bias=True, norm="batch")
    b.output("y", 2, bias=True)
    b.connect("x", "h")
    b.connect("h", "y")
    return b.build()


def test_a_neuron_has_a_number_that_says_where_it_is() -> None:
    net = small()
    assert net.ids("x").tolist() == [*range(24)] and net.ids("h").tolist() == [24, 25, 26]
    assert net.neuron(17) == (17, "x", 1, 5) and net.neuron(26) == (26, "h", 2, 0)
    assert [n.id for n in net.neurons()] == [*range(29)]
    assert net.parents(27) == [24, 25, 26] and net.children(26) == [27, 28] and net.parents(3) == []
    for lookup in (net.neuron, net.parents, net.children):
        with pytest.raises(UnknownName, match="neuron 29: expected the number of a neuron of this network"):
            lookup(29)


def test_a_unit_is_named_by_its_serial() -> None:
    net = small()
    unit = net.unit("x", 1)
    assert unit == Unit("x", 12) and str(unit) == "x#12" and net.index(unit) == 1
    assert net.unit("h", -1) == Unit("h", 26)
    with pytest.raises(UnknownName, match="unit 3 of group 'h': expected 0 to 2"):
        net.unit("h", 3)
    with pytest.raises(UnknownName, match="unit h#12: expected a serial of group 'h'"):
        net.index(Unit("h", 12))


def test_unknown_names_say_what_there_is() -> None:
    net = small()
    with pytest.raises(UnknownName, match="group 'z': expected one of x, h, y"):
        net.group("z")
    with pytest.raises(UnknownName, match="bundle 'x_y': expected one of x_h, h_y"):
        net.bundle("x_y")
    with pytest.raises(UnknownName, match="tensor 'weight.z': expected one of weight.x_h"):
        net.with_tensors({"weight.z": torch.zeros(1)})
    with pytest.raises(BadShape, match=r"tensor 'bias.h': found \(2,\), expected \(3,\)"):
        net.with_tensors({"bias.h": torch.zeros(2)})
    with pytest.raises(BadName, match="group 'a': found a second group of that name, expected unique names"):
        Network.build([Group("a", (1,)), Group("a", (2,))], [], ["a"], ["a"])


def test_counts() -> None:
    net = ig.cnn((3, 8, 8), [4], 10, norm="batch")
    assert net.counts == (
        3 * 64 + 4 * 64 + 4 * 16 + 10,
        4 * 3 * 22 * 22 + 4 * 64 + 640,
        4 * 27 + 4 + 8 + 640 + 10,
        4 * 3 * 22 * 22 + 640,
    )
    assert sum(1 for _ in net.edges()) == net.counts.edges


@given(seeded_networks(steps=4))
def test_counts_are_sums_over_edges(network: Network) -> None:
    edges = list(network.edges())
    assert network.counts.edges == len(edges)
    assert network.counts.neurons == len(set(network.neurons())) == len({n.id for n in network.neurons()})
    numbers = {n.id for n in network.neurons()}
    assert all(a in numbers and b in numbers for a, b, _ in edges)
    assert max(numbers) < network.next_serial


def test_what_is_trained() -> None:
    net = ig.cnn((1, 4, 4), [2], 2, norm="batch")
    assert "weight.conv1_pool1" not in net.trainable() and "mean.conv1" not in net.trainable()
    assert {"weight.input_conv1", "bias.conv1", "scale.conv1", "shift.conv1"} <= set(net.trainable())


# ---- equality and hashes ----------------------------------------------------------------------------------------


@given(seeded_networks(steps=3), st.integers(0, 100))
def test_clones_are_equal_and_other_values_are_not(network: Network, seed: int) -> None:
    clone = network.clone()
    assert clone == network and clone.structure == network.structure
    name = sorted(network.tensors())[seed % len(network.tensors())]
    clone.tensors()[name].view(-1)[0] += 1
    assert clone != network and clone.structure == network.structure
    assert network.to(torch.float16) != network


def test_the_structure_is_everything_but_values() -> None:
    base = small()
    h, bundle = base.groups["h"], base.bundles["x_h"]
    assert h.norm is not None
    others = [
        replace(base, groups=dict(base.groups) | {"h": replace(h, activation="relu")}),
        replace(base, groups=dict(base.groups) | {"h": replace(h, aggregation="max")}),
        replace(base, groups=dict(base.groups) | {"h": replace(h, dropout=0.5)}),
        replace(base, groups=dict(base.groups) | {"h": replace(h, bias=None)}),
        replace(base, groups=dict(base.groups) | {"h": replace(h, serials=h.serials[::-1])}),
        replace(base, groups=dict(base.groups) | {"h": replace(h, norm=replace(h.norm, eps=1e-3))}),
        replace(base, bundles=dict(base.bundles) | {"x_h": replace(bundle, trainable=False)}),
        replace(
            base,
            bundles=dict(base.bundles) | {"x_h": replace(bundle, pattern=bundle.pattern.to_sparse((2, 3, 4), (3,)))},
        ),
        replace(base, bundles=dict(reversed(base.bundles.items()))),
        replace(base, outputs=("y", "h")),
        replace(base, next_serial=99),
    ]
    assert len({n.structure for n in (base, *others)}) == len(others) + 1


def test_sparse_structure_counts_and_the_order_of_tags_does_not() -> None:
    def network(source: list[int], tags: dict[str, list[int]]) -> Network:
        b = ig.Builder()
        b.input("x", 3), b.output("y", 1)
        pattern = ig.Sparse(np.array(source), np.zeros(2, int), tags={k: np.array(v) for k, v in tags.items()})
        b.connect("x", "y", pattern, torch.ones(2))
        return b.build()

    base = network([0, 1], {"a": [1, 2], "b": [3, 4]})
    assert base == network([0, 1], {"b": [3, 4], "a": [1, 2]})
    others = [
        network([0, 2], {"a": [1, 2], "b": [3, 4]}),
        network([0, 1], {"a": [1, 2], "b": [3, 5]}),
        network([0, 1], {"a": [1, 2]}),
    ]
    assert len({n.structure for n in (base, *others)}) == 4


def test_with_tensors_keeps_structure_and_what_was_computed() -> None:
    net = random_network(5)
    _ = net.levels, net.structure
    moved = net.with_tensors({n: t + 1 for n, t in net.tensors().items() if n.startswith("bias")})
    assert moved.levels is net.levels and moved.structure == net.structure
    assert all(a is b for a, b in zip(moved.groups, net.groups, strict=True))


def test_a_network_cannot_be_changed() -> None:
    net = small()
    with pytest.raises(TypeError):
        net.groups["h"] = net.groups["y"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        net.inputs = ()  # type: ignore[misc]


# ---- text -------------------------------------------------------------------------------------------------------


def test_text_of_an_mlp() -> None:
    assert str(ig.mlp([64, 16, 10])) == (
        "network: 3 groups, 90 neurons, 1,184 edges, 1,210 parameters, 1,184 multiply-adds, float32\n"
        "  input   64  input\n"
        "  hidden  16  bias, relu\n"
        "                <- input  dense  [input_hidden]\n"
        "  output  10  output, bias\n"
        "                <- hidden  dense  [hidden_output]"
    )
    assert repr(ig.mlp([64, 16, 10])) == "<Network: 3 groups, 90 neurons, 1184 edges, 1210 parameters>"


def test_text_of_everything_else() -> None:
    b = ig.Builder(dtype=F64)
    b.input("image", (2, 8, 8))
    b.group("conv", (4, 4, 4), activation="gelu", norm="group", norm_groups=2, bias=True, dropout=0.1)
    b.group("free", (4, 4, 4))
    b.group("pooled", (4, 2, 2), aggregation="max")
    b.group("mean", (4, 2, 2))
    b.group("both", (8, 2, 2))
    b.group("loop", 3, activation="relu")
    b.output("y", 2)
    b.connect("image", "conv", ig.Conv2d(3, 2, 1, channel_groups=2))
    b.connect("conv", "free", ig.Local2d((3, 1), padding=(1, 0)))
    b.connect("free", "free", ig.Sparse(np.array([0]), np.array([1])), name="within")
    b.connect("conv", "pooled", ig.Pool2d(2, 2))
    b.connect("conv", "mean", ig.Pool2d((2, 2), (2, 2)), 0.25)
    b.connect("pooled", "both", ig.Identity())
    b.connect("mean", "both", ig.Identity(4), 1.0, trainable=True)
    b.connect("both", "loop", ig.Sparse(np.array([0, 1]), np.array([0, 0]), np.array([0, 0])))
    b.connect("loop", "loop", ig.Sparse(np.array([0, 1]), np.array([1, 2])))
    b.connect("loop", "y", trainable=False)
    assert str(b.build()) == (
        "network: 8 groups, 325 neurons, 1,295 edges, 693 parameters, 1,135 multiply-adds, float64\n"
        "  image   2x8x8  input\n"
        "  conv    4x4x4  bias, group norm, gelu, dropout 0.1\n"
        "                   <- image  conv 3x3 stride 2 padding 1 channel groups 2  [image_conv]\n"
        "  free    4x4x4  sum\n"
        "                   <- conv  local 3x1 padding 1,0  [conv_free]\n"
        "                   <- free  sparse, 1 edges  [within]\n"
        "  pooled  4x2x2  max\n"
        "                   <- conv  pool 2x2 stride 2  [conv_pooled]\n"
        "  mean    4x2x2  sum\n"
        "                   <- conv  pool 2x2 stride 2, fixed weight 0.25  [conv_mean]\n"
        "  both    8x2x2  sum\n"
        "                   <- pooled  identity  [pooled_both]\n"
        "                   <- mean  identity into units from 4, one trained weight  [mean_both]\n"
        "  loop        3  relu\n"
        "                   <- both  sparse, 2 edges, 1 shared weights  [both_loop]\n"
        "                   <- loop  sparse, 2 edges  [loop_loop]\n"
        "  y           2  output\n"
        "                   <- loop  dense, fixed weights  [loop_y]"
    )


def test_text_of_groups_that_feed_each_other() -> None:
    b = ig.Builder()
    b.input("x", 1), b.group("a", 2), b.group("b", 2), b.output("y", 1)
    b.connect("x", "a"), b.connect("a", "y")
    (
        b.connect("a", "b", ig.Sparse(np.array([0]), np.array([0]))),
        b.connect("b", "a", ig.Sparse(np.array([0]), np.array([1]))),
    )
    assert "  a  2  sum  (in a loop of groups)\n" in str(b.build())


@given(seeded_networks())
def test_text_names_every_group_and_bundle(network: Network) -> None:
    text = str(network)
    assert all(f"  {name}  " in text or f"  {name} " in text for name in network.groups)
    assert all(f"[{name}]" in text for name in network.bundles)
