"""Pieces of the recall kernels: tiles whose width is no power of two, partial results.

A row of D values is held as two tiles of power-of-two widths D0 and D1 (576 = 512 + 64). If one is enough, D1 = 0: the
second is then a single column of zeros, which no function here computes with.

A partial result is a row of values under a running softmax: the maximum m_i of its scores, the sum l_i of
exp(score - m_i), the slot of the maximum, and acc, the sum of exp(score - m_i) * value. m_i starts at a very low finite
number rather than at -inf, so that no difference of two maxima is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-2.3e38)  # times LOG2_E it is still finite
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NO_SLOT = tl.constexpr(1 << 24)  # a slot is kept as a float32 between blocks, which is exact up to here
NUM_STATS = tl.constexpr(3)  # m_i, l_i and slot

# Arguments that no kernel is compiled for: a queue that grows, or another batch, takes the kernel that is there.
RUNTIME_SIZES = (
    "num_queries", "num_slots", "dim", "splits", "slices", "q_blocks", "first_query", "add_to_d_memory",
    "new_slot", "last_row",
    "stride_qb", "stride_qq", "stride_mb", "stride_mn", "stride_nb", "stride_ob", "stride_dob", "stride_doq",
)  # fmt: skip
ANY_ALIGNMENT = ("num_valid_ptr", "new_slot_ptr", "d_lse_ptr")


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def load_tile(ptr, row_offsets, row_mask, START: tl.constexpr, WIDTH: tl.constexpr, limit):
    """Columns START to START + WIDTH of some rows [rows, WIDTH]; zeros in masked rows and from column `limit` on."""
    if WIDTH == 0:
        return tl.zeros([row_mask.shape[0], 1], ptr.dtype.element_ty)
    else:
        columns = START + tl.arange(0, WIDTH)
        mask = row_mask[:, None] & (columns < limit)[None, :]
        return tl.load(ptr + row_offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, row_offsets, row_mask, values, START: tl.constexpr, WIDTH: tl.constexpr, limit):
    if WIDTH > 0:
        columns = START + tl.arange(0, WIDTH)
        mask = row_mask[:, None] & (columns < limit)[None, :]
        tl.store(ptr + row_offsets[:, None] + columns[None, :], values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    return tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1 if D1 > 0 else 1], tl.float32)


@triton.jit
def add_weighted(acc, acc_weight, tile, tile_weight):
    """acc_weight * acc + tile_weight * tile, a weight for every row."""
    if tile.shape[1] == 1:
        return acc
    else:
        return acc * acc_weight[:, None] + tile.to(tl.float32) * tile_weight[:, None]


@triton.jit
def live_slots(num_valid_ptr, b, num_slots):
    """num_valid[b] brought within 0 .. num_slots; num_slots without a num_valid."""
    if num_valid_ptr is None:
        return num_slots
    else:
        return tl.minimum(tl.maximum(tl.load(num_valid_ptr + b), 0), num_slots)


@triton.jit
def slot_range(split, splits, count, BLOCK_N: tl.constexpr):
    """The slots of one split: whole tiles, shared out evenly."""
    length = tl.cdiv(tl.cdiv(count, splits), BLOCK_N) * BLOCK_N
    start = split * length
    return start, tl.minimum(start + length, count)


@triton.jit
def stronger_slot(m_i, slot, other_m, other_slot):
    """The slot of the larger score, the lower one on ties."""
    other_wins = (other_m > m_i) | ((other_m == m_i) & (other_slot < slot))
    return tl.where(other_wins, other_slot, slot)


@triton.jit
def finish(m_i, l_i, slot):
    """The divisor of acc, lse and slot of a whole result: 1, -inf, -1 without a live slot, NaN, NaN, -1 with NaN."""
    slot = tl.where(l_i > 0, slot, -1)
    none = l_i == 0
    l_i = tl.where(none, 1.0, l_i)
    return l_i, tl.where(none, float("-inf"), m_i + tl.log2(l_i) * LN_2), slot


@triton.jit
def store_partial(
    partial_ptr, stats_ptr, index, acc0, acc1, m_i, l_i, slot, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    rows = tl.arange(0, ROWS)
    store_sum(partial_ptr, index, acc0, acc1, ROWS, D0, D1)
    stats = stats_ptr + index * NUM_STATS * ROWS + rows
    tl.store(stats, m_i)
    tl.store(stats + ROWS, l_i)
    tl.store(stats + 2 * ROWS, slot.to(tl.float32))


@triton.jit
def store_sum(partial_ptr, index, acc0, acc1, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    rows = tl.arange(0, ROWS)
    offsets = (index * ROWS + rows).to(tl.int64) * (D0 + D1)
    store_tile(partial_ptr, offsets, rows < ROWS, acc0, 0, D0, D0)
    store_tile(partial_ptr, offsets, rows < ROWS, acc1, D0, D1, D0 + D1)
