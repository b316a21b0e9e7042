"""GradMax and Random: silent units, the largest gradient, the scalings, and what lies beyond the rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from growth_nets import DOUBLE, concatenated, drawn, forked, mlp, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.probe import probe
from irgrow.ir.errors import Refused, UnknownName

SCALINGS = ("mean_norm", "fixed", "paper", "sigma")


def measured(network, count: int = 30, site: str | None = None):
    data = drawn(network, count)
    s = probe(ig.compile(network), data, F.cross_entropy, want=["M_prev"])
    return s[site or next(iter(s))], data


def new_gradient(network, proposal, data):
    """The gradient of the new fan-in weights (the bias last), by the interpreter: `[units, F]`."""
    after = ig.AddUnits(proposal)(network).after
    names = [f"weight.{n}" for n in proposal.fan_in]
    names += [] if proposal.bias is None else [f"bias.{proposal.site}"]
    tensors = {n: after.tensors()[n].clone().requires_grad_() for n in names}
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    loss = F.cross_entropy(ig.interpret(after, *inputs, tensors=tensors), data[1])
    new = [g[-proposal.units :].reshape(proposal.units, -1) for g in torch.autograd.grad(loss, list(tensors.values()))]
    return torch.cat(new, 1)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("network", [mlp("tanh"), mlp("gelu"), forked("silu"), residual(), concatenated("gelu")])
def test_silent_and_with_the_predicted_gradient(network, scaling: str) -> None:
    s, data = measured(network)
    p = ig.GradMax(2, scaling=scaling).propose(s)
    morphism = ig.AddUnits(p)(network).verify()
    assert isinstance(morphism.promise, ig.SameFunction)
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    assert relative(ig.interpret(morphism.after, *inputs), ig.interpret(network, *inputs)) < 1e-12
    if len(p.fan_in) == 1 or network.groups.get("stream1") is None:
        gradient = new_gradient(network, p, data)
        assert relative(gradient, (s.slope * s.M_prev @ p.omega).mT) < 1e-10
        assert float(gradient.square().sum()) == pytest.approx(p.predicted_gain, rel=1e-10)
    assert p.gain_unit == "gradient"


def test_no_random_direction_is_better() -> None:
    network = mlp("tanh")
    s, data = measured(network)
    p = ig.GradMax(1, scaling="fixed").propose(s)
    best = float(new_gradient(network, p, data).norm())
    draw = torch.Generator().manual_seed(0)
    others = F.normalize(torch.randn(4, 1000, generator=draw, dtype=DOUBLE), dim=0)
    assert best == pytest.approx(float((s.M_prev @ p.omega).norm()), rel=1e-10)
    assert float((s.M_prev @ others).norm(dim=0).max()) <= best * (1 + 1e-12)
    # Ky Fan: no 2 orthonormal directions beat the top two
    pair = ig.GradMax(2, scaling="fixed").propose(s)
    for seed in range(100):
        q = torch.linalg.qr(torch.randn(4, 2, generator=draw.manual_seed(seed), dtype=DOUBLE)).Q
        assert float((s.M_prev @ q).square().sum()) <= pair.predicted_gain * (1 + 1e-12)


def test_scalings() -> None:
    network = mlp("tanh")
    s, _ = measured(network)
    existing = network.bundles["hidden1_hidden2"].weight.norm(dim=0).mean()
    assert s.fan_out_norm == pytest.approx(float(existing), rel=1e-12)
    norms = {name: ig.GradMax(2, scaling=name, scale=0.5).propose(s).omega.norm(dim=0) for name in SCALINGS}
    values = torch.linalg.svdvals(s.M_prev)[:2]
    c = 0.5 * existing
    assert relative(norms["mean_norm"], c.expand(2)) < 1e-12
    assert relative(norms["fixed"], torch.full((2,), 0.5, dtype=DOUBLE)) < 1e-12
    assert relative(norms["paper"], (c / values.norm()).expand(2)) < 1e-10
    assert relative(norms["sigma"], values * c / values.norm()) < 1e-10
    assert float(norms["sigma"].norm()) == pytest.approx(float(c), rel=1e-10)


def test_beyond_the_rank() -> None:
    network = mlp("tanh", (6, 5, 3))
    s, _ = measured(network)
    p = ig.GradMax(3).propose(s)  # three classes: gradients sum to zero, so the rank is 2
    assert p.units == 3 and p.notes == ("3 units from a gradient of rank 2: the other 1 are random",)
    unit = p.omega / p.omega.norm(dim=0)
    assert relative(unit.mT @ unit, torch.eye(3, dtype=DOUBLE)) < 1e-9
    many = ig.GradMax(7).propose(s)
    assert many.units == 7 and relative(many.omega.norm(dim=0), torch.full((7,), s.fan_out_norm, dtype=DOUBLE)) < 1e-12
    assert torch.equal(many.omega, ig.GradMax(7).propose(s).omega)
    assert not torch.equal(many.omega[:, 3:], ig.GradMax(7, seed=1).propose(s).omega[:, 3:])


def test_relu_is_kicked_onto_its_active_side() -> None:
    network = mlp("relu")
    s, data = measured(network)
    p = ig.GradMax(2).propose(s)
    before = ig.interpret(network, data[0])
    assert relative(ig.interpret(ig.AddUnits(p)(network).after, data[0]), before) < 1e-12
    assert float(new_gradient(network, p, data).norm()) > 0
    exact = ig.GradMax(2, kick=0.0).propose(s)
    assert not bool(exact.alpha.any())
    assert float(new_gradient(network, exact, data).norm()) == 0  # why there is a kick
    step = -(s.M_prev @ p.omega).mT
    assert relative(p.alpha, 1e-15 * step / step.norm(dim=1, keepdim=True)) < 1e-10


def test_random_is_silent_unless_asked() -> None:
    network = mlp("sigmoid", (400, 300, 200, 3))
    s = probe(ig.compile(network), [], F.cross_entropy, want=())["hidden1"]
    p = ig.Random(100).propose(s)
    assert not bool(p.omega.any()) and isinstance(ig.AddUnits(p)(network).promise, ig.SameFunction)
    assert float(p.alpha.std()) == pytest.approx((3 * 400) ** -0.5, rel=0.02)
    loud = ig.Random(100, fan_out="random", scale=2.0).propose(s)
    assert float(loud.omega.std()) == pytest.approx(2 * (3 * 400) ** -0.5, rel=0.02)  # 300 units and 100 new
    assert relative(p.alpha, ig.Random(100).propose(s).alpha) == 0
    assert relative(p.alpha, ig.Random(100, seed=1).propose(s).alpha) > 0.1
    with pytest.raises(UnknownName, match="Random: fan_out 'none'"):
        ig.Random(fan_out="none")


def test_options_are_checked() -> None:
    with pytest.raises(UnknownName, match="GradMax: scaling 'mean': expected one of mean_norm, fixed"):
        ig.GradMax(scaling="mean")
    with pytest.raises(Refused, match="GradMax: units: found 0"):
        ig.GradMax(0)


def test_a_target_inside_an_irregular_region() -> None:
    """The target's neurons feed each other; its gradient is exact all the same, and sparse edges are noted."""
    b = ig.Builder(dtype=DOUBLE)
    b.input("x", 5)
    b.group("hidden", 4, activation="tanh", bias=True)
    b.connect("x", "hidden")
    b.group("loop", 4, activation="tanh", bias=True)
    b.connect("hidden", "loop")
    b.connect("loop", "loop", ig.Sparse(np.array([0, 1, 0]), np.array([1, 2, 3])), name="inner")
    b.output("out", 3, bias=True)
    b.connect("loop", "out")
    network = b.build()
    s, data = measured(network, site="hidden")
    p = ig.GradMax(2).propose(s)
    assert relative(new_gradient(network, p, data), (s.M_prev @ p.omega).mT) < 1e-10
    assert any("dW* leaves inner as they are" in note for note in p.notes)
    inside = ig.AddUnits(ig.Random(1).propose(measured(network, site="loop")[0]))(network)
    assert "inner" in ig.Site.of(network, "loop").inner and inside.after.groups["loop"].units == 5
    assert relative(ig.interpret(inside.after, data[0]), ig.interpret(network, data[0])) < 1e-12
