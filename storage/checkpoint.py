"""A checkpoint's directory: found, written so that other tools read it, and told from others."""

import hashlib
import json
import shutil
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from storage.files import read_json, write
from storage.hub import download

# Before a checkpoint's own chat template: served, it thinks only where it is asked to.
NO_THINKING = "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}"


def find(path: str, patterns: list[str] | None = None) -> Path:
    """The checkpoint directory `path`, or that of a hub id, whose files (all, or those that fit the
    patterns) are downloaded."""
    folder = Path(path)
    if not folder.is_dir():
        what = f"--model {path!r} is no directory here"
        folder = download(path, what, "or give a directory.", allow_patterns=patterns)
    there = sorted(file.name for file in folder.iterdir())
    missing = {"config.json", "tokenizer.json", "tokenizer_config.json"}.difference(there)
    if missing:
        raise FileNotFoundError(
            f"{folder} is no checkpoint: it has no {', '.join(sorted(missing))} (it has "
            f"{there[:8]}). Expected a directory written by save_pretrained, or a hub id such as "
            "Qwen/Qwen3.5-4B."
        )
    if b"quantization_config" in (folder / "config.json").read_bytes():
        raise ValueError(
            f"{path} is quantised (its config.json has a quantization_config). Expected the "
            "original checkpoint in bf16, fp16 or fp32."
        )
    return folder


def save(model, processor, folder: Path) -> None:
    """Write a checkpoint that plain transformers and vLLM load: all but the weights is copied as
    the original had it, but for the chat template, which does not think unless it is asked to."""
    folder.mkdir(parents=True, exist_ok=True)
    # Named parameters: tied weights once.
    weights = {name: weight.to("cpu", copy=True) for name, weight in model.named_parameters()}
    source = processor.source
    if source is None:  # the tiny model has no original
        processor.image_processor.save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)
    else:
        weights |= prediction_weights(source)
    model.save_pretrained(folder, state_dict=weights)
    for file in source.iterdir() if source else []:
        # transformers would write config.json anew, in words that older servers misread.
        copied = file.suffix in (".json", ".jinja", ".txt", ".model")
        if copied and "index" not in file.name and file.name != "chat_template.json":
            shutil.copyfile(file, folder / file.name)
    tokenizer = read_json(folder / "tokenizer_config.json", [])
    if tokenizer.pop("chat_template", None):  # older layouts have it there, or in a json: one place
        write(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=1))
    template = processor.chat_template.removeprefix(NO_THINKING)
    template_file = folder / "chat_template.jinja"
    template_file.write_text(NO_THINKING + template, encoding="utf-8")
    for file in folder.glob("*.safetensors"):  # written for this user alone
        shutil.copymode(template_file, file)


def prediction_weights(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds to predict several tokens at once (MTP): no model here has these,
    servers use them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("mtp.")]  # noqa: SIM118
            found |= {name: file.get_tensor(name) for name in names}
    return found


def prompts_digest(processor) -> str:
    """Of what makes a prompt of images and a question: chat template, image processor."""
    told = [processor.chat_template, processor.image_processor.to_dict()]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(model) -> str:
    """Of a model's weights: 16 hex digits, from the first 64 numbers of each."""
    some = [weight.detach().flatten()[:64].float().cpu() for weight in model.parameters()]
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in some)).hexdigest()[:16]
