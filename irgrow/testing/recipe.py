"""Random networks that use everything a network can have: one recipe, driven by any source of choices.

`random_network(seed)` is for long runs; `strategies.networks()` drives the same recipe with hypothesis, so
that a failing network shrinks. Networks are small (a few dozen neurons), verified, and cover every pattern,
activation, aggregation, normalisation, ties, loops of groups, skips, several inputs and outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.builder import Builder
from irgrow.ir.errors import Unreachable
from irgrow.ir.network import Network, Norm
from irgrow.ir.pattern import Conv2d, Dense, Identity, Local2d, Pair, Pattern, Pool2d, Shape, Sparse, size
from irgrow.kernels.activations import ACTIVATIONS

T = TypeVar("T")
KINDS = ("dense", "sparse", "loop", "residual", "concat", "conv", "local", "pool", "two_loops", "skip")
NORMS = ("batch", "layer", "group")
DTYPES = (torch.float64, torch.float32)


class Choices(Protocol):
    """Where a recipe's decisions come from; the first option is the simplest."""

    def integer(self, low: int, high: int) -> int: ...

    def pick(self, options: Sequence[T]) -> T: ...


class Seeded:
    """Choices from a seed, all options equally likely."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def pick(self, options: Sequence[T]) -> T:
        return self._random.choice(options)


def random_network(seed: int, **options: Any) -> Network:
    """A verified random network; the same seed and options give the same network. See `cook` for the options."""
    return cook(Seeded(seed), **options)


def inputs_for(network: Network, batch: int = 4, *, seed: int = 0, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Standard normal inputs `[batch, *shape]` for a network, in its dtype unless another is given."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [network.groups[name].shape for name in network.inputs]
    wide = [torch.randn(batch, *shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype or network.dtype) for x in wide]


def cook(
    choices: Choices,
    *,
    kinds: Sequence[str] = KINDS,
    activations: Sequence[str] = tuple(ACTIVATIONS),
    norms: Sequence[str] = NORMS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    steps: int = 5,
    widest: int = 5,
    images: bool = True,
    maxima: bool = True,
    ties: bool = True,
    dropout: bool = True,
    frozen: bool = False,
) -> Network:
    """A verified network of 1 to `steps` hidden parts of these kinds, made of decisions of `choices`.

    `widest`: units of a flat group at most. `images=False`: flat groups only. `maxima=False`: no group
    aggregates by max. `ties=False`: no shared weights in sparse bundles. `frozen=True`: some entries of some
    tensors are frozen.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"cook: kinds {unknown}, expected some of {', '.join(KINDS)}")
    recipe = _Recipe(choices, kinds, activations, norms, choices.pick(dtypes), widest, images, maxima, ties, dropout)
    network = recipe.network(choices.integer(1, steps))
    return _frozen(network, choices) if frozen else network


def _frozen(network: Network, choices: Choices) -> Network:
    """The network with frozen entries in about every second tensor."""
    draw = torch.Generator().manual_seed(choices.integer(0, 1000))
    masks = {n: torch.rand(network.tensors()[n].shape, generator=draw) < 0.4 for n in network.trainable()}
    chosen = {name: mask for name, mask in masks.items() if choices.integer(0, 1) and bool(mask.any())}
    return replace(network, frozen=chosen).verify()


