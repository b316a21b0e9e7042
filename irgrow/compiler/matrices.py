"""Sparse edges as a matrix of which some entries exist, and the route by which it is multiplied.

    sparse    entry by entry (kernels/masked_matmul.py): numba on a CPU, Triton on a GPU
    blocks    in the square blocks of 16, 32 or 64 that hold an entry, zeros in between (kernels/block_sparse.py)
    dense     in a full matrix (kernels/masked_matmul.py)

All compute the same, and gradients reach existing entries only. Which one runs is decided for each batch size, with
and without gradients, by what it takes on a CPU (kernels/costs.py); for a GPU there are only crossover densities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.kernels import block_sparse, costs, masked_matmul
from irgrow.kernels import walk as walk_kernel
from irgrow.kernels.shared import COMPILED

# Blocks are looked at where they hold at most so many entries per edge: with more, zeros are what is multiplied.
EMPTIEST = 2.0
BATCHES = (1, 16, 32, 64, 128, 256, 512, 1024)  # what explanations speak of
Routes = dict[tuple[int, bool], str]


@dataclass(frozen=True)
class Engine:
    """What irregular regions and sparse matrices of one program run on.

    `routes`: those that a sparse matrix may take; "auto" stands for what the kernel's own crossover says. `wide`:
    sparse bundles with many edges per level become matrices whatever their density. `every`: routes that are never
    chosen are kept as well, to be measured.
    """

    walk: Callable[..., Tensor]
    by: str
    device: torch.device
    routes: tuple[str, ...]
    wide: bool = False
    every: bool = False

    @property
    def measured(self) -> bool:
        """Whether there are constants to choose by."""
        return len(self.routes) > 1


def engine(walk: Callable[..., Tensor], by: str, device: torch.device, dtype: torch.dtype, backend: str) -> Engine:
    """The routes of a backend there: by name Triton's kernels, or those that may be fastest."""
    halves = dtype in (torch.float32, torch.bfloat16, torch.float16)  # what the block kernel computes on a GPU
    if walk is walk_kernel.walk_reference:
        return Engine(walk, by, device, ("dense",))
    if backend == "triton":
        return Engine(walk, by, device, ("blocks", "sparse") if halves else ("sparse",), wide=True)
    if device.type != "cpu":
        return Engine(walk, by, device, ("blocks", "auto") if halves else ("auto",), wide=by == "Triton")
    if dtype in COMPILED and by == "numba":
        return Engine(walk, by, device, ("sparse", "blocks", "dense"))
    return Engine(walk, by, device, ("dense",))


