"""Vision-OPD (arXiv 2605.18740): a multimodal LLM learns to use its full image from its own crops.

    python train.py --toy                       the whole method on drawn scenes, on a CPU
    torchrun --nproc-per-node 8 train.py        the paper's run: Qwen3.5-4B on Vision-OPD-6K
    torchrun --nproc-per-node 8 train.py --model DIR --data DIR --out runs/mine

The student sees the full image, the teacher (an EMA of the student) only the crop. Each step: the
student answers, the teacher reads those answers, and the student is pulled token by token toward
what the teacher would have said: `learn` below. The paper's other teachers and objectives (Tables
3, 4, 6) are flags; its baselines (Table 2) are `--method`: methods.py.

Killed at any moment, the same command goes on from the last checkpoint, on any number of ranks.
"""

import launch.environment  # noqa: F401  (first: it sets what torch and transformers read)

# isort: split

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from launch import script
from launch.card import write_reports
from launch.flags import (
    inner_share,
    natural,
    not_negative,
    positive,
    positive_int,
    refuse_idle,
    setting,
    settings_parser,
    share,
)
from launch.refusals import described, flags_with_effect, why_not
from launch.responses import count_responses, lengths
from launch.run_folder import RunLog, claim, introduce, looked_at, rows_digest, show
from launch.stopping import SaveOnSigterm, outlive_sigterm
from launch.tracking import TRACKERS
from loss import DIVERGENCES
from methods import METHODS, EncodedMicros, Micro, micros_on_device, refuse_unfit, shown_views
from model import load, refuse_special_tokens, response_hidden
from sharding import (
    Shards,
    join_ranks,
    newest_step,
    over_ranks,
    peak_memory,
    resume,
    save_checkpoint,
)
from storage.checkpoint import fingerprint
from storage.files import hold
from storage.hub import upload
from storage.images import image_size
from triplets.fetch import fetch_triplets
from triplets.format import Triplet, open_triplets
from triplets.order import batch_rows, deal

TEACHERS = ["ema", "initial", "current", "trust-region"]


