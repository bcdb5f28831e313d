"""Tile sizes, splits and autotuning of memory_recall in Triton: plain functions, checked over all sizes."""

from __future__ import annotations

import pytest
import torch

from hmt_kernels.memory_recall import triton as implementation
from hmt_kernels.memory_recall import triton_configs as configs
from hmt_kernels.memory_recall.triton_plans import column_slices
from hmt_kernels.triton_launch import Target

DIMS = range(8, 8193, 8)
H100 = Target(90, 132)


@pytest.mark.parametrize("smallest", [8, 64])
def test_column_tiles_leave_at_most_a_quarter_empty(smallest):
    for dim in DIMS:
        first, second = configs.column_tiles(dim, smallest)
        assert first & (first - 1) == 0 and second & (second - 1) == 0
        assert dim <= first + second
        if dim >= 4 * smallest:
            assert first + second - dim <= 0.25 * (first + second), dim


def test_common_widths():
    assert configs.column_tiles(576, 8) == (512, 128)
    assert configs.column_tiles(960, 8) == (1024, 0)
    assert configs.column_tiles(1536, 8) == (1024, 512)
    assert configs.column_tiles(2560, 8) == (2048, 512)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", configs.SHARED_MEMORY)
def test_every_size_has_a_config_that_fits(arch, dtype):
    for dim in DIMS:
        for batch, slots in ((1, 300), (64, 8192)):
            memory = torch.empty(batch, slots, dim, dtype=dtype, device="meta")
            for direction in ("forward", "backward"):
                config = configs.vector_config(direction, memory, Target(arch, 132))
                assert config.block_n & (config.block_n - 1) == 0
                tile_size = config.block_n * sum(configs.column_tiles(dim, 8)) * dtype.itemsize
                assert config.num_stages * tile_size <= configs.SHARED_MEMORY[arch] * 1024
                slices, width = column_slices(dim, configs.matrix_config(direction, memory).max_slice)
                assert slices * width >= dim and width % 16 == 0


def test_splits_fill_the_gpu_but_stay_within_reason():
    config = configs.Config(block_n=4, num_warps=8, num_stages=3)
    splits = [configs.num_splits(slots, 1, 1, config, 2, H100) for slots in (0, 1, 300, 8192, 65536)]
    assert splits == [1, 1, 75, 264, 264]
    assert configs.num_splits(300, 1, configs.BLOCK_Q, config, 2, H100) == 4  # what a split leaves is 16 times as much
    assert configs.num_splits(300, 1000, 1, config, 2, H100) == 1  # a large batch fills it alone
    assert configs.num_splits(300, 64, 1, config, 2, H100) == 4
    assert configs.num_splits(65536, 1, 1, config, 4, Target(90, 1000)) == configs.MAX_SPLITS


def test_autotuning_is_refused_in_the_interpreter(monkeypatch):
    if not implementation.INTERPRETED:
        pytest.skip("a GPU is used")
    monkeypatch.setenv("HMT_KERNELS_AUTOTUNE", "1")
    with pytest.raises(RuntimeError, match="HMT_KERNELS_AUTOTUNE=1 measures on a GPU"):
        implementation.forward(torch.randn(1, 1, 8), torch.randn(1, 3, 8), None, 1.0)


def test_autotuning_takes_the_fastest_and_measures_once(monkeypatch):
    monkeypatch.setenv("HMT_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(configs, "_tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    measured = []

    def time(launch, config):
        launch(config)
        return abs(config.block_n - 8) + abs(config.num_warps - 4) + config.num_stages

    monkeypatch.setattr(configs, "_time", time)
    default = configs.Config(block_n=4, num_warps=8, num_stages=3)
    for _ in range(2):
        best = configs.chosen(("key",), default, measured.append, interpreted=False)
        assert best == configs.Config(block_n=8, num_warps=4, num_stages=2)
    assert measured[0] == default and len(measured) == len(set(measured)) == len(configs.neighbours(default))
    assert configs.chosen(("other",), default, measured.append, interpreted=False) == best
    monkeypatch.delenv("HMT_KERNELS_AUTOTUNE")
    assert configs.chosen(("key",), default, measured.append, interpreted=False) == default
