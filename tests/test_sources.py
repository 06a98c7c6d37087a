"""The public benchmarks: small files in each source's own layout, what they are converted to, and
the figures computed from answers.

Every source below is written to a folder as its repository has it, and returns the rows it must
become (images as bytes).
"""

import base64
import csv
import io
import json
import math
import shutil
import sys
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import noise

import evaluate
import rollout
from benchmarks import sources
from storage.images import load_image
from toy import scenes
from triplets.format import read_triplets

KEYS = ("id", "prompt", "answer", "kind", "options", "group", "pair", "image", "crop")
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


def read_rows(name, root) -> list[dict]:
    return [vars(question) for question in sources.read_benchmark(name, root)]


def picture(seed: int, width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    noise(width, height, seed).save(file := io.BytesIO(), kind)
    return file.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def parquet(path: Path, rows: list[dict]) -> None:
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(arrow.Table.from_pylist(rows), path)


def separated(path: Path, rows: list[dict], delimiter: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def struct(image: bytes | None) -> dict | None:
    return image and {"bytes": image, "path": "image.png"}


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
        "crop": crop,
        "pair": pair,
    }


def read(name: str, root: Path) -> list[dict]:
    """The converted rows, with the bytes of their images."""
    return [
        {key: r[key].read_bytes() if isinstance(r[key], Path) else r[key] for key in KEYS}
        for r in read_rows(name, root)
    ]


# ------------------------------------------------------------------------------------------ sources


def vstar(folder: Path, form: str) -> list[dict]:
    rows = [
        {
            "text": "What color is the clock?\n(A) red\n(B) dark (very) blue\n(C) green\n(D) white"
            + LETTER,
            "label": "B",
            "category": "direct_attributes",
            "question_id": "0",
            "image": picture(1, kind="JPEG"),
        },
        {
            "text": "Is the dog left of the cat?\n(A) The dog is left.\n(B) The dog is right.",
            "label": "A",
            "category": "relative_position",
            "question_id": "1",
            "image": picture(2, kind="JPEG"),
        },
    ]
    if form == "parquet":
        parquet(
            folder / "data/test-00000-of-00001.parquet",
            [r | {"image": struct(r["image"])} for r in rows],
        )
    else:
        names = [f"{r['category']}/sa_{n}.jpg" for n, r in enumerate(rows)]
        put(
            folder / "test_questions.jsonl",
            lines([r | {"image": name} for r, name in zip(rows, names, strict=False)]),
        )
        for r, name in zip(rows, names, strict=False):
            put(folder / name, r["image"])
    options = [
        {"A": "red", "B": "dark (very) blue", "C": "green", "D": "white"},
        {"A": "The dog is left.", "B": "The dog is right."},
    ]
    return [
        row(r["text"].removesuffix(LETTER) + LETTER, r["label"], r["image"], o, r["category"])
        for r, o in zip(rows, options, strict=False)
    ]


def zoombench(folder: Path, form: str) -> list[dict]:
    rows = [
        ("How many boats?\nA. 7\nB. 9\nC. 11\nD. 13", "B", picture(1), picture(101, 20, 16), "mcq"),
        ("What hangs there?\n(A) a lamp\n(B) a bell", "(A)", picture(2, kind="JPEG"), None, "mcq"),
        ("What is written on the sign?", "27 km", picture(3), picture(102, 20, 16), "blank"),
    ]
    parquet(
        folder / "data/test.parquet",
        [
            {
                "id": n,
                "query": query,
                "response": response,
                "image": struct(image),
                "crop_image": struct(crop) or {"bytes": None, "path": None},
                "question_type": kind,
                "bbox": [1, 2, 3, 4],
            }
            for n, (query, response, image, crop, kind) in enumerate(rows)
        ],
    )
    options, answers = (
        [{"A": "7", "B": "9", "C": "11", "D": "13"}, {"A": "a lamp", "B": "a bell"}, {}],
        ["B", "A", "27 km"],
    )
    return [
        row(query, answer, image, o, kind, "mc" if o else "free", crop)
        for (query, _, image, crop, kind), answer, o in zip(rows, answers, options, strict=False)
    ]


def hrbench(folder: Path, form: str, size: str) -> list[dict]:
    rows, expected, names = [], [], ["red", "green", "blue", 'pink, "hot"']
    for n, (image, category) in enumerate(
        [(picture(1, 210, 170), "single"), (picture(2), "cross")]
    ):
        for cycle in range(4):  # the same image and question, the options turned round
            options = dict(zip("ABCD", names[cycle:] + names[:cycle], strict=False))
            answer, question = (
                next(letter for letter in options if options[letter] == "red"),
                f'What color\tis sign "{n}"?',
            )
            rows.append(
                {
                    "index": 4 * n + cycle,
                    "question": question,
                    "answer": answer,
                    "category": category,
                    **options,
                    "cycle_category": "ABCD"[cycle],
                    "image": text(image),
                }
            )
            expected.append(
                row(
                    question
                    + " Select from the following choices.\n"
                    + "\n".join(f"({letter}) {option}" for letter, option in options.items()),
                    answer,
                    image,
                    options,
                    category,
                )
            )
    assert len(rows[0]["image"]) > 131_072  # the csv module's default limit
    path = folder / f"hr_bench_{size}.{form}"
    parquet(path, rows) if form == "parquet" else separated(path, rows, "\t")
    return expected


def mme(folder: Path, form: str, chinese: bool = False) -> list[dict]:
    names = (
        ["红色", "蓝色", "绿色", "白色", "没有"]
        if chinese
        else ["red", "blue (dark)", "it's green", "white", "not in it"]
    )
    left, right = ("（", "）") if chinese else ("(", ") ")
    listed = [
        [f"{left}{letter}{right}{name}" for letter, name in zip("ABCDE", names, strict=False)],
        [f"({letter}) {name}" for letter, name in zip("ABCDE", names[::-1], strict=False)],
    ]
    rows = [
        {
            "index": 7 if chinese else n,
            "question": f"What color is car {n}?",
            "multi-choice options": listed[n % 2],  # CN repeats it
            "answer": "BED"[n],
            "category": ["Perception/Monitoring", "Reasoning/OCR", "Perception/OCR"][n],
            "l2-category": "vehicle",
            "image": picture(n, kind="JPEG"),
        }
        for n in range(3)
    ]
    if form == "parquet":
        for part in (0, 1):
            parquet(
                folder / f"data/train-0000{part}-of-00002.parquet",
                [
                    {key: r[key] for key in r if key != "image"} | {"bytes": text(r["image"])}
                    for r in (rows[:2], rows[2:])[part]
                ],
            )
    elif form.startswith("tsv"):
        column = form.removeprefix("tsv ")
        separated(
            folder / "mme_realworld_lite.tsv",
            [
                {key: r[key] for key in r if key != "image"} | {column: text(r["image"])}
                for r in rows
            ],
            "\t",
        )
    else:
        files = ["monitoring_images/0.jpg", "monitoring_images/1.jpg", "ocr_cc/2.jpg"]
        put(
            folder / f"MME_RealWorld{'_CN' * chinese}.json",
            json.dumps(
                [
                    {
                        "Question_id": f"{r['category']}/vehicle/000{r['index']}",
                        "Image": name,
                        "Text": r["question"],
                        "Ground truth": r["answer"],
                        "Answer choices": r["multi-choice options"],
                        "Category": "vehicle",
                        "Subtask": r["category"].split("/")[1],
                        "Task": r["category"].split("/")[0],
                    }
                    for r, name in zip(rows, files, strict=False)
                ]
            ),
        )
        for archive, chosen in (
            ("images", (0, 1)),
            ("ocr_cc", (2,)),
        ):  # one in two parts, one in one
            with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as tar:
                for n in chosen:
                    (member := tarfile.TarInfo(files[n])).size = len(rows[n]["image"])
                    tar.addfile(member, io.BytesIO(rows[n]["image"]))
            cut = 700 if archive == "images" else len(packed.getvalue())
            for part, content in (("aa", packed.getvalue()[:cut]), ("ab", packed.getvalue()[cut:])):
                if content:
                    put(folder / f"{archive}.tar.gz.part_{part}", content)
    return [
        row(
            (MME_CN if chinese else MME).format(
                r["question"], "\n".join(r["multi-choice options"])
            ),
            r["answer"],
            r["image"],
            dict(zip("ABCDE", names[::-1] if n % 2 else names, strict=False)),
            r["category"],
        )
        for n, r in enumerate(rows)
    ]


def mmvp(folder: Path, form: str) -> list[dict]:
    rows = [
        (
            f'Is "door" {n}, the blue one, open?',
            "(a) Open (b) Closed, locked",
            "(a)" if n % 2 else "(b)",
        )
        for n in range(4)
    ]
    separated(
        folder / "Questions.csv",
        [
            {form: n + 1, "Question": question, "Options": options, "Correct Answer": answer}
            for n, (question, options, answer) in enumerate(rows)
        ],
        ",",
    )
    for n in range(4):
        put(folder / f"MMVP Images/{n + 1}.jpg", picture(n, kind="JPEG"))
    return [
        row(
            f"{question} {options}",
            "BA"[n % 2],
            picture(n, kind="JPEG"),
            {"A": "Open", "B": "Closed, locked"},
            pair="0011"[n],
        )
        for n, (question, options, _) in enumerate(rows)
    ]


def cv_bench(folder: Path, form: str) -> list[dict]:
    rows = [
        {
            "idx": n,
            "type": kind,
            "task": task,
            "image": picture(n),
            "question": "How many?",
            "choices": ["0", "3", "1 (one)"],
            "prompt": f"How many dogs {n}? Select from the following choices.\n"
            "(A) 0\n(B) 3\n(C) 1 (one)",
            "answer": f"({'CAB'[n]})",
            "filename": f"img/{kind}/{task.lower()}/{n}.png",
            "source": "ADE20K",
        }
        for n, (kind, task) in enumerate([("2D", "Count"), ("2D", "Relation"), ("3D", "Depth")])
    ]
    if form == "parquet":
        for kind in ("2D", "3D"):
            parquet(
                folder / f"test_{kind.lower()}.parquet",
                [r | {"image": struct(r["image"])} for r in rows if r["type"] == kind],
            )
    else:
        put(
            folder / "test.jsonl",
            lines(
                [
                    {key: r[key] for key in r if key not in ("image", "filename")}
                    | {form.split()[1]: r["filename"]}
                    for r in rows
                ]
            ),
        )
        for r in rows:
            put(folder / r["filename"], r["image"])
    return [
        row(
            r["prompt"],
            r["answer"][1],
            r["image"],
            dict(zip("ABC", r["choices"], strict=False)),
            r["type"],
        )
        for r in rows
    ]


def mmstar(folder: Path, form: str) -> list[dict]:
    options = {"A": "large, round", "B": "small", "C": "B: none", "D": "12:30"}
    rows = [
        {
            "index": n,
            "question": f"How is the ball {n}?",
            "image": picture(n),
            "answer": "CA"[n],
            "category": ["coarse perception", "math"][n],
            "l2_category": "x",
        }
        for n in range(2)
    ]
    inline = "\nOptions: " + ", ".join(f"{letter}: {option}" for letter, option in options.items())
    if form == "parquet":
        parquet(folder / "mmstar.parquet", [r | {"question": r["question"] + inline} for r in rows])
    else:
        separated(
            folder / "MMStar.tsv", [r | options | {"image": text(r["image"])} for r in rows], "\t"
        )
    return [
        row(r["question"] + inline, r["answer"], r["image"], options, r["category"]) for r in rows
    ]


def pope(folder: Path, form: str) -> list[dict]:
    rows = [
        (f"Is there a {thing} in the image?", answer, group, picture(n % 2))
        for n, (thing, answer, group) in enumerate(
            [
                ("dog", "yes", "adversarial"),
                ("cat", "no", "adversarial"),
                ("car", "Yes", "popular"),
                ("cup", "no", "random"),
            ]
        )
    ]
    for part, chosen in enumerate((rows[:2], rows[2:3], rows[3:])):
        parquet(
            folder / f"data/test-0000{part}-of-00003.parquet",
            [
                {
                    "id": "0",
                    "question": question,
                    "answer": answer,
                    "category": group,
                    "image": struct(image),
                }
                for question, answer, group, image in chosen
            ],
        )
    return [
        row(
            question + "\nAnswer the question using a single word or phrase.",
            answer.lower(),
            image,
            None,
            group,
            "yn",
        )
        for question, answer, group, image in rows
    ]


def visualprobe(folder: Path, form: str) -> list[dict]:
    expected = []
    for level, listed in (
        ("Easy", ["VisualProbe_Easy/images/0.png", ["images/1.png"]]),
        ("Medium", [["VisualProbe_Medium/2.jpg"]]),
        ("Hard", ["images/0.png"]),
    ):
        rows, home = [], folder / f"VisualProbe_{level}"
        for name in listed:
            n = len(expected)
            rows.append(
                {
                    "doc_id": n,
                    "images": name,
                    "problem": f"<image>\nWhat number is on bus {n}?",
                    "solution": f"bus {n}",
                }
            )
            path = (name if isinstance(name, str) else name[0]).removeprefix(home.name + "/")
            put(home / path, picture(n))
            expected.append(
                row(f"What number is on bus {n}?", f"bus {n}", picture(n), None, level, "free")
            )
        put(home / "val.json", json.dumps(rows))
    return expected


SOURCES = {  # what writes it, its repository, its forms: the hub's first
    "vstar": (vstar, "lmms-lab/vstar-bench", ["parquet", "jsonl"]),
    "zoombench": (zoombench, "inclusionAI/ZoomBench", ["parquet"]),
    "hrbench-4k": (partial(hrbench, size="4k"), "DreamMr/HR-Bench", ["parquet", "tsv"]),
    "hrbench-8k": (partial(hrbench, size="8k"), "DreamMr/HR-Bench", ["parquet", "tsv"]),
    "mme-realworld": (mme, "yifanzhang114/MME-RealWorld-Lmms-eval", ["parquet", "json"]),
    "mme-realworld-cn": (
        partial(mme, chinese=True),
        "yifanzhang114/MME-RealWorld-CN-Lmms-eval",
        ["parquet", "json"],
    ),
    "mme-realworld-lite": (
        mme,
        "yifanzhang114/MME-RealWorld-lite-lmms-eval",
        ["parquet", "tsv image", "tsv bytes"],
    ),
    "mmvp": (mmvp, "MMVP/MMVP", ["Index", "lndex"]),
    "mmstar": (mmstar, "Lin-Chen/MMStar", ["parquet", "tsv"]),
    "cv-bench": (cv_bench, "nyu-visionx/CV-Bench", ["parquet", "jsonl image", "jsonl filename"]),
    "pope": (pope, "lmms-lab/POPE", ["parquet"]),
    "visualprobe": (visualprobe, "Mini-o3/VisualProbe_Easy", ["json"]),
}
FORMS = [(name, form) for name, (_, _, forms) in SOURCES.items() for form in forms]
every_source = pytest.mark.parametrize("name, form", FORMS, ids=map(" as ".join, FORMS))
every_benchmark = pytest.mark.parametrize("name", SOURCES)


def source(name: str, form: str | None, folder: Path) -> list[dict]:
    """Write a benchmark's source, in the hub's form or another; the rows it must become."""
    write, _, forms = SOURCES[name]
    rows = write(folder, form or forms[0])
    return [{"id": f"{name}/{n}", **r} for n, r in enumerate(rows)]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail(f"downloads {a or k}")
    )


