"""Firefly: the over-grown network against its formula, what is kept against what was trained, budgets, rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, forked, mlp, mobile, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.firefly import Firefly, Overgrown
from irgrow.growth.overgrown import Plan, assemble
from irgrow.growth.selection import held_batches
from irgrow.ir.errors import BadData, Refused, UnknownName
from irgrow.ir.interpreter import interpret


def sparse():
    b = ig.Builder(seed=0, dtype=DOUBLE)
    b.input("x", 4)
    b.group("hidden", 3, activation="tanh", bias=True)
    b.connect("x", "hidden", ig.Sparse(np.array([0, 1, 2, 3, 0]), np.array([0, 1, 2, 2, 1])))
    b.group("next", 3, activation="tanh")
    b.connect("hidden", "next", ig.Sparse(np.array([0, 1, 2, 2]), np.array([0, 1, 0, 2])))
    b.output("y", 2)
    b.connect("next", "y")
    return b.build()


NETWORKS = {
    "mlp": mlp("relu"),
    "fork": forked("silu"),
    "residual": residual(),
    "conv": conv_pair(ig.Conv2d((3, 3), padding=(1, 1)), ig.Conv2d((3, 3), (2, 2))),
    "pool": pooled("max", True, norm="batch"),
    "mobile": mobile(),
    "sparse": sparse(),
}


def inputs_of(data):
    return data[0] if isinstance(data[0], tuple) else (data[0],)


def overgrown(network, seed: int = 0, **options) -> Overgrown:
    """Every candidate, with random switches and directions."""
    how = Firefly(1, new=2, layers=1, **options)
    over = Overgrown(how, network, how._plan(network, None)[0], ig.compile(network))
    draw = torch.Generator().manual_seed(seed)
    over.delta = {n: torch.randn(v.shape, generator=draw, dtype=DOUBLE) for n, v in over.delta.items()}
    over.eps = torch.randn(len(over.names), generator=draw, dtype=DOUBLE)
    return over


@pytest.mark.parametrize("name", list(NETWORKS))
def test_what_is_trained_is_what_the_passes_make(name: str) -> None:
    network = NETWORKS[name]
    over = overgrown(network)
    values = over.values(over.eps, over.delta)
    steps, after = assemble(network, over.plan, values, "test")
    made, wanted = over.family.tensors(values), after.tensors()
    assert len(steps) >= 3 and all(relative(made[n], wanted[n]) < 1e-12 for n in wanted)
    x = inputs_of(drawn(network, 5))
    assert relative(over.family.outputs(values, x), interpret(after, *x)) < 1e-12
    after.verify()


def test_the_formula_of_the_paper() -> None:
    """One hidden layer: sum of (1/2) (sigma(theta + eps delta) + sigma(theta - eps delta)) + eps sigma(delta)."""
    network = ig.mlp([4, 3, 2], activation="tanh", seed=0, dtype=DOUBLE)
    over = overgrown(network, layer_groups=())
    x = drawn(network, 9)[0]
    one = torch.cat([x, torch.ones(9, 1, dtype=DOUBLE)], 1)
    w = torch.cat([network.bundles["input_hidden"].weight, network.groups["hidden"].bias[:, None]], 1)
    v, c = network.bundles["hidden_output"].weight, network.groups["output"].bias
    d, eps = over.delta, over.eps
    split = torch.cat([d["split/hidden/input_hidden"], d["split/hidden/bias"][:, None]], 1) * eps[:3, None]
    fresh = torch.cat([d["in/hidden/input_hidden"], d["in/hidden/bias"][:, None]], 1)
    y = c + (torch.tanh(one @ (w + split).mT) + torch.tanh(one @ (w - split).mT)) / 2 @ v.mT
    y = y + torch.tanh(one @ fresh.mT) @ (d["out/hidden/hidden_output"] * eps[3:]).mT
    assert relative(over.family.outputs(over.values(eps, d), (x,)), y) < 1e-12


def test_directions_follow_what_their_parents_become() -> None:
    """Two hidden layers: a direction is one of the old network's, its columns shared by the copies of a parent."""
    network = ig.mlp([4, 3, 3, 2], activation="tanh", seed=0, dtype=DOUBLE)
    over = overgrown(network, layer_groups=())
    x, d, eps = drawn(network, 9)[0], over.delta, over.eps
    w1, w2, w3 = (network.bundles[n].weight for n in ("input_hidden1", "hidden1_hidden2", "hidden2_output"))
    b1, b2, b3 = (network.groups[n].bias for n in ("hidden1", "hidden2", "output"))
    e1, e2, n1, n2 = eps[:3], eps[3:6], eps[6:8], eps[8:10]
    move1, shift1 = d["split/hidden1/input_hidden1"] * e1[:, None], d["split/hidden1/bias"] * e1
    plus, minus = (torch.tanh(x @ (w1 + s * move1).mT + b1 + s * shift1) for s in (1, -1))
    h, new = (plus + minus) / 2, torch.tanh(x @ d["in/hidden1/input_hidden1"].mT + d["in/hidden1/bias"])
    extra = new @ (d["out/hidden1/hidden1_hidden2"] * n1).mT  # into old units, and so into both copies
    move2, shift2 = d["split/hidden2/hidden1_hidden2"] * e2[:, None], d["split/hidden2/bias"] * e2
    plus, minus = (torch.tanh(h @ (w2 + s * move2).mT + b2 + s * shift2 + extra) for s in (1, -1))
    fresh = torch.tanh(h @ d["in/hidden2/hidden1_hidden2"].mT + d["in/hidden2/bias"])  # new ones do not feed new ones
    y = b3 + (plus + minus) / 2 @ w3.mT + fresh @ (d["out/hidden2/hidden2_output"] * n2).mT
    assert relative(over.family.outputs(over.values(eps, d), (x,)), y) < 1e-12


