"""synth.py --images: from photographs to triplets, with a scripted model, a tiny Qwen3.5 and a tiny
SAM 3; and its rooms in synthesis/."""

import errno
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import livelier, noise
from PIL import Image

import model as vision_model
import rollout
import synth
from benchmarks import sources
from launch.flags import settings_parser
from storage.images import load_image
from synthesis import checking, parts, photos, proposers
from synthesis.photos import Photo
from synthesis.regions import Evidence, Region, cut, small_regions
from synthesis.texts import PROMPTS, broken_rule, drafted, json_in_reply, normal
from triplets.format import RED, Triplet, read_triplets, write_triplets

ASKED = [
    {"question": "What colour is the tag?", "answer": "red", "type": "colour"},
    {"question": "What number is on the tag?", "answer": "17", "type": "number"},
]


def kind_of(prompt):
    if prompt.startswith(PROMPTS["find"]):
        return "find"
    if prompt.startswith((PROMPTS["ask"][:20], PROMPTS["pair"]["ask"][:20])):
        return "ask"
    return "vote" if 'reply "unknown"' in prompt else "wrong"


def found_in(image, *_):
    """Two boxes in thousandths that depend on the picture's pixels alone."""
    x = zlib.crc32(image.tobytes()) % 700
    return json.dumps(
        [
            {"bbox_2d": [x, x, x + 120, x + 90], "label": "tag"},
            {"bbox_2d": [x + 150, x + 100, x + 250, x + 190], "label": "knob"},
        ]
    )


def scripted(patch, most=100, **said):
    """Puts in place of rollout.answers what it says to each kind of prompt: a text or a function of
    (image, prompt, n), the n-th of a group. A picture 641 px wide never fits into its memory, nor
    do more than `most` pictures. Returns the list of its calls: (kind, prompts, temperature)."""
    said = {
        "find": found_in,
        "ask": json.dumps(ASKED),
        "vote": "Red.",
        "wrong": '["blue", "green", "white"]',
    } | said
    calls = []

    def answers(model, processor, images, texts, group=1, temperature=0, **how):
        if len(texts) > most or any(shown[0].width == 641 for shown in images):
            raise torch.OutOfMemoryError("CUDA out of memory")
        kind = kind_of(texts[0])
        calls.append((kind, len(texts), temperature))
        replies = []
        for shown, prompt in zip(images, texts, strict=True):
            for n in range(group):
                text = said[kind]
                if callable(text):
                    text = text(shown if len(shown) > 1 else shown[0], prompt, n)
                replies.append(rollout.Reply(text, 1, False))
        return replies

    patch.setattr(rollout, "answers", answers)
    patch.setattr(vision_model, "load", lambda *args, **how: (None, None))
    return calls


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(*flags) runs synth.py on the three photographs in tmp_path/in; returns the folder it
    writes. Keywords: what the model says; its calls are then make.calls."""
    photographs(tmp_path / "in")

    def go(*flags, out="out", **said):
        go.calls = scripted(monkeypatch, **said)
        main("--images", tmp_path / "in", "--out", tmp_path / out, *flags)
        return tmp_path / out

    return go


def main(*argv):
    synth.main([*map(str, argv)])


def photograph(path, seed=0, size=(640, 480), **settings):
    """Smooth noise, so that JPEGs are small and every picture differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(40, 30, seed).resize(size, Image.Resampling.BICUBIC).save(path, **settings)
    return path


def photographs(folder, count=3):
    for n in range(count):
        photograph(folder / ("sub" if n % 2 else ".") / f"{n}.jpg", n)


def blank(width, height):
    return Photo("x", image=Image.new("RGB", (width, height)))


def stats(out):
    return json.loads((out / "stats.json").read_text(encoding="utf-8"))


def rows(out):
    return [json.loads(line) for line in (out / "train.jsonl").open(encoding="utf-8")]


def done(out):
    return parts.read_parts(out)[1]


def pixels(image):
    return np.asarray(image, dtype=int)


# ------------------------------------------------------------------------------------ the pipeline


