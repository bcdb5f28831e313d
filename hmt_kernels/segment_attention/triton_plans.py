"""From tensors to a kernel launch of segment_attention: strides, workspace and compile-time constants, all by name."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton

from hmt_kernels.counters import zeroed_counters
from hmt_kernels.segment_attention.triton_backward import (
    segment_attention_bwd_dkdv_kernel,
    segment_attention_bwd_dq_kernel,
)
from hmt_kernels.segment_attention.triton_configs import (
    PREPARED_ROWS,
    SMALLEST_TILE,
    Config,
    decode_splits,
    head_splits,
    tabulated,
)
from hmt_kernels.segment_attention.triton_decode import segment_attention_decode_kernel
from hmt_kernels.segment_attention.triton_forward import segment_attention_fwd_kernel, segment_attention_prepare_kernel
from hmt_kernels.triton_launch import Launch, Target
from hmt_kernels.triton_tiles import column_tiles, stride, strides

LOG2_E = math.log2(math.e)
SMALLEST_SCALE = 1e-30  # for 0, under which a hidden key's -inf would become NaN


class Problem(NamedTuple):
    """What all kernels of one call have in common; tensors as triton.py prepares them."""

    q: torch.Tensor  # [B, Hq, Tq, D]
    k: torch.Tensor  # [B, Hkv, Tk, D]
    v: torch.Tensor
    cos: torch.Tensor | None  # [1 or B, Tk, R]
    sin: torch.Tensor | None
    pad_span: torch.Tensor | None  # [B, 2]
    window_size: int | None
    softmax_scale: float
    target: Target

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def tiles(self) -> tuple[int, int]:
        return column_tiles(self.q.shape[3], SMALLEST_TILE)


def plan_prepare(
    problem: Problem,
    rotated_k: torch.Tensor | None,
    rotated_q: torch.Tensor | None = None,
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None,  # o and softmax_lse
    gradients: tuple[torch.Tensor, torch.Tensor | None] | None = None,  # do and dlse
    stats: torch.Tensor | None = None,  # [2, B, Hq, Tq]
) -> Launch:
    """Rotate k; with the rest, also q, and reduce o, do, lse and dlse to the numbers that the backward kernels need."""
    q, k = problem.q, problem.k
    batch, q_heads, q_len, _ = q.shape
    _, kv_heads, k_len, _ = k.shape
    o, lse = (None, None) if outputs is None else outputs
    do, dlse = (None, None) if gradients is None else gradients
    k_blocks = 0 if rotated_k is None else batch * kv_heads * math.ceil(k_len / PREPARED_ROWS)
    q_blocks = 0 if stats is None else batch * q_heads * math.ceil(q_len / PREPARED_ROWS)
    arguments = {
        "q_ptr": q if stats is not None else None,
        "k_ptr": k,
        "o_ptr": o,
        "do_ptr": do,
        "lse_ptr": lse,
        "dlse_ptr": dlse,
        "rotated_q_ptr": rotated_q,
        "rotated_k_ptr": rotated_k,
        "stats_ptr": stats,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
        "heads": batch * q_heads,
        "q_len": q_len,
        "k_len": k_len,
        "k_blocks": k_blocks,
        **_strides("q", q),
        **_strides("k", k),
        **_strides("o", o),
        **_strides("do", do),
        **_tables(problem),
        **_widths(problem),
        "ROWS": PREPARED_ROWS,
    }
    return Launch(segment_attention_prepare_kernel, k_blocks + q_blocks, arguments, 4)


def plan_forward(problem: Problem, k: torch.Tensor, o: torch.Tensor, lse: torch.Tensor) -> Launch:
    """o and lse [B, Hq, Tq] from rotated keys."""
    batch, q_heads, q_len, _ = problem.q.shape
    config = _config("forward", problem, q_len, batch * q_heads)
    arguments = {
        "q_ptr": problem.q,
        "k_ptr": k,
        "v_ptr": problem.v,
        "o_ptr": o,
        "lse_ptr": lse,
        **_sizes(problem),
        **_scale(problem),
        **_strides("q", problem.q),
        **_strides("k", k),
        **_strides("v", problem.v),
        **_strides("o", o),
        **_tables(problem),
        **_widths(problem),
        **_visibility(problem),
        **_blocks(problem, config),
    }
    grid = batch * q_heads * math.ceil(q_len / config.block_m)
    return Launch(segment_attention_fwd_kernel, grid, arguments, config.num_warps)


def plan_decode(problem: Problem, o: torch.Tensor, lse: torch.Tensor) -> Launch:
    """o and lse [B, Hq, 1] of one query."""
    q, k = problem.q, problem.k
    batch = q.shape[0]
    _, kv_heads, k_len, _ = k.shape
    config = _config("decode", problem, k_len, batch * kv_heads)
    config = config._replace(block_m=max(config.block_m, triton.next_power_of_2(problem.group)))
    seen = k_len if problem.window_size is None else min(k_len, problem.window_size)
    splits = decode_splits(seen, batch * kv_heads, problem.group, config, k.element_size(), problem.target)
    parts = batch * kv_heads * splits * config.block_m if splits > 1 else 0

    def room(width: int) -> torch.Tensor | None:
        return torch.empty(parts * width, dtype=torch.float32, device=q.device) if parts else None

    of_queries = _strides("q", q) | _strides("o", o)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": problem.v,
        "o_ptr": o,
        "lse_ptr": lse,
        "partial_ptr": room(sum(problem.tiles)),
        "stats_ptr": room(2),
        "counter_ptr": zeroed_counters(batch * kv_heads, q.device) if parts else None,
        **{name: size for name, size in _sizes(problem).items() if name not in ("heads", "q_len")},
        "kv_heads": kv_heads,
        "splits": splits,
        **_scale(problem),
        **{name: size for name, size in of_queries.items() if not name.endswith("t")},
        **_strides("k", k),
        **_strides("v", problem.v),
        **_tables(problem),
        **_widths(problem),
        **_visibility(problem),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "SPLIT": splits > 1,
    }
    return Launch(segment_attention_decode_kernel, batch * kv_heads * splits, arguments, config.num_warps)


def plan_dkdv(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    do: torch.Tensor,
    stats: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> Launch:
    """dk and dv from rotated q and k, and stats [2, B, Hq, Tq]."""
    batch, kv_heads, k_len, _ = k.shape
    config = _config("dkdv", problem, k_len, batch * kv_heads)
    units = batch * kv_heads * math.ceil(k_len / config.block_n)
    splits = head_splits(units, problem.group, problem.target)
    sums = units * splits * 2 * config.block_n * sum(problem.tiles)
    arguments = {
        **_backward_arguments(problem, q, k, do, stats, config),
        "dk_ptr": dk,
        "dv_ptr": dv,
        "partial_ptr": torch.empty(sums, dtype=torch.float32, device=q.device) if splits > 1 else None,
        "counter_ptr": zeroed_counters(units, q.device) if splits > 1 else None,
        "kv_heads": kv_heads,
        "splits": splits,
        **_strides("dk", dk),
        **_strides("dv", dv),
        "SPLIT": splits > 1,
    }
    return Launch(segment_attention_bwd_dkdv_kernel, units * splits, arguments, config.num_warps)


def plan_dq(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, stats: torch.Tensor, dq: torch.Tensor
) -> Launch:
    """dq from rotated q and k, and stats [2, B, Hq, Tq]."""
    batch, q_heads, q_len, _ = q.shape
    config = _config("dq", problem, q_len, batch * q_heads)
    arguments = {
        **_backward_arguments(problem, q, k, do, stats, config),
        "dq_ptr": dq,
        **_strides("dq", dq),
    }
    grid = batch * q_heads * math.ceil(q_len / config.block_m)
    return Launch(segment_attention_bwd_dq_kernel, grid, arguments, config.num_warps)


def _backward_arguments(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, stats: torch.Tensor, config: Config
) -> dict[str, Any]:
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": problem.v,
        "do_ptr": do,
        "stats_ptr": stats,
        **_sizes(problem),
        "scale": problem.softmax_scale,
        "exp_scale": _exp_scale(problem),
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", problem.v),
        **_strides("do", do),
        **_tables(problem),
        **_widths(problem),
        **_visibility(problem),
        **_blocks(problem, config),
    }


def _config(direction: str, problem: Problem, rows: int, heads: int) -> Config:
    return tabulated(direction, sum(problem.tiles), problem.q.element_size(), rows, heads, problem.target)


def _sizes(problem: Problem) -> dict[str, int]:
    batch, q_heads, q_len, _ = problem.q.shape
    k_len = problem.k.shape[2]
    return {
        "heads": batch * q_heads,
        "q_heads": q_heads,
        "group": problem.group,
        "q_len": q_len,
        "k_len": k_len,
        "window_size": k_len if problem.window_size is None else min(problem.window_size, k_len),
    }


def _scale(problem: Problem) -> dict[str, Any]:
    # Positive, so that the largest product has the largest score.
    return {"scale": max(abs(_exp_scale(problem)), SMALLEST_SCALE), "NEGATIVE": problem.softmax_scale < 0}


def _exp_scale(problem: Problem) -> float:
    return problem.softmax_scale * LOG2_E / _exp_unit(problem)


def _exp_unit(problem: Problem) -> float:
    return LOG2_E if problem.q.dtype == torch.float32 else 1.0


def _strides(name: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """Those of batch rows, heads and tokens; features are adjacent."""
    return _named_strides(name, (0, 0, 0) if tensor is None else strides(tensor)[:3])


@functools.lru_cache(4096)
def _named_strides(name: str, steps: tuple[int, ...]) -> dict[str, int]:
    return {f"stride_{name}{axis}": step for axis, step in zip("bht", steps, strict=True)}


def _tables(problem: Problem) -> dict[str, Any]:
    cos = problem.cos
    table_b, table_t = (0, 0) if cos is None else (stride(cos, 0), stride(cos, 1))
    return {
        "cos_ptr": cos,
        "sin_ptr": problem.sin,
        "stride_cb": table_b,
        "stride_ct": table_t,
        "TABLE_ALIGN": 8 if table_b % 8 == 0 and table_t % 8 == 0 else 1,
    }


def _widths(problem: Problem) -> dict[str, int | float]:
    turned = 0 if problem.cos is None else problem.cos.shape[2]
    return _named_widths(problem.q.shape[3], problem.tiles, turned) | {"EXP_UNIT": _exp_unit(problem)}


@functools.cache
def _named_widths(dim: int, tiles: tuple[int, int], turned: int) -> dict[str, int | float]:
    return {
        "D": dim,
        "D0": tiles[0],
        "D1": tiles[1],
        "R": turned,
        "HALF": max(SMALLEST_TILE, triton.next_power_of_2(turned // 2)) if turned else 0,
        "REST": max(SMALLEST_TILE, triton.next_power_of_2(dim - turned)) if dim > turned else 0,
    }


def _visibility(problem: Problem) -> dict[str, Any]:
    windowed = problem.window_size is not None and problem.window_size < problem.k.shape[2]
    return {"pad_span_ptr": problem.pad_span, "WINDOW": windowed, "HOLE": problem.pad_span is not None}


def _blocks(problem: Problem, config: Config) -> dict[str, int]:
    return {
        "dim": problem.q.shape[3],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "STAGES": config.num_stages,
    }
