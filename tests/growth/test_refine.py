"""`refine`: the better sign, the best amplitude, the measured gain; the model stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth_nets import conv_pair, drawn, forked, grown_loss, mlp, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.refine import Trial, line_search
from irgrow.ir.errors import BadData, UnknownName


def measured(network, how, count: int = 40):
    data = drawn(network, count)
    model = ig.compile(network)
    s = ig.probe(model, data, F.cross_entropy)
    return model, data, how.propose(s[next(iter(s))])


NETWORKS = {
    "mlp": lambda: mlp("relu"),
    "fork": lambda: forked("relu"),
    "residual": lambda: residual("relu"),
    "conv": lambda: conv_pair(ig.Conv2d(3), ig.Conv2d(3), activation="relu"),
    "pool, flatten": lambda: pooled("max", True, "relu"),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("how", [ig.Tiny(2), ig.Tiny(2, delta="apply"), ig.GradMax(2)], ids=["tiny", "dW", "gradmax"])
def test_a_trial_is_the_grown_network(network, how) -> None:
    """Loss with factors on the new weights = loss of the network that the scaled proposal gives."""
    network = network()
    model, data, p = measured(network, how)
    trial = Trial(p, model, data, F.cross_entropy)
    inward, outward = torch.tensor([0.5, -2.0]).double(), torch.tensor([-3.0, 0.25]).double()
    expected = grown_loss(network, p.scaled(inward, outward, 0.7), data)
    assert trial.loss(inward, outward, 0.7) == pytest.approx(expected, rel=1e-10)
    assert trial.before == pytest.approx(grown_loss(network, p.scaled(0.0, 0.0, 0.0), data), rel=1e-12)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("delta", ["separate", "joint", "keep"])
def test_the_measured_gain_is_what_the_loss_falls_by(network, delta: str) -> None:
    network = network()
    model, data, p = measured(network, ig.Tiny(2, delta="apply"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    refined = ig.refine(p, model, data, F.cross_entropy, delta=delta)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    fall = grown_loss(network, p.scaled(0.0, 0.0, 0.0), data) - grown_loss(network, refined, data)
    assert refined.measured_gain == pytest.approx(fall, rel=1e-8)
    assert (refined.measured_gain > 0 or delta == "keep") and refined.gain_unit == "loss"
    ig.AddUnits(refined)(network).verify()


@pytest.mark.parametrize("network", [NETWORKS["mlp"], NETWORKS["pool, flatten"]])
def test_every_sign_is_the_better_one_to_first_order(network) -> None:
    """Against the loss of the grown network with every unit turned, at a small amplitude."""
    network = network()
    model, data, p = measured(network, ig.Tiny(3))
    refined = ig.refine(p, model, data, F.cross_entropy, amplitude=False)
    small = refined.scaled(1.0, 1e-5)
    chosen = grown_loss(network, small, data)
    turned = []
    for unit in range(p.units):
        sign = torch.ones(p.units, dtype=torch.float64)
        sign[unit] = -1
        turned.append(grown_loss(network, small.scaled(sign, sign), data))
    assert min(turned) >= chosen
    assert max(turned) > chosen


def test_the_amplitude_is_near_the_best() -> None:
    model, data, p = measured(mlp("tanh"), ig.Tiny(2))
    refined = ig.refine(p, model, data, F.cross_entropy, signs=False)
    best = min(
        grown_loss(model.structure, p.scaled(g**0.5, g**0.5), data) for g in torch.logspace(-4, 1.2, 400).tolist()
    )
    before = grown_loss(model.structure, p.scaled(0.0, 0.0), data)
    assert refined.measured_gain >= 0.98 * (before - best)


@pytest.mark.parametrize(("best", "limit"), [(0.01, 16.0), (1.0, 16.0), (9.0, 16.0), (100.0, 16.0), (0.3, 0.5)])
def test_line_search(best: float, limit: float) -> None:
    calls = []

    def f(x: float) -> float:
        calls.append(x)
        return (torch.tensor(x / best).log() ** 2).item() if x < 12 * best else float("nan")

    x, value = line_search(f, limit, 4)
    assert x == pytest.approx(min(best, limit), rel=0.1) and value == f(x)
    assert len(calls) < 18 and max(calls) <= limit and min(calls) > 0


def test_silent_units_are_judged_by_a_lookahead() -> None:
    network = mlp("relu")
    model, data, p = measured(network, ig.GradMax(2))
    refined = ig.refine(p, model, data, F.cross_entropy, lookahead=0.01)
    assert refined.gain_unit == "lookahead" and refined.measured_gain > 0
    assert relative(refined.omega.abs(), p.omega.abs()) < 1e-12  # amplitudes stay
    before, after = (grown_loss(network, x, data) for x in (p.scaled(0.0, 0.0), refined))
    assert after == pytest.approx(before, rel=1e-12)
    # each unit has the larger gradient on this side; the gain is that of one gradient step
    trial = Trial(refined, model, data, F.cross_entropy)
    (turned, _), (kept, gradients) = trial.squared(-trial.ones), trial.squared(trial.ones)
    assert bool((kept >= turned).all()) and bool((kept > turned).any())
    assert refined.measured_gain == pytest.approx(0.01 * float(kept.sum()), rel=0.1)
    assert trial.step(gradients, 0.01) == pytest.approx(trial.before - refined.measured_gain, rel=1e-10)


def test_a_lookahead_that_overshoots_is_shortened() -> None:
    model, data, p = measured(mlp("relu"), ig.GradMax(2, scale=5.0))
    refined = ig.refine(p, model, data, F.cross_entropy, lookahead=1e4)
    assert refined.measured_gain > 0 and any("overshoots" in note for note in refined.notes)


def test_random_units_keep_their_signs() -> None:
    model, data, p = measured(mlp("relu"), ig.Random(2))
    refined = ig.refine(p, model, data, F.cross_entropy)
    assert torch.equal(refined.alpha, p.alpha) and refined.measured_gain > 0


def test_worse_proposals_are_noted() -> None:
    model, data, p = measured(mlp("tanh"), ig.Tiny(2))
    wrong = p.scaled(1.0, -1.0)
    refined = ig.refine(wrong, model, data, F.cross_entropy)
    assert any("no amplitude that was tried lowers the loss" in note for note in refined.notes)
    assert bool(refined.alpha.any()) and bool(refined.omega.any())  # still alive


def test_refusals() -> None:
    model, data, p = measured(mlp("tanh"), ig.Tiny(2))
    with pytest.raises(UnknownName, match="delta 'both': expected one of separate, joint, keep"):
        ig.refine(p, model, data, F.cross_entropy, delta="both")
    with pytest.raises(BadData, match="refine: batch: found no samples"):
        ig.refine(p, model, (data[0][:0], data[1][:0]), F.cross_entropy)
    from irgrow.ir.errors import StaleMorphism

    with pytest.raises(StaleMorphism):
        ig.refine(replace(p, structure="another"), model, data, F.cross_entropy)


@pytest.mark.parametrize("network", [NETWORKS["mlp"], NETWORKS["residual"], NETWORKS["pool, flatten"]])
def test_the_gain_of_relu_units_is_predicted_from_the_batch(network) -> None:
    """-E[relu(alpha . b) omega . g], within 1 % of a finite difference; max pooling on the way does not matter."""
    network = network()
    model, data, p = measured(network, ig.Tiny(2))
    assert p.predicted_gain is None
    refined = ig.refine(p.scaled(1e-3, 1e-3), model, data, F.cross_entropy, amplitude=False)
    assert refined.predicted_gain == pytest.approx(refined.measured_gain, rel=0.01)
    assert refined.predicted_gain > 0
