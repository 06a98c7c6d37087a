"""What the paper compares (Tables 2, 3, 4 and 6): each method is a class, Vision-OPD the first and
the shortest. A new one is one class and one line in METHODS.

    method       who answers          what the teacher reads      loss of a token
    vision-opd   student, full image  the crop                    divergence (loss.py)
    opsd         student, full image  full image, and the answer  the same
    sft          teacher, crop        -                           cross-entropy, if right
    grpo, dapo   student, full image  -                           policy gradient, reward 1 if right
    off-policy   teacher, crop        the crop                    divergence
    crops        the label, a crop    -                           cross-entropy

Its successors are classes too: what one more view of the row makes of the target, or of a token's
weight (opd-aha, ead, vad, opd-v, vcsd, va-opd, v-zero, cv-opd), or another view for the student
(s2vopd).

A method decides three things, in this order, within train.py's step:

    respond(run, micros, step)    who answers what: sets each micro-batch's rollout
    select(run, micros, step)     what is trained on: keep, and what a response is worth
    loss(micro, hidden, ..)       a token's loss
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize, pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from benchmarks.scoring import is_right
from benchmarks.sources import triplet_question
from loss import DIVERGENCES, Target, topk_divergence
from model import Prompt, encode, join, response_hidden, to_device
from rollout import Rollout, sample
from sharding import over_ranks
from storage.images import image_size, load_image
from triplets import views
from triplets.format import Triplet

OPSD_HINT = (
    "\n\nHere is a reference solution to this problem:\n{answer}\n\nAfter understanding the "
    "reference solution, please try to solve this problem using your own approach below:"
)


@dataclass
class View:
    """What a model is shown beside the question."""

    image: str  # of a triplet: "image" (the full one) or "crop" (all of them)
    hint: str = ""  # added to the question; {answer} is the label
    change: Callable | None = None  # of triplets/views.py: (picture, row, draw) -> picture, or more

    def pictures(self, row: Triplet, seed: int) -> list[Image]:
        """The same for the same seed and row."""
        pictures = list(map(load_image, row.shown(self.image)))
        if self.change is None:
            return pictures
        draw, changed = self.draw(row, seed), []
        for picture in pictures:
            new = self.change(picture, row, draw)
            changed += new if isinstance(new, list) else [new]
        return changed

    def sizes(self, row: Triplet, seed: int) -> list[tuple[int, int]]:
        """(width, height) of the pictures in pixels, by the headers of the row's files."""
        sizes = list(map(image_size, row.shown(self.image)))
        if self.change not in views.SIZES:
            return sizes
        return views.SIZES[self.change](sizes, row, self.draw(row, seed))

    def draw(self, row: Triplet, seed: int) -> random.Random:
        return random.Random(f"{seed}/{row.id}")

    def text(self, row: Triplet) -> str:
        """What stands after the images. The newline is the official training prompt's; its
        evaluation, and ours, have none."""
        return "\n" + row.question + self.hint.format(answer=row.answer)


@dataclass
class Micro:
    """Some of this rank's prompts and their responses: one forward and backward of the student.

    B prompts, N = B G responses, T tokens the longest, n of them trained on.
    """

    rows: list[Triplet]  # B
    prompts: dict[str, Prompt]  # the student's; the teacher's and the extra one, if they have views
    rollout: Rollout | None = None  # set by respond
    keep: Tensor | None = None  # (N,) bool, which responses are trained on
    right: Tensor | None = None  # (N,) bool, which match the label
    advantages: Tensor | None = None  # (N,) fp32, what a response is worth (grpo, dapo)
    # [(hidden (n, D), head (V, D), share)] a view: the logits of "teacher", and of "extra"
    sides: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    shown: bool = False  # whether the report wants to look at it
    moved: list[Tensor] = field(default_factory=list)  # what `watched` then notes, (n,) in all

    @property
    def sampled(self) -> Tensor:
        """(n,) ids of the tokens that are trained on."""
        return self.rollout.ids[self.rollout.mask]


# -------------------------------------------------------------------------------------- Vision-OPD


