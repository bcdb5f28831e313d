"""Counters for kernels whose last block to finish does something more: zero before a launch, left at zero by it."""

from __future__ import annotations

import torch

_stream_counters: dict[torch.device, torch.Tensor] = {}
_graph_counters: dict[torch.device, torch.Tensor] = {}


def zeroed_counters(count: int, device: torch.device) -> torch.Tensor:
    """At least `count` int32 zeros that no other launch uses at the same time, provided each launch leaves zeros."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _counters_of_graph(count, device)
    if torch.cuda.current_stream(device).cuda_stream != 0:
        # What is kept must not come from memory that somebody takes back: torch.compile's CUDA graphs run a first time
        # on a stream of their own, with a memory pool of their own.
        return torch.zeros(count, dtype=torch.int32, device=device)
    if device not in _graph_counters:
        # Made before any capture: inside one, the zeros would cost a memset at every replay.
        _graph_counters[device] = torch.zeros(1 << 18, dtype=torch.int32, device=device)
    # The launches of one stream run one after another.
    if device not in _stream_counters or _stream_counters[device].numel() < count:
        _stream_counters[device] = torch.zeros(max(count, 1 << 14), dtype=torch.int32, device=device)
    return _stream_counters[device]


def _counters_of_graph(count: int, device: torch.device) -> torch.Tensor:
    # A graph may be replayed on any stream, beside any other: every captured launch keeps counters of its own.
    unused = _graph_counters.get(device)
    if unused is None or unused.numel() < count:
        return torch.zeros(count, dtype=torch.int32, device=device)
    _graph_counters[device] = unused[count:]
    return unused[:count]
