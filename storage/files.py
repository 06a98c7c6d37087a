"""Files that are never half-written, and JSON lines that outlive a kill."""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def naming_full_disks(folder: Path):
    """Turns 'no space left' under `folder` into an error that says where, how much is free, and
    what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise OSError(
            error.errno,
            f"no space left for {folder} ({free:,.0f} MB free, less with a quota). Nothing is "
            "half-written: make room or choose another disk, and run again",
        ) from error


HELD = []  # locks, open until this process ends, in whatever way


def hold(folder: Path, name: str = ".lock") -> None:
    """Makes `folder` this process's until it ends; name: of the file that says whose it is. Raises
    ValueError, with the process and the host that hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / name).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"{folder} is in use by {file.read() or 'another process'}. Wait for its end, stop it, "
            "or choose another folder."
        ) from error
    except OSError as error:
        print(f"{folder} is on a disk without locks ({error}): see that no other run uses it")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    HELD.append(file)


def numbered(folder: Path, kind: str) -> list[Path]:
    """Our own folders of a kind, such as checkpoint-000020, lowest first: not copies of them."""
    return sorted(folder.glob(f"{kind}-" + 6 * "[0-9]"))


# ------------------------------------------------------------------------------------ whole files


@contextmanager
def whole(path: Path):
    """Gives a temporary path to write to, which then becomes `path`, or is removed on an error: no
    file is half-written."""
    unique = os.urandom(6).hex()  # ranks may write a file of the same name
    scratch = path.with_name(f".tmp-{unique}-{path.name}")
    try:
        with naming_full_disks(path.parent):
            yield scratch
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def remove_scratch(folder: Path):
    """Removes what killed processes left of `whole`, but nothing that is younger than ten minutes
    and may be a living one's."""
    for path in folder.rglob(".tmp-*"):
        with suppress(FileNotFoundError):  # it has become the file it is for
            if time.time() - path.stat().st_mtime > 600:
                path.unlink()


def write(path: Path, content: str | bytes):
    """All of it or nothing, whenever the process is killed."""
    with whole(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json(path: Path, notes: list[str]) -> dict:
    """A json file's dict; {}, and a note, when it is missing or unreadable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
        if isinstance(found, dict):
            return found
        notes.append(f"{path.name} is no JSON object")
    except FileNotFoundError:
        notes.append(f"{path.name} is not in {path.parent}")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} is unreadable: {error}")
    return {}


# ------------------------------------------------------------------------------------- JSON lines


def write_jsonl(path: Path, rows: Iterable[dict]):
    """A row a line, all of them or nothing; the rows may be computed on the way."""
    # Half a character becomes its JSON escape.
    how = {"encoding": "utf-8", "errors": "backslashreplace"}
    with whole(path) as scratch, scratch.open("w", **how) as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def appending(path: Path) -> TextIO:
    """`path`, open for lines at its end; a last line that a killed run left torn is ended first."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    file = path.open("a")
    if torn:
        file.write("\n")
    return file


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, counted from 1, and bytes, with the line's end) of each line that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def read_jsonl(path: Path, notes: list[str]) -> list[dict]:
    """Rows of a jsonl file; NaN and infinities become None. Noted: that it is missing, or had lines
    that a kill left torn."""
    if not path.is_file():
        notes.append(f"{path.name} is not in {path.parent}")
        return []
    rows = []
    torn = 0
    for _, line in numbered_lines(path):
        row = None
        with suppress(json.JSONDecodeError, RecursionError):
            text = line.decode(errors="replace")
            row = json.loads(text, parse_constant=lambda name: None)
        if isinstance(row, dict):
            rows.append(row)
        else:
            torn += 1
    if torn:
        plural = "s" if torn > 1 else ""
        notes.append(f"{path.name}: {torn} unreadable line{plural} left out")
    return rows


def flush(folder: Path, inside: bool = True) -> None:
    """Returns when `folder` (and, unless told otherwise, all that lies in it) is safely on disk:
    a rename alone may reach the disk before the contents do."""
    paths = [*folder.rglob("*"), folder] if inside else [folder]
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
