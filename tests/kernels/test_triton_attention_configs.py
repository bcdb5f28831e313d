"""Tile sizes and splits of segment_attention in Triton: plain functions, checked over all sizes."""

from __future__ import annotations

import pytest

from hmt_kernels.segment_attention import triton_configs as configs
from hmt_kernels.triton_launch import Target
from hmt_kernels.triton_tiles import SHARED_MEMORY, column_tiles

H100 = Target(90, 132)


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_head_dimension_has_a_config_that_fits(arch, element_size):
    for dim in range(8, 257, 8):
        width = sum(column_tiles(dim, configs.SMALLEST_TILE))
        for direction in ("forward", "dkdv", "dq"):
            for heads in (1, 1000):
                config = configs.tabulated(direction, width, element_size, 1058, heads, Target(arch, 132))
                resident, streamed = {
                    "forward": (config.block_m, 2 * config.block_n),
                    "dkdv": (2 * config.block_n, 2 * config.block_m),
                    "dq": (2 * config.block_m, 2 * config.block_n),
                }[direction]
                if config.block_d:  # tiles are not held, but read as they are needed
                    continue
                rows = resident + config.num_stages * streamed
                assert rows * width * element_size <= SHARED_MEMORY[arch] * 1024
        assert configs.decodes(1, 4, width, element_size) == (width * element_size <= 512)


def test_few_queries_or_heads_take_the_small_tiles():
    large = configs.tabulated("forward", 128, 2, 1058, 32, H100)
    small = configs.tabulated("forward", 128, 2, 1058, 9, H100)
    assert (large.block_m, small.block_m) == (128, 64)
    assert configs.tabulated("forward", 128, 2, 64, 1000, H100) == small
    assert configs.tabulated("forward", 128, 2, 65, 1000, H100) == large


def test_one_query_of_several_heads_is_decoded():
    assert configs.decodes(1, 64, 128, 2)
    assert not configs.decodes(2, 1, 128, 2)
    assert not configs.decodes(1, 65, 128, 2)


def test_splits_fill_the_gpu_but_stay_within_reason():
    config = configs.Config(16, 64, 4, 3)
    splits = [configs.decode_splits(keys, 1, 1, config, 2, H100) for keys in (1, 64, 65, 1058, 100_000)]
    assert splits == [1, 1, 2, 17, configs.MAX_SPLITS]
    assert configs.decode_splits(100_000, 64, 1, config, 2, H100) == 4  # a large batch fills it alone
    assert configs.decode_splits(1058, 1, 16, config, 2, H100) == 8  # what the last block has to read


def test_heads_are_split_where_keys_are_few():
    """Evenly, no further than to one head each, and not where all tiles of keys fill the GPU by themselves."""
    assert configs.head_splits(51, 3, H100) == 3
    assert configs.head_splits(51, 1, H100) == 1
    assert configs.head_splits(136, 4, H100) == 4
    assert configs.head_splits(200, 8, H100) == 3  # 3, 3 and 2 heads
    assert configs.head_splits(264, 8, H100) == 1
    assert configs.head_splits(0, 4, H100) == 4
