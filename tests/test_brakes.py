"""Warnings of a run whose answers run away."""

import pytest

from launch.brakes import WINDOW, Brakes
from launch.run_folder import RunLog

CALM = {"length": 40.0, "loops": 0.0, "eos": 1.0, "agreement": 0.8}
ENTRY = CALM | {"tokens": 9, "steps": 30, "loss": 0.1, "grad_norm": 0.1, "shrunk": 0, "mem_gb": 1.0}


def log(**late):
    """30 steps, the last 10 with other figures."""
    return [{"step": i + 1, **CALM, **(late if i >= 20 else {})} for i in range(30)]


def runaways(entries):
    """What is said at the last step."""
    brakes = Brakes()
    for entry in entries:
        found = brakes.runaways(entry)
    return found


@pytest.mark.parametrize(
    "key, late, fine",
    [
        ("length", 90.0, 70.0),
        ("loops", 0.06, 0.04),
        ("eos", 0.7, 0.9),
        ("agreement", 0.5, 0.7),
    ],
)
def test_what_runs_away_is_named_with_its_figures(key, late, fine):
    ((found, warning),) = runaways(log(**{key: late}))
    assert found == key
    assert "Step 30" in warning
    assert not runaways(log(**{key: fine}))


def test_short_runs_and_methods_without_a_figure_are_left_alone():
    assert not runaways(log(length=90.0)[-19:])
    without = [{"step": row["step"], "length": row["length"]} for row in log(length=90.0)]
    assert [key for key, _ in runaways(without)] == ["length"]


def test_of_a_long_log_its_first_and_last_steps_are_kept():
    brakes = Brakes()
    calm = [{"step": step, "length": 40.0} for step in range(1, 1001)]
    for entry in calm + [{"step": 1001, "length": 1e6}]:
        found = brakes.runaways(entry)
    assert {"1001:", "100036", "40"} <= set(found[0][1].split())
    assert len(brakes.first["length"]) == len(brakes.last["length"]) == WINDOW


def test_a_run_warns_once_also_when_it_was_resumed(tmp_path, capsys):
    seconds = dict.fromkeys(("gen_s", "teach_s", "learn_s", "other_s"), 1.0)
    for begin in (0, 15):
        run_log = RunLog(tmp_path, begin, 30)
        for step in range(begin, 30):
            length = 40.0 if step < 12 else 400.0
            run_log.write(ENTRY | seconds | {"step": step + 1, "length": length}, [])
        assert capsys.readouterr().out.count("answers grow:") == 1
