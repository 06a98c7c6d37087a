"""The base model of the toy world: it reads crops well and full images badly.

The one in toy/base-model was made by `python train.py --toy --retrain-base --seed 1`: everybody
begins with the same weights. How well a new one reads small targets in the full view differs from
seed to seed and from processor to processor: the skill comes all at once.
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
WARMUP = 50  # steps
LEARNING_RATE = 3e-3
ENOUGH = {"image": 0.4, "crop": 0.97}  # of small targets in the full view, of all crops, read
MOST = 1500  # steps until then
TAIL = 150  # steps from then on: the learning rate falls to 0, small targets are hardly shown
SCENES = 12_000  # different ones of a kind
COUNTS = {"crop": 44, "image": 36}  # scenes a step
CROPS = {"small": 3, "large": 3, "pair": 4}  # how often each kind is shown, relative
FULLS = {"small": 6, "pair": 5, "large": 2, "colour": 1, "corner": 2}
LATE_FULLS = FULLS | {"small": 0.1, "pair": 0.1, "large": 4}


def train_base(folder: Path, seed: int) -> None:
    """The toy's base model, supervised on drawn scenes (labels known), into `folder`; the seconds
    it took into base-seconds.json beside it. Raises ValueError if it does not learn to read."""
    start = time.perf_counter()
    model, processor = tiny(seed)
    rng = random.Random(seed)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.9, 0.98))
    read = dict.fromkeys(ENOUGH, 0.0)  # running shares
    left = TAIL
    with tqdm(desc="base model", unit="step") as bar:
        while left:
            reads_enough = left < TAIL or all(read[view] > ENOUGH[view] for view in ENOUGH)
            if bar.n == MOST and not reads_enough:
                raise ValueError(
                    f"After {MOST} steps the base model of seed {seed} reads {read}, expected "
                    f"{ENOUGH}. Choose another --seed."
                )
            left -= reads_enough
            tail = 0.5 * (1 - math.cos(math.pi * left / TAIL))  # 1 down to 0
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (bar.n + 1) / WARMUP) * tail
            mixes = {"crop": CROPS, "image": LATE_FULLS if reads_enough else FULLS}
            for view, mix in mixes.items():
                kinds = rng.choices([*mix], [*mix.values()], k=COUNTS[view])
                shown = [scene(seed, rng.randrange(SCENES), kind, "base") for kind in kinds]
                losses, right = answer_losses(model, processor, shown, view, rng)
                losses.sum().div(sum(COUNTS.values())).backward()
                counts = [view == "crop" or kind == "small" for kind in kinds]
                if any(counts):
                    read[view] = 0.8 * read[view] + 0.2 * right[counts].mean().item()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix_str(f"reads {read['crop']:.0%} of crops, {read['image']:.0%} in full")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, processor, partial)
    write(folder.with_name("base-seconds.json"), json.dumps({"base": time.perf_counter() - start}))
    partial.rename(folder)


def answer_losses(model, processor, shown, view, rng):
    """Per scene the cross-entropy of its answer, a mean over the tokens, and whether every token
    was the likeliest one; both (n,) float32. view: image or crop."""
    images = [each.shown(view) for each in shown]
    # With and without the newline that the training prompt has, as a pretrained model knows both.
    questions = [rng.choice(["", "\n"]) + each.question for each in shown]
    prompt = encode(processor, images, questions)
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
