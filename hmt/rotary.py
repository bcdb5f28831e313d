"""Rotary embedding inside `segment_attention`: a patch of single attention layers, never of their class.

transformers rotates queries and keys before it calls an attention function. `fuse_rotary` replaces `forward` on each
attention layer of a model by one that hands un-rotated queries and keys, and the rotary tables, to the operator. The
module tree and the state_dict stay as they are; submodules are called, so hooks and LoRA layers keep working. Where
the operator cannot take the whole call (a cache, which holds rotated keys; dropout; a dense mask; another
attn_implementation), the layer's own forward runs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hmt.attention import NAME, as_autocast, read_mask
from hmt_kernels import segment_attention

# kinds of caches, and arguments with which `hmt_attention` does not call the operator
_ELSEWHERE = ("cache", "past_key_values", "layer_past", "is_causal", "softcap", "position_bias")


class Family(NamedTuple):
    """What attention layers of one make do around the attention itself."""

    project: Callable[[nn.Module, Tensor, int | None], tuple[Tensor, Tensor, Tensor]]
    output: str  # name of the output projection
    window_size: Callable[[nn.Module], int | None]


def _separate(attention: Any, hidden: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q_proj, k_proj, v_proj of hidden [B, T, d] as q [B, T or rows, Hq, D] and k, v [B, T, Hkv, D], q and k normed."""
    heads = (-1, attention.head_dim)
    last = hidden if rows is None else hidden[:, -rows:]
    q, k, v = attention.q_proj(last), attention.k_proj(hidden), attention.v_proj(hidden)
    q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def _packed(attention: Any, hidden: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """All query heads, then all key heads, then all value heads, from one projection."""
    q_heads, kv_heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
    qkv = attention.qkv_proj(hidden).unflatten(-1, (-1, attention.head_dim))
    q, k, v = qkv.split((q_heads, kv_heads, kv_heads), dim=2)
    return q if rows is None else q[:, -rows:], k, v


def _packed_by_head(attention: Any, hidden: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the first head, then of the second, from one projection."""
    qkv = attention.query_key_value(hidden).unflatten(-1, (-1, 3 * attention.head_size))
    q, k, v = qkv.chunk(3, dim=-1)
    return q if rows is None else q[:, -rows:], k, v


def _no_window(attention: Any) -> int | None:
    return None


def _own_window(attention: Any) -> int | None:
    return attention.sliding_window


def _model_window(attention: Any) -> int | None:
    return attention.config.sliding_window


# by the function that a layer's class calls forward: a subclass that changes it is not known
_KNOWN = {
    "llama.modeling_llama.LlamaAttention": Family(_separate, "o_proj", _no_window),
    "granite.modeling_granite.GraniteAttention": Family(_separate, "o_proj", _no_window),
    "mistral.modeling_mistral.MistralAttention": Family(_separate, "o_proj", _model_window),
    "mixtral.modeling_mixtral.MixtralAttention": Family(_separate, "o_proj", _model_window),
    "qwen2.modeling_qwen2.Qwen2Attention": Family(_separate, "o_proj", _own_window),
    # whose window only the mask knows
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeAttention": Family(_separate, "o_proj", _no_window),
    "qwen3.modeling_qwen3.Qwen3Attention": Family(_separate, "o_proj", _own_window),
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention": Family(_separate, "o_proj", _own_window),
    "phi3.modeling_phi3.Phi3Attention": Family(_packed, "o_proj", _model_window),
    "gpt_neox.modeling_gpt_neox.GPTNeoXAttention": Family(_packed_by_head, "dense", _no_window),
}


def maker(module: nn.Module) -> str:
    """Which class of transformers' models wrote the forward of a module, as `_KNOWN` spells it."""
    function = inspect.unwrap(type(module).forward)
    name = f"{function.__module__}.{function.__qualname__}".removesuffix(".forward")
    return name.removeprefix("transformers.models.")


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers that a model runs; empty where it does not keep them as most models do."""
    model = cast(Any, model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    while model.base_model is not model:
        model = model.base_model
    layers = getattr(model, "layers", None)
    return list(layers[: model.config.num_hidden_layers]) if hasattr(model, "rotary_emb") and layers else []


def attention_of(layer: nn.Module) -> nn.Module | None:
    return getattr(layer, "self_attn", getattr(layer, "attention", None))


def why_not(model: PreTrainedModel) -> str | None:
    """Why the rotary embedding of a model cannot move into the operator; None if it can."""
    layers = layers_of(model)
    if not layers:
        return f"{type(model).__name__} hands no rotary tables to a list of decoder layers"
    for attention in map(attention_of, layers):
        if attention is None:
            return f"a {type(layers[0]).__name__} of {type(model).__name__} has no attention layer"
        reason = _why_not_layer(attention)
        if reason is not None:
            return reason
    return None


def _why_not_layer(attention: nn.Module) -> str | None:
    name = type(attention).__name__
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its attention scores, which segment_attention does not"
    module = sys.modules[inspect.unwrap(type(attention).forward).__module__]
    if _is_interleaved(module):
        return f"{name} rotates neighbouring features, segment_attention those half a head apart"
    if maker(attention) not in _KNOWN:
        known = ", ".join(key.rpartition(".")[2] for key in _KNOWN)
        return f"{name} is not one of the attention layers whose forward is known: {known}"
    if "forward" in vars(attention) and not is_fused(attention):
        return f"the forward of a {name} has been replaced already, on the layer itself"
    return None


def _is_interleaved(module: Any) -> bool:
    rotate_half = getattr(module, "rotate_half", None)
    if rotate_half is None:
        return False
    # on the CPU by name: models are also built on the meta device
    rotated = rotate_half(torch.arange(4.0, device="cpu"))
    return rotated.tolist() != [-2.0, -3.0, 0.0, 1.0]


def is_fused(attention: nn.Module) -> bool:
    """Whether `fuse_rotary` has replaced the forward of this layer."""
    return is_replaced(attention, _forward)


def is_replaced(module: nn.Module, function: Callable[..., Any]) -> bool:
    """Whether the forward of this module, not of its class, is a partial of `function`."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is function


def fuse_rotary(model: PreTrainedModel, *, everywhere: bool = False) -> None:
    """Let `segment_attention` apply the rotary embedding of a model with attn_implementation="hmt".

    Changes nothing but the `forward` attribute of each attention layer; `unfuse_rotary` undoes it. Layers like
    Llama's, Granite's, Mistral's, Mixtral's, Qwen2's, Qwen3's, Phi-3's, GPT-NeoX's are known. Passes with a key/value
    cache rotate as before. torch.nn.DataParallel does not replicate such a model (DistributedDataParallel does).

    Args:
        model: a transformers model, plain, inside an HMT, or with PEFT layers.
        everywhere: also on the CPU, where no kernel rotates and nothing is gained.

    Raises:
        ValueError: a model whose rotary embedding cannot move, with the reason. It is left unchanged.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="hmt")
        >>> hmt.fuse_rotary(model)
    """
    reason = why_not(model)
    if reason is None and (used := implementation_of(model)) != NAME:
        reason = f"attn_implementation must be {NAME!r}, got {used!r}"
    if reason is not None:
        raise ValueError(f"rotary embedding cannot be fused: {reason}")
    install(model, everywhere)


def install(model: PreTrainedModel, everywhere: bool) -> None:
    """Replace the forward of every attention layer of a model that `why_not` has nothing against."""
    for layer in layers_of(model):
        attention: Any = attention_of(layer)
        # a partial rather than a bound method: copied and pickled with its layer, it refers to the copy
        attention.forward = functools.partial(_forward, attention, _KNOWN[maker(attention)], everywhere)


def unfuse_rotary(model: PreTrainedModel) -> None:
    """Undo `fuse_rotary`; a model that is not fused stays as it is.

    Raises:
        RuntimeError: something else has replaced the forward of a fused layer since; nothing is undone then.
    """
    fused = []
    for attention in map(attention_of, layers_of(model)):
        if attention is not None and is_fused(attention):
            fused.append(attention)
        elif attention is not None and _wraps_fused(vars(attention).get("forward")):
            raise RuntimeError(f"the forward of a fused {type(attention).__name__} has been wrapped: unwrap it first")
    for attention in fused:
        del attention.forward


def _wraps_fused(forward: Any) -> bool:
    while (forward := getattr(forward, "__wrapped__", None)) is not None:
        if isinstance(forward, functools.partial) and forward.func is _forward:
            return True
    return False


def implementation_of(model: PreTrainedModel) -> str:
    """The attn_implementation that the layers of a model obey."""
    attention: Any = attention_of(layers_of(model)[0])
    return attention.config._attn_implementation


def _forward(
    attention: Any,
    family: Family,
    everywhere: bool,
    hidden_states: Tensor,
    *args: Any,
    query_rows: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of hidden_states [B, T, d] with its projections; of the last `query_rows` rows only, where it can."""
    wanted = everywhere or query_rows is not None or hidden_states.is_cuda
    if args or not wanted or not _takes(attention, kwargs):
        return type(attention).forward(attention, hidden_states, *args, **kwargs)
    q, k, v = family.project(attention, hidden_states, query_rows)
    q, k, v = as_autocast(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    cos, sin = kwargs["position_embeddings"]
    pad_span, window_size, mask = None, family.window_size(attention), kwargs.get("attention_mask")
    if mask is not None:
        pad_span, window_size = read_mask(attention, mask, window_size)
    out = segment_attention(
        q, k, v, cos=cos, sin=sin, pad_span=pad_span, window_size=window_size, softmax_scale=attention.scaling
    )
    return getattr(attention, family.output)(cast(Tensor, out).transpose(1, 2).flatten(2)), None


def _takes(attention: Any, kwargs: dict[str, Any]) -> bool:
    """Whether `hmt_attention` would run the operator, and nothing but rotary embedding stands before it."""
    if attention.config._attn_implementation != NAME or not attention.is_causal:
        return False
    if attention.training and attention.attention_dropout:
        return False
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.dtype != torch.int32:
        return False
    return kwargs.get("position_embeddings") is not None and all(kwargs.get(name) is None for name in _ELSEWHERE)
