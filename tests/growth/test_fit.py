"""`fit`, `when` and `where`: a loop that trains, grows, records and refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from growth_nets import conv_pair, drawn, forked, mlp
from torch import Tensor
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.candidates import Candidates
from irgrow.growth.when import Moment
from irgrow.ir.errors import Diverged, Refused


def blobs(count: int = 200, classes: int = 4, features: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(classes, features, generator=draw, dtype=torch.float64)
    y = torch.randint(0, classes, (count,), generator=draw)
    return centres[y] + torch.randn(count, features, generator=draw, dtype=torch.float64), y


def trained(growth=None, network=None, data=None, **options):
    model = ig.compile(network if network is not None else mlp("relu", (6, 2, 2, 4)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {"epochs": 6, "progress": False, **options}
    history = ig.fit(model, blobs() if data is None else data, F.cross_entropy, optimizer, growth=growth, **options)
    return model, optimizer, history


@pytest.mark.parametrize("how", [ig.Tiny(2), ig.GradMax(2), ig.Random(2), ig.Tiny(2, joint=True, delta="apply")])
def test_grows_and_records(how) -> None:
    seen = []
    growth = ig.Growth(when=ig.Every(epochs=2), how=how)
    model, optimizer, history = trained(growth, test=blobs(60), on_event=seen.append)
    assert [e["event"] for e in history.events] == ["epoch"] * 2 + ["growth"] + ["epoch"] * 2 + ["growth"] + [
        "epoch"
    ] * 2
    assert seen == history.events
    fields = ["event", "epoch", "train_loss", "test_accuracy", "widths", "parameters"]
    assert list(history.epochs[0]) == fields
    assert list(history.growths[0]) == [*fields, "site", "predicted_gain", "measured_gain", "seconds"]
    assert [e["site"] for e in history.growths] == ["hidden1", "hidden2"]
    assert [e["widths"] for e in history.epochs][::2] == [
        {"hidden1": 2, "hidden2": 2},
        {"hidden1": 4, "hidden2": 2},
        {"hidden1": 4, "hidden2": 4},
    ]
    assert history.events[-1]["parameters"] == sum(p.numel() for p in model.parameters())
    assert history.train_loss[-1] < history.train_loss[0]
    assert history.test_accuracy[-1] > 0.5
    assert history.seconds_growing > 0 and history.seconds_training > 0
    assert history.growths[0]["measured_gain"] > 0
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert "2 growths, widths 4-4" in repr(history)


def test_the_same_seed_gives_the_same_network() -> None:
    growth = ig.Growth(when=ig.Every(epochs=2), how=ig.Tiny(1))
    first, second, other = (trained(growth, seed=s)[0].network() for s in (3, 3, 4))
    assert first == second and first != other


def test_a_loader_and_several_inputs() -> None:
    inputs, targets = drawn(forked(), 120)
    loader = [((inputs[0][i : i + 40], inputs[1][i : i + 40]), targets[i : i + 40]) for i in (0, 40, 80)]
    growth = ig.Growth(when=ig.Every(epochs=1), where=ig.AllAtOnce(), how=ig.Tiny(1))
    model, _, history = trained(growth, forked(), loader, epochs=2)
    assert history.events[-1]["widths"] == {"hidden": 6, "next": 4}, history.notes
    assert history.events[-1]["test_accuracy"] is None


def test_images_grow() -> None:
    network = conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, padding=1), activation="relu")
    growth = ig.Growth(when=ig.Every(epochs=1), how=ig.Tiny(1))
    _, _, history = trained(growth, network, drawn(network, 200), epochs=3)
    assert not history.notes and history.events[-1]["widths"] == {"grown": 4, "target": 3}


def test_a_sum_loss_and_a_scheduler() -> None:
    model = ig.compile(mlp("relu", (6, 2, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def summed(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    growth = ig.Growth(when=ig.Every(epochs=1), how=ig.Tiny(1))
    history = ig.fit(
        model, blobs(), summed, optimizer, epochs=4, growth=growth, progress=False, reduction="sum", scheduler=scheduler
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)
    assert 0 < history.train_loss[0] < 5  # a mean over samples all the same


def test_divergence_names_the_epoch() -> None:
    x, y = blobs()
    x[17, 3] = torch.nan
    with pytest.raises(Diverged, match="fit: epoch 1: found a training loss of nan, expected a finite loss"):
        trained(data=(x, y))
    with pytest.raises(Diverged, match="no training samples"):
        trained(data=[])


def test_refused_growths_are_noted_and_training_goes_on() -> None:
    growth = ig.Growth(when=ig.Every(epochs=2), how=ig.Tiny(1))
    _, _, history = trained(growth, mlp("sigmoid", (6, 2, 4)))
    assert len(history.epochs) == 6 and not history.growths
    assert "epoch 2: no growth: Tiny: site 'hidden': found activation sigmoid" in history.notes[0]


def test_every_number_of_steps() -> None:
    growth = ig.Growth(when=ig.Every(steps=10, times=2), how=ig.Random(1))
    _, _, history = trained(growth, batch_size=20, epochs=5)
    assert [e["event"] for e in history.events] == ["epoch", "growth", "epoch", "growth", "epoch", "epoch", "epoch"]


def test_own_when_where_and_how() -> None:
    """The README's ten lines: each a class with one method."""

    class Third:
        def due(self, moment):
            return moment.epoch == 3

    class Narrowest:
        def choose(self, candidates):
            return [min(candidates.sites, key=lambda site: candidates.network.groups[site].units)]

    @dataclass(frozen=True)
    class Average:
        units: int = 1
        needs: tuple[str, ...] = ("S",)

        def propose(self, statistics):
            from irgrow.growth.methods.base import columns, proposal

            alpha = statistics.S[:, -1:].expand(-1, self.units)
            return proposal(self, statistics, alpha, alpha.new_ones(columns(statistics), self.units))

    growth = ig.Growth(when=Third(), where=Narrowest(), how=Average(3))
    _, _, history = trained(growth, mlp("relu", (6, 5, 2, 4)))
    assert [(e["epoch"], e["site"]) for e in history.growths] == [(3, "hidden2")]
    assert isinstance(Average(), ig.Method)


