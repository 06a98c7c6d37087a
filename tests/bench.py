"""Speed and memory of a training step and its phases, and what a data set's images cost.

    python tests/bench.py                        a small model, minutes on two CPU cores (12 GB)
    python tests/bench.py --device cuda          a 2B on one GPU of 80 GB, in the goals' shapes
    python tests/bench.py synth                  decode, draw, crop, write 2250 x 1500 px
    python tests/bench.py loss --tokens 256      the loss: four matmuls, Liger-Kernel and TRL
    python tests/bench.py peer --gen-prompts 2   an optimizer step beside TRL's trainers, on a CPU

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
import os
import random
import statistics
import sys
import tempfile
import tomllib
from functools import partial
from math import isnan, isqrt, nan
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not any("cuda" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else a GPU's kernels are taken where there are any
import bench_loss
import bench_peer
import torch
import transformers
from PIL import Image, ImageChops

import model as vision_model
import toy.tiny as tiny_model
import train
from loss import divergence
from methods import METHODS
from rollout import CACHES, sample
from sharding import Shards, join_ranks
from storage.images import save_image
from synthesis.photos import load_photo
from synthesis.regions import Evidence, Region, cut
from triplets.format import Triplet

# Defaults, what --device cuda changes of them, and the configurations of --size.
SHAPES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
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


def build(size, vocab, device, dtype):
    """A Qwen3.5 of real shape with random weights, and the tiny model's processor at patch 16."""
    donor, processor = tiny_model.tiny()
    processor.image_processor.patch_size = 16
    processor.image_processor.merge_size = 2
    processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": 16_777_216}
    ids = {key: getattr(donor.config, key) for key in VISION_IDS}
    config = transformers.Qwen3_5Config(**SHAPES["sizes"][size], **ids)
    config.text_config.vocab_size = vocab
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    vision_model.prepare(model.to(device), processor)
    # A suppressed token: no response ends early.
    model.generation_config.eos_token_id = [config.vision_start_token_id]
    return model, processor


def photo(processor, args, share=1.0):
    """One prompt of `share` of --prompt-tokens: an image, then a question that fills the rest."""
    tokens = int((args.prompt_tokens - 60) * share)  # the image's
    columns = isqrt(tokens)
    size = (columns * 32, tokens // columns * 32)
    image = Image.effect_noise(size, 64).convert("RGB")
    empty = vision_model.encode(processor, [image], ["what"])["input_ids"].shape[1]
    words = int(args.prompt_tokens * share) - empty
    prompt = vision_model.encode(processor, [image], ["what" + " is" * words])
    prompt["pixel_values"] = prompt["pixel_values"].to(getattr(torch, args.dtype))
    return vision_model.to_device(prompt, args.device)


def copies(prompt, group):
    """The plain way's input: the prompts, images included, once per response."""
    return {key: torch.cat([value] * group) for key, value in prompt.items() if key != "shrunk"}


def plain_generate(model, prompt, group, tokens, sampled=True):
    """`generate` on G copies of the prompts, as num_return_sequences = G does: (N, T) ids."""
    model.model.rope_deltas = None
    output = model.generate(
        **copies(prompt, group),
        max_new_tokens=tokens,
        do_sample=sampled,
        top_k=0,
        pad_token_id=0,
        suppress_tokens=[getattr(model.config, key) for key in VISION_IDS],
    )
    return output[:, prompt["input_ids"].shape[1] :]


def plain_hidden(model, prompt, ids):
    """One full sequence per response: hidden states (N, T, D) that predict the ids (N, T) after N
    copies of one prompt."""
    inputs = copies(prompt, len(ids))
    zeros = torch.zeros_like(ids)
    more = {"input_ids": ids, "attention_mask": zeros + 1, "mm_token_type_ids": zeros}
    for key, value in more.items():
        inputs[key] = torch.cat([inputs[key], value], 1)
    model.model.rope_deltas = None
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, -ids.shape[1] - 1 : -1]


def forward_flops(model, prompt, N=0, T=0):
    """Flops of one forward of B prompts, each computed once, and of N responses to them: (with
    weights, between tokens).

        2 x weights x tokens          B (L - 1) + N T tokens: language model without its head;
                                      patches: vision tower
        4 x heads x head_dim x pairs  scores and values; a pair: a query and a key it attends to

    Left out: the recurrence of linear attention, a few percent of a 4B's. A backward pass
    counts as two forwards.
    """

    def size(module):
        matrices = (torch.nn.Linear, torch.nn.Conv3d)
        return sum(m.weight.numel() for m in module.modules() if isinstance(m, matrices))

    B, L = prompt["input_ids"].shape
    text = model.model.language_model
    tower = model.model.visual
    patches = prompt["image_grid_thw"].prod(1)  # of each image
    # The merger sees them merged.
    each_patch = size(tower) - size(tower.merger) * (1 - 1 / tower.spatial_merge_size**2)
    weights = size(text) * (B * (L - 1) + N * T) + each_patch * int(patches.sum())
    pairs = B * (L - 1) * L / 2 + N * T * (L - 1 + (T + 1) / 2)
    full, _ = attention(model)
    between = sum(each.o_proj.in_features for each in full) * pairs
    between += sum(b.attn.proj.in_features for b in tower.blocks) * int(patches.square().sum())
    return 2 * weights, 4 * between


