"""Irregular networks to measure on: grown by insertion, layered and sparse, small-world.

`grown` is irgrow.InsertNeuron (Algorithm 1) on plain arrays, because 20,000 insertions into a `Network` take
minutes; tests/bench replays its choices through InsertNeuron and compares every edge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

import irgrow as ig

INPUTS, OUTPUTS = 64, 10
Array = NDArray[np.int64]


@dataclass(frozen=True)
class Growth:
    """What insertion made: neurons 0.. are the inputs, then the outputs, then the inserted ones in their order."""

    inputs: int
    outputs: int
    source: Array
    target: Array
    primary: Array
    weight: NDArray[np.float64]
    parents: Array  # [insertions, parents]: what was drawn, the primary parent first
    drawn: NDArray[np.float64]  # the same shape: the new weights


@lru_cache(maxsize=4)
def grown(
    neurons: int, *, parents: int = 16, inputs: int = INPUTS, outputs: int = OUTPUTS, seed: int = 0
) -> ig.Network:
    """A network of this many neurons, grown by insertion from inputs that are densely wired to the outputs."""
    return to_network(grow(neurons - inputs - outputs, parents=parents, inputs=inputs, outputs=outputs, seed=seed))


def grow(insertions: int, *, parents: int, inputs: int, outputs: int, seed: int) -> Growth:
    """Algorithm 1, `insertions` times."""
    draw = np.random.default_rng(seed)
    start = draw.uniform(-1, 1, inputs * outputs) / np.sqrt(inputs)
    drawn = draw.uniform(-0.5, 0.5, (insertions, parents))
    source, target, primary, weight, chosen = _insert(inputs, outputs, start, drawn, seed)
    return Growth(inputs, outputs, source, target, primary, weight, chosen, drawn)


def to_network(growth: Growth) -> ig.Network:
    """The groups x, inserted (relu) and y, and the sparse bundles between them."""
    first = growth.inputs + growth.outputs
    neurons = first + len(growth.drawn)
    group = np.repeat([0, 2, 1], [growth.inputs, growth.outputs, neurons - first])
    offset = np.array([0, first, growth.inputs])
    builder = ig.Builder()
    builder.input("x", growth.inputs)
    builder.group("inserted", max(1, neurons - first), activation="relu")
    builder.output("y", growth.outputs)
    names = ("x", "inserted", "y")
    ends = group[growth.source], group[growth.target]
    for s, t in ((0, 1), (1, 1), (0, 2), (1, 2)):
        mine = np.flatnonzero((ends[0] == s) & (ends[1] == t))
        if mine.size:
            pattern = ig.Sparse(
                growth.source[mine] - offset[s], growth.target[mine] - offset[t], tags={"primary": growth.primary[mine]}
            )
            builder.connect(names[s], names[t], pattern, torch.from_numpy(growth.weight[mine]).float())
    return builder.build()


@lru_cache(maxsize=4)
def layered(width: int, layers: int, density: float, *, outputs: int = OUTPUTS, seed: int = 0) -> ig.Network:
    """`layers` layers of `width` relu neurons, each with density * width parents drawn from the layer before."""
    draw = np.random.default_rng(seed)
    builder = ig.Builder(seed=seed)
    names = [builder.input("x", width)]
    names += [builder.group(f"h{n}", width, activation="relu") for n in range(layers)]
    names.append(builder.output("y", outputs))
    degree = max(1, round(density * width))
    for source, target, units in zip(names, names[1:], [width] * layers + [outputs], strict=False):
        chosen = np.argsort(draw.random((units, width)), axis=1)[:, :degree]
        weight = torch.from_numpy(draw.uniform(-1, 1, chosen.size) * np.sqrt(6 / degree)).float()
        builder.connect(source, target, ig.Sparse(chosen.ravel(), np.repeat(np.arange(units), degree)), weight)
    return builder.build()


@lru_cache(maxsize=4)
def small_world(
    neurons: int, *, degree: int = 32, rewired: float = 0.1, inputs: int = INPUTS, outputs: int = OUTPUTS, seed: int = 0
) -> ig.Network:
    """A Watts-Strogatz graph whose edges point along a random order of its neurons.

    Neurons without parents read 16 random inputs; the outputs read every neuron without children.
    """
    draw = np.random.default_rng(seed)
    near = np.arange(1, degree // 2 + 1)
    a = np.repeat(np.arange(neurons), near.size)
    b = (a + np.tile(near, neurons)) % neurons
    moved = draw.random(a.size) < rewired
    b[moved] = draw.integers(0, neurons, int(moved.sum()))
    rank = draw.permutation(neurons)
    source, target = np.minimum(rank[a], rank[b]), np.maximum(rank[a], rank[b])
    once = np.unique(source * neurons + target)
    source, target = once // neurons, once % neurons
    source, target = source[source != target], target[source != target]
    starts = np.setdiff1d(np.arange(neurons), target)
    ends = np.setdiff1d(np.arange(neurons), source)
    read = np.argsort(draw.random((starts.size, inputs)), axis=1)[:, : min(16, inputs)]
    builder = ig.Builder(seed=seed)
    builder.input("x", inputs)
    builder.group("h", neurons, activation="relu")
    builder.output("y", outputs)
    entering = np.bincount(target, minlength=neurons)
    for pair, s, t, fan_in in (
        (("x", "h"), read.ravel(), np.repeat(starts, read.shape[1]), read.shape[1]),
        (("h", "h"), source, target, entering[target]),
        (("h", "y"), np.tile(ends, outputs), np.repeat(np.arange(outputs), ends.size), ends.size),
    ):
        weight = draw.uniform(-1, 1, s.size) * np.sqrt(6 / fan_in)
        builder.connect(*pair, ig.Sparse(s, t), torch.from_numpy(weight).float())
    return builder.build()


@njit(cache=True)
def _insert(inputs: int, outputs: int, start: Any, drawn: Any, seed: int) -> tuple[Any, Any, Any, Any, Any]:
    np.random.seed(seed)
    insertions, parents = drawn.shape
    neurons, edges = inputs + outputs + insertions, inputs * outputs + insertions * parents
    source, target = np.empty(edges, np.int64), np.empty(edges, np.int64)
    primary, weight = np.zeros(edges, np.int64), np.empty(edges)
    head, follow = np.full(neurons, -1), np.full(edges, -1)  # the edges out of each neuron, as a list
    depth, taken = np.zeros(neurons, np.int64), np.full(neurons, -1)
    chosen, stack = np.empty((insertions, parents), np.int64), np.empty(neurons, np.int64)
    count = 0
    for k in range(inputs):
        for i in range(inputs, inputs + outputs):
            source[count], target[count], primary[count], weight[count] = k, i, 1, start[count]
            follow[count], head[k] = head[k], count
            depth[i] = 1
            count += 1
    for n in range(insertions):
        v = inputs + outputs + n
        deepest = depth[:v].max()
        j = _draw(inputs, outputs, v)
        while depth[j] >= deepest:
            j = _draw(inputs, outputs, v)
        depth[v] = depth[j] + 1
        before, e = -1, head[j]
        while e >= 0:  # children that are deeper, or as deep and primary, follow v
            after = follow[e]
            i = target[e]
            if depth[i] > depth[v] or (depth[i] == depth[v] and primary[e] == 1):
                if before < 0:
                    head[j] = after
                else:
                    follow[before] = after
                source[e] = v
                follow[e], head[v] = head[v], e
            else:
                before = e
            e = after
        for p in range(parents):
            k = j
            while p > 0 and (taken[k] == n or depth[k] > depth[j]):
                k = _draw(inputs, outputs, v)
            taken[k] = n
            chosen[n, p] = k
            source[count], target[count], weight[count] = k, v, drawn[n, p]
            primary[count] = 1 if p == 0 else 0
            follow[count], head[k] = head[k], count
            count += 1
        stack[0], waiting = v, 1
        while waiting:  # whatever is now too shallow sinks, by one: nothing is on the stack twice
            waiting -= 1
            k = stack[waiting]
            e = head[k]
            while e >= 0:
                i = target[e]
                if depth[i] <= depth[k]:
                    depth[i] = depth[k] + 1
                    stack[waiting] = i
                    waiting += 1
                e = follow[e]
    return source, target, primary, weight, chosen


@njit(cache=True)
def _draw(inputs: int, outputs: int, neurons: int) -> Any:
    """A neuron that is no output."""
    k = np.random.randint(0, neurons - outputs)
    return k if k < inputs else k + outputs
