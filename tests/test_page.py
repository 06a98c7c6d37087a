"""The report page: what it shows, what it survives, and that nothing a model wrote can act in
it."""

import base64
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from benchmarks import figures
from benchmarks import page as pages
from benchmarks.rows import Answer
from toy import scenes
from triplets.format import Triplet, read_triplets, write_triplets

ATTACK = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{data}} \u2028 \ud800 &amp;"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
chromium = pytest.mark.skipif(not BROWSER, reason="no Chromium here")


# ------------------------------------------------------------------------------------- fake folders


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def misread(text: str, rng: random.Random) -> str:
    """An answer with one or two of its words wrong."""
    words = text.split()
    places = [(1, list(scenes.COLOURS)), (2, scenes.SHAPES), (4, "0123456789")]
    for n, choices in rng.sample(places, rng.choice([1, 1, 2])):
        words[n] = rng.choice([word for word in choices if word != words[n]])
    return " ".join(words)


def reply(row: Triplet, bench: str, view: str, output: str) -> dict:
    """A line of answers-BENCH-0.jsonl."""
    answer = Answer(
        id=row.id,
        prompt=row.question,
        answer=row.answer,
        kind="exact",
        group=row.extra.get("toy"),
        image=str(row.image),
        crop=row.crop and str(row.crop),
    )
    said = {"tokens": 7, "truncated": False, "seconds": 0.01}
    return answer.line() | said | {"bench": bench, "view": view, "output": output}


def results(folder: Path, answers: list[dict]) -> Path:
    """A results folder as evaluate.py leaves it."""
    for bench in {answer["bench"] for answer in answers}:
        own = [answer for answer in answers if answer["bench"] == bench]
        write(folder / f"answers-{bench}-0.jsonl", own)
    settings = {"model": "runs/toy/base", "weights": "0123456789abcdef"}
    write(folder / "args.json", [settings | {"max_new_tokens": 10, "zoom": 0}])
    figures.summarise(folder, figures.Scorer())
    return folder


def evaluation(folder: Path, rows: list[Triplet], hits: dict, rng: random.Random) -> None:
    """Answers to small targets in both views and to large ones in the full one, right as often as
    `hits` says."""
    answers = []
    for row in rows:
        large = row.extra["toy"] == "large"
        bench = "toy-large" if large else "toy"
        for view in ["full"] if large else ["full", "crop"]:
            right = rng.random() < hits["large" if large else view]
            output = row.answer if right else misread(row.answer, rng)
            answers.append(reply(row, bench, view, output))
    results(folder, answers)


def logged(step: int, steps: int, rng: random.Random) -> dict:
    """A line of log.jsonl, with plausible numbers."""
    fall = math.exp(-5 * step / steps)
    return {
        "step": step,
        "steps": steps,
        "loss": (0.012 + 0.09 * fall) * rng.gauss(1, 0.12),
        "grad_norm": (0.35 + 1.3 * fall) * rng.gauss(1, 0.2),
        "lr": 5e-4 * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
        "length": 7 + 0.15 * fall,
        "eos": 1 - 0.01 * fall,
        "truncated": 0.01 * fall,
        "agreement": 0.985 - 0.16 * fall,
        "tokens": 224,
        "gen_s": 0.09,
        "teach_s": 0.02,
        "learn_s": 0.08,
        "other_s": 0.012,
        "mem_gb": 0.71,
    }


def rollout(step: int, row: Triplet, out: Path, rng: random.Random) -> dict:
    """A line of rollouts.jsonl."""
    words = misread(row.answer, rng).split()
    return {
        "step": step,
        "id": row.id,
        "question": row.question,
        "image": str(row.image.relative_to(out)),
        "crop": str(row.crop.relative_to(out)),
        "answer": row.answer,
        "tokens": [words[0], *(" " + word for word in words[1:]), "<|im_end|>"],
        "divergence": [math.log(2) * rng.random() for _ in words] + [0.0001],
    }


