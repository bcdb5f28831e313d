"""From tensors and a config to a kernel launch: strides, workspace and compile-time constants, all by name."""

from __future__ import annotations

from typing import Any

import torch

from hmt_kernels.counters import zeroed_counters
from hmt_kernels.memory_recall import triton_blocks
from hmt_kernels.memory_recall.triton_configs import (
    BLOCK_Q,
    MATRIX_SMALLEST,
    VECTOR_SMALLEST,
    Config,
    num_splits,
)
from hmt_kernels.memory_recall.triton_matrix import memory_recall_matrix_bwd_kernel, memory_recall_matrix_fwd_kernel
from hmt_kernels.memory_recall.triton_vector import memory_recall_vector_bwd_kernel, memory_recall_vector_fwd_kernel
from hmt_kernels.triton_launch import Launch, Target
from hmt_kernels.triton_tiles import column_tiles, has_aligned_rows, stride

NUM_STATS = triton_blocks.NUM_STATS.value
NUM_COUNTERS = triton_blocks.NUM_COUNTERS.value
GROUP = triton_blocks.GROUP.value


def plan_vector_forward(
    query: torch.Tensor,  # [B, 1, D]
    memory: torch.Tensor,  # [B, N, D]
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # recalled [B, 1 or T, D], lse [B, 1], slot [B, 1]
    new_memory: torch.Tensor | None,  # [B, D], of a step, which then writes recalled[:, 0] and recalled[:, -1]
    new_slot: int | torch.Tensor,
    config: Config,
    target: Target,
) -> Launch:
    batch, num_slots, dim = memory.shape
    recalled, lse, slot = outputs
    tiles = column_tiles(dim, VECTOR_SMALLEST)
    splits = num_splits(num_slots, batch, 1, config, memory.element_size(), target)
    arguments = {
        "query_ptr": query,
        "memory_ptr": memory,
        "num_valid_ptr": num_valid,
        "new_ptr": new_memory,
        "new_slot_ptr": new_slot if isinstance(new_slot, torch.Tensor) else None,
        "recalled_ptr": recalled,
        "lse_ptr": lse,
        "slot_ptr": slot,
        **_workspace(batch, splits, 1, sum(tiles), query.device, stats=True),
        "new_slot": new_slot if isinstance(new_slot, int) else 0,
        "num_slots": num_slots,
        "splits": splits,
        "softmax_scale": softmax_scale,
        "stride_qb": stride(query, 0),
        "stride_mb": stride(memory, 0),
        "stride_mn": stride(memory, 1),
        "stride_nb": 0 if new_memory is None else stride(new_memory, 0),
        "stride_ob": stride(recalled, 0),
        "last_row": (recalled.shape[1] - 1) * stride(recalled, 1),
        **_constants(dim, tiles, config, splits, memory, recalled),
    }
    return Launch(memory_recall_vector_fwd_kernel, batch * splits, arguments, config.num_warps)


def plan_vector_backward(
    d_recalled: torch.Tensor,  # [B, 1, D]
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    recalled: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    gradients: tuple[torch.Tensor, torch.Tensor],
    config: Config,
    target: Target,
) -> Launch:
    batch, num_slots, dim = memory.shape
    tiles = column_tiles(dim, VECTOR_SMALLEST)
    splits = num_splits(num_slots, batch, 1, config, memory.element_size(), target)
    arguments = {
        "query_ptr": query,
        "memory_ptr": memory,
        "num_valid_ptr": num_valid,
        "recalled_ptr": recalled,
        "lse_ptr": lse,
        "d_recalled_ptr": d_recalled,
        "d_lse_ptr": d_lse,
        "d_query_ptr": gradients[0],
        "d_memory_ptr": gradients[1],
        **_workspace(batch, splits, 1, sum(tiles), query.device, stats=False),
        "num_slots": num_slots,
        "splits": splits,
        "softmax_scale": softmax_scale,
        "stride_qb": stride(query, 0),
        "stride_mb": stride(memory, 0),
        "stride_mn": stride(memory, 1),
        "stride_dob": stride(d_recalled, 0),
        **_constants(dim, tiles, config, splits, memory),
    }
    return Launch(memory_recall_vector_bwd_kernel, batch * splits, arguments, config.num_warps)


