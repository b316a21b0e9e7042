"""`irgrow reproduce NAME`: one experiment of a paper, with the controls the paper lacks, in a folder of its own.

    experiments/<file>.py       one experiment each: `run(setting) -> Findings`
    DIR/result.json             what was measured, and every claim judged; the same for the same seeds, but `timings`
    DIR/table.md, DIR/*.png     the same for people

EXPERIMENTS lists them without importing them.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from irgrow.experiments.claims import Claim
from irgrow.ir.errors import BadFile, IrgrowError, UnknownName

T = TypeVar("T")
SUITE = 1  # of the layout of result.json
THREADS = 1  # of every run, whatever the process was given: sums depend on how they are split


class Experiment(NamedTuple):
    """Where an experiment is, whose it is, how many seeds it takes by default, and what it shows."""

    module: str
    paper: str
    seeds: int
    summary: str


_FLAT, _GRADMAX = "growing-flatter-minima", "GradMax, arXiv:2201.05125"
_FIREFLY, _TINY = "Firefly, arXiv:2102.08574", "TINY, arXiv:2405.19816"
EXPERIMENTS: dict[str, Experiment] = {
    "flatness": Experiment("flatness", _FLAT, 5, "are insertion-grown networks flatter, and is it the growing?"),
    "flatness-head": Experiment("flatness_head", _FLAT, 5, "a RoBERTa classification head grown in three phases"),
    "teacher-student": Experiment("teacher_student", _GRADMAX, 20, "a student grown towards its teacher"),
    "gradmax-figures": Experiment("gradmax_figures", _GRADMAX, 5, "what the figures of the GradMax paper measure"),
    "gradmax-images": Experiment("gradmax_images", _GRADMAX, 5, "MobileNet, VGG and WRN grown on images"),
    "firefly-rbf": Experiment("firefly_rbf", _FIREFLY, 10, "new neurons against split ones on a toy"),
    "firefly-widen": Experiment("firefly_widen", _FIREFLY, 5, "a network widened by 30 % per step on images"),
    "firefly-deepen": Experiment("firefly_deepen", _FIREFLY, 5, "a 1-1-1-1 network deepened on images"),
    "firefly-continual": Experiment("firefly_continual", _FIREFLY, 5, "task after task without forgetting"),
    "firefly-cells": Experiment("firefly_cells", _FIREFLY, 5, "a search for a cell by growing its operations"),
    "tiny-sine": Experiment("tiny_sine", _TINY, 5, "the sine task with the three strategies"),
    "tiny-resnet": Experiment("tiny_resnet", _TINY, 5, "a thin residual network grown without gradient descent"),
    "tiny-methods": Experiment("tiny_methods", _TINY, 6, "TINY and its joint form against other methods"),
    "cnn-to-fcn": Experiment("cnn_to_fcn", "CNN to FCN, arXiv:1906.06766", 5, "a CNN relaxed into a dense network"),
}


class MissingData(IrgrowError):
    """The paper's own setting needs data or weights that are not there; says where to put them."""


@dataclass(frozen=True)
class Setting:
    """How one experiment is to run. `out` exists; pictures go there."""

    seeds: tuple[int, ...]
    out: Path
    full: bool = False
    progress: bool = True
    workers: int = 1

    def each(self, function: Callable[..., T], arguments: Iterable[tuple[Any, ...]], text: str = "runs") -> list[T]:
        """function(*arguments) for each, in order, under a progress bar; in processes of one thread if workers > 1.

        `function` must be importable (a module's own); the results do not depend on how many workers there are.
        """
        from tqdm import tqdm

        calls = list(arguments)
        with tqdm(total=len(calls), desc=text, disable=not self.progress, leave=False) as bar:
            found: list[T] = []
            if self.workers <= 1 or len(calls) <= 1:
                _one_thread()
                for call in calls:
                    found.append(function(*call))
                    bar.update()
                return found
            context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
            with ProcessPoolExecutor(min(self.workers, len(calls)), context, _one_thread) as pool:
                for future in [pool.submit(function, *call) for call in calls]:
                    found.append(future.result())
                    bar.update()
            return found


