"""Who reads, scores and trains in the benchmarks of the model layer, each in a process of its own.

All have the same weights. Those that ours is compared with run on transformers' default attention.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks import peer, plain_loop, providers
from benchmarks.model_shape import SEGMENT_LENGTH, build, text
from benchmarks.processes import held_memory, own_process, peak_memory
from benchmarks.providers import register
from benchmarks.sizes import DEVICE
from hmt import HMTForCausalLM
from hmt.remat import checkpoint_layers

OURS = providers.OURS["model"]
BFLOAT16 = f"{OURS}, bfloat16"
GRAPHS, NO_GRAPHS = f"{OURS}, cuda_graphs=True", f"{OURS}, cuda_graphs=False"
COMPILED = f"{OURS}, compile_layers=True"
CHECKPOINTED = f"{GRAPHS}, checkpointed layers"
KEPT = f"{OURS}, rematerialize=False"
PLAIN, DROPPED, PEER = "plain loop", "plain loop, outputs dropped", "HMT-pytorch"
READ_ONLY, TRAIN_ONLY = (BFLOAT16, DROPPED), (KEPT, CHECKPOINTED)
# as slow as the plain loop: of interest for its memory
MEMORY_ONLY = (DROPPED,)
# Per workload a function of token ids [1, T]. It returns "memories" [1, S, d] and, for "score", the "loss"; "train" the
# loss and the direction of the gradient of the first memory p_0, which every segment depends on.
Runners = dict[str, Callable[[Tensor], dict[str, Tensor]]]


class Measured(NamedTuple):
    seconds: float
    peak: int  # bytes
    extra_peak: int  # above what the process held before
    result: dict[str, Any]  # arrays of NumPy: tensors would travel as open files


Run = Callable[[str, int], Measured]


@contextlib.contextmanager
def started(
    name: str, environment: Mapping[str, str] | None = None, length: int = SEGMENT_LENGTH, **settings: Any
) -> Iterator[Run]:
    """Yields run(workload, segments) of a provider in a process of its own, run once on a short text."""
    with own_process(environment) as call:
        call(_build, name, length, settings)
        yield lambda workload, segments: call(_measure, workload, segments)


_runners: Runners = {}
_length = SEGMENT_LENGTH


def _build(name: str, length: int, settings: dict[str, Any]) -> None:
    global _runners, _length
    _length = length
    _runners = providers.get("model", name).make(segment_length=length, **settings)
    with torch.no_grad():
        _runners["read"](text(1, length)[:, :64])


@torch.no_grad()
def _measure(workload: str, segments: int) -> Measured:
    ids = text(segments, _length)
    before = held_memory()
    start = time.perf_counter()
    result = _runners[workload](ids)
    numbers = {key: value.float().cpu().numpy() for key, value in result.items()}  # waits for the device
    seconds, peak = time.perf_counter() - start, peak_memory()
    return Measured(seconds, peak, peak - before, numbers)


def _training(model: nn.Module, memory: nn.Parameter, loss_of: Callable[[Tensor], Tensor]) -> Any:
    """Loss and gradients of all parameters, as one step of training makes them."""

    @torch.enable_grad()
    def train(ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = loss_of(ids)
        loss.backward()
        gradient = cast(Tensor, memory.grad)
        result = {"loss": loss.detach(), "gradient": gradient / gradient.norm()}
        model.zero_grad(set_to_none=True)  # what is held afterwards is not this step's
        return result

    return train


def _ours(checkpointed: bool = False, **settings: Any) -> Runners:
    model = build(**settings)
    if checkpointed:
        checkpoint_layers(model.train())  # there is no dropout

    def score(ids: Tensor) -> dict[str, Tensor]:
        out = model(ids, labels=ids)
        return {"loss": out.loss, "memories": out.state.memories()}

    train = _training(model, model.memory, lambda ids: model(ids, labels=ids).loss)
    return {"read": lambda ids: {"memories": model.read(ids).memories()}, "score": score, "train": train}


def _plain_loop(read: Callable[[HMTForCausalLM, Tensor], Tensor], **settings: Any) -> Runners:
    model = build(attn_implementation="sdpa", **settings)

    def score(ids: Tensor) -> dict[str, Tensor]:
        loss, memories = plain_loop.score(model, ids)
        return {"loss": loss, "memories": memories}

    train = _training(model, model.memory, lambda ids: plain_loop.score(model, ids)[0])
    return {"read": lambda ids: {"memories": read(model, ids)}, "score": score, "train": train}


def _hmt_pytorch(**settings: Any) -> Runners:
    model = build(attn_implementation="sdpa", **settings)
    length = model.config.segment_length
    wrapper = peer.build(model, max_segments=64)

    def score(ids: Tensor) -> dict[str, Tensor]:
        loss, memories = peer.score(wrapper, ids, length)
        return {"loss": loss, "memories": memories}

    train = _training(wrapper, wrapper.memory_cell.memory, lambda ids: peer.score(wrapper, ids, length)[0])
    return {"read": lambda ids: {"memories": peer.read(wrapper, ids, length)}, "score": score, "train": train}


def _slow_bfloat16() -> str | None:
    if DEVICE == "cuda":
        return "on a GPU all run in bfloat16"
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return None if has else "this processor has no instructions for bfloat16"


def _slow_compiling() -> str | None:
    if DEVICE == "cpu" and not shutil.which("c++"):
        return "torch.compile finds no C++ compiler"
    return _only_with_peer("torch.compile takes minutes")


def _slow_keeping() -> str | None:
    return None if DEVICE == "cuda" else _only_with_peer("takes a minute")


def _only_with_peer(why: str) -> str | None:
    return peer.missing() and f"{why}: measured together with HMT-pytorch"


register("model", OURS, _ours)
register("model", BFLOAT16, lambda **settings: _ours(dtype=torch.bfloat16, **settings), _slow_bfloat16)
for name, captured in (
    (GRAPHS, partial(_ours, cuda_graphs=True)),
    (NO_GRAPHS, partial(_ours, cuda_graphs=False)),
    (CHECKPOINTED, partial(_ours, cuda_graphs=True, checkpointed=True)),
):
    register("model", name, captured, lambda: None if DEVICE == "cuda" else "PyTorch sees no CUDA device")
register("model", COMPILED, partial(_ours, compile_layers=True), _slow_compiling)
register("model", KEPT, lambda **settings: _ours(rematerialize=False, **settings), _slow_keeping)
register("model", PLAIN, lambda **settings: _plain_loop(plain_loop.read, **settings))
register("model", DROPPED, lambda **settings: _plain_loop(plain_loop.read_dropping_outputs, **settings), peer.missing)
register("model", PEER, _hmt_pytorch, peer.missing)
