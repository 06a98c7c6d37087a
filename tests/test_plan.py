"""train.py --plan: its formula of memory against bytes counted while the phases of a step run."""

import os
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch
import transformers
from conftest import ROOT, log, noise, small_run, tiny_qwen3_vl
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import methods
import plan
import train
from model import encode, prepare
from sharding import Shards, join_ranks
from storage.checkpoint import save
from toy.tiny import tiny
from triplets.format import Triplet, read_triplets

# ----------------------------------------------------------------------------- memory, counted


class Counted(TorchDispatchMode):
    """The most bytes alive at once (`peak`) of what ops inside have touched, but for `stays`.

    FSDP and the plain copy resize what they hold: so all storages are measured again whenever an
    op makes a new one. What a single kernel needs for itself is not seen.
    """

    def __init__(self, stays: list):
        super().__init__()
        self.stays = {tensor.untyped_storage()._cdata for tensor in stays}
        self.alive = {}  # storages by their address
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.watch((args, kwargs))
        out = func(*args, **(kwargs or {}))
        if self.watch(out):
            sizes = [storage().nbytes() for storage in self.alive.copy().values()]
            self.peak = max(self.peak, sum(sizes))
        return out

    def watch(self, tree) -> bool:
        """Whether there was a storage among its tensors that was not known."""
        before = len(self.alive)
        for tensor in tree_leaves(tree):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive and key not in self.stays:
                    self.alive[key] = weakref.ref(storage, partial(self.forget, key))
        return len(self.alive) > before

    def forget(self, key: int, storage) -> None:
        del self.alive[key]


def begin(build, flags: str, compiled: bool) -> train.Run:
    settings = train.parse(f"--steps 9 --device cpu --plan 1 --top-k 16 {flags}".split())
    settings.compile = compiled  # refused on a CPU, where only its cache is used
    ranks = join_ranks("cpu")
    model, processor = build()
    never = processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    model.generation_config.eos_token_id = [never]  # no response ends early
    shards = Shards(model, lr=1e-3, eps=1e-8, weight_decay=0.0, copy_stays=compiled)
    method = methods.METHODS[settings.method](settings)
    return train.Run(settings, method, [], processor, shards, *ranks)