class VisionOPD:
    """The student answers from the full image and is pulled, token by token, toward what the
    teacher says about the same answer when it is shown the crop (paper, Eq. 3 and 4)."""

    student_view = View("image")
    teacher_view = View("crop")
    extra_view = None  # one more view, which the responses are read under
    extra_by = "teacher"  # whose weights read them
    target = None  # what is made of it: see loss.Target; None: the teacher itself
    teachers_top = False  # compare the teacher's top K, renormalised, not the student's and a tail
    default_teacher = "ema"
    default_divergence = "jsd"
    tilt_floor = 0.0
    needs_boxes = False
    distils = True  # there are targets: the teacher reads the responses
    needs_answers = False
    writer = "student"  # whose weights answer, to a prompt of its own; None: nobody's

    def __init__(self, settings):
        self.settings = settings
        if settings.tilt_floor is not None:
            self.tilt_floor = settings.tilt_floor

    def teacher_sides(self) -> dict[str, float]:
        """Whose weights make the teacher's logits, and their shares."""
        if self.settings.teacher == "trust-region":
            return {"teacher": 1 - self.settings.trust, "student": self.settings.trust}
        return {"teacher": 1.0}

    def respond(self, run, micros: list[Micro], step: int, further: int = 0) -> None:
        write(run, micros, self.writer, step, further)

    def select(self, run, micros: list[Micro], step: int) -> list[Micro]:
        return micros

    def extra_sides(self) -> dict[str, float]:
        """Whose weights make the logits under the extra view, and their shares."""
        if self.extra_view is None:
            return {}
        return self.teacher_sides() if self.extra_by == "teacher" else {"student": 1.0}

    def survey(self, run, micros: list[Micro]) -> None:
        """What needs all of a step's micro-batches once the teacher has read them."""

    def loss(self, micro: Micro, hidden: Tensor, head: Tensor, weights: Tensor) -> tuple:
        """hidden (n, D) and head (V, D) of the student, weights (n,) -> the weighted sum, scalar;
        each token's loss (n,); whether teacher and student agree on it (n,), or None."""
        settings = self.settings
        if settings.objective == "sampled-token":
            return weighted(sampled_token_loss(micro, hidden, head, settings.chunk), weights)
        target = self.target
        if target and micro.shown:
            target = watched(target, micro.moved)
        return topk_divergence(
            hidden,
            head,
            micro.sides["teacher"],
            weights,
            k=settings.top_k,
            beta=settings.beta,
            kind=settings.divergence,
            chunk=settings.chunk,
            agreement=True,
            extra=micro.sides["extra"] if target else [],
            target=target,
            teachers_top=self.teachers_top,
        )

    def token_weights(self, micro: Micro, count) -> Tensor:
        """(N, T): what a token's loss counts. One token mean over all ranks."""
        return torch.full_like(micro.rollout.mask, 1 / max(1, count["tokens"]), dtype=torch.float32)

    def figures(self, count, agreement: float | None) -> dict[str, float]:
        """What a step logs of this method beside the loss."""
        return {} if agreement is None else {"agreement": agreement}


def write(run, micros: list[Micro], writer: str, step: int, further: int) -> None:
    """The writer answers each prompt G times, `gen_prompts` of them at once; all responses are
    kept.

    The random numbers of a response depend on (seed, step, row) alone.
    """
    settings = run.settings
    model = run.shards.publish(writer)
    pad_id = run.processor.tokenizer.pad_token_id
    key = f"{settings.seed}/{step}" + (f"/{further}" if further else "")
    calls = math.ceil(len(micros) / run.micros_at_once)
    bar = tqdm(
        desc=f"step {step + 1} rollouts",
        total=settings.max_new_tokens * calls,
        unit="tok",
        leave=False,
        delay=2,  # seconds
        disable=run.rank > 0,
    )
    with bar:
        for start in range(0, len(micros), run.micros_at_once):
            part = micros[start : start + run.micros_at_once]
            ids = [row.id for micro in part for row in micro.rows]
            rollout = sample(
                model,
                run.processor,
                join([micro.prompts[writer] for micro in part], pad_id),
                settings.group,
                max_new_tokens=settings.max_new_tokens,
                seeds=[random.Random(f"{key}/{id_}").getrandbits(63) for id_ in ids],
                bar=bar,
                static=run.static_tokens,
            )
            pieces = rollout.split([len(micro.rows) * settings.group for micro in part])
            for micro, piece in zip(part, pieces, strict=True):
                micro.rollout = piece
                micro.keep = torch.ones_like(piece.ended)


