"""Answers, accuracies, intervals and the table."""
import json
from pathlib import Path

import pytest

import evaluate
import synth


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four triplets, the last one's target large."""
    return synth.toy(tmp_path_factory.mktemp("toy") / "eval", 4, 0, large_share=0.25, split="eval")


@pytest.fixture(scope="module")
def tiny():
    from model import tiny
    return tiny(seed=0)


def scripted(replies: dict[tuple[str, str], str | None]):
    """Stands in for evaluate.answer: {(id, view): text}, None for an unreadable image."""
    def answer(model, processor, rows, view, *, max_new_tokens, batch):
        texts = [(row["id"], replies[row["id"], view]) for row in rows]
        return [{"id": i, "view": view} | ({"error": "unreadable"} if text is None else {"answer": text, "truncated": False})
                for i, text in texts]
    return answer


def toy_row(name: str, size: str = "small", gold: str = "a red cross ."):
    return {"id": name, "question": "?", "image": None, "crop": None, "answer": gold, "bbox": None, "extra": {"size": size}}


# ---------------------------------------------------------------------------------------------------------------- answers

def test_answers_keep_the_order_of_the_rows_and_do_not_depend_on_the_batch(tiny, folder):
    rows = synth.read_triplets(folder)[:3]
    one, other = (evaluate.answer(*tiny, rows, "full", max_new_tokens=2, batch=batch) for batch in (2, 3))
    assert one == other and [a["id"] for a in one] == [row["id"] for row in rows]
    assert all(a["view"] == "full" and isinstance(a["answer"], str) and a["truncated"] for a in one)


def test_an_unreadable_image_becomes_an_error_row_and_its_neighbours_are_answered(tiny, folder, tmp_path):
    rows = [dict(row) for row in synth.read_triplets(folder)]
    rows[1]["crop"], rows[3]["crop"] = tmp_path / "cut.png", tmp_path / "gone.png"
    rows[1]["crop"].write_bytes(rows[0]["crop"].read_bytes()[:60])
    answers = evaluate.answer(*tiny, rows, "crop", max_new_tokens=2, batch=3)     # the last batch is unreadable as a whole
    assert [sorted(a) for a in answers] == [["answer", "id", "truncated", "view"], ["error", "id", "view"]] * 2
    assert "cut.png" in answers[1]["error"] and "gone.png" in answers[3]["error"]
    assert [a["id"] for a in answers] == [row["id"] for row in rows]


# ---------------------------------------------------------------------------------------------------------------- scoring

@pytest.mark.parametrize("text, correct", [
    ("a red cross .", True), ("  a red\tcross\n.", True), ("a red cross.", False), ("A red cross .", False), ("a red", False), ("", False)])
def test_a_toy_answer_is_right_word_for_word_whatever_the_whitespace(text, correct):
    answers = [{"id": "a", "answer": text}, {"id": "a", "error": "no image"}]
    assert evaluate.accuracy(answers, {"a": "a red cross ."}) == (int(correct), 1) and answers[0]["correct"] is correct


def test_full_and_crop_are_counted_over_the_same_small_rows_and_errors_over_none(monkeypatch):
    right, wrong = "a red cross .", "a red ring ."
    monkeypatch.setattr(evaluate, "answer", scripted({
        ("a", "full"): wrong, ("a", "crop"): right, ("b", "full"): right, ("b", "crop"): right, ("c", "full"): None, ("c", "crop"): right,
        ("d", "full"): right, ("d", "crop"): None, ("e", "full"): wrong, ("e", "crop"): wrong, ("f", "full"): right, ("g", "full"): None}))
    rows = [toy_row(name) for name in "abcde"] + [toy_row(name, "large") for name in "fg"]
    result, answers = evaluate.evaluate_toy(None, None, rows)
    assert result == {"full": 1 / 3, "crop": 2 / 3, "large": 1.0, "n": 3, "n_large": 1,
                      "counts": {"full": 1, "crop": 2, "large": 1, "errors": 3, "truncated": 0}}
    assert len(answers) == 12 and all(("correct" in a) != ("error" in a) for a in answers)


