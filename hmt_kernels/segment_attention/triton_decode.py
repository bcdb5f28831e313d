"""segment_attention for one query per batch row and head: the query heads that share keys form one tile.

Bound by reading keys and values once, so keys are rotated as they are loaded, and split over blocks; the last block to
finish combines the parts, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmt_kernels.segment_attention.triton_blocks import (
    ANY_ALIGNMENT,
    FLOOR,
    RUNTIME_SIZES,
    add_matmul,
    finish,
    hole_of,
    key_tiles,
    load_tile,
    load_turned,
    matmul,
    needs_mask,
    rows_times_rows,
    sees,
    softmax_step,
    store_tile,
    zero_tiles,
)
from hmt_kernels.triton_tiles import is_last


@triton.jit
def load_parts(
    ptr, rows, row_mask, stride, cos_ptr, sin_ptr, table_start, table_stride, D: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, TABLE_ALIGN: tl.constexpr,
):  # fmt: skip
    """The two tiles of some rows or, with a rotary embedding, their rotated halves and the features that it keeps."""
    if R > 0:
        first, second = load_turned(
            ptr, rows, row_mask, stride, cos_ptr, sin_ptr, table_start, table_stride, 1, R, HALF, TABLE_ALIGN
        )
        rest = load_tile(ptr, rows, row_mask, stride, R, REST, D)
        return first.to(rest.dtype), second.to(rest.dtype), rest
    else:
        first = load_tile(ptr, rows, row_mask, stride, 0, D0, D)
        return first, load_tile(ptr, rows, row_mask, stride, D0, D1, D), first


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def segment_attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, pad_span_ptr, o_ptr, lse_ptr, partial_ptr, stats_ptr, counter_ptr,
    q_heads: tl.int32, kv_heads: tl.int32, group: tl.int32, k_len: tl.int32, window_size: tl.int32, splits: tl.int32,
    scale: tl.float32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int32,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int32,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_cb: tl.int64, stride_ct: tl.int32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    WINDOW: tl.constexpr, HOLE: tl.constexpr, NEGATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, TABLE_ALIGN: tl.constexpr, SPLIT: tl.constexpr, EXP_UNIT: tl.constexpr,
):  # fmt: skip
    bkv, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    b, kv = bkv // kv_heads, bkv % kv_heads
    position = k_len - 1
    hole_start, hole_end = hole_of(pad_span_ptr, b, k_len)
    start, count, skip_from, skipped = key_tiles(
        position, position, hole_start, hole_end, window_size, WINDOW, HOLE, BLOCK_N
    )
    length = tl.cdiv(count, splits)

    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)  # rows are the query heads of the group
    inside = rows < group
    q_ptr += tl.multiple_of(b * stride_qb + kv * group * stride_qh, 8)
    table_start = tl.multiple_of(b * stride_cb, TABLE_ALIGN)
    table = table_start + tl.multiple_of(position.to(tl.int64) * stride_ct, TABLE_ALIGN)
    q0, q1, q2 = load_parts(
        q_ptr, rows, inside, stride_qh, cos_ptr, sin_ptr, table, 0, D, D0, D1, R, HALF, REST, TABLE_ALIGN
    )

    k_ptr += tl.multiple_of(b * stride_kb + kv * stride_kh, 8)
    v_ptr += tl.multiple_of(b * stride_vb + kv * stride_vh, 8)
    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc0, acc1 = zero_tiles(BLOCK_M, D0, D1)
    for i in tl.range(split * length, tl.minimum((split + 1) * length, count), num_stages=STAGES):
        n = start + (i + tl.where(i >= skip_from, skipped, 0)) * BLOCK_N
        exists = n + keys >= 0
        k_tile = k_ptr + tl.multiple_of(n.to(tl.int64) * stride_kt, 8)
        v_tile = v_ptr + tl.multiple_of(n.to(tl.int64) * stride_vt, 8)
        table = table_start + tl.multiple_of(n.to(tl.int64) * stride_ct, TABLE_ALIGN)
        k0, k1, k2 = load_parts(
            k_tile, keys, exists, stride_kt, cos_ptr, sin_ptr, table, stride_ct, D, D0, D1, R, HALF, REST, TABLE_ALIGN
        )
        s = rows_times_rows(q0, q1, k0, k1)
        if R > 0 and REST > 0:
            s = matmul(q2, tl.trans(k2), s)
        if NEGATIVE:
            s = -s
        if needs_mask(n, position, position, hole_start, hole_end, window_size, WINDOW, HOLE, BLOCK_N):
            visible = sees(position, n + keys, hole_start, hole_end, window_size, WINDOW, HOLE)
            s = tl.where(visible[None, :], s, float("-inf"))
        p, m_i, l_i, alpha = softmax_step(s, m_i, l_i, scale, EXP_UNIT)
        v0 = load_tile(v_tile, keys, exists, stride_vt, 0, D0, D)
        v1 = load_tile(v_tile, keys, exists, stride_vt, D0, D1, D)
        p = p.to(v0.dtype)
        acc0 = add_matmul(acc0 * alpha[:, None], p, v0)
        acc1 = add_matmul(acc1 * alpha[:, None], p, v1)

    done = split >= 0
    if SPLIT:
        WIDTH: tl.constexpr = D0 + D1
        partial_ptr += bkv * splits * BLOCK_M * WIDTH
        stats_ptr += bkv * splits * 2 * BLOCK_M
        part = partial_ptr + split * BLOCK_M * WIDTH
        store_tile(part, rows, inside, WIDTH, acc0, 0, D0, WIDTH)
        store_tile(part, rows, inside, WIDTH, acc1, D0, D1, WIDTH)
        tl.store(stats_ptr + split * 2 * BLOCK_M + rows, m_i)
        tl.store(stats_ptr + split * 2 * BLOCK_M + BLOCK_M + rows, l_i)
        done = is_last(counter_ptr + bkv, splits)
        if done:
            m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
            l_i = tl.zeros([BLOCK_M], tl.float32)
            acc0, acc1 = zero_tiles(BLOCK_M, D0, D1)
            for other in tl.range(0, splits, num_stages=2):
                stats = stats_ptr + other * 2 * BLOCK_M + rows
                part_m, part_l = tl.load(stats), tl.load(stats + BLOCK_M)
                m_new = tl.maximum(m_i, part_m)
                old, new = tl.exp2((m_i - m_new) * EXP_UNIT), tl.exp2((part_m - m_new) * EXP_UNIT)
                part = partial_ptr + other * BLOCK_M * WIDTH
                part0 = load_tile(part, rows, inside, WIDTH, 0, D0, WIDTH)
                acc0 = acc0 * old[:, None] + part0 * new[:, None]
                if D1 > 0:
                    part1 = load_tile(part, rows, inside, WIDTH, D0, D1, WIDTH)
                    acc1 = acc1 * old[:, None] + part1 * new[:, None]
                l_i = l_i * old + part_l * new
                m_i = m_new
    if done:
        o0, o1, lse = finish(acc0, acc1, m_i, l_i, EXP_UNIT)
        tl.store(lse_ptr + b * q_heads + kv * group + rows, lse, mask=inside)
        o_ptr += tl.multiple_of(b * stride_ob + kv * group * stride_oh, 8)
        store_tile(o_ptr, rows, inside, stride_oh, o0, 0, D0, D)
        store_tile(o_ptr, rows, inside, stride_oh, o1, D0, D1, D)
