"""`irgrow.bench(...)`: the repository's benchmarks, from Python. They live in bench/ of a checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from irgrow.ir.errors import BackendError, UnknownName


def checkout() -> Path:
    """The folder that holds bench/; UnknownName where irgrow does not run from a checkout."""
    root = Path(__file__).resolve().parent.parent
    # Beside an installed copy there may be somebody else's `bench`: only a checkout has setup.py next to it.
    if not ((root / "setup.py").is_file() and (root / "bench" / "__main__.py").is_file()):
        raise UnknownName(
            "bench",
            f"no benchmarks beside {Path(__file__).parent}",
            "a checkout of the repository",
            do="install it with `pip install -e .` from there",
        )
    return root


def bench(name: str | Sequence[str] = (), *, device: str = "cpu", seconds: float = 4.0, **shapes: Any) -> list[Any]:
    """The rows of the op `name` (several: a list; default: all), measured now; its table is printed.

        irgrow.bench("masked_matmul", n=1024, density=0.1, device="cuda")

    Sizes take the place of the default ones; a list of values measures each. Every row has name, case, opponent,
    ratio (opponent's time / our time, median), low, high, goal, of_roof and more. Raises BackendError for a device
    that is not there or an op that does not run on it, UnknownName for an op or a size that does not exist or
    without a checkout, and RuntimeError if a result is wrong.
    """
    root = str(checkout())
    if root not in sys.path:
        sys.path.insert(0, root)
    suite, timing = importlib.import_module("bench.suite"), importlib.import_module("bench.timing")
    names = [name] if isinstance(name, str) else list(name)
    given = {key: value if isinstance(value, (list, tuple)) else (value,) for key, value in shapes.items()}
    try:
        rows: list[Any] = suite.run(names, device=device, shapes=given, effort=timing.Effort(seconds=seconds))
    except suite.NoDevice as mistake:
        raise BackendError(f"bench: {mistake}") from None
    except suite.Misuse as mistake:
        raise UnknownName(f"bench: {mistake}") from None
    bad = [f"{row.name} {row.case}: {row.state}: {row.note}" for row in rows if row.failed]
    if bad:
        raise RuntimeError(f"bench: {'; '.join(bad)}")
    return rows
