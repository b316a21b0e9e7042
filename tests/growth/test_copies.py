"""Copies, silent units, variance transfer: what they keep and how large they are."""

from __future__ import annotations

import math

import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, forked, mlp, mobile, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.probe import probe
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.interpreter import interpret_groups


def statistics(network, site: str | None = None):
    found = probe(ig.compile(network), [], F.cross_entropy, want=())
    return found[site or next(iter(found))]


def normed(flat: bool):
    """A network with a batch norm whose scale, shift, mean and variance are not the usual ones."""
    if flat:
        network = ig.mlp([6, 5, 3], activation="tanh", norm="batch", seed=0, dtype=DOUBLE)
    else:
        network = pooled("max", True, norm="batch")
    draw = torch.Generator().manual_seed(3)
    shapes = {n: t.shape for n, t in network.tensors().items() if not n.startswith(("weight.", "bias."))}
    return network.with_tensors({n: 0.5 + torch.rand(s, generator=draw, dtype=DOUBLE) for n, s in shapes.items()})


NETWORKS = {
    "mlp": mlp("relu"),
    "fork": forked("gelu"),
    "gaussian": mlp("gaussian", bias=False),
    "conv": conv_pair(ig.Conv2d((3, 3), padding=(1, 1)), ig.Conv2d((3, 3), (2, 2))),
    "pool": pooled("mean", False),
    "maxpool": pooled("max", True),
    "batch norm": normed(True),
    "conv batch norm": normed(False),
}


