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
# Before an option: it is denied.
NOT = (
    r"(?:\b(?:no|not|never|neither|nor|none|cannot|without|rather than|instead of)\b|n't\b|"
    r"不[会能可应该要认为同意答案是选择项]*|没有?|否|并非|而非|排除)"
)
REJECT = (
    r"\b(?:unlike|except|anything but|other than|rul(?:e|ed|ing) out|eliminat\w+|exclud\w+|"
    r"reject\w*|disagree with|lacks?|(?<!no )(?<!without )(?<!without a )doubt)\b|"
    r"除了?|禁止|错误的?(?:选项|答案)是?"
)
# After an option: it is denied.
DENIED = (
    r"(?:is|are|was|were|does|do|seems?|looks?|can be|should be)(?: both| all)?\s*(?:\w+ly )?"
    rf"(?:{NOT}|wrong|incorrect|false|unlikely|ruled out|eliminated|excluded|a distractor)|"
    r"cannot\b|contradicts\b|不|错误?"
)
# Before an option: it is announced.
SAY = (
    r"answers?|options?|choice|choose|choosing|pick|select|say|so|hence|thus|therefore|actually|"
    r"think|believe|wait|sorry|correction|meant|second thought|in fact"
)
CUE = (
    rf"(?:\b(?:{SAY}|ans|go with|correct|(?:must|should|would) be)\b|"
    r"\bit(?:'s| is)(?= ?[«‹·])|答案?|选项?|而是|所以|因此|故)"
)
# Between which a capital stands as an option's letter, and not as a word ("A dog", "B12").
BEFORE = (
    r"(?:^[^\w«‹]*|[,;:(\[=]\s*|[.!-]\s+|(?<=[^\x00-\x7f«‹])\s*|"
    rf"\b(?i:{SAY}|is|are|be|it's|with|and|or|not|nor|but|than|"
    r"likely|probably|clearly|definitely|maybe|perhaps|both|either|neither|between)\s+)"
)
AFTER = r"(?:\s*(?:$|[,:;!.()\n«‹]|- |[^\x00-\x7f]))"
GOES_ON = (
    r"\s+(?:because|since|as|and|or|but|rather|not|\d|"
    r"is (?:the|not|correct|right|wrong|incorrect))\b"
)
MARKED = r"[«‹·]\w[»›·]"
SEVERAL = rf"{MARKED}(?:(?:[\s,/&+、或者和与及]|还是|\b(?:or|and|nor|maybe|perhaps)\b)*{MARKED})*"
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
    text = re.sub(r"\b(?:an?|the) +(?=\w)|(?<=[a-z])-(?=[a-z])", " ", text.lower())
    return " ".join(text.strip(" \n.,;:!?'()[]。").split())


# ---------------------------------------------------------------------------------------- choices


def parse_choice(output: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an output commits to; None when it commits to none, or to
    several.

    1. An output that is an option's text, and no more, means that option.
    2. Else options are marked where they are named: «C» for "(c)" and "option c", ·C· for a capital
       that stands alone ("A dog" and "B12" name none), ‹C› for the text of C.
    3. What is denied ("not A", "B and D are wrong") is dropped, and a letter beside another
       option's text is no answer.
    4. The last one announced ("answer", "so", "choose", "选", ..) decides: letters first, then
       texts, alone in their sentence.
    5. Else the lines that begin with a letter; else what is named, ·C· aside ("vitamin C"); and
       that must be a single option.
    """
    text = final_text(output)
    said = {
        name for name, option in options.items() if len(option) > 1 and plain(option) == plain(text)
    }
    if not said:
        text = mark_texts(mark_letters(text, "".join(options)), options)
        text = drop_denied(text)
        if not contradicts_itself(text):
            said = announced(text) or named(text)
    return said.pop() if len(said) == 1 else None


def mark_letters(text: str, names: str) -> str:
    """ "Option c or (d)." -> "«C» or «D»."; "So C, not A" -> "So ·C·, not ·A·"."""
    text = re.sub(r":\s+", ": ", text)
    small = rf"(?i)(^|\banswer(?: is|:) )([{names}])(?={AFTER})"
    text = re.sub(small, lambda found: found[1] + found[2].upper(), text)
    option = rf"(?:\b(?:option|choice)|选项)\s*[(\[]?([{names}])\b[)\]]?"
    bracketed = rf"[(\[]\s*([{names}])\s*[)\]]"
    certain = f"(?i){option}|{bracketed}"
    text = re.sub(certain, lambda found: f"«{(found[1] or found[2]).upper()}»", text)
    alone = rf"(?m)({BEFORE})([{names}])(?={AFTER}|{GOES_ON})"
    return re.sub(alone, r"\1·\2·", text)


def mark_texts(text: str, options: dict[str, str]) -> str:
    """ "It is dark red" -> "It is ‹B›", where A is "red": the longest text is looked for first."""
    for name, option in sorted(options.items(), key=lambda item: -len(item[1])):
        words = plain(final_text(option)).split()
        if words:
            words = r"[\s-]+(?:(?:an?|the)\s)?".join(map(re.escape, words))
            there = rf"(?i)(?<![a-z0-9.:‹«·-]){words}(?![a-z0-9›»·-]|[.:]\d|\s*%)"
            text = re.sub(there, f"‹{name}›", text)
    return text


def drop_denied(text: str) -> str:
    """ "Neither «A» nor «B». «D» is ruled out, so «C»" -> " .  , so «C»"."""
    text = re.sub(rf"(?i)(?:{NOT}|{REJECT})\s*(?:[\w']+\s+){{0,3}}?{SEVERAL}", " ", text)
    return re.sub(rf"(?i){SEVERAL}[)\]]?:?\s*(?:{DENIED})", " ", text)


def contradicts_itself(text: str) -> bool:
    """Whether a letter stands beside another option's text: "«C» ‹A›", "‹A› «C»"."""
    beside = r"(?i)[«·](\w)[»·]\W*(?:(?:an?|the)\s+)?‹(?!\1)|(?<!«\w» )‹(\w)› ?«(?!\2)"
    return re.search(beside, text) is not None


def announced(text: str) -> set[str]:
    """The options of the last announcement: "I think «A». So «C»." -> {"C"}. Texts count only alone
    in their sentence: "So the ‹D› van hides it, and it is ‹C›." -> {"C", "D"}."""
    found = re.findall(rf"(?i){CUE}[^«‹·.\n]*({SEVERAL})(?=([^.\n]*))", text)
    if not found:
        return set()
    letters = [options for options, _ in found if "‹" not in options]
    return names_in(letters[-1] if letters else "".join(found[-1]))


def named(text: str) -> set[str]:
    """The options of the lines that begin with a letter, else of all: "«C»\nIt is by «A»." ->
    {"C"}; "It is ‹C›." -> {"C"}. Elsewhere ·C· may be a word."""
    lines = re.findall(rf"(?m)^\W*(?=[«·])({SEVERAL})(.*)", text)
    said = "\n".join(start + rest.replace("·", " ") for start, rest in lines)
    return names_in(said or text.replace("·", " "))


def names_in(text: str) -> set[str]:
    """Of letters, if there are any, else of texts: "«C» ‹A›" -> {"C"}."""
    return set(re.findall(r"[«·](\w)", text) or re.findall(r"‹(\w)", text))


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
