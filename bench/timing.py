"""How time is measured: interleaved pairs in one process, and the roof of this machine.

Ours and theirs alternate, so that what disturbs the machine disturbs both; the ratio is taken within each pair.
A sample repeats its function until the clock can be trusted, after one call that is not timed. The garbage
collector is off meanwhile. On CUDA a sample ends when the device has finished.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import Any

LONG_S = 0.05  # a sample that lasts longer than this does not notice cold caches
SAMPLE_S = 2e-3  # a sample lasts at least this long: far above the clock's resolution and a call's overhead
Work = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure: `pairs` pairs if they fit into `seconds`, and at least `least`."""

    pairs: int = 25
    seconds: float = 4.0
    least: int = 5
    sample_s: float = SAMPLE_S


QUICK = Effort(pairs=2, seconds=0.05, least=2, sample_s=0.0)  # does it run at all?


@dataclass(frozen=True)
class Paired:
    """Times of ours and theirs, pair by pair, in seconds per call."""

    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]

    @cached_property
    def ratios(self) -> tuple[float, ...]:
        """Their time over ours: above 1, ours is faster."""
        return tuple(theirs / ours for ours, theirs in zip(self.ours_s, self.theirs_s, strict=True))

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The 10 % and 90 % quantiles of the ratios."""
        return quantile(self.ratios, 0.1), quantile(self.ratios, 0.9)


def paired(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *,
    effort: Effort | None = None,
    device: str = "cpu",
    threads: tuple[int, int] | None = None,
    prepare: tuple[Work | None, Work | None] = (None, None),
) -> Paired:
    """Ours, theirs, ours, theirs, ...: both warm, with the collector off; `threads`: torch threads of each.

    `prepare` of either is called, untimed, before every call, which then takes its result.
    """
    effort = effort or Effort()
    both = (
        _Sampler(ours, device, threads and threads[0], prepare[0]),
        _Sampler(theirs, device, threads and threads[1], prepare[1]),
    )
    times: tuple[list[float], list[float]] = ([], [])
    with _quiet():
        for sampler in both:
            sampler.warm_up(effort.sample_s)
        start = time.perf_counter()
        while len(times[0]) < effort.least or (
            len(times[0]) < effort.pairs and time.perf_counter() - start < effort.seconds
        ):
            for sampler, mine in zip(both, times, strict=True):
                mine.append(sampler.sample())
    return Paired(tuple(times[0]), tuple(times[1]))


def quickest(
    candidates: Mapping[str, Callable[..., Any]],
    *,
    device: str = "cpu",
    threads: Sequence[int] = (),
    prepare: Mapping[str, Work] | None = None,
    effort: Effort | None = None,
) -> tuple[str, int | None, dict[str, float]]:
    """The name of the fastest candidate, its best number of torch threads, and every candidate's best time in s."""
    if len(candidates) == 1 and len(threads) < 2:
        return next(iter(candidates)), (threads or (None,))[0], {}
    effort = effort or Effort()
    found: dict[str, float] = {}
    best: tuple[float, str, int | None] = (math.inf, "", None)
    with _quiet():
        for name, work in candidates.items():
            for count in threads or (None,):
                sampler = _Sampler(work, device, count, (prepare or {}).get(name))
                sampler.warm_up(effort.sample_s)
                time_s = sampler.sample()
                if time_s < 10 * LONG_S:
                    time_s = min([time_s, *(sampler.sample() for _ in range(effort.least // 2))])
                found[name] = min(time_s, found.get(name, math.inf))
                best = min(best, (time_s, name, count), key=lambda entry: entry[0])
    return best[1], best[2], found


def min_s(
    work: Callable[..., Any], *, device: str = "cpu", samples: int = 9, prepare: Callable[[], Any] | None = None
) -> float:
    """The shortest of a few samples, in seconds per call: for a unit of measurement. `prepare` as in `paired`."""
    with _quiet():
        sampler = _Sampler(work, device, None, prepare)
        sampler.warm_up(SAMPLE_S)
        return min(sampler.sample() for _ in range(samples))


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of the values, linear between them."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


class _Sampler:
    """One side of a pair: how often it must repeat, and on how many threads it runs."""

    def __init__(self, work: Callable[..., Any], device: str, threads: int | None, prepare: Work | None = None) -> None:
        self._work, self._device, self._threads, self._prepare = work, device, threads, prepare
        self._repeats = 1
        self._short = False

    def warm_up(self, sample_s: float) -> None:
        """Two calls (compiling, caching, allocating), then as many repeats as fill a sample."""
        with _threads(self._threads):
            took = self._timed()
            if took < 10 * LONG_S:
                took = self._timed()
            while took < sample_s and self._prepare is None:
                self._repeats = max(self._repeats + 1, math.ceil(1.2 * self._repeats * sample_s / max(took, 1e-7)))
                took = self._timed()
            self._short = took < LONG_S

    def sample(self) -> float:
        """Seconds per call. A call before brings caches and threads back from the other side's work."""
        with _threads(self._threads):
            if self._short and self._prepare is None:
                self._work()
            return self._timed() / self._repeats

    def _timed(self) -> float:
        prepare = self._prepare
        work: Work = self._work if prepare is None else partial(self._work, prepare())
        _finish(self._device)
        start = time.perf_counter()
        for _ in range(self._repeats):
            work()
        _finish(self._device)
        return time.perf_counter() - start


@contextmanager
def _quiet() -> Iterator[None]:
    """No garbage collection inside; one of what is young before."""
    enabled = gc.isenabled()
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


# --- the roof -------------------------------------------------------------------------------------------------


@dataclass
class Roof:
    """What this machine can do, measured when first asked for: flops, and bytes moved, per second.

    Bandwidth depends on where the data lives, so it is measured for the size in question (a power of two): what
    fits a cache is compared with that cache.
    """

    device: str = "cpu"
    _flops: dict[str, float] = field(default_factory=dict)
    _bandwidth: dict[int, float] = field(default_factory=dict)

    def flops(self, precision: str = "float32") -> float:
        """The best matrix product of this machine, [2048, 2048] (CUDA: [8192, 8192]), flop/s."""
        import torch

        if precision not in self._flops:
            n = 8192 if self.device.startswith("cuda") else 2048
            a, b = (torch.randn(n, n, device=self.device, dtype=getattr(torch, precision)) for _ in range(2))
            products: list[Work] = [lambda: a @ b]
            onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
            usable = onednn is not None and torch.backends.mkldnn.is_available()
            if self.device == "cpu" and precision == "float32" and usable:
                products.append(lambda: onednn(a, b, None, "none", [], ""))
            self._flops[precision] = 2 * n**3 / min(self._best(work) for work in products)
        return self._flops[precision]

    def bandwidth(self, moved: float) -> float:
        """Bytes per second (read and written both count) of copying where `moved` bytes are moved in all."""
        import torch

        exponent = min(max(round(math.log2(max(moved, 1))), 14), 28)
        if exponent not in self._bandwidth:
            source = torch.ones(2 ** (exponent - 1) // 4, device=self.device)
            target = torch.empty_like(source)
            repeats = max(1, 2 ** (20 - exponent))

            def copies() -> None:
                for _ in range(repeats):
                    target.copy_(source)

            self._bandwidth[exponent] = repeats * 2**exponent / self._best(copies)
        return self._bandwidth[exponent]

    @property
    def memory(self) -> float:
        """Bytes per second to and from main memory."""
        return self.bandwidth(2**28)

    def time_s(self, flops: float, moved: float, precision: str = "float32") -> tuple[float, str]:
        """The least time for this much arithmetic and traffic, and which of them binds."""
        compute_s, memory_s = flops / self.flops(precision), moved / self.bandwidth(moved)
        return (compute_s, "flops") if compute_s >= memory_s else (memory_s, "bandwidth")

    def _best(self, work: Work) -> float:
        """On one thread or on all: small copies are faster on one."""
        import torch

        with _quiet():
            times_s = []
            for threads in sorted({1, torch.get_num_threads()}):
                sampler = _Sampler(work, self.device, threads)
                sampler.warm_up(0.0)
                times_s += [sampler.sample() for _ in range(15)]
            return min(times_s)
