"""loss.py, both of its forms, against the formula in float64 on full logits, left to autograd."""

import math
from weakref import WeakSet

import pytest
import torch
from torch import bfloat16, float32, float64, ones
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loss import BLOCK, DIVERGENCES, divergence, largest, scale_exp_, sum_exp, topk_divergence

pytestmark = pytest.mark.core

N, V, D = 7, 23, 5  # tokens, vocabulary, width


def kl(p, q):
    return (p * torch.log(p / q)).sum(-1)


def formula(
    student_logits,
    teacher_logits,
    k=100,
    beta=0.5,
    kind="jsd",
):
    """(n, V) -> (n,), by sorting probabilities, adding up and dividing."""
    order = student_logits.argsort(dim=-1, descending=True)
    events = []
    for logits in (student_logits, teacher_logits):
        p = logits.softmax(-1).gather(-1, order)
        if k < p.shape[1]:
            tail = p[:, k:].sum(-1, keepdim=True)
            tail = tail.clamp(min=-math.expm1(-1e-7))
            p = torch.cat([p[:, :k], tail], -1)
        events.append(p)
    s, t = events
    if kind == "forward_kl":
        return kl(t, s)
    if kind == "reverse_kl":
        return kl(s, t)
    if kind == "soft_forward_kl":
        s, t = (p.sqrt() / p.sqrt().sum(-1, keepdim=True) for p in (s, t))
        return 4 * kl(t, s)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def inputs(
    n=N,
    vocab=V,
    width=D,
    scale=1.0,
    dtype=float64,
):
    """Student (with gradient), a teacher of another width, and weights, two of which are 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=float64)

    weights = draw(n).abs()
    weights[1:3] = 0
    teacher_hidden = scale * draw(n, width + 1)
    teacher_head = draw(vocab, width + 1)
    return {
        "student_hidden": (scale * draw(n, width)).to(dtype).requires_grad_(),
        "student_head": draw(vocab, width).to(dtype).requires_grad_(),
        "teachers": [(teacher_hidden.to(dtype), teacher_head.to(dtype), 1.0)],
        "weights": weights,
    }


def student(given):
    return [given["student_hidden"], given["student_head"]]


def fused(given, **options):
    """Loss, values and both gradients of topk_divergence."""
    loss, per_token = topk_divergence(**given, **options)
    assert not per_token.requires_grad
    return loss, per_token, *grad(loss, student(given))


def by_autograd(on_logits, given, **options):
    """The same of a function of full logits, in float64."""
    leaves = [each.detach().double().requires_grad_() for each in student(given)]
    teacher_logits = sum(
        share * hidden.double() @ head.double().T for hidden, head, share in given["teachers"]
    )
    per_token = on_logits(leaves[0] @ leaves[1].T, teacher_logits.detach(), **options)
    per_token = torch.where(given["weights"] > 0, per_token, 0)
    loss = given["weights"] @ per_token
    return loss, per_token, *grad(loss, leaves)


def same(found, wanted, tol=1e-12):
    torch.testing.assert_close(
        found,
        wanted,
        rtol=tol,
        atol=tol,
        check_dtype=False,
    )


every_kind = pytest.mark.parametrize("kind", DIVERGENCES)

# ------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize(
    "kind, beta",
    [
        *((kind, 0.5) for kind in DIVERGENCES),
        ("jsd", 0.1),
        ("jsd", 0.95),
    ],
)
@pytest.mark.parametrize("k", [1, 5, V - 1, V, V + 10])
def test_values_and_gradients_equal_the_formula(kind, beta, k):
    given = inputs()
    options = {"kind": kind, "beta": beta, "k": k}
    expected = by_autograd(formula, given, **options)
    same(by_autograd(divergence, given, **options), expected)
    for chunk in (1, 3, N, 100):
        same(fused(given, chunk=chunk, **options), expected)


@every_kind
def test_a_tail_under_its_floor_stops_moving(kind):
    given = inputs()
    hidden, head = student(given)
    with torch.no_grad():
        hidden *= torch.linspace(1, 12, N)[:, None]  # more and more peaked
        p = (hidden @ head.T).softmax(-1)
        top = p.topk(5).values.sum(-1)
    assert (top > 1 - 1e-8).sum() >= 2
    assert (top < 1 - 1e-6).sum() >= 2  # both sides of the floor
    expected = by_autograd(formula, given, kind=kind, k=5)
    same(fused(given, kind=kind, k=5, chunk=3), expected, 1e-6)


@every_kind
def test_a_trust_region_teacher_is_a_weighted_sum_of_logits_and_gets_no_gradient(kind):
    given = inputs()
    hidden, head, _ = given["teachers"][0]
    on_crop = given["student_hidden"].detach().flip(0)  # the student itself, its head in training
    teachers = [each.requires_grad_() for each in (hidden, head, on_crop)]
    given["teachers"] = [
        (hidden, head, 0.95),
        (on_crop, given["student_head"], 0.05),
    ]
    found = fused(given, kind=kind, k=5, chunk=3)
    same(found, by_autograd(formula, given, kind=kind, k=5))
    loss, _ = topk_divergence(**given)
    assert grad(loss, teachers, allow_unused=True) == (None, None, None)


@every_kind
@pytest.mark.parametrize("vocab", [2560, 2561])  # whole blocks of 128, and not
def test_a_large_vocabulary_is_searched_in_blocks_with_the_same_result(kind, vocab):
    given = inputs(vocab=vocab)
    expected = by_autograd(formula, given, kind=kind, k=9)
    same(fused(given, kind=kind, k=9, chunk=3), expected)


@pytest.mark.parametrize("dtype", [float32, bfloat16])
def test_the_largest_logits_are_those_of_topk_equal_and_infinite_ones_too(dtype):
    logits = torch.randn(50, 20 * BLOCK).to(dtype)  # in bf16 many are equal
    logits[1:9, ::2] = -math.inf
    logits[9, 7:] = -math.inf  # fewer than asked for
    logits[10, 3] = math.inf
    top, ids = largest(logits, 10)
    assert torch.equal(top, logits.topk(10).values)
    assert torch.equal(top, logits.gather(-1, ids))
    assert all(len(set(row)) == 10 for row in ids.tolist())


@pytest.mark.parametrize("dtype", [float32, bfloat16])
def test_what_a_gpu_compiles_computes_the_same(dtype):
    """Traced here, and run by the CPU's operations; test_gpu.py runs the kernels."""
    logits = torch.randn(5, 300).to(dtype)
    peak = logits.amax(-1, keepdim=True).float()
    scale = torch.rand(5, 1)
    for function, others in ((sum_exp, [peak]), (scale_exp_, [peak, scale])):
        traced = torch.compile(function.__wrapped__, dynamic=True, backend="aot_eager")
        found = traced(logits.clone(), *others)
        assert torch.equal(found, function(logits.clone(), *others))


