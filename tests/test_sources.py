"""The public benchmarks: small files in each source's own layout, what they are converted to, and the figures computed from answers.

Every source below is written to a folder as its repository has it, and returns the rows it must become (images as bytes).
"""

import base64
import csv
import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import noise
from PIL import Image

import benchmarks.sources as sources
import evaluate
import rollout
import storage.images as images
import toy.scenes as toy_scenes
import triplets.format as triplet_format

KEYS = ("id", "prompt", "answer", "kind", "options", "group", "pair", "image", "crop")
LETTER = "\nAnswer with the option's letter from the given choices directly."
MME = (
    "{} The choices are listed below:\n{}\nSelect the best answer to the above multiple-choice question based on the image. "
    "Respond with only the letter (A, B, C, D, or E) of the correct option.\nThe best answer is: "
)
MME_CN = "{} 选项如下所示:\n{}\n根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： "


# ---------------------------------------------------------------------------------------------------------------- helpers


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


# ---------------------------------------------------------------------------------------------------------------- sources


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
            lines([r | {"image": name} for r, name in zip(rows, names)]),
        )
        for r, name in zip(rows, names):
            put(folder / name, r["image"])
    options = [
        {"A": "red", "B": "dark (very) blue", "C": "green", "D": "white"},
        {"A": "The dog is left.", "B": "The dog is right."},
    ]
    return [
        row(r["text"].removesuffix(LETTER) + LETTER, r["label"], r["image"], o, r["category"])
        for r, o in zip(rows, options)
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
                "crop_image": struct(crop),
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
        for (query, _, image, crop, kind), answer, o in zip(rows, answers, options)
    ]


def hrbench(folder: Path, form: str, size: str) -> list[dict]:
    rows, expected, names = [], [], ["red", "green", "blue", 'pink, "hot"']
    for n, (image, category) in enumerate(
        [(picture(1, 210, 170), "single"), (picture(2), "cross")]
    ):
        for cycle in range(4):  # the same image and question, the options turned round
            options = dict(zip("ABCD", names[cycle:] + names[:cycle]))
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
        [f"{left}{letter}{right}{name}" for letter, name in zip("ABCDE", names)],
        [f"({letter}) {name}" for letter, name in zip("ABCDE", names[::-1])],
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
                    for r, name in zip(rows, files)
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
            dict(zip("ABCDE", names[::-1] if n % 2 else names)),
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
            "prompt": f"How many dogs {n}? Select from the following choices.\n(A) 0\n(B) 3\n(C) 1 (one)",
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
        row(r["prompt"], r["answer"][1], r["image"], dict(zip("ABC", r["choices"])), r["type"])
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


SOURCES = {  # (benchmark, form): what writes it; the hub's form first where it is parquet
    **{("vstar", form): vstar for form in ("parquet", "jsonl")},
    ("zoombench", "parquet"): zoombench,
    **{
        (f"hrbench-{size}", form): lambda folder, form, size=size: hrbench(folder, form, size)
        for size in ("4k", "8k")
        for form in ("parquet", "tsv")
    },
    **{("mme-realworld", form): mme for form in ("parquet", "json")},
    **{
        ("mme-realworld-cn", form): lambda folder, form: mme(folder, form, chinese=True)
        for form in ("parquet", "json")
    },
    **{("mme-realworld-lite", form): mme for form in ("parquet", "tsv image", "tsv bytes")},
    **{("mmvp", form): mmvp for form in ("Index", "lndex")},
    **{("mmstar", form): mmstar for form in ("parquet", "tsv")},
    **{("cv-bench", form): cv_bench for form in ("parquet", "jsonl image", "jsonl filename")},
    ("pope", "parquet"): pope,
    ("visualprobe", "json"): visualprobe,
}
FIRST = {name: form for name, form in reversed(SOURCES)}
REPOSITORIES = {
    "vstar": "lmms-lab/vstar-bench",
    "zoombench": "inclusionAI/ZoomBench",
    "hrbench-4k": "DreamMr/HR-Bench",
    "hrbench-8k": "DreamMr/HR-Bench",
    "mme-realworld": "yifanzhang114/MME-RealWorld-Lmms-eval",
    "mme-realworld-cn": "yifanzhang114/MME-RealWorld-CN-Lmms-eval",
    "mme-realworld-lite": "yifanzhang114/MME-RealWorld-lite-lmms-eval",
    "mmvp": "MMVP/MMVP",
    "cv-bench": "nyu-visionx/CV-Bench",
    "mmstar": "Lin-Chen/MMStar",
    "pope": "lmms-lab/POPE",
    "visualprobe": "Mini-o3/VisualProbe_Easy",
}
every_source = pytest.mark.parametrize("name, form", SOURCES, ids=map(" as ".join, SOURCES))
every_benchmark = pytest.mark.parametrize("name", FIRST)


