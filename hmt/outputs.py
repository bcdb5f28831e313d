"""What a pass over a text returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hmt.state import HMTState


@dataclass
class HMTOutput(ModelOutput):
    """Result of a forward pass.

    Attributes:
        loss: mean cross entropy over the labelled positions.
        logits: [B, T, vocab], only where asked for.
        state: what was remembered; pass it to the next call. A list where a list was passed in.
        trace: with output_trace=True, per segment read: "memory" [B, S, d] (segments read to their end only),
            "recalled" [B, S, d] and "age" [B, S], the number of segments since the strongest memory (0: none yet).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: HMTState | list[HMTState] | None = None
    trace: dict[str, Tensor] | None = None


@dataclass
class SegmentResult:
    """One segment of a pass: hidden states [B, T, d] of its new tokens, the state after it, and what to trace."""

    hidden: Tensor
    state: HMTState
    memory: Tensor | None = None
    recalled: Tensor | None = None
    age: Tensor | None = None


def trace_of(results: list[SegmentResult]) -> dict[str, Tensor]:
    """The trace of an `HMTOutput` from the segments of its pass."""
    trace = {}
    for name in ("memory", "recalled", "age"):
        values = [getattr(r, name) for r in results]
        if name == "age":
            known = next((v for v in values if v is not None), None)
            values = [] if known is None else [torch.zeros_like(known) if v is None else v for v in values]
        values = [v for v in values if v is not None]
        if values:
            trace[name] = torch.stack(values, dim=1)
    return trace
