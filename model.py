"""The model: load any Qwen3.5 / Qwen3-VL style checkpoint, turn images and questions into prompts,
and compute the hidden states that predict every token of G responses to a prompt while computing
the prompt only once.

    student, processor = load("Qwen/Qwen3.5-4B", device="cuda", dtype=torch.bfloat16)
    prompt = encode(processor, [image], ["What is written on the sign?"])
    hidden = response_hidden(student, prompt, rollout)      # (N, T, D)
    logits = hidden @ student.lm_head.weight.T

B prompts, G responses each, N = B G rows, L prompt tokens, T response tokens, D hidden size.
"""

import launch.environment  # noqa: F401  (first: it sets what torch and transformers read)

# isort: split
import math
from functools import partial

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from transformers import AutoModelForImageTextToText, GenerationConfig, Qwen3VLProcessor

from storage.checkpoint import find

# What the files of a checkpoint can lead to.
BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
BROKEN += (SafetensorError, TemplateError, StrictDataclassError)
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
MIN_CONTINUATION = 4  # tokens; fewer would take the kernels of one-token decoding

# What a processor returns and a model takes: input_ids, attention_mask, mm_token_type_ids (B, L)
# int64, pixel_values (patches, 3 t p p), image_grid_thw (images, 3) int64; and `shrunk` (B,) bool.
Prompt = dict[str, Tensor]


class ImageTextProcessor(Qwen3VLProcessor):
    """Qwen's processor without its video half, which cannot be built where torchvision is
    missing."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(
            image_processor, tokenizer, video_processor=None, chat_template=chat_template
        )


# ------------------------------------------------------------------------------------------- load


def load(path: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A checkpoint directory or hub id -> (model, processor), strictly: every weight present, none
    left over.

    Raises FileNotFoundError / ValueError naming what was found when `path` is no image-text
    checkpoint.
    """
    folder = find(path)
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        processor = ImageTextProcessor.from_pretrained(folder)
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        chat(processor, "?")  # is there a template, and does it parse?
    except BROKEN as error:
        raise ValueError(
            f"{path} does not load as a Qwen3.5 / Qwen3-VL style checkpoint: {error}"
        ) from error
    parts = ("visual", "language_model", "get_rope_index")
    if not all(hasattr(model.model, part) for part in parts):
        raise ValueError(
            f"{path} is a {type(model).__name__}, expected a Qwen3.5 / Qwen3-VL style model."
        )
    wrong = {kind: sorted(keys)[:5] for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {wrong}. Loading is strict; repair the "
            "checkpoint."
        )
    embedding = model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and model.lm_head.weight is not embedding:
        raise ValueError(
            f"{path} says tie_word_embeddings, but its lm_head.weight is not its embedding. Say "
            "false in config.json, or remove the weight."
        )
    processor.source = folder
    return prepare(model.to(device), processor), processor


def prepare(model, processor):
    """Settings all code here relies on: no dropout, per-block checkpointing of the vision tower,
    and a neutral generation config.

    A checkpoint's own one may hold top_k, top_p and penalties that would silently change the
    rollouts, or be missing: then <|im_end|>, the tokenizer's end, would not be among the ends the
    model's config names.
    """
    model.eval()
    for block in model.model.visual.blocks:  # active only while block.training
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(recompute_in_backward, use_reentrant=False)
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    ends.add(processor.tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends - {None}))
    return model


def is_linear(layer) -> bool:
    """Whether a decoder layer has linear attention, with a state, instead of keys and values."""
    return hasattr(layer, "linear_attn")


# ----------------------------------------------------------------------------------------- prompts


