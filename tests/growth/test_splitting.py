"""Splitting steepest descent: the matrices against the interpreter, the eigenvectors, the fall they predict."""

from __future__ import annotations

import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, forked, mlp, mobile, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.splitting import SplittingDescent, second_derivative, splitting
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.interpreter import interpret
from irgrow.ir.proposal import Proposal
from irgrow.kernels.activations import ACTIVATIONS


def conv(activation: str = "tanh", **more):
    return conv_pair(ig.Conv2d((3, 3), padding=(1, 1)), ig.Conv2d((3, 3), (2, 2)), activation, **more)


def batch_normed():
    network = ig.mlp([6, 5, 3], activation="tanh", norm="batch", seed=0, dtype=DOUBLE)
    draw = torch.Generator().manual_seed(3)
    shapes = {n: t.shape for n, t in network.tensors().items() if not n.startswith(("weight.", "bias."))}
    return network.with_tensors({n: 0.5 + torch.rand(s, generator=draw, dtype=DOUBLE) for n, s in shapes.items()})


NETWORKS = {
    "mlp": (mlp("tanh"), "hidden1"),
    "second": (mlp("gelu"), "hidden2"),
    "gaussian": (mlp("gaussian", (6, 4, 3), bias=False), "hidden"),
    "fork": (forked("silu"), "hidden"),
    "conv": (conv(), "grown"),
    "pool": (pooled("mean", True), "grown"),
    "batch norm": (batch_normed(), "hidden"),
}


def reference(network, site: str, unit: int, data) -> torch.Tensor:
    """S by its definition: the second derivative of the loss along offsets of a split unit, entry by entry.

    L(offset) of the split network has the Hessian S at 0.
    """
    serial = network.unit(site, unit)
    names = [n for n in ig.Site.of(network, site).entering]
    shapes = [network.bundles[n].weight.shape[1:] for n in names]
    bias = network.groups[site].bias is not None
    after = ig.SplitUnits((serial,))(network).after
    base = after.tensors()
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)

    def loss(offset):
        parts = torch.split(offset, [s.numel() for s in shapes] + [1] * bias)
        pair, tensors = torch.tensor([unit, unit + 1]), {}
        for n, s, part in zip(names, shapes, parts, strict=False):
            moved = torch.stack([part, -part]).reshape(2, *s)
            tensors[f"weight.{n}"] = base[f"weight.{n}"].index_add(0, pair, moved)
        if bias:
            tensors[f"bias.{site}"] = base[f"bias.{site}"].index_add(0, pair, torch.cat([parts[-1], -parts[-1]]))
        return F.cross_entropy(interpret(after, *inputs, tensors=tensors), data[1])

    zero = torch.zeros(sum(s.numel() for s in shapes) + bias, dtype=DOUBLE)
    return torch.autograd.functional.hessian(loss, zero)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_matrices_are_second_derivatives_of_the_split_network(name: str) -> None:
    network, site = NETWORKS[name]
    data = drawn(network, 7)
    found = splitting(ig.compile(network), data, F.cross_entropy, [site], batch_size=3)[site]
    for unit in (0, 2):
        S = reference(network, site, unit, data)
        assert relative(found.matrices[unit], S) < 1e-10
        values, vectors = torch.linalg.eigh(S)
        assert float(found.values[unit]) == pytest.approx(float(values[0]), rel=1e-9)
        assert abs(float(found.vectors[unit] @ vectors[:, 0])) > 1 - 1e-9


def test_a_sum_loss_counts_the_same() -> None:
    network, site = NETWORKS["mlp"]
    data = drawn(network, 7)
    model = ig.compile(network)
    a = splitting(model, data, F.cross_entropy, [site])[site]
    b = splitting(model, data, lambda y, t: F.cross_entropy(y, t, reduction="sum"), [site], reduction="sum")[site]
    assert relative(a.matrices, b.matrices) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "fork", "conv", "batch norm"])
