"""Growing schedules on images (GradMax, section 4.2): VGG-11, WRN and MobileNet-v1 from a quarter of their width.

By default thin forms of the three on 8x8 digits: the same kinds of layers (residual blocks of which only the first
convolution grows, depthwise convolutions that grow as identity), fewer of them. Every growth adds to all sites in
proportion to their target; SGD with momentum 0.9 and a cosine. As in the paper VGG and WRN have no batch norm but in
table 2, and new weights have half the mean norm of the existing ones (scale 0.5). MobileNet has one: the paper does
not say so, but its 70.8 % at full width are what MobileNet-v1 reaches with it.

    small, big            the seed and the target, trained alike
    random, gradmax       fan-in drawn with norm eps, fan-out drawn or from the SVD
    firefly               Firefly-Opt: fan-in (eps of the mean norm) and fan-out minimise the loss
    inverse ...           fan-out zero (for Firefly eps of the mean norm), and fan-in drawn or optimised

`full`: VGG-11 and WRN-28-1 on CIFAR-10, WRN-28-1 on CIFAR-100 (batch 128, 200 epochs, rates 0.05 and 0.1), MobileNet
on ImageNet (batch 512); table 2 on CIFAR-10, the sweeps of figure 5 on ImageNet. Not stated: when networks grow (12
times in the first half here; MobileNet every 5000 steps, which figure 5 finds best), weight decay (1e-4), the steps
of Firefly-Opt and inverse GradMax (100), epochs and rate on ImageNet (90, 0.1), the start of networks without batch
norm (He; residual branches divided by the root of their number), and augmentation (none on CIFAR; photographs are
cropped and mirrored).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.experiments import full_data, images
from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.images import Layers, square
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.experiments.teacher_student import RandomFanOut
from irgrow.growth.fit import accuracy
from irgrow.growth.methods import GradMax, Method, NeedsModel, Random
from irgrow.growth.methods.with_model import propose
from irgrow.growth.optimised import FireflyOpt, InverseGradMax
from irgrow.growth.probe import probe
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.pattern import Identity
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork, compile

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """One way to train. `scale` of new fan-outs, `eps` of new fan-ins; growths evenly until `until` of the steps."""

    network: str = "vgg"
    method: str = "gradmax"
    data: str = "digits"
    width: int = 8  # of the first layers at full width; a quarter must leave depthwise layers two channels
    share: float = 0.25  # of the target's width, at the start
    growths: int = 4
    until: float = 0.5
    epochs: int = 16
    batch_size: int = 128
    rate: float = 0.05
    eps: float = 1e-4
    scale: float = 0.5
    norm: bool = False
    steps: int = 10  # of what Firefly-Opt and inverse GradMax optimise
    whole: bool = False  # the paper's depth


def vgg(layers: Layers, width: int, depth: int) -> None:
    """Convolutions of width, 2, 4, 4, 8, 8, 8, 8 times it, a pool wherever VGG-11 has one and there is room."""
    room = int(math.log2(layers.shape[1])) - 1
    images.vgg(layers, [f * width for f in (1, 2, 4, 4, 8, 8, 8, 8)[:depth]], (0, 1, 3, 5)[:room])


def wrn(layers: Layers, width: int, depth: int) -> None:
    """Three stages of residual blocks; only the first convolution of a block is thin, so that skips fit."""
    layers.conv("stem", width, grows=False)
    blocks = max(1, (depth - 4) // 6)
    for stage in range(3):
        channels = width * 2**stage
        for n in range(blocks):
            before, shape, stride = layers.last, layers.shape, 2 if stage and not n else 1
            name = f"{stage + 1}{chr(97 + n)}"
            layers.conv(f"inside{name}", channels, stride=stride)
            layers.conv(f"block{name}", channels, grows=False, gain=(3 * blocks) ** -0.5)
            if stride == 1 and shape[0] == channels:
                layers.builder.connect(before, f"block{name}", Identity())
            else:
                layers.join(before, f"block{name}", square(1, stride), shape[0], channels, 0.5**0.5)


def mobilenet(layers: Layers, width: int, depth: int) -> None:
    """A stem, then depthwise 3x3 and pointwise 1x1 convolutions; the width doubles where the stride is 2."""
    whole = layers.shape[1] > 64  # photographs: MobileNet-v1's own strides
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1) if whole else (1, 2) * 7
    layers.conv("stem", width, stride=2 if whole else 1)
    channels = width
    for n, wanted in enumerate(strides[:depth]):
        stride = wanted if layers.shape[1] > 2 else 1
        units = layers.shape[0]
        layers.add(f"depthwise{n + 1}", units, square(3, stride, groups=units))
        channels *= 2 if whole and not n else stride
        layers.conv(f"pointwise{n + 1}", channels, kernel=1)


NETWORKS: dict[str, tuple[Callable[[Layers, int, int], None], int, int]] = {  # with depths: thin, the paper's
    "vgg": (vgg, 5, 8),
    "wrn": (wrn, 10, 28),
    "mobilenet": (mobilenet, 4, 13),
}
METHODS: dict[str, Callable[[int, int, Plan], Method | NeedsModel | None]] = {
    "small": lambda units, seed, p: None,
    "big": lambda units, seed, p: None,
    "random": lambda units, seed, p: RandomFanOut(units, seed=seed, eps=p.eps, scale=p.scale),
    "firefly": lambda units, seed, p: FireflyOpt(units, steps=p.steps, eps=p.scale, scale=p.eps, seed=seed),
    "gradmax": lambda units, seed, p: GradMax(units, eps=p.eps, scale=p.scale, seed=seed),
    "inverse random": lambda units, seed, p: Random(units, seed=seed),
    "inverse firefly": lambda units, seed, p: FireflyOpt(units, steps=p.steps, eps=p.eps, scale=p.scale, seed=seed),
    "inverse gradmax": lambda units, seed, p: InverseGradMax(units, steps=p.steps, scale=p.scale, seed=seed),
}
TABLE_1, INVERSE = tuple(METHODS)[:5], tuple(METHODS)[5:]


def built(plan: Plan, image: tuple[int, ...], seed: int, classes: int = 10) -> tuple[Network, dict[str, int]]:
    """The network that training starts with, and the sites that grow with their target widths."""
    layers = Layers(image, share=1.0 if plan.method == "big" else plan.share, norm=plan.norm, seed=seed)
    make, thin, deep = NETWORKS[plan.network]
    make(layers, plan.width, deep if plan.whole else thin)
    return layers.done(classes), layers.sites


class Stored:
    """Images in memory."""

    def __init__(self, name: str) -> None:
        self.train, self.test = images.load(name=name)
        self.image, self.classes = tuple(self.train[0].shape[1:]), int(self.train[1].max()) + 1

    def steps(self, batch_size: int) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.train[1]) / batch_size)

    def epoch(self, batch_size: int, draw: torch.Generator) -> Iterator[Split]:
        """Every image once."""
        x, y = self.train
        for index in torch.randperm(len(y), generator=draw).split(batch_size):
            yield x[index], y[index]


class Streamed:
    """ImageNet, read while training goes on."""

    def __init__(self, batch_size: int) -> None:
        self.train, self.test = full_data.imagenet(batch_size)
        self.image, self.classes = (3, self.train.side, self.train.side), self.train.classes

    def steps(self, batch_size: int) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.train) / batch_size)

    def epoch(self, batch_size: int, draw: torch.Generator) -> Iterator[Split]:
        """Every photograph once."""
        seed = int(torch.randint(2**31, (), generator=draw))
        return iter(replace(self.train, batch_size=batch_size, seed=seed))


def load(plan: Plan) -> Stored | Streamed:
    """The plan's data; MissingData says where to put it."""
    return Streamed(plan.batch_size) if plan.data == "ImageNet" else Stored(plan.data)


