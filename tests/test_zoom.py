"""The zoom-in tool: regions, rounds, and calls that are none."""

import json
import math

import pytest
import torch
from conftest import noise
from PIL import Image

import benchmarks.zoom as zoom
import model as vision_model
import rollout
from toy.tiny import tiny


def call(*box, name: str = "image_zoom_in_tool", **more) -> str:
    return (
        f"<tool_call>{json.dumps({'name': name, 'arguments': {'bbox_2d': box} | more})}</tool_call>"
    )


def said(chat: list[dict]) -> str:
    """The text of a chat's last message."""
    return " ".join(part["text"] for part in chat[-1]["content"] if part["type"] == "text")


@pytest.fixture
def play(monkeypatch):
    """zoomed() with a model that says what is scripted, {question: its turns}; every prompt is
    really encoded. Returns the replies, and a list of rows (images, chat) for each time that
    the model was called."""
    model, processor = tiny()

    def tokens(text):
        return processor.tokenizer(text, split_special_tokens=True)["input_ids"] + [
            processor.tokenizer.eos_token_id
        ]

    def run(script: dict[str, list[str]], images: list, rounds: int):
        calls = []

        def encode(processor, images, chats):
            calls.append(
                [(list(views), list(chat)) for views, chat in zip(images, chats, strict=True)]
            )
            return vision_model.encode(processor, images, chats)

        def sample(model, processor, prompt, group, *, max_new_tokens, temperature):
            assert (group, temperature, max_new_tokens) == (1, 0, 99) and prompt[
                "image_grid_thw"
            ].shape[0] == sum(len(views) for views, _ in calls[-1])
            turns = [
                torch.tensor(tokens(script[chat[1]["content"][1]["text"]][len(chat) // 2 - 1]))
                for _, chat in calls[-1]
            ]
            ids = torch.nn.utils.rnn.pad_sequence(turns, batch_first=True)
            return rollout.Rollout(
                ids,
                torch.arange(ids.shape[1]) < torch.tensor([[len(turn)] for turn in turns]),
                torch.ones(len(turns), dtype=torch.bool),
                torch.full(ids.shape, torch.nan),
            )

        monkeypatch.setattr(rollout, "encode", encode)
        monkeypatch.setattr(rollout, "sample", sample)

        def ask(images, chats):
            return rollout.answers(model, processor, images, chats, 99)

        return zoom.answer_with_zoom(ask, images, list(script), rounds), calls

    run.tokens = lambda text: len(tokens(text))
    return run


def test_a_call_gives_the_region_enlarged_and_the_next_turn_is_the_answer(play):
    image, turns = (
        noise(640, 480),
        ["I look closer. " + call(250, 500, 500, 1000, label="the sign"), "It is red."],
    )
    (reply,), calls = play({"what ?": turns}, [image], 1)
    assert reply == {
        "output": "It is red.",
        "tokens": sum(map(play.tokens, turns)),
        "truncated": False,
        "calls": 1,
        "malformed": 0,
    }
    (first,), (second,) = calls
    assert (
        first[0] == [image]
        and [m["role"] for m in first[1]] == ["system", "user"]
        and first[1][0]["content"] == zoom.TOOLS
    )
    whole, crop = second[0]
    assert whole is image and crop.size == (299, 448)  # 160 x 240 px, times 448 / 240
    assert (
        crop.tobytes()
        == image.crop((160, 240, 320, 480)).resize((299, 448), Image.Resampling.BICUBIC).tobytes()
    )
    assert second[1][:2] == first[1] and second[1][2] == {"role": "assistant", "content": turns[0]}
    assert [part["type"] for part in second[1][3]["content"]].count("image") == 1
    assert said(second[1]) == "<tool_response> This was the last call: answer now. </tool_response>"


@pytest.mark.parametrize(
    "size, box, pixels",
    [  # every pixel that the region touches, and no other
        ((1000, 800), (0, 0, 1000, 1000), (0, 0, 1000, 800)),
        ((100, 100), (333, 0, 667, 1000), (33, 0, 67, 100)),
        ((64, 64), (0, 0, 1, 1), (0, 0, 1, 1)),
        ((640, 480), (100.5, 0.1, 110, 999.9), (64, 0, 71, 480)),
        ((2007, 600), (0, 0, 1000, 1000), (0, 0, 2007, 600)),
    ],
)  # 1000 * (2007 / 1000) is more than 2007
def test_a_region_is_in_thousandths_of_the_images_sides(size, box, pixels):
    image = noise(*size)
    crop, want = zoom.zoomed_region(call(*box)[11:-12], image), image.crop(pixels)
    scale = max(1, 448 / max(want.size))
    assert (
        crop.tobytes()
        == want.resize(
            [math.ceil(side * scale) for side in want.size], Image.Resampling.BICUBIC
        ).tobytes()
    )


def test_calls_go_on_for_as_many_rounds_as_allowed_and_no_more(play):
    turns = [call(0, 0, 500, 500), call(500, 500, 1000, 1000), call(0, 0, 100, 100), "never said"]
    (reply,), calls = play({"what ?": turns}, [noise(64, 64)], 2)
    assert len(calls) == 3 and [len(views) for ((views, _),) in calls] == [1, 2, 3]
    assert [("last call" in said(chat)) for ((_, chat),) in calls] == [False, False, True]
    assert reply == {
        "output": turns[2],
        "tokens": sum(map(play.tokens, turns[:3])),
        "truncated": False,
        "calls": 2,
        "malformed": 0,
    }


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
}
BREAKING = {  # each would end the whole evaluation
    "too large for a float": call(0, 0, 10**400, 9),  # OverflowError is no ValueError
    "ever deeper": "<tool_call>" + "[" * 50_000,  # RecursionError neither
    "a vision token escaped": call(0, 0, 9, 9, name="<|vision_start|>").replace(
        "<|", "\\u003c|"
    ),  # json.loads spells it out in the error message
    "a vision token within another": "<<|x|>|image_pad|> "
    + call(0, 9),  # one pass of re.sub leaves a new one
    "too thin": call(100, 0, 101, 1000),
}  # over 200 times as high as wide: the image processor's ValueError


@pytest.mark.parametrize(
    "turn", [*MALFORMED.values(), *BREAKING.values()], ids=[*MALFORMED, *BREAKING]
)
def test_a_malformed_call_is_counted_and_answered_with_an_error(turn, play):
    (reply,), calls = play({"what ?": [turn, "red"]}, [noise(800, 600)], 3)
    assert reply == reply | {"output": "red", "calls": 1, "malformed": 1}
    ((views, chat),) = calls[1]
    assert (
        len(views) == 1
        and "Error: " in said(chat)
        and "Expected a call as described" in said(chat)
        and "last call" not in said(chat)
    )


def test_the_last_call_of_a_turn_counts_and_spelled_out_vision_tokens_do_not_break_the_next_prompt(
    play,
):
    turn = "I see " + call(7, 7) + call(0, 0, 500, 500)
    (reply,), calls = play(
        {"what ?": ["<|vision_start|><|image_pad|>" + turn, "red <|image_pad|>"]},
        [noise(64, 64)],
        1,
    )
    assert reply == reply | {"output": "red <|image_pad|>", "calls": 1, "malformed": 0}
    assert (
        calls[1][0][1][2]["content"] == "< |vision_start|>< |image_pad|>" + turn
        and len(calls[1][0][0]) == 2
    )


def test_rows_that_do_not_call_are_done_while_the_others_go_on(play):
    script = {
        "one ?": [call(0, 0, 500, 500), "late"],
        "two ?": ["at once"],
        "three ?": [call(9), call(0, 0, 9, 9), "latest"],
    }
    replies, calls = play(script, [noise(64, 64, seed) for seed in range(3)], 3)
    assert [[chat[1]["content"][1]["text"] for _, chat in rows] for rows in calls] == [
        ["one ?", "two ?", "three ?"],
        ["one ?", "three ?"],
        ["three ?"],
    ]
    assert [(r["output"], r["calls"], r["malformed"]) for r in replies] == [
        ("late", 1, 0),
        ("at once", 0, 0),
        ("latest", 2, 1),
    ]
    assert [r["tokens"] for r in replies] == [
        sum(map(play.tokens, turns)) for turns in script.values()
    ]


def test_with_a_tool_that_no_row_calls_the_answers_take_one_turn(lively):
    (model, processor), images = lively, [noise(64, 64, seed) for seed in range(3)]
    look = [{"type": "image"}, {"type": "text", "text": "a ?"}]
    want = rollout.answers(
        model,
        processor,
        images,
        [[{"role": "system", "content": zoom.TOOLS}, {"role": "user", "content": look}]] * 3,
        6,
    )

    def ask(images, chats):
        return rollout.answers(model, processor, images, chats, 6)

    assert zoom.answer_with_zoom(ask, images, ["a ?"] * 3, 2) == [
        vars(reply) | {"calls": 0, "malformed": 0} for reply in want
    ]
