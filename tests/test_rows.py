"""What an answer's text and length tell, and that no text is in the way of a file."""

import pytest

from benchmarks.rows import repeats_itself
from storage.files import read_jsonl, write_jsonl


def test_half_a_character_is_written_and_read_again(tmp_path):
    rows = [{"text": "a sign \ud83d, 木"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl", []) == rows


@pytest.mark.parametrize(
    "text, loops",
    [
        ("", False),
        ("no", False),
        ("ha " * 20, False),  # short
        ("ha " * 40, True),
        ("a" * 100, True),
        ("a" * 99, False),
        ("The sign says stop. " * 3, False),  # 60 characters
        ("I look again at the sign beside the door. " * 3, True),
        ("I look again at the sign beside the door. " * 2, False),
        ("First I look. " + "And then again, I cannot read it. " * 30 + "And then", True),
        ("word " * 60 + "So the answer is (C).", False),  # it ended all the same
        (" ".join(f"row {n} of the table" for n in range(90)), False),
        ("x" * 300 + "y" * 300, True),
        ("".join(chr(97 + n % 26) for n in range(333)) * 3, True),
        ("".join(f"word {n} of a paragraph. " for n in range(22)) * 20, True),  # of 500 characters
    ],
)
def test_a_text_that_ends_in_a_loop_is_one(text, loops):
    assert repeats_itself(text) == loops
