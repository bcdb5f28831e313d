"""Tile sizes, warps, pipeline stages and splits of the Triton kernels of segment_attention: one small table."""

from __future__ import annotations

import math
from typing import NamedTuple

from hmt_kernels.triton_launch import Target
from hmt_kernels.triton_tiles import SHARED_MEMORY

SMALLEST_TILE = 32  # of columns: narrower ones would not give every thread 16 bytes
PREPARED_ROWS = 32  # per block of the pass that rotates
MAX_SPLITS = 64
MAX_PACKED_HEADS = 64  # query heads that one block decodes
MAX_DECODED_BYTES = 512  # of a row of features: float32 products of more would spill


class Config(NamedTuple):
    block_m: int  # queries per tile; for dkdv those of one step, for decode the heads of a group
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    block_d: int = 0  # features per step of a product; 0 for all


class Row(NamedTuple):
    direction: str  # forward, dkdv, dq, decode
    max_width: int  # of a row of features, in its tiles
    large: Config
    small: Config  # for grids that leave most of the GPU idle, and few queries


# By element size and generation (sm_8x and sm_12x have mma.sync, sm_9x wgmma, sm_10x tcgen05); the first row that fits.
# Float32 takes three tensor-core products, so smaller tiles. WGMMA's backward tiles of D = 64 and 128 are the fastest
# of 120 that an H100 has run (1 and 8 segments of 1,058 tokens), those of dkdv at 128 although they spill; the others
# are chosen by registers, and none of them spills in its loop.
MMA = (
    Row("forward", 64, Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
    Row("forward", 128, Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    Row("forward", 256, Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    Row("dkdv", 64, Config(32, 64, 4, 3), Config(32, 64, 4, 3)),
    Row("dkdv", 96, Config(32, 64, 4, 2, 32), Config(32, 64, 4, 2, 32)),
    Row("dkdv", 128, Config(32, 64, 8, 2), Config(32, 64, 8, 2)),
    Row("dkdv", 256, Config(16, 64, 8, 2), Config(16, 64, 8, 2)),
    Row("dq", 64, Config(128, 64, 8, 3), Config(64, 32, 4, 3)),
    Row("dq", 96, Config(64, 32, 4, 3), Config(64, 32, 4, 3)),
    Row("dq", 128, Config(64, 64, 8, 2), Config(64, 32, 4, 3)),
    Row("dq", 256, Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    Row("decode", 128, Config(16, 64, 4, 3), Config(16, 64, 4, 3)),
    Row("decode", 256, Config(16, 32, 4, 3), Config(16, 32, 4, 3)),
)
WGMMA = (
    Row("forward", 64, Config(128, 128, 8, 3), Config(64, 64, 4, 3)),
    Row("forward", 128, Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    Row("forward", 256, Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    Row("dkdv", 64, Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    Row("dkdv", 96, Config(32, 64, 4, 3), Config(32, 64, 4, 3)),
    Row("dkdv", 128, Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    Row("dkdv", 256, Config(32, 64, 8, 2, 64), Config(32, 64, 8, 2, 64)),
    Row("dq", 64, Config(64, 64, 4, 3), Config(64, 64, 4, 3)),
    Row("dq", 128, Config(64, 32, 4, 3), Config(64, 64, 4, 2)),
    Row("dq", 256, Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    Row("decode", 128, Config(16, 64, 4, 3), Config(16, 64, 4, 3)),
    Row("decode", 256, Config(16, 32, 4, 3), Config(16, 32, 4, 3)),
)
TCGEN05 = (
    Row("forward", 64, Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    Row("forward", 128, Config(128, 64, 8, 3), Config(64, 32, 4, 3)),
    Row("forward", 256, Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    Row("dkdv", 64, Config(64, 128, 8, 2), Config(64, 64, 4, 2)),
    Row("dkdv", 96, Config(64, 128, 8, 2), Config(64, 128, 8, 2)),
    Row("dkdv", 128, Config(64, 128, 8, 2), Config(32, 64, 4, 2)),
    Row("dkdv", 256, Config(32, 64, 8, 2), Config(32, 64, 8, 2)),
    Row("dq", 64, Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    Row("dq", 128, Config(128, 64, 8, 2), Config(64, 32, 4, 3)),
    Row("dq", 256, Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    Row("decode", 128, Config(16, 64, 4, 3), Config(16, 64, 4, 3)),
    Row("decode", 256, Config(16, 32, 4, 3), Config(16, 32, 4, 3)),
)
FLOAT32 = (
    Row("forward", 64, Config(64, 32, 4, 2, 32), Config(64, 32, 4, 2, 32)),
    Row("forward", 128, Config(64, 32, 8, 2, 32), Config(64, 32, 8, 2, 32)),
    Row("forward", 256, Config(32, 32, 8, 2, 32), Config(32, 32, 8, 2, 32)),
    Row("dkdv", 128, Config(32, 32, 8, 2, 32), Config(32, 32, 8, 2, 32)),
    Row("dkdv", 256, Config(16, 16, 8, 1, 64), Config(16, 16, 8, 1, 64)),
    Row("dq", 64, Config(32, 32, 4, 2, 32), Config(32, 32, 4, 2, 32)),
    Row("dq", 128, Config(32, 32, 8, 2, 32), Config(32, 32, 8, 2, 32)),
    Row("dq", 256, Config(16, 32, 8, 1, 64), Config(16, 32, 8, 1, 64)),
    Row("decode", 128, Config(16, 32, 4, 2), Config(16, 32, 4, 2)),
)
GENERATIONS = {8: MMA, 9: WGMMA, 10: TCGEN05, 12: MMA}


def decodes(q_len: int, group: int, width: int, element_size: int) -> bool:
    """Whether the kernel for one query takes this problem; the one for tiles of queries takes all."""
    return q_len == 1 and group <= MAX_PACKED_HEADS and width * element_size <= MAX_DECODED_BYTES


def tabulated(direction: str, width: int, element_size: int, rows: int, heads: int, target: Target) -> Config:
    """The tile sizes for `rows` queries (dkdv: keys) of each of `heads` heads, all batch rows together."""
    table = FLOAT32 if element_size == 4 else GENERATIONS.get(target.arch // 10, MMA)
    row = next(row for row in table if row.direction == direction and width <= row.max_width)
    tile = row.large.block_n if direction == "dkdv" else row.large.block_m
    few = rows <= tile // 2 or heads * math.ceil(rows / tile) < target.multiprocessors
    config = row.small if few else row.large
    return config._replace(num_stages=_fitting_stages(direction, config, width * element_size, target))


def _fitting_stages(direction: str, config: Config, row_bytes: int, target: Target) -> int:
    """As many of the stages as the shared memory of a block holds, should all tiles lie there."""
    resident = {"forward": config.block_m, "dkdv": 2 * config.block_n, "dq": 2 * config.block_m, "decode": 0}[direction]
    streamed = 2 * (config.block_m if direction == "dkdv" else config.block_n)
    room = SHARED_MEMORY.get(target.arch, 99) * 1024 - resident * row_bytes
    return max(1, min(config.num_stages, room // (streamed * row_bytes)))


def decode_splits(keys: int, blocks: int, group: int, config: Config, element_size: int, target: Target) -> int:
    """Into how many parts the keys are split: enough to fill the GPU twice, as far as it pays."""
    tiles = math.ceil(keys / config.block_n)
    wanted = 2 * target.multiprocessors // max(blocks, 1)
    # S splits read 2 * keys * element_size / S bytes per column each, the last block S * group * 4: least at this S.
    useful = math.isqrt(keys * element_size // (2 * group))
    return max(1, min(tiles, wanted, useful, MAX_SPLITS))


def head_splits(units: int, group: int, target: Target) -> int:
    """Into how many parts the `group` query heads of every tile of keys are split, where the tiles leave a GPU idle.

    On an H100 a split was worth it with 51 and 136 tiles in all, and not with 408.
    """
    if units >= 2 * target.multiprocessors:
        return 1
    wanted = math.ceil(4 * target.multiprocessors / max(units, 1))
    heads = math.ceil(group / min(group, wanted))
    return math.ceil(group / heads)
