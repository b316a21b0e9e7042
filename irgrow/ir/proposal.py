"""`Proposal`: new units for a site, as a value: what a growth method returns and `AddUnits` applies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from irgrow.ir.errors import StaleMorphism
from irgrow.ir.network import Bundle, Network
from irgrow.ir.pattern import Dense, Sparse

if TYPE_CHECKING:
    from irgrow.ir.morphism import Morphism


@dataclass(frozen=True, eq=False)
class Proposal:
    """New units: for every entering bundle the weight slice that enters them, for every leaving one what leaves.

    `fan_in[bundle]` has the bundle's weight shape with `units` target units (dense `(units, in)`, conv
    `(units, in, kh, kw)`); `fan_out[bundle]` with `units` source units (dense `(out, units)`, conv
    `(out, units, kh, kw)`). `bias` `(units,)`, None where the grown group has none. `delta` maps tensor
    names to changes of existing tensors (dW*). Gains are decreases of the mean loss: `predicted_gain` to
    first order at this amplitude, `measured_gain` on a batch; `gain_unit` says what a gain compares with
    (`loss`, or GradMax's `gradient` norm). `notes` lists every fallback that was taken.
    """

    site: str
    structure: str
    method: str
    fan_in: Mapping[str, Tensor]
    fan_out: Mapping[str, Tensor]
    bias: Tensor | None = None
    delta: Mapping[str, Tensor] = field(default_factory=dict)
    singular_values: Tensor | None = None
    predicted_gain: float | None = None
    measured_gain: float | None = None
    gain_unit: str = "loss"
    notes: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        """How many units are proposed."""
        return next(iter(self.fan_in.values())).shape[0]

    @property
    def alpha(self) -> Tensor:
        """All fan-in weights `[units, fan-in features]`, the bias last."""
        parts = [w.reshape(self.units, -1) for w in self.fan_in.values()]
        if self.bias is not None:
            parts.append(self.bias.reshape(-1, 1))
        return torch.cat(parts, 1)

    @property
    def omega(self) -> Tensor:
        """All fan-out weights `[fan-out features, units]`, kernel taps fastest."""
        parts = [w.reshape(w.shape[0], self.units, -1).mT.reshape(-1, self.units) for w in self.fan_out.values()]
        return torch.cat(parts, 0)

    def scaled(self, fan_in: float | Tensor, fan_out: float | Tensor, delta: float = 1.0) -> Proposal:
        """The same units with fan-in (and bias) and fan-out multiplied, per unit or all alike; gains forgotten."""
        into = {n: w * _per_unit(fan_in, w, 0) for n, w in self.fan_in.items()}
        outof = {n: w * _per_unit(fan_out, w, 1) for n, w in self.fan_out.items()}
        bias = None if self.bias is None else self.bias * _per_unit(fan_in, self.bias, 0)
        moved = {n: d * delta for n, d in self.delta.items()} if delta else {}
        return replace(
            self, fan_in=into, fan_out=outof, bias=bias, delta=moved, predicted_gain=None, measured_gain=None
        )

    def after(self, morphism: Morphism) -> Proposal:
        """The same units for the network that a morphism made, so that sites measured together grow together.

        morphism = AddUnits(first)(network)
        both = morphism >> AddUnits(second.after(morphism))(morphism.after)

        Slices follow the units at their other ends by serial; units that came since are not connected (weight 0).
        Changes of existing tensors follow the lineage. Gains are forgotten: they were those beside the old units.
        Raises StaleMorphism for a morphism of another network, or one that changed the site's bundles.
        """
        before, network = morphism.before, morphism.after
        who = f"Proposal for site {self.site!r} after {morphism.by}"
        if before.structure != self.structure:
            raise StaleMorphism(who, "a morphism of another network", "one that begins where the proposal was made")
        slices: list[dict[str, Tensor]] = []
        for axis, table in ((1, self.fan_in), (0, self.fan_out)):
            moved = {}
            for name, weight in table.items():
                old, new = before.bundles[name], network.bundles.get(name)
                same = new is not None and (new.source, new.target) == (old.source, old.target)
                if new is None or not same or type(new.pattern) is not type(old.pattern):
                    raise StaleMorphism(f"{who}: bundle {name!r}", "another one", "the same", do="probe again")
                moved[name] = _followed(weight, axis, before, network, new)
            slices.append(moved)
        zero = {n: torch.zeros_like(t) for n, t in before.tensors().items()}
        changes = {n: {**zero, n: d} for n, d in self.delta.items() if n in network.tensors()}
        delta = {n: morphism.lineage.gather(t, n, network.tensors()[n]) for n, t in changes.items()}
        return replace(
            self, structure=network.structure, fan_in=slices[0], fan_out=slices[1], delta=delta,
            predicted_gain=None, measured_gain=None,
        )  # fmt: skip

    @cached_property
    def hash(self) -> str:
        """Names this proposal in texts and ledgers: a hash of everything that changes the network."""
        digest = hashlib.sha256(f"{self.site}|{self.structure}|{self.method}".encode())
        for table in (self.fan_in, self.fan_out, {"bias": self.bias}, self.delta):
            for name, tensor in table.items():
                if tensor is not None:
                    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                    digest.update(tensor.detach().cpu().double().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        gains = [
            f"{word} gain {value:.3g}"
            for word, value in (("predicted", self.predicted_gain), ("measured", self.measured_gain))
            if value is not None
        ]
        notes = [f"({note})" for note in self.notes]
        return f"<Proposal by {self.method}: {self.units} units for {self.site!r}{', '.join(['', *gains, *notes])}>"


def _followed(weight: Tensor, axis: int, before: Network, after: Network, bundle: Bundle) -> Tensor:
    """A slice of new units with its other end (`axis`) as the units of that end stand now."""
    end = bundle.source if axis == 1 else bundle.target
    was, now = before.groups[end], after.groups[end]
    place = {serial: n for n, serial in enumerate(was.serials.tolist())}
    index = torch.tensor([place.get(serial, -1) for serial in now.serials.tolist()])
    if isinstance(bundle.pattern, (Dense, Sparse)):
        positions = torch.arange(now.positions)
        index = torch.where(index[:, None] < 0, -1, index[:, None] * now.positions + positions).flatten()
    elif axis == 1:  # a grouped convolution counts its inputs within each channel group
        index = index[: index.numel() * weight.shape[1] // was.units]
    if was.positions != now.positions or int(index.max()) >= weight.shape[axis]:
        raise StaleMorphism(f"group {end!r}", f"{now.shape}", f"the positions of {was.shape}", do="probe again")
    taken = weight.index_select(axis, index.clamp(min=0).to(weight.device))
    gone = (index < 0).to(weight.device).reshape([-1 if a == axis else 1 for a in range(weight.dim())])
    return taken.masked_fill(gone, 0)


def _per_unit(factor: float | Tensor, weight: Tensor, axis: int) -> float | Tensor:
    if not isinstance(factor, Tensor):
        return factor
    factor = factor.to(weight).repeat_interleave(weight.shape[axis] // factor.numel())  # positions of a flattened unit
    return factor.reshape([-1 if a == axis else 1 for a in range(weight.dim())])
