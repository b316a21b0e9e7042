"""Batch norm in train mode: the gradient of new fan-in weights is E[(b - E b) g^T] omega / sqrt(eps), exactly."""

from __future__ import annotations

import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, pooled, relative
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.methods.base import columns, proposal
from irgrow.growth.probe import Gathering
from irgrow.ir.errors import BadData, UnknownName


def depthwise():
    """conv `grown` -> depthwise conv -> conv `target`, a batch norm at both ends of the site."""
    b = ig.Builder(seed=0, dtype=DOUBLE)
    b.input("x", (2, 7, 6))
    b.group("grown", (3, 7, 6), activation="tanh", norm="batch")
    b.connect("x", "grown", ig.Conv2d(3, padding=1))
    b.group("deep", (3, 4, 3), activation="tanh", norm="batch")
    b.connect("grown", "deep", ig.Conv2d(3, 2, 1, channel_groups=3))
    b.group("target", (2, 4, 3), activation="tanh", norm="batch")
    b.connect("deep", "target", ig.Conv2d(1))
    b.output("out", 3, bias=True)
    b.connect("target", "out")
    return b.build()


NETWORKS = {
    "dense": ig.mlp([6, 5, 4, 3], activation="tanh", norm="batch", dtype=DOUBLE),
    "conv same": conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, padding=1), norm="batch"),
    "conv stride first": conv_pair(ig.Conv2d(3, stride=2, padding=1), ig.Conv2d(3, padding=1), norm="batch"),
    "conv stride second": conv_pair(ig.Conv2d(3, padding=1), ig.Conv2d(3, stride=2, padding=1), norm="batch"),
    "pool, flatten": pooled("mean", True, norm="batch"),
    "pool, conv": pooled("mean", False, norm="batch"),
    "depthwise": depthwise(),
}


def train_mode_gradient(network, p, data):
    """The gradient of new fan-in weights in a training step of the grown network `[units, fan-in features]`."""
    grown = ig.compile(ig.AddUnits(p)(network).after).train()
    F.cross_entropy(grown(data[0]), data[1]).backward()
    names = [f"weight.{n}" for n in p.fan_in] + ([] if p.bias is None else [f"bias.{p.site}"])
    return torch.cat([grown.tensors()[n].grad[-p.units :].reshape(p.units, -1) for n in names], 1)


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_gradient_in_train_mode_is_the_predicted_one(name: str, spread: bool, monkeypatch) -> None:
    network = NETWORKS[name]
    monkeypatch.setattr("irgrow.growth.conv_statistics._spreading_pays", lambda sums, way: spread)
    monkeypatch.setattr("irgrow.growth.conv_statistics.MEMORY", 1)  # a batch is not cut where a norm couples it
    data, model = drawn(network, 12), ig.compile(network)
    site = "grown" if "grown" in network.groups else "hidden1"
    s = ig.probe(model, data, F.cross_entropy, sites=[site], want=["M_prev"], mode="train")[site]
    draw = torch.Generator().manual_seed(1)
    omega = torch.randn(columns(s), 2, generator=draw, dtype=DOUBLE)
    silent = proposal(ig.GradMax(2), s, torch.zeros(s.M_prev.shape[0], 2, dtype=DOUBLE), omega)
    found = train_mode_gradient(network, silent, data)
    assert float(found.abs().max()) > 0
    assert relative((s.slope * s.M_prev @ omega).mT, found) < 1e-10
    p = ig.GradMax(1).propose(s)
    assert float(train_mode_gradient(network, p, data).square().sum()) == pytest.approx(p.predicted_gain, rel=1e-10)
    before, after = (ig.compile(n).train()(data[0]) for n in (network, ig.AddUnits(p)(network).after))
    assert relative(after.detach(), before.detach()) < 1e-12  # silent in train mode as well


def test_the_matrix_by_hand() -> None:
    """E[g (h - E h)^T] / sqrt(eps), and not E[g h^T] or 1/eps (the paper's appendix C)."""
    network = NETWORKS["dense"]
    data, model = drawn(network, 12), ig.compile(network)
    s = ig.probe(model, data, F.cross_entropy, sites=["hidden1"], want=["M_prev", "S"], mode="train")["hidden1"]
    plain = ig.probe(model, data, F.cross_entropy, sites=["hidden1"], want=["M_prev"])["hidden1"]
    shift = torch.zeros(12, 4, dtype=DOUBLE, requires_grad=True)
    outputs, _ = ig.compile(network).train().record(data[0], shifts={"hidden2": shift})
    (g,) = torch.autograd.grad(F.cross_entropy(outputs, data[1]), shift)
    centred = data[0] - data[0].mean(0)
    assert relative(s.M_prev[:6], centred.mT @ g) < 1e-12
    assert relative(s.S[:6, :6], centred.mT @ centred / 12) < 1e-12
    eps = network.groups["hidden1"].norm.eps
    assert s.slope == pytest.approx(eps**-0.5) and plain.slope == pytest.approx((1 + eps) ** -0.5)
    assert relative(plain.M_prev, s.M_prev) > 0.1


def test_running_statistics_modes_and_gradients_stay() -> None:
    network = NETWORKS["depthwise"]
    model = ig.compile(network).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ig.probe(model, drawn(network, 12), F.cross_entropy, mode="train")
    assert not model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(UnknownName, match="probe: mode 'fast': expected eval or train"):
        ig.probe(model, drawn(network, 12), F.cross_entropy, mode="fast")


def test_statistics_of_training_steps_know_their_mode() -> None:
    network = NETWORKS["conv same"]
    data, model = drawn(network, 12), ig.compile(network).train()
    expected = ig.probe(model, data, F.cross_entropy, sites=["grown"], want=["M_prev"], mode="train")["grown"]
    gathering = Gathering(model.structure, ["grown"], want=["M_prev"], mode="train")
    F.cross_entropy(gathering.forward(model, data[0]), data[1]).backward()
    gathering.collect()
    assert relative(gathering.statistics()["grown"].M_prev, expected.M_prev) < 1e-12
    with pytest.raises(BadData, match="gathering: forward: found a model in train mode, expected eval mode"):
        Gathering(model.structure, ["grown"], want=["M_prev"]).forward(model, data[0])


def test_small_incoming_weights() -> None:
    """Section 4.2: random fan-ins of norm eps, which a batch norm in train mode blows up by 1/sqrt(eps)."""
    network = NETWORKS["dense"]
    s = ig.probe(ig.compile(network), drawn(network, 12), F.cross_entropy, sites=["hidden1"], mode="train")["hidden1"]
    p = ig.GradMax(3, eps=1e-4).propose(s)
    assert relative(p.alpha.norm(dim=1), torch.full((3,), 1e-4, dtype=DOUBLE)) < 1e-12
    assert relative(p.omega, ig.GradMax(3).propose(s).omega) == 0
    assert relative(p.alpha, ig.GradMax(3, eps=1e-4, seed=1).propose(s).alpha) > 0.1
    assert isinstance(ig.AddUnits(p)(network).verify().promise, ig.FirstOrder)
    model, data = ig.compile(network), drawn(network, 12)
    refined = ig.refine(p, model, data, F.cross_entropy)  # judged as the silent units they stand for
    assert refined.gain_unit == "lookahead"
    assert relative(refined.alpha.norm(dim=1), p.alpha.norm(dim=1)) < 1e-12
