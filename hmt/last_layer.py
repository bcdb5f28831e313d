"""The last decoder layer for the last rows only: no other position is read after it.

A summary pass needs the final hidden state of one position, the main pass those of the segment and its trailing memory
slot. Keys and values of the last layer still come from all positions; queries, the output projection and the MLP only
from those. Like `fuse_rotary` this replaces `forward` on one layer object, and only where the layer is known.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hmt.attention import NAME
from hmt.rotary import attention_of, implementation_of, is_fused, is_replaced, layers_of, maker

# x + self_attn(input_layernorm(x)), then the same with post_attention_layernorm and mlp
_KNOWN = (
    "llama.modeling_llama.LlamaDecoderLayer",
    "mistral.modeling_mistral.MistralDecoderLayer",
    "qwen2.modeling_qwen2.Qwen2DecoderLayer",
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeDecoderLayer",
    "qwen3.modeling_qwen3.Qwen3DecoderLayer",
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeDecoderLayer",
)


def shorten(model: PreTrainedModel) -> None:
    """Let the last layer obey `last_rows=n` of a forward pass, where its structure allows that; else change nothing."""
    layers = layers_of(model)
    if layers and "forward" not in vars(layers[-1]) and maker(layers[-1]) in _KNOWN:
        layer: Any = layers[-1]
        layer.forward = functools.partial(_forward, layer)


def restore(model: PreTrainedModel) -> None:
    """Undo `shorten`."""
    for layer in layers_of(model):
        if _is_shortened(layer):
            del layer.forward  # type: ignore[attr-defined]


def takes_last_rows(model: PreTrainedModel) -> bool:
    """Whether a pass with `last_rows=n` returns the last n rows, having computed little else in the last layer."""
    layers = layers_of(model)
    if not layers or not _is_shortened(layers[-1]) or implementation_of(model) != NAME:
        return False
    attention = attention_of(layers[-1])
    return attention is not None and is_fused(attention)


def _is_shortened(layer: Any) -> bool:
    return is_replaced(layer, _forward)


def _forward(layer: Any, hidden_states: Tensor, *args: Any, last_rows: int | None = None, **kwargs: Any) -> Tensor:
    """The layer's output [B, T, d], or its last `last_rows` rows."""
    # the class's own forward is what checkpoints
    checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    if last_rows is None or args or checkpointed:
        hidden = type(layer).forward(layer, hidden_states, *args, **kwargs)
        return hidden if last_rows is None else hidden[:, -last_rows:]
    # all rows come back where the operator cannot take the call
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), query_rows=last_rows, **kwargs)
    hidden = hidden_states[:, -last_rows:] + attended[:, -last_rows:]
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
