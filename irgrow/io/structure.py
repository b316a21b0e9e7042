"""A network's structure as JSON data and index arrays, and back.

Weights, biases and norms keep their network names (`weight.x`, `bias.y`, ...). Beside them stand, as
tensors too, the arrays that make up the structure:

    serials.GROUP           int64, one per unit
    source.BUNDLE           int32, one per edge of a Sparse pattern; likewise target.BUNDLE
    weight_index.BUNDLE     int32, where weights are shared
    tag.BUNDLE.TAG          integers, one per edge
    frozen.TENSOR           bool, true for every entry that is not trained (TENSOR: weight.x, bias.y, ...)

Reading trusts nothing: every field has its type and range checked, and before a network is built it is
clear that the work to verify it is in proportion to the size of its file. (A window over an image is a
few bytes in a file and can mean any number of edges.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irgrow.io.container import Entry
from irgrow.ir.errors import BadFile, IrgrowError, Refused
from irgrow.ir.network import Bundle, Group, Network, Norm
from irgrow.ir.pattern import Conv2d, Dense, Identity, Local2d, Pattern, Pool2d, Sparse, Window

PATTERNS: dict[str, type[Pattern]] = {p.__name__: p for p in (Dense, Sparse, Identity, Conv2d, Local2d, Pool2d)}
_NORM_NUMBERS = ("eps", "momentum", "groups")
_NORM_TENSORS = ("scale", "shift", "mean", "variance")
_LAST_SERIAL = 1 << 62

# What a file may claim without bytes to show for it, and for each byte. ResNet-50: 11M neurons and 4.1G edges
# in 100 MB; MobileNet: 0.3G edges in 14 MB.
FREE_NEURONS, NEURONS_PER_BYTE = 1 << 24, 4
FREE_EDGES, EDGES_PER_BYTE = 1 << 28, 256
FREE_AT_ONCE, AT_ONCE_PER_BYTE = 1 << 25, 2  # edges that a pattern yields in one piece


# ---- writing ----------------------------------------------------------------------------------------------


def describe(network: Network) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The structure as JSON data, and every tensor and index array of the network by its name in the file.

    Raises Refused for patterns that are not irgrow's own: a reader could not build them.
    """
    data = {
        "groups": [_describe_group(g) for g in network.groups.values()],
        "bundles": [_describe_bundle(b) for b in network.bundles.values()],
        "inputs": list(network.inputs),
        "outputs": list(network.outputs),
        "next_serial": int(network.next_serial),
    }
    if network.frozen:
        data["frozen"] = list(network.frozen)
    arrays: dict[str, Tensor] = dict(network.tensors())
    for group in network.groups.values():
        arrays[f"serials.{group.name}"] = _tensor(group.serials.astype(np.int64))
    for bundle in network.bundles.values():
        if isinstance(bundle.pattern, Sparse):
            arrays |= {name: _tensor(array) for name, array in _arrays(bundle.name, bundle.pattern)}
    arrays |= {f"frozen.{name}": mask for name, mask in network.frozen.items()}
    return data, arrays


def _describe_group(group: Group) -> dict[str, Any]:
    norm = group.norm
    return {
        "name": group.name,
        "shape": [int(n) for n in group.shape],
        "activation": group.activation,
        "aggregation": group.aggregation,
        "bias": group.bias is not None,
        "dropout": group.dropout,
        "norm": None if norm is None else {"kind": norm.kind, **{f: getattr(norm, f) for f in _NORM_NUMBERS}},
    }


