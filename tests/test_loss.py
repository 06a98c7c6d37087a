"""loss.py against the formula in float64 on full logits, written here once more in probabilities and left to autograd."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loss import KINDS, divergence, topk_divergence

N, V, D = 7, 23, 5


def formula(s, t, k, beta, kind):
    """s, t: (n, V) probabilities -> (n,), by sorting, adding up and dividing."""
    order = s.argsort(dim=-1, descending=True)[:, :k]
    events = []
    for p in (s, t):
        top = torch.stack([row[i] for row, i in zip(p, order)])
        tail = (1 - top.sum(-1, keepdim=True)).clamp(min=-math.expm1(-1e-7))
        events.append(torch.cat([top, tail], -1) if k < s.shape[1] else top)
    kl = lambda p, q: (p * torch.log(p / q)).sum(-1)
    s, t = events
    if kind == "forward_kl":
        return kl(t, s)
    if kind == "reverse_kl":
        return kl(s, t)
    if kind == "jsd":
        m = beta * t + (1 - beta) * s
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    raise ValueError(
        f"divergence {kind!r} has no formula here: write it once more, in probabilities"
    )


def inputs(n=N, seed=0, dtype=torch.float64, scale=1.0, vocab=V, width=D):
    """Hidden states and heads of a student (with gradient) and a teacher of another width, and weights with two zeros."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    hidden, head = draw(n, width) * scale, draw(vocab, width)
    teacher = [(draw(n, width + 1) * scale, draw(vocab, width + 1), 1.0)]
    weights = torch.rand(n, generator=g, dtype=torch.float64)
    weights[1:3] = 0
    cast = lambda x: x.to(dtype)
    return (
        cast(hidden).requires_grad_(),
        cast(head).requires_grad_(),
        [(cast(h), cast(w), c) for h, w, c in teacher],
        weights,
    )


