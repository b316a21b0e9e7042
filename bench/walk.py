"""The kernel under irregular networks, beside its own plain-torch form (what runs without numba)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench import engines, nets
from bench.suite import Case, Made, op
from irgrow.kernels import walk as kernel
from irgrow.kernels.activations import ACTIVATIONS

DEEP, GPU_GOAL = 50, 10.0  # at so many levels


@op(
    "walk",
    cases=[
        {"neurons": 1000, "batch": batch, "backward": backward} for backward in (False, True) for batch in (1, 32, 256)
    ],
    tiny={"neurons": 120},
    devices=("cpu", "cuda"),
)
def walk(*, neurons: int, batch: int, backward: bool, device: str) -> Made:
    """One call for a whole insertion-grown region, beside the same in torch, level by level, with autograd.

    On a GPU torch's launches of all levels are one CUDA graph.
    """
    growth = nets.grow(neurons - 74, parents=16, inputs=64, outputs=10, seed=0)
    order, pointer, column, weight = _by_level(growth, 64, 10)
    code = np.full(len(order), ACTIVATIONS["relu"].code, np.int32)
    plan = kernel.plan(64, pointer, column, code=code)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, batch, generator=draw).to(device)
    w = torch.from_numpy(weight).float().to(device)
    label = f"{neurons} neurons, B={batch}, {'forward+backward' if backward else 'forward'}"
    flops, moved = kernel.cost(plan, batch)
    on_gpu = device != "cpu"
    goal = GPU_GOAL if on_gpu and len(plan.level_pointer) - 1 >= DEEP else None

    def torch_per_level(run: engines.Engine) -> dict[str, engines.Engine]:
        return {"plain torch in a CUDA graph": engines.in_a_graph(run)} if on_gpu else {"plain torch": run}

    if not backward:
        with torch.no_grad():
            yield Case(
                label,
                ours=lambda: kernel.walk(plan, x, w),
                opponents=torch_per_level(lambda: kernel.walk_reference(plan, x, w)),
                tolerance=1e-4,
                goal=goal,
                cost=(flops, moved),
            )
        return
    more = kernel.cost(plan, batch, backward=True)
    g = torch.randn(plan.neurons, batch, generator=draw).to(device)
    leaves = x.requires_grad_(), w.requires_grad_()

    def both(run: Any) -> Any:
        y = run(plan, x, w)
        return y.detach(), *torch.autograd.grad(y, leaves, g)

    yield Case(
        label,
        ours=lambda: both(kernel.walk),
        opponents=torch_per_level(lambda: both(kernel.walk_reference)),
        tolerance=1e-3,
        goal=goal,
        cost=(flops + more[0], moved + more[1]),
    )


def _by_level(growth: nets.Growth, inputs: int, outputs: int) -> tuple[Any, Any, Any, Any]:
    """The computed neurons in level order, and their edges as compressed rows with inputs first among the columns."""
    from irgrow.kernels.graph import levels

    neurons = inputs + outputs + len(growth.drawn)
    depth = levels(growth.source.astype(np.int32), growth.target.astype(np.int32), neurons)
    computed = np.arange(inputs, neurons)
    order = computed[np.argsort(depth[inputs:], kind="stable")]
    place = np.empty(neurons, np.int64)
    place[:inputs], place[order] = np.arange(inputs), inputs + np.arange(order.size)
    edges = np.argsort(place[growth.target], kind="stable")
    counts = np.bincount(place[growth.target] - inputs, minlength=order.size)
    pointer = np.concatenate([[0], np.cumsum(counts)])
    return order, pointer, place[growth.source][edges].astype(np.int32), growth.weight[edges]
