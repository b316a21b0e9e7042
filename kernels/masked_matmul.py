"""y = act(W x + bias) for a matrix W of which only some entries exist; values feature-major [n, B].

    sparse     compiled on the CPU (masked_matmul_cpu.py), Triton on a GPU: compressed rows forward, their transpose
               backward, a dot product per existing entry for the gradient of the values
    dense      the values are scattered into a full matrix and multiplied; the gradient of the full matrix is formed
               and read at the entries that exist

`choose` says which is faster, and why. Both are differentiable any number of times; second derivatives, torch.func
and torch.compile go through plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from irgrow.kernels import costs, gpu, masked_matmul_cpu
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.graph import compressed_rows, first_duplicate
from irgrow.kernels.masked_matmul_cpu import Panels, panels
from irgrow.kernels.outer import row_products
from irgrow.kernels.shared import COMPILED, reference_gradients
from irgrow.kernels.walk_plan import SLOPE_STORED

Array = np.ndarray[Any, np.dtype[Any]]
ROUTES = ("auto", "sparse", "dense")
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}

_CROSSOVER_GPU = 0.04  # estimated, not measured: an edge fetches 4 bytes from the L2 cache per column of the batch


@dataclass(frozen=True, eq=False)
class Mask:
    """Which entries of a [rows, columns] matrix exist, and which value each has. Made by `mask`."""

    rows: int
    columns: int
    values: int  # length of the vector of values
    flat: Tensor  # [edges] int64: row * columns + column
    index: Tensor | None  # [edges] int64: the value of each edge; None: one each, in order
    repeats: bool  # whether an entry has several edges, whose values add up
    compressed: tuple[Array, Array, Array]  # pointer [rows + 1]; column and index of each edge, by row
    spare: list[Tensor] = field(default_factory=list, repr=False)  # memory that serves one call after the other
    _made: dict[Any, Any] = field(default_factory=dict)

    @property
    def edges(self) -> int:
        return len(self.flat)

    def __repr__(self) -> str:
        density = self.edges / max(1, self.rows * self.columns)
        return f"Mask({self.rows}x{self.columns}, {self.edges} edges, {density:.1%})"

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(flat, index) there."""
        if self.flat.device == device:
            return self.flat, self.index
        if device not in self._made:
            self._made[device] = self.flat.to(device), None if self.index is None else self.index.to(device)
        found: tuple[Tensor, Tensor | None] = self._made[device]
        return found

    def route(self, batch: int, device: torch.device, training: bool) -> str:
        """What `choose` says, remembered."""
        key = batch, device, training
        if key not in self._made:
            self._made[key] = choose(self.rows, self.columns, self.edges, batch, device, training=training)[0]
        found: str = self._made[key]
        return found

    def panels(self, transposed: bool) -> Panels:
        """The edges of the matrix, or of its transpose, in the order in which the CPU walks them."""
        if transposed not in self._made:
            pointer, column, index = self.compressed
            row = np.repeat(np.arange(self.rows), np.diff(pointer))
            if transposed:
                self._made[True] = panels(self.columns, self.rows, column, row, index)
            else:
                self._made[False] = panels(self.rows, self.columns, row, column, index)
        found: Panels = self._made[transposed]
        return found


def mask(rows: int, columns: int, row: Tensor, column: Tensor, index: Tensor | None = None) -> Mask:
    """The entries (row[e], column[e]) exist, with value index[e] (default: e). O(edges).

    row, column, index [edges] integers. Entries may repeat (their values add up) and values may be shared.
    Raises ValueError for an index out of range.
    """
    for name, tensor, size in (("row", row, rows), ("column", column, columns), ("index", index, None)):
        if tensor is None:
            continue
        if tensor.ndim != 1 or tensor.is_floating_point() or len(tensor) != len(row):
            raise ValueError(
                f"mask: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {len(row)} integers in one dimension"
            )
        if len(tensor) and (int(tensor.min()) < 0 or (size is not None and int(tensor.max()) >= size)):
            bound = "at least 0" if size is None else f"in 0..{size - 1}"
            raise ValueError(f"mask: {name} holds {int(tensor.min())}..{int(tensor.max())}, expected {bound}")
    row, column = row.detach().cpu().long(), column.detach().cpu().long()
    index = None if index is None else index.detach().cpu().long()
    flat = row * columns + column
    pointer, order = compressed_rows(row.numpy(), rows)
    compressed = pointer, column.numpy()[order], order if index is None else index.numpy()[order]
    values = len(row) if index is None else int(index.max()) + 1 if len(index) else 0
    repeats = first_duplicate(column.numpy(), row.numpy(), rows, columns) >= 0
    return Mask(rows, columns, values, flat, index, repeats, compressed)


