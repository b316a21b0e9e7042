"""No read path can run code that a file brings along: no pickle, eval, exec or `torch.load` anywhere near one."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import irgrow as ig
from irgrow.ir import errors

ROOT = Path(__file__).parents[2]
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "torch": {"load", "jit", "hub", "package"},
    "np": {"load", "fromfile", "memmap"},
    "numpy": {"load", "fromfile", "memmap"},
    "yaml": {"load", "unsafe_load"},
    "ast": set(),
    "importlib": {"import_module"},
}


def suspicious(code: str) -> Iterator[str]:
    """What in the code could run what a file says."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").partition(".")[0]
            if module in MODULES:
                yield module
            yield from (f"{module}.{a.name}" for a in node.names if a.name in ATTRIBUTES.get(module, ()))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in ATTRIBUTES.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"


def sources() -> list[Path]:
    """Everything that is imported from irgrow while a file is read, and the commands around it."""
    folders = [ROOT / "irgrow" / name for name in ("io", "ir", "viz")]
    return [*(f for folder in folders for f in folder.rglob("*.py")), ROOT / "irgrow" / "cli.py"]


def test_no_read_path_uses_pickle_or_eval() -> None:
    files = sources()
    assert len(files) > 20
    found = {str(f.relative_to(ROOT)): list(suspicious(f.read_text(encoding="utf-8"))) for f in files}
    allowed = {"irgrow/viz/__init__.py": ["importlib.import_module"]}  # names from its own table
    assert {name: hits for name, hits in found.items() if hits and hits != allowed.get(name)} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import pickle as p",
        "from _pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "load = torch.load",
        "def f():\n    return eval(text)",
        "exec(text)",
        "import joblib.numpy_pickle",
        "np.load('x')",
        "np.fromfile('x')",
        "read(allow_pickle=True)",
        "importlib.import_module(name)",
        "__import__(name)",
    ],
)
def test_control_the_check_sees_each_of_them(code: str) -> None:
    assert list(suspicious(code))


@pytest.mark.parametrize("code", ["model.eval()", "ig.load(path)", "re.compile('x')", "ast.literal_eval(text)"])
def test_control_the_check_lets_others_pass(code: str) -> None:
    assert list(suspicious(code)) == []


def test_while_reading_nothing_is_unpickled(tmp_path: Path) -> None:
    """The same seen from outside: with pickle, eval and torch.load broken, reading still works."""
    model = ig.compile(ig.mlp([3, 2]))
    ig.save_checkpoint(tmp_path / "run", model, progress={"epoch": 1})
    code = """
import builtins, pickle, sys
import torch, numpy
import irgrow as ig
from irgrow import viz
ig.load(sys.argv[1])  # everything that is imported lazily is there
def broken(*_, **__):
    raise SystemExit("a read path unpickles or evaluates")
for holder, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",)), (numpy, ("load",)),
                      (builtins, ("eval", "exec"))):
    for name in names:
        setattr(holder, name, broken)
assert ig.load(sys.argv[1]) == ig.load_checkpoint(sys.argv[1]).network
assert ig.read_extra(sys.argv[1]) == {}
print("read")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "read", done.stderr


def test_a_pickle_is_no_file_of_ours(tmp_path: Path) -> None:
    import pickle

    import torch

    class Trap:
        def __reduce__(self) -> object:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (tmp_path / "a").write_bytes(pickle.dumps(Trap()))
    torch.save({"weight.input_output": Trap()}, tmp_path / "b")
    for name in ("a", "b"):
        for read in (ig.load, ig.load_checkpoint, ig.read_extra):
            with pytest.raises(errors.BadFile):
                read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