def test_photographs_become_triplets_with_their_provenance(tmp_path, make):
    bad = ASKED[0] | {"type": "mood"}
    out = make("--full", "png", ask=json.dumps([bad, *ASKED, bad]))  # the fourth is not looked at
    assert [call[:2] for call in make.calls] == [("find", 3), ("ask", 6)]
    found = read_triplets(out)
    assert len(found) == 6
    assert [t.id for t in found] == sorted(t.id for t in found)
    for t in found:
        assert t.question == "What colour is the tag?" + PROMPTS["hint"]
        assert t.answer is None
        assert t.extra["box"] == t.boxes[0]
        assert t.extra["source_size"] == [640, 480]
        source = load_image(tmp_path / "in" / t.extra["source"])
        framed = Evidence([Region(Photo("x", image=source), t.boxes[0])]).framed()
        assert load_image(t.image).tobytes() == framed.tobytes()
        assert load_image(t.crops[0]).tobytes() == cut(framed, t.extra["window"]).tobytes()
    told = stats(out)
    assert (told["photographs"], told["samples"]) == (3, 6)
    assert told["dropped"] == {"question_type": 6, "question_spare": 12}
    assert {"load", "propose", "question", "write"} == told["seconds"].keys()
    assert told["photographs_per_second_and_rank"] > 0
    make("--full", "png")  # nothing left to do
    assert not make.calls
    assert read_triplets(out) == found


def test_pairs_of_regions_are_asked_what_neither_crop_answers_alone(tmp_path, make):
    """Of the first photograph's three regions two touch, the second has one, the third has two."""
    boxes = {
        "0.jpg": [[40, 50, 90, 90], [300, 200, 400, 290], [404, 200, 480, 290]],
        "sub/1.jpg": [[40, 50, 90, 90]],
        "2.jpg": [[40, 50, 90, 90], [300, 200, 400, 290]],
    }
    given = [{"image": name, "boxes": some, "labels": None} for name, some in boxes.items()]
    for line in given:
        line["labels"] = [f"tag {n}" for n in range(len(line["boxes"]))]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    texts = ("What colour is tag 0?", "What is the total of both numbers?", "What do both say?")
    asked = [{"question": text, "answer": "12", "type": "number"} for text in texts]
    prompts = []

    def ask(shown, prompt, n):
        assert [image.size for image in shown][0] == (
            124,
            100,
        )  # twice 50 x 40 px, frame and margin
        prompts.append(prompt)
        return json.dumps(asked)

    def vote(shown, prompt, n):
        """The first question is about the first crop, whatever else is seen."""
        if isinstance(shown, list):
            return "12"
        return "It is 12." if prompt.startswith(texts[0]) and shown.width == 124 else "unknown"

    flags = ("--proposer", tmp_path / "boxes.jsonl", "--regions", 2, "--labels", "--full", "png")
    out = make(*flags, ask=ask, vote=vote)
    assert stats(out)["dropped"] == {
        "one_is_enough": 3,
        "question_spare": 3,
        "pair_in_one_crop": 1,
        "regions_too_few": 1,
    }
    assert all("tag 0" in prompt and "tag " in prompt.split("second")[1] for prompt in prompts)
    found = read_triplets(out)
    kept = [t.boxes for t in found if t.extra["source"] == "0.jpg"]
    first, *others = boxes["0.jpg"]
    assert sorted(kept) == [[first, other] for other in others]
    assert len(found) == 3
    for t in found:
        assert t.question == texts[1] + PROMPTS["pair"]["hint"]
        assert t.answer == "12"
        source, full = (
            pixels(load_image(path)) for path in (tmp_path / "in" / t.extra["source"], t.image)
        )
        outside = np.ones(full.shape[:2], bool)
        for box, frame, window, crop in zip(
            t.boxes, t.extra["frame"], t.extra["window"], t.crops, strict=True
        ):
            x1, y1, x2, y2 = box
            assert (full[y1:y2, x1:x2] == source[y1:y2, x1:x2]).all()
            left, top, right, bottom = frame
            assert (full[top, left:right] == RED).all() and (
                full[top:bottom, right - 1] == RED
            ).all()
            outside[top:bottom, left:right] = False
            assert load_image(crop).tobytes() == cut(load_image(t.image), window).tobytes()
        assert (full[outside] == source[outside]).all()
    main("--check", out)
    make(*flags, ask=ask, vote=vote)  # nothing left to do
    assert not make.calls
    with pytest.raises(FileExistsError, match="'regions': "):
        make(*flags[:2], "--labels", "--full", "png")


def test_labels_need_seven_of_eight_votes_and_are_written(make):
    def vote(image, prompt, n):
        agree = 7 if prompt.startswith("What colour") else 6
        return "It is RED." if n < agree else "unknown"

    out = make("--labels", vote=vote)
    assert make.calls[-1] == ("vote", 12, 1.0)
    for row in rows(out):
        assert row["answer"] == "RED"
        assert row["extra_info"]["draft"] == "red"
        assert row["extra_info"]["votes"] == [7, 8]
    assert stats(out)["dropped"] == {"no_consensus": 6}


