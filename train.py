"""Vision-OPD (arXiv 2605.18740): a multimodal LLM learns to use its full image from its own crops.

    python train.py --toy                       the whole method on drawn scenes: minutes on a CPU, nothing to download
    torchrun --nproc-per-node 8 train.py        the paper's run: Qwen3.5-4B on Vision-OPD-6K
    torchrun --nproc-per-node 8 train.py --model DIR --data DIR --out runs/mine

The student sees the full image, the teacher (an EMA of the student) only the crop. Each step: the student answers (1), the
teacher reads those answers (2), the student is pulled token by token toward what the teacher would have said (3).
The paper's other teachers and objectives (Tables 3, 4, 6) are flags; its baselines (Table 2) are `--method`, which changes who
writes the responses, what the teacher sees, and the loss of a token:

    method                writes, from          teacher sees               loss of a token
    vision-opd            student, full image   the crop                   divergence to the teacher, or --objective
    opsd                  student, full image   full image and the answer  the same
    sft                   teacher, crop         -                          cross-entropy, on responses that match the label
    grpo, dapo            student, full image   -                          clipped policy gradient, reward 1 for the label
Killed at any moment, the same command goes on where the last checkpoint was, with any number of ranks.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")        # caches and batches change size all the time
if "--toy" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                                           # fp32 and tiny: made for the CPU

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import evaluate
import plan
import synth
import toy
from loss import (clipped_policy_gradient, group_advantages, overlong_penalty, sampled_token, token_log_probs,
                  topk_divergence)
from model import encode, join, load, missing_kernels, response_hidden, save, to_device
from rollout import Rollout, sample

# What --toy changes (ours: a tiny model trained from scratch in minutes).
TOY = dict(prompts=16, group=2, steps=600, max_new_tokens=18, lr=5e-4, weight_decay=0.0, schedule="cosine", top_k=16,
           ema_rate=0.001, adam_eps=5e-5, micro_prompts=16, gen_prompts=16, workers=1, threads=1, save_every=50, show_every=25, out="runs/toy")
DISTIL, REWARD = ("vision-opd", "opsd"), ("grpo", "dapo")                              # families of --method; the other is sft
OPSD_HINT = ("\n\nHere is a reference solution to this problem:\n{answer}\n\nAfter understanding the reference solution, please try "
             "to solve this problem using your own approach below:")
# A resumed run must agree with the stopped one on everything but these, which change speed, memory or where it stops.
FREE = {"out", "data", "steps", "save_every", "show_every", "micro_prompts", "gen_prompts", "chunk", "offload_teacher",
        "checkpointing", "compile", "workers", "threads"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flag = argparse.BooleanOptionalAction
    # what to train, on what
    p.add_argument("--toy", action="store_true", help="drawn scenes, a tiny Qwen3.5 trained on the spot, before/after table")
    p.add_argument("--model", help="hub id or directory (default Qwen/Qwen3.5-4B; with --toy: trained into OUT/base)")
    p.add_argument("--data", help="hub id or directory with train.jsonl (default yuanqianhao/Vision-OPD-6K; --toy: drawn)")
    p.add_argument("--out", default="runs/vision-opd", help="checkpoints, log.jsonl, args.json, report.html")
    p.add_argument("--seed", type=int, default=0, help="order of the data and every sampled token are functions of it")
    # batch (official run script)
    p.add_argument("--steps", type=int, help="optimizer steps (default: one epoch, the last incomplete batch dropped)")
    p.add_argument("--prompts", type=int, default=96, help="prompts a step, over all ranks")
    p.add_argument("--group", type=int, default=8, help="responses sampled for each prompt")
    p.add_argument("--max-new-tokens", type=int, default=1024, help="longer responses are cut off and trained on all the same")
    p.add_argument("--max-prompt", type=int, default=8192, help="student's prompt tokens; larger images are scaled down to fit")
    p.add_argument("--max-crop-prompt", type=int, default=10240, help="the same for the teacher's prompt")
    # method and objective (paper, section 4.1; the others: Tables 2, 3, 4 and 6)
    p.add_argument("--method", choices=[*DISTIL, "sft", *REWARD], default="vision-opd", help="see above; all but "
                   "vision-opd need answers in the data")
    p.add_argument("--teacher", choices=["ema", "initial", "current", "trust-region"], help="whose weights (default: ema; of sft: initial, a frozen copy). current: "
                   "the student's; trust-region: logits (1 - trust) initial + trust current")
    p.add_argument("--trust", type=float, default=0.05, help="the current student's share in a trust-region teacher")
    p.add_argument("--objective", choices=["topk", "sampled-token"], default="topk", help="sampled-token: policy gradient with the "
                   "advantage log p_teacher - log p_student")
    p.add_argument("--divergence", choices=["jsd", "forward_kl", "reverse_kl"], default="jsd", help="D(teacher || student)")
    p.add_argument("--beta", type=float, default=0.5, help="JSD's weight of the teacher in the mixture, in (0, 1)")
    p.add_argument("--top-k", type=int, default=100, help="student tokens compared one by one; the rest share a tail")
    p.add_argument("--ema-rate", type=float, default=0.05, help="teacher <- (1 - rate) teacher + rate student, after each step")
    p.add_argument("--resample", type=int, default=9, help="dapo: further batches a step at most, until enough groups are mixed")
    # optimizer (official run script)
    p.add_argument("--lr", type=float, default=2e-6, help="AdamW with betas 0.9 / 0.999")
    p.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's, on all weights")
    p.add_argument("--adam-eps", type=float, default=1e-8, help="AdamW's (--toy: 5e-5, see README)")
    p.add_argument("--clip", type=float, default=1.0, help="largest global gradient norm")
    p.add_argument("--warmup", type=int, default=10, help="linear warm-up steps; the first has lr / warmup, not 0")
    p.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="cosine falls to 10%% (ours: for --toy)")
    # speed and memory: never change results
    p.add_argument("--micro-prompts", type=int, default=1, help="prompts (with their responses) in one forward and backward")
    p.add_argument("--gen-prompts", type=int, default=6, help="prompts decoded at once, in whole micro-batches (ours: 48 rows "
                   "of KV cache fit beside a 4B; 12 is faster where there is room)")
    p.add_argument("--chunk", type=int, default=512, help="response tokens whose logits exist at once")
    p.add_argument("--offload-teacher", action=flag, default=False,
                   help="free the teacher's live weights outside its own phase; they are rebuilt from the sharded EMA")
    p.add_argument("--checkpointing", action=flag, default=True, help="recompute each layer's activations in the backward pass")
    p.add_argument("--compile", action="store_true", help="decode with CUDA graphs in a cache of fixed size, which stays in memory: as "
                   "many rows as --gen-prompts makes, each as long as the longest prompt and response")
    p.add_argument("--workers", type=int, default=4, help="processes a rank that decode images ahead of the step; 0: none")
    p.add_argument("--threads", type=int, help="CPU threads of torch (--toy: 1, so that the bits do not depend on the machine)")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cuda: bf16 live weights; cpu: fp32")
    p.add_argument("--plan", nargs="?", type=int, const=int(os.environ.get("WORLD_SIZE", 1)), metavar="RANKS", help="print steps, memory and an estimate of the time on "
                   "so many GPUs (default: torchrun's ranks), and train nothing")
    # what is kept
    p.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (ours: little is lost to a crash)")
    p.add_argument("--show-every", type=int, default=5, help="steps between rollouts kept for the report (ours)")
    if "--toy" in (sys.argv[1:] if argv is None else argv):
        p.set_defaults(**TOY)
    args = p.parse_args(argv)
    args.model = args.model or (f"{args.out}/base" if args.toy else "Qwen/Qwen3.5-4B")
    args.data = args.data or (f"{args.out}/data" if args.toy else "yuanqianhao/Vision-OPD-6K")
    for name in ("steps", "prompts", "group", "max_new_tokens", "micro_prompts", "gen_prompts", "chunk", "top_k", "save_every", "show_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.beta < 1 or not 0 <= args.ema_rate <= 1 or not 0 <= args.trust <= 1 or args.resample < 0:
        p.error(f"--beta must lie in (0, 1), --ema-rate and --trust in [0, 1], and --resample be at least 0; got {args.beta}, "
                f"{args.ema_rate}, {args.trust}, {args.resample}")
    rewarded, distils = args.method in REWARD, args.method in DISTIL
    if args.method == "sft" and args.teacher == "trust-region":
        p.error("--method sft samples from one set of weights: --teacher trust-region, a mixture of logits, is none")
    if rewarded and args.group < 2:
        p.error(f"--method {args.method} compares the responses to a prompt: --group must be at least 2, got {args.group}")
    given = {token.partition("=")[0] for token in (sys.argv[1:] if argv is None else argv)}
    unused = dict.fromkeys(("--teacher", "--offload-teacher", "--no-offload-teacher", "--max-crop-prompt"), rewarded)
    unused |= {"--trust": args.teacher != "trust-region", "--objective": not distils,
              "--ema-rate": rewarded or (args.teacher or ("ema" if distils else "initial")) != "ema", "--resample": args.method != "dapo"}
    unused |= dict.fromkeys(("--divergence", "--beta", "--top-k"), not distils or args.objective != "topk")
    unused["--beta"] |= args.divergence != "jsd"
    if idle := [flag for flag, without in unused.items() if without and flag in given]:
        p.error(f"{', '.join(idle)} would change nothing with --method {args.method}, --teacher {args.teacher or 'unset'}, --objective "
                f"{args.objective}, --divergence {args.divergence}. Leave it out, or correct one of them.")
    args.teacher = args.teacher or (None if rewarded else "ema" if distils else "initial")
    if args.plan is not None and (args.toy or args.plan < 1):
        p.error(f"--plan needs data and a model that are there, so not --toy, and a number of ranks from 1; got {args.plan}")
    if args.compile and args.device == "cpu":
        p.error("--compile is about CUDA graphs: leave it out with --device cpu")
    if args.device == "cuda" and args.plan is None and not torch.cuda.is_available():
        p.error("--device cuda, but torch sees no GPU here. Use --device cpu, or install a CUDA build of torch.")
    return args


# ------------------------------------------------------------------------------------------------------------- ranks

def setup(device: str) -> tuple[int, int, torch.device]:
    """(rank, world, device) from torchrun's environment; plain python is rank 0 of 1."""
    rank, world, local = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    here = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(here)
    if world > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=here if device == "cuda" else None,
                                timeout=timedelta(hours=6))                           # rank 0 may download for long
    return rank, world, here


