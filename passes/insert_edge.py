"""Inserting a neuron into one edge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from irgrow.ir.edit import Edit
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.lineage import Flat
from irgrow.ir.morphism import Changes, Promise, SameFunction
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Sparse
from irgrow.ir.units import UnitMap
from irgrow.kernels.activations import ACTIVATIONS
from irgrow.passes.add_layer import KEEPS_NON_NEGATIVE, NON_NEGATIVE
from irgrow.passes.base import Pass, register
from irgrow.passes.wiring import add_edges, edges_at, locate, refuse_broken, ties


@register
@dataclass(frozen=True)
class InsertOnEdge(Pass):
    """A new neuron stands on the edge; with weight 1 and a fitting activation every output stays the same.

        u --w--> v     becomes     u --weight--> new --w--> v

    `parent` and `child` are neuron numbers, `bundle` says which where several bundles join them. The old
    weight moves along (its tags too, which the new edge shares); one that was shared becomes the edge's own,
    without gradient history. The new neuron has no bias and stands in the flat group `group`; by default in
    one for this pair of groups, `<source>_<target>_inserted`.

    Promise: SameFunction if weight is 1 and the activation leaves the parent's values as they are (identity;
    the parent's own, if idempotent; ReLU-like on non-negative values), else Changes.
    Refused: no such edge, a home group with other properties, a home that would close a loop of groups
    around a norm.
    Source: the add-node mutation of NEAT (Stanley & Miikkulainen 2002), made exact.
    """

    parent: int
    child: int
    activation: str = "identity"
    weight: float = 1.0
    group: str | None = None
    bundle: str | None = None
    reference: ClassVar[str] = "NEAT, Stanley & Miikkulainen 2002, section 3.1"

    @classmethod
    def places(cls, network: Network) -> Iterator[InsertOnEdge]:
        for bundle in network.bundles.values():
            s, t, _ = bundle.pattern.all_edges(*network.shapes(bundle))
            source, target = network.ids(bundle.source), network.ids(bundle.target)
            for edge in dict.fromkeys((0, s.size // 2)):
                if s.size == 0:
                    break
                for activation in ("identity", "relu"):
                    ends = int(source[s[edge]]), int(target[t[edge]])
                    candidate = cls(*ends, activation, bundle=bundle.name)
                    try:
                        candidate.requires(network)
                    except Refused:
                        continue
                    yield candidate

    def requires(self, network: Network) -> None:
        who = f"InsertOnEdge: edge {self.parent} -> {self.child}"
        if self.activation not in ACTIVATIONS:
            raise UnknownName(f"activation {self.activation!r}", expected=f"one of {', '.join(ACTIVATIONS)}")
        if not np.isfinite(self.weight):
            raise Refused(who, f"weight {self.weight}", "a finite number")
        bundle, _, _, _ = self._edge(network)
        home = network.groups.get(self._home(network, bundle))
        if home is not None:
            plain = home.bias is None and home.norm is None and home.aggregation == "sum" and len(home.shape) == 1
            sparse = all(
                isinstance(b.pattern, Sparse) for b in network.entering(home.name) + network.leaving(home.name)
            )
            if not (network.is_hidden(home.name) and plain and sparse and home.activation == self.activation):
                raise Refused(
                    f"{who}: group {home.name!r}",
                    "a group of another kind",
                    f"a hidden flat {self.activation} group that sums, without bias and norm, with sparse bundles only",
                    do="give another `group`",
                )
            trial = Edit(network)
            self.rewrite(trial)
            refuse_broken(who, trial)

    def _edge(self, network: Network) -> tuple[Bundle, tuple[int, int], int, int]:
        """The bundle, the local indices of the edge's ends, the edge, and its weight's index."""
        who = f"InsertOnEdge: edge {self.parent} -> {self.child}"
        (source, target), local = locate(network, (self.parent, self.child))
        names = [b.name for b in network.leaving(source) if b.target == target]
        if self.bundle is not None:
            names = [name for name in names if name == network.bundle(self.bundle).name]
        found = []
        for name in names:
            edge, weight = edges_at(network, network.bundles[name], local[:1], local[1:])
            if edge[0] >= 0:
                found.append((network.bundles[name], (int(local[0]), int(local[1])), int(edge[0]), int(weight[0])))
        if not found:
            where = f" in bundle {self.bundle!r}" if self.bundle else ""
            raise Refused(who, f"no such edge{where}", "an edge of this network")
        if len(found) > 1:
            raise Refused(who, f"it in {', '.join(b.name for b, *_ in found)}", "one bundle", do="give `bundle`")
        return found[0]

    def _home(self, network: Network, bundle: Bundle) -> str:
        if self.group is not None:
            return self.group
        base = name = f"{bundle.source}_{bundle.target}_inserted"
        n = 1
        while name in network.bundles or (
            name in network.groups and network.groups[name].activation != self.activation
        ):
            n += 1
            name = f"{base}_{n}"
        return name

    def promise(self, network: Network) -> Promise:
        given = network.groups[self._edge(network)[0].source].activation
        same = given == self.activation and ACTIVATIONS[given].idempotent
        kept = given in NON_NEGATIVE and self.activation in KEEPS_NON_NEGATIVE
        if self.weight == 1.0 and (self.activation == "identity" or same or kept):
            return SameFunction()
        return Changes(f"the parent's value passes through weight {self.weight:g} and {self.activation}")

    def rewrite(self, edit: Edit) -> None:
        network = edit.before
        bundle, (u, v), edge, at = self._edge(network)
        home = self._home(network, bundle)
        if home in network.groups:
            new = network.groups[home].units
            edit.rewire({home: UnitMap(np.append(np.arange(new), -1))})
        else:
            new = 0
            edit.add_group(home, (1,), activation=self.activation)
        tags = {}
        if isinstance(bundle.pattern, Sparse):
            tags = {name: tag[edge : edge + 1] for name, tag in bundle.pattern.tags.items()}
        keep = np.ones(bundle.pattern.count(*network.shapes(bundle)), bool)
        keep[edge] = False
        gradient = torch.full((1,), torch.nan, dtype=torch.float64) if ties(network, bundle) else None
        gather = Flat(bundle.tensor, tuple(bundle.weight.shape), (1,), torch.tensor([at]), None, gradient)
        moved = bundle.weight.detach().reshape(-1)[at : at + 1]
        edit.keep_edges(bundle.name, keep)
        one = np.zeros(1, np.int64)
        weight = torch.full((1,), self.weight, dtype=torch.float64)
        add_edges(edit, bundle.source, home, one + u, one + new, weight, tags=tags)
        add_edges(
            edit, home, bundle.target, one + new, one + v, moved,
            trainable=bundle.trainable, tags=tags, gathers=[gather],
        )  # fmt: skip
