"""HMTForCausalLM: any decoder-only language model, reading text of any length segment by segment."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from hmt.backbone import apply_head, check_backbone, embed, new_cache, patch_layers
from hmt.config import HMTConfig
from hmt.generation import HMTGenerationMixin
from hmt.inputs import check_inputs
from hmt.loss import IGNORE_INDEX, shift_left, summed_cross_entropy
from hmt.recall import MemoryRecall
from hmt.recurrence import augment, decode_token, read_segment, summarize
from hmt.state import HMTState, empty_state, push_memory
from hmt.tokens import Tokens, join, split


@dataclass
class HMTOutput(ModelOutput):
    """Result of a forward pass.

    Attributes:
        loss: mean cross entropy over the labelled positions.
        logits: [B, T, vocab], only where asked for.
        state: what was remembered; pass it to the next call.
        trace: with output_trace=True, per segment read: "memory" [B, S, d] (segments read to their end only),
            "recalled" [B, S, d] and "age" [B, S], the number of segments since the strongest memory (0: none yet).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: HMTState | None = None
    trace: dict[str, Tensor] | None = None


@dataclass
class SegmentResult:
    """One segment of a pass: hidden states [B, T, d] of its new tokens, the state after it, and what to trace."""

    hidden: Tensor
    state: HMTState
    memory: Tensor | None = None
    recalled: Tensor | None = None
    age: Tensor | None = None


