"""Single neurons and edges: finding them by number, and adding edges to the bundle that holds such edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from irgrow.ir.edit import Edit
from irgrow.ir.errors import CyclicNetwork, InvalidNetwork, Refused, UnknownName, Unreachable
from irgrow.ir.lineage import Flat
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Conv2d, Dense, Sparse, size

Ints = NDArray[np.int64]


def locate(network: Network, ids: Iterable[int]) -> tuple[list[str], Ints]:
    """The group and the local index of each neuron number; UnknownName for a number that is none."""
    wanted = np.asarray(list(ids), np.int64)
    names = list(network.groups)
    all_ids = [network.ids(name) for name in names]
    group = np.repeat(np.arange(len(names)), [i.size for i in all_ids])
    local = np.concatenate([np.arange(i.size) for i in all_ids])
    joined = np.concatenate(all_ids)
    order = np.argsort(joined)
    at = np.searchsorted(joined, wanted, sorter=order)
    known = at < joined.size
    known[known] = joined[order[at[known]]] == wanted[known]
    if not known.all():
        raise UnknownName(f"neuron {wanted[~known][0]}", expected="the number of a neuron of this network")
    return [names[g] for g in group[order[at]]], local[order[at]]


def edges_at(network: Network, bundle: Bundle, source: Ints, target: Ints) -> tuple[Ints, Ints]:
    """For each pair of local indices the bundle's edge between them and its weight's index; -1 where there is none."""
    shapes = network.shapes(bundle)
    columns = size(shapes[0])
    if isinstance(bundle.pattern, Dense):
        edge = target * columns + source
        return edge, edge
    s, t, w = bundle.pattern.all_edges(*shapes)
    key = t.astype(np.int64) * columns + s
    order = np.argsort(key)
    wanted = target * columns + source
    at = np.searchsorted(key, wanted, sorter=order)
    found = at < key.size
    found[found] = key[order[at[found]]] == wanted[found]
    edge = np.where(found, order[np.where(found, at, 0)] if key.size else -1, -1)
    return edge, np.where(found, w[np.where(found, edge, 0)] if key.size else -1, -1)


def ties(network: Network, bundle: Bundle) -> bool:
    """Whether some weight of the bundle is shared by several edges."""
    pattern = bundle.pattern
    if isinstance(pattern, (Dense, Sparse)):
        return getattr(pattern, "weight_index", None) is not None
    return pattern.count(*network.shapes(bundle)) > pattern.parameters(*network.shapes(bundle))


def add_edges(
    edit: Edit,
    source: str,
    target: str,
    s: Ints,
    t: Ints,
    weight: Tensor,
    *,
    trainable: bool = True,
    tags: Mapping[str, ArrayLike] | None = None,
    gathers: Sequence[Flat] = (),
) -> str:
    """The edges stand in the sparse bundle between the groups that has no ties and the same tags, or in a new one."""
    labels = {name: np.asarray(tag) for name, tag in (tags or {}).items()}
    for bundle in edit.bundles.values():
        p = bundle.pattern
        free = isinstance(p, Sparse) and p.weight_index is None and p.tags.keys() == labels.keys()
        if free and (bundle.source, bundle.target, bundle.trainable) == (source, target, trainable):
            edit.add_edges(bundle.name, s, t, weight, tags=labels, gathers=gathers)
            return bundle.name
    name = edit.free_name(f"{source}_{target}")
    weight = weight.detach().to(edit.before.dtype)
    edit.add_bundle(name, source, target, Sparse(s, t, tags=labels), weight, trainable=trainable, gathers=gathers)
    return name


def leaving_weights(bundle: Bundle, source: tuple[int, ...], target: tuple[int, ...], units: Ints) -> Tensor:
    """All weights of a bundle on edges that leave these units, flat."""
    pattern, weight = bundle.pattern, bundle.weight.detach()
    positions = size(source[1:])
    if isinstance(pattern, Sparse):
        return weight[pattern.index[np.isin(pattern.source // positions, units)].astype(np.int64)]
    if isinstance(pattern, Conv2d):
        inputs, outputs = source[0] // pattern.channel_groups, target[0] // pattern.channel_groups
        group = np.repeat(np.arange(pattern.channel_groups), outputs)
        rows = [np.flatnonzero(group == u // inputs) for u in units]
        columns = [np.full(r.size, u % inputs) for r, u in zip(rows, units, strict=True)]
        return weight[np.concatenate(rows), np.concatenate(columns)].flatten()
    if isinstance(pattern, Dense):
        return weight[:, (units[:, None] * positions + np.arange(positions)).ravel()].flatten()
    return weight.flatten()


def refuse_loops_of_norms(who: str, network: Network) -> None:
    """Raises Refused if a loop of groups holds one with a norm or dropout, which have no single level there."""
    for names, cyclic in network.components:
        for name in names:
            group = network.groups[name]
            if cyclic and (group.norm is not None or group.dropout):
                what = "is normalised" if group.norm is not None else "has dropout"
                raise Refused(who, f"a loop of groups through {name!r}, which {what}", "neither inside a loop")


def refuse_broken(who: str, edit: Edit) -> None:
    """Raises Refused if the network in progress is not well formed: a cycle of neurons, an output out of reach, ..."""
    network = edit.finish()[0]
    refuse_loops_of_norms(who, network)
    try:
        network.verify()
    except CyclicNetwork as error:
        raise Refused(who, error.found, "edges that close no cycle of neurons") from None
    except Unreachable as error:
        raise Refused(who, f"{error.found} of {error.who}", "every output within reach of an input") from None
    except InvalidNetwork as error:
        raise Refused(f"{who}: {error.who}", error.found, error.expected) from None
