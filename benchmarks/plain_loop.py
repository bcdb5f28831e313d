"""The recurrence as HMT-pytorch computes it, written plainly: what the model layer is measured against.

One segment after the other: a summary pass with the LM head, keys projected again from all memories, a main pass. All
hidden states are asked for, memories are put together on the CPU, and every segment's outputs are kept until the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hmt import HMTForCausalLM


def segments(model: HMTForCausalLM, ids: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
    """Per segment of ids [B, T]: logits and hidden states of its tokens, and all memories so far [B, n, d]."""
    config, lm = model.config, model.backbone
    embed = lm.get_input_embeddings()
    rows = ids.shape[0]
    memories, sensory = None, ids[:, :0]
    for segment in ids.split(config.segment_length, dim=1):
        prompt = model.summary_prompt.expand(rows, 1, -1)
        half = embed(segment[:, : config.summary_length])
        out = lm(inputs_embeds=torch.cat([prompt, half, prompt], dim=1), output_hidden_states=True)
        query = out.hidden_states[-1][:, -1:]
        del out
        memory = model.memory.expand(rows, 1, -1)
        if memories is not None:
            past = memories[:, -config.queue_size :].to(ids.device)
            scores = model.recall.wq(query) @ model.recall.wk(past).transpose(1, 2) * model.recall.softmax_scale
            memory = scores.softmax(dim=-1) @ past
        embeds = torch.cat([memory, embed(sensory), embed(segment), memory], dim=1)
        out = lm(inputs_embeds=embeds, output_hidden_states=True)
        new = out.hidden_states[-1][:, -1:].cpu()
        memories = new if memories is None else torch.cat([memories, new], dim=1)
        start = 1 + sensory.shape[1]
        yield out.logits[:, start:-1].cpu(), tuple(layer[:, start:-1] for layer in out.hidden_states), memories
        del out
        sensory = segment[:, segment.shape[1] - config.num_sensory :]


def read(model: HMTForCausalLM, ids: Tensor) -> Tensor:
    """Memories [B, S, d] of ids [B, T]; the outputs of all segments stay until the last is read."""
    kept = list(segments(model, ids))
    return kept[-1][2]


def read_dropping_outputs(model: HMTForCausalLM, ids: Tensor) -> Tensor:
    """The same with no segment's outputs kept, as HMT-pytorch reads a prompt that it continues."""
    return [memories for *_, memories in segments(model, ids)][-1]


def score(model: HMTForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of ids [B, T] from the logits of the whole text at once, and the memories."""
    logits, hidden_states, memories = zip(*segments(model, ids), strict=True)
    whole = torch.cat(logits, dim=1)
    ids = ids.to(whole.device)
    layers = tuple(torch.cat(layer, dim=1) for layer in zip(*hidden_states, strict=True))
    loss = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    whole[:, :-1].argmax(dim=-1)  # its metrics need the predictions
    del layers
    return loss, memories[-1]
