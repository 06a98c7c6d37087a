"""What a run of train.py would take, before anything is loaded: steps, prompt lengths, memory by
phase, a rough time.

    python train.py --plan 8 --device cuda --data DIR --model DIR      # flags as for the run
"""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from methods import METHODS, View
from model import ImageTextProcessor, chat, find, prompt_tokens
from storage.images import image_size
from triplets.format import Triplet


@dataclass
class Outline:
    """What memory and time depend on, of a model that need not be loaded; weights are counted."""

    text: object  # configuration of the language model
    vision: object  # and of the vision tower
    weights: int
    active: int  # those that a token passes through: fewer in a mixture of experts
    layer: int  # in the largest decoder layer or vision block: gathered together
    root: int  # outside of these: embedding, head


def outline(model) -> Outline:
    config = model.config
    text = config.get_text_config()
    groups = [*model.model.language_model.layers, *model.model.visual.blocks]
    sizes = [sum(weight.numel() for weight in group.parameters()) for group in groups]
    weights = sum(weight.numel() for weight in model.parameters())
    experts = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
    asleep = 0
    if experts:
        asleep = int(experts * (1 - text.num_experts_per_tok / text.num_experts))
    vision = config.vision_config
    return Outline(text, vision, weights, weights - asleep, max(sizes), weights - sum(sizes))


def read_outline(path: str) -> tuple[Outline, ImageTextProcessor]:
    """The outline and the processor of a checkpoint directory or hub id, without its weights.

    Raises FileNotFoundError / ValueError where `path` has no configuration that model.load takes.
    """
    folder = find(path, ["*.json", "*.jinja", "*.txt"])
    try:
        config = AutoConfig.from_pretrained(folder)
        processor = ImageTextProcessor.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        if not hasattr(model.model, "get_rope_index"):
            raise ValueError(f"it is a {type(model).__name__}")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} has no configuration of a Qwen3.5 / Qwen3-VL style model: {error}"
        ) from error
    return outline(model), processor


# ------------------------------------------------------------------------------------------ memory