def test_the_loss_falls_as_predicted(name: str) -> None:
    network, _ = NETWORKS[name]
    data = drawn(network, 40)
    model = ig.compile(network)
    found = SplittingDescent(3, eps=1e-3).select(model, data, F.cross_entropy)
    assert 1 <= len(found.kept) <= 3 and all(c.score < 0 for c in found.kept)
    assert found.predicted_gain > 0
    assert found.measured_gain == pytest.approx(found.predicted_gain, rel=1e-2)
    morphism = found(model.network()).verify()
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    fall = F.cross_entropy(interpret(network, *inputs), data[1]) - F.cross_entropy(
        interpret(morphism.after, *inputs), data[1]
    )
    assert float(fall) == pytest.approx(found.measured_gain, abs=1e-12)
    best = sorted(c.score for c in found.candidates)[: len(found.kept)]
    assert sorted(c.score for c in found.kept) == best
    assert "among" in repr(found) and str(found).count("\n") == len(found.candidates)


def test_no_other_direction_is_better() -> None:
    network, site = NETWORKS["mlp"]
    data = drawn(network, 40)
    model = ig.compile(network)
    found = SplittingDescent(1, eps=1e-2).select(model, data, F.cross_entropy, sites=[site])
    (kept,) = found.kept
    draw = torch.Generator().manual_seed(0)
    x, y = data
    before = F.cross_entropy(interpret(network, x), y)
    for _ in range(50):
        v = 1e-2 * F.normalize(torch.randn(7, generator=draw, dtype=DOUBLE), dim=0)
        offsets = Proposal(site, network.structure, "test", {"input_hidden1": v[None, :6]}, {}, v[6:])
        after = ig.SplitUnits((network.unit(site, 2)._replace(serial=kept.unit),), offsets)(network).after
        assert float(before - F.cross_entropy(interpret(after, x), y)) <= found.measured_gain * (1 + 1e-3)


def test_second_derivatives() -> None:
    z = torch.linspace(-3, 3, 13, dtype=DOUBLE)
    t = torch.tanh(z)
    assert relative(second_derivative(ACTIVATIONS["tanh"], z), -2 * t * (1 - t * t)) < 1e-12
    s = torch.sigmoid(3 * z)
    assert relative(second_derivative(ACTIVATIONS["relu"], z), 3 * s * (1 - s)) < 1e-12
    soft = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(F.softplus(soft, beta=3).sum(), soft, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), soft)
    assert relative(second_derivative(ACTIVATIONS["relu"], z), second) < 1e-9
    assert relative(second_derivative(ACTIVATIONS["abs"], z), 2 * second) < 1e-9
    assert relative(second_derivative(ACTIVATIONS["leaky_relu"], z), 0.99 * second) < 1e-7
    assert not bool(second_derivative(ACTIVATIONS["identity"], z).any())
    assert relative(second_derivative(ACTIVATIONS["square"], z), torch.full_like(z, 2.0)) == 0


def test_relu_splits_by_the_surrogate() -> None:
    network = mlp("relu")
    model = ig.compile(network)
    found = SplittingDescent(2, eps=0.05).select(model, drawn(network, 40), F.cross_entropy)
    assert len(found.kept) == 2 and found(network).verify().after.groups["hidden1"].units >= 5


def test_refusals_and_purity() -> None:
    network, site = NETWORKS["mlp"]
    model, data = ig.compile(network), drawn(network, 9)
    model.train()
    before = {n: t.clone() for n, t in model.tensors().items()}
    for other, where, text in (
        (residual(), "stream1", "entered at 2 groups"),
        (mobile(), "grown", "a second activation tanh at 'deep'"),
        (ig.mlp([5, 4, 3], norm="layer", dtype=DOUBLE), "hidden", "layer norm"),
    ):
        with pytest.raises(Refused, match=text):
            SplittingDescent().select(ig.compile(other), drawn(other, 5), F.cross_entropy, sites=[where])
    found = SplittingDescent().select(ig.compile(mobile()), drawn(mobile(), 9), F.cross_entropy)
    assert any("left out" in note and "deep" in note for note in found.notes)
    linear = mlp("identity")
    with pytest.raises(Refused, match="SplittingDescent: found no negative eigenvalue among 9 units"):
        SplittingDescent().select(ig.compile(linear), drawn(linear, 9), F.cross_entropy)
    with pytest.raises(BadData, match="splitting: loss: found NaN or infinity"):
        splitting(model, data, lambda y, t: y.sum() / 0)
    with pytest.raises(Refused, match="SplittingDescent: found units=0"):
        SplittingDescent(0)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.tensors().items())