def total(values: list[float], device, op=dist.ReduceOp.SUM) -> list[float]:
    """Each value summed (or reduced by `op`) over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor.tolist()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------- sharded weights, AdamW and EMA

class Flat:
    """All parameters of a model as views into one vector, and their gradients into another, so that gradients reduce and
    weights publish without a copy. Rank r owns slice r of `world` equal ones. Offsets do not depend on the world size."""

    def __init__(self, model, rank: int, world: int):
        self.params = list(model.parameters())                                        # tied weights appear once
        starts = [0]
        for param in self.params:
            starts.append(starts[-1] + math.ceil(param.numel() / 64) * 64)            # aligned for fast kernels
        self.numel, self.size = starts[-1], math.ceil(starts[-1] / (64 * world)) * 64
        self.rank, self.world, self.own = rank, world, slice(rank * self.size, (rank + 1) * self.size)
        self.weights = torch.zeros(self.size * world, dtype=self.params[0].dtype, device=self.params[0].device)
        self.spans = [slice(start, start + param.numel()) for param, start in zip(self.params, starts)]
        for param, span in zip(self.params, self.spans):
            param.data = self.weights[span].view_as(param).copy_(param.data)

    def track_gradients(self) -> None:
        self.grads = torch.zeros_like(self.weights)
        self.side = torch.cuda.Stream() if self.weights.is_cuda else None             # reduces gradients
        for param, span in zip(self.params, self.spans):
            param.grad = self.grads[span].view_as(param)

    def publish(self, own: Tensor) -> None:
        """Every rank's fp32 slice `own` -> the live weights of all ranks, whose memory is taken if it was given back."""
        self.allocate(True)
        self.weights[self.own].copy_(own)
        if self.world > 1:
            dist.all_gather_single(self.weights, self.weights[self.own].clone())

    def reduce_into(self, own: Tensor) -> None:
        """Add the sum of all ranks' gradients to this rank's fp32 slice `own`, and clear them. Summed in fp32 (a
        reduce-scatter of bf16 gradients would round at every rank), 64M at a time, and on a GPU beside what follows, until
        `settle`."""
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            if self.world == 1:
                own.add_(self.grads)
            for part in self.grads.view(self.world, self.size).split(2 ** 26, dim=1) if self.world > 1 else ():
                sent = part.contiguous()                                              # (world, part): row r is for rank r
                received = torch.empty_like(sent)
                dist.all_to_all_single(received, sent)
                own[:sent.shape[1]].add_(received.sum(0, dtype=own.dtype))
                own = own[sent.shape[1]:]
            self.grads.zero_()

    def settle(self) -> None:
        """Gradients are touched by nothing queued before this any more."""
        if self.side:
            torch.cuda.current_stream().wait_stream(self.side)

    def allocate(self, there: bool) -> None:
        """Give the live weights' memory back, or take it again (contents undefined until the next publish)."""
        self.weights.untyped_storage().resize_(self.weights.nbytes if there else 0)


