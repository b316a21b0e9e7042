"""y = act(W x + bias) for a matrix W of which only some square blocks exist; values feature-major [n, B].

    blocks     only the blocks that exist are multiplied: forward, for the gradient of x, and for that of the values
    dense      the blocks are put into a full matrix and multiplied; its gradient is read at the blocks that exist

`choose` says which is faster, and why. Both are differentiable any number of times; second derivatives, torch.func
and torch.compile go through plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from irgrow.kernels import gpu
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.shared import COMPILED, reference_gradients, share
from irgrow.kernels.walk_plan import SLOPE_STORED

SIZES = (16, 32, 64)
ROUTES = ("auto", "blocks", "dense")
CROSSOVER_GPU = 0.3  # density above which the full product is taken on a GPU; estimated, not measured
_LINE_BYTES = 64  # lanes.py


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which blocks of a [rows, columns] matrix exist; values [blocks, size, size] in this order. Made by `block_mask`.

    All index tensors are int32. Blocks stand row by row: those of block row i are pointer[i]..pointer[i + 1] - 1.
    """

    rows: int
    columns: int
    size: int
    pointer: Tensor  # [rows / size + 1]
    row: Tensor  # [blocks]: the block row of each block
    column: Tensor  # [blocks]: the block column of each block
    transposed_pointer: Tensor  # [columns / size + 1]: the same, column by column
    transposed_block: Tensor  # [blocks]: the number of each block in that order
    _there: dict[torch.device, BlockMask] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.column)

    @property
    def density(self) -> float:
        return self.blocks * self.size**2 / max(1, self.rows * self.columns)

    def __repr__(self) -> str:
        return f"BlockMask({self.rows}x{self.columns}, {self.blocks} blocks of {self.size}, {self.density:.1%})"

    def to(self, device: torch.device) -> BlockMask:
        """The same structure there (kept: moved once)."""
        if self.column.device == device:
            return self
        if device not in self._there:
            names = ("pointer", "row", "column", "transposed_pointer", "transposed_block")
            moved = (getattr(self, name).to(device) for name in names)
            self._there[device] = BlockMask(self.rows, self.columns, self.size, *moved)
        return self._there[device]

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        return self.row.long(), self.column.long()

    def matrix(self, values: Tensor) -> Tensor:
        """W [rows, columns], zero outside the blocks; differentiable."""
        here, b = self.to(values.device), self.size
        full = values.new_zeros(self.rows // b, self.columns // b, b, b).index_put(here._places, values)
        return full.transpose(1, 2).reshape(self.rows, self.columns)

    def values(self, matrix: Tensor) -> Tensor:
        """[blocks, size, size]: what a full matrix holds in the blocks; differentiable."""
        here, b = self.to(matrix.device), self.size
        return matrix.reshape(self.rows // b, b, self.columns // b, b).transpose(1, 2)[here._places]


def block_mask(pattern: Tensor, size: int) -> BlockMask:
    """Block (i, j) exists where `pattern[i, j]` is true: bool [rows / size, columns / size].

    Raises ValueError for a size that is not 16, 32 or 64, or a pattern that is no boolean matrix.
    """
    if size not in SIZES:
        raise ValueError(f"block_mask: size {size}, expected one of {SIZES}")
    if pattern.ndim != 2 or pattern.dtype != torch.bool:
        raise ValueError(f"block_mask: pattern is {pattern.dtype} {tuple(pattern.shape)}, expected a boolean matrix")
    pattern = pattern.detach().cpu()
    number = torch.zeros(pattern.shape, dtype=torch.int32)
    number[pattern] = torch.arange(int(pattern.sum()), dtype=torch.int32)
    row, column = (index.int() for index in pattern.nonzero(as_tuple=True))
    pointers = []
    for axis in (1, 0):
        counts = pattern.sum(axis).int()
        pointers.append(torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)]))
    transposed = number.T[pattern.T]
    rows, columns = (size * n for n in pattern.shape)
    return BlockMask(rows, columns, size, pointers[0], row, column, pointers[1], transposed)


def block_sparse_matmul_reference(
    mask: BlockMask, x: Tensor, values: Tensor, bias: Tensor | None = None, *, activation: str = "identity"
) -> Tensor:
    """`block_sparse_matmul` by its definition, in plain torch: any dtype, device and number of derivatives."""
    z = mask.matrix(values) @ x
    return ACTIVATIONS[activation](z if bias is None else z + bias[:, None])


