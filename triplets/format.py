"""The triplet format: full image with a red box, crop of what it frames, and a question, as
released with the paper (Vision-OPD-6K): read, checked, written.

A data set is a folder with `train.jsonl`, `images/` and `teacher_images/`. The student sees
images[0], the teacher teacher_images[0], both the same question.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from storage.files import numbered_lines, write_jsonl
from storage.images import save_image

RED = (255, 0, 0)  # the box
FOLDERS = ("images", "teacher_images")  # of full images and of crops; keys of a row as well
# each of these would change the number of images
IMAGE_TAG = re.compile(r"<image>|<video>|<\|(?:image|video|vision)_\w+\|>")


@dataclass
class Triplet:
    """One sample: a full image with a red box, a crop of what it frames, and a question about
    it."""

    id: str  # unique in its data set, and a plain file name
    question: str  # without the <image> tag, hint kept
    # the full image: its file, or, where it is still to be written, the picture (RGB)
    image: Path | Image.Image
    crop: Path | Image.Image  # the same for the crop
    bbox: list[int] | None = None  # [x1, y1, x2, y2] px in the full image
    answer: str | None = None
    extra: dict = field(default_factory=dict)  # extra_info, whole


# ----------------------------------------------------------------------------------------- reading


def read_triplets(folder: str | Path, errors: list[Exception] | None = None) -> list[Triplet]:
    """The rows of folder/train.jsonl in file order, every one of them checked.

    Their id is extra_info.id, else the row's number. Raises FileNotFoundError / ValueError with
    file and line for broken JSON, a missing key or file, a repeated id, no rows; those of rows join
    `errors` instead, if that is given.
    """
    folder = Path(folder)
    path = folder / "train.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no folder with a train.jsonl. Give the folder of a data set."
        )

    @cache
    def names_in(place):  # listed once, instead of a stat for every file
        return set(os.listdir(place))

    triplets = []
    line_of = {}  # id -> the line that has it
    for number, (n, line) in enumerate(numbered_lines(path)):
        try:
            triplet = read_row(line, number, folder)
            for file in (triplet.image, triplet.crop):
                if file.name not in names_in(file.parent):
                    raise FileNotFoundError(f"no such file: {file}. Unpack the archives first.")
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
    if not triplets and not errors:
        raise ValueError(
            f"{path} holds no rows. Expected an object a line; fetch or write the data set again."
        )
    return triplets


def read_row(line, number, folder) -> Triplet:
    """The triplet of a line of train.jsonl, the `number`-th."""
    try:
        row = json.loads(line)
        problem, *names = (row[key] for key in ("problem", *FOLDERS))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(
            f"no JSON object with problem, images and teacher_images ({error!r}): {line[:60]!r}. "
            "Correct it, or fetch the file again if it is cut off or a git-lfs pointer."
        ) from error
    tag, _, question = str(problem).partition("<image>")
    expected = "<image>, a newline and the question, without another image tag"
    expect(row, "problem", not tag and is_question(question), expected)
    for key, named in zip(FOLDERS, names, strict=True):
        is_one = isinstance(named, list) and [type(name) for name in named] == [str]
        expect(row, key, is_one and Path(named[0]).suffix, "a list of one file name")
    box = row.get("bbox")
    numbers = isinstance(box, list) and [isinstance(v, int | float) for v in box]
    good = box is None or numbers == [True] * 4
    expect(row, "bbox", good, "[x1, y1, x2, y2] in pixels, or null")
    extra = row.get("extra_info") or {}
    expect(row, "extra_info", isinstance(extra, dict), "an object, or nothing")
    name = extra.get("id")
    answer = row.get("answer")
    return Triplet(
        id=f"{number:06d}" if name is None else str(name),
        question=question.removeprefix("\n"),
        image=folder / names[0][0],
        crop=folder / names[1][0],
        bbox=box,
        answer=None if answer in (None, "") else str(answer),
        extra=extra,
    )


def is_question(text):
    return bool(text.strip()) and not IMAGE_TAG.search(text)


def expect(row, key, good, expected):
    if not good:
        raise ValueError(
            f"{key} is {row[key]!r:.90}. Expected {expected}: correct or remove the line."
        )


# ----------------------------------------------------------------------------------------- writing


def write_sample(folder: Path, sample: Triplet, suffix: str) -> dict:
    """Saves image and crop of a sample (see write_triplets) and returns its row of train.jsonl.
    suffix: of the full image, ".png" or ".jpg". Raises ValueError."""
    name, question, answer = sample.id, sample.question, sample.answer or ""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII) or not is_question(question):
        raise ValueError(
            f"sample {name!r}: {question[:80]!r}. Expected an id that is a plain file name, and a "
            "question without image tag: leave it out."
        )
    image = f"images/{name}{suffix}"
    crop = f"teacher_images/{name}.png"
    save_image(sample.image, folder / image)
    save_image(sample.crop, folder / crop)
    return {
        "problem": f"<image>\n{question}",
        "answer": answer,
        "images": [image],
        "teacher_images": [crop],
        "bbox": sample.bbox,
        "extra_info": {**sample.extra, "id": name, "question": question, "answer": answer},
    }


def write_triplets(folder: str | Path, samples: Iterable[Triplet]) -> int:
    """Write a data set laid out as the released one: images/{id}.png, teacher_images/{id}.png, and
    train.jsonl, which comes last, so a folder that has one is complete. Returns the number of rows.

    samples: with pictures; an answer of None is written as "", `extra` joins extra_info.
    Raises FileExistsError when there is one; ValueError on a bad or repeated id, an image tag in a
    question, no samples.
    """
    folder = Path(folder)
    path = folder / "train.jsonl"
    names = set()
    if path.exists():
        raise FileExistsError(
            f"{path} is there already. Choose another folder, or delete this one to write it anew."
        )
    for key in FOLDERS:
        (folder / key).mkdir(parents=True, exist_ok=True)

    def rows():
        for sample in samples:
            if sample.id in names:
                raise ValueError(f"sample {sample.id!r}: the id is repeated. Expected unique ones.")
            names.add(sample.id)
            yield write_sample(folder, sample, ".png")
        if not names:
            raise ValueError(f"no samples to write into {folder}. Expected at least one.")

    write_jsonl(path, rows())
    return len(names)
