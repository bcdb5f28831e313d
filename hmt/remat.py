"""Training memory: activations are recomputed segment by segment, so that only one segment's are held at any depth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def offloaded(on: bool) -> contextlib.AbstractContextManager[Any]:
    """What is saved for the backward pass inside this context waits for it in CPU memory (pinned with a GPU)."""
    return save_on_cpu(pin_memory=torch.cuda.is_available()) if on else contextlib.nullcontext()


def rematerialized(function: Callable[..., Any], *inputs: Tensor | None, offload: bool = False) -> Any:
    """function(*inputs), keeping only the inputs; the backward pass runs it again, with the same dropout.

    Whatever else `function` refers to stays alive until then, so large tensors belong into `inputs`.
    """
    with offloaded(offload):
        return checkpoint(function, *inputs, use_reentrant=False)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """In training mode, recompute each layer from its input too: one layer's activations are held at a time."""
    # newer versions of transformers warn of the second name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
