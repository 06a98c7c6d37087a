"""Answers as models write them: the letter, yes or no, or value that is scored, and what stays
undecided (None).

scoring_cases.json holds everyday cases; the tables below add the treacherous ones. A wrong letter
is the worst outcome, so where a reader could argue, the expected result is None.
"""

import json
import time
from pathlib import Path

import pytest

from benchmarks import scoring

CASES = Path(__file__).with_name("scoring_cases.json")

NUMBERS = {"A": "10", "B": "25", "C": "15", "D": "5"}
COLORS = {"A": "red", "B": "dark red", "C": "blue", "D": "green"}
DOOR = {"A": "Open", "B": "Closed"}
LETTERS = {"A": "B", "B": "C", "C": "D", "D": "A"}  # what the sign reads
UNKNOWN = dict.fromkeys("ABCDE", "")
ABOVE = {"A": "a dog", "B": "a cat", "C": "Both A and B", "D": "None of the above"}
ANY = {"A": "Dogs", "B": "No dogs"}
ASKED = {"A": "Yes", "B": "No"}
CARS = {"A": "a bus", "B": "a bike", "C": "a car", "D": "a truck"}
SIDES = {"A": "left", "B": "right", "C": "above", "D": "below"}
GLOVE = {"A": "rubber", "B": "cotton", "C": "kevlar", "D": "leather"}
NINE = dict.fromkeys("ABCDEFGHI", "")
COUNTS = {"A": "1", "B": "2"}
CHINESE = {"A": "红色", "B": "深红色", "C": "蓝色", "D": "该图片没有显示颜色"}

