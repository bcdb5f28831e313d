"""Perplexity of a long text as it is being read."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hmt.model import HMTForCausalLM
from hmt.state import HMTState


@dataclass
class Score:
    """What reading some tokens cost and how well they were predicted.

    Attributes:
        num_tokens: tokens read.
        num_scored: of these, tokens that were predicted (all but the first of a text).
        nll: their summed negative log likelihood in nats.
        seconds: time it took.
        state: the state after them.
    """

    num_tokens: int
    num_scored: int
    nll: float
    seconds: float
    state: HMTState

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.nll / self.num_scored) if self.num_scored else math.nan

    def __add__(self, later: Score) -> Score:
        """Both stretches as one, with the later state."""
        return Score(
            self.num_tokens + later.num_tokens,
            self.num_scored + later.num_scored,
            self.nll + later.nll,
            self.seconds + later.seconds,
            later.state,
        )


def perplexity_of(nats_per_token: float) -> float:
    """exp of a mean negative log likelihood; infinite where a float cannot hold it."""
    return math.inf if nats_per_token >= 709 else math.exp(nats_per_token)


@torch.no_grad()
def score(
    model: HMTForCausalLM, input_ids: Tensor, state: HMTState | None = None, *, segments_per_step: int = 4
) -> Iterator[Score]:
    """Read ids [1, T] and yield a `Score` every few segments; a token's prediction counts where it was made.

    The last token is read but predicts nothing. Stopping early is fine: each Score carries its state.
    """
    step = segments_per_step * model.config.segment_length
    total = input_ids.shape[1]
    if not total:
        return
    opened = 0 if state is None else state.num_open  # a step ends with a segment, which then is read once
    for begin in range(-opened, total, step):
        start, stop = max(0, begin), min(begin + step, total)
        following = input_ids[:, start + 1 : stop + 1].to(model.device)
        labels = torch.nn.functional.pad(following, (0, stop - start - following.shape[1]), value=-100)
        then = time.perf_counter()
        out = model(input_ids[:, start:stop].to(model.device), shift_labels=labels, state=state, num_items_in_batch=1)
        nll = float(out.loss)
        state = out.state
        yield Score(stop - start, following.shape[1], nll, time.perf_counter() - then, state)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory used so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
