"""Where to grow: given the candidates, the names of the sites that grow now.

One of your own is a class with one method:

    class Narrowest:
        "The site with the fewest units."

        def choose(self, candidates):
            return [min(candidates.sites, key=lambda site: candidates.network.groups[site].units)]

    ig.fit(..., growth=ig.Growth(where=Narrowest(), how=ig.Tiny(units=2)))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from irgrow.growth.candidates import Candidates
from irgrow.ir.errors import Refused


class Where(Protocol):
    """Chooses among sites. Several names grow one after the other, each measured on the network it finds."""

    def choose(self, candidates: Candidates) -> Sequence[str]: ...


@dataclass(frozen=True)
class RoundRobin:
    """One site after the other, in the order of the network's groups (TINY's Naive)."""

    def choose(self, candidates: Candidates) -> Sequence[str]:
        """The next site. Only that one is measured."""
        return [candidates.sites[candidates.growths % len(candidates.sites)]]


@dataclass(frozen=True)
class AllAtOnce:
    """Every site, each time (GradMax, section 4.2)."""

    def choose(self, candidates: Candidates) -> Sequence[str]:
        """All sites."""
        return candidates.sites


@dataclass(frozen=True)
class LargestGain:
    """The site whose proposal lowers the loss most on a batch (TINY's AmplitudeFactor).

    Compares measured gains: at the amplitude found by the line search, or after one lookahead step for
    silent units. Refused where gains have different units, or were not measured.
    """

    def choose(self, candidates: Candidates) -> Sequence[str]:
        """The site with the largest measured gain."""
        proposals = candidates.all()
        for site, p in proposals.items():
            if p.measured_gain is None:
                raise Refused("LargestGain", f"no measured gain of site {site!r}", "proposals that were refined")
        units = sorted({p.gain_unit for p in proposals.values()})
        if len(units) > 1:
            raise Refused(
                "LargestGain", f"gains in {' and '.join(units)}", "one unit", do="give all sites one kind of method"
            )
        return [max(proposals, key=lambda site: proposals[site].measured_gain or 0.0)]


@dataclass(frozen=True)
class LargestSingularValue:
    """The site with the largest first singular value (GradMax, section 3; TINY's MaxEigenValue)."""

    def choose(self, candidates: Candidates) -> Sequence[str]:
        """The site whose proposal has the largest first singular value."""
        proposals = candidates.all()
        for site, p in proposals.items():
            if p.singular_values is None or p.singular_values.numel() == 0:
                raise Refused(
                    "LargestSingularValue", f"no singular values for site {site!r} by {p.method}", "Tiny or GradMax"
                )
        return [max(proposals, key=lambda site: float(proposals[site].singular_values[0]))]  # type: ignore[index]


Naive = RoundRobin
MaxEigenValue = LargestSingularValue
AmplitudeFactor = LargestGain
