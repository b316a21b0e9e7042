"""What compiled kernels have in common: threads for independent work, memory that serves again, second derivatives."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What compiled code runs for, and a number of that type.
LIKE: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_WORK_PER_THREAD = 3_000_000  # multiply-adds; with less, waking another thread (50 us) costs more than it saves


_INSIDE = threading.local()  # .busy: this thread already works on a part of something shared


def share(run: Callable[[int, int], Any], items: int, work: int) -> None:
    """run(first, last) for ranges that make up all items, on as many of torch's threads as `work` pays for.

    Who computes what changes no bit of the result. `work` is in multiply-adds.
    """
    parts = parts_for(items, work)
    together(run, [(items * k // parts, items * (k + 1) // parts) for k in range(parts)])


def parts_for(items: int, work: int) -> int:
    """On how many threads `work` (multiply-adds) should run, if it falls into so many independent items.

    Inside of a part it is one: threads that wait for each other's would never end.
    """
    busy = getattr(_INSIDE, "busy", False)
    return 1 if busy else max(1, min(torch.get_num_threads(), items, work // _WORK_PER_THREAD))


def together(run: Callable[..., Any], parts: Sequence[tuple[Any, ...]]) -> None:
    """run(*part) for every part, each on a thread of its own."""
    if len(parts) == 1:
        run(*parts[0])
        return

    def one(part: tuple[Any, ...]) -> None:
        _INSIDE.busy = True
        try:
            run(*part)
        finally:
            _INSIDE.busy = False

    others = [threads(os.getpid()).submit(one, part) for part in parts[1:]]
    try:
        one(parts[0])
    finally:  # they write to the caller's memory: it must outlive them
        for other in others:
            other.exception()
    for other in others:
        other.result()


@lru_cache(1)
def threads(process: int) -> ThreadPoolExecutor:
    """Threads that run compiled code beside the caller's. Kept per process: a fork does not inherit threads."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="irgrow")


# --- memory ---------------------------------------------------------------------------------------------------

_SPARE_BYTES = 2**24  # of a piece that is kept between calls, at most


def spare(pieces: MutableSequence[Tensor], length: int, like: Tensor) -> Tensor:
    """Memory for so many numbers: one of the spare pieces, still in the cache, if it is large enough."""
    try:
        found = pieces.pop()
    except IndexError:
        return like.new_empty(length)
    return found if found.numel() >= length and found.dtype == like.dtype else like.new_empty(length)


def put_back(pieces: MutableSequence[Tensor], memory: Tensor) -> None:
    """The piece may be used again."""
    if memory.numel() * memory.element_size() <= _SPARE_BYTES:
        pieces.append(memory)


# --- derivatives of derivatives -------------------------------------------------------------------------------


def reference_gradients(
    reference: Callable[..., Tensor], operands: Sequence[Tensor | None], needs: Sequence[bool], incoming: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of reference(*operands) that `needs` asks for; differentiable where gradients are enabled.

    What a compiled backward pass does when it is itself differentiated, or batched.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias per operand, so that one operand's own dependence on another is not counted here.
        if create_graph:
            aliases = [None if t is None else t.view_as(t) for t in operands]
        else:
            aliases = [None if t is None else t.detach() for t in operands]
        wanted = [a for a, need in zip(aliases, needs, strict=True) if need and a is not None]
        for a in wanted:
            if not a.requires_grad:
                a.requires_grad_()
        values = reference(*aliases)
        found = iter(
            torch.autograd.grad(
                values, wanted, incoming, create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
        )
    return tuple(next(found) if need and a is not None else None for a, need in zip(aliases, needs, strict=True))
