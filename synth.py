"""Triplets (full image with a red box, crop of what it frames, question): made from photographs (paper, section 3.2), and
their format on disk.

    python synth.py --images DIR --out data/mine [--model ID] [--labels] [--format mcq]     # or under torchrun, then --merge
    python synth.py --check data/mine                                   # is any data set whole?
    python synth.py --preview data/mine                                 # preview.png of any data set: look before you train

A data set is a folder with `train.jsonl`, `images/` and `teacher_images/`, as released with the paper (Vision-OPD-6K). The
student sees images[0], the teacher teacher_images[0], both the same question.
"""
import argparse
import errno
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import tarfile
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

RED = (255, 0, 0)                                          # the box
FOLDERS = ("images", "teacher_images")                     # of full images and of crops; keys of a row as well
IMAGE_TAG = re.compile(r"<image>|<video>|<\|(?:image|video|vision)_\w+\|>")     # each would change the number of images


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as upright 8-bit RGB: EXIF rotation applied, 16-bit shifted to 8, alpha laid on white, CMYK
    converted, the first frame of an animation. All of it is decoded, so a truncated file raises here and not later.

    Raises FileNotFoundError, or ValueError for what is no picture or not whole; both name the file and what to do.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if Path(path).is_dir() else 'not there'}. Expected an image file.")
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "I" or image.mode.startswith("I;16"):              # plain conversion would saturate
                return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
            if image.mode == "F":
                raise ValueError("floating point pixels of unknown range; expected 8 or 16 bits a channel.")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:                                                  # decoders raise errors of any kind
        raise ValueError(f"{path} ({Path(path).stat().st_size:,} bytes) cannot be read whole as a picture: {error} "
                         "Fetch or save the file again, or take it out of the data.") from error


