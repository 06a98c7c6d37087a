"""The benchmarks: from each source's own files to questions of one neutral form (`read_benchmark`).

Sources, prompts and published figures are a table, sources.toml; whatever form a source has, the
same few functions read it.
"""

import base64
import csv
import hashlib
import json
import re
import tomllib
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from benchmarks.rows import Question
from storage.files import naming_full_disks, write, write_jsonl
from storage.hub import download, unpack
from triplets.format import Triplet, read_triplets

TABLE = Path(__file__).with_name("sources.toml")
BENCHES = tomllib.loads(TABLE.read_text(encoding="utf-8"))
FINE = "vstar zoombench hrbench-4k hrbench-8k mme-realworld-lite mme-realworld-cn"
GROUPS = {
    "fine": FINE.split(),
    "holdout": ["mmvp", "cv-bench", "mmstar", "pope"],
    "all": list(BENCHES),
    "toy": ["toy", "toy-large", "toy-holdout"],
}
LETTERS = "ABCDEFGH"
UNKNOWN_OPTIONS = dict.fromkeys(LETTERS, "")  # they are in the image, or in an unknown form
# In what a source may differ from the layout that the code expects.
LAYOUT_ERRORS = (LookupError, TypeError, AttributeError, ValueError, SyntaxError)


def read_benchmark(name: str, root: Path) -> list[Question]:
    """The questions of a benchmark of the table (below `root`, downloaded if it is not there), of a
    .jsonl of one's own, or of a folder of triplets with answers.

    Raises ValueError or FileNotFoundError that name file and row.
    """
    path = Path(name)
    if name in BENCHES:
        path = root / f"{name}.jsonl"
        if not path.is_file():
            with naming_full_disks(root):
                convert(name, root)
    questions = []
    try:
        if path.is_dir():
            for triplet in read_triplets(path):  # which names file and line itself
                questions.append(triplet_question(triplet))
        else:
            for number, row in enumerate(records(path)):
                questions.append(own_question(row, str(number), path.parent))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, row {len(questions) + 1}: {error}.") from error
    ids = Counter(question.id for question in questions)
    twice = [each for each, count in ids.items() if count > 1]
    if twice or not questions:
        raise ValueError(
            f"{path}: {len(questions)} rows, ids that come twice: {twice[:3]}. Expected at least "
            "one row, and unique ids."
        )
    return questions


# ----------------------------------------------------------------------------------- neutral form


