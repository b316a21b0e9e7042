"""CNN -> eFCN and eLCN: the same outputs, gradients that sum to the convolution's, nothing dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import LIMIT, assert_chain, difference, obey, residual, shake, zoo

import irgrow as ig
from irgrow.ir.errors import BadData, BadShape, PromiseBroken, Refused, UnknownName
from irgrow.ir.interpreter import interpret
from irgrow.ir.lineage import Through
from irgrow.ir.morphism import Morphism, SameFunction
from irgrow.ir.network import Network
from irgrow.passes.embed import Densify, EmbedConv, deviation, local_masks, masked
from irgrow.testing import assert_promise, gradients, inputs_for, networks, rewrites

F64 = torch.float64
FORMS = [EmbedConv(to, flatten=flatten) for to in ("dense", "local") for flatten in (True, False)]

CONVOLUTIONS = {
    "3x3": ((2, 5, 5), 3, ig.Conv2d((3, 3))),
    "same padding": ((2, 5, 4), 3, ig.Conv2d((3, 3), padding=(1, 1))),
    "rectangular, stride 2": ((3, 7, 4), 2, ig.Conv2d((3, 2), (2, 1), (1, 0))),
    "stride beyond the kernel": ((2, 6, 7), 2, ig.Conv2d((2, 2), (3, 3))),
    "dilation 2": ((2, 7, 6), 2, ig.Conv2d((3, 2), (1, 2), (2, 1), (2, 2))),
    "padding beyond the image": ((1, 2, 2), 2, ig.Conv2d((3, 3), padding=(3, 2))),
    "channel groups": ((4, 5, 4), 6, ig.Conv2d((3, 3), (1, 1), (1, 1), channel_groups=2)),
    "depthwise": ((4, 4, 5), 4, ig.Conv2d((3, 3), (2, 1), (1, 1), channel_groups=4)),
    "depthwise times 2": ((2, 4, 5), 4, ig.Conv2d((2, 2), channel_groups=2)),
    "1x1": ((3, 3, 2), 4, ig.Conv2d((1, 1))),
    "whole image": ((2, 3, 4), 5, ig.Conv2d((3, 4))),
    "local already": ((2, 5, 4), 3, ig.Local2d((3, 3), (1, 2), (1, 1))),
}


def one(image, channels, conv, *, norm="batch", pool=None, activation="tanh") -> Network:
    """input -> conv -> (pool) -> dense."""
    b = ig.Builder(seed=0, dtype=F64)
    b.input("x", image)
    shape = (channels, *conv.output(image))
    b.group("h", shape, activation=activation, bias=True, norm=norm, dropout=0.25)
    b.connect("x", "h", conv)
    last = "h"
    if pool:
        window, kind = pool
        b.group("p", (channels, *window.output(shape)), aggregation="max" if kind == "max" else "sum")
        weight = 1.0 if kind == "max" else 1 / (window.kernel[0] * window.kernel[1])
        b.connect("h", "p", window, weight, trainable=kind == "trained")
        last = "p"
    b.output("y", 3, bias=True)
    b.connect(last, "y")
    return shake(b.build())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_outputs_and_gradients_of_every_convolution(case: str, form: EmbedConv) -> None:
    network = one(*CONVOLUTIONS[case])
    if case == "local already" and form == EmbedConv("local", flatten=False):
        with pytest.raises(Refused, match="nothing to embed"):
            form(network)
        return
    morphism = obey(form, network)
    assert isinstance(morphism.promise, SameFunction)
    assert difference(network, morphism.after) <= 1e-12
    assert not any(type(b.pattern) is ig.Conv2d for b in morphism.after.bundles.values())


@pytest.mark.parametrize("kind", ["max", "mean", "trained"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    "window",
    [ig.Pool2d((2, 2), (2, 2)), ig.Pool2d((3, 2), (2, 1), (1, 1)), ig.Pool2d((2, 2), (1, 1), dilation=(2, 1))],
    ids=str,
)
def test_pooling_is_carried(window: ig.Pool2d, form: EmbedConv, kind: str) -> None:
    network = one((2, 6, 5), 3, ig.Conv2d((3, 3), padding=(1, 1)), pool=(window, kind), activation="relu")
    after = obey(form, network).after
    pooled = after.bundle("h_p")
    assert pooled.trainable == (kind == "trained")
    assert pooled.pattern.count(*after.shapes(pooled)) == window.count((3, 6, 5), after.groups["p"].shape[:1])
    assert pooled.weight.numel() == 1
    assert after.groups["p"].aggregation == network.groups["p"].aggregation


@pytest.mark.parametrize("name", zoo())
def test_at_every_place(name: str) -> None:
    network = zoo()[name]
    places = list(EmbedConv.places(network))
    images = any(type(b.pattern) is ig.Conv2d for b in network.bundles.values())
    assert len(places) == (4 if images else 0)
    for place in places:
        obey(place, network)


@given(networks(), st.data())
def test_random_networks(network: Network, data: st.DataObject) -> None:
    assert_promise(data.draw(rewrites(network, [EmbedConv])), network)


def test_a_unit_is_a_neuron_and_keeps_its_number() -> None:
    network = shake(ig.cnn((1, 4, 5), [3], 2, norm="batch", dtype=F64))
    after = EmbedConv()(network).after
    was, now = network.group("conv1"), after.group("conv1")
    assert was.shape == (3, 4, 5) and now.shape == (60,)
    assert np.array_equal(after.ids("conv1"), network.ids("conv1"))
    assert after.next_serial == network.next_serial
    assert after.group("input").shape == (1, 4, 5)
    for kind in ("bias", "scale", "shift", "mean", "variance"):
        old, new = network.tensors()[f"{kind}.conv1"], after.tensors()[f"{kind}.conv1"]
        assert torch.equal(new, old.repeat_interleave(20))
    assert now.dropout == was.dropout and now.norm.momentum == was.norm.momentum


def test_grown_neuron_by_neuron_afterwards() -> None:
    network = shake(ig.cnn((1, 4, 4), [2], 2, pool=None, dtype=F64))
    for to in ("dense", "local"):
        after = EmbedConv(to)(network).after
        split = ig.SplitUnit(after.unit("conv1", 7))(after).verify()
        assert split.after.group("conv1").units == 33
        whole = EmbedConv(to)(network) >> split
        assert difference(network, whole.after) <= 1e-12
        assert_chain(whole)


def test_some_groups_only() -> None:
    network = shake(ig.cnn((1, 6, 6), [3, 4], 2, dtype=F64))
    after = obey(EmbedConv(groups=("conv2", "pool2")), network).after
    assert after.group("conv1").shape == (3, 6, 6) and after.group("conv2").shape == (36,)
    assert isinstance(after.bundle("input_conv1").pattern, ig.Conv2d)
    assert isinstance(after.bundle("pool1_conv2").pattern, ig.Dense)
    assert obey(EmbedConv(groups=("pool1",)), network).after.group("pool1").shape == (27,)


def test_identity_bundles_between_flat_and_image_groups() -> None:
    network = shake(residual())
    both = obey(EmbedConv(), network).after
    assert both.bundle("stem_sum").pattern == ig.Identity()
    half = obey(EmbedConv(groups=("sum",)), network).after
    assert isinstance(half.bundle("stem_sum").pattern, ig.Sparse) and half.bundle("stem_sum").weight.shape == (1,)


def test_concatenation_of_images_stays_one() -> None:
    b = ig.Builder(seed=0, dtype=F64)
    b.input("x", (1, 3, 4))
    for name, width in (("left", 2), ("right", 3)):
        b.group(name, (width, 3, 4), activation="relu")
        b.connect("x", name, ig.Conv2d((3, 3), padding=(1, 1)))
    b.group("both", (5, 3, 4))
    b.connect("left", "both", ig.Identity())
    b.connect("right", "both", ig.Identity(2))
    b.output("y", (2, 3, 4), bias=True)
    b.connect("both", "y", ig.Conv2d((1, 1)))
    network = b.build()
    after = obey(EmbedConv(), network).after
    assert after.bundle("right_both").pattern == ig.Identity(24)
    assert after.group("y").shape == (2, 3, 4) and after.group("y").bias.shape == (2,)


def test_group_and_layer_norm_span_the_same_neurons() -> None:
    for kind, groups in (("layer", 1), ("group", 2)):
        b = ig.Builder(seed=0, dtype=F64)
        b.input("x", (1, 3, 4))
        b.group("h", (4, 3, 4), activation="tanh", norm=kind, norm_groups=groups)
        b.connect("x", "h", ig.Conv2d((3, 3), padding=(1, 1)))
        b.output("y", 2)
        b.connect("h", "y")
        obey(EmbedConv(), shake(b.build()))


# ---- lineage --------------------------------------------------------------------------------------------------


def test_the_lineage_of_an_embedded_weight_stores_two_patterns_and_two_shapes() -> None:
    network = ig.cnn((3, 16, 16), [8], 2, pool=None, dtype=F64)
    morphism = EmbedConv()(network)
    (gather,) = morphism.lineage.gathers["weight.input_conv1"]
    assert isinstance(gather, Through)
    assert not any(isinstance(v, (torch.Tensor, np.ndarray)) for v in vars(gather).values())


def test_gradient_factors_of_ties() -> None:
    network = one(*CONVOLUTIONS["rectangular, stride 2"])
    fresh, shared = EmbedConv()(network), EmbedConv(share_state=True)(network)
    ties = network.group("h").positions
    for morphism, wanted in ((fresh, None), (shared, 1 / ties)):
        for name in ("bias.h", "scale.h", "shift.h"):
            (gather,) = morphism.lineage.gathers[name]
            factor = gather.factor()
            assert (
                bool(factor.isnan().all()) if wanted is None else torch.equal(factor, torch.full_like(factor, wanted))
            )
        assert morphism.lineage.gathers["variance.h"][0].factor() is None
    (through,) = shared.lineage.gathers["weight.x_h"]
    used = through.factor()[through.covers()]
    ties = through.flat().index[through.flat().index >= 0].bincount()
    assert torch.allclose(used.reciprocal().unique(), ties.unique().double())


def test_a_weight_of_one_edge_keeps_its_optimizer_state() -> None:
    """Only a broken tie loses it: eLCN -> eFCN breaks none, nor does a kernel as large as the image."""
    lcn = EmbedConv("local", flatten=False)(one(*CONVOLUTIONS["dilation 2"], norm=None)).after
    for network in (lcn, one(*CONVOLUTIONS["whole image"])):
        morphism = EmbedConv(flatten=False)(network)
        (gather,) = morphism.lineage.gathers["weight.x_h"]
        assert torch.equal(~gather.factor().isnan(), gather.covers())
    x = inputs_for(lcn)
    moment = gradients(lcn, x)["weight.x_h"]
    morphism = EmbedConv(flatten=False)(lcn)
    (carried,), known = morphism.lineage.carry([{"weight.x_h": moment}], "weight.x_h", [1])
    now = gradients(morphism.after, x)["weight.x_h"]
    mask = local_masks(morphism)["weight.x_h"]
    assert torch.equal(known, mask)
    assert (carried - now * mask).abs().max() <= LIMIT


def test_lineage_applies_to_other_values() -> None:
    """Growing applies the lineage to the weights of that moment, not to those the pass saw."""
    network = one(*CONVOLUTIONS["dilation 2"])
    later = shake(network, 9)
    for form in FORMS:
        morphism = form(network)
        moved = morphism.after.with_tensors(morphism.tensors(later.tensors()))
        assert difference(later, moved) <= 1e-12


def test_a_wrong_embedding_is_caught() -> None:
    """The control: one local weight moved breaks the promise."""
    network = one(*CONVOLUTIONS["3x3"])
    morphism = EmbedConv()(network)
    weight = morphism.after.bundle("x_h").weight.clone()
    weight[3, 2] += 1e-9
    broken = morphism.after.with_tensors({"weight.x_h": weight})
    with pytest.raises(PromiseBroken, match=r"EmbedConv.*outputs that change by"):
        Morphism(network, broken, morphism.lineage, morphism.promise, morphism.by).verify()


# ---- masks and deviation --------------------------------------------------------------------------------------


def test_local_and_off_local_parts() -> None:
    network = shake(ig.cnn((2, 5, 6), [3], 2, pool=None, dtype=F64))
    morphism = EmbedConv()(network)
    masks = local_masks(morphism)
    assert set(masks) == {"weight.input_conv1"}
    mask = masks["weight.input_conv1"]
    conv = network.bundle("input_conv1")
    assert int(mask.sum()) == conv.pattern.count(*network.shapes(conv))
    assert torch.equal(morphism.after.bundle("input_conv1").weight != 0, mask)
    assert deviation(morphism.after, masks) == 0.0
    assert difference(network, masked(morphism.after, masks)) <= 1e-12

    moved = morphism.after.with_tensors({"weight.input_conv1": torch.where(mask, 3.0, 4.0).double()})
    off, all_ = 16 * int((~mask).sum()), 9 * int(mask.sum()) + 16 * int((~mask).sum())
    assert deviation(moved, masks) == pytest.approx((off / all_) ** 0.5)
    dense = float(moved.bundle("conv1_output").weight.square().sum())
    named = ["weight.input_conv1", "weight.conv1_output"]
    assert deviation(moved, masks, named) == pytest.approx((off / (all_ + dense)) ** 0.5)
    local, rest = masked(moved, masks), masked(moved, {n: ~m for n, m in masks.items()})
    x = inputs_for(moved)
    parts = [interpret(n, *x, tensors={"bias.conv1": torch.zeros(90)}) for n in (local, rest)]
    assert not torch.allclose(*parts)
    assert deviation(local, masks) == 0.0 and deviation(rest, masks) == 1.0


def test_masks_survive_a_later_pass() -> None:
    network = ig.cnn((1, 4, 4), [2], 2, pool=None, dtype=F64)
    embedded = EmbedConv()(network)
    split = ig.SplitUnit(embedded.after.unit("conv1", 3))(embedded.after)
    masks = local_masks(embedded >> split)
    mask = masks["weight.input_conv1"]
    assert mask.shape == (33, 16) and torch.equal(mask[3], mask[4])
    assert torch.equal(split.after.bundle("input_conv1").weight != 0, mask)


def test_masks_that_do_not_fit() -> None:
    after = EmbedConv()(ig.cnn((1, 4, 4), [2], 2, pool=None, dtype=F64)).after
    with pytest.raises(UnknownName, match="mask of 'weight.x': expected one of weight.input_conv1"):
        masked(after, {"weight.x": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(BadShape, match=r"mask of 'weight.input_conv1': found \(2, 2\), expected \(32, 16\)"):
        deviation(after, {"weight.input_conv1": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(BadData, match="leaves out 'weight.input_conv1'"):
        deviation(after, {"weight.input_conv1": torch.ones(32, 16, dtype=torch.bool)}, ["weight.conv1_output"])


# ---- one bundle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo())
def test_densify_at_every_place(name: str) -> None:
    network = zoo()[name]
    for place in Densify.places(network):
        obey(place, network)


def test_locality_goes_after_sharing() -> None:
    """CNN -> eLCN -> eFCN, in two steps; the second breaks no tie and keeps optimizer state."""
    network = one(*CONVOLUTIONS["rectangular, stride 2"])
    local = EmbedConv("local")(network)
    dense = Densify("x_h")(local.after)
    assert dense.after == EmbedConv()(network).after
    (gather,) = dense.lineage.gathers["weight.x_h"]
    assert torch.equal(~gather.factor().isnan(), gather.covers())
    whole = local >> dense
    assert torch.equal(local_masks(whole)["weight.x_h"], local_masks(EmbedConv()(network))["weight.x_h"])


def test_densify_refusals() -> None:
    cnn, irregular = zoo()["cnn"], zoo()["irregular"]
    with pytest.raises(Refused, match="Densify: bundle 'pool2_output': found a dense bundle"):
        Densify("pool2_output")(cnn)
    with pytest.raises(Refused, match="'conv1_pool1': found its target 'pool1' aggregates by max"):
        Densify("conv1_pool1")(cnn)
    with pytest.raises(UnknownName, match="bundle 'none'"):
        Densify("none")(cnn)
    tagged = next(b.name for b in irregular.bundles.values() if b.pattern.tags)
    with pytest.raises(Refused, match="found edges with tags primary"):
        Densify(tagged)(irregular)


# ---- refusals -------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    network = ig.cnn((1, 4, 4), [2], 2, dtype=F64)
    with pytest.raises(UnknownName, match="EmbedConv: to='fcn': expected one of dense, local"):
        EmbedConv("fcn")(network)
    with pytest.raises(UnknownName, match="group 'conv9': expected one of input, conv1"):
        EmbedConv(groups=("conv9",))(network)
    with pytest.raises(Refused, match="EmbedConv: group 'input': found an input or output, which keeps its shape"):
        EmbedConv(groups=("input",))(network)
    with pytest.raises(Refused, match="EmbedConv: found nothing to embed"):
        EmbedConv()(ig.mlp([3, 4, 2], dtype=F64))
    flat = EmbedConv()(network).after
    with pytest.raises(Refused, match="EmbedConv: group 'conv1': found a flat group"):
        EmbedConv(groups=("conv1",))(flat)


def test_a_trained_convolution_into_a_max_is_embedded_by_its_edges_only() -> None:
    b = ig.Builder(seed=0, dtype=F64)
    b.input("x", (1, 4, 4))
    b.group("h", (2, 3, 3), aggregation="max")
    b.connect("x", "h", ig.Conv2d((2, 2)))
    b.output("y", 2)
    b.connect("h", "y")
    network = b.build()
    with pytest.raises(Refused, match="'h' aggregates by max, where edges of weight 0 count.*use to='local'"):
        EmbedConv()(network)
    obey(EmbedConv("local"), network)
    assert [p.to for p in EmbedConv.places(network)] == ["local", "local"]


def test_a_convolution_in_a_loop_of_groups_is_embedded_by_its_edges_only() -> None:
    b = ig.Builder(seed=0, dtype=F64)
    b.input("x", (1, 1, 2))
    b.group("h", (1, 1, 3))
    b.connect("x", "h", ig.Sparse(np.array([0, 1]), np.array([0, 1])))
    b.group("k", (1, 1, 3))
    b.connect("h", "k", ig.Conv2d((1, 1)))
    b.connect("k", "h", ig.Sparse(np.array([1]), np.array([2])))
    b.output("y", 1)
    b.connect("h", "y")
    network = b.build()
    with pytest.raises(Refused, match="bundle 'h_k': found a loop of groups, where dense edges could close a cycle"):
        EmbedConv()(network)
    obey(EmbedConv("local"), network)
