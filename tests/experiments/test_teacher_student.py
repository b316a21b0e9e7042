"""Teacher and student: known answers about the task, its methods and its figures, at a tiny size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import irgrow as ig
from irgrow.experiments import gradmax_figures
from irgrow.experiments.teacher_student import METHODS, RandomFanOut, Task, data, network, run_one
from irgrow.ir.errors import UnknownName

SMALL = Task((4, 4, 3), growths=2, every=4, after=4, samples=30)


@pytest.mark.parametrize("kind", ["dense", "conv", "norm"])
@pytest.mark.parametrize("method", [m for m in METHODS if m != "inverse"])  # the slow one: see the experiment below
def test_every_method_grows_every_student(method: str, kind: str) -> None:
    task = replace(SMALL, kind=kind)
    run = run_one(method, task, 0, True, record=1)
    width = {"small": 2, "big": 4}.get(method, 4 - len(run.notes))
    assert run.steps == list(range(13))
    assert run.widths[-1] == width
    assert len(run.notes) == 0 or method == "splitting"
    assert run.losses[-1] < run.losses[0]
    assert len(run.gains) == {"small": 0, "big": 0}.get(method, 2 - len(run.notes))


def test_a_student_with_the_teachers_weights_has_no_loss() -> None:
    x, y = data(SMALL, 3)
    teacher = ig.compile(network(SMALL.sizes, seed=10_003, bound=1.0))
    assert F.mse_loss(teacher(x), y).item() == 0.0
    assert float(teacher.tensors()["weight.x_hidden"].abs().max()) <= 1.0


def test_equal_runs_are_equal_and_signs_are_a_choice() -> None:
    plain = [run_one("gradmax", SMALL, 1, False).losses for _ in range(2)]
    assert plain[0] == plain[1]
    assert (
        run_one("gradmax", SMALL, 1, True, record=1).losses[:5]
        == run_one("gradmax", SMALL, 1, False, record=1).losses[:5]
    )


def test_growing_keeps_the_loss_where_units_are_silent() -> None:
    for method in ("random", "random fan-out", "gradmax"):
        run = run_one(method, SMALL, 2, True, record=1)
        never = run_one("small", SMALL, 2, record=1)
        assert run.losses[4] == pytest.approx(never.losses[4], rel=1e-12)


def test_costs() -> None:
    task = Task(samples=5, every=20, after=50)
    big, grown = (run_one(m, task, 0, record=500) for m in ("big", "random"))
    assert big.multiply_adds == 3 * 150 * 5 * 300
    assert grown.multiply_adds / big.multiply_adds == pytest.approx(0.8)


def test_no_random_unit_has_a_larger_gradient_than_gradmax() -> None:
    batch = data(SMALL, 0)
    model = ig.compile(network((4, 2, 3), seed=0))
    statistics = ig.probe(model, batch, F.mse_loss, want=("M_prev",))["hidden"]
    most = ig.GradMax(1).propose(statistics)
    drawn = [RandomFanOut(1, seed=n).propose(statistics) for n in range(20)]
    assert all(p.predicted_gain < most.predicted_gain for p in drawn)
    assert all(float(p.omega.norm()) == pytest.approx(float(most.omega.norm())) for p in drawn)


def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match="method 'guess': expected one of small, big"):
        run_one("guess", SMALL, 0)
    with pytest.raises(UnknownName, match="task kind 'round': expected one of dense"):
        Task(kind="round")


# ---- the figures ----------------------------------------------------------------------------------------------


def test_singular_vectors_one_by_one_are_those_of_gradmax() -> None:
    statistics = ig.probe(ig.compile(network((4, 2, 3), seed=0)), data(SMALL, 0), F.mse_loss, want=("M_prev",))[
        "hidden"
    ]
    whole = ig.GradMax(3).propose(statistics)
    for n in range(3):
        one = gradmax_figures.Vector(n).propose(statistics)
        assert torch.allclose(one.omega[:, 0].abs(), whole.omega[:, n].abs(), atol=1e-12)
        assert float(one.singular_values[0]) == pytest.approx(float(whole.singular_values[n]))


def test_matched_tasks_cost_the_same() -> None:
    most = gradmax_figures.budget()
    assert most == run_one("random", replace(gradmax_figures.TASK, samples=10), 0, record=500).multiply_adds * 100
    for name, (_, task) in gradmax_figures.variants().items():
        if name.startswith(("first", "seed")):
            widths = [task.seed_width + n for n in range(task.growths + 1)]
            steps = [task.moments[0], *[task.every] * (task.growths - 1), task.after]
            cost = 3 * 30 * 1000 * sum(w * s for w, s in zip(widths, steps, strict=True))
            assert 0 <= most - cost < 3 * 30 * 1000 * widths[-1], name


def test_all_data_finds_its_own_singular_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradmax_figures, "TASK", replace(SMALL, samples=1000))
    found = gradmax_figures.from_checkpoints(0, steps=11, draws=2)
    for overlaps in found["overlaps"]:
        assert overlaps[-1] == pytest.approx([1.0, 0.6], abs=1e-9)  # three outputs: three of five directions
        assert overlaps[0][0] <= 1.0
    assert all(d[0] == pytest.approx(0.0, abs=1e-12) for d in found["differences"])  # nothing has changed yet
    for most, drawn in zip(found["norms"]["gradmax"], found["norms"]["random fan-out"], strict=True):
        assert max(drawn) <= most[0]


def test_the_correlation_is_that_of_the_textbook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradmax_figures, "TASK", replace(SMALL, sizes=(6, 4, 6)))
    found = gradmax_figures.long_term(0, 2, 20)
    import numpy as np

    last = [one[-1] for one in found["losses"]]
    assert found["pearson"][-1] == pytest.approx(np.corrcoef(found["values"], last)[0, 1])
