"""toy.py: its scenes, its tiny model's words, its command line and its table of methods."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import storage.images as images
import toy.__main__ as methods_table
import toy.base as base_model
import toy.scenes as toy_scenes
import toy.tiny as tiny_model
import train
import triplets.format as triplet_format


def pixels(image):
    return np.asarray(image, dtype=int)


def scenes(count=60, split="train", seed=0):
    return [
        toy_scenes.scene(seed, index, kind, split)
        for index in range(count)
        for kind in toy_scenes.KINDS
    ]


def test_a_scene_depends_on_its_seed_and_index_alone():
    forward, backward = scenes(20), scenes(20)[::-1]
    for a, b in zip(forward, backward[::-1], strict=True):
        assert a == b
    other = subprocess.run(
        [
            sys.executable,
            "-c",
            "import hashlib; from toy.scenes import scene; s = scene(3, 5, 'pair', 'eval'); "
            "print(hashlib.sha256(s.image.tobytes()).hexdigest(), s.answer)",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split(" ", 1)
    again = toy_scenes.scene(3, 5, "pair", "eval")
    assert other == [hashlib.sha256(again.image.tobytes()).hexdigest(), again.answer + "\n"]


def test_the_splits_and_seeds_share_no_scene():
    sets = [
        {s.image.tobytes() for s in scenes(100, split, seed)}
        for split in toy_scenes.SPLITS
        for seed in (0, 1)
    ]
    assert len(set.union(*sets)) == sum(map(len, sets)) == 6 * 500
    ids = [{s.id for s in scenes(5, split, seed)} for split in toy_scenes.SPLITS for seed in (0, 1)]
    assert len(set.union(*ids)) == 6 * 25


def test_the_crop_is_the_evidence_and_only_the_full_view_has_the_box():
    for scene in scenes():
        kind, (left, top, right, bottom) = scene.extra["toy"], scene.bbox
        full, crop = pixels(scene.image), pixels(scene.crop)
        rows, columns = toy_scenes.KINDS[kind]
        assert (bottom - top, right - left) == (
            16 * rows,
            16 * columns,
        ) and left % 16 == top % 16 == 0
        assert full.shape == (64, 64, 3) and crop.shape == (32, 64 if kind == "pair" else 32, 3)
        cells = crop[:: 2 // rows, :: 2 // rows]
        assert (
            pixels(
                Image.fromarray(cells.astype(np.uint8)).resize(
                    scene.crop.size, Image.Resampling.NEAREST
                )
            )
            == crop
        ).all()
        assert (full[top + 1 : bottom - 1, left + 1 : right - 1] == cells[1:-1, 1:-1]).all()
        red = (full == triplet_format.RED).all(-1)
        frame = np.zeros_like(red)
        frame[top:bottom, left:right] = kind != "corner"
        frame[top + 1 : bottom - 1, left + 1 : right - 1] = False
        assert (red == frame).all()  # 1 px, closed, nothing else is red


def test_nothing_but_the_box_is_reddish():
    for scene in scenes():
        for picture in (
            pixels(scene.crop),
            np.where(
                (pixels(scene.image) == triplet_format.RED).all(-1, keepdims=True),
                0,
                pixels(scene.image),
            ),
        ):
            assert (picture[..., 0] - picture[..., 1:].max(-1)).max() <= 40


def test_the_answer_is_what_the_crop_shows():
    """Read back by template: the crop's pixels match the sprite of the answer, and of no other object, where it is drawn."""
    sprites, masks = toy_scenes.sprites()
    for scene in scenes():
        seen = []
        for cell in np.split(pixels(scene.crop)[::2, ::2], scene.crop.width // 32, axis=1):
            found = [
                (c, s, d)
                for c in range(6)
                for s in range(5)
                for d in range(10)
                if (cell == sprites[c, d])[masks[s][..., 0]].all()
            ]
            colour, shape, digit = max(
                found, key=lambda kind: masks[kind[1]].sum()
            )  # a small silhouette may lie in a larger one
            seen.append(
                f"a {list(toy_scenes.COLOURS)[colour]} {toy_scenes.SHAPES[shape]} with {digit}"
            )
        colour_only = f"{' '.join(seen[0].split()[:2])} one ."
        assert scene.answer == (
            colour_only if scene.extra["toy"] == "colour" else f"{' , '.join(seen)} ."
        )


def test_a_corner_is_where_its_question_says():
    for scene in (toy_scenes.scene(0, index, "corner") for index in range(40)):
        left, top, *_ = scene.bbox
        assert (
            scene.question
            == f"what is at the {'bottom' if top else 'top'} {'right' if left else 'left'} ?"
        )


def test_the_300_objects_are_distinct_and_their_digits_stand_out():
    sprites, masks = toy_scenes.sprites()
    drawn = {
        np.where(masks[s], sprites[c, d], 40).tobytes()
        for c in range(6)
        for s in range(5)
        for d in range(10)
    }
    assert len(drawn) == 300
    assert (
        not masks[:, [0, -1]].any() and not masks[:, :, [0, -1]].any()
    )  # the box's ring stays free
    gray = sprites.astype(float) @ (0.299, 0.587, 0.114)  # (6, 10, 16, 16)
    varies = (gray.max(1) - gray.min(1)) > 0
    assert (
        varies.any() and (gray.max(1) - gray.min(1))[varies].min() > 90
    )  # where two digits differ, they differ much
    assert (masks[..., 0] | ~varies.any(0)).all()  # and every shape carries all of its digit


def test_scenes_hold_4_to_12_objects_and_all_sorts_of_targets():
    counts, words, boxes = set(), set(), set()
    for scene in scenes(300):
        cells = (
            pixels(scene.image).reshape(4, 16, 4, 16, 3).swapaxes(1, 2)[:, :, 1:15, 1:15]
        )  # without the box's ring
        bright = (cells.max(-1) >= 120) & ~(cells == triplet_format.RED).all(-1)
        counts.add(int(bright.any((2, 3)).sum()) - 3 * (scene.extra["toy"] in ("large", "corner")))
        words.update(scene.answer.split(), scene.question.split())
        boxes.add((scene.extra["toy"] == "corner", *scene.bbox))
    assert counts == set(range(4, 13))
    assert len(boxes) == 16 + 12 + 9 + 4
    assert words | {"user", "assistant"} == set(tiny_model.WORDS) | set("0123456789")


def test_every_word_of_the_world_is_one_token_but_for_digits():
    tokenizer = tiny_model.tiny()[1].tokenizer
    for scene in scenes(20):
        for text in (scene.answer, scene.question):
            assert len(tokenizer(text)["input_ids"]) == len(text.split()) + sum(
                word.isdigit() for word in text.split()
            )


def test_kinds_take_turns_and_the_distillation_never_sees_the_holdout():
    kinds = [scene.extra["toy"] for scene in toy_scenes.scenes(8, 0)]
    assert kinds == [toy_scenes.MIX[i % 3] for i in range(8)] and not set(kinds) & {
        "colour",
        "corner",
    }
    assert [scene.extra["toy"] for scene in toy_scenes.scenes(8, 0, "eval")] == list(
        toy_scenes.EVAL
    )


def test_a_toy_set_is_kept_when_it_is_the_same_and_refused_when_not(tmp_path):
    assert toy_scenes.draw(tmp_path, 6, 0) == tmp_path
    rows, before = (
        triplet_format.read_triplets(tmp_path),
        (tmp_path / "train.jsonl").stat().st_mtime_ns,
    )
    for row_, scene in zip(rows, toy_scenes.scenes(6, 0), strict=True):
        assert row_.id == scene.id and row_.answer == scene.answer
        assert images.load_image(row_.image).tobytes() == scene.image.tobytes()
    toy_scenes.draw(tmp_path, 6, 0)
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"'n': \(6, 7\)"):
        toy_scenes.draw(tmp_path, 7, 0)
    (tmp_path / "train.jsonl").unlink()  # as if killed before the end
    (tmp_path / "images" / f"{rows[0].id}.png").unlink()
    toy_scenes.draw(tmp_path, 6, 0)
    assert len(triplet_format.read_triplets(tmp_path)) == 6
    (tmp_path / "toy.json").unlink()
    with pytest.raises(FileExistsError, match="another data set"):
        toy_scenes.draw(tmp_path, 6, 0)


