"""Firefly, section 3 and appendix B.2: a convolutional network widened by 30 % per step.

By default on scikit-learn's digits, from three layers of four channels; on the way every method trains alike, and the
last phase is longer, as in the paper. Beside the paper's opponents stand the controls it lacks: the grown network
from scratch, and the first one trained for as long.

`full`: VGG-19 on CIFAR-10, with the paper's 160 epochs between growths, m' = 50 candidates per layer trained for an
epoch, and 8 neighbours of NASH trained for 17. It does not state the width at the start (16 channels here), the number
of growths (7: what 30 % each take to six times the width), optimizer, rate and batch size (Adam at 3e-3
throughout, 64), batch norm (yes) or augmentation (none). Figure 6's MobileNet is left out: its
depthwise layers tie the channels of two layers, where Firefly's candidates have no place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from irgrow.experiments import images
from irgrow.experiments.claims import claim
from irgrow.experiments.images import Counted, Path, ahead, ratio
from irgrow.experiments.neighbours import Way, best_neighbour
from irgrow.experiments.pictures import points
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.firefly import Firefly
from irgrow.growth.splitting import SplittingDescent
from irgrow.ir.builder import cnn
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network, Unit
from irgrow.ir.site import Site
from irgrow.passes.base import Pass, Sequence
from irgrow.passes.widen import WidenUnits
from irgrow.runtime.model import CompiledNetwork, compile

METHODS = ("firefly", "firefly, authors' rule", "splitting descent", "net2net", "nash")
CONTROLS = ("from scratch", "not grown")
SHARE, NEIGHBOURS, RATE, NOISE = 0.3, 8, 3e-3, 0.01
SOURCE = "Firefly, figure 4"
VGG19 = (1, 3, 7, 11, 15)  # the convolutions (of 16) with a pool behind them


@dataclass(frozen=True)
class Plan:
    """Data, the widths at the start, and how long everything takes."""

    data: str = "digits"
    widths: tuple[int, ...] = (4, 4, 4)
    growths: int = 4
    epochs: int = 8  # between growths; the last phase has twice as many
    new: int = 10  # new candidates per layer
    steps: int | None = 50  # of training the candidates; None: an epoch
    tuning: int = 3  # epochs that NASH trains each neighbour

    def start(self, image: tuple[int, ...], widths: tuple[int, ...], seed: int) -> Network:
        """The network of these widths."""
        if self.data == "digits":
            return cnn(image, widths, 10, seed=seed)
        layers = images.Layers(image, norm=True, seed=seed)
        images.vgg(layers, widths, VGG19)
        return layers.done()


FULL = Plan("CIFAR10", (16,) * 16, 7, 160, 50, None, 17)


def run(setting: Setting, plan: Plan | None = None) -> Findings:
    """Every method on every seed, and the controls of Firefly's networks."""
    plan = plan or (FULL if setting.full else Plan())
    images.load(name=plan.data)  # MissingData before anything is trained
    calls = [(method, seed, plan) for seed in setting.seeds for method in METHODS]
    found: dict[str, list[Path]] = {method: [] for method in (*METHODS, *CONTROLS)}
    for path in setting.each(grown, calls, "growing"):
        found[path.method].append(path)
    widths = [tuple(map(int, path.structure[-1].split("-"))) for path in found["firefly"]]
    controls = [("from scratch", s, replace(plan, widths=w)) for s, w in zip(setting.seeds, widths, strict=True)]
    controls += [("not grown", s, plan) for s in setting.seeds]
    for path in setting.each(grown, controls, "controls"):
        found[path.method].append(path)
    better = {
        "splitting": ("splitting descent", "Firefly beats splitting descent (points of accuracy)", SOURCE, ">"),
        "net2net": ("net2net", "Firefly beats Net2Net (points of accuracy)", SOURCE, ">"),
        "nash": ("nash", "Firefly is as accurate as NASH (points of accuracy)", SOURCE, ">="),
        "scratch": ("from scratch", "growing beats the grown network from scratch (points)", "control", ">"),
        "growing": ("not grown", "growing beats training the first network on (points)", "control", ">"),
    }
    cheaper = {
        "cost": ("firefly", "NASH computes more losses to grow than Firefly: ratio of samples",
                 "Firefly's rule of the paper takes three gradients per candidate; seconds are under `timings`"),
        "cost, authors' rule": ("firefly, authors' rule", "the same for the rule of the authors' code (one gradient "
                                "for all candidates)", ""),
    }  # fmt: skip
    findings = Findings(
        [
            *(
                claim(n, text, whose, ahead(found, "firefly", m), way, 0.0)
                for n, (m, text, whose, way) in better.items()
            ),
            *(
                claim(n, text, "Firefly, figure 4(b)", ratio(found, "nash", m, "samples"), ">", 1.0, note=note)
                for n, (m, text, note) in cheaper.items()
            ),
        ]
    )
    images.report(findings, found, "widths (first seed)", growths=plan.growths)
    picture = setting.out / "accuracy.png"
    curves = {}
    for name, paths in found.items():
        phases = slice(-1, None) if name in CONTROLS else slice(None)  # controls do not change their size
        size, wrong = ([p.parameters[phases] for p in paths], [[1 - a for a in p.accuracy[phases]] for p in paths])
        curves[name] = (np.median(size, 0).tolist(), (100 * np.median(wrong, 0)).tolist())
    points(
        picture,
        [(f"{plan.data}, median over seeds, a point per phase", curves)],
        x="parameters",
        y="test error (%)",
        log=True,
        joined=True,
    )
    findings.figures[picture.name] = "test error over parameters while networks widen; the controls at their end"
    return findings