# --------------------------------------------------------------------------------------- conversion


@every_source
def test_a_source_becomes_rows_with_its_own_images_byte_for_byte(name, form, tmp_path):
    expected, found = source(name, form, tmp_path / name), read(name, tmp_path)
    if (name, form) == (
        "mmstar",
        "tsv",
    ):  # its prompt is not the official one: it has to say all of it
        for r, e in zip(found, expected, strict=False):
            assert all(
                part in r["prompt"] for part in [e["prompt"].split("\n")[0], *e["options"].values()]
            )
            r["prompt"] = e["prompt"]
    assert found == expected
    images = {r[view] for r in expected for view in ("image", "crop")} - {None}
    stored = [path for path in (tmp_path / f"{name}-images").rglob("*") if path.is_file()]
    assert (
        len(stored) == len(images) and {path.read_bytes() for path in stored} == images
    )  # a repeated one is there once


@every_source
def test_an_interrupted_conversion_starts_over_and_a_finished_one_is_found_again_without_its_source(
    name, form, tmp_path
):
    source(name, form, tmp_path / name)
    first, images = (
        read(name, tmp_path),
        [r["image"] for r in read_rows(name, tmp_path)],
    )
    (tmp_path / f"{name}.jsonl").unlink()
    images[-1].rename(images[-1].with_suffix(".part"))
    assert read(name, tmp_path) == first
    shutil.rmtree(tmp_path / name)
    assert read(name, tmp_path) == first