class State:
    """This rank's fp32 slices: master weights and their gradient, AdamW's moments, the EMA teacher (paper, section 3.3)."""

    def __init__(self, student: Flat, args):
        self.master = torch.nn.Parameter(student.weights[student.own].float())
        self.master.grad = torch.zeros_like(self.master)
        self.ema = self.master.detach().clone()
        self.adam = torch.optim.AdamW([self.master], lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps,
                                      weight_decay=args.weight_decay, fused=True)
        self.moments = self.adam.state[self.master] = {
            "step": torch.zeros((), device=self.master.device),
            "exp_avg": torch.zeros_like(self.ema), "exp_avg_sq": torch.zeros_like(self.ema)}

    def tensors(self) -> dict[str, Tensor]:
        return {"master": self.master.data, "ema": self.ema} | {name: self.moments[name] for name in ("exp_avg", "exp_avg_sq")}

    def update(self, lr: float, clip: float, ema_rate: float, norm: float) -> None:
        self.master.grad.mul_(min(1.0, clip / (norm + 1e-6)))
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.master.grad.zero_()
        self.ema.lerp_(self.master.data, ema_rate)                    # teacher <- (1 - rate) teacher + rate student


# ------------------------------------------------------------------------------------------------- checkpoint, resume

def save_checkpoint(out: Path, step: int, student, processor, flat: Flat, state: State) -> None:
    """out/checkpoint-STEP: a model directory plus every rank's fp32 state; written beside, then renamed, so it is whole or
    absent. Older checkpoints keep their model and lose their state."""
    final, partial = out / f"checkpoint-{step:06d}", out / "checkpoint.partial"
    if flat.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
    barrier()
    try:
        save_file(state.tensors(), partial / "state" / f"{flat.rank}-of-{flat.world}.safetensors")
        if flat.rank == 0:
            save(student, processor, partial, {name: weight.detach().to("cpu", copy=True) for name, weight in student.named_parameters()})
            write_json(partial / "state" / "state.json", {"step": step, "world": flat.world, "numel": flat.numel, "size": flat.size})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"Could not write {final} ({shutil.disk_usage(out).free / 1e9:.1f} GB free on its disk): {error}. Earlier "
                      "checkpoints are whole: make room, then start the same command again.") from error
    barrier()
    if flat.rank == 0:
        partial.rename(final)
        for older in set(out.glob("checkpoint-*/state")) - {final / "state"}:
            shutil.rmtree(older)


