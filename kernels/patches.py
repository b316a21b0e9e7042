"""Products of convolution patches, summed over samples and positions, without unfolding the image.

A patch of x [B, C, H, W] at one output position has C * kh * kw entries, ordered as torch.nn.functional.unfold
orders them (channel, kernel row, kernel column), and a constant 1 last with `ones`. Unfolding copies every pixel
kh * kw times and multiplies all pairs of taps; but tap (i, j) of one position is tap (i', j') of another:

    sum over positions of patch_t patch_t'^T = sum over pixels p in a window of x(p) x(p + shift)^T

where the shift is the distance between the taps. A 3x3 kernel has 45 pairs of taps and 13 shifts. So each shift
is multiplied once, over all pixels, and the few rows and columns that a tap does not reach at the border are
subtracted (a row and a column subtract their corner twice: it is added back). With a stride s, pixels are sorted
into s * s phases (y mod s, x mod s), taps of one phase are a stride-1 problem, and pairs of phases are multiplied
like pairs of images.

Images are laid out on a grid with zeros between rows and between images, so that a shift in two dimensions is
one offset in memory and every product is a plain matrix product. Products of a few thousand pixels are added in
float64. On Triton the products of all shifts, or of all taps, are one launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.kernels.outer import Product, accumulate, accumulate_gram, add_products, adding, mirror
from irgrow.kernels.patch_grid import (
    PIXELS,
    Axis,
    Grid,
    Moves,
    Pair,
    cross_sums,
    every_tap,
    fill,
    moves_planes,
    phase_of,
    phases_of,
    pixels_at_once,
    precision,
)

# What things cost on one core, in nanoseconds; only the ratios matter.
_PER_MULTIPLY, _PER_NUMBER, _PER_CALL = 0.012, 5.0, 30_000.0
_Shift = tuple[Pair, Pair, Pair]  # phase of the left pixel, phase of the right one, distance between them


@dataclass(frozen=True)
class Window:
    """A kernel sliding over an image: what a convolution knows besides its weights."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @classmethod
    def of(
        cls,
        kernel: int | Pair,
        *,
        stride: int | Pair = 1,
        padding: int | Pair = 0,
        dilation: int | Pair = 1,
    ) -> Window:
        """The window, from single numbers or pairs; ValueError for numbers that make no sense."""
        pairs = []
        for name, value, least in (
            ("kernel", kernel, 1),
            ("stride", stride, 1),
            ("padding", padding, 0),
            ("dilation", dilation, 1),
        ):
            pair = (value, value) if isinstance(value, int) else tuple(value)
            if len(pair) != 2 or min(pair) < least:
                raise ValueError(f"{name} is {value}, expected one or two integers, each at least {least}")
            pairs.append((int(pair[0]), int(pair[1])))
        return cls(*pairs)

    def output(self, x: Tensor) -> Pair:
        """Output height and width for x [B, C, H, W]; ValueError if x is no image or too small."""
        if x.ndim != 4:
            raise ValueError(f"patches: found shape {tuple(x.shape)}, expected (samples, channels, height, width)")
        if not x.is_floating_point():
            raise TypeError(f"patches: x is {x.dtype}, expected a floating type")
        axes = self.axes(x)
        if min(axis.outputs for axis in axes) < 1:
            raise ValueError(f"patches: {self} does not fit an image of {x.shape[2]}x{x.shape[3]}")
        return axes[0].outputs, axes[1].outputs

    def axes(self, x: Tensor) -> tuple[Axis, Axis]:
        rows, columns = (
            Axis(int(x.shape[2 + a]), self.kernel[a], self.stride[a], self.padding[a], self.dilation[a]) for a in (0, 1)
        )
        return rows, columns

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def unfold(self, x: Tensor) -> Tensor:
        """[C * taps, B * positions]"""
        columns = F.unfold(x, self.kernel, dilation=self.dilation, padding=self.padding, stride=self.stride)
        return columns.transpose(0, 1).reshape(columns.shape[1], -1)


# --- definitions ----------------------------------------------------------------------------------------------


def patch_gram_reference(
    x: Tensor,
    kernel: int | Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ones: bool = False,
) -> Tensor:
    """`patch_gram` by its definition: unfold, then multiply."""
    window = Window.of(kernel, stride=stride, padding=padding, dilation=dilation)
    return patch_patch_cross_reference(x, window, x, window, ones=ones, ones_right=ones)


