"""`irgrow doctor`: what is installed, what works, and what to do about the rest, as a table.

Every check answers with a `Finding` (ok, warn or fail) and never raises: a broken installation is the case
this is for. Libraries are really imported and numba really compiles, because a version number says nothing
about a build that does not load. `fail` means that a requirement of irgrow is not met; `warn`, that something
beside it or a faster way is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parent

# The lower bounds of setup.py (a test compares them).
OLDEST = {
    "torch": "2.11",
    "numpy": "1.26",
    "networkx": "3.0",
    "numba": "0.61",
    "scipy": "1.13",
    "safetensors": "0.4.5",
    "scikit-learn": "1.4",
    "tqdm": "4.66",
    "matplotlib": "3.8",
    "triton": "3.6",
}
OLDEST_PYTHON = (3, 11)
MODULES = {"scikit-learn": "sklearn"}
CHECK_OUT = "check the repository out again, or install irgrow again"
INSTALL = "install irgrow again (pip install -e . in a checkout), or pip install -U {name}"


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, how it is, what was found, what to do if it is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    hint: str = ""


def main() -> int:
    """The table is printed; 1 when a finding is `fail`, else 0."""
    findings = list(examine())
    print(table(findings))
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def examine() -> Iterable[Finding]:
    """Every finding, in the order of the table; a check that raises becomes a `fail`."""
    special = ("torch", "triton", "numba")
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", python),
        ("irgrow", irgrow_itself),
        ("irgrow.kernels", partial(link, "kernels")),
        ("irgrow.passes", partial(link, "passes")),
        ("torch", partial(library, "torch")),
        ("cpu", cpu),
        ("cuda", cuda),
        ("triton", triton),
        ("numba", numba),
        ("numba cache", numba_cache),
        *((name, partial(library, name)) for name in OLDEST if name not in special),
        ("torchvision", torchvision),
        ("transformers", transformers),
    ]
    failed = set()
    for name, check in checks:
        if name in ("cpu", "cuda") and "torch" in failed:
            continue  # these two ask torch
        try:
            finding = check()
        except Exception as problem:
            finding = Finding(name, "fail", _first_line(problem), "this check itself broke; please report it")
        if finding.state == "fail":
            failed.add(name)
        yield finding


def table(findings: list[Finding]) -> str:
    """The findings as aligned text, hints indented below the line they belong to, a summary at the end."""
    width = max(len(finding.name) for finding in findings)
    margin = " " * (6 + width + 2)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<4}  {finding.name:<{width}}  {finding.found}")
        lines += textwrap.wrap(finding.hint, 110, initial_indent=margin + "-> ", subsequent_indent=margin + "   ")
    count = {state: sum(finding.state == state for finding in findings) for state in ("ok", "warn", "fail")}
    return "\n".join([*lines, "", f"{count['ok']} ok, {count['warn']} warnings, {count['fail']} failures"])


def python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("python", "fail", found, "irgrow needs Python {}.{} or newer".format(*OLDEST_PYTHON))
    return Finding("python", "ok", found)


def irgrow_itself() -> Finding:
    try:
        found = f"{metadata.version('irgrow')}, {PACKAGE}"
    except metadata.PackageNotFoundError:
        hint = "pip install -e . makes the command `irgrow` and checks the dependencies"
        return Finding("irgrow", "warn", f"not installed, imported from {PACKAGE}", hint)
    return Finding("irgrow", "ok", found)


def link(name: str, package: Path = PACKAGE) -> Finding:
    """In a checkout `irgrow/<name>` is a relative link to `../<name>`; installed, it is a plain folder."""
    path, title = package / name, f"irgrow.{name}"
    if path.is_symlink():
        target = os.readlink(path)
        if not path.is_dir():
            return Finding(title, "fail", f"a link to {target}, which is missing", CHECK_OUT)
        if os.path.isabs(target):
            hint = f"an absolute link breaks when the checkout moves: ln -sfn ../{name} irgrow/{name}"
            return Finding(title, "warn", f"a link to {target}", hint)
        return Finding(title, "ok", f"a link to {target}")
    if path.is_dir():
        return Finding(title, "ok", "an installed folder")
    if path.is_file():
        hint = (
            "git wrote the link as a text file; turn links on (on Windows: developer mode), then: "
            f"git config core.symlinks true; git checkout -- irgrow/{name}"
        )
        return Finding(title, "fail", "a plain file where a folder is expected", hint)
    return Finding(title, "fail", "missing", CHECK_OUT)


def library(name: str) -> Finding:
    """Imports the package and compares its version with the oldest one irgrow works with."""
    hint = INSTALL.format(name=name)
    try:
        importlib.import_module(MODULES.get(name, name))
        version = metadata.version(name)
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        return Finding(name, "fail", f"not installed, expected {OLDEST[name]} or newer", hint)
    except Exception as problem:
        return Finding(name, "fail", f"does not load: {_first_line(problem)}", hint)
    if _numbers(version) < _numbers(OLDEST[name]):
        return Finding(name, "fail", f"{version}, expected {OLDEST[name]} or newer", hint)
    return Finding(name, "ok", version)


def cpu() -> Finding:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = f"{usable} usable of {os.cpu_count()} cores, torch uses {threads} threads"
    if threads > usable:
        hint = f"more threads than cores slow each other down: OMP_NUM_THREADS={usable}"
        return Finding("cpu", "warn", found, hint)
    return Finding("cpu", "ok", found)


def cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in devices)
        return Finding("cuda", "ok", f"{found}; CUDA {torch.version.cuda}")
    has_driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    if has_driver and torch.version.cuda is None:
        hint = "this torch is built without CUDA; install a CUDA build to use the GPU (see pytorch.org)"
        return Finding("cuda", "warn", "a GPU seems to be here, but torch cannot use it", hint)
    if has_driver:
        hint = "torch has CUDA but finds no device: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
        found = f"torch is built for CUDA {torch.version.cuda}, but finds no device"
        return Finding("cuda", "warn", found, hint)
    return Finding("cuda", "ok", "none; irgrow runs on the CPU")


def triton() -> Finding:
    """Only GPUs need Triton, so that its absence is a warning and not a failure."""
    if importlib.util.find_spec("triton") is None:
        if platform.system() != "Linux":
            return Finding("triton", "ok", "not installed; only GPU kernels need it")
        hint = "GPU kernels need it: " + INSTALL.format(name="triton")
        return Finding("triton", "warn", "not installed", hint)
    finding = library("triton")
    if finding.state == "fail":
        # torch's CUDA build names the one Triton it works with; pip then brings it along.
        hint = "GPU kernels need the Triton that belongs to this torch"
        return Finding("triton", "warn", finding.found, hint)
    return finding


def numba() -> Finding:
    """numba loads, compiles and gives the right sum; without it the slow plain-torch twins would run."""
    finding = library("numba")
    if finding.state == "fail":
        return finding
    from numba import njit

    def add(count: int) -> int:
        total = 0
        for term in range(count):
            total += term
        return total

    try:
        total = njit(add)(101)
    except Exception as problem:
        hint = "llvmlite does not belong to this numba: pip install --force-reinstall numba llvmlite"
        return Finding("numba", "fail", f"{finding.found}, does not compile: {_first_line(problem)}", hint)
    if total != 5050:
        return Finding("numba", "fail", f"{finding.found}, computes wrongly", INSTALL.format(name="numba"))
    return Finding("numba", "ok", f"{finding.found}, compiles")


def numba_cache() -> Finding:
    """Compiled kernels are kept in the first of numba's folders that can be written."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    if named:
        folders = [Path(named)]
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folders = [PACKAGE / "kernels" / "__pycache__", cache / "numba"]
    for folder in folders:
        if _writable(folder):
            return Finding("numba cache", "ok", str(folder))
    hint = "kernels are compiled anew by every process; set NUMBA_CACHE_DIR to a folder that can be written"
    found = "cannot write " + " or ".join(str(folder) for folder in folders)
    return Finding("numba cache", "warn", found, hint)


