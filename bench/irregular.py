"""Whole irregular networks, compiled, beside one call per level in torch and scipy."""

from __future__ import annotations

from typing import Any

import torch

import irgrow as ig
from bench import engines, nets
from bench.suite import Case, Made, op

# (forward at batch 1, 32, 256; forward and backward): what we want, against the best of the opponents.
GOALS = {
    "grown 1k": (40.0, 10.0, 5.0, 40.0),
    "grown 20k": (40.0, 10.0, 5.0, 100.0),
    "layered 5 %": (0.95, 0.95, 1.5, 4.0),
    "layered 20 %": (0.95, 0.95, 1.5, 4.0),
    "small-world 8k": (0.95, 0.95, 1.5, 4.0),
}
SCATTER = "torch scatter per level"
SCATTER_GOAL = 20.0  # forward and backward, batch 32, grown 1k, against scatter alone


@op(
    "irregular",
    cases=[
        {"net": net, "batch": batch, "backward": backward, "neurons": neurons}
        for net, neurons in (
            ("grown 1k", 1000),
            ("grown 20k", 20000),
            ("layered 5 %", 4096),
            ("layered 20 %", 4096),
            ("small-world 8k", 8192),
        )
        for batch, backward in ((1, False), (32, False), (256, False), (32, True))
    ],
    tiny={"neurons": 160},
    devices=("cpu", "cuda"),
)
def irregular(*, net: str, batch: int, backward: bool, neurons: int, device: str) -> Made:
    """Compiled irregular networks: forward, and forward and backward, beside the best engine per level.

    grown: Algorithm 1 with 16 parents, 64 inputs, 10 outputs; layered: 8 layers, each neuron reads 5 % or 20 % of
    the layer before; small-world: Watts-Strogatz, degree 32, 10 % rewired, in a random order. All relu, float32.
    """
    network = _network(net, neurons)
    model = ig.compile(network, device=device)
    levels = engines.Levels(network, device)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, levels.inputs, generator=draw).to(device)
    edges = int(levels.weights.numel())
    label = f"{net}, B={batch}, {'forward+backward' if backward else 'forward'}"
    forward_bytes = 4.0 * (2 * edges + levels.neurons * batch)
    threads = sorted({1, torch.get_num_threads()})
    goals = GOALS[net] if device == "cpu" else (None,) * 4
    if not backward:
        with torch.no_grad():
            yield Case(
                label,
                ours=lambda: model(x),
                opponents=engines.forward_engines(levels, x),
                tolerance=1e-4,
                goal={1: goals[0], 32: goals[1], 256: goals[2]}.get(batch),
                cost=(2.0 * edges * batch, forward_bytes),
                threads=threads,
            )
        return
    g = torch.randn(batch, levels.outputs, generator=draw).to(device)
    parameters = [model.tensors()[bundle.tensor] for bundle in network.bundles.values()]

    def ours() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        y = model(x)
        return y.detach(), torch.autograd.grad(y, parameters, g)

    training = engines.training_engines(levels, x, g)
    opponents = {name: run for name, (run, _) in training.items()}
    common: dict[str, Any] = {
        "ours": ours,
        "tolerance": 1e-3,
        "cost": (6.0 * edges * batch, 2 * forward_bytes + 4.0 * (edges + levels.neurons * batch)),
        "threads": threads,
        "view": engines.view(levels, {name: convert for name, (_, convert) in training.items()}),
    }
    yield Case(label, opponents=opponents, goal=goals[3] if batch == 32 else None, **common)
    if net == "grown 1k" and batch == 32:
        scatter = {SCATTER: opponents[SCATTER]}
        yield Case(f"{label}, scatter", opponents=scatter, goal=SCATTER_GOAL if device == "cpu" else None, **common)


def _network(net: str, neurons: int) -> ig.Network:
    kind, _, rest = net.partition(" ")
    if kind == "grown":
        return nets.grown(neurons)
    if kind == "layered":
        return nets.layered(max(1, neurons // 8), 8, float(rest.removesuffix(" %")) / 100)
    return nets.small_world(neurons)
