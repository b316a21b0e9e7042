"""Building networks: `Builder` for any graph of groups or single neurons, `mlp` and `cnn` for the usual ones.

Initial weights follow torch's layers: uniform in +-1/sqrt(fan-in), biases alike. All drawing is from one
seed, in the order of the calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.errors import BadName, BadProperty, BadShape, DanglingEdge, UnknownName
from irgrow.ir.network import Bundle, Group, Network, Norm
from irgrow.ir.pattern import Conv2d, Dense, Local2d, Pattern, Pool2d, Shape, Sparse
from irgrow.kernels.activations import ACTIVATIONS


class Builder:
    """Collects groups, bundles and single neurons, then `build()` gives a verified `Network`.

        b = Builder(seed=0)
        b.input("x", 64)
        b.group("hidden", 16, activation="relu", bias=True)
        b.connect("x", "hidden")                  # dense
        b.output("y", 10, bias=True)
        b.connect("hidden", "y")
        b.connect("x", "y")                       # a skip
        network = b.build()

    Neuron by neuron: `u = b.neuron("relu")`, `b.connect(u, v, 0.5)` between numbers that `neuron` returned.
    """

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        self._groups: dict[str, Group] = {}
        self._bundles: dict[str, Bundle] = {}
        self._biased: set[str] = set()
        self._inputs: list[str] = []
        self._outputs: list[str] = []
        self._neurons: list[tuple[str, int]] = []  # number -> (group, index within it)
        self._single: dict[str, list[float]] = {}  # group of single neurons -> biases
        self._edges: dict[tuple[str, str], tuple[list[int], list[int], list[float]]] = {}

    # ---- groups -------------------------------------------------------------------------------------------

    def input(self, name: str, shape: int | Sequence[int]) -> str:
        """A new input group; returns its name."""
        self._inputs.append(self.group(name, shape))
        return name

    def output(self, name: str, shape: int | Sequence[int], **properties: Any) -> str:
        """A new output group (see `group`); returns its name."""
        self._outputs.append(self.group(name, shape, **properties))
        return name

    def group(
        self,
        name: str,
        shape: int | Sequence[int],
        *,
        activation: str = "identity",
        aggregation: str = "sum",
        bias: bool | Tensor = False,
        norm: str | Norm | None = None,
        norm_groups: int = 1,
        dropout: float = 0.0,
    ) -> str:
        """A new group of `shape` (units, or units and positions); returns its name.

        `bias=True` draws a bias with the first bundle that enters; `norm` is `batch`, `layer`, `group` or a Norm.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(int(n) for n in shape)
        if name in self._groups or name in self._single:
            raise BadName(f"group {name!r}", "a second group of that name", "unique names")
        if activation not in ACTIVATIONS:
            raise BadProperty(f"group {name!r}: activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
        if isinstance(norm, str):
            norm = self._norm(norm, shape[0], norm_groups)
        given = None
        if isinstance(bias, Tensor):
            given = bias.detach().clone().to(self._dtype)
        elif bias:
            given = torch.zeros(shape[0], dtype=self._dtype)
            self._biased.add(name)
        self._groups[name] = Group(name, shape, activation, aggregation, given, norm, dropout)
        return name

    def _norm(self, kind: str, units: int, groups: int) -> Norm:
        ones, zeros = torch.ones(units, dtype=self._dtype), torch.zeros(units, dtype=self._dtype)
        if kind == "batch":
            return Norm(kind, ones, zeros, zeros.clone(), ones.clone())
        return Norm(kind, ones, zeros, groups=groups)

    # ---- edges --------------------------------------------------------------------------------------------

    def connect(
        self,
        source: str | int,
        target: str | int,
        pattern: Pattern | float | None = None,
        weight: Tensor | float | None = None,
        *,
        name: str | None = None,
        trainable: bool | None = None,
    ) -> str:
        """A bundle between two groups (default Dense), or one edge `connect(u, v, w)` between two neurons.

        Without `weight`, Identity and Pool2d get the weight 1 and other patterns are drawn. Weights are
        trained unless `trainable=False`; those of Identity and Pool2d are fixed unless `trainable=True`.
        Returns the bundle's name.
        """
        if isinstance(source, int) or isinstance(target, int):
            value = weight if weight is not None else pattern if pattern is not None else 1.0
            return self._edge(source, target, float(value))  # type: ignore[arg-type]
        for end in (source, target):
            if end not in self._groups:
                raise UnknownName(
                    f"group {end!r}", expected=f"one of {', '.join(self._groups) or 'those built so far'}"
                )
        pattern = Dense() if pattern is None else pattern
        if not isinstance(pattern, Pattern):
            raise BadProperty(f"bundle {source!r} -> {target!r}: pattern", repr(pattern), "a Pattern such as Dense()")
        shapes = self._groups[source].shape, self._groups[target].shape
        pattern.check(*shapes)
        wanted = pattern.weight_shape(*shapes)
        if wanted == ():
            weight, trainable = 1.0 if weight is None else weight, bool(trainable)
        if isinstance(weight, (int, float)):
            weight = torch.full(wanted, float(weight), dtype=self._dtype)
        value = self._drawn(pattern, shapes, target) if weight is None else weight.detach().clone().to(self._dtype)
        if tuple(value.shape) != wanted:
            raise BadShape(f"bundle {source!r} -> {target!r}: weight", tuple(value.shape), wanted)
        name = name or self._free(f"{source}_{target}")
        if name in self._bundles:
            raise BadName(f"bundle {name!r}", "a second bundle of that name", "unique names")
        self._bundles[name] = Bundle(name, source, target, pattern, value, trainable is None or trainable)
        return name

    def _drawn(self, pattern: Pattern, shapes: tuple[Shape, Shape], target: str) -> Tensor:
        shape = pattern.weight_shape(*shapes)
        if isinstance(pattern, Conv2d):
            fan_in = math.prod(shape[1:4])
        elif isinstance(pattern, Dense):
            fan_in = shape[1]
        else:
            fan_in = max(1, round(pattern.count(*shapes) / math.prod(shapes[1])))
        bound = 1 / math.sqrt(max(1, fan_in))
        weight = self._uniform(shape, bound)
        if isinstance(pattern, Local2d):
            weight = weight * torch.from_numpy(pattern.used(shapes[0]))
        group = self._groups[target]
        if target in self._biased and group.bias is not None:
            self._biased.discard(target)
            group.bias.copy_(self._uniform((group.units,), bound))
        return weight

    def _uniform(self, shape: Shape, bound: float) -> Tensor:
        return (torch.rand(shape, generator=self._draw, dtype=self._dtype) * 2 - 1) * bound

    def _free(self, wanted: str) -> str:
        name, n = wanted, 1
        while name in self._bundles or name in self._groups:
            n += 1
            name = f"{wanted}_{n}"
        return name

    # ---- single neurons -----------------------------------------------------------------------------------

    def neuron(self, activation: str = "relu", *, role: str = "hidden", bias: float | None = None) -> int:
        """One new neuron; returns its number. role: `input`, `hidden` or `output`.

        Neurons of one role and activation share a flat group, named by them (`input`, `hidden_relu`, `output`).
        """
        if role not in ("input", "hidden", "output"):
            raise BadProperty("neuron: role", repr(role), "input, hidden or output")
        if activation not in ACTIVATIONS:
            raise BadProperty("neuron: activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
        name = role if role == "input" else f"{role}_{activation}"
        name = name if bias is None else f"{name}_bias"
        if name in self._groups:
            raise BadName(f"neuron: group {name!r}", "a group of that name", "another name for the group")
        values = self._single.setdefault(name, [])
        values.append(0.0 if bias is None else float(bias))
        self._neurons.append((name, len(values) - 1))
        return len(self._neurons) - 1

    def _edge(self, source: str | int, target: str | int, weight: float) -> str:
        ends = []
        for end in (source, target):
            if not isinstance(end, int) or not 0 <= end < len(self._neurons):
                raise DanglingEdge("connect", f"neuron {end!r}", f"a number from 0 to {len(self._neurons) - 1}")
            ends.append(self._neurons[end])
        (s, i), (t, j) = ends
        sources, targets, weights = self._edges.setdefault((s, t), ([], [], []))
        sources.append(i)
        targets.append(j)
        weights.append(weight)
        return f"{s}_{t}"

    def _neuron_groups(self) -> tuple[list[Group], list[Bundle]]:
        groups = []
        for name, biases in self._single.items():
            role, _, rest = name.partition("_")
            activation = rest.removesuffix("_bias").strip("_") or "identity"
            bias = torch.tensor(biases, dtype=self._dtype) if name.endswith("_bias") else None
            activation = "identity" if role == "input" else activation
            serials = np.array([n for n, (g, _) in enumerate(self._neurons) if g == name], np.int64)
            groups.append(Group(name, (len(biases),), activation, bias=bias, serials=serials))
            if role != "hidden":
                (self._inputs if role == "input" else self._outputs).append(name)
        bundles = []
        for (s, t), (sources, targets, weights) in self._edges.items():
            pattern = Sparse(np.array(sources, np.int32), np.array(targets, np.int32))
            value = torch.tensor(weights, dtype=self._dtype)
            bundles.append(Bundle(self._free(f"{s}_{t}"), s, t, pattern, value))
        return groups, bundles

    # ---- the end ------------------------------------------------------------------------------------------

    def build(self, *, verify: bool = True) -> Network:
        """The network; verified unless `verify=False`."""
        groups, bundles = self._neuron_groups()
        network = Network.build(
            [*self._groups.values(), *groups],
            [*self._bundles.values(), *bundles],
            dict.fromkeys(self._inputs),
            dict.fromkeys(self._outputs),
        )
        return network.verify() if verify else network


def mlp(
    widths: Sequence[int],
    *,
    activation: str = "relu",
    bias: bool = True,
    norm: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A dense network of these widths: `input`, `hidden` (or `hidden1`, `hidden2`, ...), `output` (identity)."""
    if len(widths) < 2 or any(not isinstance(w, (int, np.integer)) or w < 1 for w in widths):
        raise BadShape("mlp: widths", list(widths), "at least two positive integers")
    builder = Builder(seed=seed, dtype=dtype)
    last = builder.input("input", int(widths[0]))
    for n, width in enumerate(widths[1:-1], 1):
        name = "hidden" if len(widths) == 3 else f"hidden{n}"
        builder.group(name, int(width), activation=activation, bias=bias, norm=norm)
        builder.connect(last, name)
        last = name
    builder.output("output", int(widths[-1]), bias=bias)
    builder.connect(last, "output")
    return builder.build()


def cnn(
    image: Sequence[int],
    channels: Sequence[int],
    outputs: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int | str = "same",
    pool: int | None = 2,
    pooling: str = "max",
    activation: str = "relu",
    bias: bool = True,
    norm: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A convolutional network over images `(channels, height, width)`: conv -> activation -> pool, ..., dense.

    Groups: `input`, `conv1`, `pool1`, `conv2`, ..., `output`. `pool=None` leaves pooling out; `pooling` is
    `max` or `mean`.
    """
    if len(image) != 3 or pooling not in ("max", "mean"):
        raise BadShape("cnn", f"image {tuple(image)}, pooling {pooling!r}", "(channels, height, width) and max or mean")
    builder = Builder(seed=seed, dtype=dtype)
    last, shape = builder.input("input", image), tuple(int(n) for n in image)
    pad = kernel // 2 if padding == "same" else int(padding)
    for n, width in enumerate(channels, 1):
        conv = Conv2d((kernel, kernel), (stride, stride), (pad, pad))
        shape = (int(width), *conv.output(shape))
        builder.group(f"conv{n}", shape, activation=activation, bias=bias, norm=norm)
        builder.connect(last, f"conv{n}", conv)
        last = f"conv{n}"
        if pool:
            window = Pool2d((pool, pool), (pool, pool))
            shape = (int(width), *window.output(shape))
            builder.group(f"pool{n}", shape, aggregation="max" if pooling == "max" else "sum")
            builder.connect(last, f"pool{n}", window, 1.0 if pooling == "max" else 1.0 / pool**2, trainable=False)
            last = f"pool{n}"
    builder.output("output", int(outputs), bias=bias)
    builder.connect(last, "output")
    return builder.build()
