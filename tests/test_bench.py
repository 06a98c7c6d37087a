import sys
from argparse import Namespace

import bench
import pytest
import torch
from conftest import noise
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import toy.tiny as tiny_model
from model import encode, response_hidden
from rollout import prefill


@pytest.fixture
def tiny():
    """The toy's model, and two prompts of one length with images of different shapes."""
    model, processor = tiny_model.tiny()
    images = [
        noise(64, 48, 1),
        noise(48, 64, 2),
    ]
    return model, encode(processor, images, ["what is in the red box ?"] * 2)


def bench_main(monkeypatch, capsys, flags):
    """The rows that it prints."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags.split()])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("  ") and "x floor" not in line]


@pytest.mark.parametrize(
    "asked, what",
    [
        ([], "goals"),
        (["loss", "step"], ["loss", "step"]),
    ],
)
def test_what_is_not_asked_for_is_all_that_the_goals_are_about(monkeypatch, asked, what):
    monkeypatch.setattr(sys, "argv", ["bench.py", *asked])
    assert bench.parse().what == what


def test_flops_of_a_pass_are_those_that_torch_counts_exactly(tiny, dense_mask):
    model, prompt = tiny
    B, L = prompt["input_ids"].shape
    N = 6
    T = 7
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu  # torch does not count it itself

    def flops(q, k, v, *args, **how):
        return sdpa_flop_count(q, q[:2] + k[2:], q[:2] + v[2:])  # keys are shared by heads

    counter = FlopCounterMode(display=False, custom_mapping={attention: flops})
    with torch.no_grad(), counter:
        response_hidden(model, prompt, torch.randint(256, (N, T)))
    counts = counter.get_flop_counts()
    total = counts["Global"]
    # Other convolutions are depthwise, no matmuls.
    patches = counts["Qwen3_5VisionModel.patch_embed.proj"][aten.convolution]
    weights, between = bench.forward_flops(model, prompt, N, T)
    assert weights == total[aten.mm] + total[aten.addmm] + patches
    future = B * (L - 1) * (L - 2) / 2  # torch counts masked pairs too
    future += N * T * (T - 1) / 2
    heads = 4 * 32  # heads x head_dim, of one layer
    assert between == total[attention] - 4 * heads * future


@torch.no_grad()
def test_decoding_reads_the_weights_once_and_the_cache_that_transformers_keeps(tiny):
    model, prompt = tiny
    B, L = prompt["input_ids"].shape
    linear, full = prefill(model, prompt).layers
    states = [*linear.recurrent_states.values()]
    kept = [
        *linear.conv_states.values(),
        *states,
        *states,
        full.keys,
        full.values,
    ]
    # The head is the embeddings.
    kept += [weight for name, weight in model.named_parameters() if "visual" not in name]
    assert bench.read_bytes(model, B, L - 1) == sum(tensor.nbytes for tensor in kept)


def test_every_row_is_measured_and_memory_that_runs_out_costs_only_its_own(monkeypatch, capsys):
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    for key, value in layers.items():
        monkeypatch.setitem(bench.SHAPES["sizes"]["small"]["text_config"], key, value)
    real = bench.plain_hidden
    passes = []

    def plain_hidden(model, prompt, ids):
        hidden = real(model, prompt, ids)
        passes.append(hidden.requires_grad)
        if sum(passes) == 3 and passes[-1]:  # after two of the whole step: the student pass alone
            weight = next(model.model.language_model.layers[0].parameters())
            hook = weight.register_hook(lambda gradient: run_out(hook))
        return hidden

    def run_out(hook):  # halfway through the backward pass
        hook.remove()
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "plain_hidden", plain_hidden)
    shapes = "--prompt-tokens 80 --response-tokens 4 --group 2 --gen-prompts 2 --model-vocab 1024"
    rows = bench_main(monkeypatch, capsys, f"generate step {shapes} --repeats 1")
    assert len(rows) == 4 + 13 + len(bench.GOALS)
    assert [i for i, row in enumerate(rows) if "out of memory" in row] == [11]
    assert rows[10].startswith("  student pass  ")
    assert not any("nan" in row for row in rows)


def test_memory_is_what_a_gpu_has_beyond_what_was_there(monkeypatch):
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    _, gb = bench.measure(lambda: None, Namespace(device="cuda", repeats=2))
    assert gb == 2


@pytest.mark.parametrize(
    "flags, found, verdict",
    [
        ("cuda", (1.5, 1.9), "reached"),
        ("cuda", (1.7, 1.0), "missed"),
        ("cuda", (1.5, 2.1), "missed"),
        ("cuda", (float("nan"), 0.0), "out of memory"),
        ("cuda", None, "not run in full"),
        ("cuda --tokens 64", (1.0, 0.0), "not run in full"),
        ("cpu", (1.0, 0.0), "not run on a GPU"),
    ],
)
def test_a_goal_is_judged_only_in_its_own_shapes(flags, found, verdict, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench.bench_loss, "run", lambda args: found)
    rows = bench_main(monkeypatch, capsys, f"loss --device {flags}")
    assert verdict in rows[0]
