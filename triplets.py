"""The triplet format: full image with a red box, crop of what it frames, and a question, as released with the paper
(Vision-OPD-6K): read, checked, written, fetched, and drawn to be looked at.

A data set is a folder with `train.jsonl`, `images/` and `teacher_images/`. The student sees images[0], the teacher
teacher_images[0], both the same question.
"""
import argparse
import errno
import gzip
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

RED = (255, 0, 0)                                          # the box
FOLDERS = ("images", "teacher_images")                     # of full images and of crops; keys of a row as well
IMAGE_TAG = re.compile(r"<image>|<video>|<\|(?:image|video|vision)_\w+\|>")     # each would change the number of images


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as upright 8-bit RGB: EXIF rotation applied, 16-bit shifted to 8, alpha laid on white, CMYK
    converted, the first frame of an animation. All of it is decoded, so a truncated file raises here and not later.

    Raises FileNotFoundError, or ValueError for what is no picture or not whole.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if Path(path).is_dir() else 'not there'}. Expected an image file.")
    try:
        with open(path, "rb") as file, Image.open(file) as image:               # by its path Pillow maps and garbles rotated TIFFs
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):                                      # plain conversion would saturate
                return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
            if image.mode == "F":
                raise ValueError("floating point pixels of unknown range; expected 8 or 16 bits a channel")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:                                                  # decoders raise errors of any kind
        raise ValueError(f"{path} ({Path(path).stat().st_size:,} bytes) cannot be read whole as a picture: {error}. "
                         "Fetch or save the file again, or take it out of the data.") from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as its header gives it, mostly before EXIF rotation. Raises ValueError."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:                                                  # decoders raise errors of any kind
        raise ValueError(f"{path} cannot be read as a picture: {error}. Fetch or save the file again, or take it out of the "
                         "data.") from error


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


@contextmanager
def whole(path: Path):
    """Gives a temporary path to write to, which then becomes `path`, or is removed on an error: no file is half-written."""
    scratch = path.with_name(f".tmp-{os.urandom(6).hex()}-{path.name}")      # its own: ranks may share a name
    try:
        with naming_full_disks(path.parent):
            yield scratch
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """All of it or nothing, whenever the process is killed."""
    with whole(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A command's --help: its docstring as it stands, and the default of every flag that takes a value and does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.default is None or action.default == "" or action.nargs == 0 or "default" in action.help
        return action.help if told else super()._get_help_string(action)


# ------------------------------------------------------------------------------------------------- the format on disk

def read_triplets(folder: str | Path, errors: list[Exception] | None = None) -> list[dict]:
    """The rows of folder/train.jsonl in file order, every one of them checked.

    Returns dicts: id (str, unique: extra_info.id, else the row's number), question (without the <image> tag, hint kept),
    image and crop (Path), answer (str or None), bbox ([x1, y1, x2, y2] px or None), extra (extra_info, whole).
    Raises FileNotFoundError / ValueError with file and line for broken JSON, a missing key or file, a repeated id, no rows;
    those of rows join `errors` instead, if that is given.
    """
    folder, samples, seen = Path(folder), [], {}
    path = folder / "train.jsonl"
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:10] if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} has no train.jsonl ({there}). Expected a data set: give the folder that holds it.")
    listed = cache(lambda place: set(os.listdir(place)) if place.is_dir() else set())      # instead of a stat per file
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no rows. Expected an object a line; fetch or write the data set again.")
    for number, (n, line) in enumerate(lines):
        try:
            sample = read_row(line, number, folder, listed)
            if (first := seen.setdefault(sample["id"], n)) != n:
                raise ValueError(f"id {sample['id']!r} is that of line {first} too. Expected unique ids: remove one line, or "
                                 "leave extra_info.id out everywhere to have the rows numbered.")
            samples.append(sample)
        except (ValueError, FileNotFoundError) as error:
            named = type(error)(f"{path}, line {n}: {error}")
            if errors is None:
                raise named from error
            errors.append(named)
    return samples


