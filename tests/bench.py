"""Speed and memory of a training step and its phases, and what a data set's images cost.

    python tests/bench.py                        a small model, minutes on two CPU cores (12 GB)
    python tests/bench.py --device cuda          a 2B on one GPU of 80 GB, in the goals' shapes
    python tests/bench.py synth                  decode, draw, crop, write 2250 x 1500 px
    python tests/bench.py loss --tokens 256      the loss: four matmuls, Liger-Kernel and TRL

Each figure stands beside a floor measured in the same run and beside the plain way.

The plain way is what the official code does: every response is one full sequence, prompt and
image included, generation prefills each of the G copies, and the loss has all logits at once.
A floor is the time of what cannot be left out, at the speed of a bare matmul or copy: of a pass
its matmuls (checkpointing's recomputation included), of generation reading weights and caches
once a token, of the loss its four matmuls, of the step all of these.

Weights are random; the shapes are what counts. Medians of --repeats runs (of the loss alone the
fastest). tokens/s: response tokens; GB, of 2^30 bytes: a GPU's peak above what was there before.
"""

import argparse
import copy
import gc
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ.setdefault("TQDM_DISABLE", "1")  # no bars between the rows
if not any("cuda" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        ""  # else a GPU's kernels are taken where they are installed
    )
import bench_loss  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

import model as vision_model  # noqa: E402
import storage.images as images  # noqa: E402
import toy.tiny as tiny_model  # noqa: E402
import train  # noqa: E402
from loss import divergence  # noqa: E402
from methods import METHODS  # noqa: E402
from rollout import CACHES, sample  # noqa: E402
from sharding import Shards, join_ranks  # noqa: E402
from synthesis.photos import load_photo  # noqa: E402
from synthesis.regions import Region, cut  # noqa: E402
from triplets.format import Triplet  # noqa: E402

