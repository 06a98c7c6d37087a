import json
import math

import pytest
import torch
from conftest import alone, noise
from PIL import Image

import model as M
import rollout
from toy import tiny
from rollout import InverseCDF, sample


def plain(prompt):
    return {key: value for key, value in prompt.items() if key != "shrunk"}


def test_greedy_responses_are_those_of_plain_generate(lively, mixed_prompt):
    model, processor = lively
    banned = processor.tokenizer.convert_tokens_to_ids(list(M.VISION_TOKENS))
    shared = sample(model, processor, mixed_prompt, 3, max_new_tokens=12, temperature=0)
    model.model.rope_deltas = None
    want = model.generate(**plain(mixed_prompt), max_new_tokens=12, do_sample=False, suppress_tokens=banned,
                          pad_token_id=processor.tokenizer.pad_token_id)[:, mixed_prompt["input_ids"].shape[1]:]
    assert torch.equal(shared.ids, want.repeat_interleave(3, 0))
    assert len(want.unique()) > 4                                                     # not one token over and over


def test_a_sampled_response_depends_on_its_seed_and_not_on_its_batch(lively, mixed_prompt):
    model, processor = lively
    together = sample(model, processor, mixed_prompt, 2, max_new_tokens=9, seeds=[5, 6, 7])
    for row, seed in enumerate((5, 6, 7)):
        single = sample(model, processor, alone(mixed_prompt, row), 2, max_new_tokens=9, seeds=[seed])
        assert torch.equal(single.ids, together.ids[2 * row:2 * row + 2, :single.ids.shape[1]])
        assert torch.equal(single.mask.sum(1), together.mask[2 * row:2 * row + 2].sum(1))
    other = sample(model, processor, mixed_prompt, 2, max_new_tokens=9, seeds=[8, 9, 10])
    assert not torch.equal(other.ids, together.ids)
    assert not torch.equal(together.ids[0], together.ids[1])                          # the rows of a group differ


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = torch.tensor([[2.0, 0.5, -torch.inf, 1.0, -3.0]])
    n = 40_000
    uniforms = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.5):
        picked = InverseCDF(uniforms, 1, temperature)(torch.zeros(n, 1), logits.expand(n, -1)).argmax(-1)
        share = torch.bincount(picked, minlength=5) / n
        want = (logits[0].double() / temperature).softmax(-1).float()
        assert (share - want).abs().max() < 4 * (0.25 / n) ** 0.5                      # four standard deviations
        assert share[2] == 0


@pytest.mark.parametrize("u", [0.0, 1 - 2 ** -24])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(u):
    for logits in ([-torch.inf, 0.0, 0.0, -torch.inf], [-torch.inf, 3.0, -50.0, -torch.inf]):
        scores = InverseCDF(torch.tensor([[u]]), 1, 1.0)(torch.zeros(1, 1), torch.tensor([logits]))
        assert scores.argmax().item() in (1, 2)


def test_the_mask_covers_each_response_with_its_eos_and_nothing_after(lively, mixed_prompt):
    model, processor = lively
    end = processor.tokenizer.eos_token_id
    with torch.no_grad():                                                             # make the end likely at every token
        model.get_output_embeddings().weight[end] *= 0.2
    rollout = sample(model, processor, mixed_prompt, 40, max_new_tokens=30, seeds=[1, 2, 3])
    assert 0 < rollout.ended.sum() < len(rollout.ended)                               # both kinds are here
    for ids, mask, ended in zip(rollout.ids.tolist(), rollout.mask.tolist(), rollout.ended.tolist()):
        length = ids.index(end) + 1 if end in ids else len(ids)
        assert mask == [True] * length + [False] * (len(ids) - length) and ended == (end in ids)
    assert rollout.mask.sum(1).max() == rollout.ids.shape[1]
    part = rollout.split([40, 40, 40])[1]
    assert part.ids.shape == part.mask.shape == (40, int(rollout.mask[40:80].sum(1).max()))
    assert torch.equal(part.ids[part.mask], rollout.ids[40:80][rollout.mask[40:80]])


