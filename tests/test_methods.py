"""The paper's baselines and ablations (Tables 2, 3 and 6): each method's loss, gradient, filter and inputs against a few plain lines."""

import math
import random
import shutil
import statistics

import baselines
import pytest
import torch
from conftest import SMALL, plain_logits
from safetensors.torch import load_file
from test_train import aligned, assert_same_update, in_processes, launch, log, one_rank

import loss
import model as M
import storage.images as images
import toy.tiny as tiny_model
import train
import triplets.format as triplet_format
from rollout import Rollout

# ---------------------------------------------------------------------------------------------- the losses on sampled tokens


def sides(n=7, d=6, v=11, seed=0):
    """Student, two teachers: (hidden (n, d), head (v, d)) each, and n token ids; float64."""
    draw = torch.Generator().manual_seed(seed)
    pairs = [
        (
            torch.randn(n, d, dtype=torch.float64, generator=draw),
            torch.randn(v, d, dtype=torch.float64, generator=draw),
        )
        for _ in range(3)
    ]
    return pairs, torch.randint(v, (n,), generator=draw)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_log_probs_are_those_of_full_logits_and_so_is_their_gradient(chunk):
    ((hidden, head), _, _), ids = sides()
    weights, got = torch.linspace(-1, 2, len(ids), dtype=torch.float64), []
    for log_p in (
        lambda h, w: baselines.token_log_probs([(h, w, 1.0)], ids, chunk),
        lambda h, w: (h @ w.T).log_softmax(-1)[range(len(ids)), ids],
    ):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        values = log_p(*leaves)
        (weights * values).sum().backward()
        got.append([values.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*got, rtol=1e-12, atol=1e-12)


def test_token_log_probs_of_a_mixture_of_logits_and_of_no_tokens():
    (_, (ref, ref_head), (now, now_head)), ids = sides()
    mixed = (0.95 * (ref @ ref_head.T) + 0.05 * (now @ now_head.T)).log_softmax(-1)[
        range(len(ids)), ids
    ]
    torch.testing.assert_close(
        baselines.token_log_probs([(ref, ref_head, 0.95), (now, now_head, 0.05)], ids, 2), mixed
    )
    empty = baselines.token_log_probs([(ref[:0].requires_grad_(), ref_head, 1.0)], ids[:0])
    assert empty.shape == (0,) and empty.sum().backward() is None


def test_sampled_token_has_the_gradient_of_the_reverse_kl_in_expectation():
    """Over all tokens of a vocabulary, weighted by the student's probabilities, without any sampling."""
    student, teacher = torch.randn(
        2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    student.requires_grad_()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    (kl,) = torch.autograd.grad((log_s.exp() * (log_s - log_t)).sum(), student, retain_graph=True)
    per_token = baselines.sampled_token(log_s, log_t, log_s.detach())
    (expected,) = torch.autograd.grad((log_s.detach().exp() * per_token).sum(), student)
    torch.testing.assert_close(expected, kl)
    torch.testing.assert_close(
        (log_s.exp() * per_token).sum(), (log_s.exp() * (log_s - log_t)).sum()
    )


@pytest.mark.parametrize(
    "ratio, used", [(0.5, 0.5), (1.0, 1.0), (1.9, 1.9), (2.1, 2.0), (50.0, 2.0)]
)
def test_the_importance_ratio_is_cut_off_at_two(ratio, used):
    log_s = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    baselines.sampled_token(
        log_s, torch.tensor([-3.0]), log_s.detach() - math.log(ratio)
    ).sum().backward()
    assert log_s.grad.item() == pytest.approx(-used * (-3 - -1))  # -ratio A, A = log_t - log_s


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [  # of -min(r A, clip(r) A), clip to [0.8, 1.28]
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),
        (1.5, 2.0, -2.56, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (1.0, -2.0, 2.0, 2.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_policy_gradient_is_clipped_at_both_ends_where_that_is_pessimistic(
    ratio, advantage, value, slope
):
    log_s = torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)
    per_token = baselines.clipped_policy_gradient(
        log_s, log_s.detach() - math.log(ratio), torch.tensor([advantage]), 0.2, 0.28
    )
    per_token.sum().backward()
    assert per_token.item() == pytest.approx(value)
    assert log_s.grad.item() == pytest.approx(slope)


def test_advantages_are_standard_scores_within_a_group():
    rewards = [[1.0, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0.5, -0.5, 1, 0]]
    want = [
        [(r - statistics.mean(group)) / (statistics.stdev(group) + 1e-6) for r in group]
        for group in rewards
    ]
    torch.testing.assert_close(
        baselines.group_advantages(torch.tensor(rewards)), torch.tensor(want)
    )
    assert not baselines.group_advantages(torch.tensor(rewards))[2:4].any()


def test_the_overlong_penalty_falls_from_0_to_minus_1_over_the_buffer():
    lengths = torch.tensor([1, 79, 80, 85, 90, 99, 100])
    assert baselines.overlong_penalty(lengths, 100, 20).tolist() == pytest.approx(
        [0, 0, 0, -0.25, -0.5, -0.95, -1]
    )


# ------------------------------------------------------------------------------------------------------------- grading


def micro(texts, group, numbers=None):
    """A Micro whose responses are these texts, of the tiny model's tokenizer; and the processor."""
    processor = tiny_model.tiny()[1]
    ids = processor.tokenizer(
        [text + "<|im_end|>" for text in texts],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    rollout = Rollout(
        ids["input_ids"],
        ids["attention_mask"].bool(),
        torch.ones(len(texts), dtype=torch.bool),
        ids["input_ids"] * 0.0,
    )
    return train.Micro(
        numbers or [*range(len(texts) // group)],
        {},
        {},
        rollout,
        torch.ones(len(texts), dtype=torch.bool),
    ), processor


def triplet(answer, **more):
    return {
        "id": "x",
        "question": "what is in the red box ?",
        "answer": answer,
        "image": "x",
        "crop": "x",
        "extra": {},
    } | more


def args_of(*flags):
    return train.parse([*SMALL, "--out", "unused", *flags])


def test_sft_keeps_the_responses_that_match_the_label():
    texts = ["a green cross with 7 .", "a blue cross with 7 .", "A", "The answer is (B)."]
    m, processor = micro(texts, 2)
    rows = [
        triplet("a green cross with 7 .", extra={"toy": "small"}),
        triplet("B", question="Which?\n\nA. moss\nB. bark"),
    ]
    baselines.grade(args_of("--method", "sft"), m, processor, rows)
    assert (
        m.keep.tolist() == m.right.tolist() == [True, False, False, True] and m.advantages is None
    )


@pytest.mark.parametrize("method", ["grpo", "dapo"])
def test_dapo_leaves_out_groups_that_are_all_right_or_all_wrong_and_grpo_does_not(method):
    good, bad = "a green cross with 7 .", "a blue one ."
    m, processor = micro([good, bad, good, good, bad, bad], 2)
    baselines.grade(
        args_of("--method", method, "--max-new-tokens", "100"),
        m,
        processor,
        [triplet(good, extra={"toy": "small"})] * 3,
    )
    assert m.right.tolist() == [True, False, True, True, False, False]
    assert (
        m.keep.tolist() == [True, True, False, False, False, False]
        if method == "dapo"
        else m.keep.all()
    )
    half = math.sqrt(0.5)  # 1 and 0: mean 1/2, deviation sqrt(1/2)
    assert m.advantages.tolist() == pytest.approx([0.5 / half, -0.5 / half, 0, 0, 0, 0], abs=1e-5)


def test_dapo_counts_long_responses_as_worse():
    m, processor = micro([good := "a green cross with 7 .", good], 2)
    long = m.rollout.mask.sum(1)[0].item()
    m.rollout.mask[1, 4:] = False  # the second one counts 4 tokens
    baselines.grade(
        args_of("--method", "dapo", "--max-new-tokens", str(long)),
        m,
        processor,
        [triplet("a green cross", extra={"toy": "small"})],
    )
    assert (
        m.right.tolist() == [False, False] and m.advantages[0] < 0 < m.advantages[1]
    )  # rewards -1 and 0


def groups(*kept):
    """Micros of one group of two responses each, kept or not."""
    return [train.Micro([i], {}, {}, keep=torch.tensor([k, k])) for i, k in enumerate(kept)]


def fill(first, *further, resample=9):
    args = args_of("--method", "dapo", "--resample", str(resample))
    flat = type("Flat", (), {"world": 1, "rank": 0, "weights": torch.zeros(1)})
    asked = []
    found = baselines.fill_up(args, first, flat, lambda i: asked.append(i) or further[i - 1])
    return [bool(m.keep.all()) for m in found], asked


def test_dapo_draws_until_the_batch_is_full_and_leaves_the_last_ones_out():
    assert fill(groups(1, 1, 1, 1)) == ([True] * 4, [])
    assert fill(groups(1, 0, 0, 1), groups(0, 1, 1, 1)) == (
        [True, False, False, True, False, True, True, False],
        [1],
    )
    assert fill(groups(0, 0, 0, 1), groups(0, 0, 0, 0), groups(1, 1, 1, 1))[0][8:] == [
        True,
        True,
        True,
        False,
    ]
    assert fill(groups(0, 0, 0, 1), groups(1, 0, 0, 0), groups(1, 1, 1, 1), resample=1) == (
        [False] * 3 + [True] * 2 + [False] * 3,
        [1],
    )
    assert fill(groups(0, 1, 0, 0), resample=0) == ([False, True, False, False], [])


# -------------------------------------------------------------------------------------------------------- the whole step


def parity(row):
    """A label that random responses match about half of the time: whether the letter count of a response is even."""
    return {"correct": sum(map(str.isalnum, row["output"])) % 2 == 0}


METHODS = [
    ["--objective", "sampled-token"],
    ["--teacher", "trust-region", "--trust", "0.3"],
    ["--divergence", "forward_kl"],
    ["--method", "opsd"],
    ["--method", "sft"],
    ["--method", "grpo"],
    ["--method", "dapo", "--resample", "0"],
]


@pytest.mark.parametrize("flags", METHODS, ids=" ".join)
def test_a_step_has_the_gradient_of_plain_forwards_and_a_formula(
    flags, run, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(baselines, "score", parity)
    args = train.parse([*SMALL, "--out", "unused", *flags])
    run(
        "fast", "--steps", "2", "--clip", "1e9", "--show-every", "1", *flags
    )  # two: the first one moves the student away
    entry = log(tmp_path / "fast")[1]
    run("one", "--steps", "1", "--clip", "1e9", *flags)
    student, processor = M.load(str(tmp_path / "one" / "checkpoint-000001"))
    initial, _ = M.load(str(world / "base"))
    ema, _ = M.load(str(world / "base"))
    with torch.no_grad():
        for weight, start, now in zip(ema.parameters(), initial.parameters(), student.parameters()):
            weight.lerp_(now, args.ema_rate if args.teacher == "ema" else 0.0)
    rows = triplet_format.read_triplets(world / "data")
    vision = processor.tokenizer.convert_tokens_to_ids(list(M.VISION_TOKENS))
    batch, lines = [rows[i] for i in train.batch_rows(len(rows), 4, 0, 1)], []
    for row in batch:
        question = row.question
        hint = (
            f"{question}\n\nHere is a reference solution to this problem:\n{row['answer']}\n\nAfter understanding the reference solution, "
            "please try to solve this problem using your own approach below:"
        )
        full, crop, hinted = (
            M.encode(processor, [images.load_image(row[view])], [text])
            for view, text in (("image", question), ("crop", question), ("image", hint))
        )
        writer, prompt = (initial, crop) if args.method == "sft" else (student, full)
        seed = random.Random(f"0/1/{row.id}").getrandbits(63)
        rollout = train.sample(writer, processor, prompt, 2, max_new_tokens=6, seeds=[seed])
        group = [ids[mask] for ids, mask in zip(rollout.ids, rollout.mask)]
        right = [
            parity({"output": processor.tokenizer.decode(ids, skip_special_tokens=True)})["correct"]
            for ids in group
        ]
        for ids, correct in zip(group, right):
            with torch.no_grad():
                seen = hinted if args.method == "opsd" else crop
                teacher = plain_logits(ema, seen, ids)
                if args.teacher == "trust-region":
                    teacher = 0.7 * plain_logits(initial, seen, ids) + 0.3 * plain_logits(
                        student, seen, ids
                    )
            lines.append((ids, plain_logits(student, full, ids), teacher, correct, right))
    terms, count, kept = [], 0, 0
    for ids, logits, teacher, correct, right in lines:
        log_s = logits.log_softmax(-1)[range(len(ids)), ids]
        log_t = teacher.log_softmax(-1)[range(len(ids)), ids]
        one = (log_s - log_s.detach()).exp()  # old = new
        open_logits = logits.detach().index_fill(-1, torch.tensor(vision), -math.inf)
        ratio = (log_s - open_logits.log_softmax(-1)[range(len(ids)), ids]).exp()
        spread = statistics.stdev(map(float, right)) + 1e-6
        advantage = (correct - statistics.mean(right)) / spread
        if args.method == "sft":
            use, term = correct, -log_s.sum()
        elif args.method == "grpo":
            use, term = True, -(one * advantage).mean()
        elif args.method == "dapo":
            scores = [
                float(r) + min(0.0, (6 - 1 - len(other[0])) / 1)
                for r, other in zip(right, [x for x in lines if x[4] is right])
            ]
            advantage = (
                scores[[x[0] is ids for x in lines if x[4] is right].index(True)]
                - statistics.mean(scores)
            ) / (statistics.stdev(scores) + 1e-6)
            use, term = len(set(right)) == 2, -(one * advantage).sum()
        elif args.objective == "sampled-token":
            use, term = True, (-ratio.detach() * (log_t - log_s).detach() * log_s).sum()
        else:
            use, term = (
                True,
                loss.divergence(logits, teacher, k=args.top_k, kind=args.divergence).sum(),
            )
        kept += use
        count += len(ids) * use
        terms.append(term * use)
    total = sum(terms) / (len(lines) if args.method == "grpo" else count)
    total.backward()
    assert 0 < kept and (kept < len(lines) or args.method not in ("sft", "dapo")), (
        "choose another seed: the filter must have work"
    )
    assert entry["tokens"] == count
    if args.method not in baselines.DISTIL:
        assert (entry["kept"], entry["right"]) == (
            kept / len(lines),
            sum(line[3] for line in lines) / len(lines),
        )
    if args.objective == "topk":
        assert entry["loss"] == pytest.approx(total.item(), rel=1e-3, abs=1e-5)
    gradient = aligned(weight.grad for weight in student.parameters())
    first, second = (
        one_rank(tmp_path / name / f"checkpoint-00000{n}")["exp_avg"]
        for name, n in (("one", 1), ("fast", 2))
    )
    got = (second - 0.9 * first) / 0.1
    assert (got - gradient).norm() < 1e-3 * gradient.norm() and gradient.norm() > 0


def test_the_answer_reaches_opsds_teacher_only(world):
    rows = triplet_format.read_triplets(world / "data")
    processor = M.load(str(world / "base"))[1]
    for method in ("opsd", "vision-opd"):
        data = train.Micros(rows, [[3]], processor, args_of("--method", method), torch.float32)
        _, student, teacher = data[0]
        assert (
            train.Micros(rows, [[3]], processor, args_of("--method", "grpo"), torch.float32)[0][2]
            is None
        )
        said = [processor.tokenizer.decode(prompt["input_ids"][0]) for prompt in (student, teacher)]
        assert "reference solution" not in said[0] and rows[3].answer not in said[0]
        assert ("reference solution" in said[1] and rows[3].answer in said[1]) == (method == "opsd")
        assert (student["pixel_values"].shape == teacher["pixel_values"].shape) == (
            method == "opsd"
        )


@pytest.mark.parametrize("teacher, twin", [("current", "1"), ("initial", "0")])
def test_current_and_initial_teachers_are_the_ema_at_its_ends(teacher, twin, run, world, tmp_path):
    got, want = run("a", "--teacher", teacher), run("b", "--ema-rate", twin)
    assert all(torch.equal(got[name], want[name]) for name in want)
    state = one_rank(tmp_path / "a" / "checkpoint-000003")
    start = aligned(M.load(str(world / "base"))[0].parameters())
    assert torch.equal(state["ema"], start if teacher == "initial" else state["master"])


@pytest.mark.parametrize(
    "flags", [["--method", "sft"], ["--method", "dapo", "--resample", "2"]], ids=" ".join
)
def test_a_run_that_goes_on_later_ends_where_a_straight_one_does(flags, run, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "score", parity)
    want = run("straight", *flags)
    run("twice", *flags, "--steps", "2")
    got = run("twice", *flags)
    assert all(torch.equal(got[name], want[name]) for name in want)
    facts = lambda name: [
        [row[key] for key in ("loss", "tokens", "kept", "right")] for row in log(tmp_path / name)
    ]
    assert facts("twice") == facts("straight")


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "sft"],
        ["--method", "sft", "--teacher", "ema"],
        ["--teacher", "trust-region", "--trust", "0.3"],
        ["--teacher", "trust-region", "--objective", "sampled-token"],
    ],
    ids=" ".join,
)
def test_an_offloaded_teacher_gives_the_same_weights(flags, run, monkeypatch):
    monkeypatch.setattr(baselines, "score", parity)
    want, got = run("a", *flags), run("b", *flags, "--offload-teacher")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_changed_answers_are_another_run_where_answers_matter(run, world, tmp_path, monkeypatch):
    shutil.copytree(world / "data", tmp_path / "data")
    flags = ["--steps", "1", "--data", str(tmp_path / "data")]
    for name, method in (("opd", "vision-opd"), ("sft", "sft")):
        run(name, *flags, "--method", method)
    lines = (tmp_path / "data" / "train.jsonl").read_text()
    (tmp_path / "data" / "train.jsonl").write_text(
        lines.replace('"answer": "a ', '"answer": "one ')
    )
    run("opd", *flags)
    with pytest.raises(ValueError, match="rows_sha256"):
        run("sft", *flags, "--method", "sft")


RANKS = [
    ["--objective", "sampled-token"],
    ["--teacher", "trust-region", "--trust", "0.3"],
    ["--method", "opsd"],
    ["--method", "sft"],
    ["--method", "grpo"],
    ["--method", "dapo", "--resample", "2"],
]


@pytest.mark.parametrize("flags", RANKS, ids=" ".join)
def test_two_ranks_make_the_same_update_as_one(flags, run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "score", parity)
    flags = [*flags, "--micro-prompts", "1", "--adam-eps", "1e-4"]
    want = run("one", *flags)
    command = in_processes(world, tmp_path / "two", *flags, ranks=2)
    script = tmp_path / "two.py"
    script.write_text(
        "import baselines\nbaselines.score = lambda row: {'correct': sum(map(str.isalnum, row['output'])) % 2 == 0}\n"
        + script.read_text()
    )
    launch(command)
    assert_same_update(
        load_file(tmp_path / "two" / "checkpoint-000003" / "model.safetensors"), want, world
    )
    facts = [
        [
            {key: row.get(key) for key in ("tokens", "kept", "right", "eos", "length")}
            for row in log(tmp_path / name)
        ]
        for name in ("one", "two")
    ]
    assert facts[0] == facts[1]


# ------------------------------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--method", "sft", "--compile", "--offload-teacher"],
            "--compile records where the weights",
        ),
        (
            ["--method", "grpo", "--teacher", "ema"],
            "--teacher would change nothing with --method grpo",
        ),
        (["--method", "sft", "--top-k", "5"], "--top-k would change nothing"),
        (["--trust", "0.5"], "--trust would change nothing"),
        (["--teacher", "initial", "--ema-rate", "0.1"], "--ema-rate would change nothing"),
        (["--resample", "3"], "--resample would change nothing"),
        (["--objective", "sampled-token", "--beta", "0.3"], "--beta would change nothing"),
        (["--method", "dapo", "--objective", "topk"], "--objective"),
        (["--divergence", "forward_kl", "--beta", "0.3"], "--beta would change nothing"),
        (["--method", "grpo", "--max-crop-prompt", "99"], "--max-crop-prompt"),
        (
            ["--method", "sft", "--teacher", "trust-region"],
            "--teacher trust-region, a mixture of logits, is none",
        ),
        (["--method", "grpo", "--group", "1"], "--group must be at least 2"),
        (["--teacher", "trust-region", "--trust", "1.5"], "--trust in [0, 1]"),
        (["--method", "dapo", "--resample", "-1"], "--resample be at least 0"),
        (["--method", "ppo"], "invalid choice: 'ppo'"),
    ],
)
def test_flags_that_would_be_ignored_or_make_no_sense_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        args_of(*flags)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("method", ["opsd", "sft", "grpo", "dapo"])
def test_methods_that_need_answers_say_so_and_how_to_make_them(method, world, tmp_path):
    picture = images.load_image(triplet_format.read_triplets(world / "data")[0].image)
    triplet_format.write_triplets(
        tmp_path / "data",
        [
            {
                "id": str(i),
                "question": "what ?",
                "answer": None if i else "a",
                "image": picture,
                "crop": picture,
                "bbox": None,
                "extra": {},
            }
            for i in range(4)
        ],
    )
    args = args_of(
        "--method",
        method,
        "--model",
        str(world / "base"),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    )
    with pytest.raises(
        ValueError,
        match=rf"--method {method} needs answers, and 3 of 4 rows .* have none.*synth.py --labels",
    ):
        train.train(args, *train.setup("cpu"))


def test_sft_goes_on_when_no_response_of_a_step_is_right(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "score", lambda row: {"correct": False})
    weights = run("none", "--method", "sft", "--steps", "1", "--weight-decay", "0")
    entry = log(tmp_path / "none")[0]
    assert (entry["loss"], entry["grad_norm"], entry["tokens"], entry["kept"]) == (0, 0, 0, 0)
    base = load_file(world / "base" / "model.safetensors")
    assert all(torch.equal(weights[name], base[name]) for name in base)
