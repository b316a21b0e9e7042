"""Independent items of compiled work, shared out among threads. Who computes what changes no bit of the result."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from irgrow.kernels.walk_cpu import _threads

LIKE: dict[torch.dtype, Any] = {torch.float32: np.float32(0), torch.float64: np.float64(0)}
_WORK_PER_THREAD = 3_000_000  # multiply-adds; with less, waking another thread (50 us) costs more than it saves


_INSIDE = threading.local()  # .busy: this thread already works on a part of something shared


def share(run: Callable[[int, int], Any], items: int, work: int) -> None:
    """run(first, last) for ranges that make up all items, on as many of torch's threads as `work` pays for.

    Sharing again inside of a part runs on that part's thread: threads that wait for each other's would never end.
    """
    busy = getattr(_INSIDE, "busy", False)
    parts = 1 if busy else max(1, min(torch.get_num_threads(), items, work // _WORK_PER_THREAD))
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
