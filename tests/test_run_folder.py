"""A run's folder: held by one process, its own names only, its settings and logs as they were."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, assert_equal, log, noise, small_run, weights
from PIL import Image

import evaluate
import methods
import synth
import train
from launch import run_folder
from rollout import Rollout
from storage.files import hold
from toy.tiny import tiny
from triplets.format import Triplet

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HOLDER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from storage.files import hold
hold(Path(sys.argv[1]))
hold(Path(sys.argv[1]) / ".parts", ".00000.lock")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds tmp_path/x and what synth.py's first rank holds in it."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "x")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("signal_sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_folder_is_one_processs_until_its_death(signal_sent, holder, tmp_path):
    with pytest.raises(ValueError, match=f"process {holder.pid} on {os.uname().nodename}"):
        hold(tmp_path / "x")
    holder.send_signal(signal_sent)
    holder.wait()
    hold(tmp_path / "x")


def test_no_script_works_in_a_folder_that_is_held(holder, world, tmp_path):
    noise(500, 500).save(tmp_path / "photo.png")
    out = str(tmp_path / "x")
    given = {
        train: small_run(world, out),
        evaluate: f"--bench toy --model {world}/base --data-root {tmp_path} --out {out}".split(),
        synth: f"--images {tmp_path} --model {world}/base --out {out}".split(),
    }
    for script, argv in given.items():
        with pytest.raises(ValueError, match=f"process {holder.pid}"):
            script.main(argv)
    assert not (tmp_path / "x" / "args.json").exists()


def test_only_our_own_names_are_ours(run, tmp_path):
    run("x", "--steps 1 --save-every 1")
    mine = tmp_path / "x" / "checkpoint-000001-backup"
    shutil.copytree(tmp_path / "x" / "checkpoint-000001", mine)
    run("x", "--steps 2 --save-every 1")
    (tmp_path / "x" / "checkpoint-backup").mkdir()
    models = evaluate.models_of_run(tmp_path / "x", tmp_path / "out")
    assert [step.name for step in models] == ["step-000000", "step-000001", "step-000002"]
    assert (mine / "state" / ".metadata").exists()
    assert not (tmp_path / "x" / "checkpoint-000001" / "state").exists()


def test_a_folder_where_a_checkpoint_will_lie_is_named_before_the_run(run, tmp_path):
    run("x", "--steps 1")
    (tmp_path / "x" / "checkpoint-000002").mkdir()
    with pytest.raises(ValueError, match="checkpoint-000002"):
        run("x", "--steps 2")


@pytest.mark.parametrize("damaged", [None, "", "{", "[1]"])
def test_a_run_without_its_settings_is_not_gone_on_with(damaged, run, tmp_path):
    run("x", "--steps 1")
    args = tmp_path / "x" / "args.json"
    args.unlink()
    if damaged is not None:
        args.write_text(damaged)
    with pytest.raises(ValueError, match="args.json"):
        run("x", "--steps 2")


def test_damaged_lines_of_a_log_are_counted_and_left_out(run, tmp_path, capsys):
    run("x", "--steps 1")
    with (tmp_path / "x" / "log.jsonl").open("a") as file:
        file.write('{"step": 1, "lo\n5\n')
    run("x", "--steps 2")
    assert [entry["step"] for entry in log(tmp_path / "x")] == [1, 2]
    assert "log.jsonl: 2 unreadable lines" in capsys.readouterr().out


def test_how_far_a_target_moved_is_noted_of_what_is_shown_and_changes_nothing(run, tmp_path):
    flags = "--method opd-aha --chunk 5 --show-every"
    assert_equal(run("all", f"{flags} 1"), run("ends", f"{flags} 99"))
    run("plain", "--steps 1")
    shown = log(tmp_path / "all", "rollouts")
    assert {row["step"] for row in shown} == {1, 2, 3}
    assert {row["step"] for row in log(tmp_path / "ends", "rollouts")} == {1, 3}
    for row in shown:
        assert len(row["moved"]) == len(row["tokens"])
        assert 0 < max(row["moved"]) <= 1
        assert min(row["moved"]) >= 0
    assert not any("moved" in row for row in log(tmp_path / "plain", "rollouts"))


def test_a_shown_response_has_its_own_figures(tmp_path):
    """The first ones of two prompts: tokens 0 and 1, and 5 to 7, of which 6 does not count."""
    mask = torch.arange(4) < torch.tensor([2, 3, 3, 4])[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    rows = [Triplet(name, "what ?", tmp_path, [tmp_path]) for name in "ab"]
    micro = methods.Micro(rows, {}, Rollout(ids, mask, mask.any(1), ids))
    tokens = torch.arange(12.0)
    micro.moved = [tokens[:4] / 100, tokens[[4, 5, *range(7, 12)]] / 100]
    weights = mask.float()
    weights[2, 1] = 0
    settings = SimpleNamespace(group=2, out=tmp_path)
    run = SimpleNamespace(settings=settings, processor=tiny()[1])
    first, second = run_folder.show(run, 1, micro, tokens, weights)
    assert (first["divergence"], first["moved"]) == ([0, 1], [0, 0.01])
    assert (second["divergence"], second["moved"]) == ([5, None, 7], [0.05, 0, 0.07])


def test_the_same_model_and_a_moved_run_are_the_same_run(run, world, tmp_path):
    shutil.copytree(world / "base", tmp_path / "copy")
    run("x", "--steps 1")
    (tmp_path / "x").rename(tmp_path / "y")
    run("y", f"--steps 2 --model {tmp_path / 'copy'}")
    assert json.loads((tmp_path / "y" / "args.json").read_text())["steps"] == 2


@pytest.mark.parametrize("method", ["sft", "grpo", "dapo --resample 0"])
def test_a_step_with_nothing_to_learn_from_changes_nothing_and_is_counted(
    method, run, world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(methods, "is_right", lambda row, text: False)
    after = run("x", f"--steps 2 --weight-decay 0.5 --method {method}")
    assert_equal(after, weights(world / "base"))
    assert [entry["idle_steps"] for entry in log(tmp_path / "x")] == [1, 2]
    assert "2 such steps" in capsys.readouterr().out


def test_a_run_resumed_after_idle_steps_is_the_same_run(run, tmp_path, monkeypatch):
    """Adam counts updates, not steps."""
    select = methods.SFT.select
    monkeypatch.setattr(methods, "is_right", lambda row, text: begun.step >= 2)
    begun = SimpleNamespace(step=0)

    def selected(self, run, micros, step):
        begun.step = step
        return select(self, run, micros, step)

    monkeypatch.setattr(methods.SFT, "select", selected)

    flags = "--method sft --save-every 3 --steps"
    straight = run("straight", f"{flags} 5")
    run("stopped", f"{flags} 3")
    assert_equal(run("stopped", f"{flags} 5"), straight)
    assert log(tmp_path / "stopped")[-1]["idle_steps"] == 2


def test_images_that_no_processor_takes_are_named_before_the_run(run, world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    path = next((tmp_path / "data" / "teacher_images").glob("*-000007-*"))
    Image.new("RGB", (3, 900)).save(path)
    with pytest.raises(ValueError, match=f"{path.name} is 3 x 900"):
        run("x", f"--data {tmp_path / 'data'}")
    assert not (tmp_path / "x" / "log.jsonl").exists()


def test_a_killed_image_worker_ends_the_run_in_words(run, monkeypatch):
    monkeypatch.setattr(methods, "encode", lambda *args, **how: os.kill(os.getpid(), 9))
    with pytest.raises(OSError, match="--workers"):
        run("x", "--workers 1")


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    hold(tmp_path / "x")
    assert "without locks" in capsys.readouterr().out
