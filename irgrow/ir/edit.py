"""`Edit`: the only way from one `Network` to the next.

A transaction: it starts from a network, a pass changes it, `finish()` freezes the next network and the
lineage of every tensor. Nothing of the old network is modified, and an edit that raises leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from irgrow.ir.errors import BadName, BadShape, Refused
from irgrow.ir.lineage import Axes, Flat, Gather, Lineage
from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Conv2d, Dense, Identity, Pattern, Shape, Sparse, size
from irgrow.ir.units import UnitMap, close, grouped_channels, new_start


class Edit:
    """One rewrite in progress: growable tables of groups, bundles and gathers."""

    def __init__(self, network: Network) -> None:
        self.before = network
        self.groups = dict(network.groups)
        self.bundles = dict(network.bundles)
        self.inputs, self.outputs = network.inputs, network.outputs
        self.next_serial = network.next_serial
        self._gathers: dict[str, tuple[Gather, ...]] = {
            name: (Axes.same(name, tensor),) for name, tensor in network.tensors().items()
        }
        self._masks: dict[str, Tensor] = {}

    # ---- groups and bundles -------------------------------------------------------------------------------

    def free_name(self, wanted: str) -> str:
        """`wanted`, or `wanted_2`, `wanted_3`, ...: the first that is taken by no group or bundle."""
        taken, name, n = self.groups.keys() | self.bundles.keys(), wanted, 1
        while name in taken:
            n += 1
            name = f"{wanted}_{n}"
        return name

    def add_group(self, name: str, shape: Sequence[int], **properties: Any) -> Group:
        """A new group (properties as of `Group`); its units get fresh serials."""
        if name in self.groups:
            raise BadName(f"group {name!r}", "a group of that name", "a new name", do="see Edit.free_name")
        group = Group(name, tuple(shape), **properties)
        serials = self.next_serial + group.positions * np.arange(group.units, dtype=np.int64)
        self.next_serial += group.neurons
        self.groups[name] = group = replace(group, serials=serials)
        return group

    def add_bundle(
        self,
        name: str,
        source: str,
        target: str,
        pattern: Pattern,
        weight: Tensor,
        *,
        trainable: bool = True,
        gathers: Sequence[Gather] = (),
    ) -> Bundle:
        """A new bundle; `gathers` say which old weights its weights come from (none: fresh)."""
        if name in self.bundles:
            raise BadName(f"bundle {name!r}", "a bundle of that name", "a new name", do="see Edit.free_name")
        self.bundles[name] = bundle = Bundle(name, source, target, pattern, weight, trainable)
        self._gathers[bundle.tensor] = tuple(gathers)
        return bundle

    def remove_bundle(self, name: str) -> tuple[Bundle, tuple[Gather, ...]]:
        """Takes a bundle away; returns it and where its weights came from."""
        bundle = self.bundles.pop(name)
        return bundle, self._gathers.pop(bundle.tensor)

    def remove_group(self, name: str) -> None:
        """Takes away a group that no bundle touches."""
        used = [b.name for b in self.bundles.values() if name in (b.source, b.target)]
        if used:
            raise BadName(f"group {name!r}", f"bundles {used} at it", "none", do="remove or redirect them first")
        for tensor, _ in self.groups.pop(name).tensors():
            del self._gathers[tensor]

    def redirect(self, name: str, *, source: str | None = None, target: str | None = None) -> None:
        """The bundle begins or ends at another group of the same shape; its weights stay."""
        bundle = self.bundles[name]
        self.bundles[name] = replace(bundle, source=source or bundle.source, target=target or bundle.target)

    def gathers(self, tensor: str) -> tuple[Gather, ...]:
        """Where a tensor of the network in progress comes from."""
        return self._gathers[tensor]

    def shapes(self, bundle: str) -> tuple[Shape, Shape]:
        b = self.bundles[bundle]
        return self.groups[b.source].shape, self.groups[b.target].shape

    def view(self) -> Network:
        """The network in progress, not verified."""
        return Network(self.groups, self.bundles, self.inputs, self.outputs, self.next_serial)

    # ---- values -------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> Tensor:
        """A tensor of the network in progress, by name."""
        kind, owner = name.split(".")
        if kind == "weight":
            return self.bundles[owner].weight
        group = self.groups[owner]
        found: Any = group.bias if kind == "bias" else getattr(group.norm, kind)
        return found

    def write(self, name: str, value: Tensor) -> None:
        """Sets a tensor's values; where it comes from stays (the difference is fresh).

        Entries that come from frozen ones, or from fixed weights, keep theirs.
        """
        old = self.tensor(name)
        if value.shape != old.shape:
            raise BadShape(f"tensor {name!r}", tuple(value.shape), tuple(old.shape))
        value = value.detach().to(old)
        still = self._still(name)
        self._put(name, value if still is None else torch.where(still.to(old.device), old.detach(), value))

    def _still(self, name: str) -> Tensor | None:
        """Which entries of a tensor are not to be written."""
        fixed = {bundle.tensor for bundle in self.before.bundles.values() if not bundle.trainable}
        parts = [g.covers() for g in self._gathers.get(name, ()) if g.source in fixed]
        frozen = self.frozen(name)
        parts += [] if frozen is None else [frozen]
        return torch.stack(parts).any(0) if parts else None

    def frozen(self, name: str) -> Tensor | None:
        """Which entries of a tensor of the network in progress are frozen; None: none."""
        if name in self._masks:
            return self._masks[name]
        old = [(g, self.before.frozen[g.source]) for g in self._gathers.get(name, ()) if g.source in self.before.frozen]
        parts = [g.pick(mask.float()) > 0 for g, mask in old]
        return torch.stack(parts).any(0) if parts else None

    def _put(self, name: str, value: Tensor) -> None:
        kind, owner = name.split(".")
        if kind == "weight":
            self.bundles[owner] = replace(self.bundles[owner], weight=value)
        elif kind == "bias":
            self.groups[owner] = replace(self.groups[owner], bias=value)
        else:
            norm: Any = self.groups[owner].norm
            self.groups[owner] = replace(self.groups[owner], norm=replace(norm, **{kind: value}))

    def freeze(self, name: str, mask: Tensor) -> None:
        """Exactly these entries of a tensor are frozen (else: those that come from frozen ones)."""
        self._masks[name] = mask

    # ---- units --------------------------------------------------------------------------------------------

    def rewire(self, seed: Mapping[str, UnitMap]) -> dict[str, UnitMap]:
        """Changes the units of the seed's groups and of all groups tied to them; returns every map.

        For each tied group: rows that enter a new unit are the copied unit's, what leaves it is scaled by
        its share, and its bias and normalisation are copied. A unit that copies none starts with zero
        weights, zero bias, and scale 1, shift 0, mean 0, variance 1. Weight gradients of rows entering a
        copy are `share` times the old ones. Raises Refused where the change does not fit.
        """
        before = self.view()
        maps = close(before, seed)
        for bundle in before.bundles.values():
            smap, tmap = maps.get(bundle.source), maps.get(bundle.target)
            if smap is not None or tmap is not None:
                pattern, gather = _rewired(bundle, *before.shapes(bundle), smap, tmap)
                self.bundles[bundle.name] = replace(bundle, pattern=pattern)
                self._gather(bundle.tensor, bundle.weight, gather)
        for name, units in maps.items():
            self._rewire_group(before.groups[name], units)
        return maps

    def _rewire_group(self, group: Group, units: UnitMap) -> None:
        serials, self.next_serial = units.serials(group.serials, self.next_serial, group.positions)
        self.groups[group.name] = replace(group, shape=(units.units, *group.shape[1:]), serials=serials)
        index, share = torch.from_numpy(units.index), _tensor(units.share)
        fresh = torch.from_numpy(units.fresh)
        for name, tensor in group.tensors():
            kind = name.split(".")[0]
            gradient = (share,) if kind in ("bias", "scale", "shift") else (None,)
            gather = Axes(name, (group.units,), (units.units,), (index,), (None,), gradient)
            self._gather(name, tensor, gather)
            if kind in ("scale", "variance") and fresh.numel():
                self._put(name, self.tensor(name).index_fill(0, fresh.to(tensor.device), 1.0))

    def _gather(self, name: str, old: Tensor, gather: Gather) -> None:
        self._gathers[name] = tuple(first.then(gather) for first in self._gathers[name])
        self._put(name, gather.take(old.detach()))

    def absorb(self, name: str, units: UnitMap, targets: UnitMap | None) -> None:
        """Unit i of a bundle's source also gets the outgoing weights that old unit `units.index[i]` had (-1: none).

        For after a rewire: `targets` is the map of the bundle's target, None if it did not change. Edges of
        a Sparse that unit i lacks are added. Raises Refused for shared sparse weights.
        """
        bundle, shapes = self.before.bundles[name], self.before.shapes(self.before.bundles[name])
        pattern = bundle.pattern
        if not isinstance(pattern, Sparse):
            _, gather = _rewired(bundle, *shapes, units, targets)
            self.add_gather(bundle.tensor, gather)
            return
        if pattern.weight_index is not None:
            raise Refused(f"bundle {name!r}", "shared weights", "a weight of its own for every edge")
        smap = units.neurons(size(shapes[0][1:]))
        tmap = (targets or UnitMap(np.arange(shapes[1][0]))).neurons(size(shapes[1][1:]))
        edge, t = _copies(pattern.target, tmap.index, size(shapes[1]))
        again, s = _copies(pattern.source[edge], smap.index, size(shapes[0]))
        edge, t = edge[again], t[again]
        now = self.bundles[name].pattern
        assert isinstance(now, Sparse)
        columns = size(self.shapes(name)[0])
        has = {key: n for n, key in enumerate((now.target.astype(np.int64) * columns + now.source).tolist())}
        at = np.array([has.get(key, -1) for key in (t.astype(np.int64) * columns + s).tolist()], np.int64)
        both = at >= 0
        index = torch.full((now.weights,), -1, dtype=torch.long)
        index[at[both]] = torch.from_numpy(edge[both].astype(np.int64))
        self.add_gather(bundle.tensor, Flat(bundle.tensor, (pattern.weights,), (now.weights,), index))
        new = torch.from_numpy(edge[~both].astype(np.int64))
        if new.numel():
            tags = {n: tag[edge[~both]] for n, tag in pattern.tags.items()}
            gather = Flat(bundle.tensor, (pattern.weights,), (new.numel(),), new)
            self.add_edges(name, s[~both], t[~both], bundle.weight.detach()[new], tags=tags, gathers=[gather])

    def forget(self, name: str, rows: NDArray[np.integer]) -> None:
        """The gradients of these entries along a tensor's first axis have no relation to old ones."""
        shape = tuple(self.tensor(name).shape)
        factor = torch.ones(shape[0], dtype=torch.float64)
        factor[torch.from_numpy(np.asarray(rows, np.int64))] = torch.nan
        none = (None,) * len(shape)
        later = Axes(name, shape, shape, none, none, (factor, *none[1:]))
        self._gathers[name] = tuple(first.then(later) for first in self._gathers[name])

    def flatten(self, name: str, *, share: bool = False) -> None:
        """The group is flat, one unit per neuron, with the same numbers; its per-unit tensors are repeated.

        Gradients of the repeated tensors are undefined (`share`: the old one divided by the positions).
        Bundles at the group are the caller's to fit.
        """
        group = self.groups[name]
        if len(group.shape) == 1:
            return
        serials = (group.serials[:, None] + np.arange(group.positions)).ravel()
        self.groups[name] = replace(group, shape=(group.neurons,), serials=serials)
        index = torch.arange(group.units).repeat_interleave(group.positions)
        factor = torch.full((group.neurons,), 1.0 / group.positions if share else torch.nan, dtype=torch.float64)
        for tensor, old in group.tensors():
            tied = tensor.startswith(("bias.", "scale.", "shift.")) and group.positions > 1
            gradient = (factor if tied else None,)
            gather = Axes(tensor, (group.units,), (group.neurons,), (index,), (None,), gradient)
            self._gather(tensor, old, gather)

    # ---- edges --------------------------------------------------------------------------------------------

    def repattern(self, name: str, pattern: Pattern, gather: Gather) -> None:
        """The bundle has another pattern; `gather` says how its weights come from those it has now."""
        bundle = self.bundles[name]
        self.bundles[name] = replace(bundle, pattern=pattern)
        self._gather(bundle.tensor, bundle.weight, gather)

    def add_gather(self, name: str, gather: Gather) -> None:
        """Adds entries of a tensor of the network before to a tensor of the one in progress."""
        self._gathers[name] += (gather,)
        old = self.before.tensors()[gather.source].detach()
        self._put(name, self.tensor(name) + gather.take(old))

    def keep_edges(self, name: str, keep: NDArray[np.bool_]) -> None:
        """Removes the edges of a bundle where `keep` (one per edge) is False; the rest is a Sparse, ties kept.

        The gradient of a shared weight that loses an edge is undefined.
        """
        bundle, lost = self.bundles[name], np.empty(0, np.int64)
        shapes = self.shapes(name)
        s, t, w = bundle.pattern.all_edges(*shapes)
        tags = {n: tag[keep] for n, tag in _tags(bundle.pattern).items()}
        if isinstance(bundle.pattern, Dense) or (
            isinstance(bundle.pattern, Sparse) and bundle.pattern.weight_index is None
        ):
            weights, index = np.flatnonzero(keep), None
        else:
            weights, at = np.unique(w[keep], return_inverse=True)
            index = None if np.array_equal(at, np.arange(weights.size)) else at
            lost = np.unique(w[~keep])
        pattern = Sparse(s[keep], t[keep], index, weights.size, tags)
        gradient = np.where(np.isin(weights, lost), np.nan, 1.0) if lost.size else None
        self._replace_flat(name, pattern, torch.from_numpy(weights.astype(np.int64)), _tensor(gradient))

    def add_edges(
        self,
        name: str,
        source: ArrayLike,
        target: ArrayLike,
        weight: Tensor,
        *,
        tags: Mapping[str, ArrayLike] | None = None,
        gathers: Sequence[Flat] = (),
    ) -> None:
        """Adds edges with weights of their own behind those of a bundle (which becomes a Sparse).

        `tags` not given are 0. `gathers` are over the new entries only: which old weights they come from.
        """
        bundle = self.bundles[name]
        old = bundle.pattern
        pattern = old if isinstance(old, Sparse) else old.to_sparse(*self.shapes(name))
        source, target = np.atleast_1d(np.asarray(source)), np.atleast_1d(np.asarray(target))
        count, new = pattern.weights, source.size
        index = None
        if pattern.weight_index is not None:
            index = np.concatenate([pattern.weight_index, np.arange(count, count + new)])
        given = dict(tags or {})
        merged = {}
        for tag in _tags(old).keys() | given.keys():
            had = _tags(old).get(tag, np.zeros(pattern.source.size, np.int32))
            more = np.asarray(given.get(tag, np.zeros(new, np.int32)), np.int32)
            merged[tag] = np.concatenate([had, more])
        after = Sparse(
            np.concatenate([pattern.source, source.astype(np.int32)]),
            np.concatenate([pattern.target, target.astype(np.int32)]),
            index,
            count + new,
            merged,
        )
        of = np.arange(count + new)
        of[count:] = -1
        index_of = torch.from_numpy(of)
        if bundle.weight.dim() == 1:  # old weights stay where they are: a gather that only appends is cheap
            self.repattern(name, after, Axes.appended(bundle.tensor, count, index_of))
        else:
            self._replace_flat(name, after, index_of)
        if new:  # then the gather made a longer tensor, which nobody else holds yet
            self.bundles[name].weight[count:] = weight.detach().reshape(-1)
        pad = torch.full((count,), -1)
        self._gathers[bundle.tensor] += tuple(
            replace(
                g,
                shape=(count + new,),
                index=torch.cat([pad, g.index]),
                value=_padded(g.value, count),
                gradient=_padded(g.gradient, count),
            )
            for g in gathers
        )

    def tag_edges(self, name: str, tag: str, values: ArrayLike) -> None:
        """Sets a named integer per edge; the bundle becomes a Sparse if it is none."""
        bundle = self.bundles[name]
        pattern = bundle.pattern
        if not isinstance(pattern, Sparse):
            count = size(tuple(bundle.weight.shape))
            self._replace_flat(name, pattern.to_sparse(*self.shapes(name)), torch.arange(count))
            pattern = self.bundles[name].pattern
        assert isinstance(pattern, Sparse)
        tags = dict(pattern.tags) | {tag: np.asarray(values, np.int32)}
        self.bundles[name] = replace(self.bundles[name], pattern=replace(pattern, tags=tags))

    def _replace_flat(self, name: str, pattern: Sparse, index: Tensor, gradient: Tensor | None = None) -> None:
        """The bundle gets this pattern; its weight e is entry index[e] of the flattened old one (-1: none)."""
        bundle = self.bundles[name]
        old = tuple(bundle.weight.shape)
        self.repattern(name, pattern, Flat(bundle.tensor, old, (index.numel(),), index, None, gradient))

    # ---- the end ------------------------------------------------------------------------------------------

    def finish(self) -> tuple[Network, Lineage]:
        """The next network and the lineage of its tensors; empty bundles are dropped.

        An entry is frozen if one that it comes from is.
        """
        for name, bundle in list(self.bundles.items()):
            if isinstance(bundle.pattern, Sparse) and bundle.pattern.source.size == 0:
                self.remove_bundle(name)
        after = self.view()
        lineage = Lineage({name: self._gathers.get(name, ()) for name in after.tensors()})
        if self.before.frozen or self._masks:
            masks = {name: mask for name in after.tensors() if (mask := self.frozen(name)) is not None}
            after = replace(after, frozen={name: mask for name, mask in masks.items() if bool(mask.any())})
        return after, lineage


