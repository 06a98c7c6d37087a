"""The page: one self-contained report.html of a training run, an evaluation, or a comparison."""

import base64
import html
import io
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from benchmarks.figures import scored_answers, table
from benchmarks.sources import BENCHES
from storage.files import read_json, read_jsonl, write
from storage.images import load_image

TEMPLATE = Path(__file__).with_name("page.html")
ANSWER_LENGTH = 1500  # characters that are shown
IMAGE_BYTES = 14_000_000  # of all images: the page stays below 20 MB


def write_page(out: Path) -> Path:
    """Write out/report.html from what a training run, an evaluation, a comparison or an evaluation
    of a run's checkpoints has left; returns its path. The page says what is missing. Raises
    FileNotFoundError for any other folder."""
    out, notes = Path(out), []
    training = (out / "log.jsonl").is_file()
    steps = [path.parent for path in sorted(out.glob("step-*/result.json"))]
    compared = read_json(out / "compare.json", [])
    folders = folders_shown(out, training, steps, compared)
    results = {}
    for label, folder in folders.items():
        result = read_json(folder / "result.json", notes)
        if result:
            results[label] = result
    if not training and not results:
        found = sorted(p.name for p in out.iterdir())[:8] if out.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{out} has no log.jsonl or result.json ({found}; {notes}). Expected the --out of a "
            "run."
        )
    shown = gallery(out, {label: folders[label] for label in results})
    tables = {"difference": compared["text"]} if "text" in compared else {}
    tables |= {label: table(result) for label, result in results.items()}
    data = {
        "name": out.resolve().name,
        "training": training,
        "results": results,
        "tables": tables,
        "gallery": shown,
        "log": [],
        "rollouts": [],
        "args": {},
        "trajectory": [row for folder in steps for row in trajectory(folder)],
        "seconds": read_json(out / "seconds.json", []),
        "published": {name: bench["published"] for name, bench in BENCHES.items()},
        "second_hand": [name for name, bench in BENCHES.items() if "second_hand" in bench],
        "notes": notes,
    }
    if training:
        data["args"] = read_json(out / "args.json", notes)
        log = {row["step"]: row for row in read_jsonl(out / "log.jsonl", notes)}
        data["log"] = [log[step] for step in sorted(log)]  # of a step written twice, the later one
        data["rollouts"] = first_and_last(read_jsonl(out / "rollouts.jsonl", notes))
    samples = data["rollouts"] + shown["samples"]
    paths = [row.get(view) for row in samples for view in ("image", "crop")]
    data["images"] = pictures(out, paths, notes)
    write(out / "report.html", filled(data))
    return out / "report.html"


def folders_shown(out: Path, training: bool, steps: list[Path], compared: dict) -> dict[str, Path]:
    """{label: results folder} of a page: before and after, two sides, the first and last
    checkpoint, or the folder itself."""
    if training:
        return {when: out / f"eval-{when}" for when in ("before", "after")}
    if compared.get("folders"):
        return {path: Path(path) for path in compared["folders"]}
    if steps:
        return {folder.name: folder for folder in (steps[0], steps[-1])}
    return {out.resolve().name: out}


def first_and_last(rollouts: list[dict]) -> list[dict]:
    ends = {row["step"] for row in rollouts[:1] + rollouts[-1:]}
    return [row for row in rollouts if row["step"] in ends]


def filled(data: dict) -> str:
    """The template with its {{fields}} filled in.

    Model output reaches the page as JSON without "<", so that no response can end the script it
    stands in, and is put on screen with textContent only.
    """
    values = {
        "name": html.escape(data["name"]),
        "data": json.dumps(data).replace("<", "\\u003c"),
        "table": html.escape("\n\n".join(data["tables"].values())),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda name: values[name[1]], template)


def trajectory(folder: Path) -> list[dict]:
    """What one checkpoint's folder step-N adds to the gap over a run (paper, Figure 5): a row a
    benchmark."""
    rows = []
    for name, views in read_json(folder / "result.json", []).get("benches", {}).items():
        row = {"step": int(folder.name.removeprefix("step-")), "bench": name, "gap": None}
        for view in ("full", "crop"):
            if view in views:
                row[view] = views[view]["accuracy"]
        if "gap" in views:
            row["gap"] = views["gap"]["gap"]
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------- gallery


@dataclass
class Sample:
    """A question with what one or two models answered, as the page's script reads it."""

    bench: str
    id: str
    group: str | None
    question: str
    gold: str
    image: str | None  # paths relative to the page
    crop: str | None
    answers: list[list[str]] = field(default_factory=list)  # [label, view, text, state]

    def dull(self) -> tuple[bool, bool]:
        """Sorts samples that flipped first, then those not right everywhere."""
        right = {(view, state == "right") for _, view, _, state in self.answers if state != "error"}
        flipped = len(right) > len({view for view, _ in right})
        return not flipped, all(state == "right" for *_, state in self.answers)


def gallery(out: Path, folders: dict[str, Path], most: int = 2000) -> dict:
    """The samples of one or two results folders, the interesting ones first, at most so many."""
    samples = {}
    for label, folder in folders.items():
        for answer in scored_answers(folder):
            place = (answer.bench, answer.id)
            if place not in samples:
                views = [answer.image, answer.crop]
                views = [view and os.path.relpath(folder / view, out) for view in views]
                asked = (answer.group, answer.prompt, answer.answer)
                samples[place] = Sample(*place, *asked, *views)
            text = answer.output if answer.error is None else answer.error
            if len(text) > ANSWER_LENGTH:
                more = len(text) - ANSWER_LENGTH
                text = f"{text[:ANSWER_LENGTH]} … {more} more characters"
            samples[place].answers.append([label, answer.view, text, answer.state])
    shown = sorted(samples.values(), key=Sample.dull)[:most]
    return {"total": len(samples), "samples": list(map(vars, shown))}


def pictures(out: Path, paths: list[str | None], notes: list[str]) -> dict[str, str]:
    """{path relative to `out`: data URI}. What cannot be read, or does not fit, is missing and said
    in `notes`."""
    paths, uris, left, budget = list(dict.fromkeys(filter(None, paths))), {}, 0, IMAGE_BYTES
    side = min(640, max(100, int(math.sqrt(budget / 0.4 / max(1, len(paths))))))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda path: data_uri(os.path.normpath(out / path), side), paths)
        hidden = len(paths) < 200
        found = tqdm(found, "report", len(paths), unit="image", disable=hidden)
        for path, uri in zip(paths, found, strict=True):
            if isinstance(uri, Exception):
                notes.append(str(uri))
            elif len(uri) > budget:
                left += 1
            else:
                uris[path] = uri
                budget -= len(uri)
    if left:
        notes.append(f"{left} image(s) are not shown, to keep this page small")
    return uris


def data_uri(path: str, side: int) -> str | Exception:
    """A picture of at most `side` px: a PNG below 8 kB, which keeps drawn pixels sharp, else a
    JPEG."""
    try:
        image = load_image(path)
    except (OSError, ValueError) as error:
        return error
    image.thumbnail((side, side))
    for kind in ("png", "jpeg"):
        file = io.BytesIO()
        image.save(file, kind, quality=80)
        if file.tell() < 8000:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
