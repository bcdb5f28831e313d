"""Who reads, scores and trains in the benchmarks of the model layer, each in a process of its own.

All have the same weights. Those that ours is compared with run on transformers' default attention.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks import allocators, peer, plain_loop, providers
from benchmarks.allocators import MIMALLOC
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
# a name, and what it is with mimalloc preloaded
PRELOADED = {name: f"{name}, {MIMALLOC}" for name in (OURS, BFLOAT16, PLAIN)}
READ_ONLY = (BFLOAT16, PRELOADED[BFLOAT16], DROPPED)
TRAIN_ONLY = (PRELOADED[OURS], PRELOADED[PLAIN], KEPT, CHECKPOINTED)
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


Run = Callable[[str, int], Measured]  # of a workload and so many segments


class Started(NamedTuple):
    ready: Future[None]  # built, and run once on a short text
    run: Run


@contextlib.contextmanager
def started(
    name: str, length: int = SEGMENT_LENGTH, allocator: str | None = None, **settings: Any
) -> Iterator[Started]:
    """A provider in a process of its own; see `when_ready` for several."""
    allocator = allocator or (MIMALLOC if name in PRELOADED.values() else "malloc")
    with own_process(allocators.environment(allocator), forked=True) as submit:
        ready = submit(_build, name, length, allocator, settings)

        def run(workload: str, segments: int) -> Measured:
            ready.result()
            return submit(_measure, workload, segments).result()

        yield Started(ready, run)


def when_ready(processes: Iterable[Started]) -> list[Run]:
    """What runs each of them, once all are built: one that still starts would slow those that are measured."""
    begun = list(processes)
    for process in begun:
        process.ready.result()
    return [process.run for process in begun]


_runners: Runners = {}
_length = SEGMENT_LENGTH


def _build(name: str, length: int, allocator: str, settings: dict[str, Any]) -> None:
    global _runners, _length
    allocators.check(allocator)
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


_ours_in_bfloat16 = partial(_ours, dtype=torch.bfloat16)
_plain = partial(_plain_loop, plain_loop.read)
_no_mimalloc = partial(allocators.missing, MIMALLOC)

register("model", OURS, _ours)
register("model", PRELOADED[OURS], _ours, _no_mimalloc)
register("model", BFLOAT16, _ours_in_bfloat16, _slow_bfloat16)
register("model", PRELOADED[BFLOAT16], _ours_in_bfloat16, lambda: _slow_bfloat16() or _no_mimalloc())
for name, captured in (
    (GRAPHS, partial(_ours, cuda_graphs=True)),
    (NO_GRAPHS, partial(_ours, cuda_graphs=False)),
    (CHECKPOINTED, partial(_ours, cuda_graphs=True, checkpointed=True)),
):
    register("model", name, captured, lambda: None if DEVICE == "cuda" else "PyTorch sees no CUDA device")
register("model", COMPILED, partial(_ours, compile_layers=True), _slow_compiling)
register("model", KEPT, partial(_ours, rematerialize=False), _slow_keeping)
register("model", PLAIN, _plain)
register("model", PRELOADED[PLAIN], _plain, _no_mimalloc)
register("model", DROPPED, partial(_plain_loop, plain_loop.read_dropping_outputs), peer.missing)
register("model", PEER, _hmt_pytorch, peer.missing)
