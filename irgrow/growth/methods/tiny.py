"""TINY (Verbockhaven et al., TMLR 2024): the units that lower the expressivity bottleneck most."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from irgrow.growth.methods.base import (
    proposal,
    require_choice,
    require_first_order,
    require_units,
)
from irgrow.ir.errors import Refused
from irgrow.ir.proposal import Proposal
from irgrow.ir.statistics import Statistics
from irgrow.kernels.topk import top_singular
from irgrow.kernels.whiten import Whitening, pseudo_solve, whiten


@dataclass(frozen=True)
class Tiny:
    """New pairs from the SVD of P = S^{-1/2} N = U diag(lambda) V^T.

        alpha_k = sqrt(lambda_k) S^{-1/2} u_k        omega_k = sqrt(lambda_k) v_k

    With dW* held, the bottleneck Psi = min E||v_perp - omega alpha^T b||^2 of the linearised units falls by
    exactly sum lambda^2 over the units kept (dense targets, and convolutions with `taps="centre"`). Which
    root of S is taken does not matter. Fewer units than asked for are proposed when P has a lower rank.

    projection  N = -M_prev + C S_in^+ M (what dW* cannot do); off: -M_prev
    use_S       whiten the features; off (with projection off): the fan-out is GradMax's
    fisher      the same in the metric of E[g g^T] on the targets: steps become natural gradients
    ignore_singular_values    sqrt(lambda) = 1
    delta       `skip` leaves existing weights alone, `apply` adds dW* (also without projection)
    joint       units and dW chosen together: whiten with S - C S_in^+ C^T, the part of b that c does not
                explain; the fall of Psi with dW refitted is then exactly sum lambda^2, the largest there
                is, and with `apply` the delta is that refitted dW. One flat or centre-tap target only.
    amplitude   gamma: alpha and omega times sqrt(gamma), dW* times gamma

    Predicted gain: -sigma'(0) sum_k alpha_k^T M_prev omega_k, plus <dW, -M^T> where it is applied; not
    predicted where sigma is not smooth.
    """

    units: int = 1
    projection: bool = True
    use_S: bool = True
    fisher: bool = False
    ignore_singular_values: bool = False
    delta: str = "skip"
    joint: bool = False
    amplitude: float = 1.0
    threshold: float = 1e-6  # singular values below this times the largest are dropped
    taps: str = "full"

    def __post_init__(self) -> None:
        require_choice(self, "delta", ("skip", "apply"))
        require_units(self)
        if self.joint and not (self.projection and self.use_S):
            raise Refused(
                "Tiny: joint", f"projection={self.projection}, use_S={self.use_S}", "both, as it refines both"
            )
        if not self.amplitude > 0:
            raise Refused("Tiny: amplitude", self.amplitude, "a positive number")

    @property
    def needs(self) -> tuple[str, ...]:
        """The moments that these options read."""
        names = ["M_prev"]
        if self.use_S:
            names.append("S")
        if self.projection:
            names.append("N")
        if self.joint:
            names.append("C")
        if self.joint or self.delta == "apply":
            names += ["S_in", "M"]
        if self.fisher:
            names.append("E")
        return tuple(names)

    def propose(self, statistics: Statistics) -> Proposal:
        """The best units; Refused for an activation that does not fit, or where nothing is left to do."""
        require_first_order(self, statistics)
        statistics.need(*self.needs)
        assert statistics.M_prev is not None
        desired = statistics.N if self.projection else -statistics.M_prev
        if not float(desired.norm()) > self.threshold * float(statistics.M_prev.norm()):
            raise Refused(
                f"Tiny: site {statistics.site!r}",
                "nothing left of the desired move" if float(statistics.M_prev.norm()) else "a gradient of zero",
                "a move that today's neurons cannot make",
                do="train on, or grow another site",
            )
        root, notes = self._root(statistics)
        P = desired if root is None else root.apply_inverse(desired)
        if self.projection or self.delta == "apply":
            notes.extend(statistics.singular)
        fisher = self._fisher(statistics, notes) if self.fisher else []
        P = _on_outputs(P, statistics, fisher)
        top = top_singular(P, min(self.units, *P.shape))
        U, values, V = top.U, top.s, top.V
        rank = int((values > self.threshold * values[:1]).sum())
        U, values, V = U[:, :rank], values[:rank], V[:, :rank]
        if rank < self.units:
            notes.append(f"{rank} units, not {self.units}: the rank of what is left of the desired move")
        size = torch.ones_like(values) if self.ignore_singular_values else values.sqrt()
        size = size * math.sqrt(self.amplitude)
        alpha = (U if root is None else root.unapply(U)) * size
        omega = _on_outputs(V.mT.contiguous(), statistics, fisher, back=True).mT * size
        move = self.amplitude * self._move(statistics, alpha, omega, fisher) if self.delta == "apply" else None
        gain = None
        if statistics.smooth:
            gain = -statistics.slope * float(((statistics.M_prev.mT @ alpha) * omega).sum())
            if move is not None:
                assert statistics.M is not None
                gain -= float((move * statistics.M.mT).sum())
        else:
            notes.append(f"gain not predicted: {statistics.activation} is not smooth")
        return proposal(
            self,
            statistics,
            alpha,
            omega,
            move=move,
            singular_values=values,
            predicted_gain=gain,
            notes=tuple(notes),
        )

    def _root(self, statistics: Statistics) -> tuple[Whitening | None, list[str]]:
        """A whitening of the features, and notes of what was given up."""
        if not self.use_S:
            return None, []
        S, notes = statistics.S, []
        assert S is not None
        if self.joint:
            if len(statistics.fan_out) == 1 and statistics.fan_out[0].taps == 1:
                root, note = _schur_root(statistics)
                return root, note
            notes.append("not joint: there are several targets or taps; whitened with S")
        root = whiten(S)
        if root.rank < S.shape[0]:
            notes.append(f"S is singular: {root.note}")
        return root, notes

    def _fisher(self, statistics: Statistics, notes: list[str]) -> list[Whitening]:
        """A whitening of every target's gradients; what was given up is added to the notes."""
        assert statistics.E is not None
        found = []
        for name, (g, _) in statistics.targets.items():
            found.append(whiten(statistics.E[g, g]))
            if found[-1].rank < g.stop - g.start:
                notes.append(f"E of {name!r} is singular: {found[-1].note}")
        return found

    def _move(self, statistics: Statistics, alpha: Tensor, omega: Tensor, fisher: list[Whitening]) -> Tensor:
        """dW `[g, c]` at amplitude 1: the best move, refitted beside the units if they were chosen jointly."""
        move = statistics.best_move
        if self.joint and len(statistics.fan_out) == 1 and statistics.fan_out[0].taps == 1:
            assert statistics.S_in is not None and statistics.C is not None
            explained = pseudo_solve(statistics.S_in, statistics.C.mT).solution  # [c, b]
            move = move - (omega @ alpha.mT) @ explained.mT / self.amplitude
        if fisher:
            move = move.clone()
            for root, (g, c) in zip(fisher, statistics.targets.values(), strict=True):
                move[g, c] = root.unapply(root.apply_inverse(move[g, c]))
        return move


