"""memory_recall for several queries per batch row: BLOCK_Q of them share every tile of memory through tensor cores.

The scores need all D columns of a tile, [BLOCK_Q, D] accumulators do not fit a block's registers: a block goes over
all columns for the scores and then over its own slice of them for the values, while the tile is still in the cache.
`dim` is D again, as the bound of the loops over columns: the compiler would unroll them if it knew how short they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmt_kernels.memory_recall.triton_blocks import (
    ANY_ALIGNMENT,
    FLOOR,
    NO_SLOT,
    RUNTIME_SIZES,
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

PRECISION = tl.constexpr("tf32x3")  # of float32 products; one TF32 product alone would miss float32's accuracy


@triton.jit
def matmul(a, b, acc):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def add_matmul(acc, acc_weight, p, tile):
    """acc_weight * acc + p tile"""
    if tile.shape[1] == 1:
        return acc
    else:
        return matmul(p, tile, acc * acc_weight[:, None])


@triton.jit
def which_block(splits, slices, q_blocks):
    """(b, query block, split, slice, output block): blocks that read the same tile are neighbours."""
    slice_index = tl.program_id(0) % slices
    split = tl.program_id(0) // slices % splits
    q_block = tl.program_id(0) // slices // splits % q_blocks
    b = tl.program_id(0) // slices // splits // q_blocks
    return b.to(tl.int64), q_block, split, slice_index, ((b * q_blocks + q_block) * slices + slice_index).to(tl.int64)


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def memory_recall_matrix_fwd_kernel(
    query_ptr, memory_ptr, num_valid_ptr, recalled_ptr, lse_ptr, slot_ptr, partial_ptr, stats_ptr,
    num_queries: tl.int32, num_slots: tl.int32, dim: tl.int32, splits: tl.int32, slices: tl.int32, softmax_scale,
    stride_qb: tl.int64, stride_qq: tl.int64, stride_mb: tl.int64, stride_mn: tl.int64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SLICE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    q_blocks = tl.cdiv(num_queries, BLOCK_Q)
    b, q_block, split, slice_index, block = which_block(splits, slices, q_blocks)
    queries = q_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_ptr += tl.multiple_of(b * stride_qb, 8)
    query_offsets = tl.multiple_of(queries.to(tl.int64) * stride_qq, 8)
    memory_ptr += tl.multiple_of(b * stride_mb, ALIGN)
    first = slice_index * SLICE
    width = tl.multiple_of(tl.minimum(D - first, SLICE), 8)  # of this block's slice of the columns
    start, end = slot_range(split, splits, live_slots(num_valid_ptr, b, num_slots), BLOCK_N)

    m_i = tl.full([BLOCK_Q], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_Q], tl.float32)
    slot = tl.full([BLOCK_Q], NO_SLOT, tl.int32)
    acc0, acc1 = zero_tiles(BLOCK_Q, D0, D1)
    for n in range(start, end, BLOCK_N):
        slots = n + tl.arange(0, BLOCK_N)
        offsets = tl.multiple_of(slots.to(tl.int64) * stride_mn, ALIGN)
        s = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for d in tl.range(0, dim, BLOCK_D, num_stages=STAGES):
            u = load_tile(query_ptr + d, query_offsets, queries < num_queries, 0, BLOCK_D, D - d)
            tile = load_tile(memory_ptr + d, offsets, slots < end, 0, BLOCK_D, D - d)
            s = matmul(u, tl.trans(tile), s)
        s = tl.where((slots < end)[None, :], s * softmax_scale, FLOOR)
        tile_m = tl.max(s, axis=1)
        tile_slot = tl.min(tl.where(s == tile_m[:, None], slots[None, :], NO_SLOT), axis=1)
        slot = stronger_slot(m_i, slot, tile_m, tile_slot)
        m_new = tl.maximum(m_i, tile_m)
        old = exp(m_i - m_new)
        p = exp(s - m_new[:, None])
        l_i = l_i * old + tl.sum(p, axis=1)
        p = p.to(memory_ptr.dtype.element_ty)
        acc0 = add_matmul(acc0, old, p, load_tile(memory_ptr + first, offsets, slots < end, 0, D0, width))
        acc1 = add_matmul(acc1, old, p, load_tile(memory_ptr + first, offsets, slots < end, D0, D1, width))
        m_i = m_new

    if SPLIT:
        index = block * splits + split
        store_partial(partial_ptr, stats_ptr, index, acc0, acc1, m_i, l_i, slot, BLOCK_Q, D0, D1)
    else:
        divisor, lse, slot = finish(m_i, l_i, slot)
        rows = b * num_queries + queries
        inside = queries < num_queries
        store_tile(recalled_ptr + first, rows * D, inside, acc0 / divisor[:, None], 0, D0, width)
        store_tile(recalled_ptr + first, rows * D, inside, acc1 / divisor[:, None], D0, D1, width)
        if slice_index == 0:
            tl.store(lse_ptr + rows, lse, mask=inside)
            tl.store(slot_ptr + rows, slot, mask=inside)


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def memory_recall_matrix_bwd_kernel(
    query_ptr, memory_ptr, num_valid_ptr, recalled_ptr, lse_ptr, d_recalled_ptr, d_lse_ptr,
    d_query_ptr, d_memory_ptr, partial_ptr,
    first_query: tl.int32, num_queries: tl.int32, num_slots: tl.int32, dim: tl.int32, splits: tl.int32,
    slices: tl.int32, add_to_d_memory: tl.int32, softmax_scale,
    stride_qb: tl.int64, stride_qq: tl.int64, stride_mb: tl.int64, stride_mn: tl.int64,
    stride_dob: tl.int64, stride_doq: tl.int64,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SLICE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b, _, split, slice_index, block = which_block(splits, slices, 1)
    queries = first_query + tl.arange(0, BLOCK_Q)
    inside = queries < num_queries
    query_ptr += tl.multiple_of(b * stride_qb, 8)
    query_offsets = tl.multiple_of(queries.to(tl.int64) * stride_qq, 8)
    d_recalled_ptr += tl.multiple_of(b * stride_dob, 8)
    d_recalled_offsets = tl.multiple_of(queries.to(tl.int64) * stride_doq, 8)
    memory_ptr += tl.multiple_of(b * stride_mb, ALIGN)
    d_memory_ptr += b * num_slots * D
    rows = b * num_queries + queries

    delta = tl.zeros([BLOCK_Q], tl.float32)
    for d in tl.range(0, dim, BLOCK_D):
        o = load_tile(recalled_ptr + d, rows * D, inside, 0, BLOCK_D, D - d).to(tl.float32)
        do = load_tile(d_recalled_ptr + d, d_recalled_offsets, inside, 0, BLOCK_D, D - d).to(tl.float32)
        delta += tl.sum(o * do, axis=1)
    if d_lse_ptr is not None:
        delta -= tl.load(d_lse_ptr + rows, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)

    first = slice_index * SLICE
    width = tl.multiple_of(tl.minimum(D - first, SLICE), 8)  # of this block's slice of the columns
    num_live = live_slots(num_valid_ptr, b, num_slots)
    start, end = slot_range(split, splits, num_slots, BLOCK_N)  # dead slots too: their gradient has to be written
    acc0, acc1 = zero_tiles(BLOCK_Q, D0, D1)
    for n in range(start, end, BLOCK_N):
        slots = n + tl.arange(0, BLOCK_N)
        live = (slots < end) & (slots < num_live)
        offsets = tl.multiple_of(slots.to(tl.int64) * stride_mn, ALIGN)
        s = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        dp = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for d in tl.range(0, dim, BLOCK_D, num_stages=STAGES):
            u = load_tile(query_ptr + d, query_offsets, inside, 0, BLOCK_D, D - d)
            do = load_tile(d_recalled_ptr + d, d_recalled_offsets, inside, 0, BLOCK_D, D - d)
            tile = load_tile(memory_ptr + d, offsets, live, 0, BLOCK_D, D - d)
            s = matmul(u, tl.trans(tile), s)
            dp = matmul(do, tl.trans(tile), dp)
        mask = live[None, :] & inside[:, None]
        p = tl.where(mask, exp(s * softmax_scale - lse[:, None]), 0.0)
        ds = tl.where(mask, p * (dp - delta[:, None]), 0.0)
        p, ds = p.to(memory_ptr.dtype.element_ty), ds.to(memory_ptr.dtype.element_ty)

        one = tl.full([BLOCK_Q], 1.0, tl.float32)
        acc0 = add_matmul(acc0, one, ds, load_tile(memory_ptr + first, offsets, live, 0, D0, width))
        acc1 = add_matmul(acc1, one, ds, load_tile(memory_ptr + first, offsets, live, D0, D1, width))
        added = slots < tl.where(add_to_d_memory != 0, end, 0)  # to what earlier queries left in d_memory
        for d in tl.range(first, first + width, BLOCK_D, num_stages=STAGES):
            limit = first + width - d
            u = load_tile(query_ptr + d, query_offsets, inside, 0, BLOCK_D, limit)
            do = load_tile(d_recalled_ptr + d, d_recalled_offsets, inside, 0, BLOCK_D, limit)
            d_tile = matmul(tl.trans(ds), u, tl.zeros([BLOCK_N, BLOCK_D], tl.float32)) * softmax_scale
            d_tile = matmul(tl.trans(p), do, d_tile)
            d_tile += load_tile(d_memory_ptr + d, slots.to(tl.int64) * D, added, 0, BLOCK_D, limit)
            store_tile(d_memory_ptr + d, slots.to(tl.int64) * D, slots < end, d_tile, 0, BLOCK_D, limit)

    acc0, acc1 = acc0 * softmax_scale, acc1 * softmax_scale
    if SPLIT:
        store_sum(partial_ptr, block * splits + split, acc0, acc1, BLOCK_Q, D0, D1)
    else:
        store_tile(d_query_ptr + first, rows * D, inside, acc0, 0, D0, width)
        store_tile(d_query_ptr + first, rows * D, inside, acc1, D0, D1, width)
