"""The rows of a benchmark: a question, what a model answered to it, and what that is worth."""

import hashlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from storage.images import file_at
from triplets.format import only


@dataclass(kw_only=True)
class Question:
    """A benchmark's row in the neutral form, in which people can bring benchmarks of their own."""

    id: str  # unique in its benchmark
    image: Path | str
    prompt: str
    answer: str  # an option's letter (mc), yes or no (yn), or a text; of free, each line is right
    kind: str = "mc"  # mc, yn, free, or exact: word for word
    options: dict[str, str] = field(default_factory=dict)  # letter -> text
    crops: list[Path | str] = field(default_factory=list)  # of what it takes to answer; or none
    group: str | None = None  # category, for accuracies by group
    pair: str | None = None  # questions that only count together (MMVP)

    def fingerprint(self, view: str) -> str:
        """Of all that an answer to it in a view, and what that is worth, depend on, the pictures'
        bytes included, where they can be read."""
        told = [self.prompt, self.answer, self.kind, self.options, self.group, self.pair]
        seen = []
        for shown in self.shown(view):
            seen.append(None)
            with suppress(OSError), file_at(shown).open("rb") as file:
                seen[-1] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(ascii([told, only(seen)]).encode()).hexdigest()[:20]

    def shown(self, view: str) -> list[Path | str]:
        """The pictures of a view, full or crop."""
        return [self.image] if view == "full" else self.crops


@dataclass(kw_only=True)
class Answer(Question):
    """A line of answers-BENCH-RANK.jsonl: a question and what a model answered, or an error.

    image and crops: relative to the folder that holds the line.
    """

    bench: str = ""
    view: str = "full"  # or crop: what was shown
    digest: str | None = None  # the question's fingerprint, when it was asked
    output: str | None = None
    tokens: int | None = None
    truncated: bool | None = None
    seconds: float | None = None
    error: str | None = None  # instead of an output; counted, never scored, asked again
    calls: int | None = None  # of the zoom-in tool
    malformed: int | None = None  # calls that were none
    prompt_tokens: int | None = None  # of a served model, by its server
    answered_by: str | None = None  # the served model, as its server calls it
    shrunk: int | None = None  # images that were made smaller to be sent

    def place(self) -> tuple[str, str, str]:
        return self.bench, self.id, self.view

    def line(self) -> dict:
        """As it is written: an answer's own fields only where there is something."""
        own = {each.name for each in fields(Answer)} - {each.name for each in fields(Question)}
        row = asdict(self)
        return {key: value for key, value in row.items() if key not in own or value is not None}


@dataclass(kw_only=True)
class Scored(Answer):
    """An answer and what it is worth under a scorer."""

    said: str | None = None  # what was parsed
    official: bool = False  # right by the official rule
    undecided: bool = False  # the scorer leaves it to a judge
    judged: bool = False
    correct: bool = False
    state: str = "error"  # right, wrong, unparsed or error


def read_answer(line: dict) -> Answer:
    """The answer of a line, whatever else an older version wrote there."""
    known = {each.name for each in fields(Answer)}
    line = line | {"crops": crops_of(line)}
    return Answer(**{key: value for key, value in line.items() if key in known})


def crops_of(row: dict) -> list:
    """What a row says of its crops: a list `crops`, or, as rows of one crop may, a `crop`. Raises
    ValueError."""
    crops = row.get("crops") or list(filter(None, [row.get("crop")]))
    if not isinstance(crops, list):
        raise ValueError(f"crops is {crops!r:.60}. Expected a list of the names of files")
    return crops


def repeats_itself(text: str) -> bool:
    """Whether a text ends in a loop: the same piece three times or more, over the last 100
    characters at least."""
    end = text.rstrip()[-3000:]
    for piece in range(1, (len(end) + 1) // 3 + 1):
        size = max(2 * piece - 1, 100 - piece)  # the last one may lack a space
        if size + piece <= len(end) and end[-size:] == end[-size - piece : -piece]:
            return True
    return False