# name: text hidden, MLP, layers, heads, KV heads, head dim, linear key / value heads, vision
# depth, hidden, MLP
SIZES = {
    "small": (192, 576, 4, 4, 2, 48, 4, 4, 2, 64, 128),
    "0.8b": (1024, 3584, 24, 8, 2, 256, 16, 16, 12, 768, 3072),
    "2b": (2048, 6144, 24, 8, 2, 256, 16, 16, 24, 1024, 4096),
    "4b": (2560, 9216, 32, 16, 4, 256, 16, 32, 24, 1024, 4096),
}
# What --device cuda changes: the shapes of the goals.
GPU = {
    "dtype": "bfloat16",
    "size": "2b",
    "model_vocab": 248320,
    "prompt_tokens": 4000,
    "response_tokens": 200,
    "group": 8,
    "gen_prompts": 12,
    "tokens": 8192,
    "vocab": 248320,
    "hidden": 2560,
    "warmup": 1,
}
GOALS = {  # benchmark: (goal, whether the numbers found reach it)
    "loss": (
        "loss, 8,192 tokens: at most 1.6x its floor, under 2 GB beyond the gradients",
        lambda ratio, gb: ratio <= 1.6 and gb < 2,
    ),
    "generate": (
        "compiled generation, 96 sequences: at most 2.5x its floor",
        lambda ratio: ratio <= 2.5,
    ),
    "step": (
        "whole step, 4,000 prompt and 200 response tokens, G = 8: 3x faster than the plain way",
        lambda ratio: ratio >= 3,
    ),
}
COLUMNS = {
    "ms": ",.0f",
    "tokens/s": ",.0f",
    "GB": ".2f",
    "of step": ".0%",
    "x floor": ".2f",
    "speed-up": ".2f",
}
HEADER = " " * 50 + "".join(f"{name:>10}" for name in COLUMNS)
VISION_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def build(size: str, vocab: int, device, dtype):
    """A Qwen3.5 of real shape with random weights, and the tiny model's processor at patch 16."""
    hidden, mlp, layers, heads, kv, dim, key_heads, value_heads, depth, vision, vision_mlp = SIZES[
        size
    ]
    _, processor = tiny_model.tiny()
    processor.image_processor.patch_size = 16
    processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": 16_777_216}
    donor = tiny_model.tiny()[0].config
    config = transformers.Qwen3_5Config(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": dim,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": value_heads,
            "tie_word_embeddings": True,
            "eos_token_id": processor.tokenizer.eos_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "mrope_section": [dim // 8 - 2 * (dim // 24), dim // 24, dim // 24],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision,
            "intermediate_size": vision_mlp,
            "num_heads": vision // 64,
            "patch_size": 16,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
        },
        tie_word_embeddings=True,
        **{key: getattr(donor, key) for key in VISION_IDS},
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.Qwen3_5ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    vision_model.prepare(model.to(device), processor)
    model.generation_config.eos_token_id = [
        config.vision_start_token_id
    ]  # suppressed: no response ends early
    return model, processor


def photo(processor, args, share: float = 1.0) -> vision_model.Prompt:
    """One prompt of `share` of --prompt-tokens: an image, then a question that fills the rest."""
    images = int((args.prompt_tokens - 60) * share)
    columns = int(math.sqrt(images))
    image = Image.fromarray(
        np.random.default_rng(0).integers(
            0, 256, (images // columns * 32, columns * 32, 3), dtype=np.uint8
        )
    )
    empty = vision_model.encode(processor, [image], ["what"])["input_ids"].shape[1]
    prompt = vision_model.encode(
        processor, [image], ["what" + " is" * max(0, int(args.prompt_tokens * share) - empty)]
    )
    return vision_model.to_device(
        prompt | {"pixel_values": prompt["pixel_values"].to(getattr(torch, args.dtype))},
        args.device,
    )


def copies(prompt: vision_model.Prompt, group: int) -> dict:
    """The plain way's input: the prompts, images included, once per response."""
    return {
        key: value.repeat(group, *[1] * (value.ndim - 1))
        for key, value in prompt.items()
        if key != "shrunk"
    }


def plain_generate(model, prompt: vision_model.Prompt, group: int, tokens: int) -> Tensor:
    """`generate` on G copies of the prompts, as num_return_sequences = G does: (N, T) ids."""
    model.model.rope_deltas = None
    return model.generate(
        **copies(prompt, group),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=tokens,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            eos_token_id=model.generation_config.eos_token_id,
            suppress_tokens=[getattr(model.config, key) for key in VISION_IDS],
        ),
    )[:, prompt["input_ids"].shape[1] :]


def plain_hidden(model, prompt: vision_model.Prompt, ids: Tensor) -> Tensor:
    """One full sequence per response: hidden states (N, T, D) that predict the ids (N, T) after N
    copies of one prompt."""
    inputs, extra = copies(prompt, len(ids)), torch.zeros_like(ids)
    inputs |= {
        key: torch.cat([inputs[key], more], 1)
        for key, more in (
            ("input_ids", ids),
            ("attention_mask", extra + 1),
            ("mm_token_type_ids", extra),
        )
    }
    model.model.rope_deltas = None
    return model.model(**inputs, use_cache=False).last_hidden_state[:, -ids.shape[1] - 1 : -1]


def forward_flops(
    model, prompt: vision_model.Prompt, N: int = 0, T: int = 0
) -> tuple[float, float]:
    """Flops of one forward of B prompts, each computed once, and of N responses to them: (with
    weights, between tokens).

        2 x weights x tokens          B (L - 1) + N T tokens: language model without its head;
                                      patches: vision tower
        4 x heads x head_dim x pairs  scores and values; a pair: a query and a key it attends to

    Left out: the recurrence of linear attention, a few percent of a 4B's. A backward pass
    counts as two forwards.
    """

    def size(module):
        return sum(
            m.weight.numel()
            for m in module.modules()
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv3d))
        )

    (B, L), text, tower = prompt["input_ids"].shape, model.model.language_model, model.model.visual
    patches = (
        prompt["image_grid_thw"].prod(1).tolist()
    )  # of each image; its merger sees them merged
    weights = size(text) * (B * (L - 1) + N * T)
    weights += (size(tower) - size(tower.merger) * (1 - 1 / tower.spatial_merge_size**2)) * sum(
        patches
    )
    between = sum(
        layer.self_attn.o_proj.in_features for layer in text.layers if hasattr(layer, "self_attn")
    )
    between *= B * (L - 1) * L / 2 + N * T * (L - 1 + (T + 1) / 2)
    between += sum(block.attn.proj.in_features for block in tower.blocks) * sum(
        n * n for n in patches
    )
    return 2 * weights, 4 * between


