"""Scoring: what does an answer say, and is it right? Rules first; a judge is asked for the rest.

parse_choice("(A) is wrong, so C.", {"A": "red", "B": "blue", "C": "green"})    # "C"
parse_yes_no("There is no dog.")                                                # "no"
match_free_form("It says 15.", "15")                                            # True
"""

import re
import unicodedata
from contextlib import suppress

from benchmarks.rows import Answer, Question, Scored

# ------------------------------------------------------------------------------------------ words

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = dict(zip([*ONES, *TEENS, *TENS], [*range(20), *range(20, 100, 10)], strict=True))
NUMBER = rf"(?:{'|'.join(TENS)})[ -](?:{'|'.join(ONES[1:])})|{'|'.join(NUMBERS)}"
LARGE = r"hundred|thousand|million|billion|dozen"
# Beside a number: it is not exactly that.
VAGUE = (
    r"or|about|around|approx\w*|roughly|nearly|almost|maybe|perhaps|possibly|than|over|under|above|"
    r"below|up to|least|most|max\w*|minus|plus|fewer|half|twice|times|pairs?|am|pm|" + LARGE
)
NOT = (
    r"(?:\b(?:no|not|never|neither|nor|none|cannot|nothing)"
    r"\b|n't\b|不|没|无|否|并非|而非)"
)
# A clause with one of these asserts none of its options: it denies, doubts or only looks at them.
DENIES = (
    rf"{NOT}|\b(?:unlike|except|anything but|other than|rather than|instead of|wrong|incorrect|"
    r"false|unlikely|inaccurate|distractor|rul(?:e|ed|ing) out|lacks?|doubt|let's|let me|whether|"
    r"(?:eliminat|exclud|reject|disagree|contradict|mismatch|verify|check|compar|consider)\w*)\b|"
    r"错|排除|除了|禁止|来看|首先看|再看"
)
CONDITION = r"\b(?:if|unless)\b|如果|假如|若"
MARKED = r"[«‹·]\w[»›·]"
JOINT = r"(?:[ ,/&+、或者和与及]|还是|\b(?:or|and|nor|maybe|perhaps|possibly)\b)*"
SENTENCE = r"[.!]+(?=\s|$)|[。\n]"
CLAUSE = (  # commas part clauses, but not those of "«A», «B» and «C»"
    rf"(?<![»›·]),|,(?!{JOINT}[«‹·])|;|:(?=\s)|(?<=»)\s*[:-]|(?<=[»›]) as\b|"
    r"(?<=») (?=(?-i:[A-Z]))|(?<!anything )\bbut\b|\b(?:so|while|although|though|however|because|since|which|hence|"
    r"thus|therefore)\b|(?=\bnot [«‹·]|\brather than\b|\binstead of\b)|而是|但|所以|因此|因为|故"
)
SEVERAL = rf"{MARKED}(?:{JOINT}{MARKED})*"
CUE = (
    r"(?:\b(?:answers?|ans|option|choice|choos\w+|chose|pick\w*|select\w*|correct|best|correction|"
    r"leaves|go(?:ing)? (?:with|for))\b|答|选|正确)[^«‹·\n]*|"
    r"(?:\b(?:so|hence|thus|therefore|actually|wait|sorry|no|rather|think|say|meant|second thought)\W*|"
    r"\b(?:it|this|must|should|would)(?:'s| is| be)?(?: option)?\s+|是|所以|因此|故)(?=[«·])"
)
AFFIRMED = (
    r"\s*(?:(?:is|are|seems)\s+(?:\w+ )?(?:correct|right|best|answer|most)|\bbest\b|\bfits\b|"
    r"\bmatches\b|:?正确|:?对)"
)
ANNOUNCED = rf"(?i)(?:{CUE}){SEVERAL}|{SEVERAL}{AFFIRMED}"
BARE = rf"(?im)^[^\w«‹]*{SEVERAL}[^\w«‹\t\n,]*(?=$|\t(?!,)|\t, *\t)"
# A letter that stands at the start of a clause, or after one of these words, and before AFTER, is an
# option's and not a word ("A dog", "B12").
START = r"(?m:^)[^\w«‹]*|[.!]\s+|;\s*|(?<![A-Z]),\s*"
WITHIN = (
    r"[:=»]\s*|-\s+|[\u4e00-\u9fff]\s*|\b(?i:answer|is|are|be|it's|answer's|option|choice|choose|"
    r"chose|choosing|pick|select|say|so|hence|thus|therefore|think|with|for|likely|probably|"
    r"clearly|definitely|between|either|neither|both|not|no|or|like|actually|meant|but|wait|"
    r"rather)\s+"
)
AFTER = (
    r"\s*(?:$|[,:;!.。()/\n]|- |(?<!\bA)(?<!\bA )[«‹]|[\u662f而对正错项不都和与或及、。选也])|"
    r"\s+(?:because|since|as|and|or|but|rather|not|for|in|here|given|fits|matches|best|\d|"
    r"is (?:the|not|correct|right|wrong|incorrect|also))\b"
)
GAP = r"\W+(?:an? |the )?"
YES_OR_NO = (
    r"(yes|nope|no|是的?|有|对|否|不是|没有|不存在)"
    r"(?=\s*(?:$|[.,!;:。\n]|(?:and|or|because|since|as)\b))"
)
UNSURE = (
    r"(?:\bnot|n't|\bun|\bim)\s?(?:\w+ )?"
    r"(?:sure|certain|clear|able|possible|tell|determine|know)|"
    r"\b(?:cannot (?:tell|determine|know)|to tell|sorry|maybe|perhaps|possibly|idea)\b|"
    r"无法|不确定|不清"
)


