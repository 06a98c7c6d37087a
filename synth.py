"""Triplets (full image with a red box, crop of what it frames, question) made from photographs (paper, section 3.2).

    python synth.py --images DIR --out data/mine [--model ID] [--labels] [--format mcq]     # or under torchrun, then --merge
    python synth.py --check data/mine                                   # is any data set whole?
    python synth.py --preview data/mine                                 # preview.png of any data set: look before you train

What a data set looks like on disk: triplets.py.
"""

import argparse
import hashlib
import json
import math
import os
import random
import re
import time
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError
from tqdm import tqdm

from benchmarks.scoring import ONES, TEENS
from launch.flags import Help
from storage.files import naming_full_disks, write
from storage.images import load_image
from triplets.format import FOLDERS, RED, Triplet, read_triplets, write_sample
from triplets.preview import preview

PROMPTS = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------- rules for texts

VOTES = 8  # answers a question; a label needs more than 3/4 of them
NUMBERS = {word: str(n) for n, word in enumerate([*ONES, *TEENS, "twenty"])}
LONGEST = 200  # times as long as wide: image processors take no more


def read_json(text: str) -> list | None:
    """The JSON objects in a model's reply, else its longest list of texts; None without either: after the last </think>, in
    whatever prose or code fences, with trailing commas, or cut off at the end. It is parsed, never evaluated."""
    text, values = re.sub(r",(?=\s*[\]}])", "", text.rpartition("</think>")[2][:20000]), []
    for part in re.findall(
        r'\{(?:"(?:[^"\\]|\\.)*"|[^{}"])*\}|\[(?:"(?:[^"\\]|\\.)*"|[^\[\]{}"])*\]', text
    ):
        with suppress(ValueError, RecursionError):
            values.append(json.loads(part))
    texts = [
        value
        for value in values
        if isinstance(value, list) and (not value or isinstance(value[0], str))
    ]
    return [value for value in values if isinstance(value, dict)] or max(
        texts, key=len, default=None
    )


def short(text, longest: int = 60) -> str | None:
    """`text` on one line; None when it is no text, empty, too long, or holds <image> or any special token."""
    text = " ".join(text.split()) if isinstance(text, str) else ""
    return (
        text
        if 0 < len(text) <= longest and text.isprintable() and not re.search(r"<\w+>|<\||\|>", text)
        else None
    )


def normal(text: str, question: str = "") -> str:
    """An answer as votes are counted: without lead-in, articles and outer punctuation, numbers as digits, one spelling."""
    text = (
        unicodedata.normalize("NFKC", text).casefold().replace("’", "'").rpartition("</think>")[2]
    )
    boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", text)
    text = re.sub(PROMPTS["lead_in"], "", (boxed[-1] if boxed else text).strip())
    text = (
        re.sub(r"(?<=\d),(?=\d{3}\b)|\b(?:an?|the)\s+", "", text)
        .replace("grey", "gray")
        .replace("colour", "color")
    )
    text = re.sub(r"[^\W\d_]+", lambda word: NUMBERS.get(word[0], word[0]), text)
    text = " ".join(re.sub(r"[^\w.%$€£¥°/:'&+-]", " ", text).split()).strip(" .:'")
    integer = re.search(r"\d+", text) if "how many" in question.casefold() else None
    return integer[0] if integer else text


def leaks(question: str, answer: str) -> bool:
    answer, question = normal(answer), normal(question)
    word = (
        rf"(?<!\w){re.escape(answer)}(?!\w)" if answer.isascii() else re.escape(answer)
    )  # not every script has spaces
    return bool(answer and re.search(word, question))


def fault(item) -> str | None:
    """The first rule that a drafted question breaks, as the reason to count; None for a good one."""
    item = item if isinstance(item, dict) else {}
    question, answer, kind = short(item.get("question"), 200), item.get("answer"), item.get("type")
    answer = short(str(answer) if isinstance(answer, int | float) else answer)
    if not question or not answer:
        return "question_malformed"
    said, reply = unicodedata.normalize("NFKC", question).casefold(), normal(answer)
    broken = {reason: re.search(pattern, said) for reason, pattern in PROMPTS["rules"].items()}
    broken["yes_no"] = broken["yes_no"] or reply in ("yes", "no", "true", "false")
    broken["question_type"] = kind not in PROMPTS["types"]
    broken["leak"] = leaks(question, answer)
    broken["answer_form"] = re.search(PROMPTS["unknown"], reply) or len(answer.split()) > (
        8 if kind == "text" else 4
    )
    return next((reason for reason in broken if broken[reason]), None)


