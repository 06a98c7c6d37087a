"""What `train.py --toy` changes, draws and trains before the run."""

from pathlib import Path

import torch

from toy.base import train_base
from toy.scenes import ROWS, draw
from triplets.preview import draw_preview

# What it changes (ours: a tiny model trained from scratch in minutes).
RUN = dict(
    prompts=16,
    group=2,
    steps=600,
    max_new_tokens=18,
    lr=5e-4,
    weight_decay=0.0,
    schedule="cosine",
    top_k=16,
    ema_rate=0.001,
    adam_eps=5e-5,
    micro_prompts=16,
    gen_prompts=16,
    workers=1,
    threads=1,
    save_every=50,
    show_every=25,
    out="runs/toy",
)


def prepare(args, device: torch.device) -> str:
    """Draw the scenes and train the base model, each only if it is not there yet; seconds.json of the base."""
    out, took = Path(args.out), Path(args.model).with_name("base-seconds.json")
    if args.data == f"{args.out}/data":
        draw_preview(draw(out / "data", ROWS, args.seed))
    if not Path(args.model).exists() and args.model == f"{args.out}/base":
        train_base(Path(args.model), args.seed, device)
    return took.read_text() if took.is_file() else "{}"
