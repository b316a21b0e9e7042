"""The main job on scikit-learn's digits: grow from 4 to 36 hidden units while training, beside GroMo and fixed nets.

Everybody gets the same data, initial weights, order of samples, batches, epochs, loss, optimizer and schedule:
those of irgrow.experiments.digits. One torch thread for all (such small products are slower on two). GroMo's
optimizer is made anew after a growth, because its parameters are; see gromo_side.py.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

import irgrow as ig
from bench import gromo_side, suite
from bench.suite import Made, Missing, Row, op
from bench.timing import quantile

OURS = ("tiny", "gradmax", "random")
# Method, and how GroMo's statistics read the data: in training batches, as its tutorials do, or in one batch, which
# is the cheapest way.
GROMO = (("tiny", False), ("tiny", True), ("tiny + dW", True), ("gradmax", False), ("gradmax", True))
Data = tuple[Tensor, Tensor]
Grow = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """One run of one contestant."""

    who: str
    seed: int
    accuracy: float  # on the held-out quarter, after the last epoch
    parameters: int
    training_s: float
    growing_s: float
    growths: int
    epochs: int

    @property
    def job_s(self) -> float:
        return self.training_s + self.growing_s

    @property
    def growth_in_epochs(self) -> float:
        """What one growth costs, in epochs of the same run."""
        return math.nan if not self.growths else self.growing_s / self.growths / (self.training_s / self.epochs)


@op("digits", cases=[{"seeds": 5, "epochs": 60, "growths": 8}], tiny={"seeds": 1, "epochs": 3, "growths": 1})
def digits(*, seeds: int, epochs: int, growths: int, device: str) -> Made:
    """The growth job on digits: accuracy, time in training and growing, the cost of a growth; beside GroMo.

    Ratios are times of the whole job (training and growing), the opponent's over ours, seed by seed; the notes and
    bench/results/digits.md hold accuracies.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        outcomes = _outcomes(seeds, epochs, growths)
    finally:
        torch.set_num_threads(threads)
    full = (seeds, epochs, growths) == (5, 60, 8)
    if full:
        write(outcomes)
    runs = _by_contestant(outcomes)
    rivals = [who for who in runs if who.startswith("GroMo")]
    tiny = runs["irgrow tiny"]
    # The best GroMo is the one with the best median accuracy: the job is to learn the digits.
    if rivals:
        best = max(rivals, key=lambda who: median(one.accuracy for one in runs[who]))
        for who in dict.fromkeys((rivals[0], best)):  # as its tutorials do, and the best there is
            yield _row("tiny, the whole job", tiny, runs[who], lambda one: one.job_s)
            yield _row("tiny, its growths", tiny, runs[who], lambda one: one.growing_s)
            yield _row("tiny, errors on held-out data", tiny, runs[who], _error)
    else:
        yield Row("tiny beside GroMo", state=suite.SKIPPED, note="needs gromo: pip install gromo")
    for who in [*(who for who in runs if who.endswith("fixed")), *(f"irgrow {how}" for how in OURS[1:])]:
        yield _row("tiny, errors on held-out data", tiny, runs[who], _error)


def _row(case: str, ours: Sequence[Outcome], theirs: Sequence[Outcome], of: Callable[[Outcome], float]) -> Row:
    ratios = [of(b) / of(a) for a, b in zip(ours, theirs, strict=True)]
    timed = "error" not in case
    return Row(
        case,
        opponent=theirs[0].who,
        ratio=median(ratios),
        low=quantile(ratios, 0.1),
        high=quantile(ratios, 0.9),
        ours_ms=1e3 * median(of(one) for one in ours) if timed else None,
        theirs_ms=1e3 * median(of(one) for one in theirs) if timed else None,
        pairs=len(ratios),
        note=f"accuracy {_percent(ours)} against {_percent(theirs)}",
    )


def _error(one: Outcome) -> float:
    return max(1 - one.accuracy, 1e-9)


def _percent(runs: Sequence[Outcome]) -> str:
    return f"{100 * median(one.accuracy for one in runs):.1f} %"


# --- contestants ----------------------------------------------------------------------------------------------


def _outcomes(seeds: int, epochs: int, growths: int) -> list[Outcome]:
    from irgrow.experiments.digits import Config, load

    data = load()
    config = replace(Config(), epochs=epochs, growths=growths)
    outcomes: list[Outcome] = []
    skipped: set[str] = set()
    for seed in range(seeds):  # seed by seed, so that what disturbs the machine disturbs all
        config = replace(config, seed=seed)
        for how in OURS:
            outcomes.append(_ours(config, how, data))
        for method, whole in GROMO:
            try:
                outcomes.append(_gromo(config, method, whole, data))
            except Missing as missing:
                skipped.add(str(missing))
        for hidden in (config.hidden, config.hidden + growths * config.units):
            outcomes.append(_fixed(config, hidden, data))
    for text in skipped:
        print(f"digits: {text}; measured without it")
    return outcomes


