"""Sums of outer products on a CPU: many products as one job, which torch's threads work on together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.kernels import outer_numba
from irgrow.kernels.outer import Product
from irgrow.kernels.shared import work_on

_SAMPLES = 1024  # of every product per job: what several tiles read is still in the cache
_JOB = {torch.float32: outer_numba.add_single, torch.float64: outer_numba.add_double}
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
    factor, job = np.array([scale]), _JOB[dtype].address
    lengths, longest = table[:, 7].copy(), int(table[:, 7].max())
    for start in range(0, longest, _SAMPLES):
        if longest > _SAMPLES:
            table[:, 7] = np.clip(lengths - start, 0, _SAMPLES)
        work_on(job, (items, table.ctypes.data, factor.ctypes.data), items, work)
        table[:, 2] += _SAMPLES * dtype.itemsize * table[:, 4]
        table[:, 5] += _SAMPLES * dtype.itemsize * table[:, 6]


def fill_grid(target: Tensor, images: Tensor, height: int, width: int) -> None:
    """target [B * height * width, C] holds images [B, C, h, w] pixel after pixel, zeros where a grid goes on."""
    numbers = target.data_ptr(), images.data_ptr(), *images.stride(), *images.shape[1:], height, width
    job = outer_numba.fill_single if target.dtype == torch.float32 else outer_numba.fill_double
    work_on(job.address, (images.shape[0], *numbers), images.shape[0], images.shape[0] * images.shape[1] * height * width)
