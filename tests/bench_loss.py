"""Time and memory of the loss with its gradient, each contender in a process of its own so that
peaks can be compared.

    # a few minutes on two CPU cores, about 12 GB
    python tests/bench.py loss --tokens 256
    python tests/bench.py loss --device cuda                              # 8,192 tokens in bfloat16

The yardstick is the four matmuls nobody can avoid, unchunked, into memory that is already there:
student logits, teacher
logits, dhidden, dW. `peak` is what comes on top of the inputs (hidden states and heads), gradients
included.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loss import divergence, topk_divergence


def matmuls(args, hidden, head, teacher, teacher_head):
    dtype = torch.promote_types(head.dtype, torch.float32)
    d_head = torch.zeros(head.shape, dtype=dtype, device=head.device)
    student_logits, teacher_logits = hidden.new_empty(2, len(hidden), len(head))

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
    "topk": (topk, "  of which topk", ""),
    "plain": (plain, "loss.py, divergence + autograd (1)", ""),
    "liger": (liger, "Liger-Kernel, LigerFusedLinearJSDLoss (2)", "liger-kernel"),
    "trl": (trl, "TRL, generalized_jsd_loss + autograd (3)", "trl accelerate"),
}

NOTES = """(1) JSD over the student's top 100 and a tail, logsumexp in fp32
(2) JSD over the whole vocabulary, no top-k, softmax in the heads' dtype;
    chunked, same chunk as ours; compiled on a GPU only
(3) JSD over the whole vocabulary, no top-k, softmax in the heads' dtype; full logits"""


def measure(args):
    """Runs one contender in this process and prints {"seconds", "bytes"} as JSON, or {"missing"}
    if it is not installed."""
    cuda = args.device == "cuda"

    def peak():
        return (
            torch.cuda.max_memory_allocated()
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )

    def draw(*shape):
        return torch.empty(*shape, dtype=getattr(torch, args.dtype), device=args.device).normal_()

    prepare = CONTENDERS[args.only][0]
    torch.manual_seed(0)
    torch.set_grad_enabled(args.only not in ("matmuls", "topk"))
    try:  # imports and thread pools: not what is measured
        prepare(
            args,
            *(
                draw(*shape).requires_grad_(i < 2)
                for i, shape in enumerate([(8, 16), (256, 16)] * 2)
            ),
        )()
    except ImportError as error:
        return print(json.dumps({"missing": str(error)}))
    hidden, teacher = draw(args.tokens, args.hidden), draw(args.tokens, args.hidden)
    head, teacher_head = (
        draw(args.vocab, args.hidden).mul_(0.02),
        draw(args.vocab, args.hidden).mul_(0.02),
    )
    hidden.requires_grad_(), head.requires_grad_()
    before, seconds = peak(), []
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    run = prepare(args, hidden, head, teacher, teacher_head)
    for _ in range(args.repeats + args.warmup):
        hidden.grad = head.grad = None
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    print(json.dumps({"seconds": min(seconds[args.warmup :]), "bytes": peak() - before}))
    return None


def add_arguments(p):
    p.add_argument("--tokens", type=int, default=1024, help="loss: response tokens")
    p.add_argument("--vocab", type=int, default=248320, help="loss: Qwen3.5's")
    p.add_argument("--hidden", type=int, default=2560, help="loss: Qwen3.5-4B's")
    p.add_argument(
        "--chunk", type=int, default=512, help="loss: tokens at once, for ours and Liger-Kernel"
    )
    p.add_argument(
        "--warmup", type=int, default=0, help="loss: runs that are not timed; 1 or more on a GPU"
    )
    p.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="loss: cpu counts processor seconds; set OMP_NUM_THREADS=1",
    )
    p.add_argument(
        "--contenders",
        nargs="+",
        default=list(CONTENDERS),
        choices=list(CONTENDERS),
        help="loss: compare these",
    )
    p.add_argument(
        "--only", choices=list(CONTENDERS), help="used by the script itself: measure this one here"
    )


def run(args) -> tuple[float, float] | None:
    """Prints the table. Returns the time of ours as a multiple of the matmuls', and the GB of ours
    beyond dhidden and the fp32 dhead, if both were measured."""
    threads = (
        f"{torch.get_num_threads()} threads"
        if args.device == "cpu"
        else torch.cuda.get_device_name()
    )
    print(
        f"\nloss and its gradient, {args.tokens:,} tokens, V = {args.vocab:,}, "
        f"D = {args.hidden:,}, {args.dtype}, {threads}, chunk {args.chunk}, {args.clock} time\n"
    )
    print(f"{'':44} {'time':>10} {'ratio':>7} {'peak':>10}")
    seconds, peak = {}, {}
    for name in ["matmuls"] + [c for c in args.contenders if c != "matmuls"]:
        _, line, package = CONTENDERS[name]
        done = subprocess.run(
            [sys.executable, *sys.argv, "--only", name], capture_output=True, text=True
        )
        if done.returncode:
            error = "failed: " + (done.stderr.strip().splitlines() or ["killed"])[-1]
            print(f"{line:44} {'out of memory' if 'OutOfMemoryError' in done.stderr else error}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        if "missing" in found:
            print(f"{line:44} not installed: pip install {package}   ({found['missing']})")
            continue
        seconds[name], peak[name] = found["seconds"], found["bytes"] / 2**30
        floor = seconds.get("matmuls", float("nan"))
        print(
            f"{line:44} {seconds[name] * 1e3:7,.0f} ms {seconds[name] / floor:6.2f}x "
            f"{peak[name]:7.2f} GB",
            flush=True,
        )
    print(f"\n{NOTES}")
    if {"matmuls", "ours"} <= seconds.keys():
        gradients = (
            args.hidden
            * (args.tokens * getattr(torch, args.dtype).itemsize + args.vocab * 4)
            / 2**30
        )
        return seconds["ours"] / seconds["matmuls"], peak["ours"] - gradients
    return None
