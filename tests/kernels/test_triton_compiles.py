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
    found: dict[str, Compiled] = {}
    for number, launch in enumerate(launches):
        key = (launch.kernel, tuple(sorted((k, str(v)) for k, v in launch.constants.items())))
        if not any(key == other for other in found):
            found[f"{number} {key[0].__name__}"] = compiled(launch)
    for one in found.values():
        check(one)
    return found


SLOW = pytest.mark.slow
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


def forward_and_backward(function: Any, mask: Any, x: Any, values: Any, bias: Any) -> None:
    leaves = [t.requires_grad_() for t in (x, values, bias)]
    function.apply(mask, *leaves, "gelu").backward(torch.zeros(mask.rows, x.shape[1], dtype=x.dtype))


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [
        (SINGLE, 256),
        *[pytest.param(SINGLE, b, marks=SLOW) for b in (1, 33)],
        *[pytest.param(d, b, marks=SLOW) for d in (DOUBLE, HALF, torch.float16) for b in (1, 33, 256)],
    ],
)
def test_masked_matmul(dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.kernels.masked_matmul import mask
    from irgrow.kernels.masked_matmul_triton import Masked

    structure = mask(64, 64, torch.arange(64), torch.arange(64))
    operands = torch.zeros(64, batch, dtype=dtype), torch.zeros(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    found = all_of(recorded(monkeypatch, lambda: forward_and_backward(Masked, structure, *operands)))
    assert {name.split()[1] for name in found} == {"_rows", "_through_activation", "_sampled", "_shared"}
    rows = next(one for one in found.values() if one.name == "_rows")
    assert batch < 256 or dtype == DOUBLE or rows.count(r"LDG\.E\.(64|128)") > 0, sorted(set(rows.instructions))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (HALF, 64),
        (SINGLE, 32),
        *[pytest.param(d, s, marks=SLOW) for d, s in ((HALF, 16), (HALF, 32), (SINGLE, 16), (SINGLE, 64))],
        *[pytest.param(torch.float16, s, marks=SLOW) for s in (16, 32, 64)],
    ],
)
def test_block_sparse(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from irgrow.kernels.block_sparse import block_mask
    from irgrow.kernels.block_sparse_triton import Blocks

    structure = block_mask(torch.eye(2, dtype=torch.bool), size)
    shapes = ((2 * size, 256), (2, size, size), (2 * size,))
    operands = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    found = all_of(recorded(monkeypatch, lambda: forward_and_backward(Blocks, structure, *operands)))
    products = [one for one in found.values() if one.name.startswith("_block")]
    assert len(products) == 3
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