def weighted(per_token: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, None]:
    return (weights * per_token).sum(), per_token.detach(), None


# --------------------------------------------------------------------------------------- baselines


class OPSD(VisionOPD):
    """The teacher reads the full image too, and the answer as a hint (paper, Table 2)."""

    teacher_view = View("image", OPSD_HINT)
    needs_answers = True


class Graded(VisionOPD):
    """What methods share that ask whether a response is right, and have no teacher to read it."""

    distils = False
    needs_answers = True

    def teacher_sides(self):
        return {}

    def figures(self, count, agreement):
        n = count["responses"]
        return {"right": count["right"] / n, "kept": count["kept"] / n}


class SFT(Graded):
    """The teacher, frozen unless told otherwise, answers from the crop; the student learns those
    responses that are right, by cross-entropy (paper, Table 2)."""

    default_teacher = "initial"
    writer = "teacher"

    def select(self, run, micros, step):
        for micro in micros:
            grade(run, micro)
            micro.keep = micro.right
        return micros

    def loss(self, micro, hidden, head, weights):
        log_s = token_log_probs([(hidden, head, 1.0)], micro.sampled, self.settings.chunk)
        return weighted(-log_s, weights)


class GRPO(Graded):
    """Reward 1 for a right answer, advantages within the group of a prompt, clipped policy
    gradient; the mean of a response, then of all (textbook form; paper, Table 2)."""

    teacher_view = None
    default_teacher = None
    clip = (0.2, 0.2)

    def select(self, run, micros, step):
        for micro in micros:
            grade(run, micro)
            micro.advantages = group_advantages(self.rewards(micro)).flatten()
            micro.keep = micro.advantages != 0  # of the others the loss and its gradient are 0
        return micros

    def rewards(self, micro: Micro) -> Tensor:
        """(B, G) fp32."""
        return micro.right.view(-1, self.settings.group).float()

    def loss(self, micro, hidden, head, weights):
        mask = micro.rollout.mask
        log_s = token_log_probs([(hidden, head, 1.0)], micro.sampled, self.settings.chunk)
        advantages = micro.advantages.repeat_interleave(mask.sum(1))  # (n,)
        # Old and new policy are the same: a batch is used once.
        per_token = clipped_policy_gradient(log_s, log_s.detach(), advantages, *self.clip)
        return weighted(per_token, weights)

    def token_weights(self, micro, count):
        mask = micro.rollout.mask
        each = 1 / (mask.sum(1, keepdim=True) * count["responses"])  # (N, 1)
        return each.expand_as(mask).float()


