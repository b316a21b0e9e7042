"""Peak memory of one call, measured in a process of its own.

    python -m bench.memory bench.patches unfolded '{"what": "gram"}'

imports the module, calls the function with these arguments, which sets everything up and returns the work, runs
the work once to warm up, then once more, and prints how far the resident set rose above what it was before, and
how far it rose in all.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak: `above` what stood before the work, and of the `whole` process; what the work returned."""

    above: int
    whole: int
    result: Any


def peak(module: str, function: str, arguments: Mapping[str, Any], *, warm: bool = True) -> Peak:
    """What the work needs at its peak, and what it returned if that is JSON.

    Raises RuntimeError where the process fails (it needs Linux's /proc).
    """
    command = [sys.executable, "-m", "bench.memory", module, function, json.dumps(dict(arguments)), str(int(warm))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"bench.memory {module} {function}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _main(module: str, function: str, arguments: str, warm: str) -> None:
    work = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    result = work() if int(warm) else None
    del result
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    CLEAR.write_text("5")  # forgets the highest resident set so far
    result = work()
    highest = _status("VmHWM")
    found = {"above": highest - before, "whole": highest, "result": result}
    try:
        text = json.dumps(found)
    except TypeError:
        text = json.dumps({**found, "result": None})
    print(text)


def _status(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"{STATUS} has no {field}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
