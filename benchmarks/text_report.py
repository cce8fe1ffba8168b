"""The page of benchmarks/text.py: tables with the range over seeds, and pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
PROTOCOLS = """A *protocol* is how a text is cut for scoring:

- *non-overlapping, window W*: windows of W bytes, each scored whole.
- *sliding window, stride T*: windows of W bytes, T bytes apart; only the last T bytes are scored.
- *token by token*: each byte is scored with the W bytes before it.
- *memory, n stripes*: the text is cut into n stripes, read side by side; each window also attends
  to the window before it."""
# By experiment: what the rows are.
ROWS = {
    "lengths": """\
Models are trained on windows of 128 bytes and scored on longer ones. Each row is an
encoding ([formulas](../encodings.md)): `shaw` is `shaw,clip=64`, and M1 to M4 are the four methods
of Huang et al., 2020, here `huang1,clip=64` to `huang4,clip=64`. M1 and M2 are
equal here: they differ for later keys only, which causal attention masks. `learned` has 512 rows,
of which training reaches 128.""",
    "staged": """\
- *long*: windows of 2,048 bytes from the first step on (the baseline).
- *staged*: windows of 128 bytes for 60 % of the steps, then of 2,048.
- *short*: windows of 128 bytes only.""",
    "shortformer": """\
- *shortformer*: position-infused attention (`pia`) with a memory of one window;
  windows of 32 bytes, then of 128.
- *pia*: the same with windows of 128 from the first step on.
- *sliding W*: sinusoidal encoding, windows of W bytes, no memory, as many training tokens.""",
    "segments": """\
A row is an encoding and a kind of training:

- *base*: windows of 128 bytes; the other rows start from its weights.
- *interpolated*: the table of *base*, interpolated to 512 rows, without further training.
- *plain*: further training on windows of 128 bytes.
- *chunk*: windows of 128 bytes, made of four chunks of a text of 512 that keep their positions.
- *twice*: windows of 256 bytes.
- *full*: the text of 512 bytes itself.""",
}
COLOURS = ("#1f5fa8", "#d1761b", "#3a7d44", "#9a3b3b", "#6b5b95", "#222222")


def report(lines: Sequence[Line], out: Path, command: str) -> Path:
    """Write ``text.md`` and its pictures into ``out``, from the lines measured so far."""
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Encodings of text", "", f"`{command}` writes this page. "]
    parts[-1] += "All scores are bits per byte: lower is better. A cell holds the mean over seeds "
    parts[-1] += "and, in brackets, the lowest and the highest seed."
    parts += ["", PROTOCOLS]
    seeds: dict[str, set[str]] = {}
    for line in lines:
        if "seed" in line:
            seeds.setdefault(line["experiment"], set()).add(str(line["seed"]))
    told = (f"{name} {', '.join(sorted(found))}" for name, found in seeds.items())
    parts += ["", f"Seeds: {'; '.join(told)}."]
    if any(line["quick"] for line in lines):
        parts += ["", "**Toy sizes (`--quick`): this proves the script and nothing else.**"]
    for name, section in SECTIONS.items():
        own = [line for line in lines if line["experiment"] == name]
        if own:
            parts += ["", *section(own, out)]
    machines = {str(line["machine"]["processor"]): line["machine"] for line in lines}
    for facts in machines.values():
        told = ", ".join(f"{key} {value}" for key, value in facts.items())
        parts += ["", f"Machine: {told}."]
    path = out / "text.md"
    path.write_text("\n".join(parts) + "\n")
    return path


def bits(lines: Sequence[Line], protocol: str) -> dict[str, list[float]]:
    """Return the bits per byte of all seeds under a protocol, by name of the run."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for score in line["scores"]:
            if score["protocol"] == protocol:
                found.setdefault(line["name"], []).append(score["bits_per_byte"])
    return found


def groups(values: dict[str, list[float]]) -> list[list[str]]:
    """Return names in separate groups, lowest mean first.

    Two groups are separate if the means of every pair across them differ by more than twice the
    larger of the pair's ranges over seeds.
    """
    names = sorted(values, key=lambda name: statistics.mean(values[name]))

    def apart(low: str, high: str) -> bool:
        gap = statistics.mean(values[high]) - statistics.mean(values[low])
        return gap > 2 * max(max(values[n]) - min(values[n]) for n in (low, high))

    made: list[list[str]] = []
    for place, name in enumerate(names):
        if all(apart(low, high) for low in names[:place] for high in names[place:]):
            made.append([])
        made[-1].append(name)
    return made