def masked_matmul_reference(
    mask: Mask, x: Tensor, values: Tensor, bias: Tensor | None = None, *, activation: str = "identity"
) -> Tensor:
    """`masked_matmul` by its definition, in plain torch: any dtype, device and number of derivatives."""
    z = _matrix(mask, values) @ x
    return ACTIVATIONS[activation](z if bias is None else z + bias[:, None])


def masked_matmul(
    mask: Mask,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "identity",
    route: str = "auto",
) -> Tensor:
    """act(W x + bias), [rows, B]. x [columns, B], values [mask.values or more], bias [rows]; one dtype and device.

    Differentiable in x, values and bias. Raises ValueError for operands that do not fit or an unknown name, and
    RuntimeError if the sparse route is asked for by name where it cannot run (not on a CPU, or without numba).
    """
    _check(mask, x, values, bias, activation, route)
    training = torch.is_grad_enabled() and (x.requires_grad or values.requires_grad)
    if route == "auto":
        route = mask.route(x.shape[1], x.device, training)
    if route == "sparse" and gpu.runs_triton(x.device, x.dtype):
        if _differentiated_otherwise():
            return masked_matmul_reference(mask, x, values, bias, activation=activation)
        from irgrow.kernels.masked_matmul_triton import Masked

        return Masked.apply(mask, x, values, bias, activation)
    if route == "sparse":
        if x.device.type != "cpu" or not _has_numba():
            raise RuntimeError(
                f"masked_matmul: the sparse route needs a CPU and numba, or Triton, found {x.device} "
                f"{'with' if _has_numba() else 'without'} numba; use route='dense'"
            )
        if x.dtype not in COMPILED or _differentiated_otherwise() or not {type(t) for t in (x, values, bias)} <= _PLAIN:
            return masked_matmul_reference(mask, x, values, bias, activation=activation)
        if training or (bias is not None and bias.requires_grad):
            return _Sparse.apply(mask, x, values, bias, activation)
        code = ACTIVATIONS[activation].code
        return masked_matmul_cpu.forward(mask.panels(False), mask.rows, x, values, bias, code, None, mask.spare)
    if _differentiated_otherwise() or x.device.type != "cpu" or x.dtype != torch.float32:
        return masked_matmul_reference(mask, x, values, bias, activation=activation)
    z = _MaskedDense.apply(mask, x, values)
    return ACTIVATIONS[activation](z if bias is None else z + bias[:, None])


def choose(
    rows: int, columns: int, edges: int, batch: int, device: torch.device | str, *, training: bool = True
) -> tuple[str, str]:
    """(route, reason): what takes less time for so many edges; `training` counts the backward pass as well.

    A function of its arguments (and of whether numba is installed).
    """
    if torch.device(device).type != "cpu":
        if gpu.why_not_triton(torch.device(device)):
            return "dense", f"no sparse kernel on {torch.device(device).type}"
        route, side = ("sparse", "not above") if edges <= _CROSSOVER_GPU * rows * columns else ("dense", "above")
        return route, f"{edges} of {rows}x{columns} entries are {side} {100 * _CROSSOVER_GPU:.0f} % (an estimate)"
    if not _has_numba():
        return "dense", "numba is not installed"
    size = costs.Size(rows, columns, edges, batch)
    took = {route: costs.estimate(route, size, training=training) for route in ("sparse", "dense")}
    route = min(took, key=lambda route: took[route])
    times = ", ".join(f"{route} about {ns / 1e3:.0f} us" for route, ns in took.items())
    density = 100 * edges / max(1, rows * columns)
    return route, f"{density:.3g} % of {rows}x{columns} at batch {batch}: {times}"


def masked_matmul_cost(mask: Mask, batch: int, *, route: str = "sparse", itemsize: int = 4) -> tuple[int, int]:
    """(flops, bytes) of the forward pass; the backward pass takes twice both."""
    entries = mask.edges if route == "sparse" else mask.rows * mask.columns
    activations = itemsize * batch * (mask.rows + mask.columns)
    structure = 8 * mask.edges + itemsize * mask.edges if route == "sparse" else itemsize * (2 * entries + mask.edges)
    return 2 * entries * batch, structure + activations


