"""Building networks: what comes out, and what is refused by name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import irgrow as ig
from irgrow.ir.errors import BadName, BadProperty, BadShape, DanglingEdge, IrgrowError, UnknownName, Unreachable
from irgrow.ir.network import Norm
from irgrow.kernels.activations import ACTIVATIONS


def begun(**how) -> ig.Builder:
    b = ig.Builder(**how)
    b.input("x", 3)
    b.group("h", 4, bias=True)
    b.output("y", 2)
    return b


def test_the_same_seed_gives_the_same_network() -> None:
    assert ig.mlp([3, 4, 2], seed=3) == ig.mlp([3, 4, 2], seed=3) != ig.mlp([3, 4, 2], seed=4)
    assert ig.cnn((1, 8, 8), [2], 3, seed=1) == ig.cnn((1, 8, 8), [2], 3, seed=1)


def test_initial_weights_are_those_of_torch_s_layers() -> None:
    net = ig.mlp([100, 200, 10], dtype=torch.float64)
    for name, fan_in in (("weight.input_hidden", 100), ("bias.hidden", 100), ("weight.hidden_output", 200)):
        values = net.tensors()[name]
        assert values.abs().max() <= 1 / math.sqrt(fan_in)
        assert values.std() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.15)
    conv = ig.cnn((4, 8, 8), [32], 10).tensors()["weight.input_conv1"]
    assert 0.9 / 6 < conv.abs().max() <= 1 / 6


def test_a_bias_is_drawn_once() -> None:
    b = begun()
    b.connect("x", "h")
    first = b._groups["h"].bias
    assert first is not None and first.any()
    kept = first.clone()
    b.connect("x", "h", name="again")
    b.connect("h", "y")
    assert torch.equal(b.build().tensors()["bias.h"], kept)


def test_constants_are_exact_in_float64() -> None:
    b = ig.Builder(dtype=torch.float64)
    b.input("x", (1, 3, 3)), b.output("y", (1, 1, 1))
    b.connect("x", "y", ig.Pool2d(3), 1 / 9)
    assert b.build().tensors()["weight.x_y"].item() == 1 / 9


def test_weights_of_identity_and_pooling_are_fixed_unless_asked() -> None:
    b = ig.Builder()
    b.input("x", 2), b.output("y", 2), b.output("z", 2), b.output("w", 2)
    b.connect("x", "y", ig.Identity())
    b.connect("x", "z", ig.Identity(), 0.5)
    b.connect("x", "w", ig.Identity(), trainable=True)
    assert b.build().trainable() == ["weight.x_w"]


def test_a_norm_may_be_given_or_named() -> None:
    b = begun(dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    b.group("n", 4, norm=Norm("layer", 2 * ones, ones))
    b.group("m", 4, norm="group", norm_groups=2)
    b.connect("x", "n"), b.connect("n", "m"), b.connect("m", "y")
    net = b.build()
    assert net.tensors()["scale.n"].tolist() == [2.0] * 4
    norm = net.groups["m"].norm
    assert norm is not None and (norm.kind, norm.groups) == ("group", 2)


def test_free_names() -> None:
    b = begun()
    assert [b.connect("x", "h") for _ in range(3)] == ["x_h", "x_h_2", "x_h_3"]


# ---- neuron by neuron -------------------------------------------------------------------------------------------


def test_single_neurons() -> None:
    b = ig.Builder(dtype=torch.float64)
    x, u = b.neuron(role="input"), b.neuron(role="input")
    h = b.neuron("relu")
    t = b.neuron("leaky_relu", bias=0.25)
    y = b.neuron("identity", role="output")
    for source, target, weight in ((x, h, 2.0), (u, h, -1.0), (h, t, 1.0), (x, t, 3.0), (t, y, 0.5)):
        b.connect(source, target, weight)
    net = b.build()
    assert list(net.groups) == ["input", "hidden_relu", "hidden_leaky_relu_bias", "output_identity"]
    assert [n.id for n in net.neurons()] == [x, u, h, t, y]
    assert net.parents(t) == [h, x] and net.groups["hidden_leaky_relu_bias"].activation == "leaky_relu"
    out = ig.interpret(net, torch.tensor([[1.0, 0.5]], dtype=torch.float64))
    assert out.item() == 0.5 * (2 * 1 - 0.5 + 3 * 1 + 0.25)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_single_neurons_of_every_activation(activation: str) -> None:
    b = ig.Builder()
    x = b.neuron(role="input")
    y = b.neuron(activation, role="output", bias=0.5)
    b.connect(x, y, 2.0)
    net = b.build()
    (name,) = net.outputs
    assert net.groups[name].activation == activation
    wanted = ACTIVATIONS[activation].function(torch.tensor([[2.5]], dtype=torch.float64))
    torch.testing.assert_close(ig.interpret(net, torch.ones(1, 1)), wanted)


def test_neurons_may_be_connected_in_any_order() -> None:
    b = ig.Builder()
    y = b.neuron(role="output")
    h = b.neuron("tanh")
    x = b.neuron(role="input")
    b.connect(h, y, 1.0), b.connect(x, h, 1.0)
    assert b.build().depth == 2


# ---- refusals ---------------------------------------------------------------------------------------------------

REFUSED = {
    "a group twice": (lambda b: b.group("h", 2), BadName, r"group 'h': found a second group of that name"),
    "an unknown activation": (
        lambda b: b.group("z", 2, activation="rleu"),
        BadProperty,
        r"group 'z': activation: found 'rleu', expected one of identity, relu",
    ),
    "an unknown source": (lambda b: b.connect("z", "h"), UnknownName, r"group 'z': expected one of x, h, y"),
    "a bundle twice": (
        lambda b: [b.connect("x", "h", name="a") for _ in range(2)],
        BadName,
        r"bundle 'a': found a second bundle of that name",
    ),
    "a weight of the wrong shape": (
        lambda b: b.connect("x", "h", weight=torch.zeros(3, 4)),
        BadShape,
        r"bundle 'x' -> 'h': weight: found \(3, 4\), expected \(4, 3\)",
    ),
    "a pattern that is none": (
        lambda b: b.connect("x", "h", "dense"),
        BadProperty,
        r"bundle 'x' -> 'h': pattern: found 'dense', expected a Pattern such as Dense\(\)",
    ),
    "a pattern that does not fit": (
        lambda b: b.connect("x", "h", ig.Conv2d(1)),
        BadShape,
        r"Conv2d: source shape: found \(3,\), expected \(channels, height, width\)",
    ),
    "an unknown role": (lambda b: b.neuron(role="sensor"), BadProperty, r"neuron: role: found 'sensor', expected in"),
    "an unknown activation of a neuron": (lambda b: b.neuron("rleu"), BadProperty, r"activation: found 'rleu'"),
    "an edge from a group to a neuron": (
        lambda b: b.connect("x", b.neuron()),
        DanglingEdge,
        r"connect: found neuron 'x', expected a number from 0 to 0",
    ),
    "an edge to no neuron": (lambda b: b.connect(b.neuron(), 7), DanglingEdge, r"connect: found neuron 7"),
    "a neuron in a group's place": (
        lambda b: (b.group("hidden_relu", 2), b.neuron("relu")),
        BadName,
        r"neuron: group 'hidden_relu': found a group of that name",
    ),
    "a network nobody feeds": (lambda b: b.build(), Unreachable, r"output 'y': found neuron 7 \(2 in all\)"),
    "a sparse pattern out of range": (
        lambda b: b.connect("x", "h", ig.Sparse(np.array([3]), np.array([0]))),
        DanglingEdge,
        r"Sparse: source of edge 0: found neuron 3, expected 0 to 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    do, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        do(begun())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ig.mlp([3]), r"mlp: widths: found \[3\], expected at least two positive integers"),
        (lambda: ig.mlp([3, 0, 2]), r"mlp: widths: found \[3, 0, 2\]"),
        (
            lambda: ig.cnn((8, 8), [2], 3),
            r"cnn: found image \(8, 8\), pooling 'max', expected \(channels, height, width\)",
        ),
        (lambda: ig.cnn((1, 8, 8), [2], 3, pooling="sum"), r"cnn: found image \(1, 8, 8\), pooling 'sum'"),
        (lambda: ig.cnn((1, 4, 4), [2, 2, 2, 2], 3), r"Pool2d over a 1x1 image: found an output of 0x0"),
    ],
)
def test_recipes_that_cannot_be(make, text: str) -> None:
    with pytest.raises(IrgrowError, match=text):
        make()
