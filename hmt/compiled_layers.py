"""Decoder layers compiled one by one: what torch.compile makes of the first one serves all layers of its kind.

Like `hmt.last_layer` this replaces `forward` on single layer objects. Norms, rotary embedding and activation become one
kernel each, and less is kept for the backward pass. A layer that reads into a key/value cache runs as it is: the length
of a cache changes with every token.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hmt.rotary import attention_of, is_fused, is_replaced


def compile_layers(model: PreTrainedModel) -> None:
    """Let every layer be compiled at its first use, but for a shortened last one; `restore` undoes it.

    Raises:
        ValueError: a model without layers that transformers marks as such.
    """
    # the first version that fits, not the latest used: recomputing a segment must take that of its forward pass
    torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"compile_layers must be false for {type(model).__name__}: it marks no layers as such")
    for layer in layers:
        if "forward" not in vars(layer):
            if (attention := attention_of(layer)) is not None and is_fused(attention):
                del attention.forward  # a replaced forward ties what is compiled to its own layer
            layer.forward = functools.partial(_forward, layer)


def restore(model: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    for module in model.modules():
        if is_replaced(module, _forward):
            del module.forward


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """What the layer's class computes, compiled where that can be used again."""
    if _goes_uncompiled(layer, (*args, *kwargs.values())):
        return _run(layer, *args, **kwargs)
    kind: Any = type(layer)
    return _compiled(kind, layer.training, torch.is_grad_enabled())(layer, *args, **kwargs)


def _run(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _goes_uncompiled(layer: Any, inputs: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or any(isinstance(value, Cache) for value in inputs):
        return True
    if layer.training and layer.gradient_checkpointing:
        return True
    attention = attention_of(layer)
    return attention is not None and is_fused(attention)


@functools.cache
def _compiled(kind: type, training: bool, records_gradients: bool) -> Callable[..., Any]:
    """`_run` for layers of one kind; torch.compile counts the versions that it keeps for each function's code."""
    code = _run.__code__.replace(co_name=f"{kind.__name__}_forward")
    return torch.compile(types.FunctionType(code, _run.__globals__))
