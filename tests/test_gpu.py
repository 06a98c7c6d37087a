"""What a GPU and its kernels change, against a CPU and transformers' own kernels: `python -m
pytest tests/test_gpu.py --device cuda`.

Without that both sides are the CPU: then only the tests themselves are tested. Errors are shares
of the reference's norm.
"""

import contextlib
import copy
import importlib.util
import inspect
from functools import partial

import bench
import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE, FAMILIES, alone, livelier, noise
from test_model import gradients, plain_hidden
from transformers.models.qwen3_5 import modeling_qwen3_5

import methods
import rollout
import train
from loss import divergence, topk_divergence
from model import encode, response_hidden, to_device
from rollout import sample

torch.backends.cudnn.allow_tf32 = False  # in convolutions; in kernels: see conftest.py
QUESTION = "what is in the red box ?"
SUBJECTS = dict(FAMILIES)
if DEVICE == "cuda":
    SUBJECTS["real heads"] = partial(
        bench.build,
        "small",
        512,
        "cpu",
        torch.float32,
    )


@contextlib.contextmanager
def transformers_own():
    """Within, no kernels of other packages: they would be called with the CPU's tensors too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in list(vars(modeling_qwen3_5).items()):
            if "gated_delta_rule" in name or name.startswith("causal_conv1d"):
                own = inspect.unwrap(kernel)
                assert inspect.isfunction(own)
                patch.setattr(modeling_qwen3_5, name, own)
        yield


@pytest.fixture(params=SUBJECTS)
def subject(request):
    """(model, processor, prompts of different lengths), in fp32 on the CPU."""
    model, processor = SUBJECTS[request.param]()
    if request.param != "real heads":
        livelier(model)
    images = [noise(64, 64, 1), noise(32, 48, 2)]
    prompt = encode(processor, images, [QUESTION, "a ?"])
    return model, processor, prompt


def moved(model, dtype=torch.float32):
    return copy.deepcopy(model).to(DEVICE, dtype)


def error(got, want, least=0.0) -> float:
    want = want.detach().double()
    distance = (got.detach().cpu().double() - want).norm()
    return float(distance / (want.norm() + least))


def flat(tensors) -> torch.Tensor:
    """All their numbers in one row, on the CPU."""
    return torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])


@pytest.mark.parametrize("padded", [True, False])
def test_kernels_give_the_hidden_states_and_gradients_of_transformers_own(subject, padded):
    """The reference: a plain forward of each sequence on the CPU. In fp32 every weight's gradient
    is held to it; in bf16, where those of small weights are noise, all together, by how far a
    plain forward in bf16 on this device is from it. (fla solves its triangular systems in TF32,
    whatever is asked for; wrong gradients would be off by far more than that.)"""
    model, _, prompt = subject
    if not padded:
        prompt = alone(prompt, 0)
    draw = torch.Generator().manual_seed(0)
    shape = (2 * len(prompt["input_ids"]), 70)  # over a block of 64
    ids = torch.randint(0, 300, shape, generator=draw)
    target = torch.randn(*shape, model.lm_head.in_features, generator=draw)

    def backward(model, hidden):
        """The hidden states, and all gradients by name."""
        loss = (hidden * target.to(hidden)).sum()
        return hidden, gradients(model, loss)

    with transformers_own():
        hidden, want = backward(model, plain_hidden(model, prompt, ids))
    norms = [gradient.norm() for gradient in want.values()]
    least = 1e-3 * max(norms)  # a small one may be noise

    def errors(found):
        """Of the hidden states, and of all gradients together."""
        its_hidden, its = found
        together = flat(its[name] for name in want)
        return error(its_hidden, hidden), error(together, flat(want.values()))

    has_fla = importlib.util.find_spec("fla")
    limit = 2e-2 if DEVICE == "cuda" and has_fla else 2e-3
    here = to_device(prompt, DEVICE)
    at = ids.to(DEVICE)
    whole = moved(model)
    half = moved(model, torch.bfloat16)
    usual = errors(backward(half, plain_hidden(half, here, at)))
    for checkpoint in (True, False):
        shared = response_hidden(whole, here, at, checkpoint=checkpoint)
        found, its = backward(whole, shared)
        assert error(found, hidden) < limit
        assert its.keys() == want.keys()
        for name in want:
            assert error(its[name], want[name], least) < limit, name
        shared = response_hidden(half, here, at, checkpoint=checkpoint)
        mine = errors(backward(half, shared))
        for ours, theirs in zip(mine, usual, strict=True):
            assert ours <= 1.5 * theirs + 2e-3


def test_decoding_in_a_static_cache_gives_the_tokens_of_the_cpu(subject):
    """On a GPU compiled, with CUDA graphs; the second batch has fewer rows, as the last of a step
    may have."""
    model, processor, prompt = subject
    there = moved(model)
    room = prompt["input_ids"].shape[1] + 12
    for part in (prompt, alone(prompt, 0), prompt):
        how = {
            "group": 3,
            "max_new_tokens": 12,
            "seeds": range(len(part["input_ids"])),
        }
        with transformers_own():
            want = sample(model, processor, part, **how)
        here = to_device(part, DEVICE)
        for static in (0, room):
            got = sample(there, processor, here, static=static, **how)
            assert torch.equal(got.ids.cpu(), want.ids)
            assert torch.equal(got.mask.cpu(), want.mask)
            real = want.mask
            log_probs = got.log_probs.cpu()
            assert error(log_probs[real], want.log_probs[real]) < 5e-3
    assert DEVICE == "cpu" or hasattr(there, "_compiled_call")  # else it was not compiled at all
    rollout.CACHES.clear()


def test_the_loss_in_bf16_is_as_near_to_the_equation_as_the_plain_way():
    """The equation: in float64, from unrounded logits. Both others round their logits to bf16,
    each matmul a little differently: so neither is held to the other's logits, or the other."""
    draw = torch.Generator().manual_seed(0)
    sides = []
    for n, scale in [(300, 1.0), (5000, 0.1)] * 2:  # hidden states and head of student, of teacher
        side = scale * torch.randn(n, 64, generator=draw)
        sides.append(side.bfloat16())
    weights = torch.rand(300, generator=draw)

    def plain(hidden, head, target, other, weights):
        logits = hidden @ head.t()
        per_token = divergence(logits, target @ other.t())
        return (weights * per_token).sum(), per_token

    def fused(hidden, head, target, other, weights):
        teachers = [(target, other, 1.0)]
        return topk_divergence(hidden, head, teachers, weights, chunk=128)

    def found(loss, *kind):
        given = [side.to(*kind).requires_grad_() for side in sides]
        total, per_token = loss(*given, weights.to(kind[0]))
        return per_token, *torch.autograd.grad(total, given[:2])

    want = found(plain, "cpu", torch.float64)
    usual = found(plain, DEVICE, torch.bfloat16)
    got = found(fused, DEVICE, torch.bfloat16)
    for mine, its, exact in zip(got, usual, want, strict=True):
        assert error(mine, exact) <= 1.5 * error(its, exact)


