"""What the paper compares Vision-OPD with (Tables 2 and 6): the parts in which these methods differ from it. Everything else,
the data, the rollouts, the step, is train.py's. One step of each, as `--method` there:

    method        writes, from          teacher sees               loss of a token
    vision-opd    student, full image   the crop                   divergence to the teacher, or --objective sampled-token
    opsd          student, full image   full image and the answer  the same
    sft           teacher, crop         -                          cross-entropy, on responses that match the label
    grpo, dapo    student, full image   -                          clipped policy gradient, reward 1 for the label
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from benchmarks.scoring import score
from benchmarks.sources import triplet_row
from sharding import total

DISTIL, REWARD = ("vision-opd", "opsd"), ("grpo", "dapo")  # families of methods; the other is sft
OPSD_HINT = (
    "\n\nHere is a reference solution to this problem:\n{answer}\n\nAfter understanding the reference solution, "
    "please try to solve this problem using your own approach below:"
)


# -------------------------------------------------------------------------------------------- which responses are trained on


def grade(args, micro, processor, rows: list[dict]) -> None:
    """Which responses match the label; sft keeps those, dapo the groups that are neither all right nor all wrong (Table 2)."""
    asked = [row for row in map(triplet_row, rows) for _ in range(args.group)]
    right = [
        score(row | {"bench": "", "output": text})["correct"]
        for row, text in zip(asked, micro.rollout.decode(processor.tokenizer))
    ]
    micro.right = torch.tensor(right, device=micro.keep.device)
    groups = micro.right.view(-1, args.group)  # (B, G)
    if args.method == "sft":
        micro.keep = micro.right
        return
    rewards = groups.float()
    if args.method == "dapo":
        lengths, buffer = (
            micro.rollout.mask.sum(1).view_as(groups),
            max(1, args.max_new_tokens // 5),
        )  # a fifth, as in DAPO
        rewards = rewards + overlong_penalty(lengths, args.max_new_tokens, buffer)
        micro.keep = (groups.any(1) & ~groups.all(1)).repeat_interleave(args.group)
    micro.advantages = group_advantages(rewards).flatten()


def fill_up(args, micros: list, flat, further) -> list:
    """DAPO's dynamic sampling: further(1), further(2), .. are this rank's shares of further batches, answered and graded; they
    are drawn until --prompts groups of all ranks are kept. What is over is left out, the last first, whatever the ranks."""
    mine, parts, kept = args.prompts // flat.world, [micros], []
    own, device = slice(flat.rank * mine, (flat.rank + 1) * mine), flat.weights.device
    while True:
        found = [0.0] * args.prompts  # of a batch, which groups are kept
        found[own] = torch.cat([micro.keep[:: args.group] for micro in parts[-1]]).tolist()
        kept.append(total(found, device))
        if sum(map(sum, kept)) >= args.prompts or len(parts) > args.resample:
            break
        parts.append(further(len(parts)))
    kept = torch.tensor(kept, device=device)  # (batches, prompts)
    kept *= kept.flatten().cumsum(0).view_as(kept) <= args.prompts
    for part, chosen in zip(parts, kept[:, own].bool()):
        for micro, some in zip(part, chosen.split([len(micro.numbers) for micro in part])):
            micro.keep = some.repeat_interleave(args.group)
    return sum(parts, [])


def group_advantages(rewards: Tensor) -> Tensor:
    """(reward - mean) / (std + 1e-6) within each prompt's group: (B, G) -> (B, G); 0 where all rewards are 0, or all 1."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's soft penalty: 0 up to limit - buffer tokens, from there linearly down to -1 at `limit`."""
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


# ------------------------------------------------------------------------------------------ losses on the sampled tokens alone


def per_token(args, hidden: Tensor, head: Tensor, micro) -> Tensor:
    """The loss of each token of the responses, (n,). hidden (n, D): the student's; micro: a train.Micro."""
    mask = micro.rollout.mask
    ids = micro.rollout.ids[mask]  # (n,)
    log_s = token_log_probs([(hidden, head, 1.0)], ids, args.chunk)
    if args.method == "sft":
        return -log_s
    if args.method in DISTIL:
        return sampled_token(
            log_s, token_log_probs(micro.target, ids, args.chunk), micro.rollout.log_probs[mask]
        )
    advantages = micro.advantages[:, None].expand_as(mask)[mask]
    high = 0.28 if args.method == "dapo" else 0.2
    return clipped_policy_gradient(
        log_s, log_s.detach(), advantages, 0.2, high
    )  # old = new: a batch is used once


def token_log_probs(
    sides: list[tuple[Tensor, Tensor, float]], ids: Tensor, chunk: int = 512
) -> Tensor:
    """Log-probabilities of the tokens `ids` (n,) under the logits that `sides` give, as `teachers` do in topk_divergence.

    Returns (n,) fp32 (float64 for float64 inputs), differentiable; the logits of one chunk of tokens exist at once, and
    once more in the backward pass. In bf16 the heads' gradients are rounded once a chunk.
    """

    def part(ids: Tensor, *hidden: Tensor) -> Tensor:
        logits = sum(
            coefficient * (h @ head.t()) for h, (_, head, coefficient) in zip(hidden, sides)
        )  # (c, V)
        return -cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), ids, reduction="none"
        )

    parts = zip(ids.split(chunk), *(hidden.split(chunk) for hidden, *_ in sides))
    return torch.cat(
        [
            checkpoint(part, *chunks, use_reentrant=False, preserve_rng_state=False)
            for chunks in parts
        ]
    )


def sampled_token(log_s: Tensor, log_t: Tensor, rollout: Tensor, clip: float = 2.0) -> Tensor:
    """Policy-gradient form of KL(S || T) on the sampled tokens (paper, Table 6): -ratio A with the advantage A = log_t - log_s.

    The importance ratio of the student to the policy that wrote the tokens is cut off at `clip`; neither it nor A has a gradient.
    All (n,) log-probabilities; returns (n,), whose value estimates the KL and whose gradient is -ratio A dlog_s.
    """
    now = log_s.detach()
    return (now - rollout).exp().clamp(max=clip) * (now - log_t.detach()) * (log_s - now).exp()


def clipped_policy_gradient(
    log_s: Tensor, rollout: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = p_student / p_rollout (GRPO: 0.2, 0.2; DAPO: 0.2, 0.28). All (n,)."""
    ratio = (log_s - rollout).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
