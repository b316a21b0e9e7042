"""Firefly, section 2.4 and algorithm 2: task after task on one master network, and nothing forgotten.

Two sequences on scikit-learn's digits: five tasks of two classes each, and ten tasks that see all ten classes
through permuted pixels. Beside the paper's `Individual` (a network of its own for every task) stands the control of
forgetting: one network trained on the tasks in turn, with a head per task.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import digits
from irgrow.experiments.claims import claim
from irgrow.experiments.pictures import lines
from irgrow.experiments.reproduce import Findings, MissingData, Setting
from irgrow.growth.continual import Continual
from irgrow.ir.builder import Builder, mlp
from irgrow.ir.network import Network
from irgrow.runtime.model import compile

Data = tuple[Tensor, Tensor]
SOURCE = "Firefly, table 2 and figure 5"


@dataclass(frozen=True)
class Sequence:
    """So many tasks of so many classes; how wide the network begins and what one that learns alone has."""

    tasks: int
    classes: int
    hidden: int
    alone: int
    target: float
    budget: int


SEQUENCES = {
    "five pairs": Sequence(5, 2, 4, 8, 0.98, 8),
    "ten permutations": Sequence(10, 10, 12, 24, 0.95, 12),
}


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


def run(setting: Setting, *, tasks: int | None = None, epochs: int = 12) -> Findings:
    """Three ways through both sequences, for every seed."""
    if setting.full:
        raise MissingData(
            "firefly-continual --full",
            "no VGG-16 on splits of CIFAR-100 here",
            "hours on a GPU",
            do="use irgrow.Continual with your own tasks",
        )
    calls = [
        (name, seed, method, tasks, epochs)
        for name in SEQUENCES
        for seed in setting.seeds
        for method in ("firefly", "individual", "one network in turn")
    ]
    found: dict[tuple[str, str], list[Result]] = {}
    for result in setting.each(learned, calls, "sequences"):
        found.setdefault((result.sequence, result.method), []).append(result)
    findings = Findings(columns=("sequence", "method", "accuracy %", "parameters", "forgotten (points)"))
    panels = []
    for name in SEQUENCES:
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
                paper="+0.3 (20 tasks)",
            ),
            claim(
                f"size, {name}",
                f"{name}: fewer parameters than a network per task: ratio",
                SOURCE,
                [b.parameters[-1] / a.parameters[-1] for a, b in zip(ours, alone, strict=True)],
                ">",
                1.0,
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


def tasks_of(sequence: Sequence, seed: int, count: int | None = None) -> list[tuple[Data, Data]]:
    """Training and test data per task."""
    (x, y), (x_test, y_test) = digits.load()
    draw = torch.Generator().manual_seed(seed)
    found = []
    order = torch.randperm(10, generator=draw)
    for task in range(count or sequence.tasks):
        parts = []
        shuffle = torch.randperm(64, generator=draw)
        for inputs, labels in ((x, y), (x_test, y_test)):
            if sequence.classes == 2:
                low, high = order[2 * task : 2 * task + 2].tolist()
                mine = (labels == low) | (labels == high)
                parts.append((inputs[mine], (labels[mine] == high).long()))
            else:
                parts.append((inputs[:, shuffle], labels))
        found.append((parts[0], parts[1]))
    return found


def learned(name: str, seed: int, method: str, tasks: int | None, epochs: int) -> Result:
    """One sequence learned in one way."""
    sequence = SEQUENCES[name]
    data = tasks_of(sequence, seed, tasks)
    result = Result(name, seed, method)
    if method == "firefly":
        _firefly(sequence, data, seed, epochs, result)
    elif method == "individual":
        own: list[float] = []
        total = 0
        for task, (train, test) in enumerate(data):
            network = mlp([64, sequence.alone, sequence.classes], seed=100 * seed + task)
            own.append(_trained(network, [(train, test)], 0, seed, 2 * epochs)[1][0])
            total += network.counts.parameters
            result.accuracies.append(list(own))
            result.parameters.append(total)
    else:
        network = _many_heads(sequence, len(data), seed)
        for task in range(len(data)):
            network, reached = _trained(network, data[: task + 1], task, seed, 2 * epochs)
            result.accuracies.append(reached)
            result.parameters.append(network.counts.parameters)
    return result


def _firefly(sequence: Sequence, data: list[tuple[Data, Data]], seed: int, epochs: int, result: Result) -> None:
    learner = Continual(mlp([64, sequence.hidden, sequence.classes], seed=seed), seed=seed)
    seen: list[Tensor] = []
    for task, (train, _) in enumerate(data):
        learner.learn(
            f"task{task}",
            train,
            target=sequence.target,
            budget=sequence.budget,
            epochs=epochs,
            mask_epochs=epochs,
        )
        with torch.no_grad():
            now = [learner.model(f"task{t}")(data[t][1][0]) for t in range(task + 1)]
        result.changed += sum(not torch.equal(a, b) for a, b in zip(seen, now, strict=False))
        seen = now
        hits = [(out.argmax(1) == data[t][1][1]).float().mean() for t, out in enumerate(now)]
        result.accuracies.append([float(h) for h in hits])
        result.parameters.append(learner.network.counts.parameters)


def _many_heads(sequence: Sequence, tasks: int, seed: int) -> Network:
    """One hidden layer as wide as one that learns alone, and a head per task."""
    builder = Builder(seed=seed)
    builder.input("input", 64)
    builder.group("hidden", sequence.alone, activation="relu", bias=True)
    builder.connect("input", "hidden")
    for task in range(tasks):
        builder.output(f"task{task}", sequence.classes, bias=True)
        builder.connect("hidden", f"task{task}")
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
