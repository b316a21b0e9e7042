"""SENN's expansion score: the natural gradient's decrease, in Kronecker form, and the trigger made from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth_nets import DOUBLE, drawn, mlp
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.expansion import expansion_score
from irgrow.ir.errors import Refused

WANT = ("S", "M_prev", "N", "S_in", "M", "E")


def measured(network, count: int = 60, site: str = "hidden1"):
    data = drawn(network, count)
    return ig.probe(ig.compile(network), data, F.cross_entropy, sites=[site], want=WANT)[site], data


def test_the_score_by_hand() -> None:
    s, _ = measured(mlp("tanh"))
    G = s.M.mT.flatten()  # rows: outputs, columns: features
    fisher = torch.kron(s.E, s.S_in)
    assert expansion_score(s) == pytest.approx(float(G @ torch.linalg.solve(fisher, G)), rel=1e-10)


def test_the_score_does_not_depend_on_the_coordinates_of_the_targets() -> None:
    s, _ = measured(mlp("tanh"))
    p = ig.Tiny(2, fisher=True).propose(s)
    assert float(p.singular_values.square().sum()) > 0
    A = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) + 3 * torch.eye(4, dtype=DOUBLE)
    inverse = torch.linalg.inv(A)
    other = replace(s, M=s.M @ inverse, M_prev=s.M_prev @ inverse, E=inverse.mT @ s.E @ inverse)
    assert expansion_score(other) == pytest.approx(expansion_score(s), rel=1e-10)
    q = ig.Tiny(2, fisher=True).propose(other)
    assert float(q.singular_values.square().sum()) == pytest.approx(float(p.singular_values.square().sum()), rel=1e-10)


def test_scaling_the_loss_changes_nothing() -> None:
    network = mlp("tanh")
    data = drawn(network, 60)
    first = ig.Expansion(data, F.cross_entropy, units=2).factors(network, ("hidden1", "hidden2"))
    scaled = ig.Expansion(data, lambda o, t: 100 * F.cross_entropy(o, t), units=2).factors(
        network, ("hidden1", "hidden2")
    )
    assert first == pytest.approx(scaled, rel=1e-8) and all(f > 1 for f in first.values())


def test_it_says_when_and_where() -> None:
    network = mlp("tanh", (6, 2, 2, 3))
    data = drawn(network, 100)
    factors = ig.Expansion(data, F.cross_entropy).factors(network, ("hidden1", "hidden2"))
    best = max(factors, key=factors.get)
    for ratio, sites in ((1.0, [best]), (1e9, [])):
        grow = ig.Expansion(data, F.cross_entropy, ratio=ratio, times=1)
        model = ig.compile(network)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        growth = ig.Growth(when=grow, where=grow, how=ig.Tiny(1, fisher=True), refine=False)
        history = ig.fit(model, data, F.cross_entropy, optimizer, epochs=3, growth=growth, progress=False)
        assert [e["site"] for e in history.growths] == sites
    assert ig.Expansion(data, F.cross_entropy).factors(mlp("sigmoid", (6, 2, 3)), ("hidden",)) == {}
    with pytest.raises(Refused, match="Expansion: found units=0"):
        ig.Expansion(data, F.cross_entropy, units=0)
