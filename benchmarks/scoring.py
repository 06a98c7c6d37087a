"""Scoring: what does an answer say, and is it right? Rules first; a judge is asked for the rest.

parse_choice("(A) is wrong, so C.", {"A": "red", "B": "blue", "C": "green"})    # "C"
parse_yes_no("There is no dog.")                                                # "no"
match_free_form("It says 15.", "15")                                            # True
"""

import re
import unicodedata
from decimal import Decimal

from benchmarks.rows import Answer, Question, Scored

# ------------------------------------------------------------------------------ what is said at all

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = {word: n for n, word in enumerate(ONES + TEENS)}
NUMBERS |= {word: 10 * n for n, word in enumerate(TENS, 2)}
NUMBER = (
    r"(?i)(?<!the )(?<!hundred )(?<!hundred and )\b(?:"
    rf"(?:{'|'.join(TENS)})[ -](?:{'|'.join(ONES)})|{'|'.join(NUMBERS)})\b"
    r"(?![ -](?:hundred|thousand|million|billion|dozen))"
)
MARKUP = (  # special tokens, tags, LaTeX; questions
    r"<\|.*?\|>|</?\w+>|\\[a-z]*|(?m:^\s*#+ )|[*_`$\"“”{}«»‹›·]|(?<!\w)'|'(?!\w)|[^.!?。\n]*\?"
)

UNIT = r"(?:[kmc]?m|[km]?g|m?l|[kmgt]b|[kmg]?hz|k?w|k?v|ft|in|lb|oz|mph)\b"