@pytest.mark.parametrize("fan_out", ["share", "zero"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_copies_keep_the_function(name: str, fan_out: str) -> None:
    network = NETWORKS[name]
    s, data = statistics(network), drawn(network, 12)
    p = ig.Copies(7, fan_out=fan_out).propose_with(s, ig.compile(network))
    after = ig.AddUnits(p)(network).after
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    assert relative(ig.interpret(after, *inputs), ig.interpret(network, *inputs)) < 1e-12
    values = interpret_groups(after, *inputs)[s.site]
    chosen = [int(n) for n in p.notes[-1].removeprefix("copies of units ").split(", ")]
    assert relative(values[:, s.units :], values[:, chosen]) < 1e-12
    assert bool(p.omega.any()) == (fan_out == "share") == bool(p.delta)


def test_copies_of_a_sparse_group() -> None:
    b = ig.Builder(seed=0, dtype=DOUBLE)
    b.input("x", 4)
    b.group("hidden", 3, activation="tanh")
    b.connect("x", "hidden", ig.Sparse(torch.tensor([0, 1, 2, 3, 0]).numpy(), torch.tensor([0, 1, 2, 2, 1]).numpy()))
    b.output("y", 2)
    b.connect("hidden", "y", ig.Sparse(torch.tensor([0, 1, 2, 2]).numpy(), torch.tensor([0, 1, 0, 1]).numpy()))
    network = b.build()
    x = torch.randn(9, 4, dtype=DOUBLE)
    p = ig.Copies(5).propose_with(statistics(network), ig.compile(network))
    assert relative(ig.interpret(ig.AddUnits(p)(network).after, x), ig.interpret(network, x)) < 1e-12


def test_noise_is_relative_and_drawn_from_the_seed() -> None:
    network = mlp("tanh", (200, 5, 3))
    s, model = statistics(network), ig.compile(network)
    plain, noisy = (ig.Copies(4, noise=n, seed=2).propose_with(s, model) for n in (0.0, 0.1))
    change = noisy.alpha - plain.alpha
    size = plain.alpha.norm(dim=1) / math.sqrt(201)
    assert relative(change.std(dim=1), 0.1 * size) < 0.15
    assert torch.equal(noisy.alpha, ig.Copies(4, noise=0.1, seed=2).propose_with(s, model).alpha)
    assert relative(noisy.omega, plain.omega) == 0


def test_copies_are_refused_where_they_are_none() -> None:
    with pytest.raises(Refused, match=r"Copies: site 'grown': found a depthwise convolution.*use SplitUnit"):
        ig.Copies().propose_with(statistics(mobile()), ig.compile(mobile()))
    network = residual()
    with pytest.raises(Refused, match="different biases in several groups"):
        ig.Copies(1).propose_with(statistics(network, "stream1"), ig.compile(network))
    with pytest.raises(Refused, match="Copies: noise"):
        ig.Copies(noise=-1.0)
    network = ig.mlp([6, 5, 3], bias=False, norm="batch", seed=0, dtype=DOUBLE)
    shifted = network.with_tensors({"shift.hidden": torch.ones(5, dtype=DOUBLE)})
    assert ig.Copies(1).propose_with(statistics(network), ig.compile(network)).bias is None
    with pytest.raises(Refused, match="a constant"):
        ig.Copies(1).propose_with(statistics(shifted), ig.compile(shifted))


def test_silent() -> None:
    network = mlp("relu")
    p = ig.Silent(2).propose(statistics(network))
    morphism = ig.AddUnits(p)(network).verify()
    assert isinstance(morphism.promise, ig.SameFunction)
    data = drawn(network, 8)
    assert relative(interpret_groups(morphism.after, data[0])["hidden1"][:, 5:], torch.ones(8, 2, dtype=DOUBLE)) == 0
    tensors = {n: t.clone().requires_grad_() for n, t in morphism.after.tensors().items()}
    F.cross_entropy(ig.interpret(morphism.after, data[0], tensors=tensors), data[1]).backward()
    gradient = tensors["weight.hidden1_hidden2"].grad
    assert gradient is not None and bool(gradient[:, 5:].any()) and torch.equal(gradient[:, 5], gradient[:, 6])
    with pytest.raises(Refused, match="Silent: site 'hidden1': found no bias"):
        ig.Silent().propose(statistics(mlp("relu", bias=False)))


@pytest.mark.parametrize("name", ["mlp", "conv", "maxpool"])
def test_variance_transfer(name: str) -> None:
    network = NETWORKS[name]
    s, data, model = statistics(network), drawn(network, 40), ig.compile(network)
    p = ig.VarianceTransfer(4).propose_with(s, model, data)
    after = ig.AddUnits(p)(network).after
    assert relative(ig.interpret(after, data[0]), ig.interpret(network, data[0])) < 1e-12
    assert relative(p.omega[:, 0::2], -p.omega[:, 1::2]) == 0 and relative(p.alpha[0::2], p.alpha[1::2]) == 0
    assert relative(p.omega.norm(dim=0), torch.full((4,), s.fan_out_norm, dtype=DOUBLE)) < 1e-12
    values = interpret_groups(after, data[0])[s.site]
    if after.groups[s.site].activation == "tanh":
        squares = values.atanh().square().mean([0, *range(2, values.dim())])
        assert relative(squares[s.units :], squares[: s.units].mean().expand(4)) < 1e-6


def test_variance_transfer_that_speaks_at_once_keeps_the_variance() -> None:
    draw = torch.Generator().manual_seed(0)
    network = mlp("tanh", (30, 200, 50))
    x = torch.randn(300, 30, generator=draw, dtype=DOUBLE)
    data = (x, torch.zeros(300, dtype=torch.long))
    p = ig.VarianceTransfer(200, pairs=False).propose_with(statistics(network), ig.compile(network), data)
    before, after = ig.interpret(network, x), ig.interpret(ig.AddUnits(p)(network).after, x)
    assert float(after.var(dim=0).mean()) == pytest.approx(float(before.var(dim=0).mean()), rel=0.1)
    loud = ig.VarianceTransfer(200, pairs=False, rescale=False).propose_with(
        statistics(network), ig.compile(network), data
    )
    louder = ig.interpret(ig.AddUnits(loud)(network).after, x)
    assert float(louder.var(dim=0).mean()) > 1.6 * float(before.var(dim=0).mean())


def test_variance_transfer_refuses() -> None:
    with pytest.raises(Refused, match="VarianceTransfer: units: found 3 in pairs"):
        ig.VarianceTransfer(3)
    network = mlp("tanh")
    with pytest.raises(BadData, match="VarianceTransfer: site 'hidden1': found no data"):
        ig.VarianceTransfer().propose_with(statistics(network), ig.compile(network))
    dead = network.with_tensors({n: 0 * t for n, t in network.tensors().items()})
    with pytest.raises(Refused, match="pre-activations that are all zero"):
        ig.VarianceTransfer().propose_with(statistics(dead), ig.compile(dead), drawn(dead, 9))