@pytest.mark.parametrize(
    "flags, said, dropped",
    [
        ("", {"ask": "[]"}, "6 no_question"),
        ("--labels", {"vote": "Yes"}, "12 yes_no"),  # what they agree on keeps the rules too
        ("--labels", {"vote": ""}, "12 no_consensus"),
        (
            "--format mcq",
            {"wrong": '["red", "blue", "green"]'},
            "6 question_spare\n +6 options_too_few",
        ),
    ],
)
def test_no_sample_at_the_end_is_an_error_with_the_table(tmp_path, make, flags, said, dropped):
    with pytest.raises(ValueError, match=rf"no sample from 3 photographs[\s\S]* {dropped}"):
        make(*flags.split(), **said)
    assert stats(tmp_path / "out")["samples"] == 0


def test_multiple_choice_is_written_as_released(tmp_path, make):
    photographs(tmp_path / "in", 8)
    wrong = '["Blue", "a red", "unknown", "I cannot tell", "green", "red.", "white", "brown"]'
    out = make("--format", "mcq", wrong=wrong)
    assert {row["answer"] for row in rows(out)} == set("ABCD")
    for row in rows(out):
        stem, tail = row["problem"].split(PROMPTS["hint"] + "\n\n")
        assert stem == "<image>\nWhat colour is the tag?"
        listed, _ = tail.split(PROMPTS["choose"])
        options = dict(line.split(". ") for line in listed.split("\n"))
        assert options[row["answer"]] == "Red"
        assert sorted(options.values()) == ["Blue", "Red", "green", "white"]
    assert "16 of 16 answers are 'red'" in checking.balance(read_triplets(out))[0]


def test_boxes_of_ones_own_need_no_model_to_find_them(tmp_path, make, capsys):
    boxes = tmp_path / "boxes.jsonl"
    boxes.write_text(
        '{"image": "0.jpg", "labels": ["tag", "mug"],'
        ' "boxes": [[9.5, 10, 90, 80], [300, 200, 400, 290]]}\n\n'
        '{"image": "gone.jpg", "boxes": []}\n{"image": 7, "boxes": []}\n'
    )
    out = make("--proposer", boxes, "--clean-crop")
    assert sorted(row["bbox"] for row in rows(out)) == [[9, 10, 90, 80], [300, 200, 400, 290]]
    assert "names 2 images" in capsys.readouterr().out
    assert {call[0] for call in make.calls} == {"ask"}
    assert stats(out)["dropped"]["nothing_found"] == 2
    for t in read_triplets(out):
        clean = cut(load_image(tmp_path / "in" / "0.jpg"), t.extra["window"])
        assert load_image(t.crops[0]).tobytes() == clean.tobytes()


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"image": "a", "boxes": [[1, 2, 3, 4]], "labels": []}', {"a": [([1, 2, 3, 4], None)]}),
        ('\ufeff{"image": "größe.jpg", "boxes": []}', {"größe.jpg": []}),
        ("{", None),
        ("[]", None),
        ('{"image": "a"}', None),
        ('{"image": "a", "boxes": [[5, 5, 1, 9]]}', None),
        ('{"image": "a", "boxes": [[1, 2, NaN, 4]]}', None),
        ('{"image": "a", "boxes": [[1, 2, 3, Infinity]]}', None),
        ('{"image": "a", "boxes": [[1, 2, 3, 4]], "labels": ["x", "y"]}', None),
        ('{"image": "gr\udcf6\udcdfe.jpg", "boxes": []}', None),  # in Latin-1
    ],
)
def test_a_file_of_boxes_is_read_or_its_bad_line_named(tmp_path, line, expected):
    path = tmp_path / "boxes.jsonl"
    path.write_text("\n" + line, encoding="utf-8", errors="surrogateescape")
    if expected:
        assert proposers.read_boxes(path) == expected
    else:
        with pytest.raises(ValueError, match=r"boxes\.jsonl, line 2"):
            proposers.read_boxes(path)


