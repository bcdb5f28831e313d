"""segment_attention in CUDA C++ (csrc/cuda): tensor cores, rotary embedding, hole and window inside, no atomics."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from hmt_kernels.cuda_launch import pointer, stream, with_aligned_rows
from hmt_kernels.dispatch import compute_capability

try:
    from hmt_kernels import _C
except ImportError:
    _C = None  # type: ignore[assignment]

DIMS = (64, 80, 96, 128)

_DTYPES = {torch.float16: 1, torch.bfloat16: 2}
_NO_WINDOW = 2**31 - 1


def missing() -> str | None:
    """Why this machine cannot run the CUDA kernels at all (None: it can)."""
    if _C is None:
        return "the native module hmt_kernels._C is not built"
    if not hasattr(_C, "segment_attention_cuda_fwd"):
        return "the native module was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


def unavailable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
) -> str | None:
    """Why the CUDA kernels cannot run these tensors (None: they can); looks at metadata only."""
    if q.device.type != "cuda":
        return f"it needs CUDA tensors, got {q.device.type}"
    if compute_capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 or higher"
    if q.dtype not in _DTYPES:
        return f"it takes float16 and bfloat16, got {q.dtype}"
    if q.shape[3] not in DIMS:
        return f"it takes a head dimension of {', '.join(map(str, DIMS))}, got {q.shape[3]}"
    group = q.shape[1] // k.shape[1]
    if k.shape[2] * group * group >= 2**31:
        return f"it takes Tk (Hq / Hkv)^2 below 2^31, got Tk = {k.shape[2]} and Hq / Hkv = {group}"
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
    """o [B, Hq, Tq, D], laid out as q, and softmax_lse [B, Hq, Tq]; one launch, two with rotary embedding."""
    o = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return o, lse
    rotary = _rotary(cos, sin)
    rotated_k = _scratch(k, cos)
    pad_span = None if pad_span is None else pad_span.contiguous()
    aligned_q, aligned_k, aligned_v, aligned_o = (with_aligned_rows(x) for x in (q, k, v, o))
    with torch.cuda.device_of(q):
        _C.segment_attention_cuda_fwd(
            shape=_shape(q, k), dtype=_DTYPES[q.dtype], q=_heads(aligned_q), k=_heads(aligned_k), v=_heads(aligned_v),
            o=_heads(aligned_o), lse=lse.data_ptr(), rotary=rotary.argument(), rotated_k=pointer(rotated_k),
            pad_span=pointer(pad_span), window=_window(window_size), softmax_scale=softmax_scale,
            stream=stream(q.device),
        )  # fmt: skip
    return _as(o, aligned_o), lse


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
    """dq, dk, dv, laid out as q, k, v; three launches, four with rotary embedding."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    shape = _shape(q, k)
    rotary = _rotary(cos, sin)
    rotated_q, rotated_k = _scratch(q, cos), _scratch(k, cos)
    padded_rows = _C.segment_attention_cuda_padded_rows(shape)
    row_lse, row_delta = torch.empty((2, *k.shape[:2], padded_rows), dtype=torch.float32, device=q.device)
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    pad_span = None if pad_span is None else pad_span.contiguous()
    softmax_lse = softmax_lse.contiguous()
    aligned_q, aligned_k, aligned_v, aligned_o, aligned_do = (with_aligned_rows(x) for x in (q, k, v, o, do))
    aligned_dq, aligned_dk, aligned_dv = (with_aligned_rows(x) for x in (dq, dk, dv))
    with torch.cuda.device_of(q):
        _C.segment_attention_cuda_bwd(
            shape=shape, dtype=_DTYPES[q.dtype], q=_heads(aligned_q), k=_heads(aligned_k), v=_heads(aligned_v),
            o=_heads(aligned_o), lse=softmax_lse.data_ptr(), d_o=_heads(aligned_do), d_lse=pointer(dlse),
            dq=_heads(aligned_dq), dk=_heads(aligned_dk), dv=_heads(aligned_dv), rotary=rotary.argument(),
            rotated_q=pointer(rotated_q), rotated_k=pointer(rotated_k), row_lse=row_lse.data_ptr(),
            row_delta=row_delta.data_ptr(), pad_span=pointer(pad_span), window=_window(window_size),
            softmax_scale=softmax_scale, stream=stream(q.device),
        )  # fmt: skip
    return _as(dq, aligned_dq), _as(dk, aligned_dk), _as(dv, aligned_dv)


def _shape(q: torch.Tensor, k: torch.Tensor) -> tuple[int, ...]:
    batch, q_heads, q_len, dim = q.shape
    return batch, q_heads, k.shape[1], q_len, k.shape[2], dim


class _Rotary(NamedTuple):
    cos: torch.Tensor | None  # to be kept, with sin, until the kernels are on their stream
    sin: torch.Tensor | None
    half: int  # 0: no rotary embedding

    def argument(self) -> tuple[int, int, int, int, int]:
        if self.cos is None or self.sin is None:
            return 0, 0, 0, 0, 0
        batch_stride = self.cos.stride(0) if self.cos.shape[0] > 1 else 0
        return self.cos.data_ptr(), self.sin.data_ptr(), batch_stride, self.cos.stride(1), self.half


def _rotary(cos: torch.Tensor | None, sin: torch.Tensor | None) -> _Rotary:
    if cos is None or sin is None:
        return _Rotary(None, None, 0)
    return _Rotary(_table(cos), _table(sin), cos.shape[2] // 2)


def _table(table: torch.Tensor) -> torch.Tensor:
    """In float32, contiguous, rows at multiples of 16 bytes, with at least R / 2 columns, a multiple of 8."""
    half = table.shape[2] // 2
    if half % 8:  # the second half repeats the first
        table = F.pad(table[..., :half], (0, -half % 8))
    table = table.to(torch.float32).contiguous()
    return table if table.data_ptr() % 16 == 0 else table.clone()


def _scratch(like: torch.Tensor, cos: torch.Tensor | None) -> torch.Tensor | None:
    """Room for the rotated copy, if there is one."""
    return None if cos is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _window(window_size: int | None) -> int:
    return _NO_WINDOW if window_size is None else min(window_size, _NO_WINDOW)


def _heads(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _as(result: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """What was written, in the layout of `result`."""
    return result if written is result else result.copy_(written)
