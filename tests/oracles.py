"""The operators written a second time, naively, in the dtype of their inputs: what the tests compare with."""

from __future__ import annotations

import torch


def recall(
    query: torch.Tensor, memory: torch.Tensor, num_valid: list[int] | None, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """recalled, lse, slot of memory_recall, one batch row at a time, over a slice that holds the live slots only."""
    recalled, lse, slot = [], [], []
    for b in range(query.shape[0]):
        live = memory[b] if num_valid is None else memory[b, : max(num_valid[b], 0)]  # [n, D]
        scores = softmax_scale * query[b] @ live.T  # [Q, n]
        recalled.append(scores.softmax(-1) @ live)
        lse.append(scores.logsumexp(-1))
        slot.append(scores.argmax(-1) if len(live) else torch.full(scores.shape[:1], -1, device=scores.device))
    return torch.stack(recalled), torch.stack(lse), torch.stack(slot).int()


def rising_queue(queries: int, slots: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, memory and recalled for scores so far apart that exp of their differences is zero: each next one wins.

    The strongest slot is the last, and whatever is kept of an earlier one shows as at least 1 in the result.
    """
    query, memory = torch.zeros(1, queries, dim), torch.zeros(1, slots, dim)
    query[:, :, 0], memory[0, :, 0] = 1, torch.arange(slots)
    memory[:, :, 1] = torch.arange(1, slots + 1) % 5 + 1.0
    return query, memory, memory[:, -1:].expand(1, queries, dim)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: torch.Tensor | None = None,
    pad_span: list[tuple[int, int]] | None = None,
    window_size: int | None = None,
    softmax_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o, softmax_lse of segment_attention; `angles` [1 or B, Tk, R/2] are those of cos and sin."""
    batch, q_heads, q_len, dim = q.shape
    k_len = k.shape[2]
    if angles is not None:
        q, k = rotate(q, angles[:, k_len - q_len :]), rotate(k, angles)
    k, v = (x.repeat_interleave(q_heads // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * (dim**-0.5 if softmax_scale is None else softmax_scale)
    spans = pad_span or [(0, 0)] * batch
    hidden = torch.tensor([[[_hides(i + k_len - q_len, j, window_size, span) for j in range(k_len)]
                            for i in range(q_len)] for span in spans], device=q.device)  # fmt: skip
    hidden = hidden[:, None]  # [B, 1, Tq, Tk]
    sees_none = hidden.all(-1, keepdim=True)
    # A row that sees no key is computed over all of them and then cut off: softmax of nothing is NaN.
    p = scores.masked_fill(hidden & ~sees_none, -torch.inf).softmax(-1).masked_fill(sees_none, 0.0)
    lse = scores.masked_fill(hidden & ~sees_none, -torch.inf).logsumexp(-1).masked_fill(sees_none[..., 0], -torch.inf)
    return p @ v, lse


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate features r and r + R/2 of x [B, H, T, D] by angles [1 or B, T, R/2], as complex numbers are."""
    half = angles.shape[-1]
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    real, imaginary = x[..., :half], x[..., half : 2 * half]
    turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.cat((*turned, x[..., 2 * half :]), dim=-1)


def _hides(position: int, key: int, window_size: int | None, span: tuple[int, int]) -> bool:
    in_window = window_size is None or key > position - window_size
    return key > position or not in_window or span[0] <= key < span[1]
