"""Products of convolution patches without unfolding the image, beside F.unfold and a matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight as torch_conv2d_weight

from bench.memory import peak
from bench.suite import Case, Made, Row, op
from irgrow.kernels import patches as kernel

KERNEL, PADDING = 3, 1
GOALS = {"cpu": {"gram": 5.0, "cross": 5.0}, "cuda": {"gram": 10.0}}
MEMORY_GOAL = 12.0
Images = tuple[torch.Tensor, torch.Tensor]


@op(
    "patches",
    cases=[{"what": what, "batch": 64, "channels": 64, "size": 32} for what in ("gram", "cross")],
    tiny={"batch": 3, "channels": 4, "size": 8},
    devices=("cpu", "cuda"),
)
def patches(*, what: str, batch: int, channels: int, size: int, device: str) -> Made:
    """Sums of products of 3x3 patches (Gram matrix; cross with a gradient), beside unfolding the image.

    The unfolded opponents multiply in float32: all images at once, or one at a time (less memory). Peak memory is
    measured in processes of their own, against the product of all images at once.
    """
    images = _images(batch, channels, size, device)
    full_size = (batch, channels, size) == (64, 64, 32)
    wanted = GOALS[device.partition(":")[0]].get(what) if full_size else None
    window = kernel.Window.of(KERNEL, padding=PADDING)
    shape = (batch, channels, size, size)
    if what == "gram":
        flops, moved = kernel.gram_cost(shape, window)
    else:
        flops, moved = kernel.cross_cost(shape, channels, window)
    label = f"{what}, {batch}x{channels}x{size}x{size}, 3x3"
    for name, opponent, goal in (("", _unfolded, wanted), (" per image", _one_by_one, None)):
        yield Case(
            label,
            ours=_ours(what, images),
            opponents={f"unfold + GEMM{name}": opponent(what, images)},
            tolerance=1e-5,
            goal=goal,
            cost=(flops, moved),
        )
    if what == "cross":
        x, y = images
        shape_w = (channels, channels, KERNEL, KERNEL)

        def exact() -> torch.Tensor:
            found = torch_conv2d_weight(x.double(), shape_w, y.double(), padding=PADDING)
            return found.flatten(1).T

        def conv2d_weight() -> torch.Tensor:
            found = torch_conv2d_weight(x, shape_w, y, padding=PADDING)
            return found.flatten(1).T

        yield Case(
            label,
            ours=_ours(what, images),
            opponents={"torch.nn.grad.conv2d_weight, float32": conv2d_weight},
            reference=exact,
            tolerance=1e-5,
            cost=(flops, moved),
        )
    if device == "cpu":
        arguments = {"what": what, "batch": batch, "channels": channels, "size": size}
        mine, theirs = (peak("bench.patches", name, arguments).above for name in ("ours_alone", "unfolded_alone"))
        yield Row(
            f"{what}: peak memory",
            ratio=theirs / max(1, mine),
            opponent="unfold + GEMM",
            goal=MEMORY_GOAL if full_size else None,
            note=f"ours {mine / 2**20:.0f} MB, theirs {theirs / 2**20:.0f} MB",
        )


def ours_alone(*, what: str, batch: int, channels: int, size: int) -> Callable[[], torch.Tensor]:
    """Our work on its own, for the process that measures memory."""
    return _ours(what, _images(batch, channels, size, "cpu"))


def unfolded_alone(*, what: str, batch: int, channels: int, size: int) -> Callable[[], torch.Tensor]:
    """The opponent's work on its own."""
    return _unfolded(what, _images(batch, channels, size, "cpu"))


def _images(batch: int, channels: int, size: int, device: str) -> Images:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(batch, channels, size, size, generator=draw).to(device) for _ in range(2))
    return x, y


def _ours(what: str, images: Images) -> Callable[[], torch.Tensor]:
    x, y = images
    if what == "gram":
        return lambda: kernel.patch_gram(x, KERNEL, padding=PADDING)
    return lambda: kernel.patch_cross(x, y, KERNEL, padding=PADDING)


def _unfolded(what: str, images: Images) -> Callable[[], torch.Tensor]:
    x, y = images

    def work() -> torch.Tensor:
        columns = F.unfold(x, KERNEL, padding=PADDING).transpose(0, 1).flatten(1)
        right = columns if what == "gram" else y.transpose(0, 1).flatten(1)
        return columns @ right.T

    return work


def _one_by_one(what: str, images: Images) -> Callable[[], torch.Tensor]:
    x, y = images

    def work() -> torch.Tensor:
        width = x.shape[1] * KERNEL**2
        out = x.new_zeros(width, width if what == "gram" else y.shape[1])
        for one, other in zip(x, y, strict=True):
            columns = F.unfold(one[None], KERNEL, padding=PADDING)[0]
            out.addmm_(columns, (columns if what == "gram" else other.flatten(1)).T)
        return out

    return work
