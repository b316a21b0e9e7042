"""What compiled kernels have in common: threads for independent work, memory that serves again, second derivatives."""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from irgrow.kernels.entry import Entry

COMPILED = (torch.float32, torch.float64)  # what there is compiled code for


# --- threads --------------------------------------------------------------------------------------------------

_WORK_PER_THREAD = 1_000_000  # multiply-adds; with less, a thread that must be woken (50 us) costs more than it saves
_PIECES = 4  # of a phase, per thread
Operands = tuple[int, ...]


def share(entry: Entry, dtype: torch.dtype, fixed: Operands, items: int, work: int) -> None:
    """entry(*fixed, first, last) for ranges that make up all items, on as many threads as `work` pays for.

    Who computes what changes no bit of the result. `work` is in multiply-adds.
    """
    parts = parts_for(items, work)
    together(entry, dtype, [[(*fixed, items * k // parts, items * (k + 1) // parts)] for k in range(parts)])


def parts_for(items: int, work: int) -> int:
    """On how many threads `work` (multiply-adds) should run, if it falls into so many independent items."""
    return max(1, min(torch.get_num_threads(), items, work // _WORK_PER_THREAD))


def run(entry: Entry, dtype: torch.dtype, *operands: int) -> None:
    """entry(*operands) on this thread."""
    row = array("q", operands)
    entry.of(dtype)[1](row.buffer_info()[0])


def together(entry: Entry, dtype: torch.dtype, parts: Sequence[Sequence[Operands]]) -> None:
    """entry(*operands) for all operands of a part, one after the other; every part on a thread of its own.

    The threads are torch's own where they can be had: they may still be awake from its last operation, and two sets
    of threads would wait for each other's cores.
    """
    address, call, _ = entry.of(dtype)
    table, starts = array("q"), [0]
    for part in parts:
        for operands in part:
            table.extend(operands)
        starts.append(starts[-1] + len(part))
    first, size = table.buffer_info()[0], 8 * len(parts[0][0])
    if len(parts) == 1:
        for row in range(starts[1]):
            call(first + row * size)
        return
    from irgrow.kernels.entry import run_part

    job = array("q", (0, len(parts), address, first, size, *starts))
    at, runner = job.buffer_info()[0], run_part()
    parallel = _torch_threads()
    if parallel is not None and os.getpid() == _PROCESS:
        parallel(runner.address, at, len(parts), 0)
        return
    others = [_threads(os.getpid()).submit(runner.ctypes, at) for _ in parts[1:]]
    runner.ctypes(at)
    for other in others:  # they write to the caller's memory: it must outlive them
        other.result()


def work_on(entry: Entry, dtype: torch.dtype, numbers: Operands, items: int, work: int) -> None:
    """The entry has done all items, on as many threads as `work` (multiply-adds) pays for.

    Its one operand is the address of a job: a counter that starts at 0, then `numbers`. Every thread takes items off
    the counter (`next_of`) until there are no more, so all may, and one does as well.
    """
    job = array("q", (0, *numbers))
    together(entry, dtype, [[(job.buffer_info()[0],)]] * parts_for(items, work))


def in_phases(entry: Entry, dtype: torch.dtype, operands: Operands, phases: int) -> None:
    """entry(*operands, pieces, progress) on all of torch's threads, which share every phase (see entry.py)."""
    threads = torch.get_num_threads()
    progress = array("q", bytes(16 * phases))
    together(entry, dtype, [[(*operands, _PIECES * threads, progress.buffer_info()[0])]] * threads)


_PROCESS = os.getpid()  # a fork has none of OpenMP's threads, and would wait for them for ever


@lru_cache(1)
def _torch_threads() -> Any:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP that torch uses; None if it uses none."""
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    try:
        run = ctypes.CDLL(str(library)).GOMP_parallel  # found among the libraries that it loads
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return run


@lru_cache(1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Threads of our own, per process: a fork does not inherit threads."""
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
