"""A contact sheet of a data set: look before you train."""

import re
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from storage.images import load_image, save_image
from triplets.format import Triplet, read_triplets

WIDTH, HEIGHT = 360, 256  # px: the room of a full image; a crop has HEIGHT x HEIGHT
GAP = 14  # px, between all things
LINE = 24  # px, a line of text


def draw_preview(folder: str | Path, font: Path | None = None) -> Path:
    """Draw folder/preview.png: up to 24 triplets from all over the file, three a row. Returns its
    path. font: a file; Pillow's own has Latin, Greek and Cyrillic letters only and draws empty
    rectangles for other scripts."""

    @cache
    def typeface(size: int):
        return ImageFont.truetype(font, size) if font else ImageFont.load_default(size)

    rows = read_triplets(folder)
    count = min(24, len(rows))
    tiles = [tile(rows[n * len(rows) // count], typeface) for n in range(count)]
    columns = min(3, count)
    width = tiles[0].width + GAP
    height = max(each.height for each in tiles) + GAP
    sheet_size = (columns * width + GAP, -(-count // columns) * height + GAP)
    sheet = Image.new("RGB", sheet_size, "#e3e6ea")
    for n, drawn in enumerate(tiles):
        line, column = divmod(n, columns)
        sheet.paste(drawn, (GAP + column * width, GAP + line * height))
    path = Path(folder) / "preview.png"
    save_image(sheet, path)
    return path


def tile(triplet: Triplet, typeface):
    """One triplet to look at: image (bbox marked yellow) and crop, below them question, answer,
    sizes and the box's share. typeface: size -> font."""
    image = load_image(triplet.image)
    crop = load_image(triplet.crop)
    noted = "no box noted"
    if triplet.bbox:
        x1, y1, x2, y2 = triplet.bbox
        noted = f"box {(x2 - x1) * (y2 - y1) / (image.width * image.height):.2%} of it"
    facts = (
        f"image {image.width} x {image.height}, {noted}, crop {crop.width} x {crop.height}   "
        f"{triplet.id[:28]}"
    )
    lines = []  # (text, ink, font)
    for text, ink, size, most in (
        (triplet.question, "#202124", 18, 12),
        (f"answer: {triplet.answer or 'unknown'}", "#137333", 18, 3),
        (facts, "#5f6368", 15, 1),
    ):
        font = typeface(size)
        lines += [(line, ink, font) for line in wrap(text, font, WIDTH + HEIGHT + GAP, most)]

    size = (WIDTH + HEIGHT + 3 * GAP, HEIGHT + 3 * GAP + LINE * len(lines))
    drawn = Image.new("RGB", size, "white")
    shown = fitted(image, WIDTH)
    drawn.paste(shown, (GAP, GAP))
    drawn.paste(fitted(crop, HEIGHT), (WIDTH + 2 * GAP, GAP))
    draw = ImageDraw.Draw(drawn)
    if triplet.bbox:  # its red frame may be under a pixel wide here
        x1, y1, x2, y2 = (GAP + v * shown.width / image.width for v in triplet.bbox)
        corners = (min(x1, x2) - 4, min(y1, y2) - 4, max(x1, x2) + 4, max(y1, y2) + 4)
        draw.rectangle(corners, outline="yellow", width=2)
    for n, line in enumerate(lines):
        draw.text((GAP, HEIGHT + 2 * GAP + n * LINE), *line)
    return drawn


def fitted(picture, width: int):
    """The picture as large as fits into width x HEIGHT px; small ones show their pixels."""
    tiny = 2 * picture.width <= width
    method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return ImageOps.contain(picture, (width, HEIGHT), method)


def wrap(text: str, font, width: int, most: int) -> list[str]:
    """Up to `most` lines of at most `width` px as drawn; long words, and scripts without spaces,
    break anywhere."""
    lines = []
    for paragraph in filter(str.strip, text[:2000].split("\n")):
        lines.append("")
        for word in re.findall(r"\s*\S+", paragraph):
            for piece in [word] if font.getlength(word) <= width else word:
                if font.getlength(lines[-1] + piece) > width:
                    lines.append("")
                lines[-1] = (lines[-1] + piece).lstrip()
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-2] + " …"]
    return lines
