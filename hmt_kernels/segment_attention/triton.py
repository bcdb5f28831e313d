"""segment_attention in Triton: flash attention over the visible tiles of keys, the rotary embedding inside.

Forward: a pass that rotates the keys (with rotary tables only), then one launch; one launch alone for a single query.
Backward: a pass over the rows, then dk and dv, then dq; each in a fixed order of additions.
"""

from __future__ import annotations

import torch

from hmt_kernels import triton_launch
from hmt_kernels.segment_attention.triton_configs import decodes
from hmt_kernels.segment_attention.triton_forward import segment_attention_fwd_kernel
from hmt_kernels.segment_attention.triton_plans import (
    Problem,
    plan_decode,
    plan_dkdv,
    plan_dq,
    plan_forward,
    plan_prepare,
)
from hmt_kernels.triton_launch import Launch, target_of
from hmt_kernels.triton_tiles import has_aligned_rows

INTERPRETED = triton_launch.is_interpreted(segment_attention_fwd_kernel)
MAX_TOKEN_STRIDE = (1 << 31) // 256  # offsets inside a tile, of at most 256 rows, have 32 bits


def missing() -> str | None:
    """Why this machine cannot run these kernels (None: it can)."""
    return triton_launch.missing(segment_attention_fwd_kernel)


def unavailable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
) -> str | None:
    """Why these kernels cannot run these tensors (None: they can)."""
    if q.device.type != "cuda" and not INTERPRETED:
        return f"it needs CUDA tensors, q is on {q.device}"
    if q.dtype == torch.float64:
        return "it has no float64"
    if q.shape[3] % 8 != 0 or q.shape[3] > 256:
        return f"it takes head dimensions that are multiples of 8 up to 256, q's is {q.shape[3]}"
    return None


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, Hq, Tq, D] and softmax_lse [B, Hq, Tq] of segment_attention."""
    problem = _problem(q, k, v, cos, sin, pad_span, window_size, softmax_scale)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    o, o_rows = _empty_output(q)
    if decodes(q.shape[2], problem.group, sum(problem.tiles), q.element_size()):
        _run(plan_decode(problem, o_rows, lse), q.device)
    else:
        rotated_k = _empty_rotated(problem.k, cos)
        if rotated_k is not None:
            _run(plan_prepare(problem, rotated_k), q.device)
        _run(plan_forward(problem, problem.k if rotated_k is None else rotated_k, o_rows, lse), q.device)
    return _output(o, o_rows), lse


def backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    o: torch.Tensor,
    softmax_lse: torch.Tensor,
    window_size: int | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq [B, Hq, Tq, D], dk and dv [B, Hkv, Tk, D] of segment_attention."""
    problem = _problem(q, k, v, cos, sin, pad_span, window_size, softmax_scale)
    o, do = _with_usable_rows(o), _with_usable_rows(do)
    dlse = None if dlse is None else dlse.contiguous()
    stats = q.new_empty((2, *q.shape[:3]), dtype=torch.float32)
    rotated_q, rotated_k = _empty_rotated(problem.q, cos), _empty_rotated(problem.k, cos)
    _run(plan_prepare(problem, rotated_k, rotated_q, (o, softmax_lse.contiguous()), (do, dlse), stats), q.device)
    ready_q = problem.q if rotated_q is None else rotated_q
    ready_k = problem.k if rotated_k is None else rotated_k
    (dq, dq_rows), (dk, dk_rows), (dv, dv_rows) = _empty_output(q), _empty_output(k), _empty_output(v)
    _run(plan_dkdv(problem, ready_q, ready_k, do, stats, dk_rows, dv_rows), q.device)
    _run(plan_dq(problem, ready_q, ready_k, do, stats, dq_rows), q.device)
    return _output(dq, dq_rows), _output(dk, dk_rows), _output(dv, dv_rows)


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
    softmax_scale: float,
) -> Problem:
    if cos is not None and sin is not None:
        usable = cos.stride() == sin.stride() and cos.stride(2) == 1 and cos.stride(1) < MAX_TOKEN_STRIDE
        cos, sin = (cos, sin) if usable else (cos.contiguous(), sin.contiguous())
    pad_span = None if pad_span is None else pad_span.contiguous()
    q, k, v = (_with_usable_rows(tensor) for tensor in (q, k, v))
    return Problem(q, k, v, cos, sin, pad_span, window_size, softmax_scale, target_of(q.device))


def _run(launch: Launch, device: torch.device) -> None:
    triton_launch.run(launch, device)


def _with_usable_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if _has_usable_rows(tensor) else tensor.contiguous()


def _has_usable_rows(tensor: torch.Tensor) -> bool:
    return has_aligned_rows(tensor) and tensor.stride(2) < MAX_TOKEN_STRIDE


def _empty_rotated(tensor: torch.Tensor, cos: torch.Tensor | None) -> torch.Tensor | None:
    return None if cos is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_output(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A result laid out as `like`, and where the kernels write it: itself, or rows that they can write."""
    result = torch.empty_like(like)
    if _has_usable_rows(result):
        return result, result
    return result, torch.empty_like(like, memory_format=torch.contiguous_format)


def _output(result: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    return result if written is result else result.copy_(written)
