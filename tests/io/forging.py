"""Networks of every kind, and files made by somebody who knows the format and computes valid hashes.

Written from the description of the format, not with the writer's own functions.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import irgrow as ig

OPENING = b'{"__metadata__":{"sha256":"'


# ---- networks -------------------------------------------------------------------------------------------------


def zoo() -> dict[str, ig.Network]:
    """One network of every kind that a file must keep: patterns, norms, ties, tags, roles, dtypes, names."""
    return {
        "mlp": ig.mlp([5, 4, 3], seed=1),
        "normed": ig.mlp([4, 6, 6, 2], norm="batch", seed=2, dtype=torch.float64),
        "cnn": ig.cnn((2, 8, 8), (3, 4), 3, norm="batch", pooling="mean", seed=3),
        "max pooling": ig.cnn((1, 8, 8), (2,), 2, dtype=torch.bfloat16, seed=4),
        "patterns": _patterns(),
        "tied": _tied(),
        "inserted": inserted(4, 2, 8),
        "neurons": _neurons(),
    }


def inserted(inputs: int, outputs: int, neurons: int) -> ig.Network:
    """A dense network into which that many neurons were inserted."""
    network = ig.mlp([inputs, outputs], seed=0)
    for seed in range(neurons):
        network = ig.InsertNeuron(seed=seed)(network).after
    return network


def _patterns() -> ig.Network:
    b = ig.Builder(seed=5)
    b.input("image", (4, 6, 6))
    b.input("flat_µ", 3)
    b.group("depthwise", (8, 6, 6), activation="gelu", bias=True)
    b.connect("image", "depthwise", ig.Conv2d((3, 3), padding=(1, 1), channel_groups=4))
    b.group("grouped", (4, 3, 3), norm="group", norm_groups=2, dropout=0.25)
    b.connect("depthwise", "grouped", ig.Conv2d((2, 2), stride=(2, 2), channel_groups=2), trainable=False)
    b.group("local", (4, 3, 3), norm="layer", activation="tanh")
    b.connect("grouped", "local", ig.Local2d((3, 3), padding=(1, 1), dilation=(1, 1)))
    b.connect("grouped", "local", ig.Identity(), name="residual")
    b.group("both", 39, activation="silu")
    b.connect("flat_µ", "both", ig.Identity(36), trainable=True)
    b.connect("local", "both", ig.Sparse(np.arange(36), np.arange(36)))
    b.output("y", 2, bias=True)
    b.connect("both", "y")
    b.output("pooled", (4, 1, 1), aggregation="max")
    b.connect("local", "pooled", ig.Pool2d((3, 3)))
    return b.build()


def _tied() -> ig.Network:
    b = ig.Builder(seed=6, dtype=torch.float16)
    b.input("x", 4)
    b.output("y", 3)
    tags = {"primary": np.array([1, 0, 1, 0], np.int32), "age of an edge": np.array([7, -2, 0, 3], np.int8)}
    b.connect("x", "y", ig.Sparse(np.array([0, 1, 2, 3]), np.array([0, 1, 2, 0]), np.array([0, 1, 1, 0]), tags=tags))
    b.connect("x", "y", ig.Sparse(np.empty(0, int), np.empty(0, int)), name="no_edges")
    return b.build()


def _neurons() -> ig.Network:
    b = ig.Builder()
    first, second = b.neuron(role="input"), b.neuron(role="input")
    hidden, deeper = b.neuron("relu"), b.neuron("relu", bias=0.5)
    out = b.neuron("identity", role="output")
    for source, target in ((first, hidden), (second, hidden), (hidden, deeper), (first, deeper), (deeper, out)):
        b.connect(source, target, 0.25)
    return b.build()


def flipped_loop(network: ig.Network) -> ig.Network:
    """The network with one edge more, which closes a loop; not verified."""
    name = next(b.name for b in network.bundles.values() if b.source == b.target)
    bundle = network.bundles[name]
    pattern = bundle.pattern
    assert isinstance(pattern, ig.Sparse)
    back = ig.Sparse(
        np.append(pattern.source, pattern.target[0]),
        np.append(pattern.target, pattern.source[0]),
        tags={tag: np.append(array, 0) for tag, array in pattern.tags.items()},
    )
    looped = replace(bundle, pattern=back, weight=torch.cat([bundle.weight, bundle.weight[:1]]))
    bundles = {n: looped if n == name else b for n, b in network.bundles.items()}
    return ig.Network(network.groups, bundles, network.inputs, network.outputs, network.next_serial)


# ---- files ----------------------------------------------------------------------------------------------------


class Forged:
    """A file taken apart: `table` (tensors), `sections`, `payload`; `bytes()` puts it together, hashes and all."""

    def __init__(self, raw: bytes) -> None:
        length = int.from_bytes(raw[:8], "little")
        self.table: dict[str, Any] = json.loads(raw[8 : 8 + length])
        metadata = self.table.pop("__metadata__")
        metadata.pop("sha256")
        self.format: Any = metadata.pop("format")
        self.hashes: Any = json.loads(metadata.pop("hashes"))
        self.sections: dict[str, Any] = {name: json.loads(text) for name, text in metadata.items()}
        self.payload = raw[8 + length :]

    def copy(self) -> Forged:
        return deepcopy(self)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor's bytes, as an array of its type."""
        begin, end = self.table[name]["data_offsets"]
        dtype = self.table[name]["dtype"]
        kind = "u2" if dtype == "BF16" else f"{dtype[0].lower()}{int(dtype[1:]) // 8}"
        return np.frombuffer(self.payload[begin:end], "<" + kind)

    def put(self, name: str, array: np.ndarray) -> None:
        """Other bytes for a tensor, as many as before."""
        begin, end = self.table[name]["data_offsets"]
        raw = array.tobytes()
        assert len(raw) == end - begin
        self.payload = self.payload[:begin] + raw + self.payload[end:]
        self.hashes[name] = hashlib.sha256(raw).hexdigest()

    def append(self, name: str, array: np.ndarray, dtype: str) -> None:
        """A further tensor at the end of the payload."""
        begin = len(self.payload)
        self.payload += array.tobytes()
        self.table[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, len(self.payload)]}
        self.hashes[name] = hashlib.sha256(array.tobytes()).hexdigest()

    def remove(self, name: str) -> None:
        """The file without that tensor, and without a gap where it was."""
        begin, end = self.table.pop(name)["data_offsets"]
        del self.hashes[name]
        self.payload = self.payload[:begin] + self.payload[end:]
        for record in self.table.values():
            if record["data_offsets"][0] >= end:
                record["data_offsets"] = [offset - (end - begin) for offset in record["data_offsets"]]

    def bytes(self) -> bytes:
        metadata = {"sha256": "0" * 64, "format": self.format, "hashes": json.dumps(self.hashes)}
        metadata |= {name: json.dumps(section) for name, section in self.sections.items()}
        return sealed(
            json.dumps({"__metadata__": metadata, **self.table}, separators=(",", ":")).encode(), self.payload
        )


