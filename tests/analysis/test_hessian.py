"""Curvature against dense float64 Hessians of the interpreter, on regular and irregular networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import irgrow as ig
from irgrow.analysis import Hessian, gradient_norms, spectrum
from irgrow.ir.errors import BadData, BadShape, UnknownName

F64 = torch.float64


def inserted(neurons: int = 8, activation: str = "relu") -> ig.Network:
    """Four inputs, three outputs, and neurons inserted between them: an irregular region that a walk computes."""
    builder = ig.Builder(seed=0, dtype=F64)
    builder.input("input", 4), builder.output("output", 3)
    builder.connect("input", "output")
    network = builder.build()
    for seed in range(neurons):
        network = ig.InsertNeuron(3, seed=seed, activation=activation)(network).after
    return network


NETWORKS = {
    "mlp": lambda: ig.mlp([4, 5, 3], activation="tanh", dtype=F64),
    "mlp, relu, batch norm": lambda: ig.mlp([4, 5, 3], norm="batch", dtype=F64),
    "inserted": inserted,
    "inserted, tanh": lambda: inserted(activation="tanh"),
    "cnn": lambda: ig.cnn((1, 4, 4), [2], 3, activation="tanh", dtype=F64),
}


def data_for(network: ig.Network, samples: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *network.groups[network.inputs[0]].shape, generator=draw, dtype=F64)
    return x, torch.randint(0, 3, (samples,), generator=draw)


def dense(network: ig.Network, data, names) -> torch.Tensor:
    """The Hessian of the interpreter's loss, row by row, parameters in the order of `names`."""
    held = network.tensors()
    shapes = [held[n].shape for n in names]
    start = torch.cat([held[n].detach().reshape(-1) for n in names])

    def loss(theta: torch.Tensor) -> torch.Tensor:
        parts = theta.split([s.numel() for s in shapes])
        tensors = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(ig.interpret(network, data[0], tensors=tensors), data[1])

    return torch.autograd.functional.hessian(loss, start)


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_interpreters_hessian(name: str) -> None:
    network = NETWORKS[name]()
    data = data_for(network)
    hessian = Hessian(ig.compile(network), data, F.cross_entropy)
    expected = dense(network, data, hessian.names)
    v = torch.randn(hessian.size, dtype=F64, generator=torch.Generator().manual_seed(2))
    assert float((hessian @ v - expected @ v).abs().max()) <= 1e-10 * float((expected @ v).abs().max())
    assert torch.allclose(hessian.matrix(), expected, rtol=0, atol=1e-10)
    by_batches = Hessian(ig.compile(network), data, F.cross_entropy, batch_size=5)
    assert torch.allclose(by_batches @ v, expected @ v, rtol=0, atol=1e-12)
    summed = Hessian(ig.compile(network), data, lambda o, t: F.cross_entropy(o, t, reduction="sum"), reduction="sum")
    assert torch.allclose(summed @ v, 12 * (expected @ v), rtol=0, atol=1e-10)


def test_eigenvalues_of_a_module_come_with_their_signs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(20, 6, dtype=F64), torch.randint(0, 3, (20,))
    for sign in (1.0, -1.0):  # a loss turned round has a negative dominant eigenvalue
        hessian = Hessian(model, (x, y), lambda o, t, sign=sign: sign * F.cross_entropy(o, t))
        everything = sorted(torch.linalg.eigvalsh(hessian.matrix()).tolist(), key=abs, reverse=True)
        assert hessian.size > 64  # so that Lanczos runs
        assert hessian.eigenvalues(3) == pytest.approx(everything[:3], rel=1e-7)
        assert hessian.eigenvalues(1)[0] * sign > 0
    assert hessian.eigenvalues(2) == hessian.eigenvalues(2)


def test_a_part_of_the_parameters() -> None:
    network = NETWORKS["mlp"]()
    data = data_for(network)
    whole = Hessian(ig.compile(network), data, F.cross_entropy)
    part = Hessian(ig.compile(network), data, F.cross_entropy, parameters=["weight.input_hidden"])
    first = int(np.prod(part.shapes[0]))
    assert whole.names[0] == "weight.input_hidden"
    assert torch.allclose(part.matrix(), whole.matrix()[:first, :first], atol=1e-14)


