"""A full segment as one call of static shapes: on CUDA captured once as a graph and replayed for every segment.

The step is tested on CPU, where it runs as it is. The capture has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hmt.backbone import embed, run_layers
from hmt.inputs import check_inputs
from hmt.model import HMTForCausalLM
from hmt.passes import close_segment, open_segment, read_segments, recall_queries
from hmt.state import HMTState, push_memory
from hmt.tokens import Tokens, join, split
from hmt_kernels import memory_recall_step

WARM_UPS = 3


@dataclass
class StepBuffers:
    """Everything that a step reads and writes, at fixed addresses.

    Attributes:
        ids: [B, k + L], sensory tokens and segment.
        query: [B, d], absorbed.
        queue: [B, N, d]; num_valid [B] int32 of its slots count, the one that is about to be written included.
        slot: [B] int32, where `memory` goes.
        memory: [B, d], of the segment before; afterwards of this one.
        embeds: [B, 1 + k + L + 1, d], what the backbone reads.
        hidden: [B, L, d], what the LM head would read.
    """

    ids: Tensor
    query: Tensor
    queue: Tensor
    num_valid: Tensor
    slot: Tensor
    memory: Tensor
    embeds: Tensor
    hidden: Tensor


def new_buffers(model: HMTForCausalLM, batch_size: int) -> StepBuffers:
    config, state = model.config, model.new_state(batch_size)
    queue = state._queue()
    tokens = config.num_sensory + config.segment_length
    return StepBuffers(
        ids=torch.zeros(batch_size, tokens, dtype=torch.long, device=queue.device),
        query=queue.new_zeros(batch_size, config.hidden_size),
        queue=queue,
        num_valid=torch.ones(batch_size, dtype=torch.int32, device=queue.device),
        slot=torch.zeros(batch_size, dtype=torch.int32, device=queue.device),
        memory=queue.new_zeros(batch_size, config.hidden_size),
        embeds=queue.new_zeros(batch_size, tokens + 2, config.hidden_size),
        hidden=queue.new_zeros(batch_size, config.segment_length, config.hidden_size),
    )


def segment_step(model: HMTForCausalLM, buffers: StepBuffers) -> None:
    """Write the last memory, recall, and read one full segment without padding, all inside the buffers."""
    b = buffers
    b.embeds[:, 1:-1] = embed(model.backbone, b.ids)
    scale = model.recall.softmax_scale
    memory_recall_step(b.query[:, None], b.queue, b.memory, b.slot, b.num_valid, softmax_scale=scale, out=b.embeds)
    out = run_layers(model.backbone, b.embeds).last_hidden_state
    b.hidden.copy_(out[:, -1 - b.hidden.shape[1] : -1])
    b.memory.copy_(out[:, -1])


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a replayed CUDA graph; what it reads and writes must lie where it lies now."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def static_reader(model: HMTForCausalLM, batch_size: int = 1) -> Callable[[Tensor, HMTState | None], HMTState]:
    """A function that does what `model.read` does for ids [B, T] without padding, one static step per full segment.

    Weights must stay where they are while it is used.

    Raises:
        ValueError: a model of another mode than "hmt".

    Example:
        >>> read = static_reader(model)
        >>> state = read(book_ids, None)
    """
    if model.config.mode != "hmt":
        raise ValueError(f"static_reader needs a model of mode 'hmt', got {model.config.mode!r}")
    buffers = new_buffers(model, batch_size)

    def step() -> None:
        segment_step(model, buffers)

    # before any state is in the buffers: warming up changes them
    run = captured(step) if buffers.queue.is_cuda else step

    @torch.no_grad()
    def read(input_ids: Tensor, state: HMTState | None = None) -> HMTState:
        check_inputs(input_ids, state=state)
        if len(input_ids) != batch_size:
            raise ValueError(f"input_ids must have this reader's {batch_size} rows, got {len(input_ids)}")
        state = model._state(state, input_ids)
        text = join(state.open, Tokens(input_ids))
        if text.mask is not None or state._queue().shape != buffers.queue.shape:
            raise ValueError("state must have no padding in its open segment and a queue of the model's own size")
        return _read(model, buffers, run, replace(state, open=text.slice(0, 0), cache=None), text)

    return read


def _read(
    model: HMTForCausalLM, buffers: StepBuffers, run: Callable[[], None], state: HMTState, text: Tokens
) -> HMTState:
    length, keep = model.config.segment_length, model.config.num_sensory
    if state.num_closed == 0 and text.length >= length:  # no memory and no sensory tokens yet: other shapes
        (first,) = read_segments(model, text.slice(0, length), state)
        state, text = first.state, text.slice(length, text.length)
    full = text.length // length * length
    segments = split(text.slice(0, full), length)
    if not segments:
        return open_segment(state, join(state.open, text))
    slots = buffers.queue.shape[1]
    buffers.queue.copy_(state._queue())
    # the step begins with a write: at first, of the memory that is there already
    buffers.memory.copy_(buffers.queue[:, (state.num_closed - 1) % slots])
    for segment, query in zip(segments, recall_queries(model, segments, state), strict=True):
        buffers.ids[:, :keep] = state.recent.last(keep).ids
        buffers.ids[:, keep:] = segment.ids
        buffers.query.copy_(query)  # type: ignore[arg-type]
        buffers.slot.fill_((state.num_closed - 1) % slots)
        buffers.num_valid.fill_(state.num_valid)
        run()
        state = close_segment(model, state, segment, None)
    state = replace(state, queue=buffers.queue.clone())
    queue = push_memory(replace(state, num_closed=state.num_closed - 1), buffers.memory)
    return open_segment(replace(state, queue=queue), text.slice(full, text.length))
