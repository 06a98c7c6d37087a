"""Which version of this code runs, and on what."""

import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def commit() -> str | None:
    """Git's name for this code, -dirty with changes that are not committed; None without git."""
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def versions() -> str:
    """One line, without importing what it names."""
    return (
        f"Vision-OPD {commit() or 'of an unknown commit'}, Python {platform.python_version()}, "
        f"torch {version('torch')}, transformers {version('transformers')}"
    )
