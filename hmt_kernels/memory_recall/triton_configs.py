"""Tile sizes, warps, pipeline stages and splits of the Triton kernels of memory_recall: small tables, or autotuning."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.testing

from hmt_kernels.triton_launch import Target
from hmt_kernels.triton_tiles import SHARED_MEMORY, column_tiles

AUTOTUNE_VARIABLE = "HMT_KERNELS_AUTOTUNE"
BLOCK_Q = 16  # queries per tile: the rows of one tensor-core instruction
MAX_SPLITS = 512  # a power of two, above twice the multiprocessors of any GPU


class Config(NamedTuple):
    block_n: int  # slots per tile
    num_warps: int
    num_stages: int
    block_d: int = 0  # matrix kernels: columns per step of the scores
    max_slice: int = 0  # matrix kernels: columns of values that one block accumulates


class VectorRow(NamedTuple):
    direction: str
    max_width: int  # of the first column tile (column_tiles)
    few_blocks: bool  # for grids that leave most of the GPU idle: larger blocks
    tile: int  # elements
    num_warps: int
    num_stages: int  # at most; as many as the shared memory holds


# The first row that matches. A thread holds 32 elements of a tile: with more it spills.
VECTOR_TABLE = (
    VectorRow("forward", 1024, False, 4096, 4, 4),
    VectorRow("forward", 4096, True, 16384, 16, 4),
    VectorRow("forward", 8192, False, 8192, 8, 4),
    VectorRow("backward", 1024, False, 4096, 4, 3),
    VectorRow("backward", 8192, False, 8192, 8, 3),
)

# By direction and element size, for D <= 128 and above. Float32 takes three tensor-core products, so smaller slices.
MATRIX_TABLE = {
    ("forward", 2): (Config(32, 4, 3, 64, 128), Config(32, 8, 3, 128, 1024)),
    ("forward", 4): (Config(32, 4, 3, 64, 128), Config(16, 8, 3, 64, 512)),
    ("backward", 2): (Config(16, 4, 3, 64, 128), Config(32, 8, 3, 128, 1024)),
    ("backward", 4): (Config(16, 4, 3, 32, 128), Config(16, 4, 3, 32, 256)),
}
VECTOR_SMALLEST, MATRIX_SMALLEST = 8, 64  # column tiles: narrower ones would not give every thread 16 bytes

_tuned: dict[tuple[object, ...], Config] = {}


def vector_config(direction: str, memory: torch.Tensor, target: Target) -> Config:
    """The tile sizes for one query per row of memory [B, N, D]."""
    batch, num_slots, dim = memory.shape
    element_size = memory.element_size()
    width, second = column_tiles(dim, VECTOR_SMALLEST)
    few_blocks = batch * _useful_splits(num_slots, element_size, rows=1) <= target.multiprocessors
    few_blocks = few_blocks and second == 0 and element_size == 2  # the others would spill
    for row in VECTOR_TABLE:
        if row.direction == direction and width <= row.max_width and row.few_blocks in (False, few_blocks):
            break
    block_n = max(1, row.tile // width)
    tile_size = block_n * (width + second) * element_size
    most_stages = row.num_stages - (element_size == 4)  # of tiles twice as large
    return Config(block_n, row.num_warps, min(most_stages, SHARED_MEMORY.get(target.arch, 99) * 1024 // tile_size))


def matrix_config(direction: str, memory: torch.Tensor) -> Config:
    """The tile sizes for several queries per row of memory [B, N, D]."""
    narrow, wide = MATRIX_TABLE[direction, memory.element_size()]
    return narrow if memory.shape[2] <= 128 else wide


def num_splits(num_slots: int, blocks: int, rows: int, config: Config, element_size: int, target: Target) -> int:
    """Into how many parts the slots are split: enough to fill the GPU twice, as far as it pays."""
    tiles = math.ceil(num_slots / config.block_n)
    wanted = 2 * target.multiprocessors // max(blocks, 1)
    return max(1, min(tiles, wanted, _useful_splits(num_slots, element_size, rows), MAX_SPLITS))


def _useful_splits(num_slots: int, element_size: int, rows: int) -> int:
    # S splits leave S * rows * 4 bytes per column, written and read again: at most half of what the queue itself has.
    return max(1, num_slots * element_size // (8 * rows))


def chosen(key: tuple[object, ...], default: Config, launch: Callable[[Config], object], interpreted: bool) -> Config:
    """The tabulated config, or with HMT_KERNELS_AUTOTUNE=1 the fastest of its neighbours, measured once per key.

    `launch(config)` has to be repeatable. Raises RuntimeError when autotuning is asked for in the interpreter.
    """
    if os.environ.get(AUTOTUNE_VARIABLE, "0") != "1":
        return default
    if interpreted:
        raise RuntimeError(f"{AUTOTUNE_VARIABLE}=1 measures on a GPU and cannot run in Triton's interpreter")
    if key not in _tuned:
        if torch.cuda.is_current_stream_capturing():
            return default  # nothing can be timed here
        _tuned[key] = min(neighbours(default), key=lambda config: _time(launch, config))
    return _tuned[key]


def neighbours(config: Config) -> list[Config]:
    """The configs that autotuning tries, the tabulated one first."""
    found = [config]
    for block_n in (config.block_n // 2, config.block_n, config.block_n * 2):
        for num_warps in (config.num_warps // 2, config.num_warps, config.num_warps * 2):
            for num_stages in range(2, 5):
                candidate = config._replace(block_n=block_n, num_warps=num_warps, num_stages=num_stages)
                smallest = 16 if config.block_d else 1
                if block_n >= smallest and 1 <= num_warps <= 16 and candidate not in found:
                    found.append(candidate)
    return found


def _time(launch: Callable[[Config], object], config: Config) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(config), warmup=5, rep=20)
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
        return math.inf