# --- the sparse route on a CPU --------------------------------------------------------------------------------


class _Sparse(torch.autograd.Function):
    """act(W x + bias), compiled."""

    @staticmethod
    def forward(ctx: Any, mask: Mask, x: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        code = ACTIVATIONS[activation].code
        keep = activation in SLOPE_STORED and any(ctx.needs_input_grad)
        slopes = x.new_empty(mask.rows, x.shape[1]) if keep else None
        y = masked_matmul_cpu.forward(mask.panels(False), mask.rows, x, values, bias, code, slopes, mask.spare)
        ctx.mask, ctx.activation = mask, activation
        ctx.save_for_backward(x, values, bias, y, slopes)
        return y

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        mask: Mask = ctx.mask
        x, values, bias, y, slopes = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            reference = partial(masked_matmul_reference, mask, activation=ctx.activation)
            found = reference_gradients(reference, (x, values, bias), needs, incoming)
            return None, *found, None
        code = ACTIVATIONS[ctx.activation].code
        of, shared = mask.panels(True), mask.index is not None
        found = masked_matmul_cpu.backward(
            of, mask.rows, incoming, x, values, y, slopes, code, needs, shared, mask.spare
        )
        return None, *found, None


# --- the dense route ------------------------------------------------------------------------------------------


def _matrix(mask: Mask, values: Tensor) -> Tensor:
    """W [rows, columns] in plain torch."""
    flat, index = mask.indices(values.device)
    values = values[: mask.values] if index is None else values.index_select(0, index)
    matrix = values.new_zeros(mask.rows * mask.columns)
    matrix = matrix.index_add(0, flat, values) if mask.repeats else matrix.scatter(0, flat, values)
    return matrix.reshape(mask.rows, mask.columns)


class _MaskedDense(torch.autograd.Function):
    """W x on the CPU in float32, its products by what is fastest there."""

    @staticmethod
    def forward(ctx: Any, mask: Mask, x: Tensor, values: Tensor) -> Tensor:
        matrix = _matrix(mask, values)
        ctx.mask = mask
        ctx.save_for_backward(x, values, matrix)
        return row_products(matrix, x.T)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        mask: Mask = ctx.mask
        x, values, matrix = ctx.saved_tensors
        _, needs_x, needs_values = ctx.needs_input_grad
        if torch.is_grad_enabled() or not torch._C._has_storage(incoming):  # differentiated again, or batched
            function = partial(masked_matmul_reference, mask)
            return None, *reference_gradients(function, (x, values), (needs_x, needs_values), incoming)
        d_x = row_products(matrix.T, incoming.T) if needs_x else None
        if not needs_values:
            return None, d_x, None
        flat, index = mask.indices(values.device)
        d_edges = row_products(incoming, x).view(-1).index_select(0, flat)
        if index is None and len(values) == mask.values:
            return None, d_x, d_edges
        places = torch.arange(len(flat)) if index is None else index
        return None, d_x, torch.zeros_like(values).index_add_(0, places, d_edges)


def _differentiated_otherwise() -> bool:
    """Whether torch.compile, torch.func or forward-mode differentiation looks inside: plain torch serves them."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return torch.compiler.is_compiling() or transformed


@lru_cache(1)
def _has_numba() -> bool:
    return find_spec("numba") is not None


# --- what callers may get wrong -------------------------------------------------------------------------------


def _check(mask: Mask, x: Tensor, values: Tensor, bias: Tensor | None, activation: str, route: str) -> None:
    if route not in ROUTES:
        raise ValueError(f"masked_matmul: route {route!r}, expected one of {ROUTES}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"masked_matmul: activation {activation!r}, expected one of {sorted(ACTIVATIONS)}")
    if x.ndim != 2 or len(x) != mask.columns:
        raise ValueError(f"masked_matmul: x has shape {tuple(x.shape)}, expected ({mask.columns}, batch)")
    if values.ndim != 1 or len(values) < mask.values:
        raise ValueError(f"masked_matmul: values have shape {tuple(values.shape)}, expected ({mask.values},) or longer")
    if bias is not None and bias.shape != (mask.rows,):
        raise ValueError(f"masked_matmul: bias has shape {tuple(bias.shape)}, expected ({mask.rows},)")
    for name, tensor in (("values", values), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(
                f"masked_matmul: {name} are {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}; "
                "expected the same"
            )
