"""A convolutional network is trained, becomes a dense one at some epoch (its relax time), and is trained on.

    CNN        trained at the large rate; its snapshots at the relax times are embedded exactly: eFCN
    eFCN       every weight free, trained on at the small rate
    FCN        the eFCN's structure from a fresh start; the better of both rates, at its best epoch
    continued  the control the paper lacks: the CNN itself, trained on from the same snapshot at the small rate

By default on scikit-learn's 8 x 8 digits, each somewhere on a 10 x 10 canvas (the place is what a convolution knows
how to ignore), standardised; three convolutions of 8 channels. Plain SGD throughout, no augmentation.
Source: d'Ascoli et al., Finding the Needle in the Haystack with Convolutions, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from irgrow.analysis import Hessian, deviation, interpolate, local_masks, masked
from irgrow.experiments import digits, full_data, pictures
from irgrow.experiments.claims import Claim, claim
from irgrow.experiments.reproduce import Findings, Setting
from irgrow.growth.fit import accuracy
from irgrow.ir.builder import cnn
from irgrow.ir.network import Network
from irgrow.passes import EmbedConv
from irgrow.runtime.model import CompiledNetwork, compile

SOURCE = "d'Ascoli et al. 2019"
CANVAS = 10
PATH = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """Sizes and schedule; `relax` are epochs of the CNN's training, the last one its end."""

    data: str = "digits"
    channels: tuple[int, ...] = (8, 8, 8)
    samples: int = 1000
    batch_size: int = 25
    relax: tuple[int, ...] = (0, 3, 10, 30, 60)
    epochs: int = 40  # of eFCN, FCN and the continued CNN
    large_rate: float = 0.1
    small_rate: float = 0.03
    curvature_on: int = 250  # training samples


FULL = Plan("CIFAR10", (64, 64, 64), 50_000, 250, (0, 1, 2, 4, 8, 13, 20, 40, 78, 115, 150), 100, 0.1, 0.01)


def run(setting: Setting, plan: Plan | None = None) -> Findings:
    """Every seed's CNN, FCN and eFCNs."""
    plan = plan or (FULL if setting.full else Plan())
    data_of(plan)  # MissingData before anything is trained
    return findings(setting, plan, short(setting.each(one, [(plan, seed) for seed in setting.seeds], "seeds")))


# ---- data and training ----------------------------------------------------------------------------------------


@lru_cache(2)
def data_of(plan: Plan) -> tuple[Split, Split]:
    """Standardised images and labels, training and test; every test digit stands in two places."""
    if plan.data != "digits":
        (x, y), (x_test, y_test) = full_data.images(plan.data)
        x, y = x[: plan.samples], y[: plan.samples]
        mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        return ((x - mean) / deviation, y), ((x_test - mean) / deviation, y_test)
    (x, y), (x_test, y_test) = digits.load()
    images = torch.cat([x, x_test]).reshape(-1, 1, 8, 8)
    labels = torch.cat([y, y_test])
    draw = torch.Generator().manual_seed(0)
    x = placed(images[: plan.samples], draw)
    rest = images[plan.samples :]
    x_test = torch.cat([placed(rest, draw) for _ in range(2)])
    mean, scale = x.mean(), x.std()
    return ((x - mean) / scale, labels[: plan.samples]), ((x_test - mean) / scale, labels[plan.samples :].repeat(2))


def placed(images: Tensor, draw: torch.Generator) -> Tensor:
    """Each image `[1, 8, 8]` somewhere on an empty canvas."""
    out = torch.zeros(len(images), 1, CANVAS, CANVAS)
    corners = torch.randint(0, CANVAS - 7, (len(images), 2), generator=draw).tolist()
    for n, (row, column) in enumerate(corners):
        out[n, :, row : row + 8, column : column + 8] = images[n]
    return out


@dataclass
class Curve:
    """Training loss (mean over the steps of an epoch) and test accuracy; first before any training."""

    loss: list[float]
    accuracy: list[float]


