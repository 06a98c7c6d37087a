"""What ranks have done: a file of JSON lines each, in .parts, from which a run goes on and which
are merged into the data set.

The first line of a part is {"config": ..}; then a line for each finished photograph, appended after
its images were saved. A torn last line, of a killed process, counts as not written.
"""

import json
from collections import Counter
from pathlib import Path

from storage.files import numbered_lines, remove_scratch, write, write_jsonl
from synthesis.checking import balance
from triplets.format import read_triplets
from triplets.preview import draw_preview

SERVERS = ("model_server", "labels_model_server")  # of a configuration; they may move


def open_part(out: Path, rank: int, config: dict):
    """The rank's part, open for lines at its end."""
    path = out / ".parts" / f"{rank:05d}.jsonl"
    part = path.open("a")
    end = path.read_bytes().rfind(b"\n") + 1
    part.truncate(end)  # cuts a torn last line
    if end == 0:
        print(json.dumps({"config": config}), file=part)
    return part


def read_parts(out: Path, config: dict | None = None) -> tuple[dict, dict[str, dict]]:
    """(the configuration, which must be `config` or everywhere the same, {file: line} of the
    finished photographs) of every rank. Raises ValueError, FileExistsError."""
    done = {}
    for path in sorted((out / ".parts").glob("*.jsonl")):
        for _, line in numbered_lines(path):
            if not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path} has a damaged line ({error}). Delete it: its photographs are done "
                    "again."
                ) from error
            if "file" in row:
                done[row["file"]] = row
                continue
            found = row["config"]
            config = config or found
            differs = {
                key: (found.get(key), config.get(key))
                for key in found | config
                if found.get(key) != config.get(key) and key not in SERVERS
            }
            if differs:
                raise FileExistsError(
                    f"{path} was made with another configuration; (found, wanted) is {differs}. "
                    "Run again with the same one, or choose another --out."
                )
    return config, done


def merge(out: Path, font: Path | None = None):
    """What the ranks have done so far -> train.jsonl (sorted by id), stats.json, preview.png;
    repeating it changes nothing. The same bytes under several names count once, under the first
    name.

    Raises FileNotFoundError without a finished photograph, ValueError with the drops without any
    sample.
    """
    config, done = read_parts(out)
    if not done:
        raise FileNotFoundError(
            f"{out} holds no finished photographs. Expected the --out of a run: give that, or run "
            "it first."
        )
    drops, seconds, usage = Counter(), Counter(), Counter()
    notes, rows = [], []
    seen = set()
    for file, line in sorted(done.items()):
        seconds.update(line["seconds"])
        usage.update(line.get("usage", {}))
        if line["digest"] and line["digest"] in seen:
            drops["duplicate"] += 1
            continue
        seen.add(line["digest"])
        drops.update(line["drops"])
        notes += [f"{file}: {note}" for note in line["notes"]]
        rows += line["samples"]
    rows.sort(key=lambda row: row["extra_info"]["id"])
    stats = {
        "photographs": len(done),
        "samples": len(rows),
        "dropped": dict(drops.most_common()),
        "notes": notes[:50],
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "config": config,
        "photographs_per_second_and_rank": round(len(done) / max(seconds.total(), 1e-9), 3),
    }
    if usage:
        stats["usage"] = usage
    write(out / "stats.json", json.dumps(stats, indent=1) + "\n")
    table = "".join(f"\n  {n:8,} {reason}" for reason, n in drops.most_common()) or " nothing"
    if not rows:
        raise ValueError(
            f"{out}: no sample from {len(done)} photographs (replies: stats.json). Dropped, by "
            f"reason:{table}"
        )
    write_jsonl(out / "train.jsonl", rows)
    remove_scratch(out)
    print(f"{out}: {len(rows)} samples of {len(done)} photographs; dropped, by reason:{table}")
    for warning in balance(read_triplets(out)):
        print(f"warning: {warning}")
    print(f"drawn: {draw_preview(out, font)}")