# ---------------------------------------------------------------------------------------------------- loading and geometry


def photograph(root: Path, file: str) -> dict:
    """root/file as file, digest (of its bytes), image (None where `drops`, a count by reason, says why not), notes."""
    path, photo = (
        root / file,
        {"file": file, "digest": "", "image": None, "drops": Counter(), "notes": []},
    )
    try:
        with path.open("rb") as content:
            photo["digest"] = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        with Image.open(path) as header:
            low, high = sorted(header.size)
        reason = (
            "too_large"
            if low * high > 100e6
            else "too_small"
            if low < 448
            else "too_long"
            if high > LONGEST * low
            else None
        )
        photo["image"] = None if reason else load_image(path)
    except Exception as error:  # decoders raise errors of any kind
        reason = {
            UnidentifiedImageError: "not_an_image",
            Image.DecompressionBombError: "too_large",
        }.get(type(error), "corrupt")
        reason = reason if photo["digest"] and path.stat().st_size else "empty_or_unreadable"
        photo["notes"].append(f"{reason}: {error}"[:500])
    photo["drops"][reason] += 1  # None counts what was kept, here and below
    return photo


def grow(box: list[int], by: list[int], size: tuple[int, int]) -> list[int]:
    return [
        max(0, box[0] - by[0]),
        max(0, box[1] - by[1]),
        min(size[0], box[2] + by[0]),
        min(size[1], box[3] + by[1]),
    ]


def geometry(size: tuple[int, int], box: list[int]) -> tuple[int, list[int], list[int]]:
    """(W, H), box -> line width of its frame, frame, window to crop; [x1, y1, x2, y2] px, as measured on the released set."""
    line = min(max(round(min(size) / 300), 2), 16)
    frame = grow(box, [max(round((box[i + 2] - box[i]) / 20), line + 1) for i in (0, 1)], size)
    return line, frame, grow(frame, [round((frame[i + 2] - frame[i]) / 20) for i in (0, 1)], size)


def draw_frame(image: Image.Image, box: list[int]) -> Image.Image:
    """A copy of `image` with a red frame round the box, whose own pixels stay as they are: they are the evidence."""
    (line, frame, _), framed = geometry(image.size, box), image.copy()
    ImageDraw.Draw(framed).rectangle(
        (*frame[:2], frame[2] - 1, frame[3] - 1), outline=RED, width=line
    )
    framed.paste(image.crop(box), box[:2])
    return framed


def cut(image: Image.Image, window: list[int]) -> tuple[Image.Image, float]:
    """The window, enlarged by 2 (more if its short side stays under 64 px, less if it has over 4,194,304 px), and that scale."""
    width, height = window[2] - window[0], window[3] - window[1]
    scale = min(max(2, 64 / min(width, height)), math.sqrt(2**22 / (width * height)))
    return image.crop(window).resize(
        (int(width * scale + 1e-6), int(height * scale + 1e-6)), Image.Resampling.LANCZOS
    ), scale


def same_thing(a: dict, b: dict) -> bool:
    """Whether two regions show one thing: IoU over 0.5, or one lies to 80% in the other and their labels share a word."""
    area = lambda x1, y1, x2, y2: max(0, x2 - x1) * max(0, y2 - y1)
    common = area(*map(max, a["box"][:2], b["box"][:2]), *map(min, a["box"][2:], b["box"][2:]))
    areas, words = (
        [area(*r["box"]) for r in (a, b)],
        [set(normal(r["label"]).split()) for r in (a, b)],
    )
    return (
        common > 0.5 * (sum(areas) - common)
        or common >= 0.8 * min(areas)
        and not words[0].isdisjoint(words[1])
    )


def small_regions(found: list[tuple], size: tuple[int, int], drops: Counter) -> list[dict]:
    """Of one image's (box px, label, score) the first three worth asking about: dicts of box (whole px), label, score."""
    kept, (W, H) = [], size
    for box, label, score in found:
        x1, y1, x2, y2 = box = grow(
            [*map(math.floor, box[:2]), *map(math.ceil, box[2:])], [0, 0], size
        )
        w, h, line = x2 - x1, y2 - y1, geometry(size, box)[0]
        region = {
            "box": box,
            "label": short("this thing" if label is None else label),
            "score": score,
        }
        reason = (
            "bad_box"
            if min(w, h) <= 0 or not region["label"]
            else "box_large"
            if w * h >= 0.1 * W * H
            else "box_small"
            if w * h < 2e-4 * W * H or min(w, h) < 20
            else "box_thin"
            if max(w, h) > 8 * min(w, h)
            else "box_at_edges"
            if sum(room >= line for room in (x1, y1, W - x2, H - y2)) < 2
            # its frame is hidden
            else "box_repeated"
            if any(same_thing(region, other) for other in kept)
            else "box_spare"
            if len(kept) == 3
            else None
        )
        drops[reason] += 1
        kept += [] if reason else [region]
    return kept


