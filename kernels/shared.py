"""Independent items of compiled work, shared out among threads. Who computes what changes no bit of the result.

`work_on` runs a compiled job on the threads of torch's own OpenMP pool. Others would compete with them: they spin for
milliseconds after each of torch's operations, and on two cores that is half of the machine.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from irgrow.kernels.walk_cpu import _threads

LIKE: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_WORK_PER_THREAD = 3_000_000  # multiply-adds; with less, waking another thread (50 us) costs more than it saves


_INSIDE = threading.local()  # .busy: this thread already works on a part of something shared
_PROCESS = os.getpid()  # a fork does not inherit threads


def work_on(job: int, numbers: tuple[int, ...], items: int, work: int) -> None:
    """The compiled function at address `job` has done all items.

    It is given the address of int64 numbers: a counter that starts at 0, then `numbers`. Every thread that runs it
    takes items off the counter until there are no more, so all may, and one does as well.
    """
    held = np.array((0, *numbers), dtype=np.int64)
    threads, run = _parts(items, work), _function(job)
    together = _openmp() if threads > 1 else None
    if together is not None:
        together(job, held.ctypes.data, threads, 0)
        return
    others = [_threads(os.getpid()).submit(run, held.ctypes.data) for _ in range(threads - 1)]
    run(held.ctypes.data)
    for other in others:
        other.result()


@lru_cache(64)
def _function(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@lru_cache(1)
def _openmp() -> Any:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP that torch uses; None if it uses none."""
    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    try:
        run = ctypes.CDLL(str(library)).GOMP_parallel  # found among the libraries that it loads
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


def _parts(items: int, work: int) -> int:
    if getattr(_INSIDE, "busy", False) or os.getpid() != _PROCESS:
        return 1
    return max(1, min(torch.get_num_threads(), items, work // _WORK_PER_THREAD))


def share(run: Callable[[int, int], Any], items: int, work: int) -> None:
    """run(first, last) for ranges that make up all items, on as many of torch's threads as `work` pays for.

    Sharing again inside of a part runs on that part's thread: threads that wait for each other's would never end.
    """
    parts = _parts(items, work)
    if parts == 1:
        run(0, items)
        return

    def part(first: int, last: int) -> None:
        _INSIDE.busy = True
        try:
            run(first, last)
        finally:
            _INSIDE.busy = False

    cuts = list(pairwise([items * k // parts for k in range(parts + 1)]))
    others = [_threads(os.getpid()).submit(part, *cut) for cut in cuts[1:]]
    try:
        part(*cuts[0])
    finally:  # they write to the caller's memory: it must outlive them
        for other in others:
            other.exception()
    for other in others:
        other.result()
