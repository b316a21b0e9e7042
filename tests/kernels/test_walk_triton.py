"""What can be known of the Triton walk without running it: its tiles, what it compiles to, and that growing compiles
nothing. The tests that run it are in tests/gpu."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import irgrow as ig
from irgrow.ir.errors import BackendError
from irgrow.kernels import gpu
from irgrow.kernels.walk import MAX, SUM, WalkPlan, plan, walked_by
from irgrow.kernels.walk_tiles import FIELDS, LANES, LONG, Field, Tiles, tiles_of
from tests.kernels.test_walk import operands, region

triton = pytest.importorskip("triton")
if gpu.interpreted():
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from irgrow.kernels import walk_triton  # noqa: E402

CPU = torch.device("cpu")


# --- tiles ----------------------------------------------------------------------------------------------------


def wide(seed: int) -> WalkPlan:
    """A few levels with more rows than a tile has lanes, rows with many edges, and shared weights."""
    r = np.random.default_rng(seed)
    rows, inputs = 4 * LANES + 7, 90
    parents = [r.choice(inputs if row < 2 * LANES else inputs + LANES, int(r.integers(0, 5))) for row in range(rows)]
    parents[3], parents[2 * LANES + 1] = np.arange(LONG + 20), np.arange(2 * LONG) % inputs
    pointer, column = np.cumsum([0, *map(len, parents)]), np.concatenate(parents)
    kinds = np.where(r.random(rows) < 0.2, MAX, SUM)
    weight = r.integers(0, 40, len(column))
    return plan(inputs, pointer, column, weight=weight, code=r.integers(0, 14, rows), aggregation=kinds, bias=0)


@given(st.integers(0, 10**6), st.booleans(), st.integers(1, 90), st.integers(0, 6))
def test_tiles_cover_every_row_once_and_every_edge(seed: int, big: bool, neurons: int, inputs: int) -> None:
    p = wide(seed) if big else region(seed, neurons, inputs)
    tiles = tiles_of(p, CPU)
    level = np.searchsorted(p.level_pointer, np.arange(p.neurons), side="right")
    degree, is_max = np.diff(p.pointer), p.aggregation == MAX
    check(tiles.forward.numpy(), level, np.where(is_max, 0, degree), np.where(is_max, degree, 0), ~is_max)
    assert [int(b) for b in tiles.forward[:, Field.CODES]] == [
        int(np.bitwise_or.reduce(1 << p.code[first:last])) for first, last in tiles.forward[:, :2].tolist()
    ]
    level = -np.concatenate([np.zeros(p.inputs, int), level])
    children, pooled = np.diff(p.child_pointer)[::-1], np.diff(tiles.max_pointer.numpy())
    backward = tiles.backward.numpy()
    check(backward, level, children, pooled, np.ones(p.rows, bool))
    assert tiles.computed == np.count_nonzero(backward[:, Field.FIRST] >= p.inputs)
    assert (backward[: tiles.computed, Field.FIRST] >= p.inputs).all()
    totals = np.diff(tiles.total_pointer.numpy())
    check(tiles.totals.numpy(), np.zeros(len(totals), int), totals, 0 * totals, np.ones(len(totals), bool))


def check(tiles: Any, level: Any, summed: Any, pooled: Any, may_share: Any) -> None:
    """Tiles stand by rising level, cover each row once, and have turns enough for the edges of each."""
    assert tiles.shape[1] == FIELDS
    found = []
    before = None
    for first, last, step, turns, max_turns, _, opens, _ in tiles.tolist():
        rows = np.arange(first, last)
        found += rows.tolist()
        assert 0 < len(rows) <= LANES and len(set(level[rows])) == 1
        assert (step == LANES and len(rows) == 1 and may_share[first]) or step == 1
        assert turns == -(-summed[rows].max() // step) and max_turns == -(-pooled[rows].max() // step)
        alone = summed[first] + pooled[first] > LONG and may_share[first]
        assert (step == LANES) == alone
        here = level[first]
        assert opens == (before is None or here != before)
        assert before is None or here >= before
        before = here
    assert sorted(found) == list(range(len(level)))


@given(st.integers(0, 10**6), st.booleans())
def test_every_gradient_has_its_summands(seed: int, tied: bool) -> None:
    p = region(seed, 20, tied=tied)
    tiles = tiles_of(p, CPU)
    pointer, summand = tiles.total_pointer.numpy(), tiles.total_summand.numpy()
    rows = np.repeat(np.arange(p.inputs, p.rows), np.diff(p.pointer))
    np.testing.assert_array_equal(tiles.summand_row[: p.edges], rows)
    np.testing.assert_array_equal(tiles.summand_column[: p.edges], p.column)
    for w in range(p.weights):
        assert sorted(summand[pointer[w] : pointer[w + 1]]) == np.flatnonzero(p.weight == w).tolist()
    biased = np.flatnonzero(p.bias >= 0)
    for b in range(p.biases):
        mine = summand[pointer[p.weights + b] : pointer[p.weights + b + 1]] - p.edges
        assert sorted(biased[mine]) == np.flatnonzero(p.bias == b).tolist()


@given(st.integers(0, 10**6))
def test_edges_into_maxima_are_transposed(seed: int) -> None:
    p = region(seed, 20)
    tiles = tiles_of(p, CPU)
    rows = np.repeat(np.arange(p.inputs, p.rows), np.diff(p.pointer))
    parent = np.repeat(np.arange(p.rows), np.diff(tiles.max_pointer))
    edge = tiles.max_edge.numpy()
    np.testing.assert_array_equal(np.sort(edge), np.flatnonzero(p.aggregation[rows - p.inputs] == MAX))
    np.testing.assert_array_equal(p.column[edge], parent)
    np.testing.assert_array_equal(rows[edge], tiles.max_child)
    kept = tiles.winner.numpy()
    assert sorted(kept[kept >= 0]) == list(range(p.maxima)) and ((kept >= 0) == (p.aggregation == MAX)).all()


# --- growing compiles nothing ---------------------------------------------------------------------------------


def key_of(kernel: Any, operands: tuple[Any, ...], constants: dict[str, Any]) -> str:
    """What decides whether a kernel is compiled again: types, and the values it is specialised on."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    return str(bind(*operands, **constants)[1])


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """From now on kernels are noted down here instead of run."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *operands: Any) -> None:
        assert all(0 < n < 2**31 for n in grid) and all(n < 2**16 for n in grid[1:])
        calls.append((kernel, operands, walk_triton.variants(like.dtype)[kernel][0]))

    monkeypatch.setattr(walk_triton, "_launch", note)
    return calls


def walk_once(p: WalkPlan, batch: int, dtype: torch.dtype, seed: int) -> None:
    x, w, b, o = (None if t is None else t.detach() for t in operands(p, batch, dtype, seed, seed % 3 > 0))
    x = x.t().contiguous().t() if seed % 2 else x  # type: ignore[union-attr]
    w = w[1:] if p.weights and seed % 5 == 4 else w  # type: ignore[index]  # 4 bytes off
    y, saved = walk_triton.forward(p, x, w, b if p.biases else None, o, seed % 2 == 0)  # type: ignore[arg-type]
    walk_triton.backward(p, y, saved, w, b, (seed % 2 == 0, True, True, True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", walk_triton.gpu.DTYPES)
def test_twenty_growths_compile_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of 1, multiples of 16 and others, and operands anywhere in memory: one key per kernel."""
    calls = launched(monkeypatch)
    walk_triton._compiled.__wrapped__(CPU, dtype)  # the warm-up
    warm = {key_of(*call) for call in calls}
    assert len(calls) == len({kernel for kernel, _, _ in calls}) == len(walk_triton.variants(dtype)) == len(warm)
    for growth, batch in zip(range(20), (1, 16, 17, 32, 100, 2048, 5000) * 3, strict=False):
        walk_once(region(growth, (1, 16, 5, 32, 47)[growth % 5] + growth, growth % 4 * 8), batch, dtype, growth)
    assert len(calls) > 20 * 3 and {key_of(*call) for call in calls} == warm


