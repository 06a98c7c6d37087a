"""Evaluation: how well a model answers from the full image and from the crop, the gap between the two, and the report.

    python evaluate.py --bench toy --model runs/toy/checkpoint-000300 --data runs/toy/eval --out runs/toy-eval
    python evaluate.py --report runs/toy                  # (re)build runs/toy/report.html from what the run has written

The gap, accuracy(crop) - accuracy(full image), is what Vision-OPD turns into a training signal (paper, section 1). It is
never shown alone: a falling crop accuracy narrows it too. `--report` needs only the standard library and Pillow.
"""
import argparse
import base64
import html
import io
import json
import math
import os
import re
from pathlib import Path

from tqdm import tqdm

import synth

BENCHES = ("toy",)
TOY_TOKENS = 16                                          # an answer of the toy world has 7, its end included
TEMPLATE = Path(__file__).with_name("report.html")


# ---------------------------------------------------------------------------------------------------------------- answers

def answer(model, processor, rows: list[dict], view: str, *, max_new_tokens: int, batch: int) -> list[dict]:
    """Greedy answers to `rows` (as synth.read_triplets gives them) from one view, "full" or "crop", in their order.

    Each {"id", "view", "answer": text, "truncated": bool}, truncated where max_new_tokens cut it off. A row whose image
    cannot be read is {"id", "view", "error": text} instead: counted by the caller, never scored as an answer.
    """
    from model import encode, to_device                                          # here: the report needs no torch
    from rollout import sample
    device, answers = next(model.parameters()).device, []
    with tqdm(total=len(rows), desc=f"answers, {view}", unit="row", leave=False) as bar:
        for start in range(0, len(rows), batch):
            part, images = rows[start:start + batch], {}
            for n, row in enumerate(part):
                done = {"id": row["id"], "view": view}
                try:
                    images[n] = synth.load_image(row["image" if view == "full" else "crop"])
                except (OSError, ValueError) as error:
                    done["error"] = str(error)
                answers.append(done)
            if images:
                prompt = to_device(encode(processor, list(images.values()), [part[n]["question"] for n in images]), device)
                rollout = sample(model, processor, prompt, 1, max_new_tokens=max_new_tokens, temperature=0)
                for n, ids, mask, ended in zip(images, rollout.ids, rollout.mask, rollout.ended.tolist()):
                    text = processor.tokenizer.decode(ids[mask], skip_special_tokens=True)
                    answers[start + n] |= {"answer": text, "truncated": not ended}
            bar.update(len(part))
    return answers


def accuracy(answers: list[dict], gold: dict[str, str], leave_out: set[str] = frozenset()) -> tuple[int, int]:
    """(right, scored) by exact match after whitespace normalisation; sets "correct" in every answer. Rows with an error
    and those whose id is in `leave_out` are not scored."""
    for a in answers:
        if "error" not in a:
            a["correct"] = a["answer"].split() == gold[a["id"]].split()
    scored = [a["correct"] for a in answers if "error" not in a and a["id"] not in leave_out]
    return sum(scored), len(scored)


