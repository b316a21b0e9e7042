"""Pictures of experiments in one style: lines over something with their spread over seeds, and points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#2b6cb0", "#d1620b", "#0b8562", "#b4559c", "#c98a00", "#6b4fbb", "#7a7f87", "#b03a2e", "#2e8b8b", "#4d4d4d")
INK, QUIET = "#30363d", "#6b737c"
Curves = tuple[Sequence[float], Sequence[Sequence[float]]]  # x, and one y per seed


def lines(
    path: Path,
    panels: Sequence[tuple[str, Mapping[str, Curves]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    log_x: bool = False,
) -> None:
    """`path` is a picture: in each panel (title, curves) the median over seeds, and a band around its middle half.

    A curve that lies on an earlier one is dashed. A name has one colour in all panels, if there are enough.
    """
    figure, axes = panel_row(len(panels))
    names = list(dict.fromkeys(name for _, curves in panels for name in curves))
    for ax, (title, curves) in zip(axes, panels, strict=True):
        drawn: list[np.ndarray[Any, Any]] = []
        whole = True
        for number, (name, (at, runs)) in enumerate(curves.items()):
            values = np.asarray(runs, float)
            middle = np.nanmedian(values, 0)
            hidden = any(other.shape == middle.shape and np.allclose(other, middle, rtol=1e-3) for other in drawn)
            color = COLORS[(names.index(name) if len(names) <= len(COLORS) else number) % len(COLORS)]
            ax.plot(at, middle, "--" if hidden else "-", color=color, label=name, linewidth=1.6)
            drawn.append(middle)
            whole = whole and all(float(v).is_integer() for v in at)
            if len(values) > 1:
                low, high = np.nanquantile(values, (0.25, 0.75), axis=0)
                ax.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        finish(ax, title, x, y, log=log, log_x=log_x, whole_x=whole)
    save(figure, path)


def points(
    path: Path,
    panels: Sequence[tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]],
    *,
    x: str,
    y: str,
    log: bool = False,
    log_x: bool = False,
    joined: bool = False,
) -> None:
    """`path` is a picture: in each panel (title, clouds) one point per (x, y) of each cloud."""
    figure, axes = panel_row(len(panels))
    for ax, (title, clouds) in zip(axes, panels, strict=True):
        for number, (name, (at, values)) in enumerate(clouds.items()):
            style = "-o" if joined else "o"
            ax.plot(at, values, style, color=COLORS[number % len(COLORS)], label=name, markersize=4, alpha=0.8)
        finish(ax, title, x, y, log=log, log_x=log_x)
    save(figure, path)


def bars(path: Path, title: str, values: Mapping[str, Sequence[float]], *, x: str, log: bool = False) -> None:
    """`path` is a picture: one line per name, every seed a point on it, the median a bar across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 1.2 + 0.27 * len(values)), layout="constrained")
    ax = figure.subplots()
    for number, of_name in enumerate(values.values()):
        known = [v for v in of_name if not np.isnan(v)]
        color = COLORS[number % len(COLORS)]
        ax.plot(known, [number] * len(known), "o", color=color, markersize=4, alpha=0.6)
        if known:
            ax.plot([float(np.median(known))] * 2, [number - 0.33, number + 0.33], color=color, linewidth=2.4)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.4, -0.6)
    finish(ax, title, f"{x} (bars: medians)", "", log_x=log, legend=False)
    save(figure, path)


def panel_row(count: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, in rows of at most `columns`, smaller where there are more."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    width, height = {1: (5.6, 3.9), 2: (4.7, 3.6)}.get(columns, (4.0, 3.3))
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")  # pyplot would keep it
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def finish(
    ax: Axes,
    title: str,
    x: str,
    y: str,
    *,
    log: bool = False,
    log_x: bool = False,
    whole_x: bool = False,
    legend: bool = True,
) -> None:
    """Title, labels, scales (logarithmic if anything is positive), a quiet frame, a legend if anything has a name.

    whole_x: ticks are whole numbers. Long legends stand below the panel, where they hide nothing.
    """
    from matplotlib.ticker import MaxNLocator

    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    if log and np.isfinite(ax.dataLim.minposy):
        ax.set_yscale("log")
    if log_x and np.isfinite(ax.dataLim.minposx):
        ax.set_xscale("log")
    elif whole_x:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(True, color="#e6e8eb", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", labelsize=8, colors=QUIET)
    entries = len(ax.get_legend_handles_labels()[0])
    if legend and entries > 5:
        ax.legend(fontsize=7.5, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.21))
    elif legend and entries:
        ax.legend(fontsize=7.5, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """The figure is written, always the same bytes for the same content."""
    options: dict[str, Any] = {"metadata": {"Software": None}} if path.suffix == ".png" else {}
    figure.savefig(path, dpi=110, **options)