def _rewired(
    bundle: Bundle, source: Shape, target: Shape, smap: UnitMap | None, tmap: UnitMap | None
) -> tuple[Pattern, Gather]:
    """The bundle's pattern and weights after the units of its ends changed."""
    pattern, name = bundle.pattern, bundle.tensor
    old = pattern.weight_shape(source, target)
    new_source = source if smap is None else (smap.units, *source[1:])
    new_target = target if tmap is None else (tmap.units, *target[1:])
    if isinstance(pattern, Identity):
        if tmap is not None:
            pattern = Identity(new_start(tmap, pattern.start, pattern.start + source[0]))
        return pattern, Axes.same(name, bundle.weight)
    if isinstance(pattern, Sparse):
        return _rewired_sparse(pattern, name, source, target, smap, tmap)
    if isinstance(pattern, Conv2d) and pattern.channel_groups > 1:
        return _rewired_grouped(pattern, name, source, target, smap, tmap)
    if not old:  # connectivity with one shared weight
        return pattern, Axes.same(name, bundle.weight)
    if isinstance(pattern, Dense):
        smap = None if smap is None else smap.neurons(size(source[1:]))
        tmap = None if tmap is None else tmap.neurons(size(target[1:]))
    rest = (None,) * (len(old) - 2)
    no_change = (None, None)
    s_index, s_share = no_change if smap is None else (_tensor(smap.index), _tensor(smap.share))
    t_index, t_share = no_change if tmap is None else (_tensor(tmap.index), _tensor(tmap.share))
    index, value, gradient = (t_index, s_index, *rest), (None, s_share, *rest), (t_share, None, *rest)
    return pattern, Axes(name, old, pattern.weight_shape(new_source, new_target), index, value, gradient)