def evaluate_toy(model, processor, rows: list[dict], batch: int = 100) -> tuple[dict, list[dict]]:
    """Accuracies in the toy world: (result, answers). rows: triplets with a gold answer and extra["size"] small / large.

    result: "full" and "crop" are shares of the n small targets, the same rows in both views (a row with an error in either
    is left out of both); "large" of the n_large large ones, in full view; None where nothing could be scored.
    "counts": right answers of the three, rows left out (errors), and answers cut off (truncated).
    """
    sizes = {size: [row for row in rows if row["extra"].get("size") == size] for size in ("small", "large")}
    unlabeled = sum(row["answer"] is None for row in rows)
    if len(sizes["small"]) + len(sizes["large"]) < len(rows) or unlabeled:
        raise ValueError(f"Of {len(rows)} rows, {len(sizes['small'])} are small and {len(sizes['large'])} large targets, and "
                         f"{unlabeled} have no answer. The toy benchmark needs an answer and extra_info.size \"small\" or "
                         "\"large\" in every row: point --data at a folder that `python synth.py --toy` has drawn.")
    gold = {row["id"]: row["answer"] for row in rows}
    views = {name: answer(model, processor, sizes[size], view, max_new_tokens=TOY_TOKENS, batch=batch)
             for name, size, view in (("full", "small", "full"), ("crop", "small", "crop"), ("large", "large", "full"))}
    answers = [a for view in views.values() for a in view]
    broken = {a["id"] for a in answers if "error" in a}
    right, scored = {}, {}
    for name, view in views.items():
        right[name], scored[name] = accuracy(view, gold, broken)
    return {**{name: right[name] / scored[name] if scored[name] else None for name in views},
            "n": scored["full"], "n_large": scored["large"],
            "counts": {**right, "errors": len(broken), "truncated": sum(a.get("truncated", False) for a in answers)}}, answers


# ------------------------------------------------------------------------------------------------------------------ table

