"""What is wrong with any data set of triplets, and what looks wrong."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from storage.images import image_size, load_image
from synthesis.texts import PROMPTS, leaks, normal
from triplets.format import RED, Triplet, only, read_triplets


def check_triplets(folder: Path):
    """Prints what is wrong with a data set, and what looks wrong. Raises ValueError when there are
    errors."""
    errors, bare = [], []
    samples = read_triplets(folder, errors)
    with ThreadPoolExecutor() as pool:
        flaws = tqdm(
            pool.map(partial(flaw, bare), samples), "check", len(samples), unit="row", disable=None
        )
        errors += filter(None, flaws)
    for error in errors:
        print(f"error: {error}")
    if bare:
        bare.sort()
        print(f"warning: {len(bare)} images lack red round a box, the first {bare[:5]}")
    for warning in balance(samples):
        print(f"warning: {warning}")
    boxes = sum(sample.boxes is not None for sample in samples)
    answers = sum(sample.answer is not None for sample in samples)
    print(
        f"{folder}: {len(samples)} well-formed rows, {boxes} with a box, {answers} with an answer; "
        f"{len(errors)} errors"
    )
    if errors:
        raise ValueError(
            f"{folder} has {len(errors)} errors and {len(samples)} well-formed rows. Correct or "
            "remove what is named."
        )


def flaw(bare: list[str], sample: Triplet) -> str | None:
    """What is wrong with a sample's images or boxes, if anything. Its id joins `bare` where a box
    has no frame."""
    try:
        image = load_image(sample.image)
        width, height = image.size
        for file in (sample.image, *sample.crops):
            load_image(file)
            image_size(file)  # raises for one that is too long
    except (OSError, ValueError) as error:
        return f"sample {sample.id}: {error}"
    for x1, y1, x2, y2 in sample.boxes or []:
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            return (
                f"sample {sample.id}: bbox is {only(sample.boxes)}. Expected x1 < x2 <= {width}, "
                f"y1 < y2 <= {height}: correct it, or write null."
            )
    if not all(has_frame(image, box) for box in sample.boxes or []):
        bare.append(sample.id)
    return None


def has_frame(image, box) -> bool:
    """Whether there is as much red in and round a box as one side of its frame has."""
    x1, y1, x2, y2 = box
    reach = 16 + max(x2 - x1, y2 - y1) // 20  # px, in which a frame may lie
    pixels = np.asarray(image.crop((x1 - reach, y1 - reach, x2 + reach, y2 + reach)), int)
    return (abs(pixels - RED) <= 60).all(-1).sum() >= min(x2 - x1, y2 - y1)  # also of a JPEG


def balance(samples: list[Triplet]) -> list[str]:
    """Warnings: answers in their own question, one answer over 10% or one type over 35% of the
    samples."""
    answers = []
    types = []
    leaky = []
    for sample in samples:
        stem, answer = stem_and_answer(sample)
        if answer:
            answers.append(normal(answer))
        if leaks(stem, answer):
            leaky.append(sample.id)
        if isinstance(sample.extra.get("type"), str):
            types.append(sample.extra["type"])
    found = [f"{len(leaky)} questions contain their answer, the first {leaky[:5]}"] if leaky else []
    for what, limit, values in (("answer", 0.1, answers), ("type", 0.35, types)):
        for value, n in Counter(values).items():
            if n > max(1, limit * len(values)):
                found.append(f"{n} of {len(values)} {what}s are {value!r}, over {limit:.0%}")
    return found


def stem_and_answer(sample: Triplet) -> tuple[str, str]:
    """The question without hint and options, and the answer's text where it is a letter: "A.
    bark"."""
    question = sample.question
    for hint in (PROMPTS["hint"], PROMPTS["pair"]["hint"]):  # which say "red"
        question = question.replace(hint, "")
    option = r"\n+\(?([A-H])[.)] (.*)"
    stem = re.split(option, question)[0]
    options = dict(re.findall(option, question))
    return stem, options.get(sample.answer, sample.answer) or ""
