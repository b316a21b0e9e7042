"""Firefly, appendix B.2: a network of four blocks with one convolution each, grown deeper (and wider).

    block 1 .. 4: the first convolution has stride two, all others keep the size        1-1-1-1 -> deeper

Here on scikit-learn's digits at 16x16 with eight channels. Opponents: NASH (eight random neighbours, each trained
a little) and AutoGrow (Wen et al., arXiv:1906.02909: a layer per block in turn, as long as that helps on held-back
data). Controls the paper lacks: the grown network from scratch, and the first one trained for as long.
"""

from __future__ import annotations

import math
from time import perf_counter

import numpy as np
import torch

from irgrow.experiments import images
from irgrow.experiments.claims import claim
from irgrow.experiments.compare import redrawn
from irgrow.experiments.firefly_widen import NEIGHBOURS, RATE, SHARE, TUNING, twins
from irgrow.experiments.images import Counted, Data, Path
from irgrow.experiments.neighbours import Way, best_neighbour
from irgrow.experiments.pictures import points
from irgrow.experiments.reproduce import Findings, MissingData, Setting
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
CONTROLS = ("from scratch", "not grown")
BLOCKS, CHANNELS, SIDE = 4, 8, 16
GROWTHS, EPOCHS = 3, 5
NEW = 6  # candidates per new layer and per old one (the paper: 20)
HELD = 5  # AutoGrow holds back one sample in so many
SOURCE = "Firefly, table 3"


def run(setting: Setting, *, growths: int = GROWTHS, epochs: int = EPOCHS) -> Findings:
    """Every method on every seed, and the controls."""
    if setting.full:
        raise MissingData(
            "firefly-deepen --full",
            "no 11 growths of 12-12-12-12 on MNIST, FashionMNIST and SVHN here",
            "hours on a GPU",
            do="use irgrow.Growth(how=irgrow.Firefly(layers=4, ...)) with your own loader",
        )
    calls = [(method, seed, growths, epochs) for seed in setting.seeds for method in (*METHODS, *CONTROLS)]
    found = {method: [] for method in (*METHODS, *CONTROLS)}  # type: dict[str, list[Path]]
    for path in setting.each(grown, calls, "growing"):
        found[path.method].append(path)
    last = {name: [100 * p.accuracy[-1] for p in paths] for name, paths in found.items()}
    size = {name: [p.parameters[-1] for p in paths] for name, paths in found.items()}

    def ahead(other: str) -> list[float]:
        return [a - b for a, b in zip(last["firefly"], last[other], strict=True)]

    def smaller(other: str) -> list[float]:
        return [b / a for a, b in zip(size["firefly"], size[other], strict=True)]

    findings = Findings(
        [
            claim("nash", "Firefly beats NASH (points of accuracy)", SOURCE, ahead("nash"), ">", 0.0, paper="+0.09"),
            claim(
                "autogrow",
                "Firefly is as accurate as AutoGrow (points)",
                SOURCE,
                ahead("autogrow"),
                ">=",
                0.0,
                paper="+0.02",
            ),
            claim("size", "its network is smaller than NASH's: ratio", SOURCE, smaller("nash"), ">", 1.0, paper="1.05"),
            claim("size, autogrow", "and than AutoGrow's: ratio", SOURCE, smaller("autogrow"), ">", 1.0, paper="1.21"),
            claim(
                "scratch",
                "growing beats the grown network from scratch (points)",
                "control",
                ahead("from scratch"),
                ">",
                0.0,
            ),
            claim(
                "growing",
                "growing beats training the first network on (points)",
                "control",
                ahead("not grown"),
                ">",
                0.0,
            ),
        ],
        ("method", "accuracy %", "lowest", "highest", "parameters (median)", "layers per block", "samples to grow"),
        [
            (
                name,
                float(np.median(last[name])),
                min(last[name]),
                max(last[name]),
                int(np.median(size[name])),
                paths[0].structure[-1],
                int(np.median([p.samples for p in paths])),
            )
            for name, paths in found.items()
        ],
        {
            n: {
                "accuracy": [p.accuracy for p in ps],
                "parameters": [p.parameters for p in ps],
                "structure": [p.structure for p in ps],
            }
            for n, ps in found.items()
        },
        timings={"seconds per growth": {n: float(np.median([p.seconds for p in found[n]])) / growths for n in METHODS}},
    )
    for name in METHODS:
        notes = [note for path in found[name] for note in path.notes]
        if notes:
            findings.notes.append(f"{name}: {len(notes)} growths found nothing: {notes[0]}")
    picture = setting.out / "accuracy.png"
    clouds = {n: (size[n], last[n]) for n in found}
    points(picture, [("digits at 16x16, every seed", clouds)], x="parameters", y="test accuracy (%)")
    findings.figures[picture.name] = "test accuracy over parameters of the last networks"
    return findings


