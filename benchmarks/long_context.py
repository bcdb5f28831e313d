"""A small model in long contexts: its shape, its providers, and the memory of one of them in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, StaticCache

from benchmarks import providers
from benchmarks.processes import held_memory, peak_memory
from benchmarks.providers import register
from benchmarks.sizes import DEVICE, size
from hmt import HMTForCausalLM, HMTState
from hmt.backbone import apply_head, embed, run_layers

SEGMENT_LENGTH = size(256, tiny=16)
HMT, BACKBONE = providers.OURS["long context"], "backbone alone, its keys cached"
STATIC = "backbone alone, a static cache"
CONTEXTS = size((1_000, 10_000, 100_000), tiny=(40, 80))
# one segment, so that closing it is counted once
TOKENS = {HMT: SEGMENT_LENGTH, BACKBONE: 4, STATIC: 4}
ROOM = 16 * TOKENS[STATIC]  # of the static cache, for all rounds
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=size(256, tiny=32),
    intermediate_size=size(768, tiny=64),
    num_hidden_layers=size(6, tiny=2),
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=2 * CONTEXTS[-1],
    tie_word_embeddings=True,
)


class Generation(NamedTuple):
    run: Callable[[], None]  # continues the context by TOKENS[provider] greedy tokens
    kept: int  # bytes kept of the context


def build() -> HMTForCausalLM:
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(CONFIG).eval()
    settings = {"segment_length": SEGMENT_LENGTH, "num_sensory": size(32, tiny=4), "queue_size": 300}
    return HMTForCausalLM.from_backbone(backbone, **settings).to(DEVICE)


def text(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (1, tokens), generator=generator).to(DEVICE)


def context_length(context: int) -> int:
    """The text that stands for a context: its open segment is as long as any other's, so that only the past differs."""
    return context // SEGMENT_LENGTH * SEGMENT_LENGTH + 8


@torch.no_grad()
def fill(cache: Cache, context: int) -> Cache:
    """A cache of the backbone with that many random keys and values; what they are changes neither time nor memory."""
    shape = (1, CONFIG.num_key_value_heads, context, CONFIG.hidden_size // CONFIG.num_attention_heads)
    for layer in range(CONFIG.num_hidden_layers):
        cache.update(torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE), layer)
    return cache


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cache_tensors(cache: Cache | None) -> list[Tensor]:
    if cache is None:
        return []
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [tensor for tensor in tensors if tensor is not None]


def _hmt(model: HMTForCausalLM, context: int, state: HMTState) -> Generation:
    @torch.no_grad()
    def run() -> None:
        token, current = text(1), state
        for _ in range(TOKENS[HMT]):
            out = model(token, state=current, use_cache=True, logits_to_keep=1)
            token, current = out.logits[:, -1:].argmax(-1), out.state

    with torch.no_grad():  # the cache of the open segment comes with the first token
        state_in_use = model(text(1), state=state, use_cache=True, logits_to_keep=1).state
    ids = [state.recent.ids, state.open.ids]
    return Generation(run, nbytes([state._queue(), *ids, *cache_tensors(state_in_use.cache)]))


def _backbone(model: HMTForCausalLM, context: int, state: HMTState) -> Generation:
    """As transformers generates: its cache is copied, one token longer, at every token."""
    return _continued(model, BACKBONE, fill(DynamicCache(config=model.backbone.config), context))


def _static(model: HMTForCausalLM, context: int, state: HMTState) -> Generation:
    """With memory for all tokens from the start, which are written in place."""
    cache = StaticCache(config=model.backbone.config, max_cache_len=context + ROOM)
    return _continued(model, STATIC, fill(cache, context))


def _continued(model: HMTForCausalLM, name: str, cache: Cache) -> Generation:
    kept = nbytes(cache_tensors(cache))

    @torch.no_grad()
    def run() -> None:
        token = text(1)
        for _ in range(TOKENS[name]):
            mask = None
            if isinstance(cache, StaticCache):  # not all of it is filled
                room = cache.layers[0].keys.shape[2]  # type: ignore[union-attr]
                mask = (torch.arange(room, device=DEVICE) <= cache.get_seq_length())[None]
            hidden = run_layers(model.backbone, embed(model.backbone, token), mask, cache).last_hidden_state
            token = apply_head(model.backbone, hidden).argmax(-1)

    return Generation(run, kept)


def check_caches(model: HMTForCausalLM) -> None:
    """Raises AssertionError where the two caches of the backbone, filled alike, do not come to hold the same keys."""
    held = []
    for cache in (DynamicCache(config=model.backbone.config), StaticCache(model.backbone.config, CONTEXTS[0] + ROOM)):
        torch.manual_seed(2)
        _continued(model, STATIC, fill(cache, CONTEXTS[0])).run()
        held.append([x[:, :, : CONTEXTS[0] + TOKENS[STATIC]] for x in cache_tensors(cache)])
    torch.testing.assert_close(*held)


register("long context", HMT, _hmt)
register("long context", BACKBONE, _backbone)
register("long context", STATIC, _static)


def peak_of(provider: str, context: int, state: Path) -> int:
    """Peak memory in bytes of a process that loads the model, takes the context over and generates."""
    held_memory()
    model = build()
    generation = providers.get("long context", provider).make(model, context, HMTState.load(state, DEVICE))
    generation.run()
    return peak_memory()


def generations(model: HMTForCausalLM, provider: str, states: dict[int, HMTState]) -> dict[int, Generation]:
    make = partial(providers.get("long context", provider).make, model)
    return {context: make(context, state) for context, state in states.items()}
