"""Proposals that are optimised for a few steps: GradMaxOpt, inverse GradMax, FireflyOpt.

All three end in AddUnits, as the closed forms do. GradMaxOpt needs only statistics; the others need the
model, of which a grown copy is trained while the model itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss, batches
from irgrow.growth.family import Family
from irgrow.growth.geometry import Geometry
from irgrow.growth.methods.base import (
    columns,
    proposal,
    require_choice,
    require_first_order,
    require_units,
)
from irgrow.growth.methods.draws import normal
from irgrow.growth.methods.with_model import Bindable, require_data, require_loss, require_model
from irgrow.growth.probe import bad_loss, require_finite
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.ir.statistics import Statistics
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork


@dataclass(frozen=True)
class GradMaxOpt:
    """GradMax by ascent: fan-in zero, fan-out climbing ||E[dL/d fan-in]||^2 (equation 11), its norm kept.

    constraint  total       the norm of all new fan-outs together, sqrt(k) times a column's: equation 11 as printed.
                            Its maximum has every column along the top singular vector, more than the SVD for k > 1,
                            with units that are copies of each other
                each        the norm of every column; the same maximum
                orthogonal  columns orthogonal and of equal norm: the SVD of GradMax is the maximum

    Each step adds `rate` times the current norm along the gradient and restores the constraint. Columns
    have `scale` times the mean norm of the existing outgoing ones. Stops early when the objective stands
    still. `kick` as in GradMax; the gain too. For k = 1 the result is GradMax's.
    Source: Evci et al., arXiv:2201.05125, section 3 (GradMaxOpt).
    """

    units: int = 1
    steps: int = 1000
    rate: float = 4.0
    constraint: str = "total"
    scale: float = 1.0
    kick: float = 1e-15
    seed: int = 0
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ("M_prev",)

    def __post_init__(self) -> None:
        require_choice(self, "constraint", ("total", "each", "orthogonal"))
        require_units(self)
        if self.steps < 1 or not self.rate > 0:
            raise Refused("GradMaxOpt", f"steps={self.steps}, rate={self.rate}", "at least one step, a positive rate")

    def propose(self, statistics: Statistics) -> Proposal:
        """The units climbed to from a random start; Refused for an activation that does not fit."""
        require_first_order(self, statistics)
        statistics.need("M_prev")
        assert statistics.M_prev is not None
        gradient = statistics.slope * statistics.M_prev  # [b, g]: minus the new fan-in's gradient is gradient @ omega
        if self.constraint == "orthogonal" and self.units > columns(statistics):
            raise Refused(
                f"GradMaxOpt: site {statistics.site!r}",
                f"{self.units} orthogonal columns",
                f"at most {columns(statistics)}, the size of the fan-out",
            )
        if not bool(gradient.any()):
            raise Refused(f"GradMaxOpt: site {statistics.site!r}", "a gradient of zero", "one that can grow")
        draw = torch.Generator().manual_seed(self.seed)
        omega = self._kept(normal(draw, columns(statistics), self.units, like=gradient))
        best, still = 0.0, 0
        for _ in range(self.steps):
            ascent = gradient.mT @ (gradient @ omega)
            length = ascent.norm() if self.constraint == "total" else ascent.norm(dim=0)
            omega = self._kept(omega + self.rate * omega.norm() * ascent / length.clamp(min=1e-300))
            value = float((gradient @ omega).square().sum())
            still = still + 1 if value <= best * (1 + 1e-13) else 0
            best = max(best, value)
            if still >= 10:
                break
        omega = self.scale * statistics.fan_out_norm * omega
        step = -gradient @ omega
        alpha = torch.zeros_like(step)
        if not statistics.smooth and self.kick:
            alpha = self.kick * step / step.norm(dim=0).clamp(min=torch.finfo(step.dtype).tiny)
        gain = float(step.square().sum())
        return proposal(self, statistics, alpha, omega, predicted_gain=gain, gain_unit="gradient")

    def _kept(self, omega: Tensor) -> Tensor:
        """The nearest columns that keep the constraint, for columns of norm 1."""
        if self.constraint == "orthogonal":
            U, _, Vh = torch.linalg.svd(omega, full_matrices=False)
            return U @ Vh
        if self.constraint == "each":
            return omega / omega.norm(dim=0)
        return omega * (self.units**0.5 / omega.norm())


@dataclass(frozen=True)
class InverseGradMax(Bindable):
    """Fan-out zero, fan-in climbing ||E[dL/d fan-out]||^2 (equation 4): outputs do not change.

    No closed form exists here, and no condition on the activation: sigma(0) may be anything. The gradient
    of the new fan-out is E[g sigma(alpha . b)], through whatever lies along the site; it is climbed by
    `steps` steps of Adam on batches of `data`, each fan-in kept at `scale` times the mean norm of the
    existing ones. Units start apart, and several may end at the same maximum.

    Gain: ||E[dL/d fan-out]||^2 on the first batch, per unit of learning rate (`gain_unit` `gradient`).
    Source: Evci et al., arXiv:2201.05125, section 3 and appendix C (inverse formulation).
    """

    units: int = 1
    steps: int = 100
    rate: float = 0.1
    scale: float = 1.0
    seed: int = 0
    batch_size: int = 1024
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_units(self)
        _require_steps(self, self.steps, self.rate)

    def propose_with(
        self, statistics: Statistics, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None
    ) -> Proposal:
        """The units climbed to from a random start, on copies of the model."""
        new = NewUnits(self, self.units, statistics, model, data, loss, self.batch_size)
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        start = new.directions(draw, new.incoming)

        def objective(values: dict[str, Tensor], batch: tuple[tuple[Tensor, ...], Tensor]) -> Tensor:
            silent = {n: torch.zeros(s, dtype=new.dtype, device=new.device) for n, s in new.outgoing.items()}
            for tensor in silent.values():
                tensor.requires_grad_()
            value = new.loss({**values, **silent}, batch)
            gradients = torch.autograd.grad(value, list(silent.values()), create_graph=True)
            return sum((g.square().sum() for g in gradients), value.new_zeros(()))

        size = self.scale * new.fan_in_norm
        values = new.climbed(objective, start, size, self.steps, self.rate)
        gain = float(objective(values, new.first).detach())
        return new.proposal(values, predicted_gain=gain, gain_unit="gradient")


@dataclass(frozen=True)
class FireflyOpt(Bindable):
    """Fan-in and fan-out that lower the loss itself: `steps` steps of Adam on the new weights, sizes kept.

    Each fan-in has `scale` times the mean norm of the existing ones, each fan-out `eps` times the mean norm
    of theirs, restored after every step. The baseline of GradMax, section 4.2 (there eps is absolute,
    1e-4), Firefly without its other candidates. `measured_gain` is the fall of the loss on the first batch.
    """

    units: int = 1
    steps: int = 100
    rate: float = 0.1
    eps: float = 0.1
    scale: float = 1.0
    seed: int = 0
    batch_size: int = 1024
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_units(self)
        _require_steps(self, self.steps, self.rate)
        if not self.eps > 0:
            raise Refused("FireflyOpt: eps", self.eps, "a positive number")

    def propose_with(
        self, statistics: Statistics, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None
    ) -> Proposal:
        """The trained units, found on copies of the model."""
        new = NewUnits(self, self.units, statistics, model, data, loss, self.batch_size)
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        start = new.directions(draw, {**new.incoming, **new.outgoing})
        size, out = self.scale * new.fan_in_norm, self.eps * statistics.fan_out_norm
        values = new.climbed(lambda v, batch: -new.loss(v, batch), start, size, self.steps, self.rate, out)
        with torch.no_grad():
            before = float(new.loss(new.family.zeros(), new.first))
            measured = before - float(new.loss(values, new.first))
        return new.proposal(values, measured_gain=measured)


class NewUnits:
    """Units that a method trains on a grown copy of the model: their shapes, their loss, and the climb."""

    def __init__(
        self,
        method: object,
        units: int,
        statistics: Statistics,
        model: CompiledNetwork,
        data: Data | None,
        loss: Loss | None,
        batch_size: int,
    ) -> None:
        network = require_model(method, statistics, model)
        self.who = f"{type(method).__name__}: site {statistics.site!r}"
        self.method, self.units, self.statistics = method, units, statistics
        self.data, self.criterion = require_data(method, statistics, data), require_loss(method, statistics, loss)
        geometry = Geometry(network, Site.of(network, statistics.site))
        assert geometry.slopes is not None  # refuses norms across units
        fan_in = {b.name.split(".")[1]: (units, *b.shape) for b in statistics.fan_in if b.name.startswith("weight.")}
        fan_out = {}
        for b in statistics.fan_out:
            image = len(b.shape) == 3
            shape = (
                (b.outputs, units, *b.shape[1:])
                if image
                else (b.outputs, units * b.shape[-1] if b.shape[1:] else units)
            )
            fan_out[b.name.split(".")[1]] = shape
        self.incoming = {f"in.{n}": s for n, s in fan_in.items()} | ({"bias": (units,)} if statistics.bias else {})
        self.outgoing = {f"out.{n}": s for n, s in fan_out.items()}
        self.family = Family(self._grown, model, {**self.incoming, **self.outgoing})
        self.device, self.dtype = self.family.device, self.family.dtype
        self.fan_in_norm = _fan_in_norm(geometry, statistics)
        self._batches = cycled(self.data, batch_size, self.who, network)
        self.first = next(self._batches)

    def next_batch(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """The next batch of the data, over and over; the first one is `first`."""
        return next(self._batches)

    def _made(self, network: Network, values: Mapping[str, Tensor]) -> Proposal:
        fan_in = {n[3:]: v for n, v in values.items() if n.startswith("in.")}
        fan_out = {n[4:]: v for n, v in values.items() if n.startswith("out.")}
        name = type(self.method).__name__
        return Proposal(self.statistics.site, network.structure, name, fan_in, fan_out, values.get("bias"))

    def _grown(self, network: Network, values: Mapping[str, Tensor]) -> Network:
        return AddUnits(self._made(network, values))(network).after

    def loss(self, values: Mapping[str, Tensor], batch: tuple[tuple[Tensor, ...], Tensor]) -> Tensor:
        """The loss of the grown network; BadData if it is not one finite number."""
        value = self.criterion(self.family.outputs(values, batch[0]), batch[1])
        if not isinstance(value, Tensor) or value.dim():
            raise BadData(f"{self.who}: loss", "not one number", "a loss that returns one number for the batch")
        if not bool(torch.isfinite(value)):
            raise bad_loss(self.who, self.family.compiled, batch[0])
        return value

    def directions(self, draw: torch.Generator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Normal numbers for these values."""
        return {n: normal(draw, *s).to(self.device, self.dtype) for n, s in shapes.items()}

    def climbed(
        self,
        objective: Callable[[dict[str, Tensor], tuple[tuple[Tensor, ...], Tensor]], Tensor],
        start: dict[str, Tensor],
        size: float,
        steps: int,
        rate: float,
        out: float | None = None,
    ) -> dict[str, Tensor]:
        """Values that climb the objective; fan-ins have the norm `size`, fan-outs `out` (None: they are zero)."""
        free = {n: v.clone().requires_grad_() for n, v in start.items()}
        self._restore(free, self.incoming, 1.0)
        self._restore(free, self.outgoing, 1.0)
        entries = max(sum(v[0].numel() for n, v in free.items() if n in self.incoming), 1)
        optimizer = torch.optim.Adam(list(free.values()), lr=rate / entries**0.5)

        def sized() -> dict[str, Tensor]:
            silent = {n: torch.zeros(s, dtype=self.dtype, device=self.device) for n, s in self.outgoing.items()}
            scaled = {n: v * (size if n in self.incoming else out or 0.0) for n, v in free.items()}
            return {**silent, **scaled}

        with torch.enable_grad():
            for step in range(steps):
                batch = self.first if step == 0 else self.next_batch()
                gradients = torch.autograd.grad(objective(sized(), batch), list(free.values()), allow_unused=True)
                for value, gradient in zip(free.values(), gradients, strict=True):
                    if gradient is not None and not bool(torch.isfinite(gradient).all()):
                        raise BadData(f"{self.who}: gradient", "NaN or infinity", "finite values", do="check the loss")
                    value.grad = None if gradient is None else -gradient
                optimizer.step()
                self._restore(free, self.incoming, 1.0)
                self._restore(free, self.outgoing, 1.0)
        return {n: v.detach() for n, v in sized().items()}

    @torch.no_grad()
    def _restore(self, free: Mapping[str, Tensor], names: Mapping[str, object], norm: float) -> None:
        """Every unit's part of these values has this norm again."""
        parts = {n: self._by_unit(n, free[n]) for n in names if n in free}
        if not parts:
            return
        total = torch.cat(list(parts.values()), 1).norm(dim=1).clamp(min=torch.finfo(self.dtype).tiny)
        for name in parts:
            value = free[name]
            factor = norm / total
            if name in self.outgoing:
                factor = factor.repeat_interleave(value.shape[1] // self.units)
                value.mul_(factor.reshape(1, -1, *[1] * (value.dim() - 2)))
            else:
                value.mul_(factor.reshape(-1, *[1] * (value.dim() - 1)))

    def _by_unit(self, name: str, value: Tensor) -> Tensor:
        """`[units, rest]`."""
        if name in self.outgoing:
            value = value.reshape(value.shape[0], self.units, -1).transpose(0, 1)
        return value.reshape(self.units, -1)

    def proposal(
        self,
        values: Mapping[str, Tensor],
        predicted_gain: float | None = None,
        measured_gain: float | None = None,
        gain_unit: str = "loss",
    ) -> Proposal:
        """The proposal with these values."""
        double = {n: v.detach().double() for n, v in values.items()}
        made = self._made(self.family.compiled.structure, double)
        return Proposal(
            made.site,
            self.statistics.structure,
            made.method,
            made.fan_in,
            made.fan_out,
            made.bias,
            predicted_gain=predicted_gain,
            measured_gain=measured_gain,
            gain_unit=gain_unit,
        )


def cycled(
    data: Data, batch_size: int | None, who: str, network: Network
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Batches of the data where the network lives, over and over.

    BadData where there are none (or none a second time), and for NaN or infinity.
    """
    device = next(iter(network.tensors().values())).device
    again = False
    while True:
        count = 0
        for inputs, targets in batches(data, batch_size, who):
            if inputs[0].shape[0]:
                count += 1
                require_finite(who, network, inputs)
                yield tuple(x.to(device) for x in inputs), targets.to(device)
        if not count:
            expected = "an iterable that can be read several times (a list, a DataLoader)" if again else "at least one"
            raise BadData(f"{who}: data", "no samples", expected)
        again = True


def _fan_in_norm(geometry: Geometry, statistics: Statistics) -> float:
    """The mean over units of the norm of all fan-in weights, bias included (1 if they are all zero)."""
    network, first = geometry.network, geometry.entries[0].group
    total: Tensor | None = None
    for entry in geometry.entries:
        bundle = network.bundles[entry.block.name.removeprefix("weight.")]
        units = network.groups[entry.group].units
        if units != network.groups[first].units:
            continue
        weight = bundle.weight.detach().double()
        pattern = getattr(bundle.pattern, "target", None)
        if pattern is None:
            square = weight.reshape(units, -1).square().sum(1)
        else:
            at = torch.from_numpy(bundle.pattern.index).long().to(weight.device)  # type: ignore[attr-defined]
            rows = torch.from_numpy(pattern).long().to(weight.device)
            square = weight.new_zeros(units).index_add(0, rows, weight[at] ** 2)
        total = square if total is None else total + square
    assert total is not None
    bias = network.groups[first].bias
    if statistics.bias and bias is not None:
        total = total + bias.detach().double() ** 2
    norm = float(total.sqrt().mean())
    return norm if norm > 0 else 1.0


def _require_steps(method: object, steps: int, rate: float) -> None:
    if steps < 0 or not rate > 0:
        raise Refused(type(method).__name__, f"steps={steps}, rate={rate}", "0 or more steps, a positive rate")
