"""TINY and its joint form against GradMax, NORTH and random growth, at equal parameters and multiply-adds.

Two tasks, each a comparison by `compare` with its two controls: handwritten digits (64-4-10, ReLU, grown to 36
hidden units), and the sine task with ten inputs whose sum has variance 1 (10-2-2-5, tanh, both layers grown to 18).

`full` adds CIFAR-100 (four runs in the paper): a ResNet-18 whose blocks have 16 channels inside and grow to 48, all by
as many units, with 30 epochs of the grown network as budget. The paper grows them in proportion to their width, up to
all of it; it states neither budget nor optimizer (Adam at 0.01 here).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import full_data, tiny_resnet
from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.compare import SCRATCH, STAYING, Comparison, How, compare
from irgrow.experiments.digits import load
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.experiments.tiny_sine import draw
from irgrow.growth.methods import GradMax, North, Random, Tiny
from irgrow.ir.builder import mlp
from irgrow.ir.network import Network

METHODS: Mapping[str, How] = {
    "TINY": Tiny(4),
    "TINY, joint": Tiny(4, joint=True),
    "TINY + dW": Tiny(4, delta="apply"),
    "TINY, joint + dW": Tiny(4, joint=True, delta="apply"),
    "GradMax": GradMax(4),
    "NORTH select": North(4, candidates=100),
    "random": Random(4),
}


@dataclass(frozen=True)
class Start:
    """A network for every seed."""

    widths: tuple[int, ...]
    activation: str

    def __call__(self, seed: int) -> Network:
        return mlp(self.widths, activation=self.activation, seed=seed)


Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Thin:
    """A ResNet-18 for every seed, with 16 channels inside its blocks."""

    image: tuple[int, ...]

    def __call__(self, seed: int) -> Network:
        size = replace(tiny_resnet.FULL, inside=16, proportional=False)
        return tiny_resnet.resnet(size, seed, self.image, 100, torch.float32)


Task = tuple[Callable[[int], Network], Split, Split, dict[str, Any]]


def tasks(full: bool = False) -> dict[str, Task]:
    """Start, training data, test data and options of `compare`, by task."""
    drawn = [draw(1000, inputs=10, classes=5, variance=1.0, seed=seed) for seed in (7, 8)]
    train, test = ((x.float(), y) for x, y in drawn)
    found: dict[str, Task] = {
        "digits": (Start((64, 4, 10), "relu"), *load(), {"growths": 8, "budget": 3e8}),
        "sine": (Start((10, 2, 2, 5), "tanh"), train, test, {"growths": 4, "budget": 6e7}),
    }
    if full:
        sites = tuple(replace(tiny_resnet.FULL, proportional=False).sites)
        data, unseen = full_data.images("CIFAR100")
        options = {"growths": 8, "sites": sites, "batch_size": 128}
        found["CIFAR-100"] = (Thin(tuple(data[0].shape[1:])), data, unseen, options)
    return found


def run(setting: Setting, methods: Mapping[str, How] = METHODS) -> Findings:
    """All comparisons."""
    found: dict[str, Comparison] = {}
    for name, (start, train, test, options) in tasks(setting.full).items():
        found[name] = compare(
            methods,
            start,
            train,
            test=test,
            loss=F.cross_entropy,
            seeds=setting.seeds,
            progress=setting.progress,
            workers=setting.workers,
            **options,
        )
    findings = Findings([one for task, c in found.items() for one in _claims(task, c)])
    findings.columns = ("task", *next(iter(found.values())).columns)
    for task, comparison in found.items():
        findings.rows += [(task, *row) for row in comparison.rows()]
        findings.notes += [f"{task}: {note}" for note in comparison.notes]
        plain = comparison.as_dict()
        findings.timings[task] = plain.pop("timings")
        for runs in plain["runs"].values():
            for one in runs:
                del one["curve"]
        findings.data[task] = {k: v for k, v in plain.items() if k != "claims"}
        comparison.plot(setting.out / f"{task}.png")
        findings.figures[f"{task}.png"] = f"{task}: training loss over multiply-adds, and every seed at the end"
    return findings


def _claims(task: str, found: Comparison) -> list[Claim]:
    paper = "TINY, section 5"
    loss = "train loss"

    def better(name: str, arm: str, other: str, source: str, measure: str, text: str = "") -> Claim:
        return claim(
            f"{task}-{name}",
            f"{task}: {arm} has a better {measure} than {other}",
            source,
            found.against(arm, other, measure),
            ">",
            0.0,
            paper=text,
        )

    return [
        better("random", "TINY", "random", paper, found.measure, "TINY is better"),
        better("gradmax", "TINY", "GradMax", paper, found.measure, "TINY is better"),
        better("north", "TINY", "NORTH select", paper, found.measure),
        better("joint", "TINY, joint", "TINY", "ours, beyond the paper", loss),
        better("joint-move", "TINY, joint + dW", "TINY + dW", "ours, beyond the paper", loss),
        better("scratch", "TINY", SCRATCH, "control", found.measure),
        better("staying", "TINY", STAYING, "control", found.measure),
    ]
