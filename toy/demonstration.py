"""What `train.py --toy` changes, and what it does before, during and after the run."""

import shutil
from pathlib import Path
from statistics import mean

from benchmarks.figures import Scorer, compare, summarise
from evaluate import Asking, evaluate
from rollout import answers
from storage.files import write
from toy.base import train_base
from toy.scenes import ROWS, draw, held_out, scene
from triplets.preview import draw_preview

BASE = Path(__file__).with_name("base-model")  # see base.py

# Its defaults of train.py's settings (ours: a tiny model trained from scratch in minutes).
RUN = {
    "prompts": 16,
    "group": 2,
    "steps": 100,
    "max_new_tokens": 18,
    "lr": 1e-4,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "top_k": 16,
    "ema_rate": 0.001,
    "adam_eps": 5e-5,  # with 1e-8 every step is full-size noise once the gradient has vanished
    "micro_prompts": 16,
    "gen_prompts": 16,
    "checkpointing": False,
    "workers": 1,
    "threads": 1,
    "save_every": 20,
    "show_every": 10,
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


def begin(settings, device) -> None:
    """Draw the scenes, train a base model if asked to, and judge it, each only if it is not there
    yet."""
    out = Path(settings.out)
    took = prepare(out, Path(settings.data), Path(settings.model), settings.seed)
    if not (out / "seconds.json").exists():
        judge(out, settings.model, "before", device)
        write(out / "seconds.json", took)


def probe(model, processor, count: int = 100) -> dict[str, float]:
    """Share of small targets, never trained on, that a model reads in full view and crop."""
    shown = [scene(0, i, ("small", "pair")[i % 2], "validation") for i in range(count)]
    found = {}
    for name, view in (("probe_full", "image"), ("probe_crop", "crop")):
        pictures = [each.shown(view) for each in shown]
        questions = [each.question for each in shown]
        replies = answers(model, processor, pictures, questions, RUN["max_new_tokens"])
        pairs = zip(shown, replies, strict=True)
        found[name] = mean(reply.output.strip() == row.answer for row, reply in pairs)
    return found


def end(settings, final: Path, device) -> None:
    """Judge the trained model and print what changed; not in the table's search, which has its own
    judgement and none of the base."""
    out = Path(settings.out)
    if not (out / "eval-before").is_dir():
        return
    shutil.rmtree(out / "eval-after", ignore_errors=True)  # maybe of an earlier checkpoint
    judge(out, final, "after", device)
    print(compare(out / "eval-before", out / "eval-after")[0])


def judge(out: Path, model: str | Path, when: str, device) -> None:
    """Evaluate a model on toy scenes never trained on, into OUT/eval-WHEN."""
    folder = out / f"eval-{when}"
    how = Asking(["full", "crop"], max_new_tokens=RUN["max_new_tokens"], batch=100)
    evaluate(str(model), held_out(out), folder, how, str(device))
    summarise(folder, Scorer())