def run_one(plan: Plan, seed: int) -> dict[str, Any]:
    """One training run; deterministic. Loss per epoch, parameters, test accuracy, growths that were refused.

    jumps   per growth: the loss of the batch it saw, of the next one (after the first step of the new units), and the
            norm of new fan-ins after that step / before it (median over units and sites)
    """
    data = load(plan)
    network, targets = built(plan, data.image, seed, data.classes)
    model = compile(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.rate, momentum=0.9, weight_decay=1e-4)
    draw = torch.Generator().manual_seed(seed)
    steps = plan.epochs * data.steps(plan.batch_size)
    moments = [round(steps * plan.until * (n + 1) / plan.growths) for n in range(plan.growths)]
    step, losses, parameters, notes, jumps = 0, [], [], list[str](), list[list[float]]()
    for _ in range(plan.epochs):
        total, count = 0.0, 0
        for x, y in data.epoch(plan.batch_size, draw):
            fresh: dict[str, int] = {}
            for at, moment in enumerate(moments):
                if moment == step and plan.method not in ("small", "big"):
                    fresh = {site: model.structure.groups[site].units for site in targets}
                    notes += _grow(model, optimizer, plan, targets, plan.growths - at, (x, y), seed)
            optimizer.param_groups[0]["lr"] = plan.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if jumps and len(jumps[-1]) == 2:
                jumps[-1].insert(1, loss.item())
            before = _fan_in(model, fresh)
            optimizer.step()
            if fresh:
                jumps.append([loss.item(), _fan_in(model, fresh) / max(before, 1e-30)])
            total, count, step = total + loss.item() * len(y), count + len(y), step + 1
        losses.append(total / count)
        parameters.append(model.structure.counts.parameters)
    held = data.test
    return {
        "losses": losses,
        "parameters": parameters,
        "accuracy": accuracy(model, held) or 0.0,
        "notes": notes,
        "jumps": [jump for jump in jumps if len(jump) == 3],  # a growth in front of the last step has no next loss
    }


