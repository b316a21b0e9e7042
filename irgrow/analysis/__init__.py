"""What a trained network is like: curvature, flatness, rank, what its sites lack, paths between networks.

Works on compiled networks and, where a network's graph is not needed, on any `nn.Module`.
Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irgrow.analysis.bottleneck import Bottleneck, expressivity_bottlenecks
    from irgrow.analysis.hessian import Hessian, gradient_norms
    from irgrow.analysis.interpolation import interpolate
    from irgrow.analysis.quadrature import Spectrum, spectrum
    from irgrow.analysis.ranks import effective_ranks
    from irgrow.analysis.sharpness import MEASURES, blocks, flatness
    from irgrow.growth.effective_rank import effective_rank
    from irgrow.passes.embed import deviation, local_masks, masked

_HOME = {
    "irgrow.analysis.bottleneck": ("Bottleneck", "expressivity_bottlenecks"),
    "irgrow.analysis.sharpness": ("MEASURES", "blocks", "flatness"),
    "irgrow.analysis.hessian": ("Hessian", "gradient_norms"),
    "irgrow.analysis.interpolation": ("interpolate",),
    "irgrow.analysis.ranks": ("effective_ranks",),
    "irgrow.analysis.quadrature": ("Spectrum", "spectrum"),
    "irgrow.growth.effective_rank": ("effective_rank",),
    "irgrow.passes.embed": ("deviation", "local_masks", "masked"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "MEASURES",
    "Bottleneck",
    "Hessian",
    "Spectrum",
    "blocks",
    "deviation",
    "effective_rank",
    "effective_ranks",
    "expressivity_bottlenecks",
    "flatness",
    "gradient_norms",
    "interpolate",
    "local_masks",
    "masked",
    "spectrum",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'irgrow.analysis' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