def attention(model):
    """The language model's modules of full and of linear attention."""
    layers = [layer._modules for layer in model.model.language_model.layers]
    return tuple(
        [layer[kind] for layer in layers if kind in layer] for kind in ("self_attn", "linear_attn")
    )


def read_bytes(model, N, length):
    """Bytes that one decoding step of N sequences reads and writes at least, `length` tokens being
    before it: the language model's weights, its head included and its embeddings not; keys and
    values; states of linear attention (convolution; recurrence, fp32, read and written)."""
    text = model.model.language_model
    head = model.lm_head.weight
    weights = sum(p.numel() for p in text.parameters())
    weights += head.numel() - text.embed_tokens.weight.numel()
    full, linear = attention(model)
    cached = sum(a.k_proj.out_features + a.v_proj.out_features for a in full) * length
    cached += sum(a.conv1d.weight.numel() for a in linear)
    recurrent = 2 * 4 * sum(a.num_v_heads * a.head_k_dim * a.head_v_dim for a in linear)
    return (weights + N * cached) * head.element_size() + N * recurrent


def speeds(model, args):
    """(flops a second of the MLP's matmuls, the faster one, on the tokens of a pass; bytes a
    second that a copy reads and writes)."""

    def once(work, *inputs):
        """Seconds of one of ten."""
        seconds, _ = measure(lambda: [work(*inputs) for _ in range(10)], args)
        return seconds / 10

    mlp = model.model.language_model.layers[0].mlp
    flops = []
    tokens = args.prompt_tokens + args.group * args.response_tokens
    for matrix in (mlp.up_proj, mlp.down_proj):
        weight = matrix.weight.detach()
        x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=args.device)
        flops.append(2 * tokens * weight.numel() / once(torch.mm, x, weight.t()))
    source, target = torch.ones(2, 2**28, dtype=torch.uint8, device=args.device)
    copied = 2 * len(source) / once(target.copy_, source)
    print(
        f"floors at {max(flops) / 1e12:,.3g} TFLOP/s (the MLP's matmuls, {tokens:,} tokens) and "
        f"{copied / 1e9:,.3g} GB/s (a copy)"
    )
    return max(flops), copied


def measure(run, args):
    """(median seconds of a run, peak GB above what was there before it), after one that does not
    count. GB is NaN on a CPU; both are NaN where a GPU's memory runs out."""
    cuda = args.device == "cuda"
    if cuda:
        gc.collect()  # of a row before that ran out of memory
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()  # 0 on a CPU; the first run may leave a cache
    try:
        run()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = [bench_loss.timed(run, args) for _ in range(args.repeats)]
    except torch.OutOfMemoryError:
        return nan, nan
    peak = torch.cuda.max_memory_allocated() - before if cuda else nan
    return statistics.median(seconds), peak / 2**30


def row(
    name,
    found,
    tokens,
    floor,
    plain=nan,
    step=nan,
):
    """found: (seconds, GB) measured; floor, plain way and whole step in seconds. NaN prints as a
    dash."""
    seconds, gb = found
    cells = (
        seconds * 1e3,
        tokens / seconds,
        gb,
        seconds / step,
        seconds / floor,
        plain / seconds,
    )
    line = ""
    for value, form in zip(cells, COLUMNS.values(), strict=True):
        line += f"{'-' if isnan(value) else format(value, form):>10}"
    print(f"  {name:48}{'  out of memory' if isnan(seconds) else line}", flush=True)


def compare(
    name,
    ours,
    plain,
    floor,
    tokens,
    args,
    step=nan,
):
    """Measures ours and the plain way and prints a row of each. Returns their seconds."""
    slow = measure(plain, args)
    fast = measure(ours, args)
    row(name, fast, tokens, floor, slow[0], step)
    row("  plain way", slow, tokens, floor)
    return fast[0], slow[0]


def run_of(model, processor, flags):
    """A run as train.py makes it, on nameless triplets."""
    settings = train.parse(flags.split())
    ranks = join_ranks(settings.device)
    shards = Shards(
        copy.deepcopy(model).to(ranks[-1]),
        lr=settings.lr,
        eps=settings.adam_eps,
        weight_decay=settings.weight_decay,
        copy_stays=False,
    )
    rows = [Triplet(str(i), "", "", [""]) for i in range(settings.prompts)]
    method = METHODS[settings.method](settings)
    return train.Run(settings, method, rows, processor, shards, *ranks)


