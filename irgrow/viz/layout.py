"""Where everything of a network stands in a drawing: columns by depth, neurons or folded blocks in them.

Groups stand in columns from left to right by their depth in the group graph. A flat group is a column of
neurons, or of its first and last ones where there are many; an image group is a stack of channels. Groups
that feed each other (insertion-grown networks) are drawn neuron by neuron, one column per level; where
there are too many neurons for that, as a histogram of neurons per level.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log2, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Sparse, Window
from irgrow.viz.svg import text_width

Near = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
Inner = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
Positions = NDArray[np.float64]  # [neurons of a group, 2]; NaN where a neuron is not drawn

SHOWN = 72  # neurons of one group that are drawn in a column
ENDS = 10  # of a larger group: as many at each end
LABEL = 11.0  # font size of names
SMALL = 9.5  # font size of everything else
HEAD = 30.0  # room above an item for its name and properties


@dataclass
class Item:
    """What is drawn for one group, or for several that feed each other.

    kind: `column` (neurons), `image` (a stack of channels), `levels` (neurons by level), `histogram`.
    `box` is (left, top, right, bottom) of the drawing itself, without its label above.
    """

    kind: str
    groups: tuple[str, ...]
    first: int  # columns it stands in
    last: int
    width: float
    height: float
    radius: float = 0.0
    spacing: float = 0.0
    face: tuple[float, float] = (0.0, 0.0)  # of an image: width and height of one channel
    stack: int = 0  # of an image: channels drawn
    counts: NDArray[np.int64] | None = None  # of a histogram: neurons per level
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    @property
    def middle(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass
class Layout:
    """Items by group, positions of drawn neurons by group, the x of every column, and how bundles are drawn."""

    items: list[Item]
    of: dict[str, Item]
    neurons: dict[str, Positions]
    columns: list[float]
    lanes: dict[str, int] = field(default_factory=dict)  # bundles that pass over columns, and at which height


def layout(network: Network, *, neurons: int = 600) -> Layout:
    """Every position of a drawing in which at most about `neurons` of an irregular part are drawn one by one."""
    items = _items(network, neurons)
    of = {name: item for item in items for name in item.groups}
    result = Layout(items, of, {}, [])
    result.lanes = _lanes(network, result)
    _place_columns(network, result)
    _place_items(result)
    for item in items:
        if item.kind == "column":
            result.neurons[item.groups[0]] = _column(network.groups[item.groups[0]], item)
    for item in items:
        if item.kind == "levels":
            _place_levels(network, result, item)
    return result


def adjacent(result: Layout, bundle: Bundle) -> bool:
    """Whether a bundle runs between neighbouring columns."""
    source, target = result.of[bundle.source], result.of[bundle.target]
    return source.last + 1 == target.first


def neuron_by_neuron(result: Layout, bundle: Bundle) -> bool:
    """Whether a bundle's edges are drawn one by one.

    Both ends are neurons, and nothing stands between them; or the part between is drawn neuron by neuron too
    and the edges are few.
    """
    source, target = result.of[bundle.source], result.of[bundle.target]
    if not {source.kind, target.kind} <= {"column", "levels"}:
        return False
    if "levels" in (source.kind, target.kind) or adjacent(result, bundle):
        return True
    between = [item for item in result.items if source.last < item.first and item.last < target.first]
    few = isinstance(bundle.pattern, Sparse) and bundle.pattern.source.size <= 300
    return few and bool(between) and all(item.kind == "levels" for item in between)


# ---- what stands where ----------------------------------------------------------------------------------------


def _items(network: Network, neurons: int) -> list[Item]:
    items: list[Item] = []
    end: dict[str, int] = {}
    largest = max((g.shape[1] if len(g.shape) > 1 else 1 for g in network.groups.values()), default=1)
    for names, cyclic in network.components:
        before = [end[b.source] for name in names for b in network.entering(name) if b.source not in names]
        first = max(before, default=-1) + 1
        groups = [network.groups[name] for name in names]
        if not cyclic:
            item = _image(groups[0], first, largest) if len(groups[0].shape) > 1 else _flat(groups[0], first)
        else:
            item = _irregular(network, names, first, neurons)
        items.append(item)
        end |= dict.fromkeys(names, item.last)
    of = {name: item for item in items for name in item.groups}
    for name in network.inputs:  # an input that is first used deeper stands beside its first use
        used = [of[b.target].first for b in network.leaving(name)]
        if used and of[name].first < min(used) - 1:
            of[name].first = of[name].last = min(used) - 1
    return items


def _flat(group: Group, first: int) -> Item:
    shown = group.units if group.units <= SHOWN else 2 * ENDS + 3
    spacing = min(21.0, max(8.6, 520.0 / shown))
    radius = min(8.0, 0.36 * spacing)
    return Item("column", (group.name,), first, first, 2 * radius, (shown - 1) * spacing + 2 * radius, radius, spacing)


def _image(group: Group, first: int, largest: int) -> Item:
    positions = (*group.shape[1:], 1)[:2]
    height = 16 + 64 * sqrt(positions[0] / largest)
    width = max(8.0, min(2.5, positions[1] / positions[0]) * height)
    stack = max(1, min(9, round(1.4 * log2(group.units)) + 1, group.units))
    step = 4.0
    extent = step * (stack - 1)
    return Item(
        "image", (group.name,), first, first, width + extent, height + extent, face=(width, height), stack=stack
    )


def _irregular(network: Network, names: tuple[str, ...], first: int, neurons: int) -> Item:
    level = np.concatenate([network.levels[name] for name in names])
    ranks, counts = np.unique(level, return_counts=True)
    if level.size > neurons or any(len(network.groups[name].shape) > 1 for name in names):
        return Item("histogram", names, first, first, 210.0, 110.0, counts=counts)
    tallest = int(counts.max())
    spacing = min(20.0, max(8.6, 560.0 / tallest))
    height = max(160.0, min(600.0, 34.0 * sqrt(level.size)), (tallest - 1) * spacing + 12)
    radius = min(6.0, 0.36 * spacing, 0.4 * _level_gap(ranks.size))
    return Item("levels", names, first, first + ranks.size - 1, 0.0, height, radius, spacing, counts=counts)


def _lanes(network: Network, result: Layout) -> dict[str, int]:
    """Bundles that pass over other columns, each at a height of its own where they overlap."""
    passing = []
    for bundle in network.bundles.values():
        source, target = result.of[bundle.source], result.of[bundle.target]
        if source is not target and not adjacent(result, bundle) and not neuron_by_neuron(result, bundle):
            passing.append((target.first - source.last, source.last, target.first, bundle.name))
    lanes: dict[str, int] = {}
    taken: list[list[tuple[int, int]]] = []
    for _, begin, end, name in sorted(passing):
        lane = 0
        while lane < len(taken) and any(begin < e and b < end for b, e in taken[lane]):
            lane += 1
        if lane == len(taken):
            taken.append([])
        taken[lane].append((begin, end))
        lanes[name] = lane
    return lanes


# ---- coordinates ----------------------------------------------------------------------------------------------


def caption(network: Network, item: Item) -> tuple[str, str]:
    """The two lines above an item: its name, and its size and properties."""
    if item.kind in ("levels", "histogram"):
        neurons = sum(network.groups[name].neurons for name in item.groups)
        depth = 0 if item.counts is None else item.counts.size
        return ", ".join(item.groups), f"{neurons:,} neurons on {depth} levels"
    group = network.groups[item.groups[0]]
    facts = ["×".join(map(str, group.shape))]
    if group.aggregation != "sum":
        facts.append(group.aggregation)
    if group.norm is not None:
        facts.append(f"{group.norm.kind} norm")
    if group.activation != "identity":
        facts.append(group.activation.replace("_", " "))
    return group.name, " · ".join(facts)


def bundle_label(bundle: Bundle) -> tuple[str, str]:
    """What a bundle is, in one line and a smaller one."""
    pattern = bundle.pattern
    kind = type(pattern).__name__
    second = ""
    if kind in ("Conv2d", "Local2d", "Pool2d"):
        name = {"Conv2d": "conv", "Local2d": "local", "Pool2d": "pool"}[kind]
        first = f"{name} {pattern.kernel[0]}×{pattern.kernel[1]}"  # type: ignore[attr-defined]
        facts = []
        if pattern.stride != (1, 1):  # type: ignore[attr-defined]
            facts.append(f"stride {pattern.stride[0]}")  # type: ignore[attr-defined]
        if getattr(pattern, "channel_groups", 1) > 1:
            facts.append(f"{pattern.channel_groups} groups")  # type: ignore[attr-defined]
        second = ", ".join(facts)
    else:
        first = kind.lower()
    return first, second


def _level_gap(levels: int) -> float:
    """From one level to the next: many levels stand closer together."""
    return max(14.0, min(64.0, 1000.0 / levels))


def _place_columns(network: Network, result: Layout) -> None:
    number = max(item.last for item in result.items) + 1
    width = np.full(number, 8.0)
    gap = np.full(number, 5.0)
    for item in result.items:
        wide = max(text_width(caption(network, item)[0], LABEL), text_width(caption(network, item)[1], SMALL)) + 6
        if item.first == item.last:
            width[item.first] = max(width[item.first], item.width, wide)
        else:
            gap[item.first : item.last] = np.maximum(gap[item.first : item.last], wide / (item.last - item.first) - 34)
            inside = _level_gap(item.last - item.first + 1) - 8
            gap[item.first : item.last] = np.maximum(gap[item.first : item.last], inside)
    for bundle in network.bundles.values():
        source, target = result.of[bundle.source], result.of[bundle.target]
        if source is target or not adjacent(result, bundle):
            continue
        needed = max(text_width(t, SMALL) for t in bundle_label(bundle)) + 22
        if "levels" in (source.kind, target.kind):
            needed = 64.0
        elif not isinstance(bundle.pattern, Window) and source.kind != target.kind:
            needed = max(needed, 90.0)
        elif neuron_by_neuron(result, bundle):
            ends = sum(network.groups[name].units for name in (bundle.source, bundle.target))
            needed = max(needed, min(260.0, 60.0 + 2.0 * ends))
        gap[source.last] = max(gap[source.last], needed)
    x, columns = 0.0, []
    for n in range(number):
        columns.append(x + width[n] / 2)
        x += width[n] + gap[n]
    result.columns = columns


def _place_items(result: Layout) -> None:
    """Items of one column stand above each other; all columns are centred on y = 0."""
    stacks: dict[int, list[Item]] = {}
    for item in result.items:
        stacks.setdefault(item.first, []).append(item)
    for stack in stacks.values():
        total = sum(item.height for item in stack) + (HEAD + 24) * (len(stack) - 1)
        y = -total / 2
        for item in stack:
            left, right = result.columns[item.first], result.columns[item.last]
            if item.first == item.last:
                left, right = left - item.width / 2, right + item.width / 2
            else:
                left, right = left - item.radius, right + item.radius
            item.box = (left, y, right, y + item.height)
            y += item.height + HEAD + 24


def _column(group: Group, item: Item) -> Positions:
    """The neurons of a flat group, from top to bottom; of a large one its ends."""
    x, top = item.middle[0], item.box[1] + item.radius
    found = np.full((group.units, 2), np.nan)
    if group.units <= SHOWN:
        drawn, row = np.arange(group.units), np.arange(group.units)
    else:
        drawn = np.r_[np.arange(ENDS), np.arange(group.units - ENDS, group.units)]
        row = np.r_[np.arange(ENDS), np.arange(ENDS) + ENDS + 3]
    found[drawn, 0] = x
    found[drawn, 1] = top + row * item.spacing
    return found


# ---- neurons by level ------------------------------------------------------------------------------------------


def _place_levels(network: Network, result: Layout, item: Item) -> None:
    """Every neuron in its level's column, near the neurons it is connected to, none on top of another."""
    names = item.groups
    first, total = {}, 0
    for name in names:
        first[name] = total
        total += network.groups[name].neurons
    level = np.concatenate([network.levels[name] for name in names])
    rank = np.unique(level, return_inverse=True)[1]
    x = np.array(result.columns)[item.first + rank]
    near, inner = _neighbours(network, result, item, first, rank)
    _, top, _, bottom = item.box
    y = _settle(near, inner, rank, (top + bottom) / 2, bottom - top, item.spacing)
    for r in range(item.last - item.first + 1):
        members = np.flatnonzero(rank == r)
        y[members] = _spread(y[members], item.spacing, top + item.radius, bottom - item.radius)
    for name in names:
        part = slice(first[name], first[name] + network.groups[name].neurons)
        result.neurons[name] = np.column_stack([x[part], y[part]])
    item.box = (item.box[0], float(y.min()) - item.radius, item.box[2], float(y.max()) + item.radius)