def source(name: str, form: str, folder: Path) -> list[dict]:
    return [{"id": f"{name}/{n}", **r} for n, r in enumerate(SOURCES[name, form](folder, form))]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail(f"downloads {a or k}")
    )


# ------------------------------------------------------------------------------------------------------------- conversion


@every_source
def test_a_source_becomes_rows_with_its_own_images_byte_for_byte(name, form, tmp_path):
    expected, found = source(name, form, tmp_path / name), read(name, tmp_path)
    if (name, form) == (
        "mmstar",
        "tsv",
    ):  # its prompt is not the official one: it has to say all of it
        for r, e in zip(found, expected):
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


POINTER = "version https://git-lfs.github.com/spec/v1\n"


@pytest.mark.parametrize(
    "name, form, file, damage, message",
    [
        (
            "vstar",
            "jsonl",
            "test_questions.jsonl",
            lambda path: path.write_text(path.read_text() + '{"text": "cut'),
            r"test_questions\.jsonl, (line 3|row [23])\b",
        ),
        (
            "vstar",
            "jsonl",
            "test_questions.jsonl",
            lambda path: path.write_text(path.read_text().replace("label", "lable")),
            r"test_questions\.jsonl.*label",
        ),
        ("vstar", "jsonl", "direct_attributes/sa_0.jpg", Path.unlink, r"sa_0\.jpg"),
        (
            "cv-bench",
            "parquet",
            "test_2d.parquet",
            lambda path: path.write_text(POINTER),
            r"test_2d\.parquet",
        ),
        (
            "mmstar",
            "parquet",
            "mmstar.parquet",
            lambda path: parquet(path, [{"image": b"", "answer": "A", "category": ""}]),
            r"mmstar\.parquet.*question",
        ),
        (
            "hrbench-4k",
            "tsv",
            "hr_bench_4k.tsv",
            lambda path: path.write_text(path.read_text()[:-40] + "!\n"),
            r"hr_bench_4k\.tsv",
        ),
        (
            "mmvp",
            "Index",
            "Questions.csv",
            lambda path: path.write_text("Index,Question\n1,open?\n"),
            r"Questions\.csv.*Options",
        ),
        ("mmvp", "Index", "MMVP Images/3.jpg", Path.unlink, r"3\.jpg"),
        (
            "mme-realworld",
            "json",
            "images.tar.gz.part_ab",
            Path.unlink,
            r"images\.tar\.gz|monitoring_images",
        ),
        ("mme-realworld", "json", "ocr_cc.tar.gz.part_aa", Path.unlink, r"ocr_cc/2\.jpg"),
        (
            "mme-realworld-lite",
            "tsv image",
            "mme_realworld_lite.tsv",
            lambda path: path.write_text(path.read_text().replace("['(A)", "['(A)', (")),
            r"mme_realworld_lite\.tsv",
        ),
        (
            "visualprobe",
            "json",
            "VisualProbe_Hard/val.json",
            lambda path: path.write_text(path.read_text()[:-9]),
            r"VisualProbe_Hard.val\.json",
        ),
    ],
    ids=lambda value: "" if callable(value) else value,
)
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

    expected, asked = source(name, FIRST[name], tmp_path / "hub"), []

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
    assert asked == [(REPOSITORIES[name].replace("Easy", level), "dataset") for level in levels]