@dataclass
class Settings:
    """The flags. Defaults are the official run script's, or say (ours: why)."""

    # what to train, on what
    toy: bool = setting(False, "drawn scenes, a tiny Qwen3.5, and a table", bool)
    retrain_base: bool = setting(
        False, "with --toy: train a new base model, into OUT/base (default: toy/base-model)", bool
    )
    model: str = setting(
        None, "hub id or directory (default Qwen/Qwen3.5-4B; --toy: its base model)"
    )
    data: str = setting(
        None,
        "hub id or directory with train.jsonl (default yuanqianhao/Vision-OPD-6K; --toy: drawn)",
    )
    out: str = setting("runs/vision-opd", "checkpoints, log.jsonl, args.json, report.html")
    seed: int = setting(0, "order of the data and every sampled token are functions of it", natural)
    # batch
    steps: int = setting(
        None,
        "optimizer steps (default: one epoch, the last incomplete batch dropped)",
        positive_int,
    )
    prompts: int = setting(96, "prompts a step, over all ranks", positive_int)
    group: int = setting(8, "responses sampled for each prompt", positive_int)
    max_new_tokens: int = setting(
        1024, "longer responses are cut off and trained on all the same", positive_int
    )
    max_prompt: int = setting(
        8192, "student's prompt tokens; larger images are scaled down to fit", positive_int
    )
    max_crop_prompt: int = setting(
        10240, "the same for the teacher's prompt and its extra view", positive_int
    )
    # method and objective (paper, section 4.1; the others: Tables 2, 3, 4 and 6)
    method: str = setting(
        "vision-opd",
        "who writes, what the teacher sees, a token's loss: see methods.py; opsd, sft, grpo, dapo "
        "and crops need answers in the data",
        list(METHODS),
    )
    teacher: str = setting(
        None,
        "whose weights (default: ema; of sft, opd-aha, vad: initial, frozen). current: the "
        "student's; trust-region: logits (1 - trust) initial + trust current",
        TEACHERS,
    )
    trust: float = setting(0.05, "the current student's share in a trust-region teacher", share)
    objective: str = setting(
        "topk",
        "sampled-token: policy gradient with the advantage log p_teacher - log p_student",
        ["topk", "sampled-token"],
    )
    divergence: str = setting(
        None, "D(teacher || student) (default: jsd; of vcsd: soft_forward_kl)", list(DIVERGENCES)
    )
    beta: float = setting(0.5, "JSD's weight of the teacher in the mixture, in (0, 1)", inner_share)
    top_k: int = setting(
        100,
        "student's tokens compared one by one, a tail for the rest; s2vopd: teacher's, no tail",
        positive_int,
    )
    tilt_floor: float = setting(
        None,
        "opd-aha, vcsd: no tilt where the teacher's probability is under this share of its largest "
        "(default: theirs, 0 and 0.1; replications found collapse without one)",
        share,
    )
    tau: float = setting(0.8, "vad: most weight of the positive part (9B: 0.7)", share)
    ema_rate: float = setting(
        0.05, "teacher <- (1 - rate) teacher + rate student, after each step", share
    )
    resample: int = setting(
        9, "dapo: further batches a step at most, until enough groups are mixed", natural
    )
    # optimizer
    lr: float = setting(2e-6, "AdamW with betas 0.9 / 0.999", not_negative)
    weight_decay: float = setting(0.01, "AdamW's, on all weights", not_negative)
    adam_eps: float = setting(1e-8, "AdamW's (--toy has its own: docs/methods.md)", positive)
    clip: float = setting(1.0, "largest global gradient norm", positive)
    warmup: int = setting(10, "linear warm-up steps; the first has lr / warmup, not 0", natural)
    schedule: str = setting(
        "constant", "cosine falls to 10%% (ours: for --toy)", ["constant", "cosine"]
    )
    # speed and memory: never change results
    micro_prompts: int = setting(
        1, "prompts (with their responses) in one forward and backward", positive_int
    )
    gen_prompts: int = setting(
        6,
        "prompts decoded at once, in whole micro-batches (ours: 48 rows of KV cache fit beside a "
        "4B; 12 is faster where there is room)",
        positive_int,
    )
    chunk: int = setting(1024, "response tokens whose logits exist at once", positive_int)
    checkpointing: bool = setting(
        True, "recompute each layer's activations in the backward pass", bool
    )
    compile: bool = setting(
        False,
        "decode with CUDA graphs in a cache of fixed size, which stays in memory: as many rows as "
        "--gen-prompts makes, each as long as the longest prompt and response",
        bool,
    )
    # where it runs
    workers: int = setting(
        4, "processes a rank that decode images ahead of the step; 0: none", natural
    )
    threads: int = setting(
        None,
        "CPU threads of torch (--toy: 1, so that the bits do not depend on the machine)",
        positive_int,
    )
    device: str = setting(
        "cuda" if torch.cuda.is_available() else "cpu",
        "cuda: bf16 live weights; cpu: fp32",
        ["cpu", "cuda"],
    )
    plan: int = setting(
        None,
        "only print steps, memory and an estimate of the time on so many GPUs (default: torchrun's "
        "ranks)",
        positive_int,
        nargs="?",
        const=int(os.environ.get("WORLD_SIZE", 1)),
        metavar="RANKS",
    )
    # what is kept
    save_every: int = setting(
        10, "steps between checkpoints (ours: little is lost to a crash)", positive_int
    )
    show_every: int = setting(5, "steps between rollouts kept for the report (ours)", positive_int)
    track: str = setting(
        None, "where curves go (default: TensorBoard, if it is installed)", TRACKERS
    )
    push: str = setting(
        None, "upload the final model to this repository of the hub, private if it is new"
    )


# A resumed run must agree with the stopped one on all but these: speed, memory, where it stops,
# where its data and its model lie, which must be the same.
FREE = set(
    "model out data steps save_every show_every micro_prompts gen_prompts chunk checkpointing "
    "compile workers threads track push".split()
)


