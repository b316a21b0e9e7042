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
    """`path` is a picture: in each panel (title, curves) the median over seeds, and a band around its middle half."""
    figure, axes = panel_row(len(panels))
    for ax, (title, curves) in zip(axes, panels, strict=True):
        for number, (name, (at, runs)) in enumerate(curves.items()):
            values = np.asarray(runs, float)
            color = COLORS[number % len(COLORS)]
            ax.plot(at, np.nanmedian(values, 0), color=color, label=name, linewidth=1.6)
            if len(values) > 1:
                low, high = np.nanquantile(values, (0.25, 0.75), axis=0)
                ax.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        finish(ax, title, x, y, log=log, log_x=log_x)
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


def bars(path: Path, title: str, heights: Mapping[str, Sequence[float]], *, y: str, log: bool = False) -> None:
    """`path` is a picture: one bar per name at the median over seeds, every seed a point on it."""
    figure, (ax,) = panel_row(1)
    for number, values in enumerate(heights.values()):
        color = COLORS[number % len(COLORS)]
        known = [v for v in values if not np.isnan(v)]
        ax.bar(number, float(np.median(known)) if known else 0.0, color=color, alpha=0.55, width=0.7)
        ax.plot([number] * len(values), values, "o", color=color, markersize=3.5)
        ax.set_xticks(range(len(heights)), list(heights), rotation=20, ha="right", fontsize=8)
    finish(ax, title, "", y, log=log, legend=False)
    save(figure, path)


def panel_row(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * count, 3.9), layout="constrained")  # not by pyplot, which would keep it
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def finish(
    ax: Axes, title: str, x: str, y: str, *, log: bool = False, log_x: bool = False, legend: bool = True
) -> None:
    """Title, labels, scales (logarithmic if anything is positive), a quiet frame, a legend if anything has a name."""
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    if log and np.isfinite(ax.dataLim.minposy):
        ax.set_yscale("log")
    if log_x and np.isfinite(ax.dataLim.minposx):
        ax.set_xscale("log")
    ax.grid(True, color="#e6e8eb", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=QUIET)
    if legend and ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7.5, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """The figure is written, always the same bytes for the same content."""
    options: dict[str, Any] = {"metadata": {"Software": None}} if path.suffix == ".png" else {}
    figure.savefig(path, dpi=110, **options)