@every_source
def test_without_pyarrow_a_parquet_source_says_what_to_install_and_the_others_work(
    name, form, tmp_path, monkeypatch
):
    expected = source(name, form, tmp_path / name)
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    if form != "parquet":
        assert [r["answer"] for r in read(name, tmp_path)] == [r["answer"] for r in expected]
    else:
        with pytest.raises((ImportError, ValueError), match="pip install pyarrow"):
            read_rows(name, tmp_path)


def replaced(old: str, new: str):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def cut(path: Path) -> None:
    path.write_text(path.read_text()[:-40] + "!\n")


def rewritten(text: str):
    return lambda path: path.write_text(text)


def without_columns(path: Path) -> None:
    parquet(path, [{"image": b"", "answer": "A", "category": ""}])


LITE = "mme_realworld_lite.tsv"
QUESTIONS = "test_questions.jsonl"
POINTER = rewritten("version https://git-lfs.github.com/spec/v1\n")
NO_LIST = replaced("['(A)", "['(A)', (")
DAMAGES = [  # benchmark, form, what is damaged and how, what the error names
    ("vstar", "jsonl", QUESTIONS, cut, QUESTIONS + r".*\b2\b"),
    ("vstar", "jsonl", QUESTIONS, replaced("label", "lable"), QUESTIONS + ".*label"),
    ("vstar", "jsonl", "direct_attributes/sa_0.jpg", Path.unlink, "sa_0.jpg"),
    ("cv-bench", "parquet", "test_2d.parquet", POINTER, "test_2d.parquet"),
    ("mmstar", "parquet", "mmstar.parquet", without_columns, "mmstar.parquet.*question"),
    ("hrbench-4k", "tsv", "hr_bench_4k.tsv", cut, "hr_bench_4k.tsv"),
    ("mmvp", "Index", "Questions.csv", rewritten("Index,Question\n1,open?\n"), ".csv.*Options"),
    ("mmvp", "Index", "MMVP Images/3.jpg", Path.unlink, "3.jpg"),
    ("mme-realworld", "json", "images.tar.gz.part_ab", Path.unlink, "images.tar.gz|monitoring"),
    ("mme-realworld", "json", "ocr_cc.tar.gz.part_aa", Path.unlink, "ocr_cc/2.jpg"),
    ("mme-realworld-lite", "tsv image", LITE, NO_LIST, LITE),
    ("visualprobe", "json", "VisualProbe_Hard/val.json", cut, "VisualProbe_Hard.val.json"),
]


