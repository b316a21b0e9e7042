"""The toy of Firefly, appendix B.1: why adding new neurons gets further than splitting old ones.

One input, one output, hidden neurons sigma(t) = exp(-t^2 / 2). The teacher has 15 of them, its weights drawn
from N(0, 3), read as variance 3; 1000 inputs are uniform in [-5, 5]. The student begins with one neuron and
grows by one at a time to ten; between growths Adam (0.01) trains it on all samples. Errors are MSE / Var(y).

`full`: the paper's 10,000 iterations between growths, and up to 12 neurons. It names neither the optimizer nor its rate
nor the number of teachers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments.claims import claim
from irgrow.experiments.neighbours import Way, best_neighbour
from irgrow.experiments.pictures import lines
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.firefly import Firefly
from irgrow.growth.selection import Selects
from irgrow.growth.splitting import SplittingDescent
from irgrow.ir.builder import Builder
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.passes.add_units import AddUnits
from irgrow.passes.base import Pass
from irgrow.passes.split_offset import SplitUnits
from irgrow.runtime.model import CompiledNetwork, compile

VARIANCE, START, EPS = 3.0, 0.1, 0.1  # of the teacher's weights, of new neurons; how far a growth moves
SOURCE = "Firefly, figure 3"
TRIES, TUNING = 3, 100  # neighbours of a random search, and the steps each is trained (appendix B.1)
SELECTING: dict[str, Callable[[int], Selects]] = {
    "firefly": lambda seed: Firefly(1, new=5, seed=seed),
    "firefly, new only": lambda seed: Firefly(1, new=5, splits=False, seed=seed),
    "firefly, splits only": lambda seed: Firefly(1, new=0, seed=seed),
    "splitting descent": lambda seed: SplittingDescent(1, eps=EPS),
}
SELECTING["firefly, m' = 1"] = lambda seed: Firefly(1, new=1, seed=seed)
SEARCHING = {"random search": 5, "random search, splits only": 0}  # how many new neurons are among the candidates
SCRATCH = "scratch"
COMPARED = ("firefly", "firefly, splits only", "splitting descent", *SEARCHING, SCRATCH)
SWEEP = {0: "firefly, splits only", 1: "firefly, m' = 1", 5: "firefly"}
METHODS = (*SELECTING, *SEARCHING, SCRATCH)


@dataclass(frozen=True)
class Result:
    """One run: MSE / Var(y) at the end of each phase, with so many neurons; growths that found nothing."""

    method: str
    seed: int
    neurons: list[int]
    errors: list[float]
    growing: float  # seconds, all growths
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


def grown(method: str, seed: int, *, neurons: int = 10, iterations: int = 1000, rate: float = 0.01) -> Result:
    """One student of the seed's teacher, grown to `neurons` neurons; deterministic for a thread count.

    `scratch`: a student of that many neurons from the start, trained for as many steps in all.
    """
    if method not in METHODS:
        raise UnknownName(f"method {method!r}", expected=f"one of {', '.join(METHODS)}")
    data = teacher(seed)
    variance = float(data[1].var(unbiased=False))
    model = compile(student(seed + 1, neurons if method == SCRATCH else 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    sizes, errors, notes, growing = [], [], [], 0.0
    for phase in range(neurons):
        if phase and method != SCRATCH:
            begun = perf_counter()
            try:
                _grow(method, model, optimizer, data, seed + phase)
            except Refused as refused:
                notes.append(f"{model.structure.groups['hidden'].units} neurons: {refused}")
            growing += perf_counter() - begun
        errors.append(_trained(model, optimizer, data, iterations) / variance)
        sizes.append(model.structure.groups["hidden"].units)
    return Result(method, seed, sizes, errors, growing, notes)


def _grow(
    method: str, model: CompiledNetwork, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], seed: int
) -> None:
    if method in SELECTING:
        selection = SELECTING[method](seed).select(model, data, F.mse_loss)
        model.grow(selection(model.network()), optimizer)
    else:
        draw = torch.Generator().manual_seed(seed)
        ways = [_random_way(draw, SEARCHING[method]) for _ in range(TRIES)]
        best_neighbour(model, optimizer, ways, lambda: _trained(model, optimizer, data, TUNING))


def _random_way(draw: torch.Generator, new: int) -> Way:
    """One of the units and `new` new neurons, drawn uniformly; the unit splits in a random direction."""

    def way(network: Network) -> Pass:
        units = network.groups["hidden"].units
        chosen = int(torch.randint(units + new, (), generator=draw))
        delta = START**0.5 * torch.randn(2, generator=draw, dtype=torch.float64)
        sign = float(torch.sign(torch.rand((), generator=draw) - 0.5))
        if chosen >= units:
            fan_out = torch.full((1, 1), EPS * sign, dtype=torch.float64)
            return AddUnits(_proposal(network, delta, {"hidden_y": fan_out}))
        delta = EPS * delta / delta.norm()
        return SplitUnits((network.unit("hidden", chosen),), _proposal(network, delta, {}))

    return way


def _proposal(network: Network, fan_in: Tensor, fan_out: dict[str, Tensor]) -> Proposal:
    into = {"x_hidden": fan_in[:1].reshape(1, 1)}
    return Proposal("hidden", network.structure, "random search", into, fan_out, fan_in[1:])


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


# ---- the experiment -----------------------------------------------------------------------------------------


def run(setting: Setting, *, iterations: int | None = None, neurons: int | None = None) -> Findings:
    """Every method on every teacher."""
    iterations = iterations or (10_000 if setting.full else 1000)
    neurons = neurons or (12 if setting.full else 10)
    names = list(dict.fromkeys([*COMPARED, *SWEEP.values()]))
    calls = [(name, seed, neurons, iterations) for seed in setting.seeds for name in names]
    found: dict[str, list[Result]] = {name: [] for name in names}
    for result in setting.each(_one, calls, "students"):
        found[result.method].append(result)
    last = {name: [r.errors[-1] for r in results] for name, results in found.items()}
    ratio = [a / b for a, b in zip(last["random search"], last["firefly"], strict=True)]
    claims = [
        claim("new", "with new neurons the error vanishes", SOURCE, last["firefly"], "<=", 1e-4, paper="0 (plot)"),
        claim(
            "splits", "splits alone get stuck", SOURCE, last["firefly, splits only"], ">=", 1e-2, paper="0.02 (plot)"
        ),
        claim("descent", "so does splitting descent", SOURCE, last["splitting descent"], ">=", 1e-2),
        claim("search", "random search with new neurons does too, later", SOURCE, ratio, ">", 1.0),
        claim(
            "one",
            "one new candidate helps much: error with none / with one",
            SOURCE,
            [a / b for a, b in zip(last[SWEEP[0]], last[SWEEP[1]], strict=True)],
            ">",
            10.0,
        ),
        claim(
            "scratch",
            "growing beats the same network from scratch, as many steps in all: error of scratch / grown",
            "control",
            [a / b for a, b in zip(last[SCRATCH], last["firefly"], strict=True)],
            ">",
            1.0,
            note="the paper's figure shows scratch without saying how long it was trained",
        ),
    ]
    findings = Findings(
        claims,
        ("method", f"median error at {neurons} neurons", "lowest", "highest", "neurons reached (median)"),
        [(n, median(last[n]), min(last[n]), max(last[n]), median(r.neurons[-1] for r in found[n])) for n in names],
        {n: {"errors": [r.errors for r in rs], "neurons": [r.neurons for r in rs]} for n, rs in found.items()},
        timings={
            "growing seconds per growth": {n: median(r.growing for r in rs) / (neurons - 1) for n, rs in found.items()}
        },
    )
    findings.notes.append(f"{iterations:,} steps of Adam (0.01) between growths; the paper: 10,000")
    picture = setting.out / "errors.png"
    phases = list(range(1, neurons + 1))
    lines(
        picture,
        [
            ("methods", {n: (phases, [r.errors for r in found[n]]) for n in COMPARED}),
            (
                "Firefly, new candidates m'",
                {f"m' = {m}": (phases, [r.errors for r in found[n]]) for m, n in SWEEP.items()},
            ),
        ],
        x="phase (neurons, where every growth found something)",
        y="MSE / Var(y)",
        log=True,
    )
    findings.figures[picture.name] = "error over neurons: median and range of the middle half of the teachers"
    return findings


def _one(method: str, seed: int, neurons: int, iterations: int) -> Result:
    return grown(method, seed, neurons=neurons, iterations=iterations)
