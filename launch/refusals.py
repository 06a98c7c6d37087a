"""Flags of train.py that make no run together, or would change nothing."""

import os

import torch

from launch.tracking import why_not_tracked
from methods import METHODS
from storage.hub import why_not_uploaded


def flags_with_effect(settings) -> dict[str, bool]:
    """The flags that only some methods, teachers and objectives read."""
    method = METHODS[settings.method]
    topk = method.distils and settings.objective == "topk"
    needs_topk = method.target or method.extra_view or method.teachers_top
    return {
        "--retrain-base": settings.toy and settings.model == f"{settings.out}/base",
        "--teacher": method.default_teacher is not None,
        "--max-crop-prompt": method.teacher_view is not None,
        "--trust": settings.teacher == "trust-region",
        "--objective": method.distils and not needs_topk,
        "--ema-rate": settings.teacher == "ema",
        "--divergence": topk,
        "--tilt-floor": settings.method in ("opd-aha", "vcsd"),
        "--tau": settings.method == "vad",
        "--top-k": topk,
        "--beta": topk and not settings.divergence.endswith("_kl"),
        "--resample": settings.method == "dapo",
    }


def described(settings) -> str:
    names = ("method", "teacher", "objective", "divergence")
    given = {name: getattr(settings, name) for name in names}
    return ", ".join(f"--{name} {value}" for name, value in given.items() if value)


def why_not(settings) -> str | None:
    """Why flags that are each in order make no run together; None where they do."""
    method, ranks = settings.method, settings.plan or int(os.environ.get("WORLD_SIZE", 1))
    if METHODS[method].writer == "teacher" and settings.teacher == "trust-region":
        return f"--method {method} samples from one set of weights: no --teacher trust-region"
    if METHODS[method].writer is None and settings.group > 1:
        return f"--method {method} samples nothing, a prompt has one label: add --group 1"
    if method in ("grpo", "dapo", "v-zero") and settings.group < 2:
        return f"--method {method} compares the responses to a prompt: --group must be at least 2"
    if settings.toy and settings.plan:
        return "--plan needs data and a model that are there: leave --toy out"
    if settings.toy and settings.device == "cuda":
        return "--toy is made for the CPU: leave --device cuda out"
    if settings.prompts % ranks:
        return (
            f"--prompts {settings.prompts} cannot be shared evenly by {ranks} ranks. Choose a "
            f"multiple of {ranks}."
        )
    if settings.compile and settings.device == "cpu":
        return "--compile is about CUDA graphs: leave it out with --device cpu"
    if settings.device == "cuda" and not settings.plan and not torch.cuda.is_available():
        return (
            "--device cuda, but torch sees no GPU here. Use --device cpu, or install a CUDA build "
            "of torch."
        )
    return why_not_tracked(settings.track) or why_not_uploaded(settings.push)
