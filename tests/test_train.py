"""One training step is the paper's; a run is stopped, resumed, refused and reported."""

import json
import math
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    ask,
    assert_equal,
    assert_same_update,
    log,
    plain_logits,
    respond,
    small_run,
    weights,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import methods
import sharding
import train
from launch import script
from loss import divergence
from model import load
from storage.checkpoint import save
from toy import demonstration, scenes
from toy.tiny import tiny
from triplets.format import read_triplets
from triplets.order import batch_rows, deal

core = pytest.mark.core


def state(checkpoint):
    """All that a run is resumed from: KIND.NAME of student, teacher, exp_avg, exp_avg_sq."""
    path = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint / "state", path)
    return torch.load(path)


# ---------------------------------------------------------------------------------------- the step


@core
@pytest.mark.parametrize("data", ["data", "pairs"])
def test_a_step_is_the_papers_equation_with_plain_forwards_autograd_and_adamw(
    data, run, world, tmp_path
):
    """Again, from the equation: every sequence alone, full logits, torch's clipping and AdamW; with
    one crop a triplet, and with two."""
    flags = (
        f"--data {world / data} --steps 1 --clip 0.02 --weight-decay 0.1 --ema-rate 0.25 --top-k 16"
    )
    got = run("fast", flags)
    entry = log(tmp_path / "fast")[0]
    student, processor = load(str(world / "base"))
    teacher, _ = load(str(world / "base"))
    rows = read_triplets(world / data)
    losses = []
    agreed = ended = 0
    shown = {}
    for number in batch_rows(len(rows), 4, 0, 0):
        row = rows[number]
        full = ask(processor, row.image, row.question)
        crop = ask(processor, row.crops, row.question)
        for answer in respond(student, processor, full, 2, f"0/0/{row.id}"):
            ended += int(answer[-1] == processor.tokenizer.eos_token_id)
            student_logits = plain_logits(student, full, answer)
            teacher_logits = plain_logits(teacher, crop, answer).detach()
            each = divergence(student_logits, teacher_logits, k=16)
            losses.append(each)
            among = teacher_logits.gather(-1, student_logits.topk(16).indices)
            agreed += int((among.argmax(-1) == 0).sum())
            shown.setdefault(row.id, (answer.tolist(), each.tolist()))
    tokens = sum(map(len, losses))
    mean = torch.cat(losses).mean()
    mean.backward()
    assert entry["loss"] == pytest.approx(mean.item(), rel=1e-4)
    assert entry["agreement"] == pytest.approx(agreed / tokens)
    assert 0 < agreed < tokens
    counts = [entry[key] for key in ("tokens", "length", "eos", "truncated", "shrunk")]
    assert counts == [tokens, tokens / 8, ended / 8, 1 - ended / 8, 0]
    assert entry["mem_gb"] > 0.1

    saved = log(tmp_path / "fast", "rollouts")
    assert len(saved) == 2  # a micro-batch
    for told in saved:
        answer, each = shown[told["id"]]
        assert len(told["crops"]) == (2 if data == "pairs" else 1)
        assert told["tokens"] == [processor.tokenizer.decode([token]) for token in answer]
        assert told["divergence"] == pytest.approx(each, rel=1e-3, abs=2e-5)

    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.02)
    assert norm > 0.02  # so clipping is at work
    assert entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    kept = state(tmp_path / "fast" / "checkpoint-000001")
    for name, weight in student.named_parameters():
        moment = kept[f"exp_avg.{name}"]
        torch.testing.assert_close(moment, 0.1 * weight.grad, rtol=1e-3, atol=1e-7)
    torch.optim.AdamW(student.parameters(), 1e-3 / 2, eps=1e-4, weight_decay=0.1).step()
    start, want = dict(teacher.named_parameters()), dict(student.named_parameters())
    assert_same_update(got, want, start)
    for name, weight in got.items():
        assert torch.equal(kept[f"student.{name}"], weight)
        ema = 0.75 * start[name] + 0.25 * weight
        torch.testing.assert_close(kept[f"teacher.{name}"], ema, atol=1e-7, rtol=1e-6)


