"""Growing schedules on images: every network ends as its target, and equal runs are equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from irgrow.experiments import gradmax_images, images
from irgrow.experiments.gradmax_images import METHODS, NETWORKS, Plan, built, run_one
from irgrow.experiments.reproduce import Setting

QUICK = Plan(epochs=2, growths=2, batch_size=32, steps=2)


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (x_test, y_test) = images.load()
    few = (x[:96], y[:96]), (x_test[:50], y_test[:50])
    monkeypatch.setattr(images, "load", lambda name: few)


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
    groups = {n: built(Plan(network=n, whole=True), (3, 32, 32), 0)[0].groups for n in NETWORKS}
    assert sum(g.startswith("conv") for g in groups["vgg"]) == 8
    assert sum(g.startswith("inside") for g in groups["wrn"]) == 12
    assert sum(g.startswith("depthwise") for g in groups["mobilenet"]) == 13


def test_photographs_shrink_as_in_mobilenet() -> None:
    groups = built(Plan("mobilenet", width=32, whole=True, method="big"), (3, 224, 224), 0, 1000)[0].groups
    assert [groups[f"pointwise{n}"].shape for n in (1, 2, 6, 12, 13)] == [
        (64, 112, 112), (128, 56, 56), (512, 14, 14), (1024, 7, 7), (1024, 7, 7),
    ]  # fmt: skip
    assert groups["y"].shape == (1000,)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_grows_with_and_without_batch_norm(method: str, norm: bool) -> None:
    run = run_one(replace(QUICK, network="wrn", method=method, norm=norm, epochs=1, growths=1, until=0.3), 0)
    assert not run["notes"] and len(run["jumps"]) == (method not in ("small", "big"))
    for before, after, _ in run["jumps"]:
        assert before > 0 and after > 0


def test_a_batch_norm_makes_new_units_large_at_once() -> None:
    """Appendix C: the fan-in's gradient is multiplied by 1 / sqrt(1e-5), so one step undoes its size eps."""
    plan = replace(QUICK, growths=1, until=0.3)
    normed, plain = (run_one(replace(plan, norm=norm), 0)["jumps"][0][2] for norm in (True, False))
    assert normed > 100 * plain


def test_claims(tmp_path: Path) -> None:
    base = {
        net: replace(plan, epochs=1, growths=1, steps=1, until=0.3, batch_size=32)
        for net, plan in gradmax_images.bases(False).items()
    }
    found = gradmax_images.run(Setting((0,), tmp_path, progress=False), base)
    assert {c.status for c in found.claims} == {"not established"}
    assert {"wrn BN-inverse gradmax-inverse firefly", "norm-jump", "vgg-gradmax-firefly"} <= {
        c.name for c in found.claims
    }
