"""A compiled network computes what the interpreter says: values, every gradient, second derivatives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import irgrow as ig
from irgrow.ir.interpreter import interpret
from irgrow.ir.network import Network
from irgrow.testing import inputs_for, networks, random_network


def outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def worst(ours: list[Tensor | None], theirs: list[Tensor | None]) -> float:
    """The largest max|a - b| over all tensors, relative to the largest entry of any of them."""
    scale = max((float(b.detach().abs().max()) for b in theirs if b is not None and b.numel()), default=0.0) or 1.0
    change = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        if b.numel():
            change = max(change, float((a.detach().double() - b.detach().double()).abs().max()) / scale)
    return change


def compare(network: Network, dtype: torch.dtype, backend: str = "auto") -> tuple[float, float]:
    """(worst output, worst gradient) of the compiled network in `dtype` against the float64 interpreter."""
    network = network.to(dtype)
    model = ig.compile(network, backend=backend).eval()
    ours = [x.to(dtype).requires_grad_() for x in inputs_for(network, 4)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    names = network.trainable()
    held = {n: network.tensors()[n].double().requires_grad_() for n in names}
    y, reference = outputs(model(*ours)), outputs(interpret(network, *theirs, tensors=held))
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(r.shape, generator=draw, dtype=torch.float64).to(dtype) for r in reference]
    mine = torch.autograd.grad(y, [*(model.tensors()[n] for n in names), *ours], cotangents, allow_unused=True)
    wanted = torch.autograd.grad(
        reference, [*held.values(), *theirs], [c.double() for c in cotangents], allow_unused=True
    )
    return worst(list(y), list(reference)), worst(list(mine), list(wanted))


def normalised(network: Network) -> bool:
    return any(g.norm is not None and g.norm.across_units for g in network.groups.values())


@given(networks())
def test_float64(network: Network) -> None:
    # A norm over one or two units divides rounding errors by sqrt(eps): no kernel agrees to 1e-12 there.
    limit = 1e-9 if normalised(network) else 1e-12
    value, gradient = compare(network, torch.float64)
    assert value <= limit and gradient <= 10 * limit


@pytest.mark.parametrize("seed", range(60))
def test_float64_of_seeded_networks(seed: int) -> None:
    network = random_network(seed)
    limit = 1e-9 if normalised(network) else 1e-12
    value, gradient = compare(network, torch.float64)
    assert value <= limit and gradient <= 10 * limit


@pytest.mark.parametrize("seed", range(40))
def test_float32(seed: int) -> None:
    network = random_network(seed, norms=())
    value, gradient = compare(network, torch.float32)
    assert value <= 1e-5 and gradient <= 1e-5


@pytest.mark.parametrize("seed", range(15))
def test_plain_torch_backend(seed: int) -> None:
    value, gradient = compare(random_network(seed, norms=()), torch.float64, "torch")
    assert value <= 1e-12 and gradient <= 1e-12


def without_dropout(network: Network) -> Network:
    return replace(network, groups={n: replace(g, dropout=0.0) for n, g in network.groups.items()})


@pytest.mark.parametrize("seed", range(15))
def test_batch_norm_in_train_mode(seed: int) -> None:
    network = without_dropout(random_network(seed, norms=("batch",)).to(torch.float64))
    xs = inputs_for(network, 6)
    model = ig.compile(network).train()
    value = worst(list(outputs(model(*xs))), list(outputs(interpret(network, *xs, train=True))))
    assert value <= 1e-9


def grown(insertions: int) -> Network:
    builder = ig.Builder(seed=0, dtype=torch.float64)
    builder.input("x", 6)
    builder.output("y", 3)
    builder.connect("x", "y")
    network = builder.build()
    for seed in range(insertions):
        network = ig.InsertNeuron(3, seed=seed)(network).after
    return network


def masked() -> Network:
    """Insertions into a dense network: matrices with a mask, and offsets of a walk."""
    network = ig.mlp([40, 90, 50, 5], seed=0, activation="tanh", dtype=torch.float64)
    for seed in range(5):
        network = ig.InsertNeuron(3, seed=seed, activation="tanh")(network).after
    return network


SMALL = {
    "dense": lambda: ig.mlp([5, 4, 3], activation="tanh", dtype=torch.float64),
    "conv and pool": lambda: ig.cnn((2, 6, 6), [2, 2], 3, activation="silu", dtype=torch.float64),
    "irregular": lambda: grown(8),
    "irregular, smooth": lambda: grown(0) and _smooth(),
}


def _smooth() -> Network:
    network = grown(0)
    for seed in range(8):
        network = ig.InsertNeuron(3, seed=seed, activation=("sin", "gelu")[seed % 2], group=f"g{seed % 2}")(
            network
        ).after
    return network


def dense_hessian(network: Network, x: Tensor, names: list[str]) -> Tensor:
    """d2 loss / d theta2 of the interpreter, parameters in the order of `names`."""
    shapes = [tuple(network.tensors()[n].shape) for n in names]
    sizes = [network.tensors()[n].numel() for n in names]

    def loss(theta: Tensor) -> Tensor:
        parts = [p.reshape(s) for p, s in zip(theta.split(sizes), shapes, strict=True)]
        return interpret(network, x, tensors=dict(zip(names, parts, strict=True))).pow(3).sum()  # type: ignore[union-attr]

    theta = torch.cat([network.tensors()[n].reshape(-1) for n in names])
    return torch.autograd.functional.hessian(loss, theta)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("subset", [False, True], ids=["all parameters", "a subset"])
def test_hessian_vector_products(kind: str, subset: bool) -> None:
    network = SMALL[kind]()
    names = network.trainable()[1::2] if subset else network.trainable()
    x = inputs_for(network, 5)[0].double()
    model = ig.compile(network)
    held = [model.tensors()[n] for n in names]
    loss = model(x).pow(3).sum()
    first = torch.autograd.grad(loss, held, create_graph=True)
    v = torch.randn(sum(p.numel() for p in held), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    along = sum((g.reshape(-1) * part).sum() for g, part in zip(first, v.split([p.numel() for p in held]), strict=True))
    product = torch.cat([h.reshape(-1) for h in torch.autograd.grad(along, held)])
    wanted = dense_hessian(network, x, names) @ v
    assert float((product - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())
    assert float(wanted.abs().max()) > 0


def test_hessian_vector_products_of_masked_matrices_and_offsets() -> None:
    network = masked()
    model = ig.compile(network)
    text = model.explain()
    assert "sparse matrix" in text or "matrix parts" in text
    names = [n for n in network.trainable() if network.tensors()[n].numel() <= 200]
    x = inputs_for(network, 5)[0].double()
    held = [model.tensors()[n] for n in names]
    first = torch.autograd.grad(model(x).pow(3).sum(), held, create_graph=True)
    draw = torch.Generator().manual_seed(0)
    vs = [torch.randn(p.shape, dtype=torch.float64, generator=draw) for p in held]
    along = sum((g * v).sum() for g, v in zip(first, vs, strict=True))
    product = torch.cat([h.reshape(-1) for h in torch.autograd.grad(along, held)])
    wanted = dense_hessian(network, x, names) @ torch.cat([v.reshape(-1) for v in vs])
    assert float((product - wanted).abs().max()) <= 1e-10 * float(wanted.abs().max())


@given(st.integers(0, 10_000))
def test_masked_matrices_match(seed: int) -> None:
    network = ig.mlp([50, 90, 5], seed=seed, dtype=torch.float64)
    for k in range(4):
        network = ig.InsertNeuron(3, seed=seed + k)(network).after
    value, gradient = compare(network, torch.float64)
    assert value <= 1e-12 and gradient <= 1e-12
