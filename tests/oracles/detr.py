"""DETR's matching and losses written out in loops, in Python numbers."""

import itertools
import math


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def giou(a, b, eps=0.0):
    """Generalized IoU of two boxes, center and size; 0 where neither has an area."""
    (ax, ay, aX, aY), (bx, by, bX, bY) = corners(a), corners(b)
    inner = max(min(aX, bX) - max(ax, bx), 0) * max(min(aY, bY) - max(ay, by), 0)
    union = (aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - inner
    hull = (max(aX, bX) - min(ax, bx)) * (max(aY, bY) - min(ay, by))
    if union + eps == 0 or hull + eps == 0:
        return 0.0
    return inner / (union + eps) - (hull - union) / (hull + eps)


def softmax(row):
    top = max(row)
    parts = [math.exp(x - top) for x in row]
    return [p / sum(parts) for p in parts]


def cost(logits, boxes, labels, truths, weights):
    """[Q][T]: weights of class, L1 and giou."""
    a, b, c = weights
    return [
        [
            -a * softmax(logits[q])[label]
            + b * sum(abs(x - y) for x, y in zip(boxes[q], truth, strict=True))
            - c * giou(boxes[q], truth)
            for label, truth in zip(labels, truths, strict=True)
        ]
        for q in range(len(logits))
    ]


def cheapest(costs, targets):
    """The least sum over all ways to give targets queries of their own."""
    queries = len(costs)
    if targets <= queries:
        ways = itertools.permutations(range(queries), targets)
        return min(sum(costs[q][t] for t, q in enumerate(way)) for way in ways)
    ways = itertools.permutations(range(targets), queries)
    return min(sum(costs[q][t] for q, t in enumerate(way)) for way in ways)


def losses(images, classes, eos):
    """Cross entropy, L1 and giou loss of images: (logits, boxes, labels, truths, pairs) each."""
    boxes = max(1, sum(len(labels) for _, _, labels, _, _ in images))
    entropy = weight = distance = overlap = 0.0
    for logits, predicted, labels, truths, pairs in images:
        matched = dict(pairs)
        for q, row in enumerate(logits):
            label = labels[matched[q]] if q in matched else classes
            w = 1.0 if q in matched else eos
            entropy -= w * math.log(softmax(row)[label])
            weight += w
        for q, t in pairs:
            distance += sum(abs(x - y) for x, y in zip(predicted[q], truths[t], strict=True))
            overlap += 1 - giou(predicted[q], truths[t], eps=1e-7)
    return {"ce": entropy / weight, "bbox": distance / boxes, "giou": overlap / boxes}
