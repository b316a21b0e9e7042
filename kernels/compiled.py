"""How much numba has compiled: growing a network must not add to it."""

from __future__ import annotations

import sys


def compiled_variants() -> dict[str, int]:
    """For every compiled function of this package that is loaded: how many types of arguments it was compiled for."""
    found: dict[str, int] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(__package__ + "."):
            for function in vars(module).values():
                if hasattr(function, "signatures") and hasattr(function, "py_func"):
                    code = function.py_func
                    found[f"{code.__module__}.{code.__qualname__}"] = len(function.signatures)
                elif isinstance(getattr(function, "variants", None), int):  # an Entry
                    found[f"{function.__module__}.{function.__name__}"] = function.variants
    return found


def recompiled(before: dict[str, int]) -> list[str]:
    """The functions that had been compiled `before`, and since then for other types of arguments as well."""
    return [name for name, count in compiled_variants().items() if before.get(name, 0) and count > before[name]]
