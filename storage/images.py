"""Pictures: read whole and upright, measured by their header, saved."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from storage.files import whole

AGAIN = "Fetch or save the file again, or take it out of the data."


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as upright 8-bit RGB: EXIF rotation applied, 16-bit shifted to 8, alpha
    laid on white, CMYK converted, the first frame of an animation. All of it is decoded, so a
    truncated file raises here and not later.

    Raises FileNotFoundError, or ValueError for what is no picture or not whole.
    """
    path = Path(path)
    try:
        # opened here: given a path, Pillow maps the file and garbles rotated TIFFs
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return in_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise errors of any kind
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as a whole picture: {error}. "
            + AGAIN
        ) from error


def in_rgb(image) -> Image.Image:
    """A picture of any mode as 8-bit RGB."""
    if image.mode == "F":
        raise ValueError("floating point pixels of unknown range; expected 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16 bits: plain conversion would saturate
        shifted = np.asarray(image) >> 8
        image = Image.fromarray(shifted.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as its header gives it, mostly before EXIF rotation. Raises
    ValueError."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # decoders raise errors of any kind
        raise ValueError(f"{path} cannot be read as a picture: {error}. {AGAIN}") from error


def save_image(image: Image.Image, path: Path):
    """PNG, or JPEG at quality 95 with full colour resolution, by the suffix; never with the colour
    profile of its source."""
    with whole(path) as scratch:  # a PNG has no use for the last two
        image.save(scratch, icc_profile=None, quality=95, subsampling=0)
