"""Rollouts: G sampled responses per prompt, the prompt computed once (Eq. 3: y ~ student(.|x, q)).

    rollout = sample(student, processor, prompt, group=8, max_new_tokens=1024, seeds=[0, 1, 2])
    replies = answers(model, processor, images, questions, max_new_tokens=1024)

Sampling is at temperature 1 over all tokens but the vision ones (no top-p, no top-k), by inverse
CDF: token = first v with CDF(v) > u, one uniform u per row and token drawn from that prompt's own
generator. So the random numbers of a response depend on its seed alone, never on which prompts
share its batch, on the number of ranks or on earlier draws (the logits still differ by rounding
from batch to batch).
"""

import launch.environment  # noqa: F401  (first: it sets what torch and transformers read)

# isort: split
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

from model import VISION_TOKENS, Prompt, encode, to_device

COMPILE = CompileConfig(dynamic=False)  # inductor and CUDA graphs
CACHES = WeakKeyDictionary()  # model -> {(rows, tokens): its static cache}


@dataclass
class Rollout:
    """N = B G responses, rows of one prompt together, padded on the right to T."""

    ids: Tensor  # (N, T) int64
    mask: Tensor  # (N, T) bool, True on the response's own tokens, its EOS included
    ended: Tensor  # (N,) bool, False where max_new_tokens cut the response off
    log_probs: Tensor  # (N, T) fp32, of each token as sampled; NaN after a response

    def decode(self, tokenizer) -> list[str]:
        """The responses as texts, without special tokens."""
        rows = zip(self.ids, self.mask, strict=True)
        return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]

    def split(self, sizes: list[int]) -> list["Rollout"]:
        """Consecutive parts of `sizes` rows, each as narrow as its longest response."""
        fields = (self.ids, self.mask, self.ended, self.log_probs)
        parts = []
        for ids, mask, ended, log_probs in zip(
            *(each.split(sizes) for each in fields), strict=True
        ):
            width = int(mask.sum(1).max())
            parts.append(Rollout(ids[:, :width], mask[:, :width], ended, log_probs[:, :width]))
        return parts


@dataclass
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0  # 0 decodes greedily
    seeds: list[int] | None = None  # one a prompt; None: from torch's generator
    bar: tqdm | None = None  # moves on by one a sampled token
    static: int = 0  # tokens a row, prompt and response, of a cache of fixed size; 0: a growing one


@torch.no_grad()
def sample(model, processor, prompt: Prompt, group: int, *, max_new_tokens: int, **how) -> Rollout:
    """G responses to each of B prompts; `how`: the fields of `Sampling`.

    The first L - 1 prompt tokens are prefilled once, their cache is copied to the N rows, and
    `generate` goes on from the last prompt token. Vision tokens are never sampled: they would break
    every later forward. With a static cache decoding is compiled on a GPU, once for its size and N;
    ValueError where it is too small. FloatingPointError where logits are no numbers.
    """
    how = Sampling(**how)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]  # (B, L)
    length, device = ids.shape[1], ids.device
    rows = torch.arange(len(ids), device=device).repeat_interleave(group)  # (N,) -> prompt
    cache = prefill(model, prompt)
    if how.static:
        cache = static_cache(model, cache, rows, how.static, length + max_new_tokens)
    else:
        cache.reorder_cache(rows)
    model.model.rope_deltas = model.model.rope_deltas[rows]

    log_probs = torch.full((len(rows), max_new_tokens), torch.nan, device=device)
    uniforms = draw_uniforms(how.seeds, len(ids), group, max_new_tokens).to(device)
    tokenizer, stops = processor.tokenizer, model.generation_config.eos_token_id
    output = model.generate(
        input_ids=ids[rows],
        attention_mask=mask[rows],
        past_key_values=cache,
        logits_processor=LogitsProcessorList([InverseCDF(uniforms, length, how, log_probs)]),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=tokenizer.pad_token_id,
            compile_config=COMPILE if how.static else None,
            suppress_tokens=tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)),
        ),
    )
    model.model.rope_deltas = None

    response = output[:, length:]  # (N, T)
    is_stop = torch.isin(response, torch.tensor(stops, device=device))
    before = is_stop.long().cumsum(1) - is_stop.long()  # stop tokens strictly before
    mask = before == 0
    log_probs = log_probs[:, : response.shape[1]].where(mask, torch.nan)
    if not log_probs[mask].isfinite().all():
        raise FloatingPointError(
            "The model's logits are no numbers. Look at its weights, and at the attention kernels "
            "in use."
        )
    return Rollout(response, mask, is_stop.any(1), log_probs)