def update(shards):
    shards.update(1e-6, shards.gradient_norm(), 1.0, 0.05)
    shards.publish("student")
    shards.publish("teacher")


def bench_step(model, processor, args, rate, bandwidth):
    """One optimizer step on one prompt and its phases: train.learn's, and the plain way's. Returns
    (the step's speed-up,)."""
    group, tokens = args.group, args.response_tokens
    n = group * tokens
    run = run_of(
        model,
        processor,
        f"--prompts 1 --gen-prompts 1 --steps 9 --group {group} --chunk {args.chunk} "
        f"--max-new-tokens {tokens} --device {args.device}",
    )
    full = photo(processor, args)
    crop = photo(processor, args, 0.4)
    ids = torch.randint(256, (group, tokens), device=args.device)
    plain = Plain(model, full, crop, args)
    generate = partial(sample, model, processor, full, group, max_new_tokens=tokens, seeds=[0])

    @torch.no_grad()
    def teacher_pass():
        return vision_model.response_hidden(model, crop, ids)

    def student_pass(checkpoint=True):
        def squares(student):
            hidden = vision_model.response_hidden(student, full, ids, checkpoint=checkpoint)
            return hidden.square().sum()

        run.shards.student_pass(squares).backward()

    sides = bench_loss.draw(args, n, *model.lm_head.weight.shape)
    matmuls, _ = measure(bench_loss.matmuls(args, *sides), args)
    forward = sum(forward_flops(model, full, group, tokens)) / rate  # seconds
    teacher_forward = sum(forward_flops(model, crop, group, tokens)) / rate
    length, crop_length = (prompt["input_ids"].shape[1] for prompt in (full, crop))
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
    step = partial(train.learn, run, 1, [(run.rows, {"student": full, "teacher": crop})])
    ours, slow = compare("whole step, train.learn", step, plain.step, floor, n, args)
    for name, phase in phases.items():
        compare(name, *phase, n, args, ours)
    updating = measure(partial(update, run.shards), args)
    row("update: AdamW, EMA, new weights", updating, n, nan, step=ours)
    compare(
        "student pass without checkpointing",
        partial(student_pass, checkpoint=False),
        partial(plain.student_pass, ids, checkpoint=False),
        3 * forward,
        n,
        args,
    )
    return (slow / ours,)


class Plain:
    """The plain way of a step: every response a full sequence, all logits at once, AdamW and EMA
    on the weights as they are."""

    def __init__(self, model, full, crop, args):
        self.full, self.crop, self.args = full, crop, args
        self.student = copy.deepcopy(model).requires_grad_(True)
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        # In training mode; the vision tower's is on.
        self.student.model.language_model.activation_checkpointing_enable()
        self.adam = torch.optim.AdamW(self.student.parameters(), lr=1e-6, fused=True)

    def generate(self):
        self.student.eval()
        return plain_generate(self.student, self.full, self.args.group, self.args.response_tokens)

    @torch.no_grad()
    def teacher_pass(self, ids):
        return plain_hidden(self.teacher, self.crop, ids)

    def student_pass(self, ids, loss=None, checkpoint=True):
        self.student.train(checkpoint)
        for rows in torch.arange(len(ids)).split(self.args.plain_rows):
            hidden = plain_hidden(self.student, self.full, ids[rows])
            (loss(hidden, rows) if loss else hidden.square().sum()).backward()

    def step(self):
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


def bench_generate(model, processor, args, rate, bandwidth):
    """G sampled responses to each of --gen-prompts prompts. Returns (multiple of the floor,)."""
    B, group, T = args.gen_prompts, args.group, args.response_tokens
    n = B * group
    prompt = vision_model.join([photo(processor, args)] * B, 0)
    L = prompt["input_ids"].shape[1]
    generate = partial(sample, model, processor, prompt, group, seeds=[0] * B)
    plainly = partial(plain_generate, model, prompt, group, T)
    floor = T * read_bytes(model, n, L + T / 2) / bandwidth
    print(
        f"\ngeneration of {n} sequences: {B} prompts of {L:,} tokens, {T} response tokens, "
        f"G = {group}\n{HEADER}"
    )
    growing = partial(generate, max_new_tokens=T)
    _, plain = compare("generation", growing, plainly, floor, n * T, args)
    fixed = measure(partial(growing, static=L + T), args)  # its first run compiles
    row("static cache (on a GPU: train.py --compile)", fixed, n * T, floor, plain)
    CACHES.clear()
    first = measure(partial(generate, max_new_tokens=1), args)
    row("of which prompts and one token", first, n, sum(forward_flops(model, prompt)) / rate)
    return (fixed[0] / floor,)


