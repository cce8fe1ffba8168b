"""What benchmarks/attention.py shows: a line for each case, tables, a picture."""

import importlib.util
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path

from contenders import MODES, RATIOS, WAYS
from session import CONTROL, PASSED

# Told apart by marker, dash and grey, so that a print without colours reads the same.
STYLES = {
    "triton": ("triton", {"color": "black", "marker": "o", "linewidth": 2.2}),
    "sdpa": ("sdpa", {"color": "0.35", "marker": "s", "linestyle": "--"}),
    "eager": ("eager", {"color": "black", "marker": "D", "linestyle": "--"}),
    "flex": ("FlexAttention", {"color": "0.35", "marker": "^", "linestyle": "-."}),
    "flat index": ("flat index", {"color": "0.55", "marker": "v", "linestyle": ":"}),
    "original": ("original", {"color": "0.55", "marker": "x", "linestyle": ":"}),
}
LIMITS = {
    "no terms": ("our kernel, no terms", {"color": "0.7", "marker": "."}),
    "cudnn": ("cuDNN, no terms", {"color": "0.7", "marker": "+", "linestyle": "--"}),
}


def headline(case: dict) -> str:
    if "cannot" in case:
        return f"{case['case']}: {case['cannot']}"
    ways = {way: {mode: over(case, f"{mode} {way}", "both") for mode in MODES} for way in WAYS}
    own = "eager" if set(ways["triton"].values()) == {"-"} else "triton"
    noise = "" if case["quiet"] else ", noisy"
    ratios = ", ".join(f"{mode} {value}" for mode, value in ways[own].items())
    return f"{case['case']}: {own} over {case['base']}: {ratios}{noise}"


def kin(case: dict) -> tuple[str, int, str, str]:
    """What the cases of a section of a table share."""
    return case["dtype"], case["dim"], case["method"], case["base"]


def over(case: dict, name: str, kind: str) -> str:
    """The ratio of a way, "-" where there is none."""
    ratio = case["rows"].get(name, {}).get(kind, {}).get("ratio")
    noisy = name == CONTROL and not case["quiet"]
    return "-" if ratio is None else f"{ratio['median']:.2f}" + "*" * noisy


def mib(case: dict, name: str, kind: str) -> str:
    value = case["rows"].get(name, {}).get(kind, {}).get("mib")
    return "-" if value is None else f"{value:.0f}"


def report(figures: dict) -> None:
    """Print all tables, 100 columns wide."""
    measured = [case for case in figures["cases"] if "cannot" not in case]
    methods = list(RATIOS)
    measured.sort(
        key=lambda c: (c["dtype"], -c["dim"], methods.index(c["method"]), c["base"], c["length"])
    )
    print("\n" + textwrap.fill(str(figures["machine"]), 100))
    bars = figures["bars"]
    if "gpu" in figures["machine"]:
        table(measured, "both", "forward + backward: peak MiB above the inputs", mib, bars)
    for kind, title in (("forward", "forward"), ("both", "forward + backward")):
        title += ": time over the plain attention of column 'base'"
        table(measured, kind, title, over, bars)
    if not all(case["quiet"] for case in measured):
        print("* noise: the base over itself is not 0.98 to 1.02, do not quote this case")
    for case in measured:
        for mode, gate in case["gate"].items():
            if gate != PASSED:
                print(textwrap.shorten(f"gate, {case['case']} {mode}: {gate}", 100))
    for name, text in reasons(figures):
        print(textwrap.shorten(f"not timed: {name}: {text}", 100))
    for text in figures["left_out"]:
        print(f"no time left: {text}")


def table(
    measured: list[dict],
    kind: str,
    title: str,
    cell: Callable[[dict, str, str], str],
    bars: dict[str, float],
) -> None:
    """A line for each case and mode; what knows no terms stands in the first of a case."""
    limits, ways = ("cudnn", "no terms", CONTROL), WAYS[1:]
    unit = "ms" if cell is over else "MiB"
    names = [f"base {unit}", *limits, WAYS[0], "bar", *(way.split()[-1] for way in ways)]
    print(f"\n{title}\n{'L':>4} {'mode':4}" + "".join(f"{name:>9}" for name in names))
    for (dtype, dim, method, base), group in itertools.groupby(measured, kin):
        members = list(group)
        batches = ", ".join(str(case["batch"]) for case in members)
        heads = members[0]["heads"]
        print(f"-- {dtype}, {method}, D {dim}, H {heads}, B {batches}, base {base}")
        for case, mode in itertools.product(members, MODES):
            first = mode == next(iter(MODES))
            ms = case["rows"][base][kind].get("ms")
            own = mib(case, base, kind) if cell is mib else f"{ms:.3f}" if ms else "-"
            texts = [own, *(cell(case, name, kind) for name in limits)] if first else [""] * 4
            barred = kind == "both" and cell is over and dtype == "bfloat16"
            texts.append(cell(case, f"{mode} {WAYS[0]}", kind))
            texts.append(f"{bars[mode]:.2f}" if barred else "")
            texts += [cell(case, f"{mode} {way}", kind) for way in ways]
            line = "".join(f"{text:>9}" for text in texts)
            print(f"{case['length'] if first else '':>4} {mode:4}{line}")


def reasons(figures: dict) -> list[tuple[str, str]]:
    """Every reason for which something was not timed, once, with the first case that gave it."""
    found: dict[tuple[str, str], str] = {}
    for case in figures["cases"]:
        if "cannot" in case:
            found.setdefault((case["case"], case["cannot"]), "")
        for name, row in case.get("rows", {}).items():
            for text in [row.get("cannot"), row.get("both", {}).get("cannot")]:
                if text:
                    found.setdefault((name, text), case["case"])
    return [(name, f"{text} ({case})" if case else text) for (name, text), case in found.items()]


def plot(figures: dict, path: Path) -> bool:
    """Draw the cases of the first dtype, head dim and method; whether there was one to draw."""
    measured = [case for case in figures["cases"] if "cannot" not in case]
    if not measured or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    drawn = sorted((c for c in measured if kin(c) == kin(measured[0])), key=lambda c: c["length"])
    dtype, dim, method, base = kin(drawn[0])
    lengths = [case["length"] for case in drawn]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, mode in zip(grid.flat, MODES, strict=True):
        lines = {f"{mode} {name}": style for name, style in STYLES.items()} | LIMITS
        for name, (label, style) in lines.items():
            points = [_median(case, name) for case in drawn]
            if any(point is not None for point in points):
                axes.plot(lengths, [float("nan") if p is None else p for p in points],
                          label=label, markersize=6, **style)  # fmt: skip
        title = f"mode {mode}"
        if dtype == "bfloat16":
            title += f" (bar {figures['bars'][mode]:g}, dotted)"
            axes.axhline(figures["bars"][mode], color="black", linewidth=0.9, linestyle=(0, (1, 3)))
        axes.set(title=title, xscale="log", yscale="log")
        axes.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("tokens L")
    figure.supylabel(f"forward + backward: time over {base} attention without terms", fontsize=10)
    chip = figures["machine"].get("gpu", "CPU")
    figure.suptitle(f"{method}, D {dim}, {dtype}, {chip}", fontsize=11)
    known = {label: line for axes in grid.flat
             for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def _median(case: dict, name: str) -> float | None:
    ratio = case["rows"].get(name, {}).get("both", {}).get("ratio")
    return None if ratio is None else ratio["median"]