@core
def test_speed_and_memory_flags_do_not_change_the_update(run, world):
    want = run("plain", "--steps 2")
    for flags in (
        "--micro-prompts 1 --gen-prompts 1",
        "--micro-prompts 3 --gen-prompts 2",
        "--micro-prompts 4 --chunk 3 --no-checkpointing --workers 1",
    ):
        got = run(flags.replace(" ", ""), "--steps 2", flags)
        assert_same_update(got, want, weights(world / "base"))


@core
def test_the_learning_rate_warms_up_and_then_stays_or_falls(run, tmp_path):
    settings = train.parse(["--warmup", "4", "--steps", "8"])
    rates = [train.learning_rate(step, settings) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]
    settings = train.parse(["--warmup", "2", "--schedule", "cosine", "--steps", "12"])
    rates = [train.learning_rate(step, settings) for step in (2, 7, 12)]
    assert rates == pytest.approx([1, 0.55, 0.1])
    run("x")
    assert [entry["lr"] for entry in log(tmp_path / "x")] == [5e-4, 1e-3, 1e-3]


def test_every_row_is_seen_once_an_epoch_in_an_order_given_by_the_seed():
    first, second, other = (
        [row for step in range(start, start + 3) for row in batch_rows(10, 3, seed, step)]
        for seed, start in ((0, 0), (0, 3), (1, 0))
    )
    for epoch in (first, second, other):
        assert len(set(epoch)) == len(epoch) == 9  # the last, incomplete batch is dropped
        assert set(epoch) < set(range(10))
    assert first != second
    assert first != other


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_a_batch_is_dealt_out_evenly_by_number_and_size(world_size):
    sizes = [random.Random(i).randint(1, 1000) for i in range(96)]
    parts = [deal(sizes, rank, world_size) for rank in range(world_size)]
    assert sorted(row for part in parts for row in part) == list(range(96))
    assert {len(part) for part in parts} == {96 // world_size}
    assert max(sum(sizes[j] for j in part) for part in parts) <= 1.02 * sum(sizes) / world_size
    assert deal([5, 3, 4], 0, 1) == [0, 1, 2]  # nothing to balance


# -------------------------------------------------------------------------------- stopped, resumed


@core
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(run, world, tmp_path):
    flags, out = "--steps 6 --save-every 2", tmp_path / "killed"
    want = run("straight", flags)
    command = [sys.executable, ROOT / "train.py", *small_run(world, out, flags)]
    process = subprocess.Popen(command)
    while not (out / "log.jsonl").exists() or len(log(out)) < 3:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.1')  # a line torn by the kill
    assert_equal(run("killed", flags), want)

    def told(name):
        return [(entry["step"], entry["loss"]) for entry in log(tmp_path / name)]

    assert told("killed") == told("straight")
    assert [step for step, _ in told("killed")] == [1, 2, 3, 4, 5, 6]
    killed, straight = (state(tmp_path / n / "checkpoint-000006") for n in ("killed", "straight"))
    assert_equal(killed, straight)


def test_a_checkpoint_half_written_is_as_if_it_were_not_there(run, tmp_path, monkeypatch):
    flags, out = "--steps 4 --save-every 2", tmp_path / "full"
    want = run("straight", flags)

    def full_disk(model, processor, folder):
        if (out / "checkpoint-000002").exists():
            raise OSError(28, "No space left on device")
        save(model, processor, folder)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "save", full_disk)
        with pytest.raises(OSError, match="checkpoint-000004"):
            run("full", flags)
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-000002"]
    (out / "checkpoint.partial" / "state").mkdir(parents=True)  # what a kill during a save leaves
    assert_equal(run("full", flags), want)


def test_bf16_weights_are_the_rounded_fp32_ones_from_which_a_resumed_run_goes_on(
    run, tmp_path, monkeypatch
):
    def in_bf16(path, *, device, dtype):
        return load(path, device=device, dtype=torch.bfloat16)

    monkeypatch.setattr(train, "load", in_bf16)
    live = run("straight", "--steps 2")
    run("twice", "--steps 1")
    assert_equal(run("twice", "--steps 2"), live)
    straight, twice = (state(tmp_path / n / "checkpoint-000002") for n in ("straight", "twice"))
    assert_equal(twice, straight)
    exact = {name: straight[f"student.{name}"] for name in live}
    assert_equal(live, {name: weight.bfloat16() for name, weight in exact.items()})
    assert any((live[name] != weight).any() for name, weight in exact.items())


