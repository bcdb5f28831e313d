"""segment_attention around F.scaled_dot_product_attention: plain differentiable PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LEAST = torch.finfo(torch.float32).tiny  # factors below may be 0 where they are used


def unavailable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
) -> str | None:
    """Why this implementation cannot run these tensors: it always can."""
    return None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pad_span: torch.Tensor | None,
    window_size: int | None,
    softmax_scale: float | None,
) -> torch.Tensor:
    """o = softmax(softmax_scale * rot(q) rot(k)^T + mask) v, with a mask only where nothing cheaper says the same."""
    if softmax_scale is not None and softmax_scale < LEAST:
        # SDPA scales after it has hidden keys with -inf: NaN for a factor of 0, and seen keys for a negative one
        q, softmax_scale = (-q, -softmax_scale) if softmax_scale <= -LEAST else (softmax_scale * q, 1.0)
    if window_size is not None:
        unseen = k.shape[2] - q.shape[2] + 1 - window_size
        if unseen > 0:  # these first keys have left the window of every row
            k, v = k[:, :, unseen:], v[:, :, unseen:]
            cos = None if cos is None else cos[:, unseen:]
            sin = None if sin is None else sin[:, unseen:]
            pad_span = None if pad_span is None else pad_span.clamp(min=0) - unseen  # within int32
        if window_size >= k.shape[2]:
            window_size = None
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    q_len, k_len = q.shape[2], k.shape[2]
    if pad_span is None and window_size is None:
        if q_len == 1:  # a single row stands at the last position and sees every key
            return _sdpa(q, k, v, None, False, softmax_scale)
        if q_len == k_len:
            return _sdpa(q, k, v, None, True, softmax_scale)
        # A few rows more cost less than a mask, which skips no upper triangle. Not compiled: one graph for all lengths.
        if not torch.compiler.is_compiling() and 5 * q_len >= 4 * k_len:
            missing = k_len - q_len
            return _sdpa(F.pad(q, (0, 0, missing, 0)), k, v, None, True, softmax_scale)[:, :, missing:]
    keys = torch.arange(k_len, device=q.device)
    positions = torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    visible = keys <= positions  # [Tq, Tk]
    if window_size is not None:
        visible = visible & (keys > positions - window_size)
    if pad_span is None:  # every row sees at least itself
        return _sdpa(q, k, v, visible[None, None], False, softmax_scale)
    start, end = pad_span[:, :, None, None, None].unbind(1)  # [B, 1, 1, 1]
    first = 0 if window_size is None else (positions - (window_size - 1)).clamp(min=0)
    blind = (first >= start) & (positions < end)  # [B, 1, Tq, 1]: all that the row would see is in the hole
    shown = (keys < start) | (keys >= end)  # [B, 1, 1, Tk]
    visible = visible & shown  # [B, 1, Tq, Tk]
    # A blind row gets its own key, so that no backend meets an empty softmax; its result is then replaced by zeros.
    visible = visible | (blind & (keys == positions))
    return _sdpa(q.masked_fill(blind, 0.0), k, v, visible, False, softmax_scale).masked_fill(blind, 0.0)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    softmax_scale: float | None,
) -> torch.Tensor:
    q, k, v = _apart(q), _apart(k), _apart(v)
    enable_gqa = False
    if q.shape[1] != k.shape[1]:
        # On CUDA only the flash backend shares key heads; the one for masks and float32 would give way to plain math.
        if q.is_cuda and (mask is not None or q.dtype not in (torch.float16, torch.bfloat16)):
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        else:
            enable_gqa = True
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=is_causal, scale=softmax_scale, enable_gqa=enable_gqa
    )


def _apart(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of rows that overlap, which oneDNN refuses, or have gaps, where PyTorch falls back on plain math."""
    apart = x.stride(-1) == 1 and not any(0 < stride < x.shape[-1] for stride in x.stride()[:-1])
    return x if apart else x.contiguous()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R features of x [B, H, T, D], the last T rows of the tables being those of x."""
    length, rotary_dim = x.shape[2], cos.shape[2]
    # no conversion: tables that are more precise than x, as under torch.autocast, rotate in their own precision
    cos = cos.detach()[:, cos.shape[1] - length :].unsqueeze(1)  # [1 or B, 1, T, R]
    sin = sin.detach()[:, sin.shape[1] - length :].unsqueeze(1)
    rotated = x[..., :rotary_dim]
    first, second = rotated.chunk(2, dim=-1)
    rotated = (rotated * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return rotated if rotary_dim == x.shape[3] else torch.cat((rotated, x[..., rotary_dim:]), dim=-1)
