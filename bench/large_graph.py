"""A million neurons: building, verifying and levelling an irregular network, and what memory it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray

import irgrow as ig
from bench.memory import peak_bytes
from bench.suite import Case, Row, op
from bench.timing import Effort
from irgrow.ir.network import Bundle, Group, Network

LIMIT_S, LIMIT_BYTES = 4.0, 4 * 2**30  # for 1e6 neurons and 2e7 edges
WINDOW = 10_000  # parents stand at most this many places earlier in the order
ENDS = 1000, 100  # inputs and outputs
FASTER = 10.0  # than its topological generations alone
Ints = NDArray[np.int32]


@op(
    "large_graph",
    cases=[{"neurons": 100_000, "degree": 20}, {"neurons": 1_000_000, "degree": 20}],
    tiny={"neurons": 2_000, "degree": 5},
)
def large_graph(*, neurons: int, degree: int, device: str) -> Iterator[Case | Row]:
    """Build + verify + levels of one flat group that feeds itself, beside networkx at a tenth of the size.

    Edges are stored in random order, the worst case; ours checks everything that `verify` checks, networkx only
    levels, and need not build its graph. At full size: time against 4 s, peak memory against 4 GiB.
    """
    case = f"{neurons:,} neurons x {degree}"
    edges = wires(neurons, degree)
    if neurons <= 100_000:
        graph = _graph(neurons, edges)
        yield Case(
            case,
            ours=partial(levels, neurons, edges),
            opponents={
                "networkx, its graph built before": lambda: _generations(neurons, graph),
                "networkx": lambda: _generations(neurons, _graph(neurons, edges)),
            },
            tolerance=0.0,
            goal=FASTER,
            effort=Effort(pairs=3, seconds=1.0, least=2),
        )
        return
    levels(2_000, wires(2_000, 5))  # compiles
    begun = time.perf_counter()
    depth = int(levels(neurons, edges).max())
    took = time.perf_counter() - begun
    yield Row(
        f"{case}: time", ratio=LIMIT_S / took, opponent="4 s", goal=1.0, ours_ms=1e3 * took, note=f"depth {depth}"
    )
    peak, _ = peak_bytes("bench.large_graph", "alone", {"neurons": neurons, "degree": degree})
    yield Row(
        f"{case}: peak memory",
        ratio=LIMIT_BYTES / peak,
        opponent="4 GiB",
        goal=1.0,
        note=f"{peak / 2**20:.0f} MiB beside the edges and weights themselves",
    )


def wires(neurons: int, degree: int, *, seed: int = 0) -> tuple[Ints, Ints]:
    """Up to `degree` different parents for every neuron, all earlier in a hidden order; edges in random order."""
    draw = np.random.default_rng(seed)
    step = max(1, min(WINDOW, neurons // 2) // degree)
    child = np.repeat(np.arange(neurons, dtype=np.int32), degree)
    back = np.tile(np.arange(degree, dtype=np.int32) * step, neurons)
    back += draw.integers(1, step + 1, back.size, dtype=np.int32)
    parent = child - back
    kept = np.flatnonzero(parent >= 0)
    draw.shuffle(kept)
    order = draw.permutation(neurons).astype(np.int32)
    return order[parent[kept]], order[child[kept]]


def network(neurons: int, edges: tuple[Ints, Ints]) -> Network:
    """Inputs feed the first neurons of the group and outputs read all of it, one edge for each neuron."""
    inputs, outputs = ENDS
    every = np.arange(neurons, dtype=np.int32)
    patterns = {
        "x_h": ("x", "h", ig.Sparse(every % inputs, every)),
        "h_h": ("h", "h", ig.Sparse(*edges)),
        "h_y": ("h", "y", ig.Sparse(every, every % outputs)),
    }
    bundles = [Bundle(n, s, t, p, torch.ones(p.source.size)) for n, (s, t, p) in patterns.items()]
    groups = [Group("x", (inputs,)), Group("h", (neurons,), "relu"), Group("y", (outputs,))]
    return Network.build(groups, bundles, ["x"], ["y"])


def levels(neurons: int, edges: tuple[Ints, Ints]) -> NDArray[np.int32]:
    """The levels of the verified network, of the neurons in its group."""
    return network(neurons, edges).verify().levels["h"]


def alone(*, neurons: int, degree: int) -> Callable[[], Any]:
    """Our work on its own, for the process that measures memory."""
    return partial(levels, neurons, wires(neurons, degree))


def _graph(neurons: int, edges: tuple[Ints, Ints]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(neurons))
    graph.add_edges_from(zip(edges[0].tolist(), edges[1].tolist(), strict=True))
    return graph


def _generations(neurons: int, graph: nx.DiGraph) -> NDArray[np.int32]:
    level = np.zeros(neurons, np.int32)
    for depth, generation in enumerate(nx.topological_generations(graph), 1):
        level[list(generation)] = depth
    return level
