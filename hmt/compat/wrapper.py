"""The recurrence over segments, with HMT-pytorch's signatures and state_dict keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from hmt.backbone import unwrap
from hmt.compat.cell import MemoryCell
from hmt.compat.cross_attention import CrossAttentionMemory
from hmt.compat.outputs import collect
from hmt.model import HMTForCausalLM
from hmt.recurrence import summarize
from hmt.state import HMTState, empty_state, push_memory
from hmt.tokens import Tokens
from hmt_kernels import memory_recall

BROWSE_THRESHOLD = 3


class RecurrentWrapper(nn.Module):
    """HMT when `emb` is given, else RMT or, with a cell without memory tokens, the plain baseline.

    Args:
        memory_cell: a MemoryCell.
        emb: embedding module of the backbone; turns on summaries and recall.
        word_emb_dim, hidden_dim: embedding width d and recall width h.
        ltm_context: memories N kept for recall.
        rmt_kwargs: segment_size, max_n_segments, mask_size, n_cell_out, segment_alignment, k2, is_qa_task; k2 has no
            effect, as it has none in HMT-pytorch.
    """

    def __init__(
        self,
        memory_cell: MemoryCell,
        emb: nn.Module | None = None,
        word_emb_dim: int = 4096,
        hidden_dim: int = 4096,
        ltm_context: int = 100,
        **rmt_kwargs: Any,
    ):
        super().__init__()
        self.memory_cell = memory_cell
        self.rmt_config = rmt_kwargs
        self.ltm_context = ltm_context
        self.cross_attn: CrossAttentionMemory | None = None
        if emb is not None:
            std = cast(Tensor, emb.weight).detach().float().std().cpu()
            self.mem = nn.Parameter(torch.randn(1, word_emb_dim) * std)
            self.cross_attn = CrossAttentionMemory(word_emb_dim, hidden_dim)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        labels_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mask_size: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        sum_fraction: float = 0.5,
        segment_size: int = 1022,
        extra_size: int = 16,
        mode: str = "train",
        prof: bool = False,
        switch_at: int = -1,
        pos_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[CausalLMOutputWithCrossAttentions, list[int]]:
        """(out, hist): loss, ppl, ret_loss, f1, the logits of the last n_cell_out segments, and the recalled ages.

        mode="test" reads extra_size more tokens in segments that recall one of the last two; mode="browse" and the
        segments from switch_at on return the logits of k - k//2 sensory rows too. `prof` is accepted and does nothing.
        """
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds is not supported: sensory memory reads tokens again, pass input_ids")
        num_kept = self.rmt_config.get("n_cell_out")
        if not isinstance(num_kept, int) or num_kept < 1:
            raise ValueError(
                f"n_cell_out, a keyword argument of RecurrentWrapper, must be an integer >= 1, got {num_kept!r}"
            )
        _check_size("segment_size", segment_size, 1)
        _check_size("extra_size", extra_size, 0)
        text = self._text(input_ids, attention_mask)
        summary_size = round(segment_size * sum_fraction)
        # with mode="test" a segment's end depends on what it recalls, so only then a summary waits for its turn
        planned = self.cross_attn is not None and mode != "test"
        if planned:
            starts = _starts(text.length, segment_size, extra_size, switch_at)
            queries = self._queries([text.slice(a, a + summary_size) for a in starts])

        state = self._new_state(text.ids.shape[0])
        memory = sensory = None
        ret_loss: Tensor | int = 0 if self.cross_attn is None else torch.tensor(0.0)
        cells: list[CausalLMOutputWithCrossAttentions] = []
        ages: list[Tensor] = []
        start = number = 0
        while start < text.length:
            stop = start + segment_size
            browse = False
            if self.cross_attn is not None and number > 0:
                query = queries[number] if planned else self._queries([text.slice(start, start + summary_size)])[0]
                scale = self.cross_attn.scale(generate=False)
                memory, age = self._recall(query, state, scale)
                ages.append(age)
                browse = mode == "test" and int(age[0]) < BROWSE_THRESHOLD
                if pos_mask is not None and stop >= text.length:
                    ret_loss = self.cross_attn.retrieval_loss(query, state.memories(), pos_mask[..., :number], scale)
            switched = 0 <= switch_at <= number
            if browse or switched:
                stop += extra_size
            segment = text.slice(start, stop)
            cell, memory, sensory = self.memory_cell(
                segment.ids,
                memory_state=memory,
                prepend_state=sensory,
                browse=browse or switched or mode == "browse",
                switch=switch_at == number,
                attention_mask=segment.mask,
                output_hidden_states=bool(output_hidden_states),
                output_logits=text.length - start <= num_kept * (segment_size + extra_size),
            )
            cells = [*cells, cell][-num_kept:]
            if self.cross_attn is not None:
                state = _push(state, memory)
                memory = None
            start, number = stop, number + 1
        size = self.rmt_config.get("mask_size") if mask_size is None else mask_size
        out = collect(cells, labels, size, ret_loss, bool(output_hidden_states))
        return out, torch.stack(ages).flatten().tolist() if ages else []

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        segment_size: int,
        mem_seq: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Tensor:
        """New tokens after a prompt of any length; mem_seq [B, M, d] are the memories of its first M segments.

        Up to segment_size - k new tokens are generated in the prompt's last segment, as HMT-pytorch does. Past that,
        where HMT-pytorch fails, segments close when they are full and the recurrence goes on.
        """
        _check_size("segment_size", segment_size, 1)
        text = self._text(input_ids, attention_mask)
        segments = self._segments(text, segment_size)
        known = [] if mem_seq is None else list(mem_seq.to(text.ids.device).split(1, dim=1))
        if len(known) >= len(segments):
            raise ValueError(
                f"mem_seq must hold fewer memories than the prompt's {len(segments)} segments, got {len(known)}"
            )
        state = self._new_state(text.ids.shape[0])
        memory = sensory = None
        for segment, memory in zip(segments, known, strict=False):
            state = _push(state, memory)
            sensory = segment.last(self.memory_cell.n_prepend).ids if self.memory_cell.n_prepend else None
        queries = self._queries([s.slice(0, segment_size // 2) for s in segments]) if self.cross_attn else []
        for number in range(len(known), len(segments)):
            if self.cross_attn is not None:
                memory = None
                if state.num_closed:
                    memory, _ = self._recall(queries[number], state, self.cross_attn.scale(generate=True))
            if number == len(segments) - 1:
                break
            _, memory, sensory = self.memory_cell(
                segments[number].ids, memory, sensory, attention_mask=segments[number].mask, output_logits=False
            )
            if memory is not None:
                state = _push(state, memory)

        last = segments[-1]
        new_tokens = generate_kwargs.get("max_new_tokens")
        if new_tokens is None or new_tokens <= segment_size - self.memory_cell.n_prepend:
            return self.memory_cell.generate(last.ids, memory, sensory, last.mask, **generate_kwargs)
        if sensory is not None:
            state.recent = Tokens(sensory)
        model = self.to_hmt(segment_size)
        tokens = model.generate(last.ids, attention_mask=last.mask, state=state, **generate_kwargs)
        return tokens[:, last.length :]

    def to_hmt(self, segment_size: int) -> HMTForCausalLM:
        """The HMTForCausalLM that shares every weight of this wrapper, for segments of segment_size tokens."""
        cell = self.memory_cell
        backbone = unwrap(cell.model)
        settings: dict[str, Any] = {"mode": "baseline" if not cell.num_mem_tokens else "rmt"}
        if self.cross_attn is not None:
            settings = {
                "mode": "hmt",
                "queue_size": self.ltm_context,
                "recall_dim": self.cross_attn.hidden_dim,
                "summary_fraction": segment_size // 2 / segment_size,
            }
        model = HMTForCausalLM.from_backbone(
            backbone,
            attn_implementation=backbone.config._attn_implementation,
            segment_length=segment_size,
            num_sensory=cell.n_prepend,
            **settings,
        )
        if cell.num_mem_tokens:
            model.memory = cell.memory
        if self.cross_attn is not None:
            model.summary_prompt = self.mem
            model.recall.wq, model.recall.wk = self.cross_attn.wq, self.cross_attn.wk
        return model

    def _text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tokens:
        device = self.memory_cell.model.get_input_embeddings().weight.device
        mask = None if attention_mask is None else attention_mask.to(device)
        return Tokens.of(input_ids.to(device), mask)

    def _new_state(self, batch_size: int) -> HMTState:
        weight = self.memory_cell.model.get_input_embeddings().weight
        width = 0
        if self.memory_cell.num_mem_tokens:
            width = self.memory_cell.memory.shape[1]
        size = (1 if self.cross_attn is None else self.ltm_context) if width else 0
        return empty_state(batch_size, size, width, dtype=weight.dtype, device=weight.device)

    def _queries(self, sources: list[Tokens]) -> list[Tensor]:
        """Absorbed recall queries [B, d] of all summaries in one batch of passes and one product."""
        rows = self.rmt_config.get("summary_batch_size", 8)
        summaries = summarize(self.memory_cell.model, self.mem, sources, rows)
        recall = cast(CrossAttentionMemory, self.cross_attn)
        return list(recall.absorb(torch.stack(summaries)).unbind(0))

    def _recall(self, query: Tensor, state: HMTState, scale: float) -> tuple[Tensor, Tensor]:
        """p_n [B, 1, d] and the ages [B] of the strongest memories."""
        queue = state.valid()
        out = memory_recall(query[:, None].to(queue.dtype), queue, softmax_scale=scale)
        return out.recalled, state.age_of(out.slot[:, 0])

    def _segments(self, text: Tokens, size: int) -> list[Tokens]:
        """The prompt cut as segment_alignment says: from the left (default), from the right, or in even parts."""
        alignment = self.rmt_config.get("segment_alignment")
        if alignment in (None, "left"):
            starts = list(range(0, text.length, size))
        elif alignment == "right":
            starts = list(range(text.length, 0, -size))[::-1]
            starts = [0, *starts[:-1]]
        elif alignment == "center":
            even = math.ceil(text.length / math.ceil(text.length / size))
            starts = list(range(0, text.length, even))
        else:
            raise ValueError(f"segment_alignment must be 'left', 'right' or 'center', got {alignment!r}")
        return [text.slice(a, b) for a, b in zip(starts, [*starts[1:], text.length], strict=True)]


def _check_size(name: str, value: int, least: int) -> None:
    if not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _starts(length: int, size: int, extra: int, switch_at: int) -> list[int]:
    """First token of every segment; from segment switch_at on (if >= 0) they are `extra` tokens longer."""
    starts: list[int] = []
    start = 0
    while start < length:
        switched = 0 <= switch_at <= len(starts)
        starts.append(start)
        start += size + (extra if switched else 0)
    return starts


def _push(state: HMTState, memory: Tensor) -> HMTState:
    """The state with memory [B, 1, d] in its queue."""
    return replace(state, queue=push_memory(state, memory[:, 0]), num_closed=state.num_closed + 1)
