"""Speed and memory, as ratios within one run: the shared prefix against the plain way, the phases of a step, the loss; and
what the images of a data set cost.

    python tests/bench.py train generate step            minutes on two CPU cores
    python tests/bench.py synth                          decode, draw, crop and write photographs of 2250 x 1500 px
    python tests/bench.py loss --tokens 256              the loss alone: against four matmuls, Liger-Kernel and TRL
    python tests/bench.py --device cuda --dtype bfloat16 --size 4b --prompt-tokens 4000 --response-tokens 200

The plain way is what the official code does: every response is one full sequence, prompt and image included, and
generation prefills each of the G copies. Weights are random; the shapes are what counts. Medians of --repeats runs.
"""
import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import bench_loss  # noqa: E402
import model as M  # noqa: E402
import toy  # noqa: E402
import synth  # noqa: E402
import train  # noqa: E402
from rollout import sample  # noqa: E402

SIZES = {  # name: text hidden, MLP, layers, heads, KV heads, head dim, linear key / value heads, vision depth, hidden, MLP
    "small": (192, 576, 4, 4, 2, 48, 4, 4, 2, 64, 128),
    "0.8b": (1024, 3584, 24, 8, 2, 256, 16, 16, 12, 768, 3072),
    "4b": (2560, 9216, 32, 16, 4, 256, 16, 32, 24, 1024, 4096),
}


