"""The table of methods on the toy world, and its data sets."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else a GPU's kernels are taken where they are installed

import numpy as np
import torch
from tqdm import tqdm

from launch.flags import Help
from toy.base import train_base
from toy.scenes import ROWS, SPLITS, draw
from triplets.preview import draw_preview

EIGHT = [
    "--prompts",
    "4",
    "--group",
    "8",
]  # as many responses a step, in groups as large as the paper's
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
    "grpo": ["--method", "grpo", *EIGHT],
    "dapo": ["--method", "dapo", "--resample", "2", *EIGHT],
}


def ablate(out: Path, seeds: list[int], variants: list[str], jobs: int, steps: int) -> None:
    """Train every variant with every seed (of the batches and of all that is sampled) into out/VARIANT-SEED, `jobs` at a time, from
    one base model on one data set. Those that have ended are not run again."""
    draw(out / "data", ROWS, 0)
    if not (out / "base").exists():
        train_base(out / "base", 0)

    def run(pair: tuple[str, int]) -> None:
        variant, seed = pair
        folder, first = out / f"{variant}-{seed}", out / f"vision-opd-{seed}"
        if (folder / "eval-after" / "result.json").exists() and json.loads(
            (folder / "args.json").read_text()
        )["steps"] == steps:
            return
        if (
            folder != first and not (folder / "seconds.json").exists()
        ):  # the same base: once a seed is enough
            shutil.copytree(first / "eval-before", folder / "eval-before", dirs_exist_ok=True)
            shutil.copy(first / "seconds.json", folder)
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            Path(__file__).parent.parent / "train.py",
            "--toy",
            "--seed",
            seed,
            "--steps",
            steps,
            "--out",
            folder,
            "--model",
            out / "base",
            "--data",
            out / "data",
            *VARIANTS[variant],
        ]
        with (folder / "output.txt").open("a") as output:
            if subprocess.run([*map(str, command)], stdout=output, stderr=output).returncode:
                raise OSError(
                    f"{variant} with seed {seed} failed: see {folder}/output.txt. Mend what it names, then run "
                    "the same command: it goes on from here."
                )

    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(variants) * len(seeds), unit="run") as bar,
    ):
        for stage in (["vision-opd"], [variant for variant in variants if variant != "vision-opd"]):
            for _ in pool.map(run, [(variant, seed) for variant in stage for seed in seeds]):
                bar.update()


def table(out: Path, seeds: list[int], variants: list[str]) -> str:
    """Mean and standard deviation over the seeds, in %, of the exact answers to held-out scenes; response length at the end of
    training, and minutes of training."""

    def cells(folders: list[Path], when: str) -> list[str]:
        found = [
            json.loads((folder / f"eval-{when}" / "result.json").read_text())["benches"]
            for folder in folders
        ]
        values = [
            [100 * bench[name][view]["accuracy"] for bench in found]
            for name, view in (
                ("toy", "full"),
                ("toy", "crop"),
                ("toy-large", "full"),
                ("toy-holdout", "full"),
            )
        ]
        if when == "after":
            logs = [
                [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                for folder in folders
            ]
            values.append([np.mean([row["length"] for row in log[-20:]]) for log in logs])
            values.append(
                [
                    sum(
                        row[f"{key}_s"] for row in log for key in ("gen", "teach", "learn", "other")
                    )
                    / 60
                    for log in logs
                ]
            )
        return [
            f"{np.mean(each):.1f}" + (f" ± {np.std(each, ddof=1):.1f}" if len(each) > 1 else "")
            for each in values
        ]

    rows = [["base", *cells([out / f"vision-opd-{seed}" for seed in seeds], "before"), "", ""]]
    rows += [
        [variant, *cells([out / f"{variant}-{seed}" for seed in seeds], "after")]
        for variant in variants
    ]
    head = ["variant", "full", "crop", "large", "holdout", "length", "minutes"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; an interrupted table goes on",
    )
    p.add_argument("--n", type=int, default=100, help="triplets to draw")
    p.add_argument("--seed", type=int, default=0, help="of the scenes drawn")
    p.add_argument(
        "--split", choices=SPLITS, default="train", help="three streams of scenes that never meet"
    )
    p.add_argument(
        "--ablate",
        action="store_true",
        help="instead: train and compare the variants of train.py's method",
    )
    p.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=[*VARIANTS],
        help="rows of the table (default: all)",
    )
    p.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="runs a variant (default: 0 1 2)"
    )
    p.add_argument("--steps", type=int, default=400, help="steps a run")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, a CPU core each")
    args = p.parse_args()
    if min(args.n, args.steps, args.jobs, args.seed + 1) < 1:
        p.error(
            f"--n, --steps and --jobs must be at least 1 and --seed 0, got {args.n}, {args.steps}, {args.jobs} and {args.seed}"
        )
    idle = (
        {"--n", "--seed", "--split"}
        if args.ablate
        else {"--variants", "--seeds", "--steps", "--jobs"}
    )
    if found := sorted(idle & {token.partition("=")[0] for token in sys.argv[1:]}):
        p.error(
            f"{', '.join(found)} would change nothing {'with' if args.ablate else 'without'} --ablate. Leave it out."
        )
    if not args.ablate:
        print(f"drawn: {draw_preview(draw(args.out, args.n, args.seed, args.split))}")
        return
    torch.set_num_threads(1)  # as train.py --toy: the bits depend on it
    variants, seeds = (
        list(dict.fromkeys(["vision-opd", *args.variants])),
        list(dict.fromkeys(args.seeds)),
    )
    ablate(args.out, seeds, variants, args.jobs, args.steps)
    text = table(args.out, seeds, variants)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"python -m toy: {error}") from error
