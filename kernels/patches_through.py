"""Products of patches with what lies two convolutions further on, without unfolding the image or the gradient between.

Tap t of a convolution reads hidden position q(r, t) for its output r; there a patch of x ends. Tap s of that patch is
a pixel of x at a fixed stride from r: two windows in a row read like one. So pairs (s, t) with the same pixels share
one product (49 of 81 for two 3x3 kernels at stride 2), and where q(r, t) lies outside the hidden image, while the
pixel does not, those outputs r are left out: one more product for each such border.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from irgrow.kernels.patch_grid import Axis, Reads, Tap, cross_sums
from irgrow.kernels.patches import Window, check_positions


def through_cross_reference(x: Tensor, inner: Window, y: Tensor, outer: Window, *, tap: int | None = None) -> Tensor:
    """`through_cross` by its definition: unfold patches, then unfold them again."""
    patches = torch.nn.functional.unfold(x.double(), inner.kernel, inner.dilation, inner.padding, inner.stride)
    ones = patches.new_ones(len(x), 1, *inner.output(x))
    hidden = torch.cat([patches.reshape(*patches.shape[:2], *inner.output(x)), ones], 1)
    read = outer.unfold(hidden).reshape(hidden.shape[1], outer.taps, -1)
    read = read if tap is None else read[:, tap : tap + 1]
    right = y.double().transpose(0, 1).flatten(1)
    return torch.einsum("btp,op->bot", read, right).flatten(1)


@torch.no_grad()
def through_cross(x: Tensor, inner: Window, y: Tensor, outer: Window, *, tap: int | None = None) -> Tensor:
    """sum over samples and outputs r of patch(x)(q(r, t)) y_o(r), float64: [C * inner.taps + 1, O * outer.taps].

    x [B, C, H, W], y [B, O, Ho, Wo] at the outputs of `outer` over the outputs of `inner`; a constant 1 is the last
    row of a patch, and a patch outside the hidden image is 0. Of one outer `tap` only, if it is given: [.., O].
    Raises ValueError for shapes that do not belong together.
    """
    hidden = x.new_empty(1, 1, 1, 1).expand(len(x), 1, *inner.output(x))
    check_positions(hidden, outer, y, Window((1, 1)))
    x, y = x.detach(), y.detach()
    plan = _plan(inner.axes(x), outer.axes(hidden), tap)
    sums = cross_sums(x, y, plan.reads)  # [reads, O, C]
    channels, outputs = x.shape[1], y.shape[1]
    # Inner and outer taps side by side, as the columns of b and of g stand.
    by_tap = sums[plan.index.to(sums.device)].unflatten(0, (inner.taps, -1))  # [inner taps, taps, O, C]
    out = sums.new_empty(channels * inner.taps + 1, outputs, len(plan.inside))
    out[:-1].view(channels, inner.taps, outputs, -1).copy_(by_tap.permute(3, 0, 2, 1))
    total = y.sum(0, dtype=torch.float64)
    for at, ((a, b), (c, d)) in enumerate(plan.inside):
        out[-1, :, at] = total[:, a:b, c:d].sum((1, 2))
    return out.flatten(1)


def through_cost(
    x_shape: tuple[int, int, int, int], outputs: int, inner: Window, outer: Window, *, itemsize: int = 4
) -> tuple[int, int]:
    """(flops, bytes) of `through_cross`: one product for every pixel that some pair of taps reads, per axis."""
    batch, channels, height, width = x_shape
    x = torch.empty(0, channels, height, width)
    hidden = x.new_empty(0, 1, *inner.output(x))
    rows, columns = (_Chain(a, b) for a, b in zip(inner.axes(x), outer.axes(hidden), strict=True))
    products = len(set(rows.reads.values())) * len(set(columns.reads.values()))
    pixels = batch * rows.outputs * columns.outputs * products
    return 2 * channels * outputs * pixels, itemsize * (channels + outputs) * pixels


@dataclass(frozen=True)
class _Read:
    """Which pixel an output reads, and the outputs that do not, although there is one."""

    tap: Tap
    missed: tuple[int, ...]


@dataclass(frozen=True)
class _Chain:
    """One axis of two windows in a row: as `Axis`, with a tap for every two taps."""

    inner: Axis
    outer: Axis

    @property
    def stride(self) -> int:
        return self.inner.stride * self.outer.stride

    @property
    def outputs(self) -> int:
        return self.outer.outputs

    @cached_property
    def inside(self) -> tuple[tuple[int, int], ...]:
        """Per outer tap the outputs first..last-1 that read inside the hidden image."""
        found, axis = [], self.outer
        for i in range(axis.kernel):
            start = i * axis.dilation - axis.padding
            read = [r for r in range(axis.outputs) if 0 <= r * axis.stride + start < axis.length]
            found.append((read[0], read[-1] + 1) if read else (0, 0))
        return tuple(found)

    @cached_property
    def reads(self) -> dict[tuple[int, int], _Read]:
        """By inner and outer tap."""
        found = {}
        for i in range(self.inner.kernel):
            for j, (first, last) in enumerate(self.inside):
                hidden = j * self.outer.dilation - self.outer.padding
                start = hidden * self.inner.stride + i * self.inner.dilation - self.inner.padding
                pixels = {r: r * self.stride + start for r in range(self.outputs) if not first <= r < last}
                missed = tuple(r for r, pixel in pixels.items() if 0 <= pixel < self.inner.length)
                found[i, j] = _Read(Tap(start % self.stride, start // self.stride), missed)
        return found

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(dict.fromkeys(read.tap for read in self.reads.values()))

    @property
    def longest(self) -> int:
        """Pixels of the phase that has most, at least 1."""
        return max(1, *(len(range(tap.phase, self.inner.length, self.stride)) for tap in self.taps))


@dataclass(frozen=True)
class _Plan:
    """The products that are needed, which of them each pair of taps takes, and what each outer tap reads inside."""

    reads: Reads
    index: Tensor  # [inner taps * outer taps]
    inside: tuple[tuple[tuple[int, int], tuple[int, int]], ...]


@lru_cache(maxsize=64)
def _plan(inner: tuple[Axis, Axis], outer: tuple[Axis, Axis], tap: int | None) -> _Plan:
    rows, columns = (_Chain(a, b) for a, b in zip(inner, outer, strict=True))
    kernel = rows.outer.kernel, columns.outer.kernel
    taps = [divmod(t, kernel[1]) for t in (range(kernel[0] * kernel[1]) if tap is None else (tap,))]
    found: dict[tuple[_Read, _Read], int] = {}
    index = [
        found.setdefault((rows.reads[i, a], columns.reads[j, b]), len(found))
        for i in range(rows.inner.kernel)
        for j in range(columns.inner.kernel)
        for a, b in taps
    ]
    reads = tuple((row.tap, column.tap, (row.missed, column.missed)) for row, column in found)
    inside = tuple((rows.inside[a], columns.inside[b]) for a, b in taps)
    return _Plan(Reads(rows, columns, reads), torch.tensor(index), inside)
