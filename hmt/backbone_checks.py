"""Whether a causal language model can be the backbone of a recurrence: by its config, and run on six tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hmt.backbone import apply_head, embed, run_layers, unwrap

REPORT = "please report the architecture"


def check_backbone(model: PreTrainedModel) -> None:
    """Raise unless `model` is a causal LM whose logits are head(layers(embeddings)), causally, as HMT needs.

    Raises:
        TypeError: not a transformers model.
        ValueError: encoder-decoder, no LM head, no `inputs_embeds`, a later token changes an earlier output, or
            logits that `apply_head` does not reproduce.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"backbone must be a transformers causal language model, got {type(model).__name__}")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"backbone must be decoder-only, got the encoder-decoder {name}")
    if not hasattr(model.config, "hidden_size"):
        raise ValueError(
            f"backbone must be a text model, got {name}, whose config has no hidden_size of its own: a model of images "
            "or sounds too is loaded by the class of its language model alone, such as Gemma3ForCausalLM"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"backbone must have an LM head, got {name}: load it with AutoModelForCausalLM")
    if any(p.device.type == "meta" for p in model.parameters()):
        return
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _check_outputs(model, name)
    finally:
        model.train(training)


def _check_outputs(model: PreTrainedModel, name: str) -> None:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(6, device=model.device)[None] % vocab_size
    # like a memory, they are the embeddings of no token, which some backbones would look up again
    embeds = (embed(model, ids) + embed(model, (ids + 1) % vocab_size)) / 2
    try:
        hidden = run_layers(model, embeds).last_hidden_state
        expected = model(inputs_embeds=embeds, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, NotImplementedError, AttributeError, RuntimeError) as error:
        raise ValueError(f"backbone {name} does not run on inputs_embeds alone: {error}") from error
    # one visible future token is enough to break the recurrence, so it is worth a second pass over six tokens
    changed = torch.cat([embeds[:, :-1], embeds[:, :1]], dim=1)
    earlier = run_layers(model, changed).last_hidden_state[:, :-1]
    if not _same(earlier, hidden[:, :-1]):
        raise ValueError(f"backbone {name} is not causal: a later token changes earlier hidden states")
    if not _same(apply_head(model, hidden), expected):
        raise ValueError(
            f"backbone {name} computes its logits in a way that hmt does not know (not its LM head on the last "
            f"hidden state): {REPORT}"
        )
    tokens = run_layers(model, embed(model, ids)).last_hidden_state
    if not _same(apply_head(model, tokens), model(ids, use_cache=False).logits):
        raise ValueError(f"backbone {name} makes something else of tokens than of their embeddings: {REPORT}")


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether they differ by rounding at most; where they are NaN, nobody knows."""
    if found.shape != expected.shape:
        return False
    return not bool((found - expected).abs().max() > 64 * torch.finfo(found.dtype).eps * expected.abs().max())


def check_positions(model: PreTrainedModel, longest: int, others: int) -> None:
    """Raise a ValueError unless a backbone with learned positions has one for each of the `longest` pass's.

    `others` of them are not the segment's.
    """
    model = unwrap(model)
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or longest <= limit:
        return
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):  # OPT's has two more
        raise ValueError(
            f"segment_length must be at most {limit - others}, got {longest - others}: {type(model).__name__} has "
            f"learned {limit} positions, and memory and sensory tokens take {others}"
        )
