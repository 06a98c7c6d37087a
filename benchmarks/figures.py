"""Figures of saved answers: accuracy as the paper computes it with a 95% interval, the gap between
crop and full image, and the comparison of two models. Neither a model nor images are needed:
`evaluate.py --rescore`.

A results folder holds answers-BENCH-RANK.jsonl (a line an answer, complete in itself), result.json
and a judge's verdicts.jsonl.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.judge import JUDGE, ask_judge
from benchmarks.rows import Answer, Scored, read_answer, repeats_itself
from benchmarks.scoring import final_text, parse_yes_no, score
from benchmarks.sources import BENCHES, GROUPS
from storage.files import appending, read_json, read_jsonl, write

TOKENS = ("prompt_tokens", "tokens")
Z = 1.959964  # of a 95% interval


@dataclass
class Scorer:
    """Who decides whether an answer is right."""

    scorer: str = "ours"  # or official
    judge: str | None = None  # a model, or a server's URL
    judge_model: str | None = None  # the model's name at that URL


def summarise(out: Path, how: Scorer) -> dict:
    """Score what `out` holds, write out/result.json, and return it: {"benches": {bench: {view:
    figures, "gap" of the rows answered in both views}}, "averages" over the paper's groups where
    they are complete, "judge_failures", and the settings}. FileNotFoundError without answers."""
    failed = ask_for_verdicts(out, how) if how.judge else 0
    benches, settings = {}, read_json(out / "args.json", [])
    for bench, views in by_view(out, how).items():
        benches[bench] = {
            view: bench_figures(bench, rows) | served_figures(rows, settings)
            for view, rows in views.items()
        }
        if len(views) == 2:
            both = paired(*views.values())
            if both.n:
                benches[bench]["gap"] = {
                    "n": both.n,
                    "full": both.first,
                    "crop": both.second,
                    "gap": both.difference,
                    "interval": both.interval,
                }
    averages = {}
    for group in ("fine", "avg6", "holdout"):
        full = [benches.get(name, {}).get("full", {}).get("accuracy") for name in GROUPS[group]]
        if None not in full:
            averages[group] = np.mean(full)
    result = {
        "settings": settings,
        **asdict(how),
        "judge_failures": failed,
        "benches": benches,
        "averages": averages,
    }
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# ----------------------------------------------------------------------------------------- answers


def answer_files(out: Path, name: str = "") -> list[Path]:
    """Our own files of answers, to one benchmark or to all, a rank each: not copies of them."""
    pattern = rf"answers-{re.escape(name) if name else '.+'}-\d+\.jsonl"
    return sorted(path for path in out.glob("answers-*") if re.fullmatch(pattern, path.name))


def saved_answers(out: Path) -> list[Answer]:
    """The answers in a results folder, one a row and view: an error only where there is no answer.
    Benchmarks in the table's order, full before crop."""
    answers = []
    for path in answer_files(out):
        answers += map(read_answer, read_jsonl(path, []))
    order = [*BENCHES, *sorted({answer.bench for answer in answers})]
    # of the same row and view an error comes first: what follows replaces it
    answers.sort(key=lambda a: (order.index(a.bench), a.view == "crop", a.error is None))
    return list({answer.place(): answer for answer in answers}.values())


def scorer_of(out: Path) -> Scorer:
    """By which the answers in `out` were scored last."""
    result = read_json(out / "result.json", [])
    return Scorer(result.get("scorer") or "ours", result.get("judge"), result.get("judge_model"))


def scored_answers(out: Path, how: Scorer) -> list[Scored]:
    """The answers in `out`, maybe none, scored with the verdicts that the judge gave before."""
    verdicts = {
        line["prompt"]: line["same"]
        for line in read_jsonl(out / "verdicts.jsonl", [])
        if (line["judge"], line["model"]) == (how.judge, how.judge_model)
    }
    return [
        score(answer, verdicts.get(JUDGE.format_map(vars(answer))), how.scorer)
        for answer in saved_answers(out)
    ]


