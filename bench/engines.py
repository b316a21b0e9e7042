"""The usual ways to run an irregular network: one call per level, in torch or scipy. Opponents of `irregular`.

All compute what the network means (checked against it), feature-major [neurons, batch], without indexing beyond
what a level reads. Where every level reads only the one before (layered networks) they pass values along and keep
no buffer. With gradients torch's autograd does the backward; masks are applied once, not at every call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import irgrow as ig

Index = NDArray[np.int64]
GRAPHED = ("torch scatter per level", "torch dense per level")  # opponents as a CUDA graph as well


@dataclass(frozen=True)
class Level:
    """Neurons `start..stop-1` in level order; their edges by row, from `column`, with weights `first..last-1`."""

    start: int
    stop: int
    first: int
    last: int
    row: Index
    column: Index
    relu: bool

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @cached_property
    def columns(self) -> tuple[Index, Index]:
        """The distinct columns it reads, and where among them each edge's is."""
        return np.unique(self.column, return_inverse=True)

    @cached_property
    def pointer(self) -> Index:
        return np.concatenate([[0], np.cumsum(np.bincount(self.row, minlength=self.rows))])


class Levels:
    """A network (one input, one output group; relu and identity, sums, no biases) in level order.

    Inputs come first, the output group last, in a level of its own. `weights` are all weights in the order of
    the levels' edges; `flat(gradient)` puts a vector in that order back into the network's order, bundle by bundle.
    """

    def __init__(self, network: ig.Network, device: str = "cpu") -> None:
        [self._x], [y] = network.inputs, network.outputs
        hidden = [name for name in network.groups if name not in (self._x, y)]
        depth = np.concatenate([network.levels[name] for name in hidden]) if hidden else np.empty(0, np.int64)
        order = np.argsort(depth, kind="stable")
        self.inputs, self.outputs = network.groups[self._x].units, network.groups[y].units
        place = {self._x: np.arange(self.inputs)}
        rank = np.empty(order.size, np.int64)
        rank[order] = self.inputs + np.arange(order.size)
        at = 0
        for name in hidden:
            place[name] = rank[at : at + network.groups[name].neurons]
            at += network.groups[name].neurons
        first_output = self.inputs + order.size
        place[y] = first_output + np.arange(self.outputs)
        self.neurons = first_output + self.outputs
        sources, targets, weights = [], [], []
        for bundle in network.bundles.values():
            s, t, w = bundle.pattern.all_edges(*network.shapes(bundle))
            sources.append(place[bundle.source][s])
            targets.append(place[bundle.target][t])
            weights.append(bundle.weight.detach().reshape(-1)[torch.from_numpy(np.asarray(w, np.int64))])
        source, target = np.concatenate(sources), np.concatenate(targets)
        self._order = torch.from_numpy(np.lexsort((source, target)))
        order_of_edges = self._order.numpy()
        source, target = source[order_of_edges], target[order_of_edges]
        self.weights = torch.cat(weights)[self._order].to(device)
        self._order = self._order.to(device)
        widths = np.bincount(depth, minlength=1) if order.size else np.empty(0, np.int64)
        widths = widths[widths > 0]
        bounds = np.concatenate([[self.inputs], self.inputs + np.cumsum(widths), [self.neurons]]).astype(np.int64)
        edges = np.searchsorted(target, bounds)
        self.levels = [
            Level(
                int(bounds[n]),
                int(bounds[n + 1]),
                int(edges[n]),
                int(edges[n + 1]),
                target[edges[n] : edges[n + 1]] - bounds[n],
                source[edges[n] : edges[n + 1]],
                n + 2 < len(bounds),
            )
            for n in range(len(bounds) - 1)
        ]
        before = [0, *(level.start for level in self.levels[:-1])]
        self.chain = all(
            level.column.size == 0 or level.column.min() >= base
            for level, base in zip(self.levels, before, strict=True)
        )

    def flat(self, values: Tensor) -> Tensor:
        """A vector in level order, in the network's order."""
        out = torch.empty_like(values)
        out[self._order] = values
        return out

    def base(self, level: Level) -> int:
        """Where the values that a level reads begin: the level before in a chain, else at the first input."""
        if not self.chain:
            return 0
        at = self.levels.index(level)
        return 0 if at == 0 else self.levels[at - 1].start


Engine = Callable[[], Any]
Product = Callable[[Tensor], Tensor]
Builder = Callable[["Levels", "Level"], tuple[Tensor, Product]]
Reader = Callable[["Level", Tensor], Tensor]


