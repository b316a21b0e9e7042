"""Networks to and from networkx: one node per neuron, one edge per edge.

`to_networkx` keeps what a plain graph does not have (groups, patterns, shared weights) as graph attributes,
so that the round trip gives an equal network. `from_networkx` also reads plain graphs.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from irgrow.ir.errors import BadProperty, BadShape
from irgrow.ir.network import Bundle, Group, Network, Norm
from irgrow.ir.pattern import Sparse, size


def to_networkx(network: Network) -> nx.MultiDiGraph:
    """A graph with a node per neuron (its number; attributes group, unit, position, activation, aggregation,
    bias) and an edge per edge (key: the bundle's name; attributes weight, weight_index).
    """
    graph = nx.MultiDiGraph()
    for neuron in network.neurons():
        group = network.groups[neuron.group]
        bias = 0.0 if group.bias is None else group.bias[neuron.unit].item()
        graph.add_node(
            neuron.id,
            group=neuron.group,
            unit=neuron.unit,
            position=neuron.position,
            activation=group.activation,
            aggregation=group.aggregation,
            bias=bias,
        )
    for bundle in network.bundles.values():
        source, target = network.ids(bundle.source), network.ids(bundle.target)
        weight = bundle.weight.detach().reshape(-1).tolist()
        for s, t, w in bundle.pattern.edges(*network.shapes(bundle)):
            graph.add_edges_from(
                (a, b, bundle.name, {"weight": weight[i], "weight_index": i})
                for a, b, i in zip(source[s].tolist(), target[t].tolist(), w.tolist(), strict=True)
            )
    norms = {name: group.norm for name, group in network.groups.items() if group.norm is not None}
    graph.graph.update(
        groups=[group.describe() for group in network.groups.values()],
        norms=norms,
        bundles=[
            {
                "name": b.name,
                "source": b.source,
                "target": b.target,
                "pattern": b.pattern,
                "weight": b.weight,  # some entries may have no edge: taps that only ever meet padding
                "trainable": b.trainable,
            }
            for b in network.bundles.values()
        ],
        inputs=network.inputs,
        outputs=network.outputs,
        next_serial=network.next_serial,
        frozen=dict(network.frozen),
        dtype=network.dtype,
    )
    return graph


def from_networkx(graph: nx.DiGraph) -> Network:
    """The network of a graph, verified.

    A graph from `to_networkx` gives back an equal network, with the weights and biases as its edges and
    nodes hold them now. In any other directed graph, neurons are numbered in node order; nodes without
    parents are inputs and nodes without children outputs unless a node attribute `role` (`input`, `hidden`,
    `output`) says otherwise; `activation` (default `relu` for hidden nodes, else `identity`), `aggregation`
    and `bias` are read from nodes, `weight` (default 1) from edges.
    """
    if not isinstance(graph, nx.DiGraph):
        raise BadProperty("from_networkx", type(graph).__name__, "a directed graph (DiGraph or MultiDiGraph)")
    if not graph:
        raise BadProperty("from_networkx", "a graph without nodes", "at least one input and one output")
    network = _from_ours(graph) if "next_serial" in graph.graph else _from_plain(graph)
    return network.verify()


def _from_ours(graph: nx.MultiDiGraph) -> Network:
    facts: dict[str, Any] = graph.graph
    dtype = facts["dtype"]
    nodes: dict[str, dict[tuple[int, int], Any]] = {d["name"]: {} for d in facts["groups"]}
    for number, data in graph.nodes(data=True):
        nodes[data["group"]][data["unit"], data["position"]] = (number, data["bias"])
    groups, bundles = [], []
    for d in facts["groups"]:
        mine, units = nodes[d["name"]], d["shape"][0]
        for unit in range(units):
            for position in range(size(tuple(d["shape"][1:]))):
                if (unit, position) not in mine:
                    raise BadShape(
                        f"from_networkx: group {d['name']!r}",
                        f"no node for unit {unit}, position {position}",
                        "every neuron of the groups in graph.graph",
                        do="clear graph.graph to read it as a plain graph",
                    )
        serials = np.array([mine[u, 0][0] for u in range(units)], np.int64)
        bias = torch.tensor([mine[u, 0][1] for u in range(units)], dtype=dtype) if d["bias"] else None
        norm: Norm | None = facts["norms"].get(d["name"])
        groups.append(
            Group(
                d["name"],
                tuple(d["shape"]),
                d["activation"],
                d["aggregation"],
                bias,
                norm,
                d["dropout"],
                serials,
            )
        )
    values: dict[str, list[tuple[int, float]]] = {d["name"]: [] for d in facts["bundles"]}
    for u, v, key, data in graph.edges(keys=True, data=True):
        if key not in values or "weight_index" not in data:
            raise BadProperty(
                f"from_networkx: edge {u!r} -> {v!r}",
                f"key {key!r} with {sorted(data)}",
                "an edge of a bundle, as to_networkx made it",
                do="clear graph.graph to read it as a plain graph",
            )
        values[key].append((data["weight_index"], data["weight"]))
    shapes = {g.name: g.shape for g in groups}
    for d in facts["bundles"]:
        count = d["pattern"].count(shapes[d["source"]], shapes[d["target"]])
        weight = _filled(d["name"], d["weight"].detach().clone(), values[d["name"]], count)
        bundles.append(Bundle(d["name"], d["source"], d["target"], d["pattern"], weight, d["trainable"]))
    table = {g.name: g for g in groups}
    wires = {b.name: b for b in bundles}
    return Network(table, wires, facts["inputs"], facts["outputs"], facts["next_serial"], facts["frozen"])


def _filled(name: str, weight: Tensor, values: list[tuple[int, float]], count: int) -> Tensor:
    """The weight with the values of its edges, all of which must be there and agree where they share an entry."""
    if len(values) != count:
        raise BadProperty(
            f"from_networkx: bundle {name!r}",
            f"{len(values)} edges",
            f"the {count} of its pattern",
            do="clear graph.graph to read it as a plain graph",
        )
    if values:
        index, value = zip(*values, strict=True)
        flat, at, given = weight.reshape(-1), torch.tensor(index), weight.new_tensor(value)
        flat[at] = given
        if not torch.equal(flat[at], given):
            edge = int((flat[at] != given).nonzero()[0])
            raise BadProperty(
                f"from_networkx: bundle {name!r}",
                f"two values for its shared weight {index[edge]}",
                "one value on all edges that share a weight",
            )
    return weight


def _from_plain(graph: nx.DiGraph) -> Network:
    place: dict[Hashable, tuple[str, int]] = {}
    members: dict[str, list[tuple[Hashable, dict[str, Any]]]] = {}
    facts: dict[str, tuple[str, str, str]] = {}
    for node, data in graph.nodes(data=True):
        free = "input" if graph.in_degree(node) == 0 else "output" if graph.out_degree(node) == 0 else "hidden"
        role = data.get("role", free)
        if role not in ("input", "hidden", "output"):
            raise BadProperty(f"node {node!r}: role", repr(role), "input, hidden or output")
        activation = data.get("activation", "relu" if role == "hidden" else "identity")
        aggregation = data.get("aggregation", "sum")
        name = role
        if role != "input":
            name += "" if activation == "identity" else f"_{activation}"
            name += "" if aggregation == "sum" else f"_{aggregation}"
        place[node] = (name, len(members.setdefault(name, [])))
        members[name].append((node, data))
        facts[name] = (role, activation if role != "input" else "identity", aggregation)
    number = {node: n for n, node in enumerate(graph.nodes)}
    dtype = torch.get_default_dtype()
    groups = []
    for name, nodes in members.items():
        bias = None
        if any("bias" in data for _, data in nodes):
            bias = torch.tensor([float(data.get("bias", 0.0)) for _, data in nodes], dtype=dtype)
        serials = np.array([number[node] for node, _ in nodes], np.int64)
        groups.append(Group(name, (len(nodes),), facts[name][1], facts[name][2], bias, serials=serials))
    edges: dict[tuple[str, str], list[tuple[int, int, float]]] = {}
    for u, v, data in graph.edges(data=True):
        (s, i), (t, j) = place[u], place[v]
        edges.setdefault((s, t), []).append((i, j, float(data.get("weight", 1.0))))
    bundles = []
    for (s, t), rows in edges.items():
        sources, targets, weights = zip(*rows, strict=True)
        pattern = Sparse(np.array(sources), np.array(targets))
        bundles.append(Bundle(f"{s}_to_{t}", s, t, pattern, torch.tensor(weights, dtype=dtype)))
    roles = {role: [n for n, f in facts.items() if f[0] == role] for role in ("input", "output")}
    return Network.build(groups, bundles, roles["input"], roles["output"])
