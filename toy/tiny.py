"""A real Qwen3.5 with 0.4M weights and a tokenizer that knows the toy world."""

import torch
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Tokenizer,
)

from methods import OPSD_HINT
from model import VISION_TOKENS, ImageTextProcessor, prepare
from toy.scenes import COLOURS, SHAPES

# One token each, also after a space; other text is bytes.
WORDS = f"""
    user assistant what is in the red box boxes ? a {" ".join(COLOURS)} {" ".join(SHAPES)} with . ,
    one colour at top bottom left right
""".split()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS, "<think>", "</think>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)


def tiny(seed: int = 0):
    """A real Qwen3.5 with 0.4M random weights: (model, processor), float32, on the CPU.

    Same classes and code path as the released checkpoints, tokenizer included. One image token is
    16 x 16 px.
    """
    tokenizer = toy_tokenizer()
    vision = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=4,
        size={"shortest_edge": 256, "longest_edge": 65536},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    processor = ImageTextProcessor(vision, tokenizer, chat_template=CHAT)
    processor.source = None  # made here, not loaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(tiny_config(tokenizer.get_vocab()))
    return prepare(model, processor), processor


def toy_tokenizer() -> Qwen3_5Tokenizer:
    """Byte-level BPE in which each toy word is one token; every prefix of it is too, so that
    left-to-right merges build it."""
    words = [*WORDS, *OPSD_HINT.split()]
    spelled = [f"\u0120{word}" for word in words] + words  # \u0120: how bytes spell a space
    pairs = [(word[:end], word[end]) for word in spelled for end in range(1, len(word))]
    merges = list(dict.fromkeys(pairs))  # each once, in this order
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [left + right for left, right in merges] + SPECIAL
    return Qwen3_5Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        extra_special_tokens=SPECIAL,
        chat_template=CHAT,
    )


def tiny_config(vocabulary: dict) -> Qwen3_5Config:
    """Two layers, one of linear attention and one of full attention, after two of vision."""
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 24,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "pad_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": vocabulary["<|im_end|>"],
        "rope_parameters": {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 4,
        "out_hidden_size": 96,
        "num_position_embeddings": 256,
        "initializer_range": 0.05,
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
    )
