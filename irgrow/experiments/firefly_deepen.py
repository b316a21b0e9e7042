"""Firefly, appendix B.2: a network of four blocks with one convolution each, grown deeper (and wider).

    block 1 .. 4: the first convolution has stride two, all others keep the size        1-1-1-1 -> deeper

By default on scikit-learn's digits at 16x16 with eight channels. Opponents: NASH (eight random neighbours, each trained
a little) and AutoGrow (Wen et al., arXiv:1906.02909: a layer per block in turn, as long as that helps on held-back
data). Controls the paper lacks: the grown network from scratch, and the first one trained for as long.

`full`: MNIST, FashionMNIST and SVHN with 16 channels, m' = 20, candidates trained for an epoch, 25 % of the width per
step, 11 growths with 40 epochs behind each and 200 at the end, neighbours of NASH trained for 17. At most four layers
begin per growth (the paper's 11 candidates per block are one for each growth). AutoGrow is run here, where the paper
quotes its results. Not stated: optimizer, rate, batch size (Adam 3e-3, 64), batch norm and augmentation (none).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

from irgrow.experiments import full_data, images
from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.compare import redrawn
from irgrow.experiments.firefly_widen import NEIGHBOURS, RATE, SHARE, twins
from irgrow.experiments.images import Counted, Data, Path, Paths, ahead, ratio
from irgrow.experiments.neighbours import Way, best_neighbour
from irgrow.experiments.pictures import points
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.firefly import Firefly
from irgrow.ir.builder import Builder
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Identity
from irgrow.passes.add_block import AddResidual
from irgrow.passes.add_layer import AddLayer
from irgrow.passes.base import Pass, Sequence
from irgrow.runtime.model import CompiledNetwork, compile

METHODS = ("firefly", "nash", "autogrow")
SCRATCH, STAYING = "from scratch", "not grown"
BLOCKS = 4
HELD = 5  # AutoGrow holds back one sample in so many
SOURCE = "Firefly, table 3"


@dataclass(frozen=True)
class Plan:
    """Data and channels, and how long everything takes."""

    data: str = "digits"
    channels: int = 8
    growths: int = 3
    epochs: int = 5  # between growths
    last: int = 10
    new: int = 6  # candidates per new layer and per old one
    share: float = SHARE  # of the units, per growth
    steps: int | None = 30  # of training the candidates; None: an epoch
    tuning: int = 3  # epochs that NASH and AutoGrow train what they try

    def load(self) -> tuple[Data, Data]:
        """Training and test images."""
        return images.load(16, self.data)


FULL = tuple(Plan(name, 16, 11, 40, 200, 20, 0.25, None, 17) for name in ("MNIST", "FashionMNIST", "SVHN"))
PRINTED = {  # accuracy of Firefly against NASH and AutoGrow; how many times as large their networks are
    "MNIST": ("+0.09", "+0.02", "1.05", "1.21"),
    "FashionMNIST": ("+0.14", "+0.01", "1.05", "1.10"),
    "SVHN": ("+0.18", "0", "1.05", "1.16"),
}


def run(setting: Setting, plans: tuple[Plan, ...] | None = None) -> Findings:
    """Every method on every seed, and the controls."""
    plans = plans or (FULL if setting.full else (Plan(),))
    by_name = {plan.data: plan for plan in plans}
    present, missing = full_data.those_present(by_name, lambda name: by_name[name].load())
    findings, clouds = Findings(notes=missing), []
    for name in present:
        calls = [(m, seed, by_name[name]) for seed in setting.seeds for m in (*METHODS, STAYING)]
        found: dict[str, list[Path]] = {method: [] for method in (*METHODS, SCRATCH, STAYING)}
        for paths in setting.each(grown, calls, f"growing, {name}"):
            for path in paths:
                found[path.method].append(path)
        task = "" if name == "digits" else name
        findings.claims += _claims(found, task)
        images.report(findings, found, "layers per block", task, by_name[name].growths)
        ends = {m: ([p.parameters[-1] for p in ps], [100 * p.accuracy[-1] for p in ps]) for m, ps in found.items()}
        clouds.append((f"{name}, every seed", ends))
    picture = setting.out / "accuracy.png"
    points(picture, clouds, x="parameters", y="test accuracy (%)")
    findings.figures[picture.name] = "test accuracy over parameters of the last networks"
    return findings


def _claims(found: Paths, task: str) -> list[Claim]:
    printed = PRINTED.get(task or "MNIST", ("",) * 4)
    head = f"{task}: " if task else ""
    rows = (
        ("nash", "Firefly beats NASH (points of accuracy)", SOURCE, ahead(found, "firefly", "nash"), ">", 0.0, 0),
        ("autogrow", "Firefly is as accurate as AutoGrow (points)", SOURCE, ahead(found, "firefly", "autogrow"), ">=",
         0.0, 1),
        ("size", "its network is smaller than NASH's: ratio", SOURCE, ratio(found, "nash", "firefly", "parameters"),
         ">", 1.0, 2),
        ("size, autogrow", "and than AutoGrow's: ratio", SOURCE, ratio(found, "autogrow", "firefly", "parameters"),
         ">", 1.0, 3),
        ("scratch", "growing beats the grown network from scratch (points)", "control",
         ahead(found, "firefly", SCRATCH), ">", 0.0, None),
        ("growing", "growing beats training the first network on (points)", "control",
         ahead(found, "firefly", STAYING), ">", 0.0, None),
    )  # fmt: skip
    return [
        claim(f"{head}{name}", f"{head}{text}", whose, values, way, bound, paper="" if at is None else printed[at])
        for name, text, whose, values, way, bound, at in rows
    ]


def start(image: tuple[int, ...], channels: int, seed: int) -> Network:
    """1-1-1-1: four convolutions of stride two, then the classes."""
    builder = Builder(seed=seed)
    last, shape = builder.input("input", image), image
    for block in range(1, BLOCKS + 1):
        name, filters = f"block{block}", images.square(3, 2)
        shape = (channels, *filters.output(shape))
        builder.group(name, shape, activation="relu", bias=True)
        builder.connect(last, name, filters)
        last = name
    builder.output("output", 10, bias=True)
    builder.connect(last, "output")
    return builder.build()


def layers(network: Network) -> str:
    """Convolutions per block: what stands between two strides of two, a residual layer counting as one."""
    count: dict[int, int] = {}  # by the side of the images, the same within a block
    for group in network.groups.values():
        if network.is_hidden(group.name) and any(isinstance(b.pattern, Conv2d) for b in network.entering(group.name)):
            only_sum = any(isinstance(b.pattern, Identity) for b in network.entering(group.name))
            count[group.shape[1]] = count.get(group.shape[1], 0) + (not only_sum)
    return "-".join(str(count[side]) for side in sorted(count, reverse=True))


def grown(method: str, seed: int, plan: Plan) -> list[Path]:
    """One network, trained and grown; behind Firefly's that of its graph with fresh weights, trained as long."""
    data, test = plan.load()
    path, model = _grow_all(method, start(tuple(data[0].shape[1:]), plan.channels, seed), seed, plan, data, test)
    if method != "firefly":
        return [path]
    scratch, network = Path(SCRATCH, seed), redrawn(model.network(), seed)
    fresh = compile(network)
    optimizer = torch.optim.Adam(fresh.parameters(), lr=RATE)
    epochs = plan.epochs * plan.growths + plan.last
    images.train(fresh, optimizer, data, epochs, torch.Generator().manual_seed(seed))
    scratch.note(fresh, test, layers(network))
    return [path, scratch]


