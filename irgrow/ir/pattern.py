"""Patterns: who is connected to whom between two groups, without the weights.

A pattern is a few numbers (a convolution) or index arrays (`Sparse`), and always *is* its neuron-level
edges: `pattern.edges(source, target)` yields them in chunks as three integer arrays (source neuron,
target neuron, index into the flattened weight tensor). `source` and `target` are the shapes
`(units, *positions)` of the two groups; a neuron's local index is `unit * positions + position`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from irgrow.ir.errors import BadShape, DanglingEdge, WeightSize

Shape = tuple[int, ...]
Edges = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer]]
Pair = tuple[int, int]
CHUNK = 1 << 20  # edges per yielded chunk, about


def size(shape: Shape) -> int:
    """The number of neurons of a group of this shape."""
    return math.prod(shape)


class Pattern(ABC):
    """Pure structure between a source and a target group."""

    couples = False  # True: source and target units correspond one to one and must grow together

    @abstractmethod
    def check(self, source: Shape, target: Shape) -> None:
        """Raises BadShape or DanglingEdge unless the pattern fits between groups of these shapes."""

    @abstractmethod
    def weight_shape(self, source: Shape, target: Shape) -> Shape:
        """The shape of the weight tensor; `()` is one weight shared by all edges."""

    @abstractmethod
    def edges(self, source: Shape, target: Shape) -> Iterator[Edges]:
        """All edges, in chunks, each neuron's incoming edges in one fixed order."""

    @abstractmethod
    def count(self, source: Shape, target: Shape) -> int:
        """The number of edges."""

    def parameters(self, source: Shape, target: Shape) -> int:
        """The number of weight entries that have an edge."""
        return size(self.weight_shape(source, target))

    def all_edges(self, source: Shape, target: Shape) -> Edges:
        """All edges at once."""
        chunks = list(self.edges(source, target))
        if len(chunks) == 1:
            return chunks[0]
        if not chunks:
            empty = np.empty(0, np.int64)
            return empty, empty, empty
        s, t, w = zip(*chunks, strict=True)
        return np.concatenate(s), np.concatenate(t), np.concatenate(w)

    def to_sparse(self, source: Shape, target: Shape) -> Sparse:
        """The same edges and ties as explicit arrays."""
        s, t, w = self.all_edges(source, target)
        weights = size(self.weight_shape(source, target))
        tied = weights != s.size or not np.array_equal(w, np.arange(s.size))
        return Sparse(s, t, w if tied else None, weights=weights)