def _protocols(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(s["protocol"] for line in lines for s in line["scores"]))


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    few = len(values) < 2
    return f"{mean:.3f}" if few else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def _table(lines: Sequence[Line], protocols: Sequence[str]) -> list[str]:
    by_protocol = [bits(lines, protocol) for protocol in protocols]
    rows = [f"| | {' | '.join(protocols)} |", "| --- " * (len(protocols) + 1) + "|"]
    for name in dict.fromkeys(line["name"] for line in lines):
        cells = (_cell(found.get(name)) for found in by_protocol)
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _lengths(lines: Sequence[Line], out: Path) -> list[str]:
    protocols = _protocols(lines)
    parts = ["## Longer than in training", "", ROWS["lengths"], "", *_table(lines, protocols), ""]
    parts.append(
        "Separate groups, best first: the means of every pair across two groups differ by more "
        "than twice the larger of the two ranges."
    )
    parts.append("")
    for protocol in protocols:
        said = " < ".join("{" + ", ".join(group) + "}" for group in groups(bits(lines, protocol)))
        parts.append(f"- {protocol}: {said}")
    figure, axes = _figure(len(protocols) // 2, "window, bytes", "bits per byte")
    for axis, kind in zip(axes, ("non-overlapping", "sliding window"), strict=False):
        chosen = [protocol for protocol in protocols if protocol.startswith(kind)]
        places = [int(protocol.rpartition(" ")[2]) for protocol in chosen]
        by_protocol = [bits(lines, protocol) for protocol in chosen]
        for number, name in enumerate(dict.fromkeys(line["name"] for line in lines)):
            _interval(axis, places, [found.get(name, []) for found in by_protocol], name, number)
        axis.set_title(kind)
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, list(map(str, places)))
    return [*parts, "", _saved(figure, axes[0], out, "lengths", "Bits per byte by window")]


def _staged(lines: Sequence[Line], out: Path) -> list[str]:
    parts = ["## Staged training", "", ROWS["staged"], "", *_table(lines, _protocols(lines)), ""]
    shares = {}
    for seed in sorted({line["seed"] for line in lines}):
        own = {line["name"]: line["curve"] for line in lines if line["seed"] == seed}
        if "long" in own and "staged" in own:
            shares[seed] = reached(own["staged"], own["long"])
    said = ", ".join(
        f"seed {seed}: {'never' if share is None else f'{share:.2f}'}"
        for seed, share in shares.items()
    )
    parts.append(
        "CPU time of training that *staged* needs to reach the final score of *long*, as a share "
        f"of the time of *long* (goal: 0.6 at most): {said}."
    )
    figure, (axis,) = _figure(1, "CPU seconds of training", "bits per byte")
    names = list(dict.fromkeys(line["name"] for line in lines))
    for line in lines:
        curve, number = line["curve"], names.index(line["name"])
        axis.plot(
            [point["train_cpu_seconds"] for point in curve],
            [point["bits_per_byte"] for point in curve],
            color=COLOURS[number],
            label=line["name"] if line["seed"] == lines[0]["seed"] else None,
        )
    return [*parts, "", _saved(figure, axis, out, "staged", "Bits per byte by CPU time")]


def reached(curve: Sequence[Line], baseline: Sequence[Line]) -> float | None:
    """Return the share of a baseline's CPU time after which a curve reaches its final score."""
    goal, whole = baseline[-1]["bits_per_byte"], baseline[-1]["train_cpu_seconds"]
    for point in curve:
        if point["bits_per_byte"] <= goal:
            return point["train_cpu_seconds"] / whole
    return None


