"""The second launch of a recall whose slots were split over blocks: the splits' partial results become one.

Every block takes a few columns of one row of all splits, so that the whole GPU reads what the whole GPU has written.
When the last block to finish reduced alone, an H100 took 17 us for N = 300, D = 4096, a queue that it reads in one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmt_kernels.memory_recall.triton_blocks import FLOOR, NO_SLOT, NUM_STATS, RUNTIME_SIZES, exp, finish


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def memory_recall_reduce_kernel(
    partial_ptr, stats_ptr, out_ptr, lse_ptr, slot_ptr, splits: tl.int32, num_queries: tl.int32, first_query: tl.int32,
    q_blocks: tl.int32, slices: tl.int32, stride_ob: tl.int64, last_row: tl.int64,
    D: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, MOST_SPLITS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out [B, Q, D] of partials [units, splits, ROWS, WIDTH]; a unit is a slice of columns of ROWS queries of one b.

    With stats the partials are values under a running softmax, without them plain sums; always added in one order: the
    same bits in every run.
    """
    blocks: tl.constexpr = (SLICE + BLOCK_D - 1) // BLOCK_D
    column_block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks % ROWS
    unit = (tl.program_id(0) // (blocks * ROWS)).to(tl.int64)
    b, q_block, slice_index = unit // (q_blocks * slices), unit // slices % q_blocks, unit % slices
    query = first_query + q_block * ROWS + row
    if query < num_queries:
        offset = unit * splits * ROWS
        m_max = FLOOR
        if stats_ptr is not None:
            all_splits = tl.arange(0, MOST_SPLITS)
            stats = stats_ptr + offset * NUM_STATS + row + all_splits * (NUM_STATS * ROWS)
            m_i = tl.load(stats, mask=all_splits < splits, other=FLOOR)
            l_i = tl.load(stats + ROWS, mask=all_splits < splits, other=0.0)
            slot = tl.load(stats + 2 * ROWS, mask=all_splits < splits, other=NO_SLOT).to(tl.int32)
            m_max = tl.max(m_i, axis=0)
            l_i = tl.sum(l_i * exp(m_i - m_max), axis=0)
            slot = tl.min(tl.where(m_i == m_max, slot, NO_SLOT), axis=0)

        columns = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_D], tl.float32)
        for first in tl.range(0, splits, BLOCK_S, num_stages=2):
            some = first + tl.arange(0, BLOCK_S)
            offsets = ((offset + some * ROWS + row) * WIDTH)[:, None] + columns[None, :]
            mask = (some < splits)[:, None] & (columns < WIDTH)[None, :]
            tile = tl.load(partial_ptr + offsets, mask=mask, other=0.0)
            if stats_ptr is not None:
                maxima = stats_ptr + offset * NUM_STATS + row + some * (NUM_STATS * ROWS)
                tile *= exp(tl.load(maxima, mask=some < splits, other=FLOOR) - m_max)[:, None]
            acc += tl.sum(tile, axis=0)

        if stats_ptr is not None:
            divisor, lse, slot = finish(m_max, l_i, slot)
            acc /= divisor
            if column_block == 0 and slice_index == 0:
                tl.store(lse_ptr + b * num_queries + query, lse)
                tl.store(slot_ptr + b * num_queries + query, slot)
        inside = (columns < SLICE) & (slice_index * SLICE + columns < D)
        out_ptr += tl.multiple_of(b * stride_ob, ALIGN) + query * D + slice_index * SLICE
        tl.store(out_ptr + columns, acc.to(out_ptr.dtype.element_ty), mask=inside)
        if last_row > 0:
            out_ptr += tl.multiple_of(last_row, ALIGN)
            tl.store(out_ptr + columns, acc.to(out_ptr.dtype.element_ty), mask=inside)
