"""Teacher and student (GradMax, section 4.1): one hidden layer grows to the teacher's width while it trains.

A teacher `inputs : hidden : outputs` with ReLU and weights uniform in [-1, 1] labels 1,000 standard normal
inputs. The student begins at half the width and is trained by plain gradient descent (rate 0.1, full batch,
squared error averaged over samples and outputs); one unit is added after the update at steps 200, 400, ...,
1000, and 500 further steps follow. Two students never grow: `small` (the width at the beginning) and `big`
(the teacher's). The published notebook has 10 inputs where the paper says 20; both geometries are measured here:

    median of the final losses of 20 seeds (lowest, highest)
                                    10:10:10                        20:10:10
    small                           0.77    (0.40, 1.3)             2.0    (1.4, 2.6)
    random                          0.13    (0.048, 0.21)           0.23   (0.024, 0.46)
    gradmax, signs as they come     0.089   (0.017, 0.27)           0.20   (0.014, 0.58)
    gradmax                         0.038   (0.0073, 0.082)         0.032  (0.00051, 0.17)
    tiny                            0.026   (0.0013, 0.11)
    big                             5.5e-6  (5.3e-8, 2.3e-4)        1e-9   (5e-13, 8.5e-7)

Source: Evci et al., arXiv:2201.05125.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.growth.methods import GradMax, Method, Random, Tiny
from irgrow.growth.optimised import GradMaxOpt
from irgrow.growth.probe import probe
from irgrow.growth.refine import refine
from irgrow.ir.builder import mlp
from irgrow.ir.errors import UnknownName
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import compile

Geometry = tuple[int, int, int]

GROWN: dict[str, tuple[Callable[[int], Method], bool]] = {  # the method, and whether signs are chosen
    "random": (lambda seed: Random(1, seed=seed), False),
    "gradmax": (lambda seed: GradMax(1), True),
    "gradmax, signs as they come": (lambda seed: GradMax(1, seed=seed), False),
    "gradmaxopt": (lambda seed: GradMaxOpt(1, seed=seed), True),
    "tiny": (lambda seed: Tiny(1), True),
}
METHODS = ("small", "big", *GROWN)


@dataclass(frozen=True)
class Result:
    """One student: its loss after every step, and the norm of the new fan-in's gradient at each growth."""

    method: str
    seed: int
    losses: list[float]
    growths: int

    @property
    def final(self) -> float:
        return self.losses[-1]


def teacher(seed: int, geometry: Geometry = (10, 10, 10), samples: int = 1000) -> tuple[Tensor, Tensor]:
    """Inputs `[samples, inputs]` and what the teacher says of them, in float64."""
    draw = torch.Generator().manual_seed(seed)
    inputs, hidden, outputs = geometry

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=draw, dtype=torch.float64) - 1

    first, second = uniform(hidden, inputs), uniform(outputs, hidden)
    x = torch.randn(samples, inputs, generator=draw, dtype=torch.float64)
    return x, torch.relu(x @ first.mT) @ second.mT


def run(
    method: str,
    seed: int,
    *,
    geometry: Geometry = (10, 10, 10),
    rate: float = 0.1,
    every: int = 200,
    after: int = 500,
    bias: bool = False,
) -> Result:
    """One student of the seed's teacher; the same seed gives every method the same teacher and beginning."""
    if method not in METHODS:
        raise UnknownName(f"method {method!r}", expected=f"one of {', '.join(METHODS)}")
    x, y = teacher(seed, geometry)
    inputs, hidden, outputs = geometry
    start = hidden if method == "big" else hidden // 2
    model = compile(mlp([inputs, start, outputs], activation="relu", bias=bias, seed=seed, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    growths = hidden - hidden // 2
    losses, grown = [], 0
    for step in range(1, growths * every + after + 1):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if method in GROWN and step % every == 0 and grown < growths:
            make, signs = GROWN[method]
            how = make(1000 * seed + grown)
            proposal = how.propose(probe(model, (x, y), F.mse_loss, want=how.needs)["hidden"])
            if signs:
                proposal = refine(proposal, model, (x, y), F.mse_loss, lookahead=rate)
            model.grow(AddUnits(proposal)(model.structure), optimizer)
            grown += 1
    with torch.no_grad():
        losses.append(F.mse_loss(model(x), y).item())
    return Result(method, seed, losses, grown)


def compare(
    methods: Sequence[str] = METHODS, seeds: Sequence[int] = range(20), *, geometry: Geometry = (10, 10, 10)
) -> dict[str, list[float]]:
    """The final losses of every method, seed by seed."""
    return {method: [run(method, seed, geometry=geometry).final for seed in seeds] for method in methods}


def table(found: dict[str, list[float]]) -> str:
    """Median, lowest and highest of every method, as text."""
    lines = [f"{'method':30} {'median':>10} {'lowest':>10} {'highest':>10}"]
    for name, losses in found.items():
        lines.append(f"{name:30} {median(losses):10.3g} {min(losses):10.3g} {max(losses):10.3g}")
    return "\n".join(lines)
