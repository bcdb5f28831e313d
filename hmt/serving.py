"""Many independent documents in one call, each at its own position: what a server runs, and ragged batches of generate.

Documents are one-row states. In every call each of them takes new tokens, one or many. Rows whose segment goes on with
one token are decoded together, their keys in place in one buffer; rows that begin, continue or close a segment with
more are read together, padded on the right, where causal attention sees nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hmt.backbone import apply_head, embed, run_layers, takes_positions, takes_spans
from hmt.inputs import check_state, check_values
from hmt.kv_cache import batches, claimed, copy_of, grow, new_cache, rows_of, together
from hmt.passes import cache_capacity, can_decode, close_segment, open_segment, read_segments
from hmt.recurrence import augment, summarize
from hmt.state import HMTState
from hmt.tokens import Tokens, join
from hmt_kernels import memory_recall
from hmt_kernels.finite import check_finite, is_checking

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM


@dataclass
class _Row:
    """A document on its way through a call."""

    state: HMTState
    pending: Tensor  # tokens not yet read, [t]
    keep: int  # hidden states that are asked for, 0: all
    hidden: list[Tensor] = field(default_factory=list)  # [t, d] of tokens read, those asked for and maybe more

    def take(self, hidden: Tensor, state: HMTState) -> None:
        """The next len(hidden) tokens have been read."""
        self.state, self.pending = state, self.pending[len(hidden) :]
        self.hidden = [hidden] if 0 < self.keep <= len(hidden) else [*self.hidden, hidden]


@torch.no_grad()
def step(
    model: HMTForCausalLM, states: Sequence[HMTState], tokens: Sequence[Tensor], *, logits_to_keep: int = 1
) -> tuple[list[Tensor], list[HMTState]]:
    """Read each document's new tokens [t], t >= 1, after its state: logits [kept, vocab] and the new state of each.

    The results are those of model(tokens[i][None], state=states[i], use_cache=True) on its own; the states given stay
    valid. Documents may stand at different positions and bring different numbers of tokens.

    Args:
        states: one-row states, from `model.new_state()`, `model.read` or an earlier step.
        logits_to_keep: logits of the last so many new tokens of each document; 0 for all.

    Raises:
        TypeError, ValueError: states or tokens that do not fit the model or each other.

    Example:
        >>> logits, states = step(model, [model.read(book), model.new_state()], [question_ids, prompt_ids])
        >>> logits, states = step(model, states, [x[-1:].argmax(-1) for x in logits])
    """
    _check(model, states, tokens, logits_to_keep)
    rows = [_Row(state, ids, logits_to_keep) for state, ids in zip(states, tokens, strict=True)]
    _part_shared_caches(rows)
    shares = _shares_open_segments(model)
    while waiting := [row for row in rows if len(row.pending)]:
        groups: dict[str, list[_Row]] = {"decode": [], "alone": [], "close": [], "open": []}
        for row in waiting:
            groups[_kind(model, row, shares)].append(row)
        for row in groups["alone"]:
            _read_alone(model, row)
        if groups["decode"]:
            _decode(model, groups["decode"])
        for kind in ("close", "open"):
            if groups[kind]:
                _read(model, groups[kind])
    kept = [torch.cat(row.hidden)[-logits_to_keep:] for row in rows]
    if is_checking():
        for number, hidden in enumerate(kept):
            check_finite(f"what the backbone makes of document {number}", hidden)
    logits = apply_head(model.backbone, torch.cat(kept)[None])[0]
    return list(logits.split([len(k) for k in kept])), [row.state for row in rows]


def _check(model: HMTForCausalLM, states: Sequence[HMTState], tokens: Sequence[Tensor], logits_to_keep: int) -> None:
    if len(states) != len(tokens) or not states:
        raise ValueError(f"states and tokens must be as many, at least one, got {len(states)} and {len(tokens)}")
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must be an integer >= 0, got {logits_to_keep!r}")
    for number, (state, ids) in enumerate(zip(states, tokens, strict=True)):
        if not isinstance(state, HMTState) or not isinstance(ids, Tensor):
            raise TypeError(
                f"states must be HMTStates and tokens integer tensors, got {type(state).__name__} and "
                f"{type(ids).__name__} at {number}"
            )
        if state.batch_size != 1:
            raise ValueError(f"states must have one row each, got {state.batch_size} at {number}: see HMTState.split")
        if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32) or not len(ids):
            raise ValueError(
                f"tokens must be integer tensors [t], t >= 1, got {ids.dtype} {list(ids.shape)} at {number}"
            )
        check_state(state, model.config, ids.device)
    if is_checking():
        check_values(model, tokens, states)
    kinds = {None if s.queue is None else (s.queue.shape, s.queue.dtype) for s in states}
    if len(kinds) > 1:
        raise ValueError(f"states must have queues of one shape and dtype, got {sorted(map(str, kinds))}")


def _part_shared_caches(rows: list[_Row]) -> None:
    """A cache is written in place, so every further row that continues the same state gets a copy."""
    seen: set[int] = set()
    for row in rows:
        if id(row.state.cache) in seen:
            with claimed(row.state.cache) as mine:
                row.state = replace(row.state, cache=copy_of(row.state.cache) if mine else None)
        elif row.state.cache is not None:
            seen.add(id(row.state.cache))


def _shares_open_segments(model: HMTForCausalLM) -> bool:
    """Whether one pass leaves every row all keys of its own, and positions are ours to give."""
    return takes_positions(model.backbone) and batches(new_cache(model.backbone, cache_capacity(model.config)))


def _kind(model: HMTForCausalLM, row: _Row, shares: bool) -> str:
    """What comes next for a row: "close" a segment, "open" or prolong one, "decode" a token, or any of it "alone"."""
    if row.state.num_open + len(row.pending) >= model.config.segment_length:
        return "close"
    if not shares:
        return "alone"
    if len(row.pending) == 1 and can_decode(model, row.state, Tokens(row.pending[None]), use_cache=True):
        return "decode" if row.state.open.mask is None and batches(row.state.cache) else "alone"
    return "open"


def _read_alone(model: HMTForCausalLM, row: _Row) -> None:
    """All of a row's tokens, which stay within its segment."""
    (result,) = read_segments(model, Tokens(row.pending[None]), row.state, use_cache=True)
    row.take(result.hidden[0], result.state)


