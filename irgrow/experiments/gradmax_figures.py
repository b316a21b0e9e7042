"""What the figures of the GradMax paper measure, on its teacher-student task (20:10:10, no sign choice).

    figures 2a, 2b, 2c      gradient norm of a new unit, of all weights over time; loss difference from one checkpoint
    figure 3c               time and multiply-adds of a growth, in training steps
    section 4.2             singular vectors of a batch against those of all data
    figures 7, 8, 13        learning rates; singular value against later loss; first growth, seed width, more units
    table 2                 batch norm, and outgoing instead of incoming weights zero

The paper's Random has fan-in zero, as GradMax has (`random fan-out`); its inverse is `random`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.experiments.teacher_student import (
    How,
    RandomFanOut,
    Run,
    Task,
    data,
    descend,
    grow,
    multiply_adds,
    ratios,
    run_one,
)
from irgrow.growth.methods import GradMax
from irgrow.growth.methods.base import proposal
from irgrow.growth.optimised import GradMaxOpt
from irgrow.growth.probe import probe
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.runtime.model import CompiledNetwork, compile

TASK = Task((20, 10, 10))
RANDOM, GRADMAX = "random fan-out", "gradmax"
STARTS, VECTORS, HORIZON = (20, 100, 500), 5, 300
RATES = (0.2, 0.1, 0.05, 0.02, 0.01)
BATCHES = (16, 32, 64, 128, 256, 512, 1000)
FIRST = (1, 200, 500, 1000)  # the step after which the first growth comes
SEEDS_OF = (2, 4, 6, 8)  # hidden units at the start
TABLE = tuple((kind, way, m) for kind in ("dense", "norm") for way, pair in (
    ("fan-in zero", (RANDOM, GRADMAX)), ("fan-out zero", ("random", "inverse"))
) for m in pair)  # fmt: skip


@dataclass(frozen=True)
class Vector:
    """One silent unit whose fan-out is singular vector `number` (0: the largest) of GradMax's matrix."""

    number: int = 0
    units: int = 1

    needs: ClassVar[tuple[str, ...]] = ("M_prev",)

    def propose(self, statistics: Statistics) -> Proposal:
        """The unit, with the norm that GradMax gives it."""
        all_of_them = GradMax(self.number + 1).propose(statistics)
        assert all_of_them.singular_values is not None
        alpha, omega = all_of_them.alpha.mT[:, self.number :], all_of_them.omega[:, self.number :]
        return proposal(self, statistics, alpha, omega, singular_values=all_of_them.singular_values[self.number :])