# ------------------------------------------------------------------------------- the failure table


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_photographs_are_counted_by_reason_and_the_others_used(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    good = photograph(folder / "good.jpg", 1).read_bytes()
    png = photograph(folder / "corrupt.png", 3).read_bytes()
    for name, content in {
        "copy of good.jpg": good,
        "truncated.jpg": good[:5000],
        "corrupt.png": png[:5000] + bytes(400) + png[5400:],
        "empty.jpg": b"",
        "notes.txt": b"hello",
        "huge.ppm": b"P6 60000 60000 255\n",  # headers without pixels: to decode one is an error
        "large.ppm": b"P6 10100 10100 255\n",
        "long.ppm": b"P6 91000 450 255\n",
    }.items():
        (folder / name).write_bytes(content)
    photograph(folder / "tiny.png", 4, (640, 440))
    os.symlink("nowhere", folder / "dangling.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photograph(folder / "turned.jpg", 6, exif=exif)
    scripted(monkeypatch)
    for _ in range(2):  # what is written is no photograph
        main("--images", folder, "--out", folder / "out")
    told = stats(folder / "out")
    assert told["dropped"] == {
        "duplicate": 1,
        "corrupt": 2,
        "empty_or_unreadable": 1,
        "not_an_image": 1,
        "too_small": 1,
        "too_large": 2,
        "too_long": 1,
        "question_spare": 4,
    }
    assert told["photographs"] == 11
    for start in (
        "truncated.jpg: corrupt: ",
        "notes.txt: not_an_image: ",
        "tiny.png: too_small: 640 x 440 px",
    ):
        assert any(note.startswith(start) for note in told["notes"])
    used = [row["extra_info"] for row in rows(folder / "out")]
    assert Counter((each["source"], *each["source_size"]) for each in used) == {
        ("copy of good.jpg", 640, 480): 2,
        ("turned.jpg", 480, 640): 2,
    }


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"a": 1}]', [{"a": 1}]),
        ('Sure, [1] is it:\n```json\n[{"a": 1,},\n]\n``` Done.', [{"a": 1}]),
        ("[]", []),
        ("None: [].", []),
        ('<think>["x"]</think>\n["y"]', ["y"]),
        ('{"objects": [{"a": 1}]}', [{"a": 1}]),
        ('[{"a": 1}, {"a": 2}, {"a": [3', [{"a": 1}, {"a": 2}]),
        ("", None),
        ("I see nothing", None),
        ("[__import__('os').system('x')]", None),
        ("[" * 100000, None),
        ('{"a":' * 50000, None),
        ("[" + "9" * 9000 + "]", None),
        ('["sign [red]", "cup {2}"]', ["sign [red]", "cup {2}"]),
        ('[{"q": "What is {x}?", "a": "OPEN}"}]', [{"q": "What is {x}?", "a": "OPEN}"}]),
        ('["größe \\"M\\" ]"]', ['größe "M" ]']),
        ('Here [as asked]: ["a", "b"]', ["a", "b"]),
        ('{"a": ' + "[" * 9000 + "]" * 9000 + "}", None),
        ("\x00\ud800[", None),
        ("<think>[1", None),
    ],
)
def test_json_is_found_in_whatever_surrounds_it_and_never_evaluated(text, expected):
    assert json_in_reply(text) == expected


def test_boxes_that_are_none_are_dropped_and_the_others_kept():
    bad = [
        [0, 0, 1001, 10],
        [-1, 0, 5, 5],
        [5, 0, 5, 9],
        [1, 9, 9, 1],
        [0, 0, "9", 9],
        [0, 0, 9],
        [True, 0, 9, 9],
        None,
        [0, 0, float("nan"), 9],
        [0, 0, float("inf"), 9],
        [0, 0, 10**400, 9],
    ]
    good = [300, 300, 420, 420]
    items = [{"bbox_2d": box, "label": "x"} for box in [*bad, good]]
    items += [{"bbox_2d": good, "label": "<image> y"}, "y"]
    photo = blank(640, 480)
    [region] = proposers.replied_boxes(photo, items)
    assert region.box == pytest.approx([192, 144, 268.8, 201.6])
    assert photo.drops == {"bad_box": len(bad) + 2}


def test_regions_are_small_visible_distinct_and_at_most_three():
    photo = blank(600, 1000)

    def region(x, y, w=50, h=50, label="the tag"):
        return Region(photo, [x, y, x + w, y + h], label)

    proposed = [
        region(1, 2, label="a<|im_end|>"),
        *[region(100, 100) for _ in range(100)],
        region(102, 101, label="knob"),
        region(105, 105, 25, 25),
        region(10, 300, 19, 60),
        region(10, 300, 20, 170),
        region(300, 10, 400, 300),
        region(2000, 10),
        region(0, 0, 600, 90),
        region(200, 100),
        region(299.5, 100.5),
        region(400, 100),
    ]
    kept = small_regions(photo, proposed)
    assert [each.box[0] for each in kept] == [100, 200, 299]
    assert kept[2].box == [299, 100, 350, 151]
    assert photo.drops == {
        "box_repeated": 101,
        "box_small": 1,
        "box_thin": 1,
        "box_large": 1,
        "bad_box": 2,
        "box_at_edges": 1,
        "box_spare": 1,
    }


