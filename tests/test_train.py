import copy
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, plain_logits
from safetensors.torch import load_file, save_file

import loss
import model as M
import sharding
import storage.images as images
import toy.base as base_model
import toy.demonstration as demonstration
import toy.scenes as toy_scenes
import toy.tiny as tiny_model
import train
import triplets.format as triplet_format


def in_processes(world, out, *flags, ranks=1):
    """The command line that starts the same run as `run`, on `ranks` processes."""
    code = (
        f"import sys, sharding, train; sharding.BUCKET = {sharding.BUCKET}; a = train.parse(sys.argv[1:]); "
        "train.torch.set_num_threads(1); train.train(a, *train.setup(a.device))"
    )
    start = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
    )
    script = out.parent / f"{out.name}.py"
    script.write_text(code)
    return [
        *start,
        str(script),
        *SMALL,
        "--model",
        str(world / "base"),
        "--data",
        str(world / "data"),
        "--out",
        str(out),
        *flags,
    ]


def launch(command, check=True):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_update(got, want, world, tolerance=2e-3):
    """The distance between two results, as a share of what training changed (AdamW turns the noise of a gradient of about 0
    into a full step, so single weights may differ by more than rounding)."""
    base = load_file(world / "base" / "model.safetensors")
    assert got.keys() == want.keys() == base.keys()
    distance = lambda a, b: math.sqrt(
        sum((a[name] - b[name]).double().square().sum().item() for name in a)
    )
    assert distance(want, base) > 0.1 and distance(got, want) < tolerance * distance(want, base)


def aligned(tensors):
    """Of all parameters, in the order and alignment of sharding.Flat: one vector."""
    return torch.cat(
        [torch.nn.functional.pad(t.detach().flatten(), (0, -t.numel() % 64)) for t in tensors]
    )


def one_rank(checkpoint):
    """The fp32 state of a run on one rank, as vectors of the aligned parameters; what fills up the last bucket must be 0."""
    numel = json.loads((checkpoint / "state" / "state.json").read_text())["numel"]
    state = {
        name: tensor.flatten()
        for name, tensor in load_file(checkpoint / "state" / "0-of-1.safetensors").items()
    }
    assert not any(tensor[numel:].any() for tensor in state.values())
    return {name: tensor[:numel] for name, tensor in state.items()}


def assert_equal(got, want):
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# ---------------------------------------------------------------------------------------------------------- the step


