"""`compare`: growth methods on one task at equal parameters and equal multiply-adds, with the controls.

    found = ig.compare([ig.Tiny(4), ig.GradMax(4), ig.Random(4)], lambda seed: ig.mlp([64, 4, 10], seed=seed),
                       (x, y), test=(x_test, y_test), seeds=20)
    print(found)                     # one row per method and control: medians over seeds, and where they lie
    found.save("compare.json")
    found.plot("compare.png")

Every method starts from the same network, grows to the same widths, and may spend the same number of
multiply-adds. Two controls run beside them, which papers on growing tend to leave out:

    from scratch        the grown graph with fresh weights from the start: is growing better than not having to?
    without growing     the small network trained on: is it the growing, or the training that goes on meanwhile?
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments.claims import Claim, claim, median_interval
from irgrow.experiments.reproduce import Setting, markdown
from irgrow.growth.data import Batch, Data, Loss, as_inputs, batches, is_pair, take
from irgrow.growth.fit import accuracy
from irgrow.growth.methods import Method, NeedsModel
from irgrow.growth.methods.with_model import propose
from irgrow.growth.probe import evaluating, probe
from irgrow.growth.refine import refine
from irgrow.growth.selection import Selects
from irgrow.ir.errors import BadData, BadFile, Refused, UnknownName
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Dense
from irgrow.ir.site import Site
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork, compile

How = Method | NeedsModel | Selects
SCRATCH, STAYING = "from scratch", "without growing"
PASSES = 3  # of a training step: forward, and the gradients of activations and of weights


@dataclass(frozen=True)
class Outcome:
    """One run: what it reached, and what it spent.

    curve       (multiply-adds spent, training loss averaged since the last point)
    multiply_adds   of training steps, plus `growing`, those of statistics, proposals and their refinement
    """

    arm: str
    seed: int
    parameters: int
    widths: dict[str, int]
    steps: int
    multiply_adds: int
    growing: int
    train_loss: float
    test_loss: float | None
    accuracy: float | None
    curve: list[tuple[float, float]]
    seconds: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data without times: equal for equal runs."""
        held = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seconds"}
        return {**held, "curve": [list(p) for p in self.curve], "notes": list(self.notes)}