@pytest.mark.parametrize(
    "question, reason",
    [
        ("What colour is the tag?", None),
        ("What colour is the tag？", None),
        ("What reddish tag is that?", None),
        (7, "question_malformed"),
        ("What <image> is the tag?", "question_malformed"),
        ("What is it" + "?" * 300, "question_malformed"),
        ("Name the tag's colour.", "question_form"),
        ("What colour is it? What size is it?", "several_questions"),
        ("What colour is it and what size?", "several_questions"),
        ("What colour is the tag in the picture?", "mentions_view"),
        ("What is in the red box?", "mentions_view"),
        ("What hangs in the top left corner?", "mentions_place"),
        ("What cup stands on the left?", "mentions_place"),
        ("Is the tag red today?", "yes_no"),
        ("What is it, red or blue?", "either_or"),
        ("What colour is the red tag?", "leak"),
    ],
)
def test_a_question_breaks_a_rule_or_none(question, reason):
    assert broken_rule(drafted(ASKED[0] | {"question": question}, 0)) == reason


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"answer": 17}, None),
        ({"answer": 3.5}, None),
        ({"answer": None}, "question_malformed"),
        ({"answer": "<|vision_start|>"}, "question_malformed"),
        ({"answer": "Yes."}, "yes_no"),
        ({"answer": True}, "yes_no"),
        ({"type": "mood"}, "question_type"),
        ({"type": None}, "question_type"),
        ({"answer": "one two three four five"}, "answer_form"),
        ({"answer": "one two three four five", "type": "text"}, None),
        ({"answer": "unknown"}, "answer_form"),
        ({"question": "How many of the two lights shine?", "answer": "2"}, "leak"),
        ({"question": "这个字是红色吗，什么颜色，什么样子?", "answer": "红色"}, "leak"),
    ],
)
def test_its_answer_and_type_break_a_rule_or_none(change, reason):
    assert broken_rule(drafted(ASKED[0] | change, 0)) == reason


def test_what_is_no_question_at_all_is_malformed():
    for item in (["a"], None, {}):
        assert broken_rule(drafted(item, 0)) == "question_malformed"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The answer is: Red.", "red"),
        ("\\boxed{1} so \\boxed{ Two }", "2"),
        ("It's a grey one", "gray 1"),
        ("COLOUR", "color"),
        ("1,250", "1250"),
        ("<think>red</think> blue", "blue"),
        ("ＥＸＩＴ", "exit"),
        ("an apple", "apple"),
        ("A", "a"),
        ("Platform A", "platform a"),
        ("N/A", "n/a"),
        ("They are twenty", "20"),
        ("12:30", "12:30"),
        ("", ""),
        ("红色。", "红色"),
    ],
)
def test_votes_are_counted_in_one_spelling(text, expected):
    assert normal(text) == expected


def test_how_many_is_answered_by_the_first_whole_number():
    assert normal("there are 3 of the 5", "How many?") == "3"
    assert normal("a lot", "How many?") == "lot"


def test_text_without_json_is_asked_for_again_then_counted_and_kept(tmp_path, make):
    bad = load_image(tmp_path / "in" / "0.jpg")
    out = make(find=lambda image, *_: "no " * 500 if image == bad else found_in(image))
    assert make.calls[:2] == [("find", 3, 0.0), ("find", 1, 0.7)]
    told = stats(out)
    assert told["dropped"]["boxes_malformed"] == 1
    assert re.fullmatch(r"0\.jpg: boxes_malformed: .{500}", told["notes"][0])


def test_out_of_memory_halves_the_batch_and_skips_what_does_not_fit_alone(tmp_path, make):
    def vote(image, prompt, n):
        if prompt.startswith("What number"):
            raise torch.OutOfMemoryError
        return "Red."

    photographs(tmp_path / "in", 5)
    photograph(tmp_path / "in" / "x.jpg", 9, (641, 480))
    out = make("--batch", 4, "--labels", most=2, vote=vote)
    assert stats(out)["dropped"] == {"out_of_memory": 11}
    assert len(rows(out)) == 10
    # one that never fits slows no other down
    assert {call[1] for call in make.calls if call[0] == "ask"} == {2}


@pytest.mark.parametrize(
    "place, name, finished",
    [
        (Image.Image, "save", 0),
        (synth, "print", 0),  # of a photograph's line
        (os, "replace", 3),  # of train.jsonl
    ],
)
def test_a_full_disk_stops_the_run_and_leaves_nothing_half_done(
    tmp_path, monkeypatch, make, place, name, finished
):
    replace = os.replace

    def full(*args, **how):
        if place is os and args[1].name != "train.jsonl":
            return replace(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="MB free"):
        patch.setattr(place, name, full, raising=False)
        make()
    out = tmp_path / "out"
    assert not list(out.rglob(".tmp-*"))
    assert len(done(out)) == finished
    assert len(read_triplets(make())) == 6


