"""TINY and its joint form against GradMax, NORTH and random growth, at equal parameters and multiply-adds.

Two tasks, each a comparison by `compare` with its two controls: handwritten digits (64-4-10, ReLU, grown to 36
hidden units), and the sine task with ten inputs whose sum has variance 1 (10-2-2-5, tanh, both layers grown to 18).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

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


def tasks(full: bool = False) -> dict[str, tuple[Start, Split, Split, dict[str, Any]]]:
    """Start, training data, test data and options of `compare`, by task."""
    drawn = [draw(1000, inputs=10, classes=5, variance=1.0, seed=seed) for seed in (7, 8)]
    train, test = ((x.float(), y) for x, y in drawn)
    times = 4 if full else 1
    return {
        "digits": (Start((64, 4, 10), "relu"), *load(), {"growths": 8, "budget": times * 3e8}),
        "sine": (Start((10, 2, 2, 5), "tanh"), train, test, {"growths": 4, "budget": times * 6e7}),
    }


def run(setting: Setting, methods: Mapping[str, How] = METHODS) -> Findings:
    """Both comparisons; `full`: four times the multiply-adds."""
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