class DAPO(GRPO):
    """GRPO with a higher upper clip, one token mean, a soft penalty for overlong responses, and
    groups that are all right or all wrong replaced by others (paper, Table 2)."""

    clip = (0.2, 0.28)
    token_weights = VisionOPD.token_weights

    def rewards(self, micro):
        limit = self.settings.max_new_tokens
        lengths = micro.rollout.mask.sum(1).view(-1, self.settings.group)
        buffer = max(1, limit // 5)  # a fifth of the limit, as in DAPO's paper
        return super().rewards(micro) + overlong_penalty(lengths, limit, buffer)

    def select(self, run, micros, step):
        """Further batches are drawn until --prompts groups of all ranks are mixed; what is over is
        left out, the last first, whatever the ranks."""
        prompts = self.settings.prompts
        mine = prompts // run.world
        own = slice(run.rank * mine, (run.rank + 1) * mine)
        parts, mixed = [super().select(run, micros, step)], []
        while True:
            found = [0.0] * prompts  # which groups of this batch are mixed
            found[own] = [share for micro in parts[-1] for share in self.mixed_groups(micro)]
            mixed.append(over_ranks(found, run.device))
            enough = sum(map(sum, mixed)) >= prompts
            if enough or len(parts) > self.settings.resample:
                break
            more = run.further_micros(step, len(parts))
            self.respond(run, more, step, further=len(parts))
            parts.append(super().select(run, more, step))
        kept = torch.tensor(mixed, device=run.device).bool()  # (batches, prompts)
        kept &= kept.flatten().cumsum(0).view_as(kept) <= prompts
        for part, chosen in zip(parts, kept[:, own], strict=True):
            for micro, some in zip(part, chosen.split([len(m.rows) for m in part]), strict=True):
                micro.keep = some.repeat_interleave(self.settings.group)
        return [micro for part in parts for micro in part]

    def mixed_groups(self, micro: Micro) -> list[float]:
        """1.0 for each of the B groups that is neither all right nor all wrong, else 0.0."""
        groups = micro.right.view(-1, self.settings.group)
        return (groups.any(1) & ~groups.all(1)).float().tolist()


# ---------------------------------------------------------------------------------------- controls


class OffPolicy(VisionOPD):
    """Vision-OPD but for who answers: the teacher, from the crop. What is left of the difference is
    what on-policy sampling does (ours)."""

    writer = "teacher"


class Crops(Graded):
    """Plain crop augmentation: the student learns the label from the crop, by cross-entropy.
    Nothing is sampled, and --group must be 1 (ours)."""

    student_view = View("crop")
    teacher_view = None
    default_teacher = None
    writer = None

    def respond(self, run, micros, step, further=0):
        tokenizer = run.processor.tokenizer
        for micro in micros:
            texts = [row.answer + tokenizer.eos_token for row in micro.rows]
            micro.rollout = written(tokenizer, texts, self.settings.max_new_tokens, run.device)
            micro.keep = torch.ones_like(micro.rollout.ended)

    loss = SFT.loss

    def figures(self, count, agreement):
        return {}


def written(tokenizer, texts: list[str], most: int, device) -> Rollout:
    """Responses that are given, each cut off after `most` tokens."""
    found = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(device)
    ids, mask = found["input_ids"][:, :most], found["attention_mask"][:, :most].bool()
    ended = found["attention_mask"].sum(1) <= most
    return Rollout(ids, mask, ended, torch.full(ids.shape, torch.nan, device=device))


# -------------------------------------------------------------------------------------- the family
# What came after Vision-OPD, on its step. Constants are the sources', where nothing says (ours). Of
# a token's K + 1 events p_S, p_T and p_x are the probabilities under the student, the teacher and
# the extra view x; y is the sampled token. Only p_S has a gradient.


class OPDAha(VisionOPD):
    """log q = log_softmax(log p_T + 4 (log p_T - log p_x)), x the crop in its own mean colour; the
    teacher is frozen; JSD(q, p_S). (arXiv 2609.16459, public code)"""

    extra_view = View("crop", change=views.mean_colour)
    default_teacher = "initial"

    def target(self, log_s, log_t, log_x, ids):
        return [(tilted(log_t, log_x, 4.0, self.tilt_floor), torch.ones_like(log_t[:, 0]))]


class EAD(VisionOPD):
    """w JSD(p_T, p_S), a mean in a response, then over responses; w = max(cos(u_c, u_e), 0) with
    u_c = (p_T - p_S) / sqrt(p_S) and u_e = (p_S - p_x) / sqrt(p_S), x the full image with the box
    filled, read by the current student. (paper; p_S at least 1e-8 under the root: ours)"""

    extra_view = View("image", change=views.masked_box)
    extra_by = "student"
    needs_boxes = True

    def target(self, log_s, log_t, log_x, ids):
        s, t, x = log_s.exp(), log_t.exp(), log_x.exp()
        root = s.clamp(min=1e-8).sqrt()
        weight = cosine_similarity((t - s) / root, (s - x) / root, dim=-1)  # 0 if one vanishes
        return [(log_t, weight.clamp(min=0.0))]

    token_weights = GRPO.token_weights


class VAD(VisionOPD):
    """JSD(q, p_S) + 0.1 clip(1 - |r'| / |r|, 0, 1) JSD(p_T, p_S): of the way r from student to
    teacher the part that the crop explains, x being the crop at a tenth of its size; the teacher is
    frozen. (arXiv 2607.28590, second hand; --tau 0.8 for 4B, 0.7 for 9B)

    With f(p) = log(p + 1e-8) - mean (the 1e-8: ours), r = f(p_T) - f(p_S), u = f(p_T) - f(p_x),
    B = |u| max(<r, u>, 0) / (|u|^2 + 1e-3); u+ and u- the positive and negative parts of u,
    s = max(<r, u>, 0) of each, w+ = min(s+ / (s+ + s-), tau), w- = s- / (s+ + s-):
    r' = B (w+ u+ / |u+| + w- u- / |u-|), q = softmax(f(p_S) + clip(r', -20, 20)).
    """

    extra_view = View("crop", change=views.coarse)
    default_teacher = "initial"

    def target(self, log_s, log_t, log_x, ids):
        f_s, f_t, f_x = (centred((log_p.exp() + 1e-8).log()) for log_p in (log_s, log_t, log_x))
        r, u = f_t - f_s, f_t - f_x
        norm = u.norm(dim=-1, keepdim=True)  # (c, 1)
        length = norm * dot(r, u).clamp(min=0) / (norm.square() + 1e-3)  # B
        up, down = u.clamp(min=0), u.clamp(max=0)
        s_up, s_down = dot(r, up).clamp(min=0), dot(r, down).clamp(min=0)
        both = s_up + s_down + 1e-8
        w_up = (s_up / both).clamp(max=self.settings.tau)
        explained = length * (
            w_up * normalize(up, dim=-1) + s_down / both * normalize(down, dim=-1)
        )
        log_q = (f_s + explained.clamp(-20, 20)).log_softmax(-1)
        left = 1 - explained.norm(dim=-1) / r.norm(dim=-1).clamp(min=1e-8)
        return [(log_q, torch.ones_like(left)), (log_t, 0.1 * left.clamp(0, 1))]


class OPDV(VisionOPD):
    """A token counts max(log p_T(y) - log p_x(y), 0), x the crop with its middle masked. (arXiv
    2608.05131, second hand; the mask's geometry: ours)"""

    extra_view = View("crop", change=views.masked_crop)

    def token_weights(self, micro, count):
        return super().token_weights(micro, count) * evidence(micro, self.settings).clamp(min=0)


class VCSD(VisionOPD):
    """log q = log_softmax(2 log p_T - log p_x) where p_T is at least 0.1 of its largest (elsewhere
    log p_T stays, as does that of an end token), x a black image; the teacher sees the full image;
    forward KL at temperature 2, times 4. (arXiv 2607.21556, public code)"""

    teacher_view = View("image")
    extra_view = View("image", change=views.black)
    default_divergence = "soft_forward_kl"
    tilt_floor = 0.1

    def survey(self, run, micros):
        self.ends = torch.tensor(run.shards.plain.generation_config.eos_token_id, device=run.device)

    def target(self, log_s, log_t, log_x, ids):
        is_end = pad(torch.isin(ids, self.ends), (0, log_t.shape[-1] - ids.shape[-1]))
        log_x = torch.where(is_end, log_t, log_x)  # no tilt
        return [(tilted(log_t, log_x, 1.0, self.tilt_floor), torch.ones_like(log_t[:, 0]))]


class VAOPD(VisionOPD):
    """With a = max(log p_T(y) - log p_x(y), 0), x the crop at a tenth of its size: of a prompt's
    responses each counts softmax(z), z the z-score of its mean a; the 20% of its tokens with the
    largest a have half of that, the others the other half. (arXiv 2605.21924, public code)"""

    extra_view = View("crop", change=views.coarse)

    def token_weights(self, micro, count):
        mask, group = micro.rollout.mask, self.settings.group
        gained = evidence(micro, self.settings).clamp(min=0)  # (N, T)
        lengths = mask.sum(1, keepdim=True)  # (N, 1)
        means = gained.sum(1, keepdim=True) / lengths.clamp(min=1)
        shares = z_scores(means.view(-1, group)).softmax(1).view(-1, 1)  # (N, 1)
        count_top = (0.2 * lengths).ceil()  # (N, 1)
        order = gained.masked_fill(~mask, -1.0).argsort(dim=1, descending=True, stable=True)
        is_top = order.argsort(1) < count_top  # (N, T)
        count_other = lengths - count_top
        of_top = torch.where(count_other > 0, 0.5, 1.0)  # a single token has all of it
        each = torch.where(is_top, of_top / count_top.clamp(min=1), 0.5 / count_other.clamp(min=1))
        return mask * each * shares * group / max(1, count["responses"])


class VZero(VisionOPD):
    """A response counts clip(1 + 0.5 z, 0, 2), z the z-score among its prompt's responses of its
    mean log p_T(y) - log p_x(y), x another part of the image. (second hand)"""

    extra_view = View("image", change=views.unrelated_crop)
    needs_boxes = True

    def token_weights(self, micro, count):
        lengths = micro.rollout.mask.sum(1).clamp(min=1)
        means = evidence(micro, self.settings).sum(1) / lengths  # (N,)
        z = z_scores(means.view(-1, self.settings.group)).view(-1, 1)
        return super().token_weights(micro, count) * (1 + 0.5 * z).clamp(0, 2)


class CVOPD(VisionOPD):
    """JSD(p_T, p_S) + 0.1 max(0.1 + JSD(p_T, p_S) - JSD(p_x, p_S), 0), the second for tokens whose
    JSD(p_T, p_S) is above the batch's mean, x another part of the image. (arXiv 2610.13264, paper
    page; the logged loss leaves the constant 0.01 out)"""

    extra_view = View("image", change=views.unrelated_crop)
    needs_boxes = True

    @torch.no_grad()
    def survey(self, run, micros):
        """The batch's mean."""
        student = run.shards.publish("student")
        sums = torch.zeros(2, dtype=torch.float64)
        for micro in micros:
            mask = micro.rollout.mask
            hidden = response_hidden(student, micro.prompts["student"], micro.rollout)[mask]
            ones = torch.ones(len(hidden), device=run.device)
            loss, *_ = VisionOPD(self.settings).loss(micro, hidden, student.lm_head.weight, ones)
            sums += torch.tensor([loss.item(), len(hidden)])
        total, tokens = over_ranks(sums.tolist(), run.device)
        self.mean = total / max(1, tokens)

    def target(self, log_s, log_t, log_x, ids):
        divergence, beta = DIVERGENCES[self.settings.divergence], self.settings.beta
        to_teacher, _ = divergence(log_s, log_t, beta)
        to_other, _ = divergence(log_s, log_x, beta)
        pushed = (to_teacher > self.mean) & (0.1 + to_teacher - to_other > 0)
        weight = 0.1 * pushed.to(log_s.dtype)
        return [(log_t, 1 + weight), (log_x, -weight)]


class S2VOPD(VisionOPD):
    """The student answers and reads from a smaller, sometimes noisy image; the teacher sees the
    full one; JSD over the teacher's top K, renormalised. No crops, no boxes. (arXiv 2608.14144,
    paper page)"""

    student_view = View("image", change=views.scaled_and_noisy)
    teacher_view = View("image")
    teachers_top = True


def tilted(log_t: Tensor, log_x: Tensor, strength: float, floor: float) -> Tensor:
    """log_softmax(log_t + strength (log_t - log_x)), (c, K + 1); no tilt where the teacher's
    probability is under `floor` of its largest."""
    tilt = strength * (log_t - log_x)
    if floor > 0:
        likely = log_t >= log_t.amax(-1, keepdim=True) + math.log(floor)
        tilt = torch.where(likely, tilt, 0.0)
    return (log_t + tilt).log_softmax(-1)


def watched(target: Target, moved: list[Tensor]) -> Target:
    """`target`, which also appends to `moved` how much of the teacher's pull on each token it has
    moved elsewhere or taken away, (c,) in [0, 1]: with one target of weight 1 the total variation
    distance to the teacher. (ours: a ratio of the sampled token's probabilities has no upper end,
    and says little where they are small)"""

    def noting(log_s, log_t, log_x, ids):
        targets = target(log_s, log_t, log_x, ids)
        pull = sum(weight[:, None] * log_q.exp() for log_q, weight in targets)  # (c, K + 1)
        moved.append((log_t.exp() - pull).clamp(min=0).sum(-1))
        return targets

    return noting


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def z_scores(x: Tensor) -> Tensor:
    """(x - mean) / standard deviation within each row: (B, G) -> (B, G); 0 where all are equal."""
    spread = x.std(1, keepdim=True, correction=0)
    return (x - x.mean(1, keepdim=True)) / (spread + 1e-6)


@torch.no_grad()
def evidence(micro: Micro, settings) -> Tensor:
    """log p_T(y) - log p_x(y) of the sampled tokens over the whole vocabulary, (N, T) fp32; 0 where
    there is none."""
    mask = micro.rollout.mask
    found = torch.zeros(mask.shape, device=mask.device)
    log_t = token_log_probs(micro.sides["teacher"], micro.sampled, settings.chunk)
    log_x = token_log_probs(micro.sides["extra"], micro.sampled, settings.chunk)
    found[mask] = (log_t - log_x).to(found.dtype)
    return found


METHODS = {
    "vision-opd": VisionOPD,
    "opsd": OPSD,
    "sft": SFT,
    "grpo": GRPO,
    "dapo": DAPO,
    "off-policy": OffPolicy,
    "crops": Crops,
    "opd-aha": OPDAha,
    "ead": EAD,
    "vad": VAD,
    "opd-v": OPDV,
    "vcsd": VCSD,
    "va-opd": VAOPD,
    "v-zero": VZero,
    "cv-opd": CVOPD,
    "s2vopd": S2VOPD,
}


# --------------------------------------------------------------- what student and teacher are shown


class EncodedMicros(torch.utils.data.Dataset):
    """Of row numbers a micro-batch: (rows, prompts), or the error that one of them makes: raised in
    a worker it would come with the worker's traceback."""

    def __init__(self, run):
        self.rows, self.processor, self.dtype = run.rows, run.processor, run.shards.plain.dtype
        self.views, self.method = shown_views(run.settings), run.settings.method
        self.seed = run.settings.seed

    def __getitem__(self, numbers: list[int]):
        rows, prompts = [], {}
        try:
            rows = [self.rows[j] for j in numbers]
            refuse_unfit(self.method, rows)
            for who, (view, most) in self.views.items():
                images = [view.pictures(row, self.seed) for row in rows]
                texts = [view.text(row) for row in rows]
                prompt = encode(self.processor, images, texts, max_tokens=most)
                prompts[who] = prompt | {"pixel_values": prompt["pixel_values"].to(self.dtype)}
        except (ValueError, OSError) as error:
            return ValueError(f"samples {[row.id for row in rows]}: {error}")
        return rows, prompts


def refuse_unfit(method: str, rows: list[Triplet]) -> None:
    """ValueError where the method needs what rows do not have."""
    boxless = [row.id for row in rows if not row.boxes or not all(map(has_area, row.boxes))]
    if boxless and METHODS[method].needs_boxes:
        raise ValueError(
            f"--method {method} needs boxes, and samples {boxless} have none with an area. Give "
            "bbox, [x1, y1, x2, y2] in pixels a crop, in train.jsonl, or train with another method."
        )
    without = [row.id for row in rows if row.answer is None]
    if without and METHODS[method].needs_answers:
        raise ValueError(
            f"--method {method} needs answers, and samples {without} have none. Make the data with "
            "`synth.py --labels`, or train with --method vision-opd."
        )


def has_area(box: list[int]) -> bool:
    left, top, right, bottom = box
    return 0 <= left < right and 0 <= top < bottom


def shown_views(settings) -> dict[str, tuple[View, int]]:
    """What student, teacher and extra view show, if there are these, in how many tokens at most."""
    method = METHODS[settings.method]
    shown = {"student": (method.student_view, settings.max_prompt)}
    if method.teacher_view:
        shown["teacher"] = (method.teacher_view, settings.max_crop_prompt)
    if method.extra_view:
        by_student = method.extra_by == "student"  # compared with it: in the same resolution
        most = settings.max_prompt if by_student else settings.max_crop_prompt
        shown["extra"] = (method.extra_view, most)
    return shown


def micros_on_device(batch: Iterable, device) -> list[Micro]:
    micros = []
    for item in batch:
        if isinstance(item, ValueError):
            raise item
        rows, prompts = item
        micros.append(Micro(rows, {who: to_device(each, device) for who, each in prompts.items()}))
    return micros


# ------------------------------------------------------------------------------- which are right


def grade(run, micro: Micro) -> None:
    """Sets which responses match their row's label."""
    texts = micro.rollout.decode(run.processor.tokenizer)
    asked = [triplet_question(row) for row in micro.rows for _ in range(run.settings.group)]
    right = [is_right(row, text) for row, text in zip(asked, texts, strict=True)]
    micro.right = torch.tensor(right, device=micro.keep.device)


def group_advantages(rewards: Tensor) -> Tensor:
    """(reward - mean) / (std + 1e-6) within each prompt's group: (B, G) -> (B, G); 0 where all
    rewards are 0, or all 1."""
    mean, std = rewards.mean(1, keepdim=True), rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + 1e-6)


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """DAPO's soft penalty: 0 up to limit - buffer tokens, from there linearly to -1 at `limit`."""
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


