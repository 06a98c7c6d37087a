"""A run's model card, upload and curves; what it does when it is told to stop; what scripts say of
themselves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import huggingface_hub
import pytest
from conftest import ROOT, assert_equal, log, small_run, weights
from huggingface_hub import ModelCard
from test_figures import marks, results

import train
from launch import script
from launch.card import MARK, write_reports
from storage import hub

# --------------------------------------------------------------------------------------- the card


def card_of(checkpoint) -> ModelCard:
    return ModelCard.load(checkpoint / "README.md")


def test_every_checkpoint_has_a_card_that_the_hub_reads(world, tmp_path):
    train.main(small_run(world, tmp_path / "x", "--steps 2 --save-every 1"))
    for step in (1, 2):
        card = card_of(tmp_path / "x" / f"checkpoint-00000{step}")
        assert card.data.library_name == "transformers"
        assert "vision-opd" in card.data.tags
        assert card.data.base_model is card.data.datasets is card.data.license is None  # folders
        assert f"after {step} steps of vision-opd" in card.content
        assert str(tmp_path) not in card.content


def test_a_card_names_repositories_of_the_hub_and_the_bases_licence(run, tmp_path, monkeypatch):
    run("x", "--steps 1")
    args = tmp_path / "x" / "args.json"
    told = json.loads(args.read_text()) | {"model": "Qwen/Base-4B", "data": "me/my-data"}
    args.write_text(json.dumps(told))
    theirs = tmp_path / "theirs.md"
    monkeypatch.setattr("launch.card.try_to_load_from_cache", lambda repo, file: str(theirs))
    for text, licence in (
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", "other"),
        ("---\nlicense: [\n---\n", None),
        ("no metadata", None),
    ):
        theirs.write_text(text)
        write_reports(tmp_path / "x")
        data = card_of(tmp_path / "x" / "checkpoint-000001").data
        assert (data.base_model, data.datasets) == ("Qwen/Base-4B", "me/my-data")
        assert data.license == licence


def test_a_card_has_the_runs_evaluations_of_its_own_checkpoint_with_intervals(run, tmp_path):
    run("x", "--steps 2 --save-every 1")
    out = tmp_path / "x"
    results(out / "eval-before", marks("1000000000"))
    (out / "eval-after").mkdir()
    (out / "eval-after" / "args.json").write_text('{"model": "x/checkpoint-000002"}')
    results(out / "eval-after", marks("1111110000"))
    write_reports(out)
    row = (
        r"mine, full \| 10 \| +10\.0 \[ +1\.8, +40\.4\] \| +60\.0 \[ +31\.3, +83\.2\] \| +50\.0 \["
    )
    assert re.search(row, card_of(out / "checkpoint-000002").content)
    assert "mine, full" not in card_of(out / "checkpoint-000001").content


def test_a_card_that_is_someones_own_is_left_alone(run, tmp_path):
    run("x", "--steps 1")
    path = tmp_path / "x" / "checkpoint-000001" / "README.md"
    for text, is_kept in (("# mine", True), (f"{MARK}\n# mine", False)):
        path.write_text(text)
        write_reports(tmp_path / "x")
        assert (path.read_text() == text) == is_kept


# -------------------------------------------------------------------------------------- the upload


class Hub:
    """The calls of HfApi that an upload makes."""

    def __init__(self):
        self.repos, self.files, self.error = {}, {}, None

    def create_repo(self, repo, *, private, exist_ok):
        assert exist_ok
        self.repos.setdefault(repo, private)

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, commit_message):
        if self.error:
            raise self.error
        paths = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*")]
        kept = huggingface_hub.utils.filter_repo_objects(paths, ignore_patterns=ignore_patterns)
        self.files[repo_id] = {name for name in kept if (folder_path / name).is_file()}
        return f"commit of {commit_message}"


@pytest.fixture
def fake_hub(monkeypatch):
    """A hub in memory, and a login."""
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return fake


def test_a_push_that_failed_loses_nothing_and_the_same_command_pushes_again(
    fake_hub, world, tmp_path, capsys
):
    flags = small_run(world, tmp_path / "x", "--steps 1 --push me/mine")
    fake_hub.error = ConnectionError("no network")
    with pytest.raises(SystemExit) as ended:
        script.run(train.main, flags)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "no network" in said.err.splitlines()[-1]
    assert f"model: {tmp_path}/x/checkpoint-000001" in said.out
    trained = weights(tmp_path / "x" / "checkpoint-000001")
    fake_hub.error = None
    train.main(flags)
    assert_equal(weights(tmp_path / "x" / "checkpoint-000001"), trained)
    assert fake_hub.repos == {"me/mine": True}  # a new one is private
    assert {"README.md", "model.safetensors", "config.json"} < fake_hub.files["me/mine"]
    assert not any(name.startswith("state") for name in fake_hub.files["me/mine"])


def test_without_a_login_or_a_name_a_push_is_refused_before_the_run(fake_hub, monkeypatch):
    assert hub.why_not_uploaded("me/mine") is None
    assert "no/such/name" in hub.why_not_uploaded("no/such/name")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit):
        train.parse(["--device", "cpu", "--push", "me/mine"])


# -------------------------------------------------------------------------------------- the curves

PACKAGE = """
import json, os
def init(project, name, config, resume, **where):
    if "NO_LOGIN" in os.environ:
        raise RuntimeError("not logged in")
    write("init", name, resume, config["seed"], sorted(where))
