"""The walk, against its plain-torch twin and against answers worked out by hand."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import shared, walk_cpu, walk_plan
from irgrow.kernels import walk as walk_module
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.walk import MAX, SUM, Rows, WalkPlan, cost, parts_of, plan, walk, walk_reference, walk_rows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of max|a - b| / max|b|
BATCHES = (1, 2, 3, 17, 33, 64, 100, 257)  # around the widths of the compiled tiles, for both dtypes
SMOOTH = [a.code for a in ACTIVATIONS.values() if a.smooth]
CODE = {a.name: a.code for a in ACTIVATIONS.values()}
ALL = tuple(CODE.values())


# --- making regions and operands ------------------------------------------------------------------------------


def region(
    seed: int,
    neurons: int = 30,
    inputs: int = 5,
    degree: int = 9,
    codes: Any = ALL,
    maxima: float = 0.3,
    tied: bool = False,
) -> WalkPlan:
    """Random rows: some without parents, some far parents, permuted or tied weights, shared and absent biases."""
    r = np.random.default_rng(seed)
    pointer, column = [0], []
    for row in range(inputs, inputs + neurons):
        parents = r.choice(row, min(row, int(r.integers(0, degree + 1))), replace=False) if row else []
        column += list(parents)
        pointer.append(len(column))
    edges = len(column)
    return plan(
        inputs,
        np.array(pointer),
        np.array(column, np.int64),
        weight=r.integers(0, edges // 3 + 1, edges) if tied else r.permutation(edges),
        code=r.choice(np.array(codes), neurons),
        aggregation=np.where(r.random(neurons) < maxima, MAX, SUM),
        bias=r.integers(-1, neurons // 2 + 1, neurons),
    )


def operands(p: WalkPlan, batch: int, dtype: torch.dtype, seed: int = 0, offset: bool = True) -> list[Tensor | None]:
    """Inputs, weights (longer than needed), biases, offset: small enough that `square` does not run away."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()

    return [
        normal(p.inputs, batch, scale=1.0),
        normal(p.weights + 2, scale=0.3),
        normal(p.biases + 1, scale=0.3),
        normal(p.neurons, batch, scale=0.3) if offset else None,
    ]