def _decode(model: HMTForCausalLM, rows: list[_Row]) -> None:
    """One more token of every row's open segment, but of those whose cache another thread uses: these wait."""
    if len(rows) == 1:
        return _read_alone(model, rows[0])
    with contextlib.ExitStack() as stack:
        mine = []
        for row in rows:
            new = Tokens(row.pending[None])
            if stack.enter_context(claimed(row.state.cache)) and can_decode(model, row.state, new, use_cache=True):
                mine.append(row)
            else:
                row.state = row.state.without_cache()
        if mine:
            _decode_together(model, mine)


def _decode_together(model: HMTForCausalLM, rows: list[_Row]) -> None:
    cache, own = together([row.state.cache for row in rows])  # type: ignore[misc]
    lengths = [c.get_seq_length() for c in own]
    positions = torch.tensor(lengths, device=rows[0].pending.device)
    width = max(lengths) + 1
    span = torch.stack([positions + 1, torch.full_like(positions, width)], dim=1).to(torch.int32)
    if takes_spans(model.backbone):
        mask = span[:, None, None]
    else:
        mask = torch.arange(width, device=span.device)[None] < span[:, :1]
    embeds = embed(model.backbone, torch.stack([row.pending for row in rows]))
    out = run_layers(model.backbone, embeds, mask, cache, position_ids=positions[:, None]).last_hidden_state
    grow(own)
    for row, hidden, kept in zip(rows, out, own, strict=True):
        row.take(hidden, open_segment(row.state, join(row.state.open, Tokens(row.pending[None])), kept))


