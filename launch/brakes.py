"""A run that watches itself: warnings in plain words when its answers run away."""

from collections.abc import Iterator
from statistics import mean

WINDOW = 10  # steps: the first ones are compared with the last
ADVICE = "Judge earlier checkpoints too: evaluate.py --checkpoints OUT."
WATCHED = {  # figure: (whether it has run away, the warning)
    "length": (
        lambda first, now: now > max(2 * first, first + 10),
        "answers grow: {now:.0f} tokens on average, {first:.0f} at first. Replications saw answers "
        "grow tenfold, and long ones were mostly wrong.",
    ),
    "loops": (
        lambda first, now: now > first + 0.05,
        "{now:.0%} of the answers end in a loop, {first:.0%} at first. Replications of contrast "
        "targets without a floor (--tilt-floor) collapsed like this.",
    ),
    "eos": (
        lambda first, now: now < first - 0.2,
        "only {now:.0%} of the answers end by themselves, {first:.0%} at first.",
    ),
    "agreement": (
        lambda first, now: now < first - 0.2,
        "student and teacher agree on {now:.0%} of the tokens, {first:.0%} at first; it should "
        "rise. A lower --lr may help: it must follow the batch.",
    ),
}


def runaways(log: list[dict]) -> Iterator[tuple[str, str]]:
    """(figure, warning) of each that has run away in the log's last steps."""
    for key, (has_run_away, warning) in WATCHED.items():
        values = [row[key] for row in log if key in row]
        if len(values) >= 2 * WINDOW:
            first, now = mean(values[:WINDOW]), mean(values[-WINDOW:])
            if has_run_away(first, now):
                yield (
                    key,
                    f"Step {log[-1]['step']}: {warning.format(first=first, now=now)} {ADVICE}",
                )