def ask_for_verdicts(out: Path, how: Scorer) -> int:
    """Ask the judge about the answers on which the scorer is undecided and something is said, once
    each; its verdicts join out/verdicts.jsonl. Returns how many calls failed."""
    asked, failed = {}, 0
    for answer in scored_answers(out, how):
        if answer.undecided and not answer.judged and final_text(answer.output):
            asked[JUDGE.format_map(vars(answer))] = answer
    if not asked:
        return 0
    replies = ask_judge(how.judge, how.judge_model, list(asked))
    with appending(out / "verdicts.jsonl") as file:
        for prompt, reply in tqdm(replies, "judge", len(asked), unit="answer"):
            answer = asked[prompt]
            said = parse_yes_no(reply) if isinstance(reply, str) else None
            if said is None:
                failed += 1
                tqdm.write(f"judge: no verdict on {answer.bench} {answer.id}: {str(reply)[:200]!r}")
                continue
            line = {
                "judge": how.judge,
                "model": how.judge_model,
                "prompt": prompt,
                "reply": reply,
                "same": said == "yes",
            }
            print(json.dumps(line), file=file, flush=True)
    return failed


def grouped(answers, key: str) -> dict:
    """{value of the field `key`: answers}, without those that have none."""
    found = {}
    for answer in answers:
        value = getattr(answer, key)
        if value:
            found.setdefault(value, []).append(answer)
    return found


def by_view(out: Path, how: Scorer) -> dict:
    """{bench: {view: answers in `out`}}. Raises FileNotFoundError if there are none."""
    answers = scored_answers(out, how)
    if not answers:
        raise FileNotFoundError(
            f"{out} holds no answers-*.jsonl. Expected the --out folder of an evaluation."
        )
    return {bench: grouped(rows, "view") for bench, rows in grouped(answers, "bench").items()}


# ----------------------------------------------------------------------------------------- figures


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share, both ends in [0, 1]; (0, 1) when n = 0."""
    weight = n + Z * Z
    middle = (right + Z * Z / 2) / weight
    half = Z * math.sqrt(right * (n - right) / max(1, n) + Z * Z / 4) / weight
    return max(0.0, middle - half), min(1.0, middle + half)


def mean(rows, key: str) -> float:
    """Of a field; 0 without rows."""
    return sum(getattr(row, key) for row in rows) / max(1, len(rows))


def headline(bench: str, rows: list[Scored], key: str = "correct") -> tuple:
    """(accuracy as the paper computes it, its 95% interval): of all rows (Wilson), or the mean over
    groups (bootstrap)."""
    n, right = len(rows), sum(getattr(row, key) for row in rows)
    if not n or "macro" not in BENCHES.get(bench, {}):
        return right / n if n else None, wilson(right, n)
    groups = [group for _, group in sorted(grouped(rows, "group").items())]
    sizes = list(map(len, groups))
    shares = [mean(group, key) for group in groups]
    draws = np.random.default_rng(0).binomial(sizes, shares, (10_000, len(sizes))) / sizes
    return np.mean(shares), np.percentile(draws.mean(1), [2.5, 97.5]).tolist()


def bench_figures(bench: str, answers: list[Scored]) -> dict:
    """What result.json says of one benchmark and view."""
    rows = [answer for answer in answers if answer.state != "error"]
    states = Counter(answer.state for answer in answers)
    tokens = [row.tokens for row in rows if row.tokens is not None] or [0]
    accuracy, interval = headline(bench, rows)
    found = {
        "n": len(rows),
        "right": states["right"],
        "accuracy": accuracy,
        "interval": interval,
        "official": headline(bench, rows, "official")[0],
        "unparsed": states["unparsed"],
        "judged": sum(row.judged for row in rows),
        "truncated": sum(row.truncated for row in rows),
        "errors": states["error"],
        "seconds": mean(rows, "seconds"),
        "tokens": np.mean(tokens).item(),
        "tokens_p95": np.percentile(tokens, 95).item(),
        "loops": sum(repeats_itself(row.output) for row in rows),
        "groups": {},
    }
    for group, part in grouped(rows, "group").items():
        right = sum(row.correct for row in part)
        found["groups"][group] = {"n": len(part), "right": right, "accuracy": right / len(part)}
    if "subtasks" in BENCHES.get(bench, {}):
        found["avg_c"] = np.mean([group["accuracy"] for group in found["groups"].values()])
    if rows and rows[0].calls is not None:  # all of one evaluation, with or without the tool
        found["calls"] = mean(rows, "calls")
        found["malformed"] = sum(row.malformed for row in rows)
    if {row.kind for row in rows} == {"yn"}:
        found |= yes_no_figures(rows)
    pairs = [pair for pair in grouped(rows, "pair").values() if len(pair) == 2]
    if pairs:
        found["pair_accuracy"] = sum(a.correct and b.correct for a, b in pairs) / len(pairs)
    return found


def served_figures(answers: list[Scored], settings: dict) -> dict:
    """Of a server's answers: whose they are, tokens of prompts, and what they cost (in the prices'
    currency) where a price is given; {} of a local model's."""
    if "served_model" not in settings:
        return {}
    rows = [answer for answer in answers if answer.state != "error"]
    names = sorted({row.answered_by for row in rows if row.answered_by})
    told = [row for row in rows if row.tokens is not None and row.prompt_tokens is not None]
    found = {
        "answered_by": names,
        "prompt_tokens": mean(told, "prompt_tokens"),
        "no_usage": len(rows) - len(told),
        "shrunk": sum(row.shrunk or 0 for row in rows),
    }
    prices = [settings.get(key) for key in ("price_in", "price_out")]
    if any(price is not None for price in prices):
        paid_in, paid_out = (price or 0 for price in prices)
        millions = [sum(getattr(row, key) for row in told) / 1e6 for key in TOKENS]
        found["cost"] = paid_in * millions[0] + paid_out * millions[1]
    return found