def test_a_step_is_that_of_the_cpu(subject, monkeypatch):
    """The gradient, what is logged, and the weights that are published afterwards."""
    model, processor, _ = subject
    if not dist.is_initialized():  # both devices in one process
        backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    rollouts = []

    def recorded(*args, **kwargs):
        rollouts.append(sample(*args, **kwargs))
        return rollouts[-1]

    def replayed(*_, **__):
        fields = vars(rollouts.pop(0))
        return rollout.Rollout(**to_device(fields, DEVICE))

    def steps(device, answer):
        """What two steps log, AdamW's moments after them, and the shards."""
        monkeypatch.setattr(methods, "sample", answer)
        monkeypatch.setattr(train, "show", lambda *_, **__: [])
        flags = "--prompts 3 --group 2 --max-new-tokens 9 --steps 5 --lr 1e-3 --device "
        run = bench.run_of(model, processor, flags + device)
        batch = []
        for i, row in enumerate(run.rows):
            prompts = {}
            for who, width in (("student", 96), ("teacher", 48)):
                image = noise(width, 64, i)
                prompts[who] = encode(processor, [image], [QUESTION])
            batch.append(([row], prompts))
        logged = []
        for step in range(2):
            entry, _ = train.learn(run, step, batch)
            logged += [entry["loss"], entry["grad_norm"]]
        state = run.shards.adam.state
        moments = flat(state[each]["exp_avg"] for each in run.shards.student)
        return logged, moments, run.shards

    with transformers_own():
        logged, moments, _ = steps("cpu", recorded)
    logged_here, moments_here, shards = steps(DEVICE, replayed)
    assert logged_here == pytest.approx(logged, rel=1e-2)
    assert error(moments_here, moments) < 1e-2
    published = shards.publish("student").parameters()
    for weight, own in zip(published, shards.student, strict=True):
        assert torch.equal(weight, own)
    assert not all(map(torch.equal, shards.student, shards.teacher))
