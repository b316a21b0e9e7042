"""Replacing a file as a whole: whatever happens, there is the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from irgrow.ir.errors import BadFile

if sys.platform != "win32":
    import fcntl

LEFTOVER_AGE = 60.0  # seconds without a change after which an unlocked temporary file is a dead writer's
_LONGEST = 200  # characters of the file's name in that of its temporary file: file systems allow 255


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write; when the block ends, `path` is that file, whole and on disk.

    Written to `.NAME.RANDOM.tmp` in the same directory, flushed to disk, renamed over `path`, and the
    directory flushed. If anything fails, in the block or here, the old file stays as it was and the
    temporary file is gone; errors of the operating system become BadFile. A writer that was killed leaves
    its temporary file behind: the next one to save the same file removes it.
    """
    path = Path(os.path.realpath(path))  # a link keeps pointing to where it points
    try:
        mode = _mode(path)
        temporary = path.with_name(f".{path.name[:_LONGEST]}.{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                _lock(file)
                if mode is not None:
                    os.chmod(temporary, mode)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise BadFile(
            f"saving {path}",
            _reason(error),
            "a directory that can be written, with enough space",
            do="any older file of that name is as it was",
        ) from error
    _flush_directory(path)
    _sweep(path)


def _mode(path: Path) -> int | None:
    """The permissions of the file that is there; None if there is none. A directory or device is refused."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise BadFile(f"saving {path}", "something that is no regular file", "a file's path", do="choose another name")
    return stat.S_IMODE(found.st_mode)


def _flush_directory(path: Path) -> None:
    """The renaming itself is on disk, where directories can be flushed at all (not on Windows, nor on some mounts)."""
    if sys.platform == "win32":
        return
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF):
            return
        raise BadFile(
            f"saving {path}",
            f"{_reason(error)} while flushing its directory",
            "a directory that can be flushed",
            do="the new file is complete and in place, but may be lost if the machine stops now: check the disk",
        ) from error


def _lock(file: BinaryIO) -> None:
    """This file is marked as being written; the mark ends with the process, however it ends."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # some network mounts have no locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(path: Path) -> None:
    """Temporary files of writers of `path` that were killed are gone."""
    if sys.platform == "win32":
        return
    ours = re.compile(re.escape(f".{path.name[:_LONGEST]}.") + r"[0-9a-f]{16}\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if not ours.fullmatch(name):
                continue
            left = path.parent / name
            with contextlib.suppress(OSError), open(left, "rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime > LEFTOVER_AGE:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: somebody is writing it
                    os.unlink(left)


def _reason(error: OSError) -> str:
    return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, type(error).__name__)})"
