"""What gpu_day.py measures by itself, a process each: a function of its flags that prints what it
found as a line of JSON."""

import json
import tempfile
import time
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import bench
import bench_loss
import torch
import transformers
from gpu_day import CHUNKS, PACK, PICTURES
from PIL import Image

import plan
import train
import triplets.format as triplets
from model import ImageTextProcessor, prepare
from rollout import sample
from storage.checkpoint import save
from storage.files import write_jsonl
from toy.scenes import draw


def shapes_of(args) -> Namespace:
    """The flags of bench.py in the shapes of the day."""
    changed = bench.SHAPES["cuda"] if args.device == "cuda" else bench.SHAPES["dry"]
    how = {"device": args.device, "dtype": "float32", "clock": "wall"}
    return Namespace(**how | bench.SHAPES["cpu"] | changed | {"size": args.size, "repeats": 1})


def report(found: dict) -> None:
    print(json.dumps(found).replace("NaN", "null"), flush=True)


def synchronised(function):
    """The same, ended when the GPU has."""

    def run(*args):
        result = function(*args)
        torch.get_device_module().synchronize()
        return result

    return run


# ------------------------------------------------------------------------------------------- model


def shape(args) -> None:
    """A checkpoint without weights: configuration, processor, and a tokenizer with as many tokens
    as the model has, most of which no text is made of."""
    vocab = bench.SHAPES["cuda" if args.size != "tiny" else "dry"]["model_vocab"]
    model, processor = bench.build(args.size, vocab, "meta", torch.bfloat16)
    model.config.save_pretrained(args.out)
    processor.image_processor.save_pretrained(args.out)
    processor.tokenizer.save_pretrained(args.out)
    path = args.out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    known = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    words = tokenizer["model"]["vocab"]
    for number in range(len(words | known), vocab):
        words[f"filler{number}"] = number
    path.write_text(json.dumps(tokenizer))
    (args.out / "chat_template.jinja").write_text(processor.chat_template)


def shaped(args):
    """(args of the shapes, model of random weights, processor), of the packed shape."""
    shapes = shapes_of(args)
    folder = PACK / args.size
    if args.size == "tiny":
        folder = Path(tempfile.mkdtemp(dir=args.out))
        shape(Namespace(size=args.size, out=folder))
    config = transformers.AutoConfig.from_pretrained(folder)
    processor = ImageTextProcessor.from_pretrained(folder)
    processor.source = folder
    torch.manual_seed(0)
    with torch.device(args.device):
        dtype = getattr(torch, shapes.dtype)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    prepare(model, processor)
    # A suppressed token: no response ends early.
    model.generation_config.eos_token_id = [config.vision_start_token_id]
    return shapes, model, processor


# ------------------------------------------------------------------------------------------- parts


def step(args) -> None:
    """One of train.learn, after another: seconds, tokens, memory beside --plan's, kernels."""
    shapes, model, processor = shaped(args)
    full = bench.photo(processor, shapes)
    crop = bench.photo(processor, shapes, 0.4)
    flags = (
        f"--prompts 1 --gen-prompts 1 --steps 9 --group {shapes.group} --chunk {shapes.chunk} "
        f"--max-new-tokens {shapes.response_tokens} --device {args.device}"
    )
    lengths = [prompt["input_ids"].shape[1] for prompt in (full, crop)]
    outline = plan.Outline(model)
    run = bench.run_of(model, processor, flags)
    del model
    run.settings.plan = 1
    phases = plan.Memory(run.settings, outline, *lengths).phases()
    planned = phases.pop("stays") + max(phases.values())
    train.teach = synchronised(train.teach)
    batch = [(run.rows, {"student": full, "teacher": crop})]
    train.learn(run, 1, batch)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    entry, _ = train.learn(run, 2, batch)
    seconds = time.perf_counter() - begun
    found = {"size": args.size, "prompt_tokens": lengths[0], "seconds": seconds}
    found |= {key: entry[key] for key in ("gen_s", "teach_s", "learn_s")}
    found["tokens_a_second"] = shapes.group * shapes.response_tokens / seconds
    found |= {"peak_gb": entry["mem_gb"], "plan_gb": planned / 1e9}
    report(found)
    report(found | {"kernel_shares": kernel_shares(partial(train.learn, run, 3, batch))})


def kernel_shares(run) -> list[tuple[str, float]]:
    """The 25 kernels that took most of a run on a GPU (on a CPU: operations, those within others
    counted twice), and their shares."""
    activity = torch.profiler.ProfilerActivity
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profile:
        run()
    spent = Counter()
    for event in profile.profiler.kineto_results.events():  # key_averages() takes minutes
        if (event.device_type() == torch.autograd.DeviceType.CUDA) == cuda:
            spent[event.name()[:100]] += event.duration_ns()
    return [(name, each / spent.total()) for name, each in spent.most_common(25)]


