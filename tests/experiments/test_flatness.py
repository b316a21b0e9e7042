"""Insertion-grown networks: parameter budgets, equal sizes, equal runs, missing data."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from irgrow.experiments import flatness, full_data
from irgrow.experiments.flatness import Plan, budget, large, one, small, widths
from irgrow.experiments.reproduce import EXPERIMENTS, MissingData, Setting
from irgrow.ir.errors import Refused

TINY = Plan("digits", 9, ((1, 5), (2, 4)), ("a",), 1.8, 0.2, (400, 700), limit=8, measured_on=50)


def parameters(sizes: list[int]) -> int:
    return sum(a * b for a, b in pairwise(sizes))


@pytest.mark.parametrize(
    ("inputs", "outputs", "hidden", "each"),
    [(784, 10, 10, {10}), (784, 10, 500, {778, 779}), (64, 10, 10, {10}), (64, 10, 40, {58}), (1024, 2, 1024, {1024})],
)
def test_budget(inputs: int, outputs: int, hidden: int, each: set[int]) -> None:
    found = budget(inputs, outputs, hidden)
    assert set(found) == each and len(found) == hidden
    assert inputs * outputs + sum(found) == hidden * (inputs + outputs)


@pytest.mark.parametrize("hidden", [8, 65])
def test_no_budget(hidden: int) -> None:
    with pytest.raises(Refused, match=r"expected 1 to 64, the number of inputs; use 9 to 64 neurons"):
        budget(64, 10, hidden)


def test_widths_of_equal_size() -> None:
    assert widths(2960, 64, 10, 40, (1.0,)) == [64, 40, 10]
    for shares, layers in (((0.8, 0.2), 2), ((0.6, 0.3, 0.1), 3)):
        found = widths(2960, 64, 10, 40, shares)
        assert len(found) == layers + 2 and abs(parameters(found) / 2960 - 1) < 0.01
        assert np.allclose(np.array(found[1:-1]) / sum(found[1:-1]), shares, atol=0.05)
    assert abs(parameters(widths(397_000, 784, 10, 500, (0.6, 0.3, 0.1))) / 397_000 - 1) < 0.01


def test_schedules() -> None:
    assert small(10) == tuple((epoch, 1) for epoch in range(5, 96, 10))
    assert [epoch for epoch, _ in large(500, 10)] == [10, 20, 30, 40, 50, 60]
    assert sum(count for _, count in large(500, 10)) == 500


def test_all_networks_have_equal_size_and_loss() -> None:
    rows = {r["network"]: r for r in one(TINY, 400, 0)}
    assert set(rows) == {"grown", "scratch", "a"}
    assert {r["parameters"] for r in rows.values()} == {9 * 74}
    assert rows["grown"]["depth"] == rows["scratch"]["depth"] >= 2
    assert rows["grown"]["epochs"] >= 3  # all neurons are in
    for row in rows.values():
        assert row["curve"][-1] <= TINY.target and row["depth blocks"] > row["edge"] > 0


def test_a_target_that_is_not_reached_has_no_flatness() -> None:
    rows = one(Plan("digits", 9, ((1, 9),), (), 1e-3, 0.2, limit=2), 700, 0)
    assert all(r["depth blocks"] is None and len(r["curve"]) == 2 for r in rows)
    assert rows[0]["parameters"] == 9 * 74


def test_claims(tmp_path: Path) -> None:
    result = flatness.run(Setting((0,), tmp_path, progress=False), [TINY])
    assert {c.name for c in result.claims} >= {"flatter-9-400", "control-9-700", "edge-9-400", "batch-a", "accuracy"}
    assert EXPERIMENTS["flatness"].seeds >= 5


def test_missing_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingData, match=r"--full: MNIST: found no working torchvision .* pip install torchvision"):
        flatness.run(Setting((0,), tmp_path, full=True, progress=False))


def test_full_data_through_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in with torchvision's interface: arrays of bytes, `targets`, and a RuntimeError without files."""

    class Stored:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert not download
            if not Path(root).exists():
                raise RuntimeError("Dataset not found.")
            n = 6 if train else 4
            self.data = np.full((n, 5, 5, 3), 255, np.uint8) if self.colour else torch.zeros(n, 5, 5, dtype=torch.uint8)
            self.targets = list(range(n))

    library = ModuleType("torchvision")
    library.datasets = ModuleType("datasets")
    library.datasets.MNIST = type("MNIST", (Stored,), {"colour": False})
    library.datasets.CIFAR10 = type("CIFAR10", (Stored,), {"colour": True})
    monkeypatch.setitem(sys.modules, "torchvision", library)
    (x, y), (x_test, _) = full_data.images("CIFAR10", tmp_path)
    assert x.shape == (6, 3, 5, 5) and float(x.max()) == 1.0 and x_test.shape == (4, 3, 5, 5)
    assert y.tolist() == [0, 1, 2, 3, 4, 5] and y.dtype == torch.int64
    assert full_data.images("MNIST", tmp_path)[0][0].shape == (6, 1, 5, 5)
    with pytest.raises(MissingData, match=r"no data in .*absent/ .* download=True"):
        full_data.images("MNIST", tmp_path / "absent")
