"""A contact sheet of a data set: look before you train."""

import re
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from storage.images import load_image, save
from triplets.format import read_triplets


def wrapped(text: str, font, width: int, most: int) -> list[str]:
    """Up to `most` lines of at most `width` px as drawn; long words, and scripts without spaces, break anywhere."""
    lines, text = [], text[:2000]
    for paragraph in filter(str.strip, text.split("\n")):
        lines.append("")
        for word in re.findall(r"\s*\S+", paragraph):
            for piece in [word] if font.getlength(word) <= width else word:
                lines += [] if font.getlength(lines[-1] + piece) <= width else [""]
                lines[-1] = (lines[-1] + piece).lstrip()
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-2] + " …"]


def tile(row: dict, typeface) -> Image.Image:
    """One triplet to look at: image (bbox marked yellow) and crop, below them question, answer, sizes, the box's share."""
    wide, high, gap, step = 360, 256, 14, 24  # px: image slot (crop: high x high), text
    image, crop, box = load_image(row.image), load_image(row.crop), row.bbox
    share = (box[2] - box[0]) * (box[3] - box[1]) / (image.width * image.height) if box else None
    facts = (
        f"image {image.width} x {image.height}, {f'box {share:.2%} of it' if box else 'no box noted'}, "
        f"crop {crop.width} x {crop.height}   {row['id'][:28]}"
    )
    texts = (
        (row.question, "#202124", 18, 12),
        (f"answer: {row['answer'] or 'unknown'}", "#137333", 18, 3),
        (facts, "#5f6368", 15, 1),
    )
    lines = [
        (line, ink, typeface(size))
        for text, ink, size, most in texts
        for line in wrapped(text, typeface(size), wide + high + gap, most)
    ]
    drawn = Image.new("RGB", (wide + high + 3 * gap, high + 3 * gap + step * len(lines)), "white")
    for picture, x, room in ((image, gap, wide), (crop, wide + 2 * gap, high)):
        method = (
            Image.Resampling.NEAREST if 2 * picture.width <= room else Image.Resampling.LANCZOS
        )  # show pixels
        drawn.paste(ImageOps.pad(picture, (room, high), method, "white"), (x, gap))
    draw, scale = ImageDraw.Draw(drawn), min(wide / image.width, high / image.height)
    if box:  # a red frame may be under a pixel wide here
        left, top = gap + (wide - scale * image.width) / 2, gap + (high - scale * image.height) / 2
        x1, y1, x2, y2 = (start + scale * v for start, v in zip((left, top) * 2, box))
        draw.rectangle(
            (min(x1, x2) - 4, min(y1, y2) - 4, max(x1, x2) + 4, max(y1, y2) + 4),
            outline="yellow",
            width=2,
        )
    for n, line in enumerate(lines):
        draw.text((gap, high + 2 * gap + n * step), *line)
    return drawn


def preview(folder: str | Path, font: Path | None = None) -> Path:
    """Draw folder/preview.png: up to 24 triplets from all over the file, three a row. Returns its path. font: a file;
    Pillow's own has Latin, Greek and Cyrillic letters only and draws empty rectangles for other scripts."""
    typeface = cache(
        lambda size: ImageFont.truetype(font, size) if font else ImageFont.load_default(size)
    )
    rows, gap = read_triplets(folder), 14
    count = min(24, len(rows))
    tiles = [tile(rows[n * len(rows) // count], typeface) for n in range(count)]
    across, width, height = (
        min(3, count),
        tiles[0].width + gap,
        max(tile.height for tile in tiles) + gap,
    )
    sheet = Image.new("RGB", (across * width + gap, -(-count // across) * height + gap), "#e3e6ea")
    for n, picture in enumerate(tiles):
        sheet.paste(picture, (gap + n % across * width, gap + n // across * height))
    save(sheet, Path(folder) / "preview.png")
    return Path(folder) / "preview.png"