def test_a_newest_checkpoint_that_was_taken_away_is_missed(run, tmp_path):
    run("x", "--steps 2 --save-every 1")
    shutil.rmtree(tmp_path / "x" / "checkpoint-000002")
    with pytest.raises(ValueError, match="checkpoint-000001"):
        run("x", "--steps 2 --save-every 1")
    assert len(log(tmp_path / "x")) == 2


def test_a_damaged_state_is_named(run, world, tmp_path):
    run("x", "--steps 1")
    folder = tmp_path / "x" / "checkpoint-000001" / "state"
    part = folder / "__0_0.distcp"
    for path, damaged in (
        (part, part.read_bytes()[:5000]),
        (part, None),
        (folder / ".metadata", None),
        (folder / ".metadata", b"no metadata"),
    ):
        whole = path.read_bytes()
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint-000001/state"):
            run("x", "--steps 2")
        path.write_bytes(whole)
    run("x", "--steps 2")


def test_a_state_of_another_model_is_refused(run, tmp_path, monkeypatch):
    model, processor = tiny(0)
    model.resize_token_embeddings(1024)
    save(model, processor, tmp_path / "base")
    monkeypatch.setattr(train, "fingerprint", lambda model: "the same")
    run("x", "--steps 1")
    with pytest.raises(ValueError, match="another model"):
        run("x", "--steps 2 --model", str(tmp_path / "base"))


def test_the_same_folder_spelled_otherwise_is_the_same_run():
    settings = train.parse(["--toy", "--out", "runs//x/", "--data", "runs/./data/"])
    folders = (settings.out, settings.model, settings.data)
    assert folders == ("runs/x", str(demonstration.BASE), "runs/data")
    assert train.parse(["--toy", "--out", "x/", "--retrain-base"]).model == "x/base"


def test_settings_of_a_run_that_never_began_bind_nobody(run):
    with pytest.raises(FileNotFoundError, match="no/model"):
        run("x", "--model no/model")
    run("x", "--steps 1")


def test_resuming_with_other_settings_is_refused_with_the_difference(run, tmp_path):
    run("x", "--steps 2")
    scenes.draw(tmp_path / "other", 8, 1)
    for flags, difference in (
        ("--beta 0.25", "beta: 0.5 -> 0.25"),
        ("--ema-rate 0.1", "ema_rate: 0.05 -> 0.1"),
        ("--seed 1", "seed: 0 -> 1"),
        ("--objective sampled-token", "objective: 'topk' -> 'sampled-token'"),
        ("--group 3", "group: 2 -> 3"),
        (f"--data {tmp_path / 'other'}", "rows_sha256"),
        ("--steps 1", "at step 2 already"),
    ):
        with pytest.raises(ValueError, match=difference):
            run("x", "--steps 2", flags)
    assert json.loads((tmp_path / "x" / "args.json").read_text())["steps"] == 2
    run("x", "--steps 3 --chunk 7 --micro-prompts 1")  # speed may change, and where it stops


def test_another_end_of_a_cosine_schedule_is_another_run(run):
    run("x", "--schedule cosine --steps 1")
    with pytest.raises(ValueError, match="steps: 1 -> 2"):
        run("x", "--schedule cosine --steps 2")


def test_a_non_finite_loss_stops_with_the_samples_and_updates_nothing(run, tmp_path, monkeypatch):
    def poisoned(*args, **options):
        value, *rest = topk_divergence(*args, **options)
        spoiled = (tmp_path / "x" / "checkpoint-000001").exists()
        return value * (math.nan if spoiled else 1), *rest

    topk_divergence = methods.topk_divergence
    with monkeypatch.context() as patch:
        patch.setattr(methods, "topk_divergence", poisoned)
        with pytest.raises(
            FloatingPointError, match=r"Step 2: loss nan.*train-0-\d+-(small|large)"
        ):
            run("x", "--steps 2 --save-every 1")
    assert len(log(tmp_path / "x")) == 1
    assert_equal(run("x", "--steps 2 --save-every 1"), run("straight", "--steps 2"))


