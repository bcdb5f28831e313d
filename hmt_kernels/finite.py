"""A checking mode, off by default: NaN and infinite values in what goes in become errors that name the argument."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor

ENVIRONMENT_VARIABLE = "HMT_CHECK"

# A plain global, as for use_impl: it holds for all threads, and torch.compile guards on it.
_active = os.environ.get(ENVIRONMENT_VARIABLE, "") not in ("", "0")


@contextlib.contextmanager
def checking(active: bool = True) -> Iterator[None]:
    """Inside this context operators and models look at the values of their inputs, which waits for a GPU each time.

    The environment variable HMT_CHECK=1 turns it on for a whole process. What torch.compile compiles is not checked.

    Args:
        active: False turns it off inside the context.

    Raises:
        ValueError: inside, from an operator or a model: a value that is NaN or infinite, with its name and place.

    Example:
        >>> with hmt_kernels.checking():
        ...     out = hmt_kernels.memory_recall(query, memory, softmax_scale=0.125)
    """
    global _active
    previous, _active = _active, active
    try:
        yield
    finally:
        _active = previous


def is_checking() -> bool:
    """Whether values are to be checked now."""
    return _active and not torch.compiler.is_compiling()


def check_finite(name: str, tensor: torch.Tensor | None, live: torch.Tensor | None = None) -> None:
    """Raise a ValueError if tensor holds NaN or infinity, among the elements that `live`, broadcast to it, selects."""
    if tensor is None or not tensor.is_floating_point() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return  # nothing, or nothing with values
    wrong = ~tensor.detach().isfinite()
    if live is not None:
        wrong = wrong & live
    count = int(wrong.sum())
    if count:
        place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} must be finite, got {count} NaN or infinite of its {tensor.numel()} values, "
            f"the first {tensor[tuple(place)].item()} at {place}"
        )
