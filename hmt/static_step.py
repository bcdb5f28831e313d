"""A full segment as one call of static shapes: on CUDA captured once as a graph and replayed for every segment.

`HMTConfig.cuda_graphs` turns it on, for every pass that records no gradients. A text's first segment, its ragged last
one and segments with padding take another path: the first has other inputs (`hmt.layer_graphs`), the last would compute
a whole segment for its few tokens and has to fill a cache for decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.profiler import record_function

from hmt import capture
from hmt.backbone import embed, run_layers
from hmt.state import HMTState
from hmt.tokens import Tokens
from hmt_kernels import memory_recall_step

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM

KEPT_STEPS = 4  # of different shapes, for each model


@dataclass
class StepBuffers:
    """Everything that a step reads and writes, at fixed addresses.

    Attributes:
        ids: [B, k + L], sensory tokens and segment.
        query: [B, d], absorbed.
        queue: [B, N, d]; num_valid [B] int32 of its slots count, the one that is about to be written included.
        slot: [B] int32, where `memory` goes.
        memory: [B, d], of the segment before; afterwards of this one.
        strongest: [B] int32, slot of the memory that is recalled most.
        embeds: [B, 1 + k + L + 1, d], what the backbone reads; its first row is the recalled embedding.
        hidden: [B, L, d], what the LM head would read.
    """

    ids: Tensor
    query: Tensor
    queue: Tensor
    num_valid: Tensor
    slot: Tensor
    memory: Tensor
    strongest: Tensor
    embeds: Tensor
    hidden: Tensor


@dataclass
class StaticStep:
    """A step that is ready to run, and all that it depends on beside its buffers."""

    buffers: StepBuffers
    run: Callable[[HMTForCausalLM], object] | None  # None: it draws random numbers
    dependencies: tuple[Any, ...]
    turn: capture.Turn


# not attributes of the models: a copied or pickled model must not take along steps that run with the weights of another
_steps: WeakKeyDictionary[HMTForCausalLM, dict[tuple[Any, ...], StaticStep]] = WeakKeyDictionary()


def new_buffers(model: HMTForCausalLM, queue: Tensor) -> StepBuffers:
    """Buffers for texts with a queue like this one."""
    config, batch_size = model.config, len(queue)
    tokens = config.num_sensory + config.segment_length
    counts = torch.ones(3, batch_size, dtype=torch.int32, device=queue.device)
    return StepBuffers(
        ids=torch.zeros(batch_size, tokens, dtype=torch.long, device=queue.device),
        query=queue.new_zeros(batch_size, config.hidden_size),
        queue=torch.zeros_like(queue),
        num_valid=counts[0],
        slot=torch.zeros_like(counts[1]),
        memory=queue.new_zeros(batch_size, config.hidden_size),
        strongest=counts[2],
        embeds=queue.new_zeros(batch_size, tokens + 2, config.hidden_size),
        hidden=queue.new_zeros(batch_size, config.segment_length, config.hidden_size),
    )


def segment_step(model: HMTForCausalLM, buffers: StepBuffers) -> None:
    """Write the last memory, recall, and read one full segment without padding, all inside the buffers."""
    b = buffers
    b.embeds[:, 1:-1] = embed(model.backbone, b.ids)
    scale = model.recall.softmax_scale
    out = memory_recall_step(
        b.query[:, None], b.queue, b.memory, b.slot, b.num_valid, softmax_scale=scale, out=b.embeds
    )
    b.strongest.copy_(out.slot[:, 0])
    with capture.static_checkpoints(model.backbone):
        rows = run_layers(model.backbone, b.embeds, last_rows=b.hidden.shape[1] + 1).last_hidden_state
    b.hidden.copy_(rows[:, :-1])
    b.memory.copy_(rows[:, -1])


def why_not(model: HMTForCausalLM, state: HMTState, look: capture.Look) -> str | None:
    """Why a pass of this model after `state` cannot take static steps; None: it can."""
    if not model.config.cuda_graphs:
        return "cuda_graphs is not set"
    if look.reason is not None:
        return look.reason
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if model.config.mode != "hmt" or state.queue is None:
        return f"mode {model.config.mode!r} has no recall"
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    if (weight.dtype, weight.device) != (state.queue.dtype, state.queue.device):
        return "the memories have another dtype or device than the embeddings"
    return None


def _prepare(model: HMTForCausalLM, queue: Tensor, dependencies: tuple[Any, ...]) -> StaticStep:
    """A step for states with a queue like this one."""
    turn = capture.turn_of(model, queue.device)
    with capture.to_be_captured():
        buffers, drawing = new_buffers(model, queue), capture.Drawing(queue.device)
        if model.training:
            segment_step(model, buffers)
            if drawing.undone():
                return StaticStep(buffers, None, dependencies, turn)
        if queue.is_cuda:
            replay = capture.captured(lambda: segment_step(model, buffers), queue.device, None, turn.side)
            return StaticStep(buffers, lambda model: replay(), dependencies, turn)
    return StaticStep(buffers, lambda model: segment_step(model, buffers), dependencies, turn)


@contextlib.contextmanager
def static_step(
    model: HMTForCausalLM, state: HMTState, segments: Sequence[Tokens], look: capture.Look
) -> Iterator[StaticStep | None]:
    """A step for one call's segments after `state`, with the state's queue in its buffers; None where there is no use.

    Nobody else gets the same step until the call ends. It is made anew when a weight lies elsewhere than before.
    """
    usable = [fits(model, segment) for segment in segments[state.num_closed == 0 :]]
    if capture.is_over(model):
        _steps.pop(model, None)
    if not any(usable) or why_not(model, state, look) is not None:
        yield None
        return
    queue = state._queue()
    kept, key = _steps.setdefault(model, {}), (queue.shape, queue.dtype, queue.device)
    step = kept.pop(key, None)
    if step is None or step.dependencies != look.dependencies:
        step = _prepare(model, queue, look.dependencies)
    try:
        if step.run is None:
            yield None
            return
        with step.turn:  # nobody waits for it, but another stream may still run the step
            step.buffers.queue.copy_(queue)  # only now: warming up writes to it
            yield step
    finally:
        kept[key] = step
        while len(kept) > KEPT_STEPS:
            kept.pop(next(iter(kept)))


def fits(model: HMTForCausalLM, segment: Tokens, state: HMTState | None = None) -> bool:
    """Whether a segment, if it is not a text's first, has the shapes of the step; after `state`, with all it has."""
    if state is not None and state.recent.length < model.config.num_sensory:
        return False
    return segment.length == model.config.segment_length and segment.mask is None


def step_and_read(
    model: HMTForCausalLM, step: StaticStep, state: HMTState, segment: Tokens, query: Tensor, pending: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Hidden states, memory, recalled embedding and age of a full segment, after `pending` [B, d] has been written.

    Without `pending`, the latest memory is written once more.
    """
    b, keep = step.buffers, model.config.num_sensory
    slot = (state.num_closed - 1) % b.queue.shape[1]
    b.ids[:, :keep] = state.recent.last(keep).ids
    b.ids[:, keep:] = segment.ids
    b.query.copy_(query)
    b.memory.copy_(b.queue[:, slot] if pending is None else pending)
    b.slot.fill_(slot)
    b.num_valid.fill_(state.num_valid)
    with record_function("hmt.main"):  # the recall is part of it
        step.run(model)  # type: ignore[misc]
    # copies, because the next segment overwrites the buffers
    return b.hidden.clone(), b.memory.clone(), b.embeds[:, 0].clone(), state.age_of(b.strongest)
