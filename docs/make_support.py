"""Which of timm's models attach equips: every name is built, equipped and run, without weights.

    python docs/make_support.py                     # all names, into docs/support.md; resumes
    python docs/make_support.py --names 'vit_*'     # some of them, printed

Models are built on the meta device, at full size and without memory, and run there: shapes are
real, numbers are not. What computes attention and is not equipped is found by watching the model
run, and not by asking irpe; a model that is not refused, and where this is more than class
attention or pooling, counts as a failure. It takes some seconds a name.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models import model_entrypoint
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import irpe  # noqa: E402

SPEC = "rpe-1.9-product-ctx-1-k"
# One query for all keys, or a softmax over channels, states or branches: no pairs of tokens.
PLACELESS = {
    "AttentionPoolLatent", "AttentionPoolPrr", "AttentionPool2d", "RotAttentionPool2d",
    "ClassAttn", "ClassAttention", "CrossAttention", "ChannelAttention", "ChannelAttentionV2",
    "XCA", "CrossCovarianceAttn", "SelectiveKernelAttn", "RadixSoftmax", "GlobalContext",
    "LayerScaleBlockClassAttn", "ClassAttentionBlock", "HSMSSD", "EfficientViM",
    "EfficientViMDistilled",
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Notes the classes of timm's modules that call a softmax or scaled_dot_product_attention."""

    calls = (F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.Tensor.softmax)

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        mask = (kwargs or {}).get("attn_mask")
        if function in self.calls and (mask is None or isinstance(mask, torch.Tensor)):
            frame = sys._getframe(1)
            while frame is not None:
                if "/irpe/" in frame.f_code.co_filename:
                    break
                owner = frame.f_locals.get("self")
                if isinstance(owner, torch.nn.Module) and not isinstance(owner, torch.nn.Softmax):
                    self.seen[type(owner).__name__] += 1
                    break
                frame = frame.f_back
        return function(*args, **(kwargs or {}))


def built(name):
    """A model without weights, on the meta device."""
    with torch.device("meta"):
        return timm.create_model(name).eval()


def examine(name):
    """What becomes of a model: a dict for its line of the table."""
    found = {"name": name, "family": model_entrypoint(name).__module__.split(".")[-1]}
    try:
        model = built(name)
    except Exception as error:
        return {**found, "result": "not built", "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        report = irpe.attach(model, SPEC, backend="reference")
        found |= {"result": "equipped", "modules": len(report.modules)}
        irpe.detach(model)
        found["kinds"] = sorted({type(model.get_submodule(m)).__name__ for m in report.modules})
        irpe.attach(model, SPEC, backend="reference")
    except irpe.IrpeError as error:
        none = "has no attention" in str(error)
        found |= {"result": "no attention" if none else "refused", "why": str(error)}
        if not none:  # what else goes on by itself does not matter
            return found
    try:
        with torch.no_grad(), Watch() as watch:
            model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
        found["left"] = dict(watch.seen)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def problem(found):
    """What is wrong with a line; None if nothing is."""
    if found["result"] == "refused":
        return None
    if found["result"] == "equipped" and "error" in found:
        return f"equipped, but it does not run: {found['error']}"
    left = set(found.get("left", ())) - PLACELESS
    if left:
        return f"{found['result']}, but {', '.join(sorted(left))} goes on by itself"
    return None


HEAD = """# What attach equips

`python docs/make_support.py` wrote this table with timm {timm} and torch {torch}: it builds every
name in timm's registry without weights on the meta device, attaches `{spec}`, and runs the
model there.
*Left alone* is attention that has no pairs of places: one query for all keys (class attention,
pooling), or a softmax over channels, states or branches. A refused model's error names the module;
`where=` may still choose others. Families in bold (some by `where=`) are compared with loops,
trained a step, checkpointed, copied, compiled and exported in `tests/test_attach_timm.py`.

| family (`timm.models.`) | equipped | refused | none | what is equipped | what is not, and why |
|---|---|---|---|---|---|
"""
TESTED = {
    "beit", "crossvit", "davit", "deepseek_vit", "deit", "eva", "fastvit", "hieradet_sam2",
    "maxxvit", "mobilevit", "naflexvit", "nest", "pit", "pvt_v2", "qwen3_vit", "swin_transformer",
    "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "twins", "vision_transformer",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "visformer",
    "volo",
}  # fmt: skip


def reason(found):
    """Why a model is refused, without the path of its module."""
    return found["why"].partition("cannot be equipped: ")[2].partition("; where=")[0]


def table(results):
    """docs/support.md: a line for each family with attention, and the others in one."""
    families, plain = {}, []
    for found in results:
        families.setdefault(found["family"], []).append(found)
    text = HEAD.format(timm=timm.__version__, torch=torch.__version__.split("+")[0], spec=SPEC)
    for family, models in sorted(families.items()):
        counts = Counter(f["result"] for f in models)
        if set(counts) == {"no attention"} and not any(f.get("left") for f in models):
            plain.append(family)
            continue
        kinds = sorted({kind for f in models for kind in f.get("kinds", ())})
        notes = {reason(f) for f in models if f["result"] == "refused"}
        left = {n for f in models if f["result"] != "refused" for n in f.get("left", ())}
        notes |= {f"left alone: {', '.join(sorted(left))}"} if left else set()
        notes |= {f"not built: {f['why']}" for f in models if f["result"] == "not built"}
        name = f"**{family}**" if family in TESTED else family
        numbers = (counts[k] or "" for k in ("equipped", "refused", "no attention"))
        cells = (name, *numbers, ", ".join(kinds), "; ".join(sorted(notes)).replace("|", "/"))
        text += f"| {' | '.join(map(str, cells))} |\n"
    return f"{text}\nWithout attention, and refused in one line that says so: {', '.join(plain)}.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", help="a shell pattern; the result is printed and not written")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "support.jsonl")
    options = parser.parse_args()
    names = [n for n in timm.list_models() if fnmatchcase(n, options.names or "*")]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.names:
        for name in names:
            print(json.dumps(examine(name)))
        return
    options.cache.parent.mkdir(exist_ok=True, parents=True)
    done = {}
    if options.cache.exists():
        done = {f["name"]: f for f in map(json.loads, options.cache.read_text().splitlines())}
    with options.cache.open("a") as file:
        for name in tqdm([n for n in names if n not in done]):
            done[name] = examine(name)
            print(json.dumps(done[name]), file=file, flush=True)
    (ROOT / "docs" / "support.md").write_text(table([done[n] for n in names]))
    wrong = [f"{f['name']}: {problem(f)}" for f in done.values() if problem(f)]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