def read_row(line: bytes, number: int, folder: Path, listed) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error}): {line[:60]!r}. Expected an object a line; fetch the file again if it is cut "
                         "off, or if these are the lines of a git-lfs pointer.") from error
    if not isinstance(row, dict) or not {"problem", *FOLDERS} <= row.keys():
        raise ValueError(f"found {sorted(row) if isinstance(row, dict) else type(row).__name__}. Expected the keys problem, "
                         "images and teacher_images: add them.")
    problem, box, answer, extra = str(row["problem"]), row.get("bbox"), row.get("answer"), row.get("extra_info") or {}
    tags = IMAGE_TAG.findall(problem)
    rules = {"problem": (tags == ["<image>"] and problem.startswith("<image>") and problem[7:].strip(),
                         f"one <image>, at the start, then a newline and the question; found the image tags {tags}"),
             "bbox": (box is None or isinstance(box, list) and [isinstance(v, int | float) for v in box] == [True] * 4,
                      "[x1, y1, x2, y2] in pixels, or null"),
             "extra_info": (isinstance(extra, dict), "an object, or nothing")}
    rules |= {key: (isinstance(row[key], list) and [*map(type, row[key])] == [str] and Path(row[key][0]).suffix,
                     "a list of one file name") for key in FOLDERS}
    for key, (good, expected) in rules.items():
        if not good:
            raise ValueError(f"{key} is {row[key]!r:.90}. Expected {expected}: correct or remove the line.")
    image, crop = (folder / row[key][0] for key in FOLDERS)
    for key, file in zip(FOLDERS, (image, crop)):
        if file.name not in listed(file.parent):
            raise FileNotFoundError(f"{key}[0] is {row[key][0]!r}, and no such file is under {folder}. Unpack the archives "
                                    "first, or give the folder that holds train.jsonl.")
    return {"id": f"{number:06d}" if extra.get("id") is None else str(extra["id"]), "image": image, "crop": crop, "bbox": box,
            "question": problem.removeprefix("<image>").removeprefix("\n"), "extra": extra,
            "answer": None if answer in (None, "") else str(answer)}


def save(image: Image.Image, path: Path) -> None:
    """PNG, or JPEG at quality 95 with full colour resolution, by the suffix."""
    with whole(path) as scratch:
        image.save(scratch, icc_profile=None, **({} if path.suffix == ".png" else {"quality": 95, "subsampling": 0}))


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


def write_triplets(folder: str | Path, samples: Iterable[dict]) -> int:
    """Write a data set laid out as the released one: images/{id}.png, teacher_images/{id}.png, and train.jsonl, which comes
    last, so a folder that has one is complete. Returns the number of rows.

    samples: dicts with id (str, a safe file name), question, answer (str or None, which is written as ""), image and crop
    (PIL RGB), bbox ([x1, y1, x2, y2] px or None), extra (dict, joins extra_info).
    Raises FileExistsError when there is one; ValueError on a bad or repeated id, an image tag in a question, no samples.
    """
    folder, names = Path(folder), set()
    if (path := folder / "train.jsonl").exists():
        raise FileExistsError(f"{path} is there already. Choose another folder, or delete this one to write it anew.")
    with whole(path) as scratch:
        for key in FOLDERS:
            (folder / key).mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as lines:
            for sample in samples:
                if sample["id"] in names:
                    raise ValueError(f"sample {sample['id']!r}: the id is repeated. Expected unique ones.")
                names.add(sample["id"])
                lines.write(json.dumps(write_sample(folder, sample, ".png"), ensure_ascii=False) + "\n")
        if not names:
            raise ValueError(f"no samples to write into {folder}. Expected at least one.")
    return len(names)


# ------------------------------------------------------------------------------------------------------------ fetching

def fetch(data: str | Path) -> Path:
    """The folder of data set `data`, ready for read_triplets: a local folder, or a hub data set's id such as
    yuanqianhao/Vision-OPD-6K, which is kept in data/<owner>/<name> under the working directory.

    Not in the hub's cache: its files are links into a store that other tools prune. Archives are unpacked in place when a
    row's image is missing; once all are there, neither archives nor network are needed (delete the folder to fetch anew).
    Call it from one process per machine. Raises FileNotFoundError, ValueError (bad archive or row), OSError (disk full).
    """
    here = Path(data).expanduser()
    is_id = not here.is_dir() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(data))
    folder = Path("data", data) if is_id else here
    try:
        read_triplets(folder)
    except FileNotFoundError:
        if folder != here:
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
            f"{hub_id!r} is neither a folder here nor a data set the hub gave us ({type(error).__name__}: {error}). Expected one "
            "with train.jsonl: check the name, the network and `hf auth login`, or copy it here.") from error


