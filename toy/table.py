"""The table of methods: train.py's teachers, objectives, baselines and controls, from one base
model on one data set, each with a learning rate of its own and several seeds.

A variant's learning rate is the one of RATES with which a run of as many steps, with a seed that is
not in the table, reads most of VALIDATION scenes: full view and crop together.

A run lies in OUT/VARIANT-SEED, those of the search in OUT/search/VARIANT-RATE; the seed is that of
the batches and of all that is sampled.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

from benchmarks.figures import Scorer, paired, scored_answers
from model import load
from storage.files import read_json, read_jsonl, write
from toy.demonstration import BASE, judge, prepare, probe

VARIANTS = {  # what one would add to train.py --toy
    "vision-opd": "",
    "teacher-initial": "--teacher initial",
    "teacher-current": "--teacher current",
    "teacher-trust-region": "--teacher trust-region",
    "forward-kl": "--divergence forward_kl",
    "reverse-kl": "--divergence reverse_kl",
    "8-tokens": "--max-new-tokens 8",
    "sampled-token": "--objective sampled-token",
    "off-policy": "--method off-policy",
    "opsd": "--method opsd",
    "sft": "--method sft",
    # As many responses a step as the others, in groups as large as the paper's.
    "grpo": "--method grpo --prompts 4 --group 8",
    "dapo": "--method dapo --prompts 4 --group 8 --resample 2",
    "crops": "--method crops --prompts 32 --group 1",
    "opd-aha": "--method opd-aha",
    "ead": "--method ead",
    "vad": "--method vad",
    "opd-v": "--method opd-v",
    "vcsd": "--method vcsd",
    "va-opd": "--method va-opd --prompts 4 --group 8",
    "v-zero": "--method v-zero --prompts 4 --group 8",
    "cv-opd": "--method cv-opd",
    "s2vopd": "--method s2vopd",
}
RATES = (1e-4, 2.5e-4, 6e-4, 1.5e-3)
SEARCH_SEED = 99
VALIDATION = 600  # scenes, neither trained on nor reported; a hundred tell no rates apart
JUDGED = {  # column: benchmark and view
    "full": ("toy", "full"),
    "crop": ("toy", "crop"),
    "distant": ("toy-distant", "full"),
    "large": ("toy-large", "full"),
    "holdout": ("toy-holdout", "full"),
}


# -------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Job:
    """A run of train.py --toy."""

    folder: Path
    variant: str
    rate: float
    seed: int
    steps: int


def run_variants(out: Path, seeds: list[int], variants: list[str], jobs: int, steps: int) -> None:
    """Search every variant's learning rate, then train it with every seed, `jobs` runs at a time;
    runs that have ended are kept."""
    prepare(out, out / "data", BASE, 0)
    if not (out / "seconds.json").exists():
        judge(out, BASE, "before", "cpu")
        write(out / "seconds.json", "{}")
    search = [
        Job(out / "search" / f"{variant}-{rate:g}", variant, rate, SEARCH_SEED, steps)
        for variant, rate in product(variants, RATES)
    ]
    total = len(search) + len(variants) * len(seeds)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=total, unit="run") as bar:

        def run_all(these: list[Job]) -> None:
            for _ in pool.map(lambda job: run(out, job), these):
                bar.update()

        run_all(search)
        for job in tqdm(search, "validation", leave=False):
            validate(job)
        rates = chosen_rates(out, variants)
        run_all(
            [
                Job(out / f"{variant}-{seed}", variant, rates[variant], seed, steps)
                for variant, seed in product(variants, seeds)
            ]
        )


def run(out: Path, job: Job) -> None:
    """In a process of its own. Raises OSError when that fails."""
    begun = read_json(job.folder / "args.json", [])
    same = begun.get("steps") == job.steps and begun.get("lr") == job.rate
    if same and (job.folder / "eval-after" / "result.json").exists():
        return
    if begun and not same:  # of another search
        shutil.rmtree(job.folder)
    if not (job.folder / "seconds.json").exists():  # as if it had judged the base model itself
        shutil.copytree(out / "eval-before", job.folder / "eval-before", dirs_exist_ok=True)
        shutil.copy(out / "seconds.json", job.folder)
    command = [
        sys.executable,
        str(Path(__file__).parent.parent / "train.py"),
        "--toy",
        f"--lr={job.rate}",
        f"--seed={job.seed}",
        f"--steps={job.steps}",
        f"--out={job.folder}",
        f"--data={out / 'data'}",
        *VARIANTS[job.variant].split(),
    ]
    with (job.folder / "output.txt").open("a") as output:
        failed = subprocess.run(command, stdout=output, stderr=output).returncode
        if failed and job.seed != SEARCH_SEED:  # a learning rate that fails is not chosen
            raise OSError(
                f"{job.variant} with seed {job.seed} failed: see {job.folder}/output.txt. Mend "
                "what it names, then run the same command: it goes on from here."
            )


def validate(job: Job) -> None:
    """Into validation.json what a run of the search reads in the end; nothing where it failed."""
    found, trained = job.folder / "validation.json", job.folder / f"checkpoint-{job.steps:06d}"
    if trained.is_dir() and not found.exists():
        write(found, json.dumps(probe(*load(str(trained)), VALIDATION)))


def chosen_rates(out: Path, variants: list[str]) -> dict[str, float]:
    """The learning rate of each variant; of equal ones the smallest."""

    def read(variant: str, rate: float) -> float:
        folder = out / "search" / f"{variant}-{rate:g}"
        return sum(read_json(folder / "validation.json", []).values())

    return {variant: max(RATES, key=lambda rate: read(variant, rate)) for variant in variants}


# ------------------------------------------------------------------------------------- the table


def render(out: Path, seeds: list[int], variants: list[str]) -> str:
    """Means and standard deviations over the seeds: % of exact answers to held-out scenes, how much
    better in full view than vision-opd on the same scenes (exact McNemar test over all seeds),
    tokens a response at the end of training, and minutes of training."""
    head = ["variant", "learning rate", *JUDGED, "against vision-opd, full", "length", "minutes"]
    rows = [head, ["---"] * len(head)]
    rows.append(["base", "", *(f"{share:.1f}" for share in accuracies(out, "before")), "", "", ""])
    rates = chosen_rates(out, variants)
    first = full_answers(out, variants[0], seeds)
    for variant in variants:
        folders = [out / f"{variant}-{seed}" for seed in seeds]
        after = [accuracies(folder, "after") for folder in folders]
        other = [length_and_minutes(folder) for folder in folders]
        test = paired(first, full_answers(out, variant, seeds))
        against = f"{100 * test.difference:+.1f}, p {test.p:.1g}" if variant != variants[0] else ""
        cells = [*map(spread, zip(*after, strict=True)), against]
        cells += map(spread, zip(*other, strict=True))
        rows.append([variant, f"{rates[variant]:g}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def full_answers(out: Path, variant: str, seeds: list[int]) -> list:
    """The answers in full view of all seeds' trained models, as rows of their own."""
    bench, view = JUDGED["full"]
    rows = []
    for seed in seeds:
        for row in scored_answers(out / f"{variant}-{seed}" / "eval-after", Scorer()):
            if (row.bench, row.view) == (bench, view):
                rows.append(replace(row, id=f"{seed}/{row.id}"))
    return rows


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
