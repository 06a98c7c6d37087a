"""Pictures: read whole and upright, measured by their header, saved."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from storage.files import whole


def load_image(path: str | Path) -> Image.Image:
    """The picture at `path` as upright 8-bit RGB: EXIF rotation applied, 16-bit shifted to 8, alpha laid on white, CMYK
    converted, the first frame of an animation. All of it is decoded, so a truncated file raises here and not later.

    Raises FileNotFoundError, or ValueError for what is no picture or not whole.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{path} is {'a folder' if Path(path).is_dir() else 'not there'}. Expected an image file."
        )
    try:
        with (
            open(path, "rb") as file,
            Image.open(file) as image,
        ):  # by its path Pillow maps and garbles rotated TIFFs
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # plain conversion would saturate
                return Image.fromarray(
                    (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
                ).convert("RGB")
            if image.mode == "F":
                raise ValueError(
                    "floating point pixels of unknown range; expected 8 or 16 bits a channel"
                )
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise errors of any kind
        raise ValueError(
            f"{path} ({Path(path).stat().st_size:,} bytes) cannot be read whole as a picture: {error}. "
            "Fetch or save the file again, or take it out of the data."
        ) from error


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as its header gives it, mostly before EXIF rotation. Raises ValueError."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # decoders raise errors of any kind
        raise ValueError(
            f"{path} cannot be read as a picture: {error}. Fetch or save the file again, or take it out of the "
            "data."
        ) from error


def save(image: Image.Image, path: Path) -> None:
    """PNG, or JPEG at quality 95 with full colour resolution, by the suffix."""
    with whole(path) as scratch:
        image.save(
            scratch,
            icc_profile=None,
            **({} if path.suffix == ".png" else {"quality": 95, "subsampling": 0}),
        )
