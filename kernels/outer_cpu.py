"""Sums of outer products on a CPU: many products as one job, which torch's threads work on together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
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
    products = [product for product in products if len(product.left) and product.out.numel()]
    if not products:
        return
    dtype = products[0].left.dtype
    rows, items, work = [], 0, 0
    rights = [p.right if p.right.stride(1) == 1 or p.right.shape[1] == 1 else p.right.contiguous() for p in products]
    for product, right in zip(products, rights, strict=True):
        out, left = product.out, product.left
        if {left.dtype, right.dtype} != {dtype} or (out.stride(-1) != 1 and out.shape[1] > 1):
            raise ValueError("outer_cpu: features of one dtype and out with rows without gaps expected")
        p, q = out.shape
        address = out.data_ptr(), out.stride(0), left.data_ptr(), left.stride(1), left.stride(0)
        rows.append((*address, right.data_ptr(), right.stride(0), len(left), p, q, int(product.symmetric)))
        bands, groups = -(-p // _WIDTH[dtype]), -(-q // _WIDTH[dtype])
        items += groups * (groups + 1) // 2 if product.symmetric else bands * groups
        work += p * q * min(len(left), _SAMPLES) // (2 if product.symmetric else 1)
    table, factor = np.array(rows, dtype=np.int64), np.array([scale])
    left, left_step, right, right_pitch, counts = (table[:, at] for at in (2, 4, 5, 6, 7))
    lengths, size = counts.copy(), dtype.itemsize
    for start in range(0, int(lengths.max()), _SAMPLES):
        counts[:] = np.clip(lengths - start, 0, _SAMPLES)
        work_on(_JOB[dtype].address, (items, table.ctypes.data, factor.ctypes.data), items, work)
        left += _SAMPLES * left_step * size
        right += _SAMPLES * right_pitch * size
