"""Figures of saved answers: accuracy as the paper computes it with a 95% interval, the gap between
crop and full image, and the comparison of two models. Neither a model nor images are needed:
`evaluate.py --rescore`.

A results folder holds answers-BENCH-RANK.jsonl (a line an answer, complete in itself), result.json
and a judge's verdicts.jsonl.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.judge import JUDGE, ask_judge
from benchmarks.rows import Answer, Scored, read_answer, repeats_itself
from benchmarks.scoring import final_text, parse_yes_no, score
from benchmarks.sources import BENCHES, GROUPS
from storage.files import appending, read_json, read_jsonl, write

Z = 1.959964  # of a 95% interval


@dataclass
class Scorer:
    """Who decides whether an answer is right."""

    scorer: str = "ours"  # or official
    judge: str | None = None  # a model, or a server's URL
    judge_model: str | None = None  # the model's name at that URL


# ----------------------------------------------------------------------------------------- answers


def saved_answers(out: Path) -> list[Answer]:
    """The answers in a results folder, one a row and view: an error only where there is no
    answer."""
    lines = [line for path in sorted(out.glob("answers-*.jsonl")) for line in read_jsonl(path, [])]
    answers = sorted(map(read_answer, lines), key=lambda answer: answer.error is None)
    return list({answer.place(): answer for answer in answers}.values())


def scorer_of(out: Path) -> Scorer:
    """By which the answers in `out` were scored last."""
    result = read_json(out / "result.json", [])
    judge, name = result.get("judge"), result.get("judge_model")
    return Scorer(result.get("scorer") or "ours", judge, name)


def scored_answers(out: Path) -> list[Scored]:
    """The answers in `out`, maybe none, scored as in its result.json, asking nobody."""
    how = scorer_of(out)
    return rate(saved_answers(out), how, known_verdicts(out, how))


def stop_without_answers(out: Path, answers: list[Answer]) -> None:
    """Raises FileNotFoundError if `answers`, those of the folder `out`, are none."""
    if not answers:
        raise FileNotFoundError(
            f"{out} holds no answers-*.jsonl. Expected the --out folder of an evaluation."
        )


def judge_prompt(answer: Answer) -> str:
    return JUDGE.format(prompt=answer.prompt, answer=answer.answer, output=answer.output or "")


def rate(answers: list[Answer], how: Scorer, verdicts: dict[str, bool]) -> list[Scored]:
    return [score(answer, verdicts.get(judge_prompt(answer)), how.scorer) for answer in answers]


def known_verdicts(out: Path, how: Scorer) -> dict[str, bool]:
    """{prompt: verdict} that this judge gave before."""
    verdicts = {}
    for line in read_jsonl(out / "verdicts.jsonl", []):
        if (line["judge"], line["model"]) == (how.judge, how.judge_model):
            verdicts[line["prompt"]] = line["same"]
    return verdicts


def ask_for_verdicts(
    out: Path, answers: list[Answer], how: Scorer, verdicts: dict[str, bool]
) -> int:
    """Ask the judge, once, about the answers on which the scorer is undecided and something is
    said; its verdicts join `verdicts` and out/verdicts.jsonl. Returns how many calls failed."""
    asked, failed = {}, 0
    if how.judge:
        for answer in rate(answers, how, verdicts):
            if answer.undecided and not answer.judged and final_text(answer.output):
                asked[judge_prompt(answer)] = answer
    if not asked:
        return failed
    replies = ask_judge(how.judge, how.judge_model, list(asked))
    replies = tqdm(replies, "judge", len(asked), unit="answer")
    with appending(out / "verdicts.jsonl") as file:
        for (prompt, answer), reply in zip(asked.items(), replies, strict=True):
            said = parse_yes_no(reply) if isinstance(reply, str) else None
            if said is None:
                failed += 1
                where = f"{answer.bench} {answer.id}"
                tqdm.write(f"judge: no verdict on {where}: {str(reply)[:200]!r}")
                continue
            verdicts[prompt] = said == "yes"
            line = {"judge": how.judge, "model": how.judge_model, "prompt": prompt}
            line |= {"reply": reply, "same": verdicts[prompt]}
            file.write(json.dumps(line) + "\n")
            file.flush()
    return failed


def grouped(answers: list, key: str) -> dict[str, list]:
    found = {}
    for answer in answers:
        found.setdefault(getattr(answer, key), []).append(answer)
    return found


def by_view(answers: list[Scored]) -> dict[str, dict[str, list[Scored]]]:
    """{bench: {view: answers}}, benchmarks in the table's order, full before crop."""
    order = list(BENCHES)

    def place(answer: Scored) -> tuple:
        known = order.index(answer.bench) if answer.bench in BENCHES else len(order)
        return known, answer.bench, answer.view == "crop"

    benches = grouped(sorted(answers, key=place), "bench")
    return {bench: grouped(rows, "view") for bench, rows in benches.items()}


