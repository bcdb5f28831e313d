"""What the recurrence needs of a causal language model: embed ids, run the layers, apply the head."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hmt import compiled_layers, last_layer, rotary

RECURRENT = frozenset({"conv", "linear_attention", "hybrid", "hybrid_sliding"})  # layer types of transformers
# need a cache of their own class, look into its layers, or keep their states themselves
OWN_CACHES = ("dory", "minimax", "recurrent_gemma", "xlstm")


def unwrap(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM inside a PEFT wrapper (its LoRA layers stay injected), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_weights(model_class: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` that takes no random numbers for weights that the files lack.

    Raises:
        ValueError: weights are missing.
    """
    model, report = model_class.from_pretrained(name, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name!r} must hold all weights of {type(model).__name__}, but lacks {len(missing)}, such as {missing[0]} "
            "(a checkpoint of a LoRA training is there to be resumed; what can be read with is written at its end)"
        )
    return model


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The layers with what is around them, up to the last hidden state: a causal LM without its head."""
    model = unwrap(model)
    inner = model.base_model
    return getattr(model, "model", model) if inner is model else inner  # Llama 4's prefix leads nowhere


def untie_head(model: PreTrainedModel) -> None:
    """Give the LM head weights of its own, equal to those that it shared with the embedding so far."""
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # type: ignore[assignment]


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether weights are not what they were trained as."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None or any(not p.is_floating_point() for p in model.parameters())


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else: no hooks, no LoRA, no other forward, no special weights."""
    parts = vars(module)
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    if type(module) is not nn.Linear or "forward" in parts or any(parts[name] for name in hooks):
        return False
    # a replica of DataParallel holds its weight outside of its parameters
    return "weight" in parts["_parameters"] and all(type(p) in (Tensor, nn.Parameter) for p in module.parameters())


def has_replaced_weights(model: nn.Module) -> bool:
    """Whether torch.func.functional_call has put tensors in the place of parameters, for as long as the call lasts."""
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        return True
    weights = (p for module in model.modules() for p in module._parameters.values() if p is not None)
    return not all(isinstance(p, nn.Parameter) for p in weights)