def matched(task: Task, budget: int) -> Task:
    """The task with as many steps after its last growth as make the multiply-adds `budget`."""
    width = [task.seed_width + n * task.units for n in range(task.growths + 1)]
    per_unit = 3 * (task.sizes[0] + task.sizes[2]) * task.samples
    before = [task.moments[0]] + [task.every] * (task.growths - 1)
    spent = sum(per_unit * w * steps for w, steps in zip(width, before, strict=False))
    return replace(task, after=max(1, (budget - spent) // (per_unit * width[-1])))


def budget(task: Task = TASK) -> int:
    """The multiply-adds of the task's training."""
    per_unit = 3 * (task.sizes[0] + task.sizes[2]) * task.samples
    widths = [task.seed_width + n * task.units for n in range(task.growths + 1)]
    return per_unit * (task.every * sum(widths[:-1]) + task.after * widths[-1])


def checkpoints(seed: int) -> tuple[Run, list[Network]]:
    """A run grown by the paper's Random, and its network before each growth."""
    held: list[Network] = []
    run = run_one(RANDOM, TASK, seed, False, before_growth=lambda _, model: held.append(model.network()))
    return run, held


def after(network: Network, batch: tuple[Tensor, Tensor], how: How, steps: int, rate: float) -> list[float]:
    """The training losses of so many steps after one growth."""
    model = compile(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    grow(model, how, batch, optimizer, signs=False)
    return [descend(model, optimizer, batch) for _ in range(steps)]


def from_checkpoints(seed: int, steps: int = 500, draws: int = 10) -> dict[str, Any]:
    """Figures 2 and 3c, and the singular vectors of batches, from one Random run."""
    run, networks = checkpoints(seed)
    batch = data(TASK, seed)
    norms: dict[str, list[list[float]]] = {GRADMAX: [], "gradmax-opt": [], RANDOM: []}
    differences, overlaps, cost = [], [], {}
    for number, network in enumerate(networks):
        model = compile(network)
        statistics = probe(model, batch, F.mse_loss, sites=["hidden"], want=("M_prev",))["hidden"]

        def norm(how: Any, given: Statistics = statistics) -> float:
            return math.sqrt(how.propose(given).predicted_gain)

        norms[GRADMAX].append([norm(GradMax(1))])
        norms["gradmax-opt"].append([norm(GradMaxOpt(1, seed=n)) for n in range(3)])
        norms[RANDOM].append([norm(RandomFanOut(1, seed=100 * n)) for n in range(draws)])
        two = [after(network, batch, how, steps, TASK.rate) for how in (GradMax(1), RandomFanOut(1, seed=seed))]
        differences.append([r - g for g, r in zip(two[0][::10], two[1][::10], strict=True)])
        overlaps.append(_overlaps(model, batch, statistics, seed))
        if not number:
            cost = _flops(network, batch)
    return {"norms": norms, "differences": differences, "overlaps": overlaps, "flops": cost, "run": run}


def _overlaps(model: CompiledNetwork, batch: tuple[Tensor, Tensor], whole: Statistics, seed: int) -> list[list[float]]:
    """For each batch size: |cos| of the first singular vectors, and the share of the first five that both span."""
    assert whole.M_prev is not None
    full = torch.linalg.svd(whole.M_prev.mT).U
    found = []
    for size in BATCHES:
        chosen = torch.randperm(len(batch[1]), generator=torch.Generator().manual_seed(seed))[:size]
        part = probe(model, (batch[0][chosen], batch[1][chosen]), F.mse_loss, sites=["hidden"], want=("M_prev",))
        M_prev = part["hidden"].M_prev
        assert M_prev is not None
        U = torch.linalg.svd(M_prev.mT).U
        five = (full[:, :5].mT @ U[:, :5]).square().sum() / 5
        found.append([float((full[:, 0] @ U[:, 0]).abs()), float(five)])
    return found


def _flops(network: Network, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Multiply-adds of a growth by each method, in training steps, as torch counts them (without the SVD)."""
    from torch.utils.flop_counter import FlopCounterMode

    from irgrow.experiments.teacher_student import METHODS

    step = 3 * multiply_adds(network) * len(batch[1])
    found = {}
    for name in (RANDOM, GRADMAX, "gradmax-opt", "inverse", "splitting"):
        how = METHODS[name](1, 0)
        assert how is not None
        with FlopCounterMode(display=False) as counter:
            grow(compile(network), how, batch, signs=False)
        found[name] = counter.get_total_flops() / 2 / step
    return found


def long_term(seed: int, start: int, horizon: int = HORIZON) -> dict[str, Any]:
    """Figure 8: the losses after growing by each of five singular vectors at a step, and the Pearson correlation."""
    task = replace(TASK, growths=1, first=start, after=1)
    held: list[Network] = []
    run_one("gradmax", task, seed, False, before_growth=lambda _, model: held.append(model.network()))
    batch = data(TASK, seed)
    statistics = probe(compile(held[0]), batch, F.mse_loss, sites=["hidden"], want=("M_prev",))["hidden"]
    values = GradMax(VECTORS).propose(statistics).singular_values
    assert values is not None
    losses = [after(held[0], batch, Vector(n), horizon, TASK.rate)[9::10] for n in range(VECTORS)]
    pearson = [float(torch.corrcoef(torch.stack([values.cpu(), at]))[0, 1]) for at in _columns(losses)]
    return {"values": values.tolist(), "losses": losses, "pearson": pearson}


def _columns(rows: list[list[float]]) -> list[Tensor]:
    return list(torch.tensor(rows, dtype=torch.float64).mT)


# ---- the experiment -------------------------------------------------------------------------------------------


def variants() -> dict[str, tuple[str, Task]]:
    """Whole runs by name: what grows them, and the task."""
    most = budget()
    found = {f"rate {rate:g}, {m}": (m, replace(TASK, rate=rate)) for rate in RATES for m in (RANDOM, GRADMAX)}
    for first in FIRST:
        found[f"first growth {first}"] = (GRADMAX, matched(replace(TASK, first=first), most))
    for width in SEEDS_OF:
        for m in (RANDOM, GRADMAX):
            task = replace(TASK, start=width, growths=TASK.sizes[1] - width, every=100)
            found[f"seed width {width}, {m}"] = (m, matched(task, most))
    for width in (10, 15, 20):
        found[f"up to {width} units"] = (
            GRADMAX,
            replace(TASK, growths=width - 5, every=100, after=2000 - 100 * (width - 5)),
        )
    found["big, 2000 steps"] = ("big", replace(TASK, growths=0, after=2000))
    for kind, way, m in TABLE:
        if kind == "norm" or way == "fan-out zero":
            found[f"{kind}, {way}, {m}"] = (m, replace(TASK, kind=kind))
        else:
            found[f"{kind}, {way}, {m}"] = (m, TASK)
    return found


def run(setting: Setting) -> Findings:
    """Everything for every seed."""
    seeds = setting.seeds
    held = setting.each(from_checkpoints, [(seed,) for seed in seeds], "checkpoints")
    far = iter(setting.each(long_term, [(seed, start) for start in STARTS for seed in seeds], "singular values"))
    long = {start: [next(far) for _ in seeds] for start in STARTS}
    arms = variants()
    done = iter(setting.each(run_one, [(m, t, seed, False) for m, t in arms.values() for seed in seeds], "runs"))
    runs = {name: [next(done) for _ in seeds] for name in arms}
    finals = {name: [r.final for r in rs] for name, rs in runs.items()}
    findings = Findings(_claims(held, long, runs, finals), ("run", "median loss", "lowest", "highest"))
    for name, values in finals.items():
        findings.rows.append((name, median(values), min(values), max(values)))
    for name in held[0]["flops"]:
        findings.rows.append((f"a growth by {name}, in training steps (multiply-adds)", held[0]["flops"][name], "", ""))
    findings.data = {
        "gradient norm of a new unit": [h["norms"] for h in held],
        "loss of random - loss of gradmax, every 10 steps": [_short(h["differences"]) for h in held],
        "singular vectors of batches": {
            "sizes": list(BATCHES),
            "overlaps": [_short(o) for h in held for o in h["overlaps"]],
        },
        "pearson": {str(start): _short([one["pearson"] for one in by]) for start, by in long.items()},
        "final": finals,
    }
    findings.timings = {
        "growth in seconds": {
            m: median(r.seconds_growing / TASK.growths for r in runs[f"dense, {way}, {m}"])
            for kind, way, m in TABLE
            if kind == "dense"
        },
        "step in seconds": median(r.seconds_training / TASK.steps for r in runs[f"dense, fan-in zero, {GRADMAX}"]),
    }
    findings.figures = _pictures(setting, held, long, runs)
    return findings


def _short(rows: list[list[float]]) -> list[list[float]]:
    return [[float(f"{v:.4g}") for v in row] for row in rows]


def _claims(
    held: list[dict[str, Any]],
    long: dict[int, list[dict[str, Any]]],
    runs: dict[str, list[Run]],
    finals: dict[str, list[float]],
) -> list[Claim]:
    above = [fmean(g[0] / fmean(r) for g, r in zip(h["norms"][GRADMAX], h["norms"][RANDOM], strict=True)) for h in held]
    never = max(max(r) / g[0] for h in held for g, r in zip(h["norms"][GRADMAX], h["norms"][RANDOM], strict=True))
    opt = max(
        abs(max(o) / g[0] - 1)
        for h in held
        for g, o in zip(h["norms"][GRADMAX], h["norms"]["gradmax-opt"], strict=True)
    )
    base = {m: runs[f"dense, fan-in zero, {m}"] for m in (RANDOM, GRADMAX)}
    after_first = [
        math.log(median(g.gradient_norms[20:]) / median(r.gradient_norms[20:]))
        for g, r in zip(base[GRADMAX], base[RANDOM], strict=True)
    ]
    differences = [fmean(d[-1] for d in h["differences"]) for h in held]
    early = [fmean(d[10] for d in h["differences"]) for h in held]
    aligned = [fmean(o[BATCHES.index(128)][1] for o in h["overlaps"]) for h in held]
    dear = max(h["flops"][GRADMAX] for h in held)
    best = min(RATES, key=lambda rate: median(finals[f"rate {rate:g}, {GRADMAX}"]))
    reaches = "our ascent, with the norm restored every step, does reach it for one unit"
    without = "without the SVD of the 10 x 20 matrix; seconds are under timings"
    measured: list[tuple[str, str, str, Any, str, float, str, str]] = [
        ("figure-2a", "gradient norm of a new unit: GradMax / Random (mean over checkpoints)", "figure 2a", above, ">",
         1.0, "GradMax is higher", ""),
        ("figure-2a-never", "largest gradient norm of a random unit / GradMax's", "figure 2a", never, "<=", 1.0,
         "at most 1: it is the maximum", ""),
        ("figure-2a-opt", "gradient norm of GradMaxOpt / GradMax, its largest distance from 1", "figure 2a", opt, ">",
         0.01, "GradMaxOpt does not reach the maximum", reaches),
        ("figure-2b", "gradient norm / loss after the first growth: log of GradMax / Random", "figure 2b", after_first,
         ">", 0.0, "GradMax stays higher", ""),
        ("figure-2c-100", "loss of Random - GradMax, 100 steps after one growth", "figure 2c", early, ">", 0.0,
         "positive", ""),
        ("figure-2c", "loss of Random - GradMax, 490 steps after one growth", "figure 2c", differences, ">", 0.0,
         "positive", ""),
        ("figure-3c", "multiply-adds of a GradMax growth, in training steps", "figure 3c", dear, "<=", 1.0,
         "less than one step", without),
        ("batches", "share of the first five singular vectors that a batch of 128 finds", "section 4.2", aligned, ">=",
         0.9, "close", ""),
        *((f"figure-8-{start}", f"grown at step {start}: Pearson of singular value and loss {HORIZON} steps later",
           "figure 8", [one["pearson"][-1] for one in by], "<", 0.0, "negative", "") for start, by in long.items()),
        ("figure-7", "the learning rate with the lowest median loss, GradMax", "figure 7", best, "==", 0.1, "0.1", ""),
        *((name, text, " ".join(name.split("-")[:2]), ratios(finals[one], finals[other]), "<", 1.0, paper,
           "") for name, text, one, other, paper in RATIOS),
    ]  # fmt: skip
    return [
        claim(name, text, f"GradMax, {source}", values, way, bound, paper=paper, note=note)
        for name, text, source, values, way, bound, paper, note in measured
    ]


RATIOS = (  # name, what is compared, the two runs, in the paper
    ("figure-13b", "loss when growing from the first step on / from step 1000 on, equal multiply-adds",
     "first growth 1", "first growth 1000", "early is best"),
    ("figure-13c", "loss from 8 seed units / from 2, GradMax, equal multiply-adds", f"seed width 8, {GRADMAX}",
     f"seed width 2, {GRADMAX}", "wider is better"),
    ("figure-13d", "loss when grown to 15 units / Big (10), 2000 steps", "up to 15 units", "big, 2000 steps",
     "below Big from 1.5x on"),
    ("table-2", "no batch norm, fan-in zero: GradMax / Random", f"dense, fan-in zero, {GRADMAX}",
     f"dense, fan-in zero, {RANDOM}", "91.1 against 90.6 % (WRN-28-1, CIFAR-10)"),
    ("table-2-inverse", "no batch norm, fan-out zero: inverse GradMax / Random", "dense, fan-out zero, inverse",
     "dense, fan-out zero, random", "92.4 against 92.1 %"),
    ("table-2-norm", "batch norm, fan-in zero: GradMax / Random", f"norm, fan-in zero, {GRADMAX}",
     f"norm, fan-in zero, {RANDOM}", "93.0 against 92.9 %"),
    ("table-2-norm-inverse", "batch norm, fan-out zero: inverse GradMax / Random", "norm, fan-out zero, inverse",
     "norm, fan-out zero, random", "92.9 against 92.8 %"),
)  # fmt: skip


def _pictures(
    setting: Setting, held: list[dict[str, Any]], long: dict[int, list[dict[str, Any]]], runs: dict[str, list[Run]]
) -> dict[str, str]:
    from irgrow.experiments import pictures

    out, growths = setting.out, list(range(1, TASK.growths + 1))
    norms = {m: (growths, [[fmean(at) for at in h["norms"][m]] for h in held]) for m in held[0]["norms"]}
    pictures.lines(out / "new-units.png", [("Figure 2a: gradient of a new unit", norms)], x="growth", y="gradient norm")
    base = {m: runs[f"dense, fan-in zero, {m}"] for m in (RANDOM, GRADMAX)}
    over = {m: (rs[0].steps, [r.gradient_norms for r in rs]) for m, rs in base.items()}
    loss = {m: (rs[0].steps, [r.losses for r in rs]) for m, rs in base.items()}
    pictures.lines(
        out / "over-time.png",
        [("Figure 2b: gradient norm / loss", over), ("Training loss", loss)],
        x="step",
        y="",
        log=True,
    )
    steps = [10 * n for n in range(len(held[0]["differences"][0]))]
    apart = {f"growth {n + 1}": (steps, [h["differences"][n] for h in held]) for n in range(TASK.growths)}
    pictures.lines(
        out / "difference.png",
        [("Figure 2c: from one checkpoint", apart)],
        x="steps after the growth",
        y="loss of Random - GradMax",
    )
    rates = {
        m: (list(RATES), [[runs[f"rate {r:g}, {m}"][k].final for r in RATES] for k in range(len(held))])
        for m in (RANDOM, GRADMAX)
    }
    pictures.lines(
        out / "rates.png", [("Figure 7", rates)], x="learning rate", y="final training loss", log=True, log_x=True
    )
    later = [10 * (n + 1) for n in range(len(long[STARTS[0]][0]["pearson"]))]
    pearson = {f"grown at step {s}": (later, [one["pearson"] for one in by]) for s, by in long.items()}
    pictures.lines(
        out / "pearson.png",
        [("Figure 8: singular value and later loss", pearson)],
        x="steps after the growth",
        y="Pearson correlation",
    )
    spans = {
        name: (list(BATCHES), [[fmean(o[n][k] for o in h["overlaps"]) for n in range(len(BATCHES))] for h in held])
        for k, name in enumerate(("first vector, |cos|", "first five, shared span"))
    }
    pictures.lines(
        out / "batches.png",
        [("Singular vectors of a batch and of all data", spans)],
        x="batch size",
        y="overlap",
        log_x=True,
    )
    shown = {n: [r.final for r in rs] for n, rs in runs.items() if n.startswith(("first", "seed", "up to", "big"))}
    pictures.bars(
        out / "schedules.png",
        "Figure 13: when, from where and how far (GradMax)",
        shown,
        x="final training loss",
        log=True,
    )
    table = {f"{'BN, ' if k == 'norm' else ''}{m}": [r.final for r in runs[f"{k}, {w}, {m}"]] for k, w, m in TABLE}
    pictures.bars(out / "table-2.png", "Table 2, on teacher and student", table, x="final training loss", log=True)
    return {
        "new-units.png": "The gradient norm of a new unit from checkpoints of the Random run",
        "over-time.png": "The gradient norm of all weights divided by the loss, and the loss",
        "difference.png": "The loss difference after growing once from the same checkpoint",
        "rates.png": "Learning rates",
        "pearson.png": "The correlation between a singular value and the loss later",
        "batches.png": "How well a batch finds the singular vectors of all data",
        "schedules.png": "First growth, seed width, and growing past the teacher",
        "table-2.png": "Batch norm, and which side is zero",
    }
