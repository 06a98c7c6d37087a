"""The toy world: what its scenes show, what its tiny model reads, its command line, its table."""

import json
import random
import runpy
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT

import train
from model import load
from toy import base, curves, demonstration, table
from toy.scenes import COLOURS, KINDS, SHAPES, SPLITS, draw, scene, sprite
from toy.tiny import WORDS, tiny
from triplets.format import RED, read_triplets


def scenes(count=60, split="train", seed=0):
    for index in range(count):
        for kind in KINDS:
            yield scene(seed, index, kind, split)


def pixels(image):
    return np.asarray(image, dtype=int)


def reddish(picture):
    return picture[..., 0] - picture[..., 1:].max(-1) > 40


# ------------------------------------------------------------------------------------------ scenes


def test_a_scene_depends_on_its_seed_and_index_alone():
    code = (
        "from toy.scenes import scene\n"
        "drawn = scene(3, 5, 'distant', 'eval')\n"
        "print(drawn.answer, drawn.image.tobytes().hex())"
    )
    command = [sys.executable, "-c", code]
    alone = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *_, drawn = scenes(6, "eval", 3)  # the last one
    assert alone.stdout == f"{drawn.answer} {drawn.image.tobytes().hex()}\n"


def test_splits_and_seeds_share_no_scene():
    pictures = set()
    for split, seed in product(SPLITS, (0, 1)):
        for drawn in scenes(40, split, seed):
            pictures.add(drawn.image.tobytes())
    assert len(pictures) == 1920  # 4 splits, 2 seeds, 40 scenes of each of 6 kinds


def test_a_crop_is_what_its_box_frames_and_only_the_full_view_has_red_boxes():
    for drawn in scenes():
        full = pixels(drawn.image)
        frame = np.zeros((64, 64), bool)
        for box, shown in zip(drawn.boxes, drawn.crops, strict=True):
            left, top, right, bottom = box
            inside = np.s_[top + 1 : bottom - 1, left + 1 : right - 1]
            if drawn.extra["toy"] != "corner":
                frame[top:bottom, left:right] = True
                frame[inside] = False
            crop = pixels(shown)
            zoom = 32 // (bottom - top)
            target = crop[::zoom, ::zoom]
            assert (crop == target.repeat(zoom, 0).repeat(zoom, 1)).all()
            assert (full[inside] == target[1:-1, 1:-1]).all()
            assert not reddish(crop).any()
        assert (full[frame] == RED).all()
        assert (reddish(full) == frame).all()


def test_distant_targets_do_not_touch_and_come_as_one_reads():
    for index in range(60):
        first, second = scene(0, index, "distant").boxes
        assert max(abs(a - b) for a, b in zip(first, second, strict=True)) >= 32
        assert (first[1], first[0]) < (second[1], second[0])


@pytest.fixture(scope="module")
def objects():
    """Colour, shape and digit of all objects, their pixels and their silhouettes."""
    kinds = list(product(range(6), range(5), range(10)))
    drawn = np.stack([pixels(sprite(*kind)) for kind in kinds])  # (300, 16, 16, 4)
    return kinds, drawn[..., :3], drawn[..., 3] == 255


def test_the_300_objects_differ_their_digits_stand_out_and_the_box_has_room(objects):
    _, drawn, opaque = objects
    assert opaque[:, 1:-1, 1:-1].sum() == opaque.sum()
    on_the_ground = np.where(opaque[..., None], drawn, 40)
    assert len({each.tobytes() for each in on_the_ground}) == 300
    gray = on_the_ground @ (0.299, 0.587, 0.114)
    between_digits = np.ptp(gray.reshape(30, 10, 256), axis=1)
    assert (between_digits.max(1) > 90).all()
    assert between_digits[between_digits > 0].min() > 90


