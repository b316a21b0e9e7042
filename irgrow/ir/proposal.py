"""`Proposal`: new units for a site, as a value: what a growth method returns and `AddUnits` applies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor


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


def _per_unit(factor: float | Tensor, weight: Tensor, axis: int) -> float | Tensor:
    if not isinstance(factor, Tensor):
        return factor
    factor = factor.to(weight).repeat_interleave(weight.shape[axis] // factor.numel())  # positions of a flattened unit
    return factor.reshape([-1 if a == axis else 1 for a in range(weight.dim())])
