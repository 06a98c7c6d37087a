"""Further views of a row's picture, which some methods show to student or teacher (methods.py).

Each is a function (picture, row, draw) -> picture, or a list of them: an RGB image of its triplet,
and a random.Random of seed and row, for which it is always the same. docs/views.png shows all of
them.
"""

from operator import itemgetter

import numpy as np
from PIL import Image

from storage.images import image_size
from triplets.format import RED

OVERLAP = 0.1  # of an unrelated crop with the box, intersection over union at most
TRIES = 100  # places of an unrelated crop
MASKED = 0.5  # of a masked crop's sides
COARSE = 0.1  # of a coarse picture's sides, before it is enlarged again
SCALES = (0.3, 0.6)  # of a scaled student's picture
NOISE = 0.11  # its standard deviation, pixels being 0 to 1; in half of the pictures


def mean_colour(picture, row, draw):
    """All of it in its own mean colour (OPD-Aha)."""
    return Image.new("RGB", picture.size, mean_of(picture))


def black(picture, row, draw):
    """VCSD."""
    return Image.new("RGB", picture.size)


def coarse(picture, row, draw):
    """A tenth of its size, bilinear, and back, nearest (VAD, VA-OPD)."""
    small = [max(1, round(COARSE * side)) for side in picture.size]
    reduced = picture.resize(small, Image.Resampling.BILINEAR)
    return reduced.resize(picture.size, Image.Resampling.NEAREST)


def masked_box(picture, row, draw):
    """Each box in the mean colour of what is around it, its red frame kept (EAD)."""
    pixels = np.array(picture, dtype=float)
    red = (abs(pixels - RED) <= 60).all(-1)  # also of a JPEG
    boxed = np.zeros(red.shape, bool)
    for left, top, right, bottom in row.boxes:
        band = min(16, (right - left) // 4, (bottom - top) // 4)  # in which a frame may lie
        red[top + band : bottom - band, left + band : right - band] = False
        boxed[top:bottom, left:right] = True
    for left, top, right, bottom in row.boxes:
        around = np.zeros(red.shape, bool)
        half = ((right - left) // 2, (bottom - top) // 2)
        rows = slice(max(0, top - half[1]), bottom + half[1])
        columns = slice(max(0, left - half[0]), right + half[0])
        around[rows, columns] = True
        around &= ~boxed & ~red
        if not around.any():  # boxes are all there is
            around[:] = True
        box = np.zeros(red.shape, bool)
        box[top:bottom, left:right] = True
        pixels[box & ~red] = pixels[around].mean(0)
    return Image.fromarray(pixels.round().astype(np.uint8))


def masked_crop(picture, row, draw):
    """The crop with its middle, half as wide and high, in its mean colour (OPD-V; the geometry is
    ours, no source gives it)."""
    size = [max(1, round(MASKED * side)) for side in picture.size]
    corner = [(side - part) // 2 for side, part in zip(picture.size, size, strict=True)]
    masked = picture.copy()
    masked.paste(Image.new("RGB", size, mean_of(picture)), corner)
    return masked


def unrelated_crop(picture, row, draw):
    """Of each crop another part of the full picture, with the crop's proportions and at least as
    large as its box in one direction, enlarged to the crop's size, that shares at most a tenth with
    any box (V-Zero, CV-OPD); where there is none, the least of what was tried."""
    parts = []
    for crop, box in zip(row.crops, row.boxes, strict=True):
        size = crop.size if isinstance(crop, Image.Image) else image_size(crop)
        scale = min(size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1]))
        width, height = (max(1, round(side / scale)) for side in size)
        places = []
        for _ in range(TRIES):
            x = draw.randint(0, max(0, picture.width - width))
            y = draw.randint(0, max(0, picture.height - height))
            place = (x, y, x + width, y + height)
            places.append((max(overlap(place, other) for other in row.boxes), place))
            if places[-1][0] <= OVERLAP:
                break
        _, place = min(places, key=itemgetter(0))
        parts.append(picture.crop(place).resize(size, Image.Resampling.LANCZOS))
    return parts


def overlap(a, b) -> float:
    """Intersection over union of two boxes."""
    across = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    both = sum((right - left) * (bottom - top) for left, top, right, bottom in (a, b))
    return across * down / (both - across * down)


def scaled_and_noisy(picture, row, draw):
    """Scaled by 0.3 to 0.6 and, half of the time, with Gaussian noise (S2VOPD)."""
    small = picture.resize(scaled(picture.size, draw))
    if draw.random() < 0.5:
        return small
    noise = np.random.default_rng(draw.getrandbits(64)).normal(
        0, 255 * NOISE, (*small.size[::-1], 3)
    )
    noisy = (np.asarray(small) + noise).round().clip(0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def scaled(size, draw):
    scale = draw.uniform(*SCALES)
    return [max(1, round(scale * side)) for side in size]


# What becomes of the pictures' sizes in the views that do not keep them.
SIZES = {
    unrelated_crop: lambda sizes, row, draw: list(map(image_size, row.crops)),
    scaled_and_noisy: lambda sizes, row, draw: [scaled(size, draw) for size in sizes],
}


def mean_of(picture):
    return rounded(np.asarray(picture, dtype=float).mean((0, 1)))


def rounded(colour):
    return tuple(colour.round().astype(int).tolist())