def patch_cross_reference(
    x: Tensor,
    y: Tensor,
    kernel: int | Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ones: bool = False,
) -> Tensor:
    """`patch_cross` by its definition: unfold, then multiply."""
    window = Window.of(kernel, stride=stride, padding=padding, dilation=dilation)
    return patch_patch_cross_reference(x, window, y, Window((1, 1)), ones=ones)


def patch_patch_cross_reference(
    x: Tensor, window_x: Window, y: Tensor, window_y: Window, *, ones: bool = False, ones_right: bool = False
) -> Tensor:
    """`patch_patch_cross` by its definition: unfold both, then multiply."""
    left, right = window_x.unfold(x.double()), window_y.unfold(y.double())
    left = torch.cat([left, left.new_ones(1, left.shape[1])]) if ones else left
    right = torch.cat([right, right.new_ones(1, right.shape[1])]) if ones_right else right
    return left @ right.T


# --- what callers use -----------------------------------------------------------------------------------------


def patch_gram(
    x: Tensor,
    kernel: int | Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ones: bool = False,
    route: str = "auto",
) -> Tensor:
    """sum over samples and positions of patch patch^T, float64. x [B, C, H, W] -> [C*kh*kw (+ 1), the same].

    For sums over batches keep a `PatchGram`: it adds before it assembles this matrix. Raises ValueError for an
    image that the window does not fit or for a window that makes no sense.
    """
    sums = PatchGram(Window.of(kernel, stride=stride, padding=padding, dilation=dilation), ones=ones, route=route)
    sums.add(x)
    return sums.gram()


@torch.no_grad()
def patch_cross(
    x: Tensor,
    y: Tensor,
    kernel: int | Pair,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ones: bool = False,
) -> Tensor:
    """sum over samples and positions of patch y^T, float64. y [B, Q, Ho, Wo] -> [C*kh*kw (+ 1), Q].

    The gradient of a convolution's weight, with float64 sums (torch's float32 one is off by 5e-6 where this is
    off by 4e-7). Raises ValueError for shapes that do not belong together.
    """
    window = Window.of(kernel, stride=stride, padding=padding, dilation=dilation)
    check_positions(x, window, y, Window((1, 1)))
    x, y = x.detach(), y.detach()
    sums = cross_sums(x, y, every_tap(*window.axes(x)))
    result = sums.permute(2, 0, 1).reshape(x.shape[1] * window.taps, y.shape[1])
    return torch.cat([result, y.sum((0, 2, 3), dtype=torch.float64)[None]]) if ones else result


@torch.no_grad()
def patch_patch_cross(
    x: Tensor, window_x: Window, y: Tensor, window_y: Window, *, ones: bool = False, ones_right: bool = False
) -> Tensor:
    """sum over samples and positions of patch(x) patch(y)^T, float64: [C_x * taps_x (+ 1), C_y * taps_y (+ 1)].

    Both windows must have the same output positions. Unfolds a few samples at a time.
    """
    check_positions(x, window_x, y, window_y)
    step = _unfolded_images(x, window_x)
    shape = x.shape[1] * window_x.taps + ones, y.shape[1] * window_y.taps + ones_right
    out = torch.zeros(shape, dtype=torch.float64, device=x.device)
    for a in range(0, len(x), step):
        left, right = window_x.unfold(x[a : a + step].detach()), window_y.unfold(y[a : a + step].detach())
        if ones_right:
            right = torch.cat([right, right.new_ones(1, right.shape[1])])
        accumulate(out, left.T, right.T, ones=ones)
    return out


