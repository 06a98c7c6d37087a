"""A checkpoint directory: saved so that other tools read it, refused where it would mislead."""

import json
import os

import pytest
import torch
from conftest import assert_equal, tiny_qwen3_vl
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from model import load
from storage.checkpoint import NO_THINKING, fingerprint, save
from toy.tiny import tiny

ENDS = "{% if enable_thinking is defined and enable_thinking is CASE %}YES{% else %}NO{% endif %}"


@pytest.fixture
def checkpoint(tmp_path):
    """A directory as someone else would have written it: bf16 in its config, its own template."""
    folder = tmp_path / "original"
    save(*tiny(0), folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"') + "\n\n")
    return folder


def with_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "template, unasked, asked, refused",
    [
        (ENDS.replace("CASE", "false"), "YES", "NO", "YES"),
        (ENDS.replace("CASE", "true"), "NO", "YES", "NO"),
        ("{% if enable_thinking %}YES{% else %}NO{% endif %}", "NO", "YES", "NO"),
    ],
)
def test_a_served_checkpoint_thinks_only_where_it_is_asked_to(
    template, unasked, asked, refused, checkpoint, tmp_path
):
    (checkpoint / "chat_template.jinja").write_text(template)
    for name in ("once", "twice"):  # saved, trained on, saved again
        save(*load(str(checkpoint)), tmp_path / name)
        checkpoint = tmp_path / name
    assert (checkpoint / "chat_template.jinja").read_text() == NO_THINKING + template
    _, processor = load(str(checkpoint))
    said = processor.tokenizer.apply_chat_template
    chat = [{"role": "user", "content": "?"}]
    assert said(chat, tokenize=False) == unasked
    assert said(chat, tokenize=False, enable_thinking=True) == asked
    assert said(chat, tokenize=False, enable_thinking=False) == refused


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json"])
def test_a_template_in_an_older_layout_does_not_think_either(place, checkpoint, tmp_path):
    (checkpoint / "chat_template.jinja").unlink()
    path = checkpoint / place
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | {"chat_template": ENDS.replace("CASE", "false")}))
    save(*load(str(checkpoint)), tmp_path / "saved")
    _, processor = load(str(tmp_path / "saved"))
    chat = [{"role": "user", "content": "?"}]
    for said in (processor, processor.tokenizer):
        assert said.apply_chat_template(chat, tokenize=False) == "YES"


def test_all_but_the_weights_is_the_originals(checkpoint, tmp_path):
    draft = {"mtp.layers.0.weight": torch.arange(6.0).view(2, 3)}
    with_weights(checkpoint, lambda tensors: tensors.update(draft))
    model, processor = load(str(checkpoint))
    with torch.no_grad():
        model.lm_head.weight += 1
    old = os.umask(0o022)
    save(model, processor, tmp_path / "saved")
    os.umask(old)
    for path in checkpoint.iterdir():
        copied = (tmp_path / "saved" / path.name).read_bytes()
        assert (copied == path.read_bytes()) == (path.name != "model.safetensors"), path.name
    saved = tmp_path / "saved" / "model.safetensors"
    assert_equal({name: load_file(saved)[name] for name in draft}, draft)
    assert saved.stat().st_mode & 0o777 == 0o644
    again, _ = load(str(tmp_path / "saved"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("build", [tiny, tiny_qwen3_vl])
def test_the_original_config_is_still_the_models(build, tmp_path):
    save(*build(), tmp_path / "original")
    model, processor = load(str(tmp_path / "original"))
    save(model, processor, tmp_path / "saved")
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(config)
    shapes = [{name: w.shape for name, w in each.named_parameters()} for each in (built, model)]
    assert type(built) is type(model)
    assert shapes[0] == shapes[1]


def untie(folder):
    def change(tensors):
        embedding = next(value for name, value in tensors.items() if "embed_tokens" in name)
        tensors["lm_head.weight"] = embedding.flip(0).contiguous()

    with_weights(folder, change)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage, told",
    [
        (untie, "tie_word_embeddings"),
        (write("config.json", '{"quantization_config": {}}'), "quantised"),
        (remove("tokenizer.json"), "tokenizer.json"),
        (remove("tokenizer_config.json"), "tokenizer_config.json"),
        (remove("chat_template.jinja"), "chat_template"),
        (write("chat_template.jinja", "{% if %}"), "does not load"),
        (write("config.json", "{"), "does not load"),
        (write("chat_template.jinja", "{{ 1 + 'a' }}"), "does not load"),
        (write("generation_config.json", "[]"), "does not load"),
        (write("tokenizer_config.json", "[]"), "does not load"),
        (write("preprocessor_config.json", "[]"), "does not load"),
        (remove("model.safetensors"), "does not load"),
    ],
)
def test_a_checkpoint_that_would_mislead_is_refused(damage, told, checkpoint):
    damage(checkpoint)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        load(str(checkpoint))


def test_the_same_weights_have_one_fingerprint_wherever_they_lie(checkpoint, tmp_path):
    model, processor = load(str(checkpoint))
    save(model, processor, tmp_path / "copy")
    same = fingerprint(load(str(tmp_path / "copy"))[0])
    assert same == fingerprint(model)
    assert same != fingerprint(tiny(1)[0])
