"""memory_recall for one query per batch row: every row of memory is read once and used twice, in vector arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl

from hmt_kernels.memory_recall.triton_blocks import (
    ANY_ALIGNMENT,
    FLOOR,
    NO_SLOT,
    RUNTIME_SIZES,
    add_weighted,
    exp,
    finish,
    live_slots,
    load_tile,
    slot_range,
    store_partial,
    store_sum,
    store_tile,
    stronger_slot,
    zero_tiles,
)


@triton.jit
def load_row(ptr, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr):
    """One row as float32, [1, D0] and [1, D1].

    Loaded as the only row of a tile, it is spread over the threads as the tiles of memory are: otherwise the compiler
    may spread those as suits the row, in short pieces.
    """
    offsets, first_row = tl.zeros([ROWS], tl.int32), tl.arange(0, ROWS) == 0
    tile0, tile1 = load_tile(ptr, offsets, first_row, 0, D0, D), load_tile(ptr, offsets, first_row, D0, D1, D)
    return only_row(tile0), only_row(tile1)


@triton.jit
def only_row(tile):
    return tl.sum(tile.to(tl.float32), axis=0, keep_dims=True)


@triton.jit
def store_row(ptr, row_mask, first, second, D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr):
    store_tile(ptr, tl.arange(0, 1), row_mask, first, 0, D0, D)
    store_tile(ptr, tl.arange(0, 1), row_mask, second, D0, D1, D)


@triton.jit
def dot_rows(tile0, tile1, row0, row1):
    """The product of every row of a tile with one row, [rows]."""
    sums = tl.sum(tile0.to(tl.float32) * row0, axis=1)
    if tile1.shape[1] == 1:
        return sums
    else:
        return sums + tl.sum(tile1.to(tl.float32) * row1, axis=1)


@triton.jit
def outer_sum(p, do, ds, u):
    return p[:, None] * do + ds[:, None] * u


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def memory_recall_vector_fwd_kernel(
    query_ptr, memory_ptr, num_valid_ptr, new_ptr, new_slot_ptr, recalled_ptr, lse_ptr, slot_ptr,
    partial_ptr, stats_ptr, new_slot: tl.int32, num_slots: tl.int32, splits: tl.int32, softmax_scale,
    stride_qb: tl.int64, stride_mb: tl.int64, stride_mn: tl.int64, stride_nb: tl.int64,
    stride_ob: tl.int64, last_row: tl.int64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    memory_ptr += tl.multiple_of(b * stride_mb, ALIGN)
    u0, u1 = load_row(query_ptr + tl.multiple_of(b * stride_qb, 8), BLOCK_N, D0, D1, D)
    num_live = live_slots(num_valid_ptr, b, num_slots)
    start, end = slot_range(split, splits, num_live, BLOCK_N)

    # Every row of the tile runs a softmax of its own, so that the loop has one reduction only, that of the scores.
    rows = tl.arange(0, BLOCK_N)
    m_i = tl.full([BLOCK_N], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_N], tl.float32)
    slot = tl.full([BLOCK_N], NO_SLOT, tl.int32)
    acc0, acc1 = zero_tiles(BLOCK_N, D0, D1)
    skipped = -1
    if new_ptr is not None:
        # The first split writes the new memory to its slot and recalls it from registers; nobody reads that slot.
        skipped = new_slot if new_slot_ptr is None else tl.load(new_slot_ptr + b)
        if split == 0:
            new0, new1 = load_row(new_ptr + tl.multiple_of(b * stride_nb, 8), BLOCK_N, D0, D1, D)
            new_row = skipped + tl.arange(0, 1)  # [1]
            inside = (new_row >= 0) & (new_row < num_slots)
            offset = tl.multiple_of(skipped.to(tl.int64) * stride_mn, ALIGN)
            store_row(memory_ptr + offset, inside, new0, new1, D0, D1, D)
            recalls = (skipped >= 0) & (skipped < num_live)
            taken = (rows == 0) & recalls
            m_i = tl.where(taken, dot_rows(new0, new1, u0, u1) * softmax_scale, m_i)
            l_i = tl.where(taken, 1.0, l_i)
            slot = tl.where(taken, skipped, slot)
            new0, new1 = tl.where(recalls, new0, 0.0), tl.where(recalls, new1, 0.0)  # a weight of 0 would leave NaN
            acc0, acc1 = add_weighted(acc0, l_i, new0, l_i), add_weighted(acc1, l_i, new1, l_i)

    for n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        live = (n + rows < end) & (n + rows != skipped)
        offsets = tl.multiple_of((n + rows).to(tl.int64) * stride_mn, ALIGN)
        tile0 = load_tile(memory_ptr, offsets, live, 0, D0, D)
        tile1 = load_tile(memory_ptr, offsets, live, D0, D1, D)
        s = tl.where(live, dot_rows(tile0, tile1, u0, u1) * softmax_scale, FLOOR)
        m_new = tl.maximum(m_i, s)
        old, p = exp(m_i - m_new), exp(s - m_new)
        slot = stronger_slot(m_i, slot, s, n + rows)
        l_i = l_i * old + p
        acc0, acc1 = add_weighted(acc0, old, tile0, p), add_weighted(acc1, old, tile1, p)
        m_i = m_new

    # The rows of the tile as one; a row that met no live slot has m_i = FLOOR, so weight 0 here or, later, its split.
    m_max = tl.max(m_i, axis=0, keep_dims=True)  # [1]
    weights = exp(m_i - m_max)
    slot = tl.min(tl.where(m_i == m_max, slot, NO_SLOT), axis=0, keep_dims=True)
    l_i = tl.sum(l_i * weights, axis=0, keep_dims=True)
    acc0 = tl.sum(acc0 * weights[:, None], axis=0, keep_dims=True)  # [1, D0]
    acc1 = tl.sum(acc1 * weights[:, None], axis=0, keep_dims=True)
    if SPLIT:
        store_partial(partial_ptr, stats_ptr, b * splits + split, acc0, acc1, m_max, l_i, slot, 1, D0, D1)
    else:
        divisor, lse, slot = finish(m_max, l_i, slot)
        recalled0, recalled1 = acc0 / divisor[:, None], acc1 / divisor[:, None]
        row = tl.arange(0, 1)
        tl.store(lse_ptr + b + row, lse)
        tl.store(slot_ptr + b + row, slot)
        recalled_ptr += tl.multiple_of(b * stride_ob, ALIGN)
        store_row(recalled_ptr, row < 1, recalled0, recalled1, D0, D1, D)
        if new_ptr is not None:
            store_row(recalled_ptr + tl.multiple_of(last_row, ALIGN), row < 1, recalled0, recalled1, D0, D1, D)


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def memory_recall_vector_bwd_kernel(
    query_ptr, memory_ptr, num_valid_ptr, recalled_ptr, lse_ptr, d_recalled_ptr, d_lse_ptr,
    d_query_ptr, d_memory_ptr, partial_ptr, num_slots: tl.int32, splits: tl.int32, softmax_scale,
    stride_qb: tl.int64, stride_mb: tl.int64, stride_mn: tl.int64, stride_dob: tl.int64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ALIGN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    memory_ptr += tl.multiple_of(b * stride_mb, ALIGN)
    d_memory_ptr += b * num_slots * D
    u0, u1 = load_row(query_ptr + tl.multiple_of(b * stride_qb, 8), BLOCK_N, D0, D1, D)
    do0, do1 = load_row(d_recalled_ptr + tl.multiple_of(b * stride_dob, 8), BLOCK_N, D0, D1, D)
    o0, o1 = load_row(recalled_ptr + b * D, BLOCK_N, D0, D1, D)
    delta = dot_rows(o0, o1, do0, do1)  # [1]
    d_lse = 0.0 if d_lse_ptr is None else tl.load(d_lse_ptr + b)
    lse = tl.load(lse_ptr + b)
    num_live = live_slots(num_valid_ptr, b, num_slots)
    start, end = slot_range(split, splits, num_slots, BLOCK_N)  # dead slots too: their gradient has to be written

    rows = tl.arange(0, BLOCK_N)
    excess = tl.zeros([BLOCK_N], tl.float32)  # sum of p (do . M - delta), which is zero but for rounding
    acc0, acc1 = zero_tiles(BLOCK_N, D0, D1)
    for n in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        live = (n + rows < end) & (n + rows < num_live)
        offsets = tl.multiple_of((n + rows).to(tl.int64) * stride_mn, ALIGN)
        tile0 = load_tile(memory_ptr, offsets, live, 0, D0, D)
        tile1 = load_tile(memory_ptr, offsets, live, D0, D1, D)
        p = tl.where(live, exp(dot_rows(tile0, tile1, u0, u1) * softmax_scale - lse), 0.0)
        difference = tl.where(live, dot_rows(tile0, tile1, do0, do1) - delta, 0.0)
        ds = tl.where(live, p * (difference + d_lse) * softmax_scale, 0.0)  # d_lse may not be finite
        excess += p * difference
        offsets = (n + rows).to(tl.int64) * D
        store_tile(d_memory_ptr, offsets, n + rows < end, outer_sum(p, do0, ds, u0), 0, D0, D)
        store_tile(d_memory_ptr, offsets, n + rows < end, outer_sum(p, do1, ds, u1), D0, D1, D)
        one = tl.full([BLOCK_N], 1.0, tl.float32)
        acc0, acc1 = add_weighted(acc0, one, tile0, ds), add_weighted(acc1, one, tile1, ds)

    # Memories that have much in common would show the excess in full: it is taken out along their mean, o.
    excess = tl.sum(excess, axis=0, keep_dims=True)[:, None] * softmax_scale
    o0, o1 = load_row(recalled_ptr + b * D, BLOCK_N, D0, D1, D)
    d_query0 = tl.sum(acc0, axis=0, keep_dims=True) - excess * o0
    d_query1 = tl.sum(acc1, axis=0, keep_dims=True) - excess * o1
    if SPLIT:
        store_sum(partial_ptr, b * splits + split, d_query0, d_query1, 1, D0, D1)
    else:
        store_row(d_query_ptr + b * D, tl.arange(0, 1) < 1, d_query0, d_query1, D0, D1, D)