# ----------------------------------------------------------------------------------------- figures


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share, both ends in [0, 1]; (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z = right / n, Z * Z / n
    middle, half = p + z / 2, math.sqrt(z * p * (1 - p) + z * z / 4)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def headline(bench: str, answers: list[Scored], key: str = "correct") -> tuple:
    """(accuracy as the paper computes it, its 95% interval): of all rows (Wilson), or the mean over
    groups (bootstrap)."""
    n, right = len(answers), sum(getattr(answer, key) for answer in answers)
    if not n or "macro" not in BENCHES.get(bench, {}):
        return right / n if n else None, wilson(right, n)
    sizes, shares = [], []
    for _, group in sorted(grouped(answers, "group").items()):
        sizes.append(len(group))
        shares.append(sum(getattr(answer, key) for answer in group) / len(group))
    draws = np.random.default_rng(0).binomial(sizes, shares, (10_000, len(sizes))) / sizes
    interval = np.percentile(draws.mean(1), [2.5, 97.5])
    return sum(shares) / len(shares), tuple(interval.tolist())


def bench_figures(bench: str, answers: list[Scored]) -> dict:
    """What result.json says of one benchmark and view."""
    rows = [answer for answer in answers if answer.state != "error"]
    n = len(rows)

    def count(key: str) -> float:
        return sum(getattr(row, key) for row in rows)

    accuracy, interval = headline(bench, rows)
    found = {
        "n": n,
        "right": count("correct"),
        "accuracy": accuracy,
        "interval": interval,
        "official": headline(bench, rows, "official")[0],
        "unparsed": sum(row.state == "unparsed" for row in rows),
        "judged": count("judged"),
        "truncated": count("truncated"),
        "errors": len(answers) - n,
        "seconds": count("seconds") / max(1, n),
        "tokens": count("tokens") / max(1, n),
        "tokens_p95": np.percentile([row.tokens or 0 for row in rows], 95).item() if n else 0,
        "loops": sum(repeats_itself(row.output) for row in rows),
        "groups": {},
    }
    for group, part in grouped([row for row in rows if row.group], "group").items():
        right = sum(row.correct for row in part)
        found["groups"][group] = {"n": len(part), "right": right, "accuracy": right / len(part)}
    if "subtasks" in BENCHES.get(bench, {}):
        shares = [group["accuracy"] for group in found["groups"].values()]
        found["avg_c"] = sum(shares) / max(1, len(shares))
    if n and all(row.calls is not None for row in rows):
        found |= {"calls": count("calls") / n, "malformed": count("malformed")}
    if n and all(row.kind == "yn" for row in rows):
        found |= yes_no_figures(rows)
    pairs = grouped([row for row in rows if row.pair is not None], "pair").values()
    pairs = [pair for pair in pairs if len(pair) == 2]
    if pairs:
        both = sum(first.correct and second.correct for first, second in pairs)
        found["pair_accuracy"] = both / len(pairs)
    return found


def yes_no_figures(rows: list[Scored]) -> dict:
    said = sum(row.said == "yes" for row in rows)
    gold = sum(row.answer == "yes" for row in rows)
    hit = sum(row.correct for row in rows if row.answer == "yes")
    return {
        "f1": 2 * hit / max(1, said + gold),
        "precision": hit / max(1, said),
        "recall": hit / max(1, gold),
        "yes_rate": said / len(rows),
    }


@dataclass
class Paired:
    """Two sides' answers to the same rows."""

    n: int
    first: float  # accuracies
    second: float
    difference: float  # second - first
    interval: list[float]  # 95% (Agresti and Min 2005)
    gained: int  # rows that only the second has right
    lost: int
    p: float  # exact two-sided McNemar
    flipped: list[str]  # ids


def paired(*sides: list[Scored]) -> Paired:
    """The second side against the first, over the rows that both (and all further sides) hold
    without an error and with the same question and right answer."""
    correct = []
    for side in sides:
        rows = [answer for answer in side if answer.state != "error"]
        correct.append({(row.id, row.prompt, row.answer): row.correct for row in rows})
    first, second = correct[:2]
    both = [row for row in first if all(row in side for side in correct)]
    flips = [row for row in both if first[row] != second[row]]
    n, gained = len(both), sum(second[row] for row in flips)
    a, b = sum(first[row] for row in both), sum(second[row] for row in both)
    middle, lost = (b - a) / (n + 2), len(flips) - gained
    half = Z * math.sqrt(((len(flips) + 1) / (n + 2) - middle**2) / (n + 2))
    tail = sum(math.comb(len(flips), i) for i in range(min(gained, lost) + 1))
    return Paired(
        n=n,
        first=a / max(1, n),
        second=b / max(1, n),
        difference=(b - a) / max(1, n),
        interval=[max(-1.0, middle - half), min(1.0, middle + half)],
        gained=gained,
        lost=lost,
        p=min(1.0, 2 * tail / 2 ** len(flips)),
        flipped=[name for name, *_ in flips],
    )


def summarise(out: Path, how: Scorer) -> dict:
    """Score what `out` holds, write out/result.json, and return it: {"benches": {bench: {view:
    figures, "gap" of the rows answered in both views}}, "averages" over the paper's groups where
    they are complete, "judge_failures", and the settings}."""
    answers = saved_answers(out)
    stop_without_answers(out, answers)
    verdicts = known_verdicts(out, how)
    failed = ask_for_verdicts(out, answers, how, verdicts)
    benches = {}
    for bench, views in by_view(rate(answers, how, verdicts)).items():
        benches[bench] = {view: bench_figures(bench, rows) for view, rows in views.items()}
        if len(views) == 2:
            both = paired(views["full"], views["crop"])
            if both.n:
                gap = {"n": both.n, "full": both.first, "crop": both.second}
                benches[bench]["gap"] = gap | {"gap": both.difference, "interval": both.interval}
    averages = {}
    for group in ("fine", "avg6", "holdout"):
        full = [benches.get(name, {}).get("full", {}).get("accuracy") for name in GROUPS[group]]
        if None not in full:
            averages[group] = sum(full) / len(full)
    result = {"settings": read_json(out / "args.json", []), **asdict(how)}
    result |= {"judge_failures": failed, "benches": benches, "averages": averages}
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# ------------------------------------------------------------------------------------------ as text


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    told = "    -" if share is None else f"{100 * share:5.1f}"
    if interval:
        told += f" [{100 * interval[0]:5.1f}, {100 * interval[1]:5.1f}]"
    return told


def row_head(name: str, share: float | None, interval: tuple, rows: int | str) -> str:
    return f"{name:<24} {percent(share, interval)} {rows:>10}"


def table(result: dict) -> str:
    """A result as text: a line a benchmark and view, its groups and gap below; then averages."""
    lines = [
        f"{'accuracy [95% interval], %':<48}rows official unparsed judged cut off loops errors "
        "s/row tokens (95%)  published 4B, 9B"
    ]
    for name, views in result["benches"].items():
        for view, f in views.items():
            if view == "gap":
                lines.append(row_head("  gap: crop - full", f["gap"], f["interval"], f["n"]))
            else:
                lines += view_lines(name, view, f)
    for group, mean in result["averages"].items():
        line = f"{f'average of {group} ({len(GROUPS[group])})':<25}{percent(mean)}"
        if group == "avg6":
            line += "   Vision-OPD, second hand: 77.07 (4B), 79.68 (9B)"
        lines.append(line)
    if result["judge_failures"]:
        lines.append(f"{result['judge_failures']} calls of the judge failed: scored as wrong")
    return "\n".join(lines)


def view_lines(name: str, view: str, f: dict) -> list[str]:
    """A benchmark's figures `f` in one view, beside what is published."""
    known = BENCHES.get(name, {}) if view == "full" else {}
    rows = f["n"]
    if known.get("rows", rows) != rows:
        rows = f"{rows}/{known['rows']}"
    told = row_head(f"{name}, {view}", f["accuracy"], f["interval"], rows)
    told += (
        f"   {percent(f['official'])}{f['unparsed']:9}{f['judged']:7}{f['truncated']:8}"
        f"{f['loops']:6}{f['errors']:7}{f['seconds']:6.2f}{f['tokens']:7.0f} {f['tokens_p95']:5.0f}"
    )
    published = known.get("published", [])
    for base, ours in zip(published[::2], published[1::2], strict=True):
        told += f"  {base:.1f} > {ours:.1f}"
    if "second_hand" in known:
        told += "  (second hand)"
    lines = [told]
    if len(f["groups"]) > 1:
        for group, g in f["groups"].items():
            interval = wilson(g["right"], g["n"])
            lines.append(row_head(f"  {group[:22]}", g["accuracy"], interval, g["n"]))
    further = ("f1", "precision", "recall", "yes_rate", "pair_accuracy", "avg_c")
    further = [f"{key.replace('_', ' ')} {100 * f[key]:.1f}" for key in further if key in f]
    if further:
        lines.append("  " + ", ".join(further))
    if "calls" in f:
        lines.append(f"  {f['calls']:.2f} zoom-in calls a row, {f['malformed']} malformed")
    return lines


def compare(a: Path, b: Path) -> tuple[str, dict]:
    """Two results folders, row by row: text, and {bench: {view: `Paired` as a dict}}. ValueError
    where there is nothing to compare, or the scoring differs."""
    sides = []
    for folder in (a, b):
        answers = scored_answers(folder)
        stop_without_answers(folder, answers)
        sides.append(by_view(answers))
    first, second = sides
    if scorer_of(a) != scorer_of(b):
        raise ValueError(
            f"{a} was scored with {scorer_of(a)}, {b} with {scorer_of(b)}. Score both alike with "
            "--rescore."
        )
    found = {}
    lines = [
        f"{f'% right: {a.name}, {b.name}':<40}  difference [95%]          rows gained  lost "
        "McNemar p"
    ]
    for name in filter(second.get, first):
        views = [view for view in first[name] if view in second[name]]
        pairs = {view: paired(first[name][view], second[name][view]) for view in views}
        found[name] = {view: asdict(pair) for view, pair in pairs.items()}
        for view, f in pairs.items():
            lines.append(
                f"{f'{name}, {view}':<26} {percent(f.first)} {percent(f.second)}   "
                f"{percent(f.difference, f.interval)}{f.n:9}{f.gained:7}{f.lost:6}{f.p:10.2g}"
            )
        lines += gap_line(first[name], second[name])
    if not any(f["n"] for views in found.values() for f in views.values()):
        raise ValueError(
            f"{a} and {b} have no answers to the same rows. Expected two --out folders of the same "
            "benchmark."
        )
    return "\n".join(lines), found


def gap_line(first: dict, second: dict) -> list[str]:
    """How the gap of a benchmark changed, over the rows that both sides answered in both views, and
    how much of it the full view's own gain closed: a falling crop does not flatter it."""
    if len(first) != 2 or len(second) != 2:
        return []
    before = paired(first["full"], first["crop"], *second.values())
    after = paired(second["full"], second["crop"], *first.values())
    if before.difference <= 0:
        return []
    closed = (after.first - before.first) / before.difference
    return [
        f"  gap {100 * before.difference:.1f} -> {100 * after.difference:.1f}; the full view's "
        f"gain closed {closed:.0%} of it"
    ]