# ------------------------------------------------------------------------------------- few tokens


def test_a_token_of_weight_zero_contributes_nothing_even_if_it_is_nan():
    given = inputs()
    clean = fused(given, k=5)
    with torch.no_grad():
        given["student_hidden"][1] = math.nan
        given["teachers"][0][0][2] = math.inf
    dirty = fused(given, k=5)
    same(dirty, clean)
    assert not dirty[1][1:3].any()
    assert not dirty[2][1:3].any()


@pytest.mark.parametrize("n", [0, N])
def test_no_tokens_that_count_give_a_loss_and_gradients_of_zero(n):
    given = inputs(n=n)
    given["weights"] = torch.zeros(n)
    found = fused(given, k=5)
    same(found, tuple(torch.zeros_like(each) for each in found), 0)


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "dtype, tol",
    [
        (float32, 2e-5),
        (bfloat16, 0.03),
    ],
)
@every_kind
def test_lower_precisions_stay_close_to_float64_and_return_fp32(kind, dtype, tol):
    given = inputs(
        n=40,
        vocab=300,
        width=32,
        scale=0.2,
        dtype=dtype,
    )
    found = fused(given, kind=kind, k=20, chunk=16)
    expected = by_autograd(formula, given, kind=kind, k=20)
    assert [each.dtype for each in found] == [float32, float32, dtype, dtype]
    for value, exact in zip(found, expected, strict=True):
        assert (value - exact).norm() <= tol * exact.norm()


def test_the_gradient_of_a_bf16_head_is_accumulated_in_fp32():
    given = inputs(
        n=120,
        vocab=50,
        width=8,
        scale=0.3,
        dtype=bfloat16,
    )
    *_, whole = fused(given, k=5, chunk=120)
    *_, in_steps = fused(given, k=5, chunk=1)
    lost = (whole - in_steps).double().norm()
    assert lost < 1e-3 * whole.double().norm()  # sums in bf16 lose 1e-2


