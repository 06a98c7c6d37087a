"""Triplets (full image with a red box, crop of what it frames, question): their format on disk, and a toy world of them.

    python synth.py --toy --out data/toy --n 100 --large-share 0.5      # drawn scenes: no download, no model, no labels
    python synth.py --preview data/toy                                  # preview.png of any data set: look before you train

A data set is a folder with `train.jsonl`, `images/` and `teacher_images/`, as released with the paper (Vision-OPD-6K; made
in section 3.2). The student sees images[0], the teacher teacher_images[0], both the same question.
"""
import argparse
import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import textwrap
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

RED = (255, 0, 0)                                          # the box, and nothing else in the toy world
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
    folder, samples, seen = Path(folder), [], {}
    path = folder / "train.jsonl"
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:10] if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder} has no train.jsonl ({there}). Expected a data set; point --data at its folder.")
    listed = cache(lambda place: set(os.listdir(place)) if place.is_dir() else set())      # instead of a stat per file
    for n, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            row = json.loads(line)
        except ValueError as error:                                             # JSONDecodeError, UnicodeDecodeError
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
        name = f"{len(samples):06d}" if extra.get("id") is None else str(extra["id"])
        if name in seen:
            raise ValueError(f"{where}: id {name!r} is that of line {seen[name]} too. Expected unique ids: remove one line, "
                             "or leave extra_info.id out everywhere to have the rows numbered.")
        seen[name] = n
        samples.append({"id": name, "question": problem.removeprefix("<image>").removeprefix("\n"),
                        "image": files["images"], "crop": files["teacher_images"], "bbox": box, "extra": extra,
                        "answer": None if answer in (None, "") else str(answer)})
    if not samples:
        raise ValueError(f"{path} holds no rows. Expected an object a line; fetch or write the data set again.")
    return samples


def save(image: Image.Image, path: Path) -> None:
    """PNG, or JPEG at quality 95 with full colour resolution, by the suffix; under its own name only when it is whole."""
    scratch = path.with_name(f".tmp-{path.name}")
    try:
        image.save(scratch, **({} if path.suffix == ".png" else {"quality": 95, "subsampling": 0}))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


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
                    name, question, answer = sample["id"], sample["question"], sample["answer"] or ""
                    if name in names or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
                        raise ValueError(f"sample {name!r}: the id is repeated or no plain file name. Expected unique ones.")
                    if IMAGE_TAG.search(question) or not question.strip():
                        raise ValueError(f"sample {name!r}: {question[:80]!r} is empty or holds an image tag. Leave it out.")
                    names.add(name)
                    image, crop = f"images/{name}{suffix}", f"teacher_images/{name}.png"
                    save(sample["image"], folder / image)
                    save(sample["crop"], folder / crop)
                    lines.write(json.dumps(
                        {"problem": f"<image>\n{question}", "answer": answer, "images": [image], "teacher_images": [crop],
                         "bbox": sample["bbox"], "extra_info": {**sample["extra"], "id": name, "question": question,
                                                                "answer": answer}}, ensure_ascii=False) + "\n")
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


# ------------------------------------------------------------------------------------------------------- the toy world

TOY_SPLITS = ("train", "base", "eval")                     # their streams of scenes never meet, whatever the seeds
TOY_COLOURS = {"green": (60, 190, 70), "blue": (70, 120, 255), "yellow": (240, 220, 60), "purple": (165, 95, 250),
               "cyan": (60, 210, 220), "white": (240, 240, 240)}
TOY_SHAPES = ("square", "circle", "triangle", "cross", "diamond")
TOY_DIGITS = "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717".split()     # five rows of three bits, in octal
TOY_QUESTION = "what is in the red box ?"
TOY_WORDS = [*TOY_QUESTION.split(), "a", *TOY_COLOURS, *TOY_SHAPES, "with", *"0123456789", "."]  # all there are
CELL, GRID = 16, 4                                         # px a cell, cells a side