def build(size: str, vocab: int, device, dtype):
    """A Qwen3.5 of real shape with random weights, and the tiny model's processor at patch 16."""
    hidden, mlp, layers, heads, kv, dim, key_heads, value_heads, depth, vision, vision_mlp = SIZES[size]
    _, processor = toy.tiny()
    processor.image_processor.patch_size = 16
    processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": 16_777_216}
    donor = toy.tiny()[0].config
    config = transformers.Qwen3_5Config(
        text_config=dict(vocab_size=vocab, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=kv, head_dim=dim, linear_num_key_heads=key_heads,
                         linear_num_value_heads=value_heads, tie_word_embeddings=True, eos_token_id=processor.tokenizer.eos_token_id,
                         rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25,
                                              mrope_section=[dim // 8 - 2 * (dim // 24), dim // 24, dim // 24], mrope_interleaved=True)),
        vision_config=dict(depth=depth, hidden_size=vision, intermediate_size=vision_mlp, num_heads=vision // 64, patch_size=16,
                           out_hidden_size=hidden, num_position_embeddings=2304),
        tie_word_embeddings=True, **{key: getattr(donor, key) for key in
                                     ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")})
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = transformers.Qwen3_5ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    M.prepare(model.to(device), processor)
    model.generation_config.eos_token_id = [config.vision_start_token_id]             # suppressed: no response ends early
    return model, processor


def photo(processor, prompt_tokens: int, share: float = 1.0) -> M.Prompt:
    """One prompt of exactly `prompt_tokens` (image tokens, then a question that fills the rest)."""
    images = int((prompt_tokens - 60) * share)
    columns = int(math.sqrt(images))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (images // columns * 32, columns * 32, 3), dtype=np.uint8))
    empty = M.encode(processor, [image], ["what"])["input_ids"].shape[1]
    return M.encode(processor, [image], ["what" + " is" * max(0, int(prompt_tokens * share) - empty)])


def copies(prompt: M.Prompt, group: int) -> dict:
    """The plain way's input: the prompt, image included, once per response."""
    return {key: value.repeat(group, *[1] * (value.ndim - 1)) for key, value in prompt.items() if key != "shrunk"}


def measure(run, args) -> float:
    """Median seconds of a run, after one that does not count."""
    seconds = []
    for _ in range(args.repeats + 1):
        start = now(args)
        run()
        seconds.append(now(args) - start)
    return statistics.median(seconds[1:])


def now(args) -> float:
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def row(name: str, seconds: float, floor: float) -> None:
    print(f"  {name:56} {seconds * 1e3:9,.0f} ms {floor / seconds:7.2f}x", flush=True)


def bench_train(model, processor, args) -> None:
    """Forward and backward of the hidden states that predict the responses: once per sequence, or sharing the prompt."""
    prompt, G, T = M.to_device(photo(processor, args.prompt_tokens), args.device), args.group, args.response_tokens
    ids = torch.randint(0, 256, (G, T), device=args.device)
    plain_inputs = copies(prompt, G)
    extra = torch.zeros_like(ids)
    plain_inputs |= {"input_ids": torch.cat([plain_inputs["input_ids"], ids], 1),
                     "attention_mask": torch.cat([plain_inputs["attention_mask"], extra + 1], 1),
                     "mm_token_type_ids": torch.cat([plain_inputs["mm_token_type_ids"], extra], 1)}

    def plain():
        model.model.rope_deltas = None
        model.model(**plain_inputs).last_hidden_state[:, -T - 1:-1].square().sum().backward()

    def shared(checkpoint):
        M.response_hidden(model, prompt, ids, checkpoint=checkpoint).square().sum().backward()

    print(f"training pass, {prompt['input_ids'].shape[1]} prompt and {T} response tokens, G = {G}")
    for checkpoint in (True, False):
        (model.activation_checkpointing_enable if checkpoint else model.activation_checkpointing_disable)()
        model.train()
        floor = measure(plain, args)
        model.activation_checkpointing_disable()
        M.prepare(model, processor)                                                   # also turns the vision tower's back on
        name = "with" if checkpoint else "without"
        row(f"plain: {G} full sequences, {name} checkpointing", floor, floor)
        row(f"shared prefix, {name} checkpointing", measure(lambda: shared(checkpoint), args), floor)
    model.zero_grad()


def bench_generate(model, processor, args) -> None:
    """G sampled responses: `num_return_sequences`-style generation of G copies, or one prefill."""
    prompt, G, T = M.to_device(photo(processor, args.prompt_tokens), args.device), args.group, args.gen_tokens
    inputs = copies(prompt, G)
    settings = transformers.GenerationConfig(max_new_tokens=T, min_new_tokens=T, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0)

    def plain():
        model.model.rope_deltas = None
        model.generate(**inputs, generation_config=settings)

    print(f"generation, {prompt['input_ids'].shape[1]} prompt and {T} new tokens, G = {G}")
    with torch.no_grad():
        floor = measure(plain, args)
    row(f"plain: generate on {G} copies of the prompt", floor, floor)
    row("prefill once, copy the cache", measure(lambda: sample(model, processor, prompt, G, max_new_tokens=T, seeds=[0]), args), floor)


def bench_step(model, processor, args) -> None:
    """The three phases of one optimizer step of train.py on one prompt, as `train.learn` logs them."""
    flags = ["--prompts", "1", "--group", str(args.group), "--max-new-tokens", str(args.response_tokens), "--steps", "9",
             "--device", args.device, "--gen-prompts", "1"]
    options = train.parse(flags)
    teacher = copy.deepcopy(model).requires_grad_(False)
    flat, teacher_flat = train.Flat(model, 0, 1), train.Flat(teacher, 0, 1)
    flat.track_gradients()
    state, rows = train.State(flat, options), [{"id": "0", "question": "", "image": "", "crop": "", "answer": None}]
    micro = ([0], photo(processor, args.prompt_tokens), photo(processor, args.prompt_tokens, 0.4))
    print(f"one step, {args.prompt_tokens} / {int(args.prompt_tokens * 0.4)} prompt tokens (student / teacher), {args.response_tokens} "
          f"response tokens, G = {args.group}")
    train.learn(options, 1, [micro], model, teacher, processor, flat, teacher_flat, state, rows)
    entry, _ = train.learn(options, 1, [micro], model, teacher, processor, flat, teacher_flat, state, rows)
    phases = {"1. rollouts (student)": entry["gen_s"], "2. teacher": entry["teach_s"], "3. student, loss, update": entry["learn_s"]}
    for name, seconds in phases.items():
        print(f"  {name:56} {seconds * 1e3:9,.0f} ms {seconds / sum(phases.values()):7.0%}")
    print(f"  {entry['tokens'] / sum(phases.values()):,.0f} response tokens a second, peak memory {entry['mem_gb']:.1f} GB")


def bench_synth(args) -> None:
    """What synth.py does with a photograph besides asking models: one image of the released set's median size, one triplet."""
    spent, rng, box = {}, np.random.default_rng(0), [1000, 700, 1200, 860]
    smooth = Image.fromarray(rng.integers(0, 256, (94, 141, 3), dtype=np.uint8)).resize((2250, 1500), Image.Resampling.BICUBIC)
    grain = np.asarray(smooth, int) + rng.normal(0, 6, (1500, 2250, 1))               # a JPEG of about 2 MB, as a camera's
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        synth.save(Image.fromarray(grain.clip(0, 255).astype(np.uint8)), folder / "photo.jpg")
        size = (folder / "photo.jpg").stat().st_size / 1e6
        photo = synth.photograph(folder, "photo.jpg")["image"]
        window = synth.geometry(photo.size, box)[2]
        framed = synth.draw_frame(photo, box)
        crop, _ = synth.cut(framed, window)
        for name, job in (("decode", lambda: synth.photograph(folder, "photo.jpg")), ("draw the frame", lambda: synth.draw_frame(photo, box)),
                          ("crop and enlarge", lambda: synth.cut(framed, window)), ("write the image, JPEG", lambda: synth.save(framed, folder / "a.jpg")),
                          ("write the crop, PNG", lambda: synth.save(crop, folder / "a.png"))):
            spent[name] = measure(job, args)
    print(f"photographs of 2250 x 1500 px, {size:.1f} MB, one box each, one core: {1 / sum(spent.values()):.1f} a second")
    for name, seconds in spent.items():
        print(f"  {name:56} {seconds * 1e3:9,.1f} ms {seconds / sum(spent.values()):7.0%}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("what", nargs="*", default=["train", "generate", "step", "loss"], help="train, generate, step, loss (default: these), synth")
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    p.add_argument("--size", default="small", choices=list(SIZES), help="shape of the model for train, generate and step")
    p.add_argument("--model-vocab", type=int, default=4096, help="its vocabulary (the loss has its own, --vocab)")
    p.add_argument("--prompt-tokens", type=int, default=612)
    p.add_argument("--response-tokens", type=int, default=50)
    p.add_argument("--gen-tokens", type=int, default=32)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--repeats", type=int, default=3)
    bench_loss.add_arguments(p)
    args = p.parse_args()
    if args.only:
        return bench_loss.measure(args)
    if unknown := set(args.what) - {"train", "generate", "step", "loss", "synth"}:
        p.error(f"unknown benchmark {sorted(unknown)}: choose from train, generate, step, loss, synth")
    transformers.utils.logging.set_verbosity_error()
    machine = f"{torch.get_num_threads()} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{args.size} Qwen3.5, {args.dtype}, {machine}, torch {torch.__version__}, transformers {transformers.__version__}")
    if "synth" in args.what:
        bench_synth(args)
    if set(args.what) - {"loss", "synth"}:
        model, processor = build(args.size, args.model_vocab, args.device, getattr(torch, args.dtype))
        for name, bench in (("train", bench_train), ("generate", bench_generate), ("step", bench_step)):
            if name in args.what:
                bench(model, processor, args)
        del model
    if "loss" in args.what:
        bench_loss.run(args)


if __name__ == "__main__":
    main()
