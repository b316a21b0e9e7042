"""compare: equal parameters, equal multiply-adds, both controls; deterministic."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import irgrow as ig
from irgrow.experiments.compare import PASSES, SCRATCH, STAYING, redrawn, title
from irgrow.ir.errors import BadData, BadFile, Refused, UnknownName

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(120, 6, generator=DRAW)
Y = (X @ torch.randn(6, 3, generator=DRAW)).relu().argmax(1)


def start(seed: int) -> ig.Network:
    return ig.mlp([6, 2, 3], seed=seed)


quick = partial(ig.compare, network=start, data=(X, Y), growths=2, budget=400_000, batch_size=20, progress=False)


@pytest.fixture(scope="module")
def found() -> ig.Comparison:
    return quick([ig.GradMax(2), ig.Random(2), ig.Tiny(2)], seeds=2, test=(X, Y))


def test_all_grow_to_the_same_size_and_spend_the_same(found: ig.Comparison) -> None:
    assert set(found.outcomes) == {"GradMax(2)", "Random(2)", "Tiny(2)", SCRATCH, STAYING}
    large, small = ig.mlp([6, 6, 3]).counts, start(0).counts
    assert found.parameters == large.parameters
    for arm, runs in found.outcomes.items():
        for run in runs:
            assert run.parameters == (small if arm == STAYING else large).parameters
            step = PASSES * large.multiply_adds * 20
            assert found.budget - step < run.multiply_adds <= found.budget
            assert (run.growing > 0) == (arm not in (SCRATCH, STAYING))
            assert not run.notes
    spent = [run.steps * PASSES * large.multiply_adds * 20 for run in found.outcomes[SCRATCH]]
    assert spent == [run.multiply_adds for run in found.outcomes[SCRATCH]]
    assert min(r.steps for r in found.outcomes[STAYING]) > max(r.steps for r in found.outcomes["Random(2)"])


def test_the_table_says_who_beats_whom(found: ig.Comparison) -> None:
    assert found.measure == "accuracy"
    text = str(found)
    assert "| method | parameters | steps | accuracy | train loss | better than scratch | than staying small |" in text
    wins = sum(a > b for a, b in zip(found.values("Random(2)"), found.values(STAYING), strict=True))
    row = next(r for r in found.rows() if r[0] == "Random(2)")
    assert row[-1] == f"{wins} of 2"
    assert found.against("Random(2)", STAYING, "train loss") == [
        b - a for a, b in zip(found.values("Random(2)", "train loss"), found.values(STAYING, "train loss"), strict=True)
    ]
    assert {c.status for c in found.claims()} == {"not established"}  # two seeds say nothing


def test_files(found: ig.Comparison, tmp_path: Path) -> None:
    found.save(tmp_path / "c.json")
    held = json.loads((tmp_path / "c.json").read_text())
    assert held["runs"]["Tiny(2)"][1]["widths"] == {"hidden": 6}
    found.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
    with pytest.raises(BadFile, match="a file that can be written"):
        found.save(tmp_path / "no" / "c.json")
    with pytest.raises(BadFile, match=r"ends in \.png"):
        found.plot(tmp_path / "c.nothing")


def test_equal_seeds_give_equal_results(found: ig.Comparison) -> None:
    threads = torch.get_num_threads()
    again = quick([ig.Random(2)], seeds=2, test=(X, Y)).as_dict()["runs"]["Random(2)"]
    assert again == found.as_dict()["runs"]["Random(2)"]
    assert torch.get_num_threads() == threads


def test_a_network_is_drawn_anew_for_every_seed() -> None:
    network = ig.cnn((1, 6, 6), [3], 2, norm="batch", seed=3)
    fresh = redrawn(network, 7)
    assert fresh.structure == network.structure
    assert redrawn(network, 7) == fresh != redrawn(network, 8)
    assert not torch.equal(fresh.tensors()["weight.input_conv1"], network.tensors()["weight.input_conv1"])
    assert float(fresh.tensors()["weight.input_conv1"].abs().max()) <= 1 / 3
    assert torch.equal(fresh.tensors()["scale.conv1"], torch.ones(3))
    assert torch.equal(fresh.bundles["conv1_pool1"].weight, network.bundles["conv1_pool1"].weight)
    runs = quick([ig.Random(2)], network=start(0), seeds=2).outcomes[STAYING]
    assert runs[0].train_loss != runs[1].train_loss


def test_methods_that_choose_splits_themselves_take_part() -> None:
    runs = quick({"splits": ig.SplittingDescent(2, eps=0.1)}, seeds=1).outcomes["splits"]
    assert runs[0].widths == {"hidden": 6} or any("no growth" in note for note in runs[0].notes)


def test_numbers_as_targets_are_compared_by_their_mean_square() -> None:
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    found = quick([ig.Random(2)], data=(x, x[:, :3].sin()), seeds=1, test=[(x, x[:, :3].sin())])
    assert found.measure == "test loss"
    run = found.outcomes[SCRATCH][0]
    assert run.test_loss == pytest.approx(run.train_loss)  # the same data


def test_titles() -> None:
    assert title(ig.Tiny(4, joint=True)) == "Tiny(4, joint=True)"
    assert title(ig.Random(3, seed=5)) == "Random(3)"


def test_mistakes() -> None:
    with pytest.raises(
        Refused, match=r"units per growth: found GradMax\(2\) 2, Random\(3\) 3, expected the same number"
    ):
        quick([ig.GradMax(2), ig.Random(3)])
    with pytest.raises(Refused, match=r"methods: found Random\(2\) twice, expected names of their own; give a mapping"):
        quick([ig.Random(2), ig.Random(2, seed=1)])
    with pytest.raises(Refused, match="methods: found none"):
        quick([])
    with pytest.raises(Refused, match="budget: found 10, expected at least"):
        quick([ig.Random(2)], budget=10)
    with pytest.raises(Refused, match="0 seeds"):
        quick([ig.Random(2)], seeds=0)
    with pytest.raises(BadData, match="120 inputs and 119 targets"):
        quick([ig.Random(2)], data=(X, Y[:-1]))
    with pytest.raises(UnknownName, match="site 'nowhere'"):
        quick([ig.Random(2)], sites=["nowhere"])
    with pytest.raises(UnknownName, match="expected a method with `units`"):
        quick({"f": F.relu})
    with pytest.raises(Refused, match=r"SplittingDescent.*found 2 sites, expected one"):
        quick([ig.SplittingDescent(2)], network=ig.mlp([6, 2, 2, 3]))