def _rewired_grouped(
    pattern: Conv2d, name: str, source: Shape, target: Shape, smap: UnitMap | None, tmap: UnitMap | None
) -> tuple[Pattern, Gather]:
    groups, kernels, reads = grouped_channels(pattern, name.split(".")[1], source, target, smap, tmap)
    after = replace(pattern, channel_groups=groups)
    outputs, inputs = kernels.shape
    shape = after.weight_shape((inputs * groups, *source[1:]), (outputs, *target[1:]))
    inner = size(shape[2:])
    index = np.where(kernels[..., None] < 0, -1, kernels[..., None] * inner + np.arange(inner)).ravel()
    value = gradient = None
    if smap is not None and smap.share is not None and not pattern.depthwise(source):
        value = np.repeat(smap.share[reads].ravel(), inner)
    if tmap is not None and tmap.share is not None:
        gradient = np.repeat(tmap.share, inputs * inner)
    old = pattern.weight_shape(source, target)
    return after, Flat(name, old, shape, torch.from_numpy(index), _tensor(value), _tensor(gradient))


def _rewired_sparse(
    pattern: Sparse, name: str, source: Shape, target: Shape, smap: UnitMap | None, tmap: UnitMap | None
) -> tuple[Pattern, Gather]:
    """Every edge is copied to every copy of its ends; ties stay within copies of equal share.

    The gradient factor of a tied weight is defined only where all of its edges stay together.
    """
    if all(m is None or _only_appends(m, shape[0]) for m, shape in ((smap, source), (tmap, target))):
        shape = (pattern.weights,)
        return pattern, Axes(name, shape, shape, (None,), (None,), (None,))
    smap = (smap or UnitMap(np.arange(source[0]))).neurons(size(source[1:]))
    tmap = (tmap or UnitMap(np.arange(target[0]))).neurons(size(target[1:]))
    edge, t = _copies(pattern.target, tmap.index, size(target))
    again, s = _copies(pattern.source[edge], smap.index, size(source))
    edge, t = edge[again], t[again]
    value = np.ones(edge.size) if smap.share is None else smap.share[s]
    gradient = np.ones(edge.size) if tmap.share is None else tmap.share[t]
    weight, index = pattern.index[edge], None
    if pattern.weight_index is not None:
        key = np.stack([weight, _copy_number(smap.index)[s], _copy_number(tmap.index)[t], value])
        _, first, index = np.unique(key, axis=1, return_index=True, return_inverse=True)
        index = index.ravel()
        gradient = _tied_gradient(pattern, gradient, weight[first], index)
        weight, value = weight[first], value[first]
    after = Sparse(s, t, index, weight.size, {n: tag[edge] for n, tag in pattern.tags.items()})
    index_of = torch.from_numpy(weight.astype(np.int64))
    return after, Flat(
        name,
        (pattern.weights,),
        (weight.size,),
        index_of,
        None if np.all(value == 1) else torch.from_numpy(value),
        None if np.all(gradient == 1) else torch.from_numpy(gradient),
    )


