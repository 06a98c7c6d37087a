"""The report page: what it shows, what it survives, and that nothing a model wrote can act in
it."""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import noise
from PIL import Image
from test_evaluate import data_of, reply, results

import evaluate
from benchmarks import page as pages
from benchmarks.rows import Answer

ATTACK = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{data}} \u2028 \ud800 &amp;"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
chromium = pytest.mark.skipif(not BROWSER, reason="no Chromium here")
LOGGED = "loss grad_norm lr length eos truncated agreement gen_s teach_s learn_s other_s mem_gb"
LOG = [{"step": step, "steps": 9} | dict.fromkeys(LOGGED.split(), 1 / step) for step in (1, 2, 3)]


# ------------------------------------------------------------------------------------- fake folders


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def toy(n: int, right: bool, view: str = "full") -> Answer:
    """An answer to question n: from the tenth on they are about large targets, without crops."""
    about = {"bench": "toy", "group": "small", "crops": [f"../images/crop{n}.png"]}
    if n >= 10:
        about = {"bench": "toy-large", "group": "large"}
    gold = f"a red {n}"
    said = gold if right else "a blue cat"
    return reply(n, said, gold, "exact", view=view, image=f"../images/{n}.png", **about)


def toy_answers(right: int) -> list[Answer]:
    """So many of ten questions are right in the full view, all in the crop and with large ones."""
    answers = [toy(n, n < right) for n in range(10)]
    answers += [toy(n, True, "crop") for n in range(10)]
    return answers + [toy(n, True) for n in range(10, 15)]


def rollout(step: int, n: int, **more) -> dict:
    """A line of rollouts.jsonl."""
    row = {"step": step, "id": str(n), "question": f"question {n}", "answer": f"a red {n}"}
    row |= {"image": f"images/{n}.png", "crops": [f"images/crop{n}.png"]}
    return row | {"tokens": ["a", " cat", "<|im_end|>"], "divergence": [0.1, None, 0.6]} | more