class Trainer:
    """Plain SGD on one plan's data."""

    def __init__(self, plan: Plan) -> None:
        self.plan, (self.train, self.test) = plan, data_of(plan)

    def score(self, network: Network) -> float:
        return accuracy(compile(network), self.test) or 0.0

    @torch.no_grad()
    def loss(self, network: Network) -> float:
        model, (x, y) = compile(network), self.train
        parts = [
            F.cross_entropy(model(a), b, reduction="sum") for a, b in zip(x.split(1000), y.split(1000), strict=True)
        ]
        return float(sum(parts)) / len(y)

    def curve(self, network: Network) -> Curve:
        """A curve that begins here."""
        return Curve([self.loss(network)], [self.score(network)])

    def on(self, model: CompiledNetwork, rate: float, epochs: int, seed: int, curve: Curve) -> None:
        """The model is trained on for so many epochs, each added to the curve."""
        x, y = self.train
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            total = torch.zeros(())
            for batch in torch.randperm(len(y), generator=draw).split(self.plan.batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(batch)
            curve.loss.append(float(total) / len(y))
            curve.accuracy.append(accuracy(model, self.test) or 0.0)

    def landscape(self, network: Network) -> dict[str, float]:
        """Gradient norm over the training set, largest eigenvalue of the Hessian over a part of it."""
        model, (x, y) = compile(network), self.train
        n = self.plan.curvature_on
        [top] = Hessian(model, (x[:n], y[:n]), F.cross_entropy).eigenvalues(tolerance=1e-2)
        gradient = Hessian(model, (x, y), F.cross_entropy, batch_size=1000).gradient()
        return {"gradient": float(gradient.norm()), "lambda": top}


# ---- one seed -------------------------------------------------------------------------------------------------


def one(plan: Plan, seed: int) -> dict[str, Any]:
    """Everything measured with one seed, as plain data."""
    trainer = Trainer(plan)
    image, classes = tuple(trainer.train[0].shape[1:]), int(trainer.train[1].max()) + 1
    model = compile(cnn(image, plan.channels, classes, seed=seed))
    network, curve = model.network(), trainer.curve(model.network())
    snapshots = {}
    done = 0
    for epoch in plan.relax:
        trainer.on(model, plan.large_rate, epoch - done, 100 * seed + epoch, curve)
        snapshots[epoch], done = model.network(), epoch
    dense = [fcn(plan, trainer, network, seed, rate) for rate in (plan.large_rate, plan.small_rate)]
    found = {
        "seed": seed,
        "cnn": {"loss": curve.loss, "accuracy": curve.accuracy, "parameters": network.counts.parameters},
        "fcn": max(dense, key=lambda one: max(one["accuracy"])),
        "relaxed": [relaxed(plan, trainer, epoch, snapshot, seed) for epoch, snapshot in snapshots.items()],
    }
    return found


def fcn(plan: Plan, trainer: Trainer, network: Network, seed: int, rate: float) -> dict[str, Any]:
    """The eFCN's structure from PyTorch's default start, trained at this rate."""
    embedded = EmbedConv()(network)
    start = fresh(embedded.after, seed)
    model, curve = compile(start), trainer.curve(start)
    trainer.on(model, rate, plan.epochs, seed, curve)
    end = model.network()
    return {
        "rate": rate,
        "loss": curve.loss,
        "accuracy": curve.accuracy,
        "delta": deviation(end, local_masks(embedded)),
        "filters": filters(start, end),
    }


def fresh(network: Network, seed: int) -> Network:
    """All trained weights and biases uniform in +-1 / sqrt(fan-in)."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for bundle in network.bundles.values():
        if bundle.trainable:
            bound = bundle.weight.shape[1] ** -0.5
            names = [bundle.tensor] + [f"bias.{bundle.target}"] * (network.groups[bundle.target].bias is not None)
            for name in names:
                shape = network.tensors()[name].shape
                tensors[name] = (2 * torch.rand(shape, generator=draw) - 1) * bound
    return network.with_tensors(tensors)


def relaxed(plan: Plan, trainer: Trainer, epoch: int, snapshot: Network, seed: int) -> dict[str, Any]:
    """One snapshot: its eFCN, trained on, and the CNN itself, trained on."""
    embedded = EmbedConv()(snapshot)
    start, masks = embedded.after, local_masks(embedded)
    probe = trainer.test[0][:64].double()
    a, b = (compile(n.to(torch.float64))(probe).detach() for n in (snapshot, start))
    model, curve = compile(start), trainer.curve(start)
    trainer.on(model, plan.small_rate, plan.epochs, seed, curve)
    end = model.network()
    again, control = compile(snapshot), trainer.curve(snapshot)
    trainer.on(again, plan.small_rate, plan.epochs, seed, control)
    off = {name: ~mask for name, mask in masks.items()}
    return {
        "relax": epoch,
        "parameters": start.counts.parameters,
        "difference": float((a - b).abs().max() / a.abs().max()),
        "loss": curve.loss,
        "accuracy": curve.accuracy,
        "continued loss": control.loss,
        "continued": control.accuracy,
        "delta": deviation(end, masks),
        "local only": trainer.score(masked(end, masks)),
        "off-local only": trainer.score(masked(end, off)),
        "before": trainer.landscape(start),
        "after": trainer.landscape(end),
        "path": [_point(trainer, interpolate(start, end, t)) for t in PATH],
        "filters": filters(start, end),
    }


def _point(trainer: Trainer, network: Network) -> dict[str, float]:
    return {"loss": trainer.loss(network), "accuracy": trainer.score(network)}


def filters(start: Network, end: Network) -> list[list[list[float]]]:
    """First-layer weights from the first image channel into one neuron, before and after.

    Of the neurons in the middle of the image the one whose filter changed most (others may be silent).
    """
    bundle = next(b for b in end.bundles.values() if b.source in end.inputs)
    image = end.groups[bundle.source].shape
    position = (image[1] // 2) * image[2] + image[2] // 2
    weights = [
        n.bundles[bundle.name].weight.reshape(-1, image[1] * image[2], *image)[:, position] for n in (start, end)
    ]
    changed = int((weights[1] - weights[0]).flatten(1).norm(dim=1).argmax())
    return [w[changed, 0].tolist() for w in weights]


# ---- what was found -------------------------------------------------------------------------------------------


def findings(setting: Setting, plan: Plan, runs: list[dict[str, Any]]) -> Findings:
    """Claims, table, pictures."""
    out = Findings(
        claims(plan, runs),
        (
            "relax time",
            "initial loss",
            "eFCN accuracy",
            "continued CNN",
            "CNN",
            "best FCN",
            "delta",
            "local only",
            "off-local only",
            "lambda before",
            "lambda after",
            "gradient before",
            "gradient after",
        ),
    )
    for k, epoch in enumerate(plan.relax):
        cells = [r["relaxed"][k] for r in runs]
        row = [
            [c["loss"][0] for c in cells],
            [c["accuracy"][-1] for c in cells],
            [c["continued"][-1] for c in cells],
            [r["cnn"]["accuracy"][-1] for r in runs],
            [max(r["fcn"]["accuracy"]) for r in runs],
            *([c[name] for c in cells] for name in ("delta", "local only", "off-local only")),
            *([c[when][what] for c in cells] for what in ("lambda", "gradient") for when in ("before", "after")),
        ]
        out.rows.append((epoch, *(median(values) for values in row)))
    out.data = {"runs": runs, "relax": list(plan.relax), "path": list(PATH)}
    delta = median(r["fcn"]["delta"] for r in runs)
    out.notes = [
        f"Medians over seeds. {runs[0]['relaxed'][0]['parameters']:,} parameters of the eFCN, "
        f"{runs[0]['cnn']['parameters']:,} of the CNN; rates {plan.large_rate:g} and {plan.small_rate:g}, "
        f"{plan.epochs} epochs after relaxing.",
        f"delta = ||off-local|| / ||theta||, theta: the embedded weights, without biases and the last layer; of the "
        f"FCN {delta:.3f}.",
        f"lambda: largest eigenvalue of the Hessian over {plan.curvature_on} training samples, to 1 %.",
        "best FCN: the better of both rates, at its best epoch on the test set.",
    ]
    draw(setting, plan, runs)
    out.figures = {
        "curves.png": "training loss and test accuracy",
        "relax.png": "accuracy, gradient norm and largest eigenvalue over relax time",
        "deviation.png": "deviation from the local subspace",
        "parts.png": "what local and off-local weights do alone; and between CNN and eFCN",
        "filters.png": "a filter of the first layer",
    }
    return out


def short(value: Any) -> Any:
    """Plain data with its numbers to five digits."""
    if isinstance(value, dict):
        return {key: short(v) for key, v in value.items()}
    if isinstance(value, list):
        return [short(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def claims(plan: Plan, runs: list[dict[str, Any]]) -> list[Claim]:
    """What the paper says, measured, and the control."""
    cells = [r["relaxed"] for r in runs]
    best = [max(r["fcn"]["accuracy"]) for r in runs]
    found = [
        claim(
            "exact",
            "the embedded network's outputs are the CNN's (largest relative difference, float64)",
            "section 3",
            max(c["difference"] for row in cells for c in row),
            "<=",
            1e-12,
            paper="equal",
        )
    ]
    for k, epoch in enumerate(plan.relax):
        found.append(
            claim(
                f"above-fcn-{epoch}",
                f"relaxed at epoch {epoch}: the eFCN's final test accuracy is above the best FCN's (difference)",
                f"{SOURCE}, figure 3",
                [row[k]["accuracy"][-1] - b for row, b in zip(cells, best, strict=True)],
                ">",
                0.0,
                paper="+0.05" if epoch == 0 else "",
                note="the FCN has the better of two rates and its best epoch on the test set, the eFCN neither"
                if k == 0
                else "",
            )
        )
    ends = [r["cnn"]["accuracy"][-1] for r in runs]
    middle = max(range(len(plan.relax)), key=lambda k: median(row[k]["accuracy"][-1] for row in cells))
    for name, k in {"late": -1, "best": middle}.items():
        epoch = plan.relax[k]
        found.append(
            claim(
                f"{name}-cnn",
                f"relaxed at epoch {epoch} ({name}): the eFCN is at least as accurate as the CNN at its end (gain)",
                f"{SOURCE}, figure 3",
                [row[k]["accuracy"][-1] - e for row, e in zip(cells, ends, strict=True)],
                ">=",
                0.0,
            )
        )
        found.append(
            claim(
                f"{name}-continued",
                f"relaxed at epoch {epoch} ({name}): the eFCN is more accurate than the CNN trained on at its rate "
                "(difference)",
                "control, not in the paper",
                [row[k]["accuracy"][-1] - row[k]["continued"][-1] for row in cells],
                ">",
                0.0,
                note="what is left of the gain when the CNN gets the smaller rate and the epochs as well",
            )
        )
    found += [
        claim(
            "delta-falls",
            "the deviation delta falls with every later relax time (rank correlation -1)",
            f"{SOURCE}, figure 4",
            [_rank_correlation(plan.relax, [c["delta"] for c in row]) for row in cells],
            "<=",
            -0.999,
            paper="monotone",
        ),
        claim(
            "delta-small",
            "delta stays at or below 8 % at every relax time (largest)",
            f"{SOURCE}, section 4.3",
            [max(c["delta"] for c in row) for row in cells],
            "<=",
            0.08,
            paper="8 %, FCN 97 %",
            note="with three times the paper's rate early ones go further before they fit; late ones stay close",
        ),
        claim(
            "off-local-alone",
            "the off-local weights alone are useless: at most 20 % accuracy, where chance is 10 %",
            f"{SOURCE}, figure 5",
            [max(c["off-local only"] for c in row) for row in cells],
            "<=",
            0.2,
        ),
        claim(
            "wider",
            "relaxed at the end: the largest eigenvalue falls to a tenth or less while the eFCN is trained (ratio)",
            f"{SOURCE}, figure 3",
            [row[-1]["after"]["lambda"] / row[-1]["before"]["lambda"] for row in cells],
            "<=",
            0.1,
            paper="an order of magnitude",
            note="the CNN's loss is near 0 by then, and its curvature with it; relaxed earlier it falls further: see "
            "the table",
        ),
    ]
    return found


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    x, y = (np.argsort(np.argsort(v)).astype(float) for v in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


# ---- pictures -------------------------------------------------------------------------------------------------


def draw(setting: Setting, plan: Plan, runs: list[dict[str, Any]]) -> None:
    """All pictures; times on an axis that is linear up to 1 and logarithmic from there."""
    relax = list(plan.relax)

    def times(ax: Any) -> None:
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xticks(relax, [str(epoch) for epoch in relax])
        ax.minorticks_off()
        ax.set_xlim(-0.2, 1.2 * relax[-1])

    colors = [_shade(k / max(1, len(relax) - 1)) for k in range(len(relax))]
    first = runs[0]

    figure, axes = pictures.panel_row(2)
    for ax, what, title in zip(axes, ("loss", "accuracy"), ("training loss", "test accuracy"), strict=True):
        ax.plot(first["cnn"][what], color="black", label="CNN", linewidth=1.6)
        ax.plot(first["fcn"][what], color="#b03a2e", label="FCN", linewidth=1.6)
        for cell, color in zip(first["relaxed"], colors, strict=True):
            ax.plot(cell[what], color=color, label=f"eFCN, relaxed at {cell['relax']}", linewidth=1.3)
        times(ax)
        pictures.finish(ax, f"{title}, seed {first['seed']}", "epochs since its start", title, log=what == "loss")
    pictures.save(figure, setting.out / "curves.png")

    def medians(value: Any) -> list[float]:
        return [median(value(r["relaxed"][k]) for r in runs) for k in range(len(relax))]

    figure, axes = pictures.panel_row(3)
    ax = axes[0]
    for values, label, shade, style in (
        (medians(lambda c: c["accuracy"][-1]), "eFCN", pictures.COLORS[0], "-o"),
        (medians(lambda c: c["continued"][-1]), "CNN trained on (control)", pictures.COLORS[1], "-s"),
    ):
        ax.plot(relax, values, style, color=shade, label=label, markersize=4)
    for r in runs:
        ax.plot(
            relax, [c["accuracy"][-1] for c in r["relaxed"]], "o", color=pictures.COLORS[0], markersize=2, alpha=0.4
        )
    ax.axhline(median(r["cnn"]["accuracy"][-1] for r in runs), color="black", linewidth=1, label="CNN at its end")
    ax.axhline(median(max(r["fcn"]["accuracy"]) for r in runs), color="#b03a2e", linewidth=1, linestyle="--",
               label="best FCN")  # fmt: skip
    times(ax)
    pictures.finish(ax, "final test accuracy (medians; dots: seeds)", "relax time, epochs", "accuracy")
    for ax, what, title in zip(axes[1:], ("gradient", "lambda"), ("gradient norm", "largest eigenvalue"), strict=True):
        for when, shade in (("before", pictures.COLORS[2]), ("after", pictures.COLORS[3])):
            ax.plot(relax, medians(lambda c, a=when, b=what: c[a][b]), "-o", color=shade, markersize=4,
                    label=f"{when} training the eFCN")  # fmt: skip
        times(ax)
        pictures.finish(ax, title, "relax time, epochs", title, log=True)
    pictures.save(figure, setting.out / "relax.png")

    figure, axes = pictures.panel_row(3)
    places = (
        ("relax time, epochs", lambda c: c["relax"]),
        ("training loss when relaxed", lambda c: c["loss"][0]),
        ("final test accuracy", lambda c: c["accuracy"][-1]),
    )
    for ax, (label, value) in zip(axes, places, strict=True):
        for k, color in enumerate(colors):
            x, y = [value(r["relaxed"][k]) for r in runs], [r["relaxed"][k]["delta"] for r in runs]
            ax.plot(x, y, "o", color=color, markersize=4, label=f"relaxed at {relax[k]}")
        if label.startswith("relax"):
            times(ax)
        if label.startswith("training"):
            ax.set_xscale("log")
        if label.startswith("final"):
            ax.plot([r["fcn"]["accuracy"][-1] for r in runs], [r["fcn"]["delta"] for r in runs], "D", color="#b03a2e",
                    markersize=4, label="FCN")  # fmt: skip
        pictures.finish(ax, "deviation delta", label, "delta", log=True)
    pictures.save(figure, setting.out / "deviation.png")

    figure, axes = pictures.panel_row(3)
    for n, (label, value) in enumerate(
        (
            ("all weights", lambda c: c["accuracy"][-1]),
            ("local only", lambda c: c["local only"]),
            ("off-local only", lambda c: c["off-local only"]),
        )
    ):
        axes[0].plot(relax, medians(value), "-o", color=pictures.COLORS[n], markersize=4, label=label)
    times(axes[0])
    pictures.finish(axes[0], "parts of the trained eFCN", "relax time, epochs", "test accuracy")
    for ax, what in zip(axes[1:], ("loss", "accuracy"), strict=True):
        for k, color in enumerate(colors):
            y = [median(r["relaxed"][k]["path"][i][what] for r in runs) for i in range(len(PATH))]
            ax.plot(PATH, y, color=color, label=f"relaxed at {relax[k]}", linewidth=1.4)
        title = "training loss" if what == "loss" else "test accuracy"
        pictures.finish(ax, "from CNN (0) to trained eFCN (1)", "place on the line", title, log=what == "loss")
    pictures.save(figure, setting.out / "parts.png")
    _filters(setting, relax, first)


def _filters(setting: Setting, relax: Sequence[int], first: dict[str, Any]) -> None:
    """ln |w| of one filter when relaxed and after training, and the FCN's start, end and change."""
    middle = len(relax) // 2
    chosen = sorted({0, middle, len(relax) - 1})
    tiles = [
        (f"eFCN relaxed at {relax[k]}, {when}", np.array(first["relaxed"][k]["filters"][n]))
        for k in chosen
        for n, when in enumerate(("then", "trained"))
    ]
    start, end = (np.array(f) for f in first["fcn"]["filters"])
    tiles += [("FCN, trained", end), ("FCN, change", end - start)]
    figure, axes = pictures.panel_row(len(tiles), columns=len(tiles))
    figure.set_size_inches(2.1 * len(tiles), 2.6)
    shown = [np.log(np.maximum(np.abs(t), 1e-4)) for _, t in tiles]
    image = None
    for ax, (title, _), values in zip(axes, tiles, shown, strict=True):
        image = ax.imshow(values, cmap="viridis", vmin=math.log(1e-4), vmax=max(v.max() for v in shown))
        ax.set_title(title, fontsize=8, color=pictures.INK)
        ax.set_xticks([]), ax.set_yticks([])
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("ln |weight| (below 1e-4: 1e-4)", fontsize=8)
    pictures.save(figure, setting.out / "filters.png")


def _shade(part: float) -> tuple[float, float, float]:
    """From purple to light green, as the paper colours relax times."""
    dark, light = np.array([0.33, 0.15, 0.55]), np.array([0.56, 0.80, 0.36])
    r, g, b = (float(v) for v in dark + part * (light - dark))
    return r, g, b
