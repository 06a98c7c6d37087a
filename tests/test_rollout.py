from functools import partial

import bench
import pytest
import torch
from conftest import alone, noise

import model as vision_model
import rollout
from launch.batches import Batches
from rollout import sample


@pytest.fixture
def draw(lively):
    """draw(prompt, group, tokens, ..) samples from one of the models."""
    return partial(sample, *lively)


def greedy(model, prompt, tokens):
    return bench.plain_generate(model, prompt, 1, tokens, sampled=False)


def test_greedy_responses_are_those_of_plain_generate(lively, draw, mixed_prompt):
    model, _ = lively
    shared = draw(mixed_prompt, 3, max_new_tokens=12, temperature=0)
    assert model.model.rope_deltas is None  # no state is left behind
    want = greedy(model, mixed_prompt, 12)
    assert torch.equal(shared.ids, want.repeat_interleave(3, 0))
    assert len(want.unique()) > 4  # not one token over and over


def test_a_sampled_response_depends_on_its_seed_and_not_on_its_batch(draw, mixed_prompt):
    nine = partial(draw, group=2, max_new_tokens=9)
    together = nine(mixed_prompt, seeds=range(5, 8))
    for row, part in enumerate(together.split([2, 2, 2])):
        single = nine(alone(mixed_prompt, row), seeds=[5 + row])
        assert torch.equal(single.ids, part.ids)
        assert torch.equal(single.mask, part.mask)
        first, second = part.ids
        assert not torch.equal(first, second)  # the rows of a group differ
    others = nine(mixed_prompt, seeds=range(8, 11))
    assert not torch.equal(others.ids, together.ids)


def picked(uniforms, logits, temperature=1.0):
    """The tokens (N,) that `uniforms` (N, 1) pick from `logits` (N, V) after one prompt token."""
    how = rollout.Sampling(temperature=temperature)
    log_probs = torch.empty_like(uniforms)
    process = rollout.InverseCDF(uniforms, 1, how, log_probs)
    prompt = torch.zeros(len(logits), 1)
    token = process(prompt, logits).argmax(-1)
    want = (logits / temperature).log_softmax(-1)
    want = want.gather(1, token[:, None])
    torch.testing.assert_close(log_probs, want)
    return token


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_softmax_at_its_temperature(temperature):
    logits = torch.tensor([2.0, 0.5, -torch.inf, 1.0, -3.0])
    n = 40_000
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(n, 1, generator=generator)
    tokens = picked(uniforms, logits.expand(n, -1), temperature)
    share = torch.bincount(tokens, minlength=5) / n
    want = (logits.double() / temperature).softmax(-1)
    assert share[2] == 0
    deviation = (0.25 / n) ** 0.5  # at most
    assert (share - want).abs().max() < 4 * deviation


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("possible", [(0.0, 0.0), (3.0, -50.0)])
def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token(u, possible):
    logits = torch.tensor([[-torch.inf, *possible, -torch.inf]])
    uniforms = torch.tensor([[u]])
    assert picked(uniforms, logits) in (1, 2)


def test_of_many_tokens_each_has_its_share():
    vocabulary = 250_000
    want = torch.arange(0, vocabulary, 25_000)
    middle = (want + 0.5) / vocabulary  # of each one's part of the unit interval
    logits = torch.zeros(len(want), vocabulary)
    assert torch.equal(picked(middle[:, None], logits), want)


@pytest.fixture
def head(lively):
    """The head's weights (V, D), to be changed in place."""
    return lively[0].get_output_embeddings().weight.requires_grad_(False)


def test_logits_that_are_no_numbers_are_said(draw, mixed_prompt, head):
    head.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are no numbers"):
        draw(mixed_prompt, 2, max_new_tokens=3)


def test_the_mask_covers_each_response_with_its_eos_and_nothing_after(
    lively, draw, mixed_prompt, head
):
    end = lively[1].tokenizer.eos_token_id
    head[end] *= 0.2  # likely at every token
    found = draw(mixed_prompt, 40, max_new_tokens=30, seeds=range(3))
    lengths = []
    for ids, ended in zip(found.ids.tolist(), found.ended, strict=True):
        assert ended == (end in ids)
        lengths.append(ids.index(end) + 1 if ended else 30)
    places = torch.arange(max(lengths))
    assert torch.equal(found.mask, places < torch.tensor(lengths)[:, None])
    assert torch.equal(found.log_probs.isnan(), ~found.mask)
    assert 0 < found.ended.sum() < 120  # both kinds are here
    for row, part in enumerate(found.split([1] * 120)):
        assert part.mask.all()
        assert torch.equal(part.ids[0], found.ids[row, : lengths[row]])


