"""The paper's methods (Tables 2, 3 and 6): each one's loss, gradient, filter and inputs against a
few plain lines."""

import copy
import math
import random
import shutil
import statistics
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import pytest
import test_family
import torch
from conftest import SMALL, ask, plain_logits, respond, small_run
from torch import Tensor

import loss
import methods
import train
from model import VISION_TOKENS
from rollout import Rollout
from sharding import join_ranks, save_checkpoint
from storage.images import load_image
from toy.tiny import tiny
from triplets import views
from triplets.format import Triplet
from triplets.order import batch_rows

core = pytest.mark.core


# ------------------------------------------------------------------- the losses on sampled tokens


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


IDS = torch.tensor([0, 3, 10, 3, 5, 1, 9])


def picked(logits: Tensor, ids: Tensor) -> Tensor:
    """(n,) log-probabilities of the tokens `ids` (n,) under logits (n, V)."""
    return logits.log_softmax(-1)[range(len(ids)), ids]


@core
@pytest.mark.parametrize("n, chunk", [(7, 1), (7, 3), (7, 100), (0, 100)])
def test_token_log_probs_are_those_of_full_logits_and_so_are_their_gradients(n, chunk):
    """Of a mixture of two, as a trust-region teacher is."""
    hidden = drawn(2, n, 6).requires_grad_()
    heads = drawn(2, 11, 6).requires_grad_()
    sides = [
        (hidden[0], heads[0], 0.95),
        (hidden[1], heads[1], 0.05),
    ]
    chunked = methods.token_log_probs(sides, IDS[:n], chunk)
    logits = hidden @ heads.mT  # (2, n, V)
    plain = picked(0.95 * logits[0] + 0.05 * logits[1], IDS[:n])
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    weights = drawn(n)
    got = torch.autograd.grad(chunked @ weights, [hidden, heads])
    want = torch.autograd.grad(plain @ weights, [hidden, heads])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@core
def test_sampled_token_is_the_reverse_kl_in_expectation_and_so_is_its_gradient():
    """Over all tokens of a vocabulary, weighted by the student's probabilities: no sampling."""
    logits = drawn(2, 9).requires_grad_()
    log_s, log_t = logits.log_softmax(-1)
    now = log_s.detach()
    kl = (log_s.exp() * (log_s - log_t.detach())).sum()
    losses = methods.sampled_token(log_s, log_t, now)
    estimate = (now.exp() * losses).sum()
    torch.testing.assert_close(estimate, kl)
    got = torch.autograd.grad(estimate, logits, retain_graph=True)
    want = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(got, want)


def value_and_slope(formula, ratio: float, **more) -> tuple[float, float]:
    """Of a token whose probability is `ratio` times that at sampling."""
    log_s = torch.tensor([-1.0], requires_grad=True)
    rollout = log_s.detach() - math.log(ratio)
    value = formula(log_s, rollout=rollout, **more)
    value.backward()
    return value.item(), log_s.grad.item()


@core
@pytest.mark.parametrize("ratio, used", [(0.5, 0.5), (1.9, 1.9), (2.1, 2)])
def test_the_importance_ratio_is_cut_off_at_two(ratio, used):
    log_t = torch.tensor([-3.0])
    _, slope = value_and_slope(methods.sampled_token, ratio, log_t=log_t)
    assert slope == pytest.approx(2 * used)


