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
from served.client import Client, is_url
from storage.files import hold, naming_full_disks
from synthesis.asking import Local, Request, Served
from synthesis.checking import check_triplets
from synthesis.parts import PLACES, merge, open_part, read_parts
from synthesis.photos import Photo, photograph_files, photos_ahead, rank_of
from synthesis.proposers import Sam3, given_boxes, read_boxes, replied_boxes
from synthesis.regions import Region, cut, enlargement, small_regions
from synthesis.texts import PROMPTS, broken_rule, drafted, json_in_reply, normal, one_line
from triplets.format import FOLDERS, Triplet, write_sample
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
    regions = propose(engine, photos)
    yield "propose"
    ask_questions(engine, regions)
    yield "question"
    if engine.settings.labels or mcq:
        vote(engine, regions)
        yield "label"
    regions = [region for region in regions if region.questions]
    for region in regions:
        region.photo.drops["question_spare"] += len(region.questions) - 1
    if mcq:
        regions = add_options(engine, regions)
        yield "choices"
    rows = pool.map(partial(draw_triplet, engine), regions)
    for region, row in zip(regions, rows, strict=True):
        region.photo.samples.append(row)
    yield "write"


def propose(engine, photos: list[Photo]) -> list[Region]:
    """The small regions of all photographs."""
    photos = [photo for photo in photos if photo.image]
    replies = [[]] * len(photos)
    if engine.find:
        prompt = PROMPTS["find"] + engine.find
        requests = [Request(photo, photo.digest, [photo.image], prompt) for photo in photos]
        replies = reply_lists(engine, "boxes", requests, 1024)
    regions = []
    for photo, items in zip(photos, replies, strict=True):
        found = engine.boxes_in(photo, items or [])
        if not found and not photo.drops.total():
            photo.drop("nothing_found")
        regions += small_regions(photo, found)
    return regions


def ask_questions(engine, regions: list[Region]):
    """Gives each region up to 3 questions, asked of its crop alone, that break no rule."""
    types = ", ".join(PROMPTS["types"])
    requests = [
        Request(region.photo, region.id, [region.crop], PROMPTS["ask"] % (region.label, types))
        for region in regions
    ]
    replies = reply_lists(engine, "questions", requests, 512)
    for region, items in zip(regions, replies, strict=True):
        if items == []:
            region.photo.drop("no_question")
        for n, item in enumerate(items or []):
            draft = drafted(item, n)
            reason = "question_spare" if n >= 3 else broken_rule(draft)
            if reason:
                region.photo.drop(reason)
            else:
                region.questions.append(draft)


def vote(engine, regions: list[Region]):
    """Consensus: replaces drafted answers by what at least 7 of 8 sampled ones agree on; without
    such a majority the question goes."""
    asked = [(region, draft) for region in regions for draft in region.questions]
    requests = [
        Request(region.photo, (region.id, draft.n), [region.crop], PROMPTS["vote"] % draft.question)
        for region, draft in asked
    ]
    replies = reply_texts(engine, "label", requests, 32, group=VOTES, temperature=1.0)
    for n, (region, draft) in enumerate(asked):
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
            region.questions.remove(draft)
            if None not in texts:  # else it was out of memory, and counted
                region.photo.drop(reason)


def add_options(engine, regions: list[Region]) -> list[Region]:
    """Gives each region's first question three wrong options of the same kind, shuffled by the id.
    Returns the regions for which there are so many."""
    asked = [(region, region.questions[0]) for region in regions]
    requests = [
        Request(region.photo, region.id, [region.crop], PROMPTS["wrong"] % (q.question, q.answer))
        for region, q in asked
    ]
    replies = reply_lists(engine, "options", requests, 128)
    complete = []
    for (region, draft), items in zip(asked, replies, strict=True):
        options = {normal(draft.answer, draft.question): draft.answer}
        for wrong in filter(None, map(one_line, items or [])):
            if not re.search(PROMPTS["unknown"], normal(wrong)):
                options.setdefault(normal(wrong, draft.question), wrong)
        draft.options = list(options.values())[:4]
        random.Random(f"{region.id}-{draft.n}").shuffle(draft.options)
        if len(draft.options) == 4:
            complete.append(region)
        elif items is not None:  # else counted already
            region.photo.drop("options_too_few")
    return complete


def draw_triplet(engine, region: Region) -> dict:
    """Draws and saves a region with its first question: the row of train.jsonl."""
    settings = engine.settings
    photo = region.photo
    window = region.window
    draft = region.questions[0]
    text = draft.question + PROMPTS["hint"]
    answer = draft.answer if settings.labels else None
    if draft.options:
        lines = map("{}. {}".format, "ABCD", draft.options)
        text += "\n\n" + "\n".join(lines) + PROMPTS["choose"]
        answer = "ABCD"[draft.options.index(draft.answer)]
    framed = region.framed()
    crop = region.crop if settings.clean_crop else cut(framed, window)
    extra = {
        "source": photo.file.encode(errors="backslashreplace").decode(),
        "source_size": photo.image.size,
        "box": region.box,
        "frame": region.frame,
        "window": window,
        "scale": round(enlargement(window), 4),
        "label": region.label,
        "score": region.score,
        "draft": draft.draft,
        "type": draft.type,
        "votes": draft.votes,
        "config": engine.mark,
        "seed": settings.seed,
    }
    sample = Triplet(f"{region.id}-{draft.n}", text, framed, crop, region.box, answer, extra)
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
    anywhere = {key: value for key, value in config.items() if key not in PLACES} | {"images": ""}
    mark = hashlib.sha256(json.dumps(anywhere, sort_keys=True).encode()).hexdigest()[:12]
    return Engine(asked, labeller, settings, mark, find, boxes_in)


def device_here() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def open_model(settings, path: str, served_model: str | None) -> Local | Served:
    """A model, loaded, or the client of the server that has it."""
    if is_url(path):
        client = Client(
            path,
            served_model,
            settings.concurrency,
            settings.thinking,
            settings.deadline,
            settings.max_image_mb,
        )
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
    keys = ("model", "proposer", "sam3", "labels", "format", "clean_crop", "full", "seed")
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
