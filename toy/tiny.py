"""A real Qwen3.5 with 0.4M weights and a tokenizer that knows the toy world."""

import torch
from tokenizers import pre_tokenizers
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5Tokenizer,
)

from model import VISION_TOKENS, ImageTextProcessor, prepare
from toy.scenes import COLOURS, SHAPES

WORDS = f"""user assistant what is in the red box ? a {" ".join(COLOURS)} {" ".join(SHAPES)} with . , one colour at top bottom
    left right""".split()  # one token each; other text is bytes
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS, "<think>", "</think>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in "
    "m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def tiny(seed: int = 0):
    """A real Qwen3.5 with 0.4M random weights: (model, processor), float32, on the CPU. One image token is 16 x 16 px.

    Same classes and code path as the released checkpoints, tokenizer included: byte-level BPE in which each toy word is
    one token (every prefix of it is too, so that left-to-right merges build it).
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        (word[:i], word[i])
        for start in ("\u0120", "")
        for word in (start + w for w in WORDS)
        for i in range(1, len(word))
    ]
    merges = list(dict.fromkeys(merges))  # "\u0120" is how bytes spell a space
    words = letters + [left + right for left, right in merges] + SPECIAL
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Qwen3_5Tokenizer(
        vocab=vocabulary,
        merges=merges,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        extra_special_tokens=SPECIAL,
        chat_template=CHAT,
    )
    vision = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 256, "longest_edge": 65536},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = ImageTextProcessor(vision, tokenizer, chat_template=CHAT)
    processor.source = None
    config = Qwen3_5Config(
        text_config=dict(
            vocab_size=len(words),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=24,
            linear_value_head_dim=24,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=vocabulary["<|endoftext|>"],
            eos_token_id=vocabulary["<|im_end|>"],
            rope_parameters=dict(
                rope_type="default",
                rope_theta=1e4,
                partial_rotary_factor=0.5,
                mrope_section=[4, 2, 2],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            patch_size=8,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=96,
            num_position_embeddings=64,
            initializer_range=0.05,
        ),
        tie_word_embeddings=True,
        **{
            f"{name}_token_id": vocabulary[f"<|{token}|>"]
            for name, token in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            )
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3_5ForConditionalGeneration(config)
    return prepare(model, processor), processor
