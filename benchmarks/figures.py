"""Figures of saved answers: accuracy as the paper computes it with a 95% interval, the gap between crop and full image, and the
comparison of two models. Neither a model nor images are needed: `evaluate.py --rescore`.

A results folder holds answers-BENCH-RANK.jsonl (a line an answer, complete in itself), result.json and a judge's verdicts.jsonl.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.judge import JUDGE, ask_judge
from benchmarks.scoring import final_text, score
from benchmarks.sources import BENCHES, GROUPS
from storage.files import appending, read_json, read_jsonl, write

Z = 1.959964  # of a 95% interval


def saved(out: Path) -> list[dict]:
    """The answers in a results folder, one a row and view: an error only where there is no answer."""
    answers = [a for path in sorted(out.glob("answers-*.jsonl")) for a in read_jsonl(path, [])]
    answers.sort(key=lambda a: "error" not in a)
    return list({(a["bench"], a["id"], a["view"]): a for a in answers}.values())


def expected(out: Path, answers: list[dict]) -> list[dict]:
    """`answers`, those of the folder `out`. Raises FileNotFoundError when there are none."""
    if not answers:
        raise FileNotFoundError(
            f"{out} holds no answers-*.jsonl. Expected the --out folder of an evaluation."
        )
    return answers


def scored(out: Path, how: dict | None = None) -> tuple[list[dict], int]:
    """The answers in `out`, scored, and how many calls of the judge failed. It is asked only where something is said and the
    scorer is undecided, and once: its verdicts are kept in out/verdicts.jsonl. how: scorer, judge, judge_model; None: as in
    result.json, asking nobody."""
    scorer, judge, name = map(
        (how or read_json(out / "result.json", [])).get, ("scorer", "judge", "judge_model")
    )
    prompt = lambda a: JUDGE.format_map({"output": ""} | a)
    known = {
        v["prompt"]: v["same"]
        for v in read_jsonl(out / "verdicts.jsonl", [])
        if (v["judge"], v["model"]) == (judge, name)
    }
    rated = lambda: [score(a, known.get(prompt(a)), scorer or "ours") for a in answers]
    answers, failed = saved(out), 0
    open_ones = (
        a for a in rated() if a.get("undecided") and not a["judged"] and final_text(a["output"])
    )
    if asked := {prompt(a): a for a in open_ones} if how and judge else {}:
        with appending(out / "verdicts.jsonl") as file:
            replies = tqdm(ask_judge(judge, name, [*asked]), "judge", len(asked), unit="answer")
            for (text, a), reply in zip(asked.items(), replies):
                if isinstance(reply, str) and (
                    said := re.search(r"\b(yes|no)\b", final_text(reply), re.I)
                ):
                    same = known[text] = said[0].lower() == "yes"
                    file.write(
                        json.dumps(
                            {
                                "judge": judge,
                                "model": name,
                                "prompt": text,
                                "reply": reply,
                                "same": same,
                            }
                        )
                        + "\n"
                    )
                    file.flush()
                else:
                    failed += 1
                    tqdm.write(f"judge: no verdict on {a['bench']} {a['id']}: {str(reply)[:200]!r}")
    return rated(), failed


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share, both ends in [0, 1]; (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z = right / n, Z * Z / n
    middle, half = p + z / 2, math.sqrt(z * p * (1 - p) + z * z / 4)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def grouped(answers: list[dict], key: str) -> dict[str, list[dict]]:
    found = {}
    for a in answers:
        found.setdefault(a[key], []).append(a)
    return found


def by_view(answers: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """{bench: {view: answers}}, benchmarks in the table's order, full before crop."""
    place = lambda a: ((*BENCHES, a["bench"]).index(a["bench"]), a["bench"], a["view"] == "crop")
    return {
        bench: grouped(rows, "view")
        for bench, rows in grouped(sorted(answers, key=place), "bench").items()
    }


def headline(
    bench: str, answers: list[dict], key: str = "correct"
) -> tuple[float | None, tuple[float, float]]:
    """Accuracy as the paper computes it, and its 95% interval: of all rows (Wilson), or the mean over groups (bootstrap)."""
    n, right = len(answers), sum(a[key] for a in answers)
    if not n or "macro" not in BENCHES.get(bench, {}):
        return right / n if n else None, wilson(right, n)
    groups = [[a[key] for a in group] for _, group in sorted(grouped(answers, "group").items())]
    n, shares = [len(group) for group in groups], [sum(group) / len(group) for group in groups]
    draws = np.random.default_rng(0).binomial(n, shares, (10_000, len(n))) / n
    return sum(shares) / len(shares), tuple(np.percentile(draws.mean(1), [2.5, 97.5]).tolist())