def yes_no_figures(rows) -> dict:
    # A "no" that was not said counts as a "yes", as with POPE's authors; so do unparsed ones.
    said = sum(row.correct == (row.answer == "yes") for row in rows)
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
        correct.append(
            {(row.id, row.prompt, row.answer): row.correct for row in side if row.state != "error"}
        )
    first, second = correct[:2]
    both = [row for row in first if all(row in side for side in correct)]
    flipped = [row for row in both if first[row] != second[row]]
    n, flips = len(both), len(flipped)
    right = sum(first[row] for row in both)
    gained = sum(second[row] for row in flipped)
    lost = flips - gained
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt(((flips + 1) / (n + 2) - middle**2) / (n + 2))
    as_far = 2 * sum(math.comb(flips, i) for i in range(min(gained, lost) + 1))
    rows = max(1, n)
    return Paired(
        n=n,
        first=right / rows,
        second=(right + gained - lost) / rows,
        difference=(gained - lost) / rows,
        interval=[max(-1.0, middle - half), min(1.0, middle + half)],
        gained=gained,
        lost=lost,
        p=min(1.0, as_far / 2**flips),
        flipped=[row[0] for row in flipped],
    )


# ------------------------------------------------------------------------------------------ as text


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    told = "    -" if share is None else f"{100 * share:5.1f}"
    if interval:
        told += f" [{100 * interval[0]:5.1f}, {100 * interval[1]:5.1f}]"
    return told


def table(result: dict) -> str:
    """A result as text: a line a benchmark and view, its groups and gap below; then averages."""
    lines = [
        f"{'accuracy [95% interval], %':<48}rows official unparsed judged cut off loops errors "
        "s/row tokens (95%)  published 4B, 9B"
    ]
    for bench, views in result["benches"].items():
        for view, f in views.items():
            if view == "gap":
                lines.append(
                    f"  {'gap: crop - full':<22} {percent(f['gap'], f['interval'])} {f['n']:>10}"
                )
            else:
                lines += view_lines(bench, view, f)
    for group, average in result["averages"].items():
        line = f"{f'average of {group} ({len(GROUPS[group])})':<25}{percent(average)}"
        if group == "avg6":
            line += "   Vision-OPD, second hand: 77.07 (4B), 79.68 (9B)"
        lines.append(line)
    if result["judge_failures"]:
        lines.append(f"{result['judge_failures']} calls of the judge failed: scored as wrong")
    return "\n".join(lines)


