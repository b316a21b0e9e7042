"""The package as a thing that is installed and started: links, imports, metadata, command line, doctor."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from irgrow import cli, doctor

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "passes")


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with these arguments, in the checkout's root unless told otherwise."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


# --- links


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative_and_resolve(name: str) -> None:
    path = ROOT / "irgrow" / name
    assert path.is_symlink()
    assert os.readlink(path) == f"../{name}"
    assert path.resolve() == (ROOT / name).resolve()
    assert (path / "__init__.py").is_file()


@pytest.mark.parametrize("name", LINKED)
def test_bare_names_are_refused(name: str) -> None:
    result = run("-c", f"import {name}")
    assert result.returncode == 1
    assert f"ImportError: this package was imported as '{name}'" in result.stderr
    assert f"import it as 'irgrow.{name}'" in result.stderr


@pytest.mark.parametrize("name", LINKED)
def test_the_real_name_is_imported(name: str) -> None:
    result = run("-c", f"import irgrow.{name} as package; print(package.__name__)")
    assert result.stdout.strip() == f"irgrow.{name}", result.stderr


# --- light


def test_importing_irgrow_does_not_import_torch() -> None:
    result = run("-c", "import sys, irgrow; print(sorted({'torch', 'numpy', 'numba'} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


def test_help_does_not_import_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['irgrow', '--help']\n"
        "try: runpy.run_module('irgrow', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "print('code', code, sorted({'torch', 'numpy', 'numba'} & set(sys.modules)))"
    )
    result = run("-c", code)
    assert result.stdout.splitlines()[-1] == "code 0 []", result.stderr


def test_help_takes_less_than_half_a_second() -> None:
    times_s = []
    for _ in range(5):
        start = time.perf_counter()
        result = run("-m", "irgrow", "--help")
        times_s.append(time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
        assert "grow" in result.stdout and "doctor" in result.stdout
    # The best of five: the others measure the neighbours on this machine.
    assert min(times_s) < 0.5


# --- metadata


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> metadata.PathDistribution:
    """What setup.py says, as an installer would read it; nothing is written into the checkout."""
    pytest.importorskip("setuptools", minversion="77.0.3", reason="older ones do not know license expressions")
    folder = tmp_path_factory.mktemp("metadata")
    result = run("setup.py", "-q", "egg_info", "--egg-base", str(folder))
    assert result.returncode == 0, result.stderr
    return metadata.PathDistribution(folder / "irgrow.egg-info")


def test_the_metadata_names_package_licence_and_python(built: metadata.PathDistribution) -> None:
    assert built.metadata["Name"] == "irgrow"
    assert built.metadata["License-Expression"] == "Apache-2.0"
    assert built.metadata.get_all("License-File") == ["LICENSE"]
    assert built.metadata["Requires-Python"] == ">=3.11"
    assert [(entry.name, entry.value) for entry in built.entry_points] == [("irgrow", "irgrow.cli:main")]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_nothing_generic_is_installed(built: metadata.PathDistribution) -> None:
    assert (built.read_text("top_level.txt") or "").split() == ["irgrow"]
    listed = (built.read_text("SOURCES.txt") or "").split()
    for name in LINKED:
        assert f"irgrow/{name}/__init__.py" in listed
        assert not [file for file in listed if file.startswith(f"{name}/")]


def test_one_version_everywhere(built: metadata.PathDistribution) -> None:
    version = keyword_in_setup("version")
    assert built.version == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    result = run("-c", f"import irgrow; print(getattr(irgrow, '__version__', {version!r}))")
    assert result.stdout.strip() == version, result.stderr
    with contextlib.suppress(metadata.PackageNotFoundError):
        assert metadata.version("irgrow") == version, "the installed copy is an old one: pip install -e ."


def test_doctor_knows_the_bounds_of_setup_py(built: metadata.PathDistribution) -> None:
    required = [line.partition(";") for line in built.requires or [] if "extra ==" not in line]
    assert dict(name.strip().split(">=") for name, _, _ in required) == doctor.OLDEST
    assert built.metadata["Requires-Python"] == ">={}.{}".format(*doctor.OLDEST_PYTHON)


def test_constraints_pin_every_requirement(built: metadata.PathDistribution) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    tools = {"pytest", "hypothesis", "pytest-xdist", "ruff", "mypy"}
    assert set(pins) >= set(doctor.OLDEST) | tools
    assert all(version.replace(".", "").isalnum() for version in pins.values()), "exact public versions only"


def keyword_in_setup(name: str) -> str:
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == name and isinstance(node.value, ast.Constant):
            return str(node.value.value)
    raise LookupError(f"setup.py has no plain {name}=...")


# --- command line


def test_grow_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(cli, "_grow", lambda arguments: seen.update(vars(arguments)) or 0)
    code = cli.main(["grow", "digits", "--how", "gradmax", "--seed", "3", "--growths", "0", "--out", "here"])
    assert code == 0
    assert (seen["task"], seen["how"], seen["seed"], seen["growths"]) == ("digits", "gradmax", 3, 0)
    assert seen["out"] == Path("here")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["grow", "digits", "--how", "magic"], "invalid choice: 'magic' (choose from"),
        (["grow", "mnist"], "invalid choice: 'mnist'"),
        (["grow", "digits", "--epochs", "0"], "--epochs: found '0', expected a whole number, 1 or more"),
        (["grow", "digits", "--seed", "-1"], "--seed"),
        (["grow", "digits", "--seed=1.5"], "--seed: found '1.5', expected a whole number, 0 or more"),
        (
            ["grow", "digits", "--learning-rate", "nan"],
            "--learning-rate: found 'nan', expected a number above 0",
        ),
        (["grow", "digits", "--haw", "tiny"], "unrecognized arguments: --haw tiny"),
        ([], "COMMAND"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_an_unknown_how_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["grow", "digits", "--how", "magic"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert all(how in message for how in cli.HOW)


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    errors = pytest.importorskip("irgrow.ir.errors")

    def refuse(arguments: object) -> int:
        raise errors.IrgrowError("grow: no site\nto grow; found 0, expected 1")

    monkeypatch.setattr(cli, "_grow", refuse)
    assert cli.main(["grow", "digits"]) == 2
    assert capsys.readouterr().err == "irgrow: error: grow: no site to grow; found 0, expected 1\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(arguments: object) -> int:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(cli, "_grow", break_down)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        cli.main(["grow", "digits"])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def need(arguments: object) -> int:
        import no_such_library  # noqa: F401

        return 0

    monkeypatch.setattr(cli, "_grow", need)
    assert cli.main(["grow", "digits"]) == 2
    assert "'no_such_library' is missing; `irgrow doctor`" in capsys.readouterr().err


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_grow", interrupt)
    assert cli.main(["grow", "digits"]) == 130
    assert capsys.readouterr().err == "irgrow: error: interrupted\n"


def test_show_names_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(tmp_path / "nothing")]) == 2
    assert f"no such file: {tmp_path / 'nothing'}" in capsys.readouterr().err


def test_bench_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_bench", lambda arguments: seen.extend(arguments.rest) or 0)
    assert cli.main(["bench", "kernels", "--quick", "--sizes", "1", "2", "--help"]) == 0
    assert seen == ["kernels", "--quick", "--sizes", "1", "2", "--help"]


def test_bench_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "irgrow" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "run this in a checkout" in capsys.readouterr().err


# --- doctor


def test_doctor_is_content_here() -> None:
    findings = list(doctor.examine())
    assert [finding for finding in findings if finding.state == "fail"] == []
    assert {"python", "torch", "numba", "irgrow.kernels", "torchvision"} <= {item.name for item in findings}
    text = doctor.table(findings)
    assert len(text.splitlines()) >= len(findings)
    assert text.endswith("0 failures")


def test_doctor_exits_with_1_on_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def one_of_each() -> Iterator[doctor.Finding]:
        yield doctor.Finding("good", "ok", "1.0")
        yield doctor.Finding("bad", "fail", "absent", "install it")

    monkeypatch.setattr(doctor, "examine", one_of_each)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == (
        "ok    good  1.0\nfail  bad   absent\n            -> install it\n\n1 ok, 0 warnings, 1 failures\n"
    )


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def burst() -> doctor.Finding:
        raise RuntimeError("no cores\nat all")

    monkeypatch.setattr(doctor, "cpu", burst)
    [finding] = [item for item in doctor.examine() if item.name == "cpu"]
    assert (finding.state, finding.found) == ("fail", "no cores")


def test_without_torch_nothing_else_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "library", lambda name: doctor.Finding(name, "fail", "broken"))
    assert not {"cpu", "cuda"} & {item.name for item in doctor.examine()}


@pytest.mark.parametrize(
    ("make", "state", "found"),
    [
        (lambda path: path.write_text("../kernels"), "fail", "a plain file"),
        (lambda path: path.symlink_to("../nowhere"), "fail", "which is missing"),
        (lambda path: path.symlink_to(ROOT / "kernels"), "warn", "a link to /"),
        (lambda path: path.mkdir(), "ok", "an installed folder"),
        (lambda path: None, "fail", "missing"),
    ],
)
def test_doctor_explains_links(tmp_path: Path, make: Callable[[Path], object], state: str, found: str) -> None:
    make(tmp_path / "kernels")
    finding = doctor.link("kernels", tmp_path)
    assert finding.state == state
    assert found in finding.found
    assert bool(finding.hint) == (state != "ok")


def test_doctor_explains_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist\\nmore')", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    finding = doctor.torchvision()
    assert finding.state == "warn"
    assert finding.found == "does not load: operator torchvision::nms does not exist"
    assert "from one index" in finding.hint


def test_doctor_explains_a_folder_called_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.transformers().found.startswith("not installed")
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "5.0")

    def spec(name: str, place: Path) -> ModuleSpec:
        found = ModuleSpec(name, None, is_package=True)
        found.submodule_search_locations = [str(place)]
        return found

    for place, state in ((doctor.PACKAGE.parent / "kernels", "warn"), (tmp_path / "elsewhere", "ok")):
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name, place=place: spec(name, place))
        finding = doctor.transformers()
        assert (finding.state, bool(finding.hint)) == (state, state == "warn")
        assert ("for the package `kernels`" in finding.found) == (state == "warn")


def test_doctor_finds_old_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.OLDEST, "tqdm", "999.1")
    assert doctor.library("tqdm").state == "fail"
    assert "expected 999.1 or newer" in doctor.library("tqdm").found
    monkeypatch.setitem(doctor.OLDEST, "no_such_library", "1.0")
    assert doctor.library("no_such_library").found == "not installed, expected 1.0 or newer"


def test_doctor_explains_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "new" / "folder"))
    assert doctor.numba_cache().state == "ok"
    # Below a file no folder can be made, not even by root.
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "folder"))
    finding = doctor.numba_cache()
    assert finding.state == "warn"
    assert "NUMBA_CACHE_DIR" in finding.hint