def test_the_model_is_left_alone() -> None:
    model = ig.compile(ig.mlp([4, 5, 3], norm="batch", dtype=F64)).train()
    before = {n: t.detach().clone() for n, t in model.tensors().items()}
    Hessian(model, data_for(model.structure), F.cross_entropy).eigenvalues(1)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.tensors().items())


def test_gradients() -> None:
    network = inserted()
    x, y = data_for(network)
    model = ig.compile(network)
    norms = gradient_norms(model, (x, y), F.cross_entropy, batch_size=7)
    F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert norms[name] == pytest.approx(float(parameter.grad.norm()), rel=1e-12)
    assert norms["all"] ** 2 == pytest.approx(sum(v**2 for n, v in norms.items() if n != "all"))
    assert Hessian(model, (x, y), F.cross_entropy).loss_value() == pytest.approx(
        float(F.cross_entropy(model(x), y).detach())
    )


def test_a_loss_without_curvature() -> None:
    model = nn.Linear(80, 1).double()
    hessian = Hessian(model, (torch.randn(5, 80, dtype=F64), torch.zeros(5)), lambda o, t: o.mean())
    assert hessian.eigenvalues(2) == [0.0, 0.0]


def test_the_spectrum_is_that_of_the_matrix() -> None:
    network = NETWORKS["mlp"]()
    hessian = Hessian(ig.compile(network), data_for(network), F.cross_entropy)
    values, vectors = torch.linalg.eigh(hessian.matrix())
    found = spectrum(hessian, vectors=3, steps=hessian.size, seed=4)
    draw = torch.Generator().manual_seed(4)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        v = torch.randint(0, 2, (hessian.size,), generator=draw, dtype=F64) * 2 - 1
        shares = (vectors.mT @ v).square() / hessian.size
        assert weights.sum() == pytest.approx(1.0)
        assert nodes.max() == pytest.approx(float(values.max())) and nodes.min() == pytest.approx(float(values.min()))
        for power in (1, 2, 3, 7):
            assert weights @ nodes**power == pytest.approx(float(shares @ values**power), rel=1e-8, abs=1e-14)
    grid, density = found.density(points=4000)
    assert float(density.sum() * (grid[1] - grid[0])) == pytest.approx(1.0, abs=1e-3)
    off_diagonal = hessian.matrix() - torch.diag(hessian.matrix().diagonal())
    spread = float((2 * off_diagonal.square().sum()).sqrt()) / hessian.size  # of v^T H v / P for random signs v
    assert abs(spectrum(hessian, vectors=400, steps=1).moment(1) - float(values.mean())) < 3 * spread / 20


def test_refusals() -> None:
    network = NETWORKS["mlp"]()
    model, data = ig.compile(network), data_for(network)
    with pytest.raises(UnknownName, match=r"parameter 'weight.nothing': expected one of weight.input_hidden"):
        Hessian(model, data, F.cross_entropy, parameters=["weight.nothing"])
    with pytest.raises(UnknownName, match=r"reduction 'max': expected one of mean, sum"):
        Hessian(model, data, F.cross_entropy, reduction="max")
    with pytest.raises(BadData, match="Hessian: data: found no samples"):
        Hessian(model, (data[0][:0], data[1][:0]), F.cross_entropy)
    with pytest.raises(BadData, match="no parameters that require a gradient"):
        Hessian(nn.ReLU(), data, F.cross_entropy)
    hessian = Hessian(model, data, F.cross_entropy)
    with pytest.raises(BadShape, match=r"Hessian: vector: found \(3,\), expected \(43,\)"):
        hessian @ torch.zeros(3)
    with pytest.raises(UnknownName, match="0 eigenvalues: expected 1 to 43"):
        hessian.eigenvalues(0)
    with pytest.raises(BadData, match="Hessian: loss: found NaN or infinity"):
        Hessian(model, (data[0] * torch.nan, data[1]), F.cross_entropy).gradient()
    with pytest.raises(UnknownName, match="spectrum: found vectors=0, steps=60, expected at least one of each"):
        spectrum(hessian, vectors=0)
