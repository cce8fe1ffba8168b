"""COCO's numbers for boxes written out in loops, in Python numbers.

Objects are (image, category, box, area, crowd), detections (image, category, box, score); boxes are
x, y, width, height.
"""

import numpy as np

# linspace's own roundings decide where a recall or an overlap is exactly at a threshold.
OVERLAPS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0.0, 1.0, 101).tolist()
SIZES = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def overlap(found, truth, crowd):
    """Intersection over union; over the detection's own area where the object is a crowd."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = found, truth
    inner = max(min(ax + aw, bx + bw) - max(ax, bx), 0)
    inner *= max(min(ay + ah, by + bh) - max(ay, by), 0)
    whole = aw * ah if crowd else aw * ah + bw * bh - inner
    return inner / whole if inner else 0.0


def judged(objects, detections, threshold, size, most):
    """Of one image and category: objects that count, and (score, right) of what counts."""
    low, high = size
    ignored = [crowd or not low <= area <= high for _, _, _, area, crowd in objects]
    taken = [False] * len(objects)
    verdicts = []
    for _, _, box, score in sorted(detections, key=lambda d: -d[3])[:most]:
        best = None
        # An object that counts is preferred to one that is ignored, however large its overlap.
        for wanted in (False, True):
            for i, (_, _, truth, _, crowd) in enumerate(objects):
                value = overlap(box, truth, crowd)
                free = crowd or not taken[i]
                if best is None or best[2] == wanted:
                    nearer = value >= (threshold if best is None else best[1])
                    if ignored[i] == wanted and free and nearer:
                        best = (i, value, wanted)
        if best is not None:
            taken[best[0]] = True
            if not best[2]:
                verdicts.append((score, True))
        elif low <= box[2] * box[3] <= high:
            verdicts.append((score, False))
    return ignored.count(False), verdicts


def precisions(objects, detections, threshold, size=SIZES[""], most=100):
    """Of one category: precision at each of 101 recalls, and the recall of all; None if undefined.

    The precision at a recall is the best there is at that recall or a higher one.
    """
    count, verdicts = 0, []
    for image in sorted({o[0] for o in objects} | {d[0] for d in detections}):
        here = [[x for x in xs if x[0] == image] for xs in (objects, detections)]
        n, found = judged(*here, threshold, size, most)
        count, verdicts = count + n, verdicts + found
    if not count:
        return None
    right, points = 0, []
    for number, (_, hit) in enumerate(sorted(verdicts, key=lambda v: -v[0]), start=1):
        right += hit
        points.append((right / count, right / number))
    return (
        [max((p for r, p in points if r >= recall), default=0.0) for recall in RECALLS],
        right / count,
    )


def mean(values):
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else float("nan")


def twelve(objects, detections, categories):
    """COCO's numbers by their names; nan where nothing defines them."""

    def over(overlaps, size="", most=100):
        found = []
        for category in categories:
            part = [[x for x in xs if x[1] == category] for xs in (objects, detections)]
            found += [precisions(*part, t, SIZES[size], most) for t in overlaps]
        found = [f for f in found if f is not None]
        return mean([mean(p) for p, _ in found]), mean([r for _, r in found])

    numbers = {"AP": over(OVERLAPS)[0], "AP50": over(OVERLAPS[:1])[0]}
    numbers["AP75"] = over(OVERLAPS[5:6])[0]
    numbers |= {f"AP{size}": over(OVERLAPS, size)[0] for size in "sml"}
    numbers |= {f"AR{most}": over(OVERLAPS, most=most)[1] for most in (1, 10, 100)}
    return numbers | {f"AR{size}": over(OVERLAPS, size)[1] for size in "sml"}