class Memory:
    """Bytes on a GPU (on a CPU, of a process's tensors), at most, for prompts of `full` (student)
    and `seen` (teacher) tokens and responses of --max-new-tokens.

    Activations are those of transformers' own kernels, by factors fitted to tensors counted in
    small runs; with fla installed they take less. tests/test_plan.py counts again.
    """

    def __init__(self, settings, model: Outline, ranks: int, full: int, seen: int):
        self.settings, self.model, self.ranks = settings, model, ranks
        self.full, self.seen = full, seen
        self.number = 2 if settings.device == "cuda" else 4  # bytes of one
        self.response = settings.max_new_tokens
        self.prompts = settings.prompts // ranks  # a rank's
        self.rows = settings.micro_prompts * settings.group  # of a micro-batch
        self.method = METHODS[settings.method]

    def phases(self) -> dict[str, float]:
        """`stays`, and what each phase of a step adds to it, one at a time."""
        teacher = self.teaching() if self.method.distils else 0
        return {
            "stays": self.stays(),
            "sampling": self.sampling(),
            "teacher": teacher,
            "student": self.student(),
        }

    def stays(self) -> float:
        """Slices in fp32: weights, AdamW's two moments, EMA; compiled, the plain copy as well."""
        return 16 * self.model.weights / self.ranks + self.copy() * self.settings.compile

    def sampling(self) -> float:
        """The plain copy, its caches, and the pass over the prompts that fills them."""
        settings, state, token = self.settings, self.state_of_row(), self.cache_of_token()
        decoded = decoded_at_once(settings, self.ranks)
        rows = decoded * settings.group
        asked, _ = answered_prompt(settings, self.full, self.seen)
        layers = max(1, len(attention_layers(self.model.text)))
        logits = 32 * self.model.text.vocab_size  # with their cumulative sums in float64
        cache = rows * ((asked + self.response) * token * (1 + 1 / layers) + 2 * state + logits)
        if settings.compile:  # the cache stays, see batch(); a layer of the prompts' is copied
            cache = decoded * (asked * token + state)
            cache += rows * (asked * token / layers + 2 * state + logits)
        prefill = decoded * (asked * token + state)
        prefill += max(self.block(decoded, asked), self.layer(decoded, asked, 0)) / 2
        pixels = decoded * asked * self.pixels_of_token()
        return self.new_copy() + self.batch() + pixels + max(cache, prefill)

    def teaching(self) -> float:
        activations = self.layer(self.settings.micro_prompts, self.seen, self.rows) / 2
        return self.new_copy() + self.batch() + self.targets() + activations

    def student(self) -> float:
        """Gradients, what is gathered of the weights, activations, the loss."""
        settings, text, vision = self.settings, self.model.text, self.model.vision
        micro, number = settings.micro_prompts, self.number
        layer = self.layer(micro, self.full, self.rows)
        block = self.block(micro, self.full)
        if settings.checkpointing:
            tokens = micro * self.full + self.rows * self.response
            inputs = text.num_hidden_layers * tokens * text.hidden_size
            inputs += vision.depth * micro * self.full * 4 * vision.hidden_size
            activations = inputs * number + max(layer, block)
        else:
            activations = text.num_hidden_layers * layer + vision.depth * block
        # A layer's weights, those of the next, and the gradients on their way to the ranks in fp32.
        gathered = (self.model.root + 2 * self.model.layer) * number
        reduced = self.model.layer * (number + 4)
        chunk = min(settings.chunk, self.rows * self.response) * text.vocab_size
        loss = text.vocab_size * text.hidden_size * 4 + chunk * (2 * number + 4)
        # The root's gradients are the last: then there are no activations any more.
        working = max(activations + reduced + loss, self.model.root * (number + 4))
        gradients = 4 * self.model.weights / self.ranks
        return gradients + gathered + working + self.batch() + self.targets()

    # What phases share

    def copy(self) -> float:
        return self.number * self.model.weights

    def new_copy(self) -> float:
        return 0 if self.settings.compile else self.copy()

    def batch(self) -> float:
        """The encoded images of a step, and the static caches where decoding is compiled."""
        settings = self.settings
        batches = 1 + (settings.resample if settings.method == "dapo" else 0)
        held = batches * self.prompts * (self.full + self.seen) * self.pixels_of_token()
        if settings.compile:
            decoded = decoded_at_once(settings, self.ranks)
            rows = (decoded + self.prompts % decoded) * settings.group  # a last, smaller one
            _, longest = answered_prompt(settings, self.full, self.seen)
            slots = longest + self.response
            held += rows * (slots * self.cache_of_token() + self.state_of_row())
        return held

    def targets(self) -> float:
        """The teacher's hidden states and head; a trust-region teacher has two of each."""
        if not self.method.distils:
            return 0
        sides = 2 if self.settings.teacher == "trust-region" else 1
        text = self.model.text
        tokens = self.prompts * self.settings.group * self.response
        return sides * (tokens + text.vocab_size) * text.hidden_size * self.number

    def layer(self, prompts: int, tokens: int, rows: int) -> float:
        """Of one decoder layer on prompts of `tokens` tokens and their `rows` continuations, the
        widest kind."""
        text, number = self.model.text, self.number
        heads, key_dim, value_dim, _ = linear_attention(text)
        blocks = prompts * math.ceil(tokens / 64) + rows * math.ceil(self.response / 64)
        delta = blocks * 64 * 2 * heads * (key_dim + value_dim) * (24 + 3 * number)
        all_heads = text.num_attention_heads + text.num_key_value_heads
        repeated = 4 * rows * (tokens + self.response) * head_dim(text) * all_heads * number
        width = 8 * text.hidden_size + 3 * intermediate_size(text)
        return (prompts * tokens + rows * self.response) * width * number + max(delta, repeated)

    def block(self, prompts: int, tokens: int) -> float:
        """Of one block of the vision tower, which has 4 patches an image token."""
        vision = self.model.vision
        width = 8 * vision.hidden_size + 3 * vision.intermediate_size
        return 4 * prompts * tokens * width * self.number

    def cache_of_token(self) -> float:
        return key_values(self.model.text, self.number)

    def state_of_row(self) -> float:
        """Of the linear-attention layers: recurrent states in fp32, convolution states."""
        text = self.model.text
        heads, key_dim, value_dim, kernel = linear_attention(text)
        layers = text.num_hidden_layers - len(attention_layers(text))
        recurrent = key_dim * value_dim * 4
        convolution = (2 * key_dim + value_dim) * kernel * self.number
        return layers * heads * (recurrent + convolution)

    def pixels_of_token(self) -> float:
        """4 patches of two frames of 3 colours."""
        return 4 * 6 * self.model.vision.patch_size**2 * self.number


def attention_layers(text) -> list[int]:
    """The layers of full attention."""
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind != "linear_attention"]


def linear_attention(text) -> tuple[int, int, int, int]:
    """(heads, key width, value width, convolution kernel); zeros where there is none."""
    if len(attention_layers(text)) == text.num_hidden_layers:
        return 0, 0, 0, 0
    widths = (text.linear_key_head_dim, text.linear_value_head_dim, text.linear_conv_kernel_dim)
    return text.linear_num_value_heads, *widths


def head_dim(text) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def intermediate_size(text) -> int:
    """Of a dense layer, or of the experts that a token passes through."""
    if not getattr(text, "num_experts_per_tok", None):
        return text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return text.num_experts_per_tok * text.moe_intermediate_size + shared


