"""`refine`: signs by lookahead, amplitude by line search, and the gain that was measured.

First-order proposals leave three things open. The sign of a pair (alpha, omega) is free, and with ReLU-like
activations it decides which half of the data the unit acts on. The amplitude is a step size. And a gain is
only a prediction until it is measured. All three are settled by evaluating the grown network on one batch:
it is compiled once, and a candidate differs from the next by a few factors on the new weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from irgrow.growth.data import Batch, Loss, as_inputs
from irgrow.growth.probe import bad_loss, require_finite
from irgrow.ir.errors import BadData, UnknownName
from irgrow.ir.lineage import Axes
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal
from irgrow.ir.site import Site
from irgrow.passes.add_units import AddUnits
from irgrow.runtime.model import CompiledNetwork

DEAD = 1e-12  # a fan-in smaller than this (absolute) only says which way to go
DELTAS = ("separate", "joint", "keep")
SMALLEST = 1e-6  # amplitude that is tried


def refine(
    proposal: Proposal,
    model: CompiledNetwork,
    batch: Batch,
    loss: Loss,
    *,
    signs: bool = True,
    amplitude: bool = True,
    delta: str = "separate",
    lookahead: float = 0.1,
    limit: float = 1000.0,
    rounds: int = 3,
) -> Proposal:
    """The proposal with the better sign of each pair, the best amplitude and its measured gain; the model stays.

    `batch`: `(inputs, targets)`, best one that the statistics have not seen.

    signs       each pair (alpha, omega) or (-alpha, -omega), whichever lowers the loss more to first order
    amplitude   gamma in [0, `limit`] by line search, sqrt(gamma) on both sides (TINY), narrowed down `rounds` times
    delta       dW* `separate`: a line search of its own, after the units'; `joint`: the units' gamma; `keep`: as it is
    lookahead   the learning rate of the one gradient step by which silent units are judged

    Silent units (GradMax, Random: nothing reaches the targets yet) keep their amplitude. Their signs are those
    of the larger gradient (the decrease after a vanishing step), their gain is measured after one gradient
    step of size `lookahead` on the new weights (halved while it overshoots), and `gain_unit` says `lookahead`.

    Raises BadData, naming the group, where the batch or its gradient has NaN or infinity.

    Where statistics cannot predict a gain (ReLU), the batch can: -E[relu(alpha . b) omega . g] is filled in.
    """
    if delta not in DELTAS:
        raise UnknownName(f"refine: delta {delta!r}", expected=f"one of {', '.join(DELTAS)}")
    trial = Trial(proposal, model, batch, loss)
    if trial.silent:
        return _refined_silent(trial, signs, lookahead)
    return _refined(trial, signs, amplitude, delta, limit, rounds)


class Trial:
    """The grown network, compiled once, with factors on the weights of its new units.

    `loss(inward, outward, delta)` is the mean loss on the batch with fan-in (and bias), fan-out and delta
    of the proposal multiplied by these factors, one per unit.
    """

    def __init__(self, proposal: Proposal, model: CompiledNetwork, batch: Batch, loss: Loss) -> None:
        network = model.structure
        alone = proposal.scaled(1.0, 1.0, 0.0)
        self.proposal = proposal
        self.units = proposal.units
        grown = AddUnits(alone)(network)
        after = grown.after
        self.model = CompiledNetwork(after, backend=model.backend).eval()
        self.inputs, self.targets = as_inputs(batch[0], "refine"), batch[1]
        device = next(iter(network.tensors().values())).device
        self.inputs = tuple(x.to(device) for x in self.inputs)
        self.targets = self.targets.to(device)
        if self.targets.shape[0] == 0:
            raise BadData("refine: batch", "no samples", "at least one")
        require_finite("refine", network, self.inputs)
        self._criterion = loss
        old, now = network.tensors(), after.tensors()
        touched = {f"weight.{n}" for n in [*proposal.fan_in, *proposal.fan_out]} | set(proposal.delta)
        touched |= {n for n in now if n.startswith("bias.") and now[n].shape != old[n].shape}
        self._base = {n: grown.lineage.gather(old, n, now[n]).clone() for n in touched}
        full = self._difference(network, alone, now)
        place = {n: found for n in touched if (found := self._numbered(grown, n)) is not None}
        if set(place) != touched:  # explicit edges: let the pass place numbers
            number = torch.arange(1, self.units + 1, dtype=torch.float64)
            place = {n: d.round().long() for n, d in self._difference(network, _filled(alone, number)).items()}
        leaving = {f"weight.{name}" for name in proposal.fan_out}
        self.where = {
            "in": {n: d for n, d in place.items() if n not in leaving},
            "out": {n: d for n, d in place.items() if n in leaving},
        }
        self._parts = {
            "in": {n: d for n, d in full.items() if n not in leaving},
            "out": {n: d for n, d in full.items() if n in leaving},
            "delta": self._difference(network, proposal.scaled(0.0, 0.0, 1.0)) if proposal.delta else {},
        }
        self.ones = torch.ones(self.units, dtype=network.dtype, device=device)
        self.before = self.loss(self.ones, 0 * self.ones, 0.0)
        if not math.isfinite(self.before):
            raise bad_loss("refine", model, self.inputs)

    def _numbered(self, grown: Morphism, name: str) -> Tensor | None:
        """For every entry of a tensor the number of its unit, from 1 (0: old), where units are ranges of one axis."""
        gathers = grown.lineage.gathers[name]
        if len(gathers) != 1 or not isinstance(gathers[0], Axes):
            return None
        fresh = [(a, i < 0) for a, i in enumerate(gathers[0].index) if i is not None and bool((i < 0).any())]
        if len(fresh) != 1 or int(fresh[0][1].sum()) % self.units:
            return None
        axis, new = fresh[0]
        per = int(new.sum()) // self.units  # a spatial unit has several neurons, which stand together
        number = torch.where(new, 1 + (new.cumsum(0) - 1) // per, 0)
        shape = [-1 if a == axis else 1 for a in range(len(gathers[0].shape))]
        return number.reshape(shape).expand(gathers[0].shape).contiguous()

    @property
    def silent(self) -> bool:
        """Whether the new units are judged by what they will learn: (almost) nothing reaches the targets yet."""
        p = self.proposal
        return p.gain_unit == "gradient" or not bool(p.omega.any()) or float(p.alpha.abs().max()) < DEAD

    @property
    def homogeneous(self) -> bool:
        """Whether a unit's value scales with its fan-in (ReLU-like functions, pooling), so that gains do."""
        groups = self.model.structure.groups
        return all(groups[g].function.homogeneous for g in Site.of(self.model.structure, self.proposal.site).groups)

    def set(self, inward: Tensor, outward: Tensor, delta: float = 1.0) -> None:
        """Gives the grown network these factors `[units]`."""
        factors = {"in": inward, "out": outward}
        held = self.model.tensors()
        found: dict[str, Tensor] = {}
        for kind, factor in factors.items():
            table = torch.cat([factor.new_zeros(1), factor])
            for name, change in self._parts[kind].items():
                found[name] = found.get(name, self._base[name]) + change * table[self.where[kind][name]]
        if delta:
            for name, change in self._parts["delta"].items():
                found[name] = found.get(name, self._base[name]) + delta * change
        else:
            found = {n: self._base[n] for n in self._parts["delta"]} | found
        with torch.no_grad():
            for name, tensor in found.items():
                held[name].data.copy_(tensor)

    def scaler(self, sign: Tensor) -> Callable[[float, float], float]:
        """`f(root, delta)`: the loss with these signs, fan-in and fan-out times root, and dW* times delta."""
        held = self.model.tensors()
        signed = {
            name: change * torch.cat([sign.new_zeros(1), sign])[self.where[kind][name]]
            for kind in ("in", "out")
            for name, change in self._parts[kind].items()
        }

        @torch.no_grad()
        def loss(root: float, delta: float) -> float:
            for name, base in self._base.items():
                out = held[name].data
                if name in signed:
                    torch.add(base, signed[name], alpha=root, out=out)
                else:
                    out.copy_(base)
                if delta and name in self._parts["delta"]:
                    out.add_(self._parts["delta"][name], alpha=delta)
            return self.evaluate()

        return loss

    @torch.no_grad()
    def loss(self, inward: Tensor, outward: Tensor, delta: float = 1.0) -> float:
        """The loss on the batch with these factors."""
        self.set(inward, outward, delta)
        return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss on the batch as the network is set now."""
        return float(self._criterion(self.model(*self.inputs), self.targets))

    def gradients(self, inward: Tensor, outward: Tensor) -> dict[str, Tensor]:
        """The gradient of the loss at these factors with respect to every touched tensor, old entries zeroed."""
        self.set(inward, outward)
        names = list(dict.fromkeys([*self.where["in"], *self.where["out"]]))
        held = self.model.tensors()
        for name in names:
            held[name].requires_grad_()  # also of frozen bundles: what a new weight brings does not need training
        with torch.enable_grad():
            value = self._criterion(self.model(*self.inputs), self.targets)
            found = torch.autograd.grad(value, [held[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                kind, owner = name.split(".")
                group = owner if kind == "bias" else self.model.structure.bundles[owner].target
                raise BadData(
                    f"refine: group {group!r}: gradient of {name}", "NaN or infinity", "finite values",
                    do="check the loss",
                )  # fmt: skip
        return {n: g * (self._unit(n) > 0) for n, g in zip(names, found, strict=True) if g is not None}

    def per_unit(self, values: dict[str, Tensor]) -> Tensor:
        """The sum of values over the weights of each unit `[units]`."""
        total = self.ones.new_zeros(self.units + 1)
        for name, value in values.items():
            total.index_add_(0, self._unit(name).reshape(-1), value.reshape(-1))
        return total[1:]

    def squared(self, sign: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared gradient of each unit's trained weights `[units]` with these signs, and the gradients."""
        trained = set(self.model.structure.trainable())
        gradients = {name: g for name, g in self.gradients(sign, sign).items() if name in trained}
        return self.per_unit({n: g.square() for n, g in gradients.items()}), gradients

    def gain(self, sign: Tensor) -> Tensor:
        """The first-order gain of each unit's fan-out with these signs `[units]`, exact for any activation."""
        gradients = self.gradients(sign, 0 * sign)
        out = {n: -g * self._parts["out"][n] for n, g in gradients.items() if n in self._parts["out"]}
        return sign * self.per_unit(out)

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor], rate: float) -> float:
        """The loss after one gradient step on the new weights from where they are; they stay there."""
        held = self.model.tensors()
        for name, gradient in gradients.items():
            held[name].data.sub_(rate * gradient)
        value = self.evaluate()
        for name, gradient in gradients.items():
            held[name].data.add_(rate * gradient)
        return value

    def _unit(self, name: str) -> Tensor:
        """For every entry of a tensor the number of its unit, from 1; 0 for old entries."""
        return sum(self.where[kind][name] for kind in ("in", "out") if name in self.where[kind])  # type: ignore[return-value]

    def _difference(
        self, network: Network, proposal: Proposal, after: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """What a proposal adds to each tensor that it touches (`after`: the tensors it leads to, if known)."""
        found = AddUnits(proposal)(network).after.tensors() if after is None else after
        changes = {n: found[n] - base for n, base in self._base.items()}
        return {n: d for n, d in changes.items() if bool(d.any())}


def _refined_silent(trial: Trial, signs: bool, lookahead: float) -> Proposal:
    """Signs by the decrease that an infinitely small gradient step would bring: the squared gradient of each unit.

    A step of fixed size can overshoot on the better side, and then picks the worse one.
    """
    sign = trial.ones
    squared, gradients = trial.squared(sign)
    if signs and bool(trial.proposal.omega.any()):
        turned, _ = trial.squared(-sign)
        sign = torch.where(turned > squared, -sign, sign)
        squared, gradients = trial.squared(sign)
    rate, notes = lookahead, trial.proposal.notes
    expected = float(squared.sum())
    after = trial.step(gradients, rate)
    while expected > 0 and not trial.before - after > 0.1 * rate * expected and rate > 1e-6 * lookahead:
        rate /= 2
        after = trial.step(gradients, rate)
    if rate < lookahead:
        notes = (*notes, f"lookahead at the rate {rate:.2g}: {lookahead:.2g} overshoots")
    return replace(
        _signed(trial.proposal, sign),
        predicted_gain=trial.proposal.predicted_gain,
        measured_gain=trial.before - after,
        gain_unit="lookahead",
        notes=notes,
    )


def _refined(trial: Trial, signs: bool, amplitude: bool, delta: str, limit: float, rounds: int) -> Proposal:
    p = trial.proposal
    alone = 0.0 if delta == "separate" and p.delta else 1.0
    sign, gamma, notes = trial.ones, 1.0, []
    first_order = trial.gain(sign)
    if signs:
        turned = trial.gain(-sign)
        sign = torch.where(turned > first_order, -sign, sign)
        first_order = torch.maximum(turned, first_order)

    loss = trial.scaler(sign)

    def at(gamma: float) -> float:
        return loss(math.sqrt(gamma), gamma if delta == "joint" else alone)

    gamma, after = line_search(at, limit, rounds) if amplitude else (gamma, at(gamma))
    moved = gamma if delta == "joint" else 1.0
    if delta == "separate" and p.delta:
        root = math.sqrt(gamma)

        def beside(factor: float) -> float:
            return loss(root, factor)

        moved, after = line_search(beside, limit, rounds) if amplitude else (moved, beside(moved))
    measured = trial.before - after
    if not measured > 0:
        notes.append("no amplitude that was tried lowers the loss")
    found = _signed(p, sign).scaled(math.sqrt(gamma), math.sqrt(gamma), moved)
    gain = p.predicted_gain
    if gain is None and trial.homogeneous and not p.delta:
        gain = float(first_order.sum()) * gamma
        notes.append("predicted gain: to first order in the fan-out, on the batch that measured the gain")
    elif gain is not None:  # known at one amplitude for both
        gain = gain * gamma if not p.delta or moved == gamma else None
    return replace(found, predicted_gain=gain, measured_gain=measured, notes=(*p.notes, *notes))


def line_search(evaluate: Callable[[float], float], limit: float, rounds: int) -> tuple[float, float]:
    """(x, f(x)) with a small f on (0, limit]: by factors of 4 from 1 while f falls, then halving the interval.

    The halving is in log x: x times and over 2, sqrt(2), ... `rounds` times. 0 is never returned: a unit with
    all weights zero would never move.
    """
    tried: dict[float, float] = {}

    def f(x: float) -> float:
        if x not in tried:
            value = evaluate(x)
            tried[x] = value if math.isfinite(value) else math.inf
        return tried[x]

    best = min(1.0, limit)
    for factor in (4.0, 0.25) if math.isfinite(f(best)) else (0.25,):
        start = best
        while (
            (x := min(best * factor, limit)) not in tried and x > SMALLEST and (f(x) < f(best) or f(best) == math.inf)
        ):
            best = x
        if best != start:
            break
    factor = 2.0
    for _ in range(rounds):
        best = min((best, min(best * factor, limit), best / factor), key=f)
        factor = math.sqrt(factor)
    return best, f(best)


def _signed(proposal: Proposal, sign: Tensor) -> Proposal:
    return proposal if bool((sign > 0).all()) else proposal.scaled(sign.cpu(), sign.cpu())


def _filled(proposal: Proposal, values: Tensor) -> Proposal:
    """The proposal with every weight of unit k equal to values[k]."""
    ones = replace(
        proposal,
        fan_in={n: torch.ones_like(w) for n, w in proposal.fan_in.items()},
        fan_out={n: torch.ones_like(w) for n, w in proposal.fan_out.items()},
        bias=None if proposal.bias is None else torch.ones_like(proposal.bias),
        delta={},
    )
    return ones.scaled(values, values)
