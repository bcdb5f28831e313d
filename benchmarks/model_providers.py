"""Who reads and scores a text in the benchmarks of the model layer, registered in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import peer, plain_loop
from benchmarks.model_shape import SEGMENT_LENGTH, SEGMENTS, build
from hmt import HMTForCausalLM

OURS = "hmt"
WORKLOADS = ("read", "score")  # without gradients; every provider can also "train"
Runner = Callable[[Tensor], dict[str, Tensor]]


def unavailable(provider: str) -> str | None:
    """Why a provider cannot run here (None: it can)."""
    return peer.missing() if provider == "HMT-pytorch" else None


def runners(provider: str, **settings: Any) -> dict[str, Runner]:
    """Per workload a function of token ids [1, T]; it returns "memories" [1, S, d] and, for "score", the "loss".

    "train" returns the loss and the direction of the gradient of the first memory p_0, which every segment depends on.
    All providers have the same weights. Those that we are compared with run on transformers' default attention; only
    our own model takes `settings`.
    """
    return _REGISTERED[provider](**settings)


def _training(model: nn.Module, memory: nn.Parameter, loss_of: Callable[[Tensor], Tensor]) -> Runner:
    """Loss and gradients of all parameters, as one step of training makes them."""

    @torch.enable_grad()
    def train(ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        loss = loss_of(ids)
        loss.backward()
        gradient = cast(Tensor, memory.grad)
        return {"loss": loss.detach(), "gradient": gradient / gradient.norm()}

    return train


def _ours(**settings: Any) -> dict[str, Runner]:
    dtype = settings.pop("dtype", None)
    model = build(**settings)
    if dtype:
        model = model.to(getattr(torch, dtype))

    def score(ids: Tensor) -> dict[str, Tensor]:
        out = model(ids, labels=ids)
        return {"loss": out.loss, "memories": out.state.memories()}

    train = _training(model, model.memory, lambda ids: model(ids, labels=ids).loss)
    return {"read": lambda ids: {"memories": model.read(ids).memories()}, "score": score, "train": train}


def _plain_loop(read: Callable[[HMTForCausalLM, Tensor], Tensor]) -> dict[str, Runner]:
    model = build(attn_implementation="sdpa")

    def score(ids: Tensor) -> dict[str, Tensor]:
        loss, memories = plain_loop.score(model, ids)
        return {"loss": loss, "memories": memories}

    train = _training(model, model.memory, lambda ids: plain_loop.score(model, ids)[0])
    return {"read": lambda ids: {"memories": read(model, ids)}, "score": score, "train": train}


def _hmt_pytorch() -> dict[str, Runner]:
    wrapper = peer.build(build(attn_implementation="sdpa"), max_segments=SEGMENTS)

    def score(ids: Tensor) -> dict[str, Tensor]:
        loss, memories = peer.score(wrapper, ids, SEGMENT_LENGTH)
        return {"loss": loss, "memories": memories}

    train = _training(wrapper, wrapper.memory_cell.memory, lambda ids: peer.score(wrapper, ids, SEGMENT_LENGTH)[0])
    return {"read": lambda ids: {"memories": peer.read(wrapper, ids, SEGMENT_LENGTH)}, "score": score, "train": train}


_REGISTERED: dict[str, Callable[..., dict[str, Runner]]] = {
    OURS: _ours,
    "plain loop": lambda: _plain_loop(plain_loop.read),
    "plain loop, outputs dropped": lambda: _plain_loop(plain_loop.read_dropping_outputs),
    "HMT-pytorch": _hmt_pytorch,
}
