"""The report page: what it shows, what it survives, and that nothing a model wrote can act in it."""
import base64
import io
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import synth

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{data}} \u2028 \ud800 &amp;"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


# -------------------------------------------------------------------------------------------------------------- a fake run

def misread(text: str, rng: random.Random) -> str:
    words = text.split()
    for n, choices in rng.sample([(1, list(synth.TOY_COLOURS)), (2, synth.TOY_SHAPES), (4, "0123456789")], rng.choice([1, 1, 2])):
        words[n] = rng.choice([c for c in choices if c != words[n]])
    return " ".join(words)


def fake_run(out: Path, steps: int = 200, small: int = 20, large: int = 10, seed: int = 0) -> Path:
    """A run folder as train.py --toy leaves it, with plausible numbers: full 52% -> 95%, crop and large kept."""
    rng = random.Random(seed)
    synth.toy(out / "eval", small + large, seed, large_share=large / (small + large), split="eval")
    rows, log, saved, result = synth.read_triplets(out / "eval"), [], [], {}
    for when, hit in (("before", {"full": .52, "crop": .99, "large": 1}), ("after", {"full": .95, "crop": .98, "large": .99})):
        answers, counts = [], dict.fromkeys(("full", "crop", "large"), 0)
        for row in rows:
            for view in ("full", "crop") if row["extra"]["size"] == "small" else ("full",):
                name = view if row["extra"]["size"] == "small" else "large"
                correct = rng.random() < hit[name]
                counts[name] += correct
                text = row["answer"] if correct else misread(row["answer"], rng)
                answers.append({"id": row["id"], "view": view, "answer": text, "truncated": False, "correct": correct})
        write(out / f"answers-{when}.jsonl", answers)
        result[when] = {"full": counts["full"] / small, "crop": counts["crop"] / small, "large": counts["large"] / large,
                        "n": small, "n_large": large, "counts": {**counts, "errors": 0, "truncated": 0}}
    (out / "result.json").write_text(json.dumps(result))
    (out / "args.json").write_text(json.dumps({
        "toy": True, "model": "runs/toy/base", "data": "runs/toy/data", "steps": steps, "prompts": 16, "group": 2, "lr": 5e-4,
        "divergence": "jsd", "beta": 0.5, "top_k": 16, "ema_rate": 0.005, "seed": seed, "max_new_tokens": 10,
        "commit": "0123456789abcdef", "versions": {"python": "3.12.4", "torch": "2.13.0", "transformers": "5.23.0"}}))
    for step in range(1, steps + 1):
        fall, noise = math.exp(-5 * step / steps), lambda scale: rng.gauss(1, scale)
        log.append({"step": step, "steps": steps, "loss": (.012 + .09 * fall) * noise(.12), "grad_norm": (.35 + 1.3 * fall) * noise(.2),
                    "lr": 5e-4 * min(1, step / 10) * (.55 + .45 * math.cos(math.pi * step / steps)), "length": 7 + .15 * fall * noise(.6),
                    "eos": 1 - .01 * fall, "truncated": .01 * fall, "agreement": .985 - .16 * fall * noise(.1), "tokens": 224,
                    "gen_s": .09 * noise(.08), "teach_s": .02 * noise(.1), "learn_s": .08 * noise(.06), "other_s": .012 * noise(.2),
                    "mem_gb": .71 + .002 * math.sin(step)})
        for row in rng.sample(rows, 4) if step in (1, steps // 2, steps) else []:
            gold = row["answer"].split()
            words = gold if rng.random() > fall else misread(row["answer"], rng).split()
            off = [rng.uniform(.4, .95) if w != g else rng.random() ** 4 * (.06 + .4 * fall) for w, g in zip(words, gold)]
            saved.append({"step": step, "id": row["id"], "question": row["question"], "image": str(row["image"].relative_to(out)),
                          "crop": str(row["crop"].relative_to(out)), "answer": row["answer"], "tokens": [words[0], *(" " + word for word in words[1:]), "<|im_end|>"],
                          "divergence": [math.log(2) * d for d in off] + [.0001]})
    write(out / "log.jsonl", log)
    write(out / "rollouts.jsonl", saved)
    return out


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def build(run: Path) -> tuple[str, dict]:
    """The page's text, and the data it draws, read as strictly as a browser reads it."""
    page = evaluate.report(run).read_text()
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
    return page, json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "toy")


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "toy"))


def only_a_log(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder / "log.jsonl", rows)
    return folder


# ------------------------------------------------------------------------------------------------------------- what it shows

def test_the_bars_are_the_counts_and_their_wilson_intervals(run):
    result = json.loads((run / "result.json").read_text())
    result["after"] |= {"full": 1 / 29, "n": 29, "counts": result["after"]["counts"] | {"full": 1}}
    (run / "result.json").write_text(json.dumps(result))
    right, n, low, high = build(run)[1]["accuracies"]["after"]["full"]
    assert (right, n) == (1, 29)
    assert (low, high) == pytest.approx((0.0061, 0.1718), abs=5e-5)               # Newcombe 1998, Table I, method 3


