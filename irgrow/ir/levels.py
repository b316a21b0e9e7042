"""The order of a network: strongly connected parts of its group graph, and the depth of every neuron."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from irgrow.ir.errors import CyclicNetwork
from irgrow.ir.pattern import Conv2d, Dense, Identity, Pattern, Shape, Sparse, Window, size
from irgrow.kernels import graph

if TYPE_CHECKING:
    from irgrow.ir.network import Bundle, Network


def components(network: Network) -> list[tuple[tuple[str, ...], bool]]:
    """Strongly connected parts of the group graph in topological order, and whether each holds a loop."""
    parents: dict[str, list[str]] = {name: [] for name in network.groups}
    loops = set()
    for bundle in network.bundles.values():
        if bundle.source == bundle.target:
            loops.add(bundle.source)
        else:
            parents[bundle.target].append(bundle.source)
    try:
        return [((name,), name in loops) for name in TopologicalSorter(parents).static_order()]
    except CycleError:
        group_graph = nx.DiGraph()
        group_graph.add_nodes_from(parents)
        group_graph.add_edges_from((s, t) for t, all_s in parents.items() for s in all_s)
        condensed = nx.condensation(group_graph)
        order = [sorted(condensed.nodes[c]["members"], key=list(parents).index) for c in nx.topological_sort(condensed)]
        return [(tuple(names), len(names) > 1 or names[0] in loops) for names in order]


Rows = tuple[NDArray[np.integer], NDArray[np.integer]]  # pointer, child: see kernels.graph.children


def levels(network: Network, inside: Mapping[tuple[str, ...], Rows] | None = None) -> dict[str, NDArray[np.int32]]:
    """Per group the depth of every neuron; raises CyclicNetwork with one cycle.

    `inside` saves the work of grouping the edges of a part with a loop where the caller has done it.
    """
    found: dict[str, NDArray[np.int32]] = {}
    for names, cyclic in network.components:
        for name in names:
            found[name] = np.zeros(network.groups[name].neurons, np.int32)
            for bundle in network.entering(name):
                if bundle.source not in names:
                    _deepen(network, bundle, found[bundle.source], found[name])
        if cyclic:
            _inside(network, names, found, (inside or {}).get(names))
        elif network.groups[names[0]].norm is not None:
            found[names[0]][:] = found[names[0]].max(initial=0)
    return {name: found[name] for name in network.groups}


def _deepen(network: Network, bundle: Bundle, source: NDArray[np.int32], target: NDArray[np.int32]) -> None:
    """Every neuron of `target` is at least one deeper than its parents in `source`."""
    np.maximum(target, largest_parent(bundle.pattern, *network.shapes(bundle), source) + 1, out=target)


def largest_parent(pattern: Pattern, source: Shape, target: Shape, values: NDArray[np.int32]) -> NDArray[np.int32]:
    """For every target neuron the largest value (>= 0) among its parents; -1 for one without parents.

    Images are not walked edge by edge: a window reads the same positions of every channel.
    """
    out = np.full(size(target), -1, np.int32)
    if isinstance(pattern, Dense):
        out[:] = values.max(initial=-1)
    elif isinstance(pattern, Identity):
        first = pattern.start * size(source[1:])
        out[first : first + values.size] = values
    elif isinstance(pattern, Window):
        groups = pattern.channel_groups if isinstance(pattern, Conv2d) else source[0]
        by_group = values.reshape(groups, -1, size(source[1:])).max(1)
        read, written, _ = pattern.taps(source)
        best = np.full((size(target[1:]), groups), -1, np.int32)
        np.maximum.at(best, written, by_group[:, read].T)
        out = np.repeat(best.T, target[0] // groups, axis=0).ravel()
    else:
        for s, t, _ in pattern.edges(source, target):
            np.maximum.at(out, t, values[s])
    return out


def inside_edges(
    network: Network, names: tuple[str, ...]
) -> tuple[NDArray[np.integer], NDArray[np.integer], dict[str, int]]:
    """The edges among these groups, with neurons numbered group after group; and each group's first number."""
    first, total = first_numbers(network, names)
    sources: list[NDArray[np.integer]] = [np.empty(0, np.int32)]
    targets: list[NDArray[np.integer]] = [np.empty(0, np.int32)]
    for name in names:
        for bundle in network.entering(name):
            if bundle.source in first:
                pattern, shapes = bundle.pattern, network.shapes(bundle)
                s, t = (
                    (pattern.source, pattern.target) if isinstance(pattern, Sparse) else pattern.all_edges(*shapes)[:2]
                )
                sources.append(s + first[bundle.source] if first[bundle.source] else s)
                targets.append(t + first[name] if first[name] else t)
    if len(sources) == 2:
        return sources[1], targets[1], first
    dtype = np.int32 if total < 2**31 else np.int64
    return np.concatenate(sources, dtype=dtype), np.concatenate(targets, dtype=dtype), first


def first_numbers(network: Network, names: tuple[str, ...]) -> tuple[dict[str, int], int]:
    """The first number of each group, where neurons are numbered group after group; and how many there are."""
    first, total = {}, 0
    for name in names:
        first[name] = total
        total += network.groups[name].neurons
    return first, total


def _inside(network: Network, names: tuple[str, ...], found: dict[str, NDArray[np.int32]], rows: Rows | None) -> None:
    first, total = first_numbers(network, names)
    base = np.concatenate([found[name] for name in names])
    if rows is None:
        source, target, _ = inside_edges(network, names)
        level = graph.levels(source, target, total, base)
    else:
        level = graph.levels_of_children(*rows, base)
    if level.size and level.min() < 0:
        source, target, _ = inside_edges(network, names)
        cycle = graph.find_cycle(source, target, total)
        ids = np.concatenate([network.ids(name) for name in names])
        path = [network.neuron(int(ids[n])) for n in cycle]
        shown = " -> ".join(f"{n.group} neuron {n.id}" for n in [*path[:6], path[0]])
        raise CyclicNetwork(
            "network: neurons that feed themselves",
            shown if len(path) <= 6 else f"a cycle of {len(path)} neurons through {shown}",
            "no path from a neuron to itself",
            do="remove one of these edges",
        )
    for name in names:
        found[name] = level[first[name] : first[name] + network.groups[name].neurons]
