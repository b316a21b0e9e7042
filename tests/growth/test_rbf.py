"""Firefly's toy: new neurons get further than splits."""

from __future__ import annotations

from statistics import mean, median

import pytest
import torch

from irgrow.experiments.rbf import METHODS, compare, run, student, teacher
from irgrow.ir.errors import UnknownName


def test_teacher_and_student() -> None:
    x, y = teacher(3)
    assert x.shape == y.shape == (1000, 1) and float(x.min()) >= -5 and float(x.max()) <= 5
    assert torch.equal(y, teacher(3)[1]) and not torch.equal(y, teacher(4)[1])
    theta = torch.cat([teacher(s, neurons=1)[1].abs().max().reshape(1) for s in range(200)])
    assert 0.5 < float(theta.square().mean()) < 3.0  # |w| sigma(..) at most |w|, of variance 3
    assert student(0).counts.parameters == 3


def test_new_neurons_get_further_than_splits() -> None:
    new, split = (run(how, 9, iterations=400).errors for how in ("firefly", "firefly, splits only"))
    assert len(new) == 10 and new[-1] < 1e-3 and split[-1] > 1e-1
    assert new[-1] < new[4] < new[0]
    with pytest.raises(UnknownName, match="method 'scratch': expected one of firefly"):
        run("scratch", 0)


@pytest.mark.slow
def test_figures_of_ten_teachers() -> None:
    new = [run("firefly", seed).errors[-1] for seed in range(10)]
    split = [run("firefly, splits only", seed).errors[-1] for seed in range(10)]
    assert median(new) <= 1e-4
    assert median(split) >= 1e-2 and mean(split) >= 1e-2


def test_compare() -> None:
    table = compare(seeds=[0], neurons=2, iterations=20)
    assert set(table) == set(METHODS) and all(0 < m == a < 2 for m, a in table.values())
