"""The command `irgrow`: parse the arguments, hand them to the part that does the work, report its errors.

    irgrow grow digits --how gradmax      train a small network that grows on scikit-learn's digits
    irgrow show FILE                      print or draw a checkpoint
    irgrow doctor                         is everything installed and working?
    irgrow bench                          the repository's benchmarks
    irgrow reproduce teacher-student      an experiment of a paper, with the controls it lacks

Nothing heavy is imported until a subcommand runs: `irgrow --help` does not wait for torch.
Exit codes: 0 done, 1 doctor found a failure, 2 a mistake of the caller's, 130 interrupted.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

HOW = ("tiny", "gradmax", "random")
TASKS = ("digits",)


def main(argv: Sequence[str] | None = None) -> int:
    """The subcommand has run; its exit code is returned. A mistake of the caller's is one line on stderr."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run is not _bench:
        parser.error("unrecognized arguments: " + " ".join(rest))
    arguments.rest = rest
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return _complain("interrupted", code=130)
    except ModuleNotFoundError as problem:
        if problem.name is None or problem.name.partition(".")[0] == "irgrow":
            raise
        return _complain(f"the package {problem.name!r} is missing; `irgrow doctor` says what to do")
    except Exception as problem:
        if not _is_ours(problem):
            raise
        return _complain(str(problem))


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; building it imports nothing but argparse."""
    parser = argparse.ArgumentParser(
        prog="irgrow",
        description="A graph-IR compiler for neural networks that grow while they train.",
    )
    parser.add_argument("--version", action=_PrintVersion)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    grow = commands.add_parser(
        "grow",
        help="train a network that grows",
        description="Train a small network and let it grow; print and save what happened.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    grow.add_argument("task", choices=TASKS, help="what to learn; digits ships with scikit-learn")
    grow.add_argument("--how", choices=HOW, default="tiny", help="how new units are chosen")
    grow.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of everything random")
    grow.add_argument("--epochs", type=_positive, default=60, metavar="N", help="epochs in all")
    grow.add_argument("--growths", type=_count, default=8, metavar="N", help="how many times to grow")
    grow.add_argument("--units", type=_positive, default=4, metavar="N", help="units added by each growth")
    grow.add_argument("--every", type=_positive, default=1, metavar="N", help="epochs between growths")
    grow.add_argument("--hidden", type=_positive, default=4, metavar="N", help="hidden units at the start")
    grow.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="examples in a batch")
    grow.add_argument("--learning-rate", type=_rate, default=0.03, metavar="X", help="of the optimizer")
    grow.add_argument("--out", type=Path, default=Path("runs/digits"), metavar="DIR", help="where results go")
    grow.add_argument("--quiet", action="store_true", help="print the last lines only")
    grow.set_defaults(run=_grow)

    show = commands.add_parser(
        "show", help="print or draw a checkpoint", description="Print and draw the network in a checkpoint."
    )
    show.add_argument("file", type=Path, metavar="FILE", help="a checkpoint that irgrow wrote")
    show.add_argument("--svg", type=Path, metavar="OUT", help="draw the network to this file, too")
    show.set_defaults(run=_show)

    doctor = commands.add_parser(
        "doctor",
        help="is everything installed and working?",
        description="Check the interpreter, the libraries, the compilers and the caches.",
    )
    doctor.set_defaults(run=_doctor)

    reproduce = commands.add_parser(
        "reproduce",
        help="run an experiment of a paper",
        description="Run a paper's experiment with the controls it lacks; say for every claim whether it holds.",
    )
    reproduce.add_argument("names", nargs="*", metavar="NAME", help="which experiments (--list says what there is)")
    reproduce.add_argument("--list", action="store_true", help="the experiments, and what each shows")
    reproduce.add_argument("--seeds", type=_positive, metavar="N", help="how many seeds (default: the experiment's)")
    reproduce.add_argument("--full", action="store_true", help="the paper's own setting, where its data is there")
    reproduce.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: runs/NAME)")
    reproduce.add_argument("--quiet", action="store_true", help="no progress bar")
    reproduce.set_defaults(run=_reproduce)

    bench = commands.add_parser(
        "bench",
        help="run the benchmarks (in a checkout)",
        description="Run the benchmarks in the repository's bench/ folder; the rest is passed on to them.",
        add_help=False,
    )
    bench.set_defaults(run=_bench)
    return parser


def _grow(arguments: argparse.Namespace) -> int:
    from irgrow.experiments import digits

    return digits.main(arguments)


def _show(arguments: argparse.Namespace) -> int:
    if not arguments.file.is_file():
        return _complain(f"show: no such file: {arguments.file}")
    from irgrow import viz

    viz.show(arguments.file, svg=arguments.svg)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from irgrow import doctor

    return doctor.main()


def _reproduce(arguments: argparse.Namespace) -> int:
    from irgrow.experiments import reproduce

    if arguments.list:
        for name, about in reproduce.EXPERIMENTS.items():
            print(f"{name:<18} {about.summary}  [{about.paper}]")
        return 0
    if not arguments.names:
        return _complain(f"reproduce: no experiment named, expected one of {', '.join(reproduce.EXPERIMENTS)}")
    return reproduce.main(arguments.names, vars(arguments))


def _bench(arguments: argparse.Namespace) -> int:
    root = Path(__file__).parent.parent
    # Beside an installed copy there may be somebody else's `bench`: only a checkout has setup.py next to it.
    if not ((root / "setup.py").is_file() and (root / "bench" / "__main__.py").is_file()):
        return _complain("bench: the benchmarks are not installed; run this in a checkout of the repository")
    sys.path.insert(0, str(root))
    sys.argv = ["irgrow bench", *arguments.rest]
    runpy.run_module("bench", run_name="__main__", alter_sys=True)
    return 0


def _complain(text: str, *, code: int = 2) -> int:
    """`text` is on stderr as one line; returns the exit code."""
    print("irgrow: error: " + " ".join(text.split()), file=sys.stderr)
    return code


def _is_ours(problem: BaseException) -> bool:
    # An error of ours can only be raised once its module is loaded, so there is nothing to import here.
    errors = sys.modules.get("irgrow.ir.errors")
    return errors is not None and isinstance(problem, errors.IrgrowError)


def _count(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 0 or more")
    return number


def _positive(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number, 1 or more")
    return number


def _rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return number


class _PrintVersion(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("irgrow", version("irgrow"))
        except PackageNotFoundError:
            print("irgrow (not installed: imported from a checkout)")
        parser.exit()