def noisy_micros(run, side: int) -> list[methods.Micro]:
    """Images of `side` px for the student, of half of it for the teacher."""
    size = run.settings.micro_prompts
    asked = "what is in it ?"
    rows = [Triplet("0", asked, Path(), Path())] * size

    def prompt(px):
        return encode(run.processor, [noise(px, px)] * size, [asked] * size)

    return [
        methods.Micro(rows, {"student": prompt(side), "teacher": prompt(side // 2)})
        for _ in range(0, run.settings.prompts, size)
    ]


def phases(build, flags: str, side: int, compiled: bool) -> tuple[dict, dict]:
    """(bytes counted, bytes by the formula) of a step on one rank."""
    run = begin(build, flags, compiled)
    shards = run.shards
    micros = noisy_micros(run, side)
    stays = [slices.to_local() for slices in shards.tensors().values()]
    if compiled:
        stays += shards.plain.parameters()
    counted = {"stays": sum(tensor.nbytes for tensor in stays)}
    with Counted(stays) as count:
        count.watch([vars(micro) for micro in micros])
        run.method.respond(run, micros, 0)
        counted["sampling"] = count.peak
        count.peak = 0
        train.teach(run, micros)
        counted["teacher"] = count.peak
        count.peak = 0
        for micro in micros[:2]:
            weights = torch.ones(micro.rollout.mask.shape)
            loss, *_ = shards.student_pass(partial(train.student_loss, run, micro, weights))
            loss.backward()
        counted["student"] = count.peak
    lengths = [prompt["input_ids"].shape[1] for prompt in micros[0].prompts.values()]
    outline = plan.Outline(shards.plain)
    return counted, plan.Memory(run.settings, outline, *lengths).phases()


@pytest.mark.parametrize("build", [tiny, tiny_qwen3_vl])
@pytest.mark.parametrize(
    "flags, side, compiled",
    [
        ("--prompts 2 --group 4 --max-new-tokens 20", 192, False),
        ("--prompts 2 --group 4 --max-new-tokens 70", 96, False),
        ("--prompts 3 --gen-prompts 2 --group 8 --max-new-tokens 30 --max-prompt 200", 96, True),
        ("--prompts 4 --micro-prompts 4 --gen-prompts 1 --group 4 --max-new-tokens 40", 96, False),
        ("--prompts 4 --group 8 --max-new-tokens 20 --teacher trust-region", 96, False),
        (
            "--prompts 4 --micro-prompts 2 --group 2 --max-new-tokens 20 --no-checkpointing",
            128,
            False,
        ),
    ],
)
def test_memory_is_about_what_the_formula_says(build, flags, side, compiled, dense_mask):
    counted, planned = phases(build, flags, side, compiled)
    assert counted.pop("stays") == pytest.approx(planned["stays"])
    for phase, most in counted.items():
        assert 0.85 * most <= planned[phase] <= 1.6 * most, phase


# ------------------------------------------------------------------------ models of every family


@pytest.mark.parametrize(
    "size, weights, most",
    [("4b", 4.5e9, {8: 40e9, 2: 75e9}), ("9b", 9.4e9, {8: 60e9})],
)
def test_the_papers_models_fit_on_gpus_of_80_gb(size, weights, most):
    """Prompts of 4,000 tokens, crops of 2,000; at most so many bytes on so many ranks."""
    config = transformers.Qwen3_5Config(**bench.SHAPES["sizes"][size])
    with torch.device("meta"):
        model = plan.Outline(transformers.Qwen3_5ForConditionalGeneration(config))
    assert model.weights == pytest.approx(weights, rel=0.02)
    for ranks, limit in most.items():
        settings = train.parse(["--device", "cuda", "--plan", str(ranks)])
        parts = plan.Memory(settings, model, 4000, 2000).phases()
        stays = parts.pop("stays")
        assert stays == 16 * model.weights / ranks
        assert stays + max(parts.values()) <= limit


def relative(family: str, build, text: dict, vision: dict) -> tuple:
    """A tiny model of another family, in the shapes of one of the tiny ones, and its processor."""
    donor, processor = build()
    config = donor.config.to_dict()
    config["text_config"] |= text
    config["vision_config"] |= vision
    for part in (config, config["text_config"], config["vision_config"]):
        del part["model_type"]
    kind = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForConditionalGeneration")(kind(**config))
    return prepare(model, processor), processor


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "family, build, text, vision, mlp",
    [
        ("Qwen3_5Moe", tiny, EXPERTS | {"shared_expert_intermediate_size": 48}, {}, 2 * 32 + 48),
        ("Qwen3VLMoe", tiny_qwen3_vl, EXPERTS, {}, 2 * 32),
        (
            "Qwen2_5_VL",
            tiny_qwen3_vl,
            {"intermediate_size": 96},
            {"window_size": 64, "fullatt_block_indexes": [1]},
            96,
        ),
    ],
)
def test_other_families_are_planned_and_trained(
    family, build, text, vision, mlp, world, tmp_path, capsys
):
    """Memory is that of all experts, time that of those that a token passes through."""
    model, processor = relative(family, build, text, vision)
    save(model, processor, tmp_path / "base")
    outline, _ = plan.read_outline(str(tmp_path / "base"))
    assert outline.weights == sum(weight.numel() for weight in model.parameters())
    hidden, layers = outline.text.hidden_size, outline.text.num_hidden_layers
    # 2 of 4 experts, of 3 matrices
    asleep = 2 * 3 * hidden * 32 * layers if "num_experts" in text else 0
    assert outline.active == outline.weights - asleep
    assert outline.mlp == mlp
    flags = small_run(world, tmp_path / "run", "--steps 2", f"--model {tmp_path / 'base'}")
    train.main([*flags, "--plan"])
    assert "memory of a rank" in capsys.readouterr().out
    train.train(train.parse(flags), *join_ranks("cpu"))
    assert log(tmp_path / "run")[1]["loss"] > 0


# --------------------------------------------------------------------------------- time, and text


def test_the_time_of_a_step_is_that_of_its_matmuls_and_of_reading_weights_and_cache():
    """16 prompts on two ranks, 4 decoded at once: 2 calls of 100 tokens, each at least 35 ms."""
    flags = "--device cuda --plan 2 --prompts 16 --group 2 --gen-prompts 4 --max-new-tokens 100"
    settings = train.parse(flags.split())
    model = plan.Outline(tiny()[0])
    model.active = 10**9
    step = plan.Step(settings, model, 1000, 400)
    spent = plan.seconds(step)

    def forward(tokens):
        return 2 * 10**9 * 8 * tokens / 400e12  # of 8 prompts

    assert spent["student"] == pytest.approx(4 * forward(1000 + 2 * 25))
    assert spent["teacher"] == pytest.approx(forward(400 + 2 * 25))
    assert spent["sampling"] == pytest.approx(forward(1000) + 2 * 100 * 0.035, rel=1e-3)
    settings.compile = True
    slots = 8 * (8192 + 100)  # of 8 rows
    read = 2 * 10**9 + slots * 2 * 1 * 2 * 32 * 2  # keys and values, layers, heads, width, bf16
    compiled = forward(1000) + 2 * 100 * read / 2e12
    assert plan.seconds(step)["sampling"] == pytest.approx(compiled)


def test_where_the_teacher_answers_its_prompts_are_decoded():
    """As long as the student's would be if it were asked these."""
    model = plan.Outline(tiny()[0])
    flags = "--device cuda --plan 1 --prompts 16 --max-new-tokens 100"
    sft = train.parse(f"{flags} --method sft --max-crop-prompt 5000".split())
    other = train.parse(f"{flags} --max-prompt 5000".split())
    for compiled in (False, True):
        sft.compile = other.compile = compiled
        found = plan.seconds(plan.Step(sft, model, 1000, 400))["sampling"]
        assert found == plan.seconds(plan.Step(other, model, 400, 1000))["sampling"]


@pytest.fixture
def describe(world, tmp_path, capsys):
    """describe(*flags) is what train.py prints of a plan; of a model without its weights."""
    model, processor = tiny()
    save(model, processor, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()

    def go(*flags):
        own = [f"--model {tmp_path / 'model'}", "--steps 3", *flags]
        train.main(small_run(world, tmp_path / "out", *own))
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out

    return go


@pytest.mark.parametrize(
    "method, data",
    [("vision-opd", "data"), ("vision-opd", "pairs"), ("v-zero", "pairs"), ("s2vopd", "data")],
)
def test_a_plan_is_printed_before_anything_is_loaded(method, data, describe, world, tmp_path):
    """For a GPU that is not here; its lengths are those of the prompts that training sees, also
    where a view cuts or shrinks them."""
    flags = f"--method {method} --data {world / data}"
    told = describe("--device cuda", "--plan 4", flags)
    for words in ("0.4M weights", "12 triplets", "3 steps of 4 prompts x 2 responses on 4 rank"):
        assert words in told
    assert "hours" in told
    settings = train.parse(small_run(world, tmp_path / "out", flags))
    run = SimpleNamespace(settings=settings, rows=train.read_rows(settings), processor=tiny()[1])
    run.shards = SimpleNamespace(plain=torch.zeros(1))
    encoded = [methods.EncodedMicros(run)[[i]] for i in range(12)]
    for name in encoded[0][1]:
        lengths = [prompts[name]["input_ids"].shape[1] for _, prompts in encoded]
        mean = sum(lengths) // 12
        told_name = "extra view" if name == "extra" else name
        assert f"{told_name}'s prompts: {mean} tokens on average, {max(lengths)} the" in told


@pytest.mark.parametrize(
    "flags, said, unsaid",
    [
        (
            "--plan --max-prompt 24",
            ["24 tokens on average, 24 the longest; 12 images will be scaled down", "on 1 rank"],
            "hours",
        ),
        (
            "--device cuda --plan --method grpo",
            ["teacher 0.0", "teacher 0 s"],
            "teacher's prompts",
        ),
    ],
)
def test_a_plan_says_what_is_scaled_down_and_nothing_of_what_there_is_not(
    flags, said, unsaid, describe
):
    told = describe(flags)
    for words in said:
        assert words in told
    assert unsaid not in told


def test_only_the_first_rank_prints_a_plan(describe, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not describe("--plan")


def test_a_plan_is_for_torchruns_ranks():
    asked = "import train; print(train.parse(['--plan']).plan)"
    told = subprocess.check_output(
        [sys.executable, "-c", asked], cwd=ROOT, env=os.environ | {"WORLD_SIZE": "2"}, text=True
    )
    assert told.strip() == "2"


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--plan", "--toy"], "--toy"),
        (["--plan 0"], "--plan"),
        (["--plan 3"], "--prompts 4"),
    ],
)
def test_what_cannot_be_planned_is_said(flags, named, describe, capsys):
    with pytest.raises(SystemExit):
        describe(*flags)
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_what_is_no_picture_and_no_model_is_named(describe, world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    row = read_triplets(tmp_path / "data")[3]
    row.crops[0].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"sample {row.id}"):
        describe("--plan", f"--data {tmp_path / 'data'}")
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        describe("--plan", f"--model {world / 'data'}")
