"""Outer-product sums against float64 definitions, in every split into blocks, batches and chunks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import outer
from irgrow.kernels.outer import (
    OuterSums,
    accumulate,
    accumulate_gram,
    accumulate_gram_reference,
    accumulate_reference,
    add_products,
    mirror,
)

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def features(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def zeros(p: int, q: int) -> Tensor:
    return torch.zeros(p, q, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) if b.numel() else 0.0


def cut(features: Tensor, blocks: int) -> list[Tensor]:
    return list(features.tensor_split(blocks, dim=1))


@given(
    n=st.integers(0, 70),
    p=st.integers(1, 40),
    q=st.integers(1, 40),
    blocks=st.integers(1, 3),
    ones=st.booleans(),
    chunk=st.integers(1, 80),
    scale=st.sampled_from([1.0, -0.5, 37.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_accumulate(n, p, q, blocks, ones, chunk, scale, dtype):
    left, right, start = features(n, p, dtype), features(n, q, dtype, 1), features(p + ones, q, seed=2)
    options = {"scale": scale, "ones": ones}
    expected = accumulate_reference(start.clone(), left, right, **options)
    found = accumulate(start.clone(), cut(left, blocks), cut(right, blocks), chunk=chunk, **options)
    assert relative(found, expected) < TOLERANCE[dtype]


@given(
    n=st.integers(0, 70),
    d=st.integers(1, 40),
    blocks=st.integers(1, 3),
    ones=st.booleans(),
    chunk=st.integers(1, 80),
    scale=st.sampled_from([1.0, -0.5, 37.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_accumulate_gram(n, d, blocks, ones, chunk, scale, dtype):
    b, options = features(n, d, dtype), {"scale": scale, "ones": ones}
    start = mirror(features(d + ones, d + ones, seed=2))
    expected = accumulate_gram_reference(start.clone(), b, **options)
    found = mirror(accumulate_gram(start.clone(), cut(b, blocks), chunk=chunk, **options))
    assert relative(found, expected) < TOLERANCE[dtype]
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, d", [(1, 1), (1, 300), (1500, 1), (1025, 193), (700, 257), (2100, 300), (600, 401)])
def test_sizes_beyond_a_strip_and_a_chunk(n, d, dtype):
    b, g = features(n, d, dtype), features(n, 100, dtype, 1)
    for ones in (False, True):
        S = mirror(accumulate_gram(zeros(d + ones, d + ones), b, ones=ones))
        assert relative(S, accumulate_gram_reference(zeros(d + ones, d + ones), b, ones=ones)) < TOLERANCE[dtype]
        M = accumulate(zeros(d + ones, 100), b, g, ones=ones)
        assert relative(M, accumulate_reference(zeros(d + ones, 100), b, g, ones=ones)) < TOLERANCE[dtype]
        if ones:
            assert S[-1, -1] == n
            assert relative(S[-1:, :-1], b.double().sum(0, keepdim=True)) < 10 * TOLERANCE[dtype]


def test_positive_features_over_many_chunks_stay_accurate():
    """Sums of positive numbers are where float32 accumulation drifts; the chunks are added in float64."""
    b = features(20_000, 40, torch.float32).abs()
    expected = accumulate_gram_reference(zeros(40, 40), b)
    found = mirror(accumulate_gram(zeros(40, 40), b))
    assert relative(found, expected) < 4e-7
    assert relative(found, expected) < relative((b.T @ b).double(), expected)


def test_what_is_below_the_diagonal_is_never_read():
    start = torch.full((300, 300), float("nan"), dtype=torch.float64).tril(-1) + zeros(300, 300)
    b = features(50, 300)
    found = mirror(accumulate_gram(start, b))
    assert relative(found, accumulate_gram_reference(zeros(300, 300), b)) < 1e-12


def test_feature_major_and_strided_inputs():
    b, g = features(90, 50, torch.float32), features(90, 31, torch.float32, 1)
    S, M = mirror(accumulate_gram(zeros(50, 50), b)), accumulate(zeros(50, 31), b, g)
    wide = torch.cat([b, b], 1)[:, :50], torch.cat([g, g], 1)[:, :31]  # columns of something wider
    major = b.T.contiguous().T, g.T.contiguous().T  # as a region keeps them
    every_other = torch.stack([b, b], 1)[:, 0], torch.stack([g, g], 1)[:, 0]
    for left, right in (wide, major, every_other):
        assert relative(mirror(accumulate_gram(zeros(50, 50), left)), S) < 1e-6
        assert relative(accumulate(zeros(50, 31), left, right), M) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_multiplied_in_float32(dtype):
    b = features(200, 60, torch.float32).to(dtype)
    found = mirror(accumulate_gram(zeros(60, 60), b))
    assert relative(found, accumulate_gram_reference(zeros(60, 60), b)) < TOLERANCE[torch.float32]


def test_gradients_are_not_tracked():
    b = features(10, 4).requires_grad_()
    assert not accumulate_gram(zeros(4, 4), b).requires_grad


PAIRS = [("b", "b"), ("b", "g"), ("c", "c"), ("c", "g"), ("b", "c"), ("g", "g")]


def products(b: Tensor, c: Tensor, g: Tensor, gradient_scale: float = 1.0) -> dict[tuple[str, str], Tensor]:
    b = torch.cat([b, torch.ones(len(b), 1, dtype=b.dtype)], 1).double()
    of = {"b": b, "c": c.double(), "g": g.double() * gradient_scale}
    return {(x, y): of[x].T @ of[y] for x, y in PAIRS}


@given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    pairs=st.lists(st.sampled_from(PAIRS), min_size=1, unique=True),
    chunk=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_outer_sums(cuts, pairs, chunk, dtype):
    of = {"b": features(60, 9, dtype), "c": features(60, 5, dtype, 1), "g": features(60, 3, dtype, 2)}
    names = {name for pair in pairs for name in pair}
    ones = names & {"b"}
    sums = OuterSums(pairs, ones=ones, chunk=chunk)
    edges = [0, *sorted(cuts), 60]
    for k, (a, b) in enumerate(pairwise(edges)):
        batch = {name: cut(of[name][a:b], 2) if k % 2 else of[name][a:b] for name in names}
        sums.add(batch, scales={"g": 8.0})
        if k == 1:
            sums.sums()  # looking does not change anything
    assert sums.n == 60
    expected, found = products(*of.values(), gradient_scale=8.0), sums.sums()
    assert set(found) == set(pairs)
    for pair in pairs:
        assert relative(found[pair], expected[pair]) < TOLERANCE[dtype]
        assert torch.equal(sums[pair], found[pair])
    at_once = OuterSums(pairs, ones=ones, chunk=chunk)
    at_once.add({name: of[name] for name in names}, scales={"g": 8.0})
    for pair in pairs:
        assert torch.equal(at_once[pair], found[pair])  # bit for bit, however the samples were batched


def test_outer_sums_of_two_halves_add_up():
    of = {"b": features(901, 300), "g": features(901, 20, seed=1)}
    sums = [OuterSums([("b", "b"), ("b", "g")]) for _ in range(3)]
    for total, rows in zip(sums, (slice(None), slice(0, 400), slice(400, None)), strict=True):
        total.add({name: value[rows] for name, value in of.items()})
    for pair in sums[0].pairs:
        assert relative(sums[1][pair] + sums[2][pair], sums[0][pair]) < 1e-12


def test_whole_chunks_are_multiplied_where_they_are():
    """The same bits as through the buffer, which nothing is copied into; not where something waits, or is scaled."""
    b, g = features(96, 20, torch.float32), features(96, 7, torch.float32, 1)
    pairs = [("b", "b"), ("b", "g")]
    whole, pieces, scaled = (OuterSums(pairs, chunk=32) for _ in range(3))
    whole.add({"b": b, "g": g})
    for part in range(0, 96, 24):
        pieces.add({"b": b[part : part + 24], "g": g[part : part + 24]})
    scaled.add({"b": b, "g": g}, scales={"g": 2.0})
    for pair in pairs:
        assert torch.equal(whole[pair], pieces[pair])
    assert torch.equal(scaled["b", "g"], 2.0 * whole["b", "g"])
    assert whole._filled == 0 and whole.n == 96


def test_outer_sums_of_nothing_are_zero():
    sums = OuterSums([("b", "b")], ones={"b"})
    sums.add({"b": torch.empty(0, 4)})
    assert torch.equal(sums["b", "b"], zeros(5, 5))


@pytest.mark.parametrize("onednn", [True, False])
def test_repeats_bit_for_bit_and_without_onednn(onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(outer, "_ONEDNN", None)
    b, g = features(1500, 400, torch.float32), features(1500, 90, torch.float32, 1)
    runs = [(accumulate_gram(zeros(400, 400), b), accumulate(zeros(400, 90), b, g)) for _ in range(3)]
    for S, M in runs:
        assert torch.equal(S, runs[0][0]) and torch.equal(M, runs[0][1])
    assert relative(mirror(runs[0][0]), accumulate_gram_reference(zeros(400, 400), b)) < TOLERANCE[torch.float32]


def test_the_same_bits_with_any_number_of_threads(monkeypatch):
    shared = pytest.importorskip("irgrow.kernels.shared")
    monkeypatch.setattr(shared, "_WORK_PER_THREAD", 1)
    b, g, kept, asked = (
        features(300, 130, torch.float32),
        features(300, 90, torch.float32, 1),
        torch.get_num_threads(),
        [],
    )
    found, parts = [], shared.parts_for
    monkeypatch.setattr(shared, "parts_for", lambda *given: asked.append(parts(*given)) or asked[-1])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((accumulate_gram(zeros(130, 130), b), accumulate(zeros(130, 90), b, g)))
        monkeypatch.setattr(shared, "_torch_threads", lambda: None)  # none to be found: threads of our own
        found.append((accumulate_gram(zeros(130, 130), b), accumulate(zeros(130, 90), b, g)))
    finally:
        torch.set_num_threads(kept)
    assert asked == [1, 1, 2, 2, 3, 3, 3, 3]
    for S, M in found:
        assert torch.equal(S, found[0][0]) and torch.equal(M, found[0][1])


def test_nothing_beside_the_operands_is_read():
    """What lies before, between and after them is NaN."""
    room = torch.full((40, 60), float("nan"))
    for rows, width in ((17, 3), (33, 37), (40, 45)):
        b = room.clone()[:rows, 5 : 5 + width]
        b.copy_(features(rows, width, torch.float32))
        found = mirror(accumulate_gram(zeros(width, width), b))
        assert relative(found, accumulate_gram_reference(zeros(width, width), b)) < TOLERANCE[torch.float32]
        assert relative(accumulate(zeros(width, width), b.T.contiguous().T, b), found) < TOLERANCE[torch.float32]


def product(left: Tensor, right: Tensor) -> Tensor:
    out = zeros(len(left), len(right))
    add_products(out, left, right)
    return out


@pytest.mark.parametrize("n", [0, 1, 200, 511, 512, 1300])
@pytest.mark.parametrize("p, q", [(1, 1), (3, 40), (300, 260)])
def test_add_products_takes_any_layout(n, p, q):
    left, right = features(p, n, torch.float32), features(q, n, torch.float32, 1)
    expected = left.double() @ right.double().T
    for a in (left, left.T.contiguous().T, torch.cat([left, left], 1)[:, :n]):
        for b in (right, right.T.contiguous().T, torch.cat([right, right], 1)[:, :n]):
            assert relative(product(a, b), expected) < TOLERANCE[torch.float32]


def test_small_products_over_many_samples_stay_accurate():
    left = features(4, 50_000, torch.float32)
    expected = left.double() @ left.double().T
    assert relative(product(left, left), expected) < 1e-7
    assert relative((left @ left.T.contiguous()).double(), expected) > 1e-7  # the control


def test_float32_stays_float32_when_the_user_allows_less():
    left = features(300, 400, torch.float32)
    expected = left.double() @ left.double().T
    try:
        torch.set_float32_matmul_precision("medium")
        assert relative(product(left, left), expected) < TOLERANCE[torch.float32]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mirror():
    for d in (0, 1, 5, 127, 128, 129, 300):
        upper = features(d, d)
        found = mirror(upper.clone())
        assert torch.equal(found, upper.triu() + upper.triu(1).T)


def test_callers_mistakes():
    b = torch.ones(5, 3)
    with pytest.raises(TypeError, match=r"out is torch\.float32, expected torch\.float64"):
        accumulate_gram(torch.zeros(3, 3), b)
    with pytest.raises(ValueError, match=r"out has shape \(3, 3\), expected \(4, 4\)"):
        accumulate_gram(zeros(3, 3), b, ones=True)
    with pytest.raises(ValueError, match="5 and 6 samples"):
        accumulate(zeros(3, 2), b, torch.ones(6, 2))
    with pytest.raises(ValueError, match=r"left has shape \(5,\), expected \(samples, width\)"):
        accumulate(zeros(1, 3), b[:, 0], b)
    with pytest.raises(TypeError, match=r"right is torch\.int64"):
        accumulate(zeros(3, 3), b, b.long())
    with pytest.raises(ValueError, match="features is an empty list"):
        accumulate_gram(zeros(0, 0), [])
    with pytest.raises(ValueError, match="expected a square matrix"):
        mirror(zeros(2, 3))


def test_callers_mistakes_with_outer_sums():
    with pytest.raises(ValueError, match=r"ones for \['c'\]"):
        OuterSums([("b", "g")], ones={"c"})
    with pytest.raises(ValueError, match="chunk is 0"):
        OuterSums([("b", "g")], chunk=0)
    sums = OuterSums([("b", "g")])
    with pytest.raises(ValueError, match="nothing was added"):
        sums.sums()
    with pytest.raises(ValueError, match=r"features named \['b'\], expected \['b', 'g'\]"):
        sums.add({"b": torch.ones(2, 2)})
    sums.add({"b": torch.ones(2, 2), "g": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="g has width and dtype"):
        sums.add({"b": torch.ones(2, 2), "g": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="b has width and dtype"):
        sums.add({"b": torch.ones(2, 2, dtype=torch.float64), "g": torch.ones(2, 3)})
    with pytest.raises(KeyError, match=r"not among the pairs"):
        sums["g", "g"]
