"""Patch products against unfolding in float64: any window, any split into batches, both routes; memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import patch_grid
from irgrow.kernels.patches import (
    PatchGram,
    Window,
    cross_cost,
    gram_cost,
    patch_cross,
    patch_cross_reference,
    patch_gram,
    patch_gram_reference,
    patch_patch_cross,
    patch_patch_cross_reference,
)

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) if b.numel() else 0.0


def fits(window: Window, height: int, width: int) -> bool:
    return all(
        size + 2 * p - d * (k - 1) >= 1
        for size, k, p, d in zip((height, width), window.kernel, window.padding, window.dilation, strict=True)
    )


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


windows = st.builds(Window, pairs(1, 4), pairs(1, 3), pairs(0, 3), pairs(1, 3))


def options(window: Window, ones: bool) -> dict[str, object]:
    return {"stride": window.stride, "padding": window.padding, "dilation": window.dilation, "ones": ones}


@given(
    window=windows,
    size=pairs(1, 11),
    batch=st.integers(0, 4),
    channels=st.integers(1, 3),
    ones=st.booleans(),
    pixels=st.sampled_from([1, 150, 8192]),
)
@example(window=Window((3, 3), padding=(1, 1)), size=(7, 5), batch=3, channels=2, ones=True, pixels=100)
@example(window=Window((5, 3), (2, 3), (2, 0), (1, 2)), size=(9, 11), batch=2, channels=2, ones=True, pixels=1)
@example(window=Window((2, 2), (3, 3)), size=(2, 2), batch=1, channels=1, ones=False, pixels=1)
def test_any_window(window, size, batch, channels, ones, pixels):
    assume(fits(window, *size))
    x = image(batch, channels, *size)
    y = image(batch, 3, *window.output(x), seed=1)
    expected = patch_gram_reference(x, window.kernel, **options(window, ones))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patch_grid, "PIXELS", pixels)
        for route in ("shift", "unfold", "auto"):
            found = patch_gram(x, window.kernel, route=route, **options(window, ones))
            assert relative(found, expected) < TOLERANCE[torch.float64]
            assert torch.equal(found, found.T)
        found = patch_cross(x, y, window.kernel, **options(window, ones))
        assert relative(found, patch_cross_reference(x, y, window.kernel, **options(window, ones))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape, window",
    [
        ((20, 16, 32, 32), Window((3, 3), padding=(1, 1))),
        ((9, 5, 33, 17), Window((5, 3), padding=(2, 1))),
        ((4, 3, 40, 40), Window((7, 7), (2, 2), (3, 3))),
        ((6, 8, 16, 16), Window((3, 3), (2, 2), (1, 1))),
        ((6, 8, 20, 20), Window((3, 3), (1, 1), (0, 0), (2, 2))),
        ((6, 150, 8, 8), Window((1, 1))),
        ((70, 4, 5, 5), Window((3, 3))),
        ((2, 1, 1, 1), Window((1, 1))),
    ],
)
def test_sizes_of_real_layers(shape, window, dtype):
    x = image(*shape, dtype=dtype)
    y = image(len(x), 7, *window.output(x), dtype=dtype, seed=1)
    expected = patch_gram_reference(x, window.kernel, **options(window, True))
    for route in ("shift", "unfold"):
        found = patch_gram(x, window.kernel, route=route, **options(window, True))
        assert relative(found, expected) < TOLERANCE[dtype]
    found = patch_cross(x, y, window.kernel, **options(window, True))
    expected = patch_cross_reference(x, y, window.kernel, **options(window, True))
    assert relative(found, expected) < TOLERANCE[dtype]


def test_a_same_convolution_is_exact_to_4e_7():
    x = image(8, 64, 32, 32, dtype=torch.float32)
    assert relative(patch_gram(x, 3, padding=1), patch_gram_reference(x, 3, padding=1)) < 4e-7


def test_the_order_of_features_is_that_of_unfold_and_of_a_weight():
    x, y = image(3, 2, 6, 6), image(3, 4, 6, 6, seed=1)
    product = patch_cross(x, y, 3, padding=1)
    gradient = torch.nn.grad.conv2d_weight(x, (4, 2, 3, 3), y, padding=1)
    assert relative(product.T.reshape(4, 2, 3, 3), gradient) < 1e-12


@pytest.mark.parametrize("route", ["shift", "unfold"])
def test_batches_add_up_however_they_are_cut(route):
    x, window = image(23, 3, 9, 8), Window((3, 2), padding=(1, 0))
    expected = patch_gram_reference(x, (3, 2), padding=(1, 0), ones=True)
    for cuts in ([23], [1, 22], [5, 0, 11, 7]):
        sums = PatchGram(window, ones=True, route=route)
        for k, part in enumerate(x.split(cuts)):
            sums.add(part)
            if k == 0:
                sums.gram()  # looking does not change anything
        assert sums.n == 23
        assert relative(sums.gram(), expected) < 1e-12


def test_repeats_bit_for_bit():
    x, y = image(9, 16, 32, 32, dtype=torch.float32), image(9, 20, 32, 32, dtype=torch.float32, seed=1)
    for route in ("shift", "unfold"):
        runs = [patch_gram(x, 3, padding=1, ones=True, route=route) for _ in range(3)]
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert torch.equal(patch_cross(x, y, 3, padding=1), patch_cross(x, y, 3, padding=1))


def test_zero_images_and_no_images():
    assert not patch_gram(torch.zeros(2, 3, 5, 5), 3, padding=1).any()
    empty = patch_gram(torch.zeros(0, 3, 5, 5), 3, padding=1, ones=True)
    assert empty.shape == (28, 28) and not empty.any()
    assert not patch_cross(torch.zeros(0, 3, 5, 5), torch.zeros(0, 2, 5, 5), 3, padding=1).any()


def test_inputs_of_other_layouts_and_precisions():
    x, y = image(4, 3, 8, 8, dtype=torch.float32), image(4, 2, 8, 8, dtype=torch.float32, seed=1)
    expected, cross = patch_gram(x, 3, padding=1), patch_cross(x, y, 3, padding=1)
    wide = torch.cat([x, x], 3)[..., :8]
    for other in (x.to(memory_format=torch.channels_last), wide, x.clone().requires_grad_()):
        for route in ("shift", "unfold"):
            assert relative(patch_gram(other, 3, padding=1, route=route), expected) < 1e-6
        assert relative(patch_cross(other, y, 3, padding=1), cross) < 1e-6
    rounded = x.bfloat16()
    for route in ("shift", "unfold"):
        found = patch_gram(rounded, 3, padding=1, route=route)
        assert relative(found, patch_gram_reference(rounded, 3, padding=1)) < 1e-6


@given(
    windows=st.tuples(windows, windows),
    sizes=st.tuples(pairs(1, 9), pairs(1, 9)),
    batch=st.integers(0, 3),
    ones=st.booleans(),
    ones_right=st.booleans(),
)
@example(
    windows=(Window((3, 3), (2, 2), (1, 1)), Window((1, 1))),
    sizes=((7, 7), (4, 4)),
    batch=2,
    ones=True,
    ones_right=True,
)
def test_patches_of_two_images(windows, sizes, batch, ones, ones_right):
    (left, right), (x_size, y_size) = windows, sizes
    assume(fits(left, *x_size) and fits(right, *y_size))
    x, y = image(batch, 2, *x_size), image(batch, 3, *y_size, seed=1)
    flags = {"ones": ones, "ones_right": ones_right}
    if left.output(x) != right.output(y):
        with pytest.raises(ValueError, match="expected the same"):
            patch_patch_cross(x, left, y, right, **flags)
        return
    found = patch_patch_cross(x, left, y, right, **flags)
    assert relative(found, patch_patch_cross_reference(x, left, y, right, **flags)) < 1e-12


def test_routes_and_costs():
    x, window = image(8, 64, 32, 32, dtype=torch.float32), Window((3, 3), padding=(1, 1))
    sums = PatchGram(window)
    assert sums.route == "auto"
    sums.add(x)
    assert sums.route == "shift"
    strided = PatchGram(Window((2, 2), (2, 2)))
    strided.add(x[:, :3])
    assert strided.route == "unfold"
    flops, _ = gram_cost((8, 64, 32, 32), window)
    assert flops < 2 * 576 * 576 * 8 * 1024 / 5  # against unfolding and one full product
    assert cross_cost((8, 64, 32, 32), 64, window)[0] >= 2 * 576 * 64 * 8 * 1024


MEMORY = """
import re, torch
from irgrow.kernels.patches import patch_cross, patch_gram, Window
torch.set_num_threads(1)
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
x, y, window = torch.randn(64, 64, 32, 32), torch.randn(64, 64, 32, 32), Window((3, 3), padding=(1, 1))
patch_gram(x[:8], 3, padding=1); patch_cross(x[:8], y[:8], 3, padding=1); (u := window.unfold(x[:1])) @ u.T
peaks = [peak()]
patch_gram(x, 3, padding=1); peaks.append(peak())
patch_cross(x, y, 3, padding=1); peaks.append(peak())
(u := window.unfold(x)) @ u.T; peaks.append(peak())
print(*peaks)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_is_a_twelfth_of_unfolding():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120)
    start, gram, cross, unfold = (int(word) for word in run.stdout.split())
    assert unfold - cross > 140_000  # kB: the control really unfolds, 151 MB at least
    assert 12 * (cross - start) < unfold - cross
    assert 12 * (gram - start) < unfold - cross


