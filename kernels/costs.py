"""What multiplying by a matrix of which some entries exist takes on a CPU, by route: measured constants.

`python -m bench.routes` measures them again and prints this table. float32; float64 takes twice as long by every route.

    walk       together with other rows in one region (walk.py)
    sparse     entry by entry, as a call of its own (masked_matmul.py)
    dense      scattered into a full matrix (masked_matmul.py)
    blocks     scattered into the square blocks that hold an entry (block_sparse.py)
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import NamedTuple

LINE = 16  # columns that are computed at once: a batch costs as much as one of whole lines, but for a single column


class Size(NamedTuple):
    """A matrix and what it multiplies: `entries` are those that blocks hold, existing or not."""

    rows: int
    columns: int
    edges: int
    batch: int
    entries: int = 0


@dataclass(frozen=True)
class Cost:
    """Nanoseconds: for a call, per edge and entry (once, and per column of the batch), per value and column."""

    call: float
    edge: float
    edge_column: float
    entry: float
    entry_column: float
    value_column: float


# (route, with the backward pass)
COSTS = {
    ("walk", False): Cost(19.5e3, 0.38, 0.03, 0, 0, 0.7),
    ("walk", True): Cost(110e3, 2.35, 0.1, 0, 0, 1.8),
    ("sparse", False): Cost(28.8e3, 0.365, 0.0315, 0, 0, 0.48),
    ("sparse", True): Cost(138e3, 2.15, 0.105, 0, 0, 1.7),
    ("dense", False): Cost(52e3, 0.7, 0, 0.3, 0.0135, 0.1),
    ("dense", True): Cost(162e3, 2.0, 0, 0.6, 0.047, 0.4),
    ("blocks", False): Cost(47e3, 0.4, 0, 0.47, 0.0235, 0.6),
    ("blocks", True): Cost(130e3, 2.0, 0, 0.7, 0.065, 1.5),
}


def features(route: str, size: Size) -> tuple[float, ...]:
    """What each constant of a `Cost` is multiplied with."""
    batch = size.batch if size.batch < 2 and route in ("walk", "sparse") else -(-size.batch // LINE) * LINE
    by_edge = size.edges * batch if route in ("walk", "sparse") else 0
    entries = {"dense": size.rows * size.columns, "blocks": size.entries}.get(route, 0)
    values = (size.rows + size.columns) * batch
    return 1.0, size.edges, by_edge, entries, entries * batch, values


def estimate(route: str, size: Size, *, training: bool) -> float:
    """Nanoseconds by this route, with the backward pass if `training`."""
    return sum(c * f for c, f in zip(astuple(COSTS[route, training]), features(route, size), strict=True))
