"""A data set of triplets, from a folder or the hub."""

import re
from pathlib import Path

from storage.hub import unpack
from triplets.format import FOLDERS, read_triplets


def fetch(data: str | Path) -> Path:
    """The folder of data set `data`, ready for read_triplets: a local folder, or a hub data set's id such as
    yuanqianhao/Vision-OPD-6K, which is kept in data/<owner>/<name> under the working directory.

    Not in the hub's cache: its files are links into a store that other tools prune. Archives are unpacked in place when a
    row's image is missing; once all are there, neither archives nor network are needed (delete the folder to fetch anew).
    Call it from one process per machine. Raises FileNotFoundError, ValueError (bad archive or row), OSError (disk full).
    """
    here = Path(data).expanduser()
    is_id = not here.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(data))
    folder = Path("data", data) if is_id else here
    try:
        read_triplets(folder)
    except FileNotFoundError:
        if folder != here:
            download(str(data), folder)
        for key in FOLDERS:
            if (folder / "train.jsonl").is_file() and (
                parts := sorted((folder / key).glob(f"{key}.tar.gz*"))
            ):
                unpack(parts, folder / key)
        read_triplets(folder)
    return folder


def download(hub_id: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            hub_id,
            repo_type="dataset",
            local_dir=folder,
            allow_patterns=["train.jsonl", *(f"{key}/*" for key in FOLDERS)],
        )
    except Exception as error:  # network, name, gate, disk
        raise FileNotFoundError(
            f"{hub_id!r} is neither a folder here nor a data set the hub gave us ({type(error).__name__}: {error}). Expected one "
            "with train.jsonl: check the name, the network and `hf auth login`, or copy it here."
        ) from error