def plain(args) -> None:
    """The plain way's step; fewer sequences at once where memory runs out."""
    shapes, model, processor = shaped(args)
    crop = bench.photo(processor, shapes, 0.4)
    way = bench.Plain(model, bench.photo(processor, shapes), crop, shapes)
    for rows in (shapes.group, 2, 1):
        shapes.plain_rows = rows
        seconds, gb = bench.measure(way.step, shapes)
        if seconds == seconds:
            report({"size": args.size, "seconds": seconds, "gb": gb, "rows_at_once": rows})
            return
    report({"size": args.size, "out_of_memory": True})


def loss(args) -> None:
    """At every chunk: milliseconds, multiple of the four matmuls, GB beyond the gradients; the
    last for other numbers of tokens as well."""
    shapes = shapes_of(args)
    shapes.repeats = 3
    found, extra, matmuls = {}, [], {}
    cases = [(shapes.tokens, chunk) for chunk in CHUNKS]
    cases += [(shapes.tokens * times // 4, shapes.chunk) for times in (1, 16)]
    for tokens, chunk in cases:
        shapes.chunk = chunk
        sides = bench_loss.draw(shapes, tokens, shapes.vocab, shapes.hidden)
        if tokens not in matmuls:
            matmuls[tokens], _ = bench.measure(bench_loss.matmuls(shapes, *sides), shapes)
        ours = bench_loss.ours(shapes, *sides)

        def run(ours=ours, sides=sides):
            for side in sides[:2]:
                side.grad = None
            ours()

        seconds, gb = bench.measure(run, shapes)
        gb -= sides[0].nbytes / 2**30 + sides[1].numel() * 4 / 2**30  # gradients, dhead in fp32
        name = f"{tokens} tokens, chunk {chunk}"
        ratio = seconds / matmuls[tokens]
        found[name] = {"ms": seconds * 1e3, "x_matmuls": ratio, "extra_gb": gb}
        if chunk == bench.SHAPES["cpu"]["chunk"]:
            extra.append(gb)
            if tokens == shapes.tokens:
                found["ratio"] = ratio
    real = args.device == "cuda"  # else memory is not counted
    report(found | {"extra_gb": max(extra) if real else None, "matmuls_s": matmuls})


def generate(args, static: bool) -> None:
    """G responses to each of many prompts; the floor is reading weights and cache once a token."""
    shapes, model, processor = shaped(args)
    prompts = [bench.photo(processor, shapes)] * shapes.gen_prompts
    pad = processor.tokenizer.pad_token_id
    prompt = bench.vision_model.join(prompts, pad)
    length, tokens = prompt["input_ids"].shape[1], shapes.response_tokens
    rows = shapes.gen_prompts * shapes.group
    how = {"seeds": [0] * shapes.gen_prompts, "static": length + tokens if static else 0}
    run = partial(sample, model, processor, prompt, shapes.group, max_new_tokens=tokens, **how)
    _, bandwidth = bench.speeds(model, shapes)
    floor = tokens * bench.read_bytes(model, rows, length + tokens / 2) / bandwidth
    first = bench_loss.timed(run, shapes)
    found = {"size": args.size, "sequences": rows, "first_s": first, "floor_s": floor}
    report(found)
    seconds = bench_loss.timed(run, shapes)
    found |= {"seconds": seconds, "x_floor": seconds / floor}
    report(found | {"tokens_a_second": rows * tokens / seconds})


def data(args) -> None:
    """Into args.out: toy scenes to train on, pictures with questions and boxes, and a checkpoint of
    random weights."""
    draw(args.out / "data", 40, 0)
    number, size, box = PICTURES, (1024, 768), [300, 300, 400, 380]
    if args.device == "cpu":
        number, size, box = 2, (448, 448), [100, 100, 140, 140]
    rows, boxes = [], []
    for i in range(number):
        image = Image.effect_noise(size, 64).convert("RGB")
        question = ("what is it ?", image, [image.crop(box)], [box], "a cross")
        rows.append(triplets.Triplet(f"{i:03d}", *question))
        boxes.append({"image": f"{i:03d}.png", "boxes": [box]})
    triplets.write_triplets(args.out / "pictures", rows)
    write_jsonl(args.out / "boxes.jsonl", boxes)
    _, model, processor = shaped(args)
    save(model, processor, args.out / "model")
    report({"weights": sum(weight.numel() for weight in model.parameters())})


PARTS = {
    "shape": shape,
    "step": step,
    "plain": plain,
    "loss": loss,
    "generation": partial(generate, static=False),
    "compiled": partial(generate, static=True),
    "data": data,
}