# ------------------------------------------------------------- losses on the sampled tokens alone


def token_log_probs(sides: list[tuple], ids: Tensor, chunk: int = 1024) -> Tensor:
    """Log-probabilities of the tokens `ids` (n,) under the logits that `sides` give, as `teachers`
    do in loss.topk_divergence.

    Returns (n,) fp32 (float64 for float64 inputs), differentiable; the logits of one chunk of
    tokens exist at once, and once more in the backward pass. In bf16 the heads' gradients are
    rounded once a chunk.
    """

    def of_chunk(ids: Tensor, *hidden: Tensor) -> Tensor:
        logits = 0.0
        for h, (_, head, share) in zip(hidden, sides, strict=True):
            logits = logits + share * (h @ head.t())  # (c, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -cross_entropy(logits, ids, reduction="none")

    chunks = zip(ids.split(chunk), *(hidden.split(chunk) for hidden, *_ in sides), strict=True)
    keep = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(of_chunk, *each, **keep) for each in chunks])


def sampled_token_loss(micro: Micro, hidden: Tensor, head: Tensor, chunk: int) -> Tensor:
    """`sampled_token` of a micro-batch: hidden (n, D), head (V, D) -> (n,)."""
    log_s = token_log_probs([(hidden, head, 1.0)], micro.sampled, chunk)
    log_t = token_log_probs(micro.sides["teacher"], micro.sampled, chunk)
    return sampled_token(log_s, log_t, micro.rollout.log_probs[micro.rollout.mask])


def sampled_token(log_s: Tensor, log_t: Tensor, rollout: Tensor, clip: float = 2.0) -> Tensor:
    """Policy-gradient form of KL(S || T) on the sampled tokens (paper, Table 6): -ratio A with the
    advantage A = log_t - log_s.

    The importance ratio of the student to the policy that wrote the tokens is cut off at `clip`;
    neither it nor A has a gradient. All (n,) log-probabilities; returns (n,), whose value estimates
    the KL and whose gradient is -ratio A dlog_s.
    """
    now = log_s.detach()
    ratio = (now - rollout).exp().clamp(max=clip)
    return ratio * (now - log_t.detach()) * (log_s - now).exp()


def clipped_policy_gradient(
    log_s: Tensor, rollout: Tensor, advantages: Tensor, low: float, high: float
) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = p_student / p_rollout. All (n,)."""
    ratio = (log_s - rollout).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
