"""Further views of a row's picture, which some methods show to student or teacher (methods.py).

Each is a function (picture, row, draw) -> picture: an RGB image of its triplet, and a random.Random
of seed and row, for which it is always the same. docs/views.png shows all of them.
"""

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
    """The box in the mean colour of what is around it, its red frame kept (EAD)."""
    left, top, right, bottom = row.bbox
    pixels = np.array(picture, dtype=float)
    red = (abs(pixels - RED) <= 60).all(-1)  # also of a JPEG
    band = min(16, (right - left) // 4, (bottom - top) // 4)  # in which a frame may lie
    red[top + band : bottom - band, left + band : right - band] = False
    box = np.zeros(red.shape, bool)
    box[top:bottom, left:right] = True
    around = np.zeros(red.shape, bool)
    half = ((right - left) // 2, (bottom - top) // 2)
    rows = slice(max(0, top - half[1]), bottom + half[1])
    columns = slice(max(0, left - half[0]), right + half[0])
    around[rows, columns] = True
    around &= ~box & ~red
    if not around.any():  # the box is all there is
        around[:] = True
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
    """Another part of the full picture, with the crop's proportions and at least as large as the
    box in one direction, enlarged to the crop's size, that shares at most a tenth with the box
    (V-Zero, CV-OPD); where there is none, the least of what was tried."""
    left, top, right, bottom = row.bbox
    size = row.crop.size if isinstance(row.crop, Image.Image) else image_size(row.crop)
    scale = min(size[0] / (right - left), size[1] / (bottom - top))
    width, height = (max(1, round(side / scale)) for side in size)

    def overlap(place):
        x, y = place
        across = max(0, min(right, x + width) - max(left, x))
        down = max(0, min(bottom, y + height) - max(top, y))
        both = width * height + (right - left) * (bottom - top)
        return across * down / (both - across * down)

    places = []
    for _ in range(TRIES):
        x = draw.randint(0, max(0, picture.width - width))
        y = draw.randint(0, max(0, picture.height - height))
        places.append((x, y))
        if overlap((x, y)) <= OVERLAP:
            break
    x, y = min(places, key=overlap)
    return picture.crop((x, y, x + width, y + height)).resize(size, Image.Resampling.LANCZOS)


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


# What becomes of a picture's size in the views that do not keep it.
SIZES = {
    unrelated_crop: lambda size, row, draw: image_size(row.crop),
    scaled_and_noisy: lambda size, row, draw: scaled(size, draw),
}


def mean_of(picture):
    return rounded(np.asarray(picture, dtype=float).mean((0, 1)))


def rounded(colour):
    return tuple(colour.round().astype(int).tolist())
