"""What keeps a change of units from being exact, and the refusals that say so (ALGORITHMS, section 5b)."""

from __future__ import annotations

from collections.abc import Collection

from irgrow.ir.errors import Refused
from irgrow.ir.network import Network
from irgrow.ir.site import Site


def refuse_max_targets(who: str, network: Network, site: Site, *, unused: Collection[str] = ()) -> None:
    """Raises Refused if what leaves the site (`unused` inner bundles aside) enters a group that aggregates by max."""
    inner = (name for name in site.inner if network.bundles[name].source in site.groups and name not in unused)
    for name in (*site.leaving, *inner):
        target = network.groups[network.bundles[name].target]
        if target.aggregation == "max":
            raise Refused(
                who,
                f"bundle {name!r} enters group {target.name!r}, which aggregates by max",
                "targets that sum",
                do="there is no exact way to add or split edges into a max",
            )


def refuse_norm_across_units(who: str, network: Network, site: Site) -> None:
    """Raises Refused if a group of the site has a normalisation over its units."""
    for name in site.groups:
        norm = network.groups[name].norm
        if norm is not None and norm.across_units:
            raise Refused(
                who,
                f"group {name!r} has a {norm.kind} norm, so its old outputs would change",
                "no norm across units, or a batch norm",
            )


def refuse_loops(who: str, network: Network, site: Site) -> None:
    """Raises Refused if a group of the site lies in a loop of the group graph."""
    for names, cyclic in network.components:
        inside = set(names) & set(site.groups)
        if cyclic and inside:
            raise Refused(
                who,
                f"group {min(inside)!r} lies in a loop of groups, where dense rows could close a cycle of neurons",
                "a site outside loops",
                do="use InsertNeuron there",
            )
