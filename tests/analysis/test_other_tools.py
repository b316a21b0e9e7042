"""Bottlenecks against brute force, ranks of any module, straight lines, and the names of the package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import irgrow as ig
from irgrow.analysis import Bottleneck, effective_ranks, expressivity_bottlenecks, interpolate
from irgrow.ir.errors import BadData, BadShape, StaleMorphism, UnknownName

F64 = torch.float64


def test_every_name_is_there() -> None:
    for name in ig.analysis.__all__:
        assert getattr(ig.analysis, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ig.analysis.nothing


def test_bottleneck_against_least_squares() -> None:
    network = ig.mlp([5, 3, 4], dtype=F64, seed=1)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=draw, dtype=F64), torch.randn(40, 4, generator=draw, dtype=F64)
    z = ig.interpret(network, x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.mse_loss(z, y) * len(x), z)  # per sample
    held = network.tensors()
    h = torch.relu(F.linear(x, held["weight.input_hidden"], held["bias.hidden"]))
    c = torch.cat([h, torch.ones(40, 1, dtype=F64)], 1)
    left = -g - c @ torch.linalg.lstsq(c, -g).solution
    found = expressivity_bottlenecks(ig.compile(network), (x, y), F.mse_loss, batch_size=11)["hidden"]
    assert found.desired == pytest.approx(float(g.square().sum()) / 40)
    assert found.psi == pytest.approx(float(left.square().sum()) / 40)
    assert 0 < found.share < 1
    with pytest.raises(BadData, match="no E"):
        Bottleneck.of(ig.probe(ig.compile(network), (x, y), F.mse_loss, sites=["hidden"])["hidden"])


def test_a_site_wide_enough_has_no_bottleneck() -> None:
    network = ig.mlp([5, 30, 2], activation="tanh", dtype=F64)
    x, y = torch.randn(20, 5, dtype=F64), torch.randn(20, 2, dtype=F64)
    found = expressivity_bottlenecks(ig.compile(network), (x, y), F.mse_loss)["hidden"]
    assert found.desired > 1e-3 and found.share < 1e-6


def test_effective_ranks_of_any_module() -> None:
    torch.manual_seed(0)
    network = ig.mlp([6, 9, 3], activation="tanh", dtype=F64)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    held = network.tensors()
    with torch.no_grad():
        held["weight.input_hidden"][4:] = held["weight.input_hidden"][:5].clone()  # four units twice
        held["bias.hidden"][4:] = held["bias.hidden"][:5].clone()
        model[0].weight.copy_(held["weight.input_hidden"]), model[0].bias.copy_(held["bias.hidden"])
    data = torch.randn(50, 6, dtype=F64), torch.zeros(50)
    assert effective_ranks(ig.compile(network), data, ["hidden"]) == {"hidden": 5}
    assert effective_ranks(model, data, ["1", "0"], batch_size=16) == {"1": 5, "0": 5}
    with pytest.raises(UnknownName, match="module 'tanh': expected one of 0, 1, 2"):
        effective_ranks(model, data, ["tanh"])
    with pytest.raises(BadShape, match=r"output of module '1': found \(50,\), expected one tensor"):
        effective_ranks(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), (data[0].float(), data[1]), ["1"])


def test_straight_lines() -> None:
    a, b = (ig.mlp([3, 4, 2], norm="batch", seed=seed) for seed in (0, 1))
    assert interpolate(a, b, 0.0) == a and interpolate(a, b, 1.0) == b
    middle = interpolate(a, b, 0.25).tensors()
    for name, tensor in middle.items():
        assert torch.allclose(tensor, 0.75 * a.tensors()[name] + 0.25 * b.tensors()[name])
    with pytest.raises(StaleMorphism, match="networks of different structures"):
        interpolate(a, ig.mlp([3, 5, 2]), 0.5)

    one, two = (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2))
    between = interpolate(one, two, 0.5)
    assert between is not one and torch.allclose(between[0].weight, (one[0].weight + two[0].weight) / 2)
    assert torch.equal(interpolate(one, two, 1.0)[0].weight, two[0].weight)
    with pytest.raises(StaleMorphism, match="different names or shapes"):
        interpolate(one, nn.Linear(2, 2), 0.5)
    with pytest.raises(StaleMorphism, match="Network and Linear"):
        interpolate(a, nn.Linear(2, 2), 0.5)


def test_a_cnn_and_its_embedding_are_joined() -> None:
    network = ig.cnn((1, 4, 4), [2], 3, dtype=F64)
    embedded = ig.EmbedConv()(network)
    moved = embedded.after.with_tensors({n: t + 0.1 for n, t in embedded.after.tensors().items() if t.dim()})
    masks = ig.analysis.local_masks(embedded)
    delta = [ig.analysis.deviation(interpolate(embedded.after, moved, t), masks) for t in (0.0, 0.5, 1.0)]
    assert delta[0] == 0 < delta[1] < delta[2]
    assert torch.equal(ig.interpret(interpolate(embedded.after, moved, 0.0), x := torch.randn(2, 1, 4, 4)),
                       ig.interpret(embedded.after, x))  # fmt: skip
