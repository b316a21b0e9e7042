"""Firefly, section 3 and appendix B.3, small: a cell found by growing the operations on its edges.

A cell has seven nodes: two inputs, four sums, and the concatenation of the sums. Every pair of an input or sum and a
later sum is joined by operations, each

    depthwise convolution (3x3, dilated or not) -> 1x1 convolution with ReLU, which grows -> 1x1 convolution

Cells are stacked, the middle one halves the image, and grow in turn: every unit may split, new ones may come, a
quarter stays. Afterwards an edge keeps its widest operation, or becomes the identity if all of them grew by less than
20 %. The cell found is trained from scratch beside cells with random choices: the control the paper's table has.

`full`: CIFAR-10. The search has five cells, the second and fourth halve the image, and half of the training images:
operations of 4-8-8-16-16 channels summed as 16-32-32-64-64, as many new candidates as channels, 10 growths 10 epochs
apart, candidates trained for 5. What is found fills 20 cells (1-6, 7, 8-13, 14, 15-20), trained for DARTS's 600 epochs.
Left out of DARTS's setting: its second head, dropped paths, cutout and augmentation. Its optimizer is replaced by Adam
at 3e-3; of "SepConv and DilConv of different sizes" it has 3x3 and 5x5. The final channels, 40 at first "to match the
model size", are 40-40-80-80-160 here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from irgrow.experiments import images
from irgrow.experiments.claims import claim
from irgrow.experiments.images import Counted
from irgrow.experiments.pictures import bars
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.firefly import Firefly
from irgrow.ir.builder import Builder
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Identity
from irgrow.runtime.model import compile

NODES = 4
IDENTITY = "identity"
RATE, SHARE, GREW = 3e-3, 0.25, 0.2
Edge = tuple[int, int]
Choice = Mapping[Edge, str]


@dataclass(frozen=True)
class Plan:
    """The cells that are searched, one entry each, and how; then how often each is repeated in the last network."""

    data: str = "digits"
    channels: tuple[int, ...] = (4, 4, 4)  # of the sums
    widths: tuple[int, ...] = (3, 3, 3)  # of the operations at the start
    reduced: tuple[int, ...] = (1,)  # the cells that halve the image
    new: tuple[int, ...] = (1, 1, 1)  # candidates per operation
    kernels: tuple[int, ...] = (3,)
    rounds: int = 2  # times that every cell grows
    epochs: int = 1  # between growths
    steps: int | None = 10  # of training the candidates; None: five epochs
    batch_size: int = 64
    batches: int = 4  # that score the candidates
    samples: int = 640  # for the search
    repeats: tuple[int, ...] = (1, 1, 1)
    final_channels: tuple[int, ...] = (4, 4, 4)
    final_widths: tuple[int, ...] = (6, 6, 6)
    last: int = 6  # epochs of the final training
    controls: int = 3  # random choices beside each

    @property
    def operations(self) -> dict[str, tuple[int, int]]:
        """Kernel and dilation by name."""
        kinds = {"separable": 1, "dilated": 2}
        several = len(self.kernels) > 1
        return {f"{kind}{k if several else ''}": (k, d) for k in self.kernels for kind, d in kinds.items()}


FULL = Plan(
    "CIFAR10",
    channels=(16, 32, 32, 64, 64),
    widths=(4, 8, 8, 16, 16),
    reduced=(1, 3),
    new=(4, 8, 8, 16, 16),
    kernels=(3, 5),
    epochs=10,
    steps=None,
    samples=25_000,
    repeats=(6, 1, 6, 1, 6),
    final_channels=(40, 40, 80, 80, 160),
    final_widths=(10, 10, 20, 20, 40),
    last=600,
)


@dataclass(frozen=True)
class Found:
    """One search: the choices per cell, accuracies of the cell found and of random ones, how widths ended."""

    seed: int
    cells: list[dict[str, str]]
    accuracy: float
    random: list[float]
    parameters: int
    random_parameters: list[int]
    widths: list[dict[str, int]]
    seconds: float
    samples: int


def run(setting: Setting, plan: Plan | None = None) -> Findings:
    """A search per seed, and the training of what it found beside random cells."""
    plan = plan or (FULL if setting.full else Plan())
    images.load(name=plan.data)  # MissingData before anything is trained
    results = setting.each(search, [(seed, plan) for seed in setting.seeds], "searches")
    ahead = [100 * (r.accuracy - float(np.median(r.random))) for r in results]
    smaller = [float(np.median(r.random_parameters)) / r.parameters for r in results]
    named = (*plan.operations, IDENTITY)
    kinds = [kind for r in results for cell in r.cells for kind in cell.values()]
    findings = Findings(
        [
            claim(
                "random",
                "the cell found beats the median random cell (points of accuracy)",
                "Firefly, table 1",
                ahead,
                ">",
                0.0,
                paper="+0.5 (random search, CIFAR-10)",
                note="an edge that became the identity costs nothing; few did, so the cells found "
                "are larger than random ones, a third of whose edges are identities",
            ),
            claim("size", "and has fewer parameters: ratio", "control", smaller, ">", 1.0),
        ],
        ("seed", "cell found %", "random cells %", "parameters", "random (median)", " / ".join(named)),
        [
            (
                r.seed,
                100 * r.accuracy,
                ", ".join(f"{100 * a:.1f}" for a in r.random),
                r.parameters,
                int(np.median(r.random_parameters)),
                " / ".join(str(sum(kind == k for cell in r.cells for kind in cell.values())) for k in named),
            )
            for r in results
        ],
        {"cells": [r.cells for r in results], "widths": [r.widths for r in results], "kinds": kinds},
        timings={"search seconds": [r.seconds for r in results]},
    )
    picture = setting.out / "cells.png"
    bars(
        picture,
        f"{plan.data}: cells trained from scratch",
        {"found": [100 * r.accuracy for r in results], "random": [100 * a for r in results for a in r.random]},
        x="test accuracy (%)",
    )
    findings.figures[picture.name] = "accuracy of the cells found and of random ones"
    return findings


def edges() -> Iterator[Edge]:
    """Every edge of a cell: nodes 0 and 1 are its inputs, then come the sums."""
    for node in range(2, 2 + NODES):
        for source in range(node):
            yield source, node


def stack(plan: Plan, image: tuple[int, ...], seed: int, choices: Sequence[Choice] | None = None) -> Network:
    """Cells on top of each other, then the classes: with all operations, or (`choices`, per kind of cell) one per edge.

    With choices every cell is repeated and has its final sizes; only the first of those that halve the image does.
    """
    builder = Builder(seed=seed)
    before = last = (builder.input("input", image), image[1])
    number = 0
    for kind in range(len(plan.widths)):
        for again in range(1 if choices is None else plan.repeats[kind]):
            choice = None if choices is None else choices[kind]
            sizes = (plan.channels, plan.widths) if choices is None else (plan.final_channels, plan.final_widths)
            halved = kind in plan.reduced and not again
            cell = _Cell(builder, f"c{number}", sizes[0][kind], sizes[1][kind], plan, choice)
            before, last = last, cell.on((before, last), halved)
            number += 1
    builder.output("output", 10, bias=True)
    builder.connect(last[0], "output")
    return builder.build()


@dataclass(frozen=True)
class _Cell:
    """Adds one cell to a builder."""

    builder: Builder
    name: str
    channels: int
    width: int
    plan: Plan
    choice: Choice | None

    def on(self, ends: tuple[tuple[str, int], tuple[str, int]], halved: bool) -> tuple[str, int]:
        """The cell on top of two groups, each with the side of its images; its output, and the side of that."""
        builder, name, channels = self.builder, self.name, self.channels
        side = ends[1][1]
        size = side // 2 if halved else side
        nodes = []
        for number, (end, larger) in enumerate(ends):
            nodes.append(builder.group(f"{name}_in{number}", (channels, side, side)))
            builder.connect(end, nodes[-1], Conv2d((1, 1), (larger // side, larger // side)))
        for number in range(2, 2 + NODES):
            nodes.append(builder.group(f"{name}_sum{number}", (channels, size, size)))
        for source, target in edges():
            stride = 2 if halved and source < 2 else 1
            kinds = list(self.plan.operations) if self.choice is None else [self.choice[source, target]]
            for kind in kinds:
                self._operation(f"{name}_{source}{target}", nodes[source], nodes[target], size, kind, stride)
        out = f"{name}_out"
        builder.group(out, (NODES * channels, size, size))
        for number in range(NODES):
            builder.connect(nodes[2 + number], out, Identity(number * channels))
        return out, size

    def _operation(self, name: str, source: str, target: str, size: int, kind: str, stride: int) -> None:
        builder = self.builder
        if kind == IDENTITY:
            pattern = Identity() if stride == 1 else Conv2d((1, 1), (stride, stride))
            builder.connect(source, target, pattern, name=f"{name}_identity")
            return
        kernel, dilation = self.plan.operations[kind]
        padding = dilation * (kernel // 2)
        depthwise = Conv2d((kernel, kernel), (stride, stride), (padding, padding), (dilation, dilation), self.channels)
        builder.group(f"{name}_{kind}_deep", (self.channels, size, size))
        builder.connect(source, f"{name}_{kind}_deep", depthwise)
        builder.group(f"{name}_{kind}", (self.width, size, size), activation="relu", bias=True)
        builder.connect(f"{name}_{kind}_deep", f"{name}_{kind}", Conv2d((1, 1)))
        builder.connect(f"{name}_{kind}", target, Conv2d((1, 1)))


def search(seed: int, plan: Plan) -> Found:
    """Grows the cells in turn, chooses, and trains what was chosen beside random choices."""
    (x, y), test = images.load(name=plan.data)
    image = tuple(x.shape[1:])
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: plan.samples]
    data = (x[chosen], y[chosen])
    model = compile(stack(plan, image, seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    counted, begun = Counted(), perf_counter()
    cells = len(plan.widths)
    steps = 5 * math.ceil(len(data[1]) / plan.batch_size) if plan.steps is None else plan.steps
    for step in range(plan.rounds * cells):
        images.train(model, optimizer, data, plan.epochs, draw)
        network = model.network()
        sites = list(_growing(plan, step % cells))
        units = math.ceil(SHARE * sum(network.groups[s].units for s in sites))
        how = Firefly(
            units - 1,
            new=plan.new[step % cells],
            rule="authors",
            steps=steps,
            seed=1000 * seed + step,
            batch_size=plan.batch_size,
            batches=plan.batches,
        )
        try:
            model.grow(how.select(model, data, counted, sites=sites)(network), optimizer)
        except Refused:
            continue
    seconds = perf_counter() - begun
    widths = [_widths(plan, model.structure, cell) for cell in range(cells)]
    choices = [choose(plan, w, plan.widths[cell]) for cell, w in enumerate(widths)]
    random = np.random.default_rng(seed)
    kinds = (*plan.operations, IDENTITY)
    others = [[{e: str(random.choice(kinds)) for e in edges()} for _ in range(cells)] for _ in range(plan.controls)]
    trained = [_final(plan, c, seed, (x, y), test) for c in (choices, *others)]
    return Found(
        seed,
        [{f"{a}->{b}": kind for (a, b), kind in choice.items()} for choice in choices],
        trained[0][0],
        [accuracy for accuracy, _ in trained[1:]],
        trained[0][1],
        [parameters for _, parameters in trained[1:]],
        [{f"{a}->{b} {kind}": units for (a, b, kind), units in w.items()} for w in widths],
        seconds,
        counted.samples,
    )


def choose(plan: Plan, widths: Mapping[tuple[int, int, str], int], start: int) -> dict[Edge, str]:
    """Per edge its widest operation (the first of equals), or the identity where all grew by less than 20 %."""
    found = {}
    for source, target in edges():
        best = max(plan.operations, key=lambda kind: widths[source, target, kind])
        grew = widths[source, target, best] / start - 1
        found[source, target] = best if grew >= GREW else IDENTITY
    return found


def _growing(plan: Plan, cell: int) -> Iterator[str]:
    for source, target in edges():
        for kind in plan.operations:
            yield f"c{cell}_{source}{target}_{kind}"


def _widths(plan: Plan, network: Network, cell: int) -> dict[tuple[int, int, str], int]:
    return {
        (source, target, kind): network.groups[f"c{cell}_{source}{target}_{kind}"].units
        for source, target in edges()
        for kind in plan.operations
    }


def _final(plan: Plan, choices: Sequence[Choice], seed: int, data: images.Data, test: images.Data) -> tuple[float, int]:
    """Test accuracy and parameters of the network with these cells, trained from scratch."""
    model = compile(stack(plan, tuple(data[0].shape[1:]), seed, choices))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    images.train(model, optimizer, data, plan.last, torch.Generator().manual_seed(seed))
    return images.score(model, test), model.structure.counts.parameters
