"""Products of convolution patches on Triton, against unfolding in float64: the products of a batch in one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from irgrow.kernels import gpu, outer_triton
from irgrow.kernels.patches import PatchGram, Window, patch_cross, patch_cross_reference, patch_gram_reference

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
WINDOWS = [
    (Window.of((3, 2), padding=1), torch.float32),
    (Window.of((2, 3), stride=2, padding=1), torch.float64),
    (Window.of(2, stride=(1, 3), padding=(0, 2), dilation=2), torch.float32),
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels launched, in order."""
    found: list[Any] = []
    launch = gpu.launch

    def counted(kernel: Any, *operands: Any, **named: Any) -> None:
        found.append(kernel)
        launch(kernel, *operands, **named)

    monkeypatch.setattr(gpu, "launch", counted)
    return found


@pytest.mark.parametrize(("window", "dtype"), WINDOWS)
def test_patches(window: Window, dtype: torch.dtype, device: str, large: bool, launches: list[Any]) -> None:
    """Gram and cross, strides, paddings and dilations; one launch for all shifts, one for all borders; bit for bit."""
    draw = torch.Generator().manual_seed(0)
    batch, channels, height, width = (40, 24, 31, 33) if large else (2, 3, 6, 7)
    x = torch.randn(batch, channels, height, width, dtype=dtype, generator=draw).to(device)
    y = torch.randn(batch, 5, *window.output(x), dtype=dtype, generator=draw).to(device)
    options = {"stride": window.stride, "padding": window.padding, "dilation": window.dilation, "ones": True}
    runs = []
    for _ in range(2):
        launches.clear()
        sums = PatchGram(window, ones=True, route="shift")
        sums.add(x)
        assert 1 <= launches.count(outer_triton._tiles) <= 2
        launches.clear()
        runs.append((sums.gram(), patch_cross(x, y, window.kernel, **options)))
        assert launches.count(outer_triton._tiles) == 1
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))
    expected = (
        patch_gram_reference(x, window.kernel, **options),
        patch_cross_reference(x, y, window.kernel, **options),
    )
    for found, right in zip(runs[0], expected, strict=True):
        assert (found - right).abs().max() <= TOLERANCE[dtype] * right.abs().max()
