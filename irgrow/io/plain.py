"""Plain data as JSON and back, without loss: what a section of a file may hold, and nothing else.

None, bool, int, finite float, str, list and dict with text keys are themselves in JSON. What JSON lacks is
written as an object with one key that begins with `$`:

    tuple        {"$tuple": [...]}
    inf, nan     {"$float": "inf"}
    other dicts  {"$dict": [[key, value], ...]}       (integer keys, or keys that begin with `$`)
    tensors      {"$tensor": "name of a tensor of the file"}, where the writer allows them
    arrays       {"$array": "name of a tensor of the file"}, likewise
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irgrow.ir.errors import BadData, BadFile

DEEPEST = 60  # nested lists and dicts; far below the interpreter's limit for recursion


def encode(value: Any, who: str, tensors: dict[str, Tensor] | None = None, deep: int = 0) -> Any:
    """`value` as JSON data. Tensors and arrays in it are added to `tensors` under names that begin with `who`.

    Raises BadData, naming the place, for anything that is not plain data, and for tensors where `tensors` is None.
    """
    if deep > DEEPEST:
        raise BadData(who, f"data nested more than {DEEPEST} deep", "less", do="does it hold itself?")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if value.bit_length() > 4096:
            raise BadData(who, f"an integer of {value.bit_length()} bits", "at most 4096")
        return int(value)
    if isinstance(value, float):
        return float(value) if isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, (list, tuple)):
        items = [encode(v, f"{who}.{n}", tensors, deep + 1) for n, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(v, f"{who}.{key}", tensors, deep + 1) for key, v in value.items()}
        for key in value:
            if not _is_key(key):
                raise BadData(f"{who}: a key", f"a {type(key).__name__}", "text or an integer")
        return {"$dict": [[k, encode(v, f"{who}.{k}", tensors, deep + 1)] for k, v in value.items()]}
    if tensors is not None and isinstance(value, (Tensor, np.ndarray)):
        tensors[who] = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        return {"$tensor" if isinstance(value, Tensor) else "$array": who}
    raise BadData(
        who,
        f"a {type(value).__name__}",
        "plain data: None, bool, int, float, str, list, tuple, dict" + (", tensors" if tensors is not None else ""),
        do="convert it, or leave it out",
    )


def decode(value: Any, who: str, tensor: Callable[[str], Tensor] | None = None, deep: int = 0) -> Any:
    """What `encode` was given; `tensor` finds the file's tensors by name. Raises BadFile for any other JSON data."""
    if deep > 2 * DEEPEST + 2:
        raise BadFile(who, "data nested too deep", f"at most {DEEPEST} levels")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise BadFile(who, f"the number {value}", "a finite number")
        return value
    if isinstance(value, list):
        return [decode(v, f"{who}.{n}", tensor, deep + 1) for n, v in enumerate(value)]
    mark = next((key for key in value if key.startswith("$")), None)
    if mark is None:
        return {key: decode(v, f"{who}.{key}", tensor, deep + 1) for key, v in value.items()}
    inner = value[mark]
    if len(value) == 1:
        if mark == "$tuple" and isinstance(inner, list):
            return tuple(decode(inner, who, tensor, deep + 1))
        if mark == "$float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if mark == "$dict" and _are_pairs(inner):
            return {k: decode(v, f"{who}.{k}", tensor, deep + 1) for k, v in inner}
        if mark in ("$tensor", "$array") and isinstance(inner, str) and tensor is not None:
            found = tensor(inner)
            return found if mark == "$tensor" else found.numpy()
    raise BadFile(who, f"the mark {mark!r} with something unknown", "$tuple, $float, $dict, $tensor or $array")


def to_text(value: Any) -> str:
    """JSON data as text, always the same for the same data; ASCII without line breaks."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def from_text(text: str | bytes, who: str) -> Any:
    """The JSON data in `text`. Raises BadFile for everything that `to_text` does not write."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadFile(who, f"no readable JSON ({error})", "what irgrow wrote") from None


def _is_key(key: object) -> bool:
    return key is None or isinstance(key, (bool, int, str))


def _are_pairs(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 and _is_key(p[0]) for p in value):
        return False
    return len({key for key, _ in value}) == len(value)


def _refuse(constant: str) -> Any:
    raise ValueError(f"the number {constant}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("one key twice in an object")
    return found
