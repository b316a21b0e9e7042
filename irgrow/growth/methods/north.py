"""NORTH (Maile et al., 2022): new units that do what the old ones do not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from irgrow.growth.data import Data, Loss
from irgrow.growth.entries import Entrance
from irgrow.growth.methods.base import proposal, require_choice, require_units
from irgrow.growth.methods.draws import fan_out, normal
from irgrow.growth.methods.with_model import Bindable, require_data, require_model
from irgrow.ir.errors import Refused
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.kernels.whiten import pseudo_solve, whiten
from irgrow.runtime.model import CompiledNetwork

EMPTY = 1e-9  # relative: what is smaller than this of a direction or a singular value is rounding


@dataclass(frozen=True)
class North(Bindable):
    """Fan-ins that are new to the group; fan-out zero (outputs stay), or random.

    how     select  of `candidates` random directions those whose activations have the largest relative residual
                    off the span of the existing activations (and of those chosen before, unless greedy=False)
            pre     S^+ B V_ker(A) r, r ~ N(0, I): random, with pre-activations orthogonal to the existing ones A.
                    Drawn from its distribution through S = E[b b^T] and W (A = W B):
                    S^{-1/2} (I - P) r with P the projector on the range of S^{1/2} W^T
            weight  random, orthogonal to the existing fan-in weights (bias included); reads no data

    b are the features that enter the group on the data given, a constant 1 last where it has a bias; on an
    image every position is a sample. Each fan-in gets `scale` times the mean norm of the existing ones.
    `samples`: rows that `select` compares at most.

    Refused: `pre` and `weight` where the width reaches the fan-in (the kernel is empty), sites entered at
    several groups, norms across units. More units than the kernel has dimensions depend on each other (noted).
    Source: Maile et al., NORTH, arXiv:2202.08539; the form of `pre` is that of Verbockhaven et al., TMLR 2024.
    """

    units: int = 1
    how: str = "select"
    fan_out: str = "zero"
    candidates: int = 1000
    greedy: bool = True
    scale: float = 1.0
    samples: int = 4096
    seed: int = 0
    taps: str = "full"

    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_choice(self, "how", ("select", "pre", "weight"))
        require_choice(self, "fan_out", ("zero", "random"))
        require_units(self)
        if self.how == "select" and self.candidates < self.units:
            raise Refused("North: candidates", self.candidates, f"at least the {self.units} units asked for")

    def propose_with(
        self, statistics: Statistics, model: CompiledNetwork, data: Data | None = None, loss: Loss | None = None
    ) -> Proposal:
        """The new units, seen on `data`; `loss` is not read."""
        network = require_model(self, statistics, model)
        entrance = Entrance(f"North: site {statistics.site!r}", network, statistics.site, statistics.bias)
        draw = torch.Generator().manual_seed(self.seed + statistics.units)
        if self.how == "select":
            alpha, notes = self._selected(entrance, model, require_data(self, statistics, data), draw)
        elif self.how == "pre":
            S = entrance.second_moment(model, require_data(self, statistics, data))
            alpha, notes = self._off_preactivations(entrance, S, draw)
        else:
            alpha, notes = self._off_weights(entrance, draw)
        omega = fan_out(statistics, self.units, self.fan_out, draw).to(alpha.device)
        return proposal(self, replace(statistics, notes=()), alpha, omega, notes=notes)

    def _normed(self, entrance: Entrance, alpha: Tensor) -> Tensor:
        """Columns of the norm asked for."""
        norm = float(entrance.weights.norm(dim=1).mean()) or 1.0
        return alpha * (self.scale * norm / alpha.norm(dim=0).clamp(min=torch.finfo(alpha.dtype).tiny))

    def _off_weights(self, entrance: Entrance, draw: torch.Generator) -> tuple[Tensor, tuple[str, ...]]:
        W = entrance.weights
        drawn, note = self._kernel(entrance, W.mT, draw)
        return self._normed(entrance, drawn), note

    def _off_preactivations(
        self, entrance: Entrance, S: Tensor, draw: torch.Generator
    ) -> tuple[Tensor, tuple[str, ...]]:
        root, W = whiten(S), entrance.weights.to(S.device)
        drawn, note = self._kernel(entrance, root.apply_inverse(S @ W.mT), draw)
        if root.rank < S.shape[0]:
            note = (*note, f"S is singular: {root.note}")
        alpha = self._normed(entrance, root.unapply(drawn))
        held = W @ S  # rounding of the whitening, once more: alpha -= W^T (W S W^T)^+ W S alpha
        for _ in range(2):
            alpha = alpha - W.mT @ pseudo_solve(held @ W.mT, held @ alpha, rtol=1e-12).solution
        return alpha, note

    def _kernel(self, entrance: Entrance, columns: Tensor, draw: torch.Generator) -> tuple[Tensor, tuple[str, ...]]:
        """`[rows, units]` random vectors orthogonal to the columns; Refused where nothing is."""
        rows = columns.shape[0]
        U, values, _ = torch.linalg.svd(columns, full_matrices=False)
        U = U[:, values > EMPTY * values[:1]]
        left = rows - U.shape[1]
        if left < 1:
            raise Refused(
                entrance.who,
                f"{entrance.group.units} units on a fan-in of {rows} (independent) features",
                "fewer units than features: otherwise no direction is orthogonal to all units (the kernel is empty)",
                do="use how='select', or grow another site",
            )
        drawn = normal(draw, rows, self.units, like=columns)
        for _ in range(2):
            drawn = drawn - U @ (U.mT @ drawn)
        note = f"{self.units} units from a kernel of dimension {left}: they depend on each other"
        return drawn, (note,) if self.units > left else ()

    def _selected(
        self, entrance: Entrance, model: CompiledNetwork, data: Data, draw: torch.Generator
    ) -> tuple[Tensor, tuple[str, ...]]:
        group = entrance.group
        width = entrance.width
        drawn = self._normed(entrance, normal(draw, width, self.candidates)).to(entrance.weights.device)
        old, new, count = [], [], 0
        slope = 1.0 if group.norm is None else 1.0 / math.sqrt(1.0 + group.norm.eps)
        for values in entrance.batches(model, data, group.name):
            b = entrance.rows(values)
            held = values[group.name].double()
            old.append(held.reshape(held.shape[0], group.units, -1).mT.reshape(-1, group.units))
            new.append(group.function(slope * (b @ drawn)))
            count += b.shape[0]
            if count >= self.samples:
                break
        A, H = torch.cat(old)[: self.samples], torch.cat(new)[: self.samples]
        size = H.norm(dim=0)
        H = H / torch.where(size > 0, size, 1.0)  # a candidate that is silent everywhere has residual 0
        left = H - _projected(A, H)
        chosen: list[int] = []
        for _ in range(self.units):
            residual = left.norm(dim=0)
            residual[chosen] = -1.0
            best = int(residual.argmax())
            if not float(residual[best]) > EMPTY**0.5:
                raise Refused(
                    entrance.who,
                    f"{len(chosen)} of {self.units} units whose activations are new, among {self.candidates}",
                    "activations that the existing units do not span",
                    do="ask for fewer units, give more data, or grow another site",
                )
            chosen.append(best)
            if self.greedy:
                q = left[:, best] / left[:, best].norm()
                left = left - torch.outer(q, q @ left)
        notes = (f"residuals are of the first {self.samples} rows",) if count > self.samples else ()
        return drawn[:, chosen], notes


def _projected(A: Tensor, H: Tensor) -> Tensor:
    """What the columns of A can say of the columns of H."""
    U, values, _ = torch.linalg.svd(A, full_matrices=False)
    U = U[:, values > EMPTY * values[:1]]
    return U @ (U.mT @ H)
