import json

import pytest
import torch
from conftest import alone, noise

import model as vision_model
import rollout
from rollout import sample
from storage.checkpoint import save
from toy.tiny import tiny


def plain(prompt):
    return {key: value for key, value in prompt.items() if key != "shrunk"}


def test_greedy_responses_are_those_of_plain_generate(lively, mixed_prompt):
    model, processor = lively
    banned = processor.tokenizer.convert_tokens_to_ids(list(vision_model.VISION_TOKENS))
    shared = sample(model, processor, mixed_prompt, 3, max_new_tokens=12, temperature=0)
    model.model.rope_deltas = None
    want = model.generate(
        **plain(mixed_prompt),
        max_new_tokens=12,
        do_sample=False,
        suppress_tokens=banned,
        pad_token_id=processor.tokenizer.pad_token_id,
    )[:, mixed_prompt["input_ids"].shape[1] :]
    assert torch.equal(shared.ids, want.repeat_interleave(3, 0))
    assert len(want.unique()) > 4  # not one token over and over


def test_a_sampled_response_depends_on_its_seed_and_not_on_its_batch(lively, mixed_prompt):
    model, processor = lively
    together = sample(model, processor, mixed_prompt, 2, max_new_tokens=9, seeds=[5, 6, 7])
    for row, seed in enumerate((5, 6, 7)):
        single = sample(
            model, processor, alone(mixed_prompt, row), 2, max_new_tokens=9, seeds=[seed]
        )
        assert torch.equal(single.ids, together.ids[2 * row : 2 * row + 2, : single.ids.shape[1]])
        assert torch.equal(single.mask.sum(1), together.mask[2 * row : 2 * row + 2].sum(1))
    other = sample(model, processor, mixed_prompt, 2, max_new_tokens=9, seeds=[8, 9, 10])
    assert not torch.equal(other.ids, together.ids)
    assert not torch.equal(together.ids[0], together.ids[1])  # the rows of a group differ


def drawn(uniforms, logits, temperature=1.0):
    """What is left finite of `logits` (N, V) after one prompt token."""
    how = rollout.Sampling(temperature=temperature)
    draw = rollout.InverseCDF(uniforms, 1, how, torch.empty_like(uniforms))
    return draw(torch.zeros(len(logits), 1), logits)


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = torch.tensor([[2.0, 0.5, -torch.inf, 1.0, -3.0]])
    n = 40_000
    uniforms = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.5):
        picked = drawn(uniforms, logits.expand(n, -1), temperature).argmax(-1)
        share = torch.bincount(picked, minlength=5) / n
        want = (logits[0].double() / temperature).softmax(-1).float()
        assert (share - want).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard deviations
        assert share[2] == 0


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(u):
    for logits in ([-torch.inf, 0.0, 0.0, -torch.inf], [-torch.inf, 3.0, -50.0, -torch.inf]):
        scores = drawn(torch.tensor([[u]]), torch.tensor([logits]))
        assert scores.argmax().item() in (1, 2)


def test_logits_that_are_no_numbers_are_said(lively, mixed_prompt):
    model, processor = lively
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are no numbers"):
        sample(model, processor, mixed_prompt, 2, max_new_tokens=3, seeds=[1, 2, 3])


def test_the_mask_covers_each_response_with_its_eos_and_nothing_after(lively, mixed_prompt):
    model, processor = lively
    end = processor.tokenizer.eos_token_id
    with torch.no_grad():  # make the end likely at every token
        model.get_output_embeddings().weight[end] *= 0.2
    rollout = sample(model, processor, mixed_prompt, 40, max_new_tokens=30, seeds=[1, 2, 3])
    assert 0 < rollout.ended.sum() < len(rollout.ended)  # both kinds are here
    for ids, mask, ended in zip(
        rollout.ids.tolist(), rollout.mask.tolist(), rollout.ended.tolist(), strict=False
    ):
        length = ids.index(end) + 1 if end in ids else len(ids)
        assert mask == [True] * length + [False] * (len(ids) - length) and ended == (end in ids)
    assert rollout.mask.sum(1).max() == rollout.ids.shape[1]
    assert torch.equal(rollout.log_probs.isnan(), ~rollout.mask)
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
    save(model, processor, tmp_path)
    (tmp_path / "generation_config.json").unlink()  # as in released Qwen3.5 checkpoints
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = processor.tokenizer.pad_token_id
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, _ = vision_model.load(str(tmp_path))
    assert loaded.generation_config.eos_token_id == sorted(
        [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]
    )


