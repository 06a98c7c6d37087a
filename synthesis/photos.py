"""Photographs: which there are, and what is wrong with one."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from storage.images import LONGEST, load_image


@dataclass
class Photo:
    """A photograph, and what became of it."""

    file: str  # its path under --images, with / between folders
    digest: str = ""  # of its bytes: 16 hex digits of sha256; "" if they cannot be read
    image: Image.Image | None = None  # upright RGB; None where `drops` says why not
    drops: Counter = field(default_factory=Counter)  # reason -> how often something was dropped
    notes: list = field(default_factory=list)  # what a decoder or the model said, for stats.json
    samples: list = field(default_factory=list)  # the rows of train.jsonl made of it
    usage: Counter = field(default_factory=Counter)  # of a server: its tokens, shrunk pictures
    failed: str = ""  # why a server did not answer: the photograph is done again by the next run

    def drop(self, reason: str, note=""):
        """Counts something as dropped; note: a reply or an error, of which the beginning is
        kept."""
        self.drops[reason] += 1
        if note:
            self.notes.append(f"{reason}: {str(note)[:500]}")


def photograph_files(images: Path, out: Path) -> list[str]:
    """The files under `images`, relative to it, but for hidden ones and those of `out`. Raises."""
    root = images.resolve()
    own = out.resolve()
    if root.is_relative_to(own):
        raise ValueError(
            f"--out {out} is or holds --images {images}: what is written there would be taken for "
            "photographs. Choose an --out beside it, or inside it."
        )
    files = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and own not in path.parents and not hidden:
            files.append(name.as_posix())
    if not files:
        raise FileNotFoundError(
            f"--images {images} holds no files. Expected a folder of photographs."
        )
    return files


def rank_of(file: str, world: int) -> int:
    """Which of `world` ranks a photograph belongs to: sha256(relative path) % world."""
    return int(hashlib.sha256(os.fsencode(file)).hexdigest(), 16) % world


def size_fault(size) -> str | None:
    short, long = sorted(size)
    if short * long > 100e6:
        return "too_large"
    if short < 448:
        return "too_small"
    if long > LONGEST * short:
        return "too_long"
    return None


def load_photo(root: Path, file: str) -> Photo:
    """root/file, whatever it is: one that cannot be used has no image, and the reason counted."""
    path = root / file
    photo = Photo(file)
    try:
        with path.open("rb") as content:
            photo.digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        with Image.open(path) as header:
            reason = size_fault(header.size)
        if reason:
            photo.drop(reason, "{} x {} px".format(*header.size))
        else:
            photo.image = load_image(path)
    except Exception as error:  # decoders raise errors of any kind
        reason = "corrupt"
        if not photo.digest or path.stat().st_size == 0:
            reason = "empty_or_unreadable"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not_an_image"
        elif isinstance(error, Image.DecompressionBombError):
            reason = "too_large"
        photo.drop(reason, error)
    return photo


def photos_ahead(pool: Executor, root: Path, files: list[str], size: int) -> Iterator[list[Photo]]:
    """The photographs, `size` at once; the next ones are decoded while these are worked on."""
    ahead = []
    for start in range(0, len(files) + size, size):  # in the last turn nothing more is loaded
        loading = pool.map(partial(load_photo, root), files[start : start + size])
        if start > 0:
            yield list(ahead)
        ahead = loading