def figures(bench: str, answers: list[dict]) -> dict:
    """What result.json says of one benchmark and view, from its scored answers."""
    rows = [a for a in answers if a["state"] != "error"]
    n, count, mean = (
        len(rows),
        lambda key: sum(a[key] for a in rows),
        lambda key: count(key) / max(1, len(rows)),
    )
    accuracy, interval = headline(bench, rows)
    found = {
        "n": n,
        "right": count("correct"),
        "accuracy": accuracy,
        "interval": interval,
        "official": headline(bench, rows, "official")[0],
        "unparsed": sum(a["state"] == "unparsed" for a in rows),
        "judged": count("judged"),
        "truncated": count("truncated"),
        "errors": len(answers) - n,
        "seconds": mean("seconds"),
        "tokens": mean("tokens"),
    }
    found["groups"] = {
        group: {
            "n": len(part),
            "right": (right := sum(a["correct"] for a in part)),
            "accuracy": right / len(part),
        }
        for group, part in grouped([a for a in rows if a["group"]], "group").items()
    }
    if n and all("calls" in a for a in rows):
        found |= {"calls": mean("calls"), "malformed": count("malformed")}
    if n and all(a["kind"] == "yn" for a in rows):
        said, gold = (sum(a[key] == "yes" for a in rows) for key in ("said", "answer"))
        hit = sum(a["correct"] for a in rows if a["answer"] == "yes")
        found |= {
            "f1": 2 * hit / max(1, said + gold),
            "precision": hit / max(1, said),
            "recall": hit / max(1, gold),
            "yes_rate": said / n,
        }
    if pairs := [
        pair for name, pair in grouped(rows, "pair").items() if name is not None and len(pair) == 2
    ]:
        found["pair_accuracy"] = sum(all(a["correct"] for a in pair) for pair in pairs) / len(pairs)
    return found


def paired(first: list[dict], second: list[dict], *others: list[dict]) -> dict:
    """second - first, scored answers each, over the rows that both (and all others) hold without an error and with the same
    question and right answer: accuracies, difference with 95% interval (Agresti and Min 2005), rows gained and lost, exact
    two-sided McNemar p."""
    first, second, *others = (
        {(a["id"], a["prompt"], a["answer"]): a["correct"] for a in side if a["state"] != "error"}
        for side in (first, second, *others)
    )
    both = [row for row in first if all(row in other for other in (second, *others))]
    flips = [row for row in both if first[row] != second[row]]
    n, a, b, gained = (
        len(both),
        sum(first[row] for row in both),
        sum(second[row] for row in both),
        sum(map(second.get, flips)),
    )
    middle, lost = (b - a) / (n + 2), len(flips) - gained
    half = Z * math.sqrt(((len(flips) + 1) / (n + 2) - middle**2) / (n + 2))
    return {
        "n": n,
        "first": a / max(1, n),
        "second": b / max(1, n),
        "difference": (b - a) / max(1, n),
        "interval": [max(-1.0, middle - half), min(1.0, middle + half)],
        "gained": gained,
        "lost": lost,
        "p": min(
            1.0,
            2
            * sum(math.comb(len(flips), i) for i in range(min(gained, lost) + 1))
            / 2 ** len(flips),
        ),
        "flipped": [name for name, *_ in flips],
    }


