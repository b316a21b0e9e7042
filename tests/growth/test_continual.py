"""`Continual`: tasks in a row on one master network, and nothing forgotten, bit for bit."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import irgrow as ig
from irgrow.growth.continual import _Task
from irgrow.ir.errors import BadData, Diverged, Refused, UnknownName

PAIRS = {"a": (0, 1), "b": (3, 5), "c": (8, 9)}
OPTIONS: dict[str, Any] = {"target": 0.99, "budget": 6, "units": 3, "epochs": 10, "mask_epochs": 9}


@cache
def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def task(name: str, image: bool = False) -> tuple[Tensor, Tensor]:
    """Two of the ten digits, 120 samples."""
    x, y = digits()
    chosen = ((y == PAIRS[name][0]) | (y == PAIRS[name][1])).nonzero().flatten()[:120]
    x = x[chosen]
    return (x.reshape(-1, 1, 8, 8) if image else x), (y[chosen] == PAIRS[name][1]).long()


def start(kind: str = "mlp") -> ig.Network:
    return ig.cnn((1, 8, 8), (2, 3), 2, seed=1) if kind == "cnn" else ig.mlp((64, 4, 4, 2), seed=1)


def outputs(learner: ig.Continual, name: str, image: bool = False) -> Tensor:
    with torch.no_grad():
        return learner.model(name)(task(name, image)[0])


@cache
def story(kind: str) -> tuple[ig.Continual, dict[str, Tensor], dict[str, ig.Network], dict[str, ig.Network]]:
    """Three tasks; after each one its outputs, its network and the master."""
    learner, seen, nets, masters = ig.Continual(start(kind), seed=3), {}, {}, {}
    for name in PAIRS:
        learner.learn(name, task(name, kind == "cnn"), **OPTIONS)
        seen[name], nets[name] = outputs(learner, name, kind == "cnn"), learner.extract(name)
        masters[name] = learner.network.clone()
    return learner, seen, nets, masters


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_old_tasks_are_bit_identical(kind: str) -> None:
    learner, seen, nets, masters = story(kind)
    assert learner.tasks == ("a", "b", "c")
    widths = [sum(g.neurons for g in m.groups.values()) for m in masters.values()]
    assert widths[0] < widths[-1], "nothing grew: the test shows nothing"
    for name in PAIRS:
        assert torch.equal(outputs(learner, name, kind == "cnn"), seen[name])
        assert learner.extract(name) == nets[name]
        assert list(learner.extract(name).outputs) == [f"output_{name}"]


def test_control_a_changed_locked_weight_is_noticed() -> None:
    learner, seen, nets, _ = story("mlp")
    broken = copy.deepcopy(learner)
    tensors = broken.network.tensors()
    mine = torch.nonzero(broken.mask("a")["hidden2"]).flatten()
    changed = tensors["weight.hidden1_hidden2"].clone()
    changed[mine] = torch.nextafter(changed[mine], torch.tensor(torch.inf))
    broken._master = broken.network.with_tensors({"weight.hidden1_hidden2": changed})
    assert broken.extract("a") != nets["a"]
    assert not torch.equal(outputs(broken, "a"), seen["a"])
    assert torch.equal(outputs(learner, "a"), seen["a"])


def test_control_training_without_the_lock_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, _, _, _ = story("mlp")
    broken = copy.deepcopy(learner)
    real = _Task.free

    def unlocked(run: _Task) -> dict[str, Tensor]:
        return {n: torch.ones_like(t, dtype=torch.bool) for n, t in run.network.tensors().items() if t.dim()}

    monkeypatch.setattr(_Task, "free", lambda run: real(run) | unlocked(run))
    with pytest.raises(AssertionError, match="not the one that was learned"):
        broken.learn("d", task("b"), **OPTIONS)
    assert broken.tasks == ("a", "b", "c")


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_locked_weights_stay_and_new_units_never_feed_old_ones(kind: str) -> None:
    _, _, _, masters = story(kind)
    for before, after in ((masters["a"], masters["b"]), (masters["b"], masters["c"])):
        for name, group in before.groups.items():
            assert after.groups[name].serials[: group.units].tolist() == group.serials.tolist()
        old, new = before.tensors(), after.tensors()
        for name, tensor in old.items():
            assert torch.equal(new[name][tuple(slice(n) for n in tensor.shape)], tensor), name
        for bundle in before.bundles.values():
            if bundle.weight.dim():
                rows = new[bundle.tensor][: bundle.weight.shape[0]]
                assert not rows[:, bundle.weight.shape[1] :].any(), bundle.name


def test_masks_select_a_subset() -> None:
    learner, _, _, masters = story("mlp")
    for name in PAIRS:
        mask, network = learner.mask(name), learner.extract(name)
        for site, chosen in mask.items():
            assert chosen.dtype == torch.bool and chosen.numel() == learner.network.groups[site].units
            assert int(chosen.sum()) == network.groups[site].units >= 1
    assert not learner.mask("a")["hidden2"][masters["a"].groups["hidden2"].units :].any()
    run = ig.Continual(start(), seed=0)
    run.learn("a", task("a"), **OPTIONS)
    sparse = run.learn("again", task("a"), sparsity=10.0, **OPTIONS | {"budget": 0, "mask_epochs": 20})
    assert sum(sparse.selected.values()) < sum(g.units for g in run.network.groups.values() if "hidden" in g.name)


def test_grows_only_where_the_mask_does_not_do() -> None:
    learner = ig.Continual(ig.mlp((64, 8, 2), seed=1), seed=0)
    first = learner.learn("a", task("a"), **OPTIONS)
    assert first.mask_accuracy is None and first.solved
    before = learner.network
    same = learner.learn("again", task("a"), **OPTIONS | {"target": 0.9, "mask_epochs": 20})
    assert same.solved and same.rounds == same.new == same.unlocked == 0 and same.accuracy == same.mask_accuracy
    assert learner.network.groups["hidden"].serials.tolist() == before.groups["hidden"].serials.tolist()
    hard = learner.learn("b", task("b"), **OPTIONS | {"target": 1.0, "mask_epochs": 1})
    assert hard.mask_accuracy is not None and hard.mask_accuracy < 1.0
    assert 0 < hard.new + hard.unlocked <= 6 and hard.rounds >= 1 and hard.accuracy > hard.mask_accuracy
    grown = learner.network.groups["hidden"].units - before.groups["hidden"].units
    assert grown == hard.new + hard.unlocked


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_candidates_keep_the_function_and_originals_stay(kind: str) -> None:
    learner, _, _, _ = story(kind)
    name, image = ("hidden2", False) if kind == "mlp" else ("conv2", True)
    network = learner.extract("a")
    x, y = task("a", image)
    run = _Task("t", network, network.outputs[0], learner._sites, ((x,), y), learner.loss, 32, 0.01, torch.Generator())
    serials = network.groups[name].serials.tolist()
    before = ig.compile(network)(x)
    run.network, own = run.with_units(name, serials[:2], run.fan_in(name, 2), 2)
    assert run.network.groups[name].serials.tolist()[: len(serials)] == serials
    torch.testing.assert_close(ig.compile(run.network)(x), before)
    run.own |= own
    run.drop(name, serials[:2])
    assert serials[0] not in run.network.groups[name].serials
    torch.testing.assert_close(ig.compile(run.network)(x), before)


def test_same_seed_same_bits() -> None:
    learner, _, nets, _ = story("mlp")
    again = ig.Continual(ig.compile(start()), seed=3)
    for name in ("a", "b"):
        torch.rand(3)
        again.learn(name, task(name), **OPTIONS)
        assert again.extract(name) == nets[name]
        assert again.learned(name) == learner.learned(name)


def test_heads_of_other_sizes() -> None:
    learner = ig.Continual(start())
    x, y = digits()
    learner.learn("five", (x[:100], y[:100] % 5), classes=5, **OPTIONS | {"budget": 0, "epochs": 1})
    assert learner.model("five")(x[:3]).shape == (3, 5)
    assert len(learner.locked) == 8


def test_refusals() -> None:
    x, y = task("a")
    learner = ig.Continual(start())
    before = learner.network
    assert learner.locked == () and learner.tasks == ()
    with pytest.raises(UnknownName, match="task 'q': expected one of none yet"):
        learner.extract("q")
    for options, text in (({"units": 0}, "task 'q': units"), ({"target": 2.0}, "target"), ({"classes": 1}, "classes")):
        with pytest.raises(Refused, match=text):
            learner.learn("q", (x, y), **options)
    with pytest.raises(Refused, match="letters, digits"):
        learner.learn("q r", (x, y))
    for data, text in (
        ((x.double(), y), "task 'q': inputs"),
        ((x[:, :5], y), "task 'q': inputs"),
        ((x * torch.nan, y), "NaN"),
        ((x, y + 1), "classes 1 to 2, expected 0 to 1"),
        ((x, y.float()), "one class per sample"),
        ([], "no samples"),
    ):
        with pytest.raises(BadData, match=text):
            learner.learn("q", data)
    with pytest.raises(Diverged, match="task 'q'"):
        ig.Continual(start(), loss=lambda out, t: out.sum() * torch.nan).learn("q", (x, y))
    assert learner.network is before
    learner.learn("q", (x, y), epochs=1, budget=0)
    with pytest.raises(Refused, match="a task of that name"):
        learner.learn("q", (x, y))
    with pytest.raises(Refused, match="batch norm"):
        ig.Continual(ig.cnn((1, 8, 8), (2,), 2, norm="batch"))
    with pytest.raises(Refused, match="no hidden units"):
        ig.Continual(ig.mlp((4, 2)))
