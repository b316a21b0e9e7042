"""The expressivity bottleneck: what of the desired move of a site's targets its neurons cannot make.

    Psi = min over dW of E ||v - dW c||^2 = tr E[g g^T] - tr(M^T S_in^+ M),        v = -g

c: the features that already feed the targets, g: the gradient of the loss by their pre-activations, per sample.
Source: Verbockhaven et al., arXiv:2405.19816, equation of section 3; notation of irgrow.ir.statistics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from irgrow.growth.data import Data, Loss
from irgrow.growth.probe import Recordable, probe
from irgrow.ir.statistics import Statistics


@dataclass(frozen=True)
class Bottleneck:
    """desired: E||v||^2. psi: what is left of it after the best change of existing weights."""

    desired: float
    psi: float

    @property
    def share(self) -> float:
        """The part of the desired move that today's neurons cannot make, 0 to 1; 0 where nothing is desired."""
        return self.psi / self.desired if self.desired else 0.0

    @staticmethod
    def of(statistics: Statistics) -> Bottleneck:
        """From moments E, M and S_in; BadData where one was not measured."""
        statistics.need("E", "M", "S_in")
        assert statistics.E is not None and statistics.M is not None
        desired = float(statistics.E.trace())
        moved = -float((statistics.best_move * statistics.M.mT).sum())
        return Bottleneck(desired, max(0.0, desired - moved))


def expressivity_bottlenecks(
    model: Recordable,
    data: Data,
    loss: Loss,
    *,
    sites: Iterable[str] | None = None,
    reduction: str = "mean",
    batch_size: int = 1024,
) -> dict[str, Bottleneck]:
    """The bottleneck of every site (default: all), from one run over the data; errors as of `probe`."""
    measured = probe(
        model, data, loss, sites=sites, want=("E", "M", "S_in"), reduction=reduction, batch_size=batch_size
    )
    return {name: Bottleneck.of(statistics) for name, statistics in measured.items()}
