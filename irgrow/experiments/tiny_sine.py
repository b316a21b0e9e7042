"""The sine task of TINY: where to grow, by its three strategies, without any gradient descent.

x ~ N(0, I_50), the class is argmax_k sin(k * sum x), k = 1..10. A 50-2-2-10 network gains one neuron at a time
(algorithms 1 and 2): the strategy names the layer, TINY the neuron, a line search on other samples its amplitude.

    growing alone       nothing else happens
    with sweeps         after every neuron each layer's best update dW*, at the amplitude of a line search
    sweeps only         the controls: as many sweeps on the network that begins, and on the graph that Naive grows,
                        with fresh weights

As printed, the sum has the variance 50: the classes change dozens of times over the data, and their correlation with
any polynomial of x of low degree is of order e^-25, so that first-order methods cannot see the rule and what is left
is to memorise. Beside it stands the same task with the sum scaled to variance 1, where there is a rule to find.

`full`: 60 neurons and 10,000 samples; the paper states neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.compare import redrawn
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.candidates import Candidates
from irgrow.growth.fit import accuracy
from irgrow.growth.methods import Tiny
from irgrow.growth.probe import probe
from irgrow.growth.refine import line_search, refine
from irgrow.growth.where import AmplitudeFactor, MaxEigenValue, Naive, Where
from irgrow.ir.builder import mlp
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.kernels.whiten import pseudo_solve
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork, compile

STRATEGIES: dict[str, Where] = {
    "Naive": Naive(),
    "MaxEigenValue": MaxEigenValue(),
    "AmplitudeFactor": AmplitudeFactor(),
}
ALONE, SWEEPS = "growing alone", "with sweeps"
SMALL, LARGE = "sweeps only, small", "sweeps only, from scratch"
LIMIT = 100.0  # u: the largest amplitude that is tried
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    inputs: int = 50
    classes: int = 10
    widths: tuple[int, ...] = (2, 2)
    neurons: int = 30
    train: int = 1000
    variance: float = 50.0  # of the sum of an input
    activation: str = "tanh"

    def draw(self, seed: int, samples: int | None = None) -> Batch:
        """Training data, or so many samples."""
        return draw(samples or self.train, inputs=self.inputs, classes=self.classes, variance=self.variance, seed=seed)


@dataclass
class Run:
    """After every neuron (and its sweep): parameters, training loss, test accuracy; the layers that grew."""

    parameters: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    memorised: float = 0.0  # training accuracy at the end
    sites: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def draw(samples: int, *, inputs: int = 50, classes: int = 10, variance: float | None = None, seed: int) -> Batch:
    """Inputs `[samples, inputs]` in float64, and their classes (k - 1); `variance` of the sum, default `inputs`."""
    x = torch.randn(samples, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = torch.arange(1, classes + 1, dtype=torch.float64)
    scale = 1.0 if variance is None else math.sqrt(variance / inputs)
    return x, torch.sin(k * scale * x.sum(1, keepdim=True)).argmax(1)


def start(size: Size, seed: int) -> Network:
    """The thin network that grows, in float64."""
    widths = [size.inputs, *size.widths, size.classes]
    return mlp(widths, activation=size.activation, seed=seed, dtype=torch.float64)


def run_one(strategy: str, mode: str, seed: int, size: Size = Size()) -> Run:
    """One network; deterministic. For the controls `strategy` says which graph is drawn anew."""
    train, held, test = (size.draw(10 * seed + at, n) for at, n in enumerate((None, size.train // 2, 2000)))
    network = start(size, seed)
    sites = [g for g in network.groups if network.is_hidden(g)]
    if mode == LARGE:
        each = size.neurons // len(sites)  # as Naive grows it
        widths = [size.inputs, *(w + each for w in size.widths), size.classes]
        network = redrawn(mlp(widths, activation=size.activation, dtype=torch.float64), seed + 500)
    model, found = compile(network), Run()
    for step in range(size.neurons):
        if mode in (ALONE, SWEEPS):
            try:
                found.sites.append(grow(model, STRATEGIES[strategy], sites, step, train, held))
            except Refused as refused:
                found.notes.append(f"neuron {step + 1}: {refused}")
        if mode != ALONE:
            sweep(model, train, held)
        with torch.no_grad():
            found.losses.append(float(F.cross_entropy(model(train[0]), train[1])))
        found.parameters.append(model.structure.counts.parameters)
        found.accuracies.append(accuracy(model, test) or 0.0)
    found.memorised = accuracy(model, train) or 0.0
    return found


def grow(model: CompiledNetwork, where: Where, sites: list[str], growths: int, train: Batch, held: Batch) -> str:
    """The model has one neuron more; the name of the layer that has it. Refused where none can grow."""

    def measure(names: Iterable[str]) -> dict[str, Proposal | Refused]:
        how = Tiny(1)
        found: dict[str, Proposal | Refused] = {}
        for name, statistics in probe(model, train, F.cross_entropy, sites=names, want=how.needs).items():
            try:
                found[name] = refine(how.propose(statistics), model, held, F.cross_entropy, limit=LIMIT)
            except Refused as refused:
                found[name] = refused
        return found

    candidates = Candidates(tuple(sites), model.structure, growths, measure)
    (site,) = where.choose(candidates)
    model.grow(AddUnits(candidates[site])(model.structure))
    return site


def sweep(model: CompiledNetwork, train: Batch, held: Batch) -> None:
    """Every layer, from first to last, has moved by its best update at its best amplitude (0 if none helps)."""
    network = model.structure
    for group in network.groups:
        if group not in network.inputs:
            moves = best_update(model, train, group)
            tensors = {name: model.tensors()[name] for name in moves}
            before = {name: tensor.detach().clone() for name, tensor in tensors.items()}

            def at(gamma: float) -> float:
                with torch.no_grad():
                    for name, tensor in tensors.items():  # noqa: B023
                        tensor.copy_(before[name] + gamma * moves[name])  # noqa: B023
                    return float(F.cross_entropy(model(held[0]), held[1]))

            gamma, after = line_search(at, LIMIT, 3)
            at(gamma if after < at(0.0) else 0.0)


def best_update(model: CompiledNetwork, data: Batch, group: str) -> dict[str, Tensor]:
    """dW* of everything that feeds the group, by tensor: what moves its pre-activations closest to -g.

    -M^T S_in^+ with S_in = E[c c^T], M = E[c g^T], c the features that feed it and a constant 1 for its bias.
    """
    network, (x, y) = model.structure, data
    feeding = network.entering(group)
    shift = torch.zeros(len(y), network.groups[group].units, dtype=x.dtype, requires_grad=True)
    outputs, values = model.record(x, values=[b.source for b in feeding], shifts={group: shift})
    assert isinstance(outputs, Tensor)
    (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, y), shift)
    parts = [values[b.source].detach() for b in feeding]
    if network.groups[group].bias is not None:
        parts.append(x.new_ones(len(y), 1))
    c, g = torch.cat(parts, 1), gradient * len(y)
    move = -pseudo_solve(c.mT @ c / len(y), c.mT @ g / len(y)).solution.mT
    found, first = {}, 0
    for bundle, part in zip(feeding, parts, strict=False):
        found[bundle.tensor] = move[:, first : first + part.shape[1]]
        first += part.shape[1]
    if network.groups[group].bias is not None:
        found[f"bias.{group}"] = move[:, -1]
    return found


# ---- the experiment -------------------------------------------------------------------------------------------


PRINTED, SCALED = "as printed", "variance 1"


def sizes(full: bool = False) -> dict[str, Size]:
    """The two tasks; `full`: more neurons and samples."""
    more = {"neurons": 60, "train": 10_000} if full else {}
    return {PRINTED: Size(**more), SCALED: Size(variance=1.0, **more)}  # type: ignore[arg-type]


def run(setting: Setting, given: dict[str, Size] | None = None) -> Findings:
    """Both tasks, three strategies in two modes, and the two controls."""
    arms = [(s, m) for m in (ALONE, SWEEPS) for s in STRATEGIES] + [("", SMALL), ("", LARGE)]
    tasks = given or sizes(setting.full)
    calls = [(*arm, seed, size) for size in tasks.values() for arm in arms for seed in setting.seeds]
    done = iter(setting.each(run_one, calls, "networks"))
    findings = Findings(
        columns=(
            "task",
            "strategy",
            "parameters",
            "training loss",
            "training accuracy",
            "test accuracy",
            "grown layers",
        )
    )
    for task, size in tasks.items():
        runs = {", ".join(filter(None, arm)): [next(done) for _ in setting.seeds] for arm in arms}
        most = [_majority(size, seed) for seed in setting.seeds]
        findings.claims += _claims(task, runs, most)
        findings.rows += [(task, name, *_row(rs)) for name, rs in runs.items()]
        findings.rows.append((task, "the most frequent class", 0, "", "", median(most), ""))
        findings.data[task] = {
            name: {
                "parameters": [r.parameters[-1] for r in rs],
                "losses": _short(r.losses for r in rs),
                "accuracy": _short(r.accuracies for r in rs),
                "training accuracy": [r.memorised for r in rs],
            }
            for name, rs in runs.items()
        }
        findings.notes += [f"{task}, {name}: {note}" for name, rs in runs.items() for note in rs[0].notes[:1]]
        findings.figures |= _pictures(setting, task, runs)
    return findings


def _row(runs: list[Run]) -> tuple[float | str, ...]:
    grown = {site: median(r.sites.count(site) for r in runs) for r in runs for site in r.sites}
    layers = ", ".join(f"{site} +{count:g}" for site, count in sorted(grown.items()))
    ends = [(r.parameters[-1], r.losses[-1], r.memorised, r.accuracies[-1]) for r in runs]
    return (*(median(column) for column in zip(*ends, strict=True)), layers)


def _short(runs: Iterable[list[float]]) -> list[list[float]]:
    return [[float(f"{v:.5g}") for v in run] for run in runs]


def _majority(size: Size, seed: int) -> float:
    """The accuracy of always saying the class that is most frequent in training."""
    train, test = size.draw(10 * seed)[1], size.draw(10 * seed + 2, 2000)[1]
    return float((test == train.bincount().argmax()).double().mean())


def _claims(task: str, runs: dict[str, list[Run]], most: list[float]) -> list[Claim]:
    source = "TINY, the sine task" if task == PRINTED else "the scaled sine task"

    def more(name: str, above: str, below: str, mode: str = "", whose: str = source) -> Claim:
        a, b = ([r.accuracies[-1] for r in runs[", ".join(filter(None, (n, mode)))]] for n in (above, below))
        text = f"{task}{', ' if mode else ''}{mode}: test accuracy of {above} - {below}"
        return claim(f"{task}-{name}", text, whose, [x - y for x, y in zip(a, b, strict=True)], ">", 0.0)

    best = f"AmplitudeFactor, {SWEEPS}"
    falls = [r.losses[-1] - r.losses[0] for r in runs[f"AmplitudeFactor, {ALONE}"]]
    ahead = [r.accuracies[-1] - m for r, m in zip(runs[best], most, strict=True)]
    invisible = (
        "at this variance the classes have practically no correlation with smooth features of x: see the summary"
    )
    note = invisible if task == PRINTED else ""
    return [
        claim(f"{task}-falls", f"{task}: growing alone lowers the training loss", source, falls, "<", 0.0),
        more("amplitude-alone", "AmplitudeFactor", "Naive", ALONE),
        more("eigen-alone", "MaxEigenValue", "Naive", ALONE),
        more("amplitude-sweeps", "AmplitudeFactor", "Naive", SWEEPS),
        more("eigen-sweeps", "MaxEigenValue", "Naive", SWEEPS),
        more("sweeps", best, f"AmplitudeFactor, {ALONE}"),
        more("staying", best, SMALL, whose="control"),
        more("scratch", f"Naive, {SWEEPS}", LARGE, whose="control"),
        claim(
            f"{task}-majority",
            f"{task}: test accuracy of {best} - the most frequent class",
            "control",
            ahead,
            ">",
            0.0,
            note=note,
        ),
    ]


def _pictures(setting: Setting, task: str, runs: dict[str, list[Run]]) -> dict[str, str]:
    from irgrow.experiments import pictures

    found = {}
    for key, what in (("accuracies", "test accuracy"), ("losses", "training loss")):
        steps = list(range(1, len(next(iter(runs.values()))[0].losses) + 1))
        shown = []
        for title, modes in ((ALONE, (ALONE,)), ("with sweeps, and sweeps only", (SWEEPS, SMALL, LARGE))):
            curves = {
                n.removesuffix(f", {modes[0]}"): (steps, [getattr(r, key) for r in rs])
                for n, rs in runs.items()
                if n.endswith(modes)
            }
            shown.append((f"{task}: {title}", curves))
        name = f"{what.split()[1]}-{task.split()[1]}.png"
        pictures.lines(setting.out / name, shown, x="neurons added (or sweeps)", y=what)
        found[name] = f"{task}, {what}: medians, and the middle half of the seeds"
    return found
