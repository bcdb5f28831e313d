"""CUDA graphs of a model: how one is captured, whether one can be, and what it does not look at again when replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hmt.backbone import unwrap
from hmt_kernels.autocast import is_autocast_enabled
from hmt_kernels.dispatch import selected

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM

WARM_UPS = 3
USES_BEFORE = 4  # of a shape, before a model that decides by itself captures it: a capture costs about as much


def captured(step: Callable[[], object], device: torch.device, pool: Any = None) -> Callable[[], object]:
    """The step as a replayed CUDA graph; what it reads and writes must lie where it lies now. On a CPU, the step."""
    if device.type != "cuda":
        return step
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


@contextlib.contextmanager
def to_be_captured() -> Iterator[None]:
    """For what is made in here: buffers that any later call may write to, and autocast's casts as part of the graph."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def why_not(model: HMTForCausalLM) -> str | None:
    """Why no pass of this model can be captured (None: one can), as far as a look at its modules tells."""
    config = model.config
    if config.cuda_graphs is None and not config.compile_step and model.device.type != "cuda":
        return "there is nothing to capture on a CPU"
    if torch.compiler.is_compiling() or (model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return "it is being compiled or captured itself"
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
    config, kind = model.config, model.device.type
    autocast = is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    attention = unwrap(model.backbone).config._attn_implementation
    scale = model.recall.softmax_scale if config.mode == "hmt" else None
    how = (model.training, attention, selected(), scale, autocast)
    shape = (config.segment_length, config.num_sensory, config.cuda_graphs, config.compile_step)
    weights = chain(model.parameters(), model.buffers())
    return (*how, *shape, *((w.data_ptr(), w.dtype, w.shape, w.stride(), w.requires_grad) for w in weights))
