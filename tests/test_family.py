"""The successors of Vision-OPD: what they make of the extra view, against formulas of full logits
in float64, left to autograd or to loops."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from conftest import noise
from PIL import ImageDraw
from test_loss import kl
from torch import float64
from torch.autograd import grad

import methods
import train
from loss import topk_divergence
from rollout import Rollout
from storage.images import load_image
from triplets import views
from triplets.format import RED, Triplet

pytestmark = pytest.mark.core

N, V, K = 9, 23, 6  # tokens, vocabulary, compared
END = 3  # ends a response
MEAN = 0.2  # JSD of teacher and student over the batch (cv-opd)


def settings_of(flags):
    return train.parse(f"--steps 1 --device cpu {flags}".split())


def method_of(name, flags=""):
    method = methods.METHODS[name](settings_of(f"--method {name} {flags}"))
    method.mean = MEAN
    method.ends = torch.tensor([END])  # (vcsd)
    return method


def draw_logits(n=N, scale=3.0):
    """Of student, teacher and extra view, (n, V) float64, more and more peaked. For every second
    token the extra view is on the other side of the student than the teacher."""
    generator = torch.Generator().manual_seed(0)
    peaks = torch.linspace(0.1, 1, n, dtype=float64)[:, None]
    drawn = torch.randn(3, n, V, generator=generator, dtype=float64)
    student, teacher, extra = scale * peaks * drawn
    extra[::2] = 1.5 * student[::2] - 0.5 * teacher[::2] + 0.1 * extra[::2]
    return student, teacher, extra


def events_of(logits, top, k):
    """Probabilities of the tokens `top` and of all others together."""
    p = logits.softmax(-1)
    chosen = p.gather(-1, top)
    if k >= V:
        return chosen
    return torch.cat([chosen, (1 - chosen.sum(-1, keepdim=True)).clamp(min=1e-7)], -1)


# --------------------------------------------------------------------------------------- formulas
# (s, t, x, top, floor) -> each token's loss; probabilities of K + 1 events, s with a gradient.


def jsd(p, q):
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def opd_aha(s, t, x, top, floor):
    q = torch.where(t >= floor * t.amax(-1, keepdim=True), t**5 / x**4, t)
    return jsd(q / q.sum(-1, keepdim=True), s)


def ead(s, t, x, top, floor):
    now = s.detach()
    weights = []
    for s_i, t_i, x_i in zip(now, t, x, strict=True):
        u, e = (t_i - s_i) / s_i.sqrt(), (s_i - x_i) / s_i.sqrt()
        length = u.norm() * e.norm()
        weights.append(max(float(u @ e / length), 0.0) if length > 0 else 0.0)
    return torch.tensor(weights, dtype=float64) * jsd(t, s)


def vad(s, t, x, top, floor):
    losses = []
    for s_i, t_i, x_i in zip(s, t, x, strict=True):
        f_s, f_t, f_x = ((p.detach() + 1e-8).log() for p in (s_i, t_i, x_i))
        f_s, f_t, f_x = f_s - f_s.mean(), f_t - f_t.mean(), f_x - f_x.mean()
        r, u = f_t - f_s, f_t - f_x
        b = max(float(r @ u), 0) / (float(u @ u) + 1e-3)
        up, down = u * (u > 0), u * (u < 0)
        s_up, s_down = max(float(r @ up), 0), max(float(r @ down), 0)
        both = s_up + s_down + 1e-8
        explained = torch.zeros_like(u)
        if up.norm() > 0:
            explained += min(s_up / both, 0.8) * up / up.norm()
        if down.norm() > 0:
            explained += s_down / both * down / down.norm()
        explained *= abs(b) * u.norm()
        q = (f_s + explained.clamp(-20, 20)).softmax(-1)
        left = 1 - float(explained.norm()) / float(r.norm()) if r.norm() > 0 else 1.0
        losses.append(jsd(q, s_i) + 0.1 * min(max(left, 0), 1) * jsd(t_i, s_i))
    return torch.stack(losses)


def vcsd(s, t, x, top, floor):
    is_end = torch.zeros_like(t, dtype=torch.bool)
    is_end[:, : top.shape[1]] = top == END
    tilted = torch.where((t >= floor * t.amax(-1, keepdim=True)) & ~is_end, t * t / x, t)
    q = tilted / tilted.sum(-1, keepdim=True)
    q, s = q.sqrt(), s.sqrt()
    return 4 * kl(q / q.sum(-1, keepdim=True), s / s.sum(-1, keepdim=True))


def cv_opd(s, t, x, top, floor):
    to_teacher = jsd(t, s)
    margin = 0.1 * (0.1 + to_teacher - jsd(x, s)).clamp(min=0) * (to_teacher.detach() > MEAN)
    return to_teacher + margin - 0.01 * (margin.detach() > 0)


FORMULAS = {
    "opd-aha": (opd_aha, 0.0),
    "ead": (ead, 0.0),
    "vad": (vad, 0.0),
    "vcsd": (vcsd, 0.1),
    "cv-opd": (cv_opd, 0.0),
}


def found_and_wanted(name, logits, k=K, flags="", chunk=4, floor=None):
    """(values, gradient of their weighted sum) of topk_divergence, and of the formula."""
    method = method_of(name, flags)
    formula, default_floor = FORMULAS[name]
    student, teacher, extra = logits
    head = torch.eye(V, dtype=float64)
    weights = torch.rand(len(student), generator=torch.Generator().manual_seed(1), dtype=float64)
    hidden = student.clone().requires_grad_()
    loss, values = topk_divergence(
        hidden,
        head,
        [(teacher, head, 1.0)],
        weights,
        k=k,
        kind=method.settings.divergence,
        chunk=chunk,
        extra=[(extra, head, 1.0)],
        target=method.target,
    )
    (gradient,) = grad(loss, hidden)
    leaf = student.clone().requires_grad_()
    top = student.topk(min(k, V)).indices
    s, t, x = (events_of(each, top, k) for each in (leaf, teacher, extra))
    wanted = formula(s, t, x, top, default_floor if floor is None else floor)
    return (values, gradient), (wanted.detach(), grad(wanted @ weights, leaf)[0])


@pytest.mark.parametrize("k", [1, K, V, V + 9])
@pytest.mark.parametrize("name", FORMULAS)
def test_target_loss_and_gradient_are_those_of_the_formula(name, k):
    for chunk in (2, 100):
        found, wanted = found_and_wanted(name, draw_logits(), k, chunk=chunk)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    assert wanted[1].norm() > 0


@pytest.mark.parametrize("name", ["opd-aha", "vcsd"])
def test_a_floor_keeps_unlikely_tokens_from_being_tilted(name):
    flags = "--tilt-floor 0.4"
    found, wanted = found_and_wanted(name, draw_logits(), flags=flags, floor=0.4)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    without, _ = found_and_wanted(name, draw_logits())
    assert (found[0] - without[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FORMULAS)
def test_equal_distributions_give_no_loss_and_no_gradient(name):
    one = draw_logits()[0]
    (values, gradient), _ = found_and_wanted(name, [one, one.clone(), one.clone()])
    assert values.abs().max() < 1e-7
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("name", FORMULAS)
def test_tokens_that_cannot_be_give_no_nan(name):
    student, teacher, extra = draw_logits()
    for number, each in enumerate((student, teacher, extra)):
        each[:, number] = -1e5  # a probability of 0 for one of the three
    found, _ = found_and_wanted(name, [student, teacher, extra])
    assert all(each.isfinite().all() for each in found)


def test_s2vopd_compares_the_teachers_top_k_renormalised():
    student, teacher, _ = draw_logits()
    head, weights = torch.eye(V, dtype=float64), torch.ones(N, dtype=float64)
    hidden = student.clone().requires_grad_()
    for k in (1, K, V):
        loss, values = topk_divergence(
            hidden, head, [(teacher, head, 1.0)], weights, k=k, chunk=4, teachers_top=True
        )
        leaf = student.clone().requires_grad_()
        top = teacher.topk(k).indices
        s, t = (each.gather(-1, top).softmax(-1) for each in (leaf, teacher))
        wanted = jsd(t, s)
        torch.testing.assert_close(values, wanted.detach(), rtol=1e-8, atol=1e-10)
        expected = grad(wanted.sum(), leaf)[0]
        torch.testing.assert_close(grad(loss, hidden)[0], expected, rtol=1e-6, atol=1e-10)


# ---------------------------------------------------------------------------------- token weights


def micro_of(lengths, group, seed=0):
    """A micro-batch of responses of these lengths, and the log-probability ratios of its tokens:
    lists of numbers."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids = torch.randint(V, mask.shape, generator=generator)
    rollout = Rollout(ids, mask, mask.any(1), torch.zeros(mask.shape))
    head, n = torch.eye(V, dtype=float64), int(mask.sum())
    teacher, extra = torch.randn(2, n, V, generator=generator, dtype=float64)
    micro = methods.Micro([None] * (len(lengths) // group), {}, rollout)
    micro.sides["teacher"].append((teacher, head, 1.0))
    micro.sides["extra"].append((extra, head, 1.0))
    ratio = (teacher.log_softmax(-1) - extra.log_softmax(-1)).gather(-1, ids[mask][:, None])
    return micro, [each.flatten().tolist() for each in ratio.split(lengths)]


def z_scores(means):
    spread = np.std(means) + 1e-6
    return [(mean - np.mean(means)) / spread for mean in means]


def opd_v(ratios, tokens, responses):
    return [[max(a, 0) / tokens for a in response] for response in ratios]


def v_zero(ratios, tokens, responses):
    z = z_scores([np.mean(response) for response in ratios])
    counts = [min(max(1 + 0.5 * each, 0), 2) for each in z]
    return [[w / tokens] * len(r) for w, r in zip(counts, ratios, strict=True)]


def va_opd(ratios, tokens, responses):
    gained = [[max(a, 0) for a in response] for response in ratios]
    powers = [math.exp(z) for z in z_scores([np.mean(response) for response in gained])]
    weights = []
    for power, response in zip(powers, gained, strict=True):
        share = power / sum(powers) * len(ratios) / responses
        first = math.ceil(0.2 * len(response))
        order = sorted(range(len(response)), key=lambda i: -response[i])
        each = [0.5 / max(1, len(response) - first)] * len(response)
        for i in order[:first]:
            each[i] = (0.5 if len(response) > first else 1.0) / first
        weights.append([share * w for w in each])
    return weights


WEIGHTS = {"opd-v": opd_v, "v-zero": v_zero, "va-opd": va_opd}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("group, lengths", [(4, [5, 12, 1, 7, 3, 3, 9, 2]), (2, [6, 1])])
def test_token_weights_are_those_of_the_formula(name, group, lengths):
    method = method_of(name, f"--group {group} --chunk 3")
    micro, ratios = micro_of(lengths, group)
    count = {"tokens": 100, "responses": 16}
    found = method.token_weights(micro, count)
    wanted = []
    for i in range(0, len(lengths), group):
        wanted += WEIGHTS[name](ratios[i : i + group], 100, 16)
    for row, mask, want in zip(found, micro.rollout.mask, wanted, strict=True):
        assert row[mask].tolist() == pytest.approx(want, rel=1e-4, abs=1e-9)


# ------------------------------------------------------------------------------------------- views


@pytest.fixture
def row():
    picture = noise(90, 60, 1)
    picture.paste((200, 30, 40), (40, 20, 60, 36))
    picture.putpixel((50, 30), (0, 0, 0))
    crop = picture.crop((40, 20, 60, 36)).resize((40, 32))
    return Triplet("r7", "what ?", picture, [crop], [[40, 20, 60, 36]])


@pytest.mark.parametrize("view", ["mean_colour", "black", "coarse", "masked_crop", "masked_box"])
def test_a_view_has_the_size_of_what_it_is_made_of(view, row):
    whole = row.image if view == "masked_box" else row.crops[0]
    changed = getattr(views, view)(whole, row, random.Random(0))
    assert changed.size == whole.size
    assert changed.tobytes() != whole.tobytes()
    assert whole.tobytes() == (row.image if view == "masked_box" else row.crops[0]).tobytes()


def test_of_several_boxes_each_is_masked_and_the_other_parts_show_none(row):
    second = [5, 40, 25, 56]
    row.image.paste((30, 200, 40), row.boxes[0])  # no red: that is a frame's
    row.image.paste((30, 40, 200), second)
    row.boxes.append(second)
    row.crops.append(row.image.crop(second).resize((60, 48)))
    before, after = np.asarray(row.image), np.asarray(views.masked_box(row.image, row, None))
    boxed = np.zeros(before.shape[:2], bool)
    for left, top, right, bottom in row.boxes:
        boxed[top:bottom, left:right] = True
        (colour,) = np.unique(after[top:bottom, left:right].reshape(-1, 3), axis=0)
        assert colour.min() > 100 and colour.max() < 160  # of the noise around
    assert (after[~boxed] == before[~boxed]).all()
    shown = methods.View("image", change=views.unrelated_crop)
    for seed in range(20):
        found = shown.change(row.image, row, random.Random(seed))
        assert [each.size for each in found] == [(40, 32), (60, 48)]
        for each, colour in itertools.product(found, ((30, 200, 40), (30, 40, 200))):
            share = (np.asarray(each) == colour).all(-1).mean()
            assert share <= 2 * views.OVERLAP / (1 + views.OVERLAP) + 0.05


def test_a_view_of_the_crop_changes_all_of_them(row, tmp_path):
    row.crops.append(noise(50, 70, 3))
    for n, crop in enumerate(row.crops):
        crop.save(tmp_path / f"{n}.png")
        row.crops[n] = tmp_path / f"{n}.png"
    for change in (None, views.coarse):
        found = methods.View("crop", change=change).pictures(row, 0)
        wanted = list(map(load_image, row.crops))
        wanted = [change(each, row, None) for each in wanted] if change else wanted
        assert [each.tobytes() for each in found] == [each.tobytes() for each in wanted]


@pytest.mark.parametrize("inwards", [0, 1, 3])
def test_the_masked_box_keeps_its_frame_and_all_around_it(inwards, row):
    """A frame round the box, as synth.py draws it, or inside it, as in the toy."""
    picture = noise(90, 60, 1).point(lambda value: value // 2)
    left, top, right, bottom = row.boxes[0]
    if inwards:
        edges = (left, top, right - 1, bottom - 1)
    else:
        edges = (left - 3, top - 3, right + 2, bottom + 2)
    ImageDraw.Draw(picture).rectangle(edges, outline=RED, width=inwards or 3)
    before = np.asarray(picture)
    after = np.asarray(views.masked_box(picture, row, random.Random(0)))
    inside = np.zeros(before.shape[:2], bool)
    inside[top + inwards : bottom - inwards, left + inwards : right - inwards] = True
    assert (after[~inside] == before[~inside]).all()
    red = (before == RED).all(-1)
    around = np.zeros_like(inside)
    around[top - 8 : bottom + 8, left - 10 : right + 10] = True
    around[top:bottom, left:right] = False
    (colour,) = np.unique(after[inside], axis=0)
    assert np.abs(colour - before[around & ~red].mean(0)).max() <= 0.5


def test_an_unrelated_crop_is_not_distorted_where_the_crop_has_margins(row):
    row.crops[0] = row.image.crop((36, 16, 66, 40)).resize((120, 96))  # 4 times
    lines = row.image.copy()
    lines.paste((0, 0, 0), (0, 0, *lines.size))
    lines.paste((255, 255, 255), (0, 50, 90, 53))  # 3 px high and 3 px wide
    lines.paste((255, 255, 255), (10, 0, 13, 60))
    high = wide = 0
    for seed in range(60):
        (found,) = views.unrelated_crop(lines, row, random.Random(seed))
        found = np.asarray(found)[..., 0] > 128
        high = max(high, found.all(1).sum())
        wide = max(wide, found.all(0).sum())
    assert high > 9
    assert abs(high - wide) <= 2


@pytest.mark.parametrize("box", [[40, 20, 41, 21], [0, 0, 90, 60], [88, 58, 90, 60]])
def test_boxes_of_any_size_can_be_masked_and_have_another_part(box, row):
    row.boxes = box and [box]
    masked = views.masked_box(row.image, row, random.Random(0))
    for picture in (masked, *views.unrelated_crop(row.image, row, random.Random(0))):
        assert min(picture.size) > 0


def test_an_unrelated_crop_is_another_part_as_large_as_the_crop(row):
    for seed in range(20):
        (found,) = views.unrelated_crop(row.image, row, random.Random(seed))
        assert found.size == row.crops[0].size
        red = (np.asarray(found) == (200, 30, 40)).all(-1).mean()
        assert red <= 2 * views.OVERLAP / (1 + views.OVERLAP) + 0.05


def test_a_scaled_picture_has_noise_half_of_the_time(row):
    flat = row.image.copy()
    flat.paste((128, 128, 128), (0, 0, *flat.size))
    spreads, scales = [], []
    for seed in range(200):
        found = views.scaled_and_noisy(flat, row, random.Random(seed))
        scales.append(found.width / flat.width)
        spreads.append(np.asarray(found, dtype=float).std() / 255)
    noisy = [spread for spread in spreads if spread > 0]
    assert 70 < len(noisy) < 130
    assert np.mean(noisy) == pytest.approx(views.NOISE, rel=0.05)
    assert 0.29 < min(scales) < 0.34
    assert 0.56 < max(scales) < 0.61


def test_a_view_is_the_same_for_the_same_seed_and_row(row, tmp_path):
    row.image.save(tmp_path / "x.png")
    row.image = tmp_path / "x.png"
    shown = methods.View("image", change=views.scaled_and_noisy)
    pictures = [shown.pictures(row, seed)[0] for seed in (1, 1, 2)]
    assert pictures[0].tobytes() == pictures[1].tobytes() != pictures[2].tobytes()


# ------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize("box", [None, [4, 4, 4, 9], [9, 9, 3, 3], [-1, 0, 5, 5]])
@pytest.mark.parametrize("name", ["ead", "v-zero", "cv-opd"])
def test_data_without_boxes_is_refused_where_a_view_needs_one(name, box, row):
    methods.refuse_unfit(name, [row])
    row.boxes = box and [[1, 2, 9, 10], box]
    with pytest.raises(ValueError, match="boxes"):
        methods.refuse_unfit(name, [row])
    methods.refuse_unfit("s2vopd", [row])


def test_teachers_and_divergences_are_as_published_and_can_be_chosen():
    told = {name: settings_of(f"--method {name}") for name in methods.METHODS if name != "crops"}
    frozen = {name for name, settings in told.items() if settings.teacher == "initial"}
    assert frozen == {"sft", "opd-aha", "vad"}
    assert told["vcsd"].divergence == "soft_forward_kl"
    chosen = settings_of("--method vad --teacher ema --divergence reverse_kl")
    assert (chosen.teacher, chosen.divergence) == ("ema", "reverse_kl")
