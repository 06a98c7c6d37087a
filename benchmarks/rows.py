"""The rows of a benchmark: a question, what a model answered to it, and what that answer was worth."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Question:
    """A benchmark's row in the neutral form, in which people can bring benchmarks of their own."""

    id: str  # unique in its benchmark
    image: Path
    prompt: str
    answer: str  # an option's letter (mc), yes or no (yn), or a text
    kind: str = "mc"  # mc, yn, free, or exact: word for word
    options: dict[str, str] = field(default_factory=dict)  # letter -> text
    crop: Path | None = None
    group: str | None = None  # category, for accuracies by group
    pair: str | None = None  # questions that only count together (MMVP)


@dataclass(kw_only=True)
class Answer(Question):
    """A line of answers-BENCH-RANK.jsonl: a question and what a model answered, or an error."""

    bench: str
    view: str  # full or crop: which image was shown
    output: str | None = None
    tokens: int | None = None
    truncated: bool | None = None
    seconds: float | None = None
    error: str | None = None  # instead of an output; counted, never scored, asked again
    calls: int | None = None  # of the zoom-in tool
    malformed: int | None = None  # calls that were none


@dataclass(kw_only=True)
class Scored(Answer):
    """An answer and what it is worth under a scorer."""

    said: str | None = None  # what was parsed
    official: bool = False  # right by the official rule
    undecided: bool = False  # the scorer leaves it to a judge
    judged: bool = False
    correct: bool = False
    state: str = "error"  # right, wrong, unparsed or error
