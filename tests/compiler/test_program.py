"""Programs as text, reasons, and which kernel gets which work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import irgrow as ig
from irgrow.compiler.lower import WalkStep
from irgrow.ir.errors import BackendError, BadData
from irgrow.kernels import graph
from irgrow.kernels.compiled import compiled_variants, recompiled


def test_a_program_prints_one_line_per_step() -> None:
    model = ig.compile(ig.cnn((1, 8, 8), [4], 3, norm="batch"))
    assert str(model.program) == (
        "program: 3 steps, from input\n"
        "  0  conv1 <- conv input -> batch norm -> relu\n"
        "  1  pool1 <- max of conv1\n"
        "  2  output <- dense pool1"
    )


def test_explain_gives_a_reason_for_every_step() -> None:
    network = ig.mlp([8, 6, 4])
    for seed in range(5):
        network = ig.InsertNeuron(2, seed=seed)(network).after
    model = ig.compile(network)
    lines = model.explain().splitlines()
    assert len(lines) == 2 * len(model.program.steps)
    assert all(line.strip() for line in lines)
    assert "too few for a matrix" in model.explain()


def test_an_irregular_network_is_one_walk() -> None:
    builder = ig.Builder(seed=0)
    builder.input("x", 8)
    builder.output("y", 3)
    builder.connect("x", "y")
    network = builder.build()
    for seed in range(40):
        network = ig.InsertNeuron(4, seed=seed)(network).after
    steps = ig.compile(network).program.steps
    assert [type(step) for step in steps] == [WalkStep]
    assert steps[0].plan.edges == network.counts.edges  # type: ignore[attr-defined]


def test_insertions_leave_the_dense_blocks_dense() -> None:
    """Three insertions into a dense network must not turn it into one slow walk."""
    network = ig.mlp([100, 80, 80, 10])
    for seed in range(3):
        network = ig.InsertNeuron(2, seed=seed)(network).after
    program = ig.compile(network).program
    walked = sum(step.plan.edges for step in program.steps if isinstance(step, WalkStep))
    assert walked < 0.1 * network.counts.edges


def test_a_backend_asked_for_by_name_runs_or_raises() -> None:
    network = ig.mlp([4, 3, 2])
    x = torch.randn(2, 4)
    assert torch.allclose(ig.compile(network, backend="numba")(x), ig.compile(network, backend="torch")(x))
    with pytest.raises(BackendError, match="backend 'cobol'.*expected one of auto, torch, numba"):
        ig.compile(network, backend="cobol")


def test_twenty_growths_recompile_nothing() -> None:
    """Structure is data: no kernel that has run is compiled again because the network changed."""
    model = ig.compile(ig.mlp([20, 16, 4], activation="relu", seed=0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def grow_and_step(seed: int) -> None:
        model.grow(ig.InsertNeuron(3, seed=seed)(model.structure), optimizer)
        for batch in (1, 5, 70):
            optimizer.zero_grad()
            model(torch.randn(batch, 20)).square().sum().backward()
            optimizer.step()
            with torch.no_grad():
                model(torch.randn(batch, 20))

    for seed in range(2):
        grow_and_step(seed)
    warm = compiled_variants()
    assert sum(warm.values()) > 5
    for seed in range(2, 22):
        grow_and_step(seed)
    assert recompiled(warm) == []
    short = np.zeros(1, np.int16)
    graph.count_edges(short, short, short, np.zeros(2, np.int16), np.zeros(1, np.bool_))
    assert recompiled(warm) == ["irgrow.kernels.graph.count_edges"]  # another type of arguments is noticed


def test_only_rows_that_are_read_leave_a_walk_and_recording_finds_the_others() -> None:
    builder = ig.Builder(seed=0)
    builder.input("x", 8)
    builder.output("y", 3)
    builder.connect("x", "y")
    network = builder.build()
    for seed in range(12):
        network = ig.InsertNeuron(4, seed=seed)(network).after
    model, x = ig.compile(network), torch.randn(5, 8)
    [step] = model.program.steps
    assert step._read.count == 3  # type: ignore[attr-defined]
    y = model(x)
    recorded, values = model.record(x, values=("inserted", "y"))
    assert values["inserted"].shape == (5, 12)
    torch.testing.assert_close(recorded, y)
    torch.testing.assert_close(values["y"], y)
    names = list(model.tensors().values())
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), names) for out in (y, recorded)), strict=True):
        torch.testing.assert_close(a, b)


def test_an_input_that_does_not_fit_is_refused() -> None:
    model = ig.compile(ig.mlp([4, 3, 2]))
    for wrong in (torch.randn(2, 5), torch.randn(4), torch.randn(2, 4, 1), torch.randn(2, 4).double(), [[1.0] * 4]):
        with pytest.raises(BadData, match="input 'input'"):
            model(wrong)
    assert model(torch.randn(0, 4)).shape == (0, 2)
