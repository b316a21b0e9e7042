"""Which neurons can be reached along edges. Numpy arrays in, numpy arrays out."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from irgrow.kernels.graph import children


def reached(source: NDArray, target: NDArray, start: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """True for every neuron of `start` and every neuron behind one along the edges. O(neurons + edges)."""
    return reached_by_children(*children(source, target, start.size), start)


def reached_by_children(pointer: NDArray, child: NDArray, start: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`reached`, for edges that `children` has already grouped by source."""
    mask = start.copy()
    _spread(pointer, child, mask)
    return mask


@njit(cache=True, nogil=True)
def _spread(pointer: NDArray, child: NDArray, mask: NDArray[np.bool_]) -> None:
    queue = np.empty(mask.size, np.int64)
    filled = 0
    for neuron in range(mask.size):
        if mask[neuron]:
            queue[filled] = neuron
            filled += 1
    at = 0
    while at < filled:
        neuron = queue[at]
        at += 1
        for e in range(pointer[neuron], pointer[neuron + 1]):
            if not mask[child[e]]:
                mask[child[e]] = True
                queue[filled] = child[e]
                filled += 1
