"""The page of results is made from the result files, and the committed one is what they make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import page
from irgrow.experiments import reproduce
from irgrow.experiments.claims import claim
from irgrow.experiments.reproduce import Findings, Setting


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    claims = [
        claim("low", "losses are low", "GradMax, section 4.1", [0.1] * 9, "<=", 0.25, paper="0.2"),
        claim("flat", "curves are flat", "nobody", 2.0, "<=", 1.0, note="they are not"),
    ]
    findings = Findings(claims, ("seed", "loss"), [(0, 0.1)], figures={"a.png": "Losses"}, timings={"seconds": 90.0})
    made = reproduce.as_dict("teacher-student", Setting((0, 1), tmp_path), findings)
    where = tmp_path / "experiments" / "teacher-student"
    where.mkdir(parents=True)
    (where / "result.json").write_text(json.dumps(made))
    return tmp_path


def test_a_page_has_claims_beside_the_papers_numbers(folder: Path) -> None:
    text = page.page(folder)
    assert "| [teacher-student](#teacher-student) | GradMax, arXiv:2201.05125 | 2 | 1 | 0 | 1 | 1.5 |" in text
    row = "| losses are low | GradMax, section 4.1 | holds | 0.1 (0.1 to 0.1, 9 runs) | <= 0.25 | 0.2 |"
    assert row in text
    assert "| curves are flat | nobody | **does not hold** | 2 | <= 1 |  |" in text
    assert "![Losses](experiments/teacher-student/a.png)" in text
    assert "- flat: they are not" in text
    assert "## Benchmarks" not in text


def test_the_committed_page_is_what_the_results_make(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main(["--check"]) == 0, "run `make results`"


def test_a_page_out_of_date_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "README.md")
    assert page.main(["--check"]) == 1
    assert "run `make results`" in capsys.readouterr().err
    assert page.main([]) == 0
    assert page.main(["--check"]) == 0


def test_figures_of_the_page_are_there() -> None:
    for name, one in page.results(page.RESULTS).items():
        for file in one["figures"]:
            assert (page.RESULTS / "experiments" / name / file).is_file()