@contextmanager
def naming_full_disks(folder: Path):
    """Turns 'no space left' under `folder` into an error that says where, how much is free, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        raise OSError(error.errno, f"no space left for {folder} ({shutil.disk_usage(there).free / 1e6:,.0f} MB free, less "
                      "with a quota). Nothing is half-written: make room or choose another disk, and run again") from error


# ------------------------------------------------------------------------------------------------- the format on disk

def read_triplets(folder: str | Path) -> list[dict]:
    """The rows of folder/train.jsonl in file order, every one of them checked.

    Returns dicts: id (str, unique: extra_info.id, else the row's number), question (without the <image> tag, hint kept),
    image and crop (Path), answer (str or None), bbox ([x1, y1, x2, y2] px or None), extra (extra_info, whole).
    Raises FileNotFoundError / ValueError with file and line for broken JSON, a missing key or file, a repeated id, no rows.
    """
    samples = []
    for sample in each_triplet(Path(folder)):
        if isinstance(sample, Exception):
            raise sample
        samples.append(sample)
    if not samples:
        raise ValueError(f"{folder}/train.jsonl holds no rows. Expected an object a line; fetch or write the data set again.")
    return samples


def each_triplet(folder: Path) -> Iterator[dict | Exception]:
    """The rows one by one; in place of a bad one its error."""
    path, seen, number = folder / "train.jsonl", {}, 0
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:10] if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} has no train.jsonl ({there}). Expected a data set; point --data at its folder.")
    listed = cache(lambda place: set(os.listdir(place)) if place.is_dir() else set())      # instead of a stat per file
    for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            sample = read_row(line, f"{path}, line {n}", number, folder, listed)
            if (first := seen.setdefault(sample["id"], n)) != n:
                raise ValueError(f"{path}, line {n}: id {sample['id']!r} is that of line {first} too. Expected unique ids: "
                                 "remove one line, or leave extra_info.id out everywhere to have the rows numbered.")
            yield sample
        except (ValueError, FileNotFoundError) as error:
            yield error
        number += 1


def read_row(line: bytes, where: str, number: int, folder: Path, listed) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:                                                 # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{where}: no JSON ({error}): {line[:60]!r}. Expected an object a line; fetch the file again "
                         "if it is cut off, or if these are the lines of a git-lfs pointer.") from error
    if not isinstance(row, dict) or not {"problem", *FOLDERS} <= row.keys():
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: found {found}. Expected the keys problem, images and teacher_images: add them.")
    problem, box, files = row["problem"], row.get("bbox"), {}
    tags = IMAGE_TAG.findall(problem) if isinstance(problem, str) else []
    if tags != ["<image>"] or not problem.startswith("<image>") or not problem[7:].strip():
        raise ValueError(f"{where}: problem is {str(problem)[:80]!r} with the image tags {tags}. Expected one <image>, "
                         "at the start, then a newline and the question: rewrite or remove the line.")
    if box is not None and not (isinstance(box, list) and [isinstance(v, int | float) for v in box] == [True] * 4):
        raise ValueError(f"{where}: bbox is {box!r}. Expected [x1, y1, x2, y2] in pixels, or null.")
    for key in FOLDERS:
        if not (isinstance(row[key], list) and len(row[key]) == 1 and isinstance(row[key][0], str)):
            raise ValueError(f"{where}: {key} is {row[key]!r}. Expected a list of one file name.")
        files[key] = folder / row[key][0]
        if files[key].name not in listed(files[key].parent):
            raise FileNotFoundError(
                f"{where}: {key}[0] is {row[key][0]!r}, and no such file is under {folder}. Unpack the archives first, "
                "or point --data at the folder that holds train.jsonl.")
    extra, answer = row.get("extra_info") or {}, row.get("answer")
    if not isinstance(extra, dict):
        raise ValueError(f"{where}: extra_info is {extra!r}. Expected an object: correct it or leave it out.")
    return {"id": f"{number:06d}" if extra.get("id") is None else str(extra["id"]), "image": files["images"],
            "question": problem.removeprefix("<image>").removeprefix("\n"), "crop": files["teacher_images"], "bbox": box,
            "extra": extra, "answer": None if answer in (None, "") else str(answer)}


def save(image: Image.Image, path: Path) -> None:
    """PNG, or JPEG at quality 95 with full colour resolution, by the suffix; under its own name only when it is whole."""
    scratch = path.with_name(f".tmp-{os.urandom(6).hex()}-{path.name}")      # its own: ranks may share an id
    try:
        image.save(scratch, **({} if path.suffix == ".png" else {"quality": 95, "subsampling": 0}))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_sample(folder: Path, sample: dict, suffix: str) -> dict:
    """Saves image and crop of a sample (see write_triplets) and returns its row of train.jsonl. Raises ValueError."""
    name, question, answer = sample["id"], sample["question"], sample["answer"] or ""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"sample {name!r}: the id is no plain file name. Choose letters, digits, '.', '_' and '-'.")
    if IMAGE_TAG.search(question) or not question.strip():
        raise ValueError(f"sample {name!r}: {question[:80]!r} is empty or holds an image tag. Leave it out.")
    image, crop = f"images/{name}{suffix}", f"teacher_images/{name}.png"
    save(sample["image"], folder / image)
    save(sample["crop"], folder / crop)
    return {"problem": f"<image>\n{question}", "answer": answer, "images": [image], "teacher_images": [crop],
            "bbox": sample["bbox"], "extra_info": {**sample["extra"], "id": name, "question": question, "answer": answer}}


def write_triplets(folder: str | Path, samples: Iterable[dict], *, suffix: str = ".png") -> int:
    """Write a data set laid out as the released one: images/{id}{suffix}, teacher_images/{id}.png, and train.jsonl.

    samples: dicts with id (str, a safe file name), question, answer (str or None, which is written as ""), image and crop
    (PIL RGB), bbox ([x1, y1, x2, y2] px or None), extra (dict, joins extra_info). suffix: .png or .jpg, of full images.
    Returns the number of rows. train.jsonl appears last and whole, so a folder that has one is complete. Raises
    FileExistsError when it is there already; ValueError on a bad or repeated id, an image tag in a question, no samples.
    """
    folder, names = Path(folder), set()
    path, scratch = folder / "train.jsonl", folder / ".tmp-train.jsonl"
    if path.exists():
        raise FileExistsError(f"{path} is there already. Choose another folder, or delete this one to write it anew.")
    try:
        with naming_full_disks(folder):
            for key in FOLDERS:
                (folder / key).mkdir(parents=True, exist_ok=True)
            with scratch.open("w", encoding="utf-8") as lines:
                for sample in samples:
                    if sample["id"] in names:
                        raise ValueError(f"sample {sample['id']!r}: the id is repeated. Expected unique ones.")
                    names.add(sample["id"])
                    lines.write(json.dumps(write_sample(folder, sample, suffix), ensure_ascii=False) + "\n")
            if not names:
                raise ValueError(f"no samples to write into {folder}. Expected at least one.")
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return len(names)


# ------------------------------------------------------------------------------------------------------------ fetching

def fetch(data: str | Path) -> Path:
    """The folder of data set `data`, ready for read_triplets: a local folder, or a hub data set's id such as
    yuanqianhao/Vision-OPD-6K, which is kept in data/<owner>/<name> under the working directory.

    Not in the hub's cache: its files are links into a store that other tools prune. Archives are unpacked in place when a
    row's image is missing; once all are there, neither archives nor network are needed (delete the folder to fetch anew).
    Call it from one process per machine. Raises FileNotFoundError, ValueError (bad archive or row), OSError (disk full).
    """
    folder = Path(data).expanduser()
    hub = not folder.is_dir()
    if hub and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(data)):
        raise FileNotFoundError(f"{data} is neither a folder here nor a hub data set's id. Expected a folder that holds "
                                "train.jsonl, or an id such as yuanqianhao/Vision-OPD-6K.")
    folder = Path("data", data) if hub else folder
    try:
        read_triplets(folder)
    except FileNotFoundError:
        if hub:
            download(str(data), folder)
        for key in FOLDERS:
            if (folder / "train.jsonl").is_file() and (parts := sorted((folder / key).glob(f"{key}.tar.gz*"))):
                unpack(parts, folder / key)
        read_triplets(folder)
    return folder


def download(hub_id: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download
    try:
        snapshot_download(hub_id, repo_type="dataset", local_dir=folder,
                          allow_patterns=["train.jsonl", *(f"{key}/*" for key in FOLDERS)])
    except Exception as error:                                                  # network, name, gate, disk
        raise FileNotFoundError(
            f"{hub_id!r} is neither a folder here nor a data set the hub gave us ({type(error).__name__}: {error}). Check "
            "the name, the network and `hf auth login`, or copy it here and point --data at its folder.") from error


class Joined:
    """The bytes of open files, one after the other, to be read once: split archives need no joined copy on disk."""

    def __init__(self, files: list):
        self.files = files

    def read(self, size: int) -> bytes:
        while self.files:
            if data := self.files[0].read(size):
                return data
            self.files = self.files[1:]
        return b""


def plain_files(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    if not (member.isreg() or member.isdir()):                                  # a link or a device
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)                                  # refuses what leads out of the folder


def unpack(parts: list[Path], target: Path) -> None:
    """The files of a .tar.gz, given in parts, into `target`; its members may be `x.png` or `<name of target>/x.png`.

    They are unpacked beside `target`, to the last byte and checksum, and only then moved in, one by one: killed at any
    moment, `target` holds whole files only, and the next run starts over.
    """
    size = sum(part.stat().st_size for part in parts)
    print(f"unpacking {len(parts)} archive part(s), {size / 1e9:.1f} GB, into {target}", flush=True)
    scratch = target.with_name(f".unpacking-{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with naming_full_disks(target), ExitStack() as stack:
            files = [stack.enter_context(part.open("rb")) for part in parts]
            stream = stack.enter_context(gzip.GzipFile(fileobj=Joined(files), mode="rb"))
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                archive.extractall(scratch, filter=plain_files)
            while stream.read(1 << 20):                                         # what follows the tar's end: the checksum
                pass
            inner = scratch / target.name if (scratch / target.name).is_dir() else scratch
            for path in (path for path in inner.rglob("*") if path.is_file()):
                place = target / path.relative_to(inner)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{parts[0]} ({len(parts)} part(s), {size:,} bytes, up to {parts[-1].name}) cannot be unpacked: "
                         f"{error}. Expected a whole .tar.gz of plain files: fetch it again (git without LFS fetches only "
                         "pointers), or unpack it by hand.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- preview

def wrapped(text: str, font, width: int, most: int) -> list[str]:
    """Up to `most` lines of at most `width` px as drawn; long words, and scripts without spaces, break anywhere."""
    lines, text = [], text[:2000]
    for paragraph in filter(str.strip, text.split("\n")):
        lines.append("")
        for word in re.findall(r"\s*\S+", paragraph):
            for piece in [word] if font.getlength(word) <= width else word:
                lines += [] if font.getlength(lines[-1] + piece) <= width else [""]
                lines[-1] = (lines[-1] + piece).lstrip()
    return lines if len(lines) <= most else [*lines[:most - 1], lines[most - 1][:-2] + " …"]


def preview(folder: str | Path, limit: int = 24, font: Path | None = None) -> Path:
    """Draw folder/preview.png: up to `limit` triplets from all over the file, three a row, each with the framed image, its
    crop, question, answer, and the box's share of the image's area. Returns its path. font: a file; Pillow's own has Latin,
    Greek and Cyrillic letters only and draws empty rectangles for other scripts."""
    typeface = cache(lambda size: ImageFont.truetype(font, size) if font else ImageFont.load_default(size))
    rows = read_triplets(folder)
    rows = [rows[i * len(rows) // min(limit, len(rows))] for i in range(min(limit, len(rows)))]
    wide, high, gap, step = 360, 256, 14, 24                                    # px: image slot (crop: high x high), text
    lines = lambda text, ink, most: [(line, 18, ink) for line in wrapped(text, typeface(18), wide + high + gap, most)]
    texts = [lines(row["question"], "#202124", 12) + lines(f"answer: {row['answer'] or 'unknown'}", "#137333", 3) for row in rows]
    tile, tall, across = wide + high + 3 * gap, high + 3 * gap + step * (1 + max(map(len, texts))), min(3, len(rows))
    sheet = Image.new("RGB", (across * (tile + gap) + gap, -(-len(rows) // across) * (tall + gap) + gap), "#e3e6ea")
    draw = ImageDraw.Draw(sheet)
    for n, (row, text) in enumerate(zip(rows, texts)):
        left, top = gap + n % across * (tile + gap), gap + n // across * (tall + gap)
        draw.rounded_rectangle((left, top, left + tile, top + tall), 8, fill="white")
        image, crop = load_image(row["image"]), load_image(row["crop"])
        for picture, x, room in ((image, left + gap, wide), (crop, left + wide + 2 * gap, high)):
            method = Image.Resampling.NEAREST if 2 * picture.width <= room else Image.Resampling.LANCZOS   # show pixels
            shown = ImageOps.contain(picture, (room, high), method)
            sheet.paste(shown, (x + (room - shown.width) // 2, top + gap + (high - shown.height) // 2))
        x1, y1, x2, y2 = row["bbox"] or (0, 0, 0, 0)
        share = f"box {(x2 - x1) * (y2 - y1) / (image.width * image.height):.2%} of it" if row["bbox"] else "no box noted"
        facts = f"image {image.width} x {image.height}, {share}, crop {crop.width} x {crop.height}   {row['id'][:28]}"
        for k, (line, size, ink) in enumerate([*text, (facts, 15, "#5f6368")]):
            draw.text((left + gap, top + high + 2 * gap + k * step), line, ink, typeface(size))
    with naming_full_disks(Path(folder)):
        save(sheet, Path(folder) / "preview.png")
    return Path(folder) / "preview.png"


# ------------------------------------------------------------------------------ photographs: prompts and rules for texts

HINT = "\n\nOnly focus on the objects inside the red bounding box in the image to answer this question."
CHOOSE = "\n\nAnswer with the option's letter from the given choices."
FIND = """List up to 8 things in this picture that are small compared with the whole picture (each under a tenth of its area),
clearly visible, specific, and worth a close look: with writing, numbers, parts, a material, or a group one can count.
Name each in 1 to 5 words that fit nothing else in the picture. Reply with JSON only, and with [] if nothing qualifies:
"""
FIND_NAMES = FIND + '["name", "name"]'
FIND_BOXES = FIND + '[{"bbox_2d": [x1, y1, x2, y2], "label": "name"}], coordinates from 0 to 1000 of width and height.'
TYPES = ("colour", "text", "number", "count", "material", "state", "shape", "part", "relation")
ASK = """This is a close view of: %s. Write up to 3 questions that this view alone answers beyond doubt. Each question
- has one correct answer: 1 to 4 words, a number, or the exact writing (if fully legible; count only 1 to 8 things, all visible);
- names the thing it asks about, and cannot be answered by who only knows that thing's name;
- does not mention a picture, view, crop, box or frame, nor a place such as "on the left side";
- is no yes-or-no and no either-or question, asks one thing only, and does not contain its answer;
- has one of these types: """ + ", ".join(TYPES) + """.
Reply with JSON only, and with [] if nothing qualifies: [{"question": "...", "answer": "...", "type": "..."}]"""
VOTE = '%s\nReply with the answer alone, 1 to 4 words; reply "unknown" if it cannot be seen.'
WRONG = """%s
The right answer is: %s. Write 3 wrong answers that who only glanced could take for right: of the same kind and length,
different from each other and not true here. Reply with JSON only: ["...", "...", "..."]"""
VOTES = 8                                                  # answers a question; a label needs more than 3/4 of them
VIEW = r"\b(?:images?|pictures?|photo(?:graph)?s?|crop(?:ped)?|box(?:es)?|bounding|frames?|screenshots?)\b"
PLACE = (r"\b(?:top|bottom|upper|lower|left|right|far)(?:[- ](?:left|right|most))?[- ](?:side|corner|edge|half|part)\b|"
         r"\b(?:in|at|on|near|to) the (?:very |far )?(?:top|bottom|left|right|middle|cent(?:er|re)|corner|edge)(?= of\b|\W*$)")
YES_NO = r"(?:is|are|was|were|do|does|did|can|could|has|have|had|will|would|should|may|must)(?:n't)?\b"
SEVERAL = r"(?s)\?.*\?|\band (?:what|which|how|who|whose|where|when|why)\b"
UNKNOWN = r"^$|\b(?:unknown|unclear|unsure|cannot|can't|unable|illegible|unreadable|not (?:visible|clear|legible|sure))\b"
LEAD_IN = (r"^\W*(?:(?:(?:the|my) )?(?:final |correct )?answer(?: is\b|\s*:)|"
           r"(?:it|they|this|that|there|these)(?:'s| is| are| says| reads)\b):?")
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten eleven twelve thirteen "
                                                 "fourteen fifteen sixteen seventeen eighteen nineteen twenty".split())}


def read_json(text: str) -> list | None:
    """The longest JSON list in a model's reply (objects in a row count as one), None without any: after the last </think>, in
    whatever prose or code fences, with trailing commas, or cut off at the end. It is parsed, never evaluated."""
    text, found, at, failed = text.rpartition("</think>")[2][:20000], [[]] * ("[]" in text), 0, 0
    text = re.sub(r",(?=\s*[\]}])", "", text)
    while (start := re.search(r"[\[{]", text[at:])) and failed < 100:
        at += start.start()
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            at, failed = at + 1, failed + 1
            continue
        if isinstance(value, dict):                                             # {"objects": [..]}, or one of the objects
            value = next((v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)), [value])
            value = found.pop() + value if found and found[-1] else value
        if value and not isinstance(value[0], int | float):
            found.append(value)
    return max(found, key=len, default=None)


def short(text, longest: int = 60) -> str | None:
    """`text` on one line; None when it is no text, empty, too long, or holds <image> or any special token."""
    text = " ".join(text.split()) if isinstance(text, str) else ""
    return text if 0 < len(text) <= longest and text.isprintable() and not re.search(r"<\w+>|<\||\|>", text) else None


def normal(text: str, question: str = "") -> str:
    """An answer as votes are counted: without lead-in, articles and outer punctuation, numbers as digits, one spelling."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").rpartition("</think>")[2]
    boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", text)
    text = re.sub(LEAD_IN, "", (boxed[-1] if boxed else text).strip())
    text = re.sub(r"(?<=\d),(?=\d{3}\b)|\b(?:an?|the)\b", "", text).replace("grey", "gray").replace("colour", "color")
    text = re.sub(r"[^\W\d_]+", lambda word: NUMBERS.get(word[0], word[0]), text)
    text = " ".join(re.sub(r"[^\w.%$€£¥°/:'&+-]", " ", text).split()).strip(" .:'")
    integer = re.search(r"\d+", text) if "how many" in question.casefold() else None
    return integer[0] if integer else text


