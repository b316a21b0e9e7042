"""Whole networks whose irregular regions run on Triton: they compute what the interpreter says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import irgrow as ig
from irgrow.compiler import schedule
from irgrow.ir.interpreter import interpret
from irgrow.ir.network import Network
from irgrow.testing import inputs_for, random_network


def outputs(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def worst(ours: list[Tensor | None], theirs: list[Tensor | None]) -> float:
    """The largest max|a - b| over all tensors, relative to the largest entry of any of them."""
    scale = max((float(b.detach().abs().max()) for b in theirs if b is not None and b.numel()), default=0.0) or 1.0
    change = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a.detach().cpu()  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        if b.numel():
            change = max(change, float((a.double() - b.detach().double()).abs().max()) / scale)
    return change


def compare(network: Network, device: str, batch: int = 4) -> tuple[str, float, float]:
    """(which kernel each step got, worst output, worst gradient) against the float64 interpreter."""
    model = ig.compile(network, backend="triton", device=device).eval()
    ours = [x.to(device).requires_grad_() for x in inputs_for(network, batch)]
    theirs = [x.detach().double().cpu().requires_grad_() for x in ours]
    names = network.trainable()
    held = {n: network.tensors()[n].double().requires_grad_() for n in names}
    y, reference = outputs(model(*ours)), outputs(interpret(network, *theirs, tensors=held))
    draw = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(r.shape, generator=draw, dtype=torch.float64) for r in reference]
    given = [c.to(device, network.dtype) for c in cotangents]
    mine = torch.autograd.grad(y, [*(model.tensors()[n] for n in names), *ours], given, allow_unused=True)
    wanted = torch.autograd.grad(reference, [*held.values(), *theirs], cotangents, allow_unused=True)
    return model.explain(), worst(list(y), list(reference)), worst(list(mine), list(wanted))


def normalised(network: Network) -> bool:
    return any(g.norm is not None and g.norm.across_units for g in network.groups.values())


@pytest.mark.parametrize("networks", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_random_networks(networks: int, device: str, large: bool) -> None:
    """The first networks that have something to walk; larger ones where there is time."""
    check_random_networks(networks, device, large, "walked by")


@pytest.mark.parametrize("networks", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_random_networks_by_matrices(networks: int, device: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where every sparse bundle is wide enough for a matrix."""
    monkeypatch.setattr(schedule, "SMALLEST_MATRIX", 1)
    check_random_networks(networks, device, large, "sparse by")


def check_random_networks(networks: int, device: str, large: bool, words: str) -> None:
    size = {"steps": 5, "widest": 6} if large else {"steps": 2, "widest": 3}
    walked = seed = 0
    while walked < networks:
        network = random_network(seed, **size).to(torch.float64)
        seed += 1
        if words not in ig.compile(network, backend="triton", device=device).explain():
            continue
        walked += 1
        explained, value, gradient = compare(network, device)
        assert f"{words} {'Triton' if large else 'interpreted Triton'}" in explained
        # A norm over one or two units divides rounding errors by sqrt(eps): no kernel agrees to 1e-12 there.
        limit = 1e-9 if normalised(network) else 1e-12
        assert value <= limit and gradient <= 10 * limit, (seed - 1, value, gradient)


def grown(insertions: int, dtype: torch.dtype = torch.float64, inputs: int = 6) -> Network:
    builder = ig.Builder(seed=0, dtype=dtype)
    builder.input("x", inputs)
    builder.output("y", 3)
    builder.connect("x", "y")
    network = builder.build()
    for seed in range(insertions):
        kind = ("sin", "tanh")[seed % 2]
        network = ig.InsertNeuron(3, seed=seed, activation=kind, group=kind)(network).after
    return network


def test_float32(device: str, large: bool) -> None:
    _, value, gradient = compare(grown(300 if large else 5, torch.float32), device, 64 if large else 4)
    assert value <= 1e-5 and gradient <= 1e-5


