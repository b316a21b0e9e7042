"""Every Triton kernel as it is built for sm_90: no spills, shared memory that fits, tensor cores where meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.sm90 import SHARED_LIMIT, Compiled, Launch, compiled, recorded

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


def check(found: Compiled, *, tensor_cores: bool | None = None) -> None:
    print(found)
    assert found.spills == 0, found
    assert found.shared <= SHARED_LIMIT, found
    if tensor_cores is not None:
        assert (found.tensor_core > 0) == tensor_cores, found


# --- the inspection itself ------------------------------------------------------------------------------------


@triton.jit
def _sum_of_squares(x, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tile = tl.load(x + rows * N + columns)
    tl.store(out + rows * N + columns, tl.dot(tile, tile, input_precision="ieee") + tl.exp(tile))


def test_spills_are_seen() -> None:
    """With 24 registers a thread cannot hold its part of a tile."""
    x = torch.zeros(32, 32)
    launch = Launch.of(_sum_of_squares, (x, x), {"N": 32, "num_warps": 4})
    fine, starved = (
        compiled(launch),
        compiled(Launch(launch.kernel, launch.operands, launch.constants, {"maxnreg": 24})),
    )
    check(fine, tensor_cores=False)
    assert fine.registers > 24 >= starved.registers and starved.spills > 0
    assert fine.count("LDG") == fine.count(r"LDG\.E\.128") > 0


def test_alignment_is_the_operands() -> None:
    """A tensor that starts between two 16-byte lines is not read 16 bytes at a time."""
    x = torch.zeros(32 * 32 + 1)[1:]
    found = compiled(Launch.of(_sum_of_squares, (x, x), {"N": 32, "num_warps": 4}))
    assert found.count("LDG") > 0 and found.count(r"LDG\.E\.128") == 0


# --- what is shipped ------------------------------------------------------------------------------------------


def all_of(launches: list[Launch]) -> dict[str, Compiled]:
    """Every kernel among the launches, with each set of its constants, compiled once."""
    different: dict[Any, Launch] = {}
    for launch in launches:
        different.setdefault((launch.kernel, str(launch.constants), str(launch.options)), launch)
    found = {f"{n} {launch.kernel.__name__}": compiled(launch) for n, launch in enumerate(different.values())}
    for one in found.values():
        check(one)
    return found


SLOW = pytest.mark.slow
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def work(function: Any, mask: Any, *operands: torch.Tensor, backward: bool = True) -> None:
    """What is launched for y = gelu(W x + bias), and for its gradients."""
    x, values, bias = (t.requires_grad_() for t in operands)
    y = function.apply(mask, x, values, bias, "gelu")
    if backward:
        y.backward(torch.zeros_like(y))


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [
        (SINGLE, 256),
        *[pytest.param(d, 256, marks=SLOW) for d in (DOUBLE, HALF, torch.float16)],
        *[pytest.param(d, b, marks=SLOW) for d in (SINGLE, DOUBLE, HALF, torch.float16) for b in (1, 33)],
    ],
)
def test_masked_matmul(dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.kernels.masked_matmul import mask
    from irgrow.kernels.masked_matmul_triton import Masked

    structure = mask(64, 64, torch.arange(64), torch.arange(64))
    operands = torch.zeros(64, batch, dtype=dtype), torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    found = all_of(recorded(monkeypatch, lambda: work(Masked, structure, *operands)))
    assert {name.split()[1] for name in found} == {"_rows", "_through_activation", "_sampled", "_shared"}
    rows = next(one for one in found.values() if one.name == "_rows")
    assert batch < 256 or dtype == DOUBLE or rows.count(r"LDG\.E\.(64|128)") > 0, sorted(set(rows.instructions))


@pytest.mark.parametrize(
    ("dtype", "size", "backward"),
    [
        (HALF, 16, False),
        *[pytest.param(d, s, True, marks=SLOW) for d in (HALF, SINGLE, torch.float16) for s in (16, 32, 64)],
    ],
)
def test_block_sparse(dtype: torch.dtype, size: int, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.kernels.block_sparse import block_mask
    from irgrow.kernels.block_sparse_triton import Blocks

    structure = block_mask(torch.eye(2, dtype=torch.bool), size)
    shapes = ((2 * size, 256), (2, size, size), (2 * size,))
    operands = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    found = all_of(recorded(monkeypatch, lambda: work(Blocks, structure, *operands, backward=backward)))
    products = [one for one in found.values() if one.name.startswith("_block")]
    assert len(products) == (3 if backward else 1)  # forward, dX, dW
    for one in products:
        check(one, tensor_cores=True)
        if size == 64:
            assert one.count("HGMMA") > 0, one


@pytest.mark.parametrize(
    ("dtype", "d"), [(SINGLE, 64), *[pytest.param(t, d, marks=SLOW) for t, d in ((SINGLE, 65), (DOUBLE, 64))]]
)
def test_outer(dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.kernels import outer_triton

    out, x = torch.zeros(d, d, dtype=DOUBLE), torch.zeros(300, d, dtype=dtype)
    found = all_of(recorded(monkeypatch, lambda: outer_triton.add([outer_triton.Product(out, x, x, True)])))
    tiles, _ = found.values()
    check(tiles, tensor_cores=True)
    assert tiles.count("HGMMA" if dtype == SINGLE else "DMMA") > 0 and tiles.count("LDGSTS") > 0, tiles
