"""A pass over new text: all summaries first, then one segment after the other through recall and backbone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import record_function

from hmt import capture
from hmt.backbone import embed, has_replaced_weights, hidden_states
from hmt.decode_graph import decode_graph
from hmt.kv_cache import can_go_on, claimed, new_cache
from hmt.layer_graphs import GraphedCall, graphed_call
from hmt.outputs import SegmentResult
from hmt.recurrence import Layers, augment, decode_token, read_segment, summarize
from hmt.remat import rematerialized
from hmt.state import HMTState, push_memory
from hmt.static_step import StaticStep, fits, static_step, step_and_read
from hmt.tokens import Tokens, find_spans, join, split

if TYPE_CHECKING:
    from hmt.config import HMTConfig
    from hmt.model import HMTForCausalLM


def read_segments(
    model: HMTForCausalLM, new: Tokens, state: HMTState, use_cache: bool = False
) -> Iterator[SegmentResult]:
    """Read new tokens after `state`, one segment at a time; the last may stay open.

    Nothing is synchronised with a GPU from one segment to the next.
    """
    config, state = model.config, state.out_of_inference()
    length, opened = config.segment_length, state.num_open
    text = join(state.open, new)
    if can_decode(model, state, new, use_cache):
        with claimed(state.cache) as mine:  # another thread may have gone on with it since
            mine = mine and can_decode(model, state, new, use_cache)
            hidden = _decode(model, text, state.cache) if mine else None
        if hidden is not None:
            yield SegmentResult(hidden, open_segment(state, text, state.cache))
            return
    segments = split(text, length)
    rematerializes = config.rematerialize and torch.is_grad_enabled() and len(segments) > 1
    if rematerializes and has_replaced_weights(model):
        rematerializes = False  # the backward pass would recompute with the weights of then
    look = capture.look(model)
    call = graphed_call(model, look)
    queries = recall_queries(model, segments, state, rematerializes, call)
    with static_step(model, state, segments, look) as step:
        if step is not None:
            state = replace(state, queue=step.buffers.queue)
        elif segments[0].length == length and state.queue is not None:
            state = replace(state, queue=state.queue.clone())  # the caller's state stays as it was
        for result in _read_in_turn(model, segments, queries, state, use_cache, rematerializes, step, call):
            result.hidden = result.hidden[:, opened:]
            opened = 0
            yield result


def _read_in_turn(
    model: HMTForCausalLM,
    segments: list[Tokens],
    queries: list[Tensor | None],
    state: HMTState,
    use_cache: bool,
    rematerializes: bool,
    step: StaticStep | None,
    call: GraphedCall | None,
) -> Iterator[SegmentResult]:
    """The segments after `state`, whose queue is written in place where no gradients are recorded."""
    config, pending, fuses = model.config, None, _fuses_steps(model, state, segments[0])
    for number, (segment, query) in enumerate(zip(segments, queries, strict=True), start=1):
        closing, last = segment.length == config.segment_length, number == len(segments)
        state = _truncate(state, config.bptt_depth)
        cache = None
        if use_cache and not closing:
            cache = new_cache(model.backbone, cache_capacity(config), padded=segment.mask is not None)
        if step is not None and query is not None and fits(model, segment, state):
            hidden, memory, recalled, age = step_and_read(model, step, state, segment, query, pending)
        elif pending is None or query is None:
            layers = _graphed_layers(call, state, segment, cache)
            run = partial(_read, model, layers or hidden_states, replace(state, queue=None, cache=None), segment, cache)
            # the backward pass begins with the last segment: its activations are needed at once
            if rematerializes and not last and layers is None:
                run = partial(rematerialized, run, offload=config.offload_states)
            hidden, memory, recalled, age = run(state.queue, query)
        else:
            layers = _graphed_layers(call, state, segment, cache) or hidden_states
            hidden, memory, recalled, age = _step_and_read(model, layers, state, segment, cache, query, pending)
        # the next segment's step writes it into the queue, together with its recall
        pending = memory if fuses and not last else None
        if closing:
            state = close_segment(model, state, segment, memory, write=pending is None)
        else:
            state = open_segment(state, segment, cache)
        if step is not None and last:
            state = replace(state, queue=state._queue().clone())  # out of the buffers
        yield SegmentResult(hidden, state, memory, recalled, age)


def can_decode(model: HMTForCausalLM, state: HMTState, new: Tokens, use_cache: bool) -> bool:
    """Whether one new token can use the keys and values that `state` has kept."""
    config = model.config
    if not use_cache or state.cache is None or new.length != 1:
        return False
    if state.num_open == 0 or state.num_open + 1 >= config.segment_length:
        return False
    if not can_go_on(state.cache):
        return False
    # a cache that another continuation of the same state has already extended no longer fits
    num_sensory = min(config.num_sensory, state.recent.length)
    return state.cache.get_seq_length() == config.num_memory + num_sensory + state.num_open


def _decode(model: HMTForCausalLM, text: Tokens, cache: Any) -> Tensor:
    """Hidden state [B, 1, d] of the last token of the open segment [B, t]; the cache holds all before it."""
    if text.mask is None:
        embeds = embed(model.backbone, text.ids[:, -1:])
        if (graph := decode_graph(model, cache, embeds)) is not None:
            return graph.run(cache, embeds)
    return decode_token(model.backbone, text, cache)


def recall_queries(
    model: HMTForCausalLM,
    segments: list[Tokens],
    state: HMTState,
    rematerialize: bool = False,
    call: GraphedCall | None = None,
) -> list[Tensor | None]:
    """Absorbed recall queries [B, d] of all segments: every summary in batches, then one product."""
    config = model.config
    if config.mode != "hmt" or not segments:
        return [None] * len(segments)
    if config.summarises_previous:
        sources = [s.last(config.summary_length) for s in (state.recent, *segments[:-1])]
    else:
        sources = [s.slice(0, config.summary_length) for s in segments]
    # nothing has been written before the first segment of a text, so it recalls nothing
    first = 1 if state.num_closed == 0 else 0
    batch_size = config.summary_batch_size
    if torch.is_grad_enabled():  # a batch holds no more activations than a segment does
        tokens = 2 * config.num_memory + config.num_sensory + config.segment_length
        batch_size = min(batch_size, tokens // (config.summary_length + 2) * state.batch_size)
    with record_function("hmt.summary"):
        summaries = summarize(
            model.backbone,
            model.summary_prompt,
            find_spans(sources[first:]),
            batch_size,
            rematerialize=rematerialize,
            offload=config.offload_states,
            find_layers=partial(_graphed_summary, call),
        )
        queries: list[Tensor | None] = [None] * first
        if summaries:
            queries += model.recall.absorb(torch.stack(summaries)).unbind(0)
    return queries


def recall(model: HMTForCausalLM, query: Tensor | None, state: HMTState) -> tuple[Tensor | None, Tensor | None]:
    """p_n [B, d] and the age [B] of the strongest memory (None before there is one)."""
    if model.config.mode == "baseline":
        return None, None
    if state.num_closed == 0:
        return model.memory.expand(state.batch_size, -1), None
    if model.config.mode == "rmt":
        return state.valid()[:, 0], None
    with record_function("hmt.recall"):
        out = model.recall(query, state.valid())
        return out.recalled[:, 0], state.age_of(out.slot[:, 0])


def open_segment(state: HMTState, segment: Tokens, cache: Any = None) -> HMTState:
    """The state with this text as its open segment."""
    return replace(state, open=segment, cache=cache)


def _graphed_summary(call: GraphedCall | None, batch: Tokens) -> Layers | None:
    """The layers of a batch of summaries by a graph, for a power of two of rows."""
    if call is None or batch.mask is not None or batch.length < call.model.config.summary_length:
        return None
    rows, length = batch.ids.shape
    return call.layers((1 << (rows - 1).bit_length(), length + 2), last_rows=1)


def _graphed_layers(call: GraphedCall | None, state: HMTState, segment: Tokens, cache: Any) -> Layers | None:
    """The layers of a segment after `state` by the graph of a full one."""
    if call is None or segment.mask is not None or cache is not None:
        return None
    config = call.model.config
    num_sensory = state.recent.last(config.num_sensory).length
    length = config.num_memory + num_sensory + config.segment_length + config.num_memory
    return call.layers((state.batch_size, length), last_rows=config.segment_length + config.num_memory)


def _read(
    model: HMTForCausalLM,
    layers: Layers,
    state: HMTState,
    segment: Tokens,
    cache: Any,
    queue: Tensor | None,
    query: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Hidden states, memory, recalled embedding and age of a segment after `state` with this queue."""
    recalled, age = recall(model, query, replace(state, queue=queue))
    closing = segment.length == model.config.segment_length
    sensory = state.recent.last(model.config.num_sensory).ids
    with record_function("hmt.main"):
        embeds, mask = augment(model.backbone, recalled, sensory, segment, closing=closing)
        ends_with_memory = closing and recalled is not None
        hidden, memory = read_segment(
            model.backbone, embeds, mask, segment.length, ends_with_memory=ends_with_memory, cache=cache, layers=layers
        )
    return hidden, memory, recalled, age


