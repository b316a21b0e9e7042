"""Firefly (Wu et al., NeurIPS 2020): over-grow, train the new parts for a few steps, keep the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.family import Family
from irgrow.growth.methods.base import require_choice
from irgrow.growth.methods.draws import normal
from irgrow.growth.optimised import cycled
from irgrow.growth.overgrown import Plan, assemble, why_not
from irgrow.growth.selection import Candidate, Held, Selection, held_batches, mean_loss, measured_fall
from irgrow.ir.errors import BadData, Refused
from irgrow.ir.network import Network
from irgrow.ir.site import Site
from irgrow.passes.add_block import AddResidual
from irgrow.passes.base import Sequence
from irgrow.runtime.model import CompiledNetwork

Batches = Iterator[tuple[tuple[Tensor, ...], Tensor]]


@dataclass(frozen=True)
class Firefly:
    """Keeps the `units` best of many candidates, each with a switch eps_i and a direction delta_i:

        split   theta -> theta + eps delta and theta - eps delta, half of the fan-out each    (every unit)
        unit    a new unit of fan-in delta_in and fan-out eps delta_out                       (`new` per site)
        layer   the same within a new layer I + h behind a group                    (`new` per place, if layers > 0)

    Step one: a network with all of them is trained for `steps` steps in eps and delta alone, |eps| <= `eps`
    by clamping, ||delta|| <= 1 by the penalty `penalty` * sum relu(||delta_i|| - 1)^2 (equation 4). Step two:
    s_i is the mean of dL/d zeta_i at the `midpoints` midpoints of [0, eps_i], all other switches at their
    trained value (equation 5), and the best are kept:

        new units and layers    largest |s|, and then eps_i = -eps sign(s_i)
        splits                  only if s_i eps_i < 0, for they are even in eps; ranked by -s_i eps_i

    Both are predicted falls of the loss, so one ranking holds them. At most `layers` layers begin, each only
    if at least two of its units are kept; `units` counts all units.

    rule        `paper`: the above. `authors`: as in their code, s_i is one gradient at the trained switches,
                the lowest (signed) are kept, one more than asked for, and switches stay as trained
    harmful_splits    True: splits too are ranked by |s_i| alone, as the paper prints it; some may raise the loss
    optimizer   `rmsprop` (the authors'), `adam`, or `sgd`: plain descent, whose `rate` has the loss's scale
    variance    of the normal start of every delta (shortened to norm 1 where it is longer)
    splits, new, layers     which candidates there are; layer_groups: behind which groups (default: all hidden
                groups that trained bundles enter)
    batches, batch_size     how much data scores the candidates (training runs through all of it); `paper` scores
                with `midpoints` gradients per candidate, `authors` with one for all of them

    The model stays as it is. Sites that cannot be split or added to unit by unit (channel groups, layer
    norms, loops) are left out with a note. Refused: no candidates; nothing that lowers the loss.
    Source: arXiv:2102.08574, sections 2.2, 2.3 and appendix B.
    """

    units: int = 1
    new: int = 5
    splits: bool = True
    layers: int = 0
    eps: float = 0.1
    steps: int = 100
    rate: float = 0.01
    optimizer: str = "rmsprop"
    penalty: float = 1.0
    midpoints: int = 3
    rule: str = "paper"
    harmful_splits: bool = False
    variance: float = 0.1
    layer_groups: tuple[str, ...] | None = None
    activation: str = "relu"
    kernel: int | None = 3
    seed: int = 0
    batch_size: int = 1024
    batches: int = 4

    def __post_init__(self) -> None:
        require_choice(self, "rule", ("paper", "authors"))
        require_choice(self, "optimizer", ("sgd", "rmsprop", "adam"))
        counts = {"units": 1, "midpoints": 1, "batches": 1, "batch_size": 1, "new": 0, "layers": 0, "steps": 0}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise Refused(f"Firefly: {name}", getattr(self, name), f"at least {least}")
        for name in ("eps", "rate", "variance"):
            if not getattr(self, name) > 0:
                raise Refused(f"Firefly: {name}", getattr(self, name), "a positive number")
        if not self.splits and not self.new:
            raise Refused("Firefly", "splits=False and new=0", "some candidates")

    def select(
        self, model: CompiledNetwork, data: Data, loss: Loss, *, sites: Iterable[str] | None = None
    ) -> Selection:
        """What to keep, as passes; `sites` (default: all) says where to look for it."""
        who, network = "Firefly", model.network()
        plan, notes = self._plan(network, sites)
        held = held_batches(model, data, self.batch_size, self.batches, who)
        over = Overgrown(self, network, plan, model)
        over.train(cycled(data, self.batch_size, who, network), loss)
        scores = over.scores(held, loss)
        table = self._ranked(over, scores)
        kept = self._kept(table)
        table = [replace(c, kept=i in kept) for i, c in enumerate(table)]
        if not kept:
            raise Refused(
                who,
                f"no candidate among {len(table)} that lowers the loss",
                "one that does",
                do="train on, or give more new units or steps",
            )
        steps, after = assemble(network, *over.chosen(table), method=who)
        return Selection(
            steps[0] if len(steps) == 1 else Sequence(tuple(steps)),
            tuple(table),
            sum(c.gain for c in table if c.kept),
            measured_fall(model, after, held, loss, who),
            tuple(p for s in steps if (p := getattr(s, "proposal", None) or getattr(s, "offsets", None)) is not None),
            notes,
        )

    def _plan(self, network: Network, sites: Iterable[str] | None) -> tuple[Plan, tuple[str, ...]]:
        """Every candidate there is, and notes of what was left out."""
        names = [s.name for s in Site.all(network)] if sites is None else [Site.of(network, s).name for s in sites]
        splits: dict[str, tuple[int, ...]] = {}
        new: dict[str, int] = {}
        notes = []
        for name in names:
            for what, wanted in (("split", self.splits), ("new units", self.new > 0)):
                if not wanted:
                    continue
                refused = why_not(network, name, new=what == "new units")
                if refused is not None:
                    notes.append(f"no {what}: {refused}")
                elif what == "split":
                    splits[name] = tuple(range(network.groups[name].units))
                else:
                    new[name] = self.new
        layers = {}
        if self.layers and self.new:
            for group in self._layer_groups(network, names):
                try:
                    AddResidual(group, self.new, self.activation, self.kernel).requires(network)
                except Refused as refused:
                    notes.append(f"no layer: {refused}")
                    continue
                layers[group] = self.new
        if not splits and not new and not layers:
            raise Refused("Firefly", "; ".join(notes) or "no site", "candidates: sites that can grow unit by unit")
        return Plan(splits, new, layers, self.activation, self.kernel), tuple(dict.fromkeys(notes))

    def _layer_groups(self, network: Network, names: Iterable[str]) -> list[str]:
        if self.layer_groups is not None:
            return [network.group(name).name for name in self.layer_groups]
        inside = dict.fromkeys(g for name in names for g in Site.of(network, name).groups)
        return [g for g in inside if any(b.trainable for b in network.entering(g))]

    def _ranked(self, over: Overgrown, scores: Tensor) -> list[Candidate]:
        """Every candidate with its score, the switch it would get and the fall of the loss it promises."""
        found = []
        for (kind, site, unit), s, eps in zip(over.names, scores.tolist(), over.eps.tolist(), strict=True):
            if self.rule == "authors":
                gain = -s
            elif kind != "split":
                eps = -self.eps if s > 0 else self.eps
                gain = abs(s) * self.eps
            elif self.harmful_splits:
                gain = abs(s) * abs(eps)
            else:
                gain = -s * eps
            found.append(Candidate(kind, site, unit, s, eps, gain, False))
        return found

    def _kept(self, table: list[Candidate]) -> set[int]:
        """The numbers of the best candidates under both budgets."""
        order = sorted(range(len(table)), key=lambda i: -table[i].gain)
        if self.rule == "paper":
            order = [i for i in order if table[i].gain > 0]
        budget = self.units + (self.rule == "authors")
        banned: set[str] = set()
        while True:
            kept: list[int] = []
            begun: dict[str, int] = {}
            for i in order:
                c = table[i]
                if len(kept) == budget:
                    break
                if c.kind == "layer":
                    if c.site in banned or (c.site not in begun and len(begun) == self.layers):
                        continue
                    begun[c.site] = begun.get(c.site, 0) + 1
                kept.append(i)
            thin = {site for site, count in begun.items() if count < 2}
            if not thin:
                return set(kept)
            banned |= thin  # a layer of one unit is none: its place goes to the next best


class Overgrown:
    """The network with every candidate in it, as a function of switches and directions; trains and scores them."""

    def __init__(self, method: Firefly, network: Network, plan: Plan, model: CompiledNetwork) -> None:
        self.method, self.network, self.plan = method, network, plan
        self.names: list[tuple[str, str, int]] = []
        first: dict[str, int] = {}
        for kind, table in (("split", plan.splits), ("unit", plan.new), ("layer", plan.layers)):
            for site, units in table.items():
                first[f"{kind}/{site}"] = len(self.names)
                if isinstance(units, tuple):
                    serials = network.groups[site].serials
                    self.names += [(kind, site, int(serials[i])) for i in units]
                else:
                    self.names += [(kind, site, i) for i in range(units)]
        self.shapes = plan.shapes(network)
        self.first = first
        self.family = Family(lambda n, v: assemble(n, plan, v, "Firefly")[1], model, self.shapes)
        device, dtype = self.family.device, self.family.dtype
        draw = torch.Generator().manual_seed(method.seed)
        masks = plan.masks(network)
        self.delta = {}
        for name, shape in self.shapes.items():
            drawn = (method.variance**0.5 * normal(draw, *shape)).to(device, dtype)
            self.delta[name] = drawn * masks[name].to(drawn) if name in masks else drawn
        long = self._norms(self.delta).clamp(min=1.0)
        self.delta = {name: value / self._spread(name, long) for name, value in self.delta.items()}
        self.eps = torch.full((len(self.names),), method.eps, device=device, dtype=dtype)

    def values(self, eps: Tensor, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of the plan: switches on what moves a split and on what leaves a new unit."""
        found = {}
        for name, value in delta.items():
            switched = name.startswith(("split/", "out/", "layer_out/"))
            found[name] = value * self._spread(name, eps) if switched else value
        return found

    def train(self, batches: Batches, loss: Loss) -> None:
        """A few steps of descent in switches and directions."""
        method = self.method
        eps = self.eps.clone().requires_grad_()
        delta = {name: value.clone().requires_grad_() for name, value in self.delta.items()}
        free = [eps, *delta.values()]
        optimizer = _optimizer(method, free)
        with torch.enable_grad():
            for _ in range(method.steps):
                batch = next(batches)
                value = mean_loss(lambda *x: self.family.outputs(self.values(eps, delta), x), [batch], loss, "Firefly")
                excess = torch.relu(self._norms(delta) - 1.0).square().sum()
                found = torch.autograd.grad(value + method.penalty * excess, free, allow_unused=True)
                for name, gradient in zip(delta, found[1:], strict=True):
                    if gradient is not None and not bool(torch.isfinite(gradient).all()):
                        site = f"Firefly: site {name.split('/')[1]!r}: gradient"
                        raise BadData(site, "NaN or infinity", "finite values", do="check the loss")
                for parameter, gradient in zip(free, found, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                with torch.no_grad():
                    eps.clamp_(-method.eps, method.eps)
        self.eps, self.delta = eps.detach(), {name: value.detach() for name, value in delta.items()}

    def scores(self, held: Held, loss: Loss) -> Tensor:
        """s of every candidate `[candidates]`, in float64."""
        if self.method.rule == "authors":
            return self._gradient(self.eps, held, loss).double()
        n = self.method.midpoints
        found = torch.zeros(len(self.names), dtype=torch.float64)
        for i in range(len(self.names)):
            for k in range(n):
                eps = self.eps.clone()
                eps[i] *= (2 * k + 1) / (2 * n)
                found[i] += float(self._gradient(eps, held, loss)[i]) / n
        return found

    def _gradient(self, eps: Tensor, held: Held, loss: Loss) -> Tensor:
        """dL/d eps with all switches there."""
        with torch.enable_grad():
            eps = eps.detach().requires_grad_()
            made = self.values(eps, self.delta)
            value = mean_loss(lambda *x: self.family.outputs(made, x), held, loss, "Firefly")
            (found,) = torch.autograd.grad(value, eps)
        return found

    def chosen(self, table: list[Candidate]) -> tuple[Plan, dict[str, Tensor]]:
        """The plan with only what is kept, and its values in float64."""
        eps = torch.tensor([c.eps for c in table], device=self.family.device, dtype=torch.float64)
        delta = {name: value.double() for name, value in self.delta.items()}
        values = self.values(eps, delta)
        at = {key: [] for key in self.first}  # type: dict[str, list[int]]
        for c in table:
            key = f"{c.kind}/{c.site}"
            if c.kept:
                serials = self.network.groups[c.site].serials.tolist() if c.kind == "split" else None
                at[key].append(c.unit if serials is None else serials.index(c.unit))
        some = {key: sorted(units) for key, units in at.items() if units}
        parts = {kind: {k.split("/")[1]: u for k, u in some.items() if k.startswith(kind)} for kind in _OWNERS}
        plan = replace(
            self.plan,
            splits={s: tuple(u) for s, u in parts["split"].items()},
            new={s: len(u) for s, u in parts["unit"].items()},
            layers={s: len(u) for s, u in parts["layer"].items()},
        )
        kept = {}
        for name, value in values.items():
            key = self._key(name)
            if key in some:
                rows = torch.tensor(some[key], device=value.device)
                axis, count = _axis(name), self._count(key)
                grouped = value.reshape(*value.shape[:axis], count, -1, *value.shape[axis + 1 :])
                kept[name] = grouped.index_select(axis, rows).flatten(axis, axis + 1)
        return plan, kept

    def _key(self, name: str) -> str:
        """Which candidates a value belongs to: `split/<site>`, `unit/<site>` or `layer/<group>`."""
        role, site = name.split("/")[:2]
        kind = {"split": "split", "in": "unit", "out": "unit"}.get(role, "layer")
        return f"{kind}/{site}"

    def _count(self, key: str) -> int:
        kind, site = key.split("/")
        if kind == "split":
            return len(self.plan.splits[site])
        return (self.plan.new if kind == "unit" else self.plan.layers)[site]

    def _part(self, name: str, per_candidate: Tensor) -> Tensor:
        key = self._key(name)
        return per_candidate[self.first[key] : self.first[key] + self._count(key)]

    def _spread(self, name: str, per_candidate: Tensor) -> Tensor:
        """One number per candidate, shaped to multiply a value."""
        shape, axis = self.shapes[name], _axis(name)
        part = self._part(name, per_candidate)
        part = part.repeat_interleave(shape[axis] // part.numel())  # positions of a flattened unit
        return part.reshape([-1 if a == axis else 1 for a in range(len(shape))])

    def _norms(self, delta: Mapping[str, Tensor]) -> Tensor:
        """||delta_i|| of every candidate."""
        like = next(iter(delta.values()))
        total = like.new_zeros(len(self.names))
        for name, value in delta.items():
            key, axis = self._key(name), _axis(name)
            count = self._count(key)
            by_unit = value.transpose(0, axis) if axis else value
            squares = by_unit.reshape(count, -1).square().sum(1)
            at = torch.arange(self.first[key], self.first[key] + count, device=like.device)
            total = total.index_add(0, at, squares)
        return (total + torch.finfo(total.dtype).tiny).sqrt()


_OWNERS = ("split", "unit", "layer")


def _axis(name: str) -> int:
    """The axis of a value along which its candidates stand."""
    return 1 if name.startswith(("out/", "layer_out/")) else 0


def _optimizer(method: Firefly, parameters: list[Tensor]) -> Any:
    kind = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam}[method.optimizer]
    return kind(parameters, lr=method.rate)
