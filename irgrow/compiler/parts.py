"""What one bundle adds to its target's pre-activations, by pattern: each in a few torch calls.

Every part is `(run) -> [B, n]` or `[B, *shape]`, made once when the network is lowered.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.compiler.matrices import Engine, Matrix
from irgrow.compiler.program import Places, Run
from irgrow.compiler.schedule import Part
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Dense, Identity, Local2d, Pool2d, Sparse, size

Add = Callable[[Run], Tensor]


def part_function(network: Network, part: Part, places: Places, engine: Engine) -> tuple[Add, str]:
    """The part as a function, and its name."""
    bundle = part.bundle
    pattern, name = bundle.pattern, bundle.tensor
    source, target = network.shapes(bundle)
    if isinstance(pattern, Sparse):
        return Masked(part, places, source, target, engine), "sparse matrix"
    fetch = places.fetch(bundle.source)
    if isinstance(pattern, Dense):
        rows = None if part.rows is None else places.tensor(part.rows)

        def dense(run: Run) -> Tensor:
            weight = run.tensors[name]
            return F.linear(fetch.flat(run), weight if rows is None else weight.index_select(0, rows))

        return dense, "dense"
    if isinstance(pattern, Identity):
        first, behind = pattern.start, target[0] - pattern.start - source[0]
        widths = (*(0, 0) * (len(target) - 1), first, behind)

        def identity(run: Run) -> Tensor:
            value = _times(fetch.shaped(run), run.tensors[name], bundle.trainable)
            return F.pad(value, widths) if first or behind else value

        return identity, "identity"
    if isinstance(pattern, Local2d):
        return _local(pattern, name, fetch.shaped, source, target), "local"
    if isinstance(pattern, Conv2d):

        def conv(run: Run) -> Tensor:
            return F.conv2d(
                fetch.shaped(run),
                run.tensors[name],
                None,
                pattern.stride,
                pattern.padding,
                pattern.dilation,
                pattern.channel_groups,
            )

        return conv, "conv"
    assert isinstance(pattern, Pool2d)
    channels, plain = source[0], pattern.dilation == (1, 1) and _halved(pattern)

    def pool(run: Run) -> Tensor:
        x, weight = fetch.shaped(run), run.tensors[name]
        if plain:
            summed = F.avg_pool2d(x, pattern.kernel, pattern.stride, pattern.padding, divisor_override=1)
            return summed * weight
        ones = weight.expand(channels, 1, *pattern.kernel)
        return F.conv2d(x, ones, None, pattern.stride, pattern.padding, pattern.dilation, channels)

    return pool, "pool sum"


def maximum_function(network: Network, parts: list[Part], places: Places) -> Add:
    """The elementwise maximum of pooled or identical sources; a tie sends its gradient to the first in edge order."""
    functions = []
    for part in parts:
        bundle, pattern = part.bundle, part.bundle.pattern
        fetch, name, trained = places.fetch(bundle.source), bundle.tensor, bundle.trainable

        def value(run: Run, pattern=pattern, fetch=fetch, name=name, trained=trained) -> Tensor:  # type: ignore[no-untyped-def]
            x = _times(fetch.shaped(run), run.tensors[name], trained)
            if isinstance(pattern, Identity):
                return x
            return F.max_pool2d(x, pattern.kernel, pattern.stride, pattern.padding, pattern.dilation)

        functions.append(value)

    def maximum(run: Run) -> Tensor:
        best = functions[0](run)
        for function in functions[1:]:
            other = function(run)
            best = torch.where((best >= other) | best.isnan(), best, other)
        return best

    return maximum


def _times(value: Tensor, weight: Tensor, trained: bool) -> Tensor:
    return value if not trained and weight.item() == 1.0 else value * weight


def _halved(pattern: Pool2d) -> bool:
    return all(2 * pattern.padding[a] <= pattern.kernel[a] for a in (0, 1))


class Masked:
    """Sparse edges as a matrix of which some entries exist; gradients reach only them."""

    def __init__(
        self, part: Part, places: Places, source: tuple[int, ...], target: tuple[int, ...], engine: Engine
    ) -> None:
        pattern = part.bundle.pattern
        assert isinstance(pattern, Sparse)
        self._name, self._fetch = part.bundle.tensor, places.fetch(part.bundle.source, part.columns)
        edges = slice(None) if part.edges is None else part.edges
        s, t = np.asarray(pattern.source[edges], np.int64), np.asarray(pattern.target[edges], np.int64)
        if part.columns is not None:
            s = np.searchsorted(part.columns, s)
        if part.rows is not None:
            t = np.searchsorted(part.rows, t)
        rows = size(target) if part.rows is None else part.rows.size
        columns = size(source) if part.columns is None else part.columns.size
        picked = None if part.edges is None and pattern.weight_index is None else pattern.index[edges]
        index = None if picked is None else torch.from_numpy(np.asarray(picked, np.int64))
        self.matrix = Matrix(rows, columns, t, s, index, engine)

    def __call__(self, run: Run) -> Tensor:
        return self.activated(run, None, "identity")

    def activated(self, run: Run, bias: Tensor | None, activation: str) -> Tensor:
        """act(W x + bias) [B, rows]"""
        x = self._fetch.flat(run).t()
        return self.matrix(x, run.tensors[self._name], bias, activation=activation, route=run.route).t()


def _local(
    pattern: Local2d, name: str, image: Callable[[Run], Tensor], source: tuple[int, ...], target: tuple[int, ...]
) -> Add:
    """One small matrix product per output position, over unfolded patches."""
    groups, positions = pattern.channel_groups, prod(target[1:])

    def local(run: Run) -> Tensor:
        patches = F.unfold(image(run), pattern.kernel, pattern.dilation, pattern.padding, pattern.stride)
        patches = patches.reshape(run.batch, groups, -1, positions)
        weight = run.tensors[name].reshape(groups, target[0] // groups, -1, positions)
        return torch.einsum("bgkp,gokp->bgop", patches, weight).reshape(run.batch, *target)

    return local
