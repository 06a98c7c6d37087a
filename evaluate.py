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
import hashlib
import json
import os
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from benchmarks.figures import compare, percent, saved, summarise, table
from benchmarks.page import report, trajectory
from benchmarks.scoring import score
from benchmarks.sources import BENCHES, GROUPS, benchmark
from benchmarks.zoom import zoomed
from launch.flags import Help
from storage.files import appending, read_json, write
from storage.images import load_image
from toy.scenes import held_out

# ---------------------------------------------------------------------------------------------------------------- answers


def answer(
    model,
    processor,
    name: str,
    rows: list[dict],
    out: Path,
    *,
    views: list[str],
    max_new_tokens: int,
    batch: int,
    rounds: int = 0,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Append this rank's answers to benchmark `name` that `out` does not hold yet to out/answers-NAME-RANK.jsonl, a line each.

    A line is the row with bench, view, seconds, and output, tokens, truncated; or with error when its image cannot be read, or
    it cannot be encoded or does not fit in memory alone: counted, never scored, and tried again by the next run.
    """
    from torch import OutOfMemoryError

    import rollout

    near = lambda row: (
        row | {key: row[key] and os.path.relpath(row[key], out) for key in ("image", "crop")}
    )
    asked = [
        near(row) | {"bench": name, "view": view}
        for row in rows[rank::world]
        for view in views
        if view == "full" or row["crop"]
    ]
    done = {(a["id"], a["view"]): a for a in saved(out) if a["bench"] == name and "error" not in a}
    same = lambda a: all(
        done.get((a["id"], a["view"]), a)[key] == a[key] for key in ("prompt", "answer")
    )
    if other := sorted({a["id"] for a in asked if not same(a)}):
        raise ValueError(
            f"{out} holds {name} with other questions or answers under the ids {other[:3]}. Choose another --out."
        )
    todo, states, size = [a for a in asked if (a["id"], a["view"]) not in done], Counter(), batch
    with (
        appending(out / f"answers-{name}-{rank}.jsonl") as file,
        tqdm(
            total=len(asked),
            initial=len(asked) - len(todo),
            desc=name,
            unit="row",
            disable=rank > 0,
        ) as bar,
    ):
        while todo:
            start, part = time.perf_counter(), todo[:size]
            try:
                paths = [out / a["image" if a["view"] == "full" else "crop"] for a in part]
                images = [load_image(os.path.normpath(path)) for path in paths]
                reply = lambda images, texts: [
                    vars(r)
                    for r in rollout.answers(model, processor, images, texts, max_new_tokens)
                ]
                prompts = [a["prompt"] for a in part]
                replies = (
                    zoomed(reply, images, prompts, rounds) if rounds else reply(images, prompts)
                )
            except (OutOfMemoryError, OSError, ValueError) as error:
                if len(part) > 1:  # too many, or a bad one among them: halve
                    size = len(part) // 2
                    if isinstance(error, OutOfMemoryError):
                        batch = size
                        tqdm.write(
                            f"{name}: out of memory with {len(part)} rows at once, going on with {batch}"
                        )
                    continue
                replies = [{"error": f"{type(error).__name__} with this row alone: {error}"}]
            seconds = (time.perf_counter() - start) / len(part)
            part = [a | reply | {"seconds": seconds} for a, reply in zip(part, replies)]
            file.writelines(json.dumps(a) + "\n" for a in part)
            file.flush()
            todo, size = todo[len(part) :], min(batch, 2 * size)
            states.update(score(a)["state"] for a in part)
            bar.update(len(part))
            share = states["right"] / max(1, states.total() - states["error"])
            bar.set_postfix_str(f"{share:.1%} right, {states['error']} errors")


# ------------------------------------------------------------------------------------------------------------------- main


def evaluate(
    path: str,
    benches: dict[str, list[dict]],
    out: Path,
    *,
    device: str,
    max_new_tokens: int,
    rounds: int = 0,
    rank: int = 0,
    world: int = 1,
    **how,
) -> None:
    """Load the model at `path` and append its answers to `out`, this rank's share of them; returns when all ranks are done.
    how: views and batch, as in `answer`. Raises ValueError when `out` holds answers of other weights or under other settings."""
    import torch

    from model import load

    model, processor = load(
        path, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16
    )
    some = b"".join(
        weight.detach().flatten()[:64].float().cpu().numpy().tobytes()
        for weight in model.parameters()
    )
    now = {
        "weights": hashlib.sha256(some).hexdigest()[:16],
        "max_new_tokens": max_new_tokens,
        "zoom": rounds,
    }
    then = read_json(out / "args.json", []) or now
    if differ := [
        f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in now if then.get(key) != now[key]
    ]:
        raise ValueError(
            f"{out} holds answers of {then['model']}; {path} differs in {', '.join(differ)}. Choose another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write(out / "args.json", json.dumps({"model": path} | now, indent=1) + "\n")
    for name, rows in benches.items():
        answer(
            model,
            processor,
            name,
            rows,
            out,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            rank=rank,
            world=world,
            **how,
        )
    if world > 1:
        torch.distributed.barrier()


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    # instead of answering
    only = p.add_mutually_exclusive_group()
    only.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="only (re)build the page of a training run or an evaluation",
    )
    only.add_argument(
        "--rescore", type=Path, metavar="DIR", help="only score the answers in DIR again"
    )
    only.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="only compare two results; with --out also a page",
    )
    # what to answer
    p.add_argument(
        "--bench",
        default="",
        help=f"separated by commas: {', '.join(BENCHES)}, toy; fine, holdout, all; "
        "a .jsonl in the neutral form (see README), a folder of triplets with answers",
    )
    p.add_argument(
        "--data-root",
        type=Path,
        default=Path("data/benchmarks"),
        help="where benchmarks lie, or are downloaded to",
    )
    p.add_argument("--model", help="checkpoint directory or hub id")
    p.add_argument(
        "--checkpoints",
        type=Path,
        metavar="RUN",
        help="instead: a run's base and checkpoints, into OUT/step-N",
    )
    p.add_argument("--out", type=Path, help="results folder")
    p.add_argument(
        "--view",
        choices=["full", "crop", "both"],
        default="full",
        help="both: the gap, where there are crops",
    )
    p.add_argument("--limit", type=int, help="only so many rows of each benchmark, evenly spread")
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=4096,
        help="longer ones are cut off and counted (ours: theirs 32,768)",
    )
    p.add_argument(
        "--zoom",
        type=int,
        default=0,
        metavar="N",
        help="a zoom-in tool may be called N times a question",
    )
    p.add_argument(
        "--batch",
        type=int,
        default=16,
        help="rows at once, halved when memory runs out; changes no result",
    )
    p.add_argument(
        "--device", help="such as cpu or cuda:1 (default: cuda where there is one, a GPU a rank)"
    )
    # how to score
    p.add_argument(
        "--scorer",
        choices=["ours", "official"],
        default="ours",
        help="official: first capital letter, as published",
    )
    p.add_argument(
        "--judge",
        help="for what stays unparsed: a HF model, or an OpenAI-like API's URL (key: OPENAI_API_KEY)",
    )
    p.add_argument("--judge-model", help="the model's name at the judge's URL")
    args = p.parse_args(argv)
    given = filter(None, map(str.strip, args.bench.split(",")))
    args.names = list(dict.fromkeys(name for each in given for name in GROUPS.get(each, [each])))
    if unknown := [
        name
        for name in args.names
        if name not in BENCHES and name not in GROUPS["toy"] and not Path(name).exists()
    ]:
        p.error(
            f"--bench {', '.join(unknown)} is unknown. Benchmarks: {', '.join(BENCHES)}, toy; groups: fine, holdout, all; or "
            "the path of a .jsonl or of a folder of triplets."
        )
    shows = args.report or args.rescore or args.compare
    if not (shows or args.names and args.out and bool(args.model) != bool(args.checkpoints)):
        p.error(
            "expected --bench, --out, and --model or --checkpoints; or one of --report, --rescore, --compare."
        )
    if shows and (args.bench or args.model or args.checkpoints):
        p.error(
            "--report, --rescore and --compare are about saved answers. Leave --bench, --model and --checkpoints out."
        )
    if args.judge_model and not args.judge:
        p.error(
            "--judge-model names a model at the URL of --judge. Give that too, or leave it out."
        )
    if (args.report or args.compare) and (args.judge or args.scorer == "official"):
        p.error(
            "--report and --compare show answers as they were scored. Give --scorer and --judge to --rescore, before."
        )
    if args.compare and args.out in args.compare:
        p.error(
            f"--out {args.out} is one of the two that are compared. Choose another folder for their comparison."
        )
    if (
        min(args.batch, args.max_new_tokens, args.zoom + 1, 1 if args.limit is None else args.limit)
        < 1
    ):
        p.error("--batch, --max-new-tokens and --limit must be at least 1, and --zoom at least 0.")
    return args


def run(args: argparse.Namespace, scoring: dict, rank: int, world: int) -> None:
    """Answer and score every benchmark with the model, or with every checkpoint of a run; print tables, write the page."""
    os.environ |= (
        {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    )  # else kernels of a GPU are taken
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = args.device or (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )
    if device == "cpu":  # on a GPU its warning of slow kernels matters
        transformers.utils.logging.set_verbosity_error()
    if rank > 0:
        torch.distributed.barrier()  # rank 0 downloads and converts first
    benches = {}
    for name in args.names:
        own = Path(name).name.removesuffix(".jsonl")
        if own in benches or own != name and own in (*BENCHES, *GROUPS["toy"]):
            raise ValueError(
                f"--bench {name}: another benchmark is called {own!r} too. Rename the file or folder."
            )
        rows = (
            held_out(args.data_root)[name]
            if name in GROUPS["toy"]
            else benchmark(name, args.data_root)
        )
        n = min(args.limit or len(rows), len(rows))
        benches[own] = [rows[i * len(rows) // n] for i in range(n)]
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    without = [
        name
        for name, rows in benches.items()
        if args.view != "full" and not any(row["crop"] for row in rows)
    ]
    if without and len(without) == len(benches):
        raise ValueError(
            f"--view {args.view}: {', '.join(without)} has no crops. zoombench, toy and folders of triplets have."
        )
    if without and rank == 0:
        print(
            f"no crops, {'left out' if args.view == 'crop' else 'full view only'}: {', '.join(without)}"
        )
    benches = {
        name: rows for name, rows in benches.items() if args.view != "crop" or name not in without
    }
    models = {args.out: args.model}
    if args.checkpoints:
        base, kept = (
            read_json(args.checkpoints / "args.json", []).get("model"),
            sorted(args.checkpoints.glob("checkpoint-??????")),
        )
        if not base or not kept:
            raise FileNotFoundError(
                f"--checkpoints {args.checkpoints}: no args.json with a model, or no checkpoints. Expected "
                "the --out folder of a train.py run."
            )
        models = {args.out / "step-000000": base} | {
            args.out / f"step-{path.name[11:]}": str(path) for path in kept
        }
    for out, path in models.items():
        evaluate(
            path,
            benches,
            out,
            views=["full", "crop"] if args.view == "both" else [args.view],
            batch=args.batch,
            max_new_tokens=args.max_new_tokens,
            rounds=args.zoom,
            device=device,
            rank=rank,
            world=world,
        )
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
    Image.MAX_IMAGE_PIXELS = None  # benchmark files are trusted, and some are huge
    if args.compare:
        text, found = compare(*args.compare)
        print(text)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            told = {
                "folders": [*map(os.path.abspath, args.compare)],
                "text": text,
                "benches": found,
            }
            write(args.out / "compare.json", json.dumps(told, indent=1))
    elif args.rescore:
        of_run = {
            path.parent for path in args.rescore.glob("[es]*-*/answers-*.jsonl")
        }  # step-N, or eval-WHEN of training
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