def leaks(question: str, answer: str) -> bool:
    answer, question = normal(answer), normal(question)
    word = rf"(?<!\w){re.escape(answer)}(?!\w)" if answer.isascii() else re.escape(answer)    # not every script has spaces
    return bool(answer and re.search(word, question))


def fault(item) -> str | None:
    """The first rule that a drafted question breaks, as the reason to count; None for a good one."""
    item = item if isinstance(item, dict) else {}
    question, answer, kind = short(item.get("question"), 200), item.get("answer"), item.get("type")
    answer = short(str(answer) if isinstance(answer, int) else answer)
    if not question or not answer:
        return "question_malformed"
    said, reply = unicodedata.normalize("NFKC", question).casefold(), normal(answer)
    return next((reason for reason, broken in (
        ("question_form", not said.endswith("?") or len(said) < 10), ("several_questions", re.search(SEVERAL, said)),
        ("mentions_view", re.search(VIEW, said)), ("mentions_place", re.search(PLACE, said)),
        ("yes_no", re.match(YES_NO, said) or reply in ("yes", "no")), ("either_or", re.search(r"\bor\b", said)),
        ("question_type", kind not in TYPES), ("leak", leaks(question, answer)),
        ("answer_form", re.search(UNKNOWN, reply) or len(answer.split()) > (8 if kind == "text" else 4))) if broken), None)


