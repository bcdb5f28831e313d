"""What the audit compiles: for every kernel family the launches that cover its configurations, on meta tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from hmt_kernels.memory_recall import triton_configs, triton_plans
from hmt_kernels.triton_launch import Launch, Target

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


class Case(NamedTuple):
    label: str
    target: Target
    launch: Launch


def targets() -> list[Target]:
    return [Target(arch, multiprocessors) for arch, multiprocessors in MULTIPROCESSORS.items()]


def recall_cases(target: Target) -> Iterator[Case]:
    """Every row of the tables of memory_recall, with one and with two column tiles, for 2-byte and 4-byte elements.

    float16 has the code of bfloat16 but for the conversions; kernels that do not split lack only the reduction.
    """
    for dtype, vector_dims, matrix_dims in (
        (torch.bfloat16, (64, 576, 1024, 2560, 4096, 8192), (8, 128, 576, 1024, 4096)),
        (torch.float32, (64, 576, 2560, 8192), (64, 576, 4096)),
    ):
        for dim in vector_dims:
            yield _vector_case("forward", 64, dim, dtype, target)
            yield _vector_case("backward", 64, dim, dtype, target)
        yield _vector_case("forward", 1, 4096, dtype, target)
        for dim in matrix_dims:
            yield _matrix_case("forward", dim, dtype, target)
            yield _matrix_case("backward", dim, dtype, target)


def _vector_case(direction: str, batch: int, dim: int, dtype: torch.dtype, target: Target) -> Case:
    query, memory, outputs, num_valid = _tensors(batch, 1, dim, dtype)
    config = triton_configs.vector_config(direction, memory, target)
    if direction == "forward":
        step = (memory[:, 0], num_valid)  # the step is a recall that does more
        plan = partial(triton_plans.plan_vector_forward, query, memory, num_valid, 1.0, outputs, *step)
    else:
        inputs = (query, outputs[1], query, memory, num_valid, *outputs[:2], 1.0)
        plan = partial(triton_plans.plan_vector_backward, *inputs, (query, memory))
    label = _label(f"recall {direction} B{batch}", dim, dtype, config)
    return Case(label, target, plan(config=config, target=target))


def _matrix_case(direction: str, dim: int, dtype: torch.dtype, target: Target) -> Case:
    query, memory, outputs, num_valid = _tensors(1, 16, dim, dtype)
    config = triton_configs.matrix_config(direction, memory)
    if direction == "forward":
        plan = partial(triton_plans.plan_matrix_forward, query, memory, num_valid, 1.0, outputs)
    else:
        inputs = (query, outputs[1], query, memory, num_valid, *outputs[:2], 1.0)
        plan = partial(triton_plans.plan_matrix_backward, 0, *inputs, (query, memory))
    label = _label(f"recall {direction} Q16", dim, dtype, config)
    return Case(label, target, plan(config=config, target=target))


def _tensors(batch: int, queries: int, dim: int, dtype: torch.dtype):
    query = torch.empty(batch, queries, dim, dtype=dtype, device="meta")
    memory = torch.empty(batch, 8192, dim, dtype=dtype, device="meta")
    rows = torch.empty(batch, queries, device="meta")
    return query, memory, (query, rows, rows.int()), torch.empty(batch, dtype=torch.int32, device="meta")


def _label(name: str, dim: int, dtype: torch.dtype, config: triton_configs.Config) -> str:
    return f"{name} D{dim} {str(dtype).removeprefix('torch.')} tile {config.block_n}x{config.num_stages}"


# A new family of kernels adds its cases here.
FAMILIES = (recall_cases,)
