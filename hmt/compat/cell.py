"""One segment through the backbone, with HMT-pytorch's signatures and state_dict keys."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from hmt.backbone import apply_head, embed, run_layers, unwrap
from hmt.config import embedding_width
from hmt.recurrence import surround
from hmt.tokens import Tokens

REFUSED = ("inputs_embeds", "labels", "output_attentions", "past_key_values")  # what would change the results


class MemoryMap(nn.Module):
    """Linear map of a memory, one matrix for each direction; `mode` says which comes next."""

    def __init__(self, emb_dim: int):
        super().__init__()
        self.mode = "forward"
        self.linear = nn.Linear(emb_dim, emb_dim, bias=False)
        self.inv_linear = nn.Linear(emb_dim, emb_dim, bias=False)

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def forward(self, inputs: Tensor) -> Tensor:
        layer = self.linear if self.mode == "forward" else self.inv_linear
        return layer(inputs.to(layer.weight.dtype))


class MemoryCell(nn.Module):
    """One segment: [memory | sensory tokens | segment | memory] through the backbone.

    Args:
        base_model: a causal language model of transformers, PEFT-wrapped or not.
        num_mem_tokens: 1, or 0 for the baseline without memory.
        num_prepend: sensory tokens k.
    """

    def __init__(self, base_model: PreTrainedModel, num_mem_tokens: int | None, num_prepend: int):
        super().__init__()
        if num_mem_tokens not in (None, 0, 1):
            raise ValueError(f"num_mem_tokens must be 0 or 1, got {num_mem_tokens!r}")
        if not isinstance(num_prepend, int) or num_prepend < 0:
            raise ValueError(f"num_prepend must be an integer >= 0, got {num_prepend!r}")
        self.model = base_model
        self.n_prepend = num_prepend
        self.num_mem_tokens = num_mem_tokens
        self.prepend_list: Tensor | None = None
        width = embedding_width(unwrap(base_model).config)
        self.mem_map = MemoryMap(width)
        if num_mem_tokens:
            std = base_model.get_input_embeddings().weight.data.float().std()
            self.memory = nn.Parameter(torch.randn(num_mem_tokens, width) * std.cpu())

    def set_memory(self, input_shape: Any) -> Tensor:
        """p_0 for a batch of input_shape[0] rows, [B, 1, d]."""
        return self.memory.repeat(input_shape[0], 1, 1)

    def forward(
        self,
        input_ids: Tensor,
        memory_state: Tensor | None = None,
        prepend_state: Tensor | None = None,
        browse: bool = False,
        switch: bool = False,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        output_logits: bool = True,
        **kwargs: Any,
    ) -> tuple[CausalLMOutputWithCrossAttentions, Tensor | None, Tensor | None]:
        """Logits of a segment's rows, its memory [B, 1, d] and the sensory ids of the next segment."""
        if given := [name for name in REFUSED if kwargs.get(name) is not None and kwargs[name] is not False]:
            raise TypeError(f"MemoryCell.forward takes token ids, and no {', '.join(given)}")
        device = self.model.get_input_embeddings().weight.device
        input_ids = input_ids.to(device)
        memory_state = self._memory_for(input_ids, memory_state, switch)
        mask = None if attention_mask is None else attention_mask.to(device).bool()
        embeds, mask, first = self._inputs(Tokens(input_ids, mask), memory_state, prepend_state)
        self.prepend_list = input_ids[:, -self.n_prepend :] if self.n_prepend else None
        result = run_layers(self.model, embeds, mask, output_hidden_states=output_hidden_states)
        if browse and prepend_state is not None:
            first -= self.n_prepend - self.n_prepend // 2
        rows = slice(first, embeds.shape[1] - (self.num_mem_tokens or 0))
        out = CausalLMOutputWithCrossAttentions()
        if output_logits:
            out["logits"] = apply_head(self.model, result.last_hidden_state[:, rows])
        if output_hidden_states:
            out["hidden_states"] = [layer[:, rows] for layer in result.hidden_states]
        new_memory = result.last_hidden_state[:, -self.num_mem_tokens :] if self.num_mem_tokens else None
        return out, new_memory, self.prepend_list

    def generate(
        self,
        input_ids: Tensor,
        memory_state: Tensor | None,
        prepend_state: Tensor | None,
        attention_mask: Tensor | None,
        **generate_kwargs: Any,
    ) -> Tensor:
        """New tokens after [memory | sensory tokens | segment], by the backbone's own generate()."""
        memory_state = self._memory_for(input_ids, memory_state, switch=False)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        segment = Tokens(input_ids, mask.bool())
        embeds, visible, _ = self._inputs(segment, memory_state, prepend_state, trailing=False)
        return self.model.generate(inputs_embeds=embeds, attention_mask=cast(Tensor, visible).long(), **generate_kwargs)

    def _memory_for(self, input_ids: Tensor, memory_state: Tensor | None, switch: bool) -> Tensor | None:
        if memory_state is None and self.num_mem_tokens:
            memory_state = self.set_memory(input_ids.shape)
        if switch and memory_state is not None:
            self.mem_map.set_mode("backward" if self.mem_map.mode == "forward" else "forward")
            memory_state = self.mem_map(memory_state)
        return memory_state

    def _inputs(
        self, segment: Tokens, memory: Tensor | None, prepend: Tensor | None, trailing: bool = True
    ) -> tuple[Tensor, Tensor | None, int]:
        embeds = embed(self.model, segment.ids)
        front = [] if memory is None else [memory.to(embeds)]
        back = list(front) if trailing else []
        if prepend is not None:
            front = [*front, embed(self.model, prepend.to(segment.ids.device))]
        first = sum(part.shape[1] for part in front)
        return *surround(front, embeds, back, segment.mask), first
