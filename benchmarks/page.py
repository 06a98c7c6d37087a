"""The page: one self-contained report.html of a training run, an evaluation, or a comparison."""

import base64
import html
import io
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from benchmarks.figures import scored_answers, scorer_of, table
from benchmarks.rows import crops_of
from benchmarks.sources import BENCHES, most_pixels
from storage.files import numbered, read_json, read_jsonl, write
from storage.images import load_image

TEMPLATE = Path(__file__).with_name("page.html")
MOST_SAMPLES = 2000
ANSWER_LENGTH = 1500  # characters that are shown
IMAGE_BYTES = 14_000_000  # of all images: the page stays below 20 MB
IMAGE_PIXELS = 35_000_000  # about so many fit


def write_page(out: Path) -> Path:
    """Write out/report.html from what a training run, an evaluation, a comparison or an evaluation
    of a run's checkpoints has left; returns its path. The page says what is missing. Raises
    FileNotFoundError for any other folder."""
    name, notes = out.resolve().name, []
    training = (out / "log.jsonl").is_file()
    steps = [step for step in numbered(out, "step") if (step / "result.json").is_file()]
    compared = read_json(out / "compare.json", [])
    folders, tables = {name: out}, {}
    if training:
        folders = {"before": out / "eval-before", "after": out / "eval-after"}
    elif compared:
        folders = {path: Path(path) for path in compared["folders"]}
        tables["difference"] = compared.get("text", "")  # not there in older ones
    elif steps:
        folders = {step.name: step for step in (steps[0], steps[-1])}
    results, samples = {}, defaultdict(list)
    for label, folder in folders.items():
        result = read_json(folder / "result.json", notes)
        if result:
            results[label] = result
            tables[label] = table(result)
            for row in answers_shown(folder, out):
                samples[row["bench"], row["id"]].append(row | {"label": label})
    if not training and not results:
        raise FileNotFoundError(
            f"{out} holds no log.jsonl and no result.json that can be read ({'; '.join(notes)}). "
            "Expected the --out of a run."
        )
    logs = notes if training else []  # only of a run it is told that they are missing
    rollouts = read_jsonl(out / "rollouts.jsonl", logs)
    ends = {row["step"] for row in rollouts[:1] + rollouts[-1:]}
    rollouts = [row | {"crops": crops_of(row)} for row in rollouts if row["step"] in ends]
    shown = sorted(samples.values(), key=dull)[:MOST_SAMPLES]
    data = {
        "name": name,
        "training": training,
        "args": read_json(out / "args.json", logs),
        "log": read_jsonl(out / "log.jsonl", logs),
        "rollouts": rollouts,
        "results": results,
        "tables": tables,
        "samples": shown,
        "total": len(samples),
        "trajectory": [row for step in steps for row in trajectory(step)],
        "seconds": read_json(out / "seconds.json", []),
        "benchmarks": BENCHES,
        "notes": notes,
    }
    Image.MAX_IMAGE_PIXELS = most_pixels(bench for bench, _ in samples)
    data["images"] = pictures(out, [*rollouts, *(sample[0] for sample in shown)], notes)
    write(out / "report.html", filled(data))
    return out / "report.html"


def filled(data: dict) -> str:
    """The template with its {{fields}} filled in.

    Model output reaches the page as JSON without "<", so that no response can end the script it
    stands in, and is put on screen with textContent only.
    """
    tables = html.escape("\n\n".join(data["tables"].values()))
    text = json.dumps(data).replace("<", "\\u003c")
    before, between, after = re.split("{{tables}}|{{data}}", TEMPLATE.read_text(encoding="utf-8"))
    return before + tables + between + text + after


def trajectory(folder: Path) -> Iterator[dict]:
    """What one checkpoint's folder step-N adds to the gap over a run (paper, Figure 5): a row a
    benchmark."""
    step = int(folder.name.removeprefix("step-"))
    for bench, views in read_json(folder / "result.json", []).get("benches", {}).items():
        shares = {view: f.get("gap", f.get("accuracy")) for view, f in views.items()}
        yield {"step": step, "bench": bench} | shares


# ----------------------------------------------------------------------------------------- gallery


def answers_shown(folder: Path, out: Path) -> Iterator[dict]:
    """The scored answers in a results folder, as the page's script reads them: image and crops
    relative to the page, the error as the output where there is one."""
    for answer in scored_answers(folder, scorer_of(folder)):
        row = vars(answer)
        row["image"] = os.path.relpath(folder / row["image"], out)
        row["crops"] = [os.path.relpath(folder / crop, out) for crop in row["crops"]]
        text = answer.error or answer.output
        if len(text) > ANSWER_LENGTH:
            text = f"{text[:ANSWER_LENGTH]} … {len(text) - ANSWER_LENGTH} more characters"
        yield row | {"output": text}


def dull(sample) -> tuple:
    """Sorts samples first whose answers differ in what they are worth, then those not right."""
    states = {row["state"] for row in sample}
    return len(states) == 1, states == {"right"}


def pictures(out: Path, rows: list[dict], notes: list[str]) -> dict[str, str]:
    """{path relative to `out`: data URI} of the rows' images and crops. What cannot be read, or
    does not fit, is missing and said in `notes`."""
    paths = dict.fromkeys(path for row in rows for path in (row["image"], *row["crops"]))
    side = min(640, math.isqrt(IMAGE_PIXELS // max(1, len(paths))))
    uris, left, budget = {}, 0, IMAGE_BYTES
    with ThreadPoolExecutor(4) as pool:
        made = {path: pool.submit(data_uri, out / path, side) for path in paths}
        for path, future in tqdm(made.items(), "report", unit="image", delay=2):
            try:
                uri = future.result()
            except (OSError, ValueError) as error:
                notes.append(str(error))
                continue
            if len(uri) > budget:
                left += 1
            else:
                uris[path] = uri
                budget -= len(uri)
    if left:
        notes.append(f"{left} image(s) are not shown, to keep this page small")
    return uris


def data_uri(path: Path, side: int) -> str:
    """A picture of at most `side` px: a PNG below 8 kB, which keeps drawn pixels sharp, else a
    JPEG."""
    image = load_image(os.path.normpath(path))
    image.thumbnail((side, side))
    for kind in ("png", "jpeg"):
        file = io.BytesIO()
        image.save(file, kind, quality=80)
        if file.tell() < 8000:
            break
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
