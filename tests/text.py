"""What the tests of one-dimensional encodings share: places, and each encoding as an oracle's."""

import itertools

import torch
from oracles import text as plain

import irpe

F64 = torch.float64
GAPS = [0, 1, 2, 5, 6, 11, 12, 13, 30]


def places(name):
    """A geometry for two samples, and positions of their queries and keys; None: prefix."""
    both = lambda p: [list(p)] * 2  # noqa: E731
    match name:
        case "whole":
            return irpe.Sequence(9), both(range(9)), both(range(9))
        case "63":
            return irpe.Sequence(63), both(range(63)), both(range(63))
        case "gaps":
            return irpe.Sequence(9, positions=torch.tensor(GAPS)), both(GAPS), both(GAPS)
        case "own":
            own = [GAPS[:7], [3, 4, 5, 6, 40, 41, 50]]
            return irpe.Sequence(7, positions=torch.tensor(own)), own, own
        case "prefix":
            where = both([None, None, *range(7)])
            return irpe.Sequence(7, prefix=2), where, where
        case "cached":
            query, key = torch.arange(6, 9), torch.arange(9)
            return irpe.Sequence(3, positions=query, keys=key), both(range(6, 9)), both(range(9))
        case "cached prefix":
            query, key = torch.arange(4, 7), torch.arange(7)
            geometry = irpe.Sequence(3, positions=query, keys=key, key_prefix=2)
            return geometry, both(range(4, 7)), both([None, None, *range(7)])
        case "fractions":
            where = [0.0, 0.5, 1.25, 3.0, 3.5, 8.75, 9.0]
            return irpe.Sequence(7, positions=torch.tensor(where)), both(where), both(where)
        case "grid":
            where = both([None, *itertools.product(range(3), range(4))])
            return irpe.Grid(3, 4, prefix=1), where, where
        case "grid no prefix":
            where = both(itertools.product(range(3), range(3)))
            return irpe.Grid(3, 3), where, where
    raise KeyError(name)


def name_of(spec):
    """What a spec's string starts with."""
    return str(spec).partition(",")[0]


def modules(spec, H, D, prefix, causal=False, dtype=F64):
    """The modules of a spec, tables drawn at random."""
    made = irpe.build(spec, dim=H * D, num_heads=H, prefix=int(prefix), causal=causal, dtype=dtype)
    for name, p in torch.nn.ModuleDict(made).named_parameters():
        if "frequencies" not in name:
            torch.nn.init.normal_(p)
    return made


def oracle(spec, module, q, k, queries, keys, causal=False, scale=None):
    """``logit`` and ``value`` of an encoding for ``oracles.text.attention``."""
    spec = irpe.parse(spec)
    D = q.shape[-1]
    scale = D**-0.5 if scale is None else scale

    def dot(x, y):
        return scale * (x * y).sum()

    def pair(b, i, j):
        """Offset of query and key, None with a prefix token."""
        p, r = queries[b][i], keys[b][j]
        return None if p is None or r is None else p - r

    def own(table, h):
        return table[h if table.shape[0] > 1 else 0]

    def clipped(b, i, j):
        offset = pair(b, i, j)
        return -1 if offset is None else plain.clip(offset, spec.clip) + spec.clip

    match name_of(spec):
        case "shaw":

            def logit(b, h, i, j):
                row = own(module.table_k, h)[:, clipped(b, i, j)]
                return dot(q[b, h, i], k[b, h, j] + row)

            def value(b, h, i, j):
                return own(module.table_v, h)[clipped(b, i, j)]

            return logit, value if spec.on == "kv" else None
        case "huang1" | "huang2" | "huang3" | "huang4":

            def logit(b, h, i, j):
                table = own(module.table, h)
                if spec.method == 1:
                    offset = pair(b, i, j)
                    n = -1 if offset is None else min(abs(offset), spec.clip)
                    return dot(q[b, h, i], k[b, h, j]) * table[n]
                row = table[..., clipped(b, i, j)]
                if spec.method == 4:
                    x, y = q[b, h, i] + row, k[b, h, j] + row
                    return dot(x, y) - dot(row, row)
                return dot(q[b, h, i] * row, k[b, h, j])

            return logit, None
        case "t5":
            both = not causal if spec.bidirectional is None else spec.bidirectional

            def logit(b, h, i, j):
                offset, n = pair(b, i, j), -1
                if offset is not None:
                    n = plain.t5_bucket(offset, spec.buckets, spec.max, both)
                return dot(q[b, h, i], k[b, h, j]) + module.table[h, n]

            return logit, None
        case "alibi":
            slopes = plain.slopes(q.shape[1])

            def logit(b, h, i, j):
                p, r = queries[b][i], keys[b][j]
                far = 0.0
                if p is not None and r is not None:
                    p, r = (x if isinstance(x, tuple) else (x,) for x in (p, r))
                    far = sum((x - y) ** 2 for x, y in zip(p, r, strict=True)) ** 0.5
                return dot(q[b, h, i], k[b, h, j]) - slopes[h] * far

            return logit, None
        case "rope" | "rope-axial" | "rope-mixed":
            turn = rotation(spec, module, D)
            on_q, on_k = (
                {
                    (b, h, i): turn(h, where[b][i], x[b, h, i])
                    for b, h, i in itertools.product(*map(range, x.shape[:3]))
                }
                for x, where in ((q, queries), (k, keys))
            )

            def logit(b, h, i, j):
                return dot(on_q[b, h, i], on_k[b, h, j])

            return logit, None
    raise KeyError(str(spec))


def rotation(spec, module, D):
    """``turn(h, position, x)``: a vector rotated as a rotary spec says."""
    spec, factor = irpe.parse(spec), 1.0
    name = name_of(spec)
    if name == "rope":
        width = round(spec.fraction * D)
        radians = plain.frequencies(width, spec.base)
        if spec.scaling == "linear":
            radians = [r / spec.factor for r in radians]
        elif spec.scaling == "ntk":
            radians = plain.frequencies(width, spec.base * spec.factor ** (width / (width - 2)))
        elif spec.scaling == "yarn":
            radians, factor = plain.yarn(width, spec.base, spec.factor, spec.original)
    elif name == "rope-axial":
        radians = plain.axial(D, spec.base, spec.order)

    def turn(h, position, x):
        if position is None:  # not rotated
            angles = [0.0] * (D // 2 if name != "rope" else len(radians))
        elif name == "rope":
            angles = [position * r for r in radians]
        elif name == "rope-axial":
            angles = [position[0] * r + position[1] * c for r, c in radians]
        else:
            rows, columns = module.frequencies[:, h]
            angles = [position[0] * r + position[1] * c for r, c in zip(rows, columns, strict=True)]
        return plain.rotated(x, angles, spec.layout, factor)

    return turn
