"""synth.py --images: from photographs to triplets, with a scripted model, a tiny Qwen3.5 and a tiny SAM 3."""

import errno
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, noise
from PIL import Image, ImageFont

import benchmarks.sources as sources
import model as M
import rollout
import storage.images as images
import synth
import synthesis.checking as checking
import synthesis.parts as parts
import synthesis.photos as photographs
import synthesis.proposers as proposers
from synthesis.regions import Region
import synthesis.regions as geometry
import synthesis.texts as texts
import toy.scenes as toy_scenes
import toy.tiny as tiny_model
import triplets.format as triplet_format
import triplets.preview as previews

ASKED = [
    {"question": "What colour is the tag?", "answer": "red", "type": "colour"},
    {"question": "What number is on the tag?", "answer": "17", "type": "number"},
]


def kind_of(prompt):
    return (
        "find"
        if prompt.startswith(texts.PROMPTS["find"])
        else "ask"
        if prompt.startswith(texts.PROMPTS["ask"][:20])
        else "vote"
        if 'reply "unknown"' in prompt
        else "wrong"
    )


def found_in(image):
    """Two boxes in thousandths that depend on the picture's pixels alone."""
    x, y = np.random.default_rng(zlib.crc32(image.tobytes())).integers(20, 700, 2).tolist()
    return [
        {"bbox_2d": [x, y, x + 120, y + 90], "label": "tag"},
        {"bbox_2d": [x + 150, y + 100, x + 250, y + 190], "label": "knob"},
    ]


class Script:
    """Stands in for rollout.answers: what it says to each kind of prompt, a text or a function of (image, prompt, seed)."""

    def __init__(self, **said):
        self.said = {
            "find": lambda image, *_: json.dumps(found_in(image)),
            "ask": json.dumps(ASKED),
            "vote": "Red.",
            "wrong": '["blue", "green", "white"]',
        } | said
        self.calls = []

    def __call__(
        self,
        model,
        processor,
        images,
        texts,
        max_new_tokens,
        rounds=0,
        *,
        temperature=0,
        seeds=None,
        group=1,
    ):
        self.calls.append((kind_of(texts[0]), len(texts), temperature))
        replies = []
        for row, (image, prompt) in enumerate(zip(images, texts, strict=True)):
            for n in range(group):
                said = self.said[kind_of(prompt)]
                said = (
                    said(image, prompt, (seeds[row], n) if seeds else None)
                    if callable(said)
                    else said
                )
                replies.append(rollout.Reply(said, 1, False))
        return replies


def scripted(monkeypatch, **said):
    script = Script(**said)
    monkeypatch.setattr(rollout, "answers", script)
    monkeypatch.setattr(M, "load", lambda *args, **settings: (None, None))
    return script


