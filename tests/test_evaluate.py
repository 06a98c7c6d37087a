"""Answering, the judge and the command line: a run against itself interrupted, split and rescored.

Most runs are of a scripted model, {question: what it says}; the others are of the tiny one, in
processes of their own where that matters.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, livelier, noise

import benchmarks.figures as figures
import benchmarks.judge as judging
import benchmarks.page as pages
import benchmarks.scoring as scoring
import benchmarks.sources as sources
import benchmarks.zoom as zoom
import evaluate
import model as vision_model
import rollout
import storage.images as images
import toy.tiny as tiny_model
from benchmarks.rows import Scored, read_answer

COLOURS = {"A": "red", "B": "blue", "C": "green", "D": "white"}
ROWS = [
    {"answer": "A"},
    {"answer": "B"},
    {"answer": "yes", "kind": "yn"},
    {"answer": "no", "kind": "yn"},
    {"answer": "7 km", "kind": "free"},
    {"answer": "12", "kind": "free"},
    {"answer": "C"},
]
REPLIES = [
    "A",
    "The answer is (C).",
    "Yes.",
    "I cannot tell",
    "7 km",
    "About a dozen",
    "C. green",
]  # of ROWS: right, wrong, right, unparsed ..


# ----------------------------------------------------------------------------------------- helpers


def own(folder: Path, rows: list[dict] = ROWS, name: str = "mine", crops: bool = True) -> Path:
    """A benchmark of one's own: question n is asked about an image, and maybe a crop, that no
    other row has."""
    folder.mkdir(parents=True, exist_ok=True)
    filled = []
    for n, row in enumerate(rows):
        files = (
            {"image": f"{name}{n}.png", "crop": f"{name}{n}-crop.png"}
            if crops
            else {"image": f"{name}{n}.png"}
        )
        for seed, file in enumerate(files.values(), 2 * n):
            noise(32, 48, seed).save(folder / file)
        filled.append(
            {"prompt": f"question {n}", "options": COLOURS if row.get("kind", "mc") == "mc" else {}}
            | files
            | row
        )
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in filled))
    return folder / f"{name}.jsonl"


def line(
    n,
    output: str,
    answer: str = "A",
    kind: str = "mc",
    bench: str = "mine",
    view: str = "full",
    **more,
) -> dict:
    """A line of answers-BENCH-RANK.jsonl."""
    return {
        "id": str(n),
        "prompt": f"question {n}",
        "answer": answer,
        "kind": kind,
        "options": COLOURS if kind == "mc" else {},
        "group": None,
        "pair": None,
        "image": f"{n}.png",
        "crop": None,
        "bench": bench,
        "view": view,
        "output": output,
        "tokens": 4,
        "truncated": False,
        "seconds": 0.5,
    } | more


def scored(lines: list[dict]) -> list[Scored]:
    return [scoring.score(read_answer(each)) for each in lines]


def results(folder: Path, answers: list[dict], **how) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answers-mine-0.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    figures.summarise(folder, figures.Scorer(**how))
    return folder


def outcome(out: Path) -> tuple[dict, dict]:
    """The answers and the figures in a results folder, without what differs from run to run."""

    def timeless(value):
        return (
            {key: timeless(v) for key, v in value.items() if key != "seconds"}
            if isinstance(value, dict)
            else value
        )

    return {a.place(): (a.output, a.tokens) for a in figures.saved_answers(out)}, timeless(
        figures.summarise(out, figures.Scorer())["benches"]
    )


@pytest.fixture
def model(monkeypatch):
    """A model that says REPLIES[n] to question n (model.says changes that), and model.asked: the
    questions of every batch."""

    class Scripted(torch.nn.Linear):
        asked, says, before = [], dict(enumerate(REPLIES)), staticmethod(lambda prompts: None)

    def answers(_, processor, images, prompts, max_new_tokens):
        assert len(images) == len(prompts) > 0
        Scripted.before(prompts)
        Scripted.asked.append(prompts)
        return [
            rollout.Reply(text, len(text), len(text) > 12)
            for text in (Scripted.says[int(p.split()[-1])] for p in prompts)
        ]

    monkeypatch.setattr("rollout.answers", answers)
    monkeypatch.setattr(
        "model.load",
        lambda path, *, device, dtype: (torch.nn.Linear(1, 1).requires_grad_(False), None),
    )
    return Scripted


def answer(path: Path, out: Path, batch: int = 2, **more) -> None:
    out.mkdir(parents=True, exist_ok=True)
    how = evaluate.Asking(["full", "crop"], 9, batch, **more)
    evaluate.answer_all(None, None, "mine", sources.read_benchmark(str(path), path), out, how)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    tiny, processor = tiny_model.tiny(0)
    vision_model.save(livelier(tiny), processor, folder := tmp_path_factory.mktemp("tiny") / "base")
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory, checkpoint) -> tuple[list[str], Path]:
    """Flags of an evaluation of the tiny model in both views, but for --out; and its results."""
    folder = tmp_path_factory.mktemp("straight")
    flags = [
        "--bench",
        str(own(folder, ROWS * 2)),
        "--model",
        str(checkpoint),
        "--view",
        "both",
        "--max-new-tokens",
        "24",
        "--batch",
        "1",
        "--device",
        "cpu",
    ]
    evaluate.main([*flags, "--out", str(folder / "out")])
    return flags, folder / "out"


def python(*flags) -> dict:
    return {
        "args": [sys.executable, *map(str, flags)],
        "cwd": ROOT,
        "env": os.environ | {"OMP_NUM_THREADS": "1"},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def lines_of(out: Path) -> list[bytes]:
    return [
        line
        for path in out.glob("answers-*.jsonl")
        for line in path.read_bytes().splitlines(keepends=True)
    ]


# --------------------------------------------------------------------------------------- answering


def test_every_batch_is_on_disk_before_the_next_is_asked(model, tmp_path):
    on_disk, model.before = (
        [],
        lambda prompts: on_disk.append(
            len([row for row in lines_of(tmp_path / "out") if row.endswith(b"}\n")])
        ),
    )
    answer(own(tmp_path), tmp_path / "out", batch=3)
    assert on_disk == [0, 3, 6, 9, 12] and [len(prompts) for prompts in model.asked] == [
        3,
        3,
        3,
        3,
        2,
    ]


@pytest.mark.parametrize("call", range(7))
def test_a_run_that_breaks_off_goes_on_to_the_figures_of_a_straight_one(call, model, tmp_path):
    path, out = own(tmp_path), tmp_path / "out"
    answer(path, tmp_path / "straight")
    model.asked.clear()

    model.before = lambda prompts: 1 / (len(model.asked) - call)
    with pytest.raises(ZeroDivisionError):
        answer(path, out)
    file = out / "answers-mine-0.jsonl"
    file.write_bytes(file.read_bytes()[:-30])  # the last line is torn
    model.before = lambda prompts: None
    answer(path, out, batch=5)
    assert outcome(out) == outcome(tmp_path / "straight")
    assert sum(map(len, model.asked)) == 14 + (call > 0)  # only the torn line's row was asked again
    answer(path, out)
    assert sum(map(len, model.asked)) == 14 + (call > 0)


@pytest.mark.parametrize(
    "runs", [[(0, 2), (1, 2)], [(1, 2), (0, 1)], [(0, 3), (2, 3), (1, 2), (0, 2)]]
)  # rank, world
def test_ranks_share_the_rows_and_may_be_others_when_a_run_goes_on(runs, model, tmp_path):
    path, out = own(tmp_path), tmp_path / "out"
    answer(path, tmp_path / "straight")
    model.asked.clear()
    for rank, world in runs:
        answer(path, out, rank=rank, world=world)
    assert (
        outcome(out) == outcome(tmp_path / "straight")
        and sum(map(len, model.asked)) == len(lines_of(out)) == 14
    )


def test_a_process_killed_at_work_goes_on_to_the_answers_of_a_straight_one(straight, tmp_path):
    flags, wanted = straight
    with subprocess.Popen(**python("evaluate.py", *flags, "--out", tmp_path)) as process:
        while len(lines_of(tmp_path)) < 4 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and 4 <= len(lines_of(tmp_path)) < 28
    evaluate.main([*flags, "--out", str(tmp_path)])
    assert outcome(tmp_path) == outcome(wanted) and len(lines_of(tmp_path)) == 28


def test_two_processes_give_the_answers_of_one(straight, tmp_path):
    flags, wanted = straight
    done = subprocess.run(
        **python(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            2,
            "evaluate.py",
            *flags,
            "--out",
            tmp_path,
        )
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy [95% interval]") == 1 and (tmp_path / "report.html").exists()
    assert outcome(tmp_path) == outcome(wanted) and sorted(
        p.name for p in tmp_path.glob("answers-*")
    ) == ["answers-mine-0.jsonl", "answers-mine-1.jsonl"]
    assert (
        len({text for text, _ in outcome(wanted)[0].values()}) > 7
    )  # a model that says many things


def test_rows_that_cannot_be_asked_are_errors_that_the_next_run_tries_again(
    model, tmp_path, capsys
):
    path, out, image = own(tmp_path), tmp_path / "out", tmp_path / "mine3.png"
    answer(path, tmp_path / "straight")
    model.asked.clear()

    def memory(prompts):
        if len(prompts) > 2 or "question 5" in prompts:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.before, whole = memory, image.read_bytes()
    image.write_bytes(whole[:60])
    answer(path, out, batch=9)
    assert max(
        map(len, model.asked)
    ) == 2 and "out of memory with 4 at once, going on with 2" in "".join(capsys.readouterr())
    answers, found = outcome(out)
    assert [(f["n"], f.get("errors")) for f in found["mine"].values()] == [
        (5, 2),
        (6, 1),
        (5, None),
    ]  # full, crop, gap
    cut, large, _ = [a.error for a in figures.saved_answers(out) if a.error]
    assert "mine3.png" in cut and "OutOfMemoryError with this row alone" in large
    model.before = lambda prompts: None
    model.asked.clear()
    image.write_bytes(whole)
    answer(path, out, batch=9)
    assert model.asked == [["question 3", "question 5", "question 5"]] and outcome(out) == outcome(
        tmp_path / "straight"
    )


def test_a_row_that_cannot_be_encoded_is_an_error_of_its_row(checkpoint, tmp_path):
    path = own(tmp_path, ROWS[:2], crops=False)
    noise(4, 900).save(tmp_path / "mine1.png")  # over 200 times as high as wide
    run("--bench", path, "--model", checkpoint, "--max-new-tokens", 2, "--out", tmp_path / "out")
    assert outcome(tmp_path / "out")[1]["mine"]["full"]["errors"] == 1


def test_other_questions_under_the_same_ids_are_refused(model, tmp_path):
    answer(own(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="holds mine with other questions .* under the ids .*'1'"):
        answer(
            own(tmp_path, [*ROWS[:1], {"answer": "B", "prompt": "another 1"}, *ROWS[2:]]),
            tmp_path / "out",
        )


# ----------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    "kind, gold, output, ours, yes, no, official",
    [  # states: alone, and with each verdict of the judge
        ("mc", "C", "C. green", "right", "right", "right", ["right"] * 3),
        (
            "mc",
            "C",
            "Answer: C",
            "right",
            "right",
            "right",
            ["wrong", "right", "wrong"],
        ),  # "first capital letter": an A
        ("mc", "C", "(B)", "wrong", "wrong", "wrong", ["wrong", "right", "wrong"]),
        ("mc", "C", "hm", "unparsed", "right", "wrong", ["unparsed", "right", "wrong"]),
        ("yn", "no", "No.", "right", "right", "right", ["right"] * 3),
        ("yn", "no", "yes", "wrong", "wrong", "wrong", ["wrong", "right", "wrong"]),
        ("yn", "no", "Perhaps", "unparsed", "right", "wrong", ["unparsed", "right", "wrong"]),
        ("free", "7 km", "7 km", "right", "right", "right", ["right"] * 3),
        ("free", "12", "13", "wrong", "wrong", "wrong", ["wrong", "right", "wrong"]),
        ("free", "red", "crimson", "unparsed", "right", "wrong", ["unparsed", "right", "wrong"]),
        ("exact", "a red cross .", " a  red cross .", "right", "right", "right", ["right"] * 3),
        (
            "exact",
            "a red cross .",
            "a red cross",
            "wrong",
            "wrong",
            "wrong",
            ["wrong", "right", "wrong"],
        ),
    ],
)
def test_a_verdict_counts_only_where_the_scorer_is_undecided(
    kind, gold, output, ours, yes, no, official
):
    for scorer, states in (("ours", [ours, yes, no]), ("official", official)):
        marks = [
            scoring.score(read_answer(line(0, output, gold, kind)), verdict, scorer)
            for verdict in (None, True, False)
        ]
        assert [mark.state for mark in marks] == states
        assert [mark.correct for mark in marks] == [state == "right" for state in states]
        assert [mark.judged for mark in marks] == [False, marks[0].undecided, marks[0].undecided]
    unread = line(0, output, gold, kind) | {"error": "no image"}
    assert scoring.score(read_answer(unread), True).state == "error"


@pytest.fixture
def judge(monkeypatch):
    """An OpenAI-compatible server: judge.says maps a response to what is replied, one a call; an
    int is an HTTP status, bytes are sent as they are. judge.requests: (path, key, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Handler.requests.append((self.path, self.headers.get("Authorization"), body))
            said = Handler.says[
                re.search("Response: (.*)\nReply", body["messages"][0]["content"])[1]
            ]
            reply = said.pop(0) if isinstance(said, list) else said
            content = (
                reply
                if isinstance(reply, bytes)
                else json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            )
            self.send_response(reply if isinstance(reply, int) else 200)
            self.send_header("Content-Length", str(len(content) + 9 * (reply == b"cut off")))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): ...

    Handler.requests, Handler.says = [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.url = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setattr(judging.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    yield Handler
    server.shutdown()
    server.server_close()


FREE = [
    line(0, "red", "red", "free"),
    line(1, "crimson", "red", "free"),
    line(2, "of some colour", "red", "free"),
    line(3, "hm"),
    line(4, "B"),
    line(5, "", error="no image"),
    line(1, "crimson", "red", "free", view="crop"),
]


def test_the_judge_is_asked_once_and_only_about_what_is_undecided(judge, tmp_path, capsys):
    judge.says = {
        "crimson": "<think>No? It is a red.</think>\nYes",
        "of some colour": "No.",
        "hm": "**no**",
    }
    results(tmp_path, FREE, judge=judge.url, judge_model="big")
    prompts = [body["messages"][0]["content"] for _, _, body in judge.requests]
    assert sorted(re.search("Response: (.*)\nReply", prompt)[1] for prompt in prompts) == [
        "crimson",
        "hm",
        "of some colour",
    ]
    assert "Question: question 1\nAnswer: red\n" in "".join(prompts)
    assert all(
        (path, key, body["model"], body["temperature"])
        == ("/v1/chat/completions", "Bearer sk-very-secret", "big", 0)
        for path, key, body in judge.requests
    )
    for _judged in range(3):  # from the second time on, from verdicts.jsonl
        views = json.loads((tmp_path / "result.json").read_text())["benches"]["mine"]
        assert (
            views["full"]
            == views["full"] | {"n": 5, "right": 2, "judged": 3, "unparsed": 0, "errors": 1}
            and views["crop"]["right"] == 1
        )
        evaluate.main(["--rescore", str(tmp_path), "--judge", judge.url, "--judge-model", "big"])
    assert len(judge.requests) == 3
    assert "sk-very" not in "".join(capsys.readouterr()) and not any(
        b"sk-very" in path.read_bytes() for path in tmp_path.iterdir()
    )
    figures.summarise(
        tmp_path, figures.Scorer(judge=judge.url, judge_model="other")
    )  # another judge has verdicts of its own
    assert len(judge.requests) == 6


def test_a_call_that_fails_is_tried_again_then_counted_then_asked_next_time(
    judge, tmp_path, capsys
):
    judge.says = {
        "crimson": [500, b"{}", "Yes"],
        "of some colour": [b"<html>", b'{"choices": []}', 503, "Yes, it does"],
        "hm": ["hm", "Yes"],
    }
    result = json.loads((results(tmp_path, FREE, judge=judge.url) / "result.json").read_text())
    assert (
        result["judge_failures"] == 2
        and result["benches"]["mine"]["full"]["right"] == 2
        and len(judge.requests) == 7
    )
    assert "2 calls of the judge failed: scored as wrong" in figures.table(result)
    assert (
        "no verdict on mine 2" in (printed := "".join(capsys.readouterr()))
        and "no verdict on mine 3: 'hm'" in printed
    )
    again = figures.summarise(tmp_path, figures.Scorer(judge=judge.url))
    assert (
        again["judge_failures"] == 0
        and again["benches"]["mine"]["full"]["right"] == 4
        and len(judge.requests) == 9
    )


def test_a_connection_that_is_cut_is_a_failed_call_too(judge, tmp_path):
    judge.says = {"hm": b"cut off"}
    assert (
        json.loads(
            (results(tmp_path, [line(3, "hm")], judge=judge.url) / "result.json").read_text()
        )["judge_failures"]
        == 1
    )


def test_a_verdict_torn_by_a_kill_is_asked_again_once(judge, tmp_path):
    judge.says = dict.fromkeys(["crimson", "of some colour", "hm"], "Yes")
    file = results(tmp_path, FREE, judge=judge.url) / "verdicts.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    for _ in range(2):
        figures.summarise(tmp_path, figures.Scorer(judge=judge.url))
    assert len(judge.requests) == 4


def test_the_official_scorer_leaves_all_its_misses_to_the_judge_and_none_of_its_mistakes(
    judge, tmp_path
):
    judge.says = {"Answer: C": "Yes", "(B)": "No"}
    answers = [line(0, "Answer: C", "C"), line(1, "(B)"), line(2, "Answer: C", "A"), line(3, "(A)")]
    full = json.loads(
        (results(tmp_path, answers, scorer="official", judge=judge.url) / "result.json").read_text()
    )["benches"]["mine"]["full"]
    assert len(judge.requests) == 2 and (full["right"], full["judged"], full["official"]) == (
        3,
        2,
        0.5,
    )


def test_a_local_language_model_can_be_the_judge(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_model.tiny()[1].tokenizer
    judge = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():  # a layer that adds nothing; each token calls for the next:
        (
            judge.model.layers[0].self_attn.o_proj.weight.zero_(),
            judge.model.layers[0].mlp.down_proj.weight.zero_(),
        )
        chain = tokenizer.convert_tokens_to_ids(["\u010a", "Y", "e", "s"]) + [
            tokenizer.eos_token_id
        ]  # the newline that ends the prompt, Y ..
        judge.lm_head.weight.zero_()[chain[1:]] = torch.nn.functional.normalize(
            judge.model.embed_tokens.weight[chain[:-1]]
        )
    judge.save_pretrained(tmp_path / "judge"), tokenizer.save_pretrained(tmp_path / "judge")
    assert (
        list(judging.ask_judge(str(tmp_path / "judge"), None, ["red ?", "a blue cross ?"]))
        == ["Yes<|im_end|>"] * 2
    )
    results(tmp_path / "out", FREE, judge=str(tmp_path / "judge"))
    assert (
        json.loads((tmp_path / "out/result.json").read_text())["benches"]["mine"]["full"]["right"]
        == 4
    )


def test_the_judge_is_not_asked_about_nothing(judge, tmp_path):
    judge.says = {"": "Yes"}
    results(
        tmp_path,
        [line(0, ""), line(1, "  "), line(2, "<think>Maybe A, or B"), line(3, "<think>A?</think>")],
        judge=judge.url,
    )
    found = json.loads((tmp_path / "result.json").read_text())["benches"]["mine"]["full"]
    assert judge.requests == [] and (found["right"], found["unparsed"]) == (0, 4)


@pytest.mark.parametrize("command", ["--rescore", "--report", "--compare"])
def test_neither_torch_nor_transformers_nor_images_are_needed_to_score_again_and_report(
    command, tmp_path
):
    results(tmp_path, [line(0, "Answer: C", "C"), line(1, "(A)")])
    if command == "--rescore":
        (tmp_path / "result.json").write_text("{}")
    flags = [
        command,
        *[str(tmp_path)] * (1 + (command == "--compare")),
        *["--out", str(tmp_path)] * (command == "--compare"),
    ]
    absent = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None"
    code = f"{absent}; import evaluate; evaluate.main({flags})"
    done = subprocess.run(**python("-c", code))
    if command == "--compare":  # --out: the comparison would take one's place
        assert done.returncode == 2 and "is one of the two that are compared" in done.stderr
        done = subprocess.run(**python("-c", code.replace(f"'--out', '{tmp_path}'", "")))
        assert done.returncode == 0 and "mine, full" in done.stdout
        return
    assert (
        done.stdout.splitlines()[-1] == str(tmp_path / "report.html")
        and (tmp_path / "report.html").exists()
    ), done.stderr
    if command == "--rescore":  # by our rule, and by the official one
        assert re.search(r"mine, full +100\.0 \[ 34\.2, 100\.0\] +2 +50\.0 ", done.stdout)
        assert (
            json.loads((tmp_path / "result.json").read_text())["benches"]["mine"]["full"][
                "accuracy"
            ]
            == 1
        )


# -------------------------------------------------------------------------------------------- main


def run(*flags) -> str:
    """What the command prints."""
    with redirect_stdout(io.StringIO()) as printed:
        evaluate.main([*map(str, flags), "--device", "cpu"])
    return printed.getvalue()


def test_a_limit_takes_rows_from_the_whole_benchmark(model, tmp_path):
    model.says = dict.fromkeys(range(100), "A")
    path = own(tmp_path, [{"answer": "A"}] * 100, crops=False)
    for limit, numbers in (
        (1, [0]),
        (4, [0, 25, 50, 75]),
        (7, [0, 14, 28, 42, 57, 71, 85]),
        (1000, range(100)),
    ):
        model.asked.clear()
        run("--bench", path, "--model", "m", "--limit", limit, "--out", tmp_path / str(limit))
        assert [p for prompts in model.asked for p in prompts] == [f"question {n}" for n in numbers]


def test_answers_of_another_model_or_other_settings_are_not_mixed(straight, checkpoint, tmp_path):
    flags, done = straight
    out = shutil.copytree(done, tmp_path / "out")
    vision_model.save(*tiny_model.tiny(1), tmp_path / "other")
    for more, message in (
        (["--max-new-tokens", 25], "max_new_tokens: 24 -> 25"),
        (["--zoom", 2], "zoom: 0 -> 2"),
        (["--model", tmp_path / "other"], "weights: "),
    ):
        with pytest.raises(
            ValueError,
            match=f"holds answers of {re.escape(str(checkpoint))}; .* differs in .*{message}",
        ):
            run(*flags, "--out", out, *more)
    run(
        *flags,
        "--out",
        out,
        "--batch",
        5,
        "--model",
        shutil.copytree(checkpoint, tmp_path / "moved"),
    )  # the same weights elsewhere
    assert lines_of(out) == lines_of(done)


def test_the_toys_small_and_large_targets_and_ones_own_rows_share_a_folder(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "rollout.answers",
        lambda m, p, images, prompts, **_: [rollout.Reply("A", 1, False) for _ in prompts],
    )
    run(
        "--bench",
        f"toy,{own(tmp_path)}",
        "--data-root",
        tmp_path,
        "--limit",
        7,
        "--model",
        "m",
        "--view",
        "both",
        "--out",
        tmp_path / "out",
    )
    (tmp_path / "out/answers-torn-0.jsonl").write_text('{"id": "0", "bench": "to')
    benches = figures.summarise(tmp_path / "out", figures.Scorer())["benches"]
    assert {name: [(view, f["n"]) for view, f in benches[name].items()] for name in benches} == {
        name: [("full", 7), ("crop", 7), ("gap", 7)] for name in ("toy", "toy-large", "mine")
    } | {"toy-holdout": [("full", 7)]}
    groups = {(a.bench, a.group) for a in figures.saved_answers(tmp_path / "out")}
    assert groups == {
        ("toy", "small"),
        ("toy", "pair"),
        ("toy-large", "large"),
        ("toy-holdout", "colour"),
        ("toy-holdout", "corner"),
        ("mine", None),
    }


def test_two_files_of_the_same_name_are_refused(model, tmp_path):
    paths = [
        own(tmp_path / "a"),
        own(tmp_path / "b", [{"answer": "A", "prompt": "the question 0"}]),
    ]
    with pytest.raises(
        ValueError, match="another benchmark is called 'mine' too. Rename the file or folder"
    ):
        run("--bench", " , ".join(map(str, paths)), "--model", "m", "--out", tmp_path / "out")


def test_crops_are_asked_for_only_where_there_are_some(model, tmp_path):
    with_, without = own(tmp_path), own(tmp_path, name="bare", crops=False)
    for view, bench in (("crop", without), ("both", without)):
        with pytest.raises(ValueError, match=f"--view {view}: bare has no crops. zoombench, toy"):
            run("--bench", bench, "--model", "m", "--view", view, "--out", tmp_path / "out")
    assert "no crops, full view only: bare\n" in run(
        "--bench", f"{with_},{without}", "--model", "m", "--view", "both", "--out", tmp_path / "out"
    )
    views = json.loads((tmp_path / "out/result.json").read_text())["benches"]
    assert list(views["mine"]) == ["full", "crop", "gap"] and list(views["bare"]) == ["full"]
    assert "no crops, left out: bare\n" in run(
        "--bench",
        f"{with_},{without}",
        "--model",
        "m",
        "--view",
        "crop",
        "--out",
        tmp_path / "crops",
    )
    views = json.loads((tmp_path / "crops/result.json").read_text())["benches"]
    assert list(views) == ["mine"] and list(views["mine"]) == ["crop"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--bench", "vstarr", "--model", "m", "--out", "o"],
            "--bench vstarr is unknown",
        ),
        (
            ["--rescore", "o", "--judge-model", "m"],
            "--judge-model names a model at the URL of --judge",
        ),
        (["--report", "o", "--scorer", "official"], "show answers as they were scored"),
        (["--report", "o", "--bench", "toy"], "are about saved answers"),
        (["--report", "o", "--rescore", "o"], "one of --report"),
        (
            ["--bench", "toy", "--model", "m"],
            "expected --bench, --out, and --model or --checkpoints",
        ),
        (["--model", "m", "--out", "o"], "expected --bench, --out,"),
        (
            ["--bench", "toy", "--model", "m", "--checkpoints", "r", "--out", "o"],
            "--model or --checkpoints",
        ),
        ([], "or one of --report, --rescore, --compare"),
        (["--bench", "toy", "--model", "m", "--out", "o", "--limit", "0"], "argument --limit"),
        (["--mod", "m"], "unrecognized arguments: --mod"),
        (["--bench", "toy", "--model", "m", "--out", "o", "--zoom", "-1"], "argument --zoom"),
        (["--view", "crops"], "invalid choice: 'crops'"),
    ],
)
def test_a_wrong_command_line_is_refused_with_what_is_possible(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(flags)
    assert message in capsys.readouterr().err


def test_errors_reach_the_user_as_one_line(tmp_path):
    done = subprocess.run(**python("evaluate.py", "--rescore", tmp_path))
    assert (
        done.returncode == 1
        and done.stderr
        == f"evaluate.py: {tmp_path} holds no answers-*.jsonl. Expected the --out folder of an "
        "evaluation.\n"
    )


def test_the_checkpoints_of_a_run_make_a_trajectory(checkpoint, tmp_path):
    training, out = tmp_path / "run", tmp_path / "out"
    for step in (5, 10):
        vision_model.save(*tiny_model.tiny(step), training / f"checkpoint-{step:06}")
    flags = [
        "--bench",
        own(tmp_path, ROWS[:2]),
        "--checkpoints",
        training,
        "--view",
        "both",
        "--max-new-tokens",
        3,
        "--out",
        out,
    ]
    with pytest.raises(
        FileNotFoundError, match="run: no args.json with a model, or no checkpoints. Expected"
    ):
        run(*flags)
    (training / "args.json").write_text(json.dumps({"model": str(checkpoint)}))
    (tmp_path / "none").mkdir()
    shutil.copy(training / "args.json", tmp_path / "none")  # an evaluation's folder, say
    with pytest.raises(
        FileNotFoundError, match="none: no args.json with a model, or no checkpoints"
    ):
        run(*[tmp_path / "none" if flag == training else flag for flag in flags])
    printed = run(*flags)
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html",
        "step-000000",
        "step-000005",
        "step-000010",
    ]
    assert [
        json.loads((out / f"step-{step:06}/args.json").read_text())["model"] for step in (0, 5)
    ] == [str(checkpoint), str(training / "checkpoint-000005")]
    assert re.findall(r"^step +(\d+) mine +full +\S+  crop +\S+  gap +\S+$", printed, re.M) == [
        "0",
        "5",
        "10",
    ]
    data = json.loads(
        re.search(r'application/json">(.*?)</script>', (out / "report.html").read_text(), re.S)[1]
    )
    assert [(row["step"], row["bench"]) for row in data["trajectory"]] == [
        (0, "mine"),
        (5, "mine"),
        (10, "mine"),
    ]
    assert list(data["results"]) == ["step-000000", "step-000010"]
    (out / "step-000005/result.json").write_text(
        "{"
    )  # as a kill may leave it: the page does without
    assert pages.write_page(out).exists()


@pytest.mark.parametrize("rounds", [0, 1])
def test_the_tiny_model_answers_a_choice_a_yes_or_no_and_a_free_question(
    rounds, checkpoint, tmp_path
):
    path = own(tmp_path, [ROWS[0], ROWS[2], ROWS[4]], crops=False)
    printed = run(
        "--bench",
        path,
        "--model",
        checkpoint,
        "--max-new-tokens",
        6,
        "--zoom",
        rounds,
        "--out",
        tmp_path / "out",
    )
    rows, loaded = sources.read_benchmark(str(path), tmp_path), vision_model.load(str(checkpoint))
    shown, prompts = [images.load_image(row.image) for row in rows], [row.prompt for row in rows]

    def ask(images, chats):
        return rollout.answers(*loaded, images, chats, 6)

    want = list(map(vars, ask(shown, prompts)))
    if rounds:
        want = zoom.answer_with_zoom(ask, shown, prompts, rounds)
    saved = figures.saved_answers(tmp_path / "out")
    assert [{key: getattr(a, key) for key in want[0]} for a in saved] == want
    assert [a.kind for a in saved] == ["mc", "yn", "free"]
    for answer, row in zip(saved, rows, strict=True):
        assert (tmp_path / "out" / answer.image).samefile(row.image)
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["settings"]["model"] == str(checkpoint) and (
        "calls" in result["benches"]["mine"]["full"]
    ) == bool(rounds)
    assert figures.table(result) in printed and printed.endswith(
        f"{tmp_path / 'out/report.html'}\n"
    )