def read_bytes(model, N: int, length: float) -> float:
    """Bytes that one decoding step of N sequences reads and writes at least, `length` tokens being
    before it: the language model's weights, its head included and its embeddings not; keys and
    values; states of linear attention (convolution; recurrence, fp32, read and written)."""
    text, head = model.model.language_model, model.lm_head.weight
    weights = (
        sum(p.numel() for p in text.parameters()) - text.embed_tokens.weight.numel() + head.numel()
    )
    full = [layer.self_attn for layer in text.layers if hasattr(layer, "self_attn")]
    linear = [layer.linear_attn for layer in text.layers if hasattr(layer, "linear_attn")]
    cached = sum(a.k_proj.out_features + a.v_proj.out_features for a in full) * length + sum(
        a.conv1d.weight.numel() for a in linear
    )
    return (weights + N * cached) * head.element_size() + N * sum(
        2 * 4 * a.num_v_heads * a.head_k_dim * a.head_v_dim for a in linear
    )


def speeds(model, args) -> tuple[float, float]:
    """(flops a second of the MLP's matmuls, the faster one, on the tokens of a pass; bytes a
    second that a copy reads and writes)."""
    mlp, flops = model.model.language_model.layers[0].mlp, []
    tokens = args.prompt_tokens + args.group * args.response_tokens
    for weight in (mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach()):
        x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=args.device)

        def ten_matmuls(x=x, weight=weight):
            return [x @ weight.t() for _ in range(10)]

        flops.append(20 * tokens * weight.numel() / measure(ten_matmuls, args)[0])
    source, target = torch.ones(2, 2**28, dtype=torch.uint8, device=args.device)
    copied = (
        10 * 2 * len(source) / measure(lambda: [target.copy_(source) for _ in range(10)], args)[0]
    )
    print(
        f"floors at {max(flops) / 1e12:,.3g} TFLOP/s (the MLP's matmuls, {tokens:,} tokens) and "
        f"{copied / 1e9:,.3g} GB/s (a copy)"
    )
    return max(flops), copied


def measure(run, args) -> tuple[float, float]:
    """(median seconds of a run, peak GB above what was there before it), after one that does not
    count. GB is NaN on a CPU; both are NaN where a GPU's memory runs out."""
    cuda, seconds = args.device == "cuda", []
    wait = torch.cuda.synchronize if cuda else lambda: None
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()  # of a row before that ran out of memory
    before = torch.cuda.memory_allocated()  # 0 on a CPU; the first run may leave a cache
    try:
        run()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(args.repeats):
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return math.nan, math.nan
    return statistics.median(seconds), (
        torch.cuda.max_memory_allocated() - before
    ) / 2**30 if cuda else math.nan


def row(
    name: str,
    found: tuple[float, float],
    tokens: int,
    floor: float,
    plain: float = math.nan,
    step: float = math.nan,
) -> None:
    """found: (seconds, GB) measured; floor, plain way and whole step in seconds. NaN prints as a
    dash."""
    seconds, gb = found
    cells = zip(
        (seconds * 1e3, tokens / seconds, gb, seconds / step, seconds / floor, plain / seconds),
        COLUMNS.values(),
        strict=False,
    )
    line = "".join(
        f"{'-' if math.isnan(value) else format(value, form):>10}" for value, form in cells
    )
    print(f"  {name:48}{'  out of memory' if math.isnan(seconds) else line}", flush=True)


