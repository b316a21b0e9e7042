"""`through_cross` against unfolding twice in float64: any two windows, any batch split, one tap or all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import outer, patch_grid
from irgrow.kernels.patches import Window
from irgrow.kernels.patches_through import through_cost, through_cross, through_cross_reference


def image(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


def outputs(window: Window, size: tuple[int, int]) -> tuple[int, int]:
    each = zip(size, window.kernel, window.stride, window.padding, window.dilation, strict=True)
    a, b = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)
    return a, b


windows = st.builds(Window, pairs(1, 3), pairs(1, 3), pairs(0, 2), pairs(1, 2))


@settings(max_examples=60, deadline=None)
@given(inner=windows, outer=windows, size=pairs(1, 9), batch=st.integers(0, 3), data=st.data())
def test_any_two_windows(inner, outer, size, batch, data):
    hidden = outputs(inner, size)
    assume(min(hidden) >= 1 and min(outputs(outer, hidden)) >= 1)
    tap = data.draw(st.none() | st.integers(0, outer.taps - 1))
    x, y = image(batch, 2, *size), image(batch, 3, *outputs(outer, hidden), seed=1)
    found, expected = through_cross(x, inner, y, outer, tap=tap), through_cross_reference(x, inner, y, outer, tap=tap)
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-11 * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("stride", [1, 2])
def test_batches_in_parts_and_without_the_compiled_tiles(stride, monkeypatch):
    inner = middle = Window((3, 3), (stride, stride), (1, 1))
    size = outputs(middle, outputs(inner, (12, 12)))
    x, y = image(7, 5, 12, 12), image(7, 4, *size, seed=1)
    expected = through_cross_reference(x, inner, y, middle)
    monkeypatch.setattr(patch_grid, "PIXELS", 2 * 15 * 15)
    for _ in range(2):
        found = through_cross(x, inner, y, middle)
        assert (found - expected).abs().max() < 1e-11 * expected.abs().max()
        assert (through_cross(x.float(), inner, y.float(), middle) - expected).abs().max() < 1e-5 * expected.abs().max()
        monkeypatch.setattr(outer, "compiled", lambda: None)


def test_outputs_outside_the_hidden_image_are_left_out(monkeypatch):
    """The control: with them, the border is wrong, and only there."""
    window = Window((3, 3), padding=(1, 1))
    x, y = image(2, 2, 6, 6), image(2, 3, 6, 6, seed=1)
    expected = through_cross_reference(x, window, y, window)
    monkeypatch.setattr(patch_grid, "_without", lambda y, missed: y)
    assert (through_cross(x, window, y, window) - expected).abs().max() > 0.1


def test_pairs_of_taps_share_products():
    window = Window((3, 3), (2, 2), (1, 1))
    shared, _ = through_cost((32, 16, 32, 32), 64, window, window)
    assert shared == 2 * 16 * 64 * 49 * 32 * 8 * 8  # not 81


def test_callers_mistakes():
    window = Window((3, 3))
    with pytest.raises(ValueError, match="positions"):
        through_cross(image(2, 1, 8, 8), window, image(2, 1, 8, 8), window)
