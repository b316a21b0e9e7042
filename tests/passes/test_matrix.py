"""Every registered pass on every kind of layer: it keeps what it owes at every place, or has none and refuses.

A pass that is registered is tested here without another line. Where a pass has no place on a kind of layer,
`NOWHERE` says so, with the reason: a pass that quietly loses its places fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from laws import irregular, shake, zoo

import irgrow as ig
from irgrow import passes
from irgrow.ir.network import Network
from irgrow.passes import Freeze, FreezeEntries, Pass, SplitUnits
from irgrow.testing import assert_promise, places

F64 = torch.float64


def _images(
    pattern: ig.Pattern, shape: tuple[int, int, int], units: int = 4, channels: int = 2, **group: object
) -> Network:
    """x -> conv1 --pattern--> conv2 -> y (flattened into dense)."""
    b = ig.Builder(seed=3, dtype=F64)
    b.input("x", (channels, *shape[1:]))
    b.group("conv1", shape, activation="relu", bias=True)
    b.connect("x", "conv1", ig.Conv2d(1))
    b.group("conv2", (units, *pattern.output(shape)), **{"activation": "tanh", "bias": True} | group)  # type: ignore
    b.connect("conv1", "conv2", pattern)
    b.output("y", 2, bias=True)
    b.connect("conv2", "y")
    return b.build()


def _flat(aggregation: str = "sum", **group: object) -> Network:
    b = ig.Builder(seed=4, dtype=F64)
    b.input("x", 3)
    b.group("hidden", 4, **{"activation": "tanh", "bias": True} | group)  # type: ignore[arg-type]
    b.group("deeper", 3, activation="relu", aggregation=aggregation)
    b.output("y", 2, bias=True)
    b.connect("x", "hidden"), b.connect("hidden", "deeper"), b.connect("deeper", "y")
    return b.build()


def _tied() -> Network:
    b = ig.Builder(seed=5, dtype=F64)
    b.input("x", 3), b.group("hidden", 4, activation="silu", bias=True), b.output("y", 2)
    s, t = np.array([0, 1, 2, 0, 1]), np.array([0, 1, 2, 3, 3])
    b.connect("x", "hidden", ig.Sparse(s, t, np.array([0, 0, 1, 2, 1])))
    b.connect("hidden", "y", ig.Sparse(np.arange(4), np.array([0, 1, 0, 1]), np.array([0, 0, 1, 2])))
    return b.build()


def _two_loops() -> Network:
    b = ig.Builder(seed=6, dtype=F64)
    b.input("x", 3), b.group("left", 3, activation="tanh"), b.group("right", 2, activation="tanh", bias=True)
    b.output("y", 2)
    b.connect("x", "left"), b.connect("x", "right"), b.connect("left", "y"), b.connect("right", "y")
    b.connect("left", "right", ig.Sparse(np.array([0, 1]), np.array([0, 1])))
    b.connect("right", "left", ig.Sparse(np.array([0]), np.array([2])))
    return b.build()


def _several() -> Network:
    b = ig.Builder(seed=7, dtype=F64)
    b.input("a", 3), b.input("b", (2, 3, 2))
    b.group("from_a", 3, activation="relu", bias=True), b.group("both", 4, activation="tanh")
    b.output("y", 2, bias=True), b.output("z", 2)
    b.connect("a", "from_a"), b.connect("b", "both"), b.connect("from_a", "both")
    b.connect("both", "y"), b.connect("from_a", "z"), b.connect("both", "z")
    return b.build()


KINDS: dict[str, Callable[[], Network]] = {
    "dense": lambda: zoo()["dense"],
    "batch norm": lambda: zoo()["tanh"],
    "layer norm": lambda: _flat(norm="layer"),
    "group norm": lambda: _images(ig.Conv2d(3, 1, 1), (2, 4, 3), norm=_group_norm(4, 2)),
    "dropout": lambda: _flat(dropout=0.3),
    "padded conv": lambda: _images(ig.Conv2d((3, 2), (1, 1), (1, 1)), (3, 4, 3)),
    "strided conv": lambda: _images(ig.Conv2d((2, 3), (2, 1)), (3, 5, 4)),
    "dilated conv": lambda: _images(ig.Conv2d((2, 2), (1, 2), (1, 0), (2, 1)), (3, 4, 3)),
    "channel groups": lambda: _images(ig.Conv2d(3, 1, 1, channel_groups=2), (4, 3, 4)),
    "depthwise": lambda: _images(ig.Conv2d((3, 2), (2, 1), (1, 0), channel_groups=2), (2, 4, 3)),
    "conv, batch norm, max pool": lambda: zoo()["cnn"],
    "mean pool": lambda: zoo()["mean"],
    "locally connected": lambda: _images(ig.Local2d((2, 2), (1, 1), (1, 0)), (2, 3, 3), units=3),
    "residual": lambda: zoo()["residual"],
    "separable": lambda: zoo()["separable"],
    "concatenation": lambda: zoo()["concatenated"],
    "max": lambda: _flat(aggregation="max"),
    "shared weights": _tied,
    "loop": irregular,
    "two loops": _two_loops,
    "several inputs and outputs": _several,
}


def _group_norm(units: int, groups: int) -> ig.Norm:
    return ig.Norm("group", torch.linspace(0.8, 1.2, units, dtype=F64), torch.zeros(units, dtype=F64), groups=groups)


@cache
def network(kind: str) -> Network:
    """A network of that kind with random values everywhere."""
    return shake(KINDS[kind](), 1)


@cache
def grown(kind: str) -> Network:
    """The same after some growth: with twins, a frozen bundle and frozen entries, which some passes look for."""
    after = network(kind)
    for step in (SplitUnits, Freeze, FreezeEntries):
        found = [p for p in step.places(after) if getattr(p, "offsets", None) is None]
        after = found[-1](after).after if found else after
    return after


def everywhere(kind: str, pass_: type[Pass]) -> list[tuple[Pass, Network]]:
    """The pass at every place of both networks of a kind."""
    return [(p, n) for n in (network(kind), grown(kind)) for p in places(n, [pass_], most=1000)]


FLAT = {"dense", "batch norm", "layer norm", "dropout", "concatenation", "max", "shared weights", "loop", "two loops"}
FLAT |= {"several inputs and outputs"}
SINGLE_EDGES = {"dense", "max", "two loops", "several inputs and outputs"}  # trained weights of their own, no norm
NOWHERE: dict[str, set[str]] = {
    "EmbedConv": FLAT,  # no window over an image
    "Densify": FLAT - {"concatenation", "shared weights", "loop"},  # nothing sparse
    "InsertNeuron": KINDS.keys() - SINGLE_EDGES,
    "MergeUnits": {"shared weights"},  # what leaves a twin has no weight of its own
    "SplitUnit": {"channel groups", "separable"},  # one unit of one channel group only
}


@pytest.mark.parametrize("name", passes.list())
def test_at_one_place_on_every_kind_of_layer(name: str) -> None:
    """And it has one, unless `NOWHERE` says not."""
    kind_of_pass, nowhere = passes.list()[name], set()
    for n, kind in enumerate(KINDS):
        found = everywhere(kind, kind_of_pass)
        if found:
            pass_, where = found[7 * n % len(found)]
            assert_promise(pass_, where, batch=3)
        else:
            nowhere.add(kind)
    assert nowhere == NOWHERE.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", passes.list())
def test_at_every_place_on_every_kind_of_layer(name: str, kind: str) -> None:
    for pass_, where in everywhere(kind, passes.list()[name]):
        assert_promise(pass_, where)
