"""The README's Python code runs, top to bottom, as printed; its commands exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    from irgrow.passes import base

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))  # the README registers a pass of its own
    module = ModuleType("readme")  # a real module: dataclasses look theirs up
    monkeypatch.setitem(sys.modules, "readme", module)
    code = blocks("python")
    assert len(code) >= 7
    for block in code:
        exec(compile(block, "README.md", "exec", dont_inherit=True), module.__dict__)
    printed = capsys.readouterr().out
    (shown,) = blocks("text")
    assert shown in printed


def test_the_commands_exist() -> None:
    from irgrow.cli import build_parser

    lines = [line[2:].split("#")[0].split() for block in blocks("console") for line in block.splitlines()]
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert len(lines) >= 6
    for words in lines:
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
        else:
            assert words[0] == "irgrow"
            build_parser().parse_args(words[1:])


def test_the_check_can_fail(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        exec(compile("import irgrow\nirgrow.nothing_of_that_name", "README.md", "exec"), {})