def test_a_vision_token_cannot_be_sampled_however_likely_it_is(lively, draw, mixed_prompt, head):
    vision_tokens = list(vision_model.VISION_TOKENS)
    banned = lively[1].tokenizer.convert_tokens_to_ids(vision_tokens)
    favourite = draw(mixed_prompt, 1, max_new_tokens=1, temperature=0).ids
    assert favourite.shape == (3, 1)
    head[banned] = head[favourite[0, 0]] * 3
    found = draw(mixed_prompt, 20, max_new_tokens=10, seeds=range(3))
    sampled = found.ids[found.mask].tolist()
    assert not set(sampled) & set(banned)


def test_a_compiled_static_cache_gives_the_same_tokens(lively, draw, mixed_prompt, monkeypatch):
    model, processor = lively
    heads = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def traced(module, inputs):  # no kernels are made
        for node in module.graph.nodes:
            if node.target is attention:
                keys = node.args[1].meta["example_value"]
                heads.append(keys.shape[1])
        return module.forward

    compiled = rollout.CompileConfig(
        backend=traced,
        mode=None,
        dynamic=False,
    )
    compiled._compile_all_devices = True  # else not on a CPU
    monkeypatch.setattr(rollout, "COMPILE", compiled)
    torch._dynamo.reset()

    room = mixed_prompt["input_ids"].shape[1] + 8
    static = partial(draw, group=2, max_new_tokens=8, static=room)
    images = [noise(32, 32)] * 3
    short = vision_model.encode(processor, images, ["a ?"] * 3)
    static(short)  # what other prompts leave must not show
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    for first in (0, 3):
        seeds = [first, 1, 2]
        want = static(mixed_prompt, seeds=seeds, static=0)
        got = static(mixed_prompt, seeds=seeds)
        torch.testing.assert_close(
            vars(got),
            vars(want),
            equal_nan=True,
            rtol=1e-4,
            atol=1e-5,
        )
    assert stats["unique_graphs"] == graphs
    assert len(rollout.CACHES[model]) == 1
    assert set(heads) == {model.config.text_config.num_key_value_heads}  # keys are not repeated
    with pytest.raises(ValueError, match=f"{room - 1} tokens .* need {room}"):
        static(mixed_prompt, static=room - 1)


# ----------------------------------------------------------------------------------------- answers


def test_an_answer_is_plain_generates_text_in_whatever_batch(lively):
    model, processor = lively
    question = "what is in the red box ?"
    look = [
        {"type": "image"},
        {"type": "text", "text": question},
    ]
    chat = [
        {"role": "system", "content": "Look closely."},
        {"role": "user", "content": look},
        {"role": "assistant", "content": "I look."},
        {"role": "user", "content": look},
    ]
    first = noise(64, 64, 1)
    images = [
        first,
        noise(32, 48, 2),
        [first, noise(96, 32, 3)],
    ]
    texts = [question, "a ?", chat]

    def plain(image, text):
        prompt = vision_model.encode(processor, [image], [text])
        return greedy(model, prompt, 12)[0].tolist()

    # One more end, so that a row ends early.
    ends = [processor.tokenizer.eos_token_id, plain(first, question)[8]]
    model.generation_config.eos_token_id = ends
    together = rollout.answers(model, processor, images, texts, 12)
    for image, text, reply in zip(images, texts, together, strict=True):
        ids = plain(image, text)
        output = processor.tokenizer.decode(ids, skip_special_tokens=True)
        truncated = ids[-1] not in ends
        assert reply == rollout.Reply(output, len(ids), truncated)
        assert rollout.answers(model, processor, [image], [text], 12) == [reply]
    assert {reply.truncated for reply in together} == {True, False}
    assert len({reply.output for reply in together}) > 1


# ---------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "most, fits, bad, want, left",
    [
        # What does not fit is halved for good.
        (8, 2, "-", "01 23 45 67 8", 2),
        # A bad item comes alone with its error, and the batches grow again.
        (4, 4, "2", "01 2! 34 5678", 4),
        # An item that fits nowhere costs only itself.
        (4, 0, "-", "0? 1? 2? 3? 4? 5? 6? 7? 8?", 4),
    ],
)
def test_batches_that_fit(most, fits, bad, want, left):
    """Nine items, each a character; their errors: ! for a bad one, ? for want of memory."""
    marks = {ValueError: "!", torch.OutOfMemoryError: "?"}

    def work(batch):
        if len(batch) > fits:
            raise torch.OutOfMemoryError
        if bad in batch:
            raise ValueError
        return batch

    batches = Batches(most)
    found = []
    for batch, result in batches.run("012345678", work, bad_item=(ValueError,)):
        if isinstance(result, Exception):
            batch += marks[type(result)]
        else:
            assert result == batch
        found.append(batch)
    assert found == want.split()
    assert batches.most == left
