"""HMTForCausalLM: any decoder-only language model, reading text of any length segment by segment."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import AutoModelForCausalLM, PreTrainedModel

from hmt.backbone import apply_head, is_quantised, known_embeddings, patch_layers
from hmt.backbone_checks import check_backbone, check_positions
from hmt.body import HMTBody
from hmt.config import HMTConfig
from hmt.generation import HMTGenerationMixin
from hmt.inputs import check_inputs, check_result, check_state, check_values
from hmt.loss import IGNORE_INDEX, SummedCrossEntropy, shift_left
from hmt.outputs import HMTOutput, SegmentResult, trace_of
from hmt.passes import open_segment, read_segments
from hmt.recall import MemoryRecall
from hmt.serving import forward_rows
from hmt.state import HMTState, empty_state
from hmt.tokens import Tokens, join
from hmt_kernels.finite import is_checking

# their layers compute with the mask, which for attention "hmt" is none
READ_MASKS = ("axk2", "deepseek_v32", "doge", "glm_moe_dsa")


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
    _keep_in_fp32_modules = ("recall",)  # by a float16 load; and no load quantises it, so that it can be trained
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    memory: nn.Parameter
    summary_prompt: nn.Parameter
    recall: MemoryRecall

    def __init__(self, config: HMTConfig, backbone: PreTrainedModel | None = None):
        config.check()  # from_pretrained sets what its caller gives after a config is made
        requested_attention = config._attn_implementation
        super().__init__(config)
        if backbone is None:
            backbone = AutoModelForCausalLM.from_config(config.text_config)
            _set_attention(backbone, requested_attention)
            patch_layers(backbone, config.fused_rotary, config.compile_layers)
        others = 2 * config.num_memory + config.num_sensory
        check_positions(backbone, others + config.segment_length, others)
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
            embeddings = known_embeddings(self.backbone)
            usual = getattr(self.backbone.config, "initializer_range", 0.02)
            std = usual if embeddings.is_meta else float(embeddings.float().std())
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
        if unknown := settings.keys() - {field.name for field in dataclasses.fields(HMTConfig)}:
            raise TypeError(f"settings must be fields of HMTConfig, got {', '.join(sorted(unknown))}")
        check_backbone(backbone)
        for module in backbone.modules():
            module._is_hf_initialized = True
        before = backbone.config._attn_implementation
        attention = attn_implementation or before
        # a copy, because creating a model resets the attention of its config's sub-configs
        model = cls(HMTConfig(text_config=copy.deepcopy(backbone.config), **settings), backbone)
        embeddings = known_embeddings(backbone)
        own = [module for name, module in model.named_children() if name != "backbone"]
        for module in own:
            module.to(embeddings)
        for parameter in model.parameters(recurse=False):
            parameter.data = parameter.data.to(embeddings)
        try:
            _set_attention(backbone, attn_implementation, loaded_with=attention)
            if backbone.config._attn_implementation != before:
                _check_attention(backbone, before)
            patch_layers(backbone, model.config.fused_rotary, model.config.compile_layers)
        except (ValueError, ImportError):
            backbone.set_attn_implementation(before)  # who is refused has the model that was given
            raise
        if (given := getattr(backbone, "generation_config", None)) is not None:
            model.generation_config = copy.deepcopy(given)  # what ends a chat's answer, for one
        return model.train(backbone.training)

    @property
    def base_model(self) -> HMTBody:  # type: ignore[override]
        """The model without its LM head."""
        return HMTBody(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def save_pretrained(self, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as any model of transformers; generation config included.

        Raises:
            ValueError: a quantised backbone, whose weights could not be loaded again.
        """
        if is_quantised(self.backbone):
            raise ValueError(
                "the backbone must not be quantised for its weights to be saved: hmt.adapters.save_adapter(model, "
                "directory, backbone's name) saves what was trained beside them"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Of the first weights that are not offloaded."""
        return next((p.device for p in self.parameters() if not p.is_meta), super().device)

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
        state: HMTState | Sequence[HMTState] | None = None,
        use_cache: bool = False,
        logits_to_keep: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_trace: bool = False,
        **kwargs: Any,
    ) -> HMTOutput:
        """Read input_ids [B, T] after what `state` remembers; give the loss and logits that are asked for.

        Args:
            attention_mask: [B, T], 0 for padding.
            state: of a call before; None for a new text. A list of one-row states, which may stand at different
                positions, reads each row as on its own (`hmt.serving.step`; the mask may pad on the left).
            labels: [B, T] as in transformers: shifted here, -100 is not counted. Where gradients are recorded, a loss
                holds that of the LM head until its backward pass.
            use_cache: keep keys and values of the open segment in the state, for token by token decoding.
            logits_to_keep: logits of the last so many tokens, 0 for all; None means all, or none with a loss.
            num_items_in_batch: divisor of the loss instead of the number of labels, for gradient accumulation.
            output_trace: also return memories, recalled embeddings and ages of every segment.
            kwargs: shift_labels, labels already shifted: shift_labels[:, t] follows input_ids[:, t]. It is not in the
                signature (nor in that of transformers' own models), or Trainer would expect it in every batch.

        Raises:
            ValueError: shapes that do not fit, or a state of another batch size or model.
            RuntimeError: inside torch.nn.DataParallel, whose replicas would run the layers of the original.
        """
        if "_is_replica" in vars(self):
            raise RuntimeError(
                "torch.nn.DataParallel cannot replicate an HMT: start one process per GPU with torchrun, or show this "
                "one a single GPU with CUDA_VISIBLE_DEVICES=0"
            )
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        check_inputs(input_ids, attention_mask, labels, shift_labels, logits_to_keep, state, kwargs)
        if state is not None and not isinstance(state, HMTState):
            return HMTOutput(**forward_rows(self, input_ids, attention_mask, state, logits_to_keep or 1))
        length = input_ids.shape[1]
        if labels is not None and shift_labels is None:
            shift_labels = shift_left(labels)
        if logits_to_keep is None:
            logits_to_keep = 0 if shift_labels is None else None
        first_logit = length if logits_to_keep is None else length - (logits_to_keep or length)

        losses, kept, results, seen = None, [], [], 0
        if shift_labels is not None:
            offload = self.config.offload_states and self.config.rematerialize
            losses = SummedCrossEntropy(self.backbone, self.config.loss_chunk_size, offload=offload)
        for result in self.segments(input_ids, attention_mask, state, use_cache):
            rows, state = result.hidden, result.state
            stop = seen + rows.shape[1]
            if losses is not None and shift_labels is not None:
                with record_function("hmt.loss"):
                    losses.add(rows, shift_labels[:, seen:stop])
            if stop > first_logit:
                kept.append(rows[:, max(0, first_logit - seen) :])
            if output_trace:
                results.append(result)
            seen = stop
        loss = None
        if losses is not None and shift_labels is not None:
            counted = shift_labels.ne(IGNORE_INDEX).sum()
            loss = losses.total() / (counted if num_items_in_batch is None else num_items_in_batch)
        logits: Tensor | None = None
        if kept:
            with record_function("hmt.head"):
                logits = apply_head(self.backbone, torch.cat(kept, dim=1))
        return HMTOutput(loss=loss, logits=logits, state=state, trace=trace_of(results) if output_trace else None)

    def segments(
        self, input_ids: Tensor, attention_mask: Tensor | None, state: HMTState | None, use_cache: bool
    ) -> Iterator[SegmentResult]:
        """Read checked inputs, as the forward pass takes them, one segment after the other."""
        state = self._state(state, input_ids)
        for result in read_segments(self, Tokens.of(input_ids, attention_mask), state, use_cache):
            if is_checking():
                check_result(result)
            yield result

    def _state(self, state: HMTState | None, input_ids: Tensor) -> HMTState:
        """The caller's state if it can be continued here, or a new one."""
        if state is None:
            state = self.new_state(input_ids.shape[0])
        else:
            check_state(state, self.config, input_ids.device)
        if is_checking():
            check_values(self, [input_ids], [state])
        return state

    @torch.no_grad()
    def read(self, input_ids: Tensor, state: HMTState | None = None, attention_mask: Tensor | None = None) -> HMTState:
        """Read input_ids [B, T] and return only the new state; tokens past the last full segment wait in it unread."""
        if isinstance(state, (list, tuple)):
            raise TypeError(
                f"state must be an HMTState, got a {type(state).__name__}: HMTState.stack joins states of the same "
                "position, hmt.serving.step continues states at different ones"
            )
        check_inputs(input_ids, attention_mask, state=state)
        state = self._state(state, input_ids)
        text = Tokens.of(input_ids, attention_mask)
        length = self.config.segment_length
        full = max(0, (state.num_open + text.length) // length * length - state.num_open)
        if full:
            for result in read_segments(self, text.slice(0, full), state):
                if is_checking():
                    check_result(result)
                state = result.state
        return open_segment(state, join(state.open, text.slice(full, text.length)))


def _check_attention(backbone: PreTrainedModel, before: str) -> None:
    try:
        check_backbone(backbone)
    except ValueError as error:
        raise ValueError(
            f"backbone {type(backbone).__name__} does not run with attention {backbone.config._attn_implementation!r}: "
            f"pass attn_implementation={before!r} ({error})"
        ) from error


def _set_attention(backbone: PreTrainedModel, requested: str | None, loaded_with: str | None = None) -> None:
    """Give the backbone the attention asked for; by default "hmt" in place of transformers' own default "sdpa"."""
    current = loaded_with or backbone.config._attn_implementation
    capped = getattr(backbone.config, "attn_logit_softcapping", None) is not None
    replaceable = current == "sdpa" and not capped and backbone.config.model_type not in READ_MASKS
    backbone.set_attn_implementation(requested or ("hmt" if replaceable else current))
