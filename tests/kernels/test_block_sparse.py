"""`block_sparse_matmul` against a full float64 product: values, first and second derivatives, odd shapes, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from irgrow.kernels import block_sparse as module
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.kernels.block_sparse import (
    BlockMask,
    block_mask,
    block_sparse_matmul,
    block_sparse_matmul_cost,
    block_sparse_matmul_reference,
    choose,
)

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_mask(rows: int, columns: int, size: int, density: float) -> BlockMask:
    draw = torch.Generator().manual_seed(rows + 100 * columns)
    return block_mask(torch.rand(rows, columns, generator=draw) < density, size)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-30)) if b.numel() else 0.0


def test_the_structure_says_where_blocks_stand():
    mask = random_mask(4, 3, 16, 0.5)
    values = normal(mask.blocks, 16, 16)
    W = mask.matrix(values)
    assert torch.equal(mask.values(W), values)
    for k, (i, j) in enumerate(zip(mask.row.tolist(), mask.column.tolist(), strict=True)):
        assert mask.pointer[i] <= k < mask.pointer[i + 1]
        assert torch.equal(W[16 * i : 16 * i + 16, 16 * j : 16 * j + 16], values[k])
    for j in range(3):
        here = mask.transposed_block[mask.transposed_pointer[j] : mask.transposed_pointer[j + 1]]
        assert (mask.column[here.long()] == j).all()
    assert sorted(mask.transposed_block.tolist()) == list(range(mask.blocks))


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    size=st.sampled_from([16, 32, 64]),
    batch=st.integers(0, 70),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_and_gradients(rows, columns, size, batch, density, bias, activation, dtype):
    mask = random_mask(rows, columns, size, density)
    shapes = [(mask.columns, batch), (mask.blocks, size, size), *([(mask.rows,)] if bias else [])]
    operands = [normal(*shape, dtype=dtype, seed=n) / 4 for n, shape in enumerate(shapes)]
    incoming = normal(mask.rows, batch, dtype=dtype, seed=9)
    exact = [t.double().requires_grad_() for t in operands]
    expected = block_sparse_matmul_reference(mask, *exact, activation=activation)
    ours = [t.clone().requires_grad_() for t in operands]
    found = block_sparse_matmul(mask, *ours, activation=activation, route="blocks")
    assert relative(found.double(), expected) < TOLERANCE[dtype]
    with torch.no_grad():
        assert torch.equal(block_sparse_matmul(mask, *ours, activation=activation, route="blocks"), found)
    # the slope of a kink may fall on either side: compared where |z| is not rounding
    if ACTIVATIONS[activation].smooth or not bias:
        wanted = torch.autograd.grad(expected, exact, incoming.double())
        for mine, theirs in zip(torch.autograd.grad(found, ours, incoming), wanted, strict=True):
            assert relative(mine.double(), theirs) < 10 * TOLERANCE[dtype]


def test_every_layout_of_operands():
    mask = random_mask(3, 2, 16, 0.7)
    x, values = normal(21, 32).T, normal(16, 16, mask.blocks).permute(2, 1, 0)
    incoming = normal(1, 1).expand(48, 21)
    operands = [x.requires_grad_(), values.requires_grad_()]
    found = block_sparse_matmul(mask, *operands, route="blocks")
    expected = block_sparse_matmul_reference(mask, *operands)
    assert relative(found, expected) < 1e-12
    pairs = (torch.autograd.grad(y, operands, incoming) for y in (found, expected))
    assert all(relative(a, b) < 1e-12 for a, b in zip(*pairs, strict=True))


def test_second_derivatives():
    mask = random_mask(1, 2, 16, 1.0)
    operands = [
        normal(32, 2).requires_grad_(),
        (normal(mask.blocks, 16, 16, seed=1) / 8).requires_grad_(),
        normal(16, seed=2).requires_grad_(),
    ]

    def twice(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), operands)

    mine = twice(block_sparse_matmul(mask, *operands, activation="tanh", route="blocks"))
    theirs = twice(block_sparse_matmul_reference(mask, *operands, activation="tanh"))
    assert all(relative(a, b) < 1e-10 for a, b in zip(mine, theirs, strict=True))


def test_the_same_bits_with_any_number_of_threads():
    mask, kept = random_mask(16, 16, 32, 0.5), torch.get_num_threads()
    x, values = normal(512, 200, dtype=torch.float32), normal(mask.blocks, 32, 32, dtype=torch.float32, seed=1)
    found = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            operands = [x.clone().requires_grad_(), values.clone().requires_grad_()]
            y = block_sparse_matmul(mask, *operands, activation="gelu", route="blocks")
            found.append([y.detach(), *torch.autograd.grad(y, operands, torch.ones_like(y))])
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_choice_and_its_reason(monkeypatch):
    mask = random_mask(4, 4, 16, 0.5)
    assert choose(mask, "cpu")[0] == "blocks"
    assert choose(random_mask(20, 20, 16, 0.1), "cuda")[0] == "blocks"
    assert choose(random_mask(4, 4, 16, 1.0), "cuda") == ("dense", "100 % in blocks of 16 is above the crossover, 30 %")
    with monkeypatch.context() as patch:
        patch.setattr(module.gpu, "why_not_triton", lambda device: "no triton")
        assert choose(mask, "cuda") == ("dense", "no block-sparse kernel on cuda")
    assert block_sparse_matmul_cost(mask, 10)[0] == 2 * mask.blocks * 256 * 10
    x, values = normal(64, 3), normal(mask.blocks, 16, 16)
    half = block_sparse_matmul(mask, x.bfloat16(), values.bfloat16())  # no compiled code for it: the full product
    assert relative(half.double(), block_sparse_matmul(mask, x, values)) < 2e-2
    monkeypatch.setattr(module, "_compiled", lambda: None)
    assert choose(mask, "cpu") == ("dense", "numba is not installed")
    with pytest.raises(RuntimeError, match="'blocks' needs a CPU, numba and float32 or float64 .*, found cpu, no "):
        block_sparse_matmul(mask, x, values, route="blocks")


def test_callers_mistakes():
    mask = random_mask(2, 2, 16, 1.0)
    x, values = normal(32, 3), normal(4, 16, 16)
    for message, mistake in (
        ("size 8, expected one of", lambda: block_mask(torch.ones(2, 2, dtype=torch.bool), 8)),
        (r"pattern is torch.float32 \(2, 2\), expected", lambda: block_mask(torch.ones(2, 2), 16)),
        (r"x has shape \(31, 3\), expected \(32, batch\)", lambda: block_sparse_matmul(mask, x[:31], values)),
        (r"values have shape \(3, 16, 16\), expected \(4, 16, 16\)", lambda: block_sparse_matmul(mask, x, values[:3])),
        (r"bias have shape \(2,\), expected \(32,\)", lambda: block_sparse_matmul(mask, x, values, normal(2))),
        ("values are torch.float32 on cpu, x is torch.float64", lambda: block_sparse_matmul(mask, x, values.float())),
        ("activation 'swish', expected one of", lambda: block_sparse_matmul(mask, x, values, activation="swish")),
        ("route 'fast', expected one of", lambda: block_sparse_matmul(mask, x, values, route="fast")),
    ):
        with pytest.raises(ValueError, match=message):
            mistake()