def test_logits_that_are_not_numbers_still_give_a_token():
    scores = drawn(torch.tensor([[0.5]]), torch.full((1, 4), torch.nan))
    assert torch.isfinite(scores).sum() == 1  # the loss then names the samples


def test_a_vision_token_cannot_be_sampled_however_likely_it_is(mixed_prompt, lively):
    model, processor = lively
    banned = processor.tokenizer.convert_tokens_to_ids(list(vision_model.VISION_TOKENS))
    greedy = sample(model, processor, mixed_prompt, 1, max_new_tokens=1, temperature=0)
    with torch.no_grad():  # same logit as the favourite's
        model.get_output_embeddings().weight[banned] = (
            model.get_output_embeddings().weight[greedy.ids[0, 0]] * 3
        )
    rollout = sample(model, processor, mixed_prompt, 20, max_new_tokens=10, seeds=[0, 1, 2])
    assert not torch.isin(rollout.ids[rollout.mask], torch.tensor(banned)).any()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_static_cache_compiled_or_not_gives_the_same_tokens(
    lively, mixed_prompt, monkeypatch, compiled
):
    model, processor = lively
    heads, attention = [], torch.nn.functional.scaled_dot_product_attention

    def traced(module, inputs):
        heads.extend(
            node.args[1].meta["example_value"].shape[1]
            for node in module.graph.nodes
            if node.target is attention
        )
        return module.forward

    if compiled:  # on a CPU only if told so; traced, no kernels made
        monkeypatch.setattr(
            rollout, "COMPILE", rollout.CompileConfig(backend=traced, mode=None, dynamic=False)
        )
        rollout.COMPILE._compile_all_devices = True
    want = [
        sample(model, processor, mixed_prompt, 2, max_new_tokens=8, seeds=seeds)
        for seeds in ([0, 1, 2], [3, 4, 5])
    ]
    room = mixed_prompt["input_ids"].shape[1] + 8
    short = vision_model.encode(processor, [noise(32, 32)] * 3, ["a ?"] * 3)
    sample(
        model, processor, short, 2, max_new_tokens=8, static=room
    )  # other prompts: what they leave must not show
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seeds, plain in zip(([0, 1, 2], [3, 4, 5]), want, strict=False):
        rows = sample(model, processor, mixed_prompt, 2, max_new_tokens=8, seeds=seeds, static=room)
        assert torch.equal(rows.ids, plain.ids) and torch.equal(rows.mask, plain.mask)
        torch.testing.assert_close(
            rows.log_probs, plain.log_probs, equal_nan=True, rtol=1e-4, atol=1e-5
        )
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs) and (
        graphs > 0
    ) == compiled
    assert len(rollout.CACHES[model]) == 1
    assert set(heads) == (
        {model.config.text_config.num_key_value_heads} if compiled else set()
    )  # keys are not repeated
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.raises(
        ValueError, match=f"holds {room - 1} tokens a row, prompt and response need {room}"
    ):
        sample(model, processor, mixed_prompt, 2, max_new_tokens=8, static=room - 1)


def test_one_token_is_a_response_too():
    model, processor = tiny()
    prompt = vision_model.encode(processor, [noise(64, 64)], ["what ?"])
    rollout = sample(model, processor, prompt, 2, max_new_tokens=1, seeds=[0])
    assert rollout.ids.shape == (2, 1) and rollout.mask.all()
    assert vision_model.response_hidden(model, prompt, rollout).shape == (2, 1, 96)


def test_no_state_is_left_behind_in_the_model(lively, mixed_prompt):
    model, processor = lively
    sample(model, processor, mixed_prompt, 2, max_new_tokens=3, seeds=[0, 1, 2])
    assert model.model.rope_deltas is None


# ----------------------------------------------------------------------------------------- answers

