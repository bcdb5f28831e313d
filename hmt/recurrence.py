"""The recurrence of the Hierarchical Memory Transformer, one function per step of arXiv 2405.06067, section 3.

A pass reads  [memory | sensory tokens | segment | memory]  and leaves the segment's own memory in its last position.
Memory and sensory positions are always visible; padding hides tokens of the segment only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hmt.backbone import embed, hidden_states, takes_spans
from hmt.remat import rematerialized
from hmt.tokens import Tokens, stack_rows

Layers = Callable[..., Tensor]  # called like hidden_states


def surround(front: Sequence[Tensor], tokens: Tensor, back: Sequence[Tensor], mask: Tensor | None) -> tuple:
    """Concatenate embeddings [B, *, d] along positions, and extend a mask of the tokens with always visible slots."""
    embeds = torch.cat([*front, tokens, *back], dim=1)
    return embeds, _extend(mask, *(sum(x.shape[1] for x in part) for part in (front, back)))


def _extend(mask: Tensor | None, left: int, right: int) -> Tensor | None:
    """A mask [B, T] with visible positions added at both ends; of a span [B, 2], the span among all positions."""
    if mask is None:
        return None
    if mask.dtype == torch.int32:
        return (mask + left)[:, None, None]
    return nn.functional.pad(mask, (left, right), value=True)


def _hidden(model: PreTrainedModel, text: Tokens) -> Tensor | None:
    """What says which tokens are padding: the span where it is known and understood, else the mask."""
    return text.span if text.span is not None and takes_spans(model) else text.mask


def summarize(
    model: PreTrainedModel,
    prompt: Tensor,
    texts: Sequence[Tokens],
    batch_size: int,
    *,
    rematerialize: bool = False,
    offload: bool = False,
    find_layers: Callable[[Tokens], Layers | None] = lambda batch: None,
) -> list[Tensor]:
    """Step 1 for many segments at once: q = h_last([T ; E(x) ; T]) with the summary prompt T [1, d]; one [B, d] each.

    No summary depends on any memory, so all of them run as batches of about `batch_size` rows, without the LM head.
    With `rematerialize`, the backward pass recomputes them batch by batch. `find_layers` may know other layers for a
    batch, which see to that themselves.
    """
    summaries: list[Tensor | None] = [None] * len(texts)
    rows = texts[0].ids.shape[0] if texts else 1
    for group in _equal_lengths(texts, max(1, batch_size // rows)):
        batch = stack_rows([texts[i] for i in group])
        layers = find_layers(batch)
        run = partial(_summarize, model, layers or hidden_states)
        if rematerialize and layers is None:
            run = partial(rematerialized, run, offload=offload)
        last = run(prompt, *batch)
        for i, summary in zip(group, last.split(rows), strict=True):
            summaries[i] = summary
    return [s for s in summaries if s is not None]


def _summarize(model: PreTrainedModel, layers: Layers, prompt: Tensor, *text: Tensor | None) -> Tensor:
    batch = Tokens(*text)  # type: ignore[arg-type]
    embeds = embed(model, batch.ids)
    slot = prompt.to(embeds.dtype).expand(len(embeds), -1, -1)
    embeds, mask = surround([slot], embeds, [slot], _hidden(model, batch))
    return layers(model, embeds, mask, None, 1)[:, -1]


def _equal_lengths(texts: Sequence[Tokens], size: int) -> list[list[int]]:
    groups: list[list[int]] = []
    for i, text in enumerate(texts):
        if groups and len(groups[-1]) < size and texts[groups[-1][0]].length == text.length:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def augment(
    model: PreTrainedModel, memory: Tensor | None, sensory_ids: Tensor, segment: Tokens, *, closing: bool
) -> tuple[Tensor, Tensor | None]:
    """What step 3 reads, [p_n ; E(sensory) ; E(x_n) ; p_n], as embeddings [B, T, d], and its mask [B, T].

    memory [B, d] is p_n (None: no memory slots); sensory_ids [B, k] may be empty. The trailing memory slot changes no
    earlier position, so it is only there when `closing`.
    """
    embeds = embed(model, torch.cat([sensory_ids, segment.ids], dim=1))
    slots = [] if memory is None else [memory[:, None].to(embeds.dtype)]
    back = slots if closing else []
    mask = _extend(_hidden(model, segment), len(slots) + sensory_ids.shape[1], len(back))
    return torch.cat([*slots, embeds, *back], dim=1), mask


def read_segment(
    model: PreTrainedModel,
    embeds: Tensor,
    mask: Tensor | None,
    length: int,
    *,
    ends_with_memory: bool,
    cache: Cache | None = None,
    layers: Layers = hidden_states,
) -> tuple[Tensor, Tensor | None]:
    """Step 3: hidden states [B, length, d] of the segment's tokens and, from a trailing slot, its memory [B, d].

    embeds and mask come from `augment`. A `cache` keeps the keys and values for decoding.
    """
    hidden = layers(model, embeds, mask, cache, length + ends_with_memory)
    return hidden[:, :length], hidden[:, -1] if ends_with_memory else None


def decode_token(model: PreTrainedModel, text: Tokens, cache: Cache) -> Tensor:
    """Hidden state [B, 1, d] of the last token of the open segment [B, t]; the cache holds all before it."""
    mask = _extend(_hidden(model, text), cache.get_seq_length() + 1 - text.length, 0)
    return hidden_states(model, embed(model, text.ids[:, -1:]), mask, cache, None)