def _neighbours(
    network: Network, result: Layout, item: Item, first: dict[str, int], rank: NDArray[np.int64]
) -> tuple[Near, Inner]:
    """Of the item's neurons: (neuron, y of a neighbour outside, strength), and (source, target, strength) inside.

    The further an edge reaches, the less it pulls.
    """
    outside: list[Near] = [(np.empty(0, np.int64), np.empty(0), np.empty(0))]
    inside: list[Inner] = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for bundle in network.bundles.values():
        begins, ends = bundle.source in first, bundle.target in first
        if not (begins or ends):
            continue
        s, t, _ = bundle.pattern.all_edges(*network.shapes(bundle))
        if begins and ends:
            s, t = s + first[bundle.source], t + first[bundle.target]
            inside.append((s, t, 1.0 / np.maximum(1, rank[t] - rank[s])))
            continue
        mine, theirs = (t + first[bundle.target], s) if ends else (s + first[bundle.source], t)
        other = bundle.source if ends else bundle.target
        if other in result.neurons:
            y = result.neurons[other][theirs, 1]
            reach = np.abs(item.first + rank[mine] - result.of[other].first)
            drawn = ~np.isnan(y)
            outside.append((mine[drawn], y[drawn], 1.0 / np.maximum(1, reach[drawn])))
    near, inner = (tuple(map(np.concatenate, zip(*parts, strict=True))) for parts in (outside, inside))
    return near, inner  # type: ignore[return-value]


