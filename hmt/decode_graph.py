"""One decoded token as a CUDA graph: the layers over keys and values at fixed addresses, whatever the position.

The keys and values of the text that is decoded lie in the graph's buffers; when another text comes, those of the one
before move out, into memory of their own. Whether the graph still fits the model is looked at for every token. Segments
with padding, layers that keep something else than all keys, and rows of a server's batch take the ordinary path.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hmt import capture
from hmt.backbone import run_layers, takes_positions, takes_spans
from hmt.kv_cache import RowsLayer, SegmentCache, batches, grow
from hmt.layer_graphs import graphed_call

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM


class DecodeGraph:
    """The layers on one token [B, 1, d] after those whose keys lie in `cache`."""

    def __init__(
        self,
        turn: capture.Turn,
        backbone: PreTrainedModel,
        like: Any,
        embeds: Tensor,
        ready: Callable[..., Callable[[], object]],
    ):
        self.turn = turn
        self.embeds = torch.zeros_like(embeds)
        self.positions = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
        layers: list[Any] = [
            RowsLayer(torch.zeros_like(x.keys), torch.zeros_like(x.values), self.positions, x.capacity)
            for x in like.layers
        ]
        self.cache = SegmentCache(layers)
        self.owner: Callable[[], SegmentCache | None] = lambda: None
        hidden = self._pass(backbone)
        self.hidden = torch.empty_like(hidden)
        self.forward = ready(lambda: self.hidden.copy_(self._pass(backbone)))

    def _pass(self, backbone: PreTrainedModel) -> Tensor:
        capacity = self.cache.layers[0].get_max_length()
        stop = self.positions + 1
        if takes_spans(backbone):
            mask = torch.stack([stop, torch.full_like(stop, capacity)], dim=1).to(torch.int32)[:, None, None]
        else:
            mask = torch.arange(capacity, device=stop.device)[None] < stop[:, None]
        positions = self.positions[:, None]
        return run_layers(backbone, self.embeds, mask, self.cache, position_ids=positions).last_hidden_state

    def run(self, cache: SegmentCache, embeds: Tensor) -> Tensor:
        """Hidden state [B, 1, d] of one more token; its keys and values join the cache."""
        with self.turn:
            self._move_in(cache)
            self.embeds.copy_(embeds)
            self.positions.fill_(cache.get_seq_length())
            self.forward()
            grow([cache])
            return self.hidden.clone()

    def _move_in(self, cache: SegmentCache) -> None:
        places: list[tuple[Any, Any]] = list(zip(self.cache.layers, cache.layers, strict=True))
        if (last := self.owner()) is not cache and last is not None:
            for mine, layer in zip(self.cache.layers, last.layers, strict=True):
                _part(mine, layer)
        for mine, layer in places:
            if layer.keys is not mine.keys:  # of another owner, or what beam search has put in their place
                for buffer, own in ((mine.keys, layer.keys), (mine.values, layer.values)):
                    buffer.copy_(own)
                    if own.is_cuda:  # it may come from another stream, which must not reuse it before it is copied
                        own.record_stream(torch.cuda.current_stream(own.device))
                layer.keys, layer.values = mine.keys, mine.values
        self.owner = weakref.ref(cache)


def _part(mine: Any, layer: Any) -> None:
    """Give a layer of another cache memory of its own, if it has none."""
    if layer.keys is mine.keys:
        with torch.inference_mode(False):  # who goes on with them may be outside of it
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


class _Decoding:
    """What is known of a cache: how many tokens a model has decoded with it, and the graph that goes on."""

    def __init__(self, model: HMTForCausalLM):
        self.model, self.tokens = weakref.ref(model), 0
        self.graph: DecodeGraph | None = None
        self.found_for: Any = None  # what the graph depends on


_decodings: WeakKeyDictionary[Cache, _Decoding] = WeakKeyDictionary()


def decode_graph(model: HMTForCausalLM, cache: Any, embeds: Tensor) -> DecodeGraph | None:
    """The graph for the next token [B, 1, d] of the text of this cache; None: the ordinary path."""
    wanted = model.config.cuda_graphs
    if wanted is False or model.training or torch.is_grad_enabled() or not batches(cache) or cache.batch is not None:
        return None
    known = _decodings.get(cache)
    if known is None or known.model() is not model:
        known = _decodings[cache] = _Decoding(model)
    known.tokens += 1
    if not wanted and known.tokens <= capture.USES_BEFORE:
        return None
    look = capture.look(model)
    depends = (look, embeds.shape, embeds.dtype)
    if known.found_for != depends:
        known.graph, known.found_for = _find(model, cache, embeds, look), depends
    return known.graph


def _find(model: HMTForCausalLM, cache: SegmentCache, embeds: Tensor, look: capture.Look) -> DecodeGraph | None:
    call = graphed_call(model, look)
    if call is None or not takes_positions(model.backbone):
        return None
    key = ("decode", embeds.shape, embeds.dtype, cache.layers[0].get_max_length(), cache.layers[0].keys.dtype)  # type: ignore[union-attr]
    return call.graphs.get(
        model, key, lambda ready: DecodeGraph(call.graphs.turn, model.backbone, cache, embeds, ready)
    )