def _ours(config: Any, how: str, data: tuple[Data, Data]) -> Outcome:
    from irgrow.experiments import digits as experiment

    result = experiment.run(replace(config, how=how), data)
    return Outcome(
        f"irgrow {how}",
        config.seed,
        result.accuracy,
        result.parameters,
        result.seconds_training,
        result.seconds_growing,
        sum(event["event"] == "growth" for event in result.events),
        config.epochs,
    )


def _fixed(config: Any, hidden: int, data: tuple[Data, Data]) -> Outcome:
    weights, biases = _start(hidden, config.seed)
    layers = nn.Linear(64, hidden), nn.Linear(hidden, 10)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    with torch.no_grad():
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return _train(f"64-{hidden}-10, fixed", model, config, data, None, 0)


def _gromo(config: Any, method: str, whole: bool, data: tuple[Data, Data]) -> Outcome:
    from irgrow.experiments.digits import SMOOTHING

    model = gromo_side.mlp([64, config.hidden, 10], method)
    gromo_side.copy_weights(model, *_start(config.hidden, config.seed))
    loss = gromo_side.cross_entropy(SMOOTHING)
    x, y = data[0]
    size = len(y) if whole else config.batch_size
    batches = list(zip(x.split(size), y.split(size), strict=True))

    def grow() -> None:
        gromo_side.grow(model, 0, batches, batches, loss, units=config.units, method=method)

    who = f"GroMo {method}, {'one batch' if whole else f'batches of {size}'}"
    return _train(who, model, config, data, grow, config.every)


def _start(hidden: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The weights and biases that everybody starts from."""
    tensors = ig.mlp([64, hidden, 10], activation="relu", seed=seed).tensors()
    kinds = {kind: [t for name, t in tensors.items() if name.startswith(kind)] for kind in ("weight.", "bias.")}
    return kinds["weight."], kinds["bias."]


def _train(who: str, model: nn.Module, config: Any, data: tuple[Data, Data], grow: Grow | None, every: int) -> Outcome:
    """What irgrow.fit does, for any module: the same order of samples, steps and growths."""
    from irgrow.experiments.digits import criterion

    (x, y), (x_test, y_test) = data
    draw = torch.Generator().manual_seed(config.seed)
    optimizer = _optimizer(model, config)
    training_s = growing_s = 0.0
    growths = 0
    for epoch in range(config.epochs):
        for group in optimizer.param_groups:  # CosineAnnealingLR in closed form: it survives a new optimizer
            group["lr"] = config.learning_rate * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
        begun = time.perf_counter()
        model.train()
        total = torch.zeros(())
        order = torch.randperm(len(y), generator=draw)
        for first in range(0, len(order), config.batch_size):
            index = order[first : first + config.batch_size]
            optimizer.zero_grad()
            loss = criterion(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            total += loss.detach()
        training_s += time.perf_counter() - begun
        if grow is not None and growths < config.growths and (epoch + 1) % every == 0 and epoch + 1 < config.epochs:
            begun = time.perf_counter()
            grow()
            optimizer = _optimizer(model, config)
            growing_s += time.perf_counter() - begun
            growths += 1
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Outcome(who, config.seed, accuracy, parameters, training_s, growing_s, growths, config.epochs)


def _optimizer(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


# --- the table ------------------------------------------------------------------------------------------------


def _by_contestant(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    runs: dict[str, list[Outcome]] = {}
    for one in outcomes:
        runs.setdefault(one.who, []).append(one)
    return runs


def write(outcomes: Sequence[Outcome]) -> None:
    """bench/results/digits.json holds every run, digits.md the table."""
    suite.RESULTS.mkdir(exist_ok=True)
    machine = suite.machine()
    runs = [{**asdict(one), "job_s": one.job_s} for one in outcomes]
    text = json.dumps({"machine": machine, "runs": runs}, indent=1)
    (suite.RESULTS / "digits.json").write_text(text + "\n", encoding="utf-8")
    (suite.RESULTS / "digits.md").write_text(table(outcomes, machine), encoding="utf-8")


def table(outcomes: Sequence[Outcome], machine: str) -> str:
    """Medians over seeds, with the lowest and the highest, as Markdown."""
    runs = _by_contestant(outcomes)
    seeds = len(next(iter(runs.values())))
    lines = [
        "| | test accuracy | training | growing | one growth | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for who, mine in runs.items():
        accuracy = _spread([100 * one.accuracy for one in mine], "{:.1f}", " %")
        training = _spread([one.training_s for one in mine], "{:.2f}", " s")
        growing, each = "", ""
        if mine[0].growths:
            growing = _spread([1e3 * one.growing_s for one in mine], "{:.0f}", " ms")
            each = f"{median(one.growth_in_epochs for one in mine):.2f} epochs"
        parameters = f"{round(mean(one.parameters for one in mine)):,}"
        lines.append(f"| {who} | {accuracy} | {training} | {growing} | {each} | {parameters} |")
    lines += ["", f"Medians of {seeds} seeds (lowest to highest). {machine}, here with one thread.", ""]
    return "\n".join(lines)


def _spread(values: Sequence[float], form: str, unit: str) -> str:
    low, middle, high = (form.format(v) for v in (min(values), median(values), max(values)))
    return f"{middle}{unit} ({low} to {high})"