def encode(processor, images: list, texts: list, *, max_tokens: int | None = None) -> Prompt:
    """Per row an image, or a list of them, and a question about all, or a chat (messages as chat
    templates take them) that has as many -> left-padded prompts that end with the non-thinking
    generation prefix.

    Returns a Prompt with pixel_values in float32; `shrunk`: prompts over `max_tokens` have their
    images scaled down to fit (cutting ids would cut image tokens). Raises ValueError when the text
    alone is too long or holds a special token.
    """
    chats, fitted, shrunk = [], [], []
    for shown, text in zip(images, texts, strict=True):
        shown = shown if isinstance(shown, list) else [shown]
        refuse_special_tokens(processor, text)
        chats.append(chat(processor, text, len(shown)))
        chats[-1].encode()  # a ValueError for half a character, which no tokenizer takes
        small = shown if max_tokens is None else fit(processor, shown, chats[-1], max_tokens)
        fitted += small
        shrunk.append(small is not shown)
    prompt = processor(
        text=chats, images=fitted, padding=True, padding_side="left", return_tensors="pt"
    )
    return {**prompt, "shrunk": torch.tensor(shrunk)}


def refuse_special_tokens(processor, text: str | list) -> None:
    """Raises ValueError for a question, or a chat, that holds any."""
    found = [token for token in processor.tokenizer.all_special_tokens if token in str(text)]
    if found:
        raise ValueError(
            f"The question {str(text)[:80]!r} holds {found}, which would change the number of "
            "images, or of turns. Remove it."
        )


def chat(processor, text: str | list, images: int = 1) -> str:
    """A question about so many images, or a chat's messages, as the model reads it, with a
    placeholder for each image."""
    if isinstance(text, str):
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        text = [{"role": "user", "content": content}]
    return processor.apply_chat_template(text, add_generation_prompt=True, enable_thinking=False)


def prompt_tokens(processor, chat: str, sizes: list) -> int:
    """Tokens of a chat and of its images, whose sizes are (width, height) in pixels."""
    vision = processor.image_processor
    patches = sum(vision.get_number_of_image_patches(high, wide, {}) for wide, high in sizes)
    text = len(processor.tokenizer(chat)["input_ids"]) - len(sizes)  # less the placeholders
    return text + patches // vision.merge_size**2


def fit(processor, images: list, chat: str, max_tokens: int) -> list:
    """`images` itself when their prompt has at most `max_tokens` tokens, else copies, scaled down
    by one factor, with which it has."""
    sizes = [image.size for image in images]
    if prompt_tokens(processor, chat, sizes) <= max_tokens:
        return images
    vision = processor.image_processor
    side = vision.patch_size * vision.merge_size  # px per image token along an edge
    room = max_tokens - prompt_tokens(processor, chat, []) + len(images)
    # A grid below the processor's minimum is enlarged again.
    least = 2 * math.ceil(vision.size["shortest_edge"] / side**2) * len(images)
    if room < least:
        raise ValueError(
            f"A question of {len(chat)} characters leaves {room} of {max_tokens} prompt tokens for "
            f"its image(s), which need at least {least}. Raise the prompt limit or shorten the "
            f"question: {chat[:120]!r}"
        )
    scale = math.sqrt(room / sum(map(math.prod, sizes)))  # image tokens per px along an edge
    while prompt_tokens(processor, chat, sizes) > max_tokens:
        sizes = [
            [side * min(max(1, int(edge * scale)), room) for edge in image.size] for image in images
        ]
        scale *= 0.99  # several may take more than one: by rounding up, by that minimum
    return list(map(Image.Image.resize, images, sizes))  # bicubic


def join(prompts: list[Prompt], pad_id: int) -> Prompt:
    """Prompt batches -> one batch, padded on the left to the longest."""
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    fill = {"input_ids": pad_id, "attention_mask": 0, "mm_token_type_ids": 0}
    joined = {}
    for key in prompts[0]:
        parts = [prompt[key] for prompt in prompts]
        if key in fill:
            parts = [pad(p, (longest - p.shape[1], 0), value=fill[key]) for p in parts]
        joined[key] = torch.cat(parts)
    return joined


def to_device(prompt: Prompt, device) -> Prompt:
    return {key: value.to(device, non_blocking=True) for key, value in prompt.items()}


