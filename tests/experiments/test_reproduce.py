"""The frame around experiments: folders, files, verdicts, errors, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from irgrow.cli import main
from irgrow.experiments import reproduce
from irgrow.experiments.claims import claim
from irgrow.experiments.reproduce import EXPERIMENTS, Experiment, Findings, MissingData, Setting
from irgrow.ir.errors import BadFile, UnknownName


def square(n: int) -> int:
    return n * n


def run(setting: Setting) -> Findings:
    """An experiment that squares its seeds."""
    if setting.full:
        raise MissingData("squares", "no data", "files of squares", do="put them into data/squares")
    values = [float(v) for v in setting.each(square, [(seed,) for seed in setting.seeds])]
    (setting.out / "squares.png").write_bytes(b"")
    return Findings(
        [claim("large", "squares are large", "Euclid", values, ">=", 100.0, note="small seeds have small squares")],
        ("seed", "square"),
        list(zip(setting.seeds, values, strict=True)),
        {"squares": values},
        {"squares.png": "squares"},
    )


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(EXPERIMENTS, "squares", Experiment("squares", "Euclid", 6, "squares"))
    monkeypatch.setitem(sys.modules, "irgrow.experiments.squares", sys.modules[__name__])
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 1)  # processes cost seconds: one test has them
    return "squares"


def test_a_run_leaves_a_folder(squares: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", squares, "--seeds", "5", "--out", str(tmp_path / "a"), "--quiet"]) == 0
    found = json.loads((tmp_path / "a" / "result.json").read_text())
    assert found["seeds"] == [0, 1, 2, 3, 4]
    assert found["data"] == {"squares": [0.0, 1.0, 4.0, 9.0, 16.0]}
    (verdict,) = found["claims"]
    assert (verdict["name"], verdict["status"], verdict["value"], verdict["bound"]) == (
        "large",
        "does not hold",
        4.0,
        ">= 100",
    )
    printed = capsys.readouterr().out
    assert "| squares are large | does not hold | 4 (0 to 16, 5 runs) | >= 100 |" in printed
    assert "small seeds have small squares" in printed
    assert (tmp_path / "a" / "table.md").read_text().strip() in printed


def test_equal_runs_write_equal_files(squares: str, tmp_path: Path) -> None:
    contents = []
    for name in "ab":
        reproduce.reproduce(squares, out=tmp_path / name, progress=False)
        found = json.loads((tmp_path / name / "result.json").read_text())
        found.pop("timings")
        contents.append(found)
    assert contents[0] == contents[1]
    assert contents[0]["seeds"] == list(range(6))


def test_processes_give_what_one_gives(tmp_path: Path) -> None:
    calls = [(n,) for n in range(4)]
    alone = Setting((0,), tmp_path, progress=False, workers=1).each(square, calls)
    assert Setting((0,), tmp_path, progress=False, workers=2).each(square, calls) == alone == [0, 1, 4, 9]


def test_missing_data_says_where_to_put_it(squares: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", squares, "--full", "--out", str(tmp_path)]) == 2
    assert "put them into data/squares" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_unknown_experiments_and_folders(squares: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownName, match="experiment 'cubes': expected one of flatness"):
        reproduce.reproduce("cubes", out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="a folder that can be written to"):
        reproduce.reproduce(squares, out=tmp_path / "file")
    assert main(["reproduce"]) == 2
    assert "no experiment named" in capsys.readouterr().err


def test_the_list_is_light() -> None:
    code = "import sys; from irgrow.cli import main; main(['reproduce', '--list']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(EXPERIMENTS)
