"""Random search among neighbours: grow in several ways at random, train each a little, keep the best.

The baseline of hill climbing (NASH, Elsken et al., arXiv:1711.04528) and of RandSearch in the Firefly paper
(arXiv:2102.08574, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from irgrow.ir.network import Network
from irgrow.passes.base import Pass
from irgrow.runtime.model import CompiledNetwork

Way = Callable[[Network], Pass]


def best_neighbour(
    model: CompiledNetwork,
    optimizer: torch.optim.Optimizer,
    ways: Iterable[Way],
    train: Callable[[], float],
) -> int:
    """The model is grown in the best of these ways, and trained; which one it was.

    Each way is tried from the same point: the model grows by it, `train()` trains the model and returns its loss
    (lower is better). Module and optimizer object stay the same.
    """
    start = model.snapshot(optimizer)
    best, kept, chosen = float("inf"), start, -1
    for number, way in enumerate(ways):
        model.restore(start, optimizer)
        network = model.network()
        model.grow(way(network)(network), optimizer)
        loss = train()
        if loss < best:
            best, kept, chosen = loss, model.snapshot(optimizer), number
    model.restore(kept, optimizer)
    return chosen
