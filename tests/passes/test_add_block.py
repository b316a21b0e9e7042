"""Groups and bundles that begin without effect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import difference, obey, some, zoo

import irgrow as ig
from irgrow.ir.errors import BadData, PromiseBroken, Refused, StaleMorphism, UnknownName
from irgrow.ir.interpreter import interpret
from irgrow.ir.morphism import FirstOrder, Morphism, SameFunction
from irgrow.ir.network import Network
from irgrow.passes.add_block import AddGroup, AddResidual, AddSkip
from irgrow.testing import assert_promise, gradients, inputs_for, networks, rewrites

F64 = torch.float64


@pytest.mark.parametrize("name", zoo())
@pytest.mark.parametrize("kind", [AddGroup, AddResidual, AddSkip])
def test_at_every_place(kind: type, name: str) -> None:
    network = zoo()[name]
    found = some(kind.places(network), 6)
    assert found
    for place in found:
        obey(place, network)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    assert_promise(data.draw(rewrites(network, [AddGroup, AddResidual, AddSkip])), network)


# ---- between two groups ---------------------------------------------------------------------------------------


def proposal(network: Network, candidate: AddGroup | AddResidual, ends: tuple[str, str], **more) -> ig.Proposal:
    draw = torch.Generator().manual_seed(0)
    into, outof = (torch.randn(shape, generator=draw, dtype=F64) for shape in candidate.shapes(network))
    values = {"fan_in": {ends[0]: into}, "fan_out": {ends[1]: outof}} | more
    return ig.Proposal("new", network.structure, "test", **values)


def test_a_group_beside_what_is_there() -> None:
    network = zoo()["dense"]
    after = obey(AddGroup("input", "output", 4, "tanh", name="side"), network).after
    assert after.group("side").shape == (4,) and after.group("side").activation == "tanh"
    assert bool(after.bundle("input_side").weight.any()) and not bool(after.bundle("side_output").weight.any())
    assert gradients(after, inputs_for(after))["weight.side_output"].abs().max() > 1e-3  # it can learn
    assert AddGroup("input", "output", seed=0)(network).after != AddGroup("input", "output", seed=1)(network).after


def test_patterns_fit_the_shapes() -> None:
    network = zoo()["separable"]  # x 3x5x4 -> point 4x5x4 -> depth 8x3x2 (stride 2) -> ... -> y
    wanted = {
        ("x", "point"): ((2, 5, 4), (1, 1)),
        ("x", "depth"): ((2, 3, 2), (2, 2)),
        ("point", "y"): ((2, 5, 4), None),
    }
    for (parent, child), (shape, stride) in wanted.items():
        after = obey(AddGroup(parent, child, 2, name="new"), network).after
        assert after.group("new").shape == shape
        into = after.bundle(f"{parent}_new").pattern
        assert stride is None or into.stride == stride
        assert isinstance(after.bundle(f"new_{child}").pattern, ig.Dense if child == "y" else ig.Conv2d)
    flat = obey(AddGroup("x", "grouped", 3, kernel=None, name="new"), network).after
    assert flat.group("new").shape == (3,) and isinstance(flat.bundle("new_grouped").pattern, ig.Dense)


def test_weights_of_a_proposal() -> None:
    network = zoo()["dense"]
    empty = AddGroup("input", "hidden2", 3, "tanh", name="new")
    given_ = proposal(network, empty, ("input", "hidden2"), bias=torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    morphism = obey(replace(empty, proposal=given_), network)
    assert isinstance(morphism.promise, FirstOrder)
    x = inputs_for(network)[0]
    new = torch.tanh(x @ given_.fan_in["input"].T + given_.bias) @ given_.fan_out["hidden2"].T
    z = torch.relu(x @ network.bundle("input_hidden1").weight.T + network.group("hidden1").bias)
    z = torch.relu(z @ network.bundle("hidden1_hidden2").weight.T + network.group("hidden2").bias + new)
    y = z @ network.bundle("hidden2_output").weight.T + network.group("output").bias
    assert torch.allclose(interpret(morphism.after, x), y, rtol=1e-12, atol=1e-12)

    silent = proposal(network, empty, ("input", "hidden2"), fan_in={"input": torch.zeros(3, 4, dtype=F64)})
    assert isinstance(obey(replace(empty, proposal=silent), network).promise, SameFunction)
    sigmoid = replace(empty, proposal=silent, activation="sigmoid")
    assert isinstance(obey(sigmoid, network).promise, FirstOrder)  # sigma(0) reaches the child


def test_a_group_with_outgoing_weights_is_caught() -> None:
    """The control: the promise of the zero fan-out fails on a network whose fan-out is not zero."""
    network = zoo()["dense"]
    morphism = AddGroup("input", "output", name="new")(network)
    broken = morphism.after.with_tensors({"weight.new_output": torch.full((3, 1), 1e-6, dtype=F64)})
    with pytest.raises(PromiseBroken, match="AddGroup"):
        Morphism(network, broken, morphism.lineage, morphism.promise, morphism.by).verify()


# ---- residual -------------------------------------------------------------------------------------------------


def test_a_residual_layer() -> None:
    network = zoo()["residual"]
    morphism = obey(AddResidual("stem", 5), network)
    after = morphism.after
    assert after.group("stem_block").shape == (4, 3, 4) and after.group("stem_residual").shape == (5, 3, 4)
    assert {b.source for b in after.entering("stem_block")} == {"stem", "stem_residual"}
    assert {b.target for b in after.leaving("stem_block")} == {b.target for b in network.leaving("stem")}
    identity = after.bundle("stem_stem_block")
    assert identity.pattern == ig.Identity() and not identity.trainable
    unit = after.unit("stem_residual", 0)
    assert ig.SplitUnit(unit)(after).verify()
    twice = obey(AddResidual("stem_block", 2, "silu"), after)
    assert difference(network, twice.after) <= 1e-12
    assert obey(AddResidual("hidden1"), zoo()["dense"]).after.group("hidden1_residual").units == 5


def test_a_residual_layer_of_a_proposal() -> None:
    network = zoo()["tanh"]
    empty = AddResidual("hidden", 2, bias=False)
    morphism = obey(replace(empty, proposal=proposal(network, empty, ("hidden", "hidden"))), network)
    assert isinstance(morphism.promise, FirstOrder) and difference(network, morphism.after) > 1e-3


# ---- skips ----------------------------------------------------------------------------------------------------


def test_skips() -> None:
    network = zoo()["separable"]
    conv = obey(AddSkip("x", "depth"), network).after.bundle("x_depth")
    assert conv.pattern == ig.Conv2d((1, 1), (2, 2)) and conv.weight.shape == (8, 3, 1, 1)
    wide = obey(AddSkip("x", "depth", 3), network).after.bundle("x_depth").pattern
    assert wide == ig.Conv2d((3, 3), (2, 2), (1, 1))
    assert isinstance(obey(AddSkip("point", "y"), network).after.bundle("point_y").pattern, ig.Dense)
    assert isinstance(obey(AddSkip("x", "mean", None), network).after.bundle("x_mean").pattern, ig.Dense)


def valid() -> Network:
    """An image of 5x6 and, by a 2x2 kernel without padding, one of 4x5."""
    b = ig.Builder(seed=0, dtype=F64)
    b.input("x", (1, 5, 6))
    b.group("h", (2, 4, 5))
    b.connect("x", "h", ig.Conv2d((2, 2)))
    b.output("y", 2)
    b.connect("h", "y")
    return b.build()


# ---- refusals -------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    dense, cnn = zoo()["dense"], zoo()["cnn"]
    odd = valid()
    good = proposal(dense, AddGroup("input", "output", 2), ("input", "output"))
    with_ = lambda **more: AddGroup("input", "output", 2, proposal=replace(good, **more))  # noqa: E731
    cases = [
        (dense, AddGroup("nowhere", "output"), UnknownName, "group 'nowhere'"),
        (dense, AddGroup("input", "output", 0), Refused, "AddGroup: input -> output: found 0 units"),
        (dense, AddGroup("input", "output", activation="rel"), UnknownName, "activation 'rel'"),
        (dense, AddGroup("input", "output", kernel=2), Refused, "found kernel 2, expected an odd kernel"),
        (dense, AddGroup("input", "output", name="a.b"), Refused, "found name 'a.b'"),
        (dense, AddGroup("hidden1", "input"), Refused, "found the input 'input' as target"),
        (dense, AddGroup("hidden2", "hidden1"), Refused, "found 'hidden1', which feeds 'hidden2', expected no loop"),
        (dense, AddSkip("hidden1", "hidden1"), Refused, "found one group, expected no loop of groups"),
        (cnn, AddGroup("input", "pool1"), Refused, "'pool1', which aggregates by max"),
        (cnn, AddSkip("input", "pool1"), Refused, "'pool1', which aggregates by max"),
        (odd, AddSkip("x", "h"), Refused, "images of 5x6 and 4x5, expected sizes that a stride joins; use kernel=None"),
        (odd, AddGroup("x", "h"), Refused, "images of 5x6 and 4x5"),
        (dense, AddSkip("input", "hidden1"), Refused, "found bundle 'input_hidden1' of the same pattern"),
        (dense, AddResidual("output"), Refused, "AddResidual: group 'output': found an output"),
        (zoo()["irregular"], AddResidual("inserted"), Refused, "found it lies in a loop of groups"),
        (dense, with_(structure="other"), StaleMorphism, "a proposal for another structure"),
        (dense, with_(delta={"bias.output": torch.ones(3)}), Refused, "changes of existing weights"),
        (dense, with_(fan_in={"hidden1": torch.ones(2, 5)}), Refused, "fan-in: found weights for .'hidden1'."),
        (dense, with_(fan_in={"input": torch.ones(3, 4)}), Refused, r"fan-in: found shape \(3, 4\), expected \(2, 4\)"),
        (dense, with_(fan_out={"output": torch.full((3, 2), torch.inf)}), BadData, "fan-out: found NaN or infinity"),
        (dense, replace(with_(bias=torch.ones(2)), bias=False), Refused, "a proposal with a bias, expected none"),
    ]  # fmt: skip
    for network, candidate, error, text in cases:
        with pytest.raises(error, match=text):
            candidate(network)
