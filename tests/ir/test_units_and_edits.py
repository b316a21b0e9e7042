"""Unit maps and what they tie together, sites, and the transaction that rewrites a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import irgrow as ig
from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadName, BadShape, Refused, UnknownName
from irgrow.ir.lineage import Flat
from irgrow.ir.network import Network
from irgrow.ir.site import Site, slice_shape
from irgrow.ir.units import UnitMap, blocks, close, fits, new_start, with_new_units
from irgrow.passes import Pass
from irgrow.passes.exactness import refuse_max_targets, refuse_norm_across_units
from irgrow.testing import assert_promise, fingerprint, seeded_networks

F64 = torch.float64


def units(*index: int, share: list[float] | None = None) -> UnitMap:
    return UnitMap(np.array(index), None if share is None else np.array(share))


def residual() -> Network:
    """x -> a; s = a + conv(a); s -> d (depthwise times 2) -> p (pool); p and e side by side in c -> y."""
    b = ig.Builder(dtype=F64)
    b.input("x", (2, 4, 4))
    b.group("a", (3, 4, 4), activation="tanh", bias=True)
    b.group("s", (3, 4, 4), norm="batch")
    b.group("d", (6, 4, 4), activation="relu")
    b.group("p", (6, 2, 2), aggregation="max")
    b.group("e", (2, 2, 2))
    b.group("c", (8, 2, 2))
    b.output("y", 2, bias=True)
    b.connect("x", "a", ig.Conv2d(3, padding=1))
    b.connect("a", "s", ig.Identity(), name="skip")
    b.connect("a", "s", ig.Conv2d(3, padding=1), name="block")
    b.connect("s", "d", ig.Conv2d(1, channel_groups=3))
    b.connect("d", "p", ig.Pool2d(2, 2))
    b.connect("x", "e", ig.Conv2d(2, 2))
    b.connect("p", "c", ig.Identity())
    b.connect("e", "c", ig.Identity(6))
    b.connect("c", "y")
    return b.build()


def grouped(norm_groups: int = 1) -> Network:
    """x -> a (4 channels) -> g (6, two channel groups) -> y."""
    b = ig.Builder(dtype=F64)
    b.input("x", (2, 3, 3))
    b.group("a", (4, 3, 3), norm="group" if norm_groups > 1 else None, norm_groups=norm_groups)
    b.group("g", (6, 3, 3))
    b.output("y", 2)
    b.connect("x", "a", ig.Conv2d(1))
    b.connect("a", "g", ig.Conv2d(3, padding=1, channel_groups=2))
    b.connect("g", "y")
    return b.build()


# ---- unit maps --------------------------------------------------------------------------------------------------


def test_the_first_copy_keeps_the_serial() -> None:
    serials, following = units(2, 0, 0, -1, 2).serials(np.array([10, 14, 18]), 100, 4)
    assert serials.tolist() == [18, 10, 100, 104, 108] and following == 112


def test_a_map_of_units_is_a_map_of_neurons() -> None:
    neurons = units(1, -1, 0, share=[0.5, 1, 0.25]).neurons(2)
    assert neurons.index.tolist() == [2, 3, -1, -1, 0, 1]
    assert neurons.share is not None and neurons.share.tolist() == [0.5, 0.5, 1, 1, 0.25, 0.25]
    assert units(0, 1) == units(0, 1, share=[1, 1]) != units(0, 1, share=[1, 0.5])


def test_a_change_reaches_every_group_that_is_tied() -> None:
    maps = close(residual(), {"a": units(0, 0, 1, 2, share=[0.25, 0.75, 1, 1])})
    assert list(maps) == ["a", "s", "d", "p", "c"]
    assert maps["s"] == maps["a"]
    twice = units(0, 1, 0, 1, 2, 3, 4, 5, share=[0.25, 0.25, 0.75, 0.75, 1, 1, 1, 1])
    assert maps["d"] == maps["p"] == twice
    assert maps["c"].index.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]


def test_a_change_of_one_range_leaves_the_other_alone() -> None:
    net = residual()
    assert set(close(net, {"e": units(0, 1, -1)})) == {"e", "c"}
    maps = close(net, {"c": units(0, 1, 2, 3, 4, 5, 6, 7, -1)})
    assert set(maps) == {"c", "e"} and maps["e"] == units(0, 1, -1)
    backwards = close(net, {"c": units(0, 1, 0, 1, 2, 3, 4, 5, 6, 7)})
    assert set(backwards) == {"c", "p", "d", "s", "a"} and backwards["a"] == units(0, 0, 1, 2)
    assert new_start(maps["c"], 6, 8) == 6 and new_start(backwards["c"], 6, 8) == 8


REFUSED = {
    "half a block of a depthwise convolution": (
        {"d": units(0, 1, 2, 3, 4, 5, -1)},
        r"group 'd': found bundle 's_d' has 2 output channels for each input channel, expected whole blocks of 2",
    ),
    "two changes of one range": (
        {"a": units(0, 1, 2, -1), "s": units(0, 1, -1, 2)},
        r"groups '\w+' and '\w+' are tied by bundle '\w+' and would change differently, expected one change that fits",
    ),
    "nothing left of a range": ({"c": units(0, 1, 2, 3, 4, 5)}, r"units 6 to 7: found none of them would be left"),
    "a range torn apart": (
        {"c": units(0, 1, 6, 2, 3, 4, 5, 7)},
        r"units 0 to 5: found other units between them afterwards, expected one unbroken range",
    ),
    "an output": ({"y": units(0, 1, -1)}, r"group 'y' would change with it, and is an output"),
    "an input": ({"x": units(0)}, r"group 'x' would change with it, and is an input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_changes_that_contradict_are_refused(name: str) -> None:
    seed, text = REFUSED[name]
    with pytest.raises(Refused, match=text):
        fits(residual(), seed)
    with pytest.raises(Refused, match=text):
        Edit(residual()).rewire(seed)


def test_a_grouped_convolution_grows_every_group() -> None:
    net = grouped()
    assert blocks(net, {"a": None}) == 2
    assert with_new_units(net, "a", 2) == units(0, 1, -1, 2, 3, -1)
    assert with_new_units(net, "g", 2) == units(0, 1, 2, -1, 3, 4, 5, -1)
    with pytest.raises(Refused, match=r"adding units to group 'a': found 3 new units, expected a multiple of 2"):
        with_new_units(net, "a", 3)
    for bad, text in (
        (units(0, 1, 2, 3, -1), "found 5 input and 6 output channels, expected multiples of its 2 channel groups"),
        (units(0, 2, 1, 3), "found units that would change their channel group, expected every group to grow equally"),
    ):
        for change in (fits, lambda n, s: Edit(n).rewire(s)):
            with pytest.raises(Refused, match=f"bundle 'a_g': {text}"):
                change(net, {"a": bad})


def test_a_group_norm_grows_every_range() -> None:
    net = grouped(norm_groups=4)
    assert blocks(net, {"a": None}) == 4
    assert with_new_units(net, "a", 4) == units(0, -1, 1, -1, 2, -1, 3, -1)


# ---- sites ------------------------------------------------------------------------------------------------------


def test_sites_of_a_residual_network() -> None:
    net = residual()
    sites = {site.name: site for site in Site.all(net)}
    assert list(sites) == ["a", "e"]
    assert sites["a"].groups == ("a", "s", "d", "p", "c")
    assert sites["a"].entering == ("x_a", "block") and sites["a"].leaving == ("block", "c_y")
    assert sites["e"] == Site("e", ("e", "c"), ("x_e",), ("c_y",))
    assert Site.of(net, "c").groups == ("e", "c")  # new units of c stand at its end
    maps = fits(net, {"c": units(0, 1, 0, 1, 2, 3, 4, 5, 6, 7)})
    assert Site.around(net, "c", maps) == Site("c", sites["a"].groups, sites["a"].entering, sites["a"].leaving)


def test_what_is_no_site() -> None:
    net = ig.mlp([3, 4, 2])
    with pytest.raises(UnknownName, match=r"site 'hiden': expected one of hidden"):
        Site.of(net, "hiden")
    with pytest.raises(Refused, match=r"site 'output': found it holds 'output', expected no input or output"):
        Site.of(net, "output")
    b = ig.Builder()
    b.input("x", 2), b.group("lost", 2), b.group("end", 2), b.output("y", 1)
    b.connect("x", "end"), b.connect("x", "y")
    with pytest.raises(Refused, match=r"site 'end': found nothing leaves it, expected bundles on both sides"):
        Site.of(b.build(), "end")
    with pytest.raises(Refused, match=r"site 'lost': found nothing enters it"):
        Site.of(b.build(), "lost")


def test_shapes_of_new_weights() -> None:
    net = residual()
    assert slice_shape(net, "x_a", entering=2) == (2, 2, 3, 3)
    assert slice_shape(net, "block", leaving=2) == (3, 2, 3, 3)
    assert slice_shape(net, "c_y", leaving=2) == (2, 2 * 4)
    assert slice_shape(grouped(), "a_g", leaving=2) == (6, 1, 3, 3)
    b = ig.Builder()
    b.input("x", 3), b.group("h", 2), b.output("y", 1)
    b.connect("x", "h", ig.Sparse(np.array([0, 2]), np.array([0, 1]))), b.connect("h", "y")
    assert slice_shape(b.build(), "x_h", entering=5) == (5, 3)


# ---- rewiring: laws on random networks --------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies(Pass):
    """Every unit of a group has one to three copies that share what leaves it, in any proportion."""

    group: str
    seed: int

    @classmethod
    def places(cls, network: Network) -> Iterator[Pass]:
        for name in filter(network.is_hidden, network.groups):
            for seed in range(3):
                candidate = cls(name, seed)
                try:
                    candidate.requires(network)
                except Refused:
                    continue
                yield candidate

    def requires(self, network: Network) -> None:
        site = Site.around(network, self.group, fits(network, {self.group: self._map(network)}))
        refuse_norm_across_units("Copies", network, site)
        refuse_max_targets("Copies", network, site)

    def rewrite(self, edit: Edit) -> None:
        edit.rewire({self.group: self._map(edit.before)})

    def _map(self, network: Network) -> UnitMap:
        draw = np.random.default_rng(self.seed)
        count = network.groups[self.group].units
        times = np.ones(count, int) * 2 if self.seed == 0 else draw.integers(1, 4, count)  # 0: fits channel groups
        index = np.repeat(np.arange(count), times)
        share = draw.uniform(-1, 2, index.size)
        total = np.bincount(index, share, count)
        last = np.r_[index[1:] != index[:-1], True]
        share[last] += 1 - total
        return UnitMap(index, share)


@dataclass(frozen=True)
class Permute(Copies):
    """The units of a group stand in another order: exact under any norm but a group norm."""

    def requires(self, network: Network) -> None:
        for name in fits(network, {self.group: self._map(network)}):
            norm = network.groups[name].norm
            if norm is not None and norm.kind == "group":
                raise Refused("Permute", "a group norm")

    def _map(self, network: Network) -> UnitMap:
        return UnitMap(np.random.default_rng(self.seed).permutation(network.groups[self.group].units))


@pytest.mark.parametrize("kind", [Copies, Permute])
@given(network=seeded_networks(steps=3, widest=4, dtypes=(F64,)), data=st.data())
def test_rewiring_keeps_the_function(kind: type[Copies], network: Network, data: st.DataObject) -> None:
    found = list(kind.places(network))
    if found:
        assert_promise(data.draw(st.sampled_from(found)), network)


def test_ties_that_stay_together_keep_their_gradient() -> None:
    b = ig.Builder(dtype=F64)
    b.input("x", 3), b.group("h", 3, activation="tanh"), b.output("y", 1)
    b.connect("x", "h", ig.Sparse(np.array([0, 1, 2, 0]), np.array([0, 0, 1, 2]), np.array([0, 0, 1, 1])))
    b.connect("h", "y")
    net = b.build()
    edit = Edit(net)
    edit.rewire({"h": units(0, 1, 1, 2, share=[1, 0.5, 0.5, 1])})  # copies one of two edges with weight 1
    (gather,) = edit.gathers("weight.x_h")
    factor = gather.factor()
    assert factor is not None
    weight = edit.bundles["x_h"].pattern.weight_index
    assert weight is not None and weight[0] == weight[1] and factor[weight[0]] == 1
    assert factor.isnan().sum() == factor.numel() - 1


# ---- edits of edges, groups and bundles -----------------------------------------------------------------------


def edge_list(network: Network) -> list[tuple[int, int, float]]:
    return sorted(network.edges())


@given(seeded_networks(steps=3, widest=4, dtypes=(F64,)), st.integers(0, 1000))
def test_any_pattern_minus_some_edges(network: Network, seed: int) -> None:
    draw = np.random.default_rng(seed)
    was = fingerprint(network)
    edit, wanted = Edit(network), []
    for name, bundle in network.bundles.items():
        keep = draw.random(bundle.pattern.count(*network.shapes(bundle))) < 0.7
        kept, at = edge_list_of(network, name), np.flatnonzero(keep)
        wanted += [kept[i] for i in at]
        edit.keep_edges(name, keep)
    after, lineage = edit.finish()
    assert edge_list(after) == sorted(wanted)
    assert fingerprint(network) == was
    for name, tensor in after.tensors().items():
        assert torch.equal(lineage.gather(network.tensors(), name, tensor), tensor)


def edge_list_of(network: Network, name: str) -> list[tuple[int, int, float]]:
    one = Network(network.groups, {name: network.bundles[name]}, network.inputs, network.outputs, network.next_serial)
    return list(one.edges())


@given(seeded_networks(steps=2, widest=4, dtypes=(F64,)))
def test_added_edges_stand_behind_the_old_ones(network: Network) -> None:
    name = next(iter(network.bundles))
    old = edge_list_of(network, name)
    source, target = (network.groups[g].neurons for g in (network.bundles[name].source, network.bundles[name].target))
    ids = network.ids(network.bundles[name].source), network.ids(network.bundles[name].target)
    edit = Edit(network)
    edit.tag_edges(name, "age", np.arange(len(old)))
    edit.add_edges(name, [source - 1], [target - 1], torch.tensor([7.0]), tags={"age": [99]})
    edit.add_edges(name, [0], [0], torch.tensor([8.0]))
    after, lineage = edit.finish()
    assert edge_list_of(after, name) == [*old, (ids[0][-1], ids[1][-1], 7.0), (ids[0][0], ids[1][0], 8.0)]
    pattern = after.bundles[name].pattern
    assert isinstance(pattern, ig.Sparse) and pattern.tags["age"].tolist() == [*range(len(old)), 99, 0]
    gathered = lineage.gather(network.tensors(), f"weight.{name}", after.bundles[name].weight)
    assert gathered[-2:].tolist() == [0, 0] and torch.equal(gathered[:-2], after.bundles[name].weight[:-2])


def test_edges_may_come_from_another_tensor() -> None:
    net = ig.mlp([2, 3, 1], bias=False, dtype=F64)
    edit = Edit(net)
    moved = Flat("weight.hidden_output", (1, 3), (1,), torch.tensor([2]))
    edit.add_edges("input_hidden", [0], [1], torch.tensor([5.0]), gathers=[moved])
    after, lineage = edit.finish()
    gathered = lineage.gather(net.tensors(), "weight.input_hidden", after.bundles["input_hidden"].weight)
    assert gathered[6] == net.bundles["hidden_output"].weight[0, 2]
    assert after.bundles["input_hidden"].weight[6] == 5


def test_a_bundle_without_edges_is_dropped() -> None:
    edit = Edit(ig.mlp([2, 3, 1]))
    edit.keep_edges("input_hidden", np.zeros(6, bool))
    after, lineage = edit.finish()
    assert list(after.bundles) == ["hidden_output"] and "weight.input_hidden" not in lineage.gathers


def test_names_and_shapes_are_checked() -> None:
    net = ig.mlp([2, 3, 1])
    edit = Edit(net)
    assert edit.free_name("hidden") == "hidden_2" and edit.free_name("new") == "new"
    with pytest.raises(
        BadName, match=r"group 'hidden': found a group of that name, expected a new name; see Edit.free"
    ):
        edit.add_group("hidden", (3,))
    with pytest.raises(BadName, match=r"bundle 'input_hidden': found a bundle of that name"):
        edit.add_bundle("input_hidden", "input", "hidden", ig.Dense(), torch.zeros(3, 2))
    with pytest.raises(BadName, match=r"group 'hidden': found bundles \['input_hidden', 'hidden_output'\] at it"):
        edit.remove_group("hidden")
    with pytest.raises(BadShape, match=r"tensor 'bias.hidden': found \(2,\), expected \(3,\)"):
        edit.write("bias.hidden", torch.zeros(2))


def test_groups_and_bundles_come_and_go() -> None:
    net = ig.mlp([2, 3, 1])
    edit = Edit(net)
    edit.add_group("twin", (3,), activation="relu")
    edit.redirect("hidden_output", source="twin")
    edit.add_bundle("hidden_twin", "hidden", "twin", ig.Identity(), torch.ones(()), trainable=False)
    after, lineage = edit.finish()
    after.verify()
    assert after.next_serial == net.next_serial + 3 and after.groups["twin"].serials.tolist() == [6, 7, 8]
    assert lineage.unchanged("weight.hidden_output") and lineage.gathers["weight.hidden_twin"] == ()
    edit = Edit(after)
    bundle, gathers = edit.remove_bundle("hidden_twin")
    assert bundle.name == "hidden_twin" and len(gathers) == 1
    edit.redirect("hidden_output", source="hidden")
    edit.remove_group("twin")
    back, _ = edit.finish()
    assert list(back.groups) == list(net.groups) and back.tensors().keys() == net.tensors().keys()


def test_an_edit_that_fails_leaves_the_network_alone() -> None:
    net = residual()
    was = fingerprint(net)
    edit = Edit(net)
    edit.write("bias.a", torch.ones(3))
    with pytest.raises(Refused):
        edit.rewire({"c": units(0)})
    assert fingerprint(net) == was
