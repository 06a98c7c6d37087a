"""The distributed part: ranks, the sharded student with its optimizer and EMA, checkpoints.

Of every weight a rank holds a slice in fp32, and with it the slices of its gradient, of AdamW's two
moments and of the EMA teacher. torch's FSDP2 (`fully_shard`) gathers a layer's weights while the
student's pass computes it, and sums gradients over the ranks in fp32. Sampling and the teacher use
one plain copy that is whole on every rank, filled for each phase of a step and freed in between:
FSDP's hooks would cost many times a forward for every decoded token.

The update does not depend on the number of ranks. Plain `python` is a group of one rank.
"""

import copy
import os
import resource
import shutil
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from model import shared_layer
from storage.checkpoint import save
from storage.files import flush, numbered

# ------------------------------------------------------------------------------------------ ranks


def join_ranks(device: str) -> tuple[int, int, torch.device]:
    """(rank, world, device) from torchrun's environment; plain python is rank 0 of 1."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    here, backend = torch.device("cpu"), "gloo"
    if device == "cuda":
        here, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "nccl"
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            store=None if "RANK" in os.environ else dist.HashStore(),
            rank=rank,
            world_size=world,
            device_id=here if device == "cuda" else None,
            timeout=timedelta(hours=6),  # rank 0 may download for long
        )
    return rank, world, here


def over_ranks(values: list[float], device, op=dist.ReduceOp.SUM) -> list[float]:
    """Each value summed (or reduced by `op`) over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.tolist()


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in GB: the GPU's, or on a CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1024 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ------------------------------------------------------------------ sharded weights, AdamW and EMA


