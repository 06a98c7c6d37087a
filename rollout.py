"""Rollouts: G sampled responses per prompt, the prompt computed once (paper, Eq. 3: y ~ student(. | x, q)).

    rollout = sample(student, processor, prompt, group=8, max_new_tokens=1024, seeds=[0, 1, 2])     # a seed for each prompt
    texts = [reply.output for reply in answers(model, processor, images, questions, max_new_tokens=1024)]

Sampling is at temperature 1 over all tokens but the vision ones (no top-p, no top-k), by inverse CDF: token = first v with
CDF(v) > u, one uniform u per row and token drawn from that prompt's own generator. So the random numbers of a response
depend on its seed alone, never on which prompts share its batch, on the number of ranks or on earlier draws (the logits
still differ by rounding from batch to batch).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
)
from transformers.integrations import sdpa_attention

from model import VISION_TOKENS, Prompt, encode, to_device

COMPILE = CompileConfig(dynamic=False)  # inductor and CUDA graphs
CACHES = WeakKeyDictionary()  # model -> {(rows, tokens): its static cache}
sdpa_attention.is_torchdynamo_compiling = lambda: (
    False
)  # else compiled decoding repeats keys and values for every query head


@dataclass
class Rollout:
    """N = B G responses, rows of one prompt together, padded on the right to T."""

    ids: Tensor  # (N, T) int64
    mask: Tensor  # (N, T) bool, True on the response's own tokens, its EOS included
    ended: Tensor  # (N,) bool, False where max_new_tokens cut the response off
    log_probs: Tensor  # (N, T) fp32, of each token where it was sampled; NaN after a response and when greedy

    def decode(self, tokenizer) -> list[str]:
        """The responses as texts, without special tokens."""
        return [
            tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(self.ids, self.mask)
        ]

    def split(self, sizes: list[int]) -> list["Rollout"]:
        """Consecutive parts of `sizes` rows, each as narrow as its longest response."""
        parts = zip(
            *(tensor.split(sizes) for tensor in (self.ids, self.mask, self.ended, self.log_probs))
        )
        return [
            Rollout(
                ids[:, : (width := int(mask.sum(1).max()))],
                mask[:, :width],
                ended,
                log_probs[:, :width],
            )
            for ids, mask, ended, log_probs in parts
        ]


class InverseCDF(LogitsProcessor):
    """Leaves only the sampled token finite, so that greedy decoding picks it.

    uniforms: (N, max_new_tokens) in [0, 1), float32 values (24 bits, so u < 1 strictly in float64).
    """

    def __init__(self, uniforms: Tensor, prompt_tokens: int, temperature: float, bar=None):
        self.uniforms, self.prompt_tokens, self.temperature, self.bar = (
            uniforms,
            prompt_tokens,
            temperature,
            bar,
        )
        self.log_probs = torch.full_like(
            uniforms, torch.nan
        )  # (N, max_new_tokens), of what was sampled

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:  # (N, L + t), (N, V)
        if self.bar is not None:
            self.bar.update()
        p, t = (logits.float() / self.temperature).softmax(-1), ids.shape[1] - self.prompt_tokens
        cdf = p.cumsum(-1, dtype=torch.float64)
        u = self.uniforms[:, t].double() * cdf[:, -1]
        token = torch.searchsorted(
            cdf, u[:, None], right=True
        )  # (N, 1); never one of probability 0
        token.clamp_(max=logits.shape[1] - 1)  # NaN gives V: said at the end
        self.log_probs[:, t] = p.gather(1, token).log().squeeze(1)
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)


@torch.no_grad()
def sample(
    model,
    processor,
    prompt: Prompt,
    group: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seeds: list[int] | None = None,
    bar=None,
    static: int = 0,
) -> Rollout:
    """G responses to each of B prompts. temperature 0 decodes greedily; seeds: one per prompt, default from torch's RNG.

    The first L - 1 prompt tokens are prefilled once, their cache is copied to the N rows, and `generate` goes on from the
    last prompt token. Vision tokens are never sampled: they would break every later forward. bar: a tqdm bar that moves on
    by one a sampled token. static: tokens a row (prompt and response) of a cache of fixed size; on a GPU decoding is then
    compiled, once for this number and N. Raises ValueError where they are too few.
    """
    ids, mask = prompt["input_ids"], prompt["attention_mask"]  # (B, L)
    (B, L), device = ids.shape, ids.device
    rows = torch.arange(B, device=device).repeat_interleave(group)  # (N,) -> prompt
    model.model.rope_deltas = None  # mutable state of an earlier call
    cache = DynamicCache(config=model.config.get_text_config())
    model.model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        mm_token_type_ids=prompt["mm_token_type_ids"][:, :-1],
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
        past_key_values=cache,
        use_cache=True,
    )
    if static:
        cache = static_cache(model, cache, rows, static, L + max_new_tokens)
    else:
        cache.reorder_cache(rows)
    model.model.rope_deltas = model.model.rope_deltas[rows]

    processors = LogitsProcessorList()
    log_probs = torch.full((len(rows), max_new_tokens), torch.nan, device=device)
    if temperature > 0:
        seeds = torch.randint(2**62, (B,)).tolist() if seeds is None else seeds
        uniforms = torch.cat(
            [
                torch.rand(group, max_new_tokens, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )  # (N, max_new_tokens)
        processors.append(InverseCDF(uniforms.to(device), L, temperature, bar))
        log_probs = processors[0].log_probs
    tokenizer, stops = processor.tokenizer, model.generation_config.eos_token_id
    output = model.generate(
        input_ids=ids[rows],
        attention_mask=mask[rows],
        past_key_values=cache,
        logits_processor=processors,
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            compile_config=COMPILE if static else None,
            suppress_tokens=tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)),
        ),
    )
    model.model.rope_deltas = None

    response = output[:, L:]  # (N, T)
    is_stop = torch.isin(response, torch.tensor(stops, device=device))
    before = is_stop.long().cumsum(1) - is_stop.long()  # stop tokens strictly before
    mask = before == 0
    log_probs = log_probs[:, : response.shape[1]].where(mask, torch.nan)
    if temperature > 0 and not log_probs[mask].isfinite().all():
        raise FloatingPointError(
            "The model's logits are no numbers. Look at its weights, and at the attention kernels in use."
        )
    return Rollout(response, mask, is_stop.any(1), log_probs)


def static_cache(model, cache: DynamicCache, rows: Tensor, tokens: int, needed: int) -> StaticCache:
    """The states of B prompts, `cache`, copied to N rows (N,) of a cache for `tokens` tokens a row. Its memory is kept for the
    next call of the same shape: a CUDA graph reads and writes where it did when it was captured."""
    if tokens < needed:
        raise ValueError(
            f"The static cache holds {tokens} tokens a row, prompt and response need {needed}. Make it larger."
        )
    kept = CACHES.setdefault(model, {})
    static = kept.setdefault(
        (len(rows), tokens),
        StaticCache(config=model.config.get_text_config(), max_cache_len=tokens),
    )
    static.reset()
    for layer, prefilled in zip(static.layers, cache.layers):
        if hasattr(prefilled, "keys"):  # full attention
            layer.update(prefilled.keys[rows], prefilled.values[rows])
        else:
            layer.update_conv_state(prefilled.conv_states[0][rows])
            layer.update_recurrent_state(prefilled.recurrent_states[0][rows])
    return static


@dataclass
class Reply:
    """What a model answered to one prompt."""

    output: str  # its text, without special tokens
    tokens: int  # sampled ones, the EOS included
    truncated: bool  # whether max_new_tokens cut it off


def answers(
    model, processor, images: list, texts: list, max_new_tokens: int, *, group: int = 1, **how
) -> list[Reply]:
    """`group` answers to each row, those of a row together; greedy unless `how` (see `Sampling`)
    gives a temperature, with a seed a row. A row is an image and a question, or a list of images
    and a chat (model.encode)."""
    prompt = to_device(encode(processor, images, texts), next(model.parameters()).device)
    how = {"temperature": 0.0, **how}
    rollout = sample(model, processor, prompt, group, max_new_tokens=max_new_tokens, **how)
    texts = rollout.decode(processor.tokenizer)
    lengths = rollout.mask.sum(1).tolist()
    ended = rollout.ended.tolist()
    return [Reply(text, n, not end) for text, n, end in zip(texts, lengths, ended)]


@dataclass
class Batches:
    """Work in batches that fit into memory: `most` items at once, halved for good when it runs out."""

    most: int

    def run(self, items: list, work, bad_item: tuple = ()) -> Iterator[tuple[list, object]]:
        """(batch, work(batch)) for consecutive batches of `items`.

        A batch that does not fit, or raises one of the errors `bad_item`, is halved until it passes
        or is a single item, which comes with its error instead of a result.
        """
        done, size, most = 0, self.most, self.most
        while done < len(items):
            batch = items[done : done + size]
            try:
                result = work(batch)
            except (torch.OutOfMemoryError, *bad_item) as error:
                if len(batch) > 1:
                    size = len(batch) // 2
                    if isinstance(error, torch.OutOfMemoryError):
                        self.most = size
                        tqdm.write(f"out of memory with {len(batch)} at once, going on with {size}")
                    continue
                result = error
                self.most = most  # this item's fault, not the batch's
            yield batch, result
            done += len(batch)
            size = min(self.most, 2 * size)