def _fan_in(model: CompiledNetwork, old: dict[str, int]) -> float:
    """The median norm of the fan-ins of units behind the `old` first ones of each site; 0 if there is none."""
    norms = [
        torch.cat([model.tensors()[b.tensor].detach()[units:].flatten(1) for b in model.structure.entering(site)], 1)
        .norm(dim=1)
        .double()
        for site, units in old.items()
        if model.structure.groups[site].units > units
    ]
    return float(torch.cat(norms).median()) if norms else 0.0


def _grow(
    model: CompiledNetwork, optimizer: Any, plan: Plan, targets: dict[str, int], left: int, batch: Split, seed: int
) -> list[str]:
    """All sites have their share of what is missing, with one run over the batch for each; refusals as text.

    Statistics are those of a training step: with a batch norm, of the batch's mean and variance.
    """
    notes = []
    for site, width in targets.items():
        units = math.ceil((width - model.structure.groups[site].units) / left)
        if units > 0:
            how = METHODS[plan.method](units, 1000 * seed + left, plan)
            assert how is not None
            try:
                mode = "train" if plan.norm else "eval"
                found = probe(model, batch, F.cross_entropy, sites=[site], want=how.needs, mode=mode)[site]
                model.grow(AddUnits(propose(how, found, model, batch, F.cross_entropy))(model.structure), optimizer)
            except Refused as refused:
                notes.append(f"{site}: {refused}")
    model.train()
    return notes


# ---- the experiment -------------------------------------------------------------------------------------------

SWEPT = "mobilenet"
ARMS = {  # of figure 5, on MobileNet with GradMax
    "until 0.25 of training": {"until": 0.25},
    "until 0.75 of training": {"until": 0.75},
    "1 growth": {"growths": 1},
    "8 growths": {"growths": 8},
    "eps 1e-15": {"eps": 1e-15},
    "eps 0.01": {"eps": 1e-2},
    "scale 0.1": {"scale": 0.1},
    "scale 1": {"scale": 1.0},
    "scale 2": {"scale": 2.0},
}
NORM = "vgg BN"  # ours: what appendix C warns of, and its two remedies
REMEDIES = {
    "gradmax, scale 0.01": {"method": "gradmax", "scale": 0.01},
    "inverse gradmax": {"method": "inverse gradmax"},
}


