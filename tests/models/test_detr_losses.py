"""Matcher and criterion against loops and permutations."""

import pytest
import torch
from oracles import detr as oracle

import irpe
from irpe import IrpeError
from models.detr import Criterion, HungarianMatcher

CLASSES, QUERIES = 3, 4
WEIGHTS = (1.0, 5.0, 2.0)


def made(counts, seed=0, degenerate=False):
    torch.manual_seed(seed)

    def boxes(*shape):
        found = torch.rand(*shape, 4, dtype=torch.float64) * 0.4 + 0.1
        if degenerate and found.numel():
            found[..., ::2, 2:] = 0.0  # no area
        return found

    outputs = {
        "pred_logits": torch.randn(len(counts), QUERIES, CLASSES + 1, dtype=torch.float64),
        "pred_boxes": boxes(len(counts), QUERIES),
    }
    targets = [{"labels": torch.randint(CLASSES, (n,)), "boxes": boxes(n)} for n in counts]
    return outputs, targets


CASES = [[2, 3], [0, 0], [0, 2], [1], [4], [6, 1]]


@pytest.mark.parametrize("degenerate", [False, True])
@pytest.mark.parametrize("counts", CASES, ids=str)
def test_matching_is_the_cheapest(counts, degenerate):
    outputs, targets = made(counts, degenerate=degenerate)
    pairs = HungarianMatcher(*WEIGHTS)(outputs, targets)
    assert len(pairs) == len(counts)
    for image, (query, index) in enumerate(pairs):
        target = targets[image]
        assert query.dtype == index.dtype == torch.int64
        assert len(query) == min(QUERIES, counts[image]) == len(set(query.tolist()))
        assert len(set(index.tolist())) == len(index)
        costs = oracle.cost(
            outputs["pred_logits"][image].tolist(),
            outputs["pred_boxes"][image].tolist(),
            target["labels"].tolist(),
            target["boxes"].tolist(),
            WEIGHTS,
        )
        spent = sum(costs[q][t] for q, t in zip(query.tolist(), index.tolist(), strict=True))
        assert spent == pytest.approx(oracle.cheapest(costs, counts[image]), abs=1e-5)


@pytest.mark.parametrize("degenerate", [False, True])
@pytest.mark.parametrize("counts", CASES, ids=str)
def test_losses(counts, degenerate):
    outputs, targets = made(counts, degenerate=degenerate)
    aux, _ = made(counts, seed=1, degenerate=degenerate)
    for part in (outputs, aux):
        for value in part.values():
            value.requires_grad_()
    matcher = HungarianMatcher(*WEIGHTS)
    found = Criterion(CLASSES, matcher)({**outputs, "aux_outputs": [aux]}, targets)
    total = 0.0
    for suffix, part in (("", outputs), ("_0", aux)):
        pairs = matcher(part, targets)
        images = [
            (
                part["pred_logits"][i].tolist(),
                part["pred_boxes"][i].tolist(),
                targets[i]["labels"].tolist(),
                targets[i]["boxes"].tolist(),
                list(zip(*(x.tolist() for x in pairs[i]), strict=True)),
            )
            for i in range(len(counts))
        ]
        wanted = oracle.losses(images, CLASSES, 0.1)
        for name, value in wanted.items():
            assert found[f"loss_{name}{suffix}"].item() == pytest.approx(value, abs=1e-5), name
        total += wanted["ce"] + 5 * wanted["bbox"] + 2 * wanted["giou"]
    assert found["loss"].item() == pytest.approx(total, rel=1e-5)
    found["loss"].backward()
    for part in (outputs, aux):
        assert all(torch.isfinite(value.grad).all() for value in part.values())


def test_what_is_not_finite_shows_in_the_loss():
    outputs, targets = made([2, 1])
    outputs["pred_boxes"][0, 0] = float("nan")
    outputs["pred_logits"][1] = float("nan")
    assert not torch.isfinite(Criterion(CLASSES, HungarianMatcher())(outputs, targets)["loss"])


def test_a_matcher_needs_a_cost():
    with pytest.raises(irpe.IrpeError, match="all costs"):
        HungarianMatcher(0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_more_than_rounded_inputs(dtype):
    outputs, targets = made([2, 0, 6])
    low = {key: value.to(dtype) for key, value in outputs.items()}
    full = {key: value.float() for key, value in low.items()}
    small = [{"labels": t["labels"].int(), "boxes": t["boxes"].half().float()} for t in targets]
    criterion = Criterion(CLASSES, HungarianMatcher())
    found, wanted = criterion(low, small), criterion(full, small)
    assert found == wanted and found["loss"].dtype == torch.float32


def test_processes_share_their_targets_in_training_alone(monkeypatch):
    """An evaluation deals out unequal parts; to wait for one another there would never end."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.add_(7))
    outputs, targets = made([2, 3])
    criterion = Criterion(CLASSES, HungarianMatcher())
    both, alone = (criterion.train(mode)(outputs, targets) for mode in (True, False))
    for name in ("loss_bbox", "loss_giou"):
        torch.testing.assert_close(both[name] * (5 + 7) / 2, alone[name] * 5)
    assert both["loss_ce"] == alone["loss_ce"]


@pytest.mark.parametrize(
    ("label", "box", "part"),
    [
        (CLASSES, (0.5, 0.5, 0.2, 0.2), f"label {CLASSES} of target 1"),
        (CLASSES + 7, (0.5, 0.5, 0.2, 0.2), f"label {CLASSES + 7} of target 1"),
        (-1, (0.5, 0.5, 0.2, 0.2), "label -1 of target 1"),
        (0, (50, 50, 20, 20), r"box \[50.0, 50.0, 20.0, 20.0\] of target 1"),
        (0, (0.5, 0.5, -0.2, 0.2), "is not within"),
        (0, (0.5, 0.5, float("nan"), 0.2), "nan"),
    ],
)
def test_targets_out_of_range_raise(label: int, box: tuple, part: str):
    outputs = {"pred_logits": torch.zeros(2, 5, CLASSES + 1), "pred_boxes": torch.rand(2, 5, 4)}
    good = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    bad = {"labels": torch.tensor([label]), "boxes": torch.tensor([box], dtype=torch.float32)}
    with pytest.raises(IrpeError, match=part):
        Criterion(CLASSES, HungarianMatcher())(outputs, [good, bad])
