"""Data as callers hold it: one pair of tensors, or an iterable of batches such as a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from irgrow.ir.errors import BadData

Inputs = Tensor | tuple[Tensor, ...]
Batch = tuple[Inputs, Tensor]
Data = Batch | Iterable[Batch]
Loss = Callable[[Any, Tensor], Tensor]


def is_pair(data: object) -> TypeGuard[Batch]:
    """Whether this is `(inputs, targets)` rather than an iterable of such batches."""
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[1], Tensor):
        return False
    return isinstance(data[0], Tensor) or all(isinstance(x, Tensor) for x in data[0])


def as_inputs(inputs: object, who: str) -> tuple[Tensor, ...]:
    """One tensor per input group."""
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs) if isinstance(inputs, (tuple, list)) else ()
    if not given or not all(isinstance(x, Tensor) and x.dim() for x in given):
        raise BadData(f"{who}: inputs", type(inputs).__name__, "a tensor [B, *shape], or a tuple of them")
    return given


def batches(data: Data, size: int | None, who: str) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """`(inputs, targets)` by batches of at most `size` samples (None: as they come).

    BadData for targets that do not fit their inputs.
    """
    whole = [data] if is_pair(data) else data
    if not isinstance(whole, Iterable):
        raise BadData(f"{who}: data", type(data).__name__, "(inputs, targets), or an iterable of such batches")
    for batch in whole:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise BadData(f"{who}: a batch of the data", type(batch).__name__, "a pair (inputs, targets)")
        inputs, targets = as_inputs(batch[0], who), torch.as_tensor(batch[1])
        count = inputs[0].shape[0]
        if targets.dim() == 0 or targets.shape[0] != count:
            raise BadData(f"{who}: targets", f"shape {tuple(targets.shape)}", f"one row for each of {count} inputs")
        step = count if size is None else size
        for first in range(0, count, max(1, step)):
            part = slice(first, first + step)
            if count <= step:
                yield inputs, targets
            else:
                yield tuple(x[part] for x in inputs), targets[part]


def take(inputs: tuple[Tensor, ...], targets: Tensor, index: Tensor) -> Batch:
    """The samples of these indices, as a batch."""
    return tuple(x[index] for x in inputs), targets[index]