# ----------------------------------------------------------------------------------- photographs: loading and geometry

def photograph(root: Path, file: str) -> dict:
    """root/file as file, digest (of its bytes), image (None where `drops`, a count by reason, says why not), notes."""
    photo, reason, data = {"file": file, "digest": "", "image": None, "drops": Counter(), "notes": []}, None, b""
    try:
        data = (root / file).read_bytes()
        photo["digest"] = hashlib.sha256(data).hexdigest()[:16]
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(data)) as header:
            width, height = header.size
        reason = "too_large" if width * height > 100e6 else "too_small" if min(width, height) < 448 else None
        photo["image"] = None if reason else load_image(root / file)
    except Image.DecompressionBombError:                                        # by the header's size: nothing was decoded
        reason = "too_large"
    except Exception as error:                                                  # decoders raise errors of any kind
        reason = "empty_or_unreadable" if not data else "not_an_image" if isinstance(error, UnidentifiedImageError) else "corrupt"
        photo["notes"].append(f"{reason}: {error}"[:500])
    photo["drops"][reason] += 1                                                 # None counts what was kept, here and below
    return photo


def grow(box: list[int], by: list[int], size: tuple[int, int]) -> list[int]:
    return [max(0, box[0] - by[0]), max(0, box[1] - by[1]), min(size[0], box[2] + by[0]), min(size[1], box[3] + by[1])]


def geometry(size: tuple[int, int], box: list[int]) -> tuple[int, list[int], list[int]]:
    """(W, H), box -> line width of its frame, frame, window to crop; [x1, y1, x2, y2] px, as measured on the released set."""
    line = min(max(round(min(size) / 300), 2), 16)
    frame = grow(box, [max(round((box[i + 2] - box[i]) / 20), line + 1) for i in (0, 1)], size)
    return line, frame, grow(frame, [round((frame[i + 2] - frame[i]) / 20) for i in (0, 1)], size)


def draw_frame(image: Image.Image, box: list[int]) -> Image.Image:
    """A copy of `image` with a red frame round the box, whose own pixels stay as they are: they are the evidence."""
    (line, frame, _), framed = geometry(image.size, box), image.copy()
    ImageDraw.Draw(framed).rectangle((*frame[:2], frame[2] - 1, frame[3] - 1), outline=RED, width=line)
    framed.paste(image.crop(box), box[:2])
    return framed