def test_callers_mistakes():
    x = torch.zeros(2, 3, 5, 5)
    with pytest.raises(ValueError, match=r"kernel is 0, expected one or two integers, each at least 1"):
        patch_gram(x, 0)
    with pytest.raises(ValueError, match=r"stride is \(1, 2, 3\)"):
        patch_gram(x, 3, stride=(1, 2, 3))
    with pytest.raises(ValueError, match=r"found shape \(3, 5, 5\), expected \(samples, channels, height, width\)"):
        patch_gram(x[0], 3)
    with pytest.raises(ValueError, match="does not fit an image of 5x5"):
        patch_gram(x, 7)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        patch_gram(x.long(), 3)
    with pytest.raises(ValueError, match="2 samples of 5x5 positions, y has 2 of 3x3"):
        patch_cross(x, torch.zeros(2, 4, 3, 3), 3, padding=1)
    with pytest.raises(ValueError, match="route 'fast', expected 'auto'"):
        patch_gram(x, 3, route="fast")
    sums = PatchGram(Window((3, 3)))
    with pytest.raises(ValueError, match="nothing was added"):
        sums.gram()
    sums.add(x)
    with pytest.raises(ValueError, match=r"images of shape \(3, 6, 5\), expected \(3, 5, 5\)"):
        sums.add(torch.zeros(2, 3, 6, 5))
