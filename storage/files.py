"""Files that are never half-written, and JSON lines that outlive a kill."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming_full_disks(folder: Path):
    """Turns 'no space left' under `folder` into an error that says where, how much is free, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        raise OSError(
            error.errno,
            f"no space left for {folder} ({shutil.disk_usage(there).free / 1e6:,.0f} MB free, less "
            "with a quota). Nothing is half-written: make room or choose another disk, and run again",
        ) from error


@contextmanager
def whole(path: Path):
    """Gives a temporary path to write to, which then becomes `path`, or is removed on an error: no file is half-written."""
    scratch = path.with_name(
        f".tmp-{os.urandom(6).hex()}-{path.name}"
    )  # its own: ranks may share a name
    try:
        with naming_full_disks(path.parent):
            yield scratch
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing, whenever the process is killed."""
    with whole(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def appending(path: Path):
    """`path`, open for lines at its end; a last line that a killed run left torn is ended first."""
    torn, file = path.exists() and not path.read_bytes().endswith(b"\n"), path.open("a")
    file.write("\n" * torn)
    return file


def read_json(path: Path, notes: list[str]) -> dict:
    """A json file's dict; {}, and a note, when it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (OSError, ValueError) as error:
        notes.append(
            f"{path.name} is unreadable: {error}"
            if path.exists()
            else f"{path.name} is not in {path.parent}"
        )
        return {}


def read_jsonl(path: Path, notes: list[str]) -> list[dict]:
    """Rows of a jsonl file; NaN and infinities become None. Noted: that it is missing, or had lines that a kill left torn."""
    rows, torn = [], 0
    if not path.is_file():
        notes.append(f"{path.name} is not in {path.parent}")
        return rows
    for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            rows.append(json.loads(line, parse_constant=lambda name: None))
        except json.JSONDecodeError:
            torn += 1
    notes += [f"{path.name}: {torn} unreadable line{'s' * (torn > 1)} left out"] * (torn > 0)
    return rows


def flush(folder: Path, inside: bool = True) -> None:
    """Returns when `folder` (and, unless told otherwise, all that lies in it) is safely on the disk:
    a rename alone may reach the disk before the contents do."""
    paths = [*folder.rglob("*"), folder] if inside else [folder]
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
