"""Images to grow networks on: their data, convolutional layers, training, and what growing costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import digits, full_data
from irgrow.experiments.reproduce import Findings
from irgrow.growth.fit import accuracy
from irgrow.ir.builder import Builder
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Pool2d
from irgrow.runtime.model import CompiledNetwork

Data = tuple[Tensor, Tensor]
BATCH = 64


def load(side: int = 8, name: str = "digits") -> tuple[Data, Data]:
    """Training and test images `[n, C, H, W]` in [0, 1], labels `[n]`.

    scikit-learn's digits, whose pixels are repeated side / 8 times, or (`name`) one of `full_data.images`.
    """
    if name != "digits":
        return full_data.images(name)
    parts = []
    for x, y in digits.load():
        image = x.reshape(-1, 1, 8, 8)
        parts.append((image.repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3), y))
    return parts[0], parts[1]


def train(
    model: CompiledNetwork, optimizer: torch.optim.Optimizer, data: Data, epochs: int, draw: torch.Generator
) -> float:
    """The model has trained on `data` for so many epochs; the mean loss of the last one."""
    x, y = data
    model.train()
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for index in torch.randperm(len(y), generator=draw).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(index) / len(y)
    model.eval()
    return total


def score(model: CompiledNetwork, data: Data) -> float:
    """Accuracy in eval mode."""
    found = accuracy(model, data)
    assert found is not None
    return found


class Layers:
    """Builds networks of convolutions with ReLU; every group that may grow has `share` of its width.

    With `norm` they have batch norms and the builder's weights; without, biases of 0 and He's normal weights (variance
    2 / fan-in), times `gain`, with which signals keep their size through many layers.
    """

    def __init__(self, image: Sequence[int], *, share: float = 1.0, norm: bool = False, seed: int = 0) -> None:
        self.builder = Builder(seed=seed)
        self.share, self.norm = share, "batch" if norm else None
        self.last, self.shape = self.builder.input("x", image), tuple(image)
        self.sites: dict[str, int] = {}  # with their full width
        self.draw = torch.Generator().manual_seed(seed)

    def conv(
        self, name: str, width: int, *, stride: int = 1, grows: bool = True, kernel: int = 3, gain: float = 1.0
    ) -> None:
        """A convolution that keeps the size (`stride` 1)."""
        units = max(1, round(self.share * width)) if grows else width
        self.add(name, units, square(kernel, stride), gain)
        if grows:
            self.sites[name] = width

    def add(self, name: str, units: int, pattern: Conv2d, gain: float = 1.0) -> None:
        """A group of so many channels over the last one."""
        shape = (units, *pattern.output(self.shape))
        bias = torch.zeros(units) if self.norm is None else False
        self.builder.group(name, shape, activation="relu", norm=self.norm, bias=bias)
        self.join(self.last, name, pattern, self.shape[0], units, gain)
        self.last, self.shape = name, shape

    def join(self, source: str, target: str, pattern: Conv2d, inputs: int, units: int, gain: float = 1.0) -> None:
        """A convolution between two groups."""
        weight = None
        if self.norm is None:
            shape = (units, inputs // pattern.channel_groups, *pattern.kernel)
            weight = gain * math.sqrt(2 / math.prod(shape[1:])) * torch.randn(shape, generator=self.draw)
        self.builder.connect(source, target, pattern, weight)

    def pool(self, name: str, side: int, *, mean: bool = False) -> None:
        """The largest, or the mean, of windows of that side."""
        window = Pool2d((side, side), (side, side))
        shape = (self.shape[0], *window.output(self.shape))
        self.builder.group(name, shape, aggregation="sum" if mean else "max")
        self.builder.connect(self.last, name, window, 1.0 / side**2 if mean else 1.0, trainable=False)
        self.last, self.shape = name, shape

    def done(self, classes: int = 10) -> Network:
        """The network, with a mean over positions and the classes on top."""
        self.pool("mean", self.shape[1], mean=True)
        self.builder.output("y", classes, bias=True)
        self.builder.connect(self.last, "y")
        return self.builder.build()


def square(kernel: int, stride: int = 1, groups: int = 1) -> Conv2d:
    """A square convolution whose output is as large as its input / stride."""
    return Conv2d((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), channel_groups=groups)


def vgg(layers: Layers, widths: Sequence[int], pooled: Sequence[int]) -> None:
    """Convolutions of these widths, and a pool behind each whose number is in `pooled`."""
    for n, width in enumerate(widths):
        layers.conv(f"conv{n + 1}", width)
        if n in pooled:
            layers.pool(f"pool{n + 1}", 2)


class Counted:
    """Cross entropy that counts the samples it was computed for: what growing costs, the same on every machine."""

    def __init__(self) -> None:
        self.samples = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.samples += len(targets)
        return F.cross_entropy(outputs, targets)


@dataclass
class Path:
    """How one network grew: after every phase its accuracy, parameters and structure; what the growths cost."""

    method: str
    seed: int
    accuracy: list[float] = field(default_factory=list)
    parameters: list[int] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)
    samples: int = 0  # for which a loss was computed while growing
    seconds: float = 0.0  # spent growing
    notes: list[str] = field(default_factory=list)

    def note(self, model: CompiledNetwork, test: Data, structure: str) -> None:
        """The end of a phase."""
        self.accuracy.append(score(model, test))
        self.parameters.append(model.structure.counts.parameters)
        self.structure.append(structure)


Paths = Mapping[str, Sequence[Path]]  # by method, one per seed


def ahead(found: Paths, method: str, other: str) -> list[float]:
    """By how many points a method's last network is more accurate, seed by seed."""
    return [100 * (a.accuracy[-1] - b.accuracy[-1]) for a, b in zip(found[method], found[other], strict=True)]


def ratio(found: Paths, above: str, below: str, what: str) -> list[float]:
    """`samples`, or the last network's `parameters`: one method's / the other's, seed by seed."""

    def last(path: Path) -> float:
        return float(path.samples if what == "samples" else path.parameters[-1])

    return [last(a) / last(b) for a, b in zip(found[above], found[below], strict=True)]


def report(findings: Findings, found: Paths, structure: str, task: str = "", growths: int = 1) -> None:
    """Findings with a table row per method, the paths as data, growths that found nothing as notes, and times.

    structure: what a path's structure is called; task: stands in front of everything, where there are several.
    """
    lead = [task] if task else []
    columns = ("method", "accuracy %", "lowest", "highest", "parameters (median)", structure, "samples to grow")
    findings.columns = (*(["data"] if task else []), *columns)
    data: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for name, paths in found.items():
        last = [100 * p.accuracy[-1] for p in paths]
        size, cost = (int(np.median(v)) for v in ([p.parameters[-1] for p in paths], [p.samples for p in paths]))
        middle = float(np.median(last))
        findings.rows.append((*lead, name, middle, min(last), max(last), size, paths[0].structure[-1], cost))
        data[name] = {key: [getattr(p, key) for p in paths] for key in ("accuracy", "parameters", "structure")}
        notes = [note for path in paths for note in path.notes]
        if notes:
            head = ", ".join([*lead, name])
            findings.notes.append(f"{head}: {len(notes)} growths found nothing: {notes[0]}")
        if any(p.seconds for p in paths):
            seconds[name] = float(np.median([p.seconds for p in paths])) / growths
    if task:
        findings.data[task], findings.timings[f"{task}, seconds per growth"] = data, seconds
    else:
        findings.data, findings.timings["seconds per growth"] = data, seconds
