"""evaluate.py and synth.py against a real server, `transformers serve` with the toy's base model on
the CPU: the same answers and triplets as without one, also after kills; and how fast that is.

    python tests/real_server.py --server ENV/bin/transformers [--rows 120] [--keep DIR]

ENV is an environment of its own: tests/README.md. This process needs openai, torch, transformers.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

import model as vision_model  # noqa: E402
from benchmarks.figures import saved_answers  # noqa: E402
from rollout import answers  # noqa: E402
from storage.checkpoint import save  # noqa: E402
from storage.files import read_jsonl  # noqa: E402
from synthesis.texts import PROMPTS  # noqa: E402

BASE = ROOT / "toy" / "base-model"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
PATIENCE = 600  # seconds for a server to start
QUESTION = {"question": "What colour is the tag?", "answer": "red", "type": "colour"}
BOXES = [{"bbox_2d": [100, 200, 220, 300], "label": "tag"}]
LESSONS = {  # prompts of synth.py, and what the taught model says to them
    PROMPTS["find"] + PROMPTS["boxes"]: json.dumps(BOXES),
    PROMPTS["ask"] % ("tag", ", ".join(PROMPTS["types"])): json.dumps([QUESTION]),
    PROMPTS["vote"] % QUESTION["question"]: "red",
    PROMPTS["wrong"] % (QUESTION["question"], "red"): '["blue", "green", "white"]',
}


# ------------------------------------------------------------------------------------ the server


class Server:
    """`transformers serve` of a checkpoint, on a port that it keeps."""

    def __init__(self, program: Path, checkpoint: Path, log: Path):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://localhost:{self.port}/v1"
        self.command = [program, "serve", checkpoint, "--device", "cpu", "--dtype", "float32"]
        self.command += ["--port", str(self.port)]
        self.log = log.open("ab")

    def start(self):
        self.process = subprocess.Popen(self.command, env=ENV, stdout=self.log, stderr=self.log)
        for _ in range(PATIENCE):
            try:
                urlopen(f"http://localhost:{self.port}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, f"the server has ended: {self.log.name}"
                time.sleep(1)
        raise TimeoutError(f"no server after {PATIENCE} seconds: {self.log.name}")

    def kill(self):
        self.process.kill()
        self.process.wait()


@contextmanager
def serving(program: Path, checkpoint: Path, log: Path):
    server = Server(program, checkpoint, log)
    server.start()
    try:
        yield server
    finally:
        server.kill()


# ---------------------------------------------------------------------------------- the commands


def start(script: str, *flags) -> subprocess.Popen:
    words = [sys.executable, ROOT / script, *flags]
    return subprocess.Popen(list(map(str, words)), env=ENV, stderr=subprocess.DEVNULL)


def run(script: str, *flags, code: int = 0):
    found = start(script, *flags).wait()
    assert found == code, f"{script} ended with {found}, expected {code}"


def by(server: Server, checkpoint: Path) -> list:
    return ["--model", server.url, "--served-model", checkpoint]


def said(out: Path) -> dict:
    return {answer.place(): answer.output for answer in saved_answers(out)}


def written(out: Path) -> int:
    return len(saved_answers(out)) if out.is_dir() else 0


def differing(found: dict, wanted: dict) -> list:
    assert found.keys() == wanted.keys()
    return [key for key in wanted if found[key] != wanted[key]]


def compared_answers(server: Server, flags: list, work: Path):
    """The toy benchmark through the server, and locally; then killed on either side."""
    run("evaluate.py", *flags, "--model", BASE, "--device", "cpu", "--out", work / "local")
    wanted = said(work / "local")
    for concurrency in (1, 8, 32):
        out = work / f"served-{concurrency}"
        how = ["--concurrency", concurrency, "--out", out]
        run("evaluate.py", *flags, *by(server, BASE), *how)
        bad = differing(said(out), wanted)
        assert not bad, f"{len(bad)} of {len(wanted)} answers differ, the first {bad[:3]}"
    print(f"{len(wanted)} greedy answers through the server: the local ones, word for word")
    out = work / "killed"
    command = ["evaluate.py", *flags, *by(server, BASE), "--concurrency", 2, "--out", out]
    client = start(*command)
    wait_for(lambda: written(out) > 10, client)
    client.send_signal(signal.SIGKILL)
    client.wait()
    before = written(out)
    client = start(*command)
    wait_for(lambda: written(out) > before + 10, client)
    server.kill()
    assert client.wait() == 1
    after = written(out)
    assert before < after < len(wanted)
    server.start()
    run(*command)
    assert not differing(said(out), wanted)
    lines = sum(len(read_jsonl(file, [])) for file in out.glob("answers-*.jsonl"))
    print(
        f"client killed after {before} answers, server after {after}: the rest then, {lines} lines"
    )


def wait_for(happened, process: subprocess.Popen):
    while not happened():
        assert process.poll() is None, "it ended too early: more --rows"
        time.sleep(0.02)


def speeds(work: Path):
    """Rows a second of every run, from the seconds that its answers hold."""
    for name in ("local", "served-1", "served-8", "served-32"):
        rows = saved_answers(work / name)
        seconds = sum(row.seconds for row in rows)
        print(
            f"{name:<10} {len(rows)} rows in {seconds:6.1f} s, {len(rows) / seconds:6.1f} a second"
        )


# ----------------------------------------------------------------------------------- triplets


def picture(draw: np.random.Generator, size) -> Image.Image:
    pixels = draw.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(tuple(size), Image.Resampling.BICUBIC)


def taught(folder: Path) -> Path:
    """The base model after it has learnt by heart what to reply to synth.py's prompts."""
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    model, processor = vision_model.load(str(BASE))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    draw = np.random.default_rng(0)
    right = 0  # times in a row
    for step in range(1, 2001):
        sizes = [(480, 480)] + draw.integers(90, 180, (len(LESSONS) - 1, 2)).tolist()
        images = [picture(draw, size) for size in sizes]  # a photograph and crops
        prompt = vision_model.encode(processor, images, list(LESSONS))
        loss = lesson_loss(model, processor, prompt)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            replies = answers(model, processor, images, list(LESSONS), 200)
            as_taught = [reply.output for reply in replies] == list(LESSONS.values())
            right = right + 1 if as_taught else 0
            print(f"step {step}, loss {loss.item():.5f}, says it all: {as_taught}", flush=True)
            if right == 3:
                break
    save(model, processor, folder)
    return folder