def test_hessian_vector_products(device: str) -> None:
    network = grown(4)
    x = inputs_for(network, 3)[0].to(device)
    products = []
    for backend in ("triton", "torch"):
        model = ig.compile(network, backend=backend, device=device)
        held = list(model.parameters())
        first = torch.autograd.grad(model(x).pow(3).sum(), held, create_graph=True)
        along = sum((g * torch.ones_like(g)).sum() for g in first)
        products.append([h.cpu() for h in torch.autograd.grad(along, held)])  # type: ignore[arg-type]
    assert worst(*products) <= 1e-11  # type: ignore[arg-type]
    assert max(float(h.abs().max()) for h in products[1]) > 0


def test_a_model_that_grows_and_trains(device: str, large: bool) -> None:
    """The same module after every growth: what it computes is what its network means."""
    model = ig.compile(grown(3), backend="triton", device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = inputs_for(model.network(), 4)[0].to(device)
    for seed in range(20 if large else 3):
        model.grow(ig.InsertNeuron(2, seed=100 + seed, activation="gelu")(model.network()), optimizer)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    network = model.network().to(device="cpu")
    expected = interpret(network, x.cpu())
    assert worst([model(x)], [expected]) <= 1e-12  # type: ignore[list-item]


def test_every_step_names_its_kernel(device: str) -> None:
    network = ig.mlp([40, 60, 5], seed=0, dtype=torch.float64)
    for seed in range(3):
        network = ig.InsertNeuron(3, seed=seed)(network).after
    explained, value, gradient = compare(network, device)
    assert "dense" in explained and "Triton" in explained
    assert value <= 1e-12 and gradient <= 1e-11


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch(batch: int, device: str) -> None:
    _, value, gradient = compare(grown(4), device, batch)
    assert value <= 1e-12 and gradient <= 1e-11


def wide(blocks: bool, dtype: torch.dtype) -> Network:
    """Two sparse levels: random, or in blocks of 16 of which one is not full."""
    draw = np.random.default_rng(0)
    builder = ig.Builder(seed=0, dtype=dtype)
    builder.input("x", 32)
    builder.group("h", 32, activation="gelu", bias=True)
    builder.output("y", 32, activation="tanh")
    for source, target in (("x", "h"), ("h", "y")):
        mask = np.kron([[1, 1], [0, 1]], np.ones((16, 16), np.bool_)) if blocks else draw.random((32, 32)) < 0.25
        mask[0, 1] = False
        t, s = np.nonzero(mask)
        builder.connect(source, target, ig.Sparse(s, t))
    return builder.build()


@pytest.mark.parametrize(("blocks", "dtype"), [(False, torch.float64), (True, torch.float32), (True, torch.float64)])
def test_wide_levels_run_on_the_kernels_that_explain_names(
    blocks: bool, dtype: torch.dtype, device: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64 blocks have no kernel: entry by entry."""
    monkeypatch.setattr(schedule, "SMALLEST_MATRIX", 200)
    from irgrow.kernels import block_sparse_triton, masked_matmul_triton

    calls = []
    for module, name in ((masked_matmul_triton, "Masked"), (block_sparse_triton, "Blocks")):
        apply = getattr(module, name).apply
        monkeypatch.setattr(getattr(module, name), "apply", lambda *a, f=apply, n=name: (calls.append(n), f(*a))[1])
    explained, value, gradient = compare(wide(blocks, dtype), device, 3)
    in_blocks = blocks and dtype == torch.float32
    assert calls == ["Blocks" if in_blocks else "Masked"] * 2
    assert explained.count(f"blocks of 16 by {'Triton' if large else 'interpreted Triton'}") == 2 * in_blocks
    assert explained.count(f": sparse by {'Triton' if large else 'interpreted Triton'}") == 2 * (not in_blocks)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert value <= limit and gradient <= 10 * limit