@dataclass(frozen=True)
class Dense(Pattern):
    """Every source neuron feeds every target neuron; weight `(target neurons, source neurons)`."""

    def check(self, source: Shape, target: Shape) -> None:
        pass

    def weight_shape(self, source: Shape, target: Shape) -> Shape:
        return (size(target), size(source))

    def count(self, source: Shape, target: Shape) -> int:
        return size(source) * size(target)

    def edges(self, source: Shape, target: Shape) -> Iterator[Edges]:
        columns, rows = size(source), size(target)
        step = max(1, CHUNK // max(1, columns))
        for first in range(0, rows, step):
            t = np.arange(first, min(rows, first + step))
            s = np.tile(np.arange(columns), t.size)
            yield s, np.repeat(t, columns), np.arange(t[0] * columns, (t[-1] + 1) * columns)


@dataclass(frozen=True, eq=False)
class Sparse(Pattern):
    """Any set of edges: `source[e] -> target[e]` with weight `weight_index[e]` (None: weight e is edge e's).

    `weights` is the number of weights (needed only with `weight_index`). `tags` are named integers per
    edge that every rewrite carries along (`primary` of the insertion algorithm).
    """

    source: NDArray[np.integer]
    target: NDArray[np.integer]
    weight_index: NDArray[np.integer] | None = None
    weights: int = -1
    tags: Mapping[str, NDArray[np.integer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {"source": self.source, "target": self.target}
        if self.weight_index is not None:
            arrays["weight_index"] = self.weight_index
        for name, array in arrays.items():
            array = np.asarray(array)
            if array.size == 0 and array.dtype.kind == "f":
                array = array.astype(np.int32)
            if array.ndim != 1 or array.dtype.kind not in "iu" or array.size != np.asarray(self.source).size:
                raise BadShape(
                    f"Sparse: {name}",
                    f"{array.dtype} of shape {array.shape}",
                    f"a flat integer array of {np.asarray(self.source).size} entries, one per edge",
                )
            object.__setattr__(self, name, _int32(f"Sparse: {name}", array))
        tags = {name: np.asarray(tag) for name, tag in self.tags.items()}
        for name, tag in tags.items():
            if tag.shape != self.source.shape or tag.dtype.kind not in "iu":
                raise BadShape(f"Sparse: tag {name!r}", f"{tag.dtype} of shape {tag.shape}", "one integer per edge")
            tags[name] = _int32(f"Sparse: tag {name!r}", tag)
        object.__setattr__(self, "tags", tags)
        if self.weight_index is None:
            object.__setattr__(self, "weights", self.source.size)
        elif self.weights < 0:
            object.__setattr__(self, "weights", int(self.weight_index.max(initial=-1)) + 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sparse):
            return NotImplemented
        return (
            self.weights == other.weights
            and np.array_equal(self.source, other.source)
            and np.array_equal(self.target, other.target)
            and (self.weight_index is None) == (other.weight_index is None)
            and np.array_equal(self.index, other.index)
            and self.tags.keys() == other.tags.keys()
            and all(np.array_equal(self.tags[name], other.tags[name]) for name in self.tags)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        tied = "" if self.weight_index is None else f", {self.weights} shared weights"
        tags = "".join(f", tag {name}" for name in self.tags)
        return f"Sparse({self.source.size} edges{tied}{tags})"

    def check(self, source: Shape, target: Shape) -> None:
        for name, array, limit in (
            ("source", self.source, size(source)),
            ("target", self.target, size(target)),
        ):
            if array.size and (array.min() < 0 or array.max() >= limit):
                edge = int(np.flatnonzero((array < 0) | (array >= limit))[0])
                raise DanglingEdge(f"Sparse: {name} of edge {edge}", f"neuron {array[edge]}", f"0 to {limit - 1}")
        index = self.weight_index
        if index is not None and index.size and (index.min() < 0 or index.max() >= self.weights):
            raise WeightSize("Sparse: weight_index", f"{index.min()} to {index.max()}", f"0 to {self.weights - 1}")

    def weight_shape(self, source: Shape, target: Shape) -> Shape:
        return (self.weights,)

    def count(self, source: Shape, target: Shape) -> int:
        return self.source.size

    def edges(self, source: Shape, target: Shape) -> Iterator[Edges]:
        yield self.source, self.target, self.index

    @cached_property
    def index(self) -> NDArray[np.integer]:
        """The weight index of every edge, ties or not."""
        return np.arange(self.source.size, dtype=np.int32) if self.weight_index is None else self.weight_index


def _int32(who: str, array: NDArray[np.integer]) -> NDArray[np.int32]:
    limits = np.iinfo(np.int32)
    if array.dtype != np.int32 and array.size and (array.max() > limits.max or array.min() < limits.min):
        raise BadShape(who, f"a value of {max(array.max(), array.min(), key=abs)}", "integers of 32 bits")
    return np.ascontiguousarray(array, np.int32)


@dataclass(frozen=True)
class Identity(Pattern):
    """Unit i feeds unit `start + i`, position by position; one weight for all edges (fixed 1 by default).

    Several Identity bundles into disjoint ranges of one group are a concatenation; into one range, a sum.
    """

    start: int = 0
    couples = True

    def check(self, source: Shape, target: Shape) -> None:
        if source[1:] != target[1:] or self.start < 0 or self.start + source[0] > target[0]:
            raise BadShape(
                f"Identity from {source} into units {self.start} to {self.start + source[0] - 1} of {target}",
                expected=f"equal positions and at least {self.start + source[0]} target units",
            )

    def weight_shape(self, source: Shape, target: Shape) -> Shape:
        return ()

    def count(self, source: Shape, target: Shape) -> int:
        return size(source)

    def edges(self, source: Shape, target: Shape) -> Iterator[Edges]:
        s = np.arange(size(source))
        yield s, s + self.start * size(source[1:]), np.zeros_like(s)


@dataclass(frozen=True)
class Window(Pattern):
    """What Conv2d, Local2d and Pool2d share: a kernel sliding over the positions of an image group."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    def __post_init__(self) -> None:
        for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)
            pair = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
            if len(pair) != 2 or min(pair) < least:
                raise BadShape(f"{type(self).__name__}: {name}", value, f"one or two integers, each at least {least}")
            object.__setattr__(self, name, pair)

    def output(self, source: Shape) -> Pair:
        """The output height and width for a source `(channels, height, width)`."""
        if len(source) != 3:
            raise BadShape(f"{type(self).__name__}: source shape", source, "(channels, height, width)")
        h, w = (
            (source[1 + a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a] + 1
            for a in (0, 1)
        )
        if h < 1 or w < 1:
            raise BadShape(
                f"{type(self).__name__} over a {source[1]}x{source[2]} image",
                f"an output of {h}x{w}",
                "at least 1x1",
                do="use a smaller kernel or more padding",
            )
        return h, w

    def check(self, source: Shape, target: Shape) -> None:
        if tuple(target[1:]) != self.output(source):
            raise BadShape(f"{self} from {source}", f"target positions {target[1:]}", self.output(source))

    def taps(self, source: Shape) -> Edges:
        """All (input position, output position, kernel tap) triples inside the image, by output then tap."""
        axes = []
        for a, length in enumerate(self.output(source)):
            o, k = np.meshgrid(np.arange(length), np.arange(self.kernel[a]), indexing="ij")
            i = o * self.stride[a] - self.padding[a] + k * self.dilation[a]
            inside = (i >= 0) & (i < source[1 + a])
            axes.append((i, inside))
        (i0, in0), (i1, in1) = axes
        position = i0[:, None, :, None] * source[2] + i1[None, :, None, :]  # (Ho, Wo, kh, kw)
        inside = in0[:, None, :, None] & in1[None, :, None, :]
        out, tap = np.divmod(np.flatnonzero(inside), self.kernel[0] * self.kernel[1])
        return position[inside], out, tap


@dataclass(frozen=True)
class Conv2d(Window):
    """A 2-d cross-correlation; weight `(out, in / channel_groups, kh, kw)`, shared over positions."""

    channel_groups: int = 1

    @property
    def couples(self) -> bool:  # type: ignore[override]
        return self.channel_groups > 1

    def __str__(self) -> str:
        return _window_text("conv", self) + _groups_text(self)

    def depthwise(self, source: Shape) -> bool:
        """Whether every input channel has output channels of its own."""
        return self.channel_groups > 1 and self.channel_groups == source[0]

    def check(self, source: Shape, target: Shape) -> None:
        super().check(source, target)
        if self.channel_groups < 1 or source[0] % self.channel_groups or target[0] % self.channel_groups:
            raise BadShape(
                f"{type(self).__name__} with {self.channel_groups} channel groups",
                f"{source[0]} input and {target[0]} output channels",
                "multiples of the channel groups",
            )

    def weight_shape(self, source: Shape, target: Shape) -> Shape:
        return (target[0], source[0] // self.channel_groups, *self.kernel)

    def count(self, source: Shape, target: Shape) -> int:
        return self.taps(source)[0].size * target[0] * (source[0] // self.channel_groups)

    def _weight(self, target_unit: int, inputs: int, tap: NDArray, out: NDArray, positions: int) -> NDArray:
        channel = np.arange(inputs)
        return (target_unit * inputs + channel) * (self.kernel[0] * self.kernel[1]) + tap[:, None]

    def edges(self, source: Shape, target: Shape) -> Iterator[Edges]:
        position, out, tap = self.taps(source)
        inputs, outputs = source[0] // self.channel_groups, target[0] // self.channel_groups
        positions = size(target[1:])
        for unit in range(target[0]):
            channel = unit // outputs * inputs + np.arange(inputs)
            s = channel * size(source[1:]) + position[:, None]
            t = np.broadcast_to(unit * positions + out[:, None], s.shape)
            yield s.ravel(), t.ravel(), self._weight(unit, inputs, tap, out, positions).ravel()


@dataclass(frozen=True)
class Local2d(Conv2d):
    """A convolution without sharing: every output position has a kernel of its own.

    Weight `(out, in / channel_groups, kh, kw, Ho, Wo)`; entries that reach into the padding have no edge,
    stay zero and are not counted.
    """

    def __str__(self) -> str:
        return _window_text("local", self) + _groups_text(self)

    def weight_shape(self, source: Shape, target: Shape) -> Shape:
        return (*super().weight_shape(source, target), *target[1:])

    def parameters(self, source: Shape, target: Shape) -> int:
        return self.count(source, target)

    def used(self, source: Shape) -> NDArray[np.bool_]:
        """Which entries `(kh, kw, Ho, Wo)` of every kernel have an edge: those that do not reach into the padding."""
        _, out, tap = self.taps(source)
        mask = np.zeros((size(self.kernel), size(self.output(source))), bool)
        mask[tap, out] = True
        return mask.reshape(*self.kernel, *self.output(source))

    def _weight(self, target_unit: int, inputs: int, tap: NDArray, out: NDArray, positions: int) -> NDArray:
        return super()._weight(target_unit, inputs, tap, out, positions) * positions + out[:, None]


@dataclass(frozen=True)
class Pool2d(Window):
    """The connectivity of pooling: each channel by itself; one weight for all edges (fixed 1 by default).

    With aggregation `max` this is max pooling; with `sum` and the fixed weight 1/(kh*kw), mean pooling
    (padding counts as zeros).
    """

    couples = True

    def __str__(self) -> str:
        return _window_text("pool", self)

    def check(self, source: Shape, target: Shape) -> None:
        super().check(source, target)
        if source[0] != target[0]:
            raise BadShape("Pool2d", f"{source[0]} input and {target[0]} output channels", "as many")

    def weight_shape(self, source: Shape, target: Shape) -> Shape:
        return ()

    def count(self, source: Shape, target: Shape) -> int:
        return self.taps(source)[0].size * source[0]

    def edges(self, source: Shape, target: Shape) -> Iterator[Edges]:
        position, out, _ = self.taps(source)
        unit = np.arange(source[0])[:, None]
        s = (unit * size(source[1:]) + position).ravel()
        yield s, (unit * size(target[1:]) + out).ravel(), np.zeros_like(s)


def _groups_text(conv: Conv2d) -> str:
    return f" channel groups {conv.channel_groups}" if conv.channel_groups > 1 else ""


def _window_text(name: str, window: Window) -> str:
    text = f"{name} {window.kernel[0]}x{window.kernel[1]}"
    for word, value, default in (
        ("stride", window.stride, (1, 1)),
        ("padding", window.padding, (0, 0)),
        ("dilation", window.dilation, (1, 1)),
    ):
        if value != default:
            text += f" {word} {value[0]}" if value[0] == value[1] else f" {word} {value[0]},{value[1]}"
    return text
