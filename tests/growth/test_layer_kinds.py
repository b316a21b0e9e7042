"""Every method on every kind of layer: it works and keeps its promise there, or a typed refusal names the reason.

S5 among it: a proposal at scale 0 is the identity, exactly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from growth_nets import (
    DOUBLE,
    concatenated,
    conv_pair,
    drawn,
    forked,
    grown_loss,
    image_stream,
    mlp,
    mobile,
    pooled,
    relative,
    residual,
)
from torch.nn import functional as F

import irgrow as ig
from irgrow.growth.methods.base import columns, proposal
from irgrow.growth.methods.with_model import propose
from irgrow.ir.errors import Refused


def built(*wires, image: bool = False, seed: int = 0):
    """A network from `(name, shape, options, {source: pattern or None})` behind an input `x`."""
    b = ig.Builder(seed=seed, dtype=DOUBLE)
    b.input("x", (2, 6, 5) if image else 6)
    for name, shape, options, sources in wires:
        b.group(name, shape, **options)
        for source, pattern in sources.items():
            given = () if pattern is None else pattern if isinstance(pattern, tuple) else (pattern,)
            b.connect(source, name, *given)
    b.output("out", 3, bias=True)
    b.connect(wires[-1][0], "out")
    return b.build()


TANH = {"activation": "tanh", "bias": True}


def sparse():
    edges = np.array([0, 1, 2, 3, 4, 5, 0]), np.array([0, 1, 2, 3, 4, 0, 3])
    return built(
        ("h", 5, TANH, {"x": ig.Sparse(*edges)}), ("t", 4, TANH, {"h": ig.Sparse(np.arange(5), np.arange(5) % 4)})
    )


def irregular():
    b = ig.Builder(dtype=DOUBLE)
    b.input("x", 6)
    b.group("h", 4, activation="tanh")
    b.connect("x", "h", ig.Sparse(np.array([0, 1, 2, 0]), np.array([0, 1, 2, 3])))
    b.connect("h", "h", ig.Sparse(np.array([0, 1]), np.array([1, 2])), name="inner")
    b.output("out", 3, bias=True)
    b.connect("h", "out")
    return b.build()


CONV = ig.Conv2d(3, padding=1)
WORKS = {
    "dense": mlp("tanh"),
    "no bias": mlp("gelu", bias=False),
    "dropout": built(("h", 5, TANH | {"dropout": 0.5}, {"x": None})),
    "batch norm": built(("h", 5, {"activation": "tanh", "norm": "batch"}, {"x": None})),
    "batch norm on images": built(("h", (4, 6, 5), {"activation": "tanh", "norm": "batch"}, {"x": CONV}), image=True),
    "conv, same": conv_pair(CONV, CONV),
    "conv, strides": conv_pair(ig.Conv2d(3, stride=2, padding=1), ig.Conv2d(3, stride=2, padding=1)),
    "conv, dilation": conv_pair(ig.Conv2d(2, dilation=2, padding=1), ig.Conv2d(3, dilation=2, padding=2)),
    "conv, flattened": built(("h", (4, 6, 5), TANH, {"x": CONV}), image=True),
    "depthwise": mobile(),
    "mean pooling, flattened": pooled("mean", True),
    "mean pooling, conv": pooled("mean", False, "silu"),
    "residual stream": residual(),
    "residual images": image_stream(),
    "merge": built(
        ("a", 4, TANH, {"x": None}),
        ("b", 4, {"activation": "gelu", "bias": True}, {"x": None}),
        ("s", 4, {"activation": "silu"}, {"a": ig.Identity(), "b": (ig.Identity(), 2.0)}),
    ),
    "concatenation": concatenated(),
    "sparse": sparse(),
    "several inputs": forked("silu"),
    "a loop of groups": irregular(),
}
NOT_LINEAR = {
    "max pooling, flattened": pooled("max", True),
    "max pooling, conv": pooled("max", False),
}
REFUSED = {
    "layer norm": (built(("h", 4, {"activation": "tanh", "norm": "layer"}, {"x": None})), "layer norm"),
    "group norm": (
        built(("h", (4, 6, 5), {"activation": "tanh", "norm": "group"}, {"x": CONV}), image=True),
        "group norm",
    ),
    "a maximum along the site": (
        built(("h", 4, TANH, {"x": None}), ("m", 4, {"aggregation": "max"}, {"h": ig.Identity()})),
        "takes the maximum of its parents",
    ),
    "a target that takes the maximum": (
        built(("h", 4, TANH, {"x": None}), ("m", 3, {"aggregation": "max"}, {"h": None})),
        "aggregates by max",
    ),
    "channel groups": (
        built(
            ("h", (4, 6, 5), TANH, {"x": CONV}),
            ("t", (4, 6, 5), TANH, {"h": ig.Conv2d(3, padding=1, channel_groups=2)}),
            image=True,
        ),
        "channel groups|expected multiples of",
    ),
}
METHODS = {
    "random": ig.Random(2),
    "random, both": ig.Random(2, fan_out="random"),
    "silent": ig.Silent(2),
    "gradmax": ig.GradMax(2),
    "gradmaxopt": ig.GradMaxOpt(2, steps=5),
    "tiny": ig.Tiny(1, projection=False, delta="apply"),
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
# methods that choose their own places find one: what passes by max splits exactly, and other sites can grow
ELSEWHERE = {
    ("a maximum along the site", "firefly"),
    ("a maximum along the site", "splitting"),
    ("a target that takes the maximum", "firefly"),
}
# (kind of layer, method): the words of the refusal
REASONS = {
    ("no bias", "silent"): "found no bias",
    ("batch norm", "silent"): "found no bias",
    ("batch norm on images", "silent"): "found no bias",
    ("depthwise", "copies"): "depthwise convolution into 'deep'.*use SplitUnit",
    ("residual stream", "copies"): "different biases",
    ("residual images", "copies"): "different biases",
    ("merge", "copies"): "different biases",
    ("concatenation", "copies"): "a concatenation: 'left' of 3 units, 'both' of 5 units",
    ("concatenation", "splitting"): "a second activation tanh at 'both'",
    ("sparse", "splitting"): "sparse edges",
    ("merge", "splitting"): "entered at 2 groups",
    ("a loop of groups", "silent"): "found no bias",
    ("a loop of groups", "copies"): "bundle 'inner' from the site into itself",
    ("a loop of groups", "firefly"): "lies in a loop of groups",
    ("a loop of groups", "splitting"): "lies in a loop of groups",
}
for _kind in ("residual stream", "residual images", "merge"):
    for _name in ("north", "north pre", "north weight", "variance transfer"):
        REASONS[_kind, _name] = "entered at 2 groups"


def first_site(network):
    return ig.Site.all(network)[0].name


def grown(network, how, data):
    """The growth of the first site by a method, as a morphism."""
    model = ig.compile(network)
    if isinstance(how, ig.Selects):
        return how.select(model, data, F.cross_entropy)(network)
    site = first_site(network)
    s = ig.probe(model, data, F.cross_entropy, sites=[site], want=how.needs)[site]
    return ig.AddUnits(propose(how, s, model, data, F.cross_entropy))(network)


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("kind", [*WORKS, *NOT_LINEAR])
def test_works_or_says_why_not(kind: str, name: str) -> None:
    network = WORKS.get(kind) or NOT_LINEAR[kind]
    data, how = drawn(network, 150 if "images" in kind or "flattened" in kind else 40), METHODS[name]
    reason = REASONS.get((kind, name))
    if reason is not None:
        with pytest.raises(Refused, match=reason):
            grown(network, how, data)
        return
    morphism = grown(network, how, data)
    morphism.verify()
    at_zero = morphism.after.with_tensors(morphism.tensors(network.tensors(), 0.0))
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    assert relative(ig.interpret(at_zero, *inputs), ig.interpret(network, *inputs)) < 1e-12
    assert sum(g.units for g in morphism.after.groups.values()) > sum(g.units for g in network.groups.values())


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_cannot_be_exact_is_refused(kind: str, name: str) -> None:
    network, reason = REFUSED[kind]
    if (kind, name) in ELSEWHERE:
        grown(network, METHODS[name], drawn(network, 40)).verify()
        return
    if name == "silent" and any(g.bias is None for g in network.groups.values() if g.name == "h"):
        reason = f"{reason}|found no bias"
    with pytest.raises(Refused, match=reason):
        grown(network, METHODS[name], drawn(network, 40))


@pytest.mark.parametrize("kind", list(WORKS))
def test_the_gradient_of_new_fan_ins_is_the_predicted_one(kind: str) -> None:
    """slope * M_prev @ omega, by the interpreter, to 1e-10; for every entering bundle of every site."""
    network = WORKS[kind]
    data, model = drawn(network, 8), ig.compile(network)
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    for site in ig.Site.all(network):
        s = ig.probe(model, data, F.cross_entropy, sites=[site.name], want=["M_prev"])[site.name]
        draw = torch.Generator().manual_seed(1)
        omega = torch.randn(columns(s), 2, generator=draw, dtype=DOUBLE)
        silent = proposal(ig.GradMax(2), s, torch.zeros(s.M_prev.shape[0], 2, dtype=DOUBLE), omega)
        morphism = ig.AddUnits(silent)(network)
        assert relative(ig.interpret(morphism.after, *inputs), ig.interpret(network, *inputs)) < 1e-12
        found, at = [], s.slope * s.M_prev @ omega
        tensors = {n: t.clone().requires_grad_() for n, t in morphism.after.tensors().items()}
        loss = F.cross_entropy(ig.interpret(morphism.after, *inputs, tensors=tensors), data[1])
        loss.backward()
        for name in silent.fan_in:
            bundle = morphism.after.bundles[name]
            gradient = tensors[bundle.tensor].grad
            if isinstance(bundle.pattern, ig.Sparse):  # the new units' edges come last, unit by unit
                gradient = gradient[-2 * (at.shape[0] - s.bias) :]
            else:
                gradient = gradient[-2:]
            found.append(gradient.reshape(2, -1))
        if s.bias:
            biased = dict.fromkeys(network.bundles[n].target for n in silent.fan_in)
            found.append(sum(tensors[f"bias.{n}"].grad[-2:, None] for n in biased if f"bias.{n}" in tensors))
        assert relative(torch.cat(found, 1).mT, at) < 1e-10


SMOOTH = (
    "dense",
    "batch norm",
    "conv, same",
    "conv, strides",
    "mean pooling, conv",
    "residual stream",
    "merge",
    "sparse",
)


@pytest.mark.parametrize("options", [{}, {"delta": "apply"}, {"projection": False}, {"fisher": True}])
@pytest.mark.parametrize("kind", SMOOTH)
def test_the_predicted_gain_is_the_derivative(kind: str, options: dict) -> None:
    """Within 1 % of a finite difference at gamma = 1e-6."""
    network, how = WORKS[kind], ig.Tiny(2, amplitude=1e-6, **options)
    data = drawn(network, 150)
    site = first_site(network)
    p = how.propose(ig.probe(ig.compile(network), data, F.cross_entropy, sites=[site], want=how.needs)[site])
    fall = float(F.cross_entropy(ig.interpret(network, data[0]), data[1])) - grown_loss(network, p, data)
    assert fall == pytest.approx(p.predicted_gain, rel=0.01)


@pytest.mark.parametrize("kind", ["dense", "conv, strides", "residual stream", "sparse"])
def test_many_growths_in_a_row_at_the_same_place(kind: str) -> None:
    network = WORKS[kind]
    data, site = drawn(network, 20), first_site(network)
    before, units = ig.interpret(network, data[0]), network.groups[site].units
    for number in range(12):
        how = (ig.GradMax(1), ig.Random(2), ig.GradMax(3, scaling="sigma"))[number % 3]
        s = ig.probe(ig.compile(network), data, F.cross_entropy, sites=[site], want=how.needs)[site]
        network = ig.AddUnits(how.propose(s))(network).after
    assert network.groups[site].units == units + 24
    assert relative(ig.interpret(network.verify(), data[0]), before) < 1e-12