def view_lines(bench: str, view: str, f: dict) -> Iterator[str]:
    """A benchmark's figures `f` in one view, beside what is published."""
    known = BENCHES.get(bench, {}) if view == "full" else {}
    rows = f["n"]
    if known.get("rows", rows) != rows:
        rows = f"{rows}/{known['rows']}"
    told = (
        f"{f'{bench}, {view}':<24} {percent(f['accuracy'], f['interval'])} {rows:>10}   "
        f"{percent(f['official'])}{f['unparsed']:9}{f['judged']:7}{f['truncated']:8}"
        f"{f['loops']:6}{f['errors']:7}{f['seconds']:6.2f}{f['tokens']:7.0f} {f['tokens_p95']:5.0f}"
    )
    if known.get("published"):
        told += "  {:.1f} > {:.1f}  {:.1f} > {:.1f}".format(*known["published"])
    if "second_hand" in known:
        told += "  (second hand)"
    yield told
    if len(f["groups"]) > 1:
        for group, g in f["groups"].items():
            interval = wilson(g["right"], g["n"])
            yield f"  {group[:22]:<22} {percent(g['accuracy'], interval)} {g['n']:>10}"
    further = ("f1", "precision", "recall", "yes_rate", "pair_accuracy", "avg_c")
    further = [f"{key.replace('_', ' ')} {100 * f[key]:.1f}" for key in further if key in f]
    if "f1" in f:
        further.append(f"{f['unparsed']} unparsed: of these a gold no counts as yes")
    if further:
        yield "  " + ", ".join(further)
    if "answered_by" in f:
        told = (
            f"  answered by {', '.join(f['answered_by'])}; {f['prompt_tokens']:.0f} tokens a prompt"
        )
        if "cost" in f:
            told += f", cost {f['cost']:.4g}"
        for key, what in (("shrunk", "pictures made smaller"), ("no_usage", "rows without usage")):
            if f[key]:
                told += f", {f[key]} {what}"
        yield told
    if "calls" in f:
        yield f"  {f['calls']:.2f} zoom-in calls a row, {f['malformed']} malformed"


def compare(a: Path, b: Path) -> tuple[str, dict]:
    """Two results folders, row by row: text, and {bench: {view: `Paired` as a dict}}. ValueError
    where there is nothing to compare, or the scoring differs."""
    first, second = (by_view(folder, scorer_of(folder)) for folder in (a, b))
    refuse_other_limits(a, b)
    if scorer_of(a) != scorer_of(b):
        raise ValueError(
            f"{a} was scored with {scorer_of(a)}, {b} with {scorer_of(b)}. Score both alike with "
            "--rescore."
        )
    rows, found = 0, {}
    lines = [
        f"{f'% right: {a.name}, {b.name}':<40}  difference [95%]          rows gained  lost "
        "McNemar p"
    ]
    for bench in filter(second.get, first):
        found[bench], same = {}, {}
        for view in filter(second[bench].get, first[bench]):
            asked = {row.id: row.digest for row in first[bench][view]}
            rows_now = second[bench][view]
            same[view] = [row for row in rows_now if asked.get(row.id) in (None, row.digest)]
            f = paired(first[bench][view], same[view])
            found[bench][view] = asdict(f)
            rows += f.n
            lines.append(
                f"{f'{bench}, {view}':<26} {percent(f.first)} {percent(f.second)}   "
                f"{percent(f.difference, f.interval)}{f.n:9}{f.gained:7}{f.lost:6}{f.p:10.2g}"
            )
        if len(found[bench]) == 2:
            lines += gap_line(first[bench], same)
    if not rows:
        raise ValueError(
            f"{a} and {b} have no answers to the same rows. Expected two --out folders of the same "
            "benchmark."
        )
    return "\n".join(lines), found


def refuse_other_limits(a: Path, b: Path) -> None:
    """Raises ValueError where two results folders say that they were asked in different ways."""
    first, second = (
        {"zoom": 0, "thinking": False} | read_json(folder / "args.json", []) for folder in (a, b)
    )
    for key in ("max_new_tokens", "zoom", "thinking"):
        if first.get(key, second.get(key)) != second.get(key, first.get(key)):
            raise ValueError(
                f"{a} was asked with {key} {first[key]}, {b} with {second[key]}. Expected the same "
                "prompts and limits: ask one of them again."
            )


def gap_line(first: dict, second: dict) -> Iterator[str]:
    """How the gap of a benchmark changed, over the rows that both sides answered in both views, and
    how much of it the full view's own gain closed: a falling crop does not flatter it."""
    before = paired(*first.values(), *second.values())
    after = paired(*second.values(), *first.values())
    if before.difference > 0:
        closed = (after.first - before.first) / before.difference
        yield (
            f"  gap {100 * before.difference:.1f} -> {100 * after.difference:.1f}; the full view's "
            f"gain closed {closed:.0%} of it"
        )