def test_a_specialised_kernel_would_be_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launched(monkeypatch)
    for growth, batch in enumerate((1, 16, 17)):
        walk_once(region(growth, (1, 16, 5)[growth]), batch, torch.float32, 0)
    plain = triton.jit(walk_triton._walk_forward.fn)
    mine = [(operands, constants) for kernel, operands, constants in calls if kernel is walk_triton._walk_forward]
    assert len({key_of(plain, *call) for call in mine}) == 3
    assert len({key_of(walk_triton._walk_forward, *call) for call in mine}) == 1


# --- what it compiles to, for sm_90 ---------------------------------------------------------------------------

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
INDICES = ("structure", "tiles", "winner_at", "max_pointer", "max_child", "max_edge", "winners", "row_of", "column_of")
SLOW = [torch.float64, torch.bfloat16, torch.float16]


def compiled(kernel: Any, dtype: torch.dtype) -> Any:
    """The kernel for sm_90 as it is launched: what the tensors of `forward` and `backward` are aligned to included."""
    constants, warps = walk_triton.variants(dtype)[kernel]
    sums = "fp64" if dtype == torch.float64 else "fp32"
    signature, given_, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], given_[place,] = "constexpr", constants[name]
        elif parameter.do_not_specialize:
            signature[name] = parameter.annotation_type or "i32"
        else:
            kind = "i32" if name in (*INDICES, "pointer", "summand") else sums if name == "sums" else TYPES[dtype]
            signature[name] = f"*{kind}"
            if not parameter.do_not_specialize_on_alignment:
                attributes[place,] = [["tt.divisibility", 16]]
    return triton.compile(
        triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=given_, attrs=attributes),
        target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in SLOW)])
