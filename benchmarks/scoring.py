"""Scoring: what does an answer say, and is it right? Rules first; a judge is asked for what they leave open.

parse_choice("(A) is wrong, so C.", {"A": "red", "B": "blue", "C": "green"})       # "C"
parse_yes_no("There is no dog.")                                                   # "no"
match_free_form("It says 15.", "15")                                               # True
"""

import re
import unicodedata

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = dict(zip([*ONES, *TEENS, *TENS], [*range(20), *range(20, 100, 10)]))
NUMBER = rf"(?:{'|'.join(TENS)})[ -](?:{'|'.join(ONES[1:])})|{'|'.join(NUMBERS)}"
LARGE = r"hundred|thousand|million|billion|dozen"
VAGUE = (
    rf"or|about|around|approx\w*|roughly|nearly|almost|maybe|perhaps|possibly|than|over|under|above|below|up to|least|most|"
    rf"max\w*|minus|plus|fewer|half|twice|times|pairs?|am|pm|{LARGE}"
)
NOT = (
    r"(?:\b(?:no|not|never|neither|nor|none|cannot|without|rather than|instead of)\b|n't\b|"
    r"不[会能可应该要认为同意答案是选择项]*|没有?|否|并非|而非|排除)"
)
REJECT = (
    r"\b(?:unlike|except|anything but|other than|rul(?:e|ed|ing) out|eliminat\w+|exclud\w+|reject\w*|disagree with|lacks?|"
    r"(?<!no )(?<!without )(?<!without a )doubt)\b|除了?|禁止|错误的?(?:选项|答案)是?"
)
DENIED = (
    rf"(?:is|are|was|were|does|do|seems?|looks?|can be|should be)(?: both| all)?\s*(?:\w+ly )?(?:{NOT}|wrong|incorrect|false|"
    r"unlikely|ruled out|eliminated|excluded|a distractor)|cannot\b|contradicts\b|不|错误?"
)
SAY = (
    r"answers?|options?|choice|choose|choosing|pick|select|say|so|hence|thus|therefore|actually|think|believe|wait|sorry|"
    r"correction|meant|second thought|in fact"
)
CUE = rf"(?:\b(?:{SAY}|ans|go with|correct|(?:must|should|would) be)\b|\bit(?:'s| is)(?= ?[«‹·])|答案?|选项?|而是|所以|因此|故)"
BEFORE = (
    rf"(?:^[^\w«‹]*|[,;:(\[=]\s*|[.!-]\s+|(?<=[^\x00-\x7f«‹])\s*|\b(?i:{SAY}|is|are|be|it's|with|and|or|not|nor|but|than|"
    r"likely|probably|clearly|definitely|maybe|perhaps|both|either|neither|between)\s+)"
)


def final_text(output: str) -> str:
    """What an output finally says: after the last </think>, in the last <answer>, start and end of what is long, in the last
    \\boxed{}; without questions, special tokens and markup, full-width forms as ASCII, number words below 100 as digits."""
    text = unicodedata.normalize("NFKC", output).replace("’", "'").rpartition("</think>")[2]
    text = "" if "<think>" in text else text.rpartition("<answer>")[2].partition("</answer>")[0]
    text = text if len(text) < 4000 else text[:1000] + "\n" + text[-3000:]
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    text = boxed[-1] if boxed else text
    text = re.sub(
        r"<\|.*?\|>|</?\w+>|\\[a-z]*|[*_`#$\"“”{}«»‹›·]|(?<!\w)'|'(?!\w)|[^.!?。\n]*\?", " ", text
    )
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).strip()
    return re.sub(
        rf"(?<!the )(?<!hundred )(?<!hundred and )\b(?:{NUMBER})\b(?![ -](?:{LARGE}))",
        lambda m: str(sum(NUMBERS[word] for word in re.split("[ -]", m[0].lower()))),
        text,
        flags=re.I,
    )


def plain(text: str) -> str:
    """Lower case, without articles, outer punctuation and the hyphens of words."""
    text = re.sub(r"\b(?:an?|the) +(?=\w)|(?<=[a-z])-(?=[a-z])", " ", text.lower())
    return " ".join(text.strip(" \n.,;:!?'()[]。").split())