def forward_engines(levels: Levels, x: Tensor) -> dict[str, Engine]:
    """Engines that return the outputs [B, outputs] for the inputs x [B, inputs], without gradients."""
    w, given = levels.weights, x.T.contiguous()
    engines = {
        "torch scatter per level": _run(levels, given, [_scatter(levels, one, w) for one in levels.levels]),
        "torch CSR per level": _run(levels, given, [_csr(levels, one, w) for one in levels.levels]),
        "torch dense per level": _run(levels, given, [_dense(levels, one, w) for one in levels.levels]),
    }
    if x.is_cuda:
        return engines | {f"{name}, in a CUDA graph": in_a_graph(engines[name]) for name in GRAPHED}
    try:
        engines["scipy CSR per level"] = _scipy(levels, given)
    except ModuleNotFoundError:
        print("irregular: scipy is not installed; measured without it")
    return engines


def training_engines(levels: Levels, x: Tensor, g: Tensor) -> dict[str, tuple[Engine, Callable[[Any], Tensor]]]:
    """Engines that return (outputs, gradients of the weights) for output gradients g [B, outputs].

    With each a function that turns its gradients into one vector in level order.
    """
    given, incoming = x.T.contiguous(), g.T.contiguous()
    made: dict[str, tuple[Engine, Callable[[Any], Tensor]]] = {}
    flat = levels.weights.clone().requires_grad_()
    sizes = [one.last - one.first for one in levels.levels]
    scatter = [_scatter_parts(levels, one) for one in levels.levels]

    def run_scatter() -> tuple[Tensor, Tensor]:
        parts = flat.split(sizes)
        y = _forward(levels, given, [product(w) for product, w in zip(scatter, parts, strict=True)])
        return y.detach().T, torch.autograd.grad(y, flat, incoming)[0]

    made["torch scatter per level"] = run_scatter, lambda gradient: gradient

    builders: tuple[tuple[str, Builder, Reader], ...] = (
        ("torch dense per level", _dense_parts, _from_dense),
        ("torch CSR per level", _csr_parts, _from_csr),
    )
    for name, build, read in builders:
        pairs = [build(levels, one) for one in levels.levels]
        made[name] = _backward_run(levels, given, incoming, pairs), partial(_joined, levels, read)
    return made


def _joined(levels: Levels, read: Reader, gradients: Sequence[Tensor]) -> Tensor:
    """The gradients of every level's leaf as one vector in level order."""
    return torch.cat([read(one, gradient) for one, gradient in zip(levels.levels, gradients, strict=True)])


def _backward_run(
    levels: Levels, given: Tensor, incoming: Tensor, pairs: list[tuple[Tensor, Product]]
) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
    leaves, products = [leaf for leaf, _ in pairs], [product for _, product in pairs]

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        y = _forward(levels, given, products)
        return y.detach().T, torch.autograd.grad(y, leaves, incoming)

    return run


def _run(levels: Levels, given: Tensor, products: list[Product]) -> Engine:
    @torch.no_grad()
    def run() -> Tensor:
        return _forward(levels, given, products).T

    return run


def _forward(levels: Levels, given: Tensor, products: list[Product]) -> Tensor:
    """The outputs [outputs, B], each level a product of what came before."""
    if levels.chain:
        values = given
        for level, product in zip(levels.levels, products, strict=True):
            values = product(values)
            if level.relu:
                values = values.relu()
        return values
    values = given.new_empty(levels.neurons, given.shape[1])
    values[: levels.inputs] = given
    for level, product in zip(levels.levels[:-1], products[:-1], strict=True):
        values[level.start : level.stop] = product(values).relu()
    return products[-1](values)


