"""Saving and loading networks: `save`, `load`, `read_extra`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from irgrow.io import plain
from irgrow.io.container import Container, Entry, write
from irgrow.io.optimizer import describe_optimizer
from irgrow.io.structure import Reader, describe
from irgrow.ir.errors import BadData, BadFile
from irgrow.ir.network import Network


@runtime_checkable
class Model(Protocol):
    """What can be saved beside a Network: a compiled network."""

    def network(self) -> Network: ...
    def tensors(self) -> Mapping[str, Tensor]: ...


def save(
    path: str | os.PathLike[str],
    network_or_model: Network | Model,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`path` is a file with this network (a model's current values), whole and on disk.

    A safetensors file: weights under their names, the structure in the header, a hash of everything. The
    same network gives the same bytes. `extra` is plain data of the caller's (`read_extra`). With an
    `optimizer` its state is saved too (`load_checkpoint`). Raises the named error of `Network.verify` for a
    network that is not well formed, BadData for an `extra` that is not plain data, BadFile if the file cannot
    be written; an older file of that name is then as it was.
    """
    write_sections(path, network_or_model, {"extra": dict(extra or {})}, optimizer)


def load(path: str | os.PathLike[str]) -> Network:
    """The network in a file that `save` or `save_checkpoint` wrote, verified, on the CPU.

    Raises BadFile for a file that is missing, damaged, cut off or not ours: nothing is loaded from it.
    """
    with open_container(path) as file:
        network, _ = read_network(file)
        file.check_the_rest()
        return network


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `extra` that a file was saved with; the rest of the file is not read. Raises BadFile."""
    with open_container(path) as file:
        return read_section(file, "extra", {})


# ---- shared with checkpoints --------------------------------------------------------------------------------


def write_sections(
    path: str | os.PathLike[str],
    network_or_model: Network | Model,
    plain_sections: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """The network and these sections of plain data (tensors allowed in `scheduler` and `random`) are in the file."""
    where = as_path(path)
    if isinstance(network_or_model, Network):
        network, live = network_or_model, network_or_model.tensors()
    elif isinstance(network_or_model, Model):
        network, live = network_or_model.network(), dict(network_or_model.tensors())
    else:
        raise BadData("save", f"a {type(network_or_model).__name__}", "a Network or a compiled network")
    network.verify()
    structure, tensors = describe(network)
    sections: dict[str, Any] = {"structure": structure}
    if optimizer is not None:
        sections["optimizer"] = describe_optimizer(optimizer, live, tensors)
    for name, value in plain_sections.items():
        if value not in (None, {}, []):
            sections[name] = plain.encode(value, name, tensors if name in WITH_TENSORS else None)
    # What is written can be read: the same checks, before anything is written.
    entries = {n: Entry(t.dtype, tuple(t.shape), 0, 0, "") for n, t in tensors.items()}
    try:
        Reader("save", structure, entries, tensors.__getitem__, sum(t.nbytes for t in tensors.values()))
    except BadFile as error:
        raise BadData(error.who, error.found, error.expected, "this network cannot be saved") from None
    write(where, sections, tensors)


WITH_TENSORS = ("scheduler", "random")
SECTIONS = {"structure", "optimizer", "extra", "scheduler", "random", "ledger", "progress"}


def open_container(path: str | os.PathLike[str]) -> Container:
    """The file, its header checked and its sections known."""
    where = as_path(path)
    file = Container(where)
    if not {"structure"} <= file.sections.keys() <= SECTIONS:
        file.close()
        raise BadFile(f"{where}: sections", ", ".join(file.sections) or "none", "structure, and those irgrow knows")
    return file


def read_network(file: Container) -> tuple[Network, set[str]]:
    """The file's network, and the names of the tensors that belong to it."""
    reader = Reader(str(file.path), file.sections["structure"], file.entries, file.tensor, file.size)
    owners = ("optimizer.", "scheduler.", "random.")
    known = {name for name in file.entries if name in reader.names or name.startswith(owners)}
    for name in file.entries:
        if name not in known:
            raise BadFile(f"{file.path}: tensor {name!r}", "nothing that it belongs to", "none of that name")
    return reader.network(), reader.names


def read_section(file: Container, name: str, default: Any) -> Any:
    """A section of plain data, decoded; of the default's type."""
    if name not in file.sections:
        return default
    who = f"{file.path}: {name}"
    value = plain.decode(file.sections[name], who, file.tensor if name in WITH_TENSORS else None)
    if not isinstance(value, type(default)):
        raise BadFile(who, type(value).__name__, type(default).__name__)
    return value


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path as a Path; raises BadFile for what is none."""
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise BadFile("path", f"a {type(path).__name__}", "text or a Path") from None
    if "\0" in text:
        raise BadFile(f"path {text!r}", "a null character", "none")
    return Path(text)
