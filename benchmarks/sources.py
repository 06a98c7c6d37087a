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
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase

from tqdm import tqdm

from benchmarks.rows import Question
from storage.files import naming_full_disks, numbered_lines, write, write_jsonl
from storage.hub import download, unpack
from triplets.format import Triplet, is_text, read_triplets

TABLE = Path(__file__).with_name("sources.toml")
BENCHES = tomllib.loads(TABLE.read_text(encoding="utf-8"))
FINE = "vstar zoombench hrbench-4k hrbench-8k mme-realworld-lite mme-realworld-cn"
GROUPS = {
    "fine": FINE.split(),
    "avg6": FINE.replace("-lite", "").split(),  # what later papers quote
    "holdout": ["mmvp", "cv-bench", "mmstar", "pope"],
    "all": list(BENCHES),
    "toy": ["toy", "toy-large", "toy-holdout"],
}
LETTERS = "ABCDEFGH"
UNKNOWN_OPTIONS = dict.fromkeys(LETTERS, "")  # they are in the image, or in an unknown form
TEXTS = ("id", "prompt", "answer", "group", "pair")  # of a question; numbers may stand there too
# In what a source may differ from the layout that the code expects.
LAYOUT_ERRORS = (LookupError, TypeError, AttributeError, ValueError, SyntaxError, RecursionError)


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
    rows = read_triplets(path) if path.is_dir() else records(path)
    questions = {}
    try:
        for number, row in enumerate(rows):
            if isinstance(row, Triplet):
                question = triplet_question(row)
            else:
                question = neutral_question(row, str(number))
                if not isinstance(question.image, str) or not isinstance(question.crop, str | None):
                    raise ValueError("image or crop is no text. Expected the name of a file")
                question.image = path.parent / question.image
                question.crop = path.parent / question.crop if question.crop else None
            if question.id in questions:
                raise ValueError(f"its id comes twice: {question.id!r}. Expected unique ids")
            questions[question.id] = question
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}, row {len(questions) + 1}: {error}.") from error
    if not questions:
        raise ValueError(f"{path} holds no rows. Expected at least one.")
    return list(questions.values())


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
    kind, answer = row.get("kind") or "mc", row["answer"]
    if isinstance(answer, list) and kind == "free":  # any of these is right: a line each
        row = row | {"answer": "\n".join(filter(None, map(str, answer)))}
    for key in TEXTS:
        value = row.get(key)
        if isinstance(value, bool | dict | list) or value != value:
            raise ValueError(f"{key} is {value!r:.60}. Expected a text or a number")
    texts = {key: str(row[key]) for key in TEXTS if row.get(key) is not None}
    if not all(map(is_text, texts.values())):
        raise ValueError("half a character in its texts. Expected what can be written as UTF-8")
    answer = texts.pop("answer")
    options, allowed = lettered(row.get("options") or {}), ()
    if kind == "yn":
        answer = answer.strip().lower()
        allowed = ("yes", "no")
    elif kind == "mc":
        answer = answer.strip(" \n.()（）").upper()
        if not options:
            written = inline_options(texts["prompt"])
            options = written if answer in written else UNKNOWN_OPTIONS
        allowed = options
    elif kind not in ("free", "exact"):
        raise ValueError(f"kind is {kind!r}. Expected mc, yn, free or exact")
    if allowed and answer not in allowed:
        raise ValueError(f"the answer is {answer!r}. Expected one of {', '.join(allowed)}")
    texts = {"id": name} | texts
    return Question(
        image=row["image"], crop=row.get("crop"), answer=answer, kind=kind, options=options, **texts
    )


def lettered(options: dict) -> dict[str, str]:
    """{"a": 1} -> {"A": "1"}. Raises ValueError for what is no dict of letters."""
    letters = isinstance(options, dict) and set(map(str.upper, options)) <= set(ascii_uppercase)
    if not letters:
        raise ValueError(
            f"options are called {options!r:.60}. Expected letters and texts, such as "
            '{"A": "red", "B": "blue"}'
        )
    return {name.upper(): str(text) for name, text in options.items()}


def inline_options(text: str) -> dict[str, str]:
    """{"A": text, ..} of the options written inside a question, as (A) .., （A）.., A. .. or A: ..;
    {} when there are none. Of several lists the longest that starts at A, of these the last."""
    lists = [[]]
    for mark in re.finditer(r"[(（]([A-Ha-h])[)）]|\b([A-H])[.:：)](?=\s|[^\x00-\x7f])", text):
        letter = mark[mark.lastindex].upper()
        if letter == "A":
            lists.append([])
        if LETTERS.index(letter) == len(lists[-1]):
            lists[-1].append(mark)
    marks = max(reversed(lists), key=len)
    if len(marks) < 2:
        return {}
    options, ends = {}, [mark.start() for mark in marks[1:]] + [len(text)]
    for letter, mark, end in zip(LETTERS, marks, ends, strict=False):
        first_line = text[mark.end() : end].strip().split("\n")[0]
        options[letter] = first_line.strip(" ,;")
    return options


