"""How the suite runs: how many random examples, which tests, how many threads.

    pytest                    quick: few random examples, always the same ones; no slow tests
    pytest --soak             everything, with many random examples, different on every run
    pytest -m slow            the slow tests only, with few examples
    pytest --hypothesis-profile=soak -k lineage       many examples of something

The profile can also be named by the variable IRGROW_HYPOTHESIS_PROFILE; the option wins.
"""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

SHARED = {
    # The first example of a test may import torch or compile a kernel, on cores that others use as well.
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **SHARED)
settings.register_profile("soak", max_examples=2000, stateful_step_count=30, **SHARED)
settings.load_profile(os.environ.get("IRGROW_HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak",
        action="store_true",
        help="run the slow tests too, with the hypothesis profile `soak` unless another one is named",
    )


def pytest_configure(config: pytest.Config) -> None:
    named = config.getoption("--hypothesis-profile", None) or os.environ.get("IRGROW_HYPOTHESIS_PROFILE")
    if config.getoption("--soak") and not named:
        settings.load_profile("soak")
    if "PYTEST_XDIST_WORKER" in os.environ:
        _one_torch_thread()


def pytest_report_header(config: pytest.Config) -> str:
    slow = "with" if _wants_slow(config) else "without"
    return f"irgrow: {settings().max_examples} random examples a property, {slow} slow tests"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests are deselected unless asked for; GPU tests are skipped where there is no GPU."""
    if not _wants_slow(config):
        slow = [item for item in items if item.get_closest_marker("slow")]
        if slow:
            config.hook.pytest_deselected(items=slow)
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


def _wants_slow(config: pytest.Config) -> bool:
    return bool(config.getoption("--soak")) or "slow" in config.getoption("-m")


def _one_torch_thread() -> None:
    # The workers share the cores. torch reads these variables when it is imported, and child processes
    # inherit them. numba keeps its threads: with one alone, a race in a parallel kernel could never show.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
