"""Models behind a server: the client's faults, pictures as they travel, answers and triplets."""

import base64
import io
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, noise
from loopback import KEY, choice, completion, last_text, pictures, serving
from PIL import Image
from test_evaluate import GOLD, lines_of, outcome, own, saved_benches
from test_synth import ASKED, found_in, kind_of, photographs, rows, scripted, stats
from test_zoom import call

import evaluate
import rollout
import synth
from benchmarks import figures, zoom
from served import client
from served.pictures import data_uri
from storage.images import load_image
from synthesis.texts import PROMPTS

pytest.importorskip("openai")
SAID = ["A", "The answer is (C).", "Yes.", "I cannot tell", "7 km", "About a dozen", "C. green"]
ANSWERS = {f"question {n}": text for n, text in enumerate(SAID)}


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(client, "PAUSES", (0, 0, 0))
    monkeypatch.setattr(client, "RETRIES", 1)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server():
    """A server that knows the answers; server.say may be changed."""
    with serving(lambda body: ANSWERS[last_text(body)]) as server:
        yield server


def answer(path: Path, server, *flags, out: str = "out") -> Path:
    """Puts a benchmark to the server's model."""
    folder = path.parent / out
    words = ["--bench", path, "--model", server.url, "--served-model", "big", "--out", folder]
    evaluate.main([*map(str, words), *flags])
    return folder


def texts(out: Path) -> dict:
    return {answer.id: answer.output for answer in figures.saved_answers(out)}


def image_of(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(content_of(uri)))


def content_of(uri: str) -> bytes:
    return base64.b64decode(uri.partition("base64,")[2])


# -------------------------------------------------------------------------------------- answers


def test_a_served_model_gets_each_question_with_its_picture_and_its_figures_are_scored(
    server, tmp_path, capsys
):
    path = own(tmp_path)
    out = answer(path, server, "--view", "both", "--price-in", "2", "--price-out", "10")
    shown = Counter()
    for place, key, body in server.requests:
        assert (place, key) == ("/v1/chat/completions", f"Bearer {KEY}")
        fields = {"model": "big", "temperature": 0, "max_tokens": 4096}
        assert body == body | fields
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        (uri,) = pictures(body)
        shown[last_text(body), content_of(uri)] += 1
    want = Counter()
    for n in range(len(GOLD)):
        for view in ("image", "crop"):
            want[f"question {n}", (tmp_path / f"mine{n}-{view}.png").read_bytes()] += 1
    assert shown == want
    full = saved_benches(out)["mine"]["full"]
    assert (full["right"], full["unparsed"], full["tokens"]) == (4, 2, 7)
    assert full["answered_by"] == ["big-2026"]
    assert full["cost"] == pytest.approx(len(GOLD) * (2 * 100 + 10 * 7) / 1e6)
    settings = json.loads((out / "result.json").read_text())["settings"]
    assert (settings["model"], settings["served_model"]) == (server.url, "big")
    printed = "".join(capsys.readouterr())
    assert KEY not in printed
    assert not any(KEY.encode() in file.read_bytes() for file in out.iterdir())


def test_as_many_are_asked_at_once_as_allowed_and_the_order_changes_nothing(server, tmp_path):
    path = own(tmp_path, GOLD * 3)

    def later_first(body):
        n = int(last_text(body).split()[-1])
        time.sleep(0.02 * (4 - n % 4))
        return ANSWERS[f"question {n % 7}"]

    server.say = later_first
    wanted = outcome(answer(path, server, "--concurrency", "1", out="one"))
    assert server.most == 1
    assert outcome(answer(path, server, "--concurrency", "4", out="four")) == wanted
    assert server.most == 4


def test_a_server_that_goes_away_loses_nothing_and_only_what_is_missing_is_asked_then(
    server, tmp_path
):
    path = own(tmp_path)
    wanted = outcome(answer(path, server, "--view", "both", out="straight"))
    server.requests.clear()
    with serving(server.say) as other:

        def leave(body):
            if len(other.requests) > 4:
                other.server_close()  # nobody listens any more
                raise ConnectionError
            return ANSWERS[last_text(body)]

        other.say = leave
        with pytest.raises(client.NoServerError, match="does not answer"):
            answer(path, other, "--view", "both", "--concurrency", "1")
    lines = lines_of(tmp_path / "out")
    assert len(lines) == 4
    out = answer(path, server, "--view", "both")  # the server has moved
    assert len(server.requests) == 10
    assert lines_of(out)[:4] == lines
    assert outcome(out) == wanted