CHOICES = [  # options, the letter, outputs that mean it
    # a letter and no more
    (NUMBERS, "B", ["(b)", "b.", "b) 25"]),
    (
        NUMBERS,
        "C",
        [
            "[C]",
            "（C）",
            "Ｃ",
            "**C**",
            "**C. 15**",
            "__C__",
            "### C",
            '"C"',
            "'C'",
            "C: 15",
            "C) 15",
            "C - 15",
            "C 15",
            "C.15",
            "C、15",
            "  C \n",
            "Option (C)",
            "Choice C.",
            "C</s>",
            "$C$",
            "\\(C\\)",
        ],
    ),
    (DOOR, "A", ["(a)", "a", "A"]),
    (DOOR, "B", ["(b) Closed"]),
    (UNKNOWN, "A", ["A."]),
    (UNKNOWN, "E", ["E"]),
    # announced
    (
        NUMBERS,
        "C",
        [
            '{"answer": "C"}',
            '{"reason": "I see 25 and 10", "answer": "C"}',
            '```json\n{"answer": "C"}\n```',
            "Answer - C",
            "Answer = C",
            "Answer C",
            "ANSWER: C",
            "Answer is option C because the hull shows it.",
            "The answer is: C) 15",
            "The answer is c.",
            "The correct answer to the question is C.",
            "The correct answer, judging by the hull, is (C).",
            "The right option is C",
            "The correct letter is C.",
            "Correct answer:\n\n**C**",
            "The answer is most likely C.",
            "The answer should be (C).",
            "The answer must be C, 15.",
            "My choice is C.",
            "My final answer is **C**.",
            "I'd go with (C).",
            "I'll pick C.",
            "I am choosing option C.",
            "Therefore, C.",
            "Thus it must be C",
            "Based on the image, the number is 15. Hence the answer is option C.",
            "C is correct.",
            "Option C is the correct answer.",
            "The answer is 15 (C).",
            "The answer is (C), which is 15.",
            "The number on the boat reads fifteen.\n\nC",
            "The number on the boat reads fifteen.\n\nC. 15",
            "Options:\nA. 10\nB. 25\nC. 15\nD. 5\n\nThe answer is C.",
            "The answer is C.\n\nA. 10 is elsewhere.\nB. 25 is a reflection.",
            "The answer is C, so the 25 must be a reflection.",
            "The answer is C. Option B shows a reflection.",
            "The answer is C. I think the 25 is a reflection.",
            "The answer is C, not B.",
            "The answer is C rather than B.",
            "The answer is not B but C.",
            "<think>The answer is A.</think>\n\nC",
            "The answer is A.</think>\nThe answer is C.",
        ],
    ),
    (
        NUMBERS,
        "B",
        [
            "The answer is A. Wait, no, it's B.",
            "Answer: A\n\nActually, B.",
            "<answer>A</answer> or rather <answer>B</answer>",
            "\\boxed{A} is wrong, so \\boxed{\\textbf{(B)}}",
        ],
    ),
    (UNKNOWN, "A", ["The answer is A, since the door is open.", "A is the best answer."]),
    (UNKNOWN, "C", ["C because the cat sits there."]),
    (UNKNOWN, "E", ["Options A, B and D are wrong. Thus E."]),
    (UNKNOWN, "D", ["It isn't C. I choose D.", "B is wrong, and so is E. Answer: D"]),
    # in Chinese
    (
        NUMBERS,
        "C",
        [
            "故选C",
            "选C",
            "选 C。",
            "答案为C",
            "正确答案：（C）15",
            "答案选C，因为船上写着15。",
            "因此，最佳答案是 **C**。",
            "排除A、B，选C",
            "不是A而是C",
        ],
    ),
    (NUMBERS, "B", ["正确选项是 B", "我选择B"]),
    (NUMBERS, None, ["不选C", "选A或B", "无法确定"]),
    (CHINESE, "C", ["帽子是蓝色的。", "不是红色，是蓝色"]),
    (CHINESE, "B", ["帽子是深红色的。"]),
    # the option's text
    (
        NUMBERS,
        "C",
        [
            "The boat carries the number 15",
            "There are fifteen boats.",
            "It is 15, not 25.",
            "$\\boxed{\\text{15}}$",
        ],
    ),
    (COLORS, "C", ["It is a blue hat.", "It is not red but blue."]),
    (COLORS, "B", ["DARK RED", "**dark red**"]),
    (DOOR, "B", ["The door is closed."]),
    (ABOVE, "C", ["C. Both A and B", "Both A and B"]),
    (ABOVE, "D", ["None of the above."]),
    (ABOVE, "A", ["The dog."]),
    (ANY, "B", ["No dogs", "There are no dogs."]),
    (ASKED, "A", ["Yes."]),
    (ASKED, "B", ["The answer is no."]),
    (LETTERS, "A", ["A. B"]),
    # letters that are words, names or parts of them
    (
        UNKNOWN,
        None,
        [
            "A dog",
            "A man in a red shirt is holding a B12 bottle.",
            "It is rich in vitamin C.",
            "The mug stands next to object B.",
            "The letter on the sign is C",
            "D Street is on the left.",
            "A-frame",
            "B12",
            "C-shaped",
            "AC",
            "At 9 A.M. the sun is low",
            "The answer is a dog.",
            "I think a dog is there.",
        ],
    ),
    (NINE, None, ["I see a dog."]),
    (NINE, "I", ["I"]),
    # contradiction
    (
        NUMBERS,
        None,
        [
            "A or B",
            "A/B",
            "A and C",
            "Both A and C",
            "Either (A) or (C)",
            "The answer is A or B.",
            "The answer is A, or maybe B.",
            "The answer is C. 10",
            "(C) 10",
            "C: 25",
            "The answer is 25 (C).",
            "I am torn between B and C.",
            "(A) 10 (B) 25 (C) 15 (D) 5",
            "(A) shows a boat, (B) shows another.",
            "The answer is A. The answer is B or C.",
            "All of them: A, B, C, D",
            "The answer is B?",
        ],
    ),
    # denial
    (
        NUMBERS,
        None,
        [
            "not A",
            "It is not C.",
            "The answer isn't C.",
            "The answer isn’t (C).",
            "The answer cannot be C.",
            "Neither A nor B.",
            "C is wrong.",
            "Option C does not fit.",
            "(A), (B) and (D) are incorrect.",
        ],
    ),
    (COLORS, None, ["The hat is not red.", "It isn't blue."]),
    # nothing there
    (
        NUMBERS,
        None,
        [
            "",
            "   \n",
            "F",
            "The answer is F.",
            "(G)",
            "None of the options.",
            "I'm sorry, but I can't help with that.",
            "As an AI model, I cannot see images.",
            "Unable to tell from a blurry image",
            "<think>C",
            "<think>It is C.</think>",
            "<think>It is C.</think><think>or the answer is B",
            "<answer></answer>",
            "Error: request failed",
            "The number is 15.5",
            "It is 1,015 or so",
            "It reads 10:15.",
            "About 15%-20%",
            "-15",
            "one hundred and five",
        ],
    ),
    (COUNTS, None, ["The one on the left is bigger."]),
    (COUNTS, "A", ["One.", "There is only one."]),
    # of everything a little
    (
        NUMBERS,
        "C",
        [
            "**Final Answer**\n\n\\[\n\\boxed{C}\n\\]",
            "### Answer\nC",
            "The option that matches is C.",
            "I'd say C",
            "It should be C",
            "ans: C",
            "答:C",
            "C is the answer",
            "It can't be A or B. D is too small. The answer is C.",
            "A is incorrect. B is incorrect. D is incorrect. C is correct.",
            "Between A and C, I choose C.",
            "The answer is 15, i.e. option C.",
            "The total is 25 - 10 = 15. So the answer is C.",
        ],
    ),
    (NUMBERS, "B", ["I think B is correct", "twenty-five", "Twenty five"]),
    (
        NUMBERS,
        None,
        [
            "I choose neither A nor B",
            "The correct answers are A and C.",
            "A, C",
            "Maybe A, maybe B",
            "The answer is not in the options.",
            "The answer is 12.",
            "N/A",
            "The total is 25 - 10.",
            "答案不是C",
        ],
    ),
    (NUMBERS, "D", ["There are 5 people and 2 dogs. The answer is 5."]),
    (
        UNKNOWN,
        "B",
        [
            "I initially thought the answer was A, but it is B",
            "The answer is B, although A is also plausible.",
            "I don't think the answer is C. It is B.",
        ],
    ),
    (
        UNKNOWN,
        "D",
        [
            "D. The other options (A, B, C) are wrong.",
            "The answer is D. A, B and C do not match.",
            "The note is C major, so D.",
            "The image shows a B-52 bomber, so the answer is D",
        ],
    ),
    (
        UNKNOWN,
        None,
        [
            "I don't think it is C.",
            "The answer is A B",
            "A\nB\nC\nD",
            "The answer is building C.",
            "C is for cat",
        ],
    ),
    (UNKNOWN, "C", ["C\nC\nC", "The answer is C.\nA. wrong\nB. wrong"]),
    (UNKNOWN, "E", ["(E) None of the options"]),
    (DOOR, None, ["(a) Closed", "The door is half open, half closed", "It is unopened"]),
    (DOOR, "B", ["The answer is Closed (b)"]),
    (SIDES, None, ["The cat is to the left of the dog, right below the lamp."]),
    (SIDES, "A", ["The cup is to the left of the plate.\n\n**Answer: A. left**"]),
    (GLOVE, None, ["The glove is not made of rubber.", "pleather", "«Z»"]),
    (GLOVE, "C", ["It's not made of rubber. It's kevlar."]),
    (GLOVE, "D", ["The material is leather, which corresponds to option D."]),
    # what a close reading found: letter A beside another text, rejections, alternatives,
    # retractions, restated options
    (
        NUMBERS,
        None,
        ["A. 25", "(A). 25", "The answer lies between B and D.", "I'll choose between A and B"],
    ),
    (DOOR, None, ["A. Closed", "**A.** Closed", "A\nClosed"]),
    (DOOR, "A", ["A. Open"]),
    (CARS, None, ["C. A bus", "The answer is (C) a bus.", "(D) A car"]),
    (CARS, "D", ["The answer is (D) a truck."]),
    (
        UNKNOWN,
        None,
        [
            "A 或者 B",
            "答案是B或者C",
            "答案是B与C",
            "答案是B及C",
            "不能选择B",
            "不应该选B",
            "我不认为答案是B",
            "答案不可能是C",
            "错误的选项是B",
            "Option C seems incorrect.",
            "Option C is probably wrong.",
            "Option C can be ruled out.",
            "We can eliminate option C.",
            "I doubt it's C.",
            "Answer: anything but C",
            "I disagree with option A.",
        ],
    ),
    (
        UNKNOWN,
        "B",
        [
            "A：错误；B：正确；C：错误。",
            "Option A is excluded, so the answer is B.",
            "The answer is A. On second thought, B.",
            "Answer: A\nCorrection: B",
            "A. Sorry, B.",
            "A\n\nSorry, I meant B.",
            "The answer is B (the middle one).",
            "Answer: B (see the sign)",
            "B（卡车）",
        ],
    ),
    (
        COLORS,
        None,
        [
            "Blue is ruled out.",
            "So the image shows a green van, and behind it the car is blue.",
            "I think there is a green van in front, but the car asked about is blue.",
        ],
    ),
    (
        COLORS,
        "C",
        [
            "(A) Red\n(B) Dark red\n(C) Blue\n(D) Green\n\nIt is blue. The answer is (C).",
            "Options: (A) Red, (B) Dark red, (C) Blue.\n\n**Answer: (C)**",
        ],
    ),
]
YES_NO = [  # what is meant, outputs
    (
        "yes",
        [
            "yes",
            "YES.",
            "Yes, there is.",
            "Yes, there is a dog in the image.",
            "**Answer: Yes**",
            "Answer - yes",
            "<answer>Yes</answer>",
            '{"answer": "yes"}',
            "Yes<|im_end|>",
            "The answer is yes.",
            "I believe the answer is: Yes",
            "<think>no, I see none</think>Yes",
            "The dog lies on the sofa.\n\nYes",
            "There is a dog in the image.",
            "是的",
            "是的，图中有一只狗。",
            "有",
            "答案是：是",
            "Yes, there is a car with no driver.",
            "Yes, I'm certain there is a dog.",
            "Yes, it is clear that there is one.",
            "There's a dog in the picture.",
            "The answer is yes because there is a dog, not a cat.",
        ],
    ),
    (
        "no",
        [
            "no",
            "No.",
            "Nope",
            "NO!",
            "There are no dogs",
            "I don't see any",
            "I don’t see any dog.",
            "A dog is not present.",
            "There isn't a dog in the picture.",
            "No, there is a cat.",
            "No, there is no dog. There is a cat in the image.",
            "I cannot see a dog in the image.",
            "I see none, so no",
            "There might seem to be one, but the answer is no.",
            "\\boxed{\\text{No}}",
            "否",
            "不是",
            "没有。",
            "图中没有狗。",
            "不存在",
            "No, as far as I can tell.",
        ],
    ),
    (
        None,
        [
            "",
            "maybe",
            "A dog",
            "Yes and no",
            "Yes or no",
            "no, wait, yes",
            "Yes, there is no dog in the image.",
            "Not sure.",
            "I am not sure.",
            "I do not know",
            "It is not clear whether there is a dog.",
            "I cannot determine whether there is a dog.",
            "No idea",
            "<think>yes",
            "Note the sofa.",
            "Nothing to say, notable as it is",
            "There is a dog, not a cat.",
            "无法确定",
            "是否有狗？",
            "I'm not certain.",
            "It is unclear.",
        ],
    ),
]
FREE = [  # the right answer, whether an output says it, outputs
    (
        "3",
        True,
        [
            "3 dogs",
            "3.",
            "There are 3 dogs in the image.",
            "**3**",
            "\\boxed{3}",
            "<answer>3</answer>",
            "3.0",
        ],
    ),
    ("21", True, ["Twenty-one", "twenty one dogs"]),
    ("3 dogs", True, ["3", "three dogs"]),
    ("three", True, ["3"]),
    ("5", True, ["$5"]),
    ("$5", True, ["5"]),
    ("5.0", True, ["5"]),
    ("1000", True, ["1,000"]),
    ("1", True, ["one", "There is one dog."]),
    ("7:15", True, ["7:15", "It is 7:15."]),
    ("STOP", True, ['The sign says "STOP".']),
    ("dark blue", True, ["Dark Blue", "It's dark blue."]),
    ("a dog", True, ["The dog."]),
    ("dog", True, ["A dog"]),
    (
        "blue",
        True,
        [
            "The answer is blue.",
            "It first looks green. Final answer: **blue**",
            "The car is parked and shiny. It looks clean.\n\nBlue",
        ],
    ),
    ("T-shirt", True, ["t shirt"]),
    ("不锈钢", True, ["答案是不锈钢。"]),
    ("3", False, ["4", "four", "The answer is 4.", "There are 4 dogs.", "3.5", "-3"]),
    ("3 dogs", False, ["4"]),
    ("1000", False, ["100"]),
    ("7:15", False, ["7:45"]),
    ("yes", False, ["No"]),
    ("no", False, ["Yes."]),
    (
        "3",
        None,
        [
            "",
            "<think>3",
            "3 or 4",
            "about 3",
            "not 3",
            "more than 3",
            "3 million",
            "2 cats and 3 dogs",
            "3rd",
            "I cannot tell.",
            "many",
            "3+",
        ],
    ),
    ("3 dogs", None, ["3 cats"]),
    ("3%", None, ["3"]),
    ("B12", None, ["12"]),
    ("Route 66", None, ["66"]),
    ("7:15", None, ["7:15 PM"]),
    ("dog", None, ["dogs"]),
    (
        "red",
        None,
        [
            "red and blue",
            "dark red",
            "The color is dark red.",
            "It isn't red.",
            "reddish",
            "maybe red",
            "blue",
            "The car is blue. The truck is red.",
            "The answer is not red.",
            "I don't think it is red.",
            "I am not sure if it is red.",
            "I doubt the car is red.",
            "It is unclear whether it is red",
            "Nobody says it is red.",
        ],
    ),
    ("Paris", None, ["London"]),
    ("A", True, ["A"]),
    ("12.50", True, ["12.5"]),
    ("12.5", True, ["12.50"]),
    ("7", True, ["07"]),
    ("0.5", None, ["1/2"]),
    ("10:10", None, ["10.10"]),
    ("10:10", False, ["10:11"]),
    ("1:00 PM", None, ["13:00"]),
    ("5", None, ["5°C", "minus 5"]),
    ("4", None, ["maybe 4", "approximately 4", "up to 4"]),
    ("4", False, ["5"]),
]

