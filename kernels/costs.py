"""What multiplying by a matrix of which some entries exist takes on a CPU, by route: measured constants.

`python -m bench.routes` measures them again and prints this table. float32; float64 takes twice as long by every route.

    walk       together with other rows in one region (walk.py)
    sparse     entry by entry, as a call of its own (masked_matmul.py)
    dense      scattered into a full matrix (masked_matmul.py)
    blocks     scattered into the square blocks that hold an entry (block_sparse.py)
"""

from __future__ import annotations

from typing import NamedTuple

LINE = 16  # columns that are computed at once: a batch costs as much as one of whole lines, but for a single column
NEAR = 250_000  # edges whose weights and their places fit the cache of a core


class Size(NamedTuple):
    """A matrix and what it multiplies: `entries` are those that blocks hold, existing or not."""

    rows: int
    columns: int
    edges: int
    batch: int
    entries: int = 0


class Cost(NamedTuple):
    """Nanoseconds: for a call, per edge and entry (once, and per column of the batch), per value and column.

    `far_edge` comes on top for each edge beyond NEAR.
    """

    call: float
    edge: float
    edge_column: float
    entry: float
    entry_column: float
    value_column: float
    far_edge: float


# (route, with the backward pass)
COSTS = {
    ("walk", False): Cost(2.42e04, 0.423, 0.0178, 0, 0, 0.581, 0),
    ("walk", True): Cost(1.25e05, 2.34, 0.0572, 0, 0, 2.05, 0.829),
    ("sparse", False): Cost(4.5e04, 0.764, 0.0117, 0, 0, 0.379, 0),
    ("sparse", True): Cost(1.65e05, 2.61, 0.0408, 0, 0, 1.24, 0),
    ("dense", False): Cost(4.7e04, 0.793, 0, 0.605, 0.00958, 0.64, 0),
    ("dense", True): Cost(1.54e05, 2.09, 0, 0.897, 0.0392, 2.64, 0),
    ("blocks", False): Cost(8.78e04, 0.482, 0, 0, 0.0103, 1.2, 0),
    ("blocks", True): Cost(2.52e05, 1.69, 0, 0, 0.0248, 3.09, 0),
}


def features(route: str, size: Size) -> tuple[float, ...]:
    """What each constant of a `Cost` is multiplied with."""
    batch = size.batch if size.batch < 2 and route in ("walk", "sparse") else -(-size.batch // LINE) * LINE
    by_edge = size.edges * batch if route in ("walk", "sparse") else 0
    entries = {"dense": size.rows * size.columns, "blocks": size.entries}.get(route, 0)
    values = (size.rows + size.columns) * batch
    return 1.0, size.edges, by_edge, entries, entries * batch, values, max(0, size.edges - NEAR)


def estimate(route: str, size: Size, *, training: bool) -> float:
    """Nanoseconds by this route, with the backward pass if `training`."""
    return sum(c * f for c, f in zip(COSTS[route, training], features(route, size), strict=True))
