"""train.py --plan: its formula of memory against tensors counted while the phases of a step run."""

import copy
import re
import weakref

import pytest
import torch
from conftest import noise, tiny_qwen3_vl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as M
import plan
import sharding
import toy.scenes as toy_scenes
import toy.tiny as tiny_model
import train
from rollout import CACHES


class Counted(TorchDispatchMode):
    """Bytes of the tensors made inside, all at once at most (`peak`); what a single kernel needs for itself is not seen."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.sizes.setdefault(tensor.untyped_storage()._cdata, 0)  # was there before
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage())._cdata not in self.sizes
            ):
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return out

    def freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def phases(build, flags: list[str], side: int, compile: bool) -> tuple[dict, dict]:
    """(bytes counted, bytes by the formula) of a step on one rank: images of `side` px for the student, half of it for the teacher."""
    args = train.parse(["--steps", "9", "--device", "cpu", "--top-k", "16", *flags])
    args.compile = compile  # refused on a CPU, where only its cache is used
    student, processor = build()
    student.generation_config.eos_token_id = [
        processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    ]  # no response ends early
    teacher = copy.deepcopy(student).requires_grad_(False)
    flat, teacher_flat = sharding.Flat(student, 0, 1), sharding.Flat(teacher, 0, 1)
    teacher_flat.allocate(not args.offload_teacher)
    state = sharding.State(flat, args)
    flat.track_gradients(state.master.grad)
    stays = [
        flat.weights,
        flat.grads,
        teacher_flat.weights,
        *state.tensors().values(),
        state.master.grad,
    ]
    counted = {"stays": sum(tensor.untyped_storage().nbytes() for tensor in stays)}
    rows = [{"id": str(i)} for i in range(args.prompts)]

    def prompts(side: int) -> list:
        return [
            M.encode(
                processor,
                [noise(side, side, i) for i in range(args.micro_prompts)],
                ["what is in it ?"] * args.micro_prompts,
            )
            for _ in range(args.prompts // args.micro_prompts)
        ]

    micros = [
        train.Micro(list(range(args.micro_prompts)), full, seen)
        for full, seen in zip(prompts(side), prompts(side // 2))
    ]
    with Counted() as count:
        train.respond(args, 1, micros, student, processor, rows, quiet=True)
    counted["sampling"] = count.peak
    kept = [
        tensor
        for cache in CACHES.pop(student, {}).values()
        for layer in cache.layers
        for tensor in (
            [layer.keys, layer.values]
            if hasattr(layer, "keys")
            else [layer.conv_states[0], layer.recurrent_states[0]]
        )
    ]
    with Counted() as count:
        train.teach(args, micros, student, teacher, teacher_flat, state)
    counted["teacher"] = count.peak + (teacher_flat.weights.nbytes if args.offload_teacher else 0)
    targets = sum(hidden.nbytes for micro in micros for hidden, _, _ in micro.target)
    targets += student.lm_head.weight.nbytes * args.offload_teacher  # a copy of the teacher's
    with Counted() as count:
        micro, mask = micros[0], micros[0].rollout.mask
        hidden = M.response_hidden(
            student, micro.full, micro.rollout, checkpoint=args.checkpointing
        )[mask]
        train.token_loss(
            args, hidden, student.lm_head.weight, micro, torch.full((int(mask.sum()),), 1.0)
        )[0].backward()
    counted["student"] = count.peak + targets
    pixels = sum(
        view["pixel_values"].nbytes for micro in micros for view in (micro.full, micro.seen)
    )
    stays = pixels + sum(tensor.nbytes for tensor in kept)
    counted |= {
        phase: counted[phase] + more
        for phase, more in (("sampling", pixels), ("teacher", stays), ("student", stays))
    }
    lengths = [micros[0].full["input_ids"].shape[1], micros[0].seen["input_ids"].shape[1]]
    return counted, plan.memory(
        args, student.config, sum(p.numel() for p in student.parameters()), 1, *lengths
    )


@pytest.mark.parametrize("build", [tiny_model.tiny, tiny_qwen3_vl])
@pytest.mark.parametrize(
    "flags, side, compile",
    [
        (["--prompts", "2", "--group", "4", "--max-new-tokens", "40"], 192, False),
        (
            ["--prompts", "2", "--group", "8", "--max-new-tokens", "130", "--offload-teacher"],
            96,
            False,
        ),
        (
            [
                "--prompts",
                "3",
                "--gen-prompts",
                "2",
                "--group",
                "8",
                "--max-new-tokens",
                "60",
                "--max-prompt",
                "200",
            ],
            96,
            True,
        ),
        (
            [
                "--prompts",
                "4",
                "--micro-prompts",
                "4",
                "--gen-prompts",
                "1",
                "--group",
                "4",
                "--max-new-tokens",
                "60",
            ],
            96,
            False,
        ),
        (
            [
                "--prompts",
                "8",
                "--group",
                "8",
                "--max-new-tokens",
                "60",
                "--teacher",
                "trust-region",
            ],
            96,
            False,
        ),
        (
            [
                "--prompts",
                "4",
                "--micro-prompts",
                "2",
                "--group",
                "2",
                "--max-new-tokens",
                "64",
                "--no-checkpointing",
            ],
            128,
            False,
        ),
    ],
)
def test_memory_is_about_what_the_formula_says(build, flags, side, compile, dense_mask):
    counted, planned = phases(build, flags, side, compile)
    assert counted["stays"] == pytest.approx(planned["stays"], rel=0.01)  # parameters are aligned
    for phase in ("sampling", "teacher", "student"):
        assert 0.85 * counted[phase] <= planned[phase] <= 1.6 * counted[phase], (
            phase,
            counted,
            planned,
        )


def test_the_time_of_a_step_is_that_of_its_matmuls_and_of_reading_weights_and_cache():
    """16 prompts on two ranks, 4 decoded at once: 2 calls of 100 tokens, each at least 35 ms."""
    args = train.parse(
        [
            "--device",
            "cpu",
            "--prompts",
            "16",
            "--group",
            "2",
            "--gen-prompts",
            "4",
            "--max-new-tokens",
            "100",
        ]
    )
    spent = plan.seconds(args, tiny_model.tiny()[0].config, 10**9, 2, 1000, 400)
    flops = lambda tokens: 2 * 10**9 * 8 * tokens / 400e12  # a forward of 8 prompts
    assert spent["student"] == pytest.approx(4 * flops(1000 + 2 * 25)) and spent[
        "teacher"
    ] == pytest.approx(flops(400 + 2 * 25))
    assert spent["sampling"] == pytest.approx(flops(1000) + 2 * 100 * 0.035, rel=1e-3)
    args.compile = True
    cache = (
        8 * (8192 + 100) * 2 * 1 * 2 * 32 * 2
    )  # rows, slots; keys and values, layers, heads, width, bf16
    assert plan.seconds(args, tiny_model.tiny()[0].config, 10**9, 2, 1000, 400)[
        "sampling"
    ] == pytest.approx(flops(1000) + 2 * 100 * (2 * 10**9 + cache) / 2e12)


def test_a_plan_is_printed_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    """For a GPU that is not here, for as many ranks as asked for; its lengths are those of the prompts that training sees."""
    toy_scenes.draw(tmp_path / "data", 12, 0)
    model, processor = tiny_model.tiny()
    M.save(model, processor, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    flags = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "data"),
        "--prompts",
        "4",
        "--group",
        "2",
        "--out",
        str(tmp_path / "x"),
    ]
    train.main([*flags, "--device", "cuda", "--plan", "4"])
    told = capsys.readouterr().out
    args = train.parse([*flags, "--device", "cpu"])
    rows = train.triplets.read_triplets(tmp_path / "data")
    micros = train.Micros(rows, [[i] for i in range(12)], processor, args, torch.float32)
    for name, view in (("student", 1), ("teacher", 2)):
        lengths = [micros[i][view]["input_ids"].shape[1] for i in range(12)]
        assert (
            f"{name}'s prompts: {sum(lengths) // 12:,} tokens on average, {max(lengths):,} the longest\n"
            in told
        )
    assert (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M weights" in told
        and "12 triplets" in told
    )
    assert (
        "3 steps of 4 prompts x 2 responses on 4 rank(s)" in told
        and "hours in all" in told
        and "memory of a rank" in told
    )
    assert not (tmp_path / "x").exists()
    train.main([*flags, "--device", "cpu", "--plan", "--max-prompt", "24"])
    assert (
        "24 tokens on average, 24 the longest; 12 images will be scaled down"
        in (told := capsys.readouterr().out)
        and "on 1 rank(s)" in told
        and "hours" not in told
    )
    train.main([*flags, "--device", "cuda", "--plan", "--method", "grpo"])  # there is no teacher
    assert (
        "teacher's prompts" not in (told := capsys.readouterr().out)
        and "teacher 0.0" in told
        and "teacher 0 s" in told
    )
    for wrong in (["--plan", "--toy"], ["--plan", "0"]):
        with pytest.raises(SystemExit):
            train.main([*flags, *wrong])
        assert "--plan needs data and a model that are there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*flags, "--plan", "3"])
    assert "--prompts 4 cannot be shared evenly by 3 ranks" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun has it
    train.main([*flags, "--plan"])
    assert "on 2 rank(s)" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    train.main([*flags, "--plan"])
    assert not capsys.readouterr().out
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit):
        train.main([*flags, "--plan", "--model", str(tmp_path / "data")])
    assert "is no checkpoint: it has no config.json" in capsys.readouterr().err
    rows[3].crop.write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        train.main([*flags, "--plan"])
    assert re.search(
        f"sample {rows[3]['id']}: .* cannot be read as a picture.*Fetch or save the file again",
        capsys.readouterr().err,
    )
