"""A script's work outlives whoever reads its output; its errors are one line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

WORK = """
import sys
from pathlib import Path
from launch import script

def main(out):
    for number in range(20_000):
        print(f"step {number} \u2192 done", flush=number % 1000 == 0)
    Path(out).write_text("all of it")

script.run(main, sys.argv[1])
"""


def run(code: str, *args, shell: str = "", **environment) -> subprocess.CompletedProcess:
    """The code in a process of its own, its output handed to the shell's `shell`."""
    command = f'set -o pipefail; exec "$0" -c "$1" "${{@:2}}" {shell}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
    )


@pytest.mark.parametrize("shell", ["| head -1", "> /dev/full", ">&-", "2>&- | head -1"])
def test_output_that_nobody_takes_stops_no_work(shell, tmp_path):
    done = run(WORK, tmp_path / "out", shell=shell)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out").read_text() == "all of it"


def test_an_ascii_terminal_is_shown_what_it_can_show(tmp_path):
    done = run(WORK, tmp_path / "out", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert done.stdout.startswith(b"step 0 \\u2192 done")


@pytest.mark.parametrize(
    "error, said, code",
    [
        ("ValueError('found 3, expected 4')", "found 3, expected 4 (<string>, line 4)", 1),
        ("FileNotFoundError('no x')", "no x (<string>, line 4)", 1),
        ("FloatingPointError('no numbers')", "no numbers (<string>, line 4)", 1),
        ("script.Stopped('saved')", "saved", 75),
        ("KeyboardInterrupt()", "stopped. The same command goes on from here.", 130),
    ],
)
def test_an_expected_error_is_one_line(error, said, code):
    done = run(f"from launch import script\n\ndef main():\n    raise {error}\n\nscript.run(main)")
    assert done.returncode == code
    assert done.stderr.decode() == f"-c: {said}\n"


def test_a_fault_of_ours_keeps_its_traceback():
    done = run("from launch import script\nscript.run(lambda: {}['x'])")
    assert b"Traceback" in done.stderr
