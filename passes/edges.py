"""Adding and removing single edges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.edit import Edit
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.morphism import Changes, FirstOrder, Promise, SameFunction
from irgrow.ir.network import Network
from irgrow.ir.pattern import Sparse
from irgrow.passes.base import Pass, register
from irgrow.passes.wiring import Ints, add_edges, edges_at, locate, refuse_broken, refuse_loops_of_norms

Pairs = tuple[tuple[int, int], ...]


@register
@dataclass(frozen=True)
class AddEdges(Pass):
    """These neurons are joined by new edges; at weight 0 (the default) every output stays the same.

        u    v     becomes     u --weight--> v

    `edges` are pairs (parent, child) of neuron numbers; `AddEdges.largest` takes those of the largest measured
    gradients (NeST). They go into a sparse bundle between the two groups, a new one where there is none; tags
    of the network are 0 on them.

    Promise: SameFunction if all weights are 0, else FirstOrder in the weights.
    Refused: an edge that exists, into an input, into a group that aggregates by max (weight 0 counts there),
    one that closes a cycle of neurons or a loop of groups around a norm. An edge to a deeper neuron closes
    none; only where one leads to the same depth or up is the whole network checked.
    Source: Dai et al., NeST, arXiv:1711.02017, section 3.2.
    """

    edges: Pairs
    weights: tuple[float, ...] | None = None
    reference: ClassVar[str] = "NeST, arXiv:1711.02017, section 3.2"

    @classmethod
    def largest(
        cls, network: Network, gradients: Mapping[tuple[str, str], Tensor], count: int, *, step: float = 0.0
    ) -> AddEdges:
        """The `count` new edges whose gradients are largest in magnitude, with weights -step * gradient.

        `gradients[source, target]` `[target neurons, source neurons]` is dL/dw of every possible edge between
        the two groups, E[g_v h_u]: what the parents put out times the gradients at the children's
        pre-activations. Candidates are pairs without an edge whose child lies deeper, so that no cycle can
        arise. Equal magnitudes are taken in the order given.

        BadData: a gradient of the wrong shape or with NaN. Refused: fewer candidates than `count`.
        Source: NeST, arXiv:1711.02017 (gradient-based growth of dormant connections).
        """
        values, parents, children = [np.empty(0)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for (source, target), gradient in gradients.items():
            s, t = network.group(source), network.group(target)
            who = f"AddEdges.largest: gradient of {source} -> {target}"
            if tuple(gradient.shape) != (t.neurons, s.neurons):
                raise BadData(who, f"shape {tuple(gradient.shape)}", (t.neurons, s.neurons))
            if not bool(gradient.isfinite().all()):
                raise BadData(who, "NaN or infinity", "finite numbers")
            free = network.levels[source] < network.levels[target][:, None]
            free &= target not in network.inputs and t.aggregation != "max"
            for bundle in network.leaving(source):
                if bundle.target == target:
                    a, b, _ = bundle.pattern.all_edges(*network.shapes(bundle))
                    free[b, a] = False
            child, parent = np.nonzero(free)
            values.append(gradient.detach().double().cpu().numpy()[child, parent])
            parents.append(network.ids(source)[parent])
            children.append(network.ids(target)[child])
        value = np.concatenate(values)
        if not 1 <= count <= value.size:
            raise Refused("AddEdges.largest", f"{count} edges", f"1 to {value.size}, the edges that could be added")
        best = np.argsort(-np.abs(value), kind="stable")[:count]
        ends = (np.concatenate(parts)[best].tolist() for parts in (parents, children))
        return cls(tuple(zip(*ends, strict=True)), tuple((-step * value[best]).tolist()) if step else None)

    @classmethod
    def places(cls, network: Network) -> Iterator[AddEdges]:
        ids = {name: network.ids(name) for name in network.groups}
        for parents in ids.values():
            for children in ids.values():
                edge = (int(parents[0]), int(children[-1]))
                for weights in (None, (0.5,)):
                    candidate = cls((edge,), weights)
                    try:
                        candidate.requires(network)
                    except Refused:
                        break
                    yield candidate

    def requires(self, network: Network) -> None:
        if not self.edges:
            raise Refused("AddEdges", "no edges", "at least one pair of neuron numbers")
        if len(set(self.edges)) != len(self.edges):
            twice = next(e for n, e in enumerate(self.edges) if e in self.edges[:n])
            raise Refused(f"AddEdges: edge {_text(twice)}", "it twice", "each edge once")
        weights = self.weights
        if weights is not None and (len(weights) != len(self.edges) or not np.isfinite(weights).all()):
            raise Refused(
                "AddEdges: weights", f"{len(weights)} numbers", f"{len(self.edges)} finite ones, one per edge"
            )
        upward = False
        for (source, target), at in _by_bundle(network, self.edges).items():
            first = f"AddEdges: edge {_text(self.edges[at.index[0]])}"
            if target in network.inputs:
                raise Refused(first, f"a child in the input {target!r}", "a neuron that is no input")
            if network.groups[target].aggregation == "max":
                raise Refused(
                    first,
                    f"a child in {target!r}, which aggregates by max",
                    "a group that sums, where weight 0 is no edge",
                )
            for bundle in network.leaving(source):
                if bundle.target == target:
                    edge, _ = edges_at(network, bundle, at.source, at.target)
                    if (edge >= 0).any():
                        here = self.edges[at.index[int(np.flatnonzero(edge >= 0)[0])]]
                        raise Refused(f"AddEdges: edge {_text(here)}", f"it in bundle {bundle.name!r}", "a new edge")
            upward |= bool((network.levels[source][at.source] >= network.levels[target][at.target]).any())
        trial = Edit(network)
        self.rewrite(trial)
        if upward:
            refuse_broken("AddEdges", trial)
        refuse_loops_of_norms("AddEdges", trial.view())

    def promise(self, network: Network) -> Promise:
        return FirstOrder() if self.weights is not None and any(self.weights) else SameFunction()

    def rewrite(self, edit: Edit) -> None:
        weights = torch.tensor(self.weights or [0.0] * len(self.edges), dtype=torch.float64)
        patterns = (b.pattern for b in edit.before.bundles.values())
        names = dict.fromkeys(tag for p in patterns if isinstance(p, Sparse) for tag in p.tags)
        for (source, target), at in _by_bundle(edit.before, self.edges).items():
            tags = {name: np.zeros(at.index.size, np.int32) for name in names}
            add_edges(edit, source, target, at.source, at.target, weights[torch.from_numpy(at.index)], tags=tags)


@register
@dataclass(frozen=True)
class RemoveEdges(Pass):
    """These edges are gone; where their weights were 0, every output stays the same.

        u --0--> v     becomes     u    v

    `edges` are pairs (parent, child) of neuron numbers; `bundle` limits them to one bundle, by default every
    edge between the two goes. What is left of a bundle is sparse, ties kept; a shared weight that loses an
    edge has no gradient history. Neurons without children stay (PruneUnits takes them).

    Promise: SameFunction if all their weights are 0 and no target aggregates by max, else Changes.
    Refused: an edge that does not exist, an output that no input would reach any more.
    """

    edges: Pairs
    bundle: str | None = None
    reference: ClassVar[str] = "NeST, arXiv:1711.02017 (magnitude-based pruning)"

    @classmethod
    def below(cls, network: Network, threshold: float, bundle: str) -> RemoveEdges:
        """The edges of a bundle whose weights are at most `threshold` in magnitude."""
        b = network.bundle(bundle)
        s, t, w = b.pattern.all_edges(*network.shapes(b))
        small = np.flatnonzero((b.weight.detach().abs() <= threshold).flatten().cpu().numpy()[w])
        parents, children = network.ids(b.source)[s[small]], network.ids(b.target)[t[small]]
        return cls(tuple(zip(parents.tolist(), children.tolist(), strict=True)), bundle)

    @classmethod
    def places(cls, network: Network) -> Iterator[RemoveEdges]:
        for bundle in network.bundles.values():
            s, t, w = bundle.pattern.all_edges(*network.shapes(bundle))
            zero = np.flatnonzero(bundle.weight.detach().flatten().cpu().numpy()[w] == 0)
            for edges in (zero, np.arange(min(1, s.size))):
                parents, children = network.ids(bundle.source)[s[edges]], network.ids(bundle.target)[t[edges]]
                candidate = cls(tuple(zip(parents.tolist(), children.tolist(), strict=True)), bundle.name)
                try:
                    candidate.requires(network)
                except Refused:
                    continue
                yield candidate

    def requires(self, network: Network) -> None:
        if not self.edges:
            raise Refused("RemoveEdges", "no edges", "at least one pair of neuron numbers")
        self._found(network)
        trial = Edit(network)
        self.rewrite(trial)
        refuse_broken("RemoveEdges", trial)

    def _found(self, network: Network) -> dict[str, tuple[Ints, Ints]]:
        """Per bundle the edges to remove and the indices of their weights."""
        if self.bundle is not None:
            network.bundle(self.bundle)
        found: dict[str, tuple[Ints, Ints]] = {}
        missing = np.ones(len(self.edges), bool)
        for (source, target), at in _by_bundle(network, self.edges).items():
            for bundle in network.leaving(source):
                if bundle.target == target and self.bundle in (None, bundle.name):
                    edge, weight = edges_at(network, bundle, at.source, at.target)
                    here = edge >= 0
                    missing[at.index[here]] = False
                    if here.any():
                        found[bundle.name] = (edge[here], weight[here])
        if missing.any():
            where = f" in bundle {self.bundle!r}" if self.bundle else ""
            first = self.edges[int(np.flatnonzero(missing)[0])]
            raise Refused(f"RemoveEdges: edge {_text(first)}", f"no such edge{where}", "an edge of this network")
        return found

    def promise(self, network: Network) -> Promise:
        for name, (edges, weights) in self._found(network).items():
            bundle = network.bundles[name]
            value = bundle.weight.detach().flatten()[torch.from_numpy(weights.astype(np.int64))]
            if bool(value.any()):
                return Changes(f"{int(value.count_nonzero())} of {edges.size} edges removed from {name!r} have weights")
            if network.groups[bundle.target].aggregation == "max":
                return Changes(f"edges of weight 0 count in {bundle.target!r}, which aggregates by max")
        return SameFunction()

    def rewrite(self, edit: Edit) -> None:
        for name, (edges, _) in self._found(edit.before).items():
            bundle = edit.before.bundles[name]
            keep = np.ones(bundle.pattern.count(*edit.before.shapes(bundle)), bool)
            keep[edges] = False
            edit.keep_edges(name, keep)


@dataclass(frozen=True, eq=False)
class _At:
    """Where edges stand among those given (`index`), and the local indices of their ends."""

    index: Ints
    source: Ints
    target: Ints


def _by_bundle(network: Network, edges: Pairs) -> dict[tuple[str, str], _At]:
    """The edges by their pair of groups, in order of appearance."""
    sources, s = locate(network, [u for u, _ in edges])
    targets, t = locate(network, [v for _, v in edges])
    found: dict[tuple[str, str], list[int]] = {}
    for n, ends in enumerate(zip(sources, targets, strict=True)):
        found.setdefault(ends, []).append(n)
    return {ends: _At(np.array(n), s[n], t[n]) for ends, n in found.items()}


def _text(edge: tuple[int, int]) -> str:
    return f"{edge[0]} -> {edge[1]}"
