"""Ranks and what they share: live weights on all of them, and on each its part of the fp32 state (master weights, AdamW's
moments, the EMA teacher), with the checkpoints of all that. The update does not depend on the number of ranks.
"""

import json
import math
import os
import resource
import shutil
import sys
import weakref
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import save

BUCKET = 2**26  # most weights that one collective call is about: 134 MB in bf16


# ------------------------------------------------------------------------------------------------------------- ranks


def setup(device: str) -> tuple[int, int, torch.device]:
    """(rank, world, device) from torchrun's environment; plain python is rank 0 of 1."""
    rank, world, local = (
        int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    here = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(here)
    if world > 1:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            device_id=here if device == "cuda" else None,
            timeout=timedelta(hours=6),
        )  # rank 0 may download for long
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


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GB: the GPU's, or on a CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1024 if sys.platform == "linux" else 1)
        / 1e9
    )


# ------------------------------------------------------------------------------------- sharded weights, AdamW and EMA


class Flat:
    """All parameters of a model as views into one vector, and their gradients into another, cut into equal buckets that take one
    collective call each. Rank r owns part r of `world` equal parts of every bucket."""

    def __init__(self, model, rank: int, world: int):
        self.params = list(model.parameters())  # tied weights appear once
        starts = [0]
        for param in self.params:
            starts.append(
                starts[-1] + math.ceil(param.numel() / 64) * 64
            )  # aligned for fast kernels
        self.numel, self.rank, self.world = starts[-1], rank, world
        buckets = math.ceil(self.numel / BUCKET)
        self.part = math.ceil(self.numel / (buckets * world * 64)) * 64
        self.bucket, self.shape = self.part * world, (buckets, world, self.part)
        self.weights = torch.zeros(
            math.prod(self.shape), dtype=self.params[0].dtype, device=self.params[0].device
        )
        self.spans = [
            slice(start, start + param.numel()) for param, start in zip(self.params, starts)
        ]
        for param, span in zip(self.params, self.spans):
            param.data = self.weights[span].view_as(param).copy_(param.data)

    def owned(self) -> Tensor:
        """The live weights that this rank owns: a view, (buckets, part)."""
        return self.weights.view(self.shape)[:, self.rank]

    def publish(self, own: Tensor) -> None:
        """Every rank's `own`, (buckets, part) fp32 -> the live weights of all ranks, whose memory is taken if it was given back."""
        self.allocate(True)
        self.owned().copy_(own)
        for bucket in self.weights.view(self.shape) if self.world > 1 else ():
            dist.all_gather_single(bucket.view(-1), bucket[self.rank])  # in place

    def track_gradients(self, into: Tensor) -> None:
        """From here on gradients are views too, and every backward pass, followed by `reduce`, adds all ranks' sum of them to
        this rank's `into`, (buckets, part) fp32. A bucket is reduced as soon as its gradients are whole: on a GPU beside the
        pass."""
        self.grads, self.into = torch.zeros_like(self.weights), into
        self.side = torch.cuda.Stream(self.weights.device) if self.weights.is_cuda else None
        self.holds = [0] * len(into)  # parameters in each bucket
        for param, span in zip(self.params, self.spans):
            param.grad = self.grads[span].view_as(param)
            within = range(span.start // self.bucket, (span.stop - 1) // self.bucket + 1)
            param.register_post_accumulate_grad_hook(
                partial(Flat.arrived, weakref.proxy(self), within)
            )
            for i in within:
                self.holds[i] += 1
        self.missing = [*self.holds]  # of the buckets that are not reduced yet

    def arrived(self, within: range, param: Tensor) -> None:
        """A parameter's gradient is whole. Buckets are reduced from the last to the first, as a backward pass fills them and in
        one order on all ranks."""
        if within.stop > len(self.missing):
            raise RuntimeError(
                "A backward pass began before `reduce` was called for the last one, or for one that failed."
            )
        for i in within:
            self.missing[i] -= 1
        while self.missing and not self.missing[-1]:
            self.reduce_last()

    def reduce(self) -> None:
        """After a backward pass, or instead of one: the buckets that are left. On a GPU done only after `settle`."""
        while self.missing:
            self.reduce_last()
        self.missing = [*self.holds]

    def reduce_last(self) -> None:
        self.missing.pop()
        grads = self.grads.view(self.shape)[len(self.missing)]  # (world, part): row r is for rank r
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            self.into[len(self.missing)].add_(self.summed(grads))
            grads.zero_()

    def summed(self, grads: Tensor) -> Tensor:
        """Gradients of a bucket, (world, part) -> (part,), all ranks' sum of this one's row. Summed in fp32: a reduce-scatter of
        bf16 gradients would round at every rank."""
        if self.world == 1:
            return grads[0]
        received = torch.empty_like(grads)
        dist.all_to_all_single(received, grads)
        return received.sum(0, dtype=self.into.dtype)

    def settle(self) -> None:
        """What is queued from here on runs after all gradients so far are reduced and cleared."""
        if self.side:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)

    def allocate(self, there: bool) -> None:
        """Give the live weights' memory back, or take it again (contents undefined until the next publish)."""
        self.weights.untyped_storage().resize_(self.weights.nbytes if there else 0)


