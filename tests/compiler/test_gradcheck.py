"""S4: finite differences agree with the gradients of compiled random DAGs, whichever kernel walks them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import irgrow as ig
from irgrow.ir.network import Network
from irgrow.testing import inputs_for, random_network

SMOOTH = ("identity", "tanh", "sigmoid", "silu", "gelu", "softplus")
DAGS = {"kinds": ("sparse", "loop", "two_loops", "skip", "dense"), "norms": (), "dropout": False, "maxima": False}


def random_dag(number: int) -> Network:
    """Every second one is grown by insertions, the others are drawn: loops of groups, ties, skips, several inputs."""
    if number % 2:
        return random_network(
            number, activations=SMOOTH, dtypes=(torch.float64,), steps=3, widest=4, images=False, **DAGS
        )
    draw = np.random.default_rng(number)
    network = ig.mlp([int(draw.integers(1, 4)), int(draw.integers(1, 4))], seed=number, bias=False, dtype=torch.float64)
    for n in range(int(draw.integers(1, 9))):
        parents = int(draw.integers(1, network.groups["input"].units + 1))
        network = ig.InsertNeuron(parents, seed=1000 * number + n, activation=SMOOTH[1 + number % 5])(network).after
    return network


def check(network: Network, backend: str) -> None:
    model = ig.compile(network, backend=backend)
    names = network.trainable()
    inputs = [x.requires_grad_() for x in inputs_for(network, 2, seed=1)]
    given = [model.tensors()[name].detach().clone().requires_grad_() for name in names]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        held = {**model.tensors(), **dict(zip(names, tensors[len(inputs) :], strict=True))}
        return model.program.run(held, tensors[: len(inputs)])[0]

    assert torch.autograd.gradcheck(run, (*inputs, *given), eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("number", range(8))
def test_gradients_of_random_dags(number: int, backend: str) -> None:
    check(random_dag(number), backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("block", range(4))
def test_gradients_of_two_hundred_random_dags(block: int, backend: str) -> None:
    for number in range(50 * block, 50 * (block + 1)):
        check(random_dag(number), backend)


def test_control_a_wrong_gradient_is_noticed() -> None:
    network = random_dag(2)
    model = ig.compile(network)
    weight = model.tensors()[network.trainable()[0]].detach().clone().requires_grad_()

    def wrong(w: Tensor) -> tuple[Tensor, ...]:
        halved = w.detach() + 0.5 * (w - w.detach())
        return model.program.run({**model.tensors(), network.trainable()[0]: halved}, inputs_for(network, 2))[0]

    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(wrong, (weight,))
