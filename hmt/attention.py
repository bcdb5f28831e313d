"""attn_implementation="hmt": segment_attention as an attention function of transformers, with its own mask function.

The mask function never materialises what the operator computes by itself: no mask for plain causal attention, an int32
tensor for one run of padding (`pad_span`) and for a sliding window, and a boolean mask [B, 1, Tq, Tk], which SDPA then
handles, for anything else. The int32 tensor is [B, 1 or 2, 1, 0 or 2]: 2 in the second place tells of a window, in the
last of a span. It has four dimensions because transformers takes a tensor of two for the padding mask itself when
generate() prepares masks ahead of the model. A caller that knows its padding passes the
int32 tensor itself: then nobody looks at the values of masks or positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from hmt.tokens import hidden_run
from hmt_kernels import segment_attention
from hmt_kernels.autocast import is_autocast_enabled

NAME = "hmt"


def pad_span_of(mask: Tensor) -> Tensor | None:
    """Half-open hidden key range [B, 2] int32 of a boolean mask [B, T], or None when a row hides more than one run."""
    span, single = hidden_run(mask)
    return span if bool(single) else None


def hmt_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Smallest description of the mask that transformers asks for: None, an int32 description or a boolean mask."""
    config = kwargs.get("config")
    windowed = local_size is not None and local_size == getattr(config, "sliding_window", None)
    plain = allow_is_causal_skip and (mask_function is causal_mask_function or windowed)
    # the keys must end with the queries' own, which a static cache does not guarantee
    aligned = not isinstance(q_offset, Tensor) and kv_offset + kv_length == q_offset + q_length
    if plain and aligned:
        nothing = torch.empty(batch_size, 2, 1, 0, dtype=torch.int32, device=kwargs.get("device")) if windowed else None
        if attention_mask is None:
            return nothing
        visible = attention_mask[:, kv_offset : kv_offset + kv_length]
        if visible.shape[1] == kv_length and _host_can_read(visible):
            if bool(visible.all()):
                return nothing
            span = pad_span_of(visible)
            if span is not None:
                return span[:, None, None].expand(-1, 1 + windowed, -1, -1)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )


def _host_can_read(mask: Tensor) -> bool:
    """Whether its values may be looked at here: neither compiled nor captured code can do that."""
    capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (capturing or torch.compiler.is_compiling())


def hmt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of q [B, Hq, Tq, D] over k, v [B, Hkv, Tk, D] by `segment_attention`, as [B, Tq, Hq, D].

    Dropout, non-causal layers, position biases, dense masks and values of another width than keys are computed by
    transformers' SDPA function instead.

    Raises:
        ValueError: for a soft cap on the scores or attention sinks, which neither can compute.
    """
    for name, what in (("softcap", "a soft cap on attention scores"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="hmt" does not support {what}: use attn_implementation="eager"')
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    pad_span = None
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        pad_span, sliding_window = read_mask(module, attention_mask, sliding_window)
        attention_mask = None
    narrow = value.shape[3] != key.shape[3]  # multi-head latent attention
    if attention_mask is not None or dropout or not causal or "position_bias" in kwargs or narrow:
        plain = query.shape[2] == key.shape[2] and pad_span is None and sliding_window is None
        if attention_mask is None and causal and not plain:
            attention_mask = _dense_mask(query, key, pad_span, sliding_window)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    query, key, value = as_autocast(query, key, value)
    key, value = key.to(query.dtype), value.to(query.dtype)  # of a cache that was filled in another dtype
    out = segment_attention(query, key, value, pad_span=pad_span, window_size=sliding_window, softmax_scale=scaling)
    return cast(Tensor, out).transpose(1, 2).contiguous(), None


def read_mask(module: Any, mask: Tensor, window_size: int | None) -> tuple[Tensor | None, int | None]:
    """pad_span [B, 2] and window of an int32 mask; some layers do not say themselves that they have a window."""
    if window_size is None and mask.shape[1] == 2:
        window_size = module.config.sliding_window
    return mask[:, 0, 0] if mask.shape[3] else None, window_size


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that torch.autocast gives SDPA; rotary tables in float32 raise q and k, but not v."""
    device_type = tensors[0].device.type
    if not is_autocast_enabled(device_type):
        return tensors
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _dense_mask(query: Tensor, key: Tensor, pad_span: Tensor | None, window_size: int | None) -> Tensor:
    rows = torch.arange(query.shape[2], device=query.device)[:, None] + key.shape[2] - query.shape[2]
    columns = torch.arange(key.shape[2], device=query.device)[None, :]
    mask = columns <= rows
    if window_size is not None:
        mask = mask & (columns > rows - window_size)
    mask = mask[None, None]
    if pad_span is not None:
        start, stop = (x[:, None, None, None] for x in pad_span.unbind(1))
        mask = mask & ((columns < start) | (columns >= stop))
    return mask


def register() -> None:
    """Make attn_implementation="hmt" known to transformers; `import hmt` does it."""
    AttentionInterface.register(NAME, hmt_attention)
    AttentionMaskInterface.register(NAME, hmt_mask)