class PatchGram:
    """The sum of patch patch^T over the batches added: `gram()` [C*kh*kw (+ 1), the same], float64.

    Holds one [C, C] sum per shift (and per border row or column) and assembles the matrix when asked: route
    "shift". Where shifts do not repeat (a stride as large as the kernel) it unfolds a few images at a time
    instead: route "unfold". "auto" takes what multiplies less.
    """

    def __init__(self, window: Window, *, ones: bool = False, route: str = "auto") -> None:
        if route not in ("auto", "shift", "unfold"):
            raise ValueError(f"PatchGram: route {route!r}, expected 'auto', 'shift' or 'unfold'")
        self.window = window
        self.route = route  # after the first batch: the one that is taken
        self.n = 0  # samples added
        self._ones = ones
        self._plan: _Plan | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """These samples are in the sum. x [B, C, H, W], of the same image shape every time."""
        self.window.output(x)
        x, dtype = x.detach(), precision(x)
        if self._plan is None:
            self._plan = _plan(*self.window.axes(x))
            if self.route == "auto":
                self.route = "shift" if self._plan.pays(*x.shape[1::-1]) else "unfold"
            self._image = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)  # sum over samples
            width = x.shape[1] * self.window.taps
            shape = (len(self._plan.terms), x.shape[1], x.shape[1]) if self.route == "shift" else (width, width)
            self._sums = torch.zeros(shape, dtype=torch.float64, device=x.device)
        if x.shape[1:] != self._image.shape:
            raise ValueError(
                f"PatchGram: images of shape {tuple(x.shape[1:])}, expected {tuple(self._image.shape)} as before"
            )
        if len(x) == 0:
            return
        self.n += len(x)
        if self._ones:
            for part in x.split(64):
                self._image += part.to(dtype).sum(0)
        if self.route == "shift":
            _add_shifts(self._sums, self._plan, x, dtype)
            return
        for part in x.split(_unfolded_images(x, self.window)):
            accumulate_gram(self._sums, self.window.unfold(part.to(dtype)).T)

    @torch.no_grad()
    def gram(self) -> Tensor:
        """The sum so far, a new tensor. Adding may go on afterwards."""
        if self._plan is None:
            raise ValueError("PatchGram: nothing was added, expected at least one batch (it may be empty)")
        product = _assemble(self._sums, self._plan) if self.route == "shift" else mirror(self._sums.clone())
        if not self._ones:
            return product
        width = len(product)
        out = product.new_empty(width + 1, width + 1)
        out[:width, :width] = product
        patches = self.window.unfold(self._image[None])
        out[-1, :-1] = out[:-1, -1] = patches.sum(1)
        out[-1, -1] = self.n * patches.shape[1]
        return out


def gram_cost(x_shape: tuple[int, int, int, int], window: Window, *, itemsize: int = 4) -> tuple[int, int]:
    """(flops, bytes) of `PatchGram.add`: a product over all pixels per shift, or the triangle of the patches."""
    batch, channels, height, width = x_shape
    plan = _plan(*window.axes(torch.empty(0, channels, height, width)))
    if not plan.pays(channels, batch):
        entries = (channels * window.taps) ** 2 // 2
        positions = batch * plan.rows.outputs * plan.columns.outputs
        return 2 * entries * positions, 3 * itemsize * channels * window.taps * positions
    return 2 * channels**2 * batch * plan.pixels, 2 * itemsize * channels * batch * plan.pixels


def cross_cost(
    x_shape: tuple[int, int, int, int], outputs: int, window: Window, *, itemsize: int = 4
) -> tuple[int, int]:
    """(flops, bytes) of `patch_cross`: one product per tap."""
    batch, channels, height, width = x_shape
    grid = Grid.for_cross(*window.axes(torch.empty(0, channels, height, width)))
    pixels = batch * grid.size[0] * grid.size[1] * window.taps
    return 2 * channels * outputs * pixels, itemsize * (channels + outputs) * pixels


# --- the terms of a Gram matrix -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Term:
    """A product of two phases at a shift: over all pixels, or over one row, one column or one pixel of the left."""

    left: Pair
    right: Pair
    shift: Pair
    row: int | None = None
    column: int | None = None


@dataclass(frozen=True)
class _Block:
    """A pair of taps as a signed sum of terms, of which it is the transpose if `swapped`."""

    first: Pair
    second: Pair
    swapped: bool
    terms: tuple[tuple[int, int], ...]  # (sign, index of the term)


