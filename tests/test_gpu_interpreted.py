"""The tests of tests/gpu, interpreted on the CPU: Triton decides that when it is imported, hence the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "gpu"


def test_interpreted(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("triton")
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER)]
    arguments += ["--soak"] if request.config.getoption("--soak") else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        arguments,
        cwd=FOLDER.parent.parent,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