def torchvision() -> Finding:
    """irgrow does without it, but other libraries import it, and a build for another torch breaks them."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed; not needed")
    try:
        module = importlib.import_module("torchvision")
    except Exception as problem:
        hint = (
            "this torchvision was built for another torch (often PyPI's CUDA build beside a CPU torch); "
            "irgrow does not need it, but transformers, timm and lightning fail over it: install torch and "
            "torchvision from one index, or pip uninstall torchvision"
        )
        return Finding("torchvision", "warn", f"does not load: {_first_line(problem)}", hint)
    return Finding("torchvision", "ok", str(getattr(module, "__version__", "loads")))


def transformers() -> Finding:
    """Where a checkout's folder `kernels` can be imported by that name, transformers takes it for another package."""
    if importlib.util.find_spec("transformers") is None:
        return Finding("transformers", "ok", "not installed; only heads in Hugging Face models need it")
    version = metadata.version("transformers")
    try:
        other = importlib.util.find_spec("kernels")
    except ValueError:  # of a module that something put there by hand
        other = None
    ours = (PACKAGE.parent / "kernels").resolve()
    if other is not None and ours in [Path(place).resolve() for place in other.submodule_search_locations or ()]:
        hint = (
            "some of its models (RoBERTa among them) then do not load: start Python in another folder than the "
            "checkout's, or leave that folder out of PYTHONPATH; `irgrow reproduce flatness-head` does without"
        )
        return Finding("transformers", "warn", f"{version}, takes {ours} for the package `kernels`", hint)
    return Finding("transformers", "ok", version)


def _writable(folder: Path) -> bool:
    # The folder may not exist yet: then its nearest existing parent decides, and nothing is left behind.
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` becomes (2, 13, 0): the release, without pre-release and local parts."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release.group().split(".")) if release else ()


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