def test_samples_are_the_first_of_each_kind_and_every_kind_that_occurs(tmp_path):
    run = only_a_log(tmp_path / "run", [{"step": 1}])
    before, after = [0] * 30 + [1] * 20, [1] * 20 + [0] * 11 + [1] * 19           # 20 gained, 10 still wrong, 1 lost, 19 kept
    for when, marks in (("before", before), ("after", after)):
        write(run / f"answers-{when}.jsonl", [{"id": str(n), "view": "full", "answer": "x", "truncated": False, "correct": bool(mark)}
                                              for n, mark in enumerate(marks)] + [{"id": "broken", "view": "full", "error": "no image"}])
    shown = build(run)[1]["gallery"]
    assert shown["totals"] == {"wrong to right": 20, "right to wrong": 1, "wrong to wrong": 10, "right to right": 19}
    assert [s["id"] for s in shown["samples"]] == ["0", "1", "2", "3", "4", "5", "30", "20", "21"]


def test_a_sample_has_its_images_its_question_and_the_answers_of_both_views(run):
    sample, answers = build(run)[1]["gallery"]["samples"][0], {}
    for when in ("before", "after"):
        answers |= {f"{when}, {a['view']}": [a["answer"], a["correct"]] for a in read(run / f"answers-{when}.jsonl") if a["id"] == sample["id"]}
    row = next(row for row in synth.read_triplets(run / "eval") if row["id"] == sample["id"])
    assert (sample["question"], sample["gold"]) == (row["question"], row["answer"])
    assert sample["answers"] == [[label, *answers[label]] for label in ("before, crop", "before, full", "after, full")]


def test_small_images_stay_exact_and_large_ones_become_a_jpeg_of_at_most_640_px(tmp_path):
    sizes = {}
    for side in (64, 900):
        image = Image.effect_noise((side, side // 2), 60).convert("RGB")
        image.save(tmp_path / "image.png")
        kind, content = evaluate.picture(tmp_path / "image.png", 640, []).split(";base64,")
        shown = Image.open(io.BytesIO(base64.b64decode(content)))
        sizes[kind] = shown.size
        assert side > 64 or shown.tobytes() == image.tobytes()
    assert sizes == {"data:image/png": (64, 32), "data:image/jpeg": (640, 320)}


def test_rollouts_come_from_the_first_and_the_last_saved_step_in_shares_of_log_2(run):
    saved, (early, late) = read(run / "rollouts.jsonl"), build(run)[1]["rollouts"]
    assert (early["step"], late["step"]) == (1, 200)
    assert [text for text, _ in early["cards"][0]["tokens"]] == saved[0]["tokens"]
    assert [share for _, share in early["cards"][0]["tokens"]] == pytest.approx([d / math.log(2) for d in saved[0]["divergence"]], abs=1e-4)
    every = [d for row in saved if row["step"] == 200 for d in row["divergence"]]
    assert late["mean"] == pytest.approx(sum(every) / len(every) / math.log(2))


def test_rollout_images_are_found_from_the_run_and_from_the_working_directory(run, monkeypatch):
    rows = read(run / "rollouts.jsonl")
    for row in rows:
        row |= {key: f"{run.name}/{row[key]}" for key in ("image", "crop")}
    before = build(run)[1]["rollouts"]
    write(run / "rollouts.jsonl", rows)
    monkeypatch.chdir(run.parent)
    assert build(run)[1]["rollouts"] == before and before[0]["cards"][0]["image"].startswith("data:image/png")


def test_a_long_log_is_averaged_and_a_step_written_twice_counts_once(tmp_path):
    rows = [{"step": 1, "loss": 99.0}] + [{"step": step, "loss": float(step % 2)} for step in range(1, 2001)]
    drawn = build(only_a_log(tmp_path / "run", rows))[1]["curves"]
    assert drawn["step"] == list(range(5, 2001, 5))
    assert drawn["loss"] == pytest.approx([0.6, 0.4] * 200)


# ---------------------------------------------------------------------------------------------------------- what it survives

def test_nothing_a_model_wrote_can_act_in_the_page(run):
    for name in ("answers-before.jsonl", "answers-after.jsonl"):
        write(run / name, [a | {"answer": ATTACK} for a in read(run / name)])
    write(run / "rollouts.jsonl", [row | {"question": ATTACK, "answer": ATTACK, "tokens": [ATTACK] * 3, "divergence": [0.1] * 3}
                                   for row in read(run / "rollouts.jsonl")])
    (run / "args.json").write_text(json.dumps({ATTACK: ATTACK}))
    page, data = build(run)
    assert "alert(1)</" not in page and "<img" not in page
    assert page.count("<script") == page.count("</script") == 2
    assert data["gallery"]["samples"][0]["answers"][0][1] == data["rollouts"][0]["cards"][0]["tokens"][0][0] == ATTACK
    template = evaluate.TEMPLATE.read_text()                                      # markup is made from strings in one place,
    assert template.count("innerHTML") == 1 and "insertAdjacentHTML" not in template          # the curves' numbers


def test_the_page_is_one_file_that_loads_nothing(run):
    page, _ = build(run)
    assert "default-src 'none'" in page
    outside = re.sub(r'"data:image/\w+;base64,[\w+/=]*"', "", page)
    assert not re.search(r"https?://|//cdn|@import|url\(|<link|<iframe|\bfetch\(|\bsrc=", outside)


def test_a_run_with_only_a_log_gives_a_page_that_says_what_is_missing(tmp_path):
    page, data = build(only_a_log(tmp_path / "run", [{"step": 1, "steps": 9, "loss": 0.5}]))
    assert data["accuracies"] == {} and data["gap_closed"] is None and data["rollouts"] == [] and data["curves"]["loss"] == [0.5]
    for name in ("args.json", "result.json", "answers-before.jsonl", "answers-after.jsonl", "rollouts.jsonl"):
        assert f"{name} is not in this folder" in data["notes"]
    assert "This run measured no accuracies." in page


def test_lost_images_leave_the_answers_on_the_page(run):
    shutil.rmtree(run / "eval")
    _, data = build(run)
    sample = data["gallery"]["samples"][0]
    assert sample["image"] is None and sample["answers"] and data["rollouts"][0]["cards"][0]["image"] is None
    assert any("eval/images" in note for note in data["notes"]) and any("held-out" in note for note in data["notes"])


def test_a_torn_last_line_is_left_out_and_told(run):
    whole = build(run)[1]
    for name in ("log.jsonl", "answers-after.jsonl", "rollouts.jsonl"):
        with open(run / name, "ab") as file:
            file.write('{"step": 201, "loss": 0.0, "text": "caf\u00e9'.encode()[:-1])          # cut within a character
    torn = build(run)[1]
    assert {**torn, "notes": []} == {**whole, "notes": []} and whole["notes"] == []
    assert torn["notes"] == [f"{name}: 1 unreadable line left out" for name in ("log.jsonl", "answers-after.jsonl", "rollouts.jsonl")]


def test_a_loss_that_is_not_a_number_is_a_gap_in_the_curve(tmp_path):
    run = only_a_log(tmp_path / "run", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}])
    assert build(run)[1]["curves"]["loss"] == [1.0, None, None]