@every_benchmark
def test_without_a_connection_the_error_names_the_repository_and_where_to_put_the_files(
    name, tmp_path, monkeypatch
):
    def download(*args, **rest):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError) as error:
        read_rows(name, tmp_path)
    assert REPOSITORIES[name] in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_download_that_broke_off_is_not_taken_for_the_whole_benchmark(tmp_path, monkeypatch):
    expected = source("pope", "parquet", tmp_path / "hub")

    def download(repo_id, *, local_dir, whole, **rest):
        for path in sorted((tmp_path / "hub/data").iterdir())[: None if whole else 1]:
            put(Path(local_dir) / "data" / path.name, path.read_bytes())
        if not whole:
            raise ConnectionError("connection reset")
        return local_dir

    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: download(*a, **k, whole=False)
    )
    with pytest.raises(FileNotFoundError):
        read_rows("pope", tmp_path / "root")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: download(*a, **k, whole=True)
    )
    assert read("pope", tmp_path / "root") == expected


def test_a_folder_that_holds_no_known_form_is_refused_with_what_was_expected(tmp_path):
    put(tmp_path / "mmvp/readme.txt", "questions?")
    with pytest.raises((ValueError, FileNotFoundError), match=r"(?s)mmvp.*Questions\.csv"):
        read_rows("mmvp", tmp_path)


# ---------------------------------------------------------------------------------------------------- benchmarks of one's own


def own(root: Path, name: str, rows: list[dict]) -> list[dict]:
    """root/name.jsonl in the neutral form, an image of its own in every row and a crop where the row has crop=True."""
    filled = []
    for n, r in enumerate(rows):
        image, crop = (f"{name}-images/{view}{n}.png" for view in ("image", "crop"))
        put(root / image, picture(n, 8, 8))
        if r.get("crop"):
            put(root / crop, picture(1000 + n, 8, 8))
        filled.append(
            {
                "id": f"{name}/{n}",
                "prompt": f"question {n}",
                "kind": "mc",
                "group": None,
                "pair": None,
                **r,
                "image": image,
                "options": dict(zip("ABCD", ("red", "blue", "green", "white")))
                if r.get("kind", "mc") == "mc"
                else {},
                "crop": crop if r.get("crop") else None,
            }
        )
    put(root / f"{name}.jsonl", lines(filled))
    return filled


def test_a_benchmark_of_ones_own_is_read_from_its_file(tmp_path):
    rows = own(
        tmp_path / "mine",
        "signs",
        [{"answer": "A", "crop": True}, {"answer": "yes", "kind": "yn", "group": "easy"}],
    )
    found = read_rows(str(tmp_path / "mine/signs.jsonl"), tmp_path)
    for r, e in zip(found, rows, strict=True):
        assert {**{key: r[key] for key in KEYS}, "image": None, "crop": None} == {
            **e,
            "image": None,
            "crop": None,
        }
    assert found[0]["image"].read_bytes() == picture(0, 8, 8) and found[0][
        "crop"
    ].read_bytes() == picture(1000, 8, 8)


def test_numbers_may_stand_where_texts_are_meant(tmp_path):
    (tmp_path / "own.jsonl").write_text(
        json.dumps(
            {
                "id": 7,
                "image": "a.png",
                "prompt": "how many ?",
                "answer": 3,
                "kind": "free",
                "group": 2,
                "pair": 0,
            }
        )
    )
    (row,) = read_rows(str(tmp_path / "own.jsonl"), tmp_path)
    assert [row[key] for key in ("id", "answer", "group", "pair")] == ["7", "3", "2", "0"]


def test_keys_that_are_not_of_the_form_mean_nothing(tmp_path):
    rows = own(
        tmp_path,
        "signs",
        [
            {"answer": " a ", "error": None, "calls": 3, "output": "A"},
            {"answer": " Yes ", "kind": "yn"},
        ],
    )
    put(tmp_path / "signs.jsonl", "".join(json.dumps(row | {"id": None}) + "\n" for row in rows))
    first, second = read_rows(str(tmp_path / "signs.jsonl"), tmp_path)
    assert (
        first.keys()
        == second.keys()
        == {"id", "kind", "options", "image", "prompt", "answer", "crop", "group", "pair"}
    )
    assert [row["id"] for row in (first, second)] == ["0", "1"] and (
        first["answer"],
        second["answer"],
    ) == ("A", "yes")