def triplet_question(triplet: Triplet) -> Question:
    """The question of a triplet. The toy's answers are compared word for word."""
    toy_kind, options = triplet.extra.get("toy"), inline_options(triplet.question)
    kind = "mc" if triplet.answer in options else "free"
    row = {
        "prompt": triplet.question,
        "options": options,
        "kind": "exact" if toy_kind else kind,
        "group": toy_kind,
    }
    return neutral_question(vars(triplet) | row, triplet.id)


# ---------------------------------------------------------------------------------------- sources


def convert(name: str, root: Path):
    """root/NAME/ (downloaded if it is not there) -> root/NAME.jsonl and root/NAME-images/, in the
    neutral form."""
    bench, rows, images = BENCHES[name], [], root / f"{name}-images"
    images.mkdir(parents=True, exist_ok=True)
    for repo, folders, path in source_files(name, root):
        first = len(rows)
        try:
            for record in tqdm(records(path), f"{name}: {path.name}", unit="row"):
                row = translate(record, bench, len(rows) + 1, repo)
                question = neutral_question(row, f"{name}/{len(rows)}")
                question.image = keep_picture(question.image, folders, images)
                if question.crop:
                    question.crop = keep_picture(question.crop, folders, images)
                rows.append(asdict(question))
        except LAYOUT_ERRORS as error:
            raise ValueError(
                f"{path}, row {len(rows) - first + 1}: {type(error).__name__}: {error}. Expected "
                f"the layout of {repo}: fetch it again."
            ) from error
    if not rows:
        raise FileNotFoundError(
            f"{root / name} holds no rows of {name}: expected files {' or '.join(bench['files'])} "
            f"of {', '.join(bench['repos'])}. Put them there, or delete the folder to have them "
            "downloaded."
        )
    write_jsonl(root / f"{name}.jsonl", rows)


def source_files(name: str, root: Path) -> Iterator[tuple[str, list[Path], Path]]:
    """(repository, its folder and all in it, file with rows) of a benchmark, in its first form that
    is there."""
    repos, forms = BENCHES[name]["repos"], BENCHES[name]["files"]
    for repo in repos:
        folder = root / name
        if len(repos) > 1:
            folder /= repo.split("/")[1]
        fetch_source(repo, folder, forms[0])
        folders = [folder, *(each for each in folder.rglob("*") if each.is_dir())]
        found = [sorted(folder.glob(form)) for form in forms]
        for path in next(filter(None, found), []):
            yield repo, folders, path


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

    def fill(key, default=""):
        return bench.get(key, default).format(**row)

    prompt, tail = fill("prompt").replace("<image>", "").strip("\n"), bench.get("tail", "")
    group = fill("category", "{category}" if "category" in row else "{Task}/{Subtask}")
    image = fill("image_file") or row[bench.get("image", "image")]
    crop = row[bench["crop"]] if "crop" in bench else None
    if isinstance(crop, dict) and not any(crop.values()):
        crop = None
    return {
        "image": image[0] if isinstance(image, list) else image,
        "crop": crop,
        "prompt": prompt if prompt.endswith(tail.strip()) else prompt + tail,
        "answer": fill("answer", "{answer}"),
        "kind": bench.get("kinds", {}).get(group, bench.get("kind")),
        "options": inline_options(row["options"]),
        "group": group or None,
        "pair": fill("pair") or None,
    }


def option_lines(row: dict) -> list[str]:
    """A row's options, as lines: a list, a list as Python text, or fields A to D."""
    lines = row.get("multi-choice options")
    if not lines:
        letters = [letter for letter in "ABCD" if row.get(letter) not in (None, "")]
        lines = [f"({letter}) {row[letter]}" for letter in letters]
    elif isinstance(lines, str):
        lines = literal_eval(lines)
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
        for _, line in numbered_lines(path):
            yield json.loads(line)
    else:
        yield from json.loads(path.read_bytes())


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
    if not re.search(r"(?i)\.(jpe?g|png|webp|bmp|gif|tiff?)$", value):
        return base64.b64decode(value or "?", validate=True)
    parts = Path(value).parts
    for start in range(len(parts)):
        places = [folder.joinpath(*parts[start:]) for folder in folders]
        found = [place for place in places if place.is_file()]
        if len(found) == 1:
            return found[0].read_bytes()
    raise ValueError(f"{value!r} names {len(found)} files under {folders[0]} and not one")


def fetch_source(repo: str, folder: Path, form: str):
    """A hub data set -> `folder`, if it is not there, its archives (maybe in parts) unpacked.
    form: pattern of its files, of which parquet holds the images too."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        download(
            repo,
            f"{folder} is not there: the data set {repo} is needed",
            f"or put its files into {folder} by hand.",
            repo_type="dataset",
            local_dir=partial,
            allow_patterns=form if form.endswith("parquet") else None,
        )
        partial.rename(folder)
    archives = sorted(folder.glob("*.tar.gz*"))
    for name, parts in groupby(archives, lambda path: path.name.split(".tar.gz")[0]):
        if not (folder / name).exists():
            unpack(list(parts), folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)