def compare(
    name: str, ours, plain, tokens: int, floor: float, args, step: float = math.nan
) -> tuple[float, float]:
    """Measures ours and the plain way and prints a row of each. Returns their seconds."""
    slow, fast = measure(plain, args), measure(ours, args)
    row(name, fast, tokens, floor, slow[0], step)
    row("  plain way", slow, tokens, floor)
    return fast[0], slow[0]


def step_of(model, processor, args) -> train.Run:
    """A run of one prompt a step, as train.py makes it."""
    flags = (
        f"--prompts 1 --gen-prompts 1 --steps 9 --group {args.group} --chunk {args.chunk} "
        f"--max-new-tokens {args.response_tokens} --device {args.device}"
    )
    settings = train.parse(flags.split())
    rank, world, device = join_ranks(args.device)
    shards = Shards(
        copy.deepcopy(model),
        lr=settings.lr,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        copy_stays=False,
    )
    method = METHODS["vision-opd"](settings)
    row = Triplet("0", "", "", "")
    return train.Run(settings, method, [row], processor, shards, rank, world, device)


def bench_step(model, processor, args, rate: float, bandwidth: float) -> tuple[float]:
    """One optimizer step on one prompt and its phases: train.learn's, and the plain way's. Returns
    (the step's speed-up,)."""
    group, tokens = args.group, args.response_tokens
    n = group * tokens
    run = step_of(model, processor, args)
    full, crop = photo(processor, args), photo(processor, args, 0.4)
    ids = torch.randint(256, (group, tokens), device=args.device)
    plain = Plain(model, full, crop, args)

    def student_pass(checkpoint=True):
        def squares(student):
            return (
                vision_model.response_hidden(student, full, ids, checkpoint=checkpoint)
                .square()
                .sum()
            )

        run.shards.student_pass(squares).backward()

    def update():
        run.shards.update(1e-6, run.shards.gradient_norm(), 1.0, 0.05)
        run.shards.publish("student")
        run.shards.publish("teacher")

    def generate():
        return sample(model, processor, full, group, max_new_tokens=tokens, seeds=[0])

    @torch.no_grad()
    def teacher_pass():
        return vision_model.response_hidden(model, crop, ids)

    head = model.lm_head.weight.detach()
    hidden, target = torch.randn(2, n, head.shape[1], dtype=head.dtype, device=args.device)
    sides = (hidden.requires_grad_(), head.clone().requires_grad_(), target, head)
    matmuls, _ = measure(bench_loss.matmuls(args, *(side.detach() for side in sides)), args)
    length, crop_length = full["input_ids"].shape[1], crop["input_ids"].shape[1]
    forward = sum(forward_flops(model, full, group, tokens)) / rate  # seconds
    teacher_forward = sum(forward_flops(model, crop, group, tokens)) / rate
    reading = tokens * read_bytes(model, group, length + tokens / 2) / bandwidth
    phases = {  # name: (ours, the plain way, floor in seconds)
        "generation": (generate, plain.generate, reading),
        "teacher pass": (teacher_pass, lambda: plain.teacher_pass(ids), teacher_forward),
        "student pass": (student_pass, lambda: plain.student_pass(ids), 4 * forward),
        "loss": (bench_loss.ours(args, *sides), bench_loss.plain(args, *sides), matmuls),
    }
    print(
        f"\none step: {length:,} prompt tokens (teacher {crop_length:,}), {tokens} response "
        f"tokens, G = {group}\n{HEADER}"
    )
    floor = sum(floor for *_, floor in phases.values())
    batch = [(run.rows, {"student": full, "teacher": crop})]
    ours, slow = compare(
        "whole step, train.learn", lambda: train.learn(run, 1, batch), plain.step, n, floor, args
    )
    for name, (fast, plain_way, floor) in phases.items():
        compare(name, fast, plain_way, n, floor, args, ours)
    row("update: AdamW, EMA, new weights", measure(update, args), n, math.nan, step=ours)
    compare(
        "student pass without checkpointing",
        lambda: student_pass(False),
        lambda: plain.student_pass(ids, checkpoint=False),
        n,
        3 * forward,
        args,
    )
    return (slow / ours,)