def test_the_page_stays_small_with_many_long_rollouts_and_large_images(tmp_path):
    run = only_a_log(tmp_path / "run", [{"step": step, "loss": 0.1} for step in range(1, 3001)])
    Image.effect_noise((1200, 800), 40).save(run / "image.png")
    row = {"id": "a", "question": "what ?", "image": "image.png", "crop": "image.png", "tokens": [" word"] * 1024, "divergence": [0.123456] * 1024}
    write(run / "rollouts.jsonl", [row | {"step": step} for step in range(1, 50) for _ in range(8)])
    page, data = build(run)
    assert len(page) < 2_500_000
    assert [(len(card["tokens"]), card["left_out"]) for card in data["rollouts"][1]["cards"]] == [(400, 624)] * 4


def test_the_old_page_stays_when_a_new_one_cannot_be_written(run, monkeypatch):
    old, _ = build(run)
    monkeypatch.setattr(evaluate.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    (run / "args.json").write_text("{}")
    with pytest.raises(OSError, match="disk full"):
        evaluate.report(run)
    assert (run / "report.html").read_text() == old


def test_a_folder_that_is_no_run_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no log.jsonl \(found: \['notes.txt'\]\).*Expected the --out folder"):
        evaluate.report(tmp_path)


# --------------------------------------------------------------------------------------------------------------- in a browser

def dom(page: Path) -> str:
    """The document as the page's script has made it, scripts left out."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000", f"--user-data-dir={page.parent / 'profile'}"]
    text = subprocess.run([BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60).stdout
    return re.sub(r"<script.*?</script>", "", text, flags=re.S)


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_a_browser_draws_every_section_and_shows_markup_as_text(run):
    attack = ATTACK.replace("\ud800", "")                                         # which --dump-dom itself cannot print
    write(run / "rollouts.jsonl", [row | {"tokens": [attack] * 3, "divergence": [0.1, None, 0.2]} for row in read(run / "rollouts.jsonl")])
    evaluate.report(run)
    seen = dom(run / "report.html")
    for title in ("Did it learn to see?", "What changed, image by image", "Where the teacher disagreed", "The run, step by step"):
        assert f"<h2>{title}</h2>" in seen
    assert seen.count("<svg") == 8 and "NaN" not in seen and "undefined" not in seen
    assert "Nothing was missing or unreadable" in seen                            # the script's last line: it ran to its end
    assert "&lt;script&gt;alert(1)" in seen and "onerror=alert(2)>" not in seen


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
def test_a_browser_draws_the_page_of_a_run_that_has_only_just_begun(tmp_path):
    evaluate.report(only_a_log(tmp_path / "run", [{"step": 1, "steps": 9, "loss": 0.5}]))
    seen = dom(tmp_path / "run/report.html")
    assert seen.count("<svg") == 1 and "1 of 9" in seen
    assert "accuracies before and after, held-out samples, rollouts" in seen