# ------------------------------------------------------------------------------ what is said at all


def final_text(output: str) -> str:
    """What an output finally says: after the last </think>, in the last <answer>, start and end of
    what is long, in the last \\boxed{}; without questions, special tokens and markup, full-width
    forms as ASCII, number words below 100 as digits."""
    text = unicodedata.normalize("NFKC", output).replace("’", "'").rpartition("</think>")[2]
    if "<think>" in text:  # cut off while thinking
        return ""
    text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if len(text) >= 4000:
        text = text[:1000] + "\n" + text[-3000:]
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if boxed:
        text = boxed[-1]
    tags = r"<\|.*?\|>|</?\w+>|\\[a-z]*"
    marks = r"[*_`#$\"“”{}«»‹›·]|(?<!\w)'|'(?!\w)"
    question = r"[^.!?。\n]*\?"
    text = re.sub(f"{tags}|{marks}|{question}", " ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).strip()
    number = rf"(?i)(?<!the )(?<!hundred )(?<!hundred and )\b(?:{NUMBER})\b(?![ -](?:{LARGE}))"
    return re.sub(number, digits, text)


def digits(words: re.Match) -> str:
    """ "twenty-one" -> "21"."""
    return str(sum(NUMBERS[word] for word in re.split("[ -]", words[0].lower())))


def plain(text: str) -> str:
    """Lower case, without articles, outer punctuation and the hyphens of words: "The T-shirt." ->
    "t shirt"."""
    text = re.sub(
        r"\b(?:an?|the) +(?!is\b|and\b|or\b)(?=\w)|(?<=[a-z])-(?=[a-z])", " ", text.lower()
    )
    return " ".join(text.strip(" \n.,;:!?'()[]。").split())


# ---------------------------------------------------------------------------------------- choices


def parse_choice(output: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an output commits to; None when it commits to none, or to
    several."""
    names = "".join(options)
    text = re.sub(r":\s+", ": ", final_text(output))
    text = mark_certain(text, names)
    text = mark_texts(text, options)
    text = mark_alone(text, names)
    text = asserted(text)
    ranks = (
        (ANNOUNCED, "[«·]"),
        (BARE, "«"),
        (ANNOUNCED, "‹"),
        (BARE, "‹"),
        (MARKED, "«"),
        (MARKED, "‹"),
    )
    for pattern, mark in ranks:
        found = [each[0] for each in re.finditer(pattern, text) if re.search(mark, each[0])]
        if found:
            said = found[-1] if pattern == ANNOUNCED else "".join(found)
            named = set(re.findall(r"[«‹·](\w)", said))
            return named.pop() if len(named) == 1 else None
    return None


def several(names: str) -> str:
    """A pattern of one letter, or of several that are joined: "A, B and C"."""
    letter = rf"\b[{names}]\b(?!['-]\w)"
    return rf"({letter}(?:{JOINT}{letter})*)"


def mark_certain(text: str, names: str) -> str:
    """ "Option c, not (a)" -> "«C», not «A»"."""
    small = rf"(?i)(^|\banswer(?: is|:) |\boption: )([{names}])(?=[.):]|\s*$)"
    text = re.sub(small, lambda found: found[1] + found[2].upper(), text)
    option = r"(?:\b(?:option|choice)s?|选项)\s*"
    certain = rf"(?ai){option}{several(names)}|(?:{option})?[(\[]\s*{several(names)}\s*[)\]]"
    return re.sub(certain, lambda found: wrapped(found[1] or found[2], "«»"), text)


def wrapped(letters: str, marks: str) -> str:
    left, right = marks
    return re.sub(r"(?ai)\b[a-z]\b", lambda found: left + found[0].upper() + right, letters)


def mark_texts(text: str, options: dict[str, str]) -> str:
    """ "B. dark red, not red" -> "«B», not ‹A›": texts, the longest first, with their letter «B»."""
    texts = []
    for name, option in sorted(options.items(), key=lambda item: -len(item[1])):
        words = plain(final_text(option)).split()
        if words and all(word in text.lower() for word in words):
            texts.append(rf"(?P<{name}>{GAP.join(map(re.escape, words))})")
    if not texts:
        return text
    letter = r"(?:(?:«(\w)»|\b([a-z])\s*[.:)-])\W*?(?:an? |the )?)?"
    there = rf"{letter}(?<![\w.:«‹·-])(?:{'|'.join(texts)})(?![\w›»·-]|[.:]\d|\s*%)"

    def marked(found: re.Match) -> str:
        name, letter = found.lastgroup, found[1] or found[2] or ""
        if letter.upper() == name:
            return f"«{name}»"
        if found[name].upper() in options:
            return found[0]
        return found[0].removesuffix(found[name]) + f"‹{name}›"

    return re.sub(rf"(?ai){there}", marked, text)


def mark_alone(text: str, names: str) -> str:
    """ "C, as A is .." -> "«C», as ..": "So C" ->"""
    start = rf"(?a)({START}){several(names)}(?={AFTER})"
    text = re.sub(start, lambda found: found[1] + wrapped(found[2], "«»"), text)
    within = rf"(?a)({WITHIN}){several(names)}(?=(?<![AI])\s|{AFTER})"
    return re.sub(within, lambda found: found[1] + wrapped(found[2], "··"), text)


def asserted(text: str) -> str:
    text = re.sub(r"(?m)(^\W*«\w»)[.:)\]-]*[^\S\n]*(?:(?:an?|the) )?(?=‹)", r"\1 ", text)
    text = re.sub(
        r"(?im)([»·])[.:)\]-]*\s*(?:(?:an?|the) )?(‹\w›)(?=\s*(?:$|[\n.,;:!()]))", r"\1 \2", text
    )
    kept = []
    for sentence in re.split(SENTENCE, text):
        clauses = re.sub(rf"(?i){CLAUSE}", r"\n\g<0>", sentence).split("\n")
        for n, clause in enumerate(clauses):
            if re.search(rf"(?i){CONDITION}", sentence) or re.search(rf"(?i){DENIES}", clause):
                clauses[n] = re.sub(MARKED, " ", clause)
        kept.append("\t".join(clauses))
    return "\n".join(kept)


# ------------------------------------------------------------------------------ yes/no, free form


def parse_yes_no(output: str) -> str | None:
    """ "yes", "no" or None: the last one announced ("answer: no", "so yes"); else the one that
    stands as a clause of its own; else "no" for a sentence that denies, "yes" for "there is ..".
    Doubt and contradiction are None."""
    text = final_text(output).lower()
    if re.search(UNSURE, text):
        return None
    cue = r"(?:\b(?:answer|so|hence|thus|therefore)\b|答案|所以|因此)(?:\s*(?:is|是|为))?[\s:]*"
    announcements = re.findall(cue + YES_OR_NO, text)
    clauses = re.findall(rf"(?:^|[.,:;!。\n]|\b(?:is|so|and|or)\b)\s*{YES_OR_NO}", text)
    said = set()
    for word in announcements[-1:] or clauses:
        said.add("no" if re.match("no|否|不|没", word) else "yes")
    if not announcements and said != {"no"}:
        denial = r"\bthere(?: is|'s| are) no|\bno\W*$" if said else NOT
        if re.search(denial, text):
            said.add("no")
        if re.search(r"\bthere(?: is|'s| are) (?!no)|\byes\b", text):
            said.add("yes")
    return said.pop() if len(said) == 1 else None


def match_free_form(output: str, answer: str) -> bool | None:
    """True: the output's value is the answer; False: it is another number, or no for yes; None:
    undecided, a judge's matter.

    The value is what follows the last "answer is" / "answer:", else the whole text, its first or
    last line, or what follows a single sentence's last verb. A number also stands among words
    ("3 dogs"), where it is the only one and nothing qualifies it.
    """
    cue = r"(?i)\banswer\b\s*(?:is\b|[:=])|答案[是为:]*"
    text = re.split(cue, final_text(output))[-1].strip()
    gold = plain(final_text(answer))
    if not gold:
        return None
    if gold in map(plain, values_of(text)):
        return True
    if {gold, plain(text)} == {"yes", "no"}:
        return False
    return same_number(text, gold)


def values_of(text: str) -> list[str]:
    """What a text may mean as a whole: itself, its first or last line; "blue" of "The car is blue",
    but not of "I doubt it is blue"."""
    lines = text.split("\n")
    *before, value = re.split(r"(?i)\b(?:is|are|was|were|it's|says|reads|shows)\b", text)
    doubt = rf"(?i){NOT}|\b(?:if|whether|doubt|nobody|false|unsure|unclear|uncertain)\b"
    if re.search(r"[.!。]\s|\n", text) or re.search(doubt, " ".join(before)):
        value = text  # of several sentences, or of one that does not say so
    return [text, lines[0], lines[-1], value]


def same_number(text: str, gold: str) -> bool | None:
    """Whether the only number in `text` is that of `gold`: "3.0 dogs" and "3" are, "3" and "4" are
    not. None where there is no such number, it is qualified ("about 3", "3%"), stands for something
    else ("3 dogs" and "3 cats"), or the two are written in different ways (1/2 and 0.5)."""
    number = r"(?<![\w.:/])-?\d+(?:[.:/]\d+)*(?![\w%+°])"
    found = re.findall(number, text)
    wanted = re.fullmatch(rf"({number})(?: [a-z]+)*", gold)
    if len(found) != 1 or not wanted or re.search(rf"(?i){NOT}|\b(?:{VAGUE})\b", f"{text} {gold}"):
        return None
    a, b = found[0], wanted[1]
    if gold != b and plain(text) != a:
        return None
    with suppress(ValueError):  # 10:11 is no float
        return float(a) == float(b)
    alike = re.sub(r"\d", "", a) == re.sub(r"\d", "", b)
    return a == b if alike else None


# ------------------------------------------------------------------------------------------ score


def official_right(output: str, kind: str, answer: str, bench: str = "") -> bool:
    """The official rule, mistakes included ("Answer: C" counts as A; only what it calls wrong goes
    to the judge)."""
    if kind == "exact":  # ours
        return output.split() == answer.split()
    gold = answer.strip().lower()
    text = output[max(output.find("Answer:"), 0) :]
    inside = re.search(r"(?s)<answer>(.*?)</answer>", output)
    text = (inside[1] if inside else text).strip()
    if kind == "yn":
        text = text.lstrip("*")
        if text.lower().startswith("answer"):
            text = text.partition("answer")[2]  # the original crashes at "Answer": wrong here
        text = text.strip(":* \n").lower()
        first = re.match("yes|no", text)
        return gold == (first[0] if first else text.split(" ")[-1].strip(". *"))
    if kind == "free" or text.lower() == gold:
        return text.lower() == gold
    rules = (r"\(([A-Z])\)", r"([A-Z])[.)\s]", r"([A-Z])")
    if bench == "mmvp":
        rules = (r"\(([ABab])\)", r"\b([ABab])\b")
    for rule in rules:
        if letter := re.search(rule, text):
            return letter[1].lower() == gold
    return False


def parse_and_judge(question: Question, output: str) -> tuple[str | None, bool | None]:
    """(what an output says, whether that is right; None where our rules leave it open)."""
    if question.kind == "exact":
        return output, output.split() == question.answer.split()
    if question.kind == "free":
        return output, match_free_form(output, question.answer)
    if question.kind == "mc":
        said = parse_choice(output, question.options)
    else:
        said = parse_yes_no(output)
    return said, None if said is None else said == question.answer


def is_right(question: Question, output: str) -> bool:
    """Whether our rules call an output right; what only a judge could decide is not."""
    return bool(parse_and_judge(question, output)[1])


def score(answer: Answer, verdict: bool | None = None, scorer: str = "ours") -> Scored:
    """What an answer is worth. verdict: the judge's, used only where the scorer is undecided."""
    scored = Scored(**vars(answer))
    if answer.error is not None:
        return scored
    scored.said, right = parse_and_judge(answer, answer.output)
    scored.official = official_right(answer.output, answer.kind, answer.answer, answer.bench)
    decided = right if scorer == "ours" else scored.official or None
    scored.undecided = decided is None
    scored.judged = scored.undecided and verdict is not None
    scored.correct = bool(verdict if scored.undecided else decided)
    scored.state = "right" if scored.correct else "wrong"
    if scored.correct:
        scored.said = answer.answer
    elif right is None and verdict is None:
        scored.state = "unparsed"
    return scored
