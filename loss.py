"""The distillation loss: top-K divergence between teacher and student, token by token (paper, Eq. 3 and 4).

    divergence(student_logits, teacher_logits)                  the equation on full logits: read this one first
    value_and_slope(log_s, log_t, beta, kind)                   its cases: add another one here
    topk_divergence(hidden, head, [(hidden, head, 1.0)], w)     the same from hidden states, with its gradient: train.py's

Both compare the student's K likeliest tokens one by one and everything else as one tail bucket. The second never holds
more than `chunk` tokens' logits: at V = 248,320 a thousand tokens of fp32 logits are 1 GB, of student and teacher each,
and autograd would keep several copies. tests/test_loss.py holds the two together.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KINDS = ("jsd", "forward_kl", "reverse_kl")
LOG_ZERO = -1e30  # stands for log 0: finite, so that 0 log 0 is 0 and never inf - inf
TAIL_LIMIT = -1e-7  # the top K hold at most exp(this): the tail keeps 1e-7 (official code)


def check_options(kind: str, beta: float, k: int, chunk: int = 1) -> None:
    if kind not in KINDS:
        raise ValueError(f"divergence is {kind!r}, expected one of {', '.join(KINDS)}.")
    if not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}, expected a number strictly between 0 and 1: at its ends the JSD is 0 everywhere. "
            "For a KL divergence ask for 'forward_kl' or 'reverse_kl'."
        )
    if k < 1 or chunk < 1:
        raise ValueError(
            f"k is {k} and chunk is {chunk}, expected both to be at least 1 (the paper's k is 100)."
        )


def with_tail(log_p: Tensor, vocab: int) -> Tensor:
    """Append the log-probability of all other tokens together, log(1 - sum_k p_k), to the (n, K) log-probabilities `log_p`.

    Returns (n, K + 1); K = vocab leaves nothing for a tail: (n, K). Probabilities of 0 become exp(LOG_ZERO).
    """
    if log_p.shape[-1] < vocab:
        log_top = log_p.logsumexp(-1, keepdim=True).clamp(max=TAIL_LIMIT)  # (n, 1)
        log_p = torch.cat([log_p, torch.log(-torch.expm1(log_top))], dim=-1)  # (n, K + 1)
    return log_p.clamp(min=LOG_ZERO)


def value_and_slope(log_s: Tensor, log_t: Tensor, beta: float, kind: str) -> tuple[Tensor, Tensor]:
    """`divergence` of given log-probabilities (n, K + 1): its value (n,) and dD / dlog_s (n, K + 1), all entries independent."""
    s, t = log_s.exp(), log_t.exp()
    if kind == "forward_kl":
        return (t * (log_t - log_s)).sum(-1), -t
    if kind == "reverse_kl":
        slope = s * (log_s - log_t)
        return slope.sum(-1), slope + s
    if kind == "jsd":
        log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
        slope = (
            (1 - beta) * s * (log_s - log_m)
        )  # the derivatives through log_m, -(1 - beta) s in all, cancel (s log s)'s + s
        return beta * (t * (log_t - log_m)).sum(-1) + slope.sum(-1), slope
    raise ValueError(f"divergence {kind!r} has no case here: its value, and its slope.")


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int = 100,
    beta: float = 0.5,
    kind: str = "jsd",
) -> Tensor:
    """Per-token divergence over the student's k likeliest tokens and one tail bucket (paper, Eq. 3).

        jsd          beta KL(T || M) + (1 - beta) KL(S || M),   M = beta T + (1 - beta) S
        forward_kl   KL(T || S)
        reverse_kl   KL(S || T)

    student_logits, teacher_logits: (n, V), any float dtype. k = V - 1: the tail is the last token. k >= V: no tail.
    Returns (n,) in fp32 (float64 for float64 logits). No gradient flows to the teacher.
    """
    check_options(kind, beta, k)
    vocab, dtype = (
        student_logits.shape[-1],
        torch.promote_types(student_logits.dtype, torch.float32),
    )
    log_s = student_logits.log_softmax(-1, dtype=dtype)  # (n, V)
    log_t = teacher_logits.detach().log_softmax(-1, dtype=dtype)  # (n, V)
    idx = log_s.detach().topk(min(k, vocab), dim=-1).indices  # (n, K)
    log_s, log_t = (
        with_tail(log_s.gather(-1, idx), vocab),
        with_tail(log_t.gather(-1, idx), vocab),
    )  # (n, K + 1)
    return value_and_slope(log_s, log_t, beta, kind)[0]  # autograd needs no slope


def log_probs(logits: Tensor, peak: Tensor, idx: Tensor, exp: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits) at idx, (c, K), and the normaliser (c, 1); leaves exp(logits - peak), (c, V), in the buffer `exp`."""
    peak = peak.to(exp.dtype)  # (c, 1)
    total = torch.sub(logits, peak, out=exp).exp_().sum(-1, keepdim=True)  # (c, 1)
    return logits.gather(-1, idx).to(exp.dtype) - peak - total.log(), total


