"""Every way of computing one sparse level, and whether the compiler's cost model takes the fastest.

`python -m bench.routes` measures all of them, fits the constants of kernels/costs.py and prints that table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import irgrow as ig
from bench.suite import Made, Row, op
from irgrow.compiler.lower import EitherStep, lower
from irgrow.kernels import costs

WORST = 1.1  # the chosen route may take so many times as long as the best
DENSITIES, WIDTHS, BATCHES = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6), (64, 256, 512, 1024, 2048), (1, 32, 256)
BLOCKS = ((0.05, 32), (0.1, 16), (0.1, 64), (0.2, 32), (0.4, 64))
ROUTES = ("walk", "sparse", "dense", "blocks")


@op(
    "routes",
    cases=[
        {"n": n, "density": density, "block": block, "batch": batch, "backward": backward}
        for n, density, block in (
            (256, 0.2, 1),
            (512, 0.05, 1),
            (512, 0.4, 1),
            (1024, 0.05, 1),
            (1024, 0.2, 1),
            (512, 0.1, 16),
            (512, 0.2, 32),
            (1024, 0.2, 64),
        )
        for batch in BATCHES
        for backward in (False, True)
    ],
    tiny={"n": 64, "batch": 4},
)
def routes(*, n: int, density: float, block: int, batch: int, backward: bool, device: str) -> Made:
    """One relu level of n neurons that read n, by the route that the compiler takes and by all others.

    ratio: the fastest route's time / the chosen one's, of interleaved runs. block: the mask consists of
    random blocks of this size.
    """
    level = Level.random(n, density, block)
    times, differ = level.times(batch, backward)
    chosen = level.chosen(batch, backward)
    best = min(times, key=lambda route: times[route])
    of = f" in blocks of {block}" if block > 1 else ""
    label = f"n={n}, density={density:g}{of}, B={batch}, {'forward+backward' if backward else 'forward'}"
    ratio = times[best] / times[chosen]
    yield Row(
        label,
        opponent=f"the best: {best}",
        ratio=ratio,
        goal=1 / WORST,
        ours_ms=times[chosen] / 1e6,
        theirs_ms=times[best] / 1e6,
        others_ms={route: took / 1e6 for route, took in times.items()},
        difference=differ,
        tolerance=1e-4,
        state="WRONG" if differ > 1e-4 else "fine" if ratio >= 1 / WORST else "missed",
        note=f"chosen: {chosen}",
    )


@dataclass(frozen=True)
class Level:
    """One sparse level with every route kept, and as it is usually lowered."""

    network: ig.Network
    every: Any
    usual: Any
    tensors: dict[str, Tensor]

    @staticmethod
    def random(n: int, density: float, block: int = 1) -> Level:
        draw = np.random.default_rng(0)
        coarse = draw.random((n // block, n // block)) < density
        coarse[np.arange(n // block), draw.integers(0, n // block, n // block)] = True
        target, source = np.nonzero(np.kron(coarse, np.ones((block, block), np.bool_)))
        builder = ig.Builder(seed=0)
        builder.input("x", n)
        builder.output("y", n, activation="relu")
        weight = torch.from_numpy(draw.uniform(-1, 1, source.size) / (density * n) ** 0.5).float()
        builder.connect("x", "y", ig.Sparse(source, target), weight)
        network = builder.build()
        tensors = {name: t.clone().requires_grad_() for name, t in network.tensors().items()}
        return Level(network, lower(network, every_route=True), lower(network), tensors)

    @property
    def step(self) -> EitherStep:
        [step] = self.every.steps
        assert isinstance(step, EitherStep)
        return step

    def chosen(self, batch: int, backward: bool) -> str:
        """The route of the program as it is usually lowered."""
        [step] = self.usual.steps
        if not isinstance(step, EitherStep) or not step.by_steps(batch, backward):
            return "walk"
        return self.matrix.route(batch, backward)

    @property
    def matrix(self) -> Any:
        [step] = self.step.steps
        [matrix] = step.matrices
        return matrix

    def size(self, batch: int) -> costs.Size:
        return self.matrix.size(batch)  # type: ignore[no-any-return]

    def times(self, batch: int, backward: bool) -> tuple[dict[str, float], float]:
        """(nanoseconds by route; the largest relative difference of a result from the walk's)."""
        draw = torch.Generator().manual_seed(0)
        n = self.network.groups["x"].neurons
        x, g = (torch.randn(batch, n, generator=draw) for _ in range(2))
        x.requires_grad_(backward)
        runs = {route: self._run(route, x, g, backward) for route in ("walk", *self.matrix.routes)}
        results = {route: run() for route, run in runs.items()}
        differ = max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
            for found in results.values()
            for a, b in zip(found, results["walk"], strict=True)
        )
        return _interleaved(runs), differ

    def _run(self, route: str, x: Tensor, g: Tensor, backward: bool) -> Callable[[], Sequence[Tensor]]:
        leaves = [x, *self.tensors.values()]

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return self.every.run(self.tensors, (x,), route=route)[0]  # type: ignore[no-any-return]

        def both() -> Sequence[Tensor]:
            (y,), _ = self.every.run(self.tensors, (x,), route=route)
            return y.detach(), *torch.autograd.grad(y, leaves, g)

        return both if backward else forward


