"""A contact sheet of a data set: look before you train."""

import re
from math import ceil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from storage.images import load_image, save_image
from triplets.format import Triplet, read_triplets

WIDTH, HEIGHT = 360, 256  # px: the room of a full image; all crops have HEIGHT x HEIGHT
GAP = 14  # px, between all things
TEXT = WIDTH + GAP + HEIGHT  # px, a line of text: under both
LINE = 24  # px from line to line


def draw_preview(folder: str | Path, font: Path | None = None) -> Path:
    """Draw folder/preview.png: up to 24 triplets from all over the file, three a row. Returns its
    path. font: a file; Pillow's own has Latin, Greek and Cyrillic letters only and draws empty
    rectangles for other scripts."""
    face = ImageFont.truetype(font, 17) if font else ImageFont.load_default(17)
    rows = read_triplets(folder)
    step = ceil(len(rows) / 24)
    tiles = [tile(row, face) for row in rows[::step]]
    width = tiles[0].width + GAP
    height = max(each.height for each in tiles) + GAP
    size = (min(3, len(tiles)) * width, ceil(len(tiles) / 3) * height)
    sheet = Image.new("RGB", size, "#e3e6ea")
    for n, drawn in enumerate(tiles):
        line, column = divmod(n, 3)
        sheet.paste(drawn, (column * width, line * height))
    path = Path(folder) / "preview.png"
    save_image(sheet, path)
    return path


def tile(triplet: Triplet, font):
    """One triplet to look at: image (boxes marked yellow) and crops, below them question, answer,
    sizes and the boxes' shares."""
    image = load_image(triplet.image)
    crops = list(map(load_image, triplet.crops))
    shown = ImageOps.contain(image, (WIDTH, HEIGHT))
    noted = [] if triplet.boxes else ["no box noted"]
    for box in triplet.boxes or []:
        left, right = sorted(box[::2])
        top, bottom = sorted(box[1::2])
        share = (right - left) * (bottom - top) / (image.width * image.height)
        noted.append(f"box {share:.2%} of it")
        scale = shown.width / image.width
        # round the red frame, which may be under a pixel wide here
        mark = (
            left * scale - 4,
            top * scale - 4,
            right * scale + 4,
            bottom * scale + 4,
        )
        ImageDraw.Draw(shown).rectangle(mark, outline="yellow", width=2)
    noted += [f"crop {crop.size}" for crop in crops]
    facts = f"{triplet.id[:28]}: image {image.size} px, {', '.join(noted)}"
    drawn = Image.new("RGB", (TEXT + 2 * GAP, HEIGHT + 20 * LINE), "white")
    drawn.paste(shown, (GAP, GAP))
    room = (HEIGHT + GAP) // len(crops)
    for n, crop in enumerate(crops):
        detail = ImageOps.contain(crop, (room - GAP, HEIGHT))
        drawn.paste(detail, (WIDTH + 2 * GAP + n * room, GAP))
    draw = ImageDraw.Draw(drawn)
    y = HEIGHT + 2 * GAP
    for text, ink, most in (
        (triplet.question, "#202124", 12),
        (f"answer: {triplet.answer or 'unknown'}", "#137333", 3),
        (facts, "#5f6368", 2),
    ):
        for line in wrap(text, font, most):
            draw.text((GAP, y), line, ink, font)
            y += LINE
    return drawn.crop((0, 0, drawn.width, y + GAP))


def wrap(text, font, most) -> list[str]:
    """Up to `most` lines of at most TEXT px as drawn; long words, and scripts without spaces, may
    break after every 30th letter."""
    lines = []
    for paragraph in filter(str.strip, text[:2000].split("\n")):
        lines.append("")
        for piece in re.findall(r"\s*\S{1,30}", paragraph):
            if font.getlength(lines[-1] + piece) > TEXT:
                lines.append("")
            lines[-1] = (lines[-1] + piece).lstrip()
    if len(lines) > most:
        lines[most - 1 :] = [lines[most - 1][:-2] + " …"]
    return lines
