"""What the experiments' pictures share: one look, medians with their spread, and small PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from irgrow.experiments.claims import median_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2b6cb0", "#d1620b", "#0b8562", "#b4559c", "#7a7f87", "#c98a00", "#6b4fbb", "#2bb3c0", "#a03030", "#4f7a2b")
INK, QUIET, GRID = "#30363d", "#6b737c", "#e3e6ea"


def panels(count: int, *, width: float = 4.6, height: float = 3.5, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with so many dressed axes, at most `columns` beside each other."""
    from matplotlib.figure import Figure

    across = min(count, columns)
    down = -(-count // across)
    figure = Figure(figsize=(width * across, height * down), dpi=110, facecolor="white", layout="constrained")
    found = [figure.add_subplot(down, across, n + 1) for n in range(count)]
    for axes in found:
        axes.grid(True, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, found


def label(axes: Axes, title: str, across: str, up: str, *, log: str = "") -> None:
    """Title and axis labels; `log` names the logarithmic axes (`x`, `y`, `xy`)."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", weight="bold")
    axes.set_xlabel(across, fontsize=9, color=INK)
    axes.set_ylabel(up, fontsize=9, color=INK)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")


def lines(
    axes: Axes,
    curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    *,
    colours: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
    band: bool = True,
) -> None:
    """For each name `(x, runs)`, runs `[run][x]`: the median over runs, and where it lies (90 %) as a band."""
    for n, (name, (x, runs)) in enumerate(curves.items()):
        colour = (colours or {}).get(name) or COLOURS[n % len(COLOURS)]
        columns = [sorted(values) for values in zip(*runs, strict=True)]
        style = "--" if name in dashed else "-"
        axes.plot(x, [median(c) for c in columns], style, color=colour, linewidth=1.5, label=name)
        if band and len(runs) > 1:
            low, high = zip(*(median_interval(c) for c in columns), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def dots(axes: Axes, groups: Mapping[str, Sequence[float]], *, colours: Mapping[str, str] | None = None) -> None:
    """Every run as a dot in its group's row, the median as a bar; groups from top to bottom."""
    names = list(groups)
    for row, name in enumerate(names):
        colour = (colours or {}).get(name) or COLOURS[row % len(COLOURS)]
        values = groups[name]
        spread = [row + 0.22 * ((n % 5) - 2) / 2 for n in range(len(values))]
        axes.plot(values, spread, "o", color=colour, markersize=3.5, alpha=0.5, markeredgewidth=0)
        axes.plot([median(values)] * 2, [row - 0.32, row + 0.32], color=colour, linewidth=2.4)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def legend(axes: Axes, **where: Any) -> None:
    """A small legend without a frame."""
    axes.legend(fontsize=7.5, frameon=False, **where)


def save(figure: Figure, folder: Path, name: str) -> str:
    """The picture is `folder`/`name`; returns the name."""
    figure.savefig(folder / name, metadata={"Software": None})
    return name