class _TopKDivergence(torch.autograd.Function):
    """Values and gradients in one go, a chunk of tokens at a time; `backward` only scales what `forward` has computed.

    With h = dD / dlog_s over the K + 1 events, H = sum(h), and the tail's log-probability a function of the others, the
    chain rule through log-softmax gives      dD/dz_j = h_j - p_j H                        for j in the top K
                                              dD/dz_j = p_j (h_tail / p_tail - H)          for every other token
    that is the usual  scatter(g) - p sum(g)  without its cancellation. Where the tail is clamped, h_tail counts as 0.
    """

    @staticmethod
    def forward(ctx, hidden, head, teachers, weights, k, beta, kind, chunk, with_grad):
        vocab, dtype = len(head), torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(dtype)
        per_token, agree = torch.zeros_like(weights), torch.zeros_like(weights, dtype=torch.bool)
        d_hidden = (
            torch.zeros_like(hidden) if with_grad and ctx.needs_input_grad[0] else None
        )  # (n, D)
        rows = weights.nonzero().squeeze(-1)  # (tokens that count,), the one sync
        fresh = torch.empty_like if len(rows) else torch.zeros_like
        d_head = (
            fresh(head, dtype=dtype) if with_grad and ctx.needs_input_grad[1] else None
        )  # (V, D)
        size = (min(chunk, len(rows)), vocab)
        buffers = (
            head.new_empty(size),
            teachers[0][1].new_empty(size),
            head.new_empty(size, dtype=dtype),
        )
        for number, r in enumerate(rows.split(chunk)):  # (c,)
            x, (student, teacher, exp) = hidden[r], (b[: len(r)] for b in buffers)  # (c, D), (c, V)
            top, idx = torch.mm(x, head.t(), out=student).topk(k)  # (c, K)
            for i, (teacher_hidden, teacher_head, coefficient) in enumerate(teachers):
                teacher.addmm_(
                    teacher_hidden[r], teacher_head.t(), beta=float(i > 0), alpha=coefficient
                )
            log_t, _ = log_probs(teacher, teacher.amax(-1, keepdim=True), idx, exp)
            log_s, total = log_probs(
                student, top[:, :1], idx, exp
            )  # exp / total is the student's p
            agree[r] = log_t.argmax(-1) == 0  # topk sorts: 0 is the likeliest
            log_s, log_t = with_tail(log_s, vocab), with_tail(log_t, vocab)  # (c, K + 1)
            per_token[r], slope = value_and_slope(log_s, log_t, beta, kind)
            if d_hidden is None and d_head is None:
                continue

            slope *= weights[r, None]
            slope[:, k:] *= (
                log_s[:, :k].logsumexp(-1, keepdim=True) <= TAIL_LIMIT
            )  # nothing to do if k = V
            p, slope_sum = log_s.exp(), slope.sum(-1, keepdim=True)
            ratio = (slope[:, k:] / p[:, k:]).sum(-1, keepdim=True)  # (c, 1), 0 if k = V
            torch.mul(
                exp, (ratio - slope_sum) / total, out=student
            )  # student's logits become dlogits
            student.scatter_(-1, idx, (slope - p * slope_sum)[:, :k].to(student.dtype))
            if d_hidden is not None:
                d_hidden[r] = student @ head
            if (
                d_head is not None and head.is_cuda and head.dtype != dtype
            ):  # bf16 in, fp32 out, no copy
                torch.addmm(
                    d_head, student.t(), x, out_dtype=dtype, beta=float(number > 0), out=d_head
                )
            elif d_head is not None:
                d_head.addmm_(
                    student.t().to(dtype), x.to(dtype), beta=float(number > 0)
                )  # the first one overwrites
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(per_token, agree)
        return (weights * per_token).sum(), per_token, agree

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        # in place, d_head being gigabytes; autograd notices and refuses a second backward through the same graph
        grads = [g if g is None else g.mul_(d_loss) for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None, None, None


def topk_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teachers: list[tuple[Tensor, Tensor, float]],
    weights: Tensor,
    *,
    k: int = 100,
    beta: float = 0.5,
    kind: str = "jsd",
    chunk: int = 512,
    agreement: bool = False,
) -> tuple[Tensor, ...]:
    """sum_i weights_i D_i from final hidden states and language-model heads, without ever holding all logits.

    student_hidden   (n, D) at the positions that predict the tokens; student_head (V, D), same dtype
    teachers         [(hidden (n, Di), head (V, Di), coefficient)]: teacher logits = sum of coefficient * hidden @ head.T.
                     One with 1.0, or the trust-region teacher's [(.., .., 1 - a), (.., .., a)]. They get no gradient.
    weights          (n,), for a global token mean 1 / tokens in the whole batch. A token of weight 0 is skipped: no work,
                     no gradient, per_token 0, whatever its hidden states hold.
    chunk            tokens whose logits exist at once; changes memory and speed, never results

    Returns loss, scalar fp32, and per_token (n,) fp32 without gradient (float64 for float64 inputs); with `agreement` also
    (n,) bool: whether, among the student's top k, teacher and student prefer the same token. D_i, k, beta, kind: see `divergence`.
    Matmuls run in the heads' dtype, everything else in fp32. Memory: dhidden, dhead in fp32, and three (chunk, V) buffers.
    Both gradients are ready when this returns; the loss can be backpropagated once.
    """
    check_options(kind, beta, k, chunk)
    if not teachers:
        raise ValueError("teachers is empty, expected at least one (hidden, head, coefficient).")
    sides = [("student", student_hidden, student_head)]
    sides += [(f"teachers[{i}]", hidden, head) for i, (hidden, head, _) in enumerate(teachers)]
    n, vocab = len(student_hidden), len(student_head)
    for name, hidden, head in sides:
        if (
            hidden.ndim != 2
            or head.ndim != 2
            or hidden.shape[1] != head.shape[1]
            or (len(hidden), len(head)) != (n, vocab)
        ):
            raise ValueError(
                f"{name}: hidden is {tuple(hidden.shape)} and head is {tuple(head.shape)}, expected ({n}, D) and "
                f"({vocab}, D). Flatten to one row per token, and use heads of one vocabulary."
            )
        if hidden.dtype != head.dtype or name != "student" and head.dtype != teachers[0][1].dtype:
            raise ValueError(
                f"{name}: hidden is {hidden.dtype} and head is {head.dtype}, expected one dtype, the same for all "
                "teachers. Cast one of them."
            )
    if weights.shape != (n,):
        raise ValueError(
            f"weights is {tuple(weights.shape)}, expected ({n},): one weight per row of the hidden states."
        )
    loss, per_token, agree = _TopKDivergence.apply(
        student_hidden,
        student_head,
        teachers,
        weights,
        min(k, vocab),
        beta,
        kind,
        chunk,
        torch.is_grad_enabled(),
    )
    return (loss, per_token, agree) if agreement else (loss, per_token)
