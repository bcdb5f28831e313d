"""Loss, perplexity and F1 over the logits of the last segments, as HMT-pytorch reports them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

RETRIEVAL_LOSS_WEIGHT = 0.05


def weighted_scores(labels: Tensor, predictions: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of class predictions, weighted by the classes' label counts, and accuracy."""
    if labels.numel() == 0:
        return dict.fromkeys(("precision", "recall", "f1", "accuracy"), 0.0)
    num_classes = int(torch.maximum(labels, predictions).max()) + 1
    num_labels = torch.bincount(labels, minlength=num_classes).double()
    num_predicted = torch.bincount(predictions, minlength=num_classes).double()
    num_right = torch.bincount(labels[labels == predictions], minlength=num_classes).double()
    weights = num_labels / num_labels.sum()
    precision = num_right / num_predicted.clamp(min=1)
    recall = num_right / num_labels.clamp(min=1)
    f1 = 2 * num_right / (num_labels + num_predicted).clamp(min=1)
    means = {"precision": precision, "recall": recall, "f1": f1}
    scores = {name: float((weights * value).sum()) for name, value in means.items()}
    return {**scores, "accuracy": float(num_right.sum() / num_labels.sum())}


def collect(
    cells: list[CausalLMOutputWithCrossAttentions],
    labels: Tensor | None,
    mask_size: int | None,
    ret_loss: Tensor | int,
    output_hidden_states: bool,
) -> CausalLMOutputWithCrossAttentions:
    """Join the cells' logits; loss = CE(logits[-(m+1):-1], labels[-m:]) + 0.05 ret_loss with m = mask_size.

    Raises:
        ValueError: the kept segments hold fewer than m + 1 rows of logits, or mask_size is missing.
    """
    out = CausalLMOutputWithCrossAttentions()
    logits = torch.cat([cell.logits for cell in cells], dim=1)
    out["loss"] = out["ppl"] = out["ret_loss"] = 0
    if labels is not None:
        if not isinstance(mask_size, int) or mask_size < 1:
            raise ValueError(f"mask_size must be an integer >= 1 to compute a loss, got {mask_size!r}")
        size = min(mask_size, labels.shape[1] - 1)
        if logits.shape[1] < size + 1:
            raise ValueError(
                f"a loss over mask_size={size} tokens needs {size + 1} rows of logits, but the n_cell_out={len(cells)} "
                f"kept segments hold {logits.shape[1]}: raise n_cell_out"
            )
        rows, targets = logits[:, -(size + 1) : -1].flatten(0, 1), labels[:, -size:].flatten().to(logits.device)
        loss = F.cross_entropy(rows.float(), targets)
        out["loss"] = loss + RETRIEVAL_LOSS_WEIGHT * ret_loss
        out["ppl"] = loss.exp()
        out["ret_loss"] = ret_loss
        counted = targets >= 0
        out["f1"] = weighted_scores(targets[counted], rows.argmax(dim=-1)[counted])
    out["logits"] = logits
    if output_hidden_states:
        layers = zip(*(cell.hidden_states for cell in cells), strict=True)
        out["hidden_states"] = tuple(torch.cat(layer, dim=1) for layer in layers)
    for number, cell in enumerate(cells):
        for key, value in cell.items():
            out[f"{key}_{number}"] = value
    return out
