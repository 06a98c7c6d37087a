import sys

import bench
import pytest
import torch
from conftest import noise
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import DynamicCache

import model as vision_model
import toy.tiny as tiny_model


@pytest.fixture
def tiny():
    """The toy's model, and two prompts of one length with images of different shapes."""
    model, processor = tiny_model.tiny()
    return model, vision_model.encode(
        processor, [noise(64, 48, 1), noise(48, 64, 2)], ["what is in the red box ?"] * 2
    )


def bench_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    bench.main()


def test_flops_of_a_pass_are_those_that_torch_counts_exactly(tiny, dense_mask):
    model, prompt = tiny
    (B, L), N, T = prompt["input_ids"].shape, 6, 7
    attention = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )  # not among those that torch counts
    mapping = {
        attention: lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value)
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        vision_model.response_hidden(model, prompt, torch.randint(256, (N, T)))
    counts, aten = counter.get_flop_counts(), torch.ops.aten
    patches = counts["Qwen3_5VisionModel.patch_embed.proj"][
        aten.convolution
    ]  # others: depthwise, no matmuls
    weights, between = bench.forward_flops(model, prompt, N, T)
    assert weights == counts["Global"][aten.mm] + counts["Global"][aten.addmm] + patches
    future = (
        B * torch.ones(L - 1, L - 1).triu(1).sum() + N * torch.ones(T, T).triu(1).sum()
    )  # torch counts masked pairs too
    heads = 4 * 32  # heads x head_dim, of one layer
    assert between == counts["Global"][attention] - 4 * heads * future


def test_decoding_reads_the_weights_once_and_the_cache_that_transformers_keeps(tiny):
    model, prompt = tiny
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model.model(
            **{key: value for key, value in prompt.items() if key != "shrunk"},
            past_key_values=cache,
            use_cache=True,
        )
    linear, full = cache.layers
    kept = [
        *linear.conv_states.values(),
        *2 * [*linear.recurrent_states.values()],
        full.keys,
        full.values,
    ]  # read and written
    read = bench.read_bytes(model, *prompt["input_ids"].shape)
    weights = [
        weight for name, weight in model.named_parameters() if "visual" not in name
    ]  # the head is the embeddings
    assert read == sum(tensor.nbytes for tensor in kept + weights)


def test_the_plain_way_computes_the_same_hidden_states(tiny):
    model, prompt = tiny
    one = {
        key: value[:1] if key != "pixel_values" else value[: prompt["image_grid_thw"][0].prod()]
        for key, value in prompt.items()
    }
    ids = torch.randint(256, (3, 5))
    torch.testing.assert_close(
        bench.plain_hidden(model, one, ids),
        vision_model.response_hidden(model, one, ids),
        atol=3e-5,
        rtol=1e-4,
    )


def test_every_row_of_the_step_and_of_generation_is_measured(monkeypatch, capsys):
    bench_main(
        monkeypatch,
        "generate",
        "step",
        "--prompt-tokens",
        "80",
        "--response-tokens",
        "4",
        "--group",
        "2",
        "--gen-prompts",
        "2",
        "--model-vocab",
        "512",
        "--repeats",
        "1",
        "--plain-rows",
        "1",
    )
    rows = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  ") and "x floor" not in line
    ]
    assert len(rows) == 4 + 13 + len(bench.GOALS)
    assert not any("nan" in line or "out of memory" in line for line in rows)


def test_memory_that_runs_out_is_reported(monkeypatch, capsys):
    def run():
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    args = type("", (), {"device": "cuda", "repeats": 2})
    bench.compare("student pass", lambda: None, run, 100, 1.0, args)
    ours, plain = capsys.readouterr().out.splitlines()
    assert "out of memory" in plain and " 0.00 " in ours


def test_memory_that_runs_out_halfway_through_a_backward_pass_costs_one_row(monkeypatch, capsys):
    real = bench.plain_hidden

    def run_out(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def short(model, prompt, ids):
        hidden = real(model, prompt, ids)
        if hidden.requires_grad:
            next(model.model.language_model.layers[0].parameters()).register_hook(run_out)
        return hidden

    monkeypatch.setattr(bench, "plain_hidden", short)
    bench_main(
        monkeypatch,
        "step",
        "--prompt-tokens",
        "80",
        "--response-tokens",
        "4",
        "--group",
        "2",
        "--model-vocab",
        "512",
        "--repeats",
        "1",
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert sum("out of memory" in line for line in rows) >= 2 and any(
        "teacher pass" in line and "out of memory" not in line for line in rows
    )


@pytest.mark.parametrize(
    "flags, found, verdict",
    [
        ([], (1.5, 1.9), "reached"),
        ([], (1.7, 1.0), "missed"),
        ([], (1.5, 2.1), "missed"),
        ([], None, "not run"),
        (["--tokens", "64"], (1.0, 0.0), "not run"),
        (["--device", "cpu"], (1.0, 0.0), "not run on a GPU"),
    ],
)
def test_a_goal_is_judged_only_in_its_own_shapes(flags, found, verdict, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench.bench_loss, "run", lambda args: found)
    bench_main(monkeypatch, "loss", "--device", "cuda", *flags)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  loss"))
    assert verdict in line