# -------------------------------------------------------------------------------- flags, bad input


def test_the_defaults_are_the_papers():
    settings = train.parse(["--device", "cpu"])
    want = {
        "model": "Qwen/Qwen3.5-4B",
        "data": "yuanqianhao/Vision-OPD-6K",
        "prompts": 96,
        "group": 8,
        "max_new_tokens": 1024,
        "max_prompt": 8192,
        "max_crop_prompt": 10240,
        "method": "vision-opd",
        "teacher": "ema",
        "objective": "topk",
        "divergence": "jsd",
        "beta": 0.5,
        "top_k": 100,
        "ema_rate": 0.05,
        "lr": 2e-6,
        "weight_decay": 0.01,
        "clip": 1.0,
        "warmup": 10,
        "schedule": "constant",
        "steps": None,
    }
    assert {name: getattr(settings, name) for name in want} == want
    assert 6241 // settings.prompts == 65  # the paper's steps


@pytest.mark.parametrize("toy, lr", [([], "2e-06"), (["--toy"], demonstration.RUN["lr"])])
def test_help_tells_the_defaults(toy, lr, capsys):
    with pytest.raises(SystemExit):
        train.parse([*toy, "--help"])
    told = capsys.readouterr().out
    assert f"(default: {lr})" in told
    assert "(default: None)" not in told
    assert train.__doc__.strip() in told


