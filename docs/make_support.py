"""Which of timm's models attach supports: build every name, attach, and run it without weights.

    python docs/make_support.py                     # all names, into docs/support.md; resumes
    python docs/make_support.py --names 'vit_*'     # some of them, printed

Models are built and run on the meta device, at full size and without memory. The script watches the
run to find attention without an encoding, independently of irpe. A model that attach accepts, and
that has such attention other than class attention or pooling, counts as a failure. It takes some
seconds per name.
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
    """Return a model without weights, on the meta device."""
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
        found |= {"result": "attached", "modules": len(report.modules)}
        irpe.detach(model)
        found["kinds"] = sorted({type(model.get_submodule(m)).__name__ for m in report.modules})
        irpe.attach(model, SPEC, backend="reference")
    except irpe.IrpeError as error:
        none = "has no attention" in str(error)
        found |= {"result": "no attention" if none else "refused", "why": str(error)}
        if not none:  # other attention does not matter
            return found
    try:
        with torch.no_grad(), Watch() as watch:
            model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
        found["left"] = dict(watch.seen)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    return found


def problem(found):
    """Return what is wrong with a line, or None."""
    if found["result"] == "refused":
        return None
    if found["result"] == "attached" and "error" in found:
        return f"attached, but it does not run: {found['error']}"
    left = set(found.get("left", ())) - PLACELESS
    if left:
        return f"{found['result']}, but {', '.join(sorted(left))} runs without an encoding"
    return None


HEAD = """# What attach supports

```python
import timm, irpe

model = timm.create_model("beit_base_patch16_224", depth=1)
print(irpe.attach(model, "rpe-1.9-product-ctx-1-k"))
```

`python docs/make_support.py` writes this table, here with timm {timm} and torch {torch}. It builds every
name in timm's registry without weights on the meta device, attaches `{spec}`, and runs the
model there.

*Left alone* is attention without pairs of positions: one query for all keys (class attention,
pooling), or a softmax over channels, states or branches. The error of an unsupported model names the
module; `where=` may still select others. Families in bold (some with `where=`) are compared with
loops, trained a step, checkpointed, copied, compiled and exported in `tests/test_attach_timm.py`.

| family (`timm.models.`) | supported | unsupported | no attention | what gets the encoding | what does not, and why |
|---|---|---|---|---|---|
"""
FUSED = """
## Native encodings that are fused

`irpe.attach(model, native="fuse")` computes them as terms, with the same outputs, gradients and state_dict:
`tests/test_fused_native.py` and `tests/external/test_fused_transformers.py` compare each family on squares, rectangles and
other sizes, and 20 steps of training.

| family | library | native encoding |
|---|---|---|
| vision_transformer_sam (SAM, ViTDet) | timm | decomposed: a vector for each row and column offset |
| beit | timm | bias of each block, of all blocks, or both; class token |
| vision_transformer_relpos | timm | bias or network, of each block or of all; class token |
| maxxvit (MaxViT, CoAtNet) | timm | bias, network, and the bias of TensorFlow's models |
| swin_transformer | timm | bias of a window |
| swin_transformer_v2 | timm | network; cosine attention stays |
| tiny_vit | timm | bias for each distance in a window |
| SAM, SAM-HQ, ViTDet | transformers 5 | decomposed |
| BEiT | transformers 5 | bias of each layer, interpolated at other sizes |
| Swin, Swin V2 | transformers 5 | bias of a window, network |

Not fused, and refused in one line: timm's swin_transformer_v2_cr, whose network has dropout for each pair of patches in
training; BEiT of transformers with one bias for all layers; encodings that rotate queries, beside decomposed vectors.
"""
ORDINARY = """
## What is tested after attach

| | timm, families in bold | torchvision `vit_*` | `nn.TransformerEncoder` | transformers | test |
|---|---|---|---|---|---|
| loop over blocks, before and after a pass | yes | yes | yes | yes | `tests/test_ordinary.py`, `tests/test_carry.py` |
| a forward pass that raised | yes | yes | yes | yes | `tests/test_ordinary.py` |
| recomputation in another thread | yes | yes | yes | yes | `tests/test_ordinary.py` |
| two grids before one backward pass | yes | yes | yes | yes | `tests/test_attach_timm.py`, `tests/test_attach_torch.py`, `tests/external/test_attach_transformers.py` |
| video encoders: joint and divided attention, masked patches, compile, copies, `detach` | none | none | none | VideoMAE, ViViT, TimeSformer | `tests/external/test_attach_video.py` |
| save and load, by irpe and by the library | yes | yes | yes | ten families | `tests/test_files.py`, `tests/external/test_files_transformers.py` |
| attention maps | yes | yes | yes | yes | `tests/test_ordinary.py`, `tests/test_attached.py` |
| `native="replace"` leaves no unused parameter (DDP) | where there is a native encoding | none native | none native | none native | `tests/test_attached.py` |
| `detach` restores every attribute | ten families | yes | yes | yes | `tests/test_attached.py` |
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
    return (
        found["why"]
        .partition("attach does not support ")[2]
        .partition(": ")[2]
        .partition("; where=")[0]
    )


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
        numbers = (counts[k] or "" for k in ("attached", "refused", "no attention"))
        cells = (name, *numbers, ", ".join(kinds), "; ".join(sorted(notes)).replace("|", "/"))
        text += f"| {' | '.join(map(str, cells))} |\n"
    text += f"\nWithout attention, and refused in one line that says so: {', '.join(plain)}.\n"
    return text + FUSED + ORDINARY


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
