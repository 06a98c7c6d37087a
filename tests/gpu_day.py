"""Everything that is asked of a GPU, in nine minutes at most, the most telling first.

    bash tests/gpu_pack.sh              before, where there is a network
    bash tests/gpu_day.sh OUT           on a machine with a GPU, torch 2.11 and no network
    bash tests/gpu_day.sh OUT --dry     the same on a CPU, in tiny shapes

Each part is a process with a time limit; after one that fails the next begins. OUT/report.md and
OUT/report.json are written anew after each, OUT/output.txt holds what all of them printed. Weights
are random, in Qwen3.5-4B's shape, or a 2B's where the card has under 120 GB. `kernels` are those of
fla, which only parts that say so can import.
"""

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PACK = ROOT / "gpu-pack"
SECONDS = 530  # of all parts on a GPU
PATIENCE = 20  # times as many on a CPU, which may be a busy one
ROOMY = 120  # GB of a card on which a whole step of the 4B fits
CHUNKS = (256, 512, 1024, 2048)
PICTURES = 50


@dataclass
class Part:
    """One process."""

    name: str
    limit: float  # seconds on a GPU
    command: list[str]
    kernels: bool = False  # whether it can import fla
    read: Callable | None = None  # what it printed -> found; None: the last line of JSON
    ends_with: str = ""  # the error that it must end with, where it must
    state: str = ""  # done, or why not
    seconds: float = 0.0
    found: dict = field(default_factory=dict)
    last_lines: list[str] = field(default_factory=list)  # of one that is not done


# ------------------------------------------------------------------------------------------ report


def within(low: float, high: float):
    return lambda number: low <= number <= high


def goals(found: dict[str, dict]) -> list[tuple[str, float | None, bool]]:
    """(goal, the number that was found or None, whether it is met); found: by name of the part."""

    def of(part: str, key: str):
        return found.get(part, {}).get(key)

    def ratio(over, under):
        return over / under if over and under else None

    step, plain = (of(name, "seconds") for name in ("step, kernels", "plain step, kernels"))
    peak = ratio(of("step, kernels", "peak_gb"), of("step, kernels", "plan_gb"))
    ran = [of(name, "ran") for name in ("comparisons, others", "comparisons, others, kernels")]
    failed = None
    if all(ran):
        names = [name for outcomes in ran for name in outcomes if "gradients" in name]
        failed = len([name for name in names if not name.endswith("PASSED")])
    told = [
        ("loss: at most 1.6 times its four matmuls", of("loss", "ratio"), within(0, 1.6)),
        ("loss: under 2 GB extra at any number of tokens", of("loss", "extra_gb"), within(0, 2)),
        (
            "compiled generation: at most 2.5 times its floor",
            of("generation, compiled, kernels", "x_floor"),
            within(0, 2.5),
        ),
        ("a step: 3 times as fast as the plain way", ratio(plain, step), within(3, 1e9)),
        ("peak memory: within -15% and +25% of --plan", peak, within(0.85, 1.25)),
        (
            "gradients in bf16 as near to fp32 as a plain pass's: comparisons that fail",
            failed,
            within(0, 0),
        ),
    ]
    return [(goal, number, number is not None and met(number)) for goal, number, met in told]


