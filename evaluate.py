"""Evaluation: answers to the paper's benchmarks, with or without a zoom-in tool, and a page to look
at. Sources, scoring, figures and page are the rooms in benchmarks/.

    python evaluate.py --bench vstar --model Qwen/Qwen3.5-4B --out runs/eval-4b
    torchrun --nproc-per-node 8 evaluate.py --bench all --model runs/x/checkpoint-000065 --out DIR
    python evaluate.py --bench zoombench --view both --model DIR --out DIR      # crop, gap as well
    python evaluate.py --bench toy --view both --checkpoints runs/toy --out DIR     # Figure 5
    python evaluate.py --bench vstar --zoom 3 --model DIR --out DIR     # looking twice (Appendix A)
    python evaluate.py --bench vstar --model http://HOST:PORT/v1 --served-model NAME --out DIR
    python evaluate.py --compare runs/eval-4b runs/eval-x               # paired differences
    python evaluate.py --rescore runs/eval-4b --judge URL_OR_MODEL      # saved answers: no model
    python evaluate.py --bench vstar --answers FILE --out DIR           # lmms-eval's, VLMEvalKit's
    python evaluate.py --report runs/toy                                # (re)build report.html

--bench takes several, separated by commas: fine,holdout,my.jsonl. --out holds args.json,
answers-BENCH-RANK.jsonl, result.json, a judge's verdicts.jsonl, report.html. Killed at any moment,
the same command goes on, on any number of ranks. Greedy, non-thinking, images at native resolution.
"""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from benchmarks.exchange import TOOLS, answers_from, export
from benchmarks.figures import (
    Scorer,
    answer_files,
    compare,
    percent,
    saved_answers,
    summarise,
    table,
)
from benchmarks.page import trajectory, write_page
from benchmarks.rows import Answer, Question
from benchmarks.scoring import score
from benchmarks.sources import BENCHES, GROUPS, KNOWN, most_pixels, read_benchmark
from benchmarks.zoom import answer_with_zoom, conversation, neutralised
from launch import script
from launch.flags import (
    device_name,
    megabytes,
    natural,
    not_negative,
    positive,
    positive_int,
    refuse_idle,
    setting,
    settings_parser,
)
from served.client import Client, NoServerError, client_of, is_url
from storage.files import (
    appending,
    hold,
    naming_full_disks,
    numbered,
    read_json,
    read_jsonl,
    write,
    write_jsonl,
)
from storage.images import load_image
from toy.scenes import held_out

SERVED_FLAGS = (  # that change nothing of a local model
    "--served-model",
    "--concurrency",
    "--deadline",
    "--thinking",
    "--max-image-mb",
    "--price-in",
    "--price-out",
)