def _step_and_read(
    model: HMTForCausalLM,
    layers: Layers,
    state: HMTState,
    segment: Tokens,
    cache: Any,
    query: Tensor,
    pending: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The same, after the latest memory [B, d] has been written; queue and memory slots are changed in place."""
    closing = segment.length == model.config.segment_length
    sensory = state.recent.last(model.config.num_sensory).ids
    blank = model.memory.expand(state.batch_size, -1)
    with record_function("hmt.main"):
        embeds, mask = augment(model.backbone, blank, sensory, segment, closing=closing)
    with record_function("hmt.recall"):
        slot = (state.num_closed - 1) % state.queue.shape[1]  # type: ignore[union-attr]
        out = model.recall.step(query, state.valid(), pending, slot, embeds if closing else embeds[:, :1])
        recalled, age = out.recalled[:, 0], state.age_of(out.slot[:, 0])
    with record_function("hmt.main"):
        hidden, memory = read_segment(
            model.backbone, embeds, mask, segment.length, ends_with_memory=closing, cache=cache, layers=layers
        )
    return hidden, memory, recalled, age


def _fuses_steps(model: HMTForCausalLM, state: HMTState, segment: Tokens) -> bool:
    """Whether a memory's way into the queue and the next recall can be one step, which writes in place."""
    if torch.is_grad_enabled() or model.config.mode != "hmt" or state.queue is None:
        return False
    embeds = embed(model.backbone, segment.ids[:1, :1])  # a token, because hooks may divide by their number
    return embeds.dtype == state.queue.dtype and embeds.device == state.queue.device


def _truncate(state: HMTState, depth: int | None) -> HMTState:
    """The state without its history of gradients, where a new run of `depth` segments begins."""
    if depth is None or state.queue is None or state.num_closed % depth:
        return state
    return replace(state, queue=state.queue.detach())


def cache_capacity(config: HMTConfig) -> int:
    """Positions of the longest augmented segment that can still be decoded into."""
    return config.num_memory + config.num_sensory + config.segment_length


def close_segment(
    model: HMTForCausalLM, state: HMTState, segment: Tokens, memory: Tensor | None, write: bool = True
) -> HMTState:
    """The state after a full segment; its memory joins the queue now (`write`) or with the next step."""
    queue = push_memory(state, memory) if write and memory is not None else state.queue
    keep = model.config.num_sensory
    if model.config.summarises_previous:
        keep = max(keep, model.config.summary_length)
    return HMTState(queue, state.num_closed + 1, segment.last(keep), Tokens(segment.ids[:, :0]))
