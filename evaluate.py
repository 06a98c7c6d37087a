"""Evaluation: answers to the paper's benchmarks, with or without a zoom-in tool, and a page to look at. Where the rows come from:
benchmarks.py; what an answer says: scoring.py; accuracies, intervals, gap and comparison: figures.py.

    python evaluate.py --bench vstar --model Qwen/Qwen3.5-4B --out runs/eval-4b             # or --bench fine,holdout,my.jsonl
    torchrun --nproc-per-node 8 evaluate.py --bench all --model runs/x/checkpoint-000065 --out runs/eval-x
    python evaluate.py --bench zoombench --view both --model DIR --out DIR                  # full, crop and the gap
    python evaluate.py --bench toy --view both --checkpoints runs/toy --out runs/toy-gap    # the gap over a run (Figure 5)
    python evaluate.py --bench vstar --zoom 3 --model DIR --out DIR                         # the cost of looking twice (Appendix A)
    python evaluate.py --compare runs/eval-4b runs/eval-x                                   # paired differences, what flipped
    python evaluate.py --rescore runs/eval-4b --judge URL_OR_MODEL                          # saved answers: no model, no images
    python evaluate.py --report runs/toy                                                    # (re)build a folder's report.html

--out holds args.json, answers-BENCH-RANK.jsonl, result.json, a judge's verdicts.jsonl, report.html.
Killed at any moment, the same command goes on, on any number of ranks. Greedy, non-thinking, images at native resolution.
"""
import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from benchmarks import BENCHES, GROUPS, benchmark
from figures import appending, compare, percent, read_json, read_jsonl, saved, scored, summarise, table
from scoring import score
from triplets import Help, load_image, write

TEMPLATE = Path(__file__).with_name("report.html")


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
                images = [load_image(os.path.normpath(path)) for path in paths]
                how = model, processor, images, [a["prompt"] for a in part], max_new_tokens
                replies = zoomed(*how, rounds) if rounds else rollout.answers(*how)
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
            share = states["right"] / max(1, states.total() - states["error"])
            bar.set_postfix_str(f"{share:.1%} right, {states['error']} errors")


# ------------------------------------------------------------------------------------------------------- the zoom-in tool

TOOLS = """# Tools
You may call a function to assist with the question. Its signature:
{"name": "image_zoom_in_tool", "description": "Crop a region of the first image and return it enlarged.", "parameters": {"bbox_2d":
"[x1, y1, x2, y2] of the region, in thousandths of the image's width and height", "label": "what is looked for (optional)"}}
To call it, answer <tool_call>{"name": "image_zoom_in_tool", "arguments": {"bbox_2d": [...], "label": "..."}}</tool_call>"""


