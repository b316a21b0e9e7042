"""Are insertion-grown networks flatter than fully connected ones, and is it the growing that makes them so?

    grown       starts without hidden neurons; neurons are inserted while it trains (Algorithm 1)
    a, b, c     fully connected, one to three hidden layers, as many parameters, trained from scratch
    scratch     the control the paper lacks: the grown network's final graph, trained from scratch

All are trained by plain SGD from U(-0.5, 0.5) without biases, ReLU, cross entropy, until the loss over the training
set falls to one target, and measured there. By default on scikit-learn's digits: 64 inputs carry the paper's budget
of I = nI + nO - nI nO / h parameters per neuron up to h = 64; its 500 of 784 become 40.

`full`: MNIST and AG News with the paper's sizes, batches, rates and insertions. It trains until all training samples
are right; here all stop at one loss. How AG News becomes an input is not stated (only that no pretrained embeddings are
used): here each of 1000 inputs says whether one of its words is there, words falling into inputs by their checksum.
Source: Caillon & Cerisara, Growing Neural Networks Achieve Flatter Minima, section 4.1.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.analysis import MEASURES, blocks, flatness
from irgrow.experiments import digits, full_data, pictures
from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.fit import accuracy
from irgrow.ir.builder import Builder, mlp
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.passes import InsertNeuron
from irgrow.runtime.model import CompiledNetwork, compile

SOURCE = "Caillon & Cerisara 2021, table 1a"
SHARES = {"a": (1.0,), "b": (0.8, 0.2), "c": (0.6, 0.3, 0.1)}  # of the hidden neurons, layer by layer
MEASURED = (*MEASURES, "whole")  # whole: D = ||theta||_F^2, a single block
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """One size of network and how it is trained; epochs as in the paper's insertion schemes."""

    data: str
    hidden: int
    insertions: tuple[tuple[int, int], ...]  # (epoch, neurons)
    fixed: tuple[str, ...]
    target: float  # of the training loss
    learning_rate: float
    batch_sizes: tuple[int, ...] = (10, 100)
    limit: int = 1000  # epochs
    measured_on: int = 2000  # training samples
    paper: tuple[str, ...] = ("", "")  # fixed / grown in the paper's table, per batch size

    @property
    def title(self) -> str:
        """How claims and tables name the network."""
        return f"{'' if self.data == 'digits' else f'{self.data}, '}{self.hidden} neurons"

    @property
    def tag(self) -> str:
        """The same as part of a name."""
        return f"{'' if self.data == 'digits' else f'{self.data}-'}{self.hidden}"