class Plain:
    """The plain way of a step: every response a full sequence, all logits at once, AdamW and EMA
    on the weights as they are."""

    def __init__(self, model, full: vision_model.Prompt, crop: vision_model.Prompt, args):
        self.full, self.crop, self.args = full, crop, args
        self.student = copy.deepcopy(model).requires_grad_(True)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.adam = torch.optim.AdamW(self.student.parameters(), lr=1e-6, fused=True)

    def generate(self) -> Tensor:
        return plain_generate(self.student, self.full, self.args.group, self.args.response_tokens)

    @torch.no_grad()
    def teacher_pass(self, ids: Tensor) -> Tensor:
        return plain_hidden(self.teacher, self.crop, ids)

    def student_pass(self, ids: Tensor, loss=None, checkpoint: bool = True) -> None:
        text = self.student.model.language_model
        text.activation_checkpointing_enable()  # in training mode; the vision tower's is on
        self.student.train(checkpoint)
        try:
            for rows in torch.arange(len(ids)).split(self.args.plain_rows):
                hidden = plain_hidden(self.student, self.full, ids[rows])
                (loss(hidden, rows) if loss else hidden.square().sum()).backward()
        finally:
            self.student.eval()
            text.activation_checkpointing_disable()

    def step(self) -> None:
        ids = self.generate()
        target = self.teacher_pass(ids)

        def loss(hidden, rows):
            student_logits = hidden @ self.student.lm_head.weight.t()
            teacher_logits = target[rows] @ self.teacher.lm_head.weight.t()
            return divergence(student_logits, teacher_logits).sum() / ids.numel()

        self.student_pass(ids, loss)
        self.adam.step()
        self.adam.zero_grad()
        weights = [weight.data for weight in self.student.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), weights, 0.05)


def bench_generate(model, processor, args, rate: float, bandwidth: float) -> tuple[float]:
    """G sampled responses to each of --gen-prompts prompts. Returns (multiple of the floor,)."""
    B, group, T = args.gen_prompts, args.group, args.response_tokens
    prompt = vision_model.join([photo(processor, args)] * B, 0)
    L = prompt["input_ids"].shape[1]

    def generate(T, static=0):
        return sample(
            model, processor, prompt, group, max_new_tokens=T, seeds=[0] * B, static=static
        )

    floor = T * read_bytes(model, B * group, L + T / 2) / bandwidth
    print(
        f"\ngeneration of {B * group} sequences: {B} prompts of {L:,} tokens, {T} response tokens, "
        f"G = {group}\n{HEADER}"
    )
    _, plain = compare(
        "generation",
        lambda: generate(T),
        lambda: plain_generate(model, prompt, group, T),
        B * group * T,
        floor,
        args,
    )
    fixed = measure(lambda: generate(T, L + T), args)  # its first run compiles
    row("static cache (on a GPU: train.py --compile)", fixed, B * group * T, floor, plain)
    CACHES.clear()
    row(
        "of which prompts and one token",
        measure(lambda: generate(1), args),
        B * group,
        sum(forward_flops(model, prompt)) / rate,
    )
    return (fixed[0] / floor,)