def slow(body):
    time.sleep(3)
    return "late"


ONCE = {
    "server error": 500,
    "hang": slow,
    "garbage": b"<html>",
    "cut off": b"cut off",
    "ever deeper": b"[" * 100_000,
    "no choices": b'{"choices": []}',
    "no object": b"[]",
    "no text": completion(choice(None, reasoning_content="A")),
}


@pytest.mark.parametrize("fault", ONCE)
def test_what_passes_is_tried_again(fault, server, tmp_path):
    faults = [ONCE[fault]]

    def say(body):
        reply = faults.pop() if faults else "A"
        return reply(body) if callable(reply) else reply

    server.say = say
    deadline = "1" if fault == "hang" else "60"
    out = answer(own(tmp_path, ["A"], crops=False), server, "--deadline", deadline)
    assert texts(out) == {"0": "A"}
    assert len(server.requests) >= 2


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(server, tmp_path):
    times = []

    def say(body):
        times.append(time.perf_counter())
        return (429, {"Retry-After": "1"}, b"") if len(times) == 1 else "A"

    server.say = say
    assert texts(answer(own(tmp_path, ["A"], crops=False), server)) == {"0": "A"}
    assert 1 <= times[1] - times[0] < 10


REFUSED = (400, {}, b'{"error": {"message": "too long for sk-very-secret"}}')


@pytest.mark.parametrize("fault", [REFUSED, b"{}", 503, "drip"])
def test_what_stays_is_an_error_of_its_row_and_asked_again(fault, server, tmp_path):
    path = own(tmp_path, ["A", "A"], crops=False)
    server.drip = fault == "drip"
    server.say = lambda body: fault if last_text(body) == "question 1" or server.drip else "A"
    out = answer(path, server, "--deadline", "0.3" if server.drip else "60")
    full = saved_benches(out)["mine"]["full"]
    assert (full["n"], full["errors"]) == ((0, 2) if server.drip else (1, 1))
    assert not any(b"sk-very" in line for line in lines_of(out))
    server.drip, server.say = False, lambda body: "A"
    assert texts(answer(path, server)) == {"0": "A", "1": "A"}


@pytest.mark.parametrize("status", [301, 302, 307, 308, 401, 404])
def test_a_redirect_a_wrong_key_or_an_unknown_model_ends_it_at_once(status, server, tmp_path):
    server.say = lambda body: status
    with pytest.raises(client.NoServerError, match=str(status)):
        answer(own(tmp_path), server, "--concurrency", "1")
    assert [place for place, _, _ in server.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "said, output, truncated",
    [
        (choice("A and", "length"), "A and", True),
        (choice(None, "length", reasoning_content="hm"), "", True),
        (choice(None, "stop", refusal="I will not."), "I will not.", False),
        (choice("", "stop"), "", False),
        (choice(None, "content_filter"), "", False),
    ],
)
def test_a_refusal_and_an_answer_cut_off_are_answers(said, output, truncated, server, tmp_path):
    server.say = lambda body: completion(said)
    out = answer(own(tmp_path, ["A"], crops=False), server)
    (found,) = figures.saved_answers(out)
    assert (found.output, found.truncated, found.error) == (output, truncated, None)
    assert len(server.requests) == 1


def test_rows_whose_tokens_the_server_does_not_count_are_told(server, tmp_path, capsys):
    server.say = lambda body: {"choices": [choice("A")]}
    out = answer(own(tmp_path, ["A"], crops=False), server)
    assert saved_benches(out)["mine"]["full"]["no_usage"] == 1
    assert "1 rows without usage" in capsys.readouterr().out