def plan_matrix_forward(
    query: torch.Tensor,  # [B, Q, D]
    memory: torch.Tensor,  # [B, N, D]
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    config: Config,
    target: Target,
) -> Launch:
    batch, num_slots, dim = memory.shape
    num_queries = query.shape[1]
    slices, width = column_slices(dim, config.max_slice)
    tiles = column_tiles(width, MATRIX_SMALLEST)
    blocks = batch * -(-num_queries // BLOCK_Q) * slices
    splits = num_splits(num_slots, blocks, BLOCK_Q, config, memory.element_size(), target)
    recalled, lse, slot = outputs
    arguments = {
        "query_ptr": query,
        "memory_ptr": memory,
        "num_valid_ptr": num_valid,
        "recalled_ptr": recalled,
        "lse_ptr": lse,
        "slot_ptr": slot,
        **_workspace(blocks, splits, BLOCK_Q, sum(tiles), query.device, stats=True),
        "num_queries": num_queries,
        "num_slots": num_slots,
        "dim": dim,
        "splits": splits,
        "slices": slices,
        "softmax_scale": softmax_scale,
        "stride_qb": stride(query, 0),
        "stride_qq": stride(query, 1),
        "stride_mb": stride(memory, 0),
        "stride_mn": stride(memory, 1),
        **_constants(dim, tiles, config, splits, memory),
        "SLICE": width,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_D": config.block_d,
    }
    return Launch(memory_recall_matrix_fwd_kernel, blocks * splits, arguments, config.num_warps)


def plan_matrix_backward(
    first_query: int,  # of the BLOCK_Q queries of this launch
    d_recalled: torch.Tensor,  # [B, Q, D]
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    recalled: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    gradients: tuple[torch.Tensor, torch.Tensor],
    config: Config,
    target: Target,
) -> Launch:
    batch, num_slots, dim = memory.shape
    slices, width = column_slices(dim, config.max_slice)
    tiles = column_tiles(width, MATRIX_SMALLEST)
    splits = num_splits(num_slots, batch * slices, BLOCK_Q, config, memory.element_size(), target)
    arguments = {
        "query_ptr": query,
        "memory_ptr": memory,
        "num_valid_ptr": num_valid,
        "recalled_ptr": recalled,
        "lse_ptr": lse,
        "d_recalled_ptr": d_recalled,
        "d_lse_ptr": d_lse,
        "d_query_ptr": gradients[0],
        "d_memory_ptr": gradients[1],
        **_workspace(batch * slices, splits, BLOCK_Q, sum(tiles), query.device, stats=False),
        "first_query": first_query,
        "num_queries": query.shape[1],
        "num_slots": num_slots,
        "dim": dim,
        "splits": splits,
        "slices": slices,
        "add_to_d_memory": int(first_query > 0),
        "softmax_scale": softmax_scale,
        "stride_qb": stride(query, 0),
        "stride_qq": stride(query, 1),
        "stride_mb": stride(memory, 0),
        "stride_mn": stride(memory, 1),
        "stride_dob": stride(d_recalled, 0),
        "stride_doq": stride(d_recalled, 1),
        **_constants(dim, tiles, config, splits, memory),
        "SLICE": width,
        "BLOCK_Q": BLOCK_Q,
        "BLOCK_D": config.block_d,
    }
    return Launch(memory_recall_matrix_bwd_kernel, batch * slices * splits, arguments, config.num_warps)


def column_slices(dim: int, max_slice: int) -> tuple[int, int]:
    """Into how many equal slices, multiples of 16, the columns are cut."""
    slices = -(-dim // max_slice)
    return slices, -(-dim // (16 * slices)) * 16


def _constants(dim: int, tiles: tuple[int, int], config: Config, splits: int, *tensors: torch.Tensor) -> dict[str, Any]:
    return {
        "D": dim,
        "D0": tiles[0],
        "D1": tiles[1],
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "ALIGN": 8 if all(has_aligned_rows(tensor) for tensor in tensors) else 1,
        "SPLIT": splits > 1,
    }


def _workspace(
    blocks: int, splits: int, rows: int, width: int, device: torch.device, stats: bool
) -> dict[str, torch.Tensor | None]:
    """Room for the partial results of the splits and of their groups, and the counters; nothing without a split."""
    names = ("partial_ptr", "stats_ptr", "counter_ptr") if stats else ("partial_ptr", "counter_ptr")
    if splits == 1:
        return dict.fromkeys(names)
    partials = blocks * (splits + -(-splits // GROUP)) * rows
    workspace: dict[str, torch.Tensor | None] = {
        "partial_ptr": torch.empty(partials * width, dtype=torch.float32, device=device),
        "counter_ptr": zeroed_counters(blocks * NUM_COUNTERS, device),
    }
    if stats:
        workspace["stats_ptr"] = torch.empty(partials * NUM_STATS, dtype=torch.float32, device=device)
    return workspace
