"""A data set of triplets, from a folder or the hub."""

import re
from pathlib import Path

from storage.hub import download, unpack
from triplets.format import FOLDERS, read_triplets


def fetch_triplets(data: str | Path) -> Path:
    """The folder of data set `data`, ready for read_triplets: a local folder, or a hub data set's
    id such as yuanqianhao/Vision-OPD-6K, which is kept in data/<owner>/<name> under the working
    directory.

    Not in the hub's cache: its files are links into a store that other tools prune. Archives are
    unpacked in place when a row's image is missing; once all are there, neither archives nor
    network are needed (delete the folder to fetch anew). Call it from one process per machine.
    Raises FileNotFoundError, ValueError (bad archive or row), OSError (disk full).
    """
    folder = Path(data).expanduser()
    is_id = not folder.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(data))
    if is_id:
        folder = Path("data", data)
    try:
        read_triplets(folder)
    except FileNotFoundError:
        if is_id:
            download(
                str(data),
                f"{data!r} is no folder here",
                "or copy a data set with train.jsonl here.",
                repo_type="dataset",
                local_dir=folder,
                allow_patterns=["train.jsonl", "images/*", "teacher_images/*"],
            )
        for key in FOLDERS:
            parts = sorted((folder / key).glob(f"{key}.tar.gz*"))
            if parts:
                unpack(parts, folder / key)
        read_triplets(folder)
    return folder
