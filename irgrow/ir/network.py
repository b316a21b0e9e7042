"""`Network`: groups of neurons and bundles of edges, an immutable value.

A neuron is addressed in three ways: by group and local index (`unit * positions + position`, what kernels
use), by unit (what grows), and by a number that never changes: its unit's serial plus its position.

Tensors have one name everywhere (lineages, state dicts, files): `<kind>.<owner>`, for example
`weight.input_hidden`, `bias.hidden`, and for a normalisation `scale`, `shift`, `mean`, `variance`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.ir.errors import BadName, BadShape, UnknownName
from irgrow.ir.pattern import Pattern, Shape, Sparse, size
from irgrow.kernels.activations import ACTIVATIONS, Activation


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalisation between aggregation and activation: (z - mean) / sqrt(variance + eps) * scale + shift.

    kind `batch`: statistics per unit over samples and positions; in eval mode the running `mean` and
    `variance` (per unit). kind `layer`: over all units and positions of one sample; kind `group`: the same
    over each of `groups` equal ranges of units. `scale` and `shift` are per unit.
    """

    kind: str
    scale: Tensor
    shift: Tensor
    mean: Tensor | None = None
    variance: Tensor | None = None
    eps: float = 1e-5
    momentum: float = 0.1
    groups: int = 1

    @property
    def across_units(self) -> bool:
        """Whether one unit's value depends on other units of its group."""
        return self.kind != "batch"


@dataclass(frozen=True, eq=False)
class Group:
    """A block of neurons with one activation, one aggregation and optionally a bias and a normalisation.

    `shape = (units, *positions)`; `bias` has one entry per unit. `dropout` is the probability with which
    an activation is zeroed in train mode. `serials[u]` is the number of unit u's first neuron.
    """

    name: str
    shape: Shape
    activation: str = "identity"
    aggregation: str = "sum"
    bias: Tensor | None = None
    norm: Norm | None = None
    dropout: float = 0.0
    serials: NDArray[np.int64] = None  # type: ignore[assignment]

    @property
    def units(self) -> int:
        return self.shape[0]

    @property
    def positions(self) -> int:
        return size(self.shape[1:])

    @property
    def neurons(self) -> int:
        return size(self.shape)

    @property
    def function(self) -> Activation:
        return ACTIVATIONS[self.activation]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.bias is not None:
            yield f"bias.{self.name}", self.bias
        if self.norm is not None:
            for kind in ("scale", "shift", "mean", "variance"):
                tensor = getattr(self.norm, kind)
                if tensor is not None:
                    yield f"{kind}.{self.name}", tensor

    def describe(self) -> dict[str, Any]:
        """Everything but tensors and serials, as plain data."""
        norm = self.norm
        return {
            "name": self.name,
            "shape": list(self.shape),
            "activation": self.activation,
            "aggregation": self.aggregation,
            "bias": self.bias is not None,
            "dropout": self.dropout,
            "norm": norm and {f: getattr(norm, f) for f in ("kind", "eps", "momentum", "groups")},
        }


@dataclass(frozen=True, eq=False)
class Bundle:
    """The edges from one group to another: a pattern and its weights (`trainable=False`: fixed weights)."""

    name: str
    source: str
    target: str
    pattern: Pattern
    weight: Tensor
    trainable: bool = True

    @property
    def tensor(self) -> str:
        """The name of the weight tensor."""
        return f"weight.{self.name}"


class Unit(NamedTuple):
    """One unit of a group, by its serial; prints as `hidden#12`."""

    group: str
    serial: int

    def __str__(self) -> str:
        return f"{self.group}#{self.serial}"


class Neuron(NamedTuple):
    """One neuron: its number, and where it is."""

    id: int
    group: str
    unit: int
    position: int


class Counts(NamedTuple):
    """How big a network is. `parameters`: trained numbers; `multiply_adds`: edges with a weight of their own."""

    neurons: int
    edges: int
    parameters: int
    multiply_adds: int


