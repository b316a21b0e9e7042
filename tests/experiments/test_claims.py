"""Claims are judged by where the median lies, not by one lucky number."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest

from irgrow.experiments.claims import FAILS, HOLDS, OPEN, claim, coverage, median_interval


def judged(measured, relation: str, bound: float) -> str:
    return claim("c", "a statement", "a source", measured, relation, bound).status


@pytest.mark.parametrize(
    ("measured", "relation", "bound", "status"),
    [
        ([1.0] * 10, "<=", 1.0, HOLDS),
        ([1.0] * 10, "<", 1.0, FAILS),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "<=", 5.0, HOLDS),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "<=", 4.0, OPEN),
        ([1.0, 2.0, 3.0, 4.0, 5.0], ">", 5.5, FAILS),
        ([1.0, 1.0, 1.0], "<=", 2.0, OPEN),  # three runs: the median may be anywhere
        ([math.nan] * 6, ">=", 0.0, FAILS),
        ([math.nan] * 6, "<=", 0.0, FAILS),
        ([], "<=", 0.0, OPEN),
        (0.0, "==", 0.0, HOLDS),
        (1e-16, "==", 0.0, FAILS),
        (0.5, "<=", 0.4, FAILS),
    ],
)
def test_verdicts(measured, relation: str, bound: float, status: str) -> None:
    assert judged(measured, relation, bound) == status


def test_a_verdict_does_not_hang_on_one_run() -> None:
    assert judged([0.1] * 19 + [9.0], "<=", 1.0) == HOLDS
    assert judged([0.1] * 11 + [9.0] * 9, "<=", 1.0) == OPEN


@pytest.mark.parametrize("runs", range(1, 9))
def test_coverage_counts_the_ways_runs_can_fall(runs: int) -> None:
    """Each run is below the median or above it, with equal chances: all 2^runs cases, counted."""
    for inside in range((runs + 1) // 2):
        missed = 0
        for case in product((False, True), repeat=runs):
            below = sum(case)
            missed += below <= inside or runs - below <= inside
        assert coverage(runs, inside) == pytest.approx(1 - missed / 2**runs)


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = median_interval(sorted(draw.exponential(size=11)))
        hits += low <= math.log(2) <= high
    assert 0.9 <= hits / 2000 <= 0.97  # 11 runs: 93.5 %


def test_a_claim_is_plain_data() -> None:
    found = claim("c", "s", "p", [math.nan, 1.0, 2.0, 3.0, 4.0], "<=", 2.0, paper="2.0").as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["high"] == "inf"
