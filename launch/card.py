"""What a run leaves for others to read: a model card in each of its checkpoints, and the page."""

import re
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from yaml import YAMLError

from benchmarks.figures import compare, percent
from benchmarks.page import write_page
from launch.version import versions
from methods import METHODS
from storage.files import numbered, read_json, write

MARK = "<!-- Written by train.py. Without this line the file is yours, and is left alone. -->"
TOLD = "teacher objective divergence top_k ema_rate prompts group max_new_tokens lr seed"
TEXT = """\
---
{metadata}
---
{mark}

# {name}: {base} after {steps} steps of {method}

Trained with the code of [Vision-OPD (arXiv 2605.18740)](https://arxiv.org/abs/2605.18740): teacher
and student are one model, and only the teacher is shown the crop that a question is about.

* `{method}`: {what_it_does}
* Base model: {base}. Data: {data}.
* Settings: {settings}.
* {versions}.

## Before and after

{figures}

## Use

The format is the base model's: whatever loads that one loads this one. It was trained to answer
without thinking, and its chat template does not think unless a caller asks for it
(`"chat_template_kwargs": {{"enable_thinking": true}}`), so a server needs no flag:

```
vllm serve {name}
```
"""
NO_FIGURES = "This checkpoint was not evaluated in its run's folder."


def write_reports(out: Path) -> Path:
    """Write the card of every checkpoint of the run in `out`, but none that is someone's own, and
    the page; returns the page."""
    for checkpoint in numbered(out, "checkpoint"):
        path = checkpoint / "README.md"
        there = MARK
        if path.exists():
            there = path.read_text(encoding="utf-8", errors="replace")
        if MARK not in there:
            continue
        told = card(out, checkpoint)
        if told != there:
            write(path, told)
    return write_page(out)


def card(out: Path, checkpoint: Path) -> str:
    """A checkpoint's README.md, with the hub's metadata at its top. Names folders of this machine
    by their last part only."""
    run = read_json(out / "args.json", [])
    base, data, method = run["model"], run["data"], run["method"]
    metadata = ModelCardData(
        base_model=hub_id(base),
        datasets=hub_id(data),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["vision-opd", "arxiv:2605.18740", method],
        **base_license(base),
    )
    settings = [f"`--{key.replace('_', '-')} {run[key]}`" for key in TOLD.split() if run.get(key)]
    return TEXT.format(
        metadata=metadata.to_yaml(),
        mark=MARK,
        name=checkpoint.name,
        base=hub_id(base) or Path(base).name,
        steps=int(checkpoint.name[-6:]),
        method=method,
        what_it_does=" ".join((METHODS[method].__doc__ or "").split()),
        data=hub_id(data) or f"a folder, {Path(data).name}",
        settings=", ".join(settings),
        versions=versions(),
        figures="\n".join(figures(out, checkpoint)) or NO_FIGURES,
    )


def hub_id(name: str) -> str | None:
    """A name that is a repository's, not a folder's."""
    is_one = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_one else None


def base_license(base: str) -> dict:
    """license, license_name, license_link, as far as the base model's own card is at hand, can be
    read and tells them."""
    path = Path(base) / "README.md"
    if hub_id(base):
        path = try_to_load_from_cache(base, "README.md")
    try:
        told = metadata_load(path) or {}
    except (OSError, TypeError, ValueError, YAMLError):
        return {}
    return {key: told[key] for key in told if key.startswith("license")}


def figures(out: Path, checkpoint: Path) -> list[str]:
    """A table of out/eval-before beside out/eval-after, where that is of this checkpoint."""
    folders = [out / "eval-before", out / "eval-after"]
    before, after = (read_json(folder / "result.json", []) for folder in folders)
    judged = after.get("settings", {}).get("model", "")
    if not before or Path(judged).name != checkpoint.name:
        return []
    lines = [
        "| % right [95% interval] | rows | before | after | difference |",
        "|---|---|---|---|---|",
    ]
    for bench, views in compare(*folders)[1].items():
        for view, both in views.items():
            told = [f"{bench}, {view}", str(both["n"])]
            for result in (before, after):
                found = result["benches"][bench][view]
                told.append(percent(found["accuracy"], found["interval"]))
            told.append(percent(both["difference"], both["interval"]))
            lines.append(f"| {' | '.join(told)} |")
    return lines
