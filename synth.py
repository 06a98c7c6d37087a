"""Triplets (full image with a red box, crop of what it frames, question) made from photographs
(paper, section 3.2).

    python synth.py --images DIR --out data/mine [--model ID] [--labels] [--format mcq]
    torchrun --nproc-per-node 8 synth.py --images DIR --out data/mine       # then --merge data/mine
    python synth.py --images DIR --out DIR --model http://HOST:PORT/v1 --served-model NAME
    python synth.py --check data/mine           # is any data set whole?
    python synth.py --preview data/mine         # preview.png of any data set: look before you train

What a data set looks like on disk: triplets/format.py. What the model is told and what is refused:
synthesis/prompts.toml.
"""

import hashlib
import json
import os
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from launch import script
from launch.flags import megabytes, positive, positive_int, refuse_idle, setting, settings_parser
from served.client import client_of, is_url
from storage.files import hold, naming_full_disks
from synthesis.asking import Local, Request, Served
from synthesis.checking import check_triplets
from synthesis.parts import SERVERS, merge, open_part, read_parts
from synthesis.photos import Photo, photograph_files, photos_ahead, rank_of
from synthesis.proposers import Sam3, given_boxes, read_boxes, replied_boxes
from synthesis.regions import Evidence, cut, evidence, small_regions
from synthesis.texts import PROMPTS, broken_rule, drafted, json_in_reply, normal, one_line
from triplets.format import FOLDERS, Triplet, only, write_sample
from triplets.preview import draw_preview

SERVED_FLAGS = ("--concurrency", "--deadline", "--thinking", "--max-image-mb")
VOTES = 8  # answers to a question; a label needs more than 3/4 of them


def path(told: str, metavar: str = "DIR"):
    return setting(None, told, Path, metavar=metavar)


@dataclass
class Settings:
    # data sets that are there
    preview: Path = path("draw DIR/preview.png: 24 triplets of that data set")
    check: Path = path("list everything wrong with a data set; exit 1 if there is")
    merge: Path = path("what ranks made -> train.jsonl, stats.json, preview.png")
    font: Path = path("of the preview, for scripts that Pillow's own font lacks", "FILE")
    # photographs into triplets (paper, section 3.2)
    images: Path = path("photographs, in folders of any depth (not hidden or linked ones)")
    out: Path = path("folder to write; an interrupted run goes on")
    model: str = setting(
        "Qwen/Qwen3.5-4B",
        "hub id, directory (ours: the student itself), or an OpenAI-compatible server's URL",
    )
    labels_model: str = setting(None, "the same, for the labels alone (the paper: a 397B)")
    proposer: str = setting(
        "mllm",
        "what boxes things: mllm (--model does; ours: no second download), sam3 (the paper's), or "
        "your own .jsonl: {image, boxes: [[x1, y1, x2, y2] px, ..], labels}",
    )
    sam3: str = setting("facebook/sam3", "hub id or directory, for --proposer sam3")
    regions: int = setting(
        1,
        "of a photograph that a question needs: 2, pairs of those kept (ours)",
        int,
        choices=[1, 2],
    )
    labels: bool = setting(False, f"write answers on which over 3/4 of {VOTES} samples agree", bool)
    format: str = setting(
        "open",
        "mcq: four options, a letter, labels, as released (ours: open, the method needs no labels)",
        ["open", "mcq"],
    )
    clean_crop: bool = setting(False, "crops without the red frame", bool)
    full: str = setting("jpg", "full images; png keeps every bit, 20 times slower", ["jpg", "png"])
    seed: int = setting(0, "of all that is sampled", int)
    batch: int = setting(
        16, "photographs, and prompts, at once; halved when memory runs out", positive_int
    )
    # how a server is asked (served/client.py; its key: OPENAI_API_KEY)
    served_model: str = setting(None, "the model's name at the URL of --model")
    labels_served_model: str = setting(None, "the model's name at the URL of --labels-model")
    concurrency: int = setting(32, "requests in flight, of --batch photographs", positive_int)
    deadline: float = setting(600, "seconds a call, its retries included", positive)
    thinking: bool = setting(False, "it is not asked not to think", bool)
    max_image_mb: float = setting(20, "larger pictures are made smaller, and counted", megabytes)
    workers: int = setting(4, "threads that decode and encode images", positive_int)