# ----------------------------------------------------------------------------------- shared prefix


def response_hidden(model, prompt: Prompt, ids: Tensor, *, checkpoint: bool = True) -> Tensor:
    """Hidden states after the final norm that predict each response token; the prompt is computed
    once per group.

    prompt: from `encode`, B rows; ids: (N, T) response ids or a Rollout, rows of one prompt
    together, N = B G. Returns (N, T, D) in the model's dtype: exactly what a plain forward of each
    full sequence gives at these positions. checkpoint=True keeps one layer's activations at a time
    and recomputes the others in the backward pass.

    The last prompt token predicts the first response token, so it opens the continuation: the
    shared prefix is the other L - 1 prompt tokens, the continuation is that token and the first
    T - 1 of the response.
    """
    ids = getattr(ids, "ids", ids)
    text = model.model.language_model
    B, (N, T) = len(prompt["input_ids"]), ids.shape
    if N % B:
        raise ValueError(
            f"{N} responses cannot be shared evenly by {B} prompts: expected rows of one prompt "
            "together."
        )
    rows = torch.arange(B, device=ids.device).repeat_interleave(N // B)  # (N,) -> prompt
    checkpoint = checkpoint and torch.is_grad_enabled()

    tokens, real = prompt["input_ids"], prompt["attention_mask"].bool()  # (B, L)
    embeds, visual, deepstack = embed_prompt(model, prompt, checkpoint)  # (B, L-1, D)
    continuation = torch.cat([tokens[rows, -1:], ids[:, :-1]], dim=1)  # (N, T)
    continuation = pad(continuation, (0, max(0, MIN_CONTINUATION - T)), value=0)
    hidden = text.embed_tokens(continuation)  # (N, T, D)

    before, after = rope_positions(model, prompt, rows, hidden.shape[1])
    prompt_rope = text.rotary_emb(embeds, before)
    response_rope = text.rotary_emb(hidden, after)
    prompt_masks, response_mask = attention_masks(real[:, :-1], rows, hidden.shape[1])
    for index, layer in enumerate(text.layers):
        kind = "linear" if is_linear(layer) else "full"
        run = getattr(layer, "shared", partial(shared_layer, layer))  # sharded: gathers its weights
        embeds, hidden = run(
            embeds,
            hidden,
            {"position_embeddings": prompt_rope, "attention_mask": prompt_masks[kind]},
            {
                "position_embeddings": response_rope,
                "attention_mask": response_mask if kind == "full" else None,
            },
            checkpoint,
        )
        if index < len(deepstack):
            features = torch.cat(list(deepstack[index])).to(embeds.dtype)  # (image tokens, D)
            embeds = embeds + torch.zeros_like(embeds).masked_scatter(visual, features)
    return text.norm(hidden)[:, :T]


def embed_prompt(model, prompt: Prompt, checkpoint: bool) -> tuple[Tensor, Tensor, list]:
    """The shared prefix before the first layer: embeddings (B, L-1, D) with the image features in
    place, where these are (B, L-1, 1) bool, and the features that Qwen3-VL adds to early layers."""
    inner, tokens = model.model, prompt["input_ids"][:, :-1]
    if checkpoint:
        inner.visual.train()  # turns on its per-block checkpointing
    vision = inner.get_image_features(
        prompt["pixel_values"], prompt["image_grid_thw"], return_dict=True
    )
    if checkpoint:
        inner.visual.eval()
    embeds = inner.language_model.embed_tokens(tokens)  # (B, L-1, D)
    visual = (tokens == model.config.image_token_id)[..., None]  # (B, L-1, 1)
    embeds = embeds.masked_scatter(visual, torch.cat(vision.pooler_output).to(embeds.dtype))
    return embeds, visual, getattr(vision, "deepstack_features", None) or []


def rope_positions(model, prompt: Prompt, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Positions of the shared prefix (3, B, L-1), and of continuations of `length` tokens
    (3, N, length)."""
    positions, delta = model.model.get_rope_index(
        prompt["input_ids"],
        mm_token_type_ids=prompt["mm_token_type_ids"],
        image_grid_thw=prompt["image_grid_thw"],
        attention_mask=prompt["attention_mask"],
    )  # (3, B, L), (B, 1)
    first = prompt["attention_mask"].sum(1, keepdim=True) - 1 + delta  # (B, 1)
    after = first[rows] + torch.arange(length, device=rows.device)  # (N, length)
    return positions[:, :, :-1], after.expand(3, -1, -1)


def attention_masks(
    real: Tensor, rows: Tensor, length: int
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Masks of the prompt by kind of layer, and of the continuation: True = may attend.

    real: (B, L-1) bool, False on left padding. Full attention: (B, 1, L-1, L-1), or None (plain
    causal) without padding; linear attention: (B, L-1), or None. Continuation: (N, 1, T, L-1+T),
    the real prompt tokens, then causal; without padding a causal bias that is aligned to the last
    key, which a GPU's attention kernels know and need no mask for.
    """
    if real.all():
        return {"full": None, "linear": None}, causal_lower_right(length, real.shape[1] + length)
    prefix, keys = real.shape[1], pad(real[rows], (0, length), value=True)  # (N, L-1+T)
    causal = torch.ones(2 * keys.shape[1:], dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(prefix, dtype=torch.bool, device=real.device)
    full = causal[:prefix, :prefix] & real[:, None] | itself  # padding sees itself: no empty row
    continuation = causal[prefix:] & keys[:, None]  # (N, T, L-1+T)
    return {"full": full[:, None], "linear": real}, continuation[:, None]


def shared_layer(
    layer,
    prompt: Tensor,
    response: Tensor,
    prompt_args: dict,
    response_args: dict,
    checkpoint: bool = False,
) -> tuple[Tensor, Tensor]:
    """One decoder layer on B prompts, then on their N continuations. (B, L-1, D), (N, T, D) -> the
    same shapes.

    Calls `forward`: a sharded layer's weights are gathered once around both (sharding.py), not by
    the layer's own hooks.
    """
    if checkpoint:
        return recompute_in_backward(
            *(shared_layer, layer, prompt, response, prompt_args, response_args),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    states = LayerStates()
    prompt = layer.forward(prompt, past_key_values=states, **prompt_args)
    group = len(response) // len(prompt)
    past = [state.repeat_interleave(group, dim=0) for state in states.new]
    response = layer.forward(response, past_key_values=LayerStates(past), **response_args)
    return prompt, response


class LayerStates:
    """What a decoder layer remembers of the tokens before: keys and values, or convolution and
    recurrent state.

    Stands in for the stock cache, which writes its states in place (`copy_`) and so breaks
    autograd. Here `past` is only read and `new` only assigned, which makes recomputation in the
    backward pass safe.
    """

    def __init__(self, past: list[Tensor] = ()):
        self.past, self.new = past, []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        self.new = [keys, values]  # (rows, heads, tokens, head_dim)
        if not self.past:
            return keys, values
        return torch.cat([self.past[0], keys], dim=2), torch.cat([self.past[1], values], dim=2)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0):
        return self.past[0] if self.past else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0):
        return self.past[1] if self.past else None

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, inputs: Tensor, layer_idx: int, conv_kernel_size: int, **kwargs
    ) -> Tensor:
        if self.past:
            inputs = torch.cat([self.past[0], inputs], dim=-1)  # (rows, channels, tokens)
        missing = max(0, conv_kernel_size - inputs.shape[-1])
        self.new = [pad(inputs, (missing, 0))[..., -conv_kernel_size:]]
        return inputs

    def update_recurrent_state(self, state: Tensor, layer_idx: int, **kwargs) -> None:
        self.new.append(state)  # (rows, heads, key_dim, value_dim)