def apart(found: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|, infinite for different shapes or anything that is not finite."""
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    largest = expected.abs().max().item()
    return (found.double() - expected.double()).abs().max().item() / (largest or 1.0)


def values_and_gradients(function: Any, p: WalkPlan, tensors: list[Tensor | None]) -> list[Tensor]:
    y = function(p, *tensors)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    wanted = [t for t in tensors if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, incoming, materialize_grads=True)]


def doubled(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def check_against_twin(p: WalkPlan, tensors: list[Tensor | None], function: Any = walk) -> None:
    dtype = tensors[1].dtype  # type: ignore[union-attr]
    found = values_and_gradients(function, p, tensors)
    expected = values_and_gradients(walk_reference, p, doubled(tensors))
    if dtype == torch.float32:  # one gradient: a lone entry of it may cancel to a value as small as its rounding
        found, expected = ([t[0], torch.cat([g.flatten() for g in t[1:]])] for t in (found, expected))
    distances = [apart(f, e) for f, e in zip(found, expected, strict=True)]
    assert max(distances) <= TOLERANCE[dtype], distances


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN instead of what happens to lie there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.ones(1).new_empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


# --- fast against slow ----------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(0, 6),
    st.sampled_from(BATCHES),
    st.booleans(),
    st.booleans(),
)
@example(0, 1, 0, 1, False, False)
@example(1, 40, 0, 17, True, True)
def test_walk_is_its_twin_in_float64(
    seed: int, neurons: int, inputs: int, batch: int, tied: bool, offset: bool
) -> None:
    p = region(seed, neurons, inputs, tied=tied)
    check_against_twin(p, operands(p, batch, torch.float64, seed, offset))


@given(st.integers(0, 10**6), st.integers(8, 40), st.sampled_from(BATCHES), st.booleans(), st.booleans())
def test_walk_is_its_twin_in_float32(seed: int, neurons: int, batch: int, tied: bool, offset: bool) -> None:
    """Where rounding cannot change which side of a kink a sample is on."""
    p = region(seed, neurons, codes=SMOOTH, maxima=0.0, tied=tied)
    check_against_twin(p, operands(p, batch, torch.float32, seed, offset))


@given(st.integers(0, 10**6), st.sampled_from(BATCHES), st.sampled_from([torch.float32, torch.float64]))
def test_ties_and_kinks_where_arithmetic_is_exact(seed: int, batch: int, dtype: torch.dtype) -> None:
    """Small integers: every zero is exactly zero, ties are frequent, and no sum is rounded."""
    p = region(seed, 12, degree=5, codes=[CODE[n] for n in ("identity", "relu", "abs")], maxima=0.6)
    tensors = [
        (2 * t.detach() / t.detach().abs().mean().clamp_min(0.1)).round() for t in operands(p, batch, dtype, seed)
    ]  # type: ignore[union-attr]
    tensors = [t.clamp(-1, 1).requires_grad_() for t in tensors]
    found = values_and_gradients(walk, p, tensors)  # type: ignore[arg-type]
    expected = values_and_gradients(walk_reference, p, doubled(tensors))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=0)
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_batch_size_on_fresh_memory(batch: int, dtype: torch.dtype, nan_filled_memory: None) -> None:
    p = region(7, 60, codes=SMOOTH, maxima=0.2)
    if dtype == torch.float32:
        p = region(7, 60, codes=SMOOTH, maxima=0.0)
    check_against_twin(p, operands(p, batch, dtype))


def test_the_comparison_notices_a_wrong_structure() -> None:
    p, q = region(3), region(3)
    tensors = operands(p, 17, torch.float64)
    check_against_twin(p, tensors)
    q.child_weight[5] = (q.child_weight[5] + 1) % q.weights  # only the backward pass reads this
    with pytest.raises(AssertionError):
        check_against_twin(q, tensors)
    q = region(3)
    q.column[-1] = (q.column[-1] + 1) % q.inputs
    assert apart(walk(p, *tensors), walk(q, *tensors)) > 1e-3


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_each_activation_and_its_slope(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Over the range where it bends, in wide tiles and alone, against torch in float64."""
    z = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-0.01, 0.01, 41)]).to(dtype)
    p = plan(1, [0, 1], [0], code=CODE[name])
    one = torch.ones(1, dtype=dtype)
    exact = z.double().requires_grad_()
    expected = ACTIVATIONS[name](exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    x = z[None].clone().requires_grad_()
    y = walk(p, x, one)
    (found,) = torch.autograd.grad(y.sum(), x)
    assert apart(y[0], expected.detach()) <= tolerance
    assert apart(found[0], slope) <= tolerance
    for k in (0, 1500, 2000, 2001, 2500, 4000, 4021):
        x1 = x[:, k : k + 1].detach().requires_grad_()
        y1 = walk(p, x1, one)
        (found1,) = torch.autograd.grad(y1.sum(), x1)
        assert abs(y1.item() - expected[k].item()) <= tolerance * expected.abs().max()
        assert abs(found1.item() - slope[k].item()) <= tolerance * slope.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sin_of_large_numbers(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e4, -1e5, 3e7, 8191.5, 1.0] * 7], dtype=dtype).requires_grad_()
    y = walk(plan(1, [0, 1], [0], code=CODE["sin"]), x, torch.ones(1, dtype=dtype))
    (g,) = torch.autograd.grad(y.sum(), x)
    assert apart(y, x.detach().double().sin()) < 1e-6 and apart(g, x.detach().double().cos()) < 1e-6


# --- by hand --------------------------------------------------------------------------------------------------