def _schur_root(statistics: Statistics) -> tuple[Whitening, list[str]]:
    """A whitening of S - C S_in^+ C^T, dropping what is rounding of S."""
    S, C, S_in = statistics.S, statistics.C, statistics.S_in
    assert S is not None and C is not None and S_in is not None
    left = S - C @ pseudo_solve(S_in, C.mT).solution
    values, vectors = torch.linalg.eigh((left + left.mT) / 2)
    kept = values > 1e-7 * float(S.diagonal().sum())  # the trace: at least the largest eigenvalue of S
    notes = []
    if not bool(kept.all()):
        notes.append(f"{int(kept.sum())} of {kept.numel()} feature directions are not explained by existing ones")
    factor = vectors[:, kept] * values[kept].rsqrt()
    return Whitening("eigen", (factor.shape[1],), float("nan"), "Schur complement", factor), notes


def _on_outputs(P: Tensor, statistics: Statistics, fisher: list[Whitening], back: bool = False) -> Tensor:
    """P `[rows, G]` with its output axes multiplied by the Fisher root (back: by its transpose), if there is one."""
    if not fisher:
        return P
    roots = dict(zip(statistics.targets, fisher, strict=True))
    parts, at = [], 0
    width = {name: (r.factor.shape[0] if r.route == "cholesky" else r.factor.shape[1]) for name, r in roots.items()}
    for block in statistics.fan_out:
        inside = width[block.group] if back else block.outputs
        part = P[:, at : at + inside * block.taps].reshape(-1, inside, block.taps).transpose(0, 1).reshape(inside, -1)
        at += inside * block.taps
        root = roots[block.group]
        part = root.unapply(part) if back else root.apply_inverse(part)
        parts.append(
            part.reshape(part.shape[0], -1, block.taps).transpose(0, 1).reshape(-1, part.shape[0] * block.taps)
        )
    return torch.cat(parts, 1)
