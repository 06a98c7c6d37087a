"""Figures: accuracies, intervals, paired differences, averages and the table, against formulas and
counts by hand."""

import itertools
import math
import re

import numpy as np
import pytest
from test_evaluate import figures_of, reply, results

from benchmarks import figures, sources
from benchmarks.rows import Answer
from benchmarks.scoring import score


@pytest.mark.parametrize(
    "right, n, low, high",
    [  # Newcombe 1998, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_those_of_the_literature(right, n, low, high):
    assert figures.wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert figures.wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert figures.wilson(0, 0) == (0.0, 1.0)


def marks(text: str, **more) -> list[Answer]:
    """Answers as a string: 1 right, 0 wrong, x error, - not there."""
    errors = {"x": "no image"}
    return [
        reply(n, "A" if mark == "1" else "B", error=errors.get(mark), **more)
        for n, mark in enumerate(text)
        if mark != "-"
    ]


def both_views(full: str, crop: str) -> list[Answer]:
    return marks(full) + marks(crop, view="crop")


@pytest.mark.parametrize(
    "first, second",
    [
        ("1100", "1011"),
        ("0000000", "1111110"),
        ("1" * 40, "1" * 30 + "0" * 10),
        ("10" * 8, "01" * 6 + "1111"),
        ("1", "1"),
    ],
)
def test_a_paired_difference_has_the_interval_of_its_formula_and_the_p_of_all_coin_flips(
    first, second
):
    found = figures.paired(map(score, marks(first)), map(score, marks(second)))
    a, b = np.array(list(first), int), np.array(list(second), int)
    difference = pytest.approx((b - a).mean())
    assert (found.n, found.first, found.second) == (len(a), a.mean(), b.mean())
    assert found.difference == difference
    assert (found.gained, found.lost) == ((b > a).sum(), (a > b).sum())
    assert found.flipped == [str(i) for i in np.flatnonzero(a != b)]
    # half a row more of each kind, rows counted twice
    padded = np.concatenate([2 * (b - a).repeat(2), [2, -2, 0, 0]]) / 2
    # Agresti and Min 2005: a Wald interval of these
    half = 1.96 * math.sqrt(padded.var() / (len(a) + 2))
    interval = [max(-1, padded.mean() - half), min(1, padded.mean() + half)]
    assert found.interval == pytest.approx(interval, abs=1e-4)
    flipped = (a != b).sum()
    heads = np.array(list(map(sum, itertools.product((0, 1), repeat=int(flipped)))))
    as_far = abs(2 * heads - flipped) >= abs((b - a).sum())
    assert found.p == pytest.approx(as_far.mean())


def test_a_difference_over_no_rows_can_be_anything():
    none = figures.paired([], [])
    assert (none.n, none.difference, none.p) == (0, 0, 1)
    assert none.interval[0] < -0.9 < 0.9 < none.interval[1]


def test_two_folders_are_compared_over_the_rows_that_both_answered(tmp_path):
    before, after, other = (tmp_path / name for name in ("before", "after", "other"))
    answers = both_views("1011x1111", "111111110")
    answers[7].prompt = "another"
    results(before, both_views("110000x1-", "111111111"))
    results(after, answers)
    text, found = figures.compare(before, after)
    full = found["mine"]["full"]
    counts = {"n": 5, "first": 0.4, "second": 0.8, "gained": 3, "lost": 1}  # rows 0 to 3 and 5
    assert full == full | counts | {"flipped": ["1", "2", "3", "5"]}
    assert full["p"] == pytest.approx(2 * (math.comb(4, 0) + math.comb(4, 1)) / 2**4)
    assert re.search(r"mine, full +40\.0 +80\.0 +40\.0 \[.*\] +5 +3 +1 +0\.62$", text, re.M)
    results(other, marks("11", bench="theirs"))
    with pytest.raises(ValueError, match="same rows"):
        figures.compare(before, other)


@pytest.mark.parametrize(
    "first, second, told",
    [
        # a falling crop does not count as a closed gap
        (("10000", "11111"), ("10000", "10000"), [("80.0 -> 0.0", "0")]),
        (("10000", "11111"), ("11100", "11110"), [("80.0 -> 20.0", "50")]),
        # over the rows with crops, as in a result: the last four have none
        (("00001111", "1111"), ("00111111", "1111"), [("100.0 -> 50.0", "50")]),
        # over the rows that both folders hold, the first of these: nothing can have closed
        (("0" * 8 + "1" * 4, "1" * 12), ("0000", "1111"), [("100.0 -> 100.0", "0")]),
        # where there was no gap none is closed
        (("11111", "11111"), ("11111", "11111"), []),
    ],
)
def test_a_gap_is_closed_by_what_the_full_view_gains(first, second, told, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    results(a, both_views(*first))
    results(b, both_views(*second))
    text, _ = figures.compare(a, b)
    assert re.findall(r"gap (.*); the full view's gain closed (\d+)% of it", text) == told


def test_what_was_not_evaluated_or_scored_by_other_rules_is_not_compared(tmp_path):
    ours, official, none = (tmp_path / name for name in ("a", "b", "none"))
    results(ours, marks("1"))
    results(official, marks("1"), scorer="official")
    with pytest.raises(FileNotFoundError, match="answers-"):
        figures.compare(ours, none)
    with pytest.raises(ValueError, match="official"):
        figures.compare(ours, official)


def test_the_interval_of_a_mean_over_groups_is_about_the_normal_one():
    answers, shares, variance = [], [], 0
    for group, n, right in (("Easy", 141, 100), ("Medium", 268, 120), ("Hard", 106, 20)):
        p = right / n
        shares.append(p)
        variance += p * (1 - p) / n
        answers += map(score, marks("1" * right + "0" * (n - right), group=group))
    mean, interval = figures.headline("visualprobe", answers)
    assert figures.headline("visualprobe", answers[::-1]) == (mean, interval)
    half = 1.96 / 3 * math.sqrt(variance)
    assert mean == pytest.approx(np.mean(shares))
    assert interval == pytest.approx((mean - half, mean + half), abs=0.004)


def test_an_average_is_of_a_whole_group_of_benchmarks_or_absent(tmp_path):
    answers = []
    for n, bench in enumerate(sources.GROUPS["holdout"]):
        answers += marks("1" * n + "0" * (4 - n), bench=bench, group="2D")
    whole = results(tmp_path, answers)
    assert whole["averages"] == {"holdout": pytest.approx((0 + 1 + 2 + 3) / 16)}
    for rest in ([], marks("xx", bench="pope")):
        assert results(tmp_path, answers[:-4] + rest)["averages"] == {}


def test_the_table_has_a_line_for_every_view_group_and_gap(tmp_path):
    answers = [
        reply(0, "A", group="near"),
        reply(1, "B", group="far", truncated=True),
        reply(2, "hm", group="far", tokens=13),
        reply(3, "A", error="no image"),
        *[reply(n, "Answer: A", view="crop", crops=["c.png"], group="far") for n in (1, 2)],
        reply(0, "Yes", "yes", "yn", bench="pope"),
        reply(1, "Yes", "no", "yn", bench="pope"),
    ]
    told = figures.table(results(tmp_path, answers)).splitlines()
    assert [" ".join(line.split()) for line in told] == [
        "accuracy [95% interval], % rows official unparsed judged cut off loops errors s/row "
        "tokens (95%) published 4B, 9B",
        "pope, full 50.0 [ 9.5, 90.5] 2/9000 50.0 0 0 0 0 0 0.50 4 4 88.3 > 89.1 88.9 > 89.1",
        "f1 66.7, precision 50.0, recall 100.0, yes rate 100.0, 0 unparsed: of these a gold no "
        "counts as yes",
        "mine, full 33.3 [ 6.1, 79.2] 3 33.3 1 0 1 0 1 0.50 7 12",
        "near 100.0 [ 20.7, 100.0] 1",
        "far 0.0 [ 0.0, 65.8] 2",
        "mine, crop 100.0 [ 34.2, 100.0] 2 100.0 0 0 0 0 0 0.50 4 4",
        "gap: crop - full 100.0 [-19.3, 100.0] 2",
    ]
    assert {line.find("]") for line in told[1:] if "]" in line} == {44}  # in columns


def test_avg_c_is_the_mean_over_subtasks_and_avg6_that_of_six_benchmarks(tmp_path):
    answers = [
        reply(n, said, bench="mme-realworld", group=group)
        for n, (said, group) in enumerate(zip("AABA", ["x", "x", "x", "y"], strict=True))
    ]
    answers += [reply(9, "A", bench=name) for name in sources.GROUPS["avg6"] if "mme" not in name]
    answers += [reply(9, "B", bench="mme-realworld-cn", group="z")]
    result = results(tmp_path, answers)
    full = result["benches"]["mme-realworld"]["full"]
    assert (full["accuracy"], full["avg_c"]) == (3 / 4, (2 / 3 + 1) / 2)
    assert result["averages"] == {"avg6": (4 + 3 / 4 + 0) / 6}
    text = figures.table(result)
    assert "second hand: 77.07 (4B), 79.68 (9B)" in text
    assert "63.9 > 74.9  71.4 > 73.4  (second hand)" in text


def test_lengths_and_loops_stand_beside_the_accuracy(tmp_path):
    answers = [reply(n, "A", tokens=n) for n in range(100)]
    answers += [reply(100, "round and round it goes, " * 9, tokens=1000)]
    full = figures_of(tmp_path, answers)["full"]
    assert (full["tokens_p95"], full["loops"]) == (95, 1)


@pytest.mark.parametrize(
    "scorer, said_no, expected",
    [
        ("ours", "hm", (1 / 2, 1 / 2, 1 / 2, 2 / 3)),  # unparsed on a gold no: a yes
        ("ours", "There is none.", (2 / 3, 1.0, 1 / 2, 1 / 3)),
        ("official", "There is none.", (1 / 2, 1 / 2, 1 / 2, 2 / 3)),  # it reads a last word
        ("official", "no dog", (2 / 3, 1.0, 1 / 2, 1 / 3)),
    ],
)
def test_yes_no_figures_are_of_the_scorers_own_reading(scorer, said_no, expected, tmp_path):
    said = [("Yes", "yes"), ("No", "yes"), (said_no, "no")]
    answers = [reply(n, *pair, "yn") for n, pair in enumerate(said)]
    answers.append(reply(3, None, "yes", "yn", error="no image"))
    full = figures_of(tmp_path, answers, scorer=scorer)["full"]
    assert [full[key] for key in ("f1", "precision", "recall", "yes_rate")] == list(expected)


def test_a_failed_call_whose_error_has_a_no_in_it_is_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(
        figures, "ask_judge", lambda *how: [(how[2][0], OSError("no route to host"))]
    )
    assert results(tmp_path, [reply(0, "hm")], judge="http://x")["judge_failures"] == 1


def test_an_answer_counts_and_not_the_error_beside_it_and_of_pairs_only_whole_ones(tmp_path):
    answers = marks("110100")
    for answer, pair in zip(answers, "xxyyzz", strict=True):  # both, the second, none
        answer.pair = pair
    answers += [reply(6, "A", pair="w"), reply(6, None, error="no image")]
    for given in (answers, answers[::-1]):
        found = figures_of(tmp_path, given)["full"]
        assert found == found | {"n": 7, "errors": 0, "pair_accuracy": 1 / 3}


def test_wrong_unparsed_truncated_and_unreadable_rows_are_counted_apart(tmp_path):
    answers = [
        # right by both rules, but for the last: the first capital is an A
        reply(0, "A", group="near"),
        reply(1, "The best answer is (B).", "B", group="near"),
        reply(2, "Answer: C", "C", group="far"),
        reply(3, "blue", "B", group="far"),  # by its text; officially there is no letter
        reply(4, "B", group="near"),
        reply(5, "I cannot tell.", "D", group="far"),
        reply(6, "<think> it may be", truncated=True, tokens=18, group="far"),
        reply(7, None, error="no image", group="far"),
    ]
    full = figures_of(tmp_path, answers)["full"]
    counts = {"n": 7, "right": 4, "unparsed": 2, "judged": 0, "truncated": 1, "errors": 1}
    counts |= {"accuracy": 4 / 7, "official": 2 / 7, "tokens": (6 * 4 + 18) / 7, "seconds": 0.5}
    assert full == full | counts
    assert full["groups"] == {
        "near": {"n": 3, "right": 2, "accuracy": 2 / 3},
        "far": {"n": 4, "right": 2, "accuracy": 0.5},
    }


@pytest.mark.parametrize(
    "bench, groups, said, accuracy",
    [  # every answer is A; but for the last two, what follows is never right over n
        ("cv-bench", "2D 2D 3D 3D 3D 3D", "ABAAAB", 0.625),  # (1/2 + 3/4) / 2
        ("visualprobe", "Easy Medium Medium Hard Hard Hard", "AABBBB", 0.5),  # (1 + 1/2 + 0) / 3
        ("hrbench-8k", "single single cross cross cross cross", "ABAAAB", 4 / 6),  # of all rows
        ("mme-realworld-cn", "a a b b b b", "ABAAAB", 4 / 6),
    ],
)
def test_the_headline_is_the_papers(bench, groups, said, accuracy, tmp_path):
    rows = enumerate(zip(said, groups.split(), strict=True))
    answers = [reply(n, text, bench=bench, group=group) for n, (text, group) in rows]
    full = figures_of(tmp_path, answers, bench)["full"]
    assert full["accuracy"] == pytest.approx(accuracy)
    assert full["interval"][0] < accuracy < full["interval"][1]
    assert (full["n"], full["right"]) == (6, said.count("A"))
    assert set(full["groups"]) == set(groups.split())


def test_the_gap_is_over_the_rows_answered_in_both_views(tmp_path):
    found = figures_of(tmp_path, both_views("1001x11", "110x1"))  # 5 and 6 have no crop
    assert found["full"] == found["full"] | {"n": 6, "right": 4, "errors": 1}
    assert found["crop"] == found["crop"] | {"n": 4, "right": 3, "errors": 1}
    gap = pytest.approx(1 / 3)  # rows 0, 1, 2; and not 3/4 - 4/6
    assert found["gap"] == found["gap"] | {"n": 3, "full": 1 / 3, "crop": 2 / 3, "gap": gap}
    low, high = found["gap"]["interval"]
    assert -1 <= low < 1 / 3 < high <= 1
