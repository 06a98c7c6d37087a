"""What a run of train.py would take, before anything is loaded: steps, prompt lengths, memory by
phase, a rough time.

    python train.py --plan 8 --device cuda --data DIR --model DIR      # flags as for the run
"""

import math

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText

from methods import METHODS, View
from model import ImageTextProcessor, chat, prompt_tokens
from storage.checkpoint import find
from triplets.format import Triplet


class Outline:
    """What memory and time depend on, of a model that need not be loaded."""

    def __init__(self, model):
        self.text = text = model.config.get_text_config()
        self.vision = vision = model.config.vision_config
        self.patches = vision.spatial_merge_size**2  # an image token
        groups = [*model.model.language_model.layers, *model.model.visual.blocks]
        sizes = [sum(weight.numel() for weight in group.parameters()) for group in groups]
        self.weights = sum(weight.numel() for weight in model.parameters())
        self.gathered = max(sizes)  # weights of the largest decoder layer or vision block
        self.root = self.weights - sum(sizes)  # weights outside of these: embedding, head
        # Weights that a token passes through, and the width of all MLPs that it passes through.
        self.active = self.weights
        self.mlp = getattr(text, "intermediate_size", 0)
        experts = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
        if experts:
            self.active -= int(experts * (1 - text.num_experts_per_tok / text.num_experts))
            self.mlp = text.num_experts_per_tok * text.moe_intermediate_size
            self.mlp += getattr(text, "shared_expert_intermediate_size", 0)
        wide = text.hidden_size // text.num_attention_heads
        self.head_dim = getattr(text, "head_dim", None) or wide
        kinds = getattr(text, "layer_types", None) or []
        self.linear_layers = kinds.count("linear_attention")
        self.full_layers = text.num_hidden_layers - self.linear_layers
        self.linear = (0, 0, 0, 0)  # heads, key width, value width, convolution kernel
        if self.linear_layers:
            self.linear = (
                text.linear_num_value_heads,
                text.linear_key_head_dim,
                text.linear_value_head_dim,
                text.linear_conv_kernel_dim,
            )


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
    return Outline(model), processor


