"""The one tolerance of the tests: at most twice the error that PyTorch makes in the same dtype, plus a small atol."""

from __future__ import annotations

import torch


def assert_accurate(
    actual: torch.Tensor, rounded: torch.Tensor, exact: torch.Tensor, name: str = "result", atol: float | None = None
) -> None:
    """Assert max |actual - exact| <= 2 max |rounded - exact| + atol, and that infinite values stand in the same places.

    `exact` is the float64 result, `rounded` what plain PyTorch gives in the dtype under test. The default atol is one
    rounding of the largest value of `exact` to actual's dtype, plus the noise of sums accumulated in float32 over
    terms around 1 (gradients cancel such terms), in float64 for float64.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} values are NaN"
    actual_error, infinities_differ = _error(actual, exact)
    assert not infinities_differ, f"{name}: infinite in other places than the exact result"
    rounded_error, _ = _error(rounded, exact)
    if atol is None:
        largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
        noise = 1e-12 if actual.dtype == torch.float64 else 4e-6
        atol = torch.finfo(actual.dtype).eps * largest + noise * max(1.0, largest)
    limit = 2 * rounded_error + atol
    assert actual_error <= limit, f"{name}: error {actual_error:.3e}, allowed {limit:.3e} (PyTorch {rounded_error:.3e})"


def _error(result: torch.Tensor, exact: torch.Tensor) -> tuple[float, bool]:
    """The largest error over the finite values of `exact`, and whether the infinite ones differ."""
    result, exact = result.detach().double().cpu(), exact.detach().cpu()
    finite = exact.isfinite()
    errors = (result - exact)[finite].abs()
    return (errors.max().item() if errors.numel() else 0.0), not torch.equal(result[~finite], exact[~finite])