def block_sparse_matmul(
    mask: BlockMask,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    route: str = "auto",
) -> Tensor:
    """act(W x + bias), [rows, B]. x [columns, B], values [blocks, size, size], bias [rows]; one dtype and device.

    Differentiable in x, values and bias. Raises ValueError for operands that do not fit or an unknown name, and
    RuntimeError if the route "blocks" is asked for by name where it cannot run.
    """
    _check(mask, x, values, bias, activation, route)
    if route == "auto":
        route = choose(mask, x.device)[0] if x.dtype in COMPILED or not x.is_cpu else "dense"
        route = "dense" if not x.is_cpu and x.dtype == torch.float64 else route
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if route == "blocks" and gpu.runs_triton(x.device, x.dtype) and x.dtype != torch.float64:
        if not plain and forward_ad._current_level < 0:
            from irgrow.kernels.block_sparse_triton import Blocks

            return Blocks.apply(mask, x, values, bias, activation)
    elif route == "blocks":
        if not x.is_cpu or x.dtype not in COMPILED or _compiled() is None:
            raise RuntimeError(
                f"block_sparse_matmul: the route 'blocks' needs a CPU, numba and float32 or float64 "
                f"(with Triton: a GPU and no float64), found {x.device}, "
                f"{'numba' if _compiled() else 'no numba'} and {x.dtype}; use route='dense'"
            )
        if not plain and forward_ad._current_level < 0:
            return _Blocks.apply(mask, x, values, bias, activation)
    return block_sparse_matmul_reference(mask, x, values, bias, activation=activation)


def choose(mask: BlockMask, device: torch.device | str) -> tuple[str, str]:
    """(route, reason): what takes less time. A function of its arguments (and of whether numba is installed)."""
    on_gpu = torch.device(device).type != "cpu"
    if on_gpu and gpu.why_not_triton(torch.device(device)):
        return "dense", f"no block-sparse kernel on {torch.device(device).type}"
    if not on_gpu and _compiled() is None:
        return "dense", "numba is not installed"
    if on_gpu:
        route, side = ("blocks", "not above") if mask.density <= CROSSOVER_GPU else ("dense", "above")
        share = f"{100 * mask.density:.3g} % in blocks of {mask.size}"
        return route, f"{share} is {side} the crossover, {100 * CROSSOVER_GPU:.0f} %"
    # Measured on one core: 90 to 110 Gflop/s at every density and block size, the full product 55 (MKL) to 100.
    return "blocks", f"{100 * mask.density:.3g} % in blocks of {mask.size}: they run at the rate of a full product"


def block_sparse_matmul_cost(mask: BlockMask, batch: int, *, itemsize: int = 4) -> tuple[int, int]:
    """(flops, bytes) of the forward pass over the blocks; the backward pass takes twice both."""
    entries = mask.blocks * mask.size**2
    return 2 * entries * batch, itemsize * (entries + batch * (mask.rows + mask.columns)) + 4 * mask.blocks


# --- compiled, on the CPU -------------------------------------------------------------------------------------


def in_blocks(mask: BlockMask, place: Tensor, values: Tensor) -> Tensor:
    """[blocks, size, size] with values[e] at entry place[e] of them all, zero elsewhere; differentiable.

    place [edges] int64, no entry twice; values [edges] or longer.
    """
    if len(values) > len(place):  # a slice's gradient is a copy
        values = values[: len(place)]
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or forward_ad._current_level >= 0 or not values.is_cpu or values.dtype not in COMPILED or not _compiled():
        flat = values.new_zeros(mask.blocks * mask.size**2).scatter(0, place, values)
    else:
        flat = _Put.apply(values, place, mask.blocks * mask.size**2)
    return flat.view(mask.blocks, mask.size, mask.size)


