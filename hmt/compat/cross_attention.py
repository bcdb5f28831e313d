"""Recall with HMT-pytorch's signature, scale and retrieval loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmt.recall import absorb
from hmt_kernels import memory_recall


class CrossAttentionMemory(nn.Module):
    """Recall p = softmax((Wq q)(Wk M)^T * scale) M; scale 1/h for d, h >= 4096 outside generation, else 1/sqrt(h).

    Its weights take the default dtype (HMT-pytorch computes this step in bfloat16); checkpoints of either load.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.wq = nn.Linear(dim, hidden_dim, bias=False)
        self.wk = nn.Linear(dim, hidden_dim, bias=False)

    def absorb(self, summary: Tensor) -> Tensor:
        """Summaries [..., d] to absorbed queries [..., d]."""
        return absorb(summary, self.wq, self.wk)

    def scale(self, generate: bool) -> float:
        """The scale of the scores that HMT-pytorch uses in this situation."""
        large = self.dim >= 4096 and self.hidden_dim >= 4096
        return 1.0 / self.hidden_dim if large and not generate else self.hidden_dim**-0.5

    def retrieval_loss(self, query: Tensor, memory: Tensor, pos_mask: Tensor, softmax_scale: float) -> Tensor:
        """Cross entropy of the softmaxed scores (taken as logits, as HMT-pytorch does) to L1-normalised pos_mask."""
        scores = (memory.float() @ query.float()[:, :, None])[..., 0] * softmax_scale  # [B, N]
        if pos_mask.shape != scores.shape:
            raise ValueError(f"pos_mask must have the shape {tuple(scores.shape)}, got {tuple(pos_mask.shape)}")
        target = F.normalize(pos_mask.to(scores), p=1, dim=-1)
        return F.cross_entropy(scores.softmax(dim=-1), target)

    def forward(
        self,
        memory: Tensor | None,
        inputs: Tensor,
        mode: str = "train",
        seg_num: int = 0,
        browse_thres: int = 4,
        pos_mask: Tensor | None = None,
        last_seg: bool = False,
        generate: bool = False,
    ) -> tuple[Tensor | None, list[int] | None, bool, Tensor]:
        """(recalled [B, 1, d], hist, browse, loss) for summaries [B, 1, d] and memories [B, N, d], oldest first."""
        if memory is None:
            return None, None, False, torch.tensor(0.0)
        softmax_scale = self.scale(generate)
        query = self.absorb(inputs[:, 0].to(self.wq.weight.device))
        memory = memory.to(device=query.device, dtype=query.dtype)
        out = memory_recall(query[:, None], memory, softmax_scale=softmax_scale)
        hist = (seg_num - out.slot[:, 0]).tolist()
        loss = torch.tensor(0.0)
        if pos_mask is not None:
            loss = self.retrieval_loss(query, memory, pos_mask, softmax_scale)
        return out.recalled, hist, hist[0] < browse_thres, loss