@core
@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.2, 2.0, -2.4, -2.4),
        (1.5, 2.0, -2.56, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_policy_gradient_is_clipped_where_that_is_pessimistic(ratio, advantage, value, slope):
    """-min(r A, clip(r) A), clipped to [0.8, 1.28]."""
    low, high = methods.DAPO.clip
    got = value_and_slope(
        methods.clipped_policy_gradient,
        ratio,
        advantages=torch.tensor([advantage]),
        low=low,
        high=high,
    )
    assert got == pytest.approx((value, slope))


@core
def test_the_overlong_penalty_falls_from_0_to_minus_1_over_the_buffer():
    lengths = torch.tensor([1, 79, 80, 85, 90, 99, 100])
    want = [0, 0, 0, -0.25, -0.5, -0.95, -1]
    penalty = methods.overlong_penalty(lengths, limit=100, buffer=20)
    assert penalty.tolist() == pytest.approx(want)


# --------------------------------------------------------------------------------- what is kept

PROCESSOR = tiny()[1]
GOOD = "a green cross with 7 ."
BAD = "a blue one ."
ROW = Triplet(
    "x",
    "what ?",
    "x",
    ["x"],
    answer=GOOD,
    extra={"toy": "small"},
)


def micro_of(texts: list[str], row: Triplet = ROW) -> methods.Micro:
    """A micro-batch of one prompt, whose responses are these texts."""
    ended = [text + "<|im_end|>" for text in texts]
    batch = PROCESSOR.tokenizer(
        ended,
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    ids = batch["input_ids"]
    all_of_them = torch.ones(len(texts), dtype=torch.bool)
    mask = batch["attention_mask"].bool()
    rollout = Rollout(ids, mask, all_of_them, torch.zeros(ids.shape))
    return methods.Micro([row], {}, rollout, keep=all_of_them)


def select(micros: list, flags: str, further=()) -> tuple[list, list[int]]:
    """(micro-batches, the numbers of the further batches that were answered), as the method's
    select leaves them."""
    answered = []
    settings = train.parse([*SMALL, "--prompts", str(len(micros)), *flags.split()])
    run = SimpleNamespace(
        settings=settings,
        processor=PROCESSOR,
        rank=0,
        world=1,
        device="cpu",
        further_micros=lambda step, i: further[i - 1],
    )
    join_ranks("cpu")
    method = methods.METHODS[settings.method](settings)
    # They have their responses already.
    method.respond = lambda run, micros, step, further: answered.append(further)
    return method.select(run, micros, 0), answered


def test_sft_keeps_the_responses_that_match_the_label():
    choice = Triplet("x", "Which?\n\nA. moss\nB. bark", "x", ["x"], answer="B")
    micro = micro_of(["A", "It is (B)."], choice)
    select([micro], "--method sft")
    assert micro.keep.tolist() == [False, True]


@pytest.mark.parametrize("flags", ["grpo", "dapo --resample 0"])
def test_groups_that_are_all_right_or_all_wrong_are_left_out(flags):
    groups = [GOOD, BAD], [GOOD, GOOD], [BAD, BAD]
    micros = [micro_of(texts) for texts in groups]
    select(micros, f"--max-new-tokens 100 --method {flags}")
    score = 0.5 / math.sqrt(0.5)  # 1 and 0: mean 1/2, deviation sqrt(1/2)
    for micro, advantage in zip(micros, (score, 0, 0), strict=True):
        found = micro.advantages.tolist()
        assert found == pytest.approx([advantage, -advantage], abs=1e-5)
    kept = [bool(micro.keep.all()) for micro in micros]
    assert kept == [True, False, False]


def test_dapo_counts_a_response_that_reaches_the_limit_as_worse():
    micro = micro_of([BAD] * 3)
    limit = int(micro.rollout.mask[0].sum())
    micro.rollout.mask[1, limit - 1 :] = False
    micro.rollout.mask[2, 2:] = False
    select([micro], f"--method dapo --max-new-tokens {limit} --resample 0 --group 3")
    third = 1 / math.sqrt(3)  # rewards -1, 0, 0: deviation sqrt(1/3)
    want = [-2 * third, third, third]
    assert micro.advantages.tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    "resample, batches, kept",
    [
        (9, "1111", "1111"),  # full at once
        (9, "1001 0110", "1001 0110"),  # exactly enough
        (9, "1001 0111", "1001 0110"),  # one too many
        (9, "0001 0000 1111", "0001 0000 1110"),  # two further batches
        (1, "0001 1000 1111", "0001 1000"),  # no more may be drawn
        (0, "0100 1111", "0100"),  # none may be drawn
    ],
)
def test_dapo_draws_until_enough_groups_are_mixed_and_leaves_the_last_ones_out(
    resample, batches, kept
):
    """1: a group of a right and a wrong response; 0: of two wrong ones."""
    texts = {"1": [GOOD, BAD], "0": [BAD, BAD]}

    def micros(batch):
        return [micro_of(texts[group]) for group in batch]

    first, *further = map(micros, batches.split())
    found, answered = select(first, f"--method dapo --resample {resample}", further)
    first, *drawn_on = kept.split()
    assert answered == list(range(1, len(drawn_on) + 1))
    marks = ["1" if micro.keep.all() else "0" for micro in found]
    assert "".join(marks) == kept.replace(" ", "")


# ------------------------------------------------------------------------------- the whole step


def parity(row, text: str) -> bool:
    """Random weights answer nothing right: every fourth text counts as right."""
    return sum(map(ord, row.id + text)) % 4 == 2


class Squared(methods.VisionOPD):
    """A new method, as someone would write it: (log p_student - log p_teacher)^2."""

    def loss(self, micro, hidden, head, weights):
        ids = micro.rollout.ids[micro.rollout.mask]
        log_s = methods.token_log_probs([(hidden, head, 1.0)], ids)
        log_t = methods.token_log_probs(micro.sides["teacher"], ids)
        return methods.weighted((log_s - log_t).square(), weights)


@pytest.fixture
def begin(world, tmp_path, monkeypatch):
    """begin(flags) is a run that is about to take its first step."""
    monkeypatch.setattr(methods, "is_right", parity)
    monkeypatch.setitem(methods.METHODS, "squared", Squared)
    flag = train.Settings.__dataclass_fields__["method"]
    metadata = flag.metadata | {"choices": list(methods.METHODS)}
    monkeypatch.setattr(flag, "metadata", metadata)

    def go(flags):
        settings = train.parse(small_run(world, tmp_path / "run", flags))
        run, _ = train.prepare(settings, *join_ranks("cpu"))
        return run

    return go


def learn(run, step: int) -> dict:
    batch = islice(train.load_ahead(run, step), run.micros_a_step)
    entry, _ = train.learn(run, step, list(batch))
    return entry


@dataclass
class Answer:
    """A response of T tokens, read by plain forwards."""

    ids: Tensor  # (T,)
    logits: Tensor  # (T, V) the student's, with a gradient
    teacher: Tensor  # (T, V)
    extra: Tensor  # (T, V) under the extra view
    right: bool


def token_losses(settings, group: list[Answer]):
    """Whether it is trained on, and its tokens' losses (T,), of each answer to one prompt."""
    rewards = [float(answer.right) for answer in group]
    if settings.method == "dapo":  # with a limit of 6 tokens, the buffer is the last
        rewards = [r - (len(answer.ids) == 6) for r, answer in zip(rewards, group, strict=True)]
    spread = (statistics.stdev(rewards) if len(rewards) > 1 else 0.0) + 1e-6
    ratios = [(picked(a.teacher, a.ids) - picked(a.extra, a.ids)).tolist() for a in group]
    for i, (answer, reward) in enumerate(zip(group, rewards, strict=True)):
        advantage = (reward - statistics.mean(rewards)) / spread
        log_s = picked(answer.logits, answer.ids)
        log_t = picked(answer.teacher, answer.ids)
        one = (log_s - log_s.detach()).exp()  # the policy that wrote it is the policy now
        if settings.method == "sft":
            yield answer.right, -log_s
        elif settings.method == "crops":
            yield True, -log_s
        elif settings.method in ("vad", "vcsd", "cv-opd"):
            top = answer.logits.detach().argsort(-1, descending=True)
            events = (answer.logits, answer.teacher, answer.extra)
            s, t, x = (logits.softmax(-1).gather(-1, top) for logits in events)
            formula, floor = test_family.FORMULAS[settings.method]
            yield True, formula(s, t, x, top, floor)
        elif settings.method in test_family.WEIGHTS:
            weights = test_family.WEIGHTS[settings.method](ratios, tokens=1, responses=1)[i]
            losses = loss.divergence(answer.logits, answer.teacher, k=settings.top_k)
            yield True, torch.tensor(weights) * losses
        elif settings.method == "s2vopd":
            top = answer.teacher.topk(settings.top_k).indices
            s, t = (x.gather(-1, top).softmax(-1) for x in (answer.logits, answer.teacher))
            yield True, test_family.jsd(t, s)
        elif settings.method == "opd-aha":
            q = 5 * answer.teacher.log_softmax(-1) - 4 * answer.extra.log_softmax(-1)
            yield True, loss.divergence(answer.logits, q, k=settings.top_k)
        elif settings.method == "ead":
            s, t, x = (
                each.detach().softmax(-1) for each in (answer.logits, answer.teacher, answer.extra)
            )
            u, e = (t - s) / s.sqrt(), (s - x) / s.sqrt()
            cosine = (u * e).sum(-1) / (u.norm(dim=-1) * e.norm(dim=-1))
            losses = loss.divergence(answer.logits, answer.teacher, k=settings.top_k)
            yield True, cosine.clamp(min=0) * losses
        elif settings.method == "grpo":
            yield advantage != 0, -one * advantage
        elif settings.method == "dapo":
            yield len({other.right for other in group}) == 2, -one * advantage
        elif settings.method == "squared":
            yield True, (log_s - log_t) ** 2
        elif settings.objective == "sampled-token":
            vision = PROCESSOR.tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
            allowed = answer.logits.index_fill(-1, torch.tensor(vision), -math.inf)
            ratio = (log_s - picked(allowed, answer.ids)).detach().exp()
            yield True, ratio * (log_s - log_t).detach() * one
        else:
            options = {"k": settings.top_k, "kind": settings.divergence}
            yield True, loss.divergence(answer.logits, answer.teacher, **options)


EXTRA_VIEWS = {
    "opd-aha": ("crop", views.mean_colour),
    "ead": ("image", views.masked_box),
    "vad": ("crop", views.coarse),
    "opd-v": ("crop", views.masked_crop),
    "vcsd": ("image", views.black),
    "va-opd": ("crop", views.coarse),
    "v-zero": ("image", views.unrelated_crop),
    "cv-opd": ("image", views.unrelated_crop),
}


SEED = 7  # with which no random number lies on the edge between two tokens


def read_answers(run, row: Triplet, initial, student, ema) -> list[Answer]:
    """The answers to a row in the second step, and what student and teacher say about them."""
    settings, processor = run.settings, run.processor
    full = ask(processor, row.image, row.question)
    shown = ask(processor, row.crops[0], row.question)
    if settings.method == "opsd":
        hint = (
            f"\n\nHere is a reference solution to this problem:\n{row.answer}\n\n"
            "After understanding the reference solution, please try to solve this problem using "
            "your own approach below:"
        )
        shown = ask(processor, row.image, row.question + hint)
    writer, asked = (student, full)
    if settings.method in ("sft", "off-policy"):
        writer, asked = ema, shown
    extra, reader = shown, student if settings.method == "ead" else ema
    if settings.method in EXTRA_VIEWS:
        name, change = EXTRA_VIEWS[settings.method]
        draw = random.Random(f"{SEED}/{row.id}")
        (seen,) = row.shown(name)
        extra = ask(processor, change(load_image(seen), row, draw), row.question)
    if settings.method in ("vcsd", "s2vopd"):
        shown = full
    if settings.method == "s2vopd":
        draw = random.Random(f"{SEED}/{row.id}")
        small = views.scaled_and_noisy(load_image(row.image), row, draw)
        asked = full = ask(processor, small, row.question)
    group = []
    answers = respond(writer, processor, asked, 3, f"{SEED}/1/{row.id}")
    if settings.method == "crops":
        full = shown
        ids = processor.tokenizer(row.answer + processor.tokenizer.eos_token)["input_ids"]
        answers = [torch.tensor(ids)[: settings.max_new_tokens]]
    for ids in answers:
        with torch.no_grad():
            teacher = plain_logits(ema, shown, ids)
            if settings.teacher == "trust-region":
                mixed = 0.7 * plain_logits(initial, shown, ids)
                teacher = mixed + 0.3 * plain_logits(student, shown, ids)
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        logits = plain_logits(student, full, ids)
        with torch.no_grad():
            tilted = plain_logits(reader, extra, ids)
        group.append(Answer(ids, logits, teacher, tilted, parity(row, text)))
    return group


@core
@pytest.mark.parametrize(
    "flags",
    [
        "--objective sampled-token",
        "--teacher trust-region --trust 0.3",
        "--teacher current --divergence forward_kl",
        "--method opsd",
        "--method sft",
        "--method grpo",
        "--method dapo --resample 0",
        "--method squared",
        "--method off-policy",
        "--method crops --group 1",
        "--method opd-aha --top-k 9999",
        "--method ead --top-k 9999",
        "--method vad --top-k 9999",
        "--method vcsd --top-k 9999",
        "--method opd-v",
        "--method va-opd",
        "--method v-zero",
        "--method cv-opd --top-k 9999",
        "--method s2vopd --top-k 9",
    ],
)
def test_a_step_has_the_loss_and_gradient_of_plain_forwards_and_a_formula(
    flags, begin, monkeypatch
):
    """`squared` is a method that is not ours: a class, and a line in METHODS."""
    run = begin(f"--prompts 2 --group 3 --seed {SEED} {flags}")
    settings, shards = run.settings, run.shards
    initial = copy.deepcopy(shards.publish("student"))
    learn(run, 0)  # moves the student away from where it began
    student = copy.deepcopy(shards.publish("student")).requires_grad_()
    ema = copy.deepcopy(initial)
    rate = {"ema": 0.05, "current": 1.0}.get(settings.teacher, 0.0)
    for weight, now in zip(ema.parameters(), student.parameters(), strict=True):
        weight.lerp_(now.detach(), rate)
    shards.update = lambda *args: None  # the gradients stay
    entry = learn(run, 1)

    batch = [run.rows[i] for i in batch_rows(len(run.rows), 2, SEED, 1)]
    groups = [read_answers(run, row, initial, student, ema) for row in batch]
    monkeypatch.setattr(test_family, "END", PROCESSOR.tokenizer.eos_token_id)
    answers = [answer for group in groups for answer in group]
    apart = [loss.divergence(each.logits.detach(), each.teacher, k=9999) for each in answers]
    monkeypatch.setattr(test_family, "MEAN", torch.cat(apart).mean())
    kept = []
    for group in groups:
        kept += [losses for trained_on, losses in token_losses(settings, group) if trained_on]
    total = torch.cat(kept).mean()
    if settings.method in ("grpo", "ead"):
        total = torch.stack([losses.mean() for losses in kept]).sum() / 6
    if settings.method == "va-opd":
        total = torch.cat(kept).sum() / 6
    total.backward()

    assert entry["tokens"] == sum(map(len, kept))
    assert entry["loss"] == pytest.approx(total.item(), rel=1e-3, abs=1e-5)
    want = [weight.grad.flatten() for weight in student.parameters()]
    got = [weight.grad.full_tensor().flatten() for weight in shards.weights]
    gradient = torch.cat(want)
    assert gradient.norm() > 0
    assert (torch.cat(got) - gradient).norm() < 1e-3 * gradient.norm()
    if not run.method.distils and settings.method != "crops":
        right = sum(answer.right for group in groups for answer in group)
        assert entry["right"] == right / 6
        assert entry["kept"] == len(kept) / 6
        assert len(kept) < 6, "the filter must have work"


def test_dapos_further_batches_are_an_epoch_in_an_order_of_their_own(begin):
    run = begin("--method dapo --prompts 2 --resample 3 --seed 5")
    drawn = [row.id for step in (0, 1) for i in (1, 2, 3) for row in further_rows(run, step, i)]
    main = [run.rows[j].id for step in range(6) for j in batch_rows(12, 2, 5, step)]
    assert sorted(drawn) == sorted(main)
    assert drawn != main


def further_rows(run, step: int, i: int) -> list[Triplet]:
    return [row for micro in run.further_micros(step, i) for row in micro.rows]


def test_a_further_batch_has_random_numbers_of_its_own(begin):
    run = begin("--method dapo --prompts 2 --group 3 --seed 5")
    micros = run.further_micros(1, 2)
    run.method.respond(run, micros, 1, further=2)
    student = run.shards.publish("student")
    for micro in micros:
        got = [ids[mask] for ids, mask in zip(micro.rollout.ids, micro.rollout.mask, strict=True)]
        for i, row in enumerate(micro.rows):
            asked = ask(run.processor, row.image, row.question)
            want = respond(student, run.processor, asked, 3, f"5/1/2/{row.id}")
            assert list(map(list, got[3 * i : 3 * i + 3])) == list(map(list, want))


# -------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize("method", ["opsd", "sft", "grpo", "dapo"])
def test_methods_that_need_answers_say_so(method, begin, world, tmp_path):
    table = shutil.copytree(world / "data", tmp_path / "data") / "train.jsonl"
    table.write_text(table.read_text().replace('"answer"', '"note"'))
    with pytest.raises(ValueError, match="needs answers, and samples"):
        begin(f"--method {method} --data {table.parent}")


def test_changed_answers_are_another_run_where_answers_matter(begin, world, tmp_path):
    table = shutil.copytree(world / "data", tmp_path / "data") / "train.jsonl"

    def begin_one(method):
        out = tmp_path / method
        return begin(f"--data {table.parent} --out {out} --method {method}")

    for method in ("vision-opd", "sft"):
        run = begin_one(method)
        save_checkpoint(tmp_path / method, 1, run.processor, run.shards)
    table.write_text(table.read_text().replace('"answer": "a ', '"answer": "one '))
    begin_one("vision-opd")
    with pytest.raises(ValueError, match="rows_sha256"):
        begin_one("sft")
