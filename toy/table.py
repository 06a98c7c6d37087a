"""The table of methods: train.py's teachers, objectives and baselines, from one base model on one
data set, with several seeds each.

A run lies in OUT/VARIANT-SEED; the seed is that of the batches and of all that is sampled.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from storage.files import read_json, read_jsonl
from toy.demonstration import BASE, prepare

VARIANTS = {  # what one would add to train.py --toy
    "vision-opd": "",
    "teacher-initial": "--teacher initial",
    "teacher-current": "--teacher current",
    "teacher-trust-region": "--teacher trust-region",
    "forward-kl": "--divergence forward_kl",
    "reverse-kl": "--divergence reverse_kl",
    "8-tokens": "--max-new-tokens 8",
    "sampled-token": "--objective sampled-token",
    "opsd": "--method opsd",
    "sft": "--method sft",
    # as many responses a step as the others, in groups as large as the paper's
    "grpo": "--method grpo --prompts 4 --group 8",
    "dapo": "--method dapo --prompts 4 --group 8 --resample 2",
}
JUDGED = {  # column: benchmark and view
    "full": ("toy", "full"),
    "crop": ("toy", "crop"),
    "large": ("toy-large", "full"),
    "holdout": ("toy-holdout", "full"),
}


# -------------------------------------------------------------------------------------- the runs


def run_variants(out: Path, seeds: list[int], variants: list[str], jobs: int, steps: int) -> None:
    """Train every variant with every seed, `jobs` at a time; runs that have ended are kept. The
    first variant, vision-opd, goes first: the others take its judgement of the base model."""
    prepare(out, out / "data", BASE, 0)
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(variants) * len(seeds), unit="run") as bar,
    ):
        for stage in (variants[:1], variants[1:]):
            runs = product(stage, seeds)
            for _ in pool.map(lambda run: run_variant(out, *run, steps), runs):
                bar.update()


def run_variant(out: Path, variant: str, seed: int, steps: int) -> None:
    """One run, in a process of its own. Raises OSError when that fails."""
    folder = out / f"{variant}-{seed}"
    judged = folder / "eval-after" / "result.json"
    if judged.exists() and read_json(folder / "args.json", []).get("steps") == steps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    first = out / f"vision-opd-{seed}"
    if folder != first and not (folder / "seconds.json").exists():
        shutil.copytree(first / "eval-before", folder / "eval-before", dirs_exist_ok=True)
        shutil.copy(first / "seconds.json", folder)
    command = [
        sys.executable,
        str(Path(__file__).parent.parent / "train.py"),
        "--toy",
        f"--seed={seed}",
        f"--steps={steps}",
        f"--out={folder}",
        f"--data={out / 'data'}",
        *VARIANTS[variant].split(),
    ]
    with (folder / "output.txt").open("a") as output:
        if subprocess.run(command, stdout=output, stderr=output).returncode:
            raise OSError(
                f"{variant} with seed {seed} failed: see {folder}/output.txt. Mend what it names, "
                "then run the same command: it goes on from here."
            )


# ------------------------------------------------------------------------------------- the table


def render(out: Path, seeds: list[int], variants: list[str]) -> str:
    """Mean and standard deviation over the seeds: % of exact answers to held-out scenes, tokens a
    response at the end of training, and minutes of training."""
    head = ["variant", *JUDGED, "length", "minutes"]
    before = [accuracies(out / f"vision-opd-{seed}", "before") for seed in seeds]
    rows = [head, ["---"] * len(head)]
    rows.append(["base", *map(spread, zip(*before, strict=True)), "", ""])
    for variant in variants:
        folders = [out / f"{variant}-{seed}" for seed in seeds]
        after = [accuracies(folder, "after") + length_and_minutes(folder) for folder in folders]
        rows.append([variant, *map(spread, zip(*after, strict=True))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accuracies(folder: Path, when: str) -> list[float]:
    """In %, in the order of JUDGED; when: before or after."""
    benches = json.loads((folder / f"eval-{when}" / "result.json").read_text())["benches"]
    return [100 * benches[name][view]["accuracy"] for name, view in JUDGED.values()]


def length_and_minutes(folder: Path) -> list[float]:
    log = read_jsonl(folder / "log.jsonl", [])
    length = mean(row["length"] for row in log[-20:])
    seconds = sum(row["gen_s"] + row["teach_s"] + row["learn_s"] + row["other_s"] for row in log)
    return [length, seconds / 60]


def spread(values) -> str:
    """The cell of a column: its value in every run."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"
