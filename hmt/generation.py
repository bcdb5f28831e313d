"""How transformers' generate() drives the recurrence: one token per step, the state in place of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import GenerationMixin

from hmt.state import HMTState

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM


REFUSED = ("output_hidden_states", "output_attentions", "guidance_scale", "prompt_lookup_num_tokens", "assistant_model")


class HMTGenerationMixin(GenerationMixin):
    """generate() for a model whose only memory is an `HMTState`, passed between steps under the name `state`.

    A `state` given to generate() is continued and `input_ids` are then the new tokens only; it is not changed. A list
    of one-row states continues documents that stand at different positions; rows are padded on the left.
    """

    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate(), with its options, a `state` to continue, and prompts of any length.

        Raises:
            ValueError: an option that needs what a pass does not keep (hidden states and attentions of the layers), or
                another pass than that after `state` (guidance, assisted decoding).

        Example:
            >>> state = model.read(book_ids)
            >>> model.generate(question_ids, state=state, max_new_tokens=100)
        """
        for name in REFUSED:
            value = kwargs.get(name, getattr(generation_config or self.generation_config, name, None))
            if value and not (name == "guidance_scale" and value == 1):
                raise ValueError(f"generate() of HMT cannot do {name}, got {value!r:.80}")
        return super().generate(inputs, generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it (and generate_batch, which begins with it) pages the keys of whole contexts, which no HMT keeps.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "continuous batching of transformers does not work with HMT, which keeps no keys of a whole context: "
            "generate(ids, state=[...]) and hmt.serving.step take documents at different positions"
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        state: HMTState | list[HMTState] | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next forward pass: the whole prompt first, then the newest token with its state."""
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("generate() of HMT needs input_ids: sensory memory reads tokens again, got inputs_embeds")
        if not is_first_iteration:
            input_ids, attention_mask = input_ids[:, -1:], None  # a generated token is never padding
        return {
            "input_ids": input_ids.to(self.device),
            "attention_mask": attention_mask,
            "state": state,
            "use_cache": use_cache is not False,
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """The state of the last pass goes into the next; which caches transformers carries by itself varies."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs["state"] = outputs.state
        return model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        state = model_kwargs.pop("state", None)
        ragged = isinstance(state, (list, tuple))
        if ragged:
            state = [s.without_cache() for s in state for _ in range(expand_size)]
        elif state is not None and expand_size > 1:
            rows = torch.arange(state.batch_size).repeat_interleave(expand_size)
            state = state.select_rows(rows)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if state is not None:
            model_kwargs["state"] = state if ragged else state.without_cache()
        return input_ids, model_kwargs

    @staticmethod
    def _reorder_cache(state: HMTState | list[HMTState], beam_idx: Tensor) -> HMTState | list[HMTState]:
        """The state of every beam, as beam search of transformers asks for it."""
        if isinstance(state, list):
            return [state[row] for row in beam_idx.tolist()]
        state.reorder_cache(beam_idx)
        return state


def continue_prompt(
    model: HMTForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: Tensor, /, **options: Any
) -> Tensor:
    """New tokens [T'] after a prompt [1, T] of any length, which is read at constant memory; options of generate()."""
    state = model.read(prompt[:, :-1]) if prompt.shape[1] > 1 else None
    last = prompt[:, -1:]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = model.generate(last, attention_mask=torch.ones_like(last), state=state, pad_token_id=pad, **options)
    return tokens[0, 1:]
