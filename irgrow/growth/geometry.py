"""What a new unit of a site is fed by, what it feeds, and how its value travels along the site.

A new unit enters at some groups of its site and leaves at others: conv -> pool -> dense enters at the
convolution and leaves at the pooled group; in a residual stream every sum is both. To first order around
zero weights its value there is linear in its fan-in:

    value at exit e  =  slope * sum_j alpha_j . carry_{j -> e}(b_j),     b_j: features (patches) of entering bundle j

`carry` is the identity, a strided copy (a new channel of a depthwise convolution passes its centre tap on), a
mean over pooling windows, or a sum of several paths. `slope` is the product of sigma'(0), and 1/sqrt(1 + eps)
for a batch norm in eval mode (a new unit has scale 1, shift 0, mean 0, variance 1). In train mode the batch
itself is the norm's sample: a unit at zero has variance 0, so the factor is 1/sqrt(eps), and `carry` takes the
batch's mean out of what passes the norm (which makes E[g b^T] into E[g (b - E b)^T]).

Pooling by max is not linear: it is replaced by the mean over its window, with a note, and no first-order
gain is predicted there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from irgrow.growth.windows import Windows
from irgrow.ir.errors import Refused
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Conv2d, Dense, Identity, Local2d, Pool2d, Shape, Sparse, size
from irgrow.ir.site import Site, ties
from irgrow.ir.statistics import Block


@dataclass(frozen=True, eq=False)
class Entry:
    """An entering bundle: features of `source` that feed new units at `group`. `windows` None: flat."""

    block: Block
    source: str
    group: str
    windows: Windows | None


@dataclass(frozen=True, eq=False)
class Exit:
    """A leaving bundle: from `group` into `target`. `windows` None: dense (an image is flattened)."""

    block: Block
    group: str
    target: str
    windows: Windows | None


@dataclass(frozen=True, eq=False)
class Feeding:
    """A trained bundle that already feeds a target: its weights are what dW* changes."""

    block: Block
    source: str
    windows: Windows | None


@dataclass(frozen=True, eq=False)
class Target:
    """A group that leaving bundles enter. `windows` is set where its positions share weights (convolutions)."""

    name: str
    outputs: int
    shared: bool
    bias: bool
    feeding: tuple[Feeding, ...]

    @property
    def width(self) -> int:
        """The features c, the constant 1 included."""
        return sum(f.block.width for f in self.feeding) + self.bias


@dataclass(frozen=True, eq=False)
class Step:
    """One hop along the site: the value of `source` times `weight`, through `windows` if any, enters `group`."""

    source: str
    group: str
    windows: Windows | None
    weight: float
    depthwise: bool
    maximum: bool

    def __call__(self, x: Tensor) -> Tensor:
        """What `group` gets from the source's value `[B, K, *positions]`."""
        if self.windows is None:
            return _times(x, self.weight)
        if self.depthwise:
            return self.windows.pick(x, self.windows.centre)
        return self.windows.sum(x) * self._scale(x)

    def back(self, g: Tensor, shape: Shape) -> Tensor:
        """The transpose: what the source (positions `shape`) gets back from `g [B, K, *positions]`."""
        if self.windows is None:
            return _times(g, self.weight)
        image = shape[0], shape[1]
        if self.depthwise:
            return self.windows.spread(g, image, self.windows.centre)
        return self.windows.share(g * self._scale(g.new_empty(1, 1, *shape)), image)

    def _scale(self, x: Tensor) -> Tensor | float:
        """What a sum over windows of x is multiplied by: for a maximum, one over the number of pixels."""
        assert self.windows is not None
        return self.weight / self.windows.sum(torch.ones_like(x[:1, :1])) if self.maximum else self.weight


