"""Answers as models write them: the letter, yes or no, or value that is scored, and what stays
undecided (None).

scoring_cases.json holds everyday cases; the tables below add the treacherous ones. A wrong letter
is the worst outcome,
so where a reader could argue, the expected result is None.
"""

import json
import time
from pathlib import Path

import pytest

import benchmarks.scoring as scoring

CASES = json.loads(Path(__file__).with_name("scoring_cases.json").read_text(encoding="utf-8"))

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
CHINESE = {"A": "红色", "B": "深红色", "C": "蓝色", "D": "该图片没有显示颜色"}

CHOICES = [
    # a letter and no more
    (NUMBERS, "(b)", "B"),
    (NUMBERS, "b.", "B"),
    (NUMBERS, "b) 25", "B"),
    (NUMBERS, "[C]", "C"),
    (NUMBERS, "（C）", "C"),
    (NUMBERS, "Ｃ", "C"),
    (NUMBERS, "**C**", "C"),
    (NUMBERS, "**C. 15**", "C"),
    (NUMBERS, "__C__", "C"),
    (NUMBERS, "### C", "C"),
    (NUMBERS, '"C"', "C"),
    (NUMBERS, "'C'", "C"),
    (NUMBERS, "C: 15", "C"),
    (NUMBERS, "C) 15", "C"),
    (NUMBERS, "C - 15", "C"),
    (NUMBERS, "C 15", "C"),
    (NUMBERS, "C.15", "C"),
    (NUMBERS, "C、15", "C"),
    (NUMBERS, "  C \n", "C"),
    (NUMBERS, "Option (C)", "C"),
    (NUMBERS, "Choice C.", "C"),
    (NUMBERS, "C</s>", "C"),
    (NUMBERS, "$C$", "C"),
    (NUMBERS, "\\(C\\)", "C"),
    (DOOR, "(a)", "A"),
    (DOOR, "a", "A"),
    (DOOR, "(b) Closed", "B"),
    (DOOR, "A", "A"),
    (UNKNOWN, "A.", "A"),
    (UNKNOWN, "E", "E"),
    # announced
    (NUMBERS, '{"answer": "C"}', "C"),
    (NUMBERS, '{"reason": "I see 25 and 10", "answer": "C"}', "C"),
    (NUMBERS, '```json\n{"answer": "C"}\n```', "C"),
    (NUMBERS, "Answer - C", "C"),
    (NUMBERS, "Answer = C", "C"),
    (NUMBERS, "Answer C", "C"),
    (NUMBERS, "ANSWER: C", "C"),
    (NUMBERS, "Answer is option C because the hull shows it.", "C"),
    (NUMBERS, "The answer is: C) 15", "C"),
    (NUMBERS, "The answer is c.", "C"),
    (NUMBERS, "The correct answer to the question is C.", "C"),
    (NUMBERS, "The correct answer, judging by the hull, is (C).", "C"),
    (NUMBERS, "The right option is C", "C"),
    (NUMBERS, "The correct letter is C.", "C"),
    (NUMBERS, "Correct answer:\n\n**C**", "C"),
    (NUMBERS, "The answer is most likely C.", "C"),
    (NUMBERS, "The answer should be (C).", "C"),
    (NUMBERS, "The answer must be C, 15.", "C"),
    (NUMBERS, "My choice is C.", "C"),
    (NUMBERS, "My final answer is **C**.", "C"),
    (NUMBERS, "I'd go with (C).", "C"),
    (NUMBERS, "I'll pick C.", "C"),
    (NUMBERS, "I am choosing option C.", "C"),
    (NUMBERS, "Therefore, C.", "C"),
    (NUMBERS, "Thus it must be C", "C"),
    (NUMBERS, "Based on the image, the number is 15. Hence the answer is option C.", "C"),
    (NUMBERS, "C is correct.", "C"),
    (NUMBERS, "Option C is the correct answer.", "C"),
    (NUMBERS, "The answer is 15 (C).", "C"),
    (NUMBERS, "The answer is (C), which is 15.", "C"),
    (NUMBERS, "The number on the boat reads fifteen.\n\nC", "C"),
    (NUMBERS, "The number on the boat reads fifteen.\n\nC. 15", "C"),
    (NUMBERS, "Options:\nA. 10\nB. 25\nC. 15\nD. 5\n\nThe answer is C.", "C"),
    (NUMBERS, "The answer is C.\n\nA. 10 is elsewhere.\nB. 25 is a reflection.", "C"),
    (NUMBERS, "The answer is C, so the 25 must be a reflection.", "C"),
    (NUMBERS, "The answer is C. Option B shows a reflection.", "C"),
    (NUMBERS, "The answer is C. I think the 25 is a reflection.", "C"),
    (NUMBERS, "The answer is C, not B.", "C"),
    (NUMBERS, "The answer is C rather than B.", "C"),
    (NUMBERS, "The answer is not B but C.", "C"),
    (NUMBERS, "The answer is A. Wait, no, it's B.", "B"),
    (NUMBERS, "Answer: A\n\nActually, B.", "B"),
    (NUMBERS, "<answer>A</answer> or rather <answer>B</answer>", "B"),
    (NUMBERS, "\\boxed{A} is wrong, so \\boxed{\\textbf{(B)}}", "B"),
    (NUMBERS, "<think>The answer is A.</think>\n\nC", "C"),
    (NUMBERS, "The answer is A.</think>\nThe answer is C.", "C"),
    (UNKNOWN, "The answer is A, since the door is open.", "A"),
    (UNKNOWN, "A is the best answer.", "A"),
    (UNKNOWN, "C because the cat sits there.", "C"),
    (UNKNOWN, "Options A, B and D are wrong. Thus E.", "E"),
    (UNKNOWN, "It isn't C. I choose D.", "D"),
    (UNKNOWN, "B is wrong, and so is E. Answer: D", "D"),
    # in Chinese
    (NUMBERS, "故选C", "C"),
    (NUMBERS, "选C", "C"),
    (NUMBERS, "选 C。", "C"),
    (NUMBERS, "答案为C", "C"),
    (NUMBERS, "正确选项是 B", "B"),
    (NUMBERS, "正确答案：（C）15", "C"),
    (NUMBERS, "答案选C，因为船上写着15。", "C"),
    (NUMBERS, "因此，最佳答案是 **C**。", "C"),
    (NUMBERS, "我选择B", "B"),
    (NUMBERS, "排除A、B，选C", "C"),
    (NUMBERS, "不是A而是C", "C"),
    (NUMBERS, "不选C", None),
    (NUMBERS, "选A或B", None),
    (NUMBERS, "无法确定", None),
    (CHINESE, "帽子是蓝色的。", "C"),
    (CHINESE, "帽子是深红色的。", "B"),
    (CHINESE, "不是红色，是蓝色", "C"),
    # the option's text
    (NUMBERS, "The boat carries the number 15", "C"),
    (NUMBERS, "There are fifteen boats.", "C"),
    (NUMBERS, "It is 15, not 25.", "C"),
    (NUMBERS, "$\\boxed{\\text{15}}$", "C"),
    (COLORS, "It is a blue hat.", "C"),
    (COLORS, "It is not red but blue.", "C"),
    (COLORS, "DARK RED", "B"),
    (COLORS, "**dark red**", "B"),
    (DOOR, "The door is closed.", "B"),
    (ABOVE, "C. Both A and B", "C"),
    (ABOVE, "Both A and B", "C"),
    (ABOVE, "None of the above.", "D"),
    (ABOVE, "The dog.", "A"),
    (ANY, "No dogs", "B"),
    (ANY, "There are no dogs.", "B"),
    (ASKED, "Yes.", "A"),
    (ASKED, "The answer is no.", "B"),
    (LETTERS, "A. B", "A"),
    # letters that are words, names or parts of them
    (UNKNOWN, "A dog", None),
    (UNKNOWN, "A man in a red shirt is holding a B12 bottle.", None),
    (UNKNOWN, "It is rich in vitamin C.", None),
    (UNKNOWN, "The mug stands next to object B.", None),
    (UNKNOWN, "The letter on the sign is C", None),
    (UNKNOWN, "D Street is on the left.", None),
    (UNKNOWN, "A-frame", None),
    (UNKNOWN, "B12", None),
    (UNKNOWN, "C-shaped", None),
    (UNKNOWN, "AC", None),
    (UNKNOWN, "At 9 A.M. the sun is low", None),
    (UNKNOWN, "The answer is a dog.", None),
    (UNKNOWN, "I think a dog is there.", None),
    (dict.fromkeys("ABCDEFGHI", ""), "I see a dog.", None),
    (dict.fromkeys("ABCDEFGHI", ""), "I", "I"),
    # contradiction
    (NUMBERS, "A or B", None),
    (NUMBERS, "A/B", None),
    (NUMBERS, "A and C", None),
    (NUMBERS, "Both A and C", None),
    (NUMBERS, "Either (A) or (C)", None),
    (NUMBERS, "The answer is A or B.", None),
    (NUMBERS, "The answer is A, or maybe B.", None),
    (NUMBERS, "The answer is C. 10", None),
    (NUMBERS, "(C) 10", None),
    (NUMBERS, "C: 25", None),
    (NUMBERS, "The answer is 25 (C).", None),
    (NUMBERS, "I am torn between B and C.", None),
    (NUMBERS, "(A) 10 (B) 25 (C) 15 (D) 5", None),
    (NUMBERS, "(A) shows a boat, (B) shows another.", None),
    (NUMBERS, "The answer is A. The answer is B or C.", None),
    (NUMBERS, "All of them: A, B, C, D", None),
    (NUMBERS, "The answer is B?", None),
    # denial
    (NUMBERS, "not A", None),
    (NUMBERS, "It is not C.", None),
    (NUMBERS, "The answer isn't C.", None),
    (NUMBERS, "The answer isn’t (C).", None),
    (NUMBERS, "The answer cannot be C.", None),
    (NUMBERS, "Neither A nor B.", None),
    (NUMBERS, "C is wrong.", None),
    (NUMBERS, "Option C does not fit.", None),
    (NUMBERS, "(A), (B) and (D) are incorrect.", None),
    (COLORS, "The hat is not red.", None),
    (COLORS, "It isn't blue.", None),
    # nothing there
    (NUMBERS, "", None),
    (NUMBERS, "   \n", None),
    (NUMBERS, "F", None),
    (NUMBERS, "The answer is F.", None),
    (NUMBERS, "(G)", None),
    (NUMBERS, "None of the options.", None),
    (NUMBERS, "I'm sorry, but I can't help with that.", None),
    (NUMBERS, "As an AI model, I cannot see images.", None),
    (NUMBERS, "Unable to tell from a blurry image", None),
    (NUMBERS, "<think>C", None),
    (NUMBERS, "<think>It is C.</think>", None),
    (NUMBERS, "<think>It is C.</think><think>or the answer is B", None),
    (NUMBERS, "<answer></answer>", None),
    (NUMBERS, "Error: request failed", None),
    (NUMBERS, "The number is 15.5", None),
    (NUMBERS, "It is 1,015 or so", None),
    (NUMBERS, "It reads 10:15.", None),
    (NUMBERS, "About 15%-20%", None),
    (NUMBERS, "-15", None),
    (NUMBERS, "one hundred and five", None),
    ({"A": "1", "B": "2"}, "The one on the left is bigger.", None),
    ({"A": "1", "B": "2"}, "One.", "A"),
    ({"A": "1", "B": "2"}, "There is only one.", "A"),
    # of everything a little
    (NUMBERS, "**Final Answer**\n\n\\[\n\\boxed{C}\n\\]", "C"),
    (NUMBERS, "### Answer\nC", "C"),
    (NUMBERS, "The option that matches is C.", "C"),
    (NUMBERS, "I'd say C", "C"),
    (NUMBERS, "It should be C", "C"),
    (NUMBERS, "ans: C", "C"),
    (NUMBERS, "答:C", "C"),
    (NUMBERS, "I think B is correct", "B"),
    (NUMBERS, "twenty-five", "B"),
    (NUMBERS, "Twenty five", "B"),
    (NUMBERS, "C is the answer", "C"),
    (NUMBERS, "It can't be A or B. D is too small. The answer is C.", "C"),
    (NUMBERS, "A is incorrect. B is incorrect. D is incorrect. C is correct.", "C"),
    (NUMBERS, "Between A and C, I choose C.", "C"),
    (NUMBERS, "I choose neither A nor B", None),
    (NUMBERS, "The correct answers are A and C.", None),
    (NUMBERS, "A, C", None),
    (NUMBERS, "Maybe A, maybe B", None),
    (NUMBERS, "The answer is not in the options.", None),
    (NUMBERS, "The answer is 12.", None),
    (NUMBERS, "N/A", None),
    (NUMBERS, "The answer is 15, i.e. option C.", "C"),
    (NUMBERS, "The total is 25 - 10 = 15. So the answer is C.", "C"),
    (NUMBERS, "The total is 25 - 10.", None),
    (NUMBERS, "There are 5 people and 2 dogs. The answer is 5.", "D"),
    (NUMBERS, "答案不是C", None),
    (UNKNOWN, "I initially thought the answer was A, but it is B", "B"),
    (UNKNOWN, "The answer is B, although A is also plausible.", "B"),
    (UNKNOWN, "D. The other options (A, B, C) are wrong.", "D"),
    (UNKNOWN, "The answer is D. A, B and C do not match.", "D"),
    (UNKNOWN, "I don't think the answer is C. It is B.", "B"),
    (UNKNOWN, "I don't think it is C.", None),
    (UNKNOWN, "The answer is A B", None),
    (UNKNOWN, "A\nB\nC\nD", None),
    (UNKNOWN, "C\nC\nC", "C"),
    (UNKNOWN, "The answer is building C.", None),
    (UNKNOWN, "The note is C major, so D.", "D"),
    (UNKNOWN, "The image shows a B-52 bomber, so the answer is D", "D"),
    (UNKNOWN, "C is for cat", None),
    (UNKNOWN, "(E) None of the options", "E"),
    (UNKNOWN, "The answer is C.\nA. wrong\nB. wrong", "C"),
    (DOOR, "(a) Closed", None),
    (DOOR, "The answer is Closed (b)", "B"),
    (DOOR, "The door is half open, half closed", None),
    (DOOR, "It is unopened", None),
    (SIDES, "The cat is to the left of the dog, right below the lamp.", None),
    (SIDES, "The cup is to the left of the plate.\n\n**Answer: A. left**", "A"),
    (GLOVE, "The glove is not made of rubber.", None),
    (GLOVE, "It's not made of rubber. It's kevlar.", "C"),
    (GLOVE, "pleather", None),
    (GLOVE, "«Z»", None),
    (GLOVE, "The material is leather, which corresponds to option D.", "D"),
    # what a close reading found: letter A beside another text, rejections, alternatives,
    # retractions, restated options
    (NUMBERS, "A. 25", None),
    (NUMBERS, "(A). 25", None),
    (DOOR, "A. Closed", None),
    (DOOR, "**A.** Closed", None),
    (DOOR, "A\nClosed", None),
    (DOOR, "A. Open", "A"),
    (CARS, "C. A bus", None),
    (CARS, "The answer is (C) a bus.", None),
    (CARS, "(D) A car", None),
    (CARS, "The answer is (D) a truck.", "D"),
    (NUMBERS, "The answer lies between B and D.", None),
    (NUMBERS, "I'll choose between A and B", None),
    (UNKNOWN, "A 或者 B", None),
    (UNKNOWN, "答案是B或者C", None),
    (UNKNOWN, "答案是B与C", None),
    (UNKNOWN, "答案是B及C", None),
    (UNKNOWN, "不能选择B", None),
    (UNKNOWN, "不应该选B", None),
    (UNKNOWN, "我不认为答案是B", None),
    (UNKNOWN, "答案不可能是C", None),
    (UNKNOWN, "错误的选项是B", None),
    (UNKNOWN, "A：错误；B：正确；C：错误。", "B"),
    (UNKNOWN, "Option C seems incorrect.", None),
    (UNKNOWN, "Option C is probably wrong.", None),
    (UNKNOWN, "Option C can be ruled out.", None),
    (UNKNOWN, "We can eliminate option C.", None),
    (UNKNOWN, "I doubt it's C.", None),
    (UNKNOWN, "Answer: anything but C", None),
    (UNKNOWN, "I disagree with option A.", None),
    (UNKNOWN, "Option A is excluded, so the answer is B.", "B"),
    (COLORS, "Blue is ruled out.", None),
    (UNKNOWN, "The answer is A. On second thought, B.", "B"),
    (UNKNOWN, "Answer: A\nCorrection: B", "B"),
    (UNKNOWN, "A. Sorry, B.", "B"),
    (UNKNOWN, "A\n\nSorry, I meant B.", "B"),
    (UNKNOWN, "The answer is B (the middle one).", "B"),
    (UNKNOWN, "Answer: B (see the sign)", "B"),
    (UNKNOWN, "B（卡车）", "B"),
    (COLORS, "So the image shows a green van, and behind it the car is blue.", None),
    (COLORS, "I think there is a green van in front, but the car asked about is blue.", None),
    (
        COLORS,
        "(A) Red\n(B) Dark red\n(C) Blue\n(D) Green\n\nThe umbrella is blue. The answer is (C).",
        "C",
    ),
    (COLORS, "Options: (A) Red, (B) Dark red, (C) Blue.\n\n**Answer: (C)**", "C"),
]