class _Put(torch.autograd.Function):
    """`in_blocks`, flat. Differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(place)
        return _moved(_compiled().put, values, place, length)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            return incoming.gather(0, place), None, None
        return _moved(_compiled().take, incoming, place, len(place)), None, None


def _moved(kernel: Any, values: Tensor, place: Tensor, length: int) -> Tensor:
    """A vector of this length, filled by the kernel; not by torch, whose threads would be in the way of ours."""
    values = values.detach().resolve_neg().contiguous()
    out = values.new_empty(length) if length == len(place) else values.new_zeros(length)
    addresses = values.data_ptr(), place.data_ptr(), out.data_ptr()
    share(kernel, values.dtype, addresses, len(place), 4 * len(place))
    return out


class _Blocks(torch.autograd.Function):
    """act(W x + bias) over the blocks that exist. Twice differentiable: the second time through the reference."""

    @staticmethod
    def forward(ctx: Any, mask: BlockMask, x: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        code = ACTIVATIONS[activation].code
        padded, values = _in_lines(x), values.resolve_neg().contiguous()
        bias = None if bias is None else bias.resolve_neg().contiguous()
        y = padded.new_empty(mask.rows, padded.shape[1])
        keep = activation in SLOPE_STORED and any(ctx.needs_input_grad)
        slopes = torch.empty_like(y) if keep else None
        _multiply(mask, False, values, padded, y, bias, code, slopes)
        ctx.mask, ctx.activation = mask, activation
        ctx.save_for_backward(x, values, bias, padded, y, slopes)
        return y[:, : x.shape[1]]

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        mask: BlockMask = ctx.mask
        x, values, bias, padded, y, slopes = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            reference = partial(block_sparse_matmul_reference, mask, activation=ctx.activation)
            found = reference_gradients(reference, (x, values, bias), needs, incoming)
            return None, *found, None
        code, batch = ACTIVATIONS[ctx.activation].code, x.shape[1]
        dz = torch.empty_like(y)
        d_bias = values.new_empty(mask.rows) if needs[2] else None
        g = incoming.resolve_neg() if incoming.stride(1) == 1 or batch < 2 else _in_lines(incoming)
        fixed = (g.data_ptr(), g.stride(0), dz.data_ptr(), y.data_ptr(), _address(slopes), y.shape[1], _address(d_bias))
        share(_compiled().differentiate, x.dtype, (*fixed, code, batch), mask.rows, mask.rows * batch)
        d_x, d_values = None, None
        if needs[0]:
            d_x = torch.empty_like(padded)
            _multiply(mask, True, values, dz, d_x, None, 0, None)
            d_x = d_x[:, :batch]
        if needs[1]:
            d_values = torch.empty_like(values)
            blocks = (mask.row.data_ptr(), mask.column.data_ptr(), mask.size, dz.data_ptr(), padded.data_ptr())
            pitch = padded.shape[1]
            work = mask.blocks * mask.size**2 * pitch
            share(_compiled().gradients, x.dtype, (*blocks, pitch, pitch, d_values.data_ptr()), mask.blocks, work)
        return None, d_x, d_values, d_bias, None


def _multiply(
    mask: BlockMask,
    transposed: bool,
    values: Tensor,
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    code: int,
    slopes: Tensor | None,
) -> None:
    """y = act(W x + bias), or of W^T, for x and y in whole lines."""
    size, pitch = mask.size, x.shape[1]
    block_rows = len(y) // size
    if transposed:
        structure = mask.transposed_pointer.data_ptr(), mask.transposed_block.data_ptr(), mask.row.data_ptr()
    else:
        structure = mask.pointer.data_ptr(), 0, mask.column.data_ptr()
    strides = (1, size) if transposed else (size, 1)
    fixed: tuple[int, ...] = (*structure, values.data_ptr(), size, *strides, x.data_ptr(), pitch, y.data_ptr(), pitch)
    tiles = -(-pitch * x.element_size() // (2 * _LINE_BYTES))
    fixed = (*fixed, _address(bias), code, _address(slopes), block_rows)
    share(_compiled().multiply, x.dtype, fixed, tiles * block_rows, mask.blocks * size**2 * pitch)


def _in_lines(x: Tensor) -> Tensor:
    """x with rows of whole lines and nothing between them; zeros after its batch."""
    line = _LINE_BYTES // x.element_size()
    batch, pitch = x.shape[1], -(-x.shape[1] // line) * line
    x = x.detach().resolve_neg()
    if batch == pitch and x.is_contiguous():
        return x
    padded = x.new_empty(len(x), pitch)  # not filled by torch: its threads would be in the way of ours
    share(
        _compiled().copy,
        x.dtype,
        (x.data_ptr(), *x.stride(), batch, padded.data_ptr(), pitch),
        len(x),
        8 * len(x) * pitch,
    )
    return padded


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(1)
def _compiled() -> Any:
    """The compiled code, or None without numba."""
    try:
        from irgrow.kernels import block_sparse_numba
    except ImportError:
        return None
    return block_sparse_numba


# --- what callers may get wrong -------------------------------------------------------------------------------


def _check(mask: BlockMask, x: Tensor, values: Tensor, bias: Tensor | None, activation: str, route: str) -> None:
    if route not in ROUTES:
        raise ValueError(f"block_sparse_matmul: route {route!r}, expected one of {ROUTES}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"block_sparse_matmul: activation {activation!r}, expected one of {sorted(ACTIVATIONS)}")
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "values": (values, (mask.blocks, mask.size, mask.size)),
        "bias": (bias, (mask.rows,)),
    }
    if x.ndim != 2 or len(x) != mask.columns:
        raise ValueError(f"block_sparse_matmul: x has shape {tuple(x.shape)}, expected ({mask.columns}, batch)")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"block_sparse_matmul: {name} have shape {tuple(tensor.shape)}, expected {shape}")
        if (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(
                f"block_sparse_matmul: {name} are {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}; "
                "expected the same"
            )
