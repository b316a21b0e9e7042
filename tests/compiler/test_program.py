"""Programs as text, reasons, and which kernel gets which work."""

from __future__ import annotations

import pytest
import torch

import irgrow as ig
from irgrow.compiler.lower import WalkStep
from irgrow.ir.errors import BackendError


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