@dataclass
class Run:
    """What a step works with."""

    settings: Settings
    method: object  # of methods.py
    rows: Sequence[Triplet]
    processor: object
    shards: Shards
    rank: int
    world: int
    device: torch.device

    @property
    def micros_at_once(self) -> int:
        """Micro-batches that are decoded together."""
        return max(1, self.settings.gen_prompts // self.settings.micro_prompts)

    @property
    def micros_a_step(self) -> int:
        """This rank's micro-batches."""
        return math.ceil(self.settings.prompts // self.world / self.settings.micro_prompts)

    @property
    def static_tokens(self) -> int:
        """Tokens a row of the cache in which compiled decoding works; 0: not compiled."""
        if not self.settings.compile:
            return 0
        _, longest = shown_views(self.settings)[self.method.writer or "student"]
        return longest + self.settings.max_new_tokens

    def further_micros(self, step: int, i: int) -> list[Micro]:
        """This rank's share of the i-th further batch of a step (dapo): rows in an order of their
        own."""
        number = step * self.settings.resample + i - 1
        micros = share_of_step(self, number, self.settings.seed + 2**20)
        return micros_on_device(map(EncodedMicros(self).__getitem__, micros), self.device)


# -------------------------------------------------------------------------------------------- step


def learn(run: Run, step: int, batch: list) -> tuple[dict, list[dict]]:
    """One optimizer step (paper, Eq. 3 and 4) on this rank's share of the batch.

    Returns the step's log entry and some rollouts to look at.
    """
    settings, method, shards = run.settings, run.method, run.shards
    clock = [time.perf_counter()]

    # 1. Sample: the student answers from the full image.
    micros = micros_on_device(batch, run.device)
    method.respond(run, micros, step)
    micros = method.select(run, micros, step)
    count = count_responses(run, micros)
    micros = micros_to_train_on(micros, run.device)
    clock.append(time.perf_counter())

    # 2. Teach: the teacher, shown only the crop, reads the same answers.
    teach(run, micros)
    clock.append(time.perf_counter())

    # 3. Learn: the student is pulled toward what the teacher would have said.
    # The loss; how many tokens count; on how many of them teacher and student agree.
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)
    shown, agree = [], None
    for micro in micros:
        micro.shown = not shown and looked_at(run, step)
        weights = method.token_weights(micro, count)  # (N, T): 1 / the tokens of all ranks
        loss, per_token, agree = shards.student_pass(partial(student_loss, run, micro, weights))
        loss.backward()  # sums gradients over the ranks
        totals[0] += loss.detach()
        totals[1] += (weights[micro.rollout.mask] != 0).sum()
        if agree is not None:
            totals[2] += agree.sum()
        if micro.shown:
            shown = show(run, step + 1, micro, per_token, weights if agree is not None else None)
    loss, counted, agreed = over_ranks(totals.tolist(), run.device)
    norm = shards.gradient_norm()
    stop_if_not_finite(step, loss, norm, micros)
    lr = settings.lr * learning_rate(step, settings)
    if count["tokens"]:
        shards.update(lr, norm, settings.clip, teacher_rate(settings))
    clock.append(time.perf_counter())

    entry = {"step": step + 1, "steps": settings.steps, "loss": loss, "grad_norm": norm, "lr": lr}
    agreement = None if agree is None else agreed / max(1, counted)
    entry |= lengths(count) | method.figures(count, agreement)
    for i, name in enumerate(("gen_s", "teach_s", "learn_s")):
        entry[name] = clock[i + 1] - clock[i]
    entry["mem_gb"] = over_ranks([peak_memory(run.device)], run.device, dist.ReduceOp.MAX)[0]
    return entry, shown


def student_loss(run: Run, micro: Micro, weights: Tensor, student) -> tuple:
    """The method's loss of a micro-batch: scalar, each token's (n,), agreement (n,) or None."""
    mask = micro.rollout.mask
    hidden = response_hidden(
        student, micro.prompts["student"], micro.rollout, checkpoint=run.settings.checkpointing
    )
    return run.method.loss(micro, hidden[mask], student.lm_head.weight, weights[mask])


@torch.no_grad()
def teach(run: Run, micros: list[Micro]) -> None:
    """Sets what the student is pulled toward, where that is a teacher. It leaves hidden states, not
    logits; a trust-region one mixes the logits of initial weights and student (Table 3)."""
    heads = {}
    sides = [("teacher", *side) for side in run.method.teacher_sides().items()]
    sides += [("extra", *side) for side in run.method.extra_sides().items()]
    sides.sort(key=lambda side: side[1], reverse=True)  # teacher, student: each published once
    for view, who, share_of_logits in sides:
        model = run.shards.publish(who)
        if who not in heads:  # the model is freed before the student's pass
            heads[who] = model.lm_head.weight.clone()
        for micro in micros:
            hidden = response_hidden(model, micro.prompts[view], micro.rollout)  # (N, T, D)
            micro.sides[view].append((hidden[micro.rollout.mask], heads[who], share_of_logits))
    run.method.survey(run, micros)


def teacher_rate(settings: Settings) -> float:
    """How far the teacher follows the student after a step; 0: a frozen one (paper, Table 3)."""
    return {"ema": settings.ema_rate, "current": 1.0}.get(settings.teacher, 0.0)


def learning_rate(step: int, settings: Settings) -> float:
    """Share of --lr at a step (0, 1, ..): linear warm-up from 1 / warmup, then constant, or a
    cosine down to 10%."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def micros_to_train_on(micros: list[Micro], device) -> list[Micro]:
    """The micro-batches with responses to train on, only these in their masks; and as many more,
    emptied, as the rank with the most has: every rank makes as many passes."""
    for micro in micros:
        micro.rollout.mask &= micro.keep[:, None]
    micros = sorted(micros, key=lambda micro: not micro.keep.any())  # stable: emptied ones last
    filled = sum(bool(micro.keep.any()) for micro in micros)
    most = over_ranks([filled], device, dist.ReduceOp.MAX)[0]
    return micros[: int(most)]


def stop_if_not_finite(step: int, loss: float, norm: float, micros: list[Micro]) -> None:
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(
            f"Step {step + 1}: loss {loss}, gradient norm {norm}. Nothing was updated. This rank's "
            f"samples: {[row.id for micro in micros for row in micro.rows]}. Look at them, then "
            "resume from the last checkpoint."
        )


# -------------------------------------------------------------------------------------------- data


def share_of_step(run: Run, step: int, seed: int) -> list[list[int]]:
    """This rank's micro-batches of a step: row numbers."""
    settings = run.settings
    batch = batch_rows(len(run.rows), settings.prompts, seed, step)
    mine = settings.prompts // run.world
    if settings.method == "dapo":  # whose select counts in the batch's order
        places = range(run.rank * mine, (run.rank + 1) * mine)
    else:
        sizes = [run.rows[j].bytes for j in batch]
        places = deal(sizes, run.rank, run.world)
    size = settings.micro_prompts
    return [[batch[place] for place in places[i : i + size]] for i in range(0, mine, size)]


def micros_from(run: Run, begin: int) -> Iterator[list[int]]:
    """This rank's micro-batches from step `begin` on."""
    for step in range(begin, run.settings.steps):
        yield from share_of_step(run, step, run.settings.seed)


def check_rows(run: Run, begin: int) -> None:
    """Name a bad row or image before the run, and not in hours: of the first 20,000 (ours: some
    seconds) that this rank trains on, images by their headers. Raises ValueError."""
    for j in islice(chain.from_iterable(micros_from(run, begin)), 20_000):
        row = run.rows[j]
        refuse_unfit(run.settings.method, [row])
        for view, _ in shown_views(run.settings).values():
            list(map(image_size, row.shown(view.image)))
            refuse_special_tokens(run.processor, view.text(row))


def load_ahead(run: Run, begin: int) -> Iterator:
    """This rank's encoded micro-batches from step `begin` on, in order, read and encoded by
    --workers."""
    settings = run.settings
    ahead = None
    if settings.workers:  # a step's
        prompts = run.world * settings.micro_prompts * settings.workers
        ahead = max(2, math.ceil(settings.prompts / prompts))
    loader = torch.utils.data.DataLoader(
        EncodedMicros(run),
        sampler=micros_from(run, begin),
        batch_size=None,
        num_workers=settings.workers,
        prefetch_factor=ahead,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=outlive_sigterm,
    )
    batches = iter(loader)
    try:
        yield from batches
    except RuntimeError as error:  # a worker was killed
        raise OSError(
            f"A process that reads images has ended: {error}. If memory ran out, lower --workers; "
            "then start the same command again."
        ) from error
    finally:
        if settings.workers:  # they outlive SIGTERM, and so the end of the interpreter
            batches._shutdown_workers()


# --------------------------------------------------------------------------------------------- run


def read_rows(settings: Settings) -> Sequence[Triplet]:
    """The rows of --data. Raises ValueError where they cannot give what is asked for."""
    rows = open_triplets(fetch_triplets(settings.data))
    if len(rows) < settings.prompts:
        raise ValueError(
            f"{settings.data} has {len(rows)} triplets, fewer than one batch. Lower --prompts "
            f"({settings.prompts})."
        )
    return rows


def claim_folder(settings: Settings, rows: list[Triplet], weights: str) -> None:
    """Make --out this run's, or say whose it is."""
    out = Path(settings.out)
    done = newest_step(out)
    if done > settings.steps:
        raise ValueError(
            f"{out} is at step {done} already, past --steps {settings.steps}. Raise --steps, or "
            "choose another --out."
        )
    digest = rows_digest(rows, METHODS[settings.method].needs_answers)
    free = FREE - {"steps"} if settings.schedule == "cosine" else FREE
    claim(out, done > 0, {**asdict(settings), "rows_sha256": digest, "weights": weights}, free)


def prepare(settings: Settings, rank: int, world: int, device: torch.device) -> tuple[Run, int]:
    """Load data, model and, if there is one, the checkpoint to resume from: the run, its step."""
    if rank == 0:  # downloads and unpacks, onto a shared disk
        fetch_triplets(settings.data)
    dist.barrier()
    rows = read_rows(settings)
    settings.steps = settings.steps or len(rows) // settings.prompts
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, processor = load(settings.model, device=device, dtype=dtype)
    if rank == 0:
        claim_folder(settings, rows, fingerprint(model))
    shards = Shards(
        model,
        lr=settings.lr,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        copy_stays=settings.compile,
    )
    method = METHODS[settings.method](settings)
    run = Run(settings, method, rows, processor, shards, rank, world, device)
    begin = resume(Path(settings.out), shards)
    check_rows(run, begin)
    if begin != over_ranks([begin], device, dist.ReduceOp.MIN)[0]:
        raise ValueError(
            f"rank {rank} finds step {begin} in {settings.out}, another an earlier one. "
            "--out must lie on a disk that all machines share."
        )
    if rank == 0:
        introduce(run, begin)
    return run, begin


def train(settings: Settings, rank: int, world: int, device: torch.device, probe=None) -> Path:
    """The run: load, resume, step, log, save. Returns the final checkpoint's folder.

    probe(student, processor) gives further figures to log with a checkpoint.
    """
    run, begin = prepare(settings, rank, world, device)
    out = Path(settings.out)
    lines = settings.show_every if settings.toy else 1
    log = RunLog(out, begin, settings.steps, lines, settings.track) if rank == 0 else None
    before = time.perf_counter()
    with closing(load_ahead(run, begin)) as batches, SaveOnSigterm(device) as stop:
        for step in range(begin, settings.steps):
            entry, shown = learn(run, step, list(islice(batches, run.micros_a_step)))
            now = time.perf_counter()
            entry["other_s"] = now - before - entry["gen_s"] - entry["teach_s"] - entry["learn_s"]
            before = now
            last = step + 1 == settings.steps
            saves = stop.asked() or last or (step + 1) % settings.save_every == 0
            if saves and probe:
                entry |= probe(run.shards.publish("student"), run.processor)
            if log:
                log.write(entry, shown)
            if saves:
                save_checkpoint(out, step + 1, run.processor, run.shards)
            if saves and log and not last:  # else main writes them
                write_reports(out)
            stop.obey(step + 1)
    return out / f"checkpoint-{settings.steps:06d}"


# ------------------------------------------------------------------------------------ command line


def parse(argv: list[str] | None = None) -> Settings:
    argv = sys.argv[1:] if argv is None else argv
    parser = settings_parser(Settings, __doc__)
    model, data = "Qwen/Qwen3.5-4B", "yuanqianhao/Vision-OPD-6K"
    if "--toy" in argv:
        from toy.demonstration import BASE, RUN

        parser.set_defaults(**RUN)
        model, data = BASE, None
    settings = Settings(**vars(parser.parse_args(argv)))
    if settings.retrain_base:
        model = f"{settings.out}/base"
    data = data or f"{settings.out}/data"
    settings.out = os.path.normpath(settings.out)
    settings.model = os.path.normpath(settings.model or model)
    settings.data = os.path.normpath(settings.data or data)
    method = METHODS[settings.method]
    settings.teacher = settings.teacher or method.default_teacher
    settings.divergence = settings.divergence or method.default_divergence
    refuse_idle(parser, argv, flags_with_effect(settings), f"with {described(settings)}")
    reason = why_not(settings)
    if reason:
        parser.error(reason)
    return settings


def main(argv: list[str] | None = None) -> None:
    settings = parse(argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if settings.plan:
        if os.environ.get("RANK", "0") == "0":
            from plan import describe_run

            print(describe_run(settings, read_rows(settings), list(shown_views(settings).values())))
        return
    rank, world, device = join_ranks(settings.device)
    probe = None
    if rank == 0:
        hold(Path(settings.out))
    if settings.toy:
        from toy import demonstration

        probe = demonstration.probe
        if rank == 0:
            demonstration.begin(settings, device)
    dist.barrier()
    final = train(settings, rank, world, device, probe)
    if rank == 0:
        if settings.toy:
            demonstration.end(settings, final, device)
        print(f"model: {final}   page: {write_reports(Path(settings.out))}")
        if settings.push:
            upload(final, settings.push)
    dist.barrier()
    dist.destroy_process_group()  # not after an error: it could block


if __name__ == "__main__":
    script.run(main)
