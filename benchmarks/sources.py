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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from string import ascii_letters

from PIL import Image
from tqdm import tqdm

from benchmarks.rows import Question, crops_of
from storage.files import numbered_lines, write, write_jsonl
from storage.hub import download, unpack
from triplets.format import Triplet, is_number, read_triplets

BENCHES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
GROUPS = BENCHES.pop("groups")
GROUPS["all"] = list(BENCHES)
LETTERS = "ABCDEFGH"
KNOWN = (*BENCHES, *GROUPS["toy"])  # benchmarks that are no file of one's own
PILLOWS_LIMIT, TABLES_LIMIT = Image.MAX_IMAGE_PIXELS, 250_000_000
TEXTS = ("id", "prompt", "answer", "group", "pair")  # of a question; numbers may stand there too


def most_pixels(names: Iterable[str]) -> int:
    """What these benchmarks' pictures may have; Pillow refuses one of twice as many. The table's
    files are trusted, and some are huge; with one of one's own it is Pillow's own limit."""
    return TABLES_LIMIT if set(KNOWN).issuperset(names) else PILLOWS_LIMIT


def read_benchmark(name: str, root: Path) -> list[Question]:
    """The questions of a benchmark of the table (below `root`, downloaded if it is not there), of a
    .jsonl of one's own, or of a folder of triplets with answers.

    Raises ValueError or FileNotFoundError that name file and row.
    """
    path = Path(name)
    if name in BENCHES:
        path = root / f"{name}.jsonl"
        if not path.is_file():
            convert(name, root)

    def own_picture(name) -> Path:
        if not isinstance(name, str):
            raise ValueError(f"an image or crop is {name!r:.60}. Expected the name of a file")
        return path.parent / name

    rows = read_triplets(path) if path.is_dir() else records(path)
    questions = {}
    try:
        for row in rows:
            if isinstance(row, Triplet):
                question = triplet_question(row)
            else:
                question = neutral_question(row, str(len(questions)), own_picture)
            if question.id in questions:
                raise ValueError(f"its id comes twice: {question.id!r}. Expected unique ids")
            questions[question.id] = question
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}, row {len(questions) + 1}: {error}.") from error
    if not questions:
        raise ValueError(f"{path} holds no rows. Expected at least one.")
    return list(questions.values())


# ----------------------------------------------------------------------------------- neutral form


def neutral_question(row: dict, name: str, place: Callable) -> Question:
    """The question of a row with the keys of the neutral form, checked. Its id is `name` unless the
    row has one. place: what the row says of a picture -> its file. Raises ValueError."""
    for key in ("image", "prompt", "answer"):
        if not isinstance(row, dict) or row.get(key) in (None, ""):
            raise ValueError(
                f"no {key} in {row!r:.60}. Expected an object with image, prompt and answer "
                "(triplets get one from synth.py --labels)"
            )
    kind, answer = row.get("kind") or "mc", row["answer"]
    if kind == "free":  # of a list any is right: a line each
        answers = answer if isinstance(answer, list) else [answer]
        if not answers or "" in answers:
            raise ValueError(f"answer is {answer!r:.60}. Expected texts, of which any is right")
        if all(isinstance(each, str) for each in answers):
            row = row | {"answer": "\n".join(" ".join(each.split()) for each in answers)}
    texts = {}
    for key in TEXTS:
        value = row.get(key)
        bad_float = isinstance(value, float) and not is_number(value)
        if isinstance(value, bool | dict | list) or bad_float:
            raise ValueError(f"{key} is {value!r:.60}. Expected a text or a number")
        if value is not None:
            texts[key] = str(value)
    answer = texts.pop("answer")
    options = row.get("options") or {}
    good = isinstance(options, dict) and set(ascii_letters).issuperset(options)
    good = good and len(set(map(str.upper, options))) == len(options)
    if not good or not all(isinstance(v, str) or is_number(v) for v in options.values()):
        raise ValueError(
            f"options are {options!r:.60}. Expected different letters and texts, such as "
            '{"A": "red", "B": "blue"}'
        )
    options = {letter.upper(): str(text) for letter, text in options.items()}
    allowed = ()
    if kind == "yn":
        answer = answer.strip().lower()
        allowed = ("yes", "no")
    elif kind == "mc":
        answer = answer.strip(" \n.()（）").upper()
        if not options:
            options = inline_options(texts["prompt"])
            if answer not in options:  # they are in the image, or in an unknown form
                options = dict.fromkeys(LETTERS, "")
        allowed = options
    elif kind not in ("free", "exact"):
        raise ValueError(f"kind is {kind!r}. Expected mc, yn, free or exact")
    if allowed and answer not in allowed:
        raise ValueError(f"the answer is {answer!r}. Expected one of {', '.join(allowed)}")
    return Question(
        image=place(row["image"]),
        crops=list(map(place, crops_of(row))),
        answer=answer,
        kind=kind,
        options=options,
        **{"id": name} | texts,
    )


def inline_options(text: str) -> dict[str, str]:
    """{"A": text, ..} of the options written inside a question, as (A) .., （A）.., A. .. or A: ..;
    {} when there are none. Of several lists the longest that starts at A, of these the last."""
    marks = listed = []
    for mark in re.finditer(r"[(（]([A-Ha-h])[)）]|\b([A-H])[.:：)](?=\s|[^\x00-\x7f])", text):
        letter = mark[mark.lastindex].upper()
        if letter == "A":
            listed = []
        if LETTERS.index(letter) == len(listed):
            listed.append(mark)
        if len(listed) >= len(marks):
            marks = listed
    if len(marks) < 2:
        return {}
    options = {}
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for letter, mark, end in zip(LETTERS, marks, ends, strict=False):
        first_line = text[mark.end() : end].strip().split("\n")[0]
        options[letter] = first_line.strip(" ,;")
    return options


