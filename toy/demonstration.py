"""What `train.py --toy` changes, draws and trains before the run."""

from pathlib import Path

from toy.base import train_base
from toy.scenes import ROWS, draw
from triplets.preview import draw_preview

# Its defaults of train.py's settings (ours: a tiny model trained from scratch in minutes).
RUN = {
    "prompts": 16,
    "group": 2,
    "steps": 600,
    "max_new_tokens": 18,
    "lr": 5e-4,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "top_k": 16,
    "ema_rate": 0.001,
    "adam_eps": 5e-5,  # with 1e-8 every step is full-size noise once the gradient has vanished
    "micro_prompts": 16,
    "gen_prompts": 16,
    "workers": 1,
    "threads": 1,
    "save_every": 50,
    "show_every": 25,
    "out": "runs/toy",
}


def prepare(out: Path, data: Path, model: Path, seed: int) -> str:
    """Draw the scenes and train the base model, where they are the run's own (out/data, out/base)
    and not there yet. Returns what seconds.json is to hold: the time the base model took."""
    if data == out / "data":
        draw_preview(draw(data, ROWS, seed))
    if model == out / "base" and not model.exists():
        train_base(model, seed)
    seconds = model.with_name("base-seconds.json")
    return seconds.read_text() if seconds.is_file() else "{}"
