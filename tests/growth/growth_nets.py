"""Small float64 networks and data for the growth tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import irgrow as ig

DOUBLE = torch.float64


def drawn(network: Any, count: int, seed: int = 0, classes: int | None = None) -> tuple[Any, Tensor]:
    """Normal inputs and class labels for a network."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [network.groups[name].shape for name in network.inputs]
    inputs = tuple(torch.randn(count, *s, generator=draw, dtype=DOUBLE) for s in shapes)
    outputs = network.groups[network.outputs[0]].units if classes is None else classes
    targets = torch.randint(0, outputs, (count,), generator=draw)
    return (inputs[0] if len(inputs) == 1 else inputs), targets


def mlp(activation: str = "tanh", widths: tuple[int, ...] = (6, 5, 4, 3), seed: int = 0, bias: bool = True) -> Any:
    return ig.mlp(widths, activation=activation, bias=bias, seed=seed, dtype=DOUBLE)


def forked(activation: str = "tanh", seed: int = 0) -> Any:
    """Two inputs into `hidden`, which feeds `next` and the output; the output has a skip as well."""
    b = ig.Builder(seed=seed, dtype=DOUBLE)
    b.input("x", 4)
    b.input("y", (2, 3))
    b.group("hidden", 5, activation=activation, bias=True)
    b.connect("x", "hidden")
    b.connect("y", "hidden")
    b.group("next", 3, activation="tanh", bias=True)
    b.connect("hidden", "next")
    b.output("out", 3, bias=True)
    b.connect("hidden", "out")
    b.connect("next", "out")
    b.connect("x", "out")
    return b.build()


def residual(activation: str = "tanh", seed: int = 0) -> Any:
    """A flat residual stream: `stream2 = stream1 + f(stream1)`."""
    b = ig.Builder(seed=seed, dtype=DOUBLE)
    b.input("x", 4)
    b.group("stream1", 5, activation=activation, bias=True)
    b.connect("x", "stream1")
    b.group("inner", 4, activation="tanh", bias=True)
    b.connect("stream1", "inner")
    b.group("stream2", 5, bias=True)
    b.connect("stream1", "stream2", ig.Identity())
    b.connect("inner", "stream2")
    b.output("out", 3, bias=True)
    b.connect("stream2", "out")
    return b.build()


def concatenated(activation: str = "tanh", seed: int = 0) -> Any:
    """`left` and `right` side by side in `both`, which has an activation of its own."""
    b = ig.Builder(seed=seed, dtype=DOUBLE)
    b.input("x", 4)
    b.group("left", 3, activation=activation, bias=True)
    b.group("right", 2, activation=activation, bias=True)
    b.group("both", 5, activation="tanh")
    for at, name in ((0, "left"), (3, "right")):
        b.connect("x", name)
        b.connect(name, "both", ig.Identity(at), 0.5)
    b.output("out", 3, bias=True)
    b.connect("both", "out")
    return b.build()


def conv_pair(
    first: Any,
    second: Any,
    activation: str = "tanh",
    image: tuple[int, int, int] = (2, 7, 6),
    seed: int = 0,
    **more: Any,
) -> Any:
    """input -> conv `grown` (3 channels) -> conv `target` (2 channels) -> output."""
    b = ig.Builder(seed=seed, dtype=DOUBLE)
    b.input("x", image)
    shape = (3, *first.output(image))
    b.group("grown", shape, activation=activation, bias=True, **more)
    b.connect("x", "grown", first)
    after = (2, *second.output(shape))
    b.group("target", after, activation="tanh", bias=True)
    b.connect("grown", "target", second)
    b.output("out", 3, bias=True)
    b.connect("target", "out")
    return b.build()


def pooled(pooling: str, flatten: bool, activation: str = "tanh", seed: int = 0, norm: str | None = None) -> Any:
    """conv `grown` -> 2x2 pooling -> dense output, or -> conv `target` -> output."""
    b = ig.Builder(seed=seed, dtype=DOUBLE)
    b.input("x", (2, 7, 6))
    b.group("grown", (3, 7, 6), activation=activation, bias=True, norm=norm)
    b.connect("x", "grown", ig.Conv2d((3, 3), padding=(1, 1)))
    b.group("pool", (3, 3, 3), aggregation="max" if pooling == "max" else "sum")
    b.connect("grown", "pool", ig.Pool2d((2, 2), (2, 2)), 1.0 if pooling == "max" else 0.25, trainable=False)
    last = "pool"
    if not flatten:
        b.group("target", (2, 3, 3), activation="tanh", bias=True)
        b.connect("pool", "target", ig.Conv2d((3, 3), padding=(1, 1)))
        last = "target"
    b.output("out", 3, bias=True)
    b.connect(last, "out")
    return b.build()


def mobile(activation: str = "tanh", seed: int = 0) -> Any:
    """conv `grown` -> depthwise conv of stride 2 -> conv `target` -> output."""
    b = ig.Builder(seed=seed, dtype=DOUBLE)
    b.input("x", (2, 7, 6))
    b.group("grown", (3, 7, 6), activation=activation, bias=True)
    b.connect("x", "grown", ig.Conv2d((3, 3), padding=(1, 1)))
    b.group("deep", (3, 4, 3), activation=activation, bias=True)
    b.connect("grown", "deep", ig.Conv2d((3, 3), (2, 2), (1, 1), channel_groups=3))
    b.group("target", (2, 4, 3), activation="tanh", bias=True)
    b.connect("deep", "target", ig.Conv2d((1, 1)))
    b.output("out", 3, bias=True)
    b.connect("target", "out")
    return b.build()


def image_stream() -> Any:
    """A residual stream of images: two entries, two exits, one of them strided."""
    b = ig.Builder(dtype=DOUBLE)
    b.input("x", (2, 6, 5))
    b.group("one", (3, 6, 5), activation="tanh", bias=True)
    b.connect("x", "one", ig.Conv2d(3, padding=1))
    b.group("inner", (2, 6, 5), activation="tanh", bias=True)
    b.connect("one", "inner", ig.Conv2d(3, padding=1))
    b.group("two", (3, 6, 5), activation="gelu", bias=True)
    b.connect("one", "two", ig.Identity())
    b.connect("inner", "two", ig.Conv2d(3, padding=1))
    b.group("last", (2, 3, 3), activation="tanh", bias=True)
    b.connect("two", "last", ig.Conv2d(3, stride=2, padding=1))
    b.output("out", 3, bias=True)
    b.connect("last", "out")
    return b.build()


def grown_loss(network: Any, proposal: Any, data: tuple[Any, Tensor], loss: Any = F.cross_entropy) -> float:
    """The mean loss of the network with the proposal's units, by the interpreter."""
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    after = ig.AddUnits(proposal)(network).after
    return float(loss(ig.interpret(after, *inputs), data[1]))


def relative(a: Tensor, b: Tensor) -> float:
    scale = b.detach().abs().max().item()
    return (a - b).detach().abs().max().item() / (scale or 1.0)
