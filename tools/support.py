"""Which of timm's models attach equips: every name is built, equipped and run, without weights.

    python tools/support.py                     # all names, into docs/support.md; goes on where it was
    python tools/support.py --names 'vit_*'     # some of them, printed

Models are built on the meta device, at full size and without memory, and run there: shapes are real,
numbers are not. What computes attention and is still not ours after ``attach`` is found by watching
the model run, and not by asking irpe; a model where that is more than class attention or pooling
counts as a failure.
"""

import argparse
import json
import sys
import warnings
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model_in_modules, model_entrypoint
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import irpe  # noqa: E402

SPEC = "rpe-1.9-product-ctx-1-k"
# One query for all keys, a softmax over channels, or none over pairs of tokens at all.
PLACELESS = {
    "AttentionPoolLatent", "AttentionPoolPrr", "AttentionPool2d", "RotAttentionPool2d",
    "ClassAttn", "ClassAttention", "CrossAttention", "ChannelAttention", "ChannelAttentionV2",
    "XCA", "CrossCovarianceAttn", "SelectiveKernelAttn", "RadixSoftmax", "GlobalContext",
    "LayerScaleBlockClassAttn", "ClassAttentionBlock",
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Notes the classes of timm's modules that call a softmax or scaled_dot_product_attention."""

    calls = (F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.Tensor.softmax)

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.calls:
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


def examine(name):
    """What becomes of a model: a dict for its line of the table."""
    found = {"name": name, "family": model_entrypoint(name).__module__.split(".")[-1]}
    try:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
    except Exception as error:
        return {**found, "result": "not built", "why": f"{type(error).__name__}: {error}"[:300]}
    try:
        report = irpe.attach(model, SPEC, backend="reference")
        found |= {"result": "equipped", "modules": len(report.modules)}
        found["kinds"] = sorted(
            {type(model.get_submodule(m)).__mro__[2].__name__ for m in report.modules}
        )
    except irpe.IrpeError as error:
        none = "has no attention" in str(error)
        found |= {"result": "no attention" if none else "refused", "why": str(error)}
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
    left = set(found.get("left", ())) - PLACELESS
    if left:
        return f"{found['result']}, but {', '.join(sorted(left))} goes on by itself"
    return None


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
