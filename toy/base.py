"""The base model of the toy world: it reads crops well and small targets in the full image badly.

The one in toy/base-model was made by `python train.py --toy --retrain-base --seed 1`: everybody
begins with the same weights.

It first learns to read everything. To read a digit of 3 x 5 px in the full image is a skill that
comes within a few steps, from nothing to nearly always, so there is no step at which half of it is
there. Therefore the other way: once it reads, it is shown wrong digits for the small targets of
full images, as captions of fine details often are wrong, until it reads half of them.
"""

import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from methods import OPSD_HINT
from model import encode, response_hidden
from storage.checkpoint import save
from storage.files import write
from toy.scenes import scene
from toy.tiny import tiny

# What it should read, of validation scenes: each kind of crops; small targets in the full image
# with the answer as a hint (opsd's teacher), before and after it is shown wrong digits.
CROP = 0.99
HINT = 0.9
LEARNED = 0.9
FORGOTTEN = 0.52
# The recipe (ours, found by trying; weight decay is torch's own, 0.01).
WARMUP = 50  # steps
LEARNING_RATE = 3e-3
FORGETTING_RATE = 1e-3
AVERAGE = 0.03  # the base is an average of the weights, which follows them at this rate
SCENES = 12_000  # different ones of a kind
COUNTS = {"crop": 32, "image": 32, "hint": 20}  # scenes a step
KINDS = {  # how often each is shown, relative
    "crop": {"small": 3, "large": 2, "pair": 4, "distant": 4},
    "image": {"small": 4, "pair": 5, "distant": 5, "large": 2, "colour": 1, "corner": 2},
    "hint": {"small": 1, "pair": 2, "distant": 2, "large": 1},
}
TARGETS = ("small", "pair", "distant")
MOST = 500  # steps, of learning and of forgetting


def train_base(folder: Path, seed: int) -> None:
    """The toy's base model, supervised on drawn scenes (labels known), into `folder`; the seconds
    it took into base-seconds.json beside it. Raises ValueError if it does not learn to read, or
    does not forget."""
    start = time.perf_counter()
    training = BaseTraining(seed)
    training.go_on(LEARNING_RATE, training.has_learned, every=10)
    training.digits_wrong = True
    training.go_on(FORGETTING_RATE, training.has_forgotten, every=2)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(training.average, training.processor, partial)
    write(folder.with_name("base-seconds.json"), json.dumps({"base": time.perf_counter() - start}))
    partial.rename(folder)


class BaseTraining:
    """Steps, of learning or of forgetting, and what is read meanwhile."""

    def __init__(self, seed: int):
        self.seed = seed
        self.rng = random.Random(seed)
        self.model, self.processor = tiny(seed)
        self.average = copy.deepcopy(self.model)
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, LEARNING_RATE, betas=(0.9, 0.98))
        self.read = {}  # (view, kind): running share of answers right
        self.digits_wrong = False

    def go_on(self, rate: float, done: Callable[[], bool], every: int) -> None:
        """Steps until done(), which is asked after every so many. Raises ValueError after MOST."""
        phase = "forgetting" if self.digits_wrong else "learning"
        with tqdm(desc=f"base model, {phase}", unit="step") as bar:
            while bar.n % every or not done():
                if bar.n == MOST:
                    raise ValueError(
                        f"After {MOST} steps of {phase} the base model of seed {self.seed} reads "
                        f"{self.told()}, and is not done. Choose another --seed."
                    )
                warm = 1.0 if self.digits_wrong else min(1.0, (bar.n + 1) / WARMUP)
                self.step(rate * warm)
                bar.update()
                bar.set_postfix_str(self.told())

    def step(self, rate: float) -> None:
        for view in COUNTS:
            self.learn(view)
        clip_grad_norm_(self.weights, 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for slow, weight in zip(self.average.parameters(), self.weights, strict=True):
                slow.lerp_(weight, AVERAGE)

    def learn(self, view: str) -> None:
        """The gradient of a step's scenes under one view."""
        kinds = KINDS[view]
        shown = []
        for kind in self.rng.choices([*kinds], [*kinds.values()], k=COUNTS[view]):
            drawn = scene(self.seed, self.rng.randrange(SCENES), kind, "base")
            if self.digits_wrong and view == "image" and kind in TARGETS:
                drawn = replace(drawn, answer=misread(drawn.answer, self.rng))
            shown.append(drawn)
        losses, right = answer_losses(self.model, self.processor, shown, view, self.rng)
        losses.sum().div(sum(COUNTS.values())).backward()
        if self.digits_wrong and view == "image":
            return  # has_forgotten tells what it reads
        for each, good in zip(shown, right.tolist(), strict=True):
            key = (view, each.extra["toy"])
            self.read[key] = 0.97 * self.read.get(key, 0.0) + 0.03 * good

    def has_learned(self) -> bool:
        if min(self.running(view) for view in COUNTS) < 0.8:  # the average weights lag behind
            return False
        full, crop, hint = map(self.shares_read, ("image", "crop", "hint"))
        return mean(full) >= LEARNED and min(crop) >= CROP and min(hint) >= HINT

    def has_forgotten(self) -> bool:
        full = mean(self.shares_read("image", ["small", "pair"]))
        self.read |= {("image", kind): full for kind in TARGETS}
        return full <= FORGOTTEN and min(self.shares_read("crop")) >= CROP

    @torch.no_grad()
    def shares_read(self, view: str, kinds: Sequence[str] = TARGETS) -> list[float]:
        """Of 100 validation scenes of each kind, by the average weights."""
        shares = []
        for kind in kinds:
            shown = [scene(0, i, kind, "validation") for i in range(100)]
            _, right = answer_losses(self.average, self.processor, shown, view, random.Random(0))
            shares.append(right.mean().item())
        return shares

    def running(self, view: str) -> float:
        return mean(self.read.get((view, kind), 0.0) for kind in TARGETS)

    def told(self) -> str:
        names = {"crop": "of crops", "image": "in full", "hint": "with a hint"}
        return ", ".join(f"{self.running(view):.0%} {name}" for view, name in names.items())


def misread(answer: str, rng: random.Random) -> str:
    """The answer with drawn digits."""
    digits = [str(rng.randrange(10)) if word.isdigit() else word for word in answer.split()]
    return " ".join(digits)


def answer_losses(model, processor, shown, view, rng):
    """Per scene the cross-entropy of its answer, a mean over the tokens, and whether every token
    was the likeliest one; both (n,) float32. view: image, crop, or hint (opsd's teacher's)."""
    images = [each.shown("crop" if view == "crop" else "image") for each in shown]
    hint = OPSD_HINT if view == "hint" else ""
    # With and without the newline that the training prompt has, as a pretrained model knows both.
    questions = [
        rng.choice(["", "\n"]) + each.question + hint.format(answer=each.answer) for each in shown
    ]
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