YES_NO = [
    ("yes", "yes"),
    ("YES.", "yes"),
    ("Yes, there is.", "yes"),
    ("Yes, there is a dog in the image.", "yes"),
    ("**Answer: Yes**", "yes"),
    ("Answer - yes", "yes"),
    ("<answer>Yes</answer>", "yes"),
    ('{"answer": "yes"}', "yes"),
    ("Yes<|im_end|>", "yes"),
    ("The answer is yes.", "yes"),
    ("I believe the answer is: Yes", "yes"),
    ("<think>no, I see none</think>Yes", "yes"),
    ("The dog lies on the sofa.\n\nYes", "yes"),
    ("There is a dog in the image.", "yes"),
    ("是的", "yes"),
    ("是的，图中有一只狗。", "yes"),
    ("有", "yes"),
    ("答案是：是", "yes"),
    ("no", "no"),
    ("No.", "no"),
    ("Nope", "no"),
    ("NO!", "no"),
    ("There are no dogs", "no"),
    ("I don't see any", "no"),
    ("I don’t see any dog.", "no"),
    ("A dog is not present.", "no"),
    ("There isn't a dog in the picture.", "no"),
    ("No, there is a cat.", "no"),
    ("No, there is no dog. There is a cat in the image.", "no"),
    ("I cannot see a dog in the image.", "no"),
    ("I see none, so no", "no"),
    ("There might seem to be one, but the answer is no.", "no"),
    ("\\boxed{\\text{No}}", "no"),
    ("否", "no"),
    ("不是", "no"),
    ("没有。", "no"),
    ("图中没有狗。", "no"),
    ("不存在", "no"),
    ("", None),
    ("maybe", None),
    ("A dog", None),
    ("Yes and no", None),
    ("Yes or no", None),
    ("no, wait, yes", None),
    ("Yes, there is no dog in the image.", None),
    ("Not sure.", None),
    ("I am not sure.", None),
    ("I do not know", None),
    ("It is not clear whether there is a dog.", None),
    ("I cannot determine whether there is a dog.", None),
    ("No idea", None),
    ("<think>yes", None),
    ("Note the sofa.", None),
    ("Nothing to say, notable as it is", None),
    ("There is a dog, not a cat.", None),
    ("无法确定", None),
    ("是否有狗？", None),
    ("Yes, there is a car with no driver.", "yes"),
    ("Yes, I'm certain there is a dog.", "yes"),
    ("Yes, it is clear that there is one.", "yes"),
    ("No, as far as I can tell.", "no"),
    ("There's a dog in the picture.", "yes"),
    ("The answer is yes because there is a dog, not a cat.", "yes"),
    ("I'm not certain.", None),
    ("It is unclear.", None),
]