class Matrix:
    """W of one bundle's edges `column[e] -> row[e]`; multiplies values that lie feature-major."""

    def __init__(
        self,
        rows: int,
        columns: int,
        row: NDArray[np.int64],
        column: NDArray[np.int64],
        index: Tensor | None,
        engine: Engine,
    ) -> None:
        self.mask = masked_matmul.mask(rows, columns, torch.from_numpy(row), torch.from_numpy(column), index)
        self._engine = engine
        self._chosen: Routes = {}
        self._blocks: block_sparse.BlockMask | None = None
        if "blocks" in engine.routes and not self.mask.repeats:
            found = blocks_of(rows, columns, row, column)
            if found is not None:
                self._blocks, place = found
                self._place = torch.from_numpy(place).to(engine.device)
                self._index = None if index is None else index.to(engine.device)

    @property
    def routes(self) -> list[str]:
        """Those that can run."""
        return [r for r in self._engine.routes if r != "blocks" or self._blocks is not None]

    def route(self, batch: int, training: bool) -> str:
        """The one that takes least time; a function of the structure and these."""
        routes = self.routes
        if len(routes) == 1 or not self._on_cpu:
            return routes[0]
        key = batch, training
        if key not in self._chosen:
            self._chosen[key] = min(routes, key=lambda route: self.estimate(route, batch, training))
        return self._chosen[key]

    def estimate(self, route: str, batch: int, training: bool) -> float:
        """Nanoseconds on a CPU."""
        return costs.estimate(route, self.size(batch), training=training)

    def size(self, batch: int) -> costs.Size:
        """What its costs depend on."""
        entries = 0 if self._blocks is None else self._blocks.blocks * self._blocks.size**2
        return costs.Size(self.mask.rows, self.mask.columns, self.mask.edges, batch, entries)

    def __call__(
        self, x: Tensor, values: Tensor, bias: Tensor | None = None, *, activation: str = "identity", route: str | None
    ) -> Tensor:
        """act(W x + bias), [rows, B], for x [columns, B]; by this route, or by the best one."""
        if route is None or route not in self.routes:
            training = torch.is_grad_enabled() and (values.requires_grad or x.requires_grad)
            route = self.route(x.shape[1], training)
        if route != "blocks":
            return masked_matmul.masked_matmul(self.mask, x, values, bias, activation=activation, route=route)
        assert self._blocks is not None
        edges = values if self._index is None else values.index_select(0, self._index)
        blocks = block_sparse.in_blocks(self._blocks, self._place, edges)
        return block_sparse.block_sparse_matmul(self._blocks, x, blocks, bias, activation=activation, route="blocks")

    @property
    def _on_cpu(self) -> bool:
        return self._engine.device.type == "cpu" and not self._engine.wide

    def explain(self) -> str:
        """Which route runs when."""
        names = {"blocks": "blocks"} if self._blocks is None else {"blocks": f"blocks of {self._blocks.size}"}
        if self._on_cpu:
            return by_batch(lambda batch, training: names.get(r := self.route(batch, training), r))
        route = self.routes[0]
        if route == "auto":
            mask = self.mask
            return "{}: {}".format(*masked_matmul.choose(mask.rows, mask.columns, mask.edges, 1, self._engine.device))
        return f"{names.get(route, route)} by {self._engine.by}" if self._engine.wide else route


def by_batch(choice: Callable[[int, bool], str]) -> str:
    """What is chosen as the batch grows: `sparse, from batch 128 dense; with gradients: sparse`."""
    found = []
    for training in (False, True):
        said: list[str] = []
        before = ""
        for batch in BATCHES:
            now = choice(batch, training)
            if now != before:
                said.append(now if not said else f"from batch {batch} {now}")
            before = now
        found.append(", ".join(said))
    return found[0] if found[0] == found[1] else f"{found[0]}; with gradients: {found[1]}"


def blocks_of(
    rows: int, columns: int, row: NDArray[np.int64], column: NDArray[np.int64]
) -> tuple[block_sparse.BlockMask, NDArray[np.int64]] | None:
    """(the blocks that hold an edge, the place of each edge among their entries), or None without block structure.

    Of the sizes that divide rows and columns, the largest whose blocks hold at most a tenth more entries than the
    smallest's. There is structure if the blocks hold at most EMPTIEST entries per edge, and less than nine tenths
    of the matrix. O(edges).
    """
    found: list[tuple[int, NDArray[np.int64], NDArray[np.bool_], int]] = []
    for size in sorted(block_sparse.SIZES):
        across = columns // size
        if rows % size or columns % size or rows // size * across > EMPTIEST * len(row):
            continue
        number = row // size * across + column // size
        there = np.zeros(rows // size * across, np.bool_)
        there[number] = True
        entries = int(np.count_nonzero(there)) * size**2
        if entries > min(EMPTIEST * len(row), 0.9 * rows * columns, 1.1 * found[0][3] if found else np.inf):
            break
        found.append((size, number, there, entries))
    if not found:
        return None
    size, number, there, _ = found[-1]
    place = (np.cumsum(there) - 1)[number] * size**2 + row % size * size + column % size
    shape = rows // size, columns // size
    return block_sparse.block_mask(torch.from_numpy(there.reshape(shape)), size), place
