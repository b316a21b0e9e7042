"""Pictures of experiments: nothing is hidden, cut off or refused."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from irgrow.experiments import pictures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved."""
    found: list[Any] = []
    save = pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: (found.append(figure), save(figure, path)))
    return found


def rendered(figure: Any) -> Any:
    """What measures the figure's texts once it is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def test_a_curve_on_another_is_dashed(drawn: list[Any], tmp_path: Path) -> None:
    curves = {"a": ([1, 2, 3], [[1.0, 2.0, 3.0]]), "b": ([1, 2, 3], [[1.0, 2.0, 3.0]]), "c": ([1, 2], [[3.0, 1.0]])}
    pictures.lines(tmp_path / "a.png", [("title", curves)], x="steps", y="loss")
    (ax,) = drawn[0].axes
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "-"]
    drawn[0].canvas.draw()
    low, high = ax.get_xlim()
    assert all(float(tick).is_integer() for tick in ax.get_xticks() if low <= tick <= high)


@pytest.mark.parametrize("count", [5, 6])
def test_long_legends_stand_below(count: int, drawn: list[Any], tmp_path: Path) -> None:
    curves = {f"curve {n}": ([0, 1], [[float(n), 1.0]]) for n in range(count)}
    pictures.lines(tmp_path / "a.png", [("title", curves)], x="steps", y="loss")
    figure = drawn[0]
    (ax,) = figure.axes
    renderer = rendered(figure)
    legend, panel = (part.get_window_extent(renderer) for part in (ax.get_legend(), ax))
    assert (legend.y1 < panel.y0) == (count > 5)
    assert legend.y0 >= 0 and legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


def test_names_of_bars_are_whole(drawn: list[Any], tmp_path: Path) -> None:
    values = {f"a rather long name of run {n}": [10.0**-n, 2 * 10.0**-n] for n in range(14)}
    pictures.bars(tmp_path / "a.png", "title", values, x="loss", log=True)
    figure = drawn[0]
    (ax,) = figure.axes
    renderer = rendered(figure)
    boxes = [label.get_window_extent(renderer) for label in ax.get_yticklabels()]
    assert len(boxes) == 14 and all(box.x0 >= 0 for box in boxes)
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_runs_without_a_number_are_left_out(drawn: list[Any], tmp_path: Path) -> None:
    pictures.bars(tmp_path / "a.png", "title", {"a": [math.nan, 2.0], "b": [math.nan]}, x="sharpness", log=True)
    pictures.bars(tmp_path / "b.png", "title", {"a": [math.nan], "b": []}, x="sharpness", log=True)
    assert [len(line.get_xdata()) for line in drawn[0].axes[0].lines] == [1, 2, 0]
    assert drawn[1].axes[0].get_xscale() == "linear"


def test_many_panels_stand_in_rows() -> None:
    figure, axes = pictures.panel_row(5)
    assert len(axes) == 5 and [ax.get_subplotspec().rowspan.start for ax in axes] == [0, 0, 0, 1, 1]
    assert figure.get_figwidth() <= 12
