"""Answers for other tools' scorers, and their predictions scored by ours: the files are what these
tools' own readers take and writers leave (docs/evaluation.md says how that was seen)."""

import base64
import csv
import json

import pytest
from conftest import noise
from test_figures import marks, results

import evaluate
from benchmarks import exchange, sources
from benchmarks.rows import Answer
from launch import script
from storage.files import read_jsonl

TEXTS = ["A", '(B) blue\nas "said"\t', "I see none.", "c", "D. 红"]
GOLDS = ["A", "B", "C", "C", "D"]


@pytest.fixture
def vstar(tmp_path, monkeypatch):
    """A folder with answers to all rows of a small vstar, in both of its ranks' files."""
    monkeypatch.setitem(sources.BENCHES, "vstar", sources.BENCHES["vstar"] | {"rows": 5})
    root = tmp_path / "benchmarks"
    root.mkdir()
    noise(32, 32).save(root / "a.png")
    lines = []
    for n, gold in enumerate(GOLDS):
        prompt = f"question {n} (A) red (B) blue (C) green (D) black"
        lines.append({"id": f"vstar/{n}", "image": "a.png", "prompt": prompt, "answer": gold})
    (root / "vstar.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answers = []
    for n in (4, 2, 0, 1, 3):
        fields = {"image": "a.png", "prompt": lines[n]["prompt"], "answer": GOLDS[n]}
        fields["options"] = {"A": "red", "B": "blue", "C": "green", "D": "black"}
        answers.append(Answer(id=f"vstar/{n}", bench="vstar", output=TEXTS[n], **fields))
        vars(answers[-1]).update(tokens=1, seconds=1.0, truncated=False)
    answers.append(Answer(id="vstar/0", bench="vstar", view="crop", error="no crop", **fields))
    results(tmp_path / "mine", answers)
    return tmp_path / "mine"


def dataset(folder, golds=GOLDS):
    """VLMEvalKit's file of it: its own index, columns that its scorers need, images in base64."""
    folder.mkdir(exist_ok=True)
    with (folder / "VStarBench.tsv").open("w", newline="") as file:
        lines = csv.writer(file, delimiter="\t")
        lines.writerow(["index", "image", "question", "A", "B", "answer", "category"])
        for n, gold in enumerate(golds):
            image = base64.b64encode(b"picture" * 100).decode()
            lines.writerow([100 + n, image, f"question\n{n}", "red", "blue", gold, "attributes"])


def test_lmms_evals_reader_finds_each_rows_answer_under_its_number(vstar):
    evaluate.main(["--rescore", str(vstar), "--export", "lmms-eval"])
    told = json.loads((vstar / "lmms-eval" / "vstar_bench.json").read_text())
    assert told["args"]["limit"] is None
    assert told["model_configs"] == {"task": "vstar_bench"}
    found = {line["doc_id"]: line["resps"][0][0] for line in told["logs"]}
    assert [found[n] for n in range(5)] == TEXTS


def test_vlmevalkits_prediction_file_has_its_own_columns_and_rows(vstar, tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match="VStarBench"):
        exchange.export(vstar, "vlmevalkit")
    dataset(tmp_path / "data")
    exchange.export(vstar, "vlmevalkit")
    (path,) = (vstar / "vlmevalkit").rglob("mine_VStarBench.tsv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["prediction"] for row in rows] == TEXTS
    assert [row["index"] for row in rows] == ["100", "101", "102", "103", "104"]
    assert list(rows[0]) == ["index", "question", "A", "B", "answer", "category", "prediction"]
    dataset(tmp_path / "data", golds=GOLDS[::-1])
    with pytest.raises(ValueError, match="vstar/0"):
        exchange.export(vstar, "vlmevalkit")
    dataset(tmp_path / "data", golds=[*GOLDS, "A"])
    with pytest.raises(ValueError, match="6 rows, for 5"):
        exchange.export(vstar, "vlmevalkit")


def test_what_a_tool_does_not_have_or_is_not_all_answered_is_not_exported(vstar, tmp_path):
    results(tmp_path / "own", marks("11"))
    with pytest.raises(ValueError, match="vstar, hrbench-4k"):
        exchange.export(tmp_path / "own", "lmms-eval")
    (path,) = vstar.glob("answers-*")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "vstar/3" not in line))
    with pytest.raises(ValueError, match="4 of 5"):
        exchange.export(vstar, "lmms-eval")


