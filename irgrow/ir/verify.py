"""`verify(network)`: every invariant of a well-formed network, each with an error of its own.

Names (BadName), roles and properties (BadProperty), shapes (BadShape), serials (BadSerial), tensor sizes
(WeightSize), finite values (NonFinite), edges that exist (DanglingEdge), no edge twice (DuplicateEdge), no
loops between neurons (CyclicNetwork), outputs that some input reaches (Unreachable).
"""

from __future__ import annotations

from math import isfinite

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.errors import (
    BadName,
    BadProperty,
    BadSerial,
    BadShape,
    DuplicateEdge,
    NonFinite,
    Unreachable,
    WeightSize,
)
from irgrow.ir.levels import inside_edges
from irgrow.ir.network import Bundle, Group, Network
from irgrow.ir.pattern import Dense, Pattern, Shape, Sparse
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
    for bundle in network.bundles.values():
        _duplicates(network, bundle)
    _norms(network)
    _ = network.levels  # raises CyclicNetwork
    _reachable(network)
    return network


def _names(network: Network) -> None:
    for kind, table in (("group", network.groups), ("bundle", network.bundles)):
        for name, item in table.items():  # type: ignore[attr-defined]
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
    if g.bias is not None and tuple(g.bias.shape) != (g.units,):
        raise WeightSize(f"{who}: bias", f"shape {tuple(g.bias.shape)}", f"({g.units},), one per unit")
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
        if tensor is not None and tuple(tensor.shape) != (g.units,):
            raise WeightSize(f"{who}: norm {kind}", f"shape {tuple(tensor.shape)}", f"({g.units},)")


def _bundle(network: Network, b: Bundle) -> None:
    who = f"bundle {b.name!r}"
    if not isinstance(b.pattern, Pattern):
        raise BadProperty(f"{who}: pattern", type(b.pattern).__name__, "a Pattern")
    shapes = network.shapes(b)
    try:
        b.pattern.check(*shapes)
    except (BadShape, WeightSize) as error:
        raise type(error)(
            f"{who} from {b.source!r} to {b.target!r}: {error.who}", error.found, error.expected
        ) from None
    wanted = b.pattern.weight_shape(*shapes)
    if tuple(b.weight.shape) != wanted:
        raise WeightSize(f"{who}: weight", f"shape {tuple(b.weight.shape)}", wanted)


def _serials(network: Network) -> None:
    starts, widths = [], []
    for g in network.groups.values():
        if g.serials is None or g.serials.shape != (g.units,):
            raise BadSerial(f"group {g.name!r}: serials", getattr(g.serials, "shape", None), f"{g.units}, one per unit")
        starts.append(g.serials)
        widths.append(np.full(g.units, g.positions))
    start, width = np.concatenate(starts), np.concatenate(widths)
    order = np.argsort(start, kind="stable")
    start, width = start[order], width[order]
    clash = np.flatnonzero(start[:-1] + width[:-1] > start[1:])
    if clash.size or (start.size and start[0] < 0):
        raise BadSerial("network", f"the serial {start[clash[0] + 1] if clash.size else start[0]} twice or below 0")
    if start.size and start[-1] + width[-1] > network.next_serial:
        raise BadSerial("network: next serial", network.next_serial, f"at least {start[-1] + width[-1]}")


def _tensors(network: Network) -> None:
    tensors = network.tensors()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise WeightSize(f"tensor {name!r}", getattr(tensor, "dtype", type(tensor).__name__), "a floating tensor")
        if tensor.dtype != network.dtype:
            raise WeightSize(f"tensor {name!r}", tensor.dtype, f"{network.dtype}, the dtype of the first bundle")
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            at = [int(i) for i in (~finite).nonzero()[0]]
            raise NonFinite(
                f"tensor {name!r} at {at}{_neuron_at(network, name, at)}",
                tensor[tuple(at)].item(),
                "a finite value",
            )


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


def _duplicates(network: Network, b: Bundle) -> None:
    if not isinstance(b.pattern, Sparse):
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
            if cyclic and network.groups[name].norm is not None:
                raise BadProperty(
                    f"group {name!r}",
                    "a normalisation in a part of the group graph that holds a loop",
                    "none there",
                )


def _reachable(network: Network) -> None:
    """Every output neuron has a path from some input neuron."""
    reached: dict[str, np.ndarray] = {}
    for names, cyclic in network.components:
        for name in names:
            reached[name] = np.full(network.groups[name].neurons, name in network.inputs)
            for b in network.entering(name):
                if b.source not in names:
                    _spread(b.pattern, network.shapes(b), reached[b.source], reached[name])
        if cyclic:
            source, target, first = inside_edges(network, names)
            mask = reach.reached(source, target, np.concatenate([reached[name] for name in names]))
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


def _spread(pattern: Pattern, shapes: tuple[Shape, Shape], source: np.ndarray, target: np.ndarray) -> None:
    if isinstance(pattern, Dense):
        target |= bool(source.any())
        return
    for s, t, _ in pattern.edges(*shapes):
        target[t[source[s]]] = True
