"""What a run of train.py would take, before anything is loaded: steps, prompt lengths, memory by phase, a rough time.

python train.py --plan 8 --device cuda --data DIR --model DIR          # flags as for the run; no GPU needed
"""

import math

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from baselines import DISTIL
from model import ImageTextProcessor, chat, find, prompt_tokens
from sharding import BUCKET
from storage.images import image_size


def outline(path: str):
    """(configuration, number of weights, processor) of a checkpoint directory or hub id, without its weights."""
    folder = find(path, ["*.json", "*.jinja", "*.txt"])
    try:
        config, processor = (
            AutoConfig.from_pretrained(folder),
            ImageTextProcessor.from_pretrained(folder),
        )
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        if not hasattr(model.model, "get_rope_index"):
            raise ValueError(f"it is a {type(model).__name__}")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} has no configuration of a Qwen3.5 / Qwen3-VL style model: {error}"
        ) from error
    return config, sum(weight.numel() for weight in model.parameters()), processor


def decoded(args, world: int) -> int:
    """Prompts that a rank decodes at once: whole micro-batches."""
    return min(
        args.prompts // world, max(1, args.gen_prompts // args.micro_prompts) * args.micro_prompts
    )


def key_values(c, e: int) -> tuple[int, int]:
    """(layers of full attention, bytes that a token takes in the KV cache of all of them); e: bytes of a number."""
    layers = (getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers).count(
        "full_attention"
    )
    return layers, 2 * layers * c.num_key_value_heads * c.head_dim * e


def sampled(args, full: int, seen: int) -> tuple[int, int]:
    """(tokens, most tokens) of the prompts that are answered: the student's, or for sft the teacher's."""
    return (seen, args.max_crop_prompt) if args.method == "sft" else (full, args.max_prompt)


def memory(args, config, weights: int, world: int, full: int, seen: int) -> dict[str, float]:
    """Bytes on a GPU (cpu: of a process's tensors) at most: `stays`, and what each phase of a step adds, one at a time, for prompts
    of `full` (student) and `seen` (teacher) tokens, and responses of --max-new-tokens.

    Activations are those of transformers' own kernels, by factors fitted to tensors counted in small runs; with fla installed
    they take less. tests/test_plan.py counts again.
    """
    c, vision, e, T = (
        config.get_text_config(),
        config.vision_config,
        2 if args.device == "cuda" else 4,
        args.max_new_tokens,
    )
    N, mine, D, V, head_dim = (
        args.micro_prompts * args.group,
        args.prompts // world,
        c.hidden_size,
        c.vocab_size,
        c.head_dim,
    )
    full_layers, token = key_values(c, e)
    linear = c.num_hidden_layers - full_layers
    heads, key_dim, value_dim, kernel = (
        (
            c.linear_num_value_heads,
            c.linear_key_head_dim,
            c.linear_value_head_dim,
            c.linear_conv_kernel_dim,
        )
        if linear
        else (0, 0, 0, 0)
    )
    state = (
        linear * heads * (key_dim * value_dim * 4 + (2 * key_dim + value_dim) * kernel * e)
    )  # of a row

    def layer(prompts: int, tokens: int, rows: int) -> int:
        """Of one decoder layer on prompts of `tokens` tokens and their `rows` continuations, the widest kind."""
        blocks = prompts * math.ceil(tokens / 64) + rows * math.ceil(T / 64)  # linear attention's
        delta = blocks * 64 * 2 * heads * (key_dim + value_dim) * (24 + 3 * e)
        repeated = (
            4 * rows * (tokens + T) * head_dim * (c.num_attention_heads + c.num_key_value_heads) * e
        )
        return (prompts * tokens + rows * T) * (8 * D + 3 * c.intermediate_size) * e + max(
            delta, repeated
        )

    def block(prompts: int, tokens: int) -> int:
        """Of one block of the vision tower."""
        return 4 * prompts * tokens * (8 * vision.hidden_size + 3 * vision.intermediate_size) * e

    micro, prompts, pixel = (
        args.micro_prompts,
        decoded(args, world),
        4 * 6 * vision.patch_size**2 * e,
    )  # of a token
    rows, late, teaches = (
        prompts * args.group,
        e * weights * args.offload_teacher,
        args.method in DISTIL,
    )
    asked, limit = sampled(args, full, seen)
    live = 2 + (args.teacher is not None and not args.offload_teacher)  # and gradients
    stays = live * e * weights + 20 * weights / world
    batch = mine * (full + seen) * pixel * (1 + args.resample * (args.method == "dapo"))
    targets = mine * args.group * T * D * e * teaches * (2 if args.teacher == "trust-region" else 1)
    reduced = min(BUCKET, weights) * (e + 4 / world) * (world > 1)  # a bucket, see sharding
    clone = V * D * e * args.offload_teacher * teaches  # of the teacher's head
    cache = rows * (
        (asked + T) * token * (1 + 1 / max(1, full_layers)) + 2 * state + 32 * V
    )  # a layer's is copied
    if args.compile:  # its caches stay
        batch += (rows + mine % prompts * args.group) * ((limit + T) * token + state)
        cache = prompts * (asked * token + state) + rows * (
            asked * token // max(1, full_layers) + 2 * state + 32 * V
        )
    prefill = (
        prompts * (asked * token + state)
        + max(block(prompts, asked), layer(prompts, asked, 0)) // 2
    )
    sampling = late * (args.method == "sft") + batch + prompts * asked * pixel + max(cache, prefill)
    teaching = late + clone + batch + targets + layer(micro, seen, N) // 2
    if args.checkpointing:
        student = (
            c.num_hidden_layers * (micro * full + N * T) * D
            + vision.depth * micro * full * 4 * vision.hidden_size
        ) * e
        student += max(layer(micro, full, N), block(micro, full))
    else:
        student = c.num_hidden_layers * layer(micro, full, N) + vision.depth * block(micro, full)
    student += (
        V * D * 4 + min(args.chunk, N * T) * V * (2 * e + 4) + clone + batch + targets + reduced
    )  # head's gradient, logits
    return {"stays": stays, "sampling": sampling, "teacher": teaching * teaches, "student": student}


