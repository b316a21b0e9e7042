"""Sums of outer products on a CPU: many products as one job, which torch's threads work on together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.kernels import outer_numba, substitution_numba
from irgrow.kernels.outer import Product
from irgrow.kernels.shared import work_on

_SAMPLES = 1024  # of every product per job: what several tiles read is still in the cache
_WIDTH = {torch.float32: 32, torch.float64: 16}  # of a tile: two lines


def add(products: Sequence[Product], *, scale: float = 1.0) -> None:
    """Every `out` has grown by scale times its product; below the diagonal of a symmetric one anything may stand.

    All features of a call have one dtype (float32 or float64), all `out` rows without gaps between their entries.
    """
    rows, kept, dtype = [], [], products[0].left.dtype if products else torch.float32
    for product in products:
        out, left, right = product.out, product.left, product.right
        n, (p, q), (left_step, left_row) = left.shape[0], out.shape, left.stride()
        if not n or not p or not q:
            continue
        if right.stride(1) != 1 and q > 1:
            right = right.contiguous()
            kept.append(right)  # until the job is done
        if left.dtype != dtype or right.dtype != dtype or (out.stride(1) != 1 and q > 1):
            raise ValueError("outer_cpu: features of one dtype and out with rows without gaps expected")
        address = out.data_ptr(), out.stride(0), left.data_ptr(), left_row, left_step, right.data_ptr(), right.stride(0)
        rows.append((*address, n, p, q, product.symmetric))
    if rows:
        add_table(np.array(rows, dtype=np.int64), dtype, scale=scale)


def add_table(table: NDArray[np.int64], dtype: torch.dtype, *, scale: float = 1.0) -> None:
    """`add` of the products that rows of the table [products, 11] describe, as outer_numba reads them.

    The caller keeps the memory that it points to. The table is written to.
    """
    p, q, symmetric = table[:, 8], table[:, 9], table[:, 10]
    bands, groups = -(-p // _WIDTH[dtype]), -(-q // _WIDTH[dtype])
    items = int(np.where(symmetric, groups * (groups + 1) // 2, bands * groups).sum())
    work = int((p * q // (1 + symmetric) * np.minimum(table[:, 7], _SAMPLES)).sum())
    factor = np.array([scale])
    numbers, lengths, longest = (items, table.ctypes.data, factor.ctypes.data), table[:, 7].copy(), table[:, 7].max()
    steps = _SAMPLES * dtype.itemsize * table[:, (4, 6)]
    for start in range(0, longest, _SAMPLES):
        if longest > _SAMPLES:
            table[:, 7] = np.minimum(np.maximum(lengths - start, 0), _SAMPLES)
        work_on(outer_numba.add, dtype, numbers, items, work)
        table[:, (2, 5)] += steps


def fill_grids(targets: Sequence[Tensor], images: Sequence[Tensor], margin: int, height: int, width: int) -> None:
    """Each target [.., C] holds after `margin` pixels its images [B, C, h, w], all B alike: pixel after pixel, row
    after row of `width`, `height` of them per image, zeros where an image has no more.
    """
    first, count = images[0], images[0].shape[0]
    channels, size = targets[0].shape[1], targets[0].element_size()
    rows = [(t.data_ptr() + margin * channels * size, x.data_ptr(), *x.stride(), *x.shape[2:])
            for t, x in zip(targets, images, strict=True)]  # fmt: skip
    table = np.array(rows, dtype=np.int64)
    items = count * len(rows)
    numbers = items, table.ctypes.data, count, channels, height, width
    work_on(outer_numba.fill, first.dtype, numbers, items, items * channels * height * width)


def substitute(factor: Tensor, x: Tensor, *, first: int, columns: tuple[int, int], upper: bool = False) -> None:
    """Rows of x, from `first` to those of the factor, solve factor x = what stood there, in these columns; float64.

    factor [d, d] triangular (the other side is never read), x with whole lines for columns in groups of
    `substitution_numba.COLUMNS`. With `first` the rows before are solutions already (lower triangular only).
    """
    size, (begin, end) = factor.shape[0], columns
    items = -(-(end - begin) // substitution_numba.COLUMNS)
    address = factor.data_ptr(), factor.stride(0), factor.stride(1), x.data_ptr(), x.stride(0)
    work = (size * size - first * first) // 2 * (end - begin)
    numbers = items, *address, first, size, begin, size if upper else 0
    work_on(substitution_numba.substitute, torch.float64, numbers, items, work)
