"""The one measure of low precision: against the same maths in plain low-precision torch."""

import torch


def assert_as_good(found, plain, truth, what="", size=0.0):
    """``found`` is at most twice as far from ``truth`` (float64) as ``plain`` is.

    A band of one rounding of the largest true value, or of a float32 number of the ``size`` of
    what was subtracted on the way, is allowed for, where ``plain`` is lucky.
    """
    assert torch.isfinite(found).all(), what
    error = (found.double() - truth).abs().max()
    allowed = 2 * (plain.double() - truth).abs().max()
    band = torch.finfo(found.dtype).eps * truth.abs().max()
    band = max(band, torch.finfo(torch.float32).eps * size)
    assert error <= allowed + band, f"{what}: error {error:.3e}, allowed {allowed + band:.3e}"
