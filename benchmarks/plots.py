"""Pictures of what position terms cost, from the files in results/: docs/results/costs_*.png.

    python benchmarks/plots.py

Time and peak memory of a training step over the same one without terms, by tokens and mode. Models
on a CPU take the backend that ``auto`` picks. Attention alone, by tokens, mode and backend, is
drawn from each file of ``attention.py`` that there is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import report

RESULTS = Path(__file__).parent / "results"
PAGES = Path(__file__).parents[1] / "docs" / "results"
MODES = {"bias": ("0.6", "^"), "k": ("black", "o"), "qk": ("#1f5fa8", "s"), "qkv": ("#d1761b", "D")}
DEIT_TOKENS = 197  # 14x14 patches and a class token
# One point: tokens, and a ratio with its interval, or None where memory has none.
Point = tuple[int, float, tuple[float, float] | None]


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def points(rows: dict[str, Any], mode: str, tokens: int, what: str) -> list[Point]:
    """The point of a mode, in a list that is empty where it was not measured."""
    if mode not in rows:
        return []
    if what == "peak_mib":
        return [(tokens, rows[mode][what] / rows["plain"][what], None)]
    ratio = rows[mode]["ratio"]
    return [(tokens, ratio["median"], (ratio["low"], ratio["high"]))]


def series(mode: str, what: str) -> dict[str, list[Point]]:
    """The points of a mode by what was measured; each file's are a line."""
    found: dict[str, list[Point]] = {"DETR's encoder layer": [], "DeiT-S": []}
    for path in sorted(RESULTS.glob("models_*.json")):
        figures, device = read(path.name), path.stem.removeprefix("models_")
        for case in figures.get("cases", []) if device == "encoder_cpu" else []:
            height, width = map(int, case["grid"].split("x"))
            found["DETR's encoder layer"] += points(case["rows"], mode, height * width, what)
        if device == "cpu":
            found["DeiT-S"] += points(figures["rows"], mode, DEIT_TOKENS, what)
    return found


def draw(what: str, path: Path) -> None:
    """Draw a line for each mode, and the encodings of text beside them where they were timed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    text = read("text_attention_cpu.json")
    timed = what == "ratio"
    figure = Figure(figsize=(9 if timed else 5, 4), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2 if timed else 1, squeeze=False, width_ratios=(1.2, 1)[: 1 + timed])
    left = axes[0, 0]
    for shift, (mode, (colour, marker)) in enumerate(MODES.items()):
        for name, dash in (("DETR's encoder layer", "-"), ("DeiT-S", "none")):
            own = series(mode, what)[name]
            errors = [(y - ends[0], ends[1] - y) if ends else (0, 0) for _, y, ends in own]
            hollow = {"markerfacecolor": "white"} if dash == "none" else {}
            left.errorbar(
                [x * 1.012 ** (shift - 1.5) for x, _, _ in own], [y for _, y, _ in own],
                yerr=list(zip(*errors, strict=True)) if timed and own else None, color=colour,
                marker=marker, linestyle=dash, capsize=2, markersize=5, **hollow,
            )  # fmt: skip
    ticks = sorted({x for mode in MODES for own in series(mode, what).values() for x, *_ in own})
    left.set(xscale="log", xlabel="tokens L", title="images: a training step on a CPU")
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set_xticks([], minor=True)
    left.set_ylabel("time over no encoding" if timed else "peak memory over no encoding")
    handles = [Line2D([], [], color=c, marker=m, label=mode) for mode, (c, m) in MODES.items()]
    plain = {"color": "0.3", "marker": "o"}
    handles += [
        Line2D([], [], **plain, label="DETR's encoder layer"),
        Line2D([], [], **plain, linestyle="none", markerfacecolor="white", label="DeiT-S"),
    ]
    left.legend(handles=handles, frameon=False, fontsize=8)
    if timed:
        _bars(axes[0, 1], text)
    for axis in axes.flat:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _bars(axis: Any, text: dict[str, Any]) -> None:
    """Encodings of text, and the same ones made whole as a bias, at one length."""
    rows = {
        name: row["ratio"] for name, row in text["rows"].items() if not name.startswith("plain")
    }
    places = range(len(rows))
    middle = [ratio["median"] for ratio in rows.values()]
    ends = [
        [m - r["low"] for m, r in zip(middle, rows.values(), strict=True)],
        [r["high"] - m for m, r in zip(middle, rows.values(), strict=True)],
    ]
    axis.errorbar(middle, places, xerr=ends, fmt="o", color="black", capsize=2, markersize=5)
    axis.axvline(1, color="0.4", linestyle=":", linewidth=1)
    axis.set_yticks(places, list(rows))
    axis.invert_yaxis()
    axis.set_xlabel("time over plain causal attention")
    axis.set_title(f"texts: attention alone, {text['shape'][2]} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PAGES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for what, name in (("ratio", "costs_time.png"), ("peak_mib", "costs_memory.png")):
        draw(what, out / name)
        print("written to", out / name)
    for path in sorted(RESULTS.glob("attention_*.json")):
        name = f"costs_{path.stem}.png"
        if report.plot(read(path.name), out / name):
            print("written to", out / name)


if __name__ == "__main__":
    main()
