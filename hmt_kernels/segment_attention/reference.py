"""segment_attention in readable PyTorch: any float dtype, any head dimension. It defines what is correct."""

from __future__ import annotations

import torch


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
    """o = softmax(softmax_scale * rot(q) rot(k)^T + mask) v and the log-sum-exp of each row."""
    qr, kr, vr = _prepare(q, k, v, cos, sin)
    visible = _visible(q, k, pad_span, window_size)
    scores = _scores(qr, kr, visible, softmax_scale)  # [B, Hkv, G, Tq, Tk]
    lse = scores.logsumexp(dim=-1)  # [B, Hkv, G, Tq], -inf for a row that sees no key
    o = _probabilities(scores, visible) @ vr  # [B, Hkv, G, Tq, D]
    return _like(o.flatten(1, 2), q), lse.flatten(1, 2)


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
    """ds = p (do v^T - delta) with delta = do . o - dlse; dq, dk = scale * ds k, ds^T q, un-rotated; dv = p^T do."""
    qr, kr, vr = _prepare(q, k, v, cos, sin)
    visible = _visible(q, k, pad_span, window_size)
    groups = qr.shape[1:3]  # Hkv, G
    do = do.to(qr.dtype).unflatten(1, groups)  # [B, Hkv, G, Tq, D]
    p = _probabilities(_scores(qr, kr, visible, softmax_scale), visible)
    # delta is formed from p and v rather than from the stored output, which was rounded to q's dtype.
    dp = do @ vr.mT
    delta = (p * dp).sum(dim=-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.to(qr.dtype).unflatten(1, groups).unsqueeze(-1)
    # where, not only a product: an lse of -inf may bring a gradient that is not finite.
    ds = torch.where(p != 0, p * (dp - delta), 0.0) * softmax_scale
    dq = (ds @ kr).flatten(1, 2)  # [B, Hq, Tq, D]
    dk = (ds.mT @ qr).sum(dim=2)  # [B, Hkv, Tk, D]
    dv = (p.mT @ do).sum(dim=2)
    if cos is not None and sin is not None:
        # A rotation is undone by its transpose, the rotation by the negative angle.
        dq = _rotate(dq, cos, -sin)
        dk = _rotate(dk, cos, -sin)
    return _like(dq, q), _like(dk, k), _like(dv, v)


def _prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated q [B, Hkv, G, Tq, D], rotated k and v [B, Hkv, 1, Tk, D], in the dtype of accumulation."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if cos is not None and sin is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    return q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])), k.unsqueeze(2), v.unsqueeze(2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R features of x [B, H, T, D], the last T rows of the tables being those of x."""
    length, rotary_dim = x.shape[2], cos.shape[2]
    cos = cos[:, cos.shape[1] - length :].to(x.dtype).unsqueeze(1)  # [1 or B, 1, T, R]
    sin = sin[:, sin.shape[1] - length :].to(x.dtype).unsqueeze(1)
    rotated, kept = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = rotated.chunk(2, dim=-1)
    cos_first, cos_second = cos.chunk(2, dim=-1)
    sin_first, sin_second = sin.chunk(2, dim=-1)
    return torch.cat((first * cos_first - second * sin_first, second * cos_second + first * sin_second, kept), dim=-1)


def _visible(q: torch.Tensor, k: torch.Tensor, pad_span: torch.Tensor | None, window_size: int | None) -> torch.Tensor:
    """[B or 1, 1, 1, Tq, Tk]: which keys a row sees."""
    q_len, k_len = q.shape[2], k.shape[2]
    keys = torch.arange(k_len, device=q.device)
    positions = torch.arange(k_len - q_len, k_len, device=q.device)[:, None]
    visible = keys <= positions
    if window_size is not None:
        visible = visible & (keys > positions - window_size)
    visible = visible[None, None, None]
    if pad_span is not None:
        start, end = pad_span[:, :, None, None, None, None].unbind(1)  # [B, 1, 1, 1, 1]
        visible = visible & ((keys < start) | (keys >= end))
    return visible


def _scores(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    return torch.where(visible, (q @ k.mT) * softmax_scale, -torch.inf)


def _probabilities(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    # softmax rather than exp(scores - lse), which loses what rounding took from a large lse; NaN where no key is seen.
    return torch.where(visible, scores.softmax(dim=-1), 0.0)


def _like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like).copy_(x)
