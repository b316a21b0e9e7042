"""A million neurons and twenty million sparse edges: built, verified and levelised; networkx at a tenth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import irgrow as ig
from bench.memory import peak
from bench.suite import Case, Made, Missing, Row, op

LIMIT_S, LIMIT_BYTES = 4.0, 4e9
INPUTS, OUTPUTS = 1000, 10
Edges = tuple[NDArray[np.int32], NDArray[np.int32], torch.Tensor]


@op(
    "large_graph",
    cases=[{"neurons": 1_000_000, "edges": 20_000_000}],
    tiny={"neurons": 4_000, "edges": 40_000},
)
def large_graph(*, neurons: int, edges: int, device: str) -> Made:
    """Build, verify and levelise a random sparse graph (warm), and its peak memory; networkx at a tenth of it.

    Neurons are numbered at random (no topological order is given away); the edges are one bundle from a group to
    itself, besides those from 1,000 inputs and into 10 outputs. Peak memory is that of a whole process that does
    nothing else. A limit as opponent: ratio = limit / measured.
    """
    arguments = {"neurons": neurons, "edges": edges}
    label = f"{neurons:,} neurons, {edges:,} edges"
    found = peak("bench.large_graph", "alone", arguments)
    times_s = found.result
    full = neurons == 1_000_000 and edges == 20_000_000
    yield Row(
        f"{label}: time",
        opponent=f"the limit of {LIMIT_S:g} s",
        ratio=LIMIT_S / times_s["all"],
        ours_ms=1e3 * times_s["all"],
        goal=1.0 if full else None,
        note=", ".join(f"{name} {time_s:.2f} s" for name, time_s in times_s.items() if name != "all"),
    )
    yield Row(
        f"{label}: peak memory",
        opponent=f"the limit of {LIMIT_BYTES / 1e9:g} GB",
        ratio=LIMIT_BYTES / found.whole,
        goal=1.0 if full else None,
        note=f"{found.whole / 1e9:.2f} GB, of which {found.above / 1e9:.2f} GB beyond the edges and weights given",
    )
    tenth = random_edges(neurons // 10, edges // 10)
    yield Case(
        f"{neurons // 10:,} neurons, {edges // 10:,} edges",
        ours=lambda: levels(neurons // 10, tenth)[0],
        opponents={"networkx": lambda: _by_networkx(neurons // 10, tenth)},
        tolerance=0.0,
    )


def alone(*, neurons: int, edges: int) -> Callable[[], dict[str, float]]:
    """The work on its own, for the process that measures memory: returns where the time went."""
    given = random_edges(neurons, edges)
    return lambda: levels(neurons, given)[1]


def random_edges(neurons: int, edges: int, seed: int = 0) -> Edges:
    """About `edges` edges without a loop, each once, between neurons numbered at random; and their weights."""
    draw = np.random.default_rng(seed)
    later = draw.integers(1, neurons, edges, dtype=np.int64)
    earlier = (draw.random(edges) * later).astype(np.int64)
    once = np.unique(later * neurons + earlier)
    names = draw.permutation(neurons).astype(np.int32)
    weights = torch.randn(len(once), generator=torch.Generator().manual_seed(seed))
    return names[once % neurons], names[once // neurons], weights


def levels(neurons: int, edges: Edges) -> tuple[Any, dict[str, float]]:
    """The depth of every neuron in the large group, and where the time went."""
    source, target, weight = edges
    begun = time.perf_counter()
    built = ig.Builder()
    built.input("x", INPUTS)
    built.group("h", neurons, activation="relu")
    built.output("y", OUTPUTS)
    first, last = np.arange(INPUTS), np.arange(OUTPUTS)
    built.connect("x", "h", ig.Sparse(first, first % neurons), torch.ones(INPUTS))
    built.connect("h", "h", ig.Sparse(source, target), weight)
    built.connect("h", "y", ig.Sparse(np.flatnonzero(first < OUTPUTS), last), torch.ones(OUTPUTS))
    network = built.build(verify=False)
    made = time.perf_counter()
    network.verify()
    verified = time.perf_counter()
    depths = network.levels["h"]
    done = time.perf_counter()
    times = {"build": made - begun, "verify": verified - made, "levels": done - verified, "all": done - begun}
    return depths, times


def _by_networkx(neurons: int, edges: Edges) -> Any:
    """The same depths: a DiGraph is built, checked for loops, and its generations are counted."""
    try:
        import networkx
    except ModuleNotFoundError:
        raise Missing("needs networkx: pip install networkx") from None
    source, target, _ = edges
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(neurons + INPUTS))
    graph.add_edges_from((neurons + n, n % neurons) for n in range(INPUTS))
    graph.add_edges_from(zip(source.tolist(), target.tolist(), strict=True))
    depth = np.empty(neurons + INPUTS, np.int32)
    reached: dict[int, int] = {}
    if not networkx.is_directed_acyclic_graph(graph):
        raise ValueError("a loop")
    for node in networkx.topological_sort(graph):
        depth[node] = reached[node] = 1 + max((reached[parent] for parent in graph.pred[node]), default=-1)
    return depth[:neurons]
