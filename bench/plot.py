"""The roofline plot: every row that says what it must compute and move, under what this machine can do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.suite import Row
from bench.timing import Roof

# One colour and one mark per op; told apart without colour too.
_MARKS = "osD^vP*X<>"


def roofline(rows: Sequence[Row], path: Path, *, roof: Roof | None = None) -> Path | None:
    """The picture is at `path` (PNG or SVG by its name); None where no row has a cost.

    Across: flops per byte that must be moved. Up: flops per second reached. The slanted lines are the measured
    bandwidths of main memory and of the second-level cache, the flat one the best measured matrix product.
    """
    shown = [row for row in rows if row.flops and row.bytes and row.ours_ms and not row.failed]
    if not shown:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    roof = roof or Roof(shown[0].device)
    figure, axes = pyplot.subplots(figsize=(10, 6.2), layout="constrained")
    across = [row.flops / row.bytes for row in shown if row.flops and row.bytes]
    left, right = min(0.1, min(across) / 2), max(1000.0, 2 * max(across))
    peak = roof.flops()
    for bandwidth, name, style in (
        (roof.memory, "main memory", "-"),
        (roof.bandwidth(2**19), "cache", "--"),
    ):
        knee = peak / bandwidth
        axes.plot([left, knee], [left * bandwidth / 1e9, peak / 1e9], style, color="black", linewidth=1.2)
        angle_at = left * 1.3
        axes.annotate(
            f"{name}: {bandwidth / 1e9:.0f} GB/s",
            (angle_at, angle_at * bandwidth / 1e9),
            rotation=0,
            fontsize=8,
            xytext=(4, -10),
            textcoords="offset points",
        )
    axes.plot([peak / roof.bandwidth(2**19), right], [peak / 1e9] * 2, color="black", linewidth=1.2)
    axes.annotate(
        f"matrix product, float32: {peak / 1e9:.0f} Gflop/s",
        (right, peak / 1e9),
        ha="right",
        xytext=(-4, 5),
        textcoords="offset points",
        fontsize=8,
    )
    names = list(dict.fromkeys(row.name for row in shown))
    colours = pyplot.get_cmap("tab10")
    for n, name in enumerate(names):
        mine = [row for row in shown if row.name == name]
        axes.scatter(
            [row.flops / row.bytes for row in mine if row.flops and row.bytes],
            [row.flops / row.ours_ms / 1e6 for row in mine if row.flops and row.ours_ms],
            marker=_MARKS[n % len(_MARKS)],
            color=colours(n % 10),
            s=42,
            alpha=0.85,
            edgecolors="white",
            linewidths=0.6,
            label=name or "case",
            zorder=3,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        xlabel="flops per byte that must be moved",
        ylabel="Gflop/s reached",
        title="irgrow under the measured roof of this machine",
    )
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.text(0, -0.13, shown[0].machine, transform=axes.transAxes, fontsize=7, color="gray")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