def _read(model: HMTForCausalLM, rows: list[_Row]) -> None:
    """The next segment, or what there is of it, of every row; all of them close it, or none does."""
    length = model.config.segment_length
    takes = [min(length - row.state.num_open, len(row.pending)) for row in rows]
    segments = [join(row.state.open, Tokens(row.pending[None, :take])) for row, take in zip(rows, takes, strict=True)]
    closing = segments[0].length == length
    recalled = _recall(model, rows, segments)
    parts = [
        augment(
            model.backbone,
            memory,
            row.state.recent.last(model.config.num_sensory).ids,
            Tokens(segment.ids, segment.mask),
            closing=closing,
        )
        for row, segment, memory in zip(rows, segments, recalled, strict=True)
    ]
    embeds = pad_sequence([e[0] for e, _ in parts], batch_first=True)
    sizes = [e.shape[1] for e, _ in parts]
    mask = None
    if any(m is not None for _, m in parts):
        shown = [torch.ones(n, dtype=torch.bool, device=embeds.device) if m is None else m[0] for (_, m), n in
                 zip(parts, sizes, strict=True)]  # fmt: skip
        mask = pad_sequence(shown, batch_first=True, padding_value=True)
    cache = None if closing else new_cache(model.backbone, cache_capacity(model.config))
    out = run_layers(model.backbone, embeds, mask, cache).last_hidden_state
    caches = [] if cache is None else rows_of(cache, sizes)
    for i, (row, segment, take) in enumerate(zip(rows, segments, takes, strict=True)):
        ends_with_memory = closing and recalled[i] is not None
        stop = sizes[i] - ends_with_memory
        if closing:
            queue = None if row.state.queue is None else row.state.queue.clone()  # the caller's stays as it was
            memory = out[i : i + 1, stop] if ends_with_memory else None
            state = close_segment(model, replace(row.state, queue=queue), segment, memory)
        else:
            state = open_segment(row.state, segment, caches[i])
        row.take(out[i, stop - take : stop], state)


def _recall(model: HMTForCausalLM, rows: list[_Row], segments: list[Tokens]) -> list[Tensor | None]:
    """p_n [1, d] of every row: one batch of summaries, one recall over all queues with what each has filled."""
    mode = model.config.mode
    recalled: list[Tensor | None] = [None if mode == "baseline" else model.memory for _ in rows]
    later = [i for i, row in enumerate(rows) if row.state.num_closed and mode != "baseline"]
    if not later:
        return recalled
    if mode == "rmt":
        for i in later:
            recalled[i] = rows[i].state.valid()[:, 0]
        return recalled
    size = model.config.summary_length
    if model.config.summarises_previous:
        sources = [rows[i].state.recent.last(size) for i in later]
    else:
        sources = [segments[i].slice(0, size) for i in later]
    summaries = summarize(model.backbone, model.summary_prompt, sources, model.config.summary_batch_size)
    query = model.recall.absorb(torch.cat(summaries))[:, None]
    queue = torch.cat([rows[i].state._queue() for i in later])
    filled = torch.tensor([rows[i].state.num_valid for i in later], dtype=torch.int32, device=queue.device)
    out = memory_recall(query.to(queue.dtype), queue, filled, softmax_scale=model.recall.softmax_scale)
    for i, memory in zip(later, out.recalled, strict=True):
        recalled[i] = memory
    return recalled


def forward_rows(
    model: HMTForCausalLM, input_ids: Tensor, attention_mask: Tensor | None, states: Sequence[HMTState], keep: int
) -> dict[str, Any]:
    """`step` as a forward pass: ids [B, T] padded on the left; "logits" [B, keep, vocab] of the last and the "state".

    Raises:
        ValueError: not one state per row, a row without any token, or one with fewer tokens than logits asked for.
    """
    if len(states) != len(input_ids):
        raise ValueError(f"state has {len(states)} states, but input_ids has {len(input_ids)} rows")
    if attention_mask is None:
        tokens = list(input_ids)
    else:
        tokens = [ids[seen] for ids, seen in zip(input_ids, attention_mask.bool(), strict=True)]
    fewest = min(len(ids) for ids in tokens)
    if fewest < max(keep, 1):
        raise ValueError(f"logits_to_keep={keep} needs that many tokens in every row, got one with {fewest}")
    logits, states = step(model, states, tokens, logits_to_keep=keep)
    return {"logits": torch.stack(logits), "state": states}