def prefill(model, prompt: Prompt) -> DynamicCache:
    """The states of all layers after the first L - 1 tokens of B prompts."""
    model.model.rope_deltas = None  # mutable state of an earlier call
    cache = DynamicCache(config=model.config.get_text_config())
    before_last = ("input_ids", "attention_mask", "mm_token_type_ids")
    model.model(
        **{key: prompt[key][:, :-1] for key in before_last},
        pixel_values=prompt["pixel_values"],
        image_grid_thw=prompt["image_grid_thw"],
        past_key_values=cache,
        use_cache=True,
    )
    return cache


def draw_uniforms(seeds: list[int] | None, prompts: int, group: int, tokens: int) -> Tensor:
    """(N, tokens) float32 in [0, 1), those of a prompt from a generator of its own."""
    seeds = torch.randint(2**62, (prompts,)).tolist() if seeds is None else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.rand(group, tokens, generator=each) for each in generators])


class InverseCDF(LogitsProcessor):
    """Leaves only the sampled token finite, so that greedy decoding picks it.

    uniforms: (N, max_new_tokens) in [0, 1), float32 values (24 bits, so u < 1 strictly in
    float64). log_probs: the same shape, filled with those of what is sampled.
    """

    def __init__(self, uniforms: Tensor, prompt_tokens: int, how: Sampling, log_probs: Tensor):
        self.uniforms, self.log_probs = uniforms, log_probs
        self.prompt_tokens, self.how = prompt_tokens, how

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:  # (N, L + t), (N, V)
        if self.how.bar is not None:
            self.how.bar.update()
        t = ids.shape[1] - self.prompt_tokens
        p = (logits.float() / (self.how.temperature or 1.0)).softmax(-1)
        token = p.argmax(-1, keepdim=True)  # (N, 1)
        if self.how.temperature > 0:
            cdf = p.cumsum(-1, dtype=torch.float64)
            u = self.uniforms[:, t].double() * cdf[:, -1]
            token = torch.searchsorted(cdf, u[:, None], right=True)  # p > 0
            token.clamp_(max=logits.shape[1] - 1)  # NaN gives V: said at the end
        self.log_probs[:, t] = p.gather(1, token).log().squeeze(1)
        return torch.full_like(logits, -torch.inf).scatter_(1, token, 0.0)


def static_cache(model, cache: DynamicCache, rows: Tensor, tokens: int, needed: int) -> StaticCache:
    """The states of B prompts, `cache`, copied to N rows (N,) of a cache for `tokens` tokens a row.
    Its memory is kept for the next call of the same shape: a CUDA graph reads and writes where it
    did when it was captured."""
    if tokens < needed:
        raise ValueError(
            f"The static cache holds {tokens} tokens a row, prompt and response need {needed}. "
            "Make it larger."
        )
    kept, size = CACHES.setdefault(model, {}), (len(rows), tokens)
    if size not in kept:
        kept[size] = StaticCache(config=model.config.get_text_config(), max_cache_len=tokens)
    static = kept[size]
    static.reset()
    for layer, prefilled in zip(static.layers, cache.layers, strict=True):
        if hasattr(prefilled, "keys"):  # full attention
            layer.update(prefilled.keys[rows], prefilled.values[rows])
        else:
            layer.update_conv_state(prefilled.conv_states[0][rows])
            layer.update_recurrent_state(prefilled.recurrent_states[0][rows])
    return static


# -------------------------------------------------------------------------- answers to look at


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
    lengths, cut_off = rollout.mask.sum(1).tolist(), (~rollout.ended).tolist()
    return list(map(Reply, texts, lengths, cut_off))