class _Recipe:
    """One network in the making: what was built so far and the ways to go on."""

    def __init__(
        self,
        choices: Choices,
        kinds: Sequence[str],
        activations: Sequence[str],
        norms: Sequence[str],
        dtype: torch.dtype,
        widest: int,
        images: bool,
        maxima: bool,
        ties: bool,
        dropout: bool,
    ) -> None:
        self.choices, self.kinds, self.activations, self.norms = choices, kinds, activations, norms
        self.dtype, self.widest, self.images = dtype, widest, images
        self.maxima, self.ties, self.dropout = maxima, ties, dropout
        seed = choices.integer(0, 1000)
        self.builder = Builder(seed=seed, dtype=dtype)
        self.numbers = np.random.default_rng(seed)
        self.shapes: dict[str, Shape] = {}
        self.read: set[str] = set()  # groups that something leaves
        self.parents: dict[str, set[str]] = {}

    def network(self, steps: int) -> Network:
        c = self.choices
        for n in range(c.integer(1, 2)):
            self._input(f"x{n}")
        for n in range(steps):
            kind = c.pick(self.kinds)
            if not getattr(self, f"_{kind}")(f"h{n}"):
                self._dense(f"h{n}")  # always possible
        inner = [name for name in self.shapes if name not in self.read]
        if not inner:
            inner = [list(self.shapes)[-1]]
        for n in range(c.integer(1, 2)):
            self._output(f"y{n}", inner)
        network = self._reachable()
        hidden = [name for name in network.groups if network.is_hidden(name) and network.entering(name)]
        if hidden and c.integer(0, 5) == 5:  # an output that others read
            seen = replace(network, outputs=(*network.outputs, c.pick(hidden)))
            try:
                return seen.verify()
            except Unreachable:
                pass
        return network.verify()

    def _reachable(self) -> Network:
        network = self.builder.build(verify=False)
        try:
            return network.verify()
        except Unreachable:  # neurons without parents may have cut an output off
            for name in network.outputs:
                self._connect(network.inputs[0], name, Dense())
            return self.builder.build()

    # ---- groups -------------------------------------------------------------------------------------------

    def _input(self, name: str) -> None:
        image = self.images and self.choices.integer(0, 2) > 0
        self.shapes[name] = self._image() if image else (self.choices.integer(1, self.widest),)
        self.builder.input(name, self.shapes[name])

    def _image(self) -> Shape:
        c = self.choices
        return c.pick((1, 2, 4)), c.integer(1, 5), c.integer(1, 5)

    def _group(self, name: str, shape: Shape, *, looped: bool = False, output: bool = False, **fixed: Any) -> str:
        c = self.choices
        properties: dict[str, Any] = {
            "activation": c.pick(self.activations),
            "aggregation": "max" if self.maxima and c.integer(0, 4) == 4 else "sum",
            "bias": c.integer(0, 2) > 0,
            "dropout": 0.25 if self.dropout and not looped and c.integer(0, 5) == 5 else 0.0,
        }
        if self.norms and not looped and c.integer(0, 2) == 2:
            properties["norm"] = self._norm(c.pick(self.norms), shape[0])
        properties |= fixed
        make = self.builder.output if output else self.builder.group
        make(name, shape, **properties)
        self.shapes[name] = shape
        return name

    def _norm(self, kind: str, units: int) -> Norm:
        def around(middle: float) -> Tensor:
            return torch.from_numpy(middle + self.numbers.uniform(-0.4, 0.4, units)).to(self.dtype)

        groups = self.choices.pick(_divisors(units)) if kind == "group" else 1
        running = (around(0), around(1)) if kind == "batch" else (None, None)
        return Norm(kind, around(1), around(0), running[0], running[1], groups=groups)

    def _connect(self, source: str, target: str, pattern: Pattern, weight: float | None = None, **how: Any) -> None:
        self.builder.connect(source, target, pattern, weight, **how)
        self.read.add(source)

    def _source(self, where: Callable[[Shape], bool] = lambda shape: True) -> str | None:
        """A group to read from, the latest ones first; None where none is fit."""
        fit = [name for name, shape in reversed(self.shapes.items()) if where(shape)]
        return self.choices.pick(fit) if fit else None

    def _output(self, name: str, inner: list[str]) -> None:
        shape: Shape = (self.choices.integer(1, 3),)
        if self.images and self.choices.integer(0, 3) == 3:
            shape = (self.choices.integer(1, 2), 2, 1)
        sources = list(inner)
        self._group(name, shape, output=True, aggregation="sum")
        for source in sources:
            self._connect(source, name, Dense())

    # ---- parts: each builds a group `name` (and more), or returns False where it is not possible -------------

    def _dense(self, name: str) -> bool:
        source = self._source()
        assert source is not None
        shape: Shape = (self.choices.integer(1, self.widest),)
        if self.images and self.choices.integer(0, 5) == 5:
            shape = self._image()
        self._connect(source, self._group(name, shape), Dense())
        return True

    def _sparse(self, name: str) -> bool:
        source = self._source()
        assert source is not None
        shape: Shape = (self.choices.integer(1, self.widest),)
        if self.images and self.choices.integer(0, 2) == 2:
            shape = self._image()
        old = self.shapes[source]
        self._connect(source, self._group(name, shape), self._edges(_all_pairs(size(old), size(shape))))
        return True

    def _edges(self, pairs: np.ndarray[Any, Any]) -> Sparse:
        """Some of the pairs (source, target), at least one, in any order, with or without ties and tags."""
        c = self.choices
        density = c.pick((0.5, 0.2, 1.0))
        keep = self.numbers.random(len(pairs)) < density
        keep[self.numbers.integers(len(pairs))] = True
        pairs = pairs[keep]
        if c.integer(0, 1):
            pairs = self.numbers.permutation(pairs)
        index = None
        if self.ties and c.integer(0, 2) == 2:
            drawn = self.numbers.integers(max(1, len(pairs) // 2), size=len(pairs))
            index = np.unique(drawn, return_inverse=True)[1].ravel()
        tags = {"primary": self.numbers.integers(0, 2, len(pairs))} if c.integer(0, 2) == 2 else {}
        return Sparse(pairs[:, 0], pairs[:, 1], index, tags=tags)

    def _loop(self, name: str) -> bool:
        """A flat group with edges among its own neurons."""
        source = self._source()
        assert source is not None
        units = self.choices.integer(2, self.widest + 1)
        self._group(name, (units,), looped=True)
        self._connect(source, name, self._some(source, (units,)))
        order = self.numbers.permutation(units)
        s, t = np.triu_indices(units, 1)
        self._connect(name, name, self._edges(np.stack([order[s], order[t]], 1)))
        return True

    def _two_loops(self, name: str) -> bool:
        """Two flat groups that feed each other, without a loop of neurons."""
        source = self._source()
        assert source is not None
        a, b = (self.choices.integer(2, self.widest) for _ in range(2))
        first, second = self._group(name, (a,), looped=True), self._group(f"{name}b", (b,), looped=True)
        self._connect(source, first, self._some(source, (a,)))
        order = self.numbers.permutation(a + b)
        s, t = np.triu_indices(a + b, 1)
        pairs = np.stack([order[s], order[t]], 1)
        for source, target, s_low, t_low in ((first, second, 0, a), (second, first, a, 0)):
            inside = ((pairs[:, 0] < a) == (s_low == 0)) & ((pairs[:, 1] < a) == (t_low == 0))
            if inside.any():
                self._connect(source, target, self._edges(pairs[inside] - [s_low, t_low]))
        return True

    def _some(self, source: str, target: Shape) -> Pattern:
        if self.choices.integer(0, 1):
            return Dense()
        return self._edges(_all_pairs(size(self.shapes[source]), size(target)))

    def _residual(self, name: str) -> bool:
        """A sum of an identity and something else."""
        source = self._source()
        assert source is not None
        shape = self.shapes[source]
        self._group(name, shape)
        pattern = self._same_size(shape)
        if pattern is not None:
            self._connect(source, name, pattern)
        else:
            other = self._source(lambda s: s != shape) or source
            self._connect(other, name, Dense())
        self._identity(source, name, 0)
        return True

    def _same_size(self, shape: Shape) -> Pattern | None:
        if len(shape) != 3 or not self.choices.integer(0, 1):
            return None
        k = self.choices.pick((1, 3))
        return Conv2d((k, k), padding=(k // 2, k // 2), channel_groups=self.choices.pick(_divisors(shape[0])))

    def _identity(self, source: str, target: str, start: int) -> None:
        weight, trainable = self.choices.pick(((1.0, False), (0.5, False), (0.7, True)))
        self._connect(source, target, Identity(start), weight, trainable=trainable)

    def _concat(self, name: str) -> bool:
        """Two groups side by side in one; sometimes with a range that only a dense bundle feeds."""
        first = self._source()
        assert first is not None
        positions = self.shapes[first][1:]
        second = self._source(lambda s: s[1:] == positions)
        assert second is not None
        a, b, more = self.shapes[first][0], self.shapes[second][0], self.choices.pick((0, 0, 2))
        other = self._source()
        assert other is not None
        self._group(name, (a + b + more, *positions))
        self._identity(first, name, 0)
        self._identity(second, name, a + more)
        if more:
            self._connect(other, name, Dense())
        return True

    def _window(self, shape: Shape) -> dict[str, Pair]:
        c = self.choices

        def pair(low: int, high: int) -> Pair:
            return c.integer(low, high), c.integer(low, high)

        return {"kernel": pair(1, 3), "stride": pair(1, 2), "padding": pair(0, 2), "dilation": pair(1, 2)}

    def _conv(self, name: str, kind: type[Conv2d] = Conv2d) -> bool:
        source = self._source(lambda s: len(s) == 3)
        if source is None:
            return False
        shape, c = self.shapes[source], self.choices
        window = self._fitting(shape)
        groups = c.pick(_divisors(shape[0]))
        pattern = kind(**window, channel_groups=groups)
        units = groups * c.integer(1, 2)
        self._connect(source, self._group(name, (units, *pattern.output(shape))), pattern)
        return True

    def _local(self, name: str) -> bool:
        return self._conv(name, Local2d)

    def _pool(self, name: str) -> bool:
        source = self._source(lambda s: len(s) == 3)
        if source is None:
            return False
        shape = self.shapes[source]
        pattern = Pool2d(**self._fitting(shape))
        target = (shape[0], *pattern.output(shape))
        if self.maxima and self.choices.integer(0, 1):
            self._group(name, target, aggregation="max", activation="identity", bias=False, norm=None)
            self._connect(source, name, pattern)
        else:
            self._group(name, target, aggregation="sum")
            trainable = self.choices.integer(0, 3) == 3
            self._connect(source, name, pattern, 1 / size(pattern.kernel), trainable=trainable)
        return True

    def _fitting(self, shape: Shape) -> dict[str, Pair]:
        """A window with at least one output position: a smaller one where the drawn one is too large."""
        drawn = self._window(shape)
        for a in (0, 1):
            if shape[1 + a] + 2 * drawn["padding"][a] < drawn["dilation"][a] * (drawn["kernel"][a] - 1) + 1:
                return {"kernel": (1, 1), "stride": drawn["stride"]}
        return drawn

    def _skip(self, name: str) -> bool:
        """One more bundle into a new group that another one feeds as well."""
        self._dense(name)
        target = self.shapes[name]
        source = self._source(lambda s: s != target)
        if source is not None:
            self._connect(source, name, self._some(source, target))
        return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _all_pairs(sources: int, targets: int) -> np.ndarray[Any, Any]:
    t, s = np.meshgrid(np.arange(targets), np.arange(sources), indexing="ij")
    return np.stack([s.ravel(), t.ravel()], 1)
