"""Imports go downwards only: the layers of the package, read from its source.

    top row     io  viz  analysis  testing  experiments  cli  doctor  ...
    growth
    runtime
    compiler    passes        (do not know each other; runtime knows no passes)
    ir
    kernels

Imports inside functions and under TYPE_CHECKING count as well: they are knowledge all the same.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What each layer may import, besides itself. What is not listed is in the top row and may import everything.
BELOW = {
    "kernels": set(),
    "ir": {"kernels"},
    "compiler": {"ir", "kernels"},
    "passes": {"ir", "kernels"},
    "runtime": {"compiler", "ir", "kernels"},
    "growth": {"runtime", "compiler", "passes", "ir", "kernels"},
}
BARE = ("kernels", "passes")
PACKAGE_ITSELF = ""


@dataclass(frozen=True)
class Import:
    """`module` (dotted, absolute) is imported in `line` of `file`."""

    file: Path
    line: int
    module: str


def test_imports_go_downwards_only() -> None:
    assert violations(ROOT / "irgrow") == []


def test_the_check_sees_every_file() -> None:
    seen = {file for file in sources(ROOT / "irgrow")}
    on_disk = {
        file
        for folder in ("irgrow", "kernels", "passes")
        for file in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in file.parts
    }
    assert len(seen) > 0
    assert {file.resolve() for file in seen} == {file.resolve() for file in on_disk}
    assert {layer_of(file, ROOT / "irgrow") for file in seen} >= {"kernels", "ir", "passes", PACKAGE_ITSELF}


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("kernels/a.py", "import irgrow.ir.network", "kernels imports ir"),
        ("kernels/a.py", "import irgrow", "kernels imports irgrow itself"),
        ("kernels/a.py", "from irgrow import Network", "kernels imports irgrow itself"),
        ("kernels/a.py", "from .. import ir", "kernels imports ir"),
        ("ir/a.py", "from irgrow.passes.split import SplitUnit", "ir imports passes"),
        ("ir/a.py", "from ..runtime import probe", "ir imports runtime"),
        ("ir/deep/__init__.py", "from ...growth import fit", "ir imports growth"),
        ("compiler/a.py", "from irgrow import passes", "compiler imports passes"),
        ("passes/a.py", "import irgrow.compiler as c", "passes imports compiler"),
        ("runtime/a.py", "from irgrow.passes import split", "runtime imports passes"),
        ("runtime/a.py", "import irgrow.io.checkpoint", "runtime imports io"),
        ("growth/a.py", "def f():\n    from irgrow import viz", "growth imports viz"),
        ("growth/a.py", "if TYPE_CHECKING:\n    import irgrow.cli", "growth imports cli"),
        ("ir/a.py", "importlib.import_module('irgrow.growth')", "ir imports growth"),
        ("io/a.py", "import kernels", "io imports kernels under its bare name"),
        ("io/a.py", "from passes.split import SplitUnit", "io imports passes under its bare name"),
    ],
)
def test_an_upward_import_is_reported(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    package = tree(tmp_path, {file: "import math\n" + code})
    [found] = violations(package)
    assert complaint in found
    assert found.startswith(f"irgrow/{file}:{1 + code.count(chr(10)) + 1}: ")


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("__init__.py", "from irgrow.growth import fit"),
        ("kernels/a.py", "from irgrow.kernels import b\nfrom . import b\nimport numpy, torch.nn"),
        (
            "ir/a.py",
            "from irgrow.kernels import b\nfrom ..kernels.b import c\nfrom . import d\nfrom .d import e",
        ),
        ("passes/a.py", "from irgrow.ir.network import Network\nfrom irgrow import kernels"),
        ("runtime/a.py", "import irgrow.compiler.program, irgrow.ir, irgrow.kernels"),
        ("growth/a.py", "from irgrow import runtime, passes, compiler, ir, kernels"),
        ("experiments/a.py", "import irgrow as ig\nfrom irgrow import growth, viz\nimport irgrow.io"),
        ("cli.py", "from irgrow.experiments import digits"),
    ],
)
def test_a_downward_import_is_not_reported(tmp_path: Path, file: str, code: str) -> None:
    assert violations(tree(tmp_path, {file: code})) == []


def violations(package: Path) -> list[str]:
    """One line for every import in `package` that goes upwards, sideways, or past the package's name."""
    found = []
    for file in sources(package):
        here = layer_of(file, package)
        for item in imports(file, package):
            complaint = judge(here, item, package)
            if complaint:
                where = f"{package.name}/{file.relative_to(package).as_posix()}:{item.line}"
                found.append(f"{where}: {complaint} ({item.module})")
    return found


def judge(here: str, item: Import, package: Path) -> str | None:
    """Why a module of layer `here` may not have this import, or None."""
    first, *rest = item.module.split(".")
    if first in BARE:
        return f"{here or package.name} imports {first} under its bare name; it is {package.name}.{first}"
    if first != package.name or here not in BELOW:
        return None
    if not rest or not is_module(package, rest[0]):
        return f"{here} imports {package.name} itself, which knows every layer; import the part that is meant"
    there = rest[0]
    if there == here or there in BELOW[here]:
        return None
    return f"{here} imports {there}, and may import only {', '.join(sorted(BELOW[here])) or 'itself'}"


def imports(file: Path, package: Path) -> Iterator[Import]:
    """Every import in the file, however deep, as an absolute name; `from a import b` counts as `a.b`."""
    inside = file.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the module's package, for a module as for an __init__.
            base = list(inside[: len(inside) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield Import(file, node.lineno, ".".join([*base, alias.name]))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(file, node.lineno, node.args[0].value)


def sources(package: Path) -> Iterator[Path]:
    """Every Python file below the package, through its links to kernels and passes."""
    for folder, folders, files in os.walk(package, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def layer_of(file: Path, package: Path) -> str:
    first = file.relative_to(package).parts[0].removesuffix(".py")
    return PACKAGE_ITSELF if first in ("__init__", "__main__") else first


def is_module(package: Path, name: str) -> bool:
    return name in BELOW or (package / name).is_dir() or (package / f"{name}.py").is_file()


def tree(folder: Path, files: dict[str, str]) -> Path:
    """A small package called irgrow with these files, and an empty package for every layer."""
    package = folder / "irgrow"
    for name in (*BELOW, "io", "viz", "cli", "experiments"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    for name, code in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(code, encoding="utf-8")
    return package
