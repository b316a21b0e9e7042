"""SENN's trigger (Mitchell et al., 2023): grow where new units raise the natural expansion score most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from irgrow.growth.candidates import Candidates
from irgrow.growth.data import Data, Loss
from irgrow.growth.methods.tiny import Tiny
from irgrow.growth.probe import probe
from irgrow.growth.when import Moment
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.statistics import Statistics
from irgrow.kernels.whiten import pseudo_solve, whiten
from irgrow.runtime.model import CompiledNetwork


def expansion_score(statistics: Statistics) -> float:
    """eta = <G, F^+ G> for the weights that feed the site's targets: how fast natural gradient descent falls.

    G = M^T is their gradient and F = S_in (x) E its Fisher matrix in Kronecker form, so eta = tr(E^+ M^T S_in^+ M),
    summed over the targets. Scaling the loss changes nothing. Source: arXiv:2307.04526.
    """
    statistics.need("S_in", "M", "E")
    assert statistics.S_in is not None and statistics.M is not None and statistics.E is not None
    total = 0.0
    for g, c in statistics.targets.values():
        explained = statistics.M[c, g].mT @ pseudo_solve(statistics.S_in[c, c], statistics.M[c, g]).solution
        root = whiten(statistics.E[g, g])
        total += float(root.apply_inverse(root.apply_inverse(explained).mT.contiguous()).trace())
    return total


@dataclass(frozen=True, eq=False)
class Expansion:
    """When and where to grow: where `units` new units would raise the expansion score by more than the factor `ratio`.

    What they add is the sum of squared singular values of `Tiny(units, fisher=True)`: the score of the best new
    units beyond what the existing weights can do. `choose` names the one site with the largest factor. Looks every
    `epochs` epochs, at most `times` times. Sites that Tiny refuses do not count.

        grow = ig.Expansion(data, F.cross_entropy, units=2)
        growth = ig.Growth(when=grow, where=grow, how=ig.Tiny(2, fisher=True))

    Source: Mitchell, Menzenbach, Kersting and Mundt, Self-Expanding Neural Networks, arXiv:2307.04526.
    """

    data: Data
    loss: Loss
    units: int = 1
    ratio: float = 1.1
    reduction: str = "mean"
    epochs: int = 1
    times: int | None = None
    needs: ClassVar[tuple[str, ...]] = ("S", "M_prev", "N", "S_in", "M", "E")

    def __post_init__(self) -> None:
        if self.units < 1 or not self.ratio >= 1 or self.epochs < 1:
            found = f"units={self.units}, ratio={self.ratio}, epochs={self.epochs}"
            raise Refused("Expansion", found, "at least one unit, a ratio of 1 or more, at least 1 epoch")

    def factors(self, network: Network, sites: tuple[str, ...]) -> dict[str, float]:
        """By how much each site's score would be multiplied; sites that refuse are left out."""
        found = {}
        for name in sites:
            if name not in network.groups:
                continue
            try:
                s = probe(
                    CompiledNetwork(network), self.data, self.loss, sites=[name],
                    want=self.needs, reduction=self.reduction,
                )[name]  # fmt: skip
                values = Tiny(self.units, fisher=True).propose(s).singular_values
            except Refused:
                continue
            assert values is not None
            found[name] = 1.0 + float(values.square().sum()) / max(expansion_score(s), 1e-300)
        return found

    def due(self, moment: Moment) -> bool:
        """True if some site's factor passes the ratio."""
        if not moment.epoch_ended or moment.epoch % self.epochs:
            return False
        if self.times is not None and moment.growths >= self.times:
            return False
        return bool(self.choose(moment.candidates))

    def choose(self, candidates: Candidates) -> list[str]:
        """The site with the largest factor, if it passes the ratio."""
        found = self.factors(candidates.network, candidates.sites)
        best = max(found, key=lambda name: found[name], default=None)
        return [best] if best is not None and found[best] > self.ratio else []
