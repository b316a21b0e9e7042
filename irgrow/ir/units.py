"""Which units become which: `UnitMap`, and its closure over the groups that must change together.

A group's units change by a list: entry i of `index` is the old unit that new unit i copies (-1: none).
`share` is the factor on everything that leaves a new unit, so the shares of the copies of one unit sum
to 1 when a function is to be kept.

Identity, Pool2d and depthwise bundles tie units of two groups together; `close` carries a map along them,
through residual sums and concatenations, until every tied group has one. Grouped convolutions and
GroupNorm need every channel group to change equally.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm

import numpy as np
from numpy.typing import NDArray

from irgrow.ir.errors import Refused
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Conv2d, Identity, Pool2d, Shape


@dataclass(frozen=True, eq=False)
class UnitMap:
    """`index[i]`: the old unit that new unit i copies, or -1; `share[i]`: the factor on what leaves it (None: 1)."""

    index: NDArray[np.int64]
    share: NDArray[np.float64] | None = None

    @property
    def units(self) -> int:
        return self.index.size

    @property
    def fresh(self) -> NDArray[np.int64]:
        """The new units that copy none."""
        return np.flatnonzero(self.index < 0)

    def serials(self, old: NDArray[np.int64], following: int, positions: int) -> tuple[NDArray[np.int64], int]:
        """Serials of the new units: the first copy of a unit keeps its serial, the others get new ones."""
        first = np.zeros(self.units, bool)
        kept, at = np.unique(self.index, return_index=True)
        first[at[kept >= 0]] = True
        serials = np.empty(self.units, np.int64)
        serials[first] = old[self.index[first]]
        new = np.flatnonzero(~first)
        serials[new] = following + positions * np.arange(new.size)
        return serials, following + positions * new.size

    def neurons(self, positions: int) -> UnitMap:
        """The same map between neurons of groups with that many positions."""
        if positions == 1:
            return self
        index = self.index[:, None] * positions + np.arange(positions)
        index[self.index < 0] = -1
        share = None if self.share is None else np.repeat(self.share, positions)
        return UnitMap(index.ravel(), share)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnitMap):
            return NotImplemented
        same = np.array_equal(self.index, other.index)
        ours, theirs = (np.ones(m.units) if m.share is None else m.share for m in (self, other))
        return same and np.array_equal(ours, theirs)

    __hash__ = None  # type: ignore[assignment]


def blocks(network: Network, groups: Mapping[str, object]) -> int:
    """How many equal ranges the units of these groups must keep (grouped convolutions, GroupNorm)."""
    number = 1
    for name in groups:
        norm = network.groups[name].norm
        if norm is not None and norm.kind == "group":
            number = lcm(number, norm.groups)
        for bundle in network.entering(name) + network.leaving(name):
            pattern = bundle.pattern
            if isinstance(pattern, Conv2d) and not pattern.depthwise(network.groups[bundle.source].shape):
                number = lcm(number, pattern.channel_groups)
    return number


def parts_of(network: Network, group: str) -> int:
    """How many equal ranges the units of a group, and of those tied to it, must keep."""
    units = network.group(group).units
    return blocks(network, close(network, {group: UnitMap(np.r_[np.arange(units), -1])}, checked=False))


def with_new_units(network: Network, group: str, count: int) -> UnitMap:
    """The map that adds `count` units to a group: at the end, or at the end of each range where there are several."""
    units = network.group(group).units
    parts = parts_of(network, group)
    if units % parts or count % parts:
        raise Refused(
            f"adding units to group {group!r}",
            f"{count} new units",
            f"a multiple of {parts}, since a grouped convolution or GroupNorm there grows every channel group equally",
        )
    old = np.arange(units).reshape(parts, -1)
    return UnitMap(np.hstack([old, np.full((parts, count // parts), -1)]).ravel())


def close(network: Network, seed: Mapping[str, UnitMap], checked: bool = True) -> dict[str, UnitMap]:
    """The seed's maps and those of every group tied to them; raises Refused where they contradict.

    `checked=False` only explores which groups are tied (inputs and outputs included).
    """
    maps = dict(seed)
    queue = list(seed)
    while queue:
        name = queue.pop()
        if checked and not network.is_hidden(name):
            role = "input" if name in network.inputs else "output"
            raise Refused(
                f"changing the units of {', '.join(map(repr, seed))}",
                f"group {name!r} would change with it, and is an {role}",
                f"a group that is not tied to an {role}",
            )
        for bundle in network.leaving(name) + network.entering(name):
            forward = bundle.source == name
            other = bundle.target if forward else bundle.source
            implied = _forward(network, bundle, maps) if forward else _backward(network, bundle, maps)
            if implied is None:
                continue
            if other not in maps:
                maps[other] = implied
                queue.append(other)
            elif forward and not _agrees(network, bundle, maps):
                raise Refused(
                    f"changing the units of {', '.join(map(repr, seed))}",
                    f"groups {name!r} and {other!r} are tied by bundle {bundle.name!r} and would change differently",
                    "one change that fits both",
                )
    return maps


def fits(network: Network, seed: Mapping[str, UnitMap]) -> dict[str, UnitMap]:
    """The maps of all groups that change with the seed's; raises Refused where `Edit.rewire` would."""
    maps = close(network, seed)
    for bundle in network.bundles.values():
        pattern, smap, tmap = bundle.pattern, maps.get(bundle.source), maps.get(bundle.target)
        if isinstance(pattern, Conv2d) and pattern.channel_groups > 1 and (smap is not None or tmap is not None):
            grouped_channels(pattern, bundle.name, *network.shapes(bundle), smap, tmap)
    return maps


