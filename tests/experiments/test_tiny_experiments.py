"""TINY's experiments at a tiny size: known answers, files, and the same numbers twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import irgrow as ig
from irgrow.experiments import tiny_methods, tiny_resnet, tiny_sine
from irgrow.experiments.compare import SCRATCH

SINE = tiny_sine.Size(inputs=4, classes=3, neurons=2, train=60)
RESNET = tiny_resnet.Size(channels=(2, 2, 3), units=1, growths=3, train=40)


def test_the_sine_task_is_the_one_in_the_paper() -> None:
    x, y = tiny_sine.draw(200, inputs=5, classes=4, seed=1)
    for row, label in zip(x[:20], y[:20], strict=True):
        values = [torch.sin(k * row.sum()).item() for k in (1, 2, 3, 4)]
        assert values.index(max(values)) == int(label)
    _, scaled = tiny_sine.draw(200, inputs=5, classes=4, variance=5.0, seed=1)
    assert torch.equal(y, scaled)  # five inputs: the sum has variance 5 as it is


def test_the_best_update_fits_the_gradient_best() -> None:
    batch = tiny_sine.draw(60, inputs=4, classes=3, seed=0)
    model = ig.compile(tiny_sine.start(SINE, 0))
    move = tiny_sine.best_update(model, batch, "hidden2")
    shift = torch.zeros(60, 2, dtype=torch.float64, requires_grad=True)
    outputs, values = model.record(batch[0], values=["hidden1"], shifts={"hidden2": shift})
    (g,) = torch.autograd.grad(F.cross_entropy(outputs, batch[1]), shift)
    c = torch.cat([values["hidden1"].detach(), torch.ones(60, 1, dtype=torch.float64)], 1)
    solved = torch.linalg.lstsq(c, -60 * g).solution.mT
    assert torch.allclose(move["weight.hidden1_hidden2"], solved[:, :2], rtol=1e-8, atol=1e-12)
    assert torch.allclose(move["bias.hidden2"], solved[:, 2], rtol=1e-8, atol=1e-12)


def test_a_sweep_never_raises_the_loss_it_looks_at() -> None:
    train, held = (tiny_sine.draw(60, inputs=4, classes=3, seed=n) for n in (0, 1))
    model = ig.compile(tiny_sine.start(SINE, 0))
    for _ in range(3):
        before = F.cross_entropy(model(held[0]), held[1]).item()
        tiny_sine.sweep(model, train, held)
        assert F.cross_entropy(model(held[0]), held[1]).item() <= before + 1e-12


@pytest.mark.parametrize("strategy", list(tiny_sine.STRATEGIES))
def test_every_strategy_adds_one_neuron_at_a_time(strategy: str) -> None:
    run = tiny_sine.run_one(strategy, tiny_sine.SWEEPS, 0, SINE)
    assert len(run.sites) + len(run.notes) == 2
    assert run.parameters[-1] > run.parameters[0]
    if strategy == "Naive":
        assert run.sites == ["hidden1", "hidden2"]


def test_the_residual_network_grows_inside_its_blocks_only() -> None:
    network = tiny_resnet.resnet(RESNET, 0)
    assert [s.name for s in ig.Site.all(network) if s.name in RESNET.sites] == ["inside1", "inside2", "inside3"]
    run = tiny_resnet.run_one("TINY + dW", 0, RESNET)
    # one unit inside each block: 3x3 in and out of it, and a bias
    assert run.parameters[-1] - run.parameters[0] == 9 * (2 + 2 + 2 + 2 + 2 + 3) + 3
    assert run.losses[-1] < run.losses[0]


def test_the_real_tasks_of_the_comparison_fit_their_networks() -> None:
    for start, (x, y), (x_test, y_test), options in tiny_methods.tasks().values():
        outputs = ig.compile(start(0))(x[:2])
        assert outputs.shape == (2, int(max(y.max(), y_test.max())) + 1)
        assert x_test.dtype == x.dtype and options["budget"] > 0
    assert SCRATCH not in tiny_methods.METHODS
