"""Tests that launch Triton kernels: each runs on a GPU, and, smaller, interpreted on the CPU.

pytest -m gpu tests/gpu                  on the GPU; skipped where there is none
TRITON_INTERPRET=1 pytest tests/gpu      interpreted; tests/test_gpu_interpreted.py does this
"""

from __future__ import annotations

from pathlib import Path

import pytest

from irgrow.kernels.gpu import interpreted


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interpreted():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    """Where the tensors of a test lie."""
    return "cpu" if interpreted() else "cuda"


@pytest.fixture
def large() -> bool:
    """Whether there is time for large shapes: an interpreted tile takes milliseconds."""
    return not interpreted()