def cut(image: Image.Image, window: list[int]) -> tuple[Image.Image, float]:
    """The window, enlarged by 2 (more if its short side stays under 64 px, less if it has over 4,194,304 px), and that scale."""
    width, height = window[2] - window[0], window[3] - window[1]
    scale = min(max(2, 64 / min(width, height)), math.sqrt(2 ** 22 / (width * height)))
    return image.crop(window).resize((int(width * scale + 1e-6), int(height * scale + 1e-6)), Image.Resampling.LANCZOS), scale


def small_regions(found: list[tuple], size: tuple[int, int], drops: Counter) -> list[dict]:
    """Of one image's (box px, label, score) the first three worth asking about: dicts of box (whole px), label, score."""
    kept, (W, H) = [], size

    def repeated(other: dict) -> bool:
        a, b = box, other["box"]
        common = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        area, alike = (b[2] - b[0]) * (b[3] - b[1]), set(label.casefold().split()) & set(other["label"].casefold().split())
        return common > 0.5 * (w * h + area - common) or bool(alike) and common >= 0.8 * min(w * h, area)

    for box, label, score in found:
        x1, y1, x2, y2 = box = grow([*map(math.floor, box[:2]), *map(math.ceil, box[2:])], [0, 0], size)
        w, h, line, label = x2 - x1, y2 - y1, geometry(size, box)[0], short("this thing" if label is None else label)
        reason = ("bad_box" if min(w, h) <= 0 or not label else "box_large" if w * h >= 0.1 * W * H else
                  "box_small" if w * h < 2e-4 * W * H or min(w, h) < 20 else "box_thin" if max(w, h) > 8 * min(w, h) else
                  "box_at_edges" if sum(room >= line for room in (x1, y1, W - x2, H - y2)) < 2 else     # its frame is hidden
                  "box_repeated" if any(map(repeated, kept)) else "box_spare" if len(kept) == 3 else None)
        drops[reason] += 1
        kept += [] if reason else [{"box": box, "label": label, "score": score}]
    return kept


# -------------------------------------------------------------------------------------------- photographs: the pipeline

def seed_of(*key) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7])


def ask(engine: dict, what: str, rows: list[tuple], tokens: int) -> list[list | None]:
    """The JSON list replied to each row (photo, key for its seed, image, prompt). Without one it is asked for once more, with a
    seed; then it is None, and `what`_malformed or out_of_memory (even with this row alone) is counted and the text noted."""
    import rollout
    lists, texts, todo = [None] * len(rows), [None] * len(rows), [*range(len(rows))]
    for attempt in (0, 1):
        said = rollout.texts(*engine["model"], [rows[i][2] for i in todo], [rows[i][3] for i in todo], engine["batch"],
                             max_new_tokens=tokens, temperature=0.7 * attempt,
                             seeds=[seed_of(engine["seed"], what, rows[i][1]) for i in todo])
        for i, text in zip(todo, said):
            texts[i] = text and text[0]
            lists[i] = text and read_json(text[0])
        todo = [i for i in todo if lists[i] is None and texts[i] is not None]
    for (photo, *_), items, text in zip(rows, lists, texts):
        photo["drops"]["out_of_memory" if text is None else f"{what}_malformed" if items is None else None] += 1
        photo["notes"] += [f"{what}_malformed: {text[:500]}"] if items is None and text else []
    return lists


def propose(engine: dict, photos: list[dict]) -> list[dict]:
    """The regions of all photos, with photo, frame, window, crop (clean), scale, id: boxed by the model, by SAM 3 which is given
    the model's names, or beforehand."""
    photos, given, sam, regions = [p for p in photos if p["image"]], engine["boxes"], engine["sam3"], []
    rows = [(p, p["digest"], p["image"], FIND_NAMES if sam else FIND_BOXES) for p in photos]
    for photo, items in zip(photos, ask(engine, "boxes", rows, 1024) if given is None else [None] * len(photos)):
        size, drops, found = photo["image"].size, photo["drops"], []
        if given is not None:
            found = given.get(photo["file"], [])
        elif sam:
            names = [short(item.get("label") if isinstance(item, dict) else item) for item in items or []]
            drops["name_malformed"] += names.count(None)
            found = sam3_boxes(*sam, photo["image"], list(dict.fromkeys(filter(None, names)))[:8], drops)
        for item in (items or []) if not sam else []:
            box, name = (item.get("bbox_2d"), item.get("label")) if isinstance(item, dict) else (None, None)
            good = is_box(box) and 0 <= min(box) and max(box) <= 1000 and bool(short(name))
            drops[None if good else "bad_box"] += 1
            found += [([v * side / 1000 for v, side in zip(box, size * 2)], name, None)] if good else []
        drops["nothing_found"] += not found and not any(n for reason, n in drops.items() if reason)
        for r in small_regions(found, size, drops):
            _, frame, window = geometry(size, r["box"])
            crop, scale = cut(photo["image"], window)
            regions.append(r | {"photo": photo, "frame": frame, "window": window, "crop": crop, "scale": round(scale, 4),
                                "id": "-".join([photo["digest"], *map(str, r["box"])])})
    return regions


def is_box(box) -> bool:
    """Whether this is four finite numbers, x1 < x2 and y1 < y2 (NaN fails, so do booleans)."""
    numbers = isinstance(box, list) and [type(v) in (int, float) and abs(v) < 1e9 for v in box] == [True] * 4
    return numbers and box[0] < box[2] and box[1] < box[3]


