"""`network_svg(network)`: a network as a picture, written directly as SVG.

Edges between neurons are lines: blue for positive weights, orange for negative ones, the more opaque the
larger |weight| is within its bundle. Colours are from the middle of the scale, so that they can be told
apart by colour-blind readers and stand out on white and on dark pages alike; the background is transparent.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from irgrow.ir.errors import BadFile
from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Dense, Window
from irgrow.viz.layout import (
    HEAD,
    LABEL,
    SHOWN,
    SMALL,
    Item,
    Layout,
    adjacent,
    bundle_label,
    caption,
    layout,
    neuron_by_neuron,
)
from irgrow.viz.svg import Canvas, number, text_width

POSITIVE, NEGATIVE = "#2b87d3", "#e07020"
ROLES = {"input": "#8b949e", "hidden": "#12a07a", "output": "#c96fb0"}
STYLE = (
    ".t{fill:#7b828b}.h{fill:#7b828b;font-weight:bold}.p,.n{fill:none}"
    f".p{{stroke:{POSITIVE}}}.n{{stroke:{NEGATIVE}}}"
    + "".join(f".{role}{{fill:{colour};stroke:none}}" for role, colour in ROLES.items())
    + "".join(f".{role}-c{{fill:{colour};stroke:#ffffff;stroke-width:.8}}" for role, colour in ROLES.items())
    + ".a{fill:none;stroke:#8b949e;stroke-width:1.2}.b{fill:#8b949e;fill-opacity:.16;stroke:none}"
    ".w{fill:none;stroke:#ffffff;stroke-width:1.1}.k{fill:#6b737c}.v{fill:#ffffff}.z{stroke:#8b949e;stroke-width:.7;fill:none}"
)
LEVELS = 12  # of opacity
LANE = 20.0  # between bundles that pass over columns

Lines = NDArray[np.float64]  # [n, 4]


def network_svg(network: Network, *, title: str | None = None, edges: int = 6000, neurons: int = 600) -> str:
    """The network as the text of an SVG file; the same network always gives the same text.

    At most `edges` edges are drawn one by one, the strongest of each bundle; the picture says how many are
    not. Irregular parts of more than `neurons` neurons are drawn as a histogram of their levels.
    """
    plan = layout(network, neurons=neurons)
    canvas = Canvas()
    drawn = _draw_edges(canvas, network, plan, edges)
    for bundle in network.bundles.values():
        if not neuron_by_neuron(plan, bundle) and plan.of[bundle.source] is not plan.of[bundle.target]:
            _connect(canvas, network, plan, bundle)
    for item in plan.items:
        _draw_item(canvas, network, plan, item)
    for bundle in network.bundles.values():
        if adjacent(plan, bundle):
            _label(canvas, plan, bundle, network)
    c = network.counts
    facts = f"{len(network.groups)} groups · {c.neurons:,} neurons · {c.edges:,} edges · {c.parameters:,} parameters"
    _frame(canvas, network, plan, title, facts, drawn)
    return canvas.finish(style=STYLE, title=title or "network", description=facts)


def save_svg(network: Network, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """`path` is the picture of the network; raises BadFile if it cannot be written."""
    text = network_svg(network, title=title)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadFile(f"drawing to {path}", error.strerror, "a file that can be written") from error


# ---- edges ----------------------------------------------------------------------------------------------------


def _draw_edges(canvas: Canvas, network: Network, plan: Layout, limit: int) -> int:
    """The edges between neurons, the weakest first; returns how many were drawn."""
    parts = []
    for bundle in network.bundles.values():
        if neuron_by_neuron(plan, bundle):
            parts.append(_edges(network, plan, bundle))
    if not parts:
        return 0
    lines = np.concatenate([line for line, _ in parts])
    strength = np.concatenate([s for _, s in parts])
    crowd = np.concatenate([np.full(s.size, _crowd(s.size)) for _, s in parts])
    if strength.size > limit:
        keep = np.sort(np.argpartition(-np.abs(strength), limit)[:limit])
        lines, strength, crowd = lines[keep], strength[keep], crowd[keep]
    ink = (0.22 - 0.17 * crowd) + (0.68 - 0.08 * crowd) * np.abs(strength) ** (1.0 + 2.2 * crowd)
    bins = np.minimum((ink / 0.9 * LEVELS).astype(int), LEVELS - 1)
    curved = any(item.kind == "levels" for item in plan.items)
    for level in range(LEVELS):
        share = (level + 0.5) / LEVELS
        opacity, width = f"{0.9 * share:.2f}", f"{0.5 + 0.8 * share:.1f}"
        signs = [("n", strength < 0), ("p", strength >= 0)]
        for css, sign in signs if level % 2 else signs[::-1]:  # neither colour covers the other everywhere
            mine = lines[(bins == level) & sign]
            if curved:
                data = "".join(_curve(*line) for line in mine.tolist())
                if data:
                    canvas.path(data, css, stroke_opacity=opacity, stroke_width=width)
            else:
                canvas.lines(map(tuple, mine.tolist()), css, stroke_opacity=opacity, stroke_width=width)
    return int(strength.size)


def _crowd(edges: int) -> float:
    """0 for few edges, all of which are to be seen, to 1 for so many that only the strong ones can be."""
    return float(np.clip(np.log10(max(1, edges) / 150) / 1.2, 0.0, 1.0))


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    """A line that leaves and arrives level."""
    bend = 0.45 * (to_x - x)
    points = (x + bend, y), (to_x - bend, to_y), (to_x, to_y)
    return f"M{number(x)} {number(y)}C" + " ".join(f"{number(a)} {number(b)}" for a, b in points)


def _edges(network: Network, plan: Layout, bundle: Bundle) -> tuple[Lines, NDArray[np.float64]]:
    """Lines between drawn neurons, and their weights relative to the largest (the 98th percentile) of the bundle."""
    source, target = plan.neurons[bundle.source], plan.neurons[bundle.target]
    s: NDArray[Any]
    t: NDArray[Any]
    weight = bundle.weight.detach().double().reshape(-1).cpu().numpy()
    if isinstance(bundle.pattern, Dense):
        s, t = (np.flatnonzero(~np.isnan(p[:, 0])) for p in (source, target))
        value = weight.reshape(len(target), len(source))[np.ix_(t, s)].ravel()
        t, s = np.repeat(t, s.size), np.tile(s, t.size)
    else:
        s, t, w = bundle.pattern.all_edges(*network.shapes(bundle))
        seen = ~np.isnan(source[s, 0]) & ~np.isnan(target[t, 0])
        s, t, value = s[seen], t[seen], weight[w[seen]]
    largest = float(np.quantile(np.abs(value), 0.98)) if value.size else 1.0
    relative = np.clip(value / (largest or 1.0), -1.0, 1.0)
    return np.column_stack([source[s], target[t]]), relative


# ---- bundles as a whole ------------------------------------------------------------------------------------------


def _connect(canvas: Canvas, network: Network, plan: Layout, bundle: Bundle) -> None:
    """A bundle that is drawn as one thing: a window sliding over an image, a band, or an arc over other columns."""
    source, target = plan.of[bundle.source], plan.of[bundle.target]
    if bundle.name in plan.lanes:
        _arc(canvas, plan, bundle, source, target)
    elif isinstance(bundle.pattern, Window):
        _window(canvas, network, bundle, source, target)
    elif source.kind == "image" and target.kind == "image":
        (x, y), (to_x, to_y) = _side(source, right=True), _side(target, right=False)
        canvas.path(f"M{number(x + 4)} {number(y)}L{number(to_x - 9)} {number(to_y)}", "a")
        _head(canvas, to_x - 3, to_y, (1.0, 0.0))
    else:
        (_, top, right, bottom), (left, to_top, _, to_bottom) = source.box, target.box
        canvas.path(
            f"M{number(right + 3)} {number(top)}L{number(left - 3)} {number(to_top)}"
            f"L{number(left - 3)} {number(to_bottom)}L{number(right + 3)} {number(bottom)}Z",
            "b",
        )


def _side(item: Item, *, right: bool) -> tuple[float, float]:
    return (item.box[2] if right else item.box[0]), item.middle[1]


def _front(item: Item) -> tuple[float, float, float, float]:
    """The frontmost channel of an image: the lower left corner of the stack."""
    left, _, _, bottom = item.box
    return left, bottom - item.face[1], left + item.face[0], bottom


def _window(canvas: Canvas, network: Network, bundle: Bundle, source: Item, target: Item) -> None:
    """Lines from the kernel on the source's front channel to one point of the target's."""
    x, y, width, height = _kernel(network, bundle, source)
    to_x, to_y = _point(target)
    for corner in (y, y + height):
        canvas.path(f"M{number(x + width)} {number(corner)}L{number(to_x)} {number(to_y)}", "a", stroke_opacity=".8")


def _kernel(network: Network, bundle: Bundle, source: Item) -> tuple[float, float, float, float]:
    """The kernel on the front channel, to scale, but large enough to be seen: left, top, width, height."""
    assert isinstance(bundle.pattern, Window)
    left, top, right, bottom = _front(source)
    shape = network.groups[bundle.source].shape
    size = [
        min(side, max(5.0, side * min(1.0, k / n)))
        for side, k, n in zip((bottom - top, right - left), bundle.pattern.kernel, shape[1:], strict=True)
    ]
    height, width = size
    x = max(left, right - width - 0.16 * (right - left))
    return x, min(top + 0.22 * (bottom - top), bottom - height), width, height


def _point(target: Item) -> tuple[float, float]:
    left, top, right, bottom = _front(target)
    return left + 0.3 * (right - left), top + 0.35 * (bottom - top)


def _arc(canvas: Canvas, plan: Layout, bundle: Bundle, source: Item, target: Item) -> None:
    """An arrow over (or under) the columns between, with its label."""
    between = [i for i in plan.items if source.first <= i.first and i.last <= target.last]
    under = _stacked_below(plan, source) or _stacked_below(plan, target)
    lane, shift = LANE * plan.lanes[bundle.name], 5.0 * plan.lanes[bundle.name]
    x, to_x = source.middle[0] + 9 + shift, target.middle[0] - 9 - shift
    if under:
        y, way = max(i.box[3] for i in between) + 30 + lane, -1.0
        start, stop = source.box[3] + 4, target.box[3] + 4
    else:
        y, way = min(i.box[1] for i in between) - HEAD - 16 - lane, 1.0
        start, stop = source.box[1] - HEAD - 2, target.box[1] - HEAD - 2
    canvas.include((x, y - 6), (to_x, y + 6))
    canvas.path(
        f"M{number(x)} {number(start)}V{number(y + 8 * way)}Q{number(x)} {number(y)} {number(x + 8)} {number(y)}"
        f"H{number(to_x - 8)}Q{number(to_x)} {number(y)} {number(to_x)} {number(y + 8 * way)}V{number(stop - 6 * way)}",
        "a",
    )
    _head(canvas, to_x, stop, (0.0, way))
    first, second = bundle_label(bundle)
    canvas.text((x + to_x) / 2, y - 4, f"{first}, {second}" if second else first, size=SMALL)


def _head(canvas: Canvas, x: float, y: float, way: tuple[float, float]) -> None:
    """An arrow head that ends at this point."""
    dx, dy = way
    bx, by = x - 7 * dx, y - 7 * dy
    canvas.path(
        f"M{number(x)} {number(y)}L{number(bx - 3 * dy)} {number(by - 3 * dx)}"
        f"L{number(bx + 3 * dy)} {number(by + 3 * dx)}Z",
        "k",
    )


def _label(canvas: Canvas, plan: Layout, bundle: Bundle, network: Network) -> None:
    """What the bundle between two neighbouring columns is: above its upper border."""
    source, target = plan.of[bundle.source], plan.of[bundle.target]
    if "levels" in (source.kind, target.kind):
        return
    parallel = [b.name for b in network.bundles.values() if plan.of[b.source] is source and plan.of[b.target] is target]
    first, second = bundle_label(bundle)
    x = (source.box[2] + target.box[0]) / 2
    shift = 13.0 * parallel.index(bundle.name)
    if isinstance(bundle.pattern, Window):  # under the lines: names stand above
        left, top, width, height = _kernel(network, bundle, source)
        to_x, to_y = _point(target)
        slope = (to_y - top - height) / max(1.0, to_x - left - width)
        wide = max(text_width(first, SMALL), text_width(second, SMALL - 1))
        y = top + height + slope * (x - left - width) + abs(slope) * wide / 2 + 13 + shift
        canvas.text(x, y, first, size=SMALL)
        if second:
            canvas.text(x, y + 11, second, size=SMALL - 1)
        return
    if source.kind == target.kind == "image":
        y = source.middle[1] - 6 - shift
    else:
        # Above the upper border, or below the lower one, whichever is free; else on a plate in the middle.
        others = [
            (plan.of[b.source], plan.of[b.target])
            for b in network.bundles.values()
            if b.name not in parallel and adjacent(plan, b) and plan.of[b.source].last == source.last
        ]
        for edge, away in ((1, -1.0), (3, 1.0)):
            rise = abs(target.box[edge] - source.box[edge]) / max(1.0, target.box[0] - source.box[2])
            border = (source.box[edge] + target.box[edge]) / 2
            y = border + away * (10 + rise * text_width(first, SMALL) / 2 + shift)
            if not any(_crosses(y, a, b) for a, b in others):
                y += 3.5
                break
        else:
            y = (source.middle[1] + target.middle[1]) / 2 + shift
            wide = text_width(first, SMALL) + 8
            canvas.rectangle(x - wide / 2, y - 10.5, wide, 14, "k", round=4)
            canvas.text(x, y, first, size=SMALL, css="v")
            return
    canvas.text(x, y, first, size=SMALL)


def _crosses(y: float, source: Item, target: Item) -> bool:
    """Whether edges between these items pass at height `y` half-way."""
    top, bottom = (source.box[1] + target.box[1]) / 2, (source.box[3] + target.box[3]) / 2
    return top - 8 < y < bottom + 8


def _stacked_below(plan: Layout, item: Item) -> bool:
    """Whether another item stands above this one in its column."""
    return any(other.first == item.first and other.box[1] < item.box[1] for other in plan.items)


# ---- groups -----------------------------------------------------------------------------------------------------


def _role(network: Network, group: str) -> str:
    return "input" if group in network.inputs else "output" if group in network.outputs else "hidden"


def _draw_item(canvas: Canvas, network: Network, plan: Layout, item: Item) -> None:
    x, (_, top, _, _) = item.middle[0], item.box
    name, facts = caption(network, item)
    canvas.text(x, top - 19, name, size=LABEL, css="h")
    canvas.text(x, top - 8, facts, size=SMALL)
    if item.kind == "image":
        _draw_image(canvas, network, plan, item)
    elif item.kind == "histogram":
        _draw_histogram(canvas, item)
    else:
        for name in item.groups:
            _draw_neurons(canvas, network, plan, name, item.radius)
        if item.kind == "column":
            _draw_ellipsis(canvas, network.groups[item.groups[0]], plan, item)


def _draw_neurons(canvas: Canvas, network: Network, plan: Layout, name: str, radius: float) -> None:
    group, css = network.groups[name], f"{_role(network, name)}-c"
    bias = None if group.bias is None else group.bias.detach().double().tolist()
    for unit, (x, y) in enumerate(plan.neurons[name].tolist()):
        if x == x:
            note = f"{name}#{group.serials[unit]}"
            if bias is not None:
                note += f", bias {bias[unit]:.3g}"
            canvas.circle(x, y, radius, css, note)


def _draw_ellipsis(canvas: Canvas, group: Group, plan: Layout, item: Item) -> None:
    if group.units <= SHOWN:
        return
    heights = np.sort(plan.neurons[group.name][:, 1])
    heights = heights[~np.isnan(heights)]
    gap = int(np.argmax(np.diff(heights)))
    middle = (heights[gap] + heights[gap + 1]) / 2
    for step in (-1, 0, 1):
        canvas.circle(item.middle[0], middle + 6 * step, 1.4, "k")
    canvas.text(item.middle[0], item.box[3] + 14, f"{group.units - heights.size:,} not drawn", size=SMALL)


def _draw_image(canvas: Canvas, network: Network, plan: Layout, item: Item) -> None:
    """Channels one behind the other, the first in front; kernels that slide over it."""
    group = network.groups[item.groups[0]]
    left, top, _, _ = _front(item)
    width, height = item.face
    note = f"{group.name}: {group.units} channels of {'×'.join(map(str, group.shape[1:]))}"
    for n in reversed(range(item.stack)):
        canvas.rectangle(left + 4 * n, top - 4 * n, width, height, f"{_role(network, group.name)}-c", note)
    for bundle in network.leaving(group.name):
        if isinstance(bundle.pattern, Window) and bundle.name not in plan.lanes:
            canvas.rectangle(*_kernel(network, bundle, item), "w", round=1)


def _draw_histogram(canvas: Canvas, item: Item) -> None:
    """Neurons per level, as bars."""
    assert item.counts is not None
    left, top, right, bottom = item.box
    counts = item.counts
    bars = min(counts.size, 60)
    bounds = np.linspace(0, counts.size, bars + 1).astype(int)
    heights = np.array([counts[a:b].mean() for a, b in pairwise(bounds.tolist())])
    canvas.rectangle(left, top, right - left, bottom - top, "z", round=4)
    room, base = right - left - 24, bottom - 18
    for n, height in enumerate(heights / heights.max() * (base - top - 12)):
        width = room / bars
        canvas.rectangle(left + 12 + n * width, base - height, max(0.6, 0.85 * width), float(height), "hidden", round=0)
    canvas.text(left + 12, bottom - 6, "level 1", size=SMALL - 1, anchor="start")
    canvas.text(right - 12, bottom - 6, f"{counts.size}", size=SMALL - 1, anchor="end")
    canvas.text((left + right) / 2, bottom - 6, f"up to {counts.max():,} a level", size=SMALL - 1)


# ---- frame --------------------------------------------------------------------------------------------------------


def _frame(canvas: Canvas, network: Network, plan: Layout, title: str | None, facts: str, drawn: int) -> None:
    """Title above, legend below."""
    left = min(item.box[0] for item in plan.items)
    left = min(left, canvas._box[0])
    y = canvas._box[1] - 22
    canvas.text(left, y, facts, size=10.5, anchor="start")
    if title:
        canvas.text(left, y - 18, title, size=15, anchor="start", css="h")
    x, y = left, canvas._box[3] + 34
    for role in ROLES:
        if any(_role(network, name) == role for name in network.groups):
            canvas.circle(x + 5, y - 3.5, 4.5, f"{role}-c")
            canvas.text(x + 14, y, role, size=SMALL, anchor="start")
            x += 14 + text_width(role, SMALL) + 16
    if drawn:
        for css, word in (("p", "positive weight"), ("n", "negative")):
            canvas.lines([(x, y - 3.5, x + 18, y - 3.5)], css, stroke_width="1.6")
            canvas.text(x + 23, y, word, size=SMALL, anchor="start")
            x += 23 + text_width(word, SMALL) + 16
        canvas.text(x, y, "the more opaque, the larger within its bundle", size=SMALL, anchor="start")
    total = network.counts.edges
    if drawn == total:
        note = f"all {total:,} edges are drawn"
    elif drawn:
        note = f"{drawn:,} of {total:,} edges are drawn one by one; the rest is folded"
    else:
        note = f"{total:,} edges, folded into bands and windows"
    if any(isinstance(b.pattern, Window) for b in network.bundles.values()):
        note += "; squares are kernels, to scale"
    canvas.text(left, y + 15, note, size=SMALL, anchor="start")
