"""Tile sizes, warps, pipeline stages and splits of the Triton kernels of segment_attention: one small table."""

from __future__ import annotations

import math
from typing import NamedTuple

from hmt_kernels.triton_launch import Target

SMALLEST_TILE = 32  # of columns: narrower ones would not give every thread 16 bytes
PREPARED_ROWS = 32  # per block of the pass that rotates
MAX_SPLITS = 64
MAX_PACKED_HEADS = 64  # query heads that one block decodes


class Config(NamedTuple):
    block_m: int  # queries per tile; for dkdv those of one step, for decode the heads of a group
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    block_d: int = 0  # features per step of a product; 0 for all


class Row(NamedTuple):
    direction: str  # forward, dkdv, dq, decode
    max_width: int  # of a row of features, in its tiles
    element_size: int
    architectures: tuple[int, ...]  # the major ones
    large: Config
    small: Config  # for grids that leave most of the GPU idle, and few queries


TABLE = (
    Row("forward", 64, 2, (8, 9, 10, 12), Config(128, 64, 4, 3), Config(64, 64, 4, 3)),
    Row("forward", 128, 2, (8, 9, 10, 12), Config(128, 64, 8, 3), Config(64, 64, 4, 3)),
    Row("forward", 256, 2, (8, 9, 10, 12), Config(128, 64, 8, 2), Config(64, 32, 4, 2)),
    Row("forward", 256, 4, (8, 9, 10, 12), Config(64, 32, 4, 2, 32), Config(64, 32, 4, 2, 32)),
    Row("dkdv", 64, 2, (8, 9, 10, 12), Config(64, 128, 4, 2), Config(64, 64, 4, 2)),
    Row("dkdv", 128, 2, (8, 9, 10, 12), Config(64, 128, 8, 2), Config(64, 64, 4, 2)),
    Row("dkdv", 256, 2, (8, 9, 10, 12), Config(32, 64, 8, 2), Config(32, 64, 8, 2)),
    Row("dkdv", 256, 4, (8, 9, 10, 12), Config(32, 32, 4, 1, 32), Config(32, 32, 4, 1, 32)),
    Row("dq", 64, 2, (8, 9, 10, 12), Config(128, 64, 4, 2), Config(64, 64, 4, 2)),
    Row("dq", 128, 2, (8, 9, 10, 12), Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
    Row("dq", 256, 2, (8, 9, 10, 12), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    Row("dq", 256, 4, (8, 9, 10, 12), Config(32, 32, 4, 1, 32), Config(32, 32, 4, 1, 32)),
    Row("decode", 128, 2, (8, 9, 10, 12), Config(16, 128, 4, 3), Config(16, 64, 4, 3)),
    Row("decode", 256, 4, (8, 9, 10, 12), Config(16, 32, 4, 3), Config(16, 32, 4, 3)),
)


def tabulated(direction: str, width: int, element_size: int, rows: int, heads: int, target: Target) -> Config:
    """The tile sizes for `rows` queries (dkdv: keys) of each of `heads` heads, all batch rows together."""
    for row in TABLE:
        if (
            row.direction == direction
            and width <= row.max_width
            and element_size <= row.element_size
            and target.arch // 10 in row.architectures
        ):
            break
    tile = row.large.block_n if direction == "dkdv" else row.large.block_m
    few = rows <= tile // 2 or heads * math.ceil(rows / tile) < target.multiprocessors
    return row.small if few else row.large


def decode_splits(keys: int, blocks: int, group: int, config: Config, element_size: int, target: Target) -> int:
    """Into how many parts the keys are split: enough to fill the GPU twice, as far as it pays."""
    tiles = math.ceil(keys / config.block_n)
    wanted = 2 * target.multiprocessors // max(blocks, 1)
    # S splits read 2 * keys * element_size / S bytes per column each, the last block S * group * 4: least at this S.
    useful = math.isqrt(keys * element_size // (2 * group))
    return max(1, min(tiles, wanted, useful, MAX_SPLITS))