def sam3_boxes(sam, tokenizer, image: Image.Image, names: list[str], drops: Counter) -> list[tuple]:
    """(box px, name, score) of each name of which SAM 3 sees exactly one (score > 0.5), and that with a score of at least 0.75.

    Without its image processor, which needs torchvision: bilinear to 1008 x 1008 px, values in [-1, 1].
    """
    import torch
    side, found = sam.config.image_size, []
    if not names:
        return found
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
    words = tokenizer(names, padding="max_length", truncation=True, max_length=32, return_tensors="pt")        # (names, 32)
    try:
        with torch.inference_mode():
            seen = sam.get_vision_features(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(sam.device))     # (1, 3, S, S)
            for maps in ("fpn_hidden_states", "fpn_position_encoding"):         # computed once, shown to every name
                seen[maps] = tuple(part.expand(len(names), -1, -1, -1) for part in seen[maps])
            out = sam(vision_embeds=seen, **words.to(sam.device))
    except torch.OutOfMemoryError:
        drops["out_of_memory"] += 1
        return found
    scores = (out.pred_logits.sigmoid() * out.presence_logits.sigmoid()).cpu()  # (names, queries) * (names, 1)
    for name, score, boxes in zip(names, scores, out.pred_boxes.cpu() * torch.tensor(image.size * 2)):         # (queries, 4)
        count = int((score > 0.5).sum())
        good = count == 1 and score.max() >= 0.75
        drops[None if good else "name_ambiguous" if count > 1 else "name_not_found"] += 1
        found += [(boxes[score.argmax()].tolist(), name, round(score.max().item(), 4))] if good else []
    return found


def question(engine: dict, regions: list[dict]) -> None:
    """Gives each region up to 3 questions, asked of its crop alone: r["questions"], of question, answer, type, n."""
    rows = [(r["photo"], r["id"], r["crop"], ASK % r["label"]) for r in regions]
    for r, items in zip(regions, ask(engine, "questions", rows, 512)):
        r["questions"] = []
        r["photo"]["drops"]["no_question"] += items == []
        for n, item in enumerate(items or []):
            reason = "question_spare" if n >= 3 else fault(item)
            r["photo"]["drops"][reason] += 1
            r["questions"] += [] if reason else [{"question": short(item["question"], 200), "type": item["type"], "n": n,
                                                  "answer": short(str(item["answer"]))}]


def label(engine: dict, regions: list[dict]) -> None:
    """Replaces drafted answers by what at least 7 of 8 sampled ones agree on; without such a majority the question goes."""
    import rollout
    asked = [(r, q) for r in regions for q in r["questions"]]
    said = rollout.texts(*engine["model"], [r["crop"] for r, _ in asked], [VOTE % q["question"] for _, q in asked],
                         engine["batch"], max_new_tokens=32, temperature=1.0, group=VOTES,
                         seeds=[seed_of(engine["seed"], "label", r["id"], q["n"]) for r, q in asked])
    for (r, q), texts in zip(asked, said):
        votes = {}
        for text in filter(short, texts or []):
            votes.setdefault(normal(text, q["question"]), []).append(short(text).strip(" ."))
        best, same = max(votes.items(), key=lambda vote: len(vote[1]), default=("", [""]))
        q |= {"answer": min(same, key=len), "votes": [len(same), VOTES]}
        q["lost"] = ("out_of_memory" if texts is None else "leak" if leaks(q["question"], best) else
                     "no_consensus" if len(same) <= 0.75 * VOTES or re.search(UNKNOWN, best) else None)
        r["photo"]["drops"][q["lost"]] += 1
    for r in regions:
        r["questions"] = [q for q in r["questions"] if not q["lost"]]


def choices(engine: dict, regions: list[dict]) -> None:
    """Gives each region's first question three wrong options of the same kind, shuffled by the id."""
    firsts = [(r, r["questions"][0]) for r in regions if r["questions"]]
    rows = [(r["photo"], r["id"], r["crop"], WRONG % (q["question"], q["answer"])) for r, q in firsts]
    for (r, q), items in zip(firsts, ask(engine, "options", rows, 128)):
        options = {normal(q["answer"], q["question"]): q["answer"]}
        for wrong in map(short, items or []):
            options.setdefault(normal(wrong or q["answer"], q["question"]), wrong)
        q["options"] = random.Random(f"{r['id']}-{q['n']}").sample(listed := list(options.values())[:4], len(listed))
        r["photo"]["drops"]["options_too_few"] += items is not None and len(listed) < 4
        r["questions"] = r["questions"] if len(listed) == 4 else []


def finish(r: dict, args, mark: str) -> dict:
    """Draws and saves a region with its first question: the row of train.jsonl."""
    photo, q = r["photo"], r["questions"][0]
    text, answer, framed = q["question"] + HINT, q["answer"] if args.labels else None, draw_frame(photo["image"], r["box"])
    if args.format == "mcq":
        text += "\n\n" + "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", q["options"])) + CHOOSE
        answer = "ABCD"[q["options"].index(q["answer"])]
    extra = {"source": photo["file"].encode(errors="backslashreplace").decode(), "source_size": photo["image"].size,
             **{key: r[key] for key in ("box", "frame", "window", "scale", "label", "score")},
             "draft": q["answer"], "type": q["type"], "votes": q.get("votes"), "config": mark, "seed": args.seed}
    crop = cut(photo["image"] if args.clean_crop else framed, r["window"])[0]
    return write_sample(args.out, {"id": f"{r['id']}-{q['n']}", "question": text, "answer": answer, "bbox": r["box"],
                                   "image": framed, "crop": crop, "extra": extra}, f".{args.full}")


# ------------------------------------------------------------------------------------------------- photographs: running

def configuration(args) -> dict:
    """What the samples depend on: a run is not resumed with anything else."""
    keys = ("images", "model", "proposer", "sam3", "labels", "format", "clean_crop", "full", "seed")
    texts = repr((FIND_NAMES, FIND_BOXES, ASK, VOTE, WRONG, HINT, CHOOSE)).encode()
    texts += Path(args.proposer).read_bytes() if args.proposer.endswith(".jsonl") else b""
    return {key: getattr(args, key) for key in keys} | {"images": str(args.images.resolve()),
                                                        "texts": hashlib.sha256(texts).hexdigest()[:12]}


def read_boxes(path: Path) -> dict[str, list[tuple]]:
    """Boxes one already has: {image: [(box px, label or None, None)]}. Raises ValueError with the line."""
    given = {}
    for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {"image": "", "boxes": []}
            boxes, labels = row["boxes"], row.get("labels") or [None] * len(row["boxes"])
            if not all(map(is_box, boxes)):
                raise ValueError(f"{boxes} are not all boxes")
            given.setdefault(row["image"], []).extend(zip(boxes, labels, [None] * len(boxes), strict=True))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {n}: {error!r}. Expected an object with image (its path under --images), boxes "
                             "([[x1, y1, x2, y2], ..] px of the upright image) and, if you like, as many labels.") from error
    return given


