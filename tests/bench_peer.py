"""One optimizer step against TRL's, each in a process of its own on a CPU, in turn.

pip install trl==1.16.0 accelerate datasets
OMP_NUM_THREADS=1 python tests/bench.py peer --gen-prompts 2
"""

import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import torch
from PIL import Image

import model as vision_model
import train

STEPS = 2  # of which the last is timed


def ours(args, model, processor, rows):
    """Encoding included, which training leaves to a worker."""
    import bench

    run = bench.run_of(
        model,
        processor,
        f"--prompts {len(rows)} --gen-prompts {len(rows)} --micro-prompts {len(rows)} --steps 9 "
        f"--group {args.group} --max-new-tokens {args.response_tokens} --device cpu",
    )
    seconds = []
    for step in range(1, STEPS + 1):
        begun = time.perf_counter()
        prompts = {}
        for who, share in (("student", 1), ("teacher", args.teacher_share)):
            images = [
                image.resize([round(share * side) for side in image.size]) for image, _ in rows
            ]
            texts = [text for _, text in rows]
            prompts[who] = vision_model.encode(processor, images, texts)
        entry, _ = train.learn(run, step, [(run.rows, prompts)])
        seconds.append(time.perf_counter() - begun)
    phases = {key: entry[key] for key in ("gen_s", "teach_s", "learn_s")}
    return {
        "seconds": seconds[-1],
        "prompt_tokens": prompts["student"]["input_ids"].shape[1],
    } | phases


def trained_by(trainer, config, args, model, processor, rows, **more):
    """A step of one of TRL's trainers on `rows`, all of them at once."""
    from datasets import Dataset
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        begun, seconds = [], []

        def on_step_begin(self, *_, **__):
            self.begun.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.begun[-1])

    with tempfile.TemporaryDirectory() as folder:
        settings = config(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=args.gen_prompts * args.group,
            max_completion_length=args.response_tokens,
            generation_kwargs={
                "min_new_tokens": args.response_tokens,
                "suppress_tokens": processor.tokenizer.convert_tokens_to_ids(
                    list(vision_model.VISION_TOKENS)
                ),
            },
            chat_template_kwargs={"enable_thinking": False},
            learning_rate=1e-6,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            **more.pop("settings", {}),
        )
        chats = [[{"role": "user", "content": text}] for _, text in rows]
        data = Dataset.from_dict({"prompt": chats, "image": [image for image, _ in rows]})
        clock = Clock()
        trainer(
            model=model,
            args=settings,
            train_dataset=data,
            processing_class=processor,
            callbacks=[clock],
            **more,
        ).train()
    return {"seconds": clock.seconds[-1]}


def distillation(args, model, processor, rows):
    from trl import DistillationConfig, DistillationTrainer

    repeated = [row for row in rows for _ in range(args.group)] * STEPS
    how = {"teacher_model": copy.deepcopy(model)}
    return trained_by(
        DistillationTrainer, DistillationConfig, args, model, processor, repeated, **how
    )


def grpo(args, model, processor, rows):
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions, **_):
        return [float(i % 2) for i in range(len(completions))]

    how = {"reward_funcs": reward, "settings": {"num_generations": args.group}}
    return trained_by(GRPOTrainer, GRPOConfig, args, model, processor, rows * STEPS, **how)


PEERS = {  # name: (function, its line in the table)
    "vision-opd": (ours, "train.learn"),
    "distillation": (distillation, "TRL, DistillationTrainer"),
    "grpo": (grpo, "TRL, GRPOTrainer"),
}

NOTES = """
All: G responses sampled to each prompt at temperature 1, AdamW, activations recomputed, fp32.
train.learn: JSD over the student's top 100 and a tail; a teacher of its own with a smaller picture
    (the crop), and its EMA; log-probabilities of what was sampled; prompt and picture once a group.
DistillationTrainer: JSD over the whole vocabulary; the teacher reads the student's own prompt, and
    is not moved; prompt and picture once a response.
GRPOTrainer: no teacher; rewards, and the student's log-probabilities; prompt and picture once a
    response."""


def measure(args) -> None:
    """Runs one of them in this process and prints seconds and GB, or what is missing, as JSON."""
    import bench

    model, processor = bench.build(args.size, args.model_vocab, "cpu", torch.float32)
    args.teacher_share = 0.4**0.5
    rows = []
    for _ in range(args.gen_prompts):
        columns = int((args.prompt_tokens - 60) ** 0.5)
        size = (columns * 32, (args.prompt_tokens - 60) // columns * 32)
        rows.append((Image.effect_noise(size, 64).convert("RGB"), "what" + " is" * 44))
    function, _ = PEERS[args.only]
    try:
        found = function(args, model, processor, rows)
    except ImportError as error:
        found = {"missing": str(error)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps(found | {"gb": peak}))


def run(args) -> None:
    """Prints the table."""
    n = args.gen_prompts * args.group
    print(f"\none optimizer step, {n} responses of {args.response_tokens} tokens, CPU")
    found = {name: [] for name in PEERS}
    for _ in range(args.repeats):
        for name, results in found.items():
            command = [sys.executable, *sys.argv, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
                continue
            results.append(json.loads(done.stdout.splitlines()[-1]))
    own = None
    for name, (_, line) in PEERS.items():
        results = found[name]
        if not results:
            continue
        if "missing" in results[0]:
            missing = results[0]["missing"]
            print(f"{line:28} not installed: pip install trl accelerate datasets   ({missing})")
            continue
        seconds = statistics.median(each["seconds"] for each in results)
        own = own or seconds
        gb = max(each["gb"] for each in results)
        told = f"{line} {version('trl')}" if line.startswith("TRL") else line
        print(f"{told:34} {seconds:8.2f} s {seconds / own:6.2f}x {gb:6.2f} GB", results[-1])
    print(NOTES)