def test_any_of_several_stop_tokens_ends_a_response(lively, mixed_prompt):
    model, processor = lively
    greedy = sample(model, processor, mixed_prompt, 1, max_new_tokens=6, temperature=0)
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, int(greedy.ids[0, 2])]
    stopped = sample(model, processor, mixed_prompt, 1, max_new_tokens=6, temperature=0)
    first = greedy.ids[0].tolist().index(int(greedy.ids[0, 2])) + 1
    assert stopped.mask[0].sum() == first and stopped.ended[0]


def test_a_response_ends_at_the_tokenizers_end_even_when_the_checkpoint_names_none(tmp_path):
    model, processor = tiny()
    M.save(model, processor, tmp_path)
    (tmp_path / "generation_config.json").unlink()                                    # as in released Qwen3.5 checkpoints
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = processor.tokenizer.pad_token_id
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, _ = M.load(str(tmp_path))
    assert loaded.generation_config.eos_token_id == sorted([processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id])


def test_logits_that_are_not_numbers_still_give_a_token():
    scores = InverseCDF(torch.tensor([[0.5]]), 1, 1.0)(torch.zeros(1, 1), torch.full((1, 4), torch.nan))
    assert torch.isfinite(scores).sum() == 1                                          # the loss then names the samples


def test_a_vision_token_cannot_be_sampled_however_likely_it_is(mixed_prompt, lively):
    model, processor = lively
    banned = processor.tokenizer.convert_tokens_to_ids(list(M.VISION_TOKENS))
    greedy = sample(model, processor, mixed_prompt, 1, max_new_tokens=1, temperature=0)
    with torch.no_grad():                                                             # same logit as the favourite's
        model.get_output_embeddings().weight[banned] = model.get_output_embeddings().weight[greedy.ids[0, 0]] * 3
    rollout = sample(model, processor, mixed_prompt, 20, max_new_tokens=10, seeds=[0, 1, 2])
    assert not torch.isin(rollout.ids[rollout.mask], torch.tensor(banned)).any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_static_cache_compiled_or_not_gives_the_same_tokens(lively, mixed_prompt, monkeypatch, compiled):
    model, processor = lively
    heads, attention = [], torch.nn.functional.scaled_dot_product_attention

    def traced(module, inputs):
        heads.extend(node.args[1].meta["example_value"].shape[1] for node in module.graph.nodes if node.target is attention)
        return module.forward
    if compiled:                                                                      # on a CPU only if told so; traced, no kernels made
        monkeypatch.setattr(rollout, "COMPILE", rollout.CompileConfig(backend=traced, mode=None, dynamic=False))
        rollout.COMPILE._compile_all_devices = True
    want = [sample(model, processor, mixed_prompt, 2, max_new_tokens=8, seeds=seeds) for seeds in ([0, 1, 2], [3, 4, 5])]
    room = mixed_prompt["input_ids"].shape[1] + 8
    short = M.encode(processor, [noise(32, 32)] * 3, ["a ?"] * 3)
    sample(model, processor, short, 2, max_new_tokens=8, static=room)                 # other prompts: what they leave must not show
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seeds, plain in zip(([0, 1, 2], [3, 4, 5]), want):
        rows = sample(model, processor, mixed_prompt, 2, max_new_tokens=8, seeds=seeds, static=room)
        assert torch.equal(rows.ids, plain.ids) and torch.equal(rows.mask, plain.mask)
        torch.testing.assert_close(rows.log_probs, plain.log_probs, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs) and (graphs > 0) == compiled
    assert len(rollout.CACHES[model]) == 1
    assert set(heads) == ({model.config.text_config.num_key_value_heads} if compiled else set())    # keys are not repeated
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.raises(ValueError, match=f"holds {room - 1} tokens a row, prompt and response need {room}"):
        sample(model, processor, mixed_prompt, 2, max_new_tokens=8, static=room - 1)


def test_one_token_is_a_response_too():
    model, processor = tiny()
    prompt = M.encode(processor, [noise(64, 64)], ["what ?"])
    rollout = sample(model, processor, prompt, 2, max_new_tokens=1, seeds=[0])
    assert rollout.ids.shape == (2, 1) and rollout.mask.all()
    assert M.response_hidden(model, prompt, rollout).shape == (2, 1, 96)