def log(figures, step):
    write("log", step, figures)
def write(*told):
    with open(os.environ["TOLD"], "a") as file:
        file.write(json.dumps(told) + "\\n")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A tracking package: install(name) -> the file of what it is told."""

    def install(name):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(PACKAGE)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setenv("TOLD", str(tmp_path / "told"))
        return tmp_path / "told"

    return install


@pytest.mark.parametrize("track, where", [("wandb", ["dir", "id"]), ("trackio", [])])
def test_a_resumed_run_goes_on_with_its_curve(track, where, run, package, tmp_path):
    told = package(track)
    run("x", f"--steps 1 --track {track}")
    run("x", f"--steps 3 --track {track}")
    lines = list(map(json.loads, told.read_text().splitlines()))
    (first, second) = (line[1:] for line in lines if line[0] == "init")
    assert first == second == [first[0], "allow", 0, where]
    sent = {line[1]: line[2] for line in lines if line[0] == "log"}
    assert sent == {entry.pop("step"): entry for entry in log(tmp_path / "x")}
    run("y", f"--steps 1 --track {track}")
    other = json.loads(told.read_text().splitlines()[-2])
    assert other[1] != first[0]


def test_a_tracking_package_that_is_missing_or_gives_no_run_is_named(run, package, monkeypatch):
    package("wandb")
    monkeypatch.setenv("NO_LOGIN", "1")
    with pytest.raises(ValueError, match="not logged in"):
        run("x", "--steps 1 --track wandb")
    monkeypatch.setattr("launch.tracking.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.parse(["--device", "cpu", "--track", "wandb"])


# --------------------------------------------------------------------------------- told to stop


@pytest.fixture
def start():
    """start(flags, **environment): train.py in a process group of its own, ended with the test."""
    processes = []

    def go(flags, **environment):
        command = [sys.executable, ROOT / "train.py", *flags]
        how = {"env": os.environ | environment, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, start_new_session=True, **how))
        return processes[-1]

    yield go
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_steps(process, out, steps: int) -> None:
    while not (out / "log.jsonl").exists() or len(log(out)) < steps:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_a_job_whose_every_process_is_told_to_stop_saves_and_goes_on_to_the_same_bits(
    start, run, world, tmp_path
):
    """As Slurm does it: also the processes that read images."""
    flags, out = "--steps 8 --workers 1", tmp_path / "told"
    want = run("straight", flags)
    process = start(small_run(world, out, flags))
    wait_for_steps(process, out, 2)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # a launcher passes it on once more
    assert process.wait(300) == script.SAVED
    (saved,) = out.glob("checkpoint-*")
    step = int(saved.name[-6:])
    assert step == len(log(out)) < 8
    assert f"step {step} is saved" in process.stderr.read()
    assert_equal(run("told", flags), want)
    assert [entry["step"] for entry in log(out)] == list(range(1, 9))


def test_one_rank_that_is_told_to_stop_stops_all(start, world, tmp_path):
    flags = small_run(world, tmp_path / "x", "--steps 500 --micro-prompts 1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(flags, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in (0, 1)]
    wait_for_steps(ranks[0], tmp_path / "x", 2)
    ranks[1].send_signal(signal.SIGTERM)
    assert [process.wait(300) for process in ranks] == [script.SAVED, script.SAVED]
    (saved,) = (tmp_path / "x").glob("checkpoint-*")
    assert int(saved.name[-6:]) == len(log(tmp_path / "x"))


def test_after_a_run_sigterm_is_as_it_was(run):
    before = signal.getsignal(signal.SIGTERM)
    run("x", "--steps 1")
    assert signal.getsignal(signal.SIGTERM) == before


# ------------------------------------------------------------------------------------------ scripts


@pytest.mark.parametrize("name", ["train.py", "evaluate.py", "synth.py", "-m toy"])
def test_every_script_tells_its_version_and_refuses_flags_with_2(name):
    def called(flag):
        command = [sys.executable, *name.split(), flag]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    told = called("--version")
    assert told.returncode == 0
    assert re.fullmatch(r"Vision-OPD .*, torch \d.*\n", told.stdout)
    refused = called("--no-such-flag")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "\x1b" not in refused.stderr + told.stdout
