"""Gathers in all their forms agree, compose, and carry gradients and optimizer state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import irgrow as ig
from irgrow.ir.errors import StaleMorphism
from irgrow.ir.lineage import Axes, Flat, Gather, Lineage, Through
from irgrow.ir.morphism import Changes, FirstOrder, SameFunction
from irgrow.ir.network import Network
from irgrow.passes import AddLayer, AddUnits, InsertNeuron, SplitUnit
from irgrow.testing import inputs_for, network_with_other_weights, places, random_network, seeded_networks
from irgrow.testing.promises import assert_close

F64 = torch.float64


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        a, b = (torch.ones_like(y) if x is None and y is not None else x for x, y in ((a, b), (b, a)))
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=1e-15, atol=0, equal_nan=True).all())


@st.composite
def factors(draw, size: int) -> Tensor | None:
    if not draw(st.booleans()):
        return None
    values = st.sampled_from([1.0, 0.5, -2.0, float("nan")])
    return torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=F64)


@st.composite
def axes(draw, old: tuple[int, ...] | None = None) -> Axes:
    """Any gather by axes, with or without indices, missing entries and factors."""
    old = draw(st.lists(st.integers(1, 4), max_size=3).map(tuple)) if old is None else old
    shape, index, value, gradient = [], [], [], []
    for size in old:
        if draw(st.booleans()):
            new = draw(st.lists(st.integers(-1, size - 1), min_size=1, max_size=5))
            index.append(torch.tensor(new))
            shape.append(len(new))
        else:
            index.append(None)
            shape.append(size)
        value.append(draw(factors(shape[-1]).map(lambda f: None if f is None else f.nan_to_num(3.0))))
        gradient.append(draw(factors(shape[-1])))
    return Axes("w", old, tuple(shape), tuple(index), tuple(value), tuple(gradient))


def some(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def assert_equal_gathers(a: Gather, b: Gather) -> None:
    old = some(a.old_shape)
    assert (a.source, tuple(a.old_shape), tuple(a.shape)) == (b.source, tuple(b.old_shape), tuple(b.shape))
    assert same(a.take(old), b.take(old))
    assert same(a.pick(old), b.pick(old))
    assert same(a.factor(), b.factor())
    assert same(a.covers().double(), b.covers().double())


@given(axes())
def test_axes_by_definition(gather: Axes) -> None:
    old = some(gather.old_shape)
    wanted, factor = torch.zeros(gather.shape, dtype=F64), torch.full(gather.shape, torch.nan, dtype=F64)
    for at in np.ndindex(*gather.shape):
        came = [int(i[n]) if i is not None else n for i, n in zip(gather.index, at, strict=True)]
        if min(came, default=0) < 0:
            continue
        wanted[at], factor[at] = old[tuple(came)], 1.0
        for n, v, f in zip(at, gather.value, gather.gradient, strict=True):
            wanted[at] *= 1.0 if v is None else v[n]
            factor[at] *= 1.0 if f is None else f[n]
    assert same(gather.take(old), wanted)
    assert same(gather.factor(), factor)


@given(axes())
def test_axes_are_the_flat_gather_they_say(gather: Axes) -> None:
    assert_equal_gathers(gather, gather.flat())


@given(st.data())
def test_gathers_compose_in_every_form(data: st.DataObject) -> None:
    first = data.draw(axes())
    second = data.draw(axes(first.shape))
    old = some(first.old_shape)
    both = first.then(second)
    assert isinstance(both, Axes) and both.source == "w"
    assert same(both.take(old), second.take(first.take(old)))
    for form in (first.flat().then(second), first.then(second.flat()), first.flat().then(second.flat())):
        assert_equal_gathers(form, both)


@given(axes())
def test_nothing_before_or_after_changes_nothing(gather: Axes) -> None:
    before, after = (Axes.same("v", torch.zeros(shape)) for shape in (gather.old_shape, gather.shape))
    assert gather.then(after) is gather
    first = before.then(gather)
    assert first.source == "v"
    assert same(first.take(some(gather.old_shape)), gather.take(some(gather.old_shape)))


def test_a_gather_can_be_differentiated() -> None:
    gather = Axes(
        "w", (2, 3), (3, 3), (torch.tensor([1, -1, 0]), None), (torch.tensor([0.5, 1, 1]), None), (None, None)
    )
    w = some((2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(gather.take, (w,))
    assert torch.autograd.gradcheck(gather.flat().take, (w,))


CONVOLUTIONS = [
    ((2, 4, 3), (3,), ig.Conv2d(3, padding=1)),
    ((4, 5, 4), (2,), ig.Conv2d((3, 2), (2, 1), (1, 0), (1, 2), channel_groups=2)),
    ((2, 3, 3), (4,), ig.Conv2d(2, channel_groups=2)),
]


@pytest.mark.parametrize(("source", "units", "conv"), CONVOLUTIONS)
@pytest.mark.parametrize("form", ["dense", "local", "sparse"])
@pytest.mark.parametrize("share", [False, True])
def test_through_is_the_same_weight_on_every_edge(source, units, conv, form, share) -> None:
    target = (*units, *conv.output(source))
    local = ig.Local2d(conv.kernel, conv.stride, conv.padding, conv.dilation, conv.channel_groups)
    pattern = {"dense": ig.Dense(), "local": local, "sparse": conv.to_sparse(source, target)}[form]
    if form == "sparse":
        pattern = ig.Sparse(pattern.source, pattern.target)  # no ties
    old, new = conv.weight_shape(source, target), pattern.weight_shape(source, target)
    gather = Through("w", old, new, conv, pattern, (source, target), (source, target), share)
    weight = some(old)

    def table(pattern: ig.Pattern, weight: Tensor) -> Tensor:
        dense = torch.zeros(int(np.prod(target)), int(np.prod(source)), dtype=F64)
        s, t, w = (torch.from_numpy(a.astype(np.int64)) for a in pattern.all_edges(source, target))
        dense[t, s] = weight.flatten()[w]
        return dense

    assert same(table(pattern, gather.take(weight)), table(conv, weight))
    assert_equal_gathers(gather, gather.flat())
    factor, ties = gather.factor(), table(conv, torch.bincount(
        torch.from_numpy(conv.all_edges(source, target)[2].astype(np.int64)), minlength=weight.numel()).double()
    )  # fmt: skip
    if share:
        assert same(table(pattern, factor.nan_to_num(0.0)), 1 / ties.where(ties > 0, torch.inf))
    else:
        assert bool((factor.isnan() | (factor == 1)).all())
    later = Axes(
        "w", new, new, (None,) * len(new), (torch.full(new[:1], 2.0),) + (None,) * (len(new) - 1), (None,) * len(new)
    )
    assert same(gather.then(later).take(weight), 2 * gather.take(weight))


def test_through_refuses_patterns_with_other_edges() -> None:
    shapes = (1, 3, 3), (1, 3, 3)
    conv = ig.Conv2d(3, padding=1)
    for other, text in ((ig.Sparse(np.array([0]), np.array([1])), "do not match"), (ig.Conv2d(1), "")):
        gather = Through("w", (1, 1, 3, 3), other.weight_shape(*shapes), conv, other, shapes, shapes)
        with pytest.raises(StaleMorphism, match=f"Through: found patterns .*{text}"):
            gather.take(torch.zeros(1, 1, 3, 3))


def test_a_lineage_sums_its_gathers_and_the_rest_is_fresh() -> None:
    half = Axes("a", (2,), (3,), (torch.tensor([0, 1, -1]),), (torch.tensor([0.5, 0.5, 1.0]),), (None,))
    more = Flat("b", (2,), (3,), torch.tensor([-1, 0, 1]))
    lineage = Lineage({"w": (half, more), "new": ()})
    old = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([10.0, 20.0])}
    assert lineage.gather(old, "w", torch.empty(3)).tolist() == [1, 12, 20]
    assert lineage.gather(old, "new", torch.empty(2)).tolist() == [0, 0]
    assert not lineage.unchanged("w") and not lineage.unchanged("new")
    assert Lineage({"a": (Axes.same("a", old["a"]),)}).unchanged("a")
    assert not Lineage({"b": (Axes.same("a", old["a"]),)}).unchanged("b")


def test_optimizer_state_follows_the_gradient_factor() -> None:
    nan = float("nan")
    first = Flat("a", (2,), (4,), torch.tensor([0, 1, 1, -1]), None, torch.tensor([1.0, 0.5, nan, 1.0]))
    second = Flat("b", (1,), (4,), torch.tensor([0, -1, 0, 0]), None, torch.tensor([3.0, 1.0, 2.0, nan]))
    lineage = Lineage({"w": (first, second)})
    m, v = (
        {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([8.0])},
        {"a": torch.tensor([1.0, 16.0]), "b": torch.tensor([9.0])},
    )
    (moment, square), known = lineage.carry([m, v], "w", [1, 2])
    assert moment.tolist() == [2, 2, 16, 0]  # the first defined factor decides; undefined and missing start fresh
    assert square.tolist() == [1, 4, 36, 0]
    assert known is not None and known.tolist() == [True, True, True, False]


# ---- lineages of networks ---------------------------------------------------------------------------------------


@given(seeded_networks(steps=3, widest=4), st.integers(0, 1000))
def test_composition_is_one_step_after_the_other(network: Network, seed: int) -> None:
    draw = np.random.default_rng(seed)
    other = current = network_with_other_weights(network).tensors()
    total = None
    for _ in range(3):
        found = places(network if total is None else total.after, [SplitUnit, AddUnits, AddLayer, InsertNeuron], most=5)
        if not found:
            return
        step = found[draw.integers(len(found))](network if total is None else total.after)
        current = step.tensors(current)
        total = step if total is None else total >> step
        assert_close(total.tensors(other), current, total.by, "composed, its lineage differs from its steps")
        for name, gathers in total.lineage.gathers.items():
            if len(gathers) == 1:
                g = gathers[0]
                assert same(g.take(some(g.old_shape)), g.flat().take(some(g.old_shape))), name


def test_promises_compose_to_the_weaker_one() -> None:
    same_, changes = SameFunction(), Changes("why")
    assert same_.then(same_) == same_
    assert same_.then(FirstOrder(2)) == FirstOrder(2) == FirstOrder(2).then(same_)
    assert FirstOrder(2).then(FirstOrder(3)) == FirstOrder(5)
    assert changes.then(same_) == same_.then(changes) == FirstOrder().then(changes) == changes


def test_a_morphism_of_another_network_does_not_follow() -> None:
    net = ig.mlp([3, 4, 2], dtype=F64)
    split = SplitUnit(net.unit("hidden", 0))(net)
    with pytest.raises(
        StaleMorphism, match=r"SplitUnit\(.*\) after SplitUnit\(.*\): found a morphism of another network"
    ):
        _ = split >> split


def test_a_morphism_carries_a_trained_network() -> None:
    net = random_network(3, dtypes=(F64,), images=False, norms=())
    step = places(net, [SplitUnit])[0](net)
    trained = network_with_other_weights(net)
    grown = step.after.with_tensors(step.tensors(trained.tensors())).verify()
    x = inputs_for(net)
    for a, b in zip(
        *([o] if isinstance(o, Tensor) else o for o in (ig.interpret(trained, *x), ig.interpret(grown, *x))),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_scale_multiplies_what_is_fresh() -> None:
    net = ig.mlp([3, 4, 2], dtype=F64)
    step = places(net, [AddUnits])[0](net)
    full, none = (step.tensors(net.tensors(), scale) for scale in (1.0, 0.0))
    assert torch.equal(full["weight.input_hidden"], step.after.tensors()["weight.input_hidden"])
    assert not none["weight.input_hidden"][4:].any()
    assert torch.equal(none["weight.input_hidden"][:4], net.tensors()["weight.input_hidden"])