@dataclass
class Settings:
    """The flags."""

    # instead of answering
    report: Path = setting(
        None, "only (re)build the page of a training run or an evaluation", Path, metavar="DIR"
    )
    rescore: Path = setting(None, "only score the answers in DIR again", Path, metavar="DIR")
    compare: list[Path] = setting(
        None,
        "only compare two results; with --out also a page",
        Path,
        nargs=2,
        metavar=("A", "B"),
    )
    # what to answer
    bench: str = setting(
        "",
        f"separated by commas: {', '.join(BENCHES)}, toy; fine, holdout, all; a .jsonl in the "
        "neutral form (docs/evaluation.md), a folder of triplets with answers",
    )
    data_root: Path = setting(
        Path("data/benchmarks"), "where benchmarks lie, or are downloaded to", Path
    )
    model: str = setting(None, "checkpoint directory, hub id, or an OpenAI-compatible server's URL")
    checkpoints: Path = setting(
        None, "instead: a run's base and checkpoints, into OUT/step-N", Path, metavar="RUN"
    )
    answers: Path = setting(
        None, "instead: predictions that lmms-eval or VLMEvalKit saved", Path, metavar="FILE"
    )
    out: Path = setting(None, "results folder", Path)
    view: str = setting("full", "both: the gap, where there are crops", ["full", "crop", "both"])
    limit: int = setting(None, "only so many rows of each benchmark, evenly spread", positive_int)
    max_new_tokens: int = setting(
        4096, "longer ones are cut off and counted (ours: theirs 32,768)", positive_int
    )
    zoom: int = setting(0, "a zoom-in tool may be called N times a question", natural, metavar="N")
    batch: int = setting(
        16, "rows at once, halved when memory runs out; changes no result", positive_int
    )
    device: str = setting(
        None, "such as cpu or cuda:1 (default: cuda where there is one, a GPU a rank)", device_name
    )
    # how a server is asked (served/client.py; its key: OPENAI_API_KEY)
    served_model: str = setting(None, "the model's name at the URL of --model")
    concurrency: int = setting(32, "requests in flight; changes no result", positive_int)
    deadline: float = setting(600, "seconds a call, its retries included", positive)
    thinking: bool = setting(False, "it is not asked not to think", bool)
    max_image_mb: float = setting(20, "larger pictures are made smaller, and counted", megabytes)
    price_in: float = setting(None, "of a million tokens of prompts, for the cost", not_negative)
    price_out: float = setting(None, "of a million tokens of answers", not_negative)
    # how to score
    scorer: str = setting(
        "ours", "official: first capital letter, as published", ["ours", "official"]
    )
    judge: str = setting(
        None,
        "for what stays unparsed: a HF model, or an OpenAI-like API's URL (key: OPENAI_API_KEY)",
    )
    judge_model: str = setting(None, "the model's name at the judge's URL")
    # what to do with the result
    json: bool = setting(False, "results as JSON, a line each, instead of tables", bool)
    export: str = setting(None, "also write the answers for another tool's scorers", TOOLS)

    def names(self) -> list[str]:
        """The benchmarks asked for, groups taken apart."""
        given = filter(None, map(str.strip, self.bench.split(",")))
        return list(dict.fromkeys(name for each in given for name in GROUPS.get(each, [each])))


@dataclass
class Asking:
    """How questions are put to a model, and which of them this rank puts."""

    views: list[str]  # full, crop
    max_new_tokens: int = 4096
    batch: int = 16
    zoom: int = 0  # calls of the zoom-in tool; 0: there is none
    limit: int | None = None  # rows of each benchmark, evenly spread; None: all
    rank: int = 0
    world: int = 1


# ----------------------------------------------------------------------------------------- answers


def evaluate(
    path: str, benches: dict[str, list[Question]], out: Path, how: Asking, device: str
) -> None:
    """Load the model at `path` and append its answers to `out`, this rank's share of them; returns
    when all ranks are done. Raises ValueError when `out` holds answers of other weights or under
    other settings."""
    import torch

    from model import load
    from storage.checkpoint import fingerprint, prompts_digest

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, processor = load(path, device=device, dtype=dtype)
    if how.rank == 0:
        of = {"weights": fingerprint(model), "prompts": prompts_digest(processor)}
        claim_results(out, path, of, how)
        for name, questions in benches.items():
            drop_stale(out, name, questions)
    if how.world > 1:
        torch.distributed.barrier()
    ask = partial(in_batches, model, processor, out, how)
    for name, questions in benches.items():
        answer_all(ask, name, questions, out, how)
    if how.world > 1:
        torch.distributed.barrier()


def evaluate_served(
    settings: Settings, benches: dict[str, list[Question]], out: Path, how: Asking
) -> None:
    """The same by a server's model, --concurrency rows at once."""
    client = client_of(settings, settings.model, settings.served_model)
    of = {"served_model": settings.served_model, "thinking": settings.thinking}
    free = {key: getattr(settings, key) for key in ("max_image_mb", "price_in", "price_out")}
    claim_results(out, settings.model, of, how, free)
    for name, questions in benches.items():
        drop_stale(out, name, questions)
    for name, questions in benches.items():
        answer_all(partial(by_server, client, out, how), name, questions, out, how)


