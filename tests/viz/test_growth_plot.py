"""The growth figure: what is in the events is in the panels, and labels keep off the data."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest

from irgrow.ir import errors
from irgrow.viz import growth_plot
from irgrow.viz.growth import _figure

Events = list[dict[str, Any]]


def made_up(epochs: int = 12, every: int = 3, groups: tuple[str, ...] = ("hidden",), final: float = 0.4) -> Events:
    widths, events = dict.fromkeys(groups, 4), []
    for epoch in range(1, epochs + 1):
        loss = final + 2 * math.exp(-epoch / 3)
        events.append(
            {
                "event": "epoch",
                "epoch": epoch,
                "train_loss": loss,
                "test_accuracy": 1 - 0.3 * loss,
                "widths": dict(widths),
                "parameters": 100 * sum(widths.values()),
                "seconds": 0.5,
            }
        )
        if epoch % every == 0 and epoch < epochs:
            site = groups[epoch // every % len(groups)]
            widths[site] += 4
            gains = {"predicted_gain": 0.1 / epoch, "measured_gain": 0.08 / epoch}
            events.append(
                {"event": "growth", "epoch": epoch, "site": site, "widths": dict(widths), "seconds": 0.1, **gains}
            )
    return events


def words(events: Events) -> list[str]:
    figure = _figure(events, None)
    found = [text.get_text() for text in figure.texts]
    return found + [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_figure_is_written(tmp_path: Path) -> None:
    for name in ("growth.png", "growth.svg", "growth.pdf"):
        growth_plot(made_up(), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    raw = (tmp_path / "growth.png").read_bytes()
    assert raw.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", raw[16:24])
    assert 1000 < width < 1600 and 700 < height < 1600


def test_panels_hold_the_numbers() -> None:
    events = made_up()
    figure = _figure(events, "a run")
    loss, accuracy, widths, gains = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["train loss", "test accuracy, %", "units", "gain in loss"]
    curve = max(loss.lines, key=lambda line: len(line.get_xdata()))
    assert list(curve.get_xdata()) == list(range(1, 13))
    assert list(curve.get_ydata()) == [e["train_loss"] for e in events if e["event"] == "epoch"]
    growths = {line.get_xdata()[0] for line in accuracy.lines if len(line.get_xdata()) == 2}
    assert growths == {3.0, 6.0, 9.0}
    step = max(widths.lines, key=lambda line: len(line.get_xdata()))
    by_epoch = dict(zip(step.get_xdata(), step.get_ydata(), strict=True))  # the last value at each epoch
    assert (by_epoch[0.0], by_epoch[2.0], by_epoch[3.0], by_epoch[12.0]) == (4, 4, 8, 16)
    assert len(gains.collections) >= 2
    assert "a run" in [text.get_text() for text in figure.texts]


def test_final_values_and_totals_are_written() -> None:
    found = words(made_up())
    assert {"0.437", "86.9 %", "hidden 16", "predicted", "measured"} <= set(found)
    assert any("12 epochs · 3 growths (thin lines) · 400 → 1,600 parameters" in word for word in found)
    assert any("6.0 s training · 0.3 s growing" in word for word in found)


def test_labels_stand_beside_the_data_and_apart() -> None:
    figure = _figure(made_up(24, 2, ("conv1", "conv2", "hidden1", "hidden2")), None)
    figure.draw_without_rendering()
    for axes in figure.axes:
        panel = axes.get_window_extent()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(box.x0 > panel.x1 for box in boxes)
        assert all(box.x1 < figure.bbox.x1 for box in boxes)
        for n, a in enumerate(boxes):
            assert all(a.y0 >= b.y1 - 2 or b.y0 >= a.y1 - 2 for b in boxes[:n])
    assert len(figure.axes[2].texts) == 4


def test_only_groups_that_grow_are_drawn() -> None:
    events = made_up(groups=("a", "b", "c", "d", "e", "f"), epochs=5, every=2)
    labels = [text.get_text() for text in _figure(events, None).axes[2].texts]
    assert sorted(label.split()[0] for label in labels) == ["b", "c"]
    still = [e for e in made_up(groups=("a", "b"), epochs=2, every=9)]
    assert len(_figure(still, None).axes[2].texts) == 2


def test_losses_over_decades_get_a_logarithmic_axis() -> None:
    assert _figure(made_up(60, final=1e-3), None).axes[0].get_yscale() == "log"
    assert _figure(made_up(), None).axes[0].get_yscale() == "linear"


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    events = made_up()
    for event in events:
        event["test_accuracy"] = None
        event.pop("predicted_gain", None)
        event["measured_gain"] = math.nan
    events[2]["train_loss"] = math.inf
    assert [axes.get_ylabel() for axes in _figure(events, None).axes] == ["train loss", "units"]
    growth_plot(events[:1], tmp_path / "one.png")


@pytest.mark.parametrize(
    ("events", "match"),
    [
        ([], "0 events without any numbers"),
        ([{"event": "epoch", "epoch": 1}], "1 events without any numbers"),
        ([{"event": "batch", "epoch": 1}], "event 0: found .*'batch'.*event='epoch' or 'growth'"),
        ([{"event": "epoch"}], "a number `epoch`"),
        (["epoch"], "event 0: found 'epoch'"),
    ],
)
def test_events_that_cannot_be_read(events: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(errors.BadData, match=match):
        growth_plot(events, tmp_path / "growth.png")


def test_places_where_no_figure_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(errors.BadFile, match="No such file"):
        growth_plot(made_up(), tmp_path / "missing" / "growth.png")
    with pytest.raises(errors.BadFile, match=r"ends in \.png"):
        growth_plot(made_up(), tmp_path / "growth.docx")


def test_the_figure_leaves_pyplot_alone() -> None:
    import sys

    _figure(made_up(), None)
    plots = sys.modules.get("matplotlib.pyplot")
    assert plots is None or not plots.get_fignums()