def summarise(
    out: Path, *, scorer: str = "ours", judge: str | None = None, judge_model: str | None = None
) -> dict:
    """Score what `out` holds, write out/result.json, and return it: {"benches": {bench: {view: figures, "gap": of the rows
    answered in both views}}, "averages" over the paper's groups where they are complete, "judge_failures", and the settings}."""
    how = {"scorer": scorer, "judge": judge, "judge_model": judge_model}
    answers, failed = scored(out, how)
    expected(out, answers)
    benches = {}
    for bench, views in by_view(answers).items():
        found = benches[bench] = {view: figures(bench, rows) for view, rows in views.items()}
        if len(views) == 2 and (both := paired(views["full"], views["crop"]))["n"]:
            found["gap"] = {
                "n": both["n"],
                "full": both["first"],
                "crop": both["second"],
                "gap": both["difference"],
                "interval": both["interval"],
            }
    full = lambda name: benches.get(name, {}).get("full", {}).get("accuracy")
    shares = {group: [*map(full, GROUPS[group])] for group in ("fine", "holdout")}
    result = {
        "settings": read_json(out / "args.json", []),
        **how,
        "judge_failures": failed,
        "benches": benches,
        "averages": {
            group: sum(found) / len(found) for group, found in shares.items() if None not in found
        },
    }
    write(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def percent(share: float | None, interval: tuple[float, float] | None = None) -> str:
    span = f" [{100 * interval[0]:5.1f}, {100 * interval[1]:5.1f}]" if interval else ""
    return ("    -" if share is None else f"{100 * share:5.1f}") + span


def table(result: dict) -> str:
    """A result as text: a line a benchmark and view, its groups and gap below; then the averages."""
    lines = [
        f"{'accuracy [95% interval], %':<48}rows official unparsed judged cut off errors s/row tokens  published 4B, 9B"
    ]
    head = lambda name, share, interval, rows: f"{name:<24} {percent(share, interval)} {rows:>10}"
    for name, views in result["benches"].items():
        for view, f in views.items():
            if view == "gap":
                lines.append(head("  gap: crop - full", f["gap"], f["interval"], f["n"]))
                continue
            known = BENCHES.get(name, {}) if view == "full" else {}
            rows = f"{f['n']}/{known['rows']}" if known.get("rows", f["n"]) != f["n"] else f["n"]
            told = known.get("published", [])
            lines.append(
                f"{head(f'{name}, {view}', f['accuracy'], f['interval'], rows)}   {percent(f['official'])}"
                f"{f['unparsed']:9}{f['judged']:7}{f['truncated']:8}{f['errors']:7}{f['seconds']:6.2f}{f['tokens']:7.0f}"
                + "".join(f"  {base:.1f} > {ours:.1f}" for base, ours in zip(told[::2], told[1::2]))
            )
            for group, g in f["groups"].items() if len(f["groups"]) > 1 else ():
                lines.append(
                    head(f"  {group[:22]}", g["accuracy"], wilson(g["right"], g["n"]), g["n"])
                )
            keys = [
                key
                for key in ("f1", "precision", "recall", "yes_rate", "pair_accuracy")
                if key in f
            ]
            lines += [
                "  " + ", ".join(f"{key.replace('_', ' ')} {100 * f[key]:.1f}" for key in keys)
            ] * bool(keys)
            lines += (
                [f"  {f['calls']:.2f} zoom-in calls a row, {f['malformed']} malformed"]
                if "calls" in f
                else []
            )
    lines += [
        f"{f'average of {group} ({len(GROUPS[group])})':<25}{percent(mean)}"
        for group, mean in result["averages"].items()
    ]
    if failures := result["judge_failures"]:
        lines.append(f"{failures} calls of the judge failed: scored as wrong")
    return "\n".join(lines)


def compare(a: Path, b: Path) -> tuple[str, dict]:
    """Two results folders, row by row: text, and {bench: {view: `paired` figures}}. Raises ValueError where there is nothing to
    compare, or the scoring differs."""
    sides = [expected(folder, scored(folder)[0]) for folder in (a, b)]
    rules = [
        {key: result.get(key) for key in ("scorer", "judge", "judge_model")}
        for result in (read_json(folder / "result.json", []) for folder in (a, b))
    ]
    if rules[0] != rules[1]:
        raise ValueError(
            f"{a} was scored with {rules[0]}, {b} with {rules[1]}. Score both alike with --rescore."
        )
    first, second = map(by_view, sides)
    found, lines = (
        {},
        [
            f"{f'% right: {a.name}, {b.name}':<40}  difference [95%]          rows gained  lost McNemar p"
        ],
    )
    for name in filter(second.get, first):
        found[name] = {
            view: paired(rows, second[name][view])
            for view, rows in first[name].items()
            if view in second[name]
        }
        for view, f in found[name].items():
            lines.append(
                f"{f'{name}, {view}':<26} {percent(f['first'])} {percent(f['second'])}   "
                f"{percent(f['difference'], f['interval'])}{f['n']:9}{f['gained']:7}{f['lost']:6}{f['p']:10.2g}"
            )
        a_side, b_side = first[name], second[name]
        gaps = [
            paired(
                side["full"], side["crop"], *other.values()
            )  # over the rows that both answered in both views
            for side, other in ((a_side, b_side), (b_side, a_side))
            if len(side) == len(other) == 2
        ]
        if gaps and (before := gaps[0]["difference"]) > 0:  # not flattered by a falling crop
            lines.append(
                f"  gap {100 * before:.1f} -> {100 * gaps[1]['difference']:.1f}; the full view's gain closed "
                f"{(gaps[1]['first'] - gaps[0]['first']) / before:.0%} of it"
            )
    if not any(f["n"] for views in found.values() for f in views.values()):
        raise ValueError(
            f"{a} and {b} have no answers to the same rows. Expected two --out folders of the same benchmark."
        )
    return "\n".join(lines), found