def _shortformer(lines: Sequence[Line], out: Path) -> list[str]:
    parts = ["## Position-infused attention and its memory", "", ROWS["shortformer"], ""]
    protocols = _protocols(lines)
    rows = [
        "| | protocol | bits per byte | training, CPU seconds, least of the seeds |",
        "| --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(line["name"] for line in lines):
        own = [line for line in lines if line["name"] == name]
        spent = [line["curve"][-1]["train_cpu_seconds"] for line in own]
        for protocol in protocols:
            found = bits(own, protocol).get(name)
            if found:
                rows.append(f"| {name} | {protocol} | {_cell(found)} | {min(spent):,.0f} |")
    windows = {
        name: statistics.mean(values)
        for protocol in protocols
        if protocol.startswith("token by token")
        for name, values in bits(lines, protocol).items()
        if name.startswith("sliding")
    }
    best = min(windows, key=lambda name: windows[name], default="none")
    return [*parts, *rows, "", f"Best of the sliding windows, token by token: {best}."]


def _speed(lines: Sequence[Line], out: Path) -> list[str]:
    parts = [
        "Time per generated token, batch size 1, with a 95 % interval (goal: the best sliding "
        "window takes at least 5 times as long as PIA):"
    ]
    parts += ["", "| | seed | ms | over PIA |", "| --- | --- | --- | --- |"]
    for line in lines:
        # Tried first: at this width the overhead of torch calls dominates.
        narrow = f" (models of width {line['width']})" if "width" in line else ""
        for name, row in line["rows"].items():
            over = row["over_pia"]
            told = f"{over['median']:.1f} ({over['low']:.1f} to {over['high']:.1f})"
            parts.append(f"| {name}{narrow} | {line['seed']} | {row['ms']:.2f} | {told} |")
    return parts


def _segments(lines: Sequence[Line], out: Path) -> list[str]:
    protocols = _protocols(lines)
    parts = ["## Segments of longer texts", "", ROWS["segments"], "", *_table(lines, protocols), ""]
    parts.append(
        "Gain of *chunk* over *plain* against gain of *twice* over *plain*, in bits per byte, for "
        "each seed:"
    )
    parts.append("")
    for encoding in dict.fromkeys(line["name"].split()[0] for line in lines):
        for protocol in protocols:
            found = bits(lines, protocol)
            plain, chunk, twice = (
                found.get(f"{encoding} {kind}") for kind in ("plain", "chunk", "twice")
            )
            if plain and chunk and twice and "512" in protocol:
                told = map(_gain, plain, chunk, twice)
                parts.append(f"- {encoding}, {protocol}: {', '.join(told)}")
    return parts + _interpolated(lines)


def _gain(plain: float, chunk: float, twice: float) -> str:
    share = f" ({(plain - chunk) / (plain - twice):.0%})" if twice < plain else ""
    return f"{plain - chunk:+.3f} against {plain - twice:+.3f}{share}"


def _interpolated(lines: Sequence[Line]) -> list[str]:
    """Compare an interpolated learned table with the original at its own length."""
    short = bits(lines, "non-overlapping, window 128").get("learned base")
    long = bits(lines, "non-overlapping, window 512").get("learned interpolated")
    if not (short and long):
        return []
    worse = ", ".join(f"{b / a - 1:+.1%}" for a, b in zip(short, long, strict=False))
    return [
        "",
        "A learned table interpolated to four times its length, without further training, over the "
        f"original at its own length (goal: 15 % worse at most), for each seed: {worse}.",
    ]


def _memory(lines: Sequence[Line], out: Path) -> list[str]:
    peaks = {line["name"]: line["mib"] for line in lines}
    parts = ["Peak memory of a training step (goal: *chunk* takes at most 1.05 times *plain*):", ""]
    parts += ["| | MiB | over plain |", "| --- | --- | --- |"]
    for name, peak in peaks.items():
        plain = peaks.get(f"{name.split()[0]} plain")
        parts.append(f"| {name} | {peak:.0f} | {'-' if plain is None else f'{peak / plain:.3f}'} |")
    return parts


SECTIONS = {
    "lengths": _lengths,
    "staged": _staged,
    "shortformer": _shortformer,
    "speed": _speed,
    "segments": _segments,
    "memory": _memory,
}


def _figure(columns: int, x: str, y: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = max(1, min(columns, 2))
    figure = Figure(figsize=(5 * columns + 1.5, 4), layout="constrained", dpi=150)
    axes = list(figure.subplots(1, columns, squeeze=False, sharey=True)[0])
    for axis in axes:
        axis.set_xlabel(x)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(y)
    return figure, axes


def _interval(
    axis: Any, places: Sequence[int], values: Sequence[Sequence[float]], name: str, number: int
) -> None:
    """Draw a line through means, with a bar over the range of seeds at each."""
    there = [(place, found) for place, found in zip(places, values, strict=True) if found]
    means = [statistics.mean(found) for _, found in there]
    below = [mean - min(found) for mean, (_, found) in zip(means, there, strict=True)]
    above = [max(found) - mean for mean, (_, found) in zip(means, there, strict=True)]
    axis.errorbar(
        [place for place, _ in there],
        means,
        yerr=[below, above],
        color=COLOURS[number % len(COLOURS)],
        linestyle="-" if number < len(COLOURS) else "--",
        marker="o",
        markersize=3,
        capsize=3,
        label=name,
    )


def _saved(figure: Any, axis: Any, out: Path, name: str, title: str) -> str:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=8, handlelength=4, loc="outside right center"
    )
    figure.savefig(out / f"text_{name}.png")
    return f"![{title}](text_{name}.png)"