# ---- where ------------------------------------------------------------------------------------------------------


def candidates(network=None, how=None, growths: int = 0, refined: bool = True):
    """Candidates of a network, and the list of sites that were measured."""
    network = network if network is not None else mlp("relu", (6, 3, 3, 4))
    model, data, asked = ig.compile(network), blobs(), []

    def measure(sites):
        asked.append(list(sites))
        found = {}
        for name, s in ig.probe(model, data, F.cross_entropy, sites=sites).items():
            method = how[name] if isinstance(how, dict) else how or ig.Tiny(1)
            p = method.propose(s)
            found[name] = ig.refine(p, model, data, F.cross_entropy) if refined else p
        return found

    return Candidates(("hidden1", "hidden2"), network, growths, measure), asked


def test_round_robin_measures_only_what_it_takes() -> None:
    for growths, expected in enumerate(["hidden1", "hidden2", "hidden1"]):
        found, asked = candidates(growths=growths)
        assert ig.RoundRobin().choose(found) == [expected] and not asked
        _ = found[expected], found[expected]
        assert asked == [[expected]]
    assert ig.Naive is ig.RoundRobin


def test_the_largest() -> None:
    for where, key in (
        (ig.LargestGain(), lambda p: p.measured_gain),
        (ig.LargestSingularValue(), lambda p: float(p.singular_values[0])),
    ):
        found, asked = candidates()
        [site] = where.choose(found)
        assert asked == [["hidden1", "hidden2"]]  # one run for both
        proposals = found.all()
        assert site == max(proposals, key=lambda s: key(proposals[s]))
        assert key(proposals["hidden1"]) != key(proposals["hidden2"])
    assert ig.MaxEigenValue is ig.LargestSingularValue and ig.AmplitudeFactor is ig.LargestGain


def test_gains_of_different_units_are_not_compared() -> None:
    found, _ = candidates(how={"hidden1": ig.Tiny(1), "hidden2": ig.GradMax(1)})
    with pytest.raises(Refused, match="LargestGain: found gains in lookahead and loss, expected one unit"):
        ig.LargestGain().choose(found)
    found, _ = candidates(refined=False)
    with pytest.raises(Refused, match="no measured gain of site 'hidden1'"):
        ig.LargestGain().choose(found)
    found, _ = candidates(how=ig.Random(1))
    with pytest.raises(Refused, match="no singular values for site 'hidden1' by Random"):
        ig.LargestSingularValue().choose(found)


def test_sites_that_refuse_are_left_out() -> None:
    b = ig.Builder(dtype=torch.float64)
    b.input("x", 6)
    b.group("soft", 3, activation="sigmoid", bias=True)
    b.connect("x", "soft")
    b.group("hard", 3, activation="relu", bias=True)
    b.connect("soft", "hard")
    b.output("out", 4, bias=True)
    b.connect("hard", "out")
    growth = ig.Growth(when=ig.Every(epochs=1), where=ig.LargestGain(), how=ig.Tiny(1))
    _, _, history = trained(growth, b.build(), epochs=3)
    assert [e["site"] for e in history.growths] == ["hard", "hard"]


