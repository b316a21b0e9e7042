"""The toy of Firefly, appendix B.1: why adding new neurons gets further than splitting old ones.

One input, one output, hidden neurons sigma(t) = exp(-t^2 / 2). The teacher has 15 of them, its weights drawn
from N(0, 3), read as variance 3; 1000 inputs are uniform in [-5, 5]. The student begins with one neuron and
grows by one at a time to ten; between growths Adam trains it on all samples (the paper trains 10,000
iterations and does not name the optimizer). With 3000 steps the medians of ten teachers (seeds 0 to 9) are 1e-5 for
Firefly and 1e-2 for splits only, whose mean is 6e-2: splitting often finds nothing to split, and stays where it is.
Errors are MSE / Var(y).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.growth.firefly import Firefly
from irgrow.growth.selection import Selects
from irgrow.growth.splitting import SplittingDescent
from irgrow.ir.builder import Builder
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.runtime.model import CompiledNetwork, compile

METHODS: dict[str, Callable[[int], Selects]] = {
    "firefly": lambda seed: Firefly(1, new=5, seed=seed),
    "firefly, new only": lambda seed: Firefly(1, new=5, splits=False, seed=seed),
    "firefly, splits only": lambda seed: Firefly(1, new=0, seed=seed),
    "splitting descent": lambda seed: SplittingDescent(1, eps=0.1),
}
VARIANCE, START = 3.0, 0.1  # of the teacher's weights and of the first neuron's


@dataclass(frozen=True)
class Result:
    """One run: MSE / Var(y) at the end of each phase, with so many neurons; growths that found nothing."""

    method: str
    seed: int
    neurons: list[int]
    errors: list[float]
    notes: list[str] = field(default_factory=list)


def teacher(seed: int, *, neurons: int = 15, samples: int = 1000) -> tuple[Tensor, Tensor]:
    """Inputs and outputs `[samples, 1]` in float64."""
    draw = torch.Generator().manual_seed(seed)
    theta, w = (VARIANCE**0.5 * torch.randn(neurons, n, generator=draw, dtype=torch.float64) for n in (2, 1))
    x = 10 * torch.rand(samples, 1, generator=draw, dtype=torch.float64) - 5
    return x, torch.exp(-0.5 * (x * theta[:, 0] + theta[:, 1]).square()) @ w


def student(seed: int, neurons: int = 1) -> Network:
    """A Gaussian hidden layer between one input and one output without bias."""
    draw = torch.Generator().manual_seed(seed)
    weights = START**0.5 * torch.randn(3, neurons, generator=draw, dtype=torch.float64)
    builder = Builder(seed=seed, dtype=torch.float64)
    builder.input("x", 1)
    builder.group("hidden", neurons, activation="gaussian", bias=weights[0])
    builder.connect("x", "hidden", weight=weights[1].reshape(-1, 1))
    builder.output("y", 1)
    builder.connect("hidden", "y", weight=weights[2].reshape(1, -1))
    return builder.build()


def run(method: str, seed: int, *, neurons: int = 10, iterations: int = 3000, rate: float = 0.01) -> Result:
    """One student of the seed's teacher, grown to `neurons` neurons; deterministic for a thread count."""
    if method not in METHODS:
        raise UnknownName(f"method {method!r}", expected=f"one of {', '.join(METHODS)}")
    data = teacher(seed)
    variance = float(data[1].var(unbiased=False))
    model = compile(student(seed + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    found = Result(method, seed, [], [])
    for phase in range(neurons):
        if phase:
            try:
                selection = METHODS[method](seed + phase).select(model, data, F.mse_loss)
                model.grow(selection(model.network()), optimizer)
            except Refused as refused:
                found.notes.append(f"{model.structure.groups['hidden'].units} neurons: {refused}")
        found.errors.append(_trained(model, optimizer, data, iterations) / variance)
        found.neurons.append(model.structure.groups["hidden"].units)
    return found


def compare(
    methods: Sequence[str] = tuple(METHODS), seeds: Sequence[int] = range(10), **options: float
) -> dict[str, tuple[float, float]]:
    """Median and mean over teachers of MSE / Var(y) at the end, by method; `options` as of `run`."""
    table = {}
    for method in methods:
        errors = [run(method, seed, **options).errors[-1] for seed in seeds]  # type: ignore[arg-type]
        table[method] = (median(errors), mean(errors))
    return table


def _trained(
    model: CompiledNetwork, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], steps: int
) -> float:
    """The loss after so many steps."""
    x, y = data
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(x), y))