def neutral_question(row: dict, name: str) -> Question:
    """The question of a row with the keys of the neutral form, checked; image and crop as given.
    Its id is `name` unless the row has one. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"found {row!r:.60}. Expected an object with image, prompt and answer")
    missing = [key for key in ("image", "prompt", "answer") if row.get(key) in (None, "")]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)}. Expected image, prompt and answer (triplets get one from "
            "synth.py --labels)"
        )
    kind, given, answer = row.get("kind") or "mc", row.get("options") or {}, str(row["answer"])
    options = named_options(given or inline_options(str(row["prompt"])))
    allowed = {"mc": options if given else UNKNOWN_OPTIONS, "yn": ("yes", "no")}
    if kind not in (*allowed, "free", "exact"):
        raise ValueError(f"kind is {kind!r}. Expected mc, yn, free or exact")
    if kind == "yn":
        answer = answer.strip().lower()
    if kind == "mc":
        answer = answer.strip(" \n.()（）").upper()
        given = options if answer in options else UNKNOWN_OPTIONS
    if kind in allowed and answer not in allowed[kind]:
        raise ValueError(f"the answer is {answer!r}. Expected one of {', '.join(allowed[kind])}")
    texts = {key: str(row[key]) for key in ("id", "group", "pair") if row.get(key) is not None}
    return Question(
        image=row["image"],
        crop=row.get("crop"),
        prompt=str(row["prompt"]),
        answer=answer,
        kind=kind,
        options=given,
        **{"id": name, **texts},
    )


def named_options(options) -> dict[str, str]:
    """{letter: text}, checked. Raises ValueError."""
    if not isinstance(options, dict):
        raise ValueError(
            f"options are {options!r:.60}. Expected letters and texts, such as "
            '{"A": "red", "B": "blue"}'
        )
    wrong = [name for name in options if not re.fullmatch("[A-Za-z]", str(name))]
    if wrong:
        raise ValueError(f"options are called {wrong}. Expected letters, A to Z")
    return {str(name).upper(): str(text) for name, text in options.items()}


def inline_options(text: str) -> dict[str, str]:
    """{"A": text, ..} of the options written inside a question, as (A) .., （A）.., A. .. or A: ..;
    {} when there are none. Of several lists the longest that starts at A, of these the last."""
    lists = [[]]
    for mark in re.finditer(r"[(（]([A-Ha-h])[)）]|\b([A-H])[.:：)](?=\s|[^\x00-\x7f])", text):
        letter = (mark[1] or mark[2]).upper()
        if letter == "A":
            lists.append([])
        if LETTERS.index(letter) == len(lists[-1]):
            lists[-1].append(mark)
    marks = max(reversed(lists), key=len)
    if len(marks) < 2:
        return {}
    options = {}
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    for letter, mark, end in zip(LETTERS, marks, ends, strict=False):
        first_line = text[mark.end() : end].strip().split("\n")[0]
        options[letter] = first_line.strip(" ,;")
    return options


def own_question(row: dict, name: str, folder: Path) -> Question:
    """Of a .jsonl in the neutral form, whose images lie relative to its `folder`."""
    question = neutral_question(row, name)
    question.image = folder / question.image
    question.crop = folder / question.crop if question.crop else None
    return question


def triplet_question(triplet: Triplet) -> Question:
    """The question of a triplet. The toy's answers are compared word for word."""
    toy_kind = triplet.extra.get("toy")
    options = inline_options(triplet.question)
    kind = "mc" if triplet.answer in options else "free"
    row = {
        "image": triplet.image,
        "crop": triplet.crop,
        "prompt": triplet.question,
        "answer": triplet.answer,
        "kind": "exact" if toy_kind else kind,
        "options": options,
        "group": toy_kind,
    }
    return neutral_question(row, triplet.id)


# ---------------------------------------------------------------------------------------- sources


def convert(name: str, root: Path) -> None:
    """root/NAME/ (downloaded if it is not there) -> root/NAME.jsonl and root/NAME-images/, in the
    neutral form."""
    bench, rows = BENCHES[name], []
    images = root / f"{name}-images"
    images.mkdir(parents=True, exist_ok=True)
    for repo in bench["repos"]:
        folder = root / name
        if len(bench["repos"]) > 1:
            folder /= repo.split("/")[1]
        forms = bench["files"]
        fetch_source(repo, folder, forms[0] if forms[0].endswith("parquet") else None)
        found = [sorted(folder.glob(form)) for form in forms]
        for path in next(filter(None, found), []):
            rows += source_rows(name, repo, path, folder, images, first=len(rows))
    if not rows:
        raise FileNotFoundError(
            f"{root / name} holds no rows of {name}: expected files {' or '.join(bench['files'])} "
            f"of {', '.join(bench['repos'])}. Put them there, or delete the folder to have them "
            "downloaded."
        )
    write_jsonl(root / f"{name}.jsonl", rows)


def source_rows(
    name: str, repo: str, path: Path, folder: Path, images: Path, first: int
) -> list[dict]:
    """The rows of `path`, one file of a source in `folder`; their pictures are written to `images`.
    first: how many rows the files before it gave."""
    rows, folders = [], [folder, *(each for each in folder.rglob("*") if each.is_dir())]
    try:
        for record in tqdm(records(path), f"{name}: {path.name}", unit="row"):
            number = first + len(rows)
            row = translate(record, BENCHES[name], number + 1, repo)
            question = neutral_question(row, f"{name}/{number}")
            question.image = keep_picture(question.image, folders, images)
            if question.crop:
                question.crop = keep_picture(question.crop, folders, images)
            rows.append(asdict(question))
    except LAYOUT_ERRORS as error:
        raise ValueError(
            f"{path}, row {len(rows) + 1}: {type(error).__name__}: {error}. Expected the layout of "
            f"{repo}: fetch it again."
        ) from error
    return rows


