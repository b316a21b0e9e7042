"""Threads: a walk of wide levels is the same on one and on several, and nobody waits for a thread that never comes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from irgrow.kernels import shared, walk_cpu
from irgrow.kernels.walk import plan, walk, walk_reference


def wide_plan(seed: int = 0):
    """Three levels of 300 rows with 60 edges each, a bias per row."""
    draw = np.random.default_rng(seed)
    inputs, width, levels, degree = 200, 300, 3, 60
    first = [0, *(inputs + width * k for k in range(levels))]
    count = [inputs, *[width] * levels]
    columns = [first[k] + np.argsort(draw.random((width, count[k])), axis=1)[:, :degree] for k in range(levels)]
    pointer = np.arange(0, width * levels * degree + 1, degree)
    return plan(inputs, pointer, np.concatenate(columns).ravel(), code=3, bias=np.arange(width * levels))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(structure, batch: int, function=walk, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = (structure.inputs, batch), (structure.edges,), (structure.neurons,), (structure.neurons, batch)
    leaves = [(torch.randn(*s, generator=draw) / 8).to(dtype).requires_grad_() for s in shapes]
    values = function(structure, *leaves)
    incoming = torch.randn(values.shape, generator=draw).to(dtype)
    return values, *torch.autograd.grad(values, leaves, incoming)


@pytest.mark.parametrize("batch", [20, 33, 64])
def test_levels_shared_by_threads_give_the_same_bits(batch, two_threads, monkeypatch):
    structure = wide_plan()
    used: list[int] = []
    original = shared.in_phases
    monkeypatch.setattr(walk_cpu, "in_phases", lambda *operands: (used.append(1), original(*operands))[1])
    monkeypatch.setattr(walk_cpu, "_WORK_PER_THREAD", 1)
    monkeypatch.setattr(walk_cpu, "_slices", lambda _plan, pitch, _like: [(0, pitch)])
    together = gradients(structure, batch)
    assert len(used) == 2  # forward and backward
    torch.set_num_threads(1)
    alone = gradients(structure, batch)
    assert len(used) == 2
    exact = gradients(structure, batch, walk_reference, torch.float64)
    for ours, single, reference in zip(together, alone, exact, strict=True):
        assert torch.equal(ours, single)
        assert float((ours.detach().double() - reference).abs().max() / reference.abs().max()) < 1e-5


def test_one_thread_alone_finishes_all_phases(two_threads, monkeypatch):
    """OpenMP may give fewer threads than it is asked for."""
    structure = wide_plan()
    expected = gradients(structure, 32)
    monkeypatch.setattr(walk_cpu, "_WORK_PER_THREAD", 1)
    monkeypatch.setattr(shared, "together", lambda entry, dtype, parts: _only_first(entry, dtype, parts))
    found = gradients(structure, 32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _only_first(entry, dtype, parts):
    shared.run(entry, dtype, *parts[0][0])


def test_shared_weights_are_summed_by_one_thread(two_threads, monkeypatch):
    """Two threads would add to one sum."""
    structure = wide_plan()
    assert structure.nothing_shared
    tied = plan(
        structure.inputs,
        structure.pointer,
        structure.column,
        code=3,
        weight=np.zeros(structure.edges, np.int32),
        bias=np.arange(structure.neurons),
    )
    assert not tied.nothing_shared
    monkeypatch.setattr(walk_cpu, "in_phases", None)
    monkeypatch.setattr(walk_cpu, "_WORK_PER_THREAD", 1)
    gradients(tied, 32)


def test_without_torchs_threads_others_do_the_work(two_threads, monkeypatch):
    structure = wide_plan()
    monkeypatch.setattr(walk_cpu, "_WORK_PER_THREAD", 1)
    expected = gradients(structure, 150)
    monkeypatch.setattr(shared, "_torch_threads", lambda: None)
    found = gradients(structure, 150)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
