"""The folder of a training run: whose it is (args.json), and its logs."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from launch.brakes import Brakes
from launch.tracking import curves
from launch.version import commit
from storage.files import read_json, read_jsonl, write, write_jsonl
from triplets.format import LazyTriplets, Triplet, only


def claim(out: Path, begun: bool, now: dict, free: set[str]) -> None:
    """Write out/args.json: the settings `now`, with commit and versions. Refuse a folder in which a
    run has begun whose settings, but those named in `free`, were others."""
    path, then = out / "args.json", now
    if begun:  # else nothing is lost
        notes = []
        then = read_json(path, notes)
        if notes:
            raise ValueError(
                f"{out} holds a run, but {notes[0]}: whose run is it? Put the file back, or "
                "choose another --out."
            )
    differ = [key for key in now if key not in free and then.get(key) != now[key]]
    if differ:
        told = "; ".join(f"{key}: {then.get(key)!r} -> {now[key]!r}" for key in differ)
        raise ValueError(
            f"{out} holds a run with other settings ({told}). Resume it with the same ones, or "
            "choose another --out."
        )
    out.mkdir(parents=True, exist_ok=True)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    told = {**now, "commit": commit(), "versions": versions}
    write(path, json.dumps(told, indent=1))


def rows_digest(rows: Sequence[Triplet], with_answers: bool) -> str:
    """Of all that a run depends on of its data, but not of where they lie; of a large file, of all
    its bytes."""
    if isinstance(rows, LazyTriplets):
        return rows.sha256.hexdigest()
    told = []
    for row in rows:
        crops = only([crop.name for crop in row.crops])
        told.append([row.id, row.question, only(row.boxes), row.image.name, crops])
    if with_answers:
        told += [row.answer for row in rows]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def missing_kernels(model) -> list[str]:
    """Packages that are not installed and would make this model faster here; transformers uses them
    when they are."""
    linear = any(hasattr(layer, "linear_attn") for layer in model.model.language_model.layers)
    if not torch.cuda.is_available() or not linear:
        return []
    kernels = {
        "'flash-linear-attention>=0.6'": "fla",  # older ones are reported to be wrong on Hopper
        "causal-conv1d": "causal_conv1d",
    }
    return [package for package, module in kernels.items() if find_spec(module) is None]


def introduce(run, begin: int) -> None:
    """Say what a run begins with."""
    missing = missing_kernels(run.shards.plain)
    if missing:
        print(f"Linear attention runs on slow kernels: pip install {' '.join(missing)}", flush=True)
    left = "nothing left to do"
    if begin < run.settings.steps:
        left = f"steps {begin + 1} to {run.settings.steps}"
    print(
        f"{len(run.rows):,} triplets, {run.shards.numel / 1e6:,.1f}M weights, {run.world} rank(s), "
        + left,
        flush=True,
    )


class RunLog:
    """log.jsonl, rollouts.jsonl, curves (track: launch/tracking.py); on the screen a bar, and a
    line for each `every` steps. Lines of later steps than `begin` are dropped: these are about to
    be done again."""

    def __init__(self, out: Path, begin: int, steps: int, every: int = 1, track: str | None = None):
        self.every = every
        self.bar = tqdm(desc=out.name, initial=begin, total=steps, unit="step")
        self.files = [out / "log.jsonl", out / "rollouts.jsonl"]
        self.idle_steps = 0  # in which there was nothing to learn from
        self.brakes, self.warned = Brakes(), set()
        for path in self.files:
            notes = []
            rows = [row for row in read_jsonl(path, notes) if 0 < row.get("step", 0) <= begin]
            write_jsonl(path, rows)
            self.idle_steps += sum(row.get("tokens") == 0 for row in rows)
            if path == self.files[0]:
                for row in rows:
                    self.brakes.runaways(row)
            if begin and notes:
                print(*notes, sep="\n", flush=True)
        self.send_to_curves = curves(track, out, begin)

    def write(self, entry: dict, shown: list[dict]) -> None:
        """A step's entry, and rollouts to look at."""
        self.idle_steps += entry["tokens"] == 0
        entry = {**entry, "idle_steps": self.idle_steps}
        for path, rows in zip(self.files, ([entry], shown), strict=True):
            with path.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        last = entry["step"] == entry["steps"]
        if last or entry["step"] % self.every == 0:
            tqdm.write(log_line(entry), file=sys.stdout)
        for key, warning in self.brakes.runaways(entry):
            if key not in self.warned:
                self.warned.add(key)
                tqdm.write(warning, file=sys.stdout)
        if "probe_full" in entry:
            full, crop = entry["probe_full"], entry["probe_crop"]
            self.bar.set_postfix_str(f"reads {full:.0%} in full view, {crop:.0%} of crops")
        self.bar.update()
        if last:
            self.bar.close()
        self.send_to_curves(entry)