def test_the_answer_is_what_the_crop_shows(objects):
    """Read back by template: the largest object whose pixels are all there."""
    kinds, drawn, opaque = objects
    sizes = opaque.sum((1, 2))
    names = list(COLOURS)
    for each in scenes(30):
        told = []
        side_by_side = np.concatenate([pixels(crop) for crop in each.crops], axis=1)
        for cell in np.split(side_by_side[::2, ::2], side_by_side.shape[1] // 32, axis=1):
            there = ((drawn == cell).all(-1) | ~opaque).all((1, 2))  # (300,)
            colour, shape, digit = kinds[np.where(there, sizes, 0).argmax()]
            told.append(f"a {names[colour]} {SHAPES[shape]} with {digit}")
        expected = " , ".join(told)
        if each.extra["toy"] == "colour":
            expected = f"a {names[colour]} one"
        assert each.answer == f"{expected} ."


def test_a_corner_is_where_its_question_says():
    for index in range(40):
        drawn = scene(0, index, "corner")
        left, top, *_ = drawn.boxes[0]
        vertical = "bottom" if top else "top"
        horizontal = "right" if left else "left"
        assert f"at the {vertical} {horizontal} ?" in drawn.question


def test_scenes_hold_4_to_12_objects_targets_everywhere_and_every_word():
    boxes = set()
    words = set()
    counts = set()
    for drawn in scenes(300):
        kind = drawn.extra["toy"]
        boxes.add((kind, *drawn.boxes[0]))
        words.update(drawn.answer.split(), drawn.question.split())
        cells = pixels(drawn.image).reshape(4, 16, 4, 16, 3)[:, 1:15, :, 1:15]  # without the box
        filled = (cells.max(-1) >= 120).any((1, 3))  # (4, 4)
        if kind == "small":
            counts.add(filled.sum())
    assert counts == set(range(4, 13))
    assert len(boxes) == 16 + 12 + 9 + 16 + 4 + 14  # of distant ones the first
    assert words | {"user", "assistant"} == {*WORDS, *"0123456789"}


def test_every_word_of_the_world_is_one_token_but_for_digits():
    tokenizer = tiny()[1].tokenizer
    for drawn in scenes(20):
        text = f"{drawn.question} {drawn.answer}"
        digits = sum(map(str.isdigit, text))  # the space before one is another token
        assert len(tokenizer(text)["input_ids"]) == len(text.split()) + digits


# ---------------------------------------------------------------------------------------- data set


@pytest.mark.parametrize(
    "split, kinds",
    [
        ("train", "small pair distant large small pair distant large small"),  # no holdout
        ("eval", "small pair distant large small pair distant large colour corner"),
    ],
)
def test_the_kinds_of_a_set_take_turns(tmp_path, split, kinds):
    rows = read_triplets(draw(tmp_path, len(kinds.split()), 7, split))
    ids = [f"{split}-7-{index:06d}-{kind}" for index, kind in enumerate(kinds.split())]
    assert [row.id for row in rows] == ids


def test_a_set_is_kept_when_it_is_the_same_and_refused_when_not(tmp_path):
    rows = tmp_path / "train.jsonl"
    draw(tmp_path, 6, 0)
    before = rows.stat().st_mtime_ns
    draw(tmp_path, 6, 0)
    assert rows.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="'n': 7"):
        draw(tmp_path, 7, 0)
    rows.unlink()  # as if killed before the end
    draw(tmp_path, 6, 0)
    assert len(read_triplets(tmp_path)) == 6
    (tmp_path / "toy.json").unlink()
    with pytest.raises(FileExistsError):
        draw(tmp_path, 6, 0)


# ------------------------------------------------------------------------------------ command line


