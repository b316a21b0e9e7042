"""The interpreter means what torch's layers mean, gradients included; small cases by hand where torch has none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import irgrow as ig
from irgrow.ir.errors import BadData
from irgrow.ir.interpreter import interpret, interpret_groups
from irgrow.ir.network import Network
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.testing import inputs_for, networks

F64 = torch.float64


def held(network: Network) -> dict[str, Tensor]:
    trained = set(network.trainable())
    return {n: t.detach().double().clone().requires_grad_(n in trained) for n, t in network.tensors().items()}


def assert_same(network: Network, reference, *, train: bool = False) -> None:
    """Outputs and all gradients agree with `reference(tensors, *inputs)`."""
    x = [t.requires_grad_() for t in inputs_for(network, 5, dtype=F64)]
    ours, theirs = held(network), held(network)
    a = interpret(network, *x, tensors=ours, train=train)
    b = reference(theirs, *x)
    a, b = (v if isinstance(v, tuple) else (v,) for v in (a, b))
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(v.shape, generator=draw, dtype=F64) for v in a]
    for u, v in zip(a, b, strict=True):
        torch.testing.assert_close(u, v, rtol=0, atol=1e-12)
    names = network.trainable()
    first = torch.autograd.grad(a, [*(ours[n] for n in names), *x], cotangents, allow_unused=True)
    second = torch.autograd.grad(b, [*(theirs[n] for n in names), *x], cotangents, allow_unused=True)
    for name, g, h in zip([*names, *(f"input {n}" for n in network.inputs)], first, second, strict=True):
        assert (g is None) == (h is None) or not (g if h is None else h).any(), name
        if g is not None and h is not None:
            torch.testing.assert_close(g, h, rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation: str) -> None:
    net = ig.mlp([5, 7, 6, 3], activation=activation, dtype=F64)

    def reference(t, x):
        function = ACTIVATIONS[activation].function
        h = function(F.linear(x, t["weight.input_hidden1"], t["bias.hidden1"]))
        h = function(F.linear(h, t["weight.hidden1_hidden2"], t["bias.hidden2"]))
        return F.linear(h, t["weight.hidden2_output"], t["bias.output"])

    assert_same(net, reference)


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("train", [False, True])
def test_cnn_with_batch_norm_and_pooling(pooling: str, train: bool) -> None:
    net = ig.cnn((2, 7, 6), [3, 4], 3, norm="batch", pooling=pooling, dtype=F64)
    net = net.with_tensors({n: t + 0.1 * torch.rand_like(t) for n, t in net.tensors().items() if t.dim() == 1})

    def reference(t, x):
        for n, last in ((1, "input"), (2, "pool1")):
            x = F.conv2d(x, t[f"weight.{last}_conv{n}"], t[f"bias.conv{n}"], padding=1)
            mean, variance = t[f"mean.conv{n}"], t[f"variance.conv{n}"]
            if train:
                mean, variance = None, None
            x = torch.relu(F.batch_norm(x, mean, variance, t[f"scale.conv{n}"], t[f"shift.conv{n}"], train))
            x = F.max_pool2d(x, 2) if pooling == "max" else F.avg_pool2d(x, 2)
        return F.linear(x.flatten(1), t["weight.pool2_output"], t["bias.output"])

    assert_same(net, reference, train=train)


@pytest.mark.parametrize(
    "pattern",
    [
        ig.Conv2d((3, 2), (2, 1), (1, 2), (1, 2)),
        ig.Conv2d((2, 2), channel_groups=2),
        ig.Conv2d((3, 3), (1, 1), (1, 1), channel_groups=4),
        ig.Conv2d(2, 2, 0, 2, channel_groups=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_convolutions(pattern: ig.Conv2d, activation: str) -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", (4, 6, 5))
    b.output("y", (8, *pattern.output((4, 6, 5))), activation=activation, bias=True)
    b.connect("x", "y", pattern)

    def reference(t, x):
        z = F.conv2d(
            x, t["weight.x_y"], t["bias.y"], pattern.stride, pattern.padding, pattern.dilation, pattern.channel_groups
        )
        return ACTIVATIONS[activation].function(z)

    assert_same(b.build(), reference)


@pytest.mark.parametrize("channel_groups", [1, 2])
def test_a_convolution_without_sharing_is_a_product_of_patches(channel_groups: int) -> None:
    pattern = ig.Local2d((3, 2), (2, 1), (1, 1), (1, 2), channel_groups=channel_groups)
    h, w = pattern.output((4, 6, 5))
    b = ig.Builder(dtype=F64)
    b.input("x", (4, 6, 5))
    b.output("y", (6, h, w), bias=True)
    b.connect("x", "y", pattern)

    def reference(t, x):
        patches = F.unfold(x, pattern.kernel, pattern.dilation, pattern.padding, pattern.stride)
        patches = patches.reshape(x.shape[0], channel_groups, 4 // channel_groups, 3, 2, h, w)
        weight = t["weight.x_y"].reshape(channel_groups, 6 // channel_groups, 4 // channel_groups, 3, 2, h, w)
        return torch.einsum("bgcklhw,gockl hw->bgohw".replace(" ", ""), patches, weight).reshape(-1, 6, h, w) + t[
            "bias.y"
        ].reshape(6, 1, 1)

    assert_same(b.build(), reference)


@pytest.mark.parametrize("kind", ["layer", "group"])
def test_norms_over_units(kind: str) -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", (2, 3, 4))
    b.group("h", (4, 3, 4), activation="gelu", norm=kind, norm_groups=2 if kind == "group" else 1, bias=True)
    b.connect("x", "h", ig.Conv2d(1))
    b.output("y", 2)
    b.connect("h", "y")

    def reference(t, x):
        z = F.conv2d(x, t["weight.x_h"], t["bias.h"])
        z = F.group_norm(z, 2 if kind == "group" else 1, t["scale.h"], t["shift.h"])
        return F.linear(F.gelu(z).flatten(1), t["weight.h_y"])

    assert_same(b.build(), reference)


def test_residual_sum_concatenation_and_a_skip() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", (2, 4, 4))
    b.input("u", 3)
    b.group("a", (3, 4, 4), activation="relu", bias=True)
    b.group("sum", (3, 4, 4), activation="silu")
    b.group("both", (5, 4, 4))
    b.output("y", 4, bias=True)
    b.output("z", 2)
    b.connect("x", "a", ig.Conv2d(3, padding=1))
    b.connect("a", "sum", ig.Conv2d(3, padding=1, channel_groups=3))
    b.connect("a", "sum", ig.Identity())
    b.connect("sum", "both", ig.Identity(2), 0.5, trainable=True)
    b.connect("x", "both", ig.Identity())
    b.connect("both", "y")
    b.connect("u", "y")
    b.connect("u", "z")

    def reference(t, x, u):
        a = torch.relu(F.conv2d(x, t["weight.x_a"], t["bias.a"], padding=1))
        s = F.silu(F.conv2d(a, t["weight.a_sum"], padding=1, groups=3) + a)
        both = torch.cat([x, t["weight.sum_both"] * s], 1)
        y = F.linear(both.flatten(1), t["weight.both_y"], t["bias.y"]) + F.linear(u, t["weight.u_y"])
        return y, F.linear(u, t["weight.u_z"])

    assert_same(b.build(), reference)


def test_dense_to_an_image_adds_the_bias_per_unit() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 3)
    b.output("y", (2, 2, 3), bias=True)
    b.connect("x", "y")

    def reference(t, x):
        return F.linear(x, t["weight.x_y"]).reshape(-1, 2, 2, 3) + t["bias.y"].reshape(2, 1, 1)

    assert_same(b.build(), reference)


def test_max_pooling_with_padding_ignores_the_padding() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", (2, 5, 4))
    pattern = ig.Pool2d(3, 2, 1)
    b.output("y", (2, *pattern.output((2, 5, 4))), aggregation="max")
    b.connect("x", "y", pattern)
    assert_same(b.build(), lambda t, x: F.max_pool2d(t["weight.x_y"] * x, 3, 2, 1))


# ---- by hand --------------------------------------------------------------------------------------------------


def sparse(source, target, index=None, **how) -> ig.Sparse:
    return ig.Sparse(np.array(source), np.array(target), None if index is None else np.array(index), **how)


def test_ties_share_one_weight() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 2)
    b.output("y", 2)
    b.connect("x", "y", sparse([0, 1, 1], [0, 0, 1], [1, 0, 1]), torch.tensor([10.0, 2.0]))
    net = b.build()
    t = held(net)
    y = interpret(net, torch.tensor([[1.0, 3.0]], dtype=F64), tensors=t)
    assert y.tolist() == [[2 * 1 + 10 * 3, 2 * 3]]
    y.backward(torch.tensor([[1.0, 5.0]]).double())
    assert t["weight.x_y"].grad.tolist() == [3, 1 * 1 + 5 * 3]


def test_a_group_that_feeds_itself_is_walked_in_order() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 1)
    b.group("h", 3, activation="square")
    b.output("y", 1)
    b.connect("x", "h", sparse([0], [2]), torch.tensor([3.0]))
    b.connect("h", "h", sparse([0, 2, 2], [1, 0, 1]), torch.tensor([5.0, 2.0, 1.0]))
    b.connect("h", "y", sparse([1], [0]), torch.tensor([1.0]))
    net = b.build()
    assert net.levels["h"].tolist() == [2, 3, 1] and net.depth == 4
    h2 = (3 * 2.0) ** 2  # x = 2
    h0 = (2 * h2) ** 2
    h1 = (5 * h0 + h2) ** 2
    assert interpret(net, torch.tensor([[2.0]], dtype=F64)).item() == h1


def test_a_tie_of_a_max_sends_its_gradient_to_the_first_parent_in_edge_order() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 3)
    b.output("y", 2, aggregation="max")
    # neuron 0: parents 2, 0, 1 in edge order (over two bundles); neuron 1: parents 1 then 2
    b.connect("x", "y", sparse([2, 1, 2], [0, 1, 1]), torch.ones(3), name="first")
    b.connect("x", "y", sparse([0, 1], [0, 0]), torch.ones(2), name="second")
    net = b.build()
    x = torch.tensor([[7.0, 7.0, 7.0]], dtype=F64, requires_grad=True)
    t = held(net)
    interpret(net, x, tensors=t).backward(torch.tensor([[1.0, 10.0]], dtype=F64))
    assert x.grad.tolist() == [[0, 10, 1]]
    assert t["weight.first"].grad.tolist() == [7, 70, 0]
    assert t["weight.second"].grad.tolist() == [0, 0]


def test_a_neuron_without_parents_has_its_bias_alone() -> None:
    for aggregation in ("sum", "max"):
        b = ig.Builder(dtype=F64)
        b.input("x", 1)
        b.group("h", 2, activation="tanh", aggregation=aggregation, bias=torch.tensor([0.5, -2.0]))
        b.output("y", 2)
        b.connect("x", "h", sparse([0], [0]), torch.ones(1))
        b.connect("h", "y", ig.Identity())
        b.connect("x", "y")
        net = b.build()
        h = interpret_groups(net, torch.tensor([[1.0]], dtype=F64))["h"]
        torch.testing.assert_close(h, torch.tanh(torch.tensor([[1.5, -2.0]], dtype=F64)), rtol=0, atol=1e-15)


def test_a_sparse_target_of_many_levels_is_normalised_as_a_whole() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 2)
    b.group("a", 2, activation="tanh")
    b.group("h", 2, norm="layer")
    b.output("y", 2)
    b.connect("x", "a")
    b.connect("a", "h", sparse([0], [0]), torch.ones(1))
    b.connect("x", "h", sparse([0], [1]), torch.ones(1))
    b.connect("h", "y")
    net = b.build()
    assert net.levels["h"].tolist() == [2, 2]

    def reference(t, x):
        a = torch.tanh(F.linear(x, t["weight.x_a"]))
        z = torch.stack([a[:, 0] * t["weight.a_h"], x[:, 0] * t["weight.x_h"]], 1)
        return F.linear(F.layer_norm(z.squeeze(-1), (2,), t["scale.h"], t["shift.h"]), t["weight.h_y"])

    assert_same(net, reference)


@given(networks(steps=3, widest=4))
def test_any_network_gives_its_groups_and_finite_values(network: Network) -> None:
    x = inputs_for(network, 3)
    values = interpret_groups(network, *x)
    assert [tuple(v.shape) for v in values.values()] == [(3, *g.shape) for g in network.groups.values()]
    assert all(v.dtype == F64 and bool(torch.isfinite(v).all()) for v in values.values())
    interpret(network, *x, train=True)


def test_second_derivatives_exist() -> None:
    net = ig.mlp([3, 4, 2], activation="tanh", dtype=F64)
    x = inputs_for(net, 2)

    def f(w: Tensor) -> Tensor:
        return interpret(net, *x, tensors={"weight.input_hidden": w})

    w = net.tensors()["weight.input_hidden"].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(f, (w,))


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((), r"inputs: found 0 tensors, expected 1, one each for \('input',\)"),
        (
            (np.zeros((2, 3)),),
            "input 'input': found ndarray, expected a floating tensor of shape (batch, 3); use torch",
        ),
        ((torch.zeros(2, 4),), r"input 'input': found shape (2, 4), expected a floating tensor of shape (batch, 3)"),
        ((torch.zeros(2, 3, dtype=torch.long),), r"input 'input': found torch.int64, .*; convert it with .float()"),
        ((torch.tensor(1.0),), r"input 'input': found shape ()"),
    ],
)
def test_inputs_that_do_not_fit(inputs: tuple, text: str) -> None:
    with pytest.raises(BadData) as caught:
        interpret(ig.mlp([3, 2]), *inputs)
    assert all(part in str(caught.value) for part in text.replace("\\", "").split(".*"))


def test_batches_must_agree() -> None:
    b = ig.Builder()
    b.input("x", 2), b.input("u", 2), b.output("y", 1)
    b.connect("x", "y"), b.connect("u", "y")
    with pytest.raises(BadData, match=r"inputs: found batches of \[2, 3\] samples, expected one batch size"):
        interpret(b.build(), torch.zeros(2, 2), torch.zeros(3, 2))
