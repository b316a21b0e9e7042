"""One file of named tensors and JSON sections: safetensors, with a sha256 of everything and strict reading.

    8 bytes   the header's length, little-endian
    header    JSON: {"__metadata__": {"sha256": ..., "format": ..., "hashes": ..., SECTION: ...}, NAME: {...}, ...}
    payload   the tensors, little-endian, one after the other, no gaps

Any safetensors reader can read it. `sha256` is the hash of the length and the header with that hash itself
replaced by zeros; `hashes` are those of the tensors. Every bit of the file is under one of them. Sections
are JSON texts (safetensors allows only text there).

Written here rather than by the library because the library neither hashes nor fixes the order of the
metadata, and reads a header only as a whole. Nothing is allocated before the sizes that the header claims
have been compared with the size of the file.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from irgrow.io.atomic import replacing
from irgrow.io.plain import from_text, to_text
from irgrow.ir.errors import BadData, BadFile

FORMAT = "irgrow 1"
HEADER_LIMIT = 32 << 20  # bytes; networks keep their long arrays as tensors, so headers are short
CHUNK = 1 << 22  # bytes hashed at a time where a tensor is not kept

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ZEROS = "0" * 64
_OPENING = b'{"__metadata__":{"sha256":"'  # the hash stands at a fixed place, so that it can be checked before parsing


# ---- writing ----------------------------------------------------------------------------------------------


def write(path: Path, sections: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """`path` holds exactly these sections (JSON data) and tensors; the same contents always give the same bytes.

    Raises BadFile if the operating system refuses; then any older file is as it was.
    """
    ordered = _ordered(path, tensors)
    length = len(_header(ordered, sections, dict.fromkeys(ordered, _ZEROS)))
    if length > HEADER_LIMIT:
        raise BadData(
            f"saving {path}", f"{length:,} bytes of structure, progress and extra data", f"at most {HEADER_LIMIT:,}"
        )
    hashes = {}
    with replacing(path) as file:
        file.write(bytes(8 + length))
        for name, tensor in ordered.items():
            raw = _bytes(tensor)
            hashes[name] = hashlib.sha256(raw).hexdigest()
            file.write(raw)
        header = _header(ordered, sections, hashes)
        assert len(header) == length
        file.seek(0)
        file.write(length.to_bytes(8, "little") + header)


def _ordered(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in payload order: wide numbers first, so that each begins at a multiple of its width."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _CODES:
            raise BadData(
                f"saving {path}: tensor {name!r}",
                f"{tensor.dtype}, {tensor.layout}",
                f"a dense tensor of {', '.join(str(d).removeprefix('torch.') for d in _CODES)}",
            )
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:  # counts as contiguous whatever its stride, but cannot be viewed as bytes
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor], sections: Mapping[str, Any], hashes: Mapping[str, str]) -> bytes:
    metadata = {"sha256": _ZEROS, "format": FORMAT, "hashes": to_text(dict(hashes))}
    metadata |= {name: to_text(section) for name, section in sections.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = to_text(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    return _sealed(text)


def _sealed(header: bytes) -> bytes:
    """The header with its own hash in place."""
    at = len(_OPENING)
    return header[:at] + _seal(header).encode("ascii") + header[at + 64 :]


def _seal(header: bytes) -> str:
    at = len(_OPENING)
    digest = hashlib.sha256(len(header).to_bytes(8, "little"))
    digest.update(header[:at])
    digest.update(_ZEROS.encode("ascii"))
    digest.update(header[at + 64 :])
    return digest.hexdigest()


# ---- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands in the payload, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    sha256: str


class Container:
    """An open file whose header has been checked; tensors are checked as they are read.

    Use as a context manager. Raises BadFile for whatever is wrong with the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left: set[str] = set()
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for a writer
                raise BadFile(str(path), "a directory or device", "a file that irgrow wrote", do="give the file's path")
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise BadFile(
                str(path), error.strerror, "a file that can be read", do="check the path and permissions"
            ) from None
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header = self._open_header()
            self.sections, self.entries = self._contents(header)
        except BaseException:
            self._file.close()
            raise
        self._left = set(self.entries)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The file is closed."""
        self._file.close()

    def nothing_left(self) -> None:
        """Every tensor was read, or BadFile: one that nothing refers to has no place in a file."""
        for name in self._left:
            raise BadFile(f"{self.path}: tensor {name!r}", "nothing that it belongs to", "none of that name")

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, its hash checked."""
        if name not in self.entries:
            raise BadFile(f"{self.path}: tensor {name!r}", "none of that name", "one", do=_ANOTHER)
        entry = self.entries[name]
        try:
            flat = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        except RuntimeError as error:  # torch's way to say that there is not enough memory
            raise BadFile(
                f"{self.path}: tensor {name!r}", f"{entry.end - entry.begin:,} bytes", "fewer, for this machine"
            ) from error
        raw = flat.numpy().data
        digest = hashlib.sha256()
        self._seek(entry.begin)
        for first in range(0, len(raw), CHUNK):
            digest.update(self._fill(raw[first : first + CHUNK]))
        self._compare(name, digest.hexdigest())
        if entry.dtype == torch.bool and bool((flat > 1).any()):
            raise BadFile(f"{self.path}: tensor {name!r}", "a byte that is no bool", "0 or 1", do=_ANOTHER)
        return flat.view(entry.dtype).reshape(entry.shape)

    def check_the_rest(self) -> None:
        """The tensors that were not read have their hashes, too."""
        buffer = bytearray(CHUNK)
        for name in sorted(self._left, key=lambda n: self.entries[n].begin):
            entry, digest = self.entries[name], hashlib.sha256()
            self._seek(entry.begin)
            for first in range(entry.begin, entry.end, CHUNK):
                digest.update(self._fill(memoryview(buffer)[: min(CHUNK, entry.end - first)]))
            self._compare(name, digest.hexdigest())

    def _compare(self, name: str, found: str) -> None:
        expected = self.entries[name].sha256
        if found != expected:
            raise BadFile(
                f"{self.path}: tensor {name!r}", f"the hash {found[:16]}...", f"{expected[:16]}...", do=_ANOTHER
            )
        self._left.discard(name)

    def _seek(self, offset: int) -> None:
        try:
            self._file.seek(self._payload + offset)
        except OSError as error:
            raise BadFile(str(self.path), error.strerror, "a readable file", do=_ANOTHER) from None

    def _fill(self, buffer: memoryview) -> memoryview:
        """The buffer is filled with the file's next bytes."""
        done = 0
        while done < len(buffer):
            try:
                count = self._file.readinto(buffer[done:])  # type: ignore[attr-defined]
            except OSError as error:
                raise BadFile(str(self.path), error.strerror, "a readable file", do=_ANOTHER) from None
            if not count:
                raise BadFile(str(self.path), "the end of the file", "more bytes (it was cut off)", do=_ANOTHER)
            done += count
        return buffer

    def _open_header(self) -> bytes:
        """The header's bytes, their hash checked."""
        who = f"{self.path}: header"
        if self.size < 8 + len(_OPENING) + 64:
            raise BadFile(who, f"a file of {self.size} bytes", "a file that irgrow wrote", do=_ANOTHER)
        length = int.from_bytes(self._fill(memoryview(bytearray(8))), "little")
        if not len(_OPENING) + 64 <= length <= min(self.size - 8, HEADER_LIMIT):
            raise BadFile(who, f"a length of {length} in a file of {self.size} bytes", "less", do=_NOT_OURS)
        self._payload = 8 + length
        header = bytes(self._fill(memoryview(bytearray(length))))
        at = len(_OPENING)
        if header[:at] != _OPENING:
            raise BadFile(who, "another beginning", "that of a file that irgrow wrote", do=_NOT_OURS)
        if header[at : at + 64] != _seal(header).encode("ascii"):
            raise BadFile(who, "a hash that does not match", "an undamaged header", do=_ANOTHER)
        return header

    def _contents(self, header: bytes) -> tuple[dict[str, Any], dict[str, Entry]]:
        who = f"{self.path}: header"
        table = _object(from_text(header, who), who)
        metadata = _object(table.pop("__metadata__", None), f"{who}: __metadata__")
        for key, value in metadata.items():
            if not isinstance(value, str):
                raise BadFile(f"{who}: {key!r}", type(value).__name__, "text")
        if metadata.pop("format", None) != FORMAT:
            raise BadFile(
                who, "another format or version", repr(FORMAT), do="read it with the irgrow version that wrote it"
            )
        metadata.pop("sha256", None)
        hashes = _object(from_text(metadata.pop("hashes", "null"), who), f"{who}: hashes")
        if hashes.keys() != table.keys() or not all(isinstance(h, str) and len(h) == 64 for h in hashes.values()):
            raise BadFile(f"{who}: hashes", f"{len(hashes)} hashes", f"one for each of the {len(table)} tensors")
        entries = dict(self._entries(table, hashes, who))
        self._check_payload(entries)
        sections = {name: from_text(text, f"{self.path}: {name}") for name, text in metadata.items()}
        return sections, entries

    def _entries(self, table: dict[str, Any], hashes: dict[str, str], who: str) -> Iterator[tuple[str, Entry]]:
        for name, record in table.items():
            at = f"{who}: tensor {name!r}"
            record = _object(record, at)
            if record.keys() != {"dtype", "shape", "data_offsets"}:
                raise BadFile(at, f"the keys {', '.join(record)}", "dtype, shape, data_offsets")
            code, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
            if not isinstance(code, str) or code not in DTYPES:
                raise BadFile(f"{at}: dtype", f"{code!r:.40}", f"one of {', '.join(DTYPES)}")
            if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(n) for n in shape):
                raise BadFile(f"{at}: shape", f"{shape!r:.40}", "a list of at most 8 sizes")
            if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
                raise BadFile(f"{at}: data_offsets", f"{offsets!r:.40}", "[begin, end]")
            nbytes = DTYPES[code].itemsize * math.prod(shape)
            if math.prod(n or 1 for n in shape) >= 1 << 53:  # an empty tensor, with sizes torch cannot multiply
                raise BadFile(f"{at}: shape", f"{shape!r:.40}", "sizes whose product is below 2**53")
            if offsets[1] - offsets[0] != nbytes:
                raise BadFile(f"{at}: data_offsets", f"{offsets[1] - offsets[0]} bytes", f"{nbytes}, for its shape")
            yield name, Entry(DTYPES[code], tuple(shape), offsets[0], offsets[1], hashes[name])

    def _check_payload(self, entries: Mapping[str, Entry]) -> None:
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != end:
                raise BadFile(f"{self.path}: tensor {name!r}", f"a begin at byte {entry.begin}", f"byte {end}")
            end = entry.end
        if self._payload + end != self.size:
            raise BadFile(
                str(self.path), f"a file of {self.size:,} bytes", f"{self._payload + end:,} (it was cut off, or grew)"
            )


_ANOTHER = "the file is damaged: use another copy"
_NOT_OURS = "the file is damaged, or irgrow did not write it"


def _object(value: Any, who: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadFile(who, type(value).__name__, "an object", do=_NOT_OURS)
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53
