"""Read with the weights of one mode as in a lesser one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hmt.config import MODES
from hmt.model import HMTForCausalLM


@contextlib.contextmanager
def reading_as(model: HMTForCausalLM, mode: str | None) -> Iterator[None]:
    """The model reads in another mode inside this context; the backward pass belongs into it as well.

    An HMT can read as any mode, an RMT as the baseline.

    Raises:
        ValueError: a mode that needs parameters which the model does not have.
    """
    own = model.config.mode
    if mode is not None and MODES.index(mode) < MODES.index(own):
        raise ValueError(f"mode must not need more memory than the model's own mode {own!r}, got {mode!r}")
    model.config.mode = mode or own
    try:
        yield
    finally:
        model.config.mode = own
