"""What the audit compiles: for every kernel family the launches that cover its configurations, on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.costs import Cost
from hmt_kernels.memory_recall import triton_configs
from hmt_kernels.memory_recall.triton_plans import (
    BLOCK_D,
    BLOCK_S,
    plan_matrix_backward,
    plan_matrix_forward,
    plan_vector_backward,
    plan_vector_forward,
)
from hmt_kernels.triton_launch import Launch, Target

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


class Case(NamedTuple):
    label: str
    target: Target
    launch: Launch
    cost: Cost
    elements: int  # that all turns of the main loop work on: elements of memory, or scores
    elements_per_turn: int
    element_size: int
    tensor_cores: bool = False  # whether it has to use the instructions of its architecture's own
    short_loads: int = 0  # of one number a row, that the loops may hold
    hot_spills: int = 0  # that the loops may hold, because no other tiles were as fast on a GPU


def targets() -> list[Target]:
    return [Target(arch, multiprocessors) for arch, multiprocessors in MULTIPROCESSORS.items()]


def recall_cases(target: Target, every_shape: bool, device: str = "meta") -> Iterator[Case]:
    """Every row of the tables of memory_recall, with one and with two column tiles, for 2-byte and 4-byte elements.

    float16 has the code of bfloat16 but for the conversions; kernels that do not split lack only the reduction.
    """
    widths = [1 << power for power in range(3, 14)]
    every_dim = [
        dim for width in widths for dim in (width, width * 5 // 4, width * 3 // 2) if dim % 8 == 0 and dim <= 8192
    ]
    for dtype, vector_dims, matrix_dims in (
        (torch.bfloat16, (64, 576, 1024, 1536, 2560, 4096, 8192), (8, 128, 320, 576, 1024, 4096)),
        (torch.float32, (64, 576, 2560, 8192), (64, 576, 4096)),
    ):
        for direction in ("forward", "backward"):
            for dim in every_dim if every_shape else vector_dims:
                yield recall_case(direction, 64, 1, dim, dtype, target, device=device)
            for dim in every_dim if every_shape else matrix_dims:
                yield recall_case(direction, 1, 16, dim, dtype, target, device=device)
    for dim in (2048, 4096) if every_shape else (4096,):
        yield recall_case("forward", 1, 1, dim, torch.bfloat16, target, slots=300, device=device)
    for direction, queries in (("forward", 1), ("forward", 16), ("backward", 1), ("backward", 16)):
        for dim in (576, 4096):
            yield recall_case(direction, 1, queries, dim, torch.bfloat16, target, device=device, reduction=True)


def recall_case(
    direction: str,
    batch: int,
    queries: int,
    dim: int,
    dtype: torch.dtype,
    target: Target,
    slots: int = 8192,
    device: str = "meta",
    reduction: bool = False,
) -> Case:
    """A launch of one problem, the reduction of its splits or the one before; forward, one query takes the step."""
    query = torch.zeros(batch, queries, dim, dtype=dtype, device=device)
    memory = torch.zeros(batch, slots, dim, dtype=dtype, device=device)
    lse = torch.zeros(batch, queries, device=device)
    counts = torch.full((batch,), slots, dtype=torch.int32, device=device)
    inputs = (query, memory, counts)
    if queries == 1:
        config = triton_configs.vector_config(direction, memory, target)
    else:
        config = triton_configs.matrix_config(direction, memory)
    results = (torch.zeros_like(query), lse, torch.zeros_like(lse, dtype=torch.int32))
    gradients = (torch.zeros_like(query), torch.zeros_like(memory) if direction == "backward" else memory)
    slot_index = torch.zeros_like(counts)
    plan = {
        ("forward", True): partial(plan_vector_forward, *inputs, 1.0, results, query[:, 0], slot_index),
        ("forward", False): partial(plan_matrix_forward, *inputs, 1.0, results),
        ("backward", True): partial(plan_vector_backward, query, lse, *inputs, query, lse, 1.0, gradients),
        ("backward", False): partial(plan_matrix_backward, 0, query, lse, *inputs, query, lse, 1.0, gradients),
    }[direction, queries == 1]
    label = f"recall {direction} B{batch} "
    label += f"Q{queries} " if queries > 1 else ""
    label += f"D{dim} {str(dtype).removeprefix('torch.')} "
    launch, *after = plan(config=config, target=target)
    if reduction:
        (launch,) = after
        partials = launch.arguments["partial_ptr"].numel()
        cost = Cost(4 * partials, 2 * partials)
        return Case(label + "reduction", target, launch, cost, partials, BLOCK_S * BLOCK_D, 4, short_loads=8)
    return Case(
        label + f"tile {config.block_n}x{config.num_stages}",
        target,
        launch,
        recall_cost(direction, batch, queries, slots, dim, dtype.itemsize),
        elements=batch * slots * dim,
        elements_per_turn=config.block_n * dim,
        element_size=dtype.itemsize,
    )


def recall_cost(direction: str, batch: int, queries: int, slots: int, dim: int, element_size: int) -> Cost:
    """Forward two products, the queue read once; backward five, the queue read and its gradient written once."""
    products, queues, rows = (2, 1, 2) if direction == "forward" else (5, 2, 4)
    nbytes = batch * dim * (queues * slots + rows * queries) * element_size
    return Cost(nbytes, 2 * products * batch * queries * slots * dim)