def embed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Token embeddings E(ids), [B, T] -> [B, T, d]."""
    embeds = model.get_input_embeddings()(ids)
    if model.config.model_type == "falcon_h1":  # scales tokens only, others scale all that enters the layers
        embeds = embeds * model.config.embedding_multiplier
    return embeds


@torch.no_grad()
def known_embeddings(model: PreTrainedModel) -> Tensor:
    """The weights [V, d] of the embedding or, where accelerate has offloaded them, some of its rows."""
    table = cast(Any, model.get_input_embeddings())
    if table.weight.is_meta and hasattr(table, "_hf_hook"):  # which fetches them for a call
        rows = table(torch.arange(min(len(table.weight), 4096)))
        return rows / getattr(table, "scalar_embed_scale", 1.0)
    return table.weight


def run_layers(
    model: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor | None = None,
    cache: Cache | None = None,
    last_rows: int | None = None,
    **kwargs: Any,
) -> Any:
    """The backbone without its LM head on [B, T, d] embeddings; `.last_hidden_state` is taken after the final norm.

    mask [B, past + T] is true where a key may be seen; None means everywhere; an int32 tensor [B, 1, 1, 2] is a hidden
    range of keys, for a backbone that `takes_spans`. Attention is causal in any case. With
    last_rows, `.last_hidden_state` holds that many last positions, and the last layer computes no others if it can.
    """
    if mask is not None and is_recurrent(model):
        return _run_packed(model, embeds, mask, last_rows, **kwargs)
    decoder = decoder_of(model)
    if mask is None and takes_spans(model):
        mask = torch.empty(len(embeds), 1, 1, 0, dtype=torch.int32, device=embeds.device)
    recurrent: Any = cache if cache is not None and is_recurrent(model) else None
    if cache is not None:
        kwargs[cast(str, _cache_argument(type(decoder).forward))] = cache
        if recurrent is not None and takes_positions(model):  # Bamba counts from 0 without
            start = cache.get_seq_length()
            kwargs["position_ids"] = torch.arange(start, start + embeds.shape[1], device=embeds.device)[None]
    if last_rows is not None and last_layer.takes_last_rows(decoder):
        kwargs.update(last_rows=last_rows)
    if recurrent is not None:
        recurrent.whole = False  # until the last layer has gone on
    out = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=cache is not None, **kwargs)
    if last_rows is not None:
        out.last_hidden_state = out.last_hidden_state[:, -last_rows:]
    out.last_hidden_state = out.last_hidden_state.to(embeds.device)  # the layers may be spread over several
    if recurrent is not None:
        recurrent.length, recurrent.whole = recurrent.length + embeds.shape[1], True
    return out


def hidden_states(
    model: PreTrainedModel, embeds: Tensor, mask: Tensor | None, cache: Cache | None, last_rows: int | None
) -> Tensor:
    """What `run_layers` leaves in the last positions, [B, last_rows, d]."""
    return run_layers(model, embeds, mask, cache, last_rows=last_rows).last_hidden_state


def _run_packed(model: PreTrainedModel, embeds: Tensor, mask: Tensor, last_rows: int | None, **kwargs: Any) -> Any:
    """`run_layers` on each row without its hidden positions, which a recurrent state would remember or decay over.

    They go behind the visible ones, where nothing sees them, and what comes out back to where they were.
    """
    order = (~mask).long().argsort(dim=1, stable=True)
    out = run_layers(model, _take(embeds, order), **kwargs)
    back = order.argsort(dim=1)
    out.last_hidden_state = _take(out.last_hidden_state, back)[:, -(last_rows or mask.shape[1]) :]
    if getattr(out, "hidden_states", None) is not None:
        out.hidden_states = tuple(_take(layer, back) for layer in out.hidden_states)
    return out


def _take(rows: Tensor, order: Tensor) -> Tensor:
    """rows [B, T, d] in the order [B, T]."""
    return rows.gather(1, order[..., None].expand(-1, -1, rows.shape[-1]))


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether layers carry a state from position to position (Mamba, RWKV), so that a mask cannot hide one.

    One such layer among others with attention (Qwen3-Next, LFM2) is enough.
    """
    model = unwrap(model)
    layer_types = getattr(model.config, "layer_types", None) or ()
    return bool(getattr(model, "_is_stateful", False)) or not RECURRENT.isdisjoint(layer_types)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def _cache_argument(forward: Callable[..., Any]) -> str | None:
    """What a decoder's forward calls its cache (transformers 5.24 renamed it), None where it takes none."""
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in _parameters(forward)), None)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether positions are the caller's to give."""
    return "position_ids" in _parameters(type(decoder_of(model)).forward)


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the layers can go on from a `Cache` of transformers' own; where not (RWKV, MiniMax), decoding reads its
    open segment again.

    Its recall is then taken from the tokens so far, as with use_cache=False, not from those that opened the segment.
    """
    known = unwrap(model).config.model_type not in OWN_CACHES
    return known and _cache_argument(type(decoder_of(model)).forward) is not None


def takes_spans(model: PreTrainedModel) -> bool:
    """Whether the layers accept a hidden range of keys in place of a mask, which saves a look at the mask's values.

    Only attention "hmt" understands it, where no positions are counted from the mask and no layer has a window, chunks
    or a state.
    """
    model = unwrap(model)
    config = model.config
    if is_recurrent(model) or not {"full_attention"}.issuperset(getattr(config, "layer_types", None) or ()):
        return False
    limited = any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))
    return config._attn_implementation == "hmt" and hasattr(decoder_of(model), "rotary_emb") and not limited


def apply_head(model: PreTrainedModel, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Logits of hidden states, with the scale or soft cap that the backbone's own forward pass would apply.

    `head` computes what the LM head would, with other tensors in place of its weights.
    """
    model = unwrap(model)
    config = model.config
    own = model.get_output_embeddings()
    weight = getattr(own, "weight", hidden)
    weight = weight if isinstance(weight, Tensor) else hidden  # a quantised layer's is a method
    if hidden.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16):
        hidden = hidden.to(weight.dtype)  # Mamba keeps what it adds up in float32
    logits = (head or own)(hidden)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        logits = logits * scale if config.model_type == "hyperclovax" else logits / scale
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if (cap := getattr(config, name, None)) is not None:
            logits = torch.tanh(logits / cap) * cap
    return logits.to(hidden.device)


def patch_layers(model: PreTrainedModel, fused_rotary: bool | None, compiled: bool = False) -> None:
    """Follow `HMTConfig.fused_rotary`: both patches of single layers, or neither; and `HMTConfig.compile_layers`.

    Raises:
        ValueError: True for a model that cannot have them, with the reason.
    """
    compiled_layers.restore(model)
    if fused_rotary is False:
        last_layer.restore(model)
        rotary.unfuse_rotary(model)
    elif fused_rotary:
        rotary.fuse_rotary(model, everywhere=True)
    elif rotary.why_not(model) is None:
        rotary.install(model, everywhere=False)
    if fused_rotary is not False:
        last_layer.shorten(model)
    if compiled:
        if is_recurrent(model):  # a loop over positions would be unrolled
            raise ValueError(f"compile_layers must be false for a recurrent backbone, got {type(model).__name__}")
        compiled_layers.compile_layers(model)
