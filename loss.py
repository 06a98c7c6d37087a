"""The distillation loss: top-K divergence between teacher and student, token by token (Eq. 3, 4).

    divergence(student_logits, teacher_logits)               the equation on full logits: read first
    DIVERGENCES                                              its cases: add another one here
    topk_divergence(hidden, head, [(hidden, head, 1.)], w)   the same from hidden states, with its
                                                             gradient: what train.py calls

Both compare the student's K likeliest tokens one by one and everything else as one tail bucket. The
second never holds more than `chunk` tokens' logits: at V = 248,320 a thousand tokens of fp32 logits
are 1 GB, of student and teacher each, and autograd would keep several copies. tests/test_loss.py
holds the two together.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG_ZERO = -1e30  # stands for log 0: finite, so that 0 log 0 is 0 and never inf - inf
BLOCK = 128  # neighbours in the vocabulary that `largest` searches together
TAIL_LIMIT = -1e-7  # the top K hold at most exp(this): the tail keeps 1e-7 (official code)

# ------------------------------------------------------------------------------------ divergences
# Of log-probabilities log_s (student) and log_t (teacher) over the same K + 1 events, (n, K + 1):
# the value (n,), and the slope dD / dlog_s (n, K + 1), as if all entries were independent.


def forward_kl(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    t = log_t.exp()
    return (t * (log_t - log_s)).sum(-1), -t


def reverse_kl(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    s = log_s.exp()
    slope = s * (log_s - log_t)
    return slope.sum(-1), slope + s


def jensen_shannon(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    s, t = log_s.exp(), log_t.exp()
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    # The derivatives through log_m are -(1 - beta) s in all, which cancels the s of (s log s)'.
    slope = (1 - beta) * s * (log_s - log_m)
    return beta * (t * (log_t - log_m)).sum(-1) + slope.sum(-1), slope


def soft_forward_kl(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """4 KL(T || S) of both at temperature 2 (VCSD)."""
    log_s, log_t = (log_s / 2).log_softmax(-1), (log_t / 2).log_softmax(-1)
    t = log_t.exp()
    return 4 * (t * (log_t - log_s)).sum(-1), 2 * (log_s.exp() - t)


DIVERGENCES = {
    "jsd": jensen_shannon,
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "soft_forward_kl": soft_forward_kl,
}


# ------------------------------------------------------------------------------------ the equation


def check_options(kind: str, beta: float, k: int, chunk: int = 1) -> None:
    if kind not in DIVERGENCES:
        raise ValueError(f"divergence is {kind!r}, expected one of {', '.join(DIVERGENCES)}.")
    if not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}, expected a number strictly between 0 and 1: at its ends the JSD is 0 "
            "everywhere. For a KL divergence ask for 'forward_kl' or 'reverse_kl'."
        )
    if k < 1 or chunk < 1:
        raise ValueError(f"k is {k} and chunk is {chunk}, expected both to be at least 1.")


def with_tail(log_p: Tensor, vocab: int) -> Tensor:
    """Append the log-probability of all other tokens together, log(1 - sum_k p_k), to the (n, K)
    log-probabilities `log_p`.

    Returns (n, K + 1); K = vocab leaves nothing for a tail: (n, K). Probabilities of 0 become
    exp(LOG_ZERO).
    """
    if log_p.shape[-1] < vocab:
        log_top = log_p.logsumexp(-1, keepdim=True).clamp(max=TAIL_LIMIT)  # (n, 1)
        log_p = torch.cat([log_p, torch.log(-torch.expm1(log_top))], dim=-1)  # (n, K + 1)
    return log_p.clamp(min=LOG_ZERO)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = 100,
    beta: float = 0.5,
    kind: str = "jsd",
) -> Tensor:
    """Per-token divergence over the student's k likeliest tokens and one tail bucket (Eq. 3).

        jsd          beta KL(T || M) + (1 - beta) KL(S || M),   M = beta T + (1 - beta) S
        forward_kl   KL(T || S)
        reverse_kl   KL(S || T)
        soft_forward_kl   4 KL(T || S) of both at temperature 2

    student_logits, teacher_logits: (n, V), any float dtype. k = V - 1: the tail is the last token.
    k >= V: no tail. Returns (n,) in fp32 (float64 for float64 logits). No gradient flows to the
    teacher.
    """
    check_options(kind, beta, k)
    vocab = student_logits.shape[-1]
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_s = student_logits.log_softmax(-1, dtype=dtype)  # (n, V)
    log_t = teacher_logits.detach().log_softmax(-1, dtype=dtype)  # (n, V)
    top = log_s.detach().topk(min(k, vocab), dim=-1).indices  # (n, K)
    log_s = with_tail(log_s.gather(-1, top), vocab)  # (n, K + 1)
    log_t = with_tail(log_t.gather(-1, top), vocab)  # (n, K + 1)
    value, _ = DIVERGENCES[kind](log_s, log_t, beta)  # autograd needs no slope
    return value


# --------------------------------------------------------- the same from hidden states, in chunks


# What the student is pulled toward: log-probabilities over the K + 1 events of student, teacher and
# extra view, (c, K + 1) each, and the K tokens' ids (c, K) -> [(log-probabilities, weight (c,))].
Target = Callable[[Tensor, Tensor, Tensor, Tensor], list[tuple[Tensor, Tensor]]]


@dataclass
class Options:
    """Of a divergence, and of how it is computed."""

    k: int
    beta: float
    kind: str
    chunk: int  # tokens whose logits exist at once
    with_grad: bool  # whether there will be a backward pass
    extra: list  # [(hidden (n, Dx), head (V, Dx), share)]: another view's logits
    target: Target | None  # None: the teacher itself, with weight 1
    teachers_top: bool  # compare the teacher's K likeliest tokens, renormalised, without a tail


class TopKDivergence(torch.autograd.Function):
    """Values and gradients in one go, a chunk of tokens at a time; `backward` only scales what
    `forward` has computed. See `topk_divergence`."""

    @staticmethod
    def forward(ctx, hidden, head, weights, teachers, options):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(dtype)
        rows = weights.nonzero().squeeze(-1)  # (tokens that count,): the one synchronisation
        per_token = torch.zeros_like(weights)
        agree = torch.zeros_like(weights, dtype=torch.bool)
        d_hidden = torch.zeros_like(hidden)  # (n, D)
        d_head = None
        if options.with_grad and ctx.needs_input_grad[1]:
            # The first chunk overwrites it; where there is none, it must not be garbage.
            fresh = torch.empty_like if len(rows) else torch.zeros_like
            d_head = fresh(head, dtype=dtype)  # (V, D)
        size = (min(options.chunk, len(rows)), len(head))
        student_buffer = head.new_empty(size)
        teacher_buffer = teachers[0][1].new_empty(size)

        for number, r in enumerate(rows.split(options.chunk)):  # r (c,)
            x = hidden[r]  # (c, D)
            student = torch.mm(x, head.t(), out=student_buffer[: len(r)])  # (c, V)
            teacher = mixed_logits(teachers, r, teacher_buffer[: len(r)])  # (c, V)
            top, ids = largest(student, options.k)  # (c, K), the likeliest first
            peak = top[:, :1].to(dtype)  # (c, 1)
            total = sum_exp(student, peak)  # (c, 1)
            agree[r] = teacher.gather(-1, ids).argmax(-1) == 0
            if options.teachers_top:
                _, ids = largest(teacher, options.k)
            log_s = student.gather(-1, ids).to(dtype) - peak - total.log()  # (c, K)
            log_s = events(log_s, len(head), options)  # (c, K + 1)
            log_t = events(log_probs(teacher, ids), len(head), options)  # (c, K + 1)
            log_x = None
            if options.extra:  # the teacher's logits are not needed any more
                extra = mixed_logits(options.extra, r, teacher_buffer[: len(r)])
                log_x = events(log_probs(extra, ids), len(head), options)  # (c, K + 1)
            per_token[r], slope = pull(log_s, log_t, log_x, ids, options)
            if not options.with_grad:
                continue
            slope *= weights[r, None]
            d_logits = logits_gradient(slope, log_s, student, peak, total, ids)  # in its place
            d_hidden[r] = d_logits @ head
            if d_head is not None:
                add_head_gradient(d_head, d_logits, x, first=number == 0)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(per_token, agree)
        return (weights * per_token).sum(), per_token, agree

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        # In place, d_head being gigabytes; autograd notices a second backward and refuses it.
        grads = [g if g is None else g.mul_(d_loss) for g in ctx.saved_tensors]
        return *grads, None, None, None


def events(log_p: Tensor, vocab: int, options: Options) -> Tensor:
    """Log-probabilities at K tokens, (c, K), as those of K + 1 events; or renormalised, (c, K)."""
    return log_p.log_softmax(-1) if options.teachers_top else with_tail(log_p, vocab)


def pull(log_s, log_t, log_x, ids, options: Options) -> tuple[Tensor, Tensor]:
    """The value (c,) and its slope dD / dlog_s (c, K + 1): of the teacher's divergence, or the sum
    over the targets that are made of it."""
    divergence = DIVERGENCES[options.kind]
    if options.target is None:
        return divergence(log_s, log_t, options.beta)
    value, slope = 0.0, 0.0
    for log_q, weight in options.target(log_s, log_t, log_x, ids):
        each, its_slope = divergence(log_s, log_q, options.beta)
        value = value + weight * each
        slope = slope + weight[:, None] * its_slope
    return value, slope


def mixed_logits(teachers: list[tuple], rows: Tensor, out: Tensor) -> Tensor:
    """The sum of share * hidden[rows] @ head.T over `teachers`, (c, V), in the buffer `out`."""
    for i, (hidden, head, share) in enumerate(teachers):
        out.addmm_(hidden[rows], head.t(), beta=0.0 if i == 0 else 1.0, alpha=share)
    return out


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`logits.topk(k)`, values and ids (c, k), of the (c, V) logits.

    The k blocks with the largest peaks hold the k largest logits. To find the peaks reads all
    logits once; topk of all would read them several times.
    """
    count = logits.shape[-1] // BLOCK
    if logits.shape[-1] % BLOCK or count < 2 * k:
        return logits.topk(k)
    blocks = logits.unflatten(-1, (count, BLOCK))  # (c, V / BLOCK, BLOCK)
    near = blocks.amax(-1).topk(k).indices  # (c, k)
    candidates = blocks.gather(1, near[..., None].expand(-1, -1, BLOCK))  # (c, k, BLOCK)
    top, at = candidates.flatten(1).topk(k)
    return top, near.gather(1, at // BLOCK) * BLOCK + at % BLOCK


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits) at ids, (c, K), in at least fp32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    peak = logits.amax(-1, keepdim=True).to(dtype)  # (c, 1)
    return logits.gather(-1, ids).to(dtype) - peak - sum_exp(logits, peak).log()