OFFICIAL = [  # benchmark, kind, the right answer, whether outputs count as right
    # the first capital letter is often not the answer: an error of the rule, kept for comparison
    ("", "mc", "A", True, ["Answer: C", "Final Answer: **C**"]),
    ("", "mc", "A", True, ["An error occurred: request timed out"]),
    ("", "mc", "A", True, ["A close look at the flag shows the hull. The answer is B."]),
    ("", "mc", "B", False, ["A close look at the flag shows the hull. The answer is B."]),
    ("", "mc", "C", True, ["<answer>C</answer> or <answer>D</answer>", "\\boxed{C}"]),
    ("", "mc", "C", True, ["The hull shows it (C)", "c"]),  # equal once lower-cased
    ("", "mc", "C", False, ["Answer: C", ""]),
    ("", "yn", "yes", True, ["Yes, there is.", "answer: yes", "I see it: yes."]),  # the last word
    ("", "yn", "Yes", True, ["**Yes**"]),
    ("", "yn", "yes", False, ["Answer: Yes", "**Answer: Yes**"]),  # crashes in the original
    ("", "yn", "no", True, ["Note that there is a dog, so yes"]),  # it starts with "no"
    ("", "yn", "no", False, ["There is none"]),
    ("", "free", "15", True, [" 15 "]),
    ("", "free", "Red", True, ["red"]),
    ("", "free", "red", False, ["Red.", "Answer: red"]),  # the word Answer stays in
    ("", "free", "red", True, ["It is <answer>red</answer>"]),
    # MMVP has a rule of its own
    ("mmvp", "mc", "A", True, ["Open is wrong; the answer is (a)."]),
    ("mmvp", "mc", "B", False, ["A closed door: b"]),
    ("mmvp", "mc", "B", True, ["(b) Closed", "It is (B)."]),
]


