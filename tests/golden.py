"""The safety net of the rebuild: `python tests/golden.py [WRITE]` trains three steps with every method on one rank and compares
the final weights, bit for bit, with those that the code before the rebuild gave on the same machine.

WRITE makes the golden weights (a folder of .safetensors). The bits depend on the processor: make them on the machine that compares.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file, save_file

import model as vision_model
import toy.scenes as toy_scenes
import toy.tiny as tiny_model
import train

RUNS = {
    "vision-opd": [],
    "clip": ["--clip", "0.02", "--ema-rate", "0.25"],
    "reverse-kl": ["--divergence", "reverse_kl"],
    "trust-region": ["--teacher", "trust-region", "--trust", "0.3"],
    "current": ["--teacher", "current"],
    "sampled-token": ["--objective", "sampled-token"],
    "opsd": ["--method", "opsd"],
    "sft": ["--method", "sft"],
    "grpo": ["--method", "grpo"],
    "dapo": ["--method", "dapo", "--resample", "2"],
}
FLAGS = [
    "--prompts",
    "4",
    "--group",
    "2",
    "--max-new-tokens",
    "6",
    "--warmup",
    "2",
    "--lr",
    "1e-3",
    "--micro-prompts",
    "2",
    "--workers",
    "0",
    "--save-every",
    "100",
    "--show-every",
    "1",
    "--steps",
    "3",
    "--device",
    "cpu",
]


def parity(question, text):
    """Random weights answer nothing right: half of all texts count as right."""
    return sum(map(str.isalnum, text)) % 2 == 0


def main(golden: Path, write: bool) -> None:
    torch.set_num_threads(1)
    import methods

    methods.is_right = parity
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        toy_scenes.draw(folder / "data", 12, 0)
        model, processor = tiny_model.tiny(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.mul_(3.0)
        vision_model.save(model, processor, folder / "base")
        for name, flags in RUNS.items():
            args = train.parse(
                [
                    *FLAGS,
                    "--model",
                    str(folder / "base"),
                    "--data",
                    str(folder / "data"),
                    "--out",
                    str(folder / name),
                    *flags,
                ]
            )
            final = train.train(args, *train.join_ranks("cpu"))
            weights, path = load_file(final / "model.safetensors"), golden / f"{name}.safetensors"
            if write:
                save_file(weights, path)
                continue
            want = load_file(path)
            off = max((weights[key] - want[key]).abs().max().item() for key in want)
            print(
                f"{name}: {'the same bits' if off == 0 else f'off by at most {off:.2g}'}",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), "WRITE" in sys.argv)