@dataclass(frozen=True, eq=False)
class Network:
    """Groups and bundles by name, in order; which groups are inputs and outputs; the next free serial.

    `frozen` maps names of tensors to masks (bool, on the CPU): these entries are there, and are not trained.
    Rewrites carry them along: an entry that comes from a frozen one is frozen.
    """

    groups: Mapping[str, Group]
    bundles: Mapping[str, Bundle]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    next_serial: int
    frozen: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in ("groups", "bundles", "frozen"):
            object.__setattr__(self, table, MappingProxyType(dict(getattr(self, table))))

    @staticmethod
    def build(
        groups: Iterable[Group], bundles: Iterable[Bundle], inputs: Iterable[str], outputs: Iterable[str]
    ) -> Network:
        """A network of these groups (fresh serials where a group has none) and bundles; names must be unique."""
        groups = list(groups)
        by_name: dict[str, Group] = {}
        given = [g for g in groups if g.serials is not None]
        following = max((int(g.serials.max(initial=-1)) + g.positions for g in given), default=0)
        for group in groups:
            if group.name in by_name:
                raise BadName(f"group {group.name!r}", "a second group of that name", "unique names")
            if group.serials is None:
                serials = following + group.positions * np.arange(group.units, dtype=np.int64)
                following += group.neurons
                group = replace(group, serials=serials)
            by_name[group.name] = group
        wires: dict[str, Bundle] = {}
        for bundle in bundles:
            if bundle.name in wires:
                raise BadName(f"bundle {bundle.name!r}", "a second bundle of that name", "unique names")
            wires[bundle.name] = bundle
        return Network(by_name, wires, tuple(inputs), tuple(outputs), following)

    # ---- names ------------------------------------------------------------------------------------------

    def group(self, name: str) -> Group:
        """The group of that name; UnknownName lists the names there are."""
        try:
            return self.groups[name]
        except KeyError:
            raise UnknownName(f"group {name!r}", expected=f"one of {', '.join(self.groups)}") from None

    def bundle(self, name: str) -> Bundle:
        """The bundle of that name; UnknownName lists the names there are."""
        try:
            return self.bundles[name]
        except KeyError:
            raise UnknownName(f"bundle {name!r}", expected=f"one of {', '.join(self.bundles)}") from None

    def entering(self, group: str) -> list[Bundle]:
        """The bundles into a group, in edge order."""
        return self._wires[1].get(group, [])

    def leaving(self, group: str) -> list[Bundle]:
        """The bundles out of a group."""
        return self._wires[0].get(group, [])

    @cached_property
    def _wires(self) -> tuple[dict[str, list[Bundle]], dict[str, list[Bundle]]]:
        leaving: dict[str, list[Bundle]] = {}
        entering: dict[str, list[Bundle]] = {}
        for bundle in self.bundles.values():
            leaving.setdefault(bundle.source, []).append(bundle)
            entering.setdefault(bundle.target, []).append(bundle)
        return leaving, entering

    def shapes(self, bundle: Bundle) -> tuple[Shape, Shape]:
        """The shapes of a bundle's source and target groups."""
        return self.groups[bundle.source].shape, self.groups[bundle.target].shape

    def is_hidden(self, group: str) -> bool:
        return group not in self.inputs and group not in self.outputs

    def unit(self, group: str, index: int) -> Unit:
        """Unit `index` of a group, named by its serial."""
        serials = self.group(group).serials
        if not -serials.size <= index < serials.size:
            raise UnknownName(f"unit {index} of group {group!r}", expected=f"0 to {serials.size - 1}")
        return Unit(group, int(serials[index]))

    def index(self, unit: Unit) -> int:
        """Where a unit is stored today."""
        found = np.flatnonzero(self.group(unit.group).serials == unit.serial)
        if found.size == 0:
            raise UnknownName(f"unit {unit}", expected=f"a serial of group {unit.group!r}")
        return int(found[0])

    # ---- tensors ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name: weights in bundle order, then those of the groups."""
        found = {bundle.tensor: bundle.weight for bundle in self.bundles.values()}
        for group in self.groups.values():
            found.update(group.tensors())
        return found

    def trainable(self) -> list[str]:
        """The names of the tensors that are trained."""
        fixed = {bundle.tensor for bundle in self.bundles.values() if not bundle.trainable}
        return [n for n in self.tensors() if n not in fixed and not n.startswith(("mean.", "variance."))]

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Network:
        """The same structure with these tensors in place of the old ones (those not named stay)."""
        current = self.tensors()
        for name, tensor in tensors.items():
            if name not in current:
                raise UnknownName(f"tensor {name!r}", expected=f"one of {', '.join(current)}")
            if tensor.shape != current[name].shape:
                raise BadShape(f"tensor {name!r}", tuple(tensor.shape), tuple(current[name].shape))
        bundles = {
            n: replace(b, weight=tensors[b.tensor]) if b.tensor in tensors else b for n, b in self.bundles.items()
        }
        groups = {}
        for name, group in self.groups.items():
            new = {kind: tensors[f"{kind}.{name}"] for kind in _KINDS if f"{kind}.{name}" in tensors}
            if "bias" in new:
                group = replace(group, bias=new.pop("bias"))
            if new:
                group = replace(group, norm=replace(group.norm, **new))  # type: ignore[type-var]
            groups[name] = group
        after = Network(groups, bundles, self.inputs, self.outputs, self.next_serial, self.frozen)
        for cached in ("components", "levels", "structure"):  # the structure is the same
            if cached in self.__dict__:
                after.__dict__[cached] = self.__dict__[cached]
        return after

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Network:
        """The same network with its tensors in another dtype or on another device."""
        return self.with_tensors({n: t.to(device=device, dtype=dtype) for n, t in self.tensors().items()})

    def clone(self) -> Network:
        """The same network with tensors of its own."""
        return self.with_tensors({n: t.detach().clone() for n, t in self.tensors().items()})

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors().values())).dtype if self.bundles else torch.get_default_dtype()

    # ---- order ------------------------------------------------------------------------------------------

    @cached_property
    def components(self) -> list[tuple[tuple[str, ...], bool]]:
        """Strongly connected parts of the group graph in topological order, and whether each holds a loop."""
        from irgrow.ir.levels import components

        return components(self)

    @cached_property
    def levels(self) -> Mapping[str, NDArray[np.int32]]:
        """Per group the depth of every neuron: the longest path from a neuron without parents.

        Raises CyclicNetwork. The neurons of a normalised group share its deepest level: their statistics
        are taken together (those of a batch norm in train mode).
        """
        from irgrow.ir.levels import levels

        return levels(self)

    @property
    def depth(self) -> int:
        """The longest path, in edges."""
        return max((int(level.max(initial=0)) for level in self.levels.values()), default=0)

    # ---- neurons ----------------------------------------------------------------------------------------

    def neurons(self) -> Iterator[Neuron]:
        """Every neuron, group by group."""
        for group in self.groups.values():
            for unit, serial in enumerate(group.serials.tolist()):
                for position in range(group.positions):
                    yield Neuron(serial + position, group.name, unit, position)

    def ids(self, group: str) -> NDArray[np.int64]:
        """The numbers of a group's neurons, by local index."""
        g = self.group(group)
        return (g.serials[:, None] + np.arange(g.positions)).ravel()

    def neuron(self, id: int) -> Neuron:
        """Where the neuron with that number is."""
        for group in self.groups.values():
            unit = np.flatnonzero((group.serials <= id) & (id < group.serials + group.positions))
            if unit.size:
                return Neuron(id, group.name, int(unit[0]), int(id - group.serials[unit[0]]))
        raise UnknownName(f"neuron {id}", expected="the number of a neuron of this network")

    def edges(self) -> Iterator[tuple[int, int, float]]:
        """Every edge as (parent's number, child's number, weight), bundle by bundle."""
        for bundle in self.bundles.values():
            source, target = self.ids(bundle.source), self.ids(bundle.target)
            weight = bundle.weight.detach().double().flatten().cpu().numpy()
            for s, t, w in bundle.pattern.edges(*self.shapes(bundle)):
                yield from zip(source[s].tolist(), target[t].tolist(), weight[w].tolist(), strict=True)

    def parents(self, id: int) -> list[int]:
        """The numbers of a neuron's parents, in edge order."""
        return self._adjacency.parents(id)

    def children(self, id: int) -> list[int]:
        """The numbers of a neuron's children."""
        return self._adjacency.children(id)

    @cached_property
    def _adjacency(self) -> Any:
        from irgrow.ir.adjacency import Adjacency

        return Adjacency(self)

    @cached_property
    def counts(self) -> Counts:
        """Neurons, edges, parameters, multiply-adds."""
        edges = multiply_adds = parameters = 0
        for bundle in self.bundles.values():
            shapes = self.shapes(bundle)
            count = bundle.pattern.count(*shapes)
            edges += count
            multiply_adds += count if bundle.weight.dim() else 0
            parameters += bundle.pattern.parameters(*shapes) if bundle.trainable else 0
        for name in self.trainable():
            if not name.startswith("weight."):
                parameters += self.tensors()[name].numel()
            if name in self.frozen:
                parameters -= int(self.frozen[name].sum())
        return Counts(sum(g.neurons for g in self.groups.values()), edges, parameters, multiply_adds)

    # ---- checking, equality, text -------------------------------------------------------------------------

    def verify(self) -> Network:
        """This network, if it is well formed; else one named error (irgrow.ir.verify lists them)."""
        from irgrow.ir.verify import verify

        return verify(self)

    @cached_property
    def structure(self) -> str:
        """A hash of everything but the tensors' values: equal structures have equal hashes."""
        digest = hashlib.sha256()
        digest.update(json.dumps(self.describe(), sort_keys=True).encode())
        for group in self.groups.values():
            digest.update(np.ascontiguousarray(group.serials, np.int64).data)
        for bundle in self.bundles.values():
            if isinstance(bundle.pattern, Sparse):
                for array in (bundle.pattern.source, bundle.pattern.target, bundle.pattern.weight_index):
                    if array is not None:
                        digest.update(np.ascontiguousarray(array).data)
                for _, tag in sorted(bundle.pattern.tags.items()):
                    digest.update(np.ascontiguousarray(tag).data)
        for name, mask in sorted(self.frozen.items()):
            digest.update(name.encode() + mask.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def describe(self) -> dict[str, Any]:
        """The structure as plain data (index arrays and serials left out)."""
        return {
            "groups": [g.describe() for g in self.groups.values()],
            "bundles": [
                {
                    "name": b.name,
                    "source": b.source,
                    "target": b.target,
                    "pattern": describe_pattern(b.pattern),
                    "trainable": b.trainable,
                }
                for b in self.bundles.values()
            ],
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "next_serial": self.next_serial,
        }

    def __eq__(self, other: object) -> bool:
        """The same structure and bit-equal tensors."""
        if not isinstance(other, Network):
            return NotImplemented
        if self.structure != other.structure:
            return False
        mine, theirs = self.tensors(), other.tensors()
        return all(mine[n].dtype == theirs[n].dtype and torch.equal(mine[n], theirs[n]) for n in mine)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self.clone()  # keeps what was computed about the structure

    def __reduce__(self) -> tuple[Any, ...]:
        tables = dict(self.groups), dict(self.bundles)
        return Network, (*tables, self.inputs, self.outputs, self.next_serial, dict(self.frozen))

    def __str__(self) -> str:
        from irgrow.ir.text import network_text

        return network_text(self)

    def __repr__(self) -> str:
        c = self.counts
        return f"<Network: {len(self.groups)} groups, {c.neurons} neurons, {c.edges} edges, {c.parameters} parameters>"


_KINDS = ("bias", "scale", "shift", "mean", "variance")


def describe_pattern(pattern: Pattern) -> dict[str, Any]:
    """A pattern as plain data; of a Sparse one its sizes and tag names, not its arrays."""
    kind = type(pattern).__name__
    if isinstance(pattern, Sparse):
        return {
            "kind": kind,
            "edges": int(pattern.source.size),
            "weights": pattern.weights,
            "tied": pattern.weight_index is not None,
            "tags": sorted(pattern.tags),
        }
    fields = {f: getattr(pattern, f) for f in getattr(pattern, "__dataclass_fields__", {})}
    return {"kind": kind, **{f: list(v) if isinstance(v, tuple) else v for f, v in fields.items()}}