def sealed(header: bytes, payload: bytes) -> bytes:
    """A file with this header (its hash set right) and payload."""
    header += b" " * (-len(header) % 8)
    length, at = len(header).to_bytes(8, "little"), len(OPENING)
    if header[:at] == OPENING:
        blank = header[:at] + b"0" * 64 + header[at + 64 :]
        header = header[:at] + hashlib.sha256(length + blank).hexdigest().encode() + header[at + 64 :]
    return length + header + payload


NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, (1 << 53) - 1, 1 << 63, 1 << 64, 10**30, -(10**30), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "input", "hidden", "relu", "Dense", "Sparse", "\ud800", "a.b", [], [1], [1, 1],
    [-1, 3], [1 << 40, 1 << 40], [[[]]], {}, {"kind": "Dense"}, {"$tuple": [1]}, {"$dict": 3},
]  # fmt: skip


def forgeries(raw: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged and forged versions of a file, each with a word about how it was made."""
    draw = random.Random(seed)
    original = Forged(raw)
    kinds = (_cut, _longer, _noise, _blocks, _length, _json, _json, _json, _json, _tensors, _tensors, _values, _text)
    for _ in range(count):
        kind = draw.choice(kinds)
        made = kind(raw, original, draw)
        if made != raw:
            yield kind.__name__.strip("_"), made


def _cut(raw: bytes, _: Forged, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def _longer(raw: bytes, _: Forged, draw: random.Random) -> bytes:
    return raw + draw.randbytes(draw.choice((1, 8, 1000)))


def _noise(raw: bytes, _: Forged, draw: random.Random) -> bytes:
    return draw.choice((draw.randbytes(draw.choice((0, 1, 7, 8, 9, 500))), raw[:8] + draw.randbytes(len(raw) - 8)))


def _blocks(raw: bytes, _: Forged, draw: random.Random) -> bytes:
    """A block zeroed, doubled, left out, or exchanged with another."""
    a, n = draw.randrange(len(raw)), draw.choice((1, 4, 64, 512))
    block = raw[a : a + n]
    b = draw.randrange(len(raw))
    return draw.choice(
        (
            raw[:a] + bytes(len(block)) + raw[a + n :],
            raw[:a] + block + raw[a:],
            raw[:a] + raw[a + n :],
            raw[:b] + block + raw[b + len(block) :],
        )
    )


def _length(raw: bytes, _: Forged, draw: random.Random) -> bytes:
    huge = draw.choice((0, 1, 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1, draw.randrange(1 << 13)))
    return huge.to_bytes(8, "little") + raw[8:]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _json(raw: bytes, original: Forged, draw: random.Random) -> bytes:
    """One field of the header changed, left out, added or doubled; every hash is right."""
    forged = original.copy()
    tree = {"table": forged.table, "sections": forged.sections, "hashes": forged.hashes}
    *path, last = draw.choice([p for p in _places(tree) if len(p) > 1])
    holder: Any = tree
    for key in path:
        holder = holder[key]
    action = draw.choice(("change", "change", "change", "drop", "add", "double"))
    if action == "change":
        holder[last] = draw.choice(NASTY)
    elif action == "drop":
        del holder[last]
    elif isinstance(holder, dict):
        holder[draw.choice(("x", "__metadata__", "weight.x", "edges"))] = draw.choice(NASTY)
    else:
        holder.insert(draw.randrange(len(holder) + 1), deepcopy(draw.choice((holder[last], draw.choice(NASTY)))))
    return forged.bytes()


def _tensors(raw: bytes, original: Forged, draw: random.Random) -> bytes:
    """A tensor left out, added, renamed, given another type or shape, or moved."""
    forged = original.copy()
    name = draw.choice(list(forged.table))
    record = forged.table[name]
    action = draw.randrange(6)
    if action == 0:
        forged.remove(name)
    elif action == 1:
        forged.append(draw.choice(("weight.more", "bias.x", "optimizer.x", "x", "")), np.ones(3, "f4"), "F32")
    elif action == 2:
        other = draw.choice(list(forged.table))
        forged.table[name], forged.table[other] = forged.table[other], forged.table[name]
        forged.hashes[name], forged.hashes[other] = forged.hashes[other], forged.hashes[name]
    elif action == 3:
        record["dtype"] = draw.choice(("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "C64", "F8_E4M3", 3))
    elif action == 4:
        record["shape"] = draw.choice(([], [0], [-1], [1 << 40], record["shape"][::-1], [*record["shape"], 1], [2.0]))
    else:
        step = draw.choice((-1, 1, 8, 1 << 40))
        record["data_offsets"] = [offset + step for offset in record["data_offsets"]]
    return forged.bytes()


def _values(raw: bytes, original: Forged, draw: random.Random) -> bytes:
    """Numbers that a network cannot have, with right hashes: NaN weights, serials and edges out of range."""
    forged = original.copy()
    name = draw.choice(list(forged.table))
    array = forged.tensor(name).copy()
    if array.size:
        at = draw.randrange(array.size)
        if forged.table[name]["dtype"] == "BF16":
            array[at] = draw.choice((0x7F80, 0xFF80, 0x7FC0))
        elif array.dtype.kind == "f":
            array[at] = draw.choice((np.nan, np.inf, -np.inf))
        else:
            limits = np.iinfo(array.dtype)
            array[at] = draw.choice((limits.max, limits.min, max(limits.min, -1), array[0], draw.randrange(100)))
        forged.put(name, array)
    return forged.bytes()


def _text(raw: bytes, original: Forged, draw: random.Random) -> bytes:
    """A header that is no JSON, or strange JSON, under a right hash."""
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    at = draw.randrange(len(OPENING) + 64, len(header))
    middle = draw.choice((b"[" * 3000, b"\xff", b"NaN", b'{"a":', b"9" * 5000, b'","x":"', b"\\", b"\x00", b" "))
    return sealed(header[:at] + middle + header[at:], raw[8 + length :])
