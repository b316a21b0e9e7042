"""Pictures: networks as SVG, growth as a plot, files on the terminal. Nothing heavy is imported before it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irgrow.viz.drawing import network_svg, save_svg
    from irgrow.viz.growth import growth_plot
    from irgrow.viz.terminal import show

_HOME = {
    "network_svg": "irgrow.viz.drawing",
    "save_svg": "irgrow.viz.drawing",
    "growth_plot": "irgrow.viz.growth",
    "show": "irgrow.viz.terminal",
}

__all__ = ["growth_plot", "network_svg", "save_svg", "show"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'irgrow.viz' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
