"""Who reads and scores a text in the benchmarks of the model layer, registered in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks import peer, plain_loop
from benchmarks.model_shape import SEGMENT_LENGTH, SEGMENTS, build
from hmt import HMTForCausalLM

OURS = "hmt"
WORKLOADS = ("read", "score")
Runner = Callable[[Tensor], dict[str, Tensor]]


def unavailable(provider: str) -> str | None:
    """Why a provider cannot run here (None: it can)."""
    return peer.missing() if provider == "HMT-pytorch" else None


def runners(provider: str, **settings: Any) -> dict[str, Runner]:
    """Per workload a function of token ids [1, T]; it returns "memories" [1, S, d] and, for "score", the "loss".

    All providers have the same weights. Those that we are compared with run on transformers' default attention; only
    our own model takes `settings`.
    """
    return _REGISTERED[provider](**settings)


def _ours(**settings: Any) -> dict[str, Runner]:
    model = build(**settings)

    def score(ids: Tensor) -> dict[str, Tensor]:
        out = model(ids, labels=ids)
        return {"loss": out.loss, "memories": out.state.memories()}

    return {"read": lambda ids: {"memories": model.read(ids).memories()}, "score": score}


def _plain_loop(read: Callable[[HMTForCausalLM, Tensor], Tensor]) -> dict[str, Runner]:
    model = build(attn_implementation="sdpa")

    def score(ids: Tensor) -> dict[str, Tensor]:
        loss, memories = plain_loop.score(model, ids)
        return {"loss": loss, "memories": memories}

    return {"read": lambda ids: {"memories": read(model, ids)}, "score": score}


def _hmt_pytorch() -> dict[str, Runner]:
    wrapper = peer.build(build(attn_implementation="sdpa"), max_segments=SEGMENTS)

    def score(ids: Tensor) -> dict[str, Tensor]:
        loss, memories = peer.score(wrapper, ids, SEGMENT_LENGTH)
        return {"loss": loss, "memories": memories}

    return {"read": lambda ids: {"memories": peer.read(wrapper, ids, SEGMENT_LENGTH)}, "score": score}


_REGISTERED: dict[str, Callable[..., dict[str, Runner]]] = {
    OURS: _ours,
    "plain loop": lambda: _plain_loop(plain_loop.read),
    "plain loop, outputs dropped": lambda: _plain_loop(plain_loop.read_dropping_outputs),
    "HMT-pytorch": _hmt_pytorch,
}
