"""The zoom-in tool: regions, rounds, and calls that are none."""

import json
import math

import pytest
from conftest import noise
from PIL import Image

import model as vision_model
import rollout
from benchmarks import zoom
from toy.tiny import tiny


def call(*box, name: str = "image_zoom_in_tool", **more) -> str:
    return (
        f"<tool_call>{json.dumps({'name': name, 'arguments': {'bbox_2d': box} | more})}</tool_call>"
    )


def said(chat: list[dict]) -> str:
    """The text of a chat's last message."""
    return " ".join(part["text"] for part in chat[-1]["content"] if part["type"] == "text")


class Play:
    """The replies of a model that says what is scripted; every prompt is really encoded."""

    def __init__(self):
        self.processor = tiny()[1]
        self.calls = []  # for each time that the model was called, its rows: (images, chat)

    def __call__(self, script: dict[str, list[str]], images: list, rounds: int) -> list[dict]:
        """script: {question: the model's turns}."""

        def answer(images, chats):
            rows = list(zip(images, chats, strict=True))
            self.calls.append([(list(views), list(chat)) for views, chat in rows])
            prompt = vision_model.encode(self.processor, images, chats)
            assert prompt["image_grid_thw"].shape[0] == sum(map(len, images))
            turns = [script[question(chat)][len(chat) // 2 - 1] for chat in chats]
            return [rollout.Reply(turn, len(turn), False) for turn in turns]

        return zoom.answer_with_zoom(answer, [[image] for image in images], list(script), rounds)


def question(chat: list[dict]) -> str:
    return chat[1]["content"][1]["text"]


@pytest.fixture
def play() -> Play:
    return Play()


def test_a_call_gives_the_region_enlarged_and_the_next_turn_is_the_answer(play):
    image = noise(640, 480)
    turns = ["I look closer. " + call(250, 500, 500, 1000, label="the sign"), "It is red."]
    (reply,) = play({"what ?": turns}, [image], 1)
    tokens = sum(map(len, turns))
    counts = {"tokens": tokens, "truncated": False, "calls": 1, "malformed": 0}
    assert reply == {"output": "It is red.", **counts}
    ((views, first),), ((more, second),) = play.calls
    assert views == [image]
    assert [message["role"] for message in first] == ["system", "user"]
    assert first[0]["content"] == zoom.TOOLS
    whole, crop = more
    assert whole is image
    want = image.crop((160, 240, 320, 480))
    assert_enlarged(crop, want, (299, 448))  # 160 x 240 px, times 448 / 240
    assert second[:3] == [*first, {"role": "assistant", "content": turns[0]}]
    assert [part["type"] for part in second[3]["content"]].count("image") == 1
    assert "last call" in said(second)


def assert_enlarged(crop: Image.Image, region: Image.Image, size: tuple[int, int]) -> None:
    assert crop.size == size
    assert crop.tobytes() == region.resize(size, Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize(
    "size, box, pixels",
    [  # every pixel that the region touches, and no other
        ((1000, 800), (0, 0, 1000, 1000), (0, 0, 1000, 800)),
        ((100, 100), (333, 0, 667, 1000), (33, 0, 67, 100)),
        ((64, 64), (0, 0, 1, 1), (0, 0, 1, 1)),
        ((640, 480), (100.5, 0.1, 110, 999.9), (64, 0, 71, 480)),
        # 1000 * (2007 / 1000) is more than 2007
        ((2007, 600), (0, 0, 1000, 1000), (0, 0, 2007, 600)),
    ],
)
def test_a_region_is_in_thousandths_of_the_images_sides(size, box, pixels):
    image = noise(*size)
    crop, want = zoom.zoomed_region(call(*box)[11:-12], image), image.crop(pixels)
    scale = max(1, 448 / max(want.size))
    assert_enlarged(crop, want, tuple(math.ceil(side * scale) for side in want.size))


def test_calls_go_on_for_as_many_rounds_as_allowed_and_no_more(play):
    turns = [call(0, 0, 500, 500), call(500, 500, 1000, 1000), call(0, 0, 100, 100), "never said"]
    image = noise(64, 64)
    (reply,) = play({"what ?": turns}, [image], 2)
    ((views, _),) = play.calls[-1]
    assert_enlarged(views[2], image.crop((32, 32, 64, 64)), (448, 448))  # of the image, not a crop
    assert [len(views) for ((views, _),) in play.calls] == [1, 2, 3]
    assert ["last call" in said(chat) for ((_, chat),) in play.calls] == [False, False, True]
    assert reply["tokens"] == sum(map(len, turns[:3]))
    assert reply == reply | {"output": turns[2], "truncated": False, "calls": 2, "malformed": 0}


MALFORMED = {
    "no JSON": "<tool_call>zoom in</tool_call>",
    "cut off": '<tool_call>{"name": "image_zoom',
    "nothing": "<tool_call></tool_call>",
    "a list": "<tool_call>[1]</tool_call>",
    "no arguments": '<tool_call>{"name": "image_zoom_in_tool"}</tool_call>',
    "no box": '<tool_call>{"name": "image_zoom_in_tool", "arguments": {}}</tool_call>',
    "another name": call(0, 0, 9, 9, name="search"),
    "no width": call(5, 0, 5, 9),
    "turned round": call(9, 0, 5, 9),
    "too far": call(0, 0, 9, 1001),
    "below 0": call(-1, 0, 9, 9),
    "not a number": call(0, 0, math.nan, 9),
    "infinite": call(0, 0, math.inf, 9),
    "three": call(0, 0, 9),
    "words": call("a", "b", "c", "d"),
    "null": call(None, 0, 9, 9),
    "a vision token": call(0, 0, 9, 9, name="<|vision_start|>"),
    # each would end the whole evaluation
    "too large for a float": call(0, 0, 10**400, 9),  # OverflowError is no ValueError
    "ever deeper": "<tool_call>" + "[" * 50_000,  # RecursionError neither
    "a vision token escaped": call(0, 0, 9, 9, name="<|vision_start|>").replace(
        "<|", "\\u003c|"
    ),  # json.loads spells it out in the error message
    "a vision token within another": "<<|x|>|image_pad|> "
    + call(0, 9),  # one pass of re.sub leaves a new one
    "too thin": call(100, 0, 101, 1000),
}  # over 200 times as high as wide: the image processor's ValueError


@pytest.mark.parametrize("turn", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_call_is_counted_and_answered_with_an_error(turn, play):
    (reply,) = play({"what ?": [turn, "red"]}, [noise(800, 600)], 3)
    assert reply == reply | {"output": "red", "calls": 1, "malformed": 1}
    ((views, chat),) = play.calls[1]
    assert len(views) == 1
    assert "Error: " in said(chat) and "Expected" in said(chat)
    assert "last call" not in said(chat)


def test_the_last_call_counts_and_spelled_out_vision_tokens_do_not_break_the_next_prompt(play):
    turn = "I see " + call(7, 7) + call(0, 0, 500, 500)
    turns = ["<|vision_start|><|image_pad|>" + turn, "red <|image_pad|>"]
    (reply,) = play({"what ?": turns}, [noise(64, 64)], 1)
    assert reply == reply | {"output": turns[1], "calls": 1, "malformed": 0}
    ((views, chat),) = play.calls[1]
    assert chat[2]["content"] == "< |vision_start|>< |image_pad|>" + turn
    assert len(views) == 2


def test_rows_that_do_not_call_are_done_while_the_others_go_on(play):
    script = {
        "one ?": [call(0, 0, 500, 500), "late"],
        "two ?": ["at once"],
        "three ?": [call(9), call(0, 0, 9, 9), "latest"],
    }
    replies = play(script, [noise(64, 64, seed) for seed in range(3)], 3)
    asked = [" ".join(question(chat) for _, chat in rows) for rows in play.calls]
    assert asked == ["one ? two ? three ?", "one ? three ?", "three ?"]
    found = [(r["output"], r["calls"], r["malformed"]) for r in replies]
    assert found == [("late", 1, 0), ("at once", 0, 0), ("latest", 2, 1)]
    for reply, turns in zip(replies, script.values(), strict=True):
        assert reply["tokens"] == sum(map(len, turns))


def test_with_a_tool_that_no_row_calls_the_answers_take_one_turn(lively):
    images = [noise(64, 64, seed) for seed in range(3)]
    look = [{"type": "image"}, {"type": "text", "text": "a ?"}]
    chat = [{"role": "system", "content": zoom.TOOLS}, {"role": "user", "content": look}]

    def ask(images, chats):
        return rollout.answers(*lively, images, chats, 6)

    found = zoom.answer_with_zoom(ask, [[image] for image in images], ["a ?"] * 3, 2)
    none = {"calls": 0, "malformed": 0}
    assert found == [vars(reply) | none for reply in ask(images, [chat] * 3)]
