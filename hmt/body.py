"""A model without its LM head, for what applies the head itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from hmt.inputs import check_inputs
from hmt.state import HMTState

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM


class HMTBody:
    """The recurrence without the LM head, as `model.base_model`: TRL's trainers compute their losses from it.

    Everything but a call is the backbone's own.
    """

    def __init__(self, model: HMTForCausalLM):
        self._model = model

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: HMTState | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states [B, T, d] of input_ids [B, T], of which the LM head makes logits; raises as the model does."""
        if state is not None and not isinstance(state, HMTState):
            raise TypeError(f"state must be one HMTState, got {type(state).__name__}")
        check_inputs(input_ids, attention_mask, state=state, unknown=kwargs)
        segments = self._model.segments(input_ids, attention_mask, state, use_cache)
        return BaseModelOutput(last_hidden_state=torch.cat([segment.hidden for segment in segments], dim=1))

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._model.backbone, name)
