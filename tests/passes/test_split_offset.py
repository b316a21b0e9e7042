"""Splitting with offsets: theta +/- eps * delta, half of the outgoing weights each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import difference, obey, zoo

import irgrow as ig
from irgrow.ir.errors import BadData, Refused, StaleMorphism, UnknownName
from irgrow.ir.morphism import FirstOrder, SameFunction
from irgrow.ir.network import Network
from irgrow.passes.base import Pass
from irgrow.passes.split_offset import SplitUnits
from irgrow.testing import assert_promise, networks, rewrites

F64 = torch.float64


def offsets(network: Network, site: str, fan_in: dict, bias=None, **more) -> ig.Proposal:
    return ig.Proposal(site, network.structure, "test", fan_in, more.pop("fan_out", {}), bias, **more)


def units(network: Network, group: str, *at: int) -> tuple:
    return tuple(network.unit(group, i) for i in at)


@pytest.mark.parametrize("name", zoo())
def test_at_every_place(name: str) -> None:
    network = zoo()[name]
    for place in SplitUnits.places(network):
        obey(place, network)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    assert_promise(data.draw(rewrites(network, [SplitUnits])), network)


def test_without_offsets_it_is_splitting_one_after_the_other() -> None:
    network = zoo()["dense"]
    together = SplitUnits(units(network, "hidden1", 1, 3))(network)
    assert isinstance(together.promise, SameFunction)
    one = ig.SplitUnit(network.unit("hidden1", 1))(network).after
    two = ig.SplitUnit(one.unit("hidden1", 4))(one).after
    assert together.after == two


def test_dense_values() -> None:
    """Rows theta + o and theta - o, columns v / 2, bias b + p and b - p."""
    network = zoo()["dense"]
    draw = torch.Generator().manual_seed(0)
    o, p = torch.randn(2, 4, generator=draw, dtype=F64), torch.randn(2, generator=draw, dtype=F64)
    proposal = offsets(network, "hidden1", {"input_hidden1": o}, p)
    morphism = SplitUnits(units(network, "hidden1", 0, 3), proposal)(network)
    assert isinstance(morphism.promise, FirstOrder)
    w, b = network.bundle("input_hidden1").weight, network.group("hidden1").bias
    v = network.bundle("hidden1_hidden2").weight
    after = morphism.after
    rows = torch.stack([w[0] + o[0], w[0] - o[0], w[1], w[2], w[3] + o[1], w[3] - o[1], w[4]])
    bias = torch.stack([b[0] + p[0], b[0] - p[0], b[1], b[2], b[3] + p[1], b[3] - p[1], b[4]])
    columns = torch.stack([v[:, 0] / 2, v[:, 0] / 2, v[:, 1], v[:, 2], v[:, 3] / 2, v[:, 3] / 2, v[:, 4]], 1)
    assert torch.equal(after.bundle("input_hidden1").weight, rows)
    assert torch.equal(after.group("hidden1").bias, bias)
    assert torch.equal(after.bundle("hidden1_hidden2").weight, columns)
    serials = network.group("hidden1").serials
    assert after.group("hidden1").serials.tolist()[0] == serials[0]
    assert Pass.from_text(morphism.by, {proposal.hash: proposal}) == SplitUnits(
        units(network, "hidden1", 0, 3), proposal
    )


def test_even_in_each_offset_and_of_second_order_where_smooth() -> None:
    network = zoo()["mean"]
    shape = network.bundle("input_conv1").weight.shape
    delta = torch.randn((2, *shape[1:]), generator=torch.Generator().manual_seed(1), dtype=F64)
    pair = units(network, "conv1", 0, 2)

    def grown(first: float, second: float) -> Network:
        scaled = delta * torch.tensor([first, second], dtype=F64).reshape(2, 1, 1, 1)
        return SplitUnits(pair, offsets(network, "conv1", {"input_conv1": scaled}))(network).after

    for signs in ((-1, 1), (1, -1), (-1, -1)):
        assert difference(grown(0.1, 0.1), grown(0.1 * signs[0], 0.1 * signs[1])) <= 1e-14
    change = [difference(network, grown(eps, eps)) for eps in (1e-2, 1e-3)]
    assert change[0] / change[1] == pytest.approx(100, rel=0.05)


def test_tied_groups_move_by_the_same_rows() -> None:
    """A residual sum: rows for the stem and for the convolution back into the sum; parents split as well."""
    network = zoo()["residual"]
    site = ig.Site.of(network, "stem")
    assert set(site.entering) == {"x_stem", "inner_sum"}
    draw = torch.Generator().manual_seed(2)
    fan_in = {
        n: torch.randn((1, *network.bundle(n).weight.shape[1:]), generator=draw, dtype=F64) for n in site.entering
    }
    morphism = obey(SplitUnits(units(network, "stem", 1), offsets(network, "stem", fan_in)), network)
    for name, offset in fan_in.items():
        w = morphism.after.bundle(name).weight
        assert torch.allclose((w[1] - w[2]) / 2, offset[0]) and torch.allclose(
            (w[1] + w[2]) / 2, network.bundle(name).weight[1]
        )


def test_sparse_units_move_along_their_own_edges() -> None:
    network = zoo()["irregular"]
    name = next(b.name for b in network.entering("inserted") if b.source == "input_" or b.source == "input")
    bundle = network.bundle(name)
    u = int(bundle.pattern.target[0])
    edges = bundle.pattern.target == u
    offset = torch.zeros(1, 3, dtype=F64)
    offset[0, bundle.pattern.source[edges].astype(np.int64)] = 0.25
    after = SplitUnits(units(network, "inserted", u), offsets(network, "inserted", {name: offset}))(network).after
    new = after.bundle(name)
    for twin, sign in ((u, 1), (u + 1, -1)):
        found = sorted(new.weight[torch.from_numpy(new.pattern.target == twin)].tolist())
        assert found == sorted((bundle.weight[torch.from_numpy(edges)] + sign * 0.25).tolist())
    offset[0, np.setdiff1d(np.arange(3), bundle.pattern.source[edges])] = 0.5
    if bool((offset == 0.5).any()):
        with pytest.raises(Refused, match="found an offset where there is no edge, expected 0 there"):
            SplitUnits(units(network, "inserted", u), offsets(network, "inserted", {name: offset}))(network)


def test_refusals() -> None:
    network = zoo()["dense"]
    pair = units(network, "hidden1", 1, 3)
    good = offsets(network, "hidden1", {"input_hidden1": torch.ones(2, 4, dtype=F64)})
    cases: list[tuple[SplitUnits, type[Exception], str]] = [
        (SplitUnits(()), Refused, "units none: found units of 0 groups"),
        (SplitUnits(pair[::-1]), Refused, r"found units stored at \[3, 1\], expected different units in the order"),
        (SplitUnits((pair[0], pair[0])), Refused, r"found units stored at \[1, 1\]"),
        (SplitUnits((ig.Unit("hidden1", 999),)), UnknownName, "unit hidden1#999"),
        (SplitUnits(units(network, "input", 0)), Refused, "'input'"),
        (SplitUnits(pair, replace(good, structure="other")), StaleMorphism, "offsets for another structure"),
        (SplitUnits(pair, replace(good, fan_out={"hidden1_hidden2": torch.ones(6, 2)})), Refused, "a fan-in only"),
        (
            SplitUnits(pair, replace(good, fan_in={"hidden2_output": torch.ones(2, 4)})),
            Refused,
            "bundle 'hidden2_output'",
        ),
        (SplitUnits(pair[:1], good), Refused, r"offset of 'input_hidden1': found shape \(2, 4\), expected \(1, 4\)"),
        (SplitUnits(pair, replace(good, bias=torch.ones(3))), Refused, r"bias of 'hidden1': found shape \(3,\)"),
        (SplitUnits(pair, replace(good, bias=torch.full((2,), torch.nan))), BadData, "found NaN or infinity"),
    ]
    for candidate, error, text in cases:
        with pytest.raises(error, match=text):
            candidate(network)
    no_bias = ig.mlp([2, 3, 2], bias=False, dtype=F64)
    with pytest.raises(Refused, match="no group of the site has a bias"):
        SplitUnits(units(no_bias, "hidden", 0), offsets(no_bias, "hidden", {}, torch.ones(1)))(no_bias)
    normed = ig.mlp([2, 3, 2], norm="layer", dtype=F64)
    with pytest.raises(Refused, match="group 'hidden' has a layer norm, so its old outputs would change"):
        SplitUnits(units(normed, "hidden", 0))(normed)
    max_pooled = ig.cnn((1, 4, 4), [2], 2, dtype=F64)
    assert list(SplitUnits.places(max_pooled))  # the pooled group splits along