@pytest.mark.parametrize("name", list(NETWORKS))
def test_what_is_kept_is_the_trained_network_with_the_others_off(name: str) -> None:
    network = NETWORKS[name]
    over = overgrown(network, seed=1)
    x = inputs_of(drawn(network, 5))
    draw = torch.Generator().manual_seed(2)
    for _ in range(3):
        kept = torch.rand(len(over.names), generator=draw) < 0.4
        eps = torch.randn(len(over.names), generator=draw, dtype=DOUBLE)
        table = [
            ig.Candidate(kind, site, unit, 0.0, float(e), 0.0, bool(k))
            for (kind, site, unit), e, k in zip(over.names, eps, kept, strict=True)
        ]
        steps, after = assemble(network, *over.chosen(table), method="test")
        off = over.family.outputs(over.values(eps * kept, over.delta), x)
        assert relative(interpret(after, *x), off) < 1e-12
        for step in steps[:1]:
            (step if len(steps) == 1 else ig.passes.Sequence(tuple(steps)))(network).verify()


def test_splits_are_even_in_their_switch() -> None:
    over = overgrown(NETWORKS["conv"], seed=3)
    x = inputs_of(drawn(NETWORKS["conv"], 5))
    sign = torch.tensor([-1.0 if kind == "split" else 1.0 for kind, *_ in over.names], dtype=DOUBLE)
    a, b = (over.family.outputs(over.values(e, over.delta), x) for e in (over.eps, sign * over.eps))
    assert relative(a, b) < 1e-12


def test_scores_are_mean_gradients_along_each_switch() -> None:
    data = drawn(mlp("tanh"), 20)
    held = held_batches(ig.compile(mlp("tanh")), data, 8, None, "test")

    def loss_at(over, eps):
        with torch.no_grad():
            return float(F.cross_entropy(over.family.outputs(over.values(eps, over.delta), (data[0],)), data[1]))

    errors = {}
    for midpoints in (3, 40):
        over = overgrown(mlp("tanh"), midpoints=midpoints, activation="tanh")
        over.eps = 0.5 * over.eps
        scores = over.scores(held, F.cross_entropy)
        worst = 0.0
        for i in range(len(over.names)):
            off = over.eps.clone()
            off[i] = 0.0
            wanted = (loss_at(over, over.eps) - loss_at(over, off)) / float(over.eps[i])
            worst = max(worst, abs(float(scores[i]) - wanted))
        errors[midpoints] = worst / float(scores.abs().max())
    assert errors[3] < 0.05 and errors[40] < 1e-3


