"""`Lineage`: where every tensor of the next network comes from.

    new = sum_k value_k * old_k[index_k] + fresh

Each gather also says how the new entry's gradient relates to the old one's (`gradient`; NaN = undefined):
optimizer state follows it. `fresh = after - gather(before)` is not stored: it is what a pass wrote.

Forms of a gather: `Axes` (one index and factors per axis), `Flat` (explicit, for sparse), `Through` (the
weights of one pattern spread over the edges of another; computed, nothing stored). Lineages compose.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from irgrow.ir.errors import StaleMorphism
from irgrow.ir.pattern import Dense, Edges, Pattern, Shape


@dataclass(frozen=True, eq=False)
class Gather(ABC):
    """Entries of one old tensor (`source`, of `old_shape`) placed into a new one (of `shape`)."""

    source: str
    old_shape: Shape
    shape: Shape

    @abstractmethod
    def take(self, old: Tensor) -> Tensor:
        """value * old[index], 0 where there is no old entry; differentiable."""

    @abstractmethod
    def factor(self) -> Tensor | None:
        """The gradient factor of every entry as `shape` (NaN: undefined or no old entry); None: 1 everywhere."""

    def known(self) -> Tensor | None:
        """Mask of the entries whose gradient factor is defined; None: all of them."""
        factor = self.factor()
        return None if factor is None else ~factor.isnan()

    @property
    def scales(self) -> bool:
        """Whether some defined gradient factor is not 1."""
        return True

    @property
    def undefined(self) -> bool:
        """Whether some entry has an old one but no gradient factor."""
        known = self.known()
        return known is not None and bool((self.covers() & ~known).any())

    @abstractmethod
    def flat(self) -> Flat:
        """The same gather with one explicit index per entry."""

    @property
    def exact(self) -> bool:
        """Whether this is the old tensor unchanged."""
        return False

    def pick(self, old: Tensor) -> Tensor:
        """old[index] without the value factor, 0 where there is no old entry (for optimizer state)."""
        return self.flat().pick(old)

    def covers(self) -> Tensor:
        """Mask of the new entries that have an old one."""
        return self.flat().index.reshape(self.shape) >= 0

    def then(self, later: Gather) -> Gather:
        """First this gather, then `later` on its result."""
        if later.exact:
            return self
        if self.exact:  # the same object where possible: it may know already whether it only appends
            return later if later.source == self.source else replace(later, source=self.source)
        return self.flat().then(later.flat())


@dataclass(frozen=True, eq=False)
class Axes(Gather):
    """new[i, j, ...] = value_0[i] value_1[j] ... * old[index_0[i], index_1[j], ...].

    An index of None is the whole axis, -1 in an index means no old entry; a factor of None is 1.
    """

    index: tuple[Tensor | None, ...] = ()
    value: tuple[Tensor | None, ...] = ()
    gradient: tuple[Tensor | None, ...] = ()

    @staticmethod
    def same(name: str, tensor: Tensor) -> Axes:
        """The old tensor, unchanged."""
        shape = tuple(tensor.shape)
        none = (None,) * len(shape)
        return Axes(name, shape, shape, none, none, none)

    @staticmethod
    def appended(name: str, count: int, index: Tensor) -> Axes:
        """A vector whose `count` old entries stay in front: `index` is 0..count-1, then -1."""
        made = Axes(name, (count,), tuple(index.shape), (index,), (None,), (None,))
        made.__dict__["appends"] = True  # known without looking
        return made

    @property
    def exact(self) -> bool:
        return all(i is None for i in self.index) and all(v is None for v in (*self.value, *self.gradient))

    @cached_property
    def appends(self) -> bool:
        """Whether old entries stay where they are, unscaled, and new ones stand behind them (the usual growth)."""
        if any(v is not None for v in (*self.value, *self.gradient)):
            return False
        return all(
            index is None or _is_prefix(index.numpy(), old)
            for index, old in zip(self.index, self.old_shape, strict=True)
        )

    def take(self, old: Tensor) -> Tensor:
        return self._gather(old, self.value)

    def pick(self, old: Tensor) -> Tensor:
        return self._gather(old, (None,) * len(self.index))

    def padded(self, old: Tensor, fill: float = 0.0) -> Tensor:
        """The old tensor with `fill` in the new entries (only if `appends`)."""
        widths = [w for new, was in zip(self.shape[::-1], self.old_shape[::-1], strict=True) for w in (0, new - was)]
        return F.pad(old, widths, value=fill)

    def _gather(self, old: Tensor, value: tuple[Tensor | None, ...]) -> Tensor:
        if self.appends:
            return old if self.shape == self.old_shape else self.padded(old)
        for axis, (index, factor) in enumerate(zip(self.index, value, strict=True)):
            scale = factor
            if index is not None:
                index = index.to(old.device)
                new = index < 0
                if bool(new.any()):
                    scale = (~new).double() if scale is None else scale.to(old.device).masked_fill(new, 0.0)
                    index = index.clamp(min=0)
                old = old.index_select(axis, index) if old.shape[axis] else old.new_zeros(self.shape)
            if scale is not None:
                old = old * _along(scale.to(old), axis, old.dim())
        return old

    @property
    def scales(self) -> bool:
        return any(g is not None for g in self.gradient)

    @property
    def undefined(self) -> bool:
        return any(g is not None and bool(g.isnan().any()) for g in self.gradient)

    def factor(self) -> Tensor | None:
        out: Tensor | None = None
        for axis, (index, gradient) in enumerate(zip(self.index, self.gradient, strict=True)):
            f = gradient
            if index is not None and bool((index < 0).any()):
                f = (torch.ones_like(index, dtype=torch.float64) if f is None else f).masked_fill(index < 0, torch.nan)
            if f is not None:
                f = _along(f.double(), axis, len(self.shape))
                out = f if out is None else out * f
        return None if out is None else out.expand(self.shape)

    def flat(self) -> Flat:
        index = torch.zeros((), dtype=torch.long)
        missing = torch.zeros((), dtype=torch.bool)
        value: Tensor | None = None
        for axis, (old_size, new_size) in enumerate(zip(self.old_shape, self.shape, strict=True)):
            given, factor_here = self.index[axis], self.value[axis]
            here = _along(torch.arange(new_size) if given is None else given, axis, len(self.shape))
            missing = missing | (here < 0)
            index = index * old_size + here.clamp(min=0)
            if factor_here is not None:
                v = _along(factor_here, axis, len(self.shape))
                value = v if value is None else value * v
        index = torch.where(missing, -1, index).expand(self.shape).reshape(-1)
        factor = self.factor()
        return Flat(
            self.source,
            self.old_shape,
            self.shape,
            index,
            None if value is None else value.expand(self.shape).reshape(-1),
            None if factor is None else factor.reshape(-1),
        )

    def then(self, later: Gather) -> Gather:
        if later.exact or self.exact or not isinstance(later, Axes) or len(later.index) != len(self.index):
            return super().then(later)
        index: list[Tensor | None] = []
        value: list[Tensor | None] = []
        gradient: list[Tensor | None] = []
        for a in range(len(self.index)):
            i, j = self.index[a], later.index[a]
            index.append(i if j is None else j if i is None else torch.where(j < 0, -1, i[j.clamp(min=0)]))
            for ours, theirs, out in (
                (self.value[a], later.value[a], value),
                (self.gradient[a], later.gradient[a], gradient),
            ):
                f = ours if ours is None or j is None else ours[j.clamp(min=0)]
                out.append(f if theirs is None else theirs if f is None else f * theirs)
        return Axes(self.source, self.old_shape, later.shape, tuple(index), tuple(value), tuple(gradient))


@dataclass(frozen=True, eq=False)
class Flat(Gather):
    """new.flat[e] = value[e] * old.flat[index[e]]; index -1: no old entry; value or gradient None: 1 everywhere."""

    index: Tensor
    value: Tensor | None = None
    gradient: Tensor | None = None

    def take(self, old: Tensor) -> Tensor:
        return self._gather(old, self.value)

    def pick(self, old: Tensor) -> Tensor:
        return self._gather(old, None)

    @cached_property
    def _missing(self) -> Tensor | None:
        """Where there is no old entry; None: nowhere."""
        missing = self.index < 0
        return missing if bool(missing.any()) else None

    @cached_property
    def _safe(self) -> Tensor:
        return self.index if self._missing is None else self.index.clamp(min=0)

    def _gather(self, old: Tensor, value: Tensor | None) -> Tensor:
        flat = old.reshape(-1)
        if flat.numel() == 0:
            return old.new_zeros(self.shape)
        out = flat.index_select(0, self._safe.to(old.device))
        if value is not None:
            out = out * value.to(out)
        if self._missing is not None:
            out = out.masked_fill(self._missing.to(old.device), 0.0)
        return out.reshape(self.shape)

    @property
    def scales(self) -> bool:
        return self.gradient is not None

    @property
    def undefined(self) -> bool:
        return self.gradient is not None and bool((self.gradient.isnan() & (self.index >= 0)).any())

    def factor(self) -> Tensor | None:
        if self.gradient is None and self._missing is None:
            return None
        f = torch.ones(self.index.shape, dtype=torch.float64) if self.gradient is None else self.gradient.double()
        if self._missing is not None:
            f = f.masked_fill(self._missing, torch.nan)
        return f.reshape(self.shape)

    def known(self) -> Tensor | None:
        if self.gradient is not None:
            return super().known()
        return None if self._missing is None else ~self._missing.reshape(self.shape)

    def flat(self) -> Flat:
        return self

    def then(self, later: Gather) -> Gather:
        if later.exact:
            return self
        if isinstance(later, Axes) and len(later.shape) == 1 and later.appends:
            more = later.shape[0] - self.index.numel()
            ends = (F.pad(f, (0, more), value=1.0) if f is not None else None for f in (self.value, self.gradient))
            return Flat(self.source, self.old_shape, later.shape, F.pad(self.index, (0, more), value=-1), *ends)
        other = later.flat()
        at = other.index.clamp(min=0)
        lost = other.index < 0

        def both(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            f = None if ours is None else ours[at]
            return f if theirs is None else theirs if f is None else f * theirs

        index = torch.where(lost, -1, self.index[at]) if self.index.numel() else other.index.new_full(lost.shape, -1)
        value, gradient = both(self.value, other.value), both(self.gradient, other.gradient)
        return Flat(self.source, self.old_shape, other.shape, index, value, gradient)


@dataclass(frozen=True, eq=False)
class Through(Gather):
    """The weights of `old_pattern` at the same edges of `pattern`: what embedding a convolution means.

    Every new entry with an edge takes the old weight of that edge; entries without stay 0. The edges are
    matched when needed, chunk by chunk, so a CNN -> FCN embedding stores two patterns and two shapes.
    The gradient factor is 1 for a weight of one edge. Untying a shared weight has no exact factor: its
    entries get 1 / number of ties with `share`, else none (ALGORITHMS, section 7).
    """

    old_pattern: Pattern
    pattern: Pattern
    between: tuple[Shape, Shape]  # shapes of source and target before
    after: tuple[Shape, Shape]  # shapes of source and target after; the same neurons in the same order
    share: bool = False

    def take(self, old: Tensor) -> Tensor:
        out = old.new_zeros(math.prod(self.shape))
        flat = old.reshape(-1)
        for new, before in self._matches():
            out.index_copy_(0, new.to(old.device), flat[before.to(old.device)])
        return out.reshape(self.shape)

    def pick(self, old: Tensor) -> Tensor:
        return self.take(old)

    def covers(self) -> Tensor:
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool)
        for new, _ in self._matches():
            mask[new] = True
        return mask.reshape(self.shape)

    def factor(self) -> Tensor | None:
        ties = torch.zeros(math.prod(self.old_shape), dtype=torch.float64)
        for _, before in self._matches():
            ties += torch.bincount(before, minlength=ties.numel())
        factor = 1.0 / ties if self.share else torch.where(ties == 1, ties, torch.nan)
        out = torch.full((math.prod(self.shape),), torch.nan, dtype=torch.float64)
        for new, before in self._matches():
            out[new] = factor[before]
        return out.reshape(self.shape)

    def flat(self) -> Flat:
        index = torch.full((math.prod(self.shape),), -1, dtype=torch.long)
        for new, before in self._matches():
            index[new] = before
        factor = self.factor()
        assert factor is not None
        return Flat(self.source, self.old_shape, self.shape, index, None, factor.reshape(-1))

    def _matches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (new weight index, old weight index), chunk by chunk."""
        old = self.old_pattern.edges(*self.between)
        if isinstance(self.pattern, Dense):
            columns = math.prod(self.after[0])
            for s, t, w in old:
                yield torch.from_numpy(t.astype(np.int64) * columns + s), torch.from_numpy(w.astype(np.int64))
            return
        for (s, t, w), (s2, t2, w2) in _in_step(old, self.pattern.edges(*self.after)):
            if not (np.array_equal(s, s2) and np.array_equal(t, t2)):
                raise StaleMorphism("Through", "patterns whose edges do not match")
            yield torch.from_numpy(w2.astype(np.int64)), torch.from_numpy(w.astype(np.int64))