class State:
    """This rank's fp32 parts, (buckets, part): master weights and their gradient, AdamW's moments, the EMA teacher (paper,
    section 3.3)."""

    def __init__(self, student: Flat, args):
        self.master = torch.nn.Parameter(student.owned().to(torch.float32, copy=True))
        self.master.grad = torch.zeros_like(self.master)
        self.ema = self.master.detach().clone()
        self.adam = torch.optim.AdamW(
            [self.master],
            lr=args.lr,
            betas=(0.9, 0.999),
            eps=args.adam_eps,
            weight_decay=args.weight_decay,
            fused=True,
        )
        self.moments = self.adam.state[self.master] = {
            "step": torch.zeros((), device=self.master.device),
            "exp_avg": torch.zeros_like(self.ema),
            "exp_avg_sq": torch.zeros_like(self.ema),
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"master": self.master.data, "ema": self.ema} | {
            name: self.moments[name] for name in ("exp_avg", "exp_avg_sq")
        }

    def update(self, lr: float, clip: float, ema_rate: float, norm: float) -> None:
        self.master.grad.mul_(min(1.0, clip / (norm + 1e-6)))
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.master.grad.zero_()
        self.ema.lerp_(self.master.data, ema_rate)  # teacher <- (1 - rate) teacher + rate student


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
            weights = {
                name: weight.detach().to("cpu", copy=True)
                for name, weight in student.named_parameters()
            }
            save(student, processor, partial, weights)
            told = {"step": step, "world": flat.world, "numel": flat.numel, "bucket": flat.bucket}
            (partial / "state" / "state.json").write_text(json.dumps(told))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"Could not write {final} ({shutil.disk_usage(out).free / 1e9:.1f} GB free on its disk): {error}. Earlier "
            "checkpoints are whole: make room, then start the same command again."
        ) from error
    barrier()
    if flat.rank == 0:
        partial.rename(final)
        for older in set(out.glob("checkpoint-*/state")) - {final / "state"}:
            shutil.rmtree(older)


def newest_state(out: Path) -> Path | None:
    """state.json of the newest whole checkpoint in `out`, if there is one."""
    return max(out.glob("checkpoint-*/state/state.json"), default=None)


def resume(out: Path, flat: Flat, state: State) -> int:
    """Load the newest whole checkpoint into `state`, re-sliced when the number of ranks changed. Returns its step, or 0."""
    newest = newest_state(out)
    if newest is None:
        if left := sorted(path.name for path in out.glob("checkpoint-*[0-9]")):
            raise ValueError(
                f"{out} holds {', '.join(left)}, but not the state to resume from, which the newest one has. Put "
                "that one back, or choose another --out."
            )
        return 0
    try:
        saved = json.loads(newest.read_text())
    except ValueError as error:
        raise ValueError(
            f"{newest} is damaged ({error}). Put it back, or choose another --out."
        ) from error
    if saved["numel"] != flat.numel or "bucket" not in saved:
        raise ValueError(
            f"{newest.parent} holds the state of {saved['numel']:,} weights, this model has {flat.numel:,}; or older code "
            "wrote it. Resume with the model and code that the run began with, or choose another --out."
        )
    pieces, part = [], saved["bucket"] // saved["world"]  # contiguous then and now
    for i in range(len(state.ema)):
        first = i * flat.bucket + flat.rank * flat.part
        at, stop = first, min(first + flat.part, flat.numel)
        while at < stop:
            bucket, (rank, start) = at // saved["bucket"], divmod(at % saved["bucket"], part)
            length = min(stop - at, part - start)
            pieces.append(
                (
                    rank,
                    bucket,
                    slice(start, start + length),
                    i,
                    slice(at - first, at - first + length),
                )
            )
            at += length
    for old in sorted({rank for rank, *_ in pieces}):
        path = newest.parent / f"{old}-of-{saved['world']}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                for name, own in state.tensors().items():
                    kept = file.get_slice(name)
                    for _, bucket, there, i, here in (piece for piece in pieces if piece[0] == old):
                        own[i, here].copy_(kept[bucket, there])
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}). Put it back, or choose another --out."
            ) from error
    state.moments["step"].fill_(saved["step"])
    return saved["step"]
