"""Pictures as a server takes them: data URIs."""

import base64
import io
import math
from pathlib import Path

from PIL import Image

from storage.images import load_image

ORIENTATION = 0x0112  # of EXIF; 1 is upright
MIME = {"JPEG": "image/jpeg", "PNG": "image/png"}


def data_uri(image: Path | Image.Image, most: int) -> tuple[str, bool]:
    """(a picture as a data URI of at most `most` characters, whether it was made smaller for that):
    its file's own bytes where it is an upright RGB JPEG or PNG, else a PNG of what load_image
    reads.

    Raises FileNotFoundError, or ValueError for what is no picture or not whole.
    """
    picture = image if isinstance(image, Image.Image) else load_image(image)
    uri = own_bytes(image) if isinstance(image, Path) else None
    if uri is None:
        uri = as_png(picture)
    scale = 1.0
    while len(uri) > most:
        scale *= min(0.9, math.sqrt(most / len(uri)))
        size = [max(1, int(side * scale)) for side in picture.size]
        uri = as_png(picture.resize(size, Image.Resampling.LANCZOS))
    return uri, scale < 1


def own_bytes(path: Path) -> str | None:
    """The file as it is; None where a server might read it in another way than load_image."""
    with Image.open(path) as image:
        mime = MIME.get(image.format)
        upright = image.getexif().get(ORIENTATION, 1) == 1
        opaque_rgb = image.mode == "RGB" and not image.has_transparency_data
    if mime and upright and opaque_rgb:
        return encoded(path.read_bytes(), mime)
    return None


def as_png(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG", icc_profile=None)
    return encoded(content.getvalue(), MIME["PNG"])


def encoded(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
