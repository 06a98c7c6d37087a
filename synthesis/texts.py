"""Rules for what a model says: finding JSON in a reply, refusing questions, comparing answers.

Prompts and patterns are in prompts.toml.
"""

import json
import re
import tomllib
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.scoring import ONES, TEENS

PROMPTS = tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))
NUMBERS = {word: str(n) for n, word in enumerate([*ONES, *TEENS, "twenty"])}
OBJECT = r'\{(?:"(?:[^"\\]|\\.)*"|[^{}"])*\}'  # without an object inside it
LIST = r'\[(?:"(?:[^"\\]|\\.)*"|[^\[\]{}"])*\]'  # of no objects and no lists


def json_in_reply(text: str) -> list | None:
    """The JSON objects in a model's reply, else its longest list of texts; None without either:
    after the last </think>, in whatever prose or code fences, with trailing commas, or cut off at
    the end. It is parsed, never evaluated."""
    text = text.rpartition("</think>")[2][:20000]
    text = re.sub(r",(?=\s*[\]}])", "", text)  # trailing commas
    objects = []
    lists = []
    for part in re.findall(f"{OBJECT}|{LIST}", text):
        with suppress(ValueError, RecursionError):
            value = json.loads(part)
            if isinstance(value, dict):
                objects.append(value)
            elif not value or isinstance(value[0], str):
                lists.append(value)
    return objects or max(lists, key=len, default=None)


def one_line(text, longest: int = 60) -> str | None:
    """`text` on one line; None when it is no text, empty, too long, or holds <image> or any special
    token."""
    text = " ".join(text.split()) if isinstance(text, str) else ""
    if len(text) > longest or not text.isprintable() or re.search(r"<\w+>|<\||\|>", text):
        return None
    return text or None


def normal(text: str, question: str = "") -> str:
    """An answer as votes are counted: without lead-in, articles and outer punctuation, numbers as
    digits, one spelling; to a question how many, its first whole number."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = text.rpartition("</think>")[2]
    boxed = re.findall(r"\\boxed\s*\{([^{}]*)\}", text)
    text = re.sub(PROMPTS["lead_in"], "", (boxed or [text])[-1].strip())
    for pattern, replacement in (
        (r"(?<=\d),(?=\d{3}\b)", ""),  # thousands
        (r"\b(?:an?|the)\s+", ""),
        ("grey", "gray"),
        ("colour", "color"),
        (r"[^\W\d_]+", lambda word: NUMBERS.get(word[0], word[0])),
        (r"[^\w.%$€£¥°/:'&+-]", " "),
    ):
        text = re.sub(pattern, replacement, text)
    text = " ".join(text.split()).strip(" .:'")
    number = re.search(r"\d+", text)
    return number[0] if number and "how many" in question.casefold() else text


def leaks(question: str, answer: str) -> bool:
    """Whether the question contains its answer."""
    answer = normal(answer)
    pattern = re.escape(answer)
    if answer.isascii():  # other scripts may have no spaces
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return bool(answer and re.search(pattern, normal(question)))


@dataclass
class DraftQuestion:
    """A question that the model wrote for a crop."""

    question: str | None  # on one line
    answer: str | None  # the drafted one; after a vote, the one agreed on
    type: str  # one of the prompts' types
    n: int  # its place in the model's reply; the sample's id ends with it
    draft: str  # the answer that came with the question
    votes: list | None = None  # how many agreed, how many were asked
    options: list = field(default_factory=list)  # four, shuffled, of multiple choice


def drafted(item, n: int) -> DraftQuestion:
    """The n-th item of a model's reply as a question; what is no usable text is None."""
    fields = item if isinstance(item, dict) else {}
    answer = fields.get("answer")
    answer = one_line(str(answer) if isinstance(answer, int | float) else answer)
    question = one_line(fields.get("question"), 200)
    return DraftQuestion(question, answer, fields.get("type"), n, draft=answer)


def broken_rule(draft: DraftQuestion) -> str | None:
    """The first rule that a question breaks, as the reason to count; None for a good one."""
    if not draft.question or not draft.answer:
        return "question_malformed"
    question = unicodedata.normalize("NFKC", draft.question).casefold()
    for reason, pattern in PROMPTS["rules"].items():
        if re.search(pattern, question):
            return reason
    answer = normal(draft.answer)
    if answer in ("yes", "no", "true", "false"):
        return "yes_no"
    if draft.type not in PROMPTS["types"]:
        return "question_type"
    if leaks(draft.question, draft.answer):
        return "leak"
    most_words = 8 if draft.type == "text" else 4
    if re.search(PROMPTS["unknown"], answer) or len(draft.answer.split()) > most_words:
        return "answer_form"
    return None
