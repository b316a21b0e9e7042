"""`verify(network)`: every invariant of a well-formed network, each with an error of its own.

Names (BadName), roles and properties (BadProperty), shapes (BadShape), serials (BadSerial), tensor sizes
(WeightSize), masks of frozen entries (BadName, WeightSize), finite values (NonFinite), edges that exist
(DanglingEdge), no edge twice (DuplicateEdge), no loops between neurons (CyclicNetwork), outputs that some
input reaches (Unreachable).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.errors import (
    BadName,
    BadProperty,
    BadSerial,
    BadShape,
    DanglingEdge,
    DuplicateEdge,
    NonFinite,
    Unreachable,
    WeightSize,
)
from irgrow.ir.levels import Rows, first_numbers, inside_edges, largest_parent, levels
from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Local2d, Pattern, Shape, Sparse
from irgrow.kernels import graph, reach
from irgrow.kernels.activations import ACTIVATIONS


def verify(network: Network) -> Network:
    """The network itself, if it is well formed; else the first broken invariant as an error."""
    _names(network)
    for group in network.groups.values():
        _group(network, group)
    for bundle in network.bundles.values():
        _bundle(network, bundle)
    _serials(network)
    _tensors(network)
    _frozen(network)
    inside = {names: _rows(network, names) for names, cyclic in network.components if cyclic}
    for bundle in network.bundles.values():
        _duplicates(network, bundle, inside)
    if "levels" not in network.__dict__:
        network.__dict__["levels"] = levels(network, inside)  # raises CyclicNetwork
    _norms(network)
    _reachable(network, inside)
    return network


def _rows(network: Network, names: tuple[str, ...]) -> Rows:
    """The edges among groups that form a loop, grouped once for all the checks that need it."""
    source, target, _ = inside_edges(network, names)
    return graph.children(source, target, sum(network.groups[name].neurons for name in names))


def _names(network: Network) -> None:
    for kind, table in (("group", network.groups), ("bundle", network.bundles)):
        for name, item in table.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise BadName(f"{kind} {name!r}", "a name that is no identifier", "letters, digits and _, no dots")
            if item.name != name:
                raise BadName(f"{kind} {name!r}", f"stored under another name than its own, {item.name!r}")
    for role in ("inputs", "outputs"):
        names = getattr(network, role)
        if not names:
            raise BadName(f"network: {role}", "none", f"at least one group among the {role}")
        for name in names:
            if name not in network.groups:
                raise BadName(f"network: {role}", f"{name!r}", f"one of {', '.join(network.groups)}")
        if len(set(names)) != len(names):
            raise BadName(f"network: {role}", f"{names}", "no name twice")
    for bundle in network.bundles.values():
        for end in ("source", "target"):
            if getattr(bundle, end) not in network.groups:
                raise BadName(
                    f"bundle {bundle.name!r}: {end}",
                    repr(getattr(bundle, end)),
                    f"one of {', '.join(network.groups)}",
                )
        if bundle.target in network.inputs:
            raise BadProperty(
                f"bundle {bundle.name!r}", f"it feeds the input {bundle.target!r}", "inputs have no parents"
            )


def _group(network: Network, g: Group) -> None:
    who = f"group {g.name!r}"
    if not g.shape or any(not isinstance(n, (int, np.integer)) or n < 1 for n in g.shape):
        raise BadShape(f"{who}: shape", g.shape, "(units, *positions), each at least 1")
    if g.activation not in ACTIVATIONS:
        raise BadProperty(f"{who}: activation", repr(g.activation), f"one of {', '.join(ACTIVATIONS)}")
    if g.aggregation not in ("sum", "max"):
        raise BadProperty(f"{who}: aggregation", repr(g.aggregation), "sum or max")
    if not (isfinite(g.dropout) and 0 <= g.dropout < 1):
        raise BadProperty(f"{who}: dropout", g.dropout, "a probability in [0, 1)")
    if g.name in network.inputs and (g.bias is not None or g.norm is not None or g.activation != "identity"):
        raise BadProperty(who, "an input with bias, norm or activation", "a plain input group")
    if g.bias is not None and _shape(g.bias) != (g.units,):
        raise WeightSize(f"{who}: bias", f"shape {_shape(g.bias)}", f"({g.units},), one per unit")
    if g.norm is None:
        return
    n = g.norm
    if n.kind not in ("batch", "layer", "group"):
        raise BadProperty(f"{who}: norm", repr(n.kind), "batch, layer or group")
    if (n.kind == "batch") != (n.mean is not None and n.variance is not None):
        raise BadProperty(
            f"{who}: {n.kind} norm", "running statistics missing or out of place", "a batch norm has both"
        )
    if n.groups < 1 or g.units % n.groups:
        raise BadShape(f"{who}: group norm", f"{n.groups} groups of {g.units} units", "a divisor of the units")
    for kind in ("scale", "shift", "mean", "variance"):
        tensor = getattr(n, kind)
        if tensor is not None and _shape(tensor) != (g.units,):
            raise WeightSize(f"{who}: norm {kind}", f"shape {_shape(tensor)}", f"({g.units},)")
    if not (isfinite(n.eps) and n.eps >= 0):
        raise BadProperty(f"{who}: norm eps", n.eps, "a finite number, at least 0")
    if n.variance is not None and bool((n.variance < 0).any()):
        unit = int((n.variance < 0).nonzero()[0])
        raise BadProperty(f"{who}: norm variance of unit {unit}", n.variance[unit].item(), "at least 0")


def _bundle(network: Network, b: Bundle) -> None:
    who = f"bundle {b.name!r}"
    if not isinstance(b.pattern, Pattern):
        raise BadProperty(f"{who}: pattern", type(b.pattern).__name__, "a Pattern")
    shapes = network.shapes(b)
    try:
        b.pattern.check(*shapes)
    except (BadShape, DanglingEdge, WeightSize) as error:
        raise type(error)(
            f"{who} from {b.source!r} to {b.target!r}: {error.who}", error.found, error.expected
        ) from None
    wanted = b.pattern.weight_shape(*shapes)
    if _shape(b.weight) != wanted:
        raise WeightSize(f"{who}: weight", f"shape {_shape(b.weight)}", wanted)
    if isinstance(b.pattern, Local2d) and max(b.pattern.padding) > 0 and isinstance(b.weight, Tensor):
        idle = torch.from_numpy(~b.pattern.used(shapes[0])).to(b.weight.device)
        if bool(b.weight.detach().masked_select(idle).any()):
            raise DanglingEdge(
                f"{who}: weight",
                "an entry that is not 0 and reaches into the padding",
                "0 where there is no edge",
                do="multiply the weight by pattern.used(source shape)",
            )


def _shape(tensor: object) -> Shape:
    return tuple(getattr(tensor, "shape", ()))


def _serials(network: Network) -> None:
    starts, widths = [], []
    for g in network.groups.values():
        if _shape(g.serials) != (g.units,) or g.serials.dtype.kind not in "iu":
            found = getattr(g.serials, "shape", None), getattr(g.serials, "dtype", None)
            raise BadSerial(f"group {g.name!r}: serials", found, f"{g.units} integers, one per unit")
        starts.append(g.serials)
        widths.append(np.full(g.units, g.positions))
    start, width = np.concatenate(starts), np.concatenate(widths)
    order = np.argsort(start, kind="stable")
    start, width = start[order], width[order]
    clash = np.flatnonzero(start[:-1] + width[:-1] > start[1:])
    if clash.size or start[0] < 0:
        raise _taken(network, int(order[clash[0] + 1] if start[0] >= 0 else order[0]))
    if start[-1] + width[-1] > network.next_serial:
        raise BadSerial("network: next serial", network.next_serial, f"at least {start[-1] + width[-1]}")


def _taken(network: Network, unit: int) -> BadSerial:
    """The error for a unit's serial, units counted over all groups."""
    for g in network.groups.values():
        if unit < g.units:
            break
        unit -= g.units
    return BadSerial(
        f"group {g.name!r}",
        f"serial {g.serials[unit]} of unit {unit}, which is taken or below 0",
        "serials from 0 that leave room for every position",
    )


