"""Downloads from the hub, and archives that come in parts."""

import gzip
import os
import shutil
import tarfile
import zlib
from contextlib import ExitStack
from pathlib import Path

from storage.files import naming_full_disks


def download(hub_id: str, what: str, way_out: str, **options) -> Path:
    """The folder with the files of a repository of the Hugging Face hub.

    what: begins the error's sentence, with what was asked for and not found; way_out: ends it, with
    what to do when name, network and login are right. options: those of
    huggingface_hub.snapshot_download, such as repo_type, local_dir, allow_patterns.
    Raises FileNotFoundError.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, **options))
    except Exception as error:  # network, name, gate, disk
        raise FileNotFoundError(
            f"{what}, and the hub gave nothing ({type(error).__name__}: {error}). Check the name, "
            f"the network and `hf auth login` (for what is gated), {way_out}"
        ) from error


class Joined:
    """The bytes of open files, one after the other: split archives need no joined copy on disk."""

    def __init__(self, files: list):
        self.files = files

    def read(self, size: int) -> bytes:
        for file in self.files:
            if data := file.read(size):  # one at its end gives b""
                return data
        return b""


def plain_files(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    if not (member.isreg() or member.isdir()):  # a link or a device
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)  # refuses what leads out of the folder


def extract(parts: list[Path], folder: Path):
    """The files of a .tar.gz, given in parts, into `folder`, read to the last byte and checksum."""
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        stream = stack.enter_context(gzip.GzipFile(fileobj=Joined(files), mode="rb"))
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            archive.extractall(folder, filter=plain_files)
        while stream.read(1 << 20):  # what follows the tar's end: the checksum
            pass


def unpack(parts: list[Path], target: Path):
    """The files of a .tar.gz, given in parts, into `target`; its members may be `x.png` or `<name
    of target>/x.png`. They are unpacked beside it, then moved in: killed at any moment, it holds
    whole files only. Raises ValueError for a damaged or unsafe archive, OSError (disk full)."""
    size = sum(part.stat().st_size for part in parts)
    print(f"unpacking {len(parts)} archive part(s), {size / 1e9:.1f} GB, into {target}", flush=True)
    scratch = target.with_name(f".unpacking-{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with naming_full_disks(target):
            extract(parts, scratch)
            inner = scratch / target.name
            root = inner if inner.is_dir() else scratch
            for path in filter(Path.is_file, root.rglob("*")):
                place = target / path.relative_to(root)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{parts[0]} ({len(parts)} part(s), {size:,} bytes) cannot be unpacked: {error}. "
            "Expected a whole .tar.gz of plain files: fetch it again (git without LFS gives "
            "pointers), or unpack it."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
