"""The suite: a registry of ops, the gate, the rows, and what is printed and written.

    @op("whiten", cases=[{"d": 1024}], tiny={"d": 16})
    def whitening(*, d: int, device: str) -> Made:
        ...
        yield Case(f"d={d}", ours=..., opponents={"eigh, float64": ...}, goal=10.0, ...)

A `Case` holds our work and its opponents' as functions without arguments. The suite calls each once and compares
what they return: only where all agree within the tolerance is anything timed; otherwise the row is WRONG and the
run fails. Each `yield` of a case gives its row back. An op that measures something else (an experiment) yields
finished rows instead.

Every row says: name, case, device, opponent, ratio (opponent's time / our time, the median over pairs), low and
high (the 10 % and 90 % quantiles), goal (the ratio we want), of_roof (the least time this machine allows / our
time) and more; bench/results/latest.json is a list of them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import platform
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.timing import QUICK, Effort, Roof, Work, paired, quickest

RESULTS = Path(__file__).parent / "results"
LATEST = RESULTS / "latest.json"
NOT_OPS = ("__main__", "suite", "timing", "plot", "nets", "engines", "memory", "gromo_side", "growth_floor", "page")

OURS = "ours"
FINE, MISSED, WRONG, FAILED, SKIPPED = "fine", "missed", "WRONG", "FAILED", "skipped"


class Misuse(Exception):
    """Something was asked for that cannot be done; its text is one line for the caller."""


class NoDevice(Misuse):
    """A device was asked for that is not there, or that an op does not run on."""


class Missing(Exception):
    """A library that a case needs is not installed; its text says which."""


@dataclass(frozen=True)
class Case:
    """Our work and its opponents', ready to run.

    What they return is compared with `reference()`, or where there is none with what ours returns (tensors,
    arrays, numbers, nested); relative difference: max|a - b| / max|b|, the worst part counts. `cost`: flops (in
    `precision`) and bytes that cannot be avoided. `prepare[name]` is called, untimed, before each call of that work
    ("ours" or an opponent's), which takes its result. `threads`: the numbers of torch threads that opponents may
    choose from (ours runs with the session's).
    """

    case: str
    ours: Callable[..., Any]
    opponents: Mapping[str, Callable[..., Any]]
    tolerance: float
    reference: Work | None = None
    goal: float | None = None
    cost: tuple[float, float] | None = None
    precision: str = "float32"
    threads: Sequence[int] = ()
    prepare: Mapping[str, Work] = field(default_factory=dict)
    view: Callable[[str, Any], Any] | None = None  # view(name, result): what of a result is compared
    same: bool = True  # False: the opponents do other work; ours alone is compared, with the reference if there is one
    effort: Effort | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    name: str = ""
    device: str = "cpu"
    opponent: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    of_roof: float | None = None
    bound: str = ""  # what binds at the roof: flops or bandwidth
    ours_ms: float | None = None
    theirs_ms: float | None = None
    others_ms: Mapping[str, float] | None = None  # every opponent's best time, where there are several
    flops: float | None = None
    bytes: float | None = None
    pairs: int = 0
    threads: int = 1
    difference: float | None = None  # of the results, relative
    tolerance: float | None = None
    state: str = FINE
    note: str = ""
    when: str = ""
    machine: str = ""

    @property
    def failed(self) -> bool:
        return self.state in (WRONG, FAILED)


Made = Generator[Case | Row, Row, None]  # what an op is: cases or rows go out, rows come back
Make = Callable[..., Made]


@dataclass(frozen=True)
class Op:
    """A registered op: `make(device=..., **case)` yields cases or rows."""

    name: str
    make: Make
    cases: tuple[Mapping[str, Any], ...]
    tiny: Mapping[str, Any]
    devices: tuple[str, ...]

    @property
    def summary(self) -> str:
        return (self.make.__doc__ or "").strip().splitlines()[0] if self.make.__doc__ else ""

    def selected(self, shapes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """The default cases that hold one of the given values; for a value that none holds, all of them with it.

        Misuse for a name that no case knows.
        """
        known = sorted({key for case in self.cases for key in case})
        found = [dict(case) for case in self.cases]
        for key, values in shapes.items():
            if key not in known:
                raise Misuse(f"{self.name} has no size {key!r}, expected one of {', '.join(known) or 'none'}")
            made: list[dict[str, Any]] = []
            for value in values:
                like = [_like(value, case[key], key) for case in found if key in case]
                held = [case for case, value in zip(_with(found, key), like, strict=True) if case[key] == value]
                made += held or [{**case, key: v} for case, v in zip(_with(found, key), like, strict=True)]
            found = [case for n, case in enumerate(made) if case not in made[:n]]
        return found


def _with(cases: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [case for case in cases if key in case]


_OPS: dict[str, Op] = {}


def op(
    name: str,
    *,
    cases: Sequence[Mapping[str, Any]] = ({},),
    tiny: Mapping[str, Any] | None = None,
    devices: Sequence[str] = ("cpu",),
) -> Callable[[Make], Make]:
    """Registers a benchmark: `cases` are the arguments it runs with, `tiny` what changes for a smoke test."""

    def register(make: Make) -> Make:
        _OPS[name] = Op(name, make, tuple(cases), dict(tiny or {}), tuple(devices))
        return make

    return register


def ops() -> dict[str, Op]:
    """Every op of this folder by name: one file per op, imported here."""
    package = importlib.import_module("bench")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in NOT_OPS:
            importlib.import_module(f"bench.{module.name}")
    return dict(sorted(_OPS.items()))


# --- running --------------------------------------------------------------------------------------------------


def run(
    names: Iterable[str] = (),
    *,
    device: str = "cpu",
    shapes: Mapping[str, Sequence[Any]] | None = None,
    effort: Effort | None = None,
    tiny: bool = False,
    roof: Roof | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """The rows of these ops (default: all that run on the device), told to `say` as they come.

    Raises Misuse for an unknown op or size, and for a device that is not there. A wrong result or an error
    becomes a row that says so; see `Row.failed`.
    """
    check_device(device)
    effort = effort or (QUICK if tiny else None)
    known = ops()
    chosen = list(names) or [name for name, one in known.items() if device in one.devices]
    for name in chosen:
        if name not in known:
            raise Misuse(f"no op {name!r}, expected one of {', '.join(known)}")
        if device not in known[name].devices:
            raise NoDevice(f"{name} runs on {', '.join(known[name].devices)}, not on {device}")
    todo = [(known[name], known[name].selected(shapes or {})) for name in chosen]
    roof, rows, text = roof or Roof(device), list[Row](), machine(device)
    say(text)
    say(header())
    for one, cases in todo:
        if tiny:
            cases = [{**case, **{k: v for k, v in one.tiny.items() if k in case}} for case in cases]
            cases = [case for n, case in enumerate(cases) if case not in cases[:n]]
        for arguments in cases:
            for row in _rows(one, arguments, device, effort, roof, tiny):
                rows.append(replace(row, when=time.strftime("%Y-%m-%d %H:%M"), machine=text))
                say(line(rows[-1]))
    return rows


def _rows(
    one: Op, arguments: Mapping[str, Any], device: str, effort: Effort | None, roof: Roof, tiny: bool
) -> Iterator[Row]:
    import torch

    common: dict[str, Any] = {"name": one.name, "device": device, "threads": torch.get_num_threads()}
    try:
        making = one.make(device=device, **arguments)
        made = next(making, None)
        while made is not None:
            if tiny:  # goals are for full sizes, and so is the time to spend
                made = replace(made, goal=None, effort=None) if isinstance(made, Case) else replace(made, goal=None)
            row = made if isinstance(made, Row) else measure(made, device=device, effort=effort, roof=roof)
            row = replace(_judged(row), **common)
            yield row
            try:
                made = making.send(row)
            except StopIteration:
                made = None
    except Missing as missing:
        yield Row(case=_told(arguments), state=SKIPPED, note=str(missing), **common)
    except ModuleNotFoundError as problem:
        note = f"needs {problem.name} (pip install {problem.name})"
        yield Row(case=_told(arguments), state=SKIPPED, note=note, **common)
    except Exception as problem:
        traceback.print_exc()
        note = f"{type(problem).__name__}: {' '.join(str(problem).split())}"
        yield Row(case=_told(arguments), state=FAILED, note=note, **common)


def measure(case: Case, *, device: str = "cpu", effort: Effort | None = None, roof: Roof | None = None) -> Row:
    """The row of a case: its results compared, then timed against the quickest opponent."""
    effort = case.effort or effort
    compares = case.same or case.reference is not None
    row = Row(case=case.case, goal=case.goal, tolerance=case.tolerance if compares else None, note=case.note)
    if compares:
        worst, who = _worst(case)
        row = replace(row, difference=worst, opponent=who)
        if not worst <= case.tolerance:
            where = f"differs from {'the reference' if case.reference else 'ours'} by {worst:.1e}"
            return replace(row, state=WRONG, note=f"{who} {where}, tolerance {case.tolerance:.0e}; not timed")
    opponent, threads, others = quickest(case.opponents, device=device, threads=case.threads, prepare=case.prepare)
    times = paired(
        case.ours,
        case.opponents[opponent],
        effort=effort,
        device=device,
        threads=None if threads is None else (_session_threads(), threads),
        prepare=(case.prepare.get(OURS), case.prepare.get(opponent)),
    )
    low, high = times.spread
    ours_s, theirs_s = sorted(times.ours_s)[len(times.ours_s) // 2], sorted(times.theirs_s)[len(times.theirs_s) // 2]
    of_roof, bound = None, ""
    if case.cost is not None and roof is not None:
        least_s, bound = roof.time_s(*case.cost, case.precision)
        of_roof = least_s / ours_s
    if threads is not None and threads != _session_threads():
        opponent += f" ({_count(threads)})"
    return replace(
        row,
        opponent=opponent,
        ratio=times.ratio,
        low=low,
        high=high,
        of_roof=of_roof,
        bound=bound,
        ours_ms=1e3 * ours_s,
        theirs_ms=1e3 * theirs_s,
        others_ms={name: 1e3 * time_s for name, time_s in others.items()} if len(others) > 1 else None,
        flops=case.cost and case.cost[0],
        bytes=case.cost and case.cost[1],
        pairs=len(times.ratios),
    )


def _judged(row: Row) -> Row:
    if row.state == FINE and row.goal is not None and row.ratio is not None and row.ratio < row.goal:
        return replace(row, state=MISSED)
    return row


def _worst(case: Case) -> tuple[float, str]:
    """The largest difference, and whose it is."""
    view = case.view or (lambda _, result: result)

    def result(name: str, work: Callable[..., Any]) -> Any:
        return view(name, work(case.prepare[name]()) if name in case.prepare else work())

    mine = result(OURS, case.ours)
    results = {name: result(name, work) for name, work in case.opponents.items() if case.same}
    if case.reference is None:
        truth = mine
    else:
        truth = view("reference", case.reference())
        results = {OURS: mine, **results}
    found = {name: difference(result, truth) for name, result in results.items()}
    who = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    return found[who], who


def difference(found: Any, expected: Any) -> float:
    """max|a - b| / max|b|, the worst over all parts; infinite where shapes differ or something is not finite."""
    import torch

    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or set(found) != set(expected):
            return math.inf
        return max((difference(found[key], expected[key]) for key in expected), default=0.0)
    if isinstance(expected, (tuple, list)):
        if not isinstance(found, (tuple, list)) or len(found) != len(expected):
            return math.inf
        return max((difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    a, b = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (found, expected))
    if a.shape != b.shape or not bool(torch.isfinite(a).all() & torch.isfinite(b).all()):
        return math.inf
    if b.numel() == 0:
        return 0.0
    error, scale = float((a - b).abs().max()), float(b.abs().max())
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)


def check_device(device: str) -> None:
    """Misuse where the device is not there."""
    if device == "cpu":
        return
    import torch

    if device.partition(":")[0] != "cuda":
        raise NoDevice(f"device {device!r}, expected cpu or cuda")
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise NoDevice(f"asked for device {device!r}, and {why} (torch {torch.__version__}); nothing was measured")


def _session_threads() -> int:
    import torch

    return torch.get_num_threads()


def _like(value: Any, model: Any, key: str) -> Any:
    """A value from the command line (text) as what the default case holds."""
    if not isinstance(value, str) or isinstance(model, str):
        return value
    try:
        if isinstance(model, bool):
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return type(model)(value)
    except (ValueError, KeyError):
        raise Misuse(f"size {key}={value}, expected {type(model).__name__}") from None


def _told(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in arguments.items())


# --- what is printed and written ------------------------------------------------------------------------------


def machine(device: str = "cpu") -> str:
    """The machine and the versions, in one line."""
    import numpy
    import torch

    import irgrow

    if device.startswith("cuda"):
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_processor()}, {os.cpu_count()} cores, {_count(torch.get_num_threads())}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
    return f"irgrow {irgrow.__version__} on {where}; {versions}"


def _count(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return " ".join(text.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


_COLUMNS = "{name:<17} {case:<42} {ours:>9} {theirs:>9} {ratio:>8} {spread:>13} {goal:>10} {roof:>6}  {opponent}"


def header() -> str:
    """The table's first line."""
    return _COLUMNS.format(
        name="op",
        case="case",
        ours="ours",
        theirs="theirs",
        ratio="ratio",
        spread="10-90 %",
        goal="goal",
        roof="roof",
        opponent="opponent",
    )


def line(row: Row) -> str:
    """A row as a line of the table; notes and failures get a second one."""
    if row.ratio is None:
        mark = "" if row.state == FINE else f"{row.state}: "
        return f"{row.name:<17} {row.case:<40} {mark}{row.note}"
    text = _COLUMNS.format(
        name=row.name,
        case=row.case,
        ours=duration(row.ours_ms),
        theirs=duration(row.theirs_ms),
        ratio=_times(row.ratio),
        spread="" if row.low is None or row.high is None else f"{_number(row.low)}-{_number(row.high)}",
        goal="" if row.goal is None else f"{_times(row.goal)} {'ok' if row.state == FINE else 'MISS'}",
        roof="" if row.of_roof is None else f"{row.of_roof:.0%}",
        opponent=row.opponent,
    ).rstrip()
    return text + (f"\n{'':<18}({row.note})" if row.note else "")


def duration(time_ms: float | None) -> str:
    """A time with a unit that suits it."""
    if time_ms is None:
        return ""
    for limit, scale, unit in ((1e-3, 1e6, "ns"), (1.0, 1e3, "us"), (1e3, 1.0, "ms"), (math.inf, 1e-3, "s")):
        if time_ms < limit:
            return f"{_number(time_ms * scale)} {unit}"
    return ""


def _times(ratio: float) -> str:
    return f"{_number(ratio)}x"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def summary(rows: Sequence[Row]) -> str:
    """The last lines: goals met and missed, and every failure again."""
    goals = [row for row in rows if row.goal is not None and row.ratio is not None]
    missed = [row for row in goals if row.state == MISSED]
    lines = [f"{len(rows)} rows; {len(goals) - len(missed)} of {len(goals)} goals met"]
    lines += [f"  missed: {row.name} {row.case}: {_times(row.ratio or 0)} of {_times(row.goal or 0)}" for row in missed]
    lines += [f"  skipped: {row.name} {row.case}: {row.note}" for row in rows if row.state == SKIPPED]
    bad = [row for row in rows if row.failed]
    lines += [f"  {row.state}: {row.name} {row.case}: {row.note}" for row in bad]
    if bad:
        lines.append(f"the run FAILED: {len(bad)} of {len(rows)} rows are wrong or broke")
    return "\n".join(lines)


def write(rows: Sequence[Row], path: Path, *, keep: bool = False) -> None:
    """The rows as JSON; with `keep` those of other ops that the file holds stay in it."""
    kept: list[Any] = []
    if keep and path.is_file():
        done = {(row.name, row.device) for row in rows}
        kept = [row for row in json.loads(path.read_text(encoding="utf-8")) if (row["name"], row["device"]) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [_rounded(asdict(row)) for row in rows]
    text = json.dumps(sorted([*kept, *made], key=lambda row: row["name"]), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def _rounded(value: Any) -> Any:
    """Four digits are more than a timing has; infinity has no JSON."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