class Joined:
    """The bytes of open files, one after the other: split archives need no joined copy on disk."""

    def __init__(self, files: list):
        self.files = files

    def read(self, size: int) -> bytes:
        return next(filter(None, (file.read(size) for file in self.files)), b"")        # one at its end gives b""


def plain_files(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    if not (member.isreg() or member.isdir()):                                  # a link or a device
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)                                  # refuses what leads out of the folder


def unpack(parts: list[Path], target: Path) -> None:
    """The files of a .tar.gz, given in parts, into `target`; its members may be `x.png` or `<name of target>/x.png`. They are
    unpacked beside it, to the last byte and checksum, then moved in: killed at any moment, it holds whole files only."""
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
            for path in filter(Path.is_file, inner.rglob("*")):
                place = target / path.relative_to(inner)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{parts[0]} ({len(parts)} part(s), {size:,} bytes) cannot be unpacked: {error}. Expected a whole "
                         ".tar.gz of plain files: fetch it again (git without LFS gives pointers), or unpack it.") from error
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


def tile(row: dict, typeface) -> Image.Image:
    """One triplet to look at: image (bbox marked yellow) and crop, below them question, answer, sizes, the box's share."""
    wide, high, gap, step = 360, 256, 14, 24                                    # px: image slot (crop: high x high), text
    image, crop, box = load_image(row["image"]), load_image(row["crop"]), row["bbox"]
    share = (box[2] - box[0]) * (box[3] - box[1]) / (image.width * image.height) if box else None
    facts = (f"image {image.width} x {image.height}, {f'box {share:.2%} of it' if box else 'no box noted'}, "
             f"crop {crop.width} x {crop.height}   {row['id'][:28]}")
    texts = ((row["question"], "#202124", 18, 12), (f"answer: {row['answer'] or 'unknown'}", "#137333", 18, 3),
             (facts, "#5f6368", 15, 1))
    lines = [(line, ink, typeface(size)) for text, ink, size, most in texts
             for line in wrapped(text, typeface(size), wide + high + gap, most)]
    drawn = Image.new("RGB", (wide + high + 3 * gap, high + 3 * gap + step * len(lines)), "white")
    for picture, x, room in ((image, gap, wide), (crop, wide + 2 * gap, high)):
        method = Image.Resampling.NEAREST if 2 * picture.width <= room else Image.Resampling.LANCZOS     # show pixels
        drawn.paste(ImageOps.pad(picture, (room, high), method, "white"), (x, gap))
    draw, scale = ImageDraw.Draw(drawn), min(wide / image.width, high / image.height)
    if box:                                                                     # a red frame may be under a pixel wide here
        left, top = gap + (wide - scale * image.width) / 2, gap + (high - scale * image.height) / 2
        x1, y1, x2, y2 = (start + scale * v for start, v in zip((left, top) * 2, box))
        draw.rectangle((min(x1, x2) - 4, min(y1, y2) - 4, max(x1, x2) + 4, max(y1, y2) + 4), outline="yellow", width=2)
    for n, line in enumerate(lines):
        draw.text((gap, high + 2 * gap + n * step), *line)
    return drawn


def preview(folder: str | Path, font: Path | None = None) -> Path:
    """Draw folder/preview.png: up to 24 triplets from all over the file, three a row. Returns its path. font: a file;
    Pillow's own has Latin, Greek and Cyrillic letters only and draws empty rectangles for other scripts."""
    typeface = cache(lambda size: ImageFont.truetype(font, size) if font else ImageFont.load_default(size))
    rows, gap = read_triplets(folder), 14
    count = min(24, len(rows))
    tiles = [tile(rows[n * len(rows) // count], typeface) for n in range(count)]
    across, width, height = min(3, count), tiles[0].width + gap, max(tile.height for tile in tiles) + gap
    sheet = Image.new("RGB", (across * width + gap, -(-count // across) * height + gap), "#e3e6ea")
    for n, picture in enumerate(tiles):
        sheet.paste(picture, (gap + n % across * width, gap + n // across * height))
    save(sheet, Path(folder) / "preview.png")
    return Path(folder) / "preview.png"