# ---- when -------------------------------------------------------------------------------------------------------


def moment(epoch: int, losses=(), growths: int = 0, last: int = 0, step: int = 0, ended: bool = True, found=None):
    return Moment(epoch, step, ended, list(losses), [], growths, last, found or candidates()[0])


def test_every_and_schedule() -> None:
    every = ig.Every(epochs=3, times=2)
    assert [e for e in range(1, 10) if every.due(moment(e))] == [3, 6, 9]
    assert not every.due(moment(9, growths=2)) and not every.due(moment(3, ended=False))
    steps = ig.Every(steps=4)
    assert steps.per_step and not every.per_step
    assert [s for s in range(9) if steps.due(moment(1, step=s, ended=s == 8))] == [4, 8]
    assert [e for e in range(1, 10) if ig.Schedule([2, 7]).due(moment(e))] == [2, 7]
    for wrong in ({}, {"epochs": 1, "steps": 1}, {"epochs": 0}):
        with pytest.raises(Refused, match="Every: found epochs="):
            ig.Every(**wrong)


def test_plateau() -> None:
    plateau = ig.OnPlateau(patience=2, threshold=0.01)
    assert not plateau.due(moment(4, [4, 3, 2, 1]))
    assert plateau.due(moment(4, [4, 1, 1, 0.995]))
    assert not plateau.due(moment(4, [4, 1, 1, 0.98]))
    assert not plateau.due(moment(2, [1, 1]))
    assert not plateau.due(moment(5, [4, 1, 1, 1, 1], last=3))  # counted anew after a growth
    assert plateau.due(moment(6, [4, 1, 1, 1, 1, 1], last=3))


def test_gain_above() -> None:
    found, _ = candidates()
    best = max(p.measured_gain for p in found.all().values())
    assert ig.GainAbove(0.9 * best).due(moment(1, found=found))
    assert not ig.GainAbove(1.1 * best).due(moment(1, found=found))
    assert not ig.GainAbove(0.0, times=2).due(moment(1, found=found, growths=2))
    assert not ig.GainAbove(0.0, epochs=2).due(moment(1, found=found))


def test_methods_that_need_the_model() -> None:
    growth = ig.Growth(when=ig.Every(epochs=2), how=ig.North(1))
    _, _, history = trained(growth, mlp("tanh", (6, 2, 2, 4)))
    assert [e["site"] for e in history.growths] == ["hidden1", "hidden2"] and not history.notes


# ---- methods that choose their own places -------------------------------------------------------------------------

SELECTS = {
    "firefly": ig.Firefly(3, new=2, steps=5),
    "layers": ig.Firefly(50, new=3, splits=False, layers=1, steps=5, variance=1.0),
    "authors": ig.Firefly(2, new=2, steps=5, rule="authors"),
    "splitting": ig.SplittingDescent(2, eps=0.05),
}


