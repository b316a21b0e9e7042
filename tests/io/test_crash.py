"""Whatever interrupts saving, the old file or the new one is there, whole; and nothing is left lying around."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import irgrow as ig
from irgrow.io import atomic
from irgrow.ir import errors

OLD, NEW = ig.mlp([3, 2], seed=1), ig.mlp([3, 5, 2], seed=2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    ig.save(tmp_path / "net.irgrow", OLD)
    return tmp_path / "net.irgrow"


def fail(*, call: int, code: int, real: Any, counter: list[int]) -> Any:
    def instead(*args: Any, **named: Any) -> Any:
        counter[0] += 1
        if counter[0] == call:
            raise OSError(code, os.strerror(code))
        return real(*args, **named)

    return instead


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("function", ["fsync", "replace", "open", "write"])
def test_an_error_of_the_system_leaves_the_old_file(
    function: str, code: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, before = [0], file.read_bytes()
    if function == "open":
        monkeypatch.setattr(atomic, "open", fail(call=1, code=code, real=open, counter=counter), raising=False)
    elif function == "write":
        monkeypatch.setattr(atomic, "open", full_disk(code, counter), raising=False)
    else:
        monkeypatch.setattr(atomic.os, function, fail(call=1, code=code, real=getattr(os, function), counter=counter))
    with pytest.raises(errors.BadFile, match=rf"saving .*net\.irgrow: found .*{errno.errorcode[code]}.*as it was"):
        ig.save(file, NEW)
    assert counter[0] >= 1
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
    ig.save(file, NEW)
    assert ig.load(file) == NEW


def full_disk(code: int, counter: list[int]) -> Any:
    """A replacement for `open` whose files take the header's place and then no more."""

    def opened(*args: Any, **named: Any) -> Any:
        real = open(*args, **named)  # noqa: SIM115

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                real.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def write(self, data: bytes) -> int:
                counter[0] += 1
                if counter[0] > 2:
                    real.write(bytes(data)[: len(data) // 2])
                    raise OSError(code, os.strerror(code))
                return real.write(data)

        return Full()

    return opened


def test_the_directory_cannot_be_flushed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the renaming there is no way back; the new file is whole, and the caller hears that it may be lost."""
    counter, real = [0], os.fsync
    monkeypatch.setattr(atomic.os, "fsync", fail(call=2, code=errno.EIO, real=real, counter=counter))
    with pytest.raises(errors.BadFile, match="flushing its directory.*may be lost"):
        ig.save(file, NEW)
    assert ig.load(file) == NEW
    counter[0] = 0
    monkeypatch.setattr(atomic.os, "fsync", fail(call=2, code=errno.EINVAL, real=real, counter=counter))
    ig.save(file, OLD)  # a file system without directory flushing is no error
    assert ig.load(file) == OLD


def test_an_interrupt_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ig.save(file, NEW)
    assert ig.load(file) == OLD
    assert os.listdir(file.parent) == [file.name]


def test_places_where_nothing_can_be_saved(tmp_path: Path) -> None:
    with pytest.raises(errors.BadFile, match="No such file or directory"):
        ig.save(tmp_path / "missing" / "net.irgrow", NEW)
    (tmp_path / "folder").mkdir()
    with pytest.raises(errors.BadFile, match="no regular file"):
        ig.save(tmp_path / "folder", NEW)
    with pytest.raises(errors.BadFile, match="no regular file"):
        ig.save("/", NEW)
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.BadFile, match="Not a directory"):
        ig.save(tmp_path / "file" / "net.irgrow", NEW)
    with pytest.raises(errors.BadFile, match="null"):
        ig.save("a\0b", NEW)
    ig.save(tmp_path / ("n" * 250), NEW)  # the longest names leave room for the temporary file's
    assert ig.load(tmp_path / ("n" * 250)) == NEW


@pytest.mark.skipif(sys.platform == "win32", reason="needs file locks")
def test_leftovers_of_killed_writers_are_removed_and_those_of_living_ones_stay(file: Path) -> None:
    import fcntl

    names = [f".net.irgrow.{digit * 16}.tmp" for digit in "abc"]
    dead, young, locked = (file.with_name(name) for name in names)
    other = file.with_name(".other.irgrow.aaaaaaaaaaaaaaaa.tmp")
    for left in (dead, young, locked, other):
        left.write_bytes(b"half a netw")
    long_ago = time.time() - 2 * atomic.LEFTOVER_AGE
    for left in (dead, locked, other):
        os.utime(left, (long_ago, long_ago))
    with open(locked, "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        ig.save(file, NEW)
    assert sorted(os.listdir(file.parent)) == sorted([young.name, locked.name, other.name, file.name])


# ---- killed ---------------------------------------------------------------------------------------------------

SAVING = """
import hashlib, json, os, random, signal, sys, time
import torch
import irgrow as ig
from irgrow.ir.errors import BadFile

torch.set_num_threads(1)
path, trials = sys.argv[1], int(sys.argv[2])
networks = [ig.mlp([40, 30, 20], seed=n) for n in range(2)]
ig.save(path, networks[0])
kinds = set()
for trial in range(trials):
    child = os.fork()
    if child == 0:
        n = 0
        while True:
            ig.save(path, networks[n := 1 - n])
    time.sleep(random.Random(trial).uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = ig.load(path)
    assert any(found == network for network in networks)
    kinds.add(len([name for name in os.listdir(os.path.dirname(path)) if name.endswith(".tmp")]) > 0)
# A real limit on the size of files, as a disk that is full would be.
import resource
before = open(path, "rb").read()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
try:
    ig.save(path, networks[0])
except BadFile as error:
    message = str(error)
assert open(path, "rb").read() == before
print(json.dumps({"interrupted": True in kinds, "message": message}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("trials", [15, pytest.param(300, marks=pytest.mark.slow)])
def test_killed_while_saving(trials: int, tmp_path: Path) -> None:
    done = run(SAVING, str(tmp_path / "net.irgrow"), str(trials))
    assert done["interrupted"]  # at least one kill came in the middle of writing: its temporary file is there
    assert "EFBIG" in done["message"]


def run(code: str, *arguments: str) -> Any:
    """What the program prints, read as JSON."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
