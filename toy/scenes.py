"""The toy world: drawn scenes with questions, a tiny Qwen3.5, and its base training, so that the whole method runs in minutes
on a CPU with nothing to download; and the table of all methods on it.

    python train.py --toy                           # the demonstration: RUN, prepare_run and judge below
    python -m toy --out data/toy --n 100            # draw triplets: no model, no labels needed
    python -m toy --ablate --out runs/ablate        # every teacher, objective and baseline of train.py, several seeds, one table

A scene is 64 x 64 px, a 4 x 4 grid with 4 to 12 objects over faint lines; "what is in the red box ?" is answered by, say,
"a green cross with 7 .". What the box holds, and what else is asked:

    small     one object in one cell                          hard in the full view, easy in the crop
    pair      two neighbours, so an answer twice as long      the same
    large     one object, twice as large                      easy in both
    colour    one small object, only its colour is asked      holdout: easy, and never in the distillation data
    corner    no box: what is at the top left (..), large     holdout
"""

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.rows import Question
from benchmarks.sources import read_benchmark
from triplets.format import RED, Triplet, write_triplets

SPLITS = ("train", "base", "eval")  # their streams of scenes never meet, whatever the seeds
KINDS = {
    "small": (1, 1),
    "pair": (1, 2),
    "large": (2, 2),
    "colour": (1, 1),
    "corner": (2, 2),
}  # rows, columns of the target
MIX = (
    "small",
    "pair",
    "large",
)  # cycled through: without large ones their skill would be forgotten
ROWS = 6000  # triplets of the distillation
EVAL = ("small", "pair", "large", "small", "pair", "large", "colour", "corner")
COLOURS = {
    "green": (60, 190, 70),
    "blue": (70, 120, 255),
    "yellow": (240, 220, 60),
    "purple": (165, 95, 250),
    "cyan": (60, 210, 220),
    "white": (240, 240, 240),
}  # red is the box's alone
SHAPES = ("square", "circle", "triangle", "cross", "diamond")
DIGITS = (
    "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717".split()
)  # five rows of three bits, in octal
CELL, GRID = 16, 4  # px a cell, cells a side


