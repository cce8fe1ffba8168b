"""The one measure of low precision: against the same maths in plain low-precision torch."""

import torch


def assert_as_good(found, plain, truth, what="", size=0.0, effect=None):
    """``found`` is at most twice as far from ``truth`` (float64) as ``plain`` is.

    That is of the root of the mean square; of the largest error, which one number decides, at most
    three times. A band of one rounding of the largest true value, or of a float32 number of the
    ``size`` of what was subtracted on the way, is allowed for, where ``plain`` is lucky. So is an
    ``effect`` of a rounding on the way that ``plain`` does not do.
    """
    assert torch.isfinite(found).all(), what
    band = torch.finfo(found.dtype).eps * truth.abs().max()
    band = max(band, torch.finfo(torch.float32).eps * size)
    own, other = (found.double() - truth).abs(), (plain.double() - truth).abs()
    more = torch.zeros_like(truth) if effect is None else effect.abs()
    for error, allowed, name in (
        (_mean(own), 2 * (_mean(other) + _mean(more)), "mean"),
        (own.max(), 3 * (other.max() + more.max()), "largest"),
    ):
        told = f"{what}: {name} error {error:.3e}, allowed {allowed + band:.3e}"
        assert error <= allowed + band, told


def _mean(error):
    return error.square().mean().sqrt()
