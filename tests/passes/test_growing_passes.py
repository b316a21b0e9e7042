"""SplitUnit, AddUnits and AddLayer: what they write, where they apply, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

import irgrow as ig
from irgrow.ir.errors import BadData, IrgrowError, Refused, StaleMorphism, UnknownName
from irgrow.ir.morphism import Changes, FirstOrder, SameFunction
from irgrow.ir.network import Network, Unit
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.passes import AddLayer, AddUnits, SplitUnit
from irgrow.testing import assert_promise, places

F64 = torch.float64


def mlp(**how) -> Network:
    return ig.mlp([3, 4, 2], dtype=F64, **how)


def residual(norm: str | None = None) -> Network:
    """x -> a; s = a + conv(a), max pooled, flattened into y; depthwise beside it."""
    b = ig.Builder(dtype=F64)
    b.input("x", (2, 4, 4))
    b.group("a", (4, 4, 4), activation="tanh", bias=True)
    b.group("s", (4, 4, 4), norm=norm)
    b.group("d", (4, 4, 4), activation="relu")
    b.group("p", (4, 2, 2), aggregation="max")
    b.output("y", 2, bias=True)
    b.connect("x", "a", ig.Conv2d(3, padding=1))
    b.connect("a", "s", ig.Identity(), name="skip")
    b.connect("a", "s", ig.Conv2d(3, padding=1), name="block")
    b.connect("s", "d", ig.Conv2d(3, padding=1, channel_groups=4))
    b.connect("d", "p", ig.Pool2d(2, 2))
    b.connect("p", "y")
    return b.build()


def into_max() -> Network:
    b = ig.Builder(dtype=F64)
    b.input("x", 3), b.group("h", 3), b.output("y", 2, aggregation="max")
    b.connect("x", "h"), b.connect("h", "y")
    return b.build()


def loop() -> Network:
    b = ig.Builder(dtype=F64)
    b.input("x", 2), b.group("h", 3), b.output("y", 1)
    b.connect("x", "h"), b.connect("h", "h", ig.Sparse(np.array([0]), np.array([1]))), b.connect("h", "y")
    return b.build()


# ---- SplitUnit --------------------------------------------------------------------------------------------------


def test_splitting_a_unit() -> None:
    net = mlp()
    after = SplitUnit(net.unit("hidden", 1), 0.25)(net).after
    old, new = net.tensors(), after.tensors()
    assert torch.equal(new["weight.input_hidden"], old["weight.input_hidden"][[0, 1, 1, 2, 3]])
    assert torch.equal(new["bias.hidden"], old["bias.hidden"][[0, 1, 1, 2, 3]])
    share = torch.tensor([1, 0.25, 0.75, 1, 1], dtype=F64)
    assert torch.equal(new["weight.hidden_output"], old["weight.hidden_output"][:, [0, 1, 1, 2, 3]] * share)
    serials = net.groups["hidden"].serials.tolist()
    assert after.groups["hidden"].serials.tolist() == [serials[0], serials[1], net.next_serial, *serials[2:]]


@pytest.mark.parametrize("share", [0.5, 0.0, -1.5, 1 / 3])
@pytest.mark.parametrize("make", [mlp, residual, loop], ids=lambda make: make.__name__)
def test_splitting_keeps_the_function(make: Callable[[], Network], share: float) -> None:
    net = make()
    (found, *_) = places(net, [SplitUnit])
    assert isinstance(found, SplitUnit)
    morphism = assert_promise(replace(found, share=share), net)
    assert isinstance(morphism.promise, SameFunction)


def test_units_tied_to_it_split_along() -> None:
    net = residual("batch")
    after = SplitUnit(net.unit("p", 2))(net).after.verify()
    assert {name: g.units for name, g in after.groups.items()} == {"x": 2, "a": 5, "s": 5, "d": 5, "p": 5, "y": 2}
    assert after.bundles["s_d"].pattern == ig.Conv2d(3, padding=1, channel_groups=5)


SPLIT_REFUSED = {
    "an output": (
        mlp(),
        ("output", 0),
        Refused,
        r"SplitUnit: changing the units of 'output': found group 'output' would",
    ),
    "an input": (mlp(), ("input", 0), Refused, r"group 'input' would change with it, and is an input"),
    "a layer norm": (
        mlp(norm="layer"),
        ("hidden", 0),
        Refused,
        r"unit hidden#3: found group 'hidden' has a layer norm",
    ),
    "a max": (
        into_max(),
        ("h", 0),
        Refused,
        r"bundle 'h_y' enters group 'y', which aggregates by max, expected targets",
    ),
}


@pytest.mark.parametrize("name", SPLIT_REFUSED)
def test_splits_that_are_refused(name: str) -> None:
    net, unit, error, text = SPLIT_REFUSED[name]
    with pytest.raises(error, match=text):
        SplitUnit(net.unit(*unit))(net)


def test_units_and_shares_that_cannot_be() -> None:
    net = mlp()
    with pytest.raises(UnknownName, match="unit hidden#99: expected a serial of group 'hidden'"):
        SplitUnit(Unit("hidden", 99))(net)
    with pytest.raises(UnknownName, match="group 'hiden': expected one of input, hidden, output"):
        SplitUnit(Unit("hiden", 3))(net)
    with pytest.raises(Refused, match="share nan, expected a finite number"):
        SplitUnit(net.unit("hidden", 0), float("nan"))(net)


# ---- AddUnits ---------------------------------------------------------------------------------------------------


def proposal(net: Network, **changes) -> Proposal:
    (found, *_) = places(net, [AddUnits])
    assert isinstance(found, AddUnits)
    return replace(found.proposal, **changes)


def test_adding_units() -> None:
    net = mlp()
    p = proposal(net)
    after = AddUnits(p)(net).after
    new, old = after.tensors(), net.tensors()
    assert torch.equal(new["weight.input_hidden"], torch.cat([old["weight.input_hidden"], p.fan_in["input_hidden"]]))
    assert torch.equal(
        new["weight.hidden_output"], torch.cat([old["weight.hidden_output"], p.fan_out["hidden_output"]], 1)
    )
    assert p.bias is not None and torch.equal(new["bias.hidden"], torch.cat([old["bias.hidden"], p.bias]))


def test_what_the_promise_depends_on() -> None:
    net = mlp(activation="tanh")
    p = proposal(net)
    none = {n: torch.zeros_like(w) for n, w in p.fan_out.items()}
    quiet = {n: torch.zeros_like(w) for n, w in p.fan_in.items()}
    delta = {"weight.input_hidden": torch.ones(4, 3, dtype=F64)}
    for changed, promise in (
        (p, FirstOrder()),
        (replace(p, fan_out=none), SameFunction()),
        (replace(p, fan_in=quiet), FirstOrder()),  # the bias still drives the new units
        (replace(p, fan_in=quiet, bias=None), SameFunction()),
        (replace(p, fan_out=none, delta=delta), FirstOrder()),
    ):
        assert assert_promise(AddUnits(changed), net).promise == promise
    sigmoid = mlp(activation="sigmoid")
    q = proposal(sigmoid)
    silent = replace(q, fan_in={n: torch.zeros_like(w) for n, w in q.fan_in.items()}, bias=None)
    assert isinstance(AddUnits(silent).promise(sigmoid), FirstOrder)  # sigma(0) is not 0
    normed = mlp(norm="layer")
    assert AddUnits(proposal(normed)).promise(normed) == Changes(
        "the layer norm of group 'hidden' is taken over the new units too"
    )


def test_delta_is_added_to_the_old_entries() -> None:
    net = mlp()
    p = proposal(net)
    change = torch.randn(2, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    after = AddUnits(replace(p, delta={"weight.hidden_output": change}))(net).after
    wanted = torch.cat([net.tensors()["weight.hidden_output"] + change, p.fan_out["hidden_output"]], 1)
    assert torch.equal(after.tensors()["weight.hidden_output"], wanted)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_a_bundle_inside_the_site_gets_rows_and_columns(norm: str | None) -> None:
    net = residual(norm)
    p = proposal(net)
    site = Site.of(net, p.site)
    assert "block" in site.entering and "block" in site.leaving
    after = assert_promise(AddUnits(p), net).after
    block = after.tensors()["weight.block"]
    assert torch.equal(block[:4, :4], net.tensors()["weight.block"])
    assert torch.equal(block[4:, :4], p.fan_in["block"]) and torch.equal(block[:4, 4:], p.fan_out["block"])
    assert not block[4:, 4:].any()
    kernel = after.tensors()["weight.s_d"][4:]
    centre = torch.zeros_like(kernel)
    centre[:, 0, 1, 1] = 1
    assert torch.equal(kernel, centre)


def test_sparse_bundles_get_explicit_edges() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 3), b.group("h", 2, activation="tanh"), b.output("y", 2)
    b.connect("x", "h", ig.Sparse(np.array([0, 2]), np.array([0, 1]))), b.connect("h", "y")
    net = b.build()
    p = proposal(net)
    after = assert_promise(AddUnits(p), net).after
    new = sorted((s, t, w) for s, t, w in after.edges() if t >= net.next_serial)
    assert [(s, t) for s, t, _ in new] == [(s, net.next_serial + u) for s in range(3) for u in range(2)]
    assert [w for _, _, w in new] == p.fan_in["x_h"].T.flatten().tolist()


def test_grouped_convolutions_grow_every_group() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", (2, 3, 3)), b.group("a", (4, 3, 3), activation="tanh"), b.group("g", (6, 3, 3)), b.output("y", 2)
    (
        b.connect("x", "a", ig.Conv2d(1)),
        b.connect("a", "g", ig.Conv2d(3, padding=1, channel_groups=2)),
        b.connect("g", "y"),
    )
    net = b.build()
    for site, shape in (("a", (6, 3, 3, 3)), ("g", (8, 2, 3, 3))):
        pass_, *_ = [p for p in places(net, [AddUnits]) if isinstance(p, AddUnits) and p.proposal.site == site]
        after = assert_promise(pass_, net).after
        assert tuple(after.tensors()["weight.a_g"].shape) == shape


def wrong(net: Network, **changes) -> tuple[Network, Proposal]:
    return net, proposal(net, **changes)


ADD_REFUSED = {
    "another structure": (
        wrong(mlp(), structure="other"),
        StaleMorphism,
        r"a proposal for another structure, .*; probe a",
    ),
    "a missing bundle": (
        wrong(mlp(), fan_out={}),
        Refused,
        r"fan-out: found weights for \[\], expected .*hidden_output",
    ),
    "a shape that does not fit": (
        wrong(mlp(), fan_out={"hidden_output": torch.zeros(2, 3)}),
        Refused,
        r"AddUnits: site 'hidden': fan-out of 'hidden_output': found shape \(2, 3\), expected \(2, 2\)",
    ),
    "NaN": (wrong(mlp(), bias=torch.tensor([0, float("nan")])), BadData, r"site 'hidden': bias: found NaN or infinity"),
    "a bias for nobody": (
        wrong(ig.mlp([3, 4, 2], bias=False), bias=torch.ones(2)),
        Refused,
        r"found a bias for new units",
    ),
    "a delta of nothing": (
        wrong(mlp(), delta={"weight.z": torch.zeros(1)}),
        Refused,
        r"delta: found tensor 'weight.z'",
    ),
    "a delta of another shape": (
        wrong(mlp(), delta={"bias.hidden": torch.zeros(6)}),
        Refused,
        r"delta of 'bias.hidden': found shape \(6,\), expected \(4,\)",
    ),
}


@pytest.mark.parametrize("name", ADD_REFUSED)
def test_proposals_that_are_refused(name: str) -> None:
    (net, p), error, text = ADD_REFUSED[name]
    with pytest.raises(error, match=text):
        AddUnits(p)(net)


def test_sites_without_an_exact_way() -> None:
    net = into_max()
    assert places(net, [AddUnits]) == []
    with pytest.raises(Refused, match="AddUnits: site 'h': .* aggregates by max"):
        AddUnits(Proposal("h", net.structure, "mine", {"x_h": torch.zeros(1, 3)}, {"h_y": torch.zeros(2, 1)}))(net)


# ---- AddLayer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "identity", "abs"])
def test_a_new_layer_is_the_identity(activation: str) -> None:
    net = mlp(activation=activation)
    morphism = assert_promise(AddLayer("hidden"), net)
    after = morphism.after
    assert list(after.groups) == ["input", "hidden", "output", "hidden_deeper"]
    assert torch.equal(after.tensors()["weight.hidden_hidden_deeper"], torch.eye(4, dtype=F64))
    assert after.groups["hidden_deeper"].activation == activation
    x = torch.randn(5, 3, dtype=F64)
    assert torch.equal(ig.interpret(net, x), ig.interpret(after, x))


def test_a_new_layer_of_an_image_is_a_convolution() -> None:
    net = residual()
    after = assert_promise(AddLayer("d", kernel=5), net).after
    assert after.bundles["d_d_deeper"].pattern == ig.Conv2d(5, padding=2)
    assert after.bundles["d_p"].source == "d_deeper"


LAYER_REFUSED = {
    "an output": (
        mlp(),
        AddLayer("output"),
        r"AddLayer: group 'output': found an output, .*; add the layer in front of",
    ),
    "a loop": (loop(), AddLayer("h"), r"found it lies in a loop of groups"),
    "an even kernel": (residual(), AddLayer("a", "identity", 2), r"found kernel 2, expected an odd kernel"),
    "not idempotent": (
        mlp(activation="tanh"),
        AddLayer("hidden"),
        r"activation 'tanh' on values of 'tanh', expected an activation that leaves .*; use activation='identity'",
    ),
    "relu on anything": (mlp(activation="tanh"), AddLayer("hidden", "relu"), r"activation 'relu' on values of 'tanh'"),
    "an unknown group": (mlp(), AddLayer("z"), r"group 'z': expected one of input"),
    "an unknown activation": (mlp(), AddLayer("hidden", "rleu"), r"activation 'rleu': expected one of"),
}


@pytest.mark.parametrize("name", LAYER_REFUSED)
def test_layers_that_are_refused(name: str) -> None:
    net, pass_, text = LAYER_REFUSED[name]
    with pytest.raises(IrgrowError, match=text):
        pass_(net)


def test_weights_read_from_a_proposal_are_copied() -> None:
    net = mlp()
    p = proposal(net)
    after = AddUnits(p)(net).after
    kept = after.tensors()["weight.input_hidden"].clone()
    p.fan_in["input_hidden"].zero_()
    assert torch.equal(after.tensors()["weight.input_hidden"], kept)
