"""The step of a segment without a fused kernel: write the new memory, recall, copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def write_then_recall(
    forward: Callable[..., Outputs],
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
) -> Outputs:
    """memory[b, slot_index[b]] = new_memory[b], then out[:, 0] = out[:, -1] = recalled; see `memory_recall_step`."""
    write_slot(memory, new_memory, slot_index)
    recalled, lse, slot = forward(query, memory, num_valid, softmax_scale)
    out[:, :1] = recalled
    out[:, -1:] = recalled
    return out[:, :1], lse, slot


def write_slot(memory: torch.Tensor, new_memory: torch.Tensor, slot_index: torch.Tensor) -> None:
    """memory[b, slot_index[b]] = new_memory[b]; an index outside the queue writes nothing. No host synchronisation."""
    num_slots = memory.shape[1]
    if num_slots == 0:
        return
    inside = (slot_index >= 0) & (slot_index < num_slots)
    index = slot_index.clamp(0, num_slots - 1).long()[:, None, None].expand(-1, 1, memory.shape[2])
    kept = memory.gather(1, index)
    memory.scatter_(1, index, torch.where(inside[:, None, None], new_memory[:, None], kept))
