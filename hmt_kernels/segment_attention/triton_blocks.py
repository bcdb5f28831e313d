"""Pieces of the attention kernels: tiles of rows, the rotary embedding, which keys a tile of queries sees.

A row of D features is held as two tiles of power-of-two widths D0 and D1 (80 = 64 + 16). If one is enough, D1 = 0: the
second is then a single column of zeros, which no function here computes with.

exp(x) = exp2(EXP_UNIT * scores): the scale of the scores contains log2(e), EXP_UNIT is 1, except for float32, where
log2(e) times a large score would round away what matters. The running maximum of a row starts at a very low finite
number rather than at -inf, so that no difference of two maxima is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e38)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
PRECISION = tl.constexpr("tf32x3")  # of float32 products; one TF32 product alone would miss float32's accuracy

# Arguments that no kernel is compiled for: another length, batch or number of heads takes the kernel that is there.
RUNTIME_SIZES = (
    "heads", "q_heads", "kv_heads", "group", "q_len", "k_len", "window_size", "splits", "k_blocks", "dim", "scale",
    "stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt", "stride_vb", "stride_vh", "stride_vt",
    "stride_ob", "stride_oh", "stride_ot", "stride_dob", "stride_doh", "stride_dot", "stride_dqb", "stride_dqh",
    "stride_dqt", "stride_dkb", "stride_dkh", "stride_dkt", "stride_dvb", "stride_dvh", "stride_dvt",
    "stride_cb", "stride_ct",
)  # fmt: skip
ANY_ALIGNMENT = ("pad_span_ptr", "lse_ptr", "dlse_ptr", "stats_ptr", "counter_ptr")


@triton.jit
def load_tile(ptr, rows, row_mask, stride, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Features START to START + WIDTH of some rows, [rows, WIDTH]; zeros in masked rows and beyond feature D."""
    if WIDTH == 0:
        return tl.zeros([row_mask.shape[0], 1], ptr.dtype.element_ty)
    else:
        columns = START + tl.arange(0, WIDTH)
        mask = row_mask[:, None]
        if START + WIDTH > D:
            mask = mask & (columns < D)[None, :]
        return tl.load(ptr + tl.multiple_of(rows * stride, 8)[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, rows, row_mask, stride, values, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    if WIDTH > 0:
        columns = START + tl.arange(0, WIDTH)
        mask = row_mask[:, None]
        if START + WIDTH > D:
            mask = mask & (columns < D)[None, :]
        tl.store(
            ptr + tl.multiple_of(rows * stride, 8)[:, None] + columns[None, :],
            values.to(ptr.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def load_turned(
    ptr, rows, row_mask, stride, cos_ptr, sin_ptr, table_start, table_stride, DIRECTION: tl.constexpr,
    R: tl.constexpr, HALF: tl.constexpr, TABLE_ALIGN: tl.constexpr,
):  # fmt: skip
    """The first R features of some rows, rotated (DIRECTION = 1) or rotated back (-1): two halves [rows, HALF] float32.

    HALF is a power of two, at least R / 2; zeros beyond that. The tables are read up to R / 2: the rest repeats that.
    """
    columns = tl.arange(0, HALF)
    mask = row_mask[:, None]
    if R // 2 < HALF:
        mask = mask & (columns < R // 2)[None, :]
    pointers = ptr + tl.multiple_of(rows * stride, 8)[:, None] + columns[None, :]
    table = table_start + tl.multiple_of(rows * table_stride, TABLE_ALIGN)[:, None] + columns[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0).to(tl.float32) * DIRECTION
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + R // 2, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def turn_rows(
    from_ptr, from_stride, to_ptr, to_stride, first_row, length, cos_ptr, sin_ptr, table_start, table_stride,
    DIRECTION: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, TABLE_ALIGN: tl.constexpr,
):  # fmt: skip
    """ROWS rows of memory, of which those outside 0 .. length are left out, rotated to elsewhere or back in place."""
    CHUNK: tl.constexpr = ROWS if ROWS * HALF <= 8192 else 8192 // HALF  # what the registers hold
    for start in tl.static_range(0, ROWS, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        inside = (first_row + rows >= 0) & (first_row + rows < length)
        first, second = load_turned(
            from_ptr, rows, inside, from_stride, cos_ptr, sin_ptr, table_start, table_stride,
            DIRECTION, R, HALF, TABLE_ALIGN,
        )  # fmt: skip
        if DIRECTION < 0:
            tl.debug_barrier()  # all threads have read
        elif REST > 0:
            rest = load_tile(from_ptr, rows, inside, from_stride, R, REST, D)
            store_tile(to_ptr, rows, inside, to_stride, rest, R, REST, D)
        store_tile(to_ptr, rows, inside, to_stride, first, 0, HALF, R // 2)
        store_tile(to_ptr, rows, inside, to_stride, second, R // 2, HALF, R)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    return tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1 if D1 > 0 else 1], tl.float32)


@triton.jit
def matmul(a, b, acc):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rows_times_rows(a0, a1, b0, b1):
    """a b^T over all features."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if a1.shape[1] > 1:
        s = matmul(a1, tl.trans(b1), s)
    return s


@triton.jit
def product_by_chunks(
    a_ptr, a_rows, a_mask, a_stride, b_ptr, b_rows, b_mask, b_stride, dim, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """a b^T with BLOCK_D features at a time, read as they are needed: for float32, whose tiles no registers hold.

    `dim` is D again, as the bound of the loop: the compiler would unroll it if it knew how short it is.
    """
    columns = tl.arange(0, BLOCK_D)
    a_pointers = a_ptr + tl.multiple_of(a_rows * a_stride, 8)[:, None] + columns[None, :]
    b_pointers = b_ptr + tl.multiple_of(b_rows * b_stride, 8)[:, None] + columns[None, :]
    s = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for d in tl.range(0, dim, BLOCK_D, num_stages=2):
        exists = (columns < D - d)[None, :]
        a = tl.load(a_pointers + d, mask=a_mask[:, None] & exists, other=0.0)
        b = tl.load(b_pointers + d, mask=b_mask[:, None] & exists, other=0.0)
        s = matmul(a, tl.trans(b), s)
    return s


@triton.jit
def add_matmul(acc, p, tile):
    if tile.shape[1] == 1:
        return acc
    else:
        return matmul(p, tile, acc)


@triton.jit
def hole_of(pad_span_ptr, b, k_len):
    """The half-open range of keys hidden from batch row b, within 0 .. k_len; start >= end hides none."""
    if pad_span_ptr is None:
        return k_len, k_len
    else:
        start, end = tl.load(pad_span_ptr + 2 * b), tl.load(pad_span_ptr + 2 * b + 1)
        return tl.minimum(tl.maximum(start, 0), k_len), tl.minimum(tl.maximum(end, 0), k_len)


@triton.jit
def key_tiles(
    first_position, last_position, hole_start, hole_end, window_size,
    WINDOW: tl.constexpr, HOLE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tiles of keys that queries at first_position to last_position see: (start, count, skip_from, skipped).

    Tile i of `count` starts at key start + BLOCK_N * (i, or from i = skip_from on i + skipped): the tiles that lie
    wholly in the hole are left out. The last tile ends with the last query's own key; so the first may start before
    key 0.
    """
    lowest = last_position * 0
    if WINDOW:
        lowest = tl.maximum(first_position - window_size + 1, 0)
    end = last_position + 1
    count = tl.cdiv(end - lowest, BLOCK_N)
    start = end - count * BLOCK_N
    skip_from, skipped = count, count * 0
    if HOLE:
        # A hole that starts with the lowest key also hides what lies before that in the first tile.
        from_key = tl.where(hole_start <= lowest, start, hole_start)
        skip_from = tl.minimum(tl.cdiv(from_key - start, BLOCK_N), count)
        skip_end = tl.maximum(tl.minimum(hole_end, end) - start, 0) // BLOCK_N
        skipped = tl.maximum(skip_end - skip_from, 0)
    return start, count - skipped, skip_from, skipped


@triton.jit
def needs_mask(
    key, first_position, last_position, hole_start, hole_end, window_size,
    WINDOW: tl.constexpr, HOLE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether some query of the tile does not see some of the keys `key` to key + BLOCK_N."""
    masked = (key + BLOCK_N - 1 > first_position) | (key < 0)
    if WINDOW:
        masked = masked | (key <= last_position - window_size)
    if HOLE:
        masked = masked | ((key < hole_end) & (key + BLOCK_N > hole_start))
    return masked


@triton.jit
def sees(positions, keys, hole_start, hole_end, window_size, WINDOW: tl.constexpr, HOLE: tl.constexpr):
    """Which queries see which keys; positions and keys broadcast."""
    visible = (keys <= positions) & (keys >= 0)
    if WINDOW:
        visible = visible & (keys > positions - window_size)
    if HOLE:
        visible = visible & ((keys < hole_start) | (keys >= hole_end))
    return visible


@triton.jit
def softmax_step(s, m_i, l_i, scale, EXP_UNIT: tl.constexpr):
    """p and the new maximum, sum and factor of what was accumulated so far; s = -inf for unseen keys, scale > 0."""
    m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale)
    p = tl.exp2((s * scale - m_new[:, None]) * EXP_UNIT)
    alpha = tl.exp2((m_i - m_new) * EXP_UNIT)
    return p, m_new, l_i * alpha + tl.sum(p, axis=1), alpha


@triton.jit
def finish(acc0, acc1, m_i, l_i, EXP_UNIT: tl.constexpr):
    """o0, o1 and lse of rows; zeros and -inf where they saw no key, or none with a score above -inf."""
    none = l_i == 0
    l_i = tl.where(none, 1.0, l_i)
    lse = tl.where(none, float("-inf"), m_i * (EXP_UNIT * LN_2) + tl.log2(l_i) * LN_2)
    inverse = 1.0 / l_i
    return acc0 * inverse[:, None], acc1 * inverse[:, None], lse
