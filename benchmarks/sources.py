"""The benchmarks: from each source's own files to rows of one neutral form (`benchmark`, at the end).

Sources, prompts and published figures are a table, sources.toml; whatever form a source has, the same few functions read it.
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
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from storage.files import naming_full_disks, write
from storage.hub import unpack
from triplets.format import read_triplets

BENCHES = tomllib.loads(Path(__file__).with_name("sources.toml").read_text(encoding="utf-8"))
GROUPS = {
    "fine": [
        "vstar",
        "zoombench",
        "hrbench-4k",
        "hrbench-8k",
        "mme-realworld-lite",
        "mme-realworld-cn",
    ],
    "holdout": ["mmvp", "cv-bench", "mmstar", "pope"],
    "all": list(BENCHES),
    "toy": ["toy", "toy-large", "toy-holdout"],
}
TOY = {
    "small": "toy",
    "pair": "toy",
    "large": "toy-large",
    "colour": "toy-holdout",
    "corner": "toy-holdout",
}  # scenes by kind


def inline_options(text: str) -> dict[str, str]:
    """{"A": text, …} of the options written inside a question, as (A) …, （A）…, A. … or A: …; {} when there are none."""
    lists = [[]]
    for mark in re.finditer(r"[(（]([A-Ha-h])[)）]|\b([A-H])[.:：)](?=\s|[^\x00-\x7f])", text):
        place = "ABCDEFGH".index((mark[1] or mark[2]).upper())
        lists += [[mark]] if place == 0 else []
        lists[-1] += [mark] if place == len(lists[-1]) else []
    marks = max(reversed(lists), key=len)  # of the longest that start at A, the last
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    texts = [
        text[mark.end() : end].strip().split("\n")[0].strip(" ,;") for mark, end in zip(marks, ends)
    ]
    return dict(zip("ABCDEFGH", texts)) if len(texts) > 1 else {}


def neutral(row: dict, name: str) -> dict:
    """`row` with every key of the neutral form, checked. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"found {row!r:.60}. Expected an object with image, prompt and answer")
    form = {"id": name, "kind": "mc", "options": {}} | dict.fromkeys(
        ("image", "prompt", "answer", "crop", "group", "pair")
    )
    row = form | {key: row[key] for key in form if row.get(key) is not None}
    if missing := [key for key in ("image", "prompt", "answer") if row[key] in (None, "")]:
        raise ValueError(
            f"no {', '.join(missing)}. Expected image, prompt and answer (triplets get one from synth.py --labels)"
        )
    if not isinstance(row["options"], dict):
        raise ValueError(
            f'options are {row["options"]!r:.60}. Expected letters and texts, such as {{"A": "red", "B": "blue"}}'
        )
    row |= {
        key: str(row[key])
        for key in ("id", "prompt", "answer", "group", "pair")
        if row[key] is not None
    }
    found = dict(row["options"] or inline_options(row["prompt"]))
    options = {str(letter).upper(): str(text) for letter, text in found.items()}
    if wrong := [letter for letter in options if not re.fullmatch("[A-Z]", letter)]:
        raise ValueError(f"options are called {wrong}. Expected letters, A to Z")
    unknown = dict.fromkeys("ABCDEFGH", "")  # options in the image, or in an unknown form
    expected = {
        "mc": options if row["options"] else unknown,
        "yn": ("yes", "no"),
        "free": None,
        "exact": None,
    }
    if row["kind"] not in expected:
        raise ValueError(f"kind is {row['kind']!r}. Expected one of {', '.join(expected)}")
    if row["kind"] == "yn":
        row["answer"] = row["answer"].strip().lower()
    if row["kind"] == "mc":
        row["answer"] = row["answer"].strip(" \n.()（）").upper()
        row["options"] = options if row["answer"] in options else unknown
    if (allowed := expected[row["kind"]]) and row["answer"] not in allowed:
        raise ValueError(f"the answer is {row['answer']!r}. Expected one of {', '.join(allowed)}")
    return row


def triplet_row(t: dict) -> dict:
    """The neutral row of a triplet (of read_triplets). The toy's answers are compared word for word."""
    options, group = inline_options(t.question), t.extra.get("toy")
    kind = "exact" if group else "mc" if t.answer in options else "free"
    return neutral(
        vars(t) | {"prompt": t.question, "options": options, "group": group, "kind": kind}, t.id
    )


def translate(record: dict, bench: dict, number: int, repo: str) -> dict:
    """A source's row -> the neutral form, as benchmarks.toml says; image and crop are still what the source has."""
    r = {key: value.strip() if isinstance(value, str) else value for key, value in record.items()}
    r = {bench.get("rename", {}).get(key, key): r[key] for key in r} | r
    r |= {"number": number, "pair": (number - 1) // 2, "repo": repo.split("_")[-1]}
    lettered = [f"({letter}) {r[letter]}" for letter in "ABCD" if r.get(letter) not in (None, "")]
    lines = r.get("multi-choice options") or r.get("Answer choices") or lettered
    r["options"] = "\n".join(
        map(str.strip, literal_eval(lines) if isinstance(lines, str) else lines)
    )
    fill = lambda key, default="": bench.get(key, default).format(**r)
    prompt, tail = fill("prompt").replace("<image>", "").strip("\n"), bench.get("tail", "")
    group = fill("category", "{category}" if "category" in r else "{Task}/{Subtask}")
    image = fill("image") if "{" in bench.get("image", "") else r[bench.get("image", "image")]
    crop = r[bench["crop"]] if "crop" in bench else None
    crop = None if isinstance(crop, dict) and not any(crop.values()) else crop
    return {
        "image": image[0] if isinstance(image, list) else image,
        "crop": crop,
        "prompt": prompt if prompt.endswith(tail.strip()) else prompt + tail,
        "answer": fill("answer", "{answer}"),
        "kind": "free" if "crop" in bench and group != "mcq" else bench.get("kind", "mc"),
        "options": inline_options(r["options"]),
        "group": group or None,
        "pair": fill("pair") or None,
    }


def records(path: Path) -> Iterator[dict]:
    """The rows of a source file, whatever its form."""
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(
                f"{path} is a parquet file, which needs pyarrow: pip install pyarrow"
            ) from error
        for part in ParquetFile(path).iter_batches(
            batch_size=8
        ):  # rows of several MB, files of several GB
            yield from part.to_pylist()
    elif path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2**31 - 1)  # images in base64
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    else:
        text = path.read_text(encoding="utf-8-sig")
        yield from (
            map(json.loads, filter(str.strip, text.split("\n")))
            if path.suffix == ".jsonl"
            else json.loads(text)
        )


