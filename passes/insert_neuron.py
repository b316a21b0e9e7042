"""Inserting a neuron behind another one: the growing step of insertion-grown networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.lineage import Flat
from irgrow.ir.morphism import Changes, Promise
from irgrow.ir.network import Network
from irgrow.ir.pattern import Dense, Sparse
from irgrow.ir.units import UnitMap
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.passes.base import Pass, register

TAG = "primary"  # 1 on edges of pi0; a bundle without the tag has all its edges in pi0


@register
@dataclass(frozen=True)
class InsertNeuron(Pass):
    """A new neuron v stands behind its primary parent j and takes over j's deeper children.

        j --w_i--> i     becomes     j --new--> v --w_i--> i,  and parents - 1 others --new--> v

    Algorithm 1, in the reading that keeps the paper's remarks true: j is uniform over all neurons above the
    depth of the network that are no outputs; a child i of j moves to v if it is deeper than v, or as deep
    and (j, i) is in pi0; the pair moves along in both cases. The other parents are uniform over neurons not
    deeper than j. New weights are uniform in [-0.5, 0.5]. Exactly `parents` parameters are added.

    `after`, `others` and `weights` (j first) fix by neuron number what is drawn otherwise. New neurons
    stand in the flat group `group` without bias. Outputs change: an inserted neuron is not an identity.

    Refused: fewer candidates than `parents`, normalised groups, shared or fixed weights.
    Source: Caillon & Cerisara, Growing Neural Networks Achieve Flatter Minima, Algorithm 1.
    """

    parents: int = 2
    seed: int = 0
    activation: str = "relu"
    group: str = "inserted"
    after: int | None = None
    others: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    reference: ClassVar[str] = "Caillon & Cerisara 2021, Algorithm 1"

    @classmethod
    def places(cls, network: Network) -> Iterator[InsertNeuron]:
        for seed in range(3):
            candidate = cls(parents=min(2, len(network.inputs)), seed=seed)
            try:
                candidate.requires(network)
            except Refused:
                return
            yield candidate

    def promise(self, network: Network) -> Promise:
        return Changes("an inserted neuron passes its parent's value through new weights and an activation")

    def requires(self, network: Network) -> None:
        who = "InsertNeuron"
        if self.activation not in ACTIVATIONS:
            raise UnknownName(f"activation {self.activation!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
        for b in network.bundles.values():
            tied = not isinstance(b.pattern, (Dense, Sparse)) or getattr(b.pattern, "weight_index", None) is not None
            if tied or not b.trainable:
                raise Refused(
                    f"{who}: bundle {b.name!r}",
                    f"{b.pattern!r}",
                    "trained weights of their own on every edge",
                )
        for g in network.groups.values():
            if g.norm is not None or g.dropout:
                what = "dropout" if g.norm is None else f"a {g.norm.kind} norm"
                raise Refused(f"{who}: group {g.name!r}", what, "neither norm nor dropout")
        home = network.groups.get(self.group)
        if home is not None and (len(home.shape) > 1 or home.activation != self.activation or home.bias is not None):
            raise Refused(
                f"{who}: group {self.group!r}",
                f"shape {home.shape}, {home.activation}",
                f"a flat {self.activation} group without bias",
                do="give another `group`",
            )
        if home is not None and not network.is_hidden(self.group):
            raise Refused(f"{who}: group {self.group!r}", "an input or output", "a hidden group")
        if self.parents < 1:
            raise Refused(who, f"parents={self.parents}", "at least 1")
        if self.weights is not None and (len(self.weights) != self.parents or not np.all(np.isfinite(self.weights))):
            raise Refused(f"{who}: weights", self.weights, f"{self.parents} finite numbers, the primary parent's first")
        self._choose(network)

    def _choose(self, network: Network) -> tuple[int, list[int], list[float]]:
        """The primary parent and the others (global neuron indices, in group order) and the new weights."""
        last = network.__dict__.get("_chosen")  # `requires` and `rewrite` ask one after the other
        if last is None or last[0] is not self:
            last = network.__dict__["_chosen"] = self, self._chosen(network)
        return last[1]

    def _chosen(self, network: Network) -> tuple[int, list[int], list[float]]:
        draw = np.random.default_rng(self.seed)
        level = np.concatenate([network.levels[name] for name in network.groups])
        inner = np.concatenate([np.full(g.neurons, g.name not in network.outputs) for g in network.groups.values()])
        if self.after is None:
            candidates = np.flatnonzero(inner & (level < level.max()))
            if candidates.size == 0:
                raise Refused("InsertNeuron", "no neuron above the depth of the network", "at least one edge")
            j = int(draw.choice(candidates))
        else:
            j = self._global(network, self.after)
            if not inner[j]:
                raise Refused(
                    f"InsertNeuron: after neuron {self.after}",
                    "an output neuron",
                    "an input or hidden neuron",
                )
        allowed = np.flatnonzero(inner & (level <= level[j]))
        allowed = allowed[allowed != j]
        if self.others is None:
            if allowed.size < self.parents - 1:
                raise Refused(
                    f"InsertNeuron: parents={self.parents}",
                    f"{allowed.size + 1} neurons that are not deeper than the primary parent",
                    f"at least {self.parents}",
                    do="use fewer parents (at most as many as there are inputs)",
                )
            others = draw.choice(allowed, self.parents - 1, replace=False).tolist()
        else:
            others = [self._global(network, k) for k in self.others]
            if len(set(others)) != self.parents - 1 or not set(others) <= set(allowed.tolist()):
                raise Refused(
                    f"InsertNeuron: others={self.others}",
                    expected=f"{self.parents - 1} different neurons, not deeper than the primary parent and no outputs",
                )
        weights = list(self.weights) if self.weights is not None else draw.uniform(-0.5, 0.5, self.parents).tolist()
        return j, others, weights

    @staticmethod
    def _global(network: Network, id: int) -> int:
        neuron, first = network.neuron(id), 0
        for name, group in network.groups.items():
            if name == neuron.group:
                return first + neuron.unit * group.positions + neuron.position
            first += group.neurons
        raise AssertionError("network.neuron found a group that is not there")

    def rewrite(self, edit: Edit) -> None:
        network = edit.before
        j, others, weights = self._choose(network)
        place = _places(network)
        parent, local = place(j)
        depth = int(network.levels[parent][local]) + 1
        if self.group in network.groups:
            units = network.groups[self.group].units
            edit.rewire({self.group: UnitMap(np.append(np.arange(units), -1))})
            v = units
        else:
            edit.add_group(self.group, (1,), activation=self.activation)
            v = 0
        for bundle in network.leaving(parent):
            self._move_children(edit, bundle.name, local, depth, v)
        rows: dict[str, tuple[list[int], list[float], list[int]]] = {}
        for n, (k, w) in enumerate(zip([j, *others], weights, strict=True)):
            name, at = place(k)
            sources, values, primary = rows.setdefault(name, ([], [], []))
            sources.append(at)
            values.append(w)
            primary.append(int(n == 0))
        for name, (sources, values, primary) in rows.items():
            weight = torch.tensor(values, dtype=torch.float64)
            self._add(edit, name, self.group, np.array(sources), np.full(len(sources), v), weight, np.array(primary))

    def _move_children(self, edit: Edit, name: str, local: int, depth: int, v: int) -> None:
        """The children of neuron `local` that must move go from this bundle to one that begins at v."""
        bundle = edit.bundles[name]
        shapes = edit.shapes(name)
        level = edit.before.levels[bundle.target]
        if isinstance(bundle.pattern, Dense):
            target = np.arange(shapes[1][0] if len(shapes[1]) == 1 else level.size)
            edge = target * int(np.prod(shapes[0])) + local
            primary = np.ones(target.size, bool)
        else:
            sparse = bundle.pattern
            assert isinstance(sparse, Sparse)
            edge = np.flatnonzero(sparse.source == local)
            target = sparse.target[edge].astype(np.int64)
            primary = sparse.tags[TAG][edge] > 0 if TAG in sparse.tags else np.ones(edge.size, bool)
        moves = (level[target] > depth) | ((level[target] == depth) & primary)
        edge, target, primary = edge[moves], target[moves], primary[moves]
        if edge.size == 0:
            return
        index = torch.from_numpy(edge.astype(np.int64))
        old = tuple(bundle.weight.shape)
        weight = bundle.weight.detach().reshape(-1)[index]
        select = Flat(bundle.tensor, old, (edge.size,), index)
        gathers = [g.then(select).flat() for g in edit.gathers(bundle.tensor)]
        keep = np.ones(bundle.pattern.count(*shapes), bool)
        keep[edge] = False
        edit.keep_edges(name, keep)
        source = np.full(edge.size, v)
        self._add(edit, self.group, bundle.target, source, target, weight, primary.astype(np.int32), gathers)

    def _add(self, edit: Edit, source: str, target: str, s, t, weight, primary, gathers=()) -> None:  # type: ignore[no-untyped-def]
        """Edges with their tags, into the bundle between the two groups that holds such edges, or a new one."""
        for bundle in edit.bundles.values():
            if (bundle.source, bundle.target) == (source, target) and isinstance(bundle.pattern, Sparse):
                held = bundle.pattern.target[bundle.pattern.source == s[0]]
                if not set(held.tolist()).isdisjoint(np.asarray(t).tolist()):
                    continue  # parallel edges of two bundles stay in two bundles
                if TAG not in bundle.pattern.tags:
                    edit.tag_edges(bundle.name, TAG, np.ones(bundle.pattern.source.size))
                edit.add_edges(bundle.name, s, t, weight, tags={TAG: primary}, gathers=gathers)
                return
        pattern = Sparse(s, t, tags={TAG: np.asarray(primary, np.int32)})
        name = edit.free_name(f"{source}_{target}")
        edit.add_bundle(name, source, target, pattern, weight.to(edit.before.dtype), gathers=gathers)


def _places(network: Network):  # type: ignore[no-untyped-def]
    """A function from a global neuron index to (group, local index)."""
    names = list(network.groups)
    first = np.cumsum([0] + [g.neurons for g in network.groups.values()])

    def place(index: int) -> tuple[str, int]:
        at = int(np.searchsorted(first, index, side="right")) - 1
        return names[at], int(index - first[at])

    return place
