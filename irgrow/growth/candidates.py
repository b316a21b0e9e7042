"""`Candidates`: the sites that could grow now, and a proposal for each as soon as somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.proposal import Proposal

Measure = Callable[[Iterable[str]], Mapping[str, Proposal | Refused]]


@dataclass
class Candidates:
    """What `where` chooses from.

    sites     names of the sites that can grow, in the order of the network's groups
    network   the network as it is now (`candidates.network.groups[site].units` is a width)
    growths   how many growths there were so far
    candidates[site]    its proposal, refined if growing refines: measured when first asked for
    candidates.all()    the proposals of all sites, from one run over the data; sites that refuse are left out
    """

    sites: tuple[str, ...]
    network: Network
    growths: int
    measure: Measure
    _found: dict[str, Proposal | Refused] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Proposal:
        if site not in self._found:
            self._found.update(self.measure([site]))
        found = self._found[site]
        if isinstance(found, Refused):
            raise found
        return found

    def all(self) -> dict[str, Proposal]:
        """Every site's proposal; Refused, with the first site's reason, if no site has one."""
        missing = [site for site in self.sites if site not in self._found]
        if missing:
            self._found.update(self.measure(missing))
        found = {s: p for s in self.sites if isinstance(p := self._found[s], Proposal)}
        if not found:
            for refused in self._found.values():
                assert isinstance(refused, Refused)
                raise refused
            raise Refused("growing", "no site that can grow", "a hidden group with bundles on both sides")
        return found
