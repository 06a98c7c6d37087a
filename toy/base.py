"""The base model of the toy world: it reads crops well and full images badly.

It is shown few small targets in the full view, and hardly any once it reads ENOUGH of them.
"""

import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from model import encode, response_hidden
from storage.checkpoint import save
from storage.files import write
from toy.scenes import scene
from toy.tiny import tiny

# The recipe (ours, found by trying; weight decay is torch's own, 0.01).
STEPS = 500
WARMUP = 50  # steps
LEARNING_RATE = 3e-3  # at its peak
SCENES = 12_000  # different ones of a kind
CROPS_A_STEP = 44
FULLS_A_STEP = 36
ENOUGH = 0.5  # of the small targets, read in the full view
CROPS = {"small": 3, "large": 3, "pair": 4}  # how often each kind is shown, relative
FULLS = {"small": 6, "pair": 5, "large": 2, "colour": 1, "corner": 2}
LATE_FULLS = FULLS | {"small": 0.1, "pair": 0.1, "large": 4}


def train_base(folder: Path, seed: int) -> None:
    """The toy's base model, supervised on drawn scenes (labels known), into `folder`; the seconds
    it took into base-seconds.json beside it."""
    start = time.perf_counter()
    model, processor = tiny(seed)
    rng = random.Random(seed)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.9, 0.98))
    small_read = 0.0  # running share of small targets, full view
    for step in tqdm(range(STEPS), desc="base model", unit="step"):
        warmup = min(1.0, (step + 1) / WARMUP)
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (warmup * cosine)
        fulls = LATE_FULLS if small_read > ENOUGH else FULLS
        for view, count, mix in (
            ("crop", CROPS_A_STEP, CROPS),
            ("image", FULLS_A_STEP, fulls),
        ):
            kinds = rng.choices([*mix], [*mix.values()], k=count)
            shown = [scene(seed, rng.randrange(SCENES), kind, "base") for kind in kinds]
            losses, right = answer_losses(model, processor, shown, view)
            losses.sum().div(CROPS_A_STEP + FULLS_A_STEP).backward()
            small = [n for n, kind in enumerate(kinds) if kind == "small"]
            if view == "image" and small:
                small_read = 0.8 * small_read + 0.2 * right[small].mean().item()
        clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, processor, partial)
    write(folder.with_name("base-seconds.json"), json.dumps({"base": time.perf_counter() - start}))
    partial.rename(folder)


def answer_losses(model, processor, shown, view):
    """Per scene the cross-entropy of its answer, a mean over the tokens, and whether every token
    was the likeliest one; both (n,) float32. view: image or crop."""
    images = [getattr(each, view) for each in shown]
    prompt = encode(processor, images, [each.question for each in shown])
    answers = processor.tokenizer(
        [each.answer + processor.tokenizer.eos_token for each in shown],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    ids, mask = answers["input_ids"], answers["attention_mask"].bool()  # (n, T)
    hidden = response_hidden(model, prompt, ids, checkpoint=False)  # (n, T, D)
    logits = model.lm_head(hidden)  # (n, T, V)
    losses = cross_entropy(logits.transpose(1, 2), ids, reduction="none") * mask  # (n, T)
    right = (logits.argmax(-1) == ids) | ~mask
    return losses.sum(1) / mask.sum(1), right.all(1).float()