# ------------------------------------------------------------------------------------ the pipeline


def make_triplets(photos: list[Photo], engine, pool: Executor) -> Iterator[str]:
    """Section 3.2 for a batch of photographs: propose, keep small regions, ask, filter, consensus,
    draw. Saves their images and leaves their rows of train.jsonl in photo.samples. Yields the name
    of each stage when it has ended."""
    mcq = engine.settings.format == "mcq"
    all_shown = propose(engine, photos)
    yield "propose"
    ask_questions(engine, all_shown)
    yield "question"
    if engine.settings.labels or mcq:
        vote(engine, all_shown)
        yield "label"
    if engine.settings.regions > 1:
        ask_of_one(engine, all_shown)
        yield "one"
    all_shown = [shown for shown in all_shown if shown.questions]
    for shown in all_shown:
        shown.photo.drops["question_spare"] += len(shown.questions) - 1
    if mcq:
        all_shown = add_options(engine, all_shown)
        yield "choices"
    rows = pool.map(partial(draw_triplet, engine), all_shown)
    for shown, row in zip(all_shown, rows, strict=True):
        shown.photo.samples.append(row)
    yield "write"


def propose(engine, photos: list[Photo]) -> list[Evidence]:
    """The small regions of all photographs, or pairs of them."""
    photos = [photo for photo in photos if photo.image]
    replies = [[]] * len(photos)
    if engine.find:
        prompt = PROMPTS["find"] + engine.find
        requests = [Request(photo, photo.digest, [photo.image], prompt) for photo in photos]
        replies = reply_lists(engine, "boxes", requests, 1024)
    all_shown = []
    for photo, items in zip(photos, replies, strict=True):
        found = engine.boxes_in(photo, items or [])
        if not found and not photo.drops.total():
            photo.drop("nothing_found")
        all_shown += evidence(photo, small_regions(photo, found), engine.settings.regions)
    return all_shown


def texts_of(shown: Evidence) -> dict:
    """What the model is told of it."""
    return PROMPTS if len(shown.regions) == 1 else PROMPTS["pair"]


def ask_questions(engine, all_shown: list[Evidence]):
    """Gives each region, or pair, up to 3 questions, asked of its crops alone, that break no
    rule."""
    types = ", ".join(PROMPTS["types"])
    requests = []
    for shown in all_shown:
        labels = [region.label for region in shown.regions]
        prompt = texts_of(shown)["ask"] % (*labels, types)
        requests.append(Request(shown.photo, shown.id, shown.crops, prompt))
    replies = reply_lists(engine, "questions", requests, 512)
    for shown, items in zip(all_shown, replies, strict=True):
        if items == []:
            shown.photo.drop("no_question")
        for n, item in enumerate(items or []):
            draft = drafted(item, n)
            reason = "question_spare" if n >= 3 else broken_rule(draft)
            if reason:
                shown.photo.drop(reason)
            else:
                shown.questions.append(draft)


def vote(engine, all_shown: list[Evidence]):
    """Consensus: replaces drafted answers by what at least 7 of 8 sampled ones agree on; without
    such a majority the question goes."""
    asked = [(shown, draft) for shown in all_shown for draft in shown.questions]
    requests = [
        Request(shown.photo, (shown.id, draft.n), shown.crops, PROMPTS["vote"] % draft.question)
        for shown, draft in asked
    ]
    replies = reply_texts(engine, "label", requests, 32, group=VOTES, temperature=1.0)
    for n, (shown, draft) in enumerate(asked):
        texts = replies[n * VOTES : (n + 1) * VOTES]
        votes = defaultdict(list)  # what was said, by what it counts as
        for text in filter(None, map(one_line, texts)):
            said = re.sub(PROMPTS["lead_in"], "", text, flags=re.I).strip(" .")
            votes[normal(text, draft.question)].append(said)
        agreed = max(votes.values(), key=len, default=[])
        reason = "no_consensus"
        if len(agreed) > 0.75 * VOTES:
            draft.answer = min(agreed, key=len)
            draft.votes = [len(agreed), VOTES]
            reason = broken_rule(draft)
        if reason:
            shown.questions.remove(draft)
            if None not in texts:  # else it was out of memory, and counted
                shown.photo.drop(reason)


