import json
import random
from functools import partial

import bench
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
from launch import run_folder
from loss import topk_divergence
from model import encode, load, response_hidden
from rollout import sample
from storage.checkpoint import save
from toy.tiny import tiny

QUESTION = "what is in the red box ?"


def plain_hidden(model, prompt, ids):
    """The reference: ordinary forwards of unpadded full sequences, a prompt's own at a time."""
    hidden = []
    for row, part in enumerate(ids.chunk(len(prompt["input_ids"]))):
        hidden.append(bench.plain_hidden(model, alone(prompt, row), part))
    return torch.cat(hidden)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    weights = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}


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
    model, processor = lively
    model.double()
    with torch.no_grad():  # not 0, as in a fresh model
        model.get_input_embeddings().weight[processor.tokenizer.pad_token_id] = 1.0
    torch.manual_seed(0)
    prompt = mixed_prompt if padded else alone(mixed_prompt, 1)
    assert prompt["attention_mask"].all() != padded
    lengths = torch.tensor([7, 3, 1, 5, 7, 2])[: 2 * len(prompt["input_ids"])]
    # What follows a response's end has no weight, and so must not reach the gradient.
    mask = torch.arange(7) < lengths[:, None]  # (N, T)
    ids = torch.randint(0, 300, mask.shape)
    shared = response_hidden(model, prompt, ids, checkpoint=checkpoint)[mask]
    plain = plain_hidden(model, prompt, ids)[mask]
    torch.testing.assert_close(shared, plain, atol=1e-12, rtol=1e-12)
    target = torch.randn_like(plain)
    got = gradients(model, (shared * target).sum())
    want = gradients(model, (plain * target).sum())
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-10 * want[name].norm() + 1e-13, name


