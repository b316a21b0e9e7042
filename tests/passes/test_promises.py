"""Every registered pass keeps what it owes at places of random networks; and passes that do not are caught."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

import irgrow as ig
from irgrow import passes
from irgrow.ir.edit import Edit
from irgrow.ir.errors import PromiseBroken, Refused
from irgrow.ir.lineage import Axes
from irgrow.ir.morphism import Changes, FirstOrder, Promise, SameFunction
from irgrow.ir.network import Network, Unit
from irgrow.ir.units import UnitMap
from irgrow.passes import Pass, SplitUnit
from irgrow.testing import (
    GrowthMachine,
    assert_promise,
    inputs_for,
    largest_change,
    networks,
    places,
    random_network,
    seeded_networks,
)

# The second kind has what passes on single edges need: no shared weights, no norms.
PLAIN = {"kinds": ("dense", "sparse", "loop", "skip"), "norms": (), "ties": False, "images": False, "maxima": False}
NETWORKS = st.one_of(
    seeded_networks(steps=3, widest=4),
    seeded_networks(steps=2, widest=4, **PLAIN),
    seeded_networks(steps=2, widest=4, frozen=True),
    networks(steps=3, widest=4),
)

FEWER = settings(max_examples=max(1, settings.default.max_examples * 2 // 5))


@pytest.mark.parametrize("kind", passes.list().values(), ids=passes.list())
@FEWER
@given(network=NETWORKS, data=st.data())
def test_every_pass_keeps_its_promise(kind: type[Pass], network: Network, data: st.DataObject) -> None:
    found = places(network, [kind], most=12)
    if found:
        assert_promise(data.draw(st.sampled_from(found)), network)


@pytest.mark.parametrize("kind", passes.list().values(), ids=passes.list())
def test_every_pass_has_places(kind: type[Pass]) -> None:
    """The random networks have places for every pass, so that the test above tests it."""
    seeds = range(60)
    drawn = (random_network(s, **options) for options in ({}, PLAIN, {"frozen": True}) for s in seeds)
    assert any(places(network, [kind], most=1) for network in drawn)


def a_pass_that_keeps_the_function(network: Network, draw: np.random.Generator) -> Pass:
    """Some pass at some place, all kinds of passes equally likely."""
    kinds = list(passes.list().values())
    for n in draw.permutation(len(kinds)):
        found = places(network, [kinds[n]], most=8)
        for i in draw.permutation(len(found)):
            if isinstance(found[i].promise(network), SameFunction):
                return found[i]
    raise AssertionError("no pass that keeps the function")  # FreezeEntries does, everywhere


def grown_at_random(number: int) -> tuple[Network, Network, list[Pass]]:
    """A random network, and what 1 to 8 passes that keep the function make of it (fewer beyond 300 neurons)."""
    first = network = random_network(number, dtypes=(torch.float64,), steps=3, widest=4, frozen=number % 4 == 0)
    draw, made = np.random.default_rng(number), []
    for _ in range(draw.integers(1, 9)):
        if network.counts.neurons > 300:
            break
        made.append(a_pass_that_keeps_the_function(network, draw))
        network = made[-1](network).after.verify()
    return first, network, made


def assert_unchanged(number: int) -> None:
    first, network, made = grown_at_random(number)
    change = largest_change(first, network, inputs_for(first))
    assert change <= 1e-12, f"seed {number}: {change:.1e} after {' >> '.join(map(str, made))}"


@pytest.mark.parametrize("number", range(20))
def test_random_networks_grown_by_passes_that_keep_the_function(number: int) -> None:
    assert_unchanged(number)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_ten_thousand_networks(block: int) -> None:
    """S1: 1 to 8 passes that keep the function, one after the other, in float64: relative change <= 1e-12."""
    for number in range(500 * block, 500 * (block + 1)):
        assert_unchanged(number)


TestGrowth = GrowthMachine.TestCase
TestGrowth.settings = settings(
    max_examples=max(1, settings.default.max_examples // 5),
    stateful_step_count=min(6, settings.default.stateful_step_count),
)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(4))
def test_two_thousand_random_runs(shard: int) -> None:
    """S2: the state machine, 2,000 runs of up to 6 passes, each of which must keep all that it owes."""

    @seed(shard)
    class Machine(GrowthMachine):
        pass

    how = settings(max_examples=500, stateful_step_count=6, derandomize=False, database=None)
    run_state_machine_as_test(Machine, settings=how)


# ---- passes that break something: each must be caught -----------------------------------------------------------


@dataclass(frozen=True)
class Broken(Pass):
    """Splits a unit, wrongly in one way."""

    unit: Unit

    @classmethod
    def places(cls, network: Network) -> Iterator[Pass]:
        return (cls(p.unit) for p in SplitUnit.places(network))

    def requires(self, network: Network) -> None:
        SplitUnit(self.unit).requires(network)

    def rewrite(self, edit: Edit) -> None:
        SplitUnit(self.unit).rewrite(edit)


@dataclass(frozen=True)
class SharesThatDoNotSumToOne(Broken):
    def rewrite(self, edit: Edit) -> None:
        at, units = edit.before.index(self.unit), edit.groups[self.unit.group].units
        share = np.ones(units + 1)
        share[at : at + 2] = 0.5, 0.51
        edit.rewire({self.unit.group: UnitMap(np.insert(np.arange(units), at, at), share)})


@dataclass(frozen=True)
class GradientsThatLie(Broken):
    """Says that the gradient of a copied row is the old one; it is half of it."""

    def rewrite(self, edit: Edit) -> None:
        super().rewrite(edit)
        for name, gathers in edit._gathers.items():
            edit._gathers[name] = tuple(
                replace(g, gradient=(None,) * len(g.gradient)) if isinstance(g, Axes) else g for g in gathers
            )


@dataclass(frozen=True)
class ValuesThatLie(Broken):
    """Says that the halved outgoing weights come from nowhere."""

    def rewrite(self, edit: Edit) -> None:
        super().rewrite(edit)
        for bundle in edit.before.leaving(self.unit.group):
            edit._gathers[bundle.tensor] = ()


@dataclass(frozen=True)
class AWrongRow(Broken):
    """Says that rows come from other rows than they do: right on these weights, wrong on others."""

    def rewrite(self, edit: Edit) -> None:
        super().rewrite(edit)
        name = edit.before.entering(self.unit.group)[0].tensor
        (g,) = edit._gathers[name]
        assert isinstance(g, Axes) and g.index[0] is not None
        edit._gathers[name] = (replace(g, index=(g.index[0].flip(0), *g.index[1:])),)


@dataclass(frozen=True)
class ChangesTheOldNetwork(Broken):
    def rewrite(self, edit: Edit) -> None:
        super().rewrite(edit)
        next(iter(edit.before.bundles.values())).weight.view(-1)[0] += 1


@dataclass(frozen=True)
class DrawsWithoutASeed(Broken):
    def promise(self, network: Network) -> Promise:
        return Changes("at random")

    def rewrite(self, edit: Edit) -> None:
        name = next(iter(edit.bundles.values())).tensor
        edit.write(name, torch.rand_like(edit.tensor(name)))


@dataclass(frozen=True)
class ReadsWeights(Broken):
    """Writes twice the weights as if they were new numbers: right here, wrong on other weights."""

    def promise(self, network: Network) -> Promise:
        return Changes("twice the weights")

    def rewrite(self, edit: Edit) -> None:
        name = edit.before.entering(self.unit.group)[0].tensor
        edit.write(name, 2 * edit.tensor(name))


@dataclass(frozen=True)
class NotFirstOrder(Broken):
    """Promises a change that vanishes with the scale; half of it stays."""

    def promise(self, network: Network) -> Promise:
        return FirstOrder()

    def rewrite(self, edit: Edit) -> None:
        name = edit.before.leaving(self.unit.group)[0].tensor
        edit._gather(name, edit.tensor(name), replace(edit._gathers[name][0], value=(torch.full((10,), 0.5), None)))


@dataclass(frozen=True)
class ABrokenNetwork(Broken):
    def rewrite(self, edit: Edit) -> None:
        super().rewrite(edit)
        group = edit.groups[self.unit.group]
        edit.groups[group.name] = replace(group, serials=group.serials[:1].repeat(group.units))


CAUGHT = {
    SharesThatDoNotSumToOne: (PromiseBroken, r"outputs that change by .*, expected at most 1e-12 \(relative\)"),
    GradientsThatLie: (AssertionError, r"the gradient of 'weight.input_hidden' is off by"),
    ValuesThatLie: (AssertionError, r"with other weights|on other weights"),
    AWrongRow: (AssertionError, r"on other weights its lineage does not give what the pass gives|the gradient of"),
    ChangesTheOldNetwork: (AssertionError, r"the network before was changed in place"),
    DrawsWithoutASeed: (AssertionError, r"applied twice to one network, it gives two different ones"),
    ReadsWeights: (AssertionError, r"does it depend on weights \(reads_weights\)"),
    NotFirstOrder: (PromiseBroken, r"outputs that change by .* at scale 0"),
    ABrokenNetwork: (ig.IrgrowError, r"found serial \d+ of unit \d+, which is taken"),
}


@pytest.mark.parametrize("kind", CAUGHT, ids=lambda kind: kind.__name__)
def test_a_broken_pass_is_caught(kind: type[Broken]) -> None:
    network = ig.mlp([4, 5, 10], activation="tanh", dtype=torch.float64)
    error, text = CAUGHT[kind]
    assert_promise(SplitUnit(network.unit("hidden", 1)), network)  # the sound one passes
    with pytest.raises(error, match=text):
        assert_promise(kind(network.unit("hidden", 1)), network)


def test_a_wrong_text_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    network = ig.mlp([4, 5, 3], dtype=torch.float64)
    pass_ = SplitUnit(network.unit("hidden", 1), share=0.25)
    monkeypatch.setattr(SplitUnit, "__str__", lambda self: f"SplitUnit(unit='{self.unit}')")
    with pytest.raises(AssertionError, match="its text reads back as"):
        assert_promise(pass_, network)


def test_a_refusal_is_passed_on() -> None:
    network = ig.mlp([4, 5, 3])
    with pytest.raises(Refused, match="output"):
        assert_promise(SplitUnit(network.unit("output", 0)), network)
