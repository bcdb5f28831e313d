"""Read with the weights of one mode as in a lesser one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hmt.config import MODES, SUMMARY_SOURCES
from hmt.model import HMTForCausalLM


def check_mode(mode: str, own: str) -> None:
    """Raises ValueError where a model of mode `own` lacks the parameters of `mode`."""
    if MODES.index(mode) < MODES.index(own):
        raise ValueError(f"mode must not need more memory than the model's own mode {own!r}, got {mode!r}")


@contextlib.contextmanager
def reading_as(model: HMTForCausalLM, mode: str | None, summary_source: str | None = None) -> Iterator[None]:
    """The model reads in another mode inside this context; the backward pass belongs into it as well.

    An HMT can read as any mode, an RMT as the baseline, and either source of summaries needs the same parameters.

    Args:
        mode, summary_source: as in `HMTConfig`; None is the model's own.

    Raises:
        ValueError: a mode that needs parameters which the model does not have, or a source that there is not.
    """
    config = model.config
    own = config.mode, config.summary_source
    if mode is not None:
        check_mode(mode, config.mode)
    if summary_source is not None and summary_source not in SUMMARY_SOURCES:
        raise ValueError(f"summary_source must be one of {SUMMARY_SOURCES}, got {summary_source!r}")
    config.mode, config.summary_source = mode or own[0], summary_source or own[1]
    try:
        yield
    finally:
        config.mode, config.summary_source = own
