"""Evaluation: the paper's benchmarks, honest scoring, the gap between crop and full image, and a page to look at.

    python evaluate.py --bench vstar --model Qwen/Qwen3.5-4B --out runs/eval-4b             # or --bench fine,holdout,my.jsonl
    torchrun --nproc-per-node 8 evaluate.py --bench all --model runs/x/checkpoint-000065 --out runs/eval-x
    python evaluate.py --bench zoombench --view both --model DIR --out DIR                  # full, crop and the gap
    python evaluate.py --bench toy --view both --checkpoints runs/toy --out runs/toy-gap    # the gap over a run (Figure 5)
    python evaluate.py --compare runs/eval-4b runs/eval-x                                   # paired differences, what flipped
    python evaluate.py --rescore runs/eval-4b --judge URL_OR_MODEL                          # saved answers: no model, no images
    python evaluate.py --report runs/toy                                                    # (re)build a folder's report.html

--out holds answers-BENCH-RANK.jsonl (a line an answer, complete in itself), result.json, a judge's verdicts.jsonl, report.html.
Killed at any moment, the same command goes on, on any number of ranks. Greedy, non-thinking, images at native resolution.
"""
import argparse
import base64
import csv
import hashlib
import html
import io
import json
import math
import os
import re
import time
import tomllib
import unicodedata
import urllib.request
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http.client import HTTPException
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import synth

