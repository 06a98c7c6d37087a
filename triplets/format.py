"""The triplet format: full image with a red box, crop of what it frames, and a question, as
released with the paper (Vision-OPD-6K): read, checked, written. There may be several boxes, with a
crop of each (ours).

A data set is a folder with `train.jsonl`, `images/` and `teacher_images/`. The student sees
images[0], the teacher all of teacher_images, both the same question.
"""

import hashlib
import json
import math
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from storage.files import numbered_lines, write_jsonl
from storage.images import save_image

RED = (255, 0, 0)  # the box
AT_ONCE = 50_000_000  # bytes of train.jsonl that are read at once (ours: a second or two)
FOLDERS = ("images", "teacher_images")  # of full images and of crops; keys of a row as well
HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can say it, no file can hold it
# each of these would change the number of images, or begin and end turns of the chat
TAG = re.compile(r"<image>|<video>|<\|\w+\|>")


@dataclass
class Triplet:
    """One sample: a full image with red boxes, mostly one, a crop of what each frames, and a
    question about it."""

    id: str  # unique in its data set, and a plain file name
    question: str  # without the <image> tag, hint kept
    # the full image: its file, or, where it is still to be written, the picture (RGB)
    image: Path | Image.Image
    crops: list[Path | Image.Image]  # the same for the crops, at least one
    boxes: list[list[int]] | None = None  # [x1, y1, x2, y2] px in the full image, one a crop
    answer: str | None = None
    extra: dict = field(default_factory=dict)  # extra_info, whole

    def shown(self, view: str) -> list[Path | Image.Image]:
        """The pictures of a view: of "image" the full one, of "crop" all crops."""
        return [self.image] if view == "image" else self.crops

    @property
    def bytes(self) -> int:
        """Of its files, but for the first crop: every row has one."""
        return sum(map(os.path.getsize, [self.image, *self.crops[1:]]))


def only(values: list | None):
    """The one value of a list that has no other, else the list: data of one region stay flat."""
    return values[0] if values and len(values) == 1 else values


# ----------------------------------------------------------------------------------------- reading


def read_triplets(folder: str | Path, errors: list[Exception] | None = None) -> list[Triplet]:
    """The rows of folder/train.jsonl in file order, every one of them checked.

    Their id is extra_info.id, else the row's number. Raises FileNotFoundError / ValueError with
    file and line for broken JSON, a missing key or file, a repeated id, no rows; those of rows join
    `errors` instead, if that is given.
    """
    folder = Path(folder)
    path = rows_of(folder)

    @cache
    def names_in(place: Path) -> set[str]:  # listed once, instead of a stat for every file
        return set(os.listdir(place)) if place.is_dir() else set()

    def is_there(file: Path) -> bool:
        return file.name in names_in(file.parent)

    lines = list(numbered_lines(path))
    if not lines:
        raise ValueError(
            f"{path} holds no rows. Expected an object a line; fetch or write the data set again."
        )
    triplets = []
    line_of = {}  # id -> the line that has it
    for number, (n, line) in enumerate(lines):
        try:
            triplet = read_row(line, number, folder, is_there)
            first = line_of.setdefault(triplet.id, n)
            if first != n:
                raise ValueError(
                    f"id {triplet.id!r} is that of line {first} too. Expected unique ids: remove "
                    "one line, or leave extra_info.id out everywhere to have the rows numbered."
                )
            triplets.append(triplet)
        except (ValueError, FileNotFoundError) as error:
            named = type(error)(f"{path}, line {n}: {error}")
            if errors is None:
                raise named from error
            errors.append(named)
    return triplets


def rows_of(folder: Path) -> Path:
    """Its train.jsonl. Raises FileNotFoundError."""
    if not (folder / "train.jsonl").is_file():
        there = "no such folder"
        if folder.is_dir():
            there = sorted(entry.name for entry in folder.iterdir())[:10]
        raise FileNotFoundError(
            f"{folder} has no train.jsonl ({there}). Expected a data set: give the folder that "
            "holds it."
        )
    return folder / "train.jsonl"