def one_kernel(function: Callable) -> Callable:
    """On a GPU `function` is compiled: its operations one by one would each read and write all
    logits, which takes longer than a matmul. (TORCHDYNAMO_DISABLE=1 switches that off.)"""

    @functools.cache
    def compiled() -> Callable:
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def either(logits: Tensor, *others: Tensor) -> Tensor:
        return (compiled() if logits.is_cuda else function)(logits, *others)

    return either


@one_kernel
def sum_exp(logits: Tensor, peak: Tensor) -> Tensor:
    """The sum of exp(logits - peak) over the vocabulary, (c, 1), in the dtype of peak (c, 1)."""
    return (logits - peak).exp_().sum(-1, keepdim=True)


@one_kernel
def scale_exp_(logits: Tensor, peak: Tensor, scale: Tensor) -> Tensor:
    """scale * exp(logits - peak), computed in the dtype of peak and scale (c, 1), in place of the
    logits (c, V)."""
    return logits.copy_((logits - peak).exp_().mul_(scale))


def logits_gradient(slope, log_s, logits, peak, total, ids) -> Tensor:
    """d loss / d logits, (c, V), in place of the student's logits, from the slope
    h = d loss / dlog_s over the K + 1 events.

    With H = sum(h), and the tail's log-probability a function of the others, the chain rule through
    log-softmax gives
        h_j - p_j H                      for j in the top K
        p_j (h_tail / p_tail - H)        for every other token
    which is the usual scatter(h) - p H without its cancellation. Where the tail is clamped, h_tail
    counts as 0. p = exp(logits - peak) / total.

    Without a tail there is no other token, or its gradient is 0: the top K are renormalised.
    """
    k = ids.shape[-1]
    log_top = log_s[:, :k].logsumexp(-1, keepdim=True)
    slope[:, k:].masked_fill_(log_top > TAIL_LIMIT, 0.0)  # nothing to do without a tail
    p, slope_sum = log_s.exp(), slope.sum(-1, keepdim=True)
    if slope.shape[-1] > k:
        scale_exp_(logits, peak, (slope[:, k:] / p[:, k:] - slope_sum) / total)
    else:
        logits.zero_()
    return logits.scatter_(-1, ids, (slope - p * slope_sum)[:, :k].to(logits.dtype))