def zoomed(model, processor, images: list, texts: list[str], max_new_tokens: int, rounds: int) -> list[dict]:
    """As `rollout.answers`, but the model may call a zoom-in tool (paper, Appendix A) at most `rounds` times a row: the region
    comes back as a further image, or an error that it can react to. "output" is the last turn, "tokens" counts all of them, and
    the row also has "calls" and "malformed" (calls). Every turn computes its whole prompt anew."""
    import rollout
    views, done = [[image] for image in images], [{"tokens": 0, "calls": 0, "malformed": 0} for _ in texts]
    chats = [[{"role": "system", "content": TOOLS},
              {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    active = range(len(texts))
    for left in range(rounds, -1, -1):
        replies = rollout.answers(model, processor, [views[i] for i in active], [chats[i] for i in active], max_new_tokens)
        for i, reply in zip(active, replies):
            done[i] |= reply | {"tokens": done[i]["tokens"] + reply["tokens"]}
        active = [i for i in active if left and "<tool_call>" in done[i]["output"]]
        if not active:
            break
        for i in active:
            said = done[i]["output"].replace("<|", "< |")                           # spelled-out vision tokens
            content = [{"type": "text", "text": "This was the last call: answer now."}] * (left == 1)
            done[i]["calls"] += 1
            try:
                views[i].append(region(re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", said, re.S)[-1], images[i]))
                content = [{"type": "image"}, *content]
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                done[i]["malformed"] += 1
                wrong = f"Error: {error!r}. Expected a call as described, 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000."
                content = [{"type": "text", "text": wrong.replace("<|", "< |")}, *content]
            content = [{"type": "text", "text": "<tool_response>"}, *content, {"type": "text", "text": "</tool_response>"}]
            chats[i] += [{"role": "assistant", "content": said}, {"role": "user", "content": content}]
    return done


def region(call: str, image: Image.Image) -> Image.Image:
    """The crop that a tool call asks for, enlarged to at least 448 px along its longer side. Raises ValueError, LookupError,
    TypeError or RecursionError for anything but a well-formed call."""
    call = json.loads(call)
    box = x1, y1, x2, y2 = call["arguments"]["bbox_2d"]
    if call["name"] != "image_zoom_in_tool" or not all(type(v) in (int, float) for v in box) or not (
            0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000):
        raise ValueError(f"{str(call['name'])[:80]} of {str(box)[:80]}")
    w, h = image.size
    crop = image.crop((math.floor(x1 * w / 1000), math.floor(y1 * h / 1000), math.ceil(x2 * w / 1000), math.ceil(y2 * h / 1000)))
    if max(crop.size) > 100 * min(crop.size):                                         # image processors refuse 200
        raise ValueError(f"the region has {crop.width} x {crop.height} pixels, which is too thin")
    scale = max(1, 448 / max(crop.size))
    return crop.resize((math.ceil(crop.width * scale), math.ceil(crop.height * scale)), Image.Resampling.BICUBIC)


# ----------------------------------------------------------------------------------------------------------------- report

def pictures(out: Path, paths: list[str | None], notes: list[str], budget: int = 14_000_000) -> dict[str, str]:
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
    compared, ends = read_json(out / "compare.json", []), {folder.name: folder for folder in steps[:1] + steps[-1:]}
    folders = {path: Path(path) for path in compared.get("folders", [])} or ends
    if training or not folders:
        folders = {when: out / f"eval-{when}" for when in ("before", "after")} if training else {out.resolve().name: out}
    results = {label: result for label, folder in folders.items() if (result := read_json(folder / "result.json", notes))}
    if not training and not results:
        found = sorted(p.name for p in out.iterdir())[:8] if out.is_dir() else "no such folder"
        raise FileNotFoundError(f"{out} has no log.jsonl or result.json ({found}; {notes}). Expected the --out of a run.")
    log, rollouts = (read_jsonl(out / name, notes) if training else [] for name in ("log.jsonl", "rollouts.jsonl"))
    log = {row["step"]: row for row in log}                                     # of a step written twice, the later line
    rollouts = [row for row in rollouts if row["step"] in (rollouts[0]["step"], rollouts[-1]["step"])]
    shown = gallery(out, {label: folders[label] for label in results})
    tables = {"difference": compared["text"]} if "text" in compared else {}
    tables |= {label: table(result) for label, result in results.items()}
    data = {"name": out.resolve().name, "training": training, "results": results, "tables": tables, "gallery": shown,
            "log": [log[step] for step in sorted(log)], "rollouts": rollouts, "trajectory": sum(map(trajectory, steps), []),
            "args": read_json(out / "args.json", notes) if training else {}, "seconds": read_json(out / "seconds.json", []),
            "published": {name: bench["published"] for name, bench in BENCHES.items()}, "notes": notes,
            "images": pictures(out, [row.get(view) for row in rollouts + shown["samples"] for view in ("image", "crop")], notes)}
    # Model output reaches the page as JSON without "<", so that no response can end the script it stands in, and is
    # put on screen with textContent only.
    text = json.dumps(data).replace("<", "\\u003c")
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
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    # instead of answering
    only = p.add_mutually_exclusive_group()
    only.add_argument("--report", type=Path, metavar="DIR", help="only (re)build the page of a training run or an evaluation")
    only.add_argument("--rescore", type=Path, metavar="DIR", help="only score the answers in DIR again")
    only.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="only compare two results; with --out also a page")
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
    given = filter(None, map(str.strip, args.bench.split(",")))
    args.names = list(dict.fromkeys(name for each in given for name in GROUPS.get(each, [each])))
    if unknown := [name for name in args.names if name not in BENCHES and name not in GROUPS["toy"] and not Path(name).exists()]:
        p.error(f"--bench {', '.join(unknown)} is unknown. Benchmarks: {', '.join(BENCHES)}, toy; groups: fine, holdout, all; or "
                "the path of a .jsonl or of a folder of triplets.")
    shows = args.report or args.rescore or args.compare
    if not (shows or args.names and args.out and bool(args.model) != bool(args.checkpoints)):
        p.error("expected --bench, --out, and --model or --checkpoints; or one of --report, --rescore, --compare.")
    if shows and (args.bench or args.model or args.checkpoints):
        p.error("--report, --rescore and --compare are about saved answers. Leave --bench, --model and --checkpoints out.")
    if args.judge_model and not args.judge:
        p.error("--judge-model names a model at the URL of --judge. Give that too, or leave it out.")
    if (args.report or args.compare) and (args.judge or args.scorer == "official"):
        p.error("--report and --compare show answers as they were scored. Give --scorer and --judge to --rescore, before.")
    if args.compare and args.out in args.compare:
        p.error(f"--out {args.out} is one of the two that are compared. Choose another folder for their comparison.")
    if min(args.batch, args.max_new_tokens, args.zoom + 1, 1 if args.limit is None else args.limit) < 1:
        p.error("--batch, --max-new-tokens and --limit must be at least 1, and --zoom at least 0.")
    return args


def run(args: argparse.Namespace, scoring: dict, rank: int, world: int) -> None:
    """Answer and score every benchmark with the model, or with every checkpoint of a run; print tables, write the page."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}         # else kernels of a GPU are taken
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
    if without and len(without) == len(benches):
        raise ValueError(f"--view {args.view}: {', '.join(without)} has no crops. zoombench, toy and folders of triplets have.")
    if without and rank == 0:
        print(f"no crops, {'left out' if args.view == 'crop' else 'full view only'}: {', '.join(without)}")
    benches = {name: rows for name, rows in benches.items() if args.view != "crop" or name not in without}
    models = {args.out: args.model}
    if args.checkpoints:
        base, kept = read_json(args.checkpoints / "args.json", []).get("model"), sorted(args.checkpoints.glob("checkpoint-??????"))
        if not base or not kept:
            raise FileNotFoundError(f"--checkpoints {args.checkpoints}: no args.json with a model, or no checkpoints. Expected "
                                    "the --out folder of a train.py run.")
        models = {args.out / "step-000000": base} | {args.out / f"step-{path.name[11:]}": str(path) for path in kept}
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
            told = {"folders": [*map(os.path.abspath, args.compare)], "text": text, "benches": found}
            write(args.out / "compare.json", json.dumps(told, indent=1))
    elif args.rescore:
        of_run = {path.parent for path in args.rescore.glob("[es]*-*/answers-*.jsonl")}       # step-N, or eval-WHEN of training
        for folder in sorted(of_run) or [args.rescore]:
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