# ------------------------------------------------------------------------------------------------------------ the pipeline


def say(
    engine: dict, what: str, rows: list[tuple], tokens: int, group: int = 1, **settings
) -> list[list[str] | None]:
    """The `group` texts replied to each row (photo, key for its seed, image, prompt); None, and counted, where a row alone does not
    fit in memory. engine["batch"] rows at once, halved, for later calls too, whenever memory runs out."""
    from torch import OutOfMemoryError

    import rollout

    seeds = [
        hashlib.sha256(repr((engine["seed"], what, key)).encode()).digest() for _, key, _, _ in rows
    ]
    said, most = [], engine["batch"]
    while len(said) < len(rows):
        part = slice(len(said), len(said) + engine["batch"])
        photos, _, images, prompts = map(list, zip(*rows[part]))
        try:
            replies = rollout.answers(
                *engine["model"],
                images,
                prompts,
                max_new_tokens=tokens,
                group=group,
                seeds=[int.from_bytes(seed[:7]) for seed in seeds[part]],
                **settings,
            )
            said += [
                [reply.output for reply in replies[k : k + group]]
                for k in range(0, len(replies), group)
            ]
        except OutOfMemoryError:
            if len(photos) == 1:  # this row's fault, not the batch's
                said.append(None)
                photos[0]["drops"]["out_of_memory"] += 1
            engine["batch"] = most if len(photos) == 1 else len(photos) // 2
    return said


def ask(
    engine: dict, what: str, rows: list[tuple], tokens: int, temperature: float = 0
) -> list[list | None]:
    """The JSON list replied to each row, see `say`. Without one it is asked for once more, warmer; then it is None, counted as
    `what`_malformed, and the text is noted."""
    said = say(engine, what, rows, tokens, temperature=temperature)
    lists = [texts and read_json(texts[0]) for texts in said]
    bad = [i for i, items in enumerate(lists) if items is None and said[i]]
    if not temperature:
        for i, items in zip(bad, ask(engine, what, [rows[i] for i in bad], tokens, 0.7)):
            lists[i] = items
        return lists
    for i in bad:
        rows[i][0]["drops"][f"{what}_malformed"] += 1
        rows[i][0]["notes"].append(f"{what}_malformed: {said[i][0][:500]}")
    return lists


def propose(engine: dict, photos: list[dict]) -> list[dict]:
    """The regions of all photos, with photo, frame, window, crop (clean), scale, id: boxed by the model, by SAM 3 which is given
    the model's names, or beforehand."""
    photos, sam, regions = [photo for photo in photos if photo["image"]], engine["sam3"], []
    if engine["boxes"] is None:
        rows = [
            (p, p["digest"], p["image"], PROMPTS["find"] + PROMPTS["names" if sam else "boxes"])
            for p in photos
        ]
        lists = [items or [] for items in ask(engine, "boxes", rows, 1024)]
        boxed = [
            sam3_boxes(*sam, photo, items) if sam else replied_boxes(photo, items)
            for photo, items in zip(photos, lists)
        ]
    else:
        boxed = [engine["boxes"].get(photo["file"], []) for photo in photos]
    for photo, found in zip(photos, boxed):
        size, drops = photo["image"].size, photo["drops"]
        drops["nothing_found"] += not found and not any(n for reason, n in drops.items() if reason)
        for r in small_regions(found, size, drops):
            _, frame, window = geometry(size, r["box"])
            crop, scale = cut(photo["image"], window)
            regions.append(
                r
                | {
                    "photo": photo,
                    "frame": frame,
                    "window": window,
                    "crop": crop,
                    "scale": round(scale, 4),
                    "id": "-".join([photo["digest"], *map(str, r["box"])]),
                }
            )
    return regions


def is_box(box) -> bool:
    """Whether this is four finite numbers, x1 < x2 and y1 < y2 (NaN fails, so do booleans)."""
    numbers = (
        isinstance(box, list)
        and [type(v) in (int, float) and abs(v) < 1e9 for v in box] == [True] * 4
    )
    return numbers and box[0] < box[2] and box[1] < box[3]