def add_head_gradient(d_head: Tensor, d_logits: Tensor, x: Tensor, first: bool) -> None:
    """d_head += d_logits.T @ x, or = for the first chunk; (V, D) fp32, from (c, V) and (c, D)."""
    beta = 0.0 if first else 1.0
    if x.is_cuda and x.dtype != d_head.dtype:  # bf16 in, fp32 out, without a copy
        torch.addmm(d_head, d_logits.t(), x, out_dtype=d_head.dtype, beta=beta, out=d_head)
    else:
        d_head.addmm_(d_logits.t().to(d_head.dtype), x.to(d_head.dtype), beta=beta)


def topk_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teachers: list[tuple[Tensor, Tensor, float]],
    weights: Tensor,
    *,
    k: int = 100,
    beta: float = 0.5,
    kind: str = "jsd",
    chunk: int = 1024,
    agreement: bool = False,
    extra: list[tuple[Tensor, Tensor, float]] = (),
    target: Target | None = None,
    teachers_top: bool = False,
) -> tuple[Tensor, ...]:
    """sum_i weights_i D_i from final hidden states and language-model heads, without ever holding
    all logits.

    student_hidden   (n, D) at the positions that predict the tokens
    student_head     (V, D), of the same dtype
    teachers         [(hidden (n, Di), head (V, Di), share)]: the teacher's logits are the sum of
                     share * hidden @ head.T. One with 1.0, or the trust-region teacher's two with
                     1 - a and a. They get no gradient.
    weights          (n,), for a global token mean 1 / tokens in the whole batch. A token of weight
                     0 is skipped: no work, no gradient, per_token 0, whatever its hidden states.
    chunk            tokens whose logits exist at once: changes memory and speed, never results
    extra            another view's hidden states and head, as `teachers`; no gradient either
    target           what the student is pulled toward instead of the teacher: see `Target`. Then
                     D_i is the sum over its (log q, w) of w D(Q || S).
    teachers_top     compare the teacher's k likeliest tokens, renormalised and without a tail

    Returns loss, scalar fp32, and per_token (n,) fp32 without gradient (float64 for float64
    inputs); with `agreement` also (n,) bool: whether, among the student's top k, teacher and
    student prefer the same token. D_i, k, beta, kind: see `divergence`. Matmuls run in the heads'
    dtype, everything else in fp32. Memory: dhidden, dhead in fp32, and two (chunk, V) buffers; on a
    CPU a third, in fp32.
    Both gradients are ready when this returns; the loss can be backpropagated once.
    """
    check_options(kind, beta, k, chunk)
    check_shapes(student_hidden, student_head, [*teachers, *extra], weights)
    trained = student_hidden.requires_grad or student_head.requires_grad
    with_grad = trained and torch.is_grad_enabled()
    options = Options(
        min(k, len(student_head)), beta, kind, chunk, with_grad, extra, target, teachers_top
    )
    loss, per_token, agree = TopKDivergence.apply(
        student_hidden, student_head, weights, teachers, options
    )
    return (loss, per_token, agree) if agreement else (loss, per_token)


def check_shapes(student_hidden: Tensor, student_head: Tensor, teachers, weights: Tensor) -> None:
    if not teachers:
        raise ValueError("teachers is empty, expected at least one (hidden, head, share).")
    n, vocab = len(student_hidden), len(student_head)
    sides = {"student": (student_hidden, student_head, student_head.dtype)}
    for i, (hidden, head, _) in enumerate(teachers):
        sides[f"teachers[{i}]"] = (hidden, head, teachers[0][1].dtype)
    for name, (hidden, head, dtype) in sides.items():
        if hidden.shape != (n, head.shape[-1]) or head.shape != (vocab, hidden.shape[-1]):
            raise ValueError(
                f"{name}: hidden is {tuple(hidden.shape)} and head {tuple(head.shape)}, expected "
                f"({n}, D) and ({vocab}, D): one row a token, one vocabulary."
            )
        if {hidden.dtype, head.dtype} != {dtype}:
            raise ValueError(
                f"{name}: hidden is {hidden.dtype} and head {head.dtype}, expected {dtype} for "
                "both, and one dtype for all teachers. Cast one of them."
            )
    if weights.shape != (n,):
        raise ValueError(f"weights is {tuple(weights.shape)}, expected ({n},): one a token.")