@cache
def toy_sprites() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (6 colours, 10 digits, 16, 16, 3) uint8 and silhouettes (5 shapes, 16, 16, 1) bool of the 300 objects.

    Up to 13 px wide; the outer ring of the cell stays free, for the red box. The digit lies on a white plate, and inside
    one quarter of its cell: in a crop that is one image token. Centred it is cut into four, and without the plate it has
    six contrasts; in 400 steps the tiny model then learned to read it only sometimes, or not at all (measured).
    """
    y, x = np.mgrid[:CELL, :CELL] - CELL // 2
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    masks = np.stack([far <= 5, x * x + y * y <= 39, (far <= 6) & (2 * abs(x) <= y + 7) & (y <= 5),
                      (near <= 2) & (far <= 6), far + near <= 6])                           # in the order of TOY_SHAPES
    plate, ink = np.zeros((CELL, CELL, 1), bool), np.zeros((10, CELL, CELL, 1), bool)
    plate[7:14, 7:12] = True
    ink[:, 8:13, 8:11, 0] = [[[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in digit] for digit in TOY_DIGITS]
    colours = np.array(list(TOY_COLOURS.values()), np.uint8)[:, None, None, None]           # (6, 1, 1, 1, 3)
    return np.where(ink, np.uint8(12), np.where(plate, np.uint8(250), colours)), masks[..., None] | plate


def toy_scene(seed: int, index: int, large: bool, split: str = "train") -> dict:
    """Scene `index` of a stream as a sample for write_triplets; the same whenever and in whatever order it is drawn.

    64 x 64 px, a 4 x 4 grid, 4 to 12 objects over faint lines. The target fills one cell (6.25% of the area), or 2 x 2 of
    them when `large` (25%). image: a 1-px red box on the outer ring of these cells. crop: the cells without the box, at
    32 x 32 px always (small: pixels doubled; large: as they are), so 4 image tokens of 16 x 16 px to the image's 16.
    """
    rng = np.random.default_rng((TOY_SPLITS.index(split), seed, index))
    ground, side = rng.integers(28, 52, 3), CELL * GRID
    scene = np.full((side, side, 3), ground, np.uint8)
    ends = rng.integers(0, side, (2, rng.integers(3, 8), 2))                    # (ends, lines, yx)
    y, x = np.linspace(*ends, 2 * side).round().astype(int).T                   # (lines, points) each
    scene[y, x] = ground + rng.integers(12, 25)

    span = 2 if large else 1
    cells = [divmod(cell, GRID) for cell in rng.permutation(GRID ** 2).tolist()]                # (row, column)
    row, column = next(cell for cell in cells if max(cell) <= GRID - span)
    free = [(r, c) for r, c in cells if not (0 <= r - row < span and 0 <= c - column < span)]
    kinds = rng.integers(0, (6, 5, 10), (rng.integers(4, 13), 3)).tolist()      # the target's first, then the others'
    pixels, masks = toy_sprites()
    for (r, c), (colour, shape, digit), s in zip([(row, column), *free], kinds, [span] + [1] * 11):
        place = scene[r * CELL:(r + s) * CELL, c * CELL:(c + s) * CELL]
        np.copyto(place, enlarge(pixels[colour, digit], s), where=enlarge(masks[shape], s))

    top, left, size = row * CELL, column * CELL, span * CELL
    target = scene[top:top + size, left:left + size]
    crop = enlarge(target.copy(), 2 // span)
    target[[0, -1]] = target[:, [0, -1]] = RED
    (colour, shape, digit), kind = kinds[0], "large" if large else "small"
    return {"id": f"{split}-{seed}-{index:06d}-{kind}", "question": TOY_QUESTION,
            "bbox": [left, top, left + size, top + size],
            "answer": f"a {list(TOY_COLOURS)[colour]} {TOY_SHAPES[shape]} with {digit} .",
            "image": Image.fromarray(scene), "crop": Image.fromarray(crop), "extra": {"size": kind}}


def enlarge(pixels: np.ndarray, times: int) -> np.ndarray:
    return pixels if times == 1 else pixels.repeat(times, axis=0).repeat(times, axis=1)


def toy_scenes(n: int, seed: int, large_share: float, split: str = "train") -> Iterator[dict]:
    """Scenes 0 to n - 1 of a stream, each drawn when asked for; large targets spread evenly."""
    for index in range(n):
        yield toy_scene(seed, index, int((index + 1) * large_share) > int(index * large_share), split)


def toy(folder: str | Path, n: int, seed: int, large_share: float, split: str = "train") -> Path:
    """A data set of n toy triplets in `folder`; the same one drawn before is kept as it is.

    Its settings lie in toy.json, with a digest of the first scene that notices changed drawing code. Raises
    FileExistsError, with the difference, when the folder holds any other data set.
    """
    folder = Path(folder)
    digest = hashlib.sha256(toy_scene(seed, 0, False, split)["image"].tobytes()).hexdigest()[:16]
    wanted = {"n": n, "seed": seed, "large_share": large_share, "split": split, "first_scene": digest}
    note = folder / "toy.json"
    if (folder / "train.jsonl").is_file():
        found = json.loads(note.read_text()) if note.is_file() else {}
        if differs := {key: (found.get(key), wanted[key]) for key in wanted if found.get(key) != wanted[key]}:
            raise FileExistsError(f"{folder} holds another data set; (found, wanted) is {differs}. Choose another folder, "
                                  "or delete this one to have it drawn anew.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(wanted))
        write_triplets(folder, toy_scenes(n, seed, large_share, split))
    return folder


# ------------------------------------------------------------------------------------------------------------- preview

def preview(folder: str | Path, limit: int = 24) -> Path:
    """Draw folder/preview.png: up to `limit` triplets from all over the file, three a row, each with the framed image, its
    crop, question, answer, and the box's share of the image's area. Returns its path."""
    rows = read_triplets(folder)
    rows = [rows[i * len(rows) // min(limit, len(rows))] for i in range(min(limit, len(rows)))]
    wide, high, gap, step = 360, 256, 14, 24                                    # px: image slot (crop: high x high), text
    texts = []
    for row in rows:
        lines = textwrap.wrap(row["question"], 76, max_lines=5, placeholder=" …")
        texts.append([*((line, 18, "#202124") for line in lines),
                      (f"answer: {row['answer'] or 'unknown'}"[:76], 18, "#137333")])
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
            draw.text((left + gap, top + high + 2 * gap + k * step), line, ink, ImageFont.load_default(size))
    with naming_full_disks(Path(folder)):
        save(sheet, Path(folder) / "preview.png")
    return Path(folder) / "preview.png"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preview", type=Path, metavar="DIR", help="draw DIR/preview.png: 24 triplets of the data set in DIR")
    # the toy world (ours: shows and tests the whole method without a download)
    p.add_argument("--toy", action=argparse.BooleanOptionalAction, default=False, help="draw toy triplets into --out")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder to write; the same set there is kept, another refused")
    p.add_argument("--n", type=int, default=100, help="triplets to draw")
    p.add_argument("--seed", type=int, default=0, help="scene i depends on (split, seed, i) and on nothing else")
    p.add_argument("--split", choices=TOY_SPLITS, default="train", help="three streams of scenes that never meet")
    p.add_argument("--large-share", type=float, default=0.5, help="targets of 2 x 2 cells, easy in the full view "
                   "(ours: half, so that learning the small ones does not forget the large ones)")
    args = p.parse_args()
    if not args.toy and not args.preview:
        p.error("nothing to do: give --toy --out DIR, or --preview DIR")
    if args.toy and (args.out is None or args.n < 1 or not 0 <= args.large_share <= 1):
        p.error(f"--toy needs --out DIR, --n >= 1, --large-share in [0, 1]; got {args.out}, {args.n}, {args.large_share}")
    if args.toy:
        print(f"drawn: {preview(toy(args.out, args.n, args.seed, args.large_share, args.split))}")
    if args.preview:
        print(f"drawn: {preview(args.preview)}")


if __name__ == "__main__":
    main()