@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "pool"])
def test_select(name: str) -> None:
    network = NETWORKS[name]
    data, model = drawn(network, 40), ig.compile(network)
    how = Firefly(5, new=3, layers=1, steps=20, eps=0.05)
    found = how.select(model, data, F.cross_entropy)
    assert 1 <= len(found.kept) <= 5 and isinstance(how, ig.growth.selection.Selects)
    for c in found.candidates:
        if c.kind == "split":
            assert c.gain == pytest.approx(-c.score * c.eps) and (not c.kept or c.score * c.eps < 0)
        else:
            assert abs(c.eps) == 0.05 and c.score * c.eps <= 0 and c.gain == pytest.approx(0.05 * abs(c.score))
    worst = min(c.gain for c in found.kept)
    assert all(c.gain <= worst for c in found.candidates if not c.kept and c.kind != "layer")
    morphism = found(model.network()).verify()
    x = inputs_of(data)
    fall = F.cross_entropy(interpret(network, *x), data[1]) - F.cross_entropy(interpret(morphism.after, *x), data[1])
    assert float(fall) == pytest.approx(found.measured_gain, abs=1e-9) and found.measured_gain > 0
    assert found.measured_gain == pytest.approx(found.predicted_gain, rel=0.5)
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(*x), data[1]).backward()
    optimizer.step()
    model.grow(found(model.network()), optimizer)
    assert model.structure.counts.neurons > network.counts.neurons
    assert len(found.proposals) == len(getattr(found.passes, "steps", (found.passes,)))


def test_layers_have_a_budget_of_their_own() -> None:
    network = mlp("tanh", (6, 4, 4, 3))
    data, model = drawn(network, 60), ig.compile(network)
    seen = set()
    for layers in (0, 1, 2):
        found = Firefly(6, new=4, splits=False, layers=layers, steps=30).select(model, data, F.cross_entropy)
        units: dict[str, int] = {}
        for c in found.kept:
            if c.kind == "layer":
                units[c.site] = units.get(c.site, 0) + 1
        assert len(units) <= layers and all(count >= 2 for count in units.values())
        assert len(found.kept) == 6
        after = found(network).after
        assert sum(g.endswith("_residual") for g in after.groups) == len(units)
        seen.add(len(units))
    assert len(seen) > 1


def test_the_ranking_under_both_budgets() -> None:
    gains = [("unit", "a", 5.0), ("layer", "p", 9.0), ("layer", "q", 8.0), ("layer", "q", 4.0), ("split", "a", 3.0)]
    gains += [("layer", "p", -1.0), ("unit", "a", 0.0)]
    table = [ig.Candidate(kind, site, i, 1.0, -1.0, gain, False) for i, (kind, site, gain) in enumerate(gains)]
    # p is the first layer and would keep one unit only, so its place goes to q
    assert Firefly(4, layers=1)._kept(table) == {2, 0, 3, 4}
    assert Firefly(4, layers=2)._kept(table) == {2, 0, 3, 4}
    assert Firefly(2, layers=1)._kept(table) == {0, 4}  # q alone would have one unit within the budget
    assert Firefly(9, layers=0)._kept(table) == {0, 4}
    assert Firefly(9, layers=1, rule="authors")._kept(table) == set(range(7)) - {2, 3}


def test_authors_rule() -> None:
    network = NETWORKS["mlp"]
    data, model = drawn(network, 40), ig.compile(network)
    how = Firefly(3, new=2, steps=10, rule="authors")
    found = how.select(model, data, F.cross_entropy)
    assert len(found.kept) == 4
    assert max(c.score for c in found.kept) <= min(c.score for c in found.candidates if not c.kept)
    assert any(0 < abs(c.eps) < 0.1 for c in found.candidates)