def grouped_channels(
    pattern: Conv2d, name: str, source: Shape, target: Shape, smap: UnitMap | None, tmap: UnitMap | None
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """How the units of a grouped convolution's ends change its kernels.

    Returns the new number of channel groups, for every kernel `[out, in / groups]` of the new weight the
    number of the old kernel it copies (-1: none), and the new input unit it reads. Raises Refused where
    channel groups change unequally.
    """
    smap = smap or UnitMap(np.arange(source[0]))
    tmap = tmap or UnitMap(np.arange(target[0]))
    groups = smap.units if pattern.depthwise(source) else pattern.channel_groups
    inputs, outputs = source[0] // pattern.channel_groups, target[0] // pattern.channel_groups
    if smap.units % groups or tmap.units % groups:
        raise Refused(
            f"bundle {name!r}",
            f"{smap.units} input and {tmap.units} output channels",
            f"multiples of its {groups} channel groups",
        )
    into, outof = smap.units // groups, tmap.units // groups
    new = np.arange(tmap.units)
    reads = (new // outof * into)[:, None] + np.arange(into)
    o, c = tmap.index[new][:, None], smap.index[reads]
    known = (o >= 0) & (c >= 0)
    if np.any(known & (o // outputs != c // inputs)):
        raise Refused(f"bundle {name!r}", "units that would change their channel group", "every group to grow equally")
    return groups, np.where(known, o * inputs + c - o // outputs * inputs, -1), reads


def _forward(network: Network, bundle: Bundle, maps: Mapping[str, UnitMap]) -> UnitMap | None:
    """What the source's map implies for the target's units; None if the bundle does not tie them."""
    pattern, mine = bundle.pattern, maps[bundle.source]
    source, target = network.shapes(bundle)
    if isinstance(pattern, Pool2d):
        return mine
    if isinstance(pattern, Identity):
        before, after = np.arange(pattern.start), np.arange(pattern.start + source[0], target[0])
        moved = np.where(mine.index < 0, -1, mine.index + pattern.start)
        share = None
        if mine.share is not None:
            share = np.concatenate([np.ones(before.size), mine.share, np.ones(after.size)])
        return UnitMap(np.concatenate([before, moved, after]), share)
    if isinstance(pattern, Conv2d) and pattern.depthwise(source):
        times = target[0] // source[0]
        return mine.neurons(times)
    return None


def _backward(network: Network, bundle: Bundle, maps: Mapping[str, UnitMap]) -> UnitMap | None:
    """What the target's map implies for the source's units; None if the bundle does not tie them."""
    pattern, theirs = bundle.pattern, maps[bundle.target]
    source, target = network.shapes(bundle)
    if isinstance(pattern, Pool2d):
        return theirs
    if isinstance(pattern, Identity):
        part = _range(theirs, pattern.start, pattern.start + source[0])
        index = np.where(theirs.index[part] < 0, -1, theirs.index[part] - pattern.start)
        mine = UnitMap(index, None if theirs.share is None else theirs.share[part])
        plain = mine == UnitMap(np.arange(source[0]))
        return None if plain else mine
    if isinstance(pattern, Conv2d) and pattern.depthwise(source):
        times = target[0] // source[0]
        index = theirs.index[::times]
        mine = UnitMap(np.where(index < 0, -1, index // times), None if theirs.share is None else theirs.share[::times])
        if mine.neurons(times) != theirs:
            raise Refused(
                f"changing the units of group {bundle.target!r}",
                f"bundle {bundle.name!r} has {times} output channels for each input channel",
                f"whole blocks of {times} units",
            )
        return mine
    return None


def _agrees(network: Network, bundle: Bundle, maps: Mapping[str, UnitMap]) -> bool:
    """Whether the maps of a bundle's two ends fit together."""
    back = _backward(network, bundle, maps)
    mine = maps[bundle.source]
    return mine == UnitMap(np.arange(network.groups[bundle.source].units)) if back is None else back == mine


def _range(units: UnitMap, first: int, last: int) -> slice:
    """The new units that came from old units first..last-1, and the fresh ones directly behind them."""
    inside = np.flatnonzero((units.index >= first) & (units.index < last))
    if inside.size == 0:
        raise Refused(f"units {first} to {last - 1}", "none of them would be left", "at least one")
    begin, end = int(inside[0]), int(inside[-1]) + 1
    while end < units.units and units.index[end] < 0:
        end += 1
    between = units.index[begin:end]
    if np.any((between >= 0) & ((between < first) | (between >= last))):
        raise Refused(f"units {first} to {last - 1}", "other units between them afterwards", "one unbroken range")
    return slice(begin, end)


def new_start(units: UnitMap, first: int, last: int) -> int:
    """Where the range of units first..last-1 begins after the change."""
    return int(_range(units, first, last).start)
