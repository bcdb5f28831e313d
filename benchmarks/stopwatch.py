"""Timing of short calls by turns: A B C A B C ..., so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

SECONDS_PER_TURN = 0.02
MAX_RUNS = 1000
CALLS_PER_GRAPH = 10 if torch.cuda.is_available() else 1  # a replay takes about as long as two small kernels
# a provider that has taken so long in all is left out of further rounds
MOST_SECONDS = 2.0


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """CALLS_PER_GRAPH calls as a replayed CUDA graph, so that their launches are not what is timed; the call on CPU."""
    if not torch.cuda.is_available():
        return call
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            call()
    return graph.replay


def turn(call: Callable[[], object], runs: int) -> float:
    """Seconds per call over some runs in a row of what `as_graph` has made of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / (runs * CALLS_PER_GRAPH)


def seconds_of(call: Callable[[], object]) -> float:
    """Of one run, after a warm-up unless that takes long."""
    taken = turn(call, 1)
    return taken if is_long(taken) else turn(call, 1)


def is_long(seconds_of_call: float) -> bool:
    """Whether one run takes all the time that a provider has."""
    return seconds_of_call * CALLS_PER_GRAPH >= MOST_SECONDS


def runs_per_turn(seconds_of_call: float, seconds: float = SECONDS_PER_TURN) -> int:
    """How many runs make a turn of about so many seconds."""
    return max(1, min(MAX_RUNS, int(seconds / (seconds_of_call * CALLS_PER_GRAPH))))


class Turns:
    """Seconds per call of every provider, a list entry per round; a slow one has fewer, all of the first rounds.

    Who takes MOST_SECONDS is called once: it must have run before, as one whose results were checked has.
    """

    def __init__(self, providers: Mapping[str, Callable[[], object]], seconds_per_turn: float = SECONDS_PER_TURN):
        first = {name: seconds_of(call) for name, call in providers.items()}
        self._calls = {name: (call, runs_per_turn(first[name], seconds_per_turn)) for name, call in providers.items()}
        self.seconds = {name: [taken] if is_long(taken) else [] for name, taken in first.items()}

    def take(self, name: str) -> None:
        taken, runs = self.seconds[name], self._calls[name][1]
        if sum(taken) * runs * CALLS_PER_GRAPH < MOST_SECONDS:
            taken.append(turn(*self._calls[name]))

    def take_all_but(self, name: str) -> None:
        for other in self._calls:
            if other != name:
                self.take(other)
