"""Firefly, section 2.4 and algorithm 2: task after task on one master network, and nothing forgotten.

Two sequences on scikit-learn's digits: five tasks of two classes each, and ten tasks that see all ten classes
through permuted pixels. Beside the paper's `Individual` (a network of its own for every task) stands the control of
forgetting: one network trained on the tasks in turn, with a head per task.

`full`: CIFAR-100 split at random into ten tasks of ten classes and twenty of five, three splits in the paper, learned
by a thin VGG-16 without dense layers; 15 new candidates per layer, at most 256 units per task, 100 epochs behind a
growth. Not stated: how thin (an eighth of the width; `Individual` has all of it), the accuracy at which a task counts
as solved (0.95), the epochs of the mask (50), batch size and rate (32, 0.01 as below), augmentation (none). Our
candidates are ranked by their gradient, where the paper first trains all of them for 50 epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import digits, images
from irgrow.experiments.claims import claim
from irgrow.experiments.pictures import lines
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.continual import Continual
from irgrow.ir.builder import Builder, mlp
from irgrow.ir.network import Network
from irgrow.runtime.model import compile

Data = tuple[Tensor, Tensor]
SOURCE = "Firefly, table 2 and figure 5"


VGG16 = (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8), (1, 3, 6, 9, 12)  # widths / 64, and the layers with a pool behind


@dataclass(frozen=True)
class Sequence:
    """So many tasks of so many classes; how wide the network begins and what one that learns alone has.

    hidden, alone: hidden units on digits, channels of the first layer on images
    """

    tasks: int
    classes: int
    hidden: int
    alone: int
    target: float
    budget: int
    data: str = "digits"
    epochs: int = 12  # behind a growth; the other two ways train for twice as many
    masks: int = 12  # epochs that masks are trained
    candidates: int = 8

    def network(self, width: int, image: tuple[int, ...], seed: int) -> Network:
        """What begins, or learns alone."""
        if self.data == "digits":
            return mlp([*image, width, self.classes], seed=seed)
        layers = images.Layers(image, seed=seed)
        images.vgg(layers, [width * factor for factor in VGG16[0]], VGG16[1])
        return layers.done(self.classes)


SEQUENCES = {
    "five pairs": Sequence(5, 2, 4, 8, 0.98, 8),
    "ten permutations": Sequence(10, 10, 12, 24, 0.95, 12),
}
FULL = {
    "10-way CIFAR-100": Sequence(10, 10, 8, 64, 0.95, 256, "CIFAR100", 100, 50, 15),
    "20-way CIFAR-100": Sequence(20, 5, 8, 64, 0.95, 256, "CIFAR100", 100, 50, 15),
}
PRINTED = {"20-way CIFAR-100": ("+2.18", "98.7")}  # accuracy and size against Individual, table 2


@dataclass
class Result:
    """One sequence: accuracies [after task][of task], parameters after every task, and what was forgotten."""

    sequence: str
    seed: int
    method: str
    accuracies: list[list[float]] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    changed: int = 0  # outputs of earlier tasks that are not bit-equal, over all later tasks

    @property
    def averages(self) -> list[float]:
        """Average accuracy over the tasks seen so far, in percent."""
        return [100 * sum(row) / len(row) for row in self.accuracies]

    @property
    def forgotten(self) -> float:
        """How far the accuracy of a task fell from when it was learned to the end: the average over tasks, points."""
        last = self.accuracies[-1]
        return 100 * sum(self.accuracies[t][t] - last[t] for t in range(len(last))) / len(last)


def run(setting: Setting, sequences: dict[str, Sequence] | None = None) -> Findings:
    """Three ways through every sequence, for every seed."""
    sequences = sequences or (FULL if setting.full else SEQUENCES)
    for sequence in sequences.values():
        load(sequence.data)  # MissingData before anything is trained
    calls = [
        (name, sequence, seed, method)
        for name, sequence in sequences.items()
        for seed in setting.seeds
        for method in ("firefly", "individual", "one network in turn")
    ]
    found: dict[tuple[str, str], list[Result]] = {}
    for result in setting.each(learned, calls, "sequences"):
        found.setdefault((result.sequence, result.method), []).append(result)
    findings = Findings(columns=("sequence", "method", "accuracy %", "parameters", "forgotten (points)"))
    panels = []
    for name in sequences:
        better, smaller = PRINTED.get(name, ("", ""))
        ours, alone, turn = (found[name, m] for m in ("firefly", "individual", "one network in turn"))
        findings.claims += [
            claim(
                f"forgetting, {name}",
                f"{name}: outputs of old tasks that changed in any bit",
                SOURCE,
                float(sum(r.changed for r in ours)),
                "==",
                0.0,
                paper="none",
            ),
            claim(
                f"accuracy, {name}",
                f"{name}: average accuracy against a network per task (points)",
                SOURCE,
                [a.averages[-1] - b.averages[-1] for a, b in zip(ours, alone, strict=True)],
                ">=",
                -1.0,
                paper=better,
            ),
            claim(
                f"size, {name}",
                f"{name}: fewer parameters than a network per task: ratio",
                SOURCE,
                [b.parameters[-1] / a.parameters[-1] for a, b in zip(ours, alone, strict=True)],
                ">",
                1.0,
                paper=smaller,
            ),
            claim(
                f"control, {name}",
                f"{name}: one network trained in turn forgets (points)",
                "control",
                [r.forgotten for r in turn],
                ">",
                5.0,
            ),
        ]
        curves = {}
        for method, results in (("Firefly", ours), ("a network per task", alone), ("one network in turn", turn)):
            middle = sorted(results, key=lambda r: r.averages[-1])[len(results) // 2]
            findings.rows.append(
                (name, method, middle.averages[-1], middle.parameters[-1], max(r.forgotten for r in results))
            )
            count = len(middle.averages)
            curves[method] = (list(range(1, count + 1)), [r.averages for r in results])
            findings.data[f"{name}, {method}"] = {
                "averages": [r.averages for r in results],
                "parameters": [r.parameters for r in results],
                "forgotten": [r.forgotten for r in results],
            }
        panels.append((name, curves))
    picture = setting.out / "accuracy.png"
    lines(picture, panels, x="tasks learned", y="average accuracy over seen tasks (%)")
    findings.figures[picture.name] = "average accuracy over the tasks seen so far"
    return findings


def load(name: str) -> tuple[Data, Data]:
    """Training and test data: digits as rows of pixels, or images."""
    return digits.load() if name == "digits" else images.load(name=name)


def tasks_of(sequence: Sequence, seed: int) -> list[tuple[Data, Data]]:
    """Training and test data per task: the classes that the seed's order gives it, or all, with its own pixel order."""
    parts = load(sequence.data)
    draw = torch.Generator().manual_seed(seed)
    found = []
    total = int(parts[0][1].max()) + 1
    order = torch.randperm(total, generator=draw)
    for task in range(sequence.tasks):
        shuffle = torch.randperm(parts[0][0][0].numel(), generator=draw)
        if sequence.classes == total:
            train, test = ((x[:, shuffle], y) for x, y in parts)
        else:
            mine = order[sequence.classes * task : sequence.classes * (task + 1)]
            number = torch.full((total,), -1)
            number[mine] = torch.arange(len(mine))
            train, test = ((x[number[y] >= 0], number[y][number[y] >= 0]) for x, y in parts)
        found.append((train, test))
    return found


