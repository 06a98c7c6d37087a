"""The toy world: drawn scenes with questions, a tiny Qwen3.5, and its base training, so that the whole method runs in minutes
on a CPU with nothing to download; and the table of all methods on it.

    python train.py --toy                           # the demonstration: RUN, prepare_run and judge below
    python toy.py --out data/toy --n 100            # draw triplets: no model, no labels needed
    python toy.py --ablate --out runs/ablate        # every teacher, objective and baseline of train.py, several seeds, one table

A scene is 64 x 64 px, a 4 x 4 grid with 4 to 12 objects over faint lines; "what is in the red box ?" is answered by, say,
"a green cross with 7 .". What the box holds, and what else is asked:

    small     one object in one cell                          hard in the full view, easy in the crop
    pair      two neighbours, so an answer twice as long      the same
    large     one object, twice as large                      easy in both
    colour    one small object, only its colour is asked      holdout: easy, and never in the distillation data
    corner    no box: what is at the top left (..), large     holdout
"""
import argparse
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                # else a GPU's kernels are taken where they are installed

import numpy as np
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import Qwen2VLImageProcessorPil, Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3_5Tokenizer

import benchmarks
import evaluate
import figures
import triplets
from model import VISION_TOKENS, ImageTextProcessor, encode, prepare, response_hidden, save, to_device

SPLITS = ("train", "base", "eval")                         # their streams of scenes never meet, whatever the seeds
KINDS = {"small": (1, 1), "pair": (1, 2), "large": (2, 2), "colour": (1, 1), "corner": (2, 2)}     # rows, columns of the target
MIX = ("small", "pair", "large")                           # cycled through: without large ones their skill would be forgotten
ROWS = 6000                                                # triplets of the distillation
EVAL = ("small", "pair", "large", "small", "pair", "large", "colour", "corner")
COLOURS = {"green": (60, 190, 70), "blue": (70, 120, 255), "yellow": (240, 220, 60), "purple": (165, 95, 250),
           "cyan": (60, 210, 220), "white": (240, 240, 240)}                   # red is the box's alone
SHAPES = ("square", "circle", "triangle", "cross", "diamond")
DIGITS = "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717".split()     # five rows of three bits, in octal
CELL, GRID = 16, 4                                         # px a cell, cells a side
WORDS = f"""user assistant what is in the red box ? a {' '.join(COLOURS)} {' '.join(SHAPES)} with . , one colour at top bottom
    left right""".split()                                  # one token each; other text is bytes
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS, "<think>", "</think>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in "
    "m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}")


# -------------------------------------------------------------------------------------------------------------- scenes