@dataclass
class Findings:
    """What an experiment found.

    columns, rows   one table, every cell text or a number
    data            everything a plot shows, as plain data (lists, numbers, text)
    figures         picture files in the run folder, with a caption each
    timings         seconds and rates: the only part that may differ between equal runs
    """

    claims: list[Claim] = field(default_factory=list)
    columns: Sequence[str] = ()
    rows: list[Sequence[Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def reproduce(
    name: str,
    *,
    seeds: int | None = None,
    full: bool = False,
    out: Path | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> Findings:
    """The experiment has run and its folder (default: runs/<name>) is written.

    Raises UnknownName for a name that is not in EXPERIMENTS, MissingData where `full` lacks something (nothing is
    written then), BadFile for a folder that cannot be written.
    """
    if name not in EXPERIMENTS:
        raise UnknownName(f"experiment {name!r}", expected=f"one of {', '.join(EXPERIMENTS)}")
    about = EXPERIMENTS[name]
    folder = out or Path("runs") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(f"run folder {folder}", str(error), "a folder that can be written to") from None
    count = about.seeds if seeds is None else seeds
    setting = Setting(tuple(range(count)), folder, full, progress, workers or min(2, os.cpu_count() or 1))
    run: Callable[[Setting], Findings] = importlib.import_module(f"irgrow.experiments.{about.module}").run
    begun = time.perf_counter()
    findings = run(setting)
    findings.timings["seconds"] = time.perf_counter() - begun
    (folder / "result.json").write_text(json.dumps(as_dict(name, setting, findings), indent=1) + "\n")
    (folder / "table.md").write_text(text(name, findings) + "\n")
    return findings


def as_dict(name: str, setting: Setting, findings: Findings) -> dict[str, Any]:
    """The content of result.json."""
    import torch

    import irgrow

    return {
        "experiment": name,
        "paper": EXPERIMENTS[name].paper,
        "suite": SUITE,
        "seeds": list(setting.seeds),
        "full": setting.full,
        "threads": THREADS,
        "versions": {"irgrow": irgrow.__version__, "torch": str(torch.__version__)},
        "claims": [one.as_dict() for one in findings.claims],
        "table": {"columns": list(findings.columns), "rows": [[_cell(c) for c in row] for row in findings.rows]},
        "data": findings.data,
        "figures": findings.figures,
        "notes": findings.notes,
        "timings": findings.timings,
    }


def text(name: str, findings: Findings) -> str:
    """The findings as Markdown: claims, table, notes."""
    lines = [f"# {name}", "", EXPERIMENTS[name].summary, ""]
    if findings.claims:
        heads = ("claim", "verdict", "measured", "expected", "paper")
        rows = [
            (c.statement, c.status, f"{c.value:.4g} ({c.low:.4g} to {c.high:.4g}, {c.runs} runs)", c.bound, c.paper)
            for c in findings.claims
        ]
        lines += [*markdown(heads, rows), ""]
    if findings.rows:
        lines += [*markdown(findings.columns, findings.rows), ""]
    lines += [f"![{caption}]({file})" for file, caption in findings.figures.items()]
    lines += [f"- {c.name}: {c.note}" for c in findings.claims if c.note]
    lines += [f"- {note}" for note in findings.notes]
    return "\n".join(lines).rstrip()


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table, line by line."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(str(_cell(cell)) for cell in row) + " |" for row in rows]


def main(names: Sequence[str], options: Mapping[str, Any]) -> int:
    """`irgrow reproduce`: every named experiment has run and its table is printed. 0: all ran, 2: data is missing."""
    code = 0
    for name in names:
        out = options["out"]
        folder = None if out is None else out / name if len(names) > 1 else out
        try:
            findings = reproduce(
                name,
                seeds=options["seeds"],
                full=options["full"],
                out=folder,
                progress=not options["quiet"] and sys.stderr.isatty(),
            )
        except MissingData as missing:
            print(f"irgrow reproduce {name}: {missing}", file=sys.stderr)
            code = 2
            continue
        print(text(name, findings))
        print(f"\n{findings.timings['seconds']:.0f} s; written to {folder or Path('runs') / name}/")
    return code


def _cell(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _one_thread() -> None:
    import torch

    torch.set_num_threads(THREADS)