@dataclass(frozen=True)
class Plan:
    """What all runs share; see `compare`."""

    network: Network | Callable[[int], Network]
    data: Batch
    test: Batch | None
    loss: Loss
    growths: int
    budget: int
    until: float
    batch_size: int
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    sites: tuple[str, ...]
    widths: dict[str, int]
    signs: bool
    samples: int

    def start(self, seed: int) -> Network:
        """The network that the seed's runs begin with."""
        return redrawn(self.network, seed) if isinstance(self.network, Network) else self.network(seed)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: every run of every arm; `str` is a table."""

    outcomes: dict[str, list[Outcome]]
    budget: int
    parameters: int
    seeds: int

    @property
    def measure(self) -> str:
        """What arms are compared by: `accuracy` or `test loss` on the test data, else `train loss`."""
        first = next(iter(self.outcomes.values()))[0]
        return (
            "accuracy" if first.accuracy is not None else "test loss" if first.test_loss is not None else "train loss"
        )

    def values(self, arm: str, measure: str | None = None) -> list[float]:
        """That measure of every seed."""
        name = (measure or self.measure).replace(" ", "_")
        return [float(getattr(o, name)) for o in self.outcomes[arm]]

    def against(self, arm: str, other: str = SCRATCH, measure: str | None = None) -> list[float]:
        """By how much an arm is better, seed by seed: more accuracy, less loss."""
        sign = 1.0 if (measure or self.measure) == "accuracy" else -1.0
        return [sign * (a - b) for a, b in zip(self.values(arm, measure), self.values(other, measure), strict=True)]

    def claims(self) -> list[Claim]:
        """For every method: is it better than either control?"""
        grown = [arm for arm in self.outcomes if arm not in (SCRATCH, STAYING)]
        return [
            claim(
                f"{arm}, {control}",
                f"{arm} has a better {self.measure} than {control}",
                "compare",
                self.against(arm, control),
                ">",
                0.0,
            )
            for arm in grown
            for control in (SCRATCH, STAYING)
        ]

    @property
    def columns(self) -> tuple[str, ...]:
        shown = [] if self.measure == "train loss" else [self.measure]
        return ("method", "parameters", "steps", *shown, "train loss", "better than scratch", "than staying small")

    def rows(self) -> list[tuple[Any, ...]]:
        """One per arm, best first: medians and where they lie (90 %), and in how many seeds it beats each control."""
        best = sorted(self.outcomes, key=lambda arm: median(self.values(arm)), reverse=self.measure == "accuracy")
        measures = dict.fromkeys((self.measure, "train loss"))
        return [
            (
                arm,
                int(median(o.parameters for o in self.outcomes[arm])),
                int(median(o.steps for o in self.outcomes[arm])),
                *(_spread(self.values(arm, m)) for m in measures),
                *(_wins(self.against(arm, control)) if arm != control else "" for control in (SCRATCH, STAYING)),
            )
            for arm in best
        ]

    @property
    def notes(self) -> list[str]:
        """Growths that were refused and runs that stayed smaller than the others, by arm."""
        found = []
        for arm, runs in self.outcomes.items():
            texts = [note for run in runs for note in run.notes]
            if texts:
                found.append(f"{arm}: {len(texts)} notes, the first: {texts[0]}")
        return found

    def __str__(self) -> str:
        head = f"{self.seeds} seeds, {self.budget:.3g} multiply-adds each, grown to {self.parameters:,} parameters"
        return "\n".join([head, "", *markdown(self.columns, self.rows()), *[f"- {n}" for n in self.notes]])

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the same for the same seeds, machine and thread count, but `timings` (seconds per run)."""
        return {
            "seeds": self.seeds,
            "budget": self.budget,
            "parameters": self.parameters,
            "measure": self.measure,
            "claims": [c.as_dict() for c in self.claims()],
            "runs": {arm: [o.as_dict() for o in runs] for arm, runs in self.outcomes.items()},
            "timings": {arm: [o.seconds for o in runs] for arm, runs in self.outcomes.items()},
        }

    def save(self, path: str | Path) -> None:
        """`path` is the comparison as JSON; BadFile if it cannot be written."""
        try:
            Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        except OSError as error:
            raise BadFile(f"comparison {path}", error.strerror, "a file that can be written") from error

    def plot(self, path: str | Path) -> None:
        """`path` (.png, .svg, .pdf) is a picture: training loss over multiply-adds, and where every seed ended."""
        from irgrow.experiments import pictures

        figure, (left, right) = pictures.panel_row(2)
        for number, (arm, runs) in enumerate(self.outcomes.items()):
            color = pictures.COLORS[number % len(pictures.COLORS)]
            style = "--" if arm in (SCRATCH, STAYING) else "-"
            points = list(zip(*(run.curve for run in runs), strict=False))
            across = [median(p[0] for p in at) for at in points]
            left.plot(across, [median(p[1] for p in at) for at in points], style, color=color, label=arm, linewidth=1.6)
            values = self.values(arm)
            right.plot(values, [number] * len(values), "o", color=color, markersize=4, alpha=0.5)
            right.plot([median(values)] * 2, [number - 0.3, number + 0.3], color=color, linewidth=2.4)
        right.set_yticks(range(len(self.outcomes)), list(self.outcomes), fontsize=8)
        right.invert_yaxis()
        pictures.finish(left, "Training", "multiply-adds spent", "training loss (median)", log=True)
        pictures.finish(right, f"At the end, {self.seeds} seeds (bars: medians)", self.measure, "", legend=False)
        try:
            pictures.save(figure, Path(path))
        except OSError as error:
            raise BadFile(f"drawing to {path}", error.strerror, "a file that can be written") from error
        except ValueError as error:
            raise BadFile(f"drawing to {path}", str(error), "a name that ends in .png, .svg or .pdf") from None


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Adam with the learning rate 0.01, the default of `compare`."""
    return torch.optim.Adam(parameters, lr=0.01)


def compare(
    methods: Sequence[How] | Mapping[str, How],
    network: Network | Callable[[int], Network],
    data: Data,
    *,
    seeds: int | Sequence[int] = 20,
    budget: float | None = None,
    growths: int = 8,
    until: float = 0.5,
    test: Data | None = None,
    loss: Loss | None = None,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = adam,
    batch_size: int = 64,
    sites: Sequence[str] | None = None,
    signs: bool = True,
    samples: int = 1024,
    progress: bool = True,
    workers: int = 1,
) -> Comparison:
    """Every method and both controls have run from every seed, at equal parameters and equal multiply-adds.

    methods     values such as Tiny(4), also those that need a model or choose splits themselves (Firefly: networks
                with one site); a mapping gives them names. A `seed` field is set from the run's seed.
    network     where all begin: a function of the seed, or a Network, whose weights are drawn anew for every seed
    budget      multiply-adds that each run may spend, in all: one per weight, use, sample and pass, three passes per
                training step; what a growth takes (statistics, proposal, refinement) is counted too. Default: that
                of 30 epochs of the grown network. Small networks get more steps for it, dear methods fewer.
    growths     each adds `method.units` units to every site (default sites: all); they come evenly, the last when
                `until` of the budget is spent; all methods must add as many. What a method could not add (rank,
                refusals) it may add later, until training ends; what is still missing then is in `notes`.
    loss        default: cross entropy for whole-number targets, mean square otherwise; a mean over samples
    optimizer   a function of parameters; its learning rates follow a cosine down to 0 as the budget is spent
    signs       each pair's sign, and the amplitude of pairs that are not silent, are refined on held-back samples
    samples     how many training samples statistics are taken over, at most (and as many for refinement)
    workers     processes; results do not depend on how many. With more than one everything given must be picklable

    Multiply-adds of growths are counted by torch's counter of matrix products and convolutions, which does not see
    walks over explicit edges. Equal seeds, machine and thread count give equal results.
    Raises Refused for no or equally named methods and for methods that add different numbers of units, BadData.
    """
    named = _named(methods)
    train = _pair(data, "compare: data")
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers or growths < 1 or not 0 < until <= 1:
        raise Refused(
            "compare", f"{len(numbers)} seeds, {growths} growths, until {until}", "1 or more, 1 or more, (0, 1]"
        )
    units = {name: how.units for name, how in named.items()}  # type: ignore[union-attr]
    if len(set(units.values())) > 1:
        listed = ", ".join(f"{name} {n}" for name, n in units.items())
        raise Refused("compare: units per growth", listed, "the same number", do="give every method as many units")
    first = network if isinstance(network, Network) else network(numbers[0])
    where = tuple(site.name for site in Site.all(first)) if sites is None else tuple(sites)
    if not where:
        raise Refused("compare: network", "no site that can grow", "at least one hidden group")
    for name, how in named.items():
        if isinstance(how, Selects) and len(where) > 1:
            raise Refused(f"compare: {name}", f"{len(where)} sites", "one: this method chooses sites itself")
    per = next(iter(units.values()))
    widths = {name: first.groups[Site.of(first, name).name].units + growths * per for name in where}
    grown = _widened(first, widths)
    steps = 30 * math.ceil(len(train[1]) / batch_size)
    spend = PASSES * grown.counts.multiply_adds * min(batch_size, len(train[1])) * steps if budget is None else budget
    least = PASSES * first.counts.multiply_adds * batch_size * growths
    if not spend >= least:
        raise Refused("compare: budget", f"{spend:.3g}", f"at least {least:.3g}, one step for every growth")
    criterion = loss or (F.mse_loss if train[1].is_floating_point() else F.cross_entropy)
    held = None if test is None else _pair(test, "compare: test")
    plan = Plan(
        network,
        train,
        held,
        criterion,
        growths,
        int(spend),
        until,
        batch_size,
        optimizer,
        where,
        widths,
        signs,
        samples,
    )
    arms: dict[str, How | None] = {**named, SCRATCH: None, STAYING: None}
    calls = [(plan, name, how, seed) for name, how in arms.items() for seed in numbers]
    threads = torch.get_num_threads()
    try:
        runs = Setting(numbers, Path(), progress=progress, workers=workers).each(run_arm, calls, "compare")
    finally:
        torch.set_num_threads(threads)
    found: dict[str, list[Outcome]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return Comparison(found, int(spend), grown.counts.parameters, len(numbers))


def run_arm(plan: Plan, arm: str, how: How | None, seed: int) -> Outcome:
    """One run of one arm."""
    begun = time.perf_counter()
    network = plan.start(seed)
    if arm == SCRATCH:
        network = redrawn(_widened(network, plan.widths), seed + 1_000_003)
    return _Arm(plan, arm, how, seed, compile(network)).run(begun)


@dataclass
class _Arm:
    plan: Plan
    arm: str
    how: How | None
    seed: int
    model: CompiledNetwork
    spent: int = 0
    growing: int = 0
    steps: int = 0
    grown: int = 0
    notes: list[str] = field(default_factory=list)

    def run(self, begun: float) -> Outcome:
        plan, (inputs, targets) = self.plan, (as_inputs(self.plan.data[0], "compare"), self.plan.data[1])
        self.draw = torch.Generator().manual_seed(self.seed)
        self.optimizer = plan.optimizer(self.model.parameters())
        rates = [group["lr"] for group in self.optimizer.param_groups]
        curve: list[tuple[float, float]] = []
        total, count, due, apart = 0.0, 0, 0.0, plan.budget / 60
        order: list[Tensor] = []
        self.model.train()
        while True:
            self._maybe_grow()
            order = order or list(torch.randperm(len(targets), generator=self.draw).split(plan.batch_size))
            index = order.pop(0)
            cost = PASSES * self.model.structure.counts.multiply_adds * len(index)
            if self.spent + cost > plan.budget:
                break
            for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * self.spent / plan.budget))
            self.optimizer.zero_grad()
            value = plan.loss(self.model(*(x[index] for x in inputs)), targets[index])
            value.backward()
            self.optimizer.step()
            self.spent += cost
            self.steps += 1
            total, count = total + value.item(), count + 1
            if self.spent >= due + apart:
                curve.append((float(self.spent), total / count))
                total, count, due = 0.0, 0, float(self.spent)
        return self._outcome(curve, begun)

    # ---- growing ------------------------------------------------------------------------------------------

    def _maybe_grow(self) -> None:
        plan = self.plan
        missing = {n: w - self.model.structure.groups[n].units for n, w in plan.widths.items()}
        if self.how is None or not any(m > 0 for m in missing.values()):
            return
        if self.spent < plan.until * plan.budget * (self.grown + 1) / plan.growths:
            return
        self.grown += 1
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        with counter:
            for site, units in missing.items():
                if units > 0:
                    try:
                        self._grow(site, min(units, self.how.units))  # type: ignore[union-attr]
                    except Refused as refused:
                        self.notes.append(f"step {self.steps}: no growth: {refused}")
        self.model.train()
        self.growing += counter.get_total_flops() // 2
        self.spent += counter.get_total_flops() // 2

    def _grow(self, site: str, units: int) -> None:
        plan, model = self.plan, self.model
        inputs, targets = as_inputs(plan.data[0], "compare"), plan.data[1]
        order = torch.randperm(len(targets), generator=self.draw)
        held = min(plan.samples, len(targets) // 4)
        seen, unseen = (
            take(inputs, targets, order[held : held + plan.samples]),
            take(inputs, targets, order[:held]),
        )
        assert self.how is not None
        how: Any = seeded(self.how, 1000 * self.seed + self.grown, units)
        if isinstance(how, Selects):
            model.grow(how.select(model, seen, plan.loss, sites=[site])(model.structure), self.optimizer)
            return
        taps = getattr(how, "taps", "full")
        statistics = probe(model, seen, plan.loss, sites=[site], want=how.needs, taps=taps)[site]
        proposal = propose(how, statistics, model, seen, plan.loss)
        if plan.signs and held:
            with evaluating(model):
                proposal = refine(proposal, model, unseen, plan.loss)
        model.grow(AddUnits(proposal)(model.structure), self.optimizer)

    # ---- the end ------------------------------------------------------------------------------------------

    def _outcome(self, curve: list[tuple[float, float]], begun: float) -> Outcome:
        plan, network = self.plan, self.model.structure
        widths = {n: network.groups[n].units for n in plan.widths}
        if self.how is not None and widths != plan.widths:
            short = ", ".join(f"{n} {widths[n]} of {w} units" for n, w in plan.widths.items() if widths[n] != w)
            self.notes.append(f"not grown to the end: {short}")
        test = plan.test
        return Outcome(
            self.arm,
            self.seed,
            network.counts.parameters,
            widths,
            self.steps,
            self.spent,
            self.growing,
            mean_loss(self.model, plan.data, plan.loss),
            None if test is None else mean_loss(self.model, test, plan.loss),
            None if test is None else accuracy(self.model, test),
            curve,
            time.perf_counter() - begun,
            tuple(self.notes),
        )


def mean_loss(model: CompiledNetwork, data: Batch, loss: Loss) -> float:
    """The mean loss over samples, in eval mode."""
    total = 0.0
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches(data, 4096, "compare"):
            total += float(loss(model(*inputs), targets)) * len(targets)
    return total / len(data[1])


def redrawn(network: Network, seed: int) -> Network:
    """The same graph with fresh weights, as Builder draws them; norms are as new, fixed weights stay."""
    draw = torch.Generator().manual_seed(seed)
    tensors, trained = {}, set(network.trainable())
    bounds: dict[str, float] = {}
    for bundle in network.bundles.values():
        source, target = network.shapes(bundle)
        if isinstance(bundle.pattern, (Dense, Conv2d)):
            fan_in = math.prod(bundle.weight.shape[1:])
        else:
            fan_in = max(1, round(bundle.pattern.count(source, target) / math.prod(target)))
        bound = 1 / math.sqrt(fan_in)
        bounds.setdefault(f"bias.{bundle.target}", bound)
        if bundle.tensor in trained and bundle.weight.dim():
            used = bundle.weight != 0 if bundle.pattern.__class__.__name__ == "Local2d" else 1
            tensors[bundle.tensor] = _uniform(bundle.weight, bound, draw) * used
    for name, tensor in network.tensors().items():
        kind = name.split(".")[0]
        if kind == "bias":
            tensors[name] = _uniform(tensor, bounds.get(name, 0.0), draw)
        elif kind in ("scale", "variance"):
            tensors[name] = torch.ones_like(tensor)
        elif kind in ("shift", "mean"):
            tensors[name] = torch.zeros_like(tensor)
    return network.with_tensors(tensors)


def seeded(how: How, seed: int, units: int) -> How:
    """The method with that seed (if it has one) and so many units."""
    if not is_dataclass(how):
        return how
    names = {f.name for f in fields(how)}
    given = {"seed": seed, "units": units}
    return replace(how, **{k: v for k, v in given.items() if k in names})


def title(how: How) -> str:
    """The method as one would write it: `Tiny(4, joint=True)`."""
    if not is_dataclass(how):
        return type(how).__name__
    changed = [f for f in fields(how) if f.name not in ("units", "seed") and getattr(how, f.name) != f.default]
    options = [f"{f.name}={getattr(how, f.name)!r}" for f in changed]
    return f"{type(how).__name__}({', '.join([str(how.units), *options])})"


def _named(methods: Sequence[How] | Mapping[str, How]) -> dict[str, How]:
    pairs = list(methods.items()) if isinstance(methods, Mapping) else [(title(how), how) for how in methods]
    names = [name for name, _ in pairs]
    twice = sorted({n for n in names if names.count(n) > 1} | ({SCRATCH, STAYING} & set(names)))
    if not pairs or twice:
        raise Refused(
            "compare: methods",
            f"{', '.join(twice)} twice" if twice else "none",
            "at least one, with names of their own" if not twice else "names of their own",
            do="give a mapping {name: method}" if twice else None,
        )
    for name, how in pairs:
        if not isinstance(how, (Method, NeedsModel, Selects)) or not isinstance(getattr(how, "units", None), int):
            raise UnknownName(f"compare: {name}", expected="a method with `units` such as Tiny(4)")
    return dict(pairs)


def _pair(data: Data, who: str) -> Batch:
    """`(inputs, targets)`; batches are put together."""
    if is_pair(data):
        found = data
    else:
        read = list(batches(data, None, who))
        if not read:
            raise BadData(who, "no samples", "at least one")
        found = tuple(torch.cat(x) for x in zip(*(i for i, _ in read), strict=True)), torch.cat([t for _, t in read])
    inputs = as_inputs(found[0], who)
    if not len(found[1]) or any(len(x) != len(found[1]) for x in inputs):
        sizes = ", ".join(str(len(x)) for x in inputs)
        raise BadData(who, f"{sizes} inputs and {len(found[1])} targets", "as many of both, at least one")
    return found


def _widened(network: Network, widths: Mapping[str, int]) -> Network:
    """The graph with these widths; new units are silent."""
    model = compile(network)
    for site, width in widths.items():
        missing = width - model.structure.groups[site].units
        if missing > 0:
            from irgrow.growth.methods import Random

            statistics = probe(model, [], lambda *_: torch.zeros(()), sites=[site], want=())[site]
            model.grow(AddUnits(Random(missing).propose(statistics))(model.structure))
    return model.network()


def _uniform(like: Tensor, bound: float, draw: torch.Generator) -> Tensor:
    drawn = 2 * torch.rand(like.shape, generator=draw, dtype=torch.float64) - 1
    return (bound * drawn).to(like.dtype).to(like.device)


def _spread(values: Sequence[float]) -> str:
    low, high = median_interval(sorted(values))
    return f"{median(values):.4g} ({low:.4g} to {high:.4g})"


def _wins(differences: Sequence[float]) -> str:
    return f"{sum(d > 0 for d in differences)} of {len(differences)}"