FREE = [
    ("3", "3 dogs", True),
    ("3", "3.", True),
    ("21", "Twenty-one", True),
    ("21", "twenty one dogs", True),
    ("3", "There are 3 dogs in the image.", True),
    ("3", "**3**", True),
    ("3", "\\boxed{3}", True),
    ("3", "<answer>3</answer>", True),
    ("3", "3.0", True),
    ("3 dogs", "3", True),
    ("3 dogs", "three dogs", True),
    ("three", "3", True),
    ("5", "$5", True),
    ("$5", "5", True),
    ("5.0", "5", True),
    ("1000", "1,000", True),
    ("1", "one", True),
    ("1", "There is one dog.", True),
    ("7:15", "7:15", True),
    ("7:15", "It is 7:15.", True),
    ("STOP", 'The sign says "STOP".', True),
    ("dark blue", "Dark Blue", True),
    ("dark blue", "It's dark blue.", True),
    ("a dog", "The dog.", True),
    ("dog", "A dog", True),
    ("blue", "The answer is blue.", True),
    ("blue", "It first looks green. Final answer: **blue**", True),
    ("blue", "The car is parked and shiny. It looks clean.\n\nBlue", True),
    ("T-shirt", "t shirt", True),
    ("不锈钢", "答案是不锈钢。", True),
    ("3", "4", False),
    ("3", "four", False),
    ("3", "The answer is 4.", False),
    ("3", "There are 4 dogs.", False),
    ("3", "3.5", False),
    ("3", "-3", False),
    ("3 dogs", "4", False),
    ("1000", "100", False),
    ("7:15", "7:45", False),
    ("yes", "No", False),
    ("no", "Yes.", False),
    ("3", "", None),
    ("3", "<think>3", None),
    ("3", "3 or 4", None),
    ("3", "about 3", None),
    ("3", "not 3", None),
    ("3", "more than 3", None),
    ("3", "3 million", None),
    ("3", "2 cats and 3 dogs", None),
    ("3", "3rd", None),
    ("3", "I cannot tell.", None),
    ("3", "many", None),
    ("3 dogs", "3 cats", None),
    ("3%", "3", None),
    ("B12", "12", None),
    ("Route 66", "66", None),
    ("7:15", "7:15 PM", None),
    ("dog", "dogs", None),
    ("red", "red and blue", None),
    ("red", "dark red", None),
    ("red", "The color is dark red.", None),
    ("red", "It isn't red.", None),
    ("red", "reddish", None),
    ("red", "maybe red", None),
    ("red", "blue", None),
    ("red", "The car is blue. The truck is red.", None),
    ("red", "The answer is not red.", None),
    ("Paris", "London", None),
    ("A", "A", True),
    ("red", "I don't think it is red.", None),
    ("red", "I am not sure if it is red.", None),
    ("red", "I doubt the car is red.", None),
    ("red", "It is unclear whether it is red", None),
    ("red", "Nobody says it is red.", None),
    ("12.50", "12.5", True),
    ("12.5", "12.50", True),
    ("7", "07", True),
    ("0.5", "1/2", None),
    ("10:10", "10.10", None),
    ("10:10", "10:11", False),
    ("1:00 PM", "13:00", None),
    ("3", "3+", None),
    ("5", "5°C", None),
    ("5", "minus 5", None),
    ("4", "maybe 4", None),
    ("4", "approximately 4", None),
    ("4", "up to 4", None),
    ("4", "5", False),
]


