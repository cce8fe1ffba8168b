"""benchmarks/ablation.py: toy runs, twice the same; its cells and data; what it claims."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def run(*arguments):
    command = [sys.executable, "benchmarks/ablation.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # as from a fresh clone
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment
    )


def figures(folder):
    """What runs found, by key; not when and how fast."""
    lines = [json.loads(text) for text in (folder / "image.jsonl").read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {
        line["key"]: [line[name] for name in ("accuracy", "loss", "sizes") if name in line]
        for line in lines
    }


@pytest.mark.full
def test_two_runs_agree_and_what_is_done_is_not_done_again(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    done = run("shared", "--quick", "--out", one)
    assert done.returncode == 0, done.stderr
    found = figures(one)
    assert len(found) == 8 and len({loss for _, loss in found.values()}) == 8
    text = (one / "image.md").read_text()
    assert "Toy sizes" in text and "| ctx, shared |" in text and "(Table 2)" in text
    assert "Modes" not in text and (one / "image_shared.png").stat().st_size > 5_000
    # A lost line is made again, the others stay; another order and two processes change nothing.
    two.mkdir()
    kept = (one / "image.jsonl").read_text().splitlines()[3:]
    (two / "image.jsonl").write_text("\n".join(kept) + "\n")
    done = run("shared", "--quick", "--out", two, "--jobs", "2", "--seeds", "1", "0")
    assert done.returncode == 0, done.stderr
    assert (two / "image.jsonl").read_text().splitlines()[:5] == kept
    assert figures(two) == found
    assert (two / "image.md").read_text() == text


@pytest.mark.slow
def test_all_tables_quickly(tmp_path):
    done = run("digits", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "image.md").read_text()
    assert text.count("\n## ") == 10 == text.count("![") == len(list(tmp_path.glob("*.png")))
    before = figures(tmp_path)
    (tmp_path / "image.jsonl").unlink()
    assert run("digits", "--quick", "--out", tmp_path).returncode == 0
    assert figures(tmp_path) == before and (tmp_path / "image.md").read_text() == text


def test_what_is_refused(tmp_path, capsys):
    from ablation import main

    line = {"key": "a", "recipe": {"steps": 1}}
    (tmp_path / "image.jsonl").write_text(json.dumps(line) + "\n")
    for given, said in (
        (["shared", "--quick"], "--quick needs --out"),
        (["heads"], "'heads' is not one of modes, shared"),
        (["shared", "--out", str(tmp_path)], "runs of another recipe"),
        (["--out", str(tmp_path / "none")], "nothing was run: name a table"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(given)
        assert said in f"{stopped.value}{capsys.readouterr().err}"


def cells():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from ablation_tables import TABLES

    sys.path.pop(0)
    return sorted(
        {c for table in TABLES.values() for c in table.rows.values()}, key=lambda c: c.key
    )


@pytest.mark.cases(16)
@pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.key.replace(" | ", " "))
def test_every_cell_builds_from_the_same_weights(cell):
    from ablation_runs import build
    from canvases import SIDE

    model, plain = build(cell, 7), build(type(cell)(scale=cell.scale, std=cell.std), 7)
    own = model.state_dict()
    for name, weight in plain.state_dict().items():
        if name == "pos_embed" and not cell.absolute:
            assert name not in own
        else:
            assert torch.equal(own.pop(name), weight), name
    # What is left is the encoding's own; some have no weights.
    free = "rope-axial", "alibi", "lookhere", "rope-axial,coords=separate"
    assert bool(own) != (cell.encoding in (None, *free))
    side = SIDE * cell.scale
    model(torch.randn(2, 1, side, side)).square().sum().backward()
    sizes = [(6, 6), (12, 18)] if cell.sizes else []
    for height, width in sizes:
        assert model(torch.randn(1, 1, height, width)).isfinite().all()
    if cell.encoding in free:  # without weights, but not without effect
        x = torch.randn(2, 1, side, side)
        model.head.weight.data.normal_()
        plain.head.load_state_dict(model.head.state_dict())
        if not cell.absolute:
            plain.pos_embed = None
        assert not torch.allclose(model(x), plain(x), atol=1e-4)


def test_tables():
    from ablation_runs import QUICK
    from ablation_tables import TABLES

    for name, table in TABLES.items():
        keys = [cell.key for cell in table.rows.values()]
        assert len(set(keys)) == len(keys), name
        assert set(table.paper) <= set(table.rows), name
        for comparison in table.comparisons:
            assert set(comparison.more + comparison.less) <= set(table.rows), comparison
            assert not set(comparison.more) & set(comparison.less)
        for cell in table.rows.values():  # OneCycleLR wants a warm-up of more than one step
            assert int(cell.budget * QUICK["steps"]) * QUICK["warmup"] > 1, cell
    texts = {c.text: (c.more, c.less) for c in TABLES["modes"].comparisons}
    more, less = texts["contextual over bias, all methods"]
    assert more == ("euc, ctx", "quant, ctx", "cross, ctx", "product, ctx") and len(less) == 4
    assert TABLES["where"].paper["absolute + qkv"] == "81.4" == max(TABLES["where"].paper.values())
    assert TABLES["decide"].seeds >= 20 > 5 <= min(table.seeds for table in TABLES.values())


def test_buckets_are_counted_as_the_rows_say():
    from ablation_tables import TABLES

    import irpe

    for row, cell in TABLES["buckets"].rows.items():
        if cell.encoding:
            assert irpe.bucket_ids(cell.encoding, irpe.Grid(6, 6))[1] == int(row)


def test_canvases(monkeypatch):
    import canvases as module

    images, classes = module.canvases("train", 40, seed=3)
    again, same = module.canvases("train", 40, seed=3)
    assert torch.equal(images, again) and torch.equal(classes, same)
    assert images.shape == (40, 1, 12, 12) and images.min() >= 0 and images.max() <= 1
    assert len(set(classes.tolist())) > 5
    others, _ = module.canvases("validation", 40, seed=3)
    assert not torch.equal(images, others)
    large, same = module.canvases("train", 40, seed=3, scale=2)
    assert torch.equal(classes, same) and large.shape == (40, 1, 24, 24)
    small = torch.nn.functional.avg_pool2d(large, 2)
    assert np.corrcoef(small.flatten(), images.flatten())[0, 1] > 0.8  # the same scenes
    for split in ("train", "validation"):  # a canvas shows a digit of its class, of this split
        monkeypatch.setattr(module, "PIECE", 0)
        images, classes = module.canvases(split, 10, seed=1)
        source = module.Digits(split)
        for image, digit in zip(images, classes.tolist(), strict=True):
            ink = image[0].nonzero()
            (top, left), (bottom, right) = ink.amin(0).tolist(), (ink.amax(0) + 1).tolist()
            shown = image[0, top:bottom, left:right].numpy()
            own = [source.read(n)[0] for n in range(len(source)) if source.read(n)[1] == digit]
            assert any(
                (cut := module.glyph(scan, bottom - top).astype(np.float32)).shape == shown.shape
                and np.allclose(cut, shown, atol=1e-6)
                for scan in own
            )


def test_other_sizes():
    from canvases import resized, widened

    images = torch.rand(5, 1, 16, 16)
    assert resized(images, 16) is images
    halved = resized(images, 8)
    assert halved.shape == (5, 1, 8, 8) and abs(float(halved.mean() - images.mean())) < 0.02
    wide = widened(images, 16, 32, seed=0)
    places = set()
    for image, there in zip(images, wide, strict=True):
        found = [x for x in range(17) if torch.equal(there[0, :, x : x + 16], image[0])]
        assert len(found) == 1 and there.sum() == pytest.approx(float(image.sum()), rel=1e-4)
        places.add(found[0])
    assert len(places) > 2


def line(cell, seed, accuracy, **more):
    from ablation_runs import RECIPE

    machine = {"processor": "one of two", "torch": "2", "date": f"2026-01-0{1 + seed % 3}"}
    own = {"cell": cell.key, "seed": seed, "accuracy": accuracy, "recipe": RECIPE}
    return {**own, "key": f"{cell.key} | seed {seed}", "machine": machine, **more}


def test_statistics():
    from ablation_report import difference, verdict
    from ablation_tables import Comparison
    from measure import student

    # By hand: 4 values, standard deviation sqrt(5/3), t = 3.18245.
    mean, half = student([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.18245 * (5 / 3) ** 0.5 / 2, rel=1e-5)
    values = {"a": [3.0, 5.0], "b": [5.0, 5.0], "c": [1.0, 2.0]}
    assert difference(values, Comparison("", ("a", "b"), ("c",))) == [3.0, 3.0]
    assert difference(values, Comparison("", ("c",), ("a", "b"))) == [-3.0, -3.0]
    # Mean 1, standard deviation 1: of 3 values 2.48 either way, of 9 values 0.77.
    assert verdict([0.0, 1.0, 2.0]) == "tie"
    assert verdict([0.0, 1.0, 1.0, 2.0]) == "tie"  # 1.30 either way
    assert verdict([0.0, 1.0, 2.0] * 3) == "claimed, higher"
    assert verdict([0.0, -1.0, -2.0] * 3) == "claimed, lower"


def test_a_page_of_lines(tmp_path):
    from ablation_report import chosen, report
    from ablation_tables import TABLES, Cell

    rows = TABLES["shared"].rows
    names = list(rows)
    base = {"bias, each head": 70.0, "bias, shared": 60.0, "ctx, each head": 75.0,
            "ctx, shared": 74.0}  # fmt: skip
    # Means of a bias part by 10 - 0, 1, 2: 9 +- 2.48; those of ctx by 1 - 0, 2, 4: -1 +- 4.97.
    drift = {"bias, shared": 1.0, "ctx, shared": 2.0}
    lines = [
        line(rows[name], seed, base[name] + drift.get(name, 0.0) * seed)
        for seed in (2, 0, 1)
        for name in names
    ]
    lines.append(line(rows[names[0]], 3, 1.0))  # a seed that the other rows lack
    lines += [line(Cell(), seed, 50.0) for seed in range(3)]  # a row of tables that lack the others
    own, seeds = chosen(lines, TABLES["shared"])
    assert seeds == [0, 1, 2] and [x["accuracy"] for x in own["bias, shared"]] == [60, 61, 62]
    text = report(lines, tmp_path).read_text()
    assert text.count("\n## ") == 1 and "Toy" not in text
    assert "| bias, shared | 61.0 ± 2.5 | 80.05 |" in text
    assert "| bias, each head over bias, shared | +9.0 ± 2.5 | claimed, higher | +0.49 |" in text
    assert "| ctx, each head over ctx, shared | -1.0 ± 5.0 | tie | +0.10 |" in text
    told = "`python benchmarks/ablation.py shared`: seeds 0 to 2; one of two, 1 thread, torch 2; "
    assert told + "2026-01-01 to 2026-01-03." in text
    # Of more seeds than a table asks for, it takes the first; the order of lines is nothing to it.
    many = [line(cell, seed, 50.0 + seed) for seed in range(9) for cell in rows.values()]
    assert chosen(many, TABLES["shared"])[1] == [0, 1, 2, 3, 4]
    assert report(lines[::-1], tmp_path / "turned").read_text() == text


def test_a_page_of_sizes(tmp_path):
    from ablation_report import report
    from ablation_tables import TABLES

    lines = []
    for number, cell in enumerate(TABLES["sizes"].rows.values()):
        for seed in range(3):
            tests = {"12x18": 40.0, "24x24": 30.0 + seed, "6x6": 20.0 + number}
            lines.append(line(cell, seed, 60.0 + number * seed, sizes=tests))
    text = report(lines, tmp_path).read_text()
    assert "| accuracy, % | 6x6 | 12x12 | 24x24 | 12x18 |" in text
    assert "| absolute only | 20.0 ± 0.0 | 60.0 ± 0.0 | 31.0 ± 2.5 | 40.0 ± 0.0 |" in text
    row = (
        "| absolute + k over absolute only | +1.0 ± 0.0 * | +1.0 ± 2.5 | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    )
    assert row in text


def test_a_page_of_fashion(tmp_path):
    from ablation_report import report
    from fashion import FASHION, RECIPE

    lines = []
    for number, cell in enumerate(FASHION.tables["fashion"].rows.values()):
        for seed in range(3):
            own = line(cell, seed, 80.0 + number * seed, step_cpu_ms=10.0 + number)
            tests = {"20x20": 40.0, "56x56": 30.0 + seed, "28x42": 20.0 + number}
            lines.append({**own, "recipe": RECIPE, "sizes": tests})
    text = report(lines, tmp_path, FASHION).read_text()
    assert text.count("\n## ") == 2 == len(list(tmp_path.glob("*.png")))
    assert "| | accuracy, % | CPU time of a step, over absolute only |" in text
    assert "| k | 82.0 ± 5.0 | 1.09 |" in text
    assert "| k over absolute only | +1.0 ± 2.5 | tie |  |" in text
    assert "| accuracy, % | 20x20 | 28x28 | 56x56 | 28x42 |" in text


def test_fashion_cells():
    from ablation_tables import Cell
    from fashion import FASHION, QUICK, build

    rows = FASHION.tables["fashion"].rows
    weights = {name: build(cell, 3, QUICK).state_dict() for name, cell in rows.items()}
    for name, own in weights.items():
        for key, weight in weights["absolute only"].items():
            if key != "pos_embed" or rows[name].absolute:
                assert torch.equal(own[key], weight), (name, key)
    assert abs(float(weights["absolute only"]["pos_embed"].std()) - 0.5) < 0.05
    for name in ("lookhere", "rope-axial + k"):
        model = build(rows[name], 3, QUICK)
        assert model(torch.randn(1, 1, 20, 36)).isfinite().all()
    shared = {cell.key for cell in rows.values()}
    budget = FASHION.tables["fashion_budget"].rows
    assert budget["k, 100%"].key in shared and budget["k, 50%"].key not in shared
    assert budget["k, 50%"] == Cell(rows["k"].encoding, False, budget=0.5)


def test_fashion_run_is_the_same_twice(monkeypatch):
    import fashion

    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (200, 1, 28, 28), generator=draw).byte()
    classes = torch.arange(200) % 10
    splits = []

    def images(split):
        splits.append(split)
        return pixels, classes

    monkeypatch.setattr(fashion, "images", images)
    cell = fashion.FASHION.tables["fashion"].rows["k"]
    one, two = (fashion.execute(cell, 5, fashion.QUICK) for _ in range(2))
    other = fashion.execute(cell, 6, fashion.QUICK)
    for name in ("accuracy", "loss", "sizes"):
        assert one[name] == two[name]
    assert one["loss"] != other["loss"] and len(one["sizes"]) == 8
    assert splits.count("test") == 3  # once a run