def translate(record: dict, bench: dict, number: int, repo: str) -> dict:
    """A source's row -> the keys of the neutral form, as sources.toml says; image and crop are
    still what the source has."""
    row = {}
    for key, value in record.items():
        value = value.strip() if isinstance(value, str) else value
        row.setdefault(bench.get("rename", {}).get(key, key), value)
        row[key] = value
    row |= {"number": number, "pair": (number - 1) // 2, "repo": repo.split("_")[-1]}
    row["options"] = "\n".join(option_lines(row))

    def fill(key: str, default: str = "") -> str:
        return bench.get(key, default).format(**row)

    prompt, tail = fill("prompt").replace("<image>", "").strip("\n"), bench.get("tail", "")
    if not prompt.endswith(tail.strip()):
        prompt += tail
    group = fill("category", "{category}" if "category" in row else "{Task}/{Subtask}")
    image = bench.get("image", "image")
    image = image.format(**row) if "{" in image else row[image]
    kind, crop = bench.get("kind", "mc"), None
    if "crop" in bench:
        crop = row[bench["crop"]]
        if isinstance(crop, dict) and not any(crop.values()):
            crop = None
        if group != "mcq":
            kind = "free"
    return {
        "image": image[0] if isinstance(image, list) else image,
        "crop": crop,
        "prompt": prompt,
        "answer": fill("answer", "{answer}"),
        "kind": kind,
        "options": inline_options(row["options"]),
        "group": group or None,
        "pair": fill("pair") or None,
    }


def option_lines(row: dict) -> list[str]:
    """A row's options, as lines: a list, a list as Python text, or fields A to D."""
    lines = row.get("multi-choice options") or row.get("Answer choices")
    if not lines:
        lettered = [letter for letter in "ABCD" if row.get(letter) not in (None, "")]
        return [f"({letter}) {row[letter]}".strip() for letter in lettered]
    lines = literal_eval(lines) if isinstance(lines, str) else lines
    return [line.strip() for line in lines]


def records(path: Path) -> Iterator[dict]:
    """The rows of a source file, whatever its form."""
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(
                f"{path} is a parquet file, which needs pyarrow: pip install pyarrow"
            ) from error
        for part in ParquetFile(path).iter_batches(batch_size=8):  # rows of several MB
            yield from part.to_pylist()
    elif path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)  # images in base64
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8-sig").split("\n"):
            if line.strip():
                yield json.loads(line)
    else:
        yield from json.loads(path.read_text(encoding="utf-8-sig"))


def keep_picture(value, folders: list[Path], images: Path) -> str:
    """Write a source's picture into `images`, named by its content, so once; its relative path."""
    data = picture_bytes(value, folders)
    suffix = ".png" if data[:4] == b"\x89PNG" else ".jpg"
    file = images / (hashlib.sha256(data).hexdigest()[:20] + suffix)
    if not file.exists():
        write(file, data)
    return f"{images.name}/{file.name}"


def picture_bytes(value, folders: list[Path]) -> bytes:
    """A picture as its source has it: raw, in a struct, in base64, or in a file that is named from
    one of `folders` (some sources prefix the repository's name)."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not re.search(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", value, re.IGNORECASE):
        return base64.b64decode(value or "?", validate=True)
    parts, found = Path(value).parts, []
    for start in range(len(parts)):
        places = [folder.joinpath(*parts[start:]) for folder in folders]
        found = [place for place in places if place.is_file()]
        if len(found) == 1:
            return found[0].read_bytes()
    several = "several files" if found else "no file"
    raise ValueError(f"{value!r} names {several} under {folders[0]}")


def fetch_source(repo: str, folder: Path, pattern: str | None) -> None:
    """A hub data set -> `folder`, if it is not there, its archives (maybe in parts) unpacked."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        way_out = f"or put its files into {folder} by hand."
        where = {"repo_type": "dataset", "local_dir": partial, "allow_patterns": pattern}
        download(repo, f"{folder} is not there: the data set {repo} is needed", way_out, **where)
        partial.rename(folder)
    archives = sorted(folder.glob("*.tar.gz*"))
    for name, parts in groupby(archives, lambda path: path.name.split(".tar.gz")[0]):
        if not (folder / name).exists():
            unpack(list(parts), folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)
