"""The report page: what it shows, what it survives, and that nothing a model wrote can act in it."""
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import synth
from evaluate import curves, gap_closed, report

# -------------------------------------------------------------------------------------------------------------- a fake run

def misread(text: str, rng: random.Random) -> str:
    words = text.split()
    for n, choices in rng.sample([(1, list(synth.TOY_COLOURS)), (2, synth.TOY_SHAPES), (4, "0123456789")], rng.choice([1, 1, 2])):
        words[n] = rng.choice([c for c in choices if c != words[n]])
    return " ".join(words)


def fake_run(out: Path, steps: int = 200, small: int = 20, large: int = 10, seed: int = 0) -> Path:
    """A run folder as train.py --toy leaves it, with plausible numbers: full 52% -> 95%, crop and large kept."""
    rng = random.Random(seed)
    synth.toy(out / "eval", small + large, seed, large_share=large / (small + large), split="eval")
    rows, log, saved, result = synth.read_triplets(out / "eval"), [], [], {}
    for when, hit in (("before", {"full": .52, "crop": .99, "large": 1}), ("after", {"full": .95, "crop": .98, "large": .99})):
        answers, counts = [], dict.fromkeys(("full", "crop", "large"), 0)
        for row in rows:
            for view in ("full", "crop") if row["extra"]["size"] == "small" else ("full",):
                name = view if row["extra"]["size"] == "small" else "large"
                correct = rng.random() < hit[name]
                counts[name] += correct
                text = row["answer"] if correct else misread(row["answer"], rng)
                answers.append({"id": row["id"], "view": view, "answer": text, "truncated": False, "correct": correct})
        write(out / f"answers-{when}.jsonl", answers)
        result[when] = {"full": counts["full"] / small, "crop": counts["crop"] / small, "large": counts["large"] / large,
                        "n": small, "n_large": large, "counts": {**counts, "errors": 0, "truncated": 0}}
    (out / "result.json").write_text(json.dumps(result))
    (out / "args.json").write_text(json.dumps({
        "toy": True, "model": "runs/toy/base", "data": "runs/toy/data", "steps": steps, "prompts": 16, "group": 2, "lr": 5e-4,
        "divergence": "jsd", "beta": 0.5, "top_k": 16, "ema_rate": 0.005, "seed": seed, "max_new_tokens": 10,
        "commit": "0123456789abcdef", "versions": {"python": "3.12.4", "torch": "2.13.0", "transformers": "5.23.0"}}))
    for step in range(1, steps + 1):
        fall, noise = math.exp(-5 * step / steps), lambda scale: rng.gauss(1, scale)
        log.append({"step": step, "steps": steps, "loss": (.012 + .09 * fall) * noise(.12), "grad_norm": (.35 + 1.3 * fall) * noise(.2),
                    "lr": 5e-4 * min(1, step / 10) * (.55 + .45 * math.cos(math.pi * step / steps)), "length": 7 + .15 * fall * noise(.6),
                    "eos": 1 - .01 * fall, "truncated": .01 * fall, "agreement": .985 - .16 * fall * noise(.1), "tokens": 224,
                    "gen_s": .09 * noise(.08), "teach_s": .02 * noise(.1), "learn_s": .08 * noise(.06), "other_s": .012 * noise(.2),
                    "mem_gb": .71 + .002 * math.sin(step)})
        for row in rng.sample(rows, 4) if step in (1, steps // 2, steps) else []:
            gold = row["answer"].split()
            words = gold if rng.random() > fall else misread(row["answer"], rng).split()
            off = [rng.uniform(.4, .95) if w != g else rng.random() ** 4 * (.06 + .4 * fall) for w, g in zip(words, gold)]
            saved.append({"step": step, "id": row["id"], "question": row["question"], "image": str(row["image"].relative_to(out)),
                          "crop": str(row["crop"].relative_to(out)), "answer": row["answer"], "tokens": words + ["<|im_end|>"],
                          "divergence": [math.log(2) * d for d in off] + [.0001]})
    write(out / "log.jsonl", log)
    write(out / "rollouts.jsonl", saved)
    return out


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
