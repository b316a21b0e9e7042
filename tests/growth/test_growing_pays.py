"""Teacher and student: growing beats staying small, GradMax beats random units, and the signs matter."""

from __future__ import annotations

from statistics import median

import pytest

from irgrow.experiments.teacher_student import Task, run_one
from irgrow.ir.errors import UnknownName

SHORT = Task((6, 4, 3), growths=2, every=10, after=10)


def test_silent_units_change_nothing_and_gradmax_goes_its_own_way() -> None:
    small, random, gradmax = (run_one(m, SHORT, 0, record=1) for m in ("small", "random", "gradmax"))
    assert small.losses[:10] == random.losses[:10] == gradmax.losses[:10]
    for grown in (random, gradmax):  # new units say nothing in the step after the growth
        assert grown.losses[10] == pytest.approx(small.losses[10], rel=1e-12)
    assert (small.widths[-1], random.widths[-1], gradmax.widths[-1]) == (2, 4, 4)
    assert random.losses[-1] != small.losses[-1] and gradmax.losses[-1] != small.losses[-1]
    with pytest.raises(UnknownName, match="method 'tall': expected one of small, big"):
        run_one("tall", SHORT, 0)


def final(method: str, sizes: tuple[int, int, int], signs: bool) -> float:
    return median(run_one(method, sizes, seed, signs).final for seed in range(20))


@pytest.mark.slow
def test_twenty_seeds() -> None:
    small, random = (final(m, (10, 10, 10), False) for m in ("small", "random"))
    gradmax = final("gradmax", (10, 10, 10), True)
    assert small > random > gradmax
    chosen, free = (final("gradmax", (20, 10, 10), signs) for signs in (True, False))
    assert 4 * chosen <= free
    print(f"small {small:.4g}, random {random:.4g}, gradmax {gradmax:.4g}; 20:10:10 {chosen:.4g} against {free:.4g}")
