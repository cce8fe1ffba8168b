"""Write docs/api.md from the docstrings of irpe's public names.

python docs/make_api.py             # writes the page
python docs/make_api.py --check     # fails where the committed one is another
"""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import irpe  # noqa: E402
import irpe.zoo  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
HEAD = """# Public names

```python
import irpe

print(irpe.bucket_ids("rpe-1.9-product-ctx-1-k", irpe.Grid(14, 14))[1])  # 49 buckets
```

`python docs/make_api.py` writes this page from the docstrings. Shapes: B batch, H heads, L queries,
S keys, D channels of a head, C channels of a token, N buckets, A axes.
"""
# By task: each public name with a line of example.
TASKS = {
    "Add an encoding to an existing model": {
        "attach": 'irpe.attach(model, "rpe-1.9-product-ctx-1-k")',
        "detach": "irpe.detach(model)",
        "specs": 'irpe.specs(model)  # {"blocks.0.attn": "rpe-1.9-product-ctx-1-k", ...}',
        "located": "with irpe.located(irpe.Grid(7, 5)): y = encoder(x)",
        "attention_maps": "irpe.attention_maps(model, images)  # {path: [B, H, L, S]}",
    },
    "Train, save and load": {
        "param_groups": "irpe.param_groups(model, lr=1e-5, weight_decay=0.05, table_lr=1e-3)",
        "save": 'irpe.save(model, "model.safetensors")',
        "load": 'print(irpe.load(model, "model.safetensors"))',
        "Loaded": 'irpe.load(model, "plain.pth", differ="head, tables").fresh',
    },
    "Build your own layer": {
        "RPEAttention": 'irpe.RPEAttention(384, 6, "rpe-1.9-product-ctx-1-k", prefix=1)',
        "build": 'irpe.build("rope-axial", dim=384, num_heads=6, prefix=1)  # {name: module}',
        "build_rpe": "q, k, v = irpe.build_rpe(spec, head_dim=64, num_heads=6, prefix=1)",
        "encodings_of": "terms = irpe.encodings_of(self).terms(grid)",
        "attention": "irpe.attention(q, k, v, terms)",
        "explain": "print(irpe.explain(q, k, v, terms))",
        "linear": "out = irpe.linear.attention(q, k, v, rope, irpe.Sequence(512))",
    },
    "Positions": {
        "Grid": "irpe.Grid(14, 14, prefix=1)",
        "Sequence": "irpe.Sequence(512)",
        "Volume": "irpe.Volume(8, 14, 14, prefix=1)",
        "Geometry": "irpe.Geometry(queries, keys)  # integer positions [L, A] and [S, A]",
        "clear_cache": "irpe.clear_cache()",
    },
    "Specs and buckets": {
        "parse": 'str(irpe.parse("rpe-1.9-product-ctx-1-k"))',
        "RPE": 'irpe.RPE(ratio=1.9, method="product", mode="ctx", on="k")',
        "bucket_ids": "ids, N = irpe.bucket_ids(spec, irpe.Grid(14, 14))",
        "lookup": "irpe.lookup(x, ids)  # [B, H, L, N] and [L, S] -> [B, H, L, S]",
        "interpolate": "irpe.interpolate(table, 1024)",
    },
    "Extend": {
        "register": "@irpe.register",
        "Spec": "class Manhattan(irpe.Spec): ...",
        "fields": "reach: int = irpe.fields.count(8)",
        "LayerSize": "def build(self, size: irpe.LayerSize): ...",
        "Encoding": "class ManhattanBias(irpe.Encoding): ...",
        "Term": 'irpe.Term("bias", table, irpe.BucketIds(buckets, geometry))',
        "BucketIds": "irpe.BucketIds(buckets, irpe.Grid(14, 14)).dense(device)",
        "register_backend": 'irpe.register_backend("chunks", attention, unsupported=unsupported)',
        "Call": "def unsupported(call: irpe.Call): ...",
        "register_host": 'irpe.register_host("toyvit", find_sites)',
        "Site": "class AttentionSite(irpe.Site): ...",
        "IrpeError": "except irpe.IrpeError as error: print(error)",
    },
}


def signature(thing):
    """Return names and defaults; the docstring has types and shapes."""
    try:
        found = inspect.signature(thing)
    except ValueError:
        return ""
    blank = inspect.Parameter.empty
    plain = [p.replace(annotation=blank) for p in found.parameters.values()]
    text = str(found.replace(parameters=plain, return_annotation=blank))
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", text)


def described(docstring):
    """Return a docstring in Markdown: its first paragraph as text, the rest unmodified."""
    first, _, rest = inspect.cleandoc(docstring or "").partition("\n\n")
    text = " ".join(first.split()).replace("``", "`")
    return f"{text}\n" + (f"\n```text\n{rest}\n```\n" if rest else "")


def methods(kind):
    """Yield the public methods of a class that have a docstring of their own."""
    for name, member in vars(kind).items():
        call = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(call) and call.__doc__:
            yield name, call


def entry(name, thing, example=None):
    """Return the part of the page about one name."""
    text = f"\n### {name}\n\n"
    text += f"```text\n{example}\n```\n\n" if example else ""
    if inspect.ismodule(thing):
        own = (n for n, v in vars(thing).items() if getattr(v, "__module__", "") == thing.__name__)
        public = (n for n in own if n[0] != "_" and inspect.isroutine(getattr(thing, n)))
        return (
            text
            + described(thing.__doc__)
            + "".join(entry(f"{name}.{n}", getattr(thing, n)) for n in public)
        )
    if not inspect.isclass(thing):
        return f"{text}`irpe.{name}{signature(thing)}`\n\n{described(thing.__doc__)}"
    if issubclass(thing, Exception):
        return text + described(thing.__doc__)
    text += f"`irpe.{name}{signature(thing)}`\n\n{described(thing.__doc__)}"
    for method, call in methods(thing):
        text += f"\n#### {name}.{method}\n\n`{method}{signature(call)}`\n\n"
        text += described(call.__doc__)
    return text


def zoo():
    """Return the part of the page about the registered models."""
    lines = "".join(f"| `{name}` | `{spec}` |\n" for name, spec in irpe.zoo.SPECS.items())
    text = described(irpe.zoo.__doc__)
    return f"\n## Published models: irpe.zoo\n\n{text}\n| name | spec |\n|---|---|\n{lines}"


def page():
    """Return the whole page."""
    left = set(irpe.__all__)
    text = HEAD
    for task, examples in TASKS.items():
        text += f"\n## {task}\n"
        for name in examples:
            if name in left:
                text += entry(name, getattr(irpe, name), examples[name])
        left -= set(examples)
    if left:
        raise SystemExit(f"docs/make_api.py: TASKS lacks {', '.join(sorted(left))}")
    return text + zoo()


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit("docs/api.md is not what the docstrings say: run python docs/make_api.py")
