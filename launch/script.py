"""How a script begins and ends: its work outlives whoever reads its output, and an error is one
line.

if __name__ == "__main__":
    run(main)

Exit codes: 0 done; 1 an error; 2 flags that make no command (argparse); 75 told to stop, and saved;
130 Ctrl-C.
"""

import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

EXPECTED = (OSError, ValueError, ArithmeticError, ImportError)
SAVED = 75  # EX_TEMPFAIL of sysexits.h: start it again
INTERRUPTED = 130  # as shells have it: 128 + SIGINT


class Stopped(Exception):  # noqa: N818  (no error)
    """Work was told to stop, and nothing of it is lost; says so."""


class Lasting:
    """A stream of text whose reader may go away, or whose disk may be full."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115  (none: it was closed)
        self.stream.reconfigure(errors="backslashreplace")  # an ASCII terminal shows what it can

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        """From now on to nowhere, what is still in the stream's buffer included."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def run(main, *args) -> None:
    """main(*args); an expected error is said in one line, with exit code 1, at once: other ranks
    may still wait."""
    name = Path(sys.argv[0]).name
    try:
        with redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr)):
            main(*args)
    except EXPECTED as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        print(f"{name}: {error} ({place})", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except Stopped as told:
        print(f"{name}: {told}", file=sys.stderr, flush=True)
        raise SystemExit(SAVED) from None
    except KeyboardInterrupt:
        print(f"{name}: stopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
