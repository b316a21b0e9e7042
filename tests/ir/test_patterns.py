"""Patterns are their edges: each against a definition written the slow way; and what they refuse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import irgrow as ig
from irgrow.ir import pattern as patterns
from irgrow.ir.errors import BadShape, DanglingEdge, IrgrowError, WeightSize
from irgrow.ir.pattern import Pattern, size

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
WINDOWS = st.fixed_dictionaries(
    {"kernel": PAIRS, "stride": PAIRS, "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)), "dilation": PAIRS}
)


def edge_set(pattern: Pattern, source, target) -> list[tuple[int, int, int]]:
    return list(zip(*(a.tolist() for a in pattern.all_edges(source, target)), strict=True))


def slow_window(pattern, source, target):
    """(source position, target position, tap), by output position and tap."""
    (h, w), (kh, kw) = target[1:], pattern.kernel
    for oy, ox, ky, kx in itertools.product(range(h), range(w), range(kh), range(kw)):
        y = oy * pattern.stride[0] - pattern.padding[0] + ky * pattern.dilation[0]
        x = ox * pattern.stride[1] - pattern.padding[1] + kx * pattern.dilation[1]
        if 0 <= y < source[1] and 0 <= x < source[2]:
            yield y * source[2] + x, oy * w + ox, ky * kw + kx


@given(WINDOWS, st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2))
def test_windows(window, h, w, groups, into, outof) -> None:
    source = (groups * into, h, w)
    try:
        output = ig.Conv2d(**window).output(source)
    except BadShape as error:
        assert "at least 1x1" in str(error)
        return
    target = (groups * outof, *output)
    conv, local = ig.Conv2d(**window, channel_groups=groups), ig.Local2d(**window, channel_groups=groups)
    pool = ig.Pool2d(**window)
    taps, positions, inner = list(slow_window(conv, source, target)), size(output), size(window["kernel"])
    wanted, free = [], []
    for o in range(target[0]):
        for s, t, k in taps:
            for c in range(into):
                weight = (o * into + c) * inner + k
                edge = (o // outof * into + c) * h * w + s, o * positions + t
                wanted.append((*edge, weight))
                free.append((*edge, weight * positions + t))
    assert sorted(edge_set(conv, source, target)) == sorted(wanted)
    assert sorted(edge_set(local, source, target)) == sorted(free)
    pooled = (source[0], *output)
    every = [(c * h * w + s, c * positions + t, 0) for c in range(source[0]) for s, t, _ in taps]
    assert sorted(edge_set(pool, source, pooled)) == sorted(every)
    for pattern, end in ((conv, target), (local, target), (pool, pooled)):
        pattern.check(source, end)
        assert pattern.count(source, end) == len(edge_set(pattern, source, end))
        weights = [e[2] for e in edge_set(pattern, source, end)]
        assert max(weights, default=0) < max(1, size(pattern.weight_shape(source, end)))
    assert local.parameters(source, target) == len(free) == len(set(e[2] for e in free))
    used = np.zeros(local.weight_shape(source, target), bool)
    used.reshape(-1)[[e[2] for e in free]] = True
    assert (used == local.used(source)).all()


@given(WINDOWS, st.integers(1, 7), st.integers(1, 7))
def test_output_sizes_are_torch_s(window, h, w) -> None:
    conv = ig.Conv2d(**window)
    try:
        wanted = F.conv2d(
            torch.zeros(1, 1, h, w), torch.zeros(1, 1, *conv.kernel), None, conv.stride, conv.padding, conv.dilation
        )
    except RuntimeError:
        with pytest.raises(BadShape):
            conv.output((1, h, w))
        return
    assert conv.output((1, h, w)) == tuple(wanted.shape[2:])


@pytest.mark.parametrize("chunk", [1, 3, 7, 1 << 20])
def test_dense_in_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "CHUNK", chunk)
    source, target = (2, 2, 1), (5,)
    wanted = [(s, t, t * 4 + s) for t in range(5) for s in range(4)]
    assert edge_set(ig.Dense(), source, target) == wanted
    assert ig.Dense().weight_shape(source, target) == (5, 4) and ig.Dense().count(source, target) == 20


def test_identity_into_a_range() -> None:
    pattern = ig.Identity(1)
    assert edge_set(pattern, (2, 2), (4, 2)) == [(0, 2, 0), (1, 3, 0), (2, 4, 0), (3, 5, 0)]
    assert pattern.count((2, 2), (4, 2)) == 4 and pattern.weight_shape((2, 2), (4, 2)) == ()
    for target in ((2, 2), (4, 3), (4,)):
        with pytest.raises(BadShape, match=r"Identity from \(2, 2\) into units 1 to 2 of .*: expected equal positions"):
            pattern.check((2, 2), target)


ANY = {
    "dense": (ig.Dense(), (2, 3), (4,)),
    "identity": (ig.Identity(1), (2, 2), (4, 2)),
    "conv": (ig.Conv2d(3, padding=1), (2, 3, 3), (2, 3, 3)),
    "depthwise": (ig.Conv2d(2, channel_groups=2), (2, 3, 3), (4, 2, 2)),
    "local": (ig.Local2d(2), (2, 3, 3), (1, 2, 2)),
    "pool": (ig.Pool2d(2, 2), (2, 4, 4), (2, 2, 2)),
    "tied": (ig.Sparse(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([1, 0, 1])), (2,), (2,)),
    "free": (ig.Sparse(np.array([1, 0]), np.array([0, 0])), (2,), (1,)),
}


@pytest.mark.parametrize("name", ANY)
def test_to_sparse_has_the_same_edges_and_ties(name: str) -> None:
    pattern, source, target = ANY[name]
    sparse = pattern.to_sparse(source, target)
    sparse.check(source, target)
    assert edge_set(sparse, source, target) == edge_set(pattern, source, target)
    assert sparse.weights == size(pattern.weight_shape(source, target))
    assert (sparse.weight_index is None) == (name in ("dense", "free"))


def test_sparse_equality() -> None:
    def sparse(**changes):
        arrays = {"source": [0, 1], "target": [0, 0], "weight_index": [0, 1], "tags": {"a": np.array([1, 2])}} | changes
        return ig.Sparse(**{k: np.array(v) if isinstance(v, list) else v for k, v in arrays.items()})

    assert sparse() == sparse()
    for other in ({"source": [1, 0]}, {"target": [0, 1]}, {"weight_index": [0, 0]}, {"weight_index": None},
                  {"tags": {}}, {"tags": {"a": np.array([1, 3])}}, {"weights": 5}):  # fmt: skip
        assert sparse(**other) != sparse()
    assert sparse() != ig.Dense()
    assert repr(sparse()) == "Sparse(2 edges, 2 shared weights, tag a)"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ig.Sparse(np.zeros((2, 1), int), np.zeros(2, int)), r"Sparse: source: found int64 of shape \(2, 1\)"),
        (lambda: ig.Sparse(np.zeros(2, int), np.zeros(3, int)), r"Sparse: target: .* a flat integer array of 2"),
        (lambda: ig.Sparse(np.zeros(2), np.zeros(2, int)), r"Sparse: source: found float64 of shape \(2,\)"),
        (lambda: ig.Sparse(np.array([2**40]), np.zeros(1, int)), r"Sparse: source: found a value of 109951"),
        (lambda: ig.Sparse(np.array([0]), np.array([0]), tags={"a": np.zeros(2, int)}), r"tag 'a': found int64 of"),
        (lambda: ig.Sparse(np.array([0]), np.array([0]), tags={"a": np.zeros(1)}), r"Sparse: tag 'a': found float64"),
        (lambda: ig.Conv2d(0), r"Conv2d: kernel: found 0, expected one or two integers, each at least 1"),
        (lambda: ig.Pool2d((2, 2), padding=(-1, 0)), r"Pool2d: padding: found \(-1, 0\), expected .* at least 0"),
        (lambda: ig.Conv2d((1, 2, 3)), r"Conv2d: kernel: found \(1, 2, 3\)"),
    ],
)  # fmt: skip
def test_patterns_that_cannot_be(make, text: str) -> None:
    with pytest.raises(BadShape, match=text):
        make()


EDGES = ig.Sparse(np.array([0, 1]), np.array([0, -1]))
TIED = ig.Sparse(np.array([0]), np.array([0]), np.array([1]), 1)
CONV, HALVES = ig.Conv2d(3), ig.Conv2d(1, channel_groups=2)


@pytest.mark.parametrize(
    ("pattern", "source", "target", "error", "text"),
    [
        (EDGES, (1,), (1,), DanglingEdge, r"Sparse: source of edge 1: found neuron 1, expected 0 to 0"),
        (EDGES, (2,), (1,), DanglingEdge, r"Sparse: target of edge 1: found neuron -1, expected 0 to 0"),
        (TIED, (1,), (1,), WeightSize, r"Sparse: weight_index: found 1 to 1, expected 0 to 0"),
        (
            CONV,
            (1, 2, 5),
            (1, 1, 3),
            BadShape,
            r"Conv2d over a 2x5 image: found an output of 0x3, .* at least 1x1; use",
        ),
        (CONV, (4,), (1, 1, 3), BadShape, r"Conv2d: source shape: found \(4,\), expected \(channels, height, width\)"),
        (CONV, (1, 5, 5), (1, 5, 5), BadShape, r"conv 3x3 from \(1, 5, 5\): found target positions \(5, 5\), expected"),
        (HALVES, (3, 1, 1), (2, 1, 1), BadShape, r"Conv2d with 2 channel groups: found 3 input and 2 output channels"),
        (
            ig.Pool2d(1),
            (3, 1, 1),
            (2, 1, 1),
            BadShape,
            r"Pool2d: found 3 input and 2 output channels, expected as many",
        ),
    ],
)
def test_patterns_that_do_not_fit(pattern: Pattern, source, target, error: type[IrgrowError], text: str) -> None:
    with pytest.raises(error, match=text):
        pattern.check(source, target)
