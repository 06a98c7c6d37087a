"""launch/environment.py: what it changes in torch and transformers, and whether that is still
needed: each change has a test that fails once the library behaves by itself."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT
from transformers.integrations import sdpa_attention

import launch.environment


def in_process(code: str, *folders) -> str:
    """What a fresh process prints, with packages of `folders` installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_kernels_of_a_gpu_are_not_taken_where_there_is_none(tmp_path):
    package = tmp_path / "causal_conv1d"
    package.mkdir()
    (package / "__init__.py").write_text("def causal_conv1d_update(x=None): return 'taken'\n")
    code = """
from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_update
try:
    print(causal_conv1d_update(x=1))
except TypeError:
    print("transformers' own")
"""
    assert "taken" in in_process(code, tmp_path), "transformers asks for a GPU: the line can go"
    assert "transformers' own" in in_process("import launch.environment" + code, tmp_path)


@pytest.mark.parametrize("compiling", [True, False])
def test_compiled_decoding_does_not_repeat_keys(compiling, monkeypatch):
    """compiling: as transformers would see it without our line; else with it."""
    if compiling:
        monkeypatch.setattr(sdpa_attention, "is_torchdynamo_compiling", lambda: True)
    repeat = Mock(wraps=sdpa_attention.repeat_kv)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeat)
    layer = SimpleNamespace(num_key_value_groups=2, layer_idx=0, is_causal=True)
    query, (key, value) = torch.randn(1, 4, 1, 8), torch.randn(2, 1, 2, 5, 8)
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    sdpa_attention.sdpa_attention_forward(layer, query, key, value, mask)
    assert repeat.called == compiling, "transformers packs query heads by itself: the line can go"


def test_cudnns_attention_is_off_and_would_be_on():
    asked = "import torch; print(torch.backends.cuda.cudnn_sdp_enabled())"
    assert in_process(asked).strip() == "True", "torch leaves it off: the line can go"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    "command, gpus",
    [
        ("train.py --device cpu", ""),
        ("train.py --device=cpu", ""),
        ("train.py --toy", ""),
        ("toy/__main__.py --n 3", ""),
        ("train.py --device cuda", "0"),
        ("evaluate.py --out cpu", "0"),
    ],
)
def test_a_run_on_the_cpu_does_not_see_the_gpu(command, gpus, monkeypatch):
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    importlib.reload(launch.environment)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpus
