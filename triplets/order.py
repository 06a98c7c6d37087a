"""Which rows a step trains on, and how ranks share them: functions of (seed, step) alone."""

from functools import lru_cache

import torch


def batch_rows(
    n: int,
    prompts: int,
    seed: int,
    step: int,
) -> list[int]:
    """Row numbers of a step: epochs are shuffled, each one's last incomplete batch is dropped."""
    epoch, index = divmod(step, n // prompts)
    first = index * prompts
    order = epoch_order(n, seed, epoch)
    return order[first : first + prompts].tolist()


@lru_cache(2)
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=generator)


def deal(sizes: list[int], rank: int, world: int) -> list[int]:
    """This rank's places in a batch, in their order. They are dealt out by size, largest first,
    back and forth, so that each rank gets as many and about as much."""
    by_size = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    period = 2 * world
    forth = by_size[rank::period]
    back = by_size[period - 1 - rank :: period]
    return sorted(forth + back)