def _settle(
    near: Near, inner: Inner, rank: NDArray[np.int64], centre: float, room: float, spacing: float
) -> NDArray[np.float64]:
    """Heights at which edges, as springs, and neurons of nearby levels, which repel each other, are in balance."""
    total, sweeps = rank.size, 160
    y: NDArray[Any] = centre + (np.arange(total) * 0.618034 % 1.0 - 0.5) * room * 0.8  # spread out, the same every time
    (at, height, pull_near), (source, target, pull_inner) = near, inner
    weight = np.bincount(at, pull_near, total) + np.bincount(source, pull_inner, total)
    weight = np.maximum(weight + np.bincount(target, pull_inner, total), 1e-9)
    apart = np.abs(rank[:, None] - rank[None, :])
    repulsion = np.where(apart <= 4, 1.0 / (1.0 + apart), 0.0)
    np.fill_diagonal(repulsion, 0.0)
    for sweep in range(sweeps):
        along = pull_inner * (y[target] - y[source])
        pull = np.bincount(at, pull_near * (height - y[at]), total) + np.bincount(source, along, total)
        pull = (pull - np.bincount(target, along, total)) / weight
        between = y[:, None] - y[None, :]
        push = (repulsion * between / (between**2 + spacing**2 / 4)).sum(1) * spacing * 1.6
        limit = 3 * spacing * (1.0 - sweep / sweeps)
        y = np.clip(y + 0.8 * np.clip(0.5 * pull + push, -limit, limit), centre - room / 2, centre + room / 2)
    extent = float(y.max() - y.min())
    return centre + (y - (y.max() + y.min()) / 2) * min(1.7, 0.95 * room / extent) if extent else y


def _spread(wanted: NDArray[np.float64], spacing: float, top: float, bottom: float) -> NDArray[np.float64]:
    """The heights nearest to the wanted ones (least squares) that keep `spacing` and stay inside."""
    order = np.argsort(wanted, kind="stable")
    size = wanted.size
    spacing = min(spacing, (bottom - top) / max(1, size - 1))
    step = spacing * np.arange(size)
    blocks: list[list[float]] = []  # pool adjacent violators: [sum, count]
    for value in np.clip(wanted[order], top, bottom) - step:
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] >= blocks[-1][0] / blocks[-1][1]:
            last = blocks.pop()
            blocks[-1] = [blocks[-1][0] + last[0], blocks[-1][1] + last[1]]
    level = np.concatenate([np.full(int(n), s / n) for s, n in blocks]) if blocks else np.empty(0)
    heights = np.clip(level, top, bottom - (step[-1] if size else 0.0)) + step
    found = np.empty(size)
    found[order] = heights
    return found
