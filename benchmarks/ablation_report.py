"""The page of benchmarks/ablation.py: tables with 95 % intervals, verdicts, pictures."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from ablation_pictures import draw
from ablation_runs import IMAGE
from ablation_tables import Comparison, Line, Study, Table, accuracies
from measure import student

# Accuracies in percent by row; each row has the same seeds in the same order.
Values = dict[str, list[float]]


def report(lines: Sequence[Line], out: Path, study: Study = IMAGE) -> Path:
    """Write the page of a study and its pictures into ``out``: tables with two seeds or more."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = lines[0]["recipe"]
    parts = [study.head.format(**recipe)]
    if recipe == study.quick:
        parts.append("**Toy sizes (`--quick`): this proves the script and nothing else.**")
    for name, table in study.tables.items():
        own, seeds = chosen(lines, table)
        if len(seeds) < 2:
            continue
        parts += [f"## {table.title}", table.text, _origin(name, own.values(), seeds)]
        values = {row: [line["accuracy"] for line in found] for row, found in own.items()}
        if table.kind == "sizes":
            parts += _sizes(own, table, study.side)
        else:
            parts += [_rows(own, table), _differences(values, table)]
        picture = f"{study.name}_{name.removeprefix(study.name + '_')}.png"
        draw(table, own, study.side, out / picture)
        parts.append(f"![{table.title}]({picture})")
    parts += study.last(lines, out) if study.last else []
    path = out / f"{study.name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def chosen(lines: Iterable[Line], table: Table) -> tuple[dict[str, list[Line]], list[int]]:
    """Return the lines of each row of a table for the seeds that all rows have, and these seeds."""
    by_cell: dict[str, dict[int, Line]] = {}
    for line in lines:
        by_cell.setdefault(line["cell"], {})[line["seed"]] = line
    found = {row: by_cell.get(cell.key, {}) for row, cell in table.rows.items()}
    seeds = sorted(set.intersection(*(set(own) for own in found.values())))[: table.seeds]
    return {row: [own[seed] for seed in seeds] for row, own in found.items()}, seeds


def difference(values: Values, comparison: Comparison) -> list[float]:
    """Return, for each seed, the mean of the rows ``more`` minus the mean of the rows ``less``."""
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


def _rows(own: dict[str, list[Line]], table: Table) -> str:
    """Accuracies, and what else the lines have: the paper's, the CPU time of a step."""
    base = own.get("absolute only", [])
    timed = bool(base) and all("step_cpu_ms" in line for lines in own.values() for line in lines)
    columns = ["accuracy, %"] + ["paper"] * bool(table.paper or not timed)
    columns += ["CPU time of a step, over absolute only"] * timed
    rows = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, lines in own.items():
        cells = [_spread([line["accuracy"] for line in lines])]
        cells += [table.paper.get(name, "")] * ("paper" in columns)
        if timed:
            ratios = [a["step_cpu_ms"] / b["step_cpu_ms"] for a, b in zip(lines, base, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _differences(values: Values, table: Table) -> str:
    rows = ["| difference, points | ours | verdict | paper |", "|---|---|---|---|"]
    for comparison in table.comparisons:
        found = difference(values, comparison)
        paper = ""
        if set(comparison.more + comparison.less) <= set(table.paper):
            known = {row: [float(number)] for row, number in table.paper.items()}
            paper = f"{difference(known, comparison)[0]:+.2f}"
        told = f"{_spread(found, '+.1f')} | {verdict(found)} | {paper}"
        rows.append(f"| {comparison.text} | {told} |")
    return "\n".join(rows)


def _sizes(own: dict[str, list[Line]], table: Table, side: int) -> list[str]:
    by_size = accuracies(own, side)
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
    told = (
        f"Columns: pixels of the test canvas; training has {side}x{side}. A star marks a claimed "
        "difference; all others are ties."
    )
    return ["\n".join(rows), "\n".join(parts), told]


def _origin(name: str, own: Iterable[Sequence[Line]], seeds: Sequence[int]) -> str:
    """Return the command, seeds, hardware and dates of a table."""
    machines = [line["machine"] for lines in own for line in lines]
    dates = sorted({facts["date"] for facts in machines})
    facts = sorted({f"{m['processor']}, 1 thread, torch {m['torch']}" for m in machines})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    told = f"{seeds[0]} to {seeds[-1]}" if _dense(seeds) else ", ".join(map(str, seeds))
    return f"`python benchmarks/ablation.py {name}`: seeds {told}; {'; '.join(facts)}; {when}."


def _dense(seeds: Sequence[int]) -> bool:
    return list(seeds) == list(range(seeds[0], seeds[-1] + 1))
