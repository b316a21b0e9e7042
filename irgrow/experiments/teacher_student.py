"""Teacher and student (GradMax, section 4.1): a hidden layer grows from half its teacher's width to all of it.

The teacher's weights are uniform in [-1, 1], inputs are normal, the loss is the mean square over samples and
outputs. Students train on all samples at once by plain gradient descent and grow after the update of steps 200,
400, ... There are no biases (equation 5), but in the student of `all-zero`, which cannot learn without one.

    small, big        never grow: half the teacher's width, all of it
    random            fan-in drawn, fan-out zero
    random fan-out    fan-in zero, fan-out drawn with the norm that GradMax takes: the paper's Random
    gradmax, gradmax-opt, inverse, all-zero, splitting

With signs, each new pair (alpha, omega) takes the sign whose gradient is larger (`refine`). Where the fan-out is
zero there is no sign to choose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.methods import GradMax, Method, NeedsModel, Random, Silent
from irgrow.growth.methods.base import columns, proposal
from irgrow.growth.methods.draws import normal
from irgrow.growth.methods.with_model import propose
from irgrow.growth.optimised import GradMaxOpt, InverseGradMax
from irgrow.growth.probe import probe
from irgrow.growth.refine import refine
from irgrow.growth.splitting import SplittingDescent
from irgrow.ir.builder import Builder
from irgrow.ir.errors import Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork, compile

KINDS = ("dense", "conv", "norm")
IMAGE, KERNEL = 5, 3  # side of the images and of the filters of convolutional tasks


@dataclass(frozen=True)
class RandomFanOut:
    """Fan-in zero, fan-out normal with the norm that GradMax gives it: the Random of GradMax's experiments.

    (The published code draws it uniform in [0, 1).) `kick`, `eps` and `scale` as in GradMax.
    """

    units: int = 1
    seed: int = 0
    kick: float = 1e-15
    eps: float = 0.0
    scale: float = 1.0

    needs: ClassVar[tuple[str, ...]] = ("M_prev",)

    def propose(self, statistics: Statistics) -> Proposal:
        """The units; the same seed and width give the same ones."""
        statistics.need("M_prev")
        assert statistics.M_prev is not None
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        omega = normal(draw, columns(statistics), self.units, like=statistics.M_prev)
        omega = omega * (self.scale * statistics.fan_out_norm / omega.norm(dim=0))
        step = -statistics.slope * statistics.M_prev @ omega
        if self.eps:
            alpha = normal(draw, len(step), self.units, like=step)
            alpha = self.eps * alpha / alpha.norm(dim=0)
        else:
            alpha = self.kick * step / step.norm(dim=0).clamp(min=torch.finfo(step.dtype).tiny)
        gain = float(step.square().sum())
        return proposal(self, statistics, alpha, omega, predicted_gain=gain, gain_unit="gradient")


How = Method | NeedsModel | SplittingDescent
METHODS: dict[str, Callable[[int, int], How | None]] = {
    "small": lambda units, seed: None,
    "big": lambda units, seed: None,
    "random": lambda units, seed: Random(units, seed=seed),
    "random fan-out": lambda units, seed: RandomFanOut(units, seed=seed),
    "gradmax": lambda units, seed: GradMax(units),
    "gradmax-opt": lambda units, seed: GradMaxOpt(units, seed=seed),
    "inverse": lambda units, seed: InverseGradMax(units, seed=seed),
    "all-zero": lambda units, seed: Silent(units),
    "splitting": lambda units, seed: SplittingDescent(units, eps=0.1),
}
SIGNED = ("random fan-out", "gradmax", "gradmax-opt")  # those whose pairs have a sign to choose


@dataclass(frozen=True)
class Task:
    """A teacher of `sizes` (inputs, hidden, outputs; channels of convolutions) and how its students grow.

    kind        dense; conv: two 3x3 convolutions on 5x5 images, teacher weights divided by 3 so that outputs have
                the size they have in dense tasks; norm: dense with batch norm on the hidden layer, of the teacher too
    start       hidden units at the start (default: half the teacher's)
    first       the step after which the first growth comes (default: `every`)
    """

    sizes: tuple[int, int, int] = (20, 10, 10)
    kind: str = "dense"
    start: int | None = None
    growths: int = 5
    units: int = 1
    every: int = 200
    after: int = 500
    first: int | None = None
    rate: float = 0.1
    samples: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownName(f"task kind {self.kind!r}", expected=f"one of {', '.join(KINDS)}")

    @property
    def seed_width(self) -> int:
        return self.sizes[1] // 2 if self.start is None else self.start

    @property
    def moments(self) -> list[int]:
        """The steps after which growths come."""
        first = self.every if self.first is None else self.first
        return [first + n * self.every for n in range(self.growths)]

    @property
    def steps(self) -> int:
        return (self.moments[-1] if self.growths else 0) + self.after


@dataclass
class Run:
    """One student: loss and gradient norm (of all parameters, divided by the loss) at `steps`, and its growths.

    multiply_adds   of all steps, one per weight, sample, position and pass (a step has three)
    """

    method: str
    seed: int
    signs: bool
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    multiply_adds: int = 0
    seconds_training: float = 0.0
    seconds_growing: float = 0.0

    @property
    def final(self) -> float:
        return self.losses[-1]


def network(
    sizes: Sequence[int], kind: str = "dense", *, seed: int, bound: float | None = None, bias: bool = False
) -> Network:
    """Inputs, one hidden layer of ReLU, outputs; weights uniform within `bound`, or within Glorot's, in float64."""
    draw = torch.Generator().manual_seed(seed)
    taps = KERNEL**2 if kind == "conv" else 1
    place = (IMAGE, IMAGE) if kind == "conv" else ()

    def weight(outputs: int, inputs: int) -> Tensor:
        edge = math.sqrt(6 / ((inputs + outputs) * taps)) if bound is None else bound / math.sqrt(taps)
        shape = (outputs, inputs, KERNEL, KERNEL) if kind == "conv" else (outputs, inputs)
        return edge * (2 * torch.rand(shape, generator=draw, dtype=torch.float64) - 1)

    def pattern() -> Conv2d | None:
        return Conv2d((KERNEL, KERNEL), padding=(KERNEL // 2, KERNEL // 2)) if kind == "conv" else None

    builder = Builder(seed=seed, dtype=torch.float64)
    builder.input("x", (sizes[0], *place))
    zeros = torch.zeros(sizes[1], dtype=torch.float64)
    norm = "batch" if kind == "norm" else None
    builder.group("hidden", (sizes[1], *place), activation="relu", norm=norm, bias=zeros if bias else False)
    builder.output("y", (sizes[2], *place))
    builder.connect("x", "hidden", pattern(), weight(sizes[1], sizes[0]))
    builder.connect("hidden", "y", pattern(), weight(sizes[2], sizes[1]))
    return builder.build()


def data(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """The seed's inputs and what its teacher says to them."""
    place = (IMAGE, IMAGE) if task.kind == "conv" else ()
    samples = max(1, task.samples // math.prod(place))
    draw = torch.Generator().manual_seed(20_000 + seed)
    x = torch.randn(samples, task.sizes[0], *place, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        return x, compile(network(task.sizes, task.kind, seed=10_000 + seed, bound=1.0))(x)


def student(task: Task, method: str, seed: int) -> CompiledNetwork:
    """The network that a run begins with."""
    hidden = task.sizes[1] if method == "big" else task.seed_width
    sizes = (task.sizes[0], hidden, task.sizes[2])
    return compile(network(sizes, task.kind, seed=seed, bias=method == "all-zero"))


def grow(
    model: CompiledNetwork,
    how: How,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    signs: bool,
    rate: float = 0.1,
) -> float:
    """The model has its new hidden units; returns the predicted gain. Refused where there is nothing to grow."""
    if isinstance(how, SplittingDescent):
        selection = how.select(model, batch, F.mse_loss)
        model.grow(selection(model.structure), optimizer)
        return selection.predicted_gain
    statistics = probe(model, batch, F.mse_loss, sites=["hidden"], want=how.needs)["hidden"]
    found = propose(how, statistics, model, batch, F.mse_loss)
    if signs and bool(found.omega.any()):
        found = refine(found, model, batch, F.mse_loss, lookahead=rate)
    model.grow(AddUnits(found)(model.structure), optimizer)
    return math.nan if found.predicted_gain is None else found.predicted_gain


def run_one(
    method: str | How,
    task: Task | tuple[int, int, int],
    seed: int,
    signs: bool = True,
    *,
    record: int = 10,
    before_growth: Callable[[int, CompiledNetwork], Any] | None = None,
) -> Run:
    """One student of the seed's teacher, by a method of METHODS or any method of yours; deterministic.

    Losses (of the training batch, in train mode) and gradient norms are recorded every `record` steps and at the
    end. `before_growth(number, model)` sees the model before each growth. A growth that is refused is noted and
    left out.
    """
    if isinstance(method, str) and method not in METHODS:
        raise UnknownName(f"method {method!r}", expected=f"one of {', '.join(METHODS)}")
    if not isinstance(task, Task):
        task = Task(task)
    name = method if isinstance(method, str) else type(method).__name__
    batch, model = data(task, seed), student(task, name, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.rate)
    run = Run(name, seed, signs)
    moments = {step: n for n, step in enumerate(task.moments)}
    begun = time.perf_counter()
    for step in range(task.steps + 1):
        if step in moments:
            how = METHODS[name](task.units, 1000 * seed + step) if isinstance(method, str) else method
            if before_growth is not None:
                before_growth(moments[step], model)
            if how is not None:
                at = time.perf_counter()
                try:
                    run.gains.append(grow(model, how, batch, optimizer, signs=signs, rate=task.rate))
                except Refused as refused:
                    run.notes.append(f"step {step}: no growth: {refused}")
                run.seconds_growing += time.perf_counter() - at
        loss = descend(model, optimizer, batch)
        if step % record == 0 or step == task.steps:
            run.steps.append(step)
            run.losses.append(loss)
            run.gradient_norms.append(gradient_norm(model) / max(loss, 1e-300))
            run.widths.append(model.structure.groups["hidden"].units)
        if step < task.steps:
            run.multiply_adds += 3 * multiply_adds(model.structure) * len(batch[1])
    run.seconds_training = time.perf_counter() - begun - run.seconds_growing
    return run


def descend(model: CompiledNetwork, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    """The loss before this step of gradient descent; gradients stay where they are."""
    optimizer.zero_grad()
    loss = F.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss.item()


def gradient_norm(model: CompiledNetwork) -> float:
    """The norm of the gradients of all parameters together."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def multiply_adds(network: Network) -> int:
    """Of one forward pass of one sample: every weight once per position where it is used."""
    return sum(
        bundle.pattern.count(network.groups[bundle.source].shape, network.groups[bundle.target].shape)
        for bundle in network.bundles.values()
    )


# ---- the experiment -------------------------------------------------------------------------------------------

TASKS: dict[str, Task] = {
    "20:10:10": Task((20, 10, 10)),
    "10:10:10": Task((10, 10, 10)),
    "100:50:10": Task((100, 50, 10), units=5, every=500, after=1000),
    "convolutional": Task((10, 10, 10), "conv", samples=250),
    "batch norm": Task((20, 10, 10), "norm"),
}
Arm = tuple[str, bool]  # method, signs
MOST = 5  # seeds of what no bound is set for
LARGE = ("small", "big", "random", "random fan-out", "gradmax")  # of the two tasks whose steps are slow
BOUNDED: dict[str, tuple[Arm, ...]] = {
    "20:10:10": tuple((m, False) for m in LARGE) + (("gradmax", True),),
    "10:10:10": (("small", False), ("random", False), ("gradmax", True)),
}


def arms(task: str, full: bool) -> list[Arm]:
    """What runs on a task: every method, and without signs as well where there are signs to choose."""
    few = task in ("100:50:10", "convolutional") and not full
    names = LARGE if few else tuple(METHODS)
    return [(m, False) for m in names] + [(m, True) for m in names if m in SIGNED and (full or m == "gradmax")]


def name_of(arm: Arm) -> str:
    return f"{arm[0]} + signs" if arm[1] else arm[0]


def run(setting: Setting) -> Findings:
    """Every task with every method; the bounded ones with all seeds, the others with five (all, if full)."""
    calls = []
    for task in TASKS:
        for arm in arms(task, setting.full):
            many = setting.full or arm in BOUNDED.get(task, ())
            calls += [(task, arm, seed) for seed in (setting.seeds if many else setting.seeds[:MOST])]
    done = setting.each(run_one, [(arm[0], TASKS[task], seed, arm[1]) for task, arm, seed in calls], "students")
    runs: dict[str, dict[str, list[Run]]] = {}
    for (task, arm, _), found in zip(calls, done, strict=True):
        runs.setdefault(task, {}).setdefault(name_of(arm), []).append(found)
    finals = {task: {name: [r.final for r in rs] for name, rs in by.items()} for task, by in runs.items()}
    findings = Findings(_claims(finals, runs), ("task", "method", "runs", "median", "lowest", "highest", "cost of big"))
    for task, by in runs.items():
        big = by["big"][0].multiply_adds
        for name, rs in by.items():
            losses = sorted(r.final for r in rs)
            cost = rs[0].multiply_adds / big
            findings.rows.append((task, name, len(rs), median(losses), losses[0], losses[-1], cost))
    findings.data = {
        "final": finals,
        "steps": {task: by["big"][0].steps for task, by in runs.items()},
        "median": {t: {n: _curve(rs) for n, rs in by.items()} for t, by in runs.items()},
        "refused": {t: {n: sum(len(r.notes) for r in rs) for n, rs in by.items()} for t, by in runs.items()},
    }
    findings.timings = {
        t: {n: [median(r.seconds_training for r in rs), median(r.seconds_growing for r in rs)] for n, rs in by.items()}
        for t, by in runs.items()
    }
    findings.figures = _pictures(setting.out, runs)
    findings.notes = _notes(runs)
    return findings


def _curve(runs: Sequence[Run]) -> list[float]:
    return [float(f"{median(c):.5g}") for c in zip(*(r.losses for r in runs), strict=True)]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Seed by seed, as far as both have run."""
    return [a / max(b, 1e-300) for a, b in zip(above, below, strict=False)]


TITLES = {
    "small": "Small",
    "big": "Big",
    "random": "Random",
    "random fan-out": "the paper's Random",
    "gradmax": "GradMax",
    "gradmax + signs": "GradMax with signs",
    "gradmax-opt": "GradMaxOpt",
}
BELOW = (  # name, task, loss of one / of the other, whose claim, on which side of 1, in the paper
    ("square-small", "10:10:10", "small", "random", "measured independently", ">", ""),
    ("square-random", "10:10:10", "random", "gradmax + signs", "measured independently", ">", ""),
    ("figure-3a", "20:10:10", "gradmax", "random fan-out", "figure 3a", "<", "GradMax is lower"),
    ("figure-3a-big", "20:10:10", "big", "gradmax", "figure 3a", "<", "Big is lower"),
    ("figure-3a-big-signs", "20:10:10", "big", "gradmax + signs", "figure 3a", "<",
     "Big is lower (no sign choice there)"),
    ("gradmax-opt", "20:10:10", "gradmax-opt", "gradmax", "figure 3", ">", "GradMax is lower"),
    ("figure-3b", "100:50:10", "gradmax", "random fan-out", "figure 3b", "<", "GradMax is lower"),
    ("figure-3b-big", "100:50:10", "gradmax", "big", "figure 3b", "<=", "GradMax matches Big"),
    ("figure-10", "convolutional", "gradmax", "random fan-out", "figure 10", "<", "GradMax is lower"),
    ("figure-12", "batch norm", "gradmax", "random fan-out", "figure 12", "<", "GradMax is lower"),
    ("figure-13a", "20:10:10", "all-zero", "gradmax", "figure 13a", ">", "GradMax is lower"),
)  # fmt: skip
BOUNDS = (  # of losses on 20:10:10
    ("gradmax", "gradmax", "<=", 0.25),
    ("gradmax-signs", "gradmax + signs", "<=", 0.05),
    ("random-below", "random", "<=", 0.45),
    ("random-above", "random", ">=", 0.2),
    ("small", "small", ">", 1.0),
)
SAME = "for one unit our ascent ends at the singular vector itself, with either sign: only the sign differs"


def _claims(finals: dict[str, dict[str, list[float]]], runs: dict[str, dict[str, list[Run]]]) -> list[Claim]:
    issue, task = "measured independently", "20:10:10"
    dense = finals[task]
    of_medians = median(dense["gradmax"]) / median(dense["gradmax + signs"])
    cost = runs[task]["gradmax"][0].multiply_adds / runs[task]["big"][0].multiply_adds
    many = [claim(n, f"{task}: loss of {TITLES[arm]}", issue, dense[arm], way, at) for n, arm, way, at in BOUNDS]
    signs = ratios(dense["gradmax"], dense["gradmax + signs"])
    text = f"{task}: loss of GradMax / GradMax with signs"
    many.append(claim("signs", text, issue, signs, ">=", 4.0, note=f"the ratio of the medians is {of_medians:.3g}"))
    for name, task, above, below, source, way, paper in BELOW:
        text = f"{task}: loss of {TITLES.get(above, above)} / {TITLES[below]}"
        whose = f"GradMax, {source}" if source.startswith("figure") else source
        note = SAME if above == "gradmax-opt" else ""
        found = ratios(finals[task][above], finals[task][below])
        many.append(claim(name, text, whose, found, way, 1.0, paper=paper, note=note))
    text = "20:10:10: multiply-adds of the grown student / Big"
    note = "75 % is the mean width while it grows; with the 500 steps at full width that follow it is 80 %"
    return [*many, claim("cost", text, "GradMax, section 4.1", cost, "<=", 0.75, paper="75 %", note=note)]


def _notes(runs: dict[str, dict[str, list[Run]]]) -> list[str]:
    found = []
    for task, by in runs.items():
        for name, rs in by.items():
            refused = sum(len(r.notes) for r in rs)
            if refused:
                growths = len(rs) * TASKS[task].growths
                reason = next(n for r in rs for n in r.notes).partition("no growth: ")[2]
                found.append(f"{task}, {name}: {refused} of {growths} growths refused ({reason})")
    found.append("batch norm, all-zero: a bias in front of a batch norm is taken away again, so its units never learn")
    found.append("convolutional: 5x5 images with 3x3 filters; the paper does not give its sizes")
    return found


def _pictures(out: Path, runs: dict[str, dict[str, list[Run]]]) -> dict[str, str]:
    from irgrow.experiments import pictures

    found = {}
    for number, tasks in enumerate((("20:10:10", "10:10:10", "100:50:10"), ("convolutional", "batch norm")), 1):
        shown = [
            (task, {n: (rs[0].steps, [[max(v, 1e-6) for v in r.losses] for r in rs]) for n, rs in runs[task].items()})
            for task in tasks
        ]
        pictures.lines(out / f"curves-{number}.png", shown, x="step", y="training loss", log=True)
        found[f"curves-{number}.png"] = f"Training loss ({', '.join(tasks)}): medians, and the middle half of the seeds"
    for task in ("20:10:10", "10:10:10"):
        name = f"final-{task.split(':')[0]}.png"
        heights = {n: [max(r.final, 1e-6) for r in rs] for n, rs in runs[task].items()}
        pictures.bars(out / name, f"{task}, every seed", heights, x="final training loss", log=True)
        found[name] = f"Training loss at the end, {task}"
    return found
