"""Growing inside a loop of groups: new units stand beside it, or have edges inside that close no cycle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import irgrow as ig
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.passes import AddUnits, SplitUnit
from irgrow.testing import assert_promise, places

F64 = torch.float64


def grown() -> Network:
    """An insertion-grown graph: `inserted` feeds itself."""
    net = ig.mlp([3, 2], seed=7, dtype=F64, bias=False)
    for seed in range(6):
        net = ig.InsertNeuron(seed=seed, activation="tanh")(net).after
    return net


def units_in_a_loop(net: Network, *, reads: float | None = None, feeds: float | None = None) -> Proposal:
    """Two new units beside the loop; with `reads` they read every inserted neuron, with `feeds` they feed each."""
    drawn = next(iter(AddUnits.places(net))).proposal
    fan_in, fan_out = dict(drawn.fan_in), dict(drawn.fan_out)
    if reads is not None:
        fan_in["inserted_inserted"] = torch.full((2, 6), reads, dtype=F64)
    if feeds is not None:
        fan_out["inserted_inserted"] = torch.full((6, 2), feeds, dtype=F64)
    return replace(drawn, fan_in=fan_in, fan_out=fan_out)


def test_new_units_stand_beside_a_loop_of_groups() -> None:
    net = grown()
    site = Site.of(net, "inserted")
    assert (site.entering, site.leaving) == (("input_inserted",), ("inserted_output",))
    assert site.inner == ("inserted_inserted",)
    before = net.bundles["inserted_inserted"]
    after = assert_promise(AddUnits(units_in_a_loop(net)), net).after
    assert after.bundles["inserted_inserted"].pattern == before.pattern and after.groups["inserted"].units == 8
    assert after.levels["inserted"][6:].tolist() == [1, 1]


@pytest.mark.parametrize(("reads", "feeds"), [(0.2, None), (None, 0.2), (0.0, None)])
def test_new_units_have_edges_inside_a_loop_that_close_no_cycle(reads: float | None, feeds: float | None) -> None:
    net = grown()
    after = assert_promise(AddUnits(units_in_a_loop(net, reads=reads, feeds=feeds)), net).after
    pattern = after.bundles["inserted_inserted"].pattern
    assert pattern.source.size == net.bundles["inserted_inserted"].pattern.source.size + 12
    deepest = int(net.levels["inserted"].max())
    assert after.levels["inserted"][6:].tolist() == ([deepest + 1] * 2 if feeds is None else [1, 1])


def test_units_that_would_close_a_cycle_are_refused() -> None:
    net = grown()
    with pytest.raises(Refused, match=r"AddUnits: site 'inserted': found inserted neuron \d+ -> .*close no cycle"):
        AddUnits(units_in_a_loop(net, reads=0.2, feeds=0.2))(net)
    with pytest.raises(Refused, match=r"fan-out: found .* exactly for \['inserted_output'\], and at most for"):
        p = units_in_a_loop(net)
        AddUnits(replace(p, fan_out={}))(net)


def test_a_group_that_only_its_loop_feeds_reads_the_loop() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 2), b.group("a", 3, activation="tanh"), b.group("c", 2, activation="tanh"), b.output("y", 1)
    b.connect("x", "a"), b.connect("c", "y"), b.connect("a", "y")
    b.connect("a", "c", ig.Sparse(np.array([0, 1]), np.array([0, 1])))
    b.connect("c", "a", ig.Sparse(np.array([0]), np.array([2])))
    net = b.build()
    site = Site.of(net, "c")
    assert (site.entering, site.leaving, site.inner) == (("a_c",), ("c_y",), ("a_c", "c_a"))
    grown = [p.proposal for p in places(net, [AddUnits]) if p.proposal.site == "c"]
    assert {tuple(p.fan_out) for p in grown} == {("c_y",)}  # feeding a as well would close a cycle
    for p in grown:
        assert_promise(AddUnits(p), net)


@pytest.mark.parametrize("kind", [SplitUnit, ig.SplitUnits, ig.WidenUnits, ig.MergeUnits, ig.PruneUnits, ig.AddEdges])
def test_the_other_passes_work_in_a_loop_of_groups(kind: type) -> None:
    net = grown()
    if kind is ig.MergeUnits:
        net = SplitUnit(net.unit("inserted", 2), 0.3)(net).after
    found = [p for p in places(net, [kind]) if "inserted" in str(p)] if kind is not ig.AddEdges else places(net, [kind])
    assert found
    for p in found:
        assert_promise(p, net)


def test_twenty_growths_in_a_row_inside_a_loop() -> None:
    first = net = grown()
    total = None
    for n in range(20):
        p = list(AddUnits.places(net))[1 + n % 2 * 2].proposal  # beside the loop, then reading all of it
        step = AddUnits(p.scaled(1.0, 0.0))(net)
        total = step if total is None else total >> step
        net = step.after.verify()
    assert total is not None and net.groups["inserted"].units == 46
    total.verify(tolerance=1e-12)
    assert total.before == first
