"""Parents and children of single neurons in O(degree), from one index over all edges built once per network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from irgrow.ir.levels import inside_edges
from irgrow.ir.network import Network
from irgrow.kernels import graph


class Adjacency:
    """Two compressed index lists over all edges of a network: by child and by parent."""

    def __init__(self, network: Network) -> None:
        names = tuple(network.groups)
        if network.bundles:
            source, target, _ = inside_edges(network, names)
        else:
            source = target = np.empty(0, np.int64)
        self._ids = np.concatenate([network.ids(name) for name in names])
        by_id = np.argsort(self._ids)
        self._sorted, self._local = self._ids[by_id], by_id
        self._source, self._target = source, target
        self._into = graph.compressed_rows(target, self._ids.size)
        self._outof = graph.compressed_rows(source, self._ids.size)
        self._network = network

    def parents(self, id: int) -> list[int]:
        return self._others(id, self._into, self._source)

    def children(self, id: int) -> list[int]:
        return self._others(id, self._outof, self._target)

    def _others(self, id: int, rows: tuple[NDArray, NDArray], ends: NDArray) -> list[int]:
        at = int(np.searchsorted(self._sorted, id))
        if at == self._sorted.size or self._sorted[at] != id:
            self._network.neuron(id)  # raises UnknownName
        local = self._local[at]
        pointer, order = rows
        return self._ids[ends[order[pointer[local] : pointer[local + 1]]]].tolist()
