"""A network of 1e6 neurons and 2e7 edges is built, verified and levelled in seconds."""

from __future__ import annotations

import time

import networkx as nx
import numpy as np
import pytest

from bench import large_graph
from bench.memory import peak_bytes

LIMIT_S, LIMIT_BYTES = 4.0, 4 * 2**30


def test_levels_are_networkx_s() -> None:
    edges = large_graph.wires(500, 5)
    assert 1500 < edges[0].size <= 2500 and len(set(zip(*(e.tolist() for e in edges), strict=True))) == edges[0].size
    graph = nx.DiGraph(list(zip(*(e.tolist() for e in edges), strict=True)))
    wanted = np.zeros(500, int)
    for depth, generation in enumerate(nx.topological_generations(graph), 1):
        wanted[list(generation)] = depth
    wanted[wanted == 0] = 1
    assert large_graph.levels(500, edges).tolist() == wanted.tolist()


@pytest.mark.slow
def test_a_million_neurons() -> None:
    large_graph.levels(2000, large_graph.wires(2000, 5))  # compiles
    edges = large_graph.wires(1_000_000, 20)
    assert edges[0].size > 1.98e7
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        level = large_graph.levels(1_000_000, edges)
        times.append(time.perf_counter() - begun)
    assert level.min() == 1 and level.max() > 400
    assert min(times) < LIMIT_S
    assert peak_bytes("bench.large_graph", "alone", {"neurons": 1_000_000, "degree": 20})[0] < LIMIT_BYTES
