"""Firefly, section 3 and appendix B.2: a convolutional network widened by 30 % per step.

Here on scikit-learn's digits, from three layers of four channels; on the way every method trains alike, and the
last phase is longer, as in the paper. Beside the paper's opponents stand the controls it lacks: the grown network
from scratch, and the first one trained for as long.
"""

from __future__ import annotations

import math
from time import perf_counter

import numpy as np
import torch

from irgrow.experiments import images
from irgrow.experiments.claims import claim
from irgrow.experiments.images import Counted, Path
from irgrow.experiments.neighbours import Way, best_neighbour
from irgrow.experiments.pictures import points
from irgrow.experiments.reproduce import Findings, MissingData, Setting
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
GROWTHS, EPOCHS, SHARE = 4, 8, 0.3
NEW, NEIGHBOURS, TUNING = 10, 8, 3  # new candidates per layer; neighbours of NASH, and the epochs each is trained
RATE, NOISE = 3e-3, 0.01
SOURCE = "Firefly, figure 4"


def run(setting: Setting, *, growths: int = GROWTHS, epochs: int = EPOCHS) -> Findings:
    """Every method on every seed, and the controls of Firefly's networks."""
    if setting.full:
        raise MissingData(
            "firefly-widen --full",
            "no VGG-19 on CIFAR-10 here",
            "hours on a GPU",
            do="use irgrow.Growth(how=irgrow.Firefly(...)) with your own loader",
        )
    calls = [(method, seed, growths, epochs) for seed in setting.seeds for method in METHODS]
    found = {method: [] for method in (*METHODS, *CONTROLS)}  # type: dict[str, list[Path]]
    for path in setting.each(grown, calls, "growing"):
        found[path.method].append(path)
    widths = [tuple(map(int, path.structure[-1].split("-"))) for path in found["firefly"]]
    controls = [("from scratch", s, growths, epochs, w) for s, w in zip(setting.seeds, widths, strict=True)]
    controls += [("not grown", s, growths, epochs, (4, 4, 4)) for s in setting.seeds]
    for path in setting.each(grown, controls, "controls"):
        found[path.method].append(path)
    last = {name: [100 * p.accuracy[-1] for p in paths] for name, paths in found.items()}
    cost = {name: [p.samples for p in paths] for name, paths in found.items()}

    def ahead(other: str) -> list[float]:
        return [a - b for a, b in zip(last["firefly"], last[other], strict=True)]

    findings = Findings(
        [
            claim(
                "splitting", "Firefly beats splitting descent (points)", SOURCE, ahead("splitting descent"), ">", 0.0
            ),
            claim("net2net", "Firefly beats Net2Net (points of accuracy)", SOURCE, ahead("net2net"), ">", 0.0),
            claim("nash", "Firefly is as accurate as NASH (points of accuracy)", SOURCE, ahead("nash"), ">=", 0.0),
            claim(
                "cost",
                "NASH computes more losses to grow than Firefly: ratio of samples",
                "Firefly, figure 4(b)",
                [a / b for a, b in zip(cost["nash"], cost["firefly"], strict=True)],
                ">",
                1.0,
                note="Firefly's rule of the paper takes three gradients per candidate; seconds are under `timings`",
            ),
            claim(
                "cost, authors' rule",
                "the same for the rule of the authors' code (one gradient for all candidates)",
                "Firefly, figure 4(b)",
                [a / b for a, b in zip(cost["nash"], cost["firefly, authors' rule"], strict=True)],
                ">",
                1.0,
            ),
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
        ("method", "accuracy %", "lowest", "highest", "parameters (median)", "widths (first seed)", "samples to grow"),
        [
            (
                name,
                float(np.median(last[name])),
                min(last[name]),
                max(last[name]),
                int(np.median([p.parameters[-1] for p in paths])),
                paths[0].structure[-1],
                int(np.median(cost[name])),
            )
            for name, paths in found.items()
        ],
        {
            n: {"accuracy": [p.accuracy for p in ps], "parameters": [p.parameters for p in ps]}
            for n, ps in found.items()
        },
        timings={"seconds per growth": {n: float(np.median([p.seconds for p in found[n]])) / growths for n in METHODS}},
    )
    for name in METHODS:
        notes = [note for path in found[name] for note in path.notes]
        if notes:
            findings.notes.append(f"{name}: {len(notes)} growths found nothing: {notes[0]}")
    picture = setting.out / "accuracy.png"
    curves = {
        name: (
            np.median([p.parameters for p in paths], 0).tolist(),
            (100 * np.median([p.accuracy for p in paths], 0)).tolist(),
        )
        for name, paths in found.items()
        if name != "not grown"
    }
    points(
        picture,
        [("digits, median over seeds, a point per phase", curves)],
        x="parameters",
        y="test accuracy (%)",
        joined=True,
    )
    findings.figures[picture.name] = "test accuracy over parameters while networks widen"
    return findings


def grown(method: str, seed: int, growths: int, epochs: int, widths: tuple[int, ...] = (4, 4, 4)) -> Path:
    """One network, trained and grown; `from scratch` begins with these widths and trains as long."""
    data, test = images.load()
    model = compile(cnn((1, 8, 8), widths, 10, seed=seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    draw = torch.Generator().manual_seed(seed)
    path = Path(method, seed)
    for phase in range(growths + 1):
        if phase and method in METHODS:
            counted, begun = Counted(), perf_counter()
            try:
                grow(method, model, optimizer, data, counted, 1000 * seed + phase, draw)
            except Refused as refused:
                path.notes.append(str(refused))
            path.seconds += perf_counter() - begun
            path.samples += counted.samples
        images.train(model, optimizer, data, epochs * (1 + (phase == growths)), draw)
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
) -> None:
    """The model has 30 % more units."""
    network = model.network()
    units = math.ceil(SHARE * sum(network.groups[g].units for g in sites(network)))
    if method.startswith("firefly"):
        rule = "authors" if "authors" in method else "paper"
        budget = units - (rule == "authors")  # which keeps one more than asked for
        how = Firefly(budget, new=NEW, rule=rule, steps=50, seed=seed, batch_size=256, batches=2)
        model.grow(how.select(model, data, loss)(network), optimizer)
    elif method == "splitting descent":
        model.grow(SplittingDescent(units, eps=0.1).select(model, data, loss)(network), optimizer)
    elif method == "net2net":
        model.grow(net2net(network, seed)(network), optimizer)
    else:

        def trained() -> float:
            loss.samples += TUNING * len(data[1])
            return images.train(model, optimizer, data, TUNING, draw)

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
