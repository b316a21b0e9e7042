"""irgrow: networks as neuron-level graphs that grow while they train.

`import irgrow as ig` is light; every name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "irgrow.ir.network": ("Network", "Group", "Bundle", "Norm", "Unit", "Neuron"),
    "irgrow.ir.pattern": ("Dense", "Sparse", "Identity", "Conv2d", "Local2d", "Pool2d", "Pattern"),
    "irgrow.ir.builder": ("Builder", "mlp", "cnn"),
    "irgrow.ir.exchange": ("to_networkx", "from_networkx"),
    "irgrow.ir.interpreter": ("interpret",),
    "irgrow.ir.edit": ("Edit",),
    "irgrow.ir.lineage": ("Lineage",),
    "irgrow.ir.morphism": ("Morphism", "Promise", "SameFunction", "FirstOrder", "Changes"),
    "irgrow.ir.site": ("Site",),
    "irgrow.ir.statistics": ("Statistics",),
    "irgrow.ir.proposal": ("Proposal",),
    "irgrow.ir.errors": ("IrgrowError",),
    "irgrow.benchmarks": ("bench",),
    "irgrow.passes": (
        "Pass",
        "SplitUnit",
        "AddUnits",
        "InsertNeuron",
        "AddLayer",
        "EmbedConv",
        "SplitUnits",
        "InsertOnEdge",
        "AddEdges",
        "RemoveEdges",
        "MergeUnits",
        "PruneUnits",
        "AddGroup",
        "AddResidual",
        "AddSkip",
        "Freeze",
        "FreezeEntries",
        "Unfreeze",
        "UnfreezeEntries",
        "WidenUnits",
        "Densify",
        "register",
    ),
    "irgrow.runtime.model": ("CompiledNetwork", "compile"),
    "irgrow.growth.probe": ("probe", "Gathering"),
    "irgrow.growth.refine": ("refine",),
    "irgrow.growth.fit": ("fit", "History"),
    "irgrow.growth.measure": ("Growth",),
    "irgrow.growth.between": ("Between",),
    "irgrow.growth.methods": (
        "Method",
        "NeedsModel",
        "Random",
        "GradMax",
        "Tiny",
        "North",
        "Silent",
        "Copies",
        "VarianceTransfer",
    ),
    "irgrow.growth.optimised": ("GradMaxOpt", "InverseGradMax", "FireflyOpt"),
    "irgrow.growth.firefly": ("Firefly",),
    "irgrow.growth.splitting": ("SplittingDescent",),
    "irgrow.growth.new_edges": ("NewEdges",),
    "irgrow.growth.linear_map": ("LinearMap",),
    "irgrow.growth.selection": ("Selection", "Selects", "Candidate"),
    "irgrow.growth.continual": ("Continual",),
    "irgrow.growth.effective_rank": ("FullRank", "effective_rank", "effective_ranks"),
    "irgrow.growth.expansion": ("Expansion", "expansion_score"),
    "irgrow.growth.when": ("Every", "OnPlateau", "Schedule", "GainAbove"),
    "irgrow.growth.where": (
        "RoundRobin",
        "AllAtOnce",
        "LargestGain",
        "LargestSingularValue",
        "Naive",
        "MaxEigenValue",
        "AmplitudeFactor",
    ),
    "irgrow.experiments.compare": ("compare", "Comparison"),
    "irgrow.io": ("save", "load", "read_extra", "save_checkpoint", "load_checkpoint", "Checkpoint"),
}
_MODULES = ("passes", "kernels", "ir", "growth", "testing", "analysis", "io", "viz", "experiments")
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"irgrow.{name}")
    else:
        raise AttributeError(f"module 'irgrow' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
