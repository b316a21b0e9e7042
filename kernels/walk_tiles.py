"""A region's structure cut into tiles for a GPU: beside the plan's own arrays, what each block of rows needs.

A tile is a run of rows of one level, which share no edge, computed at once: `LANES` rows, one edge of each per turn;
or one row with many edges, `LANES` of its edges per turn (its `STEP` is then LANES instead of 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.kernels.graph import compressed_rows
from irgrow.kernels.walk_plan import MAX, Indices, WalkPlan

LANES = 32  # rows of a tile
LONG = 64  # edges of a row that has a tile of its own


class Field(IntEnum):
    """The numbers of one tile."""

    FIRST = 0  # rows first..last-1
    LAST = 1
    STEP = 2  # between the edges of one lane: 1, or LANES where all lanes share a row
    TURNS = 3  # edges of SUM rows that the busiest lane adds up
    MAX_TURNS = 4  # the same for edges of MAX rows
    CODES = 5  # bit c: a row has activation c
    OPENS = 6  # 1 if it is the first tile of its level


FIELDS = 8


@dataclass(frozen=True, eq=False)
class Tiles:
    """One region on one device. All int32."""

    structure: Tensor  # the plan's
    forward: Tensor  # [tiles, FIELDS] over computed rows, in order
    backward: Tensor  # [tiles, FIELDS] over value rows, last level first; those of the inputs at the end
    computed: int  # how many of these are not of inputs
    winner: Tensor  # [neurons] where a MAX row keeps which edge won, or -1
    max_pointer: Tensor  # [rows + 1] the edges of each value row into MAX rows: their children and edge numbers
    max_child: Tensor
    max_edge: Tensor
    # What is summed over the batch: gradient row times value row (-1: times 1). Edges first, then rows with a bias.
    summand_row: Tensor
    summand_column: Tensor
    # and where it goes: totals of weights first, then of biases, each from these summands.
    totals: Tensor  # [tiles, FIELDS]
    total_pointer: Tensor
    total_summand: Tensor


_TILES: WeakKeyDictionary[WalkPlan, dict[torch.device, Tiles]] = WeakKeyDictionary()


def tiles_of(plan: WalkPlan, device: torch.device) -> Tiles:
    """The tiles of a plan there; made once. O(neurons + edges)."""
    on = _TILES.setdefault(plan, {})
    if device not in on:
        on[device] = _cut(plan, device)
    return on[device]


def _cut(plan: WalkPlan, device: torch.device) -> Tiles:
    degree = np.diff(plan.pointer)
    is_max = plan.aggregation == MAX
    bits = np.left_shift(1, plan.code).astype(np.int32)
    forward = _tiles(plan.level_pointer, np.where(is_max, 0, degree), np.where(is_max, degree, 0), bits, is_max)

    row = np.repeat(np.arange(plan.inputs, plan.rows, dtype=np.int32), degree)
    max_edges = np.flatnonzero(np.repeat(is_max, degree))
    max_pointer, order = compressed_rows(plan.column[max_edges], plan.rows)
    max_edges = max_edges[order]
    children = np.diff(plan.child_pointer)[::-1]
    levels = np.concatenate([[0], plan.level_pointer + plan.inputs]) if plan.inputs else plan.level_pointer
    bits = np.concatenate([np.zeros(plan.inputs, np.int32), bits])
    backward = _tiles(levels, children, np.diff(max_pointer), bits, np.zeros(plan.rows, bool))[::-1].copy()
    if len(backward):
        backward[:, Field.OPENS] = np.r_[1, backward[:-1, Field.OPENS]]  # the last tile of a level is its first now

    biased = np.flatnonzero(plan.bias >= 0)
    target = np.concatenate([plan.weight, plan.weights + plan.bias[biased]])
    count = plan.weights + plan.biases
    total_pointer, summands = compressed_rows(target, count)
    whole = np.array([0, count]) if count else np.zeros(1, np.int64)
    nothing = np.zeros(count, np.int64)
    totals = _tiles(whole, np.diff(total_pointer), nothing, nothing, np.zeros(count, bool))

    def there(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array, np.int32)).to(device)

    return Tiles(
        structure=plan.tensor.to(device),
        forward=there(forward),
        backward=there(backward),
        computed=int(np.count_nonzero(backward[:, Field.FIRST] >= plan.inputs)),
        winner=there(np.where(is_max, np.cumsum(is_max) - 1, -1)),
        max_pointer=there(max_pointer),
        max_child=there(row[max_edges]),
        max_edge=there(max_edges),
        summand_row=there(np.concatenate([row, biased + plan.inputs])),
        summand_column=there(np.concatenate([plan.column, np.full(biased.size, -1)])),
        totals=there(totals),
        total_pointer=there(total_pointer),
        total_summand=there(summands),
    )


def _tiles(
    levels: NDArray[Any], summed: NDArray[Any], pooled: NDArray[Any], bits: NDArray[Any], whole: NDArray[np.bool_]
) -> Indices:
    """Tiles [n, FIELDS] of rows levels[k]..levels[k + 1], ascending.

    Per row: how many summed and pooled edges it has, the bit of its activation, and whether it must have a lane.
    """
    rows = len(summed)
    if rows == 0:
        return np.zeros((0, FIELDS), np.int32)
    alone = (summed + pooled > LONG) & ~whole
    cuts = np.zeros(rows + 1, bool)
    cuts[levels] = True
    cuts[:-1] |= alone
    cuts[1:] |= alone
    begin = np.flatnonzero(cuts)
    pieces = -(-np.diff(begin) // LANES)
    run = np.repeat(np.arange(len(pieces)), pieces)
    within = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = begin[run] + LANES * within
    step = np.where(alone[first], LANES, 1)
    starts = np.zeros(rows + 1, bool)
    starts[levels] = True
    tiles = np.zeros((len(first), FIELDS), np.int32)
    tiles[:, Field.FIRST] = first
    tiles[:, Field.LAST] = np.minimum(first + LANES, begin[run + 1])
    tiles[:, Field.STEP] = step
    tiles[:, Field.TURNS] = -(-np.maximum.reduceat(summed, first) // step)
    tiles[:, Field.MAX_TURNS] = -(-np.maximum.reduceat(pooled, first) // step)
    tiles[:, Field.CODES] = np.bitwise_or.reduceat(bits, first)
    tiles[:, Field.OPENS] = starts[first]
    return tiles