@pytest.mark.core
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_one_token_one_prompt_and_one_response_take_the_same_path(
    lively, mixed_prompt, tokens, monkeypatch
):
    model, _ = lively
    for kernel in ("causal_conv1d_update", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(modeling_qwen3_5, kernel, None)  # have no gradient
    for prompt in (mixed_prompt, alone(mixed_prompt, 1)):  # with padding, and without
        ids = torch.arange(5, 5 + tokens).repeat(len(prompt["input_ids"]), 1)
        shared = response_hidden(model, prompt, ids)
        plain = plain_hidden(model, prompt, ids)
        torch.testing.assert_close(shared, plain, atol=3e-5, rtol=1e-4)


def test_prompts_encoded_apart_and_joined_are_the_prompts_encoded_together(lively):
    _, processor = lively
    first, second = noise(64, 64, 1), noise(32, 48, 2)
    apart = [encode(processor, [first], [QUESTION]), encode(processor, [second], ["a ?"])]
    joined = vision_model.join(apart, processor.tokenizer.pad_token_id)
    together = encode(processor, [first, second], [QUESTION, "a ?"])
    torch.testing.assert_close(joined, together, rtol=0, atol=0)


def test_everything_runs_in_bf16_and_every_weight_gets_a_gradient(lively, mixed_prompt):
    model, processor = lively
    model.bfloat16()
    rollout = sample(model, processor, mixed_prompt, 2, max_new_tokens=5, seeds=range(3))
    hidden = response_hidden(model, mixed_prompt, rollout)[rollout.mask]
    head = model.lm_head.weight
    teachers = [(torch.randn_like(hidden), head.detach(), 1.0)]
    weights = torch.full((len(hidden),), 1 / len(hidden))
    loss, _ = topk_divergence(hidden, head, teachers, weights)
    assert loss.isfinite()
    found = gradients(model, loss)
    assert found.keys() == dict(model.named_parameters()).keys()
    for gradient in found.values():
        assert gradient.dtype == hidden.dtype == torch.bfloat16
        assert gradient.isfinite().all()


def test_rows_that_do_not_divide_by_the_prompts_are_refused(lively, mixed_prompt):
    with pytest.raises(ValueError, match="4 responses cannot be shared evenly by 3 prompts"):
        response_hidden(lively[0], mixed_prompt, torch.zeros(4, 2, dtype=torch.long))


# ----------------------------------------------------------------------------------------- prompts


def test_the_prompt_ends_with_the_non_thinking_prefix_and_holds_one_image(lively):
    _, processor = lively
    prompt = encode(processor, [noise(64, 32)], [QUESTION])
    text = processor.tokenizer.decode(prompt["input_ids"][0])
    image = "<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>"
    assert text == (
        f"<|im_start|>user\n{image}{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_of_several_images_all_come_before_the_question_in_their_order(lively):
    _, processor = lively
    images = [noise(64, 32), noise(32, 32, 1), noise(32, 64, 2)]
    prompt = encode(processor, [images, images[1]], [QUESTION] * 2)
    text = processor.tokenizer.decode(prompt["input_ids"][0])
    shown = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (8, 4, 8))
    assert text.startswith(f"<|im_start|>user\n{shown}{QUESTION}<|im_end|>")
    each = [encode(processor, [image], [QUESTION]) for image in (*images, images[1])]
    for key in ("pixel_values", "image_grid_thw"):
        assert torch.equal(prompt[key], torch.cat([one[key] for one in each]))


def test_several_images_over_the_limit_are_scaled_down_by_one_factor():
    """An edge is cut down to whole image tokens of 16 px."""
    _, processor = tiny()
    processor.image_processor.size["longest_edge"] = 4_194_304
    draw, shares = random.Random(0), []
    for seed in range(60):
        sizes = [(draw.randint(64, 900), draw.randint(64, 900)) for _ in range(draw.randint(2, 4))]
        images = [noise(*size, seed) for size in sizes]
        most = draw.randint(80, 200)
        prompt = encode(processor, [images], [QUESTION], max_tokens=most)
        length = prompt["input_ids"].shape[1]
        assert length <= most
        if prompt["shrunk"]:
            shares.append(length / most)
            patch = processor.image_processor.patch_size  # px
            edges = [
                patch * n
                for _, high, wide in prompt["image_grid_thw"].tolist()
                for n in (wide, high)
            ]
            cut = list(zip(edges, [edge for size in sizes for edge in size], strict=True))
            longer = [(new, old) for new, old in cut if new > 32]  # not at the processor's least
            assert max(new / old for new, old in longer) < min(
                (new + 16) / old for new, old in longer
            )
    assert len(shares) > 50
    assert sum(shares) / len(shares) > 0.8


@pytest.mark.parametrize("size", [(512, 512), (4096, 32), (32, 2048), (700, 333)])
def test_a_prompt_over_the_limit_gets_a_smaller_image_and_keeps_its_text(size):
    _, processor = tiny()
    processor.image_processor.size["longest_edge"] = 4_194_304
    words = []
    for most, shrunk in ((None, False), (60, True)):
        prompt = encode(
            processor,
            [noise(*size), noise(64, 64)],
            [QUESTION] * 2,
            max_tokens=most,
        )
        assert prompt["shrunk"].tolist() == [shrunk, False]
        real = prompt["attention_mask"].bool()
        length = real[0].sum()
        assert 30 < length <= 60 if shrunk else length > 60
        ids = prompt["input_ids"]
        words.append(ids[real & (ids != processor.image_token_id)])
    assert torch.equal(*words)


def test_no_image_is_enlarged_over_the_limit_again():
    """Near the processor's minimum a grid that is rounded down would be."""
    _, processor = tiny()
    vision = processor.image_processor
    vision.size = {"shortest_edge": 16 * 256, "longest_edge": 4_194_304}  # 16 image tokens
    draw = random.Random(0)
    fitted = 0
    for count in (1, 3) * 150:
        text = vision_model.chat(processor, "what ?", count)
        words = vision_model.prompt_tokens(processor, text, []) - count
        edges = [(draw.randint(40, 900), draw.randint(40, 900)) for _ in range(count)]
        images = [Image.new("RGB", size) for size in edges]
        room = draw.randint(10, 60) * count
        try:
            found = vision_model.fit(processor, images, text, words + room)
        except ValueError:
            assert room < 2 * 16 * count
            continue
        sizes = [(image.height, image.width) for image in found]
        patches = sum(vision.get_number_of_image_patches(*size, {}) for size in sizes)
        assert patches <= vision.merge_size**2 * room
        fitted += found is not images
    assert fitted > 50


@pytest.mark.parametrize(
    "question, named",
    [
        ("what " * 100, "prompt tokens for its image"),
        ("what is <|image_pad|> ?", "would change the number of images"),
    ],
)
def test_questions_that_are_too_long_or_smuggle_in_images_are_refused(question, named):
    _, processor = tiny()
    with pytest.raises(ValueError, match=named):
        encode(processor, [noise(512, 512)], [question], max_tokens=80)


@pytest.mark.parametrize("text", [QUESTION, "Ünïcode 漢字 and\nlines 123!"])
def test_the_tiny_tokenizer_reads_any_text(text):
    _, processor = tiny()
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


# ------------------------------------------------------------------------------------- checkpoints


def test_a_saved_model_loads_here_and_in_plain_transformers_with_the_same_output(tmp_path, lively):
    model, processor = lively
    first, second = tmp_path / "first", tmp_path / "second"
    save(model, processor, first)
    (first / "video_preprocessor_config.json").write_text('{"from": "the original"}')
    (first / "model.safetensors.index.json").write_text("{}")
    save(*load(str(first)), second)
    (first / "model.safetensors.index.json").unlink()  # is of weights that are written anew

    def files(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert files(first) == files(second)
    plain = AutoModelForImageTextToText.from_pretrained(second)
    tokenizer = AutoTokenizer.from_pretrained(second)
    vision = AutoImageProcessor.from_pretrained(second)
    image = noise(64, 48)
    inputs = bench.copies(encode(processor, [image], [QUESTION]), 1)
    pixels = vision(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, inputs["pixel_values"])
    assert tokenizer(QUESTION)["input_ids"] == processor.tokenizer(QUESTION)["input_ids"]
    got, want = (which(**inputs).logits for which in (plain, model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    tied = plain.lm_head.weight is plain.model.language_model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


def test_missing_gpu_kernels_are_named_for_models_that_use_them(monkeypatch):
    missing = partial(run_folder.missing_kernels, tiny()[0])
    assert missing() == []  # a CPU has no use for them
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run_folder, "find_spec", lambda name: None)
    assert missing() == ["'flash-linear-attention>=0.6'", "causal-conv1d"]
    assert run_folder.missing_kernels(tiny_qwen3_vl()[0]) == []
    monkeypatch.setattr(run_folder, "find_spec", {"fla": "there"}.get)
    assert missing() == ["causal-conv1d"]


def test_of_a_checkpoints_generation_settings_only_its_ends_count_and_the_tokenizers_is_one(
    tmp_path,
):
    model, processor = tiny()
    save(model, processor, tmp_path)
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id

    def settings():
        return load(str(tmp_path))[0].generation_config.to_diff_dict()

    neutral = settings()
    sampling = {
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.8,
        "temperature": 0.7,
        "repetition_penalty": 1.5,
        "eos_token_id": [end, 0],
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling))
    assert settings() == neutral | {"eos_token_id": [0, end]}
    (tmp_path / "generation_config.json").unlink()  # as in released Qwen3.5 checkpoints
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = pad
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert settings() == neutral | {"eos_token_id": sorted([end, pad])}


def test_what_is_no_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="hub gave nothing"):
        load("nobody/no-such-model")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="has no config.json.*notes.txt"):
        load(str(tmp_path))
    save(*tiny(), tmp_path)
    for name, damaged in (
        ("model.safetensors", "{"),
        ("config.json", '{"model_type": "bert"}'),
    ):
        (tmp_path / name).write_text(damaged)
        with pytest.raises(ValueError, match="does not load as a Qwen3.5"):
            load(str(tmp_path))


def test_a_missing_weight_is_not_made_up_and_a_strange_one_not_ignored_but_for_the_draft_head(
    tmp_path,
):
    save(*tiny(), tmp_path)
    whole = load_file(tmp_path / "model.safetensors")

    def load_with(weights):
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        load(str(tmp_path))

    ones = torch.ones(2)
    # Released checkpoints hold it; it is not trained.
    load_with(whole | {"mtp.norm.weight": ones})
    with pytest.raises(ValueError, match="unexpected_keys.*adapter"):
        load_with(whole | {"model.adapter.weight": ones})
    del whole["model.language_model.norm.weight"]
    with pytest.raises(ValueError, match="missing_keys.*language_model.norm.weight"):
        load_with(whole)


def test_other_vision_language_models_are_refused_by_name(tmp_path):
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=16, patch_size=8),
        text_config=LlamaConfig(**small, vocab_size=64),
    )
    save(*tiny(), tmp_path)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LlavaForConditionalGeneration, expected a Qwen3.5"):
        load(str(tmp_path))
    with pytest.raises(ValueError, match="no configuration .* LlavaForConditionalGeneration"):
        plan.read_outline(str(tmp_path))
