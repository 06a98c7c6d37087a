"""The public benchmarks: small files in each source's own layout, and what they are converted to.

Every source below is written to a folder as its repository has it, and returns the rows it must
become (images as bytes).
"""

import base64
import csv
import io
import json
import math
import re
import shutil
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
from conftest import noise

from benchmarks import sources
from toy import scenes
from triplets.format import read_triplets

KEYS = ("id", "prompt", "answer", "kind", "options", "group", "pair", "image", "crops")
COLOURS = {"A": "red", "B": "blue", "C": "green", "D": "white"}
LETTER = "\nAnswer with the option's letter from the given choices directly."
MME = (
    "{} The choices are listed below:\n{}\n"
    "Select the best answer to the above multiple-choice question based on the image. "
    "Respond with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is: "
)
MME_CN = (
    "{} 选项如下所示:\n{}\n根据图像选择上述多项选择题的最佳答案。"
    "只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： "
)


# ------------------------------------------------------------------------------------------ helpers


def picture(seed: int, width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    noise(width, height, seed).save(file := io.BytesIO(), kind)
    return file.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(path: Path, rows: list[dict]) -> None:
    """Write rows in the form that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    else:
        put(path, lines(rows) if path.suffix == ".jsonl" else json.dumps(rows))


def struct(image: bytes | None) -> dict:
    return {"bytes": image, "path": image and "image.png"}


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def row(prompt, answer, image, options=None, group=None, kind="mc", crop=None, pair=None) -> dict:
    return {
        "prompt": prompt,
        "answer": answer,
        "image": image,
        "options": options or {},
        "group": group,
        "kind": kind,
        "crops": [crop] if crop else [],
        "pair": pair,
    }


def read_rows(name, root) -> list[dict]:
    return [vars(question) for question in sources.read_benchmark(name, root)]


def read(name: str, root: Path) -> list[dict]:
    """The converted rows, with the bytes of their images."""
    found = [{key: r[key] for key in KEYS} for r in read_rows(name, root)]
    for r in found:
        r["image"] = r["image"].read_bytes()
        r["crops"] = [crop.read_bytes() for crop in r["crops"]]
    return found


# ------------------------------------------------------------------------------------------ sources


def records(rows: list[dict], fields: dict) -> list[dict]:
    """What a source says of rows. fields: its name of a field -> ours, or all its values."""
    columns = {
        name: [r[of] for r in rows] if isinstance(of, str) else of for name, of in fields.items()
    }
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def as_files(folder: Path, names: list[str], rows: list[dict]) -> list[str]:
    for name, r in zip(names, rows, strict=True):
        put(folder / name, r["image"])
    return names


def encoded(how, rows: list[dict], view: str = "image") -> list:
    return [how(r[view]) for r in rows]


def vstar(folder: Path, form: str) -> list[dict]:
    clock = "What color is the clock?\n(A) red\n(B) dark (very) blue\n(C) green\n(D) white" + LETTER
    dog = "Is the dog left of the cat?\n(A) The dog is left.\n(B) The dog is right."
    colours = COLOURS | {"B": "dark (very) blue"}
    sides = {"A": "The dog is left.", "B": "The dog is right."}
    rows = [
        row(clock, "B", picture(1, kind="JPEG"), colours, "direct_attributes"),
        row(dog + LETTER, "A", picture(2, kind="JPEG"), sides, "relative_position"),
    ]
    if form == "parquet":
        path, images = "data/test-00000-of-00001.parquet", encoded(struct, rows)
    else:
        names = [f"{r['group']}/sa_{n}.jpg" for n, r in enumerate(rows)]
        path, images = "test_questions.jsonl", as_files(folder, names, rows)
    fields = {"text": [clock, dog], "label": "answer", "category": "group", "image": images}
    table(folder / path, records(rows, fields))
    return rows


def zoombench(folder: Path, form: str) -> list[dict]:
    boats, crops = {"A": "7", "B": "9", "C": "11", "D": "13"}, [picture(n, 20, 16) for n in (8, 9)]
    there = {"A": "a lamp", "B": "a bell"}
    rows = [
        row(
            "How many boats?\nA. 7\nB. 9\nC. 11\nD. 13",
            "B",
            picture(1),
            boats,
            "mcq",
            "mc",
            crops[0],
        ),
        row(
            "What hangs there?\n(A) a lamp\n(B) a bell", "A", picture(2, kind="JPEG"), there, "mcq"
        ),
        row("What is written on the sign?", "27 km", picture(3), {}, "blank", "free", crops[1]),
    ]
    fields = {
        "query": "prompt",
        "response": ["B", "(A)", "27 km"],
        "image": encoded(struct, rows),
        "crop_image": [struct(*r["crops"] or [None]) for r in rows],
        "question_type": "group",
    }
    table(folder / "data/test.parquet", records(rows, fields))
    return rows


def hrbench(folder: Path, form: str, size: str) -> list[dict]:
    rows, names = [], ["red", "green", "blue", 'pink, "hot"']
    for question, image, group in (
        ('What color\tis sign "0"?', picture(1, 210, 170), "single"),
        ('What color\tis sign "1"?', picture(2), "cross"),
    ):
        for cycle in (0, 1):  # the same image and question, the options turned round
            options = dict(zip("ABCD", names[cycle:] + names[:cycle], strict=True))
            listed = "".join(f"\n({letter}) {option}" for letter, option in options.items())
            prompt = f"{question} Select from the following choices.{listed}"
            rows.append(row(prompt, "AD"[cycle], image, options, group))
    fields = {
        "question": [r["prompt"].split(" Select")[0] for r in rows],
        "answer": "answer",
        "category": "group",
        **{letter: [r["options"][letter] for r in rows] for letter in "ABCD"},
        "image": encoded(text, rows),
    }
    assert len(fields["image"][0]) > 131_072  # the csv module's default limit
    table(folder / f"hr_bench_{size}.{form}", records(rows, fields))
    return rows


def mme(folder: Path, form: str, chinese: bool = False) -> list[dict]:
    template, mark = MME, "({}) "
    names = ["red", "blue (dark)", "it's green", "white", "not in it"]
    if chinese:
        template, mark, names = MME_CN, "（{}）", ["红色", "蓝色", "绿色", "白色", "没有"]
    options = dict(zip("ABCDE", names, strict=True))
    listed = [mark.format(letter) + name for letter, name in options.items()]
    questions = [f"What color is car {n}?" for n in range(3)]
    prompts = [template.format(question, "\n".join(listed)) for question in questions]
    rows = [
        row(prompts[0], "B", picture(0, kind="JPEG"), options, "Perception/Monitoring"),
        row(prompts[1], "E", picture(1, kind="JPEG"), options, "Reasoning/OCR"),
        row(prompts[2], "D", picture(2, kind="JPEG"), options, "Perception/OCR"),
    ]
    if form == "json":
        mme_json(folder, rows, questions, listed)
        return rows
    form, column = form.split()
    fields = {
        "index": [7] * 3,  # CN repeats it
        "question": questions,
        "multi-choice options": [listed] * 3,
        "answer": "answer",
        "category": "group",
        column: encoded(text, rows),
    }
    path = "mme_realworld_lite.tsv" if form == "tsv" else "data/train-00000-of-00001.parquet"
    table(folder / path, records(rows, fields))
    return rows


def mme_json(folder: Path, rows: list[dict], questions: list[str], listed: list[str]) -> None:
    loose = folder.parent / "loose"
    names = ["monitoring_images/0.jpg", "monitoring_images/1.jpg", "ocr_cc/2.jpg"]
    fields = {
        "Image": as_files(loose, names, rows),
        "Text": questions,
        "Ground truth": "answer",
        "Answer choices": [listed] * 3,
        "Task": ["Perception", "Reasoning", "Perception"],
        "Subtask": ["Monitoring", "OCR", "OCR"],
    }
    table(folder / "MME_RealWorld.json", records(rows, fields))
    for archive, inside in (("images", "monitoring_images"), ("ocr_cc", "ocr_cc")):
        with tarfile.open(folder / f"{archive}.tar.gz.part_aa", "w:gz") as tar:
            tar.add(loose / inside, inside)
    first = folder / "images.tar.gz.part_aa"
    content = first.read_bytes()
    put(first, content[:700])
    put(folder / "images.tar.gz.part_ab", content[700:])


def mmvp(folder: Path, form: str) -> list[dict]:
    options = {"A": "Open", "B": "Closed, locked"}
    questions = [f'Is "door" {n}, the blue one, open?' for n in range(4)]
    rows = [
        row(f"{question} (a) Open (b) Closed, locked", "BA"[n % 2], picture(n), options, pair=pair)
        for n, (question, pair) in enumerate(zip(questions, "0011", strict=True))
    ]
    fields = {
        form: range(1, 5),
        "Question": questions,
        "Options": ["(a) Open (b) Closed, locked"] * 4,
        "Correct Answer": ["(b)", "(a)"] * 2,
    }
    table(folder / "Questions.csv", records(rows, fields))
    as_files(folder, [f"MMVP Images/{n}.jpg" for n in range(1, 5)], rows)
    return rows


def cv_bench(folder: Path, form: str) -> list[dict]:
    listed = "Select from the following choices.\n(A) 0\n(B) 3\n(C) 1 (one)"
    options = {"A": "0", "B": "3", "C": "1 (one)"}
    rows = [
        row(f"How many dogs {n}? {listed}", "CAB"[n], picture(n), options, kind)
        for n, kind in enumerate(["2D", "2D", "3D"])
    ]
    names = [f"img/{r['group']}/count/{n}.png" for n, r in enumerate(rows)]
    fields = {
        "type": "group",
        "choices": [list(options.values())] * 3,
        "prompt": "prompt",
        "answer": ["(C)", "(A)", "(B)"],
    }
    if form == "parquet":
        given = records(rows, fields | {"filename": names, "image": encoded(struct, rows)})
        table(folder / "test_2d.parquet", given[:2])
        table(folder / "test_3d.parquet", given[2:])
    else:
        fields[form.split()[1]] = as_files(folder, names, rows)
        table(folder / "test.jsonl", records(rows, fields))
    return rows


def mmstar(folder: Path, form: str) -> list[dict]:
    options = {"A": "large, round", "B": "small", "C": "B: none", "D": "12:30"}
    inline = "Options: A: large, round, B: small, C: B: none, D: 12:30"
    fields = {"answer": "answer", "category": "group"}
    if form == "tsv":  # its prompt is not the official one
        inline = "(A) large, round\n(B) small\n(C) B: none\n(D) 12:30"
        fields |= {letter: [option] * 2 for letter, option in options.items()}
    questions = ["How is the ball?", "Where is the ball?"]
    rows = [
        row(f"{questions[0]}\n{inline}", "C", picture(0), options, "coarse perception"),
        row(f"{questions[1]}\n{inline}", "A", picture(1), options, "math"),
    ]
    if form == "tsv":
        fields |= {"question": questions, "image": encoded(text, rows)}
    else:
        fields |= {"question": "prompt", "image": "image"}
    table(folder / f"{'MMStar' if form == 'tsv' else 'mmstar'}.{form}", records(rows, fields))
    return rows


def pope(folder: Path, form: str) -> list[dict]:
    tail = "\nAnswer the question using a single word or phrase."
    questions = [f"Is there a {thing} in the image?" for thing in ("dog", "cat", "car", "cup")]
    groups = ["adversarial", "adversarial", "popular", "random"]
    rows = [
        row(question + tail, "yes" if n % 2 == 0 else "no", picture(n % 2), {}, groups[n], "yn")
        for n, question in enumerate(questions)
    ]
    fields = {
        "question": questions,
        "answer": ["yes", "no", "Yes", "no"],
        "category": "group",
        "image": encoded(struct, rows),
    }
    given = records(rows, fields)
    for part, chosen in enumerate((given[:2], given[2:3], given[3:])):
        table(folder / f"data/test-0000{part}-of-00003.parquet", chosen)
    return rows


def visualprobe(folder: Path, form: str) -> list[dict]:
    expected = []
    for level, images, files in (
        (
            "Easy",
            ["VisualProbe_Easy/images/0.png", ["images/1.png"]],
            ["images/0.png", "images/1.png"],
        ),
        ("Medium", [["VisualProbe_Medium/2.jpg"]], ["2.jpg"]),
        ("Hard", ["images/0.png"], ["images/0.png"]),
    ):
        home, first = folder / f"VisualProbe_{level}", len(expected)
        rows = [
            row(f"What number is on bus {n}?", f"bus {n}", picture(n), {}, level, "free")
            for n in range(first, first + len(files))
        ]
        problems = [f"<image>\n{r['prompt']}" for r in rows]
        fields = {"images": images, "problem": problems, "solution": "answer"}
        table(home / "val.json", records(rows, fields))
        as_files(home, files, rows)
        expected += rows
    return expected


SOURCES = {  # what writes it, and its forms: the hub's first
    "vstar": (vstar, ["parquet", "jsonl"]),
    "zoombench": (zoombench, ["parquet"]),
    "hrbench-4k": (partial(hrbench, size="4k"), ["parquet", "tsv"]),
    "hrbench-8k": (partial(hrbench, size="8k"), ["parquet", "tsv"]),
    "mme-realworld": (mme, ["parquet bytes", "json"]),
    "mme-realworld-cn": (partial(mme, chinese=True), ["parquet bytes", "json"]),
    "mme-realworld-lite": (mme, ["parquet bytes", "tsv image", "tsv bytes"]),
    "mmvp": (mmvp, ["Index", "lndex"]),
    "mmstar": (mmstar, ["parquet", "tsv"]),
    "cv-bench": (cv_bench, ["parquet", "jsonl image", "jsonl filename"]),
    "pope": (pope, ["parquet"]),
    "visualprobe": (visualprobe, ["json"]),
}
FORMS = [(name, form) for name, (_, forms) in SOURCES.items() for form in forms]
every_source = pytest.mark.parametrize("name, form", FORMS, ids=map(" as ".join, FORMS))
every_benchmark = pytest.mark.parametrize("name", SOURCES)


def source(name: str, form: str | None, folder: Path) -> list[dict]:
    """Write a benchmark's source, in the hub's form or another; the rows it must become."""
    write, forms = SOURCES[name]
    rows = write(folder, form or forms[0])
    return [{"id": f"{name}/{n}", **r} for n, r in enumerate(rows)]


# --------------------------------------------------------------------------------------- conversion


@every_source
def test_a_source_becomes_rows_with_its_own_images_once_and_for_all(name, form, tmp_path):
    expected = source(name, form, tmp_path / name)
    assert read(name, tmp_path) == expected
    stored = [path.read_bytes() for path in (tmp_path / f"{name}-images").iterdir()]
    assert len(stored) == len(set(stored))  # a repeated one is there once
    assert set(stored) == {picture for r in expected for picture in (r["image"], *r["crops"])}

    # an interrupted conversion starts over
    (tmp_path / f"{name}.jsonl").unlink()
    next((tmp_path / f"{name}-images").iterdir()).unlink()
    assert read(name, tmp_path) == expected
    # a finished one is found again, without its source
    shutil.rmtree(tmp_path / name)
    assert read(name, tmp_path) == expected


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    source("pope", None, tmp_path / "pope")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_rows("pope", tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\n"
DAMAGES = [  # benchmark, form, file, what of it becomes what, what the error names
    ("vstar", "jsonl", "test_questions.jsonl", '"relative.*', "!", r"test_questions.jsonl.*\b2\b"),
    ("vstar", "jsonl", "test_questions.jsonl", "label", "lable", "test_questions.jsonl.*label"),
    ("vstar", "jsonl", "direct_attributes/sa_0.jpg", None, None, "sa_0.jpg"),
    ("cv-bench", "parquet", "test_2d.parquet", ".*", POINTER, "test_2d.parquet"),
    ("hrbench-4k", "tsv", "hr_bench_4k.tsv", ".{9}$", "!", "hr_bench_4k.tsv"),
    ("mme-realworld", "json", "images.tar.gz.part_ab", None, None, "images.tar.gz"),
    ("mmvp", "Index", "Questions.csv", None, None, r"mmvp.*Questions\.csv"),  # no form is left
    (
        "mme-realworld-lite",
        "tsv image",
        "mme_realworld_lite.tsv",
        r"', '\(B",
        "', ('(B",
        "lite.tsv",
    ),
    ("visualprobe", "json", "VisualProbe_Hard/val.json", ".{9}$", "!", "Hard.val.json"),
]


@pytest.mark.parametrize("name, form, file, old, new, message", DAMAGES)
def test_a_damaged_source_is_refused_by_name_and_leaves_nothing_that_looks_converted(
    name, form, file, old, new, message, tmp_path
):
    source(name, form, tmp_path / name)
    path = tmp_path / name / file
    if old:
        put(path, re.sub(old, new, path.read_text("latin-1"), flags=re.DOTALL))
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        read_rows(name, tmp_path)
    assert not (tmp_path / f"{name}.jsonl").exists()


@every_benchmark
def test_an_absent_source_is_fetched_and_one_that_broke_off_is_fetched_again(
    name, tmp_path, monkeypatch
):
    expected, asked, cut_off = source(name, None, tmp_path / "hub"), [], True
    repos = sources.BENCHES[name]["repos"]

    def download(repo_id, repo_type, local_dir, allow_patterns):
        asked.append((repo_id, repo_type))
        hub = tmp_path / "hub" / (repo_id.split("/")[1] if len(repos) > 1 else "")
        for path in filter(Path.is_file, sorted(hub.glob(allow_patterns or "**/*"))):
            put(local_dir / path.relative_to(hub), path.read_bytes())
            if cut_off:
                raise ConnectionError("connection reset")
        return local_dir

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=f"root/{name}.*{repos[0]}.*connection reset"):
        read_rows(name, tmp_path / "root")
    cut_off = False
    assert read(name, tmp_path / "root") == expected
    assert asked == [(repo, "dataset") for repo in (repos[0], *repos)]


# ------------------------------------------------------------------------ benchmarks of one's own


def own(folder: Path, content: str) -> list[dict]:
    """The questions of a file in the neutral form."""
    put(folder / "signs.jsonl", content)
    return read_rows(str(folder / "signs.jsonl"), folder)


def test_a_benchmark_of_ones_own_is_read_from_its_file(tmp_path):
    first = row("What ?", "A", "images/0.png", COLOURS, "hard", crop="1.png")
    second = row("Is it ?", "yes", "2.png", {}, "easy", "yn") | {"id": "x"}
    path = tmp_path / "mine/signs.jsonl"
    table(path, [first, second])
    images = {name: picture(n) for n, name in enumerate(("images/0.png", "1.png", "2.png"))}
    for name, content in images.items():
        put(path.parent / name, content)
    first |= {"id": "0", "image": images["images/0.png"], "crops": [images["1.png"]]}
    assert read(str(path), tmp_path) == [first, second | {"image": images["2.png"]}]


GOOD = {"id": "x", "prompt": "?", "image": "a.png", "answer": "A", "options": COLOURS}


def test_numbers_may_stand_where_texts_are_meant_and_other_keys_mean_nothing(tmp_path):
    rows = [
        GOOD | {"kind": "free", "id": 7, "answer": 3, "group": 2, "pair": 0},
        GOOD | {"id": None, "answer": " a ", "error": None, "calls": 3, "output": "A"},
        GOOD | {"id": 8, "kind": "yn", "answer": " Yes "},
    ]
    found = own(tmp_path, "\ufeff" + lines(rows))
    told = [[r[key] for key in ("id", "answer", "group", "pair")] for r in found]
    assert told == [["7", "3", "2", "0"], ["1", "A", None, None], ["8", "yes", None, None]]
    assert set(found[1]) == set(KEYS)


@pytest.mark.parametrize(
    "second, message",
    [
        (GOOD | {"options": {"red": "red", "blue": "blue"}}, "options are"),
        (GOOD | {"options": ["red", "blue"]}, "Expected different letters"),
        (GOOD | {"options": {"A": None}}, "options are"),
        (GOOD | {"options": {"A": {"x": 1}}}, "options are"),
        (GOOD | {"options": {"A": True}}, "options are"),
        (GOOD | {"options": {"A": "red", "a": "blue"}}, "options are"),
        (GOOD | {"kind": "free", "answer": []}, "answer is"),
        (GOOD | {"kind": "free", "answer": ["", ""]}, "answer is"),
        (GOOD, "twice: 'x'"),
        (GOOD | {"answer": "E"}, "'E'"),
        (GOOD | {"kind": "odd"}, "'odd'"),
        ({"id": "y", "prompt": "?"}, "no image"),
        ([], "no image"),
        (GOOD | {"answer": ["A", "B"]}, r"answer is \['A', 'B'\]"),
        (GOOD | {"answer": {"A": 1}}, "answer is {'A': 1}"),
        (GOOD | {"answer": True}, "answer is True"),
        (GOOD | {"answer": math.nan}, "answer is nan"),
        (GOOD | {"answer": math.inf}, "answer is inf"),
        (GOOD | {"options": {"A": "red", "B": math.inf}}, "options are"),
        (GOOD | {"prompt": ["?"]}, r"prompt is \['\?'\]"),
        (GOOD | {"image": 5}, "image or crop is 5"),
        (GOOD | {"crop": ["a.png"]}, "image or crop is"),
        (GOOD | {"crops": "a.png"}, "crops is 'a.png'"),
    ],
)
def test_a_broken_row_in_such_a_file_is_named(second, message, tmp_path):
    with pytest.raises(ValueError, match=rf"signs\.jsonl, row 2: .*{message}"):
        own(tmp_path, lines([GOOD, second]))


def test_a_list_of_answers_means_any_of_them(tmp_path):
    free = GOOD | {"kind": "free", "answer": ["red", "dark\nred", "12"]}
    (question,) = own(tmp_path, lines([free]))
    assert question["answer"] == "red\ndark red\n12"


@pytest.mark.parametrize(
    "content, where", [("\n", "no rows"), ('{"id": "pro', "row 1: "), ("[" * 100_000, "row 1: ")]
)
def test_a_file_without_rows_or_with_a_torn_one_is_refused(content, where, tmp_path):
    with pytest.raises(ValueError, match=f"signs.jsonl.*{where}"):
        own(tmp_path, content)


@pytest.mark.parametrize(
    "text, texts",
    [
        ("Which?\nA. red\nB. blue\nC. green\nAnswer with A. or B. only.", ["red", "blue", "green"]),
        ("A. x B. y\n(A) red (B) blue", ["red", "blue"]),  # of two, the last
        ("A. x", []),
    ],
)
def test_the_options_of_a_question_are_its_longest_list(text, texts):
    assert sources.inline_options(text) == dict(zip("ABC", texts, strict=False))


def test_a_folder_of_triplets_is_a_benchmark_with_crops(tmp_path):
    folder = scenes.draw(tmp_path / "toy", 2, 0, split="eval")
    for question, triplet in zip(
        read_rows(str(folder), tmp_path), read_triplets(folder), strict=True
    ):
        same = {"id", "answer", "image", "crops"}
        assert {key: question[key] for key in same} == {key: vars(triplet)[key] for key in same}
        assert (question["prompt"], question["kind"]) == (triplet.question, "exact")


@pytest.mark.parametrize(
    "flaw, found", [({"answer": None}, ", row 2: .*answer"), ({"bbox": 3}, "/train.jsonl, line 2")]
)
def test_a_bad_line_of_triplets_is_named_once(flaw, found, tmp_path):
    folder = scenes.draw(tmp_path / "toy", 2, 0, split="eval")
    first, second = map(json.loads, (folder / "train.jsonl").open())
    put(folder / "train.jsonl", lines([first, second | flaw]))
    with pytest.raises(ValueError, match=f"^{folder}{found}"):
        read_rows(str(folder), tmp_path)