def ids(cases):
    return [
        f"{n:03d} {' '.join(case[-2].split())[:40]!a} is {case[-1]}"
        for n, case in enumerate(cases, 1)
    ]


def parsed(case: dict):
    if case["kind"] == "mc":
        return scoring.parse_choice(case["output"], case["options"])
    return (
        scoring.parse_yes_no(case["output"])
        if case["kind"] == "yn"
        else scoring.match_free_form(case["output"], case["answer"])
    )


@pytest.mark.parametrize(
    "case", CASES, ids=ids([(c["kind"], c["output"], c["expect"]) for c in CASES])
)
def test_an_everyday_answer_is_scored_as_a_reader_would(case):
    assert parsed(case) == case["expect"]


@pytest.mark.parametrize("options, output, expect", CHOICES, ids=ids(CHOICES))
def test_a_letter_is_found_only_where_the_answer_commits_to_it(options, output, expect):
    assert scoring.parse_choice(output, options) == expect


@pytest.mark.parametrize("output, expect", YES_NO, ids=ids(YES_NO))
def test_yes_and_no_are_told_from_hedges(output, expect):
    assert scoring.parse_yes_no(output) == expect


@pytest.mark.parametrize("answer, output, expect", FREE, ids=ids(FREE))
def test_a_value_is_the_same_or_different_only_when_that_is_certain(answer, output, expect):
    assert scoring.match_free_form(output, answer) is expect