class Whole(torch.nn.Module):
    """A sharded model's weights are whole only within a forward of its root module. So whatever
    reads them is handed to one: whole(function) returns function(model)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, function):
        return function(self.model)


def shard(model) -> Whole:
    """Cut the weights of `model` into fp32 slices, one a rank, gathered in the model's dtype."""
    policy = MixedPrecisionPolicy(
        param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for layer in model.model.language_model.layers:
        # A layer runs twice, on prompts and on responses: gathered by its own forward, its weights
        # would be freed while the first half still needs them for the backward pass.
        layer.shared = partial(shared_layer, layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(layer, "shared")
    for block in model.model.visual.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    whole = Whole(model)
    fully_shard(whole, mesh=mesh, mp_policy=policy)
    whole.float()
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            # Sums over ranks, not means. Without the second call the sum would be a premultiplied
            # one, which gloo does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return whole


class Shards:
    """This rank's slices of the student, AdamW's moments and the EMA teacher (paper, section 3.3),
    and the plain copy that is filled from them.

    copy_stays: keep the plain copy's memory where it is, as CUDA graphs that read it demand.
    """

    def __init__(self, model, *, lr: float, eps: float, weight_decay: float, copy_stays: bool):
        self.plain = copy.deepcopy(model).requires_grad_(False)  # before its original is cut
        self.copy_stays = copy_stays
        self.published = None
        self.whole = shard(model)
        named = dict(model.named_parameters())  # tied weights appear once
        self.names, self.weights = list(named), list(named.values())
        self.numel = sum(weight.numel() for weight in self.weights)
        self.student = [weight.to_local().detach() for weight in self.weights]  # the same memory
        self.teacher = [slice_.clone() for slice_ in self.student]
        self.adam = torch.optim.AdamW(
            self.student, lr=lr, betas=(0.9, 0.999), eps=eps, weight_decay=weight_decay, fused=True
        )
        for slice_ in self.student:
            self.adam.state[slice_] = {
                "step": torch.zeros((), device=slice_.device),
                "exp_avg": torch.zeros_like(slice_),
                "exp_avg_sq": torch.zeros_like(slice_),
            }
        self.updates = torch.zeros((), device=self.student[0].device)  # fewer than steps: idle ones

    @torch.no_grad()
    def publish(self, who: str):
        """The plain copy of the "student" or the "teacher", put together from all ranks' slices."""
        if self.published != who:
            parts = getattr(self, who)
            if dist.get_world_size() > 1:  # else they are whole
                parts = (part.to(self.plain.dtype).full_tensor() for part in self.sharded(parts))
            for whole, part in zip(self.plain.parameters(), parts, strict=True):
                whole.untyped_storage().resize_(whole.nbytes)
                whole.copy_(part)
            self.published = who
        return self.plain

    def free(self) -> None:
        """Give the plain copy's memory back until it is published again."""
        self.published = None
        if not self.copy_stays:
            for whole in self.plain.parameters():
                whole.untyped_storage().resize_(0)

    def student_pass(self, function):
        """function(student) with the student's weights whole. All ranks make as many passes."""
        if self.published:
            self.free()
        return self.whole(function)

    def gradient_norm(self) -> float:
        """The global norm of the gradients, the same on all ranks."""
        squares = 0.0
        for weight in self.weights:
            if weight.grad is None:  # no pass has used it
                weight.grad = torch.zeros_like(weight)
            norm = torch.linalg.vector_norm(weight.grad.to_local(), dtype=torch.float64)
            squares += norm.square()
        dist.all_reduce(squares)
        return squares.sqrt().item()

    @torch.no_grad()
    def update(self, lr: float, norm: float, clip: float, ema_rate: float) -> None:
        """AdamW on gradients of global norm `norm`, clipped to `clip`; then the EMA teacher."""
        scale = min(1.0, clip / (norm + 1e-6))
        for slice_, weight in zip(self.student, self.weights, strict=True):
            slice_.grad = weight.grad.to_local().mul_(scale)
            weight.grad = None
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        self.updates += 1
        torch._foreach_lerp_(
            self.teacher, self.student, ema_rate
        )  # (1 - rate) teacher + rate student
        self.published = None

    def sharded(self, slices: list[Tensor]) -> list[DTensor]:
        """This rank's slices as torch knows them: parts of whole tensors, like the weights."""
        return [
            DTensor.from_local(
                slice_,
                weight.device_mesh,
                weight.placements,
                shape=weight.shape,
                stride=weight.stride(),
            )
            for slice_, weight in zip(slices, self.weights, strict=True)
        ]

    def tensors(self) -> dict[str, DTensor]:
        """What a run is resumed from beside the number of updates, by name."""
        kinds = {"student": self.student, "teacher": self.teacher}
        for moment in ("exp_avg", "exp_avg_sq"):
            kinds[moment] = [self.adam.state[slice_][moment] for slice_ in self.student]
        named = {}
        for kind, slices in kinds.items():
            for name, tensor in zip(self.names, self.sharded(slices), strict=True):
                named[f"{kind}.{name}"] = tensor
        return named


# ------------------------------------------------------------------------------ checkpoint, resume


def save_checkpoint(out: Path, step: int, processor, shards: Shards) -> None:
    """out/checkpoint-STEP: a model directory, and every rank's slices under state/.

    Written beside, flushed to the disk, then renamed: it is whole or absent, also after a power
    cut. Only then older checkpoints lose their state; they keep their model.
    """
    final, partial = out / f"checkpoint-{step:06d}", out / "checkpoint.partial"
    first = dist.get_rank() == 0
    model = shards.publish("student")
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save({**shards.tensors(), "updates": shards.updates}, checkpoint_id=partial / "state")
        if first:
            save(model, processor, partial)
            flush(partial)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"Could not write {final} ({shutil.disk_usage(out).free / 1e9:.1f} GB free on its "
            f"disk): {last_line(error)}. Earlier checkpoints are whole: make room, then start the "
            "same command again."
        ) from error
    shards.free()
    dist.barrier()
    if first:
        partial.rename(final)
        flush(out, inside=False)
        for older in numbered(out, "checkpoint"):
            if older != final:
                shutil.rmtree(older / "state", ignore_errors=True)


def last_line(error: Exception) -> str:
    """Of an error that may hold a worker's whole traceback."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def newest_step(out: Path) -> int:
    """The step of the newest checkpoint in `out` that a run can go on from, or 0.

    Raises ValueError where later ones have lost their state: theirs would be written over.
    """
    whole = [path for path in numbered(out, "checkpoint") if (path / "state").is_dir()]
    step = int(whole[-1].name[-6:]) if whole else 0
    lost = [path.name for path in numbered(out, "checkpoint") if int(path.name[-6:]) > step]
    if lost:
        raise ValueError(
            f"{out} holds {', '.join(lost)}, but not the state to resume from, which the newest "
            "one has. Put that one back, or choose another --out."
        )
    return step


def resume(out: Path, shards: Shards) -> int:
    """Load the newest whole checkpoint, whatever the number of ranks that wrote it. Returns its
    step, or 0 where there is none."""
    step = newest_step(out)
    if step == 0:
        return 0
    state = out / f"checkpoint-{step:06d}" / "state"
    try:
        dcp.load({**shards.tensors(), "updates": shards.updates}, checkpoint_id=state)
    except (ValueError, KeyError, OSError, dcp.CheckpointException) as error:
        raise ValueError(
            f"{state} is damaged, or of another model or older code ({last_line(error)}). Put it "
            "back, or choose another --out."
        ) from error
    for moments in shards.adam.state.values():
        moments["step"].copy_(shards.updates)
    return step
