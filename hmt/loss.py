"""Cross entropy over a long text without ever holding all of its logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hmt.backbone import apply_head

IGNORE_INDEX = -100


def shift_left(labels: Tensor) -> Tensor:
    """Labels [B, T] of the tokens themselves to labels of the next token; the last position has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _chunk_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    with record_function("hmt.head"):
        logits = apply_head(model, hidden).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def summed_cross_entropy(model: PreTrainedModel, hidden: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    """Sum over positions of -log softmax(head(hidden))[label], with the logits of `chunk_size` positions at a time.

    hidden [B, T, d], labels [B, T] (-100: not counted). The backward pass recomputes each chunk's logits.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten().to(hidden.device)
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, targets in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, model, rows, targets, use_reentrant=False)
        else:
            total = total + _chunk_loss(model, rows, targets)
    return total