def ask_of_one(engine, pairs: list[Evidence]):
    """Takes questions away that one crop of a pair is enough to answer the same."""
    asked = [(pair, draft) for pair in pairs for draft in pair.questions]
    requests = [
        Request(pair.photo, (pair.id, draft.n), [crop], PROMPTS["vote"] % draft.question)
        for pair, draft in asked
        for crop in pair.crops
    ]
    replies = reply_texts(engine, "one", requests, 32)
    for n, (pair, draft) in enumerate(asked):
        texts = replies[2 * n : 2 * n + 2]
        answer = normal(draft.answer, draft.question)
        if None in texts:  # out of memory, and counted
            pair.questions.remove(draft)
        elif answer in [normal(text, draft.question) for text in texts]:
            pair.questions.remove(draft)
            pair.photo.drop("one_is_enough")


def add_options(engine, all_shown: list[Evidence]) -> list[Evidence]:
    """Gives each first question three wrong options of the same kind, shuffled by the id. Returns
    those for which there are so many."""
    asked = [(shown, shown.questions[0]) for shown in all_shown]
    requests = [
        Request(shown.photo, shown.id, shown.crops, PROMPTS["wrong"] % (q.question, q.answer))
        for shown, q in asked
    ]
    replies = reply_lists(engine, "options", requests, 128)
    complete = []
    for (shown, draft), items in zip(asked, replies, strict=True):
        options = {normal(draft.answer, draft.question): draft.answer}
        for wrong in filter(None, map(one_line, items or [])):
            if not re.search(PROMPTS["unknown"], normal(wrong)):
                options.setdefault(normal(wrong, draft.question), wrong)
        draft.options = list(options.values())[:4]
        random.Random(f"{shown.id}-{draft.n}").shuffle(draft.options)
        if len(draft.options) == 4:
            complete.append(shown)
        elif items is not None:  # else counted already
            shown.photo.drop("options_too_few")
    return complete


def draw_triplet(engine, shown: Evidence) -> dict:
    """Draws and saves a region, or a pair, with its first question: the row of train.jsonl."""
    settings = engine.settings
    photo = shown.photo
    draft = shown.questions[0]
    text = draft.question + texts_of(shown)["hint"]
    answer = draft.answer if settings.labels else None
    if draft.options:
        lines = map("{}. {}".format, "ABCD", draft.options)
        text += "\n\n" + "\n".join(lines) + PROMPTS["choose"]
        answer = "ABCD"[draft.options.index(draft.answer)]
    framed = shown.framed()
    crops = shown.crops
    if not settings.clean_crop:
        crops = [cut(framed, region.window) for region in shown.regions]
    told = [region.told() for region in shown.regions]
    extra = {
        "source": photo.file.encode(errors="backslashreplace").decode(),
        "source_size": photo.image.size,
        **{key: only([each[key] for each in told]) for key in told[0]},
        "draft": draft.draft,
        "type": draft.type,
        "votes": draft.votes,
        "config": engine.mark,
        "seed": settings.seed,
    }
    boxes = [region.box for region in shown.regions]
    sample = Triplet(f"{shown.id}-{draft.n}", text, framed, crops, boxes, answer, extra)
    return write_sample(settings.out, sample, f".{settings.full}")


# -------------------------------------------------------------------------------- asking the model


@dataclass
class Engine:
    """What proposes and answers."""

    asked: Local | Served
    labeller: Local | Served  # the same one, unless --labels-model is another
    settings: Settings
    mark: str  # a digest of what the samples depend on, but for where the photographs are
    find: str  # how the model is to reply with names or boxes; "" where it is not asked
    boxes_in: Callable  # (photo, the model's reply) -> its regions


def reply_texts(
    engine, what: str, requests: list[Request], tokens: int, group: int = 1, temperature=0.0
) -> list[str | None]:
    """`group` texts replied to each request, those of one together; None, and counted, where there
    is none. Labels are asked of --labels-model, if there is one."""
    asked = engine.labeller if what == "label" else engine.asked
    return asked.texts(what, requests, tokens, group, temperature)


