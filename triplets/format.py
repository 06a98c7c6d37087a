"""The triplet format: full image with a red box, crop of what it frames, and a question, as released with the paper
(Vision-OPD-6K): read, checked, written, fetched, and drawn to be looked at.

A data set is a folder with `train.jsonl`, `images/` and `teacher_images/`. The student sees images[0], the teacher
teacher_images[0], both the same question.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from storage.files import whole
from storage.images import save

RED = (255, 0, 0)  # the box
FOLDERS = ("images", "teacher_images")  # of full images and of crops; keys of a row as well
IMAGE_TAG = re.compile(
    r"<image>|<video>|<\|(?:image|video|vision)_\w+\|>"
)  # each would change the number of images


@dataclass
class Triplet:
    """One sample: a full image with a red box, a crop of what it frames, and a question about it."""

    id: str  # unique in its data set, and a plain file name
    question: str  # without the <image> tag, hint kept
    image: (
        Path | Image.Image
    )  # the full image: its file, or, where it is still to be written, the picture (RGB)
    crop: Path | Image.Image  # the same for the crop
    bbox: list[int] | None = None  # [x1, y1, x2, y2] px in the full image
    answer: str | None = None
    extra: dict = field(default_factory=dict)  # extra_info, whole


def read_triplets(folder: str | Path, errors: list[Exception] | None = None) -> list[Triplet]:
    """The rows of folder/train.jsonl in file order, every one of them checked.

    Their id is extra_info.id, else the row's number.
    Raises FileNotFoundError / ValueError with file and line for broken JSON, a missing key or file, a repeated id, no rows;
    those of rows join `errors` instead, if that is given.
    """
    folder, samples, seen = Path(folder), [], {}
    path = folder / "train.jsonl"
    if not path.is_file():
        there = (
            sorted(entry.name for entry in folder.iterdir())[:10]
            if folder.is_dir()
            else "no such folder"
        )
        raise FileNotFoundError(
            f"{folder} has no train.jsonl ({there}). Expected a data set: give the folder that holds it."
        )
    listed = cache(
        lambda place: set(os.listdir(place)) if place.is_dir() else set()
    )  # instead of a stat per file
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(
            f"{path} holds no rows. Expected an object a line; fetch or write the data set again."
        )
    for number, (n, line) in enumerate(lines):
        try:
            sample = read_row(line, number, folder, listed)
            if (first := seen.setdefault(sample.id, n)) != n:
                raise ValueError(
                    f"id {sample.id!r} is that of line {first} too. Expected unique ids: remove one line, or "
                    "leave extra_info.id out everywhere to have the rows numbered."
                )
            samples.append(sample)
        except (ValueError, FileNotFoundError) as error:
            named = type(error)(f"{path}, line {n}: {error}")
            if errors is None:
                raise named from error
            errors.append(named)
    return samples


def read_row(line: bytes, number: int, folder: Path, listed) -> Triplet:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"no JSON ({error}): {line[:60]!r}. Expected an object a line; fetch the file again if it is cut "
            "off, or if these are the lines of a git-lfs pointer."
        ) from error
    if not isinstance(row, dict) or not {"problem", *FOLDERS} <= row.keys():
        raise ValueError(
            f"found {sorted(row) if isinstance(row, dict) else type(row).__name__}. Expected the keys problem, "
            "images and teacher_images: add them."
        )
    problem, box, answer, extra = (
        str(row["problem"]),
        row.get("bbox"),
        row.get("answer"),
        row.get("extra_info") or {},
    )
    tags = IMAGE_TAG.findall(problem)
    rules = {
        "problem": (
            tags == ["<image>"] and problem.startswith("<image>") and problem[7:].strip(),
            f"one <image>, at the start, then a newline and the question; found the image tags {tags}",
        ),
        "bbox": (
            box is None
            or isinstance(box, list)
            and [isinstance(v, int | float) for v in box] == [True] * 4,
            "[x1, y1, x2, y2] in pixels, or null",
        ),
        "extra_info": (isinstance(extra, dict), "an object, or nothing"),
    }
    rules |= {
        key: (
            isinstance(row[key], list)
            and [*map(type, row[key])] == [str]
            and Path(row[key][0]).suffix,
            "a list of one file name",
        )
        for key in FOLDERS
    }
    for key, (good, expected) in rules.items():
        if not good:
            raise ValueError(
                f"{key} is {row[key]!r:.90}. Expected {expected}: correct or remove the line."
            )
    image, crop = (folder / row[key][0] for key in FOLDERS)
    for key, file in zip(FOLDERS, (image, crop)):
        if file.name not in listed(file.parent):
            raise FileNotFoundError(
                f"{key}[0] is {row[key][0]!r}, and no such file is under {folder}. Unpack the archives "
                "first, or give the folder that holds train.jsonl."
            )
    name = f"{number:06d}" if extra.get("id") is None else str(extra["id"])
    question = problem.removeprefix("<image>").removeprefix("\n")
    return Triplet(
        name, question, image, crop, box, None if answer in (None, "") else str(answer), extra
    )


def write_sample(folder: Path, sample: Triplet, suffix: str) -> dict:
    """Saves image and crop of a sample (see write_triplets) and returns its row of train.jsonl. Raises ValueError."""
    name, question, answer = sample.id, sample.question, sample.answer or ""
    if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(
            f"sample {name!r}: the id is no plain file name. Choose letters, digits, '.', '_' and '-'."
        )
    if IMAGE_TAG.search(question) or not question.strip():
        raise ValueError(
            f"sample {name!r}: {question[:80]!r} is empty or holds an image tag. Leave it out."
        )
    image, crop = f"images/{name}{suffix}", f"teacher_images/{name}.png"
    save(sample.image, folder / image)
    save(sample.crop, folder / crop)
    return {
        "problem": f"<image>\n{question}",
        "answer": answer,
        "images": [image],
        "teacher_images": [crop],
        "bbox": sample.bbox,
        "extra_info": {**sample.extra, "id": name, "question": question, "answer": answer},
    }


def write_triplets(folder: str | Path, samples: Iterable[Triplet]) -> int:
    """Write a data set laid out as the released one: images/{id}.png, teacher_images/{id}.png, and train.jsonl, which comes
    last, so a folder that has one is complete. Returns the number of rows.

    samples: with pictures; an answer of None is written as "", `extra` joins extra_info.
    Raises FileExistsError when there is one; ValueError on a bad or repeated id, an image tag in a question, no samples.
    """
    folder, names = Path(folder), set()
    if (path := folder / "train.jsonl").exists():
        raise FileExistsError(
            f"{path} is there already. Choose another folder, or delete this one to write it anew."
        )
    with whole(path) as scratch:
        for key in FOLDERS:
            (folder / key).mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as lines:
            for sample in samples:
                if sample.id in names:
                    raise ValueError(
                        f"sample {sample.id!r}: the id is repeated. Expected unique ones."
                    )
                names.add(sample.id)
                lines.write(
                    json.dumps(write_sample(folder, sample, ".png"), ensure_ascii=False) + "\n"
                )
        if not names:
            raise ValueError(f"no samples to write into {folder}. Expected at least one.")
    return len(names)