def test_fields_that_a_server_refuses_are_left_out_and_that_is_said_once(server, tmp_path, capsys):
    unknown = ["chat_template_kwargs", "temperature", "max_tokens"]

    def say(body):
        if last_text(body) == "question 2":  # whatever it is asked with
            return REFUSED
        for field in unknown:
            if field in body:
                error = f"Unsupported parameter: '{field}'\n\nUse another"
                return (400, {}, {"error": {"message": error, "param": field}})
        return "A"

    server.say = say
    out = answer(own(tmp_path, ["A"] * 9, crops=False), server, "--max-new-tokens", "33")
    assert Counter(texts(out).values()) == {"A": 8, None: 1}
    body = server.requests[-1][2]
    assert body["max_completion_tokens"] == 33
    assert not body.keys() & set(unknown)
    printed = "".join(capsys.readouterr())
    assert [printed.count(f"takes no {field}") for field in unknown] == [1, 1, 1]


def test_a_refusal_of_one_row_changes_nothing_for_the_others(server, tmp_path):
    server.say = lambda body: REFUSED if last_text(body) == "question 0" else "A"
    answer(own(tmp_path, ["A"] * 3, crops=False), server, "--concurrency", "1")
    assert "chat_template_kwargs" in server.requests[-1][2]


def test_thinking_is_asked_for_by_leaving_the_field_out_and_is_another_evaluation(server, tmp_path):
    path = own(tmp_path)
    out = answer(path, server)
    with pytest.raises(ValueError, match="thinking"):
        answer(path, server, "--thinking")
    other = answer(path, server, "--thinking", out="thinking")
    assert "chat_template_kwargs" not in server.requests[-1][2]
    with pytest.raises(ValueError, match="thinking"):
        figures.compare(out, other)
    shorter = answer(path, server, "--max-new-tokens", "9", out="shorter")
    with pytest.raises(ValueError, match="max_new_tokens"):
        figures.compare(out, shorter)
    another = tmp_path / "another"
    evaluate.main(
        f"--bench {path} --model {server.url} --served-model small --out {another}".split()
    )
    _, found = figures.compare(out, another)
    assert found["mine"]["full"]["n"] == len(GOLD)


def test_no_proxy_of_the_environment_gets_the_key(server, tmp_path, monkeypatch):
    with serving(lambda body: "A") as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        answer(own(tmp_path), server)
        assert not proxy.requests
    assert len(server.requests) == len(GOLD)


@pytest.mark.parametrize("url", ["http://me:sk-1@localhost/v1", "http://localhost/v1?key=sk-1"])
def test_an_address_with_a_secret_is_refused_without_being_shown(url, tmp_path):
    words = ["--bench", own(tmp_path), "--model", url, "--served-model", "m", "--out", tmp_path]
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        evaluate.main(list(map(str, words)))
    assert "sk-1" not in str(error.value)


def test_the_package_is_named_where_it_is_missing(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match="pip install openai"):
        answer(own(tmp_path), server)