def bench_synth(args):
    """What synth.py does with a photograph besides asking models: one image of the released set's
    median size, one triplet."""
    colours = Image.frombytes("RGB", (141, 94), random.Random(0).randbytes(141 * 94 * 3))
    smooth = colours.resize((2250, 1500), Image.Resampling.BICUBIC)
    grain = Image.effect_noise(smooth.size, 6).convert("RGB")  # 128 is none
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = folder / "photo.jpg"  # of about 2 MB, as a camera's
        save_image(ImageChops.add(smooth, grain, offset=-128), source)
        size = source.stat().st_size / 1e6
        region = Region(load_photo(folder, source.name), [1000, 700, 1200, 860])
        framed = Evidence([region]).framed()
        crop = cut(framed, region.window)
        jobs = {
            "decode": partial(load_photo, folder, source.name),
            "draw the frame": Evidence([region]).framed,
            "crop and enlarge": partial(cut, framed, region.window),
            "write the image, JPEG": partial(save_image, framed, folder / "a.jpg"),
            "write the crop, PNG": partial(save_image, crop, folder / "a.png"),
        }
        spent = {name: measure(job, args)[0] for name, job in jobs.items()}
    total = sum(spent.values())
    print(
        f"photographs of 2250 x 1500 px, {size:.1f} MB, one box each, one core: "
        f"{1 / total:.1f} a second"
    )
    for name, seconds in spent.items():
        print(f"  {name:56} {seconds * 1e3:9,.1f} ms {seconds / total:7.0%}")


CHOICES = {  # flag: (choices, the first is the default; meaning)
    "--device": (["cpu", "cuda"], "cuda changes the other defaults"),
    "--dtype": (["float32", "bfloat16"], "of the weights"),
    "--size": (list(SHAPES["sizes"]), "shape of the model for generate and step"),
    "--clock": (["wall", "cpu"], "loss: cpu counts processor seconds; set OMP_NUM_THREADS=1"),
}


def parse():
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = [*GOALS, "synth", "peer", "goals"]
    meaning = "goals: all but synth and peer"
    p.add_argument("what", nargs="*", default="goals", choices=names, help=meaning)
    for name, default in SHAPES["cpu"].items():
        flag = "--" + name.replace("_", "-")
        p.add_argument(flag, type=int, default=default, help=SHAPES["meaning"][name])
    for flag, (choices, meaning) in CHOICES.items():
        p.add_argument(flag, choices=choices, default=choices[0], help=meaning)
    each = list(bench_loss.CONTENDERS)
    p.add_argument("--contenders", nargs="+", default=each, choices=each, help="loss: these")
    each += list(bench_peer.PEERS)
    p.add_argument("--only", choices=each, help="used by the script itself: measure this one here")
    if p.parse_known_args()[0].device == "cuda":
        p.set_defaults(**SHAPES["cuda"])
    return p.parse_args()


def verdict(args, numbers, reached):
    """Whether the numbers found for a goal, if any, reach it."""
    if args.device == "cpu":
        return "not run on a GPU"
    if not numbers or {**vars(args), **SHAPES["cuda"]} != vars(args):
        return "not run in full"
    if isnan(sum(numbers)):
        return "out of memory"
    return "reached" if reached(*numbers) else "missed"


def main():
    args = parse()
    if args.only:
        (bench_peer if args.only in bench_peer.PEERS else bench_loss).measure(args)
        return
    transformers.utils.logging.set_verbosity_error()
    print(
        f"{args.size} Qwen3.5, {args.dtype}, {bench_loss.machine(args)}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}"
    )
    asked = set(GOALS) if "goals" in args.what else {*args.what}
    found = {}  # the numbers that the goals are about
    if "synth" in asked:
        bench_synth(args)
    if "peer" in asked:
        bench_peer.run(args)
    if "loss" in asked:  # first: its processes need the GPU's memory
        found["loss"] = bench_loss.run(args)
    if {"generate", "step"} & asked:
        dtype = getattr(torch, args.dtype)
        model, processor = build(args.size, args.model_vocab, args.device, dtype)
        measured = speeds(model, args)
        for name, bench in (("generate", bench_generate), ("step", bench_step)):
            if name in asked:
                found[name] = bench(model, processor, args, *measured)
    if found:
        print("\ngoals, in the shapes of --device cuda")
        for name, (goal, reached) in GOALS.items():
            numbers = found.get(name) or ()
            shown = ", ".join(f"{number:.2f}" for number in numbers)
            print(f"  {goal:90} {verdict(args, numbers, reached):18} {shown}")


if __name__ == "__main__":
    main()