OFFICIAL = [
    # the first capital letter is often not the answer: an error of the rule, kept for comparison
    ("mc", "A", "Answer: C", True),
    ("mc", "C", "Answer: C", False),
    ("mc", "A", "Final Answer: **C**", True),
    ("mc", "A", "A close look at the flag shows the hull. The answer is B.", True),
    ("mc", "B", "A close look at the flag shows the hull. The answer is B.", False),
    ("mc", "A", "An error occurred: request timed out", True),
    ("mc", "C", "<answer>C</answer> or <answer>D</answer>", True),
    ("mc", "C", "\\boxed{C}", True),
    ("mc", "C", "The hull shows it (C)", True),
    ("mc", "C", "c", True),  # equal once stripped and lower-cased
    ("mc", "C", "", False),
    ("yn", "yes", "Yes, there is.", True),
    ("yn", "Yes", "**Yes**", True),
    ("yn", "yes", "answer: yes", True),
    ("yn", "yes", "Answer: Yes", False),  # crashes in the original
    ("yn", "yes", "**Answer: Yes**", False),
    ("yn", "no", "Note that there is a dog, so yes", True),  # it starts with "no"
    ("yn", "yes", "I see it: yes.", True),  # the last word
    ("yn", "no", "There is none", False),
    ("free", "15", " 15 ", True),
    ("free", "Red", "red", True),
    ("free", "red", "Red.", False),
    ("free", "red", "Answer: red", False),  # the word Answer stays in
    ("free", "red", "It is <answer>red</answer>", True),
]


@pytest.mark.parametrize("kind, answer, output, right", OFFICIAL, ids=ids(OFFICIAL))
def test_the_official_rule_is_reproduced_with_its_mistakes(kind, answer, output, right):
    assert scoring.official_right(output, kind, answer) is right


@pytest.mark.parametrize(
    "answer, output, right",
    [
        ("A", "Open is wrong; the answer is (a).", True),
        ("B", "A closed door: b", False),
        ("B", "(b) Closed", True),
        ("B", "It is (B).", True),
    ],
)
def test_mmvp_has_an_official_rule_of_its_own(answer, output, right):
    assert scoring.official_right(output, "mc", answer, "mmvp") is right


@pytest.mark.parametrize(
    "piece", ["The answer is ", "A or B, ", "not ", "\\boxed{", "<|", "3, ", "\n", "x"]
)
def test_an_output_that_repeats_itself_is_scored_in_no_time(piece):
    start, output = time.perf_counter(), piece * (32_000 // len(piece))
    (
        scoring.parse_choice(output, NUMBERS),
        scoring.parse_yes_no(output),
        scoring.match_free_form(output, "3"),
    )
    assert time.perf_counter() - start < 10