def open_triplets(folder: str | Path) -> Sequence[Triplet]:
    """read_triplets for training: of a file so large that reading it takes minutes each row is read
    and checked when it is asked for, and that ids are unique is not."""
    folder = Path(folder)
    if rows_of(folder).stat().st_size <= AT_ONCE:
        return read_triplets(folder)
    return LazyTriplets(folder)


class LazyTriplets(Sequence):
    """The rows of a large train.jsonl, of which only where each begins is kept. Their errors name
    file and line too."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, rows_of(folder)
        self.file = self.path.open("rb")
        self.sha256 = hashlib.sha256()
        self.begins, self.sizes = array("q"), array("q")  # of lines that are not blank, in bytes
        begin = 0
        for line in self.file:
            self.sha256.update(line)
            if line.strip():
                self.begins.append(begin)
                self.sizes.append(len(line))
            begin += len(line)
        for i in (0, len(self) - 1):  # is anything there at all?
            self[i]

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, i: int) -> Triplet:
        line = os.pread(self.file.fileno(), self.sizes[i], self.begins[i])  # workers share the file
        try:
            return read_row(line, i, self.folder, Path.is_file)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{self.path}, line {i + 1}: {error}") from error


def read_row(line: bytes, number: int, folder: Path, is_there) -> Triplet:
    """The triplet of a line of train.jsonl, the `number`-th. is_there: a path -> bool."""
    row = read_object(line)
    problem = str(row["problem"])
    expect(row, "problem", not HALF.search(problem), "text that can be written as UTF-8")
    question = problem.removeprefix("<image>")
    tags = TAG.findall(problem)
    good = tags == ["<image>"] and question != problem and question.strip()
    expected = "one <image>, at the start, then a newline and the question, and no other tag"
    expect(row, "problem", good, f"{expected}; found {tags}")
    answer = row.get("answer")
    good = answer is None or isinstance(answer, str) or is_number(answer)
    good = good and not HALF.search(str(answer))
    expect(row, "answer", good, "a text of whole characters, a number or null")
    extra = row.get("extra_info") or {}
    expect(row, "extra_info", isinstance(extra, dict), "an object, or nothing")
    images, crops = (find_images(row, key, folder, is_there) for key in FOLDERS)
    boxes = row.get("bbox")
    if isinstance(boxes, list) and not any(isinstance(box, list) for box in boxes):
        boxes = [boxes]
    good = isinstance(boxes, list) and len(boxes) == len(crops) and all(map(is_box, boxes))
    expected = "[x1, y1, x2, y2] in pixels, of several crops a list with one of each, or null"
    expect(row, "bbox", boxes is None or good, expected)
    name = extra.get("id")
    return Triplet(
        id=f"{number:06d}" if name is None else str(name),
        question=question.removeprefix("\n"),
        image=images[0],
        crops=crops,
        boxes=boxes and [[round(edge) for edge in box] for box in boxes],
        answer=None if answer in (None, "") else str(answer),
        extra=extra,
    )


def read_object(line: bytes) -> dict:
    """A line's object, with the three keys that every row has."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"no JSON ({error}): {line[:60]!r}. Expected an object a line; fetch the file again if "
            "it is cut off, or if these are the lines of a git-lfs pointer."
        ) from error
    if not isinstance(row, dict) or not {"problem", *FOLDERS} <= row.keys():
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"found {found}. Expected the keys problem, images and teacher_images: add them."
        )
    return row


def is_number(value) -> bool:
    """JSON's true, NaN and Infinity are none."""
    return type(value) is int or type(value) is float and math.isfinite(value)


def expect(row: dict, key: str, good: bool, expected: str):
    if not good:
        raise ValueError(
            f"{key} is {row[key]!r:.90}. Expected {expected}: correct or remove the line."
        )