def claim_results(out: Path, path: str, of: dict, how: Asking, free: dict | None = None) -> None:
    """Write out/args.json, or say whose answers `out` holds. of: what else, with the limits, makes
    answers another model's; free: what does not."""
    now = of | {"max_new_tokens": how.max_new_tokens, "zoom": how.zoom}
    notes = []
    then = read_json(out / "args.json", notes) or now
    if notes and answer_files(out):
        raise ValueError(
            f"{out} holds answers, but {notes[0]}: whose are they? Put the file back, or choose "
            "another --out."
        )
    then.setdefault("prompts", now.get("prompts"))  # older folders do not say
    differ = [
        f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in now if then.get(key) != now[key]
    ]
    if differ:
        raise ValueError(
            f"{out} holds answers of {then['model']}; {path} differs in {', '.join(differ)}. "
            "Choose another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    write(out / "args.json", json.dumps({"model": path} | now | (free or {}), indent=1) + "\n")


def drop_stale(out: Path, name: str, questions: list[Question]) -> None:
    """Take the answers to rows of a benchmark that have changed since, or are gone, out of `out`,
    so that they are asked again. Raises ValueError where that would be all of them."""
    asked, lines_of = {question.id: question for question in questions}, {}
    same = changed = gone = 0
    for path in answer_files(out, name):
        lines_of[path] = []
        for line in read_jsonl(path, []):
            question = asked.get(line["id"])
            if line.get("error"):  # asked again anyway
                continue
            if question is None:
                gone += 1
            elif answers_it(line, question):
                same += 1
                lines_of[path].append(line)
            else:
                changed += 1
    if changed + gone == 0:
        return
    if same == 0:
        raise ValueError(
            f"{out} holds answers to another benchmark that is called {name}. Choose another --out."
        )
    note(
        f"{name}: {changed} answers are to rows that have changed, asked again now; {gone} to rows "
        "that are gone"
    )
    for path, lines in lines_of.items():
        write_jsonl(path, lines)


def answers_it(line: dict, question: Question) -> bool:
    """Whether a saved line is an answer to this question; older ones have no digest of it."""
    if line.get("digest"):
        return line["digest"] == question.fingerprint(line["view"])
    return (line["prompt"], line["answer"]) == (question.prompt, question.answer)


def answer_all(ask, name: str, questions: list[Question], out: Path, how: Asking) -> None:
    """Append this rank's answers to benchmark `name` that `out` does not hold yet to
    out/answers-NAME-RANK.jsonl, a line each. ask: answers without a reply -> (some of them, their
    replies, as fields of an Answer, or an error), until all are there.

    A line has an error instead when its image cannot be read, or it cannot be encoded or does not
    fit in memory alone, or a server refuses it: counted, never scored, and tried again by the next
    run.
    """
    n = min(how.limit or len(questions), len(questions))
    spread = [questions[i * len(questions) // n] for i in range(n)]
    asked = to_ask(name, spread[how.rank :: how.world], out, how.views)
    done = {a.place() for a in saved_answers(out) if a.bench == name and a.error is None}
    todo = [answer for answer in asked if answer.place() not in done]
    states, bar = Counter(), tqdm(total=len(asked), desc=name, unit="row", disable=how.rank > 0)
    Image.MAX_IMAGE_PIXELS = most_pixels([name])
    path = out / f"answers-{name}-{how.rank}.jsonl"
    with naming_full_disks(out), appending(path) as file, bar:
        bar.update(len(asked) - len(todo))
        start = time.perf_counter()
        for batch, replies in ask(todo):
            if isinstance(replies, Exception):
                kind = type(replies).__name__
                replies = [{"error": f"{kind} with this row alone: {replies}"}]
            seconds = (time.perf_counter() - start) / len(batch)
            start = time.perf_counter()
            for answer, reply in zip(batch, replies, strict=True):
                vars(answer).update(reply, seconds=seconds)
                file.write(json.dumps(answer.line()) + "\n")
                states[score(answer).state] += 1
            file.flush()
            bar.update(len(batch))
            share = states["right"] / max(1, states.total() - states["error"])
            bar.set_postfix_str(f"{share:.1%} right, {states['error']} errors")


def to_ask(name: str, questions: list[Question], out: Path, views: list[str]) -> list[Answer]:
    """Each question in each view, still without an answer."""
    asked = []
    for question in questions:
        row = dict(vars(question))
        row["image"] = os.path.relpath(question.image, out)
        row["crops"] = [os.path.relpath(crop, out) for crop in question.crops]
        for view in views:
            if question.shown(view):
                digest = question.fingerprint(view)
                asked.append(Answer(**row, bench=name, view=view, digest=digest))
    return asked


def in_batches(
    model, processor, out: Path, how: Asking, todo: list[Answer]
) -> Iterator[tuple[list[Answer], object]]:
    """The model's replies, as `answer_all` takes them, in batches that fit."""
    from launch.batches import Batches

    work = partial(replies_to, model, processor, out, how)
    yield from Batches(how.batch).run(todo, work, bad_item=(OSError, ValueError))


def pictures_of(answer: Answer, out: Path) -> list[Path]:
    """What a question is about, in its view."""
    return [Path(os.path.normpath(out / path)) for path in answer.shown(answer.view)]


def replies_to(model, processor, out: Path, how: Asking, batch: list[Answer]) -> list[dict]:
    """What the model says to a batch: the fields of an Answer that it fills in."""
    from rollout import answers

    images = [list(map(load_image, pictures_of(answer, out))) for answer in batch]
    prompts = [neutralised(answer.prompt) for answer in batch]  # no turn can be forged
    ask = partial(answers, model, processor, max_new_tokens=how.max_new_tokens)
    if how.zoom:
        return answer_with_zoom(ask, images, prompts, how.zoom)
    return list(map(vars, ask(images, prompts)))


def by_server(
    client: Client, out: Path, how: Asking, todo: list[Answer]
) -> Iterator[tuple[list[Answer], object]]:
    """The served model's replies, as `answer_all` takes them. Raises NoServerError."""
    for answer, reply in client.as_they_end(todo, partial(served_reply, client, out, how)):
        if isinstance(reply, NoServerError):
            raise reply
        yield [answer], reply if isinstance(reply, Exception) else [reply]


async def served_reply(client: Client, out: Path, how: Asking, answer: Answer) -> dict:
    """What the served model says to a question: the fields of an Answer that it fills in."""
    files, prompt = pictures_of(answer, out), neutralised(answer.prompt)
    if not how.zoom:
        (reply,) = await client.replies(files, prompt, max_tokens=how.max_new_tokens)
        return vars(reply)
    images = [await asyncio.to_thread(load_image, file) for file in files]
    turns = conversation(images, prompt, how.zoom)
    turn = next(turns)
    while True:
        views, chat = turn
        (reply,) = await client.replies(
            [*files, *views[len(files) :]], chat, max_tokens=how.max_new_tokens
        )
        try:
            turn = turns.send(reply)
        except StopIteration as end:
            return end.value


# ---------------------------------------------------------------------------------------- command


def read_questions(settings: Settings) -> dict[str, list[Question]]:
    """{benchmark: its questions}. Raises ValueError."""
    benches = {}
    for name in settings.names():
        own = Path(name).name.removesuffix(".jsonl")
        if own in benches or (own != name and own in KNOWN):
            raise ValueError(
                f"--bench {name}: another benchmark is called {own!r} too. Rename the file or "
                "folder."
            )
        if name in GROUPS["toy"]:
            rows = held_out(settings.data_root)[name]
        else:
            rows = read_benchmark(name, settings.data_root)
        benches[own] = rows
    return benches


def where_crops_are(
    view: str, benches: dict[str, list[Question]], rank: int
) -> dict[str, list[Question]]:
    """The benchmarks that can be asked about in a view, or in both; says which have no crops.
    ValueError if none has, where they are asked for."""
    if view == "full":
        return benches
    without = [name for name, rows in benches.items() if not any(row.crops for row in rows)]
    if len(without) == len(benches):
        raise ValueError(
            f"--view {view}: {', '.join(without)} has no crops. zoombench, toy and folders of "
            "triplets have."
        )
    told = "left out" if view == "crop" else "full view only"
    if without and rank == 0:
        note(f"no crops, {told}: {', '.join(without)}")
    if view == "both":
        return benches
    return {name: rows for name, rows in benches.items() if name not in without}


def models_of_run(run: Path, out: Path) -> dict[Path, str]:
    """{folder of results: model} of a training run's base and checkpoints."""
    base = read_json(run / "args.json", []).get("model")
    kept = numbered(run, "checkpoint")
    if not base or not kept:
        raise FileNotFoundError(
            f"--checkpoints {run}: no args.json with a model, or no checkpoints. Expected the "
            "--out folder of a train.py run."
        )
    models = {out / "step-000000": base}
    for path in kept:
        models[out / path.name.replace("checkpoint", "step")] = str(path)
    return models


def asking(settings: Settings, rank: int = 0, world: int = 1) -> Asking:
    return Asking(
        views=["full", "crop"] if settings.view == "both" else [settings.view],
        max_new_tokens=settings.max_new_tokens,
        batch=settings.batch,
        zoom=settings.zoom,
        limit=settings.limit,
        rank=rank,
        world=world,
    )


def answer_and_score_served(settings: Settings, scorer: Scorer) -> None:
    """The same by a server's model, in this process alone and without torch."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "A server is asked by one process. Leave torchrun out, and choose --concurrency."
        )
    hold(settings.out)
    benches = where_crops_are(settings.view, read_questions(settings), 0)
    evaluate_served(settings, benches, settings.out, asking(settings))
    tell(settings, settings.out, scorer, f"{settings.served_model} at {settings.model}")
    note(f"page: {write_page(settings.out)}")


def answer_and_score(settings: Settings, scorer: Scorer) -> None:
    """Answer and score every benchmark with the model, or with every checkpoint of a run; print
    tables, write the page."""
    import launch.environment  # noqa: F401  (first: it sets what torch and transformers read)

    # isort: split
    import torch
    import transformers

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=2))
    transformers.utils.logging.disable_progress_bar()
    here = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = settings.device or here
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}, but torch sees no GPU here. Use --device cpu.")
    if rank == 0:
        hold(settings.out)
    if device == "cpu":  # on a GPU its warning of slow kernels matters
        transformers.utils.logging.set_verbosity_error()
    if rank > 0:
        torch.distributed.barrier()  # rank 0 downloads and converts first
    benches = read_questions(settings)
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    benches = where_crops_are(settings.view, benches, rank)
    how = asking(settings, rank, world)
    models = {settings.out: settings.model}
    if settings.checkpoints:
        models = models_of_run(settings.checkpoints, settings.out)
    for out, path in models.items():
        evaluate(path, benches, out, how, device)
        if rank == 0:
            tell(settings, out, scorer, path)
    if rank == 0:
        if settings.checkpoints and not settings.json:
            print_trajectory(list(models))
        note(f"page: {write_page(settings.out)}")
    if world > 1:
        torch.distributed.destroy_process_group()  # not after an error: it could block


def note(text: str) -> None:
    """What is no result goes where progress goes."""
    print(text, file=sys.stderr)


def tell(settings: Settings, out: Path, scorer: Scorer, title: str | Path) -> None:
    """Score what `out` holds and print it; write it for another tool, if asked to."""
    result = summarise(out, scorer)
    if settings.json:
        print(json.dumps({"folder": str(out)} | result))
    else:
        print(f"{title}\n{table(result)}")
    if settings.export:
        note(f"{settings.export}: {export(out, settings.export)}")


def take_answers(settings: Settings) -> None:
    """Write another tool's predictions for a benchmark as answers into --out. ValueError where that
    holds answers."""
    out = settings.out
    hold(out)
    if answer_files(out):
        raise ValueError(f"{out} holds answers. --rescore scores them; or choose another --out.")
    ((name, questions),) = read_questions(settings).items()
    answered, corrected = answers_from(settings.answers, to_ask(name, questions, out, ["full"]))
    if corrected:
        note(f"{corrected} of {len(answered)} rows have another right answer there: ours counts")
    write(out / "args.json", json.dumps({"model": str(settings.answers)}) + "\n")
    write_jsonl(out / f"answers-{name}-0.jsonl", [answer.line() for answer in answered])


def print_trajectory(folders: list[Path]) -> None:
    for folder in folders:
        for row in trajectory(folder):
            shares = "  ".join(f"{key} {percent(row.get(key))}" for key in ("full", "crop", "gap"))
            print(f"step {row['step']:6} {row['bench']:<20} {shares}")


def show_saved(settings: Settings, scorer: Scorer) -> None:
    """--compare, --rescore, --report, --answers: of answers that are there."""
    page = settings.report or settings.rescore or settings.out
    if settings.compare:
        text, found = compare(*settings.compare)
        folders = list(map(os.path.abspath, settings.compare))
        result = {"folders": folders, "text": text, "benches": found}
        print(json.dumps(result) if settings.json else text)
        if settings.out:
            settings.out.mkdir(parents=True, exist_ok=True)
            write(settings.out / "compare.json", json.dumps(result, indent=1))
    if settings.rescore:
        if not settings.rescore.is_dir():
            raise FileNotFoundError(f"--rescore {settings.rescore} is not there.")
        hold(settings.rescore)
        # step-N of checkpoints, or eval-WHEN of a training run
        of_run = {path.parent for path in settings.rescore.glob("[es]*-*/answers-*.jsonl")}
        for folder in sorted(of_run) or [settings.rescore]:
            tell(settings, folder, scorer, folder)
    if settings.answers:
        take_answers(settings)
        tell(settings, settings.out, scorer, settings.answers)
    if page:
        note(f"page: {write_page(page)}")


def why_not(settings: Settings) -> str | None:
    """Why flags that are each in order make no command together; None where they do."""
    unknown = [n for n in settings.names() if n not in KNOWN and not Path(n).exists()]
    if unknown:
        return (
            f"--bench {', '.join(unknown)} is unknown. Benchmarks: {', '.join(BENCHES)}, toy; "
            "groups: fine, holdout, all; or the path of a .jsonl or of a folder of triplets."
        )
    shown = list(filter(None, (settings.report, settings.rescore, settings.compare)))
    answering = list(filter(None, (settings.model, settings.checkpoints, settings.answers)))
    asks = settings.bench or answering
    asked = settings.names() and settings.out and len(answering) == 1
    if len(shown) > 1 or not (shown or asked):
        return (
            "expected --bench, --out, and --model, --checkpoints or --answers; or one of --report, "
            "--rescore, --compare."
        )
    if shown and asks:
        return (
            "--report, --rescore and --compare are about saved answers. Leave --bench, --model, "
            "--checkpoints and --answers out."
        )
    if is_url(settings.model) and not settings.served_model:
        return "--model is a server's URL. Name one of its models: --served-model NAME."
    if settings.answers and len(settings.names()) > 1:
        return "--answers holds predictions for one benchmark. Name only that one with --bench."
    if (
        (settings.report or settings.compare)
        and settings.export
        or settings.report
        and settings.json
    ):
        return "--export goes with answers that are scored, --json with results, not with a page."
    if settings.judge_model and not settings.judge:
        return "--judge-model names a model at the URL of --judge. Give that too, or leave it out."
    scores = settings.judge or settings.scorer == "official"
    if (settings.report or settings.compare) and scores:
        return (
            "--report and --compare show answers as they were scored. Give --scorer and --judge "
            "to --rescore, before."
        )
    if settings.compare and settings.out in settings.compare:
        return (
            f"--out {settings.out} is one of the two that are compared. Choose another folder for "
            "their comparison."
        )
    return None


def main(argv: list[str] | None = None) -> None:
    parser = settings_parser(Settings, __doc__)
    settings = Settings(**vars(parser.parse_args(argv)))
    reason = why_not(settings)
    if reason:
        parser.error(reason)
    served = is_url(settings.model)
    has_effect = dict.fromkeys(SERVED_FLAGS, served) | {"--batch": not served}
    has_effect["--device"] = not served
    asked = f"with --model {settings.model}"
    refuse_idle(parser, sys.argv[1:] if argv is None else argv, has_effect, asked)
    scorer = Scorer(settings.scorer, settings.judge, settings.judge_model)
    if is_url(settings.judge):
        Client(settings.judge, settings.judge_model)  # what it lacks is said now, not at the end
    if settings.report or settings.rescore or settings.compare or settings.answers:
        show_saved(settings, scorer)
    elif served:
        answer_and_score_served(settings, scorer)
    else:
        answer_and_score(settings, scorer)


if __name__ == "__main__":
    script.run(main)