def each_output(table: list[tuple]) -> list:
    """(.., output), a case for each of a row's outputs."""
    return [
        pytest.param(*row, output, id=f"{n}-{output[:40]!a}")
        for n, (*row, outputs) in enumerate(table)
        for output in outputs
    ]


def test_an_everyday_answer_is_scored_as_a_reader_would():
    parse = {
        "mc": lambda case: scoring.parse_choice(case["output"], case["options"]),
        "yn": lambda case: scoring.parse_yes_no(case["output"]),
        "free": lambda case: scoring.match_free_form(case["output"], case["answer"]),
    }
    cases = json.loads(CASES.read_text(encoding="utf-8"))
    assert [case for case in cases if parse[case["kind"]](case) != case["expect"]] == []


@pytest.mark.parametrize("options, letter, output", each_output(CHOICES))
def test_a_letter_is_found_only_where_the_answer_commits_to_it(options, letter, output):
    assert scoring.parse_choice(output, options) == letter


@pytest.mark.parametrize("meant, output", each_output(YES_NO))
def test_yes_and_no_are_told_from_hedges(meant, output):
    assert scoring.parse_yes_no(output) == meant


@pytest.mark.parametrize("answer, same, output", each_output(FREE))
def test_a_value_is_the_same_or_different_only_when_that_is_certain(answer, same, output):
    assert scoring.match_free_form(output, answer) is same


@pytest.mark.parametrize("bench, kind, answer, right, output", each_output(OFFICIAL))
def test_the_official_rule_is_reproduced_with_its_mistakes(bench, kind, answer, right, output):
    assert scoring.official_right(output, kind, answer, bench) is right


PIECES = ["The answer is ", "A or B, ", "not ", "\\boxed{", "<|", "3, ", "\n", "x"]


@pytest.mark.parametrize("piece", PIECES)
def test_an_output_that_repeats_itself_is_scored_in_no_time(piece):
    output = piece * (32_000 // len(piece))
    start = time.perf_counter()
    scoring.parse_choice(output, NUMBERS)
    scoring.parse_yes_no(output)
    scoring.match_free_form(output, "3")
    assert time.perf_counter() - start < 10
