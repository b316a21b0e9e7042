"""Masked and block-sparse matmul on Triton, against their definitions in float64: values and all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from irgrow.kernels.block_sparse import BlockMask, block_mask, block_sparse_matmul, block_sparse_matmul_reference
from irgrow.kernels.masked_matmul import Mask, mask, masked_matmul, masked_matmul_reference

TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Fresh memory holds NaN instead of what happens to lie there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(1).new_empty(7).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(rows: int, columns: int, density: float, shared: int = 0) -> Mask:
    """With empty rows and repeated entries; shared values if there are fewer than edges, one of them unused."""
    draw = torch.Generator().manual_seed(rows)
    row, column = (torch.rand(rows, columns, generator=draw) < density).nonzero(as_tuple=True)
    row, column = torch.cat([row, row[::3]]), torch.cat([column, column[::3]])
    order = torch.randperm(len(row), generator=draw)
    index = 2 * torch.randint(shared, (len(row),), generator=draw) if shared else None
    return mask(rows + 1, columns, row[order], column[order], index)


def apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) if b.numel() else 0.0


def results(function: Any, structure: Any, operands: list[Tensor], incoming: Tensor, **named: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in operands]
    y = function(structure, *leaves, **named)
    return [y, *torch.autograd.grad(y, leaves, incoming.to(y.dtype))]


def check(
    function: Any, reference: Any, structure: Mask | BlockMask, operands: list[Tensor], route: str, activation: str
) -> list[Tensor]:
    device, dtype = operands[0].device, operands[0].dtype
    incoming = normal(structure.rows, operands[0].shape[1], seed=9).to(device, dtype)
    found = results(function, structure, operands, incoming, activation=activation, route=route)
    again = results(function, structure, operands, incoming, activation=activation, route=route)
    doubled = [t.double() for t in operands]
    expected = results(reference, structure, doubled, incoming.double(), activation=activation)
    distances = [apart(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(distances) <= TOLERANCE[dtype], distances
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))
    return found


def masked(structure: Mask, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = ((structure.columns, batch), (structure.values + 2,), (structure.rows,))
    return [normal(*shape, seed=k).to(device, dtype) for k, shape in enumerate(shapes)]


def blocks(structure: BlockMask, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = ((structure.columns, batch), (structure.blocks, structure.size, structure.size), (structure.rows,))
    return [normal(*shape, seed=k).to(device, dtype) for k, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("rows", "columns", "batch", "shared", "activation"),
    [(1, 1, 1, 0, "identity"), (6, 9, 17, 0, "gelu"), (9, 5, 3, 4, "tanh"), (3, 70, 33, 3, "relu")],
)
def test_masked_matmul(rows: int, columns: int, batch: int, shared: int, activation: str, device: str) -> None:
    structure = random_mask(rows, columns, 0.5, shared)
    tensors = masked(structure, batch, torch.float64, device)
    check(masked_matmul, masked_matmul_reference, structure, tensors, "sparse", activation)


def test_operands_may_lie_anyhow(device: str) -> None:
    """Transposed and shifted views give what copies give."""
    structure = random_mask(6, 9, 0.5)
    x, values, bias = masked(structure, 16, torch.float32, device)
    views = x.T.contiguous().T, torch.cat([values[:1], values])[1:], bias[:, None].expand(-1, 2).T[1]
    found, expected = (masked_matmul(structure, *ops, route="sparse") for ops in (views, (x, values, bias)))
    assert found.equal(expected)


@pytest.mark.parametrize("edges", [0, 4])
@pytest.mark.parametrize("batch", [0, 3])
def test_nothing_to_sum(edges: int, batch: int, device: str) -> None:
    """No edges, no batch: the bias, or nothing; gradients of zeros."""
    places = torch.arange(edges) % 2
    structure = mask(2, 3, places, places)
    operands = masked(structure, batch, torch.float64, device)
    found = check(masked_matmul, masked_matmul_reference, structure, operands, "sparse", "sin")
    assert found[2].shape == (structure.values + 2,) and ((batch and edges) or found[2].eq(0).all())


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
def test_no_blocks_to_sum(present: bool, batch: int, device: str) -> None:
    structure = block_mask(torch.tensor([[present, False]]), 16)
    operands = blocks(structure, batch, torch.float32, device)
    found = check(block_sparse_matmul, block_sparse_matmul_reference, structure, operands, "blocks", "sin")
    assert found[1].shape == (32, batch) and found[2].shape == (int(present), 16, 16)
    assert found[1][16:].eq(0).all() and (batch or found[3].eq(0).all())


def test_large_masks(device: str, large: bool) -> None:
    for dtype, batch in ((d, b) for d in TOLERANCE for b in (1, 33, 256, 1000) if large):
        structure = random_mask(700, 900, 0.03, shared=5000)
        tensors = [t / 5 for t in masked(structure, batch, dtype, device)]
        check(masked_matmul, masked_matmul_reference, structure, tensors, "sparse", "gelu")


def test_second_derivatives_are_the_references(device: str) -> None:
    structure = random_mask(4, 5, 0.6)
    second = []
    for function, named in ((masked_matmul, {"route": "sparse"}), (masked_matmul_reference, {})):
        leaves = [t.requires_grad_() for t in masked(structure, 3, torch.float64, device)]
        y = function(structure, *leaves, activation="tanh", **named)
        (first,) = torch.autograd.grad(y.sum(), leaves[:1], create_graph=True)
        second.append(torch.autograd.grad((first**2).sum(), leaves))
    assert max(apart(a, b) for a, b in zip(*second, strict=True)) <= 1e-12


def test_second_derivatives_of_blocks_are_the_references(device: str) -> None:
    structure = block_mask(torch.tensor([[True, False], [True, True]]), 16)
    second = []
    for function, named in ((block_sparse_matmul, {"route": "blocks"}), (block_sparse_matmul_reference, {})):
        leaves = [(t / 4).requires_grad_() for t in blocks(structure, 3, torch.float32, device)]
        y = function(structure, *leaves, activation="tanh", **named)
        (first,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
        second.append(torch.autograd.grad((first**2).sum(), leaves))
    assert max(apart(a, b) for a, b in zip(*second, strict=True)) <= 1e-5


@pytest.mark.parametrize(
    ("size", "batch", "activation"),
    [
        (16, 1, "gelu"),
        (16, 70, "relu"),
        (32, 9, "tanh"),
        pytest.param(64, 130, "silu", marks=pytest.mark.slow),
    ],
)
def test_block_sparse(size: int, batch: int, activation: str, device: str) -> None:
    """An empty row of blocks, an empty column, float32."""
    structure = block_mask(torch.tensor([[True, False, True], [False, False, False]]), size)
    tensors = [t / size**0.5 for t in blocks(structure, batch, torch.float32, device)]
    found = check(block_sparse_matmul, block_sparse_matmul_reference, structure, tensors, "blocks", activation)
    assert found[1][size : 2 * size].eq(0).all()


def test_large_block_masks(device: str, large: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    for dtype, size in ((d, s) for d in (torch.float32, torch.bfloat16, torch.float16) for s in (16, 32, 64) if large):
        structure = block_mask(torch.rand(13, 17, generator=draw) < 0.3, size)
        tensors = [t / 5 for t in blocks(structure, 333, dtype, device)]
        check(block_sparse_matmul, block_sparse_matmul_reference, structure, tensors, "blocks", "gelu")
