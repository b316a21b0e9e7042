"""Sums of outer products on Triton, against plain float64 products."""

from __future__ import annotations

import pytest
import torch

from irgrow.kernels import outer_triton
from irgrow.kernels.outer import (
    OuterSums,
    accumulate,
    accumulate_gram,
    accumulate_gram_reference,
    accumulate_reference,
    mirror,
)
from irgrow.kernels.outer_triton import Product, add

# samples, p, q, symmetric
SHAPES = [(37, 5, 5, True), (70, 20, 3, False), (1, 17, 17, True), (0, 3, 3, False), (33, 18, 36, False)]
LARGE = [(100_000, 7, 7, True), (5000, 300, 300, True), (1024, 257, 1000, False), (63, 1024, 1024, True)]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Interpreted, tiny shapes have several tiles and splits as well."""
    if not large:
        monkeypatch.setattr(outer_triton, "_TILE", dict.fromkeys(TOLERANCE, 16))
        monkeypatch.setattr(outer_triton, "_STEP", 16)
        monkeypatch.setattr(outer_triton, "_LEAST", 1)
        outer_triton._work.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_products_in_one_call(dtype: torch.dtype, device: str, large: bool) -> None:
    """Different sizes, a symmetric one, one without samples; out is added to, not overwritten; bit for bit again."""
    draw = torch.Generator().manual_seed(0)
    shapes = SHAPES + (LARGE if large else [])
    made = []
    for n, p, q, symmetric in shapes:
        left = torch.randn(n, p, dtype=dtype, generator=draw).to(device)
        right = left if symmetric else torch.randn(q, n, dtype=dtype, generator=draw).to(device).T
        made.append((torch.randn(p, q, dtype=torch.float64, generator=draw).to(device), left, right, symmetric))
    runs = []
    for _ in range(2):
        products = [Product(out.clone(), *rest) for out, *rest in made]
        add(products, scale=0.5)
        runs.append([p.out.triu() if p.symmetric else p.out for p in products])
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
    for found, (out, left, right, symmetric) in zip(runs[0], made, strict=True):
        product = 0.5 * left.double().T @ right.double()
        expected = (out + product).triu() if symmetric else out + product
        worst = (found - expected).abs().max() / max(float(product.abs().max()), 1.0)
        assert worst <= TOLERANCE[dtype], (left.shape, float(worst))


@pytest.mark.parametrize("ones", [False, True])
def test_doors(ones: bool, device: str) -> None:
    """Blocks side by side, a constant feature, float32 beside float64; OuterSums in one launch for all its pairs."""
    draw = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(21, width, generator=draw).to(device) for width in (3, 18, 2))
    out = torch.zeros(21 + ones, 2, dtype=torch.float64, device=device)
    accumulate(out, [a, b.double()], c, scale=2.0, ones=ones)
    expected = accumulate_reference(torch.zeros_like(out), [a, b], c, scale=2.0, ones=ones)
    assert (out - expected).abs().max() <= TOLERANCE[torch.float64] * expected.abs().max()
    gram = torch.zeros(21 + ones, 21 + ones, dtype=torch.float64, device=device)
    accumulate_gram(gram, [a, b], ones=ones)
    expected_gram = accumulate_gram_reference(torch.zeros_like(gram), [a, b], ones=ones)
    assert (mirror(gram) - expected_gram).abs().max() <= TOLERANCE[torch.float32] * expected_gram.abs().max()
    sums = OuterSums([("b", "b"), ("b", "c")], ones={"b"} if ones else set(), chunk=8)
    for rows in (slice(0, 5), slice(5, 21)):
        sums.add({"b": [a[rows], b[rows]], "c": c[rows]})
    found = sums.sums()
    assert (found["b", "b"] - expected_gram).abs().max() <= TOLERANCE[torch.float32] * expected_gram.abs().max()
    assert (2 * found["b", "c"] - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()