def reply_lists(engine, what: str, requests: list[Request], tokens: int) -> list:
    """The JSON list replied to each request. Without one it is asked for once more, warmer; then it
    is None, counted as `what`_malformed, and the text is noted."""
    replies = reply_texts(engine, what, requests, tokens)
    lists = [json_in_reply(text or "") for text in replies]
    bad = [i for i, text in enumerate(replies) if text is not None and lists[i] is None]
    again = reply_texts(engine, what, [requests[i] for i in bad], tokens, temperature=0.7)
    for i, text in zip(bad, again, strict=True):
        lists[i] = json_in_reply(text or "")
        if text is not None and lists[i] is None:
            requests[i].photo.drop(f"{what}_malformed", text)
    return lists


def load_engine(settings, config: dict, given: dict) -> Engine:
    """The models on this rank's device, loaded before the first photograph. Raises, naming the way
    out. given: boxes by photograph, for --proposer FILE."""
    asked = labeller = open_model(settings, settings.model, settings.served_model)
    if settings.labels_model:
        labeller = open_model(settings, settings.labels_model, settings.labels_served_model)
    if settings.proposer == "mllm":
        find, boxes_in = PROMPTS["boxes"], replied_boxes
    elif settings.proposer == "sam3":
        find, boxes_in = PROMPTS["names"], Sam3(settings.sam3, device_here()).boxes_in
    else:
        find, boxes_in = "", partial(given_boxes, given)
    anywhere = {key: value for key, value in config.items() if key not in SERVERS} | {"images": ""}
    mark = hashlib.sha256(json.dumps(anywhere, sort_keys=True).encode()).hexdigest()[:12]
    return Engine(asked, labeller, settings, mark, find, boxes_in)


def device_here() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def open_model(settings, path: str, served_model: str | None) -> Local | Served:
    """A model, loaded, or the client of the server that has it."""
    if is_url(path):
        client = client_of(settings, path, served_model)
        return Served(client, settings.images, settings.seed)
    import torch

    import model
    from launch.batches import Batches
    from rollout import answers

    device = device_here()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    loaded = model.load(path, device=device, dtype=dtype)
    return Local(partial(answers, *loaded), Batches(settings.batch), settings.seed)


# ----------------------------------------------------------------------------------------- running


