"""`Program`: the list of steps that computes a network, and the values they hand to each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irgrow.ir.network import Network
from irgrow.ir.pattern import Shape


@dataclass(slots=True)
class Run:
    """One pass through a program: what every step may read and write.

    `slots[k]` is a step's result: a block `[B, ...]`, or the rows of a walk `[rows, B]` (see `Fetch`).
    `shifts[g]` `[B, *shape]` is added to the pre-activations of group g. `record`: every group's values are kept,
    also those that no other step reads. `route`: how sparse edges are computed where several ways exist (None: the
    fastest; see matrices.py).
    """

    tensors: Mapping[str, Tensor]
    slots: list[Tensor | None]
    batch: int
    train: bool = False
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    record: bool = False
    route: str | None = None


class Step(Protocol):
    """One kernel call. `text` says what it computes and how, `reason` why this way."""

    text: str
    reason: str

    def run(self, run: Run) -> None: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Columns of one slot, as [B, n]. `index` None: all of them."""

    slot: int
    by_rows: bool  # the slot is feature-major
    index: slice | Tensor | None

    def take(self, run: Run) -> Tensor:
        value = run.slots[self.slot]
        assert value is not None
        if self.by_rows:
            if self.index is None:
                return value.t()
            return (value[self.index] if isinstance(self.index, slice) else value.index_select(0, self.index)).t()
        value = value if value.dim() == 2 else value.flatten(1)
        if self.index is None:
            return value
        return value[:, self.index] if isinstance(self.index, slice) else value.index_select(1, self.index)


@dataclass(frozen=True, slots=True)
class Fetch:
    """Neurons of one group, wherever steps left them, in the order they were asked for."""

    pieces: tuple[Piece, ...]
    order: Tensor | None  # columns of the pieces side by side -> asked-for order
    shape: Shape | None  # of the whole group, if it is the whole

    def flat(self, run: Run) -> Tensor:
        """[B, n]"""
        if len(self.pieces) == 1:
            return self.pieces[0].take(run)
        value = torch.cat([piece.take(run) for piece in self.pieces], 1)
        return value if self.order is None else value.index_select(1, self.order)

    def shaped(self, run: Run) -> Tensor:
        """[B, *shape] (of a whole group)"""
        assert self.shape is not None
        value = self.flat(run)
        return value if len(self.shape) == 1 else value.reshape(run.batch, *self.shape)


class Places:
    """While lowering: in which slot, and where in it, every neuron computed so far lies."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network, self._device = network, device
        self._by_rows: list[bool] = []
        self._whole: dict[str, int] = {}  # group -> the slot that holds exactly it, in order
        self._slot: dict[str, NDArray[np.int32]] = {}
        self._at: dict[str, NDArray[np.int32]] = {}

    def __len__(self) -> int:
        return len(self._by_rows)

    def branch(self) -> Places:
        """What is known so far, for another way of computing what comes next; slots have numbers of their own."""
        other = copy(self)
        other._whole = dict(self._whole)
        return other

    def new_slot(self, by_rows: bool) -> int:
        self._by_rows.append(by_rows)
        return len(self._by_rows) - 1

    def put(self, slot: int, group: str, local: NDArray[np.integer] | None, at: NDArray[np.integer] | None) -> None:
        """Neurons `local` of the group lie at places `at` of the slot (None: all of them, in order)."""
        neurons = self._network.groups[group].neurons
        if local is None and at is None:
            self._whole[group] = slot
            return
        if group not in self._slot:
            self._slot[group] = np.full(neurons, -1, np.int32)
            self._at[group] = np.zeros(neurons, np.int32)
        where = slice(None) if local is None else local
        self._slot[group][where] = slot
        self._at[group][where] = np.arange(neurons) if at is None else at

    def complete(self, group: str) -> bool:
        """Whether all neurons of the group can be read by now."""
        return group in self._whole or (group in self._slot and bool((self._slot[group] >= 0).all()))

    def fetch(self, group: str, local: NDArray[np.integer] | None = None) -> Fetch:
        """How to read neurons of a group (None: all)."""
        shape = self._network.groups[group].shape if local is None else None
        if group in self._whole:
            slot = self._whole[group]
            return Fetch((Piece(slot, self._by_rows[slot], self._index(local)),), None, shape)
        where = slice(None) if local is None else local
        slots, at = self._slot[group][where], self._at[group][where]
        used = np.unique(slots)
        assert used.size and used[0] >= 0, f"group {group} is read before it is computed"
        pieces = tuple(Piece(int(s), self._by_rows[s], self._index(at[slots == s])) for s in used)
        if len(pieces) == 1:
            return Fetch(pieces, None, shape)
        side_by_side = np.concatenate([np.flatnonzero(slots == s) for s in used])
        return Fetch(pieces, self.tensor(np.argsort(side_by_side)), shape)

    def _index(self, at: NDArray[np.integer] | None) -> slice | Tensor | None:
        if at is None:
            return None
        if at.size and at[-1] - at[0] == at.size - 1 and (at.size < 2 or bool(np.all(np.diff(at) == 1))):
            return slice(int(at[0]), int(at[-1]) + 1)
        return self.tensor(at)

    def tensor(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self._device)


@dataclass(frozen=True)
class Program:
    """Steps in order; prints as text, one line per step."""

    steps: Sequence[Step]
    inputs: tuple[str, ...]
    outputs: tuple[Fetch, ...]
    slots: int
    places: Places = field(repr=False, compare=False)

    def run(
        self,
        tensors: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        *,
        train: bool = False,
        values: Collection[str] = (),
        shifts: Mapping[str, Tensor] | None = None,
        route: str | None = None,
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The outputs `[B, *shape]`, and the activations `[B, *shape]` of the groups named in `values`."""
        batch = inputs[0].shape[0]
        slots = [*inputs, *[None] * (self.slots - len(inputs))]
        run = Run(tensors, slots, batch, train, shifts or {}, bool(values), route)
        for step in self.steps:
            step.run(run)
        recorded = {name: self.places.fetch(name).shaped(run) for name in values} if values else {}
        return tuple([fetch.shaped(run) for fetch in self.outputs]), recorded

    def explain(self) -> str:
        """The steps, and why each is computed the way it is."""
        return "\n".join(f"{n:>3}  {step.text}\n       {step.reason}" for n, step in enumerate(self.steps))

    def __str__(self) -> str:
        lines = [f"program: {len(self.steps)} steps, from {', '.join(self.inputs)}"]
        return "\n".join([*lines, *(f"{n:>3}  {step.text}" for n, step in enumerate(self.steps))])