@pytest.mark.parametrize("name", list(SELECTS))
def test_methods_that_choose_their_own_places(name: str) -> None:
    how, seen = SELECTS[name], []
    growth = ig.Growth(when=ig.Every(epochs=2), how=how)
    network = mlp("tanh", (6, 2, 2, 4))
    model, optimizer, history = trained(growth, network, test=blobs(60), on_event=seen.append)
    assert not history.notes and len(history.growths) == 2 and seen == history.events
    for event in history.growths:
        assert event["predicted_gain"] > 0 and event["measured_gain"] is not None
        before = history.events[history.events.index(event) - 1]
        added = sum(event["widths"].values()) - sum(before["widths"].values())
        assert set(event["site"].split(", ")) <= set(before["widths"])
        blocks = sum(
            event["widths"].get(f"{g}_block", 0) for g in before["widths"] if f"{g}_block" not in before["widths"]
        )
        assert 1 <= added - blocks <= how.units + (name == "authors")  # splits only where they lower the loss
    assert history.events[-1]["parameters"] == sum(p.numel() for p in model.parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert len(model.ledger) == 2
    if name == "layers":
        assert any(g.endswith("_block") for g in history.events[-1]["widths"])
    same, again = (trained(growth, network, seed=1)[0].network() for _ in range(2))
    assert same == again


@pytest.mark.parametrize("refine", [True, False])
def test_the_gain_of_a_selection_is_measured_on_other_samples(refine: bool) -> None:
    """refine=True holds a batch back; refine=False reports the fall on the samples that scored the candidates."""
    found = []

    class Recording(ig.SplittingDescent):
        def select(self, model, data, loss, *, sites=None):
            selection = super().select(model, data, loss, sites=sites)
            found.append((selection, len(data[1])))
            return selection

    growth = ig.Growth(when=ig.Every(epochs=1), how=Recording(1), refine=refine)
    _, _, history = trained(growth, mlp("tanh", (6, 2, 4)), epochs=2)
    [(selection, samples)] = found
    assert samples == (150 if refine else 200)
    [event] = history.growths
    assert event["predicted_gain"] == selection.predicted_gain
    assert (event["measured_gain"] == selection.measured_gain) == (not refine)


def test_a_choosing_method_takes_no_where() -> None:
    with pytest.raises(Refused, match="Growth: where: found LargestGain with Firefly, expected none"):
        ig.Growth(where=ig.LargestGain(), how=ig.Firefly(1))
    with pytest.raises(Refused, match="Growth: sites: found Between with Firefly"):
        ig.Growth(sites=(ig.Between("input", "output"),), how=ig.Firefly(1))
    growth = ig.Growth(when=ig.Every(epochs=1), how=ig.SplittingDescent(1, eps=0.1), sites=("hidden2",))
    _, _, history = trained(growth, mlp("tanh", (6, 2, 2, 4)), epochs=2)
    assert [e["site"] for e in history.growths] == ["hidden2"]
    growth = ig.Growth(when=ig.Every(epochs=1), how=ig.SplittingDescent(1), sites=("hidden",))
    _, _, history = trained(growth, mlp("identity", (6, 2, 4)), epochs=2)
    assert not history.growths and "no negative eigenvalue among 2 units" in history.notes[0]


def test_gain_above_asks_a_choosing_method_once() -> None:
    calls = []

    class Counting(ig.SplittingDescent):
        def select(self, *given, **more):
            calls.append(1)
            return super().select(*given, **more)

    for threshold, growths in ((0.0, 1), (1e9, 0)):
        calls.clear()
        growth = ig.Growth(when=ig.GainAbove(threshold, times=1), how=Counting(1))
        _, _, history = trained(growth, mlp("tanh", (6, 2, 4)), epochs=2)
        assert len(history.growths) == growths and len(calls) == 1


# ---- how many -----------------------------------------------------------------------------------------------------


def test_units_as_a_share_of_the_width_at_the_beginning() -> None:
    growth = ig.Growth(when=ig.Schedule([1, 2, 3]), where=ig.AllAtOnce(), how=ig.GradMax(1), share=0.5)
    _, _, history = trained(growth, mlp("relu", (6, 8, 3, 4)), epochs=4)
    assert [e["widths"] for e in history.epochs] == [{"hidden1": 8 + 4 * n, "hidden2": 3 + 2 * n} for n in range(4)]
    growth = ig.Growth(when=ig.Schedule([1, 2]), how=ig.SplittingDescent(1, eps=0.05), share=0.25)
    _, _, history = trained(growth, mlp("tanh", (6, 5, 3, 4)), epochs=3)
    assert [sum(e["widths"].values()) for e in history.epochs] == [8, 10, 12]
    with pytest.raises(Refused, match="Growth: share: found 0"):
        ig.Growth(share=0.0)

    class Fixed:
        units, needs = 1, ()

        def propose(self, statistics):
            raise AssertionError

    with pytest.raises(Refused, match="Growth: share: found Fixed, whose units are no field"):
        ig.Growth(how=Fixed(), share=0.5)


def test_signs_and_amplitude_can_be_switched_off() -> None:
    """Off, both: what grows is what was proposed; the gain is measured all the same."""
    found = {}

    @dataclass(frozen=True)
    class Recording(ig.Tiny):
        def propose(self, statistics):
            found["proposed"] = super().propose(statistics)
            return found["proposed"]

    for options, same in (({"signs": False, "amplitude": False}, True), ({}, False)):
        growth = ig.Growth(when=ig.Every(epochs=1), how=Recording(2), **options)
        model, _, history = trained(growth, mlp("relu", (6, 2, 4)), epochs=2)
        grown = next(iter(model.ledger.proposals.values()))
        kept = bool(torch.equal(grown.alpha, found["proposed"].alpha))
        assert kept == same and history.growths[0]["measured_gain"] is not None


def test_batch_norm_in_train_mode() -> None:
    network = ig.mlp([6, 3, 4], activation="relu", norm="batch", dtype=torch.float64)
    growth = ig.Growth(when=ig.Every(epochs=1), how=ig.GradMax(2, mode="train", eps=1e-4))
    model, _, history = trained(growth, network, epochs=4)
    assert not history.notes and history.events[-1]["widths"] == {"hidden": 9}
    assert history.train_loss[-1] < history.train_loss[0]