def lesson_loss(model, processor, prompt) -> torch.Tensor:
    """Cross-entropy of the lessons' replies, mean over their tokens."""
    end = processor.tokenizer.eos_token_id
    replies = [[*processor.tokenizer(text)["input_ids"], end] for text in LESSONS.values()]
    longest = max(map(len, replies))
    padded = torch.tensor([ids + [-100] * (longest - len(ids)) for ids in replies])
    inputs = torch.cat([prompt["input_ids"], padded.clamp(min=0)], 1)
    output = model(
        input_ids=inputs,
        attention_mask=torch.cat([prompt["attention_mask"], (padded >= 0).long()], 1),
        mm_token_type_ids=torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(padded)], 1),
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
    )
    logits = output.logits[:, -longest - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), padded.flatten())


def rows_of(out: Path) -> list[dict]:
    rows = read_jsonl(out / "train.jsonl", [])
    for row in rows:
        del row["extra_info"]["config"]  # of the model's name as well
    return rows


def compared_triplets(server: Server, checkpoint: Path, work: Path):
    """Multiple-choice triplets through the server, its client killed once, and locally."""
    photos = work / "photos"
    photos.mkdir(exist_ok=True)
    for n in range(6):
        picture(np.random.default_rng(n), (480, 480)).save(photos / f"{n}.png")
    flags = ["--images", photos, "--format", "mcq", "--batch", 2]
    run("synth.py", *flags, "--model", checkpoint, "--out", work / "triplets-local")
    out = work / "triplets-served"
    command = ["synth.py", *flags, *by(server, checkpoint), "--out", out]
    client = start(*command)
    part = out / ".parts" / "00000.jsonl"
    wait_for(lambda: part.is_file() and len(read_jsonl(part, [])) > 2, client)
    client.kill()
    client.wait()
    run(*command)
    wanted = rows_of(work / "triplets-local")
    assert rows_of(out) == wanted
    told = json.loads((out / "stats.json").read_text())
    print(f"{len(wanted)} triplets through the server, its client killed once: the local ones")
    print(f"  the server says: {told['usage']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", type=Path, required=True, help="ENV/bin/transformers")
    parser.add_argument("--rows", type=int, default=120, help="of each of the toy's benchmarks")
    parser.add_argument("--keep", type=Path, help="a folder for what is made; else a temporary one")
    given = parser.parse_args()
    for package in ("openai", "torch", "transformers"):
        print(f"{package} {version(package)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work = (given.keep or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        flags = ["--bench", "toy", "--data-root", work, "--view", "both"]
        flags += ["--limit", given.rows, "--max-new-tokens", 18]
        with serving(given.server, BASE, work / "server.log") as server:
            compared_answers(server, flags, work)
        speeds(work)
        checkpoint = taught(work / "taught")
        with serving(given.server, checkpoint, work / "server.log") as server:
            compared_triplets(server, checkpoint, work)


if __name__ == "__main__":
    main()