def test_neither_torch_nor_transformers_is_needed(server, tmp_path):
    program = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    program += "import evaluate; evaluate.main(sys.argv[1:])"
    flags = f"--bench {own(tmp_path)} --model {server.url} --served-model big --out {tmp_path}/out"
    words = [sys.executable, "-c", program, *flags.split()]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(server.requests) == len(GOLD)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model http://h/v1", "--served-model"),
        ("--model http://h/v1 --served-model m --batch 3", "--batch"),
        ("--model m --concurrency 3", "--concurrency"),
        ("--model m --price-in 3", "--price-in"),
        ("--model http://h/v1 --served-model m --max-image-mb 0", "--max-image-mb"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(f"--bench toy --out o {flags}".split())
    assert message in capsys.readouterr().err


def test_the_tool_loop_through_a_server_is_that_of_a_local_model(server, tmp_path):
    path = own(tmp_path, ["A"] * 3, crops=False)
    script = {
        "question 0": [call(0, 0, 500, 500), call(1, 2), "A"],
        "question 1": ["B"],
        "question 2": [call(500, 500, 1000, 1000), call(0, 0, 100, 100), call(0, 0, 9, 9)],
    }

    def turn(chat):
        return script[chat[1]["content"][-1]["text"]][len(chat) // 2 - 1]

    seen = {}

    def local(images, chats):
        for views, chat in zip(images, chats, strict=True):
            seen[turn(chat)] = [view.tobytes() for view in views]
        return [rollout.Reply(turn(chat), 7, False) for chat in chats]

    images = [load_image(tmp_path / f"mine{n}-image.png") for n in range(3)]
    want = zoom.answer_with_zoom(local, [[image] for image in images], list(script), 2)
    server.say = lambda body: turn(body["messages"])
    out = answer(path, server, "--zoom", "2")
    saved = {found.id: vars(found) for found in figures.saved_answers(out)}
    for n, fields in enumerate(want):
        assert saved[str(n)] == saved[str(n)] | fields
    assert len(server.requests) == 7
    for _, _, body in server.requests:
        shown = [image_of(uri).tobytes() for uri in pictures(body)]
        assert shown == seen[turn(body["messages"])]


# ------------------------------------------------------------------------------------- pictures

TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    "name, mode, options, as_it_is",
    [
        ("a.png", "RGB", {}, True),
        ("a.jpg", "RGB", {}, True),
        ("a.jpg", "RGB", {"exif": TURNED}, False),
        ("a.jpg", "CMYK", {}, False),
        ("a.jpg", "L", {}, False),
        ("a.png", "RGBA", {}, False),
        ("a.png", "P", {}, False),
        ("a.png", "RGB", {"transparency": (0, 0, 0)}, False),
        ("a.webp", "RGB", {"lossless": True}, False),
    ],
)
def test_a_picture_travels_as_it_is_where_a_server_reads_it_as_we_do(
    name, mode, options, as_it_is, tmp_path
):
    path = tmp_path / name
    noise(40, 30).convert(mode).save(path, **options)
    uri, shrunk = data_uri(path, 10**6)
    assert (content_of(uri) == path.read_bytes()) == as_it_is
    assert image_of(uri).convert("RGB").tobytes() == load_image(path).tobytes()
    assert uri.startswith(f"data:image/{image_of(uri).format.lower()};base64,")
    assert not shrunk


def test_larger_pictures_than_the_server_takes_are_made_smaller_and_counted(
    server, tmp_path, capsys
):
    path = own(tmp_path, ["A", "A"], crops=False)
    noise(200, 100).save(tmp_path / "mine1-image.png")
    server.say = lambda body: "A"
    out = answer(path, server, "--max-image-mb", "0.03")
    small, large = sorted(len(pictures(body)[0]) for _, _, body in server.requests)
    assert small < 10_000 < large <= 30_000
    sizes = {image_of(pictures(body)[0]).size for _, _, body in server.requests} - {(32, 48)}
    ((width, height),) = sizes
    assert 100 < width < 200 and abs(width - 2 * height) <= 1
    assert saved_benches(out)["mine"]["full"]["shrunk"] == 1
    assert "1 pictures made smaller" in capsys.readouterr().out


def test_a_picture_that_cannot_be_read_is_an_error_of_its_row(server, tmp_path):
    path = own(tmp_path, ["A", "A"], crops=False)
    image = tmp_path / "mine1-image.png"
    image.write_bytes(image.read_bytes()[:900])
    full = saved_benches(answer(path, server))["mine"]["full"]
    assert (full["n"], full["errors"]) == (1, 1)


# ------------------------------------------------------------------------------------- triplets


def asks(body: dict):
    """What a model says that sees things and asks about them, whatever is asked for."""
    kind = kind_of(last_text(body))
    if kind == "find":
        return found_in(image_of(pictures(body)[0]).convert("RGB"))
    said = {"ask": json.dumps(ASKED), "vote": "Red.", "wrong": '["blue", "green", "white"]'}
    return said[kind]


def make(tmp_path: Path, *flags, out: str = "out") -> Path:
    if not (tmp_path / "in").is_dir():
        photographs(tmp_path / "in")
    words = ["--images", tmp_path / "in", "--out", tmp_path / out, *flags]
    synth.main(list(map(str, words)))
    return tmp_path / out


def by(server, role: str = "") -> list[str]:
    return [f"--{role}model", server.url, f"--{role}served-model", "big"]


def kinds(server) -> Counter:
    return Counter(kind_of(last_text(body)) for _, _, body in server.requests)


def without_mark(out: Path) -> list[dict]:
    found = rows(out)
    for row in found:
        row["extra_info"].pop("config")  # of the model as well
    return found


def test_triplets_of_a_served_model_are_those_of_a_local_one(server, tmp_path, monkeypatch):
    server.say = asks
    out = make(tmp_path, "--format", "mcq", *by(server))
    photos = {path.read_bytes() for path in (tmp_path / "in").rglob("*.jpg")}
    found = [body for _, _, body in server.requests if kind_of(last_text(body)) == "find"]
    assert {content_of(pictures(body)[0]) for body in found} == photos  # as they are
    scripted(monkeypatch)
    assert without_mark(make(tmp_path, "--format", "mcq", out="local")) == without_mark(out)
    config = stats(out)["config"]
    assert (config["model"], config["model_server"]) == ("served big", server.url)
    assert stats(out)["usage"]["prompt_tokens"] == 100 * len(server.requests)


@pytest.mark.parametrize("takes", ["n", "nothing", "one"])
def test_a_label_is_as_many_samples_as_locally_in_as_few_requests_as_the_server_takes(
    takes, server, tmp_path
):
    seeds = []

    def say(body):
        if kind_of(last_text(body)) != "vote":
            return asks(body)
        if takes == "nothing" and "n" in body:
            return (400, {}, {"error": {"message": "Unsupported fields: {'n'}"}})
        seeds.append(body["seed"])
        assert body["temperature"] == 1.0
        n = body.get("n", 1) if takes == "n" else 1
        return completion(*[choice("Red.")] * n)

    server.say = say
    out = make(tmp_path, "--labels", *by(server))
    assert {tuple(row["extra_info"]["votes"]) for row in rows(out)} == {(8, 8)}
    assert len(seeds) == 12 * (1 if takes == "n" else 8)
    assert len(set(seeds)) == len(seeds)


def test_one_model_asks_here_and_another_labels_there(server, tmp_path, monkeypatch):
    server.say = lambda body: completion(*[choice("Red.")] * body["n"])
    calls = scripted(monkeypatch)
    out = make(tmp_path, "--labels", *by(server, "labels-"))
    assert {kind for kind, _, _ in calls} == {"find", "ask"}
    assert kinds(server) == {"vote": 12}
    assert {row["answer"] for row in rows(out)} == {"Red"}
    assert stats(out)["config"]["labels_model"] == "served big"


def test_a_photograph_whose_call_failed_is_not_done_and_the_next_run_does_it(
    server, tmp_path, capsys
):
    server.say = asks
    wanted = without_mark(make(tmp_path, *by(server), out="straight"))
    server.requests.clear()
    broken = (tmp_path / "in" / "0.jpg").read_bytes()

    def say(body):
        whole = content_of(pictures(body)[0]) == broken
        return REFUSED if whole else asks(body)

    server.say = say
    out = make(tmp_path, *by(server))
    assert "1 photographs are not done" in capsys.readouterr().out
    assert (stats(out)["photographs"], len(rows(out))) == (2, 4)
    server.requests.clear()
    with serving(asks) as moved:
        make(tmp_path, *by(moved))
        assert kinds(moved) == {"find": 1, "ask": 2}
    assert without_mark(out) == wanted


def test_a_server_that_goes_away_while_triplets_are_made_loses_nothing(server, tmp_path):
    server.say = asks
    wanted = without_mark(make(tmp_path, *by(server), out="straight"))
    with serving(asks) as other:

        def leave(body):
            if len(other.requests) > 5:
                other.server_close()
                raise ConnectionError
            return asks(body)

        other.say = leave
        with pytest.raises(client.NoServerError):
            make(tmp_path, *by(other), "--batch", "1", "--concurrency", "1")
    server.requests.clear()
    assert without_mark(make(tmp_path, *by(server), "--batch", "1")) == wanted
    assert kinds(server)["find"] == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--model http://h/v1", "--served-model"),
        ("--labels --labels-model http://h/v1", "--labels-served-model"),
        ("--labels-model m", "--labels-model"),
        ("--concurrency 3", "--concurrency"),
        ("--served-model m", "--served-model"),
    ],
)
def test_synth_refuses_flags_without_effect(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        synth.main(f"--images {tmp_path} --out {tmp_path}/o {flags}".split())
    assert message in capsys.readouterr().err


def test_prompts_are_those_of_a_local_model(server, tmp_path):
    server.say = asks
    make(tmp_path, *by(server))
    find = PROMPTS["find"] + PROMPTS["boxes"]
    assert sum(last_text(body) == find for _, _, body in server.requests) == 3