def lmms_samples(path, golds):
    """As lmms-eval saves them: a filter's result, and the response where it differs from that."""
    lines = []
    for n in (3, 0, 1, 2, 4):
        line = {"doc_id": n, "target": golds[n], "filtered_resps": TEXTS[n].strip()}
        if line["filtered_resps"] != TEXTS[n]:
            line["resps"] = [TEXTS[n]]
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))


def vlmevalkits_tsv(path, golds):
    with path.open("w", newline="") as file:
        lines = csv.writer(file, delimiter="\t")
        lines.writerow(["index", "question", "answer", "prediction"])
        lines.writerows([n + 7, f"question {n}", golds[n], TEXTS[n]] for n in range(5))


def vlmevalkits_json(path, golds):
    rows = [{"index": n, "answer": golds[n], "prediction": TEXTS[n]} for n in range(5)]
    path.write_text(json.dumps(rows))


def vlmevalkits_xlsx(path, golds):
    workbook = pytest.importorskip("openpyxl").Workbook()
    workbook.active.append(["index", "answer", "prediction"])
    for n in range(5):
        workbook.active.append([n, golds[n], TEXTS[n]])
    workbook.save(path)


@pytest.mark.parametrize(
    "name, save",
    [
        ("1_samples_vstar_bench.jsonl", lmms_samples),
        ("m_VStarBench.tsv", vlmevalkits_tsv),
        ("m_VStarBench.json", vlmevalkits_json),
        ("m_VStarBench.xlsx", vlmevalkits_xlsx),
    ],
)
def test_other_tools_predictions_are_scored_as_our_own_answers(name, save, vstar, tmp_path, capsys):
    save(tmp_path / name, [gold.lower() for gold in GOLDS])
    command = f"--bench vstar --data-root {tmp_path}/benchmarks --answers {tmp_path / name}".split()
    evaluate.main([*command, "--out", str(tmp_path / "theirs")])
    (path,) = (tmp_path / "theirs").glob("answers-*")
    said = {line["id"]: line["output"] for line in read_jsonl(path, [])}
    assert said == {f"vstar/{n}": text for n, text in enumerate(TEXTS)}
    evaluate.main(["--rescore", str(tmp_path / "theirs"), "--json"])
    evaluate.main(["--rescore", str(vstar), "--json"])
    *_, theirs, ours = capsys.readouterr().out.splitlines()
    theirs, ours = (json.loads(line)["benches"]["vstar"]["full"] for line in (theirs, ours))
    for key in ("n", "right", "accuracy", "official", "unparsed"):
        assert theirs[key] == ours[key]
    with pytest.raises(ValueError, match="holds answers"):
        evaluate.main([*command, "--out", str(tmp_path / "theirs")])
    save(tmp_path / name, GOLDS[::-1])
    with pytest.raises(ValueError, match="vstar/0"):
        evaluate.main([*command, "--out", str(tmp_path / "other")])
    (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit):
        script.run(evaluate.main, [*command, "--out", str(tmp_path / "other")])


def test_a_few_right_answers_that_a_tool_corrected_are_counted(
    vstar, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(exchange, "CORRECTED", 0.2)
    vlmevalkits_tsv(tmp_path / "m.tsv", ["B", *GOLDS[1:]])
    command = f"--bench vstar --data-root {tmp_path}/benchmarks --answers {tmp_path}/m.tsv".split()
    evaluate.main([*command, "--out", str(tmp_path / "theirs"), "--json"])
    said = capsys.readouterr()
    assert "1 of 5 rows" in said.err
    assert json.loads(said.out)["benches"]["vstar"]["full"]["right"] == 4  # by our right answers


# ---------------------------------------------------------------------------------- results as JSON


def test_stdout_holds_the_results_alone(tmp_path, capsys):
    results(tmp_path / "a", marks("1100"))
    results(tmp_path / "b", marks("1110"))
    capsys.readouterr()
    evaluate.main(["--rescore", str(tmp_path / "a"), "--json"])
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told == {"folder": str(tmp_path / "a")} | told
    assert told["benches"]["mine"]["full"]["accuracy"] == 0.5
    assert "report.html" in said.err
    evaluate.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    found = json.loads(capsys.readouterr().out)["benches"]["mine"]["full"]
    assert (found["n"], found["difference"], found["gained"]) == (4, 0.25, 1)


@pytest.mark.parametrize(
    "flags",
    [
        "--report x --json",
        "--report x --export lmms-eval",
        "--compare x y --export vlmevalkit",
        "--bench vstar --model m --answers f --out o",
        "--bench vstar,mmvp --answers f --out o",
        "--rescore x --answers f",
    ],
)
def test_flags_that_make_no_command_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(flags.split())
    assert capsys.readouterr().out == ""
