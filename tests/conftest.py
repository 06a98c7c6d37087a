"""Shared by the tests: everything runs offline, on the CPU (but for test_gpu.py, with --device
cuda), on one thread per process."""

import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

DEVICE = "cuda" if "--device cuda" in " ".join(sys.argv).replace("=", " ") else "cpu"
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", USE_HUB_KERNELS="NO")
if DEVICE == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before torch, which reads it once: also for what is forked or started from here.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_F32_DEFAULT"] = "ieee"  # kernels would compute fp32 in TF32
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import model as vision_model  # noqa: E402
import train  # noqa: E402
from rollout import sample  # noqa: E402
from sharding import join_ranks  # noqa: E402
from storage.checkpoint import save  # noqa: E402
from storage.images import load_image  # noqa: E402
from toy.scenes import draw  # noqa: E402
from toy.tiny import tiny  # noqa: E402
from triplets.format import read_triplets, write_triplets  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        help="cuda: test_gpu.py on this machine's GPU, with the kernels installed",
    )


def pytest_configure(config):
    if (config.getoption("--device") or "cpu") != DEVICE:
        raise pytest.UsageError(
            "Give --device on the command line: it is read before pytest's own settings are."
        )
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "--device cuda, but torch sees no GPU here. Leave it out, or install a CUDA torch."
        )


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" and any(item.path.name != "test_gpu.py" for item in items):
        raise pytest.UsageError(
            "--device cuda is for tests/test_gpu.py alone: the others are made for the CPU."
        )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def livelier(model, factor: float = 1.7):
    """Random weights give nearly the same logits everywhere; larger ones make every comparison
    harder to pass."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(factor)
    return model


def tiny_qwen3_vl():
    """A Qwen3-VL (full attention everywhere, vision features added to the first layers, an untied
    head) with the tiny tokenizer."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    donor, processor = tiny()
    ids = {key: getattr(donor.config, key) for key in bench.VISION_IDS}
    config = Qwen3VLConfig(**bench.SHAPES["qwen3_vl"], **ids)
    config.text_config.vocab_size = donor.config.text_config.vocab_size
    config.text_config.eos_token_id = processor.tokenizer.eos_token_id
    torch.manual_seed(1)
    model = Qwen3VLForConditionalGeneration(config)
    return vision_model.prepare(model, processor), processor


FAMILIES = {"qwen3_5": tiny, "qwen3_vl": tiny_qwen3_vl}


@pytest.fixture(params=FAMILIES)
def lively(request):
    """(model, processor), of both families."""
    model, processor = FAMILIES[request.param]()
    return livelier(model), processor


@pytest.fixture
def mixed_prompt(lively):
    """Three prompts of different image sizes and lengths, so that two of them are padded."""
    images = [noise(64, 64, 1), noise(32, 48, 2), noise(96, 32, 3)]
    return vision_model.encode(
        lively[1],
        images,
        ["what is in the red box ?", "a ?", "what is the green circle in the red box with ?"],
    )


@pytest.fixture
def dense_mask(monkeypatch):
    """The continuation's mask written out: torch's dispatch modes, which count flops and bytes,
    refuse its causal bias."""
    monkeypatch.setattr(
        vision_model,
        "causal_lower_right",
        lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q),
    )


def alone(prompt, row: int) -> dict:
    """Row `row` of a padded prompt batch, without its padding."""
    real = prompt["attention_mask"][row].bool()
    patches = prompt["image_grid_thw"].prod(1).tolist()
    start = sum(patches[:row])
    return {
        "input_ids": prompt["input_ids"][row : row + 1, real],
        "attention_mask": prompt["attention_mask"][row : row + 1, real],
        "mm_token_type_ids": prompt["mm_token_type_ids"][row : row + 1, real],
        "pixel_values": prompt["pixel_values"][start : start + patches[row]],
        "image_grid_thw": prompt["image_grid_thw"][row : row + 1],
    }


def ask(processor, image: Path | Image.Image | list, text: str) -> dict:
    """The prompt of one image, or of several, and a question, as in training."""
    shown = image if isinstance(image, list) else [image]
    pictures = [each if isinstance(each, Image.Image) else load_image(each) for each in shown]
    return vision_model.encode(processor, [pictures], ["\n" + text])


def respond(model, processor, prompt, group: int, key: str) -> list[torch.Tensor]:
    """The ids (T,) of each response to a prompt, sampled with the key's seed."""
    seed = random.Random(key).getrandbits(63)
    rollout = sample(model, processor, prompt, group, max_new_tokens=6, seeds=[seed])
    return [ids[mask] for ids, mask in zip(rollout.ids, rollout.mask, strict=True)]


def plain_logits(model, prompt, ids):
    """(T, V) logits that predict the tokens `ids` (T,) after a prompt of one row: a plain forward
    of the whole sequence."""
    return model.lm_head(bench.plain_hidden(model, prompt, ids[None])[0])


# Small eps: AdamW would make a full step of a gradient that is only noise.
SMALL = """--device cpu --threads 1 --workers 0 --prompts 4 --group 2 --max-new-tokens 6 --steps 3
    --lr 1e-3 --warmup 2 --weight-decay 0 --adam-eps 1e-4 --micro-prompts 2 --gen-prompts 16
    --save-every 100 --show-every 1""".split()


def small_run(world: Path, out: Path, *flags: str) -> list[str]:
    """The command line of a small run in the folder `out`."""
    folders = ["--model", world / "base", "--data", world / "data", "--out", out]
    return [*SMALL, *map(str, folders), *" ".join(flags).split()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with twelve triplets, these with the next one's box and crop as well, and a base
    model with random weights."""
    folder = tmp_path_factory.mktemp("world")
    draw(folder / "data", 12, 0)
    rows = read_triplets(folder / "data")
    for row in rows:
        row.image, row.crops = load_image(row.image), list(map(load_image, row.crops))
    pairs = [
        replace(row, crops=row.crops + other.crops, boxes=row.boxes + other.boxes)
        for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
    ]
    write_triplets(folder / "pairs", pairs)
    model, processor = tiny(0)
    save(livelier(model, 3.0), processor, folder / "base")
    return folder


@pytest.fixture
def run(world, tmp_path):
    """run(name, *flags) trains in tmp_path/name and returns the final weights."""

    def go(name, *flags):
        settings = train.parse(small_run(world, tmp_path / name, *flags))
        return weights(train.train(settings, *join_ranks("cpu")))

    return go


def weights(checkpoint: Path) -> dict:
    return load_file(checkpoint / "model.safetensors")


def log(out: Path, name: str = "log") -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def distance(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return sum((a[key] - b[key]).double().square().sum().item() for key in a) ** 0.5


def assert_same_update(got: dict, want: dict, base: dict, tolerance: float = 1e-3):
    """The distance between two results, as a share of what training changed."""
    assert distance(want, base) > 0.01
    assert distance(got, want) < tolerance * distance(want, base)


def assert_equal(got: dict, want: dict):
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