@dataclass(frozen=True)
class _Plan:
    rows: Axis
    columns: Axis
    terms: tuple[_Term, ...]
    blocks: tuple[_Block, ...]

    @cached_property
    def grid(self) -> Grid:
        reach = [max(abs(t.shift[a]) for t in self.terms) for a in (0, 1)]
        height, width = (axis.longest + reach[a] for a, axis in enumerate((self.rows, self.columns)))
        return Grid(height, width, *reach)

    @cached_property
    def phases(self) -> list[Pair]:
        return phases_of(self.rows, self.columns)

    @cached_property
    def whole(self) -> list[tuple[int, _Term]]:
        """Terms over all pixels, and where they stand among all."""
        return [(at, term) for at, term in enumerate(self.terms) if term.row is None and term.column is None]

    @cached_property
    def border(self) -> list[tuple[int, _Term]]:
        """Terms over one row, column or pixel."""
        return [(at, term) for at, term in enumerate(self.terms) if term.row is not None or term.column is not None]

    @cached_property
    def moves(self) -> Moves:
        number = {phase: n for n, phase in enumerate(self.phases)}
        moves = [(at, number[t.left], number[t.right], t.shift) for at, t in self.whole]
        return Moves.of(self.grid, [(*move, move[1] == move[2] and move[3] == (0, 0)) for move in moves])

    @cached_property
    def pixels(self) -> int:
        """Pixels multiplied per image, all terms together."""
        height, width = self.grid.size
        size = {(True, True): height * width, (False, True): width, (True, False): height, (False, False): 1}
        return sum(size[term.row is None, term.column is None] for term in self.terms)

    def pays(self, channels: int, images: int) -> bool:
        """Whether shifting takes less time than the triangle over unfolded patches: about, in nanoseconds."""
        images = max(1, images)
        positions, width = images * self.rows.outputs * self.columns.outputs, channels * self.rows.kernel
        width *= self.columns.kernel
        unfolding = positions * width * (_PER_NUMBER + _PER_MULTIPLY * width / 2)
        calls = len(self.terms) * -(-images // self.grid.images(PIXELS))
        shifting = images * self.pixels * channels * (0.05 * _PER_NUMBER + 1.5 * _PER_MULTIPLY * channels)
        return shifting + _PER_CALL * calls < unfolding


@lru_cache(maxsize=64)
def _plan(rows: Axis, columns: Axis) -> _Plan:
    index: dict[_Term, int] = {}
    blocks = []
    taps = [(i, j) for i in range(rows.kernel) for j in range(columns.kernel)]
    for at, first in enumerate(taps):
        for second in taps[at:]:
            left = rows.taps[first[0]], columns.taps[first[1]]
            right = rows.taps[second[0]], columns.taps[second[1]]
            (dy, missed_rows), (dx, missed_columns) = (
                rows.between(left[0], right[0]),
                columns.between(left[1], right[1]),
            )
            a, b, shift = (left[0].phase, left[1].phase), (right[0].phase, right[1].phase), (dy, dx)
            swapped = (a, (0, 0)) > (b, shift) if a == b else a > b
            if swapped:
                a, b, shift = b, a, (-dy, -dx)
                missed_rows = tuple(m + dy for m in missed_rows)
                missed_columns = tuple(m + dx for m in missed_columns)
            wanted = [(1, _Term(a, b, shift))]
            wanted += [(-1, _Term(a, b, shift, row=m)) for m in missed_rows]
            wanted += [(-1, _Term(a, b, shift, column=m)) for m in missed_columns]
            wanted += [(1, _Term(a, b, shift, m, k)) for m in missed_rows for k in missed_columns]
            terms = tuple((sign, index.setdefault(term, len(index))) for sign, term in wanted)
            blocks.append(_Block(first, second, swapped, terms))
    return _Plan(rows, columns, tuple(index), tuple(blocks))


# --- multiplying ----------------------------------------------------------------------------------------------


def _add_shifts(sums: Tensor, plan: _Plan, x: Tensor, dtype: torch.dtype) -> None:
    """Every term of the plan grows by its product over the images x."""
    grid, channels, phases = plan.grid, x.shape[1], plan.phases
    pixels = pixels_at_once(x.device, dtype)
    step = min(grid.images(pixels), len(x))
    planes = grid.planes(len(phases), step, channels, x.device, dtype)
    by_phase = dict(zip(phases, planes, strict=True))
    # The same pixels with each channel's together: what stands left in a product.
    tiles = moves_planes(sums, dtype)
    places = {} if tiles else {p: torch.zeros(channels, step, *grid.size, dtype=dtype, device=x.device) for p in phases}
    for a in range(0, len(x), step):
        part = x[a : a + step]
        images = [phase_of(part, phase, plan.rows, plan.columns) for phase in phases]
        fill(planes, images)
        if tiles:
            plan.moves.add(sums, planes, planes, len(part))
            continue
        left = {}
        for phase, image in zip(phases, images, strict=True):
            places[phase][:, : len(part), : image.shape[2], : image.shape[3]] = image.transpose(0, 1)
            left[phase] = places[phase][:, : len(part)].reshape(channels, -1)
        for at, term in plan.whole:
            right = by_phase[term.right].pixels(term.shift, left[term.left].shape[1])
            add_products(sums[at], left[term.left], right.T)
    if plan.border:
        for part in x.split(max(1, pixels // max(grid.size))):
            strips = _Strips(plan, part.to(dtype))
            _add_pairs([(sums[at], *strips.pair(term)) for at, term in plan.border], dtype)


def _add_pairs(pairs: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Each `out` grows by left right^T, left and right [C, pixels]."""
    engine = adding(pairs[0][0].device, dtype)
    if engine is not None:
        engine.add([Product(out, left.T, right.T) for out, left, right in pairs])
        return
    for out, left, right in pairs:
        add_products(out, left, right)


class _Strips:
    """Rows, columns and pixels of a few images, each [C, B * length], with zeros after every row or column.

    Where planes are multiplied, the channels of a pixel lie side by side.
    """

    def __init__(self, plan: _Plan, x: Tensor) -> None:
        self.plan, self.x = plan, x
        self.by_pixel = adding(x.device, x.dtype) is not None
        self.cache: dict[tuple[Pair, int | None, int | None], Tensor] = {}

    def pair(self, term: _Term) -> tuple[Tensor, Tensor]:
        """The pixels of both sides that meet, [C, pixels]: views."""
        dy, dx = term.shift
        row = None if term.row is None else term.row + dy
        column = None if term.column is None else term.column + dx
        left, right = self.strip(term.left, term.row, term.column), self.strip(term.right, row, column)
        shift = dx if term.column is None else dy if term.row is None else 0
        length = left.shape[1] - abs(shift)
        return left.narrow(1, max(0, -shift), length), right.narrow(1, max(0, shift), length)

    def strip(self, phase: Pair, row: int | None, column: int | None) -> Tensor:
        key = phase, row, column
        if key not in self.cache:
            strip = self._strip(phase, row, column)
            self.cache[key] = strip.T.contiguous().T if self.by_pixel else strip
        return self.cache[key]

    def _strip(self, phase: Pair, row: int | None, column: int | None) -> Tensor:
        image = phase_of(self.x, phase, self.plan.rows, self.plan.columns).transpose(0, 1)
        if row is not None and column is not None:
            return image[:, :, row, column]
        line = image[:, :, row] if row is not None else image[:, :, :, column]
        room = self.plan.grid.size[1 if row is not None else 0]
        strip = line.new_zeros(*line.shape[:2], room)
        strip[:, :, : line.shape[2]] = line
        return strip.flatten(1)


def _assemble(sums: Tensor, plan: _Plan) -> Tensor:
    """[C * taps, C * taps] from the terms."""
    channels, kernel = sums.shape[1], (plan.rows.kernel, plan.columns.kernel)
    out = sums.new_empty(channels, *kernel, channels, *kernel)
    for block in plan.blocks:
        product = torch.zeros_like(sums[0])
        for sign, at in block.terms:
            product.add_(sums[at], alpha=sign)
        product = mirror(product) if block.first == block.second else product.T if block.swapped else product
        out[:, *block.first, :, *block.second] = product
        out[:, *block.second, :, *block.first] = product.T
    return out.reshape(channels * plan.rows.kernel * plan.columns.kernel, -1)


def _unfolded_images(x: Tensor, window: Window) -> int:
    """How many images to unfold at once: about a million numbers (4 MB)."""
    height, width = window.output(x)
    return max(1, 2**20 // max(1, height * width * x.shape[1] * window.taps))


def check_positions(x: Tensor, window_x: Window, y: Tensor, window_y: Window) -> None:
    found, expected = window_y.output(y), window_x.output(x)
    if found != expected or len(x) != len(y):
        raise ValueError(
            f"patches: x has {len(x)} samples of {expected[0]}x{expected[1]} positions, "
            f"y has {len(y)} of {found[0]}x{found[1]}; expected the same"
        )
