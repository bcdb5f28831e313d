"""memory_recall in Triton: forward, backward, and the step of a segment (write a memory, then recall).

One query per batch row takes the vector kernels, several take the matrix kernels, 16 at a time. With few queries the
slots are split over blocks, and a second launch reduces what these leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from hmt_kernels import triton_launch
from hmt_kernels.checks import check_own_rows
from hmt_kernels.memory_recall.triton_configs import BLOCK_Q, Config, chosen, matrix_config, vector_config
from hmt_kernels.memory_recall.triton_plans import (
    plan_matrix_backward,
    plan_matrix_forward,
    plan_vector_backward,
    plan_vector_forward,
)
from hmt_kernels.memory_recall.triton_vector import memory_recall_vector_fwd_kernel
from hmt_kernels.triton_launch import Launch, target_of
from hmt_kernels.triton_tiles import has_aligned_rows

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

INTERPRETED = triton_launch.is_interpreted(memory_recall_vector_fwd_kernel)


def missing() -> str | None:
    """Why this machine cannot run these kernels (None: it can)."""
    return triton_launch.missing(memory_recall_vector_fwd_kernel)


def unavailable(query: torch.Tensor, memory: torch.Tensor) -> str | None:
    """Why these kernels cannot run these tensors (None: they can)."""
    if query.device.type != "cuda" and not INTERPRETED:
        return f"it needs CUDA tensors, query is on {query.device}"
    if query.dtype == torch.float64:
        return "it has no float64"
    return None


def forward(query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float) -> Outputs:
    """recalled [B, Q, D], lse [B, Q] and slot [B, Q] of memory_recall."""
    query = _with_aligned_rows(query)
    memory = memory if memory.stride(-1) == 1 else memory.contiguous()
    num_valid = None if num_valid is None else num_valid.contiguous()
    outputs = (torch.empty_like(query, memory_format=torch.contiguous_format), *_empty_stats(query))
    if query.shape[1] == 1:
        return _vector_forward(query, memory, num_valid, softmax_scale, outputs, None, 0)
    target = target_of(query.device)
    plan = partial(plan_matrix_forward, query, memory, num_valid, softmax_scale, outputs, target=target)
    config = matrix_config("forward", memory)
    _launch("matrix_forward", query, memory, config, [plan])
    return outputs


def backward(
    d_recalled: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    recalled: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d_query [B, Q, D] and d_memory [B, N, D] of memory_recall."""
    if query.numel() == 0:
        return torch.zeros_like(query), memory.new_zeros(memory.shape)
    query, d_recalled = _with_aligned_rows(query), _with_aligned_rows(d_recalled)
    memory = memory if memory.stride(-1) == 1 else memory.contiguous()
    num_valid = None if num_valid is None else num_valid.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    recalled, lse = recalled.contiguous(), lse.contiguous()
    num_queries = query.shape[1]
    # Beyond one tile of queries, each launch adds the gradients of its own to those of memory so far.
    d_memory_dtype = torch.float32 if num_queries > BLOCK_Q else memory.dtype
    gradients = (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        torch.empty(memory.shape, dtype=d_memory_dtype, device=memory.device),
    )
    target = target_of(query.device)
    inputs = (d_recalled, d_lse, query, memory, num_valid, recalled, lse, softmax_scale, gradients)
    if num_queries == 1:
        config = vector_config("backward", memory, target)
        _launch("vector_backward", query, memory, config, [partial(plan_vector_backward, *inputs, target=target)])
    else:
        config = matrix_config("backward", memory)
        firsts = range(0, num_queries, BLOCK_Q)
        plans = [partial(plan_matrix_backward, first, *inputs, target=target) for first in firsts]
        _launch("matrix_backward", query, memory, config, plans)
    return gradients[0], gradients[1].to(memory.dtype)


def step(
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: int | torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
) -> Outputs:
    """memory[b, slot_index] = new_memory[b], then out[:, 0] = out[:, -1] = recalled; no gradients.

    query [B, 1, D], memory [B, N, D] and out [B, T, D] (both written in place), new_memory [B, D], slot_index an int or
    int32 [B] (an index outside 0 .. N - 1 in the tensor writes nothing), num_valid counted after the write. Returns
    out[:, :1], lse [B, 1] and slot [B, 1]. Raises ValueError for more than one query, for an int slot_index outside
    the queue, and for a memory or an out whose rows are not contiguous or share elements.
    """
    if query.shape[1] != 1:
        raise ValueError(f"query must hold one query per batch row, got shape {list(query.shape)}")
    if isinstance(slot_index, int) and not 0 <= slot_index < memory.shape[1]:
        raise ValueError(f"slot_index must be from 0 to N - 1 = {memory.shape[1] - 1}, got {slot_index}")
    for name, tensor in (("memory", memory), ("out", out)):
        check_own_rows(name, tensor)
    query, new_memory = _with_aligned_rows(query), _with_aligned_rows(new_memory)
    num_valid = None if num_valid is None else num_valid.contiguous()
    slot_index = slot_index if isinstance(slot_index, int) else slot_index.contiguous()
    outputs = (out, *_empty_stats(query))
    _, lse, slot = _vector_forward(query, memory, num_valid, softmax_scale, outputs, new_memory, slot_index)
    return out[:, :1], lse, slot


def _vector_forward(
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    outputs: Outputs,
    new_memory: torch.Tensor | None,
    new_slot: int | torch.Tensor,
) -> Outputs:
    target = target_of(query.device)
    config = vector_config("forward", memory, target)
    inputs = (query, memory, num_valid, softmax_scale, outputs, new_memory, new_slot)
    _launch("vector_forward", query, memory, config, [partial(plan_vector_forward, *inputs, target=target)])
    return outputs


def _launch(
    name: str, query: torch.Tensor, memory: torch.Tensor, default: Config, plans: Sequence[Callable[..., list[Launch]]]
) -> None:
    def run(config: Config) -> None:
        for plan in plans:
            for launch in plan(config=config):
                triton_launch.run(launch, query.device)

    # Sizes are rounded up to powers of two: a queue that grows is not tuned anew at every length.
    batch, num_slots, dim = (int(size) for size in memory.shape)
    sizes = (batch * query.shape[1]).bit_length(), num_slots.bit_length(), dim
    run(chosen((name, query.device, query.dtype, *sizes), default, run, INTERPRETED))


def _with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if has_aligned_rows(tensor) else tensor.contiguous()


def _empty_stats(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = query.shape[:2]
    return query.new_empty(rows, dtype=torch.float32), query.new_empty(rows, dtype=torch.int32)
