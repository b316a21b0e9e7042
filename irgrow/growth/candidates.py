"""`Candidates`: what could grow now, each measured as soon as somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from irgrow.growth.selection import Selection
from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal

Measure = Callable[[Iterable[str]], Mapping[str, Proposal | Refused]]


@dataclass
class Candidates:
    """What `where` chooses from, and what `when` may look at.

    sites     names of the sites that can grow, in the order of the network's groups; a new layer's place by its name
    network   the network as it is now
    growths   how many growths there were so far
    candidates[site]    its proposal, refined if growing refines: measured when first asked for
    candidates.all()    the proposals of all sites, from one run over the data; sites that refuse are left out
    candidates.width(site)    its units (0: a new layer's place)
    candidates.selection()    for a method that chooses its own places: what it chose; there are no proposals then
    candidates.gains()  of either, what each would bring: the measured gain where there is one, else the predicted one
    """

    sites: tuple[str, ...]
    network: Network
    growths: int
    measure: Measure
    select: Callable[[], Selection] | None = None
    _found: dict[str, Proposal | Refused] = field(default_factory=dict)
    _chosen: Selection | None = None

    def __getitem__(self, site: str) -> Proposal:
        if site not in self._found:
            self._found.update(self._measured([site]))
        found = self._found[site]
        if isinstance(found, Refused):
            raise found
        return found

    def all(self) -> dict[str, Proposal]:
        """Every site's proposal; Refused, with the first site's reason, if no site has one."""
        missing = [site for site in self.sites if site not in self._found]
        if missing:
            self._found.update(self._measured(missing))
        found = {s: p for s in self.sites if isinstance(p := self._found[s], Proposal)}
        if not found:
            for refused in self._found.values():
                assert isinstance(refused, Refused)
                raise refused
            raise Refused("growing", "no site that can grow", "a hidden group with bundles on both sides")
        return found

    def width(self, site: str) -> int:
        """How many units the site has."""
        return self.network.groups[site].units if site in self.network.groups else 0

    def selection(self) -> Selection:
        """What the method chose, asked once; Refused if it found nothing."""
        assert self.select is not None
        if self._chosen is None:
            self._chosen = self.select()
        return self._chosen

    def gains(self) -> list[float]:
        """What growing would bring, per candidate; empty where everything refuses."""
        try:
            found = [self.selection()] if self.select is not None else [*self.all().values()]
        except Refused:
            return []
        gains = [f.predicted_gain if f.measured_gain is None else f.measured_gain for f in found]
        return [gain for gain in gains if gain is not None]

    def _measured(self, sites: Iterable[str]) -> Mapping[str, Proposal | Refused]:
        if self.select is not None:
            raise Refused("growing", "a method that chooses its own places", "one that proposes units for a site")
        return self.measure(sites)