def _tensors(network: Network) -> None:
    first: Tensor | None = None
    for name, tensor in network.tensors().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise WeightSize(f"tensor {name!r}", getattr(tensor, "dtype", type(tensor).__name__), "a floating tensor")
        first = tensor if first is None else first
        if tensor.dtype != first.dtype:
            raise WeightSize(f"tensor {name!r}", tensor.dtype, f"{first.dtype}, the dtype of the first bundle")
        if tensor.device != first.device:
            raise WeightSize(f"tensor {name!r}", f"device {tensor.device}", f"{first.device}, as the first bundle")
        if bool(torch.isfinite(tensor.detach().sum())):  # one pass; a finite sum has finite terms
            continue
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            at = [int(i) for i in (~finite).nonzero()[0]]
            raise NonFinite(
                f"tensor {name!r} at {at}{_neuron_at(network, name, at)}",
                tensor[tuple(at)].item(),
                "a finite value",
            )


def _frozen(network: Network) -> None:
    tensors = network.tensors()
    for name, mask in network.frozen.items():
        if name not in tensors or name.startswith(("mean.", "variance.")):
            raise BadName(f"frozen entries of {name!r}", "no such tensor", "a weight, bias, scale or shift")
        if getattr(mask, "dtype", None) != torch.bool or mask.device.type != "cpu" or mask.shape != tensors[name].shape:
            found = f"{getattr(mask, 'dtype', type(mask).__name__)}, shape {_shape(mask)}"
            expected = f"a mask (bool, on the CPU) of shape {_shape(tensors[name])}"
            raise WeightSize(f"frozen entries of {name!r}", found, expected)