IMAGES, QUESTIONS = (
    [noise(64, 64, 1), noise(32, 48, 2), noise(96, 32, 3)],
    ["what is in the red box ?", "a ?", "what is the green circle with ?"],
)


def test_an_answer_is_plain_generates_text_in_whatever_batch(lively):
    model, processor = lively
    banned, eos = (
        processor.tokenizer.convert_tokens_to_ids(list(vision_model.VISION_TOKENS)),
        processor.tokenizer.eos_token_id,
    )

    def generate(row):
        return model.generate(
            **plain(
                vision_model.encode(processor, IMAGES[row : row + 1], QUESTIONS[row : row + 1])
            ),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=banned,
            pad_token_id=processor.tokenizer.pad_token_id,
        )[0, -12:].tolist()

    stop = generate(0)[8]  # so that a row ends early
    model.generation_config.eos_token_id = [eos, stop]
    together, ended = rollout.answers(model, processor, IMAGES, QUESTIONS, 12), 0
    for row, reply in enumerate(together):
        assert rollout.answers(
            model, processor, IMAGES[row : row + 1], QUESTIONS[row : row + 1], 12
        ) == [reply]
        prompt = vision_model.encode(processor, IMAGES[row : row + 1], QUESTIONS[row : row + 1])
        model.model.rope_deltas = None
        ids = model.generate(
            **plain(prompt),
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=banned,
            pad_token_id=processor.tokenizer.pad_token_id,
        )[0, prompt["input_ids"].shape[1] :].tolist()
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert reply == rollout.Reply(text, len(ids), ids[-1] not in (eos, stop))
        ended += not reply.truncated
    assert ended > 0
    assert together[0].tokens <= 9
    assert len({reply.output for reply in together}) > 1


def test_a_chat_about_several_images_is_answered_as_by_plain_generate(lively):
    model, processor = lively
    look = [{"type": "image"}, {"type": "text", "text": "what is in the red box ?"}]
    long = [
        {"role": "system", "content": "Look closely."},
        {"role": "user", "content": look},
        {"role": "assistant", "content": "I look."},
        {"role": "user", "content": look},
    ]
    views, chats = (
        [[IMAGES[0], IMAGES[2]], [IMAGES[1]]],
        [long, [{"role": "user", "content": look}]],
    )
    for row, reply in enumerate(rollout.answers(model, processor, views, chats, 8)):
        prompt = vision_model.encode(processor, views[row : row + 1], chats[row : row + 1])
        model.model.rope_deltas = None
        ids = model.generate(
            **plain(prompt),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=processor.tokenizer.convert_tokens_to_ids(
                list(vision_model.VISION_TOKENS)
            ),
        )[0, prompt["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert (reply.output, reply.tokens) == (text, len(ids))


# ---------------------------------------------------------------------------------------- batches


def batches(most, items, fits, bad=()):
    """The batches that pass, as (batch, result), and the batch size that is left."""
    work, told = rollout.Batches(most), []

    def answer(batch):
        if len(batch) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if set(batch) & set(bad):
            raise ValueError("a bad row")
        return sum(batch)

    for batch, result in work.run(items, answer, bad_item=(ValueError,)):
        told.append((batch, type(result).__name__ if isinstance(result, Exception) else result))
    return told, work.most


def test_what_does_not_fit_is_halved_for_good():
    told, most = batches(8, list(range(9)), fits=2)
    assert [batch for batch, _ in told] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert [result for _, result in told] == [1, 5, 9, 13, 8] and most == 2


def test_a_bad_item_comes_alone_with_its_error_and_the_batches_grow_again():
    told, most = batches(4, list(range(9)), fits=4, bad=[2])
    assert {tuple(batch): result for batch, result in told}[(2,)] == "ValueError"
    assert [item for batch, _ in told for item in batch] == list(range(9))
    assert max(len(batch) for batch, _ in told) > 2 and most == 4


def test_an_item_that_fits_nowhere_costs_only_itself():
    told, most = batches(4, list(range(5)), fits=0)
    assert told == [([item], "OutOfMemoryError") for item in range(5)] and most == 4
