"""How the suite measures: in pairs, warm, without the collector; quantiles; the roof; peak memory."""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path

import pytest
import torch

from bench import memory, timing
from bench.timing import Effort, Roof

ONE_CALL = Effort(pairs=4, seconds=10.0, least=2, sample_s=0.0)


def test_pairs_are_interleaved_after_a_warm_up() -> None:
    calls: list[str] = []
    times = timing.paired(lambda: calls.append("a"), lambda: calls.append("b"), effort=ONE_CALL)
    assert calls.index("b") >= 2  # ours was warm before theirs began
    order = [key for key, _ in itertools.groupby(calls)]
    assert order == ["a", "b"] * (1 + 4)  # the warm-up, then four pairs
    assert len(times.ratios) == 4


def test_the_ratio_is_their_time_over_ours_and_spread_holds_it() -> None:
    times = timing.paired(lambda: time.sleep(1e-3), lambda: time.sleep(4e-3), effort=ONE_CALL)
    assert 2.0 < times.ratio < 5.0
    low, high = times.spread
    assert low <= times.ratio <= high
    assert times.ratios == tuple(b / a for a, b in zip(times.ours_s, times.theirs_s, strict=True))


def test_the_collector_is_off_while_timing_and_on_again_afterwards() -> None:
    seen: list[bool] = []
    assert gc.isenabled()
    timing.paired(lambda: seen.append(gc.isenabled()), lambda: None, effort=ONE_CALL)
    assert not any(seen)
    assert gc.isenabled()


def test_the_collector_is_on_again_after_an_error() -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        timing.paired(fail, lambda: None, effort=ONE_CALL)
    assert gc.isenabled()


def test_a_short_call_is_repeated_until_a_sample_is_long_enough() -> None:
    calls = itertools.count()
    times = timing.paired(
        lambda: next(calls), lambda: None, effort=Effort(pairs=2, seconds=1.0, least=2, sample_s=1e-3)
    )
    assert next(calls) > 1000
    assert max(times.ours_s) < 1e-4  # per call


def test_what_is_prepared_is_fresh_and_not_timed() -> None:
    numbers = itertools.count()
    seen: list[int] = []

    def prepare() -> int:
        time.sleep(0.01)
        return next(numbers)

    times = timing.paired(seen.append, lambda: None, effort=ONE_CALL, prepare=(prepare, None))
    assert seen == list(range(len(seen)))  # every call got one of its own
    assert max(times.ours_s) < 0.01


def test_threads_are_set_for_each_side_and_restored() -> None:
    before = torch.get_num_threads()
    seen: dict[str, set[int]] = {"a": set(), "b": set()}
    timing.paired(
        lambda: seen["a"].add(torch.get_num_threads()),
        lambda: seen["b"].add(torch.get_num_threads()),
        effort=ONE_CALL,
        threads=(before, before + 1),
    )
    assert seen == {"a": {before}, "b": {before + 1}}
    assert torch.get_num_threads() == before


def test_the_quickest_opponent_is_found_with_its_threads() -> None:
    name, threads, found = timing.quickest(
        {"slow": lambda: time.sleep(5e-3), "fast": lambda: time.sleep(1e-4)}, threads=(1, 2)
    )
    assert name == "fast" and threads in (1, 2)
    assert found["fast"] < found["slow"]


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.1, 1.4), (0.5, 3.0), (0.9, 4.6), (1.0, 5.0)])
def test_quantiles(q: float, expected: float) -> None:
    assert timing.quantile([5.0, 1.0, 4.0, 2.0, 3.0], q) == pytest.approx(expected)


def test_the_roof_is_the_slower_of_arithmetic_and_traffic() -> None:
    roof = Roof()
    roof._flops["float32"] = 1e11
    roof._bandwidth.update({exponent: 1e10 for exponent in range(14, 29)})
    assert roof.time_s(1e9, 1e6) == (pytest.approx(1e-2), "flops")
    assert roof.time_s(1e6, 1e8) == (pytest.approx(1e-2), "bandwidth")


def test_bandwidth_is_measured_for_the_size_in_question() -> None:
    roof = Roof()
    assert roof.bandwidth(2.0**16) > 1e8
    assert list(roof._bandwidth) == [16]


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="peak memory needs Linux's /proc")
def test_peak_memory_sees_what_a_call_allocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory_example.py").write_text(
        "def allocates(megabytes):\n    return lambda: len(bytes(bytearray(b'1') * (megabytes * 2**20))) // 2**20\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = memory.peak("memory_example", "allocates", {"megabytes": 32})
    assert found.result == 32
    assert 60 * 2**20 < found.above < 80 * 2**20  # the array and its copy
    assert found.whole > found.above
    with pytest.raises(RuntimeError, match=r"bench\.memory memory_example absent: .*has no attribute 'absent'"):
        memory.peak("memory_example", "absent", {})
