import json

import pytest
import torch
from conftest import alone

import model as M
from model import tiny
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


def test_one_token_is_a_response_too():
    model, processor = tiny()
    from conftest import noise
    prompt = M.encode(processor, [noise(64, 64)], ["what ?"])
    rollout = sample(model, processor, prompt, 2, max_new_tokens=1, seeds=[0])
    assert rollout.ids.shape == (2, 1) and rollout.mask.all()
    assert M.response_hidden(model, prompt, rollout).shape == (2, 1, 96)


def test_no_state_is_left_behind_in_the_model(lively, mixed_prompt):
    model, processor = lively
    sample(model, processor, mixed_prompt, 2, max_new_tokens=3, seeds=[0, 1, 2])
    assert model.model.rope_deltas is None
