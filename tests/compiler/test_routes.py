"""Sparse levels by every route: all compute what the interpreter says, and the cost model takes one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import irgrow as ig
from irgrow.compiler import schedule
from irgrow.compiler.lower import EitherStep, WalkStep, lower
from irgrow.compiler.matrices import blocks_of
from irgrow.ir.interpreter import interpret
from irgrow.ir.network import Network
from irgrow.kernels import costs
from irgrow.kernels.costs import Cost, Size, estimate

ROUTES = ("walk", "sparse", "dense", "blocks")


def pattern(rows: int, columns: int, kind: str, seed: int = 0) -> ig.Sparse:
    """Edges in random order. blocks: some of 16, full; holes: an eighth of their edges is missing; ties: 40 weights."""
    draw = np.random.default_rng(seed)
    coarse = draw.random((rows // 16, columns // 16)) < 0.4
    coarse[np.arange(rows // 16), np.arange(rows // 16) % (columns // 16)] = True  # every row reads something
    mask = np.kron(coarse, np.ones((16, 16), np.bool_)) if kind != "random" else draw.random((rows, columns)) < 0.3
    if kind == "holes":
        mask &= draw.random(mask.shape) < 0.875
    target, source = np.nonzero(mask)
    order = draw.permutation(target.size)
    index = draw.integers(0, 40, target.size) if kind == "ties" else None
    return ig.Sparse(source[order], target[order], weight_index=index, weights=-1 if index is None else 40)


def network(kind: str, dtype: torch.dtype = torch.float64) -> Network:
    """x -> a -> c -> b -> y: two levels that may be one walk, one under a norm, one beside a few single edges."""
    builder = ig.Builder(seed=0, dtype=dtype)
    builder.input("x", 48)
    builder.group("a", 64, activation="gelu", bias=True)
    builder.group("c", 64, activation="sin")
    builder.group("b", 64, activation="tanh", norm="layer")
    builder.output("y", 32, activation="relu")
    builder.connect("x", "a", pattern(64, 48, kind))
    builder.connect("a", "c", pattern(64, 64, kind, 3))
    builder.connect("c", "b", pattern(64, 64, kind, 1))
    builder.connect("b", "y", pattern(32, 64, kind, 2))
    builder.connect("x", "y", ig.Sparse(np.arange(5), np.arange(5)))
    return builder.build()


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("batch", [1, 19])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["random", "blocks", "holes", "ties"])
def test_every_route_computes_what_the_interpreter_says(kind: str, route: str, batch: int) -> None:
    net = network(kind)
    program = lower(net, every_route=True)
    assert sum(isinstance(step, EitherStep) for step in program.steps) == 2
    draw = torch.Generator().manual_seed(0)
    results = []
    for run in (
        lambda x, held: program.run(held, (x,), route=route)[0][0],
        lambda x, held: interpret(net, x, tensors=held),
    ):
        x = torch.randn(batch, 48, generator=draw.manual_seed(1), dtype=torch.float64).requires_grad_()
        held = {name: t.clone().requires_grad_() for name, t in net.tensors().items()}
        y = run(x, held)
        g = torch.randn(y.shape, generator=draw, dtype=torch.float64)  # type: ignore[union-attr]
        results.append([y, *torch.autograd.grad(y, [x, *held.values()], g)])  # type: ignore[list-item]
    assert max(apart(a, b) for a, b in zip(*results, strict=True)) <= 1e-12
    if route == "blocks":
        either = [step for step in program.steps if isinstance(step, EitherStep)]
        kept = {found for step in either for s in step.steps for matrix in s.matrices for found in matrix.routes}
        assert ("blocks" in kept) == (kind != "random")


def test_second_derivatives_of_blocks() -> None:
    net = network("holes")
    program, products = lower(net, every_route=True), []
    x = torch.randn(3, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for route in ("blocks", "walk"):
        held = {name: t.clone().requires_grad_() for name, t in net.tensors().items()}
        (y,), _ = program.run(held, (x,), route=route)
        first = torch.autograd.grad(y.pow(3).sum(), list(held.values()), create_graph=True)
        products.append(torch.autograd.grad(sum(f.pow(2).sum() for f in first), list(held.values())))  # type: ignore[arg-type]
    assert max(apart(a, b) for a, b in zip(*products, strict=True)) <= 1e-11


def test_recording_and_shifts_reach_every_group() -> None:
    net = network("blocks")
    program = lower(net, every_route=True)
    x = torch.randn(4, 48, dtype=torch.float64)
    shifts = {"a": torch.randn(4, 64, dtype=torch.float64), "y": torch.randn(4, 32, dtype=torch.float64)}
    expected, values = program.run(net.tensors(), (x,), shifts=shifts, values=("a", "y"), route="walk")
    assert values["a"].shape == (4, 64) and values["y"].equal(expected[0])
    for route in ROUTES:
        found, _ = program.run(net.tensors(), (x,), shifts=shifts, route=route)
        assert apart(found[0], expected[0]) <= 1e-12


# --- the choice -----------------------------------------------------------------------------------------------


def level(kind: str, n: int = 256) -> Network:
    builder = ig.Builder(seed=0)
    builder.input("x", n)
    builder.output("y", n, activation="relu")
    builder.connect("x", "y", pattern(n, n, kind))
    return builder.build()


def priced(cheap: str) -> dict[tuple[str, bool], Cost]:
    """All routes at the same price but one, which is nearly free for large batches and dear for small ones."""
    even, better = Cost(1e3, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0), Cost(1e6, 0.0, 1e-3, 0.0, 1e-3, 0.0, 0.0)
    return {(route, training): better if route == cheap else even for route in ROUTES for training in (False, True)}


@pytest.mark.parametrize("cheap", ROUTES)
def test_the_cheapest_route_is_taken_and_explained(cheap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "COSTS", priced(cheap))
    program = lower(level("blocks"))
    [step] = program.steps
    assert isinstance(step, EitherStep)
    [matrix] = step.steps[0].matrices
    taken = [step.by_steps(batch, False) for batch in (1, 16, 64, 256, 1024)]
    if cheap == "walk":
        assert taken == sorted(taken, reverse=True) and taken[0] and not taken[-1]
        return
    assert taken == sorted(taken) and taken[-1] and not taken[0]  # once worth it, it stays so
    assert matrix.route(1024, False) == cheap
    named = "blocks of 16" if cheap == "blocks" else cheap
    assert "the walk, from batch" in step.reason and named in step.reason


def test_a_route_that_is_never_faster_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dear = {key: Cost(1e9, 0, 0, 0, 0, 0, 0) for key in costs.COSTS if key[0] == "blocks"}
    monkeypatch.setattr(costs, "COSTS", {**costs.COSTS, **dear})
    assert "blocks" not in lower(level("blocks")).explain()


def test_few_edges_stay_in_the_walk() -> None:
    [step] = lower(level("blocks", 64)).steps
    assert isinstance(step, WalkStep) and "too few for a matrix" in step.reason


@given(
    st.sampled_from(ROUTES), st.booleans(), st.integers(1, 4000), st.integers(1, 4000), st.floats(0.0, 1.0),
    st.integers(1, 2000),
)  # fmt: skip
def test_estimates_grow_with_edges_and_with_lines_of_the_batch(
    route: str, training: bool, rows: int, columns: int, density: float, batch: int
) -> None:
    edges = int(density * rows * columns)
    size = Size(rows, columns, edges, batch, min(rows * columns, 2 * edges))
    here = estimate(route, size, training=training)
    assert here > 0 and here == estimate(route, size, training=training)
    assert estimate(route, size._replace(batch=batch + costs.LINE), training=training) >= here
    assert estimate(route, size._replace(edges=edges + 1), training=training) >= here


# --- blocks ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([16, 32, 64]), st.integers(0, 10_000))
def test_blocks_hold_exactly_the_edges(down: int, across: int, size: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    coarse = draw.random((down, across)) < 0.5
    row, column = np.nonzero(
        np.kron(coarse, np.ones((size, size), np.bool_)) & (draw.random((down * size, across * size)) < 0.9)
    )
    order = draw.permutation(row.size)
    row, column = row[order], column[order]
    found = blocks_of(down * size, across * size, row, column)
    if found is None:
        assert coarse.mean() > 0.85 or not coarse.any()
        return
    mask, place = found
    assert np.unique(place).size == place.size
    values = torch.arange(1.0, 1.0 + row.size, dtype=torch.float64)
    blocks = torch.zeros(mask.blocks * mask.size**2, dtype=torch.float64).scatter(0, torch.from_numpy(place), values)
    expected = torch.zeros(down * size, across * size, dtype=torch.float64)
    expected[row, column] = values
    assert mask.matrix(blocks.view(mask.blocks, mask.size, mask.size)).equal(expected)
    assert mask.size >= size


def test_what_is_no_block_structure() -> None:
    draw = np.random.default_rng(0)
    for mask in (
        draw.random((256, 256)) < 0.1,
        draw.random((256, 256)) < 0.97,  # nearly everything
        np.kron(draw.random((8, 8)) < 0.3, draw.random((32, 32)) < 0.3),  # blocks, but mostly empty
        np.kron(draw.random((8, 8)) < 0.3, np.ones((31, 31))),  # of another size
    ):
        row, column = np.nonzero(mask)
        assert blocks_of(*mask.shape, row, column) is None


def test_plain_torch_takes_a_matrix_only_where_it_is_dense() -> None:
    assert "sparse matrix" not in lower(level("random"), backend="torch").explain()
    assert schedule.CROSSOVER == 0.4


def test_a_walk_reads_a_group_that_is_not_complete_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop of groups: m[0] reads h[1], half of h, before h[0] can be computed from m."""
    monkeypatch.setattr("irgrow.compiler.schedule.SMALLEST_MATRIX", 1)
    monkeypatch.setattr("irgrow.compiler.schedule.CROSSOVER", 0.0)
    builder = ig.Builder(seed=0, dtype=torch.float64)
    builder.input("x", 3)
    builder.group("h", 2, activation="sigmoid")
    builder.group("m", 2, aggregation="max", bias=True)
    builder.output("y", 2)
    builder.connect("x", "h", ig.Sparse(np.array([0, 1, 2, 0]), np.array([0, 0, 1, 1])))
    builder.connect("h", "m", ig.Sparse(np.array([1]), np.array([0])))
    builder.connect("m", "h", ig.Sparse(np.array([0, 1]), np.array([0, 0])))
    builder.connect("m", "y")
    builder.connect("h", "y")
    net = builder.build()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,), _ = lower(net).run(net.tensors(), (x,))
    assert apart(found, interpret(net, x)) <= 1e-14
