"""Vision-OPD (arXiv 2605.18740): a multimodal LLM learns to use its full image from its own crops.

    python train.py --toy                       the whole method on drawn scenes: minutes on a CPU, nothing to download
    torchrun --nproc-per-node 8 train.py        the paper's run: Qwen3.5-4B on Vision-OPD-6K
    torchrun --nproc-per-node 8 train.py --model DIR --data DIR --out runs/mine

The student sees the full image, the teacher (an EMA of the student) only the crop. Each step: the student answers (1), the
teacher reads those answers (2), the student is pulled token by token toward what the teacher would have said (3).
The paper's other teachers and objectives (Tables 3, 4, 6) are flags; its baselines (Table 2) are `--method`: baselines.py.
Killed at any moment, the same command goes on where the last checkpoint was, with any number of ranks.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault(
    "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
)  # caches and batches change size
if {"--toy", "--device=cpu"} & {*sys.argv} or "--device cpu" in " ".join(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else a GPU's kernels are taken

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm

import baselines
from baselines import DISTIL, OPSD_HINT, REWARD
from launch.flags import Help
from loss import KINDS, topk_divergence
from model import encode, join, load, missing_kernels, response_hidden, to_device
from rollout import Rollout, sample
from sharding import (
    Flat,
    State,
    barrier,
    newest_state,
    peak_memory,
    resume,
    save_checkpoint,
    setup,
    total,
)
from storage.files import read_jsonl, write
from storage.images import image_size, load_image
from triplets.fetch import fetch_triplets
from triplets.format import read_triplets

# A resumed run must agree with the stopped one on all but these: speed, memory, where it stops, where its (same) data lie.
FREE = {
    "out",
    "data",
    "steps",
    "save_every",
    "show_every",
    "micro_prompts",
    "gen_prompts",
    "chunk",
    "offload_teacher",
    "checkpointing",
    "compile",
    "workers",
    "threads",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    argv, world = sys.argv[1:] if argv is None else argv, int(os.environ.get("WORLD_SIZE", 1))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    # what to train, on what
    p.add_argument(
        "--toy",
        action="store_true",
        help="drawn scenes, a tiny Qwen3.5 trained on the spot, before/after table",
    )
    p.add_argument(
        "--model",
        help="hub id or directory (default Qwen/Qwen3.5-4B; with --toy: trained into OUT/base)",
    )
    p.add_argument(
        "--data",
        help="hub id or directory with train.jsonl (default yuanqianhao/Vision-OPD-6K; --toy: drawn)",
    )
    p.add_argument(
        "--out", default="runs/vision-opd", help="checkpoints, log.jsonl, args.json, report.html"
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="order of the data and every sampled token are functions of it",
    )
    # batch (official run script)
    p.add_argument(
        "--steps",
        type=int,
        help="optimizer steps (default: one epoch, the last incomplete batch dropped)",
    )
    p.add_argument("--prompts", type=int, default=96, help="prompts a step, over all ranks")
    p.add_argument("--group", type=int, default=8, help="responses sampled for each prompt")
    p.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        help="longer responses are cut off and trained on all the same",
    )
    p.add_argument(
        "--max-prompt",
        type=int,
        default=8192,
        help="student's prompt tokens; larger images are scaled down to fit",
    )
    p.add_argument(
        "--max-crop-prompt", type=int, default=10240, help="the same for the teacher's prompt"
    )
    # method and objective (paper, section 4.1; the others: Tables 2, 3, 4 and 6)
    p.add_argument(
        "--method",
        choices=[*DISTIL, "sft", *REWARD],
        default="vision-opd",
        help="who writes, what the teacher "
        "sees, a token's loss: see baselines.py; all but vision-opd need answers in the data",
    )
    p.add_argument(
        "--teacher",
        choices=["ema", "initial", "current", "trust-region"],
        help="whose weights (default: ema; "
        "of sft: initial, frozen). current: the student's; trust-region: logits (1 - trust) initial + trust current",
    )
    p.add_argument(
        "--trust",
        type=float,
        default=0.05,
        help="the current student's share in a trust-region teacher",
    )
    p.add_argument(
        "--objective",
        choices=["topk", "sampled-token"],
        default="topk",
        help="sampled-token: policy gradient with the advantage log p_teacher - log p_student",
    )
    p.add_argument("--divergence", choices=KINDS, default="jsd", help="D(teacher || student)")
    p.add_argument(
        "--beta",
        type=float,
        default=0.5,
        help="JSD's weight of the teacher in the mixture, in (0, 1)",
    )
    p.add_argument(
        "--top-k",
        type=int,
        default=100,
        help="student tokens compared one by one; the rest share a tail",
    )
    p.add_argument(
        "--ema-rate",
        type=float,
        default=0.05,
        help="teacher <- (1 - rate) teacher + rate student, after each step",
    )
    p.add_argument(
        "--resample",
        type=int,
        default=9,
        help="dapo: further batches a step at most, until enough groups are mixed",
    )
    # optimizer (official run script)
    p.add_argument("--lr", type=float, default=2e-6, help="AdamW with betas 0.9 / 0.999")
    p.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's, on all weights")
    p.add_argument(
        "--adam-eps", type=float, default=1e-8, help="AdamW's (--toy has its own: see README)"
    )
    p.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
    p.add_argument(
        "--warmup",
        type=int,
        default=10,
        help="linear warm-up steps; the first has lr / warmup, not 0",
    )
    p.add_argument(
        "--schedule",
        choices=["constant", "cosine"],
        default="constant",
        help="cosine falls to 10%% (ours: for --toy)",
    )
    # speed and memory: never change results
    p.add_argument(
        "--micro-prompts",
        type=int,
        default=1,
        help="prompts (with their responses) in one forward and backward",
    )
    p.add_argument(
        "--gen-prompts",
        type=int,
        default=6,
        help="prompts decoded at once, in whole micro-batches (ours: 48 rows "
        "of KV cache fit beside a 4B; 12 is faster where there is room)",
    )
    p.add_argument(
        "--chunk", type=int, default=512, help="response tokens whose logits exist at once"
    )
    p.add_argument(
        "--offload-teacher",
        action=flag,
        default=False,
        help="free the teacher's live weights outside its own phase; they are rebuilt from the sharded EMA",
    )
    p.add_argument(
        "--checkpointing",
        action=flag,
        default=True,
        help="recompute each layer's activations in the backward pass",
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="decode with CUDA graphs in a cache of fixed size, which stays in "
        "memory: as many rows as --gen-prompts makes, each as long as the longest prompt and response",
    )
    # where it runs
    p.add_argument(
        "--workers",
        type=int,
        default=4,
        help="processes a rank that decode images ahead of the step; 0: none",
    )
    p.add_argument(
        "--threads",
        type=int,
        help="CPU threads of torch (--toy: 1, so that the bits do not depend on the machine)",
    )
    p.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda: bf16 live weights; cpu: fp32",
    )
    p.add_argument(
        "--plan",
        nargs="?",
        type=int,
        const=world,
        metavar="RANKS",
        help="only print steps, memory and an estimate of the time on so many GPUs (default: torchrun's ranks)",
    )
    # what is kept
    p.add_argument(
        "--save-every",
        type=int,
        default=10,
        help="steps between checkpoints (ours: little is lost to a crash)",
    )
    p.add_argument(
        "--show-every",
        type=int,
        default=5,
        help="steps between rollouts kept for the report (ours)",
    )
    if "--toy" in argv:
        from toy.demonstration import RUN

        p.set_defaults(**RUN)
    args = p.parse_args(argv)
    args.model = args.model or (f"{args.out}/base" if args.toy else "Qwen/Qwen3.5-4B")
    args.data = args.data or (f"{args.out}/data" if args.toy else "yuanqianhao/Vision-OPD-6K")
    args.out, args.model, args.data = map(os.path.normpath, (args.out, args.model, args.data))
    for name in (
        "steps",
        "prompts",
        "group",
        "max_new_tokens",
        "micro_prompts",
        "gen_prompts",
        "chunk",
        "top_k",
        "threads",
        "save_every",
        "show_every",
    ):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if (
        not 0 < args.beta < 1
        or not 0 <= args.ema_rate <= 1
        or not 0 <= args.trust <= 1
        or args.resample < 0
    ):
        p.error(
            f"--beta must lie in (0, 1), --ema-rate and --trust in [0, 1], and --resample be at least 0; got {args.beta}, "
            f"{args.ema_rate}, {args.trust}, {args.resample}"
        )
    if not (
        min(args.clip, args.adam_eps) > 0
        and all(v >= 0 for v in (args.lr, args.weight_decay, args.warmup, args.workers))
    ):
        p.error(
            "--clip and --adam-eps must be above 0, and --lr, --weight-decay, --warmup and --workers at least 0; got "
            f"{args.clip}, {args.adam_eps}, {args.lr}, {args.weight_decay}, {args.warmup}, {args.workers}"
        )
    rewarded, distils = args.method in REWARD, args.method in DISTIL
    if args.method == "sft" and args.teacher == "trust-region":
        p.error(
            "--method sft samples from one set of weights: --teacher trust-region, a mixture of logits, is none"
        )
    if rewarded and args.group < 2:
        p.error(
            f"--method {args.method} compares the responses to a prompt: --group must be at least 2, got {args.group}"
        )
    given = {token.partition("=")[0] for token in argv}
    unused = dict.fromkeys(
        ("--teacher", "--offload-teacher", "--no-offload-teacher", "--max-crop-prompt"), rewarded
    )
    unused |= {
        "--trust": args.teacher != "trust-region",
        "--objective": not distils,
        "--ema-rate": rewarded or (args.teacher or ("ema" if distils else "initial")) != "ema",
        "--resample": args.method != "dapo",
    }
    unused |= dict.fromkeys(
        ("--divergence", "--beta", "--top-k"), not distils or args.objective != "topk"
    )
    unused["--beta"] |= args.divergence != "jsd"
    if idle := [flag for flag, without in unused.items() if without and flag in given]:
        p.error(
            f"{', '.join(idle)} would change nothing with --method {args.method}, --teacher {args.teacher or 'unset'}, "
            f"--objective {args.objective}, --divergence {args.divergence}. Leave it out, or correct one of them."
        )
    args.teacher = args.teacher or (None if rewarded else "ema" if distils else "initial")
    if args.plan is not None and (args.toy or args.plan < 1):
        p.error(
            "--plan needs data and a model that are there, so not --toy, and a number of ranks from 1; got "
            f"{'--toy' if args.toy else args.plan}"
        )
    if args.toy and args.device == "cuda":
        p.error("--toy is made for the CPU: leave --device cuda out")
    world = args.plan or world
    if args.prompts % world:
        p.error(
            f"--prompts {args.prompts} cannot be shared evenly by {world} ranks. Choose a multiple of {world}."
        )
    if args.compile and args.offload_teacher and args.method == "sft":
        p.error(
            "--compile records where the weights of sft's teacher lie, and --offload-teacher moves them: leave one of them out"
        )
    if args.compile and args.device == "cpu":
        p.error("--compile is about CUDA graphs: leave it out with --device cpu")
    if args.device == "cuda" and args.plan is None and not torch.cuda.is_available():
        p.error(
            "--device cuda, but torch sees no GPU here. Use --device cpu, or install a CUDA build of torch."
        )
    return args


# -------------------------------------------------------------------------------------------------------------- data


def claim(args, out: Path, rows: list[dict]) -> None:
    """Write args.json with commit and versions; refuse a folder whose run had other settings or data."""
    told = [[row.id, row.question, row.bbox, row.image.name, row.crop.name] for row in rows]
    told += [row.answer for row in rows if args.method != "vision-opd"]  # which has no use for them
    now, path = (
        {**vars(args), "rows_sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest()},
        out / "args.json",
    )
    then = (
        json.loads(path.read_text()) if path.exists() and any(out.glob("checkpoint-*")) else now
    )  # else nothing is lost
    free = FREE - ({"steps"} if args.schedule == "cosine" else set())
    differ = [key for key in now if key not in free and then.get(key) != now[key]]
    if told := "; ".join(f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in differ):
        raise ValueError(
            f"{out} holds a run with other settings ({told}). Resume it with the same ones, or choose another --out."
        )
    newest = newest_state(out)
    if newest and (done := int(newest.parts[-3][11:])) > args.steps:
        raise ValueError(
            f"{out} is at step {done} already, past --steps {args.steps}. Raise --steps, or choose another --out."
        )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    write(
        path,
        json.dumps(
            now
            | {
                "commit": commit.stdout.strip() or None,
                "versions": {
                    "python": sys.version.split()[0],
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            },
            indent=1,
        ),
    )


def batch_rows(n: int, prompts: int, seed: int, step: int) -> list[int]:
    """Row numbers of a step, a function of (seed, step): epochs are shuffled, each one's last incomplete batch is dropped."""
    epoch, index = divmod(step, n // prompts)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[index * prompts : (index + 1) * prompts].tolist()


def check(args, rows: list[dict]) -> None:
    """Raises ValueError where the data cannot give what is asked for."""
    if args.method != "vision-opd" and (without := sum(row.answer is None for row in rows)):
        raise ValueError(
            f"--method {args.method} needs answers, and {without} of {len(rows)} rows of {args.data} have none. "
            "Make the data with `synth.py --labels`, or train with --method vision-opd."
        )
    if len(rows) < args.prompts:
        raise ValueError(
            f"{args.data} has {len(rows)} triplets, fewer than one batch. Lower --prompts ({args.prompts})."
        )


def deal(batch: list[int], areas: list[int], rank: int, world: int) -> list[int]:
    """This rank's part of a batch: the rows are dealt out by their images' area, largest first, back and forth, so that each rank
    gets as many and about as much."""
    order = sorted(range(len(batch)), key=lambda i: -areas[i])
    return [
        batch[i]
        for place, i in enumerate(order)
        if place % (2 * world) in (rank, 2 * world - 1 - rank)
    ]


def share(args, areas: list[int], rank: int, world: int, step: int, seed: int) -> list[list[int]]:
    """This rank's micro-batches of a step: row numbers. areas: of all rows' images, in pixels."""
    batch, mine = batch_rows(len(areas), args.prompts, seed, step), args.prompts // world
    if args.method == "dapo":  # fill_up counts in the batch's order
        batch = batch[rank * mine : (rank + 1) * mine]
    else:
        batch = deal(batch, [areas[j] for j in batch], rank, world)
    return [batch[i : i + args.micro_prompts] for i in range(0, mine, args.micro_prompts)]


def views(args) -> list[tuple[str, str, int]]:
    """What student and teacher (if there is one) are shown: (image, what is added to the question, most tokens)."""
    teacher = ("image", OPSD_HINT) if args.method == "opsd" else ("crop", "")
    return [("image", "", args.max_prompt), (*teacher, args.max_crop_prompt)][
        : 1 if args.method in REWARD else 2
    ]


class Micros(torch.utils.data.Dataset):
    """This rank's micro-batches in order: (row numbers, the student's prompts, the teacher's prompts if there is one)."""

    def __init__(
        self, rows: list[dict], micros: list[list[int]], processor, args, dtype: torch.dtype
    ):
        self.rows, self.micros, self.processor, self.dtype = rows, micros, processor, dtype
        self.views = views(args)

    def __len__(self) -> int:
        return len(self.micros)

    def __getitem__(self, i: int):
        rows, prompts = [self.rows[j] for j in self.micros[i]], []
        try:
            for view, hint, limit in self.views:
                images = [load_image(getattr(row, view)) for row in rows]
                texts = [row.question + hint.format(answer=row.answer) for row in rows]
                prompt = encode(self.processor, images, texts, max_tokens=limit)
                prompts.append(prompt | {"pixel_values": prompt["pixel_values"].to(self.dtype)})
        except (ValueError, OSError) as error:  # a worker would add its traceback
            return ValueError(f"samples {[row.id for row in rows]}: {error}")
        return self.micros[i], prompts[0], prompts[1] if prompts[1:] else None


# -------------------------------------------------------------------------------------------------------------- step


@dataclass
class Micro:
    """Some of this rank's prompts, their responses, and what the method makes of them: one forward and backward."""

    numbers: list[int]  # rows of the data, B
    full: dict  # the student's prompts
    seen: dict | None  # the teacher's: of the crop (opsd: of the full image, with the answer)
    rollout: Rollout | None = (
        None  # N = B G responses; later only with the tokens to train on in its mask
    )
    keep: Tensor | None = None  # (N,) bool, which responses are trained on
    right: Tensor | None = None  # (N,) bool, which match the label
    advantages: Tensor | None = None  # (N,)
    target: list | None = (
        None  # [(hidden (n, D), head (V, D), coefficient)], which make the teacher's logits
    )


def respond(
    args,
    step: int,
    micros: list[Micro],
    model,
    processor,
    rows: list[dict],
    extra: int = 0,
    quiet: bool = False,
) -> None:
    """G responses by `model` to each prompt: the full image's, or for sft the crop's. Graded where the method needs labels."""
    longest = args.max_crop_prompt if args.method == "sft" else args.max_prompt
    static = longest + args.max_new_tokens if args.compile else 0
    calls, key = (
        max(1, args.gen_prompts // args.micro_prompts),
        f"{args.seed}/{step}" + f"/{extra}" * (extra > 0),
    )
    with tqdm(
        desc=f"step {step + 1} rollouts",
        total=args.max_new_tokens * math.ceil(len(micros) / calls),
        unit="tok",
        leave=False,
        disable=quiet,
    ) as bar:
        for part in (micros[i : i + calls] for i in range(0, len(micros), calls)):
            seeds = [
                random.Random(f"{key}/{rows[j].id}").getrandbits(63)
                for micro in part
                for j in micro.numbers
            ]
            prompts = [micro.seen if args.method == "sft" else micro.full for micro in part]
            rollout = sample(
                model,
                processor,
                join(prompts, processor.tokenizer.pad_token_id),
                args.group,
                max_new_tokens=args.max_new_tokens,
                seeds=seeds,
                bar=bar,
                static=static,
            )
            for micro, piece in zip(
                part, rollout.split([len(micro.numbers) * args.group for micro in part])
            ):
                micro.rollout, micro.keep = piece, torch.ones_like(piece.ended)
                if args.method not in DISTIL:
                    baselines.grade(args, micro, processor, [rows[j] for j in micro.numbers])


@torch.no_grad()
def teach(args, micros: list[Micro], student, teacher, teacher_flat: Flat, state: State) -> None:
    """Sets each target. The teacher leaves hidden states, not logits; a trust-region one also the student's own (Table 3)."""
    teacher_flat.publish(state.ema)
    head = teacher.lm_head.weight.detach()
    sides = [(teacher, head.clone() if args.offload_teacher else head, 1.0)]
    if args.teacher == "trust-region":
        sides = [
            (*sides[0][:2], 1 - args.trust),
            (student, student.lm_head.weight.detach(), args.trust),
        ]
    for m in micros:
        m.target = [
            (response_hidden(model, m.seen, m.rollout)[m.rollout.mask], head, share)
            for model, head, share in sides
        ]


def token_loss(
    args, hidden: Tensor, head: Tensor, micro: Micro, weights: Tensor
) -> tuple[Tensor, ...]:
    """(sum of weights * loss; loss of each token; for top-K, whether teacher and student agree). hidden (n, D), weights (n,)."""
    if args.method in DISTIL and args.objective == "topk":
        return topk_divergence(
            hidden,
            head,
            micro.target,
            weights,
            k=args.top_k,
            beta=args.beta,
            kind=args.divergence,
            chunk=args.chunk,
            agreement=True,
        )
    per_token = baselines.per_token(args, hidden, head, micro)
    return (weights * per_token).sum(), per_token.detach(), torch.zeros_like(per_token)


def learn(
    args,
    step: int,
    batch: list,
    student,
    teacher,
    processor,
    flat: Flat,
    teacher_flat: Flat,
    state: State,
    rows,
    further,
):
    """One optimizer step (paper, Eq. 3 and 4) on this rank's share of the batch; further(step, i): its share of more (dapo).
    Returns (log entry, rollouts to show)."""
    device, clock = flat.weights.device, [time.perf_counter()]

    # 1. The student answers from the full image (sft: the teacher from the crop).
    def answered(batch: list, extra: int = 0) -> list[Micro]:
        if errors := [item for item in batch if isinstance(item, ValueError)]:
            raise errors[0]
        micros = [
            Micro(numbers, to_device(full, device), seen and to_device(seen, device))
            for numbers, full, seen in batch
        ]
        respond(
            args,
            step,
            micros,
            teacher if args.method == "sft" else student,
            processor,
            rows,
            extra,
            quiet=flat.rank > 0,
        )
        return micros

    if args.method == "sft":
        teacher_flat.publish(state.ema)
    micros = answered(batch)
    if args.method == "dapo":
        micros = baselines.fill_up(args, micros, flat, lambda i: answered(further(step, i), i))
    counts = [
        [
            len(m.keep),
            m.rollout.mask.sum(),
            m.rollout.ended.sum(),
            0 if m.right is None else m.right.sum(),
            m.keep.sum(),
            m.full["shrunk"].sum() + (m.seen["shrunk"].sum() if m.seen else 0),
        ]
        for m in micros
    ]
    micros = [micro for micro in micros if micro.keep.any()]
    for micro in micros:
        micro.rollout.mask &= micro.keep[:, None]
    (most,) = total([len(micros)], device, dist.ReduceOp.MAX)
    n, sampled, ended, right, kept, shrunk, tokens = total(
        [
            *(float(sum(column)) for column in zip(*counts)),
            sum(float(m.rollout.mask.sum()) for m in micros),
        ],
        device,
    )
    clock.append(time.perf_counter())

    # 2. The teacher, shown only the crop (opsd: the answer), reads the same answers.
    if args.method in DISTIL:
        teach(args, micros, student, teacher, teacher_flat, state)
    if args.offload_teacher:
        teacher_flat.allocate(False)
    clock.append(time.perf_counter())

    # 3. The student is pulled toward what the teacher would have said. A token weighs 1 / all tokens of all ranks.
    shown, sums = [], torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(int(most)):
        if i < len(micros):
            micro, mask = micros[i], micros[i].rollout.mask
            weights = torch.full_like(mask, 1 / tokens, dtype=torch.float32)
            if args.method == "grpo":  # the mean of a response, then of all of them
                weights = (1 / (mask.sum(1, keepdim=True) * n)).expand_as(mask).float()
            hidden = response_hidden(
                student, micro.full, micro.rollout, checkpoint=args.checkpointing
            )[mask]  # (n, D)
            loss, per_token, agree = token_loss(
                args, hidden, student.lm_head.weight, micro, weights[mask]
            )
            flat.settle()  # the forward ran beside the last reductions
            loss.backward()
            sums += torch.stack([loss.detach().double(), agree.double().sum() / tokens])
            if not shown and (step % args.show_every == 0 or step + 1 == args.steps):
                shown = show(
                    args,
                    step,
                    micro.rollout,
                    per_token,
                    [rows[j] for j in micro.numbers],
                    processor,
                )
        flat.reduce()  # all ranks, equally often
    flat.settle()
    squares = sum(
        part.double().square().sum() for part in state.master.grad.view(-1).split(2**24)
    ).item()
    value, agreement, squares = total([*sums.tolist(), squares], device)
    if not math.isfinite(value) or not math.isfinite(squares):
        raise FloatingPointError(
            f"Step {step + 1}: loss {value}, squared gradient norm {squares}. Nothing was updated. This rank's samples: "
            f"{[rows[j].id for micro in micros for j in micro.numbers]}. Look at them, then resume from the last checkpoint."
        )
    lr, norm = args.lr * learning_rate(step, args), math.sqrt(squares)
    rate = {"ema": args.ema_rate, "current": 1.0}.get(
        args.teacher, 0.0
    )  # 0: a frozen teacher (paper, Table 3)
    state.update(lr, args.clip, rate, norm)
    flat.publish(state.master.data)
    clock.append(time.perf_counter())
    (memory,) = total([peak_memory(device)], device, dist.ReduceOp.MAX)
    gen_s, teach_s, learn_s = (after - before for before, after in zip(clock, clock[1:]))
    entry = {
        "step": step + 1,
        "steps": args.steps,
        "loss": value,
        "grad_norm": norm,
        "lr": lr,
        "length": sampled / n,
        "eos": ended / n,
        "truncated": 1 - ended / n,
        "tokens": int(tokens),
        "shrunk": int(shrunk),
        "gen_s": gen_s,
        "teach_s": teach_s,
        "learn_s": learn_s,
        "mem_gb": memory,
    }
    entry |= {"agreement": agreement} if args.method in DISTIL and args.objective == "topk" else {}
    entry |= {"right": right / n, "kept": kept / n} if args.method not in DISTIL else {}
    return entry, shown


def learning_rate(step: int, args) -> float:
    """Share of --lr at a step (0, 1, …): linear warm-up from 1 / warmup, then constant, or a cosine down to 10%."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    if args.schedule == "constant":
        return 1.0
    return 0.55 + 0.45 * math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup))


def show(
    args, step: int, piece: Rollout, per_token: Tensor, rows: list[dict], processor
) -> list[dict]:
    """The first response to each of up to 4 prompts for the report; where that is the loss, each token with the divergence."""
    scored = args.method in DISTIL and args.objective == "topk"
    shown, per_row = [], per_token.split(piece.mask.sum(1).tolist())
    for i, row in enumerate(rows[:4]):
        if not piece.mask[i * args.group].any():  # not trained on
            continue
        ids = piece.ids[i * args.group][piece.mask[i * args.group]].tolist()
        paths = {view: os.path.relpath(getattr(row, view), args.out) for view in ("image", "crop")}
        shown.append(
            {
                "step": step + 1,
                "id": row.id,
                "question": row.question,
                "answer": row.answer,
                **paths,
                "tokens": [processor.tokenizer.decode([token]) for token in ids],
                "divergence": [round(d, 5) for d in per_row[i * args.group].tolist()]
                if scored
                else [],
            }
        )
    return shown


def line(e: dict) -> str:
    """A step's log entry as people read it."""
    spent = {name: e[f"{name}_s"] for name in ("gen", "teach", "learn", "other")}
    told = [
        f"step {e['step']:4d}/{e['steps']}",
        f"loss {e['loss']:.4f}",
        f"grad {e['grad_norm']:.2f}",
        f"len {e['length']:.0f}",
        f"eos {e['eos']:.2f}",
    ]
    told += [
        f"{name} {e[key]:.2f}"
        for name, key in (("agree", "agreement"), ("right", "right"), ("kept", "kept"))
        if key in e
    ]
    told += [
        " ".join(
            f"{name} {seconds:.1f}s {seconds / sum(spent.values()):.0%}"
            for name, seconds in spent.items()
        ),
        f"mem {e['mem_gb']:.1f}G",
    ]
    return " | ".join(told + [f"shrunk {e['shrunk']}"] * (e["shrunk"] > 0))


def train(args, rank: int, world: int, device: torch.device) -> Path:
    """The run: load, resume, step, log, save. Returns the final checkpoint's folder."""
    out = Path(args.out)
    if rank == 0:  # downloads and unpacks, onto a shared disk
        fetch_triplets(args.data)
    barrier()
    rows = read_triplets(fetch_triplets(args.data))
    args = argparse.Namespace(**vars(args) | {"steps": args.steps or len(rows) // args.prompts})
    check(args, rows)
    areas = [
        math.prod(image_size(row.image)) for row in rows
    ]  # by the headers, so that all ranks deal alike
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        claim(args, out, rows)
    student, processor = load(
        args.model, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    teacher = copy.deepcopy(student).requires_grad_(False)
    flat, teacher_flat = Flat(student, rank, world), Flat(teacher, rank, world)
    teacher_flat.allocate(args.teacher is not None and not args.offload_teacher)
    state = State(flat, args)
    flat.track_gradients(state.master.grad)
    begin = resume(out, flat, state)
    if [begin] != total([begin], device, dist.ReduceOp.MIN):
        raise ValueError(
            f"rank {rank} finds step {begin} in {out}, another an earlier one. --out must lie on a disk that all "
            "machines share."
        )
    flat.publish(state.master.data)
    log, shown_log = out / "log.jsonl", out / "rollouts.jsonl"
    if rank == 0:
        for path in (log, shown_log):  # what came after the checkpoint is redone
            kept = [entry for entry in read_jsonl(path, []) if entry["step"] <= begin]
            write(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        if slow := missing_kernels(student):
            print(
                f"Linear attention runs on slow kernels: pip install {' '.join(slow)}", flush=True
            )
        print(
            f"{len(rows):,} triplets, {flat.numel / 1e6:,.1f}M weights, {world} rank(s), "
            f"{f'steps {begin + 1} to {args.steps}' if begin < args.steps else 'nothing left to do'}",
            flush=True,
        )
    board = tensorboard(out, begin) if rank == 0 else None

    def further(step: int, i: int) -> list:
        """This rank's share of the i-th further batch of a step: rows in an order of their own."""
        micros = share(args, areas, rank, world, step * args.resample + i - 1, args.seed + 2**20)
        data = Micros(rows, micros, processor, args, flat.weights.dtype)
        return [data[k] for k in range(len(data))]

    shares = [share(args, areas, rank, world, step, args.seed) for step in range(begin, args.steps)]
    loader = iter(
        torch.utils.data.DataLoader(
            Micros(rows, sum(shares, []), processor, args, flat.weights.dtype),
            batch_size=None,
            num_workers=args.workers,
            prefetch_factor=max(
                2, math.ceil(args.prompts / (world * args.micro_prompts * args.workers))
            )
            if args.workers
            else None,
            pin_memory=device.type == "cuda",
        )
    )
    before = time.perf_counter()
    for step, micros in enumerate(shares, begin):
        batch = [next(loader) for _ in micros]
        entry, shown = learn(
            args, step, batch, student, teacher, processor, flat, teacher_flat, state, rows, further
        )
        elapsed, before = time.perf_counter() - before, time.perf_counter()
        entry["other_s"] = elapsed - entry["gen_s"] - entry["teach_s"] - entry["learn_s"]
        if rank == 0:
            with open(log, "a") as file, open(shown_log, "a") as shown_file:
                file.write(json.dumps(entry) + "\n")
                shown_file.writelines(json.dumps(row) + "\n" for row in shown)
            tqdm.write(line(entry), file=sys.stdout)
            for key, value in entry.items() if board else ():
                board.add_scalar(key, value, step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(out, step + 1, student, processor, flat, state)
    return out / f"checkpoint-{args.steps:06d}"


def tensorboard(out: Path, begin: int):
    """A writer of curves, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard", purge_step=begin + 1)


def prepare_toy(args, device: torch.device) -> None:
    """Draw the scenes, train the base model and evaluate it, each only if it is not there yet."""
    from toy.demonstration import prepare

    took = prepare(args, device)
    if not (Path(args.out) / "seconds.json").exists():
        judge(Path(args.out), args.model, "before", device)
        write(Path(args.out) / "seconds.json", took)


def judge(out: Path, model: str | Path, when: str, device: torch.device) -> None:
    """Evaluate a model on scenes never trained on, into OUT/eval-WHEN."""
    import evaluate
    from benchmarks.figures import summarise
    from toy.demonstration import RUN
    from toy.scenes import held_out

    folder = out / f"eval-{when}"
    if when == "after":  # maybe of an earlier checkpoint
        shutil.rmtree(folder, ignore_errors=True)
    evaluate.evaluate(
        str(model),
        held_out(out),
        folder,
        views=["full", "crop"],
        max_new_tokens=RUN["max_new_tokens"],
        batch=100,
        device=str(device),
    )
    summarise(folder)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        if args.plan is not None:
            if os.environ.get("RANK", "0") == "0":
                from plan import plan

                rows = read_triplets(fetch_triplets(args.data))
                check(args, rows)
                print(plan(args, rows, views(args)))
            return
        rank, world, device = setup(args.device)
        if args.toy and rank == 0:
            prepare_toy(args, device)
        barrier()
        final = train(args, rank, world, device)
        if rank == 0:
            from benchmarks.figures import compare
            from benchmarks.page import report

            if args.toy:
                judge(Path(args.out), final, "after", device)
                print(
                    compare(*(Path(args.out) / f"eval-{when}" for when in ("before", "after")))[0]
                )
            print(f"model: {final}   page: {report(Path(args.out))}")
        barrier()
    except (ValueError, OSError, FloatingPointError) as error:
        where = traceback.extract_tb(error.__traceback__)[
            -1
        ]  # said at once: the other ranks still wait
        print(
            f"train.py: {error} ({Path(where.filename).name}, line {where.lineno})",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        raise SystemExit(
            "train.py: stopped. The same command goes on where the last checkpoint was."
        ) from None
    if dist.is_initialized():  # not after an error: it could block
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
