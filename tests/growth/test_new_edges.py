"""NeST's edges: those whose weight would have the largest gradient; and LiGO-like combinations of units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from growth_nets import DOUBLE, concatenated, conv_pair, drawn, mlp, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.ir.errors import BadData, Refused


def sparse(inner: bool = True):
    """Two groups that a few edges join, one of them (`inner`) within a group."""
    b = ig.Builder(dtype=DOUBLE)
    b.input("x", 5)
    b.group("h", 4, activation="tanh", bias=True)
    b.connect("x", "h", ig.Sparse(np.array([0, 1, 2, 3, 4]), np.array([0, 1, 2, 3, 0])))
    if inner:
        b.connect("h", "h", ig.Sparse(np.array([0]), np.array([1])), name="inner")
    b.output("out", 3, bias=True)
    b.connect("h", "out", ig.Sparse(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0])))
    return b.build()


def gradients_of_all(network, data):
    """The gradient of every edge that could be added, by adding it at weight 0: {(parent, child): gradient}."""
    found = {}
    ids = {int(i): name for name in network.groups for i in network.ids(name)}
    for parent in ids:
        for child in ids:
            step = ig.AddEdges(((parent, child),))
            try:
                after = step(network).after
            except Refused:
                continue
            new = set(after.tensors()) - set(network.tensors())
            grown = [n for n, t in network.tensors().items() if t.shape != after.tensors()[n].shape]
            (name,) = [*new, *grown]
            tensors = {name: after.tensors()[name].clone().requires_grad_()}
            loss = F.cross_entropy(ig.interpret(after, data[0], tensors=tensors), data[1])
            (g,) = torch.autograd.grad(loss, list(tensors.values()))
            found[parent, child] = float(g.flatten()[-1])
    return found


@pytest.mark.parametrize("network", [sparse(), mlp("tanh", (3, 2, 2, 3))], ids=["sparse", "mlp"])
def test_the_edges_with_the_largest_gradients(network) -> None:
    data, model = drawn(network, 20), ig.compile(network)
    every = gradients_of_all(network, data)
    levels = {
        int(i): int(level) for g in network.groups for i, level in zip(network.ids(g), network.levels[g], strict=True)
    }
    every = {e: g for e, g in every.items() if levels[e[0]] < levels[e[1]]}
    best = sorted(every, key=lambda e: -abs(every[e]))[:4]
    chosen = ig.NewEdges(4).select(model, data, F.cross_entropy)
    assert set(chosen.passes.edges) == set(best)
    for (_, child), c in zip(chosen.passes.edges, chosen.candidates, strict=True):
        assert c.unit == child and c.kind == "edge"
    for edge, c in zip(chosen.passes.edges, chosen.candidates, strict=True):
        assert c.score == pytest.approx(every[edge], rel=1e-10)
    assert isinstance(chosen(network).verify().promise, ig.SameFunction)
    assert "4 edges among 4" in repr(chosen)
    summed = ig.NewEdges(4, reduction="sum").select(model, data, lambda o, t: F.cross_entropy(o, t, reduction="sum"))
    assert summed.passes.edges == chosen.passes.edges


def test_a_first_step_lowers_the_loss_as_predicted() -> None:
    network = sparse()
    data, model = drawn(network, 40), ig.compile(network)
    chosen = ig.NewEdges(3, rate=1e-5).select(model, data, F.cross_entropy)
    assert chosen.measured_gain == pytest.approx(chosen.predicted_gain, rel=1e-3)
    into = ig.NewEdges(2).select(model, data, F.cross_entropy, sites=["h"])
    assert {c.site.split(" -> ")[1] for c in into.candidates} == {"h"}


def test_edges_grow_in_fit_and_refuse() -> None:
    network = sparse()
    model, data = ig.compile(network), drawn(network, 60)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    growth = ig.Growth(when=ig.Every(epochs=1), how=ig.NewEdges(3))
    history = ig.fit(model, data, F.cross_entropy, optimizer, epochs=3, growth=growth, progress=False)
    assert [e["parameters"] for e in history.epochs] == [17, 20, 23]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    full = ig.compile(ig.mlp([4, 3], dtype=DOUBLE))
    with pytest.raises(Refused, match="NewEdges: found no absent edge with a gradient"):
        ig.NewEdges().select(full, drawn(full.structure, 9), F.cross_entropy)
    with pytest.raises(Refused, match="NewEdges: found edges=0"):
        ig.NewEdges(0)
    with pytest.raises(BadData, match="NewEdges: group 'out': gradient|NewEdges: group 'h': gradient"):
        ig.NewEdges().select(model, data, lambda o, t: (o - o.detach()).abs().sqrt().sum())


NETWORKS = {
    "mlp": mlp("relu", (6, 5, 4, 3)),
    "no bias": mlp("tanh", (6, 5, 4, 3), bias=False),
    "conv": conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, stride=2, padding=1)),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_new_units_are_learned_combinations(name: str) -> None:
    network = NETWORKS[name]
    data, model = drawn(network, 40), ig.compile(network)
    site = ig.Site.all(network)[0].name
    s = ig.probe(model, data, F.cross_entropy, sites=[site], want=())[site]
    p = ig.LinearMap(2, steps=20).propose_with(s, model, data, F.cross_entropy)
    assert p.measured_gain > 0
    after = ig.compile(ig.AddUnits(p)(network).verify().after)
    fall = F.cross_entropy(model(data[0]), data[1]) - F.cross_entropy(after(data[0]), data[1])
    assert float(fall.detach()) == pytest.approx(p.measured_gain, rel=1e-8)
    (entering,) = network.entering(site)
    W = entering.weight.flatten(1)
    if network.groups[site].bias is not None:
        W = torch.cat([W, network.groups[site].bias[:, None]], 1)
    V = torch.cat([b.weight.transpose(0, 1).flatten(1) for b in network.leaving(site)], 1)
    out = torch.cat([w.transpose(0, 1).flatten(1) for w in p.fan_out.values()], 1)
    for rows, span in ((p.alpha, W), (out, V)):
        assert relative(rows @ torch.linalg.pinv(span) @ span, rows) < 1e-10
    quiet = ig.LinearMap(2, steps=0, silent=True).propose_with(s, model, data, F.cross_entropy)
    assert isinstance(ig.AddUnits(quiet)(network).promise, ig.SameFunction)


def test_linear_map_refuses() -> None:
    for network, site, reason in (
        (residual(), "stream1", "entered at 2 groups"),
        (concatenated(), "left", "a concatenation"),
        (sparse(), "h", r"sparse edges \('h_out'\) that leave the site"),
        (sparse(inner=False), "h", r"sparse edges \('h_out'\) that leave the site"),
    ):
        model, data = ig.compile(network), drawn(network, 9)
        with pytest.raises(Refused, match=reason):
            s = ig.probe(model, data, F.cross_entropy, sites=[site], want=())[site]
            ig.LinearMap(1, steps=1).propose_with(s, model, data, F.cross_entropy)
    with pytest.raises(Refused, match="LinearMap: found steps=-1"):
        ig.LinearMap(steps=-1)