def bench_synth(args) -> None:
    """What synth.py does with a photograph besides asking models: one image of the released set's
    median size, one triplet."""
    spent, rng, box = {}, np.random.default_rng(0), [1000, 700, 1200, 860]
    smooth = Image.fromarray(rng.integers(0, 256, (94, 141, 3), dtype=np.uint8)).resize(
        (2250, 1500), Image.Resampling.BICUBIC
    )
    grain = np.asarray(smooth, int) + rng.normal(
        0, 6, (1500, 2250, 1)
    )  # a JPEG of about 2 MB, as a camera's
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        images.save_image(
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)), folder / "photo.jpg"
        )
        size = (folder / "photo.jpg").stat().st_size / 1e6
        region = Region(load_photo(folder, "photo.jpg"), box)
        framed = region.framed()
        crop = cut(framed, region.window)
        for name, job in (
            ("decode", lambda: load_photo(folder, "photo.jpg")),
            ("draw the frame", region.framed),
            ("crop and enlarge", lambda: cut(framed, region.window)),
            ("write the image, JPEG", lambda: images.save_image(framed, folder / "a.jpg")),
            ("write the crop, PNG", lambda: images.save_image(crop, folder / "a.png")),
        ):
            spent[name] = measure(job, args)[0]
    print(
        f"photographs of 2250 x 1500 px, {size:.1f} MB, one box each, one core: "
        f"{1 / sum(spent.values()):.1f} a second"
    )
    for name, seconds in spent.items():
        print(f"  {name:56} {seconds * 1e3:9,.1f} ms {seconds / sum(spent.values()):7.0%}")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "what",
        nargs="*",
        default=["loss", "generate", "step"],
        help="loss, generate, step (default: these), synth",
    )
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument(
        "--size",
        default="small",
        choices=list(SIZES),
        help="shape of the model for generate and step",
    )
    p.add_argument(
        "--model-vocab",
        type=int,
        default=4096,
        help="its vocabulary (the loss alone has its own, --vocab)",
    )
    p.add_argument(
        "--prompt-tokens",
        type=int,
        default=612,
        help="of the student; the teacher's prompt has 40%% of them",
    )
    p.add_argument("--response-tokens", type=int, default=50)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--gen-prompts", type=int, default=3, help="generate: prompts decoded at once")
    p.add_argument(
        "--plain-rows",
        type=int,
        default=8,
        help="step: sequences at once in the plain way's forward and backward",
    )
    p.add_argument("--repeats", type=int, default=3)
    bench_loss.add_arguments(p)
    if p.parse_known_args()[0].device == "cuda":
        p.set_defaults(**GPU)
    args = p.parse_args()
    if args.only:
        return bench_loss.measure(args)
    if unknown := set(args.what) - {*GOALS, "synth"}:
        p.error(f"unknown benchmark {sorted(unknown)}: choose from {', '.join(GOALS)}, synth")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error(
            "--device cuda, but torch sees no GPU here. Leave it out, or install a CUDA build of "
            "torch."
        )
    transformers.utils.logging.set_verbosity_error()
    machine = (
        f"{torch.get_num_threads()} threads"
        if args.device == "cpu"
        else torch.cuda.get_device_name()
    )
    print(
        f"{args.size} Qwen3.5, {args.dtype}, {machine}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    found = {}  # the numbers that the goals are about
    if "synth" in args.what:
        bench_synth(args)
    if "loss" in args.what:  # first: its processes need the GPU's memory
        found["loss"] = bench_loss.run(args)
    if {"generate", "step"} & set(args.what):
        model, processor = build(
            args.size, args.model_vocab, args.device, getattr(torch, args.dtype)
        )
        measured = speeds(model, args)
        for name, bench in (("generate", bench_generate), ("step", bench_step)):
            if name in args.what:
                found[name] = bench(model, processor, args, *measured)
    if not found:
        return None
    print("\ngoals, in the shapes of --device cuda")
    elsewhere = any(getattr(args, key) != value for key, value in GPU.items())
    for name, (goal, reached) in GOALS.items():
        verdict = (
            "not run on a GPU"
            if args.device == "cpu"
            else "not run in full"
            if elsewhere or not found.get(name)
            else "out of memory"
            if math.isnan(sum(found[name]))
            else "reached"
            if reached(*found[name])
            else "missed"
        )
        print(
            f"  {goal:90} {verdict:18} "
            + ", ".join(f"{number:.2f}" for number in found.get(name) or ())
        )
    return None


if __name__ == "__main__":
    main()