@cache
def sprites() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (6 colours, 10 digits, 16, 16, 3) uint8 and silhouettes (5 shapes, 16, 16, 1) bool of the 300 objects.

    Up to 13 px wide; the outer ring of the cell stays free, for the red box. The digit lies on a white plate, and inside
    one quarter of its cell: in a crop that is one image token. Centred it is cut into four, and without the plate it has
    six contrasts; in 400 steps the tiny model then learned to read it only sometimes, or not at all (measured).
    """
    y, x = np.mgrid[:CELL, :CELL] - CELL // 2
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    masks = np.stack(
        [
            far <= 5,
            x * x + y * y <= 39,
            (far <= 6) & (2 * abs(x) <= y + 7) & (y <= 5),
            (near <= 2) & (far <= 6),
            far + near <= 6,
        ]
    )  # in the order of SHAPES
    plate, ink = np.zeros((CELL, CELL, 1), bool), np.zeros((10, CELL, CELL, 1), bool)
    plate[7:14, 7:12] = True
    ink[:, 8:13, 8:11, 0] = [
        [[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in digit] for digit in DIGITS
    ]
    colours = np.array(list(COLOURS.values()), np.uint8)[:, None, None, None]  # (6, 1, 1, 1, 3)
    return np.where(ink, np.uint8(12), np.where(plate, np.uint8(250), colours)), masks[
        ..., None
    ] | plate


def enlarge(pixels: np.ndarray, times: int) -> np.ndarray:
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def scene(seed: int, index: int, kind: str, split: str = "train") -> Triplet:
    """Scene `index` of a stream as a sample for write_triplets; the same whenever and in whatever order it is drawn.

    image: (64, 64) px with a 1-px red box on the outer ring of the target's cells (none for `corner`). crop: these cells
    without the box, 32 px high always (small cells: pixels doubled), so 4 image tokens of 16 x 16 px, or 8 for a pair.
    """
    rng = np.random.default_rng((SPLITS.index(split), seed, index, list(KINDS).index(kind)))
    ground, side = rng.integers(28, 52, 3), CELL * GRID
    picture = np.full((side, side, 3), ground, np.uint8)
    ends = rng.integers(0, side, (2, rng.integers(3, 8), 2))  # (ends, lines, yx)
    y, x = np.linspace(*ends, 2 * side).round().astype(int).T  # (lines, points) each
    picture[y, x] = ground + rng.integers(12, 25)

    high, wide = KINDS[kind]
    cells = [divmod(cell, GRID) for cell in rng.permutation(GRID**2).tolist()]  # (row, column)
    row, column = next(
        (r, c)
        for r, c in cells
        if r <= GRID - high and c <= GRID - wide and (kind != "corner" or {r, c} <= {0, 2})
    )
    targets = [(row, column), (row, column + 1)] if kind == "pair" else [(row, column)]
    free = [(r, c) for r, c in cells if not (0 <= r - row < high and 0 <= c - column < wide)]
    objects = rng.integers(
        0, (6, 5, 10), (rng.integers(4, 13), 3)
    ).tolist()  # the targets first, then the others
    pixels, masks = sprites()
    for (r, c), (colour, shape, digit), s in zip(
        [*targets, *free], objects, [high] * len(targets) + [1] * 12
    ):
        place = picture[r * CELL : (r + s) * CELL, c * CELL : (c + s) * CELL]
        np.copyto(place, enlarge(pixels[colour, digit], s), where=enlarge(masks[shape], s))

    top, left, bottom, right = (
        row * CELL,
        column * CELL,
        (row + high) * CELL,
        (column + wide) * CELL,
    )
    target = picture[top:bottom, left:right]
    crop = enlarge(target.copy(), 2 // high)
    named = [
        f"a {list(COLOURS)[colour]} {SHAPES[shape]} with {digit}"
        for colour, shape, digit in objects[: len(targets)]
    ]
    question, answer = "what is in the red box ?", f"{' , '.join(named)} ."
    if kind == "colour":
        question, answer = (
            "what colour is in the red box ?",
            f"a {list(COLOURS)[objects[0][0]]} one .",
        )
    if kind == "corner":
        question = f"what is at the {'bottom' if row else 'top'} {'right' if column else 'left'} ?"
    else:
        target[[0, -1]] = target[:, [0, -1]] = RED
    return Triplet(
        f"{split}-{seed}-{index:06d}-{kind}",
        question,
        Image.fromarray(picture),
        Image.fromarray(crop),
        [left, top, right, bottom],
        answer,
        {"toy": kind},
    )


def scenes(n: int, seed: int, split: str = "train") -> Iterator[Triplet]:
    """Scenes 0 to n - 1 of a stream, each drawn when asked for; their kinds take turns."""
    kinds = EVAL if split == "eval" else MIX
    for index in range(n):
        yield scene(seed, index, kinds[index % len(kinds)], split)


def draw(folder: str | Path, n: int, seed: int, split: str = "train") -> Path:
    """A data set of n toy triplets in `folder`; the same one drawn before is kept as it is.

    Its settings lie in toy.json, with a digest of the first scene that notices changed drawing code. Raises
    FileExistsError, with the difference, when the folder holds any other data set.
    """
    folder = Path(folder)
    digest = hashlib.sha256(scene(seed, 0, "small", split).image.tobytes()).hexdigest()[:16]
    wanted = {"n": n, "seed": seed, "split": split, "first_scene": digest}
    note = folder / "toy.json"
    if (folder / "train.jsonl").is_file():
        found = json.loads(note.read_text()) if note.is_file() else {}
        if differs := {
            key: (found.get(key), wanted[key]) for key in wanted if found.get(key) != wanted[key]
        }:
            raise FileExistsError(
                f"{folder} holds another data set; (found, wanted) is {differs}. Choose another folder, "
                "or delete this one to have it drawn anew."
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(wanted))
        write_triplets(folder, scenes(n, seed, split))
    return folder


# What a scene of each kind is evaluated as.
BENCHES = {
    "small": "toy",
    "pair": "toy",
    "large": "toy-large",
    "colour": "toy-holdout",
    "corner": "toy-holdout",
}


def held_out(folder: Path) -> dict[str, list[Question]]:
    """The questions of the toy's three benchmarks, about scenes never trained on, drawn into
    `folder`/toy."""
    benches = {}
    for question in read_benchmark(str(draw(folder / "toy", 1200, 0, split="eval")), folder):
        if BENCHES[question.group] == "toy-holdout":
            question.crop = None  # its questions are about the scene
        benches.setdefault(BENCHES[question.group], []).append(question)
    return benches