@pytest.mark.parametrize("dtype", [float32, float64, bfloat16])
@every_kind
def test_masked_and_extreme_logits_give_no_nan_and_the_teacher_no_gradient(kind, dtype):
    s, t = torch.randn(2, 6, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    s[0, 5:] = t[0, 5:] = -math.inf  # fewer possible tokens than k
    s[1, 3] = t[2, 4] = -math.inf  # impossible for one of the two
    t[3, :20] = -math.inf  # the teacher's mass may lie wholly in the tail
    s[4] *= 1e4
    t[4] *= 1e4
    s[5, 0] = t[5, 1] = 1e4  # both certain, of different tokens
    s.requires_grad_()
    t.requires_grad_()
    for k in (1, 8, V):
        value = divergence(s, t, k=k, kind=kind)
        gradient, of_teacher = grad(value.sum(), (s, t), allow_unused=True)
        assert of_teacher is None
        assert value.dtype == torch.promote_types(dtype, float32)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@every_kind
@pytest.mark.parametrize("k", [1, 8, V])
def test_extreme_hidden_states_give_no_nan(kind, k):
    given = inputs(dtype=float32, scale=1e4)
    found = fused(given, kind=kind, k=k)
    for each in found:
        assert each.isfinite().all()
    plain = by_autograd(divergence, given, kind=kind, k=k)
    same(found[1], plain[1], 1e-4)


# -------------------------------------------------------------------------------------- gradients


def test_the_upstream_gradient_scales_both_gradients_and_a_second_backward_is_refused():
    given = inputs()
    *_, d_hidden, d_head = fused(given, k=5)
    loss, _ = topk_divergence(**given, k=5)
    (-3 * loss).backward(retain_graph=True)
    same(given["student_hidden"].grad, -3 * d_hidden)
    same(given["student_head"].grad, -3 * d_head)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none_and_the_other_stays_right(frozen):
    given = inputs()
    gradients = fused(given, k=5)[2:]
    weights = student(given)
    weights[frozen].requires_grad_(False)
    topk_divergence(**given, k=5)[0].backward()
    assert weights[frozen].grad is None
    same(weights[1 - frozen].grad, gradients[1 - frozen])


# ------------------------------------------------------------------------------- memory and work


class Watch(TorchDispatchMode):
    """Counts matmuls, and the most bytes at once in storages of at least `big` bytes."""

    def __init__(self, big):
        super().__init__()
        self.big = big
        self.alive = WeakSet()
        self.most = 0
        self.matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.matmuls += 1
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.alive.add(each.untyped_storage())
        sizes = [storage.nbytes() for storage in self.alive]
        self.most = max(self.most, sum(size for size in sizes if size >= self.big))
        return out


@pytest.mark.parametrize("n", [16, 500])
def test_only_three_chunks_of_logits_exist_whatever_the_number_of_tokens(n):
    """Two of them, and on a CPU one that is in work."""
    given = inputs(n=n + 2, vocab=400)  # two have weight 0
    chunk = 16 * 400 * 8  # bytes of its logits
    with Watch(chunk) as watch:
        topk_divergence(**given, k=5, chunk=16)[0].backward()
    assert watch.most == 3 * chunk
    assert watch.matmuls == 4 * math.ceil(n / 16)


def test_without_gradients_only_the_two_forward_matmuls_are_done():
    given = inputs()
    with torch.no_grad(), Watch(0) as watch:
        loss, _ = topk_divergence(**given, k=5)
    assert watch.matmuls == 2
    assert not loss.requires_grad
    same(loss, fused(given, k=5)[0])


# -------------------------------------------------------------------------- agreement and errors


def test_agreement_says_whether_teacher_and_student_prefer_the_same_of_the_top_k():
    first = [3.0, 2.0, 1.0, 0.0]
    last = [0.0, 1.0, 2.0, 3.0]
    none_of_the_two = [1.0, 0.0, 0.0, 9.0]  # of the two it prefers the first
    student_logits = torch.tensor([first, first, last, first])
    teacher_logits = torch.tensor([first, last, last, none_of_the_two])
    head = torch.eye(4)
    *_, agree = topk_divergence(
        student_logits,
        head,
        [(teacher_logits, head, 1.0)],
        torch.tensor([0.0, 1.0, 1.0, 1.0]),
        k=2,
        chunk=2,
        agreement=True,
    )
    assert agree.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    "name, value, named",
    [
        ("kind", "kl", "divergence"),
        ("beta", 0.0, "beta"),
        ("beta", 1.0, "beta"),
        ("k", 0, "k is 0"),
        ("chunk", 0, "chunk is 0"),
        ("weights", ones(3), "weights"),
        ("student_hidden", ones(N, D), "float32"),
        ("student_hidden", ones(1, N, D), "student"),
        ("student_head", ones(V, D + 1), "student"),
        ("teachers", [], "teachers"),
        ("teachers", [(ones(N, 2), ones(V + 1, 2), 1.0)], r"teachers\[0\]"),
        ("teachers", [(ones(2, 2), ones(V, 2), 1.0)], r"teachers\[0\]"),
        (
            "teachers",
            [
                (ones(N, 2), ones(V, 2), 0.5),
                (ones(N, 2).double(), ones(V, 2).double(), 0.5),
            ],
            r"teachers\[1\]",
        ),
    ],
)
def test_wrong_arguments_are_named(name, value, named):
    given = inputs() | {name: value}
    with pytest.raises(ValueError, match=named):
        topk_divergence(**given)
