"""segment_attention backward in two kernels that add up in a fixed order: dk and dv by tiles of keys, dq of queries.

Where keys are few, the query heads that share them are split over blocks, the last of which adds up what all leave.

q and k are rotated already, and probabilities come from the log-sum-exp of the rows (segment_attention_prepare_kernel).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hmt_kernels.segment_attention.triton_blocks import (
    ANY_ALIGNMENT,
    RUNTIME_SIZES,
    add_matmul,
    hole_of,
    key_tiles,
    load_tile,
    needs_mask,
    product_by_chunks,
    rows_times_rows,
    sees,
    store_tile,
    turn_rows,
    zero_tiles,
)
from hmt_kernels.triton_tiles import is_last


@triton.jit
def store_sums(ptr, keys, dk0, dk1, dv0, dv1, D0: tl.constexpr, D1: tl.constexpr):
    """What one split of the heads adds to dk and dv of a tile of keys."""
    WIDTH: tl.constexpr = D0 + D1
    every = keys >= 0
    store_tile(ptr, keys, every, WIDTH, dk0, 0, D0, WIDTH)
    store_tile(ptr, keys, every, WIDTH, dk1, D0, D1, WIDTH)
    ptr += keys.shape[0] * WIDTH
    store_tile(ptr, keys, every, WIDTH, dv0, 0, D0, WIDTH)
    store_tile(ptr, keys, every, WIDTH, dv1, D0, D1, WIDTH)


@triton.jit
def total_sums(ptr, keys, splits, D0: tl.constexpr, D1: tl.constexpr):
    """dk and dv of a tile of keys, always added up in this order: the same bits in every run."""
    WIDTH: tl.constexpr = D0 + D1
    every = keys >= 0
    dk0, dk1 = zero_tiles(keys.shape[0], D0, D1)
    dv0, dv1 = zero_tiles(keys.shape[0], D0, D1)
    for _ in range(splits):
        dk0 += load_tile(ptr, keys, every, WIDTH, 0, D0, WIDTH)
        dk1 += load_tile(ptr, keys, every, WIDTH, D0, D1, WIDTH)
        ptr += keys.shape[0] * WIDTH
        dv0 += load_tile(ptr, keys, every, WIDTH, 0, D0, WIDTH)
        dv1 += load_tile(ptr, keys, every, WIDTH, D0, D1, WIDTH)
        ptr += keys.shape[0] * WIDTH
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def segment_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, pad_span_ptr, do_ptr, stats_ptr, dk_ptr, dv_ptr, partial_ptr, counter_ptr,
    heads: tl.int32, q_heads: tl.int32, kv_heads: tl.int32, group: tl.int32, q_len: tl.int32, k_len: tl.int32,
    splits: tl.int32, window_size: tl.int32, dim: tl.int32, scale: tl.float32, exp_scale: tl.float32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int32,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int32,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int32,
    stride_dob: tl.int64, stride_doh: tl.int64, stride_dot: tl.int32,
    stride_dkb: tl.int64, stride_dkh: tl.int64, stride_dkt: tl.int32,
    stride_dvb: tl.int64, stride_dvh: tl.int64, stride_dvt: tl.int32,
    stride_cb: tl.int64, stride_ct: tl.int32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    WINDOW: tl.constexpr, HOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, TABLE_ALIGN: tl.constexpr, EXP_UNIT: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    # The first keys, which the most rows see, first; the last tile, perhaps short, is seen by the fewest.
    unit, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    kv_total = tl.num_programs(0) // splits // tl.cdiv(k_len, BLOCK_N)
    bkv, n = unit % kv_total, unit // kv_total * BLOCK_N
    b, kv = (bkv // kv_heads).to(tl.int64), (bkv % kv_heads).to(tl.int64)
    offset = k_len - q_len  # position of row 0
    last_key = tl.minimum(n + BLOCK_N, k_len) - 1
    hole_start, hole_end = hole_of(pad_span_ptr, b, k_len)
    first_row, end_row = tl.maximum(n - offset, 0), q_len
    if WINDOW:
        end_row = tl.minimum(end_row, last_key - offset + window_size)
    row_tiles = tl.cdiv(tl.maximum(end_row - first_row, 0), BLOCK_M)
    if HOLE:
        row_tiles = tl.where((hole_start <= n) & (last_key < hole_end), 0, row_tiles)

    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    exists = n + keys < k_len
    n64 = n.to(tl.int64)
    k_ptr += tl.multiple_of(b * stride_kb + kv * stride_kh + n64 * stride_kt, 8)
    v_ptr += tl.multiple_of(b * stride_vb + kv * stride_vh + n64 * stride_vt, 8)
    if BLOCK_D == 0:
        k0 = load_tile(k_ptr, keys, exists, stride_kt, 0, D0, D)
        k1 = load_tile(k_ptr, keys, exists, stride_kt, D0, D1, D)
        v0 = load_tile(v_ptr, keys, exists, stride_vt, 0, D0, D)
        v1 = load_tile(v_ptr, keys, exists, stride_vt, D0, D1, D)

    q_ptr += tl.multiple_of(b * stride_qb + kv * group * stride_qh, 8)
    do_ptr += tl.multiple_of(b * stride_dob + kv * group * stride_doh, 8)
    stats_ptr += (b * q_heads + kv * group) * q_len
    num_stats = heads.to(tl.int64) * q_len
    dk0, dk1 = zero_tiles(BLOCK_N, D0, D1)
    dv0, dv1 = zero_tiles(BLOCK_N, D0, D1)
    # One loop over the split's query heads and their tiles: a loop in a loop would fill its pipeline every time.
    heads_per_split = tl.cdiv(group, splits)
    first_head, end_head = split * heads_per_split, tl.minimum((split + 1) * heads_per_split, group)
    for i in tl.range(first_head * row_tiles, end_head * row_tiles, num_stages=STAGES):
        head, m = (i // row_tiles).to(tl.int64), first_row + i % row_tiles * BLOCK_M
        inside = m + rows < q_len
        q_tile = q_ptr + tl.multiple_of(head * stride_qh + m.to(tl.int64) * stride_qt, 8)
        do_tile = do_ptr + tl.multiple_of(head * stride_doh + m.to(tl.int64) * stride_dot, 8)
        q0 = load_tile(q_tile, rows, inside, stride_qt, 0, D0, D)
        q1 = load_tile(q_tile, rows, inside, stride_qt, D0, D1, D)
        do0 = load_tile(do_tile, rows, inside, stride_dot, 0, D0, D)
        do1 = load_tile(do_tile, rows, inside, stride_dot, D0, D1, D)
        row = stats_ptr + head * q_len + m + rows
        if BLOCK_D == 0:
            s = rows_times_rows(k0, k1, q0, q1)  # [BLOCK_N, BLOCK_M]
            dp = rows_times_rows(v0, v1, do0, do1)
        else:
            s = product_by_chunks(k_ptr, keys, exists, stride_kt, q_tile, rows, inside, stride_qt, dim, D, BLOCK_D)
            dp = product_by_chunks(v_ptr, keys, exists, stride_vt, do_tile, rows, inside, stride_dot, dim, D, BLOCK_D)
        lse = tl.load(row, mask=inside, other=float("inf"))
        x = s * exp_scale - lse[None, :]
        if needs_mask(
            n, offset + m, offset + m + BLOCK_M - 1, hole_start, hole_end, window_size, WINDOW, HOLE, BLOCK_N
        ):
            positions = offset + m + rows
            visible = sees(positions[None, :], (n + keys)[:, None], hole_start, hole_end, window_size, WINDOW, HOLE)
            x = tl.where(visible, x, float("-inf"))
        p = tl.exp2(x * EXP_UNIT)
        delta = tl.load(row + num_stats, mask=inside, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q0.dtype)
        dv0 = add_matmul(dv0, p.to(do0.dtype), do0)
        dv1 = add_matmul(dv1, p.to(do0.dtype), do1)
        dk0 = add_matmul(dk0, ds, q0)
        dk1 = add_matmul(dk1, ds, q1)

    done = split >= 0
    if SPLIT:
        partial_ptr += unit.to(tl.int64) * splits * 2 * BLOCK_N * (D0 + D1)
        store_sums(partial_ptr + split * 2 * BLOCK_N * (D0 + D1), keys, dk0, dk1, dv0, dv1, D0, D1)
        done = is_last(counter_ptr + unit, splits)
        if done:
            dk0, dk1, dv0, dv1 = total_sums(partial_ptr, keys, splits, D0, D1)
    if done:
        dv_ptr += tl.multiple_of(b * stride_dvb + kv * stride_dvh + n64 * stride_dvt, 8)
        store_tile(dv_ptr, keys, exists, stride_dvt, dv0, 0, D0, D)
        store_tile(dv_ptr, keys, exists, stride_dvt, dv1, D0, D1, D)
        dk_ptr += tl.multiple_of(b * stride_dkb + kv * stride_dkh + n64 * stride_dkt, 8)
        store_tile(dk_ptr, keys, exists, stride_dkt, dk0 * scale, 0, D0, D)
        store_tile(dk_ptr, keys, exists, stride_dkt, dk1 * scale, D0, D1, D)
        if R > 0:
            tl.debug_barrier()  # each thread rotates back what others have stored
            table = tl.multiple_of(b * stride_cb + n64 * stride_ct, TABLE_ALIGN)
            turn_rows(
                dk_ptr, stride_dkt, dk_ptr, stride_dkt, n, k_len, cos_ptr, sin_ptr, table, stride_ct,
                -1, BLOCK_N, D, R, HALF, REST, TABLE_ALIGN,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_SIZES, do_not_specialize_on_alignment=ANY_ALIGNMENT)
def segment_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, pad_span_ptr, do_ptr, stats_ptr, dq_ptr,
    heads: tl.int32, q_heads: tl.int32, group: tl.int32, q_len: tl.int32, k_len: tl.int32,
    window_size: tl.int32, dim: tl.int32, scale: tl.float32, exp_scale: tl.float32,
    stride_qb: tl.int64, stride_qh: tl.int64, stride_qt: tl.int32,
    stride_kb: tl.int64, stride_kh: tl.int64, stride_kt: tl.int32,
    stride_vb: tl.int64, stride_vh: tl.int64, stride_vt: tl.int32,
    stride_dob: tl.int64, stride_doh: tl.int64, stride_dot: tl.int32,
    stride_dqb: tl.int64, stride_dqh: tl.int64, stride_dqt: tl.int32,
    stride_cb: tl.int64, stride_ct: tl.int32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    WINDOW: tl.constexpr, HOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr, TABLE_ALIGN: tl.constexpr, EXP_UNIT: tl.constexpr,
):  # fmt: skip
    # Tiles as in the forward kernel.
    bh = tl.program_id(0) % heads
    b, h = (bh // q_heads).to(tl.int64), bh % q_heads
    first_row = q_len - (tl.program_id(0) // heads + 1) * BLOCK_M
    offset = k_len - q_len
    first_position, last_position = offset + tl.maximum(first_row, 0), offset + first_row + BLOCK_M - 1
    hole_start, hole_end = hole_of(pad_span_ptr, b, k_len)
    start, count, skip_from, skipped = key_tiles(
        first_position, last_position, hole_start, hole_end, window_size, WINDOW, HOLE, BLOCK_N
    )

    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = first_row + rows >= 0
    row64, head64 = first_row.to(tl.int64), h.to(tl.int64)
    q_ptr += tl.multiple_of(b * stride_qb + head64 * stride_qh + row64 * stride_qt, 8)
    do_ptr += tl.multiple_of(b * stride_dob + head64 * stride_doh + row64 * stride_dot, 8)
    if BLOCK_D == 0:
        q0 = load_tile(q_ptr, rows, inside, stride_qt, 0, D0, D)
        q1 = load_tile(q_ptr, rows, inside, stride_qt, D0, D1, D)
        do0 = load_tile(do_ptr, rows, inside, stride_dot, 0, D0, D)
        do1 = load_tile(do_ptr, rows, inside, stride_dot, D0, D1, D)
    row = stats_ptr + bh.to(tl.int64) * q_len + first_row + rows
    lse = tl.load(row, mask=inside, other=float("inf"))
    delta = tl.load(row + heads.to(tl.int64) * q_len, mask=inside, other=0.0)

    kv = (h // group).to(tl.int64)
    k_ptr += tl.multiple_of(b * stride_kb + kv * stride_kh, 8)
    v_ptr += tl.multiple_of(b * stride_vb + kv * stride_vh, 8)
    dq0, dq1 = zero_tiles(BLOCK_M, D0, D1)
    for i in tl.range(0, count, num_stages=STAGES):
        n = start + (i + tl.where(i >= skip_from, skipped, 0)) * BLOCK_N
        exists = n + keys >= 0
        k_tile = k_ptr + tl.multiple_of(n.to(tl.int64) * stride_kt, 8)
        v_tile = v_ptr + tl.multiple_of(n.to(tl.int64) * stride_vt, 8)
        k0 = load_tile(k_tile, keys, exists, stride_kt, 0, D0, D)
        k1 = load_tile(k_tile, keys, exists, stride_kt, D0, D1, D)
        if BLOCK_D == 0:
            v0 = load_tile(v_tile, keys, exists, stride_vt, 0, D0, D)
            v1 = load_tile(v_tile, keys, exists, stride_vt, D0, D1, D)
            s = rows_times_rows(q0, q1, k0, k1)
            dp = rows_times_rows(do0, do1, v0, v1)
        else:
            s = product_by_chunks(q_ptr, rows, inside, stride_qt, k_tile, keys, exists, stride_kt, dim, D, BLOCK_D)
            dp = product_by_chunks(do_ptr, rows, inside, stride_dot, v_tile, keys, exists, stride_vt, dim, D, BLOCK_D)
        x = s * exp_scale - lse[:, None]
        if needs_mask(n, first_position, last_position, hole_start, hole_end, window_size, WINDOW, HOLE, BLOCK_N):
            positions = offset + first_row + rows
            visible = sees(positions[:, None], (n + keys)[None, :], hole_start, hole_end, window_size, WINDOW, HOLE)
            x = tl.where(visible, x, float("-inf"))
        p = tl.exp2(x * EXP_UNIT)
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = add_matmul(dq0, ds, k0)
        dq1 = add_matmul(dq1, ds, k1)

    dq_ptr += tl.multiple_of(b * stride_dqb + head64 * stride_dqh + row64 * stride_dqt, 8)
    store_tile(dq_ptr, rows, inside, stride_dqt, dq0 * scale, 0, D0, D)
    store_tile(dq_ptr, rows, inside, stride_dqt, dq1 * scale, D0, D1, D)
    if R > 0:
        tl.debug_barrier()  # each thread rotates back what others have stored
        table = tl.multiple_of(b * stride_cb + (row64 + offset) * stride_ct, TABLE_ALIGN)
        turn_rows(
            dq_ptr, stride_dqt, dq_ptr, stride_dqt, first_row, q_len, cos_ptr, sin_ptr, table, stride_ct,
            -1, BLOCK_M, D, R, HALF, REST, TABLE_ALIGN,
        )  # fmt: skip