def test_a_small_region_by_hand() -> None:
    """Rows 2, 3, 4 over inputs a, b: a sum, a max, and a row that has only its bias."""
    p = plan(
        2,
        [0, 2, 5, 5],
        [0, 1, 0, 2, 1],
        weight=[0, 1, 2, 3, 0],  # weight 0 is used twice
        code=[CODE["identity"], CODE["relu"], CODE["square"]],
        aggregation=[SUM, MAX, SUM],
        bias=[-1, 0, 0],
    )
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    w = torch.tensor([2.0, -1.0, 4.0, 0.5], requires_grad=True)
    bias = torch.tensor([0.5], requires_grad=True)
    y = walk(p, torch.stack([a, b]), w, bias)
    # row 2: 2a - b = -1, -9; row 3: max(4a, row 2 / 2, 2b) + 0.5 = max(4, -.5, 6) + .5, max(-8, -4.5, 10) + .5
    assert y.tolist() == [[-1.0, -9.0], [6.5, 10.5], [0.25, 0.25]]
    dw, dbias = torch.autograd.grad(y.sum(), (w, bias))
    assert dw.tolist() == [(1 - 2) + (3 + 5), 3 + 5, 0, 0]
    assert dbias.tolist() == [1 + 1 + 2 * (0.5 + 0.5)]


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_a_tie_sends_its_gradient_to_the_first_parent_in_edge_order(batch: int) -> None:
    p = plan(3, [0, 3], [2, 0, 1], code=CODE["identity"], aggregation=MAX)
    for function in (walk, walk_reference):
        x = torch.ones(3, batch, requires_grad=True)
        w = torch.tensor([1.0, 1.0, 0.5], requires_grad=True)
        dx, dw = torch.autograd.grad(function(p, x, w).sum(), (x, w))
        assert dx.sum(1).tolist() == [0, 0, batch] and dw.tolist() == [batch, 0, 0]
        nan = torch.ones(3, batch)
        nan[:2] = torch.nan  # edges 1 and 2
        nan.requires_grad_()
        y = function(p, nan, w.detach())
        assert y.isnan().all()
        assert torch.autograd.grad(y.sum(), nan)[0].sum(1).tolist() == [batch, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_regions_with_nothing_in_them(batch: int, dtype: torch.dtype) -> None:
    no_rows = plan(2, [0], [], code=0)
    assert walk(no_rows, torch.ones(2, batch, dtype=dtype), torch.ones(0, dtype=dtype)).shape == (0, batch)
    no_edges = plan(0, [0, 0, 0], [], code=CODE["sigmoid"], bias=[0, -1], aggregation=[SUM, MAX])
    x, w, b = (torch.ones(s, dtype=dtype, requires_grad=True) for s in ((0, batch), (0,), (1,)))
    y = walk(no_edges, x, w, b)
    torch.testing.assert_close(y, torch.tensor([[1.0], [0.0]], dtype=dtype).sigmoid().expand(2, batch))
    assert [tuple(g.shape) for g in torch.autograd.grad(y.sum(), (x, w, b))] == [(0, batch), (0,), (1,)]
    check_against_twin(no_edges, [x, w, b, None])
    one = plan(1, [0, 1], [0], code=CODE["tanh"])
    check_against_twin(one, operands(one, batch, dtype))


def test_a_tied_weight_has_the_sum_of_the_gradients() -> None:
    loose = region(5, codes=SMOOTH)
    index = loose.weight % 4
    tied = plan(
        loose.inputs, loose.pointer, loose.column, weight=index, code=loose.code,
        aggregation=loose.aggregation, bias=loose.bias,
    )  # fmt: skip
    x, shared, b, _ = operands(tied, 33, torch.float64)
    assert shared is not None
    spread = torch.empty(loose.weights, dtype=torch.float64)
    spread[torch.from_numpy(loose.weight).long()] = shared.detach()[torch.from_numpy(index).long()]
    spread.requires_grad_()
    y, z = walk(tied, x, shared, b), walk(loose, x, spread, b)
    assert apart(y, z) == 0
    (found,), (single,) = torch.autograd.grad(y.sum(), shared), torch.autograd.grad(z.sum(), spread)
    order = torch.from_numpy(loose.weight).long()
    expected = torch.zeros_like(found).index_add(0, torch.from_numpy(index).long(), single[order])
    assert apart(found, expected) < 1e-12


# --- some rows, and weights in parts --------------------------------------------------------------------------


def some_rows(p: WalkPlan, seed: int) -> Rows:
    """About a third of them, in any order."""
    r = np.random.default_rng(seed)
    return Rows(r.permutation(p.neurons)[: 1 + p.neurons // 3])


def in_parts(tensor: Tensor | None) -> list[Tensor]:
    """A vector as a matrix of one column, an empty piece, and the rest."""
    assert tensor is not None
    cut = len(tensor) // 2
    return [tensor[:cut, None], tensor[cut:cut], tensor[cut:]]


@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(BATCHES), st.booleans(), st.booleans())
@example(0, 1, 1, False, False)
@example(3, 40, 257, True, True)
def test_rows_are_rows_of_the_walk(seed: int, neurons: int, batch: int, tied: bool, offset: bool) -> None:
    p = region(seed, neurons, tied=tied)
    tensors, rows = operands(p, batch, torch.float64, seed, offset), some_rows(p, seed)

    def fast(p: WalkPlan, x: Tensor, w: Tensor, b: Tensor, o: Tensor | None = None) -> Tensor:
        return walk_rows(p, rows, x, in_parts(w), in_parts(b), o)

    def slow(p: WalkPlan, *operands: Tensor) -> Tensor:
        return walk_reference(p, *operands)[rows.tensor].t()

    found, expected = values_and_gradients(fast, p, tensors), values_and_gradients(slow, p, tensors)
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12
    with torch.no_grad():
        for _ in range(2):  # the second time in memory that holds the values of the first
            y = fast(p, *tensors)  # type: ignore[arg-type]
            assert y.is_contiguous() and apart(y, expected[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 17, 130])
def test_rows_on_fresh_memory_threads_and_any_gradient(
    dtype: torch.dtype, batch: int, nan_filled_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = region(14, 40, codes=SMOOTH, maxima=0.3 if dtype == torch.float64 else 0.0)
    tensors, rows = operands(p, batch, dtype), some_rows(p, 2)
    slow = values_and_gradients(lambda p, *o: walk_reference(p, *o)[rows.tensor].t(), p, doubled(tensors))
    monkeypatch.setattr(walk_cpu, "_WORK_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for walk_once in (lambda p, *o: walk_rows(p, rows, *o), lambda p, *o: walk_rows(p, rows, *o).t().contiguous().t()):
        fast = values_and_gradients(walk_once, p, tensors)
        pairs = [(fast[0], slow[0]), *((torch.cat([g.flatten() for g in t[1:]]) for t in (fast, slow)),)]
        assert max(apart(f, e) for f, e in pairs) <= TOLERANCE[dtype]
    x, w, b, o = tensors
    expanded = torch.autograd.grad(walk_rows(p, rows, x, w, b, o).sum(), w)  # type: ignore[arg-type]
    whole = torch.autograd.grad(walk_reference(p, x, w, b, o)[rows.tensor].sum(), w)  # type: ignore[arg-type]
    assert apart(expanded[0], whole[0]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)])
def test_rows_give_only_the_gradients_that_are_needed(needs: tuple[bool, ...]) -> None:
    p = region(9, 25)
    rows = some_rows(p, 1)
    tensors = [t.detach().requires_grad_(n) for t, n in zip(operands(p, 18, torch.float64), needs, strict=True)]  # type: ignore[union-attr]
    leaves = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(walk_rows(p, rows, *tensors).square().sum(), leaves, create_graph=False)
    expected = torch.autograd.grad(walk_reference(p, *tensors)[rows.tensor].square().sum(), leaves)
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12


def test_second_derivatives_of_rows_with_weights_in_parts() -> None:
    p = region(6, 10, 3, 4, codes=SMOOTH, maxima=0.0)
    rows, tensors = some_rows(p, 0), operands(p, 4, torch.float64)

    def second(function: Any) -> list[Tensor]:
        x, w, b, o = (t.detach().requires_grad_() for t in tensors)  # type: ignore[union-attr]
        (g,) = torch.autograd.grad(function(x, w, b, o).pow(3).sum(), w, create_graph=True)
        return list(torch.autograd.grad(g.square().sum(), (x, w, b, o)))

    found = second(lambda x, w, b, o: walk_rows(p, rows, x, in_parts(w), in_parts(b), o))
    expected = second(lambda x, w, b, o: walk_reference(p, x, w, b, o)[rows.tensor].t())
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) < 1e-11


def test_rows_under_functorch_and_compiled() -> None:
    p = region(8, 12, 3, 4, codes=SMOOTH, maxima=0.2)
    rows = some_rows(p, 0)
    x, w, b, _ = (None if t is None else t.detach() for t in operands(p, 5, torch.float64))

    def picked(w: Tensor) -> Tensor:
        return walk_rows(p, rows, x, in_parts(w), in_parts(b)).square().sum()  # type: ignore[arg-type]

    assert w is not None
    plain = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(picked(plain), plain)
    assert apart(torch.func.grad(picked)(w), expected) < 1e-12
    compiled = torch.compile(picked, backend="eager", fullgraph=True)
    assert abs(float(compiled(w) - picked(w))) < 1e-12


def test_weights_are_read_where_they_are_if_every_row_needs_one_part_only() -> None:
    """Two layers of two, each with its own weights; a third that mixes them has them put together."""
    layers = plan(2, [0, 2, 4, 6, 8], [0, 1, 0, 1, 2, 3, 2, 3], weight=[0, 1, 2, 3, 4, 5, 7, 6], code=CODE["tanh"])
    parts = parts_of(layers, [4, 4])
    assert parts is not None and parts[0] == [4, 4] and parts[1].tolist() == [0, 0, 1, 1]
    assert parts_of(layers, [3, 5]) is None and parts_of(layers, [8]) is None and parts_of(layers, [4, 3]) is None
    rows = Rows(np.array([3, 0]), parts)
    x, w = torch.randn(2, 70), torch.randn(8)
    expected = walk_reference(layers, x, w)[rows.tensor].t()
    for pieces in ([w[:4], w[4:]], [w[:3], w[3:]], [w], [w[:4].clone(), w.flip(0)[:4].flip(0)]):
        assert apart(walk_rows(layers, rows, x, pieces), expected) < 1e-6
        assert apart(walk_rows(layers, rows, x[:, :1], pieces), expected[:1]) < 1e-6
    again = copy.deepcopy(rows)
    assert again.address != rows.address and again.part_of_address != rows.part_of_address
    assert apart(walk_rows(layers, again, x, [w[:4], w[4:]]), expected) < 1e-6


def test_memory_that_serves_again_is_bounded_and_never_shared() -> None:
    p = region(2, 30)
    rows, tensors = some_rows(p, 0), [t.detach() for t in operands(p, 40, torch.float32)]  # type: ignore[union-attr]
    first = walk_rows(p, rows, *tensors)
    kept = first.clone()
    second = walk_rows(p, rows, 2 * tensors[0], *tensors[1:])
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert len(p.spare) == 1
    walk_rows(p, rows, *(t.double() for t in tensors))
    walk_rows(p, rows, *tensors)
    assert len(p.spare) == 1 and sum(t.numel() * t.element_size() for t in p.spare) <= shared._SPARE_BYTES


def test_rows_that_do_not_fit_are_refused() -> None:
    p = region(2, 30)
    x, w, b, _ = operands(p, 2, torch.float64)
    for wrong in ([1, 1], [-1, 2]):
        with pytest.raises(ValueError, match="rows must be different numbers from 0 on"):
            Rows(np.array(wrong))
    with pytest.raises(ValueError, match="walk: rows must be below 30, found 30"):
        walk_rows(p, Rows(np.array([30])), x, w, b)  # type: ignore[arg-type]
    assert walk_rows(p, Rows(np.empty(0, np.int64)), x, w, b).shape == (2, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights must be \[\d+\] or longer, found \[1\]"):
        walk(p, x, [w[:1]], b)  # type: ignore[arg-type,index]


# --- what must not leak ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 19, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_with_its_sample_and_reaches_everything_behind_it(
    batch: int, dtype: torch.dtype, nan_filled_memory: None
) -> None:
    p = region(11, 60)
    tensors = operands(p, batch, dtype)
    x = tensors[0]
    assert x is not None
    with torch.no_grad():
        x[1, batch // 2] = torch.nan
        found, expected = walk(p, *tensors), walk_reference(p, *tensors)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[:, batch // 2].isnan().any()
    others = torch.arange(batch) != batch // 2
    assert found[:, others].isfinite().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("batch", [1, 9])
def test_nan_passes_every_activation(name: str, batch: int) -> None:
    p = plan(1, [0, 1], [0], code=CODE[name])
    for dtype in (torch.float32, torch.float64):
        x = torch.full((1, batch), torch.nan, dtype=dtype, requires_grad=True)
        y = walk(p, x, torch.ones(1, dtype=dtype))
        assert y.isnan().all()
        (slope,) = torch.autograd.grad(y.sum(), x)
        expected = torch.autograd.grad(walk_reference(p, x, torch.ones(1, dtype=dtype)).sum(), x)[0]
        assert name in ("leaky_relu", "relu", "abs", "elu", "selu") or torch.equal(slope.isnan(), expected.isnan())


def test_a_weight_that_is_infinite_does_not_spoil_padding() -> None:
    p = plan(1, [0, 1, 2], [0, 1], code=CODE["tanh"])
    w = torch.tensor([torch.inf, 1.0], requires_grad=True)
    y = walk(p, torch.ones(1, 3), w)
    assert y[0].tolist() == [1.0, 1.0, 1.0]
    (dw,) = torch.autograd.grad(y[1].sum(), w)
    assert dw.isfinite().all() and dw[1] > 0


# --- differentiating again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_gradcheck_and_gradgradcheck(batch: int) -> None:
    p = region(2, 8, 2, 3, codes=SMOOTH, maxima=0.25)
    tensors = operands(p, batch, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: walk(p, *t), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: walk(p, *t), tensors)


@pytest.mark.parametrize("wanted", [(1,), (2,), (1, 2), (0, 1, 2, 3)])
def test_hessian_vector_products_on_subsets(wanted: tuple[int, ...]) -> None:
    p = region(4, 15, 3, 5, codes=SMOOTH, maxima=0.2)
    tensors = operands(p, 6, torch.float64)

    def loss(function: Any, *chosen: Tensor) -> Tensor:
        full = list(tensors)
        for k, t in zip(wanted, chosen, strict=True):
            full[k] = t
        return function(p, *full).square().sum()

    chosen = [tensors[k] for k in wanted]
    vectors = [torch.randn_like(t) for t in chosen]  # type: ignore[arg-type]
    first = torch.autograd.grad(loss(walk, *chosen), chosen, create_graph=True)  # type: ignore[arg-type]
    products = torch.autograd.grad(first, chosen, vectors)  # type: ignore[arg-type]
    dense = torch.autograd.functional.hessian(
        lambda *t: loss(walk_reference, *t),
        tuple(t.detach() for t in chosen),  # type: ignore[union-attr]
    )
    for row, product_ in zip(dense, products, strict=True):
        expected = sum(torch.tensordot(block, v, dims=v.dim()) for block, v in zip(row, vectors, strict=True))
        assert apart(product_, expected) < 1e-11  # type: ignore[arg-type]


def test_second_derivatives_where_one_operand_makes_another() -> None:
    """The weights are computed from the inputs: each path must be counted once."""
    p = region(6, 10, 3, 4, codes=SMOOTH, maxima=0.0)
    x0 = operands(p, 4, torch.float64)[0]
    assert x0 is not None
    mix = torch.randn(p.weights, x0.numel(), dtype=torch.float64)
    b = torch.zeros(p.biases, dtype=torch.float64)

    def second(function: Any) -> tuple[Tensor, ...]:
        x = x0.detach().requires_grad_()
        y = function(p, x, (0.3 * mix @ x.reshape(-1)).tanh(), b)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)

    assert apart(second(walk)[0], second(walk_reference)[0]) < 1e-11


def test_functorch_and_forward_mode() -> None:
    p = region(8, 12, 3, 4, codes=SMOOTH, maxima=0.2)
    x, w, b, _ = operands(p, 5, torch.float64)
    assert x is not None and w is not None and b is not None
    x, w, b = x.detach(), w.detach(), b.detach()
    many = torch.stack([w, 2 * w, -w])
    stacked = torch.func.vmap(lambda w: walk(p, x, w, b))(many)
    assert apart(stacked, torch.stack([walk(p, x, row, b) for row in many])) < 1e-12

    def loss(w: Tensor) -> Tensor:
        return walk(p, x, w, b).square().sum()

    plain = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain), plain)
    assert apart(torch.func.grad(loss)(w), expected) < 1e-12
    direction = torch.randn_like(w)
    _, tangent = torch.func.jvp(loss, (w,), (direction,))
    assert abs(tangent - expected @ direction) < 1e-10
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(w, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    assert abs(tangent - expected @ direction) < 1e-10
    slow = torch.autograd.functional.jacobian(lambda w: walk(p, x, w, b), w)
    quick = torch.autograd.functional.jacobian(lambda w: walk(p, x, w, b), w, vectorize=True)
    assert apart(quick, slow) < 1e-12


@pytest.mark.parametrize("needs", [n for n in product([False, True], repeat=4) if any(n)])
@pytest.mark.parametrize("batch", [1, 18])
def test_only_what_is_needed_is_differentiated(needs: tuple[bool, ...], batch: int) -> None:
    p = region(9, 25)
    tensors = operands(p, batch, torch.float64)
    full = values_and_gradients(walk, p, tensors)[1:]
    some = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]  # type: ignore[union-attr]
    y = walk(p, *some)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = iter(torch.autograd.grad(y, [t for t in some if t.requires_grad], incoming))
    for need, expected in zip(needs, full, strict=True):
        if need:
            assert apart(next(found), expected) < 1e-12