def _tied_gradient(pattern: Sparse, gradient: NDArray, weight: NDArray, index: NDArray) -> NDArray:
    """Per new weight: the factor of its edges, if it has all edges of its old one and they agree; else NaN."""
    most = np.full(weight.size, -np.inf)
    least = np.full(weight.size, np.inf)
    np.maximum.at(most, index, gradient)
    np.minimum.at(least, index, gradient)
    complete = np.bincount(index, minlength=weight.size) == np.bincount(pattern.index)[weight]
    return np.where(complete & (most == least), most, np.nan)


def _copies(ends: NDArray, index: NDArray, old: int) -> tuple[NDArray, NDArray]:
    """For edges that end at old neurons `ends`: (edge, new neuron) for every copy of its end, by edge."""
    order = np.argsort(index, kind="stable")
    order = order[index[order] >= 0]
    count = np.bincount(index[order], minlength=old)
    start = np.concatenate([[0], np.cumsum(count)[:-1]])
    times = count[ends]
    edge = np.repeat(np.arange(ends.size), times)
    within = np.arange(edge.size) - np.repeat(np.cumsum(times) - times, times)
    return edge, order[start[ends[edge]] + within]


def _copy_number(index: NDArray) -> NDArray:
    """For every new neuron, how many copies of its original come before it."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]]
    number = np.empty(index.size, np.int64)
    number[order] = np.arange(index.size) - np.maximum.accumulate(np.where(begins, np.arange(index.size), 0))
    return number


def _only_appends(units: UnitMap, old: int) -> bool:
    index = units.index
    return units.share is None and bool((index[old:] < 0).all()) and np.array_equal(index[:old], np.arange(old))


def _tags(pattern: Pattern) -> Mapping[str, NDArray]:
    return pattern.tags if isinstance(pattern, Sparse) else {}


def _tensor(array: NDArray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(np.ascontiguousarray(array))


def _padded(factor: Tensor | None, count: int) -> Tensor | None:
    return None if factor is None else torch.cat([torch.ones(count, dtype=factor.dtype), factor])
