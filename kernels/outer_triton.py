"""Sums of outer products on a GPU, in Triton: many products in one launch, float32 products added into float64.

A descriptor per product (pointers, sizes, pitches) and a list of work items (product, tile, range of samples) are
data: layers of any number and size share one launch. Small products are split along the samples until all
multiprocessors are busy, symmetric ones have tiles on and above the diagonal only. Items write their float64 tile to
memory, and a second kernel adds the tiles of each place in order: results repeat bit for bit.

float32 features are multiplied as three tf32 products on tensor cores, at float32's precision, and added into
float64 every 64 samples; float64 ones are multiplied in float64.
"""

# mypy: ignore-errors
# (Triton infers the types of what is compiled)

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from irgrow.kernels import gpu
from irgrow.kernels.outer import Product

_TILE = {torch.float32: 64, torch.float64: 32}
_STEP = 64  # samples per product
_LEAST = 4  # products per item, so that writing a tile costs little
_ITEMS = 512  # about four per multiprocessor of an H100
_FIELDS = 8  # of a descriptor: left, right, out (bytes), p, q, left pitch, right pitch, out pitch
_WORK = 5  # of an item: product, first row, first column, first sample, last sample
_PLACE = 5  # of a place: product, first row, first column, first item, last item
FIELDS, WORK, PLACE = tl.constexpr(_FIELDS), tl.constexpr(_WORK), tl.constexpr(_PLACE)


@triton.jit
def _tiles(products, work, sums, T: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """sums[item] [T, T] float64 = the item's part of its product."""
    item = tl.program_id(0)
    work += item * WORK
    product = products + tl.load(work).to(tl.int64) * FIELDS
    left = tl.load(product).to(tl.pointer_type(DTYPE))
    right = tl.load(product + 1).to(tl.pointer_type(DTYPE))
    p, q, left_pitch, right_pitch = (
        tl.load(product + 3), tl.load(product + 4), tl.load(product + 5), tl.load(product + 6)
    )  # fmt: skip
    if ALIGNED:
        left, right = tl.multiple_of(left, 16), tl.multiple_of(right, 16)
        left_pitch, right_pitch = tl.multiple_of(left_pitch, 4), tl.multiple_of(right_pitch, 4)
        p, q = tl.multiple_of(p, 4), tl.multiple_of(q, 4)
    rows, columns = tl.load(work + 1) + tl.arange(0, T)[None, :], tl.load(work + 2) + tl.arange(0, T)[None, :]
    last = tl.load(work + 4)
    total = tl.zeros([T, T], tl.float64)
    for start in range(tl.load(work + 3), last, K):
        sample = (start + tl.arange(0, K)).to(tl.int64)[:, None]
        on = sample < last
        a = tl.load(left + sample * left_pitch + rows, mask=on & (rows < p), other=0.0)
        b = tl.load(right + sample * right_pitch + columns, mask=on & (columns < q), other=0.0)
        total += tl.dot(tl.trans(a), b, input_precision="tf32x3", out_dtype=DTYPE).to(tl.float64)
    at = tl.arange(0, T)
    tl.store(sums + tl.cast(item, tl.int64) * (T * T) + at[:, None] * T + at[None, :], total)


@triton.jit
def _add(products, places, sums, scale_of, T: tl.constexpr, R: tl.constexpr):
    """out += scale * the sum of the items of a place, in order; R rows of a tile per program."""
    place = places + tl.program_id(0) * PLACE
    product = products + tl.load(place).to(tl.int64) * FIELDS
    out = tl.load(product + 2).to(tl.pointer_type(tl.float64))
    p, q, pitch = tl.load(product + 3), tl.load(product + 4), tl.load(product + 7)
    row, column = tl.program_id(1) * R + tl.arange(0, R)[:, None], tl.arange(0, T)[None, :]
    total = tl.zeros([R, T], tl.float64)
    for item in range(tl.load(place + 3), tl.load(place + 4)):
        total += tl.load(sums + tl.cast(item, tl.int64) * (T * T) + row * T + column)
    i, j = tl.load(place + 1) + row, tl.load(place + 2) + column
    to, on = out + i * pitch + j, (i < p) & (j < q)
    tl.store(to, tl.load(to, mask=on, other=0.0) + tl.load(scale_of) * total, mask=on)


# --- launching ------------------------------------------------------------------------------------------------


def add(products: Sequence[Product], *, scale: float = 1.0) -> None:
    """Every `out` has grown by scale times its product; below the diagonal of a symmetric one anything may stand.

    All features of a call have one dtype (float32 or float64), all `out` rows without gaps between their entries.
    """
    products = [_in_rows(product) for product in products if len(product.left) and product.out.numel()]
    if not products:
        return
    first = products[0].left
    tile, size = _TILE[first.dtype], first.element_size()
    for product in products:
        if {product.left.dtype, product.right.dtype} != {first.dtype} or product.out.stride(-1) != 1:
            raise ValueError("outer_triton: features of one dtype and out with rows without gaps expected")
    shapes = tuple((len(p.left), *p.out.shape, p.symmetric) for p in products)
    pointers = tuple(
        (p.left.data_ptr(), p.right.data_ptr(), p.out.data_ptr(), *p.out.shape)
        + (p.left.stride(0), p.right.stride(0), p.out.stride(0))
        for p in products
    )
    whole = all(not a % 16 and not b % 16 and not w * size % 16 and not (r | s | t) % 4
                for a, b, _, r, w, s, t, _ in pointers)  # fmt: skip
    work, places = _work(shapes, tile, first.device)
    descriptors = torch.tensor(pointers, dtype=torch.int64).to(first.device)
    sums = torch.empty(len(work), tile, tile, dtype=torch.float64, device=first.device)
    dtype = tl.float64 if first.dtype == torch.float64 else tl.float32
    constants = {"T": tile, "K": _STEP, "DTYPE": dtype, "ALIGNED": whole, "num_warps": 4, "num_stages": 2}
    gpu.launch(_tiles, (len(work),), first, descriptors, work, sums, **constants)
    factor = torch.full((1,), scale, dtype=torch.float64, device=first.device)
    operands = descriptors, places, sums, factor
    gpu.launch(_add, (len(places), tile // 8), first, *operands, T=tile, R=8, num_warps=4)


@lru_cache(maxsize=64)
def _work(shapes: tuple[tuple[int, int, int, bool], ...], tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(items [.., 5], places [.., 5]) int32: which tiles there are, and how each is split along the samples."""
    corners = [
        (number, i, j)
        for number, (_, p, q, symmetric) in enumerate(shapes)
        for i in range(0, p, tile)
        for j in range(i if symmetric else 0, q, tile)
    ]
    most = max(1, -(-_ITEMS // len(corners)))
    items, places = [], []
    for number, i, j in corners:
        n = shapes[number][0]
        step = max(_LEAST, -(-n // (_STEP * most))) * _STEP
        begin = len(items)
        items += [(number, i, j, a, min(a + step, n)) for a in range(0, n, step)]
        places.append((number, i, j, begin, len(items)))
    found = (torch.tensor(made, dtype=torch.int32).to(device) for made in (items, places))
    return next(found), next(found)


def _in_rows(product: Product) -> Product:
    """The product with features whose entries lie side by side; those that lie otherwise are copied."""
    left, right = (t if t.stride(1) == 1 else t.contiguous() for t in (product.left, product.right))
    return Product(product.out, left, right, product.symmetric)