class Step:
    """A rank's part of a step, for prompts of `full` (student) and `seen` (teacher and extra view,
    where there are any) tokens and responses of --max-new-tokens."""

    def __init__(self, settings, model: Outline, full: int, seen: int = 0):
        self.settings = settings
        self.model = model
        self.full = full
        self.seen = seen
        self.method = METHODS[settings.method]
        self.longest = settings.max_new_tokens
        self.rows = settings.micro_prompts * settings.group  # of a micro-batch
        self.prompts = settings.prompts // settings.plan
        micros = max(1, settings.gen_prompts // settings.micro_prompts)
        self.decoded = min(self.prompts, micros * settings.micro_prompts)  # prompts at once
        # Tokens of the answered prompts, and their limit: the student's, or the teacher's.
        self.asked, self.limit = full, settings.max_prompt
        if self.method.writer == "teacher":
            self.asked, self.limit = seen, settings.max_crop_prompt
        self.number = 2 if settings.device == "cuda" else 4  # bytes of one
        # Bytes that a token takes in the KV cache of all layers.
        width = model.text.num_key_value_heads * model.head_dim
        self.key_values = 2 * model.full_layers * width * self.number


# ------------------------------------------------------------------------------------------ memory


class Memory(Step):
    """Bytes on a GPU (on a CPU, of a process's tensors), at most.

    Activations are those of transformers' own kernels, by factors fitted to tensors counted in
    small runs; with fla installed they take less. tests/test_plan.py counts again.
    """

    def phases(self) -> dict[str, float]:
        """`stays`, and what each phase of a step adds to it, one at a time."""
        settings = self.settings
        weights = self.model.weights
        stays = 16 * weights / settings.plan  # fp32: weights, AdamW's two moments, EMA
        copy = self.number * weights  # the plain one
        if settings.compile:
            stays, copy = stays + copy, 0
        batch = self.batch()
        teaching = 0
        sampling = copy + batch + self.sampling() if self.method.writer else 0
        if self.method.distils:
            activations = self.layer(settings.micro_prompts, self.seen, self.rows) / 2
            teaching = copy + batch + self.targets() + activations
        return {
            "stays": stays,
            "sampling": sampling,
            "teacher": teaching,
            "student": batch + self.student(),
        }

    def sampling(self) -> float:
        """The caches, and the pass over the prompts that fills them."""
        decoded = self.decoded
        asked = self.asked
        rows = decoded * self.settings.group
        state = self.state_of_row()
        token = self.key_values
        of_layer = token / max(1, self.model.full_layers)
        prompt_cache = decoded * (asked * token + state)
        row = 2 * state + 32 * self.model.text.vocab_size  # logits, their cumulative sum in float64
        if self.settings.compile:  # the rows' cache stays, see batch(); a layer's is copied
            cache = prompt_cache + rows * (row + asked * of_layer)
        else:
            cache = rows * (row + (asked + self.longest) * (token + of_layer))
        prefill = max(self.block(decoded, asked), self.layer(decoded, asked, 0)) / 2
        return decoded * asked * self.pixels_of_token() + max(cache, prompt_cache + prefill)

    def student(self) -> float:
        """Gradients, what is gathered of the weights, activations, the loss."""
        settings, model, number = self.settings, self.model, self.number
        text = model.text
        vision = model.vision
        micro = settings.micro_prompts
        rows = self.rows
        layer = self.layer(micro, self.full, rows)
        block = self.block(micro, self.full)
        activations = text.num_hidden_layers * layer + vision.depth * block
        if settings.checkpointing:
            tokens = micro * self.full + rows * self.longest
            inputs = text.num_hidden_layers * tokens * text.hidden_size
            inputs += vision.depth * micro * self.full * model.patches * vision.hidden_size
            activations = inputs * number + max(layer, block)
        # A layer's weights, those of the next, and gradients on their way to the ranks in fp32.
        gathered = (model.root + 2 * model.gathered) * number
        reduced = model.gathered * (number + 4)
        chunk = min(settings.chunk, rows * self.longest)
        in_work = 0 if settings.device == "cuda" else 4
        loss = text.vocab_size * (text.hidden_size * 4 + chunk * (2 * number + in_work))
        # The root's gradients are the last: then there are no activations any more.
        working = max(activations + reduced + loss, model.root * (number + 4))
        return 4 * model.weights / settings.plan + gathered + working + self.targets()

    def batch(self) -> float:
        """The encoded images of a step, and the static caches where decoding is compiled."""
        settings = self.settings
        batches = 1 + (settings.resample if settings.method == "dapo" else 0)
        tokens = batches * self.prompts * (self.full + self.seen)
        held = tokens * self.pixels_of_token()
        if settings.compile:
            prompts = self.decoded + self.prompts % self.decoded  # the last are fewer
            slots = self.limit + self.longest
            row = slots * self.key_values + self.state_of_row()
            held += prompts * settings.group * row
        return held

    def targets(self) -> float:
        """Hidden states and heads: of the teacher, a trust-region one has two of each, and as many
        of an extra view."""
        if not self.method.distils:
            return 0
        text = self.model.text
        sides = 2 if self.settings.teacher == "trust-region" else 1
        sides *= 2 if self.method.extra_view else 1
        tokens = self.prompts * self.settings.group * self.longest
        return sides * (tokens + text.vocab_size) * text.hidden_size * self.number

    def layer(self, prompts: int, tokens: int, rows: int) -> float:
        """Of one decoder layer on prompts of `tokens` tokens and their `rows` continuations, the
        widest kind."""
        model, text, longest = self.model, self.model.text, self.longest
        heads, key_dim, value_dim, _ = model.linear
        blocks = prompts * math.ceil(tokens / 64) + rows * math.ceil(longest / 64)
        delta = blocks * 64 * 2 * heads * (key_dim + value_dim) * (24 + 3 * self.number)
        width = model.head_dim * (text.num_attention_heads + text.num_key_value_heads)
        repeated = 4 * rows * (tokens + longest) * width * self.number
        inner = (prompts * tokens + rows * longest) * (8 * text.hidden_size + 3 * model.mlp)
        return inner * self.number + max(delta, repeated)

    def block(self, prompts: int, tokens: int) -> float:
        """Of one block of the vision tower."""
        vision = self.model.vision
        width = 8 * vision.hidden_size + 3 * vision.intermediate_size
        return self.model.patches * prompts * tokens * width * self.number

    def state_of_row(self) -> float:
        """Of the linear-attention layers: recurrent states in fp32, convolution states."""
        heads, key_dim, value_dim, kernel = self.model.linear
        state = key_dim * value_dim * 4 + (2 * key_dim + value_dim) * kernel * self.number
        return self.model.linear_layers * heads * state

    def pixels_of_token(self) -> float:
        """Patches of two frames of 3 colours."""
        model = self.model
        return model.patches * 6 * model.vision.patch_size**2 * self.number


# -------------------------------------------------------------------------------------------- time


def seconds(step: Step) -> dict[str, float]:
    """A rough estimate of a step on H100s, by phase.

    Assumed, not measured: 400 TFLOP/s in passes, 2 TB/s when decoding, 35 ms a decoded token
    without --compile, mean responses a quarter of the longest; dapo's further batches are left out.
    """
    settings = step.settings
    active = step.model.active
    longest = step.longest
    if settings.compile:
        slots, least = step.limit + longest, 0.0
    else:
        slots, least = step.asked + longest / 2, 0.035
    read = 2 * active + step.decoded * settings.group * slots * step.key_values
    token = max(least, read / 2e12)
    forward = 2 * active * step.prompts / 400e12  # of a token of every prompt
    responses = settings.group * longest / 4
    calls = math.ceil(step.prompts / step.decoded)
    method = step.method
    views_read = method.distils + (method.extra_view is not None)
    sampling = forward * step.asked + calls * longest * token
    return {
        "sampling": sampling if method.writer else 0,
        "teacher": views_read * forward * (step.seen + responses),
        "student": 4 * forward * (step.full + responses),  # forward twice, backward
    }


# -------------------------------------------------------------------------------------------- plan


def prompt_lengths(rows: list[Triplet], view: View, processor, seed: int) -> list[int]:
    """Tokens of the prompts that a view makes of the rows, whatever the limit. Raises ValueError
    for an image that is none."""
    lengths = []
    for row in tqdm(rows, desc=f"prompts of the {view.image}", leave=False):
        try:
            sizes = view.sizes(row, seed)
        except ValueError as error:
            raise ValueError(f"sample {row.id}: {error}") from error
        text = chat(processor, view.text(row), len(sizes))
        lengths.append(prompt_tokens(processor, text, sizes))
    return lengths


def describe_run(settings, rows: list[Triplet], views: list[tuple[View, int]]) -> str:
    """What a run on settings.plan ranks would do and take; rows and views as train.py has them.

    Raises FileNotFoundError / ValueError for images and models that are none.
    """
    model, processor = read_outline(settings.model)
    steps = settings.steps or len(rows) // settings.prompts
    told = [
        f"{settings.model}: {model.weights / 1e6:,.1f}M weights; {settings.data}: "
        f"{len(rows):,} triplets",
        f"{steps} steps of {settings.prompts} prompts x {settings.group} responses on "
        f"{settings.plan} rank(s)",
    ]
    means = []
    longest = []  # of the student's prompts, and of the teacher's and the extra ones
    for name, (view, most) in zip(("student", "teacher", "extra view"), views, strict=False):
        lengths = prompt_lengths(rows, view, processor, settings.seed)
        shrunk = sum(length > most for length in lengths)
        lengths = [min(length, most) for length in lengths]
        longest.append(max(lengths))
        means.append(sum(lengths) // len(lengths))
        words = f"{means[-1]:,} tokens on average, {longest[-1]:,} the longest"
        if shrunk:
            words += f"; {shrunk} images will be scaled down"
        told.append(f"{name}'s prompts: {words}")
    # The teacher's view and the extra one take their turns.
    parts = Memory(settings, model, longest[0], max(longest[1:], default=0)).phases()
    stays = parts.pop("stays")
    told.append(
        f"memory of a rank, at most: {(stays + max(parts.values())) / 1e9:.1f} GB = "
        f"{stays / 1e9:.1f} for slices of weights, optimizer and EMA + the largest of "
        + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    )
    if settings.device == "cuda":
        spent = seconds(Step(settings, model, means[0], max(means[1:], default=0)))
        told.append(
            "time, a rough estimate (see plan.seconds): "
            + ", ".join(f"{name} {each:.0f} s" for name, each in spent.items())
            + f" a step; {sum(spent.values()) * steps / 3600:.1f} hours in all"
        )
    return "\n".join(told)