def resume(out: Path, flat: Flat, state: State) -> int:
    """Load the newest whole checkpoint into `state`, re-sliced when the number of ranks changed. Returns its step, or 0."""
    newest = max(out.glob("checkpoint-*/state/state.json"), default=None)
    if newest is None:
        return 0
    saved = json.loads(newest.read_text())
    if saved["numel"] != flat.numel:
        raise ValueError(f"{newest.parent} holds the state of {saved['numel']:,} weights, but this model has {flat.numel:,}.")
    size, start, stop = saved["size"], flat.own.start, min(flat.own.stop, flat.numel)     # slices then, and this rank's now
    for old in range(saved["world"]):
        low, high = max(start, old * size), min(stop, (old + 1) * size)
        if low < high:
            with safe_open(newest.parent / f"{old}-of-{saved['world']}.safetensors", "pt") as file:
                for name, own in state.tensors().items():
                    own[low - start:high - start].copy_(file.get_slice(name)[low - old * size:high - old * size])
    state.moments["step"].fill_(saved["step"])
    return saved["step"]


def claim(args, out: Path, rows: list[dict]) -> None:
    """Write args.json with commit and versions; refuse a folder whose run had other settings or data."""
    told = [[row["id"], row["question"], row["bbox"], row["image"].name, row["crop"].name] for row in rows]
    told += [row["answer"] for row in rows if args.method != "vision-opd"]             # which has no use for them
    now, path = {**vars(args), "rows_sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest()}, out / "args.json"
    then = json.loads(path.read_text()) if path.exists() else now
    free = FREE - ({"steps"} if args.schedule == "cosine" else set())
    if differ := [f"{key}: {then.get(key)!r} -> {value!r}" for key, value in now.items() if key not in free and then.get(key) != value]:
        raise ValueError(f"{out} holds a run with other settings ({'; '.join(differ)}). Resume it with the same ones, or choose "
                         "another --out.")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    write_json(path, now | {"commit": commit.stdout.strip() or None, "versions": {
        "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}})


def write_json(path: Path, value) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.rename(path)


# -------------------------------------------------------------------------------------------------------------- data

def batch_rows(n: int, prompts: int, seed: int, step: int) -> list[int]:
    """Row numbers of a step, a function of (seed, step): epochs are shuffled, each one's last incomplete batch is dropped."""
    epoch, index = divmod(step, n // prompts)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[index * prompts:(index + 1) * prompts].tolist()


def check(args, rows: list[dict], world: int) -> None:
    """Raises ValueError where the data cannot give what is asked for."""
    if args.method != "vision-opd" and (without := sum(row["answer"] is None for row in rows)):
        raise ValueError(f"--method {args.method} needs answers, and {without} of {len(rows)} rows of {args.data} have none. "
                         "Make the data with `synth.py --labels`, or train with --method vision-opd.")
    if len(rows) < args.prompts:
        raise ValueError(f"{args.data} has {len(rows)} triplets, fewer than one batch. Lower --prompts ({args.prompts}).")
    if args.prompts % world:
        raise ValueError(f"--prompts {args.prompts} cannot be shared evenly by {world} ranks. Choose a multiple of {world}.")


def area(path: Path) -> int:
    """Pixels of an image, by its header; 0 where that cannot be read: loading the image will say so, if it cannot either."""
    try:
        return math.prod(synth.image_size(path))
    except ValueError:
        return 0


def deal(batch: list[int], sizes: list[int], rank: int, world: int) -> list[int]:
    """This rank's part of a batch: the rows are dealt out by size, largest first, back and forth, so that each rank gets as many
    and about as much."""
    order = sorted(range(len(batch)), key=lambda i: -sizes[i])
    return [batch[i] for place, i in enumerate(order) if place % (2 * world) in (rank, 2 * world - 1 - rank)]


def views(args) -> list[tuple[str, str, int]]:
    """What student and teacher (if there is one) are shown: (image, what is added to the question, most tokens)."""
    teacher = ("image", OPSD_HINT) if args.method == "opsd" else ("crop", "")
    return [("image", "", args.max_prompt), (*teacher, args.max_crop_prompt)][:1 if args.method in REWARD else 2]


class Micros(torch.utils.data.Dataset):
    """This rank's micro-batches in order: (row numbers, the student's prompts, the teacher's prompts if there is one)."""

    def __init__(self, rows: list[dict], micros: list[list[int]], processor, args, dtype: torch.dtype):
        self.rows, self.micros, self.processor, self.dtype = rows, micros, processor, dtype
        self.views = views(args)

    def __len__(self) -> int:
        return len(self.micros)

    def __getitem__(self, i: int):
        rows, prompts = [self.rows[j] for j in self.micros[i]], []
        try:
            for view, hint, limit in self.views:
                images = [synth.load_image(row[view]) for row in rows]
                texts = [row["question"] + hint.format(answer=row["answer"]) for row in rows]
                prompt = encode(self.processor, images, texts, max_tokens=limit)
                prompts.append(prompt | {"pixel_values": prompt["pixel_values"].to(self.dtype)})
        except ValueError as error:
            raise ValueError(f"samples {[row['id'] for row in rows]}: {error}") from error
        return self.micros[i], prompts[0], prompts[1] if prompts[1:] else None


# -------------------------------------------------------------------------------------------------------------- step

@dataclass
class Micro:
    """Some of this rank's prompts, their responses, and what the method makes of them: one forward and backward."""
    numbers: list[int]                      # rows of the data, B
    full: dict                              # the student's prompts
    seen: dict | None                       # the teacher's: of the crop (opsd: of the full image, with the answer)
    rollout: Rollout | None = None          # N = B G responses; later only with the tokens to train on in its mask
    keep: Tensor | None = None              # (N,) bool, which responses are trained on
    right: Tensor | None = None             # (N,) bool, which match the label
    advantages: Tensor | None = None        # (N,)
    target: list | None = None              # [(hidden (n, D), head (V, D), coefficient)], which make the teacher's logits


def respond(args, step: int, micros: list[Micro], model, processor, rows: list[dict], extra: int = 0, quiet: bool = False) -> None:
    """G responses by `model` to each prompt: the full image's, or for sft the crop's. Graded where the method needs labels."""
    longest = args.max_crop_prompt if args.method == "sft" else args.max_prompt
    static = longest + args.max_new_tokens if args.compile else 0
    calls, key = max(1, args.gen_prompts // args.micro_prompts), f"{args.seed}/{step}" + f"/{extra}" * (extra > 0)
    with tqdm(desc=f"step {step + 1} rollouts", total=args.max_new_tokens * math.ceil(len(micros) / calls), unit="tok", leave=False,
              disable=quiet) as bar:
        for part in (micros[i:i + calls] for i in range(0, len(micros), calls)):
            seeds = [random.Random(f"{key}/{rows[j]['id']}").getrandbits(63) for micro in part for j in micro.numbers]
            prompts = [micro.seen if args.method == "sft" else micro.full for micro in part]
            rollout = sample(model, processor, join(prompts, processor.tokenizer.pad_token_id), args.group,
                             max_new_tokens=args.max_new_tokens, seeds=seeds, bar=bar, static=static)
            for micro, piece in zip(part, rollout.split([len(micro.numbers) * args.group for micro in part])):
                micro.rollout, micro.keep = piece, torch.ones_like(piece.ended)
                if args.method not in DISTIL:
                    grade(args, micro, processor, [rows[j] for j in micro.numbers])


def grade(args, micro: Micro, processor, rows: list[dict]) -> None:
    """Which responses match the label; sft keeps those, dapo the groups that are neither all right nor all wrong (paper, Table 2)."""
    asked = [row for row in map(evaluate.triplet_row, rows) for _ in range(args.group)]
    right = [evaluate.score(row | {"bench": "", "output": text})["correct"]
             for row, text in zip(asked, micro.rollout.decode(processor.tokenizer))]
    micro.right = torch.tensor(right, device=micro.keep.device)
    groups = micro.right.view(-1, args.group)                                         # (B, G)
    if args.method == "sft":
        micro.keep = micro.right
        return
    rewards = groups.float()
    if args.method == "dapo":
        lengths, buffer = micro.rollout.mask.sum(1).view_as(groups), max(1, args.max_new_tokens // 5)    # a fifth, as in DAPO
        rewards = rewards + overlong_penalty(lengths, args.max_new_tokens, buffer)
        micro.keep = (groups.any(1) & ~groups.all(1)).repeat_interleave(args.group)
    micro.advantages = group_advantages(rewards).flatten()


def fill_up(args, micros: list[Micro], flat: Flat, further) -> list[Micro]:
    """DAPO's dynamic sampling: further(1), further(2), .. are this rank's shares of further batches, answered and graded; they are
    drawn until --prompts groups of all ranks are kept. Those that are over are left out, the last ones first, whatever the ranks."""
    mine, parts, kept = args.prompts // flat.world, [micros], []
    own = slice(flat.rank * mine, (flat.rank + 1) * mine)
    while True:
        found = torch.zeros(args.prompts, dtype=torch.long, device=flat.weights.device)    # of a batch, which groups are kept
        found[own] = torch.cat([micro.keep[::args.group] for micro in parts[-1]]).long()
        if flat.world > 1:
            dist.all_reduce(found)
        kept.append(found)
        if sum(map(torch.sum, kept)) >= args.prompts or len(parts) > args.resample:
            break
        parts.append(further(len(parts)))
    kept = torch.stack(kept)                                                          # (batches, prompts)
    kept *= kept.flatten().cumsum(0).view_as(kept) <= args.prompts
    for part, chosen in zip(parts, kept[:, own].bool()):
        for micro, some in zip(part, chosen.split([len(micro.numbers) for micro in part])):
            micro.keep = some.repeat_interleave(args.group)
    return sum(parts, [])


@torch.no_grad()
def teach(args, micros: list[Micro], student, teacher, teacher_flat: Flat, state: State) -> None:
    """Sets each target. The teacher leaves hidden states, not logits; a trust-region one the student's own as well (paper, Table 3)."""
    teacher_flat.publish(state.ema)
    head = teacher.lm_head.weight.detach()
    sides = [(teacher, head.clone() if args.offload_teacher else head, 1.0)]
    if args.teacher == "trust-region":
        sides = [(*sides[0][:2], 1 - args.trust), (student, student.lm_head.weight.detach(), args.trust)]
    for m in micros:
        m.target = [(response_hidden(model, m.seen, m.rollout)[m.rollout.mask], head, share) for model, head, share in sides]


def token_loss(args, hidden: Tensor, head: Tensor, micro: Micro, weights: Tensor) -> tuple[Tensor, ...]:
    """(sum of weights * loss; loss of each token; for top-K, whether teacher and student agree on it). hidden (n, D), weights (n,)."""
    if args.method in DISTIL and args.objective == "topk":
        return topk_divergence(hidden, head, micro.target, weights, k=args.top_k, beta=args.beta, divergence=args.divergence,
                               chunk=args.chunk, agreement=True)
    mask = micro.rollout.mask
    ids = micro.rollout.ids[mask]                                                     # (n,)
    log_s = token_log_probs([(hidden, head, 1.0)], ids, args.chunk)
    if args.method == "sft":
        per_token = -log_s
    elif args.objective == "sampled-token":
        per_token = sampled_token(log_s, token_log_probs(micro.target, ids, args.chunk), micro.rollout.log_probs[mask])
    else:
        advantages = micro.advantages[:, None].expand_as(mask)[mask]
        high = 0.28 if args.method == "dapo" else 0.2                                 # old = new: a batch is used once (official code)
        per_token = clipped_policy_gradient(log_s, log_s.detach(), advantages, 0.2, high)
    return (weights * per_token).sum(), per_token.detach(), torch.zeros_like(ids)


def learn(args, step: int, batch: list, student, teacher, processor, flat: Flat, teacher_flat: Flat, state: State, rows, further):
    """One optimizer step (paper, Eq. 3 and 4) on this rank's share of the batch; further(step, i): its share of more (dapo).
    Returns (log entry, rollouts to show)."""
    device, clock = flat.weights.device, [time.perf_counter()]

    # 1. The student answers from the full image (sft: the teacher from the crop).
    def answered(batch: list, extra: int = 0) -> list[Micro]:
        micros = [Micro(numbers, to_device(full, device), seen and to_device(seen, device)) for numbers, full, seen in batch]
        respond(args, step, micros, teacher if args.method == "sft" else student, processor, rows, extra, quiet=flat.rank > 0)
        return micros
    if args.method == "sft":
        teacher_flat.publish(state.ema)
    micros = answered(batch)
    if args.method == "dapo":
        micros = fill_up(args, micros, flat, lambda i: answered(further(step, i), i))
    counts = [[len(m.keep), m.rollout.mask.sum(), m.rollout.ended.sum(), 0 if m.right is None else m.right.sum(), m.keep.sum(),
               m.full["shrunk"].sum() + (m.seen["shrunk"].sum() if m.seen else 0)] for m in micros]
    micros = [micro for micro in micros if micro.keep.any()]
    for micro in micros:
        micro.rollout.mask &= micro.keep[:, None]
    most, = total([len(micros)], device, dist.ReduceOp.MAX)
    n, sampled, ended, right, kept, shrunk, tokens = total(
        [*(float(sum(column)) for column in zip(*counts)), sum(float(m.rollout.mask.sum()) for m in micros)], device)
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
            if args.method == "grpo":                                                 # the mean of a response, then of all of them
                weights = (1 / (mask.sum(1, keepdim=True) * n)).expand_as(mask).float()
            hidden = response_hidden(student, micro.full, micro.rollout, checkpoint=args.checkpointing)[mask]      # (n, D)
            loss, per_token, agree = token_loss(args, hidden, student.lm_head.weight, micro, weights[mask])
            flat.settle()                                                             # the forward ran beside the last reduction
            loss.backward()
            sums += torch.stack([loss.detach().double(), agree.double().sum() / tokens])
            if not shown and (step % args.show_every == 0 or step + 1 == args.steps):
                shown = show(args, step, micro.rollout, per_token, [rows[j] for j in micro.numbers], processor)
        flat.reduce_into(state.master.grad)                                           # all ranks, equally often
    flat.settle()
    squares = sum(part.double().square().sum() for part in state.master.grad.split(2 ** 24)).item()
    value, agreement, squares = total([*sums.tolist(), squares], device)
    if not math.isfinite(value) or not math.isfinite(squares):
        raise FloatingPointError(
            f"Step {step + 1}: loss {value}, squared gradient norm {squares}. Nothing was updated. This rank's samples: "
            f"{[rows[j]['id'] for micro in micros for j in micro.numbers]}. Look at them, then resume from the last checkpoint.")
    lr, norm = args.lr * learning_rate(step, args), math.sqrt(squares)
    rate = {"ema": args.ema_rate, "current": 1.0}.get(args.teacher, 0.0)              # 0: a frozen teacher (paper, Table 3)
    state.update(lr, args.clip, rate, norm)
    flat.publish(state.master.data)
    clock.append(time.perf_counter())
    memory, = total([peak_memory(device)], device, dist.ReduceOp.MAX)
    gen_s, teach_s, learn_s = (after - before for before, after in zip(clock, clock[1:]))
    entry = {"step": step + 1, "steps": args.steps, "loss": value, "grad_norm": norm, "lr": lr, "length": sampled / n,
             "eos": ended / n, "truncated": 1 - ended / n, "tokens": int(tokens), "shrunk": int(shrunk), "gen_s": gen_s,
             "teach_s": teach_s, "learn_s": learn_s, "mem_gb": memory}
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


def show(args, step: int, piece: Rollout, per_token: Tensor, rows: list[dict], processor) -> list[dict]:
    """The first response to each of up to 4 prompts for the report; where that is the loss, each token with the divergence."""
    scored = args.method in DISTIL and args.objective == "topk"
    shown, per_row = [], per_token.split(piece.mask.sum(1).tolist())
    for i, row in enumerate(rows[:4]):
        if not piece.mask[i * args.group].any():                                      # not trained on
            continue
        ids = piece.ids[i * args.group][piece.mask[i * args.group]].tolist()
        paths = {view: os.path.relpath(row[view], args.out) for view in ("image", "crop")}
        shown.append({"step": step + 1, "id": row["id"], "question": row["question"], "answer": row["answer"], **paths,
                      "tokens": [processor.tokenizer.decode([token]) for token in ids],
                      "divergence": [round(d, 5) for d in per_row[i * args.group].tolist()] if scored else []})
    return shown


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GB: the GPU's, or on a CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "linux" else 1e9)


def line(entry: dict) -> str:
    spent = {name: entry[f"{name}_s"] for name in ("gen", "teach", "learn", "other")}
    phases = " ".join(f"{name} {seconds:.1f}s {seconds / sum(spent.values()):.0%}" for name, seconds in spent.items())
    return (f"step {entry['step']:4d}/{entry['steps']} | loss {entry['loss']:.4f} | grad {entry['grad_norm']:.2f} | "
            f"len {entry['length']:.0f} | eos {entry['eos']:.2f}" + "".join(
                f" | {key} {entry[name]:.2f}" for key, name in (("agree", "agreement"), ("right", "right"), ("kept", "kept"))
                if name in entry) + f" | {phases} | mem {entry['mem_gb']:.1f}G" + (f" | shrunk {entry['shrunk']}" if entry["shrunk"] else ""))


def train(args, rank: int, world: int, device: torch.device) -> Path:
    """The run: load, resume, step, log, save. Returns the final checkpoint's folder."""
    out = Path(args.out)
    if rank == 0:                                                                     # downloads and unpacks, onto a shared disk
        synth.fetch(args.data)
    barrier()
    rows = synth.read_triplets(synth.fetch(args.data))
    args = argparse.Namespace(**vars(args) | {"steps": args.steps or len(rows) // args.prompts})
    check(args, rows, world)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        claim(args, out, rows)
    student, processor = load(args.model, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    teacher = copy.deepcopy(student).requires_grad_(False)
    flat, teacher_flat = Flat(student, rank, world), Flat(teacher, rank, world)
    teacher_flat.allocate(args.teacher is not None and not args.offload_teacher)
    flat.track_gradients()
    state = State(flat, args)
    begin = resume(out, flat, state)
    if [begin] != total([begin], device, dist.ReduceOp.MIN) or begin > args.steps:
        raise ValueError(f"rank {rank} finds step {begin} in {out}. Expected at most --steps {args.steps}, the same on all ranks: "
                         "--out must lie on a disk that all machines share.")
    flat.publish(state.master.data)
    log, shown_log = out / "log.jsonl", out / "rollouts.jsonl"
    if rank == 0:
        for path in (log, shown_log):                                                # what came after the checkpoint is redone
            path.write_text("".join(json.dumps(entry) + "\n" for entry in evaluate.read_jsonl(path, []) if entry["step"] <= begin))
        if slow := missing_kernels(student):
            print(f"Linear attention runs on slow kernels: pip install {' '.join(slow)}", flush=True)
        print(f"{len(rows):,} triplets, {flat.numel / 1e6:,.1f}M weights, {world} rank(s), steps {begin + 1} to {args.steps}", flush=True)
    board = tensorboard(out, begin) if rank == 0 else None

    mine = args.prompts // world
    per_step = math.ceil(mine / args.micro_prompts)

    sizes = [[area(row["image"]) for row in rows] if rank == 0 and args.method != "dapo" else None]    # read once: all must deal alike
    if world > 1:
        dist.broadcast_object_list(sizes, device=device)

    def share(step: int, seed: int) -> list[list[int]]:
        batch = batch_rows(len(rows), args.prompts, seed, step)
        if args.method == "dapo":                                                     # fill_up counts in the batch's order
            batch = batch[rank * mine:(rank + 1) * mine]
        else:
            batch = deal(batch, [sizes[0][j] for j in batch], rank, world)
        return [batch[i:i + args.micro_prompts] for i in range(0, mine, args.micro_prompts)]

    def further(step: int, i: int) -> list:
        """This rank's share of the i-th further batch of a step: rows in an order of their own."""
        data = Micros(rows, share(step * args.resample + i - 1, args.seed + 2 ** 20), processor, args, flat.weights.dtype)
        return [data[k] for k in range(per_step)]
    micros = sum((share(step, args.seed) for step in range(begin, args.steps)), [])
    loader = iter(torch.utils.data.DataLoader(
        Micros(rows, micros, processor, args, flat.weights.dtype), batch_size=None, num_workers=args.workers,
        prefetch_factor=max(2, math.ceil(per_step / args.workers)) if args.workers else None, pin_memory=device.type == "cuda"))
    before = time.perf_counter()
    for step in range(begin, args.steps):
        batch = [next(loader) for _ in range(per_step)]
        entry, shown = learn(args, step, batch, student, teacher, processor, flat, teacher_flat, state, rows, further)
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
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard", purge_step=begin + 1)


# --------------------------------------------------------------------------------------------------------------- toy

def judge(args, checkpoint: str | Path, when: str, device: torch.device) -> None:
    """Evaluate a checkpoint on scenes never trained on, into OUT/eval-WHEN."""
    out = Path(args.out)
    benches = {name: evaluate.benchmark(name, out) for name in evaluate.GROUPS["toy"]}
    evaluate.evaluate(str(checkpoint), benches, out / f"eval-{when}", views=["full", "crop"], max_new_tokens=TOY["max_new_tokens"], batch=100,
                      device=str(device))
    evaluate.summarise(out / f"eval-{when}")


def prepare_toy(args, device: torch.device) -> None:
    """Draw the scenes, train the base model and evaluate it, each only if it is not there yet."""
    out, start = Path(args.out), time.perf_counter()
    if args.data == f"{args.out}/data":
        synth.preview(toy.draw(out / "data", toy.ROWS, args.seed))
    if not Path(args.model).exists() and args.model == f"{args.out}/base":
        toy.train_base(Path(args.model), args.seed, device)
    if not (out / "seconds.json").exists():
        seconds = {"base": time.perf_counter() - start}
        judge(args, args.model, "before", device)
        write_json(out / "seconds.json", seconds)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        if args.plan is not None:
            if os.environ.get("RANK", "0") == "0":
                rows = synth.read_triplets(synth.fetch(args.data))
                check(args, rows, args.plan)
                print(plan.plan(args, rows, views(args)))
            return
        rank, world, device = setup(args.device)
        if args.toy and rank == 0:
            prepare_toy(args, device)
        barrier()
        final = train(args, rank, world, device)
        if rank == 0:
            if args.toy:
                out = Path(args.out)
                judge(args, final, "after", device)
                print(evaluate.compare(out / "eval-before", out / "eval-after")[0])
            print(f"model: {final}   page: {evaluate.report(Path(args.out))}")
        barrier()
    except (ValueError, OSError, FloatingPointError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]                         # said at once: the other ranks still wait
        print(f"train.py: {error} ({Path(where.filename).name}, line {where.lineno})", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    if dist.is_initialized():                                                         # not after an error: it could block
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
