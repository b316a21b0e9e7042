"""A claim: a statement about a number, what was measured for it, and whether it holds.

Measured once per seed, a number is judged by its median and by how far that median is known: the interval between
two order statistics that holds the true median with a probability of at least 90 %. The claim holds if the whole
interval is on the right side of the bound, does not hold if all of it is on the wrong side, and is not established
otherwise. Numbers that are exact (an identity, a count) are given as one value and judged by it alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

HOLDS, FAILS, OPEN = "holds", "does not hold", "not established"
CONFIDENCE = 0.9
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Claim:
    """`statement` (whose: `source`), with the measured median `value`, its spread over `runs`, and the verdict.

    low, high   lowest and highest run; `interval` is where the median lies (90 %)
    paper       what the source prints, as text; empty if it prints no number
    note        what a reader must know: a smaller setting, an explanation of a claim that fails
    """

    name: str
    statement: str
    source: str
    status: str
    value: float
    bound: str
    low: float
    high: float
    interval: tuple[float, float]
    runs: int
    paper: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data; numbers that JSON does not have (nan, inf) as text."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def claim(
    name: str,
    statement: str,
    source: str,
    measured: float | Sequence[float],
    relation: str,
    bound: float,
    *,
    paper: str = "",
    note: str = "",
) -> Claim:
    """The claim that `measured` is `relation` (`<=`, `<`, `>=`, `>`, `==`) `bound`, judged.

    measured: one value per seed, or a single number that is exact. A run that gave no number (nan) counts on the
    wrong side.
    """
    holds = _COMPARE[relation]
    exact = not isinstance(measured, Sequence)
    values = [float(measured)] if exact else [float(v) for v in measured]  # type: ignore[arg-type, union-attr]
    wrong = math.inf if relation in ("<=", "<", "==") else -math.inf
    ordered = sorted(wrong if math.isnan(v) else v for v in values)
    if not ordered:
        nothing = math.nan
        unknown = (nothing, nothing)
        return Claim(
            name, statement, source, OPEN, nothing, f"{relation} {bound:g}", nothing, nothing, unknown, 0, paper, note
        )
    interval = (ordered[0], ordered[0]) if exact else median_interval(ordered)
    ends = [holds(end, bound) for end in interval]
    if not exact and coverage(len(ordered), 0) < CONFIDENCE:
        status = OPEN  # even the whole range says too little about the median
    else:
        status = HOLDS if all(ends) else OPEN if any(ends) else FAILS
    return Claim(
        name,
        statement,
        source,
        status,
        median(ordered),
        f"{relation} {bound:g}",
        ordered[0],
        ordered[-1],
        interval,
        len(ordered),
        paper,
        note,
    )


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics, as many from below as from above, that holds the median at 90 %."""
    inside = 0
    while 2 * (inside + 1) < len(ordered) and coverage(len(ordered), inside + 1) >= CONFIDENCE:
        inside += 1
    return ordered[inside], ordered[-1 - inside]


def coverage(runs: int, inside: int) -> float:
    """The probability that the true median lies between the order statistics `inside` from either end."""
    return 1 - 2 * sum(math.comb(runs, k) for k in range(inside + 1)) / 2**runs


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