def looked_at(run, step: int) -> bool:
    """Whether rollouts of a step (0, 1, ..) are kept for the report: by the first rank."""
    settings = run.settings
    return run.rank == 0 and (step % settings.show_every == 0 or step + 1 == settings.steps)


def show(
    run, step: int, micro, per_token: torch.Tensor, weights: torch.Tensor | None
) -> list[dict]:
    """The first response to each of up to 4 prompts of a micro-batch for the report; where these
    are divergences (weights is not None), each token with its own and, where they differ, with its
    weight as a multiple of the mean one; where the method has a target, with how far that moved.
    per_token: (n,); weights: (N, T)."""
    shown, mask, folder = [], micro.rollout.mask, run.settings.out
    if not mask.any():
        return []
    lengths = mask.sum(1).tolist()
    per_response = per_token.split(lengths)
    if micro.moved:
        moved = torch.zeros_like(per_token)  # (n,)
        moved[weights[mask] != 0] = torch.cat(micro.moved)  # the others were skipped
    scored = weights is not None
    differ = scored and weights[mask].min() < weights[mask].max()
    for i, row in enumerate(micro.rows[:4]):
        first = i * run.settings.group
        ids = micro.rollout.ids[first][mask[first]].tolist()
        divergence = [round(d, 5) for d in per_response[first].tolist()]
        if differ:  # a token that does not count was not compared
            counts = weights[first][mask[first]] / weights[mask].mean()
            divergence = [d if count else None for d, count in zip(divergence, counts, strict=True)]
        if ids:  # it is trained on
            shown.append(
                {
                    "step": step,
                    "id": row.id,
                    "question": row.question,
                    "answer": row.answer,
                    "image": os.path.relpath(row.image, folder),
                    "crops": [os.path.relpath(crop, folder) for crop in row.crops],
                    "tokens": [run.processor.tokenizer.decode([token]) for token in ids],
                    "divergence": divergence if scored else [],
                }
            )
            if differ:
                shown[-1]["weights"] = [round(count, 3) for count in counts.tolist()]
            if micro.moved:
                shares = moved.split(lengths)[first].tolist()
                shown[-1]["moved"] = [round(share, 3) for share in shares]
    return shown


def log_line(entry: dict) -> str:
    """A step's log entry as people read it."""
    told = [
        f"step {entry['step']:4d}/{entry['steps']}",
        f"loss {entry['loss']:.4f}",
        f"grad {entry['grad_norm']:.2f}",
        f"len {entry['length']:.0f}",
        f"eos {entry['eos']:.2f}",
    ]
    if entry["loops"]:
        told.append(f"loops {entry['loops']:.2f}")
    for name, key in (("agree", "agreement"), ("right", "right"), ("kept", "kept")):
        if key in entry:
            told.append(f"{name} {entry[key]:.2f}")
    seconds = {name: entry[f"{name}_s"] for name in ("gen", "teach", "learn", "other")}
    whole = sum(seconds.values())
    told.append(" ".join(f"{name} {s:.1f}s {s / whole:.0%}" for name, s in seconds.items()))
    told.append(f"mem {entry['mem_gb']:.1f}G")
    if entry["tokens"] == 0:
        told.append(f"nothing to learn from, no update ({entry['idle_steps']} such steps so far)")
    if entry["shrunk"]:
        told.append(f"shrunk {entry['shrunk']}")
    return " | ".join(told)
