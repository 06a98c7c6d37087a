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
from threading import Lock

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
RATES = (4e-5, 1e-4, 2.5e-4, 6e-4)
SEARCH_SEED = 99
VALIDATION = 600  # scenes, neither trained on nor reported; a hundred tell no rates apart
PROBES = 6  # points of a curve
ONE_AT_A_TIME = Lock()  # from_pretrained in two threads at once loses weights
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
    """A run of train.py."""

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
    tried = [
        Job(out / "search" / f"{variant}-{rate:g}", variant, rate, SEARCH_SEED, steps)
        for variant, rate in product(variants, RATES)
    ]
    total = len(tried) + len(variants) * len(seeds)
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=total, unit="run") as bar:

        def run_all(run, these: list[Job]) -> None:
            for _ in pool.map(lambda job: run(out, job), these):
                bar.update()

        run_all(search, tried)
        rates = chosen_rates(out, variants)
        compared = [
            Job(out / f"{variant}-{seed}", variant, rates[variant], seed, steps)
            for variant, seed in product(variants, seeds)
        ]
        run_all(compare, compared)


def search(out: Path, job: Job) -> None:
    """A run that is judged by validation scenes alone, into validation.json; where it fails, there
    is none, and its learning rate is not chosen."""
    clear(job)
    result = job.folder / "validation.json"
    if result.exists():
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    write(job.folder / "seconds.json", "{}")  # and no eval-before: it does not judge itself
    if train(out, job, job.steps):
        with ONE_AT_A_TIME:
            trained = load(str(job.folder / f"checkpoint-{job.steps:06d}"))
            write(result, json.dumps(probe(*trained, VALIDATION)))


def compare(out: Path, job: Job) -> None:
    """A run of the table. Raises OSError when it fails."""
    clear(job)
    if (job.folder / "eval-after" / "result.json").exists():
        return
    if not (job.folder / "seconds.json").exists():  # as if it had judged the base model itself
        shutil.copytree(out / "eval-before", job.folder / "eval-before", dirs_exist_ok=True)
        shutil.copy(out / "seconds.json", job.folder)
    if not train(out, job, max(1, job.steps // PROBES)):
        raise OSError(f"{job.variant} with seed {job.seed} failed: {what_to_do(job.folder)}")


def clear(job: Job) -> None:
    """What a run of other steps or another learning rate left in its folder goes."""
    begun = read_json(job.folder / "args.json", [])
    if begun and (begun.get("steps"), begun.get("lr")) != (job.steps, job.rate):
        shutil.rmtree(job.folder)


def train(out: Path, job: Job, save_every: int) -> bool:
    """In a process of its own; whether it succeeded."""
    command = [
        sys.executable,
        str(Path(__file__).parent.parent / "train.py"),
        "--toy",
        f"--lr={job.rate}",
        f"--seed={job.seed}",
        f"--steps={job.steps}",
        f"--save-every={save_every}",
        f"--out={job.folder}",
        f"--data={out / 'data'}",
        *VARIANTS[job.variant].split(),
    ]
    with (job.folder / "output.txt").open("a") as output:
        return not subprocess.run(command, stdout=output, stderr=output).returncode


def what_to_do(folder: Path) -> str:
    told = "Mend what it names, then run the same command: it goes on from here."
    return f"see {folder}/output.txt. {told}"


def chosen_rates(out: Path, variants: list[str]) -> dict[str, float]:
    """The learning rate of each variant; of equal ones the smallest. Raises OSError for a variant
    that failed with each."""
    rates = {}
    for variant in variants:
        read = {}
        for rate in RATES:
            folder = out / "search" / f"{variant}-{rate:g}"
            read[rate] = sum(read_json(folder / "validation.json", []).values())
        rates[variant] = max(RATES, key=read.get)
        if not any(read.values()):
            raise OSError(f"{variant} failed with every learning rate: {what_to_do(folder)}")
    return rates


# ------------------------------------------------------------------------------------- the table


def render(out: Path, seeds: list[int], variants: list[str]) -> str:
    """Means and standard deviations over the seeds: % of exact answers to held-out scenes, how much
    better in full view than vision-opd on the same scenes (exact McNemar test over all seeds), and
    what course() tells of a run."""
    course_of = ["early", "length", "seconds"]
    head = ["variant", "learning rate", *JUDGED, "against vision-opd, full", *course_of]
    rows = [head, ["---"] * len(head)]
    before = [f"{share:.1f}" for share in accuracies(out, "before")]
    rows.append(["base", "", *before, "", *[""] * len(course_of)])
    rates = chosen_rates(out, variants)
    first = full_answers(out, variants[0], seeds)
    for variant in variants:
        folders = [out / f"{variant}-{seed}" for seed in seeds]
        after = [accuracies(folder, "after") for folder in folders]
        other = [course(folder) for folder in folders]
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


def course(folder: Path) -> list[float]:
    """% that the first probe reads in full view, a sixth of the way; tokens a response at the end;
    seconds of training."""
    log = read_jsonl(folder / "log.jsonl", [])
    early = next(row["probe_full"] for row in log if "probe_full" in row)
    length = mean(row["length"] for row in log[-20:])
    seconds = sum(row["gen_s"] + row["teach_s"] + row["learn_s"] + row["other_s"] for row in log)
    return [100 * early, length, seconds]


def spread(values) -> str:
    """The cell of a column: its value in every run."""
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"
