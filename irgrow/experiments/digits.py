"""The main job: a network with four hidden units grows to thirty-six on scikit-learn's handwritten digits.

64 pixels / 16, ten classes; a stratified quarter is held out (random_state 0). The loss is cross entropy with
label smoothing, the optimizer AdamW with a cosine schedule; growths come early, so that most epochs train the
whole network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import irgrow as ig
from irgrow.experiments.folder import RunFolder
from irgrow.growth.fit import Growth, fit
from irgrow.growth.methods import GradMax, Method, Random, Tiny
from irgrow.growth.when import Every
from irgrow.growth.where import RoundRobin
from irgrow.ir.errors import UnknownName
from irgrow.ir.network import Network

METHODS: dict[str, Callable[[int, int], Method]] = {
    "tiny": lambda units, seed: Tiny(units, joint=True),
    "gradmax": lambda units, seed: GradMax(units, seed=seed),
    "random": lambda units, seed: Random(units, seed=seed),
}
SMOOTHING = 0.2


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    how: str | None = "tiny"  # None: the network stays as it is
    seed: int = 0
    hidden: int = 4
    growths: int = 8
    units: int = 4
    every: int = 1  # epochs between growths
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 0.03
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Result:
    """What a run reached; times in seconds, without reading data and drawing."""

    accuracy: float
    parameters: int
    widths: dict[str, int]
    seconds_training: float
    seconds_growing: float
    events: list[dict[str, Any]]
    network: Network


Data = tuple[Tensor, Tensor]


def load() -> tuple[Data, Data]:
    """Training and test data: images `[n, 64]` in [0, 1] (float32), labels `[n]`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split((x / 16).astype(np.float32), y, test_size=0.25, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = map(torch.as_tensor, parts)
    return (x_train, y_train), (x_test, y_test)


def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with label smoothing, mean over samples."""
    return F.cross_entropy(outputs, targets, label_smoothing=SMOOTHING)


def run(
    config: Config,
    data: tuple[Data, Data],
    *,
    progress: bool = False,
    on_event: Callable[[Mapping[str, Any]], None] | None = None,
) -> Result:
    """One run from the seed's 64-`hidden`-10 network; deterministic for a thread count."""
    train, test = data
    model = ig.compile(ig.mlp([64, config.hidden, 10], activation="relu", seed=config.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    growth = None
    if config.how is not None and config.growths:
        if config.how not in METHODS:
            raise UnknownName(f"--how {config.how!r}", expected=f"one of {', '.join(METHODS)}")
        growth = Growth(
            when=Every(epochs=config.every, times=config.growths),
            where=RoundRobin(),
            how=METHODS[config.how](config.units, config.seed),
        )
    history = fit(
        model,
        train,
        criterion,
        optimizer,
        epochs=config.epochs,
        growth=growth,
        test=test,
        batch_size=config.batch_size,
        seed=config.seed,
        progress=progress,
        on_event=on_event,
        scheduler=scheduler,
    )
    events = list(history.events)
    last = [e for e in events if e["event"] == "epoch"][-1]
    return Result(
        last["test_accuracy"],
        last["parameters"],
        dict(last["widths"]),
        history.seconds_training,
        history.seconds_growing,
        events,
        model.network(),
    )


def main(arguments: argparse.Namespace) -> int:
    """`irgrow grow digits`: one run, its folder and pictures, and a few lines about it."""
    config = Config(
        how=arguments.how,
        seed=arguments.seed,
        hidden=arguments.hidden,
        growths=arguments.growths,
        units=arguments.units,
        every=arguments.every,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
    )
    began = time.perf_counter()
    torch.set_num_threads(1)  # a second thread costs such small products more than it saves
    out = Path(arguments.out)
    folder = RunFolder(out, {"task": "digits", **asdict(config), "threads": torch.get_num_threads()})
    try:
        result = run(config, load(), progress=not arguments.quiet, on_event=folder.event)
    finally:
        folder.close()
    write_pictures(out, result)
    hidden = result.widths["hidden"]
    print(
        f"64-{config.hidden}-10 grew to 64-{hidden}-10 by {config.how}: test accuracy {result.accuracy:.4f}, "
        f"{result.parameters:,} parameters"
    )
    print(
        f"training {result.seconds_training:.2f} s, growing {result.seconds_growing:.2f} s "
        f"({config.growths} growths), in all {time.perf_counter() - began:.1f} s"
    )
    print(f"written to {out}/: config.json, log.jsonl, checkpoint.safetensors, growth.png, network.svg")
    return 0


def write_pictures(out: Path, result: Result) -> None:
    """The trained network as a file, its growth and itself as pictures."""
    from irgrow import viz

    ig.save(out / "checkpoint.safetensors", result.network)
    viz.growth_plot(result.events, out / "growth.png")
    viz.save_svg(result.network, out / "network.svg")