@dataclass(frozen=True, eq=False)
class Geometry:
    """A site as the statistics see it. Raises Refused where new units are not of the form above."""

    network: Network
    site: Site
    taps: str = "full"
    training: bool = False  # batch norms take their statistics from the batch

    @property
    def who(self) -> str:
        return f"statistics of site {self.site.name!r}"

    @property
    def flat(self) -> bool:
        return all(len(self.network.groups[name].shape) == 1 for name in self.site.groups)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        found = []
        for name in self.site.entering:
            bundle = self.network.bundles[name]
            source, target = self.network.shapes(bundle)
            if len(target) == 1 and isinstance(bundle.pattern, (Dense, Sparse)):
                block, windows = Block(bundle.tensor, (size(source),)), None
            elif _plain_conv(bundle):
                assert isinstance(bundle.pattern, Conv2d)
                windows = Windows.of(bundle.pattern)
                block = Block(bundle.tensor, (source[0], *windows.kernel))
            else:
                raise self._unfit(bundle, "enters")
            found.append(Entry(block, bundle.source, bundle.target, windows))
        return tuple(found)

    @cached_property
    def exits(self) -> tuple[Exit, ...]:
        found = []
        for name in self.site.leaving:
            bundle = self.network.bundles[name]
            source, target = self.network.shapes(bundle)
            if self.network.groups[bundle.target].aggregation == "max":
                raise Refused(
                    self.who, f"bundle {name!r} enters {bundle.target!r}, which aggregates by max", "a sum there"
                )
            if isinstance(bundle.pattern, (Dense, Sparse)):
                shape = (size(target),) if len(source) == 1 else (size(target), size(source[1:]))
                block, windows = Block(bundle.tensor, shape, bundle.target), None
            elif _plain_conv(bundle):
                assert isinstance(bundle.pattern, Conv2d)
                windows = Windows.of(bundle.pattern)
                tap = windows.centre if self.taps == "centre" and windows.taps > 1 else None
                block = Block(bundle.tensor, (target[0], *windows.kernel), bundle.target, tap)
            else:
                raise self._unfit(bundle, "leaves")
            found.append(Exit(block, bundle.source, bundle.target, windows))
        kinds: dict[str, bool] = {}
        for way in found:
            if kinds.setdefault(way.target, way.windows is not None) != (way.windows is not None):
                raise Refused(
                    self.who, f"dense and convolutional bundles into {way.target!r}", "one kind into each target"
                )
        return tuple(found)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """The targets in the order in which leaving bundles name them."""
        found: dict[str, Target] = {}
        for way in self.exits:
            if way.target in found:
                continue
            group = self.network.groups[way.target]
            shared = way.windows is not None
            feeding = []
            for bundle in self.network.entering(way.target):
                part = _feeding(self.network, bundle, shared) if bundle.trainable else None
                if part is not None:
                    feeding.append(part)
            bias = group.bias is not None and (shared or group.positions == 1)
            outputs = group.units if shared else group.neurons
            found[way.target] = Target(way.target, outputs, shared, bias, tuple(feeding))
        return tuple(found.values())

    @cached_property
    def feeding(self) -> tuple[Block, ...]:
        """The blocks of c, target by target, each target's constant 1 last."""
        found = []
        for target in self.targets:
            found += [f.block for f in target.feeding]
            if target.bias:
                found.append(Block(f"bias.{target.name}", (), target.name))
        return tuple(found)

    @cached_property
    def biased(self) -> tuple[str, ...]:
        """The entry groups with a bias; a new unit's bias is the same in all of them."""
        names = dict.fromkeys(e.group for e in self.entries)
        return tuple(n for n in names if self.network.groups[n].bias is not None)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The hops along the site, in topological order."""
        inside = dict.fromkeys(self.site.groups)
        order = {name: i for i, (names, _) in enumerate(self.network.components) for name in names}
        found = []
        for bundle in self.network.bundles.values():
            if not ties(bundle, inside):
                continue
            pattern, (source, target) = bundle.pattern, self.network.shapes(bundle)
            maximum = self.network.groups[bundle.target].aggregation == "max"
            windows, weight, depthwise = None, 1.0, False
            if isinstance(pattern, (Identity, Pool2d)):
                weight = float(bundle.weight)
                windows = Windows.of(pattern) if isinstance(pattern, Pool2d) else None
            elif isinstance(pattern, Conv2d) and not isinstance(pattern, Local2d) and target[0] == source[0]:
                windows, depthwise = Windows.of(pattern), True
            else:
                raise self._unfit(bundle, "runs along")
            if maximum and not isinstance(pattern, Pool2d):
                raise Refused(self.who, f"group {bundle.target!r} takes the maximum of its parents", "a sum there")
            found.append(Step(bundle.source, bundle.target, windows, weight, depthwise, maximum))
        return tuple(sorted(found, key=lambda s: order[s.group]))

    @cached_property
    def slopes(self) -> dict[str, float]:
        """Per group of the site sigma'(0), times a batch norm's factor; Refused for other norms."""
        found = {}
        for name in self.site.groups:
            group = self.network.groups[name]
            found[name] = group.function.slope
            if group.norm is not None:
                if group.norm.across_units:
                    raise Refused(
                        self.who,
                        f"group {name!r} has a {group.norm.kind} norm, where a new unit changes the old ones",
                        "no norm across units, or a batch norm",
                    )
                found[name] /= math.sqrt(group.norm.eps if self.training else 1.0 + group.norm.eps)
        return found

    @cached_property
    def slope(self) -> float:
        """The product of slopes from the first entry to the first exit it reaches: what b leaves out."""
        factors = {self.entries[0].group: self.slopes[self.entries[0].group]}
        for step in self.steps:
            if step.source in factors:
                factors.setdefault(step.group, factors[step.source] * self.slopes[step.group])
        return next((factors[way.group] for way in self.exits if way.group in factors), 1.0)

    @cached_property
    def at_zero(self) -> float:
        """The largest |sigma(0)| along the site."""
        return max(abs(self.network.groups[name].function.at_zero) for name in self.site.groups)

    @property
    def smooth(self) -> bool:
        groups = [self.network.groups[name] for name in self.site.groups]
        return all(g.function.smooth and g.aggregation == "sum" for g in groups)

    @property
    def activation(self) -> str:
        """The activations along the site, `identity` left out unless it is alone."""
        names = dict.fromkeys(self.network.groups[name].activation for name in self.site.groups)
        return " then ".join(n for n in names if n != "identity") or "identity"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        found = []
        pooled = [s.group for s in self.steps if s.maximum]
        if pooled:
            found.append(f"pooling by max into {', '.join(pooled)} taken as the mean over its window")
        for target in self.targets:
            held = {f.block.name for f in target.feeding}
            left = [
                b.name
                for b in self.network.entering(target.name)
                if b.trainable and b.weight.dim() and b.tensor not in held
            ]
            if left:
                found.append(f"dW* leaves {', '.join(left)} as they are")
        if len(self.places) > 1:
            found.append("S is the mean over the places where the site is left")
        elif any(e.block.taps > 1 for e in self.exits):
            found.append("S holds for every tap alike (full form); the bottleneck is not whitened across taps")
        return tuple(found)

    @cached_property
    def places(self) -> tuple[tuple[str, Windows | None], ...]:
        """Where S is taken: (exit group, the convolution whose centre tap picks positions, or None for all)."""
        seen: dict[object, tuple[str, Windows | None]] = {}
        for way in self.exits:
            windows = way.windows if way.block.tap is not None else None
            key = (self._signature(way.group), windows) if self.flat else (way.group, windows)
            seen.setdefault(key, (way.group, windows))
        return tuple(seen.values())

    def _signature(self, exit: str) -> tuple[float, ...]:
        """Of a flat site: how much of every entry's features reaches this exit."""
        one = torch.ones(1, 1, dtype=torch.float64)
        alike = replace(self, training=False)  # where a batch of one sample is not centred to nothing
        reached = (alike.carry(e.group, one).get(exit) for e in self.entries)
        return tuple(0.0 if value is None else float(value) for value in reached)

    def carry(self, entry: str, features: Tensor) -> dict[str, Tensor]:
        """What features `[B, F, *positions]` at an entry group become at every group they reach, over `slope`."""
        factor = {name: slope or 1.0 for name, slope in self.slopes.items()}  # at slope 0 the features stay
        values = {entry: _times(self._centred(entry, features), factor[entry])}
        for step in self.steps:
            if step.source in values:
                through = _times(self._centred(step.group, step(values[step.source])), factor[step.group])
                held = values.get(step.group)
                values[step.group] = through if held is None else held + through
        return {name: _times(value, 1.0 / (self.slope or 1.0)) for name, value in values.items()}

    def carry_back(self, exit: str, g: Tensor) -> dict[str, Tensor]:
        """The transpose of `carry`: `g [B, K, *positions]` at an exit -> at every entry group that reaches it."""
        factor = {name: slope or 1.0 for name, slope in self.slopes.items()}
        found = {exit: _times(self._centred(exit, g), factor[exit] / (self.slope or 1.0))}
        for step in reversed(self.steps):
            if step.group in found:
                shape = self.network.groups[step.source].shape[1:]
                back = _times(self._centred(step.source, step.back(found[step.group], shape)), factor[step.source])
                held = found.get(step.source)
                found[step.source] = back if held is None else held + back
        return {e.group: found[e.group] for e in self.entries if e.group in found}

    @cached_property
    def centres(self) -> bool:
        """Whether features lose the mean of their batch on the way: samples are no longer seen one by one."""
        return self.training and any(self.network.groups[name].norm is not None for name in self.site.groups)

    def _centred(self, name: str, x: Tensor) -> Tensor:
        """x without its mean over batch and positions, where a batch norm in train mode takes it out."""
        if not self.training or self.network.groups[name].norm is None:
            return x
        return x - x.mean([0, *range(2, x.dim())], keepdim=True)

    def _unfit(self, bundle: Bundle, how: str) -> Refused:
        return Refused(
            self.who,
            f"bundle {bundle.name!r} ({bundle.pattern}), which {how} it",
            "dense bundles, or convolutions without channel groups between images",
            do="grow another site",
        )


def _plain_conv(bundle: Bundle) -> bool:
    pattern = bundle.pattern
    return isinstance(pattern, Conv2d) and not isinstance(pattern, Local2d) and pattern.channel_groups == 1


def _feeding(network: Network, bundle: Bundle, shared: bool) -> Feeding | None:
    """The bundle as features of its target, or None where dW* leaves it alone."""
    source, _ = network.shapes(bundle)
    if shared and _plain_conv(bundle):
        assert isinstance(bundle.pattern, Conv2d)
        windows = Windows.of(bundle.pattern)
        return Feeding(Block(bundle.tensor, (source[0], *windows.kernel), bundle.target), bundle.source, windows)
    if not shared and isinstance(bundle.pattern, Dense):
        return Feeding(Block(bundle.tensor, (size(source),), bundle.target), bundle.source, None)
    return None


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x * factor