def _grow_all(
    method: str, network: Network, seed: int, plan: Plan, data: Data, test: Data
) -> tuple[Path, CompiledNetwork]:
    model = compile(network)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    path = Path(method, seed)
    for phase in range(plan.growths + 1):
        if phase and method in METHODS:
            counted, begun = Counted(), perf_counter()
            try:
                _grow(method, model, optimizer, data, counted, 1000 * seed + phase, draw, plan)
            except Refused as refused:
                path.notes.append(str(refused))
            path.seconds += perf_counter() - begun
            path.samples += counted.samples
        images.train(model, optimizer, data, plan.last if phase == plan.growths else plan.epochs, draw)
        path.note(model, test, layers(model.structure))
    return path, model


def _grow(
    method: str,
    model: CompiledNetwork,
    optimizer: torch.optim.Optimizer,
    data: Data,
    loss: Counted,
    seed: int,
    draw: torch.Generator,
    plan: Plan,
) -> None:
    network = model.network()
    total = sum(g.units for g in network.groups.values() if network.is_hidden(g.name))
    if method == "firefly":
        units = math.ceil(plan.share * total)
        steps = math.ceil(len(data[1]) / 256) if plan.steps is None else plan.steps
        how = Firefly(
            units, new=plan.new, layers=BLOCKS, rule="authors", steps=steps, seed=seed, batch_size=256, batches=2
        )
        model.grow(how.select(model, data, loss)(network), optimizer)
    elif method == "nash":
        random = np.random.default_rng(seed)

        def trained() -> float:
            loss.samples += plan.tuning * len(data[1])
            return images.train(model, optimizer, data, plan.tuning, draw)

        units = math.ceil(0.25 * total)
        best_neighbour(model, optimizer, [_deeper(random, units) for _ in range(NEIGHBOURS)], trained)
    else:
        _autogrow(model, optimizer, data, loss, seed, draw, plan)


def _deeper(random: np.random.Generator, units: int) -> Way:
    """Twins of random units, then one layer that begins as the identity in every block (NASH, types I and II)."""
    wider = twins(random, units)

    def way(network: Network) -> Pass:
        blocks: dict[int, list[str]] = {}
        for group in network.groups.values():
            if network.is_hidden(group.name) and len(group.shape) == 3:
                blocks.setdefault(group.shape[1], []).append(group.name)
        behind = [AddLayer(names[int(random.integers(len(names)))]) for names in blocks.values()]
        return Sequence((wider(network), *behind))

    return way


def _autogrow(
    model: CompiledNetwork,
    optimizer: torch.optim.Optimizer,
    data: Data,
    loss: Counted,
    seed: int,
    draw: torch.Generator,
    plan: Plan,
) -> None:
    """Block by block a residual layer as wide as the block, kept if it helps on data that it did not train on."""
    held = torch.arange(len(data[1])) % HELD == 0
    rest, unseen = (data[0][~held], data[1][~held]), (data[0][held], data[1][held])
    for block in range(1, BLOCKS + 1):
        before = model.snapshot(optimizer)
        reached = images.score(model, unseen)
        behind = [g for g in model.structure.groups if g.startswith(f"block{block}") and g.endswith("block")]
        group = behind[-1] if behind else f"block{block}"
        model.grow(AddResidual(group, plan.channels, seed=seed + block)(model.network()), optimizer)
        loss.samples += plan.tuning * len(rest[1])
        images.train(model, optimizer, rest, plan.tuning, draw)
        if images.score(model, unseen) <= reached:
            model.restore(before, optimizer)
