"""Answers as models write them: the letter, yes or no, or value that is scored, and what stays
undecided (None).

scoring_cases.json is a table of outputs with what a careful reader takes them to say; its last
part: what the official rule does. A wrong letter is the worst outcome, so where a reader could
argue, the expected result is null.
"""

import json
import random
import re
import time
from pathlib import Path

import pytest

from benchmarks import scoring
from benchmarks.rows import Answer

CASES = json.loads(Path(__file__).with_name("scoring_cases.json").read_text(encoding="utf-8"))
NUMBERS = CASES["options"]["numbers"]


def misread(section: str, expected: str, read) -> list[tuple]:
    """(output, what read(output, row) takes it to say, row) where that is not row[expected]."""
    wrong = []
    for row in CASES[section]:
        for output in row["outputs"]:
            said = read(output, row)
            if said != row[expected]:
                wrong.append((output, said, row))
    return wrong


def test_a_letter_is_found_only_where_the_answer_commits_to_it():
    def read(output, row):
        return scoring.parse_choice(output, CASES["options"][row["options"]])

    assert misread("choices", "letter", read) == []


def test_yes_and_no_are_told_from_hedges():
    assert misread("yes_no", "means", lambda output, _: scoring.parse_yes_no(output)) == []


def test_a_value_is_the_same_or_different_only_when_that_is_certain():
    def read(output, row):
        right = scoring.match_free_form(output, row["answer"])
        if row["right"] == "not true" and right is not True:  # a reader could argue
            return "not true"
        return right

    assert misread("free_form", "right", read) == []


def test_the_official_rule_is_reproduced_with_its_mistakes():
    def read(output, row):
        rule = row["rule"]  # a kind, or a benchmark that has one of its own
        kind = "mc" if rule == "mmvp" else rule
        return scoring.official_right(output, kind, row["answer"], rule)

    assert misread("official", "right", read) == []


THOUGHT = "Okay, so there is a boat. The answer might be C. Wait, the answer is B"


@pytest.mark.parametrize(
    "output, said",
    [
        (THOUGHT, None),
        ("The answer is C.\n" + THOUGHT, "C"),  # given at once, explained too long
        ("C\n" + THOUGHT, "C"),
        (THOUGHT + "</think>The answer is C. That is because", "C"),
        ("", None),
    ],
)
def test_a_thought_that_was_cut_off_is_no_answer(output, said):
    """Where the template opens <think>, it is not in the output."""
    asked = {"id": "0", "image": "", "prompt": "", "options": NUMBERS}
    scored = scoring.score(Answer(**asked, answer="A", output=output, truncated=True))
    assert (scored.said, scored.undecided) == (said, said is None)
    whole = scoring.score(Answer(**asked, answer="B", output=THOUGHT, truncated=False))
    assert whole.state == "right"
    exact = scoring.score(
        Answer(**asked, kind="exact", answer="word " * 30, output="word " * 30, truncated=True)
    )
    assert exact.state == "right"


def test_what_the_official_rule_reads_is_the_first_answer_with_an_end():
    """On random strings, without backtracking; and of thousands that never end, in no time."""
    draw = random.Random(0)
    parts = ["<answer>", "</answer>", "Answer:", "<", "answer>", "/", "\n", "x"]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        _, _, after = text.partition("<answer>")
        if "</answer>" in after:
            wanted = after.partition("</answer>")[0]
        else:
            wanted = "".join(text.partition("Answer:")[1:]) or text
        found = re.match(scoring.EXTRACT, text)
        assert found[found.lastindex] == wanted
    start = time.perf_counter()
    assert not scoring.official_right("</answer>" + "<answer>" * 30_000, "free", "3")
    assert time.perf_counter() - start < 10


PIECES = [
    *["The answer is ", "A or B, ", "B ", "not ", "\\boxed{", "<|", "3, ", "\n", "x", "<answer>"],
    *["would ", "选", "—", "(C) 15\n", "«", "if A, "],
]


@pytest.mark.parametrize("piece", PIECES)
def test_an_output_that_repeats_itself_is_scored_in_no_time(piece):
    output = piece * (32_000 // len(piece))
    start = time.perf_counter()
    scoring.parse_choice(output, NUMBERS)
    scoring.parse_yes_no(output)
    scoring.match_free_form(output, "3")
    for kind in ("mc", "yn", "free"):
        scoring.official_right(output, kind, "3")
    assert time.perf_counter() - start < 10