def start(seed: int) -> Network:
    """1-1-1-1: four convolutions of stride two, then the classes."""
    builder = Builder(seed=seed)
    last, side = builder.input("input", (1, SIDE, SIDE)), SIDE
    for block in range(1, BLOCKS + 1):
        side //= 2
        name = f"block{block}"
        builder.group(name, (CHANNELS, side, side), activation="relu", bias=True)
        builder.connect(last, name, Conv2d((3, 3), (2, 2), (1, 1)))
        last = name
    builder.output("output", 10, bias=True)
    builder.connect(last, "output")
    return builder.build()


def layers(network: Network) -> str:
    """Convolutions per block: what stands between two strides of two, a residual layer counting as one."""
    count = [0] * BLOCKS
    for group in network.groups.values():
        if network.is_hidden(group.name) and any(isinstance(b.pattern, Conv2d) for b in network.entering(group.name)):
            only_sum = any(isinstance(b.pattern, Identity) for b in network.entering(group.name))
            count[BLOCKS - 1 - int(math.log2(group.shape[1]))] += not only_sum
    return "-".join(map(str, count))


def grown(method: str, seed: int, growths: int, epochs: int) -> Path:
    """One network, trained and grown; `from scratch` draws the weights of Firefly's network anew."""
    data, test = images.load(SIDE)
    network = start(seed)
    if method == "from scratch":
        network = redrawn(_grow_all("firefly", network, seed, growths, epochs, data, test)[1].network(), seed)
        method_phases = Path(method, seed)
        model = compile(network)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        images.train(model, optimizer, data, epochs * (growths + 2), torch.Generator().manual_seed(seed))
        method_phases.note(model, test, layers(network))
        return method_phases
    return _grow_all(method, network, seed, growths, epochs, data, test)[0]


def _grow_all(
    method: str, network: Network, seed: int, growths: int, epochs: int, data: Data, test: Data
) -> tuple[Path, CompiledNetwork]:
    model = compile(network)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    path = Path(method, seed)
    held = torch.arange(len(data[1])) % HELD == 0
    for phase in range(growths + 1):
        if phase and method in METHODS:
            counted, begun = Counted(), perf_counter()
            try:
                _grow(method, model, optimizer, data, held, counted, 1000 * seed + phase, draw)
            except Refused as refused:
                path.notes.append(str(refused))
            path.seconds += perf_counter() - begun
            path.samples += counted.samples
        images.train(model, optimizer, data, epochs * (1 + (phase == growths)), draw)
        path.note(model, test, layers(model.structure))
    return path, model


def _grow(
    method: str,
    model: CompiledNetwork,
    optimizer: torch.optim.Optimizer,
    data: Data,
    held: torch.Tensor,
    loss: Counted,
    seed: int,
    draw: torch.Generator,
) -> None:
    network = model.network()
    total = sum(g.units for g in network.groups.values() if network.is_hidden(g.name))
    if method == "firefly":
        units = math.ceil(SHARE * total)
        how = Firefly(units, new=NEW, layers=BLOCKS, rule="authors", steps=30, seed=seed, batch_size=256, batches=2)
        model.grow(how.select(model, data, loss)(network), optimizer)
    elif method == "nash":
        random = np.random.default_rng(seed)

        def trained() -> float:
            loss.samples += TUNING * len(data[1])
            return images.train(model, optimizer, data, TUNING, draw)

        units = math.ceil(0.25 * total)
        best_neighbour(model, optimizer, [_deeper(random, units) for _ in range(NEIGHBOURS)], trained)
    else:
        _autogrow(model, optimizer, data, held, loss, seed, draw)


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
    held: torch.Tensor,
    loss: Counted,
    seed: int,
    draw: torch.Generator,
) -> None:
    """Block by block a residual layer as wide as the block, kept if it helps on data that it did not train on."""
    rest, unseen = (data[0][~held], data[1][~held]), (data[0][held], data[1][held])
    for block in range(1, BLOCKS + 1):
        before = model.snapshot(optimizer)
        reached = images.score(model, unseen)
        behind = [g for g in model.structure.groups if g.startswith(f"block{block}") and g.endswith("block")]
        group = behind[-1] if behind else f"block{block}"
        model.grow(AddResidual(group, CHANNELS, seed=seed + block)(model.network()), optimizer)
        loss.samples += TUNING * len(rest[1])
        images.train(model, optimizer, rest, TUNING, draw)
        if images.score(model, unseen) <= reached:
            model.restore(before, optimizer)