def _describe_bundle(bundle: Bundle) -> dict[str, Any]:
    pattern = bundle.pattern
    kind = type(pattern).__name__
    if PATTERNS.get(kind) is not type(pattern):
        raise Refused(
            f"saving bundle {bundle.name!r}",
            f"a pattern of the class {kind}",
            f"one of {', '.join(PATTERNS)}",
            do="use pattern.to_sparse(source, target)",
        )
    if isinstance(pattern, Sparse):
        numbers: dict[str, Any] = {
            "weights": int(pattern.weights),
            "tied": pattern.weight_index is not None,
            "tags": list(pattern.tags),
        }
    else:
        values = {f.name: getattr(pattern, f.name) for f in fields(pattern)}  # type: ignore[arg-type]
        numbers = {name: [int(n) for n in v] if isinstance(v, tuple) else int(v) for name, v in values.items()}
    return {
        "name": bundle.name,
        "source": bundle.source,
        "target": bundle.target,
        "pattern": {"kind": kind, **numbers},
        "trainable": bool(bundle.trainable),
    }


def _arrays(bundle: str, pattern: Sparse) -> Iterator[tuple[str, np.ndarray]]:
    yield f"source.{bundle}", pattern.source
    yield f"target.{bundle}", pattern.target
    if pattern.weight_index is not None:
        yield f"weight_index.{bundle}", pattern.weight_index
    for tag, array in pattern.tags.items():
        yield f"tag.{bundle}.{tag}", array


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))  # a copy: torch warns of arrays that cannot be written


# ---- reading ----------------------------------------------------------------------------------------------


