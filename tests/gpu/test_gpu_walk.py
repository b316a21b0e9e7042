"""The walk on Triton, against its plain-torch twin in float64 and against answers worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from irgrow.kernels import walk_triton
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.walk import MAX, SUM, WalkPlan, plan, walk_reference
from irgrow.kernels.walk_tiles import LANES, LONG
from irgrow.kernels.walk_triton import walk
from tests.kernels.test_walk import CODE, SMOOTH, TOLERANCE, apart, doubled, region, values_and_gradients
from tests.kernels.test_walk import operands as cpu_operands


def operands(
    p: WalkPlan, batch: int, dtype: torch.dtype, device: str, seed: int = 0, offset: bool = True
) -> list[Tensor | None]:
    made = cpu_operands(p, batch, dtype, seed, offset)
    return [None if t is None else t.detach().to(device).requires_grad_() for t in made]


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
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def hub(parents: int, children: int, aggregation: int = SUM) -> WalkPlan:
    """One row with many parents, and one with many children that share a weight and a bias."""
    pointer = np.concatenate([[0, parents], parents + 1 + np.arange(children)])
    column = np.concatenate([np.arange(parents), np.full(children, parents)])
    weight = np.concatenate([np.arange(parents), np.full(children, parents)])
    kinds = np.concatenate([[aggregation], np.full(children, SUM)])
    bias = np.concatenate([[1], np.zeros(children, int)])
    return plan(parents, pointer, column, weight=weight, code=CODE["tanh"], aggregation=kinds, bias=bias)


# --- fast against slow ----------------------------------------------------------------------------------------

# (seed, neurons, inputs, batch, tied weights, offset)
SHAPES = [
    (0, 1, 0, 1, False, False),
    (1, 1, 3, 3, False, True),
    (2, 14, 4, 7, True, False),
    (3, 9, 0, 9, False, True),
    pytest.param((4, 12, 6, 17, True, True), marks=pytest.mark.slow),
]
LARGE = [(5, 300, 20, 65, False, True), (6, 2000, 64, 257, True, False), (7, 700, 5, 2050, False, False)]


@pytest.mark.parametrize("shape", SHAPES)
def test_walk_is_its_twin(shape: tuple[Any, ...], device: str, nan_filled_memory: None) -> None:
    seed, neurons, inputs, batch, tied, offset = shape
    p = region(seed, neurons, inputs, tied=tied)
    check_against_twin(p, operands(p, batch, torch.float64, device, seed, offset))


def test_walk_is_its_twin_in_float32(device: str, nan_filled_memory: None) -> None:
    """Where rounding cannot change which side of a kink a sample is on."""
    p = region(8, 12, codes=SMOOTH, maxima=0.0)
    check_against_twin(p, operands(p, 5, torch.float32, device))


def test_large_regions_are_their_twins(device: str, large: bool) -> None:
    for seed, neurons, inputs, batch, tied, offset in LARGE if large else []:
        p = region(seed, neurons, inputs, tied=tied, codes=[CODE["tanh"], CODE["sin"], CODE["relu"]])
        check_against_twin(p, operands(p, batch, torch.float64, device, seed, offset))
        p = region(seed, neurons, inputs, tied=tied, codes=[CODE["tanh"], CODE["gelu"]], maxima=0.0)
        check_against_twin(p, operands(p, batch, torch.float32, device, seed, offset))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    """Each value is rounded once, when it is stored: far closer than adding up in halves would be."""
    p = hub(100, 1)
    tensors = operands(p, 3, dtype, device)
    found, expected = (values_and_gradients(f, p, t) for f, t in ((walk, tensors), (walk_reference, doubled(tensors))))
    assert {t.dtype for t in found} == {dtype}
    rounding = torch.finfo(dtype).eps
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) <= 2 * rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_and_kinks_where_arithmetic_is_exact(dtype: torch.dtype, device: str) -> None:
    """Small integers: every zero is exactly zero, ties are frequent, and no sum is rounded."""
    p = region(5, 12, degree=5, codes=[CODE[n] for n in ("identity", "relu", "abs")], maxima=0.6)
    tensors = [
        (2 * t.detach() / t.detach().abs().mean().clamp_min(0.1)).round().clamp(-1, 1).requires_grad_()
        for t in operands(p, 6, dtype, device)
        if t is not None
    ]
    found = values_and_gradients(walk, p, tensors)  # type: ignore[arg-type]
    expected = values_and_gradients(walk_reference, p, doubled(tensors))  # type: ignore[arg-type]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=0)
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("parents", "children"), [(LONG + 37, 3), (2, 2 * LONG + 5)])
def test_rows_with_many_edges_are_shared_among_lanes(parents: int, children: int, device: str) -> None:
    p = hub(parents, children)
    check_against_twin(p, operands(p, 3, torch.float64, device))


def test_a_maximum_over_many_and_wide_levels(device: str) -> None:
    p = hub(LONG + 9, LANES + 3, MAX)
    check_against_twin(p, operands(p, 2, torch.float64, device))


def test_many_maxima_over_one_row(device: str) -> None:
    """Its gradient comes from where it won."""
    children = LONG + 9
    pointer, column = 2 * np.arange(children + 1), np.tile([0, 1], children)
    p = plan(2, pointer, column, code=CODE["identity"], aggregation=MAX)
    check_against_twin(p, operands(p, 3, torch.float64, device))


def test_slices_of_the_batch_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = region(14, 3, maxima=0.3, codes=[CODE["tanh"]])
    tensors = operands(p, 40, torch.float64, device)
    monkeypatch.setattr(walk_triton, "_SLICE", 32)
    check_against_twin(p, tensors)


def test_the_comparison_notices_a_wrong_structure(device: str) -> None:
    p, q = region(3, 12), region(3, 12)
    tensors = operands(p, 3, torch.float64, device)
    q.child_weight[5] = (q.child_weight[5] + 1) % q.weights  # only the backward pass reads this
    with pytest.raises(AssertionError):
        check_against_twin(q, tensors)


def test_results_repeat_bit_for_bit(device: str, large: bool) -> None:
    """A missing barrier would show here: a deep region whose levels are computed by different warps."""
    p = region(21, 1500 if large else 6, 40 if large else 3, degree=40, codes=[CODE["tanh"]])
    tensors = operands(p, 100 if large else 2, torch.float32, device)
    once = values_and_gradients(walk, p, tensors)
    for _ in range(20 if large else 1):
        again = values_and_gradients(walk, p, tensors)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# --- activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_each_activation_and_its_slope(dtype: torch.dtype, tolerance: float, device: str, large: bool) -> None:
    """Over the range where it bends, all in one tile, against torch in float64."""
    count = 4001 if large else 25
    z = torch.cat([torch.linspace(-30, 30, count), torch.linspace(-0.01, 0.01, 7)]).to(device, dtype)
    names = list(ACTIVATIONS)
    nothing = np.zeros(len(names), int)
    p = plan(1, np.arange(len(names) + 1), nothing, weight=nothing, code=[CODE[name] for name in names])
    # the gradient of the offset, which is added to the pre-activation, is sigma'(z)
    offset = torch.zeros(p.neurons, len(z), dtype=dtype, device=device, requires_grad=True)
    y = walk(p, z[None], torch.ones(1, dtype=dtype, device=device), None, offset)
    (slopes,) = torch.autograd.grad(y.sum(), offset)
    for k, name in enumerate(names):
        exact = z.double().requires_grad_()
        expected = ACTIVATIONS[name](exact)
        (slope,) = torch.autograd.grad(expected.sum(), exact)
        assert apart(y[k], expected.detach()) <= tolerance, name
        assert apart(slopes[k], slope) <= tolerance, name


def test_small_numbers_keep_their_digits(device: str) -> None:
    """tanh, elu and selu near 0, softplus far below: relative to each number, not to the largest."""
    z = torch.tensor([-1e-6, -3e-9, -1e-12, -1e-4], dtype=torch.float64, device=device)
    for name in ("tanh", "elu", "selu"):
        p = plan(1, [0, 1], [0], code=CODE[name])
        y = walk(p, z[None], torch.ones(1, dtype=z.dtype, device=device))[0]
        assert ((y - ACTIVATIONS[name](z)) / z).abs().max() < 1e-14
    p = plan(1, [0, 1], [0], code=CODE["softplus"])
    y = walk(p, z[None] * 1e-6 - 30, torch.ones(1, dtype=z.dtype, device=device))[0]
    assert (y / ACTIVATIONS["softplus"](z * 1e-6 - 30) - 1).abs().max() < 1e-13


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_passes_every_activation(name: str, device: str) -> None:
    p = plan(1, [0, 1], [0], code=CODE[name])
    x = torch.tensor([[torch.nan, 1.0]], dtype=torch.float64, device=device)
    y = walk(p, x, torch.ones(1, dtype=torch.float64, device=device))
    assert y.isnan().tolist() == [[True, False]]


# --- by hand --------------------------------------------------------------------------------------------------


def test_a_small_region_by_hand(device: str) -> None:
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
    w = torch.tensor([2.0, -1.0, 4.0, 0.5, 9.0], device=device, requires_grad=True)  # one more than is used
    bias = torch.tensor([0.5], device=device, requires_grad=True)
    y = walk(p, torch.stack([a, b]).to(device), w, bias)
    # row 2: 2a - b = -1, -9; row 3: max(4a, row 2 / 2, 2b) + 0.5 = max(4, -.5, 6) + .5, max(-8, -4.5, 10) + .5
    assert y.tolist() == [[-1.0, -9.0], [6.5, 10.5], [0.25, 0.25]]
    dw, dbias = torch.autograd.grad(y.sum(), (w, bias))
    assert dw.tolist() == [(1 - 2) + (3 + 5), 3 + 5, 0, 0, 0]
    assert dbias.tolist() == [1 + 1 + 2 * (0.5 + 0.5)]


def test_a_tie_sends_its_gradient_to_the_first_parent_in_edge_order(device: str) -> None:
    p = plan(3, [0, 3], [2, 0, 1], code=CODE["identity"], aggregation=MAX)
    x = torch.ones(3, 3, device=device, requires_grad=True)
    w = torch.tensor([1.0, 1.0, 0.5], device=device, requires_grad=True)
    dx, dw = torch.autograd.grad(walk(p, x, w).sum(), (x, w))
    assert dx.sum(1).tolist() == [0, 0, 3] and dw.tolist() == [3, 0, 0]
    nan = torch.ones(3, 3, device=device)
    nan[:2] = torch.nan  # edges 1 and 2
    nan.requires_grad_()
    y = walk(p, nan, w.detach())
    assert y.isnan().all()
    assert torch.autograd.grad(y.sum(), nan)[0].sum(1).tolist() == [3, 0, 0]


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_regions_with_nothing_in_them(batch: int, device: str) -> None:
    no_rows = plan(2, [0], [], code=0)
    x = torch.ones(2, batch, device=device, requires_grad=True)
    y = walk(no_rows, x, torch.ones(0, device=device))
    assert y.shape == (0, batch)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (2, batch)
    no_edges = plan(0, [0, 0, 0], [], code=CODE["sigmoid"], bias=[0, -1], aggregation=[SUM, MAX])
    sizes = (0, batch), (0,), (1,)
    tensors = [torch.ones(s, dtype=torch.float64, device=device, requires_grad=True) for s in sizes]
    expected = torch.tensor([[1.0], [0.0]], dtype=torch.float64, device=device).sigmoid().expand(2, batch)
    torch.testing.assert_close(walk(no_edges, *tensors), expected)
    check_against_twin(no_edges, [*tensors, None])


# --- what must not leak ---------------------------------------------------------------------------------------


def test_nan_stays_with_its_sample(device: str, nan_filled_memory: None) -> None:
    p = region(11, 14)
    tensors = operands(p, 9, torch.float64, device)
    with torch.no_grad():
        tensors[0][1, 4] = torch.nan  # type: ignore[index]
        found, expected = walk(p, *tensors), walk_reference(p, *tensors)  # type: ignore[arg-type]
    assert torch.equal(found.isnan(), expected.isnan())
    others = torch.arange(9, device=device) != 4
    assert found[:, 4].isnan().any() and found[:, others].isfinite().all()


def test_a_weight_that_is_infinite_does_not_spoil_padding(device: str) -> None:
    p = plan(1, [0, 1, 2], [0, 1], code=CODE["tanh"])
    w = torch.tensor([torch.inf, 1.0], device=device, requires_grad=True)
    y = walk(p, torch.ones(1, 3, device=device), w)
    assert y[0].tolist() == [1.0, 1.0, 1.0]
    (dw,) = torch.autograd.grad(y[1].sum(), w)
    assert dw.isfinite().all() and dw[1] > 0


# --- differentiating ------------------------------------------------------------------------------------------


def test_only_what_is_needed_is_differentiated(device: str) -> None:
    p = region(9, 8)
    tensors = operands(p, 3, torch.float64, device)
    full = values_and_gradients(walk, p, tensors)[1:]
    y, saved = walk_triton.forward(p, *tensors, True)  # type: ignore[arg-type]
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    for needs in list(product([False, True], repeat=4))[:: 1 if device == "cuda" else 3]:
        with torch.no_grad():
            found = walk_triton.backward(p, incoming, saved, tensors[1], tensors[2], needs)  # type: ignore[arg-type]
        for need, ours, expected in zip(needs, found, full, strict=True):
            assert (apart(ours, expected) < 1e-12) if need else ours is None  # type: ignore[arg-type]


def test_second_derivatives_and_transforms_go_through_the_twin(device: str) -> None:
    p = region(6, 6, 3, 4, codes=SMOOTH, maxima=0.2)
    tensors = operands(p, 2, torch.float64, device)

    def second(function: Any) -> list[Tensor]:
        y = function(p, *tensors)
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        total = sum((g.square().sum() for g in first), start=y.new_zeros(()))
        return list(torch.autograd.grad(total, tensors))  # type: ignore[arg-type]

    assert max(apart(a, b) for a, b in zip(second(walk), second(walk_reference), strict=True)) < 1e-11
    x, w, b, _ = (t.detach() if t is not None else None for t in tensors)
    assert x is not None and w is not None
    many = torch.stack([w, -w])
    stacked = torch.func.vmap(lambda w: walk(p, x, w, b))(many)
    assert apart(stacked, torch.stack([walk(p, x, row, b) for row in many])) < 1e-12
    _, tangent = torch.func.jvp(lambda w: walk(p, x, w, b), (w,), (torch.ones_like(w),))
    _, expected = torch.func.jvp(lambda w: walk_reference(p, x, w, b), (w,), (torch.ones_like(w),))
    assert apart(tangent, expected) < 1e-12


# --- how tensors may lie --------------------------------------------------------------------------------------


def test_operands_and_gradients_may_lie_anyhow(device: str) -> None:
    p = region(12, 8, codes=SMOOTH, maxima=0.0)
    x, w, b, o = (t.detach() for t in operands(p, 3, torch.float64, device) if t is not None)
    expected = walk(p, x, w, b, o)
    for views in (
        [x.t().contiguous().t(), torch.cat([w, w])[len(w) :], b.flip(0).flip(0), torch.cat([o, o], 1)[:, 3:]],
        [torch.complex(t, -t).conj().imag for t in (x, w, b, o)],
    ):
        assert apart(walk(p, *views), expected) == 0
    leaf = w.clone().requires_grad_()
    for incoming in (torch.ones(1, 1, dtype=x.dtype, device=device).expand(p.neurons, 3), o.t().contiguous().t()):
        (found,) = torch.autograd.grad(walk(p, x, leaf, b, o), leaf, incoming)
        (again,) = torch.autograd.grad(walk(p, x, leaf, b, o), leaf, incoming.contiguous())
        assert apart(found, again) == 0


# --- torch.compile --------------------------------------------------------------------------------------------


def test_the_registered_step_satisfies_torch(device: str) -> None:
    p = region(16, 4, codes=[CODE["tanh"], CODE["gelu"]])
    x, w, b, o = operands(p, 2, torch.float64, device)
    torch.library.opcheck(
        walk_triton._walk_op,
        (p.tensor, x, w, b, o, p.neurons, p.slopes, p.maxima),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.slow
def test_compiled_it_is_one_opaque_call(device: str) -> None:
    p = region(17, 6, codes=SMOOTH)
    x, w, b, _ = operands(p, 2, torch.float64, device)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return walk(p, x, w, b).square().sum()

    expected = torch.autograd.grad(step(x, w, b), (x, w, b))  # type: ignore[arg-type]
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(traced(x, w, b), (x, w, b))  # type: ignore[arg-type]
    assert max(apart(f, e) for f, e in zip(found, expected, strict=True)) < 1e-12


def test_other_dtypes_are_refused(device: str) -> None:
    p = plan(1, [0, 1], [0], code=0)
    x, w = (torch.ones(size, device=device).to(torch.float8_e5m2) for size in ((1, 2), (1,)))
    with pytest.raises(TypeError, match="operands for Triton must be one of .* found torch.float8"):
        walk(p, x, w)
