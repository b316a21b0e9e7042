"""`Waiting`: the rows of small batches, copied, until there are enough of them for one product."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from irgrow.kernels.outer import CHUNK


class Waiting:
    """Up to `room` samples of named tensors `[B, ...]`: a product of a thousand samples costs less than eight of 128.

    Float64 sums are then read and written once for all of them.
    """

    def __init__(self, room: int = CHUNK) -> None:
        self.room, self.count = room, 0
        self._held: dict[Hashable, Tensor] = {}

    def fits(self, count: int) -> bool:
        return self.count + count <= self.room

    def put(self, tensors: Mapping[Any, Tensor], count: int) -> None:
        """Copies of these `count` samples wait; the names and the shapes of samples are the same every time."""
        for name, tensor in tensors.items():
            if name not in self._held:
                self._held[name] = tensor.new_empty(self.room, *tensor.shape[1:])
            self._held[name][self.count : self.count + count] = tensor
        self.count += count

    def take(self) -> tuple[dict[Any, Tensor], int]:
        """All that waits, valid until the next `put`; nothing waits any more."""
        count, self.count = self.count, 0
        return {name: held[:count] for name, held in self._held.items()}, count