def photo(path, seed=0, size=(640, 480), **settings):
    """Smooth noise, so that JPEGs are small and every picture differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(size[0] // 16, size[1] // 16, seed).resize(size, Image.Resampling.BICUBIC).save(
        path, **settings
    )
    return path


def photos(folder, count=3):
    for n in range(count):
        photo(folder / ("sub" if n % 2 else ".") / f"{n}.jpg", n)
    return folder


def blank(width, height):
    return photographs.Photo("x", image=Image.new("RGB", (width, height)))


def main(monkeypatch, *argv):
    synth.main([*map(str, argv)])


def stats(out):
    return json.loads((out / "stats.json").read_text(encoding="utf-8"))


def rows(out):
    return [
        json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]


# ------------------------------------------------------------------------------------------------------------ the pipeline


def test_photographs_become_triplets_with_their_provenance(tmp_path, monkeypatch, capsys):
    script = scripted(monkeypatch)
    main(
        monkeypatch, "--images", photos(tmp_path / "in"), "--out", tmp_path / "out", "--full", "png"
    )
    found = triplet_format.read_triplets(tmp_path / "out")
    assert len(found) == 6 and [call[:2] for call in script.calls] == [("find", 3), ("ask", 6)]
    assert [r.id for r in found] == sorted(r.id for r in found)
    for r in found:
        e, (x1, y1, x2, y2) = r.extra, r.bbox
        source, image, crop = (
            images.load_image(p) for p in (tmp_path / "in" / e["source"], r.image, r.crop)
        )
        assert (
            r.question == "What colour is the tag?" + texts.PROMPTS["hint"]
            and r.answer is None
            and e["type"] == "colour"
        )
        assert (
            e["source_size"] == [640, 480]
            and e["box"] == r.bbox
            and e["seed"] == 0
            and len(e["config"]) == 12
        )
        before, after = np.asarray(source), np.asarray(image)
        assert (before[y1:y2, x1:x2] == after[y1:y2, x1:x2]).all()
        changed = (before != after).any(-1)
        assert changed.any() and (after[changed] == triplet_format.RED).all()
        left, top, right, bottom = e["window"]
        assert e["scale"] == 2 and crop.size == (2 * (right - left), 2 * (bottom - top))
    told = stats(tmp_path / "out")
    assert (
        told["photographs"] == 3
        and told["samples"] == 6
        and told["dropped"] == {"question_spare": 6}
    )
    assert {"load", "propose", "question", "write"} <= told["seconds"].keys() and told[
        "photographs_per_second_and_rank"
    ] > 0
    assert (tmp_path / "out" / "preview.png").is_file()
    assert (
        "6 question_spare" in (shown := capsys.readouterr().out)
        and "are 'colour', over 35%" in shown
    )
    main(
        monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out", "--full", "png"
    )  # nothing left to do
    assert len(script.calls) == 2 and triplet_format.read_triplets(tmp_path / "out") == found


def test_labels_need_seven_of_eight_votes_and_are_written(tmp_path, monkeypatch):
    right = {"What colour": 7, "What number": 6}

    def vote(image, prompt, seed):
        return (
            "It is RED."
            if seed[1] < right[prompt[: len("What colour")]]
            else "unknown"
            if seed[1] == 7
            else "blue"
        )

    script = scripted(monkeypatch, vote=vote)
    main(monkeypatch, "--images", photos(tmp_path / "in"), "--out", tmp_path / "out", "--labels")
    assert script.calls[-1] == ("vote", 12, 1.0)
    assert {
        (r["answer"], r["extra_info"]["draft"], *r["extra_info"]["votes"])
        for r in rows(tmp_path / "out")
    } == {("RED", "red", 7, 8)}
    assert stats(tmp_path / "out")["dropped"] == {"no_consensus": 6}


@pytest.mark.parametrize(
    "votes, reason",
    [
        ("Yes", "yes_no"),
        ("one two three four five six", "answer_form"),
        ("tag", "leak"),
        ("unknown", "answer_form"),
        ("", "no_consensus"),
    ],
)
def test_what_the_votes_agree_on_keeps_to_the_rules_of_answers(
    votes, reason, tmp_path, monkeypatch
):
    scripted(monkeypatch, vote=votes)
    with pytest.raises(ValueError, match=f"12 {reason}"):
        main(
            monkeypatch, "--images", photos(tmp_path / "in"), "--out", tmp_path / "out", "--labels"
        )


def test_multiple_choice_is_written_as_released(tmp_path, monkeypatch):
    wrong = '["Blue", "a red", "unknown", "I cannot tell", "green", "red.", "white", "brown"]'
    scripted(monkeypatch, wrong=wrong)
    main(
        monkeypatch,
        "--images",
        photos(tmp_path / "in", 8),
        "--out",
        tmp_path / "out",
        "--format",
        "mcq",
    )
    letters = Counter(r["answer"] for r in rows(tmp_path / "out"))
    assert set(letters) == set("ABCD") and letters.total() == 16
    for r in rows(tmp_path / "out"):
        stem, options = r["problem"].split(texts.PROMPTS["hint"] + "\n\n")
        assert stem == "<image>\nWhat colour is the tag?" and options.endswith(
            texts.PROMPTS["choose"].strip()
        )
        options = dict(line.split(". ") for line in options.split("\n\n")[0].split("\n"))
        assert options[r["answer"]] == "Red" and sorted(options.values()) == [
            "Blue",
            "Red",
            "green",
            "white",
        ]
    assert (
        checking.balance(triplet_format.read_triplets(tmp_path / "out"))[0]
        == "16 of 16 answers are 'red', over 10%"
    )
    assert all(row["kind"] == "mc" for row in sources.benchmark(str(tmp_path / "out"), tmp_path))
    scripted(monkeypatch, wrong='["red", "Red"]')
    with pytest.raises(ValueError, match="6 question_spare\n +6 options_too_few"):
        main(
            monkeypatch,
            "--images",
            photos(tmp_path / "in2"),
            "--out",
            tmp_path / "out2",
            "--format",
            "mcq",
        )


def test_boxes_of_ones_own_need_no_model_to_find_them(tmp_path, monkeypatch, capsys):
    photos(tmp_path / "in", 2)
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text(
        '{"image": "0.jpg", "boxes": [[9.5, 10, 90, 80], [300, 200, 400, 290]], "labels": ["tag", "mug"]}\n\n'
        '{"image": "gone.jpg", "boxes": []}\n{"image": 7, "boxes": []}\n'
    )
    script = scripted(monkeypatch)
    main(
        monkeypatch,
        "--images",
        tmp_path / "in",
        "--out",
        tmp_path / "out",
        "--proposer",
        boxes,
        "--clean-crop",
    )
    assert sorted(r["bbox"] for r in rows(tmp_path / "out")) == [
        [9, 10, 90, 80],
        [300, 200, 400, 290],
    ]
    assert (
        "names 2 images that are not under" in (told := capsys.readouterr().out)
        and "the first 7" in told
    )
    assert {call[0] for call in script.calls} == {"ask"} and stats(tmp_path / "out")["dropped"][
        "nothing_found"
    ] == 1
    for r in triplet_format.read_triplets(tmp_path / "out"):
        clean = geometry.cut(images.load_image(tmp_path / "in" / "0.jpg"), r.extra["window"])
        assert (np.asarray(images.load_image(r.crop)) == np.asarray(clean)).all()
    for bad in (
        "{",
        '{"image": "a"}',
        '{"image": "a", "boxes": [[5, 5, 1, 9]]}',
        '{"image": "a", "boxes": [[1, 2, NaN, 4]]}',
        '{"image": "a", "boxes": [[1, 2, 3, 4]], "labels": []}',
        "[]",
    ):
        boxes.write_text(f"\n{bad}\n")
        if bad.endswith('"labels": []}'):
            assert proposers.read_boxes(boxes) == {"a": [([1, 2, 3, 4], None)]}
        else:
            with pytest.raises(ValueError, match=r"boxes\.jsonl, line 2"):
                proposers.read_boxes(boxes)


# ------------------------------------------------------------------------------------------------------- the failure table


def bad_photographs(folder):
    """One of each kind; returns the expected drops."""
    photo(folder / "good.jpg", 1)
    (folder / "copy of good.jpg").write_bytes((folder / "good.jpg").read_bytes())
    whole = photo(folder / "truncated.jpg", 2).read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray(photo(folder / "corrupt.png", 3).read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 400] = bytes(400)
    (folder / "corrupt.png").write_bytes(damaged)
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("hello")
    photo(folder / "tiny.png", 4, (640, 440))
    for name, side in (("huge.png", 60000), ("large.png", 10100)):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        (folder / name).write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + header
            + struct.pack(">I", zlib.crc32(header))
            + struct.pack(">I", 0)
            + b"IDAT"
            + struct.pack(">I", zlib.crc32(b"IDAT"))
        )
    Image.fromarray(np.arange(640 * 480, dtype=np.uint32).reshape(480, 640).astype(np.uint16)).save(
        folder / "deep.png"
    )
    photo(folder / "palette.gif", 5)
    Image.open(folder / "palette.gif").convert("P").save(folder / "palette.png", transparency=3)
    Image.new("CMYK", (640, 480), (0, 90, 90, 0)).save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(folder / "turned.jpg", 6, exif=exif)
    os.symlink("nowhere", folder / "dangling.jpg")
    Image.new("RGB", (91000, 450)).save(
        folder / "long.png"
    )  # no image processor takes more than 200 : 1
    return {
        "duplicate": 1,
        "corrupt": 2,
        "empty_or_unreadable": 1,
        "not_an_image": 1,
        "too_small": 1,
        "too_large": 2,
        "too_long": 1,
    }


def test_bad_photographs_are_counted_by_reason_and_the_others_used(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    expected = bad_photographs(tmp_path / "in")
    scripted(monkeypatch)
    main(
        monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "in" / "out"
    )  # the output is no photograph
    told, found = stats(tmp_path / "in" / "out"), rows(tmp_path / "in" / "out")
    assert {k: v for k, v in told["dropped"].items() if k in expected} == expected and set(
        told["dropped"]
    ) == {*expected, "question_spare"}
    assert Counter(r["extra_info"]["source"] for r in found) == dict.fromkeys(
        ["copy of good.jpg", "deep.png", "palette.gif", "palette.png", "cmyk.jpg", "turned.jpg"], 2
    )
    assert told["photographs"] == 15 and any(
        note.startswith("truncated.jpg: corrupt: ") for note in told["notes"]
    )
    assert any(
        note.startswith("notes.txt: not_an_image: ") and "notes.txt'" in note
        for note in told["notes"]
    )
    assert [
        r["extra_info"]["source_size"] for r in found if r["extra_info"]["source"] == "turned.jpg"
    ] == [[480, 640]] * 2
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert [
        photographs.load_photo(tmp_path / "in", name).drops for name in ("huge.png", "large.png")
    ] == [{"too_large": 1}] * 2


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"a": 1}]', [{"a": 1}]),
        ('Sure, [1] is it:\n```json\n[{"a": 1,},\n]\n``` Done.', [{"a": 1}]),
        ("[]", []),
        ("None: [].", []),
        ('<think>["x"]</think>\n["y"]', ["y"]),
        ('{"objects": [{"a": 1}]}', [{"a": 1}]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('[{"a": 1}, {"a": 2}, {"a": [3', [{"a": 1}, {"a": 2}]),
        ('["größe", "字"]', ["größe", "字"]),
        ("", None),
        ("I see nothing", None),
        ("[__import__('os').system('x')]", None),
        ("[" * 100000, None),
        ('{"a":' * 50000, None),
        ("[" + "9" * 9000 + "]", None),
        ('["sign [red]", "cup {2}"]', ["sign [red]", "cup {2}"]),
        (
            '[{"question": "What is {x}?", "answer": "OPEN}"}]',
            [{"question": "What is {x}?", "answer": "OPEN}"}],
        ),
        ('["a \\"quoted\\" ]"]', ['a "quoted" ]']),
        ("[1e999]", None),
        ('Here [as asked]: ["a", "b"]', ["a", "b"]),
        ('{"a": ' + "[" * 9000 + "]" * 9000 + "}", None),
        ("\x00\ud800[", None),
        ("<think>[1", None),
    ],
)
def test_json_is_found_in_whatever_surrounds_it_and_never_evaluated(text, expected):
    assert texts.json_in_reply(text) == expected


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 1001, 10],
        [-1, 0, 5, 5],
        [5, 0, 5, 9],
        [9, 9, 1, 1],
        [0, 0, "9", 9],
        [0, 0, 9],
        [True, 0, 9, 9],
        None,
        [0, 0, float("nan"), 9],
        [0, 0, float("inf"), 9],
        [0, 0, 10**400, 9],
    ],
)
def test_a_box_that_is_none_is_dropped_and_the_others_kept(tmp_path, monkeypatch, box):
    good = [300, 300, 420, 420]
    items = [
        {"bbox_2d": box, "label": "x"},
        {"bbox_2d": good, "label": "y"},
        {"bbox_2d": good, "label": "<image> y"},
        {"label": "y"},
    ]
    scripted(monkeypatch, find=json.dumps(items))
    main(monkeypatch, "--images", photos(tmp_path / "in", 1), "--out", tmp_path / "out")
    assert [r["bbox"] for r in rows(tmp_path / "out")] == [[192, 144, 269, 202]] and stats(
        tmp_path / "out"
    )["dropped"]["bad_box"] == 3


def test_regions_are_small_visible_distinct_and_at_most_three():
    photo = blank(1000, 800)
    box = lambda x, y, w=50, h=50: Region(photo, [x, y, x + w, y + h], "tag")
    found = [
        *[box(100, 100) for _ in range(100)],
        box(102, 101),
        Region(photo, [105, 105, 130, 130], "the tag"),
        box(10, 300, 19, 60),
        box(10, 300, 20, 170),
        box(300, 10, 400, 300),
        box(2000, 10),
        box(200, 100),
        box(300, 100),
        box(400, 100),
        Region(photo, [1, 2, 60, 60], "a<|im_end|>"),
    ]
    kept = geometry.small_regions(photo, found)
    assert [r.box for r in kept] == [
        [100, 100, 150, 150],
        [200, 100, 250, 150],
        [300, 100, 350, 150],
    ]
    assert photo.drops == {
        "box_repeated": 101,
        "box_small": 1,
        "box_thin": 1,
        "box_large": 1,
        "bad_box": 2,
        "box_spare": 1,
    }
    photo = blank(500, 900)
    region = Region(photo, [0, 0, 500, 80], "tag")
    assert not geometry.small_regions(photo, [region])
    assert photo.drops == {"box_at_edges": 1}  # three edges hide it


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"question": "What colour is the tag？"}, None),
        ({"answer": 17}, None),
        ({"question": 7}, "question_malformed"),
        ({"answer": None}, "question_malformed"),
        ({"question": "What <image> is the tag?"}, "question_malformed"),
        ({"answer": "<|vision_start|>"}, "question_malformed"),
        ({"question": "What is it" + "?" * 300}, "question_malformed"),
        ({"question": "Name the tag's colour."}, "question_form"),
        ({"question": "What colour is it? What size is it?"}, "several_questions"),
        ({"question": "What colour is it and what size?"}, "several_questions"),
        ({"question": "What colour is the tag in the picture?"}, "mentions_view"),
        ({"question": "What is in the red box?"}, "mentions_view"),
        ({"question": "What hangs in the top left corner?"}, "mentions_place"),
        ({"question": "What cup stands on the left?"}, "mentions_place"),
        ({"question": "Is the tag red today?"}, "yes_no"),
        ({"answer": "Yes."}, "yes_no"),
        ({"answer": True}, "yes_no"),
        ({"answer": 3.5}, None),
        ({"question": "What is it, red or blue?"}, "either_or"),
        ({"type": "mood"}, "question_type"),
        ({"type": None}, "question_type"),
        ({"answer": "one two three four five"}, "answer_form"),
        ({"answer": "unknown"}, "answer_form"),
        ({"question": "What colour is the red tag?"}, "leak"),
        ({"question": "How many of the two lights shine?", "answer": "2"}, "leak"),
        ({"question": "这个字是红色吗，什么颜色，什么样子?", "answer": "红色"}, "leak"),
        ({"question": "What reddish tag is that?"}, None),
    ],
)
def test_a_question_breaks_a_rule_or_none(change, reason):
    item = {"question": "What colour is the tag?", "answer": "red", "type": "colour"} | change
    assert texts.broken_rule(texts.drafted(item, 0)) == reason
    assert [texts.drafted(item, 0) for item in (["a"], None, {})] == [None] * 3


@pytest.mark.parametrize(
    "text, question, expected",
    [
        ("The answer is: Red.", "", "red"),
        ("\\boxed{1} so \\boxed{ Two }", "", "2"),
        ("It's a grey one", "", "gray 1"),
        ("COLOUR", "", "color"),
        ("1,250", "", "1250"),
        ("<think>red</think> blue", "", "blue"),
        ("there are 3 of the 5", "How many?", "3"),
        ("ＥＸＩＴ", "", "exit"),
        ("an apple", "", "apple"),
        ("A", "", "a"),
        ("Platform A", "", "platform a"),
        ("N/A", "", "n/a"),
        ("They are twenty", "", "20"),
        ("12:30", "", "12:30"),
        ("", "", ""),
        ("红色。", "", "红色"),
    ],
)
def test_votes_are_counted_in_one_spelling(text, question, expected):
    assert texts.normal(text, question) == expected


def test_text_without_json_is_asked_for_again_then_counted_and_kept(tmp_path, monkeypatch):
    say = lambda image, prompt, seed: (
        json.dumps(found_in(image)) if np.asarray(image)[0, 0, 0] % 2 else "no " * 500
    )
    photos(tmp_path / "in", 6)
    odd = sum(
        int(np.asarray(images.load_image(p))[0, 0, 0]) % 2 for p in (tmp_path / "in").rglob("*.jpg")
    )
    script = scripted(monkeypatch, find=say)
    main(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert 0 < odd < 6 and script.calls[:2] == [("find", 6, 0.0), ("find", 6 - odd, 0.7)]
    told = stats(tmp_path / "out")
    assert told["dropped"]["boxes_malformed"] == 6 - odd and re.fullmatch(
        r"(sub/)?\d\.jpg: boxes_malformed: .{500}", told["notes"][0]
    )


def test_out_of_memory_halves_the_batch_and_skips_what_does_not_fit_alone(tmp_path, monkeypatch):
    script = scripted(monkeypatch)

    def limited(model, processor, images, texts, *args, **settings):
        if len(texts) > 2 or any(image.width == 641 for image in images):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return script(model, processor, images, texts, *args, **settings)

    monkeypatch.setattr(rollout, "answers", limited)
    photo(photos(tmp_path / "in", 5) / "x.jpg", 9, (641, 480))
    main(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out", "--batch", 8)
    assert (
        stats(tmp_path / "out")["dropped"]["out_of_memory"] == 1
        and len(rows(tmp_path / "out")) == 10
    )
    assert {call[1] for call in script.calls if call[0] == "ask"} == {
        2
    }  # one that never fits slows no other down


@pytest.mark.parametrize("full", ["save", "line", "merge"])
def test_a_full_disk_stops_the_run_and_leaves_nothing_half_done(tmp_path, monkeypatch, full):
    photos(tmp_path / "in")
    scripted(monkeypatch)
    with monkeypatch.context() as patch:

        def no_space(*args, **settings):
            raise OSError(errno.ENOSPC, "No space left on device")

        if full == "save":
            patch.setattr(Image.Image, "save", no_space)
        else:
            place, true = ("dumps", json.dumps) if full == "line" else ("replace", os.replace)
            patch.setattr(
                json if full == "line" else os,
                place,
                lambda *a, **k: (
                    no_space()
                    if ("file" in a[0] if full == "line" else str(a[1]).endswith("train.jsonl"))
                    else true(*a, **k)
                ),
            )
        with pytest.raises(OSError, match="MB free.*make room"):
            main(patch, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert len([row for row in parts.read_parts(tmp_path / "out") if "file" in row]) == (
        3 if full == "merge" else 0
    )
    main(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert len(triplet_format.read_triplets(tmp_path / "out")) == 6


def test_no_sample_at_the_end_is_an_error_with_the_table(tmp_path, monkeypatch):
    scripted(
        monkeypatch,
        ask=lambda image, *_: "[]" if np.asarray(image)[0, 0, 0] % 2 else "I see nothing",
    )
    with pytest.raises(ValueError, match=r"no sample from 3 photographs[\s\S]* no_question"):
        main(monkeypatch, "--images", photos(tmp_path / "in"), "--out", tmp_path / "out")
    told = stats(tmp_path / "out")
    assert (
        told["dropped"].keys() == {"no_question", "questions_malformed"}
        and "0.jpg: questions_malformed: I see nothing" in told["notes"]
    )
    with pytest.raises(FileNotFoundError, match="Expected the --out of a run"):
        main(monkeypatch, "--merge", tmp_path / "in")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no files"):
        main(monkeypatch, "--images", tmp_path / "none", "--out", tmp_path / "out2")
    for out in (tmp_path / "in", tmp_path):
        with pytest.raises(
            ValueError, match="is or holds --images .*Choose an --out beside it, or inside it"
        ):
            main(monkeypatch, "--images", tmp_path / "in", "--out", out)


def test_a_check_finds_pictures_that_no_image_processor_takes(tmp_path):
    triplet_format.write_triplets(
        tmp_path,
        [
            triplet_format.Triplet(
                "a", "What?", Image.new("RGB", (2100, 10)), Image.new("RGB", (9, 9))
            )
        ],
    )
    with pytest.raises(ValueError, match="has 1 errors and 1 well-formed rows"):
        checking.check_triplets(tmp_path)


def test_a_damaged_line_of_a_rank_is_named(tmp_path, monkeypatch):
    scripted(monkeypatch)
    main(monkeypatch, "--images", photos(tmp_path / "in"), "--out", tmp_path / "out")
    with (tmp_path / "out" / ".parts" / "00000.jsonl").open("ab") as part:
        part.write(b"\x00\xff\n")
    with pytest.raises(
        ValueError,
        match=r"00000.jsonl has a damaged line \(.*Delete it: its photographs are done again",
    ):
        main(monkeypatch, "--merge", tmp_path / "out")


def test_boxes_may_be_in_any_encoding_of_json_and_a_font_must_be_there(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "boxes.jsonl").write_bytes('\ufeff{"image": "größe.jpg", "boxes": []}'.encode())
    assert proposers.read_boxes(tmp_path / "boxes.jsonl") == {"größe.jpg": []}
    (tmp_path / "boxes.jsonl").write_bytes('{"image": "größe.jpg", "boxes": []}'.encode("latin-1"))
    with pytest.raises(ValueError, match="boxes.jsonl, line 1: UnicodeDecodeError"):
        proposers.read_boxes(tmp_path / "boxes.jsonl")
    with pytest.raises(SystemExit):
        main(monkeypatch, "--preview", tmp_path, "--font", tmp_path / "none.ttf")
    assert "none.ttf is no file. Expected a .ttf, .otf or .ttc font" in capsys.readouterr().err


def test_missing_weights_are_said_before_the_first_photograph(tmp_path, monkeypatch):
    photos(tmp_path / "in", 1)
    monkeypatch.setattr(photographs, "load_photo", lambda *_: pytest.fail("loaded"))
    with pytest.raises(FileNotFoundError, match="hf auth login"):
        main(
            monkeypatch,
            "--images",
            tmp_path / "in",
            "--out",
            tmp_path / "out",
            "--model",
            "no/where",
        )
    with pytest.raises(FileNotFoundError, match="It is gated: accept its terms"):
        sam3(tmp_path / "nowhere", monkeypatch)


# --------------------------------------------------------------------------------------------------- ranks and interruption


def child(folder, out, rank=0, world=1, kill_at=0):
    """Exit code of a run in a process of its own, killed (-9) at the kill_at-th reply of the model, sample drawn or file renamed."""
    process = multiprocessing.get_context("fork").Process(
        target=scripted_run, args=(kill_at, rank, world, folder, out)
    )
    process.start()
    process.join()
    return process.exitcode


def scripted_run(kill_at, rank, world, folder, out):
    count = [0]

    def mortal(function):
        def wrapper(*args, **settings):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **settings)

        return wrapper

    patch = pytest.MonkeyPatch()
    scripted(patch)
    patch.setattr(rollout, "answers", mortal(rollout.answers))
    patch.setattr(synth, "draw_triplet", mortal(synth.draw_triplet))
    patch.setattr(os, "replace", mortal(os.replace))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    main(patch, "--images", folder, "--out", out, "--batch", 2)


def test_a_killed_run_goes_on_with_other_ranks_to_the_same_data_set(tmp_path):
    photo(photos(tmp_path / "in", 9) / "z.jpg", 2)  # the bytes of 2.jpg
    assert child(tmp_path / "in", tmp_path / "straight") == 0
    out = tmp_path / "killed"
    assert child(tmp_path / "in", out, 0, 1, 20) == -signal.SIGKILL
    first = [row["file"] for row in parts.read_parts(out) if "file" in row]
    with (out / ".parts" / "00000.jsonl").open("ab") as torn:
        torn.write(b'{"file": "torn')
    assert child(tmp_path / "in", out, 1, 2, 9) == -signal.SIGKILL
    assert [child(tmp_path / "in", out, rank, 3) for rank in range(3)] == [0] * 3
    assert 0 < len(first) < 9 and not (out / "train.jsonl").exists()
    for name in (
        "images/.tmp-old.jpg",
        "teacher_images/.tmp-old.png",
        "images/.tmp-new.jpg",
    ):  # of a killed and of a living rank
        (out / name).touch()
        os.utime(out / name, (age := time.time() - ("old" in name) * 3600, age))
    for _ in range(2):
        merged = subprocess.run(
            [sys.executable, synth.__file__, "--merge", out], capture_output=True, text=True
        )
        assert merged.returncode == 0 and "18 samples of 10 photographs" in merged.stdout, (
            merged.stderr
        )
        assert (out / "train.jsonl").read_bytes() == (
            tmp_path / "straight" / "train.jsonl"
        ).read_bytes()
    assert (
        stats(out)["dropped"]
        == stats(tmp_path / "straight")["dropped"]
        == {"question_spare": 18, "duplicate": 1}
    )
    assert (
        "new.jpg" in (left := str([path.name for path in out.rglob(".tmp-*")]))
        and "old" not in left
    )
    for key in triplet_format.FOLDERS:
        a, b = (
            {p.name: p.read_bytes() for p in (place / key).iterdir() if p.name[0] != "."}
            for place in (out, tmp_path / "straight")
        )
        assert a == b and len(a) == 18


def test_another_configuration_is_refused_on_resume_and_in_a_merge(tmp_path, monkeypatch):
    scripted(monkeypatch)
    photos(tmp_path / "in")
    main(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out")
    for flags, key in (
        (["--seed", 1], "seed"),
        (["--clean-crop"], "clean_crop"),
        (["--full", "png"], "full"),
        (["--labels"], "labels"),
        (["--format", "mcq"], "format"),
        (["--model", "other"], "model"),
    ):
        with pytest.raises(FileExistsError, match=rf"is {{'{key}': \("):
            main(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out", *flags)
    monkeypatch.setitem(texts.PROMPTS, "hint", " Look closely.")
    with pytest.raises(FileExistsError, match=r"is {'texts': \("):
        main(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out")
    monkeypatch.undo()
    scripted(monkeypatch)
    (tmp_path / "out" / ".parts" / "00001.jsonl").write_text('{"config": {"seed": 1}}\n')
    with pytest.raises(FileExistsError, match="another configuration"):
        main(monkeypatch, "--merge", tmp_path / "out")
    toy_scenes.draw(tmp_path / "toy", 2, 0)
    with pytest.raises(FileExistsError, match="holds another data set"):
        main(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "toy")


# ---------------------------------------------------------------------------------------------------------------- geometry


def test_the_evidence_survives_and_its_frame_is_seen_wherever_the_box_lies():
    rng, grain, seen = np.random.default_rng(0), noise(1100, 1000), 0
    for trial in range(250):
        W, H = (int(v) for v in rng.integers(448, 1000, 2))
        w, h = (int(np.exp(rng.uniform(np.log(20), np.log(0.9 * side)))) for side in (W, H))
        x, y = (
            int(
                rng.choice(
                    [0, 1, 3, side - own, max(0, side - own - 2), rng.integers(0, side - own + 1)]
                )
            )
            for side, own in ((W, w), (H, h))
        )
        image = grain.crop((trial % 100, 0, trial % 100 + W, H))
        photo = photographs.Photo("x", image=image)
        regions = geometry.small_regions(photo, [Region(photo, [x, y, x + w, y + h], "tag")])
        if not regions:
            continue
        seen += 1
        [region] = regions
        box, line, frame, window = region.box, region.line, region.frame, region.window
        framed = region.framed()
        before, after = np.asarray(image), np.asarray(framed)
        assert (
            box == [x, y, x + w, y + h]
            and (before[y : y + h, x : x + w] == after[y : y + h, x : x + w]).all()
        )
        outside = np.ones((H, W), bool)
        outside[frame[1] : frame[3], frame[0] : frame[2]] = False
        assert (before[outside] == after[outside]).all()
        red = (after == triplet_format.RED).all(-1)
        strips = [
            red[y : y + h, frame[0] : frame[0] + line],
            red[y : y + h, frame[2] - line : frame[2]],
            red[frame[1] : frame[1] + line, x : x + w],
            red[frame[3] - line : frame[3], x : x + w],
        ]
        assert sum(strip.all() for strip in strips) >= 2
        assert 2 <= line <= 16 and window[0] <= frame[0] <= x and window[3] >= frame[3] >= y + h
        assert 0 <= window[0] and 0 <= window[1] and window[2] <= W and window[3] <= H
        crop, scale = geometry.cut(framed, window), geometry.enlargement(window)
        assert (
            min(crop.size) >= 64
            and crop.width * crop.height <= 2**22
            and (scale >= 2 or crop.width * crop.height > 2**22 - 9000)
        )
    assert seen > 100
    region = Region(blank(2250, 1500), [1000, 700, 1100, 800])
    assert region.line == 5
    assert region.frame == [994, 694, 1106, 806]
    assert region.window == [988, 688, 1112, 812]
    window = [0, 0, 3001, 2503]
    crop, scale = (
        geometry.cut(Image.new("RGB", (9000, 9000)), window),
        geometry.enlargement(window),
    )
    assert scale < 1 and 2**22 - 9000 < crop.width * crop.height <= 2**22


# -------------------------------------------------------------------------------------------- real models, as small as can be


def tiny_sam3(folder):
    from transformers import CLIPTokenizer, Sam3Config, Sam3Model

    small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_layers=1)
    config = Sam3Config(
        vision_config=dict(
            fpn_hidden_size=32,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
            backbone_config=dict(
                model_type="sam3_vit_model",
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=56,
                window_size=2,
                global_attn_indexes=[0],
                pretrain_image_size=28,
            ),
        ),
        text_config=dict(
            model_type="clip_text_model",
            vocab_size=300,
            hidden_size=32,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            eos_token_id=1,
        ),
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config=small | {"num_queries": 5},
        mask_decoder_config=dict(hidden_size=32, num_attention_heads=2),
    )
    torch.manual_seed(0)
    Sam3Model(config).save_pretrained(folder)
    letters = sorted({chr(c) for c in range(33, 127)})
    vocabulary = {
        token: n
        for n, token in enumerate(
            ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
        )
    }
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def sam3(path, monkeypatch):
    monkeypatch.setattr(M, "load", lambda *args, **settings: (None, None))
    return proposers.Sam3(str(path), "cpu")


def test_sam3_boxes_names_without_torchvision_as_its_plain_forward_does(tmp_path, monkeypatch):
    boxer = sam3(tiny_sam3(tmp_path / "sam3"), monkeypatch)
    sam, tokenizer = boxer.model, boxer.tokenizer
    image = images.load_image(photo(tmp_path / "in" / "a.jpg"))
    shown = photographs.Photo("a.jpg", image=image)
    assert "torchvision" not in sys.modules
    assert boxer.boxes_in(shown, ["tag", "red mug"]) == [] and +shown.drops == {"name_not_found": 2}
    with torch.inference_mode():
        pixels = (
            torch.tensor(np.asarray(image.resize((56, 56), 2))).permute(2, 0, 1)[None] / 127.5 - 1
        )
        plain = sam(
            pixel_values=pixels,
            **tokenizer(["red mug"], padding="max_length", max_length=32, return_tensors="pt"),
        )
    best = int(plain.pred_logits[0].argmax())
    forward = sam.forward

    def sure(**inputs):  # of the likeliest query alone
        out = forward(**inputs)
        top = torch.nn.functional.one_hot(out.pred_logits.argmax(1), out.pred_logits.shape[1])
        out.pred_logits, out.presence_logits = (
            out.pred_logits + 20 * top - 10,
            out.presence_logits + 20,
        )
        return out

    def full(**inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sam, "forward", full)
    assert boxer.boxes_in(shown, ["tag"]) == [] and shown.drops["out_of_memory"] == 1
    monkeypatch.setattr(sam, "forward", sure)
    first, second = boxer.boxes_in(shown, ["tag", "red mug"])
    assert (first.label, second.label) == ("tag", "red mug") and 0.75 <= first.score <= 1
    np.testing.assert_allclose(
        second.box,
        (plain.pred_boxes[0, best] * torch.tensor([640, 480, 640, 480])).tolist(),
        atol=0.05,
    )
    script = scripted(monkeypatch, find='["tag", "red mug", "tag", 7]')
    monkeypatch.setattr(synth, "Sam3", lambda *_: boxer)
    with pytest.raises(ValueError, match="name_malformed"):  # random boxes are mostly too large
        main(
            monkeypatch,
            "--images",
            tmp_path / "in",
            "--out",
            tmp_path / "out",
            "--proposer",
            "sam3",
        )
    assert script.calls[0][0] == "find"


def test_the_tiny_models_babble_is_counted_and_reproducible(tmp_path, monkeypatch):
    photos(tmp_path / "in", 2)
    M.save(*tiny_model.tiny(), tmp_path / "model")
    true = rollout.answers
    monkeypatch.setattr(
        rollout,
        "answers",
        lambda m, p, i, t, max_new_tokens, **settings: true(m, p, i, t, 48, **settings),
    )
    for out in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(ValueError, match="2 boxes_malformed"):
            main(
                monkeypatch,
                "--images",
                tmp_path / "in",
                "--out",
                out,
                "--model",
                tmp_path / "model",
            )
    a, b = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in parts.read_parts(out)]
        for out in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b and len(a) == 3


def test_a_group_of_texts_depends_on_its_seed():
    model, processor = tiny_model.tiny()
    requests = [
        synth.Request(None, key, noise(32, 32), text)
        for key, text in ((1, "what"), (2, "is"), (1, "what"))
    ]

    def say(batch):
        engine = synth.Engine((model, processor), rollout.Batches(batch), 0, "", None)
        return synth.reply_texts(engine, "label", requests, 6, group=4, temperature=1.0)

    one, two = say(1), say(3)
    assert one == two and [len(texts) for texts in one] == [4] * 3 and one[0] == one[2] != one[1]


def test_photographs_train_and_evaluate_a_model_end_to_end(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch)
    out = tmp_path / "mine"
    main(monkeypatch, "--images", photos(tmp_path / "in"), "--out", out, "--labels")
    main(monkeypatch, "--check", out)
    assert "6 well-formed rows, 6 with a box, 6 with an answer; 0 errors" in capsys.readouterr().out
    monkeypatch.undo()
    M.save(*tiny_model.tiny(), tmp_path / "model")
    cli = lambda *args: subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )
    trained = cli(
        "train.py",
        "--model",
        tmp_path / "model",
        "--data",
        out,
        "--out",
        tmp_path / "run",
        "--steps",
        2,
        "--prompts",
        2,
        "--group",
        2,
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
        "--workers",
        0,
        "--threads",
        1,
    )
    assert trained.returncode == 0 and "step    2/2" in trained.stdout, trained.stderr
    told = cli(
        "evaluate.py",
        "--bench",
        out,
        "--model",
        tmp_path / "run" / "checkpoint-000002",
        "--out",
        tmp_path / "eval",
        "--view",
        "both",
        "--max-new-tokens",
        4,
        "--device",
        "cpu",
    )
    assert told.returncode == 0 and "mine" in told.stdout, told.stderr


# ------------------------------------------------------------------------------------------------------- check and preview


def test_check_lists_every_error_and_warns_of_leaks_and_imbalance(tmp_path, monkeypatch, capsys):
    sample = lambda n, **changes: triplet_format.Triplet(
        **{
            "id": f"s{n}",
            "question": f"What colour is tag {n}?",
            "answer": "red",
            "image": noise(40, 30, n),
            "crop": noise(16, 16, n),
            "bbox": [1, 2, 9, 10],
            "extra": {"type": "colour"},
        }
        | changes
    )
    triplet_format.write_triplets(
        tmp_path,
        [
            sample(0),
            sample(1, bbox=[1, 2, 41, 9]),
            sample(2, question="What is red?"),
            sample(3),
            sample(4),
            sample(5),
        ],
    )
    (tmp_path / "images" / "s3.png").write_bytes(b"")
    (tmp_path / "teacher_images" / "s4.png").write_bytes(
        (tmp_path / "teacher_images" / "s0.png").read_bytes()[:200]
    )
    with (tmp_path / "train.jsonl").open("a") as file:
        line = json.dumps(rows(tmp_path)[0])
        file.write(
            "\n".join(
                [
                    "{torn",
                    line,
                    line.replace("What", "What <image>"),
                    line.replace("images/s0", "images/none"),
                ]
            )
            + "\n"
        )
    with pytest.raises(ValueError, match="has 7 errors"):
        main(monkeypatch, "--check", tmp_path)
    told = capsys.readouterr().out
    for found in (
        "line 7: no JSON",
        "id 's0' is that of line 1",
        "line 9: problem",
        "no such file",
        "sample s1: bbox is [1, 2, 41, 9]",
        "s3.png (0 bytes)",
        "s4.png",
        "1 questions contain their answer, the first ['s2']",
        "6 of 6 answers are 'red', over 10%",
        "types are 'colour', over 35%",
    ):
        assert found in told
    assert (
        subprocess.run(
            [sys.executable, synth.__file__, "--check", tmp_path], capture_output=True
        ).returncode
        == 1
    )
    one_each = [
        triplet_format.Triplet(
            str(n), "What is it?", None, None, answer=str(n), extra={"type": str(n)}
        )
        for n in range(4)
    ]
    assert checking.balance(one_each) == []  # four of four: each 25%, but none repeated
    toy_scenes.draw(tmp_path / "toy", 6, 0)
    main(monkeypatch, "--check", tmp_path / "toy")
    assert "6 well-formed rows, 6 with a box, 6 with an answer; 0 errors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "word " * 300,
        "x" * 900,
        "一个很长的问题没有空格" * 40,
        "W" * 40 + "\n\nA. bark\nB. moss",
        "",
        "i" * 80 + " W" * 80,
    ],
)
def test_the_contact_sheet_wraps_by_width_in_any_script(text):
    font = ImageFont.load_default(18)
    lines = previews.wrap(text, font, 630, 12)
    assert len(lines) <= 12 and all(font.getlength(line) <= 640 for line in lines)
    if font.getlength(text) < 3000:
        assert "".join("".join(lines).split()) == "".join(text.split())
