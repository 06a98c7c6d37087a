"""The base model of the toy world: it reads crops well and full images badly."""

import json
import math
import random
import shutil
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model import encode, response_hidden, save, to_device
from storage.files import write
from toy.scenes import scene
from toy.tiny import tiny

# The base model's recipe: what it is shown, and how often (relative). It reads crops well and full images badly, because it
# is shown few small targets in the full view, and hardly any once it reads `enough` of them.
BASE = dict(
    steps=500,
    lr=3e-3,
    crops=44,
    fulls=36,
    scenes=12_000,
    enough=0.5,
    crop={"small": 3, "large": 3, "pair": 4},
    full={"small": 6, "pair": 5, "large": 2, "colour": 1, "corner": 2},
    late={"small": 0.1, "pair": 0.1, "large": 4, "colour": 1, "corner": 2},
)


def train_base(folder: Path, seed: int, device: torch.device | str = "cpu") -> None:
    """The toy's base model, supervised on drawn scenes (labels known): cross-entropy on the answers."""
    start, (model, processor) = time.perf_counter(), tiny(seed)
    model.to(device)
    steps, rng, tokenizer = BASE["steps"], random.Random(seed), processor.tokenizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=BASE["lr"], betas=(0.9, 0.98), weight_decay=0.01
    )
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    read = 0.0  # running share of small targets, full view
    for _ in tqdm(range(steps), desc="base model", unit="step"):
        fulls = "late" if read > BASE["enough"] else "full"
        for view, count, mix in (("crop", BASE["crops"], "crop"), ("image", BASE["fulls"], fulls)):
            kinds = rng.choices([*BASE[mix]], [*BASE[mix].values()], k=count)
            shown = [scene(seed, rng.randrange(BASE["scenes"]), kind, "base") for kind in kinds]
            prompt = to_device(
                encode(processor, [getattr(s, view) for s in shown], [s.question for s in shown]),
                device,
            )
            answers = tokenizer(
                [s.answer + tokenizer.eos_token for s in shown],
                return_tensors="pt",
                padding=True,
                padding_side="right",
            ).to(device)
            ids, mask = answers["input_ids"], answers["attention_mask"].bool()  # (count, T)
            logits = model.lm_head(
                response_hidden(model, prompt, ids, checkpoint=False)
            )  # (count, T, V)
            loss = (
                torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
                * mask
            )
            (loss.sum(1) / mask.sum(1)).sum().div(BASE["crops"] + BASE["fulls"]).backward()
            right = ((logits.argmax(-1) == ids) | ~mask).all(1).float()
            if small := [i for i, kind in enumerate(kinds) if view == "image" and kind == "small"]:
                read = 0.8 * read + 0.2 * right[small].mean().item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    partial = folder.with_name("base.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, processor, partial)
    write(folder.with_name("base-seconds.json"), json.dumps({"base": time.perf_counter() - start}))
    partial.rename(folder)