def small(every: int = 4) -> tuple[tuple[int, int], ...]:
    """One neuron every tenth of the training, from a twentieth on: ten in all."""
    return tuple((every // 2 + every * n, 1) for n in range(10))


def large(hidden: int, every: int = 4) -> tuple[tuple[int, int], ...]:
    """The paper's 50 neurons every 10 epochs from epoch 10 to 60 are 300, not 500: six equal parts instead."""
    return tuple((every * (n + 1), hidden * (n + 1) // 6 - hidden * n // 6) for n in range(6))


_MNIST = ("17.0", "2.8"), ("184 (231, 282)", "68 (68, 72)")  # least of a, b, c (and each)
_NEWS = ("8.0", "6.5"), ("5.7 (6.0, 12.3)", "1.9 (2.2, 2.3)")
DEFAULT = (
    Plan("digits", 10, small(), ("a",), 0.1, 0.1, paper=_MNIST[0]),
    Plan("digits", 40, large(40), ("a", "b", "c"), 0.05, 0.1, paper=_MNIST[1]),
)
FULL = (
    Plan("MNIST", 10, small(10), ("a",), 0.1, 1e-3, limit=400, measured_on=10_000, paper=_MNIST[0]),
    Plan("MNIST", 500, large(500, 10), ("a", "b", "c"), 0.05, 1e-3, limit=400, measured_on=10_000, paper=_MNIST[1]),
    Plan("AG News", 10, small(10), ("a",), 0.1, 1e-4, (1, 16), limit=400, measured_on=10_000, paper=_NEWS[0]),
    Plan("AG News", 100, tuple((epoch, 10) for epoch in range(5, 96, 10)), ("a", "b", "c"), 0.05, 1e-4, (1, 16),
         limit=400, measured_on=10_000, paper=_NEWS[1]),
)  # fmt: skip
WORDS = 1000  # inputs of AG News


def run(setting: Setting, plans: Sequence[Plan] | None = None) -> Findings:
    """Every network of every plan, seed and batch size, trained and measured."""
    plans = plans or (FULL if setting.full else DEFAULT)
    present, missing = full_data.those_present([plan.data for plan in plans], data_of)  # before anything is trained
    plans = [plan for plan in plans if plan.data in present]
    calls = [(plan, size, seed) for plan in plans for size in plan.batch_sizes for seed in setting.seeds]
    found = setting.each(one, calls, "networks")
    runs = [row for rows in found for row in rows]
    result = findings(setting, plans, runs)
    result.notes += missing
    return result


# ---- networks -------------------------------------------------------------------------------------------------


def budget(inputs: int, outputs: int, hidden: int) -> list[int]:
    """The parents of every inserted neuron, so that the grown network has the parameters of one hidden layer.

    I = nI + nO - nI nO / h; where that is no whole number, floor and ceiling alternate and the sum is exact.
    Refused where some I would be below 1 or above nI: no such network exists.
    """
    total = hidden * (inputs + outputs) - inputs * outputs
    parts = [total * (n + 1) // hidden - total * n // hidden for n in range(hidden)]
    if min(parts) < 1 or max(parts) > inputs:
        raise Refused(
            f"flatness: {hidden} inserted neurons between {inputs} and {outputs}",
            f"{min(parts)} to {max(parts)} parameters for each",
            f"1 to {inputs}, the number of inputs",
            do=f"use {inputs * outputs // (inputs + outputs) + 1} to {inputs} neurons",
        )
    return parts


def widths(parameters: int, inputs: int, outputs: int, hidden: int, shares: Sequence[float]) -> list[int]:
    """Widths near these shares of a number of neurons whose network, without biases, is nearest to `parameters`.

    Of all that are equally near, those closest to one factor times the shares.
    """
    ideal, low, high = 0.0, 0.0, 4.0 * hidden
    for _ in range(60):
        ideal = (low + high) / 2
        low, high = (
            (ideal, high) if _count([inputs, *(s * ideal for s in shares), outputs]) < parameters else (low, ideal)
        )
    choices = [range(max(1, math.floor(s * ideal) - 1), math.ceil(s * ideal) + 2) for s in shares]

    def distance(found: tuple[int, ...]) -> tuple[float, float]:
        off = abs(_count([inputs, *found, outputs]) - parameters)
        return off, sum((w - s * ideal) ** 2 for w, s in zip(found, shares, strict=True))

    return [inputs, *min(itertools.product(*choices), key=distance), outputs]


def _count(sizes: Sequence[float]) -> float:
    return sum(a * b for a, b in itertools.pairwise(sizes))


def bare(inputs: int, outputs: int, seed: int) -> Network:
    """Inputs and outputs, every pair joined."""
    builder = Builder()
    builder.input("input", inputs)
    builder.output("output", outputs)
    builder.connect("input", "output")
    return drawn(builder.build(), seed)


def drawn(network: Network, seed: int) -> Network:
    """The same graph with all weights uniform in [-0.5, 0.5]."""
    draw = torch.Generator().manual_seed(seed)
    return network.with_tensors({n: torch.rand(t.shape, generator=draw) - 0.5 for n, t in network.tensors().items()})


# ---- one seed -------------------------------------------------------------------------------------------------


@lru_cache(4)
def data_of(name: str) -> tuple[Split, Split]:
    """Flat images and labels, training and test."""
    if name == "digits":
        return digits.load()
    if name == "AG News":
        (texts, labels), (unseen, answers) = full_data.sentences("ag_news")
        return (words_in(texts), labels), (words_in(unseen), answers)
    train, test = full_data.images(name)
    return (train[0].flatten(1), train[1]), (test[0].flatten(1), test[1])


def words_in(texts: Sequence[str]) -> Tensor:
    """`[n, WORDS]` of 0 and 1: whether any word with that checksum (modulo WORDS) is in the text, in small letters."""
    found = torch.zeros(len(texts), WORDS)
    for row, text in zip(found, texts, strict=True):
        row[[zlib.crc32(word.encode()) % WORDS for word in re.findall(r"[a-z0-9]+", text.lower())]] = 1.0
    return found


def one(plan: Plan, batch_size: int, seed: int) -> list[dict[str, Any]]:
    """The grown network, the control, and the fixed ones: one row each."""
    train, test = data_of(plan.data)
    inputs, outputs = train[0].shape[1], int(train[1].max()) + 1
    parents = budget(inputs, outputs, plan.hidden)
    rows = []

    def measure(name: str, network: Network, insert: dict[int, list[InsertNeuron]] | None = None) -> Network:
        model = compile(network)
        epochs, curve = train_to(plan, model, train, batch_size, seed, insert or {})
        rows.append(
            {"size": plan.tag, "batch size": batch_size, "seed": seed, "network": name, "epochs": epochs}
            | {"parameters": model.structure.counts.parameters, "depth": model.structure.depth}
            | {"curve": curve, **measured(model, train, test, plan, reached=curve[-1] <= plan.target)}
        )
        return model.structure

    when = itertools.chain.from_iterable([epoch] * count for epoch, count in plan.insertions)
    insert: dict[int, list[InsertNeuron]] = {}
    for n, (epoch, count) in enumerate(zip(when, parents, strict=True)):
        insert.setdefault(epoch, []).append(InsertNeuron(count, seed=1000 * seed + n))
    final = measure("grown", bare(inputs, outputs, seed), insert)
    measure("scratch", drawn(final, seed))
    for name in plan.fixed:
        sizes = widths(final.counts.parameters, inputs, outputs, plan.hidden, SHARES[name])
        measure(name, drawn(mlp(sizes, bias=False), seed))
    return rows


def train_to(
    plan: Plan,
    model: CompiledNetwork,
    data: Split,
    batch_size: int,
    seed: int,
    insert: dict[int, list[InsertNeuron]],
) -> tuple[int, list[float]]:
    """The model as soon as, after all insertions, its loss over the training set is at most the target.

    It looks eight times an epoch once a mean loss came near. Returns the epochs begun and the loss in each (mean
    over its steps, but the last over the whole training set).
    """
    x, y = data
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.learning_rate)
    draw = torch.Generator().manual_seed(seed)
    curve: list[float] = []
    for epoch in range(1, plan.limit + 1):
        near = epoch > max(insert, default=0) and bool(curve) and curve[-1] < 2 * plan.target
        total = torch.zeros(())
        batches = torch.randperm(len(y), generator=draw).split(batch_size)
        for step, batch in enumerate(batches, 1):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
            if near and step % max(1, len(batches) // 8) == 0:
                with torch.no_grad():
                    now = float(F.cross_entropy(model(x), y))
                if now <= plan.target:
                    return epoch, [*curve, now]
        curve.append(float(total) / len(y))
        del loss
        for insertion in insert.get(epoch, ()):
            model.grow(insertion(model.structure), optimizer)
    with torch.no_grad():
        curve[-1] = float(F.cross_entropy(model(x), y))
    return plan.limit, curve


def measured(model: CompiledNetwork, train: Split, test: Split, plan: Plan, *, reached: bool) -> dict[str, Any]:
    """Accuracies, loss and flatness of a trained model; no flatness (None) where the target was not reached."""
    found = {"train accuracy": accuracy(model, train), "test accuracy": accuracy(model, test)}
    names = [name for name, _ in model.named_parameters()]
    of = blocks(model)
    found["blocks"] = len(torch.cat([of[n].reshape(-1) for n in names]).unique())
    if not reached:
        return found | dict.fromkeys(MEASURED)
    x, y = (t[: plan.measured_on] for t in train)
    exact = compile(model.network().to(torch.float64))
    values = flatness(exact, (x.double(), y), F.cross_entropy, batch_size=2000, tolerance=1e-5)
    norm = sum(float(p.detach().square().sum()) for p in exact.parameters())
    return found | {m: abs(v) for m, v in values.items()} | {"whole": abs(values["plain"]) * norm}


# ---- what was found -------------------------------------------------------------------------------------------


def findings(setting: Setting, plans: Sequence[Plan], runs: list[dict[str, Any]]) -> Findings:
    """Claims, table and pictures."""
    out = Findings(columns=("hidden", "batch", "network", "depth", "parameters", "blocks", "epochs", "loss",
                            "test accuracy", *MEASURED))  # fmt: skip

    def of(plan: Plan, size: int, name: str, value: str) -> list[float]:
        mine = [r for r in runs if (r["size"], r["batch size"], r["network"]) == (plan.tag, size, name)]
        return [math.nan if r[value] is None else float(r[value]) for r in mine]

    for row in runs:
        row["loss"] = row["curve"][-1]
    for plan in plans:
        for size in plan.batch_sizes:
            for name in ("grown", "scratch", *plan.fixed):
                columns = ("depth", "parameters", "blocks", "epochs", "loss", "test accuracy", *MEASURED)
                out.rows.append((plan.tag, size, name, *(median(of(plan, size, name, c)) for c in columns)))
    out.claims = claims(plans, of)
    out.data = {"runs": runs, "target": {p.tag: p.target for p in plans}}
    out.notes = [
        "Medians over seeds. Flatness: modulus of the largest eigenvalue of D^1/2 H D^1/2 over the training set, in "
        "float64, at the first epoch with a training loss of at most the target; large is sharp.",
        f"Target losses: {', '.join(f'{p.target:g} with {p.title}' for p in plans)}; learning rate "
        f"{', '.join(sorted({f'{p.learning_rate:g}' for p in plans}))} for both batch sizes.",
        "whole: one block, D = ||theta||^2; neuron rescaling changes it as it changes depth blocks.",
        "control: of the factor between fully connected and grown networks, what is left when the graph is the same. "
        "Where it is about 1, the graph is flat (as far as the measure goes), not the growing.",
        "depth blocks depends on the scale of single neurons and on how many blocks a graph has: pairs of depths are "
        "many in a grown network, and each block's norm is small. edge has neither weakness, whole not the second: "
        "where they order the networks otherwise, the paper's finding is one about its measure.",
        "The paper trains to 100 % training accuracy; here all networks stop at one loss, which the Hessian scales "
        "with. Its b and c have fewer parameters than a; here all have as many, within 1 %.",
    ]
    pictures.bars(
        setting.out / "flatness.png",
        f"Sharpness (depth blocks), {plans[-1].title}, batch {plans[-1].batch_sizes[0]}",
        {n: of(plans[-1], plans[-1].batch_sizes[0], n, "depth blocks") for n in ("grown", "scratch", *plans[-1].fixed)},
        x="largest eigenvalue",
        log=True,
    )
    _ratios(setting, plans, of)
    _curves(setting, plans, runs)
    out.figures = {
        "flatness.png": "sharpness of grown, control and fully connected networks",
        "ratios.png": "how much sharper than the grown network, by measure",
        "training.png": "training loss of one seed; thin lines: insertions, dotted: the target",
    }
    return out


def claims(plans: Sequence[Plan], of: Callable[[Plan, int, str, str], list[float]]) -> list[Claim]:
    """What the paper says, measured; and its control."""
    found = []

    def ratio(plan: Plan, size: int, other: str, measure: str) -> list[float]:
        pairs = zip(of(plan, size, other, measure), of(plan, size, "grown", measure), strict=True)
        return [a / b for a, b in pairs]

    for plan in plans:
        for j, size in enumerate(plan.batch_sizes):
            where = f"{plan.title}, batch {size}"
            tag = f"{plan.tag}-{size}"
            flattest = least(ratio(plan, size, n, "depth blocks") for n in plan.fixed)
            found.append(
                claim(
                    f"flatter-{tag}",
                    f"{where}: the flattest fully connected network is at least twice as sharp as the grown one "
                    "(depth blocks)",
                    SOURCE,
                    flattest,
                    ">=",
                    2.0,
                    paper=plan.paper[j],
                    note="at one training loss; the paper's networks were trained for equally many epochs"
                    if len(plan.fixed) > 1
                    else "",
                )
            )
            found.append(
                claim(
                    f"control-{tag}",
                    f"{where}: growing it makes a graph flatter than training it from scratch (sharpness of the "
                    "control / of the grown one, depth blocks)",
                    "control, not in the paper",
                    ratio(plan, size, "scratch", "depth blocks"),
                    ">",
                    1.0,
                )
            )
            for measure in ("edge", "whole"):
                found.append(
                    claim(
                        f"{measure}-{tag}",
                        f"{where}: the grown network is flatter than every fully connected one also by `{measure}`",
                        "invariance of the measure",
                        least(ratio(plan, size, n, measure) for n in plan.fixed),
                        ">",
                        1.0,
                    )
                )
    for plan in {plan.data: plan for plan in plans}.values():  # the last, largest of each data set
        found += _of_largest(plan, of)
    return found


PRINTED = {"AG News": ("54.9", "20.3", "+0.002")}  # sharper with the larger batch: grown, a; accuracy. Else MNIST's


def _of_largest(plan: Plan, of: Callable[[Plan, int, str, str], list[float]]) -> list[Claim]:
    low, high = plan.batch_sizes[0], plan.batch_sizes[-1]
    of_grown, of_a, of_accuracy = PRINTED.get(plan.data, ("40.2", "11.8", "+0.097"))
    lead = "" if plan.data == "digits" else f"{plan.data}-"
    found = []
    for name, printed in (("grown", of_grown), ("a", of_a)):
        pairs = zip(of(plan, high, name, "depth blocks"), of(plan, low, name, "depth blocks"), strict=True)
        text = f"{plan.title}, {name}: a batch of {high} ends sharper than one of {low} (ratio)"
        found.append(claim(f"{lead}batch-{name}", text, SOURCE, [a / b for a, b in pairs], ">", 1.0, paper=printed))
    rows = zip(*(of(plan, low, n, "test accuracy") for n in ("grown", *plan.fixed)), strict=True)
    better = [g - max(f) for g, *f in rows]
    text = f"{plan.title}, batch {low}: the grown network's test accuracy is above the best of the fully connected ones"
    return [*found, claim(f"{lead}accuracy", text, SOURCE, better, ">", 0.0, paper=of_accuracy)]


def least(ratios: Iterable[list[float]]) -> list[float]:
    """Per seed the smallest of several ratios; one that was not reached (nan) does not count."""
    return [min((v for v in values if not math.isnan(v)), default=math.nan) for values in zip(*ratios, strict=True)]


def _ratios(setting: Setting, plans: Sequence[Plan], of: Callable[[Plan, int, str, str], list[float]]) -> None:
    """Points: network / grown, by measure."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cells = [(plan, size) for plan in plans for size in plan.batch_sizes]
    figure, axes = pictures.panel_row(len(cells), columns=2)
    for ax, (plan, size) in zip(axes, cells, strict=True):
        names = ["scratch", *plan.fixed]
        for k, name in enumerate(names):
            for m, measure in enumerate(MEASURED):
                pairs = zip(of(plan, size, name, measure), of(plan, size, "grown", measure), strict=True)
                values = [a / b for a, b in pairs]
                at = m + (k - (len(names) - 1) / 2) * 0.18
                color = pictures.COLORS[k]
                ax.plot([at] * len(values), values, "o", color=color, markersize=3, alpha=0.6)
                ax.plot([at], [median(values)], "_", color=color, markersize=11, markeredgewidth=2,
                        label=name if m == 0 else None)  # fmt: skip
        ax.axhline(1.0, color=pictures.QUIET, linewidth=0.8)
        ax.set_xticks(range(len(MEASURED)), MEASURED, fontsize=8)
        pictures.finish(ax, f"{plan.title}, batch {size}", "measure", "sharpness / grown network's", log=True)
        ax.yaxis.set_major_locator(FixedLocator([2.0**n for n in range(-4, 7)]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    pictures.save(figure, setting.out / "ratios.png")


def _curves(setting: Setting, plans: Sequence[Plan], runs: list[dict[str, Any]]) -> None:
    """Training loss over epochs, first seed."""
    cells = [(plan, size) for plan in plans for size in plan.batch_sizes]
    figure, axes = pictures.panel_row(len(cells), columns=2)
    for ax, (plan, size) in zip(axes, cells, strict=True):
        for k, name in enumerate(("grown", "scratch", *plan.fixed)):
            curve = next(
                r["curve"] for r in runs if (r["size"], r["batch size"], r["network"]) == (plan.tag, size, name)
            )
            ax.plot(range(1, len(curve) + 1), curve, color=pictures.COLORS[k], label=name, linewidth=1.3)
        for epoch, _ in plan.insertions:
            ax.axvline(epoch, color="#d5d8dc", linewidth=0.7, zorder=0)
        ax.axhline(plan.target, color=pictures.QUIET, linewidth=0.8, linestyle=":")
        title = f"{plan.title}, batch {size}"
        pictures.finish(ax, title, "epoch", "training loss", log=True, log_x=True)
    pictures.save(figure, setting.out / "training.png")
