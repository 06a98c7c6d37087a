"""Figures: accuracies, intervals, paired differences, averages and the table, against formulas and
counts by hand."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from test_evaluate import line, results, scored

import benchmarks.figures as figures
import benchmarks.sources as sources
from benchmarks.rows import Scored


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


def marks(text: str, **more) -> list[dict]:
    """Answers as a string: 1 right, 0 wrong, x error, - not there."""
    return [
        line(n, "A" if mark == "1" else "B", **more)
        | ({"error": "no image"} if mark == "x" else {})
        for n, mark in enumerate(text)
        if mark != "-"
    ]


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
def test_a_paired_difference_has_the_interval_of_its_formula_and_the_p_value_of_all_coin_flips(
    first, second
):
    found = figures.paired(*(scored(marks(text)) for text in (first, second)))
    a, b = (np.array(list(text), int) for text in (first, second))
    assert (found.n, found.first, found.second, found.difference) == (
        len(a),
        a.mean(),
        b.mean(),
        pytest.approx((b - a).mean()),
    )
    assert (found.gained, found.lost) == ((b > a).sum(), (a > b).sum()) and found.flipped == [
        str(i) for i in np.flatnonzero(a != b)
    ]
    padded = (
        np.concatenate([2 * (b - a).repeat(2), [2, -2, 0, 0]]) / 2
    )  # half a row more of each kind, rows counted twice
    half = 1.96 * math.sqrt(
        padded.var() / (len(a) + 2)
    )  # Agresti and Min 2005: a Wald interval of these
    assert found.interval == pytest.approx(
        [max(-1, padded.mean() - half), min(1, padded.mean() + half)], abs=1e-4
    )
    coins, off = (
        [sum(flips) for flips in itertools.product((0, 1), repeat=int((a != b).sum()))],
        abs((b - a).sum()),
    )
    assert found.p == pytest.approx(
        np.mean([abs(2 * heads - (a != b).sum()) >= off for heads in coins])
    )


def test_two_folders_are_compared_over_the_rows_that_both_answered(tmp_path):
    results(tmp_path / "before", marks("110000x1-") + marks("111111111", view="crop"))
    results(
        tmp_path / "after",
        [a | {"prompt": "another"} if a["id"] == "7" else a for a in marks("1011x1111")]
        + marks("111111110", view="crop"),
    )
    text, found = figures.compare(tmp_path / "before", tmp_path / "after")
    full, none = found["mine"]["full"], figures.paired([], [])  # rows 0 to 3 and 5
    assert (none.n, none.difference, none.p) == (0, 0, 1) and none.interval[
        0
    ] < -0.9 < 0.9 < none.interval[1]
    assert (full["n"], full["first"], full["second"], full["gained"], full["lost"]) == (
        5,
        0.4,
        0.8,
        3,
        1,
    ) and full["flipped"] == ["1", "2", "3", "5"]
    assert full["p"] == pytest.approx(2 * (math.comb(4, 0) + math.comb(4, 1)) / 2**4)
    assert re.search(r"mine, full +40\.0 +80\.0 +40\.0 \[.*\] +5 +3 +1 +0\.62$", text, re.M)
    with pytest.raises(ValueError, match="before and .*other have no answers to the same rows"):
        figures.compare(
            tmp_path / "before", results(tmp_path / "other", marks("11", bench="theirs"))
        )


def test_a_falling_crop_does_not_count_as_a_closed_gap(tmp_path):
    for name, full, crop in (
        ("base", "10000", "11111"),
        ("fallen", "10000", "10000"),
        ("risen", "11100", "11110"),
        ("closed", "11111", "11111"),
    ):
        results(tmp_path / name, marks(full) + marks(crop, view="crop"))

    def text(a, b):
        return figures.compare(tmp_path / a, tmp_path / b)[0]

    assert "gap 80.0 -> 0.0; the full view's gain closed 0% of it" in text("base", "fallen")
    assert "gap 80.0 -> 20.0; the full view's gain closed 50% of it" in text(
        "base", "risen"
    ) and "gap" not in text("closed", "base")


def test_the_gap_of_a_comparison_is_over_the_rows_with_crops_as_in_a_result(tmp_path):
    for name, full in (("a", "00001111"), ("b", "00111111")):  # the last four have no crop
        results(tmp_path / name, marks(full) + marks("1111", view="crop"))
    assert (
        json.loads((tmp_path / "a/result.json").read_text())["benches"]["mine"]["gap"]["gap"] == 1
    )
    assert (
        "gap 100.0 -> 50.0; the full view's gain closed 50% of it"
        in figures.compare(tmp_path / "a", tmp_path / "b")[0]
    )


def test_the_gaps_of_a_comparison_are_over_the_rows_that_both_folders_hold(tmp_path):
    """B holds the first of A's rows, answered the same: nothing can have closed."""
    folders = []
    for name, n in (("a", 12), ("b", 4)):
        answers = [
            line(i, "A" if view == "crop" or i >= 8 else "B", view=view)
            for i in range(n)
            for view in ("full", "crop")
        ]
        folders.append(results(tmp_path / name, answers))
    assert (
        "  gap 100.0 -> 100.0; the full view's gain closed 0% of it" in figures.compare(*folders)[0]
    )