def key_values(text, number: int) -> int:
    """Bytes that a token takes in the KV cache of all layers; number: bytes of one."""
    layers = len(attention_layers(text))
    return 2 * layers * text.num_key_value_heads * head_dim(text) * number


def decoded_at_once(settings, ranks: int) -> int:
    """Prompts that a rank decodes at once: whole micro-batches."""
    micros = max(1, settings.gen_prompts // settings.micro_prompts)
    return min(settings.prompts // ranks, micros * settings.micro_prompts)


def answered_prompt(settings, full: int, seen: int) -> tuple[int, int]:
    """(tokens, most tokens) of the prompts that are answered: the student's, or sft's teacher's."""
    if settings.method == "sft":
        return seen, settings.max_crop_prompt
    return full, settings.max_prompt


# -------------------------------------------------------------------------------------------- time


def seconds(settings, model: Outline, ranks: int, full: int, seen: int) -> dict[str, float]:
    """A rough estimate of a step on H100s, by phase, for prompts of `full` and `seen` tokens.

    Assumed, not measured: 400 TFLOP/s in passes, 2 TB/s when decoding, 35 ms a decoded token
    without --compile, mean responses a quarter of the longest; dapo's further batches are left out.
    """
    longest, mine = settings.max_new_tokens, settings.prompts // ranks
    decoded = decoded_at_once(settings, ranks)
    asked, limit = answered_prompt(settings, full, seen)
    slots = limit + longest if settings.compile else asked + longest / 2
    read = 2 * model.active + decoded * settings.group * slots * key_values(model.text, 2)
    token = max(0.0 if settings.compile else 0.035, read / 2e12)
    forward = 2 * model.active * mine / 400e12  # of a token of every prompt
    responses = settings.group * longest / 4
    teacher = forward * (seen + responses) if METHODS[settings.method].distils else 0
    return {
        "sampling": forward * asked + math.ceil(mine / decoded) * longest * token,
        "teacher": teacher,
        "student": 4 * forward * (full + responses),  # forward twice, backward
    }


# -------------------------------------------------------------------------------------------- plan


@dataclass
class Lengths:
    """Tokens of the prompts that a view makes of all rows."""

    mean: int = 0
    longest: int = 0
    shrunk: int = 0  # prompts whose image must be scaled down


def prompt_lengths(rows: list[Triplet], view: View, most: int, processor) -> Lengths:
    """Raises ValueError for an image that is none."""
    lengths = []
    for row in tqdm(rows, desc=f"prompts of the {view.image}", leave=False):
        try:
            size = image_size(getattr(row, view.image))
        except ValueError as error:
            raise ValueError(f"sample {row.id}: {error}") from error
        text = chat(processor, row.question + view.hint.format(answer=row.answer))
        lengths.append(prompt_tokens(processor, size, text))
    shrunk = sum(length > most for length in lengths)
    lengths = [min(length, most) for length in lengths]
    return Lengths(sum(lengths) // len(lengths), max(lengths), shrunk)


def describe_run(settings, rows: list[Triplet], views: list[tuple[View, int]]) -> str:
    """What a run on settings.plan ranks would do and take; rows and views as train.py has them.

    Raises FileNotFoundError / ValueError for images and models that are none.
    """
    model, processor = read_outline(settings.model)
    ranks = settings.plan
    steps = settings.steps or len(rows) // settings.prompts
    lengths = [prompt_lengths(rows, view, most, processor) for view, most in views]
    told = [
        f"{settings.model}: {model.weights / 1e6:,.1f}M weights; {settings.data}: "
        f"{len(rows):,} triplets",
        f"{steps} steps of {settings.prompts} prompts x {settings.group} responses on {ranks} "
        "rank(s)",
    ]
    for name, each in zip(("student", "teacher"), lengths, strict=False):
        words = f"{each.mean:,} tokens on average, {each.longest:,} the longest"
        if each.shrunk:
            words += f"; {each.shrunk} images will be scaled down"
        told.append(f"{name}'s prompts: {words}")
    full, seen = lengths if len(lengths) > 1 else (lengths[0], Lengths())
    parts = Memory(settings, model, ranks, full.longest, seen.longest).phases()
    stays = parts.pop("stays")
    told.append(
        f"memory of a rank, at most: {(stays + max(parts.values())) / 1e9:.1f} GB = "
        f"{stays / 1e9:.1f} for slices of weights, optimizer and EMA + the largest of "
        + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    )
    if settings.device == "cuda":
        spent = seconds(settings, model, ranks, full.mean, seen.mean)
        told.append(
            "time, a rough estimate (see plan.seconds): "
            + ", ".join(f"{name} {each:.0f} s" for name, each in spent.items())
            + f" a step; {sum(spent.values()) * steps / 3600:.1f} hours in all"
        )
    return "\n".join(told)
