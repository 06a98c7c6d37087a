"""What a GPU and its kernels change, against a CPU and transformers' own kernels: `python -m
pytest tests/test_gpu.py --device cuda`.

Without that both sides are the CPU: then only the tests themselves are tested. Errors are shares
of the reference's norm.
"""

import contextlib
import copy
import inspect

import bench
import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE, alone, livelier, noise, tiny_qwen3_vl
from test_model import gradients, plain_hidden
from transformers.models.qwen3_5 import modeling_qwen3_5

import methods
import model as vision_model
import rollout
import toy.tiny as tiny_model
import train
from loss import divergence, topk_divergence
from rollout import sample
from sharding import Shards, join_ranks
from triplets.format import Triplet

torch.backends.cudnn.allow_tf32 = False  # in convolutions; in kernels: see conftest.py
KERNELS = [
    name
    for name in vars(modeling_qwen3_5)
    if "gated_delta_rule" in name or name.startswith("causal_conv1d")
]
FAMILIES = {
    "qwen3_5": tiny_model.tiny,
    "qwen3_vl": tiny_qwen3_vl,
    "real heads": lambda: bench.build("small", 512, "cpu", torch.float32),
}


@contextlib.contextmanager
def transformers_own():
    """Within, no kernels of other packages: they would be called with the CPU's tensors too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(modeling_qwen3_5, name, inspect.unwrap(getattr(modeling_qwen3_5, name)))
            assert inspect.isfunction(getattr(modeling_qwen3_5, name))
        yield


@pytest.fixture(params=FAMILIES)
def subject(request):
    """(model, processor, prompts of different lengths), in fp32 on the CPU."""
    model, processor = FAMILIES[request.param]()
    prompt = vision_model.encode(
        processor, [noise(64, 64, 1), noise(32, 48, 2)], ["what is in the red box ?", "a ?"]
    )
    return livelier(model, 1.0 if request.param == "real heads" else 1.7), processor, prompt


def moved(model, dtype=torch.float32):
    return copy.deepcopy(model).to(DEVICE, dtype)


def error(got, want, least=0.0) -> float:
    return float(
        (got.detach().cpu().double() - want.double()).norm() / (want.double().norm() + least)
    )


def backward(model, hidden, target) -> dict:
    return {"hidden": hidden.detach()} | gradients(model, (hidden * target.to(hidden)).sum())


def plain(model, prompt, ids):
    return torch.cat(
        [plain_hidden(model, prompt, row // 2, response)[None] for row, response in enumerate(ids)]
    )


@pytest.mark.parametrize("padded", [True, False])
def test_kernels_give_the_hidden_states_and_gradients_of_transformers_own(subject, padded):
    """The reference: a plain forward of each sequence on the CPU. In fp32 every weight's gradient
    is held to it; in bf16, where those of small weights are noise, all together, by how far a
    plain forward in bf16 on this device is from it."""
    model, _, prompt = subject
    prompt = prompt if padded else alone(prompt, 0)
    ids = torch.randint(
        0, 300, (2 * len(prompt["input_ids"]), 70), generator=torch.Generator().manual_seed(0)
    )  # over a block of 64
    target = torch.randn(
        *ids.shape, model.lm_head.in_features, generator=torch.Generator().manual_seed(1)
    )
    here, at, whole, half = (
        vision_model.to_device(prompt, DEVICE),
        ids.to(DEVICE),
        moved(model),
        moved(model, torch.bfloat16),
    )
    found = [
        backward(each, vision_model.response_hidden(each, here, at, checkpoint=checkpoint), target)
        for each in (whole, half)
        for checkpoint in (True, False)
    ]
    usual = backward(half, plain(half, here, at), target)
    with transformers_own():
        want = backward(model, plain(model, prompt, ids), target)
    least = 1e-3 * max(
        float(gradient.norm()) for name, gradient in want.items() if name != "hidden"
    )  # a small one may be noise
    assert all(got.keys() == want.keys() for got in found)
    for got in found[:2]:
        errors = {name: error(got[name], want[name], least) for name in want}
        assert max(errors.values()) < 2e-3, errors

    def together(each):
        return torch.cat(
            [gradient.cpu().flatten() for name, gradient in each.items() if name != "hidden"]
        )

    for part in (together, lambda each: each["hidden"].cpu()):
        for got in found[2:]:
            assert error(part(got), part(want)) <= 1.5 * error(part(usual), part(want)) + 2e-3


def test_decoding_in_a_static_cache_gives_the_tokens_of_the_cpu(subject):
    """On a GPU compiled, with CUDA graphs; the second batch has fewer rows, as the last of a step
    may have."""
    model, processor, prompt = subject
    there, room = moved(model), prompt["input_ids"].shape[1] + 12
    for part in (prompt, alone(prompt, 0), prompt):
        seeds = [3, 4][: len(part["input_ids"])]
        with transformers_own():
            want = sample(model, processor, part, 3, max_new_tokens=12, seeds=seeds)
        for static in (0, room):
            got = sample(
                there,
                processor,
                vision_model.to_device(part, DEVICE),
                3,
                max_new_tokens=12,
                seeds=seeds,
                static=static,
            )
            assert torch.equal(got.ids.cpu(), want.ids) and torch.equal(got.mask.cpu(), want.mask)
            assert error(got.log_probs[got.mask], want.log_probs[want.mask]) < 5e-3
    assert DEVICE == "cpu" or hasattr(there, "_compiled_call")  # else it was not compiled at all
    rollout.CACHES.clear()


def test_the_loss_in_bf16_is_the_equation_of_the_rounded_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(300, 64, generator=generator).bfloat16() for _ in range(2))
    head, other = (0.1 * torch.randn(5000, 64, generator=generator).bfloat16() for _ in range(2))
    weights, rounded = (
        torch.rand(300, generator=generator),
        lambda logits: logits + (logits.bfloat16() - logits).detach(),
    )
    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    want = (
        weights
        * divergence(
            rounded(exact[0] @ exact[1].t()), rounded(target.double() @ other.double().t())
        )
    ).sum()
    want.backward()
    here = [tensor.to(DEVICE).requires_grad_() for tensor in (hidden, head)]
    got, _ = topk_divergence(
        *here, [(target.to(DEVICE), other.to(DEVICE), 1.0)], weights.to(DEVICE), chunk=128
    )
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-3)
    limit = 0.05 if DEVICE == "cuda" else 5e-3  # of equal logits another may be the 100th
    assert all(error(mine.grad, its.grad) < limit for mine, its in zip(here, exact, strict=False))


def one_of_a_kind(device: str) -> tuple[int, int, torch.device]:
    """join_ranks, for the CPU and a GPU in one process."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return join_ranks(device)


