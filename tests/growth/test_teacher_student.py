"""Teacher and student: growing beats staying small, GradMax beats random units, and the signs matter."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from irgrow.experiments.teacher_student import GROWN, METHODS, compare, run, table, teacher
from irgrow.ir.errors import UnknownName


def test_the_teacher() -> None:
    x, y = teacher(3, (20, 10, 5))
    assert x.shape == (1000, 20) and y.shape == (1000, 5)
    assert torch.equal(y, teacher(3, (20, 10, 5))[1]) and not torch.equal(y, teacher(4, (20, 10, 5))[1])
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05


def test_one_short_run_of_every_method() -> None:
    found = {m: run(m, 0, geometry=(6, 4, 3), every=10, after=10) for m in METHODS}
    for method, result in found.items():
        assert result.growths == (2 if method in GROWN else 0) and len(result.losses) == 31
        assert result.final < result.losses[0]
    assert found["gradmax"].losses[:10] == found["random"].losses[:10]  # the same beginning
    assert found["random"].losses[10] == pytest.approx(found["small"].losses[10], rel=1e-12)  # silent at first
    with pytest.raises(UnknownName, match="method 'tall': expected one of small, big"):
        run("tall", 0)
    assert "median" in table(compare(["small"], [0], geometry=(2, 2, 2)))


@pytest.mark.slow
def test_twenty_seeds() -> None:
    found = compare(["small", "random", "gradmax"])
    small, random, gradmax = (median(found[m]) for m in ("small", "random", "gradmax"))
    assert small > random > gradmax
    signs = compare(["gradmax", "gradmax, signs as they come"], geometry=(20, 10, 10))
    chosen, free = (median(losses) for losses in signs.values())
    assert 4 * chosen <= free
