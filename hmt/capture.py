"""CUDA graphs of a model: how one is captured, whether one can be, and what it does not look at again when replayed."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hmt.backbone import unwrap
from hmt_kernels.autocast import is_autocast_enabled
from hmt_kernels.dispatch import selected

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM

DEVICES = ("cuda",)  # that something can be captured on
WARM_UPS = 3
USES_BEFORE = 4  # of a shape, before a model that decides by itself captures it: a capture costs about as much


_capturing = threading.Lock()  # one capture at a time in a process


def captured(
    step: Callable[[], object], device: torch.device, pool: Any = None, side: torch.cuda.Stream | None = None
) -> Callable[[], object]:
    """The step as a replayed CUDA graph; what it reads and writes must lie where it lies now. On a CPU, the step.

    It is captured on the stream `side`, one for all graphs of a pool: memory of a pool belongs to a stream. So does the
    workspace of cuBLAS, which graphs of different models, that may run at the same time, had better not share.
    """
    if device.type != "cuda":
        return step
    current = torch.cuda.current_stream(device)
    # the outer stream comes back in any case: a capture that fails leaves its own behind
    with _capturing, torch.cuda.device(device), torch.cuda.stream(current):
        side = side or torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with _recording(graph, pool, side):
                step()
        except RuntimeError:
            # PyTorch's generator of random numbers stays in the capture that has failed, until another one ends
            with _recording(torch.cuda.CUDAGraph(), None, side):
                torch.zeros((), device=device)
            raise
    return graph.replay


def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Any:
    # other threads, such as one that pins a loader's batches, may go on allocating meanwhile
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


class Turn(contextlib.AbstractContextManager[None]):
    """Graphs that share buffers or memory run one after another, whatever threads and streams they are run from.

    They are captured on the stream `side`.
    """

    def __init__(self, device: torch.device, side: torch.cuda.Stream | None = None) -> None:
        self.device, self.side = device, side
        self._lock = threading.Lock()
        self._last: torch.cuda.Stream | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self.device.type != "cuda":
            return
        try:
            stream = torch.cuda.current_stream(self.device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *error: object) -> None:
        self._lock.release()


_sides: WeakKeyDictionary[HMTForCausalLM, dict[torch.device, torch.cuda.Stream]] = WeakKeyDictionary()


def turn_of(model: HMTForCausalLM, device: torch.device) -> Turn:
    """A turn whose graphs are captured on the model's own stream of a device."""
    if device.type != "cuda":
        return Turn(device)
    sides = _sides.setdefault(model, {})
    if device not in sides:
        sides[device] = torch.cuda.Stream(device)
    return Turn(device, sides[device])


@contextlib.contextmanager
def to_be_captured() -> Iterator[None]:
    """For what is made in here: buffers that any later call may write to, and autocast's casts as part of the graph."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        # nor do the caller's hooks see what is saved: a checkpoint would run the model again
        with torch.inference_mode(False), torch.no_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
            yield
    finally:
        torch.set_autocast_cache_enabled(kept)


@contextlib.contextmanager
def static_checkpoints(layers: nn.Module) -> Iterator[None]:
    """For passes that draw nothing: layers that are checkpointed do not look at the generator, as a capture demands."""
    checkpointed: list[Any] = [
        module for module in layers.modules() if getattr(module, "gradient_checkpointing", False)
    ]
    kept = [module._gradient_checkpointing_func for module in checkpointed]
    for module in checkpointed:
        module._gradient_checkpointing_func = _static_checkpoint
    try:
        yield
    finally:
        for module, function in zip(checkpointed, kept, strict=True):
            module._gradient_checkpointing_func = function


_static_checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Drawing:
    """Whether random numbers have been drawn since: a replay would draw others than a recomputation, or none anew."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, self._states(device)

    @staticmethod
    def _states(device: torch.device) -> list[torch.Tensor]:
        of_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), *of_device]

    def undone(self) -> bool:
        """Whether there were any; the generators stand where they stood then."""
        if all(map(torch.equal, self._before, self._states(self.device))):
            return False
        torch.set_rng_state(self._before[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self._before[1], self.device)
        return True


class Look(NamedTuple):
    """What a look at a model tells, once per call."""

    reason: str | None  # why no pass of it can be captured; None: one can
    # what a captured pass does not look at again: how layers compute, and where the weights lie
    dependencies: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())


