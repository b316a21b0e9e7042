"""Rewrites: each pass turns one Network into the next and says what it keeps."""

if __name__ != "irgrow.passes":
    raise ImportError(
        f"this package was imported as {__name__!r}; import it as 'irgrow.passes' "
        "(a second copy would hold a second registry)"
    )

from irgrow.passes.add_block import AddGroup, AddResidual, AddSkip
from irgrow.passes.add_layer import AddLayer
from irgrow.passes.add_units import AddUnits
from irgrow.passes.base import Pass, Sequence, register, registered
from irgrow.passes.edges import AddEdges, RemoveEdges
from irgrow.passes.embed import Densify, EmbedConv
from irgrow.passes.freeze import Freeze, FreezeEntries, Unfreeze, UnfreezeEntries
from irgrow.passes.insert_edge import InsertOnEdge
from irgrow.passes.insert_neuron import InsertNeuron
from irgrow.passes.merge import MergeUnits
from irgrow.passes.prune import PruneUnits
from irgrow.passes.split import SplitUnit
from irgrow.passes.split_offset import SplitUnits
from irgrow.passes.widen import WidenUnits


class Listing(dict[str, type[Pass]]):
    """Passes by name; prints as one line for each: what is true afterwards, and the source."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = ((name, (kind.__doc__ or "").partition("\n")[0], kind.reference) for name, kind in self.items())
        return "\n".join(f"{name:<{width}}  {what}{f' ({source})' if source else ''}" for name, what, source in lines)

    __repr__ = __str__


def list() -> Listing:
    """Every registered pass by name."""
    return Listing(registered())


__all__ = [
    "AddEdges",
    "AddGroup",
    "AddLayer",
    "AddResidual",
    "AddSkip",
    "AddUnits",
    "Densify",
    "EmbedConv",
    "Freeze",
    "FreezeEntries",
    "InsertNeuron",
    "InsertOnEdge",
    "MergeUnits",
    "Pass",
    "PruneUnits",
    "RemoveEdges",
    "Sequence",
    "SplitUnit",
    "SplitUnits",
    "Unfreeze",
    "UnfreezeEntries",
    "WidenUnits",
    "list",
    "register",
]