def _interleaved(runs: dict[str, Callable[[], Any]], budget: float = 0.25) -> dict[str, float]:
    """Nanoseconds of each, the 10 % quantile of as many rounds as fit the budget (seconds); between 8 and 200.

    Not the median: where others use a core, torch's threads wait for it milliseconds long. Before each timed call
    the same runs once, so that none is timed while the threads of another still spin.
    """
    took: dict[str, list[int]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    begin, rounds = time.perf_counter(), 0
    while rounds < 8 or (rounds < 200 and time.perf_counter() - begin < budget):
        for name, run in runs.items():
            run()
            before = time.perf_counter_ns()
            run()
            took[name].append(time.perf_counter_ns() - before)
        rounds += 1
    return {name: float(np.quantile(times, 0.1)) for name, times in took.items()}


# --- the constants --------------------------------------------------------------------------------------------

Measured = list[tuple[Level, int, bool, dict[str, float]]]


def measured() -> Iterator[tuple[Level, int, bool, dict[str, float]]]:
    """(level, batch, with gradients, times) of every level of the op."""
    shapes = [(n, d, 1) for n in WIDTHS for d in DENSITIES] + [(n, d, b) for n in (512, 2048) for d, b in BLOCKS]
    for shape in shapes:
        level = Level.random(*shape)
        for batch in BATCHES:
            for backward in (False, True):
                yield level, batch, backward, level.times(batch, backward)[0]


def fitted(all_times: Measured) -> dict[tuple[str, bool], costs.Cost]:
    """Constants, none negative, whose relative errors have the least sum of squares.

    Times err to one side: after each fit cases that took twice as long as it says are left out of the next.
    """
    from scipy.optimize import nnls

    found = {}
    for route in ROUTES:
        for backward in (False, True):
            mine = [(level.size(b), t[route]) for level, b, back, t in all_times if back == backward and route in t]
            table = np.array([costs.features(route, size) for size, _ in mine])
            took = np.array([t for _, t in mine])
            use, constants = np.ones(len(took), np.bool_), np.zeros(table.shape[1])
            for _ in range(6):
                relative = table[use] / took[use, None]
                scale = np.maximum(np.linalg.norm(relative, axis=0), 1e-300)
                constants = nnls(relative / scale, np.ones(len(relative)))[0] / scale
                use = took <= 2 * (table @ constants)
            found[route, backward] = costs.Cost(*constants)
    return found


def main() -> None:
    """Measures, prints the table for kernels/costs.py, and how far from the best it would choose."""
    all_times = list(measured())
    table = fitted(all_times)
    print("COSTS = {")
    for (route, training), cost in table.items():
        numbers = ", ".join(f"{number:.3g}" for number in cost)
        print(f'    ("{route}", {training}): Cost({numbers}),')
    print("}")
    costs.COSTS.update(table)
    ratios = []
    for level, batch, backward, times in all_times:
        taken = min(times, key=lambda r: costs.estimate(r, level.size(batch), training=backward))
        ratios.append((times[taken] / min(times.values()), level, batch, backward, taken, times))
    ratios.sort(key=lambda found: -found[0])
    print(f"within {WORST} of the best: {sum(r[0] <= WORST for r in ratios)} of {len(ratios)}; the worst:")
    for ratio, level, batch, backward, taken, times in ratios[:25]:
        size = level.size(batch)
        others = ", ".join(f"{route} {took / 1e3:.0f}" for route, took in times.items())
        density = size.edges / size.rows / size.columns
        passes = "both" if backward else "forward"
        print(f"{ratio:.2f}  n={size.rows} {density:.3f} B={batch} {passes}: {taken}; us: {others}")


if __name__ == "__main__":
    main()