def replied_boxes(photo: dict, items: list) -> list[tuple]:
    """(box px, name, None) of each well-formed {"bbox_2d": [x1, y1, x2, y2] in thousandths, "label": name}."""
    found = []
    for item in items:
        box, name = (
            (item.get("bbox_2d"), item.get("label")) if isinstance(item, dict) else (None, None)
        )
        good = is_box(box) and 0 <= min(box) and max(box) <= 1000 and short(name)
        photo["drops"][None if good else "bad_box"] += 1
        found += (
            [([v * side / 1000 for v, side in zip(box, photo["image"].size * 2)], name, None)]
            if good
            else []
        )
    return found


def sam3_boxes(sam, tokenizer, photo: dict, items: list) -> list[tuple]:
    """(box px, name, score) of each name of which SAM 3 sees exactly one (score > 0.5), and that with a score of at least 0.75.

    Without its image processor, which needs torchvision: bilinear to 1008 x 1008 px, values in [-1, 1].
    """
    import torch

    names = [short(item.get("label") if isinstance(item, dict) else item) for item in items]
    photo["drops"]["name_malformed"] += names.count(None)
    names, side, found = list(dict.fromkeys(filter(None, names)))[:8], sam.config.image_size, []
    if not names:
        return found
    pixels = (
        np.asarray(photo["image"].resize((side, side), Image.Resampling.BILINEAR), np.float32)
        / 127.5
        - 1
    )
    words = tokenizer(
        names, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
    )  # (names, 32)
    try:
        with torch.inference_mode():
            seen = sam.get_vision_features(
                torch.from_numpy(pixels).permute(2, 0, 1)[None].to(sam.device)
            )  # (1, 3, S, S)
            for maps in (
                "fpn_hidden_states",
                "fpn_position_encoding",
            ):  # computed once, shown to every name
                seen[maps] = tuple(part.expand(len(names), -1, -1, -1) for part in seen[maps])
            out = sam(vision_embeds=seen, **words.to(sam.device))
    except torch.OutOfMemoryError:
        photo["drops"]["out_of_memory"] += 1
        return found
    scores = (
        out.pred_logits.sigmoid() * out.presence_logits.sigmoid()
    ).cpu()  # (names, queries) * (names, 1)
    boxes = out.pred_boxes.cpu() * torch.tensor(photo["image"].size * 2)  # (names, queries, 4)
    for name, score, box in zip(names, scores, boxes):
        count, best = int((score > 0.5).sum()), score.argmax()
        good = count == 1 and score[best] >= 0.75
        photo["drops"][None if good else "name_ambiguous" if count > 1 else "name_not_found"] += 1
        found += [(box[best].tolist(), name, round(score[best].item(), 4))] if good else []
    return found


def question(engine: dict, regions: list[dict]) -> None:
    """Gives each region up to 3 questions, asked of its crop alone: r["questions"], of question, answer, type, n."""
    types = ", ".join(PROMPTS["types"])
    rows = [(r["photo"], r["id"], r["crop"], PROMPTS["ask"] % (r["label"], types)) for r in regions]
    for r, items in zip(regions, ask(engine, "questions", rows, 512)):
        r["questions"] = []
        r["photo"]["drops"]["no_question"] += items == []
        for n, item in enumerate(items or []):
            reason = "question_spare" if n >= 3 else fault(item)
            r["photo"]["drops"][reason] += 1
            if not reason:
                r["questions"].append(
                    {
                        "question": short(item["question"], 200),
                        "answer": short(str(item["answer"])),
                        "type": item["type"],
                        "n": n,
                    }
                )


def label(engine: dict, regions: list[dict]) -> None:
    """Replaces drafted answers by what at least 7 of 8 sampled ones agree on; without such a majority the question goes."""
    asked = [(r, q) for r in regions for q in r["questions"]]
    rows = [
        (r["photo"], (r["id"], q["n"]), r["crop"], PROMPTS["vote"] % q["question"])
        for r, q in asked
    ]
    for r in regions:
        r["questions"] = []
    for (r, q), texts in zip(asked, say(engine, "label", rows, 32, temperature=1.0, group=VOTES)):
        votes = {}
        for text in filter(None, map(short, texts or [])):
            said = re.sub(PROMPTS["lead_in"], "", text, flags=re.I).strip(" .")
            votes.setdefault(normal(text, q["question"]), []).append(said)
        same = max(votes.values(), key=len, default=[])
        labelled = q | {
            "answer": min(same, key=len, default=""),
            "draft": q["answer"],
            "votes": [len(same), VOTES],
        }
        reason = "no_consensus" if len(same) <= 0.75 * VOTES else fault(labelled)
        r["photo"]["drops"][reason] += texts is not None  # else out_of_memory, counted already
        r["questions"] += [] if reason else [labelled]


