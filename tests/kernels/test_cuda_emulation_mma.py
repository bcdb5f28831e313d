"""The emulated ldmatrix and mma against the fragments that the PTX ISA gives for ldmatrix.m8n8.x4 and mma.m16n8k16."""

from __future__ import annotations

import pytest
import torch


def a_place(lane, i):
    """Row and column of element a_i: i in 0..7, two in each register."""
    group, thread = lane // 4, lane % 4
    return (group if i in (0, 1, 4, 5) else group + 8), thread * 2 + i % 2 + (0 if i < 4 else 8)


def b_place(lane, i):
    group, thread = lane // 4, lane % 4
    return thread * 2 + i % 2 + (0 if i < 2 else 8), group


def c_place(lane, i):
    group, thread = lane // 4, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + i % 2


def fragments(matrix, place, count):
    """[32, count], in the matrix's dtype."""
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in range(32)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma_multiplies_fragments(dtype, emulated_module):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    lanes_a, lanes_b, lanes_c = fragments(a, a_place, 8), fragments(b, b_place, 4), fragments(c, c_place, 4)
    pointers = (lanes_a.data_ptr(), lanes_b.data_ptr(), lanes_c.data_ptr())
    emulated_module.mma(*pointers, dtype == torch.bfloat16)
    expected = fragments(c.double() + a.double() @ b.double(), c_place, 4)
    torch.testing.assert_close(lanes_c.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_ldmatrix_deals_out_four_matrices(transposed, emulated_module):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)  # lane l brings row l % 8 of matrix l / 8
    result = torch.zeros(32, 4, 2, dtype=torch.int16)
    emulated_module.ldmatrix(matrices.data_ptr(), result.data_ptr(), transposed)
    dealt = matrices.mT if transposed else matrices
    for lane in range(32):
        for i in range(4):
            pair = dealt[i, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert torch.equal(result[lane, i], pair)