def read_parts(out: Path, config: dict | None = None) -> Iterator[dict]:
    """Every whole line of every rank: {"config": ..}, which must be `config` or everywhere the same, or a finished photograph."""
    for path in sorted((out / ".parts").glob("*.jsonl")):
        with path.open("rb") as lines:
            for row in (json.loads(line) for line in lines if line.endswith(b"\n")):        # else torn by a kill
                found = row.get("config", config)
                config = config or found
                if found != config:
                    both = {key: (found.get(key), config.get(key)) for key in {*found, *config}}
                    differs = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
                    raise FileExistsError(f"{path} was made with another configuration; (found, wanted) is {differs}. Run again "
                                          "with the same one, or choose another --out.")
                yield row


def load_engine(args) -> dict:
    """The models on this rank's device, loaded before the first photograph. Raises, naming the way out."""
    import model as M
    import torch
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    engine = {"model": M.load(args.model, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)}
    if args.proposer == "sam3":
        from transformers import CLIPTokenizer, Sam3Model
        try:
            engine["sam3"] = Sam3Model.from_pretrained(args.sam3).to(device).eval(), CLIPTokenizer.from_pretrained(args.sam3)
        except Exception as error:                                              # network, name, gate, disk
            raise FileNotFoundError(
                f"--sam3 {args.sam3} is no SAM 3 here, and the hub gave none ({type(error).__name__}: {error}). It is gated: "
                "accept its terms on the hub and `hf auth login`, point --sam3 at a folder, or take --proposer mllm.") from error
    return engine


