import bench
import pytest
import torch
from conftest import alone, noise

import model as vision_model
import rollout
from rollout import sample


def greedy(model, prompt, tokens):
    return bench.plain_generate(model, prompt, 1, tokens, sampled=False)


def test_greedy_responses_are_those_of_plain_generate(lively, mixed_prompt):
    model, processor = lively
    shared = sample(model, processor, mixed_prompt, 3, max_new_tokens=12, temperature=0)
    assert model.model.rope_deltas is None  # no state is left behind
    want = greedy(model, mixed_prompt, 12)
    assert torch.equal(shared.ids, want.repeat_interleave(3, 0))
    assert len(want.unique()) > 4  # not one token over and over


def test_a_sampled_response_depends_on_its_seed_and_not_on_its_batch(lively, mixed_prompt):
    model, processor = lively

    def drawn(prompt, *seeds):
        return sample(model, processor, prompt, 2, max_new_tokens=9, seeds=seeds)

    together = drawn(mixed_prompt, 5, 6, 7)
    for row, part in enumerate(together.split([2, 2, 2])):
        single = drawn(alone(mixed_prompt, row), 5 + row)
        assert torch.equal(single.ids, part.ids)
        assert torch.equal(single.mask, part.mask)
        assert not torch.equal(part.ids[0], part.ids[1])  # the rows of a group differ
    assert not torch.equal(drawn(mixed_prompt, 8, 9, 10).ids, together.ids)


def drawn(uniforms, logits, temperature=1.0):
    """The tokens (N,) that `uniforms` (N, 1) pick from `logits` (N, V) after one prompt token."""
    how = rollout.Sampling(temperature=temperature)
    log_probs = torch.empty_like(uniforms)
    draw = rollout.InverseCDF(uniforms, 1, how, log_probs)
    token = draw(torch.zeros(len(logits), 1), logits).argmax(-1)
    want = (logits / temperature).log_softmax(-1).gather(1, token[:, None])
    torch.testing.assert_close(log_probs, want)
    return token


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_softmax_at_its_temperature(temperature):
    logits = torch.tensor([2.0, 0.5, -torch.inf, 1.0, -3.0])
    n = 40_000
    uniforms = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    picked = drawn(uniforms, logits.expand(n, -1), temperature)
    share = torch.bincount(picked, minlength=5) / n
    want = (logits.double() / temperature).softmax(-1)
    assert (share - want).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard deviations
    assert share[2] == 0


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("possible", [(0.0, 0.0), (3.0, -50.0)])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(u, possible):
    logits = torch.tensor([[-torch.inf, *possible, -torch.inf]])
    assert drawn(torch.tensor([[u]]), logits) in (1, 2)


def test_of_many_tokens_each_has_its_share():
    vocabulary = 250_000
    want = torch.arange(0, vocabulary, 25_000)
    middle = (want + 0.5) / vocabulary  # of each one's part of the unit interval
    assert torch.equal(drawn(middle[:, None], torch.zeros(len(want), vocabulary)), want)


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
    found = sample(model, processor, mixed_prompt, 40, max_new_tokens=30, seeds=[1, 2, 3])
    lengths = [ids.index(end) + 1 if end in ids else 30 for ids in found.ids.tolist()]
    longest = max(lengths)
    assert found.mask.tolist() == [[t < length for t in range(longest)] for length in lengths]
    assert found.ended.tolist() == [end in ids for ids in found.ids.tolist()]
    assert 0 < found.ended.sum() < len(lengths)  # both kinds are here
    assert torch.equal(found.log_probs.isnan(), ~found.mask)
    part = found.split([40, 40, 40])[1]
    assert part.ids.shape == part.mask.shape == (40, max(lengths[40:80]))
    assert torch.equal(part.ids[part.mask], found.ids[40:80][found.mask[40:80]])


def test_a_vision_token_cannot_be_sampled_however_likely_it_is(mixed_prompt, lively):
    model, processor = lively
    banned = processor.tokenizer.convert_tokens_to_ids(list(vision_model.VISION_TOKENS))
    favourite = sample(model, processor, mixed_prompt, 1, max_new_tokens=1, temperature=0).ids
    assert favourite.shape == (3, 1)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[banned] = head[favourite[0, 0]] * 3
    found = sample(model, processor, mixed_prompt, 20, max_new_tokens=10, seeds=[0, 1, 2])
    assert not torch.isin(found.ids[found.mask], torch.tensor(banned)).any()