def bases(full: bool) -> dict[str, Plan]:
    """The networks of table 1, by name."""
    if not full:
        return {"vgg": Plan("vgg"), "wrn": Plan("wrn", rate=0.1), "mobilenet": Plan("mobilenet", norm=True)}
    cifar = Plan(epochs=200, growths=12, steps=100, whole=True)
    wide = replace(cifar, network="wrn", width=16, rate=0.1)
    photographs = replace(
        cifar, network="mobilenet", data="ImageNet", width=32, norm=True, epochs=90, batch_size=512, rate=0.1,
        until=12 * 5000 / (90 * 2503),
    )  # fmt: skip
    return {
        "vgg": replace(cifar, data="CIFAR10", width=64),
        "wrn": replace(wide, data="CIFAR10"),
        "wrn CIFAR-100": replace(wide, data="CIFAR100"),
        "mobilenet": photographs,
    }


def plans(base: dict[str, Plan]) -> dict[str, Plan]:
    """All runs by name: table 1, table 2 on WRN, the sweeps of figure 5 on MobileNet, and VGG with batch norm."""
    found = {f"{net}, {m}": replace(plan, method=m) for net, plan in base.items() for m in TABLE_1}
    if "wrn" in base:
        normed = replace(base["wrn"], norm=True)
        found |= {f"wrn, {m}": replace(base["wrn"], method=m) for m in INVERSE}
        found |= {f"wrn BN, {m}": replace(normed, method=m) for m in METHODS}
    if "vgg" in base:
        normed = replace(base["vgg"], norm=True)
        found |= {f"{NORM}, {m}": replace(normed, method=m) for m in ("small", "big", "random", "gradmax")}
        found |= {f"{NORM}, {name}": replace(normed, **how) for name, how in REMEDIES.items()}  # type: ignore[arg-type]
    if SWEPT in base:
        found |= {name: replace(base[SWEPT], **how) for name, how in ARMS.items()}  # type: ignore[arg-type]
    return found


def run(setting: Setting, base: dict[str, Plan] | None = None) -> Findings:
    """Every plan from every seed."""
    base = base or bases(setting.full)
    by_data = {plan.data: plan for plan in base.values()}
    present, missing = full_data.those_present(by_data, lambda name: load(by_data[name]))
    base = {name: plan for name, plan in base.items() if plan.data in present}
    arms = plans(base)
    done = iter(setting.each(run_one, [(p, s) for p in arms.values() for s in setting.seeds], "networks"))
    runs = {name: [next(done) for _ in setting.seeds] for name in arms}
    findings = Findings(_claims(base, runs), ("run", "parameters", "accuracy", "lowest", "highest", "training loss"))
    for name, rs in runs.items():
        right = [r["accuracy"] for r in rs]
        last = median(r["losses"][-1] for r in rs)
        findings.rows.append((name, rs[0]["parameters"][-1], median(right), min(right), max(right), last))
        findings.notes += [f"{name}: {r['notes'][0]}" for r in rs[:1] if r["notes"]]
    findings.data = {
        name: {
            "accuracy": [r["accuracy"] for r in rs],
            "losses": [_short(r["losses"]) for r in rs],
            "jumps": [[_short(jump) for jump in r["jumps"]] for r in rs],
        }
        for name, rs in runs.items()
    }
    findings.notes += [
        "GradMax, figure 5: see the sweeps in the table; the base grows until 0.5, 4 times, with eps 1e-4, scale 0.5",
        *missing,
    ]
    _pictures(setting, base, runs, findings)
    return findings


def _short(values: Iterable[float]) -> list[float]:
    return [float(f"{v:.5g}") for v in values]


def _pictures(
    setting: Setting, base: dict[str, Plan], runs: dict[str, list[dict[str, Any]]], findings: Findings
) -> None:
    from irgrow.experiments import pictures

    panels = [(net, net, TABLE_1) for net in base]
    if "wrn" in base:
        panels.append(("wrn BN", "wrn with batch norm", tuple(METHODS)))
    if "vgg" in base:
        panels.append((NORM, "vgg with batch norm", ("small", "big", "random", "gradmax", *REMEDIES)))
    shown = []
    for net, title, methods in panels:
        curves = {m: [r["losses"] for r in runs[f"{net}, {m}"]] for m in methods}
        shown.append((title, {m: (range(1, len(c[0]) + 1), c) for m, c in curves.items()}))
    pictures.lines(setting.out / "training.png", shown, x="epoch", y="training loss", log=True)
    findings.figures = {"training.png": "Training loss: medians, and the middle half of the seeds"}
    if SWEPT in base:
        swept = {n: [r["accuracy"] for r in runs[n]] for n in (f"{SWEPT}, gradmax", *ARMS)}
        title = "MobileNet, GradMax: schedule, epsilon and scale"
        pictures.bars(setting.out / "sweeps.png", title, swept, x="test accuracy")
        findings.figures["sweeps.png"] = "Schedule, epsilon and scale"