def choices(engine: dict, regions: list[dict]) -> None:
    """Gives each region's first question three wrong options of the same kind, shuffled by the id."""
    for r in regions:
        r["photo"]["drops"]["question_spare"] += len(r["questions"][1:])
        del r["questions"][1:]
    firsts = [(r, q) for r in regions for q in r["questions"]]
    rows = [
        (r["photo"], r["id"], r["crop"], PROMPTS["wrong"] % (q["question"], q["answer"]))
        for r, q in firsts
    ]
    for (r, q), items in zip(firsts, ask(engine, "options", rows, 128)):
        options = {normal(q["answer"], q["question"]): q["answer"]}
        for wrong in filter(None, map(short, items or [])):
            if not re.search(PROMPTS["unknown"], normal(wrong)):
                options.setdefault(normal(wrong, q["question"]), wrong)
        q["options"] = list(options.values())[:4]
        random.Random(f"{r['id']}-{q['n']}").shuffle(q["options"])
        if len(q["options"]) < 4:
            r["photo"]["drops"]["options_too_few"] += items is not None
            r["questions"] = []


def finish(r: dict, args, mark: str) -> dict:
    """Draws and saves a region with its first question: the row of train.jsonl."""
    photo, q = r["photo"], r["questions"][0]
    text, answer = q["question"] + PROMPTS["hint"], q["answer"] if args.labels else None
    if args.format == "mcq":
        text += (
            "\n\n"
            + "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", q["options"]))
            + PROMPTS["choose"]
        )
        answer = "ABCD"[q["options"].index(q["answer"])]
    extra = {
        "source": photo["file"].encode(errors="backslashreplace").decode(),
        "source_size": photo["image"].size,
        **{key: r[key] for key in ("box", "frame", "window", "scale", "label", "score")},
        "draft": q.get("draft", q["answer"]),
        "type": q["type"],
        "votes": q.get("votes"),
        "config": mark,
        "seed": args.seed,
    }
    framed = draw_frame(photo["image"], r["box"])
    crop = r["crop"] if args.clean_crop else cut(framed, r["window"])[0]
    return write_sample(
        args.out,
        Triplet(f"{r['id']}-{q['n']}", text, framed, crop, r["box"], answer, extra),
        f".{args.full}",
    )


# ----------------------------------------------------------------------------------------------------------------- running


def configuration(args) -> dict:
    """What the samples depend on: a run is not resumed with anything else."""
    keys = ("model", "proposer", "sam3", "labels", "format", "clean_crop", "full", "seed")
    texts = repr(PROMPTS).encode() + (
        Path(args.proposer).read_bytes() if args.proposer.endswith(".jsonl") else b""
    )
    return {key: getattr(args, key) for key in keys} | {
        "images": str(args.images.resolve()),
        "texts": hashlib.sha256(texts).hexdigest()[:12],
    }