def test_a_compiled_static_cache_gives_the_same_tokens(lively, mixed_prompt, monkeypatch):
    model, processor = lively
    heads, attention = [], torch.nn.functional.scaled_dot_product_attention

    def traced(module, inputs):  # no kernels are made
        for node in module.graph.nodes:
            if node.target is attention:
                heads.append(node.args[1].meta["example_value"].shape[1])
        return module.forward

    compiled = rollout.CompileConfig(backend=traced, mode=None, dynamic=False)
    compiled._compile_all_devices = True  # else not on a CPU
    monkeypatch.setattr(rollout, "COMPILE", compiled)
    torch._dynamo.reset()

    def drawn(prompt, seed, static=0):
        seeds = [seed, 1, 2]
        return sample(model, processor, prompt, 2, max_new_tokens=8, seeds=seeds, static=static)

    room = mixed_prompt["input_ids"].shape[1] + 8
    short = vision_model.encode(processor, [noise(32, 32)] * 3, ["a ?"] * 3)
    drawn(short, 0, room)  # what other prompts leave must not show
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    for seed in (0, 3):
        want, got = drawn(mixed_prompt, seed), drawn(mixed_prompt, seed, room)
        torch.testing.assert_close(vars(got), vars(want), equal_nan=True, rtol=1e-4, atol=1e-5)
    assert stats["unique_graphs"] == graphs
    assert len(rollout.CACHES[model]) == 1
    assert set(heads) == {model.config.text_config.num_key_value_heads}  # keys are not repeated
    with pytest.raises(ValueError, match=f"{room - 1} tokens .* need {room}"):
        drawn(mixed_prompt, 0, room - 1)


# ----------------------------------------------------------------------------------------- answers


def test_an_answer_is_plain_generates_text_in_whatever_batch(lively):
    model, processor = lively
    look = [{"type": "image"}, {"type": "text", "text": "what is in the red box ?"}]
    chat = [
        {"role": "system", "content": "Look closely."},
        {"role": "user", "content": look},
        {"role": "assistant", "content": "I look."},
        {"role": "user", "content": look},
    ]
    first, second, third = noise(64, 64, 1), noise(32, 48, 2), noise(96, 32, 3)
    images = [first, second, [first, third]]
    texts = ["what is in the red box ?", "a ?", chat]
    rows = [([image], [text]) for image, text in zip(images, texts, strict=True)]

    def plain(row):
        return greedy(model, vision_model.encode(processor, *row), 12)[0].tolist()

    # One more end, so that a row ends early.
    ends = [processor.tokenizer.eos_token_id, plain(rows[0])[8]]
    model.generation_config.eos_token_id = ends
    together = rollout.answers(model, processor, images, texts, 12)
    for row, reply in zip(rows, together, strict=True):
        ids = plain(row)
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert reply == rollout.Reply(text, len(ids), ids[-1] not in ends)
        assert rollout.answers(model, processor, *row, 12) == [reply]
    assert {reply.truncated for reply in together} == {True, False}
    assert len({reply.output for reply in together}) > 1


# ---------------------------------------------------------------------------------------- batches

NO_ROOM = "OutOfMemoryError"


@pytest.mark.parametrize(
    "most, fits, bad, want, left",
    [
        # What does not fit is halved for good.
        (8, 2, None, [([0, 1], 1), ([2, 3], 5), ([4, 5], 9), ([6, 7], 13), ([8], 8)], 2),
        # A bad item comes alone with its error, and the batches grow again.
        (4, 4, 2, [([0, 1], 1), ([2], "ValueError"), ([3, 4], 7), ([5, 6, 7, 8], 26)], 4),
        # An item that fits nowhere costs only itself.
        (4, 0, None, [([item], NO_ROOM) for item in range(9)], 4),
    ],
)
def test_batches_that_fit(most, fits, bad, want, left):
    def work(batch):
        if len(batch) > fits:
            raise torch.OutOfMemoryError
        if bad in batch:
            raise ValueError
        return sum(batch)

    batches = rollout.Batches(most)
    found = []
    for batch, result in batches.run(list(range(9)), work, bad_item=(ValueError,)):
        found.append((batch, result if isinstance(result, int) else type(result).__name__))
    assert found == want
    assert batches.most == left
