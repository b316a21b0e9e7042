"""`masked_matmul` by both routes against plain dense float64: values, first and second derivatives, odd shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import costs
from irgrow.kernels import masked_matmul as module
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.masked_matmul import (
    Mask,
    choose,
    mask,
    masked_matmul,
    masked_matmul_cost,
    masked_matmul_reference,
)

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
BOTH = pytest.mark.parametrize("route", ["sparse", "dense"])


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_mask(rows: int, columns: int, density: float, *, shared: int = 0, repeats: bool = False) -> Mask:
    generator = torch.Generator().manual_seed(rows + columns)
    row, column = (torch.rand(rows, columns, generator=generator) < density).nonzero(as_tuple=True)
    if repeats:
        row, column = torch.cat([row, row[::2]]), torch.cat([column, column[::2]])
    shuffle = torch.randperm(len(row), generator=generator)
    row, column = row[shuffle], column[shuffle]
    index = torch.randint(shared, (len(row),), generator=generator) if shared else None
    return mask(rows, columns, row, column, index)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0


def matrix(structure: Mask, values: Tensor) -> Tensor:
    """W by a loop: the definition of the definition."""
    W = torch.zeros(structure.rows, structure.columns, dtype=torch.float64)
    values = values.tolist()
    index = range(structure.edges) if structure.index is None else structure.index.tolist()
    for place, k in zip(structure.flat.tolist(), index, strict=True):
        W[place // structure.columns, place % structure.columns] += values[k]
    return W


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    batch=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    shared=st.sampled_from([0, 1, 5]),
    repeats=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_and_gradients(rows, columns, batch, density, shared, repeats, bias, dtype):
    structure = random_mask(rows, columns, density, shared=shared, repeats=repeats)
    x, values = normal(columns, batch, dtype=dtype), normal(structure.values + 2, dtype=dtype, seed=1)
    b = normal(rows, dtype=dtype, seed=2) if bias else None
    incoming = normal(rows, batch, dtype=dtype, seed=3)
    exact = [t.double().requires_grad_() for t in (x, values, *([b] if bias else []))]
    reference = masked_matmul_reference(structure, *exact, activation="tanh")
    W = matrix(structure, values)
    z = W @ x.double() if b is None else W @ x.double() + b.double()[:, None]
    assert relative(reference, z.tanh()) < 1e-12
    expected = torch.autograd.grad(reference, exact, incoming.double())
    for route in ("sparse", "dense", "auto"):
        operands = [t.clone().requires_grad_() for t in (x, values, *([b] if bias else []))]
        found = masked_matmul(structure, *operands, activation="tanh", route=route)
        assert found.shape == (rows, batch)
        assert relative(found.double(), reference) < TOLERANCE[dtype]
        gradients = torch.autograd.grad(found, operands, incoming)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert ours.shape == theirs.shape
            assert relative(ours.double(), theirs) < 4 * TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape, density", [((300, 200), 0.2), ((129, 517), 0.05), ((257, 255), 0.9)])
def test_sizes_of_real_layers(shape, density, route, dtype):
    structure = random_mask(*shape, density)
    operands = [
        normal(shape[1], 130, dtype=dtype),
        normal(structure.values, dtype=dtype, seed=1),
        normal(shape[0], dtype=dtype, seed=2),
    ]
    incoming = normal(shape[0], 130, dtype=dtype, seed=3)
    results = []
    for function, precision in ((masked_matmul, dtype), (masked_matmul_reference, torch.float64)):
        leaves = [t.to(precision, copy=True).requires_grad_() for t in operands]
        options = {"route": route} if function is masked_matmul else {}
        y = function(structure, *leaves, activation="silu", **options)
        results.append((y, *torch.autograd.grad(y, leaves, incoming.to(precision))))
    for ours, theirs in zip(*results, strict=True):
        assert relative(ours.double(), theirs) < TOLERANCE[dtype]


@BOTH
def test_first_and_second_derivatives(route):
    structure = random_mask(5, 6, 0.5, shared=7)
    leaves = [t.requires_grad_() for t in (normal(6, 3), normal(structure.values, seed=1), normal(5, seed=2))]

    def function(*operands: Tensor) -> Tensor:
        return masked_matmul(structure, *operands, activation="tanh", route=route)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@BOTH
def test_hessian_vector_products_in_float32(route):
    """The compiled backward is not differentiable; it must hand over to plain torch, not return zeros."""
    structure = random_mask(7, 9, 0.4)
    x, values = normal(9, 4, dtype=torch.float32), normal(structure.values, dtype=torch.float32, seed=1)
    v = normal(structure.values, seed=2)

    def product(function, precision: torch.dtype, **options: object) -> Tensor:
        leaf = values.to(precision, copy=True).requires_grad_()
        y = function(structure, x.to(precision), leaf, activation="tanh", **options)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient @ v.to(precision), leaf)[0]

    found = product(masked_matmul, torch.float32, route=route)
    expected = product(masked_matmul_reference, torch.float64)
    assert expected.abs().max() > 1e-3 and relative(found.double(), expected) < 1e-5


@BOTH
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation(activation, route):
    structure = random_mask(30, 20, 0.3)
    x, values, bias = normal(20, 33), normal(structure.values, seed=1), normal(30, seed=2)
    found = masked_matmul(structure, x, values, bias, activation=activation, route=route)
    assert relative(found, masked_matmul_reference(structure, x, values, bias, activation=activation)) < 1e-12


@BOTH
def test_torch_func(route):
    structure = random_mask(4, 5, 0.6)
    x, values = normal(5, 3), normal(structure.values, seed=1)

    def loss(values: Tensor) -> Tensor:
        return masked_matmul(structure, x, values, activation="tanh", route=route).square().sum()

    def plain(values: Tensor) -> Tensor:
        return masked_matmul_reference(structure, x, values, activation="tanh").square().sum()

    assert relative(torch.func.grad(loss)(values), torch.func.grad(plain)(values)) < 1e-12
    assert relative(torch.func.hessian(loss)(values), torch.func.hessian(plain)(values)) < 1e-12
    several = normal(4, structure.values)
    assert relative(torch.func.vmap(loss)(several), torch.func.vmap(plain)(several)) < 1e-12


@BOTH
def test_layouts_and_repeats_bit_for_bit(route):
    structure = random_mask(200, 150, 0.3)
    x, values = normal(150, 64, dtype=torch.float32), normal(structure.values, dtype=torch.float32, seed=1)
    first = masked_matmul(structure, x, values, route=route)
    assert torch.equal(first, masked_matmul(structure, x, values, route=route))
    for other in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :64], x[:, :1].expand(-1, 64)):
        expected = masked_matmul_reference(structure, other.double(), values.double())
        assert relative(masked_matmul(structure, other, values, route=route).double(), expected) < 2e-6


@BOTH
def test_gradients_only_where_needed(route):
    structure = random_mask(9, 8, 0.5)
    x, values = normal(8, 5, dtype=torch.float32), normal(structure.values, dtype=torch.float32, seed=1)
    for needs_x, needs_values in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(needs_x), values.clone().requires_grad_(needs_values)
        masked_matmul(structure, a, b, route=route).sum().backward()
        assert (a.grad is not None) == needs_x and (b.grad is not None) == needs_values


def test_no_rows_no_edges():
    empty = torch.empty(0, dtype=torch.int64)
    for rows, columns in ((0, 3), (3, 0), (3, 4)):
        structure = mask(rows, columns, empty, empty)
        for route in ("sparse", "dense"):
            y = masked_matmul(structure, normal(columns, 6), torch.empty(0).double(), normal(rows), route=route)
            assert torch.equal(y, normal(rows)[:, None].expand(-1, 6))


@BOTH
@pytest.mark.parametrize("which", range(4))
def test_negated_views_are_read_as_what_they_mean(which, route):
    """A tensor may hold -x and say so; its memory is what compiled code sees."""
    structure = random_mask(30, 20, 0.3)
    shapes = (20, 33), (structure.values,), (30,), (30, 33)
    plain = [normal(*shape, seed=k) for k, shape in enumerate(shapes)]
    views = [torch._neg_view(-t) if k == which else t for k, t in enumerate(plain)]
    assert views[which].is_neg() and views[which].equal(plain[which])
    results = []
    for *operands, incoming in (plain, views):
        leaves = [t.detach().requires_grad_() for t in operands]
        y = masked_matmul(structure, *leaves, activation="tanh", route=route)
        results.append((y, *torch.autograd.grad(y, leaves, incoming)))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 1e-14


def test_choose_is_monotone_and_explains_itself(monkeypatch):
    for training in (True, False):
        for batch in (1, 16, 256, 4096):
            routes = [choose(1000, 1000, e, batch, "cpu", training=training)[0] for e in range(0, 10**6, 10**4)]
            assert routes == sorted(routes, reverse=True)  # sparse first, then dense
    assert choose(1024, 1024, 52_000, 256, "cpu")[0] == "sparse"
    price = {"sparse": costs.Cost(0, 0, 2.0, 0, 0, 0, 0), "dense": costs.Cost(0, 0, 0, 0, 1.0, 0, 0)}
    monkeypatch.setattr(
        costs, "COSTS", {(route, both): cost for route, cost in price.items() for both in (True, False)}
    )
    route, reason = choose(1024, 1024, 700_000, 256, torch.device("cpu"))
    assert route == "dense" and "66.8 % of 1024x1024 at batch 256: sparse about " in reason
    assert choose(100, 100, 100, 8, "cuda")[0] == "sparse" and choose(100, 100, 5000, 8, "cuda")[0] == "dense"
    assert choose(0, 5, 0, 8, "cpu")[0] == "sparse"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(module.gpu, "why_not_triton", lambda device: "no triton")
    assert choose(10, 10, 1, 8, "cuda") == ("dense", "no sparse kernel on cuda")


def test_without_numba(monkeypatch):
    monkeypatch.setattr(module, "_has_numba", lambda: False)
    assert choose(10, 10, 1, 8, "cpu") == ("dense", "numba is not installed")
    structure = random_mask(4, 4, 0.5)
    x, values = normal(4, 3), normal(structure.values)
    masked_matmul(structure, x, values)
    with pytest.raises(
        RuntimeError, match="needs a CPU and numba, or Triton, found cpu without numba; use route='dense'"
    ):
        masked_matmul(structure, x, values, route="sparse")


def test_repr_and_cost():
    structure = random_mask(100, 100, 0.1)
    assert repr(structure).startswith("Mask(100x100, ") and "edges, " in repr(structure)
    assert masked_matmul_cost(structure, 32)[0] == 2 * structure.edges * 32
    assert masked_matmul_cost(structure, 32, route="dense")[0] == 2 * 100 * 100 * 32


def test_callers_mistakes():
    structure = mask(3, 4, torch.tensor([0, 2]), torch.tensor([1, 3]))
    x, values = torch.ones(4, 2), torch.ones(2)
    for text, call in (
        ("route 'fast'", lambda: masked_matmul(structure, x, values, route="fast")),
        ("activation 'swish'", lambda: masked_matmul(structure, x, values, activation="swish")),
        (r"x has shape \(3, 2\), expected \(4, batch\)", lambda: masked_matmul(structure, x[:3], values)),
        (r"values have shape \(1,\), expected \(2,\) or longer", lambda: masked_matmul(structure, x, values[:1])),
        (r"bias has shape \(4,\), expected \(3,\)", lambda: masked_matmul(structure, x, values, torch.ones(4))),
        (r"values are torch\.float64 on cpu", lambda: masked_matmul(structure, x, values.double())),
        (r"row holds 0\.\.3, expected in 0\.\.2", lambda: mask(3, 4, torch.tensor([0, 3]), torch.tensor([0, 0]))),
        (r"column holds -1\.\.0", lambda: mask(3, 4, torch.tensor([0, 1]), torch.tensor([0, -1]))),
        (r"index is torch\.float32", lambda: mask(1, 1, torch.tensor([0]), torch.tensor([0]), torch.ones(1))),
        (
            r"column is torch\.int64 \(2,\), expected 1 int",
            lambda: mask(1, 1, torch.tensor([0]), torch.zeros(2).long()),
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()