def blob(value, folders: list[Path]) -> bytes:
    """An image's bytes as its source has them: raw, in a struct, in base64, or in a file that is named from one of `folders`
    (some sources prefix the repository's name)."""
    value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if isinstance(value, bytes):
        return value
    if not re.search(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", value, re.I):
        return base64.b64decode(value or "?", validate=True)
    parts = Path(value).parts
    for start in range(len(parts)):
        found = [path for folder in folders if (path := folder.joinpath(*parts[start:])).is_file()]
        if len(found) == 1:
            return found[0].read_bytes()
    raise ValueError(
        f"{value!r} names {'several files' if found else 'no file'} under {folders[0]}"
    )


def fetch(repo: str, folder: Path, pattern: str | None) -> None:
    """A hub data set -> `folder`, if it is not there, its archives (maybe in parts) unpacked."""
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        partial = folder.with_name(f"{folder.name}.partial")
        try:
            snapshot_download(repo, repo_type="dataset", local_dir=partial, allow_patterns=pattern)
        except Exception as error:  # network, gate, disk
            raise FileNotFoundError(
                f"no data set {repo} from the hub ({type(error).__name__}: {error}). Check network and "
                f"`hf auth login`, or put its files into {folder} by hand."
            ) from error
        partial.rename(folder)
    for name, parts in groupby(
        sorted(folder.glob("*.tar.gz*")), lambda path: path.name.split(".tar.gz")[0]
    ):
        if not (folder / name).exists():
            unpack(list(parts), folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)


def convert(name: str, root: Path) -> None:
    """root/NAME/ (downloaded if it is not there) -> root/NAME.jsonl and root/NAME-images/, in the neutral form."""
    bench, images, rows = BENCHES[name], root / f"{name}-images", []
    images.mkdir(parents=True, exist_ok=True)
    for repo in bench["repos"]:
        folder, forms = (
            root / name / (repo.split("/")[1] if len(bench["repos"]) > 1 else ""),
            bench["files"],
        )
        fetch(repo, folder, forms[0] if forms[0].endswith("parquet") else None)
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in next(filter(None, (sorted(folder.glob(form)) for form in forms)), []):
            first = len(rows)
            try:
                for record in tqdm(records(path), f"{name}: {path.name}", unit="row"):
                    row = neutral(
                        translate(record, bench, len(rows) + 1, repo), f"{name}/{len(rows)}"
                    )
                    for view in filter(row.get, ("image", "crop")):
                        data = blob(row[view], folders)  # named by its content: written once
                        file = images / (
                            hashlib.sha256(data).hexdigest()[:20]
                            + (".png" if data[:4] == b"\x89PNG" else ".jpg")
                        )
                        if not file.exists():
                            write(file, data)
                        row[view] = str(file.relative_to(root))
                    rows.append(row)
            except (LookupError, TypeError, AttributeError, ValueError, SyntaxError) as error:
                raise ValueError(
                    f"{path}, row {len(rows) - first + 1}: {type(error).__name__}: {error}. Expected the layout of "
                    f"{repo}: fetch it again."
                ) from error
    if not rows:
        raise FileNotFoundError(
            f"{root / name} holds no rows of {name}: expected files {' or '.join(bench['files'])} of "
            f"{', '.join(bench['repos'])}. Put them there, or delete the folder to have them downloaded."
        )
    write(root / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def benchmark(name: str, root: Path) -> list[dict]:
    """The neutral rows of a benchmark of the table, of a .jsonl of one's own, or of a folder of triplets with answers.

    Dicts: id (str, unique), image and crop (Path; crop may be None), prompt, answer (str), kind (mc: an option's letter, yn,
    free, exact: word for word), options ({letter: text}), group and pair (str or None). Errors name file and row.
    """
    path, rows = root / f"{name}.jsonl" if name in BENCHES else Path(name), []
    if name in BENCHES and not path.is_file():
        with naming_full_disks(root):
            convert(name, root)
    own = not path.is_dir()
    source = records(path) if own else read_triplets(path)  # which names file and line itself
    try:
        for n, row in enumerate(source):
            row = neutral(row, str(n)) if own else triplet_row(row)
            rows.append(
                row
                | {view: path.parent / row[view] for view in ("image", "crop") if own and row[view]}
            )
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, row {len(rows) + 1}: {error}.") from error
    twice = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice or not rows:
        raise ValueError(
            f"{path}: {len(rows)} rows, ids that come twice: {twice[:3]}. Expected at least one row, and unique ids."
        )
    return rows
