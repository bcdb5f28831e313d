"""Timing of short calls by turns: A B C A B C ..., so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

SECONDS_PER_TURN = 0.02
MAX_CALLS = 1000
# a provider that has taken so long in all is left out of further rounds
MOST_SECONDS = 2.0


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replayed CUDA graph on CUDA, so that launches from Python are not what is timed; itself on CPU."""
    if not torch.cuda.is_available():
        return call
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def turn(call: Callable[[], object], calls: int) -> float:
    """Seconds per call over `calls` calls in a row."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def calls_per_turn(call: Callable[[], object], seconds: float = SECONDS_PER_TURN) -> int:
    """How many calls make a turn of about so many seconds, from one call after a warm-up."""
    call()
    return max(1, min(MAX_CALLS, int(seconds / turn(call, 1))))


class Turns:
    """Seconds per call of every provider, a list entry per round; a slow one has fewer, all of the first rounds."""

    def __init__(self, providers: Mapping[str, Callable[[], object]], seconds_per_turn: float = SECONDS_PER_TURN):
        self._calls = {name: (call, calls_per_turn(call, seconds_per_turn)) for name, call in providers.items()}
        self.seconds: dict[str, list[float]] = {name: [] for name in providers}

    def take(self, name: str) -> None:
        taken, calls = self.seconds[name], self._calls[name][1]
        if sum(taken) * calls < MOST_SECONDS:
            taken.append(turn(*self._calls[name]))

    def take_all_but(self, name: str) -> None:
        for other in self._calls:
            if other != name:
                self.take(other)