def read_boxes(path: Path) -> dict[str, list[tuple]]:
    """Boxes one already has: {image: [(box px, label or None, None)]}. Raises ValueError with the line."""
    given = {}
    for n, line in (
        (n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()
    ):
        try:
            row = json.loads(line)
            boxes, labels = row["boxes"], row.get("labels") or [None] * len(row["boxes"])
            if not all(map(is_box, boxes)):
                raise ValueError(f"{boxes} are not all boxes")
            given.setdefault(row["image"], []).extend(
                zip(boxes, labels, [None] * len(boxes), strict=True)
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {n}: {error!r}. Expected image (its path under --images), boxes ([[x1, y1, x2, y2], "
                "..] px of the upright image) and, if you like, as many labels."
            ) from error
    return given


def read_parts(out: Path, config: dict | None = None) -> Iterator[dict]:
    """Every whole line of every rank: {"config": ..}, which must be `config` or everywhere the same, or a finished photograph."""
    for path in sorted((out / ".parts").glob("*.jsonl")):
        with path.open("rb") as lines:
            for line in (line for line in lines if line.endswith(b"\n")):  # else torn by a kill
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{path} has a damaged line ({error}). Delete it: its photographs are done again."
                    ) from error
                found = row.get("config", config) or {}
                config = config or found
                if differs := {
                    k: (found.get(k), config.get(k))
                    for k in {*found, *config}
                    if found.get(k) != config.get(k)
                }:
                    raise FileExistsError(
                        f"{path} was made with another configuration; (found, wanted) is {differs}. Run again "
                        "with the same one, or choose another --out."
                    )
                yield row


def load_engine(args) -> dict:
    """The models on this rank's device, loaded before the first photograph. Raises, naming the way out."""
    import torch

    import model as M

    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    engine = {
        "model": M.load(
            args.model, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16
        )
    }
    if args.proposer == "sam3":
        from transformers import CLIPTokenizer, Sam3Model

        try:
            engine["sam3"] = (
                Sam3Model.from_pretrained(args.sam3).to(device).eval(),
                CLIPTokenizer.from_pretrained(args.sam3),
            )
        except Exception as error:  # network, name, gate, disk
            raise FileNotFoundError(
                f"--sam3 {args.sam3} is no SAM 3 here, and the hub gave none ({type(error).__name__}: {error}). It is gated: "
                "accept its terms on the hub and `hf auth login`, point --sam3 at a folder, or take --proposer mllm."
            ) from error
    return engine


def run(args) -> None:
    """This rank's photographs -> images, and lines in .parts; without torchrun, the whole data set.

    A photograph belongs to rank sha256(relative path) % world. Its line, appended after its images, holds its samples and says
    that it is done; one that was killed before is done anew, under the same names.
    """
    rank, world, out = (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
        args.out,
    )
    config, boxes = (
        configuration(args),
        read_boxes(Path(args.proposer)) if args.proposer.endswith(".jsonl") else None,
    )
    mark = hashlib.sha256(json.dumps(config | {"images": ""}, sort_keys=True).encode()).hexdigest()[
        :12
    ]
    if (out / "train.jsonl").exists() and not (out / ".parts").is_dir():
        raise FileExistsError(f"{out} holds another data set. Choose another --out.")
    root, own = args.images.resolve(), out.resolve()
    if own == root or own in root.parents:
        raise ValueError(
            f"--out {out} is or holds --images {args.images}: what is written there would be taken for photographs. "
            "Choose an --out beside it, or inside it."
        )
    paths = [
        path.relative_to(root)
        for path in sorted(root.rglob("*"))
        if path.is_file() and own not in path.parents
    ]
    files = [
        path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)
    ]
    if not files:
        raise FileNotFoundError(
            f"--images {args.images} holds no files. Expected a folder of photographs."
        )
    if rank == 0 and (lost := sorted({*(boxes or ())}.difference(files), key=str)):
        print(
            f"warning: {args.proposer} names {len(lost)} images that are not under {args.images}, the first {lost[0]!r}"
        )
    files = [
        file
        for file in files
        if int(hashlib.sha256(os.fsencode(file)).hexdigest(), 16) % world == rank
    ]
    done = {row["file"] for row in read_parts(out, config) if "file" in row}
    todo = [file for file in files if file not in done]
    engine = {"seed": args.seed, "batch": args.batch, "boxes": boxes, "sam3": None} | (
        load_engine(args) if todo else {}
    )
    stages = [
        question,
        *[label] * (args.labels or args.format == "mcq"),
        *[choices] * (args.format == "mcq"),
    ]
    for key in (*FOLDERS, ".parts"):
        (out / key).mkdir(parents=True, exist_ok=True)
    path, kept, dropped = out / ".parts" / f"{rank:05d}.jsonl", 0, 0
    with (
        naming_full_disks(out),
        path.open("a+b") as part,
        ThreadPoolExecutor(args.workers) as pool,
        tqdm(
            total=len(files), initial=len(files) - len(todo), unit="image", disable=rank > 0
        ) as bar,
    ):
        part.truncate(end := path.read_bytes().rfind(b"\n") + 1)  # cuts a torn last line
        part.write(b"" if end else json.dumps({"config": config}).encode() + b"\n")
        load = lambda at: [
            pool.submit(photograph, root, file) for file in todo[at : at + args.batch]
        ]
        ahead = load(0)
        for at in range(0, len(todo), args.batch):
            clock = {"start": time.perf_counter()}
            photos, ahead = [photo.result() for photo in ahead], load(at + args.batch)
            clock["load"] = time.perf_counter()
            regions = propose(engine, photos)
            clock["propose"] = time.perf_counter()
            for stage in stages:
                stage(engine, regions)
                clock[stage.__name__] = time.perf_counter()
            ready = [r for r in regions if r["questions"]]
            rows = list(pool.map(lambda r: finish(r, args, mark), ready))
            clock["write"] = time.perf_counter()
            seconds = {
                name: round((clock[name] - start) / len(photos), 4)
                for name, start in zip([*clock][1:], clock.values())
            }
            for r in ready:
                r["photo"]["drops"]["question_spare"] += len(r["questions"]) - 1
            for photo in photos:
                drops = {reason: n for reason, n in photo["drops"].items() if reason and n}
                samples = [row for r, row in zip(ready, rows) if r["photo"] is photo]
                part.write(
                    json.dumps(
                        {
                            "file": photo["file"],
                            "digest": photo["digest"],
                            "drops": drops,
                            "notes": photo["notes"],
                            "seconds": seconds,
                            "samples": samples,
                        }
                    ).encode()
                    + b"\n"
                )
                kept, dropped = kept + len(samples), dropped + sum(drops.values())
            part.flush()
            bar.update(len(photos))
            bar.set_postfix_str(f"{kept} kept, {dropped} dropped")
    if world == 1:
        merge(out, args.font)
    elif rank == 0:
        print(f"When all ranks have ended: python synth.py --merge {out}")


def merge(out: Path, font: Path | None = None) -> None:
    """What the ranks have done so far -> train.jsonl (sorted by id), stats.json, preview.png; repeating it changes nothing.

    The same bytes under several names count once, under the first name. Raises ValueError with the drops without any sample.
    """
    config, done, drops, seconds, notes, rows, seen = {}, {}, Counter(), Counter(), [], [], set()
    for line in read_parts(out):
        config = line.get("config", config)
        done |= {line["file"]: line} if "file" in line else {}
    if not done:
        raise FileNotFoundError(
            f"{out} holds no finished photographs. Expected the --out of a run: give that, or run it first."
        )
    for _, line in sorted(done.items()):
        seconds.update(line["seconds"])
        if line["digest"] in seen:
            drops["duplicate"] += 1
            continue
        seen |= {line["digest"]} - {""}
        drops.update(line["drops"])
        notes += [f"{line['file']}: {note}" for note in line["notes"]]
        rows += line["samples"]
    rows.sort(key=lambda row: row["extra_info"]["id"])
    stats = {
        "photographs": len(done),
        "samples": len(rows),
        "dropped": dict(drops.most_common()),
        "notes": notes[:50],
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "config": config,
        "photographs_per_second_and_rank": round(len(done) / max(seconds.total(), 1e-9), 3),
    }
    write(out / "stats.json", json.dumps(stats, indent=1) + "\n")
    table = (
        "".join(f"\n  {count:8,} {reason}" for reason, count in drops.most_common()) or " nothing"
    )
    if not rows:
        raise ValueError(
            f"{out}: no sample from {len(done)} photographs (replies: stats.json). Dropped, by reason:{table}"
        )
    write(out / "train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for path in out.rglob(".tmp-*"):  # of killed processes
        with suppress(FileNotFoundError):  # a living rank's has become an image
            if time.time() - path.stat().st_mtime > 600:
                path.unlink()
    print(f"{out}: {len(rows)} samples of {len(done)} photographs; dropped, by reason:{table}")
    print(
        *(f"warning: {warning}\n" for warning in balance(read_triplets(out))),
        f"drawn: {preview(out, font)}",
        sep="",
    )


# ------------------------------------------------------------------------------------------------------------ checking


def balance(samples: list[Triplet]) -> list[str]:
    """Warnings: answers in their own question, one answer over 10% or one type over 35% of the samples."""
    answers, leaky = [], []
    for sample in samples:  # of "A. bark" lines: the option's text
        stem, *lines = re.split(
            r"\n+(?=\(?[A-H][.)] )", sample.question.replace(PROMPTS["hint"], "")
        )  # it says "red"
        options = {line.strip("(")[0]: line.strip("(")[3:].split("\n")[0] for line in lines}
        answer = options.get(sample.answer, sample.answer) or ""
        answers += [normal(answer)] if answer else []
        leaky += [sample.id] if leaks(stem, answer) else []
    found = [f"{len(leaky)} questions contain their answer, the first {leaky[:5]}"] if leaky else []
    types = [
        sample.extra["type"] for sample in samples if isinstance(sample.extra.get("type"), str)
    ]
    for what, limit, values in (("answer", 0.1, answers), ("type", 0.35, types)):
        found += [
            f"{n} of {len(values)} {what}s are {value!r}, over {limit:.0%}"
            for value, n in Counter(values).items()
            if n > max(1, limit * len(values))
        ]
    return found


def flaw(sample: Triplet) -> str | None:
    """What is wrong with a sample's images or box, if anything."""
    try:
        (W, H), crop, box = load_image(sample.image).size, load_image(sample.crop).size, sample.bbox
    except (OSError, ValueError) as error:
        return f"sample {sample.id}: {error}"
    if max(max(size) / min(size) for size in ((W, H), crop)) > LONGEST:
        return f"sample {sample.id}: {W} x {H} px, crop {crop[0]} x {crop[1]}. Expected under {LONGEST} : 1: leave it out."
    if box and not (0 <= box[0] < box[2] <= W and 0 <= box[1] < box[3] <= H):
        return f"sample {sample.id}: bbox is {box}. Expected x1 < x2 <= {W}, y1 < y2 <= {H}: correct it, or write null."


def check(folder: Path) -> None:
    """Prints what is wrong with any data set, and what looks wrong. Raises ValueError when there are errors."""
    samples = read_triplets(folder, errors := [])
    with ThreadPoolExecutor() as pool:
        errors += filter(
            None, tqdm(pool.map(flaw, samples), "check", len(samples), unit="row", disable=None)
        )
    print(
        *(f"error: {error}\n" for error in errors),
        *(f"warning: {warning}\n" for warning in balance(samples)),
        sep="",
        end="",
    )
    boxes, answers = (
        sum(getattr(sample, key) is not None for sample in samples) for key in ("bbox", "answer")
    )
    print(
        f"{folder}: {len(samples)} well-formed rows, {boxes} with a box, {answers} with an answer; {len(errors)} errors"
    )
    if errors:
        raise ValueError(
            f"{folder} has {len(errors)} errors and {len(samples)} well-formed rows. Correct or remove what is named."
        )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    flag = argparse.BooleanOptionalAction
    # data sets that are there
    p.add_argument(
        "--preview",
        type=Path,
        metavar="DIR",
        help="draw DIR/preview.png: 24 triplets of that data set",
    )
    p.add_argument(
        "--check",
        type=Path,
        metavar="DIR",
        help="list everything wrong with a data set; exit 1 if there is",
    )
    p.add_argument(
        "--merge",
        type=Path,
        metavar="DIR",
        help="what ranks made -> train.jsonl, stats.json, preview.png",
    )
    p.add_argument(
        "--font",
        type=Path,
        metavar="FILE",
        help="of the preview, for scripts that Pillow's own font lacks",
    )
    # photographs into triplets (paper, section 3.2)
    p.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="photographs, in folders of any depth (not hidden or linked ones)",
    )
    p.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write; an interrupted run goes on"
    )
    p.add_argument(
        "--model", default="Qwen/Qwen3.5-4B", help="hub id or directory (ours: the student itself)"
    )
    p.add_argument(
        "--proposer",
        default="mllm",
        help="what boxes things: mllm (--model does; ours: no second download), sam3 "
        "(the paper's), or your own .jsonl: {image, boxes: [[x1, y1, x2, y2] px, ..], labels}",
    )
    p.add_argument(
        "--sam3", default="facebook/sam3", help="hub id or directory, for --proposer sam3"
    )
    p.add_argument(
        "--labels",
        action=flag,
        default=False,
        help=f"write answers on which over 3/4 of {VOTES} samples agree",
    )
    p.add_argument(
        "--format",
        choices=["open", "mcq"],
        default="open",
        help="mcq: four options, a letter, labels, as released "
        "(ours: open, the method needs no labels)",
    )
    p.add_argument("--clean-crop", action=flag, default=False, help="crops without the red frame")
    p.add_argument(
        "--full",
        choices=["jpg", "png"],
        default="jpg",
        help="full images; png keeps every bit, 20 times slower",
    )
    p.add_argument("--seed", type=int, default=0, help="of all that is sampled")
    p.add_argument(
        "--batch",
        type=int,
        default=16,
        help="photographs, and prompts, at once; halved when memory runs out",
    )
    p.add_argument("--workers", type=int, default=4, help="threads that decode and encode images")
    args = p.parse_args()
    if not (args.preview or args.check or args.merge or args.images):
        p.error(
            "nothing to do: give --images DIR --out DIR, --check DIR, --merge DIR or --preview DIR"
        )
    if args.images and (args.out is None or min(args.batch, args.workers) < 1):
        p.error("--images needs --out DIR, --batch and --workers >= 1")
    if args.font and not args.font.is_file():
        p.error(f"--font {args.font} is no file. Expected a .ttf, .otf or .ttc font")
    known = (
        args.proposer in ("mllm", "sam3")
        or args.proposer.endswith(".jsonl")
        and Path(args.proposer).is_file()
    )
    if args.images and not known:
        p.error(
            f"--proposer is {args.proposer!r}. Expected mllm, sam3, or the path of a .jsonl file of boxes"
        )
    if args.images:
        run(args)
    if args.merge:
        merge(args.merge, args.font)
    if args.check:
        check(args.check)
    if args.preview:
        print(f"drawn: {preview(args.preview, args.font)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"synth.py: {error}") from error
