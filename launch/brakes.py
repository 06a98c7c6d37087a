"""A run that watches itself: warnings in plain words when its answers run away."""

from collections import deque
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


class Brakes:
    """The first and the last WINDOW values of each watched figure."""

    def __init__(self):
        self.first = {key: [] for key in WATCHED}
        self.last = {key: deque(maxlen=WINDOW) for key in WATCHED}

    def runaways(self, entry: dict) -> list[tuple[str, str]]:
        """(figure, warning) of each that has run away with a step's entry, the next one of the
        log."""
        found = []
        for key, (has_run_away, warning) in WATCHED.items():
            if key not in entry:
                continue
            first, last = self.first[key], self.last[key]
            values = first if len(first) < WINDOW else last
            values.append(entry[key])
            if len(last) == WINDOW and has_run_away(mean(first), mean(last)):
                told = warning.format(first=mean(first), now=mean(last))
                found.append((key, f"Step {entry['step']}: {told} {ADVICE}"))
        return found