def reference(hidden, head, teachers, weights, k=100, beta=0.5, kind="jsd"):
    """loss, per-token values and both gradients, by autograd on full logits."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    t = sum(c * (h.detach().double() @ w.detach().double().T) for h, w, c in teachers).softmax(-1)
    d = formula((hidden @ head.T).softmax(-1), t, k, beta, kind)
    loss = (weights * d).sum()
    return loss.detach(), d.detach(), *torch.autograd.grad(loss, (hidden, head))


def ours(hidden, head, teachers, weights, kind="jsd", **options):
    hidden, head = (x.detach().clone().requires_grad_() for x in (hidden, head))
    loss, per_token = topk_divergence(hidden, head, teachers, weights, kind=kind, **options)
    assert not per_token.requires_grad
    loss.backward()
    return loss.detach(), per_token, hidden.grad, head.grad


def same(a, b, tol=1e-10):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=tol, atol=tol)


CASES = [(kind, 0.5) for kind in KINDS] + [("jsd", 0.1), ("jsd", 0.95)]


@pytest.mark.parametrize("kind, beta", CASES)
@pytest.mark.parametrize("k", [1, 5, V - 1, V, V + 10])
def test_the_fused_loss_and_both_gradients_equal_the_formula(kind, beta, k):
    args = inputs()
    expected = reference(*args, k=k, beta=beta, kind=kind)
    expected[1][args[3] == 0] = 0
    for chunk in (1, 3, N, 100):
        same(ours(*args, k=k, beta=beta, kind=kind, chunk=chunk), expected)


@pytest.mark.parametrize("kind, beta", CASES)
@pytest.mark.parametrize("k", [1, 5, V - 1, V, V + 10])
def test_the_plain_divergence_equals_the_formula(kind, beta, k):
    hidden, head, teachers, weights = inputs(seed=1)
    logits = (hidden @ head.T).detach().requires_grad_()
    teacher = (teachers[0][0] @ teachers[0][1].T).requires_grad_()
    plain = divergence(logits, teacher, k=k, beta=beta, kind=kind)
    exact = formula(logits.softmax(-1), teacher.detach().softmax(-1), k, beta, kind)
    same(
        [plain, *torch.autograd.grad(plain @ weights, logits)],
        [exact, *torch.autograd.grad(exact @ weights, logits)],
    )
    assert not torch.autograd.grad(divergence(logits, teacher).sum(), teacher, allow_unused=True)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_under_its_floor_stops_moving(kind):
    hidden, head, teachers, weights = inputs()
    hidden = hidden.detach() * torch.linspace(1, 12, N)[:, None]  # more and more peaked
    top = (hidden @ head.T).softmax(-1).topk(5).values.sum(-1)
    assert (top > 1 - 1e-8).sum() >= 2 and (
        top < 1 - 1e-6
    ).sum() >= 2  # both sides of the floor are tested
    expected = reference(hidden, head, teachers, weights, k=5, kind=kind)
    expected[1][weights == 0] = 0
    same(
        ours(hidden, head, teachers, weights, kind, k=5, chunk=3), expected, 1e-6
    )  # 1 - sum loses 9 digits, there


def test_with_k_one_below_the_vocabulary_the_tail_is_the_last_token():
    hidden, head, teachers, weights = inputs()
    same(
        ours(hidden, head, teachers, weights, k=V - 1),
        ours(hidden, head, teachers, weights, k=V),
        1e-9,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_trust_region_teacher_is_a_weighted_sum_of_logits_and_gets_no_gradient(kind):
    hidden, head, [(ref, ref_head, _)], weights = inputs()
    crop = hidden.detach().flip(0).requires_grad_()  # the student itself, on the crop
    ref.requires_grad_(), ref_head.requires_grad_()
    teachers = [
        (ref, ref_head, 0.95),
        (crop, head, 0.05),
    ]  # its head is the very head being trained
    loss, _ = topk_divergence(hidden, head, teachers, weights, k=5, kind=kind, chunk=3)
    loss.backward()
    expected = reference(hidden, head, teachers, weights, 5, kind=kind)
    same([loss, hidden.grad, head.grad], [expected[0], *expected[2:]])
    assert crop.grad is None and ref.grad is None and ref_head.grad is None


def test_a_token_of_weight_zero_contributes_nothing_even_if_it_is_nan():
    hidden, head, teachers, weights = inputs()
    clean = ours(hidden, head, teachers, weights, k=5)
    with torch.no_grad():
        hidden[1], teachers[0][0][2] = math.nan, math.inf
    dirty = ours(hidden, head, teachers, weights, k=5)
    same(clean, dirty)
    assert not dirty[1][1:3].any() and not dirty[2][1:3].any()
    for x in ours(hidden, head, teachers, torch.zeros(N), k=5):
        assert not x.any()


def test_no_tokens_give_a_loss_of_zero_and_gradients_of_zero():
    hidden, head, teachers, weights = inputs()
    loss, per_token, d_hidden, d_head = ours(
        hidden[:0], head, [(teachers[0][0][:0], *teachers[0][1:])], weights[:0]
    )
    assert (
        loss == 0
        and per_token.shape == (0,)
        and d_hidden.shape == (0, D)
        and d_head.shape == (V, D)
        and not d_head.any()
    )


def test_the_divergences_are_zero_between_equals_never_negative_and_the_jsd_at_most_log_2():
    torch.manual_seed(0)
    s, t = (
        torch.randn(200, 50, dtype=torch.float64) * 5,
        torch.randn(200, 50, dtype=torch.float64) * 5,
    )
    for kind in KINDS:
        value = divergence(s, t, k=10, kind=kind)
        assert (value > 0).all() and divergence(s, s, k=10, kind=kind).abs().max() < 1e-12
    assert divergence(s, t, k=10).max() <= math.log(2)
    far = 1e3 * torch.eye(4, dtype=torch.float64)
    assert divergence(far, far.flip(0), k=2).sub(math.log(2)).abs().max() < 1e-5


def test_with_the_whole_vocabulary_the_jsd_is_symmetric_and_the_kl_divergences_mirror_each_other():
    torch.manual_seed(0)
    s, t = torch.randn(2, 9, V, dtype=torch.float64)
    same(
        [divergence(s, t, beta=0.3), divergence(s, t, kind="forward_kl")],
        [divergence(t, s, beta=0.7), divergence(t, s, kind="reverse_kl")],
    )


def test_the_order_of_the_vocabulary_does_not_matter():
    hidden, head, [(teacher, teacher_head, c)], weights = inputs()
    shuffle = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    a = ours(hidden, head, [(teacher, teacher_head, c)], weights, k=5)
    b = ours(hidden, head[shuffle], [(teacher, teacher_head[shuffle], c)], weights, k=5)
    same([*a[:3], a[3][shuffle]], b)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precisions_stay_close_to_float64_and_return_fp32(kind, dtype, tol):
    args = inputs(n=40, vocab=300, width=32, dtype=dtype, scale=0.2)
    exact = reference(*args, k=20, kind=kind)
    exact[1][args[3] == 0] = 0
    found = ours(*args, k=20, kind=kind, chunk=16)
    assert (
        found[0].dtype == found[1].dtype == torch.float32
        and found[2].dtype == found[3].dtype == dtype
    )
    for x, y in zip(found, exact, strict=True):
        assert (x.double() - y).norm() <= tol * y.norm()


def test_the_gradient_of_a_bf16_head_is_accumulated_in_fp32():
    hidden, head, teachers, weights = inputs(
        n=120, vocab=50, width=8, dtype=torch.bfloat16, scale=0.3
    )
    _, _, _, whole = ours(hidden, head, teachers, weights, k=5, chunk=120)
    _, _, _, single = ours(hidden, head, teachers, weights, k=5, chunk=1)
    assert (
        whole.double() - single.double()
    ).norm() < 1e-3 * whole.double().norm()  # sums in bf16 lose 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_and_extreme_logits_give_no_nan(kind, dtype):
    torch.manual_seed(0)
    s, t = torch.randn(6, V).to(dtype), torch.randn(6, V).to(dtype)
    s[0, 5:], t[0, 5:] = -math.inf, -math.inf  # fewer possible tokens than k
    s[1, 3], t[2, 4] = -math.inf, -math.inf  # impossible for one of the two
    t[3, :20] = -math.inf  # the teacher's mass may lie wholly in the tail
    s[4], t[4] = s[4] * 1e4, t[4] * 1e4
    s[5, 0], t[5, 1] = 1e4, 1e4  # both certain, of different tokens
    s.requires_grad_()
    for k in (1, 8, V):
        value = divergence(s, t, k=k, kind=kind)
        (grad,) = torch.autograd.grad(value.sum(), s)
        assert value.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_hidden_states_give_no_nan(kind):
    hidden, head, teachers, weights = inputs(dtype=torch.float32, scale=1e4)
    for k in (1, 8, V):
        found = ours(hidden, head, teachers, weights, kind, k=k)
        assert all(x.isfinite().all() for x in found)
        logits = (hidden @ head.T).detach(), teachers[0][0] @ teachers[0][1].T
        same([found[1]], [divergence(*logits, k=k, kind=kind) * (weights > 0)], 1e-4)


def test_the_upstream_gradient_scales_both_gradients_and_a_second_backward_is_refused():
    args = inputs()
    _, _, d_hidden, d_head = ours(*args, k=5)
    hidden, head, teachers, weights = args
    loss, _ = topk_divergence(hidden, head, teachers, weights, k=5)
    (loss * -3).backward(retain_graph=True)
    same([hidden.grad, head.grad], [-3 * d_hidden, -3 * d_head])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_needs_no_gradient_gets_none_and_the_other_stays_right(frozen):
    hidden, head, teachers, weights = inputs()
    _, _, d_hidden, d_head = ours(hidden, head, teachers, weights, k=5)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    topk_divergence(hidden, head, teachers, weights, k=5)[0].backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (head.grad is None) == (
        frozen == "head"
    )
    same(
        [head.grad if frozen == "hidden" else hidden.grad],
        [d_head if frozen == "hidden" else d_hidden],
    )


class Watch(TorchDispatchMode):
    """Counts matmuls, and the tensors at least as big as one chunk's logits by their memory."""

    def __init__(self, big):
        super().__init__()
        self.big, self.largest, self.storages, self.matmuls = big, 0, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.matmuls += "mm" in func.__name__
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                if x.numel() >= self.big:
                    self.storages.add(x.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("n", [16, 500])
def test_only_three_chunks_of_logits_exist_whatever_the_number_of_tokens(n):
    hidden, head, teachers, weights = inputs(n=n + 2, vocab=400)  # two have weight 0
    with Watch(16 * 400) as watch:
        topk_divergence(hidden, head, teachers, weights, k=5, chunk=16)[0].backward()
    assert watch.largest == 16 * 400 and len(watch.storages) == 3
    assert watch.matmuls == 4 * math.ceil(n / 16)


def test_without_gradients_only_the_two_forward_matmuls_are_done():
    hidden, head, teachers, weights = inputs()
    with torch.no_grad(), Watch(0) as watch:
        loss, _ = topk_divergence(hidden, head, teachers, weights, k=5)
    assert watch.matmuls == 2 and not loss.requires_grad
    same([loss], [ours(hidden, head, teachers, weights, k=5)[0]])


def test_agreement_says_whether_teacher_and_student_prefer_the_same_of_the_top_k():
    head = torch.eye(4)
    student = torch.tensor(
        [
            [3.0, 2.0, 1.0, 0.0],
            [3.0, 2.0, 1.0, 0.0],
            [0.0, 1.0, 2.0, 3.0],
            [3.0, 2.0, 1.0, 0.0],
            [3.0, 2.0, 1.0, 0.0],
        ]
    )
    teacher = torch.tensor(
        [
            [5.0, 0.0, 0.0, 0.0],
            [0.0, 5.0, 0.0, 0.0],
            [0.0, 0.0, 1.0, 3.0],
            [1.0, 0.0, 0.0, 9.0],
            [5.0, 0.0, 0.0, 0.0],
        ]
    )
    weights = torch.tensor(
        [1.0, 1.0, 1.0, 1.0, 0.0]
    )  # 3: the teacher's first, 3, is not among the student's two: 0 is best
    loss, per_token, agree = topk_divergence(
        student, head, [(teacher, head, 1.0)], weights, k=2, chunk=2, agreement=True
    )
    assert agree.tolist() == [True, False, True, True, False] and agree.dtype == torch.bool
    torch.testing.assert_close(per_token[:4], divergence(student, teacher, k=2)[:4])


def test_a_divergence_without_a_case_is_no_other_one(monkeypatch):
    monkeypatch.setattr("loss.KINDS", (*KINDS, "mine"))
    for call in (
        lambda: divergence(torch.zeros(2, 5), torch.ones(2, 5), kind="mine"),
        lambda: ours(*inputs(), kind="mine"),
    ):
        with pytest.raises(ValueError, match="divergence 'mine' has no case here"):
            call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "kl"}, "divergence is 'kl', expected one of jsd, forward_kl, reverse_kl"),
        ({"beta": 0.0}, "beta is 0.0, expected a number strictly between 0 and 1.*forward_kl"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"k": 0}, "k is 0 and chunk is 512, expected both to be at least 1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"weights": torch.ones(3)}, r"weights is \(3,\), expected \(7,\): one weight per row"),
        ({"teachers": []}, "teachers is empty"),
        (
            {"teachers": [(torch.ones(N, 2), torch.ones(V + 1, 2), 1.0)]},
            r"teachers\[0\]: .*head is \(24, 2\), expected .* \(23, D\)",
        ),
        (
            {"teachers": [(torch.ones(2, 2), torch.ones(V, 2), 1.0)]},
            r"teachers\[0\]: hidden is \(2, 2\).*expected \(7, D\)",
        ),
        (
            {"student_head": torch.ones(V, D + 1)},
            r"student: hidden is \(7, 5\) and head is \(23, 6\)",
        ),
        (
            {"student_hidden": torch.ones(1, N, D)},
            r"student: hidden is \(1, 7, 5\).*one row per token",
        ),
        (
            {
                "teachers": [
                    (torch.ones(N, 2, dtype=dtype), torch.ones(V, 2, dtype=dtype), 0.5)
                    for dtype in (torch.float64, torch.float32)
                ]
            },
            r"teachers\[1\]: .*expected one dtype, the same for all teachers",
        ),
        (
            {"student_hidden": torch.ones(N, D)},
            "student: hidden is torch.float32 and head is torch.float64.*Cast",
        ),
    ],
)
def test_wrong_arguments_are_named_with_what_was_expected(change, message):
    arguments = dict(zip(("student_hidden", "student_head", "teachers", "weights"), inputs()))
    with pytest.raises(ValueError, match=message):
        topk_divergence(**{**arguments, **change})
