import json
import random
import shutil

import pytest
import torch
from conftest import alone, noise, tiny_qwen3_vl
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_vl import modeling_qwen3_vl

import model as vision_model
import plan
import toy.tiny as tiny_model
from loss import topk_divergence
from rollout import sample
from storage.checkpoint import save


def plain_hidden(model, prompt, row, response):
    """The reference: one ordinary forward of one unpadded full sequence, sliced where it predicts
    the response."""
    one = alone(prompt, row)
    length, extra = one["input_ids"].shape[1], response[None]
    model.model.rope_deltas = None
    out = model.model(
        **one
        | {
            "input_ids": torch.cat([one["input_ids"], extra], 1),
            "attention_mask": torch.ones(1, length + len(response), dtype=torch.long),
            "mm_token_type_ids": torch.cat([one["mm_token_type_ids"], torch.zeros_like(extra)], 1),
        }
    ).last_hidden_state
    model.model.rope_deltas = None
    return out[0, length - 1 : -1]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-11 * want[name].norm() + 1e-13, name


@pytest.fixture
def float64_inside(monkeypatch):
    """The models compute norms, rotary angles and recurrent states in float32 whatever they are
    given; here in float64, so that an equality can be tested to 12 digits."""

    class Torch:
        def __getattr__(self, name):
            return torch.float64 if name in ("float32", "float") else getattr(torch, name)

    for module in (modeling_qwen3_5, modeling_qwen3_vl):
        monkeypatch.setattr(module, "torch", Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.core
@pytest.mark.parametrize("checkpoint, padded", [(True, True), (False, True), (True, False)])
def test_hidden_states_and_gradients_are_those_of_a_plain_forward_of_each_sequence(
    lively, mixed_prompt, checkpoint, padded, float64_inside
):
    model, _ = lively
    model.double()
    torch.manual_seed(0)
    prompt = mixed_prompt if padded else alone(mixed_prompt, 1)
    assert prompt["attention_mask"].all() != padded
    rows = 2 * len(prompt["input_ids"])
    ids, lengths = torch.randint(0, 300, (rows, 7)), [7, 3, 1, 5, 7, 2][:rows]
    target = torch.randn(rows, 7, model.lm_head.in_features, dtype=torch.float64)
    shared = vision_model.response_hidden(model, prompt, ids, checkpoint=checkpoint)
    plain = [
        plain_hidden(model, prompt, row // 2, ids[row, :length])
        for row, length in enumerate(lengths)
    ]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(shared[row, :length], plain[row], atol=1e-12, rtol=1e-12)
    # what follows a response's end has no weight, and so must not reach the gradient
    assert_same_gradients(
        gradients(
            model,
            sum(
                (shared[row, :length] * target[row, :length]).sum()
                for row, length in enumerate(lengths)
            ),
        ),
        gradients(
            model,
            sum((plain[row] * target[row, :length]).sum() for row, length in enumerate(lengths)),
        ),
    )


@pytest.mark.core
def test_one_token_one_prompt_and_one_response_take_the_same_path(lively, mixed_prompt):
    model, _ = lively
    for prompt, rows in (
        (mixed_prompt, 3),
        (alone(mixed_prompt, 1), 1),
    ):  # with padding, and without
        for tokens in (1, 2, 3):
            ids = torch.arange(5, 5 + tokens)[None].repeat(rows, 1)
            shared = vision_model.response_hidden(model, prompt, ids)
            assert shared.shape == (rows, tokens, model.lm_head.in_features)
            for row in range(rows):
                torch.testing.assert_close(
                    shared[row], plain_hidden(model, prompt, row, ids[row]), atol=3e-5, rtol=1e-4
                )


@pytest.mark.core
def test_neighbours_and_padding_do_not_leak_into_a_prompt(lively, mixed_prompt):
    model, _ = lively
    ids = torch.randint(0, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    together = vision_model.response_hidden(model, mixed_prompt, ids)
    for row in range(3):
        torch.testing.assert_close(
            together[row : row + 1],
            vision_model.response_hidden(model, alone(mixed_prompt, row), ids[row : row + 1]),
            atol=3e-5,
            rtol=1e-4,
        )


def test_prompts_encoded_apart_and_joined_are_the_prompts_encoded_together(lively, mixed_prompt):
    _, processor = lively
    images, texts = [noise(64, 64, 1), noise(32, 48, 2)], ["what is in the red box ?", "a ?"]
    apart = [
        vision_model.encode(processor, [image], [text])
        for image, text in zip(images, texts, strict=False)
    ]
    joined, together = (
        vision_model.join(apart, processor.tokenizer.pad_token_id),
        vision_model.encode(processor, images, texts),
    )
    assert joined.keys() == together.keys()
    assert all(torch.equal(joined[key], together[key]) for key in joined)


def test_everything_runs_in_bf16_and_every_weight_gets_a_gradient(lively, mixed_prompt):
    model, processor = lively
    model.bfloat16()
    rollout = sample(model, processor, mixed_prompt, 2, max_new_tokens=5, seeds=[0, 1, 2])
    hidden = vision_model.response_hidden(model, mixed_prompt, rollout)[rollout.mask]
    target, head = torch.randn_like(hidden), model.lm_head.weight
    loss, per_token = topk_divergence(
        hidden, head, [(target, head.detach(), 1.0)], torch.full((len(hidden),), 1 / len(hidden))
    )
    loss.backward()
    assert (
        hidden.dtype == torch.bfloat16
        and loss.dtype == per_token.dtype == torch.float32
        and loss.isfinite()
    )
    for name, weight in model.named_parameters():
        assert (
            weight.grad is not None
            and weight.grad.dtype == torch.bfloat16
            and weight.grad.isfinite().all()
        ), name


def test_rows_that_do_not_divide_by_the_prompts_are_refused(lively, mixed_prompt):
    with pytest.raises(ValueError, match="4 responses cannot be shared evenly by 3 prompts"):
        vision_model.response_hidden(lively[0], mixed_prompt, torch.zeros(4, 2, dtype=torch.long))


def test_the_prompt_ends_with_the_non_thinking_prefix_and_holds_one_image(lively):
    _, processor = lively
    prompt = vision_model.encode(processor, [noise(64, 32)], ["what is in the red box ?"])
    text = processor.tokenizer.decode(prompt["input_ids"][0])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text.count("<|vision_start|>") == 1 and text.count("<|image_pad|>") == 4 * 2


@pytest.mark.parametrize("size", [(512, 512), (2048, 64), (64, 1024), (700, 333)])
def test_a_prompt_over_the_limit_gets_a_smaller_image_and_keeps_its_text(size):
    _, processor = tiny_model.tiny()
    processor.image_processor.size = {"shortest_edge": 256, "longest_edge": 4_194_304}
    full = vision_model.encode(processor, [noise(*size)], ["what is in the red box ?"])
    short = vision_model.encode(
        processor, [noise(*size)], ["what is in the red box ?"], max_tokens=60
    )
    assert full["input_ids"].shape[1] > 60 and not full["shrunk"].any()
    assert short["shrunk"].all() and 30 < short["input_ids"].shape[1] <= 60
    words = [
        [t for t in prompt["input_ids"][0].tolist() if t != processor.image_token_id]
        for prompt in (full, short)
    ]
    assert words[0] == words[1]
    assert not vision_model.encode(processor, [noise(64, 64)], ["what ?"], max_tokens=60)[
        "shrunk"
    ].any()


def test_no_image_is_enlarged_over_the_limit_again():
    """Near the processor's minimum a grid that is rounded down would be."""
    _, processor = tiny_model.tiny()
    processor.image_processor.size = {
        "shortest_edge": 16 * 256,
        "longest_edge": 4_194_304,
    }  # 16 image tokens
    text, sizes, fitted = vision_model.chat(processor, "what ?"), random.Random(0), 0
    words = len(processor.tokenizer(text)["input_ids"]) - 1
    for _ in range(300):
        size, room = (sizes.randint(40, 900), sizes.randint(40, 900)), sizes.randint(10, 60)
        try:
            image = vision_model.fit(processor, Image.new("RGB", size), text, words + room)
        except ValueError:
            assert room < 2 * 16
            continue
        assert vision_model.image_tokens(processor, image.size) <= room
        fitted += image.size != size
    assert fitted > 50


def test_questions_that_are_too_long_or_smuggle_in_images_are_refused():
    _, processor = tiny_model.tiny()
    with pytest.raises(ValueError, match="prompt tokens for its image"):
        vision_model.encode(processor, [noise(512, 512)], ["what " * 100], max_tokens=80)
    with pytest.raises(ValueError, match="would change the number of images"):
        vision_model.encode(processor, [noise(64, 64)], ["what is <|image_pad|> ?"])


def test_the_tiny_tokenizer_reads_any_text():
    _, processor = tiny_model.tiny()
    for text in (
        "what is in the red box ?",
        "Ünïcode 漢字 and\nlines 123!",
        "a green cross with 7 .",
    ):
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("build", [tiny_model.tiny, tiny_qwen3_vl])
def test_a_saved_model_loads_here_and_in_plain_transformers_with_the_same_output(tmp_path, build):
    model, processor = build()
    save(model, processor, tmp_path / "first")
    (tmp_path / "first" / "video_preprocessor_config.json").write_text('{"from": "the original"}')
    (tmp_path / "first" / "model.safetensors.index.json").write_text("{}")
    again, its_processor = vision_model.load(str(tmp_path / "first"))
    save(again, its_processor, tmp_path / "second")
    files = {file.name for file in (tmp_path / "first").iterdir()} - {
        "model.safetensors.index.json"
    }
    assert files == {file.name for file in (tmp_path / "second").iterdir()}
    for name in files - {"model.safetensors", "config.json"}:  # copied as the original had them
        assert (tmp_path / "first" / name).read_bytes() == (
            tmp_path / "second" / name
        ).read_bytes(), name
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "second")
    tokenizer, vision = (
        AutoTokenizer.from_pretrained(tmp_path / "second"),
        AutoImageProcessor.from_pretrained(tmp_path / "second"),
    )
    prompt = vision_model.encode(processor, [noise(64, 48)], ["what is in the red box ?"])
    inputs = {key: value for key, value in prompt.items() if key != "shrunk"}
    with torch.no_grad():
        torch.testing.assert_close(
            plain(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5
        )
    assert (
        tokenizer("what is in the red box ?")["input_ids"]
        == processor.tokenizer("what is in the red box ?")["input_ids"]
    )
    torch.testing.assert_close(
        vision(images=[noise(64, 48)], return_tensors="pt")["pixel_values"], prompt["pixel_values"]
    )
    assert (plain.lm_head.weight is plain.model.language_model.embed_tokens.weight) == (
        build is tiny_model.tiny
    )  # tied, or not


def test_missing_gpu_kernels_are_named_for_models_that_use_them(monkeypatch):
    assert vision_model.missing_kernels(tiny_model.tiny()[0]) == []  # a CPU has no use for them
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = {"fla"}
    monkeypatch.setattr(vision_model, "find_spec", lambda name: name if name in there else None)
    assert (
        vision_model.missing_kernels(tiny_model.tiny()[0]) == ["causal-conv1d"]
        and vision_model.missing_kernels(tiny_qwen3_vl()[0]) == []
    )
    there.clear()
    assert vision_model.missing_kernels(tiny_model.tiny()[0]) == [
        "'flash-linear-attention>=0.6'",
        "causal-conv1d",
    ]


def test_generation_settings_of_a_checkpoint_do_not_change_the_rollouts(tmp_path):
    model, processor = tiny_model.tiny()
    save(model, processor, tmp_path)
    eos = model.generation_config.eos_token_id
    (tmp_path / "generation_config.json").write_text(
        json.dumps(
            {
                "do_sample": True,
                "top_k": 20,
                "top_p": 0.8,
                "temperature": 0.7,
                "repetition_penalty": 1.5,
                "eos_token_id": [*eos, 0],
            }
        )
    )
    loaded, _ = vision_model.load(str(tmp_path))
    assert loaded.generation_config.eos_token_id == [0, *eos]
    for name in ("do_sample", "top_k", "top_p", "temperature", "repetition_penalty"):
        assert not getattr(loaded.generation_config, name)


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="hub gave nothing"):
        vision_model.load("nobody/no-such-model")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="has no config.json.*notes.txt"):
        vision_model.load(str(tmp_path))
    model, processor = tiny_model.tiny()
    save(model, processor, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(
        (tmp_path / "whole" / "model.safetensors").read_bytes()[:5000]
    )
    with pytest.raises(ValueError, match="does not load as a Qwen3.5"):
        vision_model.load(str(tmp_path / "cut"))
    (tmp_path / "cut" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="does not load as a Qwen3.5"):
        vision_model.load(str(tmp_path / "cut"))


def test_a_missing_weight_is_not_made_up_and_a_strange_one_not_ignored_but_for_the_draft_head(
    tmp_path,
):
    model, processor = tiny_model.tiny()
    save(model, processor, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")

    def write(weights):
        return save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    write(
        {
            name: weight
            for name, weight in whole.items()
            if name != "model.language_model.norm.weight"
        }
    )
    with pytest.raises(ValueError, match="missing_keys.*language_model.norm.weight"):
        vision_model.load(str(tmp_path))
    write(whole | {"model.adapter.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="unexpected_keys.*adapter"):
        vision_model.load(str(tmp_path))
    write(whole | {"mtp.norm.weight": torch.ones(2)})  # released checkpoints hold it; not trained
    vision_model.load(str(tmp_path))


def test_other_vision_language_models_are_refused_by_name(tmp_path):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            vocab_size=64,
        ),
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    for part in (tiny_model.tiny()[1].tokenizer, tiny_model.tiny()[1].image_processor):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LlavaForConditionalGeneration, expected a Qwen3.5"):
        vision_model.load(str(tmp_path))
    with pytest.raises(
        ValueError,
        match="no configuration .* LlavaForConditionalGeneration",
    ):
        plan.read_outline(str(tmp_path))
