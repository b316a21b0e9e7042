"""Pure growth of a thin residual network (TINY): neurons are added, and no gradient step is ever taken.

By default digits of 8x8 pixels; a stem, three stages of residual blocks (two 3x3 convolutions around a skip; stride 2
from the second stage on, with a 1x1 convolution as the skip) and a mean over positions. Growing widens the inside of
the blocks, one block after the other: a method proposes the units, a line search on other samples their amplitude.

    TINY, random        as the paper compares them: random fan-in and fan-out
    TINY + dW           with the best update of the second convolution, at an amplitude of its own
    random + dW         the control: the same best updates beside random units

`full`: from ResNet_1/64 to ResNet-18 on CIFAR-100, four runs in the paper (`--seeds 4`). Read as: four stages of two
blocks with 64 to 512 channels, whose insides begin with a 64th of that and end with all of it. Not stated: what else
is thin (nothing here), how many units a step adds (a 32nd of the block's width), how many samples statistics and
amplitudes are taken on (2000 and 1000), batch norm (none).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import images
from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.fit import accuracy
from irgrow.growth.methods import Random, Tiny
from irgrow.growth.methods.base import fold_move
from irgrow.growth.probe import probe
from irgrow.growth.refine import refine
from irgrow.ir.builder import Builder
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Identity, Pool2d
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import compile

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """How much of everything; `channels` of each stage's outputs.

    inside, units   of each block at the start, and per growth; in `full` per 64 channels of the block's width
    """

    data: str = "digits"
    channels: tuple[int, ...] = (4, 8, 16)
    blocks: int = 1  # per stage
    inside: int = 1
    units: int = 2
    growths: int = 12
    train: int = 400
    proportional: bool = False

    @property
    def sites(self) -> dict[str, int]:
        """The insides of the blocks, with what a block's width multiplies `inside` and `units` by."""
        names = [f"{n}{chr(97 + k) if self.blocks > 1 else ''}" for n in range(1, len(self.channels) + 1)
                 for k in range(self.blocks)]  # fmt: skip
        wide = [c // 64 if self.proportional else 1 for c in self.channels for _ in range(self.blocks)]
        return {f"inside{name}": w for name, w in zip(names, wide, strict=True)}


FULL = Size("CIFAR100", (64, 128, 256, 512), 2, 1, 2, 8 * 32, 2000, True)


def resnet(
    size: Size, seed: int, image: tuple[int, ...] = (1, 8, 8), classes: int = 10, dtype: torch.dtype = torch.float64
) -> Network:
    """The thin network."""
    builder = Builder(seed=seed, dtype=dtype)
    builder.input("x", image)
    last, side, width = "stem", image[1], size.channels[0]
    builder.group("stem", (width, side, side), activation="relu", bias=True)
    builder.connect("x", "stem", Conv2d((3, 3), padding=(1, 1)))
    for n, (inside, times) in enumerate(size.sites.items()):
        stage, within = divmod(n, size.blocks)
        channels, stride = size.channels[stage], 2 if stage and not within else 1
        side //= stride
        block = inside.replace("inside", "block")
        builder.group(inside, (size.inside * times, side, side), activation="relu", bias=True)
        builder.group(block, (channels, side, side), activation="relu", bias=True)
        builder.connect(last, inside, Conv2d((3, 3), (stride, stride), (1, 1)))
        builder.connect(inside, block, Conv2d((3, 3), padding=(1, 1)))
        same = stride == 1 and width == channels
        builder.connect(last, block, Identity() if same else Conv2d((1, 1), (stride, stride)))
        last, width = block, channels
    builder.group("mean", (width, 1, 1))
    builder.connect(last, "mean", Pool2d((side, side), (side, side)), 1.0 / side**2, trainable=False)
    builder.output("y", classes, bias=True)
    builder.connect("mean", "y")
    return builder.build()


def _with_move(found: Proposal, statistics: Statistics) -> Proposal:
    return replace(found, delta=fold_move(statistics, statistics.best_move))


Propose = Callable[[Statistics, int, int], Proposal]
MOVES = ("S_in", "M")
METHODS: dict[str, tuple[tuple[str, ...], Propose]] = {
    "TINY": (Tiny().needs, lambda s, units, seed: Tiny(units).propose(s)),
    "random": ((), lambda s, units, seed: Random(units, fan_out="random", seed=seed).propose(s)),
    "TINY + dW": (Tiny(delta="apply").needs, lambda s, units, seed: Tiny(units, delta="apply").propose(s)),
    "random + dW": (
        MOVES,
        lambda s, units, seed: _with_move(Random(units, fan_out="random", seed=seed).propose(s), s),
    ),
}


@dataclass
class Run:
    """Before and after every growth: parameters, training loss, test accuracy."""

    parameters: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def samples(size: Size, seed: int) -> tuple[Batch, Batch, Batch]:
    """Images for the statistics, for amplitudes (half as many), and for testing."""
    (x, y), (x_test, y_test) = images.load(name=size.data)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    seen, held = order[: size.train], order[size.train : size.train + size.train // 2]
    return (x[seen].double(), y[seen]), (x[held].double(), y[held]), (x_test.double(), y_test)


def run_one(method: str, seed: int, size: Size | None = None) -> Run:
    """One network grown without gradient descent; deterministic. A growth that is refused is noted and left out."""
    size = size or Size()
    train, held, test = samples(size, seed)
    image, classes = tuple(train[0].shape[1:]), int(test[1].max()) + 1
    model, found = compile(resnet(size, seed, image, classes)), Run()
    needs, how = METHODS[method]
    for step in range(size.growths + 1):
        if step:
            site, times = list(size.sites.items())[(step - 1) % len(size.sites)]
            statistics = probe(model, train, F.cross_entropy, sites=[site], want=needs)[site]
            try:
                proposal = refine(how(statistics, size.units * times, 100 * seed + step), model, held, F.cross_entropy)
                model.grow(AddUnits(proposal)(model.structure))
            except Refused as refused:
                found.notes.append(f"growth {step}: {refused}")
        with torch.no_grad():
            outputs = model(train[0])
            assert isinstance(outputs, Tensor)
            found.losses.append(float(F.cross_entropy(outputs, train[1])))
        found.parameters.append(model.structure.counts.parameters)
        found.accuracies.append(accuracy(model, test) or 0.0)
    return found


def run(setting: Setting, size: Size | None = None) -> Findings:
    """Every method from every seed's network."""
    size = size or (FULL if setting.full else Size())
    images.load(name=size.data)  # MissingData before anything is grown
    done = iter(setting.each(run_one, [(m, seed, size) for m in METHODS for seed in setting.seeds], "networks"))
    runs = {m: [next(done) for _ in setting.seeds] for m in METHODS}
    findings = Findings(_claims(runs), ("method", "parameters", "training loss", "test accuracy", "lowest", "highest"))
    for name, rs in runs.items():
        last = [r.accuracies[-1] for r in rs]
        loss = median(r.losses[-1] for r in rs)
        findings.rows.append((name, median(r.parameters[-1] for r in rs), loss, median(last), min(last), max(last)))
        findings.notes += [f"{name}: {note}" for r in rs[:1] for note in r.notes[:1]]
    findings.data = {
        name: {key: [getattr(r, key) for r in rs] for key in ("parameters", "losses", "accuracies")}
        for name, rs in runs.items()
    }
    from irgrow.experiments import pictures

    steps = list(range(size.growths + 1))
    shown = [
        (title, {name: (steps, [getattr(r, key) for r in rs]) for name, rs in runs.items()})
        for title, key in (("Test accuracy", "accuracies"), ("Training loss", "losses"))
    ]
    pictures.lines(setting.out / "growth.png", shown, x="growths (no gradient steps)", y="")
    findings.figures = {"growth.png": "Pure growth: medians, and the middle half of the seeds"}
    return findings


def _claims(runs: dict[str, list[Run]]) -> list[Claim]:
    def last(name: str) -> list[float]:
        return [r.accuracies[-1] for r in runs[name]]

    def apart(above: str, below: str) -> list[float]:
        return [a - b for a, b in zip(last(above), last(below), strict=True)]

    source = "TINY, random against TINY"
    gained = [r.accuracies[-1] - r.accuracies[0] for r in runs["TINY"]]
    return [
        claim("grows", "TINY: test accuracy at the end - at the start", source, gained, ">", 0.0),
        claim(
            "random",
            "test accuracy of TINY - random",
            source,
            apart("TINY", "random"),
            ">",
            0.0,
            paper="TINY is higher",
        ),
        claim("move", "test accuracy of TINY + dW - TINY", source, apart("TINY + dW", "TINY"), ">", 0.0),
        claim(
            "control",
            "test accuracy of TINY + dW - random + dW",
            "control",
            apart("TINY + dW", "random + dW"),
            ">",
            0.0,
        ),
    ]
