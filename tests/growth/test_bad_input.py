"""S15 and S16: NaN and infinity are typed errors that name the group; singular moments give finite, noted proposals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth_nets import conv_pair, drawn, mlp
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.methods.with_model import propose
from irgrow.ir.errors import BadData, IrgrowError, NonFinite, Refused, StaleMorphism

METHODS = {
    "random": ig.Random(1),
    "silent": ig.Silent(1),
    "gradmax": ig.GradMax(1),
    "gradmaxopt": ig.GradMaxOpt(1, steps=5),
    "tiny": ig.Tiny(1, delta="apply"),
    "tiny joint": ig.Tiny(1, joint=True),
    "tiny fisher": ig.Tiny(1, fisher=True),
    "north": ig.North(1, candidates=20),
    "north pre": ig.North(1, how="pre"),
    "north weight": ig.North(1, how="weight"),
    "copies": ig.Copies(1),
    "variance transfer": ig.VarianceTransfer(2),
    "inverse": ig.InverseGradMax(1, steps=2),
    "fireflyopt": ig.FireflyOpt(1, steps=2),
    "firefly": ig.Firefly(2, new=2, steps=2),
    "splitting": ig.SplittingDescent(1),
}


def grown(how, model, data, loss=F.cross_entropy):
    """What a user does by hand, up to the growth itself."""
    if isinstance(how, ig.Selects):
        return how.select(model, data, loss)
    s = ig.probe(model, data, loss, sites=["hidden1"], want=how.needs)["hidden1"]
    return ig.refine(propose(how, s, model, data, loss), model, data, loss)


def steep(outputs, targets):
    """Zero, with a gradient that is NaN."""
    return (outputs - outputs.detach()).abs().sqrt().sum()


@pytest.mark.parametrize("fault", ["nan data", "inf data", "nan weight", "nan gradient"])
@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_not_finite_is_a_typed_error(name: str, fault: str) -> None:
    network = mlp("tanh")
    model, data = ig.compile(network), drawn(network, 30)
    loss = F.cross_entropy
    if fault == "nan weight":
        with torch.no_grad():
            model.tensors()["weight.hidden1_hidden2"][0, 0] = torch.nan
    elif fault == "nan gradient":
        loss = steep
    else:
        data[0][3, 2] = torch.nan if fault == "nan data" else torch.inf
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = "hidden2" if fault == "nan weight" else "hidden|output" if fault == "nan gradient" else "group 'input'"
    with pytest.raises((BadData, NonFinite), match=expected):
        grown(METHODS[name], model, data, loss)
    assert model.training and all(
        torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in model.state_dict().items()
    )
    assert model.structure.structure == network.structure


@pytest.mark.parametrize("moment", ["S", "M_prev", "S_in", "M", "C", "E"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite(moment: str, value: float) -> None:
    network = mlp("tanh")
    s = ig.probe(ig.compile(network), drawn(network, 30), F.cross_entropy, want=("S", "M_prev", "N", "E"))["hidden1"]
    poisoned = getattr(s, moment).clone()
    poisoned[0, 0] = value
    with pytest.raises(BadData, match=f"statistics of site 'hidden1': {moment}: found NaN or infinity"):
        ig.Tiny(1, fisher=True).propose(replace(s, **{moment: poisoned}))


@pytest.mark.parametrize("name", list(METHODS))
def test_statistics_and_proposals_of_another_network(name: str) -> None:
    how = METHODS[name]
    if isinstance(how, ig.Selects):
        network, other = mlp("tanh"), mlp("tanh", (6, 5, 5, 3))
        found = how.select(ig.compile(network), drawn(network, 30), F.cross_entropy)
        with pytest.raises((StaleMorphism, Refused), match="another structure|made for"):
            found(other)
        return
    network, other = mlp("tanh"), mlp("tanh", (6, 5, 5, 3))
    data = drawn(network, 30)
    s = ig.probe(ig.compile(network), data, F.cross_entropy, want=how.needs)["hidden1"]
    with pytest.raises(StaleMorphism, match=f"{type(how).__name__}|AddUnits.*site 'hidden1'"):
        ig.AddUnits(propose(how, s, ig.compile(other), data, F.cross_entropy))(other)


def dead_features():
    network = mlp("tanh")
    data = drawn(network, 40)
    data[0][:, 2] = 0.0
    return network, data, "S is singular: 6 of 7 directions"


def equal_features():
    network = mlp("tanh")
    data = drawn(network, 40)
    data[0][:, 2] = data[0][:, 1]
    return network, data, "S is singular: 6 of 7 directions"


def tiny_features():
    network = mlp("tanh")
    data = drawn(network, 40)
    data[0][:, 2] *= 1e-9
    return network, data, "S is singular: 6 of 7 directions"


def dead_hidden():
    network = mlp("tanh")
    tensors = network.tensors()
    tensors["weight.input_hidden1"][1] = 0.0
    tensors["bias.hidden1"][1] = 0.0
    return network.with_tensors(tensors), drawn(network, 40), "S_in of 'hidden2' is singular: 5 of 6 directions"


@pytest.mark.parametrize("made", [dead_features, equal_features, tiny_features, dead_hidden])
@pytest.mark.parametrize(
    "how", [ig.Tiny(2, delta="apply"), ig.Tiny(2, joint=True, delta="apply"), ig.Tiny(2, fisher=True)]
)
def test_singular_moments_are_finite_and_noted(made, how) -> None:
    network, data, note = made()
    s = ig.probe(ig.compile(network), data, F.cross_entropy, sites=["hidden1"], want=how.needs)["hidden1"]
    p = how.propose(s)
    for tensor in (p.alpha, p.omega, *p.delta.values()):
        assert bool(torch.isfinite(tensor).all()) and float(tensor.abs().max()) < 1e3
    if not (how.joint and made is not dead_hidden):  # the joint form whitens what is left of S
        assert any(note in found for found in p.notes), p.notes
    else:
        assert any("feature directions" in found for found in p.notes), p.notes
    ig.AddUnits(p)(network).verify()


def test_a_singular_fisher_is_noted() -> None:
    network = mlp("tanh")  # softmax: the gradients of the classes sum to zero
    s = ig.probe(ig.compile(network), drawn(network, 40), F.cross_entropy, want=("S", "M_prev", "N", "E"))["hidden2"]
    p = ig.Tiny(2, fisher=True).propose(s)
    assert any("E of 'output' is singular: 2 of 3 directions" in note for note in p.notes)
    assert not any("E of" in note for note in ig.Tiny(2).propose(s).notes)


def test_fewer_samples_than_features() -> None:
    """Nothing is left for new units where today's weights can fit every sample: refused, not made up."""
    network = mlp("tanh")
    s = ig.probe(ig.compile(network), drawn(network, 3), F.cross_entropy)["hidden1"]
    with pytest.raises(Refused, match="nothing left of the desired move"):
        ig.Tiny(1).propose(s)
    p = ig.Tiny(1, projection=False).propose(s)
    assert any("S is singular: 3 of 7" in note for note in p.notes) and bool(torch.isfinite(p.alpha).all())