def test_a_step_is_that_of_the_cpu(subject, monkeypatch):
    """The gradient, what is logged, and the weights that are published afterwards."""
    model, processor, _ = subject
    flags = "--device cpu --prompts 3 --group 2 --max-new-tokens 9 --steps 5 --lr 1e-3"
    settings = train.parse(flags.split())
    rows = [Triplet(str(i), "", "", "") for i in range(3)]
    batch = []
    for i, row in enumerate(rows):
        prompts = {
            who: vision_model.encode(processor, [noise(side, 64, i)], ["what is in the red box ?"])
            for who, side in (("student", 96), ("teacher", 48))
        }
        batch.append(([row], prompts))
    found, rollouts = [], []
    monkeypatch.setattr(train, "show", lambda *_, **__: [])

    def sampled(*args, **kwargs):  # the same responses on both
        if not found:
            rollouts.append(sample(*args, **kwargs))
        calls.append(rollouts[len(calls)])
        return rollout.Rollout(*(tensor.to(device) for tensor in vars(calls[-1]).values()))

    monkeypatch.setattr(methods, "sample", sampled)
    for device in ("cpu", DEVICE):
        rank, world, there = one_of_a_kind(device)
        student, calls = copy.deepcopy(model).to(device), []
        shards = Shards(student, lr=1e-3, eps=1e-8, weight_decay=0.01, copy_stays=False)
        method = methods.METHODS["vision-opd"](settings)
        run = train.Run(settings, method, rows, processor, shards, rank, world, there)
        with contextlib.nullcontext() if found else transformers_own():
            entries = [train.learn(run, step, batch)[0] for step in range(2)]
        found.append((entries, shards))
    (want, its), (got, mine) = found
    for key in ("loss", "grad_norm"):
        assert [each[key] for each in got] == pytest.approx([each[key] for each in want], rel=1e-2)

    def moments(shards):
        return torch.cat([shards.adam.state[each]["exp_avg"].flatten() for each in shards.student])

    assert error(moments(mine).cpu(), moments(its)) < 1e-2
    for published, own in zip(mine.publish("student").parameters(), mine.student, strict=True):
        assert torch.equal(published, own)
    assert not all(map(torch.equal, mine.student, mine.teacher))
