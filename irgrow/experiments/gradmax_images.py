"""Growing schedules on images (GradMax, section 4.2): VGG-11, WRN and MobileNet-v1 from a quarter of their width.

By default thin forms of the three on 8x8 digits: the same kinds of layers (batch norm, residual blocks of which only
the first convolution grows, depthwise convolutions that grow as identity), fewer of them. Every growth adds to all
sites in proportion to their target; SGD with momentum 0.9 and a cosine. `full`: CIFAR-10, wider and longer.

    small, big            the seed and the target, trained alike
    random, gradmax       fan-in of norm eps along the first gradient step, fan-out drawn or from the SVD
    inverse random        fan-in drawn, fan-out zero
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import digits
from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.experiments.teacher_student import RandomFanOut
from irgrow.growth.fit import accuracy
from irgrow.growth.methods import GradMax, Method, Random
from irgrow.growth.probe import probe
from irgrow.ir.builder import Builder
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.pattern import Conv2d, Identity, Pattern, Pool2d
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import compile

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """One way to train. `scale` of new fan-outs, `eps` of new fan-ins; growths evenly until `until` of the steps."""

    network: str = "vgg"
    method: str = "gradmax"
    width: int = 8  # of the first layers at full width; a quarter must leave depthwise layers two channels
    share: float = 0.25  # of the target's width, at the start
    growths: int = 4
    until: float = 0.5
    epochs: int = 16
    batch_size: int = 128
    rate: float = 0.05
    eps: float = 1e-4
    scale: float = 1.0
    norm: bool = True


class _Layers:
    """Builds networks of convolutions; every group that may grow has a width of `share`."""

    def __init__(self, image: tuple[int, ...], share: float, norm: bool, seed: int) -> None:
        self.builder = Builder(seed=seed)
        self.share, self.norm = share, "batch" if norm else None
        self.last, self.shape = self.builder.input("x", image), image
        self.sites: dict[str, int] = {}  # with their width in the target

    def thin(self, width: int) -> int:
        return max(1, round(self.share * width))

    def conv(self, name: str, width: int, *, stride: int = 1, grows: bool = True, **more: Any) -> None:
        """A 3x3 (`kernel`) convolution, batch norm, ReLU."""
        units = self.thin(width) if grows else width
        self.add(name, units, _filter(more.pop("kernel", 3), stride, **more))
        if grows:
            self.sites[name] = width

    def add(self, name: str, units: int, pattern: Pattern) -> None:
        shape = (units, *pattern.output(self.shape))  # type: ignore[attr-defined]
        self.builder.group(name, shape, activation="relu", norm=self.norm, bias=self.norm is None)
        self.builder.connect(self.last, name, pattern)
        self.last, self.shape = name, shape

    def pool(self, name: str, side: int, *, mean: bool = False) -> None:
        window = Pool2d((side, side), (side, side))
        shape = (self.shape[0], *window.output(self.shape))
        self.builder.group(name, shape, aggregation="sum" if mean else "max")
        self.builder.connect(self.last, name, window, 1.0 / side**2 if mean else 1.0, trainable=False)
        self.last, self.shape = name, shape

    def done(self) -> tuple[Network, dict[str, int]]:
        self.pool("mean", self.shape[1], mean=True)
        self.builder.output("y", 10, bias=True)
        self.builder.connect(self.last, "y")
        return self.builder.build(), self.sites


def _filter(kernel: int, stride: int, groups: int = 1) -> Conv2d:
    return Conv2d((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), channel_groups=groups)


def vgg(layers: _Layers, width: int, depth: int) -> None:
    """Convolutions of width, 2, 4, 4, 8, 8, 8, 8 times it, a pool wherever VGG-11 has one and there is room."""
    factors, pooled = (1, 2, 4, 4, 8, 8, 8, 8)[:depth], (0, 1, 3, 5)
    for n, factor in enumerate(factors):
        layers.conv(f"conv{n + 1}", factor * width)
        if n in pooled and layers.shape[1] >= 4:
            layers.pool(f"pool{n + 1}", 2)


def wrn(layers: _Layers, width: int, depth: int) -> None:
    """Three stages of residual blocks; only the first convolution of a block is thin, so that skips fit."""
    layers.conv("stem", width, grows=False)
    blocks = max(1, (depth - 4) // 6)
    for stage in range(3):
        channels = width * 2**stage
        for n in range(blocks):
            before, shape, stride = layers.last, layers.shape, 2 if stage and not n else 1
            name = f"{stage + 1}{chr(97 + n)}"
            layers.conv(f"inside{name}", channels, stride=stride)
            layers.conv(f"block{name}", channels, grows=False)
            same = stride == 1 and shape[0] == channels
            layers.builder.connect(before, f"block{name}", Identity() if same else _filter(1, stride))


def mobilenet(layers: _Layers, width: int, depth: int) -> None:
    """A stem, then depthwise 3x3 and pointwise 1x1 convolutions; the width doubles where the stride is 2."""
    layers.conv("stem", width)
    channels = width
    for n in range(depth):
        stride = 2 if n % 2 and layers.shape[1] > 2 else 1
        units = layers.shape[0]
        layers.add(f"depthwise{n + 1}", units, _filter(3, stride, groups=units))
        channels *= stride
        layers.conv(f"pointwise{n + 1}", channels, kernel=1)


NETWORKS: dict[str, tuple[Callable[[_Layers, int, int], None], int, int]] = {  # with depths: thin, full
    "vgg": (vgg, 5, 8),
    "wrn": (wrn, 10, 28),
    "mobilenet": (mobilenet, 4, 13),
}
METHODS: dict[str, Callable[[int, int, Plan], Method | None]] = {
    "small": lambda units, seed, plan: None,
    "big": lambda units, seed, plan: None,
    "random": lambda units, seed, plan: RandomFanOut(units, seed=seed, kick=plan.eps),
    "gradmax": lambda units, seed, plan: GradMax(units, kick=plan.eps, scale=plan.scale, seed=seed),
    "inverse random": lambda units, seed, plan: Random(units, seed=seed),
}


def built(plan: Plan, image: tuple[int, ...], seed: int, full: bool = False) -> tuple[Network, dict[str, int]]:
    """The network that training starts with, and the sites that grow with their target widths."""
    layers = _Layers(image, 1.0 if plan.method == "big" else plan.share, plan.norm, seed)
    make, thin, deep = NETWORKS[plan.network]
    make(layers, plan.width, deep if full else thin)
    return layers.done()


def load(full: bool) -> tuple[Split, Split]:
    """Digits of 8x8 pixels, or CIFAR-10; MissingData says where to put it."""
    if full:
        from irgrow.experiments.full_data import images

        return images("CIFAR10")
    (x, y), (x_test, y_test) = digits.load()
    return (x.reshape(-1, 1, 8, 8), y), (x_test.reshape(-1, 1, 8, 8), y_test)


def run_one(plan: Plan, seed: int, full: bool = False) -> dict[str, Any]:
    """One training run; deterministic. Loss per epoch, parameters, test accuracy, growths that were refused."""
    (x, y), test = load(full)
    network, targets = built(plan, tuple(x.shape[1:]), seed, full)
    model = compile(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.rate, momentum=0.9, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(seed)
    steps = plan.epochs * math.ceil(len(y) / plan.batch_size)
    moments = [round(steps * plan.until * (n + 1) / plan.growths) for n in range(plan.growths)]
    step, losses, parameters, notes = 0, [], [], []
    for _ in range(plan.epochs):
        total = 0.0
        for index in torch.randperm(len(y), generator=draw).split(plan.batch_size):
            for at, moment in enumerate(moments):
                if moment == step and plan.method not in ("small", "big"):
                    notes += _grow(model, optimizer, plan, targets, plan.growths - at, (x[index], y[index]), seed)
            optimizer.param_groups[0]["lr"] = plan.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[index]), y[index])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
            step += 1
        losses.append(total / len(y))
        parameters.append(model.structure.counts.parameters)
    return {"losses": losses, "parameters": parameters, "accuracy": accuracy(model, test) or 0.0, "notes": notes}


def _grow(
    model: Any, optimizer: Any, plan: Plan, targets: dict[str, int], left: int, batch: Split, seed: int
) -> list[str]:
    """All sites have their share of what is missing, with one run over the batch for each; refusals as text."""
    notes = []
    for site, width in targets.items():
        units = math.ceil((width - model.structure.groups[site].units) / left)
        if units > 0:
            how = METHODS[plan.method](units, 1000 * seed + left, plan)
            assert how is not None
            try:
                found = probe(model, batch, F.cross_entropy, sites=[site], want=how.needs)[site]
                model.grow(AddUnits(how.propose(found))(model.structure), optimizer)
            except Refused as refused:
                notes.append(f"{site}: {refused}")
    model.train()
    return notes


# ---- the experiment -------------------------------------------------------------------------------------------


def plans(base: Plan) -> dict[str, Plan]:
    """All runs by name: the methods on the three networks, and the sweeps of figure 5 on MobileNet."""
    found = {f"{net}, {m}": replace(base, network=net, method=m) for net in NETWORKS for m in METHODS}
    mobile = replace(base, network="mobilenet")
    found |= {f"until {u:g} of training": replace(mobile, until=u) for u in (0.25, 0.75)}
    found |= {f"{n} growths": replace(mobile, growths=n) for n in (1, 8)}
    found |= {f"eps {e:g}": replace(mobile, eps=e) for e in (1e-15, 1e-2)}
    return found | {f"scale {s:g}": replace(mobile, scale=s) for s in (0.1, 0.5, 2.0)}


def run(setting: Setting, base: Plan | None = None) -> Findings:
    """Every plan from every seed; `full`: 16 channels and 200 epochs on CIFAR-10."""
    base = base or (Plan(width=16, epochs=200, growths=12) if setting.full else Plan())
    load(setting.full)
    arms = plans(base)
    done = iter(setting.each(run_one, [(p, s, setting.full) for p in arms.values() for s in setting.seeds], "networks"))
    runs = {name: [next(done) for _ in setting.seeds] for name in arms}
    findings = Findings(_claims(runs), ("run", "parameters", "accuracy", "lowest", "highest", "training loss"))
    for name, rs in runs.items():
        right = [r["accuracy"] for r in rs]
        last = median(r["losses"][-1] for r in rs)
        findings.rows.append((name, rs[0]["parameters"][-1], median(right), min(right), max(right), last))
        findings.notes += [f"{name}: {r['notes'][0]}" for r in rs[:1] if r["notes"]]
    findings.data = {
        name: {
            "accuracy": [r["accuracy"] for r in rs],
            "losses": [[float(f"{v:.5g}") for v in r["losses"]] for r in rs],
        }
        for name, rs in runs.items()
    }
    findings.notes.append(
        "GradMax, figure 5: see the sweeps in the table (growing until 0.5, 4 growths, eps 1e-4, scale 1 are the base)"
    )
    from irgrow.experiments import pictures

    epochs = list(range(1, base.epochs + 1))
    shown = [(net, {m: (epochs, [r["losses"] for r in runs[f"{net}, {m}"]]) for m in METHODS}) for net in NETWORKS]
    pictures.lines(setting.out / "training.png", shown, x="epoch", y="training loss", log=True)
    sweeps = {n: [r["accuracy"] for r in rs] for n, rs in runs.items() if n == "mobilenet, gradmax" or "," not in n}
    pictures.bars(
        setting.out / "sweeps.png", "MobileNet, GradMax: schedule, epsilon and scale", sweeps, y="test accuracy"
    )
    findings.figures = {
        "training.png": "Training loss: medians, and the middle half of the seeds",
        "sweeps.png": "Schedule, epsilon and scale",
    }
    return findings


def _claims(runs: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    printed = {
        "vgg": "84.4 against 83.8 % (VGG11, CIFAR-10)",
        "wrn": "93.0 against 92.9 % (WRN-28-1 with BN, CIFAR-10)",
        "mobilenet": "68.6 against 66.9 % (MobileNet-V1, ImageNet)",
    }

    def apart(net: str, above: str, below: str) -> list[float]:
        pairs = zip(runs[f"{net}, {above}"], runs[f"{net}, {below}"], strict=True)
        return [a["accuracy"] - b["accuracy"] for a, b in pairs]

    many = []
    for net in NETWORKS:
        source = "GradMax, tables 1 and 2"
        note = "digits of 8x8 pixels and thin networks, not the paper's data"
        text = f"{net}: test accuracy of GradMax - Random"
        many.append(
            claim(
                f"{net}-random", text, source, apart(net, "gradmax", "random"), ">", 0.0, paper=printed[net], note=note
            )
        )
        text = f"{net}: test accuracy of GradMax - Small"
        many.append(claim(f"{net}-small", text, source, apart(net, "gradmax", "small"), ">", 0.0, paper="higher"))
        text = f"{net}: test accuracy of Big - GradMax"
        many.append(claim(f"{net}-big", text, source, apart(net, "big", "gradmax"), ">", 0.0, paper="higher"))
    return many
