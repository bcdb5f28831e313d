"""segment_attention forward: tiles of queries against the tiles of keys they see; and the pass before it.

Keys are rotated once, in a pass before: as they are loaded, every tile of queries would rotate them again, from tables
as large as they are, and they could not go from memory to the tensor cores directly. Queries are rotated as loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmt_kernels.segment_attention.triton_blocks import (
    ANY_ALIGNMENT,
    FLOOR,
    LOG2_E,
    RUNTIME_SIZES,
    add_matmul,
    finish,
    hole_of,
    key_tiles,
    load_tile,
    needs_mask,
    product_by_chunks,
    rows_times_rows,
    sees,
    softmax_step,
    store_tile,
    turn_rows,
    zero_tiles,
)


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def segment_attention_prepare_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, rotated_q_ptr, rotated_k_ptr, stats_ptr,
    q_heads: tl.int32, kv_heads: tl.int32, heads: tl.int32, q_len: tl.int32, k_len: tl.int32, k_blocks: tl.int32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int32,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int32,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_ot: tl.int32,
    stride_dob: tl.int64, stride_doh: tl.int64, stride_dot: tl.int32,
    stride_cb: tl.int64, stride_ct: tl.int32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, TABLE_ALIGN: tl.constexpr, EXP_UNIT: tl.constexpr,
):  # fmt: skip
    """Row by row: the rotated keys; and, before a backward pass, rotated queries and both numbers of their softmax.

    stats[0] = lse in the unit of the scores, +inf for a row that sees no key: it gets no probabilities.
    stats[1] = do . o - dlse.
    """
    pid = tl.program_id(0)
    if pid < k_blocks:
        blocks = tl.cdiv(k_len, ROWS)
        bh, first = (pid // blocks).to(tl.int64), pid % blocks * ROWS
        b, h = bh // kv_heads, bh % kv_heads
        if rotated_k_ptr is not None:
            table = tl.multiple_of(b * stride_cb + first.to(tl.int64) * stride_ct, TABLE_ALIGN)
            turn_rows(
                k_ptr + tl.multiple_of(b * stride_kb + h * stride_kh + first.to(tl.int64) * stride_kt, 8), stride_kt,
                rotated_k_ptr + (bh * k_len + first) * D, D, first, k_len, cos_ptr, sin_ptr, table, stride_ct,
                1, ROWS, D, R, HALF, REST, TABLE_ALIGN,
            )  # fmt: skip
    elif stats_ptr is not None:
        blocks = tl.cdiv(q_len, ROWS)
        bh, first = ((pid - k_blocks) // blocks).to(tl.int64), (pid - k_blocks) % blocks * ROWS
        b, h = bh // q_heads, bh % q_heads
        rows, inside = tl.arange(0, ROWS), first + tl.arange(0, ROWS) < q_len
        start = first.to(tl.int64)
        o_ptr += tl.multiple_of(b * stride_ob + h * stride_oh + start * stride_ot, 8)
        do_ptr += tl.multiple_of(b * stride_dob + h * stride_doh + start * stride_dot, 8)
        delta = tl.zeros([ROWS], tl.float32)
        for column in tl.static_range(0, 2):
            o = load_tile(o_ptr, rows, inside, stride_ot, column * D0, D1 if column else D0, D)
            do = load_tile(do_ptr, rows, inside, stride_dot, column * D0, D1 if column else D0, D)
            delta += tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
        row = bh * q_len + first + rows
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + row, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0)
        some = lse != float("-inf")
        tl.store(stats_ptr + row, tl.where(some, lse * (LOG2_E / EXP_UNIT), float("inf")), mask=inside)
        # dlse may be anything where lse is -inf.
        tl.store(stats_ptr + heads.to(tl.int64) * q_len + row, tl.where(some, delta, 0.0), mask=inside)
        if R > 0:
            turn_rows(
                q_ptr + tl.multiple_of(b * stride_qb + h * stride_qh + start * stride_qt, 8), stride_qt,
                rotated_q_ptr + (bh * q_len + first) * D, D, first, q_len, cos_ptr, sin_ptr,
                tl.multiple_of(b * stride_cb + (start + k_len - q_len) * stride_ct, TABLE_ALIGN), stride_ct,
                1, ROWS, D, R, HALF, REST, TABLE_ALIGN,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def segment_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, pad_span_ptr, o_ptr, lse_ptr,
    heads: tl.int32, q_heads: tl.int32, group: tl.int32, q_len: tl.int32, k_len: tl.int32, window_size: tl.int32,
    dim: tl.int32, scale: tl.float32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int32,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int32,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int32,
    stride_ob: tl.int64, stride_oh: tl.int64, stride_ot: tl.int32,
    stride_cb: tl.int64, stride_ct: tl.int32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    WINDOW: tl.constexpr, HOLE: tl.constexpr, NEGATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, TABLE_ALIGN: tl.constexpr, EXP_UNIT: tl.constexpr,
):  # fmt: skip
    # The last rows, which see the most keys, first. Tiles are counted from the last row: the short one is the cheapest.
    bh = tl.program_id(0) % heads
    b, h = (bh // q_heads).to(tl.int64), bh % q_heads
    first_row = q_len - (tl.program_id(0) // heads + 1) * BLOCK_M
    offset = k_len - q_len  # position of row 0
    first_position, last_position = offset + tl.maximum(first_row, 0), offset + first_row + BLOCK_M - 1
    hole_start, hole_end = hole_of(pad_span_ptr, b, k_len)
    start, count, skip_from, skipped = key_tiles(
        first_position, last_position, hole_start, hole_end, window_size, WINDOW, HOLE, BLOCK_N
    )

    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = first_row + rows >= 0
    row64, head64 = first_row.to(tl.int64), h.to(tl.int64)
    q_ptr += tl.multiple_of(b * stride_qb + head64 * stride_qh + row64 * stride_qt, 8)
    o_ptr += tl.multiple_of(b * stride_ob + head64 * stride_oh + row64 * stride_ot, 8)
    if R > 0:
        # Through this block's own rows of o: the tensor cores take a tile from shared memory that was loaded as it is,
        # one that was computed from registers, which are what limits this kernel.
        table = tl.multiple_of(b * stride_cb + (row64 + offset) * stride_ct, TABLE_ALIGN)
        turn_rows(
            q_ptr, stride_qt, o_ptr, stride_ot, first_row, q_len, cos_ptr, sin_ptr, table, stride_ct,
            1, BLOCK_M, D, R, HALF, REST, TABLE_ALIGN,
        )  # fmt: skip
        tl.debug_barrier()
        q_ptr, stride_qt = o_ptr, stride_ot
    if BLOCK_D == 0:
        q0 = load_tile(q_ptr, rows, inside, stride_qt, 0, D0, D)
        q1 = load_tile(q_ptr, rows, inside, stride_qt, D0, D1, D)

    kv = (h // group).to(tl.int64)
    k_ptr += tl.multiple_of(b * stride_kb + kv * stride_kh, 8)
    v_ptr += tl.multiple_of(b * stride_vb + kv * stride_vh, 8)
    m_i = tl.full([BLOCK_M], FLOOR, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc0, acc1 = zero_tiles(BLOCK_M, D0, D1)
    for i in tl.range(0, count, num_stages=STAGES):
        n = start + (i + tl.where(i >= skip_from, skipped, 0)) * BLOCK_N
        exists = n + keys >= 0
        k_tile = k_ptr + tl.multiple_of(n.to(tl.int64) * stride_kt, 8)
        if BLOCK_D == 0:
            k0 = load_tile(k_tile, keys, exists, stride_kt, 0, D0, D)
            k1 = load_tile(k_tile, keys, exists, stride_kt, D0, D1, D)
            s = rows_times_rows(q0, q1, k0, k1)
        else:
            s = product_by_chunks(q_ptr, rows, inside, stride_qt, k_tile, keys, exists, stride_kt, dim, D, BLOCK_D)
        if NEGATIVE:
            s = -s
        if needs_mask(n, first_position, last_position, hole_start, hole_end, window_size, WINDOW, HOLE, BLOCK_N):
            positions = offset + first_row + rows
            visible = sees(positions[:, None], (n + keys)[None, :], hole_start, hole_end, window_size, WINDOW, HOLE)
            s = tl.where(visible, s, float("-inf"))
        p, m_i, l_i, alpha = softmax_step(s, m_i, l_i, scale, EXP_UNIT)
        v_tile = v_ptr + tl.multiple_of(n.to(tl.int64) * stride_vt, 8)
        v0 = load_tile(v_tile, keys, exists, stride_vt, 0, D0, D)
        v1 = load_tile(v_tile, keys, exists, stride_vt, D0, D1, D)
        p = p.to(v0.dtype)
        acc0 = add_matmul(acc0 * alpha[:, None], p, v0)
        acc1 = add_matmul(acc1 * alpha[:, None], p, v1)

    o0, o1, lse = finish(acc0, acc1, m_i, l_i, EXP_UNIT)
    tl.store(lse_ptr + bh.to(tl.int64) * q_len + first_row + rows, lse, mask=inside)
    store_tile(o_ptr, rows, inside, stride_ot, o0, 0, D0, D)
    store_tile(o_ptr, rows, inside, stride_ot, o1, D0, D1, D)
