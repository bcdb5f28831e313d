"""From tensors and a config to kernel launches: strides, workspace and compile-time constants, all by name.

Where the slots are split over blocks, a second launch reduces what those leave.
"""

from __future__ import annotations

from typing import Any

import torch

from hmt_kernels.memory_recall import triton_blocks
from hmt_kernels.memory_recall.triton_configs import (
    BLOCK_Q,
    MATRIX_SMALLEST,
    MAX_SPLITS,
    VECTOR_SMALLEST,
    Config,
    num_splits,
)
from hmt_kernels.memory_recall.triton_matrix import memory_recall_matrix_bwd_kernel, memory_recall_matrix_fwd_kernel
from hmt_kernels.memory_recall.triton_reduce import memory_recall_reduce_kernel
from hmt_kernels.memory_recall.triton_vector import memory_recall_vector_bwd_kernel, memory_recall_vector_fwd_kernel
from hmt_kernels.triton_launch import Launch, Target
from hmt_kernels.triton_tiles import column_tiles, has_aligned_rows, stride

NUM_STATS = triton_blocks.NUM_STATS.value
BLOCK_S, BLOCK_D, REDUCE_WARPS = 64, 32, 4  # of the reduction: splits and columns at a time


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
) -> list[Launch]:
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
    launch = Launch(memory_recall_vector_fwd_kernel, batch * splits, arguments, config.num_warps)
    return _with_reduction(launch, recalled, stride(recalled, 0))


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
) -> list[Launch]:
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
    launch = Launch(memory_recall_vector_bwd_kernel, batch * splits, arguments, config.num_warps)
    return _with_reduction(launch, gradients[0], dim)


def plan_matrix_forward(
    query: torch.Tensor,  # [B, Q, D]
    memory: torch.Tensor,  # [B, N, D]
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    config: Config,
    target: Target,
) -> list[Launch]:
    batch, num_slots, dim = memory.shape
    num_queries = query.shape[1]
    slices, width = column_slices(dim, config.max_slice)
    tiles = column_tiles(width, MATRIX_SMALLEST)
    q_blocks = -(-num_queries // BLOCK_Q)
    blocks = batch * q_blocks * slices
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
    launch = Launch(memory_recall_matrix_fwd_kernel, blocks * splits, arguments, config.num_warps)
    return _with_reduction(launch, recalled, num_queries * dim, q_blocks)


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
) -> list[Launch]:
    batch, num_slots, dim = memory.shape
    num_queries = query.shape[1]
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
        "num_queries": num_queries,
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
    launch = Launch(memory_recall_matrix_bwd_kernel, batch * slices * splits, arguments, config.num_warps)
    return _with_reduction(launch, gradients[0], num_queries * dim)


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
    units: int, splits: int, rows: int, width: int, device: torch.device, stats: bool
) -> dict[str, torch.Tensor | None]:
    """Room for the partial results of the splits; nothing without a split."""
    sizes = {"partial_ptr": units * splits * rows * width}
    if stats:
        sizes["stats_ptr"] = units * splits * rows * NUM_STATS
    return {
        name: torch.empty(size, dtype=torch.float32, device=device) if splits > 1 else None
        for name, size in sizes.items()
    }


def _with_reduction(launch: Launch, out: torch.Tensor, stride_ob: int, q_blocks: int = 1) -> list[Launch]:
    """This launch and, where it has splits, the one that reduces what they leave.

    `out` is what the first writes where it has no splits; its queries lie D elements apart.
    """
    split = launch.arguments
    if not split["SPLIT"]:
        return [launch]
    stats = split.get("stats_ptr")
    rows, columns = split.get("BLOCK_Q", 1), split.get("SLICE", split["D"])
    arguments = {
        "partial_ptr": split["partial_ptr"],
        "stats_ptr": stats,
        "out_ptr": out,
        "lse_ptr": None if stats is None else split["lse_ptr"],
        "slot_ptr": None if stats is None else split["slot_ptr"],
        "splits": split["splits"],
        "num_queries": split.get("num_queries", 1),
        "first_query": split.get("first_query", 0),
        "q_blocks": q_blocks,
        "slices": split.get("slices", 1),
        "stride_ob": stride_ob,
        "last_row": split.get("last_row", 0),
        "D": split["D"],
        "WIDTH": split["D0"] + split["D1"],
        "SLICE": columns,
        "ROWS": rows,
        "BLOCK_S": BLOCK_S,
        "BLOCK_D": BLOCK_D,
        "MOST_SPLITS": MAX_SPLITS,
        "ALIGN": split["ALIGN"],
    }
    units = launch.grid // split["splits"]
    return [launch, Launch(memory_recall_reduce_kernel, units * rows * -(-columns // BLOCK_D), arguments, REDUCE_WARPS)]