def seconds(args, config, weights: int, world: int, full: int, seen: int) -> dict[str, float]:
    """A rough estimate of a step on H100s, by phase, for prompts of `full` and `seen` tokens. Assumed, not measured: 400 TFLOP/s in
    passes, 2 TB/s when decoding, 35 ms a decoded token without --compile, mean responses a quarter of the longest;
    dapo's further batches are left out."""
    T, mine, prompts, (asked, limit) = (
        args.max_new_tokens,
        args.prompts // world,
        decoded(args, world),
        sampled(args, full, seen),
    )
    slots = limit + T if args.compile else asked + T / 2  # read at every token
    read = 2 * weights + prompts * args.group * slots * key_values(config.get_text_config(), 2)[1]
    decoding = math.ceil(mine / prompts) * T * max(0.0 if args.compile else 0.035, read / 2e12)
    forward = 2 * weights * mine / 400e12  # of a token of every prompt
    return {
        "sampling": forward * asked + decoding,
        "teacher": forward * (seen + args.group * T / 4) * (args.method in DISTIL),
        "student": 4 * forward * (full + args.group * T / 4),
    }  # forward twice, backward


def plan(args, rows: list[dict], views: list[tuple[str, str, int]]) -> str:
    """What a run on args.plan ranks would do and take. rows, views: as train.py has them. Raises FileNotFoundError / ValueError for
    images and models that are none."""
    config, weights, processor = outline(args.model)
    steps, world, lengths = args.steps or len(rows) // args.prompts, args.plan, []
    for view, hint, limit in views:
        tokens = []
        for row in tqdm(rows, desc=f"prompts of the {view}", leave=False):
            try:
                size = image_size(getattr(row, view))
            except ValueError as error:
                raise ValueError(f"sample {row.id}: {error}") from error
            tokens.append(
                prompt_tokens(
                    processor, size, chat(processor, row.question + hint.format(answer=row.answer))
                )
            )
        shrunk = sum(n > limit for n in tokens)
        tokens = [min(n, limit) for n in tokens]
        lengths.append((sum(tokens) // len(tokens), max(tokens), shrunk))
    told = [
        f"{args.model}: {weights / 1e6:,.1f}M weights; {args.data}: {len(rows):,} triplets",
        f"{steps} steps of {args.prompts} prompts x {args.group} responses on {world} rank(s)",
    ]
    for name, (mean, most, shrunk) in zip(("student", "teacher"), lengths):
        told.append(
            f"{name}'s prompts: {mean:,} tokens on average, {most:,} the longest"
            + f"; {shrunk} images will be scaled down" * (shrunk > 0)
        )
    parts = memory(args, config, weights, world, lengths[0][1], lengths[1][1] if lengths[1:] else 0)
    stays = parts.pop("stays")
    told += [
        f"memory of a rank, at most: {(stays + max(parts.values())) / 1e9:.1f} GB = {stays / 1e9:.1f} for weights, gradients, "
        "optimizer and EMA + the largest of "
        + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    ]
    if args.device == "cuda":
        spent = seconds(
            args, config, weights, world, lengths[0][0], lengths[1][0] if lengths[1:] else 0
        )
        told += [
            "time, a rough estimate (see plan.seconds): "
            + ", ".join(f"{name} {each:.0f} s" for name, each in spent.items())
            + f" a step; {sum(spent.values()) * steps / 3600:.1f} hours in all"
        ]
    return "\n".join(told)
