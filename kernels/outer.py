"""Sums over samples of outer products of features, in float64: S = sum b b^T, M = sum b g^T, ...

Features are [n, width] (one row per sample), or a list of such blocks standing side by side. With `ones` a
constant-1 feature stands after the last one. Chunks of samples are multiplied in their own precision (float64 stays
float64, everything else becomes float32) and added into float64 sums. Symmetric sums are computed on and above the
diagonal and mirrored once at the end. Nothing depends on scheduling: the same calls give the same bits, whatever the
number of threads.

    triton     one launch for all sums (outer_triton.py)
    tiles      compiled (outer_cpu.py, outer_numba.py), on a CPU with numba: sums held in registers, nothing copied
    products   matrix products of feature-major chunks, by oneDNN or whatever torch has
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from irgrow.kernels import gpu

Features = Tensor | Sequence[Tensor]

# Longer chunks would make the float64 additions cheaper and float32 rounding worse; here both are small.
CHUNK = 1024
_STRIP = 128  # columns of a symmetric sum per product
_WORTH_PREPARING = 2**23  # multiply-adds; oneDNN builds a kernel per new shape (0.7 ms)
_PIECE, _SMALL = 512, 2**14  # samples per piece of a small product, entries of the largest small one
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


@dataclass(frozen=True, eq=False)
class Product:
    """out [p, q] float64 is to grow by left^T right, left [n, p] and right [n, q]; if symmetric its upper triangle."""

    out: Tensor
    left: Tensor
    right: Tensor
    symmetric: bool = False


def accumulate_reference(
    out: Tensor, left: Features, right: Features, *, scale: float = 1.0, ones: bool = False
) -> Tensor:
    """`accumulate` by its definition."""
    return out.add_(_side_by_side(left, ones).T @ _side_by_side(right, False), alpha=scale)


def accumulate_gram_reference(out: Tensor, features: Features, *, scale: float = 1.0, ones: bool = False) -> Tensor:
    """`accumulate_gram` by its definition (the part below the diagonal as well)."""
    b = _side_by_side(features, ones)
    return out.add_(b.T @ b, alpha=scale)


@torch.no_grad()
def accumulate(
    out: Tensor, left: Features, right: Features, *, scale: float = 1.0, ones: bool = False, chunk: int = CHUNK
) -> Tensor:
    """`out` has grown by scale * sum_i left_i right_i^T.

    out [p, q] float64, left [n, p], right [n, q]; with `ones` left has a constant 1 last and out is [p + 1, q].
    Raises ValueError for shapes that do not fit, TypeError if out is not float64.
    """
    left_blocks, right_blocks = _blocks("left", left), _blocks("right", right)
    n, dtype = _samples([*left_blocks, *right_blocks]), _precision([*left_blocks, *right_blocks])
    _check_out("accumulate", out, _width(left_blocks) + ones, _width(right_blocks))
    engine = adding(out.device, dtype)
    if engine is not None:
        _add_blocks(engine, out, left_blocks, right_blocks, scale, ones, dtype)
        return out
    for a in range(0, n, chunk):
        rows = slice(a, min(a + chunk, n))
        columns, others = _feature_major(left_blocks, rows, ones, dtype), _sample_major(right_blocks, rows, dtype)
        add_products(out, columns, others.T, scale=scale)
    return out


@torch.no_grad()
def accumulate_gram(
    out: Tensor, features: Features, *, scale: float = 1.0, ones: bool = False, chunk: int = CHUNK
) -> Tensor:
    """On and above its diagonal, `out` has grown by scale * sum_i b_i b_i^T; `mirror` it when all is added.

    out [d, d] float64, features [n, d]; with `ones` a constant 1 is the last feature and out is [d + 1, d + 1].
    What stands below the diagonal afterwards means nothing. Errors as in `accumulate`.
    """
    blocks = _blocks("features", features)
    n, dtype, d = _samples(blocks), _precision(blocks), _width(blocks) + ones
    _check_out("accumulate_gram", out, d, d)
    engine = adding(out.device, dtype)
    if engine is not None:
        _add_blocks(engine, out, blocks, None, scale, ones, dtype)
        return out
    for a in range(0, n, chunk):
        rows = slice(a, min(a + chunk, n))
        _add_gram(out, _feature_major(blocks, rows, ones, dtype), scale)
    return out


@torch.no_grad()
def mirror(out: Tensor) -> Tensor:
    """What stands below the diagonal of `out` [d, d] is what stands above it."""
    if out.ndim != 2 or out.shape[0] != out.shape[1]:
        raise ValueError(f"mirror: out has shape {tuple(out.shape)}, expected a square matrix")
    d = len(out)
    for a in range(0, d, _STRIP):
        b = min(a + _STRIP, d)
        corner = out[a:b, a:b]
        corner.copy_(corner.triu() + corner.triu(1).T)
        out[b:, a:b].copy_(out[a:b, b:].T)
    return out


class OuterSums:
    """Chosen sums of products of named features over batches: float64, and independent of the batch size.

        sums = OuterSums([("b", "b"), ("b", "g")], ones={"b"})
        for ...: sums.add({"b": hidden, "g": gradient}, scales={"g": len(gradient)})
        S, M_prev = sums[("b", "b")], sums[("b", "g")]

    Batches fill one buffer of `chunk` samples per name, shared by all products it takes part in, so small batches
    cost what large ones do, and the same samples in other batches give the same bits. What stands left in a product
    or in a symmetric one is kept feature-major [width, chunk]; the rest sample-major [chunk, width].
    """

    def __init__(self, pairs: Iterable[tuple[str, str]], *, ones: Collection[str] = (), chunk: int = CHUNK) -> None:
        self.pairs = tuple(dict.fromkeys(pairs))
        self.names = tuple(dict.fromkeys(name for pair in self.pairs for name in pair))
        self.n = 0  # samples added
        if chunk < 1:
            raise ValueError(f"OuterSums: chunk is {chunk}, expected at least 1")
        unknown = sorted(set(ones) - set(self.names))
        if unknown:
            raise ValueError(f"OuterSums: ones for {unknown}, expected names among {list(self.names)}")
        self._ones = frozenset(ones)
        self._feature_major = {left for left, _ in self.pairs} | self._ones
        self._chunk = chunk
        self._filled = 0
        self._buffers: dict[str, Tensor] = {}
        self._widths: dict[str, int] = {}
        self._sums: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def add(self, features: Mapping[str, Features], *, scales: Mapping[str, float] | None = None) -> None:
        """The sums hold these samples too. `features[name]` [n, width], `scales[name]` multiplies a feature.

        (The constant 1 of `ones` stays 1.) Raises ValueError for a missing or unknown name, or for another width,
        dtype or number of samples than expected.
        """
        if set(features) != set(self.names):
            raise ValueError(f"OuterSums: features named {sorted(features)}, expected {sorted(self.names)}")
        blocks = {name: _blocks(name, features[name]) for name in self.names}
        n = _samples([block for of_one in blocks.values() for block in of_one])
        if not self._buffers:
            self._allocate(blocks)
        for name, of_one in blocks.items():
            found = (_width(of_one) + (name in self._ones), _precision(of_one))
            expected = (self._width_of(name), self._precision)
            if found[0] != expected[0] or (found[1] != expected[1] and expected[1] == torch.float32):
                raise ValueError(f"OuterSums: {name} has width and dtype {found}, expected {expected} as before")
        direct = self._whole(blocks, scales or {}, n)
        if direct is not None:  # nothing waits and nothing will: the same chunks, where they are
            for a in range(0, n, self._chunk):
                self._multiply(self._sums, {name: x[a : a + self._chunk].T for name, x in direct.items()})
            self.n += n
            return
        for a, b in self._pieces(n):
            for name, of_one in blocks.items():
                scale, ones = (scales or {}).get(name, 1.0), name in self._ones
                place = self._columns(name, self._filled, self._filled + b - a)
                _store(place, of_one, slice(a, b), scale)
                if ones:
                    place[-1] = 1.0
            self._filled += b - a
            if self._filled == self._chunk:
                self._multiply(self._sums)
                self._filled = 0
        self.n += n

    @torch.no_grad()
    def sums(self) -> dict[tuple[str, str], Tensor]:
        """All sums so far, as new float64 tensors. Adding may go on afterwards."""
        if not self._buffers:
            raise ValueError("OuterSums: nothing was added, expected at least one batch (it may be empty)")
        result = {pair: total.clone() for pair, total in self._sums.items()}
        if self._filled:
            self._multiply(result)
        for (left, right), total in result.items():
            if left == right:
                mirror(total)
        return result

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        if pair not in self.pairs:
            raise KeyError(f"OuterSums: {pair} is not among the pairs {list(self.pairs)}")
        return self.sums()[pair]

    def _allocate(self, blocks: Mapping[str, Sequence[Tensor]]) -> None:
        every = [block for of_one in blocks.values() for block in of_one]
        self._precision = _precision(every)
        device = every[0].device
        self._engine = adding(device, self._precision)
        if self._engine is not None:
            self._feature_major = set()
        for name, of_one in blocks.items():
            shape = _width(of_one) + (name in self._ones), self._chunk
            self._widths[name] = shape[0]
            shape = shape if name in self._feature_major else shape[::-1]
            self._buffers[name] = torch.empty(shape, dtype=self._precision, device=device)
        for left, right in self.pairs:
            shape = self._width_of(left), self._width_of(right)
            self._sums[left, right] = torch.zeros(shape, dtype=torch.float64, device=device)

    def _whole(
        self, blocks: Mapping[str, list[Tensor]], scales: Mapping[str, float], n: int
    ) -> dict[str, Tensor] | None:
        """The features, if they are whole chunks that may be multiplied as they are."""
        if (
            self._engine is None
            or self._filled
            or n % self._chunk
            or self._ones
            or any(s != 1.0 for s in scales.values())
        ):
            return None
        if any(len(b) != 1 or b[0].dtype != self._precision or b[0].stride(1) != 1 for b in blocks.values()):
            return None
        return {name: block.detach().resolve_neg() for name, (block,) in blocks.items()}

    def _pieces(self, n: int) -> Iterator[tuple[int, int]]:
        a = 0
        while a < n:
            b = min(n, a + self._chunk - self._filled)
            yield a, b
            a = b

    def _columns(self, name: str, start: int, stop: int) -> Tensor:
        """[width, samples] of the buffered samples start..stop-1: a view."""
        buffer = self._buffers[name]
        return buffer[:, start:stop] if name in self._feature_major else buffer[start:stop].T

    def _width_of(self, name: str) -> int:
        return self._widths[name]

    def _multiply(self, sums: Mapping[tuple[str, str], Tensor], columns: dict[str, Tensor] | None = None) -> None:
        """Adds to the sums what is buffered, or these features [width, samples]."""
        if columns is None:
            columns = {name: self._columns(name, 0, self._filled) for name in self.names}
        if self._engine is not None:
            self._engine.add([Product(out, columns[a].T, columns[b].T, a == b) for (a, b), out in sums.items()])
            return
        for name in self._feature_major:
            columns[name] = columns[name].contiguous()
        for (left, right), total in sums.items():
            if left == right:
                _add_gram(total, columns[left], 1.0)
            else:
                add_products(total, columns[left], columns[right])


def adding(device: torch.device, dtype: torch.dtype) -> Any:
    """The module whose `add` takes `Product`s of such features, or None: then matrix products do."""
    if gpu.runs_triton(device, dtype):
        from irgrow.kernels import outer_triton

        return outer_triton
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return None
    return compiled()


@lru_cache(1)
def compiled() -> Any:
    """The compiled tiles, or None without numba."""
    try:
        from irgrow.kernels import outer_cpu
    except ImportError:
        return None
    return outer_cpu


def route(device: torch.device | str = "cpu") -> tuple[str, str]:
    """(route, reason) of the sums there."""
    kind = torch.device(device).type
    if gpu.runs_triton(torch.device(device), torch.float32):
        return "triton", "one launch for all sums: triangle tiles, split over samples, float64 added in fixed order"
    if kind != "cpu":
        return "products", f"matrix products of {kind}"
    if compiled() is None:
        return "products", "numba is not installed"
    return "tiles", "compiled: nothing is copied, the triangle of symmetric sums, float64 added from registers"


def _add_blocks(
    engine: Any,
    out: Tensor,
    left: Sequence[Tensor],
    right: Sequence[Tensor] | None,
    scale: float,
    ones: bool,
    dtype: torch.dtype,
) -> None:
    """`accumulate`, or `accumulate_gram` where right is None: a product for every pair of blocks, in one call."""
    sides = [[block.detach().resolve_neg().to(dtype) for block in side] for side in (left, right or ())]
    if ones:
        sides[0].append(sides[0][0].new_ones(1, 1).expand(len(sides[0][0]), 1))
    products, i = [], 0
    for number, a in enumerate(sides[0]):
        j = i if right is None else 0
        for other, b in enumerate(sides[0][number:] if right is None else sides[1]):
            corner = out[i : i + a.shape[1], j : j + b.shape[1]]
            products.append(Product(corner, a, b, symmetric=right is None and other == 0))
            j += b.shape[1]
        i += a.shape[1]
    engine.add(products, scale=scale)


def add_products(out: Tensor, left: Tensor, right: Tensor, *, scale: float = 1.0) -> None:
    """`out` has grown by scale * left right^T: every row of left [p, n] times every row of right [q, n].

    out [p, q] float64; products as in `row_products`. Small float32 ones are summed in pieces: MKL adds them up in
    one go, and loses 2e-6 over 4,000 samples.
    """
    (p, n), q = left.shape, len(right)
    pieces = n // _PIECE
    if left.dtype == torch.float32 and pieces > 1 and p * q < _SMALL and not _suits_onednn(left, p * q * n):
        whole = pieces * _PIECE
        a = left[:, :whole].unflatten(1, (pieces, _PIECE)).transpose(0, 1)
        b = right[:, :whole].unflatten(1, (pieces, _PIECE)).permute(1, 2, 0)
        with _full_precision(left.device.type):
            out.add_(torch.bmm(a, b).sum(0, dtype=torch.float64), alpha=scale)
        left, right = left[:, whole:], right[:, whole:]
    if left.shape[1]:
        out.add_(row_products(left, right), alpha=scale)


def row_products(left: Tensor, right: Tensor) -> Tensor:
    """left right^T in the dtype of both: left [p, n], right [q, n] -> [p, q].

    In full precision, whatever the user allows matrix products elsewhere (no bfloat16, no tf32). float32 on a CPU
    goes through oneDNN, which has kernels for what the processor can do; MKL's are up to 2.2 times slower on some
    (AMD with AVX-512).
    """
    with _full_precision(left.device.type):
        if _ONEDNN is None or not _suits_onednn(left, left.shape[0] * left.shape[1] * len(right)):
            return left @ right.T
        # Only operands without gaps: for others oneDNN falls back to a loop a thousand times slower.
        right = right if right.T.is_contiguous() else right.contiguous()
        return _ONEDNN(left.contiguous(), right, None, "none", [], "")


def accumulate_cost(n: int, p: int, q: int, *, itemsize: int = 4) -> tuple[int, int]:
    """(flops, bytes) of `accumulate`: one product per chunk, its result added in float64."""
    chunks = -(-n // CHUNK)
    return 2 * n * p * q, itemsize * (3 * n * (p + q) + chunks * p * q) + 16 * chunks * p * q


def gram_cost(n: int, d: int, *, itemsize: int = 4) -> tuple[int, int]:
    """(flops, bytes) of `accumulate_gram`: the triangle, and half a strip more on the diagonal."""
    chunks, entries = -(-n // CHUNK), d * (d + min(d, _STRIP)) // 2
    return 2 * n * entries, itemsize * (3 * n * d + chunks * entries) + 16 * chunks * entries


def _suits_onednn(left: Tensor, multiply_adds: int) -> bool:
    ready = _ONEDNN is not None and left.device.type == "cpu" and left.dtype == torch.float32
    return ready and multiply_adds >= _WORTH_PREPARING


# --- parts ----------------------------------------------------------------------------------------------------


def _add_gram(out: Tensor, columns: Tensor, scale: float) -> None:
    """out (on and above the diagonal) += scale * columns columns^T, for columns [d, n]."""
    d = len(columns)
    strip = _STRIP if d > 1.5 * _STRIP else d
    for a in range(0, d, max(1, strip)):
        b = min(a + strip, d)
        add_products(out[:b, a:b], columns[:b], columns[a:b], scale=scale)


def _feature_major(blocks: Sequence[Tensor], rows: slice, ones: bool, dtype: torch.dtype) -> Tensor:
    """[width (+ 1), samples]; a view where that does as well: only oneDNN wants its left operand without gaps."""
    if len(blocks) == 1 and not ones and blocks[0].dtype == dtype:
        columns = blocks[0][rows].T
        if columns.is_contiguous() or not _suits_onednn(columns, columns.shape[0] ** 2 * columns.shape[1]):
            return columns
    columns = blocks[0].new_empty(_width(blocks) + ones, rows.stop - rows.start, dtype=dtype)
    _store(columns, blocks, rows, 1.0)
    if ones:
        columns[-1] = 1.0
    return columns


def _sample_major(blocks: Sequence[Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    """[samples, width] without gaps; what is needed on the right of a product is not transposed."""
    if len(blocks) == 1:
        return blocks[0][rows].to(dtype)
    return torch.cat([block[rows].to(dtype) for block in blocks], dim=1)


def _store(columns: Tensor, blocks: Sequence[Tensor], rows: slice, scale: float) -> None:
    start = 0
    for block in blocks:
        place = columns[start : start + block.shape[1]]
        values = block[rows].T.to(columns.dtype)
        if place.stride(-1) == 1 and not place.is_contiguous():
            values = values.contiguous()  # and move afterwards: twice as fast as transposing into a place with gaps
        place.copy_(values)
        if scale != 1.0:
            place.mul_(scale)
        start += block.shape[1]


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    backend: Any = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(device)
    setting = backend.matmul if backend is not None else None
    kept = setting.fp32_precision if setting is not None else "none"
    if setting is None or kept in ("none", "ieee"):
        yield
        return
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = kept


def _side_by_side(features: Features, ones: bool) -> Tensor:
    blocks = [block.double() for block in _blocks("features", features)]
    return torch.cat([*blocks, *([blocks[0].new_ones(len(blocks[0]), 1)] if ones else [])], dim=1)


def _precision(blocks: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(block.dtype == torch.float64 for block in blocks) else torch.float32


def _width(blocks: Sequence[Tensor]) -> int:
    return sum(block.shape[1] for block in blocks)


# --- what callers may get wrong -------------------------------------------------------------------------------


def _blocks(name: str, features: Features) -> list[Tensor]:
    blocks = [features] if isinstance(features, Tensor) else list(features)
    if not blocks:
        raise ValueError(f"{name} is an empty list, expected at least one block of features")
    for block in blocks:
        if block.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(block.shape)}, expected (samples, width)")
        if not block.is_floating_point():
            raise TypeError(f"{name} is {block.dtype}, expected a floating type")
    return blocks


def _samples(blocks: Sequence[Tensor]) -> int:
    counts = sorted({len(block) for block in blocks})
    if len(counts) != 1:
        raise ValueError(f"features have {' and '.join(map(str, counts))} samples, expected one number for all")
    return counts[0]


def _check_out(who: str, out: Tensor, rows: int, columns: int) -> None:
    if out.dtype != torch.float64:
        raise TypeError(f"{who}: out is {out.dtype}, expected torch.float64")
    if out.shape != (rows, columns):
        raise ValueError(f"{who}: out has shape {tuple(out.shape)}, expected {(rows, columns)}")
