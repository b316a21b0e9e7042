"""New layers between any two groups: silent, with exactly the predicted gradient, for every method."""

from __future__ import annotations

import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, forked, mlp, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.methods.base import columns, proposal
from irgrow.ir.errors import Refused, StaleMorphism

PLACES = {
    "dense": (mlp("tanh"), ig.Between("input", "output", activation="tanh")),
    "dense, parallel to a group": (mlp("relu"), ig.Between("hidden1", "output", activation="gelu")),
    "dense, neighbours": (mlp("tanh"), ig.Between("input", "hidden1", activation="silu", group="beside")),
    "several inputs": (forked("silu"), ig.Between("y", "next", activation="tanh", bias=False)),
    "residual stream": (residual(), ig.Between("x", "stream2", activation="tanh")),
    "conv same": (
        conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, padding=1)),
        ig.Between("x", "target", activation="tanh"),
    ),
    "conv stride": (
        conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, stride=2, padding=1)),
        ig.Between("x", "target", activation="tanh"),
    ),
    "conv, flattened": (
        conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, padding=1)),
        ig.Between("grown", "out", activation="tanh"),
    ),
    "image, dense": (
        conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3)),
        ig.Between("x", "target", activation="tanh", kernel=None),
    ),
}


def gradient(network, place, data, p):
    """The gradient of the new group's fan-in, the bias last: `[units, F]`."""
    after = place.passes(p, network)(network).after
    (entering,) = after.entering(place.name)
    names = [entering.tensor] + ([f"bias.{place.name}"] if place.bias else [])
    tensors = {n: after.tensors()[n].clone().requires_grad_() for n in names}
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    loss = F.cross_entropy(ig.interpret(after, *inputs, tensors=tensors), data[1])
    return torch.cat([g.reshape(p.units, -1) for g in torch.autograd.grad(loss, list(tensors.values()))], 1)


@pytest.mark.parametrize("name", list(PLACES))
def test_gradmax_grows_layers(name: str) -> None:
    network, place = PLACES[name]
    data, model = drawn(network, 6), ig.compile(network)
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    empty = place.within(model)
    assert relative(empty(*inputs), model(*inputs)) < 1e-12
    s = place.probe(empty, data, F.cross_entropy, want=["M_prev"])
    p = ig.GradMax(2).propose(s)
    morphism = place.passes(p, network)(network).verify()
    assert isinstance(morphism.promise, ig.SameFunction)
    assert relative(ig.interpret(morphism.after, *inputs), ig.interpret(network, *inputs)) < 1e-12
    assert morphism.after.groups[place.name].units == 2
    found = gradient(network, place, data, p)
    assert relative((s.slope * s.M_prev @ p.omega).mT, found) < 1e-10
    assert float(found.square().sum()) == pytest.approx(p.predicted_gain, rel=1e-10)
    # no random fan-out of that norm gives a larger gradient
    best = float((s.M_prev @ ig.GradMax(1, scaling="fixed").propose(s).omega).norm())
    draw = torch.Generator().manual_seed(0)
    others = F.normalize(torch.randn(columns(s), 1000, generator=draw, dtype=DOUBLE), dim=0)
    assert float((s.M_prev @ others).norm(dim=0).max()) <= best * (1 + 1e-12)


def test_outgoing_weights_are_compared_with_what_feeds_the_child() -> None:
    network, place = PLACES["dense, parallel to a group"]
    s = place.probe(place.within(ig.compile(network)), drawn(network, 6), F.cross_entropy)
    held = network.bundles["hidden2_output"].weight.norm(dim=0).mean()
    assert s.fan_out_norm == pytest.approx(float(held), rel=1e-12)
    assert [b.name for b in s.feeding] == ["weight.hidden2_output", "bias.output"]


@pytest.mark.parametrize(
    "how",
    [ig.Random(2), ig.Tiny(1), ig.Tiny(1, joint=True), ig.North(1), ig.InverseGradMax(2, steps=3), ig.GradMaxOpt(2)],
    ids=lambda how: type(how).__name__,
)
@pytest.mark.parametrize("name", ["dense", "conv stride"])
def test_every_method_works_there(how, name: str) -> None:
    network, place = PLACES[name]
    model, data = ig.compile(network), drawn(network, 60)
    empty = place.within(model)
    s = place.probe(empty, data, F.cross_entropy, want=how.needs)
    given = how.propose_with(s, empty, data, F.cross_entropy) if isinstance(how, ig.NeedsModel) else how.propose(s)
    p = ig.refine(given, empty, data, F.cross_entropy)
    before = F.cross_entropy(model(data[0]), data[1]).item()
    if p.gain_unit == "loss":
        after = ig.compile(place.passes(p, network)(network).after)
        assert before - F.cross_entropy(after(data[0]), data[1]).item() == pytest.approx(p.measured_gain, rel=1e-8)
    optimizer = torch.optim.AdamW(model.parameters())
    model.grow(place.passes(p, network)(network), optimizer)
    assert model.structure.groups[place.name].units == how.units
    assert "AddGroup" in str(model.ledger) and p.fan_in.keys() != {place.parent}


def test_in_fit_the_layer_begins_and_then_widens() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=draw, dtype=DOUBLE)
    data = x, (x[:, 0] * x[:, 1] > 0).long()
    model = ig.compile(ig.mlp([6, 3, 2], activation="tanh", dtype=DOUBLE))
    place = ig.Between("input", "output", activation="tanh", group="second")
    growth = ig.Growth(when=ig.Every(epochs=1), sites=("hidden", place), how=ig.GradMax(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    history = ig.fit(model, data, F.cross_entropy, optimizer, epochs=5, growth=growth, progress=False)
    assert not history.notes and [e["site"] for e in history.growths] == ["hidden", "second", "hidden", "second"]
    assert history.events[-1]["widths"] == {"hidden": 7, "second": 4}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_largest_gain_between_a_site_and_a_new_layer() -> None:
    network, place = PLACES["dense"]
    model, data = ig.compile(network), drawn(network, 60)
    for where in (ig.LargestGain(), ig.LargestSingularValue()):
        growth = ig.Growth(when=ig.Every(epochs=1), where=where, sites=("hidden1", place), how=ig.Tiny(1))
        model = ig.compile(network)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        history = ig.fit(model, data, F.cross_entropy, optimizer, epochs=2, growth=growth, progress=False)
        assert [e["site"] for e in history.growths] in (["hidden1"], [place.name]), history.notes


def test_refusals() -> None:
    network = mlp("tanh")
    model, data = ig.compile(network), drawn(network, 60)
    with pytest.raises(Refused, match="which feeds 'output'"):
        ig.Between("output", "hidden1").within(model)
    with pytest.raises(Refused, match="Between: input -> output: found a group 'hidden1', expected a new name"):
        ig.Between("input", "output", group="hidden1").within(model)
    place = ig.Between("input", "output", activation="sigmoid")
    s = place.probe(place.within(model), data, F.cross_entropy)
    with pytest.raises(Refused, match="GradMax: site 'input_output_between': found activation sigmoid"):
        ig.GradMax(1).propose(s)
    place = ig.Between("input", "output", activation="tanh")
    p = ig.Tiny(1, delta="apply").propose(place.probe(place.within(model), data, F.cross_entropy))
    with pytest.raises(Refused, match="a proposal with changes of existing weights"):
        place.passes(p, network)(network)
    with pytest.raises(StaleMorphism, match="Between: input -> output: found a proposal for another structure"):
        place.passes(proposal(ig.Random(1), s, p.alpha.mT, p.omega), mlp("tanh", (6, 4, 3)))