@cache
def sprites() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (6 colours, 10 digits, 16, 16, 3) uint8 and silhouettes (5 shapes, 16, 16, 1) bool of the 300 objects.

    Up to 13 px wide; the outer ring of the cell stays free, for the red box. The digit lies on a white plate, and inside
    one quarter of its cell: in a crop that is one image token. Centred it is cut into four, and without the plate it has
    six contrasts; in 400 steps the tiny model then learned to read it only sometimes, or not at all (measured).
    """
    y, x = np.mgrid[:CELL, :CELL] - CELL // 2
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    masks = np.stack([far <= 5, x * x + y * y <= 39, (far <= 6) & (2 * abs(x) <= y + 7) & (y <= 5),
                      (near <= 2) & (far <= 6), far + near <= 6])                           # in the order of SHAPES
    plate, ink = np.zeros((CELL, CELL, 1), bool), np.zeros((10, CELL, CELL, 1), bool)
    plate[7:14, 7:12] = True
    ink[:, 8:13, 8:11, 0] = [[[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in digit] for digit in DIGITS]
    colours = np.array(list(COLOURS.values()), np.uint8)[:, None, None, None]               # (6, 1, 1, 1, 3)
    return np.where(ink, np.uint8(12), np.where(plate, np.uint8(250), colours)), masks[..., None] | plate


def enlarge(pixels: np.ndarray, times: int) -> np.ndarray:
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def scene(seed: int, index: int, kind: str, split: str = "train") -> dict:
    """Scene `index` of a stream as a sample for triplets.write_triplets; the same whenever and in whatever order it is drawn.

    image: (64, 64) px with a 1-px red box on the outer ring of the target's cells (none for `corner`). crop: these cells
    without the box, 32 px high always (small cells: pixels doubled), so 4 image tokens of 16 x 16 px, or 8 for a pair.
    """
    rng = np.random.default_rng((SPLITS.index(split), seed, index, list(KINDS).index(kind)))
    ground, side = rng.integers(28, 52, 3), CELL * GRID
    picture = np.full((side, side, 3), ground, np.uint8)
    ends = rng.integers(0, side, (2, rng.integers(3, 8), 2))                    # (ends, lines, yx)
    y, x = np.linspace(*ends, 2 * side).round().astype(int).T                   # (lines, points) each
    picture[y, x] = ground + rng.integers(12, 25)

    high, wide = KINDS[kind]
    cells = [divmod(cell, GRID) for cell in rng.permutation(GRID ** 2).tolist()]                # (row, column)
    row, column = next((r, c) for r, c in cells if r <= GRID - high and c <= GRID - wide and (kind != "corner" or {r, c} <= {0, 2}))
    targets = [(row, column), (row, column + 1)] if kind == "pair" else [(row, column)]
    free = [(r, c) for r, c in cells if not (0 <= r - row < high and 0 <= c - column < wide)]
    objects = rng.integers(0, (6, 5, 10), (rng.integers(4, 13), 3)).tolist()    # the targets first, then the others
    pixels, masks = sprites()
    for (r, c), (colour, shape, digit), s in zip([*targets, *free], objects, [high] * len(targets) + [1] * 12):
        place = picture[r * CELL:(r + s) * CELL, c * CELL:(c + s) * CELL]
        np.copyto(place, enlarge(pixels[colour, digit], s), where=enlarge(masks[shape], s))

    top, left, bottom, right = row * CELL, column * CELL, (row + high) * CELL, (column + wide) * CELL
    target = picture[top:bottom, left:right]
    crop = enlarge(target.copy(), 2 // high)
    named = [f"a {list(COLOURS)[colour]} {SHAPES[shape]} with {digit}" for colour, shape, digit in objects[:len(targets)]]
    question, answer = "what is in the red box ?", f"{' , '.join(named)} ."
    if kind == "colour":
        question, answer = "what colour is in the red box ?", f"a {list(COLOURS)[objects[0][0]]} one ."
    if kind == "corner":
        question = f"what is at the {'bottom' if row else 'top'} {'right' if column else 'left'} ?"
    else:
        target[[0, -1]] = target[:, [0, -1]] = triplets.RED
    return {"id": f"{split}-{seed}-{index:06d}-{kind}", "question": question, "answer": answer, "bbox": [left, top, right, bottom],
            "image": Image.fromarray(picture), "crop": Image.fromarray(crop), "extra": {"toy": kind}}


def scenes(n: int, seed: int, split: str = "train") -> Iterator[dict]:
    """Scenes 0 to n - 1 of a stream, each drawn when asked for; their kinds take turns."""
    kinds = EVAL if split == "eval" else MIX
    for index in range(n):
        yield scene(seed, index, kinds[index % len(kinds)], split)


def draw(folder: str | Path, n: int, seed: int, split: str = "train") -> Path:
    """A data set of n toy triplets in `folder`; the same one drawn before is kept as it is.

    Its settings lie in toy.json, with a digest of the first scene that notices changed drawing code. Raises
    FileExistsError, with the difference, when the folder holds any other data set.
    """
    folder = Path(folder)
    digest = hashlib.sha256(scene(seed, 0, "small", split)["image"].tobytes()).hexdigest()[:16]
    wanted = {"n": n, "seed": seed, "split": split, "first_scene": digest}
    note = folder / "toy.json"
    if (folder / "train.jsonl").is_file():
        found = json.loads(note.read_text()) if note.is_file() else {}
        if differs := {key: (found.get(key), wanted[key]) for key in wanted if found.get(key) != wanted[key]}:
            raise FileExistsError(f"{folder} holds another data set; (found, wanted) is {differs}. Choose another folder, "
                                  "or delete this one to have it drawn anew.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(wanted))
        triplets.write_triplets(folder, scenes(n, seed, split))
    return folder


# ------------------------------------------------------------------------------------------------------ the tiny model

def tiny(seed: int = 0):
    """A real Qwen3.5 with 0.4M random weights: (model, processor), float32, on the CPU. One image token is 16 x 16 px.

    Same classes and code path as the released checkpoints, tokenizer included: byte-level BPE in which each toy word is
    one token (every prefix of it is too, so that left-to-right merges build it).
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(word[:i], word[i]) for start in ("\u0120", "") for word in (start + w for w in WORDS) for i in range(1, len(word))]
    merges = list(dict.fromkeys(merges))                                              # "\u0120" is how bytes spell a space
    words = letters + [left + right for left, right in merges] + SPECIAL
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Qwen3_5Tokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None,
        extra_special_tokens=SPECIAL, chat_template=CHAT)
    vision = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 65536},
        image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = ImageTextProcessor(vision, tokenizer, chat_template=CHAT)
    processor.source = None
    config = Qwen3_5Config(
        text_config=dict(
            vocab_size=len(words), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"], num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=24, linear_value_head_dim=24,
            tie_word_embeddings=True, initializer_range=0.05, pad_token_id=vocabulary["<|endoftext|>"],
            eos_token_id=vocabulary["<|im_end|>"],
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[4, 2, 2],
                                 mrope_interleaved=True)),
        vision_config=dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=8, spatial_merge_size=2,
                           temporal_patch_size=2, out_hidden_size=96, num_position_embeddings=64, initializer_range=0.05),
        tie_word_embeddings=True, **{f"{name}_token_id": vocabulary[f"<|{token}|>"] for name, token in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(config)
    return prepare(model, processor), processor


# The base model's recipe: what it is shown, and how often (relative). It reads crops well and full images badly, because it
# is shown few small targets in the full view, and hardly any once it reads `enough` of them.
BASE = dict(steps=500, lr=3e-3, crops=44, fulls=36, scenes=12_000, enough=0.5,
            crop={"small": 3, "large": 3, "pair": 4}, full={"small": 6, "pair": 5, "large": 2, "colour": 1, "corner": 2},
            late={"small": 0.1, "pair": 0.1, "large": 4, "colour": 1, "corner": 2})


def train_base(folder: Path, seed: int, device: torch.device | str = "cpu") -> None:
    """The toy's base model, supervised on drawn scenes (labels known): cross-entropy on the answers."""
    start, (model, processor) = time.perf_counter(), tiny(seed)
    model.to(device)
    steps, rng, tokenizer = BASE["steps"], random.Random(seed), processor.tokenizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    read = 0.0                                                                        # running share of small targets, full view
    for _ in tqdm(range(steps), desc="base model", unit="step"):
        fulls = "late" if read > BASE["enough"] else "full"
        for view, count, mix in (("crop", BASE["crops"], "crop"), ("image", BASE["fulls"], fulls)):
            kinds = rng.choices([*BASE[mix]], [*BASE[mix].values()], k=count)
            shown = [scene(seed, rng.randrange(BASE["scenes"]), kind, "base") for kind in kinds]
            prompt = to_device(encode(processor, [s[view] for s in shown], [s["question"] for s in shown]), device)
            answers = tokenizer([s["answer"] + tokenizer.eos_token for s in shown], return_tensors="pt", padding=True,
                                padding_side="right").to(device)
            ids, mask = answers["input_ids"], answers["attention_mask"].bool()                      # (count, T)
            logits = model.lm_head(response_hidden(model, prompt, ids, checkpoint=False))            # (count, T, V)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none") * mask
            (loss.sum(1) / mask.sum(1)).sum().div(BASE["crops"] + BASE["fulls"]).backward()
            right = ((logits.argmax(-1) == ids) | ~mask).all(1).float()
            if small := [i for i, kind in enumerate(kinds) if view == "image" and kind == "small"]:
                read = 0.8 * read + 0.2 * right[small].mean().item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    partial = folder.with_name("base.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, processor, partial)
    triplets.write(folder.with_name("base-seconds.json"), json.dumps({"base": time.perf_counter() - start}))
    partial.rename(folder)


# ------------------------------------------------------------------------------------------------- train.py --toy

# What it changes (ours: a tiny model trained from scratch in minutes).
RUN = dict(prompts=16, group=2, steps=600, max_new_tokens=18, lr=5e-4, weight_decay=0.0, schedule="cosine", top_k=16,
           ema_rate=0.001, adam_eps=5e-5, micro_prompts=16, gen_prompts=16, workers=1, threads=1, save_every=50, show_every=25,
           out="runs/toy")


def prepare_run(args, device: torch.device) -> None:
    """Draw the scenes, train the base model and evaluate it, each only if it is not there yet."""
    out, took = Path(args.out), Path(args.model).with_name("base-seconds.json")
    if args.data == f"{args.out}/data":
        triplets.preview(draw(out / "data", ROWS, args.seed))
    if not Path(args.model).exists() and args.model == f"{args.out}/base":
        train_base(Path(args.model), args.seed, device)
    if not (out / "seconds.json").exists():
        judge(out, args.model, "before", device)
        triplets.write(out / "seconds.json", took.read_text() if took.is_file() else "{}")


def judge(out: Path, model: str | Path, when: str, device: torch.device) -> None:
    """Evaluate a model on scenes never trained on, into OUT/eval-WHEN."""
    benches = {name: benchmarks.benchmark(name, out) for name in benchmarks.GROUPS["toy"]}
    folder = out / f"eval-{when}"
    if when == "after":                                                               # maybe of an earlier checkpoint
        shutil.rmtree(folder, ignore_errors=True)
    evaluate.evaluate(str(model), benches, folder, views=["full", "crop"], max_new_tokens=RUN["max_new_tokens"], batch=100,
                      device=str(device))
    figures.summarise(folder)


# ------------------------------------------------------------------------------------------------- the table of methods

EIGHT = ["--prompts", "4", "--group", "8"]                 # as many responses a step, in groups as large as the paper's
VARIANTS = {                                               # flags of train.py
    "vision-opd": [], "teacher-initial": ["--teacher", "initial"], "teacher-current": ["--teacher", "current"],
    "teacher-trust-region": ["--teacher", "trust-region"], "forward-kl": ["--divergence", "forward_kl"],
    "reverse-kl": ["--divergence", "reverse_kl"], "8-tokens": ["--max-new-tokens", "8"],
    "sampled-token": ["--objective", "sampled-token"], "opsd": ["--method", "opsd"], "sft": ["--method", "sft"],
    "grpo": ["--method", "grpo", *EIGHT], "dapo": ["--method", "dapo", "--resample", "2", *EIGHT]}


def ablate(out: Path, seeds: list[int], variants: list[str], jobs: int, steps: int) -> None:
    """Train every variant with every seed (of the batches and of all that is sampled) into out/VARIANT-SEED, `jobs` at a time, from
    one base model on one data set. Those that have ended are not run again."""
    draw(out / "data", ROWS, 0)
    if not (out / "base").exists():
        train_base(out / "base", 0)

    def run(pair: tuple[str, int]) -> None:
        variant, seed = pair
        folder, first = out / f"{variant}-{seed}", out / f"vision-opd-{seed}"
        if (folder / "eval-after" / "result.json").exists() and json.loads((folder / "args.json").read_text())["steps"] == steps:
            return
        if folder != first and not (folder / "seconds.json").exists():                # the same base: once a seed is enough
            shutil.copytree(first / "eval-before", folder / "eval-before", dirs_exist_ok=True)
            shutil.copy(first / "seconds.json", folder)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, Path(__file__).with_name("train.py"), "--toy", "--seed", seed, "--steps", steps, "--out", folder,
                   "--model", out / "base", "--data", out / "data", *VARIANTS[variant]]
        with (folder / "output.txt").open("a") as output:
            if subprocess.run([*map(str, command)], stdout=output, stderr=output).returncode:
                raise OSError(f"{variant} with seed {seed} failed: see {folder}/output.txt. Mend what it names, then run "
                              "the same command: it goes on from here.")
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(variants) * len(seeds), unit="run") as bar:
        for stage in (["vision-opd"], [variant for variant in variants if variant != "vision-opd"]):
            for _ in pool.map(run, [(variant, seed) for variant in stage for seed in seeds]):
                bar.update()


