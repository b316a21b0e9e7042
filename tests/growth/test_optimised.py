"""GradMaxOpt, inverse GradMax and FireflyOpt climb what they say, and leave the model as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growth_nets import DOUBLE, conv_pair, drawn, forked, grown_loss, mlp, mobile, pooled, relative, residual
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.family import Family
from irgrow.growth.optimised import FireflyOpt, GradMaxOpt, InverseGradMax
from irgrow.growth.probe import probe
from irgrow.ir.errors import BadData, Refused, UnknownName


def measured(network, count: int = 30, want=(), site: str | None = None):
    model, data = ig.compile(network), drawn(network, count)
    s = probe(model, data, F.cross_entropy, want=want)
    return s[site or next(iter(s))], model, data


def fan_out_gradient(network, p, data):
    """||dL/d fan-out of the new units||^2, by the interpreter."""
    after = ig.AddUnits(p)(network).after
    names = [f"weight.{n}" for n in p.fan_out]
    tensors = {n: after.tensors()[n].clone().requires_grad_() for n in names}
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    loss = F.cross_entropy(ig.interpret(after, *inputs, tensors=tensors), data[1])
    total = 0.0
    for n, g in zip(p.fan_out, torch.autograd.grad(loss, list(tensors.values())), strict=True):
        new = p.fan_out[n].shape[1]
        total += float(g[:, -new:].square().sum())
    return total


@pytest.mark.parametrize("constraint", ["total", "each", "orthogonal"])
@pytest.mark.parametrize("network", [mlp("tanh"), mlp("relu", (9, 4, 7, 5)), forked("silu"), residual()])
def test_one_unit_climbs_to_gradmax(network, constraint: str) -> None:
    s, *_ = measured(network, want=["M_prev"])
    best = ig.GradMax(1).propose(s)
    for seed in range(3):
        p = GradMaxOpt(1, constraint=constraint, seed=seed).propose(s)
        assert p.predicted_gain >= best.predicted_gain * (1 - 1e-6)
        assert p.predicted_gain <= best.predicted_gain * (1 + 1e-9)
        assert relative(p.omega @ p.omega.mT, best.omega @ best.omega.mT) < 1e-2
        assert isinstance(ig.AddUnits(p)(network).promise, ig.SameFunction) or not s.smooth


def test_several_units_may_beat_the_svd() -> None:
    s, *_ = measured(mlp("tanh", (9, 4, 7, 5)), want=["M_prev"])
    svd = ig.GradMax(3).propose(s)
    gains = {c: GradMaxOpt(3, constraint=c).propose(s).predicted_gain for c in ("total", "each", "orthogonal")}
    assert gains["orthogonal"] == pytest.approx(svd.predicted_gain, rel=1e-5)
    assert gains["total"] > 1.2 * svd.predicted_gain and gains["each"] > 1.2 * svd.predicted_gain
    top = 3 * ig.GradMax(1).propose(s).predicted_gain
    assert gains["total"] == pytest.approx(top, rel=1e-5)
    p = GradMaxOpt(3).propose(s)
    assert float(p.omega.norm()) == pytest.approx(3**0.5 * s.fan_out_norm, rel=1e-12)


def test_gradmaxopt_on_images() -> None:
    network = conv_pair(ig.Conv2d((3, 3), padding=(1, 1)), ig.Conv2d((3, 3), (2, 2)))
    s, *_ = measured(network, want=["M_prev"])
    p, best = GradMaxOpt(1).propose(s), ig.GradMax(1).propose(s)
    assert p.predicted_gain == pytest.approx(best.predicted_gain, rel=1e-6)


NETWORKS = {
    "mlp": mlp("tanh"),
    "gaussian": mlp("gaussian", (6, 4, 3), bias=False),
    "fork": forked("relu"),
    "residual": residual(),
    "conv": conv_pair(ig.Conv2d((3, 3), padding=(1, 1)), ig.Conv2d((3, 3), (2, 2)), "relu"),
    "pool": pooled("max", True, "relu", norm="batch"),
    "mobile": mobile(),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_inverse_climbs_and_is_silent(name: str) -> None:
    network = NETWORKS[name]
    s, model, data = measured(network, 16)
    how = InverseGradMax(2, steps=15)
    p = how.propose_with(s, model, data, F.cross_entropy)
    assert isinstance(ig.AddUnits(p)(network).verify().promise, ig.SameFunction)
    assert fan_out_gradient(network, p, data) == pytest.approx(p.predicted_gain, rel=1e-9)
    start = InverseGradMax(2, steps=0).propose_with(s, model, data, F.cross_entropy)
    assert p.predicted_gain > 1.1 * start.predicted_gain
    assert relative(p.alpha.norm(dim=1), start.alpha.norm(dim=1)) < 1e-9


@pytest.mark.parametrize("name", list(NETWORKS))
def test_fireflyopt_lowers_the_loss(name: str) -> None:
    network = NETWORKS[name]
    s, model, data = measured(network, 16)
    p = FireflyOpt(2, steps=15).propose_with(s, model, data, F.cross_entropy)
    before = float(
        F.cross_entropy(ig.interpret(network, *(data[0] if isinstance(data[0], tuple) else data[:1])), data[1])
    )
    assert p.measured_gain == pytest.approx(before - grown_loss(network, p, data), abs=1e-9) and p.measured_gain > 0
    start = FireflyOpt(2, steps=0).propose_with(s, model, data, F.cross_entropy)
    assert p.measured_gain > start.measured_gain
    assert relative(p.omega.norm(dim=0), torch.full((2,), 0.1 * s.fan_out_norm, dtype=DOUBLE)) < 1e-9


def test_the_family_is_what_the_passes_make() -> None:
    for network in NETWORKS.values():
        s, model, data = measured(network, 5)
        p = FireflyOpt(2, steps=2).propose_with(s, model, data, F.cross_entropy)

        def build(net, values, p=p):
            fan_in = {n: values[f"in.{n}"] for n in p.fan_in}
            fan_out = {n: values[f"out.{n}"] for n in p.fan_out}
            return ig.AddUnits(replace(p, fan_in=fan_in, fan_out=fan_out, structure=net.structure))(net).after

        values = {f"in.{n}": w for n, w in p.fan_in.items()} | {f"out.{n}": w for n, w in p.fan_out.items()}
        family = Family(build, model, {n: tuple(v.shape) for n, v in values.items()})
        made, wanted = family.tensors(values), build(network, values).tensors()
        assert all(relative(made[n], wanted[n]) < 1e-12 for n in wanted)
        inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
        assert relative(family.outputs(values, inputs), ig.interpret(build(network, values), *inputs)) < 1e-12


def test_batches_and_the_model_stay_as_they_are() -> None:
    network = mlp("relu")
    s, model, data = measured(network)
    model.train()
    before = {n: t.clone() for n, t in model.tensors().items()}
    parts = [(data[0][:10], data[1][:10]), (data[0][10:], data[1][10:])]
    for how in (InverseGradMax(1, steps=5), FireflyOpt(1, steps=5)):
        p = how.propose_with(s, model, parts, F.cross_entropy)
        assert torch.equal(p.alpha, how.propose_with(s, model, parts, F.cross_entropy).alpha)
        with pytest.raises(BadData, match="loss: found NaN or infinity"):
            how.propose_with(s, model, data, lambda y, t: y.sum() * torch.nan)
        with pytest.raises(BadData, match=r"no loss, expected what the model is trained with"):
            how.propose_with(s, model, data)
        with pytest.raises(BadData, match=r"data: found no samples, expected an iterable that can be read several"):
            how.propose_with(s, model, iter(parts), F.cross_entropy)
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.tensors().items())
    assert all(p.grad is None for p in model.parameters())


def test_refusals() -> None:
    s, *_ = measured(mlp("sigmoid"), want=["M_prev"])
    with pytest.raises(Refused, match="GradMaxOpt: site 'hidden1': found activation sigmoid"):
        GradMaxOpt().propose(s)
    with pytest.raises(UnknownName, match="GradMaxOpt: constraint 'none'"):
        GradMaxOpt(constraint="none")
    s, *_ = measured(mlp("tanh"), want=["M_prev"])
    with pytest.raises(Refused, match="5 orthogonal columns, expected at most 4"):
        GradMaxOpt(5, constraint="orthogonal").propose(s)
    with pytest.raises(Refused, match="FireflyOpt: eps"):
        FireflyOpt(eps=0.0)
    with pytest.raises(Refused, match="InverseGradMax: found steps=-1"):
        InverseGradMax(steps=-1)