def test_a_step_is_the_papers_equation_with_plain_forwards_autograd_and_adamw(run, world, tmp_path):
    """One whole step again, from the equation: every sequence alone, full logits, torch's own clipping and AdamW."""
    weights = run(
        "fast",
        "--steps",
        "1",
        "--clip",
        "0.02",
        "--weight-decay",
        "0.1",
        "--ema-rate",
        "0.25",
        "--show-every",
        "1",
    )
    entry = log(tmp_path / "fast")[0]
    student, processor = M.load(str(world / "base"))
    teacher, _ = M.load(str(world / "base"))
    args = train.parse([*SMALL, "--out", "unused"])
    rows = triplet_format.read_triplets(world / "data")
    chosen = [rows[i] for i in train.batch_rows(len(rows), 4, 0, 0)]
    seeds = [train.random.Random(f"0/0/{row['id']}").getrandbits(63) for row in chosen]
    total, count, ended, agree, shown = 0.0, 0, 0, 0, []
    for row, seed in zip(chosen, seeds):
        full, crop = (
            M.encode(processor, [images.load_image(getattr(row, view))], [row.question])
            for view in ("image", "crop")
        )
        rollout = train.sample(student, processor, full, 2, max_new_tokens=6, seeds=[seed])
        for ids, mask in zip(rollout.ids, rollout.mask):
            logits = [
                plain_logits(model, prompt, ids[mask])
                for model, prompt in ((student, full), (teacher, crop))
            ]
            each = loss.divergence(*logits, k=args.top_k)
            total, count = total + each.sum(), count + int(mask.sum())
            agree += int(
                (logits[1].gather(-1, logits[0].topk(args.top_k).indices).argmax(-1) == 0).sum()
            )
            shown.append(
                (
                    row.id,
                    [processor.tokenizer.decode([token]) for token in ids[mask]],
                    each.tolist(),
                )
            )
        ended += int(rollout.ended.sum())
    (total / count).backward()
    assert (
        entry["loss"] == pytest.approx((total / count).item(), rel=1e-4)
        and entry["tokens"] == count
    )
    assert (entry["length"], entry["eos"], entry["truncated"], entry["shrunk"]) == (
        count / 8,
        ended / 8,
        1 - ended / 8,
        0,
    )
    assert (
        entry["agreement"] == pytest.approx(agree / count)
        and 0 < agree < count
        and entry["mem_gb"] > 0.1
    )
    saved = {
        row["id"]: row
        for row in map(json.loads, (tmp_path / "fast" / "rollouts.jsonl").read_text().splitlines())
    }
    for name, tokens, each in shown[::2]:  # the first response to each prompt
        if name in saved:
            assert saved[name]["tokens"] == tokens and saved[name]["divergence"] == pytest.approx(
                each, rel=1e-3, abs=2e-5
            )
    assert len(saved) == args.micro_prompts and saved.keys() <= {name for name, *_ in shown}
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.02)
    assert (
        entry["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.02
    )  # so clipping is at work
    state = one_rank(tmp_path / "fast" / "checkpoint-000001")
    gradient = aligned(weight.grad for weight in student.parameters())
    assert (state["exp_avg"] - 0.1 * gradient).norm() < 1e-4 * (0.1 * gradient).norm()
    torch.optim.AdamW(
        student.parameters(),
        lr=1e-3 * 1 / 2,
        betas=(0.9, 0.999),
        eps=args.adam_eps,
        weight_decay=0.1,
    ).step()
    sure = gradient.abs() > 1e-6  # the sign of a gradient of about 0 is noise
    torch.testing.assert_close(
        state["master"][sure], aligned(student.parameters())[sure], atol=1e-5, rtol=0
    )
    assert sure.float().mean() > 0.5
    flat = aligned(M.load(str(tmp_path / "fast" / "checkpoint-000001"))[0].parameters())
    assert torch.equal(flat, state["master"]) and weights
    start = aligned(teacher.parameters())
    torch.testing.assert_close(
        state["ema"], 0.75 * start + 0.25 * state["master"], atol=1e-7, rtol=1e-6
    )


def test_the_ema_teacher_has_its_closed_form_after_many_steps():
    model, _ = tiny_model.tiny()
    state = sharding.State(sharding.Flat(model, 0, 1), train.parse([*SMALL]))
    start, masters = state.ema.clone(), []
    for _ in range(7):
        state.master.grad.normal_()
        state.update(1e-2, 1.0, 0.05, state.master.grad.norm().item())
        masters.append(state.master.detach().clone())
    want = 0.95**7 * start + sum(
        0.05 * 0.95 ** (6 - i) * master for i, master in enumerate(masters)
    )
    torch.testing.assert_close(state.ema, want)


def test_speed_and_memory_flags_do_not_change_the_update(run, world):
    want = run("plain")
    for name, flags in {
        "micro 1": ["--micro-prompts", "1"],
        "micro 4": ["--micro-prompts", "4"],
        "uneven": ["--micro-prompts", "3"],
        "chunk": ["--chunk", "3"],
        "decode 2": ["--gen-prompts", "2"],
        "decode 1": ["--micro-prompts", "1", "--gen-prompts", "1"],
        "offload": ["--offload-teacher"],
        "keep": ["--no-checkpointing"],
        "workers": ["--workers", "2"],
    }.items():
        assert_same_update(run(name, *flags), want, world)


def test_the_first_step_learns_and_the_schedules_have_their_shape(run, tmp_path):
    args = train.parse(["--warmup", "4", "--schedule", "constant", "--steps", "8"])
    assert [train.learning_rate(step, args) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    args = train.parse(["--warmup", "2", "--schedule", "cosine", "--steps", "12"])
    assert train.learning_rate(2, args) == 1 and train.learning_rate(12, args) == pytest.approx(0.1)
    assert train.learning_rate(7, args) == pytest.approx(0.55)
    run("x")
    assert [entry["lr"] for entry in log(tmp_path / "x")] == [5e-4, 1e-3, 1e-3]


def test_the_crop_reaches_only_the_teacher(run, world, tmp_path):
    """Other crops: the same student answers at the first step, another divergence from the teacher."""
    run("a", "--steps", "1")
    for crop in (world / "data" / "teacher_images").iterdir():
        (tmp_path / "data" / "teacher_images").mkdir(parents=True, exist_ok=True)
        images.load_image(crop).rotate(90).save(tmp_path / "data" / "teacher_images" / crop.name)
    (tmp_path / "data" / "images").symlink_to(world / "data" / "images")
    (tmp_path / "data" / "train.jsonl").write_bytes((world / "data" / "train.jsonl").read_bytes())
    run("b", "--steps", "1", "--data", str(tmp_path / "data"))
    a, b = (
        [json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        for name in "ab"
    )
    assert a and [row["tokens"] for row in a] == [row["tokens"] for row in b]
    assert [row["divergence"] for row in a] != [row["divergence"] for row in b]


def test_every_row_is_seen_once_an_epoch_in_an_order_given_by_the_seed():
    epochs = [[train.batch_rows(10, 3, 0, 3 * e + s) for s in range(3)] for e in range(2)]
    for epoch in epochs:
        seen = sum(epoch, [])
        assert len(set(seen)) == 9 and set(seen) < set(
            range(10)
        )  # the last, incomplete batch is dropped
    assert epochs[0] != epochs[1] and train.batch_rows(10, 3, 1, 0) != train.batch_rows(10, 3, 0, 0)


# -------------------------------------------------------------------------------------------------- ranks and resuming


def test_two_ranks_make_the_same_update_as_one(run, world, tmp_path):
    want = run("one", "--micro-prompts", "1")
    launch(
        in_processes(world, tmp_path / "two", "--micro-prompts", "1", "--offload-teacher", ranks=2)
    )
    assert_same_update(
        load_file(tmp_path / "two" / "checkpoint-000003" / "model.safetensors"), want, world
    )
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert one["tokens"] == two["tokens"] and one["length"] == two["length"]
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-3) and one[
            "grad_norm"
        ] == pytest.approx(two["grad_norm"], rel=2e-3)


def test_a_bucket_is_reduced_within_the_backward_pass_as_soon_as_its_gradients_are_whole(
    lively, mixed_prompt, monkeypatch
):
    model, _ = lively
    ids, events = torch.randint(256, (6, 5)), []
    flat, real = sharding.Flat(model, 0, 1), sharding.Flat.reduce_last
    loss = lambda: (
        (M.response_hidden(model, mixed_prompt, ids) @ model.lm_head.weight.t()).square().mean()
    )
    want = aligned(torch.autograd.grad(loss(), flat.params))
    for number, param in enumerate(flat.params):
        param.register_post_accumulate_grad_hook(
            lambda _, number=number: events.append(("gradient", number))
        )
    into = torch.zeros_like(flat.owned())
    flat.track_gradients(into)
    monkeypatch.setattr(
        sharding.Flat,
        "reduce_last",
        lambda self: (events.append(("bucket", len(self.missing) - 1)), real(self)),
    )
    for times in (1, 2):  # it adds to what is there
        del events[:]
        loss().backward()
        assert sorted(number for kind, number in events if kind == "gradient") == [
            *range(len(flat.params))
        ]
        buckets = [number for kind, number in events if kind == "bucket"]
        assert len(into) > 1 and buckets == [*reversed(range(len(into)))]
        first = events.index(("bucket", len(into) - 1))
        assert any(kind == "gradient" for kind, _ in events[first:])  # not only at the end
        for bucket in buckets:
            inside = [
                i
                for i, span in enumerate(flat.spans)
                if span.start < (bucket + 1) * flat.bucket and span.stop > bucket * flat.bucket
            ]
            before = events[: events.index(("bucket", bucket))]
            assert inside and all(("gradient", i) in before for i in inside)
        flat.reduce()
        assert len(events) == len(flat.params) + len(into)  # nothing was left
        torch.testing.assert_close(into.flatten()[: len(want)], times * want, atol=1e-6, rtol=1e-4)
        assert not flat.grads.any()
    loss().backward()
    with pytest.raises(
        RuntimeError, match="A backward pass began before `reduce` was called for the last one"
    ):
        loss().backward()


def test_a_gradient_that_no_backward_pass_brings_counts_as_0():
    """A parameter that took no part, and a rank that has no micro-batch left."""
    model, _ = tiny_model.tiny()
    flat = sharding.Flat(model, 0, 1)
    into = torch.zeros_like(flat.owned())
    flat.track_gradients(into)
    for _ in range(2):
        flat.params[3].sum().backward()
        flat.reduce()
    flat.reduce()
    assert (into.flatten()[flat.spans[3]] == 2).all() and into.sum() == 2 * flat.params[3].numel()


@pytest.mark.parametrize(
    "then, now",
    [
        ((1, 20_000), (3, 30_000)),
        ((3, 30_000), (2, 20_000)),
        ((7, 9_999), (1, 10**9)),
        ((2, 5_000), (5, 5_000)),
    ],
)
def test_a_state_is_re_sliced_for_any_number_of_ranks_and_any_buckets(
    then, now, tmp_path, monkeypatch
):
    model, processor = tiny_model.tiny()

    def states(world, bucket):
        monkeypatch.setattr(sharding, "BUCKET", bucket)
        flats = [sharding.Flat(copy.deepcopy(model), rank, world) for rank in range(world)]
        return [(flat, sharding.State(flat, train.parse([*SMALL]))) for flat in flats]

    def whole(ranks, name):
        return torch.stack([state.tensors()[name] for _, state in ranks], dim=1).flatten()[
            : ranks[0][0].numel
        ]

    kept, names = states(*then), ("master", "ema", "exp_avg", "exp_avg_sq")
    for flat, state in kept:
        for tensor in state.tensors().values():
            tensor.normal_()
    sharding.save_checkpoint(tmp_path, 4, model, processor, *kept[0])
    for flat, state in kept[1:]:  # as each rank writes its own
        save_file(
            state.tensors(),
            tmp_path / "checkpoint-000004" / "state" / f"{flat.rank}-of-{flat.world}.safetensors",
        )
    resumed = states(*now)
    assert [sharding.resume(tmp_path, flat, state) for flat, state in resumed] == [4] * now[0]
    assert all(torch.equal(whole(resumed, name), whole(kept, name)) for name in names)
    assert all(state.moments["step"] == 4 for _, state in resumed)


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(run, world, tmp_path):
    want = run("straight", "--steps", "6", "--save-every", "2")
    command = in_processes(world, tmp_path / "killed", "--steps", "6", "--save-every", "2")
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "killed" / "log.jsonl").exists() or len(log(tmp_path / "killed")) < 3:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(tmp_path / "killed" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0.1')  # a line torn by the kill
    launch(command)
    assert_equal(load_file(tmp_path / "killed" / "checkpoint-000006" / "model.safetensors"), want)
    assert [e["step"] for e in log(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    assert [e["loss"] for e in log(tmp_path / "killed")] == [
        e["loss"] for e in log(tmp_path / "straight")
    ]
    states = [one_rank(tmp_path / name / "checkpoint-000006") for name in ("killed", "straight")]
    assert_equal(*states)
    assert not torch.equal(states[0]["ema"], states[0]["master"])


def test_a_run_may_resume_on_another_number_of_ranks(run, world, tmp_path):
    want = run("straight", "--steps", "4")
    launch(in_processes(world, tmp_path / "moved", "--steps", "2", ranks=2))
    assert (
        len(list((tmp_path / "moved" / "checkpoint-000002" / "state").glob("*-of-2.safetensors")))
        == 2
    )
    run("moved", "--steps", "3")
    launch(in_processes(world, tmp_path / "moved", "--steps", "4", ranks=2))
    assert_same_update(
        load_file(tmp_path / "moved" / "checkpoint-000004" / "model.safetensors"), want, world
    )
    kept = sorted(path.parent.name for path in (tmp_path / "moved").glob("checkpoint-*/state"))
    assert kept == ["checkpoint-000004"]  # older ones keep the model alone
    assert (tmp_path / "moved" / "checkpoint-000002" / "model.safetensors").exists()


def test_a_checkpoint_half_written_is_as_if_it_were_not_there(run, tmp_path, monkeypatch):
    want = run("straight", "--steps", "4", "--save-every", "2")
    real = sharding.save

    def full_disk(model, processor, folder, weights):
        if "checkpoint" in str(folder) and (tmp_path / "full" / "checkpoint-000002").exists():
            raise OSError(28, "No space left on device")
        real(model, processor, folder, weights)

    monkeypatch.setattr(sharding, "save", full_disk)
    with pytest.raises(
        OSError,
        match=r"Could not write .*checkpoint-000004 \(.*GB free.*make room, then start the same command",
    ):
        run("full", "--steps", "4", "--save-every", "2")
    assert sorted(path.name for path in (tmp_path / "full").glob("checkpoint*")) == [
        "checkpoint-000002"
    ]
    monkeypatch.setattr(sharding, "save", real)
    (tmp_path / "full" / "checkpoint.partial" / "state").mkdir(
        parents=True
    )  # what a kill during a save leaves
    assert_equal(run("full", "--steps", "4", "--save-every", "2"), want)


def test_bf16_live_weights_are_the_rounded_fp32_masters_and_a_resumed_run_goes_on_from_the_masters(
    run, tmp_path, monkeypatch
):
    real = train.load
    monkeypatch.setattr(
        train,
        "load",
        lambda path, *, device, dtype: real(path, device=device, dtype=torch.bfloat16),
    )
    live = run("straight")
    run("twice", "--steps", "2")
    assert_equal(run("twice"), live)
    state, other = (
        one_rank(tmp_path / name / "checkpoint-000003") for name in ("straight", "twice")
    )
    assert_equal(other, state)
    weights = real(
        str(tmp_path / "straight" / "checkpoint-000003"), device="cpu", dtype=torch.bfloat16
    )[0].parameters()
    flat = aligned(weights)
    assert torch.equal(flat, state["master"].bfloat16()) and not torch.equal(
        flat.float(), state["master"]
    )


def test_a_newest_checkpoint_that_was_taken_away_is_missed(run, tmp_path):
    run("x", "--steps", "2", "--save-every", "1")
    shutil.rmtree(tmp_path / "x" / "checkpoint-000002")
    with pytest.raises(
        ValueError,
        match="holds checkpoint-000001, but not the state to resume from.*Put that one back, or choose",
    ):
        run("x", "--steps", "2", "--save-every", "1")
    assert len(log(tmp_path / "x")) == 2


def test_a_damaged_state_is_named(run, tmp_path):
    run("x", "--steps", "1")
    state = tmp_path / "x" / "checkpoint-000001" / "state"
    whole = (state / "0-of-1.safetensors").read_bytes()
    for damage in (
        lambda: (state / "0-of-1.safetensors").write_bytes(whole[:5000]),
        lambda: (state / "0-of-1.safetensors").unlink(),
    ):
        damage()
        with pytest.raises(
            ValueError,
            match="0-of-1.safetensors is missing or damaged .*Put it back, or choose another --out",
        ):
            run("x", "--steps", "2")
    told = json.loads((state / "state.json").read_text())
    for wrong in (told | {"numel": 64}, {key: told[key] for key in ("step", "world", "numel")}):
        (state / "state.json").write_text(json.dumps(wrong))
        with pytest.raises(
            ValueError,
            match=f"state of {wrong['numel']:,} weights, this model has {told['numel']:,}; or older code wrote it",
        ):
            run("x", "--steps", "2")
    (state / "state.json").write_text("{")
    with pytest.raises(
        ValueError, match="state.json is damaged .*Put it back, or choose another --out"
    ):
        run("x", "--steps", "2")


def test_the_same_folder_spelled_otherwise_is_the_same_run(run, tmp_path, monkeypatch, world):
    spelled = ["--toy", "--device", "cpu", "--out", f"{tmp_path}//x/", "--data", f"{world}/./data/"]
    args = train.parse(spelled)
    assert (args.out, args.model, args.data) == (
        f"{tmp_path}/x",
        f"{tmp_path}/x/base",
        f"{world}/data",
    )
    assert (
        train.parse([]).model == "Qwen/Qwen3.5-4B"
        and train.parse([]).data == "yuanqianhao/Vision-OPD-6K"
    )


def test_settings_of_a_run_that_never_began_bind_nobody(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no/model"):
        run("x", "--model", "no/model")
    run("x", "--steps", "1")


def test_resuming_with_another_objective_seed_or_data_is_refused_with_the_difference(
    run, world, tmp_path
):
    run("x", "--steps", "1")
    with pytest.raises(
        ValueError,
        match="beta: 0.5 -> 0.25; .*ema_rate: 0.001 -> 0.1|ema_rate: 0.001 -> 0.1; .*beta: 0.5 -> 0.25",
    ):
        run("x", "--beta", "0.25", "--ema-rate", "0.1")
    toy_scenes.draw(tmp_path / "other", 8, 1)
    with pytest.raises(ValueError, match="rows_sha256"):
        run("x", "--data", str(tmp_path / "other"))
    for flags, key in (
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--objective", "sampled-token"], "objective: "),
        (["--group", "3"], "group: 2 -> 3"),
    ):
        with pytest.raises(ValueError, match=key):
            run("x", "--steps", "2", *flags)
    run("y", "--steps", "2")
    with pytest.raises(ValueError, match="y is at step 2 already, past --steps 1"):
        run("y", "--steps", "1")
    assert json.loads((tmp_path / "y" / "args.json").read_text())["steps"] == 2
    run("z", "--steps", "1", "--schedule", "cosine")
    with pytest.raises(ValueError, match="steps: 1 -> 2"):  # would be another schedule
        run("z", "--steps", "2", "--schedule", "cosine")
    run("x", "--steps", "2", "--chunk", "7")  # speed may change


def test_a_non_finite_gradient_stops_with_the_samples_and_updates_nothing(
    run, world, tmp_path, monkeypatch
):
    real = train.topk_divergence

    def poisoned(*args, **kwargs):
        value, *rest = real(*args, **kwargs)
        return value * (math.nan if (tmp_path / "x" / "checkpoint-000002").exists() else 1), *rest

    monkeypatch.setattr(train, "topk_divergence", poisoned)
    with pytest.raises(
        FloatingPointError,
        match=r"Step 3: loss nan.*Nothing was updated.*train-0-\d+-(small|large)",
    ):
        run("x", "--save-every", "1")
    assert [e["step"] for e in log(tmp_path / "x")] == [1, 2]
    monkeypatch.setattr(train, "topk_divergence", real)
    assert_equal(run("x", "--save-every", "1"), run("straight", "--save-every", "1"))


def test_the_defaults_are_the_papers():
    args = train.parse(["--device", "cpu"])
    want = dict(
        model="Qwen/Qwen3.5-4B",
        data="yuanqianhao/Vision-OPD-6K",
        prompts=96,
        group=8,
        max_new_tokens=1024,
        max_prompt=8192,
        max_crop_prompt=10240,
        divergence="jsd",
        beta=0.5,
        top_k=100,
        ema_rate=0.05,
        lr=2e-6,
        weight_decay=0.01,
        clip=1.0,
        warmup=10,
        schedule="constant",
        steps=None,
    )
    assert {name: getattr(args, name) for name in want} == want
    assert 6241 // args.prompts == 65


def test_help_tells_the_defaults_those_of_the_toy_with_toy(capsys):
    for flags, lr in (([], "2e-06"), (["--toy"], str(demonstration.RUN["lr"]))):
        with pytest.raises(SystemExit):
            train.parse([*flags, "--help"])
        told = capsys.readouterr().out
        assert (
            f"AdamW with betas 0.9 / 0.999 (default: {lr})" in " ".join(told.split())
            and "(default: None)" not in told
        )
        assert (
            "python train.py --toy                       the whole method" in told
        )  # the docstring as it stands


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--step", "3"], "unrecognized arguments: --step"),
        (["--learning-rate", "1"], "unrecognized arguments"),
        (["--beta", "1"], "--beta must lie in"),
        (["--group", "0"], "--group must be at least 1"),
        (["--clip", "0"], "--clip and --adam-eps must be above 0"),
        (["--lr", "nan"], "--clip and --adam-eps must be"),
        (["--adam-eps", "0"], "--adam-eps must be above 0"),
        (["--warmup", "-5"], "--warmup and --workers at least 0"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--toy", "--device", "cuda"], "--toy is made for the CPU"),
        (["--toy", "--plan"], "a number of ranks from 1; got --toy"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--divergence", "kl"], "invalid choice: 'kl'"),
    ],
)
def test_wrong_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_asked_for_and_absent_is_said(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--device", "cuda"])
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_a_batch_is_dealt_out_evenly_by_number_and_size():
    sizes = [random.Random(i).randint(1, 1000) for i in range(96)]
    for world in (1, 2, 3, 8):
        parts = [train.deal(list(range(100, 196)), sizes, rank, world) for rank in range(world)]
        assert sorted(sum(parts, [])) == list(range(100, 196)) and {
            len(part) for part in parts
        } == {96 // world}
        loads = [sum(sizes[j - 100] for j in part) for part in parts]
        assert max(loads) <= 1.02 * sum(loads) / world, (world, loads)
    assert train.deal([5, 3, 4], [7, 7, 7], 0, 1) == [
        5,
        3,
        4,
    ]  # nothing to balance: the batch's order


def test_bad_data_is_named_before_anything_is_trained(run, world, tmp_path):
    with pytest.raises(ValueError, match="has 12 triplets, fewer than one batch.*--prompts"):
        run("x", "--prompts", "16")
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run("x", "--data", str(tmp_path / "nowhere"))
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data" / "images" / "train-0-000009-small.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="train-0-000009-small.png cannot be read as a picture"):
        run("x", "--data", str(tmp_path / "data"))
    assert not (tmp_path / "x").exists()


def test_errors_reach_the_user_as_one_line(tmp_path, capsys):
    for flags, message in (
        (["--data", "no/where"], "neither a folder here nor a data set the hub gave us"),
        (["--data", str(tmp_path / "nowhere")], "no such folder.*give the folder that holds it"),
        (["--data", str(tmp_path), "--out", str(tmp_path / "x")], "has no train.jsonl"),
    ):
        with pytest.raises(SystemExit):
            train.main([*flags, "--device", "cpu"])
        assert re.fullmatch(f"train.py: .*{message}.*line \\d+\\)\n", capsys.readouterr().err)
    toy_scenes.draw(tmp_path / "data", 4, 0)
    with pytest.raises(SystemExit):
        train.main(
            [
                "--data",
                str(tmp_path / "data"),
                "--model",
                "no/model",
                "--prompts",
                "2",
                "--out",
                str(tmp_path / "x"),
                "--device",
                "cpu",
            ]
        )
    assert (
        "train.py: --model 'no/model' is neither a directory here nor a model the hub gave us"
        in capsys.readouterr().err
    )


def test_a_run_stopped_by_hand_says_how_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(
        SystemExit, match="stopped. The same command goes on where the last checkpoint was"
    ):
        train.main(["--device", "cpu", "--out", str(tmp_path / "x")])


def test_a_corrupt_image_stops_the_run_with_its_name_and_the_run_goes_on_once_it_is_mended(
    run, world, tmp_path
):
    want = run("straight")
    shutil.copytree(world / "data", tmp_path / "data")
    row = triplet_format.read_triplets(tmp_path / "data")[train.batch_rows(12, 4, 0, 2)[1]]
    good = row.image.read_bytes()
    row.image.write_bytes(good[: len(good) // 2])
    for workers in ("0", "2"):
        with pytest.raises(ValueError, match=rf"samples \[.*'{row.id}'.*{row.image.name}") as error:
            run("x", "--data", str(tmp_path / "data"), "--save-every", "1", "--workers", workers)
        assert "Traceback" not in str(error.value)
    row.image.write_bytes(good)
    assert_equal(run("x", "--data", str(tmp_path / "data"), "--save-every", "1"), want)


def test_an_error_on_one_of_two_ranks_is_said_before_the_run_is_torn_down(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    row = triplet_format.read_triplets(tmp_path / "data")[
        train.batch_rows(12, 4, 0, 0)[2]
    ]  # the second rank's
    row.image.write_bytes(row.image.read_bytes()[:300])
    command = in_processes(
        world, tmp_path / "x", "--data", str(tmp_path / "data"), "--micro-prompts", "1", ranks=2
    )
    (tmp_path / "x.py").write_text(
        "import train; train.prepare_toy = lambda *_: None; train.main()"
    )
    done = launch(command, check=False)
    assert (
        done.returncode != 0
        and f"samples ['{row.id}']" in done.stderr
        and row.image.name in done.stderr
    )


def test_ranks_that_do_not_share_a_batch_evenly_are_refused(world, tmp_path):
    done = launch(in_processes(world, tmp_path / "x", "--prompts", "3", ranks=2), check=False)
    assert done.returncode != 0 and "--prompts 3 cannot be shared evenly by 2 ranks" in done.stderr


# ------------------------------------------------------------------------------------------------------------- the toy


def test_the_toy_command_leaves_a_table_results_two_models_and_a_page(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(base_model.BASE, "steps", 2)
    monkeypatch.setattr(demonstration, "ROWS", 24)
    out = tmp_path / "toy"
    flags = ["--toy", "--out", str(out), "--steps", "2", "--workers", "0", "--device", "cpu"]
    train.main(flags)
    printed = capsys.readouterr().out
    assert (
        "toy, full" in printed and "toy-large, crop" in printed and "step    2/2 | loss" in printed
    )
    for when in ("before", "after"):
        result = json.loads((out / f"eval-{when}" / "result.json").read_text())["benches"]
        assert [
            result[name][view]["n"] for name in ("toy", "toy-large") for view in ("full", "crop")
        ] == [600, 600, 300, 300]
        assert result["toy-holdout"]["full"]["n"] == 300 and "crop" not in result["toy-holdout"]
    for name in (
        "log.jsonl",
        "args.json",
        "rollouts.jsonl",
        "report.html",
        "base/config.json",
        "checkpoint-000002/config.json",
    ):
        assert (out / name).exists(), name
    assert json.loads((out / "args.json").read_text())["versions"]["torch"] == torch.__version__
    base = (out / "base" / "model.safetensors").stat().st_mtime_ns
    train.main(flags)  # again: nothing left to do
    assert (out / "base" / "model.safetensors").stat().st_mtime_ns == base and len(log(out)) == 2