def test_folders_that_make_no_sense_are_refused(tmp_path, make, world):
    with pytest.raises(FileNotFoundError, match="no finished photographs"):
        main("--merge", tmp_path / "in")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no files"):
        main("--images", tmp_path / "none", "--out", tmp_path / "out")
    for out in ("in", "."):  # what is written would be taken for photographs
        with pytest.raises(ValueError, match="is or holds --images"):
            make(out=out)
    with pytest.raises(FileExistsError, match="another data set"):
        make(out=world / "data")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--images x",
        "--images x --out y --batch 0",
        "--images x --out y --proposer none.jsonl",
        "--preview x --font none.ttf",
        "--pre x",  # no abbreviations
    ],
)
def test_a_command_line_that_asks_for_nothing_or_too_little_is_refused(flags):
    with pytest.raises(SystemExit) as error:
        main(*flags.split())
    assert error.value.code == 2


def test_missing_weights_are_said_before_the_first_photograph(tmp_path, monkeypatch):
    photographs(tmp_path / "in", 1)
    monkeypatch.setattr(photos, "load_photo", lambda *_: pytest.fail("loaded"))
    with pytest.raises(FileNotFoundError, match="hf auth login"):
        main("--images", tmp_path / "in", "--out", tmp_path / "out", "--model", "no/where")
    with pytest.raises(FileNotFoundError, match="gated"):
        proposers.Sam3(str(tmp_path / "nowhere"), "cpu")


# -------------------------------------------------------------------------- ranks and interruption


