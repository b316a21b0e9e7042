"""For tests, also yours: random networks, what a pass owes, broken networks, a machine that grows at random.

    from irgrow.testing import assert_promise, random_network

`networks`, `places`, `rewrites` and `GrowthMachine` need hypothesis; the rest does not.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "recipe": ("cook", "inputs_for", "random_network"),
    "promises": ("assert_promise", "fingerprint", "gradients", "largest_change", "network_with_other_weights"),
    "corruptions": ("CORRUPTIONS", "Corruption"),
    "strategies": ("networks", "places", "rewrites", "seeded_networks"),
    "machine": ("GrowthMachine",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'irgrow.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"irgrow.testing.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