TEMPLATE = Path(__file__).with_name("report.html")
BENCHES = tomllib.loads(Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8"))
GROUPS = {"fine": ["vstar", "zoombench", "hrbench-4k", "hrbench-8k", "mme-realworld-lite", "mme-realworld-cn"],
          "holdout": ["mmvp", "cv-bench", "mmstar", "pope"], "all": list(BENCHES), "toy": ["toy", "toy-large", "toy-holdout"]}
TOY = {"small": "toy", "pair": "toy", "large": "toy-large", "colour": "toy-holdout", "corner": "toy-holdout"}    # scenes by kind
JUDGE = ("Does the response express the same meaning as the answer of the question?\nQuestion: {prompt}\nAnswer: {answer}\n"
         "Response: {output}\nReply with Yes or No only.")
Z = 1.959964                                               # of a 95% interval


# ------------------------------------------------------------------------------------------------------------------ files

def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing, whenever the process is killed."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


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
        notes.append(f"{path.name} is unreadable: {error}" if path.exists() else f"{path.name} is not in this folder")
        return {}


def read_jsonl(path: Path, notes: list[str]) -> list[dict]:
    """Rows of a jsonl file; NaN and infinities become None. Noted: that it is missing, or had lines that a kill left torn."""
    rows, torn = [], 0
    if not path.is_file():
        notes.append(f"{path.name} is not in this folder")
        return rows
    for line in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            rows.append(json.loads(line, parse_constant=lambda name: None))
        except json.JSONDecodeError:
            torn += 1
    notes += [f"{path.name}: {torn} unreadable line{'s' * (torn > 1)} left out"] * (torn > 0)
    return rows


# ---------------------------------------------------------------------------------------------------- benchmarks: their rows

def inline_options(text: str) -> dict[str, str]:
    """{"A": text, …} of the options written inside a question, as (A) …, （A）…, A. … or A: …; {} when there are none."""
    marks = []
    for mark in re.finditer(r"[(（]([A-Ha-h])[)）]|\b([A-H])[.:：)](?=\s|[^\x00-\x7f])", text):
        place = "ABCDEFGH".index((mark[1] or mark[2]).upper())
        if place in (0, len(marks)):                                            # the last list that starts at A counts
            marks[place:] = [mark]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    texts = [text[mark.end():end].strip().split("\n")[0].strip(" ,;") for mark, end in zip(marks, ends)]
    return dict(zip("ABCDEFGH", texts)) if len(texts) > 1 else {}


def neutral(row: dict, name: str) -> dict:
    """`row` with every key of the neutral form, checked. Raises ValueError."""
    row = {"id": name, "kind": "mc", "crop": None, "options": {}, "group": None, "pair": None} | row
    if missing := [key for key in ("image", "prompt", "answer") if row.get(key) in (None, "")]:
        raise ValueError(f"no {', '.join(missing)}. Expected image, prompt and answer (triplets get one from synth.py --labels)")
    row |= {key: str(row[key]) for key in ("id", "prompt", "answer", "group", "pair") if row[key] is not None}
    found = dict(row["options"] or inline_options(row["prompt"]))
    options = {str(letter).upper(): str(text) for letter, text in found.items()}
    unknown = dict.fromkeys("ABCDEFGH", "")                                     # options in the image, or in an unknown form
    expected = {"mc": options if row["options"] else unknown, "yn": ("yes", "no"), "free": None, "exact": None}
    if row["kind"] not in expected:
        raise ValueError(f"kind is {row['kind']!r}. Expected one of {', '.join(expected)}")
    if row["kind"] == "yn":
        row["answer"] = row["answer"].lower()
    if row["kind"] == "mc":
        row["answer"] = row["answer"].strip(" \n.()（）").upper()
        row["options"] = options if row["answer"] in options else unknown
    if (allowed := expected[row["kind"]]) and row["answer"] not in allowed:
        raise ValueError(f"the answer is {row['answer']!r}. Expected one of {', '.join(allowed)}")
    return row


def triplet_row(t: dict) -> dict:
    """The neutral row of a triplet (of synth.read_triplets). The toy's answers are compared word for word."""
    options, group = inline_options(t["question"]), t["extra"].get("toy")
    kind = "exact" if group else "mc" if t["answer"] in options else "free"
    return neutral(t | {"prompt": t["question"], "options": options, "group": group, "kind": kind}, t["id"])


def translate(record: dict, bench: dict, number: int, repo: str) -> dict:
    """A source's row -> the neutral form, as benchmarks.toml says; image and crop are still what the source has."""
    r = {key: value.strip() if isinstance(value, str) else value for key, value in record.items()}
    r = {bench.get("rename", {}).get(key, key): r[key] for key in r} | r
    r |= {"number": number, "pair": (number - 1) // 2, "repo": repo.split("_")[-1]}
    lines = r.get("multi-choice options") or r.get("Answer choices") or [f"({x}) {r[x]}" for x in "ABCD" if r.get(x)]
    r["options"] = "\n".join(map(str.strip, literal_eval(lines) if isinstance(lines, str) else lines))
    fill = lambda key, default="": bench.get(key, default).format(**r)
    prompt, tail = fill("prompt").replace("<image>", "").strip("\n"), bench.get("tail", "")
    group = fill("category", "{category}" if "category" in r else "{Task}/{Subtask}")
    image = fill("image") if "{" in bench.get("image", "") else r[bench.get("image", "image")]
    return {"image": image[0] if isinstance(image, list) else image, "crop": r[bench["crop"]] if "crop" in bench else None,
            "prompt": prompt if prompt.endswith(tail.strip()) else prompt + tail, "answer": fill("answer", "{answer}"),
            "kind": "free" if "crop" in bench and group != "mcq" else bench.get("kind", "mc"),
            "options": inline_options(r["options"]), "group": group or None, "pair": fill("pair") or None}


def records(path: Path) -> Iterator[dict]:
    """The rows of a source file, whatever its form."""
    if path.suffix == ".parquet":
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ImportError(f"{path} is a parquet file, which needs pyarrow: pip install pyarrow") from error
        for part in ParquetFile(path).iter_batches(batch_size=8):               # rows of several MB, files of several GB
            yield from part.to_pylist()
    elif path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(2 ** 31 - 1)                                       # images in base64
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    else:
        text = path.read_text(encoding="utf-8")
        yield from map(json.loads, filter(str.strip, text.split("\n"))) if path.suffix == ".jsonl" else json.loads(text)


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
    raise ValueError(f"{value!r} names {'several files' if found else 'no file'} under {folders[0]}")


def fetch(repo: str, folder: Path, pattern: str | None) -> None:
    """A hub data set -> `folder`, if it is not there, its archives (maybe in parts) unpacked."""
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        partial = folder.with_name(f"{folder.name}.partial")
        try:
            snapshot_download(repo, repo_type="dataset", local_dir=partial, allow_patterns=pattern)
        except Exception as error:                                              # network, gate, disk
            raise FileNotFoundError(f"no data set {repo} from the hub ({type(error).__name__}: {error}). Check network and "
                                    f"`hf auth login`, or put its files into {folder} by hand.") from error
        partial.rename(folder)
    for name, parts in groupby(sorted(folder.glob("*.tar.gz*")), lambda path: path.name.split(".tar.gz")[0]):
        if not (folder / name).exists():
            synth.unpack(list(parts), folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)


def convert(name: str, root: Path) -> None:
    """root/NAME/ (downloaded if it is not there) -> root/NAME.jsonl and root/NAME-images/, in the neutral form."""
    bench, images, rows = BENCHES[name], root / f"{name}-images", []
    images.mkdir(parents=True, exist_ok=True)
    for repo in bench["repos"]:
        folder, forms = root / name / (repo.split("/")[1] if len(bench["repos"]) > 1 else ""), bench["files"]
        fetch(repo, folder, forms[0] if forms[0].endswith("parquet") else None)
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        for path in next(filter(None, (sorted(folder.glob(form)) for form in forms)), []):
            first = len(rows)
            try:
                for record in tqdm(records(path), f"{name}: {path.name}", unit="row"):
                    row = neutral(translate(record, bench, len(rows) + 1, repo), f"{name}/{len(rows)}")
                    for view in filter(row.get, ("image", "crop")):
                        data = blob(row[view], folders)                         # named by its content: written once
                        file = images / (hashlib.sha256(data).hexdigest()[:20] + (".png" if data[:4] == b"\x89PNG" else ".jpg"))
                        if not file.exists():
                            write(file, data)
                        row[view] = str(file.relative_to(root))
                    rows.append(row)
            except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
                raise ValueError(f"{path}, row {len(rows) - first + 1}: {type(error).__name__}: {error}. Expected the layout of "
                                 f"{repo}: fetch it again.") from error
    if not rows:
        raise FileNotFoundError(f"{root / name} holds no rows of {name}: expected files {' or '.join(bench['files'])} of "
                                f"{', '.join(bench['repos'])}. Put them there, or delete the folder to have them downloaded.")
    write(root / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def benchmark(name: str, root: Path) -> list[dict]:
    """The neutral rows of a benchmark of the table, of a .jsonl of one's own, or of a folder of triplets with answers.

    Dicts: id (str, unique), image and crop (Path; crop may be None), prompt, answer (str), kind (mc: an option's letter, yn,
    free, exact: word for word), options ({letter: text}), group and pair (str or None). Errors name file and row.
    """
    if name in GROUPS["toy"]:
        import toy
        rows = benchmark(str(toy.draw(root / "toy", 1200, 0, split="eval")), root)
        return [row | {"crop": None if name == "toy-holdout" else row["crop"]} for row in rows if TOY[row["group"]] == name]
    path, rows = root / f"{name}.jsonl" if name in BENCHES else Path(name), []
    if name in BENCHES and not path.is_file():
        with synth.naming_full_disks(root):
            convert(name, root)
    try:
        rows += map(triplet_row, synth.read_triplets(path) if path.is_dir() else ())
        for n, row in enumerate(() if path.is_dir() else records(path)):
            rows.append(neutral(row, str(n)))
            rows[n] |= {view: path.parent / row[view] for view in ("image", "crop") if rows[n][view]}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, row {len(rows) + 1}: {error}.") from error
    if len({row["id"] for row in rows}) < len(rows) or not rows:
        raise ValueError(f"{path}: {len(rows)} rows, or ids twice. Expected at least one row, and unique ids.")
    return rows


# ---------------------------------------------------------------------------------------------------------------- answers

def answer(model, processor, name: str, rows: list[dict], out: Path, *, views: list[str], max_new_tokens: int, batch: int,
           rounds: int = 0, rank: int = 0, world: int = 1) -> None:
    """Append this rank's answers to benchmark `name` that `out` does not hold yet to out/answers-NAME-RANK.jsonl, a line each.

    A line is the row with bench, view, seconds, and output, tokens, truncated; or with error when its image cannot be read, or
    it cannot be encoded or does not fit in memory alone: counted, never scored, and tried again by the next run.
    """
    from torch import OutOfMemoryError
    import rollout
    near = lambda row: row | {key: row[key] and os.path.relpath(row[key], out) for key in ("image", "crop")}
    asked = [near(row) | {"bench": name, "view": view} for row in rows[rank::world] for view in views
             if view == "full" or row["crop"]]
    done = {(a["id"], a["view"]): a for a in saved(out) if a["bench"] == name and "error" not in a}
    same = lambda a: all(done.get((a["id"], a["view"]), a)[key] == a[key] for key in ("prompt", "answer"))
    if other := sorted({a["id"] for a in asked if not same(a)}):
        raise ValueError(f"{out} holds {name} with other questions or answers under the ids {other[:3]}. Choose another --out.")
    todo, states, size = [a for a in asked if (a["id"], a["view"]) not in done], Counter(), batch
    with appending(out / f"answers-{name}-{rank}.jsonl") as file, tqdm(
            total=len(asked), initial=len(asked) - len(todo), desc=name, unit="row", disable=rank > 0) as bar:
        while todo:
            start, part = time.perf_counter(), todo[:size]
            try:
                paths = [out / a["image" if a["view"] == "full" else "crop"] for a in part]
                images = [synth.load_image(os.path.normpath(path)) for path in paths]
                replies = rollout.answers(model, processor, images, [a["prompt"] for a in part], max_new_tokens, rounds)
            except (OutOfMemoryError, OSError, ValueError) as error:
                if len(part) > 1:                                               # too many, or a bad one among them: halve
                    size = len(part) // 2
                    if isinstance(error, OutOfMemoryError):
                        batch = size
                        tqdm.write(f"{name}: out of memory with {len(part)} rows at once, going on with {batch}")
                    continue
                replies = [{"error": f"{type(error).__name__} with this row alone: {error}"}]
            seconds = (time.perf_counter() - start) / len(part)
            part = [a | reply | {"seconds": seconds} for a, reply in zip(part, replies)]
            file.writelines(json.dumps(a) + "\n" for a in part)
            file.flush()
            todo, size = todo[len(part):], min(batch, 2 * size)
            states.update(score(a)["state"] for a in part)
            bar.update(len(part))
            right, errors = states["right"], states["error"]
            bar.set_postfix_str(f"{right / max(1, states.total() - errors):.1%} right, {errors} errors")


def saved(out: Path) -> list[dict]:
    """The answers in a results folder, one a row and view: an error only where there is no answer."""
    answers = [a for path in sorted(out.glob("answers-*.jsonl")) for a in read_jsonl(path, [])]
    answers.sort(key=lambda a: "error" not in a)
    return list({(a["bench"], a["id"], a["view"]): a for a in answers}.values())


# ---------------------------------------------------------------------------------------------------------------- scoring

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = dict(zip([*ONES, *TEENS, *TENS], [*range(20), *range(20, 100, 10)]))
NUMBER = rf"(?:{'|'.join(TENS)})[ -](?:{'|'.join(ONES[1:])})|{'|'.join(NUMBERS)}"
LARGE = r"hundred|thousand|million|billion|dozen"
NOT = r"(?:\b(?:no|not|never|neither|nor|none|cannot|without|rather than|instead of)\b|n't\b|不[是选]?|没有?|否|并非|而非|排除)"
SAY = r"answers?|options?|choice|choose|choosing|pick|select|say|so|hence|thus|therefore|actually|think|believe"
CUE = rf"(?:\b(?:{SAY}|ans|go with|correct|(?:must|should|would) be)\b|\bit(?:'s| is)(?= ?[«‹·])|答案?|选项?|而是|所以|因此|故)"
BEFORE = (rf"(?:^[^\w«‹]*|[,;:(\[=]\s*|[.!-]\s+|(?<=[^\x00-\x7f«‹])\s*|\b(?i:{SAY}|is|are|be|it's|with|and|or|not|nor|but|than|"
          r"likely|probably|clearly|definitely|maybe|perhaps|both|either|neither)\s+)")


def final_text(output: str) -> str:
    """What an output finally says: after the last </think>, in the last <answer>, start and end of what is long, in the last
    \\boxed{}; without questions, special tokens and markup, full-width forms as ASCII, number words below 100 as digits."""
    text = unicodedata.normalize("NFKC", output).replace("’", "'").rpartition("</think>")[2]
    text = "" if "<think>" in text else text.rpartition("<answer>")[2].partition("</answer>")[0]
    text = text if len(text) < 4000 else text[:1000] + "\n" + text[-3000:]
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    text = boxed[-1] if boxed else text
    text = re.sub(r"<\|.*?\|>|</?\w+>|\\[a-z]*|[*_`#$\"“”{}«»‹›·]|(?<!\w)'|'(?!\w)|[^.!?。\n]*\?", " ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).strip()
    return re.sub(rf"(?<!the )(?<!hundred )(?<!hundred and )\b(?:{NUMBER})\b(?![ -](?:{LARGE}))",
                  lambda m: str(sum(NUMBERS[word] for word in re.split("[ -]", m[0].lower()))), text, flags=re.I)


def plain(text: str) -> str:
    """Lower case, without articles, outer punctuation and the hyphens of words."""
    text = re.sub(r"\b(?:an?|the)\b|(?<=[a-z])-(?=[a-z])", " ", text.lower())
    return " ".join(text.strip(" \n.,;:!?'()[]。").split())


def parse_choice(output: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an output commits to; None when it commits to none, or to several.

    1. Options are marked where they are named: «C» for "(c)" and "option c", ‹C› for the text of C (the longest that fits), and
       ·C· for a capital that stands alone, before punctuation, a number, "because", ..: "A dog" and "B12" name none.
    2. What is denied ("not A", "B and D are wrong") is dropped, and a letter beside another option's text is no answer.
    3. The last one announced ("answer", "so", "choose", "选", ..) decides: letters first, then texts.
    4. Else the lines that begin with a letter; else what is named, ·C· aside ("vitamin C"); and that must be a single option.
    """
    names, text, end = "".join(options), final_text(output), r"(?:\s*(?:$|[,:;!.)\n«‹]|- |[^\x00-\x7f]))"
    whole = [name for name, option in options.items() if len(option) > 1 and plain(option) == plain(text) != text.lower()[4:]]
    if whole:
        return whole[0] if len(whole) == 1 else None
    text = re.sub(r":\s+", ": ", text)
    text = re.sub(rf"(^|\banswer(?: is|:) )([{names}])(?={end})", lambda m: m[1] + m[2].upper(), text, flags=re.I)
    text = re.sub(rf"(?:\b(?:option|choice)|选项)\s*[(\[]?([{names}])\b[)\]]?|[(\[]\s*([{names}])\s*[)\]]",
                  lambda m: f"«{(m[1] or m[2]).upper()}»", text, flags=re.I)
    text = re.sub(rf"({BEFORE})([{names}])(?={end}|\s+(?:because|since|as|and|or|but|rather|not|\d|"
                  r"is (?:the|not|correct|right|wrong|incorrect))\b)", r"\1·\2·", text, flags=re.M)
    for name, option in sorted(options.items(), key=lambda item: -len(item[1])):
        if words := plain(final_text(option)).split():
            words = r"[\s-]+(?:(?:an?|the)\s)?".join(map(re.escape, words))
            text = re.sub(rf"(?<![a-z0-9.:‹«·-]){words}(?![a-z0-9›»·-]|[.:]\d|\s*%)", f"‹{name}›", text, flags=re.I)
    several = r"[«‹·]\w[»›·](?:(?:[\s,/、或和]|\b(?:or|and|nor|maybe|perhaps)\b)*[«‹·]\w[»›·])*"
    text = re.sub(rf"{NOT}\s*(?:\w+\s+){{0,3}}?{several}", " ", text, flags=re.I)
    denied = rf"(?:is|are|was|were|does|do)(?: both| all)?\s*(?:{NOT}|wrong|incorrect|false)|cannot\b|不|错"
    text = re.sub(rf"{several}[)\]]?\s*(?:{denied})", " ", text, flags=re.I)
    if re.search(r"[«·](\w)[»·]\W*‹(?!\1)|‹(\w)›\W*«(?!\2)", text):
        return None
    announced = re.findall(rf"{CUE}[^«‹·.\n]*({several})", text, flags=re.I)
    lines = [first + rest.replace("·", " ") for first, rest in re.findall(rf"^\W*(?=[«·])({several})(.*)", text, re.M)]
    said = ([found for found in announced if "‹" not in found] or announced)[-1:] or lines or [text.replace("·", " ")]
    said = set(re.findall(r"[«·](\w)", str(said)) or re.findall(r"‹(\w)", str(said)))
    return said.pop() if len(said) == 1 else None


def parse_yes_no(output: str) -> str | None:
    """"yes", "no" or None: the last one announced ("answer: no", "so yes"); else the one that stands as a clause of its own; else
    "no" for a sentence that denies, "yes" for "there is ..". Doubt and contradiction are None."""
    text = final_text(output).lower()
    word = r"(yes|nope|no|是的?|有|对|否|不是|没有|不存在)(?=\s*(?:$|[.,!;:。\n]|and\b|or\b))"
    announced = re.findall(rf"(?:\b(?:answer|so|hence|thus|therefore)\b|答案|所以|因此)(?:\s*(?:is|是|为))?[\s:]*{word}", text)
    said = announced[-1:] or re.findall(rf"(?:^|[.,:;!。\n]|\b(?:is|so|and|or)\b)\s*{word}", text)
    said = {"no" if re.match("no|否|不|没", found) else "yes" for found in said}
    if re.search(r"\b(?:sure|certain|clear|tell|determine|know|sorry|unable|possible|maybe|idea)\b|无法|不确定|不清", text):
        return None
    if not announced and said != {"no"}:
        said |= {"no"} if re.search(NOT, text) else set()
        said |= {"yes"} if re.search(r"\bthere (?:is|are) (?!no)|\byes\b", text) else set()
    return said.pop() if len(said) == 1 else None


def match_free_form(output: str, answer: str) -> bool | None:
    """True: the output's value is the answer; False: it is another number, or no for yes; None: undecided, a judge's matter.

    The value is what follows the last "answer is" / "answer:", else the whole text, its first or last line, or what follows a
    single sentence's last verb. A number also stands among words ("3 dogs"), where it is the only one and nothing qualifies it.
    """
    text = re.split(r"\banswer\b\s*(?:is\b|[:=])|答案[是为:]*", final_text(output), flags=re.I)[-1].strip()
    gold, number = plain(final_text(answer)), r"(?<![\w.:/])-?\d+(?:[.:/]\d+)*(?![\w%])"
    values = [text, *text.split("\n")[:1], *text.split("\n")[-1:]]
    if not re.search(r"[.!。]\s|\n", text):
        values += re.split(r"\b(?:is|are|was|were|it's|says|reads|shows)\b", text, flags=re.I)[-1:]
    if not gold or gold in map(plain, values):
        return bool(gold) or None
    if {gold, plain(text)} == {"yes", "no"}:
        return False
    found = re.findall(number, text)
    vague = rf"{NOT}|\b(?:or|about|than|over|under|least|most|nearly|almost|half|am|pm|{LARGE})\b"
    wanted = re.fullmatch(rf"({number})(?: [a-z]+)*", gold)
    if len(found) != 1 or not wanted or re.search(vague, text, re.I) or gold != wanted[1] and plain(text) != found[0]:
        return None
    return re.sub(r"\.0+$", "", found[0]) == re.sub(r"\.0+$", "", wanted[1])


def official_right(output: str, kind: str, answer: str, bench: str = "") -> bool:
    """The official rule, mistakes included ("Answer: C" counts as A; only what it calls wrong goes to the judge)."""
    inside, gold = output.partition("<answer>")[2], answer.strip().lower()
    text = (inside.partition("</answer>")[0] if "</answer>" in inside else output[max(output.find("Answer:"), 0):]).strip()
    if kind == "yn":
        text = text.lstrip("*")
        if text.lower().startswith("answer"):
            text = text.partition("answer")[2]                       # the original crashes at "Answer": wrong here
        text = text.strip(":* \n").lower()
        return gold == next((word for word in ("yes", "no") if text.startswith(word)), text.split(" ")[-1].strip(". *"))
    rules = (r"\(([ABab])\)", r"\b([ABab])\b") if bench == "mmvp" else (r"\(([A-Z])\)", r"([A-Z])[.)\s]", r"([A-Z])")
    first = next(filter(None, (re.search(rule, text) for rule in rules)), None)
    return text.lower() == gold or kind == "mc" and bool(first) and first[1].lower() == gold


def score(a: dict, verdict: bool | None = None, scorer: str = "ours") -> dict:
    """Answer `a` with said (what was parsed, or None), official (right by that rule), undecided (the scorer leaves it to a
    judge), judged, correct, and state: right, wrong, unparsed or error. verdict: the judge's, used only where undecided."""
    if "error" in a:
        return a | {"state": "error"}
    output, gold, kind = a["output"], a["answer"], a["kind"]
    said = parse_choice(output, a["options"]) if kind == "mc" else parse_yes_no(output) if kind == "yn" else output
    right = (match_free_form(output, gold) if kind == "free" else output.split() == gold.split() if kind == "exact" else
             said and said == gold)
    official = right if kind == "exact" else official_right(output, kind, gold, a["bench"])
    decided = right if scorer == "ours" else official or None
    correct = bool(verdict if decided is None else decided)
    return a | {"said": gold if correct else said, "official": official, "undecided": decided is None, "correct": correct,
                "judged": decided is None and verdict is not None,
                "state": "right" if correct else "unparsed" if right is None and verdict is None else "wrong"}


def ask_judge(judge: str, name: str | None, prompts: list[str]) -> Iterator[str | Exception]:
    """Greedy replies, in order, of an OpenAI-compatible API (judge is its URL; the key, if any, is OPENAI_API_KEY's) or of a HF
    model; where a call failed three times, the exception."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    if not judge.startswith("http"):
        from torch.cuda import is_available
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model, tokenizer = AutoModelForCausalLM.from_pretrained(judge, dtype="auto"), AutoTokenizer.from_pretrained(judge)
        model.to("cuda" if is_available() else "cpu")
        for chat in chats:
            inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False, return_tensors="pt",
                                                   return_dict=True).to(model.device)
            output = model.generate(**inputs, max_new_tokens=512, do_sample=False)
            yield tokenizer.decode(output[0, inputs["input_ids"].shape[1]:])
        return

    def ask(chat: list[dict]) -> str | Exception:
        body = json.dumps({"model": name or "default", "temperature": 0, "messages": chat}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        for pause in (1, 4, 0):
            try:
                request = urllib.request.Request(f"{judge.rstrip('/')}/chat/completions", body, headers)
                with urllib.request.urlopen(request, timeout=300) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                failed = error
                time.sleep(pause)
        return failed
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(ask, chats)


def scored(out: Path, how: dict | None = None) -> tuple[list[dict], int]:
    """The answers in `out`, scored, and how many calls of the judge failed. It is asked only where the scorer is undecided, and
    once: its verdicts are kept in out/verdicts.jsonl. how: scorer, judge, judge_model; None: as in result.json, asking nobody."""
    scorer, judge, name = map((how or read_json(out / "result.json", [])).get, ("scorer", "judge", "judge_model"))
    prompt = lambda a: JUDGE.format_map({"output": ""} | a)
    known = {v["prompt"]: v["same"] for v in read_jsonl(out / "verdicts.jsonl", []) if (v["judge"], v["model"]) == (judge, name)}
    rated = lambda: [score(a, known.get(prompt(a)), scorer or "ours") for a in answers]
    answers, failed = saved(out), 0
    if asked := {prompt(a): a for a in rated() if a.get("undecided") and not a["judged"]} if how and judge else {}:
        with appending(out / "verdicts.jsonl") as file:
            replies = tqdm(ask_judge(judge, name, [*asked]), "judge", len(asked), unit="answer")
            for (text, a), reply in zip(asked.items(), replies):
                if isinstance(reply, str) and (said := re.search(r"\b(yes|no)\b", final_text(reply), re.I)):
                    same = known[text] = said[0].lower() == "yes"
                    file.write(json.dumps({"judge": judge, "model": name, "prompt": text, "reply": reply, "same": same}) + "\n")
                    file.flush()
                else:
                    failed += 1
                    tqdm.write(f"judge: no verdict on {a['bench']} {a['id']}: {str(reply)[:200]!r}")
    return rated(), failed


# ---------------------------------------------------------------------------------------------------------------- figures

def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share, both ends in [0, 1]; (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z = right / n, Z * Z / n
    middle, half = p + z / 2, math.sqrt(z * p * (1 - p) + z * z / 4)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def grouped(answers: list[dict], key: str) -> dict[str, list[dict]]:
    found = {}
    for a in answers:
        found.setdefault(a[key], []).append(a)
    return found


def by_view(answers: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{bench: {view: answers}}, benchmarks in the table's order, full before crop."""
    place = lambda a: ((*BENCHES, a["bench"]).index(a["bench"]), a["bench"], a["view"] == "crop")
    return {bench: grouped(rows, "view") for bench, rows in grouped(sorted(answers, key=place), "bench").items()}


def headline(bench: str, answers: list[dict], key: str = "correct") -> tuple[float | None, tuple[float, float]]:
    """Accuracy as the paper computes it, and its 95% interval: of all rows (Wilson), or the mean over groups (bootstrap)."""
    n, right = len(answers), sum(a[key] for a in answers)
    if not n or "macro" not in BENCHES.get(bench, {}):
        return right / n if n else None, wilson(right, n)
    groups = [[a[key] for a in group] for _, group in sorted(grouped(answers, "group").items())]
    n, shares = [len(group) for group in groups], [sum(group) / len(group) for group in groups]
    draws = np.random.default_rng(0).binomial(n, shares, (10_000, len(n))) / n
    return sum(shares) / len(shares), tuple(np.percentile(draws.mean(1), [2.5, 97.5]).tolist())


def figures(bench: str, answers: list[dict]) -> dict:
    """What result.json says of one benchmark and view, from its scored answers."""
    rows = [a for a in answers if a["state"] != "error"]
    n, count, mean = len(rows), lambda key: sum(a[key] for a in rows), lambda key: count(key) / max(1, len(rows))
    accuracy, interval = headline(bench, rows)
    found = {"n": n, "right": count("correct"), "accuracy": accuracy, "interval": interval,
             "official": headline(bench, rows, "official")[0], "unparsed": sum(a["state"] == "unparsed" for a in rows),
             "judged": count("judged"), "truncated": count("truncated"), "errors": len(answers) - n, "seconds": mean("seconds"),
             "tokens": mean("tokens"), "groups": {}}
    for group, part in grouped([a for a in rows if a["group"]], "group").items():
        right = sum(a["correct"] for a in part)
        found["groups"][group] = {"n": len(part), "right": right, "accuracy": right / len(part)}
    if n and all("calls" in a for a in rows):
        found |= {"calls": mean("calls"), "malformed": count("malformed")}
    if n and all(a["kind"] == "yn" for a in rows):
        said, gold = (sum(a[key] == "yes" for a in rows) for key in ("said", "answer"))
        hit = sum(a["correct"] for a in rows if a["answer"] == "yes")
        found |= {"f1": 2 * hit / max(1, said + gold), "precision": hit / max(1, said), "recall": hit / max(1, gold),
                  "yes_rate": said / n}
    if pairs := [pair for name, pair in grouped(rows, "pair").items() if name is not None and len(pair) == 2]:
        found["pair_accuracy"] = sum(all(a["correct"] for a in pair) for pair in pairs) / len(pairs)
    return found


def paired(first: list[dict], second: list[dict]) -> dict:
    """second - first, scored answers each, over the rows that both hold without an error and with the same question and right
    answer: accuracies, difference with 95% interval (Agresti and Min 2005), rows gained and lost, exact two-sided McNemar p."""
    first, second = ({(a["id"], a["prompt"], a["answer"]): a["correct"] for a in side if a["state"] != "error"}
                     for side in (first, second))
    both = [row for row in first if row in second]
    flips = [row for row in both if first[row] != second[row]]
    n, a, b, gained = len(both), sum(first[row] for row in both), sum(second[row] for row in both), sum(map(second.get, flips))
    middle, lost = (b - a) / (n + 2), len(flips) - gained
    half = Z * math.sqrt(((len(flips) + 1) / (n + 2) - middle ** 2) / (n + 2))
    return {"n": n, "first": a / max(1, n), "second": b / max(1, n), "difference": (b - a) / max(1, n),
            "interval": [max(-1.0, middle - half), min(1.0, middle + half)], "gained": gained, "lost": lost,
            "p": min(1.0, 2 * sum(math.comb(len(flips), i) for i in range(min(gained, lost) + 1)) / 2 ** len(flips)),
            "flipped": [name for name, *_ in flips]}


def summarise(out: Path, *, scorer: str = "ours", judge: str | None = None, judge_model: str | None = None) -> dict:
    """Score what `out` holds, write out/result.json, and return it: {"benches": {bench: {view: figures, "gap": of the rows
    answered in both views}}, "averages" over the paper's groups where they are complete, "judge_failures", and the settings}."""
    how = {"scorer": scorer, "judge": judge, "judge_model": judge_model}
    answers, failed = scored(out, how)
    if not answers:
        raise FileNotFoundError(f"{out} holds no answers-*.jsonl. Expected the --out folder of an evaluation.")
    benches = {}
    for bench, views in by_view(answers).items():
        found = benches[bench] = {view: figures(bench, rows) for view, rows in views.items()}
        if len(views) == 2 and (both := paired(views["full"], views["crop"]))["n"]:
            found["gap"] = {"n": both["n"], "full": both["first"], "crop": both["second"], "gap": both["difference"],
                            "interval": both["interval"]}
    full = lambda name: benches.get(name, {}).get("full", {}).get("accuracy")
    shares = {group: [*map(full, GROUPS[group])] for group in ("fine", "holdout")}
    result = {"settings": read_json(out / "args.json", []), **how, "judge_failures": failed, "benches": benches,
              "averages": {group: sum(found) / len(found) for group, found in shares.items() if None not in found}}
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    span = f" [{100 * interval[0]:5.1f}, {100 * interval[1]:5.1f}]" if interval else ""
    return ("    -" if share is None else f"{100 * share:5.1f}") + span


def table(result: dict) -> str:
    """A result as text: a line a benchmark and view, its groups and gap below; then the averages."""
    lines = [f"{'accuracy [95% interval], %':<48}rows official unparsed judged cut off errors s/row tokens  published 4B, 9B"]
    head = lambda name, share, interval, rows: f"{name:<24} {percent(share, interval)} {rows:>10}"
    for name, views in result["benches"].items():
        for view, f in views.items():
            if view == "gap":
                lines.append(head("  gap: crop - full", f["gap"], f["interval"], f["n"]))
                continue
            known = BENCHES.get(name, {}) if view == "full" else {}
            rows = f"{f['n']}/{known['rows']}" if known.get("rows", f["n"]) != f["n"] else f["n"]
            told = known.get("published", [])
            lines.append(f"{head(f'{name}, {view}', f['accuracy'], f['interval'], rows)}   {percent(f['official'])}"
                         f"{f['unparsed']:9}{f['judged']:7}{f['truncated']:8}{f['errors']:7}{f['seconds']:6.2f}{f['tokens']:7.0f}"
                         + "".join(f"  {base:.1f} > {ours:.1f}" for base, ours in zip(told[::2], told[1::2])))
            for group, g in f["groups"].items() if len(f["groups"]) > 1 else ():
                lines.append(head(f"  {group[:22]}", g["accuracy"], wilson(g["right"], g["n"]), g["n"]))
            keys = [key for key in ("f1", "precision", "recall", "yes_rate", "pair_accuracy") if key in f]
            lines += ["  " + ", ".join(f"{key.replace('_', ' ')} {100 * f[key]:.1f}" for key in keys)] * bool(keys)
            lines += [f"  {f['calls']:.2f} zoom-in calls a row, {f['malformed']} malformed"] if "calls" in f else []
    lines += [f"{f'average of {group} ({len(GROUPS[group])})':<25}{percent(mean)}" for group, mean in result["averages"].items()]
    if failures := result["judge_failures"]:
        lines.append(f"{failures} calls of the judge failed: scored as wrong")
    return "\n".join(lines)


def compare(a: Path, b: Path) -> tuple[str, dict]:
    """Two results folders, row by row: text, and {bench: {view: `paired` figures}}."""
    first, second = (by_view(scored(folder)[0]) for folder in (a, b))
    found, lines = {}, [f"{f'% right: {a.name}, {b.name}':<40}  difference [95%]          rows gained  lost McNemar p"]
    for name in filter(second.get, first):
        found[name] = {view: paired(rows, second[name][view]) for view, rows in first[name].items() if view in second[name]}
        for view, f in found[name].items():
            lines.append(f"{f'{name}, {view}':<26} {percent(f['first'])} {percent(f['second'])}   "
                         f"{percent(f['difference'], f['interval'])}{f['n']:9}{f['gained']:7}{f['lost']:6}{f['p']:10.2g}")
        gaps = [paired(side[name]["full"], side[name]["crop"]) for side in (first, second) if len(side[name]) == 2]
        if len(gaps) == 2 and (before := gaps[0]["difference"]) > 0:            # not flattered by a falling crop
            lines.append(f"  gap {100 * before:.1f} -> {100 * gaps[1]['difference']:.1f}; the full view's gain closed "
                         f"{(gaps[1]['first'] - gaps[0]['first']) / before:.0%} of it")
    if not any(f["n"] for views in found.values() for f in views.values()):
        raise ValueError(f"{a} and {b} have no answers to the same rows. Expected two --out folders of the same benchmark.")
    return "\n".join(lines), found


# ----------------------------------------------------------------------------------------------------------------- report

def pictures(out: Path, paths: list[str | None], notes: list[str], budget: int = 14_000_000) -> dict[str, str]:
    """{path relative to `out`: data URI}: PNGs below 8 kB, else JPEGs whose size falls with their number, so that the page
    stays below 20 MB. What cannot be read, or does not fit, is missing and said in `notes`."""
    paths, uris, left = list(dict.fromkeys(filter(None, paths))), {}, 0
    side = min(640, max(100, int(math.sqrt(budget / 0.4 / max(1, len(paths))))))

    def shrink(path: str) -> str | Exception:
        try:
            image = synth.load_image(os.path.normpath(out / path))
        except (OSError, ValueError) as error:
            return error
        image.thumbnail((side, side))
        for kind in ("png", "jpeg"):
            file = io.BytesIO()
            image.save(file, kind, quality=80)
            if file.tell() < 8000:                                              # a small PNG keeps drawn pixels sharp
                break
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    with ThreadPoolExecutor(4) as pool:
        for path, uri in zip(paths, tqdm(pool.map(shrink, paths), "report", len(paths), unit="image", disable=len(paths) < 200)):
            if isinstance(uri, Exception):
                notes.append(str(uri))
            elif len(uri) > budget:
                left += 1
            else:
                uris[path], budget = uri, budget - len(uri)
    notes += [f"{left} image(s) are not shown, to keep this page small"] * (left > 0)
    return uris


def gallery(out: Path, folders: dict[str, Path], most: int = 2000) -> dict:
    """The samples of one or two results folders, at most so many: those first that flipped, then those not right everywhere.
    Each: bench, id, group, question, gold, image, crop (paths relative to `out`), answers [label, view, text, state]."""
    samples = {}
    for label, folder in folders.items():
        for a in scored(folder)[0]:
            places = {view: a[view] and os.path.relpath(folder / a[view], out) for view in ("image", "crop")}
            sample = samples.setdefault((a["bench"], a["id"]), places | {key: a[key] for key in ("bench", "id", "group")} | {
                "question": a["prompt"], "gold": a["answer"], "answers": []})
            text = a.get("output", a.get("error"))
            text = text[:1500] + f" … {len(text) - 1500} more characters" * (len(text) > 1500)
            sample["answers"].append([label, a["view"], text, a["state"]])

    def dull(sample: dict) -> tuple[bool, bool]:
        right = {(view, state == "right") for _, view, _, state in sample["answers"] if state != "error"}
        return len(right) == len({view for view, _ in right}), all(state == "right" for *_, state in sample["answers"])
    return {"total": len(samples), "samples": sorted(samples.values(), key=dull)[:most]}


def trajectory(folder: Path) -> list[dict]:
    """What one checkpoint's folder step-N adds to the gap over a run (paper, Figure 5): a row a benchmark."""
    return [{"step": int(folder.name[5:]), "bench": name, **{view: f[view]["accuracy"] for view in ("full", "crop") if view in f},
             "gap": f.get("gap", {}).get("gap")} for name, f in read_json(folder / "result.json", []).get("benches", {}).items()]


def report(out: Path) -> Path:
    """Write out/report.html, one self-contained page, from what a training run, an evaluation, a comparison or an evaluation of a
    run's checkpoints has left; returns its path. The page says what is missing. Raises FileNotFoundError for any other folder."""
    out, notes = Path(out), []
    training, steps = (out / "log.jsonl").is_file(), [path.parent for path in sorted(out.glob("step-*/result.json"))]
    compared = read_json(out / "compare.json", []).get("folders", [])
    folders = {path: Path(path) for path in compared} or {folder.name: folder for folder in steps[:1] + steps[-1:]}
    if training or not folders:
        folders = {when: out / f"eval-{when}" for when in ("before", "after")} if training else {out.resolve().name: out}
    results = {label: result for label, folder in folders.items() if (result := read_json(folder / "result.json", notes))}
    if not training and not results:
        found = sorted(p.name for p in out.iterdir())[:8] if out.is_dir() else "no such folder"
        raise FileNotFoundError(f"{out} has no log.jsonl or result.json (found: {found}). Expected the --out folder of a run.")
    log, rollouts = (read_jsonl(out / name, notes) if training else [] for name in ("log.jsonl", "rollouts.jsonl"))
    log = {row["step"]: row for row in log}                                     # of a step written twice, the later line
    rollouts = [row for row in rollouts if row["step"] in (rollouts[0]["step"], rollouts[-1]["step"])]
    shown = gallery(out, {label: folders[label] for label in results})
    tables = {label: table(result) for label, result in results.items()}
    data = {"name": out.resolve().name, "training": training, "results": results, "tables": tables, "gallery": shown,
            "log": [log[step] for step in sorted(log)], "rollouts": rollouts, "trajectory": sum(map(trajectory, steps), []),
            "args": read_json(out / "args.json", notes) if training else {}, "seconds": read_json(out / "seconds.json", []),
            "published": {name: bench["published"] for name, bench in BENCHES.items()}, "notes": notes,
            "images": pictures(out, [row.get(view) for row in rollouts + shown["samples"] for view in ("image", "crop")], notes)}
    # Model output reaches the page as JSON without "<", so that no response can end the script it stands in, and is
    # put on screen with textContent only.
    text = re.sub("[<>&]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(data))
    values = {"name": html.escape(data["name"]), "data": text, "table": html.escape("\n\n".join(tables.values()))}
    write(out / "report.html", re.sub(r"{{(\w+)}}", lambda m: values[m[1]], TEMPLATE.read_text(encoding="utf-8")))
    return out / "report.html"


# ------------------------------------------------------------------------------------------------------------------- main

def evaluate(path: str, benches: dict[str, list[dict]], out: Path, *, device: str, max_new_tokens: int, rounds: int = 0,
             rank: int = 0, world: int = 1, **how) -> None:
    """Load the model at `path` and append its answers to `out`, this rank's share of them; returns when all ranks are done.
    how: views and batch, as in `answer`. Raises ValueError when `out` holds answers of other weights or under other settings."""
    import torch
    from model import load
    model, processor = load(path, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    some = b"".join(weight.detach().flatten()[:64].float().cpu().numpy().tobytes() for weight in model.parameters())
    now = {"weights": hashlib.sha256(some).hexdigest()[:16], "max_new_tokens": max_new_tokens, "zoom": rounds}
    then = read_json(out / "args.json", []) or now
    if differ := [f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in now if then.get(key) != now[key]]:
        raise ValueError(f"{out} holds answers of {then['model']}; {path} differs in {', '.join(differ)}. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write(out / "args.json", json.dumps({"model": path} | now, indent=1) + "\n")
    for name, rows in benches.items():
        answer(model, processor, name, rows, out, max_new_tokens=max_new_tokens, rounds=rounds, rank=rank, world=world, **how)
    if world > 1:
        torch.distributed.barrier()


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    # instead of answering
    p.add_argument("--report", type=Path, metavar="DIR", help="only (re)build the page of a training run or an evaluation")
    p.add_argument("--rescore", type=Path, metavar="DIR", help="only score the answers in DIR again")
    p.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="only compare two results; --out keeps it as a page")
    # what to answer
    p.add_argument("--bench", default="", help=f"separated by commas: {', '.join(BENCHES)}, toy; fine, holdout, all; "
                   "a .jsonl in the neutral form (see README), a folder of triplets with answers")
    p.add_argument("--data-root", type=Path, default=Path("data/benchmarks"), help="where benchmarks lie, or are downloaded to")
    p.add_argument("--model", help="checkpoint directory or hub id")
    p.add_argument("--checkpoints", type=Path, metavar="RUN", help="instead: a run's base and checkpoints, into OUT/step-N")
    p.add_argument("--out", type=Path, help="results folder")
    p.add_argument("--view", choices=["full", "crop", "both"], default="full", help="both: the gap, where there are crops")
    p.add_argument("--limit", type=int, help="only so many rows of each benchmark, evenly spread")
    p.add_argument("--max-new-tokens", type=int, default=4096, help="longer ones are cut off and counted (ours: theirs 32,768)")
    p.add_argument("--zoom", type=int, default=0, metavar="N", help="a zoom-in tool may be called N times a question")
    p.add_argument("--batch", type=int, default=16, help="rows at once, halved when memory runs out; changes no result")
    p.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one, a GPU a rank)")
    # how to score
    p.add_argument("--scorer", choices=["ours", "official"], default="ours", help="official: first capital letter, as published")
    p.add_argument("--judge", help="for what stays unparsed: a HF model, or an OpenAI-like API's URL (key: OPENAI_API_KEY)")
    p.add_argument("--judge-model", help="the model's name at the judge's URL")
    args = p.parse_args(argv)
    args.names = list(dict.fromkeys(name for given in args.bench.split(",") if given for name in GROUPS.get(given, [given])))
    if unknown := [name for name in args.names if name not in BENCHES and name not in GROUPS["toy"] and not Path(name).exists()]:
        p.error(f"--bench {', '.join(unknown)} is unknown. Benchmarks: {', '.join(BENCHES)}, toy; groups: fine, holdout, all; or "
                "the path of a .jsonl or of a folder of triplets.")
    answers = args.names and args.out and bool(args.model) != bool(args.checkpoints)
    if not (args.report or args.rescore or args.compare or answers):
        p.error("expected --bench, --out, and --model or --checkpoints; or one of --report, --rescore, --compare.")
    if min(args.batch, args.max_new_tokens, args.zoom + 1, 1 if args.limit is None else args.limit) < 1:
        p.error("--batch, --max-new-tokens and --limit must be at least 1, and --zoom at least 0.")
    return args


def run(args: argparse.Namespace, scoring: dict, rank: int, world: int) -> None:
    """Answer and score every benchmark with the model, or with every checkpoint of a run; print tables, write the page."""
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device == "cpu":                                                         # on a GPU its warning of slow kernels matters
        transformers.utils.logging.set_verbosity_error()
    if rank > 0:
        torch.distributed.barrier()                                             # rank 0 downloads and converts first
    benches = {}
    for name in args.names:
        own = Path(name).name.removesuffix(".jsonl")
        if own in benches or own != name and own in (*BENCHES, *GROUPS["toy"]):
            raise ValueError(f"--bench {name}: another benchmark is called {own!r} too. Rename the file or folder.")
        rows = benchmark(name, args.data_root)
        n = min(args.limit or len(rows), len(rows))
        benches[own] = [rows[i * len(rows) // n] for i in range(n)]
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    without = [name for name, rows in benches.items() if args.view != "full" and not any(row["crop"] for row in rows)]
    if without and (args.view == "crop" or len(without) == len(benches)):
        raise ValueError(f"--view {args.view}: {', '.join(without)} has no crops. zoombench, toy and folders of triplets have.")
    if without and rank == 0:
        print(f"no crops, full view only: {', '.join(without)}")
    models = {args.out: args.model}
    if args.checkpoints:
        if not (args.checkpoints / "args.json").is_file():
            raise FileNotFoundError(f"--checkpoints {args.checkpoints}: no args.json there. Expected the --out folder of a "
                                    "train.py run.")
        models = {args.out / "step-000000": json.loads((args.checkpoints / "args.json").read_text())["model"]}
        models |= {args.out / f"step-{path.name[11:]}": str(path) for path in sorted(args.checkpoints.glob("checkpoint-??????"))}
    for out, path in models.items():
        evaluate(path, benches, out, views=["full", "crop"] if args.view == "both" else [args.view], batch=args.batch,
                 max_new_tokens=args.max_new_tokens, rounds=args.zoom, device=device, rank=rank, world=world)
        if rank == 0:
            print(f"{path}\n{table(summarise(out, **scoring))}")
    if rank == 0:
        for row in sum(map(trajectory, models), []) if args.checkpoints else []:
            shares = "  ".join(f"{key} {percent(row.get(key))}" for key in ("full", "crop", "gap"))
            print(f"step {row['step']:6} {row['bench']:<20} {shares}")
        print(report(args.out))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    scoring = {"scorer": args.scorer, "judge": args.judge, "judge_model": args.judge_model}
    Image.MAX_IMAGE_PIXELS = None                                               # benchmark files are trusted, and some are huge
    if args.compare:
        text, found = compare(*args.compare)
        print(text)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            write(args.out / "compare.json", json.dumps({"folders": [*map(str, args.compare)], "benches": found}, indent=1))
    elif args.rescore:
        for folder in sorted(args.rescore.glob("step-*")) or [args.rescore]:    # of --checkpoints: each one's
            print(f"{folder}\n{table(summarise(folder, **scoring))}")
    if args.report or args.rescore or args.compare:
        if page := args.report or args.rescore or args.out:
            print(report(page))
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        import torch.distributed as dist
        dist.init_process_group("gloo", timeout=timedelta(days=2))
    try:
        run(args, scoring, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
