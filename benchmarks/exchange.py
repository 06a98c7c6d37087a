"""Answers in the forms of other evaluation tools, for their scorers, and their predictions for
ours: lmms-eval and VLMEvalKit. What they call our benchmarks stands in sources.toml.

Both know a row by its place in the benchmark's files, in whose order ours are numbered too. That it
is the same order is checked by the right answers, wherever both sides' are at hand.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import grouped, saved_answers
from benchmarks.rows import Answer
from benchmarks.sources import BENCHES, records
from storage.files import read_json, whole, write

TOOLS = ["lmms-eval", "vlmevalkit"]
CORRECTED = 0.1  # share of right answers that may differ: some copies correct a few (MMVP 4 of 300)


def export(out: Path, tool: str) -> Path:
    """Write the full views' answers in `out` to all benchmarks that a tool of TOOLS has, into
    out/TOOL; returns that folder. Raises ValueError where there is none, or not all of it."""
    answers = grouped(saved_answers(out), "bench")
    known = [bench for bench in BENCHES if tool in BENCHES[bench]]
    if not any(map(answers.get, known)):
        raise ValueError(f"{out} holds no answers to what {tool} has: {', '.join(known)}.")
    for bench in filter(answers.get, known):
        rows = [answer for answer in answers[bench] if answer.view == "full" and not answer.error]
        rows.sort(key=lambda answer: int(answer.id.removeprefix(f"{bench}/")))
        if len(rows) != BENCHES[bench]["rows"]:
            raise ValueError(
                f"{bench}: {len(rows)} of {BENCHES[bench]['rows']} rows are answered, and other "
                "tools' scorers take only all. Evaluate it without --limit, and errors once more."
            )
        write_for = for_lmms_eval if tool == "lmms-eval" else for_vlmevalkit
        write_for(out, BENCHES[bench][tool], rows)
    return out / tool


def for_lmms_eval(out: Path, task: str, rows: list[Answer]) -> None:
    """What its model `from_log` reads."""
    logs = []
    for number, row in enumerate(rows):
        logs.append({"doc_id": number, "target": row.answer, "resps": [[row.output]]})
    model = read_json(out / "args.json", []).get("model")
    told = {
        "args": {"model": model, "model_args": "", "limit": None},
        "model_configs": {"task": task},
        "logs": logs,
    }
    (out / "lmms-eval").mkdir(exist_ok=True)
    write(out / "lmms-eval" / f"{task}.json", json.dumps(told, indent=1))


def for_vlmevalkit(out: Path, dataset: str, rows: list[Answer]) -> None:
    """A prediction file as its own inference leaves it: the columns of its data set, of which its
    scorers need several, but the image; and the prediction."""
    folder = Path(os.environ.get("LMUData", "~/LMUData")).expanduser()  # noqa: SIM112  (its name)
    theirs = folder / f"{dataset}.tsv"
    if not theirs.is_file():
        raise FileNotFoundError(
            f"{theirs} is not there: VLMEvalKit's own file, which it downloads when it first uses "
            f"{dataset}, and which predictions are joined to. LMUData names its folder."
        )
    kept = []
    for record in records(theirs):
        record.pop("image", None)  # of megabytes
        kept.append(record)
    check_order(theirs, [record["answer"] for record in kept], rows)
    name = out.resolve().name
    place = out / "vlmevalkit" / name / "T00000000-000000" / f"{name}_{dataset}.tsv"
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole(place) as scratch, scratch.open("w", newline="", errors="backslashreplace") as file:
        lines = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        lines.writerow([*kept[0], "prediction"])
        for record, row in zip(kept, rows, strict=True):
            lines.writerow([*record.values(), row.output])


def check_order(file: Path, golds: list[str], rows: list[Answer]) -> int:
    """How many right answers in a tool's file are not those of our rows; ValueError if these are
    many: then it has other rows, or another order."""
    pairs = zip(golds, rows, strict=False)
    differ = [row.id for gold, row in pairs if plain(gold) not in golds_of(row)]
    if len(golds) != len(rows) or len(differ) > CORRECTED * len(rows):
        raise ValueError(
            f"{file} has {len(golds)} rows, for {len(rows)} of ours, and other right answers to "
            f"{', '.join(differ[:3]) or 'none'}. Expected the same benchmark in the same order."
        )
    return len(differ)


def golds_of(row: Answer) -> list[str]:
    return [plain(line) for line in row.answer.split("\n")]


def plain(text: object) -> str:
    return str(text).strip(" \n.()").casefold()


# --------------------------------------------------------------------------------- their answers


def answers_from(file: Path, asked: list[Answer]) -> tuple[list[Answer], int]:
    """The predictions in a file that lmms-eval (..._samples_TASK.jsonl) or VLMEvalKit
    (MODEL_DATASET.xlsx, .tsv or .json) saved, as answers to the rows of a benchmark; and how many
    have another right answer there. Raises ValueError for any other file."""
    answered, golds = [], []
    try:
        for number, record in enumerate(their_records(file)):
            row = asked[int(record.get("doc_id", number))]
            if "doc_id" in record:
                gold, output = record["target"], record.get("resps") or record["filtered_resps"]
            else:
                gold, output = record["answer"], record["prediction"]
            while isinstance(output, list):  # of several requests
                output = output[0]
            text = "" if output is None else str(output)
            vars(row).update(output=text, tokens=0, seconds=0.0, truncated=False)  # not told
            answered.append(row)
            golds.append(gold)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file}, row {len(answered) + 1}: {type(error).__name__}: {error}. Expected what "
            f"lmms-eval or VLMEvalKit saved of these {len(asked)} rows."
        ) from error
    if not answered:
        raise ValueError(f"{file} holds no rows.")
    return answered, check_order(file, golds, answered)


def their_records(file: Path) -> Iterator[dict]:
    if file.suffix != ".xlsx":
        yield from records(file)
        return
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise ImportError(f"{file} needs openpyxl: pip install openpyxl") from error
    header, *rows = load_workbook(file, read_only=True).active.iter_rows(values_only=True)
    for row in rows:
        yield dict(zip(header, row, strict=True))
