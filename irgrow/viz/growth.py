"""`growth_plot(events, path)`: how a network trained and grew, as one figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from irgrow.ir.errors import BadData, BadFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS, ACCURACY = "#2b6cb0", "#d1620b"
GROUPS = ("#0b8562", "#b4559c", "#2b87d3", "#c98a00", "#6b4fbb", "#7a7f87")
MARK, INK, QUIET = "#b9bfc7", "#30363d", "#6b737c"
Series = list[tuple[float, float]]


def growth_plot(events: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """`path` (.png, .svg, .pdf) is the figure: loss, test accuracy and widths over epochs, growths as thin lines.

    Each event has `event` ("epoch" or "growth") and `epoch`; of an epoch `train_loss`, `test_accuracy` (from 0
    to 1), `widths` ({group: units}), `parameters`, `seconds`; of a growth `site`, `predicted_gain`,
    `measured_gain` and `widths`. What is missing, None or not finite is left out, and a panel without data
    too. Raises BadData for events it cannot read, BadFile if the figure cannot be written.
    """
    drawn = _figure(events, title)
    try:
        drawn.savefig(path)
    except OSError as error:
        raise BadFile(f"drawing to {path}", error.strerror, "a file that can be written") from error
    except ValueError as error:
        raise BadFile(f"drawing to {path}", str(error), "a name that ends in .png, .svg or .pdf") from None


def _figure(events: Sequence[Mapping[str, Any]], title: str | None) -> Figure:
    """The figure; its panels are those that have data."""
    for n, event in enumerate(events):
        if (
            not isinstance(event, Mapping)
            or event.get("event") not in ("epoch", "growth")
            or _number(event, "epoch") is None
        ):
            raise BadData(
                f"growth_plot: event {n}", f"{event!r:.80}", "event='epoch' or 'growth', and a number `epoch`"
            )
    epochs = [e for e in events if e["event"] == "epoch"]
    growths = [e for e in events if e["event"] == "growth"]
    panels: list[tuple[str, float]] = []
    loss, accuracy = _series(epochs, "train_loss"), _series(epochs, "test_accuracy", 100.0)
    predicted, measured = _series(growths, "predicted_gain"), _series(growths, "measured_gain")
    widths = _widths(events)
    for name, data, height in (
        ("loss", loss, 1.5),
        ("accuracy", accuracy, 1.5),
        ("widths", widths, 1.2),
        ("gains", predicted or measured, 0.9),
    ):
        if data:
            panels.append((name, height))
    if not panels:
        raise BadData("growth_plot", f"{len(events)} events without any numbers", "losses, accuracies or widths")

    from matplotlib.figure import Figure

    total = sum(height for _, height in panels)
    figure = Figure(figsize=(8.6, 1.5 + 1.25 * total), dpi=144, facecolor="white")
    grid = figure.add_gridspec(
        len(panels), 1, height_ratios=[h for _, h in panels], hspace=0.16, left=0.095, right=0.86,
        top=1 - 0.72 / (1.5 + 1.25 * total), bottom=0.55 / (1.5 + 1.25 * total),
    )  # fmt: skip
    first: Axes | None = None
    for row, (name, _) in enumerate(panels):
        axes = figure.add_subplot(grid[row], sharex=first)
        first = first or axes
        _dress(axes, last=row == len(panels) - 1)
        for growth in growths:
            axes.axvline(float(growth["epoch"]), color=MARK, linewidth=0.8, zorder=0)
        if name == "loss":
            _draw_loss(axes, loss)
        elif name == "accuracy":
            _draw_accuracy(axes, accuracy)
        elif name == "widths":
            _draw_widths(axes, widths)
        else:
            _draw_gains(axes, predicted, measured)
    assert first is not None
    ends = [float(e["epoch"]) for e in events]
    left, right = min(ends) - 1, max(ends)  # values of epoch n stand at n, its end
    first.set_xlim(left, right + 0.01 * (right - left))
    head = 1 - 0.26 / (1.5 + 1.25 * total)
    figure.text(0.095, head, title or "Training and growth", fontsize=12, weight="bold", color=INK, va="center")
    figure.text(
        0.095, head - 0.22 / (1.5 + 1.25 * total), _summary(epochs, growths), fontsize=8.5, color=QUIET, va="center"
    )
    return figure


# ---- panels ---------------------------------------------------------------------------------------------------


def _draw_loss(axes: Axes, loss: Series) -> None:
    x, y = zip(*loss, strict=True)
    axes.plot(x, y, color=LOSS, linewidth=1.7, marker="o" if len(x) < 3 else None, markersize=4)
    axes.set_ylabel("train loss")
    if min(y) > 0 and max(y) / min(y) > 20:
        axes.set_yscale("log")
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        few = max(y) / min(y) < 1000
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=min(0.0, min(y)))
    _label_ends(axes, [(x[-1], y[-1], f"{y[-1]:.3g}", LOSS)])


def _draw_accuracy(axes: Axes, accuracy: Series) -> None:
    x, y = zip(*accuracy, strict=True)
    axes.plot(x, y, color=ACCURACY, linewidth=1.7, marker="o" if len(x) < 3 else None, markersize=4)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(top=min(101.0, max(y) + 0.08 * (max(y) - min(y) or 10.0)))
    _label_ends(axes, [(x[-1], y[-1], f"{y[-1]:.1f} %", ACCURACY)])


def _draw_widths(axes: Axes, widths: dict[str, Series]) -> None:
    from matplotlib.ticker import MaxNLocator

    labels = []
    for n, (group, series) in enumerate(widths.items()):
        x, y = zip(*series, strict=True)
        colour = GROUPS[n % len(GROUPS)]
        axes.step(x, y, where="post", color=colour, linewidth=1.7)
        labels.append((x[-1], y[-1], f"{group} {y[-1]:.0f}", colour))
    axes.set_ylabel("units")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    _label_ends(axes, labels)


def _draw_gains(axes: Axes, predicted: Series, measured: Series) -> None:
    labels = []
    axes.axhline(0.0, color=MARK, linewidth=0.8, zorder=0)
    for series, name, face, size in ((predicted, "predicted", "white", 30), (measured, "measured", GROUPS[4], 15)):
        if series:
            x, y = zip(*series, strict=True)
            axes.scatter(x, y, s=size, facecolors=face, edgecolors=GROUPS[4], linewidths=1.2, zorder=3)
            labels.append(name)
    axes.set_ylabel("gain in loss")
    axes.margins(y=0.18)
    # Beside the panel, each behind its symbol.
    for n, name in enumerate(labels):
        at = 0.62 - 0.24 * n
        face = "white" if name == "predicted" else GROUPS[4]
        axes.scatter(
            [1.025], [at], s=22, facecolors=face, edgecolors=GROUPS[4], linewidths=1.2, transform=axes.transAxes,
            clip_on=False,
        )  # fmt: skip
        axes.text(1.04, at, name, fontsize=8.5, color=INK, va="center", transform=axes.transAxes)


def _dress(axes: Axes, *, last: bool) -> None:
    """The same quiet look for every panel; epochs are written under the last one."""
    from matplotlib.ticker import MaxNLocator

    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MARK)
    axes.tick_params(colors=QUIET, labelsize=8.5, which="both", length=3)
    axes.tick_params(axis="x", labelbottom=last)
    axes.yaxis.label.set_color(INK)
    axes.yaxis.label.set_fontsize(9)
    axes.yaxis.set_label_coords(-0.075, 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    if last:
        axes.set_xlabel("epoch", fontsize=9, color=INK)


def _label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Final values beside the ends of their lines, moved apart where they would touch."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    height = axes.get_window_extent().height
    heights = [float(axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]) for x, y, _, _ in labels]
    apart = min(11 * axes.figure.dpi / 72 / height, 1.0 / max(1, len(labels)))
    order = sorted(range(len(labels)), key=heights.__getitem__)
    placed: dict[int, float] = {}
    for n in order:
        placed[n] = max(heights[n], placed[order[order.index(n) - 1]] + apart if placed else heights[n])
    over = max(placed.values()) - max(1.0, max(heights)) if placed else 0.0
    for n, (_, _, text, colour) in enumerate(labels):
        axes.text(
            1.012, placed[n] - max(0.0, over), text, transform=axes.transAxes, color=colour, fontsize=9, weight="bold",
            va="center",
        )  # fmt: skip


# ---- events ---------------------------------------------------------------------------------------------------


def _number(event: Mapping[str, Any], key: str) -> float | None:
    value = event.get(key)
    if value is None or isinstance(value, (str, bool)):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if isfinite(found) else None


def _series(events: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> Series:
    found = [(float(e["epoch"]), _number(e, key)) for e in events]
    return [(x, factor * y) for x, y in found if y is not None]


def _widths(events: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Units over epochs, of the groups that grew; of all if none did."""
    found: dict[str, Series] = {}
    for event in events:
        for group, units in (event.get("widths") or {}).items():
            found.setdefault(str(group), []).append((float(event["epoch"]), float(units)))
    last = max((float(e["epoch"]) for e in events), default=0.0)
    for series in found.values():
        series.insert(0, (series[0][0] - 1, series[0][1]))
        series.append((last, series[-1][1]))
    grown = {group: series for group, series in found.items() if len({y for _, y in series}) > 1}
    return grown or found


def _summary(epochs: Sequence[Mapping[str, Any]], growths: Sequence[Mapping[str, Any]]) -> str:
    facts = [f"{len(epochs)} epoch{'s' * (len(epochs) != 1)}"]
    if growths:
        facts.append(f"{len(growths)} growths (thin lines)" if len(growths) > 1 else "1 growth (thin line)")
    parameters = [p for e in epochs if (p := _number(e, "parameters")) is not None]
    if parameters:
        same = parameters[0] == parameters[-1]
        facts.append(f"{parameters[0]:,.0f} " + ("parameters" if same else f"→ {parameters[-1]:,.0f} parameters"))
    for name, some in (("training", epochs), ("growing", growths)):
        seconds = [s for e in some if (s := _number(e, "seconds")) is not None]
        if seconds:
            facts.append(f"{sum(seconds):,.{0 if sum(seconds) >= 10 else 1}f} s {name}")
    return " · ".join(facts)
