"""Images on a grid with zeros between rows and between images: what is read at a shift is one offset in memory.

Outputs of a window read pixels along each axis: output m reads (m + offset) * stride + phase for every tap. Pixels of
one phase are an image of their own, a `Plane`; products of two planes at a shift are plain matrix products, and all of
a batch are one call (`Moves`). patches.py and patches_through.py say which products they need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.kernels import gpu
from irgrow.kernels.outer import Product, add_products, adding

Pair = tuple[int, int]
PIXELS = 8192  # per float32 product
PIXELS_TRITON = 2**18  # per launch, which adds in float64 by itself: enough to keep a GPU busy, 64 MB of 64 channels


# --- one axis -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tap:
    """Output m reads pixel (m + offset) * stride + phase."""

    phase: int
    offset: int


class Reading(Protocol):
    """What outputs read along an axis."""

    @property
    def stride(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def taps(self) -> tuple[Tap, ...]: ...
    @property
    def longest(self) -> int: ...


@dataclass(frozen=True)
class Axis:
    length: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def outputs(self) -> int:
        return (self.length + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        starts = (i * self.dilation - self.padding for i in range(self.kernel))
        return tuple(Tap(start % self.stride, start // self.stride) for start in starts)

    def pixels(self, phase: int) -> int:
        """How many pixels of the axis have this phase."""
        return len(range(phase, self.length, self.stride))

    @property
    def longest(self) -> int:
        """Pixels of the phase that has most, at least 1."""
        return max(1, *(self.pixels(tap.phase) for tap in self.taps))

    def between(self, left: Tap, right: Tap) -> tuple[int, tuple[int, ...]]:
        """The shift between two taps, and the pixels where both images have one but no output reads the pair."""
        shift = right.offset - left.offset
        first, last = max(0, -shift), min(self.pixels(left.phase), self.pixels(right.phase) - shift)
        read = range(left.offset, left.offset + self.outputs)
        return shift, tuple(m for m in range(first, last) if m not in read)


# --- planes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Rows of `size[1]` pixels with room for zeros, `size[0]` of them per image; shifts reach `dy`, `dx` far."""

    height: int
    width: int
    dy: int
    dx: int

    @classmethod
    def for_cross(cls, rows: Reading, columns: Reading) -> Grid:
        """A grid on which output positions stand, shifted by every tap's offset."""
        size, reach = [], []
        for axis in (rows, columns):
            low, high = min(tap.offset for tap in axis.taps), max(tap.offset for tap in axis.taps)
            size.append(max(axis.longest + max(0, -low), axis.outputs + max(0, high)))
            reach.append(max(abs(low), abs(high)))
        return cls(size[0], size[1], reach[0], reach[1])

    @property
    def size(self) -> Pair:
        return self.height, self.width

    def images(self, pixels: int) -> int:
        """How many images make about so many pixels."""
        return max(1, pixels // (self.height * self.width))

    def planes(self, number: int, images: int, channels: int, device: torch.device, dtype: torch.dtype) -> list[Plane]:
        """So many planes, with room for so many images each."""
        margin, count = self.dy * self.width + self.dx, images * self.height * self.width
        every = torch.empty(number, 2 * margin + count, channels, dtype=dtype, device=device)
        every[:, :margin] = 0.0
        every[:, margin + count :] = 0.0
        return [Plane(self, margin, flat) for flat in every]


@dataclass(frozen=True, eq=False)
class Plane:
    """Images of one phase, pixel after pixel with the channels together, zeros before, between and after."""

    grid: Grid
    margin: int
    flat: Tensor  # [margin + images * height * width + margin, C]

    def pixels(self, shift: Pair, count: int) -> Tensor:
        """[count, C]: at index p the pixel at p + shift."""
        start = self.margin + shift[0] * self.grid.width + shift[1]
        return self.flat[start : start + count]


def fill(planes: Sequence[Plane], images: Sequence[Tensor]) -> None:
    """Each plane holds images [B, C, h, w], as many as there is room for or fewer; what shifts may meet is zero."""
    grid, margin, first = planes[0].grid, planes[0].margin, planes[0].flat
    height, width = grid.size
    end = margin + images[0].shape[0] * height * width
    if gpu.runs_triton(first.device, first.dtype) or (engine := adding(first.device, first.dtype)) is None:
        for plane, x in zip(planes, images, strict=True):
            inside = plane.flat[margin:end].view(-1, height, width, first.shape[1])
            inside.zero_()
            inside[:, : x.shape[2], : x.shape[3]] = x.permute(0, 2, 3, 1)
    else:
        engine.fill_grids([plane.flat for plane in planes], [x.to(first.dtype) for x in images], margin, height, width)
    if end + margin < first.shape[0]:  # the last batch is smaller
        for plane in planes:
            plane.flat[end : end + margin] = 0.0


def phases_of(rows: Reading, columns: Reading) -> list[Pair]:
    return sorted({(row.phase, column.phase) for row in rows.taps for column in columns.taps})


def phase_of(x: Tensor, phase: Pair, rows: Reading, columns: Reading) -> Tensor:
    return x[:, :, phase[0] :: rows.stride, phase[1] :: columns.stride]


# --- products -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Moves:
    """Products of planes: sums[at] += left(p) right(p + shift)^T over pixels p, of planes known by their numbers."""

    at: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    shift: tuple[Pair, ...]
    offset: NDArray[np.int64]  # shifts in pixels of the grid
    symmetric: NDArray[np.int64]

    @classmethod
    def of(cls, grid: Grid, moves: Iterable[tuple[int, int, int, Pair, bool]]) -> Moves:
        at, left, right, shift, symmetric = zip(*moves, strict=True)
        offset = [dy * grid.width + dx for dy, dx in shift]
        a, b, c, d, e = (np.array(column, dtype=np.int64) for column in (at, left, right, offset, symmetric))
        return cls(a, b, c, shift, d, e)

    def add(self, sums: Tensor, lefts: Sequence[Plane], rights: Sequence[Plane], images: int) -> None:
        """Adds all products to their sums in one call; of symmetric ones only what is not below the diagonal."""
        grid, flat, margin = lefts[0].grid, lefts[0].flat, lefts[0].margin
        count, engine = images * grid.size[0] * grid.size[1], adding(flat.device, flat.dtype)
        if gpu.runs_triton(flat.device, flat.dtype):
            numbers = zip(self.at, self.left, self.right, self.shift, self.symmetric, strict=True)
            engine.add(
                [
                    Product(sums[a], lefts[i].pixels((0, 0), count), rights[j].pixels(shift, count), bool(symmetric))
                    for a, i, j, shift, symmetric in numbers
                ]
            )
            return
        # Four dozen products of a few thousand pixels: describing tensors one by one would take as long as they do.
        size, (_, p, q), (out_step, pitch, _) = flat.element_size(), sums.shape, sums.stride()
        table = np.empty((len(self.at), 11), dtype=np.int64)
        table[:] = 0, pitch, 0, 1, p, 0, q, count, p, q, 0
        table[:, 0] = sums.data_ptr() + 8 * out_step * self.at
        table[:, 2] = np.array([plane.flat.data_ptr() for plane in lefts])[self.left] + margin * p * size
        starts = np.array([plane.flat.data_ptr() for plane in rights])[self.right]
        table[:, 5] = starts + (margin + self.offset) * q * size
        table[:, 10] = self.symmetric
        engine.add_table(table, flat.dtype)


@dataclass(frozen=True, eq=False)
class Reads:
    """Sums over outputs of y times the pixel that they read by a tap of each axis, without some rows and columns."""

    rows: Reading
    columns: Reading
    wanted: tuple[tuple[Tap, Tap, tuple[tuple[int, ...], tuple[int, ...]]], ...]  # taps, rows and columns left out

    @cached_property
    def grid(self) -> Grid:
        return Grid.for_cross(self.rows, self.columns)

    @cached_property
    def phases(self) -> list[Pair]:
        return phases_of(self.rows, self.columns)

    @cached_property
    def missing(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """What different sums leave out: y is laid out once for each."""
        return list(dict.fromkeys(missed for *_, missed in self.wanted))

    @cached_property
    def moves(self) -> tuple[Moves, Moves]:
        """With y left, with x left."""
        phases, missing = ({key: n for n, key in enumerate(keys)} for keys in (self.phases, self.missing))
        found = [
            (at, missing[missed], phases[row.phase, column.phase], (row.offset, column.offset))
            for at, (row, column, missed) in enumerate(self.wanted)
        ]
        turned = [(at, x, y, (-dy, -dx), False) for at, y, x, (dy, dx) in found]
        return Moves.of(self.grid, [(*move, False) for move in found]), Moves.of(self.grid, turned)


@lru_cache(maxsize=64)
def every_tap(rows: Axis, columns: Axis) -> Reads:
    """One window: a sum for every pair of taps."""
    every: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    return Reads(rows, columns, tuple((row, column, every) for row in rows.taps for column in columns.taps))


def cross_sums(x: Tensor, y: Tensor, reads: Reads) -> Tensor:
    """[len(reads.wanted), Q, C], float64."""
    dtype, (batch, channels), outputs = precision(x, y), x.shape[:2], y.shape[1]
    rows, columns, grid = reads.rows, reads.columns, reads.grid
    total = torch.zeros(len(reads.wanted), outputs, channels, dtype=torch.float64, device=x.device)
    tiles = moves_planes(total, dtype)
    # What stands right is read in whole lines by the compiled tiles: the wider one.
    wide = tiles and outputs > channels and not gpu.runs_triton(x.device, dtype)
    total = total.new_zeros(len(reads.wanted), channels, outputs) if wide else total
    step = min(grid.images(pixels_at_once(x.device, dtype)), max(1, batch))
    planes = grid.planes(len(reads.phases), step, channels, x.device, dtype)
    landings = grid.planes(len(reads.missing), step, outputs, x.device, dtype) if tiles else []
    place = torch.zeros(0 if tiles else outputs, step, *grid.size, dtype=dtype, device=x.device)
    for a in range(0, batch, step):
        part = slice(a, min(a + step, batch))
        count = part.stop - a
        fill(planes, [phase_of(x[part], phase, rows, columns) for phase in reads.phases])
        if tiles:
            fill(landings, [_without(y[part], missed) for missed in reads.missing])
            reads.moves[wide].add(total, *((planes, landings) if wide else (landings, planes)), count)
            continue
        lefts: dict[object, Tensor] = {}
        by_phase = dict(zip(reads.phases, planes, strict=True))
        for at, (row, column, missed) in enumerate(reads.wanted):
            if missed not in lefts:
                place[:, :count, : rows.outputs, : columns.outputs] = _without(y[part], missed).transpose(0, 1)
                lefts[missed] = place[:, :count].reshape(outputs, -1).clone()
            left = lefts[missed]
            right = by_phase[row.phase, column.phase].pixels((row.offset, column.offset), left.shape[1])
            add_products(total[at], left, right.T)
    return total.mT if wide else total


def _without(y: Tensor, missed: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """y [B, Q, Ho, Wo] with zeros in these rows and columns."""
    if not any(missed):
        return y
    y = y.clone()
    y[:, :, list(missed[0])] = 0.0
    y[:, :, :, list(missed[1])] = 0.0
    return y


def moves_planes(sums: Tensor, dtype: torch.dtype) -> bool:
    """Whether products into `sums` are taken from planes alone, by `Moves`."""
    return adding(sums.device, dtype) is not None


def pixels_at_once(device: torch.device, dtype: torch.dtype) -> int:
    return PIXELS_TRITON if gpu.runs_triton(device, dtype) else PIXELS


def precision(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