@pytest.mark.parametrize(
    "flags",
    [
        # no such flag or value
        "--step=3",
        "--learning-rate=1",
        "--steps=0",
        "--group=0",
        "--threads=0",
        "--beta=1",
        "--trust=1.5 --teacher=trust-region",
        "--ema-rate=2",
        "--clip=0",
        "--lr=nan",
        "--adam-eps=0",
        "--adam-eps=nan",
        "--warmup=-5",
        "--resample=-1 --method=dapo",
        "--seed=1180591620717411303424",
        "--device=banana",
        "--divergence=kl",
        "--method=ppo",
        # no effect with the others
        "--retrain-base",
        "--trust=0.5",
        "--resample=3",
        "--teacher=ema --method=grpo",
        "--max-crop-prompt=99 --method=grpo",
        "--top-k=5 --method=sft",
        "--objective=topk --method=dapo",
        "--ema-rate=0.1 --teacher=initial",
        "--beta=0.3 --objective=sampled-token",
        "--divergence=jsd --objective=sampled-token",
        "--beta=0.3 --divergence=forward_kl",
        # no run together, or not here: two ranks, no GPU
        "--prompts=3",
        "--device=cuda",
        "--toy --device=cuda",
        "--compile --device=cpu",
        "--plan --toy",
        "--group=1 --method=grpo",
        "--teacher=trust-region --method=sft",
        "--objective=sampled-token --method=ead",
        "--objective=topk --method=s2vopd",
        "--tilt-floor=0.1 --method=vad",
        "--tilt-floor=1.5 --method=vcsd",
        "--tau=0.7 --method=opd-aha",
        "--group=1 --method=v-zero",
        "--group=2 --method=crops",
    ],
)
def test_a_flag_that_is_wrong_or_would_be_ignored_is_named(flags, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.parse(flags.split())
    told = capsys.readouterr().err.splitlines()[-1]
    assert flags.split()[0].partition("=")[0] in told.partition(" with --method")[0]


def test_bad_data_is_named_in_one_line_before_anything_is_trained(world, tmp_path, capsys):
    data = shutil.copytree(world / "data", tmp_path / "data")
    next((data / "images").glob("*-000009-*")).write_bytes(b"no picture")
    for flags, named in (
        ("--prompts 16", "12 triplets"),
        ("--data no/where", "no/where"),
        (f"--data {tmp_path / 'nowhere'}", "nowhere"),
        (f"--data {tmp_path}", "train.jsonl"),
        (f"--data {data}", "000009-pair.png"),
        ("--model no/model", "no/model"),
    ):
        with pytest.raises(SystemExit):
            script.run(train.main, small_run(world, tmp_path / "x", flags))
        assert named in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x" / "log.jsonl").exists()


def test_a_programming_error_in_a_worker_ends_the_run_too(world, tmp_path):
    """Whoever writes a view of their own sees its traceback, not a process that never ends."""
    code = (
        "import sys, train\n"
        "def broken(*_): undefined\n"
        "train.EncodedMicros.__getitem__ = broken\n"
        "train.script.run(train.main, sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *small_run(world, tmp_path / "x", "--workers 1")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "NameError: name 'undefined' is not defined" in ended.stderr
    assert ended.returncode == 1


def cut_short(data, step, place):
    """Damages the image of a step's row; returns the row."""
    rows = read_triplets(data)
    row = rows[batch_rows(len(rows), 4, 0, step)[place]]
    row.image.write_bytes(row.image.read_bytes()[:500])
    return row


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_corrupt_image_stops_the_run_which_goes_on_once_it_is_mended(
    workers, run, world, tmp_path
):
    data = shutil.copytree(world / "data", tmp_path / "data")
    row = cut_short(data, 1, 1)
    flags = f"--data {data} --steps 2 --save-every 1 --workers {workers}"
    with pytest.raises(ValueError, match=f"'{row.id}'.*{row.image.name}") as error:
        run("x", flags)
    assert "Traceback" not in str(error.value)
    assert not multiprocessing.active_children()  # they outlive SIGTERM, and so would this process
    shutil.copytree(world / "data", data, dirs_exist_ok=True)
    assert_equal(run("x", flags), run("straight", "--steps 2"))


def test_an_error_on_one_of_two_ranks_is_said_before_the_run_is_torn_down(world, tmp_path):
    data = shutil.copytree(world / "data", tmp_path / "data")
    row = cut_short(data, 0, 2)
    flags = small_run(world, tmp_path / "x", f"--data {data} --micro-prompts 1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "train.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"train.py: samples ['{row.id}']" in done.stderr


# ----------------------------------------------------------------------------------------- the toy


def test_the_toy_command_leaves_a_table_two_models_and_a_page(tmp_path, monkeypatch, capsys):
    def draw_few(folder, n, *rest, **options):
        return draw(folder, min(n, 24), *rest, **options)

    def untrained(folder, *_):
        save(*tiny(0), folder)

    draw = scenes.draw
    monkeypatch.setattr(scenes, "draw", draw_few)
    monkeypatch.setattr(demonstration, "draw", draw_few)
    monkeypatch.setattr(demonstration, "train_base", untrained)
    out = tmp_path / "toy"
    flags = ["--toy", "--retrain-base", "--out", str(out), "--steps", "2", "--workers", "0"]
    train.main(flags)
    printed = capsys.readouterr().out
    for told in ("toy, full", "toy-large, crop", "step    2/2 | loss"):
        assert told in printed
    for when in ("before", "after"):
        found = json.loads((out / f"eval-{when}" / "result.json").read_text())["benches"]
        counted = {name: {view: cell["n"] for view, cell in found[name].items()} for name in found}
        assert counted == {
            "toy": {"full": 10, "crop": 10, "gap": 10},
            "toy-distant": {"full": 5, "crop": 5, "gap": 5},
            "toy-large": {"full": 5, "crop": 5, "gap": 5},
            "toy-holdout": {"full": 4},
        }
    for name in ("rollouts.jsonl", "report.html", "base/config.json"):
        assert (out / name).exists()
    assert json.loads((out / "args.json").read_text())["versions"]["torch"] == torch.__version__
    final = out / "checkpoint-000002" / "model.safetensors"
    written = final.stat().st_mtime_ns
    train.main(flags)  # again: nothing left to do
    assert final.stat().st_mtime_ns == written
    assert len(log(out)) == 2
    assert log(out)[-1]["probe_full"] == log(out)[-1]["probe_crop"] == 0.0