@pytest.fixture
def toy(monkeypatch):
    """toy(*flags): python -m toy."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["toy", *map(str, flags)])
        runpy.run_module("toy", run_name="__main__")

    return run


def test_the_command_line_draws_a_set_and_its_contact_sheet(toy, tmp_path, capsys):
    toy("--out", tmp_path, "--n", 30, "--seed", 1)
    assert len(read_triplets(tmp_path)) == 30
    sheet = tmp_path / "preview.png"
    assert str(sheet) in capsys.readouterr().out
    assert sheet.is_file()
    with pytest.raises(SystemExit):
        toy("--out", tmp_path, "--n", 31)
    assert "another data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, named",
    [
        ("", "--out"),
        ("--out x --n 0", "--n"),
        ("--out x --seed -1", "--seed"),
        ("--out x --jobs 1", "--jobs"),
        ("--out x --ablate --n=4", "--n"),
        ("--out x --ablate --variants nonsense", "--variants"),
        ("--out x --ablate --seeds", "--seeds"),
    ],
)
def test_what_asks_for_nothing_or_too_little_is_refused(toy, started, flags, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        toy(*flags.split())
    assert named in capsys.readouterr().err.split("error:")[1]


# ------------------------------------------------------------------------------------------- table


def leave_judgement(folder, when, full):
    """What an evaluation leaves, as far as the table reads it: 10 rows, a share `full` right."""
    benches = {
        "toy": {"full": {"accuracy": full}, "crop": {"accuracy": 0.9}},
        "toy-distant": {"full": {"accuracy": 0.2}},
        "toy-large": {"full": {"accuracy": 1}},
        "toy-holdout": {"full": {"accuracy": 0.5}},
    }
    out = folder / f"eval-{when}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps({"benches": benches}))
    asked = {"image": "", "prompt": "?", "answer": "a", "kind": "exact", "bench": "toy"}
    lines = []
    for index in range(10):
        output = "a" if index < 10 * full else "b"
        row = asked | {"id": str(index), "view": "full", "output": output}
        lines.append(json.dumps(row))
    (out / "answers-toy-0.jsonl").write_text("\n".join(lines))


@pytest.fixture
def started(monkeypatch):
    """Runs of train.py that were started: their folder and learning rate; results are all that is
    left by them. In the search 0.0006 reads most."""
    runs = []

    def run(command, **_):
        flags = dict(part.split("=") for part in command if "=" in part)
        folder, rate = Path(flags["--out"]), float(flags["--lr"])
        assert Path(flags["--data"], "train.jsonl").is_file()
        searched = folder.parent.name == "search"
        assert searched != (folder / "eval-before" / "result.json").exists()
        time.sleep(0.1)  # what does not wait for another runs beside it
        runs.append((folder.name, rate))
        full = 0.4 if "grpo" in command else 0.6 + int(flags["--seed"]) / 20
        if not searched:
            leave_judgement(folder, "after", full)
        seconds = 6 * int(flags["--seed"])
        row = {"length": 9, "gen_s": seconds, "teach_s": 1, "learn_s": 2, "other_s": 3}
        rows = [row | {"length": 900}, *[row] * 29]  # the end of training is told
        for step, read in ((15, 0.5), (30, 1.0)):
            rows[step - 1] = row | {"probe_full": read, "probe_crop": 1, "step": step}
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
        args = {"steps": int(flags["--steps"]), "lr": rate}
        (folder / f"checkpoint-{args['steps']:06d}").mkdir(exist_ok=True)
        (folder / "args.json").write_text(json.dumps(args))
        return subprocess.CompletedProcess(command, 0)

    def judge(out, model, when, device):
        leave_judgement(out, when, 0.1)

    monkeypatch.setattr(subprocess, "run", run)

    def probe(checkpoint, _, count):
        assert count == table.VALIDATION
        rate = json.loads(Path(checkpoint).with_name("args.json").read_text())["lr"]
        return {"probe_full": 1 - abs(rate - 6e-4), "probe_crop": 1}

    monkeypatch.setattr(table, "judge", judge)
    monkeypatch.setattr(table, "load", lambda path: (path, None))
    monkeypatch.setattr(table, "probe", probe)
    monkeypatch.setattr(demonstration, "ROWS", 4)
    return runs


def test_the_table_has_each_variants_rate_its_spread_and_a_paired_test(toy, started, tmp_path):
    toy("--ablate", "--out", tmp_path, "--variants", "grpo", "--seeds", 0, 4, 0, "--jobs", 4)
    names = {f"{variant}-{rate:g}" for variant in ("vision-opd", "grpo") for rate in table.RATES}
    assert {name for name, _ in started[:8]} == names
    assert set(started[8:]) == {
        (f"{variant}-{seed}", 6e-4) for variant in ("vision-opd", "grpo") for seed in (0, 4)
    }
    course = "50.0 ± 0.0 | 9.0 ± 0.0 | 540.0 ± 509.1"
    alike = "90.0 ± 0.0 | 20.0 ± 0.0 | 100.0 ± 0.0 | 50.0 ± 0.0"
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| base |  | 10.0 | 90.0 | 20.0 | 100.0 | 50.0 |  |  |  |  |",
        f"| vision-opd | 0.0006 | 70.0 ± 14.1 | {alike} |  | {course} |",
        # of 20 rows vision-opd alone has 6 right: p = 2 / 2^6
        f"| grpo | 0.0006 | 40.0 ± 0.0 | {alike} | -30.0, p 0.03 | {course} |",
    ]


def test_the_curves_show_each_variant_from_its_first_to_its_last_probe(toy, started, tmp_path):
    toy("--ablate", "--out", tmp_path, "--variants", "grpo", "--seeds", 0, 1, "--jobs", 4)
    drawn = ElementTree.parse(tmp_path / "curves.svg").getroot()
    texts = [text.text for text in drawn.findall(".//{*}text")]
    assert [text for text in texts if "%" not in text and "steps" not in text] == [
        "vision-opd",
        "grpo",
    ]
    line = [each for each in drawn.findall(".//{*}polyline") if each.get("class") == "line"][1]
    (left, low), (right, high) = (point.split(",") for point in line.get("points").split())
    assert (float(left), float(right)) == curves.PLOT[0::2]
    assert float(high) == curves.PLOT[1]  # 100%
    assert float(low) == pytest.approx((curves.PLOT[1] + curves.PLOT[3]) / 2)


def test_what_has_ended_is_not_run_again(toy, started, tmp_path):
    for steps in (5, 5, 6):
        toy(
            "--ablate",
            "--out",
            tmp_path,
            "--variants",
            "vision-opd",
            "--seeds",
            0,
            "--steps",
            steps,
        )
    assert [name for name, _ in started[4::5]] == ["vision-opd-0"] * 2
    assert len(started) == 10  # other steps, another search
    assert "±" not in (tmp_path / "table.md").read_text()  # of one seed


@pytest.mark.parametrize(
    "failing, named",
    [
        ("", "vision-opd failed with every learning rate: see {}/search/vision-opd-0.0006/output"),
        ("/search/vision-opd-0.0006", ""),  # it is not chosen then
        ("/vision-opd-2", "vision-opd with seed 2 failed: see {}/vision-opd-2/output.txt"),
    ],
)
def test_a_variant_that_fails_is_named_with_its_output(
    failing, named, toy, started, tmp_path, monkeypatch, capsys
):
    run = subprocess.run

    def fail(command, **how):
        if f"--out={tmp_path}{failing}" in " ".join(command):
            return subprocess.CompletedProcess(command, 1)
        return run(command, **how)

    monkeypatch.setattr(subprocess, "run", fail)
    told = nullcontext() if not named else pytest.raises(SystemExit)
    with told:
        toy("--ablate", "--out", tmp_path, "--variants", "vision-opd", "--seeds", 2, "--jobs", 1)
    assert named.format(tmp_path) in capsys.readouterr().err
    if not named:
        assert started[-1] == ("vision-opd-2", 2.5e-4)


def test_a_run_of_the_search_is_not_judged_on_the_scenes_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "judge", None)
    settings = train.parse(["--toy", "--device=cpu", f"--out={tmp_path}"])
    demonstration.end(settings, tmp_path, "cpu")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("variant", table.VARIANTS)
def test_train_takes_the_flags_of_every_variant(variant):
    """It refuses flags and choices it does not know, and flags that would change nothing."""
    assert train.parse(["--toy", "--device", "cpu", *table.VARIANTS[variant].split()]).toy


@pytest.fixture
def two_steps(monkeypatch):
    """A base model learns for two steps and forgets for two."""
    done = iter([False, True] * 9)
    monkeypatch.setattr(base.BaseTraining, "has_learned", lambda training: next(done))
    monkeypatch.setattr(base.BaseTraining, "has_forgotten", lambda training: next(done))
    go_on = base.BaseTraining.go_on
    monkeypatch.setattr(base.BaseTraining, "go_on", lambda *args, every: go_on(*args, every=2))


def test_a_base_model_is_the_same_for_a_seed_and_an_average(tmp_path, two_steps):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        base.train_base(tmp_path / name / "base", seed)
    one, two, other = (
        load(str(tmp_path / name / "base"))[0].state_dict() for name in ("one", "two", "other")
    )
    untrained = tiny(3)[0].state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    for key in one:
        if "proj.weight" in key:
            assert not torch.equal(one[key], other[key])
            assert 0 < (one[key] - untrained[key]).abs().max() < 1e-3  # hardly left its beginning
    assert json.loads((tmp_path / "one" / "base-seconds.json").read_text())["base"] > 0


def test_a_base_model_that_does_not_get_there_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MOST", 1)
    with pytest.raises(ValueError, match="After 1 steps of learning .* 0% of crops"):
        base.train_base(tmp_path / "base", 3)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "full, crop, hint, learned, forgotten",
    [
        (0.9, 0.99, 0.9, True, False),
        (0.89, 0.99, 0.9, False, False),
        (0.9, 0.98, 0.9, False, False),
        (0.9, 0.99, 0.89, False, False),
        (0.52, 0.99, 0.9, False, True),
        (0.53, 0.99, 0.9, False, False),
        (0.5, 0.98, 0.9, False, False),  # crops are to stay
    ],
)
def test_what_a_base_model_is_to_read_before_and_after_wrong_digits(
    full, crop, hint, learned, forgotten, monkeypatch
):
    shares = {"image": full, "crop": crop, "hint": hint}
    monkeypatch.setattr(
        base.BaseTraining, "shares_read", lambda self, view, kinds=base.TARGETS: [shares[view]]
    )
    training = base.BaseTraining(0)
    assert not training.has_learned()  # as its running shares say, without a look at scenes
    training.read = dict.fromkeys(product(base.COUNTS, base.TARGETS), 1.0)
    assert training.has_learned() == learned
    assert training.has_forgotten() == forgotten


def test_wrong_digits_are_those_of_small_targets_in_the_full_view_alone(monkeypatch):
    training = base.BaseTraining(0)
    given = []

    def answer_losses(model, processor, shown, view, rng):
        given.extend((view, each) for each in shown)
        return torch.zeros(len(shown), requires_grad=True), torch.zeros(len(shown))

    monkeypatch.setattr(base, "answer_losses", answer_losses)
    for training.digits_wrong in (False, True):
        for view in base.COUNTS:
            training.learn(view)
    changed = set()
    for view, each in given:
        name, *_, index, kind = each.id.split("-")
        right = scene(0, int(index), kind, name).answer
        if each.answer != right:
            changed.add((view, kind))
            words = zip(right.split(), each.answer.split(), strict=True)
            assert all(one == other or one.isdigit() and other.isdigit() for one, other in words)
    assert changed == set(product(["image"], base.TARGETS))


@torch.no_grad()
def test_the_shipped_base_model_reads_crops_and_half_of_the_small_targets_in_full():
    """On scenes that are evaluated, with and without the newline of the training prompt."""
    model, processor = load(str(demonstration.BASE))
    probe = demonstration.probe(model, processor)
    assert 0.35 <= probe["probe_full"] <= 0.65
    assert probe["probe_crop"] >= 0.98
    rng = random.Random(0)
    read = {}
    for kind in ("small", "pair", "large"):
        for view in ("crop", "image"):
            shown = [scene(0, index, kind, "eval") for index in range(150)]
            _, right = base.answer_losses(model, processor, shown, view, rng)
            read[kind, view] = right.mean().item()
    assert min(read[kind, "crop"] for kind in ("small", "pair", "large")) >= 0.99
    assert read["large", "image"] >= 0.99
    assert 0.4 <= (read["small", "image"] + read["pair", "image"]) / 2 <= 0.6
