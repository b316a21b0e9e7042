"""The suite: its gate, its rows and files, its command line. The ops themselves run in test_ops.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import irgrow as ig
from bench import __main__ as command
from bench import plot, suite
from bench.suite import Case, Made, Missing, Misuse, NoDevice, Op, Row
from bench.timing import QUICK, Roof
from irgrow import benchmarks

X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Op]:
    """An empty registry in place of the real one."""
    found: dict[str, Op] = {}
    monkeypatch.setattr(suite, "_OPS", found)
    monkeypatch.setattr(suite, "ops", lambda: dict(found))
    return found


def case(**changes: Any) -> Case:
    given: dict[str, Any] = {
        "case": "double",
        "ours": lambda: X + X,
        "opponents": {"times two": lambda: 2 * X},
        "tolerance": 1e-6,
    }
    return Case(**{**given, **changes})


# --- the gate


def test_a_right_result_is_timed() -> None:
    row = suite.measure(case(goal=1e-9, cost=(6.0, 48.0)), effort=QUICK, roof=fast_roof())
    assert row.ratio is not None and row.low is not None and row.high is not None
    assert row.low <= row.ratio <= row.high
    assert row.opponent == "times two"
    assert row.difference == 0.0
    assert row.of_roof is not None and row.bound == "bandwidth"
    assert row.pairs >= QUICK.least


def test_a_wrong_result_is_not_timed() -> None:
    calls: list[str] = []

    def wrong() -> torch.Tensor:
        calls.append("ours")
        return X + X + 0.01

    row = suite.measure(case(ours=wrong), effort=QUICK)
    assert row.state == suite.WRONG and row.failed
    assert calls == ["ours"]
    assert row.ratio is None and row.ours_ms is None
    assert "times two differs from ours by 1.0e-03, tolerance 1e-06; not timed" in row.note


@pytest.mark.parametrize(
    "result",
    [
        X + X + 1e-3,
        torch.full((2, 3), math.nan),
        torch.full((2, 3), math.inf),
        X[:, :2] + X[:, :2],
        (X + X, X),
        {"y": X + X},
    ],
    ids=["off", "nan", "inf", "shape", "pair", "mapping"],
)
def test_everything_that_differs_fails_the_gate(result: Any) -> None:
    assert suite.measure(case(ours=lambda: result), effort=QUICK).state == suite.WRONG


def test_an_opponent_that_is_wrong_fails_as_well() -> None:
    opponents = {"right": lambda: 2 * X, "wrong": lambda: 3 * X}
    row = suite.measure(case(opponents=opponents), effort=QUICK)
    assert row.state == suite.WRONG and row.note.startswith("wrong differs")


def test_a_reference_judges_both() -> None:
    both_wrong = case(ours=lambda: 3 * X, opponents={"too": lambda: 3 * X}, reference=lambda: 2 * X)
    row = suite.measure(both_wrong, effort=QUICK)
    assert row.state == suite.WRONG and "the reference" in row.note


def test_opponents_that_do_other_work_are_not_compared_but_ours_is() -> None:
    other = {"something else": lambda: None}
    assert suite.measure(case(opponents=other, same=False), effort=QUICK).state == suite.FINE
    right = suite.measure(case(opponents=other, same=False, reference=lambda: 2 * X), effort=QUICK)
    wrong = suite.measure(case(opponents=other, same=False, reference=lambda: 3 * X), effort=QUICK)
    assert (right.state, wrong.state) == (suite.FINE, suite.WRONG)


def test_a_view_says_what_is_compared() -> None:
    signs = case(ours=lambda: -2 * X, view=lambda name, result: result.abs())
    assert suite.measure(signs, effort=QUICK).state == suite.FINE


def test_difference_is_relative_to_the_largest_entry() -> None:
    assert suite.difference([1.0, 100.0], [2.0, 100.0]) == pytest.approx(0.5)  # the worst part counts
    assert suite.difference(torch.tensor([1.0, 100.0]), torch.tensor([2.0, 100.0])) == pytest.approx(0.01)
    assert suite.difference(torch.zeros(3), torch.zeros(3)) == 0.0
    assert suite.difference(torch.ones(3), torch.zeros(3)) == math.inf
    assert suite.difference(torch.ones(0), torch.zeros(0)) == 0.0


# --- running


def test_a_run_tells_every_row_and_goes_on_after_a_failure(
    registry: dict[str, Op], capsys: pytest.CaptureFixture[str]
) -> None:
    @suite.op("a", cases=[{"n": 1}, {"n": 2}])
    def a(*, n: int, device: str) -> Made:
        """Raises on the second case."""
        if n == 2:
            raise ValueError("broke\nhere")
        yield case(case=f"n={n}")

    @suite.op("b")
    def b(*, device: str) -> Made:
        raise Missing("needs gromo: pip install gromo")
        yield

    rows = suite.run(effort=QUICK)
    assert [(row.name, row.state) for row in rows] == [
        ("a", suite.FINE),
        ("a", suite.FAILED),
        ("b", suite.SKIPPED),
    ]
    said = capsys.readouterr().out
    assert "n=2" in said and "FAILED: ValueError: broke here" in said
    assert "skipped: needs gromo: pip install gromo" in said
    assert torch.__version__ in said and "thread" in said
    text = suite.summary(rows)
    assert "the run FAILED: 1 of 3 rows" in text


def test_an_op_gets_back_the_row_of_each_case(registry: dict[str, Op]) -> None:
    seen: list[Row] = []

    @suite.op("a")
    def a(*, device: str) -> Made:
        seen.append((yield case()))
        yield Row("its own", note=f"{seen[0].opponent}")

    rows = suite.run(effort=QUICK)
    assert [row.case for row in rows] == ["double", "its own"]
    assert seen[0].ratio is not None and rows[1].note == "times two"
    assert {row.name for row in rows} == {"a"}


def test_goals_are_judged_and_missed_ones_named(registry: dict[str, Op]) -> None:
    @suite.op("a")
    def a(*, device: str) -> Made:
        yield Row("easy", ratio=2.0, goal=1.5)
        yield Row("hard", ratio=2.0, goal=40.0)

    rows = suite.run(effort=QUICK)
    assert [row.state for row in rows] == [suite.FINE, suite.MISSED]
    assert not any(row.failed for row in rows)
    text = suite.summary(rows)
    assert "1 of 2 goals met" in text and "missed: a hard: 2.00x of 40.0x" in text
    assert "1.50x ok" in suite.line(rows[0]) and "40.0x MISS" in suite.line(rows[1])
    assert [row.goal for row in suite.run(tiny=True)] == [None, None]


def test_sizes_replace_or_select_the_default_ones(registry: dict[str, Op]) -> None:
    cases = [{"n": 8, "kind": kind, "deep": deep} for kind in ("a", "b") for deep in (False, True)]

    @suite.op("op", cases=cases)
    def op(*, n: int, kind: str, deep: bool, device: str) -> Made:
        yield Row("")

    one = registry["op"]
    assert one.selected({}) == cases
    assert one.selected({"kind": ["b"]}) == cases[2:]
    assert one.selected({"n": ["16", "32"], "kind": ["a"], "deep": ["true"]}) == [
        {"n": 16, "kind": "a", "deep": True},
        {"n": 32, "kind": "a", "deep": True},
    ]
    with pytest.raises(Misuse, match=r"op has no size 'm', expected one of deep, kind, n"):
        one.selected({"m": [1]})
    with pytest.raises(Misuse, match=r"size n=big, expected int"):
        one.selected({"n": ["big"]})


def test_unknown_ops_and_devices_are_refused(registry: dict[str, Op], no_cuda: None) -> None:
    @suite.op("a")
    def a(*, device: str) -> Made:
        yield case()

    with pytest.raises(Misuse, match="no op 'c', expected one of a"):
        suite.run(["c"])
    with pytest.raises(NoDevice, match="device 'tpu', expected cpu or cuda"):
        suite.run(["a"], device="tpu")
    with pytest.raises(NoDevice, match="asked for device 'cuda'"):
        suite.run(["a"], device="cuda")


# --- files


def test_rows_survive_the_file_and_it_is_a_list_with_the_promised_fields(tmp_path: Path) -> None:
    rows = [suite.measure(case(goal=2.0, cost=(6.0, 48.0)), effort=QUICK, roof=fast_roof()), Row("b", name="b")]
    path = tmp_path / "deep" / "rows.json"
    suite.write(rows, path)
    listed = json.loads(path.read_text())
    assert isinstance(listed, list)
    promised = {"name", "case", "device", "opponent", "ratio", "low", "high", "goal", "of_roof"}
    assert all(promised <= set(row) for row in listed)
    back = suite.read(path)
    assert [row.case for row in back] == ["double", "b"]
    assert back[0].ratio == pytest.approx(rows[0].ratio, rel=1e-3)


def test_infinity_does_not_reach_the_file(tmp_path: Path) -> None:
    suite.write([Row("a", difference=math.inf)], tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())[0]["difference"] is None


def test_rows_of_other_ops_are_kept_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    suite.write([Row("old", name="a"), Row("old", name="b")], path)
    suite.write([Row("new", name="b")], path, keep=True)
    assert [(row.name, row.case) for row in suite.read(path)] == [("a", "old"), ("b", "new")]
    suite.write([Row("new", name="b")], path)
    assert [row.name for row in suite.read(path)] == ["b"]


def test_the_plot_shows_rows_with_a_cost(tmp_path: Path) -> None:
    row = suite.measure(case(cost=(6.0, 48.0)), effort=QUICK, roof=fast_roof())
    assert plot.roofline([row], tmp_path / "roof.png", roof=fast_roof()) == tmp_path / "roof.png"
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    assert plot.roofline([Row("without")], tmp_path / "none.png", roof=fast_roof()) is None


@pytest.mark.parametrize(
    ("time_ms", "text"), [(2.5e-4, "250 ns"), (0.0125, "12.5 us"), (1.234, "1.23 ms"), (4500.0, "4.50 s"), (None, "")]
)
def test_durations(time_ms: float | None, text: str) -> None:
    assert suite.duration(time_ms) == text


# --- the command line


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_cuda_without_cuda_exits_with_2(no_cuda: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("irgrow bench: error: asked for device 'cuda', and ")
    assert "CUDA" in line and "nothing was measured" in line


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--op", "absent"], "no op 'absent', expected one of b"),
        (["--op", "b", "--shapes", "n"], "--shapes n, expected something like n=512,1024"),
        (["--op", "b", "--shapes", "n=4"], "b has no size 'n'"),
    ],
)
def test_mistakes_exit_with_2(
    registry: dict[str, Op], capsys: pytest.CaptureFixture[str], argv: list[str], complaint: str
) -> None:
    @suite.op("b")
    def b(*, device: str) -> Made:
        yield case()

    assert command.main(argv) == 2
    assert complaint in capsys.readouterr().err


def test_a_wrong_op_fails_the_run_loudly(
    registry: dict[str, Op], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @suite.op("broken", cases=[{"n": 3}])
    def broken(*, n: int, device: str) -> Made:
        yield case(ours=lambda: X * X)

    path = tmp_path / "rows.json"
    assert command.main(["--seconds", "0.1", "--json", str(path)]) == 1
    said = capsys.readouterr().out
    assert "the run FAILED: 1 of 1 rows" in said
    assert said.count("WRONG") >= 2  # in the table, and again at the end
    [row] = json.loads(path.read_text())
    assert row["state"] == "WRONG" and row["ratio"] is None


def test_a_good_run_writes_rows_and_a_plot(
    registry: dict[str, Op], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @suite.op("good")
    def good(*, device: str) -> Made:
        """Doubles."""
        yield case(cost=(6.0, 48.0))

    monkeypatch.setattr("bench.timing.Roof", lambda device: fast_roof())
    monkeypatch.setattr(suite, "LATEST", tmp_path / "latest.json")
    assert command.main(["--seconds", "0.1"]) == 0
    assert [row.name for row in suite.read(tmp_path / "latest.json")] == ["good"]
    assert (tmp_path / "roofline.png").is_file()
    assert command.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["good", "cpu", "Doubles."]


# --- irgrow.bench


def test_bench_returns_rows(registry: dict[str, Op], no_cuda: None) -> None:
    @suite.op("double", cases=[{"n": 1}], devices=("cpu", "cuda"))
    def double(*, n: int, device: str) -> Made:
        yield case(case=f"n={n}")

    rows = ig.bench("double", n=[2, 3], seconds=0.1)
    assert [row.case for row in rows] == ["n=2", "n=3"]
    assert all(row.ratio > 0 for row in rows)
    with pytest.raises(ig.IrgrowError, match="bench: asked for device 'cuda'"):
        ig.bench("double", device="cuda")
    with pytest.raises(ig.IrgrowError, match="bench: no op 'triple'"):
        ig.bench("triple")


def test_bench_raises_where_a_result_is_wrong(registry: dict[str, Op]) -> None:
    @suite.op("broken")
    def broken(*, device: str) -> Made:
        yield case(ours=lambda: X * X)

    with pytest.raises(RuntimeError, match="broken double: WRONG: times two differs from ours"):
        ig.bench("broken", seconds=0.1)


def test_bench_says_that_there_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "__file__", str(tmp_path / "irgrow" / "benchmarks.py"))
    with pytest.raises(ig.IrgrowError, match="expected a checkout of the repository"):
        ig.bench()


def fast_roof() -> Roof:
    """A roof that need not be measured."""
    roof = Roof()
    roof._flops["float32"] = 1e11
    roof._bandwidth.update({exponent: 1e10 for exponent in range(14, 29)})
    return roof
