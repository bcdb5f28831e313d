"""Cross entropy over a long text without ever holding all of its logits, nor computing any of them twice.

Its gradient is formed along with it, while a chunk's logits are there: that of the hidden states waits for the backward
pass, that of the head is added up over all segments. For a head that is more than a linear layer (LoRA, hooks) and in
float16, where small gradients need the loss's scale, the backward pass computes each chunk's logits again instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hmt.backbone import apply_head, is_plain_linear, unwrap
from hmt.remat import offloaded
from hmt_kernels.autocast import is_autocast_enabled

IGNORE_INDEX = -100


def shift_left(labels: Tensor) -> Tensor:
    """Labels [B, T] of the tokens themselves to labels of the next token; the last position has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


class SummedCrossEntropy:
    """Sum over positions of -log softmax(head(hidden))[label], with the logits of `chunk_size` positions at a time.

    `add` segments, then take the `total` once. With `offload`, what waits for the backward pass does so in CPU memory.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int, *, offload: bool = False) -> None:
        self.model, self.chunk_size, self.offload = model, chunk_size, offload
        self.head: nn.Module = unwrap(model).get_output_embeddings()
        # leaves of their own: no hook of a weight hears of a chunk's gradient
        self._trained = {name: p for name, p in self.head.named_parameters() if p.requires_grad}
        self._leaves: dict[str, Tensor] = {}
        self._d_weights: dict[str, Tensor] = {}
        self._total: Tensor | None = None

    def add(self, hidden: Tensor, labels: Tensor) -> None:
        """Add a segment: hidden states [B, T, d] and the labels [B, T] of the next tokens (-100: not counted)."""
        hidden, labels = hidden.flatten(0, 1), labels.flatten().to(hidden.device)
        if not torch.is_grad_enabled():
            self._count(self._sum(partial(_chunk_loss, self.model, self.head), hidden, labels))
        elif _gradient_can_be_formed(self.head, hidden):
            loss, d_hidden = self._loss_and_gradient(hidden, labels)
            with offloaded(self.offload):
                self._count(_Known.apply(loss, [d_hidden], hidden))
        else:
            recomputed = partial(checkpoint, _chunk_loss, self.model, self.head, use_reentrant=False)
            with offloaded(self.offload):
                self._count(self._sum(recomputed, hidden, labels))

    def total(self) -> Tensor:
        """The sum, float32, of all that has been added."""
        if self._total is None:
            raise ValueError("nothing has been added to the loss")
        if self._d_weights:
            weights = [self._trained[name] for name in self._d_weights]
            gradients = [g.to(p) for g, p in zip(self._d_weights.values(), weights, strict=True)]
            self._count(_Known.apply(torch.zeros_like(self._total), gradients, *weights))
        return self._total

    def _count(self, part: Tensor) -> None:
        self._total = part if self._total is None else self._total + part

    def _sum(self, loss_of: Callable[..., Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for chunk in self._chunks(hidden, labels):
            total = total + loss_of(*chunk)
        return total

    def _chunks(self, hidden: Tensor, labels: Tensor) -> Any:
        return zip(hidden.split(self.chunk_size), labels.split(self.chunk_size), strict=True)

    def _loss_and_gradient(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The loss of a segment and its gradient by the hidden states; those by the weights are added to their sums."""
        self._leaves = self._leaves or {name: p.detach().requires_grad_() for name, p in self._trained.items()}
        # not by functional_call, which changes the module that other threads are using
        weights = {**dict(self.head.named_parameters()), **self._leaves}
        head = partial(F.linear, weight=weights["weight"], bias=weights.get("bias"))
        by_hidden = hidden.requires_grad
        total, d_hidden = hidden.new_zeros((), dtype=torch.float32), []
        for rows, targets in self._chunks(hidden.detach(), labels):
            inputs = [rows.requires_grad_(by_hidden)] if by_hidden else []
            inputs += self._leaves.values()
            # an outer checkpoint or offload has no business with what is gone at the end of the chunk
            with saved_tensors_hooks(lambda x: x, lambda x: x):
                loss = _chunk_loss(self.model, head, rows, targets)
                found: list[Any] = list(torch.autograd.grad(loss, inputs, allow_unused=True)) if inputs else []
            total += loss.detach()
            if by_hidden:
                d_hidden.append(found.pop(0))
            for name, gradient in zip(self._leaves, found, strict=True):
                if gradient is not None:
                    # in bfloat16 every chunk of a long text would add its rounding
                    precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                    seen = self._d_weights.get(name)
                    self._d_weights[name] = precise if seen is None else seen.add_(precise)
        return total, torch.cat(d_hidden) if by_hidden else None


def _chunk_loss(model: PreTrainedModel, head: Callable[..., Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    with record_function("hmt.head"):
        logits = apply_head(model, hidden, head).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


class _Known(torch.autograd.Function):
    """A value whose gradients by the inputs are already there."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of hmt's loss cannot be differentiated again: leave create_graph out")
        return None, None, *(None if g is None else g * d_value for g in ctx.saved_tensors)


def _gradient_can_be_formed(head: nn.Module, hidden: Tensor) -> bool:
    """Whether the head is what it seems, and nothing wants to see its backward pass or to change its weights before."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if is_autocast_enabled(kind) else hidden.dtype
    if dtype == torch.float16 or torch.compiler.is_compiling() or torch.nn.modules.module._has_any_global_hook():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        return False
    return is_plain_linear(head)