def run(args) -> None:
    """This rank's photographs -> images, and lines in .parts; without torchrun, the whole data set.

    A photograph belongs to rank sha256(relative path) % world. Its line, appended after its images, holds its samples and says
    that it is done; one that was killed before is done anew, under the same names.
    """
    rank, world, out = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), args.out
    config, boxes = configuration(args), read_boxes(Path(args.proposer)) if args.proposer.endswith(".jsonl") else None
    mark = hashlib.sha256(json.dumps(config | {"images": ""}, sort_keys=True).encode()).hexdigest()[:12]
    if (out / "train.jsonl").exists() and not (out / ".parts").is_dir():
        raise FileExistsError(f"{out} holds another data set. Choose another --out.")
    root, own = args.images.resolve(), out.resolve()
    paths = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file() and own not in path.parents]
    files = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    if not files:
        raise FileNotFoundError(f"--images {args.images} holds no files. Expected a folder of photographs.")
    files = [file for file in files if int(hashlib.sha256(os.fsencode(file)).hexdigest(), 16) % world == rank]
    done, kept, dropped = {row["file"] for row in read_parts(out, config) if "file" in row}, 0, 0
    todo = [file for file in files if file not in done]
    engine = {"seed": args.seed, "batch": [args.batch], "boxes": boxes, "sam3": None} | (load_engine(args) if todo else {})
    stages = [question, *[label] * (args.labels or args.format == "mcq"), *[choices] * (args.format == "mcq")]
    for key in (*FOLDERS, ".parts"):
        (out / key).mkdir(parents=True, exist_ok=True)
    path = out / ".parts" / f"{rank:05d}.jsonl"
    with naming_full_disks(out), path.open("a+b") as part, ThreadPoolExecutor(args.workers) as pool, \
            tqdm(total=len(files), initial=len(files) - len(todo), unit="image", disable=rank > 0) as bar:
        part.truncate(whole := path.read_bytes().rfind(b"\n") + 1)              # cuts a torn last line
        part.write(b"" if whole else json.dumps({"config": config}).encode() + b"\n")
        load = lambda at: [pool.submit(photograph, args.images, file) for file in todo[at:at + args.batch]]
        ahead = load(0)
        for at in range(0, len(todo), args.batch):
            times = [time.perf_counter()]
            lap = lambda: times.append(time.perf_counter())
            photos, ahead = [photo.result() for photo in ahead], load(at + args.batch)
            lap()
            regions = propose(engine, photos)
            lap()
            for stage in stages:
                stage(engine, regions)
                lap()
            for r in regions:
                r["photo"]["drops"]["question_spare"] += len(r["questions"][1:])
            kept_regions = [r for r in regions if r["questions"]]
            rows = [*zip(kept_regions, pool.map(lambda r: finish(r, args, mark), kept_regions))]
            lap()
            names = ["load", "propose", *(stage.__name__ for stage in stages), "write"]
            seconds = {name: round((end - start) / len(photos), 4) for name, start, end in zip(names, times, times[1:])}
            for photo in photos:
                drops = {reason: n for reason, n in photo["drops"].items() if reason and n}
                samples = [row for r, row in rows if r["photo"] is photo]
                part.write(json.dumps({"file": photo["file"], "digest": photo["digest"], "drops": drops, "notes": photo["notes"],
                                       "seconds": seconds, "samples": samples}).encode() + b"\n")
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
    config, lines, drops, seconds, notes, rows, seen = {}, {}, Counter(), Counter(), [], [], set()
    for line in read_parts(out):
        config = line.get("config", config)
        lines |= {line["file"]: line} if "file" in line else {}
    for _, line in sorted(lines.items()):
        repeated = line["digest"] in seen
        seen |= {line["digest"]} - {""}
        drops.update({"duplicate": 1} if repeated else line["drops"])
        seconds.update(line["seconds"])
        notes += [] if repeated else line["notes"]
        rows += [] if repeated else line["samples"]
    table = "".join(f"\n  {count:8,} {reason}" for reason, count in drops.most_common()) or " nothing"
    if not rows:
        raise ValueError(f"{out}: no sample from {len(lines)} photographs. Dropped, by reason:{table}")
    rows.sort(key=lambda row: row["extra_info"]["id"])
    stats = {"photographs": len(lines), "samples": len(rows), "dropped": dict(drops.most_common()), "notes": notes[:50],
             "seconds": {key: round(value, 2) for key, value in seconds.items()}, "config": config,
             "photographs_per_second": round(len(lines) / max(seconds.total(), 1e-9), 3)}
    with naming_full_disks(out):
        for name, text in (("stats.json", json.dumps(stats, indent=1) + "\n"),
                           ("train.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))):
            try:
                (scratch := out / f".tmp-{name}").write_text(text, encoding="utf-8")
                os.replace(scratch, out / name)
            finally:
                scratch.unlink(missing_ok=True)
    print(f"{out}: {len(rows)} samples of {len(lines)} photographs; dropped, by reason:{table}")
    print(*(f"warning: {warning}\n" for warning in balance(read_triplets(out))), f"drawn: {preview(out, font=font)}", sep="")


# ------------------------------------------------------------------------------------------------------------ checking

def balance(samples: list[dict]) -> list[str]:
    """Warnings: answers in their own question, one answer over 10% or one type over 35% of the samples."""
    answers, found = [], []
    for sample in samples:                                                      # "A. bark" lines: the answer is the option's text
        stem, *lines = re.split(r"\n+(?=\(?[A-H][.)] )", sample["question"].replace(HINT, ""))    # the hint says "red"
        options = {line.strip("(")[0]: line.strip("(")[3:].split("\n")[0] for line in lines}
        answer = options.get(sample["answer"], sample["answer"]) or ""
        answers += [normal(answer)] if answer else []
        found += [sample["id"]] if leaks(stem, answer) else []
    warnings = [f"{len(found)} questions contain their answer, the first {found[:5]}"] if found else []
    types = [sample["extra"]["type"] for sample in samples if isinstance(sample["extra"].get("type"), str)]
    return warnings + [f"{n} of {len(values)} {what}s are {value!r}, over {limit:.0%}" for what, limit, values in (
        ("answer", 0.1, answers), ("type", 0.35, types)) for value, n in Counter(values).items() if n > limit * len(values)]


def flaw(sample: dict) -> str | None:
    """What is wrong with a sample's images or box, if anything."""
    try:
        (W, H), _, box = load_image(sample["image"]).size, load_image(sample["crop"]), sample["bbox"]
    except (OSError, ValueError) as error:
        return f"sample {sample['id']}: {error}"
    if box and not (0 <= box[0] < box[2] <= W and 0 <= box[1] < box[3] <= H):
        return f"sample {sample['id']}: bbox is {box}. Expected x1 < x2 <= {W}, y1 < y2 <= {H}: correct it, or write null."


def check(folder: Path) -> None:
    """Prints what is wrong with any data set, and what looks wrong. Raises ValueError when there are errors."""
    errors, samples = [], []
    for sample in each_triplet(folder):
        (errors if isinstance(sample, Exception) else samples).append(sample)
    with ThreadPoolExecutor() as pool:
        errors += filter(None, tqdm(pool.map(flaw, samples), "check", len(samples), unit="row", disable=None))
    print(*(f"error: {error}\n" for error in errors), *(f"warning: {warning}\n" for warning in balance(samples)), sep="", end="")
    print(f"{folder}: {len(samples)} readable rows, {sum(s['bbox'] is not None for s in samples)} with a box, "
          f"{sum(s['answer'] is not None for s in samples)} with an answer; {len(errors)} errors")
    if errors or not samples:
        raise ValueError(f"{folder} has {len(errors)} errors and {len(samples)} readable rows. Correct or remove what is named.")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    # data sets that are there
    p.add_argument("--preview", type=Path, metavar="DIR", help="draw DIR/preview.png: 24 triplets of that data set")
    p.add_argument("--check", type=Path, metavar="DIR", help="list everything wrong with a data set; exit 1 if there is")
    p.add_argument("--merge", type=Path, metavar="DIR", help="what ranks made -> train.jsonl, stats.json, preview.png")
    p.add_argument("--font", type=Path, metavar="FILE", help="of the preview, for scripts that Pillow's own font lacks")
    # photographs into triplets (paper, section 3.2)
    p.add_argument("--images", type=Path, metavar="DIR", help="photographs, in folders of any depth")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder to write; an interrupted run goes on")
    p.add_argument("--model", default="Qwen/Qwen3.5-4B", help="hub id or directory (ours: the student itself, for everything)")
    p.add_argument("--proposer", default="mllm", help="what boxes things: mllm (--model does; ours: no second download), sam3 "
                   "(the paper's), or your own .jsonl: {image, boxes: [[x1, y1, x2, y2] px, ..], labels}")
    p.add_argument("--sam3", default="facebook/sam3", help="hub id or directory, for --proposer sam3")
    p.add_argument("--labels", action=flag, default=False, help=f"write answers on which over 3/4 of {VOTES} samples agree")
    p.add_argument("--format", choices=["open", "mcq"], default="open", help="mcq: four options, a letter, labels, as released "
                   "(ours: open, the method needs no labels)")
    p.add_argument("--clean-crop", action=flag, default=False, help="crops without the red frame")
    p.add_argument("--full", choices=["jpg", "png"], default="jpg", help="full images; png keeps every bit, 20 times slower")
    p.add_argument("--seed", type=int, default=0, help="of all that is sampled")
    p.add_argument("--batch", type=int, default=16, help="photographs, and prompts, at once; halved when memory runs out")
    p.add_argument("--workers", type=int, default=4, help="threads that decode and encode images")
    args = p.parse_args()
    if not (args.preview or args.check or args.merge or args.images):
        p.error("nothing to do: give --images DIR --out DIR, --check DIR, --merge DIR or --preview DIR")
    if args.images and (args.out is None or min(args.batch, args.workers) < 1):
        p.error("--images needs --out DIR, --batch and --workers >= 1")
    if args.images and not (args.proposer in ("mllm", "sam3") or args.proposer.endswith(".jsonl")):
        p.error(f"--proposer is {args.proposer!r}. Expected mllm, sam3, or a .jsonl file of boxes")
    if args.images:
        run(args)
    if args.merge:
        merge(args.merge, args.font)
    if args.check:
        check(args.check)
    if args.preview:
        print(f"drawn: {preview(args.preview, font=args.font)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"synth.py: {error}") from error
