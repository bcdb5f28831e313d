"""Checks of what users pass to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hmt.config import HMTConfig
from hmt.outputs import SegmentResult
from hmt.state import HMTState
from hmt_kernels.finite import check_finite


def check_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    logits_to_keep: int | None = None,
    state: HMTState | Sequence[HMTState] | None = None,
    unknown: dict[str, Any] | None = None,
) -> None:
    """Raise a ValueError or TypeError that names the first argument that cannot be used, and what it should be."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be an integer tensor [B, T], got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be an integer tensor [B, T], got {input_ids.dtype} {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids must hold at least one token, got none: {tuple(input_ids.shape)}")
    for name, value in (("attention_mask", attention_mask), ("labels", labels), ("shift_labels", shift_labels)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [B, T], got {type(value).__name__}")
        if name != "attention_mask" and value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}")
        if name == "attention_mask" and value.device != input_ids.device:
            raise ValueError(f"{name} must be on the device {input_ids.device} of input_ids, got {value.device}")
        if value.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape {tuple(input_ids.shape)} of input_ids, got {tuple(value.shape)}"
            )
    if logits_to_keep is not None and (not isinstance(logits_to_keep, int) or logits_to_keep < 0):
        raise ValueError(f"logits_to_keep must be an integer >= 0 or None, got {logits_to_keep!r}")
    if isinstance(state, (list, tuple)):
        refused = {"labels": labels, "shift_labels": shift_labels}
        used = [name for name, value in refused.items() if value is not None]
        if used or not logits_to_keep:
            raise ValueError(
                f"a list of states needs logits_to_keep >= 1 and takes no labels, got logits_to_keep={logits_to_keep} "
                f"and {', '.join(used) or 'no labels'}"
            )
    elif state is not None and not isinstance(state, HMTState):
        raise TypeError(f"state must be an HMTState, got {type(state).__name__}")
    elif state is not None and state.batch_size != input_ids.shape[0]:
        raise ValueError(f"state has {state.batch_size} rows, but input_ids has {input_ids.shape[0]}")
    used = [name for name, value in (unknown or {}).items() if value is not None and value is not False]
    used = [name for name in used if name != "return_dict"]
    if used:
        raise TypeError(f"HMTForCausalLM.forward does not take {', '.join(used)}")


def check_state(state: HMTState, config: HMTConfig, device: torch.device) -> None:
    """Raise a ValueError that says why a state, maybe of another model or from another machine, cannot be continued."""
    expected = {"hmt": None, "rmt": 1, "baseline": 0}[config.mode]
    size, width = (0, None) if state.queue is None else state.queue.shape[1:]
    if size != expected and (expected is not None or not size):
        raise ValueError(f"state has a queue of {size} memories, which is not how mode {config.mode!r} remembers")
    if width not in (None, config.hidden_size):
        raise ValueError(f"state has memories of width {width}, but the model's embeddings have {config.hidden_size}")
    if state.num_open >= config.segment_length:
        raise ValueError(
            f"state has {state.num_open} tokens in its open segment, but the model's segments have "
            f"{config.segment_length}: continue it with the segment_length that it was made with"
        )
    summarised = config.summary_length if config.summarises_previous else 0
    if state.num_closed and state.recent.length < summarised:
        raise ValueError(
            f"state keeps the last {state.recent.length} tokens of its latest segment, but the model summarises "
            f"{summarised} of them: continue it with the summary_source and summary_fraction that it was made with"
        )
    where = state.open.ids.device
    if where != device:
        raise ValueError(f"state is on {where}, but input_ids on {device}: move it with state.to({str(device)!r})")


def check_values(model: PreTrainedModel, ids: Sequence[Tensor], states: Sequence[HMTState]) -> None:
    """Raise a ValueError for weights or memories that are not finite, or ids outside of the vocabulary (`checking`)."""
    for name, parameter in model.named_parameters():
        check_finite(f"the weight {name}", parameter)
    for state in states:
        check_finite("state.queue", state.queue)
    vocab_size = len(cast(Tensor, model.get_input_embeddings().weight))
    for tokens in ids:
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"input_ids must lie from 0 to {vocab_size - 1}, got {int(tokens.min())} to {int(tokens.max())}"
            )


def check_result(result: SegmentResult) -> None:
    """Raise a ValueError for a segment whose hidden states or memory are not finite (`checking`)."""
    number = result.state.num_closed - (result.state.num_open == 0)
    check_finite(f"the recalled memory of segment {number}", result.recalled)
    check_finite(f"what the backbone makes of segment {number}", result.hidden)
    check_finite(f"the memory of segment {number}", result.memory)
