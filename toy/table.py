"""The table of methods: train.py's teachers, objectives and baselines, from one base model on one
data set, with several seeds each.

A run lies in OUT/VARIANT-SEED; the seed is that of the batches and of all that is sampled.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from storage.files import read_jsonl
from toy.base import train_base
from toy.scenes import ROWS, draw

# As many responses a step as the others, in groups as large as the paper's.
GROUPS_OF_EIGHT = ["--prompts", "4", "--group", "8"]
VARIANTS = {  # flags of train.py
    "vision-opd": [],
    "teacher-initial": ["--teacher", "initial"],
    "teacher-current": ["--teacher", "current"],
    "teacher-trust-region": ["--teacher", "trust-region"],
    "forward-kl": ["--divergence", "forward_kl"],
    "reverse-kl": ["--divergence", "reverse_kl"],
    "8-tokens": ["--max-new-tokens", "8"],
    "sampled-token": ["--objective", "sampled-token"],
    "opsd": ["--method", "opsd"],
    "sft": ["--method", "sft"],
    "grpo": ["--method", "grpo", *GROUPS_OF_EIGHT],
    "dapo": ["--method", "dapo", "--resample", "2", *GROUPS_OF_EIGHT],
}
JUDGED = {  # column: benchmark and view
    "full": ("toy", "full"),
    "crop": ("toy", "crop"),
    "large": ("toy-large", "full"),
    "holdout": ("toy-holdout", "full"),
}


# -------------------------------------------------------------------------------------- the runs


def run_variants(out: Path, seeds: list[int], variants: list[str], jobs: int, steps: int) -> None:
    """Train every variant with every seed, `jobs` at a time. Runs that have ended are kept.
    vision-opd has to be among the variants, and comes first: its judgement of the base is theirs.
    """
    draw(out / "data", ROWS, 0)
    if not (out / "base").exists():
        train_base(out / "base", 0)
    others = [variant for variant in variants if variant != "vision-opd"]
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(variants) * len(seeds), unit="run") as bar,
    ):
        for stage in (["vision-opd"], others):
            runs = product(stage, seeds)
            for _ in pool.map(lambda run: run_variant(out, *run, steps), runs):
                bar.update()


def run_variant(out: Path, variant: str, seed: int, steps: int) -> None:
    """One run, in a process of its own. Raises OSError when that fails."""
    folder = out / f"{variant}-{seed}"
    if has_ended(folder, steps):
        return
    folder.mkdir(parents=True, exist_ok=True)
    first = out / f"vision-opd-{seed}"
    if folder != first and not (folder / "seconds.json").exists():
        shutil.copytree(first / "eval-before", folder / "eval-before", dirs_exist_ok=True)
        shutil.copy(first / "seconds.json", folder)
    flags = {
        "--seed": seed,
        "--steps": steps,
        "--out": folder,
        "--model": out / "base",
        "--data": out / "data",
    }
    script = Path(__file__).parent.parent / "train.py"
    command = [sys.executable, script, "--toy", *chain(*flags.items()), *VARIANTS[variant]]
    with (folder / "output.txt").open("a") as output:
        done = subprocess.run([str(part) for part in command], stdout=output, stderr=output)
    if done.returncode:
        raise OSError(
            f"{variant} with seed {seed} failed: see {folder}/output.txt. Mend what it names, then "
            "run the same command: it goes on from here."
        )


def has_ended(folder: Path, steps: int) -> bool:
    """Whether a run of so many steps lies there, judged at its end."""
    if not (folder / "eval-after" / "result.json").exists():
        return False
    return json.loads((folder / "args.json").read_text())["steps"] == steps


# ------------------------------------------------------------------------------------- the table


def render(out: Path, seeds: list[int], variants: list[str]) -> str:
    """Mean and standard deviation over the seeds: % of exact answers to held-out scenes, tokens a
    response at the end of training, and minutes of training."""
    head = ["variant", *JUDGED, "length", "minutes"]
    before = [accuracies(out / f"vision-opd-{seed}", "before") for seed in seeds]
    rows = [head, ["---"] * len(head), ["base", *spreads(before), "", ""]]
    for variant in variants:
        after = []
        for seed in seeds:
            folder = out / f"{variant}-{seed}"
            after.append([*accuracies(folder, "after"), *length_and_minutes(folder)])
        rows.append([variant, *spreads(after)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accuracies(folder: Path, when: str) -> list[float]:
    result = json.loads((folder / f"eval-{when}" / "result.json").read_text())
    return [100 * result["benches"][name][view]["accuracy"] for name, view in JUDGED.values()]


def length_and_minutes(folder: Path) -> tuple[float, float]:
    log = read_jsonl(folder / "log.jsonl", [])
    length = mean(row["length"] for row in log[-20:])
    parts = ("gen_s", "teach_s", "learn_s", "other_s")
    return length, sum(row[part] for row in log for part in parts) / 60


def spreads(runs: list[list[float]]) -> list[str]:
    """Each column of the runs' figures as a cell of the table."""
    cells = []
    for values in zip(*runs):
        deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.1f}{deviation}")
    return cells