def test_harmful_splits_only_when_asked_for() -> None:
    network = mlp("tanh")
    data, model = drawn(network, 40), ig.compile(network)
    few = Firefly(9, new=0, steps=0, seed=2).select(model, data, F.cross_entropy)
    many = Firefly(9, new=0, steps=0, seed=2, harmful_splits=True).select(model, data, F.cross_entropy)
    assert len(many.kept) == 9 > len(few.kept)
    assert many.measured_gain < few.measured_gain and few.measured_gain > 0
    assert all(c.score * c.eps < 0 for c in few.kept)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam"])
def test_training_stays_inside_its_bounds(optimizer: str) -> None:
    network = NETWORKS["mlp"]
    data = drawn(network, 40)
    how = Firefly(1, new=3, optimizer=optimizer, rate=0.05, steps=60, penalty=10.0, variance=4.0)
    over = Overgrown(how, network, how._plan(network, None)[0], ig.compile(network))
    assert float(over._norms(over.delta).max()) <= 1 + 1e-12
    x, y = data

    def loss():
        return float(F.cross_entropy(over.family.outputs(over.values(over.eps, over.delta), (x,)), y))

    before = loss()
    over.train(iter([((x,), y)] * 60), F.cross_entropy)
    assert loss() < before
    assert float(over.eps.abs().max()) <= 0.1
    assert float(over._norms(over.delta).max()) < 1.25


def test_sites_that_do_not_fit_are_left_out() -> None:
    network = ig.mlp([5, 4, 3], norm="layer", activation="tanh", seed=0, dtype=DOUBLE)
    with pytest.raises(Refused, match="Firefly: found no split: site 'hidden': found a layer norm"):
        Firefly(1).select(ig.compile(network), drawn(network, 9), F.cross_entropy)
    b = ig.Builder(seed=0, dtype=DOUBLE)
    b.input("x", (2, 4, 4))
    b.group("a", (4, 4, 4), activation="tanh", bias=True)
    b.connect("x", "a", ig.Conv2d((3, 3), padding=(1, 1)))
    b.group("b", (4, 4, 4), activation="tanh", bias=True)
    b.connect("a", "b", ig.Conv2d((3, 3), padding=(1, 1), channel_groups=2))
    b.group("c", 5, activation="tanh", bias=True)
    b.connect("b", "c")
    b.output("y", 2)
    b.connect("c", "y")
    network = b.build()
    found = Firefly(2, steps=5).select(ig.compile(network), drawn(network, 9), F.cross_entropy)
    assert {c.site for c in found.candidates} == {"c"} and len(found.notes) == 4
    assert all("channel groups" in note for note in found.notes)


def test_refusals_and_purity() -> None:
    network = NETWORKS["mlp"]
    data, model = drawn(network, 9), ig.compile(network)
    model.train()
    before = {n: t.clone() for n, t in model.tensors().items()}
    for options, text in (
        ({"units": 0}, "Firefly: units: found 0"),
        ({"eps": 0.0}, "Firefly: eps"),
        ({"new": 0, "splits": False}, "expected some candidates"),
    ):
        with pytest.raises(Refused, match=text):
            Firefly(**options)
    with pytest.raises(UnknownName, match="Firefly: rule 'best'"):
        Firefly(rule="best")
    with pytest.raises(BadData, match="Firefly: loss: found not one finite number"):
        Firefly(1, steps=2).select(model, data, lambda y, t: y.sum() * torch.nan)
    with pytest.raises(BadData, match="Firefly: data: found no samples"):
        Firefly(1).select(model, [], F.cross_entropy)
    with pytest.raises(UnknownName, match="site 'nowhere'"):
        Firefly(1).select(model, data, F.cross_entropy, sites=["nowhere"])
    a, b = (Firefly(2, steps=3).select(model, data, F.cross_entropy) for _ in range(2))
    assert [c.score for c in a.candidates] == [c.score for c in b.candidates]
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.tensors().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_empty_plan_changes_nothing() -> None:
    steps, after = assemble(NETWORKS["mlp"], Plan(), {}, "test")
    assert not steps and after == NETWORKS["mlp"]
