"""What boxes things in photographs: the model's own reply, SAM 3, or a file of boxes one already
has."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from storage.files import numbered_lines
from synthesis.photos import Photo
from synthesis.regions import Region
from synthesis.texts import one_line


def is_box(box) -> bool:
    """Whether this is four finite numbers, x1 < x2 and y1 < y2 (NaN fails, so do booleans)."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    finite = all(type(value) in (int, float) and abs(value) < 1e9 for value in box)
    return finite and box[0] < box[2] and box[1] < box[3]


def replied_boxes(photo: Photo, items: list) -> list[Region]:
    """The well-formed ones of {"bbox_2d": [x1, y1, x2, y2] in thousandths, "label": name}."""
    found = []
    for item in items:
        fields = item if isinstance(item, dict) else {}
        box = fields.get("bbox_2d")
        name = fields.get("label")
        if is_box(box) and min(box) >= 0 and max(box) <= 1000 and one_line(name):
            shares = np.divide(box, 1000)  # of width and height
            box = shares * (photo.image.size * 2)
            found.append(Region(photo, box.tolist(), name))
        else:
            photo.drop("bad_box")
    return found


def read_boxes(path: Path) -> dict[str, list[tuple]]:
    """Boxes one already has: {image: [(box, label or None)]}. Raises ValueError with the line."""
    given = {}
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
            boxes = row["boxes"]
            labels = row.get("labels") or [None] * len(boxes)
            if not all(map(is_box, boxes)):
                raise ValueError(f"{boxes} are not all boxes")
            given.setdefault(row["image"], []).extend(zip(boxes, labels, strict=True))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r}. Expected image (its path under --images), "
                "boxes ([[x1, y1, x2, y2], ..] px of the upright image) and, if you like, as many "
                "labels."
            ) from error
    return given


def given_boxes(given: dict, photo: Photo, _) -> list[Region]:
    return [Region(photo, *boxed) for boxed in given.get(photo.file, [])]


# ------------------------------------------------------------------------------------------- SAM 3


class Sam3:
    """SAM 3 of a hub id or directory, prompted with names, without its image processor, which needs
    torchvision. Raises FileNotFoundError, naming the ways out."""

    def __init__(self, path: str, device: str):
        from transformers import CLIPTokenizer, Sam3Model

        try:
            self.model = Sam3Model.from_pretrained(path).to(device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(path)
        except Exception as error:  # network, name, gate, disk
            raise FileNotFoundError(
                f"--sam3 {path} is no SAM 3 here, and the hub gave none ({type(error).__name__}: "
                f"{error}). It is gated: accept its terms on the hub and `hf auth login`, point "
                "--sam3 at a folder, or take --proposer mllm."
            ) from error

    def boxes_in(self, photo: Photo, items: list) -> list[Region]:
        """The box of each name of which there is exactly one (score > 0.5), and that with a score
        of at least 0.75. items: what the model replied, up to 8 names count."""
        import torch

        names = [one_line(each.get("label") if isinstance(each, dict) else each) for each in items]
        photo.drops["name_malformed"] += names.count(None)
        names = list(dict.fromkeys(filter(None, names)))[:8]
        if not names:
            return []
        try:
            all_scores, all_boxes = self.detect(photo.image, names)
        except torch.OutOfMemoryError:
            photo.drop("out_of_memory")
            return []
        found = []
        for name, scores, boxes in zip(names, all_scores, all_boxes, strict=True):
            sure = (scores > 0.5).sum()
            score, best = scores.max(0)
            if sure == 1 and score >= 0.75:
                box = boxes[best].tolist()
                found.append(Region(photo, box, name, round(score.item(), 4)))
            else:
                photo.drop("name_ambiguous" if sure > 1 else "name_not_found")
        return found

    def detect(self, image, names):
        """Scores (names, queries) in [0, 1] and boxes (names, queries, 4) in px."""
        import torch

        side, device = self.model.config.image_size, self.model.device
        small = image.resize((side, side), Image.Resampling.BILINEAR)
        # (S, S, 3), in [-1, 1]
        pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1)
        words = self.tokenizer(  # (names, 32)
            names,
            padding="max_length",
            truncation=True,
            max_length=32,
            return_tensors="pt",
        )
        with torch.inference_mode():
            seen = self.model.get_vision_features(pixels.permute(2, 0, 1)[None].to(device))
            # computed once, shown to every name
            for maps in ("fpn_hidden_states", "fpn_position_encoding"):
                seen[maps] = tuple(part.expand(len(names), -1, -1, -1) for part in seen[maps])
            out = self.model(vision_embeds=seen, **words.to(device))
        # (names, queries) * (names, 1)
        scores = out.pred_logits.sigmoid() * out.presence_logits.sigmoid()
        return scores.cpu(), out.pred_boxes.cpu() * torch.tensor(image.size * 2)
