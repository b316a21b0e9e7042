"""Neurons inserted into a dense network: what an irregular part costs beside the dense one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import irgrow as ig
from bench.suite import Case, Made, op

SLOWDOWN = 3.0  # a step of the MLP with insertions takes at most this many of the plain MLP's


@op(
    "insertions",
    cases=[{"sizes": "784-256-256-10", "insertions": 20, "batch": 128}],
    tiny={"sizes": "12-8-8-3", "insertions": 3, "batch": 4},
)
def insertions(*, sizes: str, insertions: int, batch: int, device: str) -> Made:
    """A training step (SGD, cross entropy) of an MLP with inserted neurons, beside the plain MLP's.

    Insertions are InsertNeuron with 16 parents and seeds 0, 1, ... Goal: at most 3 plain steps.
    """
    widths = [int(width) for width in sizes.split("-")]
    plain = ig.mlp(widths, activation="relu", seed=0)
    grown = plain
    for seed in range(insertions):
        grown = ig.InsertNeuron(parents=min(16, widths[0]), seed=seed)(grown).after
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, widths[0], generator=draw)
    labels = torch.randint(0, widths[-1], (batch,), generator=draw)
    layers: list[nn.Module] = []
    for n, (a, b) in enumerate(pairwise(widths)):
        layers += [nn.Linear(a, b), nn.ReLU()] if n + 2 < len(widths) else [nn.Linear(a, b)]
    sequential = nn.Sequential(*layers)
    _copy(plain, sequential)
    with_insertions, without = ig.compile(grown), ig.compile(plain)
    inserted_step, plain_step, torch_step = (
        _step(model, x, labels) for model in (with_insertions, without, sequential)
    )
    truth = ig.interpret(grown.to(torch.float64), x.double())
    label = f"{sizes} + {insertions} neurons, B={batch}, step"
    yield Case(
        label,
        ours=inserted_step,
        opponents={"the plain irgrow MLP": plain_step},
        goal=1 / SLOWDOWN,
        reference=lambda: _loss(truth, labels),
        tolerance=1e-5,
        same=False,
        note=f"goal: at most {SLOWDOWN:g} plain steps; losses compared with the interpreter's",
    )
    yield Case(
        label,
        ours=inserted_step,
        opponents={"torch.nn.Sequential, plain": torch_step},
        tolerance=1e-5,
        same=False,
    )
    yield Case(
        f"{sizes}, no insertions, B={batch}, step",
        ours=_step(ig.compile(plain), x, labels),
        opponents={"torch.nn.Sequential": _step(_copy(plain, sequential), x, labels)},
        tolerance=1e-5,
    )


def _loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, labels)


def _copy(network: ig.Network, sequential: nn.Sequential) -> nn.Sequential:
    """The network's weights stand in the torch model."""
    tensors = list(network.tensors().items())
    linear = [module for module in sequential if isinstance(module, nn.Linear)]
    weights = [tensor for name, tensor in tensors if name.startswith("weight.")]
    biases = [tensor for name, tensor in tensors if name.startswith("bias.")]
    with torch.no_grad():
        for module, weight, bias in zip(linear, weights, biases, strict=True):
            module.weight.copy_(weight)
            module.bias.copy_(bias)
    return sequential


def _step(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One SGD step; returns the loss before it. The learning rate is tiny, so that timing it changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
