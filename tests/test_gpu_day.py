"""The day that there is a GPU must not be the first one on which its script runs."""

import io
import json
import os
import subprocess
import sys
import time

import gpu_day
import pytest
from conftest import ROOT


def test_every_part_runs_dry_and_finds_what_it_is_for(tmp_path):
    command = ["bash", "tests/gpu_day.sh", str(tmp_path), "--dry"]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    parts = {part["name"]: part for part in report["parts"]}
    printed = (tmp_path / "report.md").read_text()
    assert {part["state"] for part in parts.values()} == {"done"}, printed
    found = {name: part["found"] for name, part in parts.items()}
    assert found["step, kernels"]["seconds"] > 0
    assert len(found["step, kernels"]["kernel_shares"]) == 25
    assert found["plain step, kernels"]["seconds"] > 0
    assert found["loss"]["ratio"] > 1
    assert found["generation, compiled, kernels"]["x_floor"] > 1
    assert found["training, resumed"]["steps"] == 4
    assert found["training, resumed"]["losses"][:2] == found["training"]["losses"]
    assert found["evaluate.py"]["images_a_second"] > 0
    assert found["synth.py"]["images"] == 2
    assert found["synth.py"]["question"] > 0
    assert found["comparisons, decoding"]["passed"] == 1
    assert "nan" not in printed
    assert not any(goal["met"] for goal in report["goals"])  # a CPU meets none
    assert printed.count("not run on a GPU") == len(report["goals"])


def test_a_part_that_fails_or_takes_too_long_is_told_and_costs_no_more_than_its_time(tmp_path):
    def ran(code, limit=20.0):
        part = gpu_day.Part("a part", limit, [sys.executable, "-c", code])
        gpu_day.run_part(part, tmp_path, time.monotonic() + 60, io.StringIO())
        return part

    part = ran("print('{\"n\": 1}'); raise SystemExit(3)")
    assert part.state == "failed (3)"
    assert part.found == {"n": 1}
    assert part.last_lines == ['{"n": 1}']
    # Its own processes end with it.
    child = "import subprocess; subprocess.run(['sleep', '50'])"
    part = ran(child, 6)
    assert part.state == "out of time"
    assert 6 <= part.seconds < 20


@pytest.mark.parametrize(
    "change, met",
    [
        ({}, [True] * 6),
        ({"loss": {"ratio": 1.7, "extra_gb": 2.1}}, [False, False, True, True, True, True]),
        (
            {"step, kernels": {"seconds": 4, "peak_gb": 13, "plan_gb": 10}},
            [True] * 3 + [False] * 2 + [True],
        ),
        ({"comparisons, others": {"ran": ["gradients FAILED"]}}, [True] * 5 + [False]),
        ({"comparisons, others, kernels": {}}, [True] * 5 + [False]),
    ],
)
def test_goals_are_judged_by_what_was_found(change, met):
    passed = {"ran": ["gradients PASSED", "a step FAILED"]}
    found = {
        "loss": {"ratio": 1.5, "extra_gb": 1.9},
        "generation, compiled, kernels": {"x_floor": 2.4},
        "step, kernels": {"seconds": 1, "peak_gb": 9, "plan_gb": 10},
        "plain step, kernels": {"seconds": 4},
        "comparisons, others": passed,
        "comparisons, others, kernels": passed,
    }
    assert [reached for _, _, reached in gpu_day.goals(found | change)] == met