def triplet_question(triplet: Triplet) -> Question:
    """The question of a triplet. The toy's answers are compared word for word."""
    options = inline_options(triplet.question)
    row = vars(triplet) | {"prompt": triplet.question, "options": options}
    row["group"] = triplet.extra.get("toy")
    row["kind"] = "mc" if triplet.answer in options else "free"
    if row["group"]:
        row["kind"] = "exact"
    return neutral_question(row, triplet.id, Path)


# ---------------------------------------------------------------------------------------- sources


def convert(name, root):
    """root/NAME/ (downloaded if it is not there) -> root/NAME.jsonl and root/NAME-images/, in the
    neutral form."""
    bench = BENCHES[name]
    repos = ", ".join(bench["repos"])
    images = root / f"{name}-images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, folders in source_files(name, root):
        first = len(rows)
        place = partial(keep_picture, folders=folders, images=images)
        try:
            for record in tqdm(records(path), f"{name}: {path.name}", unit="row"):
                row = translate(record, bench, len(rows) + 1, path)
                rows.append(asdict(neutral_question(row, f"{name}/{len(rows)}", place)))
        # in what a source may differ from the layout expected here
        except (LookupError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{path}, row {len(rows) - first + 1}: {type(error).__name__}: {error}. Expected "
                f"the layout of {repos}: fetch it again."
            ) from error
    if not rows:
        raise FileNotFoundError(
            f"{root / name} holds no rows of {name}: expected files {' or '.join(bench['files'])} "
            f"of {repos}. Put them there, or delete the folder to have them downloaded."
        )
    write_jsonl(root / f"{name}.jsonl", rows)


def source_files(name, root):
    """(file with rows, its repository's folder and all folders in it) of a benchmark, in its first
    form that is there; what is not there is downloaded."""
    repos, forms = BENCHES[name]["repos"], BENCHES[name]["files"]
    for repo in repos:
        folder = root / name
        if len(repos) > 1:
            folder /= repo.split("/")[1]
        if not folder.is_dir():
            fetched = folder.with_name(f"{folder.name}.partial")
            download(
                repo,
                f"{folder} is not there: the data set {repo} is needed",
                f"or put its files into {folder} by hand.",
                repo_type="dataset",
                local_dir=fetched,  # parquet files hold the images too
                allow_patterns=forms[0] if forms[0].endswith("parquet") else None,
            )
            fetched.rename(folder)
        unpack_archives(folder)
        folders = list(folder.glob("**/"))
        found = [sorted(folder.glob(form)) for form in forms]
        for path in next(filter(None, found), []):
            yield path, folders


def unpack_archives(folder):
    """Each archive in `folder`, whole or in parts, into a folder of its own, once."""
    archives = sorted(folder.glob("*.tar.gz*"))
    for name, parts in groupby(archives, lambda path: path.name.split(".tar.gz")[0]):
        if not (folder / name).exists():
            unpack(list(parts), folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)


def translate(record, bench, number, path) -> dict:
    """A source's row, the `number`-th, of file `path` -> the keys of the neutral form, as
    sources.toml says; image and crop are still what the source has."""
    record = {key: plain(value) for key, value in record.items()}
    renamed = {bench.get("rename", {}).get(key, key): record[key] for key in record}
    row = renamed | record | {"number": number, "level": path.parent.name.split("_")[-1]}
    options = row.get("multi-choice options")
    if not options:
        options = [f"({letter}) {row[letter]}" for letter in "ABCD" if row.get(letter)]
    elif isinstance(options, str):
        options = literal_eval(options)
    row["options"] = "\n".join(options)

    def fill(key, default=""):
        return bench.get(key, default).format(**row)

    prompt = fill("prompt").replace("<image>", "").strip("\n")
    tail = bench.get("tail", "")
    group = fill("category", "{category}" if "category" in row else "{Task}/{Subtask}")
    image = fill("image_file") or row["image"]
    return {
        "image": image[0] if isinstance(image, list) else image,
        "crop": row.get("crop"),
        "prompt": prompt if prompt.endswith(tail.strip()) else prompt + tail,
        "answer": fill("answer", "{answer}"),
        "kind": bench.get("kinds", {}).get(group, bench.get("kind")),
        "options": inline_options(row["options"]),
        "group": group or None,
        "pair": (number - 1) // 2 if "pairs" in bench else None,
    }


def plain(value):
    """A source's value: text without blanks round it, of a picture's struct its bytes or path."""
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path")
    return value.strip() if isinstance(value, str) else value


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


def keep_picture(value, folders, images) -> str:
    """Write a source's picture into `images`, named by its content, so once; its relative path."""
    data = picture_bytes(value, folders)
    suffix = ".png" if data[:4] == b"\x89PNG" else ".jpg"
    file = images / (hashlib.sha256(data).hexdigest()[:20] + suffix)
    if not file.exists():
        write(file, data)
    return f"{images.name}/{file.name}"


def picture_bytes(value, folders) -> bytes:
    """A picture as its source has it: raw, in base64, or in a file that is named from one of
    `folders` (some sources prefix the repository's name)."""
    if isinstance(value, bytes):
        return value
    if "." not in value:
        return base64.b64decode(value, validate=True)
    parts = Path(value).parts
    for start in range(len(parts)):
        places = [folder.joinpath(*parts[start:]) for folder in folders]
        found = [place for place in places if place.is_file()]
        if len(found) == 1:
            return found[0].read_bytes()
    raise ValueError(f"{value!r} names {len(found)} files under {folders[0]} and not one")
