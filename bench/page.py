"""python -m bench.page: bench/results/README.md is made from the results beside it, and from nothing else.

Reads bench/results/experiments/<name>/result.json (what `irgrow reproduce` wrote) and bench/results/latest.json
(the benchmarks). `--check` writes nothing and exits with 1 if the page is not what they make.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.suite import LATEST, RESULTS, Row, read
from irgrow.experiments.reproduce import EXPERIMENTS, markdown

PAGE = RESULTS / "README.md"


def main(argv: Sequence[str] | None = None) -> int:
    """The page is written, or checked; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description="Make the page of results.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page is out of date")
    arguments = parser.parse_args(argv)
    text = page()
    if arguments.check:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        if not current:
            print(f"{PAGE.name} is not what the results make; run `make results`", file=sys.stderr)
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page(folder: Path = RESULTS) -> str:
    """The page for the results of a folder."""
    found = results(folder)
    lines = [
        "# Results",
        "",
        "Made by `make results` from the files beside it; not edited by hand. `irgrow reproduce NAME` makes an",
        "experiment again, `irgrow bench` the benchmarks. A claim is judged by the median over seeds: it holds if the",
        "interval that holds the median with 90 % lies on the right side of the bound, *does not hold* if it lies on",
        "the wrong side, and is *not established* otherwise. Measured: the median, and the lowest and highest run.",
        "",
        "## Claims at a glance",
        "",
    ]
    heads = ("experiment", "of", "seeds", "hold", "not established", "do not hold", "minutes")
    lines += markdown(heads, [_glance(name, one) for name, one in found.items()])
    for name, one in found.items():
        lines += ["", *_experiment(name, one)]
    latest = folder / LATEST.name
    if latest.is_file():
        lines += ["", *_benchmarks(read(latest))]
    return "\n".join(lines) + "\n"


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """The content of every result.json, in the order of EXPERIMENTS."""
    here = {p.parent.name: p for p in folder.glob("experiments/*/result.json")}
    order = [*EXPERIMENTS, *sorted(set(here) - set(EXPERIMENTS))]
    return {name: json.loads(here[name].read_text(encoding="utf-8")) for name in order if name in here}


def _glance(name: str, one: dict[str, Any]) -> tuple[Any, ...]:
    counts = [
        sum(c["status"] == status for c in one["claims"]) for status in ("holds", "not established", "does not hold")
    ]
    link = f"[{name}](#{name})"
    return (link, one["paper"], len(one["seeds"]), *counts, f"{one['timings']['seconds'] / 60:.1f}")


def _experiment(name: str, one: dict[str, Any]) -> list[str]:
    about = EXPERIMENTS[name].summary if name in EXPERIMENTS else ""
    versions = ", ".join(f"{k} {v}" for k, v in one["versions"].items())
    full = ", the paper's own setting" if one["full"] else ""
    if "threads" in one:
        versions += f", {one['threads']} thread per run"
    lines = [
        f"## {name}",
        "",
        f"{about[:1].upper()}{about[1:]}. {one['paper']}; {len(one['seeds'])} seeds{full}; {versions}.",
    ]
    if one["claims"]:
        heads = ("claim", "whose", "verdict", "measured", "expected", "in the paper")
        lines += ["", *markdown(heads, [_claim(c) for c in one["claims"]])]
    for file, caption in one["figures"].items():
        lines += ["", f"![{caption}](experiments/{name}/{file})", "", f"*{caption}.*"]
    table = one["table"]
    if table["rows"]:
        lines += [
            "",
            "<details><summary>Table</summary>",
            "",
            *markdown(table["columns"], table["rows"]),
            "",
            "</details>",
        ]
    notes = [f"- {c['name']}: {c['note']}" for c in one["claims"] if c["note"]] + [f"- {n}" for n in one["notes"]]
    return [*lines, "", *notes] if notes else lines


def _claim(c: dict[str, Any]) -> tuple[str, ...]:
    measured = _number(c["value"])
    if c["runs"] > 1:
        measured += f" ({_number(c['low'])} to {_number(c['high'])}, {c['runs']} runs)"
    verdict = c["status"] if c["status"] == "holds" else f"**{c['status']}**"
    return (c["statement"], c["source"], verdict, measured, c["bound"], c["paper"])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _benchmarks(rows: list[Row]) -> list[str]:
    heads = ("benchmark", "case", "device", "ratio", "spread", "goal", "ours", "theirs", "against", "state", "note")
    table = [
        (
            row.name,
            row.case,
            row.device,
            "" if row.ratio is None else f"{row.ratio:.3g}x",
            "" if row.low is None or row.high is None else f"{row.low:.3g} to {row.high:.3g}",
            "" if row.goal is None else f"{row.goal:.3g}x",
            "" if row.ours_ms is None else f"{row.ours_ms:.3g} ms",
            "" if row.theirs_ms is None else f"{row.theirs_ms:.3g} ms",
            row.opponent or "",
            row.state if row.state == "fine" else f"**{row.state}**",
            row.note,
        )
        for row in rows
    ]
    machines = sorted({row.machine for row in rows})
    lines = ["## Benchmarks", "", "Ratio: the opponent's time / ours, the median over interleaved pairs.", ""]
    lines += [f"- {machine}" for machine in machines]
    lines += ["", *markdown(heads, table), "", "![The benchmarks under the measured roof](roofline.png)"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
