"""`Windows`: what the kernel of a convolution or a pooling reads, tap by tap, and the transpose of that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor

from irgrow.ir.pattern import Conv2d, Pair, Pool2d
from irgrow.kernels.patches import Window


@dataclass(frozen=True)
class Windows:
    """The kernel, stride, padding and dilation of a convolution or a pooling."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @staticmethod
    def of(pattern: Conv2d | Pool2d) -> Windows:
        return Windows(pattern.kernel, pattern.stride, pattern.padding, pattern.dilation)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def kernel_window(self) -> Window:
        """The same for the kernels of irgrow.kernels.patches."""
        return Window(self.kernel, self.stride, self.padding, self.dilation)

    @property
    def centre(self) -> int:
        """The tap that a new channel of a depthwise convolution, or the restricted form, uses."""
        return (self.kernel[0] // 2) * self.kernel[1] + self.kernel[1] // 2

    def output(self, image: Pair) -> Pair:
        """Output height and width."""
        h, w = (
            (image[a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a] + 1
            for a in (0, 1)
        )
        return h, w

    def at(self, picked: Windows, hidden: Pair, image: Pair) -> Windows | None:
        """The windows that make, of an image, the outputs that the centre tap of `picked` reads of `hidden`.

        None where the tap reads padding, or where windows with a padding of 0 or more do not make just those.
        """
        positions = picked.output(hidden)
        taps = divmod(picked.centre, picked.kernel[1])
        start = [k * d - p for k, d, p in zip(taps, picked.dilation, picked.padding, strict=True)]
        last = [a + (n - 1) * s for a, n, s in zip(start, positions, picked.stride, strict=True)]
        py, px = (p - a * s for p, a, s in zip(self.padding, start, self.stride, strict=True))
        sy, sx = (a * b for a, b in zip(self.stride, picked.stride, strict=True))
        found = Windows(self.kernel, (sy, sx), (py, px), self.dilation)
        inside = min(start) >= 0 and all(b < n for b, n in zip(last, hidden, strict=True))
        return found if inside and min(py, px) >= 0 and found.output(image) == positions else None

    def unfold(self, x: Tensor) -> Tensor:
        """Patches `[B, C * taps, positions]` of images `[B, C, H, W]`, channels slowest (as weights are flattened)."""
        return F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)

    def pick(self, x: Tensor, tap: int) -> Tensor:
        """`[B, C, Ho, Wo]`: what one tap reads of images `[B, C, H, W]`; 0 where it reads padding."""
        out = x.new_zeros(*x.shape[:2], *self.output((x.shape[2], x.shape[3])))
        (to_y, from_y), (to_x, from_x) = _reads(self, (x.shape[2], x.shape[3]), tap)
        out[:, :, to_y, to_x] = x[:, :, from_y, from_x]
        return out

    def spread(self, g: Tensor, shape: Pair, tap: int | None) -> Tensor:
        """The transpose of `pick`: `[B, O, Ho, Wo]` -> `[B, O * taps, *shape]`, what each tap hands back.

        Of one tap only (`[B, O, *shape]`), if it is given.
        """
        taps = range(self.taps) if tap is None else (tap,)
        out = g.new_zeros(*g.shape[:2], len(taps), *shape)
        for at, t in enumerate(taps):
            (to_y, from_y), (to_x, from_x) = _reads(self, shape, t)
            out[:, :, at, from_y, from_x] = g[:, :, to_y, to_x]
        return out.flatten(1, 2)

    def sum(self, x: Tensor) -> Tensor:
        """`[B, C, Ho, Wo]`: the sum over each window of images `[B, C, H, W]`."""
        shape = x.shape[2], x.shape[3]
        out = x.new_zeros(*x.shape[:2], *self.output(shape))
        for tap in range(self.taps):
            (to_y, from_y), (to_x, from_x) = _reads(self, shape, tap)
            out[:, :, to_y, to_x] += x[:, :, from_y, from_x]
        return out

    def share(self, g: Tensor, shape: Pair) -> Tensor:
        """The transpose of `sum`: `[B, C, Ho, Wo]` -> `[B, C, *shape]`."""
        out = g.new_zeros(*g.shape[:2], *shape)
        for tap in range(self.taps):
            (to_y, from_y), (to_x, from_x) = _reads(self, shape, tap)
            out[:, :, from_y, from_x] += g[:, :, to_y, to_x]
        return out


@lru_cache(maxsize=512)
def _reads(windows: Windows, image: Pair, tap: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Per axis the outputs for which this tap reads a pixel, and those pixels, as slices of equal length."""
    found = []
    for a, k in enumerate(divmod(tap, windows.kernel[1])):
        stride, start = windows.stride[a], k * windows.dilation[a] - windows.padding[a]
        first = max(0, -(start // stride))
        last = min(windows.output(image)[a] - 1, (image[a] - 1 - start) // stride)
        count = max(0, last - first + 1)
        pixel = first * stride + start
        found.append(
            (slice(first, first + count), slice(pixel, pixel + (count - 1) * stride + 1 if count else pixel, stride))
        )
    return found[0], found[1]