def test_no_state_is_left_behind_in_the_model(lively, mixed_prompt):
    model, processor = lively
    sample(model, processor, mixed_prompt, 2, max_new_tokens=3, seeds=[0, 1, 2])
    assert model.model.rope_deltas is None


# ---------------------------------------------------------------------------------------------------------------- answers

IMAGES, QUESTIONS = [noise(64, 64, 1), noise(32, 48, 2), noise(96, 32, 3)], ["what is in the red box ?", "a ?", "what is the green circle with ?"]


def call(*box, name: str = "image_zoom_in_tool", **more) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': {'bbox_2d': box} | more})}</tool_call>"


def said(chat: list[dict]) -> str:
    """The text of a chat's last message."""
    return " ".join(part["text"] for part in chat[-1]["content"] if part["type"] == "text")


@pytest.fixture
def play(monkeypatch):
    """answers() of a model that says what is scripted, {question: its turns}; every prompt is really encoded. Returns the replies,
    and a list of rows (images, chat) for each time that the model was called."""
    model, processor = tiny()
    tokens = lambda text: processor.tokenizer(text, split_special_tokens=True)["input_ids"] + [processor.tokenizer.eos_token_id]

    def run(script: dict[str, list[str]], images: list, rounds: int):
        calls = []

        def encode(processor, images, chats):
            calls.append([(list(views), list(chat)) for views, chat in zip(images, chats, strict=True)])
            return M.encode(processor, images, chats)

        def sample(model, processor, prompt, group, *, max_new_tokens, temperature, seeds=None):
            assert (group, temperature, max_new_tokens) == (1, 0, 99) and prompt["image_grid_thw"].shape[0] == sum(len(views) for views, _ in calls[-1])
            turns = [torch.tensor(tokens(script[chat[1]["content"][1]["text"]][len(chat) // 2 - 1])) for _, chat in calls[-1]]
            ids = torch.nn.utils.rnn.pad_sequence(turns, batch_first=True)
            return rollout.Rollout(ids, torch.arange(ids.shape[1]) < torch.tensor([[len(turn)] for turn in turns]), torch.ones(len(turns), dtype=torch.bool),
                                   torch.full(ids.shape, torch.nan))
        monkeypatch.setattr(rollout, "encode", encode)
        monkeypatch.setattr(rollout, "sample", sample)
        return rollout.answers(model, processor, images, list(script), 99, rounds), calls
    run.tokens = lambda text: len(tokens(text))
    return run


def test_an_answer_is_plain_generates_text_in_whatever_batch(lively):
    model, processor = lively
    banned, eos = processor.tokenizer.convert_tokens_to_ids(list(M.VISION_TOKENS)), processor.tokenizer.eos_token_id
    generate = lambda row: model.generate(**plain(M.encode(processor, IMAGES[row:row + 1], QUESTIONS[row:row + 1])), max_new_tokens=12, do_sample=False,
                                          suppress_tokens=banned, pad_token_id=processor.tokenizer.pad_token_id)[0, -12:].tolist()
    stop = generate(0)[8]                                                             # so that a row ends early
    model.generation_config.eos_token_id = [eos, stop]
    together, ended = rollout.answers(model, processor, IMAGES, QUESTIONS, 12), 0
    for row, reply in enumerate(together):
        assert rollout.answers(model, processor, IMAGES[row:row + 1], QUESTIONS[row:row + 1], 12) == [reply]
        prompt = M.encode(processor, IMAGES[row:row + 1], QUESTIONS[row:row + 1])
        model.model.rope_deltas = None
        ids = model.generate(**plain(prompt), max_new_tokens=12, do_sample=False, suppress_tokens=banned,
                             pad_token_id=processor.tokenizer.pad_token_id)[0, prompt["input_ids"].shape[1]:].tolist()
        assert reply == {"output": processor.tokenizer.decode(ids, skip_special_tokens=True), "tokens": len(ids), "truncated": ids[-1] not in (eos, stop)}
        ended += not reply["truncated"]
    assert 0 < ended and together[0]["tokens"] <= 9 and len({reply["output"] for reply in together}) > 1


def test_a_chat_about_several_images_is_answered_as_by_plain_generate(lively):
    model, processor = lively
    look = [{"type": "image"}, {"type": "text", "text": "what is in the red box ?"}]
    long = [{"role": "system", "content": rollout.TOOLS}, {"role": "user", "content": look}, {"role": "assistant", "content": call(0, 0, 9, 9)},
            {"role": "user", "content": look}]
    views, chats = [[IMAGES[0], IMAGES[2]], [IMAGES[1]]], [long, [{"role": "user", "content": look}]]
    for row, reply in enumerate(rollout.answers(model, processor, views, chats, 8)):
        prompt = M.encode(processor, views[row:row + 1], chats[row:row + 1])
        model.model.rope_deltas = None
        ids = model.generate(**plain(prompt), max_new_tokens=8, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id,
                             suppress_tokens=processor.tokenizer.convert_tokens_to_ids(list(M.VISION_TOKENS)))[0, prompt["input_ids"].shape[1]:]
        assert reply["output"] == processor.tokenizer.decode(ids, skip_special_tokens=True) and reply["tokens"] == len(ids)


def test_a_call_gives_the_region_enlarged_and_the_next_turn_is_the_answer(play):
    image, turns = noise(640, 480), ["I look closer. " + call(250, 500, 500, 1000, label="the sign"), "It is red."]
    (reply,), calls = play({"what ?": turns}, [image], 1)
    assert reply == {"output": "It is red.", "tokens": sum(map(play.tokens, turns)), "truncated": False, "calls": 1, "malformed": 0}
    (first,), (second,) = calls
    assert first[0] == [image] and [m["role"] for m in first[1]] == ["system", "user"] and first[1][0]["content"] == rollout.TOOLS
    whole, crop = second[0]
    assert whole is image and crop.size == (299, 448)                                 # 160 x 240 px, times 448 / 240
    assert crop.tobytes() == image.crop((160, 240, 320, 480)).resize((299, 448), Image.Resampling.BICUBIC).tobytes()
    assert second[1][:2] == first[1] and second[1][2] == {"role": "assistant", "content": turns[0]}
    assert [part["type"] for part in second[1][3]["content"]].count("image") == 1
    assert said(second[1]) == "<tool_response> This was the last call: answer now. </tool_response>"


@pytest.mark.parametrize("size, box, pixels", [                                       # every pixel that the region touches, and no other
    ((1000, 800), (0, 0, 1000, 1000), (0, 0, 1000, 800)), ((100, 100), (333, 0, 667, 1000), (33, 0, 67, 100)), ((64, 64), (0, 0, 1, 1), (0, 0, 1, 1)),
    ((640, 480), (100.5, 0.1, 110, 999.9), (64, 0, 71, 480)),
    ((2007, 600), (0, 0, 1000, 1000), (0, 0, 2007, 600))])                            # 1000 * (2007 / 1000) is more than 2007
def test_a_region_is_in_thousandths_of_the_images_sides(size, box, pixels):
    image = noise(*size)
    crop, want = rollout.region(call(*box)[11:-12], image), image.crop(pixels)
    scale = max(1, 448 / max(want.size))
    assert crop.tobytes() == want.resize([math.ceil(side * scale) for side in want.size], Image.Resampling.BICUBIC).tobytes()


def test_calls_go_on_for_as_many_rounds_as_allowed_and_no_more(play):
    turns = [call(0, 0, 500, 500), call(500, 500, 1000, 1000), call(0, 0, 100, 100), "never said"]
    (reply,), calls = play({"what ?": turns}, [noise(64, 64)], 2)
    assert len(calls) == 3 and [len(views) for ((views, _),) in calls] == [1, 2, 3]
    assert [("last call" in said(chat)) for ((_, chat),) in calls] == [False, False, True]
    assert reply == {"output": turns[2], "tokens": sum(map(play.tokens, turns[:3])), "truncated": False, "calls": 2, "malformed": 0}


MALFORMED = {
    "no JSON": "<tool_call>zoom in</tool_call>", "cut off": "<tool_call>{\"name\": \"image_zoom", "nothing": "<tool_call></tool_call>", "a list": "<tool_call>[1]</tool_call>",
    "no arguments": '<tool_call>{"name": "image_zoom_in_tool"}</tool_call>', "no box": '<tool_call>{"name": "image_zoom_in_tool", "arguments": {}}</tool_call>',
    "another name": call(0, 0, 9, 9, name="search"), "no width": call(5, 0, 5, 9), "turned round": call(9, 0, 5, 9), "too far": call(0, 0, 9, 1001),
    "below 0": call(-1, 0, 9, 9), "not a number": call(0, 0, math.nan, 9), "infinite": call(0, 0, math.inf, 9), "three": call(0, 0, 9), "words": call("a", "b", "c", "d"),
    "null": call(None, 0, 9, 9), "a vision token": call(0, 0, 9, 9, name="<|vision_start|>")}
BREAKING = {                                                                          # each would end the whole evaluation
    "too large for a float": call(0, 0, 10 ** 400, 9),                                # OverflowError is no ValueError
    "ever deeper": "<tool_call>" + "[" * 50_000,                                      # RecursionError neither
    "a vision token escaped": call(0, 0, 9, 9, name="<|vision_start|>").replace("<|", "\\u003c|"),    # json.loads spells it out in the error message
    "a vision token within another": "<<|x|>|image_pad|> " + call(0, 9),              # one pass of re.sub leaves a new one
    "too thin": call(100, 0, 101, 1000)}                                              # over 200 times as high as wide: the image processor's ValueError


@pytest.mark.parametrize("turn", [*MALFORMED.values(), *BREAKING.values()], ids=[*MALFORMED, *BREAKING])
def test_a_malformed_call_is_counted_and_answered_with_an_error(turn, play):
    (reply,), calls = play({"what ?": [turn, "red"]}, [noise(800, 600)], 3)
    assert reply == reply | {"output": "red", "calls": 1, "malformed": 1}
    (views, chat), = calls[1]
    assert len(views) == 1 and "Error: " in said(chat) and "Expected a call as described" in said(chat) and "last call" not in said(chat)


def test_the_last_call_of_a_turn_counts_and_spelled_out_vision_tokens_do_not_break_the_next_prompt(play):
    turn = "I see " + call(7, 7) + call(0, 0, 500, 500)
    (reply,), calls = play({"what ?": ["<|vision_start|><|image_pad|>" + turn, "red <|image_pad|>"]}, [noise(64, 64)], 1)
    assert reply == reply | {"output": "red <|image_pad|>", "calls": 1, "malformed": 0}
    assert calls[1][0][1][2]["content"] == "< |vision_start|>< |image_pad|>" + turn and len(calls[1][0][0]) == 2


def test_rows_that_do_not_call_are_done_while_the_others_go_on(play):
    script = {"one ?": [call(0, 0, 500, 500), "late"], "two ?": ["at once"], "three ?": [call(9), call(0, 0, 9, 9), "latest"]}
    replies, calls = play(script, [noise(64, 64, seed) for seed in range(3)], 3)
    assert [[chat[1]["content"][1]["text"] for _, chat in rows] for rows in calls] == [["one ?", "two ?", "three ?"], ["one ?", "three ?"], ["three ?"]]
    assert [(r["output"], r["calls"], r["malformed"]) for r in replies] == [("late", 1, 0), ("at once", 0, 0), ("latest", 2, 1)]
    assert [r["tokens"] for r in replies] == [sum(map(play.tokens, turns)) for turns in script.values()]


def test_with_a_tool_that_no_row_calls_the_answers_take_one_turn(lively):
    model, processor = lively
    look = [{"type": "image"}, {"type": "text", "text": "a ?"}]
    want = rollout.answers(model, processor, IMAGES, [[{"role": "system", "content": rollout.TOOLS}, {"role": "user", "content": look}]] * 3, 6)
    assert rollout.answers(model, processor, IMAGES, ["a ?"] * 3, 6, 2) == [reply | {"calls": 0, "malformed": 0} for reply in want]