def test_restricted_taps_need_restricted_statistics() -> None:
    network = conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, padding=1))
    s = ig.probe(ig.compile(network), drawn(network, 60), F.cross_entropy, sites=["grown"])["grown"]
    for how in (ig.Tiny(1, taps="centre"), ig.GradMax(1, taps="centre"), ig.Random(1, taps="centre")):
        with pytest.raises(Refused, match=f"{type(how).__name__}: site 'grown': found statistics of all taps"):
            how.propose(s)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_growth_that_fails_leaves_fit_as_it_was(name: str) -> None:
    """In `fit`: data that turn to NaN after the first epoch end it with a typed error, not with a broken model."""
    network = mlp("tanh")
    clean = drawn(network, 60)
    model = ig.compile(network)
    data = (clean[0].clone(), clean[1])

    def poison(event) -> None:
        data[0][:, 1] = torch.nan

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    growth = ig.Growth(when=ig.Every(epochs=1), how=METHODS[name])
    with pytest.raises(IrgrowError):
        ig.fit(model, data, F.cross_entropy, optimizer, epochs=3, growth=growth, on_event=poison, progress=False)
    if name not in ("north weight",):  # reads no data; the growth is sound, training then diverges
        assert model.structure.structure == network.structure
        assert bool(torch.isfinite(model(clean[0])).all())