def short(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {short(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(out: Path, machine: dict, parts: list[Part]) -> None:
    from storage.files import write

    whole = [part for part in parts if part.read is not outcomes or part.state != "out of time"]
    judged = goals({part.name: part.found for part in whole})
    real = machine.get("device") == "cuda"
    lines = ["# " + ", ".join(f"{key} {value}" for key, value in machine.items()), "", "## Goals"]
    for goal, number, met in judged:
        verdict = "not measured" if number is None else "met" if met else "not met"
        if not real:
            verdict = "not run on a GPU"
        lines.append(f"* {goal}: {'-' if number is None else format(number, '.2f')}, {verdict}")
    lines += ["", "## Parts"]
    for part in parts:
        lines.append(f"* {part.name}: {part.state}, {part.seconds:.0f} of {part.limit:.0f} s")
        lines += [f"    * {k}: {short(v)}" for k, v in part.found.items() if k != "kernel_shares"]
        lines += [f"        {line}" for line in part.last_lines]
    for part in parts:
        shares = part.found.get("kernel_shares", [])
        lines += ["", f"## Kernels of {part.name}"] if shares else []
        lines += [f"* {share:6.1%} {name}" for name, share in shares]
    judged = [{"goal": goal, "found": number, "met": met and real} for goal, number, met in judged]
    told = [{key: value for key, value in vars(part).items() if key != "read"} for part in parts]
    everything = {"machine": machine, "goals": judged, "parts": told}
    write(out / "report.json", json.dumps(everything, indent=1) + "\n")
    write(out / "report.md", "\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------- parts


def last_json(text: str) -> dict:
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def outcomes(text: str) -> dict:
    """Of the tests that ended, as pytest -v prints them."""
    ran = re.findall(r"::(\S.*? (?:PASSED|FAILED|ERROR))", text)
    return {"passed": sum(each.endswith("PASSED") for each in ran), "ran": ran}


def run_part(part: Part, site: Path, ends: float, log) -> None:
    """Runs it, in a session of its own that is ended with its time."""
    paths = [site / "kernels"] if part.kernels else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, site / "wheels"])),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    begun = time.monotonic()
    limit = min(part.limit, ends - begun)
    if limit < 5:  # not enough to begin
        part.state = "no time left"
        return
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        printed, _ = process.communicate(timeout=limit)
        ended_well = process.returncode == 0 or (part.ends_with and part.ends_with in printed)
        part.state = "done" if ended_well else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        part.state = "out of time"
    part.seconds = time.monotonic() - begun
    log.write(f"\n===== {part.name}\n{printed}")
    log.flush()
    try:
        part.found = (part.read or last_json)(printed)
    except (OSError, ValueError, LookupError) as error:
        part.state += f", unread: {error!r}"
    if part.state != "done":
        part.last_lines = printed.splitlines()[-15:]


def stages_of(work: Path, machine: dict) -> list[list[Part]]:
    """The parts; those of one stage run side by side."""
    device = machine["device"]
    real = device == "cuda"
    me = [sys.executable, __file__, str(work), "--size", machine["size"], "--device", device]
    data, pictures, model = work / "data", work / "pictures", work / "model"
    tests = [sys.executable, "-m", "pytest", "-v", "tests/test_gpu.py"]
    tests += ["--device", "cuda"] if real else ["-k", "loss"]

    def own(name, limit, what, kernels=False):
        full_name = f"{name}, kernels" if kernels else name
        return Part(full_name, limit, [*me, "--only", what], kernels)

    def compared(name, chosen, kernels):
        command = [*tests, "-k", chosen] if real else tests
        return Part(f"comparisons, {name}", 80, command, kernels, outcomes)

    def script(name, limit, *command, read=None):
        return Part(name, limit, [sys.executable, *map(str, command)], True, read)

    comparisons = [
        compared("decoding", "decoding", False),
        compared("others", "not decoding", False),
    ]
    linear = "not qwen3_vl and"  # of the model that has linear attention
    comparisons += [
        compared("decoding, kernels", f"{linear} decoding", True),
        compared("others, kernels", f"{linear} not decoding", True),
    ]
    flags = (
        f"--device {device} --prompts 4 --group 4 --max-new-tokens 12 --workers 2 --save-every 2"
    )
    train = ["train.py", "--model", "toy/base-model", "--data", data, "--out", work / "run"]
    train += flags.split()
    evaluate = ["evaluate.py", "--bench", pictures, "--model", model, "--out", work / "answers"]
    evaluate += ["--max-new-tokens", "32" if real else "2", "--batch", PICTURES]
    synth = ["synth.py", "--images", pictures / "images", "--model", model]
    synth += ["--out", work / "triplets", "--batch", PICTURES, "--proposer", work / "boxes.jsonl"]
    measured = [
        own("step", 45, "step"),
        own("step", 60, "step", True),
        own("plain step", 60, "plain", True),
        own("loss", 40, "loss"),
        own("generation", 30, "generation", True),
        own("generation, compiled", 80, "compiled", True),
        own("data", 40, "data"),
    ]
    scripts = [
        script("training", 20, *train, "--steps", "2", read=partial(training, work)),
        script("training, resumed", 20, *train, "--steps", "4", read=partial(training, work)),
        script("evaluate.py", 25, *evaluate, read=partial(answered, work)),
        script("synth.py", 60, *synth, read=partial(synthesised, work)),
    ]
    scripts[-1].ends_with = "no sample from"  # a model of random weights asks no questions
    if real:
        return [comparisons, *([part] for part in measured + scripts)]
    # A CPU has no kernels to do without, and nothing to time.
    return [[comparisons[0], *measured[1:]], [scripts[0], *scripts[2:]], [scripts[1]]]


def training(work: Path, printed: str) -> dict:
    from storage.files import read_jsonl

    steps = read_jsonl(work / "run" / "log.jsonl", [])
    return {"steps": len(steps), "losses": [step["loss"] for step in steps]}


def answered(work: Path, printed: str) -> dict:
    benches = json.loads((work / "answers" / "result.json").read_text())["benches"]
    seconds = [views["full"]["seconds"] for views in benches.values()]
    return {"images_a_second": 1 / statistics.mean(seconds)}


def synthesised(work: Path, printed: str) -> dict:
    """Of all photographs that are done; by stage in seconds."""
    from storage.files import read_jsonl

    lines = [
        row
        for path in (work / "triplets" / ".parts").glob("*.jsonl")
        for row in read_jsonl(path, [])
    ]
    done = [row["seconds"] for row in lines if "seconds" in row]
    spent = {stage: sum(each[stage] for each in done) for stage in done[0]}
    return {"images": len(done), "images_a_second": len(done) / sum(spent.values()), **spent}


def look_at_machine(device: str) -> dict:
    import torch

    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "flash-linear-attention"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    found["size"] = "tiny"
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        gigabytes = card.total_memory / 1e9
        found |= {"card": card.name, "GB": round(gigabytes)}
        found["size"] = "4b" if gigabytes > ROOMY else "2b"
    return found


def main() -> None:
    args = parse()
    if args.only == "machine":
        print(json.dumps(look_at_machine(args.device)))
        return
    if args.only:
        import gpu_parts

        gpu_parts.PARTS[args.only](args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    patience = PATIENCE if args.dry else 1
    ends = time.monotonic() + SECONDS * patience
    device = "cpu" if args.dry else "cuda"
    machine = {"device": device}
    parts = []
    with tempfile.TemporaryDirectory() as work, (args.out / "output.txt").open("w") as log:
        site = Path(work) / "site"
        run = partial(run_part, site=site, ends=ends, log=log)

        def run_stage(stage: list[Part]) -> None:
            for part in stage:
                part.limit *= patience
            parts.extend(stage)
            with ThreadPoolExecutor(len(stage)) as pool:
                list(pool.map(run, stage))
            write_report(args.out, machine, parts)

        if not args.dry:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
            stage = []
            for folder in ("wheels", "kernels"):
                wheels = sorted(map(str, (PACK / folder).glob("*.whl")))
                command = [*install, "--no-compile", "--target", str(site / folder), *wheels]
                stage.append(Part(f"install {folder}", 30, command))
            run_stage(stage)
        look = [sys.executable, __file__, work, "--only", "machine", "--device", device]
        seen = Part("machine", 30, look, kernels=True)
        run_stage([seen])
        machine |= seen.found
        for stage in stages_of(Path(work), {"size": "2b"} | machine):
            run_stage(stage)
    print(args.out / "report.md")


def parse():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path)
    p.add_argument("--dry", action="store_true", help="on a CPU, in tiny shapes")
    p.add_argument("--only", help="used by the script itself: a part of its own, in this process")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of that part")
    p.add_argument("--size", default="tiny", help="of its model: see bench.toml")
    return p.parse_args()


if __name__ == "__main__":
    main()
