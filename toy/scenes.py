"""Drawn scenes with questions and answers.

A scene is 64 x 64 px, a 4 x 4 grid with 4 to 12 objects over faint lines; "what is in the red box ?"
is answered by, say, "a green cross with 7 .". What the box holds, and what else is asked:

    small     one object in one cell                        hard in the full view, easy in the crop
    pair      two neighbours, so an answer twice as long    the same
    large     one object, twice as large                    easy in both
    colour    one small object, only its colour is asked    holdout: easy, and never distilled
    corner    no box: what is at the top left (..), large   holdout
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.sources import TOY, benchmark
from storage.files import write
from triplets.format import RED, Triplet, write_triplets

CELL = 16  # px
GRID = 4  # cells a side
SIDE = CELL * GRID  # px
SPLITS = ("train", "base", "eval")  # their streams of scenes never meet, whatever the seeds
KINDS = {  # rows and columns of the target
    "small": (1, 1),
    "pair": (1, 2),
    "large": (2, 2),
    "colour": (1, 1),
    "corner": (2, 2),
}
MIX = ("small", "pair", "large")  # distilled in turn: without large ones their skill is forgotten
EVAL = (*MIX, *MIX, "colour", "corner")  # judged in turn
ROWS = 6000  # triplets of the distillation

COLOURS = {  # red is the box's alone
    "green": (60, 190, 70),
    "blue": (70, 120, 255),
    "yellow": (240, 220, 60),
    "purple": (165, 95, 250),
    "cyan": (60, 210, 220),
    "white": (240, 240, 240),
}
SHAPES = ("square", "circle", "triangle", "cross", "diamond")
# Five rows of three bits a digit, in octal.
DIGITS = "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717".split()


# --------------------------------------------------------------------------------------- one scene


def scene(seed: int, index: int, kind: str, split: str = "train") -> Triplet:
    """Scene `index` of a stream, with pictures: the same whenever and in whatever order it is drawn.

    image: (64, 64) px with a 1-px red box on the outer ring of the target's cells (not for corner).
    crop: these cells without the box, 32 px high always (small cells: pixels doubled), so 4 image
    tokens of 16 x 16 px, or 8 for a pair.
    """
    stream_of_kind = (SPLITS.index(split), seed, index, list(KINDS).index(kind))
    rng = np.random.default_rng(stream_of_kind)
    picture = background(rng)
    cells = [divmod(cell, GRID) for cell in rng.permutation(GRID**2).tolist()]  # (row, column)
    objects = rng.integers(0, (6, 5, 10), (rng.integers(4, 13), 3)).tolist()

    high, wide = KINDS[kind]
    row, column = next(cell for cell in cells if fits(kind, *cell))
    targets = [(row, column)]
    if kind == "pair":
        targets.append((row, column + 1))
    free = [(r, c) for r, c in cells if not (0 <= r - row < high and 0 <= c - column < wide)]
    shown = objects[: len(targets)]
    for cell, drawn in zip(targets, shown):
        paste(picture, cell, drawn, high)
    for cell, drawn in zip(free, objects[len(targets) :]):
        paste(picture, cell, drawn, 1)

    left, top = column * CELL, row * CELL
    right, bottom = left + wide * CELL, top + high * CELL
    target = picture[top:bottom, left:right]
    crop = enlarge(target.copy(), 2 // high)
    if kind != "corner":
        target[[0, -1]] = RED
        target[:, [0, -1]] = RED
    return Triplet(
        id=f"{split}-{seed}-{index:06d}-{kind}",
        question=ask_about(kind, row, column),
        image=Image.fromarray(picture),
        crop=Image.fromarray(crop),
        bbox=[left, top, right, bottom],
        answer=describe(kind, shown),
        extra={"toy": kind},
    )


def background(rng: np.random.Generator) -> np.ndarray:
    """A dark ground with 3 to 7 faint lines, (64, 64, 3) uint8."""
    ground = rng.integers(28, 52, 3)
    lines = rng.integers(3, 8)
    ends = rng.integers(0, SIDE, (2, lines, 2))  # (start and end, lines, yx)
    y, x = np.linspace(*ends, 2 * SIDE).round().astype(int).T  # (lines, points) each
    picture = np.full((SIDE, SIDE, 3), ground, np.uint8)
    picture[y, x] = ground + rng.integers(12, 25)
    return picture


def fits(kind: str, row: int, column: int) -> bool:
    """Whether a target of this kind may begin in this cell."""
    high, wide = KINDS[kind]
    if kind == "corner":
        return row in (0, GRID - high) and column in (0, GRID - wide)
    return row <= GRID - high and column <= GRID - wide


def paste(picture: np.ndarray, cell: tuple[int, int], drawn: list[int], times: int) -> None:
    """Draw an object (its colour, shape and digit) into `picture`, `times` as large as a cell."""
    colour, shape, digit = drawn
    pixels, silhouettes = sprites()
    top, left = cell[0] * CELL, cell[1] * CELL
    place = picture[top : top + times * CELL, left : left + times * CELL]
    silhouette = enlarge(silhouettes[shape], times)
    np.copyto(place, enlarge(pixels[colour, digit], times), where=silhouette)


def enlarge(pixels: np.ndarray, times: int) -> np.ndarray:
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


@cache
def sprites() -> tuple[np.ndarray, np.ndarray]:
    """The 300 objects: pixels (6 colours, 10 digits, 16, 16, 3) uint8 and silhouettes (5 shapes,
    16, 16, 1) bool.

    Up to 13 px wide; the outer ring of the cell stays free, for the red box. The digit lies on a
    white plate, inside one quarter of its cell: in a crop that is one image token. Centred it is
    cut into four, and without the plate it has six contrasts; in 400 steps the tiny model then
    learned to read it only sometimes, or not at all (measured).
    """
    y, x = np.mgrid[:CELL, :CELL] - CELL // 2
    far = np.maximum(abs(x), abs(y))
    near = np.minimum(abs(x), abs(y))
    shapes = {
        "square": far <= 5,
        "circle": x * x + y * y <= 39,
        "triangle": (far <= 6) & (2 * abs(x) <= y + 7) & (y <= 5),
        "cross": (near <= 2) & (far <= 6),
        "diamond": far + near <= 6,
    }
    plate = np.zeros((CELL, CELL, 1), bool)
    plate[7:14, 7:12] = True
    ink = np.zeros((10, CELL, CELL, 1), bool)
    for digit, rows in enumerate(DIGITS):
        bits = [f"{int(row):03b}" for row in rows]
        ink[digit, 8:13, 8:11, 0] = [[bit == "1" for bit in row] for row in bits]
    colours = np.array(list(COLOURS.values()), np.uint8)[:, None, None, None]  # (6, 1, 1, 1, 3)
    pixels = np.where(ink, np.uint8(12), np.where(plate, np.uint8(250), colours))
    silhouettes = np.stack([shapes[shape] for shape in SHAPES])[..., None]
    return pixels, silhouettes | plate


def ask_about(kind: str, row: int, column: int) -> str:
    if kind == "colour":
        return "what colour is in the red box ?"
    if kind == "corner":
        vertical = "bottom" if row else "top"
        horizontal = "right" if column else "left"
        return f"what is at the {vertical} {horizontal} ?"
    return "what is in the red box ?"


def describe(kind: str, shown: list[list[int]]) -> str:
    names = list(COLOURS)
    if kind == "colour":
        return f"a {names[shown[0][0]]} one ."
    objects = [f"a {names[colour]} {SHAPES[shape]} with {digit}" for colour, shape, digit in shown]
    return f"{' , '.join(objects)} ."


# -------------------------------------------------------------------------------- many of them


def stream(n: int, seed: int, split: str = "train") -> Iterator[Triplet]:
    """Scenes 0 to n - 1 of a split, each drawn when asked for; their kinds take turns."""
    kinds = EVAL if split == "eval" else MIX
    for index in range(n):
        yield scene(seed, index, kinds[index % len(kinds)], split)


def draw(folder: Path, n: int, seed: int, split: str = "train") -> Path:
    """A data set of n toy triplets in `folder`; the same one drawn before is kept as it is.

    Its settings lie in toy.json, with a digest of the first scene that notices changed drawing
    code. Raises FileExistsError, with the difference, when the folder holds any other data set.
    """
    pixels = scene(seed, 0, "small", split).image.tobytes()
    digest = hashlib.sha256(pixels).hexdigest()[:16]
    wanted = {"n": n, "seed": seed, "split": split, "first_scene": digest}
    note = folder / "toy.json"
    if not (folder / "train.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write(note, json.dumps(wanted))
        write_triplets(folder, stream(n, seed, split))
        return folder
    found = json.loads(note.read_text()) if note.is_file() else {}
    if found != wanted:
        raise FileExistsError(
            f"{folder} holds another data set: found {found or 'none of the toy'}, expected {wanted}. "
            "Choose another folder, or delete this one to have it drawn anew."
        )
    return folder


def held_out(folder: Path) -> dict[str, list[dict]]:
    """The questions of the toy's three benchmarks, about scenes never trained on, drawn into
    `folder`/toy."""
    benches = defaultdict(list)
    for question in benchmark(str(draw(folder / "toy", 1200, 0, "eval")), folder):
        name = TOY[question["group"]]
        if name == "toy-holdout":
            question["crop"] = None  # what these ask is easy in the full view
        benches[name].append(question)
    return dict(benches)
