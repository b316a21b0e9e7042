"""Checkpoints: everything that training needs to go on as if it had never stopped.

irgrow.save_checkpoint("run.irgrow", model, optimizer=optimizer, scheduler=scheduler, progress={"epoch": 7})

checkpoint = irgrow.load_checkpoint("run.irgrow")          # in another process
model = irgrow.compile(checkpoint.network)                 # as grown; the code that grew it is not needed
optimizer = torch.optim.AdamW(model.parameters())
checkpoint.restore(model, optimizer, scheduler)            # state, options, parameter groups, random state
epoch = checkpoint.progress["epoch"]
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from irgrow.io import random_state
from irgrow.io.network import Model, open_container, read_network, read_section, write_sections
from irgrow.io.optimizer import OptimizerState, read_optimizer
from irgrow.io.random_state import Generator
from irgrow.ir.errors import BadData, BadFile
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network
from irgrow.runtime.ledger import Entry, Ledger


def save_checkpoint(
    path: str | os.PathLike[str],
    model: Network | Model,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    ledger: Ledger | Iterable[Morphism | Entry] | None = None,
    progress: Mapping[str, Any] | None = None,
    generators: Mapping[str, Generator] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`path` holds the network, the training state and the state of everything random, whole and on disk.

    `ledger` tells what the network grew by (None: the model's own ledger); kept is its text: passes with their
    seeds, proposals by hash, hashes of the structures before and after. `progress` and `extra` are plain data.
    `scheduler` is anything with a `state_dict`. `generators` are random generators besides the global ones (a
    data loader's). Raises as `save`.
    """
    write_sections(
        path,
        model,
        {
            "ledger": [asdict(entry) for entry in _entries(model, ledger)],
            "progress": dict(progress or {}),
            "scheduler": None if scheduler is None else dict(scheduler.state_dict()),
            "random": random_state.capture(generators),
            "extra": dict(extra or {}),
        },
        optimizer,
    )


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """What `save_checkpoint` (or `save`) wrote, checked. Raises BadFile, with nothing loaded, as `load`."""
    with open_container(path) as file:
        network, _ = read_network(file)
        random = read_section(file, "random", {})
        checkpoint = Checkpoint(
            network,
            read_optimizer(file, network.tensors()),
            read_section(file, "scheduler", {}) if "scheduler" in file.sections else None,
            random_state.check(random, f"{file.path}: random") if random else None,
            _ledger(read_section(file, "ledger", []), f"{file.path}: ledger"),
            read_section(file, "progress", {}),
            read_section(file, "extra", {}),
        )
        file.nothing_left()
        return checkpoint


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network and the state of its training; None for what was not saved."""

    network: Network
    optimizer: OptimizerState | None = None
    scheduler: dict[str, Any] | None = None
    random: dict[str, Any] | None = None
    ledger: Ledger = field(default_factory=Ledger)
    progress: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def restore(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        *,
        generators: Mapping[str, Generator] | None = None,
        random: bool = True,
    ) -> None:
        """Model (its ledger too), optimizer, scheduler and (unless `random=False`) everything random are as saved.

        The model must have this checkpoint's structure, the optimizer the same class, number of parameter
        groups and parameters, the generators the same names: else BadData, and nothing has changed.
        """
        tensors = dict(model.tensors())
        wanted = self.network.tensors()
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        if shapes != {name: tuple(t.shape) for name, t in wanted.items()}:
            raise BadData(
                "restoring the model",
                "tensors of other names or shapes",
                "the checkpoint's structure",
                do="build it with irgrow.compile(checkpoint.network)",
            )
        for name, part, given in (("optimizer", self.optimizer, optimizer), ("scheduler", self.scheduler, scheduler)):
            if given is not None and part is None:
                raise BadData(f"restoring the {name}", f"a checkpoint without a {name}", f"one saved with {name}=...")
        if optimizer is not None and self.optimizer is not None:
            self.optimizer.check(optimizer, tensors)
        if random and self.random is not None:
            random_state.check_generators(self.random, generators)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(wanted[name])
        if isinstance(getattr(model, "ledger", None), Ledger):
            model.ledger = self.ledger  # type: ignore[attr-defined]
        if optimizer is not None and self.optimizer is not None:
            self.optimizer.restore(optimizer, tensors)
        if scheduler is not None:
            scheduler.load_state_dict(self.scheduler)
        if random and self.random is not None:
            random_state.restore(self.random, generators)

    def __repr__(self) -> str:
        parts = [self.network.__repr__()]
        if self.optimizer is not None:
            parts.append(f"{self.optimizer.kind} with state of {len(self.optimizer.state)} parameters")
        if self.ledger:
            parts.append(f"{len(self.ledger)} growths")
        if self.progress:
            parts.append(f"progress: {', '.join(self.progress)}")
        return f"<Checkpoint: {'; '.join(parts)}>"


def _entries(model: object, ledger: Ledger | Iterable[Morphism | Entry] | None) -> list[Entry]:
    found = []
    for step in getattr(model, "ledger", ()) if ledger is None else ledger:
        if isinstance(step, Morphism):
            step = Entry(step.by, step.before.structure, step.after.structure)
        if not isinstance(step, Entry):
            raise BadData("saving the ledger", f"a {type(step).__name__}", "a Ledger, its entries, or morphisms")
        found.append(step)
    return found


def _ledger(data: list[Any], who: str) -> Ledger:
    entries = []
    for n, record in enumerate(data):
        if not isinstance(record, dict) or record.keys() != {"by", "before", "after"}:
            raise BadFile(f"{who}[{n}]", type(record).__name__, "an object with by, before, after")
        if not all(isinstance(text, str) for text in record.values()):
            raise BadFile(f"{who}[{n}]", "a field that is no text", "text")
        entries.append(Entry(**record))
    return Ledger(tuple(entries))