def learned(name: str, sequence: Sequence, seed: int, method: str) -> Result:
    """One sequence learned in one way."""
    data = tasks_of(sequence, seed)
    image = tuple(data[0][0][0].shape[1:])
    result = Result(name, seed, method)
    epochs = 2 * sequence.epochs
    if method == "firefly":
        _firefly(sequence, data, seed, result)
    elif method == "individual":
        own: list[float] = []
        total = 0
        for task, (train, test) in enumerate(data):
            network = sequence.network(sequence.alone, image, 100 * seed + task)
            own.append(_trained(network, [(train, test)], 0, seed, epochs)[1][0])
            total += network.counts.parameters
            result.accuracies.append(list(own))
            result.parameters.append(total)
    else:
        network = _many_heads(sequence, image, len(data), seed)
        for task in range(len(data)):
            network, reached = _trained(network, data[: task + 1], task, seed, epochs)
            result.accuracies.append(reached)
            result.parameters.append(network.counts.parameters)
    return result


def _firefly(sequence: Sequence, data: list[tuple[Data, Data]], seed: int, result: Result) -> None:
    learner = Continual(sequence.network(sequence.hidden, tuple(data[0][0][0].shape[1:]), seed), seed=seed)
    seen: list[Tensor] = []
    for task, (train, _) in enumerate(data):
        learner.learn(
            f"task{task}",
            train,
            target=sequence.target,
            budget=sequence.budget,
            candidates=sequence.candidates,
            epochs=sequence.epochs,
            mask_epochs=sequence.masks,
        )
        with torch.no_grad():
            now = [learner.model(f"task{t}")(data[t][1][0]) for t in range(task + 1)]
        result.changed += sum(not torch.equal(a, b) for a, b in zip(seen, now, strict=False))
        seen = now
        hits = [(out.argmax(1) == data[t][1][1]).float().mean() for t, out in enumerate(now)]
        result.accuracies.append([float(h) for h in hits])
        result.parameters.append(learner.network.counts.parameters)


def _many_heads(sequence: Sequence, image: tuple[int, ...], tasks: int, seed: int) -> Network:
    """As wide as one that learns alone, and a head per task."""
    builder = Builder(seed=seed)
    if sequence.data == "digits":
        last = builder.input("input", image)
        builder.group("hidden", sequence.alone, activation="relu", bias=True)
        builder.connect(last, "hidden")
        last = "hidden"
    else:
        layers = images.Layers(image, seed=seed)
        images.vgg(layers, [sequence.alone * factor for factor in VGG16[0]], VGG16[1])
        builder, last = layers.builder, layers.last
    for task in range(tasks):
        builder.output(f"task{task}", sequence.classes, bias=True)
        builder.connect(last, f"task{task}")
    return builder.build()


def _trained(
    network: Network, data: list[tuple[Data, Data]], head: int, seed: int, epochs: int
) -> tuple[Network, list[float]]:
    """The network trained on the last task of `data` through output `head`; test accuracies of all of them."""
    model = compile(network)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    draw = torch.Generator().manual_seed(seed)
    x, y = data[-1][0]

    def outputs(inputs: Tensor, which: int) -> Tensor:
        found = model(inputs)
        return found[which] if isinstance(found, tuple) else found

    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=draw).split(32):
            optimizer.zero_grad()
            F.cross_entropy(outputs(x[index], head), y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        hits = [(outputs(test[0], t).argmax(1) == test[1]).float().mean() for t, (_, test) in enumerate(data)]
    return model.network(), [float(h) for h in hits]
