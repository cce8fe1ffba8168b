"""What the tests of the kernels share: a device, dtypes, the comparison with the reference."""

import torch
from oracles.precision import assert_as_good

import irpe
from irpe.backends import reference
from irpe.functional import validated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cannot do bfloat16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def expected(terms):
    """The kernels that a forward and a backward pass launch."""
    before = ["prepare"] if terms else []
    if any(t.kind == "key" for t in terms):
        before.append("project")
    return [*before, "forward", "row_pass", "column_pass", *(["reduce"] if terms else [])]


def leaf(x, dtype=None):
    """Return a copy of x on the device that requires a gradient."""
    return x.detach().to(DEVICE, dtype).clone().requires_grad_()


def tabled(terms, tables):
    return tuple(t.with_table(x) for t, x in zip(terms, tables, strict=True))


def outcome(backend, qkv, terms, weight, **given):
    """Output, and gradients of q, k, v and every table."""
    out = irpe.attention(*qkv, terms, backend=backend, **given)
    inputs = [*qkv, *(t.table for t in terms)]
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def effect_of_output(inputs, terms, weight, found, truth, given):
    """Return what the error of an output changes in the gradients of all inputs.

    Fused attention computes the gradient of logits, p (dp - sum p dp), with the product of the
    output and its gradient for the sum. If it is wrong by e, all of a row change by -p e: that is
    the gradient of -e times the logarithm of the sum of the row's exponentials.
    """
    mask, causal, scale = given.get("mask"), given.get("is_causal", False), given.get("scale")
    terms = tabled(terms, inputs[3:])
    call = validated(*inputs[:3], terms, mask, causal, 0.0, scale)
    error = ((found.double() - truth) * weight).sum(-1).detach()
    total = (error * reference.logits(call, call.grouped()[0])[0].logsumexp(-1)).sum()
    return torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)


def compare(qkv, terms, dtype, mask=None, **given):
    """The kernels in dtype against the reference in float64, and the reference in dtype."""
    weight = torch.randn(*qkv[0].shape[:3], qkv[2].shape[-1], dtype=dtype, device=DEVICE)
    results = {}
    first = [leaf(x, dtype) for x in (*qkv, *(t.table for t in terms))]
    for name, backend, kind in (
        ("found", "triton", dtype),
        ("plain", "reference", dtype),
        ("truth", "reference", torch.float64),
    ):
        inputs = [leaf(x, kind) for x in first]
        if mask is not None:
            given["mask"] = mask.to(DEVICE, kind if mask.is_floating_point() else None)
        results[name] = outcome(
            backend, inputs[:3], tabled(terms, inputs[3:]), weight.to(kind), **given
        )
    lost = effect_of_output(inputs, terms, weight, results["found"][0], results["truth"][0], given)
    names = ["out", "q", "k", "v", *(t.kind for t in terms)]
    # Gradients of logits are differences of numbers of this size, where plain torch can be
    # lucky: with one key seen it subtracts a number from itself.
    groups = inputs[0].shape[1] // inputs[2].shape[1]
    values = inputs[2].detach().repeat_interleave(groups, 1)
    products = weight.double() @ values.mT
    size = products.abs().max() * max(x.abs().max() for x in inputs)
    few = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for what, found, plain, truth, own in zip(names, *results.values(), [None, *lost], strict=True):
        assert found.dtype == dtype
        # Of few numbers, plain torch can have them all right: one rounding of what they sum.
        alone = min(products.numel(), truth.count_nonzero()) < 64
        band = 0.0 if what in ("out", "v") else size * (few if alone else 1)
        assert_as_good(found, plain, truth, what, band, own)
    return results["found"]
