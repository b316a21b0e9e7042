"""The least time that TINY's growth step takes on this machine: the arithmetic it needs, at the measured rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import min_s
from irgrow.kernels.outer import row_products
from irgrow.kernels.patches import Window, cross_cost, gram_cost
from irgrow.kernels.patches_through import through_cost
from irgrow.kernels.whiten import whiten_cost

RATE = 1024  # the matrix product that gives the rate, [RATE, RATE]


@dataclass(frozen=True)
class Floor:
    """Milliseconds of each part: statistics and probe in float32, the solve in float64."""

    statistics_ms: float
    probe_ms: float
    solve_ms: float

    @property
    def total_ms(self) -> float:
        return self.statistics_ms + self.probe_ms + self.solve_ms

    def __str__(self) -> str:
        parts = (self.statistics_ms, self.probe_ms, self.solve_ms)
        return "statistics {:.1f} + probe {:.1f} + solve {:.1f} ms".format(*parts)


def tiny_floor(model: nn.Sequential, batches: list[tuple[Tensor, Tensor]], taps: str) -> Floor:
    """For growing the outputs of the first layer of `model` (layer, relu, layer, ...), one site.

    Statistics: S, M_prev, S_in, M and C (images: N again instead of C). Probe: forward, and backward down to the
    second layer's outputs (images: forward twice, as N is measured with dW*). Solve: Cholesky of S and of S_in, their
    triangular solves, and a Gram matrix of the shorter side.
    """
    x = batches[0][0]
    samples = sum(len(x) for x, _ in batches)
    first, second, rest = model[0], model[2], model[3:]
    with torch.no_grad():
        hidden = model[:2](x)
        outputs = second(hidden)
    image = x.ndim == 4
    runs = 2 if image else 1
    probe = runs * len(batches) * (_flops(model, x) + _flops(rest, outputs))
    if image:
        assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
        inner, outer = (
            Window.of(w.kernel_size, stride=w.stride, padding=w.padding, dilation=w.dilation)  # type: ignore[arg-type]
            for w in (first, second)
        )
        b, c, g = x.shape[1] * inner.taps + 1, hidden.shape[1] * outer.taps + 1, outputs.shape[1]
        shape, held = (samples, *x.shape[1:]), (samples, *hidden.shape[1:])
        reads = through_cost(shape, g, inner, outer)[0] if taps == "full" else cross_cost(shape, g, inner)[0]
        statistics = gram_cost(shape, inner)[0] + gram_cost(held, outer)[0] + cross_cost(held, g, outer)[0] + 2 * reads
        columns = g * (outer.taps if taps == "full" else 1)
    else:
        b, c, g = x.shape[1] + 1, hidden.shape[1] + 1, outputs.shape[1]
        statistics = samples * (b * b + 2 * b * g + 2 * b * c + c * c + 2 * c * g)
        columns = g
    solve = whiten_cost(b)[0] + whiten_cost(c)[0] + b * b * columns + 2 * c * c * g + min(b, columns) * b * columns
    solve += 0 if image else 2 * b * c * columns
    single, double = _rate(torch.float32), _rate(torch.float64)
    return Floor(1e3 * statistics / single, 1e3 * probe / single, 1e3 * solve / double)


def _flops(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def _rate(dtype: torch.dtype) -> float:
    """Flops per second of a matrix product."""
    a = torch.randn(RATE, RATE, dtype=dtype)
    return 2 * RATE**3 / min_s(lambda: row_products(a, a), samples=5)