@pytest.mark.parametrize("name, form, file, damage, message", DAMAGES)
def test_a_damaged_source_is_refused_by_name_and_leaves_nothing_that_looks_converted(
    name, form, file, damage, message, tmp_path
):
    source(name, form, tmp_path / name)
    damage(tmp_path / name / file)
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        read_rows(name, tmp_path)
    assert not (tmp_path / f"{name}.jsonl").exists()


@every_benchmark
def test_an_absent_source_is_fetched_from_its_repository(name, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    expected, asked = source(name, None, tmp_path / "hub"), []

    def download(repo_id, *, repo_type, local_dir, allow_patterns=None, **rest):
        asked.append((repo_id, repo_type))
        hub = tmp_path / "hub" / (repo_id.split("/")[1] if name == "visualprobe" else "")
        there = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
        for file in filter_repo_objects(there, allow_patterns=allow_patterns):
            put(Path(local_dir) / file, (hub / file).read_bytes())
        return str(local_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read(name, tmp_path / "root") == expected
    levels = ("Easy", "Medium", "Hard") if name == "visualprobe" else ("Easy",)
    assert asked == [(SOURCES[name][1].replace("Easy", level), "dataset") for level in levels]


@every_benchmark
def test_without_a_connection_the_error_names_the_repository_and_where_to_put_the_files(
    name, tmp_path, monkeypatch
):
    def download(*args, **rest):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError) as error:
        read_rows(name, tmp_path)
    assert SOURCES[name][1] in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_download_that_broke_off_is_not_taken_for_the_whole_benchmark(tmp_path, monkeypatch):
    expected = source("pope", "parquet", tmp_path / "hub")

    parts = sorted((tmp_path / "hub/data").iterdir())

    def download(some: list[Path], repo_id, *, local_dir, **rest):
        for path in some:
            put(Path(local_dir) / "data" / path.name, path.read_bytes())
        if some != parts:
            raise ConnectionError("connection reset")
        return local_dir

    monkeypatch.setattr("huggingface_hub.snapshot_download", partial(download, parts[:1]))
    with pytest.raises(FileNotFoundError):
        read_rows("pope", tmp_path / "root")
    monkeypatch.setattr("huggingface_hub.snapshot_download", partial(download, parts))
    assert read("pope", tmp_path / "root") == expected


def test_a_folder_that_holds_no_known_form_is_refused_with_what_was_expected(tmp_path):
    put(tmp_path / "mmvp/readme.txt", "questions?")
    with pytest.raises((ValueError, FileNotFoundError), match=r"(?s)mmvp.*Questions\.csv"):
        read_rows("mmvp", tmp_path)


# ------------------------------------------------------------------------ benchmarks of one's own


def own(root: Path, name: str, rows: list[dict]) -> list[dict]:
    """root/name.jsonl in the neutral form, an image of its own in every row and a crop where the
    row has crop=True."""
    filled = []
    for n, r in enumerate(rows):
        full = {"id": f"{name}/{n}", "prompt": f"question {n}", "kind": "mc", "options": {}} | r
        if full["kind"] == "mc":
            full["options"] = COLOURS
        full["image"] = f"{name}-images/image{n}.png"
        put(root / full["image"], picture(n, 8, 8))
        if full.pop("crop", False):
            full["crop"] = f"{name}-images/crop{n}.png"
            put(root / full["crop"], picture(1000 + n, 8, 8))
        filled.append(full)
    put(root / f"{name}.jsonl", lines(filled))
    return filled


def test_a_benchmark_of_ones_own_is_read_from_its_file(tmp_path):
    easy = {"answer": "yes", "kind": "yn", "group": "easy"}
    rows = own(tmp_path / "mine", "signs", [{"answer": "A", "crop": True}, easy])
    found = read(str(tmp_path / "mine/signs.jsonl"), tmp_path)
    rows[0] |= {"image": picture(0, 8, 8), "crop": picture(1000, 8, 8)}
    rows[1] |= {"image": picture(1, 8, 8)}
    empty = dict.fromkeys(KEYS)
    assert found == [empty | r for r in rows]


def test_numbers_may_stand_where_texts_are_meant_and_other_keys_mean_nothing(tmp_path):
    free = {"prompt": "how many ?", "image": "a.png", "kind": "free", "answer": 3}
    rows = [
        free | {"id": 7, "group": 2, "pair": 0},
        free | {"answer": " a ", "kind": "mc", "error": None, "calls": 3, "output": "A"},
        free | {"answer": " Yes ", "kind": "yn", "id": None},
    ]
    rows[1]["options"] = COLOURS
    put(tmp_path / "own.jsonl", "\ufeff" + lines(rows))
    number, *rest = read_rows(str(tmp_path / "own.jsonl"), tmp_path)
    told = [number[key] for key in ("id", "answer", "group", "pair")]
    assert told == ["7", "3", "2", "0"]
    assert [(row["id"], row["answer"]) for row in rest] == [("1", "A"), ("2", "yes")]
    assert set(number) == set(KEYS)


GOOD = {"id": "x", "prompt": "?", "image": "a.png", "kind": "mc", "answer": "A"}


@pytest.mark.parametrize(
    "second, message",
    [
        (GOOD | {"options": {"red": "red", "blue": "blue"}}, "row 2: options are called"),
        (GOOD | {"options": ["red", "blue"]}, "row 2: options are .*Expected letters"),
        (GOOD | {"options": COLOURS}, "row 2: .*twice: 'x'"),
        (GOOD | {"options": COLOURS, "answer": "E"}, "row 2: .*'E'"),
        (GOOD | {"kind": "odd"}, "row 2: .*'odd'"),
        (GOOD | {"answer": ["A", "B"]}, r"row 2: answer is \['A', 'B'\]"),
        (GOOD | {"answer": {"A": 1}}, "row 2: answer is {'A': 1}"),
        (GOOD | {"answer": True}, "row 2: answer is True"),
        (GOOD | {"answer": math.nan}, "row 2: answer is nan"),
        (GOOD | {"prompt": ["?"]}, r"row 2: prompt is \['\?'\]"),
        (GOOD | {"prompt": "half a \ud83d"}, "row 2: half a character"),
        (GOOD | {"image": 5}, "row 2: image or crop is"),
        (GOOD | {"crop": ["a.png"]}, "row 2: image or crop is"),
        ({"id": "y", "prompt": "?"}, r"\b2\b"),
        ([], r"\b2\b"),
        (None, r"\b2\b"),
    ],
)
def test_a_broken_row_in_such_a_file_is_named(second, message, tmp_path):
    written = json.dumps(second) if second is not None else '{"id": "signs/1", "pro'
    put(tmp_path / "signs.jsonl", lines([GOOD | {"options": COLOURS}]) + written)
    with pytest.raises(ValueError, match=rf"signs\.jsonl.*{message}"):
        read_rows(str(tmp_path / "signs.jsonl"), tmp_path)


def test_deep_json_in_such_a_file_is_a_row_with_an_error(tmp_path):
    put(tmp_path / "signs.jsonl", lines([GOOD | {"options": COLOURS}]) + "[" * 100_000)
    with pytest.raises(ValueError, match=r"signs\.jsonl, row 2"):
        read_rows(str(tmp_path / "signs.jsonl"), tmp_path)


def test_a_list_of_answers_means_any_of_them(tmp_path):
    row = GOOD | {"kind": "free", "answer": ["red", "dark\nred", "12"]}
    put(tmp_path / "signs.jsonl", lines([row]))
    question = sources.read_benchmark(str(tmp_path / "signs.jsonl"), tmp_path)[0]
    assert question.answer == "red\ndark red\n12"


def test_a_file_without_rows_is_refused(tmp_path):
    put(tmp_path / "signs.jsonl", "\n")
    with pytest.raises(ValueError, match="signs.jsonl"):
        read_rows(str(tmp_path / "signs.jsonl"), tmp_path)


def test_the_options_of_a_question_are_its_longest_list():
    listed = "Which?\nA. red\nB. blue\nC. green\n"
    found = sources.inline_options(listed + "Answer with A. or B. only.")
    assert found == {"A": "red", "B": "blue", "C": "green"}
    # of two, the last
    found = sources.inline_options("A. x B. y\n(A) red (B) blue")
    assert found == {"A": "red", "B": "blue"}


def test_a_folder_of_triplets_is_a_benchmark_with_crops(tmp_path):
    folder = scenes.draw(tmp_path / "toy", 2, 0, split="eval")
    questions = sources.read_benchmark(str(folder), tmp_path)
    for question, triplet in zip(questions, read_triplets(folder), strict=True):
        assert (question.prompt, question.answer) == (triplet.question, triplet.answer)
        assert (question.image, question.crop) == (triplet.image, triplet.crop)


def test_a_broken_line_of_triplets_is_named_once_and_a_missing_answer_by_its_row(tmp_path):
    file = scenes.draw(tmp_path / "toy", 2, 0, split="eval") / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(lines([rows[0], rows[1] | {"answer": None}]))
    with pytest.raises(ValueError, match=r"row 2: .*answer"):
        read_rows(str(file.parent), tmp_path)
    file.write_text(lines([rows[0], rows[1] | {"bbox": 3}]))
    with pytest.raises(ValueError, match=rf"^{file}, line 2"):
        read_rows(str(file.parent), tmp_path)


# ----------------------------------------------------------------------------------------- figures


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """evaluated(name, replies): result.json's part about a benchmark for a model that says these
    (a text or a Reply), row by row. Of a None the image is cut off. Every reply is given to its own
    image and prompt only."""

    def go(name: str, replies: list, crop: list = (), flags: str = "") -> dict:
        said = {}
        rows = read_rows(name, tmp_path)
        shown = [(r["image"], r["prompt"], reply) for r, reply in zip(rows, replies, strict=True)]
        shown += [
            (r["crop"], r["prompt"], reply)
            for r, reply in zip(rows, crop, strict=False)
            if r["crop"]
        ]
        for image, prompt, reply in shown:
            if reply is None:
                image.write_bytes(image.read_bytes()[:50])
                continue
            if isinstance(reply, str):
                reply = rollout.Reply(reply, 10, False)
            said[load_image(image).tobytes(), prompt] = reply

        def answers(model, processor, images, prompts, max_new_tokens):
            asked = zip(images, prompts, strict=True)
            return [said[image.tobytes(), prompt] for image, prompt in asked]

        monkeypatch.setattr("rollout.answers", answers)
        monkeypatch.setattr("model.load", lambda path, **how: (torch.nn.Linear(1, 1), None))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        flags += f" --bench {name} --model m --data-root {tmp_path} --out {tmp_path}/out"
        evaluate.main([*flags.split(), "--device", "cpu"])
        return json.loads((tmp_path / "out/result.json").read_text())["benches"][name]

    return go


@every_source
def test_a_model_that_is_always_right_scores_everything_and_a_wrong_one_nothing(
    name, form, tmp_path, evaluated
):
    rows = source(name, form, tmp_path / name)
    free = any(r["kind"] == "free" for r in rows)
    other = {"yes": "no", "no": "yes", "A": "B"}
    wrong = ["99" if free else other.get(r["answer"], "A") for r in rows]
    groups = Counter(r["group"] for r in rows if r["group"])
    for accuracy, replies in ((1, [r["answer"] for r in rows]), (0, wrong)):
        full = evaluated(name, replies)["full"]
        counts = {"n": len(rows), "right": accuracy * len(rows), "accuracy": accuracy}
        assert full == full | counts | {"errors": 0, "judged": 0, "truncated": 0}
        if not any(r["kind"] == "free" for r in rows):  # those are a judge's, officially
            assert (full["official"], full["unparsed"]) == (accuracy, 0)
        assert {group: g["n"] for group, g in full["groups"].items()} == groups


def test_wrong_unparsed_truncated_and_unreadable_rows_are_counted_apart(tmp_path, evaluated):
    groups = ["near", "near", "far", "far", "near", "far", "far", "far"]
    own(
        tmp_path,
        "vstar",
        [
            {"answer": answer, "group": group}
            for answer, group in zip("ABCBADBA", groups, strict=False)
        ],
    )
    replies = [
        # right by both rules, but for the last: the first capital is an A
        *["A", "The best answer is (B).", "Answer: C"],
        "blue",  # right by its text; officially there is no letter
        *["B", "I cannot tell."],  # wrong; unparsed
        rollout.Reply("<think> it may be", 80, True),  # while thinking, so unparsed too
        None,  # an unreadable image: no answer, so not in n
    ]
    full = evaluated("vstar", replies)["full"]
    counts = {"n": 7, "right": 4, "unparsed": 2, "judged": 0, "truncated": 1, "errors": 1}
    assert full == full | counts
    assert full["accuracy"] == pytest.approx(4 / 7)
    assert full["official"] == pytest.approx(2 / 7)
    assert full["groups"] == {
        "near": {"n": 3, "right": 2, "accuracy": pytest.approx(2 / 3)},
        "far": {"n": 4, "right": 2, "accuracy": 0.5},
    }
    assert full["tokens"] == 20  # (6 * 10 + 80) / 7
    assert full["seconds"] >= 0


@pytest.mark.parametrize(
    "name, groups, replies, accuracy",
    [  # every answer is A; but for the last two, what follows is never right over n
        ("cv-bench", "2D 2D 3D 3D 3D 3D", "ABAAAB", 0.625),  # (1/2 + 3/4) / 2
        ("visualprobe", "Easy Medium Medium Hard Hard Hard", "AABBBB", 0.5),  # (1 + 1/2 + 0) / 3
        ("hrbench-8k", "single single cross cross cross cross", "ABAAAB", 4 / 6),  # of all rows
        ("mme-realworld-cn", "a a b b b b", "ABAAAB", 4 / 6),
    ],
)
def test_the_headline_is_the_papers(name, groups, replies, accuracy, tmp_path, evaluated):
    own(tmp_path, name, [{"answer": "A", "group": group} for group in groups.split()])
    full = evaluated(name, list(replies))["full"]
    assert full["accuracy"] == pytest.approx(accuracy)
    assert full["interval"][0] < accuracy < full["interval"][1]
    assert (full["n"], full["right"]) == (6, replies.count("A"))
    assert set(full["groups"]) == set(groups.split())


def test_pope_has_precision_recall_and_f1_of_yes(tmp_path, evaluated):
    gold = ["yes"] * 4 + ["no"] * 4 + ["yes"]
    groups = ["random", "popular", "adversarial"] * 3
    rows = [
        {"answer": a, "kind": "yn", "group": group} for a, group in zip(gold, groups, strict=False)
    ]
    own(tmp_path, "pope", rows)
    replies = [
        *["Yes", "**Answer: Yes**", "yes, there is.", "Perhaps."],  # 3 hits, 1 miss (unparsed)
        *["Yes.", "yes", "No", "There is no dog in the image."],  # 2 false alarms, 2 right
        None,  # unreadable
    ]
    full = evaluated("pope", replies)["full"]
    assert full == full | {"n": 8, "right": 5, "unparsed": 1, "errors": 1, "accuracy": 5 / 8}
    assert full["precision"] == pytest.approx(3 / 5)
    assert full["recall"] == pytest.approx(3 / 4)
    assert full["f1"] == pytest.approx(2 / 3)  # 2 * (3/5 * 3/4) / (3/5 + 3/4) = 0.9 / 1.35
    assert full["yes_rate"] == pytest.approx(5 / 8)  # 5 times yes in 8 answers
    counts = {group: (g["right"], g["n"]) for group, g in full["groups"].items()}
    assert counts == {"random": (2, 3), "popular": (2, 3), "adversarial": (1, 2)}


def test_an_mmvp_pair_is_right_when_both_of_it_are(tmp_path, evaluated):
    own(tmp_path, "mmvp", [{"answer": "A", "pair": str(n // 2)} for n in range(6)])
    full = evaluated("mmvp", list("AAABBA"))["full"]  # pairs: both, the first, the second
    assert full["accuracy"] == pytest.approx(4 / 6)
    assert full["pair_accuracy"] == pytest.approx(1 / 3)


def test_the_gap_is_over_the_rows_answered_in_both_views(tmp_path, evaluated):
    own(tmp_path, "zoombench", [{"answer": "A", "crop": n < 5, "group": "mcq"} for n in range(7)])
    replies, crop = ["A", "B", "B", "A", None, "A", "A"], ["A", "A", "B", None, "A", "", ""]
    # rows 5 and 6 have no crop: no error, just not in this view
    bench = evaluated("zoombench", replies, crop, "--view both")
    assert bench["full"] == bench["full"] | {"n": 6, "right": 4, "errors": 1}  # rows 0, 3, 5, 6
    assert bench["crop"] == bench["crop"] | {"n": 4, "right": 3, "errors": 1}  # rows 0, 1, 4
    low, high = bench["gap"].pop("interval")
    third = pytest.approx(1 / 3)  # rows 0, 1, 2; and not 3/4 - 4/6
    want = {"n": 3, "full": third, "crop": pytest.approx(2 / 3), "gap": third}
    assert bench["gap"] == bench["gap"] | want
    assert -1 <= low < 1 / 3 < high <= 1
