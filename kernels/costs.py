"""What multiplying by a matrix of which some entries exist takes on a CPU, by route: measured constants.

`irgrow bench routes` measures them again and prints this table. float32; float64 takes twice as long by every route.

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
    ("walk", False): Cost(20e3, 0.5, 0.037, 0.0, 0.0, 0.1),
    ("walk", True): Cost(60e3, 2.8, 0.120, 0.0, 0.0, 0.3),
    ("sparse", False): Cost(25e3, 0.5, 0.037, 0.0, 0.0, 0.1),
    ("sparse", True): Cost(80e3, 2.8, 0.120, 0.0, 0.0, 0.3),
    ("dense", False): Cost(25e3, 1.0, 0.0, 0.6, 0.0115, 0.1),
    ("dense", True): Cost(100e3, 2.5, 0.0, 1.0, 0.033, 0.3),
    ("blocks", False): Cost(30e3, 1.0, 0.0, 0.1, 0.0115, 0.1),
    ("blocks", True): Cost(100e3, 2.5, 0.0, 0.3, 0.033, 0.3),
}


def features(route: str, size: Size) -> tuple[float, ...]:
    """What each constant of a `Cost` is multiplied with."""
    batch = size.batch if size.batch < 2 and route in ("walk", "sparse") else -(-size.batch // LINE) * LINE
    entries = {"dense": size.rows * size.columns, "blocks": size.entries}.get(route, 0)
    values = (size.rows + size.columns) * batch
    return 1.0, size.edges, size.edges * batch, entries, entries * batch, values


def estimate(route: str, size: Size, *, training: bool, calls: bool = True) -> float:
    """Nanoseconds by this route, with the backward pass if `training`; without the call itself unless `calls`."""
    first, *rest = (c * f for c, f in zip(astuple(COSTS[route, training]), features(route, size), strict=True))
    return (first if calls else 0.0) + sum(rest)