def is_box(box) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(is_number, box))


def find_images(row: dict, key: str, folder: Path, is_there) -> list[Path]:
    """The files that row[key], a list of names relative to `folder`, names."""
    names = row[key]
    good = isinstance(names, list) and all(isinstance(name, str) for name in names)
    good = good and names and all(Path(name).suffix for name in names)
    good = good and (len(names) == 1 or key != "images")
    expect(row, key, good, "a list of one file name, or of several crops' names")
    for n, name in enumerate(names):
        if not is_there(folder / name):
            raise FileNotFoundError(
                f"{key}[{n}] is {name!r}, and no such file is under {folder}. Unpack the archives "
                "first, or give the folder that holds train.jsonl."
            )
    return [folder / name for name in names]


# ----------------------------------------------------------------------------------------- writing


def write_sample(folder: Path, sample: Triplet, suffix: str) -> dict:
    """Saves image and crops of a sample (see write_triplets) and returns its row of train.jsonl.
    suffix: of the full image, ".png" or ".jpg". Raises ValueError."""
    name = sample.id
    question = sample.question
    answer = sample.answer or ""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(
            f"sample {name!r}: the id is no plain file name. Choose letters, digits, '.', '_' and "
            "'-'."
        )
    if TAG.search(question) or not question.strip():
        raise ValueError(
            f"sample {name!r}: {question[:80]!r} is empty or holds a tag. Leave it out."
        )
    count = len(sample.crops)
    if count == 0 or len(sample.boxes or sample.crops) != count:
        raise ValueError(
            f"sample {name!r}: {count} crops, boxes {sample.boxes}. Give at least one crop, and no "
            "boxes or one a crop."
        )
    image = f"images/{name}{suffix}"
    crops = [f"teacher_images/{name}-{n}.png" for n in range(1, count + 1)]
    if count == 1:
        crops = [f"teacher_images/{name}.png"]
    for picture, file in zip([sample.image, *sample.crops], [image, *crops], strict=True):
        save_image(picture, folder / file)
    return {
        "problem": f"<image>\n{question}",
        "answer": answer,
        "images": [image],
        "teacher_images": crops,
        "bbox": only(sample.boxes),
        "extra_info": {**sample.extra, "id": name, "question": question, "answer": answer},
    }


def write_triplets(folder: str | Path, samples: Iterable[Triplet]) -> int:
    """Write a data set laid out as the released one: images/{id}.png, teacher_images/{id}.png (of
    several crops {id}-1.png, ..), and train.jsonl, which comes last, so a folder that has one is
    complete. Returns the number of rows.

    samples: with pictures; an answer of None is written as "", `extra` joins extra_info.
    Raises FileExistsError when there is one; ValueError on a bad or repeated id, an image tag in a
    question, boxes that are not one a crop, no samples.
    """
    folder = Path(folder)
    path = folder / "train.jsonl"
    if path.exists():
        raise FileExistsError(
            f"{path} is there already. Choose another folder, or delete this one to write it anew."
        )
    for key in FOLDERS:
        (folder / key).mkdir(parents=True, exist_ok=True)
    rows = {}  # by id
    crops = set()
    for sample in samples:
        if sample.id in rows:
            raise ValueError(f"sample {sample.id!r}: the id is repeated. Expected unique ones.")
        row = rows[sample.id] = write_sample(folder, sample, ".png")
        if not crops.isdisjoint(row["teacher_images"]):  # a second crop of "a", the crop of "a-2"
            raise ValueError(
                f"sample {sample.id!r}: {row['teacher_images']} are another sample's crops too. "
                "Choose an id that is none with a number behind it."
            )
        crops.update(row["teacher_images"])
    if not rows:
        raise ValueError(f"no samples to write into {folder}. Expected at least one.")
    write_jsonl(path, rows.values())
    return len(rows)
