"""A whole growth step (statistics over ten batches, solve, apply, optimizer, lower) beside GroMo's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import irgrow as ig
from bench import gromo_side
from bench.growth_floor import tiny_floor
from bench.suite import OURS, Case, Made, Row, op
from bench.timing import Effort, min_s

BATCHES = 10
GOALS = {("mlp", "tiny"): 3.0, ("mlp", "gradmax"): 5.0, ("conv full", "tiny"): 15.0, ("conv full", "gradmax"): 15.0}
GOALS |= {("conv restricted", "tiny"): 5.0}
GRADMAX_STEPS = 8.0  # a growth takes at most so many plain steps
FLOOR = 1.3  # and TINY's at most so many times its floor
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """One network to grow: ours, GroMo's and torch's with the same weights, and the data."""

    network: ig.Network
    site: str
    gromo: Callable[[], Any]
    torch_model: nn.Sequential
    batches: Batches
    taps: str


@op(
    "growth_step",
    cases=[
        *(
            {"net": "mlp", "how": how, "batch": 128, "units": 16, "width": 256, "stride": 1}
            for how in ("tiny", "gradmax")
        ),
        *(
            {"net": "conv full", "how": how, "batch": 32, "units": 8, "width": 32, "stride": 2}
            for how in ("tiny", "gradmax")
        ),
        {"net": "conv restricted", "how": "tiny", "batch": 32, "units": 8, "width": 32, "stride": 1},
    ],
    tiny={"batch": 4, "units": 2, "width": 8},
)
def growth_step(*, net: str, how: str, batch: int, units: int, width: int, stride: int, device: str) -> Made:
    """Statistics over 10 batches, solve, apply, optimizer (and lower), beside GroMo; also in plain SGD steps.

    mlp: 784-256-256-10, the first hidden layer grows by 16, batch 128. conv: 16-32-64 at 32x32, 3x3, padding 1, the
    32 channels grow by 8, batch 32; full: the new channels reach every tap of the next convolution, restricted: the
    centre tap. relu, gaussian data, squared error, no line search on either side. TINY without the update of old
    weights on both sides; GradMax. A plain step is torch.nn.Sequential's (SGD, the same batch).
    """
    gromo_side.require()
    setting = _mlp(batch, width) if net == "mlp" else _conv(net.removeprefix("conv "), batch, width, stride, how)
    method = _method(how, units, setting.taps)
    # In the S of a full convolution GroMo counts a position once for every tap that reads it, we count it once; so
    # what TINY solves for is not the same there, and the matrix N that it solves with is compared.
    by_n = (net, how) == ("conv full", "tiny")
    kept: dict[str, list[Tensor]] = {OURS: [], "GroMo": []}

    def prepare_ours() -> tuple[ig.CompiledNetwork, torch.optim.Optimizer]:
        model = ig.compile(setting.network)
        return model, torch.optim.SGD(model.parameters(), lr=1e-3)

    def grow_ours(made: tuple[ig.CompiledNetwork, torch.optim.Optimizer]) -> ig.CompiledNetwork:
        model, optimizer = made
        statistics = ig.probe(
            model, setting.batches, _loss, sites=[setting.site], reduction="sum", want=method.needs, taps=setting.taps
        )
        if by_n and not kept[OURS]:
            kept[OURS].append(statistics[setting.site].N)
        proposal = method.propose(statistics[setting.site])
        model.grow(ig.AddUnits(proposal)(model.structure), optimizer)
        return model

    def prepare_gromo() -> Any:
        model = setting.gromo()
        tensors = setting.network.tensors()
        gromo_side.copy_weights(model, *(_of(tensors, kind) for kind in ("weight.", "bias.")))
        return model

    def grow_gromo(model: Any) -> Any:
        gromo_side.grow(
            model, 0, setting.batches, None, _loss, units=units, method=how, keep=kept["GroMo"] if by_n else None
        )
        torch.optim.SGD(model.parameters(), lr=1e-3)
        return model

    def view(name: str, grown: Any) -> Tensor:
        """What the new units do to first order: fan-out times fan-in. Signs and rotations drop out."""
        if by_n:
            return kept[name][0].double()
        if name == OURS:
            weights, biases = (_of(grown.tensors(), kind) for kind in ("weight.", "bias."))
        else:
            layers = [layer.layer for layer in grown.layers]
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return _effect(weights[0], biases[0], weights[1], units, how)

    label = f"{net}, {how}, +{units} units"
    row = yield Case(
        label,
        ours=grow_ours,
        opponents={"GroMo": grow_gromo},
        prepare={OURS: prepare_ours, "GroMo": prepare_gromo},
        view=view,
        tolerance=1e-3,
        goal=GOALS[net, how],
        effort=Effort(pairs=9, seconds=20.0, least=3),
        note=f"{BATCHES} batches of {batch}",
    )
    if row.ours_ms is None or row.theirs_ms is None:
        return
    step_ms = 1e3 * min_s(_step(setting))
    yield Row(
        f"{label}, in plain steps",
        ratio=step_ms / row.ours_ms,
        goal=1 / GRADMAX_STEPS if how == "gradmax" else None,
        ours_ms=row.ours_ms,
        theirs_ms=step_ms,
        opponent="a plain torch SGD step",
        note=f"ours {row.ours_ms / step_ms:.1f} plain steps, GroMo {row.theirs_ms / step_ms:.1f}",
    )
    if how == "tiny":
        floor = tiny_floor(setting.torch_model, setting.batches, setting.taps)
        yield Row(
            f"{label}, over its floor",
            ratio=floor.total_ms / row.ours_ms,
            goal=1 / FLOOR,
            ours_ms=row.ours_ms,
            theirs_ms=floor.total_ms,
            opponent="its arithmetic at this machine's rate",
            note=f"{row.ours_ms / floor.total_ms:.2f} times the floor: {floor}",
        )
    if net == "mlp" or how == "gradmax":  # one run over images takes N from C, which is unfolded: a probe is cheaper
        yield _gathered(label, setting, method, step_ms)


def _gathered(label: str, setting: Setting, method: Any, step_ms: float) -> Row:
    """A growth whose statistics were gathered during training steps, so that there is no probe; and their price."""
    model = ig.compile(setting.network)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def gathering(network: ig.Network) -> ig.Gathering:
        wanted: dict[str, Any] = {"want": method.needs, "taps": setting.taps, "reduction": "sum"}
        return ig.Gathering(network, [setting.site], **wanted, single_run=True, mode="train")

    kept = gathering(model.structure)

    def plain() -> None:
        for x, y in setting.batches:
            optimizer.zero_grad()
            _loss(model(x), y).backward()
            optimizer.step()

    def gathered() -> None:
        for x, y in setting.batches:
            optimizer.zero_grad()
            _loss(kept.forward(model, x), y).backward()
            kept.collect()
            optimizer.step()

    def prepare() -> tuple[ig.CompiledNetwork, torch.optim.Optimizer, ig.Gathering]:
        grown = ig.compile(setting.network)
        other = torch.optim.SGD(grown.parameters(), lr=1e-9)
        sums = gathering(grown.structure)
        for x, y in setting.batches:
            _loss(sums.forward(grown, x), y).backward()
            sums.collect()
        return grown, other, sums

    def grow(made: tuple[ig.CompiledNetwork, torch.optim.Optimizer, ig.Gathering]) -> None:
        grown, other, sums = made
        grown.grow(ig.AddUnits(method.propose(sums.statistics()[setting.site]))(grown.structure), other)

    plain_ms, gathered_ms = (1e3 * min_s(work, samples=5) / len(setting.batches) for work in (plain, gathered))
    growth_ms = 1e3 * min_s(grow, prepare=prepare, samples=3)
    return Row(
        f"{label}, gathered in training",
        ratio=step_ms / growth_ms,
        ours_ms=growth_ms,
        theirs_ms=step_ms,
        opponent="a plain torch SGD step",
        note=f"growth without probe {growth_ms / step_ms:.1f} plain steps; a training step of ours "
        f"{plain_ms:.2f} ms, with gathering {gathered_ms:.2f} ms ({gathered_ms / plain_ms:.2f}x)",
    )


def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1).sum()


def _method(how: str, units: int, taps: str) -> Any:
    return ig.Tiny(units, taps=taps) if how == "tiny" else ig.GradMax(units, taps=taps)


def _mlp(batch: int, width: int) -> Setting:
    inputs = 784 if width >= 256 else 3 * width  # fewer than samples, or there would be nothing unique to compare
    widths = [inputs, width, width, 10]
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(batch, inputs, generator=draw), torch.randn(batch, 10, generator=draw)) for _ in range(BATCHES)
    ]
    network = ig.mlp(widths, activation="relu", seed=0)
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return Setting(network, "hidden1", lambda: gromo_side.mlp(widths, "tiny"), nn.Sequential(*layers), batches, "full")


def _conv(kind: str, batch: int, width: int, stride: int, how: str) -> Setting:
    channels, size = (width // 2, width, 2 * width), min(32, width)
    inner = (size - 1) // stride + 1
    outer = (inner - 1) // stride + 1
    draw = torch.Generator().manual_seed(0)
    shapes = (batch, channels[0], size, size), (batch, channels[2], outer, outer)
    batches: Batches = []
    for _ in range(BATCHES):
        x, y = (torch.randn(*shape, generator=draw) for shape in shapes)
        batches.append((x, y))
    builder = ig.Builder(seed=0)
    window = ig.Conv2d((3, 3), (stride, stride), (1, 1))
    builder.input("input", (channels[0], size, size))
    builder.group("hidden", (channels[1], inner, inner), activation="relu", bias=True)
    builder.connect("input", "hidden", window)
    builder.output("output", (channels[2], outer, outer), bias=True)
    builder.connect("hidden", "output", window)
    layers = [nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b in pairwise(channels)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    taps = "full" if kind == "full" else "centre"
    return Setting(
        builder.build(), "hidden", lambda: gromo_side.cnn(channels, size, stride, kind, how), model, batches, taps
    )


def _step(setting: Setting) -> Callable[[], None]:
    model, (x, y) = setting.torch_model, setting.batches[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    return step


def _of(tensors: dict[str, Tensor], kind: str) -> list[Tensor]:
    return [tensor.detach() for name, tensor in tensors.items() if name.startswith(kind)]


def _effect(fan_in: Tensor, bias: Tensor, fan_out: Tensor, units: int, how: str) -> Tensor:
    """[outputs * taps, inputs * taps + 1], normalised; for GradMax, whose fan-in is zero, fan-out by itself."""
    omega = (
        fan_out.detach().double()[:, -units:].flatten(2)
        if fan_out.ndim == 4
        else fan_out.detach().double()[:, -units:, None]
    )
    omega = omega.transpose(1, 2).flatten(0, 1)  # [outputs * taps, units]
    if how == "gradmax":
        effect = omega @ omega.T
    else:
        alpha = torch.cat([fan_in.detach().double()[-units:].flatten(1), bias.detach().double()[-units:, None]], 1)
        effect = omega @ alpha
    return effect / effect.norm()
