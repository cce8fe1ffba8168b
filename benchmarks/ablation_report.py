"""What benchmarks/ablation.py writes: tables with 95 % intervals, verdicts, pictures."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ablation_pictures import draw
from ablation_runs import QUICK, accuracies
from ablation_tables import TABLES, Comparison, Table
from canvases import HEIGHTS, PIECE, SIDE
from measure import student

Line = dict[str, Any]
# Of a table: its rows' accuracies in percent, of the same seeds in the same order.
Values = dict[str, list[float]]
HEAD = """# Image encodings, in small

Real digits (scikit-learn's scans, held-out ones for testing), enlarged to {low} to {high}
pixels, anywhere on a canvas of {side}x{side}, over a piece of {piece}x{piece} pixels of another
one: which digit is it? timm's ViT, {depth} blocks of width {dim} with {heads} heads, patches of
{patch}, no class token, {steps} steps of {batch} canvases (twice as large ones: {large_steps} of
{large_batch}), AdamW, learning rate {lr:g}, tested on {tests} canvases. Rate, batch, width and
depth were tuned on the plain model (absolute only) alone, with seeds 1000 and 1001; all rows have
them. The number of steps is what 40 seconds of one core allow the slowest of them, and no model is
trained to the end: see *Length of training*, and `benchmarks/ablation_runs.py` for the shorter
recipe that was given up. This is not ImageNet, where the paper measured DeiT-S; its figures stand
beside ours.

Accuracy in percent, mean over seeds ± half of its 95 % interval (Student). Differences are taken
seed by seed: of one seed, all models have the same first weights, training and test canvases. A
difference is claimed where its interval excludes 0, and a tie otherwise. Many are tested here: of
twenty that do not exist, one will be claimed."""


def report(lines: Sequence[Line], out: Path) -> Path:
    """Write ``image.md`` and its pictures into ``out``, of all tables with two seeds."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = lines[0]["recipe"]
    low, high = HEIGHTS
    parts = [HEAD.format(low=low, high=high, side=SIDE, piece=PIECE, **recipe)]
    if recipe == QUICK:
        parts.append("**Toy sizes (`--quick`): this proves the script and nothing else.**")
    for name, table in TABLES.items():
        own, seeds = chosen(lines, table)
        if len(seeds) < 2:
            continue
        parts += [f"## {table.title}", table.text, _origin(name, own.values(), seeds)]
        values = {row: [line["accuracy"] for line in found] for row, found in own.items()}
        parts += (
            _sizes(own) if name == "sizes" else [_rows(values, table), _differences(values, table)]
        )
        draw(name, table, own, out / f"image_{name}.png")
        parts.append(f"![{table.title}](image_{name}.png)")
    path = out / "image.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def chosen(lines: Iterable[Line], table: Table) -> tuple[dict[str, list[Line]], list[int]]:
    """The lines of each row of a table, of the seeds that all rows have, and these seeds."""
    by_cell: dict[str, dict[int, Line]] = {}
    for line in lines:
        by_cell.setdefault(line["cell"], {})[line["seed"]] = line
    found = {row: by_cell.get(cell.key, {}) for row, cell in table.rows.items()}
    seeds = sorted(set.intersection(*(set(own) for own in found.values())))[: table.seeds]
    return {row: [own[seed] for seed in seeds] for row, own in found.items()}, seeds


def difference(values: Values, comparison: Comparison) -> list[float]:
    """Seed by seed, the mean of the rows that should be more minus that of the others."""
    means = (
        [statistics.mean(seed) for seed in zip(*(values[row] for row in rows), strict=True)]
        for rows in (comparison.more, comparison.less)
    )
    return [more - less for more, less in zip(*means, strict=True)]


def verdict(differences: Sequence[float]) -> str:
    mean, half = student(differences)
    return "tie" if abs(mean) <= half else "claimed, higher" if mean > 0 else "claimed, lower"


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    mean, half = student(values)
    return f"{mean:{form}} ± {half:.1f}"


def _rows(values: Values, table: Table) -> str:
    rows = ["| | accuracy, % | paper |", "|---|---|---|"]
    for name, own in values.items():
        rows.append(f"| {name} | {_spread(own)} | {table.paper.get(name, '')} |")
    return "\n".join(rows)


def _differences(values: Values, table: Table) -> str:
    rows = ["| difference, points | ours | verdict | paper |", "|---|---|---|---|"]
    for comparison in table.comparisons:
        found = difference(values, comparison)
        paper = ""
        if set(comparison.more + comparison.less) <= set(table.paper):
            known = {row: [float(figure)] for row, figure in table.paper.items()}
            paper = f"{difference(known, comparison)[0]:+.2f}"
        told = f"{_spread(found, '+.1f')} | {verdict(found)} | {paper}"
        rows.append(f"| {comparison.text} | {told} |")
    return "\n".join(rows)


def _sizes(own: dict[str, list[Line]]) -> list[str]:
    table, by_size = TABLES["sizes"], accuracies(own)
    lines = "|---" * (1 + len(by_size)) + "|"
    rows = [f"| accuracy, % | {' | '.join(by_size)} |", lines]
    for row in own:
        rows.append(f"| {row} | {' | '.join(_spread(v[row]) for v in by_size.values())} |")
    parts = [f"| difference, points | {' | '.join(by_size)} |", lines]
    for comparison in table.comparisons:
        cells = []
        for values in by_size.values():
            found = difference(values, comparison)
            mark = "" if verdict(found) == "tie" else " *"
            cells.append(_spread(found, "+.1f") + mark)
        parts.append(f"| {comparison.text} | {' | '.join(cells)} |")
    told = f"Pixels of the canvas; trained at {SIDE}x{SIDE}. A star: claimed; all others are ties."
    return ["\n".join(rows), "\n".join(parts), told]


def _origin(name: str, own: Iterable[Sequence[Line]], seeds: Sequence[int]) -> str:
    """Command, seeds, hardware and dates of a table."""
    machines = [line["machine"] for lines in own for line in lines]
    dates = sorted({facts["date"] for facts in machines})
    facts = sorted({f"{m['processor']}, 1 thread, torch {m['torch']}" for m in machines})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    told = f"{seeds[0]} to {seeds[-1]}" if _dense(seeds) else ", ".join(map(str, seeds))
    return f"`python benchmarks/ablation.py {name}`: seeds {told}; {'; '.join(facts)}; {when}."


def _dense(seeds: Sequence[int]) -> bool:
    return list(seeds) == list(range(seeds[0], seeds[-1] + 1))
