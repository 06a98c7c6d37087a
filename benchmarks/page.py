"""The page: one self-contained report.html of a training run, an evaluation, or a comparison."""

import base64
import html
import io
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from benchmarks.figures import scored, table
from benchmarks.sources import BENCHES
from storage.files import read_json, read_jsonl, write
from storage.images import load_image

TEMPLATE = Path(__file__).with_name("page.html")


def pictures(
    out: Path, paths: list[str | None], notes: list[str], budget: int = 14_000_000
) -> dict[str, str]:
    """{path relative to `out`: data URI}: PNGs below 8 kB, else JPEGs whose size falls with their number, so that the page
    stays below 20 MB. What cannot be read, or does not fit, is missing and said in `notes`."""
    paths, uris, left = list(dict.fromkeys(filter(None, paths))), {}, 0
    side = min(640, max(100, int(math.sqrt(budget / 0.4 / max(1, len(paths))))))

    def shrink(path: str) -> str | Exception:
        try:
            image = load_image(os.path.normpath(out / path))
        except (OSError, ValueError) as error:
            return error
        image.thumbnail((side, side))
        for kind in ("png", "jpeg"):
            file = io.BytesIO()
            image.save(file, kind, quality=80)
            if file.tell() < 8000:  # a small PNG keeps drawn pixels sharp
                break
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

    with ThreadPoolExecutor(4) as pool:
        for path, uri in zip(
            paths,
            tqdm(
                pool.map(shrink, paths),
                "report",
                len(paths),
                unit="image",
                disable=len(paths) < 200,
            ),
        ):
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
            places = {
                view: a[view] and os.path.relpath(folder / a[view], out)
                for view in ("image", "crop")
            }
            sample = samples.setdefault(
                (a["bench"], a["id"]),
                places
                | {key: a[key] for key in ("bench", "id", "group")}
                | {"question": a["prompt"], "gold": a["answer"], "answers": []},
            )
            text = a.get("output", a.get("error"))
            text = text[:1500] + f" … {len(text) - 1500} more characters" * (len(text) > 1500)
            sample["answers"].append([label, a["view"], text, a["state"]])

    def dull(sample: dict) -> tuple[bool, bool]:
        right = {
            (view, state == "right") for _, view, _, state in sample["answers"] if state != "error"
        }
        return len(right) == len({view for view, _ in right}), all(
            state == "right" for *_, state in sample["answers"]
        )

    return {"total": len(samples), "samples": sorted(samples.values(), key=dull)[:most]}


def trajectory(folder: Path) -> list[dict]:
    """What one checkpoint's folder step-N adds to the gap over a run (paper, Figure 5): a row a benchmark."""
    return [
        {
            "step": int(folder.name[5:]),
            "bench": name,
            **{view: f[view]["accuracy"] for view in ("full", "crop") if view in f},
            "gap": f.get("gap", {}).get("gap"),
        }
        for name, f in read_json(folder / "result.json", []).get("benches", {}).items()
    ]


def report(out: Path) -> Path:
    """Write out/report.html, one self-contained page, from what a training run, an evaluation, a comparison or an evaluation of a
    run's checkpoints has left; returns its path. The page says what is missing. Raises FileNotFoundError for any other folder."""
    out, notes = Path(out), []
    training, steps = (
        (out / "log.jsonl").is_file(),
        [path.parent for path in sorted(out.glob("step-*/result.json"))],
    )
    compared, ends = (
        read_json(out / "compare.json", []),
        {folder.name: folder for folder in steps[:1] + steps[-1:]},
    )
    folders = {path: Path(path) for path in compared.get("folders", [])} or ends
    if training or not folders:
        folders = (
            {when: out / f"eval-{when}" for when in ("before", "after")}
            if training
            else {out.resolve().name: out}
        )
    results = {
        label: result
        for label, folder in folders.items()
        if (result := read_json(folder / "result.json", notes))
    }
    if not training and not results:
        found = sorted(p.name for p in out.iterdir())[:8] if out.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{out} has no log.jsonl or result.json ({found}; {notes}). Expected the --out of a run."
        )
    log, rollouts = (
        read_jsonl(out / name, notes) if training else []
        for name in ("log.jsonl", "rollouts.jsonl")
    )
    log = {row["step"]: row for row in log}  # of a step written twice, the later line
    rollouts = [
        row for row in rollouts if row["step"] in (rollouts[0]["step"], rollouts[-1]["step"])
    ]
    shown = gallery(out, {label: folders[label] for label in results})
    tables = {"difference": compared["text"]} if "text" in compared else {}
    tables |= {label: table(result) for label, result in results.items()}
    data = {
        "name": out.resolve().name,
        "training": training,
        "results": results,
        "tables": tables,
        "gallery": shown,
        "log": [log[step] for step in sorted(log)],
        "rollouts": rollouts,
        "trajectory": sum(map(trajectory, steps), []),
        "args": read_json(out / "args.json", notes) if training else {},
        "seconds": read_json(out / "seconds.json", []),
        "published": {name: bench["published"] for name, bench in BENCHES.items()},
        "notes": notes,
        "images": pictures(
            out,
            [row.get(view) for row in rollouts + shown["samples"] for view in ("image", "crop")],
            notes,
        ),
    }
    # Model output reaches the page as JSON without "<", so that no response can end the script it stands in, and is
    # put on screen with textContent only.
    text = json.dumps(data).replace("<", "\\u003c")
    values = {
        "name": html.escape(data["name"]),
        "data": text,
        "table": html.escape("\n\n".join(tables.values())),
    }
    write(
        out / "report.html",
        re.sub(r"{{(\w+)}}", lambda m: values[m[1]], TEMPLATE.read_text(encoding="utf-8")),
    )
    return out / "report.html"