def look(model: HMTForCausalLM) -> Look:
    """Whether passes of this model can be captured, and what captured ones depend on."""
    reason = not_here(model)
    if reason is not None:
        return Look(reason)
    config, kind, backbone = model.config, model.device.type, unwrap(model.backbone)
    if model.training and getattr(backbone.config, "attention_dropout", 0.0):
        return Look("dropout draws anew at every call")
    autocast = is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    scale = model.recall.softmax_scale if config.mode == "hmt" else None
    found: list[Any] = [model.training, backbone.config._attn_implementation, selected(), scale, autocast]
    layers = getattr(backbone.config, "num_hidden_layers", None)
    found += [config.segment_length, config.num_sensory, config.cuda_graphs, layers]
    lie: list[Any] = []
    # one walk, without the generators of nn.Module: on a GPU a segment takes less time than theirs
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        parts = vars(module)
        if (reason := _why_not(module, parts)) is not None:
            return Look(reason)
        if parts.get("gradient_checkpointing"):
            found.append("checkpointed")
        if "forward" in parts and module is not model:  # whose own would keep it alive, and is not what is captured
            found.append(parts["forward"])
        for w in (*parts["_parameters"].values(), *parts["_buffers"].values()):
            if w is not None:
                if type(w) not in (torch.Tensor, nn.Parameter):
                    return Look("parameters are sharded or of another kind")
                found.append(w.requires_grad)
                lie.append((w.data_ptr(), w.dtype, w.shape, w.stride()))
        waiting += [child for child in parts["_modules"].values() if child is not None]
    return Look(None, (tuple(found), tuple(lie)))


def is_over(model: HMTForCausalLM) -> bool:
    """Whether graphs that this model may have are of no use any more: their memory is given back."""
    return model.config.cuda_graphs is False or model.device.type not in DEVICES


def not_here(model: HMTForCausalLM) -> str | None:
    """Why nothing of this model is captured here and now, whatever its modules are."""
    config, kind = model.config, model.device.type
    if config.cuda_graphs is False:
        return "cuda_graphs is false"
    if kind not in DEVICES or (config.cuda_graphs is None and kind != "cuda"):
        return f"nothing is captured on {kind}"
    if torch.compiler.is_compiling() or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
        return "it is being compiled or captured itself"
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        return "torch.func transforms it"
    if torch.is_anomaly_enabled():
        return "the detection of anomalies looks at values"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks of all modules"
    return None


def _why_not(module: nn.Module, parts: dict[str, Any]) -> str | None:
    kind: Any = type(module)
    forward_hooks = parts["_forward_pre_hooks"] or not all(map(_is_harmless, parts["_forward_hooks"].values()))
    if forward_hooks or parts["_backward_hooks"] or parts["_backward_pre_hooks"] or _has_adapters(kind):
        return "a module has hooks or adapters, which may do something else at every call"
    if "_hf_hook" in parts:
        return "accelerate moves weights to the device at every call"
    if parts["training"] and isinstance(module, nn.Dropout) and module.p:
        return "dropout draws anew at every call"
    return None


def _is_harmless(hook: Any) -> bool:
    """Whether it is the one that transformers adds to the embeddings of a model that checkpoints its layers."""
    return getattr(hook, "__name__", "") == "make_inputs_require_grads"


@functools.cache
def _has_adapters(kind: Any) -> bool:
    """Whether modules of this class are PEFT's."""
    return hasattr(kind, "adapter_layer_names")