def parse_choice(output: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an output commits to; None when it commits to none, or to several.

    1. Options are marked where they are named: «C» for "(c)" and "option c", ‹C› for the text of C (the longest that fits), and
       ·C· for a capital that stands alone, before punctuation, a number, "because", ..: "A dog" and "B12" name none.
    2. What is denied ("not A", "B and D are wrong") is dropped, and a letter beside another option's text is no answer.
    3. The last one announced ("answer", "so", "choose", "选", ..) decides: letters first, then texts, alone in their sentence.
    4. Else the lines that begin with a letter; else what is named, ·C· aside ("vitamin C"); and that must be a single option.
    """
    names, text, end = (
        "".join(options),
        final_text(output),
        r"(?:\s*(?:$|[,:;!.()\n«‹]|- |[^\x00-\x7f]))",
    )
    whole = [
        name for name, option in options.items() if len(option) > 1 and plain(option) == plain(text)
    ]
    if whole:
        return whole[0] if len(whole) == 1 else None
    text = re.sub(r":\s+", ": ", text)
    text = re.sub(
        rf"(^|\banswer(?: is|:) )([{names}])(?={end})",
        lambda m: m[1] + m[2].upper(),
        text,
        flags=re.I,
    )
    text = re.sub(
        rf"(?:\b(?:option|choice)|选项)\s*[(\[]?([{names}])\b[)\]]?|[(\[]\s*([{names}])\s*[)\]]",
        lambda m: f"«{(m[1] or m[2]).upper()}»",
        text,
        flags=re.I,
    )
    text = re.sub(
        rf"({BEFORE})([{names}])(?={end}|\s+(?:because|since|as|and|or|but|rather|not|\d|"
        r"is (?:the|not|correct|right|wrong|incorrect))\b)",
        r"\1·\2·",
        text,
        flags=re.M,
    )
    for name, option in sorted(options.items(), key=lambda item: -len(item[1])):
        if words := plain(final_text(option)).split():
            words = r"[\s-]+(?:(?:an?|the)\s)?".join(map(re.escape, words))
            text = re.sub(
                rf"(?<![a-z0-9.:‹«·-]){words}(?![a-z0-9›»·-]|[.:]\d|\s*%)",
                f"‹{name}›",
                text,
                flags=re.I,
            )
    several = r"[«‹·]\w[»›·](?:(?:[\s,/&+、或者和与及]|还是|\b(?:or|and|nor|maybe|perhaps)\b)*[«‹·]\w[»›·])*"
    text = re.sub(rf"(?:{NOT}|{REJECT})\s*(?:[\w']+\s+){{0,3}}?{several}", " ", text, flags=re.I)
    text = re.sub(rf"{several}[)\]]?:?\s*(?:{DENIED})", " ", text, flags=re.I)
    if re.search(
        r"[«·](\w)[»·]\W*(?:(?:an?|the)\s+)?‹(?!\1)|(?<!«\w» )‹(\w)› ?«(?!\2)", text, re.I
    ):
        return None
    announced = re.findall(rf"{CUE}[^«‹·.\n]*({several})(?=([^.\n]*))", text, flags=re.I)
    lines = [
        first + rest.replace("·", " ")
        for first, rest in re.findall(rf"^\W*(?=[«·])({several})(.*)", text, re.M)
    ]
    letters = [found for found, _ in announced if "‹" not in found]
    said = (letters or [*map("".join, announced)])[-1:] or lines or [text.replace("·", " ")]
    said = set(re.findall(r"[«·](\w)", str(said)) or re.findall(r"‹(\w)", str(said)))
    return said.pop() if len(said) == 1 else None


def parse_yes_no(output: str) -> str | None:
    """ "yes", "no" or None: the last one announced ("answer: no", "so yes"); else the one that stands as a clause of its own; else
    "no" for a sentence that denies, "yes" for "there is ..". Doubt and contradiction are None."""
    text = final_text(output).lower()
    word = r"(yes|nope|no|是的?|有|对|否|不是|没有|不存在)(?=\s*(?:$|[.,!;:。\n]|(?:and|or|because|since|as)\b))"
    announced = re.findall(
        rf"(?:\b(?:answer|so|hence|thus|therefore)\b|答案|所以|因此)(?:\s*(?:is|是|为))?[\s:]*{word}",
        text,
    )
    said = announced[-1:] or re.findall(rf"(?:^|[.,:;!。\n]|\b(?:is|so|and|or)\b)\s*{word}", text)
    said = {"no" if re.match("no|否|不|没", found) else "yes" for found in said}
    if re.search(
        r"(?:\bnot|n't|\bun|\bim)\s?(?:\w+ )?(?:sure|certain|clear|able|possible|tell|determine|know)|"
        r"\b(?:cannot (?:tell|determine|know)|to tell|sorry|maybe|perhaps|possibly|idea)\b|无法|不确定|不清",
        text,
    ):
        return None
    if not announced and said != {"no"}:
        said |= (
            {"no"}
            if re.search(r"\bthere(?: is|'s| are) no|\bno\W*$" if said else NOT, text)
            else set()
        )
        said |= {"yes"} if re.search(r"\bthere(?: is|'s| are) (?!no)|\byes\b", text) else set()
    return said.pop() if len(said) == 1 else None


def match_free_form(output: str, answer: str) -> bool | None:
    """True: the output's value is the answer; False: it is another number, or no for yes; None: undecided, a judge's matter.

    The value is what follows the last "answer is" / "answer:", else the whole text, its first or last line, or what follows a
    single sentence's last verb. A number also stands among words ("3 dogs"), where it is the only one and nothing qualifies it.
    """
    text = re.split(r"\banswer\b\s*(?:is\b|[:=])|答案[是为:]*", final_text(output), flags=re.I)[
        -1
    ].strip()
    gold, number = plain(final_text(answer)), r"(?<![\w.:/])-?\d+(?:[.:/]\d+)*(?![\w%+°])"
    values = [text, *text.split("\n")[:1], *text.split("\n")[-1:]]
    *before, value = re.split(r"\b(?:is|are|was|were|it's|says|reads|shows)\b", text, flags=re.I)
    doubt = rf"{NOT}|\b(?:if|whether|doubt|nobody|false|unsure|unclear|uncertain)\b"
    values += (
        [value]
        if not re.search(r"[.!。]\s|\n", text) and not re.search(doubt, " ".join(before), re.I)
        else []
    )
    if not gold or gold in map(plain, values):
        return bool(gold) or None
    if {gold, plain(text)} == {"yes", "no"}:
        return False
    found = re.findall(number, text)
    wanted = re.fullmatch(rf"({number})(?: [a-z]+)*", gold)
    vague = re.search(rf"{NOT}|\b(?:{VAGUE})\b", f"{text} {gold}", re.I)
    if len(found) != 1 or not wanted or vague or gold != wanted[1] and plain(text) != found[0]:
        return None
    a, b = found[0], wanted[1]
    if re.fullmatch(r"(?:-?\d+(?:\.\d+)? ?){2}", f"{a} {b}"):
        return float(a) == float(b)
    return a == b or (
        None if re.sub(r"\d", "", a) != re.sub(r"\d", "", b) else False
    )  # 1/2 and 0.5: a judge's matter


def official_right(output: str, kind: str, answer: str, bench: str = "") -> bool:
    """The official rule, mistakes included ("Answer: C" counts as A; only what it calls wrong goes to the judge)."""
    inside, gold = output.partition("<answer>")[2], answer.strip().lower()
    text = (
        inside.partition("</answer>")[0]
        if "</answer>" in inside
        else output[max(output.find("Answer:"), 0) :]
    ).strip()
    if kind == "yn":
        text = text.lstrip("*")
        if text.lower().startswith("answer"):
            text = text.partition("answer")[2]  # the original crashes at "Answer": wrong here
        text = text.strip(":* \n").lower()
        return gold == next(
            (word for word in ("yes", "no") if text.startswith(word)),
            text.split(" ")[-1].strip(". *"),
        )
    rules = (
        (r"\(([ABab])\)", r"\b([ABab])\b")
        if bench == "mmvp"
        else (r"\(([A-Z])\)", r"([A-Z])[.)\s]", r"([A-Z])")
    )
    first = next(filter(None, (re.search(rule, text) for rule in rules)), None)
    return text.lower() == gold or kind == "mc" and bool(first) and first[1].lower() == gold


def score(a: dict, verdict: bool | None = None, scorer: str = "ours") -> dict:
    """Answer `a` with said (what was parsed, or None), official (right by that rule), undecided (the scorer leaves it to a
    judge), judged, correct, and state: right, wrong, unparsed or error. verdict: the judge's, used only where undecided."""
    if "error" in a:
        return a | {"state": "error"}
    output, gold, kind = a["output"], a["answer"], a["kind"]
    said = (
        parse_choice(output, a["options"])
        if kind == "mc"
        else parse_yes_no(output)
        if kind == "yn"
        else output
    )
    right = (
        match_free_form(output, gold)
        if kind == "free"
        else output.split() == gold.split()
        if kind == "exact"
        else said and said == gold
    )
    official = right if kind == "exact" else official_right(output, kind, gold, a["bench"])
    decided = right if scorer == "ours" else official or None
    correct = bool(verdict if decided is None else decided)
    return a | {
        "said": gold if correct else said,
        "official": official,
        "undecided": decided is None,
        "correct": correct,
        "judged": decided is None and verdict is not None,
        "state": "right"
        if correct
        else "unparsed"
        if right is None and verdict is None
        else "wrong",
    }
