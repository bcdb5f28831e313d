"""memory_recall in readable PyTorch: any float dtype, any device. It defines what is correct."""

from __future__ import annotations

import torch


def unavailable(query: torch.Tensor, memory: torch.Tensor) -> str | None:
    """Why this implementation cannot run these tensors: it always can."""
    return None


def forward(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None, softmax_scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """recalled = softmax(softmax_scale * query memory^T) memory, its log-sum-exp, and the strongest slot."""
    u, m, live = _prepare(query, memory, num_valid)
    scores = _scores(u, m, live, softmax_scale)  # [B, Q, N]
    lse = scores.logsumexp(dim=-1)  # [B, Q], -inf without a live slot
    recalled = _probabilities(scores, live) @ m  # [B, Q, D]
    return recalled.to(query.dtype), lse, _strongest_slot(scores, live)


def backward(
    d_recalled: torch.Tensor,
    d_lse: torch.Tensor | None,
    query: torch.Tensor,
    memory: torch.Tensor,
    num_valid: torch.Tensor | None,
    recalled: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ds = p (do . M - delta) with delta = do . o - dlse; du = scale ds M; dM = p^T do + scale ds^T u."""
    u, m, live = _prepare(query, memory, num_valid)
    do = d_recalled.to(u.dtype)
    p = _probabilities(_scores(u, m, live, softmax_scale), live)  # [B, Q, N]
    # delta is formed from p and M rather than from the stored output, which was rounded to query's dtype.
    dp = do @ m.mT  # [B, Q, N]
    delta = (p * dp).sum(dim=-1, keepdim=True)  # [B, Q, 1]
    if d_lse is not None:
        delta = delta - d_lse.to(u.dtype).unsqueeze(-1)
    # where, not only a product: an lse of -inf may bring a gradient that is not finite.
    ds = torch.where(p != 0, p * (dp - delta), 0.0) * softmax_scale
    d_query = ds @ m  # [B, Q, D]
    d_memory = p.mT @ do + ds.mT @ u  # [B, N, D], zero in dead slots because p and ds are
    return d_query.to(query.dtype), d_memory.to(memory.dtype)


def step(
    query: torch.Tensor,
    memory: torch.Tensor,
    new_memory: torch.Tensor,
    slot_index: torch.Tensor,
    num_valid: torch.Tensor | None,
    softmax_scale: float,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """memory[b, slot_index[b]] = new_memory[b], then recall into out[:, 0] and out[:, -1]."""
    _write_slot(memory, new_memory, slot_index)
    recalled, lse, slot = forward(query, memory, num_valid, softmax_scale)
    out[:, :1] = recalled
    out[:, -1:] = recalled
    return out[:, :1], lse, slot


def _write_slot(memory: torch.Tensor, new_memory: torch.Tensor, slot_index: torch.Tensor) -> None:
    """memory[b, slot_index[b]] = new_memory[b]; an index outside the queue writes nothing. No host synchronisation."""
    num_slots = memory.shape[1]
    if num_slots == 0:
        return
    inside = (slot_index >= 0) & (slot_index < num_slots)
    index = slot_index.clamp(0, num_slots - 1).long()[:, None, None].expand(-1, 1, memory.shape[2])
    kept = memory.gather(1, index)
    memory.scatter_(1, index, torch.where(inside[:, None, None], new_memory[:, None], kept))


def _prepare(
    query: torch.Tensor, memory: torch.Tensor, num_valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query and memory in the dtype of accumulation, dead slots of memory zeroed, and live [B or 1, 1, N]."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    slots = torch.arange(memory.shape[1], device=memory.device)
    if num_valid is None:
        return query.to(dtype), memory.to(dtype), (slots >= 0)[None, None, :]
    live = slots < num_valid[:, None, None]
    # where, not a product: a dead slot may hold NaN.
    return query.to(dtype), torch.where(live.mT, memory.to(dtype), 0.0), live


def _scores(u: torch.Tensor, m: torch.Tensor, live: torch.Tensor, softmax_scale: float) -> torch.Tensor:
    return torch.where(live, (u @ m.mT) * softmax_scale, -torch.inf)


def _probabilities(scores: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    # softmax rather than exp(scores - lse), which loses what rounding took from a large lse; NaN without a live slot.
    return torch.where(live, scores.softmax(dim=-1), 0.0)


def _strongest_slot(scores: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The live slot with the largest score, the lowest index on ties (argmax promises no order); -1 without any."""
    num_slots = scores.shape[-1]
    if num_slots == 0:
        return scores.new_full(scores.shape[:-1], -1, dtype=torch.int32)
    slots = torch.arange(num_slots, device=scores.device)
    is_strongest = live & (scores == scores.amax(dim=-1, keepdim=True))
    slot = torch.where(is_strongest, slots, num_slots).amin(dim=-1)
    return torch.where(slot < num_slots, slot, -1).to(torch.int32)