def _neuron_at(network: Network, name: str, at: list[int]) -> str:
    kind, owner = name.split(".")
    if kind != "weight":
        return f" (group {owner!r}, neuron {network.ids(owner)[at[0] * network.groups[owner].positions]})"
    bundle = network.bundles[owner]
    index = int(np.ravel_multi_index(at, bundle.weight.shape)) if at else 0
    for _, t, w in bundle.pattern.edges(*network.shapes(bundle)):
        hit = np.flatnonzero(w == index)
        if hit.size:
            return f" (an edge into group {bundle.target!r}, neuron {network.ids(bundle.target)[t[hit[0]]]})"
    return ""


def _duplicates(network: Network, b: Bundle, inside: Mapping[tuple[str, ...], Rows]) -> None:
    if not isinstance(b.pattern, Sparse):
        return
    rows = inside.get((b.source,)) if b.source == b.target else None
    its_own = rows is not None and rows[1].size == b.pattern.source.size
    if its_own and rows is not None and not graph.repeats(*rows, network.groups[b.target].neurons):
        return
    source, target = network.groups[b.source], network.groups[b.target]
    edge = graph.first_duplicate(b.pattern.source, b.pattern.target, target.neurons, source.neurons)
    if edge >= 0:
        s, t = (network.ids(g.name)[a[edge]] for g, a in ((source, b.pattern.source), (target, b.pattern.target)))
        raise DuplicateEdge(
            f"bundle {b.name!r}: edge {edge}",
            f"{b.source} neuron {s} -> {b.target} neuron {t} again",
            "each edge once",
        )


def _norms(network: Network) -> None:
    for names, cyclic in network.components:
        for name in names:
            group = network.groups[name]
            if cyclic and (group.norm is not None or group.dropout):
                what = "dropout" if group.norm is None else "a normalisation"
                raise BadProperty(
                    f"group {name!r}", f"{what} in a part of the group graph that holds a loop", "none there"
                )


def _reachable(network: Network, inside: Mapping[tuple[str, ...], Rows]) -> None:
    """Every output neuron has a path from some input neuron."""
    reached: dict[str, np.ndarray] = {}
    for names, cyclic in network.components:
        for name in names:
            reached[name] = np.full(network.groups[name].neurons, name in network.inputs)
            for b in network.entering(name):
                if b.source not in names:
                    parents = largest_parent(b.pattern, *network.shapes(b), reached[b.source].astype(np.int32))
                    reached[name] |= parents > 0
        if cyclic:
            first, _ = first_numbers(network, names)
            mask = reach.reached_by_children(*inside[names], np.concatenate([reached[name] for name in names]))
            for name in names:
                reached[name] = mask[first[name] : first[name] + reached[name].size]
    for name in network.outputs:
        missing = np.flatnonzero(~reached[name])
        if missing.size:
            raise Unreachable(
                f"output {name!r}",
                f"neuron {network.ids(name)[missing[0]]} ({missing.size} in all) that no input reaches",
                "a path from an input to every output neuron",
                do="connect it, or remove it",
            )