class HMTForCausalLM(PreTrainedModel, HMTGenerationMixin):
    """Hierarchical Memory Transformer around a causal language model (arXiv 2405.06067).

    For segment n:  q_n = summary of its first tokens;  p_n = recall(q_n) from the queue of past memories;
    [p_n ; last k tokens ; segment ; p_n] -> logits and the segment's memory m_n, which joins the queue.

    Example:
        >>> model = HMTForCausalLM.from_backbone(AutoModelForCausalLM.from_pretrained(name), segment_length=512)
        >>> state = model.read(book_ids)
        >>> model.generate(question_ids, state=state, max_new_tokens=100)
    """

    config_class = HMTConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    memory: nn.Parameter
    summary_prompt: nn.Parameter
    recall: MemoryRecall

    def __init__(self, config: HMTConfig, backbone: PreTrainedModel | None = None):
        requested_attention = config._attn_implementation
        super().__init__(config)
        if backbone is None:
            backbone = AutoModelForCausalLM.from_config(config.text_config)
            _set_attention(backbone, requested_attention)
            patch_layers(backbone, config.fused_rotary)
        self.backbone = backbone
        # one object, so that resizing embeddings or changing the attention of either is seen by both
        config.text_config = backbone.config
        if config.num_memory:
            self.memory = nn.Parameter(torch.empty(1, config.hidden_size))
        if config.mode == "hmt":
            width = config.hidden_size
            self.summary_prompt = nn.Parameter(torch.empty(1, width))
            self.recall = MemoryRecall(width, config.recall_dim or width, config.recall_softmax_scale)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryRecall):
            module.wq.reset_parameters()
            module.wk.reset_parameters()
        elif module is self:
            std = float(cast(Tensor, self.get_input_embeddings().weight).float().std())
            for name in ("memory", "summary_prompt"):
                if (parameter := getattr(self, name, None)) is not None:
                    nn.init.normal_(parameter, std=std)

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel, *, attn_implementation: str | None = None, **settings: Any
    ) -> HMTForCausalLM:
        """Wrap a causal language model; its weights are shared, the memory's own parameters are new and untrained.

        Args:
            backbone: a decoder-only model of transformers with an LM head.
            attn_implementation: of the backbone's layers; None means "hmt" in place of "sdpa" and no other change.
            settings: fields of `HMTConfig`.

        Raises:
            TypeError, ValueError: a backbone that cannot work, with the reason (see `check_backbone`); a bad setting.
        """
        if hasattr(backbone, "get_base_model"):
            raise TypeError("backbone must be the plain model, got a PEFT model: wrap it with HMT first, PEFT second")
        check_backbone(backbone)
        for module in backbone.modules():
            module._is_hf_initialized = True
        attention = attn_implementation or backbone.config._attn_implementation
        # a copy, because creating a model resets the attention of its config's sub-configs
        model = cls(HMTConfig(text_config=copy.deepcopy(backbone.config), **settings), backbone)
        embeddings = backbone.get_input_embeddings().weight
        own = [module for name, module in model.named_children() if name != "backbone"]
        for module in own:
            module.to(embeddings)
        for parameter in model.parameters(recurse=False):
            parameter.data = parameter.data.to(embeddings)
        _set_attention(backbone, attn_implementation, loaded_with=attention)
        patch_layers(backbone, model.config.fused_rotary)
        return model.train(backbone.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    @property
    def max_length(self) -> int:
        """Longest text that can be read: there is no limit, but evaluation tools ask for a number."""
        return 2**31 - 1

    def new_state(self, batch_size: int = 1) -> HMTState:
        """The state before any text has been read."""
        size = {"hmt": self.config.queue_size, "rmt": 1, "baseline": 0}[self.config.mode]
        return empty_state(batch_size, size, self.config.hidden_size, dtype=self.dtype, device=self.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: HMTState | None = None,
        use_cache: bool = False,
        logits_to_keep: int | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_trace: bool = False,
        **kwargs: Any,
    ) -> HMTOutput:
        """Read input_ids [B, T] after what `state` remembers; give the loss and logits that are asked for.

        Args:
            attention_mask: [B, T], 0 for padding.
            labels: [B, T] as in transformers: shifted here, -100 is not counted.
            use_cache: keep keys and values of the open segment in the state, for token by token decoding.
            logits_to_keep: logits of the last so many tokens, 0 for all; None means all, or none with a loss.
            shift_labels: labels already shifted: shift_labels[:, t] follows input_ids[:, t].
            num_items_in_batch: divisor of the loss instead of the number of labels, for gradient accumulation.
            output_trace: also return memories, recalled embeddings and ages of every segment.

        Raises:
            ValueError: shapes that do not fit, or a state of another batch size.
        """
        check_inputs(input_ids, attention_mask, labels, shift_labels, logits_to_keep, state, kwargs)
        length = input_ids.shape[1]
        if labels is not None and shift_labels is None:
            shift_labels = shift_left(labels)
        if logits_to_keep is None:
            logits_to_keep = 0 if shift_labels is None else None
        first_logit = length if logits_to_keep is None else length - (logits_to_keep or length)
        state = self.new_state(input_ids.shape[0]) if state is None else state

        total, kept, results, seen = None, [], [], 0
        for result in self._run(Tokens.of(input_ids, attention_mask), state, use_cache):
            rows, state = result.hidden, result.state
            stop = seen + rows.shape[1]
            if shift_labels is not None:
                part = summed_cross_entropy(
                    self.backbone, rows, shift_labels[:, seen:stop], self.config.loss_chunk_size
                )
                total = part if total is None else total + part
            if stop > first_logit:
                kept.append(rows[:, max(0, first_logit - seen) :])
            if output_trace:
                results.append(result)
            seen = stop
        loss = None
        if shift_labels is not None and total is not None:
            counted = shift_labels.ne(IGNORE_INDEX).sum()
            loss = total / (counted if num_items_in_batch is None else num_items_in_batch)
        logits = apply_head(self.backbone, torch.cat(kept, dim=1)) if kept else None
        return HMTOutput(loss=loss, logits=logits, state=state, trace=_trace(results) if output_trace else None)

    @torch.no_grad()
    def read(self, input_ids: Tensor, state: HMTState | None = None, attention_mask: Tensor | None = None) -> HMTState:
        """Read input_ids [B, T] and return only the new state; tokens past the last full segment wait in it unread."""
        check_inputs(input_ids, attention_mask, state=state)
        state = self.new_state(input_ids.shape[0]) if state is None else state
        text = Tokens.of(input_ids, attention_mask)
        length = self.config.segment_length
        full = max(0, (state.num_open + text.length) // length * length - state.num_open)
        if full:
            for result in self._run(text.slice(0, full), state):
                state = result.state
        return _open(state, join(state.open, text.slice(full, text.length)))

    def _run(self, new: Tokens, state: HMTState, use_cache: bool = False) -> Iterator[SegmentResult]:
        """Read new tokens after `state`, one segment at a time; the last may stay open."""
        length, opened = self.config.segment_length, state.num_open
        text = join(state.open, new)
        if self._can_decode(state, new, use_cache):
            hidden = decode_token(self.backbone, new.ids, text.mask, state.cache)
            yield SegmentResult(hidden, _open(state, text, state.cache))
            return
        segments = split(text, length)
        queries = self._queries(segments, state)
        if segments[0].length == length and state.queue is not None:
            state = replace(state, queue=state.queue.clone())  # the caller's state stays as it was
        pending, fuses = None, self._fuses_steps(state)
        for number, (segment, query) in enumerate(zip(segments, queries, strict=True), start=1):
            closing = segment.length == length
            sensory = state.recent.last(self.config.num_sensory).ids
            if pending is None or query is None:
                recalled, age = self._recall(query, state)
                embeds, mask = augment(self.backbone, recalled, sensory, segment, closing=closing)
            else:
                blank = self.memory.expand(state.batch_size, -1)
                embeds, mask = augment(self.backbone, blank, sensory, segment, closing=closing)
                recalled, age = self._step(query, state, pending, embeds if closing else embeds[:, :1])
            cache = new_cache(self.backbone) if use_cache and not closing else None
            ends_with_memory = closing and recalled is not None
            hidden, memory = read_segment(
                self.backbone, embeds, mask, segment.length, ends_with_memory=ends_with_memory, cache=cache
            )
            # the next segment's step writes it into the queue, together with its recall
            pending = memory if fuses and number < len(segments) else None
            state = self._close(state, segment, memory, pending is None) if closing else _open(state, segment, cache)
            yield SegmentResult(hidden[:, opened:], state, memory, recalled, age)
            opened = 0

    def _can_decode(self, state: HMTState, new: Tokens, use_cache: bool) -> bool:
        if not use_cache or state.cache is None or new.length != 1:
            return False
        if state.num_open == 0 or state.num_open + 1 >= self.config.segment_length:
            return False
        # a cache that another continuation of the same state has already extended no longer fits
        num_sensory = min(self.config.num_sensory, state.recent.length)
        return state.cache.get_seq_length() == self.config.num_memory + num_sensory + state.num_open

    def _queries(self, segments: list[Tokens], state: HMTState) -> list[Tensor | None]:
        """Absorbed recall queries [B, d] of all segments: every summary in batches, then one product."""
        config = self.config
        if config.mode != "hmt" or not segments:
            return [None] * len(segments)
        if config.summary_source == "current":
            sources = [s.slice(0, config.summary_length) for s in segments]
        else:
            sources = [s.last(config.summary_length) for s in (state.recent, *segments[:-1])]
        # nothing has been written before the first segment of a text, so it recalls nothing
        first = 1 if state.num_closed == 0 else 0
        summaries = summarize(self.backbone, self.summary_prompt, sources[first:], config.summary_batch_size)
        queries: list[Tensor | None] = [None] * first
        if summaries:
            queries += self.recall.absorb(torch.stack(summaries)).unbind(0)
        return queries

    def _recall(self, query: Tensor | None, state: HMTState) -> tuple[Tensor | None, Tensor | None]:
        """p_n [B, d] and the age [B] of the strongest memory (None before there is one)."""
        if self.config.mode == "baseline":
            return None, None
        if state.num_closed == 0:
            return self.memory.expand(state.batch_size, -1), None
        if self.config.mode == "rmt":
            return state.valid()[:, 0], None
        out = self.recall(query, state.valid())
        return out.recalled[:, 0], state.age_of(out.slot[:, 0])

    def _fuses_steps(self, state: HMTState) -> bool:
        """Whether a memory's way into the queue and the next recall can be one step, which writes in place."""
        if torch.is_grad_enabled() or self.config.mode != "hmt" or state.queue is None:
            return False
        embeds = embed(self.backbone, state.open.ids[:, :0])
        return embeds.dtype == state.queue.dtype and embeds.device == state.queue.device

    def _step(self, query: Tensor, state: HMTState, memory: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Write the latest memory [B, d], then `_recall` into both ends of embeds [B, T, d]."""
        slot = (state.num_closed - 1) % self.config.queue_size
        out = self.recall.step(query, state.valid(), memory, slot, embeds)
        return out.recalled[:, 0], state.age_of(out.slot[:, 0])

    def _close(self, state: HMTState, segment: Tokens, memory: Tensor | None, write: bool) -> HMTState:
        """The state after a full segment; its memory joins the queue now (`write`) or with the next step."""
        queue = push_memory(state, memory) if write and memory is not None else state.queue
        keep = self.config.num_sensory
        if self.config.mode == "hmt" and self.config.summary_source == "previous":
            keep = max(keep, self.config.summary_length)
        return HMTState(queue, state.num_closed + 1, segment.last(keep), segment.slice(0, 0))


def _set_attention(backbone: PreTrainedModel, requested: str | None, loaded_with: str | None = None) -> None:
    """Give the backbone the attention asked for; by default "hmt" in place of transformers' own default "sdpa"."""
    current = loaded_with or backbone.config._attn_implementation
    replaceable = current == "sdpa" and getattr(backbone.config, "attn_logit_softcapping", None) is None
    backbone.set_attn_implementation(requested or ("hmt" if replaceable else current))


def _open(state: HMTState, segment: Tokens, cache: Any = None) -> HMTState:
    return replace(state, open=segment, cache=cache)


def _trace(results: list[SegmentResult]) -> dict[str, Tensor]:
    trace = {}
    for name in ("memory", "recalled", "age"):
        values = [getattr(r, name) for r in results]
        if name == "age":
            known = next((v for v in values if v is not None), None)
            values = [] if known is None else [torch.zeros_like(known) if v is None else v for v in values]
        values = [v for v in values if v is not None]
        if values:
            trace[name] = torch.stack(values, dim=1)
    return trace