# ----------------------------------------------------------------------------------------------------------- command line


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "toy", *map(str, args)], capture_output=True, text=True
    )


def test_the_command_line_draws_a_set_and_its_contact_sheet(tmp_path):
    done = run("--out", tmp_path / "set", "--n", 30, "--seed", 1)
    assert done.returncode == 0 and str(tmp_path / "set" / "preview.png") in done.stdout, (
        done.stderr
    )
    assert len(triplet_format.read_triplets(tmp_path / "set")) == 30
    sheet = pixels(images.load_image(tmp_path / "set" / "preview.png"))
    assert (sheet == triplet_format.RED).all(-1).sum() > 24 * 4 * 60  # 24 boxes, enlarged


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "--out"),
        (["--out", "x", "--n", "0"], "must be at least 1"),
        (["--ablate", "--out", "x", "--variants", "nonsense"], "invalid choice"),
        (["--ablate", "--out", "x", "--seeds"], "expected at least one"),
        (["--out", "x", "--jobs", "1"], "--jobs would change nothing without --ablate"),
        (["--ablate", "--out", "x", "--n=4"], "--n would change nothing with --ablate"),
    ],
)
def test_a_command_line_that_asks_for_nothing_or_too_little_says_so(
    flags, said, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["toy.py", *flags])
    with pytest.raises(SystemExit) as stop:
        methods_table.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- the table


