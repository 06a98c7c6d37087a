"""Drawn scenes with questions and answers.

A scene is 64 x 64 px, a 4 x 4 grid with 4 to 12 objects over faint lines; "what is in the red
box ?" is answered by, say, "a green cross with 7 .". What the box holds, and what else is asked:

    small     one object in one cell                        hard in the full view, easy in the crop
    pair      two neighbours, so an answer twice as long    the same
    distant   two cells apart, a box and a crop each        the same
    large     one object, twice as large                    easy in both
    colour    one small object, only its colour is asked    holdout: easy, and never distilled
    corner    no box: what is at the top left (..), large   holdout
"""

import hashlib
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.rows import Question
from benchmarks.sources import read_benchmark
from storage.files import read_json, write
from triplets.format import RED, Triplet, write_triplets

CELL = 16  # px
GRID = 4  # cells a side
SIDE = CELL * GRID  # px
# Their streams of scenes never meet, whatever the seeds.
SPLITS = ["train", "base", "eval", "validation"]
KINDS = {  # rows and columns of the target
    "small": (1, 1),
    "pair": (1, 2),
    "large": (2, 2),
    "colour": (1, 1),
    "corner": (2, 2),
    "distant": (1, 1),  # of each of the two
}
MIX = (
    "small",
    "pair",
    "distant",
    "large",
)  # distilled, in turn: without large ones their skill is forgotten
EVAL = (*MIX, *MIX, "colour", "corner")  # judged, in turn
ROWS = 4000  # triplets of the distillation

COLOURS = {  # red is the box's alone
    "green": "#3cbe46",
    "blue": "#4678ff",
    "yellow": "#f0dc3c",
    "purple": "#a55ffa",
    "cyan": "#3cd2dc",
    "white": "#f0f0f0",
}
SHAPES = ("square", "circle", "triangle", "cross", "diamond")
DIGITS = [  # five rows of three bits each, in octal
    0o75557,
    0o26227,
    0o71747,
    0o71717,
    0o55711,
    0o74717,
    0o74757,
    0o71122,
    0o75757,
    0o75717,
]


# --------------------------------------------------------------------------------------- one scene


def scene(seed: int, index: int, kind: str, split: str = "train") -> Triplet:
    """Scene `index` of a stream, with pictures; the same whenever it is drawn.

    image: 64 x 64 px, with a 1-px red box on the outer ring of the target's cells (not for corner).
    crops: these cells without the box, 32 px high always (small cells: pixels doubled), so 4 image
    tokens of 16 x 16 px, or 8 for a pair; of distant ones two boxes and crops, as one reads.
    """
    rng = np.random.default_rng((SPLITS.index(split), seed, index, list(KINDS).index(kind)))
    picture = Image.fromarray(background(rng))
    cells = [divmod(cell, GRID) for cell in rng.permutation(GRID**2).tolist()]  # (row, column)
    objects = rng.integers(0, (6, 5, 10), (rng.integers(4, 13), 3)).tolist()

    high, wide = KINDS[kind]
    rows = range(GRID - high + 1)  # in which it may begin
    columns = range(GRID - wide + 1)
    if kind == "corner":
        rows = columns = (0, GRID - high)
    row, column = next((r, c) for r, c in cells if r in rows and c in columns)
    firsts = [(row, column)]  # of a box
    if kind == "distant":
        firsts.append(next((r, c) for r, c in cells if max(abs(r - row), abs(c - column)) > 1))
        firsts.sort()
    offsets = [(down, right) for down in range(high) for right in range(wide)]
    covered = [(r + down, c + right) for r, c in firsts for down, right in offsets]
    free = [cell for cell in cells if cell not in covered]
    targets = covered[:1] if high > 1 else covered
    places = targets + free
    for number, drawn in enumerate(objects):
        r, c = places[number]
        side = CELL * high if number < len(targets) else CELL
        drawing = sprite(*drawn).resize((side, side), Image.NEAREST)
        picture.paste(drawing, (c * CELL, r * CELL), drawing)

    boxes = [[CELL * edge for edge in (c, r, c + wide, r + high)] for r, c in firsts]
    size = (2 * CELL * wide // high, 2 * CELL)
    crops = [picture.crop(box).resize(size, Image.NEAREST) for box in boxes]
    if kind != "corner":
        for left, top, right, bottom in boxes:
            ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), outline=RED)
    question, answer = words(kind, row, column, objects[: len(targets)])
    name = f"{split}-{seed}-{index:06d}-{kind}"
    return Triplet(name, question, picture, crops, boxes, answer, {"toy": kind})