class Reader:
    """Reads a structure section: checks it at once, builds the network on demand.

    `entries` says what tensors the file has, `tensor` reads one, `nbytes` is the file's size. `names` are the
    tensors that belong to the network. Every complaint is a BadFile that names the place.
    """

    def __init__(
        self, who: str, data: Any, entries: Mapping[str, Entry], tensor: Callable[[str], Tensor], nbytes: int
    ) -> None:
        self._who = f"{who}: structure"
        self._entries, self._tensor, self._nbytes = entries, tensor, nbytes
        keys = ("groups", "bundles", "inputs", "outputs", "next_serial")
        has_masks = isinstance(data, dict) and "frozen" in data
        self._data = _record(data, self._who, (*keys, "frozen") if has_masks else keys)
        if not _is_tags(masks := self._data.get("frozen", [])):
            raise BadFile(f"{self._who}: frozen", f"{masks!r:.60}", _EXPECTED[_is_tags])
        self._groups = [self._record(r, f"groups[{n}]", _GROUP) for n, r in self._list("groups")]
        self._bundles = [self._record(r, f"bundles[{n}]", _BUNDLE) for n, r in self._list("bundles")]
        with self._named():
            self._check_groups()
            self.names = set(self._expected())
            for name in self.names:
                if name not in entries:
                    raise BadFile(f"{self._who}: tensor {name!r}", "none in the file", "one")
            self._check_work()

    def network(self) -> Network:
        """The network, verified."""
        with self._named():
            groups = {r["name"]: self._group(r) for r in self._groups}
            bundles = {r["name"]: self._bundle(r) for r in self._bundles}
            inputs, outputs = tuple(self._data["inputs"]), tuple(self._data["outputs"])
            masks = {name: self._tensor(f"frozen.{name}") for name in self._data.get("frozen", ())}
            return Network(groups, bundles, inputs, outputs, self._data["next_serial"], masks).verify()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the network's own checks say which file they are about."""
        try:
            yield
        except BadFile:
            raise
        except IrgrowError as error:
            raise BadFile(f"{self._who}: {error.who}", error.found, error.expected, error.do) from error

    # ---- fields ---------------------------------------------------------------------------------------

    def _list(self, key: str) -> Iterator[tuple[int, Any]]:
        if not isinstance(self._data[key], list):
            raise BadFile(f"{self._who}: {key}", type(self._data[key]).__name__, "a list")
        return enumerate(self._data[key])

    def _record(self, data: Any, place: str, kinds: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
        record = _record(data, f"{self._who}.{place}", tuple(kinds))
        for key, fits in kinds.items():
            if not fits(record[key]):
                raise BadFile(f"{self._who}.{place}.{key}", f"{record[key]!r:.60}", _EXPECTED[fits])
        return record

    def _check_groups(self) -> None:
        """Names are unique and known, and shapes are affordable."""
        for kind, records in (("group", self._groups), ("bundle", self._bundles)):
            if len({r["name"] for r in records}) != len(records):
                raise BadFile(f"{self._who}: {kind}s", "one name twice", "unique names")
        self._shapes = {r["name"]: tuple(r["shape"]) for r in self._groups}
        for role in ("inputs", "outputs"):
            for _, name in self._list(role):
                if not isinstance(name, str) or name not in self._shapes:
                    raise BadFile(f"{self._who}: {role}", f"{name!r:.60}", "the name of a group")
        for r in self._bundles:
            for end in ("source", "target"):
                if r[end] not in self._shapes:
                    raise BadFile(f"{self._who}: bundle {r['name']!r}", f"the {end} {r[end]!r:.60}", "a group")
        following = self._data["next_serial"]
        if not _is_int(following) or not 0 <= following <= _LAST_SERIAL:
            raise BadFile(f"{self._who}: next_serial", f"{following!r:.60}", f"an integer from 0 to {_LAST_SERIAL}")
        neurons = sum(math.prod(shape) for shape in self._shapes.values())
        self._within("neurons", neurons, FREE_NEURONS + NEURONS_PER_BYTE * self._nbytes)

    def _within(self, what: str, found: int, limit: int) -> None:
        if found > limit:
            raise BadFile(
                f"{self._who}: {what}", f"{found:,} in a file of {self._nbytes:,} bytes", f"at most {limit:,}"
            )

    def _check_work(self) -> None:
        """The edges that windows over images stand for are in proportion to the file."""
        edges = 0
        for r in self._bundles:
            if not issubclass(PATTERNS[r["pattern"]["kind"]], Window):
                continue
            pattern = self._pattern(r)
            assert isinstance(pattern, Window)
            source, target = self._shapes[r["source"]], self._shapes[r["target"]]
            pattern.check(source, target)
            taps = math.prod(pattern.output(source)) * math.prod(pattern.kernel)
            if isinstance(pattern, Conv2d):
                at_once = taps * (source[0] // pattern.channel_groups)
                edges += at_once * target[0]
            else:
                at_once = taps * source[0]
                edges += at_once
            self._within("edges of one unit", at_once, FREE_AT_ONCE + AT_ONCE_PER_BYTE * self._nbytes)
        self._within("edges", edges, FREE_EDGES + EDGES_PER_BYTE * self._nbytes)

    # ---- parts ----------------------------------------------------------------------------------------

    def _expected(self) -> Iterator[str]:
        """The names of the network's tensors and arrays."""
        for n, r in enumerate(self._groups):
            yield f"serials.{r['name']}"
            if r["bias"]:
                yield f"bias.{r['name']}"
            if r["norm"] is not None:
                norm = self._record(r["norm"], f"groups[{n}].norm", _NORM)
                for kind in _NORM_TENSORS if norm["kind"] == "batch" else _NORM_TENSORS[:2]:
                    yield f"{kind}.{r['name']}"
        for n, r in enumerate(self._bundles):
            yield f"weight.{r['name']}"
            kind = r["pattern"].get("kind")
            if not isinstance(kind, str) or kind not in PATTERNS:
                raise BadFile(
                    f"{self._who}.bundles[{n}].pattern: kind", f"{kind!r:.60}", f"one of {', '.join(PATTERNS)}"
                )
            pattern = self._record(r["pattern"], f"bundles[{n}].pattern", _PATTERN[kind])
            if kind == "Sparse":
                yield f"source.{r['name']}"
                yield f"target.{r['name']}"
                if pattern["tied"]:
                    yield f"weight_index.{r['name']}"
                for tag in pattern["tags"]:
                    yield f"tag.{r['name']}.{tag}"
        for name in self._data.get("frozen", ()):
            yield f"frozen.{name}"

    def _group(self, r: dict[str, Any]) -> Group:
        name = r["name"]
        serials = self._array(f"serials.{name}", torch.int64)
        if serials.size and not 0 <= int(serials.min()) <= int(serials.max()) < self._data["next_serial"]:
            raise BadFile(f"{self._who}: serials of group {name!r}", "one out of range", "0 to the next serial")
        norm = None
        if r["norm"] is not None:
            facts: dict[str, Any] = dict(r["norm"])
            facts |= {kind: self._tensor(f"{kind}.{name}") for kind in _NORM_TENSORS if f"{kind}.{name}" in self.names}
            norm = Norm(**facts)
        bias = self._tensor(f"bias.{name}") if r["bias"] else None
        return Group(name, tuple(r["shape"]), r["activation"], r["aggregation"], bias, norm, r["dropout"], serials)

    def _bundle(self, r: dict[str, Any]) -> Bundle:
        weight = self._tensor(f"weight.{r['name']}")
        return Bundle(r["name"], r["source"], r["target"], self._pattern(r), weight, r["trainable"])

    def _pattern(self, r: dict[str, Any]) -> Pattern:
        kind, name = r["pattern"]["kind"], r["name"]
        numbers = {key: value for key, value in r["pattern"].items() if key != "kind"}
        if kind != "Sparse":
            return PATTERNS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()})
        index = self._array(f"weight_index.{name}", torch.int32) if numbers["tied"] else None
        source, target = (self._array(f"{end}.{name}", torch.int32) for end in ("source", "target"))
        tags = {tag: self._array(f"tag.{name}.{tag}") for tag in numbers["tags"]}
        if index is None and numbers["weights"] != source.size:
            found = f"{numbers['weights']} weights for {source.size} edges"
            raise BadFile(f"{self._who}: bundle {name!r}", found, "one for each edge where none are shared")
        return Sparse(source, target, index, numbers["weights"], tags)

    def _array(self, name: str, dtype: torch.dtype | None = None) -> np.ndarray:
        entry = self._entries[name]
        if len(entry.shape) != 1 or (entry.dtype != dtype if dtype else entry.dtype.is_floating_point):
            raise BadFile(
                f"{self._who}: tensor {name!r}",
                f"{entry.dtype}, shape {entry.shape}",
                f"a list of {dtype or 'integers'}",
            )
        return self._tensor(name).numpy()