def child(*how):
    """Exit code of a mortal run in a process of its own."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=mortal_run, args=how)
    process.start()
    process.join()
    return process.exitcode


def mortal_run(folder, out, rank=0, world=1, kill_at=0):
    """A run that is killed (-9) at the kill_at-th reply of the model, sample drawn or file
    renamed."""
    calls = itertools.count(1)

    def mortal(function):
        def wrapper(*args, **how):
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **how)

        return wrapper

    patch = pytest.MonkeyPatch()
    scripted(patch)
    for place, name in ((rollout, "answers"), (synth, "draw_triplet"), (os, "replace")):
        patch.setattr(place, name, mortal(getattr(place, name)))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    main("--images", folder, "--out", out, "--batch", 2)


def test_a_killed_run_goes_on_with_other_ranks_to_the_same_data_set(tmp_path, capsys):
    folder = tmp_path / "in"
    photographs(folder, 9)
    photograph(folder / "z.jpg", 2)  # the bytes of 2.jpg
    straight, out = tmp_path / "straight", tmp_path / "killed"
    assert child(folder, straight) == 0
    assert child(folder, out, 0, 1, 20) == -signal.SIGKILL
    assert 0 < len(done(out)) < 9
    with (out / ".parts" / "00000.jsonl").open("ab") as torn:
        torn.write(b'{"file": "torn')
    assert child(folder, out, 1, 2, 9) == -signal.SIGKILL
    assert child(folder, out, 0, 3) == 0
    assert len(done(out)) < 10
    assert [child(folder, out, rank, 3) for rank in (1, 2)] == [0, 0]
    assert not (out / "train.jsonl").exists()

    an_hour_ago = time.time() - 3600
    living = out / "images" / ".tmp-living.jpg"
    old = out / "teacher_images" / ".tmp-old.png"
    living.touch()
    old.touch()
    os.utime(old, (an_hour_ago, an_hour_ago))
    for _ in range(2):
        main("--merge", out)
        assert "18 samples of 10 photographs" in capsys.readouterr().out
    assert (
        stats(out)["dropped"]
        == stats(straight)["dropped"]
        == {"question_spare": 18, "duplicate": 1}
    )
    assert living.exists()
    assert not old.exists()
    images = list(straight.glob("*images/*"))
    assert len(images) == 36
    for path in (*images, straight / "train.jsonl"):
        assert (out / path.relative_to(straight)).read_bytes() == path.read_bytes()


def test_another_configuration_is_refused_on_resume_and_in_a_merge(make, monkeypatch):
    out = make()
    other = make("--clean-crop", out="other")
    marks = {row["extra_info"]["config"] for row in (*rows(out), *rows(other))}
    assert len(marks) == 2
    for key, *flags in (
        ("seed", "--seed", 1),
        ("clean_crop", "--clean-crop"),
        ("model", "--model", "other"),
    ):
        with pytest.raises(FileExistsError, match=rf"{{'{key}': \("):
            make(*flags)
    monkeypatch.setitem(PROMPTS, "hint", " Look closely.")
    with pytest.raises(FileExistsError, match=r"{'texts': \("):
        make()
    (out / ".parts" / "00001.jsonl").write_text('{"config": {"seed": 1}}\n')
    with pytest.raises(FileExistsError, match="another configuration"):
        main("--merge", out)


def test_a_damaged_line_of_a_rank_is_named(make):
    out = make()
    with (out / ".parts" / "00000.jsonl").open("ab") as part:
        part.write(b"\x00\xff\n")
    with pytest.raises(ValueError, match=r"00000\.jsonl has a damaged line"):
        main("--merge", out)


# ---------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("w, h", [(20, 60), (60, 50), (150, 150)])
def test_the_evidence_survives_and_its_frame_is_seen_wherever_the_box_lies(w, h):
    photo = Photo("x", image=noise(640, 480))
    before = pixels(photo.image)
    starts = itertools.product((0, 1, 300, 638 - w, 640 - w), (0, 3, 200, 478 - h, 480 - h))
    for x, y in starts:
        [region] = small_regions(photo, [Region(photo, [x, y, x + w, y + h])])
        assert region.box == [x, y, x + w, y + h]
        line = region.line
        left, top, right, bottom = region.frame
        expected = before.copy()
        expected[top:bottom, left:right] = RED
        for kept in (
            np.s_[top + line : bottom - line, left + line : right - line],  # inside the frame
            np.s_[y : y + h, x : x + w],  # the evidence
        ):
            expected[kept] = before[kept]
        assert (pixels(Evidence([region]).framed()) == expected).all()
        rooms = (x - left, y - top, right - x - w, bottom - y - h)
        assert sum(room >= line for room in rooms) >= 2  # so many sides of it are seen
        x1, y1, x2, y2 = region.window
        assert 0 <= x1 <= left <= x
        assert 0 <= y1 <= top <= y
        assert x + w <= right <= x2 <= 640
        assert y + h <= bottom <= y2 <= 480
        assert min(region.crop.size) >= 64


def test_frame_and_window_are_those_measured_on_the_released_set():
    region = Region(blank(2250, 1500), [1000, 700, 1100, 800])
    assert region.line == 5
    assert region.frame == [994, 694, 1106, 806]
    assert region.window == [988, 688, 1112, 812]


def test_a_large_window_is_made_smaller():
    crop = cut(Image.new("RGB", (9000, 9000)), [0, 0, 3001, 2503])
    assert 2**22 - 9000 < crop.width * crop.height <= 2**22


# ---------------------------------------------------------------- real models, as small as can be


def tiny_sam3(folder):
    from transformers import CLIPTokenizer, Sam3Config, Sam3Model

    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_layers": 1,
    }
    config = Sam3Config(
        vision_config={
            "fpn_hidden_size": 32,
            "backbone_config": small | {"model_type": "sam3_vit_model", "image_size": 56},
        },
        text_config=small,
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config=small,
        mask_decoder_config=small,
    )
    torch.manual_seed(0)
    Sam3Model(config).save_pretrained(folder)
    letters = [chr(c) for c in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {word: n for n, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return proposers.Sam3(str(folder), "cpu")


def test_sam3_detects_without_torchvision_what_its_plain_forward_does(tmp_path):
    sam3 = tiny_sam3(tmp_path)
    livelier(sam3.model, 3)  # the picture counts
    image = noise(640, 480)
    shown = pixels(image.resize((56, 56), Image.Resampling.BILINEAR)) / 127.5 - 1
    shown = torch.tensor(shown, dtype=torch.float32).permute(2, 0, 1)[None]
    words = sam3.tokenizer(["red mug"], padding="max_length", max_length=32, return_tensors="pt")
    with torch.inference_mode():
        plain = sam3.model(pixel_values=shown, **words)
    expected = plain.pred_logits[0].sigmoid() * plain.presence_logits[0].sigmoid()
    scores, boxes = sam3.detect(image, ["tag", "red mug"])
    torch.testing.assert_close(scores[1], expected)
    sizes = torch.tensor([640, 480, 640, 480])
    torch.testing.assert_close(boxes[1], plain.pred_boxes[0] * sizes, atol=0.05, rtol=0)
    assert "torchvision" not in sys.modules


def sam3_that(detect):
    """A SAM 3 without a model."""
    sam3 = object.__new__(proposers.Sam3)
    sam3.detect = detect
    return sam3


def test_sam3_keeps_the_names_of_which_it_is_sure_to_see_one():
    def detect(image, names):
        assert names == ["tag", "mug", "cup", "bin"]
        scores = [[0.1, 0.8], [0.9, 0.6], [0.4, 0.1], [0.7, 0.1]]
        return torch.tensor(scores), torch.arange(32.0).reshape(4, 2, 4)

    sam3 = sam3_that(detect)
    photo = blank(640, 480)
    [region] = sam3.boxes_in(photo, ["tag", {"label": "mug"}, "tag", 7, "cup", "bin"])
    assert (region.label, region.box, region.score) == ("tag", [4, 5, 6, 7], 0.8)
    assert photo.drops == {"name_malformed": 1, "name_ambiguous": 1, "name_not_found": 2}
    assert sam3.boxes_in(photo, []) == []


def test_sam3_is_given_the_models_names_and_may_run_out_of_memory(monkeypatch, make):
    def detect(image, names):
        assert names == ["tag", "red mug"]
        raise torch.OutOfMemoryError

    monkeypatch.setattr(synth, "Sam3", lambda *_: sam3_that(detect))
    with pytest.raises(ValueError, match="3 out_of_memory"):
        make("--proposer", "sam3", find='["tag", "red mug"]')


def test_a_group_of_texts_depends_on_its_seed(world):
    requests = [synth.Request(None, key, noise(32, 32), "what") for key in (1, 2, 1)]

    def say(batch):
        flags = f"--model {world}/base --batch {batch}".split()
        settings = settings_parser(synth.Settings, "").parse_args(flags)
        engine = synth.load_engine(settings, {}, {})
        return synth.reply_texts(engine, "label", requests, 6, group=4, temperature=1.0)

    one = say(1)
    assert one == say(3)
    assert len(one) == 12
    assert one[:4] == one[8:] != one[4:8]


# ---------------------------------------------------------------------------------------- checking


def test_what_is_made_is_whole_and_can_be_evaluated(tmp_path, make, capsys):
    out = make("--labels")
    main("--check", out)
    assert "6 with a box, 6 with an answer; 0 errors" in capsys.readouterr().out
    assert [row.answer for row in sources.read_benchmark(str(out), tmp_path)] == ["Red"] * 6


def sample(n, **changes):
    fields = {
        "id": f"s{n}",
        "question": f"What colour is tag {n}?",
        "answer": "red",
        "image": noise(40, 30, n),
        "crops": [noise(16, 16, n)],
        "boxes": [[1, 2, 9, 10]],
        "extra": {"type": "colour"},
    }
    return Triplet(**fields | changes)


def test_check_lists_every_error_and_warns_of_leaks_and_imbalance(tmp_path, capsys):
    samples = [
        sample(0),
        sample(1, boxes=[[1, 2, 41, 9]]),
        sample(2, question="What is red?"),
        sample(3),
        sample(4),
        sample(5, image=Image.new("RGB", (2100, 10))),  # no image processor takes it
        sample(6, crops=[noise(16, 16)] * 2, boxes=[[1, 2, 9, 10], [1, 2, 9, 31]]),
        sample(7, crops=[noise(16, 16)] * 2, boxes=None),
    ]
    write_triplets(tmp_path, samples)
    (tmp_path / "images" / "s3.png").write_bytes(b"")
    crop = tmp_path / "teacher_images" / "s4.png"
    crop.write_bytes(crop.read_bytes()[:200])
    (tmp_path / "teacher_images" / "s7-2.png").write_bytes(b"")
    line = json.dumps(rows(tmp_path)[0])
    wrong = [
        "{torn",
        line,
        line.replace("What", "What <image>"),
        line.replace("images/s0", "images/none"),
    ]
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("\n".join(wrong))
    with pytest.raises(ValueError, match="10 errors"):
        main("--check", tmp_path)
    told = capsys.readouterr().out
    for found in (
        "line 9: no JSON",
        "id 's0' is that of line 1",
        "line 11: problem",
        "no such file",
        "sample s1: bbox is [1, 2, 41, 9]",
        "s3.png (0 bytes)",
        "s4.png",
        "s5.png is 2100 x 10",
        "sample s6: bbox is [[1, 2, 9, 10], [1, 2, 9, 31]]",
        "s7-2.png (0 bytes)",
        "1 questions contain their answer, the first ['s2']",
        "8 of 8 answers are 'red', over 10%",
        "types are 'colour', over 35%",
    ):
        assert found in told


def test_answers_that_do_not_repeat_are_in_balance():
    samples = [sample(n, answer=str(n), extra={"type": str(n)}, question="What?") for n in range(4)]
    assert checking.balance(samples) == []  # each is 25%