def test_a_result_changed_in_place_is_noticed() -> None:
    p = region(1)
    x, w, b, _ = operands(p, 4, torch.float64)
    y = walk(p, x, w, b)
    with pytest.raises(RuntimeError, match="in-?place"), torch.no_grad():
        y.add_(1)
        with torch.enable_grad():
            y.sum().backward()


# --- how tensors may lie --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 6, 40])
def test_operands_and_gradients_may_lie_anyhow(dtype: torch.dtype, batch: int) -> None:
    p = region(12, 20, codes=SMOOTH, maxima=0.0)
    plain = [t.detach() for t in operands(p, batch, dtype) if t is not None]
    expected = walk(p, *plain)
    x, w, b, o = plain
    for views in (
        [x.t().contiguous().t(), w, b, o.t().contiguous().t()],
        [
            torch.stack([x, x], 2)[:, :, 1],
            torch.stack([w, w], 1)[:, 0],
            b.flip(0).flip(0),
            torch.cat([o, o], 1)[:, batch:],
        ],
        [torch.cat([x, x])[p.inputs :], torch.cat([w, w])[len(w) :], b.repeat(2)[: len(b)], torch.stack([o, o])[1]],
        [torch.complex(t, -t).conj().imag for t in plain],
    ):
        assert apart(walk(p, *views), expected) == 0
    same = x[:, :1].expand(-1, batch)
    assert apart(walk(p, same, w, b), walk(p, same.contiguous(), w, b)) == 0
    leaf = w.clone().requires_grad_()
    for incoming in (
        torch.ones(1, 1, dtype=dtype).expand(p.neurons, batch),
        torch.randn(batch, p.neurons, dtype=dtype).t(),
        torch.randn(p.neurons, 2 * batch, dtype=dtype)[:, ::2],
    ):
        (found,) = torch.autograd.grad(walk(p, x, leaf, b, o), leaf, incoming)
        (again,) = torch.autograd.grad(walk(p, x, leaf, b, o), leaf, incoming.contiguous())
        assert apart(found, again) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_run_the_reference(dtype: torch.dtype) -> None:
    p = region(13, 8, codes=[CODE["tanh"]], maxima=0.0)
    x, w, b, _ = (t.detach() if t is not None else None for t in operands(p, 3, dtype))
    y = walk(p, x, w, b)  # type: ignore[arg-type]
    assert y.dtype == dtype
    assert apart(y, walk_reference(p, x.double(), w.double(), b.double())) < 0.1  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_on_threads_and_panels_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    p = region(14, 40, codes=SMOOTH, maxima=0.3 if dtype == torch.float64 else 0.0)
    tensors = operands(p, 257, dtype)
    once = values_and_gradients(walk, p, tensors)
    monkeypatch.setattr(walk_cpu, "_WORK_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cut = walk_cpu._slices(p, walk_cpu.pitch_of(257, once[0]), once[0])
    assert len(cut) == 3 and cut[-1][1] >= 257
    threaded = values_and_gradients(walk, p, tensors)
    monkeypatch.setattr(walk_cpu, "_PANEL_BYTES", 128)
    paneled = values_and_gradients(walk, p, tensors)
    for a, b, c in zip(once, threaded, paneled, strict=True):
        assert apart(b, a) < TOLERANCE[dtype] and apart(c, a) < TOLERANCE[dtype]
    assert apart(threaded[1], once[1]) < 1e-6 and apart(paneled[0], once[0]) < 1e-6


def test_without_numba_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    p = region(15)
    tensors = operands(p, 4, torch.float64)
    expected = values_and_gradients(walk, p, tensors)
    monkeypatch.setattr(walk_cpu, "kernels", lambda: None)
    monkeypatch.setattr(walk_module, "forward", None)
    found = values_and_gradients(walk, p, tensors)
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12


# --- torch.compile --------------------------------------------------------------------------------------------


def test_the_registered_step_satisfies_torch() -> None:
    p = region(16, 8, codes=[CODE["tanh"], CODE["gelu"]])
    for batch in (1, 5):
        x, w, b, o = operands(p, batch, torch.float64)
        torch.library.opcheck(
            walk_module._walk_op,
            (p.tensor, x, w, b, o, p.neurons, p.slopes),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_compiled_it_is_one_opaque_call() -> None:
    p = region(17, 15, codes=SMOOTH)
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return walk(p, x, w, b).square().sum()

    x, w, b, _ = operands(p, 6, torch.float64)
    expected = torch.autograd.grad(step(x, w, b), (x, w, b))  # type: ignore[arg-type]
    seen = torch.compile(step, backend=look, fullgraph=True)
    found = torch.autograd.grad(seen(x, w, b), (x, w, b))  # type: ignore[arg-type]
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12
    calls = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    assert sum("irgrow" in c for c in calls) == 1 and not any("index_select" in c for c in calls)
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(traced(x, w, b), (x, w, b))  # type: ignore[arg-type]
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12


# --- plans ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(0, 4), st.booleans())
def test_a_plan_holds_what_was_given_and_its_transpose(seed: int, neurons: int, inputs: int, tied: bool) -> None:
    p = region(seed, neurons, inputs, tied=tied)
    rows = np.repeat(np.arange(neurons), np.diff(p.pointer))
    summed = p.aggregation[rows] == SUM
    forward = sorted(zip(p.column[summed], rows[summed] + inputs, p.weight[summed], strict=True))
    sweep = p.rows - 1 - np.repeat(np.arange(p.rows), np.diff(p.child_pointer))  # last value row first
    assert sorted(zip(sweep, p.child, p.child_weight, strict=True)) == forward
    level = np.searchsorted(p.level_pointer, np.arange(neurons), side="right") - 1
    inner = p.column >= inputs
    assert (level[rows[inner]] > level[p.column[inner] - inputs]).all()
    assert p.level_pointer[0] == 0 and p.level_pointer[-1] == neurons and p.levels == len(p.level_pointer) - 1
    stored = np.isin(p.code, [CODE[n] for n in walk_plan.SLOPE_STORED])
    np.testing.assert_array_equal(p.slope[stored], np.arange(p.slopes))
    assert (p.slope[~stored] == -1).all()
    interpreted = np.empty_like(p.structure)
    build = getattr(walk_plan._build, "py_func", walk_plan._build)
    parts = (p.pointer, p.column, p.weight, p.code, p.aggregation, p.bias, walk_plan._STORED)
    assert build(interpreted, inputs, *parts) == (0, 0, 0)
    np.testing.assert_array_equal(interpreted, p.structure)


def test_slopes_are_stored_for_the_same_activations_everywhere() -> None:
    from irgrow.kernels.activations_numba import stores_slope

    stored = {a.name for a in ACTIVATIONS.values() if stores_slope.py_func(a.code)}
    assert stored == set(walk_plan.SLOPE_STORED)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copied_plan_outlives_the_original(copied: Any) -> None:
    p = region(18)
    tensors = operands(p, 3, torch.float64)
    expected = walk(p, *tensors).detach()
    q = copied(p)
    assert q.address == q.structure.ctypes.data == q.tensor.data_ptr()
    p.structure[:] = 0 if q.structure is not p.structure else p.structure
    assert apart(walk(q, *tensors), expected) == 0
    assert repr(q).startswith("WalkPlan(5 inputs -> 30 neurons, ")


def test_what_a_walk_costs() -> None:
    p = plan(2, [0, 2, 3], [0, 1, 2], code=0, bias=0)
    assert (p.edges, p.neurons, p.weights, p.biases) == (3, 2, 3, 1)
    index, values, weights = 4 * (2 * 3 + 5 * 2), 4 * 10, 4 * 4
    assert cost(p, 10) == (2 * 10 * (3 + 2), 4 * values + index + weights)
    assert cost(p, 10, itemsize=8)[1] == 2 * 4 * values + index + 2 * weights
    flops, moved = cost(p, 10, backward=True)
    assert flops == 2 * 10 * (2 * 3 + 2) and moved == 3 * 4 * values + 2 * (index + weights)


# --- what callers get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"column": [0, 2, 1]}, ValueError, r"row 0 \(value row 2\), edge 1: comes from value row 2, expected 0..1"),
        ({"column": [0, 1, -1]}, ValueError, r"row 1 \(value row 3\), edge 2: comes from value row -1"),
        ({"column": [0, 1]}, ValueError, "pointer must rise from 0 to 2"),
        ({"pointer": [0, 3, 2]}, ValueError, "pointer must rise from 0 to 3"),
        ({"pointer": [0, 4, 3]}, ValueError, "pointer must rise from 0 to 3"),
        ({"pointer": []}, ValueError, r"pointer must have neurons \+ 1 entries"),
        ({"weight": [0, 1]}, ValueError, "weight must have one entry per edge, found 2 for 3"),
        ({"weight": [0, -1, 2]}, ValueError, "edge 1: has weight index -1"),
        ({"code": 14}, ValueError, "row 0 .*: has activation code 14, expected 0..13"),
        ({"code": [0]}, ValueError, "code must have one entry per neuron, found 1 for 2"),
        ({"aggregation": [0, 2]}, ValueError, r"row 1 .* has aggregation 2, expected 0 \(sum\) or 1 \(max\)"),
        ({"bias": -2}, ValueError, r"row 0 .* has bias index -2, expected -1 \(none\)"),
        ({"column": [0.0, 1.0, 2.0]}, TypeError, "column must be a 1-d integer array, found float64"),
        ({"column": np.array([0, 1, 2**31])}, ValueError, "column holds 2147483648, which does not fit int32"),
        ({"inputs": -1}, ValueError, "a region of -1 inputs"),
    ],
)
def test_a_structure_that_cannot_be_walked_is_refused(changes: Any, error: type[Exception], text: str) -> None:
    given_ = {"inputs": 2, "pointer": [0, 2, 3], "column": [0, 1, 2], "code": 0} | changes
    with pytest.raises(error, match=text):
        plan(given_.pop("inputs"), given_.pop("pointer"), given_.pop("column"), **given_)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"inputs": torch.ones(3, 4)}, ValueError, r"inputs must be \[2, batch\], found \[3, 4\]"),
        ({"inputs": torch.ones(2)}, ValueError, r"inputs must be \[2, batch\], found \[2\]"),
        ({"weights": torch.ones(2)}, ValueError, r"weights must be \[3\] or longer, found \[2\]"),
        ({"weights": torch.ones(3, 1)}, ValueError, r"weights must be \[3\] or longer, found \[3, 1\]"),
        ({"biases": torch.ones(0)}, ValueError, r"biases must be \[1\] or longer, found \[0\]"),
        ({"biases": None}, ValueError, r"biases must be \[1\] or longer, found none"),
        ({"offset": torch.ones(2, 5)}, ValueError, r"offset must be \[2, 4\], found \[2, 5\]"),
        ({"inputs": torch.ones(2, 4).double()}, TypeError, "inputs must be torch.float32 on cpu like the weights"),
        ({"biases": torch.ones(1).double()}, TypeError, "biases must be torch.float32 .* found torch.float64"),
        ({"offset": torch.ones(2, 4, device="meta")}, ValueError, "offset must be .* on cpu .* on meta"),
        (
            {"inputs": torch.ones(2, 4).int(), "weights": torch.ones(3).int(), "biases": torch.ones(1).int()},
            TypeError,
            "must be floating point, found torch.int32",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: Any, error: type[Exception], text: str) -> None:
    p = plan(2, [0, 2, 3], [0, 1, 2], code=0, bias=0)
    fitting = {"inputs": torch.ones(2, 4), "weights": torch.ones(3), "biases": torch.ones(1), "offset": None}
    walk(p, **fitting)  # type: ignore[arg-type]
    with pytest.raises(error, match=text):
        walk(p, **(fitting | changes))  # type: ignore[arg-type]
