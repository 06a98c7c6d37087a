"""The engine is exact: on any number of ranks, through checkpoints, and against plain autograd."""

import copy
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, assert_equal, assert_same_update, log, weights
from ranks import RUNS, some_shards
from safetensors.torch import load_file

from model import response_hidden
from sharding import Shards, join_ranks, save_checkpoint
from toy.tiny import tiny

core = pytest.mark.core


@pytest.fixture(scope="session")
def on_ranks(world, tmp_path_factory, request):
    """The folder of what tests/ranks.py did on 1, 2 and 3 ranks; of its runs, those asked for."""
    tests = " ".join(item.name for item in request.session.items)
    asked = [name for name in RUNS if f"[{name}-" in tests]
    folder = tmp_path_factory.mktemp("ranks") / "out"
    command = [sys.executable, ROOT / "tests" / "ranks.py", world, folder]
    subprocess.run(command + asked, check=True)
    return folder


@pytest.mark.parametrize("ranks", ["2", "3"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vision-opd", marks=core),
        *list(RUNS)[1:],
    ],
)
def test_more_ranks_make_the_same_update(name, ranks, on_ranks, world):
    one, more = on_ranks / "1" / name, on_ranks / ranks / name
    base = world / name if (world / name / "config.json").exists() else world / "base"
    assert_same_update(weights(more), weights(one), weights(base))
    for got, want in zip(log(more), log(one), strict=True):
        for key in ("tokens", "length", "eos", "loss", "grad_norm"):
            # Of fewer than 1,000 tokens: counts are the same.
            assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("ranks", ["1", "2", "3"])
def test_ranks_without_anything_to_train_on_take_part(ranks, on_ranks, world):
    """sft-3: fewer responses of the 12 are right than there are ranks."""
    entry = log(on_ranks / ranks / "sft")[0]
    assert 1 <= round(12 * entry["kept"]) < 3


@core
def test_a_run_moved_from_3_ranks_to_1_and_to_2_ends_where_a_straight_one_does(on_ranks, world):
    moved, straight = on_ranks / "moved", on_ranks / "1" / "vision-opd"
    final = weights(moved / "checkpoint-000003")
    assert_same_update(final, weights(straight), weights(world / "base"))
    assert [entry["step"] for entry in log(moved)] == [1, 2, 3]
    assert [path.parent.name for path in moved.glob("*/state")] == ["checkpoint-000003"]
    assert weights(moved / "checkpoint-000001").keys() == final.keys()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_state_saved_on_3_ranks_loads_bit_for_bit(ranks, on_ranks):
    saved = load_file(on_ranks / "3" / "random.safetensors")
    loaded = load_file(on_ranks / ranks / "random.safetensors")
    assert_equal(loaded, saved | {"step": torch.tensor(3.0)})


@pytest.mark.parametrize("ranks", ["1", "2", "3"])
def test_a_weight_that_no_pass_uses_has_gradient_0_and_decays(ranks, on_ranks):
    one = load_file(on_ranks / "1" / "update.safetensors")
    state = load_file(on_ranks / ranks / "update.safetensors")
    idle = "model.language_model.layers.0.idle"
    assert not state[f"exp_avg.{idle}"].any()
    decayed = torch.full([5], 1 - 0.1 * 0.5)
    torch.testing.assert_close(state[f"student.{idle}"], decayed)
    torch.testing.assert_close(state, one, rtol=1e-4, atol=1e-5)


def shards_of(model, copy_stays: bool = False) -> Shards:
    join_ranks("cpu")
    return Shards(
        model,
        lr=0.1,
        eps=1e-8,
        weight_decay=0.0,
        copy_stays=copy_stays,
    )


@core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_plain_autograd_summed_in_fp32(dtype, lively, mixed_prompt):
    model = lively[0].to(dtype)
    pixels = mixed_prompt["pixel_values"].to(dtype)
    prompt = mixed_prompt | {"pixel_values": pixels}
    plain = copy.deepcopy(model)
    shards = shards_of(model)

    def loss(ids, student):
        hidden = response_hidden(student, prompt, ids)
        logits = hidden @ student.lm_head.weight.t()
        return logits.float().square().mean()

    weights = list(plain.parameters())
    want = [torch.zeros(weight.shape) for weight in weights]
    for ids in torch.randint(256, (3, 6, 5)):
        shards.student_pass(partial(loss, ids)).backward()
        gradients = torch.autograd.grad(loss(ids, plain), weights)
        for total, gradient in zip(want, gradients, strict=True):
            total += gradient.float()
    got = [weight.grad.full_tensor() for weight in shards.weights]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    numbers = torch.cat([gradient.flatten() for gradient in want])
    assert shards.gradient_norm() == pytest.approx(numbers.double().norm().item())


@core
def test_the_ema_teacher_has_its_closed_form_after_many_steps():
    join_ranks("cpu")
    shards, _ = some_shards()
    want = [0.95**7 * weight for weight in shards.teacher]
    for step in range(7):
        for weight in shards.weights:
            weight.grad = torch.randn_like(weight)
        shards.update(1e-2, shards.gradient_norm(), 1.0, 0.05)
        for total, weight in zip(want, shards.student, strict=True):
            total += 0.05 * 0.95 ** (6 - step) * weight
    torch.testing.assert_close(shards.teacher, want)


@pytest.mark.parametrize("stays", [False, True])
def test_the_plain_copy_gives_its_memory_back_for_the_students_pass_unless_it_is_to_stay(stays):
    model, _ = tiny(0)
    want = copy.deepcopy(model.state_dict())
    shards = shards_of(model, stays)
    copied = list(shards.publish("teacher").parameters())

    def bytes_held(student):
        return [weight.untyped_storage().nbytes() for weight in copied]

    sizes = shards.student_pass(bytes_held)
    assert sizes == [weight.nbytes if stays else 0 for weight in copied]
    assert_equal(shards.publish("student").state_dict(), want)


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name_and_the_older_state_goes_last(
    tmp_path, monkeypatch
):
    join_ranks("cpu")
    shards, processor = some_shards()
    save_checkpoint(tmp_path, 1, processor, shards)
    events = []

    def spy(module, name, told):
        real = getattr(module, name)

        def noted(*args, **kwargs):
            events.append(told(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    def inode(path):
        return os.stat(path).st_ino

    spy(os, "fsync", inode)
    spy(os, "rename", lambda _, to: to)
    spy(shutil, "rmtree", lambda path, *_: path)
    save_checkpoint(tmp_path, 2, processor, shards)
    final = tmp_path / "checkpoint-000002"
    named = events.index(final)
    written = {inode(path) for path in (final, *final.rglob("*"))}
    assert written <= set(events[:named])
    assert events[named + 1 :] == [
        inode(tmp_path),
        tmp_path / "checkpoint-000001" / "state",
    ]