def synthesize(settings):
    """This rank's photographs -> images, and lines in .parts; without torchrun, the whole data set.

    A photograph's line, appended after its images, holds its samples and says that it is done; one
    that was killed before is done anew, under the same names.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    out = settings.out
    given = {}
    if settings.proposer.endswith(".jsonl"):
        given = read_boxes(Path(settings.proposer))
    if (out / "train.jsonl").exists() and not (out / ".parts").is_dir():
        raise FileExistsError(f"{out} holds another data set. Choose another --out.")
    files = photograph_files(settings.images, out)
    lost = sorted(given.keys() - files, key=str)
    if lost and rank == 0:
        print(
            f"warning: {settings.proposer} names {len(lost)} images that are not under "
            f"{settings.images}, the first {lost[0]!r}"
        )
    config = configuration(settings)
    hold(out / ".parts", f".{rank:05d}.lock")
    _, done = read_parts(out, config)
    files = [file for file in files if rank_of(file, world) == rank]
    todo = [file for file in files if file not in done]
    engine = load_engine(settings, config, given) if todo else None
    for key in FOLDERS:
        (out / key).mkdir(parents=True, exist_ok=True)
    with (
        naming_full_disks(out),
        open_part(out, rank, config) as part,
        tqdm(
            total=len(files), initial=len(files) - len(todo), unit="image", disable=rank > 0
        ) as bar,
    ):
        if engine:
            work(todo, engine, part, bar)
    if world == 1:
        merge(out, settings.font)
    elif rank == 0:
        print(f"When all ranks have ended: python synth.py --merge {out}")


def work(todo: list[str], engine, part, bar):
    """Photographs -> triplets, a batch at a time, and a line in `part` for each that is done."""
    settings = engine.settings
    kept = dropped = left = 0
    before = time.perf_counter()
    with ThreadPoolExecutor(settings.workers) as pool:
        for photos in photos_ahead(pool, settings.images, todo, settings.batch):
            shares = {}  # seconds a photograph, by stage
            for stage in chain(["load"], make_triplets(photos, engine, pool)):
                now = time.perf_counter()
                shares[stage] = round((now - before) / len(photos), 4)
                before = now
            for photo in photos:
                if photo.failed:
                    left += 1
                    tqdm.write(f"{photo.file} is not done: {photo.failed[:300]}")
                    continue
                line = {
                    "file": photo.file,
                    "digest": photo.digest,
                    "drops": +photo.drops,  # without zeros
                    "notes": photo.notes,
                    "seconds": shares,
                    "samples": photo.samples,
                }
                if photo.usage:
                    line["usage"] = photo.usage
                print(json.dumps(line), file=part)
                kept += len(photo.samples)
                dropped += photo.drops.total()
            part.flush()
            bar.update(len(photos))
            bar.set_postfix_str(f"{kept} kept, {dropped} dropped")
    if left:
        print(f"{left} photographs are not done: calls failed. The same command does them again.")


def configuration(settings) -> dict:
    """What the samples depend on: a run is not resumed with anything else."""
    keys = (
        "model",
        "proposer",
        "sam3",
        "regions",
        "labels",
        "format",
        "clean_crop",
        "full",
        "seed",
    )
    texts = repr(PROMPTS).encode()
    if settings.proposer.endswith(".jsonl"):
        texts += Path(settings.proposer).read_bytes()
    config = {key: getattr(settings, key) for key in keys} | {
        "images": str(settings.images.resolve()),
        "texts": hashlib.sha256(texts).hexdigest()[:12],
    }
    for role in ("model", "labels_model"):
        path = getattr(settings, role)
        if is_url(path):  # a server may move
            name = settings.served_model if role == "model" else settings.labels_served_model
            config |= {role: f"served {name}", f"{role}_server": path}
            config["thinking"] = settings.thinking
        elif path:
            config[role] = path
    return config


def refuse_served_flags(parser, settings, argv: list[str]):
    """An error for names of models without a server, servers without one, and idle flags."""
    by_server = {"--model": is_url(settings.model), "--labels-model": is_url(settings.labels_model)}
    any_server = any(by_server.values())
    has_effect = dict.fromkeys(SERVED_FLAGS, any_server) | {
        "--served-model": by_server["--model"],
        "--labels-served-model": by_server["--labels-model"],
        "--labels-model": settings.labels or settings.format == "mcq",
    }
    refuse_idle(parser, argv, has_effect, f"with --model {settings.model}")
    for flag, name in (
        ("--model", settings.served_model),
        ("--labels-model", settings.labels_served_model),
    ):
        if by_server[flag] and not name:
            wanted = flag.replace("model", "served-model")
            parser.error(f"{flag} is a server's URL. Name one of its models: {wanted} NAME")


def main(argv: list[str] | None = None):
    parser = settings_parser(Settings, __doc__)
    settings = parser.parse_args(argv)
    if not (settings.preview or settings.check or settings.merge or settings.images):
        parser.error(
            "nothing to do: give --images DIR --out DIR, --check DIR, --merge DIR or --preview DIR"
        )
    if settings.font and not settings.font.is_file():
        parser.error(f"--font {settings.font} is no file. Expected a .ttf, .otf or .ttc font")
    if settings.images:
        if settings.out is None:
            parser.error("--images needs --out DIR")
        own_boxes = settings.proposer.endswith(".jsonl") and Path(settings.proposer).is_file()
        if not own_boxes and settings.proposer not in ("mllm", "sam3"):
            parser.error(
                f"--proposer is {settings.proposer!r}. Expected mllm, sam3, or the path of a "
                ".jsonl file of boxes"
            )
        refuse_served_flags(parser, settings, sys.argv[1:] if argv is None else argv)
        synthesize(settings)
    if settings.merge:
        merge(settings.merge, settings.font)
    if settings.check:
        check_triplets(settings.check)
    if settings.preview:
        print(f"drawn: {draw_preview(settings.preview, settings.font)}")


if __name__ == "__main__":
    script.run(main)