def final_text(output: str) -> str:
    """What an output finally says: after the last </think>, in the last <answer>, start and end of
    what is long, in the last \\boxed{}; without questions, special tokens and markup, full-width
    forms as ASCII, number words below 100 as digits."""
    text = output.rpartition("</think>")[2]
    if "<think>" in text:  # cut off while thinking
        return ""
    text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if len(text) > 3000:
        text = text[:500] + "\n" + text[-2000:]
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans("’–—−【】", "'---\n\n"))
    boxed = re.findall(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    text = re.sub(MARKUP, " ", boxed[-1] if boxed else text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).strip()
    return re.sub(NUMBER, digits, text)


def digits(words):
    """ "twenty-one" -> "21"."""
    return str(sum(NUMBERS[word] for word in re.split("[ -]", words[0].lower())))


def plain(text):
    """Lower case, without articles, outer punctuation and the hyphens of words: "The T-shirt." ->
    "t shirt"; but "A is darker" keeps its letter. "5kg" -> "5 kg", "5 %" -> "5%"."""
    between = r"\b(?:an?|the) +(?!is\b|and\b|or\b)(?=\w)|(?<=[a-z])-(?=[a-z])"
    text = re.sub(rf"{between}|(?<=\d)(?={UNIT})", " ", text.lower())
    text = re.sub(r"(?<=\d) +(?=[%°])", "", text)
    return " ".join(text.strip(" \n.,;:!?'()[]。").split())


# ---------------------------------------------------------------------------------------- choices

# Marks: «C» a letter that names an option wherever it stands; ·C· one that may be a word or a name
# ("the sign is C"), and counts only when announced; ‹C› the text of C.
MARK = r"[«‹·]\w[»›·]"
JOINT = r"(?:[ \n,/&+、或者和与及]|还是|\b(?:or|and|nor|to|maybe|perhaps|possibly)\b){0,7}"
SEVERAL = rf"{MARK}(?:{JOINT}{MARK}){{0,9}}"  # "«A», «B» and «C»"

# A letter and its text, or another's, are named as one: "«C». ‹C›" -> "«C» ‹C›".
BESIDE = r"(?im)([»·])[.:-]*\s*(?:an? |the )?(‹\w›)(?=\W*$|[.,;!]|\s*[«·])"

# A capital names an option, and is no word ("A dog", "B12"), between START or WITHIN and AFTER.
START = r"(?m:^)[^\w«‹\n\u4e00-\u9fff]*|[.!]\s+|;\s*|(?<![A-Z]),\s*"
WITHIN = (
    r"[:=»›]\s*|-\s+|[\u4e00-\u9fff]\s*|\b(?i:answer(?:'s)?|is|are|be|it's|choos(?:e|ing)|chose|"
    r"pick|select|leaves|so|hence|thus|therefore|think|say|with|for|likely|probably|clearly|but|"
    r"only|undoubtedly|guess|leaving|definitely|between|either|neither|both|among|not|no|like|"
    r"actually|meant|wait|rather)\s+"
)
AFTER = (
    r"\s*(?:$|[,:;!.。()/\n]|- |(?<!\bA)(?<!\bA )[«‹]|[是而对正错项不都和与或及、选也])|"
    r"\s+(?:because|since|as|and|or|but|rather|not|for|in|here|given|fits|matches|remains|best|\d|"
    r"is (?:the|a better|not|correct|right|wrong|incorrect|also))\b"
)

SENTENCE = r"(?m)[.!]+(?=\s|$)|。|\n(?!«\w» ‹\w›$)"  # a list, restated, is one
CLAUSE = (  # commas part clauses, but not those of SEVERAL
    rf"(?i)(?<![»›·]),|,(?!{JOINT}[«‹·])|;|:(?=\s)|(?<=»)\s*[:-]|(?<=[»›]) as\b|"
    r"(?<=») (?=(?-i:[A-Z]))|(?<!anything )\bbut\b|(?=\bnot [«‹·]|\brather than\b|\binstead of\b)|"
    r"\b(?:so|while|although|though|however|because|since|hence|thus|therefore)\b|"
    r"而是|但|所以|因此|因为|故"
)
NOT = r"(?:\b(?:no|not|never|neither|nor|none|cannot)\b|n't\b|不|没|无|否|并非|而非)"
DENIAL = (  # a clause that denies, doubts or only looks at what it names
    rf"(?i){NOT}|\b(?:unlike|except|anything but|other than|rather than|instead of|wrong|incorrect|"
    r"false|unlikely|distractor|rul(?:e|ed|ing) out|lacks?|doubt|difficult|unable|whether|"
    r"mistake|hardly|(?<!at )least|worst|(?:next|second)(?: \w+)? (?:best|choice|likely)|fails?|"
    r"avoid|ignores?|is out|suppose|assum(?:e|ing)|only (?:correct |right )?if|"
    r"(?:some(?:one)?|people|others) (?:could|might|may|would)|"
    r"for (?:the )?\w+,? (?:it )?would be|describes the (?!image|picture|scene|photo|object)|"
    r"let's|let me|(?:impossib|eliminat|exclud|reject|disagree|contradict|mismatch|verify|check|"
    r"compar|consider)\w*)\b|错|排除|除了|禁止|来看|首先看|再看|(?<!最)可能"
)
# A sentence that says what would be.
CONDITION = (
    r"(?i)^\W*(?:if|unless)\b(?! (?:forced|asked|i (?:had|were)) to)|\bwould\b.*\bif\b|"
    r"如果|假如|若"
)

CUE = (
    r"(?:\b(?:(?<!wrong )answers?|ans|(?:option|choice)(?!\W*«)|choos\w+|chose|pick\w*|select\w*|"
    r"correct|best|correction|leaves|go(?:ing)? (?:with|for))\b|答|选(?!项)|正确)[^«‹·\n]{0,150}|"
    r"(?:\b(?:hence|thus|therefore)\b(?:[^«‹·\n]{0,150}\b(?:is|be))?|[是为故]|所以|因此|"
    r"\b(?:so|actually|wait|sorry|no|rather|think|say|meant|on second thought|only|undoubtedly|"
    r"guess|leaving|lean\w* to(?:wards?)?|(?<!un)(?<!less )(?<!least )likely|probably|"
    r"(?:it|this|which|must|should|would)(?:'s| is| be)?))"
    r"\W*(?:(?:option|choice|point|image|picture|letter) )?(?=[«·])"
)
AFFIRMED = (
    r"\s*(?:(?:is|are|seems) (?:\w+ )?(?:correct|right|best|better|answer|most)\b|"
    r"(?:best|fits|matches|remains)\b|:?正确|:?对)"
)
ANNOUNCED = rf"(?i)(?:{CUE}){SEVERAL}|{SEVERAL}{AFFIRMED}"
ALONE = rf"(?i)(?:^[^\w«‹·\n]*|: (?!·)){SEVERAL}[^\w«‹\t\n,]*(?=$|\t(?!,)|\t, *\t)"


def parse_choice(output: str, options: dict[str, str]) -> str | None:
    """The letter of the option that an output commits to; None when it commits to none, or to
    several.

    1. Options are marked where they are named, by letter or by text.
    2. What a clause denies or doubts is dropped, and letters in a sentence that says what would be.
    3. The letters that are announced last decide ("answer", "so", "choose", "选", ..); else those
       that are a sentence of their own ("B. blue"); else all of them. Where no letter is named, the
       texts, in the same order.
    4. They must be a single one: "A or B", a list that is restated, and a letter beside another
       option's text are none.
    """
    text = re.sub(r"(?i)\b(?:there(?:'s| is) )?no doubt(?: that)?\b", " ", final_text(output))
    text = re.sub(r":\s+", ": ", text)
    sentences = asserted(mark_letters(mark_texts(text, options), "".join(options)))
    for mark in ("[«·]", "‹"):
        for pattern in (ANNOUNCED, ALONE, r"[«‹]\w"):
            found = [
                each[0]
                for sentence in sentences
                for each in re.finditer(pattern, sentence)
                if re.search(mark, each[0])
            ]
            if found:
                said = found[-1] if pattern == ANNOUNCED else "".join(found)
                names = set(re.findall(r"[«‹·](\w)", said.upper()))
                return names.pop() if len(names) == 1 else None
    return None


def mark_texts(text, options):
    """ "It is dark red" -> "It is ‹B›", where A is "red": the longest text that fits."""
    texts = ["(?!)"]  # matches nothing
    for name, option in sorted(options.items(), key=lambda item: -len(item[1])):
        words = plain(final_text(option)).split()
        if words:
            there = r"\W+(?:an? |the )?".join(map(re.escape, words))
            if there.upper() in options:  # one's text is another's letter: only in "A. B"
                there = rf"(?<=\b{name}[.:)] ){there}"
            texts.append(rf"(?P<{name}>{there})")
    pattern = rf"(?ai)(?<![\w.:-])(?:{'|'.join(texts)})(?![\w-]|[.:]\d|\s*%)"
    return re.sub(pattern, lambda found: f"‹{found.lastgroup}›", text)


def mark_letters(text, names):
    """ "Option c, not (a)" -> "Option «C», not «A»"; "So C" -> "So ·C·"."""
    letter = rf"(?!a\b(?![.):]|\s*$))\b(?i:[{names}])\b(?!['-]\w|\.[a-z])"
    for before, after, mark in (
        (r"\b(?i:option|choice)s?\s*|选项\s*", "", r"«\1»"),
        (r"[(\[]\s*", r"\s*[)\]]", r"«\1»"),
        (START, AFTER, r"«\1»"),
        (WITHIN, rf"(?<![AI])\s|{AFTER}", r"·\1·"),
    ):
        text = re.sub(
            rf"(?am)({before})({letter}(?:{JOINT}{letter}){{0,9}})(?={after})",
            lambda found, mark=mark: found[1] + re.sub(r"(?a)\b(\w)\b", mark, found[2]),
            text,
        )
    text = re.sub(r"[()\[\]]", "", text)
    return re.sub(BESIDE, r"\1 \2", text)


def asserted(text):
    """Sentences, with a tab before each further clause; without the letters of those that say what
    would be, and without what clauses deny."""
    sentences = []
    for sentence in re.split(SENTENCE, text):
        if re.search(CONDITION, sentence):
            sentence = re.sub(r"[«·]\w[»·]", " ", sentence)
        clauses = re.sub(CLAUSE, r"\t\g<0>", sentence).split("\t")
        clauses = [re.sub(MARK, " ", c) if re.search(DENIAL, c) else c for c in clauses]
        sentences.append("\t".join(clauses))
    return sentences


# ------------------------------------------------------------------------------ yes/no, free form

YES_OR_NO = (
    r"(?:[(\[]?[a-h][.:)\]]+ ?)?(yep|yes(?!\W+there(?: is|'s| are) no (?!doubt|other))|nope|no|"
    r"是的?|有的?|对|否|不是|不|没有|不存在)"
    r"(?=\s*(?:$|[.,!;:。\n-]|(?:and|or|because|since|as|it|there)\b))"
)
UNSURE = (
    r"(?:\bnot|n't|\bun|\bim)\s?(?:\w+ )?(?:sure|certain|clear|able|possible|tell|determine|know)"
    r"|无法|不确定|不清|不知道|没有图|\bno (?:image|picture|photo)|\b(?:cannot (?:be )?(?:tell|"
    r"determine|know)\w*|to (?:tell|say)|sorry|maybe|perhaps|possibly|idea|without|enough|"
    r"insufficient|loaded|not true|information|access|whether|(?:i|we) (?:do not|don't|"
    r"cannot|can't)(?! see (?!(?:the|an?|any) (?:image|picture))| find| spot| notice| detect))\b"
)

THERE_IS = r"\bthere(?:'s| is| are| (?:seem|appear)s? to be) (?!(?:\w+ly )?no|only\b)|\byes\b"
SEEN = r"\b(?:i|we) (?:can )?see\b|\b(?:is|are) (?:\w+ )?(?:visible|present)\b"


def parse_yes_no(output: str) -> str | None:
    """ "yes", "no" or None: the last one announced ("answer: no", "so yes"); else the one that
    stands as a clause of its own; else "no" for a sentence that denies, "yes" for "there is ..".
    Doubt and contradiction are None."""
    text = re.sub(r"\byes(?: or |/)no\b", " ", final_text(output).lower())
    cue = r"(?:\b(?:answer|so|hence|thus|therefore)\b|答案|所以|因此)(?:\s*(?:is|是|为))?[\s:-]*"
    clause = r"(?:^|[.,:;!。\n]|\b(?:is|so|and|or|but|think)\b)\s*"
    words = re.findall(cue + YES_OR_NO, text)[-1:] or re.findall(clause + YES_OR_NO, text)
    said = {"no" if re.match("no|否|不|没", word) else "yes" for word in words}
    if not words:
        for sentence in re.split(SENTENCE, text):
            if re.search(UNSURE, sentence) or re.search(CONDITION, sentence):
                continue
            denied = re.search(rf"{NOT}|\b(?:absent|missing)\b", sentence)
            if denied:
                said.add("no")
            if re.search(THERE_IS, sentence) or (not denied and re.search(SEEN, sentence)):
                said.add("yes")
    return said.pop() if len(said) == 1 else None


# 12.5 or 10:30, but nothing of "12.5%", "B12", "3rd" or "1/2".
VALUE = r"(?<![\w.:/])(?<!\w\()-?\d+(?:[.:]\d+)?(?![\w%+°/]|[.:]\d)"
VAGUE = (  # it is not exactly that
    rf"(?i){NOT}|\b(?:or|about|around(?! the)|approx\w*|roughly|nearly|almost|maybe|perhaps|over|"
    r"under|above|below|possibly|than|up to|least|most|max\w*|minus|plus|fewer|half|twice|times|"
    r"pairs?|am|pm|hundred|thousand|million|billion|dozen|(?:jan|febr)uary|march|april|may|june|"
    r"july|august|(?:septem|octo|novem|decem)ber)\b|[<>≤≥~≈±≠€£¥]"
)
# "blue" of "The car is blue", but not of "I doubt it is blue".
VERB = r"(?i)\b(?:is|are|was|were|it's|says|reads:?|shows|weighs|measures)\b"


def match_free_form(output: str, answer: str) -> bool | None:
    """True: the output's value is the answer, or a line of it (each is a right answer); False: it
    is another number, or no for yes; None: undecided, a judge's matter.

    The value is what follows the last "answer is" / "answer:", else the whole text, its first or
    last line, or what follows a single sentence's last verb. A number also stands among words
    ("3 dogs"), where it is the only one and nothing qualifies it.
    """
    text = re.split(r"(?i)\banswer\b\s*(?:is\b|[:=])|答案[是为:]*", final_text(output))[-1].strip()
    lines = text.split("\n")
    *before, value = re.split(VERB, text)
    doubt = rf"(?i){NOT}|\b(?:if|whether|doubt|nobody|false|unsure|unclear|uncertain)\b"
    if re.search(r"[.!。]\s|\n", text) or re.search(doubt, " ".join(before)):
        value = text  # of several sentences, or of one that does not say so
    values = set(map(plain, [lines[0], lines[-1], value])) - {""}
    golds = [plain(final_text(right)) for right in answer.split("\n")]
    if values & set(golds):
        return True
    return max((same_number(text, gold) for gold in golds), key=[False, None, True].index)


def same_number(text, gold):
    """Whether the only number in `text` is that of `gold`: "3.0 dogs" and "3" are, "3" and "4", or
    "yes" and "no", are not. None where there is no such number, it is qualified ("about 3", "3%"),
    stands for something else ("3 dogs" and "3 cats"), or the two are alike once
    rounded (12.5 and 12.46)."""
    if {gold, plain(text)} == {"yes", "no"}:
        return False
    found = re.findall(VALUE, text)
    wanted = re.fullmatch(rf"({VALUE})(?: [a-z]+)*", gold)
    if len(found) != 1 or not wanted or re.search(VAGUE, f"{text} {gold}"):
        return None
    a, b = found[0], wanted[1]
    if gold != b and plain(text) != a:
        return None
    if ":" in a + b:
        return a == b if ":" in a and ":" in b else None
    a, b = Decimal(a), Decimal(b)
    return None if a != b and round(a) == round(b) else a == b


# ------------------------------------------------------------------------------------------ score


EXTRACT = r"(?s)(?>.*?<answer>)(.*?)</answer>|.*?(Answer:.*)|(.*)"
UNITS = "degree|centimeter|cm|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
# What the official rule reads: the first of these that is there. It crashes at "Answer: Yes".
READ = {
    "yn": r"(?i)\**\s*(?-i:answer[:*\s]*)?(yes|no)|(?!\**(?-i:A)nswer)"
    r"(?s:.*\s)?\**(yes|no)[.*\s]*$",
    "mmvp": r"(?s).*?\(([ABab])\)|.*?\b([ABab])\b",
    "mc": r"(?s).*?\(([A-Z])\)|.*?([A-Z])[.)\s]|.*?([A-Z])",
    "free": r"(?!)",
}


def official_right(output: str, kind: str, answer: str, bench: str = "") -> bool:
    """The official rule, mistakes included ("Answer: C" counts as A; only what it calls wrong goes
    to the judge): equal in `official_form`, or what READ finds."""
    if kind == "exact":  # ours
        return output.split() == answer.split()
    text = re.match(EXTRACT, output)
    text = text[text.lastindex].strip()
    found = re.match(READ["mmvp" if bench == "mmvp" else kind], text)
    said = {official_form(text), found and found[found.lastindex].lower()}
    return any(official_form(right) in said for right in answer.split("\n"))


def official_form(text):
    """As mathruler's grade_answer compares, but for its algebra: "\\boxed{C}", "(C)" and "c" are C;
    "1,000", "1000.0" and "1000 cm" are 1000."""
    text = re.sub(r"\\(?:boxed|text|%)|[{}$%]|(?<=\d),(?=\d{3}(?!\d))", "", text.lower())
    text = re.sub(rf"(?:{UNITS})(?:es)?s?|\s|(?<=\d)\.0*$|(?<=\.\d)0+$|^0+(?=\d[\d.]*$)", "", text)
    return re.sub(r"^[(\[]([a-z]{1,2}|[\d./-]+)[)\]]$", r"\1", text)


def parse_and_judge(question: Question, output: str) -> tuple[str | None, bool | None]:
    """(what an output says, whether that is right; None where our rules leave it open)."""
    answer = question.answer
    if question.kind == "exact":
        return output, output.split() == answer.split()
    if question.kind == "free":
        return output, match_free_form(output, answer)
    if question.kind == "yn":
        said = parse_yes_no(output)
    else:
        said = parse_choice(output, question.options)
    return said, None if said is None else said == answer


def is_right(question: Question, output: str) -> bool:
    """Whether our rules call an output right; what only a judge could decide is not."""
    return bool(parse_and_judge(question, output)[1])


def score(answer: Answer, verdict: bool | None = None, scorer: str = "ours") -> Scored:
    """What an answer is worth. verdict: the judge's, used only where the scorer is undecided."""
    scored = Scored(**vars(answer))
    if answer.error is not None:
        return scored
    output = answer.output
    if answer.truncated and answer.kind != "exact" and "</think>" not in output:
        # maybe within a thought that the template opened: only a short first line counts
        output = "".join(re.findall(r"(?m)\A\s*.{1,30}$", output))
    scored.said, right = parse_and_judge(answer, output)
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