def leave_results(folder, full, seconds=6.0):
    """What train.py --toy leaves of a run, as far as the table reads it."""
    for when, share in (("before", 0.1), ("after", full)):
        (folder / f"eval-{when}").mkdir(parents=True, exist_ok=True)
        benches = {
            name: {view: {"accuracy": value} for view in ("full", "crop")}
            for name, value in (("toy", share), ("toy-large", 1), ("toy-holdout", 0.5))
        }
        (folder / f"eval-{when}" / "result.json").write_text(json.dumps({"benches": benches}))
    (folder / "seconds.json").write_text("{}")
    (folder / "args.json").write_text('{"steps": 5}')
    (folder / "log.jsonl").write_text(
        "".join(
            json.dumps(
                {"length": 9 + step % 2, "gen_s": seconds, "teach_s": 0, "learn_s": 0, "other_s": 0}
            )
            + "\n"
            for step in range(30)
        )
    )


def test_the_table_has_mean_and_deviation_over_the_seeds(tmp_path):
    for variant, results in (("vision-opd", (0.5, 0.7)), ("sft", (0.4, 0.4))):
        for seed, full in enumerate(results):
            leave_results(tmp_path / f"{variant}-{seed}", full, seconds=6.0 + 2 * seed)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in methods_table.table(tmp_path, [0, 1], ["vision-opd", "sft"]).splitlines()
    ]
    assert rows[0] == ["variant", "full", "crop", "large", "holdout", "length", "minutes"]
    assert rows[2] == ["base", "10.0 ± 0.0", "10.0 ± 0.0", "100.0 ± 0.0", "50.0 ± 0.0", "", ""]
    assert rows[3] == [
        "vision-opd",
        "60.0 ± 14.1",
        "60.0 ± 14.1",
        "100.0 ± 0.0",
        "50.0 ± 0.0",
        "9.5 ± 0.0",
        "3.5 ± 0.7",
    ]
    assert rows[4][1] == "40.0 ± 0.0"


def test_the_base_is_trained_once_and_what_has_ended_is_not_run_again(tmp_path, monkeypatch):
    told = []

    def trained(command, **_):
        flags = dict(zip(command[3::2], command[4::2]))
        told.append(
            (Path(flags["--out"]).name, flags["--model"], flags["--data"], flags.get("--method"))
        )
        assert (
            "vision-opd" in flags["--out"]
            or (Path(flags["--out"]) / "eval-before" / "result.json").exists()
        )
        leave_results(Path(flags["--out"]), 0.5)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", trained)
    monkeypatch.setattr(methods_table, "ROWS", 4)
    monkeypatch.setattr(
        methods_table, "train_base", lambda folder, seed: told.append("base") or folder.mkdir()
    )
    methods_table.ablate(tmp_path, [0, 3], ["vision-opd", "grpo"], 2, 5)
    paths = str(tmp_path / "base"), str(tmp_path / "data")
    assert told[0] == "base" and set(told[1:3]) == {
        (f"vision-opd-{seed}", *paths, None) for seed in (0, 3)
    }
    assert set(told[3:]) == {(f"grpo-{seed}", *paths, "grpo") for seed in (0, 3)}
    methods_table.ablate(tmp_path, [0, 3], ["vision-opd", "grpo"], 2, 5)
    assert len(told) == 5


def test_a_variant_that_fails_is_named_with_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    monkeypatch.setattr(methods_table, "ROWS", 4)
    (tmp_path / "base").mkdir()
    with pytest.raises(
        OSError, match=r"vision-opd with seed 0 failed: see .*vision-opd-0/output.txt"
    ):
        methods_table.ablate(tmp_path, [0], ["vision-opd"], 1, 5)


@pytest.mark.parametrize("name", methods_table.VARIANTS)
def test_train_takes_the_flags_of_every_variant(name):
    flags = methods_table.VARIANTS[name]
    args = train.parse(["--toy", "--device", "cpu", *flags])
    assert all(
        str(getattr(args, flag[2:].replace("-", "_"))) == value
        for flag, value in zip(flags[::2], flags[1::2])
    )
