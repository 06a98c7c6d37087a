"""Regions: which boxes are worth asking about, and the geometry of frame and crop, as measured on
the released set. A box is [x1, y1, x2, y2] px of the upright photograph, a size is (width, height)
px."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations

import numpy as np
from PIL import Image, ImageDraw

from synthesis.photos import Photo
from synthesis.texts import normal, one_line
from triplets.format import RED


@dataclass
class Region:
    """A box that somebody proposed; if it is kept, it is framed and cropped."""

    photo: Photo
    box: list  # of whole px once it is kept
    label: str | None = None  # what is in it, as the question's writer is told
    score: float | None = None  # SAM 3's confidence

    @property
    def line(self):
        """Width of the frame's line, px."""
        return min(max(round(min(self.photo.image.size) / 300), 2), 16)

    @property
    def frame(self):
        """The outer edge of the frame, which is drawn inwards."""
        return grow(self.box, self.photo.image.size, self.line + 1)

    @property
    def window(self):
        """What is cropped: the frame and a margin."""
        return grow(self.frame, self.photo.image.size)

    @cached_property
    def crop(self):
        """The window, enlarged, without the frame."""
        return cut(self.photo.image, self.window)

    def told(self) -> dict:
        """What a sample says of it."""
        return {
            "box": self.box,
            "frame": self.frame,
            "window": self.window,
            "scale": round(enlargement(self.window), 4),
            "label": self.label,
            "score": self.score,
        }


@dataclass
class Evidence:
    """What a question is asked about: a kept region, or two of one photograph."""

    regions: list[Region]
    questions: list = field(default_factory=list)  # DraftQuestion; the first becomes a sample

    @property
    def photo(self):
        return self.regions[0].photo

    @property
    def id(self):
        edges = chain.from_iterable(region.box for region in self.regions)
        return "-".join([self.photo.digest, *map(str, edges)])

    @property
    def crops(self):
        """Without frames."""
        return [region.crop for region in self.regions]

    def framed(self):
        """The photograph with a red frame round each box, whose own pixels stay as they are: they
        are the evidence."""
        framed = self.photo.image.copy()
        draw = ImageDraw.Draw(framed)
        for region in self.regions:
            x1, y1, x2, y2 = region.frame
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=RED, width=region.line)
        for region in self.regions:
            framed.paste(self.photo.image.crop(region.box), region.box[:2])
        return framed


def evidence(photo: Photo, kept: list[Region], count: int) -> list[Evidence]:
    """A photograph's kept regions, `count` (1 or 2) together; what makes no pair is counted."""
    if len(kept) < count and count > 1:
        photo.drop("regions_too_few")
    found = []
    for regions in combinations(kept, count):
        if any(in_both(a.box, b.window) for a in regions for b in regions if a is not b):
            photo.drop("pair_in_one_crop")  # then one of them would be enough
        else:
            found.append(Evidence(list(regions)))
    return found


def sides(box):
    return box[2] - box[0], box[3] - box[1]


def grow(box, size, least=0):
    """The box, larger by 5% of its sides, at least by `least` px, within an image."""
    dx, dy = (max(round(side / 20), least) for side in sides(box))
    return within(np.add(box, (-dx, -dy, dx, dy)), size)


def within(box, size):
    """The part of a box that lies in an image."""
    return np.clip(box, 0, size * 2).tolist()


def enlargement(window) -> float:
    """2; more where the short side would stay under 64 px, less where there would be over 4,194,304
    px."""
    width, height = sides(window)
    return min(max(2, 64 / min(width, height)), math.sqrt(2**22 / (width * height)))


def cut(image: Image.Image, window):
    """The window, enlarged."""
    scale = enlargement(window)
    size = [int(side * scale + 1e-6) for side in sides(window)]
    return image.crop(window).resize(size, Image.Resampling.LANCZOS)


# --------------------------------------------------------------------------------------- selection


def small_regions(photo: Photo, proposed: list[Region]) -> list[Region]:
    """Of a photograph's regions the first three worth asking about; the others are counted."""
    kept = []
    for region in proposed:
        whole = [
            *map(math.floor, region.box[:2]),
            *map(math.ceil, region.box[2:]),
        ]
        region.box = within(whole, photo.image.size)
        region.label = "this thing" if region.label is None else one_line(region.label)
        reason = region_fault(region, kept)
        if reason:
            photo.drop(reason)
        else:
            kept.append(region)
    return kept


def region_fault(region: Region, kept: list[Region]) -> str | None:
    """Why a region is not asked about, as the reason to count; `kept`: those before it that are."""
    width, height = region.photo.image.size
    x1, y1, x2, y2 = region.box
    short, long = sorted(sides(region.box))
    if short <= 0 or not region.label:
        return "bad_box"
    share = short * long / (width * height)
    if share >= 0.1:
        return "box_large"
    if share < 2e-4 or short < 20:
        return "box_small"
    if long > 8 * short:
        return "box_thin"
    rooms = sorted([x1, y1, width - x2, height - y2])
    if rooms[2] < region.line:
        return "box_at_edges"  # three sides of its frame are hidden
    if any(same_thing(region, other) for other in kept):
        return "box_repeated"
    return "box_spare" if len(kept) == 3 else None


def same_thing(a: Region, b: Region) -> bool:
    """Whether two regions show one thing: IoU over 0.5, or one lies to 80% in the other and their
    labels share a word."""
    shared = in_both(a.box, b.box)
    areas = [area(a.box), area(b.box)]
    if shared > 0.5 * (sum(areas) - shared):
        return True
    a_words = set(normal(a.label).split())
    b_words = normal(b.label).split()
    return shared >= 0.8 * min(areas) and not a_words.isdisjoint(b_words)


def in_both(a, b):
    """The area that two boxes share."""
    return area([*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])])


def area(box):
    width, height = sides(box)
    return max(0, width) * max(0, height)
