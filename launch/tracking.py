"""A run's curves: TensorBoard's files, or a tracking package; a resumed run goes on with them."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from storage.files import read_json, write

TRACKERS = ["tensorboard", "wandb", "trackio"]


def why_not_tracked(track: str | None) -> str | None:
    if track and not find_spec(track):
        return f"--track {track} needs the package {track}: pip install {track}"
    return None


def curves(track: str | None, out: Path, begin: int) -> Callable[[dict], None]:
    """What takes a step's log entry, of steps after `begin`. track: one of TRACKERS; None:
    TensorBoard's files, where it is installed. Raises ValueError where the package gives no run."""
    if track in (None, "tensorboard"):
        return tensorboard(out, begin)
    package = import_module(track)
    id_file = out / f"{track}-id"
    if not id_file.exists():
        write(id_file, uuid4().hex[:8])
    unique = id_file.read_text()
    name = f"{out.resolve().name}-{unique}"
    where = {"id": unique, "dir": out} if track == "wandb" else {}
    config = read_json(out / "args.json", [])
    try:
        package.init(project="vision-opd", name=name, config=config, resume="allow", **where)
    except Exception as error:  # whatever a package, its server or its login can raise
        raise ValueError(
            f"--track {track} began no run ({type(error).__name__}: {error}). Log in, work offline "
            "(WANDB_MODE=offline), or leave it out."
        ) from error

    def send(entry: dict) -> None:
        figures = {key: value for key, value in entry.items() if key != "step"}
        package.log(figures, step=entry["step"])

    return send


def tensorboard(out: Path, begin: int) -> Callable[[dict], None]:
    """Into out/tensorboard, without what a killed run wrote there of later steps; nowhere if it is
    not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda entry: None
    board = SummaryWriter(out / "tensorboard", purge_step=begin + 1)

    def send(entry: dict) -> None:
        for key, value in entry.items():
            board.add_scalar(key, value, entry["step"])

    return send