def test_options_are_called_by_letters_and_ids_come_once(tmp_path):
    rows = own(tmp_path, "signs", [{"answer": "A"}, {"answer": "B"}])
    put(tmp_path / "signs.jsonl", json.dumps(rows[0] | {"options": {"red": "red", "blue": "blue"}}))
    with pytest.raises(
        ValueError,
        match=r"signs.jsonl, row 1: options are called \['red', 'blue'\]",
    ):
        read_rows(str(tmp_path / "signs.jsonl"), tmp_path)
    put(tmp_path / "signs.jsonl", json.dumps(rows[0] | {"options": ["red", "blue"]}))
    with pytest.raises(
        ValueError,
        match=r"row 1: options are \['red', 'blue'\]. Expected letters and texts, such as",
    ):
        read_rows(str(tmp_path / "signs.jsonl"), tmp_path)
    put(tmp_path / "signs.jsonl", "\ufeff" + json.dumps(rows[0]))
    assert len(read_rows(str(tmp_path / "signs.jsonl"), tmp_path)) == 1
    put(tmp_path / "signs.jsonl", "".join(json.dumps(row | {"id": "x"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"2 rows, ids that come twice: \['x'\]"):
        read_rows(str(tmp_path / "signs.jsonl"), tmp_path)


def test_the_options_of_a_question_are_its_longest_list():
    listed = "Which?\nA. red\nB. blue\nC. green\n"
    assert sources.inline_options(listed + "Answer with A. or B. only.") == {
        "A": "red",
        "B": "blue",
        "C": "green",
    }
    assert sources.inline_options("A. x B. y\n" + "(A) red (B) blue") == {
        "A": "red",
        "B": "blue",
    }  # of two, the last


@pytest.mark.parametrize(
    "line", ['{"id": "signs/1", "pro', '{"id": "signs/1", "prompt": "?"}', "[]"]
)
def test_a_broken_line_in_such_a_file_is_named(line, tmp_path):
    own(tmp_path, "signs", [{"answer": "A"}])
    put(tmp_path / "signs.jsonl", (tmp_path / "signs.jsonl").read_text() + line)
    with pytest.raises(ValueError, match=r"signs\.jsonl.*\b2\b"):
        read_rows(str(tmp_path / "signs.jsonl"), tmp_path)


def test_a_folder_of_triplets_is_a_benchmark_with_crops(tmp_path):
    toy_scenes.draw(tmp_path / "toy", 2, 0, split="eval")
    rows = read_rows(str(tmp_path / "toy"), tmp_path)
    for r, triplet in zip(rows, triplet_format.read_triplets(tmp_path / "toy"), strict=True):
        assert [r[key] for key in ("prompt", "answer", "image", "crop")] == [
            getattr(triplet, key) for key in ("question", "answer", "image", "crop")
        ]


# ---------------------------------------------------------------------------------------------------------------- figures


def figures(
    monkeypatch,
    root: Path,
    name: str,
    replies: list[str | tuple | None],
    *flags: str,
    crop: list | None = None,
) -> dict:
    """result.json's part about `name` for a model that says `replies` (text, or text, tokens, ended), row by row.
    Of a None the image is cut off. Every reply is given to its own image and prompt only."""
    said = {}
    for view, texts in (("image", replies), ("crop", crop or [])):
        for r, reply in zip(read_rows(name, root), texts):
            if reply is None and r[view]:
                r[view].write_bytes(r[view].read_bytes()[:50])
            elif r[view]:
                said[images.load_image(r[view]).tobytes(), r["prompt"]] = (
                    reply if isinstance(reply, tuple) else (reply, 10, True)
                )

    def answers(model, processor, images: list[Image.Image], texts: list[str], max_new_tokens: int):
        replies = [
            said[image.tobytes(), prompt] for image, prompt in zip(images, texts, strict=True)
        ]
        return [rollout.Reply(text, tokens, not ended) for text, tokens, ended in replies]

    monkeypatch.setattr("rollout.answers", answers)
    monkeypatch.setattr("model.load", lambda path, *, device, dtype: (torch.nn.Linear(1, 1), None))
    evaluate.main(
        [
            "--bench",
            name,
            "--model",
            "m",
            "--data-root",
            str(root),
            "--out",
            str(root / "out"),
            "--device",
            "cpu",
            *flags,
        ]
    )
    return json.loads((root / "out/result.json").read_text())["benches"][name]


@every_source
def test_a_model_that_is_always_right_scores_everything_and_a_wrong_one_nothing(
    name, form, tmp_path, monkeypatch
):
    rows = source(name, form, tmp_path / name)
    other = {"yes": "no", "no": "yes", "A": "B"}
    for accuracy in (1.0, 0.0):
        replies = [
            r["answer"]
            if accuracy
            else "99"
            if r["kind"] == "free"
            else other.get(r["answer"], "A")
            for r in rows
        ]
        full = figures(monkeypatch, tmp_path, name, replies)["full"]
        assert full == full | {
            "n": len(rows),
            "right": accuracy * len(rows),
            "accuracy": accuracy,
            "errors": 0,
            "judged": 0,
            "truncated": 0,
        }
        if all(r["kind"] != "free" for r in rows):  # those are a judge's, officially
            assert full["official"] == accuracy and full["unparsed"] == 0
        assert {group: g["n"] for group, g in full["groups"].items()} == dict(
            Counter(r["group"] for r in rows if r["group"])
        )
        shutil.rmtree(tmp_path / "out")


def test_wrong_unparsed_truncated_and_unreadable_rows_are_counted_apart(tmp_path, monkeypatch):
    groups = ["near", "near", "far", "far", "near", "far", "far", "far"]
    own(
        tmp_path,
        "vstar",
        [{"answer": answer, "group": group} for answer, group in zip("ABCBADBA", groups)],
    )
    full = figures(
        monkeypatch,
        tmp_path,
        "vstar",
        [
            "A",
            "The best answer is (B).",
            "Answer: C",  # right by both rules, but for the last: the first capital is an A
            "blue",  # right by its text; officially there is no letter
            "B",
            "I cannot tell.",
            (
                "<think> it may be",
                80,
                False,
            ),  # wrong; unparsed; cut off while thinking, so unparsed too
            None,
        ],
    )["full"]  # an unreadable image: no answer, so not in n
    assert full == full | {
        "n": 7,
        "right": 4,
        "unparsed": 2,
        "judged": 0,
        "truncated": 1,
        "errors": 1,
    }
    assert full["accuracy"] == pytest.approx(4 / 7) and full["official"] == pytest.approx(2 / 7)
    assert full["groups"] == {
        "near": {"n": 3, "right": 2, "accuracy": pytest.approx(2 / 3)},
        "far": {"n": 4, "right": 2, "accuracy": 0.5},
    }
    assert full["tokens"] == 20 and full["seconds"] >= 0  # (6 * 10 + 80) / 7


def test_the_interval_is_wilsons(tmp_path, monkeypatch):
    own(tmp_path, "mmstar", [{"answer": "A"}] * 29)
    full = figures(monkeypatch, tmp_path, "mmstar", ["A"] + ["B"] * 28)["full"]
    assert full["interval"] == pytest.approx(
        [0.0061, 0.1718], abs=5e-5
    )  # 1 of 29: Newcombe 1998, Table I, method 3


@pytest.mark.parametrize(
    "name, groups, replies, accuracy",
    [  # every answer is A; what follows is never right over n
        (
            "cv-bench",
            ["2D", "2D", "3D", "3D", "3D", "3D"],
            "ABAAAB",
            0.625,
        ),  # (1/2 + 3/4) / 2, and not 4/6
        (
            "visualprobe",
            ["Easy", "Medium", "Medium", "Hard", "Hard", "Hard"],
            "AABBBB",
            0.5,
        ),  # (1 + 1/2 + 0) / 3, and not 2/6
        (
            "hrbench-8k",
            ["single", "single", "cross", "cross", "cross", "cross"],
            "ABAAAB",
            4 / 6,
        ),  # of all rows: 4/6
        ("mme-realworld-cn", ["a", "a", "b", "b", "b", "b"], "ABAAAB", 4 / 6),
    ],
)
def test_the_headline_is_the_papers(name, groups, replies, accuracy, tmp_path, monkeypatch):
    own(tmp_path, name, [{"answer": "A", "group": group} for group in groups])
    full = figures(monkeypatch, tmp_path, name, list(replies))["full"]
    assert (
        full["accuracy"] == pytest.approx(accuracy)
        and full["interval"][0] < accuracy < full["interval"][1]
    )
    assert (full["n"], full["right"]) == (6, replies.count("A")) and set(full["groups"]) == set(
        groups
    )


def test_pope_has_precision_recall_and_f1_of_yes(tmp_path, monkeypatch):
    own(
        tmp_path,
        "pope",
        [
            {"answer": answer, "kind": "yn", "group": group}
            for answer, group in zip(
                ["yes"] * 4 + ["no"] * 4 + ["yes"], ["random", "popular", "adversarial"] * 3
            )
        ],
    )
    full = figures(
        monkeypatch,
        tmp_path,
        "pope",
        [
            "Yes",
            "**Answer: Yes**",
            "yes, there is.",
            "Perhaps.",  # 3 hits, 1 miss (unparsed)
            "Yes.",
            "yes",
            "No",
            "There is no dog in the image.",
            None,
        ],
    )["full"]  # 2 false alarms, 2 right; 1 unreadable
    assert full == full | {"n": 8, "right": 5, "unparsed": 1, "errors": 1}
    assert (
        full["accuracy"] == 5 / 8
        and full["precision"] == pytest.approx(3 / 5)
        and full["recall"] == pytest.approx(3 / 4)
    )
    assert full["f1"] == pytest.approx(2 / 3)  # 2 * (3/5 * 3/4) / (3/5 + 3/4) = 0.9 / 1.35
    assert full["yes_rate"] == pytest.approx(5 / 8)  # 5 times yes in 8 answers
    assert {group: (g["right"], g["n"]) for group, g in full["groups"].items()} == {
        "random": (2, 3),
        "popular": (2, 3),
        "adversarial": (1, 2),
    }


def test_an_mmvp_pair_is_right_when_both_of_it_are(tmp_path, monkeypatch):
    own(tmp_path, "mmvp", [{"answer": "A", "pair": str(n // 2)} for n in range(6)])
    full = figures(monkeypatch, tmp_path, "mmvp", list("AAABBA"))[
        "full"
    ]  # pairs: both, the first, the second
    assert full["accuracy"] == pytest.approx(4 / 6) and full["pair_accuracy"] == pytest.approx(
        1 / 3
    )


def test_the_gap_is_over_the_rows_answered_in_both_views(tmp_path, monkeypatch):
    own(tmp_path, "zoombench", [{"answer": "A", "crop": n < 5, "group": "mcq"} for n in range(7)])
    bench = figures(
        monkeypatch,
        tmp_path,
        "zoombench",
        ["A", "B", "B", "A", None, "A", "A"],
        "--view",
        "both",
        crop=["A", "A", "B", None, "A", "", ""],
    )  # rows 5 and 6 have no crop: no error, just not in this view
    assert bench["full"] == bench["full"] | {"n": 6, "right": 4, "errors": 1}  # rows 0, 3, 5, 6
    assert bench["crop"] == bench["crop"] | {"n": 4, "right": 3, "errors": 1}  # rows 0, 1, 4
    assert bench["gap"] == bench["gap"] | {  # rows 0, 1, 2; and not 3/4 - 4/6
        "n": 3,
        "full": pytest.approx(1 / 3),
        "crop": pytest.approx(2 / 3),
        "gap": pytest.approx(1 / 3),
    }
    low, high = bench["gap"]["interval"]
    assert -1 <= low < 1 / 3 < high <= 1
