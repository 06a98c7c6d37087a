"""Time and memory of the loss with its gradient, each contender in a process of its own so that
peaks can be compared.

    # a few minutes on two CPU cores, about 12 GB
    python tests/bench.py loss --tokens 256
    python tests/bench.py loss --device cuda                              # 8,192 tokens in bfloat16

The yardstick is the four matmuls nobody can avoid, unchunked, into memory that is already there:
student logits, teacher logits, dhidden, dW. `peak` is what comes on top of the inputs (hidden
states and heads), gradients included.
"""

import json
import math
import resource
import subprocess
import sys
import time

import torch

from loss import divergence, topk_divergence
from methods import tilted


def matmuls(args, hidden, head, teacher, teacher_head):
    dtype = torch.promote_types(head.dtype, torch.float32)
    d_head = torch.zeros(head.shape, dtype=dtype, device=head.device)
    student_logits, teacher_logits = hidden.new_empty(2, len(hidden), len(head))

    @torch.no_grad()
    def run():
        torch.mm(hidden, head.t(), out=student_logits)
        torch.mm(teacher, teacher_head.t(), out=teacher_logits)
        student_logits @ head
        if head.is_cuda and head.dtype != dtype:
            torch.addmm(d_head, student_logits.t(), hidden, out_dtype=dtype, out=d_head)
        else:
            d_head.addmm_(student_logits.t().to(dtype), hidden.to(dtype))

    return run


def ours(args, hidden, head, teacher, teacher_head):
    weights = torch.full((len(hidden),), 1 / len(hidden), device=head.device)
    return lambda: topk_divergence(
        hidden, head, [(teacher, teacher_head, 1.0)], weights, chunk=args.chunk
    )[0].backward()


def extra(args, hidden, head, teacher, teacher_head):
    weights = torch.full((len(hidden),), 1 / len(hidden), device=head.device)

    def target(log_s, log_t, log_x, ids):
        return [(tilted(log_t, log_x, 1.0, 0.1), torch.ones_like(log_t[:, 0]))]

    sides = [(teacher, teacher_head, 1.0)]
    how = {"chunk": args.chunk, "extra": sides, "target": target}
    return lambda: topk_divergence(hidden, head, sides, weights, **how)[0].backward()


@torch.no_grad()
def topk(args, hidden, head, teacher, teacher_head):
    logits = hidden[: args.chunk] @ head.t()  # (c, V): one chunk's stand for all
    return lambda: [logits[: len(part)].topk(100) for part in hidden.split(args.chunk)]


def plain(args, hidden, head, teacher, teacher_head):
    return lambda: divergence(hidden @ head.t(), teacher @ teacher_head.t()).mean().backward()


def liger(args, hidden, head, teacher, teacher_head):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=head.is_cuda, chunk_size=args.chunk
    )
    labels = torch.zeros(len(hidden), dtype=torch.long, device=head.device)
    return lambda: jsd(hidden, head, teacher, teacher_head, labels).backward()


def trl(args, hidden, head, teacher, teacher_head):
    from trl.experimental.gkd import GKDTrainer

    return lambda: GKDTrainer.generalized_jsd_loss(
        (hidden @ head.t())[None], (teacher @ teacher_head.t())[None]
    ).backward()


CONTENDERS = {  # name: (function, its line in the table, what to install)
    "matmuls": (matmuls, "four bare matmuls", ""),
    "ours": (ours, "loss.py, topk_divergence (1)", ""),
    "extra": (extra, "  with an extra view and a tilt", ""),
    "topk": (topk, "  of which topk", ""),
    "plain": (plain, "loss.py, divergence + autograd (1)", ""),
    "liger": (liger, "Liger-Kernel, LigerFusedLinearJSDLoss (2)", "liger-kernel"),
    "trl": (trl, "TRL, generalized_jsd_loss + autograd (3)", "trl accelerate"),
}

NOTES = """
(1) JSD over the student's top 100 and a tail, logsumexp in fp32
(2) JSD over the whole vocabulary, no top-k, softmax in the heads' dtype;
    chunked, same chunk as ours; compiled on a GPU only
(3) JSD over the whole vocabulary, no top-k, softmax in the heads' dtype; full logits"""


def draw(args, tokens, vocab, width):
    """What a contender is given: hidden states (tokens, width) and a head (vocab, width) of the
    student, which get gradients, and of the teacher."""
    dtype, shapes = getattr(torch, args.dtype), [(tokens, width), (vocab, width)] * 2
    sides = [torch.randn(shape, dtype=dtype, device=args.device) for shape in shapes]
    for head in sides[1::2]:
        head.mul_(0.02)
    for student in sides[:2]:
        student.requires_grad_()
    return sides


def timed(run, args, clock=time.perf_counter):
    """Seconds of a run."""
    device = torch.get_device_module(args.device)
    device.synchronize()
    start = clock()
    run()
    device.synchronize()
    return clock() - start


def measure(args):
    """Runs one contender in this process and prints {"seconds", "bytes"} as JSON, or {"missing"}
    if it is not installed."""

    def peak():
        if args.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    prepare, _, _ = CONTENDERS[args.only]
    torch.manual_seed(0)
    try:  # imports and thread pools: not what is measured
        prepare(args, *draw(args, 8, 256, 16))()
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    sides, seconds = draw(args, args.tokens, args.vocab, args.hidden), []
    before = peak()
    run = prepare(args, *sides)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    for _ in range(args.warmup + args.repeats):
        for student in sides[:2]:
            student.grad = None
        seconds.append(timed(run, args, clock))
    print(json.dumps({"seconds": min(seconds[args.warmup :]), "bytes": peak() - before}))


def machine(args):
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads"


def run(args):
    """Prints the table. Returns the time of ours as a multiple of the matmuls', and the GB of ours
    beyond dhidden and the fp32 dhead, if both were measured."""
    print(
        f"\nloss and its gradient, {args.tokens:,} tokens, V = {args.vocab:,}, D = "
        f"{args.hidden:,}, {args.dtype}, {machine(args)}, chunk {args.chunk}, {args.clock} time\n"
    )
    print(f"{'':44} {'time':>10} {'ratio':>7} {'peak':>10}")
    ratio, peak = {}, {}
    floor = math.nan
    for name, (_, line, package) in CONTENDERS.items():
        if name not in ("matmuls", *args.contenders):
            continue
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = "failed: " + (done.stderr.strip().splitlines() or ["killed"])[-1]
            print(f"{line:44} {'out of memory' if 'OutOfMemoryError' in done.stderr else error}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        if "missing" in found:
            print(f"{line:44} not installed: pip install {package}   ({found['missing']})")
            continue
        seconds, peak[name] = found["seconds"], found["bytes"] / 2**30
        if name == "matmuls":
            floor = seconds
        ratio[name] = seconds / floor
        print(
            f"{line:44} {seconds * 1e3:7,.0f} ms {ratio[name]:6.2f}x {peak[name]:7.2f} GB",
            flush=True,
        )
    print(NOTES)
    if not {"matmuls", "ours"} <= ratio.keys():
        return None
    hidden_bytes = args.tokens * getattr(torch, args.dtype).itemsize
    gradients = args.hidden * (hidden_bytes + args.vocab * 4) / 2**30
    return ratio["ours"], peak["ours"] - gradients