def in_a_graph(work: Engine) -> Engine:
    """The work as one CUDA graph. Its result is overwritten by the next call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture needs memory and handles that earlier calls made
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


# --- one level ------------------------------------------------------------------------------------------------


def _read(levels: Levels, level: Level, keeps: bool) -> tuple[Callable[[Tensor], Tensor], Index]:
    """What picks the rows that a level reads (a view if they lie side by side), and each edge's place among them.

    `keeps`: autograd keeps what is read, so it must not be a view of the buffer that later levels write into.
    """
    used, inverse = level.columns
    used = used - levels.base(level)
    if used.size and used[-1] - used[0] == used.size - 1:
        first, count = int(used[0]), used.size
        if levels.chain or not keeps:
            return (lambda values: values.narrow(0, first, count)), inverse
        return (lambda values: values.narrow(0, first, count).clone()), inverse
    index = torch.from_numpy(used).to(levels.weights.device)
    return (lambda values: values.index_select(0, index)), inverse


def _scatter(levels: Levels, level: Level, weights: Tensor) -> Product:
    return _scatter_parts(levels, level)(weights[level.first : level.last])


def _scatter_parts(levels: Levels, level: Level) -> Callable[[Tensor], Product]:
    indices = (level.row, level.column - levels.base(level))
    row, column = (torch.from_numpy(index).to(levels.weights.device) for index in indices)
    rows = level.rows

    def with_weights(w: Tensor) -> Product:
        def product(values: Tensor) -> Tensor:
            parts = values.index_select(0, column) * w[:, None]
            return parts.new_zeros(rows, parts.shape[1]).index_add_(0, row, parts)

        return product

    return with_weights


def _csr(levels: Levels, level: Level, weights: Tensor) -> Product:
    """Without gradients columns may stay numbers of the whole buffer: nothing is gathered."""
    base, width = levels.base(level), level.start
    matrix = _csr_tensor(level, level.column - base, width - base, weights[level.first : level.last])
    return lambda values: matrix @ values[: width - base]


def _csr_parts(levels: Levels, level: Level) -> tuple[Tensor, Product]:
    read, inverse = _read(levels, level, True)
    w = levels.weights[level.first : level.last]
    matrix = _csr_tensor(level, inverse, level.columns[0].size, w).requires_grad_()
    return matrix, lambda values: torch.sparse.mm(matrix, read(values))


def _csr_tensor(level: Level, column: Index, width: int, weights: Tensor) -> Tensor:
    pointer, index = (torch.from_numpy(p.astype(np.int32)).to(weights.device) for p in (level.pointer, column))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "in beta state"
        return torch.sparse_csr_tensor(pointer, index, weights.clone(), (level.rows, width), check_invariants=True)


def _from_csr(level: Level, gradient: Tensor) -> Tensor:
    if gradient.layout == torch.sparse_csr:
        return gradient.values()
    return gradient.to_dense()[torch.from_numpy(level.row), torch.from_numpy(level.columns[1])]


def _dense(levels: Levels, level: Level, weights: Tensor) -> Product:
    matrix, read = _dense_matrix(levels, level, weights, False)
    return lambda values: matrix @ read(values)


def _dense_parts(levels: Levels, level: Level) -> tuple[Tensor, Product]:
    matrix, read = _dense_matrix(levels, level, levels.weights, True)
    matrix.requires_grad_()
    return matrix, lambda values: matrix @ read(values)


def _dense_matrix(levels: Levels, level: Level, weights: Tensor, keeps: bool) -> tuple[Tensor, Product]:
    read, inverse = _read(levels, level, keeps)
    matrix = weights.new_zeros(level.rows, level.columns[0].size)
    matrix[torch.from_numpy(level.row), torch.from_numpy(inverse)] = weights[level.first : level.last]
    return matrix, read


def _from_dense(level: Level, gradient: Tensor) -> Tensor:
    return gradient[torch.from_numpy(level.row), torch.from_numpy(level.columns[1])]


def _scipy(levels: Levels, given: Tensor) -> Engine:
    from scipy.sparse import csr_matrix

    x = given.numpy()
    matrices = []
    for level in levels.levels:
        base = levels.base(level)
        w = levels.weights[level.first : level.last].numpy()
        shape = (level.rows, level.start - base)
        matrices.append(csr_matrix((w, (level.column - base).astype(np.int32), level.pointer.astype(np.int32)), shape))

    def run_chain() -> Any:
        values = x
        for level, matrix in zip(levels.levels, matrices, strict=True):
            values = matrix @ values
            if level.relu:
                np.maximum(values, 0, out=values)
        return values.T

    def run() -> Any:
        values = np.empty((levels.neurons, x.shape[1]), np.float32)
        values[: levels.inputs] = x
        for level, matrix in zip(levels.levels, matrices, strict=True):
            z = matrix @ values[: level.start]
            values[level.start : level.stop] = np.maximum(z, 0, out=z) if level.relu else z
        return values[-levels.outputs :].T

    return run_chain if levels.chain else run


def view(levels: Levels, converters: Mapping[str, Callable[[Any], Tensor]]) -> Callable[[str, Any], Any]:
    """What the gate compares of (outputs, gradients): the gradients of all bundles as one vector."""

    def compared(name: str, result: Any) -> Any:
        y, gradients = result
        if name not in converters:
            return y, torch.cat([g.reshape(-1) for g in gradients])
        return y, levels.flat(converters[name](gradients))

    return compared
