"""Growing schedules on images: every network ends as its target, and equal runs are equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from irgrow.experiments import gradmax_images
from irgrow.experiments.gradmax_images import NETWORKS, Plan, built, run_one
from irgrow.experiments.reproduce import MissingData, Setting

QUICK = Plan(epochs=2, growths=2, batch_size=32)


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (x_test, y_test) = gradmax_images.load(False)
    few = (x[:96], y[:96]), (x_test[:50], y_test[:50])
    monkeypatch.setattr(gradmax_images, "load", lambda full: few)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_grown_networks_end_as_their_targets(network: str) -> None:
    plan = replace(QUICK, network=network)
    target, sites = built(replace(plan, method="big"), (1, 8, 8), 0)
    start, _ = built(plan, (1, 8, 8), 0)
    for name, width in sites.items():
        assert (start.groups[name].units, target.groups[name].units) == (round(width / 4), width)
    run = run_one(plan, 0)
    assert not run["notes"]
    assert run["parameters"][-1] == target.counts.parameters > start.counts.parameters
    assert run == run_one(plan, 0)


def test_the_forms_are_those_of_the_papers_networks() -> None:
    """VGG-11 has eight convolutions, WRN-28 twelve blocks, MobileNet-v1 thirteen pairs."""
    groups = {n: built(Plan(network=n), (3, 32, 32), 0, full=True)[0].groups for n in NETWORKS}
    assert sum(g.startswith("conv") for g in groups["vgg"]) == 8
    assert sum(g.startswith("inside") for g in groups["wrn"]) == 12
    assert sum(g.startswith("depthwise") for g in groups["mobilenet"]) == 13


def test_the_experiment_leaves_its_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gradmax_images, "NETWORKS", {"mobilenet": NETWORKS["mobilenet"]})
    found = gradmax_images.run(Setting((0,), tmp_path, progress=False), replace(QUICK, epochs=1))
    assert all((tmp_path / file).stat().st_size > 1000 for file in found.figures)
    assert {c.status for c in found.claims} == {"not established"}


def test_the_full_setting_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("IRGROW_DATA", str(tmp_path))
    with pytest.raises(MissingData, match="CIFAR10"):
        gradmax_images.run(Setting((0,), tmp_path, full=True, progress=False))