def fake_run(out: Path, steps: int = 200, small: int = 20, large: int = 10) -> Path:
    """A run folder as train.py --toy leaves it: full 52% -> 95%, crop and large kept."""
    rng = random.Random(0)
    sizes = ["small"] * small + ["large"] * large
    drawn = (scenes.scene(0, i, size, "eval") for i, size in enumerate(sizes))
    write_triplets(out / "eval", drawn)
    rows = read_triplets(out / "eval")
    evaluation(out / "eval-before", rows, {"full": 0.52, "crop": 0.99, "large": 1}, rng)
    evaluation(out / "eval-after", rows, {"full": 0.95, "crop": 0.98, "large": 0.99}, rng)
    write(out / "seconds.json", [{"base": 144.2, "distillation": 85.2}])
    settings = {"toy": True, "model": "runs/toy/base", "steps": steps, "lr": 5e-4, "seed": 0}
    method = {"divergence": "jsd", "beta": 0.5, "top_k": 16, "ema_rate": 0.005}
    versions = {"commit": "0123456789abcdef", "versions": {"torch": "2.13.0"}}
    write(out / "args.json", [settings | method | versions])
    write(out / "log.jsonl", [logged(step, steps, rng) for step in range(1, steps + 1)])
    saved = []
    for step in (1, steps // 2, steps):
        saved += [rollout(step, row, out, rng) for row in rng.sample(rows, 5)]
    write(out / "rollouts.jsonl", saved)
    return out


def data_of(page: str) -> dict:
    """The data that a page draws, read as strictly as a browser reads it."""
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
    return json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def build(run: Path) -> tuple[str, dict]:
    """The page's text, and its data."""
    page = pages.write_page(run).read_text()
    return page, data_of(page)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy whose answers name the copy's images."""
    copy = Path(shutil.copytree(finished, tmp_path / "toy"))
    for path in copy.glob("eval-*/answers-*.jsonl"):
        path.write_text(path.read_text().replace(str(finished), str(copy)))
    return copy


def only_a_log(folder: Path, rows: list[dict]) -> Path:
    write(folder / "log.jsonl", rows)
    return folder


def row(name: str, image: Path) -> Triplet:
    return Triplet(name, f"what is on {name} ?", image, None, answer="a red cross")


# ------------------------------------------------------------------------------------ what it shows


def test_a_run_s_page_holds_its_log_its_results_and_its_settings(run):
    _, data = build(run)
    assert data["training"]
    assert data["args"]["ema_rate"] == 0.005
    assert list(data["results"]) == ["before", "after"]
    assert data["results"]["after"] == json.loads((run / "eval-after/result.json").read_text())
    assert data["log"] == read(run / "log.jsonl")
    assert data["seconds"] == {"base": 144.2, "distillation": 85.2}
    assert data["notes"] == []
    saved = [r for r in read(run / "rollouts.jsonl") if r["step"] != 100]
    assert [r["step"] for r in saved] == [1] * 5 + [200] * 5  # the first and the last saved step
    for shown, r in zip(data["rollouts"], saved, strict=True):
        assert (shown["tokens"], shown["divergence"]) == (r["tokens"], r["divergence"])
    rows = data["rollouts"] + data["gallery"]["samples"]
    shown = {r["image"] for r in rows} | {r["crop"] for r in rows if r["crop"]}
    assert shown == set(data["images"])
    assert len(shown) == 60


def test_a_sample_has_its_images_its_question_and_the_answers_of_both_views(run):
    sample = build(run)[1]["gallery"]["samples"][0]
    said = []
    for when in ("before", "after"):
        for a in read(run / f"eval-{when}/answers-toy-0.jsonl"):
            if a["id"] == sample["id"]:
                state = "right" if a["output"] == a["answer"] else "wrong"
                said.append([when, a["view"], a["output"], state])
    (row,) = (r for r in read_triplets(run / "eval") if r.id == sample["id"])
    told = (sample["question"], sample["gold"], sample["bench"])
    assert told == (row.question, row.answer, "toy")
    assert len(said) == 4
    assert sorted(sample["answers"]) == sorted(said)


def test_small_images_stay_exact_and_large_ones_become_a_jpeg_of_at_most_640_px(tmp_path):
    sizes = {}
    for side in (40, 900):
        image = Image.effect_noise((side, side // 2), 60).convert("RGB")
        image.save(tmp_path / "image.png")
        kind, content = pages.pictures(tmp_path, ["image.png"], [])["image.png"].split(";base64,")
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        sizes[kind] = shown.size
        assert side > 40 or shown.tobytes() == image.tobytes()
    assert sizes == {"data:image/png": (40, 20), "data:image/jpeg": (640, 320)}


def test_images_that_do_not_fit_are_counted_not_shown(tmp_path, monkeypatch):
    paths = [f"{n}.png" for n in range(5)]
    for n, path in enumerate(paths):
        Image.effect_noise((100, 100), 10 + n).save(tmp_path / path)
    notes, whole = [], pages.pictures(tmp_path, paths, [])
    monkeypatch.setattr(pages, "IMAGE_BYTES", sum(map(len, whole.values())) - 1)
    uris = pages.pictures(tmp_path, paths, notes)
    assert (
        uris == dict(list(whole.items())[:4]) and len(notes) == 1 and notes[0].startswith("1 image")
    )


def test_the_gallery_takes_flipped_and_wrong_samples_first_when_there_are_too_many(tmp_path):
    folders = {}
    # 0, 1 wrong twice; 2 gained; 11 lost
    for name, marks in (("a", "000111111111"), ("b", "001111111110")):
        said = {"1": "a red cross", "0": "a cat"}
        answers = [
            reply(row(f"{n:02}", tmp_path / "x.png"), "b", "full", said[mark])
            for n, mark in enumerate(marks)
        ]
        folders[name] = results(tmp_path / name, answers)
    order = ["02", "11", "00", "01", "03", "04"]
    for most in (2, 4, 6):
        shown = pages.gallery(tmp_path, folders, most)
        assert [sample["id"] for sample in shown["samples"]] == order[:most]
        assert shown["total"] == 12


def test_an_evaluation_alone_has_a_page_with_its_one_result(run):
    page, data = build(run / "eval-after")
    assert (
        list(data["results"]) == ["eval-after"]
        and not data["training"]
        and data["log"] == data["rollouts"] == []
    )
    assert (
        data["gallery"]["total"] == 30
        and data["notes"] == []
        and "toy-large" in page.split("<noscript>")[1].split("</noscript>")[0]
    )


def test_a_page_made_anew_shows_images_of_any_size(run, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses what has twice as many
    evaluate.main(["--report", str(run)])
    data = data_of((run / "report.html").read_text())
    assert len(data["images"]) == 60
    assert data["notes"] == []


def test_two_evaluations_stand_side_by_side(run):
    both = [str(run / "eval-before"), str(run / "eval-after")]
    evaluate.main(["--compare", *both, "--out", str(run / "both")])
    data = data_of((run / "both/report.html").read_text())
    assert list(data["results"]) == both
    assert list(data["tables"]) == ["difference", *both]
    assert "McNemar" in data["tables"]["difference"]
    write(run / "both/compare.json", [{"folders": both}])  # as it was kept before
    _, data = build(run / "both")
    assert list(data["tables"]) == both
    assert {a[0] for sample in data["gallery"]["samples"] for a in sample["answers"]} == set(both)


# --------------------------------------------------------------------------------- what it survives


def test_nothing_a_model_wrote_can_act_in_the_page(run):
    for path in run.glob("eval-*/answers-*.jsonl"):
        write(path, [a | {"output": ATTACK, "prompt": ATTACK, "group": ATTACK} for a in read(path)])
        figures.summarise(path.parent, figures.Scorer())
    write(
        run / "rollouts.jsonl",
        [
            r
            | {
                "question": ATTACK,
                "answer": ATTACK,
                "tokens": [ATTACK] * 3,
                "divergence": [0.1] * 3,
            }
            for r in read(run / "rollouts.jsonl")
        ],
    )
    (run / "args.json").write_text(json.dumps({ATTACK: ATTACK}))
    page, data = build(run)
    assert "alert(1)</" not in page and "<img" not in page
    assert page.count("<script") == page.count("</script") == 2
    assert (
        data["gallery"]["samples"][0]["answers"][0][2] == data["rollouts"][0]["tokens"][0] == ATTACK
    )
    template = pages.TEMPLATE.read_text()  # markup is made from strings in one place,
    assert (
        template.count("innerHTML") == 1 and "insertAdjacentHTML" not in template
    )  # the curves' numbers


def test_the_page_is_one_file_that_loads_nothing(run):
    page, _ = build(run)
    assert "default-src 'none'" in page
    outside = re.sub(r'"data:image/\w+;base64,[\w+/=]*"', "", page)
    assert not re.search(r"https?://|//cdn|@import|url\(|<link|<iframe|\bfetch\(|\bsrc=", outside)


def test_a_run_with_only_a_log_gives_a_page_that_says_what_is_missing(tmp_path):
    _, data = build(only_a_log(tmp_path / "run", [{"step": 1, "steps": 9, "loss": 0.5}]))
    assert (
        data["results"] == {}
        and data["rollouts"] == []
        and data["gallery"]["samples"] == []
        and data["log"][0]["loss"] == 0.5
    )
    for name in ("args.json", "result.json", "rollouts.jsonl"):
        assert any(f"{name} is not in {tmp_path / 'run'}" in note for note in data["notes"])


def test_lost_images_leave_the_answers_on_the_page(run):
    shutil.rmtree(run / "eval")
    _, data = build(run)
    assert (
        data["images"] == {}
        and len(data["gallery"]["samples"]) == 30
        and len(data["rollouts"]) == 10
    )
    assert any("eval/images" in note for note in data["notes"])


def test_results_without_their_answers_keep_their_figures(run):
    for path in run.glob("eval-*/answers-*.jsonl"):
        path.unlink()
    _, data = build(run)
    assert list(data["results"]) == ["before", "after"]
    assert data["gallery"] == {"total": 0, "samples": []}


def test_a_torn_last_line_is_left_out_and_told(run):
    whole = build(run)[1]
    for name in ("log.jsonl", "eval-after/answers-toy-0.jsonl", "rollouts.jsonl"):
        with open(run / name, "ab") as file:
            file.write(
                '{"step": 201, "loss": 0.0, "text": "caf\u00e9'.encode()[:-1]
            )  # cut within a character
    torn = build(run)[1]
    assert {**torn, "notes": []} == {**whole, "notes": []} and whole["notes"] == []
    assert torn["notes"] == [
        f"{name}: 1 unreadable line left out" for name in ("log.jsonl", "rollouts.jsonl")
    ]


def test_a_loss_that_is_not_a_number_is_a_gap_and_a_step_written_twice_counts_once(tmp_path):
    rows = [
        {"step": 1, "loss": 99.0},
        {"step": 3, "loss": math.inf},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": math.nan},
    ]
    assert [
        (r["step"], r["loss"]) for r in build(only_a_log(tmp_path / "run", rows))[1]["log"]
    ] == [(1, 1.0), (2, None), (3, None)]


def test_the_old_page_stays_when_a_new_one_cannot_be_written(run, monkeypatch):
    old, _ = build(run)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    (run / "args.json").write_text("{}")
    with pytest.raises(OSError, match="disk full"):
        pages.write_page(run)
    assert (run / "report.html").read_text() == old


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_a_folder_that_is_no_run_is_refused_with_what_it_holds(tmp_path, files):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=re.escape(f"({files}; ['result.json is not in ")):
        pages.write_page(tmp_path)


# ------------------------------------------------------------------------------------- in a browser


def dom(page: Path, address: str = "", probe: str = "''") -> str:
    """The document as the page's script has made it, scripts left out; the value of `probe` stands
    at its end."""
    tried = page.with_name("tried.html")
    tried.write_text(
        page.read_text()
        + f"<script>document.body.append('probed ' + JSON.stringify({probe}));</script>"
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=1000",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    text = subprocess.run(
        [BROWSER, *flags, "--dump-dom", tried.as_uri() + address],
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    return re.sub(r"<script.*?</script>", "", text, flags=re.S)


def probed(page: Path, probe: str, address: str = ""):
    return json.loads(
        re.search(r"probed (.*?)</body>", dom(page, address, probe), re.S)[1]
        .replace("&amp;", "&")
        .replace("&gt;", ">")
    )


@chromium
def test_a_browser_draws_every_section_and_shows_markup_as_text(run):
    attack = ATTACK.replace("\ud800", "")  # which --dump-dom itself cannot print
    write(
        run / "rollouts.jsonl",
        [
            r | {"tokens": [attack] * 3, "divergence": [0.1, None, 0.2]}
            for r in read(run / "rollouts.jsonl")
        ],
    )
    for step in (0, 100, 200):
        shutil.copytree(run / "eval-before", run / f"step-{step:06}")
    seen = dom(pages.write_page(run), probe="place('javascript:alert(7)').protocol")
    for title in (
        "Did it learn to see?",
        "The gap over the run",
        "What changed, image by image",
        "Where the teacher disagreed",
        "The run, step by step",
    ):
        assert f"<h2>{title}</h2>" in seen
    assert (
        seen.count("<svg") == 10
        and "NaN" not in seen
        and "undefined" not in seen
        and "No labels, no rewards" in seen
    )
    assert "Nothing was missing or unreadable" in seen  # the script's last line: it ran to its end
    assert (
        "&lt;script&gt;alert(1)" in seen
        and "onerror=alert(2)>" not in seen
        and 'probed "file:"' in seen
    )


@chromium
def test_a_browser_draws_the_page_of_a_run_that_has_only_just_begun(tmp_path):
    seen = dom(
        pages.write_page(only_a_log(tmp_path / "run", [{"step": 1, "steps": 9, "loss": 0.5}]))
    )
    assert seen.count("<svg") == 1 and "1 of 9" in seen
    assert "accuracies before and after, held-out samples, rollouts" in seen


@chromium
def test_a_long_log_is_averaged_and_a_long_rollout_is_cut(tmp_path):
    log = [{"step": step, "loss": float(step % 2)} for step in range(1, 2001)]
    run = only_a_log(tmp_path / "run", log)
    long = {"id": "a", "question": "what ?", "answer": None, "image": "x.png", "crop": "x.png"}
    long |= {"tokens": [" word"] * 1024, "divergence": [math.log(2) / 4] * 1024}
    write(run / "rollouts.jsonl", [long | {"step": step} for step in [1] * 8 + [9] * 8])
    steps, losses, spans, sides = probed(
        pages.write_page(run),
        "[binned(data.log).map(r => r.step), binned(data.log).map(r => r.loss), "
        "document.querySelectorAll('.tokens span').length, "
        "[...document.querySelectorAll('.when')].map(e => e.textContent)]",
    )
    assert steps == list(range(5, 2001, 5))
    assert losses == pytest.approx([0.6, 0.4] * 200)
    assert spans == 2 * 4 * 400
    told = "mean disagreement 25.0%"
    assert sides == [f"Early: step 1{told}", f"Late: step 9{told}"]


@chromium
def test_the_address_chooses_what_the_gallery_shows(run):
    page = pages.write_page(run)
    shown = "[...document.querySelectorAll('.sample small')].map(e => e.textContent)"
    marks = {}
    for when in ("before", "after"):
        for a in read(run / f"eval-{when}/answers-toy-0.jsonl"):
            marks.setdefault((a["view"], a["id"]), set()).add(a["output"] == a["answer"])
    flipped = {sample for (_, sample), seen in marks.items() if len(seen) == 2}
    found = probed(page, shown, "#bench=toy&group=small&state=flipped")
    assert {text.split(" · ")[-1] for text in found} == flipped
    controls = (
        "[...document.querySelectorAll('[aria-pressed=true], select, input')]"
        ".map(e => e.tagName === 'BUTTON' ? e.textContent : e.value)"
    )
    large = read(run / "eval-after/answers-toy-large-0.jsonl")[1]["id"]
    address = f"#bench=toy-large&state=%3Cb%3E&q={large}"
    samples, chosen = probed(page, f"[{shown}, {controls}]", address)
    assert samples == [f"toy-large · large · {large}"]
    assert chosen == ["all1", "toy-large", "", large]


@chromium
def test_two_thousand_photographs_open_at_once_in_less_than_20_mb(tmp_path):
    colours = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    ).resize((2400, 2400), Image.Resampling.BICUBIC)
    scene, rows = Image.blend(colours, Image.effect_noise(colours.size, 60).convert("RGB"), 0.2), []
    for n in range(2000):
        scene.crop((n, n % 999, n + 240, n % 999 + 180)).save(tmp_path / f"{n}.jpg", quality=90)
        rows.append(reply(row(f"{n:04}", tmp_path / f"{n}.jpg"), "photos", "full", "a blue cross"))
    page, start = pages.write_page(results(tmp_path / "run", rows)), time.time()
    cards, images, opened, lead = probed(
        page,
        "[document.querySelectorAll('.sample').length, Object.keys(data.images).length, "
        "performance.now(), document.querySelector('header').textContent]",
    )
    assert (
        page.stat().st_size < 20_000_000
        and images == 2000
        and cards == 60
        and "2,000 answers, greedy" in lead
        and "No labels" not in lead
    )
    assert opened < 5000 and time.time() - start < 15