def test_no_variant_spills(dtype: torch.dtype, tmp_path: Path, record_property: Any) -> None:
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    for kernel in walk_triton.variants(dtype):
        made = compiled(kernel, dtype)
        assert made.metadata.shared <= 227 * 1024
        assert "convert_layout" not in made.asm["ttgir"] or kernel is walk_triton._batch_sums
        barriers = made.asm["ptx"].count("bar.sync")
        assert barriers >= 1 or kernel not in (walk_triton._walk_forward, walk_triton._walk_backward)
        (tmp_path / "kernel.ptx").write_text(made.asm["ptx"])
        arguments = [assembler, "-v", "--gpu-name", "sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"]
        said = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
        assert spills and all(pair == ("0", "0") for pair in spills), (kernel.fn.__name__, said)
        assert registers and max(registers) <= 160
        record_property(f"{kernel.fn.__name__} {dtype}", f"{max(registers)} registers, {made.metadata.shared} bytes")


# --- the doors ------------------------------------------------------------------------------------------------


def test_where_there_is_no_gpu_a_backend_asked_for_by_name_says_so() -> None:
    network = ig.mlp([4, 3, 2])
    text = "backend 'triton': found tensors on cpu without TRITON_INTERPRET=1, expected a GPU and triton; move"
    with pytest.raises(BackendError, match=text):
        ig.compile(network, backend="triton")
    p = plan(1, [0, 1], [0], code=0)
    with pytest.raises(RuntimeError, match="walk: Triton cannot run here: tensors on cpu without TRITON_INTERPRET=1"):
        walk_triton.walk(p, torch.ones(1, 2), torch.ones(1))
    with pytest.raises(BackendError, match="backend 'numba': found torch.bfloat16 on cpu: plain torch"):
        ig.compile(network.to(torch.bfloat16), backend="numba")


def test_without_triton_a_gpu_walks_in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert walked_by(cuda, torch.float32) == "Triton" and walked_by(CPU, torch.float32) == "numba"
    assert walked_by(cuda, torch.float8_e5m2) == "plain torch" == walked_by(CPU, torch.float16)
    monkeypatch.setattr(gpu, "_INSTALLED", False)
    assert walked_by(cuda, torch.float32) == "plain torch"
    assert gpu.why_not_triton(cuda) == "triton is not installed"


@pytest.mark.parametrize(("value", "yes"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_variable_is_read_as_triton_reads_it(value: str, yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert gpu.interpreted() == yes == bool(triton.knobs.runtime.interpret)
    assert gpu.why_not_triton(CPU) is None or not yes


def test_tiles_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p = region(1)
    assert isinstance(tiles_of(p, CPU), Tiles) and tiles_of(p, CPU) is tiles_of(p, CPU)
    assert tiles_of(walk_triton.plan_of(p.tensor), CPU) is tiles_of(p, CPU)