def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share, both ends in [0, 1]; (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def gap_closed(result: dict) -> float | None:
    """What the full view gained, as a share of the gap before. Not flattered by a falling crop; None when there was no gap."""
    before, after = (result.get(key, {}) for key in ("before", "after"))
    if None in (before.get("full"), before.get("crop"), after.get("full")) or before["crop"] <= before["full"]:
        return None
    return (after["full"] - before["full"]) / (before["crop"] - before["full"])


def table(result: dict) -> str:
    """Text table of {"before": .., "after": ..} (either may be missing) or of one result of evaluate_toy."""
    columns = {key: result[key] for key in ("before", "after") if result.get(key)} or {"": result}

    def share(r: dict, name: str, n: str) -> str:
        low, high = wilson(r["counts"][name], r[n])
        return f"{r[name]:6.1%} [{low:6.1%}, {high:6.1%}] {r['counts'][name]}/{r[n]}" if r[n] else "   no rows"

    lines = [("accuracy [95% interval]", columns)] + [(label, [cell(r) for r in columns.values()]) for label, cell in (
        ("full image, small target", lambda r: share(r, "full", "n")),
        ("crop, the same targets", lambda r: share(r, "crop", "n")),
        ("full image, large target", lambda r: share(r, "large", "n_large")),
        ("gap: crop - full, points", lambda r: f"{100 * (r['crop'] - r['full']):6.1f}" if r["n"] else "   no rows"),
        ("unreadable, left out", lambda r: f"{r['counts']['errors']:6d}"),
        ("cut off, scored as is", lambda r: f"{r['counts']['truncated']:6d}"))]
    if (closed := gap_closed(result)) is not None:
        lines.append(("gap closed by full", [f"{closed:6.1%} of what it was before"]))
    return "\n".join(f"{label:<26}{''.join(f'{cell:<34}' for cell in cells)}".rstrip() for label, cells in lines)


# ----------------------------------------------------------------------------------------------------------------- report

def read_json(path: Path, notes: list[str]) -> dict:
    """A json file's dict; {}, and a note, when it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} is unreadable: {error}" if path.exists() else f"{path.name} is not in this folder")
        return {}


def read_jsonl(path: Path, notes: list[str]) -> list[dict]:
    """Rows of a jsonl file; NaN and infinities become None. A missing file, and lines left out because a run was killed
    while writing them, are said in `notes`."""
    if not path.is_file():
        notes.append(f"{path.name} is not in this folder")
        return []
    rows, torn = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows += [json.loads(line, parse_constant=lambda name: None)] if line.strip() else []
        except json.JSONDecodeError:
            torn += 1
    if torn:
        notes.append(f"{path.name}: {torn} unreadable line{'s' * (torn > 1)} left out")
    return rows


def picture(path: Path | None, most: int, notes: list[str]) -> str | None:
    """An image as a data URI: a small one as it is (PNG), others as a JPEG of at most `most` px. None, and a note, when it
    cannot be read."""
    if path is None:
        return None
    try:
        image = synth.load_image(path)
    except (OSError, ValueError) as error:
        notes.append(str(error))
        return None
    file, small = io.BytesIO(), max(image.size) <= 160
    image.thumbnail((most, most))
    image.save(file, **{"format": "PNG"} if small else {"format": "JPEG", "quality": 82})
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(log: list[dict], most: int = 400) -> dict[str, list[float | None]]:
    """Column per number in the log: one value a step, or the mean of neighbouring steps (and the last one's number)
    when there are over `most`."""
    width, columns = max(1, math.ceil(len(log) / most)), {}
    for key in sorted({key for row in log for key, value in row.items() if isinstance(value, (int, float))}):
        values = [[row[key] for row in log[i:i + width] if row.get(key) is not None] for i in range(0, len(log), width)]
        columns[key] = [None if not v else v[-1] if key.startswith("step") else float(f"{sum(v) / len(v):.5g}")
                        for v in values]
    return columns


def gallery(out: Path, notes: list[str], most: int = 9) -> dict:
    """Held-out samples by what became of them: the first ones of each kind in file order, some of every kind that occurs."""
    kinds = {(False, True): "wrong to right", (True, False): "right to wrong", (False, False): "wrong to wrong",
             (True, True): "right to right"}                                     # (correct before, correct after)
    said = {(when, a["view"], a["id"]): a for when in ("before", "after")
            for a in read_jsonl(out / f"answers-{when}.jsonl", notes) if "correct" in a}
    became = {i: kinds[a["correct"], said["after", "full", i]["correct"]] for (when, view, i), a in said.items()
              if (when, view) == ("before", "full") and ("after", "full", i) in said}
    groups = {kind: [i for i in became if became[i] == kind] for kind in kinds.values()}
    shown = [i for kind, share in zip(groups, (5, 2, 2, 0)) for i in groups[kind][:share]]
    shown += [i for group in groups.values() for i in group if i not in shown][:most - len(shown)]
    rows, samples = {}, []
    try:
        rows = {row["id"]: row for row in synth.read_triplets(out / "eval")} if shown else {}
    except (OSError, ValueError) as error:
        notes.append(f"no images, questions and right answers of the held-out samples: {error}")
    for i in sorted(shown, key=lambda i: list(groups).index(became[i])):
        row = rows.get(i, {})
        samples.append({
            "id": i, "kind": became[i], "question": row.get("question"), "gold": row.get("answer"),
            "image": picture(row.get("image"), 640, notes), "crop": picture(row.get("crop"), 320, notes),
            "answers": [[f"{when}, {view}", a["answer"], a["correct"]] for when, view in
                        (("before", "crop"), ("before", "full"), ("after", "full")) if (a := said.get((when, view, i)))]})
    return {"totals": {kind: len(group) for kind, group in groups.items()}, "samples": samples}


def rollouts(out: Path, notes: list[str], each: int = 4, tokens: int = 400) -> list[dict]:
    """The first and the last saved step, `each` rollouts of both, and the mean divergence of all that were saved there.
    Divergences are shares of log 2 from here on."""
    saved, sides = read_jsonl(out / "rollouts.jsonl", notes), []
    steps = [row["step"] for row in saved]
    for step in sorted({*steps[:1], *steps[-1:]}):
        rows, cards = [row for row in saved if row["step"] == step], []
        for row in rows[:each]:
            image, crop = (out / row[key] if (out / row[key]).is_file() else Path(row[key]) for key in ("image", "crop"))
            shares = [None if d is None else round(d / math.log(2), 4) for d in row["divergence"]]
            cards.append({"question": row["question"], "gold": row.get("answer"), "image": picture(image, 640, notes),
                          "crop": picture(crop, 320, notes), "tokens": list(zip(row["tokens"], shares))[:tokens],
                          "left_out": max(0, len(row["tokens"]) - tokens)})
        every = [d for row in rows for d in row["divergence"] if d is not None]
        sides.append({"step": step, "mean": sum(every) / len(every) / math.log(2) if every else None, "cards": cards})
    return sides


def report(out: Path) -> Path:
    """Write out/report.html, one self-contained page, from what a training run has left in `out`; returns its path.

    Reads log.jsonl and, where they are, args.json, result.json, answers-before.jsonl, answers-after.jsonl, rollouts.jsonl and
    eval/; the page says what is missing. Raises FileNotFoundError when there is no log.
    """
    out, notes = Path(out), []
    if not (out / "log.jsonl").is_file():
        found = sorted(p.name for p in out.iterdir())[:8] if out.is_dir() else "no such folder"
        raise FileNotFoundError(f"{out} holds no log.jsonl (found: {found}). Expected the --out folder of a train.py run.")
    result, log = read_json(out / "result.json", notes), read_jsonl(out / "log.jsonl", notes)
    log = [row for _, row in sorted({row["step"]: row for row in log}.items())]  # of a step written twice, the later line
    accuracies = {when: {name: [r["counts"][name], r[n], *wilson(r["counts"][name], r[n])] for name, n in
                         (("full", "n"), ("crop", "n"), ("large", "n_large"))} | {"counts": r["counts"]}
                  for when in ("before", "after") if (r := result.get(when))}
    data = {"name": out.resolve().name, "args": read_json(out / "args.json", notes), "accuracies": accuracies,
            "gap_closed": gap_closed(result), "seconds": result.get("seconds", {}), "curves": curves(log),
            "spent": sum(row.get(key) or 0 for row in log for key in ("gen_s", "teach_s", "learn_s", "other_s")),
            "gallery": gallery(out, notes), "rollouts": rollouts(out, notes), "notes": notes}
    # Model output reaches the page as JSON without "<", so that no response can end the script it stands in, and is
    # put on screen with textContent only.
    data = re.sub("[<>&]", lambda m: f"\\u{ord(m[0]):04x}", json.dumps(data))
    values = {"name": html.escape(out.resolve().name), "data": data,
              "table": html.escape(table(result) if accuracies else "This run measured no accuracies.")}
    page = re.sub(r"{{(\w+)}}", lambda m: values[m[1]], TEMPLATE.read_text(encoding="utf-8"))
    target, unfinished = out / "report.html", out / "report.html.part"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, target)
    return target


# ------------------------------------------------------------------------------------------------------------------- main

def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--report", type=Path, metavar="RUN", help="only (re)build RUN/report.html from a training run's folder")
    p.add_argument("--bench", default="toy", help=f"what to evaluate on: {', '.join(BENCHES)}")
    p.add_argument("--model", help="checkpoint directory or hub id")
    p.add_argument("--data", type=Path, help="folder of triplets to answer")
    p.add_argument("--out", type=Path, help="where answers-BENCH.jsonl and result-BENCH.json go; nothing is written without it")
    p.add_argument("--batch", type=int, default=100, help="questions answered at once: changes speed, never results")
    p.add_argument("--device", help="where the model runs, such as cpu or cuda:1 (default: cuda where there is one)")
    args = p.parse_args(argv)
    if args.report:
        print(report(args.report))
        return
    if args.bench not in BENCHES:
        p.error(f"--bench {args.bench} is unknown. Benchmarks: {', '.join(BENCHES)}.")
    if not args.model or not args.data:
        p.error("--model and --data are needed (or --report RUN to rebuild a training run's page).")
    import torch
    from model import load
    rows, device = synth.read_triplets(args.data), args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    result, answers = evaluate_toy(*load(args.model, device=device, dtype=dtype), rows, batch=args.batch)
    print(table(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"answers-{args.bench}.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
        (args.out / f"result-{args.bench}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"evaluate.py: {error}") from error
