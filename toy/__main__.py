"""Draw triplets of the toy world, or train and compare train.py's methods on it.

python -m toy --out data/toy --n 100            draw triplets: no model, no labels needed
python -m toy --ablate --out runs/ablate        the table: every method, several seeds; hours
"""

import launch.environment  # noqa: F401  (first: it sets what torch and transformers read)

# isort: split

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from launch import script
from launch.flags import natural, positive_int, refuse_idle, setting, settings_parser
from storage.files import write
from toy.curves import draw_curves
from toy.scenes import SPLITS, draw
from toy.table import VARIANTS, render, run_variants
from triplets.preview import draw_preview


@dataclass
class Settings:
    out: Path = setting(None, "folder to write; an interrupted table goes on", Path, required=True)
    # What is drawn.
    n: int = setting(100, "triplets to draw", positive_int)
    seed: int = setting(0, "of the scenes drawn", natural)
    split: str = setting("train", "streams of scenes that never meet", SPLITS)
    # The table.
    ablate: bool = setting(
        False, "instead: train and compare the variants of train.py's method", bool
    )
    variants: list = setting(
        tuple(VARIANTS), "rows of the table (default: all)", list(VARIANTS), nargs="+"
    )
    seeds: list = setting((0, 1, 2), "runs a variant (default: 0 1 2)", natural, nargs="+")
    steps: int = setting(60, "steps a run", positive_int)
    jobs: int = setting(2, "runs at a time, a CPU core each", positive_int)


def main(argv: list[str]) -> None:
    parser = settings_parser(Settings, __doc__)
    settings = parser.parse_args(argv)
    tabled = settings.ablate
    has_effect = {
        "--n": not tabled,
        "--seed": not tabled,
        "--split": not tabled,
        "--variants": tabled,
        "--seeds": tabled,
        "--steps": tabled,
        "--jobs": tabled,
    }
    refuse_idle(parser, argv, has_effect, "with --ablate" if tabled else "without --ablate")
    if not tabled:
        folder = draw(settings.out, settings.n, settings.seed, settings.split)
        print(f"drawn: {draw_preview(folder)}")
        return
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # as train.py --toy: the bits depend on it
    variants = list(dict.fromkeys(["vision-opd", *settings.variants]))
    seeds = list(dict.fromkeys(settings.seeds))
    run_variants(settings.out, seeds, variants, settings.jobs, settings.steps)
    text = render(settings.out, seeds, variants)
    write(settings.out / "table.md", f"{text}\n")
    draw_curves(settings.out, seeds, variants)
    print(f"{text}\nover the steps: {settings.out / 'curves.svg'}")


if __name__ == "__main__":
    script.run(main, sys.argv[1:])