def _in_step(ours: Iterator[Edges], theirs: Iterator[Edges]) -> Iterator[tuple[Edges, Edges]]:
    """The edges of both in pieces of equal length, however each is cut into chunks."""
    none = np.empty(0, np.int64)
    a: Edges = (none, none, none)
    b = a
    while True:
        if a[0].size == 0:
            a = next(ours, a)
        if b[0].size == 0:
            b = next(theirs, b)
        both = min(a[0].size, b[0].size)
        if both == 0:
            if a[0].size != b[0].size:
                raise StaleMorphism("Through", "patterns with different numbers of edges")
            return
        yield (a[0][:both], a[1][:both], a[2][:both]), (b[0][:both], b[1][:both], b[2][:both])
        a, b = (a[0][both:], a[1][both:], a[2][both:]), (b[0][both:], b[1][both:], b[2][both:])


@dataclass(frozen=True, eq=False)
class Lineage:
    """For every tensor of the new network its gathers; a tensor without gathers is all fresh."""

    gathers: Mapping[str, tuple[Gather, ...]]

    def gather(self, old: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
        """sum_k value_k * old_k[index_k] for one new tensor, shaped and typed like `like`."""
        parts = [g.take(old[g.source]) for g in self.gathers.get(name, ())]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(like)

    def unchanged(self, name: str) -> bool:
        """Whether the tensor is the old one of the same name, gathered as it is."""
        g = self.gathers.get(name, ())
        return len(g) == 1 and g[0].exact and g[0].source == name

    def carry(
        self, states: Sequence[Mapping[str, Tensor]], name: str, powers: Sequence[int]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Optimizer state of one new tensor: per kind of state, factor**power * state[index]; 0 where it starts fresh.

        The first gather with a defined factor decides (a merged entry keeps the state of its first part).
        A power is 1 for first moments, 2 for second moments (ALGORITHMS, section 7). Also returns the mask
        of the entries that carry state (None: all).
        """
        out: list[Tensor] = []
        done: Tensor | None = None
        gathers = [g for g in self.gathers.get(name, ()) if all(g.source in table for table in states)]
        for g in gathers:
            known, scales = g.known(), g.scales
            factor = None
            if scales and (f := g.factor()) is not None:
                factor = f.nan_to_num(0.0)
            picked = []
            for table, power in zip(states, powers, strict=True):
                value = g.pick(table[g.source])
                picked.append(value if factor is None else value * factor.to(value) ** power)
            if not out:
                out, done = picked, known
                if known is not None and scales:
                    out = [p.masked_fill(~known.to(p.device), 0.0) for p in out]
                continue
            if done is None:
                break
            use = ~done if known is None else known & ~done
            out = [torch.where(use.to(o.device), p, o) for p, o in zip(picked, out, strict=True)]
            done = None if known is None else done | known
        return out, done

    def then(self, later: Lineage) -> Lineage:
        """First this lineage, then `later`."""
        composed: dict[str, tuple[Gather, ...]] = {}
        for name, gathers in later.gathers.items():
            composed[name] = tuple(
                first.then(second) for second in gathers for first in self.gathers.get(second.source, ())
            )
        return Lineage(composed)


def _is_prefix(index: NDArray[np.int64], old: int) -> bool:
    return index.size >= old and bool((index[old:] < 0).all()) and bool((index[:old] == np.arange(old)).all())


def _along(vector: Tensor, axis: int, dims: int) -> Tensor:
    return vector.reshape([-1 if a == axis else 1 for a in range(dims)])
