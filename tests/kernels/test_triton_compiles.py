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
