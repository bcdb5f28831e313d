"""Long-term memory: recall of past memory embeddings by cross-attention, with the projections absorbed."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hmt.backbone import is_plain_linear
from hmt_kernels import RecallOutput, memory_recall, memory_recall_step


def absorb(summary: Tensor, wq: nn.Module, wk: nn.Module) -> Tensor:
    """u = Wk^T (Wq q): summaries q [..., d] and projections d -> h to queries [..., d] of the unprojected memories."""
    dtype = getattr(getattr(wq, "weight", None), "dtype", summary.dtype)
    summary = summary.to(dtype if dtype.is_floating_point else summary.dtype)
    if is_plain_linear(wq) and is_plain_linear(wk):
        return (summary @ cast(Tensor, wq.weight).mT) @ cast(Tensor, wk.weight)
    # LoRA, quantisation and what moves weights to a device act when the modules are called
    columns = torch.eye(summary.shape[-1], dtype=summary.dtype, device=summary.device)
    return wq(summary) @ wk(columns).mT


class MemoryRecall(nn.Module):
    """Recall p = softmax((Wq q)(Wk M)^T * scale) M from the queue M (arXiv 2405.06067, section 3.2).

    Because (Wq q)(Wk m)^T = (Wk^T Wq q) . m, the queue is never projected: `absorb` turns the summaries of all segments
    into queries of embedding width in one product, and `forward` reads the queue once.

    Args:
        dim: embedding width d.
        hidden_dim: width h of the projections wq, wk [h, d].
        softmax_scale: None means 1/sqrt(h).

    Example:
        >>> recall = MemoryRecall(64, 64)
        >>> out = recall(recall.absorb(torch.randn(2, 64)), torch.randn(2, 300, 64))
        >>> out.recalled.shape
        torch.Size([2, 1, 64])
    """

    def __init__(self, dim: int, hidden_dim: int, softmax_scale: float | None = None):
        super().__init__()
        self.wq = nn.Linear(dim, hidden_dim, bias=False)
        self.wk = nn.Linear(dim, hidden_dim, bias=False)
        self.softmax_scale = hidden_dim**-0.5 if softmax_scale is None else softmax_scale

    def absorb(self, summary: Tensor) -> Tensor:
        """Summaries [..., d] to absorbed queries [..., d]."""
        return absorb(summary, self.wq, self.wk)

    def forward(self, query: Tensor, memory: Tensor) -> RecallOutput:
        """Recall for absorbed queries [B, d] from memories [B, N, d] in any slot order."""
        return memory_recall(query[:, None].to(memory.dtype), memory, softmax_scale=self.softmax_scale)

    def step(self, query: Tensor, memory: Tensor, new_memory: Tensor, slot: int, out: Tensor) -> RecallOutput:
        """Write new_memory [B, d] into a slot of memory [B, N, d], recall, and put the result at both ends of out.

        query [B, d]; memory and the first and last position of out [B, T, d] are changed in place: no gradients.
        """
        slot_index = torch.full(memory.shape[:1], slot, dtype=torch.int32, device=memory.device)
        query, new_memory = query[:, None].to(memory), new_memory.to(memory)
        return memory_recall_step(query, memory, new_memory, slot_index, softmax_scale=self.softmax_scale, out=out)