ROLLOUTS = [rollout(step, n) for step in (1, 2, 3) for n in range(5)]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder as train.py --toy leaves it."""
    out = tmp_path / "toy"
    write(out / "args.json", [{"toy": True, "model": "runs/toy/base", "ema_rate": 0.005}])
    write(out / "seconds.json", [{"base": 144.2}])
    write(out / "log.jsonl", LOG)
    write(out / "rollouts.jsonl", ROLLOUTS)
    for when, right in (("before", 5), ("after", 9)):
        write(out / f"eval-{when}" / "args.json", [{"model": "m", "max_new_tokens": 10}])
        results(out / f"eval-{when}", toy_answers(right))
    (out / "images").mkdir()
    for n in range(15):
        noise(40, 20, n).save(out / f"images/{n}.png")
    for n in range(10):
        noise(20, 20, 99 + n).save(out / f"images/crop{n}.png")
    return out


@pytest.fixture
def begun(tmp_path) -> Path:
    """The folder of a run that has only just begun, with a log as a kill may leave it."""
    losses = ((1, 99.0), (3, math.inf), (1, 1.0), (2, math.nan))
    log = [{"step": step, "steps": 9, "loss": loss} for step, loss in losses]
    write(tmp_path / "begun/log.jsonl", log)
    return tmp_path / "begun"


def build(folder: Path) -> dict:
    return data_of(pages.write_page(folder))


# ------------------------------------------------------------------------------------ what it shows


def test_a_run_s_page_holds_its_log_its_results_and_its_settings(run):
    data = build(run)
    assert list(data["results"]) == ["before", "after"]
    for when, result in data["results"].items():
        assert result == json.loads((run / f"eval-{when}/result.json").read_text())
    first_and_last = [row for row in ROLLOUTS if row["step"] != 2]
    want = {"training": True, "name": "toy", "log": LOG, "rollouts": first_and_last, "notes": []}
    want |= {"seconds": {"base": 144.2}, "total": 15}
    assert data == data | want
    assert data["args"]["ema_rate"] == 0.005
    names = [*range(15), *(f"crop{n}" for n in range(10))]
    assert set(data["images"]) == {f"images/{name}.png" for name in names}


def test_a_checkpoint_has_a_row_a_benchmark_with_its_gap(run):
    folder = (run / "eval-before").rename(run / "step-000100")
    small = {"bench": "toy", "full": 0.5, "crop": 1, "gap": 0.5}
    rows = [small, {"bench": "toy-large", "full": 1}]
    assert list(pages.trajectory(folder)) == [{"step": 100} | row for row in rows]


def test_a_sample_has_its_images_its_question_and_the_answers_of_both_views(run):
    (sample,) = (rows for rows in build(run)["samples"] if rows[0]["id"] == "7")
    about = {"bench": "toy", "group": "small", "prompt": "question 7", "answer": "a red 7"}
    about |= {"image": "images/7.png", "crops": ["images/crop7.png"]}
    assert sample == [row | about for row in sample]
    assert [(row["label"], row["view"], row["output"], row["state"]) for row in sample] == [
        ("before", "full", "a blue cat", "wrong"),
        ("before", "crop", "a red 7", "right"),
        ("after", "full", "a red 7", "right"),
        ("after", "crop", "a red 7", "right"),
    ]


def test_of_a_long_answer_the_beginning_is_shown_and_of_an_error_what_it_is(tmp_path):
    results(tmp_path, [reply(0, "no " * 1000), reply(1, None, error="no image")])
    texts = [sample[0]["output"] for sample in build(tmp_path)["samples"]]
    assert sorted(texts) == ["no image", "no " * 500 + " … 1500 more characters"]


def test_small_images_stay_exact_and_large_ones_become_a_jpeg_of_at_most_640_px(tmp_path):
    sizes = {}
    for side in (40, 900):
        image = noise(side, side // 2)
        image.save(tmp_path / "image.png")
        (uri,) = pages.pictures(tmp_path, [{"image": "image.png", "crops": []}], []).values()
        kind, content = uri.split(";base64,")
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        sizes[kind] = shown.size
        assert side > 40 or shown.tobytes() == image.tobytes()
    assert sizes == {"data:image/png": (40, 20), "data:image/jpeg": (640, 320)}


def test_images_that_do_not_fit_are_counted_not_shown(tmp_path, monkeypatch):
    rows = [{"image": f"{n}.png", "crops": []} for n in range(5)]
    for n, row in enumerate(rows):
        noise(100, 100, n).save(tmp_path / row["image"])
    notes, whole = [], pages.pictures(tmp_path, rows, [])
    monkeypatch.setattr(pages, "IMAGE_BYTES", sum(map(len, whole.values())) - 1)
    assert pages.pictures(tmp_path, rows, notes) == dict(list(whole.items())[:4])
    assert len(notes) == 1
    assert notes[0].startswith("1 image")


def side_by_side(out: Path, *folders: Path) -> list[str]:
    """Compares two evaluations, with a page in `out`; their labels there."""
    labels = list(map(str, folders))
    evaluate.main(["--compare", *labels, "--out", str(out)])
    return labels


def test_flipped_and_wrong_samples_are_taken_first_when_there_are_too_many(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    # 0, 1 wrong twice; 2 gained; 11 lost
    for folder, marks in ((a, "000111111111"), (b, "001111111110")):
        results(folder, [reply(n, "A" if mark == "1" else "B") for n, mark in enumerate(marks)])
    side_by_side(tmp_path / "both", a, b)
    order = ["2", "11", "0", "1", "3", "4"]
    for most in (2, 4, 6):
        monkeypatch.setattr(pages, "MOST_SAMPLES", most)
        data = build(tmp_path / "both")
        assert [sample[0]["id"] for sample in data["samples"]] == order[:most]
        assert data["total"] == 12


def test_an_evaluation_alone_has_a_page_with_its_one_result(run, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses what has twice as many
    evaluate.main(["--report", str(run / "eval-after")])
    page = run / "eval-after/report.html"
    data = data_of(page)
    want = {"training": False, "log": [], "rollouts": [], "notes": [], "total": 15}
    assert data == data | want
    assert list(data["results"]) == ["eval-after"]
    assert len(data["images"]) == 25
    assert "toy-large" in page.read_text().split("<noscript>")[1].split("</noscript>")[0]


def test_two_evaluations_stand_side_by_side(run):
    both = side_by_side(run / "both", run / "eval-before", run / "eval-after")
    data = data_of(run / "both/report.html")
    assert list(data["results"]) == both
    assert list(data["tables"]) == ["difference", *both]
    assert "McNemar" in data["tables"]["difference"]
    write(run / "both/compare.json", [{"folders": both}])  # as it was kept before
    data = build(run / "both")
    assert list(data["results"]) == both
    assert {row["label"] for sample in data["samples"] for row in sample} == set(both)


# --------------------------------------------------------------------------------- what it survives


def attacked(run: Path, text: str) -> Path:
    """The page of a run whose model, questions and settings say `text`."""
    answer = toy(0, False)
    vars(answer).update(output=text, prompt=text, group=text, answer=text, bench="<script>")
    results(run / "eval-after", [answer])
    said = rollout(1, 0, question=text, answer=text, tokens=[text] * 3)
    write(run / "rollouts.jsonl", [said, said | {"step": 3}])
    write(run / "args.json", [{text: text}])
    return pages.write_page(run)


def test_nothing_a_model_wrote_can_act_in_the_page(run):
    page = attacked(run, ATTACK)
    data, text = data_of(page), page.read_text()
    assert "alert(1)</" not in text
    assert "<img" not in text
    assert text.count("<script") == text.count("</script") == 2
    said = [row["output"] for sample in data["samples"] for row in sample if row["group"] == ATTACK]
    assert said == [data["rollouts"][0]["tokens"][0]] == [ATTACK]
    # markup is made from strings in one place, the curves' numbers
    template = pages.TEMPLATE.read_text()
    assert template.count("innerHTML") == 1
    assert "insertAdjacentHTML" not in template
    # and nothing is loaded
    assert "default-src 'none'" in text
    outside = re.sub(r'"data:image/\w+;base64,[\w+/=]*"', "", text.replace("src=x", ""))
    assert not re.search(r"https?://|//cdn|@import|url\(|<link|<iframe|\bfetch\(|\bsrc=", outside)


def test_a_run_with_only_a_log_gives_a_page_that_says_what_is_missing(begun):
    data = build(begun)
    assert data == data | {"results": {}, "rollouts": [], "samples": [], "images": {}}
    missing = ["eval-before/result.json", "eval-after/result.json", "rollouts.jsonl", "args.json"]
    paths = [begun / path for path in missing]
    assert data["notes"] == [f"{path.name} is not in {path.parent}" for path in paths]


def test_lost_images_leave_the_answers_on_the_page(run):
    shutil.rmtree(run / "images")
    data = build(run)
    assert (data["images"], data["total"], len(data["rollouts"])) == ({}, 15, 10)
    assert len(data["notes"]) == 25
    assert "images/0.png" in data["notes"][0]


def test_results_without_their_answers_keep_their_figures(run):
    for path in run.glob("eval-*/answers-*.jsonl"):
        path.unlink()
    data = build(run)
    assert list(data["results"]) == ["before", "after"]
    assert (data["total"], data["samples"]) == (0, [])


def test_a_torn_last_line_is_left_out_and_told(run):
    whole = build(run)
    for name in ("log.jsonl", "eval-after/answers-mine-0.jsonl", "rollouts.jsonl"):
        with open(run / name, "ab") as file:  # cut within a character
            file.write('\n{"step": 201, "loss": 0.0, "text": "caf\u00e9'.encode()[:-1])
    names = ("rollouts.jsonl", "log.jsonl")
    notes = [f"{name}: 1 unreadable line left out" for name in names]
    assert build(run) == whole | {"notes": notes}


def test_the_old_page_stays_when_a_new_one_cannot_be_written(run, monkeypatch):
    page = pages.write_page(run)
    old = page.read_text()
    (run / "args.json").write_text("{}")
    monkeypatch.delattr(os, "replace")
    with pytest.raises(AttributeError):
        pages.write_page(run)
    assert page.read_text() == old


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=f"result.json is not in {folder}"):
            pages.write_page(folder)


# ------------------------------------------------------------------------------------- in a browser


def probed(page: Path, probe: str, address: str = "") -> tuple[str, list]:
    """The document as the page's script has made it, scripts left out; and the value of `probe`
    there."""
    tried = page.with_name("tried.html")
    script = (
        f"document.body.append('probed ' + JSON.stringify({probe}));"
        "document.querySelectorAll('script').forEach(each => each.remove());"
    )
    tried.write_text(f"{page.read_text()}<script>{script}</script>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000"]
    flags += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom"]
    command = [BROWSER, *flags, tried.as_uri() + address]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    value = re.search(r"probed (.*?)</body>", seen, re.S)[1]
    return seen, json.loads(value.replace("&amp;", "&").replace("&gt;", ">"))


@chromium
def test_a_browser_draws_every_section_and_shows_markup_as_text(run):
    for step in (0, 100, 200):
        shutil.copytree(run / "eval-before", run / f"step-{step:06}")
    page = attacked(run, ATTACK.replace("\ud800", ""))  # which --dump-dom itself cannot print
    seen, protocol = probed(page, "place('javascript:alert(7)').protocol")
    for title in (
        "Did it learn to see?",
        "The gap over the run",
        "What changed, image by image",
        "Where the teacher disagreed",
        "The run, step by step",
    ):
        assert f"<h2>{title}</h2>" in seen
    assert seen.count("<svg") == 10
    assert "No labels, no rewards" in seen
    assert "Nothing was missing or unreadable" in seen  # the script's last line: it ran to its end
    assert "&lt;script&gt;alert(1)" in seen
    for text in ("NaN", "undefined", "onerror=alert(2)>"):
        assert text not in seen
    assert protocol == "file:"


@chromium
def test_what_tokens_count_and_how_far_a_target_moved_are_further_shades(run):
    said = ROLLOUTS[0] | {"weights": [2.0, 0.5, 0.5], "moved": [0.0, 0.25, 1.0]}
    write(run / "rollouts.jsonl", [said])
    seen, titles = probed(
        pages.write_page(run), "[...document.querySelectorAll('.tokens span')].map(e => e.title)"
    )
    assert seen.count("how much each word counts") == 1
    assert "counts 2.00 times as much as the mean token" in titles
    assert "the extra view moved 25.0% of the teacher's pull here" in titles


@chromium
def test_a_loss_that_is_not_a_number_is_a_gap_and_a_step_written_twice_counts_once(begun):
    seen, losses = probed(pages.write_page(begun), "data.log.map(row => [row.step, row.loss])")
    assert losses == [[1, 1.0], [2, None], [3, None]]
    assert seen.count("<svg") == 1
    assert "3 of 9" in seen
    assert "accuracies before and after, held-out samples, rollouts" in seen


@chromium
def test_a_long_log_is_averaged_and_a_long_rollout_is_cut(tmp_path):
    write(tmp_path / "log.jsonl", [{"step": n, "loss": float(n % 2)} for n in range(1, 2001)])
    long = {"tokens": [" word"] * 1024, "divergence": [math.log(2) / 4] * 1024}
    write(tmp_path / "rollouts.jsonl", [rollout(n, 0, **long) for n in [1] * 8 + [9] * 8])
    _, (rows, spans, sides) = probed(
        pages.write_page(tmp_path),
        "[binned(data.log), document.querySelectorAll('.tokens span').length, "
        "[...document.querySelectorAll('.when')].map(e => e.textContent)]",
    )
    assert [row["step"] for row in rows] == list(range(5, 2001, 5))
    assert [row["loss"] for row in rows] == pytest.approx([0.6, 0.4] * 200)
    assert spans == 2 * 4 * 400
    told = "mean disagreement 25.0%"
    assert sides == [f"Early: step 1{told}", f"Late: step 9{told}"]


@chromium
def test_the_address_chooses_what_the_gallery_shows(run):
    shown = "[...document.querySelectorAll('.sample small')].map(e => e.textContent)"
    controls = (
        "[...document.querySelectorAll('[aria-pressed=true], select, input')]"
        ".map(e => e.tagName === 'BUTTON' ? e.textContent : e.value)"
    )
    other = "location.hash = 'bench=toy-large&state=%3Cb%3E&q=13'"
    read = "dispatchEvent(new Event('hashchange'))"
    _, (flipped, *_, samples, chosen) = probed(
        pages.write_page(run), f"[{shown}, {other}, {read}, {shown}, {controls}]", "#state=flipped"
    )
    assert flipped == [f"toy · small · {n}" for n in range(5, 9)]
    assert samples == ["toy-large · large · 13"]
    assert chosen == ["all1", "toy-large", "", "13"]


@chromium
def test_two_thousand_photographs_open_at_once_in_less_than_20_mb(tmp_path):
    colours = noise(20, 20).resize((600, 600), Image.Resampling.BICUBIC)
    scene = Image.blend(colours, noise(600, 600), 0.2)
    answers = []
    for n in range(2000):
        x, y = n % 440, n % 480
        scene.crop((x, y, x + 160, y + 120)).save(tmp_path / f"{n}.jpg", quality=90)
        answers.append(reply(n, "a", bench="photos", image=f"../{n}.jpg"))
    results(tmp_path / "run", answers)
    page = pages.write_page(tmp_path / "run")
    seen, (cards, images, opened) = probed(
        page,
        "[document.querySelectorAll('.sample').length, Object.keys(data.images).length, "
        "performance.now()]",
    )
    assert (cards, images) == (60, 2000)
    assert "2,000 answers" in seen
    assert "No labels" not in seen
    assert page.stat().st_size < 20_000_000
    assert opened < 5000