def background(rng) -> np.ndarray:
    """A dark ground with 3 to 7 faint lines, (64, 64, 3) uint8."""
    ground = rng.integers(28, 52, 3)
    ends = rng.integers(0, SIDE, (2, rng.integers(3, 8), 2))  # (start and end, lines, yx)
    y, x = np.linspace(*ends, 2 * SIDE).round().astype(int).T  # (lines, points) each
    picture = np.full((SIDE, SIDE, 3), ground, np.uint8)
    picture[y, x] = ground + rng.integers(12, 25)
    return picture


@cache
def sprite(colour: int, shape: int, digit: int) -> Image.Image:
    """One of the 300 objects, 16 x 16 px RGBA, transparent around it.

    Up to 13 px wide; the outer ring of the cell stays free, for the red box. The digit lies on a
    white plate, inside one quarter of its cell: in a crop that is one image token. Centred it is
    cut into four, and without the plate it has six contrasts; in 400 steps the tiny model then
    learned to read it only sometimes, or not at all (measured, with patches of 8 px).
    """
    y, x = np.mgrid[:CELL, :CELL] - CELL // 2
    near, far = np.sort([abs(x), abs(y)], axis=0)
    silhouettes = [  # in the order of SHAPES
        far <= 5,
        x * x + y * y <= 39,
        (far <= 6) & (2 * abs(x) <= y + 7) & (y <= 5),
        (near <= 2) & (far <= 6),
        far + near <= 6,
    ]
    image = Image.new("RGBA", (CELL, CELL))
    image.paste(list(COLOURS.values())[colour], mask=Image.fromarray(silhouettes[shape]))
    image.paste("#fafafa", (7, 7, 12, 14))  # the plate
    bits = DIGITS[digit] >> np.arange(14, -1, -1) & 1
    image.paste("#0c0c0c", (8, 8), Image.fromarray(bits.reshape(5, 3) == 1))
    return image


def words(kind, row, column, objects):
    """Question and answer about a target; objects: colour, shape and digit of each in it."""
    names = list(COLOURS)
    told = [f"a {names[colour]} {SHAPES[shape]} with {digit}" for colour, shape, digit in objects]
    if kind == "colour":
        return "what colour is in the red box ?", f"a {names[objects[0][0]]} one ."
    question = f"what is in the red box{'es' if kind == 'distant' else ''} ?"
    if kind == "corner":
        vertical = "bottom" if row else "top"
        horizontal = "right" if column else "left"
        question = f"what is at the {vertical} {horizontal} ?"
    return question, f"{' , '.join(told)} ."


# ------------------------------------------------------------------------------------ many of them


def draw(folder: Path, n: int, seed: int, split: str = "train") -> Path:
    """A data set of n toy triplets in `folder`; the same one drawn before is kept as it is.

    Its settings lie in toy.json, with a digest of the first scene that notices changed drawing
    code. Raises FileExistsError, with the difference, when the folder holds any other data set.
    """
    digest = hashlib.sha256(scene(seed, 0, "small", split).image.tobytes()).hexdigest()
    wanted = {"n": n, "seed": seed, "split": split, "first_scene": digest[:16]}
    note = folder / "toy.json"
    if not (folder / "train.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write(note, json.dumps(wanted))
        kinds = EVAL if split == "eval" else MIX
        drawn = (scene(seed, index, kinds[index % len(kinds)], split) for index in range(n))
        write_triplets(folder, drawn)
        return folder
    found = read_json(note, [])
    if found != wanted:
        raise FileExistsError(
            f"{folder} holds another data set: found {found}, expected {wanted}. Choose another "
            "folder, or delete this one to have it drawn anew."
        )
    return folder


# What a scene of each kind is evaluated as.
BENCHES = {
    "small": "toy",
    "pair": "toy",
    "distant": "toy-distant",
    "large": "toy-large",
    "colour": "toy-holdout",
    "corner": "toy-holdout",
}


def held_out(folder: Path) -> dict[str, list[Question]]:
    """The questions of the toy's four benchmarks, about scenes never trained on, drawn into
    `folder`/toy."""
    benches = defaultdict(list)
    for question in read_benchmark(str(draw(folder / "toy", 1500, 0, "eval")), folder):
        name = BENCHES[question.group]
        if name == "toy-holdout":
            question.crops = []  # what these ask is easy in the full view
        benches[name].append(question)
    return benches
