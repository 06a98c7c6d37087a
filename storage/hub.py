"""Downloads from the hub, and archives that come in parts."""

import gzip
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from subprocess import PIPE, Popen

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


def why_not_uploaded(hub_id: str | None) -> str | None:
    """Why nothing can be uploaded to a repository, as far as one can tell without the hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if hub_id is None:
        return None
    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        return f"--push {hub_id} is no name of a repository, such as me/my-model: {error}"
    if not get_token():
        return f"--push {hub_id} needs a login: `hf auth login`, or HF_TOKEN"
    return None


def upload(folder: Path, hub_id: str) -> None:
    """A checkpoint, without what a run is resumed from, to a repository of the hub; one that is not
    there is made, a private one. Raises OSError."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(hub_id, private=True, exist_ok=True)
        done = HfApi().upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            ignore_patterns="state/*",
            commit_message=folder.name,
        )
    except Exception as error:  # network, login, rights, name
        raise OSError(
            f"{folder} is whole, but the hub did not take it as {hub_id} ({type(error).__name__}: "
            f"{error}). Check network, login and rights; the same command uploads it again."
        ) from error
    print(f"uploaded: {done}")


def plain_files(member, folder):
    """A filter for tarfile: raises for links, devices, and what leads out of the folder."""
    if not (member.isreg() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)


def unpack(parts: list[Path], target: Path):
    """The files of a .tar.gz, given in parts, into `target`; its members may be `x.png` or `<name
    of target>/x.png`. They are unpacked beside it, then moved in: killed at any moment, it holds
    whole files only. Raises ValueError for a damaged or unsafe archive, OSError (disk full)."""
    print(f"unpacking {len(parts)} archive part(s) into {target}", flush=True)
    scratch = target.with_name(f".unpacking-{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with (
            naming_full_disks(target.parent),
            Popen(["cat", *parts], stdout=PIPE) as joined,  # no joined copy on disk
            gzip.GzipFile(fileobj=joined.stdout) as stream,
        ):
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                archive.extractall(scratch, filter=plain_files)
            while stream.read(1 << 20):  # what follows the tar's end: the checksum
                pass
            inner = scratch / target.name
            root = inner if inner.is_dir() else scratch
            shutil.copytree(root, target, copy_function=os.replace, dirs_exist_ok=True)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{parts[0]} ({len(parts)} part(s)) cannot be unpacked: {error}. Expected a whole "
            ".tar.gz of plain files: fetch it again (git without LFS gives pointers)."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
