"""python -m bench, or `irgrow bench`: run the benchmarks of this checkout.

    irgrow bench                                      every op and every network, on the CPU
    irgrow bench --op masked_matmul --device cuda     one op, on a GPU
    irgrow bench --op whiten --shapes d=256,512       other sizes
    irgrow bench --list                               what there is

Results go to bench/results/latest.json (--json FILE: elsewhere) and roofline.png beside it. With --op, rows of
other ops stay in latest.json. Exit codes: 0 measured; 1 a result was wrong, or something broke; 2 a mistake of
the caller's, such as asking for CUDA where there is none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench import timing


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmarks have run and their rows are written; the exit code."""
    arguments = _parser().parse_args(argv)
    from bench import suite, timing

    try:
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        suite.check_device(arguments.device)
        if arguments.list:
            for one in suite.ops().values():
                print(f"{one.name:<17} {', '.join(one.devices):<10} {one.summary}")
            return 0
        roof = timing.Roof(arguments.device)
        names = [name for given in arguments.op for name in given.split(",")]
        rows = suite.run(
            names,
            device=arguments.device,
            shapes=_shapes(arguments.shapes),
            effort=None if arguments.tiny else timing.Effort(seconds=arguments.seconds),
            tiny=arguments.tiny,
            roof=roof,
        )
    except suite.Misuse as mistake:
        print(f"irgrow bench: error: {mistake}", file=sys.stderr)
        return 2
    print(suite.summary(rows))
    if not arguments.tiny or arguments.json:
        path = arguments.json or suite.LATEST
        suite.write(rows, path, keep=bool(names) and arguments.json is None)
        print(f"rows: {path}")
        _plot(path, roof)
    return 1 if any(row.failed for row in rows) else 0


def _plot(path: Path, roof: timing.Roof) -> None:
    from bench import plot, suite

    try:
        made = plot.roofline(suite.read(path), path.with_name("roofline.png"), roof=roof)
    except ModuleNotFoundError as problem:
        print(f"no plot: {problem.name} is not installed")
        return
    if made:
        print(f"plot: {made}")


def _shapes(given: Sequence[str]) -> dict[str, list[str]]:
    from bench.suite import Misuse

    shapes: dict[str, list[str]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise Misuse(f"--shapes {text}, expected something like n=512,1024")
        shapes[key] = values.split(",")
    return shapes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="irgrow bench",
        description="Measure irgrow beside other libraries, in one process: results compared first, then timed.",
    )
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="only this op (--list says which)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="K=V", help="other sizes: n=512,1024 density=0.1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: torch's)")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="at most this long per row")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, nothing written: does it all run?")
    parser.add_argument("--list", action="store_true", help="the ops, and what each measures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