def table(out: Path, seeds: list[int], variants: list[str]) -> str:
    """Mean and standard deviation over the seeds, in %, of the exact answers to held-out scenes; response length at the end of
    training, and minutes of training."""
    def cells(folders: list[Path], when: str) -> list[str]:
        found = [json.loads((folder / f"eval-{when}" / "result.json").read_text())["benches"] for folder in folders]
        values = [[100 * bench[name][view]["accuracy"] for bench in found] for name, view in (
            ("toy", "full"), ("toy", "crop"), ("toy-large", "full"), ("toy-holdout", "full"))]
        if when == "after":
            logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in folders]
            values.append([np.mean([row["length"] for row in log[-20:]]) for log in logs])
            values.append([sum(row[f"{key}_s"] for row in log for key in ("gen", "teach", "learn", "other")) / 60 for log in logs])
        return [f"{np.mean(each):.1f}" + (f" ± {np.std(each, ddof=1):.1f}" if len(each) > 1 else "") for each in values]
    rows = [["base", *cells([out / f"vision-opd-{seed}" for seed in seeds], "before"), "", ""]]
    rows += [[variant, *cells([out / f"{variant}-{seed}" for seed in seeds], "after")] for variant in variants]
    head = ["variant", "full", "crop", "large", "holdout", "length", "minutes"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=triplets.Help)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; an interrupted table goes on")
    p.add_argument("--n", type=int, default=100, help="triplets to draw")
    p.add_argument("--seed", type=int, default=0, help="of the scenes drawn")
    p.add_argument("--split", choices=SPLITS, default="train", help="three streams of scenes that never meet")
    p.add_argument("--ablate", action="store_true", help="instead: train and compare the variants of train.py's method")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="rows of the table (default: all)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="runs a variant (default: 0 1 2)")
    p.add_argument("--steps", type=int, default=400, help="steps a run")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, a CPU core each")
    args = p.parse_args()
    if min(args.n, args.steps, args.jobs, args.seed + 1) < 1:
        p.error(f"--n, --steps and --jobs must be at least 1 and --seed 0, got {args.n}, {args.steps}, {args.jobs} and {args.seed}")
    idle = {"--n", "--seed", "--split"} if args.ablate else {"--variants", "--seeds", "--steps", "--jobs"}
    if found := sorted(idle & {token.partition("=")[0] for token in sys.argv[1:]}):
        p.error(f"{', '.join(found)} would change nothing {'with' if args.ablate else 'without'} --ablate. Leave it out.")
    if not args.ablate:
        print(f"drawn: {triplets.preview(draw(args.out, args.n, args.seed, args.split))}")
        return
    torch.set_num_threads(1)                                                          # as train.py --toy: the bits depend on it
    variants, seeds = list(dict.fromkeys(["vision-opd", *args.variants])), list(dict.fromkeys(args.seeds))
    ablate(args.out, seeds, variants, args.jobs, args.steps)
    text = table(args.out, seeds, variants)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"toy.py: {error}") from error
