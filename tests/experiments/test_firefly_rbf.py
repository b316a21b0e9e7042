"""Firefly's toy: new neurons get further than splits."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

import pytest
import torch

from irgrow.experiments.firefly_rbf import METHODS, grown, run, student, teacher
from irgrow.experiments.reproduce import Setting
from irgrow.ir.errors import UnknownName


def test_teacher_and_student() -> None:
    x, y = teacher(3)
    assert x.shape == y.shape == (1000, 1) and float(x.min()) >= -5 and float(x.max()) <= 5
    assert torch.equal(y, teacher(3)[1]) and not torch.equal(y, teacher(4)[1])
    theta = torch.cat([teacher(s, neurons=1)[1].abs().max().reshape(1) for s in range(200)])
    assert 0.5 < float(theta.square().mean()) < 3.0  # |w| sigma(..) at most |w|, of variance 3
    assert student(0).counts.parameters == 3


def test_new_neurons_get_further_than_splits() -> None:
    new, split = (grown(how, 9, iterations=400).errors for how in ("firefly", "firefly, splits only"))
    assert len(new) == 10 and new[-1] < 1e-3 and split[-1] > 1e-1
    assert new[-1] < new[4] < new[0]
    with pytest.raises(UnknownName, match="method 'wishing': expected one of firefly"):
        grown("wishing", 0)


def test_every_method_grows() -> None:
    for method in METHODS:
        found = grown(method, 1, neurons=3, iterations=10)
        assert found.neurons[-1] == 3 or found.notes
        assert found.errors[-1] < found.errors[0], method


def test_the_experiment(tmp_path: Path) -> None:
    findings = run(Setting((0, 1), tmp_path, progress=False), iterations=5, neurons=2)
    assert [c.name for c in findings.claims] == ["new", "splits", "descent", "search", "one", "scratch"]
    assert {c.status for c in findings.claims} == {"not established"}  # two seeds settle nothing
    assert len(findings.rows) == 7 and all(row[4] in (1, 2) for row in findings.rows)
    assert (tmp_path / "errors.png").stat().st_size > 5000


@pytest.mark.slow
def test_figures_of_ten_teachers() -> None:
    new = [grown("firefly", seed, iterations=3000).errors[-1] for seed in range(10)]
    split = [grown("firefly, splits only", seed, iterations=3000).errors[-1] for seed in range(10)]
    assert median(new) <= 1e-4
    assert median(split) >= 1e-2 and mean(split) >= 1e-2