def test_a_comparison_with_no_evaluation_says_so(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="answers-",
    ):
        figures.compare(results(tmp_path / "a", [line(0, "A")]), tmp_path / "none")


def test_folders_that_were_scored_by_different_rules_are_not_compared(tmp_path):
    a, b = (
        results(tmp_path / "a", [line(0, "A")]),
        results(tmp_path / "b", [line(0, "A")], scorer="official"),
    )
    with pytest.raises(ValueError, match="ours.*official"):
        figures.compare(a, b)


def test_the_interval_of_a_mean_over_groups_is_about_the_normal_one():
    shares = {"Easy": (141, 100), "Medium": (268, 120), "Hard": (106, 20)}  # rows, right
    mean, interval = figures.headline(
        "visualprobe",
        [
            Scored(id=str(i), image="", prompt="", answer="", group=group, correct=i < right)
            for group, (n, right) in shares.items()
            for i in range(n)
        ],
    )
    p = [right / n for n, right in shares.values()]
    half = (
        1.96
        / 3
        * math.sqrt(
            sum(share * (1 - share) / n for share, (n, _) in zip(p, shares.values(), strict=False))
        )
    )
    assert mean == pytest.approx(sum(p) / 3) and interval == pytest.approx(
        (mean - half, mean + half), abs=0.004
    )


def test_an_average_is_of_a_whole_group_of_benchmarks_or_absent(tmp_path):
    answers = [
        a
        for n, bench in enumerate(sources.GROUPS["holdout"])
        for a in marks("1" * n + "0" * (4 - n), bench=bench, group="2D")
    ]
    assert figures.summarise(results(tmp_path / "whole", answers), figures.Scorer())[
        "averages"
    ] == {"holdout": pytest.approx((0 + 1 + 2 + 3) / 16)}
    assert (
        figures.summarise(results(tmp_path / "part", answers[:-4]), figures.Scorer())["averages"]
        == {}
    )
    assert (
        figures.summarise(
            results(tmp_path / "errors", answers[:-4] + marks("xx", bench="pope")), figures.Scorer()
        )["averages"]
        == {}
    )


def test_the_table_has_a_line_for_every_view_group_and_gap(tmp_path):
    answers = [
        line(0, "A", group="near"),
        line(1, "B", group="far", truncated=True),
        line(2, "hm", group="far", tokens=13),
        line(3, "A", error="no image"),
    ]
    result = figures.summarise(
        results(
            tmp_path,
            answers
            + [line(n, "Answer: A", view="crop", crop="c.png", group="far") for n in (1, 2)]
            + [line(0, "Yes", "yes", "yn", "pope"), line(1, "Yes", "no", "yn", "pope")],
        ),
        figures.Scorer(),
    )
    assert (
        figures.table(result)
        == """\
accuracy [95% interval], %                      rows official unparsed judged cut off \
errors s/row tokens  published 4B, 9B
pope, full                50.0 [  9.5,  90.5]     2/9000    50.0        0      0       0  \
    0  0.50      4  88.3 > 89.1  88.9 > 89.1
  f1 66.7, precision 50.0, recall 100.0, yes rate 100.0
mine, full                33.3 [  6.1,  79.2]          3    33.3        1      0       1  \
    1  0.50      7
  near                   100.0 [ 20.7, 100.0]          1
  far                      0.0 [  0.0,  65.8]          2
mine, crop               100.0 [ 34.2, 100.0]          2   100.0        0      0       0  \
    0  0.50      4
  gap: crop - full       100.0 [-19.3, 100.0]          2"""
    )
