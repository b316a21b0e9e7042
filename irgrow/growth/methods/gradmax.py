"""GradMax (Evci et al., ICLR 2022): silent units whose fan-in will receive the largest gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.growth.methods.base import (
    columns,
    proposal,
    require_choice,
    require_first_order,
    require_units,
)
from irgrow.ir.errors import Refused
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.kernels.topk import top_singular


@dataclass(frozen=True)
class GradMax:
    """Fan-in zero; fan-out = top left singular vectors of E[g b^T] (equation 11): outputs do not change.

    For one unit no fan-out of that norm gives its fan-in a larger gradient. For k > 1 the singular vectors
    are the best orthogonal ones of equal norm (Ky Fan); without orthogonality equation 11 is maximised by
    all norm on the top vector. Needs sigma(0) = 0 and sigma'(0) != 0. Beyond the rank, the rest are random
    vectors orthogonal to the others, with a note.

    scaling: `mean_norm` each column gets `scale` times the mean norm of the existing outgoing weights;
    `fixed` the norm `scale`; with c = scale * mean norm, `paper` c / ||(sigma_1..sigma_k)|| times each unit
    vector (as printed; the norm is not c), `sigma` c sigma_i / ||(sigma_1..sigma_k)|| (the norm is c).

    `kick`: torch's ReLU has the derivative 0 at 0, where the paper takes 1, so a unit with fan-in exactly
    zero would never move. Where the activation is not smooth the fan-in is `kick` times the direction of
    its first gradient step: far below rounding of the outputs, but on the active side.

    `eps`: random fan-ins of that norm instead of zero (section 4.2, for groups with a batch norm in train mode,
    whose first step from exactly zero is by 1/sqrt(its eps); the paper takes 1e-4). Outputs then change a little.
    `mode`: `train` asks `fit` for statistics in train mode (`probe(..., mode="train")`), which give the gradient of
    a training step through a batch norm, E[g (h - E h)^T] / sqrt(its eps).

    Gain: ||E[dL/d fan-in]||^2, the first-order decrease per unit of learning rate (`gain_unit` `gradient`).
    """

    units: int = 1
    scaling: str = "mean_norm"
    scale: float = 1.0
    kick: float = 1e-15
    eps: float = 0.0
    threshold: float = 1e-6  # singular values below this times the largest count as zero
    seed: int = 0
    taps: str = "full"
    mode: str = "eval"

    needs: ClassVar[tuple[str, ...]] = ("M_prev",)

    def __post_init__(self) -> None:
        require_choice(self, "scaling", ("mean_norm", "fixed", "paper", "sigma"))
        require_choice(self, "mode", ("eval", "train"))
        require_units(self)
        if not (self.eps >= 0 and self.kick >= 0):
            raise Refused("GradMax", f"eps={self.eps}, kick={self.kick}", "0 or more")

    def propose(self, statistics: Statistics) -> Proposal:
        """The units with the largest fan-in gradient; Refused for an activation that does not fit."""
        require_first_order(self, statistics)
        statistics.need("M_prev")
        assert statistics.M_prev is not None
        gradient = statistics.slope * statistics.M_prev.mT  # [g, b]
        top = top_singular(gradient, min(self.units, *gradient.shape))
        vectors, values = top.U, top.s
        rank = int((values > self.threshold * values[:1]).sum())
        omega, notes = vectors[:, :rank], list[str]()
        if rank < self.units:
            omega = torch.cat([omega, self._rest(omega, self.units - rank, columns(statistics))], 1)
            notes.append(f"{self.units} units from a gradient of rank {rank}: the other {self.units - rank} are random")
            values = torch.cat([values[:rank], values.new_zeros(self.units - rank)])
        omega = omega * self._norms(values, statistics)
        step = -gradient.mT @ omega  # [b, k]: minus the gradient of the fan-in
        alpha = torch.zeros_like(step)
        if self.eps:
            alpha = torch.randn(step.shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
            alpha = (self.eps * alpha / alpha.norm(dim=0)).to(step.device)
        elif not statistics.smooth and self.kick:
            alpha = self.kick * step / step.norm(dim=0).clamp(min=torch.finfo(step.dtype).tiny)
        return proposal(
            self,
            statistics,
            alpha,
            omega,
            singular_values=values,
            predicted_gain=float(step.square().sum()),
            gain_unit="gradient",
            notes=tuple(notes),
        )

    def _norms(self, values: Tensor, statistics: Statistics) -> Tensor:
        """The norm of each column of omega."""
        c = self.scale * statistics.fan_out_norm
        ones = torch.ones_like(values)
        if self.scaling == "fixed":
            return self.scale * ones
        if self.scaling == "mean_norm":
            return c * ones
        total = values.norm()
        if not float(total) > 0:
            return c * ones
        return c / total * (values if self.scaling == "sigma" else ones)

    def _rest(self, taken: Tensor, count: int, width: int) -> Tensor:
        """`[g, count]` random unit vectors, orthogonal to `taken` and each other while there is room."""
        draw = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(width, count, generator=draw, dtype=torch.float64).to(taken.device)
        room = min(count, width - taken.shape[1])
        free = drawn[:, :room] - taken @ (taken.mT @ drawn[:, :room])
        free = torch.linalg.qr(free - taken @ (taken.mT @ free)).Q
        return torch.cat([free, drawn[:, room:] / drawn[:, room:].norm(dim=0)], 1)
