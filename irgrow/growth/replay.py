"""Replaying a ledger: the same growths again, on the network it began with."""

from __future__ import annotations

from irgrow.ir.errors import Refused, StaleMorphism
from irgrow.ir.morphism import Morphism
from irgrow.ir.network import Network
from irgrow.passes import Pass
from irgrow.runtime.ledger import Ledger


def replay(ledger: Ledger, network: Network) -> Morphism:
    """All growths of the ledger applied to `network`, as one morphism.

    Structures are rebuilt exactly, each checked against its hash (StaleMorphism names the growth that does
    not fit); weights are what the passes give on this network's weights.
    """
    done: Morphism | None = None
    for number, entry in enumerate(ledger, 1):
        now = network if done is None else done.after
        _same(f"replay, before growth {number} ({entry.by})", now, entry.before)
        step = Pass.from_text(entry.by, ledger.proposals)(now)
        _same(f"replay, after growth {number} ({entry.by})", step.after, entry.after)
        done = step if done is None else done >> step
    if done is None:
        raise Refused("replay", "an empty ledger", "at least one growth")
    return done


def _same(who: str, network: Network, structure: str) -> None:
    if network.structure != structure:
        raise StaleMorphism(
            who, f"structure {network.structure}", structure, do="replay on the network that the ledger began with"
        )
