"""docs/interactive: its bucket functions under node, its page in a browser, its numbers' source.

Needs node and Chromium: on PATH, or named by NODE=PATH and CHROMIUM=PATH.
"""

import html
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import irpe
from irpe.tools.plots import bucket_maps

FOLDER = Path(__file__).parents[2] / "docs" / "interactive"
RATIOS = (0.5, 1.0, 1.5, 1.9, 2.0, 2.5, 3.0, 4.5, 7.3, 20.0, 33.0)  # halves: 1.5 at 6, 4.5 at 18
METHODS = ("product", "cross", "euc", "quant", "rank")


def program(variable, *names):
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no {' or '.join(names)} on PATH: {variable}=PATH names one")
    return found


def spec(method, ratio, clip=False):
    return f"rpe-{ratio}-{method}-ctx-1-k" + (",index=clip" if clip else "")


def wanted(method, ratio, height, width, row, column, clip=False):
    """Buckets of all patches for one query, as the page writes them."""
    maps = bucket_maps(spec(method, ratio, clip), irpe.Grid(height, width), (row, column))
    return [
        ",".join(map(str, ids)) for ids in zip(*(m.flatten().tolist() for m in maps), strict=True)
    ]


def test_functions_are_the_librarys(tmp_path):
    node = program("NODE", "node", "nodejs")
    cases = [
        (method, ratio, height, width, row, column, clip)
        for method, ratio, clip in itertools.product(METHODS, RATIOS, (False, True))
        for height, width, row, column in ((7, 5, 3, 1), (1, 28, 0, 27), (28, 9, 0, 0))
    ]
    given = tmp_path / "cases.json"
    given.write_text(json.dumps(cases))
    code = (
        f"const b = require({json.dumps(str(FOLDER / 'buckets.js'))});"
        f"const cases = require({json.dumps(str(given))});"
        "console.log(JSON.stringify(cases.map(([m, r, h, w, y, x, c]) =>"
        "[b.bucketMap(m, r, h, w, y, x, c).map(i => i.join(',')), b.tableSize(m, r)])));"
    )
    done = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True)
    for case, (found, size) in zip(cases, json.loads(done.stdout), strict=True):
        assert found == wanted(*case), case
        method, ratio, *_, clip = case
        _, N = irpe.bucket_ids(spec(method, ratio, clip), irpe.Grid(2, 2))
        assert size == N * (2 if method == "cross" else 1), case


def played(tmp_path, script):
    """The page's document after a script of ours."""
    browser = program("CHROMIUM", "chromium", "chromium-browser", "google-chrome")
    folder = tmp_path / "interactive"
    shutil.copytree(FOLDER, folder)
    page = folder / "buckets.html"
    page.write_text(page.read_text().replace("</html>", f"<script>{script}</script></html>"))
    run = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,900"]
    run += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*run, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert 'id="said"' in done.stdout, done.stderr[-500:]
    return done.stdout


def cells(document, data):
    return [html.unescape(x) for x in re.findall(rf'data-{data}="([^"]*)"', document)]


SET = "const put = (id, v) => {get(id).value = v; get(id).dispatchEvent(new Event('input'));};"
POINT = """
const cell = document.querySelector('#buckets [data-row="{row}"][data-column="{column}"]');
const box = cell.getBoundingClientRect();
const at4 = {{bubbles: true, clientX: box.x + 4, clientY: box.y + 4}};
cell.dispatchEvent(new PointerEvent('{kind}', at4));
"""


def test_page_as_it_opens(tmp_path):
    document = played(tmp_path, "")
    assert cells(document, "bucket") == wanted("product", 1.9, 14, 14, 5, 8)
    assert "rpe-1.9-product-ctx-1-k: query at row 5, column 8 of 14x14" in document


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["pointermove", "pointerdown"])
def test_page_under_a_pointer(tmp_path, kind):
    choose = "put('method', 'cross'); put('ratio', 2.5); put('height', 6); put('width', 9);"
    point = POINT.format(row=2, column=7, kind=kind)
    document = played(tmp_path, SET + choose + point)
    assert cells(document, "bucket") == wanted("cross", 2.5, 6, 9, 2, 7)
    assert re.search(r'id="shown" hidden', document)  # no table was trained for it


def test_page_by_keys(tmp_path):
    keys = "for (const key of ['ArrowUp', 'ArrowLeft', 'ArrowLeft', 'ArrowDown', 'ArrowRight'])"
    keys += "get('buckets').dispatchEvent(new KeyboardEvent('keydown', {key}));"
    document = played(tmp_path, SET + "put('index', 'clip'); put('method', 'rank');" + keys)
    assert cells(document, "bucket") == wanted("rank", 1.9, 14, 14, 5, 7, clip=True)


def trained():
    text = (FOLDER / "table.js").read_text()
    return json.loads(text[text.index("{") : text.rindex(";")])


def test_page_shows_the_trained_numbers(tmp_path):
    document = played(tmp_path, SET + "put('layer', 2); put('head', 3);")
    table = trained()["layers"][2][3]
    shown = [float(x) for x in cells(document, "value")]
    assert shown == [table[int(n)] for n in wanted("product", 1.9, 14, 14, 5, 8)]


def test_trained_numbers_fit_the_library():
    """Their shape is the module's, and what the trained grid never shows is still zero."""
    found = trained()
    _, rpe_k, _ = irpe.build_rpe(found["spec"], head_dim=16, num_heads=4, prefix=0)
    tables = torch.tensor(found["layers"])
    assert tables.shape[1:] == rpe_k.table.shape
    ids, _ = irpe.bucket_ids(found["spec"], irpe.Grid(*found["grid"]))
    used = torch.zeros(tables.shape[-1], dtype=torch.bool)
    used[ids.unique()] = True
    assert (tables[..., ~used] == 0).all() and (tables[..., used] != 0).float().mean() > 0.9
