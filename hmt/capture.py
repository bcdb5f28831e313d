"""CUDA graphs of a model: how one is captured, whether one can be, and what it does not look at again when replayed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hmt.backbone import unwrap
from hmt_kernels.dispatch import selected

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM

WARM_UPS = 3
USES_BEFORE = 4  # of a shape, before a model that decides by itself captures it: a capture costs about as much


def captured(step: Callable[[], object], pool: Any = None) -> Callable[[], None]:
    """The step as a replayed CUDA graph; what it reads and writes must lie where it lies now."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def why_not(model: HMTForCausalLM) -> str | None:
    """Why no pass of this model can be captured (None: one can), as far as a look at its modules tells."""
    config = model.config
    if config.cuda_graphs is None and not config.compile_step and model.device.type != "cuda":
        return "there is nothing to capture on a CPU"
    if torch.compiler.is_compiling() or (model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return "it is being compiled or captured itself"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast keeps casts of the weights, which a graph would go on reading"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "adapter_layer_names"):
            return "a module has hooks or adapters, which may do something else at every call"
        if hasattr(module, "_hf_hook"):
            return "accelerate moves weights to the device at every call"
        if module.training and isinstance(module, nn.Dropout) and module.p:
            return "dropout draws anew at every call"
    backbone = unwrap(model.backbone)
    if model.training and getattr(backbone.config, "attention_dropout", 0.0):
        return "dropout draws anew at every call"
    if model.training and getattr(backbone, "is_gradient_checkpointing", False):
        return "the backbone checkpoints its layers, which looks at the random number generator"
    if any(type(p) not in (torch.Tensor, nn.Parameter) for p in model.parameters()):
        return "parameters are sharded or of another kind"
    return None


def dependencies(model: HMTForCausalLM) -> tuple[Any, ...]:
    """What a captured pass does not look at again: where all weights lie, and how the layers compute."""
    config = model.config
    attention = unwrap(model.backbone).config._attn_implementation
    scale = model.recall.softmax_scale if config.mode == "hmt" else None
    how = (model.training, attention, selected(), scale)
    shape = (config.segment_length, config.num_sensory, config.cuda_graphs, config.compile_step)
    weights = chain(model.parameters(), model.buffers())
    return (*how, *shape, *((w.data_ptr(), w.dtype, w.shape, w.stride(), w.requires_grad) for w in weights))
