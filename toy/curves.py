"""The figure beside the table: what each variant reads in full view over its steps, as an SVG."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean, pstdev

from storage.files import read_jsonl, write

WIDTH, HEIGHT = 210, 130  # px, of a variant's panel
COLUMNS = 5
PLOT = (34, 24, WIDTH - 10, HEIGHT - 22)  # left, top, right, bottom
STYLE = """
text { font: 11px sans-serif; fill: #444 } .name { font-weight: bold; fill: #111 }
.axis { stroke: #ccc } .first { stroke: #999; stroke-dasharray: 3 2; fill: none }
.line { stroke: #1f6feb; stroke-width: 2; fill: none } .band { fill: #1f6feb; opacity: 0.2 }
"""


def draw_curves(out: Path, seeds: list[int], variants: list[str]) -> None:
    """OUT/curves.svg: a panel a variant, with the probe's share read in full view: mean and
    standard deviation over the seeds; dashed, the first variant's."""
    rows = -(-len(variants) // COLUMNS)
    size = f'width="{COLUMNS * WIDTH}" height="{rows * HEIGHT}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>']
    first = points(out, variants[0], seeds)
    for number, variant in enumerate(variants):
        down, right = divmod(number, COLUMNS)
        parts.append(f'<g transform="translate({right * WIDTH} {down * HEIGHT})">')
        parts += panel(variant, points(out, variant, seeds), first)
        parts.append("</g>")
    write(out / "curves.svg", "\n".join([*parts, "</svg>\n"]))


def points(out: Path, variant: str, seeds: list[int]) -> list[tuple]:
    """(step, mean, standard deviation) of each step with a probe."""
    runs = []
    for seed in seeds:
        log = read_jsonl(out / f"{variant}-{seed}" / "log.jsonl", [])
        runs.append({row["step"]: row["probe_full"] for row in log if "probe_full" in row})
    found = []
    for step in runs[0]:
        shares = [run[step] for run in runs]
        found.append((step, mean(shares), pstdev(shares)))
    return found


def panel(name: str, found: list[tuple], first: list[tuple]) -> Iterator[str]:
    left, top, right, bottom = PLOT
    begin, end = found[0][0], found[-1][0]

    def place(step: int, share: float) -> str:
        x = left + (right - left) * (step - begin) / max(1, end - begin)
        y = bottom - (bottom - top) * min(1.0, max(0.0, share))
        return f"{x:.1f},{y:.1f}"

    def path(shares: list[tuple]) -> str:
        return " ".join(place(step, share) for step, share in shares)

    middle = path([(step, share) for step, share, _ in found])
    upper = [(step, share + spread) for step, share, spread in found]
    lower = [(step, share - spread) for step, share, spread in reversed(found)]
    yield f'<text class="name" x="{left}" y="14">{name}</text>'
    for share in (0, 0.5, 1):
        y = bottom - (bottom - top) * share
        yield f'<line class="axis" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{left - 4}" y="{y + 4}" text-anchor="end">{share:.0%}</text>'
    yield f'<text x="{right}" y="{bottom + 15}" text-anchor="end">{end} steps</text>'
    yield f'<polyline class="first" points="{path([point[:2] for point in first])}"/>'
    yield f'<polygon class="band" points="{path(upper + lower)}"/>'
    yield f'<polyline class="line" points="{middle}"/>'
