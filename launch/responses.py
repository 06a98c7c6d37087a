"""What a step logs of the responses that were sampled in it, over all ranks."""

from collections import Counter

import torch

from benchmarks.rows import repeats_itself
from methods import Micro
from sharding import over_ranks


def count_responses(run, micros: list[Micro]) -> Counter:
    """What was sampled in a step, summed over all ranks."""
    count = Counter()
    for micro in micros:
        mask, keep = micro.rollout.mask, micro.keep
        texts = micro.rollout.decode(run.processor.tokenizer)
        count["responses"] += len(keep)
        count["sampled"] += mask.sum()  # tokens, EOS included
        count["ended"] += micro.rollout.ended.sum()  # by themselves
        count["loops"] += sum(map(repeats_itself, texts))
        count["kept"] += keep.sum()  # responses that are trained on
        count["tokens"] += mask[keep].sum()  # and theirs
        count["right"] += 0 if micro.right is None else micro.right.sum()
        for prompt in micro.prompts.values():
            count["shrunk"] += prompt["shrunk"].sum()  # images scaled down
    values = over_ranks([*count.values()], run.device)
    count = Counter(dict(zip(count, values, strict=True)))
    count["length_p95"] = length_p95(run, micros)
    return count


def length_p95(run, micros: list[Micro]) -> int:
    """Tokens that 95% of all ranks' responses have at most."""
    lengths = torch.cat([micro.rollout.mask.sum(1) for micro in micros])
    histogram = torch.bincount(lengths, minlength=run.settings.max_new_tokens + 1)
    shorter = torch.tensor(over_ranks(histogram.tolist(), run.device)).cumsum(0)
    return int((shorter < 0.95 * shorter[-1]).sum())


def lengths(count: Counter) -> dict[str, float]:
    """What a step logs of its responses."""
    ended = count["ended"] / count["responses"]
    return {
        "length": count["sampled"] / count["responses"],
        "length_p95": count["length_p95"],
        "eos": ended,
        "truncated": 1 - ended,
        "loops": count["loops"] / count["responses"],
        "tokens": int(count["tokens"]),
        "shrunk": int(count["shrunk"]),
    }