def grown(method: str, seed: int, plan: Plan) -> Path:
    """One network, trained and grown; the controls only train, as long, with the plan's widths."""
    data, test = images.load(name=plan.data)
    model = compile(plan.start(tuple(data[0].shape[1:]), plan.widths, seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    path = Path(method, seed)
    for phase in range(plan.growths + 1):
        if phase and method in METHODS:
            counted, begun = Counted(), perf_counter()
            try:
                grow(method, model, optimizer, data, counted, 1000 * seed + phase, draw, plan)
            except Refused as refused:
                path.notes.append(str(refused))
            path.seconds += perf_counter() - begun
            path.samples += counted.samples
        images.train(model, optimizer, data, plan.epochs * (1 + (phase == plan.growths)), draw)
        path.note(model, test, "-".join(str(model.structure.groups[g].units) for g in sites(model.structure)))
    return path


def grow(
    method: str,
    model: CompiledNetwork,
    optimizer: torch.optim.Optimizer,
    data: images.Data,
    loss: Counted,
    seed: int,
    draw: torch.Generator,
    plan: Plan,
) -> None:
    """The model has 30 % more units."""
    network = model.network()
    units = math.ceil(SHARE * sum(network.groups[g].units for g in sites(network)))
    if method.startswith("firefly"):
        rule = "authors" if "authors" in method else "paper"
        budget = units - (rule == "authors")  # which keeps one more than asked for
        steps = math.ceil(len(data[1]) / 256) if plan.steps is None else plan.steps
        how = Firefly(budget, new=plan.new, rule=rule, steps=steps, seed=seed, batch_size=256, batches=2)
        model.grow(how.select(model, data, loss)(network), optimizer)
    elif method == "splitting descent":
        model.grow(SplittingDescent(units, eps=0.1).select(model, data, loss)(network), optimizer)
    elif method == "net2net":
        model.grow(net2net(network, seed)(network), optimizer)
    else:

        def trained() -> float:
            loss.samples += plan.tuning * len(data[1])
            return images.train(model, optimizer, data, plan.tuning, draw)

        random = np.random.default_rng(seed)
        best_neighbour(model, optimizer, [twins(random, units) for _ in range(NEIGHBOURS)], trained)


def net2net(network: Network, seed: int) -> Pass:
    """Every layer gets 30 % more units: copies of random ones, with a little noise."""
    return Sequence(
        tuple(
            WidenUnits(g, max(1, round(SHARE * network.groups[g].units)), seed=seed, noise=NOISE)
            for g in sites(network)
        )
    )


def twins(random: np.random.Generator, units: int) -> Way:
    """So many units, drawn from all layers, get a twin, with a little noise (NASH: network morphism of type II)."""

    def way(network: Network) -> Pass:
        everyone = [network.unit(g, i) for g in sites(network) for i in range(network.groups[g].units)]
        chosen = sorted(random.choice(len(everyone), min(units, len(everyone)), replace=False).tolist())
        by_group: dict[str, list[Unit]] = {}
        for i in chosen:
            by_group.setdefault(everyone[i].group, []).append(everyone[i])
        noise = int(random.integers(2**31))
        return Sequence(
            tuple(WidenUnits(g, len(u), seed=noise, copies=tuple(u), noise=NOISE) for g, u in by_group.items())
        )

    return way


def sites(network: Network) -> list[str]:
    return [site.name for site in Site.all(network)]
