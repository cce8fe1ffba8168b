"""Any string as a spec, any arguments of a geometry: it works as the loops say, or IrpeError."""

from collections import Counter

import torch
from fuzz_inputs import examples, geometries, small_specs, specs
from hypothesis import given
from hypothesis import strategies as st
from oracles import buckets as plain
from oracles.text import clip, t5_bucket

import irpe


def test_specs():
    outcomes = Counter()

    @examples(150)
    @given(specs)
    def check(spec):
        try:
            parsed = irpe.parse(spec)
        except irpe.IrpeError as error:
            assert "\n" not in str(error)
            assert not isinstance(spec, str) or repr(spec) in str(error)
            outcomes["refused"] += 1
            return
        again = irpe.parse(str(parsed))
        assert again == parsed and str(again) == str(parsed)
        try:
            made = irpe.build(parsed, dim=16, num_heads=2, prefix=1, device="meta")
            # What parses can be built: no table is too large for a machine.
            assert all(p.numel() < 2**28 for m in made.values() for p in m.parameters())
            outcomes["built"] += 1
        except irpe.IrpeError:
            outcomes["not built"] += 1

    check()
    total = outcomes.total()
    assert min(outcomes["built"], outcomes["refused"]) > total / 20, outcomes


def functions(spec):
    """The bucket functions of a spec with buckets as loops, of offsets as tuples."""
    spec = irpe.parse(spec)
    match spec:
        case irpe.RPE():
            return [lambda o, f=f: f(*o) for f in plain.buckets(spec)]
        case _ if str(spec).startswith("t5"):
            both = spec.bidirectional is not False
            return [lambda o: t5_bucket(o[0], spec.buckets, spec.max, both)]
        case _ if str(spec).startswith("huang1"):
            return [lambda o: min(abs(o[0]), spec.clip)]
    return [lambda o: clip(o[0], spec.clip) + spec.clip]


def where(tensor, prefix, batch):
    """Positions for each sample as lists of tuples, None for a prefix token."""
    samples = tensor.tolist() if tensor.dim() == 3 else [tensor.tolist()]
    samples = samples * batch if len(samples) == 1 else samples
    return [[None] * prefix + [tuple(p) for p in sample] for sample in samples]


def test_geometries():
    outcomes = Counter()

    @examples(150)
    @given(geometries(), small_specs(("rpe", "rpe", "shaw", "huang", "t5", "alibi")), st.booleans())
    def check(made, spec, fits):
        make, arguments, given = made
        # Most encodings are for one axis or two, so that half of the pairs would not fit.
        if fits and irpe.parse(spec).axes == (1,) and make is not irpe.Sequence:
            spec = "rpe-1.9-product-ctx-1-k"
        elif fits and irpe.parse(spec).axes != (1,) and make is irpe.Sequence:
            spec = "shaw,clip=3"
        try:
            geometry = make(*arguments, **given)
            length = geometry.query_length, geometry.key_length
            repr(geometry), geometry.batch
            if max(length) > 1000:  # ids of all pairs may not fit a memory
                return
            found, size = irpe.bucket_ids(spec, geometry)
        except irpe.IrpeError as error:
            assert "\n" not in str(error) or "tensor(" in str(error)
            outcomes["refused"] += 1
            return
        batch = 1 if geometry.batch is None else geometry.batch
        if not batch:  # nothing to compare
            outcomes["empty"] += 1
            return
        query, key = geometry.positions(torch.device("cpu"))
        query, key = where(query, geometry.prefix, batch), where(key, geometry.key_prefix, batch)
        assert length == (len(query[0]), len(key[0]))
        found = found if isinstance(found, tuple) else (found,)
        for ids, function in zip(found, functions(spec), strict=True):
            ids = ids if ids.dim() == 3 else ids.unsqueeze(0)
            wanted = [
                [
                    [
                        size - 1
                        if p is None or r is None
                        else function([a - b for a, b in zip(p, r, strict=True)])
                        for r in keys
                    ]
                    for p in queries
                ]
                for queries, keys in zip(query, key, strict=True)
            ]
            assert ids.tolist() == wanted, (spec, geometry)
        outcomes["equal"] += 1

    check()
    total = outcomes.total()
    assert min(outcomes["equal"], outcomes["refused"]) > total / 20, outcomes