def test_a_world_without_large_targets_has_no_large_accuracy(monkeypatch):
    monkeypatch.setattr(evaluate, "answer", scripted({("a", "full"): "", ("a", "crop"): "a red cross ."}))
    result, _ = evaluate.evaluate_toy(None, None, [toy_row("a")])
    assert result["large"] is None and result["n_large"] == 0 and "no rows" in evaluate.table(result)


@pytest.mark.parametrize("row", [toy_row("a", size="medium"), toy_row("a", gold=None)])
def test_rows_that_are_not_of_the_toy_world_are_refused_with_the_counts(row):
    with pytest.raises(ValueError, match=r"Of 2 rows, .* synth.py --toy"):
        evaluate.evaluate_toy(None, None, [row, toy_row("b")])


# ------------------------------------------------------------------------------------------------------------------ table

@pytest.mark.parametrize("right, n, low, high", [                                 # Newcombe 1998, Table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_intervals_are_those_of_the_literature(right, n, low, high):
    assert evaluate.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluate.wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_an_interval_of_nothing_is_everything():
    assert evaluate.wilson(0, 0) == (0.0, 1.0)


def result(full: int, crop: int, large: int, n: int = 500, n_large: int = 300) -> dict:
    return {"full": full / n, "crop": crop / n, "large": large / n_large, "n": n, "n_large": n_large,
            "counts": {"full": full, "crop": crop, "large": large, "errors": 2, "truncated": 1}}


def test_a_falling_crop_does_not_count_as_a_closed_gap():
    assert evaluate.gap_closed({"before": result(250, 500, 300), "after": result(250, 250, 300)}) == 0
    assert evaluate.gap_closed({"before": result(250, 500, 300), "after": result(375, 375, 300)}) == 0.5
    assert evaluate.gap_closed({"before": result(500, 500, 300), "after": result(500, 500, 300)}) is None
    assert evaluate.gap_closed({"before": result(250, 500, 300)}) is None


def test_the_table_shows_accuracies_intervals_counts_and_the_gap():
    assert evaluate.table({"before": result(261, 498, 300), "after": result(497, 497, 300)}) == """\
accuracy [95% interval]   before                            after
full image, small target   52.2% [ 47.8%,  56.5%] 261/500    99.4% [ 98.3%,  99.8%] 497/500
crop, the same targets     99.6% [ 98.6%,  99.9%] 498/500    99.4% [ 98.3%,  99.8%] 497/500
full image, large target  100.0% [ 98.7%, 100.0%] 300/300   100.0% [ 98.7%, 100.0%] 300/300
gap: crop - full, points    47.4                               0.0
unreadable, left out           2                                 2
cut off, scored as is          1                                 1
gap closed by full         99.6% of what it was before"""


def test_one_result_alone_makes_a_table_of_one_column():
    lines = evaluate.table(result(261, 498, 300)).splitlines()
    assert lines[1] == "full image, small target   52.2% [ 47.8%,  56.5%] 261/500" and "gap closed" not in lines[-1]


# ------------------------------------------------------------------------------------------------------------------- main

def test_the_command_prints_the_table_and_keeps_answers_and_result(folder, tmp_path, monkeypatch, capsys):
    rows = synth.read_triplets(folder)
    monkeypatch.setattr("model.load", lambda path, *, device, dtype: (path, device))
    monkeypatch.setattr(evaluate, "answer", scripted({(row["id"], view): row["answer"] for row in rows for view in ("full", "crop")}))
    evaluate.main(["--bench", "toy", "--model", "m", "--data", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert "full image, small target  100.0% [ 43.9%, 100.0%] 3/3" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/result-toy.json").read_text())["counts"]["full"] == 3
    assert len((tmp_path / "out/answers-toy.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize("argv, message", [
    (["--bench", "vstarr", "--model", "m", "--data", "d"], "--bench vstarr is unknown. Benchmarks: toy"),
    (["--bench", "toy"], "--model and --data are needed"), (["--mod", "m"], "unrecognized arguments: --mod")])
def test_a_wrong_command_line_is_refused_with_what_is_possible(argv, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(argv)
    assert message in capsys.readouterr().err


def test_the_report_needs_neither_torch_nor_transformers(tmp_path):
    import subprocess, sys
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    code = ("import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import evaluate; "
            f"evaluate.main(['--report', {str(tmp_path)!r}])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(evaluate.__file__).parent)
    assert done.stdout.strip() == str(tmp_path / "report.html"), done.stderr
