"""What test_sharding.py compares: `python tests/ranks.py WORLD OUT RUN ..` does the same on 3, on 1
and on 2 ranks, into OUT/3, OUT/1 and OUT/2.

The ranks are forked from this process: importing torch takes longer than all that they do.
"""

import multiprocessing
import os
import socket
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import conftest  # first: it sets what torch reads, for the ranks too
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import methods
import model as vision_model
import train
from sharding import Shards, join_ranks, resume, save_checkpoint
from storage.checkpoint import save
from toy.tiny import tiny

SHORT = "--steps 1 --prompts 6 --micro-prompts 6"  # a pass a rank, where not told otherwise
RUNS = {
    "vision-opd": "--steps 3 --micro-prompts 2 --clip 0.1",  # so that clipping is at work
    "sampled-token": "--objective sampled-token",
    "trust-region": "--steps 2 --teacher trust-region --trust 0.3",
    "current": "--steps 2 --teacher current",
    "opsd": "--method opsd",
    "sft": "--method sft --micro-prompts 1",
    "va-opd": "--method va-opd",
    "cv-opd": "--method cv-opd --micro-prompts 1",
    "grpo": "--method grpo",
    "dapo": "--method dapo --resample 2 --micro-prompts 2",
    "pairs": "--micro-prompts 1",
    "untied": "",
    "qwen3-vl": "",
}


def few_are_right(row, text: str) -> bool:
    """Random weights answer nothing right: one text in five counts as right."""
    return sum(map(ord, text)) % 5 == 4


def make_models(world: Path) -> None:
    """Besides the tied one of `world`: WORLD/NAME, where a run has a model of its own."""
    models = {"qwen3-vl": conftest.tiny_qwen3_vl(), "untied": tiny(0)}
    untied = models["untied"][0]
    untied.config.tie_word_embeddings = untied.config.text_config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.flip(0))
    for name, (model, processor) in models.items():
        save(conftest.livelier(model, 3.0), processor, world / name)


def save_weights(out: Path, step: int, processor, shards: Shards) -> None:
    """In place of a checkpoint, which takes longer than a run's steps: OUT/model.safetensors."""
    named = shards.publish("student").named_parameters()
    if dist.get_rank() == 0:
        save_file({name: weight.detach() for name, weight in named}, out / "model.safetensors")


def run(world: Path, out: Path, flags: str) -> None:
    own = []
    if (world / out.name).exists():  # a data set, or a model
        flag = "--data" if out.name == "pairs" else "--model"
        own = [flag, str(world / out.name)]
    settings = train.parse(conftest.small_run(world, out, SHORT, *own, flags))
    with patch.object(train, "save_checkpoint", save_weights):
        train.train(settings, *join_ranks("cpu"))


def whole(shards: Shards, path: Path) -> None:
    """All that a run is resumed from, put together from all ranks."""
    tensors = {name: tensor.full_tensor() for name, tensor in shards.tensors().items()}
    tensors["step"] = next(iter(shards.adam.state.values()))["step"]
    save_file(tensors, path)


def some_shards() -> tuple:
    """A tiny model with a weight that no pass uses, and its processor."""
    model, processor = tiny(0)
    model.model.language_model.layers[0].idle = torch.nn.Parameter(torch.ones(5))
    shards = Shards(model, lr=0.1, eps=1e-2, weight_decay=0.5, copy_stays=False)
    return shards, processor


def save_random(saved: Path, out: Path) -> None:
    shards, processor = some_shards()
    for tensor in shards.tensors().values():
        tensor.to_local().normal_()
    shards.updates += 3  # of 4 steps: one was idle
    whole(shards, out / "random.safetensors")
    save_checkpoint(saved, 4, processor, shards)


def load_random(saved: Path, out: Path) -> None:
    shards, _ = some_shards()
    assert resume(saved, shards) == 4
    whole(shards, out / "random.safetensors")


def update_once(out: Path, ranks: int) -> None:
    """One update in which a weight took no part; the others' gradients are sums over the ranks."""
    shards, processor = some_shards()
    prompt = vision_model.encode(processor, [conftest.noise(64, 64)], ["a ?"])

    def loss(student):
        hidden = vision_model.response_hidden(student, prompt, torch.tensor([[5, 6, 7]]))
        return hidden.square().sum() / ranks

    shards.student_pass(loss).backward()
    shards.update(0.1, shards.gradient_norm(), 1.0, 0.25)
    whole(shards, out / "update.safetensors")


def all_of_it(world: Path, folder: Path, names: list[str], ranks: int) -> None:
    out, saved = folder / str(ranks), folder / "saved"
    out.mkdir(exist_ok=True)
    join_ranks("cpu")
    update_once(out, ranks)
    if ranks == 3:
        save_random(saved, out)
    else:
        load_random(saved, out)
    methods.is_right = few_are_right
    for name in names:
        run(world, out / name, RUNS[name])
    until = {3: 1, 1: 2, 2: 3}[ranks]
    flags = (SHORT, RUNS["vision-opd"], f"--steps {until}")
    moved = conftest.small_run(world, folder / "moved", *flags)
    train.train(train.parse(moved), *join_ranks("cpu"))


def fork(ranks: int, function) -> None:
    """Calls the function in as many processes, each with what torchrun would tell it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    started = []
    for rank in range(ranks):
        os.environ["RANK"] = str(rank)
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
        started.append(process)
    for process in started:
        process.join()
        assert process.exitcode == 0, f"one of {ranks} ranks ended with an error"


def main(world: str, folder: str, *names: str) -> None:
    world, folder = Path(world), Path(folder)
    make_models(world)
    folder.mkdir()
    for ranks in (3, 1, 2):
        fork(ranks, partial(all_of_it, world, folder, names, ranks))


if __name__ == "__main__":
    main(*sys.argv[1:])