def _record(data: Any, who: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(data, dict) or data.keys() != set(keys):
        found = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise BadFile(who, f"{found:.80}", f"an object with {', '.join(keys)}")
    return data


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_small(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 8 and all(_is_small(n) and n > 0 for n in value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_small, value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _is_object_or_none(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _is_tags(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


_EXPECTED: dict[Callable[[Any], bool], str] = {
    _is_small: "an integer from 0 to 2**31 - 1",
    _is_shape: "a list of 1 to 8 sizes, each at least 1",
    _is_pair: "two integers from 0 to 2**31 - 1",
    _is_number: "a finite number",
    _is_text: "text",
    _is_bool: "true or false",
    _is_object: "an object",
    _is_object_or_none: "an object or null",
    _is_tags: "a list of different texts",
}
_GROUP = {
    "name": _is_text,
    "shape": _is_shape,
    "activation": _is_text,
    "aggregation": _is_text,
    "bias": _is_bool,
    "dropout": _is_number,
    "norm": _is_object_or_none,
}
_NORM = {"kind": _is_text, "eps": _is_number, "momentum": _is_number, "groups": _is_small}
_BUNDLE = {"name": _is_text, "source": _is_text, "target": _is_text, "pattern": _is_object, "trainable": _is_bool}
_WINDOW = {"kind": _is_text, "kernel": _is_pair, "stride": _is_pair, "padding": _is_pair, "dilation": _is_pair}
_PATTERN = {
    "Dense": {"kind": _is_text},
    "Sparse": {"kind": _is_text, "weights": _is_small, "tied": _is_bool, "tags": _is_tags},
    "Identity": {"kind": _is_text, "start": _is_small},
    "Conv2d": {**_WINDOW, "channel_groups": _is_small},
    "Local2d": {**_WINDOW, "channel_groups": _is_small},
    "Pool2d": _WINDOW,
}