PRINTED = {  # test accuracy of GradMax against Random and Firefly
    "vgg": ("84.4 against 83.8 %", "84.4 against 84.0 %"),
    "wrn": ("91.1 against 90.6 %", "91.1 against 90.8 %"),
    "wrn CIFAR-100": ("66.8 against 66.7 %", "66.8 against 66.5 %"),
    "mobilenet": ("68.6 against 66.9 % (ImageNet)", "68.6 against 66.4 % (ImageNet)"),
    "wrn inverse": ("92.4 against 92.1 %", "92.4 against 92.2 %"),
    "wrn BN": ("93.0 against 92.9 %", "93.0 against 92.9 %"),
    "wrn BN inverse": ("92.9 against 92.8 %", "92.9 against 92.8 %"),
}


def _claims(base: dict[str, Plan], runs: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    def apart(net: str, above: str, below: str) -> list[float]:
        pairs = zip(runs[f"{net}, {above}"], runs[f"{net}, {below}"], strict=True)
        return [a["accuracy"] - b["accuracy"] for a, b in pairs]

    def more(net: str, above: str, below: str, source: str, paper: str) -> Claim:
        text = f"{net}: test accuracy of {above} - {below}"
        return claim(f"{net}-{above}-{below}", text, source, apart(net, above, below), ">", 0.0, paper=paper)

    many = []
    for net in base:
        random, firefly = PRINTED[net]
        for below, paper in (("random", random), ("firefly", firefly), ("small", "higher")):
            many.append(more(net, "gradmax", below, "GradMax, table 1", paper))
        many.append(more(net, "big", "gradmax", "GradMax, table 1", "higher"))
    if "wrn" in base:
        for net, way in (("wrn", "inverse "), ("wrn BN", ""), ("wrn BN", "inverse ")):
            random, firefly = PRINTED[f"{net} {way}".strip()]
            for below, paper in (("random", random), ("firefly", firefly)):
                many.append(more(net, f"{way}gradmax", f"{way}{below}", "GradMax, table 2", paper))
    return many + (_norm_claims(runs, more) if "vgg" in base else [])


def _norm_claims(runs: dict[str, list[dict[str, Any]]], more: Callable[..., Claim]) -> list[Claim]:
    """What a batch norm makes of new units whose fan-in is small."""

    def jump(name: str) -> list[float]:
        return [median(after / before for before, after, _ in r["jumps"]) for r in runs[name]]

    grown = runs[f"{NORM}, gradmax"]
    steps = [median(j[2] for j in r["jumps"]) for r in grown]
    plain = median(median(j[2] for j in r["jumps"]) for r in runs["vgg, gradmax"])
    source = "GradMax, appendix C"
    why = (
        f"a batch norm divides by sqrt(variance + 1e-5): it multiplies the gradient of a fan-in of norm eps by up to "
        f"316, the first step makes the fan-in {median(steps):.3g} times as long (without batch norm {plain:.3g} "
        f"times), and from then on the unit has variance 1 whatever eps was, in front of a fan-out that has learned "
        f"nothing; appendix C's remedies are small or zero fan-outs"
    )
    return [
        claim("norm-step", f"{NORM}: length of GradMax's new fan-ins after one step / before", source, steps, ">", 10.0,
              paper="scaled to unit variance", note=why),
        claim("norm-jump", f"{NORM}: loss one step after a GradMax growth / before", source,
              jump(f"{NORM}, gradmax"), ">", 1.0, paper="can disrupt learning"),
        claim("plain-jump", "vgg without batch norm: the same", source, jump("vgg, gradmax"), "<=", 1.1),
        more(NORM, "gradmax, scale 0.01", "gradmax", source, "useful"),
        more(NORM, "inverse gradmax", "gradmax", source, "preferable"),
    ]  # fmt: skip
